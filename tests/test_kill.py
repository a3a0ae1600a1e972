"""A consortium in memory, with one party killed at every durable write and every message of a run, then started again.

Wherever it happens, the run ends complete; each committed model is what its contributors, named in the record, learn (an oracle
trains each of them by hand); under `plain` and `sealed` it is the undisturbed model bit for bit. Ledgers hold one charge for each
training and none is missing; journals and ledgers are whole; nobody speaks of what is not on the disk.

By default some of the places are tried, spread over the whole run; `pytest -m slow tests/test_kill.py` tries all of them.
"""

import functools
import json
import math
import sqlite3
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from crashes import Crash, Places
from federation import Federation
from flwr.app import Message
from grid import FaultyGrid
from oracle import Trained
from test_private_round import DISTRIBUTED, LOCAL, permissive, private

from fl_server.app import note_missing_ends
from fl_server.roster import Home
from fl_server.run import Run, list_runs
from models.study import Study, parse
from privacy import accounting, journal, wire

pytestmark = pytest.mark.timeout(1800)  # a share of all places is some minutes
SAMPLED = 6  # places of each plan in the default run
SHARDS = 6  # of the slow run, so that several processes can share it


def unprotected(protection: str) -> Study:
    """The study of `private`, without differential privacy: three sites, all of them needed."""
    from hospital import STUDY

    text = STUDY.replace("privacy: none", "privacy: none\nnetwork: {name: linear}")
    text = text.replace("sites: [north, south], quorum: 2", "sites: [north, south, east], quorum: 3")
    text = text.replace("protection: plain", f"protection: {protection}").replace(
        "minimum_patients: 2", "minimum_patients: 1"
    )
    return parse(Study, text, "study.yaml")


PLANS = {
    "plain": functools.partial(unprotected, "plain"),
    "sealed": functools.partial(unprotected, "sealed"),
    "masked": functools.partial(unprotected, "masked"),
    "local": functools.partial(private, LOCAL),
    "distributed": functools.partial(private, DISTRIBUTED),
}


@dataclass
class Quiet:
    """A consortium that approved the study, its undisturbed run, and where a party could have died in it."""

    federation: Federation
    trained: Trained
    results: dict[str, Any]
    model: Any
    places: list[tuple[str, str, str]]


@dataclass
class Play:
    """One run in which a party dies at a place, and whoever died is started again."""

    federation: Federation
    places: Places
    committed: list[Any] = field(default_factory=list)
    models: list[tuple[Any, Any]] = field(default_factory=list)
    died: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.programs = {name: self.federation.answers(name) for name in self.federation.hospitals}

    def run(self) -> Path:
        """Launch and carry on until the run has ended; its folder. The researcher launches once."""
        for _ in range(4):
            try:
                return self._carry_on()
            except Crash:
                self._revive("coordinator")
                self.federation.home = Home.open(self.federation.home.root)
        raise AssertionError("one crash, and the run was carried on more than three times")

    def _carry_on(self) -> Path:
        home = self.federation.home
        note_missing_ends(home)  # as an executor does when it starts
        there = list_runs(home.runs)
        folder = home.runs / there[0]["run_id"] if there else self.federation.new_run()
        if not there or there[0]["state"] in ("queued", "running"):
            self.federation.run(self._grid(), folder)
        return folder

    def _revive(self, party: str) -> None:
        """Start the program of a party again: what it held in memory is gone."""
        self.died.append(party)
        self.places.dead.discard(party)
        self.places.unsynced = {path: its for path, its in self.places.unsynced.items() if its != party}
        if party in self.programs:
            self.programs[party] = self.federation.answers(party)

    def _grid(self) -> FaultyGrid:
        grid = FaultyGrid({self.federation.node(name): self._answer(name) for name in self.federation.hospitals})
        push = grid.push_messages

        def watched_push(messages: Any) -> Any:
            self.places.told("coordinator")
            self.places.step("coordinator", "before orders", "")
            names = push(messages)
            self.places.step("coordinator", "after orders", "")
            return names

        grid.push_messages = watched_push  # type: ignore[method-assign]
        return grid

    def _answer(self, site: str) -> Any:
        def answer(message: Message) -> Message | None:
            kind = wire.decode(message, *wire.ORDERS).kind
            try:
                self.places.step(site, "before order", kind)
                reply = self.programs[site](message)
                self.places.told(site)
                self.places.step(site, "before report", kind)
            except Crash:
                self._revive(site)
                return None
            return reply

        return answer


