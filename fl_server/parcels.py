"""The SuperLink's counter for parcels: an order or a report with all its objects in one request.

What is kept, delivered and allowed is decided by Flower's own handlers and its own authentication; only the requests in
between are gone. A message is stored with everything that belongs to it or not at all, so nobody meets half of one.
"""

import asyncio
import sys
import threading
import time
from collections.abc import Callable, MutableMapping, Sequence
from functools import partial
from typing import Any

from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PushAppMessagesRequest
from flwr.server.superlink.linkstate import LinkState
from flwr.supercore.constant import TASK_TOKEN_HEADER
from flwr.supercore.dependencies.task import authenticate_task
from flwr.supercore.error import FlowerError
from flwr.superlink.routers.fleet.node_auth import authenticate_node
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.superlink.servicer.runtime import runtime_handlers
from google.protobuf.message import DecodeError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from fl_server.doorbell import read_whole
from privacy import parcels
from privacy.errors import MessageMalformed

ANSWER_BYTES = 16 * 1024 * 1024  # reports are handed out until an answer has so many; the others wait for the next look
PIECE_BYTES = 256 * 1024  # of an answer, handed over at a time: what a slow site holds here beside the one model of all
UNFETCHED_S = 60.0  # for so long a report that no run fetches counts: a run that has ended, or died, never will
Work = Callable[[LinkState, Request, bytes], Sequence[bytes]]


class Unfetched:
    """Reports that came, and that no run has fetched yet. Written by one thread at a time, read by any."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[int, float]] = {}
        """Name of a report -> its bytes, and when it came."""

    def put(self, name: str, size: int) -> None:
        for old in [old for old, (_, came) in self._kept.items() if time.monotonic() - came > UNFETCHED_S]:
            del self._kept[old]
        self._kept[name] = size, time.monotonic()

    def take(self, name: str) -> None:
        self._kept.pop(name, None)

    def bytes(self) -> int:
        """Of those that came within UNFETCHED_S."""
        now = time.monotonic()
        return sum(size for size, came in self._kept.copy().values() if now - came <= UNFETCHED_S)


class Parcels:
    """An ASGI application around Flower's: four paths are answered here, all others there."""

    def __init__(self, app: Any) -> None:
        self.app, self.lock, self.unfetched = app, threading.Lock(), Unfetched()
        self.works: dict[str, Work] = {
            parcels.RECEIVE_ORDER: receive_order,
            parcels.SEND_REPORT: partial(send_report, self.unfetched),
            parcels.SEND_ORDERS: send_orders,
            parcels.RECEIVE_REPORTS: partial(receive_reports, self.unfetched),
        }

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        work = self.works.get(scope.get("path", "")) if scope["type"] == "http" else None
        if work is None:
            await self.app(scope, receive, send)
            return
        request = Request({**scope, "app": self.app}, receive)
        if (
            body := await read_whole(receive, sys.maxsize)
        ) is None:  # measured by the doorbell; Starlette would copy it
            return
        state = self.app.state.linkstate_factory.state()
        try:
            pieces = await asyncio.to_thread(self._alone, work, state, request, body)
        except HTTPException as error:
            answer = Response(status_code=error.status_code)
        except FlowerError:  # the run has ended, or the token is nobody's
            answer = Response(status_code=403)
        except (MessageMalformed, DecodeError, ValueError):
            answer = Response(status_code=400)
        else:
            await _answer(send, pieces)
            return
        await answer(scope, receive, send)

    def _alone(self, work: Work, state: LinkState, request: Request, body: bytes) -> Sequence[bytes]:
        """One at a time: Flower lists a message before its objects are there, and nobody may look in between."""
        with self.lock:
            return work(state, request, body)


