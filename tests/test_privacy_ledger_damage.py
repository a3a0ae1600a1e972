"""A ledger that was changed, cut off, lost, put back or locked away: it is found, nothing is spent, and there is a way back.

Nothing that was charged is forgotten on that way: what cannot be proven about patients any more is charged to everybody.
"""

import fcntl
import hashlib
import json
import os
import shutil
import sqlite3
import stat
from collections.abc import Callable
from pathlib import Path

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

from privacy import ledger as ledger_module
from privacy.errors import BudgetExceeded, IsocenterError, JournalDamaged, LedgerBusy, LedgerDamaged, PrivacyError
from privacy.journal import Journal, verify
from privacy.ledger import Ledger
from privacy.persons import EVERYBODY


@pytest.fixture
def spent(tmp_path: Path) -> Ledger:
    """Five entries: two orders that were committed, one hold."""
    ledger = opened(tmp_path)
    ledger.commit(ledger.reserve(order(1), patients(1, 2), WIDE))
    ledger.commit(ledger.reserve(order(2, "fractures", OTHER), patients(2, 3), WIDE))
    ledger.reserve(order(3), patients(1, 2), WIDE)
    return ledger


def refuses_everything(ledger: Ledger, kind: type[IsocenterError], match: str | None = None) -> None:
    acts: list[Callable[[], object]] = [
        lambda: ledger.reserve(order(99), patients(77), WIDE),
        lambda: ledger.check(order(99), patients(77), WIDE),
        lambda: ledger.commit(5),
        lambda: ledger.unbounded(study("open"), "run-1"),
        lambda: ledger.spendings(DELTA),
        lambda: ledger.timeline(DELTA),
        lambda: ledger.rounds(study("covid")),
        ledger.unprotected,
        ledger.accept_clock,
    ]
    for act in acts:
        with pytest.raises(kind, match=match):
            act()


@pytest.mark.parametrize(
    ("statement", "match"),
    [
        ("UPDATE entries SET body = replace(body, '\"steps\":4', '\"steps\":1') WHERE seq = 1", "entry 1"),
        ("UPDATE entries SET body = replace(body, '\"time\":1', '\"time\":2') WHERE seq = 3", "entry 3"),
        ("DELETE FROM entries WHERE seq = 3", "entry 3"),
        ("DELETE FROM entries WHERE seq = 1", "entry 1"),
        ("DELETE FROM entries WHERE seq = 5", "cut off"),
        ("DELETE FROM entries", "cut off"),
        ("UPDATE entries SET seq = 9 WHERE seq = 5", "entry 5"),
        ("UPDATE entries SET hash = (SELECT hash FROM entries WHERE seq = 1) WHERE seq = 5", "entry 5"),
        ("UPDATE entries SET hash = x'00' WHERE seq = 2", "entry 2"),
        ("UPDATE entries SET body = CAST(x'ff7b' AS TEXT) WHERE seq = 2", "cannot be read"),
        ("UPDATE entries SET body = CAST(body AS BLOB) WHERE seq = 2", "entry 2"),
        ("DELETE FROM patients", "patient of the cohort"),
        ("DELETE FROM patients WHERE rowid = 1", "patient of the cohort"),
        ("UPDATE patients SET identities = 'aa' WHERE rowid = 2", "patient of the cohort"),
        ("DELETE FROM cohorts WHERE rowid = 2", "patients of the cohort"),
        ("UPDATE cohorts SET patients = substr(patients, 1, 64) WHERE rowid = 1", "patients of the cohort"),
        ("UPDATE cohorts SET patients = x'00' WHERE rowid = 1", "patients of the cohort"),
        ("DROP TABLE patients", "no such table"),
        ("DROP TABLE entries", "no such table"),
    ],
)
def test_whatever_is_changed_is_found_and_nothing_is_spent(spent: Ledger, statement: str, match: str) -> None:
    forge(spent.path, lambda connection: connection.execute(statement))
    refuses_everything(spent, LedgerDamaged, match)


def test_an_entry_cannot_be_changed_by_accident(spent: Ledger) -> None:
    connection = sqlite3.connect(spent.path)
    for table in ("entries", "cohorts", "patients"):
        for statement in ("DELETE FROM {}", "UPDATE {} SET rowid = rowid + 1"):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                connection.execute(statement.format(table))
    connection.close()


