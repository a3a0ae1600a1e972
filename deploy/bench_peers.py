"""Other frameworks on the workload of round_small, each beside the same training in a plain process: docs/benchmarks/peers.json.

    python3 -m venv build/peers
    build/peers/bin/pip install -c constraints.txt -r deploy/peers/requirements.txt -e .
    build/peers/bin/python deploy/bench_peers.py

measures all of them, and with words of PEERS or `isocenter` only those. This is no part of `make bench`: it needs a package index
and two gigabytes. The sites' cohorts are those of the bed of bench_round.py, read once and handed to every framework as tensors
(deploy/peers/workload.py). Everything runs on one core. Rounds count from the second on; the last is watched for memory instead.
"""

import ctypes
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from bench_round import LARGE, SKIPPED, Bed, Watching, all_cores, made_study, on_core, rollup
from stage import BIN, free_port

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "peers"))
import workload  # noqa: E402

OUT = HERE.parent / "docs" / "benchmarks" / "peers.json"
ROUNDS = 7  # the first is not counted, the last is watched for memory
READY_S = 15.0  # that Flower's SuperLink may take to open its port
SUBREAPER = 36  # prctl(2): what a framework leaves behind stays below this process, and is counted and ended
SETTINGS = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}
TLS = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes -days 2 -subj /CN=127.0.0.1"
TLS += " -addext subjectAltName=IP:127.0.0.1 -keyout {folder}/server.key -out {folder}/server.pem"


class Bench:
    """A folder with the sites' tensors, in which one framework after the other runs, and the commands it took."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.commands = folder, list[str]()
        self.ports, self.pss, self.others = [free_port() for _ in range(5)], 0, set[int]()
        places = {"FLWR_HOME": str(folder / "flwr"), "NVFLARE_POC_WORKSPACE": str(folder / "poc")}
        found = {"PYTHONPATH": str(HERE / "peers"), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
        self.environment = os.environ | SETTINGS | places | found
        (folder / "root").write_text(str(os.getpid()))

    def start(self, command: str) -> "subprocess.Popen[bytes]":
        """Start a command, its output in FOLDER/log; folders and ports are put in."""
        self.commands.append(command)
        with (self.folder / "log").open("ab") as log:
            words = [self.filled(word) for word in shlex.split(command)]
            return subprocess.Popen(words, stdout=log, stderr=log, env=self.environment)

    def filled(self, text: str) -> str:
        return text.format(folder=self.folder, deploy=HERE, port=self.ports)

    def run(self, command: str) -> None:
        if self.start(command).wait():
            raise RuntimeError(f"{command}\n{(self.folder / 'log').read_text()[-3000:]}")

    def marks(self) -> list[dict[str, float]]:
        path = self.folder / "marks.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @contextmanager
    def fresh(self) -> Iterator[None]:
        """No marks, no log, no commands; at the end nothing that was started is left."""
        for name in ("marks.jsonl", "log"):
            (self.folder / name).unlink(missing_ok=True)
        self.commands, self.pss, self.others = (
            [],
            0,
            {process.pid for process in psutil.Process().children(recursive=True)},
        )
        over = threading.Event()
        watching = threading.Thread(target=self._watch, args=(over,))
        watching.start()
        try:
            yield
        finally:
            over.set()
            watching.join()
            while left := self.family():
                for process in left:
                    with suppress(psutil.NoSuchProcess):
                        process.kill()
                psutil.wait_procs(left)

    def family(self) -> list[psutil.Process]:
        """What was started since the bench is fresh, and runs."""
        return [process for process in psutil.Process().children(recursive=True) if process.pid not in self.others]

    def _watch(self, over: threading.Event) -> None:
        """The largest sum of proportional set sizes, in MiB, once the counted rounds are over."""
        while not over.wait(0.3):
            if len(self.marks()) >= ROUNDS:
                found = [rollup(process.pid).get("Pss", 0) for process in self.family()]
                self.pss = max(self.pss, sum(found) // 1024)


def flower(bench: Bench) -> None:
    """Flower's deployment with TLS and authenticated nodes."""
    _flower_app(bench, '[superlink.bed]\naddress = "127.0.0.1:{port[0]}"\nroot-certificates = "{folder}/server.pem"\n')
    bench.run(TLS)
    ends = "--ssl-certfile {folder}/server.pem --ssl-keyfile {folder}/server.key --ssl-ca-certfile {folder}/server.pem"
    offline = "--disable-runtime-dependency-installation"
    bench.start(f"flower-superlink --port {{port[0]}} {ends} --enable-supernode-auth {offline}")
    time.sleep(READY_S)
    link = "--superlink 127.0.0.1:{port[0]} --root-certificates {folder}/server.pem"
    for place, _ in enumerate(workload.SITES):
        key = f"{{folder}}/key-{place}"
        bench.run(f"ssh-keygen -q -t ecdsa -b 384 -N '' -f {key}")
        bench.run(f"flwr supernode register {key}.pub bed")
        own = f"--auth-supernode-private-key {key} --port {{port[{place + 1}]}} --node-config partition-id={place}"
        bench.start(f"flower-supernode {link} {own}")
    bench.run(f"flwr run {{folder}}/app bed --stream --run-config 'folder=\"{{folder}}\" rounds={ROUNDS}'")


def flower_on_ray(bench: Bench) -> None:
    """Flower's simulation, every client an actor with the one CPU."""
    _flower_app(bench, '[superlink.bed]\naddress = ":local:"\n')
    means = (
        f"--federation-config 'num-supernodes={len(workload.SITES)} client-resources-num-cpus=1 init-args-num-cpus=1'"
    )
    bench.run(f"flwr run {{folder}}/app bed --stream {means} --run-config 'folder=\"{{folder}}\" rounds={ROUNDS}'")


