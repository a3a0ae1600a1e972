"""A parcel: a Flower message and all its objects as the body of one HTTP request.

Flower sends each object of a message in a request of its own, over every hop: nine requests to give a site an order and take
its report, each signed and checked. A parcel is one. Its form: the number of parts as four bytes, the length of each as eight,
then the parts, all numbers big-endian. The first part is Flower's own call, the others are objects in the order of its trees.

Flower copies a record several times to send it and three times to read it. Here a large value goes out from where it stands, a
piece at a time; what comes in is read into one block of the announced length, and a large value is copied once, into its record.
"""

import hashlib
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import httpx
import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.serde import config_record_from_proto, config_record_to_proto
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.recorddict_pb2 import ConfigRecord as ProtoConfigRecord
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    _get_computed_object_ids,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.protobuf.client import ProtobufClient, ProtobufRequestContext
from google.protobuf.message import Message as Call

from privacy.errors import MessageMalformed

PARTS_MAX = 100_000  # orders of one stage for a thousand sites are a few thousand objects
RECEIVE_ORDER, SEND_REPORT = "/v1/fleet/receive", "/v1/fleet/send"
SEND_ORDERS, RECEIVE_REPORTS = "/v1/runtime/send", "/v1/runtime/receive"
ANSWER_BYTES_MAX = 5 * 2**29  # the largest report of `privacy.wire`, 2 GiB, and what goes with it
PIECE_BYTES = 256 * 1024  # of a body, sent at a time
LARGE_BYTES = 64 * 1024  # a value of a record from here on does not go through protobuf
_MEDIA = "application/octet-stream"
_ITEM, _KEY, _VALUE, _BYTES = b"\x0a", b"\x0a", b"\x12", b"\x32"
"""How fields begin in flwr/proto/recorddict.proto: ConfigRecord.items, Item.key, Item.value, ConfigRecordValue.bytes."""
Pieces = Sequence[bytes]


def pack(parts: Sequence[bytes]) -> bytes:
    """One body that holds `parts`."""
    return b"".join(pieces(parts))


def pieces(parts: Sequence[bytes]) -> list[bytes]:
    """What joined is the body that holds `parts`, without a copy of any of them."""
    return [_sizes([len(part) for part in parts]), *parts]


def _sizes(sizes: Sequence[int]) -> bytes:
    return struct.pack(f">I{len(sizes)}Q", len(sizes), *sizes)


def unpack(body: bytes | memoryview) -> list[bytes]:
    """The parts of a body, at least one; raises MessageMalformed unless it is exactly what `pack` makes."""
    return [bytes(part) for part in views(body)]


def views(body: bytes | memoryview) -> list[memoryview]:
    """`unpack` without a copy of any part."""
    if len(body) < 4:
        raise MessageMalformed("a parcel ends before it begins")
    (number,) = struct.unpack_from(">I", body)
    begin = 4 + 8 * number
    if not 1 <= number <= PARTS_MAX or len(body) < begin:
        raise MessageMalformed("a parcel has no parts, too many, or ends in the middle")
    sizes = struct.unpack_from(f">{number}Q", body, 4)
    if begin + sum(sizes) != len(body):
        raise MessageMalformed("the parts of a parcel are longer or shorter than it says")
    whole, parts = memoryview(body).toreadonly(), []
    for size in sizes:
        parts.append(whole[begin : begin + size])
        begin += size
    return parts


def names(trees: Iterable[ObjectTree]) -> list[str]:
    """The objects of messages, each once, parts before wholes: the order in which a parcel holds them."""
    return list(dict.fromkeys(part.object_id for tree in trees for part in iterate_object_tree(tree)))


# Objects as bytes ----------------------------------------------------------------------------------------------------


def flat(messages: Iterable[Message]) -> tuple[list[ObjectTree], list[Pieces]]:
    """The trees of messages and all their objects in pieces, in the order of `names`; each is made and hashed once.

    Flower does both again at each look at a name, ten times for a message; that of 28 MB took 0.7 s of processor time.
    """
    contents, trees = dict[str, Pieces](), dict[int, ObjectTree]()
    with no_object_id_recompute():
        return [_flat(message, contents, trees) for message in messages], list(contents.values())


def _flat(whole: InflatableObject, contents: dict[str, Pieces], trees: dict[int, ObjectTree]) -> ObjectTree:
    """The tree of `whole`. `trees`: those of objects that were met before, by identity: one record may be in many messages."""
    if id(whole) not in trees:
        parts = [_flat(part, contents, trees) for part in _parts(whole)]
        content = _deflated(whole) if isinstance(whole, ConfigRecord) else [whole.deflate()]
        digest = hashlib.sha256()
        for piece in content:
            digest.update(piece)
        name = digest.hexdigest()
        whole.__dict__["_object_id"] = name  # where Flower looks for it, if it is among those that it takes as known
        _get_computed_object_ids().add(name)
        contents.setdefault(name, content)
        trees[id(whole)] = ObjectTree(object_id=name, children=parts)
    return trees[id(whole)]


def _parts(whole: InflatableObject) -> Iterable[InflatableObject]:
    """What Flower's `children` gives, without the names that it would have to make first."""
    if isinstance(whole, Message):
        return [whole.content] if whole.has_content() else []
    return list(whole.values()) if isinstance(whole, RecordDict) else (whole.children or {}).values()


def _deflated(record: ConfigRecord) -> Pieces:
    """What joined is `record.deflate()`, without a copy of a large value."""
    if not any(_is_large(value) for value in record.values()):
        return [record.deflate()]
    body = list[bytes]()
    for key, value in record.items():
        if isinstance(value, bytes) and _is_large(value):
            name, field = key.encode(), _BYTES + _varint(len(value))
            item = _KEY + _varint(len(name)) + name + _VALUE + _varint(len(field) + len(value)) + field
            body += [_ITEM + _varint(len(item) + len(value)) + item, value]
        else:
            body.append(config_record_to_proto(ConfigRecord({key: value})).SerializeToString())
    return [_head(sum(map(len, body))), *body]