@pytest.mark.parametrize(
    "body",
    [
        "not json",
        "[]",
        "{}",
        "null",
        "[" * 100_000,
        '{"kind":"reserve","time":1}',
        '{"kind":"refund","time":1}',
        '{"kind":["reserve"],"time":1}',
        '{"kind":"clock","time":"1"}',
        '{"kind":"clock","time":true}',
        '{"kind":"clock","time":1,"more":1}',
        '{"kind":"commit","time":1,"hold":"1","study":"a","run":"a","attempt":1,"sum":1}',
        {"noise_multiplier": -1.0},
        {"noise_multiplier": "NaN"},
        {"sampling": "shuffled"},
        {"unit": "image"},
        {"steps": 0},
        {"more": 1},
        {"cohort": 5},
    ],
)
def test_an_entry_with_a_right_hash_that_says_nothing_is_damage(spent: Ledger, body: str | dict[str, object]) -> None:
    """One entry may follow the last one that the journal knows, so only what it says can give it away."""

    def forged(connection: sqlite3.Connection) -> None:
        last, (first,) = (
            connection.execute("SELECT hash FROM entries WHERE seq = 5").fetchone()[0],
            connection.execute("SELECT body FROM entries WHERE seq = 1").fetchone(),
        )
        text = body
        if isinstance(body, dict):
            facts = json.loads(first)
            (facts if "cohort" in body else facts["event"]).update(body)
            text = json.dumps(facts)
        own = hashlib.sha256(b"isocenter/v1/ledger\n" + f"6 {last} {text}".encode()).hexdigest()
        connection.execute("INSERT INTO entries VALUES (6, ?, ?)", (text, own))

    forge(spent.path, forged)
    refuses_everything(spent, LedgerDamaged, "entry 6")


def test_an_entry_with_a_right_hash_and_a_wrong_number_is_damage(spent: Ledger) -> None:
    def forged(connection: sqlite3.Connection) -> None:
        last = connection.execute("SELECT hash FROM entries WHERE seq = 5").fetchone()[0]
        text = '{"kind":"clock","time":1}'
        own = hashlib.sha256(b"isocenter/v1/ledger\n" + f"7 {last} {text}".encode()).hexdigest()
        connection.execute("INSERT INTO entries VALUES (7, ?, ?)", (text, own))

    forge(spent.path, forged)
    refuses_everything(spent, LedgerDamaged, "entry 6")


@pytest.mark.parametrize("content", [b"", b"SQLite format 3\0", b"\0" * 8192, b"not a database" * 1000])
def test_a_file_that_is_no_ledger_any_more_is_damage(spent: Ledger, content: bytes) -> None:
    spent.path.write_bytes(content)
    refuses_everything(spent, LedgerDamaged)


def test_every_kilobyte_that_is_overwritten_is_found_or_does_not_matter(spent: Ledger, tmp_path: Path) -> None:
    whole = spent.path.read_bytes()
    expected = spent.spendings(DELTA)
    found = 0
    for place in range(0, len(whole), 1024):
        spent.path.write_bytes(whole[:place] + b"\xaa" * 512 + whole[place + 512 :])
        try:
            assert opened(tmp_path).spendings(DELTA) == expected
        except LedgerDamaged:
            found += 1
        except PrivacyError as error:
            assert "version" in str(error)  # the tag is in the first kilobyte
            found += 1
    assert found >= 4


def test_a_missing_ledger_is_damage_when_the_journal_knows_of_one(spent: Ledger) -> None:
    spent.path.unlink()
    refuses_everything(spent, LedgerDamaged, "missing, and the journal knows of 5 entries")
    assert not spent.path.exists()


def test_an_older_copy_put_back_is_damage(spent: Ledger, tmp_path: Path) -> None:
    shutil.copy(spent.path, tmp_path / "backup")
    spent.commit(5)
    shutil.copy(tmp_path / "backup", spent.path)
    refuses_everything(spent, LedgerDamaged, "put back")


def test_another_ledger_of_the_same_length_is_damage(spent: Ledger, tmp_path: Path) -> None:
    foreign = opened(tmp_path / "elsewhere")
    for number in range(5):
        foreign.reserve(order(number), patients(50), WIDE)
    shutil.copy(foreign.path, spent.path)
    refuses_everything(spent, LedgerDamaged, "not the one")


def test_a_journal_that_is_gone_or_older_is_found(spent: Ledger, tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    for kept_lines in (0, 1, 3):
        journal.write_bytes(b"".join(lines[:kept_lines]))
        ledger = opened(tmp_path)
        refuses_everything(ledger, LedgerDamaged, f"does not know the last {5 - kept_lines} entries")
    journal.unlink()
    refuses_everything(spent, LedgerDamaged, "does not know the last 5 entries")


def test_one_entry_without_a_note_is_what_a_crash_leaves_and_is_noted_later(spent: Ledger, tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:4]))
    assert opened(tmp_path).spendings(DELTA)["total"].rounds == 3
    again = [json.loads(line)["facts"] for line in journal.read_bytes().splitlines()]
    assert again[4] == json.loads(lines[4])["facts"]


