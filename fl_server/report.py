"""The evaluation report of a finished run: report.html (one self-contained page), metrics.json and the figures as PNG.

Everything is computed from the results document that `fl_server.run` leaves: counts, losses and score histograms per
round and site. The document is checked completely before the first file is written; whatever does not follow its
schema, and whatever contradicts itself, is a MessageMalformed that says where. Nothing is rounded in metrics.json; the
page shows three decimals. Terms follow CLAIM 2024 ("reference standard", "internal testing").
"""

import base64
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import jinja2
import numpy as np
from pydantic import Field, StringConstraints, ValidationError

from fl_server import figures
from models.metrics import ScoreHistogram
from models.study import Document, Name, Study
from privacy.errors import DocumentError, MessageMalformed

REMEDY = "Fetch the results of the run again; a results document is never edited by hand."
ONE_CLASS = "one class"
NO_REPORT = "no report"
NO_IMAGES = "no labelled images"

Count = Annotated[int, Field(ge=0, le=2**53)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Reason = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9 ._-]{0,79}$")]


class Scores(Document):
    """What one site reports about one model on one split. `counts` is what `ScoreHistogram.to_json` wrote."""

    patients: Count
    images: Count
    loss: Finite | None
    counts: Any


class Round(Document):
    """One round as it was committed: who contributed how many cases, who did not and why, and its model's scores."""

    round: Annotated[int, Field(ge=1, le=10_000)]
    seconds: Seconds
    contributors: Annotated[list[Name], Field(min_length=1, max_length=1000)]
    missing: dict[Name, Reason]
    cases: dict[Name, Count]
    train_loss: dict[Name, Finite]
    site_seconds: dict[Name, Seconds]
    validation: dict[Name, Scores]
    validation_missing: dict[Name, Reason]


class Results(Document):
    """The results document of a run, version 1."""

    version: Annotated[int, Field(ge=1, le=1)]  # Literal[1] would take true for 1
    run_id: Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]{1,64}$")]
    digest: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    study: dict[str, Any]
    label: Annotated[str, StringConstraints(max_length=100_000, pattern=r"^(complete|partial \([^\r\n]+\))$")]
    started: datetime
    finished: datetime
    selected_round: int
    rounds: Annotated[list[Round], Field(min_length=1, max_length=10_000)]
    test: dict[Name, Scores]
    test_missing: dict[Name, Reason]
    ingested: dict[Name, Count]


@dataclass(frozen=True)
class Sample:
    """Scores of one split at one site or, merged, at several: `histogram` adds up, `loss` is a mean over images."""

    patients: int
    images: int
    loss: float | None
    histogram: ScoreHistogram


@dataclass(frozen=True)
class Evaluation:
    """A checked results document with its study and its histograms decoded."""

    results: Results
    study: Study
    validation: dict[int, dict[str, Sample]]
    test: dict[str, Sample]


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


def check(results: dict[str, Any]) -> Evaluation:
    """The results document, strictly read. Raises MessageMalformed for another schema, NaN, or a contradiction."""
    try:
        text = json.dumps(results, allow_nan=False)
        document = Results.model_validate_json(text, strict=True)
        study = Study.from_canonical(canonical(document.study))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "document"
        raise MessageMalformed(f"results: {place}: {first['msg']}", remedy=REMEDY) from None
    except (TypeError, ValueError, RecursionError, DocumentError) as error:
        raise MessageMalformed(f"results: {error}", remedy=REMEDY) from None
    for wrong in _contradictions(document, study):
        raise MessageMalformed(f"results: {wrong}", remedy=REMEDY)
    validation = {
        entry.round: {
            site: _sample(scores, study, f"round {entry.round}, {site}") for site, scores in entry.validation.items()
        }
        for entry in document.rounds
    }
    test = {site: _sample(scores, study, f"test, {site}") for site, scores in document.test.items()}
    return Evaluation(document, study, validation, test)


