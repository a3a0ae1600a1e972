"""A released model for others' programs: a MONAI bundle, a torch.export program, or ONNX.

All three map images float32 (B, 1, *grid) in 0..1 on the study's grid to scores float32 (B, T) in 0..1, or a number in its unit,
or of a model that outlines (B, T, *grid), for any B, and need nothing of Isocenter where they are used. A model of covariates
takes them as a second input float32 (B, C), in the study's units and sorted by name, NaN where one is missing; a MONAI bundle has
no place for them.
"""

import importlib.metadata
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import monai
import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor, nn

from models import grids, imaging, learning, networks, tasks, volumes
from models.registry import Package
from models.study import Regression, Study
from privacy.errors import DocumentError, PackageRefused

SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
LICENCE = (
    "The weights are released by whoever signed the package, under the terms that docs/README.md and they name.\n"
    "The configuration and scripts in this bundle were written by Isocenter, Apache-2.0.\n"
)


def network(package: Package) -> nn.Module:
    """The study's network with the package's weights, ready to score.

    Raises PackageRefused if the weights are of another architecture, by the name or shape of any layer.
    """
    net = networks.build(package.study)
    wanted = {layer.name: layer.shape for layer in networks.layout(net)}
    if wanted != {name: tensor.shape for name, tensor in package.tensors.items()}:
        raise PackageRefused("the weights are of another network than the study's")
    parts = [package.tensors[name].reshape(-1) for name in wanted]
    networks.load_vector(net, np.concatenate(parts))
    return net.eval()


def named_weights(study: Study, vector: np.ndarray[Any, Any]) -> bytes:
    """A model of the coordinator, float32 (P,), as safetensors under the names of the network's layers.

    Raises MessageMalformed if it is of another network, or holds what is no finite number.
    """
    net = networks.build(study)
    networks.load_vector(net, vector)
    names = [layer.name for layer in networks.layout(net)]
    return save({name: net.state_dict()[name].numpy() for name in names})


def export(package: Package, kind: str, out: Path) -> None:
    """Write the model of `package` as `kind` (bundle, pt2 or onnx) to `out`. Raises DocumentError if `out` is there already."""
    if out.exists():
        raise DocumentError(f"{out} exists already", remedy="Choose another name; nothing was overwritten.")
    _KINDS[kind](package, out)


