"""The way to an address: directly, or in a tunnel through the institution's HTTP proxy, with TLS end to end in either case.

A proxy is asked with CONNECT for one host and port, and sees nothing of what goes through but its length: TLS begins behind it,
with the certificates of the consortium at both ends, as it does without a proxy. Which proxy that is stands in a file of this
machine's owner and nowhere else; variables such as HTTPS_PROXY are not looked at. Where one is named, nothing goes past it.

Every failure is an error whose sentence says what was met, and whose remedy says who can mend it: no name, nobody there, a wall
that refuses or swallows, a cut, plain HTTP, a proxy that asks for a password or permits no tunnel.
"""

import base64
import contextlib
import json
import re
import select
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography import x509
from OpenSSL import SSL
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from privacy import keys
from privacy.errors import NotEnrolled, ProxyRefused, TrustError, Unreachable

CONNECT_S = 10.0  # to connect, to be let through by a proxy, and to shake hands: each
HEAD_BYTES_MAX = 16 * 1024  # of a proxy's answer
_URL = re.compile(r"http://([A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?):([0-9]{1,5})/?")
_STATUS = re.compile(rb"HTTP/1\.[01] ([0-9]{3})(?: [^\r\n]*)?\r\n")


class Proxy(BaseModel):
    """The HTTP proxy through which this machine reaches the coordinator, where it has to."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    url: str = Field(description="http://host:port of a proxy that permits CONNECT to both ports of the coordinator")
    user: str = Field(default="", max_length=128, description="name that the proxy asks for, if it does (Basic)")
    password_file: str = Field(default="", description="file with the password, of mode 0600; relative to this file")

    @model_validator(mode="before")
    @classmethod
    def _no_secret(cls, given: Any) -> Any:
        # Before the field is looked at: what is wrong with a field is shown with what it holds.
        if isinstance(given, dict) and "@" in str(given.get("url", "")):
            raise ValueError("name and password stand in `user` and `password_file`, not in the url")
        return given

    @field_validator("url")
    @classmethod
    def _plain(cls, url: str) -> str:
        found = _URL.fullmatch(url)
        if not found or not 0 < int(found[2]) < 65536:
            raise ValueError("expected http://host:port, such as http://proxy.example.org:3128")
        return url

    @model_validator(mode="after")
    def _both_or_none(self) -> "Proxy":
        if bool(self.user) != bool(self.password_file):
            raise ValueError("`user` and `password_file` belong together")
        if ":" in self.user or not self.user.isprintable():
            raise ValueError("a name for a proxy has no colon and no control characters")
        return self

    def section(self, margin: str = "") -> str:
        """As a file of settings has it, each line after `margin`."""
        rows = {name: text for name, text in self.model_dump().items() if text}
        lines = [f"{margin}proxy:", *(f"{margin}  {name}: {json.dumps(text)}" for name, text in rows.items())]
        return "\n".join(lines) + "\n"

    def way(self, folder: Path) -> "Way":
        """The way through this proxy; `folder` is that of the settings. Raises KeyFileUnsafe, NotEnrolled for the password."""
        host, _, port = self.url.removeprefix("http://").rstrip("/").rpartition(":")
        if not self.user:
            return Way(host, int(port))
        secret = keys.read_private(folder / self.password_file).rstrip(b"\r\n")
        if not secret or b"\n" in secret or b"\r" in secret:
            raise TrustError(
                f"{folder / self.password_file} does not hold one line with a password", remedy="Write it anew."
            )
        basic = base64.b64encode(self.user.encode() + b":" + secret).decode()
        return Way(host, int(port), f"Basic {basic}")


@dataclass(frozen=True)
class Way:
    """A proxy to go through. `authorization` is a secret: it is in no text that this class makes of itself."""

    host: str
    port: int
    authorization: str = field(default="", repr=False)

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self}"

    @property
    def headers(self) -> dict[str, str]:
        """What a CONNECT carries beside the address."""
        return {"Proxy-Authorization": self.authorization} if self.authorization else {}


def refused(status: int, way: Way, target: str) -> ProxyRefused:
    """What an answer of the proxy to CONNECT means that is not 2xx."""
    host = target.rpartition(":")[0]
    if status == 407:
        what = "does not take this name and password" if way.authorization else "asks for a name and a password"
        return ProxyRefused(
            f"the proxy {way} {what} (407)",
            remedy="Enter `user` and `password_file` below `proxy` (site.yaml, researcher.yaml). Only Basic is spoken: where the "
            "proxy wants Kerberos or NTLM, ask those who run it to let this machine through without.",
        )
    if status in (502, 503, 504):
        return ProxyRefused(
            f"the proxy {way} cannot reach {target} ({status})",
            remedy="Ask the coordinator whether it runs; then those who run the proxy whether it may connect to this port.",
        )
    return ProxyRefused(
        f"the proxy {way} permits no tunnel to {target} ({status})",
        remedy=f"Ask those who run the proxy to permit CONNECT to both ports of {host}, without opening the TLS inside.",
    )


def no_name(host: str) -> Unreachable:
    return Unreachable(
        f"the host name {host} cannot be resolved",
        remedy=f"Try `getent hosts {host}` on this machine; if it prints nothing, ask your network's IT about DNS for this "
        "name. Where only the proxy resolves outside names, enter the proxy.",
    )


def silent_proxy(way: Way) -> ProxyRefused:
    return ProxyRefused(
        f"nothing answers at the proxy {way}",
        remedy="Compare host and port of `proxy` (site.yaml, researcher.yaml) with what those who run it say.",
    )


def connect(host: str, port: int, way: Way | None = None, seconds: float = CONNECT_S) -> socket.socket:
    """A connection to `host`, through the proxy if there is a way. Raises Unreachable, of which ProxyRefused is one."""
    if way is None:
        return _connected(host, port, seconds)
    try:
        made = _connected(way.host, way.port, seconds)
    except Unreachable as error:
        raise ProxyRefused(f"the proxy cannot be reached: {error}", remedy=silent_proxy(way).remedy) from None
    try:
        _ask_for_tunnel(made, f"{host}:{port}", way, time.monotonic() + seconds)
    except BaseException:
        made.close()
        raise
    return made


def _connected(host: str, port: int, seconds: float) -> socket.socket:
    where = f"{host}:{port}"
    try:
        return socket.create_connection((host, port), seconds)
    except ConnectionRefusedError:
        raise Unreachable(
            f"nothing listens at {where} (connection refused)",
            remedy="The machine is there, so DNS and routes are right: either the coordinator does not run (`fl-server start`), "
            "or the port is another, or a firewall refuses it. Ask the coordinator first.",
        ) from None
    except socket.gaierror:
        raise no_name(host) from None
    except TimeoutError:
        raise Unreachable(
            f"{where} did not answer within {seconds:g} s",
            remedy="Nothing came back at all, which is what a firewall does that drops: ask your network's IT to permit outgoing "
            f"TCP to {where}, or enter the proxy that leads out.",
        ) from None
    except OSError as error:
        raise Unreachable(f"no connection to {where} ({error.strerror})") from None


def _ask_for_tunnel(link: socket.socket, target: str, way: Way, deadline: float) -> None:
    lines = [
        f"CONNECT {target} HTTP/1.1",
        f"Host: {target}",
        *(f"{name}: {text}" for name, text in way.headers.items()),
    ]
    head = b""
    try:
        link.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))
        while b"\r\n\r\n" not in head:
            link.settimeout(max(0.001, deadline - time.monotonic()))
            piece = link.recv(4096)
            head += piece
            if not piece or len(head) > HEAD_BYTES_MAX or not head.startswith(b"HTTP/"[: len(head)]):
                break
    except TimeoutError:
        raise ProxyRefused(
            f"the proxy {way} took the connection and did not answer in time", remedy=silent_proxy(way).remedy
        ) from None
    except OSError:
        pass
    found = _STATUS.match(head)
    if not found:
        raise ProxyRefused(f"what listens at {way} is no HTTP proxy", remedy=silent_proxy(way).remedy)
    if not found[1].startswith(b"2"):
        raise refused(int(found[1]), way, target)
    if not head.endswith(b"\r\n\r\n"):  # TLS lets the client speak first, so nobody behind the proxy said this
        raise ProxyRefused(f"the proxy {way} speaks where only the coordinator should", remedy=silent_proxy(way).remedy)


def mutual(folder: Path, role: str) -> ssl.SSLContext:
    """TLS 1.3, trusting the authority in a keys folder alone, with the certificate of `role`. Raises NotEnrolled."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_verify_locations(folder / "ca.pem")
        context.load_cert_chain(folder / f"{role}.pem", folder / f"{role}.key")
    except (OSError, ssl.SSLError) as error:
        raise NotEnrolled(f"the certificate in {folder} cannot be used ({error})") from None
    return context


