"""The site's half of `fl-study predict`: a folder of DICOM radiographs or CT series, scored by a released model.

Files are read by the confined processes of `ingest`, slices are put together by the same `series.assemble`, and images are
brought to the grid by the same functions, so a score is the one that the image would get in the study. A model of covariates
takes them from a table with a row for each image, read as a site's label table is. Nothing of it leaves: scores and file names go
to whoever runs the command.
"""

import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fl_client.cache import SCALE, Cache
from fl_client.first_look import Header
from fl_client.observed import covariates_of
from fl_client.readers import Look, Radiograph, Readers, Reading, SlicesOfVolume, Task, made, seen
from fl_client.series import Series, Slice, assemble
from fl_client.sources import Folder, Item, Reason
from models import exporting, learning
from models.covariates import AGE, SEX, names_of, words
from models.grids import to_grid
from models.labels import LabelMap, LabelTable
from models.registry import Package
from models.study import Regression, Study
from models.volumes import to_volume_grid
from privacy.errors import StudyConflict

BATCH = 64
VOLUMES_AT_A_TIME = 4
ANOTHER_MODALITY, NO_ROW, OUT_OF_RANGE = "another-modality", "no-row-of-covariates", "covariate-out-of-range"
Scores = NDArray[np.float32]
Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Row:
    """One image: the file by which it is known (of a volume its first slice), its UID, a score for each target or the number in
    its unit, how many files it is.
    """

    file: str
    uid: str
    scores: list[float]
    files: int


@dataclass
class Scored:
    """`rows` by file; `uid`: what their UIDs are of. `left_out`: files by the name of the reason. `misread`: cells of the table
    of covariates that are no such value, and count as missing.
    """

    rows: list[Row]
    left_out: Counter[str]
    uid: str
    misread: int = 0


def score(package: Package, folder: Path, jobs: int, tell: Tell, beside: Path | None = None) -> Scored:
    """Score every image below `folder` that the model is for, each once; `tell(stage, done, total)` hears how far it is.

    `jobs`: confined reading processes; 0 reads in this process, for images known to be sound. `beside`: table of covariates.
    Raises StudyConflict for a table where the model needs none, or none where it needs one; LabelTableError for a table without
    its columns; PackageRefused for weights of another network.
    """
    study = package.study
    volumes, table = study.images.volume is not None, _table(study, beside)
    net, left_out, rows = exporting.network(package), Counter[str](), list[tuple[str, Row]]()
    items = {item.name: item for item in Folder(folder).items()}
    with tempfile.TemporaryDirectory() as scratch, Readers(jobs, Path(scratch)) as readers:
        cache = Cache(Path(scratch))
        looked = _look(readers, study, items, left_out, tell)
        images = _volumes(cache, items, looked, left_out) if volumes else _radiographs(cache, items, looked, package)
        wanted = list(_with_covariates(images, study, table, left_out))
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
    return Scored(_once(rows, left_out), left_out, _key_of(study), _misread(table))


@dataclass(frozen=True)
class _Wanted:
    """One image to be scored: by which file and UID it is known, how it is read, under which name it is stored meanwhile.

    `header`: of its first file; `covariates`: in the study's order, NaN where missing.
    """

    name: str
    uid: str
    header: Header
    files: int
    task: Task
    stored: str
    affine: NDArray[np.float64] | None = None
    covariates: tuple[float, ...] = ()

    def on_grid(self, pixels: NDArray[Any], study: Study) -> Scores:
        if study.images.volume is not None and self.affine is not None:
            return to_volume_grid(pixels, self.affine, study.images.volume)
        return to_grid(pixels.astype(np.float32) / np.float32(SCALE), study.images.size_px)


def _scored(net: nn.Module, images: list[tuple[_Wanted, str, Scores]], study: Study) -> list[tuple[str, Row]]:
    """(hash of the pixels, row) of each."""
    grids = torch.from_numpy(np.stack([grid for _, _, grid in images])).reshape(-1, *study.images.shape)
    values = torch.tensor([one.covariates for one, _, _ in images], dtype=torch.float32).reshape(len(images), -1)
    scores = learning.predict(net, cast(Any, SimpleNamespace(images=grids, covariates=values)))
    if isinstance(study.task, Regression):  # in its unit
        low, high = study.task.range
        scores = low + (high - low) * scores
    pairs = zip(images, scores.tolist(), strict=True)
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
        yield _Wanted(name, header.sop_uid, header, 1, task, stored)


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
        yield _Wanted(series.name, first.series_uid, first, len(series.slices), task, stored, series.stack.affine)


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


# Covariates ----------------------------------------------------------------------------------------------------------


def _key_of(study: Study) -> str:
    """By what an image is known, in tables of covariates and of scores."""
    return "sop_instance_uid" if study.images.volume is None else "series_instance_uid"


def _table(study: Study, path: Path | None) -> LabelTable | None:
    """The table of covariates: a column `_key_of(study)`, and one for each covariate of `study`, by its name."""
    wanted, key = names_of(study.covariates), _key_of(study)
    if not wanted and path is None:
        return None
    if path is None:
        raise StudyConflict(
            f"beside the image this model takes {'; '.join(words(study.covariates))}",
            remedy=f"Give a table with --covariates: columns {key}, {', '.join(wanted)}. An empty cell is missing.",
        )
    if not wanted:
        raise StudyConflict("this model takes images alone", remedy="Leave --covariates out.")
    mapping = LabelMap.model_validate(
        {
            "table": str(path),
            "key": key,
            "matches": "sop_uid" if study.images.volume is None else "series_uid",
            "about": {name: name for name in wanted if name in (AGE, SEX)},
            "numbers": {name: {"column": name} for name in wanted if name not in (AGE, SEX)},
        }
    )
    return LabelTable.read(path, mapping)


def _misread(table: LabelTable | None) -> int:
    if table is None:
        return 0
    listed = [*table.unmapped.values(), *table.about_unmapped.values()]
    return table.malformed + table.implausible_ages + sum(counted.total() for counted in listed)


def _with_covariates(
    images: Iterator[_Wanted], study: Study, table: LabelTable | None, left_out: Counter[str]
) -> Iterator[_Wanted]:
    """Each image with what the model takes beside it; those whose covariates cannot be used are counted by reason."""
    for one in images:
        if table is None:
            yield one
        elif one.uid not in table:
            left_out[NO_ROW] += one.files
        else:
            found = covariates_of(one.uid, one.header, table, study.covariates)
            if all(study.covariates[n].admits(v) for n, v in zip(names_of(study.covariates), found, strict=True)):
                yield replace(one, covariates=tuple(math.nan if value is None else value for value in found))
            else:
                left_out[OUT_OF_RANGE] += one.files