def keep_commits(play: Play, patch: pytest.MonkeyPatch) -> None:
    """Note each committed round with the model before and after it. One that is committed again takes the place of the first."""
    commit = Run.commit

    def keep(run: Run, done: Any, model: Any, state: Any) -> None:
        # Noted before: where the coordinator dies in its commit, either this round is durable or it comes again.
        play.models[done.round - 1 :] = [(run.model, model)]
        play.committed[done.round - 1 :] = [done]
        commit(run, done, model, state)

    patch.setattr(Run, "commit", keep)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fl_server.sums.timeout_of", lambda study: 0.05)
    monkeypatch.setattr("fl_server.rounds.LINGER_S", 0.05)
    monkeypatch.setattr("fl_server.rounds.GRACE_S", 0.05)
    monkeypatch.setattr("fl_server.rounds.ONLINE_LOOK_S", 0.01)
    monkeypatch.setattr(
        "fl_server.rounds.GONE_LOOK_S", 1e9
    )  # by the clock, so places would have other numbers each time
    monkeypatch.setattr("models.documents.parse", functools.cache(parse))


def played(federation: Federation, at: int) -> tuple[Play, Path]:
    with pytest.MonkeyPatch.context() as patch:
        places = Places(federation.folder, at)
        places.patch(patch)
        play = Play(federation, places)
        keep_commits(play, patch)
        folder = play.run()
    return play, folder


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @functools.cache
    def made(name: str) -> Quiet:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("os.fsync", lambda file: None)
            federation = Federation(tmp_path_factory.mktemp(name) / "template", PLANS[name]())
            for hospital in federation.hospitals.values():
                permissive(hospital)
        play, folder = played(federation.copied(tmp_path_factory.mktemp(name) / "quiet"), -1)
        assert not play.places.complaints, play.places.complaints
        results = json.loads((folder / "results.json").read_text())
        assert results["label"] == "complete"
        oracle = Trained(federation.copied(tmp_path_factory.mktemp(name) / "oracle"))  # it writes files of its own
        return Quiet(federation, oracle, results, Run.open(folder).model, play.places.trace)

    return made