class _Scorer(nn.Module):
    """Network and activation, and the unit of a number, so that no user has to know them."""

    def __init__(self, net: nn.Module, study: Study) -> None:
        super().__init__()
        self.net = net
        self.low, self.high = study.task.range if isinstance(study.task, Regression) else (0.0, 1.0)

    def forward(self, images: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * tasks.activation(self.net(images))


class _ScorerBeside(nn.Module):
    """The same of a network that takes covariates."""

    def __init__(self, net: nn.Module, study: Study) -> None:
        super().__init__()
        self.scorer = _Scorer(net, study)

    def forward(self, images: Tensor, covariates: Tensor) -> Tensor:
        scorer = self.scorer
        return scorer.low + (scorer.high - scorer.low) * tasks.activation(scorer.net(images, covariates))


def _traced(package: Package) -> tuple[nn.Module, tuple[Tensor, ...], Any]:
    # Two images, because torch takes a batch of one for a constant.
    study, batch = package.study, {0: torch.export.Dim("batch")}
    images, kind = torch.zeros(2, *study.images.shape), _ScorerBeside if study.covariates else _Scorer
    given = learning.inputs(images, torch.zeros(2, len(study.covariates)))
    return kind(network(package), study).eval(), given, (batch,) * len(given)


def _pt2(package: Package, out: Path) -> None:
    scorer, example, dynamic = _traced(package)
    with torch.no_grad():
        program = torch.export.export(scorer, example, dynamic_shapes=dynamic)
    torch.export.save(program, out)


def _onnx(package: Package, out: Path) -> None:
    """Raises DocumentError, naming the extra, where onnx and onnxscript are not installed."""
    scorer, example, dynamic = _traced(package)
    try:
        with torch.no_grad():
            program = torch.onnx.export(
                scorer,
                example,
                dynamo=True,
                dynamic_shapes=dynamic,
                input_names=["images", "covariates"][: len(example)],
                output_names=["scores"],
            )
    except ImportError as error:
        raise DocumentError(
            f"ONNX needs more than is installed here ({error.name})",
            remedy="Install it with: pip install isocenter[onnx]",
        ) from None
    if program is None:
        raise DocumentError("this network has no form in ONNX", remedy="Export it as pt2 or bundle instead.")
    program.save(str(out))


def _bundle(package: Package, out: Path) -> None:
    """A folder in the layout of MONAI's bundle specification; `python -m monai.bundle run` scores the files in its `inputs`.

    MONAI's readers read them, and scripts/prepare.py brings them to the grid by the very functions of the training, copied from
    their source. So an image in the forms that a site may have beside DICOM gets the score that it has in the study. Raises
    DocumentError for a model of covariates, which no part of such a folder would hand over.
    """
    if package.study.covariates:
        raise DocumentError(
            "a MONAI bundle takes images alone, and this model takes covariates beside them",
            remedy="Export it with `--to pt2` or `--to onnx`; both take the covariates as a second input.",
        )
    for folder in ("configs", "models", "docs", "scripts", "inputs"):
        (out / folder).mkdir(parents=True)
    (out / "configs" / "metadata.json").write_text(json.dumps(_metadata(package), indent=1), encoding="utf-8")
    (out / "configs" / "inference.json").write_text(json.dumps(_inference(package.study), indent=1), encoding="utf-8")
    (out / "scripts" / "prepare.py").write_text(_preparing(package), encoding="utf-8")
    torch.save(network(package).state_dict(), out / "models" / "model.pt")
    _pt2(package, out / "models" / "model.pt2")
    grid = " x ".join(str(side) for side in package.study.images.shape[1:])
    ct = package.study.images.volume is not None
    what = "CT volumes in Hounsfield units as NIfTI (.nii, .nii.gz)" if ct else "frontal radiographs as PNG or JPEG"
    bright = "" if ct else " with bright as dense"
    written = "`scores.json`, with one list per file"
    if package.study.segments:
        written = "`scores.npz`, with one array (structure, *grid) per file; a voxel belongs to a structure from 0.5 on"
    usage = (
        f"\n## Using this bundle\n\nPut {what} into `inputs/`; or .npy files that are on the grid already, float32 {grid} in "
        f"0 to 1{bright}.\nThen in this folder: `pip install monai {'nibabel' if ct else 'pillow'} fire`, "
        "`python -m monai.bundle run --config_file configs/inference.json`.\n"
        f"It writes {written}: {', '.join(package.study.task.targets)}.\n"
    )
    (out / "docs" / "README.md").write_text(package.files["card.md"].decode() + usage, encoding="utf-8")
    (out / "LICENSE").write_text(LICENCE, encoding="utf-8")


_HEAD = '''"""How images come to the grid of this model, copied from Isocenter (Apache-2.0), which trained it.

`prepare` takes what MONAI's reader gives of one file, and gives float32 (1, *grid) in 0..1.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from torch.nn import functional

'''
_RADIOGRAPHS = """

def prepare(picture):
    values = np.asarray(picture, np.float32)
    low, high = np.percentile(values, [LOW, HIGH])
    if not high > low:
        raise ValueError("this picture is blank")
    pixels = np.clip((values - np.float32(low)) / np.float32(high - low), 0, 1)
    return torch.from_numpy(to_grid(reduced(pixels, LONGEST_SIDE_PX), SIZE_PX))
"""
_VOLUMES = """

def prepare(volume):
    # NIfTI counts to the right, to the front and up; DICOM, whose coordinates these are, to the left, to the back and up.
    affine = np.asarray(volume.affine, np.float64)[:3][:, [2, 1, 0, 3]]
    affine[:2] *= -1
    values = np.nan_to_num(np.asarray(volume, np.float32), nan=AIR_HU).transpose(2, 1, 0)
    return torch.from_numpy(to_volume_grid(hounsfield(values, None), affine, GRID))
"""


def _preparing(package: Package) -> str:
    """The text of scripts/prepare.py."""
    images = package.study.images
    if images.volume is None:
        constants = {"LOW": imaging.LOW, "HIGH": imaging.HIGH, "SIZE_PX": images.size_px}
        constants["LONGEST_SIDE_PX"] = package.longest_side_px
        parts: list[Callable[..., Any]] = [grids.reduced, grids.to_grid, grids._resized]
        last = _RADIOGRAPHS
    else:
        constants = {"AIR_HU": volumes.AIR_HU, "HU_MAX": volumes.HU_MAX}
        parts = [volumes.hounsfield, volumes.to_volume_grid, volumes.grid_places, volumes._blocks, volumes._averaged]
        last = _VOLUMES
    lines = [f"{name} = {value!r}" for name, value in constants.items()]
    if images.volume is not None:
        lines.append(f"GRID = SimpleNamespace(**{images.volume.model_dump()!r})")
    return _HEAD + "\n".join(lines) + "\n\n\n" + "\n\n".join(inspect.getsource(part) for part in parts) + last


def _metadata(package: Package) -> dict[str, Any]:
    study, version = package.study, package.manifest["version"]
    tensor = {"dtype": "float32", "value_range": [0, 1]}
    number = isinstance(study.task, Regression)
    image = {
        "type": "image",
        "format": "hounsfield" if study.images.volume is not None else "magnitude",
        "modality": "CT" if study.images.volume is not None else "CR",
        "num_channels": 1,
        "spatial_shape": list(study.images.shape[1:]),
        "is_patch_data": False,
        "channel_def": {"0": "image"},
    }
    scores = {
        "type": "raw" if number else "probabilities",
        "format": study.task.kind,
        "num_channels": len(study.task.targets),
        "spatial_shape": list(study.images.shape[1:]) if study.segments else [],
        **({"value_range": study.task.range} if isinstance(study.task, Regression) else {}),
        "channel_def": {str(place): name for place, name in enumerate(study.task.targets)},
    }
    return {
        "schema": SCHEMA,
        "version": version,
        "changelog": {version: f"study {study.digest}, run {package.manifest['run_id']}"},
        "monai_version": monai.__version__,
        "pytorch_version": torch.__version__.partition("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": _readers(study),
        "name": study.title,
        "task": f"{study.task.kind.capitalize()} of {', '.join(study.task.targets)}",
        "description": study.purpose,
        "authors": f"The consortium of {', '.join(study.all_sites)}",
        "copyright": "Of whoever signed the package",
        "intended_use": study.purpose,
        "network_data_format": {"inputs": {"image": image | tensor}, "outputs": {"pred": tensor | scores}},
    }


def _readers(study: Study) -> dict[str, str]:
    """What MONAI reads such files with."""
    name = "nibabel" if study.images.volume is not None else "pillow"
    return {name: importlib.metadata.version(name)}


def _inference(study: Study) -> dict[str, Any]:
    ct = study.images.volume is not None
    endings = (".npy", ".nii", ".nii.gz") if ct else (".npy", ".png", ".jpg", ".jpeg")
    picture: dict[str, Any] = {"_target_": "LoadImage", "image_only": True, "reader": "NibabelReader"}
    if not ct:
        # Rows stay rows, and what holds more than eight bits keeps them.
        grey = "$lambda image: image if image.mode[0] in 'IF' else image.convert('L')"
        picture |= {"reader": "PILReader", "reverse_indexing": False, "converter": grey}
    named, ending, scored = "dict(zip(@names, @scores))", "json", "tolist()"
    write = f"pathlib.Path(@output_file).write_text(json.dumps({named}))"
    if study.segments:
        write, ending, scored = f"numpy.savez_compressed(@output_file, **{named})", "npz", "detach().numpy()"
    return {
        "imports": [f"$import {name}" for name in ("json", "numpy", "os", "pathlib", "runpy", "torch")],
        "bundle_root": ".",
        "input_dir": "$@bundle_root + '/inputs'",
        "output_file": f"$@bundle_root + '/scores.{ending}'",
        "names": f"$sorted(name for name in os.listdir(@input_dir) if name.lower().endswith({endings}))",
        "on_grid": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImage", "reader": "NumpyReader", "image_only": True},
                {"_target_": "EnsureChannelFirst", "channel_dim": "no_channel"},
                {"_target_": "EnsureType", "dtype": "$torch.float32", "track_meta": False},
            ],
        },
        "picture": picture,
        "prepare": "$runpy.run_path(@bundle_root + '/scripts/prepare.py')['prepare']",
        "read": "$lambda path: @on_grid(path) if path.endswith('.npy') else @prepare(@picture(path))",
        "network": "$torch.export.load(@bundle_root + '/models/model.pt2').module()",
        "scores": f"$[@network(@read(os.path.join(@input_dir, name))[None])[0].{scored} for name in @names]",
        "run": [f"${write}"],
    }


_KINDS: dict[str, Callable[[Package, Path], None]] = {"bundle": _bundle, "pt2": _pt2, "onnx": _onnx}
