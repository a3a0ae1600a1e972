"""The door of the dashboard: who may look, what may be asked, and how much of it anybody may take.

In the order in which a caller meets it:
1. A connection that has not sent a whole request head in HEAD_S is ended, and there are at most CONNECTIONS_MAX.
2. Path and query are short, the Host header names this server (a page elsewhere that rebinds its name to 127.0.0.1 gets nothing),
   and the method is GET. The only exceptions are POST /login and /logout, where there is a login.
3. With a login: TLS 1.3, and a session. Its cookie is HttpOnly, Secure, SameSite=Strict, bound to this host, a random token that
   is kept only as its hash. Passwords are tried a few times a minute, one at a time; what is stored of one is its scrypt hash.
4. Whatever is answered carries headers under which a browser runs, loads and frames nothing from anywhere else.

Beyond loopback there is always a login. On loopback it is optional: whoever has an account on the machine could look otherwise.
"""

import asyncio
import hashlib
import ipaddress
import logging
import re
import secrets
import socket
import ssl
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from privacy import keys
from privacy.errors import DocumentError, IsocenterError, TrustError

HEAD_S = 10.0
BODY_S = 10.0
CONNECTIONS_MAX = 256
PATH_MAX, QUERY_MAX = 256, 256
FORM_BYTES_MAX = 4096
PASSWORD_MIN, PASSWORD_MAX = 12, 256
SESSION_S, IDLE_S = 12 * 3600.0, 3600.0
SESSIONS_MAX = 100
TRIES_EACH, TRIES_ALL, WINDOW_S = 5, 60, 60.0  # of one address, of everybody, in so many seconds
COOKIE = "__Host-isocenter"
OPEN_PATHS = ("/login", "/healthz", "/readyz")
HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",  # under no-referrer a browser says "null" for where the form of the login comes from
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-store",
}
_TOKEN = re.compile(r"[A-Za-z0-9_-]{43}")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
log = logging.getLogger("isocenter.dashboard")


class Refused(Exception):
    """One request that is not let in: status, a sentence, and headers of the answer."""

    def __init__(self, status: int, sentence: str, **headers: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence, self.headers = status, sentence, headers


# Passwords and sessions ----------------------------------------------------------------------------------------------


def set_password(path: Path, password: str) -> None:
    """Store the hash of the dashboard's password in `path` (0600). Raises DocumentError if it is too short or too long."""
    if not PASSWORD_MIN <= len(password) <= PASSWORD_MAX:
        raise DocumentError(
            f"the password has {len(password)} characters; {PASSWORD_MIN} to {PASSWORD_MAX} are needed",
            remedy="Take a few random words, from a password manager for example.",
        )
    keys.write_private(path, keys.password_record(password))


class Tries:
    """How often a password may still be tried: TRIES_EACH times by one address and TRIES_ALL by everybody, in WINDOW_S."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._made = clock, deque[tuple[float, str]]()

    def take(self, address: str) -> None:
        """Count one try; raises Refused (429) if there are too many."""
        now = self._clock()
        while self._made and self._made[0][0] < now - WINDOW_S:
            self._made.popleft()
        own = sum(each == address for _, each in self._made)
        if own >= TRIES_EACH or len(self._made) >= TRIES_ALL:
            raise Refused(429, "Too many tries. Wait a minute.", **{"retry-after": str(round(WINDOW_S))})
        self._made.append((now, address))

    def forget(self, address: str) -> None:
        """A password was right: what its address tried before counts no more."""
        self._made = deque(each for each in self._made if each[1] != address)


@dataclass
class Session:
    began: float
    seen: float


class Sessions:
    """Who is logged in: SHA-256 of each token, for at most SESSION_S, or IDLE_S without a request."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._held = clock, dict[bytes, Session]()

    def begin(self) -> str:
        """A new token, of 256 random bits. Beyond SESSIONS_MAX the one that was silent longest ends."""
        self._expire()
        if len(self._held) >= SESSIONS_MAX:
            del self._held[min(self._held, key=lambda name: self._held[name].seen)]
        token = secrets.token_urlsafe(32)
        self._held[_hashed(token)] = Session(self._clock(), self._clock())
        return token

    def holds(self, token: str) -> bool:
        self._expire()
        session = self._held.get(_hashed(token)) if _TOKEN.fullmatch(token) else None
        if session is not None:
            session.seen = self._clock()
        return session is not None

    def end(self, token: str) -> None:
        self._held.pop(_hashed(token), None)

    def _expire(self) -> None:
        now = self._clock()
        self._held = {
            name: each for name, each in self._held.items() if now - each.began < SESSION_S and now - each.seen < IDLE_S
        }


def _hashed(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "replace")).digest()