def places_of(name: str, quiet: Quiet, shard: int | None) -> list[int]:
    """Numbers of the places to try: a sample spread over the run, or one share of all of them."""
    count = len(quiet.places)
    if shard is not None:
        return list(range(shard, count, SHARDS))
    first = list(PLANS).index(name)  # each plan has its sample elsewhere
    return [(first * 3 + n * count // SAMPLED + n) % count for n in range(SAMPLED)]


@pytest.mark.parametrize("name", ["plain"])
def test_a_crash_between_a_runs_end_and_its_line_in_the_journal_costs_no_line(
    name: str, quiet: Any, tmp_path: Path
) -> None:
    """The last places of all: after results, model and run.json, and at the journal's line about the end."""
    undisturbed = quiet(name)
    own = [
        n
        for n, (party, _, about) in enumerate(undisturbed.places)
        if (party, about) == ("coordinator", "journal.jsonl")
    ]
    for at in own[-4::3]:  # half a line, and the whole one
        check(undisturbed, *played(undisturbed.federation.copied(tmp_path / str(at)), at))


@pytest.mark.parametrize("shard", [None, *(pytest.param(n, marks=pytest.mark.slow) for n in range(SHARDS))])
@pytest.mark.parametrize("name", PLANS)
def test_whoever_is_killed_wherever_the_run_ends_complete_and_right(
    name: str, shard: int | None, quiet: Any, tmp_path: Path
) -> None:
    undisturbed = quiet(name)
    assert len(undisturbed.places) > 250, "too few places to die were found"
    for at in places_of(name, undisturbed, shard):
        where = f"{name}, killed at place {at}: {undisturbed.places[at]}"
        try:
            check(undisturbed, *played(undisturbed.federation.copied(tmp_path / str(at)), at))
        except BaseException as error:
            raise AssertionError(where) from error


def check(quiet: Quiet, play: Play, folder: Path) -> None:
    assert play.died == [quiet.places[play.places.at][0]], "nobody was killed, or another died of it"
    assert not play.places.complaints, play.places.complaints
    results = json.loads((folder / "results.json").read_text())
    everyone = sorted(play.federation.hospitals)
    open_sum = play.federation.plan.protection != "masked"
    if open_sum and results["label"] != "complete":
        # Unmasked, an evaluation goes on without a site that died in it: its scores are missing, and the label says so.
        assert results["label"] == f"partial (2 of 3, {play.died[0]} not in the test evaluation (timeout))"
    else:
        assert results["label"] == "complete", results["label"]
    assert [entry["contributors"] for entry in results["rounds"]] == [everyone] * 2
    assert [entry["round"] for entry in results["rounds"]] == [1, 2]
    run = Run.open(folder)
    assert run.lost == [] and len(run.history) == 2
    ends = [line["facts"] for line in lines_of(folder.parents[1]) if line["kind"] == "run-ended"]
    assert [(line["run"], line["state"]) for line in ends] == [(folder.name, run.facts["state"])], (
        "not one line of its end"
    )
    check_journals(play.federation)
    plan = play.federation.plan
    if plan.privacy != "none":
        for name in everyone:
            check_charges(play.federation, name, results)
        return
    assert len(play.models) == 2 and (play.models[0][1] == play.models[1][0]).all()
    for done, (before, after) in zip(play.committed, play.models, strict=True):
        repeats = {name: trainings_before(play.federation, name, done) for name in everyone}
        if open_sum:
            repeats = dict.fromkeys(everyone, 0)
        quiet.trained.check(done, before, after, repeats)
    assert run.model is not None and (run.model == play.models[-1][1]).all()
    if plan.protection != "masked" or not any(
        trainings_before(play.federation, n, d) for n in everyone for d in run.history
    ):
        assert (run.model == quiet.model).all(), "another model than that of the undisturbed run"
        scored = results["label"] == "complete" and not any(entry["validation_missing"] for entry in results["rounds"])
        for key in ("selected_round", "initial", "test", "figures", "ingested"):
            assert not scored or results[key] == quiet.results[key], key


def check_journals(federation: Federation) -> None:
    """The chains are whole, and each site's ledger opens and is the one that its journal knows."""
    for party in ("coordinator", *federation.hospitals):
        path = federation.folder / party / "journal.jsonl"
        journal.Journal(path)  # as its start does: who died in the last line of all is started once more
        journal.verify(path)
    for hospital in federation.hospitals.values():
        hospital.site.ledger.spendings(0.001)
        lines = [line for line in lines_of(hospital.home) if line["kind"] == "train-report"]
        named = [(line["facts"]["attempt"], line["facts"]["sum"]) for line in lines]
        assert len(set(named)) == len(named), "one order was answered twice"


def lines_of(home: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (home / "journal.jsonl").read_text().splitlines()]


def trainings_before(federation: Federation, site: str, done: Any) -> int:
    """How often `site` had taken up training in the round of `done` before the order that was committed, by its own memory."""
    with closing(sqlite3.connect(federation.hospitals[site].home / "orders.sqlite")) as memory:
        query = "SELECT attempt FROM orders WHERE kind = 'train' AND round = ? ORDER BY rowid"
        attempts = [attempt for (attempt,) in memory.execute(query, (done.round,))]
    return attempts.index(done.attempt)


def check_charges(federation: Federation, site: str, results: dict[str, Any]) -> None:
    """One charge for each training that was begun, none for another, all of what left; ε is that of the charges, by an oracle."""
    home = federation.hospitals[site].home
    with closing(sqlite3.connect(home / "ledger.sqlite")) as book:
        entries = [json.loads(body) for (body,) in book.execute("SELECT body FROM entries ORDER BY seq")]
    with closing(sqlite3.connect(home / "orders.sqlite")) as memory:
        asked = set(memory.execute("SELECT attempt, sum FROM orders WHERE kind = 'train'"))
    charged = [(entry["attempt"], entry["sum"]) for entry in entries if entry["kind"] == "reserve"]
    left = {
        (line["facts"]["attempt"], line["facts"]["sum"]) for line in lines_of(home) if line["kind"] == "train-report"
    }
    assert len(set(charged)) == len(charged), "one order was charged twice"
    assert left <= set(charged) <= asked, "something left that was not charged, or was charged that nobody asked for"
    assert {entry["attempt"] for entry in results["rounds"]} <= {attempt for attempt, _ in charged}
    # One crash costs a site one training more at most: a void sum is not opened, and yet charged.
    assert 2 <= len(charged) <= 3
    events = [accounting.PrivacyEvent.from_json(e["event"]) for e in entries if e["kind"] == "reserve"]
    found = federation.hospitals[site].site.ledger.spendings(0.001)["total"]
    assert found.rounds == len(charged) and math.isfinite(found.charged)
    assert found.charged >= accounting.epsilon(events[:2], 0.001) - 1e-6
    assert found.charged == pytest.approx(accounting.epsilon(events, 0.001), rel=1e-6)


def test_the_places_are_those_of_every_party_and_of_every_file(quiet: Any) -> None:
    """What the walk above relies on: nobody's writes are passed over, and there are hundreds of places."""
    places = quiet("distributed").places
    assert {party for party, _, _ in places} == {"coordinator", "north", "south", "east"}
    files = {(party, about) for party, _, about in places}
    for site in ("north", "south", "east"):
        assert {
            (site, name) for name in ("orders.sqlite", "ledger.sqlite", "journal.jsonl", "train", "unmask")
        } <= files
    checkpoints = {about for party, about in files if party == "coordinator" and about.startswith("checkpoint-")}
    assert {"checkpoint-00001.safetensors", "checkpoint-00002.safetensors"} <= checkpoints
    assert {
        ("coordinator", name) for name in ("run.json", "results.json", "model.safetensors", "journal.jsonl")
    } <= files