async def _answer(send: Any, pieces: Sequence[bytes]) -> None:
    """Answer with `pieces`, joined. Each is only looked at: the model's bytes are the same for all sites, and never copied."""
    length = str(sum(map(len, pieces))).encode()
    headers = [(b"content-length", length), (b"content-type", b"application/octet-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for piece in pieces:
        for start in range(0, len(piece), PIECE_BYTES):
            part = memoryview(piece)[start : start + PIECE_BYTES]
            await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def receive_order(state: LinkState, request: Request, body: bytes) -> Sequence[bytes]:
    """A site's next order as a parcel; nothing if there is none. An order whose content is gone is passed over."""
    asked = request.state.protobuf_request = PullMessagesRequest.FromString(body)
    authenticate_node(request)
    while True:
        answer = fleet_handlers.pull_messages(request=asked, state=state, store=state.object_store)
        if not answer.messages_list:
            return []
        metadata = answer.messages_list[0].metadata
        objects = [state.get_object(metadata.run_id, name) for name in parcels.names(answer.message_object_trees)]
        state.object_store.delete(metadata.message_id)
        whole = [content for content in objects if content]
        if len(whole) == len(objects):
            return parcels.pieces([answer.SerializeToString(), *whole])


def send_report(unfetched: Unfetched, state: LinkState, request: Request, body: bytes) -> Sequence[bytes]:
    """Keep a site's report, which answers an order of its own. Raises MessageMalformed for anything but one whole message."""
    head, *objects = parcels.unpack(body)
    pushed = request.state.protobuf_request = PushMessagesRequest.FromString(head)
    authenticate_node(request)
    if len(pushed.messages_list) != 1 or len(pushed.message_object_trees) != 1:
        raise MessageMalformed("a report is one message")
    metadata = pushed.messages_list[0].metadata
    # Flower compares the order's addressee with what the reply says of its sender; that this is the caller is checked here.
    if metadata.src_node_id != pushed.node.node_id or metadata.message_id != pushed.message_object_trees[0].object_id:
        raise MessageMalformed("a report is its sender's own, and named after what it holds")
    wanted = parcels.names(pushed.message_object_trees)
    if len(wanted) != len(objects):
        raise MessageMalformed("a report comes with each of its objects, and no other")
    answer = fleet_handlers.push_messages(request=pushed, state=state)
    _keep(state, metadata.run_id, answer, dict(zip(wanted, objects, strict=True)))
    unfetched.put(metadata.message_id, len(body))
    return []


def send_orders(state: LinkState, request: Request, body: bytes) -> Sequence[bytes]:
    """Keep orders of a run; Flower's answer, with the names of those that were kept."""
    task = authenticate_task(request, request.headers.get(TASK_TOKEN_HEADER), state)
    head, *objects = parcels.unpack(body)
    pushed = PushAppMessagesRequest.FromString(head)
    wanted = parcels.names(pushed.message_object_trees)
    if len(wanted) != len(objects):
        raise MessageMalformed("orders come with each of their objects, and no other")
    answer = runtime_handlers.push_messages(pushed, state, task)
    _keep(state, task.run_id, answer, dict(zip(wanted, objects, strict=True)))
    return [answer.SerializeToString()]


def receive_reports(unfetched: Unfetched, state: LinkState, request: Request, body: bytes) -> Sequence[bytes]:
    """Reports to the orders asked for, as far as they are here, as a parcel; an object that is gone is empty in it."""
    task = authenticate_task(request, request.headers.get(TASK_TOKEN_HEADER), state)
    asked, whole, objects = PullAppMessagesRequest.FromString(body), None, list[bytes]()
    for name in asked.message_ids:
        answer = runtime_handlers.pull_messages(PullAppMessagesRequest(message_ids=[name]), state, task)
        for message, tree in zip(answer.messages_list, answer.message_object_trees, strict=True):
            objects += [state.get_object(task.run_id, part) or b"" for part in parcels.names([tree])]
            state.object_store.delete(message.metadata.message_id)
            unfetched.take(message.metadata.message_id)
        if answer.messages_list:
            whole = answer if whole is None else whole
            if whole is not answer:
                whole.MergeFrom(answer)
        if sum(map(len, objects)) > ANSWER_BYTES:
            break
    return [] if whole is None else parcels.pieces([whole.SerializeToString(), *objects])


def _keep(state: LinkState, run_id: int, answer: Any, objects: dict[str, bytes]) -> None:
    """Store what Flower asks for; raises MessageMalformed if an object is not what its name says."""
    for name in answer.objects_to_push:
        if not state.store_object(run_id, answer.session_id, name, objects[name]):
            raise MessageMalformed("an object of a message is not what its name says")
