"""What goes into a released model: the weights of a run under their layers' names, its study, and what may be said of it.

The card goes to people outside the consortium, so it says less than the report of the run: figures of the test split, with every
count rounded down to tens, shares to hundredths, no figure of a class below ten, and no group of fewer than three sites; nothing
of single rounds, of times, or of archives.
"""

import datetime as dt
import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load_file

from fl_server import evidence
from fl_server.measures import A_NUMBER, NUMBER_TOO_FEW, TOO_FEW, gap, measure
from fl_server.outlines import NO_CASES
from fl_server.results import canonical, check
from models import covariates, exporting, registry, regression
from models.contributions import RELEASE_DECIMALS
from models.sections import LONGEST_SIDE_PX, MASKED_SITES_MIN, RELEASE_MIN
from models.segmentation import NAMES
from models.study import Study
from privacy import keys
from privacy.errors import MessageMalformed, RunUnknown, StudyConflict
from privacy.heads import SignedHead

GROUP_SITES_MIN = MASKED_SITES_MIN  # whatever the study's protection: a card is read by people who agreed to nothing
RESULTS = ("card.json", "model.safetensors", "results.json")


@dataclass(frozen=True)
class Wanted:
    """What is said of a release beside its run: its `version`, the `attack` on it, signed heads of the journals it is tied to.

    `coordinator`: the key that signed the coordinator's head among them, as `keys.point_hex` writes it; "" without one.
    """

    version: str = "1.0.0"
    attack: dict[str, Any] | None = None
    heads: Sequence[SignedHead] = ()
    coordinator: str = ""


def package(folder: Path, wanted: Wanted, key: keys.PrivateKey) -> bytes:
    """The signed package of the run whose results lie in `folder`.

    Raises RunUnknown if they are incomplete, ReleaseRefused if the study promises privacy and the attack says otherwise,
    MessageMalformed for results that contradict themselves, PackageRefused for a version that is none.
    """
    if not all((folder / name).is_file() for name in RESULTS):
        raise RunUnknown("this run has no model yet", remedy="Watch it with `fl-study watch`.")
    try:
        results, card = (json.loads((folder / name).read_bytes()) for name in ("results.json", "card.json"))
        study = Study.from_canonical(canonical(card["study"]))
        weights = load_file(folder / "model.safetensors")["model"]
    except (ValueError, KeyError, SafetensorError) as error:
        raise MessageMalformed(f"the results of this run cannot be read ({type(error).__name__})") from None
    if (card["run_id"], card["digest"], study.digest) != (results["run_id"], results["digest"], card["digest"]):
        raise MessageMalformed("the card and the results are of different runs or studies")
    if study.strategy.local_norms:
        raise StudyConflict(
            "with strategy: fedbn every site keeps norm layers of its own, so this run has no model that others could use",
            remedy="Use another strategy for a model to release; the report of this run says what local norms bring.",
        )
    evidence.release_gate(study, wanted.attack)
    metrics = measure(check(results))
    described = _card(study, card, metrics, wanted)
    initial = study.network.initial
    facts = {
        "name": study.name,
        "version": wanted.version,
        "digest": study.digest,
        "run_id": card["run_id"],
        "created": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "lineage": {"parent": initial.sha256 if initial is not None else None, "round": card["selected_round"]},
        "heads": [asdict(head) for head in wanted.heads],
    } | ({"coordinator": wanted.coordinator} if wanted.coordinator else {})
    files = {
        "card.json": json.dumps(described, indent=1, allow_nan=False).encode(),
        "card.md": _in_words(study, described).encode(),
        "model.safetensors": exporting.named_weights(study, weights),
        "sbom.cdx.json": json.dumps(_components(), indent=1).encode(),
        "study.json": study.canonical(),
    }
    return registry.pack(facts, files, key)


