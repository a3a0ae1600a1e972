"""Everything that may cross a hospital's boundary, and nothing else: orders in; reports or a refusal out.

Each message is a frozen dataclass with a fixed schema: numbers, enumerated words, digests, and arrays of numbers. There is no
field for free text, so a path, a name or an exception text has nowhere to travel. Decoding is strict: another version, a
missing or additional field, another type, a value out of range, an array of another dtype or with a NaN is MessageMalformed.

    order   TrainOrder      the model to start from; names the study and restates none of its settings
            EvaluateOrder   the model to evaluate, and on which split
    report  TrainReport     the update (float32, flat) and how many cases it is worth
            EvaluateReport  label-wise score histograms (int32), loss, and counts
            Refusal         one public code of `privacy.errors`

Orders are signed by the coordinator over study, run, round, attempt, time and the hash of the model, so a site can tell an
order from a forgery, from a replay, and from the same order with another model.
"""

import dataclasses
import hashlib
import json
import math
import re
import time
from typing import Any, ClassVar, Self, TypeVar, get_type_hints

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from privacy import keys
from privacy.errors import MessageMalformed, OrderForged, SignatureInvalid, public_codes

VERSION = 1
ORDER_LABEL = b"isocenter/v1/order"
VECTOR_MAX = 2**28  # 1 GiB of float32; the largest network offered has 7 million parameters
COUNTS_MAX = 32 * 2 * 10_000  # targets x classes x bins, the maxima that a study may ask for
FRESH_S = 7 * 86400  # an order older than the longest round of a study is stale

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]

_PATTERNS = {
    "study": re.compile(r"[0-9a-f]{64}"),
    "run": re.compile(r"[a-z0-9-]{1,64}"),
    "site": re.compile(r"[a-z][a-z0-9_-]{0,31}"),
    "split": re.compile(r"validation|test"),
}
_SIGNATURE_MAX = 80  # bytes of a DER-encoded P-256 signature, with room


@dataclasses.dataclass(frozen=True, eq=False)
class Crossing:
    """What every message names: the study's digest, the run, the round (from 1) and the attempt at it (from 1)."""

    kind: ClassVar[str] = ""

    study: str
    run: str
    round: int
    attempt: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check(field.name, getattr(self, field.name))

    @classmethod
    def fields(cls) -> dict[str, type]:
        """Name and type of every field: the schema, in order."""
        hints = get_type_hints(cls)
        return {field.name: hints[field.name] for field in dataclasses.fields(cls)}

    def to_records(self) -> RecordDict:
        header: dict[str, Any] = {"version": VERSION, "kind": self.kind}
        arrays: dict[str, Array] = {}
        for name, value in ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self)):
            if isinstance(value, np.ndarray):
                # Raw little-endian bytes in one object: Flower sends one HTTP request per object and hop.
                data = np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("<")).tobytes()
                arrays[name] = Array(dtype=value.dtype.name, shape=value.shape, stype="isocenter.raw", data=data)
            else:
                header[name] = value
        return RecordDict({"header": ConfigRecord(header), "arrays": ArrayRecord(arrays)})

    @classmethod
    def from_records(cls, records: RecordDict) -> Self:
        """The message in `records`; raises MessageMalformed unless it follows the schema to the letter."""
        if set(records) != {"header", "arrays"}:
            raise MessageMalformed("a message has exactly a header and arrays")
        header, arrays = records["header"], records["arrays"]
        if not isinstance(header, ConfigRecord) or not isinstance(arrays, ArrayRecord):
            raise MessageMalformed("header or arrays are of the wrong record type")
        given: dict[str, Any] = dict(header)
        if given.pop("version", None) != VERSION:
            raise MessageMalformed(f"only wire version {VERSION} is spoken here")
        if given.pop("kind", None) != cls.kind:
            raise MessageMalformed(f"expected a {cls.kind!r} message")
        schema = cls.fields()
        plain = {name: kind for name, kind in schema.items() if kind in (int, float, str, bytes)}
        if set(given) != set(plain) or set(arrays) != set(schema) - set(plain):
            raise MessageMalformed(f"fields of a {cls.kind!r} message are missing, or there are more than expected")
        for name, kind in plain.items():
            if type(given[name]) is not kind:
                raise MessageMalformed(f"field {name!r} must be {kind.__name__}")
        return cls(**given | {name: _decode_array(name, array) for name, array in arrays.items()})


