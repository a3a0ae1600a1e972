"""State that release 0.1 wrote is opened by this version, with nothing lost and a copy kept; later state is left alone.

tests/fixtures/release-0.1 was written by that release: a masked run with differential privacy after its first of two rounds, with
the files of the coordinator and of the site north.
"""

import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fl_client.cohort import read_pins
from fl_client.consent import Consent
from fl_client.fetching import Plan
from fl_client.policy import Pause
from fl_client.site import ORDERS_VERSION, Site
from fl_server.roster import VERSION as ROSTER_VERSION
from fl_server.roster import Roster
from fl_server.run import Run, read_facts
from privacy import disk, journal
from privacy.calls import Enrolment
from privacy.errors import NewerVersion, PrivacyError
from privacy.greeting import Readiness, Versions
from privacy.journal import Journal
from privacy.ledger import Ledger

KEPT = Path(__file__).parent / "fixtures" / "release-0.1"
STUDY = "725fa0ad4cb3eee8a0a8d0de2f8bba0981a7a3944a93fe6133f0373a9c8f2ea2"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return Path(shutil.copytree(KEPT, tmp_path / "old"))


def memory(home: Path) -> Any:
    """The memory of answered orders of the site in `home`, as a site opens it."""
    site = object.__new__(Site)
    object.__setattr__(site, "home", home)
    return site._answered()


def version_of(path: Path) -> int:
    with closing(sqlite3.connect(path)) as database:
        return int(database.execute("PRAGMA user_version").fetchone()[0])


def rows(path: Path, table: str) -> list[Any]:
    with closing(sqlite3.connect(path)) as database:
        return database.execute(f"SELECT * FROM {table} ORDER BY rowid").fetchall()  # noqa: S608


def test_a_run_goes_on_after_its_last_committed_round(old: Path) -> None:
    before = (old / "run" / "checkpoint.safetensors").read_bytes()
    run = Run.open(old / "run")
    assert run.study.digest == STUDY and len(run.history) == 1 and list(run.remaining()) == [2]
    assert run.history[0].contributors == ["east", "north", "south"] and run.lost == []
    assert run.model is not None
    assert (run.model == load_file(KEPT / "run" / "checkpoint.safetensors")["model"]).all() and np.abs(
        run.model
    ).sum() > 0
    assert (old / "run" / "checkpoint.safetensors.v2").read_bytes() == before
    run.start()
    assert run.attempt == read_facts(KEPT / "run")["attempt"] + 1
    assert [path.name for path in (old / "run").glob("checkpoint-*")] == ["checkpoint-00001.safetensors"]


def test_answered_orders_are_remembered_and_the_old_file_is_kept(old: Path) -> None:
    path = old / "site" / "orders.sqlite"
    before = rows(path, "orders")
    assert version_of(path) == 0 and ("train", 1) in {(row[4], row[5]) for row in before}
    for _ in range(2):
        with memory(old / "site") as opened, pytest.raises(sqlite3.IntegrityError):
            opened.execute("INSERT INTO orders VALUES (?, ?, ?, ?, ?, ?)", before[0])
    assert version_of(path) == ORDERS_VERSION and rows(path, "orders") == before
    copy = path.with_name("orders.sqlite.v0")
    assert rows(copy, "orders") == before and version_of(copy) == 0 and copy.stat().st_mode & 0o777 == 0o600


def test_what_was_spent_stays_spent(old: Path) -> None:
    log = Journal(old / "site" / "journal.jsonl")
    assert journal.verify(log.path) == len(log.path.read_text().splitlines())
    spent = Ledger(old / "site" / "ledger.sqlite", log).spendings(0.001)["total"]
    assert spent.rounds == 1 and spent.open == 0 and spent.spent > 0.1


def test_approvals_splits_pauses_and_enrolment_hold(old: Path) -> None:
    consent = Consent.open(old / "site", STUDY)
    assert consent is not None and consent.statement.decision == "approved"
    assert len(read_pins(old / "site" / "studies" / f"{STUDY}.pins.json").splits) == 16
    assert Pause.open(old / "site", 2.0e9) is not None
    assert Enrolment.open(old / "site" / "keys").name == "north"
    with Plan.open(old / "site" / "fetch.sqlite", "selection") as plan:
        assert plan.counts().done == 0
    assert {site.name for site in Roster(old / "roster.sqlite").sites()} == {"north", "south", "east"}


