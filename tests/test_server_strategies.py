"""FedAvg and FedSGD against exact fractions, and means that are none."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fl_server import strategies
from fl_server.strategies import FedAvg, FedSGD
from models.study import Study, Training
from privacy.errors import MessageMalformed

UNHURRIED = settings(max_examples=100, deadline=None)  # a machine under load is no defect

Float32 = NDArray[np.float32]
numbers = st.floats(-(2.0**100), 2.0**100, width=32)


def vector(*values: float) -> Float32:
    return np.array(values, dtype=np.float32)


def exact(value: np.float32) -> Fraction:
    return Fraction(float(value))


@UNHURRIED
@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=8))
def test_fedavg_adds_the_mean_to_the_model_with_one_rounding(pairs: list[tuple[float, float]]) -> None:
    model, mean = vector(*(a for a, _ in pairs)), vector(*(b for _, b in pairs))
    after, state = FedAvg().step(model, mean, {})
    assert after.dtype == np.float32 and after.shape == model.shape and state == {}
    for start, change, made in zip(model, mean, after, strict=True):
        wanted = exact(start) + exact(change)
        error = abs(exact(made) - wanted)
        for neighbour in (np.nextafter(made, np.float32(np.inf)), np.nextafter(made, np.float32(-np.inf))):
            assert error <= abs(exact(neighbour) - wanted)


def test_nothing_given_is_changed_and_what_is_carried_is_carried_on() -> None:
    model, mean = vector(1.0, 1.0), vector(0.5, -0.5)
    model.flags.writeable = mean.flags.writeable = False
    carried = {"momentum": vector(3.0)}
    after, state = FedAvg().step(model, mean, carried)
    assert after.tolist() == [1.5, 0.5]
    assert state == carried and state is not carried
    assert not np.shares_memory(after, model) and not np.shares_memory(after, mean)


BAD: list[NDArray[np.generic]] = [
    vector(),
    vector(1.0),
    vector(1.0, 2.0, 3.0),
    vector(1.0, np.nan),
    vector(np.inf, 1.0),
    vector(1.0, -np.inf),
    vector(1.0, 2.0).astype(np.float64),
    vector(1.0, 2.0).astype(np.int32),
    vector(1.0, 2.0).astype(">f4"),
    vector(1.0, 2.0).reshape(1, 2),
    vector(1.0, 2.0).reshape(2, 1),
]


@pytest.mark.parametrize("bad", BAD, ids=range(len(BAD)))
def test_a_malformed_mean_spoils_no_model(bad: Float32) -> None:
    with pytest.raises(MessageMalformed, match="mean update"):
        FedAvg().step(vector(0.0, 0.0), bad, {})


def test_a_malformed_model_is_refused() -> None:
    for model in (vector(), vector(np.nan), np.zeros((1, 1), np.float32), np.zeros(1), np.zeros((), np.float32)):
        with pytest.raises(MessageMalformed, match="the model"):
            FedAvg().step(model, vector(1.0), {})  # type: ignore[arg-type]


def test_a_model_that_leaves_the_range_of_float32_is_refused() -> None:
    for sign in (1, -1):
        with np.errstate(all="raise"), pytest.raises(MessageMalformed, match="next model"):
            FedAvg().step(vector(0.0, sign * 3e38), vector(0.0, sign * 3e38), {})


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


# FedSGD.


def fedsgd(momentum: float = 0.5, rate: float = 0.25, gain: float = 4.0) -> FedSGD:
    plan = Training(rounds=8, learning_rate=rate, schedule="constant")
    return FedSGD(plan, gain, momentum)


def test_fedsgd_is_gradient_descent_with_momentum_after_a_warm_up() -> None:
    """By hand, in fractions: the rate is halved in the first step, the velocity keeps half of itself."""
    strategy, model, state = fedsgd(), vector(1.0, -2.0), {}
    expected, velocity = [Fraction(1), Fraction(-2)], [Fraction(0), Fraction(0)]
    for number, mean in enumerate((vector(0.5, 0.25), vector(-1.0, 2.0), vector(0.0, 0.125)), start=1):
        model, state = strategy.step(model, mean, state)
        rate = Fraction(1, 8) if number == 1 else Fraction(1, 4)
        velocity = [v / 2 + 4 * exact(m) for v, m in zip(velocity, mean, strict=True)]
        expected = [e - rate * v for e, v in zip(expected, velocity, strict=True)]
        assert [exact(value) for value in model] == expected, "powers of two are exact in float32"
        assert [exact(value) for value in state["velocity"]] == velocity and state["steps"].tolist() == [number]


def test_fedsgd_changes_nothing_that_it_was_given() -> None:
    model, mean, state = vector(1.0), vector(2.0), {"velocity": vector(3.0), "steps": vector(4.0)}
    for array in (model, mean, *state.values()):
        array.flags.writeable = False
    first, second = fedsgd().step(model, mean, state), fedsgd().step(model, mean, state)
    assert first[0].tolist() == second[0].tolist() and state["steps"].tolist() == [4.0]


@pytest.mark.parametrize("bad", BAD, ids=range(len(BAD)))
def test_fedsgd_refuses_what_is_no_gradient_or_no_velocity(bad: Float32) -> None:
    with pytest.raises(MessageMalformed, match="mean gradient"):
        fedsgd().step(vector(0.0, 0.0), bad, {})
    with pytest.raises(MessageMalformed, match="velocity"):
        fedsgd().step(vector(0.0, 0.0), vector(1.0, 1.0), {"velocity": bad, "steps": vector(1.0)})


def test_fedsgd_refuses_a_model_beyond_float32() -> None:
    with pytest.raises(MessageMalformed, match="next model"):
        fedsgd().step(vector(3e38), vector(-3e38), {})
