"""Real processes, killed with -9 at random while a masked run with differential privacy goes on; lines cut and slowed down too.

    python -m pytest -m slow tests/test_kill_processes.py --kills 50 -s

A supervisor starts again what was killed, as systemd does, and the researcher launches a run again that ended by name. What is
compared afterwards is what must not depend on luck: rounds and who is in them, charges, journals.
"""

import contextlib
import json
import random
import re
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from line import Line
from stage import BIN, Stage
from test_private_round import DISTRIBUTED, private

from fl_server.run import Run
from privacy import accounting, journal
from privacy.journal import Journal
from privacy.ledger import Ledger

pytestmark = [pytest.mark.deploy, pytest.mark.slow, pytest.mark.timeout(3000)]
SITES = {"north": "aurora", "south": "boreal", "east": "cirrus", "west": "aurora"}
ROUND_TIMEOUT_S = 20
DELTA = 0.001


class Shaken(Stage):
    """A stage whose processes die at random. West's line goes through a proxy."""

    def __init__(self, folder: Path, seed: int) -> None:
        super().__init__(folder)
        self.dice = random.Random(seed)
        self.line = Line(self.gateway_port)
        self.done: Counter[str] = Counter()
        self.processes: dict[str, subprocess.Popen[str]] = {}

    def prepare(self) -> None:
        self.found()
        self.processes["coordinator"] = self.serve()
        self.join_researcher()
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda name: self.open_hospital(name, SITES[name], 16), SITES))
        for name in SITES:
            path = self.site(name) / "site.yaml"
            text = yaml.safe_load(path.read_text())
            text["policy"] = (text.get("policy") or {}) | {
                "minimum_patients": 1,
                "delta": DELTA,
                "permit_without_privacy": True,
            }
            text["policy"] |= dict.fromkeys(("epsilon_per_study", "epsilon_per_year", "epsilon_total"), 1000)
            if name == "west":
                text["coordinator"]["gateway"] = f"127.0.0.1:{self.line.port}"
            path.write_text(yaml.safe_dump(text))

    def submit_rounds(self, rounds: int, spare: int) -> str:
        facts = private(DISTRIBUTED).model_dump(mode="json", exclude={"roster", "aggregator"})
        facts["training"]["rounds"] = rounds
        facts["privacy"] |= {"spare_rounds": spare, "noise_multiplier": None}
        facts["participation"] |= {"sites": list(SITES), "quorum": 3, "round_timeout_s": ROUND_TIMEOUT_S}
        path = self.folder / "study.yaml"
        path.write_text(yaml.safe_dump(facts))
        digest = self.submit(path)
        for name in SITES:
            self.approve(name, digest)
        return digest

    def launch(self, digest: str) -> Path:
        found = re.search(r"Run (\S+)", self.study("run", digest, "--detach"))
        assert found
        return self.coordinator / "runs" / found.group(1)

    def revive(self) -> None:
        """Start again what is not running, without waiting until it is ready."""
        for name in ("coordinator", *SITES):
            process = self.processes.get(name)
            if process is None or process.poll() is not None:
                words = ("fl-server", "start") if name == "coordinator" else ("fl-client", "start")
                home = self.coordinator if name == "coordinator" else self.site(name)
                with (self.folder / "logs" / f"{name}.log").open("a") as log:
                    self.processes[name] = subprocess.Popen(
                        [str(BIN / words[0]), words[1], "--home", str(home)],
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        text=True,
                        start_new_session=True,
                    )
                self.running.append(self.processes[name])

    def strike(self) -> bool:
        """Kill one process, or trouble west's line; False if the one that was drawn is not there at the moment."""
        what = self.dice.choice(["coordinator", "executor", "node", "node", "worker", "worker", "cut", "slow"])
        if what in ("cut", "slow"):
            if what == "cut":
                self.line.break_off()
            self.line.delay_s = 0.3
            time.sleep(self.dice.uniform(0.5, 4))
            self.line.mend()
            self.done[what] += 1
            return False  # no kill
        owner = "coordinator" if what in ("coordinator", "executor") else self.dice.choice(list(SITES))
        process = self.processes[owner]
        if process.poll() is not None:
            return False
        victims = [psutil.Process(process.pid)]
        if what in ("executor", "worker"):
            mark = "fl_server.executor" if what == "executor" else "fl_client.sandbox"
            with contextlib.suppress(psutil.Error):
                victims = [child for child in victims[0].children() if mark in " ".join(child.cmdline())]
        if not victims:
            return False
        victims[0].kill()
        self.done[what] += 1
        return True