def _card(study: Study, card: dict[str, Any], metrics: dict[str, Any], wanted: Wanted) -> dict[str, Any]:
    """Everything card.json says; numbers of patients are those that sites released, and null where they did not."""
    return {
        **card,
        "intended_use": study.purpose,
        "targets": list(study.task.targets),
        "reference_standard": _reference(study),
        **({"covariates": covariates.words(study.covariates)} if study.covariates else {}),
        "preprocessing": study.images.model_dump(mode="json"),
        "preprocessing_sha256": keys.digest(canonical(study.images.model_dump(mode="json"))),
        # Sites may reduce otherwise (site.yaml), and nobody else is told; this is what they do if they say nothing.
        "longest_side_px": LONGEST_SIDE_PX,
        "privacy_sentences": [statement.sentence() for statement in study.statements()],
        "metrics": _figures(metrics),
        "attack": wanted.attack,
        "limits": [
            f"Evaluated on held-out patients of the sites named here, and nowhere else: {_kinds(metrics)} testing.",
            "No medical device: not cleared for diagnosis.",
            "Images other than those the preprocessing describes were not seen in training.",
            *(["Covariates outside their ranges were not seen in training either."] if study.covariates else []),
        ],
    }


def _reference(study: Study) -> str:
    if study.segments:
        return "The masks of each site, with the site's own values for each structure."
    return "The label table of each site, with the site's own words for each target."


