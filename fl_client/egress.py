"""What left the building, in words: the journal's lines about everything that this site sent.

A line is in the journal before what it tells of is sent, so this can name something that a broken connection kept here, and
never leave out something that left. Words name the most that a line of its kind can hold: under differential privacy updates
have noise, and losses and small counts are withheld. Bytes are those of content, what is summed or shared, and keys; not names,
times, signatures, figures, and what the connection adds. Heartbeats and signed requests carry the site's name, the time and the
version of Isocenter, and have no lines.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fl_client.consent import Consent
from privacy import journal
from privacy.errors import IsocenterError, JournalDamaged, MessageMalformed
from privacy.wire import COHORT

PARTS = {
    "masked": "masked part of a sum",
    "sealed": "part of a sum, sealed for the coordinator",
    "plain": "part of a sum, unprotected",
}
UNKNOWN = "a line that this version has no words for"
SUMMED = "score histograms (of outlined structures and predicted numbers: sums of how well they agree)"
RELEASE = "release"
"""Kind of the line that tells norm and ε of an update before it is protected; the report of the same order tells that it left."""
STAYS = frozenset(
    {
        "settings",
        "paused",
        "resumed",
        "offer-refused",
        "budget",
        "worker-replaced",
        "torn-line-set-aside",
        "model-pulled",
    }
    | {"evaluation-written", "head-witnessed", "head-contradicted", "variate-absent", "norms-absent", RELEASE}
)
"""Kinds of lines about what stayed here."""

Facts = dict[str, Any]
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")


def _fixed(words: str) -> Callable[[Facts], str]:
    return lambda facts: words


def _part(facts: Facts, what: str) -> str:
    keys = ", and public keys for the next sum" if facts["keys_bytes"] else ""
    return f"{PARTS.get(facts['protection'], 'part of a sum')}: {what}{keys}"


def _trained(facts: Facts) -> str:
    what = "model update (with SCAFFOLD also a mean gradient), losses, counts and"
    return _part(facts, f"{what} {SUMMED} of round {facts['round']}")


def _evaluated(facts: Facts) -> str:
    figures = facts["figures"]
    released = f"; beside it, figures of the test split for {_count(figures, 'target')}" if figures else ""
    if facts["split"] == COHORT:
        return _part(facts, "numbers of patients and images in tens, as the study's questions ask")
    words = f"losses, counts and {SUMMED} of the {facts['split']} split, round {facts['round']}"
    return _part(facts, words) + released


def _unmasked(facts: Facts) -> str:
    opened = f"shares that open the sum of {_count(facts['survivors'], 'site')}" if facts["shares_bytes"] else ""
    shared = "encrypted shares for the next sum" if facts["keys_bytes"] else ""
    return f"{', and '.join(filter(None, (opened, shared))) or 'no shares'}, round {facts['round']}"


WORDS: dict[str, Callable[[Facts], str]] = {
    "joined": _fixed("request to join: the site's name and public key"),
    "approved": _fixed("signed statement that this site approves the study"),
    "declined": _fixed("signed statement that this site declines the study, or withdraws from it"),
    "renewed": _fixed("request for a new certificate: the site's name and public key"),
    "head-signed": lambda facts: f"signed head of this journal: {_count(facts['lines'], 'line')}, hash {facts['head']}",
    "export": lambda facts: (
        f"{_count(facts['images'], 'image')} of {_count(facts['patients'], 'patient')}, handed over by a person here: "
        f"{'de-identified DICOM copies' if facts['what'] == 'dicom' else 'metadata for an imaging hub'}"
    ),
    "readiness": lambda facts: (
        "word that this site is ready"
        if facts["ready"]
        else f"word that this site is not ready: {', '.join(facts['reasons'])}"
    ),
    "model-asked": lambda facts: f"request for the released model {facts['name']}: its SHA-256",
    "no-order": _fixed("error code, because what came was no order"),
    "train-report": _trained,
    "evaluate-report": _evaluated,
    "keys-report": lambda facts: f"public keys for a sum, round {facts['round']}",
    "unmask-report": _unmasked,
    "refusal": lambda facts: f"refusal of an order, round {facts['round']}: the code {facts['code']}",
}
"""Kind of a journal line -> what left, from the facts of the line."""


@dataclass(frozen=True)
class Egress:
    """One thing that left. `n`: its line in the journal; `time`: UTC; `norm` and `epsilon`: of an update, where noted."""

    n: int
    time: str
    kind: str
    words: str
    study: str = ""
    run: str = ""
    round: int = 0
    bytes: int = 0
    protection: str = ""
    norm: float | None = None
    epsilon: float | None = None
    figures: int = 0
    code: str = ""

    @classmethod
    def of(cls, entry: dict[str, Any]) -> "Egress | None":
        """What the line tells of, None if it stayed here. A kind that nobody knows is shown, not passed over."""
        kind, facts = entry["kind"], entry["facts"]
        journal.check_facts(kind, facts)  # whoever forged a chain must not write on the reader's screen either
        if not _TIME.fullmatch(entry["time"]):
            raise ValueError
        if kind in STAYS:
            return None
        sizes = [value for key, value in facts.items() if key.endswith("_bytes")] if kind in WORDS else []
        norm, epsilon = facts.get("norm"), facts.get("epsilon")
        return cls(
            n=entry["n"],
            time=entry["time"],
            kind=kind,
            words=WORDS.get(kind, _fixed(UNKNOWN))(facts),
            study=str(facts.get("study", "")),
            run=str(facts.get("run", "")),
            round=int(facts.get("round", 0)),
            bytes=sum(map(int, sizes)),
            protection=str(facts.get("protection", "")),
            norm=None if norm is None else float(norm),
            epsilon=None if epsilon is None else float(epsilon),
            figures=int(facts.get("figures", 0)),
            code=str(facts.get("code", "")),
        )

    def row(self) -> tuple[str, ...]:
        """The cells of a table under HEADINGS."""
        return (
            self.time,
            str(self.round or ""),
            self.words,
            f"{self.bytes:,}" if self.bytes else "",
            "" if self.norm is None else f"{self.norm:.3g}",
            "" if self.epsilon is None else f"{self.epsilon:.3g}",
        )


HEADINGS = ("time (UTC)", "round", "what left", "bytes", "norm", "ε")


def heading(study: str, run: str) -> str:
    """What stands above the lines of one run, or of what belongs to none."""
    if not study:
        return "About no study"
    return f"Study {study[:12]}, run {run}" if run else f"Study {study[:12]}, about no run"


@dataclass
class Total:
    """What left about one study. `rounds`: trained ones, each once, however often it was tried; `title`: "" if unknown here.

    `figures`: released ones of the test split, by run; the same ones again, when a sum was tried again, count once.
    """

    study: str
    title: str
    bytes: int = 0
    refusals: int = 0
    trained: set[tuple[str, int]] = field(default_factory=set)
    released: dict[str, int] = field(default_factory=dict)

    @property
    def rounds(self) -> int:
        return len(self.trained)

    @property
    def figures(self) -> int:
        return sum(self.released.values())

    def add(self, row: Egress) -> None:
        self.bytes += row.bytes
        self.refusals += row.kind == "refusal"
        if row.kind == "train-report":
            self.trained.add((row.run, row.round))
        if row.figures:
            self.released[row.run] = max(row.figures, self.released.get(row.run, 0))

    def sentence(self) -> str:
        named = f"{self.title} ({self.study[:12]})" if self.title else self.study[:12]
        return (
            f"Study {named}: {_count(self.rounds, 'round')} trained, {_count(self.bytes, 'byte')}, figures of "
            f"{_count(self.figures, 'target')} released, {_count(self.refusals, 'order')} refused."
        )


@dataclass(frozen=True)
class Report:
    """What left, in the order in which it did; totals in order of each study's first line. `lines`: of the whole journal."""

    lines: int
    rows: tuple[Egress, ...]
    totals: tuple[Total, ...]

    def to_json(self) -> dict[str, Any]:
        names = ("study", "title", "rounds", "bytes", "figures", "refusals")
        totals = [{name: getattr(total, name) for name in names} for total in self.totals]
        return {"journal_lines": self.lines, "left": [asdict(row) for row in self.rows], "studies": totals}

    def sentences(self) -> Iterator[str]:
        """One for each study, and one about everything."""
        yield from (total.sentence() for total in self.totals)
        size = sum(row.bytes for row in self.rows)
        yield (
            f"{_count(len(self.rows), 'message')} with {_count(size, 'byte')} of content left this site, by the "
            f"{_count(self.lines, 'line')} of its journal, which are all in place."
        )


