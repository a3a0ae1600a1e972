"""One run of a study: its durable state on disk. Whatever process dies, what was committed stays, and the run goes on there.

    RUNS/<run id>/
      study.json              canonical study; its digest is checked whenever the run is opened
      run.json                who launched it, state, label, attempt; small, replaced atomically
      checkpoint.safetensors  model, best model, strategy state, history of all committed rounds; one atomic rename a round
      events.jsonl            what happened, a line each; for progress bars, never read back for state
      results.json, model.safetensors, card.json   written by `finish`

The attempt counts launches. It is part of every order, so no order of a later launch repeats one of an earlier.
"""

import datetime
import json
import logging
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from models.metrics import ScoreHistogram
from models.study import Study
from privacy import keys
from privacy.errors import DocumentError, MessageMalformed, RunError, RunUnknown
from privacy.wire import EvaluateReport

State = Literal["queued", "running", "complete", "partial", "failed"]
Float32 = npt.NDArray[np.float32]
log = logging.getLogger("isocenter.run")


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


@dataclass
class Round:
    """What one committed round has to say. `missing`: site -> enumerated reason."""

    round: int
    seconds: float
    contributors: list[str]
    missing: dict[str, str]
    cases: dict[str, int]
    train_loss: dict[str, float]
    site_seconds: dict[str, float]
    validation: dict[str, dict[str, Any]] = field(default_factory=dict)
    validation_missing: dict[str, str] = field(default_factory=dict)


def score_sheet(report: EvaluateReport) -> dict[str, Any]:
    """What one site's evaluation leaves in the record: counts, loss, and the histogram; no scores."""
    return {
        "patients": report.patients,
        "images": report.images,
        "loss": report.loss,
        "counts": report.counts.tolist(),
    }


