"""`make bench`: what the federation costs beside the same work without it. Writes bench.json.

round_small: a round beside the same training in one plain process. mask_keystream: masks over a large update beside their
cipher alone; `python deploy/bench.py masks` prints only that, in seconds. indexing, decode, loader: see deploy/bench_data.py;
bytes: deploy/bench_bytes.py.

Both sides of a ratio are measured on this machine in one run, pinned to one core, in turn; the ratio of their medians is what
counts, because machines differ and are noisy. docs/benchmarks.md has the figures and how they were got.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import yaml
from stage import BIN, Stage

SITES = {"alpine": "aurora", "bayside": "boreal", "central": "cirrus", "delta": "dorado"}
PATIENTS, ROUNDS, SKIPPED = 190, 12, 2
"""About 256 images a site; the first rounds warm caches on both sides and are not counted."""
MASKS, PARAMETERS, MASK_RUNS = 8, 7_000_000, 15
KEYSTREAM_BLOCK = 256 * 1024  # bytes a call: AES is no faster with more or less


def main() -> None:
    import bench_bytes
    from bench_data import measured

    data = measured()  # on all cores, which is how a hospital indexes
    pin()
    keystream = masks()
    with tempfile.TemporaryDirectory(prefix="isocenter-bench-") as folder:
        stage = Stage(Path(folder) / "stage")
        try:
            report = measure(stage) | {"mask_keystream": keystream} | data
        finally:
            stage.stop()
    report["bytes"] = bench_bytes.measured()
    Path("bench.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def pin() -> None:
    """Stay on one core; children inherit it."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[0]})


def measure(stage: Stage) -> dict[str, Any]:
    """One consortium, the same study masked and plain, then the same work in one process; seconds of a round of each."""
    stage.found()
    coordinator = stage.serve()
    for name, vendor in SITES.items():
        stage.open_hospital(name, vendor, PATIENTS)
        path = stage.site(name) / "site.yaml"
        path.write_text(path.read_text().replace("least_protection: masked", "least_protection: plain"))
    stage.join_researcher()
    nodes = [stage.node(name) for name in SITES]
    time.sleep(10)  # four workers import torch on one core
    masked, _ = federated(stage, "masked")
    memory = {"coordinator_mib": family_mib(coordinator), "node_mib": [family_mib(node) for node in nodes]}
    open_, digest = federated(stage, "plain")
    stage.stop()
    command = [sys.executable, __file__, "plain", str(stage.folder), digest]
    alone = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)[SKIPPED:]
    where = f"{len(SITES)} sites, real processes, mutual TLS, one core; median of {ROUNDS - SKIPPED} rounds"
    return {
        "round_small": entry(masked, alone, f"{where}; masked, beside the same work in one plain process"),
        "round_small_masked": entry(masked, open_, f"{where}; masked, beside the same study plain"),
        "memory": memory,
        "start": {"fl_client_help_s": round(median_seconds([str(BIN / "fl-client"), "--help"]), 2)},
    }


def federated(stage: Stage, protection: str) -> tuple[list[float], str]:
    """Seconds of each counted round of the study under one protection, and its digest."""
    path = stage.folder / f"{protection}.yaml"
    path.write_text(yaml.safe_dump(study() | {"protection": protection}))
    digest = stage.submit(path)
    for name in SITES:
        stage.approve(name, digest)
    run_id = re.findall(r"Run (\S+)", stage.study("run", digest))[0]
    results = json.loads((stage.coordinator / "runs" / run_id / "results.json").read_text())
    return [done["seconds"] for done in results["rounds"]][SKIPPED:], digest


def entry(ours: list[float], limit: list[float], note: str) -> dict[str, Any]:
    seconds, least = statistics.median(ours), statistics.median(limit)
    return {"ratio": round(seconds / least, 2), "limit_s": round(least, 3), "ours_s": round(seconds, 3), "note": note}


def study() -> dict[str, Any]:
    return {
        "name": "bench",
        "title": "Benchmark",
        "purpose": "Seconds per round.",
        "task": {"targets": ["opacity"]},
        "images": {"size_px": 64},
        "training": {"rounds": ROUNDS, "batch_size": 32},
        "privacy": "none",
        "participation": {"sites": list(SITES), "quorum": len(SITES)},
    }


def plain(folder: Path, digest: str) -> list[float]:
    """Seconds of each round of the same work in this process alone: train at each site, average, validate at each."""
    import numpy as np
    import torch

    from fl_client.app import Desk
    from fl_client.consent import approved
    from fl_client.site import Site
    from models import learning, networks

    torch.set_num_threads(1)
    sites = [Site.open(folder / "sites" / name) for name in SITES]
    plan = approved(sites[0].home, digest, sites[0].coordinator)
    desk, net = [Desk() for _ in sites], networks.build(plan)
    cohorts = [(d.cohort(s, plan, "train"), d.cohort(s, plan, "validation")) for d, s in zip(desk, sites, strict=True)]
    model, seconds = networks.to_vector(net), []
    for number in range(1, ROUNDS + 1):
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
    return seconds


def masks() -> dict[str, Any]:
    """Masks of eight peers over one update, as a site adds them, beside AES-256-CTR of as many bytes into a small buffer.

    In processor time of this process, which is elapsed time on a core that nobody else uses.
    """
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    from privacy.sharing import Encoding, add_masks

    vector = Encoding(PARAMETERS, 0, 32, 0, MASKS + 1).zeros()
    chosen = [(os.urandom(32), 1 if place % 2 else -1) for place in range(MASKS)]
    source, sink = bytes(KEYSTREAM_BLOCK), bytearray(KEYSTREAM_BLOCK)
    ours, limit = [], []
    for _ in range(MASK_RUNS):
        began = time.process_time()
        add_masks(vector, chosen)
        ours.append(time.process_time() - began)
        began = time.process_time()
        for key, _ in chosen:
            stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
            whole, rest = divmod(vector.values.nbytes + vector.counts.nbytes, KEYSTREAM_BLOCK)
            for _ in range(whole):
                stream.update_into(source, sink)
            stream.update_into(source[:rest], sink)
        limit.append(time.process_time() - began)
    return {
        "ratio": round(statistics.median(ours) / statistics.median(limit), 2),
        "limit_s": round(statistics.median(limit), 4),
        "ours_s": round(statistics.median(ours), 4),
        "note": f"{MASKS} masks over {PARAMETERS:,} float32 parameters, one core; median of {MASK_RUNS}",
    }


def family_mib(process: subprocess.Popen[str]) -> int:
    """Proportional set size of a process and its children: memory shared between them counts once."""
    parent = psutil.Process(process.pid)
    return round(sum(p.memory_full_info().pss for p in [parent, *parent.children(recursive=True)]) / 2**20)


def median_seconds(words: list[str]) -> float:
    def once() -> float:
        began = time.monotonic()
        subprocess.run(words, capture_output=True, check=True)
        return time.monotonic() - began

    return statistics.median(once() for _ in range(5))


if __name__ == "__main__":
    if sys.argv[1:2] == ["plain"]:
        print(json.dumps(plain(Path(sys.argv[2]), sys.argv[3])))
    elif sys.argv[1:2] == ["masks"]:
        pin()
        print(json.dumps({"mask_keystream": masks()}, indent=1))
    else:
        main()
