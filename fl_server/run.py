"""One run of a study: its durable state on disk. Whatever process dies, what was committed stays, and the run goes on there.

    RUNS/<run id>/
      study.json              canonical study; its digest is checked whenever the run is opened
      run.json                who launched it, state, label, attempt; small, replaced atomically
      checkpoint-N.safetensors  model, best model, strategy state, history of all committed rounds; the last two rounds N are kept
                              (`fl_server.checkpoint`); one atomic rename a round
      events.jsonl            what happened, a line each; for progress bars, never read back for state
      stop.json               somebody asked the run to stop; heeded before the next stage, or at once
      lock                    held by whoever carries the run out
      results.json, model.safetensors, card.json   written by `finish`; of a study that counts, results.json by `conclude`

The attempt counts launches and sums that had to be tried again. It is part of every order and of every mask, so nothing of a
later attempt repeats anything of an earlier one.
"""

import contextlib
import datetime
import fcntl
import json
import logging
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from fl_server import checkpoint
from models.contributions import Sheet
from models.metrics import ScoreHistogram
from models.questions import Answer
from models.segmentation import Overlaps
from models.study import Study
from privacy import disk, keys
from privacy.errors import DocumentError, MessageMalformed, RunError, RunStopped, RunUnknown

State = Literal["queued", "running", "complete", "partial", "failed", "stopped"]
ENDED = ("complete", "partial", "failed", "stopped")
Float32 = npt.NDArray[np.float32]
VERSION = 1  # of run.json
STOP = "stop.json"
log = logging.getLogger("isocenter.run")


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


@dataclass
class Round:
    """What one committed round has to say. `missing`: site -> enumerated reason. `validation` comes with the next sum.

    `late`: site -> seconds by which its report, in some attempt at this round, came too late; it is in no sum. None under
    differential privacy, where times tell of patients. `asked`: the training sites that were drawn for it; empty: all.
    """

    round: int
    attempt: int
    seconds: float
    contributors: list[str]
    missing: dict[str, str]
    cases: int
    train_loss: float | None
    site_seconds: dict[str, float]
    clipped: int
    scale: int
    validation: dict[str, Any] | None = None
    validation_missing: dict[str, str] = field(default_factory=dict)
    late: dict[str, float | None] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)


def score_sheet(sites: list[str], sheet: Sheet) -> dict[str, Any]:
    """What an evaluation over `sites` leaves in the record: counts, mean loss, and summed histogram or outlines; no scores."""
    return {
        "sites": sites,
        "patients": sheet.patients,
        "images": sheet.images,
        "loss": sheet.loss if sheet.images else None,
        "counts": (sheet.overlaps or sheet.histogram).to_json(),
    }


@dataclass(frozen=True)
class Test:
    """The test evaluation of the selected model. `figures`: site -> what it released for each target, or None; `groups`: the sums
    of subgroups, as `models.subgroups.Groups.to_json` writes them; `grades`: the table of `models.grades`, or nothing. `number`:
    where the target is one, what the results document says of it.
    """

    sheet: dict[str, Any]
    missing: dict[str, str]
    figures: dict[str, list[dict[str, Any] | None]]
    groups: list[dict[str, Any]]
    grades: list[list[int]]
    ingested: int
    number: dict[str, Any] | None = None


@dataclass(frozen=True)
class Counted:
    """The answers of a study that counts: sums over `contributors`, in tens, and who is not in them and why."""

    contributors: list[str]
    missing: dict[str, str]
    answers: dict[str, Answer]
    seconds: float


