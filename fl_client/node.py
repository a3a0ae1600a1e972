"""The long-lived node: it holds the site's connection to the consortium and one resident worker process that trains.

The node speaks Flower's Fleet API itself, over TLS 1.3 with the site's certificate, and never calls get-fab: nothing that the
coordinator could offer as code is asked for. Flower's own SuperNode starts a process that imports torch for every message
and looks for messages every three seconds; here the worker keeps network and cohort in memory, and the node looks often
while a run is going on and seldom when nothing happens.

What the node process does: connection, keys, polling. What the worker does: `fl_client.app` (images, training, the gate).
"""

import contextlib
import fcntl
import logging
import os
import signal
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import httpx
from flwr.app import Context, Message, RecordDict
from flwr.app.error import Error
from flwr.app.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    inflate_object_from_contents,
    pull_objects,
    push_objects,
)
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fl_client.site import Site
from privacy import keys
from privacy.errors import (
    IsocenterError,
    MessageMalformed,
    NodeRunning,
    NotEnrolled,
    Unreachable,
    WorkerDied,
    WrongAuthority,
)
from privacy.wire import ORDERS, REPORTS, Refusal, Report, decode

HELD_S = 0.5
PAUSE_FIRST_S, PAUSE_GROWTH, PAUSE_MOST_S = 0.02, 1.5, 2.0
"""Looks for orders. The coordinator holds a look that finds nothing until there is something, so the next one follows at once;
an answer within HELD_S says that it was not held, and then looks become seldom by themselves."""
RETRY_FIRST_S, RETRY_MOST_S = 0.5, 15.0
OBJECT_BACKOFF_S = 0.02  # a message is visible before its objects are; Flower's own first wait is a second
CALL_TIMEOUT_S = 60.0
STARTS_MAX = 3  # of a worker in a row: once may be an accident, and so may the memory of another program
Tell = Callable[[str], None]
log = logging.getLogger("isocenter.node")