def test_a_damaged_journal_stops_the_ledger(spent: Ledger, tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    journal.write_bytes(journal.read_bytes().replace(b'"seq":5', b'"seq":4'))
    refuses_everything(spent, JournalDamaged)


@pytest.mark.parametrize("facts", [{}, {"seq": "five"}, {"seq": -1, "head": "ab"}, {"seq": 0.5}])
def test_a_note_without_a_number_is_damage_of_the_journal(spent: Ledger, facts: dict[str, str]) -> None:
    spent.journal.append("budget", **facts)
    refuses_everything(spent, JournalDamaged)


def test_a_torn_note_is_no_damage(spent: Ledger, tmp_path: Path) -> None:
    with (tmp_path / "journal.jsonl").open("ab") as file:
        file.write(b'{"n":6,"time":"2026-01-31T12:00:00Z","kind":"budget","facts":{"seq":6,')
    assert spent.spendings(DELTA)["total"].rounds == 3
    spent.commit(5)
    assert opened(tmp_path).spendings(DELTA)["total"].open == 0


def test_a_ledger_of_a_later_version_is_neither_used_nor_rebuilt(spent: Ledger) -> None:
    forge(spent.path, lambda connection: connection.execute("PRAGMA user_version = 2"))
    before = spent.path.read_bytes()
    refuses_everything(spent, PrivacyError, "version 2")
    with pytest.raises(PrivacyError, match="version 2"):
        spent.rebuild()
    assert spent.path.read_bytes() == before


# --- out of reach, and not damaged


def test_a_ledger_that_others_can_read_is_closed_to_them(spent: Ledger) -> None:
    spent.path.chmod(0o664)
    spent.spendings(DELTA)
    assert stat.S_IMODE(spent.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(spent.path.with_name("ledger.sqlite.lock").stat().st_mode) == 0o600


def test_a_link_in_the_place_of_the_ledger_is_refused_and_never_rebuilt(spent: Ledger, tmp_path: Path) -> None:
    spent.path.rename(tmp_path / "elsewhere.sqlite")
    spent.path.symlink_to(tmp_path / "elsewhere.sqlite")
    refuses_everything(spent, PrivacyError, "a link or a folder")
    with pytest.raises(PrivacyError, match="a link or a folder"):
        spent.rebuild()
    spent.path.unlink()
    spent.path.mkdir()
    refuses_everything(spent, PrivacyError, "a link or a folder")


def test_a_link_in_the_place_of_the_lock_is_refused(spent: Ledger, tmp_path: Path) -> None:
    lock = spent.path.with_name("ledger.sqlite.lock")
    lock.unlink()
    lock.symlink_to(tmp_path / "elsewhere")
    refuses_everything(spent, PrivacyError, "cannot be used")


def _connecting(monkeypatch: pytest.MonkeyPatch, prepare: Callable[..., sqlite3.Connection]) -> None:
    real = sqlite3.connect
    monkeypatch.setattr(ledger_module.sqlite3, "connect", lambda path, **how: prepare(real, path, **how))


def test_a_read_only_file_is_no_damage_and_nothing_is_rebuilt(spent: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        _connecting(patch, lambda real, path, **how: real(f"file:{path}?mode=ro", uri=True, **how))
        with pytest.raises(PrivacyError, match="readonly") as caught:
            spent.reserve(order(9), patients(1), WIDE)
        assert not isinstance(caught.value, LedgerDamaged)
        assert "Nothing was trained" in caught.value.remedy
        with pytest.raises(PrivacyError):
            spent.rebuild()
    assert spent.spendings(DELTA)["total"].rounds == 3


def test_a_full_disk_charges_nothing(spent: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    def small(real: Callable[..., sqlite3.Connection], path: Path, **how: object) -> sqlite3.Connection:
        connection = real(path, **how)
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages}")
        return connection

    with monkeypatch.context() as patch:
        _connecting(patch, small)
        with pytest.raises(PrivacyError, match="full") as caught:
            spent.reserve(order(9), patients(*range(300)), WIDE)
        assert not isinstance(caught.value, LedgerDamaged)
    assert spent.spendings(DELTA)["total"].rounds == 3
    spent.reserve(order(9), patients(*range(300)), WIDE)


def test_a_disk_that_is_full_for_the_note_leaves_the_hold_charged(
    spent: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda file, data, offset: real(file, data[:40], offset))
        with pytest.raises(PrivacyError, match="journal cannot be used"):
            spent.reserve(order(9), patients(1), WIDE)
    assert opened(tmp_path).spendings(DELTA)["total"].rounds == 4
    with pytest.raises(PrivacyError, match="charged before"):
        spent.reserve(order(9), patients(1), WIDE)
    verify(tmp_path / "journal.jsonl")


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "absent" / "ledger.sqlite", Journal(tmp_path / "journal.jsonl"))
    refuses_everything(ledger, PrivacyError, "absent")


def test_a_ledger_that_another_holds_is_busy(spent: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "BUSY_S", 0.05)
    with spent.path.with_name("ledger.sqlite.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refuses_everything(spent, LedgerBusy)
        with pytest.raises(LedgerBusy):
            spent.rebuild()
    other = sqlite3.connect(spent.path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    refuses_everything(spent, LedgerBusy)
    other.close()
    spent.commit(5)


# --- made anew


def test_a_whole_ledger_is_not_rebuilt(spent: Ledger) -> None:
    before = spent.path.read_bytes()
    with pytest.raises(PrivacyError, match="whole"):
        spent.rebuild()
    assert spent.path.read_bytes() == before


def test_a_lost_ledger_is_rebuilt_from_the_journal_and_everybody_is_charged(spent: Ledger, tmp_path: Path) -> None:
    spent.unbounded(study("open"), "run-7")
    before = spent.spendings(DELTA)
    spent.path.unlink()
    assert spent.rebuild() == 3
    ledger = opened(tmp_path)
    found = ledger.spendings(DELTA)
    everything = epsilon_of([EVENT, OTHER, EVENT])
    assert found["total"].charged == pytest.approx(everything, abs=1e-6)
    assert found["total"].charged >= before["total"].charged
    assert (found["total"].rounds, found["total"].open) == (3, 1)
    assert found[study("covid")].charged == before[study("covid")].charged
    assert ledger.unprotected() == [(study("open"), "run-7")]
    # Somebody who was never in a cohort is charged as well.
    with pytest.raises(BudgetExceeded):
        ledger.reserve(order(9), patients(99), kept(everything))
    with pytest.raises(PrivacyError, match="charged before"):
        ledger.reserve(order(3), patients(1), WIDE)
    ledger.commit(ledger.reserve(order(9), patients(99), WIDE))
    assert charged(ledger) == pytest.approx(epsilon_of([EVENT, OTHER, EVENT, EVENT]), abs=1e-6)


def test_what_file_and_journal_agree_on_keeps_its_patients(spent: Ledger, tmp_path: Path) -> None:
    shutil.copy(spent.path, tmp_path / "backup")
    spent.reserve(order(4, event=OTHER), patients(8), WIDE)
    shutil.copy(tmp_path / "backup", spent.path)
    assert spent.rebuild() == 4
    ledger = opened(tmp_path)
    # Patient 99 has the one charge that the copy does not know; patient 2 has his own as well.
    assert charged(ledger) == pytest.approx(epsilon_of([EVENT, OTHER, EVENT, OTHER]), abs=1e-6)
    ledger.check(order(9, "new", EVENT), patients(99), kept(epsilon_of([OTHER, EVENT]) + 1e-4))
    with pytest.raises(BudgetExceeded):
        ledger.check(order(9, "new", EVENT), patients(3), kept(epsilon_of([OTHER, EVENT]) + 1e-4))
    assert ledger.spendings(DELTA)["total"].open == 2


@pytest.mark.parametrize(
    ("statement", "knows"),
    [
        ("DELETE FROM patients", 0),
        ("DROP TABLE cohorts", 0),
        ("DELETE FROM cohorts WHERE rowid = 2", 2),
        ("UPDATE entries SET body = replace(body, '\"steps\":4', '\"steps\":1') WHERE seq = 1", 2),
        ("UPDATE entries SET hash = 'ab' WHERE seq = 3", 3),
        ("DELETE FROM entries WHERE seq < 4", 1),
    ],
)
def test_a_rebuilt_ledger_has_every_charge_and_only_patients_that_are_vouched_for(
    spent: Ledger, statement: str, knows: int
) -> None:
    whole = charged(spent)
    forge(spent.path, lambda connection: connection.execute(statement))
    assert spent.rebuild() == 3
    cohorts = [entry["cohort"] for entry in entries(spent.path) if entry["kind"] == "reserve"]
    assert len([cohort for cohort in cohorts if cohort != EVERYBODY]) == knows
    assert charged(spent) >= whole - 1e-9
    assert spent.spendings(DELTA)["total"].rounds == 3


def test_a_forged_charge_is_not_believed_about_its_patients(spent: Ledger) -> None:
    """The old file says that order 1 happened to somebody else: the journal has its hash, and that one differs."""

    def forged(connection: sqlite3.Connection) -> None:
        other = json.loads(connection.execute("SELECT body FROM entries WHERE seq = 3").fetchone()[0])["cohort"]
        own = json.loads(connection.execute("SELECT body FROM entries WHERE seq = 1").fetchone()[0])["cohort"]
        connection.execute("UPDATE entries SET body = replace(body, ?, ?) WHERE seq = 1", (own, other))

    forge(spent.path, forged)
    spent.rebuild()
    assert next(entry["cohort"] for entry in entries(spent.path) if entry["kind"] == "reserve") == EVERYBODY


def test_a_lost_journal_is_made_up_for_by_the_ledger_and_everybody_is_charged(spent: Ledger, tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").unlink()
    ledger = opened(tmp_path)
    assert ledger.rebuild() == 3
    assert charged(ledger) == pytest.approx(epsilon_of([EVENT, OTHER, EVENT]), abs=1e-6)
    assert all(entry["cohort"] == EVERYBODY for entry in entries(ledger.path) if entry["kind"] == "reserve")
    ledger.reserve(order(9), patients(1), WIDE)
    ledger.path.unlink()  # and from now on the journal alone knows less than the ledger did
    refuses_everything(ledger, LedgerDamaged)


def test_nothing_is_made_from_nothing(spent: Ledger, tmp_path: Path) -> None:
    """A ledger that nobody can read, and a journal that knows nothing: an empty ledger would be a new budget."""
    (tmp_path / "journal.jsonl").unlink()
    spent.path.write_bytes(b"not a database" * 1000)
    ledger = opened(tmp_path)
    with pytest.raises(LedgerDamaged, match="neither") as caught:
        ledger.rebuild()
    assert "backup" in caught.value.remedy
    refuses_everything(ledger, LedgerDamaged)


def test_a_rebuild_keeps_the_old_file(spent: Ledger, tmp_path: Path) -> None:
    old = b"not a database" * 1000
    spent.path.write_bytes(old)
    spent.rebuild()
    assert [path.read_bytes() for path in tmp_path.glob("ledger.sqlite.damaged-*")] == [old]
    assert spent.spendings(DELTA)["total"].rounds == 3
    assert stat.S_IMODE(spent.path.stat().st_mode) == 0o600


def test_what_lay_beside_the_old_file_is_not_taken_for_the_new_one_s(tmp_path: Path) -> None:
    path, fresh = tmp_path / "ledger.sqlite", tmp_path / "ledger.sqlite.new"
    fresh.write_bytes(b"new")
    for suffix in ("", "-journal", "-wal"):
        path.with_name(path.name + suffix).write_bytes(b"old" + suffix.encode())
    ledger_module._replace(path, fresh)
    kept_files = sorted(found.read_bytes() for found in tmp_path.glob("ledger.sqlite.damaged-*"))
    assert kept_files == [b"old", b"old-journal", b"old-wal"]
    assert [found.name for found in tmp_path.iterdir() if "damaged" not in found.name] == ["ledger.sqlite"]
    assert path.read_bytes() == b"new"


def test_a_second_rebuild_keeps_what_the_first_one_made(spent: Ledger, tmp_path: Path) -> None:
    spent.path.unlink()
    spent.rebuild()
    spent.reserve(order(9), patients(99), WIDE)
    expected = charged(spent)
    spent.path.unlink()
    assert spent.rebuild() == 4
    assert charged(spent) == expected
    assert len({(entry["run"], entry["sum"]) for entry in entries(spent.path) if entry["kind"] == "reserve"}) == 4


def test_a_damaged_journal_is_no_source_for_a_rebuild(spent: Ledger, tmp_path: Path) -> None:
    spent.path.unlink()
    journal = tmp_path / "journal.jsonl"
    journal.write_bytes(journal.read_bytes().replace(b'"steps":4', b'"steps":1', 1))
    with pytest.raises(JournalDamaged):
        spent.rebuild()


@pytest.mark.parametrize("missing", ["entry", "noise_multiplier", "study", "time", "head"])
def test_a_note_that_cannot_be_read_is_no_source_for_a_rebuild(spent: Ledger, tmp_path: Path, missing: str) -> None:
    facts = json.loads((tmp_path / "journal.jsonl").read_bytes().splitlines()[0])["facts"]
    del facts[missing]
    spent.journal.append("budget", **facts)
    spent.path.unlink()
    with pytest.raises(JournalDamaged):
        spent.rebuild()
