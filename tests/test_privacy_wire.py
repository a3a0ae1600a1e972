"""Only the schema crosses: everything else is refused, whichever side makes it."""

import dataclasses
import json
import time
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given
from hypothesis import strategies as st

from privacy import wire
from privacy.errors import MessageMalformed, OrderForged, public_codes

KEY = ec.generate_private_key(ec.SECP256R1())
NAMES: dict[str, Any] = {"study": "ab" * 32, "run": "opacity-20260101-120000-abcdef", "round": 3, "attempt": 1}
MODEL = np.linspace(-1, 1, 7, dtype=np.float32)


def train_order(**change: Any) -> wire.TrainOrder:
    facts = NAMES | {"model": MODEL, "issued": int(time.time()), "signature": b""} | change
    return wire.TrainOrder(**facts)


def evaluate_order(**change: Any) -> wire.EvaluateOrder:
    facts = NAMES | {"model": MODEL, "issued": int(time.time()), "signature": b"", "split": "test"} | change
    return wire.EvaluateOrder(**facts)


def train_report(**change: Any) -> wire.TrainReport:
    facts: dict[str, Any] = {"site": "north", "cases": 12, "loss": 0.5, "seconds": 1.5, "ingested": 20, "update": MODEL}
    return wire.TrainReport(**(NAMES | facts | change))


def evaluate_report(**change: Any) -> wire.EvaluateReport:
    counts = np.arange(2 * 2 * 10, dtype=np.int32).reshape(2, 2, 10)
    facts: dict[str, Any] = {"site": "north", "split": "test", "patients": 5, "images": 9, "loss": 0.1, "seconds": 0.5}
    return wire.EvaluateReport(**(NAMES | facts | {"ingested": 20, "counts": counts} | change))


EXAMPLES = [
    train_order().signed(KEY),
    evaluate_order().signed(KEY),
    train_report(),
    evaluate_report(),
    wire.Refusal(**NAMES, site="north", code="policy-forbids"),
]


def flower(crossing: wire.Crossing) -> Message:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    return Message(crossing.to_records(), dst_node_id=5, message_type="train")


@pytest.mark.parametrize("sent", EXAMPLES, ids=lambda sent: sent.kind)
def test_every_message_survives_the_way_unchanged(sent: wire.Crossing) -> None:
    received = wire.decode(flower(sent), *wire.MESSAGES)
    assert type(received) is type(sent)
    for name in sent.fields():
        before, after = getattr(sent, name), getattr(received, name)
        if isinstance(before, np.ndarray):
            assert before.dtype == after.dtype and before.shape == after.shape and (before == after).all()
        else:
            assert before == after


@pytest.mark.parametrize("sent", EXAMPLES, ids=lambda sent: sent.kind)
def test_a_message_is_three_objects_on_the_wire(sent: wire.Crossing) -> None:
    """Each object is a request at every hop: the message, its dictionary, and one record with everything."""
    assert len(get_all_nested_objects(flower(sent))) == 3


def damaged(sent: wire.Crossing, header: dict[str, Any] | None = None, drop: str = "") -> RecordDict:
    facts = dict(sent.to_records()["isocenter"])
    facts.pop(drop, None)
    return RecordDict({"isocenter": ConfigRecord(facts | (header or {}))})


@pytest.mark.parametrize(
    ("header", "drop"),
    [
        ({"version": 2}, ""),
        ({"kind": "evaluate"}, ""),
        ({"kind": "shell"}, ""),
        ({"note": "John Smith, 1950"}, ""),
        ({}, "round"),
        ({}, "kind"),
        ({}, "version"),
        ({"round": "3"}, ""),
        ({"round": 3.0}, ""),
        ({"round": True}, ""),
        ({"round": 0}, ""),
        ({"round": -1}, ""),
        ({"round": 10**9}, ""),
        ({"study": "../../etc/passwd"}, ""),
        ({"study": "AB" * 32}, ""),
        ({"run": "a/b"}, ""),
        ({"run": "x" * 65}, ""),
        ({"issued": -5}, ""),
        ({"signature": b"x" * 81}, ""),
        ({"signature": "text"}, ""),
    ],
)
def test_a_header_that_is_not_the_schema_is_refused(header: dict[str, Any], drop: str) -> None:
    with pytest.raises(MessageMalformed):
        wire.TrainOrder.from_records(damaged(train_order(), header, drop))


