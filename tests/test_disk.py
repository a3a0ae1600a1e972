"""A disk that fills up or becomes read-only in the middle of a run; clocks that jump. The run goes on, nothing is damaged.

Real file systems: a tmpfs of some megabytes below the coordinator or a site. Where mounts are not permitted, those tests are
skipped.
"""

import errno
import functools
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from federation import Federation
from flwr.app import Message
from test_kill import PLANS
from test_private_round import permissive
from test_round import stop_after

from fl_server.run import Run, read_facts
from models.study import parse
from privacy import disk, journal, keys, wire
from privacy.errors import DiskUnusable, DocumentError, IsocenterError
from privacy.journal import Journal


def fault(number: int) -> Any:
    def broken(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return broken


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO])
def test_a_disk_that_cannot_be_written_has_one_name_and_the_old_content_stays(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, log = tmp_path / "a.json", Journal(tmp_path / "journal.jsonl")
    keys.write_private(path, b"before")
    log.append("one")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fault(number))
        for write in (lambda: keys.write_private(path, b"after"), lambda: log.append("two")):
            with pytest.raises(DiskUnusable, match=os.strerror(number)) as caught:
                write()
            assert isinstance(caught.value, IsocenterError | OSError) and "Make room" in caught.value.remedy
    assert path.read_bytes() == b"before" and journal.verify(log.path) == 1
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.json", "journal.jsonl"]


def test_an_error_that_is_no_fault_of_the_disk_keeps_its_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", fault(errno.EACCES))
    with pytest.raises(PermissionError):
        keys.write_private(tmp_path / "a.json", b"")


def test_a_new_folder_is_flushed_in_the_one_above_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[Path] = []
    monkeypatch.setattr(disk, "flush_folder", flushed.append)
    disk.make_folder(tmp_path / "a" / "b")
    assert flushed == [tmp_path, tmp_path / "a"] and (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700


class Mounted:
    """A small file system at a place where files were: they are in it now."""

    def __init__(self, folder: Path, megabytes: int = 6) -> None:
        self.folder, self.filler = folder, folder / "filler"
        aside = folder.with_name(folder.name + "-aside")
        folder.rename(aside)
        folder.mkdir(mode=0o700)
        try:
            mount("-t", "tmpfs", "-o", f"size={megabytes}m,mode=0700", "tmpfs", str(folder))
        except (subprocess.CalledProcessError, FileNotFoundError):
            folder.rmdir()
            aside.rename(folder)
            pytest.skip("mounts are not permitted here")
        subprocess.run(["cp", "-a", f"{aside}/.", str(folder)], check=True)

    def fill(self) -> None:
        with self.filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(bytes(4096))

    def empty(self) -> None:
        self.filler.unlink()

    def lock(self) -> None:
        mount("-o", "remount,ro", str(self.folder))

    def unlock(self) -> None:
        mount("-o", "remount,rw", str(self.folder))

    def end(self) -> None:
        subprocess.run(["umount", "-l", str(self.folder)], check=False, capture_output=True)


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, capture_output=True)


@pytest.fixture
def mounted() -> Iterator[Any]:
    found: list[Mounted] = []

    def make(folder: Path) -> Mounted:
        found.append(Mounted(folder))
        return found[-1]

    yield make
    for each in found:
        each.end()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fl_server.sums.timeout_of", lambda study: 0.05)
    for name in ("LINGER_S", "GRACE_S"):
        monkeypatch.setattr(f"fl_server.rounds.{name}", 0.05)
    monkeypatch.setattr("models.documents.parse", functools.cache(parse))


def federated(folder: Path) -> Federation:
    found = Federation(folder, PLANS["plain"]())
    for hospital in found.hospitals.values():
        permissive(hospital)
    return found


def when(federation: Federation, site: str, number: int, act: Any) -> Any:
    """`act` happens once, before `site` gets its order to train of round `number`; a node that cannot write is silent."""
    grid, happened = federation.grid(), []
    for name in federation.hospitals:
        honest = grid.answers[federation.node(name)]

        def answer(message: Message, name: str = name, honest: Any = honest) -> Message | None:
            order = wire.decode(message, *wire.ORDERS)
            if not happened and (name, order.kind, order.round) == (site, "train", number):
                happened.append(name)
                act()
            try:
                return honest(message)  # type: ignore[no-any-return]
            except DiskUnusable:
                return None

        grid.answers[federation.node(name)] = answer
    return grid


