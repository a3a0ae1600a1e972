"""Only the schema crosses: everything else is refused, whichever side makes it."""

import dataclasses
import hashlib
import json
import time
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy import wire
from privacy.errors import MessageMalformed, OrderForged, public_codes

UNHURRIED = settings(max_examples=100, deadline=None)  # a machine under load is no defect

KEY = ec.generate_private_key(ec.SECP256R1())
NAMES: dict[str, Any] = {
    "study": "ab" * 32,
    "run": "opacity-20260101-120000-abcdef",
    "round": 3,
    "attempt": 1,
    "sum": 4,
}
MODEL = np.linspace(-1, 1, 7, dtype=np.float32)
FIGURES = np.array([[0.75, 0.5, 0.875, 40, 12], [-1, -1, -1, -1, -1]], np.float32)
THREE = ("east", "north", "south")

ORDER = {"issued": 1_790_000_000, "signature": b"\x30\x45"}
WORK = ORDER | {"model": MODEL, "scale": -7, "participants": THREE, "shares": b"\0shares\xff", "keys_next": True}
REPORT = {"site": "north", "seconds": 1.5}
FACTS: dict[type[wire.Crossing], dict[str, Any]] = {
    wire.TrainOrder: WORK,
    wire.EvaluateOrder: WORK | {"split": "test"},
    wire.KeysOrder: ORDER,
    wire.UnmaskOrder: ORDER | {"survivors": THREE, "vouches": b"vouches", "members": ("east", "west"), "keys": b"keys"},
    wire.TrainReport: REPORT | {"vector": b"\x01\x02", "vouch": b"\x06", "keys": b"\x03"},
    wire.EvaluateReport: REPORT
    | {"vector": b"\x01\x02", "vouch": b"\x06", "keys": b"", "split": "validation", "figures": FIGURES},
    wire.KeysReport: REPORT | {"keys": b"\x03"},
    wire.UnmaskReport: REPORT | {"revealed": b"\x04", "sealed": b"\x05"},
    wire.Refusal: {"site": "north", "code": "policy-forbids"},
}


def made(kind: type[wire.Crossing], **change: Any) -> Any:
    return kind(**(NAMES | FACTS[kind] | change))


def train_order(**change: Any) -> wire.TrainOrder:
    """An order of today, as other test files need it."""
    order: wire.TrainOrder = made(wire.TrainOrder, **({"issued": int(time.time()), "signature": b""} | change))
    return order


def train_report(**change: Any) -> wire.TrainReport:
    report: wire.TrainReport = made(wire.TrainReport, **change)
    return report


KINDS = list(FACTS)
ORDERS = [kind for kind in KINDS if issubclass(kind, wire.Order)]
EMPTY = {
    "participants": (),
    "shares": b"",
    "survivors": (),
    "members": (),
    "keys": b"",
    "signature": b"",
    "vector": b"",
    "vouch": b"",
    "vouches": b"",
    "revealed": b"",
    "sealed": b"",
}


def flower(crossing: wire.Crossing) -> Message:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    return Message(crossing.to_records(), dst_node_id=5, message_type="train")


def same(one: wire.Crossing, two: wire.Crossing) -> bool:
    def alike(a: Any, b: Any) -> bool:
        if isinstance(a, np.ndarray):
            return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
        return type(a) is type(b) and bool(a == b)

    return type(one) is type(two) and all(alike(getattr(one, n), getattr(two, n)) for n in one.fields())


def by_protobuf(records: RecordDict) -> RecordDict:
    sent = recorddict_to_proto(records)
    return recorddict_from_proto(type(sent).FromString(sent.SerializeToString()))


def by_objects(records: RecordDict) -> RecordDict:
    contents = {name: part.deflate() for name, part in get_all_nested_objects(records).items()}
    received = inflate_object_from_contents(records.object_id, contents)
    assert isinstance(received, RecordDict)
    return received


@pytest.mark.parametrize("way", [by_protobuf, by_objects])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
def test_every_message_survives_flowers_serialisation_unchanged(kind: type[wire.Crossing], way: Any) -> None:
    """Also with no names and no bytes at all, and with one name."""
    empty = {name: value for name, value in EMPTY.items() if name in kind.fields()}
    single = {name: ("north",) for name in wire.NAMES if name in kind.fields()}
    for change in ({}, empty, single):
        sent = made(kind, **change)
        assert same(kind.from_records(way(sent.to_records())), sent)
        assert same(wire.decode(flower(sent), *wire.MESSAGES), sent)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