@pytest.fixture
def shaken(tmp_path: Path) -> Iterator[Shaken]:
    made = Shaken(tmp_path / "stage", seed=8)
    try:
        yield made
    finally:
        made.stop()
        made.line.close()


def state_of(folder: Path) -> str:
    return str(json.loads((folder / "run.json").read_text())["state"])


def test_processes_killed_at_random_lose_no_update_and_spend_no_privacy_twice(
    shaken: Shaken, request: pytest.FixtureRequest
) -> None:
    kills = int(request.config.getoption("--kills"))
    shaken.prepare()
    shaken.revive()
    rounds = 2 * kills
    digest = shaken.submit_rounds(rounds, spare=8 * kills + 20)
    folder, launches, struck, began = shaken.launch(digest), 1, 0, time.monotonic()
    while state_of(folder) in ("queued", "running", "failed"):
        assert time.monotonic() - began < 120 + 45 * kills, (state_of(folder), shaken.done)
        if state_of(folder) == "failed":
            with contextlib.suppress(Exception):  # the coordinator may be down
                shaken.launch(digest)
                launches += 1
        if struck < kills:
            time.sleep(shaken.dice.uniform(0.2, 6))
            struck += shaken.strike()
            time.sleep(shaken.dice.uniform(0.2, 2))
        else:
            time.sleep(0.5)
        shaken.revive()
    seconds = time.monotonic() - began
    figures = check(shaken, folder, rounds)
    print(f"\n{struck} kills {dict(shaken.done)} in {seconds:.0f} s, {launches} launches, {rounds} rounds: {figures}")
    assert struck == kills or state_of(folder) in ("complete", "partial")


def check(shaken: Shaken, folder: Path, rounds: int) -> dict[str, Any]:
    results = json.loads((folder / "results.json").read_text())
    run = Run.open(folder)
    assert run.lost == [] and [entry["round"] for entry in results["rounds"]] == list(range(1, rounds + 1))
    left = {name: reports(shaken.site(name)) for name in SITES}
    lost = sum(
        (entry["round"], entry["attempt"]) not in left[name]
        for entry in results["rounds"]
        for name in entry["contributors"]
    )
    # One site has one part in one round: a second one would be counted twice in the model.
    assert all(len(set(entry["contributors"])) == len(entry["contributors"]) >= 3 for entry in results["rounds"])
    journal.verify(shaken.coordinator / "journal.jsonl")
    twice = charges = trained = 0
    for name in SITES:
        home = shaken.site(name)
        Journal(home / "journal.jsonl")
        journal.verify(home / "journal.jsonl")
        found = charged(home)
        twice += len(found) - len({(e["run"], e["attempt"], e["sum"]) for e in found})
        assert {(e["attempt"], e["sum"]) for e in found} >= sums(home), f"{name} sent what was not charged"
        events = [accounting.PrivacyEvent.from_json(e["event"]) for e in found]
        spent = Ledger(home / "ledger.sqlite", Journal(home / "journal.jsonl")).spendings(DELTA)["total"]
        assert spent.rounds == len(found)
        assert spent.charged == pytest.approx(accounting.epsilon(events, DELTA), rel=1e-6)
        charges, trained = charges + len(found), trained + len(sums(home))
    assert lost == 0 and twice == 0
    attempts = max(entry["attempt"] for entry in results["rounds"])
    parts = sum(len(entry["contributors"]) for entry in results["rounds"])
    return {
        "label": results["label"],
        "attempts": attempts,
        "parts in committed rounds": parts,
        "updates lost": lost,
        "charges": charges,
        "updates sent": trained,
        "ε double-spent": twice,
    }


def facts_of(home: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (home / "journal.jsonl").read_text().splitlines()]
    return [line["facts"] for line in lines if line["kind"] == "train-report"]


def reports(home: Path) -> set[tuple[int, int]]:
    """(round, attempt) of each update that left the site."""
    return {(facts["round"], facts["attempt"]) for facts in facts_of(home)}


def sums(home: Path) -> set[tuple[int, int]]:
    return {(facts["attempt"], facts["sum"]) for facts in facts_of(home)}


def charged(home: Path) -> list[dict[str, Any]]:
    with closing(sqlite3.connect(home / "ledger.sqlite")) as book:
        entries = [json.loads(body) for (body,) in book.execute("SELECT body FROM entries ORDER BY seq")]
    return [entry for entry in entries if entry["kind"] == "reserve"]
