"""`make bench`, the part about rounds: real processes on loopback with mutual TLS, beside the same work in one plain process.

round_small, round_densenet: four sites, and everything else, on one core. round_alone: a site on a core of its own, coordinator
and three small sites on another. idle_node: a node that waits. memory: proportional set size of all processes at its highest.
`python deploy/bench_round.py` measures only these; `... small`, `densenet`, `alone`, `idle` or `memory` only one.
"""

import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml
from stage import Stage

LARGE = {"alpine": "aurora", "bayside": "boreal", "central": "cirrus", "delta": "dorado"}
LITTLE = {"eastern": "aurora", "fjord": "boreal", "garden": "cirrus", "harbour": "dorado"}
PATIENTS, FEW = 190, 12
"""About 256 images a site, and about 8 to train on."""
SKIPPED = 2  # the first rounds warm caches on both sides and are not counted
ROUNDS, ROUNDS_DEEP, ROUNDS_LONG = 12, 9, 7
LONG = {"local_epochs": 90, "side": 96}  # half a minute of local work
IDLE_S = 60.0
LOOK_S = 0.1
WARM_S = 10.0  # four workers load torch on one core
HALF_OF_FLOWER_MIB = 1350  # the goal for all processes: half of what the same bed of Flower's took
LIMIT = "the same work in one plain process"


