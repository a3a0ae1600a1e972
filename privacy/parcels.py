"""A parcel: a Flower message and all its objects as the body of one HTTP request.

Flower sends each object of a message in a request of its own, over every hop: nine requests to give a site an order and take
its report, each signed and checked. A parcel is one. Its form: the number of parts as four bytes, the length of each as eight,
then the parts, all numbers big-endian. The first part is Flower's own call, the others are objects in the order of its trees.
"""

import struct
from collections.abc import Iterable, Sequence

import httpx
from flwr.app import Message, RecordDict
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    _get_computed_object_ids,
    get_object_id,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.protobuf.client import ProtobufClient, ProtobufRequestContext
from google.protobuf.message import Message as Call

from privacy.errors import MessageMalformed

PARTS_MAX = 100_000  # orders of one stage for a thousand sites are a few thousand objects
RECEIVE_ORDER, SEND_REPORT = "/v1/fleet/receive", "/v1/fleet/send"
SEND_ORDERS, RECEIVE_REPORTS = "/v1/runtime/send", "/v1/runtime/receive"
_MEDIA = "application/octet-stream"


def pack(parts: Sequence[bytes]) -> bytes:
    """One body that holds `parts`."""
    return b"".join(pieces(parts))


def pieces(parts: Sequence[bytes]) -> list[bytes]:
    """What joined is the body that holds `parts`, without a copy of any of them."""
    return [struct.pack(f">I{len(parts)}Q", len(parts), *map(len, parts)), *parts]


def unpack(body: bytes) -> list[bytes]:
    """The parts of a body, at least one; raises MessageMalformed unless it is exactly what `pack` makes."""
    if len(body) < 4:
        raise MessageMalformed("a parcel ends before it begins")
    (number,) = struct.unpack_from(">I", body)
    begin = 4 + 8 * number
    if not 1 <= number <= PARTS_MAX or len(body) < begin:
        raise MessageMalformed("a parcel has no parts, too many, or ends in the middle")
    sizes = struct.unpack_from(f">{number}Q", body, 4)
    if begin + sum(sizes) != len(body):
        raise MessageMalformed("the parts of a parcel are longer or shorter than it says")
    parts = []
    for size in sizes:
        parts.append(body[begin : begin + size])
        begin += size
    return parts


def names(trees: Iterable[ObjectTree]) -> list[str]:
    """The objects of messages, each once, parts before wholes: the order in which a parcel holds them."""
    return list(dict.fromkeys(part.object_id for tree in trees for part in iterate_object_tree(tree)))


def flat(messages: Iterable[Message]) -> tuple[list[ObjectTree], list[bytes]]:
    """The trees of messages and all their objects, in the order of `names`; each is made into bytes and hashed once.

    Flower does both again at each look at a name, ten times for a message; that of 28 MB took 0.7 s of processor time.
    """
    contents, trees = dict[str, bytes](), dict[int, ObjectTree]()
    with no_object_id_recompute():
        return [_flat(message, contents, trees) for message in messages], list(contents.values())


def _flat(whole: InflatableObject, contents: dict[str, bytes], trees: dict[int, ObjectTree]) -> ObjectTree:
    """The tree of `whole`. `trees`: those of objects that were met before, by identity: one record may be in many messages."""
    if id(whole) not in trees:
        parts = [_flat(part, contents, trees) for part in _parts(whole)]
        content = whole.deflate()
        name = get_object_id(content)
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


def post(
    client: ProtobufClient,
    path: str,
    call: Call,
    objects: Sequence[bytes] | None = None,
    timeout: httpx.Timeout | None = None,
) -> bytes:
    """What is answered to a call, sent as a parcel with `objects` if there are any; raises httpx errors.

    Goes out like each of Flower's own calls, with the same headers and signatures. `timeout`: the client's own without one.
    """
    head = call.SerializeToString(deterministic=True)
    request = client._client.build_request(
        "POST",
        f"{client._base_url}{path}",
        content=head if objects is None else pack([head, *objects]),
        headers={"content-type": _MEDIA, "accept": _MEDIA},
        timeout=timeout or client._client.timeout,
    )

    def send() -> httpx.Response:
        answer = client._send(ProtobufRequestContext(rpc_method=path, message=call, request=request))
        answer.raise_for_status()
        return answer

    return (send() if client._retry_invoker is None else client._retry_invoker.invoke(send)).content
