"""FedAvg against a weighted mean by exact fractions, and hostile updates."""

from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fl_server import strategies
from fl_server.strategies import FedAvg
from models.study import Study
from privacy.errors import MessageMalformed, QuorumLost

Float32 = NDArray[np.float32]
numbers = st.floats(-1e3, 1e3, width=32)


def vector(*values: float) -> Float32:
    return np.array(values, dtype=np.float32)


@given(st.lists(st.tuples(st.lists(numbers, min_size=3, max_size=3), st.integers(1, 10**6)), min_size=1, max_size=8))
def test_fedavg_adds_the_mean_weighted_by_cases(updates: list[tuple[list[float], int]]) -> None:
    model = vector(1.0, -2.0, 0.5)
    after, state = FedAvg().step(model, [(vector(*delta), cases) for delta, cases in updates], {})
    total = sum(cases for _, cases in updates)
    for i, start in enumerate(model):
        exact = Fraction(float(start)) + sum(Fraction(delta[i]) * cases for delta, cases in updates) / total
        assert abs(float(after[i]) - float(exact)) <= 1e-6 * (1 + abs(float(exact)))
    assert after.dtype == np.float32 and state == {}


def test_the_order_of_arrival_moves_a_weight_by_a_rounding_at_most() -> None:
    rng = np.random.default_rng(1)
    model = rng.normal(size=1000).astype(np.float32)
    updates = [(rng.normal(size=1000).astype(np.float32), int(n)) for n in rng.integers(1, 1000, 50)]
    forward, _ = FedAvg().step(model, updates, {})
    backward, _ = FedAvg().step(model, updates[::-1], {})
    np.testing.assert_array_max_ulp(forward, backward, maxulp=1)


def test_one_site_alone_and_a_site_of_weight_a_million_to_one() -> None:
    assert FedAvg().step(vector(1.0), [(vector(2.0), 7)], {})[0] == 3.0
    after, _ = FedAvg().step(vector(0.0), [(vector(1.0), 10**9), (vector(-1.0), 1)], {})
    assert after[0] == pytest.approx(1.0, abs=1e-6)


def test_updates_are_taken_one_by_one_and_nothing_given_is_changed() -> None:
    model, delta = vector(1.0, 1.0), vector(0.5, -0.5)
    model.flags.writeable = delta.flags.writeable = False
    carried = {"momentum": vector(3.0)}

    def arriving() -> Iterator[tuple[Float32, int]]:
        yield delta, 1
        yield delta, 3

    after, state = FedAvg().step(model, arriving(), carried)
    assert after.tolist() == [1.5, 0.5]
    assert state == carried and state is not carried


def test_a_round_without_updates_is_no_round() -> None:
    with pytest.raises(QuorumLost):
        FedAvg().step(vector(1.0), [], {})


@pytest.mark.parametrize(
    ("delta", "cases"),
    [
        (vector(1.0), 5),  # too short
        (vector(1.0, 2.0, 3.0), 5),
        (vector(1.0, np.nan), 5),
        (vector(np.inf, 1.0), 5),
        (vector(1.0, 2.0).astype(np.float64), 5),
        (vector(1.0, 2.0).reshape(1, 2), 5),
        (vector(1.0, 2.0), 0),
        (vector(1.0, 2.0), -3),
        (vector(1.0, 2.0), 2**31),
        (vector(1.0, 2.0), 1.5),
        (vector(1.0, 2.0), True),
    ],
)
def test_a_malformed_update_spoils_no_model(delta: Float32, cases: int) -> None:
    with pytest.raises(MessageMalformed):
        FedAvg().step(vector(0.0, 0.0), [(vector(1.0, 1.0), 5), (delta, cases)], {})


def test_a_model_that_leaves_the_range_of_float32_is_refused() -> None:
    with np.errstate(over="ignore"), pytest.raises(MessageMalformed):
        FedAvg().step(vector(3e38), [(vector(3e38), 1)], {})


def test_a_malformed_model_is_refused() -> None:
    for model in (vector(), vector(np.nan), np.zeros((1, 1), np.float32)):
        with pytest.raises(MessageMalformed):
            FedAvg().step(model, [(vector(1.0), 1)], {})


def test_the_study_names_the_strategy() -> None:
    study = Study.model_validate(
        {
            "name": "s",
            "title": "t",
            "purpose": "p",
            "task": {"targets": ["opacity"]},
            "training": {"rounds": 1},
            "protection": "plain",
            "privacy": "none",
            "participation": {"sites": ["north"], "quorum": 1},
        }
    )
    assert isinstance(strategies.build(study), FedAvg)
