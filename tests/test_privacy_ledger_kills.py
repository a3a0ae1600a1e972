"""The ledger under kill -9 at every step that reaches the disk, and under two processes at once.

A child process is killed for real (SIGKILL to itself) before and after each statement of SQLite, each write and flush of the
journal and each change of a folder. Afterwards nothing that was promised is lost, nothing is counted twice, and the ledger opens.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from ledger_cast import (
    DELTA,
    EVENT,
    OTHER,
    WIDE,
    charged,
    entries,
    epsilon_of,
    forge,
    kept,
    opened,
    order,
    patients,
    study,
)

from privacy.errors import LedgerDamaged, PrivacyError
from privacy.journal import verify
from privacy.ledger import Ledger

_FORK = multiprocessing.get_context("fork")


class Killed(sqlite3.Connection):
    """A connection in which every statement is a place to die, before it and after it."""

    step: Callable[[], None]

    def execute(self, *statement: Any) -> sqlite3.Cursor:
        Killed.step()
        found = super().execute(*statement)
        Killed.step()
        return found

    def executemany(self, *statement: Any) -> sqlite3.Cursor:
        Killed.step()
        return super().executemany(*statement)

    def close(self) -> None:
        Killed.step()
        super().close()


def run_until(home: Path, work: Callable[[Ledger, Callable[[str], None]], None], step: int) -> tuple[list[str], bool]:
    """What `work` said in a child that is killed at its `step`-th place to die; and whether it came to its end before."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            left = [step]

            def place() -> None:
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

            def watched(act: Callable[..., Any]) -> Callable[..., Any]:
                def both(*values: Any, **named: Any) -> Any:
                    place()
                    found = act(*values, **named)
                    place()
                    return found

                return both

            Killed.step = staticmethod(place)
            real = sqlite3.connect
            sqlite3.connect = lambda *about, **how: real(*about, **how, factory=Killed)  # type: ignore[assignment]
            for name in ("pwrite", "fsync", "link", "replace", "rename", "unlink", "ftruncate"):
                setattr(os, name, watched(getattr(os, name)))
            work(opened(home), lambda word: os.write(writing, f"{word}\n".encode()) and None)
            os.write(writing, b"end\n")
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as said:
        words = said.read().split()
    os.waitpid(child, 0)
    return [word for word in words if word != "end"], "end" in words


def every_step(home: Path, work: Callable[[Ledger, Callable[[str], None]], None], tmp_path: Path) -> Any:
    """Yields (what was said, a copy of `home` in which a child died) for each place to die in `work`, at least twenty."""
    for step in range(1000):
        copy = tmp_path / f"killed-{step}"
        shutil.copytree(home, copy)
        said, whole = run_until(copy, work, step)
        if whole:
            assert step >= 20
            return
        yield said, copy
        shutil.rmtree(copy)


def notes_of(home: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (home / "journal.jsonl").read_bytes().splitlines()]
    return [line["facts"] for line in lines if line["kind"] == "budget"]


def is_whole(home: Path) -> Ledger:
    """The ledger opens, and afterwards the journal knows every entry of it and is whole itself."""
    ledger = opened(home)
    ledger.spendings(DELTA)
    verify(home / "journal.jsonl")
    assert notes_of(home)[-1]["seq"] == len(entries(ledger.path))
    assert {note["seq"] for note in notes_of(home)} == set(range(1, len(entries(ledger.path)) + 1))
    return ledger


@pytest.fixture
def home(tmp_path: Path) -> Path:
    ledger = opened(tmp_path / "home")
    ledger.commit(ledger.reserve(order(1), patients(1, 2), WIDE))
    charged(ledger)
    return tmp_path / "home"