def test_a_refusal_carries_a_public_code_and_nothing_else() -> None:
    for code in public_codes():
        wire.Refusal(**NAMES, site="north", code=code)
    for text in ("", "file /data/SMITH^JOHN.dcm not found", "POLICY-FORBIDS"):
        with pytest.raises(MessageMalformed):
            wire.Refusal(**NAMES, site="north", code=text)
    assert set(wire.Refusal.fields()) == {"study", "run", "round", "attempt", "site", "code"}


GOOD = MODEL.tobytes()
BAD_ARRAYS: list[dict[str, Any]] = [
    {"model": GOOD[:-1]},
    {"model": GOOD + b"\0"},
    {"model": ""},
    {"model": [1, 2, 3]},
    {"model_shape": [8]},
    {"model_shape": [7, 1]},
    {"model_shape": []},
    {"model_shape": [0], "model": b""},
    {"model_shape": [-7]},
    {"model_shape": [2**40]},
    {"model_shape": [7.0]},
    {"model_shape": [True], "model": GOOD[:4]},
    {"model_shape": 7},
    {"model": np.array([np.nan] * 7, "f4").tobytes()},
    {"model": np.array([np.inf] * 7, "f4").tobytes()},
    {"pixels": GOOD},
]


@pytest.mark.parametrize("bad", BAD_ARRAYS, ids=range(len(BAD_ARRAYS)))
def test_an_array_that_is_not_the_schema_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(MessageMalformed):
        wire.TrainOrder.from_records(damaged(train_order(), bad))


def test_other_records_are_refused() -> None:
    good = train_order().to_records()
    for more in (MetricRecord({"age": 70.0}), ConfigRecord({"note": "x"}), ArrayRecord({"x": Array(np.ones(3))})):
        with pytest.raises(MessageMalformed):
            wire.TrainOrder.from_records(RecordDict({**good, "more": more}))
        with pytest.raises(MessageMalformed):
            wire.TrainOrder.from_records(RecordDict({"isocenter": more}))
    with pytest.raises(MessageMalformed):
        wire.TrainOrder.from_records(RecordDict())


def test_negative_counts_are_refused() -> None:
    with pytest.raises(MessageMalformed):
        evaluate_report(counts=np.full((1, 2, 10), -1, dtype=np.int32))


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8), st.integers() | st.text() | st.binary() | st.booleans(), max_size=6
    )
)
def test_arbitrary_headers_never_pass_and_never_crash(header: dict[str, Any]) -> None:
    try:
        records = RecordDict({"isocenter": ConfigRecord(header)})
    except (TypeError, ValueError):
        return  # Flower itself refuses it
    with pytest.raises(MessageMalformed):
        wire.TrainOrder.from_records(records)


def test_an_order_holds_for_the_model_and_names_it_was_signed_with() -> None:
    order = train_order().signed(KEY)
    order.verify(KEY.public_key())
    changes: list[dict[str, Any]] = [
        {"study": "cd" * 32},
        {"run": "another"},
        {"round": 4},
        {"attempt": 2},
        {"issued": order.issued + 1},
        {"model": MODEL + np.float32(1e-6)},
        {"signature": b""},
        {"signature": order.signature[:-1] + bytes([order.signature[-1] ^ 1])},
    ]
    for change in changes:
        with pytest.raises(OrderForged):
            dataclasses.replace(order, **change).verify(KEY.public_key())
    with pytest.raises(OrderForged):
        order.verify(ec.generate_private_key(ec.SECP256R1()).public_key())


def test_a_train_order_cannot_be_turned_into_an_evaluate_order() -> None:
    train = train_order().signed(KEY)
    with pytest.raises(OrderForged):
        evaluate_order(issued=train.issued, signature=train.signature).verify(KEY.public_key())
    validation = evaluate_order(split="validation").signed(KEY)
    with pytest.raises(OrderForged):
        dataclasses.replace(validation, split="test").verify(KEY.public_key())


def test_a_stale_order_is_refused() -> None:
    with pytest.raises(OrderForged):
        train_order(issued=int(time.time()) - wire.FRESH_S - 60).signed(KEY).verify(KEY.public_key())


def test_the_signed_body_is_the_documented_one() -> None:
    """Independent of the code: anyone can rebuild what a signature covers from the documentation."""
    import hashlib

    order = train_order(issued=1_790_000_000)
    expected = {
        "attempt": 1,
        "issued": 1_790_000_000,
        "kind": "train",
        "model": hashlib.sha256(GOOD).hexdigest(),
        "round": 3,
        "run": NAMES["run"],
        "study": NAMES["study"],
        "version": 1,
    }
    assert json.loads(order.body()) == expected


def test_decode_names_the_kinds_it_expects() -> None:
    with pytest.raises(MessageMalformed):
        wire.decode(flower(train_report()), wire.TrainOrder)