def _contradictions(document: Results, study: Study) -> Iterable[str]:
    """One sentence for each statement of the document that another statement of it denies."""
    numbers = [entry.round for entry in document.rounds]
    trainers, everyone = set(study.participation.sites), set(study.all_sites)
    if study.digest != document.digest:
        yield "the digest is not that of the study"
    if numbers != sorted(set(numbers)):
        yield "rounds do not follow each other"
    if document.selected_round not in numbers:
        yield f"selected_round {document.selected_round} is not among the rounds"
    for entry in document.rounds:
        yield from (f"round {entry.round}: {wrong}" for wrong in _contradictions_in(entry, trainers, everyone))
    if not set(document.test) | set(document.test_missing) | set(document.ingested) <= everyone:
        yield "test, test_missing or ingested name a site that the study does not"
    if set(document.test) & set(document.test_missing):
        yield "a site stands both in test and in test_missing"
    absent = everyone - set(document.test)
    for entry in document.rounds:
        absent |= trainers - set(entry.contributors)
    if document.label == "complete" and absent:
        yield f"labelled complete, but not in every round and in the test: {', '.join(sorted(absent))}"
    if (document.started.tzinfo is None) != (document.finished.tzinfo is None) or document.finished < document.started:
        yield "finished lies before started"


def _contradictions_in(entry: Round, trainers: set[str], everyone: set[str]) -> Iterable[str]:
    given = set(entry.contributors)
    if len(given) != len(entry.contributors) or not given <= trainers:
        yield "contributors are not distinct training sites of the study"
    if set(entry.missing) & given or not set(entry.missing) <= everyone:
        yield "a missing site also contributed, or is none of the study's"
    if set(entry.cases) != given or not set(entry.train_loss) <= given:
        yield "cases or train_loss are of other sites than the contributors"
    if not set(entry.validation) | set(entry.validation_missing) | set(entry.site_seconds) <= everyone:
        yield "validation or site_seconds name a site that the study does not"
    if set(entry.validation) & set(entry.validation_missing):
        yield "a site stands both in validation and in validation_missing"


def _sample(scores: Scores, study: Study, where: str) -> Sample:
    """Decode one histogram and hold it to the study's targets and bins, and to the number of images."""
    shape = (len(study.task.targets), 2, study.evaluation.bins)
    try:
        histogram = ScoreHistogram.from_json(scores.counts)
    except MessageMalformed as error:
        raise MessageMalformed(f"results: {where}: {error}", remedy=REMEDY) from None
    if histogram.counts.shape != shape:
        raise MessageMalformed(f"results: {where}: counts are {histogram.counts.shape}, not {shape}", remedy=REMEDY)
    if histogram.counts.sum(axis=(1, 2)).max() > scores.images:
        raise MessageMalformed(
            f"results: {where}: the histogram counts more than the {scores.images} images", remedy=REMEDY
        )
    if (scores.loss is None and scores.images > 0) or scores.patients > scores.images:
        raise MessageMalformed(f"results: {where}: loss, patients and images do not fit each other", remedy=REMEDY)
    return Sample(scores.patients, scores.images, scores.loss, histogram)


def _merge(samples: Iterable[Sample], study: Study) -> Sample:
    """All samples as one: histograms and counts add up, the loss is their mean weighted by images."""
    total = ScoreHistogram.empty(len(study.task.targets), study.evaluation.bins)
    patients, images, weighted = 0, 0, 0.0
    for sample in samples:
        total = total + sample.histogram
        patients += sample.patients
        images += sample.images
        weighted += (sample.loss or 0.0) * sample.images
    return Sample(patients, images, weighted / images if images else None, total)


