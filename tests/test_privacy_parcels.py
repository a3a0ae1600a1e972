"""Parcels: what was packed comes out again, and nothing that was not packed so."""

import gc
import struct
import sys
from collections.abc import Callable, Iterable
from typing import Any, cast

import httpx
import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.error import Error
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.recorddict_pb2 import ConfigRecordValue as ProtoConfigRecordValue
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.protobuf.client import ProtobufClient
from flwr.supercore.task_identity import TaskIdentity
from google.protobuf.message import DecodeError
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
    assert [b"".join(each) for each in contents] == [objects[name].deflate() for name in parcels.names(trees)]


LARGE = b"w" * parcels.LARGE_BYTES
RECORDS = [
    {"model": LARGE},
    {
        "version": 1,
        "kind": "train",
        "model": LARGE + b"x" * 70_000,
        "model_shape": [3, 4],
        "seconds": 1.5,
        "flag": True,
    },
    {"a": LARGE, "empty": b"", "b": LARGE[:-1], "c": LARGE * 40, "names": "n" * 70_000},  # the last of them is no bytes
    {"model": b"small", "list": [b"x", b"y"]},
]


@pytest.mark.parametrize("facts", RECORDS, ids=["one", "as-it-is", "many", "small"])
def test_a_record_goes_out_without_a_copy_and_comes_in_as_flower_reads_it(facts: dict[str, Any]) -> None:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    message = Message(RecordDict({"isocenter": ConfigRecord(facts)}), 1, "train")
    (tree,), contents = parcels.flat([message])
    objects = get_all_nested_objects(message)  # oracle: Flower's own
    assert [b"".join(each) for each in contents] == [objects[name].deflate() for name in parcels.names([tree])]
    large = [id(value) for value in facts.values() if isinstance(value, bytes) and len(value) >= parcels.LARGE_BYTES]
    assert {*large} <= {id(piece) for each in contents for piece in each}
    whole = {name: memoryview(objects[name].deflate()) for name in parcels.names([tree])}
    found = parcels.inflate(tree.object_id, whole)
    assert isinstance(found, Message) and dict(found.content["isocenter"]) == facts


def cut_and_changed() -> dict[str, bytes]:
    """Contents that are no record, or not one as it is written here."""
    good = ConfigRecord({"model": LARGE, "n": 1}).deflate()
    begin = good.index(b"\0") + 1
    body, twice = good[begin:], good[begin:] * 2
    return {
        "cut": good[:-1],
        "longer": good + b"x",
        "another kind": good.replace(b"ConfigRecord", b"MetricRecord", 1),
        "no head": body,
        "a field that nobody knows": b"ConfigRecord  %d\0" % (len(body) + 2) + body + b"\x08\x01",
        "longer than it is": good[:begin] + body.replace(b"\x80\x80\x04", b"\xff\xff\x7f", 1),
        "a size without an end": good[:begin] + b"\x0a" + b"\xff" * (len(body) - 1),
        "each key twice": b"ConfigRecord  %d\0" % len(twice) + twice,
        "a key that is no text": good[:begin] + body.replace(b"model", b"\xff\xfe\xfd\xfc\xfb", 1),
    }


@pytest.mark.parametrize("name", cut_and_changed())
def test_what_is_no_record_is_judged_as_flower_judges_it(name: str) -> None:
    content = cut_and_changed()[name]

    def outcome(make: Callable[[], Any]) -> Any:
        try:
            return dict(make())
        except (LookupError, TypeError, ValueError, AttributeError, DecodeError):  # what a node takes as no order
            return "no object"

    ours = outcome(lambda: parcels.inflate("a", {"a": memoryview(content)}))
    assert ours == outcome(lambda: inflate_object_from_contents("a", {"a": content}))  # oracle: Flower's own


@given(st.integers(0, 2**40))
def test_numbers_are_written_as_protobuf_writes_them(number: int) -> None:
    # Oracle: a message of the library whose one field is such a number.
    assert ProtoConfigRecordValue(uint64=number).SerializeToString() == b"\x18" + parcels._varint(number)


def test_a_body_can_be_sent_again_and_no_piece_is_large() -> None:
    parts = [b"ab", b"", bytes(range(256)) * 3000]
    body = parcels._Body(parts)
    for _ in range(2):
        sent = list(body)
        assert b"".join(sent) == b"".join(parts) and max(map(len, sent)) == parcels.PIECE_BYTES


def answering(headers: dict[str, str], content: list[bytes]) -> Any:
    """A client of Flower's whose server answers so. httpx's own mock would put other bytes in the place of the body."""

    class Line(httpx.BaseTransport):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            assert sum(map(len, cast(Iterable[bytes], request.stream))) == int(request.headers["content-length"])
            return httpx.Response(200, headers=headers, content=iter(content))

    client = ProtobufClient("https://example.invalid")
    client._client.close()
    client._client = httpx.Client(transport=Line(), timeout=7.0)
    return client


def test_an_answer_is_read_into_one_block() -> None:
    parts = [b"x" * 300_000, b"y", b"z" * 99_999]
    client = answering({"content-length": "400000"}, parts)
    answer = parcels.post(client, parcels.RECEIVE_ORDER, ObjectTree())
    assert bytes(answer) == b"".join(parts) and answer.readonly


def test_what_was_sent_is_held_by_nothing_once_it_is_answered() -> None:
    gc.disable()  # which would free what httpx holds in a circle, some time later
    try:
        client, sent = answering({"content-length": "0"}, []), np.zeros(300_000, np.uint8)
        parcels.post(client, parcels.SEND_REPORT, ObjectTree(), [[cast(bytes, sent.data)]])
        assert sys.getrefcount(sent) == 2  # its name here, and the argument
    finally:
        gc.enable()


@pytest.mark.parametrize("told", ["", "-1", "1e3", "1 0", str(parcels.ANSWER_BYTES_MAX + 1), "9" * 5000])
def test_an_answer_of_no_length_or_of_too_large_a_one_takes_no_memory(told: str) -> None:
    client = answering({"content-length": told} if told else {}, [b"x"])
    with pytest.raises(httpx.RemoteProtocolError):
        parcels.post(client, parcels.RECEIVE_ORDER, ObjectTree())