class Run:
    """An open run. Only the process that executes it calls `commit` and `finish`."""

    def __init__(self, folder: Path, study: Study, facts: dict[str, Any]) -> None:
        self.folder, self.study, self.facts = folder, study, facts
        self.model: Float32 | None = None
        self.best: Float32 | None = None
        self.best_round = 0
        self.state: Mapping[str, Float32] = {}
        self.history: list[Round] = []
        self.initial: dict[str, Any] | None = None  # validation of the initial model
        self.scale: int | None = None  # of the next round's encoding
        self.late: dict[int, dict[str, float | None]] = {}  # round -> what `Round.late` says, as far as it is known
        self.lost: list[int] = []  # rounds whose checkpoints were damaged, so that they have to be trained again

    @classmethod
    def create(cls, runs: Path, study: Study, researcher: str, sites: list[str]) -> "Run":
        """A new run in state queued, for the `sites` that consent; durable when this returns."""
        stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
        run_id = f"{study.name.replace('_', '-')}-{stamp}-{secrets.token_hex(3)}"
        folder = runs / run_id
        disk.make_folder(folder)
        keys.write_private(folder / "study.json", study.canonical())
        facts = {
            "version": VERSION,
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
        """The run in `folder` with everything committed so far; raises RunUnknown or, for damage, DocumentError.

        Where the last checkpoint is damaged, the run stands at the one before; `start` says so.
        """
        facts = read_facts(folder)
        study = Study.from_canonical((folder / "study.json").read_bytes())
        if study.digest != facts["digest"]:
            raise DocumentError(f"{folder}: study.json is not the study that was launched")
        run = cls(folder, study, facts)
        if first := int(facts.get("restart_at", 0)):
            given_up = [number for number in checkpoint.kept(folder) if number >= first]
            checkpoint.set_aside(folder, given_up, "discarded")
        run._load_checkpoint()
        return run

    @property
    def run_id(self) -> str:
        return str(self.facts["run_id"])

    @property
    def attempt(self) -> int:
        return int(self.facts["attempt"])

    def start(self) -> None:
        """Mark this launch, under a new attempt. Rounds lost with a damaged checkpoint are named: label, event and log."""
        disk.sweep(self.folder, "checkpoint-*")
        checkpoint.set_aside(self.folder, self.lost)
        self.facts.setdefault("started", now())
        self.facts["lost"] = [*self.facts.get("lost", []), *self.lost]
        self.facts |= {"state": "running", "round": len(self.history), "label": self._labelled("running")}
        if self.facts.pop("restart_at", None):
            self.event("restarted", **self.facts["restarts"][-1])  # before it is done: once more is better than never
        self.next_attempt()
        for number in self.lost:
            log.error("run %s: the checkpoint of round %d was damaged and is set aside", self.run_id, number)
            self.event("checkpoint_damaged", round=number, goes_on_after=len(self.history))
        self.lost = []
        self.event("started", attempt=self.attempt, round=len(self.history), rounds=self.study.training.rounds)

    def next_attempt(self) -> None:
        """A new attempt number, durable before any order of it can be sent."""
        self.facts["attempt"] = self.attempt + 1
        self._save_facts()

    def take_in(self, sites: list[str]) -> None:
        """`sites` consent as well from now on; durable when this returns."""
        self.facts["sites"] = [*self.facts["sites"], *sites]
        self._save_facts()

    def remaining(self) -> Iterator[int]:
        """Rounds (from 1) that are not committed."""
        return iter(range(len(self.history) + 1, self.study.training.rounds + 1))

    def score(self, sheet: dict[str, Any], missing: dict[str, str]) -> None:
        """Note the validation of the present model. It is durable with the next commit, or asked for again."""
        if self.history:
            self.history[-1].validation, self.history[-1].validation_missing = sheet, missing
        else:
            self.initial = sheet
        if self.history and self._is_better(sheet["loss"]):
            self.best, self.best_round = self.model, self.history[-1].round
        self.event("scored", round=len(self.history), loss=sheet["loss"], **self._quality(sheet))

    def note_late(self, number: int, site: str, seconds: float | None) -> None:
        """Note that a report of round `number` came too late; durable with the next commit."""
        self.late.setdefault(number, {})[site] = seconds
        for done in self.history:
            if done.round == number:
                done.late[site] = seconds

    def commit(self, done: Round, model: Float32, state: Mapping[str, Float32]) -> None:
        """Make one round durable with a single rename: either all of it happened or none."""
        self.model, self.state = model, state
        done.late |= self.late.get(done.round, {})
        self.history.append(done)
        self.save()
        label = self._labelled(f"running, round {done.round} of {self.study.training.rounds}")
        self.facts |= {"round": done.round, "label": label}
        self._save_facts()
        self.event(
            "round_done",
            round=done.round,
            seconds=round(done.seconds, 3),
            contributors=done.contributors,
            missing=done.missing,
            train_loss=done.train_loss,
            clipped=done.clipped,
            asked=done.asked,
        )

    def save(self) -> None:
        """Replace the checkpoint by what is known now."""
        if self.model is None:
            raise RunError("the run has no model: no round was committed")
        arrays = {"model": self.model} | {f"state.{name}": value for name, value in self.state.items()}
        if self.best is not None:
            arrays["best"] = self.best
        progress = {
            "digest": self.study.digest,
            "best_round": self.best_round,
            "history": [vars(r) for r in self.history],
            "initial": self.initial,
            "scale": self.scale,
        }
        checkpoint.write(self.folder, len(self.history), arrays, progress)

    def _is_better(self, loss: float | None) -> bool:
        """Whether the present model, with this validation loss, replaces the best one so far."""
        if self.study.evaluation.select == "last" or not self.best_round:
            return True
        before = self.history[self.best_round - 1].validation
        return loss is not None and (before is None or before["loss"] is None or loss < before["loss"])

    def finish(self, test: Test) -> None:
        """Write results, the released model and its card; the state becomes complete or partial."""
        test_missing = test.missing
        label = participation_label(self.study, self.history, test_missing)
        state = "complete" if label == "complete" else "partial"
        self.facts |= {"state": state, "label": self._labelled(label), "finished": now()}
        results = {
            "version": 3,
            "run_id": self.run_id,
            "digest": self.study.digest,
            "study": self.study.model_dump(mode="json"),
            "label": label,
            "started": self.facts["started"],
            "finished": self.facts["finished"],
            "selected_round": self.best_round,
            "initial": self.initial,
            "rounds": [vars(r) for r in self.history],
            "test": test.sheet,
            "test_missing": test.missing,
            "figures": test.figures,
            "groups": test.groups,
            "grades": test.grades,
            "ingested": test.ingested,
            "restarts": self.restarts,
            **({} if test.number is None else {"number": test.number}),
        }
        model = self.best if self.best is not None else self.model
        if model is None:
            raise RunError("the run has no model: no round was committed")
        card = {k: results[k] for k in ("version", "run_id", "digest", "study", "label", "finished", "selected_round")}
        card["privacy"] = [statement.to_json() for statement in self.study.statements()]
        keys.write_private(self.folder / "model.safetensors", save({"model": np.ascontiguousarray(model)}))
        keys.write_private(self.folder / "card.json", json.dumps(card, indent=1).encode())
        keys.write_private(self.folder / "results.json", json.dumps(results).encode())
        self._save_facts()
        self.event("finished", label=label, **self._quality(test.sheet))

    def conclude(self, counted: Counted) -> None:
        """Write the answers of a study that counts; the state becomes complete or partial."""
        label = counted_label(self.study, counted.contributors, counted.missing)
        state = "complete" if label == "complete" else "partial"
        self.facts |= {"state": state, "label": label, "finished": now(), "round": 1}
        results = {
            "version": 1,
            "kind": self.study.task.kind,
            "run_id": self.run_id,
            "digest": self.study.digest,
            "study": self.study.model_dump(mode="json"),
            "label": label,
            "started": self.facts["started"],
            "finished": self.facts["finished"],
            "contributors": counted.contributors,
            "missing": counted.missing,
            "answers": {name: answer.to_json(len(counted.contributors)) for name, answer in counted.answers.items()},
        }
        keys.write_private(self.folder / "results.json", json.dumps(results).encode())
        self._save_facts()
        self.event("counted", seconds=round(counted.seconds, 3), missing=counted.missing)
        self.event("finished", label=label, auroc=None)

    def fail(self, code: str, sentence: str) -> None:
        self.facts |= {"state": "failed", "label": f"failed after round {len(self.history)}: {code}"}
        self._save_facts()
        self.event("failed", code=code, message=sentence)

    def heed(self) -> None:
        """Raise RunStopped if somebody asked this run to stop. Asked between two rounds; see `heed_stop` for the stages."""
        heed_stop(self.folder, within_stage=False)

    def stop(self) -> None:
        """End a run that was asked to stop: state stopped, until it is launched again."""
        self.facts = mark_stopped(self.folder)

    def restart_at(self, first: int) -> int:
        """Give up what was committed from round `first` on, durably and in one step; the number of rounds that are given up.

        Attempts go on counting, so nothing that was sent before is sent again, and what patients were charged stays charged.
        Raises RunError if the model that round `first` starts from is on the disk no more.
        """
        done, there = len(self.history), checkpoint.kept(self.folder)
        if not 1 <= first <= done + 1:
            raise RunError(
                f"run {self.run_id} has {done} committed rounds, so it cannot restart from round {first}",
                remedy=f"Name a round from 1 to {done + 1}.",
            )
        if first > 1 and not checkpoint.is_sound(self.folder, first - 1):
            able = [n for n in range(1, done + 2) if n == 1 or n - 1 in there]
            raise RunError(
                f"the model that round {first} of run {self.run_id} started from is no longer on the disk",
                remedy=f"The last {checkpoint.KEPT} rounds are kept: restart from round {', '.join(map(str, able))}.",
            )
        if first <= done:
            told = {"first": first, "after": done, "at": now()}
            self.facts |= {"restart_at": first, "round": first - 1, "restarts": [*self.restarts, told]}
            self._save_facts()  # from here on it holds; `open` carries it out
        return done + 1 - first

    @property
    def restarts(self) -> list[dict[str, Any]]:
        """When a person had rounds given up, and which: from `first` to `after`."""
        return list(self.facts.get("restarts", []))

    def requeue(self) -> None:
        """A failed or stopped run, launched again: it goes on at the first round that is not committed. Its events start anew."""
        events = self.folder / "events.jsonl"
        if events.exists():
            events.rename(self.folder / f"events-{self.attempt}.jsonl")
        (self.folder / STOP).unlink(missing_ok=True)
        self.facts |= {"state": "queued", "label": "queued"}
        self._save_facts()

    def event(self, kind: str, **facts: Any) -> None:
        add_event(self.folder, kind, facts)

    def _quality(self, sheet: dict[str, Any]) -> dict[str, float | None]:
        """The figure that onlookers see of an evaluation: AUROC of the first target, or Dice of the first structure."""
        if not self.study.segments:
            return {"auroc": _auroc(sheet)}
        found = Overlaps.from_json(sheet["counts"]).mean(0, "dice")
        return {"auroc": None, "dice": None if found is None else found[0]}

    def _save_facts(self) -> None:
        keys.write_private(self.folder / "run.json", json.dumps(self.facts, indent=1).encode())

    def _labelled(self, label: str) -> str:
        """`label`, and which rounds were trained a second time: their checkpoints were damaged, or a person wished it."""
        lost = sorted(set(self.facts.get("lost", [])))
        told = f"; the checkpoint of round {', '.join(map(str, lost))} was damaged, and the round trained again"
        again = (f"; restarted from round {each['first']} after round {each['after']}" for each in self.restarts)
        return label + (told if lost else "") + "".join(again)

    def _load_checkpoint(self) -> None:
        committed = 0 if self.study.task.kind == "counting" else int(self.facts["round"])
        found = checkpoint.read(self.folder, self.study.digest, committed)
        self.lost = found.lost
        if not found.progress:
            return
        arrays, progress = found.arrays, found.progress
        self.model, self.best, self.best_round = arrays["model"], arrays.get("best"), progress["best_round"]
        self.state = {name.removeprefix("state."): a for name, a in arrays.items() if name.startswith("state.")}
        self.history = [Round(**entry) for entry in progress["history"]]
        self.initial, self.scale = progress["initial"], progress["scale"]


def add_event(folder: Path, kind: str, facts: dict[str, Any]) -> None:
    """One more line of events.jsonl; after a line in which a process died, on a line of its own. Raises DiskUnusable."""
    path = folder / "events.jsonl"
    line = json.dumps({"at": now(), "event": kind} | facts).encode() + b"\n"
    with disk.faults_named(path), path.open("ab+", buffering=0) as file:
        if end := file.seek(0, os.SEEK_END):
            file.seek(end - 1)
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)


