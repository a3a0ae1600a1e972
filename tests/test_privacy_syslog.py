"""Journal lines over real sockets to a syslog server that the tests play: each line arrives, and none is waited for."""

import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from privacy import keys, syslog
from privacy.errors import DocumentError
from privacy.journal import Journal
from privacy.syslog import Forwarder, parse_target

PATIENCE_S = 30


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syslog, "POLL_S", 0.02)
    monkeypatch.setattr(syslog, "RETRY_S", 0.05)
    monkeypatch.setattr(syslog, "SETTLE_S", 0.05)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "journal.jsonl")


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    return tmp_path / "state" / "syslog.json"


@contextmanager
def forwarding(journal: Journal, target: str, memory: Path) -> Iterator[Forwarder]:
    forwarder = Forwarder(journal.path, target, memory)
    forwarder.start()
    try:
        yield forwarder
    finally:
        forwarder.stop()
    assert not forwarder._thread.is_alive()


def eventually(true: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


class Datagrams:
    """A server of datagrams: every one that came, in order."""

    def __init__(self, family: socket.AddressFamily, address: object) -> None:
        self.socket = socket.socket(family, socket.SOCK_DGRAM)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * 1024 * 1024)
        self.socket.bind(address)  # type: ignore[arg-type]
        self.socket.settimeout(0.05)
        self.came: list[bytes] = []
        self.closing = threading.Event()
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def serve(self) -> None:
        while not self.closing.is_set():
            try:
                self.came.append(self.socket.recv(70_000))
            except TimeoutError:
                continue

    def __enter__(self) -> "Datagrams":
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.thread.join()
        self.socket.close()

    @classmethod
    def udp(cls, port: int = 0) -> "Datagrams":
        return cls(socket.AF_INET, ("127.0.0.1", port))

    @property
    def target(self) -> str:
        return f"udp://127.0.0.1:{self.socket.getsockname()[1]}"

    def numbers(self) -> list[int]:
        return [number_of(message) for message in self.came]

    def bodies(self) -> list[bytes]:
        return [body_of(message) for message in self.came]


class Stream(Datagrams):
    """A TCP server that reads messages by their octet counts, from one connection after the other."""

    def __init__(self, port: int = 0) -> None:
        self.socket = socket.create_server(("127.0.0.1", port))
        self.socket.settimeout(0.05)
        self.came, self.closing, self.connections = [], threading.Event(), 0
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def serve(self) -> None:
        while not self.closing.is_set():
            try:
                connection, _ = self.socket.accept()
            except TimeoutError:
                continue
            self.connections += 1
            with connection:
                connection.settimeout(0.05)
                self.read(connection)

    def read(self, connection: socket.socket) -> None:
        waiting = b""
        while not self.closing.is_set():
            try:
                part = connection.recv(65536)
            except TimeoutError:
                continue
            if not part:
                return
            waiting += part
            while count := re.match(rb"([1-9][0-9]*) ", waiting):
                start, size = count.end(), int(count[1])
                if len(waiting) < start + size:
                    break
                self.came.append(waiting[start : start + size])
                waiting = waiting[start + size :]
            assert count or re.fullmatch(rb"[0-9]*", waiting), f"no octet count: {waiting[:80]!r}"

    @property
    def target(self) -> str:
        return f"tcp://127.0.0.1:{self.socket.getsockname()[1]}"


HEADER = re.compile(rb"<([0-9]{1,3})>1 (\S+) (\S+) (\S+) (\S+) ([!-~]{1,32}) - (.*)", re.DOTALL)  # RFC 5424, section 6


def body_of(message: bytes) -> bytes:
    found = HEADER.fullmatch(message)
    assert found, message[:200]
    return found[7]


def number_of(message: bytes) -> int:
    number: int = json.loads(body_of(message))["n"]
    return number


def lines_of(journal: Journal) -> list[bytes]:
    return journal.path.read_bytes().splitlines()


def unused_port(kind: socket.SocketKind) -> int:
    with socket.socket(socket.AF_INET, kind) as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port


@contextmanager
def served(transport: str, tmp_path: Path) -> Iterator[tuple[Datagrams, str]]:
    if transport == "unix":
        path = tmp_path / "log"
        with Datagrams(socket.AF_UNIX, str(path)) as server:
            yield server, f"unix://{path}"
    else:
        with Datagrams.udp() if transport == "udp" else Stream() as server:
            yield server, server.target