@dataclass
class Connection:
    """One activated Fleet connection; raises httpx errors when the link breaks."""

    client: FleetHttpClient
    node: Node

    def receive(self) -> Message | None:
        """The next order with everything that belongs to it, or None; what Flower has taken back meanwhile is dropped."""
        answer = self.client.PullMessages(PullMessagesRequest(node=self.node))
        if not answer.messages_list:
            return None
        envelope = message_from_proto(answer.messages_list[0])
        run_id, message_id = envelope.metadata.run_id, envelope.metadata.message_id
        try:
            contents = pull_objects(
                [tree.object_id for tree in iterate_object_tree(answer.message_object_trees[0])],
                make_pull_object_fn_protobuf(self.client.PullObject, self.node, run_id),
                initial_backoff=OBJECT_BACKOFF_S,
            )
            make_confirm_message_received_fn_protobuf(self.client.ConfirmMessageReceived, self.node, run_id)(message_id)
        except ObjectPullError:
            log.warning("an order whose content is gone was dropped")
            return None
        except httpx.HTTPStatusError as error:
            if error.response.status_code != httpx.codes.FORBIDDEN:
                raise
            log.warning("an order of a run that has ended was dropped")
            return None
        message = inflate_object_from_contents(message_id, contents)
        if not isinstance(message, Message):
            raise MessageMalformed("what was received is no Flower message")
        message.metadata.__dict__["_message_id"] = message_id
        return message

    def send(self, reply: Message) -> None:
        """Push a reply and its objects. A reply that Flower no longer wants, because its run has ended, is dropped."""
        run_id = reply.metadata.run_id
        reply.metadata.__dict__["_message_id"] = reply.object_id
        tree, objects = get_object_tree(reply), get_all_nested_objects(reply)
        envelope = message_to_proto(remove_content_from_message(reply))
        request = PushMessagesRequest(
            node=self.node, messages_list=[envelope], message_object_trees=[tree], clientapp_runtime_list=[0.0]
        )
        try:
            answer = self.client.PushMessages(request)
            push_objects(
                objects,
                make_push_object_fn_protobuf(self.client.PushObject, self.node, run_id, answer.session_id),
                object_ids_to_push=set(answer.objects_to_push),
            )
        except ObjectPushError:
            log.warning("a reply was not taken in time and is dropped; the coordinator asks again")
        except httpx.HTTPStatusError as error:
            if error.response.status_code != httpx.codes.FORBIDDEN:
                raise
            log.warning("a reply to a run that has ended was dropped")

    def beat(self) -> None:
        self.client.SendNodeHeartbeat(
            SendNodeHeartbeatRequest(node=self.node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        )


@contextlib.contextmanager
def connect(site: Site) -> Iterator[Connection]:
    """An activated connection to the gateway named in site.yaml; deactivated at the end.

    Raises Unreachable, WrongAuthority or NotEnrolled with the cause in words.
    """
    if site.settings.coordinator is None:
        raise NotEnrolled("site.yaml names no coordinator")
    key = keys.load_key(site.home / "keys" / "site.key")
    client = _Fleet(
        site.settings.coordinator.gateway, tls_context(site), NodeAuthHttpInterceptor(key, key.public_key())
    )
    node: Node | None = None
    try:
        node = _activate(client, keys.public_pem(key), site.state / "node")
        yield Connection(client, node)
    except httpx.HTTPStatusError as error:
        raise _explained(error.response.status_code) from error
    except httpx.ConnectError as error:
        raise _explained_connect(error, site.settings.coordinator.gateway) from error
    except httpx.HTTPError as error:
        raise Unreachable(f"the connection to the gateway broke ({type(error).__name__})") from error
    finally:
        if node is not None:
            with contextlib.suppress(httpx.HTTPError):
                client.DeactivateNode(DeactivateNodeRequest(node_id=node.node_id))
        client.close()


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
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    folder = site.home / "keys"
    try:
        context.load_verify_locations(folder / "ca.pem")
        context.load_cert_chain(folder / "site.pem", folder / "site.key")
    except (OSError, ssl.SSLError) as error:
        raise NotEnrolled(f"the certificate in {folder} cannot be used ({error})") from None
    return context


class _Fleet(FleetHttpClient):
    """Flower's Fleet client over our TLS context: its own constructor knows no client certificates."""

    def __init__(self, gateway: str, context: ssl.SSLContext, identity: NodeAuthHttpInterceptor) -> None:
        version = RuntimeVersionHttpInterceptor(component_name="SuperNode")
        super().__init__(f"https://{gateway}", interceptors=(version, identity), verify=context, timeout=CALL_TIMEOUT_S)


class Worker:
    """One resident process that runs the ClientApp. If it dies, the order is refused and a new one takes its place.

    Each process tests its own noise, clip, draws, masks and isolation first; one that fails works on nothing.
    """

    def __init__(self, site: Site) -> None:
        self.site = site
        self._start()

    def _start(self) -> None:
        self.pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_begin_worker)
        self.ready: Future[None] = self.pool.submit(_warm)

    def wait(self) -> None:
        """Return when the process is ready; one that dies before is replaced.

        Raises AuditFailed if its self-test fails, WorkerDied if it dies again and again.
        """
        for _ in range(STARTS_MAX):
            try:
                return self.ready.result()
            except BrokenProcessPool:
                log.error("the worker process died while it started; a new one is started")
                self._start()
        raise WorkerDied(f"the worker process died {STARTS_MAX} times while it started")

    def answer(self, message: Message) -> Message:
        """The reply to an order, a Refusal if it could not be worked on, Flower's bare error if the message is no order."""
        try:
            self.wait()
            pending: Future[Message] = self.pool.submit(_work, str(self.site.home), message)
            return pending.result()
        except BrokenProcessPool:
            log.error("the worker process died while it worked on an order; a new one is started")
            self._start()
            code = WorkerDied.code
        except IsocenterError as error:
            log.error("the order could not be worked on: %s", error)
            code = error.code
        except Exception:
            log.exception("the order could not be worked on")
            code = IsocenterError.code
        try:
            report = Refusal(**decode(message, *ORDERS).naming(), site=self.site.name, code=code)
        except MessageMalformed:
            # Without an answer the coordinator would wait for its deadline; the text is one of our public codes.
            self.site.journal.append("no-order", code=MessageMalformed.code)
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, MessageMalformed.code), reply_to=message)
        self.site.note(report)
        return Message(report.to_records(), reply_to=message)

    def stop(self) -> None:
        for process in list((self.pool._processes or {}).values()):
            process.terminate()
        self.pool.shutdown(wait=True, cancel_futures=True)


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the group; the node ends the worker in order
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    """A worker whose node was killed would train on for nobody."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _warm() -> None:
    """Import what orders need, once, and have the privacy mechanism test itself; raises AuditFailed."""
    import torch

    import fl_client.app  # noqa: F401  the import is the work
    from privacy import selftest

    # The first optimizer of a process imports a second's worth of modules; better now than in the first round.
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]).step()
    selftest.require()


def _work(home: str, message: Message) -> Message:
    from fl_client.app import app

    metadata = message.metadata
    context = Context(
        run_id=metadata.run_id,
        node_id=metadata.dst_node_id,
        node_config={"site": home},
        state=RecordDict(),
        run_config={},
    )
    return app(message, context)


def serve(home: Path, tell: Tell) -> None:
    """Answer orders until KeyboardInterrupt. A broken link is retried for ever; a finished reply is kept and sent again.

    `tell` gets short sentences for people. Raises what no retry can mend: NotEnrolled, WrongAuthority, NodeRunning, AuditFailed.
    """
    site = Site.open(home)
    with only_one(site):
        _serve(site, tell)


def _serve(site: Site, tell: Tell) -> None:
    worker, unsent, pause = Worker(site), deque[Message](), RETRY_FIRST_S
    try:
        worker.wait()
        tell("Self-test passed: noise, clip, draws, masks and isolation of patients are as they should be.")
        while True:
            try:
                with connect(site) as connection:
                    tell(f"{site.name} is connected and waits for orders.")
                    pause = RETRY_FIRST_S
                    _answer_orders(connection, worker, unsent, tell)
            except Unreachable as error:
                tell(f"{error}; trying again in {pause:g} s")
                time.sleep(pause)
                pause = min(pause * 2, RETRY_MOST_S)
    finally:
        worker.stop()


def _answer_orders(connection: Connection, worker: Worker, unsent: deque[Message], tell: Tell) -> None:
    """Work through orders one by one until the link breaks, with heartbeats from a thread of their own."""
    done = threading.Event()
    threading.Thread(target=_keep_beating, args=(connection, done), daemon=True).start()
    pause = PAUSE_FIRST_S
    try:
        while True:
            while unsent:
                connection.send(unsent[0])
                unsent.popleft()
            asked = time.monotonic()
            message = connection.receive()
            if message is None:
                if time.monotonic() - asked < HELD_S:
                    time.sleep(pause)
                    pause = min(pause * PAUSE_GROWTH, PAUSE_MOST_S)
                continue
            pause, began = PAUSE_FIRST_S, time.monotonic()
            unsent.append(worker.answer(message))
            tell(_sentence(unsent[-1], time.monotonic() - began))
    finally:
        done.set()


def _keep_beating(connection: Connection, done: threading.Event) -> None:
    while not done.wait(HEARTBEAT_DEFAULT_INTERVAL / 3):
        with contextlib.suppress(httpx.HTTPError):  # the main loop meets the same broken link and reconnects
            connection.beat()


def _sentence(reply: Message, seconds: float) -> str:
    if reply.has_error():
        return f"a message that is no order was answered with an error ({MessageMalformed.code})"
    report: Report = decode(reply, *REPORTS)
    what = f"refused: {report.code}" if isinstance(report, Refusal) else f"{report.kind} sent"
    return f"round {report.round}: {what} ({seconds:.1f} s)"


def _explained(status: int) -> Exception:
    if status == 401:
        return NotEnrolled(
            "the coordinator does not know this site's key",
            remedy="Ask the coordinator whether the site was removed; join again with a new invitation.",
        )
    return Unreachable(f"the gateway answered {status}")


def _explained_connect(error: httpx.ConnectError, gateway: str) -> Exception:
    text = str(error)
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return WrongAuthority(f"the gateway {gateway} does not show a certificate of the consortium this site joined")
    return Unreachable(f"nothing answers at the gateway {gateway}")
