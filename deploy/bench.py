"""`make bench`: what the federation costs beside the same work without it. Writes bench.json and tables of docs/benchmarks.md.

`python deploy/bench.py PART ...` measures only these parts and keeps the figures of the others: rounds are idle, small, memory,
densenet and alone (deploy/bench_round.py); data (bench_data.py); steps and noise of differential privacy (bench_dp.py); masks;
start; simulation (bench_sites.py); bytes (bench_bytes.py); and how cost grows: sites, images, parameters.

Both sides of a ratio are measured on this machine in one run, pinned to one core, in turn; the ratio of their medians is what
counts, because machines differ and are noisy. Beside each part stands the load of the machine in the minute before it.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_bytes
import bench_data
import bench_dp
import bench_round
import bench_tables
from stage import BIN

MASKS, PARAMETERS, MASK_RUNS = 8, 7_000_000, 15
KEPT = bench_tables.KEPT / "bench.json"  # the figures that docs/benchmarks.md shows
KEYSTREAM_BLOCK = 256 * 1024  # bytes a call: AES is no faster with more or less


def main(wanted: list[str]) -> None:
    if unknown := set(wanted) - set(PARTS):
        raise SystemExit(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    report: dict[str, Any] = json.loads(KEPT.read_text()) if wanted and KEPT.is_file() else {"parts": {}}
    for name in wanted or PARTS:
        began, load = time.monotonic(), os.getloadavg()[0]
        print(f"{name} ...", end=" ", file=sys.stderr, flush=True)
        report |= PARTS[name]()
        took = round(time.monotonic() - began)
        report["parts"][name] = {"date": time.strftime("%Y-%m-%d"), "load_before": round(load, 1), "seconds": took}
        print(f"{took} s", file=sys.stderr, flush=True)
        for path in (KEPT, Path("bench.json")):
            path.write_text(json.dumps(report, indent=1) + "\n")
    bench_tables.main()
    print(json.dumps(report, indent=1))


def apart(script: str, *words: str) -> dict[str, Any]:
    """What a script of this folder prints, in a process of its own: it loads much, or writes files and a picture itself."""
    command = [sys.executable, str(Path(__file__).with_name(script)), *words]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)  # type: ignore[no-any-return]


def growth(script: str, *words: str) -> Callable[[], dict[str, Any]]:
    def measured() -> dict[str, Any]:
        command = [sys.executable, str(Path(__file__).with_name(script)), *words]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        return {}

    return measured


def privacy(part: str) -> dict[str, Any]:
    with bench_round.on_core(0):
        return bench_dp.measured(part)


def all_masks() -> dict[str, Any]:
    with bench_round.on_core(0):
        return {"mask_keystream": masks()} | bench_dp.measured("masks")


def start() -> dict[str, Any]:
    with bench_round.on_core(0):
        return {"start": {"fl_client_help_s": round(median_seconds([str(BIN / "fl-client"), "--help"]), 2)}}


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


def median_seconds(words: list[str]) -> float:
    def once() -> float:
        began = time.monotonic()
        subprocess.run(words, capture_output=True, check=True)
        return time.monotonic() - began

    return statistics.median(once() for _ in range(5))


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "data": bench_data.measured,  # on all cores, which is how a hospital indexes
    "steps": lambda: privacy("steps"),
    "noise": lambda: privacy("noise"),
    "masks": all_masks,
    "start": start,
    "simulation": lambda: apart("bench_sites.py", "simulation"),
    "idle": lambda: bench_round.measured(["idle"]),
    "small": lambda: bench_round.measured(["small"]),
    "memory": lambda: bench_round.measured(["memory"]),
    "densenet": lambda: bench_round.measured(["densenet"]),
    "alone": lambda: bench_round.measured(["alone"]),
    "bytes": lambda: {"bytes": bench_bytes.measured()},
    "sites": growth("bench_sites.py", "sites"),
    "images": growth("bench_dp.py", "images"),
    "parameters": growth("bench_parameters.py"),
}

if __name__ == "__main__":
    main(sys.argv[1:])
