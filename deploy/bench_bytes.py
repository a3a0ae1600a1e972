"""Bytes of a masked round on the wire, beside the model down and the vector up alone.

`python deploy/bench_bytes.py` measures only this; with the word `line`, how much longer a round over a slow line takes than over
loopback, beside what `fl_server.costs` says of it. Everything is counted between the nodes and the gateway, below TLS: orders,
reports, keys, shares, heartbeats, looks for orders, heads, TLS records. The same study with few and with more rounds: their
difference is what a round costs, without joining, the first keys, the last validation and the test.
"""

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from relay import Relay
from stage import Stage

SITES = {"alpine": "aurora", "bayside": "boreal", "central": "cirrus", "delta": "dorado"}
PATIENTS = 100
CASES = {
    "small_cnn": ("small_cnn", 32, (2, 8)),
    "densenet121": ("densenet121", 32, (1, 4)),
    "densenet121_16_bits": ("densenet121", 16, (1, 4)),
}
"""Name -> network, bits of a value on its way up, rounds of the two runs."""


def main() -> None:
    print(json.dumps({"bytes": measured()}, indent=1))


def measured() -> dict[str, Any]:
    """The entry of bench.json: the ratio of the largest network there is in it, and each case."""
    with tempfile.TemporaryDirectory(prefix="isocenter-bench-") as folder:
        stage = Stage(Path(folder) / "stage")
        try:
            line = opened(stage)
            cases = {name: _case(stage, line, *facts) for name, facts in CASES.items()}
        finally:
            stage.stop()
    note = f"per site and round, {len(SITES)} sites, masked, real processes, below TLS; densenet121, 32 bits"
    return {key: cases["densenet121"][key] for key in ("ratio", "limit_bytes", "ours_bytes")} | {
        "note": note,
        "cases": cases,
    }


def opened(stage: Stage) -> Relay:
    """A consortium whose nodes reach the gateway over one line."""
    stage.found()
    stage.serve()
    line = Relay(stage.gateway_port)
    line.start()
    for name, vendor in SITES.items():
        stage.open_hospital(name, vendor, PATIENTS)
        path = stage.site(name) / "site.yaml"
        path.write_text(path.read_text().replace(f":{stage.gateway_port}", f":{line.port}"))
    stage.join_researcher()
    for name in SITES:
        stage.node(name)
    return line


def over_a_line(mbit: float = 100.0, latency_ms: float = 50.0, runs: int = 2) -> dict[str, Any]:
    """Seconds that rounds of densenet121 take more over the line than on loopback, medians of runs in turn; and as predicted."""
    from fl_server import costs

    seconds: dict[float, list[float]] = {0.0: [], mbit: []}
    with tempfile.TemporaryDirectory(prefix="isocenter-bench-") as folder:
        stage = Stage(Path(folder) / "stage")
        try:
            line = opened(stage)
            for number in range(2 * runs):
                slow = number % 2 == 1
                line.mbit, line.latency_ms = (mbit, latency_ms) if slow else (0.0, 0.0)
                _, results = run(stage, "densenet121", 32, 4 + number)  # another number of rounds is another study
                seconds[line.mbit] += [done["seconds"] for done in results["rounds"]][1:]
        finally:
            stage.stop()
    parts = costs.predict(costs.Setting(len(SITES), 6_948_609, 0.0, mbit, latency_ms)).parts_s
    loopback, over = statistics.median(seconds[0.0]), statistics.median(seconds[mbit])
    return {
        "loopback_s": round(loopback, 2),
        "line_s": round(over, 2),
        "added_s": round(over - loopback, 2),
        "predicted_s": round(parts["line"] + parts["latency"], 2),
        "note": f"{len(SITES)} sites over one line of {mbit:g} Mbit/s and {latency_ms:g} ms; masked, densenet121",
    }


def _case(stage: Stage, line: Relay, network: str, bits: int, rounds: tuple[int, int]) -> dict[str, Any]:
    passed = []
    for number in rounds:
        before = line.passed
        digest, _ = run(stage, network, bits, number)
        passed.append(line.passed - before)
    ours = (passed[1] - passed[0]) / (rounds[1] - rounds[0]) / len(SITES)
    limit = least(stage, digest)
    return {
        "ratio": round(ours / limit, 4),
        "limit_bytes": limit,
        "ours_bytes": round(ours),
        "beside_bytes": round(ours - limit),
    }


def run(stage: Stage, network: str, bits: int, rounds: int) -> tuple[str, dict[str, Any]]:
    """One run of a study of so many rounds: its digest, and its results."""
    path = stage.folder / f"{network}-{bits}-{rounds}.yaml"
    path.write_text(yaml.safe_dump(study(network, bits, rounds)))
    digest = stage.submit(path)
    for name in SITES:
        stage.approve(name, digest)
    stage.study("run", digest)
    found = sorted((stage.coordinator / "runs").glob("*/results.json"), key=lambda file: file.stat().st_mtime)
    return digest, json.loads(found[-1].read_text())


def least(stage: Stage, digest: str) -> int:
    """Bytes of the model and of one site's masked vector in a round of the study."""
    from fl_server.roster import Home
    from models import contributions, networks
    from models.study import Study
    from privacy.sharing import Encoding

    plan = Study.from_canonical(Home.open(stage.coordinator).roster.study(digest).canonical)
    size = networks.to_vector(networks.build(plan)).size
    values, counts = contributions.values_of(plan, "train", size), contributions.count_of(plan, "train")
    return 4 * size + Encoding(values, counts, plan.encoding_bits, 0, len(SITES)).size


def study(network: str, bits: int, rounds: int) -> dict[str, Any]:
    return {
        "name": "bytes",
        "title": "Benchmark",
        "purpose": "Bytes per round.",
        "task": {"targets": ["opacity"]},
        "images": {"size_px": 32},
        "network": {"name": network},
        "training": {"rounds": rounds, "batch_size": 32},
        "encoding_bits": bits,
        "privacy": "none",
        "participation": {"sites": list(SITES), "quorum": len(SITES), "minimum_patients": 5},
    }


if __name__ == "__main__":
    if sys.argv[1:] == ["line"]:
        print(json.dumps(over_a_line(), indent=1))
    elif sys.argv[1:]:
        raise SystemExit("usage: bench_bytes.py [line]")
    else:
        main()
