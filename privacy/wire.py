"""Everything that may cross a hospital's boundary, and nothing else: orders in; reports or a refusal out.

Each message is a frozen dataclass with a fixed schema: numbers, enumerated words, names of the study's sites, digests, arrays
of numbers, and bytes that only `privacy.secagg` and `privacy.sharing` read, strictly. There is no field for free text, so a
path, a patient's name or an exception text has nowhere to travel. Decoding is strict: another version, a missing or additional
field, another type, a value out of range, an array of another dtype or with a NaN is MessageMalformed.

    order   TrainOrder      evaluate this model on the validation split, then train it; names the study, restates none of it
            EvaluateOrder   evaluate this model on one split; or count what the study's questions ask for
            KeysOrder       make keys for a sum that is to come
            UnmaskOrder     help to open a sum, and take in the keys of the next one
    report  TrainReport, EvaluateReport   the site's contribution to a sum, protected as the study says; keys of the next sum
            KeysReport      this site's signed keys
            UnmaskReport    shares of the sum that is opened; encrypted shares for the next one
            Refusal         one public code of `privacy.errors`

Orders are signed by the coordinator over every field, the model by its hash, so a site can tell an order from a forgery, from
a replay, and from the same order with another model. All sites get the same order: what it covers (`Order.body`) goes into
every mask, so sites that were shown different orders make a sum of noise.
"""

import dataclasses
import functools
import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, get_type_hints

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric import ec

from privacy import keys
from privacy.errors import MessageMalformed, OrderForged, SignatureInvalid, VersionSkew, public_codes
from privacy.greeting import NUMBER_MAX, WIRE

if TYPE_CHECKING:  # 25 MiB, and the process that trains speaks no Flower
    from flwr.app import Message, RecordDict

VERSION = WIRE
ORDER_LABEL = b"isocenter/v1/order"
VECTOR_MAX = 2**28  # 1 GiB of float32; the largest network offered has 7 million parameters
FIGURES_MAX = 32 * 7  # targets x (AUROC, lower and upper ends of its two intervals, negatives, positives)
BYTES_MAX = 2**31  # 1000 sites, or 8 bytes for each value of the largest vector
SITES_MAX = 1000
SCALE_MAX = 200
FRESH_S = 7 * 86400  # an order older than the longest round of a study is stale

Float32 = npt.NDArray[np.float32]
Names = tuple[str, ...]

_PATTERNS = {
    "study": re.compile(r"[0-9a-f]{64}"),
    "run": re.compile(r"[a-z0-9-]{1,64}"),
    "site": re.compile(r"[a-z][a-z0-9_-]{0,31}"),
    "split": re.compile(r"validation|test|cohort"),
}
RECORD = "isocenter"
COHORT = "cohort"  # in place of a split: count the patients that a study's questions ask for, and score nothing


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
ARRAYS = {"model": _VECTOR, "figures": ArrayKind(np.dtype("<f4"), 2, FIGURES_MAX)}
NAMES = (
    "participants",
    "survivors",
    "members",
)  # travel as one text with blanks between: an empty list would lose its type on the way
_SIGNATURE_MAX = 80  # bytes of a DER-encoded P-256 signature, with room