def test_a_message_is_three_objects_on_the_wire(kind: type[wire.Crossing]) -> None:
    """Each object is a request at every hop: the message, its dictionary, and one record with everything."""
    assert len(get_all_nested_objects(flower(made(kind)))) == 3


# The schema ----------------------------------------------------------------------------------------------------------

CROSSING = {"study": "word", "run": "word", "round": "int", "attempt": "int", "sum": "int"}
ORDERED = CROSSING | {"issued": "int", "signature": "bytes"}
WORKING = ORDERED | {
    "model": "array",
    "scale": "int",
    "participants": "names",
    "shares": "bytes",
    "keys_next": "bool",
}
ANSWERED = CROSSING | {"site": "word"}
TIMED = ANSWERED | {"seconds": "float"}
SCHEMA: dict[str, dict[str, str]] = {
    "train": WORKING,
    "evaluate": WORKING | {"split": "word"},
    "keys": ORDERED,
    "unmask": ORDERED | {"survivors": "names", "vouches": "bytes", "members": "names", "keys": "bytes"},
    "train-report": TIMED | {"vector": "bytes", "vouch": "bytes", "keys": "bytes"},
    "evaluate-report": TIMED
    | {"vector": "bytes", "vouch": "bytes", "keys": "bytes", "split": "word", "figures": "array"},
    "keys-report": TIMED | {"keys": "bytes"},
    "unmask-report": TIMED | {"revealed": "bytes", "sealed": "bytes"},
    "refusal": ANSWERED | {"code": "word"},
}
"""Written down twice on purpose: a field that is added has to be added here, by somebody who has thought about it."""

FREE_TEXT = [
    "John Smith",
    "SMITH^JOHN",
    "/data/x.dcm",
    "../../etc/passwd",
    "1.2.840.113619",
    "file not found: IM0001",
    "Ä",
    "north\n",
    " ",
    "",
    "x" * 200,
]


def kind_of(field: object) -> str:
    words = {int: "int", float: "float", bool: "bool", bytes: "bytes", str: "word", wire.Names: "names"}
    return next((word for known, word in words.items() if field == known), "array")


def test_the_schema_is_this_and_every_message_is_in_it() -> None:
    found = {kind.kind: {name: kind_of(field) for name, field in kind.fields().items()} for kind in wire.MESSAGES}
    assert found == SCHEMA
    assert set(wire.MESSAGES) == set(FACTS)


def test_no_field_can_carry_free_text() -> None:
    """Every word and every name is a pattern or an enumeration, tried with texts as they stand in hospitals."""
    for kind in KINDS:
        for name, field in SCHEMA[kind.kind].items():
            for text in FREE_TEXT:
                if field == "word" or (field == "names" and text):
                    with pytest.raises(MessageMalformed):
                        kind.from_records(damaged(made(kind), {name: text}))
                    with pytest.raises(MessageMalformed):
                        made(kind, **{name: text if field == "word" else (text,)})


def test_a_refusal_carries_a_public_code_and_nothing_else() -> None:
    for code in public_codes():
        made(wire.Refusal, code=code)
    for text in ("", "file /data/SMITH^JOHN.dcm not found", "POLICY-FORBIDS"):
        with pytest.raises(MessageMalformed):
            made(wire.Refusal, code=text)


# Hostile records -----------------------------------------------------------------------------------------------------


def damaged(sent: wire.Crossing, change: dict[str, Any] | None = None, drop: str = "") -> RecordDict:
    facts = dict(sent.to_records()["isocenter"])
    facts.pop(drop, None)
    return RecordDict({"isocenter": ConfigRecord(facts | (change or {}))})


