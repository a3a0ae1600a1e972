"""The coordinator's public port for training: what a hospital's node may say to Flower, and nobody else anything.

In the order in which a caller meets it:
1. TLS 1.3 with a certificate of this consortium, within seconds. If too many handshakes are unfinished, the oldest of the
   address that has most of them gives way.
2. A few connections for each site.
3. HTTP/1.1 in its strictest form: POST to exactly one of FLEET_PATHS, each header once, a body of an announced length. There is
   no chunked body, no upgrade and no second request before the answer, so nothing can be read in two ways.
4. The certificate is a site's, valid now, over the key that the roster has for that name now, and the key that Flower is shown
   is the same. A site that is revoked, or whose certificate ends, loses its open connections within seconds as well.
5. Reports, which alone may be large, come in only as far as there is room for them (`fl_server.room`): the others are left with
   their senders, and a sign of life meanwhile. So memory does not grow with the number of sites.

Everything else is refused before Flower sees a byte of it, and counted in the journal.
"""

import asyncio
import base64
import datetime as dt
import logging
import re
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Literal

import uvicorn
from cryptography import x509
from cryptography.x509.oid import NameOID
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from fl_server.doorbell import BODY_BYTES_MAX, Application, Channel, Scope
from fl_server.room import BODIES_BYTES, Room, Turn, room_bytes
from fl_server.roster import Home
from privacy import keys, parcels
from privacy.errors import CertificateExpired, CertificateRevoked, IsocenterError, NotEnrolled, TrustError
from privacy.greeting import HEADER, Versions, own

FLEET_PATHS = frozenset(
    (
        "/v1/fleet/activate-node",
        "/v1/fleet/deactivate-node",
        "/v1/fleet/send-node-heartbeat",
        parcels.RECEIVE_ORDER,
        parcels.SEND_REPORT,
    )
)
"""What `fl_client.node` calls. Left out on purpose: register-node and unregister-node (only enrolment registers), get-run,
get-fab (no node of ours ever asks for code), and Flower's own calls about messages, in whose place parcels are."""
SMALL_BYTES_MAX = 1024 * 1024  # of every body but a report's
HEADERS_MAX = 40
FORBIDDEN = frozenset((b"transfer-encoding", b"content-encoding", b"upgrade", b"http2-settings", b"expect", b"trailer"))
KEY_HEADER = b"flwr-public-key"  # in which Flower's node shows its key: base64 of its PEM

MALFORMED, UNKNOWN_PATH, UNMEASURED, TOO_LARGE = "message-malformed", "path-unknown", "length-missing", "body-too-large"
HEAD_TOO_LARGE, TOO_SLOW, TOO_MANY, UNAVAILABLE = "head-too-large", "too-slow", "too-many-connections", "unavailable"
NO_HANDSHAKE, CROWDED_OUT = "handshake-failed", "crowded-out"
STATUS = {
    MALFORMED: b"400 Bad Request",
    TrustError.code: b"403 Forbidden",
    NotEnrolled.code: b"403 Forbidden",
    CertificateExpired.code: b"403 Forbidden",
    CertificateRevoked.code: b"403 Forbidden",
    UNKNOWN_PATH: b"404 Not Found",
    TOO_SLOW: b"408 Request Timeout",
    UNMEASURED: b"411 Length Required",
    TOO_LARGE: b"413 Content Too Large",
    HEAD_TOO_LARGE: b"431 Request Header Fields Too Large",
    TOO_MANY: b"503 Service Unavailable",
    UNAVAILABLE: b"503 Service Unavailable",
}
"""Code -> status line of its answer. A body holds the code and nothing else."""

STALE_S = 30.0  # a roster that could not be read for so long admits nobody
LINGER_S = 1.0  # a refused caller that is still sending gets to read why
CLOSE_S = 1.0  # at the end, for answers that are under way
UNACKNOWLEDGED_S = 60  # a peer that vanished, or never reads, is dropped by the kernel
HEARD_S = 10.0  # between two notes of other versions that one site tells
REPORT_FIRST_S, REPORT_MOST_S = 10.0, 600.0
"""Between two journal lines about one kind of refusal; doubled while it goes on, so that no attack fills the disk."""

