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
from flwr.app import ConfigRecord, Message, RecordDict

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
RECORD = "isocenter"


@dataclasses.dataclass(frozen=True)
class ArrayKind:
    """What an array field may be: element type, number of dimensions, most elements."""

    dtype: np.dtype[Any]
    dimensions: int
    size_max: int

    def decode(self, name: str, data: object, shape: object) -> npt.NDArray[Any]:
        """The array; raises MessageMalformed unless bytes and shape agree with each other and with this kind."""
        if not isinstance(data, bytes) or not isinstance(shape, list) or any(type(n) is not int for n in shape):
            raise MessageMalformed(f"array {name!r} must be bytes and a shape")
        size = math.prod(shape)
        if len(shape) != self.dimensions or min(shape) < 1 or size > self.size_max:
            raise MessageMalformed(f"array {name!r} has a shape that its schema does not allow")
        if len(data) != size * self.dtype.itemsize:
            raise MessageMalformed(f"array {name!r} has another size than it claims")
        return np.frombuffer(data, dtype=self.dtype).reshape(shape)


_VECTOR = ArrayKind(np.dtype("<f4"), 1, VECTOR_MAX)
ARRAYS = {"model": _VECTOR, "update": _VECTOR, "counts": ArrayKind(np.dtype("<i4"), 3, COUNTS_MAX)}
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
        """One record that holds everything, arrays as raw little-endian bytes: Flower sends one request per object and hop."""
        facts: dict[str, Any] = {"version": VERSION, "kind": self.kind}
        for name in self.fields():
            value = getattr(self, name)
            if isinstance(value, np.ndarray):
                facts[name] = np.ascontiguousarray(value, dtype=ARRAYS[name].dtype).tobytes()
                facts[f"{name}_shape"] = list(value.shape)
            else:
                facts[name] = value
        return RecordDict({RECORD: ConfigRecord(facts)})

    @classmethod
    def from_records(cls, records: RecordDict) -> Self:
        """The message in `records`; raises MessageMalformed unless it follows the schema to the letter."""
        record = records.get(RECORD)
        if set(records) != {RECORD} or not isinstance(record, ConfigRecord):
            raise MessageMalformed("a message is exactly one record")
        given: dict[str, Any] = dict(record)
        version, kind = given.pop("version", None), given.pop("kind", None)
        if type(version) is not int or version != VERSION:
            raise MessageMalformed(f"only wire version {VERSION} is spoken here")
        if kind != cls.kind:
            raise MessageMalformed(f"expected a {cls.kind!r} message")
        schema = cls.fields()
        arrays = [name for name in schema if name in ARRAYS]
        if set(given) != set(schema) | {f"{name}_shape" for name in arrays}:
            raise MessageMalformed(f"fields of a {cls.kind!r} message are missing, or there are more than expected")
        for name in arrays:
            given[name] = ARRAYS[name].decode(name, given[name], given.pop(f"{name}_shape"))
        for name in set(schema) - set(arrays):
            if type(given[name]) is not schema[name]:
                raise MessageMalformed(f"field {name!r} must be {schema[name].__name__}")
        return cls(**given)


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
    record = message.content.get(RECORD)
    kind = record.get("kind") if isinstance(record, ConfigRecord) else None
    for candidate in kinds:
        if candidate.kind == kind:
            return candidate.from_records(message.content)
    raise MessageMalformed("a message of another kind was expected")


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
