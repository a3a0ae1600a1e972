"""How far a run is, read from its folder by whoever only looks on: the commands, the dashboard, metrics, notifications.

Everything comes from run.json and the events of all launches (events-N.jsonl, then events.jsonl), never from a checkpoint, so
looking on neither opens a model nor holds up the run. A round that was committed in the moment of a crash may lack its event;
it is then counted and not described. What stands in the files is bounded and made printable before anybody shows it.
"""

import json
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fl_server.run import ENDED, read_facts, stop_asked
from privacy import errors
from privacy.errors import IsocenterError, RunUnknown

BLOCK_BYTES = 1024 * 1024
LINE_BYTES_MAX = 1024 * 1024  # a line that names 1000 sites is about 40 KiB; longer ones are left out
TEXT_MAX = 500
NOTES_MAX = 200  # void sums and the like, the latest ones

STAGES = {"keys": "agreeing on keys", "train": "training", "evaluate": "evaluating", "unmask": "opening the sum"}
OWN_REMEDIES = {
    "offline": "Ask the site to start its node (`fl-client start`); it takes part again as soon as it is back.",
    "timeout": "The site did not answer before the deadline: a slow machine, or a line that broke. Ask what its node says.",
    "unavailable": "The line to the site broke after the order. Nothing to do if it is back; else ask the site.",
    "joining": "Nothing to do: the site came in while the others worked, and is in the next sum.",
    "not-consenting": "The site did not approve the study, withdrew its approval, or has another key than the study names.",
}


def remedy_of(reason: str) -> str:
    """What helps against the reason for which a site is missing; errors of a site have their remedy for people there."""
    if reason in OWN_REMEDIES:
        return OWN_REMEDIES[reason]
    todo: list[type[IsocenterError]] = [errors.IsocenterError]
    while todo:
        kind = todo.pop()
        if kind.code == reason:
            return f"At the site: {kind.remedy}"
        todo += kind.__subclasses__()
    return "Ask the site what its node says."


def printable(text: object, most: int = TEXT_MAX) -> str:
    """`text` without control characters, which a terminal would obey, and not longer than `most`."""
    return "".join(c if c.isprintable() else "�" for c in str(text)[: most + 1])[:most]


@dataclass
class SitePart:
    """What one site does in the run now, and did so far. `reason`: why it is missing at this stage; `seconds` 0: not told;
    `trains`: whether it has a part in rounds, or evaluates only.
    """

    name: str
    doing: str = "waiting"  # or working, done, missing
    stage: str = ""
    since: str = ""
    seconds: float = 0.0
    reason: str = ""
    rounds: int = 0
    trains: bool = True
    train_orders: int = 0  # each may have cost patients at the site their ε, whatever became of it
    refusals: dict[str, int] = field(default_factory=dict)


@dataclass
class RoundPart:
    """One committed round. `loss` and `auroc`, or of outlines `dice`: validation of its model, as soon as that is known."""

    round: int
    seconds: float
    contributors: list[str]
    missing: dict[str, str]
    train_loss: float | None
    clipped: int
    at: str
    loss: float | None = None
    auroc: float | None = None
    dice: float | None = None
    asked: list[str] = field(default_factory=list)  # training sites that were drawn for it; empty: all

    @property
    def score(self) -> float | None:
        """Whichever of the two there is."""
        return self.auroc if self.dice is None else self.dice


@dataclass
class Note:
    """Something that a person should not miss: a void sum, a wrong share, updates that a strategy left out."""

    at: str
    sentence: str


