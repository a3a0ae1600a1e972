"""A file of weights becomes the model that a run starts from: checked against its hash first, never unpickled, fitted by name.

Read are safetensors files, and archives of `torch.save` (.pt, .pth, the model.pt of a MONAI bundle) that hold tensors and nothing
else. A pickle can run any program, so torch reads archives with `weights_only`, inside bounds, and only this file asks for it.

What is taken is decided by name and shape:

    names     those of the network here; prefixes such as `module.` and `model.` do not count, and torchvision's names of DenseNet
              (which torchxrayvision has too) are MONAI's with `layers.` before norm and convolution
    colours   a first convolution of three colours is summed to one: a grey picture shown in three colours gives the same
    norms     gains and biases beside running statistics belong to a BatchNorm; they and the statistics are dropped, because a
              GroupNorm measures otherwise, and its own gain and bias start at 1 and 0
    head      taken if it has the same name and shape; otherwise it stays as the seed made it
    Isocenter a released model.safetensors is one vector; it is taken whole if it has the length of this network's

A file that does not bring nine tenths of the kernels of the body is one of another network, and refused.
"""

import hashlib
import io
import math
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn

from models import networks
from models.study import Study
from privacy.errors import DocumentError, StudyConflict

FILE_BYTES_MAX = 1 << 30  # ResNet50 in three dimensions has 185 MB; all of the file is in memory while it is read
TENSORS_MAX = 100_000
BODY_LEAST = 0.9  # of the values of the body's kernels: a first layer may differ, a stage of another depth may not
ARCHIVE = b"PK\x03\x04"
RELEASED = "model"  # the one name in a model that Isocenter released
WRAPPERS = ("state_dict", "model_state_dict", "model")
PREFIXES = re.compile(r"^(?:(?:module|model|net|backbone|network)\.)+")
DENSE_LAYER = re.compile(r"(denselayer\d+)\.((?:norm|conv)[12]\.)")
CONVERT = (
    "On a machine where nothing is lost if the file is hostile, load it and save its state_dict() with safetensors; then name "
    "the new file's SHA-256 in the study."
)


@dataclass(frozen=True)
class Fit:
    """What came of a file: names of the network that it brought, and that the seed made; names of the file that had no place."""

    taken: tuple[str, ...]
    fresh: tuple[str, ...]
    left: tuple[str, ...]

    @property
    def sentence(self) -> str:
        total = len(self.taken) + len(self.fresh)
        return f"{len(self.taken)} of {total} tensors are the file's, {len(self.left)} of the file are left out"


@dataclass(frozen=True)
class Verdict:
    """Whether a study can start from a file. `problem`: why not, and what to do, or None. `shapes`: of names that the network has
    in another shape, the file's and the network's.
    """

    sha256: str
    fit: Fit
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    problem: str | None

    def to_json(self) -> dict[str, Any]:
        fit = {"taken": list(self.fit.taken), "fresh": list(self.fit.fresh), "left_out": list(self.fit.left)}
        shapes = {name: {"file": list(file), "network": list(here)} for name, (file, here) in self.shapes.items()}
        return {"sha256": self.sha256, "fits": self.problem is None, "problem": self.problem, **fit, "shapes": shapes}


