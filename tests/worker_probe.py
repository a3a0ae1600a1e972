"""Worker processes of which a test changes or watches something: each of these functions is the life of one.

A test makes it the program of new workers with `program`; what a worker found out is a line of JSON in a file.
"""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fl_client import worker
from fl_client.protection import Vault
from privacy import wire
from privacy.errors import AuditFailed

if TYPE_CHECKING:
    import pytest  # a worker is started many times, and needs none of it


def program(patch: "pytest.MonkeyPatch", name: str, *given: object) -> None:
    """From now on new workers run the function `name` of this module, with `given` first."""
    code = (
        f"{worker.HIDE}; sys.path.append({str(Path(__file__).parent)!r}); import worker_probe; "
        f"worker_probe.{name}(*{[str(g) for g in given]!r}, hidden, *map(int, sys.argv[2:]))"
    )
    patch.setattr(worker, "PROGRAM", code)


def at_work(change: Callable[[worker.Line, wire.Order], None], *pipes: int, bare: bool = False) -> None:
    """A worker in which `change` is called with each order when it was worked on, before the report leaves.

    `bare`: one that does not test itself and can only make keys of a sum, which takes a tenth of the time to start.
    """
    warm = only_keys if bare else worker._warm

    def watched(line: worker.Line) -> Any:
        work = warm(line)

        def then_change(site: Any, study: Any, order: Any) -> Any:
            report = work(site, study, order)
            change(line, order)
            return report

        return then_change

    worker._warm = watched
    worker.main(*pipes)


def only_keys(line: worker.Line) -> Any:
    def sign(label: bytes, body: bytes) -> Any:
        line.send("sign", {"label": label, "body": body})
        return line.receive()[1]["signature"]

    vault = Vault(signer=lambda site: sign)

    def make_keys(site: Any, study: Any, order: Any) -> wire.Report:
        return wire.KeysReport(**order.naming(), site=site.name, seconds=0.0, keys=vault.make_keys(site, study, order))

    return make_keys


def note(file: str, found: object) -> None:
    with Path(file).open("a") as lines:
        lines.write(json.dumps(found) + "\n")


def dies_while_it_starts(mark: str, *pipes: int) -> None:
    """Once, if `mark` is a path; always, if it is empty."""
    if not mark or not Path(mark).exists():
        if mark:
            Path(mark).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    at_work(lambda line, order: None, *pipes, bare=True)


def dies_at_work(mark: str, *pipes: int) -> None:
    """On the first order that any worker with this mark gets."""

    def die(line: worker.Line, order: wire.Order) -> None:
        if not Path(mark).exists():
            Path(mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)

    at_work(die, *pipes, bare=True)


def fails_its_test(*pipes: int) -> None:
    from privacy import selftest

    selftest.check = lambda: ["noise: half of it"]
    worker.main(*pipes)


def fails_at_once(*pipes: int) -> None:
    """The same without what takes time."""

    def fail(line: worker.Line) -> Any:
        raise AuditFailed("the self-test of this node failed: noise: half of it")

    worker._warm = fail
    worker.main(*pipes)


def hangs_after_reserving(mark: str, *pipes: int) -> None:
    """It charges the patients, touches `mark` and never comes back."""
    from fl_client.site import Site

    reserve = Site.reserve

    def then_hang(self: Any, *given: Any) -> Any:
        reserve(self, *given)
        Path(mark).touch()
        time.sleep(60)

    Site.reserve = then_hang  # type: ignore[method-assign]
    worker.main(*pipes)


def takes_memory(*pipes: int) -> None:
    """More and more with each order, until somebody ends it."""

    def grow(line: worker.Line, order: wire.Order) -> None:
        held = []
        for _ in range(200):
            held.append(bytearray(os.urandom(4096) * 4096))  # 16 MiB that are really there
            time.sleep(0.01)

    at_work(grow, *pipes, bare=True)


def leaves_free_memory(file: str, *pipes: int) -> None:
    """At work it fills 64 MiB of its heap and lets them go, between things that stay; and notes what it holds then."""
    kept = []

    def leave(line: worker.Line, order: wire.Order) -> None:
        first = b"1" * (24 << 20)
        del first  # from now on glibc keeps blocks of this size on the heap
        blocks = []
        for _ in range(
            16
        ):  # one thing above them all could find a place further down, and glibc shortens a heap by itself
            blocks.append(b"1" * (4 << 20))
            kept.append(b"1" * (1 << 20))
        del blocks
        note(file, int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))

    at_work(leave, *pipes, bare=True)