_LINE = re.compile(rb"([A-Z]{1,16}) ([\x21-\x7e]{1,4096}) HTTP/1\.1")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}):[\t ]*([\t\x20-\x7e]*)")
_LENGTH = re.compile(rb"0|[1-9][0-9]{0,9}")
_NO_HEAD = re.compile(rb"(?<!\r)\n|\r[^\n]|[^\t\r\n\x20-\x7e]")  # a line that does not end in CR LF, or no text
_END = b"\r\n\r\n"
_ESTABLISHED = 1  # as Linux counts the states of TCP; after the other side's end it is another
_PROCESSING = b"HTTP/1.1 102 Processing\r\n\r\n"
_NEVER = dt.datetime(1, 1, 1, tzinfo=dt.UTC)
log = logging.getLogger("isocenter.gateway")


@dataclass(frozen=True)
class Limits:
    """How much of the gateway anybody may take. The defaults are many times what a hospital's node needs."""

    handshake_s: float = 10.0
    head_s: float = 10.0  # for a request line and headers, on a new connection and on a kept one
    body_s: float = 30.0  # for a body, and another second for each `bytes_per_s` of it
    bytes_per_s: int = 16 * 1024
    keep_alive_s: float = 30.0  # longer than httpx keeps an idle connection, so that the node closes it
    look_s: float = 0.5  # how often the roster is read
    head_bytes: int = 8 * 1024
    handshakes: int = 128  # unfinished at a time
    connections: int = 512  # with a finished handshake, at a time
    connections_per_site: int = 16  # a node uses up to four; those of a broken line are noticed after a while
    bodies_bytes: int = BODIES_BYTES
    """Of reports in memory at a time, over all sites; room for the two largest in any case."""
    bodies_bytes_per_s: int = 1024 * 1024
    """While others wait, a report that is not here after `body_s` and the time of a full room at this speed gives way."""
    sign_s: float = 10.0  # between two signs of life to who waits: proxies may cut a connection silent for 30 s


@dataclass(frozen=True)
class Standing:
    """Who stands in the roster at one moment."""

    admitted: Mapping[str, str]
    """Name of a site -> its key, as `privacy.keys.point_hex` writes it. Sites that are enrolled and not revoked."""
    revoked: Collection[str]


@dataclass(frozen=True)
class Identity:
    """Whom a client certificate speaks for. `fault` is the code of what is wrong with it for ever, if anything is."""

    fault: str | None
    name: str = ""
    point: str = ""
    shown: bytes = b""  # what Flower's header has to say
    begins: dt.datetime = _NEVER
    ends: dt.datetime = _NEVER


@dataclass(frozen=True)
class Head:
    """What counts of the head of an acceptable request."""

    path: str
    length: int
    shown: bytes
    versions: Versions | None = None


class Refused(Exception):
    """One request, refused with a code of STATUS."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


def gateway_context(home: Home) -> ssl.SSLContext:
    """TLS 1.3 only; a client without a certificate of this consortium's CA does not get past the handshake."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.num_tickets = 0  # no session is resumed: each connection shows its certificate anew
    context.load_cert_chain(home.tls_pem, home.tls_key)
    context.load_verify_locations(cadata=home.ca_pem.decode("ascii"))
    return context


def read_head(head: bytes, body_bytes_max: int = BODY_BYTES_MAX) -> Head:
    """What a request head, up to and including its empty line, asks for; raises Refused unless it is exactly as we want it."""
    first, *lines = head.removesuffix(_END).split(b"\r\n")
    line, fields = _LINE.fullmatch(first), dict[bytes, bytes]()
    if line is None or len(lines) > HEADERS_MAX:
        raise Refused(MALFORMED)
    for found in map(_FIELD.fullmatch, lines):
        if found is None or found[1].lower() in fields or found[1].lower() in FORBIDDEN:
            raise Refused(MALFORMED)
        fields[found[1].lower()] = found[2].rstrip(b"\t ")
    path, length = line[2].decode("ascii"), fields.get(b"content-length")
    if b"host" not in fields or (length is not None and not _LENGTH.fullmatch(length)):
        raise Refused(MALFORMED)
    if line[1] != b"POST" or path not in FLEET_PATHS:
        raise Refused(UNKNOWN_PATH)
    if length is None:
        raise Refused(UNMEASURED)
    if int(length) > (body_bytes_max if path == parcels.SEND_REPORT else SMALL_BYTES_MAX):
        raise Refused(TOO_LARGE)
    told = Versions.read(fields.get(HEADER.encode(), b"").decode("ascii"))
    return Head(path, int(length), fields.get(KEY_HEADER, b""), told)


