"""The coordinator's grid takes what is there: a reply that was announced and never sent, or slowly, holds up no other."""

from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Message
from flwr.app.error import Error
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.task_identity import TaskIdentity
from test_privacy_wire import train_report

from fl_server.mailbox import Mailbox
from fl_server.rounds import flower_reason
from privacy import wire


class SuperLink:
    """What the coordinator sees of Flower: announced replies, and the objects that have arrived."""

    def __init__(self) -> None:
        self.announced: list[Message] = []
        self.objects: dict[str, bytes] = {}
        self.gone: set[str] = set()
        self.asked: list[str] = []
        self.confirmed: list[str] = []
        self.told: set[str] = set()

    def announce(self, site: str) -> Message:
        order = Message(train_report(site=site).to_records(), dst_node_id=1, message_type="train")
        order.metadata.__dict__["_message_id"] = f"order-{site}"
        reply = Message(train_report(site=site).to_records(), reply_to=order)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        self.announced.append(reply)
        return reply

    def send(self, reply: Message, least: int = 0) -> None:
        """Let the objects of a reply arrive, but the last `least`."""
        parts = list(get_all_nested_objects(reply).items())
        for name, part in parts[: len(parts) - least]:
            self.objects[name] = part.deflate()

    def PullMessages(self, request: Any) -> PullAppMessagesResponse:  # noqa: N802  Flower's name
        assert not self.told & set(request.message_ids), "Flower answers with an error if it is asked again"
        found = [m for m in self.announced if m.metadata.reply_to_message_id in request.message_ids]
        self.told |= {m.metadata.reply_to_message_id for m in found}
        self.announced = [m for m in self.announced if m not in found]
        trees = [get_object_tree(message) for message in found]
        return PullAppMessagesResponse(messages_list=[_bare(m) for m in found], message_object_trees=trees)

    def PullObject(self, request: Any) -> PullObjectResponse:  # noqa: N802
        name = request.object_id
        self.asked.append(name)
        here = name in self.objects
        content = self.objects.get(name, b"")
        return PullObjectResponse(object_found=name not in self.gone, object_available=here, object_content=content)

    def ConfirmMessageReceived(self, request: Any) -> None:  # noqa: N802
        self.confirmed.append(request.message_object_id)


def _bare(message: Message) -> Any:
    from flwr.app.message import remove_content_from_message

    return message_to_proto(remove_content_from_message(message))


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> SuperLink:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    made = SuperLink()
    monkeypatch.setattr(Mailbox, "_runtime_client", made)
    monkeypatch.setattr(Mailbox, "run", SimpleNamespace(run_id=1))
    return made


def look(mailbox: Mailbox, *sites: str) -> list[str]:
    found = mailbox.pull_messages([f"order-{site}" for site in sites])
    return [wire.decode(message, wire.TrainReport).site for message in found]


def test_a_reply_that_never_arrives_holds_up_no_other(link: SuperLink) -> None:
    mailbox = Mailbox("127.0.0.1:1", "token")
    dead, alive = link.announce("north"), link.announce("south")
    link.send(dead, least=1)
    link.send(alive)
    assert look(mailbox, "north", "south") == ["south"]
    assert look(mailbox, "north") == []
    assert link.confirmed == [alive.object_id]


def test_a_slow_reply_is_taken_when_it_is_whole_and_each_object_once(link: SuperLink) -> None:
    mailbox, reply = Mailbox("127.0.0.1:1", "token"), link.announce("north")
    assert look(mailbox, "north") == []
    link.send(reply, least=1)
    assert look(mailbox, "north") == []
    link.send(reply)
    assert look(mailbox, "north") == ["north"]
    parts = list(get_all_nested_objects(reply))
    assert [link.asked.count(name) for name in parts[:-1]] == [2, *[1] * (len(parts) - 2)]
    assert mailbox.arriving == {}


def test_a_reply_whose_objects_are_gone_is_an_error_at_once(link: SuperLink) -> None:
    mailbox, reply = Mailbox("127.0.0.1:1", "token"), link.announce("north")
    link.gone = set(get_all_nested_objects(reply))
    (lost,) = mailbox.pull_messages(["order-north"])
    assert lost.metadata.reply_to_message_id == "order-north"
    assert flower_reason(lost.error) == "unavailable" == flower_reason(Error(ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ""))
    assert mailbox.arriving == {}


def test_a_reply_that_nobody_waits_for_any_more_is_forgotten(link: SuperLink) -> None:
    mailbox, reply = Mailbox("127.0.0.1:1", "token"), link.announce("north")
    assert look(mailbox, "north", "south") == []
    assert look(mailbox, "south") == []
    link.send(reply)
    assert look(mailbox, "south") == [] and mailbox.arriving == {}