def give_up(folder: Path, code: str) -> None:
    """Mark a run that cannot be opened as failed, so that nobody waits for it. Its files stay as they are."""
    facts = read_facts(folder)
    facts |= {"state": "failed", "label": f"failed after round {facts['round']}: {code}"}
    keys.write_private(folder / "run.json", json.dumps(facts, indent=1).encode())


def ask_to_stop(folder: Path, *, at_once: bool) -> None:
    """Ask the run to stop before its next stage or, `at_once`, in the middle of one; durable when this returns."""
    keys.write_private(folder / STOP, json.dumps({"version": 1, "at": now(), "now": at_once}).encode())


def stop_asked(folder: Path) -> Literal["", "after-stage", "now"]:
    """Whether the run was asked to stop, and how soon. A damaged request counts as one: asking again for a run is easy."""
    try:
        asked = json.loads((folder / STOP).read_bytes())
    except FileNotFoundError:
        return ""
    except (OSError, ValueError):
        return "after-stage"
    return "now" if isinstance(asked, dict) and asked.get("now") is True else "after-stage"


def heed_stop(folder: Path, within_stage: bool) -> None:
    """Raise RunStopped if the run was asked to stop; within a stage only if that was asked for."""
    asked = stop_asked(folder)
    if asked == "now" or (asked and not within_stage):
        raise RunStopped(f"run {folder.name} was stopped by the coordinator")


