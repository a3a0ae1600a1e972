"""Flower's Grid for the coordinator, over parcels: orders go out in one request, and reports come in as soon as they are here.

Flower's own grid for this, HttpGrid, loads the SuperLink's database layer with it, 30 MiB of every executor; what is left of it
under parcels is the client of the Runtime API, made here with the same parts.
"""

from collections.abc import Callable, Iterable
from typing import Any, cast

from flwr.app import Message
from flwr.app.error import Error
from flwr.app.message import make_message, remove_content_from_message
from flwr.app.metadata import Metadata
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import Message as Envelope
from flwr.proto.node_pb2 import Node, NodeInfo
from flwr.proto.runtime_pb2 import (
    GetNodesRequest,
    PullAppMessagesRequest,
    PullAppMessagesResponse,
    PushAppMessagesRequest,
    PushAppMessagesResponse,
)
from flwr.serverapp import Grid
from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.run import Run as FlowerRun
from flwr.supercore.runtime import RuntimeHttpClient

from privacy import parcels
from privacy.errors import RunError


class Mailbox(Grid):
    """A Grid whose `pull_messages` returns the replies that are here, and never waits.

    `heed` is called at each look for replies; what it raises ends the run in the middle of a stage. `client` calls the Runtime
    API at `address` on loopback with the `token` of the run's task, and tries again when the line breaks.
    """

    def __init__(self, address: str, token: str, heed: Callable[[], None] = lambda: None) -> None:
        self.heed, self.node = heed, Node(node_id=SUPERLINK_NODE_ID)
        said: list[ProtobufClientInterceptor] = [
            RuntimeVersionHttpInterceptor(component_name="flwr-serverapp"),
            RuntimeTokenHttpInterceptor(token),
        ]
        again = make_simple_http_retry_invoker()
        self.client = RuntimeHttpClient.from_server_address(address, True, None, said, retry_invoker=again)
        self._run: FlowerRun | None = None

    def close(self) -> None:
        self.client.close()

    def set_run(self, run: FlowerRun) -> None:
        self._run = run

    @property
    def run(self) -> FlowerRun:
        if self._run is None:
            raise RunError("a mailbox was used before it knew its run")
        return self._run

    def get_node_ids(self) -> Iterable[int]:
        return [node.node_id for node in self.get_nodes()]

    def get_nodes(self) -> Iterable[NodeInfo]:
        return self.client.GetNodes(GetNodesRequest()).nodes

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError("orders are pushed, and replies pulled as they come")

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise NotImplementedError("deprecated in Flower")

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send all messages in one request; the name of each at the SuperLink, empty for one that it does not take."""
        given = list(messages)
        trees, contents = parcels.flat(given)
        for message, tree in zip(given, trees, strict=True):
            message.metadata.__dict__["_message_id"] = tree.object_id
        envelopes = [message_to_proto(remove_content_from_message(message)) for message in given]
        request = PushAppMessagesRequest(messages_list=envelopes, message_object_trees=trees)
        answer = parcels.post(self.client, parcels.SEND_ORDERS, request, contents)
        return list(PushAppMessagesResponse.FromString(answer).message_ids)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies to the orders of these ids; a Flower error in place of one whose content is gone."""
        self.heed()
        request = PullAppMessagesRequest(message_ids=message_ids)
        if not (body := parcels.post(self.client, parcels.RECEIVE_REPORTS, request)):
            return []
        head, *objects = parcels.unpack(body)
        answer, replies = PullAppMessagesResponse.FromString(head), []
        for envelope, tree in zip(answer.messages_list, answer.message_object_trees, strict=True):
            wanted = parcels.names([tree])
            contents, objects = dict(zip(wanted, objects, strict=False)), objects[len(wanted) :]
            replies.append(self._reply(envelope, contents) if all(contents.values()) else self._lost(envelope))
        return replies

    def _reply(self, envelope: Envelope, contents: dict[str, bytes]) -> Message:
        name = envelope.metadata.message_id
        message = cast(Message, inflate_object_from_contents(name, contents))
        message.metadata.__dict__["_message_id"] = name
        return message

    def _lost(self, envelope: Envelope) -> Message:
        metadata = Metadata(
            run_id=self.run.run_id,
            message_id="",
            src_node_id=self.node.node_id,
            dst_node_id=self.node.node_id,
            message_type=SYSTEM_MESSAGE_TYPE,
            group_id="",
            ttl=0,
            reply_to_message_id=envelope.metadata.reply_to_message_id,
            created_at=now().timestamp(),
        )
        return make_message(metadata=metadata, error=Error(ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ""))