def _is_large(value: object) -> bool:
    return isinstance(value, bytes) and len(value) >= LARGE_BYTES


def _head(size: int) -> bytes:
    """What stands before a record whose body has `size` bytes (flwr/supercore/inflatable/inflatable_object.py)."""
    return b"ConfigRecord  %d\0" % size


def _varint(number: int) -> bytes:
    """Protobuf's number of variable length: seven bits a byte, the lowest first."""
    made = bytearray()
    while number > 0x7F:
        made.append(number & 0x7F | 0x80)
        number >>= 7
    made.append(number)
    return bytes(made)


def inflate(name: str, contents: Mapping[str, memoryview]) -> InflatableObject:
    """The object `name` of `contents`, which has objects by name.

    Of what is no object it raises what Flower does: LookupError, TypeError, ValueError, AttributeError, DecodeError.
    """
    ready = dict[str, InflatableObject]()
    for each, content in contents.items():
        if len(content) >= LARGE_BYTES and (record := _inflated(content)) is not None:
            ready[each] = record
    rest = {each: bytes(content) for each, content in contents.items() if each not in ready}
    return inflate_object_from_contents(name, rest, objects=ready)


def _inflated(content: memoryview) -> ConfigRecord | None:
    """The record in `content`; None if it is not written as `_deflated` writes one, so that Flower's own function judges it."""
    begin = bytes(content[:64]).find(b"\0") + 1
    if bytes(content[:begin]) != _head(len(content) - begin):
        return None
    small, large = bytearray(), dict[str, memoryview]()
    try:
        while begin < len(content):
            start, end = _span(content, begin, _ITEM)
            if end - start < LARGE_BYTES:
                small += content[begin:end]
            else:
                key_start, key_end = _span(content, start, _KEY)
                value_start, value_end = _span(content, key_end, _VALUE)
                data_start, data_end = _span(content, value_start, _BYTES)
                key = str(content[key_start:key_end], "utf-8")
                if not end == value_end == data_end or key in large:
                    return None
                large[key] = content[data_start:data_end]
            begin = end
    except ValueError:
        return None
    record = config_record_from_proto(ProtoConfigRecord.FromString(bytes(small)))
    if large.keys() & record.keys():
        return None
    for key, data in large.items():
        record[key] = bytes(data)
    return record


def _span(content: memoryview, place: int, begins: bytes) -> tuple[int, int]:
    """Where the content of a field with a length starts and ends; ValueError unless one that `begins` so is whole at `place`."""
    if content[place : place + 1] != begins:
        raise ValueError("another field")
    size = shift = 0
    for start in range(place + 1, min(place + 6, len(content))):
        size |= (content[start] & 0x7F) << shift
        shift += 7
        if content[start] <= 0x7F:
            if start + 1 + size > len(content):
                break
            return start + 1, start + 1 + size
    raise ValueError("a field without an end")


# Over the line -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Body:
    """The body of a request, a piece at a time, so that no copy that is made on the way is larger. It can be sent again."""

    parts: list[bytes]

    def __iter__(self) -> Iterator[bytes]:
        for part in self.parts:
            whole = memoryview(part)
            for start in range(0, len(whole), PIECE_BYTES):
                yield cast(bytes, whole[start : start + PIECE_BYTES])


def post(
    client: ProtobufClient,
    path: str,
    call: Call,
    objects: Sequence[Pieces] | None = None,
    timeout: httpx.Timeout | None = None,
) -> memoryview:
    """What is answered to a call, sent as a parcel with `objects` if there are any; raises httpx errors.

    Goes out like each of Flower's own calls, with the same headers and signatures. `timeout`: the client's own without one.
    """
    parts, wait = [call.SerializeToString(deterministic=True)], timeout or client._client.timeout
    if objects is not None:
        whole = [parts, *objects]
        parts = [_sizes([sum(map(len, each)) for each in whole]), *(piece for each in whole for piece in each)]
    headers = {
        "content-type": _MEDIA,
        "content-length": str(sum(map(len, parts))),
        "accept": _MEDIA,
        "accept-encoding": "identity",
    }
    request = client._client.build_request(
        "POST", f"{client._base_url}{path}", content=_Body(parts), headers=headers, timeout=wait
    )

    def send() -> memoryview:
        answer = client._send(ProtobufRequestContext(rpc_method=path, message=call, request=request), stream=True)
        try:
            answer.raise_for_status()
            request.extensions["timeout"]["read"] = wait.read  # Flower's streams have none
            return _read(answer)
        finally:
            answer.close()

    try:
        return send() if client._retry_invoker is None else cast(memoryview, client._retry_invoker.invoke(send))
    finally:
        parts.clear()  # httpx's answers hold themselves and their request, until Python happens to look for such circles


def _read(answer: httpx.Response) -> memoryview:
    """The body of an answer, in one block. Raises httpx.RemoteProtocolError for one without a length, or of too large a one."""
    told = answer.headers.get("content-length", "")
    if not (told.isascii() and told.isdecimal() and len(told) <= 10 and int(told) <= ANSWER_BYTES_MAX):
        raise httpx.RemoteProtocolError("an answer without a length, or too large")
    whole, place = np.empty(int(told), np.uint8).data, 0  # it takes memory as bytes come, not as they are announced
    for piece in answer.iter_raw():
        whole[place : place + len(piece)] = piece
        place += len(piece)
    return whole.toreadonly()
