"""Flower's Grid for the coordinator, over parcels: orders go out in one request, and reports come in as soon as they are here."""

from collections.abc import Callable, Iterable
from typing import cast

from flwr.app import Message
from flwr.app.error import Error
from flwr.app.message import make_message, remove_content_from_message
from flwr.app.metadata import Metadata
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import Message as Envelope
from flwr.proto.runtime_pb2 import (
    PullAppMessagesRequest,
    PullAppMessagesResponse,
    PushAppMessagesRequest,
    PushAppMessagesResponse,
)
from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import InflatableObject, get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.superlink.grid.http_grid import HttpGrid

from privacy import parcels


class Mailbox(HttpGrid):
    """HttpGrid whose `pull_messages` returns the replies that are here, and never waits.

    `heed` is called at each look for replies; what it raises ends the run in the middle of a stage.
    """

    def __init__(self, address: str, token: str, heed: Callable[[], None] = lambda: None) -> None:
        super().__init__(address, insecure=True, token=token)  # loopback: the SuperLink listens nowhere else
        self.heed = heed

    def _try_push_messages(self, run_id: int, messages: Iterable[Message]) -> list[str]:
        objects, request = dict[str, InflatableObject](), PushAppMessagesRequest()
        for message in messages:
            request.messages_list.append(message_to_proto(remove_content_from_message(message)))
            request.message_object_trees.append(get_object_tree(message))
            objects |= get_all_nested_objects(message)
        contents = [objects[name].deflate() for name in parcels.names(request.message_object_trees)]
        answer = parcels.post(self._runtime_client, parcels.SEND_ORDERS, request, contents)
        return list(PushAppMessagesResponse.FromString(answer).message_ids)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies to the orders of these ids; a Flower error in place of one whose content is gone."""
        self.heed()
        request = PullAppMessagesRequest(message_ids=message_ids)
        if not (body := parcels.post(self._runtime_client, parcels.RECEIVE_REPORTS, request)):
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
