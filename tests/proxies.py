"""A hospital's HTTP proxy on loopback, for tests: CONNECT only, a record of what it was asked and saw, and each way to say no."""

import base64
import contextlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

REASONS = {200: "Connection established", 403: "Forbidden", 407: "Proxy Authentication Required", 502: "Bad Gateway"}


@dataclass
class Proxy:
    """`answer`: the status it gives to each CONNECT, 0 to say nothing at all; `account`: "user:password" that it asks for.

    `elsewhere`: host:port that it connects to in place of what was asked for, as a box that opens TLS does.
    """

    answer: int = 200
    account: str = ""
    elsewhere: str = ""
    asked: list[str] = field(default_factory=list)
    heads: list[bytes] = field(default_factory=list)
    up: bytearray = field(default_factory=bytearray)
    down: bytearray = field(default_factory=bytearray)
    listening: socket.socket = field(default_factory=socket.socket)

    @property
    def port(self) -> int:
        return int(self.listening.getsockname()[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def run(self) -> None:
        while True:
            try:
                accepted, _ = self.listening.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(accepted,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        with near, contextlib.suppress(OSError):
            head = bytearray()
            while b"\r\n\r\n" not in head:
                if not (piece := near.recv(4096)):
                    return
                head += piece
            self.heads.append(bytes(head))
            words = head.split(b"\r\n")[0].decode("latin-1").split()
            self.asked.append(f"{words[0]} {words[1]}")
            if self.answer == 0:
                near.recv(1)
                return
            status = self.answer if self._knows(bytes(head)) else 407
            reply = f"HTTP/1.1 {status} {REASONS.get(status, 'x')}\r\n"
            more = 'Proxy-Authenticate: Basic realm="hospital"\r\n' if status == 407 else ""
            if status != 200 or words[0] != "CONNECT":
                near.sendall(f"{reply}{more}Content-Length: 2\r\n\r\nno".encode())
                return
            host, _, port = (self.elsewhere or words[1]).rpartition(":")
            try:
                far = socket.create_connection((host, int(port)), 10)
            except OSError:
                near.sendall(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
                return
            with far:
                near.sendall(f"{reply}\r\n".encode())
                back = threading.Thread(target=_pass, args=(far, near, self.down), daemon=True)
                back.start()
                _pass(near, far, self.up)
                back.join(10)

    def _knows(self, head: bytes) -> bool:
        if not self.account:
            return True
        wanted = b"Basic " + base64.b64encode(self.account.encode())
        return any(line.lower() == b"proxy-authorization: " + wanted.lower() for line in head.split(b"\r\n"))


def _pass(source: socket.socket, target: socket.socket, seen: bytearray) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(65536):
            seen += piece
            target.sendall(piece)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


@contextmanager
def proxy(answer: int = 200, account: str = "", elsewhere: str = "") -> Iterator[Proxy]:
    made = Proxy(answer, account, elsewhere)
    made.listening.bind(("127.0.0.1", 0))
    made.listening.listen(64)
    threading.Thread(target=made.run, daemon=True).start()
    try:
        yield made
    finally:
        made.listening.shutdown(socket.SHUT_RDWR)
        made.listening.close()