def shown_chain(host: str, port: int, way: Way | None = None, seconds: float = CONNECT_S) -> list[x509.Certificate]:
    """The certificates a server shows, believed by nobody yet; only the opening of a handshake is sent. Raises Unreachable."""
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_min_proto_version(SSL.TLS1_3_VERSION)
    context.set_alpn_protos([b"h2", b"http/1.1"])  # gRPC servers hang up without the first
    context.set_verify(SSL.VERIFY_NONE)  # on purpose: the caller compares fingerprints, then connects anew with a pin
    with contextlib.closing(connect(host, port, way, seconds)) as link, _faults_named(f"{host}:{port}", seconds):
        link.setblocking(False)
        tls = SSL.Connection(context, link)
        tls.set_connect_state()
        _handshake(tls, link, time.monotonic() + seconds)
        chain = tls.get_peer_cert_chain(as_cryptography=True)
    if not chain:
        raise Unreachable(f"{host}:{port} showed no certificate")
    return list(chain)


@contextlib.contextmanager
def _faults_named(where: str, seconds: float) -> Iterator[None]:
    """What goes wrong in a handshake, as Unreachable."""
    try:
        yield
    except TimeoutError:
        raise Unreachable(
            f"{where} did not answer within {seconds:g} s",
            remedy="The connection was taken, and no TLS came: a firewall that looks into connections does that, or another "
            "program at this port. Ask your network's IT whether TLS to this address is inspected.",
        ) from None
    except (SSL.SysCallError, SSL.ZeroReturnError, ConnectionError):
        raise Unreachable(
            f"the connection to {where} was cut in the middle of the handshake",
            remedy="A firewall or a box that inspects TLS does that; ask your network's IT to let TLS to this address through "
            "unopened. If it never worked for anybody, ask the coordinator.",
        ) from None
    except (SSL.Error, ValueError) as error:
        if "wrong version number" in str(error) or "http request" in str(error):
            raise Unreachable(
                f"{where} answers, but no TLS 1.3 connection could be made: it speaks plain text, such as HTTP",
                remedy="It is another program's port, or a page of a firewall or proxy in its place. Compare the port with the "
                "coordinator; ask your network's IT for the proxy that leads out.",
            ) from None
        raise Unreachable(
            f"{where} answers, but no TLS 1.3 connection could be made; is it the consortium's port?",
            remedy="Compare the port with the coordinator. A box that inspects TLS may also know no TLS 1.3.",
        ) from None


def _handshake(tls: Any, link: socket.socket, deadline: float) -> None:
    while True:
        try:
            tls.do_handshake()
            return
        except SSL.WantReadError:
            readable, writable = [link], []
        except SSL.WantWriteError:
            readable, writable = [], [link]
        left = deadline - time.monotonic()
        if left <= 0 or not any(select.select(readable, writable, [], left)):
            raise TimeoutError