@dataclasses.dataclass(frozen=True, eq=False)
class Crossing:
    """What every message names: the study's digest, the run, round and attempt (from 1), and the sum within the attempt.

    Sums are counted from 1 in each attempt; 0 is the sum before the first, which has nothing in it.
    """

    kind: ClassVar[str] = ""

    study: str
    run: str
    round: int
    attempt: int
    sum: int

    def naming(self) -> dict[str, Any]:
        """Study, run, round, attempt and sum, for another message about the same."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(Crossing)}

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check(field.name, getattr(self, field.name))

    @classmethod
    @functools.cache  # worked out once for each kind: three times in a message, it cost as much as the signatures
    def fields(cls) -> Mapping[str, type]:
        """Name and type of every field: the schema, in order."""
        hints = get_type_hints(cls)
        return MappingProxyType({field.name: hints[field.name] for field in dataclasses.fields(cls)})

    def to_facts(self) -> dict[str, Any]:
        """Everything as numbers, words, lists of numbers and bytes: arrays as raw little-endian bytes with their shape."""
        facts: dict[str, Any] = {"version": VERSION, "kind": self.kind}
        for name in self.fields():
            value = getattr(self, name)
            if isinstance(value, np.ndarray):
                facts[name] = np.ascontiguousarray(value, dtype=ARRAYS[name].dtype).tobytes()
                facts[f"{name}_shape"] = list(value.shape)
            elif name in NAMES:
                facts[name] = " ".join(value)
            else:
                facts[name] = value
        return facts

    def to_records(self) -> "RecordDict":
        """One record that holds everything: Flower sends one request per object and hop."""
        from flwr.app import ConfigRecord, RecordDict  # not in the process that trains

        return RecordDict({RECORD: ConfigRecord(self.to_facts())})

    @classmethod
    def from_records(cls, records: "RecordDict") -> Self:
        """The message in `records`; raises MessageMalformed unless it follows the schema to the letter."""
        from flwr.app import ConfigRecord  # not in the process that trains

        record = records.get(RECORD)
        if set(records) != {RECORD} or not isinstance(record, ConfigRecord):
            raise MessageMalformed("a message is exactly one record")
        return cls.from_facts(dict(record))

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Self:
        """The message whose `to_facts()` these are; raises MessageMalformed unless they follow the schema to the letter."""
        given = dict(facts)
        version, kind = given.pop("version", None), given.pop("kind", None)
        require_spoken(version)
        if kind != cls.kind:
            raise MessageMalformed(f"expected a {cls.kind!r} message")
        schema = cls.fields()
        arrays = [name for name in schema if name in ARRAYS]
        if set(given) != set(schema) | {f"{name}_shape" for name in arrays}:
            raise MessageMalformed(f"fields of a {cls.kind!r} message are missing, or there are more than expected")
        for name in arrays:
            given[name] = ARRAYS[name].decode(name, given[name], given.pop(f"{name}_shape"))
        for name in set(schema) & set(NAMES):
            if type(given[name]) is not str:
                raise MessageMalformed(f"field {name!r} must be names with blanks between")
            given[name] = tuple(given[name].split(" ")) if given[name] else ()
        for name in set(schema) - set(arrays) - set(NAMES):
            if type(given[name]) is not schema[name]:
                raise MessageMalformed(f"field {name!r} must be {schema[name].__name__}")
        return cls(**given)


@dataclasses.dataclass(frozen=True, eq=False)
class Order(Crossing):
    """What the coordinator asks of a site. `issued` is seconds since 1970; `signature` covers all but itself."""

    message_type: ClassVar[str] = "query"  # which of Flower's handlers takes it

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
        """What the signature covers: every field by name, arrays and bytes by their SHA-256. Computed once."""
        return self._body

    @functools.cached_property
    def _body(self) -> bytes:
        facts: dict[str, Any] = {"version": VERSION, "kind": self.kind}
        for name in self.fields():
            value = getattr(self, name)
            if isinstance(value, np.ndarray):
                value = hashlib.sha256(np.ascontiguousarray(value, dtype=ARRAYS[name].dtype).data).hexdigest()
            elif isinstance(value, bytes):
                value = hashlib.sha256(value).hexdigest()
            if name != "signature":
                facts[name] = value
        return json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()


@dataclasses.dataclass(frozen=True, eq=False)
class WorkOrder(Order):
    """An order whose report goes into a sum.

    `scale`: values are multiplied by two to this power before they are rounded. Under `protection: masked`, `participants` are
    the sites of the sum, sorted, and `shares` what each of them encrypted for its peers; otherwise both are empty. `keys_next`
    asks for keys of the next sum.
    """

    model: Float32
    scale: int
    participants: Names
    shares: bytes
    keys_next: bool

    def about(self, site: str) -> bytes:
        """What a sealed contribution of `site` is bound to: study, run, round, attempt, sum and site."""
        return json.dumps(self.naming() | {"site": site}, sort_keys=True, separators=(",", ":")).encode()


@dataclasses.dataclass(frozen=True, eq=False)
class TrainOrder(WorkOrder):
    kind: ClassVar[str] = "train"
    message_type: ClassVar[str] = "train"


@dataclasses.dataclass(frozen=True, eq=False)
class EvaluateOrder(WorkOrder):
    """`split`: of the patients, validation or test; cohort: count all of them, as the study's questions say."""

    kind: ClassVar[str] = "evaluate"
    message_type: ClassVar[str] = "evaluate"

    split: str


@dataclasses.dataclass(frozen=True, eq=False)
class KeysOrder(Order):
    """Make keys for the sum `sum`."""

    kind: ClassVar[str] = "keys"


@dataclasses.dataclass(frozen=True, eq=False)
class UnmaskOrder(Order):
    """`survivors`: whose vectors are in the sum, sorted; empty if there is nothing to open. `vouches`: their signatures.

    `members` and `keys`: the sites of the next sum (`sum` + 1), sorted, and their keys; empty after the last sum.
    """

    kind: ClassVar[str] = "unmask"

    survivors: Names
    vouches: bytes
    members: Names
    keys: bytes


@dataclasses.dataclass(frozen=True, eq=False)
class Report(Crossing):
    """What a site answers."""

    site: str