def measure(evaluation: Evaluation) -> dict[str, Any]:
    """Everything metrics.json says, unrounded: who contributed, held-out figures pooled and per site, every round."""
    results, study = evaluation.results, evaluation.study
    pooled = _figures_of(_merge(evaluation.test.values(), study), study)
    sites = {site: _site_figures(evaluation.test.get(site), study) for site in study.all_sites}
    estimated = [entry["auroc"] for entry in sites.values() if entry["auroc"] is not None]
    return {
        "version": 1,
        "run_id": results.run_id,
        "digest": results.digest,
        "title": study.title,
        "label": results.label,
        "started": results.started.isoformat(),
        "finished": results.finished.isoformat(),
        "seconds": (results.finished - results.started).total_seconds(),
        "rounds": len(results.rounds),
        "selected_round": results.selected_round,
        "contributors": {str(entry.round): entry.contributors for entry in results.rounds},
        "test_missing": results.test_missing,
        "ingested_images": sum(results.ingested.values()),
        "ingested": results.ingested,
        "pooled": pooled,
        "macro": {
            "auroc_over_sites": float(np.mean(estimated)) if estimated else None,
            "sites": len(estimated),
            "auroc_over_targets": pooled["macro_auroc"],
        },
        "sites": sites,
        "history": [_history(entry, evaluation.validation[entry.round], study) for entry in results.rounds],
    }


def _site_figures(sample: Sample | None, study: Study) -> dict[str, Any]:
    if sample is None:
        return _figures_of(_merge([], study), study, NO_REPORT)
    return _figures_of(sample, study)


def _figures_of(sample: Sample, study: Study, absent: str = NO_IMAGES) -> dict[str, Any]:
    """The figures of one sample: those of the first target flat, those of every target below `targets`."""
    targets = {name: _target_figures(sample.histogram, place, absent) for place, name in enumerate(study.task.targets)}
    known = [entry["auroc"] for entry in targets.values() if entry["auroc"] is not None]
    return {
        **targets[study.task.targets[0]],
        "patients": sample.patients,
        "images": sample.images,
        "loss": sample.loss,
        "macro_auroc": float(np.mean(known)) if known else None,
        "targets": targets,
    }


def _target_figures(histogram: ScoreHistogram, place: int, absent: str) -> dict[str, Any]:
    """AUROC with interval and binning bound; without both classes it is null and `reason` says why."""
    interval = histogram.interval(place)
    entry: dict[str, Any] = {
        "positives": histogram.positives(place),
        "negatives": histogram.negatives(place),
        "auroc": histogram.auroc(place),
        "interval": None if interval is None else list(interval),
        "auroc_bound": histogram.auroc_bound(place),
    }
    if entry["auroc"] is None:
        entry["reason"] = ONE_CLASS if entry["positives"] + entry["negatives"] else absent
    return entry


def _history(entry: Round, validation: dict[str, Sample], study: Study) -> dict[str, Any]:
    cases = sum(entry.cases[site] for site in entry.train_loss)
    weighted = sum(entry.train_loss[site] * entry.cases[site] for site in entry.train_loss)
    return {
        "round": entry.round,
        "seconds": entry.seconds,
        "contributors": entry.contributors,
        "missing": entry.missing,
        "cases": entry.cases,
        "site_seconds": entry.site_seconds,
        "train_loss": {"pooled": weighted / cases if cases else None, "sites": entry.train_loss},
        "validation": {
            "pooled": _brief(_merge(validation.values(), study), study),
            "sites": {site: _brief(sample, study) for site, sample in validation.items()},
            "missing": entry.validation_missing,
        },
    }


def _brief(sample: Sample, study: Study) -> dict[str, Any]:
    """The figures of one round: those of `_figures_of` without intervals, which nobody reads per round."""
    aurocs = [sample.histogram.auroc(place) for place in range(len(study.task.targets))]
    known = [value for value in aurocs if value is not None]
    return {
        "patients": sample.patients,
        "images": sample.images,
        "loss": sample.loss,
        "auroc": aurocs[0],
        "macro_auroc": float(np.mean(known)) if known else None,
    }


def _draw(evaluation: Evaluation, metrics: dict[str, Any]) -> dict[str, bytes]:
    """The four figures, by the stem of their file name."""
    study, sites, selected = evaluation.study, evaluation.study.all_sites, evaluation.results.selected_round
    history = metrics["history"]
    loss = _curves(history, "loss", sites)
    auroc = _curves(history, "macro_auroc", sites)
    word = "AUROC" if len(study.task.targets) == 1 else f"AUROC, mean of {len(study.task.targets)} targets"
    rounds = [entry.round for entry in evaluation.results.rounds]
    states = {site: [_state(entry, site) for entry in evaluation.results.rounds] for site in study.participation.sites}
    return {
        "loss": figures.per_round(loss, sites, "loss on the validation split", selected),
        "auroc": figures.per_round(auroc, sites, f"{word}, validation split", selected),
        "roc": figures.roc(_roc_panels(evaluation, metrics), sites),
        "participation": figures.participation(states, rounds),
    }


