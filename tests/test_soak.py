"""200 rounds, and nothing grows: memory, threads, open files, and what is on the disk beside one line or entry for each round.

    python -m pytest -m slow tests/test_soak.py -s

Once in memory, where every part of the run is one process, and once with real processes on loopback. What is measured in the last
rounds is compared with what was measured after WARM rounds.
"""

import gc
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from federation import Federation
from hospital import STUDY
from stage import Stage

from fl_server.run import Run
from models.study import Study, parse

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]
ROUNDS, WARM = 200, 40
MEMORY_MB_MAX = 24.0  # of a process, from round WARM to the last one: the allocator's own coming and going is about 10
DISK_BYTES_A_ROUND_MAX = 24 * 1024  # of a party's state: lines, orders, records of rounds; models do not add up


def plan(rounds: int, protection: str) -> Study:
    text = STUDY.replace("privacy: none", "privacy: none\nnetwork: {name: linear}")
    text = text.replace("rounds: 2", f"rounds: {rounds}").replace("protection: plain", f"protection: {protection}")
    text = text.replace("sites: [north, south], quorum: 2", "sites: [north, south, east], quorum: 3")
    return parse(Study, text.replace("minimum_patients: 2", "minimum_patients: 1"), "study.yaml")


def size_of(folder: Path) -> int:
    """Bytes of everything below a folder; files may go while they are counted."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() and not path.is_symlink() else 0
        except OSError:
            continue
    return total


def vital(process: psutil.Process) -> dict[str, float]:
    with process.oneshot():
        memory = process.memory_info().rss / 1024**2
        return {"memory_mb": memory, "threads": process.num_threads(), "files": process.num_fds()}


class Watch:
    """What was measured of each party after each round."""

    def __init__(self) -> None:
        self.rows: dict[str, list[dict[str, float]]] = {}

    def note(self, party: str, **figures: float) -> None:
        self.rows.setdefault(party, []).append(figures)

    def judge(self, rounds: int) -> None:
        for party, rows in self.rows.items():
            early, late = rows[0], rows[-1]
            told = ", ".join(f"{name} {early[name]:.0f} -> {late[name]:.0f}" for name in early)
            print(f"{party}: {told}")
        for party, rows in self.rows.items():
            early, late = rows[0], rows[-1]
            for name in early.keys() & {"threads", "files"}:
                assert late[name] <= early[name] + 2, f"{party}: {name} grow"
            if "memory_mb" in early:
                assert late["memory_mb"] <= early["memory_mb"] + MEMORY_MB_MAX, f"{party}: memory grows"
            if "disk" in early:
                assert late["disk"] <= early["disk"] + rounds * DISK_BYTES_A_ROUND_MAX, f"{party}: the disk fills up"


@pytest.mark.parametrize("protection", ["plain", "masked"])
def test_200_rounds_in_one_process(tmp_path: Path, protection: str, monkeypatch: pytest.MonkeyPatch) -> None:
    federation, watch, mine = Federation(tmp_path, plan(ROUNDS, protection)), Watch(), psutil.Process()
    commit = Run.commit

    def counted(self: Run, *given: Any) -> None:
        commit(self, *given)
        done = len(self.history)
        if done in (WARM, ROUNDS):
            gc.collect()
            objects = len(gc.get_objects())
            watch.note("the process", **vital(mine), objects=objects)
            watch.note("coordinator", disk=size_of(federation.home.root))
            for name, hospital in federation.hospitals.items():
                watch.note(name, disk=size_of(hospital.home))

    monkeypatch.setattr(Run, "commit", counted)
    began = time.monotonic()
    folder = federation.run()
    run = Run.open(folder)
    assert run.facts["state"] == "complete" and len(run.history) == ROUNDS
    print(f"\n{ROUNDS} rounds, {protection}, in {time.monotonic() - began:.0f} s")
    watch.judge(ROUNDS - WARM)
    early, late = watch.rows["the process"]
    assert late["objects"] <= early["objects"] + 100 * (ROUNDS - WARM), "objects are kept"


@pytest.mark.deploy
def test_200_rounds_of_real_processes(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    vendors = {"north": "aurora", "south": "boreal", "east": "cirrus"}
    try:
        stage.found()
        processes = {"coordinator": stage.serve()}
        stage.join_researcher()
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda name: stage.open_hospital(name, vendors[name], 16, 1), vendors))
        facts = plan(ROUNDS, "masked").model_dump(mode="json", exclude={"roster", "aggregator"})
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(facts))
        digest = stage.submit(tmp_path / "study.yaml")
        for name in vendors:
            stage.approve(name, digest)
            processes[name] = stage.node(name)
        homes = {"coordinator": stage.coordinator} | {name: stage.site(name) for name in vendors}
        began = time.monotonic()
        found = re.search(r"Run (\S+)", stage.study("run", digest, "--detach"))
        assert found
        folder, watch = stage.coordinator / "runs" / found.group(1), Watch()
        for until in (WARM, ROUNDS):
            while (done := rounds_of(folder)) < until:
                assert time.monotonic() - began < 1500, f"{done} rounds"
                time.sleep(0.1)
            print(f"\n{done} rounds after {time.monotonic() - began:.0f} s", flush=True)
            for name, process in processes.items():
                for member in family(process.pid, name):
                    watch.note(member[0], **vital(member[1]))
                watch.note(f"{name}'s folder", disk=size_of(homes[name]))
        print(f"\n{ROUNDS} rounds of real processes in {time.monotonic() - began:.0f} s")
        watch.judge(ROUNDS - WARM)
    finally:
        stage.stop()


def family(pid: int, name: str) -> list[tuple[str, psutil.Process]]:
    """The process and its child (executor or worker), which keep their places during the run."""
    parent = psutil.Process(pid)
    [child] = parent.children()
    return [(name, parent), (f"the child of {name}", child)]


def rounds_of(folder: Path) -> int:
    """Committed rounds, as events.jsonl tells."""
    path = folder / "events.jsonl"
    return len(re.findall(r'"event": ?"round_done"', path.read_text())) if path.exists() else 0
