"""A journal's lines, handed to the institution's own syslog server while they are written (RFC 5424).

    <132>1 2026-01-31T12:00:00Z - isocenter 4711 refusal - {"n":3,"time":"2026-01-31T12:00:00Z","kind":"refusal",...}

Facility local0; severity warning for refusals and for whatever says that something is not as it should be, else informational.
The message is the journal's line as it stands, so its hash can be compared with the journal later. No host name is sent.

A line counts as handed over when the system has let go of it and, a moment later, no error came back. Its number is then kept
on the disk: after a crash, a restart, or an outage of the server a line may arrive twice. Syslog has no receipts, so what a
server loses after it took it, or UDP loses on the way without an error, is not sent again.
"""

import errno
import fcntl
import ipaddress
import itertools
import json
import logging
import os
import re
import socket
import struct
import termios
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from pydantic import AfterValidator

from privacy import keys
from privacy.errors import DocumentError
from privacy.journal import LINE_BYTES_MAX

POLL_S = 1.0  # how often the journal is looked at; also how often, at most, a number is written to the disk
RETRY_S = 5.0
SETTLE_S = 0.2  # how long an error on the way to the server has to come back before the last lines count
TIMEOUT_S = 5.0  # for a connection, and for a server that takes nothing
BATCH = 1000  # lines between two looks at the server
CUT_BYTES = 1024  # of a line that no datagram holds
MEMORY_BYTES_MAX = 1024
WARNINGS = ("refus", "torn", "contradict", "revoked", "void", "missing", "replaced")
_WARNING, _INFORMATIONAL = 16 * 8 + 4, 16 * 8 + 6  # local0

_NETWORK = re.compile(r"(udp|tcp)://(?:\[([0-9a-fA-F:.]{2,45})\]|([A-Za-z0-9](?:[A-Za-z0-9.-]{0,252}))):([0-9]{1,5})")
_UNIX = re.compile(r"unix://(/[^\0\n]{1,100})")  # a socket's path has at most 107 bytes
_KIND = re.compile(r"[a-z0-9][a-z0-9_-]{0,127}")
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")
_log = logging.getLogger("isocenter.syslog")


@dataclass(frozen=True)
class Target:
    """Where lines go: host and port, or under `unix` the path of a datagram socket."""

    transport: Literal["udp", "tcp", "unix"]
    host: str = ""
    port: int = 0
    path: str = ""


def parse_target(text: str) -> Target:
    """The target that a setting names; raises DocumentError for anything but the three forms of its remedy."""
    if found := _UNIX.fullmatch(text):
        if len(os.fsencode(found[1])) <= 107:
            return Target("unix", path=found[1])
    elif found := _NETWORK.fullmatch(text):
        host, port = found[2] or found[3], int(found[4])
        if 1 <= port <= 65535 and (found[2] is None or _is_ipv6(host)):
            return Target("udp" if found[1] == "udp" else "tcp", host, port)
    raise DocumentError(
        f"{text[:200]!r} is no address of a syslog server",
        remedy="Write udp://HOST:PORT, tcp://HOST:PORT or unix:///dev/log; an IPv6 address in brackets.",
    )


def _checked(text: str) -> str:
    try:
        parse_target(text)
    except DocumentError as error:
        raise ValueError(str(error)) from None
    return text


TargetText = Annotated[str, AfterValidator(_checked)]
"""A target as settings write it; anything else is no valid setting."""


def frame(line: bytes, number: int) -> bytes:
    """The syslog message for a line of a journal, the `number`th. What is no such line is reported, but not sent on."""
    try:
        entry = json.loads(line)
        kind, at = str(entry["kind"]), str(entry["time"])
    except (ValueError, KeyError, TypeError, RecursionError):
        kind = at = ""
    if not (_KIND.fullmatch(kind) and _TIME.fullmatch(at)):
        # Only what privacy.journal wrote is known to hold no free text.
        return b"<%d>1 - - isocenter %d damaged-line - line %d is no line of a journal" % (
            _WARNING,
            os.getpid(),
            number,
        )
    priority = _WARNING if any(word in kind for word in WARNINGS) else _INFORMATIONAL
    header = f"<{priority}>1 {at} - isocenter {os.getpid()} {kind[:32]} - "
    return header.encode() + line.rstrip(b"\n")


@dataclass(frozen=True)
class _Place:
    """Behind a line of the journal: its number, the byte after it, and the line itself, by which a journal is recognised."""

    number: int = 0
    end: int = 0
    line: bytes = b""

    def after(self, line: bytes) -> "_Place":
        return _Place(self.number + 1, self.end + len(line), line)