def answer(code: str) -> bytes:
    """The whole answer to a refused request, after which the connection ends."""
    facts = f"content-type: text/plain\r\ncontent-length: {len(code)}\r\nconnection: close\r\n\r\n{code}"
    return b"HTTP/1.1 " + STATUS[code] + b"\r\n" + facts.encode("ascii")


class Refusals:
    """Counts refusals by code, and writes sums of them to the journal."""

    def __init__(self, note: Callable[..., object], kind: str = "gateway-refused") -> None:
        self._note, self._kind = note, kind  # Journal.append, and what its lines are called
        self._counts, self._lock = Counter[str](), threading.Lock()
        self._last: dict[str, tuple[float, float]] = {}
        """Code -> when its last line was written, and how long the next one waits."""

    def count(self, code: str) -> None:
        """One more; from any thread."""
        with self._lock:
            self._counts[code] += 1

    async def write(self, now: float, everything: bool = False) -> None:
        """Write what is due, or `everything`. What cannot be written is kept, and said in the log."""
        for code in list(self._counts):
            last, pause = self._last.get(code, (now - 2 * REPORT_MOST_S, REPORT_FIRST_S))
            if now - last < pause and not everything:
                continue
            with self._lock:
                count = self._counts.pop(code)
            try:
                await asyncio.to_thread(self._note, self._kind, code=code, count=count)
            except (IsocenterError, OSError) as error:
                with self._lock:
                    self._counts[code] += count
                log.error("the journal does not take what the gateway refused: %s", error)
            quiet = now - last > 2 * pause
            self._last[code] = now, REPORT_FIRST_S if quiet else min(2 * pause, REPORT_MOST_S)


