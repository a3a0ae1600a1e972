"""What a site has spent of its patients' privacy, for ever: append-only, hash-chained, and charged before data is touched.

    reserve    a hold, on the disk before an order's work begins. It is charged from then on, whatever happens
    commit     the work was done and its result may have left. A hold without one stays charged: nobody knows what left
    unbounded  a study without differential privacy trained here; no ε covers it

What a cohort has spent is what its most charged person has: the composition of everything in which this person took part, under
whatever number and in whatever study (privacy.persons).

Every entry's hash covers the hash before it. After an entry is on the disk and before the call returns, its number and hash are
noted in the site's journal, all under a lock that lets in one process at a time. What is found afterwards:

    killed before SQLite's commit      nothing was charged, nothing was done; SQLite takes back what it had half written
    killed between commit and note     the entry holds; whoever opens the ledger next notes it
    ledger missing, changed, cut off   the journal knows an entry that is not there: LedgerDamaged, until it is restored from a
    or put back from an older copy     backup, or rebuilt from the journal and whatever can still be read of it
    journal missing or an older copy   more than one entry is not noted: LedgerDamaged as well, because the journal that is gone
                                       may have known more than this ledger
    both missing, or both put back     cannot be seen from here: keep the journal's head elsewhere (privacy.journal.verify), and
    (a restored machine)               never put back one of these two files without the other
    disk full, read-only, not ours     PrivacyError that says so: nothing is trained, and nothing has to be rebuilt
"""

import fcntl
import hashlib
import json
import math
import os
import sqlite3
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from privacy.accounting import PrivacyEvent
from privacy.disk import flush_folder
from privacy.errors import (
    BudgetExceeded,
    ClockSetBack,
    IsocenterError,
    JournalDamaged,
    LedgerBusy,
    LedgerDamaged,
    PrivacyError,
)
from privacy.journal import Journal, check_facts
from privacy.persons import EVERYBODY, Cohort, Register, digest_of, name_of, within, worst

LABEL = b"isocenter/v1/ledger\n"
VERSION = 1  # SQLite's user_version of the file
BEGINNING = "0" * 64
NOTE = "budget"  # kind of the journal's lines about this ledger
YEAR_S = 365 * 86400
TOLERANCE_S = 60  # that time synchronisation may put a clock back
BUSY_S = 30.0  # an order of the largest legal site is charged in a second or two; whoever waits longer waits for something else
POLL_S = 0.01
SETTLED_S = 1.0  # after a change of a file, until a later one is sure to bear another time
FOUND_MAX = 64  # runs whose notes a process remembers to have found

_SCHEMA = (
    "CREATE TABLE entries (seq INTEGER PRIMARY KEY, body TEXT NOT NULL, hash TEXT NOT NULL)",
    "CREATE TABLE cohorts (name TEXT PRIMARY KEY, patients TEXT NOT NULL)",
    "CREATE TABLE patients (digest TEXT PRIMARY KEY, identities TEXT NOT NULL)",
    *(
        f"CREATE TRIGGER {table}_{act} BEFORE {act} ON {table} BEGIN SELECT RAISE(ABORT, 'append-only'); END"
        for table in ("entries", "cohorts", "patients")
        for act in ("UPDATE", "DELETE")
    ),
    f"PRAGMA user_version = {VERSION}",
)
_NAMING: Mapping[str, type] = {"study": str, "run": str, "attempt": int, "sum": int}
_FACTS: Mapping[str, Mapping[str, type]] = {
    "reserve": {**_NAMING, "cohort": str, "event": dict},
    "commit": {**_NAMING, "hold": int},
    "unbounded": {"study": str, "run": str},
    "clock": {},
    "rebuilt": {"charges": int},
}
_MECHANISM = ("noise_multiplier", "sampling_rate", "steps", "delta_extra", "batch_max", "patients")
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_found: dict[tuple[Path, str, str], tuple[int, ...]] = {}
# What SQLite says when the file may be as good as ever and something around it is not.
_UNUSABLE = {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_AUTH,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_PROTOCOL,
}


