"""The site's half of `fl-study predict`: a folder of DICOM radiographs, scored by a released model.

Files are read by the confined processes of `ingest`, and brought to the grid by the same functions, so a score is the one that
the image would get in the study. Nothing of it leaves: scores and file names go to whoever runs the command.
"""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from fl_client.cache import Cache
from fl_client.readers import SCALE, Look, Radiograph, Readers, Reading, made, seen
from fl_client.site import Source
from fl_client.sources import Folder, Item
from models import exporting, learning
from models.imaging import to_grid
from models.registry import Package
from privacy.errors import StudyConflict

BATCH = 64
Scores = NDArray[np.float32]


@dataclass
class Scored:
    """`rows`: file below the folder, SOP Instance UID, score per target. `left_out`: files by the name of the reason."""

    rows: list[tuple[str, str, list[float]]]
    left_out: Counter[str]


def score(package: Package, folder: Path, jobs: int, tell: Callable[[int, int], None]) -> Scored:
    """Score every radiograph below `folder`; `tell` hears how many files of how many are done.

    `jobs`: confined reading processes; 0 reads in this process, for images known to be sound. Raises StudyConflict for a model
    of volumes, PackageRefused for weights of another network.
    """
    study = package.study
    if study.images.volume is not None:
        raise StudyConflict(
            "this model is of CT volumes, and `fl-study predict` reads radiographs",
            remedy="Export it with `fl-study export`, and use that on volumes prepared as docs/data.md says.",
        )
    net, result = exporting.network(package), Scored([], Counter())
    items = list(Folder(folder).items())
    by_name = {item.name: item for item in items}
    with tempfile.TemporaryDirectory() as scratch, Readers(jobs, Path(scratch)) as readers:
        cache = Cache(Path(scratch))
        for start in range(0, len(items), BATCH):
            part = items[start : start + BATCH]
            found = list(_read(readers, cache, part, by_name, result.left_out, study.images.scaling))
            if found:
                grids = np.stack([to_grid(pixels, study.images.size_px) for _, _, pixels in found])
                cohort = SimpleNamespace(images=torch.from_numpy(grids).reshape(-1, *study.images.shape))
                scores = learning.predict(net, cast(Any, cohort))
                result.rows += [(name, uid, row.tolist()) for (name, uid, _), row in zip(found, scores, strict=True)]
            tell(start + len(part), len(items))
    result.rows.sort()
    return result


def _read(
    readers: Readers, cache: Cache, items: list[Item], by_name: dict[str, Item], left_out: Counter[str], scaling: str
) -> Iterator[tuple[str, str, Scores]]:
    """(file, SOP Instance UID, pixels float32 (H, W) in 0..1) of each radiograph; the others are counted by reason."""
    left_out.update(str(item.reason) for item in items if item.reason is not None)
    looks = [(item.name, Look(item, "dicom", patient="unknown")) for item in items if item.reason is None]
    tasks: list[tuple[tuple[str, str], Radiograph]] = []
    uids: dict[str, str] = {}
    for name, answer in readers.run(looks):
        found = seen(answer)
        if "reason" in found:
            left_out[str(found["reason"])] += 1
        elif found["header"]["modality"] == "CT":
            left_out["not-a-radiograph"] += 1
        else:
            uids[name] = found["header"]["sop_uid"]
            longest = Source.model_fields["longest_side_px"].default
            stored = f"{len(tasks):064x}"
            tasks.append(
                (
                    (name, stored),
                    Radiograph(by_name[name], found["sha256"], cache, stored, longest, Reading(scaling == "window")),
                )
            )
    for (name, stored), answer in readers.run(tasks):
        pixels = made(answer)
        if "reason" in pixels:
            left_out[str(pixels["reason"])] += 1
            continue
        whole = cache.read(stored, pixels["content"])
        yield name, uids[name], whole.astype(np.float32) / np.float32(SCALE)
        cache.path(stored).unlink()
