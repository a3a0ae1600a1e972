"""Simulation beside a plain loop, and what a round costs as the number of sites grows.

`python deploy/bench_sites.py simulation` measures the key `simulation` of bench.json: `fl-study simulate` in one process beside
the same training in a plain loop, in turn, pinned to one core. `python deploy/bench_sites.py sites [N ...]` simulates N sites, of
which a round asks 64 at most, in a process for each core, and measures seconds, bytes and memory of all processes; then what the
coordinator alone does to open a masked sum of N sites; it writes
docs/benchmarks/sites.json and .png. docs/benchmarks.md has the figures and how they were got.
"""

import gc
import json
import os

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}  # before anything imports Flower
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml
from numpy.typing import NDArray

from fl_server import crew, simulation
from fl_server.means import Means
from models.study import Study, parse

SITES = ("alpine", "bayside", "central", "delta")
PATIENTS, ROUNDS, SKIPPED = 190, 8, 2
COUNTS = (4, 16, 64, 256, 1000)
LONGER_PX = 120  # of images whose round takes about as long as the one that the goal was set by
LONGER: dict[str, Any] = {"images": {"size_px": LONGER_PX}}
SAMPLE, FEW, FEW_ROUNDS = 64, 16, 3
ALONE = (4, 16, 64, 256)
"""Sites of which a sum is opened alone; one of 1,000 takes each of them 55 MB of shares, and a machine hours for all."""
PARAMETERS = 100_000
LOOK_S = 0.25
PLOT, HERE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks", Means(processes=1)


def plan_of(sites: tuple[str, ...], rounds: int, more: dict[str, Any], **settings: Any) -> Study:
    text = {
        "name": "bench",
        "title": "Benchmark",
        "purpose": "Seconds per round.",
        "task": {"targets": ["opacity"]},
        "images": {"size_px": 64},
        "training": {"rounds": rounds, "batch_size": 32},
        "privacy": "none",
        "participation": {"sites": list(sites), "quorum": 3} | more,
    }
    return parse(Study, yaml.safe_dump(text | settings), "bench.yaml")


# One process beside a plain loop --------------------------------------------------------------------------------------


def simulated() -> dict[str, Any]:
    """Rounds of masked and plain simulations, each beside the same work in a loop, round by round in this one process."""
    import torch

    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[0]})
    torch.set_num_threads(1)
    found: dict[str, tuple[Times, Times]] = {}
    with tempfile.TemporaryDirectory(prefix="isocenter-bench-") as folder:
        first = Path(folder) / "first"
        simulation.simulate(plan_of(SITES, 1, {}), {}, PATIENTS, first, lambda event: None, HERE)  # makes the phantoms
        homes = {site: first / "rehearsal-1" / "sites" / site for site in SITES}
        settings: dict[str, dict[str, Any]] = {"plain": {"protection": "plain"}, "masked": {}, "longer": LONGER}
        for name, more in settings.items():
            found[name] = _in_turn(plan_of(SITES, ROUNDS, {}, **more), homes, Path(folder) / name)
    where = f"{len(SITES)} sites in one process, one core; median of {ROUNDS - SKIPPED} rounds, each beside one of a plain loop"
    return {
        "simulation": _entry(found["masked"], 0, f"{where}; masked, processor time"),
        "simulation_wall": _entry(found["masked"], 1, f"{where}; masked, elapsed time, journals synced to the disk"),
        "simulation_plain": _entry(found["plain"], 0, f"{where}; protection: plain, processor time"),
        "simulation_1s": _entry(
            found["longer"], 0, f"{where}; masked, images of {LONGER_PX} x {LONGER_PX}, processor time"
        ),
    }


Times = list[tuple[float, float]]
"""Processor seconds and elapsed seconds of each round."""


def _moment() -> tuple[float, float]:
    return time.process_time(), time.monotonic()


def _since(began: tuple[float, float]) -> tuple[float, float]:
    now = _moment()
    return now[0] - began[0], now[1] - began[1]


def _in_turn(plan: Study, homes: dict[str, Path], out: Path) -> tuple[Times, Times]:
    """Rounds of a simulation, and after each of them one of the loop."""
    ours, limit, loop = Times(), Times(), _loop(homes, plan)
    began = _moment()

    def tell(event: dict[str, Any]) -> None:
        nonlocal began
        if event["event"] == "round_done":
            ours.append(_since(began))
            limit.append(next(loop))
            began = _moment()

    simulation.simulate(plan, homes, PATIENTS, out, tell, HERE)
    return ours[SKIPPED:], limit[SKIPPED:]


def _loop(homes: dict[str, Path], plan: Study) -> Iterator[tuple[float, float]]:
    """The same work without a federation: train at each site, average, validate at each. What each round took.

    Cohorts stay open and the network is built once; training and the figures of validation are made by the site's own functions.
    """
    from fl_client.app import evaluated
    from fl_client.rehearsal import cohort
    from models import learning, networks

    net = networks.build(plan)
    cohorts = [(cohort(home, plan, "train"), cohort(home, plan, "validation")) for home in homes.values()]
    model = networks.to_vector(net)
    for number in count(1):
        began = _moment()
        total, cases = np.zeros(model.shape, np.float64), 0
        for train, _ in cohorts:
            networks.load_vector(net, model)
            update = learning.learn(net, train, plan, round_number=number)
            total, cases = total + update.delta * np.float64(update.cases), cases + update.cases
        model = (model + total / cases).astype(np.float32)
        networks.load_vector(net, model)
        for _, validation in cohorts:
            evaluated(net, validation, plan)
        yield _since(began)