def _figures(metrics: dict[str, Any]) -> dict[str, Any]:
    """Of metrics.json what leaves the consortium: label, selected round, and test figures pooled, per site and per group."""
    pooled = metrics["pooled"]
    if metrics["number"]:
        targets = {name: {"why": A_NUMBER} for name in pooled["targets"]}
    elif _of_outlines(metrics):
        targets = {name: _outlined(entry) for name, entry in pooled["targets"].items()}
    else:
        targets = {name: _target(entry) | {"operating": _operating(entry)} for name, entry in pooled["targets"].items()}
    counts = {name: pooled[name] // RELEASE_MIN * RELEASE_MIN for name in ("patients", "images")}
    grades = metrics["grades"] and _rounded({name: metrics["grades"][name] for name in ("kappa", "interval", "mae")})
    return {
        "label": metrics["label"],
        "selected_round": metrics["selected_round"],
        "test_missing": metrics["test_missing"],
        **({"number": _number(metrics["number"])} if metrics["number"] else {}),
        "pooled": {"sites": pooled["sites"], **counts, "grades": grades, "targets": targets},
        "sites": {
            site: {"testing": entry["testing"], "targets": entry["targets"]} for site, entry in metrics["sites"].items()
        },
        "subgroups": {
            target: {division: _division(entry) for division, entry in divisions.items()}
            for target, divisions in metrics["subgroups"].items()
        },
    }


def _division(entry: dict[str, Any]) -> dict[str, Any]:
    """The groups of one division; none of fewer than GROUP_SITES_MIN sites, whose figures would be those of single sites."""
    groups = {name: _group(found) for name, found in entry["groups"].items()}
    apart = gap({name: found for name, found in groups.items() if found["auroc"] is not None})
    return {"groups": groups, "gap": apart and _rounded(apart)}


def _group(entry: dict[str, Any]) -> dict[str, Any]:
    if entry["auroc"] is None or entry["sites"] < GROUP_SITES_MIN:
        why = entry.get("why", f"not released: fewer than {GROUP_SITES_MIN} sites")
        return {**dict.fromkeys(("positives", "negatives", "auroc", "interval")), "sites": entry["sites"], "why": why}
    return _target(entry) | {"sites": entry["sites"]}


def _operating(entry: dict[str, Any]) -> dict[str, Any]:
    """Thresholds as they are, for whoever uses the model; the rates there with two decimals, which tell no count."""
    if min(entry["positives"], entry["negatives"]) < RELEASE_MIN:
        return {}
    rates = ("sensitivity", "specificity", "ppv", "npv")
    return {
        rule: {"rule": at["rule"], "threshold": at["threshold"], **{rate: _rounded(at[rate], 2) for rate in rates}}
        for rule, at in entry["operating"].items()
    }


def _rounded(found: dict[str, Any], decimals: int = RELEASE_DECIMALS) -> dict[str, Any]:
    """The same with every number, and every end of an interval, rounded."""

    def of(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: of(each) for name, each in value.items()}
        if isinstance(value, list):
            return [of(each) for each in value]
        return round(value, decimals) if isinstance(value, float) else value

    return {name: of(value) for name, value in found.items()}


def _number(number: dict[str, Any]) -> dict[str, Any]:
    """Figures of a number as a site would release its own: of RELEASE_MIN images, counted in tens, or not at all."""
    pooled = number["pooled"]
    tens = pooled["images"] // RELEASE_MIN * RELEASE_MIN
    if not tens:
        return number | {"pooled": {"mae": None, "why": NUMBER_TOO_FEW}}
    shown = {name: pooled[name] for name in (*regression.FIGURES, "intervals")}
    return number | {"pooled": {"images": tens, **_rounded(shown)}}


def _kinds(metrics: dict[str, Any]) -> str:
    """internal, external, or both, of all sites of the study."""
    found = {entry["testing"] for entry in metrics["sites"].values()}
    return " and ".join(sorted(found, reverse=True))


def _target(entry: dict[str, Any]) -> dict[str, Any]:
    """Pooled figures of one target as a site would release its own: by tens, or not at all."""
    classes = {name: entry[name] // RELEASE_MIN * RELEASE_MIN for name in ("positives", "negatives")}
    if min(classes.values()) < RELEASE_MIN:
        return {**dict.fromkeys((*classes, "auroc", "interval")), "why": TOO_FEW}
    interval = [round(end, RELEASE_DECIMALS) for end in entry["interval"]]
    return {**classes, "auroc": round(entry["auroc"], RELEASE_DECIMALS), "interval": interval}


def _outlined(entry: dict[str, Any]) -> dict[str, Any]:
    """The same of one structure: means with intervals, cases by tens."""
    cases = entry["cases"] // RELEASE_MIN * RELEASE_MIN
    if cases < RELEASE_MIN:
        return {**dict.fromkeys(("cases", *NAMES)), "why": entry.get("why", NO_CASES)}
    return {"cases": cases} | {name: entry[name] and _rounded(entry[name]) for name in NAMES}


def _in_words(study: Study, card: dict[str, Any]) -> str:
    lines = [
        f"# {study.title}",
        "",
        f"Study `{study.digest}`, run `{card['run_id']}`, round {card['selected_round']} ({card['label']}).",
        "",
        f"**Intended use.** {study.purpose}",
        "",
        f"**Predicts** {study.predicts} from {study.learns_from}",
        f"Preprocessing `{card['preprocessing_sha256']}`.",
        "",
        f"**Reference standard.** {card['reference_standard']}",
        "",
        f"**Privacy.** {' '.join(card['privacy_sentences']) or 'No differential privacy.'}",
        "",
        "**Population and figures.** Of held-out patients, by site as each released its own. Counts are rounded down to tens,",
        f"and {_few(card['metrics'])} below ten has no figures. Intervals are of 95 %.",
        "",
        *_tables(card["metrics"]),
        "",
        "**Limits.**",
        *(f"- {limit}" for limit in card["limits"]),
        "",
    ]
    return "\n".join(lines)


def _of_outlines(metrics: dict[str, Any]) -> bool:
    """Whether the figures are of outlined structures, each entry with its cases in place of classes."""
    return all("cases" in entry for entry in metrics["pooled"]["targets"].values())


def _few(metrics: dict[str, Any]) -> str:
    if _of_outlines(metrics):
        return "a structure with cases"
    return "a number of images" if "number" in metrics else "a class"


def _tables(metrics: dict[str, Any]) -> list[str]:
    """The figures of the card in Markdown: population, and what the model's kind of task is measured by."""
    pooled = metrics["pooled"]
    people = f"At least {pooled['patients']} patients and {pooled['images']} images of {len(pooled['sites'])} sites."
    rows = _rows_of_scores
    if "number" in metrics:
        rows = _rows_of_number
    elif _of_outlines(metrics):
        rows = _rows_of_outlines
    return [people, "", *rows(metrics)]


def _rows_of_number(metrics: dict[str, Any]) -> list[str]:
    """Errors and agreement of a target that is a number, together and of each site that released them."""
    number, sites = metrics["number"], metrics["sites"]
    lines = [
        f"{number['target']}, {number['unit']}:",
        "",
        "| where | testing | images | mean absolute error | bias | Lin's concordance |",
        "|---|---|---|---|---|---|",
    ]
    rows = [("all together", "", number["pooled"])]
    rows += [(site, sites[site]["testing"], found) for site, found in number["sites"].items()]
    for where, testing, found in rows:
        told = [found.get("why", ""), "–", "–", "–"]
        if found["mae"] is not None:
            shown = (_with_ends(found[name], found["intervals"][name]) for name in ("mae", "bias", "concordance"))
            told = [_count(found["images"]), *shown]
        lines.append(f"| {' | '.join((where, testing, *told))} |")
    return lines


def _rows_of_outlines(metrics: dict[str, Any]) -> list[str]:
    """Dice, surface Dice and HD95 of each structure, together and of each site that released them."""
    lines = [
        "| structure | where | testing | cases | Dice | surface Dice | HD95, mm |",
        "|---|---|---|---|---|---|---|",
    ]
    for target, entry in metrics["pooled"]["targets"].items():
        rows = [("all together", "", entry)]
        rows += [(site, found["testing"], found["targets"][target]) for site, found in metrics["sites"].items()]
        for where, testing, found in rows:
            told = [found.get("why", ""), "–", "–", "–"]
            if found["cases"] is not None:
                shown = (found[name] or {"value": None, "interval": None} for name in NAMES)
                told = [_count(found["cases"]), *(_with_ends(one["value"], one["interval"]) for one in shown)]
            lines.append(f"| {' | '.join((target, where, testing, *told))} |")
    return lines


def _rows_of_scores(metrics: dict[str, Any]) -> list[str]:
    """AUROC, operating points, groups."""
    pooled, sites = metrics["pooled"], metrics["sites"]
    lines = ["| target | where | testing | positive | negative | AUROC |", "|---|---|---|---|---|---|"]
    for target, entry in pooled["targets"].items():
        rows = [("all together", "", entry)]
        rows += [(site, found["testing"], found["targets"][target]) for site, found in sites.items()]
        for where, testing, found in rows:
            cells = (target, where, testing, _count(found["positives"]), _count(found["negatives"]), _auroc(found))
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| target | threshold | rule | sensitivity | specificity |", "|---|---|---|---|---|"]
    for target, entry in pooled["targets"].items():
        for at in entry["operating"].values():
            rates = (_rate(at["sensitivity"]), _rate(at["specificity"]))
            lines.append(f"| {target} | {at['threshold']:.4f} | {at['rule']} | {' | '.join(rates)} |")
    if grades := pooled["grades"]:
        kappa = "not estimable" if grades["kappa"] is None else _with_ends(grades["kappa"], grades["interval"])
        lines += ["", f"Grades: quadratic-weighted kappa {kappa}, mean absolute error {grades['mae']:.3f}."]
    groups = [
        f"| {target} | {division} | {name} | {entry['sites']} | {_count(entry['positives'])} | {_count(entry['negatives'])} | "
        f"{_auroc(entry)} |"
        for target, divisions in metrics["subgroups"].items()
        for division, found in divisions.items()
        for name, entry in found["groups"].items()
    ]
    if groups:
        head = "| target | division | group | sites | positive | negative | AUROC |"
        lines += ["", head, "|---|---|---|---|---|---|---|", *groups]
    return lines


def _count(number: int | None) -> str:
    return "–" if number is None else f"≥ {number}"


def _auroc(entry: dict[str, Any]) -> str:
    if entry["auroc"] is None:
        return str(entry["why"])
    return _with_ends(entry["auroc"], entry["interval"])


def _with_ends(value: float | None, interval: list[float] | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" + ("" if interval is None else " ({:.3f} to {:.3f})".format(*interval))


def _rate(found: dict[str, Any]) -> str:
    if found["value"] is None or found["interval"] is None:
        return "–"
    return "{:.2f} ({:.2f} to {:.2f})".format(found["value"], *found["interval"])


def _components() -> dict[str, Any]:
    """CycloneDX of what is installed where the package was made: the libraries that wrote and checked it."""
    found = {(dist.metadata["Name"].lower(), dist.version) for dist in importlib.metadata.distributions()}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "components": [
            {"type": "library", "name": name, "version": version, "purl": f"pkg:pypi/{name}@{version}"}
            for name, version in sorted(found)
        ],
    }