@pytest.mark.parametrize("transport", ["udp", "tcp", "unix"])
def test_every_line_arrives_as_it_stands_in_the_journal(
    journal: Journal, memory: Path, tmp_path: Path, transport: str
) -> None:
    journal.append("joined", site="north")
    with served(transport, tmp_path) as (server, target), forwarding(journal, target, memory):
        eventually(lambda: len(server.came) == 1)
        for code in ("policy-forbids", "order-replayed"):
            journal.append("refusal", code=code)
        eventually(lambda: len(server.came) == 3)
    assert server.bodies() == lines_of(journal)
    heads = [HEADER.fullmatch(message) for message in server.came]
    assert [head and head[1] for head in heads] == [b"134", b"132", b"132"]  # 16 * 8 + 6, 16 * 8 + 4
    assert [head and head[6] for head in heads] == [b"joined", b"refusal", b"refusal"]
    for head, line in zip(heads, lines_of(journal), strict=True):
        assert head and head.group(2, 3, 4) == (json.loads(line)["time"].encode(), b"-", b"isocenter")
    assert socket.gethostname().encode() not in b"".join(head[0][: head.start(7)] for head in heads if head)


@pytest.mark.parametrize(
    ("kind", "priority"),
    [
        *((kind, 132) for kind in ("offer-refused", "torn-line-set-aside", "head-contradicted", "node-revoked")),
        *((kind, 132) for kind in ("budget-void", "ledger-missing", "worker-replaced")),
        *((kind, 134) for kind in ("train-report", "approved", "head-signed")),
    ],
)
def test_what_is_not_as_it_should_be_is_a_warning(journal: Journal, kind: str, priority: int) -> None:
    journal.append(kind)
    assert syslog.frame(lines_of(journal)[0], 1).startswith(b"<%d>1 " % priority)


def test_a_name_that_is_longer_than_syslog_permits_is_cut(journal: Journal) -> None:
    journal.append("a" * 100)
    found = HEADER.fullmatch(syslog.frame(lines_of(journal)[0], 1))
    assert found and found[6] == b"a" * 32 and found[7] == lines_of(journal)[0]


@pytest.mark.parametrize("transport", ["udp", "tcp", "unix"])
def test_a_server_that_is_down_gets_every_line_when_it_is_up_and_the_log_says_so_once(
    journal: Journal, memory: Path, tmp_path: Path, transport: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "isocenter.syslog")
    port = unused_port(socket.SOCK_STREAM if transport == "tcp" else socket.SOCK_DGRAM)
    path = tmp_path / "log"
    target = f"unix://{path}" if transport == "unix" else f"{transport}://127.0.0.1:{port}"
    for number in range(5):
        journal.append("train-report", round=number)
    with forwarding(journal, target, memory) as forwarder:
        eventually(lambda: bool(caplog.records))
        time.sleep(0.5)  # several tries
        assert len(caplog.records) == 1 and "wait" in caplog.text
        assert not memory.exists(), "nothing was handed over"
        make = {"udp": lambda: Datagrams.udp(port), "tcp": lambda: Stream(port)}
        with make.get(transport, lambda: Datagrams(socket.AF_UNIX, str(path)))() as server:
            eventually(lambda: set(server.numbers()) == {1, 2, 3, 4, 5})
            eventually(lambda: len(caplog.records) == 2)
            assert "again" in caplog.records[1].message
            assert set(server.bodies()) == set(lines_of(journal))
            forwarder.stop()


@pytest.mark.parametrize("transport", ["udp", "tcp"])
def test_a_server_that_restarts_misses_no_line(journal: Journal, memory: Path, transport: str) -> None:
    kind = Datagrams.udp if transport == "udp" else Stream
    first = kind()
    port: int = first.socket.getsockname()[1]
    with forwarding(journal, first.target, memory):
        with first:
            journal.append("train-report", round=1)
            eventually(lambda: first.numbers() == [1])
            eventually(memory.exists)
        for number in range(2, 5):
            journal.append("train-report", round=number)
            time.sleep(0.1)
        with kind(port) as second:
            eventually(lambda: set(second.numbers()) >= {2, 3, 4})
            assert 1 not in second.numbers(), "what the first server had is not sent again"


def test_one_line_into_a_connection_that_was_closed_arrives_without_another_line(
    journal: Journal, memory: Path
) -> None:
    first = Stream()
    port: int = first.socket.getsockname()[1]
    with forwarding(journal, first.target, memory):
        with first:
            journal.append("train-report", round=1)
            eventually(memory.exists)
        journal.append("train-report", round=2)
        time.sleep(0.1)
        with Stream(port) as second:
            eventually(lambda: second.numbers() == [2])


def test_a_restart_sends_only_new_lines(journal: Journal, memory: Path) -> None:
    with Datagrams.udp() as server:
        for start in (0, 3, 6):
            for number in range(start, start + 3):
                journal.append("train-report", round=number)
            with forwarding(journal, server.target, memory):
                eventually(lambda start=start: len(server.came) >= start + 3)  # type: ignore[misc]
        with forwarding(journal, server.target, memory):
            time.sleep(0.3)
        assert server.numbers() == list(range(1, 10))
    assert memory.stat().st_mode & 0o777 == 0o600


