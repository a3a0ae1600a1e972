"""The site's half of `fl-study predict`: a folder of DICOM radiographs or CT series, scored by a released model.

Files are read by the confined processes of `ingest`, slices are put together by the same `series.assemble`, and images are
brought to the grid by the same functions, so a score is the one that the image would get in the study. Nothing of it leaves:
scores and file names go to whoever runs the command.
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
from torch import nn

from fl_client.cache import Cache
from fl_client.headers import Header
from fl_client.readers import SCALE, Look, Radiograph, Readers, Reading, SlicesOfVolume, Task, made, seen
from fl_client.series import Series, Slice, assemble
from fl_client.sources import Folder, Item, Reason
from models import exporting, learning
from models.imaging import to_grid
from models.registry import Package
from models.study import Study
from models.volumes import to_volume_grid

BATCH = 64
VOLUMES_AT_A_TIME = 4
ANOTHER_MODALITY = "another-modality"
Scores = NDArray[np.float32]
Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Row:
    """One image: the file by which it is known (of a volume its first slice), its UID, a score for each target, its files."""

    file: str
    uid: str
    scores: list[float]
    files: int


@dataclass
class Scored:
    """`rows` by file; `uid`: what their UIDs are of. `left_out`: files by the name of the reason."""

    rows: list[Row]
    left_out: Counter[str]
    uid: str


def score(package: Package, folder: Path, jobs: int, tell: Tell) -> Scored:
    """Score every image below `folder` that the model is for, each once; `tell(stage, done, total)` hears how far it is.

    `jobs`: confined reading processes; 0 reads in this process, for images known to be sound. Raises PackageRefused for weights
    of another network.
    """
    study, net = package.study, exporting.network(package)
    volumes = study.images.volume is not None
    left_out, rows = Counter[str](), list[tuple[str, Row]]()
    items = {item.name: item for item in Folder(folder).items()}
    with tempfile.TemporaryDirectory() as scratch, Readers(jobs, Path(scratch)) as readers:
        cache = Cache(Path(scratch))
        looked = _look(readers, study, items, left_out, tell)
        wanted = list(
            _volumes(cache, items, looked, left_out) if volumes else _radiographs(cache, items, looked, package)
        )
        waiting, most = list[tuple[_Wanted, str, Scores]](), VOLUMES_AT_A_TIME if volumes else BATCH
        tell("scoring images", 0, len(wanted))
        for done, (one, answer) in enumerate(readers.run((one, one.task) for one in wanted), start=1):
            found = made(answer)
            if "reason" in found:
                left_out[str(found["reason"])] += one.files
            else:
                waiting.append((one, found["content"], one.on_grid(cache.read(one.stored, found["content"]), study)))
                cache.path(one.stored).unlink()
            if waiting and (len(waiting) == most or done == len(wanted)):
                rows += _scored(net, waiting, study)
                waiting.clear()
            tell("scoring images", done, len(wanted))
    return Scored(_once(rows, left_out), left_out, "series_instance_uid" if volumes else "sop_instance_uid")


@dataclass(frozen=True)
class _Wanted:
    """One image to be scored: by which file and UID it is known, how it is read, under which name it is stored meanwhile."""

    name: str
    uid: str
    files: int
    task: Task
    stored: str
    affine: NDArray[np.float64] | None = None

    def on_grid(self, pixels: NDArray[Any], study: Study) -> Scores:
        if study.images.volume is not None and self.affine is not None:
            return to_volume_grid(pixels, self.affine, study.images.volume)
        return to_grid(pixels.astype(np.float32) / np.float32(SCALE), study.images.size_px)


def _scored(net: nn.Module, images: list[tuple[_Wanted, str, Scores]], study: Study) -> list[tuple[str, Row]]:
    """(hash of the pixels, row) of each."""
    grids = torch.from_numpy(np.stack([grid for _, _, grid in images])).reshape(-1, *study.images.shape)
    scores = learning.predict(net, cast(Any, SimpleNamespace(images=grids))).tolist()
    pairs = zip(images, scores, strict=True)
    return [(content, Row(one.name, one.uid, numbers, one.files)) for (one, content, _), numbers in pairs]


def _look(
    readers: Readers, study: Study, items: dict[str, Item], left_out: Counter[str], tell: Tell
) -> list[tuple[str, str, Header]]:
    """(file, SHA-256, header) of each file that holds what the study takes, by name; the others are counted by reason."""
    looks = [(item.name, Look(item, "dicom", patient="unknown")) for item in items.values() if item.reason is None]
    left_out.update(str(item.reason) for item in items.values() if item.reason is not None)
    kept = []
    for done, (name, answer) in enumerate(readers.run(looks), start=1):
        found = seen(answer)
        if "reason" in found:
            left_out[str(found["reason"])] += 1
        elif found["header"]["modality"] not in study.images.modalities:
            left_out[ANOTHER_MODALITY] += 1
        else:
            kept.append((name, found["sha256"], Header(**found["header"])))
        tell("looking at files", done, len(looks))
    return sorted(kept, key=lambda one: one[0])


def _radiographs(
    cache: Cache, items: dict[str, Item], looked: list[tuple[str, str, Header]], package: Package
) -> Iterator[_Wanted]:
    how = Reading(package.study.images.scaling == "window")
    for number, (name, sha256, header) in enumerate(looked):
        stored = f"{number:064x}"
        task = Radiograph(items[name], sha256, cache, stored, package.longest_side_px, how)
        yield _Wanted(name, header.sop_uid, 1, task, stored)


def _volumes(
    cache: Cache, items: dict[str, Item], looked: list[tuple[str, str, Header]], left_out: Counter[str]
) -> Iterator[_Wanted]:
    """What `ingest` would make of these slices; those that make no volume are counted by reason."""
    for number, series in enumerate(assemble(Slice(*one) for one in looked)):
        if series.stack is None:
            left_out[str(series.reason)] += len(series.slices)
            continue
        first, stored = series.slices[0].header, f"{number:064x}"
        task = _slices(series, items, cache, stored)
        yield _Wanted(series.name, first.series_uid, len(series.slices), task, stored, series.stack.affine)


def _slices(series: Series, items: dict[str, Item], cache: Cache, stored: str) -> SlicesOfVolume:
    rows, columns = series.slices[0].header.size
    members = [items[found.file] for found in series.slices]
    return SlicesOfVolume(members, [found.sha256 for found in series.slices], cache, stored, (rows, columns))


def _once(rows: list[tuple[str, Row]], left_out: Counter[str]) -> list[Row]:
    """Of equal pixels, and of one radiograph sent twice, the row of the first file by name; the others count as duplicates."""
    kept, marks = list[Row](), set[str]()
    for content, row in sorted(rows, key=lambda one: one[1].file):
        own = {content, *([f"uid {row.uid}"] if row.uid and row.files == 1 else [])}
        if own & marks:
            left_out[str(Reason.DUPLICATE)] += row.files
        else:
            kept.append(row)
        marks |= own
    return kept
