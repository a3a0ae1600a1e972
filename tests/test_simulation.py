"""`fl-study simulate`: one process, several, or Ray's actors give one result; sites lie on the disk until they are asked."""

import contextlib
import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hospital import study
from typer.testing import CliRunner

from fl_client import rehearsal
from fl_server import crew, rehearsal_cli, simulation
from fl_server.crew import CrewGrid, Processes
from fl_server.means import PAYS_FROM, Means
from fl_server.research import app
from fl_server.results import check
from models.study import Study, parse
from privacy import journal
from privacy.errors import RunError

SITES = ("north", "south", "east", "west", "mid")
Tell = Callable[[dict[str, Any]], None]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.documents.parse", functools.cache(parse))
    monkeypatch.setattr("os.fsync", lambda file: None)


def plan_of(sites: tuple[str, ...] = SITES, more: str = "", rounds: int = 2) -> Study:
    text = {"sites__[north, south]": f"sites: [{', '.join(sites)}]", "quorum__2": f"quorum: 3{more}"}
    text |= {"minimum_patients__2": "minimum_patients: 1", "rounds__2": f"rounds: {rounds}"}
    return study(**text, **{"protection: plain": "protection: masked\nnetwork: {name: linear}"})


def run(plan: Study, out: Path, means: Means, tell: Tell = lambda event: None) -> dict[str, Any]:
    results = simulation.simulate(plan, {}, 12, out, tell, means).results
    check(results)
    return results


def model_of(out: Path) -> bytes:
    return next(out.glob("rehearsal-1/coordinator/runs/*/model.safetensors")).read_bytes()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A simulation in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda file: None)
        out = tmp_path_factory.mktemp("alone")
        assert run(plan_of(), out, Means(processes=1))["label"] == "complete"
    return out


@pytest.fixture
def processes() -> Iterator[list[Processes]]:
    """Every crew of processes that the test starts."""
    made: list[Processes] = []
    begin = Processes.__init__

    def kept(self: Processes, *facts: Any) -> None:
        begin(self, *facts)
        made.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Processes, "__init__", kept)
        yield made


def test_two_processes_learn_bit_for_bit_what_one_does(tmp_path: Path, alone: Path, processes: list[Processes]) -> None:
    told: list[dict[str, Any]] = []
    results = run(plan_of(), tmp_path, Means(processes=2), told.append)
    assert len(processes) == 1 and processes[0].size == 2 and processes[0].members == []
    assert results["label"] == "complete"
    assert all(entry["contributors"] == sorted(SITES) for entry in results["rounds"])
    assert model_of(tmp_path) == model_of(alone)
    # What a progress bar is made of came while the run went on, each site's part of each stage.
    assert {event["site"] for event in told if event["event"] == "site"} == set(SITES)


def test_the_rules_hold_in_every_process(tmp_path: Path, processes: list[Processes]) -> None:
    run(plan_of(), tmp_path, Means(processes=2))
    for name in SITES:
        lines = list(journal.entries(tmp_path / "rehearsal-1" / "sites" / name / "journal.jsonl"))
        trained = [line for line in lines if line["kind"] == "train-report"]
        assert len(trained) == 2 and all(line["facts"]["protection"] == "masked" for line in trained)


def test_a_process_that_is_killed_costs_no_more_than_its_sites_their_sum_and_is_replaced(
    tmp_path: Path, processes: list[Processes]
) -> None:
    killed: list[int] = []

    def kill(event: dict[str, Any]) -> None:
        if event["event"] == "round_done" and not killed:
            killed.append(processes[0].pids[1])
            os.kill(killed[0], signal.SIGKILL)

    results = run(plan_of(rounds=3), tmp_path, Means(processes=2), kill)
    assert killed and not psutil.pid_exists(killed[0])
    lost = {name: why for entry in results["rounds"] for name, why in entry["missing"].items()}
    # Its sites had keys of the next sum in that process: they are named, or the sum was begun anew with all of them.
    assert set(lost.values()) <= {"unavailable", "mask-keys-lost", "joining"}
    assert lost or any(entry["attempt"] > 1 for entry in results["rounds"])
    assert results["rounds"][-1]["contributors"] and results["test"]["sites"] == sorted(SITES)


def test_whoever_stops_a_simulation_leaves_no_process_behind(tmp_path: Path, processes: list[Processes]) -> None:
    seen: list[int] = []

    def stop(event: dict[str, Any]) -> None:
        seen.extend(processes[0].pids)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(plan_of(), tmp_path, Means(processes=2), stop)
    assert len(seen) == 2 and not any(psutil.pid_exists(pid) for pid in seen)


