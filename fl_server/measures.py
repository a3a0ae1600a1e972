"""metrics.json of a finished run: every figure that follows from a checked results document, unrounded.

Of all tested sites together everything is computed from summed histograms: AUROC with interval and binning bound, average
precision, operating points, calibration, decision curve, subgroups. Of a single site there is what it released itself. A figure
that cannot be estimated is null and `why` says why. Thresholds are fixed on the validation split of the selected round.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fl_server import outlines
from fl_server.results import VERSION, Evaluation, Figure, OutlineFigure, Round, Sample, testing_of
from models import grades, operating, regression
from models.calibration import calibration
from models.intervals import difference
from models.metrics import ScoreHistogram
from models.operating import Confusion, Rule, Threshold
from models.sections import RELEASE_MIN, Regression
from models.study import Study
from models.subgroups import groups, least_sites

ONE_CLASS = "one class"
NO_IMAGES = "no labelled images"
NO_TEST = "no test result"
NO_REPORT = "not in the test result"
TOO_FEW = f"not released: fewer than {RELEASE_MIN} images or 2 patients of a class"
NOT_IN_STUDY = "not released by this study"
NO_THRESHOLD = "no validation result with both classes to fix a threshold on"
A_NUMBER = "a number has no classes; see `number`"
NUMBER_TOO_FEW = f"not released: fewer than {RELEASE_MIN} images or patients, or all of one value"
NOISED = "the counts have noise of their own"


def measure(evaluation: Evaluation) -> dict[str, Any]:
    """Everything metrics.json says: who contributed, held-out figures pooled, per subgroup and per site, every round."""
    results, study = evaluation.results, evaluation.study
    return {
        "version": VERSION,
        "run_id": results.run_id,
        "digest": results.digest,
        "title": study.title,
        "protection": study.protection,
        "privacy": [statement.to_json() for statement in study.statements()],
        "label": results.label,
        "started": results.started.isoformat(),
        "finished": results.finished.isoformat(),
        "seconds": (results.finished - results.started).total_seconds(),
        "rounds": len(results.rounds),
        "selected_round": results.selected_round,
        "contributors": {str(entry.round): entry.contributors for entry in results.rounds},
        "test_missing": results.test_missing,
        "ingested_images": results.ingested,
        **(outlines.figures(evaluation) if study.segments else _scored(evaluation)),
        "initial": _brief(evaluation.validation[0]),
        "history": [_history(entry, evaluation.validation[entry.round]) for entry in results.rounds],
    }


def _scored(evaluation: Evaluation) -> dict[str, Any]:
    """The parts about a model that scores images: pooled, per subgroup, grade and site."""
    pooled = _pooled_figures(evaluation)
    sites = {site: _site_figures(site, evaluation) for site in evaluation.study.all_sites}
    released = [entry["auroc"] for entry in sites.values() if entry["auroc"] is not None]
    return {
        "pooled": pooled,
        "subgroups": _subgroups(evaluation),
        "grades": grades.agreement(evaluation.grades) if evaluation.grades.size else None,
        "number": _number(evaluation),
        "macro": {
            "auroc_over_sites": _mean(released),
            "sites": len(released),
            "auroc_over_targets": pooled["macro_auroc"],
        },
        "sites": sites,
    }


def _number(evaluation: Evaluation) -> dict[str, Any] | None:
    """Of a target that is a number: errors and agreement over all tested sites, and what each released; None of other targets.

    `mae` is null, with `why`, where no image was tested, and of a site that released nothing.
    """
    study, told = evaluation.study, evaluation.results.number
    if told is None or not isinstance(study.task, Regression):
        return None
    pooled = regression.agreement(study.task, np.array(told.sums, np.int64))
    absent = NUMBER_TOO_FEW if study.evaluation.site_figures else NOT_IN_STUDY
    sites: dict[str, Any] = {}
    for site in study.all_sites:
        said = told.sites.get(site)
        missing = evaluation.test is None or site not in evaluation.test.sites
        sites[site] = said.model_dump() if said else {"mae": None, "why": NO_REPORT if missing else absent}
    facts = {"target": study.task.targets[0], "unit": study.task.unit, "range": study.task.range}
    why = NO_IMAGES if evaluation.test else NO_TEST
    return {**facts, "pooled": pooled or {"mae": None, "images": 0, "why": why}, "sites": sites}


def _pooled_figures(evaluation: Evaluation) -> dict[str, Any]:
    """The figures of all tested sites: those of the first target flat, those of every target below `targets`."""
    study, test = evaluation.study, evaluation.test
    absent = A_NUMBER if evaluation.results.number else NO_IMAGES if test else NO_TEST
    sample = test or Sample([], 0, 0, None, ScoreHistogram.empty(len(study.task.targets), study.evaluation.bins))
    targets = {
        name: _target_figures(sample.histogram, place, absent, noise_of(evaluation))
        | _use(evaluation, sample.histogram, place)
        for place, name in enumerate(study.task.targets)
    }
    return {
        **targets[study.task.targets[0]],
        "sites": sample.sites,
        "patients": sample.patients,
        "images": sample.images,
        "loss": sample.loss,
        "macro_auroc": _mean([entry["auroc"] for entry in targets.values() if entry["auroc"] is not None]),
        "targets": targets,
    }


def noise_of(evaluation: Evaluation) -> float:
    """Standard deviation of the noise on each summed count of the test split; 0 without."""
    sites = len(evaluation.test.sites) if evaluation.test else 0
    return evaluation.study.figures_deviation * math.sqrt(max(1, sites))


def _target_figures(histogram: ScoreHistogram, place: int, absent: str, noise: float) -> dict[str, Any]:
    """AUROC with interval and binning bound; without both classes it is null and `why` says so. `noise`: of each count."""
    interval = histogram.interval(place, noise)
    entry: dict[str, Any] = {
        "positives": histogram.positives(place),
        "negatives": histogram.negatives(place),
        "auroc": histogram.auroc(place),
        "interval": None if interval is None else list(interval),
        "auroc_bound": histogram.auroc_bound(place),
    }
    if entry["auroc"] is None:
        entry["why"] = ONE_CLASS if entry["positives"] + entry["negatives"] else absent
    return entry


def _use(evaluation: Evaluation, histogram: ScoreHistogram, place: int) -> dict[str, Any]:
    """What the model would do in use: average precision, operating points, calibration, decision curve.

    Where counts have noise, all but the average precision are null: their intervals would not hold.
    """
    positives, total = histogram.positives(place), int(histogram.counts[place].sum())
    entry: dict[str, Any] = {
        "prevalence": positives / total if total else None,
        "average_precision": histogram.average_precision(place),
        "average_precision_bound": histogram.average_precision_bound(place),
        "operating": {},
        "operating_why": None,
        "calibration": None,
        "decision_curve": [],
    }
    if not histogram.estimable(place):
        return entry
    if noise_of(evaluation):
        return entry | {"operating_why": NOISED}
    fixed, found = thresholds_of(evaluation, place), calibration(histogram, place)
    return entry | {
        "operating": {rule: _at(histogram, place, rule, threshold) for rule, threshold in fixed.items()},
        "operating_why": None if fixed else NO_THRESHOLD,
        "calibration": found and found.to_json(),
        "decision_curve": operating.net_benefit(histogram, place),
    }


def thresholds_of(evaluation: Evaluation, place: int) -> dict[Rule, Threshold]:
    """Fixed on the summed validation split of the model that was tested; empty without one."""
    development = evaluation.validation.get(evaluation.results.selected_round)
    return operating.thresholds(development.histogram, place) if development else {}


def _at(histogram: ScoreHistogram, place: int, rule: Rule, threshold: Threshold) -> dict[str, Any]:
    counted = Confusion.at(histogram, place, threshold.edge)
    return {"rule": operating.WORDS[rule], "threshold": threshold.score} | counted.to_json()


def _subgroups(evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """For each target and division of the study: its groups, and the gap between the best and the worst of them."""
    study = evaluation.study
    return {
        target: {
            division: _division(evaluation, place, division, thresholds_of(evaluation, place))
            for division in study.evaluation.subgroups
        }
        for place, target in enumerate(study.task.targets)
    }


def _division(evaluation: Evaluation, place: int, division: str, fixed: Mapping[Rule, Threshold]) -> dict[str, Any]:
    """The groups of one division. The reference of differences is the group with most images.

    `eod`: sensitivity less that of the reference; `aaod`: mean of the absolute differences in sensitivity and in 1 - specificity
    (both as MIDRC-MELODY defines them), at each operating point.
    """
    told: dict[str, ScoreHistogram] = {}
    entries: dict[str, dict[str, Any]] = {}
    for number, group in enumerate(groups(evaluation.study)):
        if group.division != division:
            continue
        sites = int(evaluation.groups.told[number, place])
        histogram = ScoreHistogram(evaluation.groups.counts[number])
        if sites:
            told[group.name] = histogram
            entries[group.name] = _target_figures(histogram, place, "", 0.0) | {"sites": sites}
        else:
            nothing = dict.fromkeys(("positives", "negatives", "auroc", "interval", "auroc_bound"))
            entries[group.name] = nothing | {"sites": 0, "why": not_told(evaluation.study)}
    if not told:
        return {"groups": entries, "reference": None, "gap": None}
    reference = max(told, key=lambda name: int(told[name].counts[place].sum()))
    for name, histogram in told.items():
        entries[name]["operating"] = {
            rule: _beside(Confusion.at(histogram, place, cut.edge), Confusion.at(told[reference], place, cut.edge))
            for rule, cut in fixed.items()
        }
    return {"groups": entries, "reference": reference, "gap": gap({name: entries[name] for name in told})}


def not_told(study: Study) -> str:
    """Why a group has no figures."""
    least = least_sites(study)
    sites = "no site" if least == 1 else f"fewer than {least} sites"
    return f"{sites} had {RELEASE_MIN} patients and {RELEASE_MIN} images of each class to tell of"


def _beside(its: Confusion, reference: Confusion) -> dict[str, Any]:
    """The rates of one group, and how far they are from those of the reference group."""
    mine, other = its.sensitivity, reference.sensitivity
    entry: dict[str, Any] = {"sensitivity": mine.to_json(), "specificity": its.specificity.to_json()}
    if its == reference or None in (mine.value, other.value, its.specificity.value, reference.specificity.value):
        return entry | {"eod": None, "eod_interval": None, "aaod": None}
    eod = (mine.value or 0.0) - (other.value or 0.0)
    ends = difference(mine.value or 0.0, mine.interval or (0, 1), other.value or 0.0, other.interval or (0, 1))
    away = abs((its.specificity.value or 0.0) - (reference.specificity.value or 0.0))
    return entry | {"eod": eod, "eod_interval": list(ends), "aaod": (abs(eod) + away) / 2}


def gap(told: Mapping[str, dict[str, Any]]) -> dict[str, Any] | None:
    """Best less worst AUROC, with the interval of a difference between these two. None with fewer than two groups.

    The two were picked because they lie apart: the gap is larger than it would be again, and its interval knows nothing of it.
    """
    usable = {name: entry for name, entry in told.items() if entry["auroc"] is not None and entry["interval"]}
    if len(usable) < 2:
        return None
    best = max(usable, key=lambda name: usable[name]["auroc"])
    worst = min(usable, key=lambda name: usable[name]["auroc"])
    first, second = usable[best], usable[worst]
    ends = difference(first["auroc"], tuple(first["interval"]), second["auroc"], tuple(second["interval"]))
    return {"best": best, "worst": worst, "auroc": first["auroc"] - second["auroc"], "interval": list(ends)}


def _site_figures(site: str, evaluation: Evaluation) -> dict[str, Any]:
    """What `site` released: the first target flat, every target below `targets`; null with `why` where it did not.

    `testing`: external where the site's patients had no part in training or in choosing the round.
    """
    study, test = evaluation.study, evaluation.test
    absent = TOO_FEW if study.evaluation.site_figures else NOT_IN_STUDY
    if isinstance(study.task, Regression):
        absent = A_NUMBER
    if test is None or site not in test.sites:
        absent = NO_REPORT
    row = evaluation.results.figures.get(site, [None] * len(study.task.targets))
    targets = {name: _released(figure, absent) for name, figure in zip(study.task.targets, row, strict=True)}
    return {**targets[study.task.targets[0]], "testing": testing_of(study, site), "targets": targets}


def _released(figure: Figure | OutlineFigure | None, absent: str) -> dict[str, Any]:
    if not isinstance(figure, Figure):
        nothing = ("positives", "negatives", "auroc", "interval", "bootstrap_interval")
        return dict.fromkeys(nothing) | {"why": absent}
    return {
        "positives": figure.positives,
        "negatives": figure.negatives,
        "auroc": figure.auroc,
        "interval": [figure.low, figure.high],
        "bootstrap_interval": [figure.bootstrap_low, figure.bootstrap_high],
    }


def _history(entry: Round, validation: Sample | None) -> dict[str, Any]:
    facts = ("round", "attempt", "seconds", "contributors", "missing", "cases", "train_loss", "site_seconds", "asked")
    return {
        **{name: getattr(entry, name) for name in (*facts, "clipped", "scale")},
        "validation": _brief(validation),
        "validation_missing": entry.validation_missing,
        "late": entry.late,
    }


def _brief(sample: Sample | None) -> dict[str, Any] | None:
    """The figures of one round: those of the test without intervals, which nobody reads per round."""
    if sample is None or sample.overlaps is not None:
        return outlines.brief(sample)
    aurocs = [sample.histogram.auroc(place) for place in range(sample.histogram.targets)]
    return {
        "sites": sample.sites,
        "patients": sample.patients,
        "images": sample.images,
        "loss": sample.loss,
        "auroc": aurocs[0],
        "macro_auroc": _mean([value for value in aurocs if value is not None]),
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
