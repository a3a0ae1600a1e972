"""`make bench`: what the federation costs beside the same work without it. Writes bench.json.

Rounds, memory, a waiting node: deploy/bench_round.py. Images: deploy/bench_data.py. dp_step_*, dp_noise: deploy/bench_dp.py.
simulation: deploy/bench_sites.py. Bytes: deploy/bench_bytes.py. mask_keystream: masks over a large update beside their cipher;
`python deploy/bench.py masks` prints only that, in seconds.

Both sides of a ratio are measured on this machine in one run, pinned to one core, in turn; the ratio of their medians is what
counts, because machines differ and are noisy. docs/benchmarks.md has the figures and how they were got.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import bench_bytes
import bench_data
import bench_dp
import bench_round
from stage import BIN

MASKS, PARAMETERS, MASK_RUNS = 8, 7_000_000, 15
KEYSTREAM_BLOCK = 256 * 1024  # bytes a call: AES is no faster with more or less


def main() -> None:
    data = bench_data.measured()  # on all cores, which is how a hospital indexes
    with bench_round.on_core(0):
        private = bench_dp.measured()
        keystream = masks() | {"after_training_ms": private.pop("after_training_ms")}
        alone = {"mask_keystream": keystream, "start": start()} | private
    report = alone | data | simulation() | bench_round.measured() | {"bytes": bench_bytes.measured()}
    Path("bench.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def simulation() -> dict[str, Any]:
    """In a process of its own: it loads both sides of the federation."""
    command = [sys.executable, str(Path(__file__).with_name("bench_sites.py")), "simulation"]
    found: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found


def start() -> dict[str, Any]:
    return {"fl_client_help_s": round(median_seconds([str(BIN / "fl-client"), "--help"]), 2)}


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


if __name__ == "__main__":
    if sys.argv[1:2] == ["masks"]:
        with bench_round.on_core(0):
            print(json.dumps({"mask_keystream": masks()}, indent=1))
    else:
        main()