def test_what_is_written_just_before_the_end_is_sent(journal: Journal, memory: Path) -> None:
    with Datagrams.udp() as server:
        with forwarding(journal, server.target, memory):
            journal.append("joined")
            eventually(lambda: server.numbers() == [1])
            for _ in range(20):
                journal.append("train-report")
        eventually(lambda: server.numbers() == list(range(1, 22)))
        assert json.loads(memory.read_bytes())["n"] == 21


def test_a_torn_line_waits_until_it_is_whole(journal: Journal, memory: Path) -> None:
    journal.append("joined")
    journal.append("train-report", round=1)
    whole = journal.path.read_bytes()
    first = whole.index(b"\n") + 1
    journal.path.write_bytes(whole[: first + 40])
    with Datagrams.udp() as server, forwarding(journal, server.target, memory):
        eventually(lambda: len(server.came) == 1)
        time.sleep(0.3)
        assert server.numbers() == [1]
        with journal.path.open("ab") as file:
            file.write(whole[first + 40 :])
        eventually(lambda: server.numbers() == [1, 2])
    assert server.bodies() == whole.splitlines()


def test_a_torn_line_that_is_set_aside_is_never_sent(journal: Journal, memory: Path) -> None:
    journal.append("joined")
    with journal.path.open("ab") as file:
        file.write(b'{"n":2,"time":"2026-01-31T12:00:00Z","kind":"train-rep')
    with Datagrams.udp() as server, forwarding(journal, server.target, memory):
        eventually(lambda: len(server.came) == 1)
        journal.append("approved")
        eventually(lambda: len(server.came) == 3)
    assert server.bodies() == lines_of(journal)
    assert [json.loads(body)["kind"] for body in server.bodies()] == ["joined", "torn-line-set-aside", "approved"]


@pytest.mark.parametrize("running", [True, False], ids=["while it follows", "between two starts"])
@pytest.mark.parametrize("lines", [1, 3, 5], ids=["shorter", "as long", "longer"])
def test_another_journal_is_sent_from_its_first_line(
    journal: Journal, memory: Path, tmp_path: Path, lines: int, running: bool
) -> None:
    for number in range(3):
        journal.append("train-report", round=number)
    other = Journal(tmp_path / "other.jsonl")
    for number in range(lines):
        other.append("evaluate-report", round=number)
    expected = lines_of(journal) + lines_of(other)
    with Datagrams.udp() as server:
        with forwarding(journal, server.target, memory):
            eventually(lambda: len(server.came) == 3)
            if running:
                other.path.rename(journal.path)
                eventually(lambda: len(server.came) >= 3 + lines)
        if not running:
            other.path.rename(journal.path)
            with forwarding(journal, server.target, memory):
                eventually(lambda: len(server.came) >= 3 + lines)
        assert server.bodies() == expected


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 50,
        b"[" * 900,
        b"7",
        b'{"n": 2}',
        b'{"n": "x", "line": 1}',
        b'{"n": 1e999, "line": ""}',
        b'{"n": -5, "line": ""}',
    ],
)
def test_a_damaged_memory_means_twice_and_never_lost(journal: Journal, memory: Path, content: bytes) -> None:
    for _ in range(3):
        journal.append("train-report")
    keys.write_private(memory, content)
    with Datagrams.udp() as server, forwarding(journal, server.target, memory):
        eventually(lambda: server.numbers() == [1, 2, 3])


def test_a_process_that_dies_sends_again_what_it_had_not_noted(journal: Journal, memory: Path) -> None:
    """The number on the disk is never ahead of what the server got."""
    journal.append("joined")
    with Datagrams.udp() as server:
        with forwarding(journal, server.target, memory):
            eventually(memory.exists)
        before = memory.read_bytes()
        journal.append("train-report")
        with forwarding(journal, server.target, memory):
            eventually(lambda: memory.read_bytes() != before)
        keys.write_private(memory, before)  # as if the power had failed before the last note
        with forwarding(journal, server.target, memory):
            eventually(lambda: server.numbers() == [1, 2, 2])