def crew_of(program: str, most_s: float, monkeypatch: pytest.MonkeyPatch) -> Processes:
    """One process that does what `program` says with `reader` and `writer`."""
    pipes = (
        "import sys, time; from multiprocessing.connection import Connection;"
        "reader, writer = Connection(int(sys.argv[1]), writable=False), Connection(int(sys.argv[2]), readable=False);"
    )
    monkeypatch.setattr(crew, "MEMBER", pipes + program)
    return Processes(1, most_s)


def taken(members: Processes) -> list[tuple[int, bytes | None]]:
    for _ in range(200):
        if found := members.take(0.1):
            return found
    raise AssertionError("a member neither answered nor was given up")


def test_a_process_that_is_stuck_or_dies_again_and_again_is_never_waited_for_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with contextlib.closing(crew_of("reader.recv_bytes(); time.sleep(3600)", 0.5, monkeypatch)) as members:
        before = members.pids[0]
        members.give(0, b"order")
        assert taken(members) == [(0, None)]
        assert members.pids[0] != before and not psutil.pid_exists(before)
    with contextlib.closing(crew_of("reader.recv_bytes(); sys.exit(3)", 60, monkeypatch)) as members:
        for _ in range(Processes.STARTS_MAX - 1):
            members.give(0, b"order")
            assert taken(members) == [(0, None)]
        members.give(0, b"order")
        with pytest.raises(RunError, match="died 3 times in a row"):
            taken(members)


def test_a_process_that_answers_is_not_counted_as_one_that_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    once = "writer.send_bytes(reader.recv_bytes()[::-1]); reader.recv_bytes(); sys.exit(3)"
    with contextlib.closing(crew_of(once, 60, monkeypatch)) as members:
        for _ in range(Processes.STARTS_MAX + 1):
            members.give(0, b"order")
            assert taken(members) == [(0, b"redro")]
            members.give(0, b"order")
            assert taken(members) == [(0, None)]


def test_orders_of_one_member_wait_for_each_other_and_nobody_is_late(tmp_path: Path) -> None:
    grid = CrewGrid({1: tmp_path}, lambda: None, _Nobody())
    assert grid.clock() == grid.clock() == 0.0 and list(grid.pull_messages(["message-1"])) == []


class _Nobody:
    size = 1

    def give(self, member: int, order: bytes) -> None: ...

    def take(self, timeout_s: float) -> list[tuple[int, bytes | None]]:
        raise AssertionError("nobody works")

    def close(self) -> None: ...


def test_sites_that_are_closed_and_opened_again_learn_the_same(
    tmp_path: Path, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "OPEN_MAX", 2)
    open_at_once: list[int] = []
    opened = rehearsal.Sites.opened

    def counted(self: rehearsal.Sites, home: Path) -> Any:
        site = opened(self, home)
        open_at_once.append(max(len(self.open), len({key[0] for key in self.desk.cohorts})))
        return site

    monkeypatch.setattr(rehearsal.Sites, "opened", counted)
    run(plan_of(), tmp_path, Means(processes=1))
    assert max(open_at_once) == 2
    assert model_of(tmp_path) == model_of(alone)


def test_a_site_that_is_never_asked_is_never_made(tmp_path: Path) -> None:
    many = tuple(f"site-{number}" for number in range(12))
    plan = plan_of(many, ", sample: 3", rounds=1)
    results = run(plan, tmp_path, Means(processes=1))
    asked = {name for occasion in (0, 1, 2) for name in plan.asked(occasion)}
    homes = {path.name: path for path in (tmp_path / "rehearsal-1" / "sites").iterdir()}
    assert set(homes) == set(many) and len(asked) < 12
    for name, home in homes.items():
        assert (home / "site.yaml").exists() == (home / "state").exists() == (name in asked)
    assert results["label"] == "complete" and results["rounds"][0]["asked"] == plan.asked(1)


def test_phantoms_that_were_cut_short_are_made_anew(tmp_path: Path) -> None:
    from privacy import keys

    public = keys.make_key(tmp_path / "c.key").public_key()
    homes = [tmp_path / word / "sites" / "north" for word in ("cut", "whole")]
    for home in homes:
        rehearsal.found(home, "north", (8, 0), public)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="no room"):
        patch.setattr(rehearsal, "ingest", lambda *_: (_ for _ in ()).throw(OSError("no room")))
        rehearsal.Sites().opened(homes[0])
    assert not (homes[0] / "site.yaml").exists()
    found = [rehearsal.Sites().opened(home) for home in homes]
    assert len({(site.state / "index.sqlite").stat().st_size for site in found}) == 1


