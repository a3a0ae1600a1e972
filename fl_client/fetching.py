"""Studies come out of an archive into the landing folder: each image once, at the archive's pace, and a kill loses nothing.

    HOME/fetch.sqlite                  the plan: which studies are wanted, here, or failed and why (0600)
    HOME/private/not-found.txt         accession numbers that the archive does not know (0600)

A study is done only after every image that the archive lists lies in the landing folder (`fl_client.landing`). So a second run
asks for what is missing, and for nothing else.
"""

import datetime as dt
import hashlib
import json
import os
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from fl_client.archive import (
    DAYS_MAX,
    UID,
    Accessions,
    Archive,
    Dicomweb,
    Dimse,
    Found,
    Instance,
    NotFetched,
    Question,
    Reason,
    Select,
)
from fl_client.landing import Landing
from privacy import disk, keys
from privacy.errors import DataError

ASKED = b"isocenter/v1/asked"
BACKOFF_S = (30.0, 120.0, 600.0)  # before the second, third and fourth try of a study
WAIT_MOST_S = 3600.0  # of what an archive asks for with Retry-After
SILENT_MOST = 5  # studies in a row that got no answer: then it is the archive, not the studies
ANSWERS_MAX = 200_000  # studies in the answer to one question
KNOWN_S = 12 * 3600.0  # for so long a question need not be asked again: a run that was killed goes on where it stopped


class Stop(StrEnum):
    """Why a fetch ended."""

    DONE = "done"
    HOURS = "hours"
    STUDIES = "studies"
    BYTES = "bytes"
    DISK = "disk"
    ARCHIVE = "archive"
    INTERRUPTED = "interrupted"

    @property
    def sentence(self) -> str:
        return _STOPS[self]


_STOPS = {
    Stop.DONE: "Everything that was selected was asked for.",
    Stop.HOURS: "The archive may not be asked at this hour (data.archive.hours); run it again then, or with --wait.",
    Stop.STUDIES: "This run copied as many studies as studies_per_run allows; run it again for more.",
    Stop.BYTES: "This run copied as much as gigabytes_per_run allows; run it again for more.",
    Stop.DISK: "The disk would have less free space than gigabytes_free; make room, then run it again.",
    Stop.ARCHIVE: "The archive cannot be used at the moment, so no other study was tried.",
    Stop.INTERRUPTED: "Stopped. Nothing is half written; run it again and it goes on here.",
}


# The plan ------------------------------------------------------------------------------------------------------------

_SCHEMA = """
CREATE TABLE IF NOT EXISTS study (
    uid TEXT PRIMARY KEY, selection TEXT NOT NULL, accession TEXT NOT NULL, modalities TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('wanted', 'done', 'failed')),
    reason TEXT NOT NULL DEFAULT '', attempts INTEGER NOT NULL DEFAULT 0, due_s REAL NOT NULL DEFAULT 0,
    instances INTEGER NOT NULL DEFAULT 0) STRICT;
CREATE TABLE IF NOT EXISTS question (
    key TEXT PRIMARY KEY, selection TEXT NOT NULL, asked_s REAL NOT NULL, accession TEXT NOT NULL,
    found INTEGER NOT NULL) STRICT;
PRAGMA user_version = 1;
"""
VERSION = 1  # as above


@dataclass(frozen=True)
class Wanted:
    """A study that is to be copied, and how often that was tried."""

    uid: str
    attempts: int


@dataclass(frozen=True)
class Counts:
    """How far a selection has come. `failed` by reason; `numbers`: accession numbers asked and those that nothing answers to."""

    wanted: int
    done: int
    failed: dict[Reason, int]
    instances: int
    numbers: tuple[int, int]


