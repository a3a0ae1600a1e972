"""Checkpoints of a run: the last two committed rounds, whole, checksummed, each enough to go on from.

    RUNS/<run id>/
      checkpoint-00004.safetensors    after round 4: model, best model so far, state of the strategy, history
      checkpoint-00003.safetensors    the one before; earlier ones are removed after a later one is on the disk
      checkpoint-00004.safetensors.discarded    given up by `fl-server resume --from-round`, and read by nobody

Each carries SHA-256 over everything in it, because a disk that gives back other bytes than it was given does not say so. One that
does not match is never used: the run goes on from the one before, and says so (`Found.lost`). If there is none, the run ends by
name.

Layouts: 2, one file `checkpoint.safetensors` without a checksum (release 0.1); 3, as above.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from privacy import disk
from privacy.errors import DocumentError

Float32 = npt.NDArray[np.float32]
VERSION = 3
LABEL = b"isocenter/v1/checkpoint\n"
KEPT = 2  # the last one may be damaged where the machine lost power, and then the one before has to be there
OLD = "checkpoint.safetensors"  # of layout 2
_NAME = re.compile(r"checkpoint-([0-9]{5})\.safetensors")
_REMEDY = "Restore the run's folder from a backup, or launch the study anew."


@dataclass(frozen=True)
class Found:
    """What a run goes on from. `lost`: rounds after it, newest first, whose checkpoints are damaged or gone."""

    arrays: dict[str, Float32] = field(default_factory=dict)
    progress: dict[str, Any] = field(default_factory=dict)
    lost: list[int] = field(default_factory=list)


def write(folder: Path, number: int, arrays: Mapping[str, Float32], progress: Mapping[str, Any]) -> None:
    """Make what is known after round `number` durable, then remove what is older than the one before. Raises DiskUnusable."""
    whole = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
    text = json.dumps({"version": VERSION, **progress})
    about = {"progress": text, "sha256": _checksum(whole, text)}
    disk.write_file(folder / _name(number), save(whole, metadata=about), 0o600)
    for old in sorted(_files(folder))[:-KEPT]:
        (folder / _name(old)).unlink(missing_ok=True)


def read(folder: Path, digest: str, committed: int) -> Found:
    """The newest checkpoint in `folder` that is as it was written, of the study `digest`; empty before the first round.

    `committed`: rounds that are known to be committed. Raises DocumentError if there is none to go on from, NewerVersion.
    """
    bring_forward(folder)
    lost = []
    for number in sorted({*_files(folder), committed} - {0}, reverse=True):
        path = folder / _name(number)
        try:
            arrays, progress = _read(path)
        except (OSError, SafetensorError, KeyError, ValueError, TypeError):
            lost.append(number)
            continue
        if progress["digest"] != digest:
            raise DocumentError(f"{path}: belongs to another study")
        return Found(arrays, progress, lost)
    if lost:
        raise DocumentError(f"{folder / _name(lost[0])}: damaged checkpoint, and there is no other", remedy=_REMEDY)
    return Found()


def kept(folder: Path) -> list[int]:
    """Rounds whose checkpoints are there, sound or not, in order."""
    return sorted(_files(folder))


def is_sound(folder: Path, number: int) -> bool:
    """Whether the checkpoint after round `number` is there, and as it was written."""
    try:
        _read(folder / _name(number))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return False
    return True


def set_aside(folder: Path, numbers: list[int], why: str = "damaged") -> None:
    """Give checkpoints another name, NAME.damaged or another reason, so that what is written next does not take their place."""
    for number in numbers:
        path = folder / _name(number)
        if path.exists():
            path.replace(path.with_name(f"{path.name}.{why}"))
    disk.flush_folder(folder)


def bring_forward(folder: Path) -> None:
    """Write a checkpoint of layout 2 as one of this layout. The old file is kept as NAME.v2; after a kill it is done again."""
    old = folder / OLD
    if not old.exists():
        return
    try:
        arrays, about = _content(old)
        progress = json.loads(about["progress"])
        version, number = progress.pop("version"), len(progress["history"])
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise DocumentError(f"{old}: damaged checkpoint ({error})", remedy=_REMEDY) from None
    disk.require_known(old, version, 2)
    if version != 2:
        raise DocumentError(
            f"{old}: written by another version of Isocenter, whose rounds hold figures of single sites",
            remedy="Launch the study anew.",
        )
    write(folder, number, arrays, progress)
    old.replace(old.with_name(f"{OLD}.v2"))
    disk.flush_folder(folder)


def _name(number: int) -> str:
    return f"checkpoint-{number:05d}.safetensors"


def _files(folder: Path) -> list[int]:
    return [int(match[1]) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]


def _read(path: Path) -> tuple[dict[str, Float32], dict[str, Any]]:
    arrays, about = _content(path)
    progress: dict[str, Any] = json.loads(about["progress"])
    disk.require_known(path, progress["version"], VERSION)
    if about["sha256"] != _checksum(arrays, about["progress"]):
        raise ValueError("other content than was written")
    return arrays, progress


def _content(path: Path) -> tuple[dict[str, Float32], dict[str, str]]:
    with safe_open(path, framework="numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
        return arrays, file.metadata() or {}


def _checksum(arrays: Mapping[str, Float32], progress: str) -> str:
    """64 hex characters over the text of the progress, and name, shape, type and values of each array."""
    found = hashlib.sha256(LABEL + hashlib.sha256(progress.encode()).digest())
    for name in sorted(arrays):
        value = np.ascontiguousarray(arrays[name])
        found.update(json.dumps([name, value.shape, value.dtype.str]).encode() + b"\n")
        found.update(value.data)
    return found.hexdigest()