def test_killed_at_any_step_of_an_order_nothing_is_lost_and_nothing_is_counted_twice(
    home: Path, tmp_path: Path
) -> None:
    def work(ledger: Ledger, say: Callable[[str], None]) -> None:
        hold = ledger.reserve(order(2, event=OTHER), patients(2, 3), WIDE)
        say("reserved")
        ledger.commit(hold)
        say("committed")

    seen = set()
    for said, copy in every_step(home, work, tmp_path):
        ledger = is_whole(copy)
        found = ledger.spendings(DELTA)["total"]
        seen.add((tuple(said), found.rounds, found.open))
        if "reserved" in said:
            assert found.rounds == 2
        if "committed" in said:
            assert found.open == 0
        assert found.charged == pytest.approx(epsilon_of([EVENT, OTHER][: found.rounds]), abs=1e-6)
        if found.rounds == 2:
            with pytest.raises(PrivacyError, match="charged before"):
                ledger.reserve(order(2, event=OTHER), patients(2, 3), WIDE)
        else:
            ledger.reserve(order(2, event=OTHER), patients(2, 3), WIDE)
        assert charged(ledger) == pytest.approx(epsilon_of([EVENT, OTHER]), abs=1e-6)
    # The test is worth something only if it met the places between: charged and not told, done and not told.
    assert {((), 1, 0), ((), 2, 1), (("reserved",), 2, 1), (("reserved",), 2, 0)} <= seen