@dataclasses.dataclass(frozen=True, eq=False)
class Order(Crossing):
    """What the coordinator asks of a site. `issued` is seconds since 1970; `signature` covers all but itself."""

    model: Float32
    issued: int
    signature: bytes

    def signed(self, key: ec.EllipticCurvePrivateKey) -> Self:
        return dataclasses.replace(self, signature=keys.sign(key, ORDER_LABEL, self.body()))

    def verify(self, coordinator: ec.EllipticCurvePublicKey) -> None:
        """Raise OrderForged unless the coordinator signed exactly this order, and not longer ago than FRESH_S."""
        try:
            keys.verify(coordinator, ORDER_LABEL, self.body(), self.signature)
        except SignatureInvalid:
            raise OrderForged("the order does not carry the coordinator's signature") from None
        if abs(time.time() - self.issued) > FRESH_S:
            raise OrderForged("the order is stale: it was signed more than a week from this clock's time")

    def body(self) -> bytes:
        """What the signature covers: every field by name, the model by its SHA-256."""
        facts: dict[str, Any] = {"version": VERSION, "kind": self.kind}
        for name in self.fields():
            if name not in ("model", "signature"):
                facts[name] = getattr(self, name)
        facts["model"] = hashlib.sha256(self.model.astype("<f4", copy=False).tobytes()).hexdigest()
        return json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()


@dataclasses.dataclass(frozen=True, eq=False)
class TrainOrder(Order):
    kind: ClassVar[str] = "train"


@dataclasses.dataclass(frozen=True, eq=False)
class EvaluateOrder(Order):
    kind: ClassVar[str] = "evaluate"

    split: str


@dataclasses.dataclass(frozen=True, eq=False)
class Report(Crossing):
    """What a site answers."""

    site: str


@dataclasses.dataclass(frozen=True, eq=False)
class TrainReport(Report):
    """`update`: float32 (P,), local model minus ordered model. `cases`: labelled images behind it. `loss`: their mean."""

    kind: ClassVar[str] = "train-report"

    cases: int
    loss: float
    seconds: float
    ingested: int
    update: Float32


@dataclasses.dataclass(frozen=True, eq=False)
class EvaluateReport(Report):
    """`counts`: int32 (targets, 2, bins), how many negatives and positives scored in each bin. `loss`: mean over images."""

    kind: ClassVar[str] = "evaluate-report"

    split: str
    patients: int
    images: int
    loss: float
    seconds: float
    ingested: int
    counts: Int32


@dataclasses.dataclass(frozen=True, eq=False)
class Refusal(Report):
    """Why a site did not carry out an order: a code of `privacy.errors.public_codes()`, never a text."""

    kind: ClassVar[str] = "refusal"

    code: str

    @classmethod
    def of(cls, order: Order, site: str, code: str) -> "Refusal":
        return cls(study=order.study, run=order.run, round=order.round, attempt=order.attempt, site=site, code=code)


MESSAGES: tuple[type[Crossing], ...] = (TrainOrder, EvaluateOrder, TrainReport, EvaluateReport, Refusal)
M = TypeVar("M", bound=Crossing)


def decode(message: Message, *kinds: type[M]) -> M:
    """The message of one of `kinds` inside a Flower message; raises MessageMalformed for anything else."""
    if not message.has_content():
        raise MessageMalformed("the Flower message carries an error instead of content")
    header = message.content.get("header")
    kind = header.get("kind") if isinstance(header, ConfigRecord) else None
    for candidate in kinds:
        if candidate.kind == kind:
            return candidate.from_records(message.content)
    raise MessageMalformed("a message of another kind was expected")


def _decode_array(name: str, array: Array) -> npt.NDArray[Any]:
    dtype, limit, dimensions = (
        (np.dtype("<i4"), COUNTS_MAX, 3) if name == "counts" else (np.dtype("<f4"), VECTOR_MAX, 1)
    )
    shape = tuple(array.shape)
    if array.stype != "isocenter.raw" or array.dtype != dtype.name or len(shape) != dimensions:
        raise MessageMalformed(f"array {name!r} has another type or number of dimensions than its schema")
    size = math.prod(shape)
    if min(shape, default=0) < 1 or size > limit or len(array.data) != size * dtype.itemsize:
        raise MessageMalformed(f"array {name!r} has another size than it claims, or is too large")
    return np.frombuffer(array.data, dtype=dtype).reshape(shape)


def _check(name: str, value: Any) -> None:
    """Raise MessageMalformed unless `value` is in the range of the field `name`; sender and receiver both call this."""
    if isinstance(value, np.ndarray):
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise MessageMalformed(f"array {name!r} holds NaN or infinity")
        if value.dtype.kind == "i" and value.min(initial=0) < 0:
            raise MessageMalformed(f"array {name!r} holds a negative count")
        good = True
    elif name in _PATTERNS:
        good = isinstance(value, str) and _PATTERNS[name].fullmatch(value) is not None
    elif name == "code":
        good = value in public_codes()
    elif name == "signature":
        good = isinstance(value, bytes) and len(value) <= _SIGNATURE_MAX
    elif name in ("round", "attempt"):
        good = isinstance(value, int) and 1 <= value <= 1_000_000
    elif isinstance(value, int):
        good = 0 <= value < 2**53
    else:
        good = isinstance(value, float) and math.isfinite(value) and 0 <= value < 1e12
    if not good:
        raise MessageMalformed(f"field {name!r} is out of range")
