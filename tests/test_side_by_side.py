"""Two runs at once: each ends as it would have alone, sites answer one order at a time, and nobody counts as dead meanwhile."""

import functools
import itertools
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from federation import Federation
from flwr.app import Message
from grid import FaultyGrid
from hospital import Hospital, study
from test_kill import PLANS
from test_server_run import study as run_study

from fl_client import app as site_app
from fl_client.cohort import Cohort
from fl_server import executor, rounds, runs_cli
from fl_server.app import note_missing_ends
from fl_server.progress import ahead
from fl_server.roster import Home, ServerFile
from fl_server.run import Run, read_facts
from fl_server.sums import OpenSumming
from models.study import parse
from privacy import journal, wire


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.documents.parse", functools.cache(parse))
    monkeypatch.setattr("os.fsync", lambda file: None)


class OneAtATime:
    """The sites' programs, one order at a time, as a node answers; notes whose orders came in which order.

    One lock for all sites: here they are threads of one process, which share torch's random numbers.
    """

    def __init__(self, federation: Federation) -> None:
        self.log: list[tuple[str, str]] = []
        self.lock = threading.Lock()
        self.answers = {
            federation.node(name): self._locked(name, federation.answers(name)) for name in federation.hospitals
        }

    def _locked(self, site: str, answer: Any) -> Any:
        def one(message: Message) -> Message | None:
            with self.lock:
                self.log.append((site, wire.decode(message, *wire.ORDERS).run))
                return answer(message)  # type: ignore[no-any-return]

        return one