def tells_its_files(file: str, bare: str, *pipes: int) -> None:
    """It notes every file that it opens, from its first line on, and at work what is open and what is in its environment."""

    def opened(event: str, given: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(given[0], str) and "/keys" in given[0]:
            note(file, {"opened": given[0]})

    def describe(line: worker.Line, order: wire.Order) -> None:
        targets = {}
        for link in Path("/proc/self/fd").iterdir():
            try:
                targets[link.name] = str(link.readlink())
            except OSError:
                continue  # that of the listing itself
        core = Path("/proc/self/limits").read_text().split("Max core file size")[1].split()[:2]
        note(file, {"fds": targets, "environment": dict(os.environ), "core": core, "pid": os.getpid()})

    sys.addaudithook(opened)
    at_work(describe, *pipes, bare=bare == "bare")


def tells_its_packages(file: str, *pipes: int) -> None:
    """At work it notes what it has loaded until then, by the first part of each module's name."""
    at_work(lambda line, order: note(file, sorted({name.split(".")[0] for name in sys.modules})), *pipes)


def asks_for_signatures(file: str, *pipes: int) -> None:
    """At work it asks the node to sign what stands in `file`, [label, body] in hexadecimal; if there is no file, nothing more."""

    def ask(line: worker.Line, order: wire.Order) -> None:
        if Path(file).exists():
            label, body = map(bytes.fromhex, json.loads(Path(file).read_text()))
            line.send("sign", {"label": label, "body": body})
            note(f"{file}.signed", line.receive()[0])

    at_work(ask, *pipes, bare=True)


def answers(file: str, *pipes: int) -> None:
    """At work it sends the frames that stand in `file` in hexadecimal in place of a report."""

    def lie(line: worker.Line, order: wire.Order) -> None:
        for frame in json.loads(Path(file).read_text()):
            line.writer.send_bytes(bytes.fromhex(frame))
        time.sleep(60)

    at_work(lie, *pipes, bare=True)


def looks_for_keys(file: str, folder: str, *pipes: int) -> None:
    """At work it tries to see the keys, also after taking away what lies over them."""

    def look(line: worker.Line, order: wire.Order) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        taken = libc.umount2(os.fsencode(folder), 0) == 0
        names = sorted(path.name for path in Path(folder).iterdir())
        try:
            read = (Path(folder) / "site.key").read_text()
        except OSError as error:
            read = type(error).__name__
        try:
            (Path(folder) / "new").touch()
            wrote = True
        except OSError:
            wrote = False
        note(file, {"taken": taken, "names": names, "read": read, "wrote": wrote})

    at_work(look, *pipes, bare=True)


def tries(file: str, port: str, *pipes: int) -> None:
    """At work it tries what the sandbox forbids, and notes what came of it; and it reports on the order."""
    at_work(lambda line, order: note(file, outcomes(int(port))), *pipes)


def outcomes(port: int) -> dict[str, str]:
    """What came of each attempt: "done", or the name of the error. A server listens on 127.0.0.1 at `port`."""
    libc = ctypes.CDLL(None, use_errno=True)

    def by_libc() -> None:
        """As compiled code would do it: no Python function that a hook could watch."""
        address = socket.AF_INET.to_bytes(2, sys.byteorder) + port.to_bytes(2, "big") + bytes([127, 0, 0, 1]) + bytes(8)
        number = libc.socket(socket.AF_INET, socket.SOCK_STREAM, 0)
        if number < 0 or libc.connect(number, address, len(address)) < 0:
            raise OSError(ctypes.get_errno(), "libc")

    def by_libc_exec() -> None:
        """Of what is not there, or it would end this process where it is permitted."""
        libc.execv(b"/nonexistent", (ctypes.c_char_p * 2)(b"true", None))
        raise OSError(ctypes.get_errno(), "libc")

    def from_a_thread() -> None:
        failed: list[OSError] = []

        def connect() -> None:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
            except OSError as error:
                failed.append(error)

        thread = threading.Thread(target=connect)
        thread.start()
        thread.join()
        if failed:
            raise failed[0]

    def fork() -> None:
        if os.fork() == 0:
            os._exit(0)
        os.wait()

    tries: dict[str, Callable[[], Any]] = {
        "tcp": lambda: socket.create_connection(("127.0.0.1", port)).close(),
        "tcp6": lambda: socket.socket(socket.AF_INET6, socket.SOCK_STREAM).close(),
        "udp": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", port)),
        "unix": lambda: socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).close(),
        "pair": socket.socketpair,
        "raw": lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP).close(),
        "packet": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close(),
        "netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close(),
        "libc": by_libc,
        "thread": from_a_thread,
        "program": lambda: subprocess.run(["/bin/true"], check=False),
        "shell": lambda: subprocess.run(["/bin/sh", "-c", "true"], check=False),
        "fork": fork,
        "exec": by_libc_exec,
    }
    found = {}
    for name, attempt in tries.items():
        try:
            attempt()
            found[name] = "done"
        except OSError as error:
            found[name] = type(error).__name__
    return found