# The gate ------------------------------------------------------------------------------------------------------------


@dataclass
class Door:
    """Wraps the dashboard's pages. `hosts`: what a Host header may say. `password`: the file with its hash, None for no login.

    `page` renders the form of the login: (sentence about what went wrong, or nothing) -> HTML.
    """

    app: Application
    hosts: Collection[str]
    password: Path | None
    page: Callable[[str], str]
    sessions: Sessions = field(default_factory=Sessions)
    tries: Tries = field(default_factory=Tries)

    def __post_init__(self) -> None:
        self._hashing = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def dressed(event: MutableMapping[str, Any]) -> None:
            if event["type"] == "http.response.start":
                ours = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                event["headers"] = [*event.get("headers", []), *ours]
            await send(event)

        try:
            await self._admit(scope, receive, dressed)
        except Refused as refused:
            await _answer(dressed, refused.status, f"{refused.sentence}\n", "text/plain", refused.headers)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        if len(scope["raw_path"]) > PATH_MAX or len(scope["query_string"]) > QUERY_MAX:
            raise Refused(414, "This address is too long.")
        named = [value.decode("latin-1").lower() for name, value in scope["headers"] if name == b"host"]
        if len(named) != 1 or named[0] not in self.hosts:
            raise Refused(421, "This server does not answer to that name. See --host in `fl-server dashboard --help`.")
        path, method = scope["path"], scope["method"]
        if self.password is None or method == "GET":
            if method != "GET":
                raise Refused(405, "This dashboard is read only.", allow="GET")
        elif method != "POST" or path not in ("/login", "/logout"):
            raise Refused(405, "This dashboard is read only.", allow="GET, POST" if path == "/login" else "GET")
        if self.password is None:
            await self.app(scope, receive, send)
            return
        token = _cookie(scope)
        if method == "POST":
            self._require_own_origin(scope)
            await (self._log_in(scope, receive, send) if path == "/login" else self._log_out(token, send))
        elif path == "/login":
            await _answer(send, 200, self.page(""), "text/html")
        elif path in OPEN_PATHS or path.startswith("/static/") or self.sessions.holds(token):
            await self.app(scope, receive, send)
        elif path.startswith("/live"):
            raise Refused(401, "Log in first.")
        else:
            await _answer(send, 303, "", "text/plain", {"location": "/login"})

    @staticmethod
    def _require_own_origin(scope: Scope) -> None:
        """A form of another site cannot log anybody in or out: browsers say where a form comes from."""
        headers = dict(scope["headers"])
        origin, host = headers.get(b"origin", b"").decode("latin-1"), headers[b"host"].decode("latin-1")
        if origin.lower() != f"https://{host.lower()}":
            raise Refused(403, "This form comes from elsewhere.")

    async def _log_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        address = str((scope.get("client") or ("",))[0])
        try:
            form = parse_qs((await _body(receive)).decode("utf-8", "replace"), max_num_fields=8, keep_blank_values=True)
        except ValueError:
            raise Refused(400, "This is not the form of the login.") from None
        given = form.get("password", [""])[0][: PASSWORD_MAX + 1]
        try:
            self.tries.take(address)
        except Refused as refused:
            await _answer(send, refused.status, self.page(refused.sentence), "text/html", refused.headers)
            return
        async with self._hashing:  # each try takes 32 MiB and a tenth of a second
            right = await asyncio.to_thread(self._right, given)
        if not right:
            log.warning("a wrong password of the dashboard was tried")
            await _answer(send, 403, self.page("That was not the password."), "text/html")
            return
        self.tries.forget(address)
        cookie = (
            f"{COOKIE}={self.sessions.begin()}; Path=/; Secure; HttpOnly; SameSite=Strict; Max-Age={round(SESSION_S)}"
        )
        await _answer(send, 303, "", "text/plain", {"location": "/", "set-cookie": cookie})

    def _right(self, given: str) -> bool:
        if self.password is None:
            return False
        try:
            return keys.is_password(keys.read_private(self.password), given)
        except (IsocenterError, OSError) as error:
            log.error("the password of the dashboard cannot be read: %s", error)
            return False

    async def _log_out(self, token: str, send: Send) -> None:
        self.sessions.end(token)
        cookie = f"{COOKIE}=; Path=/; Secure; HttpOnly; SameSite=Strict; Max-Age=0"
        await _answer(send, 303, "", "text/plain", {"location": "/login", "set-cookie": cookie})


