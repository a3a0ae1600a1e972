"""The evaluation report of a finished run: report.html (one self-contained page), metrics.json and the figures as PNG.

Everything is computed from the results document that `fl_server.run` leaves: of every sum over sites its counts, losses
and score histograms, and of a single site only what it released about its own test split. The document is checked as a
whole before the first file is written; whatever does not follow its schema, and whatever contradicts itself, is a
MessageMalformed that says where. Nothing is rounded in metrics.json; the page shows three decimals. Terms follow CLAIM
2024 ("reference standard", "internal testing").
"""

import base64
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from fl_server import figures
from fl_server.progress import duration
from fl_server.results import VERSION, Evaluation, Figure, Results, Round, Sample, check
from models.contributions import RELEASE_MIN
from models.metrics import ScoreHistogram
from models.study import Study

ONE_CLASS = "one class"
NO_IMAGES = "no labelled images"
NO_TEST = "no test result"
NO_REPORT = "not in the test result"
TOO_FEW = f"not released: fewer than {RELEASE_MIN} images of a class"
NOT_IN_STUDY = "not released by this study"


def write(results: dict[str, Any], folder: Path) -> Path:
    """Write the report of one run into `folder` (made if absent) and return the path of report.html, written last.

    Raises MessageMalformed, before anything is written, if `results` is not a results document or contradicts itself.
    """
    evaluation = check(results)
    metrics = measure(evaluation)
    images = _draw(evaluation, metrics)
    page = _render(evaluation, metrics, images)
    folder.mkdir(parents=True, exist_ok=True)
    for name, png in images.items():
        _replace(folder / f"{name}.png", png)
    _replace(folder / "metrics.json", (json.dumps(metrics, indent=1, allow_nan=False) + "\n").encode())
    return _replace(folder / "report.html", page.encode())


def measure(evaluation: Evaluation) -> dict[str, Any]:
    """Everything metrics.json says, unrounded: who contributed, held-out figures pooled and per site, every round."""
    results, study = evaluation.results, evaluation.study
    pooled = _pooled_figures(evaluation.test, study)
    sites = {site: _site_figures(site, evaluation) for site in study.all_sites}
    released = [entry["auroc"] for entry in sites.values() if entry["auroc"] is not None]
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
        "pooled": pooled,
        "macro": {
            "auroc_over_sites": _mean(released),
            "sites": len(released),
            "auroc_over_targets": pooled["macro_auroc"],
        },
        "sites": sites,
        "initial": _brief(evaluation.validation[0]),
        "history": [_history(entry, evaluation.validation[entry.round]) for entry in results.rounds],
    }