def _entry(sides: tuple[Times, Times], which: int, note: str) -> dict[str, Any]:
    ours, limit = (statistics.median(times[which] for times in side) for side in sides)
    return {"ratio": round(ours / limit, 2), "limit_s": round(limit, 3), "ours_s": round(ours, 3), "note": note}


# Cost against the number of sites -------------------------------------------------------------------------------------


class Watch:
    """The largest proportional set size of this process and all below it, looked at while it is entered."""

    def __enter__(self) -> "Watch":
        self.peak, self.over = 0, threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    def _look(self) -> None:
        while not self.over.wait(LOOK_S):
            self.peak = max(self.peak, family_bytes())


def family_bytes() -> int:
    """Memory shared between processes counts once."""
    total, parent = 0, psutil.Process()
    for process in [parent, *parent.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue  # it ended meanwhile
    return total


def federation(number: int, processes: int) -> dict[str, Any]:
    """One masked simulation of `number` sites: what a round took, what went over the wire, and how much memory all of it held."""
    sites = tuple(f"site-{place:04d}" for place in range(1, number + 1))
    part = {"minimum_patients": 1} | ({"sample": SAMPLE} if number > SAMPLE else {})
    plan = plan_of(sites, FEW_ROUNDS, part, training={"rounds": FEW_ROUNDS, "batch_size": 8})
    ends, down, up = list[tuple[float, float]](), list[int](), list[int]()
    tell = _teller(ends)
    with tempfile.TemporaryDirectory(prefix="isocenter-bench-") as folder, _counted(down, up), Watch() as watch:
        began = _now()
        results = simulation.simulate(plan, {}, FEW, Path(folder), tell, Means(processes=processes)).results
        whole = [b - a for a, b in zip(began, _now(), strict=True)]
        made = sum(1 for _ in Path(folder).glob("rehearsal-1/sites/*/site.yaml"))
    seconds = [entry["seconds"] for entry in results["rounds"]]
    asked = [len(entry["asked"]) or number for entry in results["rounds"]]
    reports = sum(asked)
    return {
        "sites": number,
        "asked": asked[0],
        "made": made,
        "label": results["label"],
        "round_s": [round(value, 2) for value in seconds],
        "cpu_s": round(whole[1], 1),
        "whole_s": round(whole[0], 1),
        "peak_mib": round(watch.peak / 2**20),
        "down_bytes": round(sum(down) / reports),
        "up_bytes": round(sum(up) / reports),
    }


def _now() -> tuple[float, float]:
    """Elapsed and processor seconds, those of children that ended included."""
    spent = os.times()
    return time.monotonic(), spent.user + spent.system + spent.children_user + spent.children_system


def _teller(ends: list[tuple[float, float]]) -> Callable[[dict[str, Any]], None]:
    def tell(event: dict[str, Any]) -> None:
        if event["event"] == "round_done":
            ends.append(_now())
            print(f"  round {event['round']}: {event['seconds']} s", file=sys.stderr, flush=True)

    return tell


class _counted:  # noqa: N801  a context, used once
    """While it is entered, the bytes of orders and of replies that cross between the grid and its crew."""

    def __init__(self, down: list[int], up: list[int]) -> None:
        self.down, self.up = down, up

    def __enter__(self) -> None:
        self.give, self.take = crew.Processes.give, crew.Processes.take
        give, take, down, up = self.give, self.take, self.down, self.up

        def giving(members: crew.Processes, member: int, order: bytes) -> None:
            down.append(len(order))
            give(members, member, order)

        def taking(members: crew.Processes, timeout_s: float) -> list[tuple[int, bytes | None]]:
            found = take(members, timeout_s)
            up.extend(len(answer) for _, answer in found if answer is not None)
            return found

        crew.Processes.give, crew.Processes.take = giving, taking  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        crew.Processes.give, crew.Processes.take = self.give, self.take  # type: ignore[method-assign]


def opened(number: int) -> dict[str, Any]:
    """What the coordinator alone does for one masked sum of `number` sites: keys, shares, vectors, opening; processor seconds.

    The sites' halves run too, and are timed apart: a mean for each.
    """
    from cryptography.hazmat.primitives.asymmetric import ec

    from privacy import keys
    from privacy.secagg import Aggregator, Member, Place
    from privacy.sharing import Encoding

    names = [f"site-{place:04d}" for place in range(number)]
    own = {name: ec.generate_private_key(ec.SECP256R1()) for name in names}
    roster = {name: key.public_key() for name, key in own.items()}
    place, encoding = Place("ab" * 32, "bench", 1, 1), Encoding(PARAMETERS, 0, 32, 10, number)
    spent = {"coordinator": dict[str, float](), "site": dict[str, float]()}

    def timed(side: str, stage: str, work: Callable[[], Any]) -> Any:
        began = time.process_time()
        done = work()
        spent[side][stage] = spent[side].get(stage, 0.0) + time.process_time() - began
        return done

    def signer(name: str) -> Callable[[bytes, bytes], bytes]:
        return lambda label, body: keys.sign(own[name], label, body)

    sums = Aggregator(place, roster, 3)
    members = {name: timed("site", "keys", lambda name=name: Member(place, name, signer(name))) for name in names}
    for name, member in members.items():
        timed("coordinator", "keys", lambda name=name, member=member: sums.add_keys(name, member.public))
    data = timed("coordinator", "keys", sums.close_keys)
    for name, member in members.items():
        sealed = timed("site", "shares", lambda member=member: member.share(data, roster))
        timed("coordinator", "shares", lambda name=name, sealed=sealed: sums.add_shares(name, sealed))
    participants, shares = timed("coordinator", "shares", sums.close_shares)
    sums.start(b"order", encoding)
    vouches = {}
    vector: NDArray[np.float32] = np.ones(PARAMETERS, np.float32)
    for name, member in members.items():
        timed("site", "mask", lambda member=member: member.open(participants, shares, b"order", 3))
        masked = encoding.encode(vector, 1, np.zeros(0, np.int64))
        vouches[name] = timed("site", "mask", lambda member=member, masked=masked: member.mask(masked, encoding))
        timed("coordinator", "add", lambda name=name, masked=masked: sums.add_vector(name, masked, vouches[name]))
    survivors = timed("coordinator", "add", sums.close_vectors)
    for name, member in members.items():
        told = timed("site", "reveal", lambda member=member: member.reveal(survivors, sums.vouches, 3))
        timed("coordinator", "open", lambda name=name, told=told: sums.add_revealed(name, told))
    total = timed("coordinator", "open", sums.finish)
    assert np.allclose(encoding.decode(total).values, number)  # noqa: S101  a sum that was opened wrongly is no measurement
    own_s = {stage: round(seconds, 4) for stage, seconds in spent["coordinator"].items()}
    site_s = {stage: round(seconds / number, 5) for stage, seconds in spent["site"].items()}
    return {
        "sites": number,
        "coordinator_s": own_s,
        "site_s": site_s,
        "shares_bytes": len(shares),
        "keys_bytes": len(data),
    }


def sites(counts: tuple[int, ...]) -> dict[str, Any]:
    processes = len(os.sched_getaffinity(0))
    rows = []
    for number in counts:
        print(f"{number} sites", file=sys.stderr, flush=True)
        rows.append(federation(number, processes))
        gc.collect()
    alone = [opened(number) for number in ALONE]
    return {"processes": processes, "patients": FEW, "sample": SAMPLE, "rounds": rows, "opening": alone}


def draw(found: dict[str, Any], out: Path) -> None:
    """The four curves: seconds and bytes of a round, memory of everything, and the opening of a sum by the coordinator."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows, alone = found["rounds"], found["opening"]
    counts = [row["sites"] for row in rows]
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.2), layout="constrained")
    warm = [statistics.median(row["round_s"][1:]) for row in rows]
    axes[0].plot(counts, warm, "o-", color="#1f5f8b")
    axes[0].set_title("seconds of a round")
    axes[1].plot(counts, [row["peak_mib"] for row in rows], "o-", color="#1f5f8b")
    axes[1].set_title("memory of all processes, MiB")
    axes[1].set_ylim(0)
    for key, style in (("down_bytes", "o-"), ("up_bytes", "s--")):
        axes[2].plot(
            counts, [row[key] / 1e6 for row in rows], style, label=key.split("_", maxsplit=1)[0], color="#1f5f8b"
        )
    axes[2].set_title("MB a site and round")
    axes[2].set_ylim(0)
    axes[2].legend(frameon=False)
    own = [sum(entry["coordinator_s"].values()) for entry in alone]
    each = [sum(entry["site_s"].values()) for entry in alone]
    axes[3].plot([entry["sites"] for entry in alone], own, "o-", label="coordinator", color="#1f5f8b")
    axes[3].plot([entry["sites"] for entry in alone], each, "s--", label="each site", color="#1f5f8b")
    axes[3].set_title("one masked sum of all, seconds")
    axes[3].set_yscale("log")
    axes[3].legend(frameon=False)
    for axis in axes:
        axis.set_xscale("log")
        axis.set_xticks(counts, [f"{number:,}" for number in counts])
        axis.minorticks_off()
        axis.set_xlabel("sites")
        axis.spines[["top", "right"]].set_visible(False)
    out.parent.mkdir(exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def main(words: list[str]) -> None:
    if words[:1] == ["sites"]:
        found = sites(tuple(map(int, words[1:])) or COUNTS)
        (PLOT / "sites.json").write_text(json.dumps(found, indent=1) + "\n")
        draw(found, PLOT / "sites.png")
        print(json.dumps(found, indent=1))
    else:
        print(json.dumps(simulated(), indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
