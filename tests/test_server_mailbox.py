"""The coordinator's look for replies: it hears of a stop first, and a reply whose content is gone is an error at once."""

from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Message
from flwr.app.error import Error
from flwr.app.message import remove_content_from_message
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_to_proto
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.task_identity import TaskIdentity
from test_privacy_wire import train_report

from fl_server.mailbox import Mailbox
from fl_server.rounds import flower_reason
from privacy import parcels, wire


@pytest.fixture
def mailbox(monkeypatch: pytest.MonkeyPatch) -> Mailbox:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    monkeypatch.setattr(Mailbox, "run", SimpleNamespace(run_id=1))
    return Mailbox("127.0.0.1:1", "token")


def answer(monkeypatch: pytest.MonkeyPatch, **missing: int) -> None:
    """Let the SuperLink answer with a reply of each site, without the last objects of it."""
    call, objects = PullAppMessagesResponse(), list[bytes]()
    for site, least in missing.items():
        order = Message(train_report(site=site).to_records(), dst_node_id=1, message_type="train")
        order.metadata.__dict__["_message_id"] = f"order-{site}"
        reply = Message(train_report(site=site).to_records(), reply_to=order)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        call.messages_list.append(message_to_proto(remove_content_from_message(reply)))
        call.message_object_trees.append(get_object_tree(reply))
        nested = get_all_nested_objects(reply)
        names = parcels.names([get_object_tree(reply)])
        contents = [nested[name].deflate() for name in names]
        objects += contents[: len(names) - least] + [b""] * least
    body = parcels.pack([call.SerializeToString(), *objects])
    monkeypatch.setattr(parcels, "post", lambda *_: body)


def test_replies_in_one_answer_are_told_apart(mailbox: Mailbox, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, north=0, south=0)
    replies: Any = mailbox.pull_messages(["order-north", "order-south"])
    assert [wire.decode(reply, wire.TrainReport).site for reply in replies] == ["north", "south"]


@pytest.mark.parametrize("least", [1, 2, 3])
def test_a_reply_whose_objects_are_gone_is_an_error_at_once(
    mailbox: Mailbox, monkeypatch: pytest.MonkeyPatch, least: int
) -> None:
    answer(monkeypatch, north=least, south=0)
    lost, good = mailbox.pull_messages(["order-north", "order-south"])
    assert lost.metadata.reply_to_message_id == "order-north"
    assert flower_reason(lost.error) == "unavailable" == flower_reason(Error(ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ""))
    assert wire.decode(good, wire.TrainReport).site == "south"


def test_a_stop_is_heard_before_anything_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(parcels, "post", lambda *_: pytest.fail("asked"))
    with pytest.raises(KeyboardInterrupt):
        Mailbox("127.0.0.1:1", "token", stop).pull_messages(["order-north"])