@pytest.mark.parametrize("name", ["plain", "masked"])
def test_two_runs_at_once_take_turns_at_each_site_and_end_as_they_would_alone(tmp_path: Path, name: str) -> None:
    """The oracle is the same study's run by itself: equal bit for bit, whatever came between its orders."""
    federation = Federation(tmp_path, PLANS[name]())
    alone = Run.open(federation.copied(tmp_path / "alone").run()).model
    other = Federation(tmp_path / "other", PLANS[name]().model_copy(update={"title": "Another study"}))
    programs = OneAtATime(federation)
    second = other.plan.model_copy(update={"roster": federation.plan.roster, "aggregator": federation.plan.aggregator})
    for hospital in federation.hospitals.values():
        hospital.approve(second)
    folders = [
        Run.create(federation.home.runs, plan, "ada", plan.all_sites).folder for plan in (federation.plan, second)
    ]
    meet = threading.Barrier(2, timeout=60)

    class Meeting(FaultyGrid):
        """A grid that sends its first orders to train when the other run does."""

        met = False

        def push_messages(self, messages: Any) -> Any:
            listed = list(messages)
            if not self.met and any(message.metadata.message_type == "train" for message in listed):
                self.met = True
                meet.wait()
            return super().push_messages(listed)

    threads = [threading.Thread(target=federation.run, args=(Meeting(programs.answers), folder)) for folder in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for folder in folders:
        assert read_facts(folder)["label"] == "complete"
        note_missing_ends(federation.home)
    model = Run.open(folders[0]).model
    assert alone is not None and model is not None and (model == alone).all()
    for site in federation.hospitals:
        mine = [run for where, run in programs.log if where == site]
        assert sum(a != b for a, b in itertools.pairwise(mine)) > 1, "one run waited for the other's end"
    ends = [e["facts"]["run"] for e in journal.entries(federation.home.journal.path) if e["kind"] == "run-ended"]
    assert sorted(ends) == sorted(folder.name for folder in folders)


def test_a_site_that_another_run_asks_as_well_is_waited_for_to_the_studys_limit(tmp_path: Path) -> None:
    federation = Federation(tmp_path, study())
    run = Run.open(federation.new_run())
    summing = OpenSumming(federation.grid(), run, federation.home)
    order = federation.hospitals["north"].order()
    calls = {name: rounds.Call(order, federation.node(name)) for name in federation.hospitals}
    for _ in range(2):
        summing.pace.note(dict.fromkeys(calls, order), dict.fromkeys(calls, 0.1), {})
    waited = {site: call.limit_s for site, call in summing._gather(calls, "train").calls.items()}
    assert set(waited) == {"north", "south"} and all(limit < 61 for limit in waited.values())
    other = Run.create(federation.home.runs, federation.plan, "ada", ["south"])
    other.start()
    found = summing._gather(calls, "train").calls
    assert found["south"].busy and found["south"].limit_s > 1e9
    assert not found["north"].busy and found["north"].limit_s < 61
    other.fail("quorum-lost", "over")
    assert not summing._gather(calls, "train").calls["south"].busy


def test_a_busy_site_is_not_left_behind_when_there_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are slower than the linger; the one that may be at another run's work is waited for."""
    monkeypatch.setattr(rounds, "LINGER_S", 0.01)
    monkeypatch.setattr(rounds, "PAUSE_FIRST_S", 0.03)
    federation = Federation(tmp_path, study())
    grid = federation.grid()
    grid.silent_pulls = {1: 6, 2: 12}
    order = federation.hospitals["north"].order(wire.EvaluateOrder)
    for busy, came in ((True, ["north", "south"]), (False, ["north"])):
        given = federation.hospitals["north"].order(wire.EvaluateOrder, sum=2 + busy)
        calls = {"north": rounds.Call(given, 1, busy=True), "south": rounds.Call(given, 2, busy=busy)}
        gathering = rounds.Gathering(grid, calls, 60.0, lambda kind, **facts: None, lambda: True)
        assert [site for site, _ in gathering.reports()] == came
    assert order.round == 1


def test_two_executors_carry_out_two_runs_at_once_each_of_them_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home.found(tmp_path / "c", ServerFile(version=1, name="test", host="127.0.0.1", runs_at_once=2))
    runs = [Run.create(home.runs, run_study(), "ada", ["north"]) for _ in range(3)]
    carried: list[str] = []
    busy, most, starting = [0], [0], [0]
    both = threading.Event()

    def carry_out(root: Path, run_id: str, *_: Any) -> None:
        with executor.starting(root):
            starting[0] += 1
            assert starting[0] == 1, "two processes start runs in Flower at a time"
            time.sleep(0.02)
            starting[0] -= 1
        carried.append(run_id)
        busy[0] += 1
        most[0] = max(most[0], busy[0])
        if busy[0] == 2:
            both.set()
        assert both.wait(10), "the second run waited for the first"
        busy[0] -= 1
        Run.open(home.runs / run_id).fail("quorum-lost", "over")

    class Enough(BaseException):
        """Ends the endless loop of `execute`."""

    def sleep(seconds: float) -> None:
        if len(carried) == 3 and busy[0] == 0:
            raise Enough

    def execute() -> None:
        with pytest.raises(Enough):
            executor.execute(home.root, 1, b"")

    monkeypatch.setattr(executor, "carry_out", carry_out)
    monkeypatch.setattr("fl_server.executor.time", type("Clock", (), {"sleep": staticmethod(sleep)}))
    threads = [threading.Thread(target=execute) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert sorted(carried) == sorted(run.run_id for run in runs) and most == [2]


def test_the_queue_says_how_many_have_to_end_first() -> None:
    assert [ahead(["a", "b", "c", "d"], name, 2) for name in "abcd"] == [0, 0, 1, 2]
    assert [ahead(["a", "b"], name, 1) for name in "ab"] == [0, 1]


def test_runs_show_their_place_beside_others(tmp_path: Path) -> None:
    home = Home.found(tmp_path / "c", ServerFile(version=1, name="test", host="127.0.0.1"))
    path = home.root / "server.yaml"
    path.write_text(path.read_text().replace("# runs_at_once: 2", "runs_at_once: 2"))
    home = Home.open(home.root)
    names = sorted(Run.create(home.runs, run_study(), "ada", ["north"]).run_id for _ in range(3))
    order = [facts["run_id"] for facts in runs_cli.list_runs(home.runs)]
    assert sorted(order) == names and [runs_cli._ahead(home, name) for name in order] == [0, 0, 1]


@pytest.mark.parametrize(("studies", "opened"), [(1, 8), (2, 4)])
def test_a_site_keeps_as_many_studies_in_memory_as_it_permits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, studies: int, opened: int
) -> None:
    """Two studies in turns, three orders each in two splits: with one in memory, images are read at every order."""
    hospital = Hospital.open(tmp_path, "north", study())
    other = study(rounds__2="rounds: 4")
    hospital.approve(other)
    path = hospital.home / "site.yaml"
    more = f"cpu_threads: 1\n  studies_in_memory: {studies}"
    path.write_text(path.read_text().replace("cpu_threads: 0", more))
    calls: list[str] = []
    real = Cohort.open.__func__  # type: ignore[attr-defined]

    def counting(cls: Any, index: Any, labels: Any, plan: Any, split: str, pins: Path) -> Any:
        calls.append(split)
        return real(cls, index, labels, plan, split, pins)

    monkeypatch.setattr(Cohort, "open", classmethod(counting))
    work = functools.partial(site_app.carry_out, site_app.Desk())
    for number in (1, 2):
        for plan, run in ((hospital.study, "run-1"), (other, "run-2")):
            order = hospital.order(wire.EvaluateOrder, study=plan.digest, run=run, sum=number)
            assert work(hospital.site, plan, order).kind == "evaluate-report"
            again = hospital.order(wire.EvaluateOrder, study=plan.digest, run=run, sum=number + 10, split="test")
            work(hospital.site, plan, again)
    assert len(calls) == opened


def test_server_yaml_says_how_many(tmp_path: Path) -> None:
    given = json.dumps({"version": 1, "name": "c", "host": "127.0.0.1", "runs_at_once": 3})
    assert parse(ServerFile, given, "server.yaml").runs_at_once == 3