def test_text_that_the_journal_did_not_write_is_not_sent_on(journal: Journal, memory: Path) -> None:
    journal.append("joined")
    with journal.path.open("ab") as file:
        file.write(
            b"ZZTEST^PATIENT\n" + b'{"kind":"ZZTEST PATIENT","time":"2026-01-31T12:00:00Z"}\n' + b"\xff" * 400_000
        )
        file.write(b'\n{"kind":"joined","time":"ZZTEST"}\n[[[\n')
    with Datagrams.udp() as server, forwarding(journal, server.target, memory):
        eventually(lambda: len(server.came) >= 7)
    assert body_of(server.came[0]) == lines_of(journal)[0]
    assert not [message for message in server.came if b"ZZTEST" in message or b"\xff" in message]
    assert all(b" damaged-line - line " in message for message in server.came[1:])
    assert all(message.startswith(b"<132>1 - - isocenter ") for message in server.came[1:])


def test_a_line_that_no_datagram_holds_arrives_cut_over_udp_and_whole_over_tcp(journal: Journal, memory: Path) -> None:
    journal.append("approved", list_of=["a" * 120] * 1000)
    journal.append("train-report")
    line = lines_of(journal)[0]
    assert len(line) > 65535
    with Datagrams.udp() as server, forwarding(journal, server.target, memory):
        eventually(lambda: len(server.came) == 2)
    assert line.startswith(body_of(server.came[0])) and b'"n":1,' in server.came[0]
    with Stream() as stream, forwarding(journal, stream.target, memory.with_name("other")):
        eventually(lambda: stream.bodies() == lines_of(journal))


def test_nobody_waits_for_a_server_that_accepts_and_never_reads(
    journal: Journal, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(syslog, "TIMEOUT_S", 0.2)
    for _ in range(40):
        journal.append("approved", list_of=["a" * 120] * 1000)  # 5 MB, more than the buffers of both sides take
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with forwarding(journal, f"tcp://127.0.0.1:{deaf.getsockname()[1]}", memory):
            time.sleep(0.5)
        assert not memory.exists(), "nothing counts that the other side did not acknowledge"


def test_what_the_other_side_has_not_acknowledged_does_not_count(journal: Journal, memory: Path) -> None:
    for _ in range(3):
        journal.append("approved", list_of=["a" * 120] * 250)
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.bind(("127.0.0.1", 0))
        slow.listen()
        with forwarding(journal, f"tcp://127.0.0.1:{slow.getsockname()[1]}", memory):
            connection, _ = slow.accept()
            with connection:
                time.sleep(0.4)
                assert not memory.exists()
                connection.settimeout(0.05)
                threading.Thread(target=drain, args=(connection,), daemon=True).start()
                eventually(memory.exists)


def drain(connection: socket.socket) -> None:
    while True:
        try:
            if not connection.recv(65536):
                return
        except TimeoutError:
            continue
        except OSError:  # the test is over
            return


def test_a_missing_journal_is_waited_for(memory: Path, tmp_path: Path) -> None:
    with Datagrams.udp() as server:
        forwarder = Forwarder(tmp_path / "journal.jsonl", server.target, memory)
        forwarder.start()
        time.sleep(0.1)
        Journal(tmp_path / "journal.jsonl").append("joined")
        eventually(lambda: server.numbers() == [1])
        forwarder.stop()


def test_stopping_what_never_began_is_no_error(journal: Journal, memory: Path) -> None:
    Forwarder(journal.path, "udp://127.0.0.1:514", memory).stop()


def test_targets() -> None:
    assert parse_target("udp://10.0.0.1:514") == syslog.Target("udp", "10.0.0.1", 514)
    assert parse_target("tcp://log.example.org:6514") == syslog.Target("tcp", "log.example.org", 6514)
    assert parse_target("udp://[::1]:514") == syslog.Target("udp", "::1", 514)
    assert parse_target("unix:///dev/log") == syslog.Target("unix", path="/dev/log")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "514",
        "localhost",
        "udp://localhost",
        "udp://:514",
        "udp://localhost:",
        "udp://localhost:0",
        "udp://localhost:65536",
        "udp://localhost:٥١٤",
        "tls://localhost:6514",
        "http://localhost:80",
        "UDP://a:1",
        "udp://user@localhost:514",
        "udp://localhost:514/path",
        "udp://local host:514",
        "udp://localhost:514\n",
        "udp://[::1:514",
        "udp://[:::]:514",
        "udp://::1:514",
        "udp://[1.2.3.4]:514",
        "udp://-a:514",
        "tcp://a:-1",
        "unix://",
        "unix://dev/log",
        "unix:/dev/log",
        "unix:///dev\0log",
        "unix:///" + "a" * 200,
        "unix:///" + "ü" * 90,
        "file:///etc/passwd",
        "x" * 100_000,
    ],
)
def test_anything_else_is_no_target(text: str, journal: Journal, memory: Path) -> None:
    with pytest.raises(DocumentError) as caught:
        Forwarder(journal.path, text, memory)
    assert "unix:///dev/log" in caught.value.remedy and len(str(caught.value)) < 400
