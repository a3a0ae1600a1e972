"""The site's half of `fl-study predict`: a folder of DICOM radiographs, scored by a released model.

Files are read by the confined processes of `ingest`, and brought to the grid by the same functions, so a score is the one that
the image would get in the study. A model of covariates takes them from a table with a row for each image, read as a site's label
table is. Nothing of it leaves: scores and file names go to whoever runs the command.
"""

import math
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
from fl_client.headers import Header
from fl_client.observed import covariates_of
from fl_client.readers import SCALE, Look, Radiograph, Readers, Reading, made, seen
from fl_client.site import Source
from fl_client.sources import Folder, Item
from models import exporting, learning
from models.covariates import AGE, SEX, names_of, words
from models.imaging import to_grid
from models.labels import LabelMap, LabelTable
from models.registry import Package
from models.study import Regression, Study
from privacy.errors import StudyConflict

BATCH = 64
Scores = NDArray[np.float32]


@dataclass
class Scored:
    """`rows`: file below the folder, SOP Instance UID, score per target, or the number in its unit. `left_out`: files by the name
    of the reason. `misread`: cells of the table of covariates that are no such value, and count as missing.
    """

    rows: list[tuple[str, str, list[float]]]
    left_out: Counter[str]
    misread: int = 0


def score(
    package: Package, folder: Path, jobs: int, tell: Callable[[int, int], None], beside: Path | None = None
) -> Scored:
    """Score every radiograph below `folder`; `tell` hears how many files of how many are done.

    `jobs`: confined reading processes; 0 reads in this process, for images known to be sound. `beside`: table of covariates.
    Raises StudyConflict for a model of volumes, and for a table where the model needs none, or none where it needs one;
    LabelTableError for a table without its columns; PackageRefused for weights of another network.
    """
    study = package.study
    if study.images.volume is not None:
        raise StudyConflict(
            "this model is of CT volumes, and `fl-study predict` reads radiographs",
            remedy="Export it with `fl-study export`, and use that on volumes prepared as docs/data.md says.",
        )
    table = _beside(study, beside)
    net, result = exporting.network(package), Scored([], Counter(), _misread(table))
    items = list(Folder(folder).items())
    by_name = {item.name: item for item in items}
    with tempfile.TemporaryDirectory() as scratch, Readers(jobs, Path(scratch)) as readers:
        cache = Cache(Path(scratch))
        for start in range(0, len(items), BATCH):
            part = items[start : start + BATCH]
            found, values = [], []
            for read in _read(readers, cache, part, by_name, result.left_out, study.images.scaling):
                known = _known(study, table, read[1], result.left_out)
                if known is not None:
                    found.append(read)
                    values.append(known)
            if found:
                grids = np.stack([to_grid(pixels, study.images.size_px) for _, _, pixels in found])
                images = torch.from_numpy(grids).reshape(-1, *study.images.shape)
                cohort = SimpleNamespace(images=images, covariates=torch.tensor(values).reshape(len(values), -1))
                scores = learning.predict(net, cast(Any, cohort))
                if isinstance(study.task, Regression):  # in its unit
                    low, high = study.task.range
                    scores = low + (high - low) * scores
                result.rows += [
                    (name, header.sop_uid, row.tolist()) for (name, header, _), row in zip(found, scores, strict=True)
                ]
            tell(start + len(part), len(items))
    result.rows.sort()
    return result


def _beside(study: Study, path: Path | None) -> LabelTable | None:
    """The table of covariates: a column `sop_instance_uid`, and one for each covariate of `study`, by its name."""
    wanted = names_of(study.covariates)
    if not wanted and path is None:
        return None
    if path is None:
        raise StudyConflict(
            f"beside the image this model takes {'; '.join(words(study.covariates))}",
            remedy=f"Give a table with --covariates: columns sop_instance_uid, {', '.join(wanted)}. An empty cell is missing.",
        )
    if not wanted:
        raise StudyConflict("this model takes images alone", remedy="Leave --covariates out.")
    mapping = LabelMap.model_validate(
        {
            "table": str(path),
            "key": "sop_instance_uid",
            "matches": "sop_uid",
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


def _known(study: Study, table: LabelTable | None, header: Header, left_out: Counter[str]) -> list[float] | None:
    """The covariates of one image, NaN where missing; None if it is left out, which is counted."""
    if table is None:
        return []
    if header.sop_uid not in table:
        left_out["no-row-of-covariates"] += 1
        return None
    found = covariates_of(header.sop_uid, header, table, study.covariates)
    if not all(study.covariates[n].admits(v) for n, v in zip(names_of(study.covariates), found, strict=True)):
        left_out["covariate-out-of-range"] += 1
        return None
    return [math.nan if value is None else value for value in found]


def _read(
    readers: Readers, cache: Cache, items: list[Item], by_name: dict[str, Item], left_out: Counter[str], scaling: str
) -> Iterator[tuple[str, Header, Scores]]:
    """(file, header, pixels float32 (H, W) in 0..1) of each radiograph; the others are counted by reason."""
    left_out.update(str(item.reason) for item in items if item.reason is not None)
    looks = [(item.name, Look(item, "dicom", patient="unknown")) for item in items if item.reason is None]
    tasks: list[tuple[tuple[str, str], Radiograph]] = []
    headers: dict[str, Header] = {}
    for name, answer in readers.run(looks):
        found = seen(answer)
        if "reason" in found:
            left_out[str(found["reason"])] += 1
        elif found["header"]["modality"] == "CT":
            left_out["not-a-radiograph"] += 1
        else:
            headers[name] = Header(**found["header"])
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
        yield name, headers[name], whole.astype(np.float32) / np.float32(SCALE)
        cache.path(stored).unlink()
