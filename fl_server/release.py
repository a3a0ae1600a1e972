"""What goes into a released model: the weights of a run under their layers' names, its study, and what may be said of it.

The card goes to people outside the consortium, so it says less than the report of the run: figures of the test split, with every
count rounded down to tens and no figure of a class below ten; nothing of single rounds, of times, or of archives.
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
from fl_server.measures import TOO_FEW, measure
from fl_server.outlines import NO_CASES
from fl_server.results import canonical, check
from models import exporting, registry
from models.contributions import RELEASE_DECIMALS
from models.sections import RELEASE_MIN
from models.segmentation import NAMES
from models.study import Study
from privacy import keys
from privacy.errors import MessageMalformed, RunUnknown
from privacy.heads import SignedHead

RESULTS = ("card.json", "model.safetensors", "results.json")


@dataclass(frozen=True)
class Wanted:
    """What the researcher says of a release: its `version`, the `attack` on it, signed heads of the journals it is tied to."""

    version: str = "1.0.0"
    attack: dict[str, Any] | None = None
    heads: Sequence[SignedHead] = ()


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
    }
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
        "preprocessing": study.images.model_dump(mode="json"),
        "preprocessing_sha256": keys.digest(canonical(study.images.model_dump(mode="json"))),
        "privacy_sentences": [statement.sentence() for statement in study.statements()],
        "metrics": _figures(metrics, study),
        "attack": wanted.attack,
        "limits": [
            f"Evaluated on held-out patients of the sites named here, and nowhere else: {_kinds(metrics)} testing.",
            "No medical device: not cleared for diagnosis.",
            "Images other than those the preprocessing describes were not seen in training.",
        ],
    }


def _reference(study: Study) -> str:
    if study.segments:
        return "The masks of each site, with the site's own values for each structure."
    return "The label table of each site, with the site's own words for each target."


def _figures(metrics: dict[str, Any], study: Study) -> dict[str, Any]:
    """Of metrics.json what leaves the consortium: label, selected round, and test figures pooled and per site."""
    pooled = metrics["pooled"]
    told = _outlined if study.segments else _target
    targets = {name: told(entry) for name, entry in pooled["targets"].items()}
    counts = {name: pooled[name] // RELEASE_MIN * RELEASE_MIN for name in ("patients", "images")}
    return {
        "label": metrics["label"],
        "selected_round": metrics["selected_round"],
        "test_missing": metrics["test_missing"],
        "pooled": {"sites": pooled["sites"], **counts, "targets": targets},
        "sites": {
            site: {"testing": entry["testing"], "targets": entry["targets"]} for site, entry in metrics["sites"].items()
        },
    }


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
    return {"cases": cases} | {name: _rounded(entry[name]) for name in NAMES}


def _rounded(found: dict[str, Any] | None) -> dict[str, Any] | None:
    if found is None:
        return None
    ends = None if found["interval"] is None else [round(end, RELEASE_DECIMALS) for end in found["interval"]]
    return {"value": round(found["value"], RELEASE_DECIMALS), "interval": ends}


def _in_words(study: Study, card: dict[str, Any]) -> str:
    lines = [
        f"# {study.title}",
        "",
        f"Study `{study.digest}`, run `{card['run_id']}`, round {card['selected_round']} ({card['label']}).",
        "",
        f"**Intended use.** {study.purpose}",
        "",
        f"**Predicts** {study.predicts} from {study.images.words}",
        f"Preprocessing `{card['preprocessing_sha256']}`.",
        "",
        f"**Reference standard.** {card['reference_standard']}",
        "",
        f"**Privacy.** {' '.join(card['privacy_sentences']) or 'No differential privacy.'}",
        "",
        "**Population and figures.** Of held-out patients. Counts are rounded down to tens; a class below ten has none.",
        "",
        "```json",
        json.dumps(card["metrics"], indent=1),
        "```",
        "",
        "**Limits.**",
        *(f"- {limit}" for limit in card["limits"]),
        "",
    ]
    return "\n".join(lines)


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
