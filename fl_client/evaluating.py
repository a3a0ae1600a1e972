"""A released model on this site's own test patients, for the hospital's own eyes: figures, and the tables that MELODY reads.

Nothing of it leaves. Patients on whom this site trained the model, or chose its round, are never among those who are tested: they
are told by the splits that were pinned. Cases are keyed pseudonyms (HOME/keys/pseudonyms.key), so that a folder which is copied
by mistake names nobody. The journal has its line before the folder has its name.

MELODY (MIDRC/MIDRC_MELODY) joins two tables by `case_name`: one with the reference standard and what groups a case belongs to,
one with a column of scores for each model. Every further column of the first is a category to it, so there is no patient in it.
"""

import csv
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import yaml
from numpy.typing import NDArray

from fl_client import cohort
from fl_client.cohort import Cohort, Member, Split
from fl_client.export import SECRET
from fl_client.index import Index
from fl_client.observed import observe
from fl_client.site import Site
from models import exporting, grades, intervals, learning
from models.attributes import AGE_EDGES, CAPPED_AGE
from models.labels import LabelTable
from models.questions import Observed, agreed
from models.registry import Package
from models.sections import Task
from models.study import Study
from models.subgroups import Scored
from privacy import disk, keys
from privacy.errors import CohortTooSmall, DocumentError, LabelTableError, StudyConflict

BATCH = 64
GRADE = "grade"
UNKNOWN = "Not Reported"  # MELODY leaves this word out of its groups
SEXES = {"F": "Female", "M": "Male", "O": "Other"}
COLUMNS = ("case_name", "truth", "age", "ethnicity", "race", "sex", "intersectional_race_ethnicity", "manufacturer")
"""Of MELODY's table of truth and demographics, in the spelling of its own examples; `manufacturer` is one more category to it."""
CASES_MIN = 10  # of a group that MELODY shows
LABELS = ["<18", "18-29", "30-39", "40-49", "50-64", "65-74", "75-84", "85+"]

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Evaluated:
    """What was found. `figures`: metrics.json; `files`: of the folder, by name."""

    figures: dict[str, Any]
    files: list[str]