def read(home: Path, study: str | None = None) -> Report:
    """What left the site at `home`; with `study`, a digest or its beginning, only what belongs to it.

    The whole chain is checked, whatever is asked for. Raises JournalDamaged for a journal that is not whole, or not a site's.
    """
    path = home / "journal.jsonl"
    rows: list[Egress] = []
    totals: dict[str, Total] = {}
    lines = 0
    announced: dict[tuple[object, ...], Facts] = {}
    for entry in journal.entries(path):
        lines += 1
        try:
            row = Egress.of(_completed(entry, announced))
        except (KeyError, TypeError, ValueError, AttributeError, MessageMalformed):
            raise JournalDamaged(f"{path}, line {lines}: not a line that a site writes") from None
        if row is None or (study is not None and not row.study.startswith(study)):
            continue
        rows.append(row)
        if row.study:
            if row.study not in totals:
                totals[row.study] = Total(row.study, _title(home, row.study))
            totals[row.study].add(row)
    return Report(lines, tuple(rows), tuple(totals.values()))


def _completed(entry: Facts, announced: dict[tuple[object, ...], Facts]) -> Facts:
    """The line, and what was announced about the same update; an announcement is remembered until its report comes."""
    facts = entry["facts"]
    if entry["kind"] not in (RELEASE, "train-report"):
        return entry
    order = tuple(facts.get(name) for name in ("study", "run", "round", "attempt", "sum"))
    if entry["kind"] == RELEASE:
        announced[order] = {key: facts[key] for key in ("norm", "epsilon") if key in facts}
        return entry
    return {**entry, "facts": {**announced.pop(order, {}), **facts}}


def _title(home: Path, study: str) -> str:
    try:
        consent = Consent.open(home, study)
    except IsocenterError:  # a damaged file about a study does not hide what left
        return ""
    return consent.offer.study.title if consent else ""


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