class Plan:
    """Which studies a selection asks for and what became of them; every change is durable when the call returns."""

    def __init__(self, memory: sqlite3.Connection, selection: str) -> None:
        self._memory, self.selection = memory, selection

    @staticmethod
    def path(home: Path) -> Path:
        return home / "fetch.sqlite"

    @classmethod
    @contextmanager
    def open(cls, path: Path | None, selection: str) -> Iterator["Plan"]:
        """The plan in `path`; None: one that is forgotten. Raises DataError if the file is damaged."""
        if path is not None:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
            path.chmod(0o600)
        with closing(sqlite3.connect(path or ":memory:", timeout=30, isolation_level=None)) as memory, _named(path):
            memory.execute("PRAGMA synchronous = EXTRA")  # the folder too
            disk.require_known(path or Path(), memory.execute("PRAGMA user_version").fetchone()[0], VERSION)
            memory.executescript(_SCHEMA)
            yield cls(memory, selection)

    @classmethod
    @contextmanager
    def read(cls, path: Path, selection: str) -> Iterator["Plan | None"]:
        """The plan, which cannot be changed through this; None if nothing was fetched yet."""
        if not path.is_file():
            yield None
            return
        address = f"{path.resolve().as_uri()}?mode=ro"
        with closing(sqlite3.connect(address, uri=True, timeout=30)) as memory, _named(path):
            yield cls(memory, selection)

    def knows(self, question: Question, now_s: float) -> bool:
        """Whether `question` was answered lately. A number that nothing answered to is not asked again so soon either."""
        row = self._memory.execute("SELECT asked_s FROM question WHERE key = ?", (self._key(question),)).fetchone()
        return row is not None and 0 <= now_s - row[0] < KNOWN_S

    def _key(self, question: Question) -> str:
        told = json.dumps([self.selection, *vars(question).values()])
        return hashlib.sha256(ASKED + b"\n" + told.encode()).hexdigest()

    def answer(self, question: Question, found: list[Found], now_s: float) -> None:
        """Write down which studies answer `question`. All of it or nothing."""
        with self._whole() as memory:
            for study in found:
                memory.execute(
                    "INSERT INTO study (uid, selection, accession, modalities, state) VALUES (?, ?, ?, ?, 'wanted') "
                    # A selection that was changed may ask for other series of a study: what is here is not asked for again.
                    "ON CONFLICT (uid) DO UPDATE SET selection = excluded.selection, accession = excluded.accession, "
                    "modalities = excluded.modalities, state = 'wanted', reason = '', attempts = 0, due_s = 0 "
                    "WHERE selection != excluded.selection",
                    (study.uid, self.selection, study.accession, "/".join(study.modalities)),
                )
            memory.execute(
                "INSERT OR REPLACE INTO question VALUES (?, ?, ?, ?, ?)",
                (self._key(question), self.selection, now_s, question.accession, len(found)),
            )

    def withdraw(self, numbers: tuple[str, ...]) -> None:
        """Want nothing any more whose accession number is not in `numbers`: a person may have taken it off the list."""
        with self._whole() as memory:
            memory.execute("CREATE TEMP TABLE listed (accession TEXT PRIMARY KEY)")
            memory.executemany("INSERT OR IGNORE INTO listed VALUES (?)", ((number,) for number in numbers))
            other = "accession NOT IN (SELECT accession FROM listed)"
            memory.execute(f"DELETE FROM study WHERE state != 'done' AND {other}")  # noqa: S608  no part of it is data
            memory.execute(f"DELETE FROM question WHERE {other}")  # noqa: S608
            memory.execute("DROP TABLE listed")

    @contextmanager
    def _whole(self) -> Iterator[sqlite3.Connection]:
        self._memory.execute("BEGIN IMMEDIATE")
        try:
            yield self._memory
        except BaseException:
            self._memory.execute("ROLLBACK")
            raise
        self._memory.execute("COMMIT")

    def next(self, now_s: float) -> Wanted | None:
        """The study whose turn it is: those not tried yet first."""
        row = self._memory.execute(
            "SELECT uid, attempts FROM study WHERE state = 'wanted' AND selection = ? AND due_s <= ? "
            "ORDER BY attempts, rowid LIMIT 1",
            (self.selection, now_s),
        ).fetchone()
        return None if row is None else Wanted(*row)

    def next_due_s(self) -> float | None:
        """When a study that failed may be tried again; None if there is none."""
        (due,) = self._memory.execute(
            "SELECT min(due_s) FROM study WHERE state = 'wanted' AND selection = ?", (self.selection,)
        ).fetchone()
        return None if due is None else float(due)

    def done(self, uid: str, instances: int) -> None:
        self._memory.execute(
            "UPDATE study SET state = 'done', reason = '', instances = ? WHERE uid = ?", (instances, uid)
        )

    def failed(self, wanted: Wanted, reason: Reason, due_s: float | None) -> None:
        """`due_s`: when it is tried again; None: never."""
        state, due = ("failed", 0.0) if due_s is None else ("wanted", due_s)
        self._memory.execute(
            "UPDATE study SET state = ?, reason = ?, attempts = ?, due_s = ? WHERE uid = ?",
            (state, str(reason), wanted.attempts + 1, due, wanted.uid),
        )

    def try_now(self, *, failed: bool) -> None:
        """Nothing waits for its turn in a run that begins; `failed`: studies that were given up are wanted again too."""
        states = "('wanted', 'failed')" if failed else "('wanted')"
        self._memory.execute(
            f"UPDATE study SET state = 'wanted', attempts = 0, due_s = 0 WHERE selection = ? AND state IN {states}",  # noqa: S608
            (self.selection,),
        )

    def counts(self) -> Counts:
        rows = self._memory.execute(
            "SELECT state, reason, count(*), sum(instances) FROM study WHERE selection = ? GROUP BY state, reason",
            (self.selection,),
        ).fetchall()
        asked, missing = self._memory.execute(
            "SELECT count(*), count(*) FILTER (WHERE found = 0) FROM question WHERE selection = ? AND accession != ''",
            (self.selection,),
        ).fetchone()
        states = Counter[str]()
        for state, _, count, _ in rows:
            states[state] += count
        failed = {Reason(why): count for state, why, count, _ in rows if state == "failed"}
        return Counts(states["wanted"], states["done"], failed, sum(row[3] for row in rows), (asked, missing))

    def by_modality(self) -> dict[str, int]:
        """Number of studies for each combination of modalities in a study, such as "CR" or "CR/SR"."""
        rows = self._memory.execute(
            "SELECT modalities, count(*) FROM study WHERE selection = ? GROUP BY modalities", (self.selection,)
        )
        return {words or "not said": count for words, count in rows}

    def not_found(self) -> list[str]:
        rows = self._memory.execute(
            "SELECT accession FROM question WHERE selection = ? AND accession != '' AND found = 0 ORDER BY accession",
            (self.selection,),
        )
        return [row[0] for row in rows]