@dataclass
class Forwarder:
    """Follows `journal` from a thread of its own, and sends every whole line to `target`. Nobody ever waits for the server.

    `memory`: the file that keeps the number of the last line handed over. A journal in which that line is another one, or that
    has fewer lines, is a new one and is sent from its first line. While the server is down, it is tried again every few
    seconds, for as long as it takes; the log says once that it is. Raises DocumentError for a target that is none.
    """

    journal: Path
    target: str
    memory: Path
    _sent: _Place = field(default=_Place(), init=False)
    _kept: _Place = field(default=_Place(), init=False)
    _link: "_Link | None" = field(default=None, init=False)
    _down: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._to = parse_target(self.target)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="syslog", daemon=True)

    def start(self) -> None:
        """Begin, once; returns at once, whether or not the server is there."""
        self._thread.start()

    def stop(self) -> None:
        """Send what is still there if the server takes it, and end. Returns within a few seconds whatever the server does."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=SETTLE_S + 3)

    def _follow(self) -> None:
        self._sent = self._kept = self._recall()
        while not self._stopping.is_set():
            self._stopping.wait(POLL_S if self._attempt() else RETRY_S)
        if self._attempt():
            time.sleep(SETTLE_S)
            self._attempt()  # keeps the number of what the first one sent
        self._close()

    def _attempt(self) -> bool:
        """Keep the number of what was sent a moment ago, then send what is new; False if the server is not there."""
        try:
            if self._link is None:
                self._link = _Link.open(self._to)
            self._link.check()
            if self._sent != self._kept and self._link.is_empty():
                self._keep()
            for place in self._new():
                self._link.send(frame(place.line, place.number))
                self._sent = place
        except OSError as error:
            self._close()
            self._sent = self._kept  # what was sent since may be lost
            if not self._down:
                _log.warning("syslog %s: %s; lines wait until it is there again", self.target, error.strerror or error)
            self._down = True
            return False
        return True

    def _keep(self) -> None:
        content = json.dumps({"n": self._sent.number, "line": keys.digest(self._sent.line)}).encode()
        try:
            keys.write_private(self.memory, content)
        except OSError as error:  # a full disk is no reason to send everything again
            _log.warning("%s cannot be written: %s; after a restart lines are sent twice", self.memory, error.strerror)
        self._kept = self._sent
        if self._down:
            _log.warning("syslog %s is there again", self.target)
        self._down = False

    def _recall(self) -> _Place:
        """Behind the last line that was handed over; the beginning if nothing is known of it, or the journal is another one."""
        try:
            with self.memory.open("rb") as file:
                kept = json.loads(file.read(MEMORY_BYTES_MAX))
            number, digest = int(kept["n"]), kept["line"]
            with self.journal.open("rb") as file:
                for place in _places(file, _Place()):
                    if place.number >= number:
                        return place if keys.digest(place.line) == digest else _Place()
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            pass  # a line that is sent twice is better than one that is not sent
        return _Place()

    def _new(self) -> Iterator[_Place]:
        """Whole lines that were not sent yet, at most BATCH."""
        try:
            file = self.journal.open("rb")
        except FileNotFoundError:
            return
        with file:
            file.seek(self._sent.end - len(self._sent.line))
            if file.read(len(self._sent.line)) != self._sent.line:
                self._sent = self._kept = _Place()
                file.seek(0)
            yield from itertools.islice(_places(file, self._sent), BATCH)

    def _close(self) -> None:
        if self._link is not None:
            self._link.socket.close()
            self._link = None


@dataclass(frozen=True)
class _Link:
    """A socket to the server. Every method raises OSError if the server is not there."""

    socket: socket.socket
    transport: str

    @classmethod
    def open(cls, to: Target) -> "_Link":
        if to.transport == "tcp":
            return cls(socket.create_connection((to.host, to.port), timeout=TIMEOUT_S), to.transport)
        family: socket.AddressFamily = socket.AF_UNIX
        address: Any = to.path
        if to.transport == "udp":
            family, _, _, _, address = socket.getaddrinfo(to.host, to.port, type=socket.SOCK_DGRAM)[0]
        made = socket.socket(family, socket.SOCK_DGRAM)
        try:
            made.settimeout(TIMEOUT_S)
            made.connect(address)  # so that "nobody there" comes back as an error
        except OSError:
            made.close()
            raise
        return cls(made, to.transport)

    def check(self) -> None:
        """Raise OSError if an error came back since, or the server closed the connection; what it says is not read."""
        self.socket.setblocking(False)
        try:
            if self.socket.recv(4096) == b"" and self.transport == "tcp":  # Linux then tells of no error behind it
                raise ConnectionResetError(errno.ECONNRESET, "the server closed the connection")
        except BlockingIOError:
            pass
        finally:
            self.socket.settimeout(TIMEOUT_S)

    def is_empty(self) -> bool:
        """Whether nothing waits on this side: over TCP, the other side's system has acknowledged everything."""
        try:
            waiting: int = struct.unpack("i", fcntl.ioctl(self.socket, termios.TIOCOUTQ, bytes(4)))[0]
        except OSError:
            return True  # a system that cannot tell
        return waiting == 0

    def send(self, message: bytes) -> None:
        if self.transport == "tcp":
            self.socket.sendall(b"%d %s" % (len(message), message))  # octet counting, RFC 6587
            return
        try:
            self.socket.send(message)
        except OSError as error:
            if error.errno != errno.EMSGSIZE:
                raise
            self.socket.send(message[:CUT_BYTES])


def _places(file: BinaryIO, place: _Place) -> Iterator[_Place]:
    """Behind each whole line from `place` on, where `file` stands. A torn last line is none yet."""
    while line := file.readline(LINE_BYTES_MAX + 1):
        if not line.endswith(b"\n") and len(line) <= LINE_BYTES_MAX:
            return
        place = place.after(line)
        yield place


def _is_ipv6(host: str) -> bool:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True