def _pooled_figures(test: Sample | None, study: Study) -> dict[str, Any]:
    """The figures of all tested sites: those of the first target flat, those of every target below `targets`."""
    absent = NO_IMAGES if test else NO_TEST
    sample = test or Sample([], 0, 0, None, ScoreHistogram.empty(len(study.task.targets), study.evaluation.bins))
    noise = study.figures_deviation * math.sqrt(max(1, len(sample.sites)))
    targets = {
        name: _target_figures(sample.histogram, place, absent, noise) for place, name in enumerate(study.task.targets)
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


def _site_figures(site: str, evaluation: Evaluation) -> dict[str, Any]:
    """What `site` released: the first target flat, every target below `targets`; null with `why` where it did not."""
    study, test = evaluation.study, evaluation.test
    absent = TOO_FEW if study.evaluation.site_figures else NOT_IN_STUDY
    if test is None or site not in test.sites:
        absent = NO_REPORT
    row = evaluation.results.figures.get(site, [None] * len(study.task.targets))
    targets = {name: _released(figure, absent) for name, figure in zip(study.task.targets, row, strict=True)}
    return {**targets[study.task.targets[0]], "targets": targets}


def _released(figure: Figure | None, absent: str) -> dict[str, Any]:
    if figure is None:
        return {"positives": None, "negatives": None, "auroc": None, "interval": None, "why": absent}
    return {
        "positives": figure.positives,
        "negatives": figure.negatives,
        "auroc": figure.auroc,
        "interval": [figure.low, figure.high],
    }


def _history(entry: Round, validation: Sample | None) -> dict[str, Any]:
    facts = ("round", "attempt", "seconds", "contributors", "missing", "cases", "train_loss", "site_seconds")
    return {
        **{name: getattr(entry, name) for name in (*facts, "clipped", "scale")},
        "validation": _brief(validation),
        "validation_missing": entry.validation_missing,
    }


def _brief(sample: Sample | None) -> dict[str, Any] | None:
    """The figures of one round: those of the test without intervals, which nobody reads per round."""
    if sample is None:
        return None
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


def _draw(evaluation: Evaluation, metrics: dict[str, Any]) -> dict[str, bytes]:
    """The figures, by the stem of their file name."""
    study, results = evaluation.study, evaluation.results
    word = "AUROC" if len(study.task.targets) == 1 else f"AUROC, mean of {len(study.task.targets)} targets"
    training = [(e.round, math.nan if e.train_loss is None else e.train_loss) for e in results.rounds]
    loss = [_curve(metrics, "loss")]
    loss += [figures.Curve("training", training)] if study.privacy == "none" else []
    states = {site: [_state(entry, site) for entry in results.rounds] for site in study.participation.sites}
    return {
        "loss": figures.per_round(loss, "loss", results.selected_round),
        "auroc": figures.per_round(
            [_curve(metrics, "macro_auroc")], f"{word}, validation split", results.selected_round
        ),
        "roc": figures.roc(_roc_panels(evaluation, metrics)),
        "forest": figures.forest({name: list(_estimates(evaluation, metrics, name)) for name in study.task.targets}),
        "participation": figures.participation(states, [entry.round for entry in results.rounds]),
    }


def _curve(metrics: dict[str, Any], key: str) -> figures.Curve:
    """One quantity of the pooled validation, from the initial model (round 0) on; where it is not known is a gap."""
    found = {0: metrics["initial"]} | {entry["round"]: entry["validation"] for entry in metrics["history"]}
    values = {number: brief and brief[key] for number, brief in found.items()}
    points = [(number, math.nan if value is None else value) for number, value in values.items()]
    return figures.Curve("validation", points if metrics["initial"] else points[1:])


def _roc_panels(evaluation: Evaluation, metrics: dict[str, Any]) -> dict[str, figures.Curve | None]:
    panels: dict[str, figures.Curve | None] = {}
    for place, target in enumerate(evaluation.study.task.targets):
        curve = evaluation.test.histogram.roc(place) if evaluation.test else None
        if curve is None:
            panels[target] = None
            continue
        name = f"{_together(evaluation)} {metrics['pooled']['targets'][target]['auroc']:.3f}"
        panels[target] = figures.Curve(name, list(zip(curve[0].tolist(), curve[1].tolist(), strict=True)))
    return panels


def _together(evaluation: Evaluation) -> str:
    """What the tested sites together are called: a part of the sites never passes for all of them."""
    tested, everyone = len(evaluation.test.sites) if evaluation.test else 0, len(evaluation.study.all_sites)
    return "all sites" if tested == everyone else f"{tested} of {everyone} sites"


def _estimates(evaluation: Evaluation, metrics: dict[str, Any], target: str) -> Iterable[figures.Estimate]:
    """The rows of a forest plot: the tested sites together, then each site."""
    for name, entry in [(_together(evaluation), metrics["pooled"]), *metrics["sites"].items()]:
        part = entry["targets"][target]
        yield figures.Estimate(name, part["auroc"], *(part["interval"] or (None, None)))


def _state(entry: Round, site: str) -> int:
    """Index into figures.STATES."""
    return 0 if site in entry.contributors else 1 if site in entry.missing else 2


def _render(evaluation: Evaluation, metrics: dict[str, Any], images: dict[str, bytes]) -> str:
    """The page. Every value is escaped by jinja2; a name that the template does not get is an error, not a blank."""
    here = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    shelf = jinja2.Environment(
        loader=here, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    shelf.filters["auroc"] = lambda value: "–" if value is None else f"{value:.3f}"
    shelf.filters["number"] = lambda value: f"{value:,}".replace(",", "\u202f")
    study, results = evaluation.study, evaluation.results
    return shelf.get_template("report.html").render(
        study=study,
        results=results,
        metrics=metrics,
        images={name: base64.b64encode(png).decode() for name, png in images.items()},
        work={site: _work(site, results.rounds) for site in study.all_sites},
        gaps=_gaps(results),
        together=_together(evaluation),
        retried=_ranges(_retried(results.rounds)),
        clipped=_ranges([entry.round for entry in results.rounds if entry.clipped]),
        release_min=RELEASE_MIN,
        statements=study.statements(),
        settings=list(_settings(json.loads(study.canonical()))),
        canonical=study.canonical().decode(),
        duration=duration(metrics["seconds"]),
    )


def _work(site: str, rounds: Sequence[Round]) -> dict[str, Any]:
    """What `site` did in the rounds it contributed to: how many, and the median of its seconds in one."""
    given = [entry for entry in rounds if site in entry.contributors]
    seconds = [entry.site_seconds[site] for entry in given if site in entry.site_seconds]
    return {"rounds": len(given), "seconds": float(np.median(seconds)) if seconds else None}


def _gaps(results: Results) -> list[str]:
    """A sentence for each site and reason of everything that was asked for and did not come."""
    rounds: dict[tuple[str, str, str], list[int]] = {}
    for entry in results.rounds:
        for what, missing in (
            ("contribute", entry.missing),
            ("report on its validation split", entry.validation_missing),
        ):
            for site, reason in missing.items():
                rounds.setdefault((site, what, reason), []).append(entry.round)
    found = [
        f"{site} did not {what} in {_ranges(numbers)}: {reason}" for (site, what, reason), numbers in rounds.items()
    ]
    return [*found, *(f"{site} did not report on its test split: {why}" for site, why in results.test_missing.items())]


def _retried(rounds: Sequence[Round]) -> list[int]:
    """Rounds that needed a new attempt. Attempts are counted over the whole run, so the number rises there."""
    before = [1, *(entry.attempt for entry in rounds)]
    return [entry.round for entry, attempt in zip(rounds, before, strict=False) if entry.attempt > attempt]


def _ranges(numbers: Sequence[int]) -> str:
    """ "rounds 1–3, 7" for [1, 2, 3, 7]; nothing for nothing."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    words = ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in spans)
    return (f"round {words}" if len(numbers) == 1 else f"rounds {words}") if numbers else ""


def _settings(section: dict[str, Any], above: str = "") -> Iterable[tuple[str, str]]:
    """(dotted key, value as text) for every setting of the study that the page does not already state elsewhere.

    The keys of sites and aggregator are no settings: they stand in the canonical form at the end of the page.
    """
    for key, value in section.items():
        if f"{above}{key}" in ("title", "purpose", "version", "roster", "aggregator"):
            continue
        if isinstance(value, dict):
            yield from _settings(value, f"{above}{key}.")
        else:
            text = (", ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)
            yield f"{above}{key}", text.lower() if isinstance(value, bool) else text


def _replace(path: Path, content: bytes) -> Path:
    """Write `content` so that a reader sees the old file or the whole new one."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_bytes(content)
    draft.replace(path)
    return path