def read(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors of a file by name, on the CPU; with `sha256`, only after all of its bytes were found to have that hash.

    Raises DocumentError, with the reason, if there is no such file, it is too large or is another one, or if it is no safetensors
    file and no archive of tensors alone. Nothing of the file is executed.
    """
    if not path.is_file():
        raise DocumentError(f"{path}: there is no such file", remedy="Check the path.")
    if path.stat().st_size > FILE_BYTES_MAX:
        raise DocumentError(
            f"{path}: larger than {FILE_BYTES_MAX >> 20} MiB; this is no file of weights for these networks"
        )
    # Hashed and parsed is one reading, so that nobody can exchange the file in between.
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if sha256 is not None and found != sha256:
        raise DocumentError(
            f"{path}: SHA-256 {found[:12]} is not the one that the study names, {sha256[:12]}",
            remedy="Take the file that the study means, or name this one's hash in `network.initial`.",
        )
    tensors = _of_archive(path, content) if content.startswith(ARCHIVE) else _of_safetensors(path, content)
    if not tensors or len(tensors) > TENSORS_MAX:
        raise DocumentError(f"{path}: holds {len(tensors)} tensors, so it is no file of weights", remedy=CONVERT)
    return tensors


def _of_safetensors(path: Path, content: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(content)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError):
        raise DocumentError(
            f"{path}: neither a safetensors file nor an archive of torch.save, or only the beginning of one",
            remedy=CONVERT,
        ) from None


def _of_archive(path: Path, content: bytes) -> dict[str, Tensor]:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            packed = [entry for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError):
        raise DocumentError(f"{path}: a damaged archive, or only its beginning", remedy="Copy it again.") from None
    if packed or unpacked > FILE_BYTES_MAX:
        raise DocumentError(f"{path}: a compressed archive; torch.save writes none", remedy=CONVERT)
    try:
        given = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception:  # whatever a hostile archive makes torch raise; its words come from the file and are not repeated
        raise DocumentError(
            f"{path}: holds more than tensors, or is damaged; it was not opened", remedy=CONVERT
        ) from None
    for wrapper in WRAPPERS:
        if isinstance(given, Mapping) and isinstance(given.get(wrapper), Mapping):
            given = given[wrapper]
    if not isinstance(given, Mapping):
        raise DocumentError(f"{path}: holds no tensors by name", remedy=CONVERT)
    return {name: value for name, value in given.items() if isinstance(name, str) and isinstance(value, Tensor)}


def fit(net: nn.Module, study: Study, tensors: Mapping[str, Tensor]) -> Fit:
    """Copy into `net`, the network of `study`, what fits of `tensors`; all or nothing.

    Raises StudyConflict if the file is one of another network, or if a value that would be taken is no finite number.
    """
    wanted = dict(net.state_dict())
    placed, left = _released(net, tensors) or _named(wanted, tensors)
    # `isfinite` after the shapes: an archive may describe a tensor of any size in a few bytes.
    if broken := [name for name, value in placed.items() if not bool(torch.isfinite(value).all())]:
        raise StudyConflict(
            f"the weights hold values that are not finite numbers, for example in {broken[0]}",
            remedy="Start from another file: these would be the model's first values.",
        )
    _require_body(study, wanted, placed)
    with torch.no_grad():
        for name, value in placed.items():
            wanted[name].copy_(value)
    fresh = tuple(name for name in wanted if name not in placed)
    return Fit(tuple(placed), fresh, tuple(left))


def judge(study: Study, path: Path) -> Verdict:
    """Compare a file with the network of `study`, before anybody else gets it. Raises DocumentError if it cannot be read."""
    net, tensors = networks.build(study), read(path)
    sha256, wanted = hashlib.sha256(path.read_bytes()).hexdigest(), dict(net.state_dict())
    placed, left = _released(net, tensors) or _named(wanted, tensors)
    offered = {_plain(name): tensors[name] for name in left}
    shapes = {
        name: (tuple(offered[_plain(name)].shape), tuple(here.shape))
        for name, here in wanted.items()
        if name not in placed and _plain(name) in offered and offered[_plain(name)].shape != here.shape
    }
    fresh = tuple(name for name in wanted if name not in placed)
    problem: str | None = None
    try:
        read(path, study.network.initial.sha256 if study.network.initial is not None else None)
        fit(net, study, tensors)
    except DocumentError as error:
        problem = f"{error}. {error.remedy}"
    return Verdict(sha256, Fit(tuple(placed), fresh, tuple(left)), shapes, problem)


def _released(net: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]] | None:
    """A model that Isocenter released for a network of this length, in its parts; None if it is no such model."""
    layers = networks.layout(net)
    sizes = [math.prod(layer.shape) for layer in layers]
    if set(tensors) != {RELEASED} or tuple(tensors[RELEASED].shape) != (sum(sizes),):
        return None
    parts = torch.split(tensors[RELEASED].to(torch.float32), sizes)
    return {layer.name: part.reshape(layer.shape) for layer, part in zip(layers, parts, strict=True)}, []


def _named(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """(values of the network by its names, names of the file without a place)."""
    batch_norms = {_plain(name).rpartition(".")[0] for name in tensors if name.endswith(".running_mean")}
    offered = {_plain(name): name for name in tensors}
    placed: dict[str, Tensor] = {}
    used = set()
    for name, here in wanted.items():
        plain = _plain(name)
        if plain not in offered or plain.rpartition(".")[0] in batch_norms:
            continue
        value = tensors[offered[plain]]
        if value.is_floating_point() and (same := _shaped(value, here)) is not None:
            placed[name] = same
            used.add(offered[plain])
    return placed, [name for name in tensors if name not in used]


def _plain(name: str) -> str:
    return DENSE_LAYER.sub(r"\1.layers.\2", PREFIXES.sub("", name))


def _shaped(value: Tensor, here: Tensor) -> Tensor | None:
    """`value` as float32 with the shape of `here`; None if it has another."""
    if value.shape == here.shape:
        return value.to(torch.float32)
    colours = (here.shape[0], 3, *here.shape[2:]) if here.dim() > 2 and here.shape[1] == 1 else None
    return value.to(torch.float32).sum(dim=1, keepdim=True) if tuple(value.shape) == colours else None


def _require_body(study: Study, wanted: Mapping[str, Tensor], placed: Mapping[str, Tensor]) -> None:
    """Raise StudyConflict unless most kernels of the body are in `placed`; where all is head, those of the head."""
    kernels = {name: value.numel() for name, value in wanted.items() if value.dim() > 1}
    head = networks.parts_of(study).head
    body = {
        name: size for name, size in kernels.items() if not PREFIXES.sub("", name).startswith(PREFIXES.sub("", head))
    }
    counted = body or kernels
    brought = sum(size for name, size in counted.items() if name in placed)
    if brought < BODY_LEAST * sum(counted.values()):
        share = 100 * brought // sum(counted.values())
        raise StudyConflict(
            f"the weights are those of another network: of the kernels of {study.network.name} they bring {share} %",
            remedy="Name the network that the file was made for in `network.name`, or another file in `network.initial`. "
            f"Images of {study.images.words} need kernels of {len(study.images.shape) - 1} dimensions.",
        )


def start(study: Study, path: Path | None) -> tuple[NDArray[np.float32], Fit | None]:
    """The first model of `study`, float32 (P,), and what of it is from `path`; without `network.initial`, the seed's alone. With
    local norms it is without these: each site begins with fresh ones, whatever the file has.

    Raises DocumentError if `path` is not the file that the study names, or is none.
    """
    net = networks.build(study)
    if study.network.initial is None:
        return networks.shared(net, study), None
    if path is None:
        raise DocumentError("the study starts from weights, and there is no file of them")
    found = fit(net, study, read(path, study.network.initial.sha256))
    return networks.shared(net, study), found
