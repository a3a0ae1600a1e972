"""`make profile`: what each side of a round spends its time on, as flame graphs in profile/.

The bed of round_small (deploy/bench_round.py), masked; py-spy looks at the coordinator with its executor, and at one node with
its worker, 200 times a second, from another core where there is one, and without stopping them. Looking into a process that hides
from others, as the worker does, asks for root or CAP_SYS_PTRACE.
"""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from bench_round import LARGE, Bed, made_study, on_core

OUT, ROUNDS, A_SECOND = Path("profile"), 20, 200
SPY = Path(sys.executable).parent / "py-spy"


def main() -> None:
    OUT.mkdir(exist_ok=True)
    with on_core(0), tempfile.TemporaryDirectory(prefix="isocenter-profile-") as folder:
        bed = Bed.open(Path(folder) / "stage", little=False)
        try:
            bed.start(LARGE)
            bed.run(made_study(LARGE, 3))  # what is loaded once is not part of a round
            with on_core(1):
                watched = {"coordinator": bed.coordinator.pid, "node": bed.nodes["alpine"].pid}
                spies = [watching(name, pid) for name, pid in watched.items()]
            bed.run(made_study(LARGE, ROUNDS))
            for spy in spies:
                spy.send_signal(signal.SIGINT)
            failed = [spy.args for spy in spies if spy.wait() != 0]
        finally:
            bed.stage.stop()
    if failed:
        raise SystemExit("py-spy could not look into a process; run this as root.")
    print(f"See {', '.join(str(path) for path in sorted(OUT.glob('*.svg')))}")


def watching(name: str, pid: int) -> "subprocess.Popen[bytes]":
    """py-spy over a process and its children, until it is interrupted."""
    how = ("--nonblocking", "--subprocesses", "--rate", str(A_SECOND), "--output", str(OUT / f"{name}.svg"))
    return subprocess.Popen(
        [str(SPY), "record", *how, "--pid", str(pid)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ,
    )


if __name__ == "__main__":
    main()