class Run:
    """An open run. Only the process that executes it calls `commit` and `finish`."""

    def __init__(self, folder: Path, study: Study, facts: dict[str, Any]) -> None:
        self.folder, self.study, self.facts = folder, study, facts
        self.model: Float32 | None = None
        self.best: Float32 | None = None
        self.best_round = 0
        self.state: Mapping[str, Float32] = {}
        self.history: list[Round] = []
        self.ingested: dict[str, int] = {}

    @classmethod
    def create(cls, runs: Path, study: Study, researcher: str, sites: list[str]) -> "Run":
        """A new run in state queued, for the `sites` that consent; durable when this returns."""
        stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
        run_id = f"{study.name.replace('_', '-')}-{stamp}-{secrets.token_hex(3)}"
        folder = runs / run_id
        folder.mkdir(mode=0o700, parents=True)
        keys.write_private(folder / "study.json", study.canonical())
        facts = {
            "version": 1,
            "run_id": run_id,
            "digest": study.digest,
            "study": study.name,
            "researcher": researcher,
            "sites": sites,
            "state": "queued",
            "label": "queued",
            "created": now(),
            "attempt": 0,
            "round": 0,
            "rounds": study.training.rounds,
        }
        run = cls(folder, study, facts)
        run._save_facts()
        return run

    @classmethod
    def open(cls, folder: Path) -> "Run":
        """The run in `folder` with everything committed so far; raises RunUnknown or, for damage, DocumentError."""
        facts = read_facts(folder)
        study = Study.from_canonical((folder / "study.json").read_bytes())
        if study.digest != facts["digest"]:
            raise DocumentError(f"{folder}: study.json is not the study that was launched")
        run = cls(folder, study, facts)
        run._load_checkpoint()
        return run

    @property
    def run_id(self) -> str:
        return str(self.facts["run_id"])

    @property
    def attempt(self) -> int:
        return int(self.facts["attempt"])

    def start(self) -> None:
        """Mark this launch; a new attempt number is durable before any order of it can be sent."""
        self.facts |= {"state": "running", "label": "running", "attempt": self.attempt + 1}
        self.facts.setdefault("started", now())
        self._save_facts()
        self.event("started", attempt=self.attempt, round=len(self.history), rounds=self.study.training.rounds)

    def remaining(self) -> Iterator[int]:
        """Rounds (from 1) that are not committed."""
        return iter(range(len(self.history) + 1, self.study.training.rounds + 1))

    def commit(self, done: Round, model: Float32, state: Mapping[str, Float32]) -> None:
        """Make one round durable with a single rename: either all of it happened or none."""
        self.model, self.state = model, state
        self.history.append(done)
        loss = self._validation_loss(done)
        best = self._validation_loss(self.history[self.best_round - 1]) if self.best_round else None
        if self.study.evaluation.select == "last" or best is None or (loss is not None and loss < best):
            self.best, self.best_round = model, done.round
        arrays = {"model": model, "best": self.best} | {f"state.{name}": value for name, value in state.items()}
        progress = {
            "version": 1,
            "digest": self.study.digest,
            "best_round": self.best_round,
            "history": [vars(r) for r in self.history],
            "ingested": self.ingested,
        }
        keys.write_private(
            self.folder / "checkpoint.safetensors",
            save({k: np.ascontiguousarray(v) for k, v in arrays.items()}, metadata={"progress": json.dumps(progress)}),
        )
        self.facts |= {"round": done.round, "label": f"running, round {done.round} of {self.study.training.rounds}"}
        self._save_facts()
        self.event(
            "round_done",
            round=done.round,
            seconds=round(done.seconds, 3),
            contributors=done.contributors,
            missing=done.missing | done.validation_missing,
            loss=loss,
            auroc=self._auroc(done.validation),
        )

    def finish(self, test: dict[str, dict[str, Any]], test_missing: dict[str, str]) -> None:
        """Write results, the released model and its card; the state becomes complete or partial."""
        label = participation_label(self.study, self.history, test_missing)
        self.facts |= {"state": "complete" if label == "complete" else "partial", "label": label, "finished": now()}
        results = {
            "version": 1,
            "run_id": self.run_id,
            "digest": self.study.digest,
            "study": self.study.model_dump(mode="json"),
            "label": label,
            "started": self.facts["started"],
            "finished": self.facts["finished"],
            "selected_round": self.best_round,
            "rounds": [vars(r) for r in self.history],
            "test": test,
            "test_missing": test_missing,
            "ingested": self.ingested,
        }
        model = self.best if self.best is not None else self.model
        if model is None:
            raise RunError("the run has no model: no round was committed")
        card = {k: results[k] for k in ("version", "run_id", "digest", "study", "label", "finished", "selected_round")}
        keys.write_private(self.folder / "model.safetensors", save({"model": np.ascontiguousarray(model)}))
        keys.write_private(self.folder / "card.json", json.dumps(card, indent=1).encode())
        keys.write_private(self.folder / "results.json", json.dumps(results).encode())
        self._save_facts()
        self.event("finished", label=label, auroc=self._auroc(test))

    def fail(self, code: str, sentence: str) -> None:
        self.facts |= {"state": "failed", "label": f"failed after round {len(self.history)}: {code}"}
        self._save_facts()
        self.event("failed", code=code, message=sentence)

    def requeue(self) -> None:
        """A failed run, launched again: it goes on at the first round that is not committed. Its events start anew."""
        events = self.folder / "events.jsonl"
        if events.exists():
            events.rename(self.folder / f"events-{self.attempt}.jsonl")
        self.facts |= {"state": "queued", "label": "queued"}
        self._save_facts()

    def event(self, kind: str, **facts: Any) -> None:
        line = json.dumps({"at": now(), "event": kind} | facts) + "\n"
        with (self.folder / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(line)

    def _auroc(self, sheets: dict[str, dict[str, Any]]) -> dict[str, float | None]:
        """AUROC of the first target, per site and pooled; None where one class is missing."""
        histograms = {site: ScoreHistogram(np.array(sheet["counts"], dtype=np.int64)) for site, sheet in sheets.items()}
        values = {site: histogram.auroc(0) for site, histogram in histograms.items()}
        total = sum_histograms(list(histograms.values()))
        return values | {"pooled": total.auroc(0) if total is not None else None}

    @staticmethod
    def _validation_loss(done: Round) -> float | None:
        """Mean loss over all validation images of the round, or None if no site reported."""
        images = sum(sheet["images"] for sheet in done.validation.values())
        return sum(s["loss"] * s["images"] for s in done.validation.values()) / images if images else None

    def _save_facts(self) -> None:
        keys.write_private(self.folder / "run.json", json.dumps(self.facts, indent=1).encode())

    def _load_checkpoint(self) -> None:
        path = self.folder / "checkpoint.safetensors"
        if not path.exists():
            return
        try:
            with safe_open(path, framework="numpy") as file:
                progress = json.loads((file.metadata() or {})["progress"])
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
        except (SafetensorError, KeyError, ValueError) as error:
            raise DocumentError(f"{path}: damaged checkpoint ({error})", remedy="Restore it from a backup.") from None
        if progress["digest"] != self.study.digest:
            raise DocumentError(f"{path}: belongs to another study")
        self.model, self.best, self.best_round = arrays["model"], arrays["best"], progress["best_round"]
        self.state = {name.removeprefix("state."): a for name, a in arrays.items() if name.startswith("state.")}
        self.history = [Round(**entry) for entry in progress["history"]]
        self.ingested = progress["ingested"]


def sum_histograms(histograms: list[ScoreHistogram]) -> ScoreHistogram | None:
    total: ScoreHistogram | None = None
    for histogram in histograms:
        total = histogram if total is None else total + histogram
    return total


def read_facts(folder: Path) -> dict[str, Any]:
    """run.json of one run; raises RunUnknown if there is none."""
    try:
        facts: dict[str, Any] = json.loads((folder / "run.json").read_bytes())
    except FileNotFoundError:
        raise RunUnknown(f"there is no run {folder.name!r}") from None
    except ValueError:
        raise MessageMalformed(f"{folder}/run.json is damaged") from None
    return facts


def list_runs(runs: Path) -> list[dict[str, Any]]:
    """run.json of every run, oldest first; one that is damaged is left out and logged, because it must not hide the others."""
    found = []
    for path in runs.glob("*/run.json"):
        try:
            found.append(read_facts(path.parent))
        except MessageMalformed as error:
            log.error("%s", error)
    return sorted(found, key=lambda facts: (facts["created"], facts["run_id"]))


def participation_label(study: Study, history: list[Round], test_missing: dict[str, str]) -> str:
    """ "complete", or "partial (3 of 4, west missing since round 6)": a subset is never reported as the whole."""
    sites = study.participation.sites
    last: dict[str, int] = dict.fromkeys(sites, 0)
    full = 0
    for done in history:
        full += all(site in done.contributors for site in sites)
        for site in done.contributors:
            last[site] = done.round
    absent = []
    for site in study.all_sites:
        rounds_missed = site in last and any(site not in done.contributors for done in history)
        if rounds_missed and last[site] < len(history):
            absent.append(f"{site} missing since round {last[site] + 1}" if last[site] else f"{site} never took part")
        elif rounds_missed:
            missed = sum(site not in done.contributors for done in history)
            absent.append(f"{site} missed {missed} of {len(history)} rounds")
        elif site in test_missing:
            absent.append(f"{site} not in the test evaluation ({test_missing[site]})")
    if not absent:
        return "complete"
    whole = len(study.all_sites) - len(absent)
    return f"partial ({whole} of {len(study.all_sites)}, {', '.join(absent)})"