def _flower_app(bench: Bench, connection: str) -> None:
    """FOLDER/app, and the connection `bed` in Flower's own settings."""
    shutil.copytree(HERE / "peers" / "flower", bench.folder / "app", dirs_exist_ok=True)
    shutil.copy(workload.__file__, bench.folder / "app")
    (bench.folder / "flwr").mkdir(exist_ok=True)
    (bench.folder / "flwr" / "config.toml").write_text(bench.filled(connection))


def nvflare(bench: Bench) -> None:
    """NVFlare's simulator, a process for each site."""
    bench.run(f"python {{deploy}}/peers/nvflare_job.py {{folder}} {ROUNDS + 1} simulator")


def nvflare_poc(bench: Bench) -> None:
    """NVFlare's proof-of-concept federation: server and four clients with mutual TLS."""
    bench.run(f"python {{deploy}}/peers/nvflare_job.py {{folder}} {ROUNDS + 1} poc")


PEERS: dict[str, Callable[[Bench], None]] = {
    "nvflare": nvflare,
    "nvflare_poc": nvflare_poc,
    "flower_on_ray": flower_on_ray,
    "flower": flower,
}


def main(wanted: list[str]) -> None:
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    with on_core(0), tempfile.TemporaryDirectory(prefix="isocenter-peers-") as name:
        folder = Path(name)
        bench = Bench(folder)
        bed = Bed.open(folder / "stage", little=False)
        try:
            hand_over(bed, folder)
            if not wanted or "isocenter" in wanted:
                before, (ours, memory), after = limit(bench), isocenter(bed), limit(bench)
                note("isocenter", row(ours, before + after) | {"memory_mib": memory})
        finally:
            bed.stage.stop()
        for peer in [peer for peer in PEERS if not wanted or peer in wanted]:
            before, (theirs, more), after = limit(bench), measured(bench, PEERS[peer]), limit(bench)
            note(peer, row(theirs, before + after) | more)


def note(name: str, entry: dict[str, Any]) -> None:
    """Write one row, with when and in what surroundings it was measured."""
    kept = json.loads(OUT.read_text()) if OUT.exists() else {}
    kept.setdefault("rounds", {})[name] = entry | surroundings()
    OUT.write_text(json.dumps(kept, indent=1) + "\n")
    print(name, json.dumps(entry, indent=1), flush=True)


Rounds = list[tuple[float, float]]
"""Of each counted round: seconds elapsed, processor seconds of all processes."""


def measured(bench: Bench, peer: Callable[[Bench], None]) -> tuple[Rounds, dict[str, Any]]:
    with bench.fresh():
        peer(bench)
        marks, commands = bench.marks(), bench.commands
    return between(marks)[1 : ROUNDS - 1], {"memory_mib": bench.pss, "commands": commands}


def between(marks: list[dict[str, float]]) -> Rounds:
    return [(later["at"] - one["at"], later["processor"] - one["processor"]) for one, later in pairwise(marks)]


def limit(bench: Bench) -> Rounds:
    """The same training in one plain process."""
    with bench.fresh():
        bench.run(f"python {{deploy}}/bench_peers.py plain {{folder}} {ROUNDS}")
        return between(bench.marks())[1 : ROUNDS - 1]


def isocenter(bed: Bed) -> tuple[Rounds, int]:
    """Ours, masked: elapsed as its results have it; processor time is the difference of a long run and a short one. And MiB."""
    bed.start(LARGE)
    with Watching({"coordinator": bed.coordinator} | bed.nodes) as watching:
        bed.run(made_study(LARGE, SKIPPED + 1))
    used = []
    for rounds in (SKIPPED, SKIPPED + ROUNDS):
        before = workload.processor_seconds(os.getpid())
        counted, _ = bed.run(made_study(LARGE, rounds))
        used.append(workload.processor_seconds(os.getpid()) - before)
    bed.stop()
    return [(float(done["seconds"]), (used[1] - used[0]) / ROUNDS) for done in counted], watching.together


def hand_over(bed: Bed, folder: Path) -> None:
    """The sites' cohorts as tensors, and the study."""
    from fl_client.app import Desk
    from fl_client.site import Site
    from models.study import Study, parse

    text = json.dumps(made_study(LARGE, ROUNDS))
    (folder / "study.json").write_text(text)
    study = parse(Study, text, "the study")
    for name in LARGE:
        site, desk = Site.open(bed.stage.site(name)), Desk()
        workload.save(folder, name, {split: desk.cohort(site, study, split) for split in workload.SPLITS})


def row(rounds: Rounds, plain: Rounds) -> dict[str, Any]:
    elapsed, used, plain_elapsed, plain_used = (
        statistics.median(one[part] for one in side) for side in (rounds, plain) for part in (0, 1)
    )
    return {
        "ratio": round(elapsed / plain_elapsed, 2),
        "ratio_processor": round(used / plain_used, 2),
        "round_s": round(elapsed, 2),
        "round_processor_s": round(used, 2),
        "limit_s": round(plain_elapsed, 3),
        "limit_processor_s": round(plain_used, 3),
        "rounds": len(rounds),
    }


def surroundings() -> dict[str, Any]:
    packages = {name: version(name) for name in ("flwr", "ray", "nvflare", "torch", "opacus")}
    return {
        "python": platform.python_version(),
        "load": round(os.getloadavg()[1], 1),
        "cores": len(all_cores()),
    } | packages


if __name__ == "__main__":
    if sys.argv[1:2] == ["plain"]:
        workload.plain(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main(sys.argv[1:])
