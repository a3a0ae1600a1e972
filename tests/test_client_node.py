"""The node: whatever comes and whatever happens, the coordinator gets an answer that says nothing but a code; and the node itself
reads no image and loads nothing that could."""

import json
import pickle
import random
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
import worker_probe
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.task_identity import TaskIdentity
from hospital import Hospital

from fl_client import node, sandbox
from fl_client.fleet import Identity
from fl_client.node import Connection
from fl_client.worker import Worker
from privacy import keys, parcels, tracing, wire
from privacy.errors import AuditFailed, DiskUnusable


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Hospital:
    return Hospital.open(tmp_path_factory.mktemp("node"))


@pytest.fixture(scope="module")
def worker(hospital: Hospital) -> Iterator[Worker]:
    made = Worker(hospital.site)
    yield made
    made.stop()


def message(order: wire.Order | RecordDict, kind: str = "") -> Message:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    records, own = (order, "train") if isinstance(order, RecordDict) else (order.to_records(), order.message_type)
    made = Message(records, dst_node_id=5, message_type=kind or own)
    made.metadata.__dict__["_message_id"] = "m1"
    return made


def journal(hospital: Hospital) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (hospital.home / "journal.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["train", "evaluate", "query", "train.shell"])
def test_junk_is_answered_with_a_bare_error(hospital: Hospital, worker: Worker, kind: str) -> None:
    junk = RecordDict({"isocenter": ConfigRecord({"kind": "shell", "x": "rm -rf /"})})
    reply = node.answer(message(junk, kind), hospital.site, worker)
    assert reply.has_error() and reply.error.reason == "message-malformed"
    assert journal(hospital)[-1]["kind"] == "no-order"


@pytest.mark.parametrize("kind", ["train.shell", "query", "evaluate"])
def test_an_order_in_a_message_of_another_kind_is_refused_and_costs_nothing(
    hospital: Hospital, worker: Worker, kind: str
) -> None:
    """The same order in its own kind of message is answered afterwards."""
    order = hospital.order(run=f"two-{kind.replace('.', '-')}")
    report = wire.decode(node.answer(message(order, kind), hospital.site, worker), *wire.REPORTS)
    assert isinstance(report, wire.Refusal) and report.code == "message-malformed"
    report = wire.decode(node.answer(message(order), hospital.site, worker), *wire.REPORTS)
    assert isinstance(report, wire.TrainReport)


def test_the_gate_is_in_the_node_and_the_worker_hears_of_no_order_that_does_not_pass(hospital: Hospital) -> None:
    """Replayed, of an unapproved study, forged: each is refused with a line in the journal, and no process works on it."""

    def never(*_: Any) -> Any:
        pytest.fail("an order that was not admitted reached the worker")

    idle = cast(Worker, SimpleNamespace(carry_out=never))
    orders = {
        "study-not-approved": hospital.order(study="ab" * 32, run="three"),
        "order-forged": hospital.order(run="three").signed(hospital.site.key),
        "policy-forbids": hospital.order(run="three", round=3),
    }
    for code, order in orders.items():
        report = wire.decode(node.answer(message(order), hospital.site, idle), *wire.REPORTS)
        assert isinstance(report, wire.Refusal) and report.code == code
        line = journal(hospital)[-1]
        assert (line["kind"], line["facts"]["code"]) == ("refusal", code)


def test_a_site_yaml_broken_while_the_node_runs_is_a_refusal(hospital: Hospital, worker: Worker) -> None:
    path, before = hospital.home / "site.yaml", hospital.site
    good = path.read_text()
    try:
        path.write_text("nonsense: [")
        report = wire.decode(node.answer(message(hospital.order(run="four")), before, worker), *wire.REPORTS)
        assert isinstance(report, wire.Refusal) and report.code == "bad-document"
    finally:
        path.write_text(good)


def test_a_node_whose_self_test_fails_stops_before_it_connects(
    hospital: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker_probe.program(monkeypatch, "fails_its_test")
    monkeypatch.setattr(node, "connect", lambda site: pytest.fail("connected"))
    monkeypatch.setattr(sandbox, "keep_private", lambda: None)  # it would hold for the process of the tests
    said: list[str] = []
    with pytest.raises(AuditFailed, match="half of it"):
        node.serve(hospital.home, said.append)
    assert said == []


@pytest.mark.parametrize(
    ("shield", "warnings"),
    [(sandbox.Shield(True, True), 0), (sandbox.Shield(True, False), 1), (sandbox.Shield(False, False), 2)],
)
def test_a_node_whose_worker_is_not_held_back_says_so_loudly(
    hospital: Hospital, monkeypatch: pytest.MonkeyPatch, shield: sandbox.Shield, warnings: int
) -> None:
    def connects(site: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(node, "connect", connects)
    monkeypatch.setattr(sandbox, "keep_private", lambda: None)
    monkeypatch.setattr(node, "Worker", lambda site: SimpleNamespace(wait=lambda: shield, stop=lambda: None))
    monkeypatch.setattr(node.Upkeep, "start", lambda self: None)  # it would say that this home has joined nothing
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        node.serve(hospital.home, said.append)
    assert [line.startswith("WARNING: ") for line in said] == [False] + [True] * warnings


def test_a_node_whose_disk_cannot_be_written_says_so_and_connects_again_when_it_can(
    hospital: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    came: list[str] = []

    def connects(site: Any) -> Any:
        came.append("once more")
        if len(came) == 1:
            raise DiskUnusable("journal.jsonl cannot be written: No space left on device")
        raise KeyboardInterrupt

    monkeypatch.setattr(node, "connect", connects)
    monkeypatch.setattr(node, "RETRY_FIRST_S", 0.01)
    monkeypatch.setattr(sandbox, "keep_private", lambda: None)
    shield = sandbox.Shield(True, True)
    monkeypatch.setattr(node, "Worker", lambda site: SimpleNamespace(wait=lambda: shield, stop=lambda: None))
    monkeypatch.setattr(node.Upkeep, "start", lambda self: None)
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        node.serve(hospital.home, said.append)
    assert len(came) == 2 and "No space left on device; trying again in" in said[-1]


def test_training_and_protection_are_spans_of_the_order_in_the_node(hospital: Hospital, worker: Worker) -> None:
    """The worker is a process without a network; its spans come over the pipe, because site.yaml asks for spans by now."""
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    export = pytest.importorskip("opentelemetry.sdk.trace.export")
    exporter, path = memory.InMemorySpanExporter(), hospital.home / "site.yaml"
    before, end = path.read_text(), tracing.begin_with(export.SimpleSpanProcessor(exporter), "node")
    path.write_text(before + "\ntraces: {endpoint: 'http://127.0.0.1:4318/v1/traces'}\n")
    try:
        with tracing.span("order") as told:
            reply = node.answer(message(hospital.order(run="six")), hospital.site, worker)
            told(outcome=node._outcome(reply), **node._numbers(reply))
    finally:
        end()
        path.write_text(before)
    spans = {each.name: each for each in exporter.get_finished_spans()}
    order = spans["order"]
    assert dict(order.attributes) == {"outcome": "train-report", "round": 1, "attempt": 1}
    assert set(spans) == {"order", "train", "protect"} and not order.parent
    for name in ("train", "protect"):
        assert spans[name].parent.span_id == order.context.span_id and not spans[name].attributes
        assert order.start_time <= spans[name].start_time <= spans[name].end_time <= order.end_time


NODE = """
import pickle, sys
from pathlib import Path
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity
from fl_client import node, sandbox
from fl_client.site import Site
from fl_client.worker import Worker, read
from privacy import wire
home, orders = Path(sys.argv[1]), pickle.loads(Path(sys.argv[2]).read_bytes())
sandbox.keep_private()
TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
site = Site.open(home)
worker = Worker(site)
kinds = []
for facts in orders:
    order = read(facts, wire.ORDERS)
    asked = Message(order.to_records(), dst_node_id=5, message_type=order.message_type)
    asked.metadata.__dict__["_message_id"] = "m1"
    kinds.append(wire.decode(node.answer(asked, site, worker), *wire.REPORTS).kind)
worker.stop()
print(*kinds, *sorted({name.split(".")[0] for name in sys.modules} & set(sys.argv[3].split())))
"""


def test_the_node_process_never_loads_what_reads_or_learns_from_images(hospital: Hospital, tmp_path: Path) -> None:
    """A real node's half in a process of its own, which answers real orders."""
    kinds = (wire.TrainOrder, wire.EvaluateOrder)
    orders = [hospital.order(kind, run="five", sum=n).to_facts() for n, kind in enumerate(kinds, 1)]
    (tmp_path / "orders").write_bytes(pickle.dumps(orders))
    never = "torch monai pydicom nibabel PIL gdcm scipy fastapi starlette sqlalchemy"
    command = [sys.executable, "-c", NODE, str(hospital.home), str(tmp_path / "orders"), never]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.split() == ["train-report", "evaluate-report"], done.stderr


def test_a_connection_goes_on_over_another_client_as_the_same_node() -> None:
    """As when the certificate was renewed: nothing is activated or deactivated, the old client is closed, and beats go on."""
    happened: list[str] = []

    def client(name: str) -> Any:
        return SimpleNamespace(
            SendNodeHeartbeat=lambda request: happened.append(f"{name} beats for {request.node.node_id}"),
            close=lambda: happened.append(f"{name} closed"),
        )

    connection = Connection(client("old"), Node(node_id=7))
    connection.beat()
    connection.renew(client("new"))
    connection.beat()
    assert happened == ["old beats for 7", "old closed", "new beats for 7"]


def test_only_a_report_may_wait_for_room_while_it_is_written(tmp_path: Path) -> None:
    """The gateway reads nothing of it meanwhile; everything else of a report, and every other call, ends after a minute."""
    allowed: dict[str, Any] = {}

    def gateway(asked: httpx.Request) -> httpx.Response:
        allowed[asked.url.path] = asked.extensions["timeout"]
        return httpx.Response(200)

    key = keys.make_key(tmp_path / "key")
    fleet = node._Fleet("127.0.0.1:1", ssl.create_default_context(), Identity(key))
    fleet._client._transport = httpx.MockTransport(gateway)
    connection, order = Connection(fleet, Node(node_id=5)), message(RecordDict({}), "train")
    connection.send(Message(RecordDict({}), reply_to=order))
    assert connection.receive() is None
    minute = dict.fromkeys(("connect", "read", "write", "pool"), 60.0)
    assert allowed == {parcels.SEND_REPORT: minute | {"write": 86_400.0}, parcels.RECEIVE_ORDER: minute}


def as_parcel(order: Message) -> list[bytes]:
    """What the SuperLink would hand to the node."""
    nested, tree = get_all_nested_objects(order), get_object_tree(order)
    order.metadata.__dict__["_message_id"] = order.object_id
    call = PullMessagesResponse(
        messages_list=[message_to_proto(remove_content_from_message(order))], message_object_trees=[tree]
    )
    return [call.SerializeToString(), *(nested[name].deflate() for name in parcels.names([tree]))]


def test_an_order_that_cannot_be_read_is_dropped_and_the_node_goes_on(
    hospital: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the coordinator answers, altered anywhere: a message or nothing, and never the end of the node."""
    good = as_parcel(message(hospital.order(run="six")))
    connection, dice = Connection(cast(Any, None), Node(node_id=7)), random.Random(1)

    def received(body: bytes) -> Message | None:
        monkeypatch.setattr(parcels, "post", lambda *_: body)
        return connection.receive()

    whole = received(parcels.pack(good))
    assert whole is not None and wire.decode(whole, wire.TrainOrder).run == "six"
    wrong = [
        b"x",
        parcels.pack(good)[:-1],
        parcels.pack(good[:1]),
        parcels.pack(good[:-1]),
        parcels.pack([*good, b"x"]),
    ]
    wrong += [parcels.pack([b"", *good[1:]]), parcels.pack([good[0], *reversed(good[1:])])]
    assert [received(body) for body in wrong] == [None] * len(wrong)
    for _ in range(300):
        parts = [bytearray(part) for part in good]
        for _ in range(dice.randint(1, 3)):
            part = parts[dice.randrange(len(parts))]
            part[dice.randrange(min(len(part), 200))] = dice.randrange(256)
        found = received(parcels.pack([bytes(part) for part in parts]))
        assert found is None or isinstance(found, Message)


def test_a_gateway_cannot_send_the_node_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's own client follows redirects, also out of TLS, and obeys the proxies of its environment."""
    asked: list[str] = []

    class Elsewhere(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            self.send_error(500)

        def log_message(self, *_: object) -> None:
            pass

    class Redirecting(Elsewhere):
        def do_POST(self) -> None:
            self.send_response(307)
            self.send_header("Location", f"http://127.0.0.1:{inside.server_port}/inside")
            self.send_header("Content-Length", "0")
            self.end_headers()

    key = keys.make_key(tmp_path / "ca.key")
    authority, tls = keys.make_ca(key, "demo"), keys.make_key(tmp_path / "tls.key")
    shown = keys.issue(authority, keys.make_csr(tls, "demo"), "demo", "server", 10, "127.0.0.1")
    (tmp_path / "tls.pem").write_bytes(keys.certificate_pem(shown))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / "tls.pem", tmp_path / "tls.key")
    client = ssl.create_default_context(cadata=keys.certificate_pem(authority.certificate).decode())
    inside, gateway = (ThreadingHTTPServer(("127.0.0.1", 0), kind) for kind in (Elsewhere, Redirecting))
    gateway.socket = server.wrap_socket(gateway.socket, server_side=True)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{inside.server_port}")
    for each in (inside, gateway):
        threading.Thread(target=each.serve_forever, daemon=True).start()
    try:
        identity = Identity(tls)
        with pytest.raises(httpx.HTTPStatusError, match="307"):
            node._Fleet(f"127.0.0.1:{gateway.server_port}", client, identity).PullMessages(PullMessagesRequest())
    finally:
        for each in (inside, gateway):
            each.shutdown()
            each.server_close()
    assert asked == []