@pytest.mark.parametrize("what", ["full", "read-only"])
def test_a_coordinator_whose_disk_cannot_be_written_goes_on_there_when_it_can(
    tmp_path: Path, mounted: Any, quick: None, what: str
) -> None:
    undisturbed = Run.open(federated(tmp_path / "quiet").run())
    federation = federated(tmp_path / "shaken")
    folder = federation.new_run()
    runs = mounted(federation.home.runs)
    act, undo = (runs.fill, runs.empty) if what == "full" else (runs.lock, runs.unlock)
    with pytest.raises(DiskUnusable, match="cannot be written"):
        federation.run(when(federation, "east", 2, act), folder)
    assert read_facts(folder)["state"] == "running", "the executor would not carry it on"
    with pytest.raises(DiskUnusable):
        federation.run(folder=folder)
    undo()
    run = Run.open(federation.run(folder=folder))
    assert run.facts["label"] == "complete" and run.lost == []
    assert run.model is not None and undisturbed.model is not None and (run.model == undisturbed.model).all()
    assert not list(folder.glob(".checkpoint*.part"))
    journal.verify(federation.home.root / "journal.jsonl")


@pytest.mark.parametrize("what", ["full", "read-only"])
def test_a_site_whose_disk_cannot_be_written_sends_nothing_and_takes_part_again_when_it_can(
    tmp_path: Path, mounted: Any, quick: None, what: str
) -> None:
    """All three sites are needed: the run ends by name, says why, and is launched again."""
    undisturbed = Run.open(federated(tmp_path / "quiet").run())
    federation = federated(tmp_path / "shaken")
    home = mounted(federation.hospitals["east"].home)
    act, undo = (home.fill, home.empty) if what == "full" else (home.lock, home.unlock)
    folder = federation.run(when(federation, "east", 2, act))
    facts = read_facts(folder)
    assert facts["state"] == "failed" and "quorum-lost" in facts["label"]
    told = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    # On a full disk there may be room for the refusal itself; without a line in the journal nothing leaves, and it is waited for.
    reason = next(code for code in ("disk-unusable", "privacy", "timeout") if f"east: {code}" in told[-1]["message"])
    waited = {tuple(event["sites"]) for event in told if event["event"] == "waiting"}
    assert waited == ({("east",)} if reason == "timeout" else set())
    undo()
    run = Run.open(folder)
    run.requeue()
    run = Run.open(federation.run(folder=folder))
    assert run.facts["label"] == "complete"
    assert run.model is not None and undisturbed.model is not None and (run.model == undisturbed.model).all()
    for hospital in federation.hospitals.values():
        journal.verify(hospital.home / "journal.jsonl")
        hospital.site.ledger.spendings(0.001)


@pytest.mark.parametrize("days", [-400, 400])
def test_a_clock_that_jumps_at_the_coordinator_refuses_orders_by_name_and_damages_nothing(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, days: int
) -> None:
    """An order from another year is stale at every site; when the clock is right again, the run goes on and ends the same."""
    undisturbed = Run.open(federated(tmp_path / "quiet").run())
    federation = federated(tmp_path / "shaken")
    with monkeypatch.context() as patch:
        sign = wire.Order.signed

        def signed(order: Any, key: Any) -> Any:
            jumped = {"issued": order.issued + days * 86400} if order.round == 2 else {}
            return sign(type(order)(**{**vars_of(order), **jumped}), key)

        patch.setattr(wire.Order, "signed", signed)
        folder = federation.run()
    facts = read_facts(folder)
    assert facts["label"] == "failed after round 1: quorum-lost"
    assert "order-forged" in (folder / "events.jsonl").read_text()
    run = Run.open(folder)
    run.requeue()
    run = Run.open(federation.run(folder=folder))
    assert run.facts["label"] == "complete"
    assert run.model is not None and undisturbed.model is not None and (run.model == undisturbed.model).all()


def vars_of(order: Any) -> dict[str, Any]:
    return {name: getattr(order, name) for name in order.fields()}


def test_a_memory_of_answered_orders_that_is_damaged_is_named(tmp_path: Path) -> None:
    federation = federated(tmp_path)
    path = federation.hospitals["east"].home / "orders.sqlite"
    path.write_bytes(b"not a database" * 100)
    order = federation.hospitals["east"].order()
    with pytest.raises(DocumentError, match=r"orders\.sqlite cannot be used"):
        federation.hospitals["east"].site.admit(order)


def test_a_run_without_a_sound_checkpoint_ends_by_name_and_is_not_tried_for_ever(tmp_path: Path, quick: None) -> None:
    federation = federated(tmp_path)
    folder = federation.new_run()
    stop_after(1, federation, folder)
    (folder / "checkpoint-00001.safetensors").write_bytes(b"")
    with pytest.raises(DocumentError, match="there is no other"):
        federation.run(folder=folder)
    facts = read_facts(folder)
    assert (facts["state"], facts["label"]) == ("failed", "failed after round 1: bad-document")