@dataclasses.dataclass(frozen=True, eq=False)
class WorkReport(Report):
    """A contribution: `vector` holds its packed words (`privacy.sharing.Encoding`) masked, sealed or plain, as the study says.

    `vouch`: if masked, the site's signature over what the masks are bound to. `keys`: its keys of the next sum, if asked for.
    """

    seconds: float
    vector: bytes
    vouch: bytes
    keys: bytes


@dataclasses.dataclass(frozen=True, eq=False)
class TrainReport(WorkReport):
    kind: ClassVar[str] = "train-report"


@dataclasses.dataclass(frozen=True, eq=False)
class EvaluateReport(WorkReport):
    """`figures`: float32 (targets, 7), of a number (1, 16), of outlines (structures, 10): what the site releases of its own test
    split (`models.contributions`, `models.regression`, `models.segmentation`).
    """

    kind: ClassVar[str] = "evaluate-report"

    split: str
    figures: Float32


@dataclasses.dataclass(frozen=True, eq=False)
class KeysReport(Report):
    kind: ClassVar[str] = "keys-report"

    seconds: float
    keys: bytes


@dataclasses.dataclass(frozen=True, eq=False)
class UnmaskReport(Report):
    """`revealed`: one share for each site of the sum that this site holds shares of. `sealed`: its shares for the next sum."""

    kind: ClassVar[str] = "unmask-report"

    seconds: float
    revealed: bytes
    sealed: bytes


@dataclasses.dataclass(frozen=True, eq=False)
class Refusal(Report):
    """Why a site did not carry out an order: a code of `privacy.errors.public_codes()`, never a text."""

    kind: ClassVar[str] = "refusal"

    code: str


ORDERS: tuple[type[Order], ...] = (TrainOrder, EvaluateOrder, KeysOrder, UnmaskOrder)
REPORTS: tuple[type[Report], ...] = (TrainReport, EvaluateReport, KeysReport, UnmaskReport, Refusal)
MESSAGES: tuple[type[Crossing], ...] = (*ORDERS, *REPORTS)
M = TypeVar("M", bound=Crossing)


def decode(message: "Message", *kinds: type[M]) -> M:
    """The message of one of `kinds` inside a Flower message; raises MessageMalformed for anything else."""
    from flwr.app import ConfigRecord  # not in the process that trains

    if not message.has_content():
        raise MessageMalformed("the Flower message carries an error instead of content")
    record = message.content.get(RECORD)
    kind = record.get("kind") if isinstance(record, ConfigRecord) else None
    if isinstance(record, ConfigRecord) and "version" in record:
        require_spoken(record["version"])  # first: another version may have other kinds
    for candidate in kinds:
        if candidate.kind == kind:
            return candidate.from_records(message.content)
    raise MessageMalformed("a message of another kind was expected")


def require_spoken(version: object) -> None:
    """Raise VersionSkew for a message of another wire version, MessageMalformed for what is no version."""
    if type(version) is not int or not 0 < version <= NUMBER_MAX:
        raise MessageMalformed(f"only wire version {VERSION} is spoken here")
    if version != VERSION:
        later = "later" if version > VERSION else "earlier"
        raise VersionSkew(
            f"a message of wire version {version}, and version {VERSION} is spoken here; the sender's is {later}"
        )


def _check(name: str, value: Any) -> None:
    """Raise MessageMalformed unless `value` is in the range of the field `name`; sender and receiver both call this."""
    if isinstance(value, np.ndarray):
        good = value.dtype.kind != "f" or bool(np.isfinite(value).all())
    elif name in _RULES:
        good = _RULES[name](value)
    elif isinstance(value, bytes):
        good = len(value) <= BYTES_MAX
    elif isinstance(value, int):
        good = 0 <= value < 2**53
    else:
        good = isinstance(value, float) and math.isfinite(value) and 0 <= value < 1e12
    if not good:
        raise MessageMalformed(f"field {name!r} is out of range, or holds NaN or infinity")


def _is_names(value: Any) -> bool:
    """Distinct names of sites, sorted, at most SITES_MAX."""
    if not isinstance(value, tuple) or len(value) > SITES_MAX or not all(_matches("site", name) for name in value):
        return False
    return sorted(set(value)) == list(value)


def _matches(name: str, value: Any) -> bool:
    return isinstance(value, str) and _PATTERNS[name].fullmatch(value) is not None


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and 1 <= value <= 1_000_000


_RULES: dict[str, Callable[[Any], bool]] = {
    **{name: functools.partial(_matches, name) for name in _PATTERNS},
    **dict.fromkeys(NAMES, _is_names),
    **dict.fromkeys(("round", "attempt"), _is_number),
    "code": lambda value: value in public_codes(),
    "signature": lambda value: isinstance(value, bytes) and len(value) <= _SIGNATURE_MAX,
    "scale": lambda value: isinstance(value, int) and -SCALE_MAX <= value <= SCALE_MAX,
    "keys_next": lambda value: isinstance(value, bool),
}
