"""What the process that trains may not do: tried out in real worker processes, against a server that would answer."""

import errno
import json
import os
import re
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import worker_probe
from hospital import Hospital
from test_client_node import message
from test_client_worker import keys_order

from fl_client import node, readiness, sandbox, worker
from fl_client.sandbox import MACHINES, Shield, program
from fl_client.worker import ROOT, Worker
from privacy import secagg, wire
from privacy.errors import IsocenterError

on_linux = pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine not in MACHINES, reason="the filter is one of Linux"
)


@pytest.fixture
def port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@on_linux
def test_a_worker_is_refused_every_connection_and_program_and_still_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, port: int
) -> None:
    """TCP, UDP, Unix and raw sockets, IPv6, by C functions and from another thread; programs and forks. Outside, each is done."""
    hospital = Hospital.open(tmp_path)
    worker_probe.program(monkeypatch, "tries", tmp_path / "tried", port)
    by = Worker(hospital.site)
    try:
        assert by.wait().filtered
        report = wire.decode(node.answer(message(hospital.order()), hospital.site, by), *wire.REPORTS)
    finally:
        by.stop()
    assert isinstance(report, wire.TrainReport) and len(report.vector) == hospital.encoding().size
    (tried,) = [json.loads(line) for line in (tmp_path / "tried").read_text().splitlines()]
    assert set(tried.values()) == {"PermissionError"}, tried
    code = f"import sys; sys.path[:0] = {[str(ROOT), str(Path(__file__).parent)]!r}; import json, worker_probe\n"
    code += f"print(json.dumps(worker_probe.outcomes({port})))"
    control = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    free = json.loads(control.stdout.splitlines()[-1])
    assert set(free) == set(tried) and len(tried) >= 14
    assert free.pop("exec") == "FileNotFoundError"
    # Raw sockets need rights of root, and a machine may have no IPv6.
    assert {name for name, came in free.items() if came != "done"} <= {"raw", "packet", "tcp6"}


def run_confined(code: str) -> list[str]:
    """What a process prints that runs `code`, which confines it."""
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {[str(ROOT), str(Path(__file__).parent)]!r}\n{code}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@on_linux
def test_threads_that_ran_before_are_confined_and_files_memory_and_threads_are_left() -> None:
    code = """
import pathlib, socket, threading
from fl_client import sandbox
go, found = threading.Event(), []
def try_it():
    go.wait()
    try:
        socket.socket()
        found.append("done")
    except PermissionError:
        found.append("refused")
before = threading.Thread(target=try_it)
before.start()
print(sandbox.confine())
go.set()
before.join()
after = threading.Thread(target=try_it)
after.start()
after.join()
print(*found, len(bytearray(10**6)), pathlib.Path("/proc/self/status").read_text().split("Seccomp:")[1].split()[0])
"""
    assert run_confined(code) == ["True", "refused refused 1000000 2"]


@on_linux
@pytest.mark.parametrize("missing", ["socket", "ptrace", "io_uring_setup", "sendmmsg"])
def test_a_filter_that_lacks_one_call_is_noticed_and_the_hook_takes_its_place(missing: str) -> None:
    code = f"""
import dataclasses, socket
from fl_client import sandbox
whole = sandbox.program
def program(machine):
    return whole(dataclasses.replace(machine, denied={{n: v for n, v in machine.denied.items() if n != {missing!r}}}))
sandbox.program = program
print(sandbox.confine())
try:
    socket.socket()
except PermissionError as error:
    print(error.strerror)
"""
    assert run_confined(code) == ["False", "the process that trains may not do this (socket.__new__)"]


@on_linux
def test_where_there_is_no_filter_the_hook_refuses_what_python_can_do(port: int) -> None:
    """It is the weaker of the two: what compiled code does passes it by, and `confine` says which one holds."""
    code = f"""
import json, worker_probe
from fl_client import sandbox
sandbox._install = lambda machine: False
print(sandbox.confine())
came = worker_probe.outcomes({port})
print(*sorted(name for name, what in came.items() if what != "PermissionError"))
"""
    filtered, passed = run_confined(code)
    assert filtered == "False"
    assert passed == "exec libc"


