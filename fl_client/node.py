"""The long-lived node: it holds the site's connection to the consortium and one resident worker process that trains.

The node speaks Flower's Fleet API itself, over TLS 1.3 with the site's certificate, and never calls get-fab: nothing that the
coordinator could offer as code is asked for. Flower's own SuperNode starts a process that imports torch for every message
and looks for messages every three seconds; here the worker keeps network and cohort in memory, and the node looks often
while a run is going on and seldom when nothing happens.

What the node process does: connection, keys, gate, journal, signatures; it reads no image and loads nothing that could. What the
worker does: evaluating and training (`fl_client.worker`, `fl_client.app`).
"""

import contextlib
import fcntl
import logging
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx
from flwr.app import Message
from flwr.app.error import Error
from flwr.app.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, ErrorCode
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supernode.fleet_http_client import FleetHttpClient
from google.protobuf.message import DecodeError

from fl_client import orders, sandbox
from fl_client.fleet import Identity
from fl_client.site import Site
from fl_client.upkeep import Upkeep
from fl_client.vitals import Vitals
from fl_client.worker import Worker
from privacy import heap, keys, parcels, reach, tracing
from privacy.errors import (
    CertificateExpired,
    CertificateRevoked,
    DiskUnusable,
    DocumentError,
    MessageMalformed,
    NodeRunning,
    NotEnrolled,
    Unreachable,
    VersionSkew,
    WrongAuthority,
)
from privacy.greeting import HEADER, Versions, own, skew
from privacy.reach import Way
from privacy.syslog import Forwarder
from privacy.wire import REPORTS, Refusal, Report, decode

HELD_S = 0.5
PAUSE_FIRST_S, PAUSE_GROWTH, PAUSE_MOST_S = 0.02, 1.5, 2.0
"""Looks for orders. The coordinator holds a look that finds nothing until there is something, so the next one follows at once;
an answer within HELD_S says that it was not held, and then looks become seldom by themselves."""
RETRY_FIRST_S, RETRY_MOST_S = 0.5, 15.0
CALL_TIMEOUT_S = 60.0
REPORT_TIMEOUT = httpx.Timeout(CALL_TIMEOUT_S, write=24 * 3600.0)
"""A report waits until the gateway has room for it, in the middle of being written; once it is, signs of life come every ten
seconds. A coordinator that ends meanwhile is noticed at once, a line that is dead by the kernel, after a quarter of an hour."""
Tell = Callable[[str], None]
log = logging.getLogger("isocenter.node")


