"""A whole consortium on this machine, as separate processes with real TLS: what the demo, the benchmark and the tests stand on.

Everything is done with the commands that people use; only the standard library is needed here.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

BIN = Path(sys.executable).parent
READY_S = 90.0
STOP_S = 15.0


class StageError(Exception):
    """A command failed, or a process did not get ready."""


class Stage:
    """A folder with a coordinator, sites and a researcher; `show` gets each command line, and output where asked for."""

    def __init__(self, folder: Path, show: Callable[[str], None] = lambda text: None) -> None:
        self.folder, self.show = folder, show
        self.coordinator, self.researcher = folder / "coordinator", folder / "researcher"
        self.gateway_port, self.service_port = free_port(), free_port()
        self.running: list[subprocess.Popen[str]] = []
        (folder / "logs").mkdir(parents=True)

    def site(self, name: str) -> Path:
        return self.folder / "sites" / name

    def found(self) -> None:
        """Found the consortium."""
        ports = ("--gateway-port", str(self.gateway_port), "--service-port", str(self.service_port))
        self.command("fl-server", "init", str(self.coordinator), "--name", "demo", "--host", "127.0.0.1", *ports)

    def serve(self) -> subprocess.Popen[str]:
        """Start the coordinator and wait until its doors are open."""
        return self.start("coordinator", "is ready", "fl-server", "start", "--home", str(self.coordinator))

    def open_hospital(self, name: str, vendor: str, patients: int, minimum_patients: int = 10) -> str:
        """Make a phantom hospital, join it, describe its data as its IT would, ingest; what `ingest` printed."""
        hospital, home = self.folder / "hospitals" / name, self.site(name)
        made = ("--name", name, "--vendor", vendor, "--patients", str(patients))
        section = self.command("fl-client", "phantom", str(hospital), *made)
        self.command("fl-client", "join", self.invite(name), "--home", str(home))
        path = home / "site.yaml"
        text = path.read_text(encoding="utf-8").replace("minimum_patients: 10", f"minimum_patients: {minimum_patients}")
        text = text.replace("cpu_threads: 0", "cpu_threads: 1")
        text = text.replace("permit_without_privacy: false", "permit_without_privacy: true")
        path.write_text(text + "\n" + section[section.index("data:") :], encoding="utf-8")
        return self.command("fl-client", "ingest", "--home", str(home))

    def join_researcher(self) -> None:
        line = self.invite("researcher", "--researcher")
        self.command("fl-study", "join", line, "--home", str(self.researcher))

    def submit(self, study: Path) -> str:
        """Submit a study as the researcher; its digest."""
        printed = self.command("fl-study", "submit", str(study), "--home", str(self.researcher))
        return _found(r"[0-9a-f]{64}", printed, "fl-study submit printed no digest")

    def approve(self, name: str, digest: str) -> str:
        return self.command("fl-client", "approve", digest, "--yes", "--home", str(self.site(name)))

    def node(self, name: str) -> subprocess.Popen[str]:
        """Start a site's node and wait until it is connected."""
        return self.start(f"node-{name}", "waits for orders", "fl-client", "start", "--home", str(self.site(name)))

    def invite(self, name: str, *more: str) -> str:
        printed = self.command("fl-server", "invite", name, *more, "--home", str(self.coordinator))
        return _found(r"isocenter-join:\S+", printed, "fl-server invite printed no line")

    def study(self, *words: str) -> str:
        """One of the researcher's commands."""
        return self.command("fl-study", *words, "--home", str(self.researcher))

    def command(self, *words: str) -> str:
        """Run one command to its end; its standard output. Raises StageError if it fails."""
        # An invitation is a secret, and its line is longer than a screen.
        self.show("$ " + " ".join("LINE" if word.startswith("isocenter-join:") else word for word in words))
        done = subprocess.run([str(BIN / words[0]), *words[1:]], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise StageError(
                f"{words[0]} {words[1]} ended with exit code {done.returncode}:\n{done.stdout}{done.stderr}"
            )
        return done.stdout

    def start(self, label: str, until: str, *words: str) -> subprocess.Popen[str]:
        """Start a long-lived command, its output in FOLDER/logs, and wait until it prints `until`."""
        self.show(f"$ {' '.join(words)} &")
        path = self.folder / "logs" / f"{label}.log"
        with path.open("w") as log:
            # A session of its own: Ctrl-C is for the caller, which then ends everything in order.
            process = subprocess.Popen(
                [str(BIN / words[0]), *words[1:]],
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        self.running.append(process)
        end = time.monotonic() + READY_S
        while until not in path.read_text(encoding="utf-8"):
            if process.poll() is not None or time.monotonic() > end:
                raise StageError(f"{label} did not get ready; it printed:\n{path.read_text(encoding='utf-8')}")
            time.sleep(0.05)
        return process

    def stop(self) -> None:
        """End everything that was started, by pid; kill what does not end."""
        for process in reversed(self.running):
            if process.poll() is None:
                process.terminate()
        for process in reversed(self.running):
            try:
                process.wait(timeout=STOP_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _found(pattern: str, text: str, otherwise: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise StageError(otherwise)
    return match.group()