# The filter itself ---------------------------------------------------------------------------------------------------


def outcome(lines: list[tuple[int, int, int, int]], architecture: int, number: int, first: int = 0) -> str:
    """A reading of the filter as bpf(4) and seccomp(2) describe it, one instruction after the other."""
    data = struct.pack("<iIQ6Q", number if number < 2**31 else number - 2**32, architecture, 0, first, *[0] * 5)
    accumulator, at = 0, 0
    while True:
        code, yes, no, value = lines[at]
        at += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, value)
        elif code == 0x06:
            if value == 0x7FFF0000:
                return "allowed"
            assert value & 0xFFFF0000 == 0x00050000
            return errno.errorcode[value & 0xFFFF]
        else:
            holds = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}[code]
            at += yes if holds else no


# From the tables of the kernel (arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h), for this test.
REFUSED = {
    "x86_64": {
        41,
        42,
        43,
        44,
        46,
        47,
        49,
        50,
        53,
        57,
        58,
        59,
        101,
        288,
        299,
        307,
        310,
        311,
        322,
        425,
        426,
        427,
        434,
        438,
    },
    "aarch64": {
        198,
        199,
        200,
        201,
        202,
        203,
        206,
        211,
        212,
        117,
        221,
        242,
        243,
        269,
        270,
        271,
        281,
        425,
        426,
        427,
        434,
        438,
    },
}
NEEDED = {  # read, write, openat, mmap, mprotect, munmap, brk, futex, ioctl, exit_group, getrandom, clock_gettime
    "x86_64": {0, 1, 257, 9, 10, 11, 12, 202, 16, 231, 318, 228},
    "aarch64": {63, 64, 56, 222, 226, 215, 214, 98, 29, 94, 278, 113},
}
CLONE = {"x86_64": 56, "aarch64": 220}
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
THREAD_FLAGS, FORK_FLAGS = 0x3D0F00, 0x1200011  # of pthread_create and of fork, as strace shows them


@pytest.mark.parametrize("machine", MACHINES)
def test_the_filter_of_each_architecture_read_by_another_interpreter(machine: str) -> None:
    lines, ours = program(MACHINES[machine]), AUDIT[machine]
    assert all(outcome(lines, ours, number) == "EPERM" for number in REFUSED[machine])
    assert all(outcome(lines, ours, number) == "allowed" for number in NEEDED[machine])
    assert outcome(lines, ours, CLONE[machine], THREAD_FLAGS) == "allowed"
    assert outcome(lines, ours, CLONE[machine], FORK_FLAGS) == "EPERM"
    assert outcome(lines, ours, 435) == "ENOSYS"  # clone3, whose flags a filter cannot see
    for other in (0x40000003, 0x40000028, 0xC00000F3, 0, *set(AUDIT.values()) - {ours}):  # i386, ARM, RISC-V
        assert all(outcome(lines, other, number) == "EPERM" for number in range(0, 600))
    if machine == "x86_64":
        assert {outcome(lines, ours, 0x40000000 + number) for number in range(0, 600)} == {"EPERM"}  # x32


@pytest.mark.skipif(not Path("/usr/include/asm-generic/unistd.h").is_file(), reason="no kernel headers here")
@pytest.mark.parametrize("machine", MACHINES)
def test_the_numbers_are_those_of_the_kernels_headers(machine: str) -> None:
    files = {"x86_64": "x86_64-linux-gnu/asm/unistd_64.h", "aarch64": "asm-generic/unistd.h"}
    path = Path("/usr/include") / files[machine]
    if not path.is_file():
        pytest.skip("no headers of this architecture here")
    said = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", path.read_text()))
    ours = MACHINES[machine]
    numbers = ours.denied | {"clone": ours.clone, "clone3": ours.clone3, "seccomp": ours.seccomp}
    assert {name: int(said[name]) for name in numbers} == numbers