class Progress:
    """The state of one run as far as its events tell it. `version` changes whenever anything else does."""

    def __init__(self, facts: Mapping[str, Any], evaluate_only: Collection[str] = ()) -> None:
        self.facts: dict[str, Any] = {}
        self.evaluate_only = evaluate_only
        self.version = 0
        self.stage, self.stage_since, self.round = "", "", 0
        self.sites: dict[str, SitePart] = {}
        self.rounds: list[RoundPart] = []
        self.initial: tuple[float | None, float | None, float | None] | None = (
            None  # loss, AUROC, Dice of the first model
        )
        self.test_auroc: float | None = None
        self.test_dice: float | None = None
        self.measure = "AUROC"  # or Dice: which of the two the run is scored by
        self.waiting: list[str] = []
        self.notes: list[Note] = []
        self.failure = ("", "")  # code, sentence
        self.launches = 0
        self.stopping = ""
        self.update(facts, "")

    def update(self, facts: Mapping[str, Any], stopping: str) -> None:
        if dict(facts) != self.facts or stopping != self.stopping:
            self.facts, self.stopping = dict(facts), stopping
            self.version += 1
            for name in facts.get("sites", []):
                self._site(str(name))

    @property
    def state(self) -> str:
        return printable(self.facts.get("state", "unreadable"), 20)

    @property
    def label(self) -> str:
        if self.stopping and self.state in ("queued", "running"):
            return "stopping" if self.stopping == "now" else "stopping after the present stage"
        return printable(self.facts.get("label", ""), 5000)

    @property
    def done(self) -> int:
        """Committed rounds."""
        return max(int(self.facts.get("round", 0)), self.rounds[-1].round if self.rounds else 0)

    def due(self, name: str) -> int:
        """Committed rounds that asked `name`."""
        return self.done - sum(bool(each.asked) and name not in each.asked for each in self.rounds)

    @property
    def planned(self) -> int:
        return int(self.facts.get("rounds", 0))

    @property
    def median_seconds(self) -> float | None:
        return statistics.median(each.seconds for each in self.rounds) if self.rounds else None

    def remaining_s(self, now: float | None = None) -> float | None:
        """Seconds until the last round, by the median of those so far; None where nothing tells. The test comes after."""
        median = self.median_seconds
        if self.state != "running" or median is None:
            return None
        began = max((_seconds(at) for at in (self.rounds[-1].at, self._launched)), default=0.0)
        under_way = max(0.0, (time.time() if now is None else now) - began)
        return max(0.0, median * (self.planned - self.done) - min(under_way, median))

    _launched = ""

    def feed(self, event: Mapping[str, Any]) -> None:
        """Take one event; what does not have its form is left out."""
        handler: Callable[[Mapping[str, Any]], None] | None = getattr(self, f"_on_{event.get('event')}", None)
        if handler is None:
            return
        try:
            handler(event)
        except (KeyError, TypeError, ValueError, AttributeError):
            return
        self.version += 1

    def _site(self, name: str) -> SitePart:
        return self.sites.setdefault(name, SitePart(printable(name, 64), trains=name not in self.evaluate_only))

    def _on_started(self, event: Mapping[str, Any]) -> None:
        self.launches += 1
        self._launched, self.failure, self.waiting = str(event["at"]), ("", ""), []
        self._rest()

    def _on_waiting(self, event: Mapping[str, Any]) -> None:
        self.waiting = [printable(name, 64) for name in event["sites"]]
        self.stage, self.stage_since = "", str(event["at"])

    def _on_asked(self, event: Mapping[str, Any]) -> None:
        stage, self.waiting = printable(event["stage"], 20), []
        self.stage, self.stage_since, self.round = stage, str(event["at"]), int(event["round"])
        for part in self.sites.values():
            if part.doing != "missing" or part.name in event["sites"]:
                part.doing, part.stage, part.reason = "waiting", "", ""
        for name in event["sites"]:
            part = self._site(str(name))
            part.doing, part.stage, part.since, part.reason, part.seconds = "working", stage, str(event["at"]), "", 0.0
            part.train_orders += stage == "train"

    def _on_site(self, event: Mapping[str, Any]) -> None:
        part = self._site(str(event["site"]))
        part.seconds, part.doing, part.since = float(event["seconds"]), "done", str(event["at"])
        part.stage = printable(event["stage"], 40).removesuffix("-report")

    def _on_site_missing(self, event: Mapping[str, Any]) -> None:
        part, reason = self._site(str(event["site"])), printable(event["reason"], 80)
        part.doing, part.reason, part.since = "missing", reason, str(event["at"])
        part.refusals[reason] = part.refusals.get(reason, 0) + 1

    def _on_scored(self, event: Mapping[str, Any]) -> None:
        number, loss, auroc = int(event["round"]), _number(event["loss"]), _number(event["auroc"])
        dice = _number(event.get("dice"))
        self.measure = "Dice" if "dice" in event else "AUROC"
        if number == 0:
            self.initial = (loss, auroc, dice)
        for each in self.rounds:
            if each.round == number:
                each.loss, each.auroc, each.dice = loss, auroc, dice

    def _on_round_done(self, event: Mapping[str, Any]) -> None:
        contributors = [str(name) for name in event["contributors"]]
        missing = {printable(name, 64): printable(why, 80) for name, why in event["missing"].items()}
        done = RoundPart(
            int(event["round"]), float(event["seconds"]), [printable(name, 64) for name in contributors], missing,
            _number(event["train_loss"]), int(event["clipped"]), str(event["at"]),
            asked=[printable(name, 64) for name in event.get("asked", [])],
        )  # fmt: skip
        if any(each.round == done.round for each in self.rounds):
            return
        self.rounds.append(done)
        for name in contributors:
            self._site(name).rounds += 1
        for name, why in event["missing"].items():
            part = self._site(str(name))
            if part.doing != "missing":
                part.doing, part.reason, part.since = "missing", printable(why, 80), str(event["at"])
                part.refusals[part.reason] = part.refusals.get(part.reason, 0) + 1
        self.stage = ""

    def _on_counted(self, event: Mapping[str, Any]) -> None:
        for name, why in event["missing"].items():
            part = self._site(str(name))
            part.doing, part.reason = "missing", printable(why, 80)

    def _on_void(self, event: Mapping[str, Any]) -> None:
        reason = printable(event["reason"], 80)
        told = f"round {int(event['round'])}, attempt {int(event['attempt'])}: the sum was not opened ({reason})"
        self._note(event, told)

    def _on_left_out(self, event: Mapping[str, Any]) -> None:
        names = ", ".join(printable(name, 64) for name in event["sites"])
        self._note(event, f"round {int(event['round'])}: the strategy left out {names}")

    def _on_joined(self, event: Mapping[str, Any]) -> None:
        names = ", ".join(printable(name, 64) for name in event["sites"])
        self._note(
            event, f"round {int(event['round'])}: {names} approved since the launch, and has a part from here on"
        )

    def _on_wrong_share(self, event: Mapping[str, Any]) -> None:
        self._note(event, f"{printable(event['site'], 64)} gave a wrong share of a secret")

    def _on_flagged(self, event: Mapping[str, Any]) -> None:
        site, why = printable(event["site"], 64), printable(event["why"], 80)
        self._note(event, f"round {int(event['round'])}: the update of {site} is {why}")

    def _on_late(self, event: Mapping[str, Any]) -> None:
        stage = printable(event["stage"], 20)
        seconds = f" {duration(float(event['seconds']))}" if "seconds" in event else ""
        told = f"{printable(event['site'], 64)} came{seconds} too late with {STAGES.get(stage, stage)}; it is thanked"
        self._note(event, f"round {int(event['round'])}: {told}, and its report is not used")

    def _on_checkpoint_damaged(self, event: Mapping[str, Any]) -> None:
        again = int(event["goes_on_after"])
        self._forget_from(again + 1)
        self._note(event, f"the checkpoint of round {int(event['round'])} was damaged; going on after round {again}")

    def _on_restarted(self, event: Mapping[str, Any]) -> None:
        first, after = int(event["first"]), int(event["after"])
        self._forget_from(first)
        self._note(
            event, f"restarted from round {first} after round {after}; what these rounds had learned was given up"
        )

    def _forget_from(self, first: int) -> None:
        self.rounds = [each for each in self.rounds if each.round < first]
        for name, part in self.sites.items():
            part.rounds = sum(name in each.contributors for each in self.rounds)

    def _on_finished(self, event: Mapping[str, Any]) -> None:
        self.test_auroc, self.test_dice = _number(event["auroc"]), _number(event.get("dice"))
        self.measure = "Dice" if "dice" in event else self.measure
        self._rest()

    def _on_failed(self, event: Mapping[str, Any]) -> None:
        self.failure = printable(event["code"], 80), printable(event["message"])
        self._rest()

    def _on_stopped(self, event: Mapping[str, Any]) -> None:
        self._rest()

    def _rest(self) -> None:
        self.stage, self.waiting = "", []
        for part in self.sites.values():
            part.doing, part.stage, part.reason = "waiting", "", ""

    def _note(self, event: Mapping[str, Any], sentence: str) -> None:
        self.notes = [*self.notes, Note(str(event["at"]), sentence)][-NOTES_MAX:]

    def sentence(self) -> str:
        """Where the run stands, in one sentence."""
        if self.waiting:
            return f"waiting for {', '.join(self.waiting)}"
        if self.state != "running" or self.stopping:
            return self.label
        if not self.stage:
            return "between two stages"
        what = STAGES.get(self.stage, self.stage)
        busy = [part.name for part in self.sites.values() if part.doing == "working"]
        return f"round {self.round} of {self.planned}, {what}" + (f": {', '.join(busy)}" if busy else "")

    def to_json(self) -> dict[str, Any]:
        """Everything above as one document."""
        kept = ("run_id", "study", "digest", "researcher", "created", "started", "finished", "attempt")
        return {
            **{name: self.facts.get(name) for name in kept},
            "state": self.state,
            "label": self.label,
            "now": self.sentence(),
            "stopping": self.stopping or None,
            "round": self.done,
            "rounds_planned": self.planned,
            "stage": self.stage or None,
            "waiting_for": self.waiting,
            "median_round_s": self.median_seconds,
            "remaining_s": self.remaining_s(),
            "initial": None
            if self.initial is None
            else dict(zip(("loss", "auroc", "dice"), self.initial, strict=True)),
            "test_auroc": self.test_auroc,
            "test_dice": self.test_dice,
            "failure": {"code": self.failure[0], "message": self.failure[1]} if self.failure[0] else None,
            "sites": {name: asdict(part) for name, part in sorted(self.sites.items())},
            "rounds": [asdict(each) for each in self.rounds],
            "notes": [asdict(note) for note in self.notes],
        }