@contextmanager
def _named(path: Path | None) -> Iterator[None]:
    try:
        yield
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError):
            raise OSError(None, f"the plan cannot be written ({error})", str(path)) from None
        raise DataError(
            f"{path} is damaged ({type(error).__name__})",
            remedy="Move it away; what was copied stays, and is not asked for again.",
        ) from None


# One run -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clock:
    """The time, so that tests need not wait for it."""

    now_s: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep

    def local(self) -> dt.datetime:
        return dt.datetime.fromtimestamp(self.now_s())


@dataclass(frozen=True)
class Progress:
    """Where a run is. `stage` is "asking the archive" (of questions) or "copying studies" (of studies)."""

    stage: str
    done: int
    total: int
    images: int = 0
    received: int = 0
    seconds: float = 0


@dataclass(frozen=True)
class Choice:
    """What a person asked of one run."""

    only_ask: bool = False
    ask_again: bool = False
    retry_failed: bool = False
    wait: bool = False


@dataclass(frozen=True)
class Result:
    """What one run did, and how far the selection has come. `problem`: why the archive could not be used."""

    stop: Stop
    counts: Counts
    by_modality: dict[str, int]
    malformed_numbers: int
    foreign_answers: int
    studies: int
    images: int
    received: int
    seconds: float
    problem: Reason | None = None
    not_found_file: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """Counts and words for `--json`; no accession number, no UID."""
        return {
            "stop": str(self.stop),
            "problem": str(self.problem) if self.problem else None,
            **counts_json(self.counts),
            "by_modality": self.by_modality,
            "malformed_numbers": self.malformed_numbers,
            "foreign_answers": self.foreign_answers,
            "now": {
                "studies": self.studies,
                "images": self.images,
                "bytes": self.received,
                "seconds": round(self.seconds, 2),
            },
            "not_found_file": str(self.not_found_file) if self.not_found_file else None,
        }


def counts_json(counts: Counts) -> dict[str, Any]:
    failed = {str(reason): count for reason, count in sorted(counts.failed.items(), key=lambda item: -item[1])}
    told = {"wanted": counts.wanted, "done": counts.done, "failed": failed, "images": counts.instances}
    return told | {"numbers_asked": counts.numbers[0], "numbers_not_found": counts.numbers[1]}