def _cookie(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"cookie":
            for part in value.decode("latin-1").split(";"):
                key, _, token = part.strip().partition("=")
                if key == COOKIE:
                    return str(token)
    return ""


async def _body(receive: Receive) -> bytes:
    """The body of a form. Raises Refused if it is large or slow."""
    body, more = b"", True
    try:
        async with asyncio.timeout(BODY_S):
            while more:
                event = await receive()
                if event["type"] != "http.request":
                    raise Refused(400, "The request broke off.")
                body, more = body + event.get("body", b""), bool(event.get("more_body"))
                if len(body) > FORM_BYTES_MAX:
                    raise Refused(413, "This form is too large.", connection="close")
    except TimeoutError:
        raise Refused(408, "The request was too slow.", connection="close") from None
    return body


async def _answer(
    send: Send, status: int, text: str, kind: str, headers: MutableMapping[str, str] | None = None
) -> None:
    content = text.encode()
    given = {"content-type": f"{kind}; charset=utf-8", "content-length": str(len(content)), **(headers or {})}
    pairs = [(name.encode(), value.encode("latin-1")) for name, value in given.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": content})


# The server ----------------------------------------------------------------------------------------------------------


class Impatient(H11Protocol):
    """HTTP/1.1 as uvicorn speaks it, for callers who say within HEAD_S what they want."""

    head_s = HEAD_S
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS_MAX:
            transport.abort()
        else:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._stop()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle is None or self.cycle.response_complete:
            self._wait()

    def _wait(self) -> None:
        self._stop()
        self._late = self.loop.call_later(self.head_s, self.transport.abort)

    def _stop(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, so that a port in use is our error with a remedy and not a line in a log."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio switches Nagle's algorithm off. Without, each answer in two pieces takes 40 ms more.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise IsocenterError(
            f"cannot listen on {host}:{port}: {error.strerror}",
            remedy="Stop what uses the port, or choose another one (of the coordinator: in server.yaml).",
        ) from None
    bound.listen(1024)
    bound.setblocking(False)
    return bound


def is_loopback(host: str) -> bool:
    """Whether `host` is an address that only this machine reaches. Raises DocumentError if it is no address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        raise DocumentError(
            f"{host!r} is no address of this machine", remedy="Give one such as 127.0.0.1, ::1 or 0.0.0.0."
        ) from None


def names_of(port: int, hosts: Collection[str]) -> set[str]:
    """What a Host header may say: each of `hosts` with the port, and without it where that is the port of HTTP or HTTPS."""
    bracketed = {f"[{host}]" if ":" in host else host.lower() for host in hosts}
    return {f"{host}:{port}" for host in bracketed} | (bracketed if port in (80, 443) else set())


def tls(certificate: Path, key: Path) -> ssl.SSLContext:
    """TLS 1.3 with this certificate; raises TrustError if it cannot be used."""
    keys.read_private(key)  # refuses a key that others can read, before it is used
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise TrustError(
            f"the certificate {certificate} cannot be used with {key} ({error})", remedy="Name both as PEM files."
        ) from None
    return context


def server(door: Application, context: ssl.SSLContext | None) -> uvicorn.Server:
    """A server of `door`, not started yet."""
    config = uvicorn.Config(
        door, http=Impatient, ws="none", lifespan="off", log_config=None, access_log=False, proxy_headers=False,
        server_header=False, timeout_keep_alive=5, timeout_graceful_shutdown=2, h11_max_incomplete_event_size=8192,
    )  # fmt: skip
    config.load()
    config.ssl = context
    return uvicorn.Server(config)