LISTS: list[Any] = [[], [1], ["north"], [b"x"], [True], [1.0]]
WRONG_TYPE: dict[str, list[Any]] = {
    "int": ["3", 3.0, True, b"3", *LISTS],
    "float": ["1.5", 1, True, b"1.5", *LISTS],
    "bytes": ["text", 1, 1.0, True, *LISTS],
    "bool": [1, 0, 1.0, "true", b"\1", *LISTS],
    "word": [1, 1.0, True, b"north", *LISTS],
    "names": [1, 1.0, True, b"north", *LISTS],
    "array": [1, 1.0, True, "1 2 3", *LISTS],
}
MANY = [f"s{number:04d}" for number in range(1001)]
OUT_OF_RANGE: dict[str, list[Any]] = {
    "study": ["ab" * 31, "AB" * 32, "ab" * 33, "g" * 64, "ab" * 32 + "\n"],
    "run": ["a/b", "A", "x" * 65, "a_b", "a b"],
    "site": ["North", "1north", "n" * 33, "st mary", "a.b"],
    "split": ["train", "Test", "validation test"],
    "code": ["internal ", "policy_forbids", "nothing"],
    "round": [0, -1, 1_000_001, 2**62],
    "attempt": [0, -1, 1_000_001],
    "sum": [-1, 2**53, 2**63],
    "issued": [-1, 2**53],
    "scale": [-201, 201, 2**40],
    "signature": [b"x" * 81],
    "seconds": [-0.001, float("nan"), float("inf"), -float("inf"), 1e12],
    "names": [
        *(" north", "north ", "north  south", " ", "  ", "south north", "north north", "North", "north South"),
        *("north,south", "north\tsouth", "north\nsouth", "north\u00a0south", "n" * 33, "1st", " ".join(MANY)),
    ],
    "model": [np.full(7, bad, "f4").tobytes() for bad in (np.nan, np.inf, -np.inf)]
    + [MODEL.tobytes()[:-1], MODEL.tobytes() + b"\0", b"", MODEL.tobytes() + bytes(4)],
    "figures": [np.full(10, np.nan, "f4").tobytes(), FIGURES.tobytes()[:-4], b""],
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
def test_every_field_is_refused_with_a_wrong_type_or_out_of_range(kind: type[wire.Crossing]) -> None:
    sent = made(kind)
    kind.from_records(damaged(sent))
    for name, field in SCHEMA[kind.kind].items():
        for bad in WRONG_TYPE[field] + OUT_OF_RANGE.get("names" if field == "names" else name, []):
            with pytest.raises(MessageMalformed):
                kind.from_records(damaged(sent, {name: bad}))
                pytest.fail(f"{kind.kind}.{name} took {bad!r}")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
def test_every_field_has_to_be_there_and_no_other(kind: type[wire.Crossing]) -> None:
    sent = made(kind)
    for name in dict(sent.to_records()["isocenter"]):
        with pytest.raises(MessageMalformed):
            kind.from_records(damaged(sent, drop=name))
    others = {name for fields in SCHEMA.values() for name in fields} - set(SCHEMA[kind.kind])
    for name in [*others, "note", "update", "survivors_shape", "study_shape", "Version", ""]:
        for value in (1, "John Smith", b"pixels"):
            if name not in SCHEMA[kind.kind]:
                with pytest.raises(MessageMalformed):
                    kind.from_records(damaged(sent, {name: value}))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
def test_another_version_or_kind_is_refused(kind: type[wire.Crossing]) -> None:
    sent = made(kind)
    for version in (1, 2, 3, 5, 0, -4, "4", 4.0, True, b"4", [4]):
        with pytest.raises(MessageMalformed, match="version"):
            kind.from_records(damaged(sent, {"version": version}))
    for name in [*(other.kind for other in KINDS if other is not kind), "shell", "", 1, b"train", ["train"]]:
        with pytest.raises(MessageMalformed):
            kind.from_records(damaged(sent, {"kind": name}))


SHAPES: list[Any] = [[8], [6], [7, 1], [1, 7], [], [0], [-7], [2**40], [7.0], [True], 7, "7", b"7", ["7"]]


@pytest.mark.parametrize("shape", SHAPES, ids=repr)
def test_a_shape_that_is_not_the_schema_is_refused(shape: Any) -> None:
    with pytest.raises(MessageMalformed):
        wire.TrainOrder.from_records(damaged(made(wire.TrainOrder), {"model_shape": shape}))
    with pytest.raises(MessageMalformed):
        wire.EvaluateReport.from_records(damaged(made(wire.EvaluateReport), {"figures_shape": shape}))


def test_shapes_that_multiply_to_the_right_size_by_tricks_are_refused() -> None:
    for shape in ([-7], [-1, -7], [-2, -5], [10, 0]):
        for kind, name in ((wire.TrainOrder, "model"), (wire.EvaluateReport, "figures")):
            with pytest.raises(MessageMalformed):
                kind.from_records(damaged(made(kind), {f"{name}_shape": shape}))
    with pytest.raises(MessageMalformed, match="shape"):
        wire.TrainOrder.from_records(damaged(made(wire.TrainOrder), {"model": b"", "model_shape": [0]}))


def test_more_than_a_message_may_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The true limits are gigabytes; the rule is tried with small ones."""
    monkeypatch.setattr(wire, "BYTES_MAX", 10)
    for kind in KINDS:
        for name, field in SCHEMA[kind.kind].items():
            if field == "bytes" and name != "signature":
                made(kind, **{name: bytes(10)})
                with pytest.raises(MessageMalformed):
                    kind.from_records(damaged(made(kind), {name: bytes(11)}))
    small = wire.ArrayKind(np.dtype("<f4"), 2, 6)
    assert small.decode("x", bytes(24), [2, 3]).shape == (2, 3)
    with pytest.raises(MessageMalformed):
        small.decode("x", bytes(28), [7, 1])


def test_a_thousand_names_pass_and_one_more_does_not() -> None:
    sent = made(wire.TrainOrder, participants=tuple(MANY[:1000]))
    assert wire.TrainOrder.from_records(sent.to_records()).participants == tuple(MANY[:1000])
    with pytest.raises(MessageMalformed):
        made(wire.TrainOrder, participants=tuple(MANY))
    for bad in (("south", "north"), ("north", "north"), ["north"], ("",), ("a b",), "north", None, ("North",)):
        with pytest.raises(MessageMalformed):
            made(wire.UnmaskOrder, survivors=bad)


def test_other_records_are_refused() -> None:
    good = made(wire.TrainOrder).to_records()
    for more in (MetricRecord({"age": 70.0}), ConfigRecord({"note": "x"}), ArrayRecord({"x": Array(np.ones(3))})):
        with pytest.raises(MessageMalformed):
            wire.TrainOrder.from_records(RecordDict({**good, "more": more}))
        for records in (RecordDict({"isocenter": more}), RecordDict({"other": good["isocenter"]}), RecordDict()):
            with pytest.raises(MessageMalformed):
                wire.TrainOrder.from_records(records)
            with pytest.raises(MessageMalformed):
                wire.decode(Message(records, dst_node_id=5, message_type="train"), *wire.MESSAGES)


@UNHURRIED
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8), st.integers() | st.text() | st.binary() | st.booleans(), max_size=6
    )
)
def test_arbitrary_records_never_pass_and_never_crash(facts: dict[str, Any]) -> None:
    try:
        records = RecordDict({"isocenter": ConfigRecord(facts)})
    except (TypeError, ValueError):
        return  # Flower itself refuses it
    for kind in KINDS:
        with pytest.raises(MessageMalformed):
            kind.from_records(records)


ANYTHING = (
    st.integers(-(2**63), 2**63 - 1)
    | st.floats()
    | st.booleans()
    | st.binary(max_size=40)
    | st.text("north suea", max_size=20)
    | st.sampled_from(["validation", "internal", "train", "ab" * 32])
    | st.lists(st.integers(-1, 8), max_size=3)
    | st.lists(st.sampled_from(THREE), max_size=3)
)


@UNHURRIED
@given(st.sampled_from(KINDS), st.data())
def test_what_is_accepted_is_written_again_in_the_same_words(kind: type[wire.Crossing], data: st.DataObject) -> None:
    """There is one way to say a thing, so nothing can hide in the choice of words."""
    facts = dict(made(kind).to_records()["isocenter"])
    name = data.draw(st.sampled_from(sorted(facts)))
    records = damaged(made(kind), {name: data.draw(ANYTHING)})
    try:
        accepted = kind.from_records(records)
    except MessageMalformed:
        return
    assert dict(accepted.to_records()["isocenter"]) == dict(records["isocenter"])


def test_decode_names_the_kinds_it_expects() -> None:
    for kind in KINDS:
        others = [other for other in KINDS if other is not kind]
        assert same(wire.decode(flower(made(kind)), kind), made(kind))
        with pytest.raises(MessageMalformed):
            wire.decode(flower(made(kind)), *others)


# Signatures ----------------------------------------------------------------------------------------------------------

OTHER: dict[str, Any] = {
    "study": "cd" * 32,
    "run": "another",
    "round": 4,
    "attempt": 2,
    "sum": 5,
    "issued": 1_790_000_001,
    "model": MODEL + np.float32(1e-6),
    "scale": -6,
    "participants": ("east", "north"),
    "shares": b"\0shares\xfe",
    "keys_next": False,
    "split": "validation",
    "survivors": ("east", "north"),
    "vouches": b"vouchez",
    "members": ("east", "north", "west"),
    "keys": b"keyz",
}


@pytest.fixture
def _today(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("privacy.wire.time.time", lambda: float(ORDER["issued"]))  # type: ignore[arg-type]


@pytest.mark.usefixtures("_today")
@pytest.mark.parametrize("kind", ORDERS, ids=lambda kind: kind.kind)
def test_a_signature_covers_every_field_of_an_order(kind: type[wire.Order]) -> None:
    order = made(kind).signed(KEY)
    order.verify(KEY.public_key())
    kind.from_records(by_protobuf(order.to_records())).verify(KEY.public_key())
    bodies = {order.body()}
    for name in SCHEMA[kind.kind]:
        if name != "signature":
            changed = dataclasses.replace(order, **{name: OTHER[name]})
            bodies.add(changed.body())
            with pytest.raises(OrderForged):
                changed.verify(KEY.public_key())
    assert len(bodies) == len(SCHEMA[kind.kind])  # every field but the signature, and the order itself
    for signature in (b"", order.signature[:-1] + bytes([order.signature[-1] ^ 1]), b"x" * 70):
        with pytest.raises(OrderForged):
            dataclasses.replace(order, signature=signature).verify(KEY.public_key())
    with pytest.raises(OrderForged):
        order.verify(ec.generate_private_key(ec.SECP256R1()).public_key())


@pytest.mark.usefixtures("_today")
def test_no_order_can_be_turned_into_another() -> None:
    facts = {name: value for each in ORDERS for name, value in (NAMES | FACTS[each]).items()}
    signed = {kind: made(kind).signed(KEY) for kind in ORDERS}
    for kind in ORDERS:
        for other in ORDERS:
            if other is not kind:
                wanted = {name: facts[name] for name in SCHEMA[other.kind]} | {"signature": signed[kind].signature}
                with pytest.raises(OrderForged):
                    other(**wanted).verify(KEY.public_key())
    unmask = signed[wire.UnmaskOrder]
    turned = dataclasses.replace(unmask, survivors=unmask.members, members=unmask.survivors)
    with pytest.raises(OrderForged):
        turned.verify(KEY.public_key())


def test_the_signed_body_is_the_documented_one() -> None:
    """Independent of the code: anyone can rebuild what a signature covers from the documentation."""

    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return hashlib.sha256(value.astype("<f4").tobytes()).hexdigest()
        return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else value

    for kind in ORDERS:
        facts = {name: plain(value) for name, value in (NAMES | FACTS[kind]).items() if name != "signature"}
        facts = json.loads(json.dumps(facts)) | {"version": 4, "kind": kind.kind}
        assert made(kind).body() == json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()


def test_an_order_is_fresh_for_a_week_and_clocks_may_be_wrong_by_as_much() -> None:
    now = int(time.time())
    for age in (0, wire.FRESH_S - 60, 60 - wire.FRESH_S):
        train_order(issued=now - age).signed(KEY).verify(KEY.public_key())
    for age in (wire.FRESH_S + 60, -wire.FRESH_S - 60, now):
        with pytest.raises(OrderForged, match="stale"):
            train_order(issued=now - age).signed(KEY).verify(KEY.public_key())


def test_what_is_sealed_is_bound_to_study_run_round_attempt_sum_and_site() -> None:
    order = made(wire.TrainOrder)
    about = {order.about("north"), order.about("south")}
    for name in NAMES:
        about.add(dataclasses.replace(order, **{name: OTHER[name]}).about("north"))
    assert len(about) == 2 + len(NAMES)
    assert json.loads(order.about("north")) == NAMES | {"site": "north"}