class Gateway:
    """The public port in front of `app`. One event loop, in which `app` runs too."""

    def __init__(
        self,
        app: Application,
        ca: x509.Certificate,
        roster: Callable[[], Standing],
        note: Callable[..., object],
        limits: Limits,
        told: Callable[[str, Versions], object] = lambda site, versions: None,
    ) -> None:
        """`roster`, `note` (Journal.append) and `told` (Roster.tell) may block: each is called in a thread."""
        self.app, self.limits, self.refusals = app, limits, Refusals(note)
        self.body_bytes_max: Callable[[], int] = lambda: BODY_BYTES_MAX
        """Of a report, and of all open requests of a site."""
        self.unfetched: Callable[[], int] = lambda: 0
        """Bytes of reports that came, and that no run has fetched yet."""
        self.room = Room(self.room_bytes, lambda: self.unfetched())  # noqa: PLW0108  it is set later
        self.config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
        )
        self.config.load()
        self.state = ServerState()
        self.state.default_headers = [(HEADER.encode(), str(own()).encode())]
        self._ca, self._roster, self._told = ca, roster, told
        self._heard: dict[str, tuple[Versions, float]] = {}
        self._standing = Standing({}, ())
        self._looked_at = float("-inf")
        self._looked = asyncio.Event()
        self._handshakes: dict[asyncio.Task[None], str] = {}
        """Handshakes under way, oldest first, with the address they come from."""

    async def serve(self, listening: socket.socket, context: ssl.SSLContext) -> None:
        """Answer callers until cancelled. Raises what reading the roster raises, if that fails at the start."""
        loop = asyncio.get_running_loop()
        await self._look()
        watch = asyncio.create_task(self._watch())
        try:
            while True:
                try:
                    accepted, address = await loop.sock_accept(listening)
                except OSError as error:
                    log.error("a connection could not be accepted: %s", error)
                    await asyncio.sleep(0.1)
                    continue
                self._greet(accepted, address[0], context)
                await asyncio.sleep(0)  # so that a flood of connections leaves turns to the others
        finally:
            watch.cancel()
            await self._close()

    async def fault(self, identity: Identity) -> str | None:
        """The code with which a request of `identity` has to be refused now, None if it may pass."""
        code = self._fault(identity)
        if code in (NotEnrolled.code, CertificateRevoked.code):
            try:
                async with asyncio.timeout(STALE_S):
                    for _ in range(2):  # who joined a moment ago is in the second look from now at the latest
                        await self._looked.wait()
            except TimeoutError:
                return UNAVAILABLE
            code = self._fault(identity)
        return code

    def identify(self, certificate_der: bytes) -> Identity:
        """Whom a certificate, which the handshake has accepted, speaks for."""
        try:
            certificate = keys.load_certificate(ssl.DER_cert_to_PEM_cert(certificate_der).encode("ascii"))
            names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
            name = keys.check_name(str(names[0].value) if names else "")
            keys.check_issued(self._ca, certificate, name, "site")
            key = keys.public_key_of(certificate)
        except (IsocenterError, ValueError) as error:
            return Identity(error.code if isinstance(error, TrustError) else TrustError.code)
        period = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        return Identity(None, name, keys.point_hex(key), base64.b64encode(keys.public_pem(key)), *period)

    async def hear(self, identity: Identity, versions: Versions | None) -> None:
        """Note the versions that an admitted site tells, when they are others than before; not more often than HEARD_S."""
        now = asyncio.get_running_loop().time()
        before, at = self._heard.get(identity.name, (None, -HEARD_S))
        if versions is None or versions == before or now - at < HEARD_S:
            return
        self._heard[identity.name] = versions, now
        try:
            await asyncio.to_thread(self._told, identity.name, versions)
        except (IsocenterError, OSError) as error:
            log.error("the roster does not take what a site told: %s", error)

    def crowded(self, identity: Identity) -> bool:
        """Whether there are too many connections, or too many of this site. Strangers together count as one site."""
        present = [each for each in self.connections if each.identity.point == identity.point]
        return len(self.connections) > self.limits.connections or len(present) > self.limits.connections_per_site

    def announced(self, identity: Identity) -> int:
        """Bytes that the site's open requests hold, or may still send."""
        return sum(each.announced for each in self.connections if each.identity.point == identity.point)

    def room_bytes(self) -> int:
        """Bytes of reports that may be here at a time."""
        return room_bytes(self.body_bytes_max(), self.limits.bodies_bytes)

    def holds_up(self, turn: Turn) -> bool:
        """Whether a body has kept others waiting for longer than any has to take."""
        return self.room.held_up_s(turn) > self.limits.body_s + self.room_bytes() / self.limits.bodies_bytes_per_s

    @property
    def connections(self) -> "list[_Connection]":
        return [each for each in self.state.connections if isinstance(each, _Connection)]

    def _fault(self, identity: Identity) -> str | None:
        if identity.fault:
            return identity.fault
        if not identity.begins <= dt.datetime.now(dt.UTC) <= identity.ends:
            return CertificateExpired.code
        if asyncio.get_running_loop().time() - self._looked_at > STALE_S:
            return UNAVAILABLE
        if self._standing.admitted.get(identity.name) == identity.point:
            return None
        return CertificateRevoked.code if identity.name in self._standing.revoked else NotEnrolled.code

    async def _look(self) -> None:
        began = asyncio.get_running_loop().time()
        self._standing = await asyncio.to_thread(self._roster)
        self._looked_at = began
        self._looked.set()
        self._looked = asyncio.Event()

    async def _watch(self) -> None:
        """Read the roster again and again, end connections of those who are out, and report what was refused."""
        while True:
            await asyncio.sleep(self.limits.look_s)
            try:
                await self._look()
            except (IsocenterError, OSError) as error:
                log.error("the roster cannot be read: %s", error)
            for connection in self.connections:
                code = self._fault(connection.identity)
                if connection.admitted and code is not None:
                    connection.refuse(code)
                else:
                    connection.give_way()
            self.room.look()  # what is fetched, or was kept for too long, gives room without a word
            await self.refusals.write(asyncio.get_running_loop().time())

    def _greet(self, accepted: socket.socket, address: str, context: ssl.SSLContext) -> None:
        if len(self._handshakes) >= self.limits.handshakes:
            [(busiest, _)] = Counter(self._handshakes.values()).most_common(1)
            oldest = next(task for task, of in self._handshakes.items() if of == busiest)
            del self._handshakes[oldest]
            oldest.cancel()
            self.refusals.count(CROWDED_OUT)
        task = asyncio.create_task(self._handshake(accepted, context))
        self._handshakes[task] = address

        def done(task: asyncio.Task[None]) -> None:
            self._handshakes.pop(task, None)
            if task.cancelled():  # perhaps before it began, and took the socket
                accepted.close()

        task.add_done_callback(done)

    async def _handshake(self, accepted: socket.socket, context: ssl.SSLContext) -> None:
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_S * 1000)
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: _Connection(self),
                accepted,
                ssl=context,
                ssl_handshake_timeout=self.limits.handshake_s,
                ssl_shutdown_timeout=self.limits.handshake_s,
            )
        except ConnectionResetError:
            return  # who comes and goes, such as a look whether the port is open, is not refused anything
        except OSError:
            self.refusals.count(NO_HANDSHAKE)

    async def _close(self) -> None:
        for task in list(self._handshakes):
            task.cancel()
        for connection in self.connections:
            connection.shutdown()
        if self.state.tasks:
            await asyncio.wait(self.state.tasks, timeout=CLOSE_S)
        waiting = list(self.state.tasks)
        for request in waiting:
            request.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for connection in self.connections:
            connection.transport.close()
        await self.refusals.write(asyncio.get_running_loop().time(), everything=True)