# The keys ------------------------------------------------------------------------------------------------------------


def permitted() -> bool:
    """Whether this system lets a process have a mount namespace of its own."""
    code = "from fl_client.sandbox import hide; import tempfile; print(hide(tempfile.mkdtemp()))"
    return run_confined(code) == ["True"]


@on_linux
def test_the_keys_are_hidden_from_a_worker_which_still_gets_its_signatures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And from it alone. Where no namespace is permitted, or without it, the worker says so, and sees them."""
    hospital, file = Hospital.open(tmp_path), tmp_path / "seen"
    key = (hospital.home / "keys" / "site.key").read_text()
    cases = [permitted(), False]
    for number, hides in enumerate(cases, start=1):
        if number == 2:
            monkeypatch.setattr(worker, "HIDE", "import sys; hidden = False")
        worker_probe.program(monkeypatch, "looks_for_keys", file, hospital.home / "keys")
        by = Worker(hospital.site)
        try:
            assert by.wait().keys_hidden is hides
            asked = keys_order(hospital, "hidden", number)
            report = wire.decode(node.answer(message(asked), hospital.site, by), *wire.REPORTS)
        finally:
            by.stop()
        assert isinstance(report, wire.KeysReport)
        secagg.Bundle.from_bytes(report.keys).check(
            secagg.Place(asked.study, "hidden", number, 2), hospital.site.key.public_key()
        )
    seen = [json.loads(line) for line in file.read_text().splitlines()]
    for found, hides in zip(seen, cases, strict=True):
        assert not found["taken"]
        assert found["read"] == ("FileNotFoundError" if hides else key)
        assert ("site.key" in found["names"]) is not hides and found["wrote"] is not hides
    assert (hospital.home / "keys" / "site.key").read_text() == key


def test_words_of_shields_are_read_strictly_and_each_gap_has_a_sentence() -> None:
    every = [Shield(hidden, filtered) for hidden in (True, False) for filtered in (True, False)]
    assert [Shield.of(shield.word) for shield in every] == every
    assert [len(shield.gaps) for shield in every] == [0, 1, 1, 2]
    for word in ("", None, 5, "keys-hidden", "seccomp", "keys-hidden seccomp and more", ["keys-hidden seccomp"]):
        assert len(Shield.of(word).gaps) == 2


# What people are told ------------------------------------------------------------------------------------------------


@on_linux
def test_check_says_whether_the_worker_is_confined(tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    finding = next(found for found in readiness.findings(tmp_path) if found.subject == "worker")
    assert finding.good is permitted()
    assert ("no network" in finding.sentence) is finding.good
    assert socket.socket().close() is None  # it was tried in another process


def test_before_joining_there_is_no_folder_of_keys_and_the_lock_is_tried_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    told = []
    for folder in (tmp_path / "keys", tmp_path / "not" / "there"):
        try:
            sandbox.require(folder)
            told.append("holds")
        except IsocenterError as error:
            told.append(str(error))
    assert told[0] == told[1]


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("keys-hidden hook", "the kernel does not confine"),
        ("keys-open seccomp", "could open this site's key"),
        ("nonsense", "the kernel does not confine"),
    ],
)
def test_check_says_where_the_worker_is_not_confined_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str, sentence: str
) -> None:
    monkeypatch.setattr(sandbox, "TRY", f"print({word!r})")
    finding = next(found for found in readiness.findings(tmp_path) if found.subject == "worker")
    assert not finding.good and sentence in finding.sentence
    assert "Use Linux" in finding.sentence or "Permit user namespaces" in finding.sentence
    with pytest.raises(IsocenterError, match=sentence):
        sandbox.require(tmp_path)