@dataclass
class Run:
    """One fetch: ask, then copy. `home` is the site's folder, from which relative paths start."""

    settings: Dicomweb | Dimse
    home: Path
    folder: Path
    archive: Archive
    choice: Choice = Choice()
    clock: Clock = Clock()
    progress: Callable[[Progress], None] = lambda progress: None
    _images: int = 0
    _studies: int = 0
    _foreign: int = 0
    _silent: int = 0
    _not_before_s: float = 0
    _problem: Reason | None = None
    _landing: Landing = field(init=False)

    def __post_init__(self) -> None:
        self._landing = Landing(self.folder)

    def fetch(self) -> Result:
        """Raises DataError for the list of numbers and OSError for the disk; what the archive does stands in the result."""
        began, select = self.clock.now_s(), self.settings.select
        numbers = Accessions((), 0)
        if select.accession_numbers is not None:
            numbers = Accessions.read(self.home / select.accession_numbers, select.column)
        path = None if self.choice.only_ask else Plan.path(self.home)
        with Plan.open(path, selection_of(select)) as plan:
            plan.try_now(failed=self.choice.retry_failed)
            if select.accession_numbers is not None:
                plan.withdraw(numbers.numbers)
            stop = self._all(plan, numbers)
            missing = plan.not_found()
            return Result(
                stop=stop,
                counts=plan.counts(),
                by_modality=plan.by_modality(),
                malformed_numbers=numbers.malformed,
                foreign_answers=self._foreign,
                studies=self._studies,
                images=self._images,
                received=self._landing.received,
                seconds=self.clock.now_s() - began,
                problem=self._problem,
                not_found_file=self._note_missing(missing),
            )

    def _all(self, plan: Plan, numbers: Accessions) -> Stop:
        try:
            stop = self._ask(plan, numbers)
            if stop is not Stop.DONE or self.choice.only_ask:
                return stop
            with self._landing.open():
                return self._copy(plan)
        except KeyboardInterrupt:  # a person; what is on the disk is whole at any instant
            return Stop.INTERRUPTED

    def _note_missing(self, numbers: list[str]) -> Path | None:
        """Accession numbers belong to patients: they stand in a private file, and a count is all that is said."""
        if not numbers:
            return None
        path = self.home / "private" / "not-found.txt"
        keys.write_private(path, "".join(f"{number}\n" for number in numbers).encode())
        return path

    # Asking

    def _ask(self, plan: Plan, numbers: Accessions) -> Stop:
        questions = questions_of(
            self.settings.select, numbers.numbers, self.clock.local().date(), self.archive.days_at_once
        )
        for done, question in enumerate(questions):
            self.progress(Progress("asking the archive", done, len(questions)))
            if not self.choice.ask_again and plan.knows(question, self.clock.now_s()):
                continue
            for attempt in range(len(BACKOFF_S) + 1):
                if not self._within_hours():
                    return Stop.HOURS
                try:
                    found = self._answers(question)
                    break
                except NotFetched as failure:
                    self._problem = failure.reason
                    if not failure.reason.passing or attempt == len(BACKOFF_S) or self.choice.only_ask:
                        return Stop.ARCHIVE
                    self.clock.sleep(max(BACKOFF_S[attempt] / 10, min(failure.wait_s, WAIT_MOST_S)))
            self._problem = None
            plan.answer(question, found, self.clock.now_s())
        self.progress(Progress("asking the archive", len(questions), len(questions)))
        return Stop.DONE

    def _answers(self, question: Question) -> list[Found]:
        """Studies that answer `question` in truth, whatever the archive takes for an answer."""
        found: dict[str, Found] = {}
        for number, study in enumerate(self.archive.studies(question)):
            if number >= ANSWERS_MAX:
                raise NotFetched(Reason.TOO_MANY)
            if answers(study, question, self.settings.select):
                found[study.uid] = study
            else:
                self._foreign += 1
        return list(found.values())

    # Copying

    def _copy(self, plan: Plan) -> Stop:
        next_s, began = 0.0, self.clock.now_s()
        while True:
            if (stop := self._limit()) is not None:
                return stop
            wanted = plan.next(self.clock.now_s())
            if wanted is None:
                due = plan.next_due_s()
                if due is None:
                    return Stop.DONE
                next_s = max(next_s, due)
            counts = plan.counts()
            here = counts.done + sum(counts.failed.values())
            passed, images, received = self.clock.now_s() - began, self._images, self._landing.received
            self.progress(Progress("copying studies", here, here + counts.wanted, images, received, passed))
            if (wait := max(next_s, self._not_before_s) - self.clock.now_s()) > 0:
                self.clock.sleep(min(wait, 60))
                continue
            if wanted is not None:
                next_s = self.clock.now_s() + 60 / self.settings.per_minute
                if not self._one(plan, wanted):
                    return Stop.ARCHIVE
                next_s = max(next_s, self.clock.now_s() + self.settings.pause_s)

    def _limit(self) -> Stop | None:
        """Why no further study may be begun now."""
        settings = self.settings
        if not self._within_hours():
            return Stop.HOURS
        if self._studies >= settings.studies_per_run:
            return Stop.STUDIES
        if self._landing.received >= settings.gigabytes_per_run * 2**30:
            return Stop.BYTES
        if self._landing.free_bytes < settings.gigabytes_free * 2**30:
            return Stop.DISK
        return None

    def _within_hours(self) -> bool:
        """Whether the archive may be asked now; with --wait it returns when it may."""
        while not self.settings.hours.permit(self.clock.local()):
            if not self.choice.wait:
                return False
            self.clock.sleep(30)
        return True

    def _one(self, plan: Plan, wanted: Wanted) -> bool:
        """Copy one study; whether another may be tried."""
        try:
            images = self._study(wanted.uid)
        except NotFetched as failure:
            return self._note_failure(plan, wanted, failure)
        self._silent, self._problem = 0, None
        self._studies += 1
        plan.done(wanted.uid, images)
        return True

    def _note_failure(self, plan: Plan, wanted: Wanted, failure: NotFetched) -> bool:
        now, reason = self.clock.now_s(), failure.reason
        self._silent = self._silent + 1 if reason in (Reason.UNREACHABLE, Reason.TIMEOUT, Reason.BUSY) else 0
        if failure.wait_s:
            self._not_before_s = now + min(failure.wait_s, WAIT_MOST_S)
        if reason.stops or self._silent >= SILENT_MOST:  # the study is not to blame, and stays wanted
            self._problem = reason
            return False
        again = reason.passing and wanted.attempts < len(BACKOFF_S)
        due = max(now + BACKOFF_S[wanted.attempts], self._not_before_s) if again else None
        plan.failed(wanted, reason, due)
        return True

    def _study(self, uid: str) -> int:
        """Copy what is not here yet of one study; number of its images. Raises NotFetched."""
        listed = self.archive.instances(uid, tuple(self.settings.select.modalities))
        if not listed:
            raise NotFetched(Reason.NO_IMAGES)
        missing = [instance for instance in listed if not self._landing.has(uid, instance.uid)]

        def keep(instance: Instance, pieces: Iterator[bytes]) -> None:
            self._landing.keep(uid, instance.uid, pieces)
            self._images += 1

        if missing:
            self.archive.fetch(uid, missing, keep)
        if not all(self._landing.has(uid, instance.uid) for instance in missing):
            raise NotFetched(Reason.INCOMPLETE)
        return len(listed)