def test_killed_at_any_step_of_the_first_order_the_ledger_opens(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()

    def work(ledger: Ledger, say: Callable[[str], None]) -> None:
        ledger.unbounded(study("open"), "run-1")
        ledger.reserve(order(1), patients(1), WIDE)
        say("reserved")

    for said, copy in every_step(tmp_path / "empty", work, tmp_path):
        ledger = opened(copy)
        rounds = ledger.spendings(DELTA)["total"].rounds
        assert rounds == 1 or "reserved" not in said
        ledger.unbounded(study("open"), "run-1")
        assert ledger.unprotected() == [(study("open"), "run-1")]
        is_whole(copy)


@pytest.mark.parametrize("lost", ["ledger.sqlite", "journal.jsonl", "patients"])
def test_killed_at_any_step_of_a_rebuild_it_is_done_again_and_nothing_is_forgotten(
    home: Path, tmp_path: Path, lost: str
) -> None:
    opened(home).reserve(order(2, event=OTHER), patients(1), WIDE)
    if lost == "patients":
        forge(home / "ledger.sqlite", lambda connection: connection.execute("DELETE FROM patients"))
    else:
        (home / lost).unlink()

    def work(ledger: Ledger, say: Callable[[str], None]) -> None:
        ledger.rebuild()
        say("rebuilt")

    for said, copy in every_step(home, work, tmp_path):
        ledger = opened(copy)
        if "rebuilt" not in said:
            try:
                ledger.rebuild()
            except PrivacyError as error:
                assert "is whole" in str(error)  # only the last step was missing
        assert charged(ledger) == pytest.approx(epsilon_of([EVENT, OTHER]), abs=1e-6)
        assert ledger.spendings(DELTA)["total"].rounds == 2
        verify(copy / "journal.jsonl")


def test_what_a_killed_commit_half_wrote_is_taken_back(home: Path, tmp_path: Path) -> None:
    """The state of the disk in the middle of SQLite's commit: pages changed, and the journal that undoes them beside the file."""
    ledger = opened(home)
    ledger.reserve(order(2), patients(*range(500)), WIDE)
    expected = ledger.spendings(DELTA)
    killed = tmp_path / "killed"
    killed.mkdir()
    with closing(sqlite3.connect(ledger.path, isolation_level=None)) as connection:
        connection.execute("PRAGMA cache_size = 1")  # so that pages are written before the commit
        for trigger in ("patients_DELETE", "entries_DELETE"):
            connection.execute(f"DROP TRIGGER {trigger}")
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("DELETE FROM patients WHERE rowid % 2")
        connection.execute("DELETE FROM entries WHERE seq = 3")
        connection.executemany("INSERT INTO patients VALUES (?, 'x')", [(f"{n:064x}",) for n in range(2000)])
        for name in ("ledger.sqlite", "ledger.sqlite-journal", "journal.jsonl"):
            shutil.copy(home / name, killed / name)
    assert (killed / "ledger.sqlite").read_bytes() != ledger.path.read_bytes()
    torn = tmp_path / "torn"
    shutil.copytree(killed, torn)
    assert opened(killed).spendings(DELTA) == expected
    is_whole(killed).reserve(order(3), patients(1), WIDE)
    # And if somebody tidies away the file beside it, that is found.
    (torn / "ledger.sqlite-journal").unlink()
    with pytest.raises(LedgerDamaged):
        opened(torn).spendings(DELTA)


def test_a_write_ahead_log_that_another_tool_left_is_read_and_ended(home: Path) -> None:
    child = os.fork()
    if child == 0:
        connection = sqlite3.connect(home / "ledger.sqlite", isolation_level=None)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE another (tool)")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert (home / "ledger.sqlite-wal").stat().st_size > 0
    ledger = opened(home)
    ledger.reserve(order(2), patients(1), WIDE)
    assert not (home / "ledger.sqlite-wal").exists()
    assert (home / "ledger.sqlite").read_bytes()[18:20] == b"\x01\x01"  # of SQLite's header: no log is written any more
    assert is_whole(home).spendings(DELTA)["total"].rounds == 2


def _charge_on_and_on(home: Path, first: int, writing: int) -> None:
    ledger = opened(home)
    for number in range(first, first + 10_000):
        hold = ledger.reserve(order(number), patients(number % 7, 8), kept(1e9, study=1e9, year=1e9, orders=10**6))
        os.write(writing, f"{number} ".encode())
        ledger.commit(hold)


def test_killed_at_any_moment_again_and_again_no_promise_is_lost(home: Path) -> None:
    drawn = random.Random(4)
    promised: set[int] = {1}
    for turn in range(1, 16):
        reading, writing = os.pipe()
        child = _FORK.Process(target=_charge_on_and_on, args=(home, turn * 10_000, writing))
        child.start()
        os.close(writing)
        with os.fdopen(reading, "rb", buffering=0) as said:
            words, least = b"", drawn.randint(1, 5)
            while words.count(b" ") < least:
                words += said.read(100)
            time.sleep(drawn.uniform(0, 0.02))
            os.kill(child.pid or 0, signal.SIGKILL)
            child.join()
            while more := said.read(100):
                words += more
        promised |= {int(word) for word in words[: words.rfind(b" ") + 1].split()}
        ledger = is_whole(home)
        charges = [int(str(entry["sum"])) for entry in entries(ledger.path) if entry["kind"] == "reserve"]
        assert promised <= set(charges)
        # At most one is charged that nobody was told of: the one at which the child died.
        assert len(set(charges)) == len(charges) <= len(promised) + 1
        promised |= set(charges)
    assert len(promised) > 30  # each turn waits for its share, so a slow machine has them as well
    assert charged(ledger) == pytest.approx(epsilon_of([EVENT] * (len(promised) - 1)), abs=1e-6)  # of patient 8


def _charge_until_refused(home: Path, numbers: list[int], caps: Any, start: Any, results: Any) -> None:
    start.wait()
    done, refused = [], []
    for number in numbers:
        try:
            ledger = opened(home)
            hold = ledger.reserve(order(number), patients(1, 2), caps)
            done.append((number, hold))
            ledger.commit(hold)
        except PrivacyError as error:
            refused.append(error.code)
    results.put((done, refused))


@pytest.mark.parametrize("caps", [kept(epsilon_of([EVENT] * 9) + 1e-4), kept(orders=9)], ids=["epsilon", "orders"])
@pytest.mark.parametrize(
    "numbers", [([*range(2, 12)], [*range(12, 22)]), ([*range(2, 22)], [*range(2, 22)])], ids=["apart", "same"]
)
def test_two_processes_at_once_charge_no_more_than_one(
    home: Path, caps: Any, numbers: tuple[list[int], list[int]]
) -> None:
    """The two nodes of one site take turns; together they get what one alone would get, and no order is charged twice."""
    start, results = _FORK.Barrier(2), _FORK.Queue()
    children = [_FORK.Process(target=_charge_until_refused, args=(home, own, caps, start, results)) for own in numbers]
    for child in children:
        child.start()
    found = [results.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    done = [order_and_hold for own, _ in found for order_and_hold in own]
    assert len(done) == 8
    assert len({number for number, _ in done}) == len({hold for _, hold in done}) == 8
    assert {code for _, refused in found for code in refused} <= {"budget-exceeded", "privacy"}
    ledger = is_whole(home)
    assert charged(ledger) == pytest.approx(epsilon_of([EVENT] * 9), abs=1e-6)
    assert ledger.spendings(DELTA)["total"].open == 0
