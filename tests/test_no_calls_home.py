"""Nothing phones home: a whole study of real processes in a network namespace without a way out, with every address watched."""

import fcntl
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.deploy, pytest.mark.slow]
SILENT = {"FLWR_TELEMETRY_ENABLED=0", "FLWR_DISABLE_UPDATE_CHECK=1"}
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1


def raise_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sH14s", b"lo", 0, bytes(14))
        flags = struct.unpack("16sH14s", fcntl.ioctl(any_socket, SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sH14s", b"lo", flags | IFF_UP, bytes(14)))


def lead_away() -> bool:
    """A way out that leads nowhere: what is sent on it is counted and lost. False where this system has no such device."""
    commands = (
        "link add out type dummy",
        "addr add 192.0.2.1/24 dev out",
        "link set out up",
        "route add default dev out",
    )
    if not shutil.which("ip"):
        return False
    if all(
        not subprocess.run(["ip", *words.split()], capture_output=True, check=False).returncode for words in commands
    ):
        return True
    # By way of loopback nothing is counted, but a connection that is tried waits instead of failing, and is seen.
    subprocess.run(["ip", "route", "add", "default", "dev", "lo"], capture_output=True, check=False)
    return False


def sent_away() -> int:
    lines = Path("/proc/net/dev").read_text().splitlines()
    return sum(int(line.split(":")[1].split()[9]) for line in lines[2:] if line.split(":")[0].strip() == "out")


def strangers() -> set[str]:
    """Remote addresses of sockets in this namespace that are neither loopback nor nobody, as the kernel writes them."""
    found = set()
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            address = line.split()[2].split(":")[0]
            near = set(address) == {"0"} or re.fullmatch(
                r"(0{16}F{4}0000|0{16}0000F{4})?[0-9A-F]{6}7F|0{24}01000000", address
            )
            if not near:
                found.add(f"{table} {address}")
    return found


def ours() -> dict[str, set[str]]:
    """Command line -> environment, of every process in this network namespace but this one."""
    here, found = str(Path("/proc/self/ns/net").readlink()), {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if folder.name != str(os.getpid()) and str((folder / "ns/net").readlink()) == here:
                command = (folder / "cmdline").read_text().replace("\0", " ")
                found[command] = set((folder / "environ").read_text().split("\0"))
        except OSError:  # it has ended, or has hidden itself
            continue
    return found


def study_inside(folder: Path) -> dict[str, object]:
    """Run a study of two hospitals from founding to its end, and say what was seen meanwhile."""
    import threading

    from hospital import study
    from stage import Stage

    raise_loopback()
    watched = lead_away()
    seen: set[str] = set()
    loud: set[str] = set()
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            seen.update(strangers())
            for command, environment in ours().items():
                # What a person types inherits a person's environment; what these commands start and Flower runs in is ours.
                long_lived = re.search(r"-m fl_server\.executor|fl_client\.worker", command)
                if long_lived and environment != {""} and not environment >= SILENT:
                    loud.add(command)

    watcher = threading.Thread(target=watch)
    watcher.start()
    stage = Stage(folder)
    try:
        stage.found()
        stage.serve()
        stage.join_researcher()
        for name in ("north", "south"):
            stage.open_hospital(name, "aurora", 16, minimum_patients=2)
        path = folder / "study.yaml"
        path.write_text(json.dumps(study().model_dump(mode="json") | {"protection": "sealed"}))
        for name in ("north", "south"):
            site = stage.site(name) / "site.yaml"
            site.write_text(site.read_text().replace("least_protection: masked", "least_protection: sealed"))
        digest = stage.submit(path)
        for name in ("north", "south"):
            stage.approve(name, digest)
            stage.node(name)
        shown = stage.study("run", digest)
    finally:
        stage.stop()
        over.set()
        watcher.join()
    return {
        "finished": "Run finished: complete" in shown,
        "strangers": sorted(seen),
        "loud": sorted(loud),
        "packets": sent_away() if watched else None,
    }


def in_namespace(code: str, *words: str, timeout: float = 200) -> subprocess.CompletedProcess[str]:
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rn", "true"], check=False).returncode:
        pytest.skip("this system does not permit a network namespace to this user")
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent / "deploy")])
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FLWR_")} | {"PYTHONPATH": path}
    program = ["unshare", "-rn", sys.executable, "-c", code, *words]
    return subprocess.run(program, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


def test_a_whole_study_runs_without_a_way_out_and_asks_for_none(tmp_path: Path) -> None:
    code = "import json, sys, pathlib, test_no_calls_home as t; print(json.dumps(t.study_inside(pathlib.Path(sys.argv[1]))))"
    done = in_namespace(code, str(tmp_path / "stage"))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["finished"], found
    assert found["strangers"] == [] and found["loud"] == []
    assert found["packets"] in (0, None), "a packet, a question for a name perhaps, left on the way out"


def test_the_watch_sees_a_question_for_a_name_and_a_connection() -> None:
    """The oracle itself: one packet to an outside name server is counted, and its socket is seen."""
    code = (
        "import socket, test_no_calls_home as t; t.raise_loopback(); print(t.lead_away());"
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.connect(('192.0.2.53', 53));"
        "print(len(t.strangers()));"
        "c = socket.socket(); c.setblocking(False); c.connect_ex(('192.0.2.54', 443)); print(t.sent_away() > 0)"
    )
    done = in_namespace(code)
    if not shutil.which("ip"):
        pytest.skip("a way out is made with `ip`, which is not installed here")
    device, seen, counted = done.stdout.split()
    assert seen == "1" and device == counted, done.stdout + done.stderr