class Onlooker:
    """Reads what is new of one run's folder at each `look`; one that was launched anew is read from its beginning."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._progress: Progress | None = None
        self._read: list[str] = []
        self._place, self._rest, self._node = 0, b"", 0

    def look(self) -> Progress:
        """The present progress. Raises RunUnknown if the run is gone, MessageMalformed if run.json is damaged."""
        facts = read_facts(self.folder)
        before = sorted(self.folder.glob("events-*.jsonl"), key=_launch)
        names = [path.name for path in before]
        if self._progress is None or names != self._read:
            self._progress, self._read = Progress(facts, _evaluate_only(self.folder)), names
            self._place, self._rest = 0, b""
            for path in before:
                self._take(path, 0)
                self._rest = b""
            self._place = 0
        self._progress.update(facts, stop_asked(self.folder))
        self._place = self._take(self.folder / "events.jsonl", self._place)
        return self._progress

    def _take(self, path: Path, place: int) -> int:
        """Feed the whole lines behind `place`; the place behind what was read."""
        if self._progress is None:
            return place
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return 0
        with file:
            file.seek(place)
            while block := file.read(BLOCK_BYTES):
                place += len(block)
                *lines, self._rest = (self._rest + block).split(b"\n")
                if len(self._rest) > LINE_BYTES_MAX:
                    self._rest = b"{"  # and so no event, wherever it ends
                for line in lines:
                    if (event := _event(line)) is not None:
                        self._progress.feed(event)
        return place


def find(runs: Path, text: str) -> Path:
    """The folder of the run whose id is `text` or, alone among all, begins with it; raises RunUnknown."""
    names = sorted(path.parent.name for path in runs.glob("*/run.json"))
    found = [name for name in names if name == text] or [name for name in names if text and name.startswith(text)]
    if len(found) != 1:
        what = "more than one run begins" if found else "there is no run that begins"
        raise RunUnknown(f"{what} with {printable(text, 80)!r}", remedy="List them with `fl-server runs`.")
    return runs / found[0]


def queue(facts: list[dict[str, Any]]) -> list[str]:
    """Ids of the runs that wait for their turn or have it, in the order in which they are carried out."""
    return [str(each["run_id"]) for each in facts if each.get("state") in ("queued", "running")]


def ahead(waiting: list[str], run_id: str, at_once: int) -> int:
    """How many runs of the queue `waiting` have to end before this one begins, where `at_once` are carried out side by side."""
    return max(0, waiting.index(run_id) + 1 - at_once)


def ended(facts: Mapping[str, Any]) -> bool:
    return facts.get("state") in ENDED


def duration(seconds: float) -> str:
    """ "42 s", "3 min 20 s" or "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def _evaluate_only(folder: Path) -> list[str]:
    """Sites of the run's study that do not train; none where the study cannot be read."""
    try:
        named = json.loads((folder / "study.json").read_bytes())["participation"]["evaluate_only"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    return [str(name) for name in named] if isinstance(named, list) else []


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _launch(path: Path) -> tuple[int, str]:
    number = path.stem.removeprefix("events-")
    return (int(number) if number.isdecimal() else 0), path.name


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _seconds(moment: str) -> float:
    try:
        found = datetime.fromisoformat(moment)
    except ValueError:
        return 0.0
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
