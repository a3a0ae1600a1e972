"""A real coordinator in a process of its own, its sites, and callers who send its public port whatever bytes they like."""

import contextlib
import re
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from coordinator import free_port, settings
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fl_server.gateway import Limits
from fl_server.roster import Home
from privacy import journal, keys
from privacy.calls import join

ROOT = Path(__file__).resolve().parent.parent
LIMITS = Limits(
    handshake_s=5.0,
    head_s=5.0,
    body_s=5.0,
    bytes_per_s=4096,
    keep_alive_s=5.0,
    look_s=0.1,
    connections_per_site=12,
)
PROGRAM = """
import os, signal, sys, threading
from pathlib import Path
from fl_server import link
from fl_server.gateway import Limits
from fl_server.roster import Home
def end_with_the_test():
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=end_with_the_test, daemon=True).start()
link.serve(Home.open(Path(sys.argv[1])), lambda text: print(text, flush=True), Limits(**eval(sys.argv[2])))
"""
CALLS = {  # Oracle: what a node of ours says, written down once more
    *("activate-node", "deactivate-node", "send-node-heartbeat", "receive", "send"),
}
BEAT = "/v1/fleet/send-node-heartbeat"
PATIENCE_S = 60.0


@dataclass
class Gate:
    """A real coordinator in a process of its own, and what its sites hold."""

    home: Home
    folder: Path
    process: subprocess.Popen[bytes]
    nodes: dict[str, Node] = field(default_factory=dict)
    clients: dict[str, FleetHttpClient] = field(default_factory=dict)
    headers: dict[str, bytes] = field(default_factory=dict)
    norths: ssl.SSLContext | None = None

    @property
    def port(self) -> int:
        return self.home.settings.gateway_port

    def join(self, name: str, role: Any = "site") -> None:
        join(str(self.home.invite(name, role)), self.folder / name, role)

    def key(self, name: str = "north", role: str = "site") -> keys.PrivateKey:
        return keys.load_key(self.folder / name / f"{role}.key")

    def context(self, name: str = "north", role: str = "site") -> ssl.SSLContext:
        return self.context_of(self.folder / name / f"{role}.pem", self.folder / name / f"{role}.key")

    def context_of(self, pem: Path | None, key: Path | None = None) -> ssl.SSLContext:
        context = ssl.create_default_context(cadata=self.home.ca_pem.decode())
        if pem is not None:
            context.load_cert_chain(pem, key)
        return context

    def made(self, made: x509.Certificate, key: Any) -> ssl.SSLContext:
        """The context of somebody who holds this certificate and its key."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        keys.write_private(folder / "key", key.private_bytes(*form))
        keys.write_public(folder / "pem", keys.certificate_pem(made))
        return self.context_of(folder / "pem", folder / "key")

    def shown(self, name: str = "north") -> bytes:
        """The value of Flower's header for the key of a site."""
        if name not in self.headers:
            self.headers[name] = b64encode(keys.public_pem(self.key(name)))
        return self.headers[name]

    def client(self, name: str = "north") -> FleetHttpClient:
        key = self.key(name)
        identity = NodeAuthHttpInterceptor(key, key.public_key())
        version = RuntimeVersionHttpInterceptor(component_name="SuperNode")
        url = f"https://127.0.0.1:{self.port}"
        return FleetHttpClient(url, interceptors=(version, identity), verify=self.context(name), timeout=30.0)

    def honest(self, name: str = "south") -> None:
        """One heartbeat of a site, answered by Flower. As a node does, it tries again if the line breaks."""
        end = time.monotonic() + PATIENCE_S
        while True:
            client = self.clients.get(name) or self.clients.setdefault(name, self.client(name))
            try:
                if name not in self.nodes:
                    request = ActivateNodeRequest(public_key=keys.public_pem(self.key(name)), heartbeat_interval=60)
                    self.nodes[name] = Node(node_id=client.ActivateNode(request).node_id)
                beat = SendNodeHeartbeatRequest(node=self.nodes[name], heartbeat_interval=60)
                assert client.SendNodeHeartbeat(beat).success
                return
            except httpx.HTTPError:
                self.clients.pop(name).close()
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)

    def anew(self, *names: str) -> None:
        """`honest` on a connection of its own for each, as if the node had just been started."""
        for name in names:
            if client := self.clients.pop(name, None):
                client.close()
            self.honest(name)

    def open(self, context: ssl.SSLContext | None = None) -> ssl.SSLSocket:
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        self.norths = self.norths or self.context()
        return (context or self.norths).wrap_socket(plain, server_hostname="127.0.0.1")

    def say(self, text: bytes, context: ssl.SSLContext | None = None) -> bytes:
        """The first whole answer to these bytes; empty if there is no connection."""
        try:
            with self.open(context) as secure:
                return self.spoken(secure, text, first=True)
        except (ssl.SSLError, ConnectionError):
            return b""

    @staticmethod
    def spoken(secure: ssl.SSLSocket, text: bytes, first: bool = False) -> bytes:
        """What is answered to these bytes: the first whole answer, or all until the other side hangs up."""
        got = b""
        with contextlib.suppress(ssl.SSLError, ConnectionError):
            secure.sendall(text)
            while not (first and whole(got)) and (more := secure.recv(65536)):
                got += more
        return got

    def refused(self) -> dict[str, int]:
        """Code -> how often, as far as the journal says."""
        lines = journal.Journal(self.home.root / "journal.jsonl").lines("gateway-refused")
        return {
            code: sum(line["count"] for line in lines if line["code"] == code) for code in {x["code"] for x in lines}
        }

    def inner_port(self) -> int:
        """Where the SuperLink itself listens, on loopback."""
        doors = {self.port, self.home.settings.service_port}
        family = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        listening = {c.laddr.port for p in family for c in p.net_connections() if c.status == psutil.CONN_LISTEN}
        [inner] = listening - doors
        return int(inner)


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Gate]:
    """Three sites and a researcher. Attackers speak as north where they need a certificate; south is the honest site."""
    home = Home.found(folder / "consortium", settings(gateway_port=free_port()))
    limits = {name: getattr(LIMITS, name) for name in LIMITS.__dataclass_fields__}
    command = [sys.executable, "-c", PROGRAM, str(home.root), repr(limits)]
    with (folder / "log").open("wb") as log:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)
    try:
        assert process.stdout is not None
        assert b"is ready" in process.stdout.readline(), (folder / "log").read_text()
        served = Gate(home, folder, process)
        for name in ("north", "south", "west"):
            served.join(name)
        served.join("rosa", "researcher")
        served.honest()
        yield served
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def request(gate: Gate, line: bytes = f"POST {BEAT} HTTP/1.1".encode(), *more: bytes, length: bytes = b"0") -> bytes:
    """A request head as north sends it, with other lines added; `length` empty leaves the header out."""
    lines = [line, b"Host: x", b"Content-Type: application/protobuf", b"flwr-public-key: " + gate.shown()]
    lines += [b"Content-Length: " + length] if length else []
    return b"\r\n".join([*lines, *more, b"Connection: close", b"", b""])


def whole(got: bytes) -> bool:
    head, end, body = got.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: ([0-9]+)", head)
    return bool(end) and len(body) >= int(length[1] if length else 0)


def status(answer: bytes) -> int:
    assert answer.startswith(b"HTTP/1.1 "), answer[:200]
    return int(answer[9:12])


def code(answer: bytes) -> str:
    return answer.partition(b"\r\n\r\n")[2].decode()


def flowers(answer: bytes) -> bool:
    """Whether Flower answered, or the counter for parcels before it, which says nothing but a status: no node signed this."""
    said = b"Invalid SuperNode authentication" in answer
    return (status(answer) == 401 and said) or (status(answer) in (400, 401) and code(answer) == "")
