"""Of a study that outlines structures: what metrics.json says in place of AUROC, and the rows of its table.

Pooled figures follow from the summed counts of all cases, with an interval that takes cases as independent; those of a site are
what it released, with its bootstrap over patients. What empty masks mean is said once, in `models.segmentation`.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from fl_server.results import Evaluation, OutlineFigure, Sample, testing_of
from models.sections import RELEASE_MIN
from models.segmentation import MEASURES, NAMES, Overlaps

NO_CASES = f"too few sites told of {RELEASE_MIN} cases of as many patients"
NO_TEST = "no test result"
NO_REPORT = "not in the test result"
TOO_FEW = f"not released: fewer than {RELEASE_MIN} cases of as many patients"
NOT_IN_STUDY = "not released by this study"
EMPTIES = ("both_empty", "missed", "invented")


def figures(evaluation: Evaluation) -> dict[str, Any]:
    """The parts of metrics.json that are about the model: pooled, per site, the mean over structures."""
    study, test = evaluation.study, evaluation.test
    absent = NO_CASES if test else NO_TEST
    sums = (test.overlaps if test else None) or Overlaps.empty(len(study.task.targets))
    targets = {name: _pooled(sums, place, absent) for place, name in enumerate(study.task.targets)}
    sites = {site: _of_site(site, evaluation) for site in study.all_sites}
    return {
        "pooled": {
            "sites": test.sites if test else [],
            "patients": test.patients if test else 0,
            "images": test.images if test else 0,
            "loss": test.loss if test else None,
            "dice": mean_dice(targets),
            "targets": targets,
        },
        "subgroups": {},
        "grades": None,
        "number": None,
        "sites": sites,
    }


def mean_dice(targets: dict[str, dict[str, Any]]) -> float | None:
    """Over the structures that have one."""
    found = [entry["dice"]["value"] for entry in targets.values() if entry["dice"]]
    return float(np.mean(found)) if found else None


def brief(sample: Sample | None) -> dict[str, Any] | None:
    """The figures of one round."""
    if sample is None or sample.overlaps is None:
        return None
    means = [sample.overlaps.mean(place, "dice") for place in range(len(sample.overlaps.counts))]
    known = [mean[0] for mean in means if mean is not None]
    return {
        "sites": sample.sites,
        "patients": sample.patients,
        "images": sample.images,
        "loss": sample.loss,
        "dice": float(np.mean(known)) if known else None,
    }


def _pooled(sums: Overlaps, place: int, absent: str) -> dict[str, Any]:
    row = sums.row(place)
    entry: dict[str, Any] = {name: row[name] for name in ("sites", "cases", *EMPTIES)}
    entry |= {"surface_cases": row["surface_cases"], "hd95_cases": row["distance_cases"]}
    for name, measure in zip(NAMES, MEASURES, strict=True):
        found = sums.mean(place, measure)
        interval = None if found is None or found[1] is None else list(found[1])
        entry[name] = None if found is None else {"value": found[0], "interval": interval}
    return entry if row["cases"] else entry | {"why": absent}


def _of_site(site: str, evaluation: Evaluation) -> dict[str, Any]:
    study, test = evaluation.study, evaluation.test
    absent = TOO_FEW if study.evaluation.site_figures else NOT_IN_STUDY
    if test is None or site not in test.sites:
        absent = NO_REPORT
    row = evaluation.results.figures.get(site, [None] * len(study.task.targets))
    targets = {name: _released(figure, absent) for name, figure in zip(study.task.targets, row, strict=True)}
    return {"testing": testing_of(study, site), "targets": targets}


def _released(figure: Any, absent: str) -> dict[str, Any]:
    if not isinstance(figure, OutlineFigure):
        return dict.fromkeys(("cases", *NAMES)) | {"why": absent}
    entry: dict[str, Any] = {"cases": figure.cases}
    for name in NAMES:
        found = getattr(figure, name)
        entry[name] = None if found is None else {"value": found[0], "interval": found[1:]}
    return entry


def rows(metrics: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """(structure, test split of, cases, Dice, surface Dice, HD95 in mm, missed) for people, the tested sites together first."""
    for target, whole in metrics["pooled"]["targets"].items():
        yield (target, "pooled", *_cells(whole, ""), f"{whole['missed']} / {whole['invented']}")
        for site, entry in metrics["sites"].items():
            part = entry["targets"][target]
            told = _cells(part, ">= ") if part["cases"] else (part["why"], "", "", "")
            yield (target, site, *told, "")


def _cells(entry: dict[str, Any], least: str) -> tuple[str, str, str, str]:
    return (
        f"{least}{entry['cases']}",
        shown(entry["dice"], 3),
        shown(entry["surface_dice"], 3),
        shown(entry["hd95_mm"], 1),
    )


def shown(found: dict[str, Any] | None, decimals: int) -> str:
    """ "0.913 (0.881 – 0.945)" of a value with its interval; a dash where there is none."""
    if found is None:
        return "–"
    ends = f" ({found['interval'][0]:.{decimals}f} – {found['interval'][1]:.{decimals}f})" if found["interval"] else ""
    return f"{found['value']:.{decimals}f}{ends}"
