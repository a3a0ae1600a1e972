"""The evaluation report of a finished run: report.html (one self-contained page), metrics.json, and the figures as PNG and SVG.

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
from markupsafe import Markup
from matplotlib.figure import Figure as Picture

from fl_server import figures, matrix
from fl_server.matrix import Comparison
from fl_server.measures import measure, not_told
from fl_server.plots import ranges
from fl_server.progress import duration
from fl_server.results import Evaluation, Results, Round, check, testing_of
from models.sections import RELEASE_MIN


def write(
    results: dict[str, Any], folder: Path, compared: Comparison | None = None, saliency: bytes | None = None
) -> Path:
    """Write the report of one run into `folder` (made if absent) and return the path of report.html, written last.

    `compared`: other models of the same study, shown beside it; their figures stand in comparison.json, not in metrics.json.
    `saliency`: PNG of where the model looks on phantoms.

    Raises MessageMalformed, before anything is written, if `results` is not a results document or contradicts itself.
    """
    evaluation = check(results)
    metrics = measure(evaluation)
    drawn = _draw(evaluation, metrics)
    images = {name: figures.png(figure) for name, figure in drawn.items()}
    if compared is not None:
        images["comparison"] = matrix.draw(compared)
    if saliency is not None:
        images["saliency"] = saliency
    page = _render(evaluation, metrics, images, compared)
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        _replace(folder / f"{name}.png", images[name])
        _replace(folder / f"{name}.svg", figures.svg(figure))
    _replace(folder / "metrics.json", (json.dumps(metrics, indent=1, allow_nan=False) + "\n").encode())
    return _replace(folder / "report.html", page.encode())


def _draw(evaluation: Evaluation, metrics: dict[str, Any]) -> dict[str, Picture]:
    """The figures, by the stem of their file name; only those that there is something to show on."""
    study, results = evaluation.study, evaluation.results
    if study.segments:
        return _draw_outlines(evaluation, metrics) | (_draw_rounds(evaluation, metrics) if results.rounds else {})
    pooled = metrics["pooled"]["targets"]
    if metrics["number"] is not None:
        found = {"errors": figures.errors(metrics["number"]["unit"], _error_panels(evaluation, metrics["number"]))}
        return found | _draw_rounds(evaluation, metrics) if results.rounds else found
    drawn = {
        "roc": figures.roc(_roc_panels(evaluation, metrics)),
        "forest": figures.forest({name: list(_estimates(evaluation, metrics, name)) for name in study.task.targets}),
    }
    if any(entry["average_precision"] is not None for entry in pooled.values()):
        drawn["precision_recall"] = figures.precision_recall(_recall_panels(evaluation, metrics))
    if any(entry["calibration"] for entry in pooled.values()):
        drawn["reliability"] = figures.reliability({name: _groups(entry) for name, entry in pooled.items()})
        drawn["decision"] = figures.decision({name: _decision(entry) for name, entry in pooled.items()})
    if evaluation.groups.told.any():
        drawn["subgroups"] = figures.forest(
            {name: list(_group_estimates(evaluation, metrics, name)) for name in study.task.targets}
        )
    if results.rounds:
        drawn |= _draw_rounds(evaluation, metrics)
    return drawn


def _draw_outlines(evaluation: Evaluation, metrics: dict[str, Any]) -> dict[str, Picture]:
    """Dice of each structure, of the tested sites together and of each that released it."""
    named = [(_together(evaluation), metrics["pooled"]), *metrics["sites"].items()]
    panels = {
        target: [_estimate(name, entry["targets"][target]["dice"]) for name, entry in named]
        for target in evaluation.study.task.targets
    }
    return {"forest": figures.forest(panels, "mean Dice")}


def _estimate(name: str, found: dict[str, Any] | None) -> figures.Estimate:
    if found is None:
        return figures.Estimate(name, None, None, None)
    return figures.Estimate(name, found["value"], *(found["interval"] or (None, None)))


def _draw_rounds(evaluation: Evaluation, metrics: dict[str, Any]) -> dict[str, Picture]:
    study, results, selected = evaluation.study, evaluation.results, evaluation.results.selected_round
    key, name = ("dice", "Dice") if study.segments else ("macro_auroc", "AUROC")
    word = name if len(study.task.targets) == 1 else f"{name}, mean of {len(study.task.targets)} targets"
    training = [(e.round, math.nan if e.train_loss is None else e.train_loss) for e in results.rounds]
    loss = [_curve(metrics, "loss")]
    loss += [figures.Curve("training", training)] if study.privacy == "none" else []
    states = {site: [_state(entry, site) for entry in results.rounds] for site in _drawn(evaluation)}
    course = figures.per_round([_curve(metrics, key)], f"{word}, validation split", selected)
    drawn = {} if metrics["number"] else {name.lower(): course}
    return drawn | {
        "loss": figures.per_round(loss, "loss", selected),
        "participation": figures.participation(states, [entry.round for entry in results.rounds]),
    }


def _drawn(evaluation: Evaluation) -> list[str]:
    """Training sites that any round asked: a row each in the grid of who took part."""
    asked = {
        site for entry in evaluation.results.rounds for site in entry.asked or evaluation.study.participation.sites
    }
    return [site for site in evaluation.study.participation.sites if site in asked]


def _error_panels(evaluation: Evaluation, number: dict[str, Any]) -> dict[str, list[figures.Estimate]]:
    """The rows of the three plots of a number: the tested sites together, then each site."""
    panels: dict[str, list[figures.Estimate]] = {}
    for title, key in ((figures.MAE, "mae"), (figures.BIAS, "bias"), (figures.CONCORDANCE, "concordance")):
        panels[title] = []
        for name, part in [(_together(evaluation), number["pooled"]), *number["sites"].items()]:
            ends = (part["intervals"][key] if part["mae"] is not None else None) or (None, None)
            panels[title].append(figures.Estimate(name, part.get(key), *ends))
    return panels


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


def _recall_panels(evaluation: Evaluation, metrics: dict[str, Any]) -> dict[str, tuple[figures.Curve, float] | None]:
    panels: dict[str, tuple[figures.Curve, float] | None] = {}
    for place, target in enumerate(evaluation.study.task.targets):
        curve = evaluation.test.histogram.precision_recall(place) if evaluation.test else None
        entry = metrics["pooled"]["targets"][target]
        if curve is None:
            panels[target] = None
            continue
        name = f"{_together(evaluation)} {entry['average_precision']:.3f}"
        points = [(0.0, float(curve[1][0])), *zip(curve[0].tolist(), curve[1].tolist(), strict=True)]
        panels[target] = figures.Curve(name, points), entry["prevalence"]
    return panels


def _groups(entry: dict[str, Any]) -> list[figures.Group]:
    rows = entry["calibration"]["table"] if entry["calibration"] else []
    return [
        figures.Group(row["score"], row["observed"], row["interval"][0], row["interval"][1], row["images"])
        for row in rows
    ]


def _decision(entry: dict[str, Any]) -> tuple[figures.Curve, figures.Curve] | None:
    rows = entry["decision_curve"]
    if not rows:
        return None
    model, everybody = ([(row["threshold"], row[key]) for row in rows] for key in ("model", "all"))
    return figures.Curve("by the model", model), figures.Curve("everybody", everybody)


def _group_estimates(evaluation: Evaluation, metrics: dict[str, Any], target: str) -> Iterable[figures.Estimate]:
    """The rows of the subgroup figure: all images, then each group that any site told of, division by division."""
    whole = metrics["pooled"]["targets"][target]
    yield figures.Estimate("all images", whole["auroc"], *(whole["interval"] or (None, None)))
    for division in metrics["subgroups"][target].values():
        for name, entry in division["groups"].items():
            if entry["auroc"] is not None:
                yield figures.Estimate(name, entry["auroc"], *(entry["interval"] or (None, None)))


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


def _render(
    evaluation: Evaluation, metrics: dict[str, Any], images: dict[str, bytes], compared: Comparison | None
) -> str:
    """The page. Every value is escaped by jinja2; a name that the template does not get is an error, not a blank."""
    here = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    shelf = jinja2.Environment(
        loader=here, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    shelf.filters["auroc"] = lambda value: "–" if value is None else f"{value:.3f}"
    shelf.filters["rate"] = _rate
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
        compared=compared,
        compared_rows={target: list(matrix.lines(compared, target)) for target in compared.targets} if compared else {},
        testing=_testing(evaluation),
        not_told=not_told(study),
        retried=_ranges(_retried(results.rounds)),
        clipped=_ranges([entry.round for entry in results.rounds if entry.clipped]),
        release_min=RELEASE_MIN,
        statements=study.statements(),
        settings=list(_settings(json.loads(study.canonical()))),
        canonical=study.canonical().decode(),
        duration=duration(metrics["seconds"]),
    )


def _testing(evaluation: Evaluation) -> str:
    """What CLAIM 2024 calls the test: internal, external, or of both kinds of sites."""
    kinds = {testing_of(evaluation.study, site) for site in evaluation.study.all_sites}
    return " and ".join(kind for kind in ("internal", "external") if kind in kinds)


def _rate(found: dict[str, Any] | None, decimals: int = 2) -> str:
    """ "0.81 (0.77 – 0.85)" of a value with its interval, which no line break divides; a dash where there is none."""
    if found is None or found["value"] is None:
        return "–"
    if found["interval"] is None:
        return f"{found['value']:.{decimals}f}"
    low, high = (f"{end:.{decimals}f}" for end in found["interval"])
    return Markup(f'{found["value"]:.{decimals}f} <span class="whole">({low} – {high})</span>')  # noqa: S704  numbers


def _work(site: str, rounds: Sequence[Round]) -> dict[str, Any]:
    """What `site` did in the rounds it contributed to: how many, of how many, and the median of its seconds in one."""
    given = [entry for entry in rounds if site in entry.contributors]
    seconds = [entry.site_seconds[site] for entry in given if site in entry.site_seconds]
    due = sum(not entry.asked or site in entry.asked for entry in rounds)
    return {"rounds": len(given), "asked": due, "seconds": float(np.median(seconds)) if seconds else None}


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
    found += [
        f"the run was restarted from round {each.first} after round {each.after}: what these rounds had learned was given up"
        for each in results.restarts
    ]
    found += [
        f"{site} came{'' if seconds is None else f' {seconds:.0f} s'} too late in round {entry.round}; its report was not used"
        for entry in results.rounds
        for site, seconds in entry.late.items()
    ]
    return [*found, *(f"{site} did not report on its test split: {why}" for site, why in results.test_missing.items())]


def _retried(rounds: Sequence[Round]) -> list[int]:
    """Rounds that needed a new attempt. Attempts are counted over the whole run, so the number rises there."""
    before = [1, *(entry.attempt for entry in rounds)]
    return [entry.round for entry, attempt in zip(rounds, before, strict=False) if entry.attempt > attempt]


def _ranges(numbers: Sequence[int]) -> str:
    """ "rounds 1–3, 7" for [1, 2, 3, 7]; nothing for nothing."""
    return f"round{'' if len(numbers) == 1 else 's'} {ranges(numbers)}" if numbers else ""


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