def test_a_roster_before_revocations_is_brought_forward_and_kept(old: Path) -> None:
    path = old / "roster.sqlite"
    with sqlite3.connect(path) as database:
        database.execute("ALTER TABLE parties DROP COLUMN revoked")
        database.execute("PRAGMA user_version = 1")
    database.close()
    names = {site.name for site in Roster(path).sites()}
    assert names == {"north", "south", "east"} and version_of(path) == ROSTER_VERSION
    copy = path.with_name("roster.sqlite.v1")
    assert version_of(copy) == 1 and {row[0] for row in rows(copy, "parties")} == names


def test_a_roster_before_versions_were_exchanged_is_brought_forward_and_kept(old: Path) -> None:
    path = old / "roster.sqlite"
    before = version_of(path)
    roster = Roster(path)
    assert roster.told() == {} and version_of(path) == ROSTER_VERSION > before
    assert version_of(path.with_name(f"roster.sqlite.v{before}")) == before
    roster.tell("north", Versions(3, 0, 1, 0), Readiness(True))
    assert Roster(path).told()["north"].versions == Versions(3, 0, 1, 0)


def as_json(path: Path, version: int) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": version}))


def as_database(path: Path, version: int) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute(f"PRAGMA user_version = {version}")
        database.commit()


def open_orders(old: Path) -> None:
    with memory(old / "site"):
        pass


def open_fetch(old: Path) -> None:
    with Plan.open(old / "site" / "fetch.sqlite", "selection"):
        pass


LATER: dict[str, tuple[Callable[[Path, int], None], Callable[[Path], Any]]] = {
    "run/run.json": (as_json, lambda old: Run.open(old / "run")),
    f"site/studies/{STUDY}.json": (as_json, lambda old: Consent.open(old / "site", STUDY)),
    f"site/studies/{STUDY}.pins.json": (
        as_json,
        lambda old: read_pins(old / "site" / "studies" / f"{STUDY}.pins.json"),
    ),
    "site/paused.json": (as_json, lambda old: Pause.open(old / "site", 2.0e9)),
    "site/keys/enrolment.json": (as_json, lambda old: Enrolment.open(old / "site" / "keys")),
    "site/orders.sqlite": (as_database, open_orders),
    "site/fetch.sqlite": (as_database, open_fetch),
    "roster.sqlite": (as_database, lambda old: Roster(old / "roster.sqlite")),
}


@pytest.mark.parametrize("name", LATER)
def test_a_file_of_a_later_version_says_who_must_upgrade_and_is_not_touched(old: Path, name: str) -> None:
    spoil, open_it = LATER[name]
    spoil(old / name, 9)
    before = (old / name).read_bytes()
    with pytest.raises(NewerVersion, match="has layout 9") as caught:
        open_it(old)
    assert "Upgrade Isocenter on this machine" in caught.value.remedy and Path(name).name in str(caught.value)
    assert (old / name).read_bytes() == before
    assert not list((old / name).parent.glob(f"{Path(name).name}.v*"))


def test_a_ledger_of_a_later_version_is_not_touched_either(old: Path) -> None:
    as_database(old / "site" / "ledger.sqlite", 9)
    with pytest.raises(PrivacyError, match="version 9"):
        Ledger(old / "site" / "ledger.sqlite", Journal(old / "site" / "journal.jsonl")).spendings(0.001)


def test_a_copy_holds_what_stands_in_the_log_beside_a_database_and_is_made_once(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    with closing(sqlite3.connect(path)) as writer:
        writer.execute("PRAGMA journal_mode = WAL")
        writer.execute("CREATE TABLE t (x)")
        writer.execute("INSERT INTO t VALUES (1)")
        writer.commit()
        assert path.with_name("a.sqlite-wal").stat().st_size > 0
        copy = disk.keep_copy_of_database(path, 3)
        writer.execute("INSERT INTO t VALUES (2)")
        writer.commit()
        assert disk.keep_copy_of_database(path, 3) == copy
    assert rows(copy, "t") == [(1,)]