@dataclass(frozen=True)
class Caps:
    """Most ε of any patient at `delta`: over all time, of one study, in the last 365 days.

    `orders`: most orders of this study, in whatever run or attempt, that may be charged for the same mechanism: rounds of
    training have one, a noised release of test figures has another.
    """

    total: float
    per_study: float
    per_year: float
    delta: float
    orders: int


@dataclass(frozen=True)
class Charge:
    """One order to train: what it is about, and what it does to the patients."""

    study: str
    run: str
    attempt: int
    sum: int
    event: PrivacyEvent

    @property
    def name(self) -> tuple[str, str, int, int]:
        return (self.study, self.run, self.attempt, self.sum)


@dataclass(frozen=True)
class Spending:
    """ε of the most charged patient: of one study or of all, committed alone (`spent`), and with open holds (`charged`)."""

    spent: float
    charged: float
    rounds: int
    open: int


Patients = Sequence[Set[str]]
"""The identities of each patient of a cohort, as lower-case hex digests; at least one for each."""


class Ledger:
    """The ledger in the file `path`, witnessed by `journal`. Safe for several processes at once: one is in it at a time.

    Every method raises LedgerDamaged, LedgerBusy, JournalDamaged, or PrivacyError when the files cannot be used, and changes
    nothing then.
    """

    def __init__(self, path: Path, journal: Journal) -> None:
        self.path, self.journal = path, journal

    def reserve(self, charge: Charge, patients: Patients, caps: Caps) -> int:
        """A hold for `charge` on `patients`; on the disk, and noted in the journal, when this returns.

        Raises BudgetExceeded if a cap would be exceeded, PrivacyError if this order was charged before, ClockSetBack. Nothing is
        charged then. If only the note in the journal fails, PrivacyError, and the hold stays charged.
        """
        with self._opened() as book:
            self._check_time(book)
            if any(entry.name == charge.name for entry in book.charges):
                raise PrivacyError(f"sum {charge.sum}, attempt {charge.attempt} of run {charge.run} was charged before")
            orders = sum(
                entry.study == charge.study
                and entry.event is not None
                and _mechanism(entry.event) == _mechanism(charge.event)
                for entry in book.charges
            )
            if orders >= caps.orders:
                raise BudgetExceeded(f"{orders} orders of this study were charged, and it has room for {caps.orders}")
            cohort = Cohort.of(patients)
            _check_caps(book.register, book.charges, charge, cohort, caps)
            book.write_down(cohort)
            facts = {"cohort": cohort.name, "event": charge.event.to_json()}
            return book.append("reserve", facts | _naming(charge.name)).seq

    def commit(self, hold: int) -> None:
        """The work of `hold` was done. Raises PrivacyError if there is no such open hold."""
        with self._opened() as book:
            held = [entry for entry in book.charges if entry.seq == hold]
            if not held or hold in book.committed:
                raise PrivacyError(f"there is no open hold {hold}")
            book.append("commit", {"hold": hold} | _naming(held[0].name))

    def unbounded(self, study: str, run: str) -> None:
        """Note, once for each run, that a study without differential privacy trained here.

        It is asked for at each order. Files that are those in which this process found the note last time are not read again.
        """
        name, before = (self.path, study, run), self._stamp()
        if before is not None and _found.get(name) == before:
            return
        with self._opened() as book:
            if (study, run) not in book.unprotected:
                book.append("unbounded", {"study": study, "run": run})
        if before is not None and before == self._stamp():
            _found[name] = before
            for oldest in [*_found][:-FOUND_MAX]:
                del _found[oldest]

    def _stamp(self) -> tuple[int, ...] | None:
        """What changes with every change of the ledger, or when it or the journal is another file.

        None if one is missing, or if the ledger was changed just now: a second change may bear the same time.
        """
        try:
            book, journal = self.path.lstat(), self.journal.path.lstat()
        except OSError:
            return None
        if time.time_ns() - book.st_ctime_ns < SETTLED_S * 1e9:
            return None
        return (
            book.st_dev,
            book.st_ino,
            book.st_mtime_ns,
            book.st_ctime_ns,
            book.st_size,
            journal.st_dev,
            journal.st_ino,
        )

    def accept_clock(self) -> None:
        """Go on from the present time although later entries exist: a person has looked, and it was wrong when they were made.

        They keep their times, so they count as of the last 365 days until a year after the time that they bear. Does nothing
        where no later entry exists.
        """
        with self._opened() as book:
            try:
                self._check_time(book)
            except ClockSetBack:
                book.append("clock", {})

    def check(self, charge: Charge, patients: Patients, caps: Caps) -> None:
        """Raise BudgetExceeded if `charge`, a study with all its orders, would exceed a cap of ε; nothing is kept.

        What was charged for this study before is a part of the whole and not added to it. `caps.orders` is not looked at.
        """
        with self._opened() as book:
            others = [entry for entry in book.charges if entry.study != charge.study]
            _check_caps(book.register, others, charge, Cohort.of(patients), caps)

    def rounds(self, study: str) -> int:
        """How many orders of `study` were charged, in whatever run."""
        with self._opened() as book:
            return sum(entry.study == study for entry in book.charges)

    def spendings(self, delta: float, since: float = 0.0) -> dict[str, Spending]:
        """Study -> what was spent on it, and "total" for all together, counting from `since` on (seconds since 1970)."""
        with self._opened() as book:
            charged, done = [entry for entry in book.charges if entry.time >= since], book.committed
            profiles = book.register.profiles()
        names: list[str | None] = [*dict.fromkeys(entry.study for entry in charged), None]
        found = {}
        for name in names:
            own = [entry for entry in charged if name in (None, entry.study)]
            committed = [entry for entry in own if entry.seq in done]
            found[name or "total"] = Spending(
                worst(_happened(committed), profiles, delta),
                worst(_happened(own), profiles, delta),
                len(own),
                len(own) - len(committed),
            )
        return found

    def timeline(self, delta: float, points: int = 40) -> list[tuple[float, str, float]]:
        """(seconds since 1970, study, ε charged to the most charged patient by then), after the last charge and some before it.

        At most `points`, evenly spread over the charges.
        """
        with self._opened() as book:
            charged = book.charges
            profiles = book.register.profiles()
        shown = sorted({len(charged) * n // points for n in range(1, points + 1)} - {0})
        return [
            (float(charged[n - 1].time), charged[n - 1].study, worst(_happened(charged[:n]), profiles, delta))
            for n in shown
        ]

    def unprotected(self) -> list[tuple[str, str]]:
        """(study, run) of every run without differential privacy."""
        with self._opened() as book:
            return book.unprotected

    def rebuild(self) -> int:
        """Make a damaged ledger anew; the number of charges. Nothing that was charged is forgotten, and the old file is kept.

        A charge that both the old file and the journal know keeps its patients. All others, of the journal alone or of the file
        alone, count for every patient of the site. Raises PrivacyError if the ledger is whole, and LedgerDamaged if nothing is
        left to make it from.
        """
        with _faults_named(self.path), self._alone():
            try:
                with _faults_named(self.path), self._verified():
                    pass
            except LedgerDamaged:
                pass
            else:
                raise PrivacyError(
                    f"{self.path} is whole: there is nothing to rebuild", remedy="Nothing has to be done."
                )
            found = _Remains(self.path, self.journal.lines(NOTE))
            if not found.charges and not found.unprotected:
                raise LedgerDamaged(
                    f"neither {self.path} nor the journal says what was charged here",
                    remedy="Restore ledger.sqlite and journal.jsonl from a backup of one and the same time.",
                )
            fresh = self.path.with_name(f"{self.path.name}.new")
            for leftover in (fresh, fresh.with_name(f"{fresh.name}-journal")):
                leftover.unlink(missing_ok=True)
            _prepare(fresh)
            with _transaction(fresh) as book:
                found.write(book)
                last = book.append("rebuilt", {"charges": len(found.charges)})
            _replace(self.path, fresh)
            self._note(last)
        return len(found.charges)

    def _check_time(self, book: "_Book") -> None:
        accepted = max((entry.seq for entry in book.entries if entry.kind in ("clock", "rebuilt")), default=1)
        last = max((entry.time for entry in book.entries[accepted - 1 :]), default=0)
        if time.time() < last - TOLERANCE_S:
            raise ClockSetBack(
                f"the clock of this machine stands {last - time.time():.0f} s before the last entry of {self.path}",
                remedy="Set the clock of this machine (time synchronisation). If it is right now and was wrong when the last "
                "entries were made, run `fl-client budget --accept-clock`; then start the node again.",
            )

    def _note(self, entry: "_Entry") -> None:
        self.journal.append(NOTE, **entry.note)

    @contextmanager
    def _opened(self) -> Iterator["_Book"]:
        with _faults_named(self.path), self._alone(), self._verified() as book:
            yield book

    @contextmanager
    def _verified(self) -> Iterator["_Book"]:
        """One transaction on a ledger that is whole and that the journal knows; what was added is in both afterwards."""
        noted = self.journal.last(NOTE)
        seq, head = (0, BEGINNING) if noted is None else (noted.get("seq"), noted.get("head"))
        if type(seq) is not int or seq < 0:
            raise JournalDamaged(f"{self.journal.path}: the last line about the budget has no number")
        if seq and not self.path.exists():
            raise LedgerDamaged(f"{self.path} is missing, and the journal knows of {seq} entries")
        _prepare(self.path)
        with _transaction(self.path) as book:
            if seq > len(book.entries) or (seq and book.entries[seq - 1].hash != head):
                raise LedgerDamaged(
                    f"{self.path} is not the one that the journal knows: cut off, or put back from a copy"
                )
            unknown = book.entries[seq:]
            if len(unknown) > 1:
                raise LedgerDamaged(
                    f"the journal does not know the last {len(unknown)} entries of {self.path}: it was removed or put back",
                    remedy="Nothing is trained until they agree: restore journal.jsonl from the backup that belongs to this "
                    "ledger, or run `fl-client budget --rebuild`, which then charges all patients of this site for what the "
                    "journal does not know.",
                )
            for entry in unknown:
                self._note(entry)
            yield book
            for entry in book.added:
                check_facts(NOTE, entry.note)  # what cannot be noted must not be committed either
        for entry in book.added:
            self._note(entry)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process or thread is in the ledger. SQLite's own lock ends with its commit, and the note comes after it."""
        path = self.path.with_name(f"{self.path.name}.lock")
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            end = time.monotonic() + BUSY_S
            while not _locked(lock):
                if time.monotonic() > end:
                    raise LedgerBusy(f"{self.path} is held by another process")
                time.sleep(POLL_S)
            yield
        finally:
            # Closing alone would not give it back while a process forked meanwhile has the descriptor too.
            fcntl.flock(lock, fcntl.LOCK_UN)
            os.close(lock)


@dataclass(frozen=True)
class _Entry:
    """One line of the ledger, read."""

    seq: int
    hash: str
    kind: str
    time: int
    facts: dict[str, Any]
    event: PrivacyEvent | None

    @classmethod
    def read(cls, seq: int, body: object, previous: str) -> "_Entry":
        """Raises LedgerDamaged if `body` is not what `_Book.append` writes."""
        try:
            if not isinstance(body, str):
                raise TypeError
            facts = json.loads(body)
            kind, at = facts.pop("kind"), facts.pop("time")
            types = _FACTS[kind]
            if facts.keys() != types.keys() or any(type(facts[name]) is not kept for name, kept in types.items()):
                raise TypeError
            event = PrivacyEvent.from_json(facts["event"]) if kind == "reserve" else None
            own = hashlib.sha256(LABEL + f"{seq} {previous} {body}".encode()).hexdigest()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, IsocenterError):
            raise LedgerDamaged(f"entry {seq} of the ledger cannot be read") from None
        if type(at) is not int:
            raise LedgerDamaged(f"entry {seq} of the ledger has no time")
        return cls(seq, own, kind, at, facts, event)

    @property
    def name(self) -> tuple[Any, ...]:
        return tuple(self.facts[key] for key in _NAMING)

    @property
    def study(self) -> str:
        return str(self.facts["study"])

    @property
    def cohort(self) -> str:
        return str(self.facts["cohort"])

    @property
    def note(self) -> dict[str, Any]:
        """What the journal is told: enough to charge everybody with it when the ledger is lost, and nothing about patients."""
        told = {"entry": self.kind, "seq": self.seq, "head": self.hash, "time": self.time}
        told |= {key: value for key, value in self.facts.items() if key in _NAMING}
        if self.event is not None:
            mechanism = {key: getattr(self.event, key) for key in _MECHANISM}
            told |= {key: value for key, value in mechanism.items() if value is not None}
        return told


class _Book:
    """The ledger in one transaction: every entry with the whole chain checked, everybody in it, and what is being added."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self.entries: list[_Entry] = []
        self.added: list[_Entry] = []
        self.register = Register()
        previous = BEGINNING
        for seq, body, own in connection.execute("SELECT seq, body, hash FROM entries ORDER BY seq"):
            entry = _Entry.read(seq, body, previous)
            if seq != len(self.entries) + 1 or own != entry.hash:
                raise LedgerDamaged(f"entry {len(self.entries) + 1} of the ledger was changed, removed or moved")
            self.entries.append(entry)
            previous = own
        _load(self.register, connection, {entry.cohort for entry in self.charges})

    @property
    def charges(self) -> list[_Entry]:
        return [entry for entry in self.entries if entry.kind == "reserve"]

    @property
    def committed(self) -> set[int]:
        return {entry.facts["hold"] for entry in self.entries if entry.kind == "commit"}

    @property
    def unprotected(self) -> list[tuple[str, str]]:
        return [(entry.study, entry.facts["run"]) for entry in self.entries if entry.kind == "unbounded"]

    def write_down(self, cohort: Cohort) -> None:
        """Keep who is in `cohort`; what is there already is not written twice."""
        rows = [(digest, " ".join(cohort.identities[digest])) for digest in set(cohort.digests)]
        self._connection.executemany("INSERT OR IGNORE INTO patients VALUES (?, ?)", rows)
        self._connection.execute("INSERT OR IGNORE INTO cohorts VALUES (?, ?)", (cohort.name, " ".join(cohort.digests)))

    def append(self, kind: str, facts: Mapping[str, Any], at: int | None = None) -> _Entry:
        """One more entry, of now or of the time `at`."""
        seq, previous = len(self.entries) + 1, self.entries[-1].hash if self.entries else BEGINNING
        whole = {"kind": kind, "time": int(time.time()) if at is None else at, **facts}
        body = json.dumps(whole, sort_keys=True, separators=(",", ":"))
        entry = _Entry.read(seq, body, previous)
        self._connection.execute("INSERT INTO entries VALUES (?, ?, ?)", (seq, body, entry.hash))
        self.entries.append(entry)
        self.added.append(entry)
        return entry


def _load(register: Register, connection: sqlite3.Connection, cohorts: Set[str]) -> None:
    """Add `cohorts` to `register`; raises LedgerDamaged if one is not there as it was written down, with all its patients."""
    patients = dict(connection.execute("SELECT digest, identities FROM patients"))
    for name in cohorts - {EVERYBODY}:
        row = connection.execute("SELECT patients FROM cohorts WHERE name = ?", (name,)).fetchone()
        digests = tuple(str(row[0]).split(" ")) if row else ()
        if name_of(digests) != name:
            raise LedgerDamaged(f"the patients of the cohort {name[:12]} in the ledger are missing or were changed")
        for digest in digests:
            if digest not in register.identities:
                identities = tuple(str(patients.get(digest, "")).split(" "))
                if digest_of(identities) != digest:
                    raise LedgerDamaged(f"a patient of the cohort {name[:12]} in the ledger is missing or was changed")
                register.identities[digest] = identities
        register.cohorts[name] = Cohort(name, digests, register.identities)


class _Remains:
    """What a damaged ledger and the journal still know together of charges and of runs without differential privacy."""

    def __init__(self, path: Path, notes: Sequence[dict[str, Any]]) -> None:
        self.charges: dict[tuple[Any, ...], tuple[int, str, PrivacyEvent]] = {}
        self.committed: set[tuple[Any, ...]] = set()
        self.unprotected: dict[tuple[Any, ...], int] = {}
        self._register = Register()
        try:
            noted = {(note["seq"], note["head"]) for note in notes}
            for note in notes:
                self._take_note(note)
        except (KeyError, TypeError, PrivacyError):
            raise JournalDamaged("a line of the journal about the budget cannot be read") from None
        if path.exists():
            with suppress(sqlite3.Error), closing(sqlite3.connect(path, timeout=BUSY_S)) as connection:
                self._take_file(connection, noted)

    def _take_note(self, note: dict[str, Any]) -> None:
        kind, at = note["entry"], note["time"]
        name = tuple(note[key] for key in _FACTS[kind] if key in _NAMING)
        if kind == "reserve":
            event = PrivacyEvent(**{key: note[key] for key in _MECHANISM if key in note})
            self.charges.setdefault(name, (at, EVERYBODY, event))
        elif kind == "commit":
            self.committed.add(name)
        elif kind == "unbounded":
            self.unprotected.setdefault(name, at)

    def _take_file(self, connection: sqlite3.Connection, noted: Set[tuple[int, str]]) -> None:
        previous = BEGINNING
        for seq, body, own in connection.execute("SELECT seq, body, hash FROM entries ORDER BY seq"):
            with suppress(LedgerDamaged):
                self._take_entry(connection, _Entry.read(seq, body, previous), noted)
            previous = own

    def _take_entry(self, connection: sqlite3.Connection, entry: _Entry, noted: Set[tuple[int, str]]) -> None:
        """The journal has the hash of the whole entry, its cohort's name included, and that is a hash of the patients."""
        vouched = (entry.seq, entry.hash) in noted
        if entry.event is not None:
            self.charges.setdefault(entry.name, (entry.time, EVERYBODY, entry.event))
            if vouched:
                with suppress(LedgerDamaged, sqlite3.Error):
                    if entry.cohort not in self._register.cohorts:
                        _load(self._register, connection, {entry.cohort})
                    self.charges[entry.name] = (entry.time, entry.cohort, entry.event)
        elif entry.kind == "commit" and vouched:
            self.committed.add(entry.name)
        elif entry.kind == "unbounded":
            self.unprotected.setdefault((entry.study, entry.facts["run"]), entry.time)

    def write(self, book: _Book) -> None:
        """All of it as entries, in the order of time, with the times that they had."""
        for name, (at, cohort, event) in sorted(self.charges.items(), key=lambda item: item[1][0]):
            if cohort != EVERYBODY:
                book.write_down(self._register.cohorts[cohort])
            facts = {"cohort": cohort, "event": event.to_json()}
            hold = book.append("reserve", facts | _naming(name), at).seq
            if name in self.committed:
                book.append("commit", {"hold": hold} | _naming(name), at)
        for (study, run), at in self.unprotected.items():
            book.append("unbounded", {"study": study, "run": run}, at)


def _check_caps(register: Register, charged: list[_Entry], charge: Charge, cohort: Cohort, caps: Caps) -> None:
    """Raise BudgetExceeded if `charge` on `cohort`, after what was `charged` already, exceeds a cap of ε for anybody in it."""
    register.add(cohort)
    profiles = register.profiles(cohort.name)
    asked = (cohort.name, charge.event)
    for name, cap, before in (
        ("over all time", caps.total, charged),
        ("of this study", caps.per_study, [entry for entry in charged if entry.study == charge.study]),
        ("in the last 365 days", caps.per_year, [entry for entry in charged if entry.time > time.time() - YEAR_S]),
    ):
        happened = _happened(before)
        if not within(cap, [*happened, asked], profiles, caps.delta):
            spent, after = (_shown(worst(all_, profiles, caps.delta)) for all_ in (happened, [*happened, asked]))
            sentence = f"ε {name} would be {after} at δ = {caps.delta:g}, and site.yaml permits {cap:g}; {spent} is spent or held"
            if any((cohort.name, 2) in profile for profile in profiles):
                sentence += (
                    ". Some patients of the cohort are one person by their numbers or images: give them one number"
                )
            raise BudgetExceeded(sentence)


def _mechanism(event: PrivacyEvent) -> tuple[float, float]:
    return (event.noise_multiplier, event.sampling_rate)


def _naming(name: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(_NAMING, name, strict=True))


def _happened(entries: Iterable[_Entry]) -> list[tuple[str, PrivacyEvent]]:
    return [(entry.cohort, entry.event) for entry in entries if entry.event is not None]


def _shown(epsilon: float) -> str:
    return f"{math.ceil(epsilon * 100) / 100:.2f}" if math.isfinite(epsilon) else "∞"


def _locked(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _prepare(path: Path) -> None:
    """A file at `path` that is ours alone (mode 0600): made, or found and closed to others. Raises PrivacyError for a link."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        flush_folder(path.parent)
        return
    if not stat.S_ISREG(mode):
        raise PrivacyError(f"{path} is a link or a folder", remedy="Put the file of the ledger itself in that place.")
    if mode & 0o077:
        path.chmod(mode & 0o700)


@contextmanager
def _transaction(path: Path) -> Iterator[_Book]:
    with closing(sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")  # one file to back up, whatever another tool has set
        connection.execute("PRAGMA synchronous = EXTRA")  # the folder too: no power failure takes a commit back
        connection.execute("BEGIN IMMEDIATE")
        try:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                for statement in _SCHEMA:
                    connection.execute(statement)
            elif version != VERSION:
                raise PrivacyError(
                    f"{path} has version {version}, and this Isocenter writes version {VERSION}",
                    remedy="Use the version of Isocenter that wrote it, or a later one.",
                )
            yield _Book(connection)
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")


def _replace(path: Path, fresh: Path) -> None:
    """Put `fresh` in the place of `path`, which is kept under another name with all that SQLite left beside it."""
    aside = f"{path.name}.damaged-{time.time_ns()}"
    if path.exists():
        os.link(path, path.with_name(aside))
    for suffix in ("-journal", "-wal", "-shm"):
        # SQLite would take it for the new file's own and undo what is in there.
        beside = path.with_name(path.name + suffix)
        if beside.exists():
            beside.rename(path.with_name(aside + suffix))
    fresh.replace(path)
    flush_folder(path.parent)


@contextmanager
def _faults_named(path: Path) -> Iterator[None]:
    """Turns what SQLite and the system say into errors that tell a person whether the ledger is damaged or only out of reach."""
    remedy = "Nothing was trained. Look at the space, the mount and the owner of this site's folder, then start the node again."
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF  # without the extended part
        if code in _BUSY:
            raise LedgerBusy(f"{path} is held by another process") from None
        if code in _UNUSABLE:
            raise PrivacyError(f"{path} cannot be used: {error}", remedy=remedy) from None
        raise LedgerDamaged(f"{path} cannot be read: {error}") from None
    except OSError as error:
        raise PrivacyError(f"{path} or the journal cannot be used: {error}", remedy=remedy) from None