def test_how_many_processes_there_are_unless_somebody_says() -> None:
    cores = len(os.sched_getaffinity(0))
    many = tuple(f"site-{number}" for number in range(PAYS_FROM))
    assert Means().size(plan_of()) == 1 and Means().size(plan_of(many)) == cores
    assert Means().size(plan_of(many, f", sample: {PAYS_FROM - 1}")) == 1
    assert Means(processes=64).size(plan_of()) == len(SITES)  # nobody waits for a process without sites


def command(folder: Path, *words: str) -> str:
    file = folder / "study.yaml"
    file.write_text(json.dumps(plan_of().model_dump(mode="json", exclude={"roster", "aggregator"})))
    done = CliRunner().invoke(app, ["simulate", str(file), "--out", str(folder / "out"), *words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        return str(done.exception)
    return done.output


def test_many_phantom_sites_are_a_word_of_the_command(tmp_path: Path) -> None:
    shown = command(tmp_path, "--sites", "9", "--sample", "4", "--patients", "8", "--json")
    page = json.loads(shown[shown.index("{") :])
    facts = json.loads(next(tmp_path.glob("out/rehearsal-1/coordinator/runs/*/results.json")).read_text())
    assert len(facts["study"]["participation"]["sites"]) == 9 and facts["study"]["participation"]["sample"] == 4
    assert [len(entry["asked"]) for entry in facts["rounds"]] == [4, 4] and page


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--sites", "9", "--site", "north=/nowhere"], "Give one of the two|names real ones"),
        (["--sample", "2"], "quorum 3 is more than the 2 sites"),
        (["--sites", "4", "--sample", "5"], "5 of 4 training sites cannot be drawn"),
        (["--sites", "9", "--sample", "4", "--compare"], "tested at other sites"),
    ],
)
def test_what_cannot_be_simulated_is_said_before_anything_is_made(
    tmp_path: Path, words: list[str], sentence: str
) -> None:
    import re

    assert re.search(sentence, command(tmp_path, *words))
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_that_comes_where_python_cannot_raise_is_raised_later() -> None:
    class Going:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with rehearsal_cli.stopping() as stop:
        stop()
        going = Going()
        del going  # the exception ends there
        with pytest.raises(KeyboardInterrupt):
            stop()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.deploy
def test_ctrl_c_ends_the_command_and_its_processes(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(json.dumps(plan_of(rounds=500).model_dump(mode="json", exclude={"roster", "aggregator"})))
    words = [sys.executable, "-m", "fl_server.research", "simulate", str(file), "--sites", "4", "--processes", "2"]
    started = subprocess.Popen(
        [*words, "--out", str(tmp_path / "out")], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert started.stdout is not None
        assert any("round 1" in line for line in started.stdout)
        children = psutil.Process(started.pid).children(recursive=True)
        assert len(children) == 2
        os.killpg(started.pid, signal.SIGINT)  # as a terminal does: to everybody in the group
        rest = started.communicate(timeout=120)[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
    assert started.returncode == 130 and "Stopped." in rest
    deadline = time.monotonic() + 30
    while any(child.is_running() for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(child.is_running() for child in children)


@pytest.mark.slow
def test_ray_learns_bit_for_bit_what_one_process_does_and_listens_on_loopback(tmp_path: Path, alone: Path) -> None:
    if importlib.util.find_spec("ray") is None:  # not imported here: Ray reads whom it may hear when it is
        pytest.skip("isocenter[ray] is not installed")
    heard: set[str] = set()

    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "round_done":
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    heard.update(c.laddr.ip for c in child.net_connections("inet") if c.status == psutil.CONN_LISTEN)

    results = run(plan_of(), tmp_path, Means(processes=2, backend="ray"), listen)
    assert results["label"] == "complete" and model_of(tmp_path) == model_of(alone)
    assert heard and heard <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


@pytest.mark.slow
def test_an_actor_of_ray_that_dies_costs_its_sites_their_sum_and_is_replaced(tmp_path: Path) -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("isocenter[ray] is not installed")
    from fl_server.cluster import Actors

    with contextlib.closing(Actors(1, 60.0)) as actors:
        actors.give(0, b"no order at all")
        assert taken(actors) == [(0, None)]  # type: ignore[arg-type]


def test_without_ray_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "Ray, which is not installed" in command(tmp_path, "--backend", "ray", "--patients", "8")