def evaluate(
    site: Site,
    package: Package,
    divided: Study | None,
    out: Path,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluated:
    """Score the test patients of `divided` (None: of the model's own study) and write the folder `out`.

    Where the site is not in that study, all its patients are tested. `tell(done, total)` counts images. Raises DocumentError if
    `out` exists, StudyConflict for a model that classifies nothing, CohortTooSmall without a single test patient, PackageRefused
    for weights of another network, and what reading images and labels raises.
    """
    study = package.study
    if not isinstance(study.task, Task):
        raise StudyConflict(
            f"this is a model of {study.predicts}, and only models that classify can be tested like this",
            remedy="Use `fl-study predict`, and compare its answers with your own reference standard.",
        )
    if out.exists():
        raise DocumentError(f"{out} exists already", remedy="Choose a new folder; nothing was overwritten.")
    net = exporting.network(package)
    index, labels = Index.open(site.state), LabelTable.open(site.home, site.source.labels)
    split, members = _tested(site, index, labels, study, divided or study)
    if not members:
        raise CohortTooSmall("no labelled patient of this site is left to test the model on")
    tested = Cohort.of(index, study, split, members)
    parts = []
    for start in range(0, len(tested), BATCH):
        some = slice(start, start + BATCH)
        batch = SimpleNamespace(images=tested.images[some], covariates=tested.covariates[some])
        parts.append(learning.predict(net, cast(Any, batch)))
        tell(min(start + BATCH, len(tested)), len(tested))
    scored = Scored(np.concatenate(parts), tested.targets.numpy(), tested.known.numpy(), tested.patients.numpy())
    seen = agreed([observe(member.image, labels) for member in members])
    figures = {
        "model": {name: package.manifest[name] for name in ("name", "version", "digest", "run_id")}
        | {"sha256": package.sha256},
        "split": split,
        "divided_by": (divided or study).digest,
        "images": len(tested),
        "patients": tested.counts.patients,
        "targets": {name: _target(scored, place, package, name) for place, name in enumerate(study.task.targets)},
        "grades": _grades(scored) if study.relation == "ordered" else None,
    }
    return Evaluated(figures, _write(site, package, figures, _tables(site, package, scored, members, seen), out))


def _tested(site: Site, index: Index, labels: LabelTable, study: Study, divided: Study) -> tuple[Split, list[Member]]:
    """Which split this is, and its images, without those of patients by whom the model was made here. Nothing is written down."""
    if not set(study.task.targets) & set(labels.mapping.targets):
        raise LabelTableError(f"data.labels.targets has none of the model's targets ({', '.join(study.task.targets)})")
    members, _ = cohort.join(index, labels, study)
    split: Split = "external"
    if site.name in divided.all_sites:
        split = cohort.splits_of(divided, trains=site.name in divided.participation.sites)[-1]
    if split != "external":
        placed = cohort.placed(members, divided, cohort.read_pins(site.pins(divided))).splits
        members = [member for member in members if placed[member.token] == split]
    made = {token for token, place in cohort.read_pins(site.pins(study)).splits.items() if place != "test"}
    if site.name in study.participation.sites:
        members = [member for member in members if member.token not in made]
    return split, members


# Figures -------------------------------------------------------------------------------------------------------------


def _target(scored: Scored, place: int, package: Package, name: str) -> dict[str, Any]:
    """AUROC with both intervals, and rates at the thresholds of the model card, all with patients as units."""
    known = scored.known[:, place] != 0
    scores = scored.scores[known, place].astype(np.float64)
    truth, patients = scored.targets[known, place].astype(np.float64), scored.patients[known]
    positives = int((truth == 1).sum())
    found = intervals.clustered_auroc(scores, truth, patients) if 0 < positives < len(truth) else None
    entry: dict[str, Any] = {
        "images": len(truth),
        "patients": len(np.unique(patients)),
        "positives": positives,
        "negatives": len(truth) - positives,
        "auroc": found and found[0],
        "interval": found and intervals.clustered_interval(scores, truth, patients),
        "bootstrap_interval": found and intervals.bootstrap_interval(scores, truth, patients, 1),
        "operating": {
            rule: _at(scores, truth, patients, fixed["threshold"]) for rule, fixed in _fixed(package, name).items()
        },
    }
    return entry if found else entry | {"why": "fewer than two patients of a class"}


def _fixed(package: Package, name: str) -> dict[str, Any]:
    """The operating points in the model card, whose thresholds were fixed on the validation splits of the study."""
    card = json.loads(package.files["card.json"])
    found: dict[str, Any] = (
        card.get("metrics", {}).get("pooled", {}).get("targets", {}).get(name, {}).get("operating", {})
    )
    return found


def _at(scores: Float64, truth: Float64, patients: NDArray[np.int64], threshold: float) -> dict[str, Any]:
    called, ill = scores >= threshold, truth == 1
    rates = {"sensitivity": (called, ill), "specificity": (~called, ~ill), "ppv": (ill, called), "npv": (~ill, ~called)}
    found: dict[str, Any] = {"threshold": threshold}
    for rate, (hits, among) in rates.items():
        value = float(hits[among].mean()) if among.any() else None
        found[rate] = {"value": value, "interval": intervals.clustered_share(hits[among], patients[among])}
    return found


def _grades(scored: Scored) -> dict[str, Any] | None:
    found = grades.agreement(grades.table_of(scored))
    return found and found | {"interval": grades.clustered_interval(scored)}


# MELODY --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Table:
    """What is written of one target: (case, truth, score) of each case with a truth, and from where on a score is positive."""

    name: str
    rows: list[tuple[int, int, float]]
    threshold: float


def _tables(
    site: Site, package: Package, scored: Scored, members: list[Member], seen: list[Observed]
) -> dict[str, list[list[object]] | dict[str, Any]]:
    """File name -> rows of a table, or a settings file of MELODY."""
    secret = keys.token_key(site.home / "keys" / SECRET)
    cases: list[object] = [keys.token(secret, f"case {member.image.content} {member.image.file}") for member in members]
    model = f"{package.manifest['name']}-{package.manifest['version']}"
    files: dict[str, list[list[object]] | dict[str, Any]] = {}
    for table in _rows(package, scored):
        truth, scores = f"truth-{table.name}.csv", f"scores-{table.name}.csv"
        files[truth] = _usable([list(COLUMNS), *([cases[n], label, *_groups(seen[n])] for n, label, _ in table.rows)])
        told: list[list[object]] = [[cases[n], f"{score:.8g}"] for n, _, score in table.rows]
        files[scores] = [["case_name", model], *told]
        files[f"melody-{table.name}.yaml"] = _settings(truth, scores, table)
    return files


def _rows(package: Package, scored: Scored) -> list[_Table]:
    known, names = scored.known != 0, package.study.task.targets
    if package.study.relation == "ordered":  # a grade is one number to MELODY, which weighs distances of grades
        whole = np.flatnonzero(known.all(axis=1))
        called = (scored.scores >= grades.CALLED_FROM).sum(axis=1)
        reference = (scored.targets > 0).sum(axis=1)
        return [_Table(GRADE, [(int(n), int(reference[n]), float(called[n])) for n in whole], 1)]
    found = []
    for place, name in enumerate(names):
        which = np.flatnonzero(known[:, place])
        rows = [(int(n), int(scored.targets[n, place]), float(scored.scores[n, place])) for n in which]
        threshold = _fixed(package, name).get("youden", {}).get("threshold", 0.5)
        found.append(_Table(name, rows, threshold))
    return found


def _groups(seen: Observed) -> list[object]:
    """In the order of COLUMNS behind case and truth."""
    age: object = ""
    if seen.age is not None:
        low, high = seen.age
        band = [edge for edge in AGE_EDGES[:-1] if edge <= low]
        whole = low == high or (bool(band) and high <= AGE_EDGES[AGE_EDGES.index(band[-1]) + 1])
        age = int(min(low, CAPPED_AGE + 1)) if whole else ""
    both = UNKNOWN
    if seen.race and seen.ethnicity:
        white = (seen.race, seen.ethnicity) == ("White", "Not Hispanic or Latino")
        both = "White and Not HispanicLatino" if white else "Not White or Hispanic or Latino"
    sex = SEXES.get(seen.sex or "", UNKNOWN)
    return [age, seen.ethnicity or UNKNOWN, seen.race or UNKNOWN, sex, both, seen.vendor or UNKNOWN]


def _usable(rows: list[list[object]]) -> list[list[object]]:
    """The table without the categories in which no group has MELODY's least number of cases: it ends with an error on those."""
    kept = [0, 1]
    for place in range(2, len(rows[0])):
        said = [row[place] for row in rows[1:] if row[place] not in ("", UNKNOWN)]
        if rows[0][place] == "age":
            said = [int(np.searchsorted(AGE_EDGES, cast(int, age), "right")) for age in said]
        if max(Counter(said).values(), default=0) >= CASES_MIN:
            kept.append(place)
    return [[row[place] for place in kept] for row in rows]


def _settings(truth: str, scores: str, table: _Table) -> dict[str, Any]:
    """What MELODY's config.yaml says, for a start in the folder itself. Truth is 0 and 1, so any threshold in between fits it."""
    saved = {kind: {"save": False, "file prefix": f"{kind}_"} for kind in ("qwk", "eod", "aaod")}
    bins = [int(edge) for edge in AGE_EDGES[:-1]] + [float("inf")]
    return {
        "input data": {
            "truth file": truth,
            "test scores": scores,
            "uid column": "case_name",
            "truth column": "truth",
        },
        "output": saved,
        "numeric_cols": {"age_binned": {"raw column": "age", "bins": bins, "labels": LABELS}},
        "binary threshold": table.threshold,
        "min count per category": CASES_MIN,
        "bootstrap": {"iterations": intervals.RESAMPLES, "seed": 42},
        "plot": {"custom_orders": {}},
    }


# Files ---------------------------------------------------------------------------------------------------------------


def _write(
    site: Site,
    package: Package,
    figures: dict[str, Any],
    tables: dict[str, list[list[object]] | dict[str, Any]],
    out: Path,
) -> list[str]:
    """Everything into a hidden folder, a line into the journal, then the name. Only this user can open what is there."""
    part = out.with_name(f".{out.name}.part")
    with disk.faults_named(out):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(mode=0o700, parents=True)
        try:
            for name, content in tables.items():
                with _private(part / name) as file:
                    if isinstance(content, dict):
                        yaml.safe_dump(content, file, sort_keys=False)
                    else:
                        csv.writer(file, lineterminator="\n").writerows(content)
            with _private(part / "metrics.json") as file:
                file.write(json.dumps(figures, indent=1, allow_nan=False) + "\n")
            counts = {name: figures[name] for name in ("images", "patients")}
            site.journal.append("evaluation-written", model=package.sha256, split=figures["split"], **counts)
            part.rename(out)
            disk.flush_folder(out.parent)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    return sorted([*tables, "metrics.json"])


def _private(path: Path) -> Any:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8", newline="")
