"""Orders and reports as parcels, through Flower's own SuperLink on loopback: whole or not at all, and only one's own."""

import asyncio
import base64
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.serde import run_from_proto
from flwr.proto.control_pb2 import RegisterNodeRequest
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PushMessagesRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PullTaskInputRequest, PushTaskOutputRequest
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fl_client.node import Connection
from fl_server import control, executor, link
from fl_server import parcels as server
from fl_server.door import listen
from fl_server.mailbox import Mailbox
from fl_server.parcels import Parcels
from fl_server.rounds import flower_reason
from privacy import keys, parcels


@dataclass
class Post:
    """A SuperLink with a run, the coordinator's end of it, and two sites. `asked`: paths of requests, sizes of bodies."""

    mailbox: Mailbox
    sites: list[Connection]
    asked: list[tuple[str, int]]
    unfetched: server.Unfetched

    def order(self, *sites: int, content: bytes = b"model" * 1000) -> list[str]:
        records = RecordDict({"isocenter": ConfigRecord({"kind": "x", "model": content})})
        orders = [
            Message(records, dst_node_id=self.sites[site].node.node_id, message_type="train", ttl=600.0)
            for site in sites
        ]
        return list(self.mailbox.push_messages(orders))

    def reply(self, order: Message, content: bytes = b"update") -> Message:
        return Message(RecordDict({"isocenter": ConfigRecord({"kind": "y", "vector": content})}), reply_to=order)

    def received(self, site: int) -> Message:
        message = self.sites[site].receive()
        assert message is not None
        return message


