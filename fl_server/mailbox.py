"""Flower's Grid for the coordinator, with one thing changed: a reply that is still under way holds nobody up.

A node announces a reply first and sends its objects afterwards. Flower's own pull then waits for the objects of one reply, up to
two hours and at first a whole second, and for nothing else; a node that dies in between, or a slow line, would stop the
round for everyone. Here each look takes what is there, and what is not yet is looked for again at the next.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import cast

from flwr.app import Message
from flwr.app.error import Error
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from flwr.common.constant import ErrorCode
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectUnavailableError,
    inflate_object_from_contents,
)
from flwr.superlink.grid.http_grid import HttpGrid


@dataclass
class Arriving:
    """A reply that was announced: which order it answers, and its objects, as far as they are here."""

    reply_to: str
    wanted: list[str]
    contents: dict[str, bytes] = field(default_factory=dict)


class Mailbox(HttpGrid):
    """HttpGrid whose `pull_messages` returns the replies that are complete, and never waits for one that is not.

    `heed` is called at each look for replies; what it raises ends the run in the middle of a stage.
    """

    def __init__(self, address: str, token: str, heed: Callable[[], None] = lambda: None) -> None:
        super().__init__(address, insecure=True, token=token)  # loopback: the SuperLink listens nowhere else
        self.heed = heed
        self.arriving: dict[str, Arriving] = {}

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Complete replies to the orders of these ids; a Flower error in place of one whose objects will not come any more."""
        self.heed()
        asked = list(message_ids)
        # Replies to orders that nobody waits for any more are late: forgotten, with whatever they had sent.
        self.arriving = {name: reply for name, reply in self.arriving.items() if reply.reply_to in asked}
        # A reply is announced once; for an order that is asked for again the SuperLink makes up an error instead.
        announced = {reply.reply_to for reply in self.arriving.values()}
        if unannounced := [name for name in asked if name not in announced]:
            answer = self._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=unannounced))
            for message, tree in zip(answer.messages_list, answer.message_object_trees, strict=True):
                metadata = message.metadata
                self.arriving[metadata.message_id] = Arriving(metadata.reply_to_message_id, _ids(tree))
        looked = [self._look(name, reply) for name, reply in list(self.arriving.items())]
        return [message for message in looked if message is not None]

    def _look(self, name: str, reply: Arriving) -> Message | None:
        """The reply, if all of it is there now; stops at the first object that is not."""
        run_id = self.run.run_id
        pull = make_pull_object_fn_protobuf(self._runtime_client.PullObject, self.node, run_id)
        try:
            for wanted in reply.wanted:
                if wanted not in reply.contents:
                    reply.contents[wanted] = pull(wanted)
        except ObjectUnavailableError:
            return None
        except ObjectPullError:
            del self.arriving[name]
            return self._lost(reply)
        del self.arriving[name]
        confirmation = ConfirmMessageReceivedRequest(node=self.node, run_id=run_id, message_object_id=name)
        self._runtime_client.ConfirmMessageReceived(confirmation)
        message = cast(Message, inflate_object_from_contents(name, reply.contents))
        message.metadata.__dict__["_message_id"] = name
        return message

    def _lost(self, reply: Arriving) -> Message:
        metadata = Metadata(
            run_id=self.run.run_id,
            message_id="",
            src_node_id=self.node.node_id,
            dst_node_id=self.node.node_id,
            message_type=SYSTEM_MESSAGE_TYPE,
            group_id="",
            ttl=0,
            reply_to_message_id=reply.reply_to,
            created_at=now().timestamp(),
        )
        return make_message(metadata=metadata, error=Error(ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ""))


def _ids(tree: ObjectTree) -> list[str]:
    """The objects of a message, parts before the whole: as long as the first is missing, the others need not be asked for."""
    return [part.object_id for part in iterate_object_tree(tree)]