def selection_of(select: Select) -> str:
    """A digest of what is selected: another selection is another plan in the same file."""
    return keys.digest(json.dumps(select.model_dump(exclude={"accession_numbers", "column"}), sort_keys=True).encode())


def questions_of(select: Select, numbers: tuple[str, ...], today: dt.date, days_at_once: int) -> list[Question]:
    """One question for each accession number; without numbers, one for each span of days and each modality."""
    first = select.first_day or ""
    last = (select.last_day or today.isoformat()) if first else ""
    if select.accession_numbers is not None:
        return [Question(number, first, last) for number in numbers]
    begin, end = dt.date.fromisoformat(first), dt.date.fromisoformat(last)
    if (end - begin).days > DAYS_MAX:
        raise DataError(f"from {first} to {last} are more than {DAYS_MAX} days", remedy="Correct first_day.")
    spans = [begin + dt.timedelta(days) for days in range(0, (end - begin).days + 1, days_at_once)]
    return [
        Question("", day.isoformat(), min(end, day + dt.timedelta(days_at_once - 1)).isoformat(), modality)
        for day in spans
        for modality in select.modalities or [""]
    ]


def answers(study: Found, question: Question, select: Select) -> bool:
    """Whether `study` is what was asked for: archives may ignore keys, and a hostile one may answer anything."""
    if not UID.fullmatch(study.uid):
        return False
    if question.accession and study.accession != question.accession:
        return False
    day = f"{study.day[:4]}-{study.day[4:6]}-{study.day[6:8]}" if study.day else ""
    if question.first_day and not question.first_day <= day <= question.last_day:
        return False
    if select.modalities and study.modalities and not set(select.modalities) & set(study.modalities):
        return False
    words = study.description.casefold()
    return not select.description_words or any(word.casefold() in words for word in select.description_words)