@dataclass
class Connection:
    """One activated Fleet connection; raises httpx errors when the link breaks."""

    client: "_Fleet"
    node: Node
    beating: threading.Lock = field(default_factory=threading.Lock)

    def renew(self, client: "_Fleet") -> None:
        """Go on as the same node over another client, such as one with a renewed certificate; the old one is closed.

        Between orders, by the thread that receives and sends; heartbeats wait meanwhile.
        """
        with self.beating:
            old, self.client = self.client, client
        old.close()

    def receive(self) -> Message | None:
        """The next order with everything that belongs to it, or None; one that cannot be read is dropped."""
        body = parcels.post(self.client, parcels.RECEIVE_ORDER, PullMessagesRequest(node=self.node))
        if not body:
            return None
        try:
            head, *objects = parcels.unpack(body)
            answer = PullMessagesResponse.FromString(head)
            message_id = answer.messages_list[0].metadata.message_id
            contents = dict(zip(parcels.names(answer.message_object_trees), objects, strict=True))
            message = inflate_object_from_contents(message_id, contents)
        except (MessageMalformed, DecodeError, LookupError, TypeError, ValueError, AttributeError, RecursionError):
            message = None
        if not isinstance(message, Message):
            log.warning("an order that cannot be read was dropped")
            return None
        message.metadata.__dict__["_message_id"] = message_id
        return message

    def send(self, reply: Message) -> None:
        """Send a reply and its objects. One that Flower no longer wants, because its run has ended, is dropped."""
        trees, contents = parcels.flat([reply])
        reply.metadata.__dict__["_message_id"] = trees[0].object_id
        request = PushMessagesRequest(
            node=self.node,
            messages_list=[message_to_proto(remove_content_from_message(reply))],
            message_object_trees=trees,
            clientapp_runtime_list=[0.0],
        )
        try:
            parcels.post(self.client, parcels.SEND_REPORT, request, contents, REPORT_TIMEOUT)
        except httpx.HTTPStatusError as error:
            unwanted = error.response.status_code in (httpx.codes.FORBIDDEN, httpx.codes.BAD_REQUEST)
            if not unwanted or error.response.content:  # a word is the gateway's, which speaks of this site
                raise
            log.warning("a reply that the SuperLink does not want, because its run has ended, was dropped")

    def beat(self) -> None:
        with self.beating:
            self.client.SendNodeHeartbeat(
                SendNodeHeartbeatRequest(node=self.node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
            )


@contextlib.contextmanager
def connect(site: Site) -> Iterator[Connection]:
    """An activated connection to the gateway named in site.yaml; deactivated at the end.

    Raises Unreachable, WrongAuthority or NotEnrolled with the cause in words.
    """
    client, connection = fleet_client(site), None
    try:
        public = keys.public_pem(site.key)
        connection = Connection(client, _activate(client, public, site.state / "node"))
        yield connection
    except httpx.HTTPStatusError as error:
        if connection is not None and error.response.status_code == httpx.codes.UNAUTHORIZED:
            raise Unreachable("the coordinator was started again") from error  # and numbers its nodes anew
        raise _explained(error.response) from error
    except httpx.ConnectError as error:
        raise _explained_connect(error, site) from error
    except httpx.ProxyError as error:
        raise _explained_proxy(error, site) from error
    except httpx.HTTPError as error:
        raise Unreachable(f"the connection to the gateway broke ({type(error).__name__})") from error
    finally:
        if connection is not None:
            client = connection.client
            with contextlib.suppress(httpx.HTTPError):
                client.DeactivateNode(DeactivateNodeRequest(node_id=connection.node.node_id))
        client.close()


def fleet_client(site: Site) -> "_Fleet":
    """A client for the gateway named in site.yaml, with the site's present certificate; nothing is sent yet."""
    if site.settings.coordinator is None:
        raise NotEnrolled("site.yaml names no coordinator")
    if keys.ended(keys.load_certificate((site.home / "keys" / "site.pem").read_bytes())):
        raise CertificateExpired("the certificate of this site has ended")
    to = site.settings.coordinator
    return _Fleet(to.gateway, tls_context(site), Identity(site.key), to.way(site.home))


def _activate(client: FleetHttpClient, public: bytes, memory: Path) -> Node:
    """Our node, online. `memory` keeps its number: the same key always has the same one.

    Whoever went away without a word (a kill, a power loss at either end) counts as online for another minute, and is refused.
    That was us, so we say goodbye for it and come in.
    """
    request = ActivateNodeRequest(public_key=public, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
    try:
        answer = client.ActivateNode(request)
    except httpx.HTTPStatusError as error:
        if error.response.status_code != httpx.codes.PRECONDITION_FAILED or not memory.exists():
            raise
        client.DeactivateNode(DeactivateNodeRequest(node_id=int(memory.read_text())))
        answer = client.ActivateNode(request)
    keys.write_private(memory, str(answer.node_id).encode())
    return Node(node_id=answer.node_id)


@contextlib.contextmanager
def only_one(site: Site) -> Iterator[None]:
    """The only node of this site's home: two would take each other's orders. Raises NodeRunning if there is one."""
    with (site.state / "node.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise NodeRunning(f"a node of {site.name} is running already") from None
        yield


def tls_context(site: Site) -> ssl.SSLContext:
    """TLS 1.3, trusting the consortium's CA alone, with the site's certificate."""
    return reach.mutual(site.home / "keys", "site")


class _Fleet(FleetHttpClient):
    """Flower's Fleet client over our TLS context: its own constructor knows no client certificates."""

    def __init__(self, gateway: str, context: ssl.SSLContext, identity: Identity, way: Way | None = None) -> None:
        super().__init__(f"https://{gateway}", interceptors=(identity,), verify=context, timeout=CALL_TIMEOUT_S)
        # Flower's client goes wherever an answer sends it, and wherever an environment variable says. Ours goes to the gateway.
        self._client.close()
        self._client = httpx.Client(
            verify=context,
            timeout=CALL_TIMEOUT_S,
            follow_redirects=False,
            trust_env=False,
            proxy=httpx.Proxy(way.url, headers=way.headers) if way else None,
            http2=False,
            headers={HEADER: str(own())},
            event_hooks={"response": [self._hear]},
        )
        self.versions: Versions | None = None  # of the gateway, by its last answer

    def _hear(self, answer: httpx.Response) -> None:
        self.versions = Versions.read(answer.headers.get(HEADER, ""))


def serve(home: Path, tell: Tell, metrics_port: int | None = None) -> None:
    """Answer orders until KeyboardInterrupt. A broken link is retried for ever; a finished reply is kept and sent again.
    So is a disk that cannot be written: as long as the journal takes no line, no answer leaves.

    `metrics_port`: where on loopback to answer the hospital's monitoring; nowhere without it. `tell` gets short sentences for
    people. Raises what no retry can mend: NotEnrolled, WrongAuthority, NodeRunning, AuditFailed.
    """
    sandbox.keep_private()
    heap.return_large()
    site = Site.open(home)
    with only_one(site):
        vitals, end_traces = Vitals(site.home), tracing.begin(site.settings.traces, "node")
        try:
            if metrics_port is not None:
                tell(f"Metrics: http://127.0.0.1:{vitals.start(metrics_port)}/metrics")
            _serve(site, tell, vitals)
        finally:
            vitals.stop()
            end_traces()


def _serve(site: Site, tell: Tell, vitals: Vitals) -> None:
    worker, unsent, pause, upkeep = Worker(site), deque[Message](), RETRY_FIRST_S, Upkeep(site.home, tell)

    def fresh() -> _Fleet | None:
        if not upkeep.renewed.is_set():
            return None
        upkeep.renewed.clear()
        return fleet_client(site)

    site.note_settings()
    target = site.settings.syslog
    forwarder = Forwarder(site.home / "journal.jsonl", target, site.home / "syslog.json") if target else None
    try:
        if forwarder:
            forwarder.start()
        shield = worker.wait()
        tell("Self-test passed: noise, clip, draws, masks and isolation of patients are as they should be.")
        for gap in shield.gaps:
            tell(f"WARNING: {gap}")
        upkeep.start()
        while True:
            try:
                with connect(site) as connection:
                    tell(f"{site.name} is connected and waits for orders.")
                    log.info("connected")
                    if (found := skew(own(), connection.client.versions, "this site", "the coordinator")) is not None:
                        tell(f"{found.sentence} {found.remedy}")
                    pause, vitals.connected = RETRY_FIRST_S, True
                    reply = vitals.counting(partial(answer, site=site, worker=worker), _outcome)
                    _answer_orders(connection, reply, unsent, tell, fresh)
            except (Unreachable, DiskUnusable) as error:
                # Without a line in the journal nothing leaves, so an order that came meanwhile stays without an answer.
                vitals.connected = False
                log.warning("not connected: %s; trying again in %s s", error.code, pause)
                tell(f"{error}; trying again in {pause:g} s")
                time.sleep(pause)
                pause = min(pause * 2, RETRY_MOST_S)
    finally:
        upkeep.stop()
        worker.stop()
        if forwarder:
            forwarder.stop()


def answer(message: Message, site: Site, worker: Worker) -> Message:
    """The reply to `message`, whatever it is: work is done by `worker` after the gate, as site.yaml says at this moment.

    `site`: as it was when the node started, which names it while site.yaml cannot be read.
    """
    try:
        try:
            present = Site.open(site.home)
        except (DocumentError, NotEnrolled) as error:
            return orders.refuse(message, site, error.code)
        present.note_settings()
        return orders.answer(message, present, worker.carry_out)
    except MessageMalformed as error:
        # Without an answer the coordinator would wait for its deadline; the text is one of our public codes.
        site.journal.append("no-order", code=error.code)
        number = (
            ErrorCode.MOD_FAILED_PRECONDITION
            if isinstance(error, VersionSkew)
            else ErrorCode.CLIENT_APP_RAISED_EXCEPTION
        )
        return Message(Error(number, error.code), reply_to=message)


def _answer_orders(
    connection: Connection,
    reply: Callable[[Message], Message],
    unsent: deque[Message],
    tell: Tell,
    fresh: Callable[[], "_Fleet | None"],
) -> None:
    """Work through orders one by one until the link breaks, with heartbeats from a thread of their own.

    `fresh`: asked before each look for orders, gives a client to go on with as the same node, or None for the present one.
    """
    done = threading.Event()
    threading.Thread(target=_keep_beating, args=(connection, done), daemon=True).start()
    pause = PAUSE_FIRST_S
    try:
        while True:
            while unsent:
                connection.send(unsent[0])
                unsent.popleft()
            if client := fresh():
                connection.renew(client)
            asked = time.monotonic()
            message = connection.receive()
            if message is None:
                if time.monotonic() - asked < HELD_S:
                    time.sleep(pause)
                    pause = min(pause * PAUSE_GROWTH, PAUSE_MOST_S)
                continue
            pause, began = PAUSE_FIRST_S, time.monotonic()
            with tracing.span("order") as told:
                unsent.append(reply(message))
                told(outcome=_outcome(unsent[-1]), **_numbers(unsent[-1]))
            took = time.monotonic() - began
            log.info("an order was answered: %s, in %.1f s", _outcome(unsent[-1]), took)
            tell(_sentence(unsent[-1], took))
    finally:
        done.set()


def _keep_beating(connection: Connection, done: threading.Event) -> None:
    while not done.wait(HEARTBEAT_DEFAULT_INTERVAL / 3):
        with contextlib.suppress(httpx.HTTPError):  # the main loop meets the same broken link and reconnects
            connection.beat()


def _sentence(reply: Message, seconds: float) -> str:
    if reply.has_error() and reply.error.reason == VersionSkew.code:
        return f"an order of another version of Isocenter was refused ({VersionSkew.code}). {VersionSkew.remedy}"
    if reply.has_error():
        return f"a message that is no order was answered with an error ({MessageMalformed.code})"
    report: Report = decode(reply, *REPORTS)
    what = f"refused: {report.code}" if isinstance(report, Refusal) else f"{report.kind} sent"
    return f"round {report.round}: {what} ({seconds:.1f} s)"


def _outcome(reply: Message) -> str:
    """What came of an order, in one enumerated word: a kind of report, or the code of a refusal."""
    if reply.has_error():
        return VersionSkew.code if reply.error.reason == VersionSkew.code else MessageMalformed.code
    report: Report = decode(reply, *REPORTS)
    return report.code if isinstance(report, Refusal) else report.kind


def _numbers(reply: Message) -> dict[str, int]:
    """Round and attempt of the order that was answered; nothing of what was no order."""
    if reply.has_error():
        return {}
    report: Report = decode(reply, *REPORTS)
    return {"round": report.round, "attempt": report.attempt}


def _explained(answer: httpx.Response) -> Exception:
    """What an answer that is no success means; a body of the gateway's own is one of its codes."""
    if answer.status_code == httpx.codes.FORBIDDEN:
        code = answer.text.strip()[:64] if len(answer.content) <= 64 else ""
        named = {
            CertificateRevoked.code: CertificateRevoked("the coordinator revoked this site"),
            CertificateExpired.code: CertificateExpired("the certificate of this site has ended"),
        }
        return named.get(code) or NotEnrolled(
            "the gateway does not take this site's certificate",
            remedy="Ask the coordinator whether the site was removed; join again with a new invitation.",
        )
    if answer.status_code == httpx.codes.UNAUTHORIZED:
        return NotEnrolled(
            "the coordinator does not know this site's key",
            remedy="Ask the coordinator whether the site was removed; join again with a new invitation.",
        )
    if answer.status_code == httpx.codes.NOT_FOUND:
        return Unreachable(
            "the gateway does not know what this node asks: coordinator and site run versions that do not fit",
            remedy="See `fl-client check`: it names who has to upgrade.",
        )
    return Unreachable(f"the gateway answered {answer.status_code}")


def _explained_connect(error: httpx.ConnectError, site: Site) -> Exception:
    text, to = str(error), site.settings.coordinator
    gateway, way = (to.gateway, to.way(site.home)) if to else ("", None)
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return WrongAuthority(f"the gateway {gateway} does not show a certificate of the consortium this site joined")
    if way is not None and "SSL" not in text:
        return reach.silent_proxy(way)
    return Unreachable(f"nothing answers at the gateway {gateway}")


def _explained_proxy(error: httpx.ProxyError, site: Site) -> Exception:
    """What the proxy's answer means; httpx says it as "407 Proxy Authentication Required"."""
    to, status = site.settings.coordinator, str(error)[:3]
    way = to.way(site.home) if to else None
    if to is None or way is None or not status.isdecimal():
        return Unreachable("the proxy did not let through")
    return reach.refused(int(status), way, to.gateway)