def _hung_up(transport: asyncio.Transport) -> bool:
    """Whether the other side has ended the connection, which asyncio does not see while it reads nothing."""
    if transport.is_closing() or not hasattr(socket, "TCP_INFO"):
        return transport.is_closing()
    state = transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
    return bool(state[0] != _ESTABLISHED)


class _Connection(H11Protocol):
    """One client that has passed the handshake. It hands whole, acceptable requests to uvicorn, one at a time.

    Where a request ends is decided here, by its announced length; uvicorn and h11 come to the same end, or refuse it.
    """

    def __init__(self, gateway: Gateway) -> None:
        super().__init__(gateway.config, gateway.state, {})
        self.app = self._answer
        self.identity = Identity(TrustError.code)
        self.admitted = False  # whether a request of it ever passed
        self.announced = 0
        self._gateway, self._limits = gateway, gateway.limits
        self._stage: Literal["head", "body", "answer", "over"] = "head"
        self._head, self._left, self._sent = bytearray(), 0, 0
        self._versions: Versions | None = None
        self._began = 0.0
        self._turn: Turn | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        tls: ssl.SSLObject = transport.get_extra_info("ssl_object")
        self.identity = self._gateway.identify(tls.getpeercert(binary_form=True) or b"")
        if self._gateway.crowded(self.identity):
            self.refuse(TOO_MANY)
        else:
            self._wait(self._limits.head_s, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stage = "over"
        self._wait()
        self._go_away()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._stage == "over":
            return
        try:
            if self._stage == "head":
                data = self._take_head(data)
            if self._stage != "head" and len(data) > self._left:
                raise Refused(MALFORMED)  # a second request before the answer to the first
        except Refused as refused:
            self.refuse(refused.code)
            return
        if self._stage == "body":
            self._left -= len(data)
            if data:
                super().data_received(data)
            if self._left == 0:
                self._stage = "answer"
                self._wait()

    def refuse(self, code: str) -> None:
        """Answer with `code`, if that is still possible, and end the connection. Nothing of Flower's is sent any more."""
        if self._stage != "over":
            self._gateway.refusals.count(code)
            self._end(code)

    def give_way(self) -> None:
        """End a body that keeps others waiting for too long; its node sends it again, after them."""
        if self._stage == "body" and self._turn is not None and self._gateway.holds_up(self._turn):
            self._too_slow()

    def _end(self, code: str) -> None:
        self._stage, begun = "over", False
        self._go_away()
        if self.cycle is not None and not self.cycle.response_complete:
            begun = self.cycle.response_started
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if begun:
            self.transport.close()
        else:
            self.transport.write(answer(code))
            self._wait(LINGER_S, self.transport.close)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._unset_keepalive_if_required()
        self.announced = 0
        if self.transport.is_closing():
            self._stage = "over"
        elif self._stage == "answer":
            self._stage = "head"
            # A large answer is on its way for a while after it was handed over.
            self._wait(self._limits.keep_alive_s + self._sent / self._limits.bytes_per_s, self.transport.close)
        else:
            self._stage = "over"
            self._wait(LINGER_S, self.transport.close)

    def _take_head(self, data: bytes) -> bytes:
        """Add to the head of a request; what belongs to its body. Raises Refused."""
        if not self._head:
            self._wait(self._limits.head_s, self._too_slow)
        self._head += data
        end = self._head.find(_END) + len(_END)
        whole = end >= len(_END)
        if (end if whole else len(self._head)) > self._limits.head_bytes:
            raise Refused(HEAD_TOO_LARGE)
        if not whole:
            if _NO_HEAD.search(self._head):
                raise Refused(MALFORMED)
            return b""
        head, rest = bytes(self._head[:end]), bytes(self._head[end:])
        self._head.clear()
        most = self._gateway.body_bytes_max()
        asked = read_head(head, most)
        if self.identity.fault is None and asked.shown != self.identity.shown:
            raise Refused(TrustError.code)  # a node that shows Flower another key than its certificate has
        if self._gateway.announced(self.identity) + asked.length > most:
            raise Refused(TOO_MANY)
        self.announced = self._left = asked.length
        self._versions = asked.versions
        self._stage, self._sent, self._began = "body", 0, self.loop.time()
        self._wait(self._limits.body_s, self._body_is_late)
        super().data_received(head)
        return rest

    async def _answer(self, scope: Scope, receive: Channel, send: Channel) -> None:
        code = await self._gateway.fault(self.identity)
        if code is not None:
            self.refuse(code)
            return
        self.admitted = True
        await self._gateway.hear(self.identity, self._versions)

        async def counted(event: MutableMapping[str, Any]) -> None:
            self._sent += len(event.get("body", b""))
            await send(event)

        try:
            if self.announced > SMALL_BYTES_MAX:
                await self._enter()
            await self._gateway.app(scope, receive, counted)
        except asyncio.CancelledError:  # the caller has gone, or the coordinator stops, while the request waits
            if self._stage != "over":
                self._end(UNAVAILABLE)
        finally:
            # Not before: what was read of a body is in memory until here, also if its caller has gone.
            if self._turn is not None:
                self._gateway.room.leave(self._turn)
                self._turn = None

    async def _enter(self) -> None:
        """Wait until there is room for the body. Until somebody asks for it, uvicorn reads no further than its first 64 KiB."""
        self._turn = self._gateway.room.ask(self.announced)
        if self._stage == "over":
            self._go_away()
        if not self._turn.granted.done():
            self._wait(self._limits.sign_s, self._give_sign)
        await self._turn.granted
        self._began = self.loop.time()
        if self._stage == "body":
            self._wait(self._limits.body_s, self._body_is_late)

    def _go_away(self) -> None:
        """Wait for room no longer. Who was let in already leaves when what was read is out of memory."""
        if self._turn is not None:
            self._turn.granted.cancel()

    def _give_sign(self) -> None:
        """Show a caller who waits, and whatever is between, that the connection is alive; notice if it is not.

        Nothing is read of a caller who waits, so neither would an end be.
        """
        if _hung_up(self.transport):
            self.transport.abort()
        else:
            self.transport.write(_PROCESSING)
            self._wait(self._limits.sign_s, self._give_sign)

    def _wait(self, seconds: float = 0.0, then: Callable[[], None] | None = None) -> None:
        """Do `then` after `seconds`, unless something else is awaited before."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if then is None else self.loop.call_later(seconds, then)

    def _too_slow(self) -> None:
        self.refuse(TOO_SLOW)

    def _body_is_late(self) -> None:
        due = self._limits.body_s + (self.announced - self._left) / self._limits.bytes_per_s
        over = self.loop.time() - self._began
        if over >= due:
            self._too_slow()
        else:
            self._wait(due - over, self._body_is_late)