def _curves(history: Sequence[dict[str, Any]], key: str, sites: Sequence[str]) -> list[figures.Curve]:
    """A line for each site and one for all of them; a round in which the quantity is not known is a gap in the line."""
    lines = {site: [entry["validation"]["sites"].get(site, {}).get(key) for entry in history] for site in sites}
    lines[figures.POOLED] = [entry["validation"]["pooled"][key] for entry in history]
    found = []
    for name, values in lines.items():
        points = [(e["round"], math.nan if y is None else y) for e, y in zip(history, values, strict=True)]
        if any(y is not None for y in values):
            found.append(figures.Curve(name, points))
    return found


def _roc_panels(evaluation: Evaluation, metrics: dict[str, Any]) -> dict[str, list[figures.Curve]]:
    merged = _merge(evaluation.test.values(), evaluation.study)
    samples = [(site, evaluation.test[site]) for site in evaluation.study.all_sites if site in evaluation.test]
    panels: dict[str, list[figures.Curve]] = {}
    for place, target in enumerate(evaluation.study.task.targets):
        panels[target] = []
        for name, sample in [*samples, (figures.POOLED, merged)]:
            entry = metrics["pooled"] if name == figures.POOLED else metrics["sites"][name]
            curve = sample.histogram.roc(place)
            if curve is not None:
                points = list(zip(curve[0].tolist(), curve[1].tolist(), strict=True))
                panels[target].append(figures.Curve(name, points, f"{entry['targets'][target]['auroc']:.3f}"))
    return panels


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
    trained = {site: [entry for entry in results.rounds if site in entry.contributors] for site in study.all_sites}
    return shelf.get_template("report.html").render(
        study=study,
        results=results,
        metrics=metrics,
        colours={site: figures.colour(site, study.all_sites) for site in study.all_sites},
        images={name: base64.b64encode(png).decode() for name, png in images.items()},
        trained={site: _work(site, found) for site, found in trained.items()},
        gaps=_gaps(results),
        settings=list(_settings(json.loads(study.canonical()))),
        canonical=study.canonical().decode(),
        duration=_duration(metrics["seconds"]),
    )


def _work(site: str, rounds: Sequence[Round]) -> dict[str, Any]:
    """What `site` did in the rounds it contributed to: how many, cases in the last, median seconds a round."""
    seconds = [entry.site_seconds[site] for entry in rounds if site in entry.site_seconds]
    return {
        "rounds": len(rounds),
        "cases": rounds[-1].cases[site] if rounds else None,
        "seconds": float(np.median(seconds)) if seconds else None,
    }


def _duration(seconds: float) -> str:
    """ "42 s", "3 min 20 s" or "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


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


def _ranges(numbers: Sequence[int]) -> str:
    """ "rounds 1–3, 7" for [1, 2, 3, 7]."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    words = ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in spans)
    return f"round {words}" if len(numbers) == 1 else f"rounds {words}"


def _settings(section: dict[str, Any], above: str = "") -> Iterable[tuple[str, str]]:
    """(dotted key, value as text) for every setting of the study that the page does not already state elsewhere."""
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _settings(value, f"{above}{key}.")
        elif f"{above}{key}" not in ("title", "purpose", "version"):
            yield f"{above}{key}", (", ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)


def canonical(study: dict[str, Any]) -> bytes:
    """The spelling of `Study.canonical` for a study that came as JSON."""
    return json.dumps(study, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _replace(path: Path, content: bytes) -> Path:
    """Write `content` so that a reader sees the old file or the whole new one."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_bytes(content)
    draft.replace(path)
    return path
