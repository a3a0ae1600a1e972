"""Parcels: what was packed comes out again, and nothing that was not packed so."""

import struct

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.error import Error
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given
from hypothesis import strategies as st

from privacy import parcels
from privacy.errors import MessageMalformed


@given(st.lists(st.binary(max_size=50), min_size=1, max_size=6))
def test_parts_come_out_as_they_went_in(parts: list[bytes]) -> None:
    body = parcels.pack(parts)
    # Oracle: the form as it is documented, read by hand.
    assert body[:4] == len(parts).to_bytes(4, "big")
    assert body[4 : 4 + 8 * len(parts)] == b"".join(len(part).to_bytes(8, "big") for part in parts)
    assert parcels.unpack(body) == parts


@given(st.lists(st.binary(max_size=20), min_size=1, max_size=4), st.data())
def test_a_parcel_that_was_cut_or_grew_is_malformed(parts: list[bytes], data: st.DataObject) -> None:
    body = parcels.pack(parts)
    cut = data.draw(st.integers(0, len(body) - 1))
    for wrong in (body[:cut], body + b"x"):
        with pytest.raises(MessageMalformed):
            parcels.unpack(wrong)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        struct.pack(">I", 0),
        struct.pack(">I", 2**32 - 1),
        struct.pack(">I", parcels.PARTS_MAX + 1) + bytes(8 * (parcels.PARTS_MAX + 1)),
        struct.pack(">IQ", 1, 2**63) + b"x",
        struct.pack(">IQQ", 2, 2**64 - 1, 2) + b"x",  # whose sum is one, for those who count in 64 bits
    ],
    ids=["empty", "no-parts", "most-parts", "too-many", "longer-than-memory", "sum-overflows"],
)
def test_numbers_that_lie_are_malformed(body: bytes) -> None:
    with pytest.raises(MessageMalformed):
        parcels.unpack(body)


def test_each_object_of_a_tree_is_named_once_and_before_what_holds_it() -> None:
    part = ObjectTree(object_id="part")
    trees = [ObjectTree(object_id=name, children=[ObjectTree(object_id="middle", children=[part])]) for name in "ab"]
    assert parcels.names(trees) == ["part", "middle", "a", "b"]


def test_flat_messages_are_what_flower_makes_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    shared = RecordDict({"isocenter": ConfigRecord({"model": b"w" * 1000})})
    alone = RecordDict({"isocenter": ConfigRecord({"model": b"v"}), "more": ArrayRecord([np.arange(3.0)])})
    messages = [Message(shared, 1, "train"), Message(shared, 2, "train"), Message(alone, 3, "query")]
    messages.append(Message(Error(1, "x"), reply_to=messages[0]))
    made = list[bytes]()
    deflate = ConfigRecord.deflate
    monkeypatch.setattr(ConfigRecord, "deflate", lambda self: made.append(b"") or deflate(self))
    trees, contents = parcels.flat(messages)
    assert len(made) == 2  # records, and not looks at their names
    # Oracle: Flower's own functions, one message after the other.
    assert trees == [get_object_tree(message) for message in messages]
    objects = {name: each for message in messages for name, each in get_all_nested_objects(message).items()}
    assert contents == [objects[name].deflate() for name in parcels.names(trees)]