def mark_stopped(folder: Path) -> dict[str, Any]:
    """Note that the run has stopped; the new facts. Works on a run whose checkpoint cannot be opened as well."""
    facts = read_facts(folder)
    facts |= {"state": "stopped", "label": f"stopped after round {facts.get('round', 0)}"}
    keys.write_private(folder / "run.json", json.dumps(facts, indent=1).encode())
    add_event(folder, "stopped", {"round": facts.get("round", 0)})
    (folder / STOP).unlink(missing_ok=True)
    return facts


@contextlib.contextmanager
def holding(folder: Path) -> Iterator[bool]:
    """Whether nobody else holds the run; then it is this process's alone while this is entered, however others end."""
    with (folder / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _auroc(sheet: dict[str, Any]) -> float | None:
    """AUROC of the first target over all sites of `sheet`; None where one class is missing."""
    return ScoreHistogram.from_json(sheet["counts"]).auroc(0)


def read_facts(folder: Path) -> dict[str, Any]:
    """run.json of one run; raises RunUnknown if there is none."""
    try:
        facts: dict[str, Any] = json.loads((folder / "run.json").read_bytes())
        disk.require_known(folder / "run.json", facts.get("version"), VERSION)
    except FileNotFoundError:
        raise RunUnknown(f"there is no run {folder.name!r}") from None
    except (ValueError, AttributeError):
        raise MessageMalformed(f"{folder}/run.json is damaged") from None
    return facts


def list_runs(runs: Path) -> list[dict[str, Any]]:
    """run.json of every run, oldest first; one that is damaged is left out and logged, because it must not hide the others."""
    found = []
    for path in runs.glob("*/run.json"):
        try:
            facts = read_facts(path.parent)
            if not {"run_id", "state", "created"} <= facts.keys():
                raise MessageMalformed(f"{path} is damaged")
            found.append(facts)
        except (MessageMalformed, DocumentError) as error:
            log.error("%s", error)
    return sorted(found, key=lambda facts: (facts["created"], facts["run_id"]))


def participation_label(study: Study, history: list[Round], test_missing: dict[str, str]) -> str:
    """ "complete", or "partial (3 of 4, west missing since round 6: timeout)": a subset is never reported as the whole.

    Where rounds draw their sites, what counts is whether those came that were asked.
    """
    trainers, absent = {*study.participation.sites}, []
    for site in study.all_sites:
        due = [done for done in history if site in (done.asked or trainers)]
        missed = [done for done in due if site not in done.contributors]
        if missed and missed[-1] is due[-1]:
            came = [done.round for done in due if done not in missed]
            after = [done.round for done in missed if not came or done.round > came[-1]]
            since = f"missing since round {after[0]}" if came else "never took part"
            why = due[-1].missing.get(site)
            absent.append(f"{site} {since}: {why}" if why else f"{site} {since}")
        elif missed:
            reasons = dict.fromkeys(done.missing[site] for done in missed if site in done.missing)
            why = f": {' and '.join(reasons)}" if reasons else ""
            absent.append(f"{site} missed {len(missed)} of {len(due)} rounds{why}")
        elif site in test_missing:
            absent.append(f"{site} not in the test evaluation ({test_missing[site]})")
    if not absent:
        return "complete"
    whole = len(study.all_sites) - len(absent)
    return f"partial ({whole} of {len(study.all_sites)}, {', '.join(absent)})"


def counted_label(study: Study, contributors: list[str], missing: dict[str, str]) -> str:
    """ "complete", or "partial (3 of 4, west missing: offline)", of a run that counted."""
    absent = ", ".join(f"{site} missing: {why}" for site, why in sorted(missing.items()))
    return f"partial ({len(contributors)} of {len(study.all_sites)}, {absent})" if absent else "complete"