@pytest.fixture(scope="module")
def superlink() -> Iterator[tuple[int, bytes, list[tuple[str, int]], server.Unfetched]]:
    secret, asked, listening = b"s" * 32, list[tuple[str, int]](), listen("127.0.0.1", 0)
    port = listening.getsockname()[1]
    app = Parcels(link.superlink_app(port, secret))

    async def counted(scope: Any, receive: Any, send: Any) -> None:
        length = dict(scope.get("headers", ())).get(b"content-length", b"0")
        asked.append((scope.get("path", ""), int(length)))
        await app(scope, receive, send)

    server = uvicorn.Server(uvicorn.Config(counted, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield port, secret, asked, app.unfetched
    server.should_exit = True
    thread.join(10)


@pytest.fixture
def post(superlink: tuple[int, bytes, list[tuple[str, int]], server.Unfetched], tmp_path: Path) -> Iterator[Post]:
    port, secret, asked, unfetched = superlink
    (tmp_path / "study.json").write_text("{}")
    run = executor._start_flower_run(tmp_path, port)
    mailbox = Mailbox(f"127.0.0.1:{port}", executor._acquire(run, port, secret))
    given = mailbox.client.PullTaskInput(PullTaskInputRequest())
    TaskIdentity.task_id, TaskIdentity.run_id = given.task_id, given.run.run_id
    TaskIdentity.node_id = given.context.node_id
    mailbox.set_run(run_from_proto(given.run))
    sites = []
    for number in range(2):
        key = keys.make_key(tmp_path / f"{number}.key")
        public = keys.public_pem(key)
        with control.control(port) as caller:
            caller.RegisterNode(RegisterNodeRequest(public_key=public, name=f"{tmp_path.name[-8:]}-{number}"))
        identity = NodeAuthHttpInterceptor(key, key.public_key())
        client = FleetHttpClient(f"http://127.0.0.1:{port}", interceptors=(identity,))
        node = client.ActivateNode(ActivateNodeRequest(public_key=public, heartbeat_interval=30.0)).node_id
        sites.append(Connection(client, Node(node_id=node)))
    asked.clear()
    yield Post(mailbox, sites, asked, unfetched)
    mailbox.close()
    for site in sites:
        site.client.close()


def test_an_order_and_its_report_take_four_requests(post: Post) -> None:
    names = post.order(0)
    order = post.received(0)
    assert order.content["isocenter"]["model"] == b"model" * 1000
    post.sites[0].send(post.reply(order))
    (report,) = post.mailbox.pull_messages(names)
    assert report.content["isocenter"]["vector"] == b"update" and report.metadata.reply_to_message_id == names[0]
    assert [path for path, _ in post.asked] == [
        *(parcels.SEND_ORDERS, parcels.RECEIVE_ORDER, parcels.SEND_REPORT, parcels.RECEIVE_REPORTS)
    ]
    assert list(post.mailbox.pull_messages([])) == [] and post.sites[0].receive() is None


def test_a_model_for_several_sites_goes_to_the_superlink_once(post: Post) -> None:
    post.order(0, 1, content=b"m" * 100_000)
    assert 100_000 < post.asked[0][1] < 110_000
    assert [post.received(site).content["isocenter"]["model"] for site in (0, 1)] == [b"m" * 100_000] * 2


def test_a_model_for_several_sites_is_in_memory_once(post: Post) -> None:
    """What is kept of an answer until a slow site has taken it: views of the one copy that Flower's store has."""
    stored = b"model" * 1000
    heads = [server.parcels.pieces([b"call", stored]) for _ in range(8)]
    held, order = list[Any](), list[bytes]()

    async def send(event: Any) -> None:
        held.append(event.get("body", b""))

    for pieces in heads:
        asyncio.run(server._answer(send, pieces))
    views = [body for body in held if len(body) == len(stored)]
    assert len(views) == 8 and all(body.obj is stored for body in views)
    post.order(0, 1, content=stored * 200)  # more than one piece
    order += [bytes(post.received(site).content["isocenter"]["model"]) for site in (0, 1)]
    assert order == [stored * 200] * 2


def test_reports_are_handed_out_as_they_come(post: Post) -> None:
    names = post.order(0, 1)
    orders = [post.received(site) for site in (0, 1)]
    assert list(post.mailbox.pull_messages(names)) == []
    post.sites[1].send(post.reply(orders[1]))
    (report,) = post.mailbox.pull_messages(names)
    assert report.metadata.reply_to_message_id == names[1]
    post.sites[0].send(post.reply(orders[0]))
    (report,) = post.mailbox.pull_messages(names[:1])
    assert report.metadata.reply_to_message_id == names[0]


def test_nobody_meets_half_a_message(post: Post, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower has stored the message, and its objects take their time."""
    real = server._keep

    def slow(*given: Any) -> None:
        time.sleep(0.1)
        real(*given)

    monkeypatch.setattr(server, "_keep", slow)
    with ThreadPoolExecutor(2) as pool:
        sending = pool.submit(post.order, 0)
        time.sleep(0.03)
        order = next(found for _ in range(10) if (found := post.sites[0].receive()))
        reporting = pool.submit(post.sites[0].send, post.reply(order))
        time.sleep(0.03)
        found = list(post.mailbox.pull_messages(sending.result()))
        reporting.result()
    report = (found or list(post.mailbox.pull_messages(sending.result())))[0]
    assert report.content["isocenter"]["vector"] == b"update"


def test_many_large_reports_do_not_come_in_one_answer(post: Post, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fl_server.parcels.ANSWER_BYTES", 1000)
    names = post.order(0, 1)
    for site in (0, 1):
        post.sites[site].send(post.reply(post.received(site), b"u" * 1001))
    assert [len(list(post.mailbox.pull_messages(left))) for left in (names, names[1:])] == [1, 1]


def test_what_no_run_has_fetched_yet_is_counted_for_a_minute(post: Post, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that has ended, or whose executor died, never fetches: what it left must not take room for ever."""
    names, before = post.order(0, 1), post.unfetched.bytes()
    for site in (0, 1):
        post.sites[site].send(post.reply(post.received(site), b"u" * 5000))
    both = post.unfetched.bytes() - before
    assert 2 * 5000 < both < 2 * 8000
    assert len(list(post.mailbox.pull_messages(names[:1]))) == 1
    assert post.unfetched.bytes() - before == pytest.approx(both / 2, abs=50)
    monkeypatch.setattr(server, "UNFETCHED_S", 0.0)
    time.sleep(0.01)
    assert post.unfetched.bytes() == 0
    post.unfetched.put("another", 1)
    assert len(post.unfetched._kept) == 1  # nothing is remembered for longer than it counts
    assert len(list(post.mailbox.pull_messages(names[1:]))) == 1


def test_a_site_cannot_answer_an_order_of_another(post: Post) -> None:
    names = post.order(0)
    order = post.received(0)
    own, foreign = post.reply(order), post.sites[1]
    foreign.send(own)  # names the other as its sender
    assert list(post.mailbox.pull_messages(names)) == []
    own.metadata.__dict__["_src_node_id"] = foreign.node.node_id
    foreign.send(own)  # names itself: the order was addressed to another
    assert list(post.mailbox.pull_messages(names)) == []
    post.sites[0].send(post.reply(order))
    assert len(list(post.mailbox.pull_messages(names))) == 1


def refused(post: Post, body: bytes, site: int = 0, headers: dict[str, str] | None = None) -> int:
    """The status of the answer to a body that a site's client signs."""
    client = post.sites[site].client
    request = client._client.build_request("POST", f"{client._base_url}{parcels.SEND_REPORT}", content=body)

    def go(context: Any) -> httpx.Response:
        context.request.headers.update(headers or {})
        return client._client.send(context.request)

    (identity,) = client._interceptors
    return identity.intercept(SimpleNamespace(request=request), go).status_code  # type: ignore[arg-type]


def parts(post: Post, reply: Message) -> list[bytes]:
    """The parcel that a node would send."""
    kept: list[bytes] = []
    real = parcels.post

    def keep(client: Any, path: str, call: PushMessagesRequest, objects: list[bytes], timeout: httpx.Timeout) -> bytes:
        kept.extend([call.SerializeToString(), *objects])
        return b""

    parcels.post = keep  # type: ignore[assignment]
    try:
        post.sites[0].send(reply)
    finally:
        parcels.post = real
    return kept


def test_a_parcel_that_is_not_one_whole_message_is_refused_and_nothing_of_it_is_kept(post: Post) -> None:
    names = post.order(0)
    order = post.received(0)
    good = parts(post, post.reply(order))
    call = PushMessagesRequest.FromString(good[0])
    two, none, other = PushMessagesRequest(), PushMessagesRequest(), PushMessagesRequest()
    for made, times in ((two, 2), (none, 0), (other, 1)):
        made.node.CopyFrom(call.node)
        for _ in range(times):
            made.messages_list.append(call.messages_list[0])
            made.message_object_trees.append(call.message_object_trees[0])
    other.messages_list[0].metadata.message_id = "00" * 32
    wrong = {
        "garbage": b"\xff" * 100,
        "nothing": b"",
        "less": parcels.pack(good[:-1]),
        "more": parcels.pack([*good, b"x"]),
        "cut": parcels.pack(good)[:-1],
        "two": parcels.pack([two.SerializeToString(), *good[1:]]),
        "none": parcels.pack([none.SerializeToString(), *good[1:]]),
        "another-name": parcels.pack([other.SerializeToString(), *good[1:]]),
    }
    assert {name: refused(post, body) for name, body in wrong.items()} == dict.fromkeys(wrong, 400)
    assert list(post.mailbox.pull_messages(names)) == []
    assert refused(post, parcels.pack(good)) == 200
    assert len(list(post.mailbox.pull_messages(names))) == 1


def test_a_report_with_an_altered_object_is_a_loss_and_not_a_result(post: Post) -> None:
    names = post.order(0)
    good = parts(post, post.reply(post.received(0), b"update"))
    place = next(number for number, part in enumerate(good) if number and b"update" in part)
    good[place] = good[place].replace(b"update", b"evil!!")
    assert refused(post, parcels.pack(good)) == 400
    (lost,) = post.mailbox.pull_messages(names)
    assert lost.has_error() and flower_reason(lost.error) == "unavailable"


def test_a_call_that_is_not_signed_by_the_node_it_names_is_refused(post: Post) -> None:
    good = parcels.pack(parts(post, post.reply(post.received(0)))) if post.order(0) else b""
    assert refused(post, good, site=1) == 401
    forged = {"flwr-signature": base64.b64encode(b"x" * 70).decode()}
    assert refused(post, good, headers=forged) == 401
    assert refused(post, good) == 200


def test_after_its_end_a_run_takes_no_report_and_gives_no_order(post: Post) -> None:
    post.order(0, 1)
    order = post.received(0)
    post.mailbox.client.PushTaskOutput(PushTaskOutputRequest(sub_status="completed", details=""))
    post.sites[0].send(post.reply(order))  # dropped, and said in the log
    assert post.sites[1].receive() is None
    with pytest.raises(RunNotRunningException):
        list(post.mailbox.pull_messages(["x"]))