@dataclass
class Bed:
    """A consortium of four large and four little hospitals; nodes are started as a measurement needs them."""

    stage: Stage
    coordinator: "subprocess.Popen[str]"
    nodes: dict[str, "subprocess.Popen[str]"] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, little: bool = True) -> "Bed":
        """`little`: whether the four little hospitals are wanted as well."""
        stage = Stage(folder)
        stage.found()
        bed = cls(stage, stage.serve())
        for group, patients, least in ((LARGE, PATIENTS, 10), (LITTLE if little else {}, FEW, 1)):
            for name, vendor in group.items():
                stage.open_hospital(name, vendor, patients, least)
                path = stage.site(name) / "site.yaml"
                path.write_text(path.read_text().replace("least_protection: masked", "least_protection: plain"))
        stage.join_researcher()
        return bed

    def start(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.nodes:
                self.nodes[name] = self.stage.node(name)
        time.sleep(WARM_S)

    def stop(self) -> None:
        for node in self.nodes.values():
            node.terminate()
        for node in self.nodes.values():
            node.wait()
        self.nodes.clear()

    def run(self, study: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
        """The counted rounds of a finished run of `study`, as results.json has them, and its digest."""
        path = self.stage.folder / "study.yaml"
        path.write_text(yaml.safe_dump(study))
        digest = self.stage.submit(path)
        for name in study["participation"]["sites"]:
            self.stage.approve(name, digest)
        run_id = re.findall(r"Run (\S+)", self.stage.study("run", digest))[0]
        results = json.loads((self.stage.coordinator / "runs" / run_id / "results.json").read_text())
        return results["rounds"][SKIPPED:], digest

    def limit(self, digest: str, sites: Iterable[str], rounds: int) -> dict[str, Any]:
        """What `plain` prints, in a process of its own."""
        words = [sys.executable, __file__, "plain", str(self.stage.folder), digest, str(rounds), *sites]
        found: dict[str, Any] = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
        return found


def measured(wanted: Iterable[str] = ("idle", "small", "memory", "densenet", "alone")) -> dict[str, Any]:
    """The entries of bench.json. Everything runs on one core, but for what `alone` says."""
    parts: dict[str, Callable[[Bed], dict[str, Any]]] = {
        "idle": idle,
        "small": small,
        "memory": memory,
        "densenet": densenet,
        "alone": alone,
    }
    with on_core(0), tempfile.TemporaryDirectory(prefix="isocenter-bench-") as folder:
        bed = Bed.open(Path(folder) / "stage", little=bool({"densenet", "alone"} & {*wanted}))
        try:
            report: dict[str, Any] = {}
            for name in wanted:
                report |= parts[name](bed)
            return report
        finally:
            bed.stage.stop()


@contextlib.contextmanager
def on_core(number: int) -> Iterator[None]:
    """Stay on one core, the last one if there are not so many; processes that are started meanwhile stay there for good."""
    before = os.sched_getaffinity(0)
    cores = sorted(all_cores())
    os.sched_setaffinity(0, {cores[min(number, len(cores) - 1)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def all_cores() -> set[int]:
    return set(psutil.Process().cpu_affinity() or []) | set(range(os.cpu_count() or 1))


def made_study(sites: Iterable[str], rounds: int, side: int = 64, **more: Any) -> dict[str, Any]:
    training = {"rounds": rounds, "batch_size": 32} | more.pop("training", {})
    return {
        "name": "bench",
        "title": "Benchmark",
        "purpose": "Seconds per round.",
        "task": {"targets": ["opacity"]},
        "images": {"size_px": side},
        "training": training,
        "privacy": "none",
        "participation": {"sites": list(sites), "quorum": len(list(sites)), "minimum_patients": 1},
    } | more


def entry(ours: list[float], limit: list[float], note: str) -> dict[str, Any]:
    seconds, least = statistics.median(ours), statistics.median(limit)
    return {"ratio": round(seconds / least, 2), "limit_s": round(least, 3), "ours_s": round(seconds, 3), "note": note}


def seconds_of(rounds: list[dict[str, Any]]) -> list[float]:
    return [float(done["seconds"]) for done in rounds]


def small(bed: Bed) -> dict[str, Any]:
    """The small network: masked and plain, and the limit."""
    bed.start(LARGE)
    masked, digest = bed.run(made_study(LARGE, ROUNDS))
    open_, _ = bed.run(made_study(LARGE, ROUNDS, protection="plain"))
    bed.stop()
    limit = bed.limit(digest, LARGE, ROUNDS)["seconds"]
    where = f"{len(LARGE)} sites of about 256 images of 64 x 64, one core; median of {ROUNDS - SKIPPED} rounds"
    return {
        "round_small": entry(seconds_of(masked), limit, f"{where}; masked, beside {LIMIT}"),
        "round_small_masked": entry(
            seconds_of(masked), seconds_of(open_), f"{where}; masked, beside the same study plain"
        ),
    }


def densenet(bed: Bed) -> dict[str, Any]:
    """DenseNet121 and a batch of eight: nearly all of a round is the way of 7 million weights down and up."""
    deep = {"network": {"name": "densenet121"}}
    bed.start(LITTLE)
    with Watching(bed.nodes) as watching:
        wide, digest = bed.run(made_study(LITTLE, ROUNDS_DEEP, **deep))
    narrow, _ = bed.run(made_study(LITTLE, ROUNDS_DEEP, encoding_bits=16, **deep))
    bed.stop()
    limit = bed.limit(digest, LITTLE, ROUNDS_DEEP)
    where = f"{len(LITTLE)} sites of about 8 images of 64 x 64, one core; median of {ROUNDS_DEEP - SKIPPED} rounds"
    model = limit["model_mib"]
    above = [round((anonymous - limit["anonymous_mib"]) / model, 1) for anonymous in watching.anonymous.values()]
    return {
        "round_densenet": entry(seconds_of(wide), limit["seconds"], f"DenseNet121, {where}; masked, beside {LIMIT}"),
        "round_densenet_16_bits": entry(seconds_of(narrow), limit["seconds"], "the same with encoding_bits: 16"),
        "memory_densenet": {
            "node_mib": list(watching.anonymous.values()),
            "plain_mib": limit["anonymous_mib"],
            "model_mib": model,
            "models_above_plain": above,
            "note": "memory that no file backs, at its highest: node with its worker, and one plain process",
        },
    }


def alone(bed: Bed) -> dict[str, Any]:
    """One large site on the second core; the coordinator and three little sites, which wait for it, on the first."""
    with on_core(1):
        bed.start(["alpine"])
    sites = ["alpine", *[name for name in LITTLE if name != "eastern"]]
    bed.start(sites)
    short, digest = bed.run(made_study(sites, ROUNDS_DEEP))
    training = {"local_epochs": LONG["local_epochs"]}
    long, longer = bed.run(made_study(sites, ROUNDS_LONG, LONG["side"], training=training))
    bed.stop()
    with on_core(1):
        least = bed.limit(digest, ["alpine"], ROUNDS_DEEP)["seconds"]
        most = bed.limit(longer, ["alpine"], ROUNDS_LONG)["seconds"]
    where = "a site on a core of its own, masked with three others; coordinator on another core"
    one = entry(seconds_of(short), least, f"{where}; median of {ROUNDS_DEEP - SKIPPED} rounds")
    return {
        "round_alone": one | {"waits_s": round(one["ours_s"] - one["limit_s"], 3)},
        "round_alone_long": entry(
            seconds_of(long), most, f"the same with more local work; median of {len(long)} rounds"
        ),
    }


def idle(bed: Bed) -> dict[str, Any]:
    """Processor time of a connected node and its worker while nothing happens."""
    bed.start(["alpine"])
    process = psutil.Process(bed.nodes["alpine"].pid)
    family = [process, *process.children(recursive=True)]

    def spent() -> float:
        return sum(each.cpu_times().user + each.cpu_times().system for each in family)

    before, began = spent(), time.monotonic()
    time.sleep(IDLE_S)
    used, passed = spent() - before, time.monotonic() - began
    bed.stop()
    note = f"share of a core of a node and its worker, connected, over {IDLE_S:.0f} s"
    return {"idle_node": {"share": round(used / passed, 5), "cpu_s": round(used, 3), "note": note}}


def memory(bed: Bed) -> dict[str, Any]:
    """All processes of the four large sites and the coordinator during a masked run of the small network."""
    bed.start(LARGE)
    with Watching({"coordinator": bed.coordinator} | bed.nodes) as watching:
        bed.run(made_study(LARGE, SKIPPED + 3))
    bed.stop()
    peaks = watching.peaks
    return {
        "memory": {
            "coordinator_mib": peaks.pop("coordinator"),
            "node_mib": list(peaks.values()),
            "all_mib": watching.together,
            "goal_mib": HALF_OF_FLOWER_MIB,
            "floor_mib": floor(),
            "note": "proportional set size at its highest; floor: four bare processes that imported torch, and six flwr",
        }
    }


def floor() -> int:
    """What the interpreters alone take: a process for each of ours, with nothing but torch in workers and flwr in the others."""
    wait = "; import sys; print('ready', flush=True); sys.stdin.read()"
    programs = ["import flwr.app" + wait] * (2 + len(LARGE)) + ["import torch" + wait] * len(LARGE)
    started = [
        subprocess.Popen([sys.executable, "-c", text], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for text in programs
    ]
    try:
        for process in started:
            if process.stdout is not None:
                process.stdout.readline()
        return round(sum(rollup(process.pid)["Pss"] for process in started) / 1024)
    finally:
        for process in started:
            process.kill()
            process.wait()


class Watching:
    """While it is entered, looks at the memory of processes and their children, in MiB; highest of each, and of all together."""

    def __init__(self, processes: dict[str, "subprocess.Popen[str]"]) -> None:
        self.processes = {name: psutil.Process(process.pid) for name, process in processes.items()}
        self.peaks, self.anonymous, self.together = dict[str, int](), dict[str, int](), 0
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "Watching":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    def _look(self) -> None:
        while not self.over.wait(LOOK_S):
            shares, alone = dict[str, int](), dict[str, int]()
            for name, process in self.processes.items():
                family = [rollup(each.pid) for each in (process, *process.children(recursive=True))]
                shares[name] = round(sum(each.get("Pss", 0) for each in family) / 1024)
                alone[name] = round(sum(each.get("Anonymous", 0) for each in family) / 1024)
            self.peaks = {name: max(found, self.peaks.get(name, 0)) for name, found in shares.items()}
            self.anonymous = {name: max(found, self.anonymous.get(name, 0)) for name, found in alone.items()}
            self.together = max(self.together, sum(shares.values()))


def rollup(pid: int) -> dict[str, int]:
    """Kilobytes of /proc/PID/smaps_rollup by name; nothing of a process that has gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return {}
    return {line.split(":")[0]: int(line.split()[1]) for line in lines}


def plain(folder: Path, digest: str, rounds: int, names: list[str]) -> dict[str, Any]:
    """The same work in this process alone: train at each site, average, validate at each; seconds of each counted round."""
    import numpy as np
    import torch

    from fl_client.app import Desk
    from fl_client.consent import approved
    from fl_client.site import Site
    from models import learning, networks

    torch.set_num_threads(1)
    sites = [Site.open(folder / "sites" / name) for name in names]
    plan = approved(sites[0].home, digest, sites[0].coordinator)
    desk, net = [Desk() for _ in sites], networks.build(plan)
    cohorts = [(d.cohort(s, plan, "train"), d.cohort(s, plan, "validation")) for d, s in zip(desk, sites, strict=True)]
    model, seconds, over, most = networks.to_vector(net), list[float](), threading.Event(), [0]

    def look() -> None:
        while not over.wait(LOOK_S):
            most.append(rollup(os.getpid())["Anonymous"])

    watching = threading.Thread(target=look)
    watching.start()
    for number in range(1, rounds + 1):
        began = time.monotonic()
        total, cases = np.zeros(model.shape, np.float64), 0
        for train, _ in cohorts:
            networks.load_vector(net, model)
            update = learning.learn(net, train, plan, round_number=number)
            total, cases = total + update.delta * np.float64(update.cases), cases + update.cases
        model = (model + total / cases).astype(np.float32)
        networks.load_vector(net, model)
        for _, validation in cohorts:
            learning.predict(net, validation)
        seconds.append(time.monotonic() - began)
        if number == SKIPPED:  # to look at memory slows down what is measured from here on
            over.set()
            watching.join()
    peaks = {"anonymous_mib": round(max(most) / 1024), "model_mib": round(model.nbytes / 2**20, 1)}
    return {"seconds": seconds[SKIPPED:], "images": [len(train) for train, _ in cohorts]} | peaks


if __name__ == "__main__":
    if sys.argv[1:2] == ["plain"]:
        print(json.dumps(plain(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.argv[5:])))
    else:
        print(json.dumps(measured(*([sys.argv[1:]] if sys.argv[1:] else [])), indent=1))
