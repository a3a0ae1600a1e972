"""FedAvg and FedSGD against exact fractions, the others against their papers in plain loops, and updates that are none."""

import math
import statistics
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fl_server import strategies
from fl_server.strategies import FedAvg, FedSGD, Krum, Median, TrimmedMean
from models.study import Study, Training
from privacy.errors import MessageMalformed, QuorumLost

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


# FedAvgM, FedAdam, FedYogi: the papers' algorithms in plain loops, with numbers of Python.


def by_hand(name: str, model: list[float], means: list[list[float]], plan: dict[str, float]) -> list[float]:
    """Hsu et al. 2019: v <- beta v + delta, w <- w + eta v. Reddi et al. 2021, algorithm 2, with v_-1 = tau^2."""
    model = list(model)
    for i in range(len(model)):
        m, v = 0.0, plan.get("tau", 0.0) ** 2
        for mean in means:
            delta = mean[i]
            if name == "fedavgm":
                m = plan["momentum"] * m + delta
                model[i] += plan["server_rate"] * m
                continue
            m = plan["beta1"] * m + (1 - plan["beta1"]) * delta
            if name == "fedadam":
                v = plan["beta2"] * v + (1 - plan["beta2"]) * m * m
            else:
                sign = 1 if v > m * m else -1 if v < m * m else 0
                v = v - (1 - plan["beta2"]) * m * m * sign
            model[i] += plan["server_rate"] * m / (math.sqrt(v) + plan["tau"])
    return model


def made_study(strategy: dict[str, Any], sites: int = 5) -> Study:
    return Study.model_validate(
        {
            "name": "s",
            "title": "t",
            "purpose": "p",
            "task": {"targets": ["opacity"]},
            "training": {"rounds": 1},
            "strategy": strategy,
            "protection": "plain",
            "privacy": "none",
            "participation": {"sites": [f"site{i}" for i in range(sites)], "quorum": sites},
        }
    )


SERVER_STEPS: dict[str, dict[str, float]] = {
    "fedavgm": {"server_rate": 0.7, "momentum": 0.8},
    "fedadam": {"server_rate": 0.05, "beta1": 0.8, "beta2": 0.95, "tau": 0.01},
    "fedyogi": {"server_rate": 0.05, "beta1": 0.8, "beta2": 0.95, "tau": 0.01},
}
moderate = st.floats(-8, 8, width=32)


@UNHURRIED
@given(st.sampled_from(sorted(SERVER_STEPS)), st.lists(st.tuples(*[moderate] * 3), min_size=1, max_size=8))
def test_a_server_step_is_that_of_its_paper(name: str, means: list[tuple[float, float, float]]) -> None:
    strategy = strategies.build(made_study({"name": name, **SERVER_STEPS[name]}))
    model, state = vector(1.0, -2.0, 0.0), dict[str, Float32]()
    for mean in means:
        model, state = strategy.step(model, vector(*mean), dict(state))  # type: ignore[assignment]
        assert model.dtype == np.float32 and all(array.dtype == np.float32 for array in state.values())
    expected = by_hand(name, [1.0, -2.0, 0.0], [list(mean) for mean in means], SERVER_STEPS[name])
    np.testing.assert_allclose(model, expected, rtol=2e-5, atol=2e-5)


def test_fedyogi_forgets_a_large_update_more_slowly_than_fedadam() -> None:
    """What Yogi is for: after one burst, Adam's second moment falls by a share of itself, Yogi's by a share of the news."""
    kept = {}
    for name in ("fedadam", "fedyogi"):
        strategy = strategies.build(made_study({"name": name, "beta1": 0.0}))
        model, state = strategy.step(vector(0.0), vector(10.0), {})
        for _ in range(50):
            model, state = strategy.step(model, vector(0.01), state)
        kept[name] = float(state["v"][0])
    assert kept["fedadam"] < 0.7
    assert kept["fedyogi"] > 0.99


@pytest.mark.parametrize("name", sorted(SERVER_STEPS))
def test_a_server_step_changes_nothing_that_it_was_given_and_refuses_what_is_no_update(name: str) -> None:
    strategy = strategies.build(made_study({"name": name}))
    model, state = strategy.step(vector(1.0, 1.0), vector(2.0, -2.0), {})
    before = {key: array.tobytes() for key, array in state.items()}
    for array in (model, *state.values()):
        array.flags.writeable = False
    first, second = strategy.step(model, vector(1.0, 1.0), state), strategy.step(model, vector(1.0, 1.0), state)
    assert first[0].tobytes() == second[0].tobytes()
    assert {key: array.tobytes() for key, array in state.items()} == before
    for bad in BAD:
        with pytest.raises(MessageMalformed, match="mean update"):
            strategy.step(vector(0.0, 0.0), bad, {})  # type: ignore[arg-type]
        for key in state:
            with pytest.raises(MessageMalformed, match=r"velocity|moment"):
                strategy.step(vector(0.0, 0.0), vector(1.0, 1.0), {**state, key: bad})  # type: ignore[dict-item]


def test_a_server_step_beyond_float32_is_refused() -> None:
    for name, what in (("fedavgm", "next model"), ("fedadam", "second moment"), ("fedyogi", "second moment")):
        with np.errstate(all="raise"), pytest.raises(MessageMalformed, match=what):
            strategies.build(made_study({"name": name})).step(vector(3e38), vector(3e38), {})
    with pytest.raises(MessageMalformed, match="negative"):
        strategies.build(made_study({"name": "fedadam"})).step(vector(0.0), vector(1.0), {"v": vector(-1.0)})


# Median, trimmed mean, Krum: the papers' definitions in plain loops.


def median_by_hand(rows: list[list[float]]) -> list[float]:
    return [statistics.median(column) for column in zip(*rows, strict=True)]


def trimmed_by_hand(rows: list[list[float]], cut: int) -> list[float]:
    return [
        math.fsum(sorted(column)[cut : len(rows) - cut]) / (len(rows) - 2 * cut) for column in zip(*rows, strict=True)
    ]


def krum_by_hand(rows: dict[str, list[float]], f: int, m: int) -> list[str]:
    """Names of the m updates with the smallest score: the squared distances to the n - f - 2 nearest others, summed."""
    scores = {}
    for name, row in rows.items():
        others = [sum((a - b) ** 2 for a, b in zip(row, rows[o], strict=True)) for o in rows if o != name]
        scores[name] = sum(sorted(others)[: len(rows) - f - 2])
    return sorted(scores, key=lambda name: (scores[name], name))[:m]


def updates_of(rows: list[list[float]]) -> dict[str, Float32]:
    return {f"site{i:02}": vector(*row) for i, row in enumerate(rows)}


tables = st.integers(1, 4).flatmap(
    lambda width: st.lists(st.lists(moderate, min_size=width, max_size=width), min_size=5, max_size=9)
)


@UNHURRIED
@given(tables)
def test_the_median_is_that_of_each_weight(rows: list[list[float]]) -> None:
    combined = Median().combine(updates_of(rows))
    np.testing.assert_array_equal(combined.update, np.array(median_by_hand(rows), np.float32))
    assert combined.update.dtype == np.float32 and combined.left_out == []


@UNHURRIED
@given(tables, st.sampled_from([0.1, 0.2, 0.25, 0.4]))
def test_the_trimmed_mean_cuts_the_same_number_at_either_end(rows: list[list[float]], share: float) -> None:
    cut = int(Fraction(str(share)) * len(rows))
    combined = TrimmedMean(share).combine(updates_of(rows))
    np.testing.assert_allclose(combined.update, trimmed_by_hand(rows, cut), rtol=1e-6, atol=1e-6)
    assert combined.left_out == []


def test_a_share_that_floats_cannot_hold_is_meant_as_it_is_written() -> None:
    """0.29 of 100 sites are 29, though 0.29 * 100 is less than that."""
    rows = [[float(10**6 if i >= 71 else -(10**6) if i < 29 else 1)] for i in range(100)]
    assert TrimmedMean(0.29).combine(updates_of(rows)).update.tolist() == [1.0]


@UNHURRIED
@given(tables, st.integers(1, 2))
def test_krum_takes_the_updates_nearest_to_the_others(rows: list[list[float]], selected: int) -> None:
    wholes = [[float(round(value)) for value in row] for row in rows]  # so that ties are ties, and no rounding decides
    named = updates_of(wholes)
    chosen = krum_by_hand({name: row.tolist() for name, row in named.items()}, 1, selected)
    combined = Krum(1, selected).combine(named)
    np.testing.assert_allclose(combined.update, np.mean([named[name] for name in chosen], axis=0), rtol=1e-6)
    assert combined.left_out == [name for name in named if name not in chosen]


ROBUST: dict[str, strategies.Combination] = {"median": Median(), "trimmed_mean": TrimmedMean(0.25), "krum": Krum(1, 2)}


@pytest.mark.parametrize("name", ROBUST)
@UNHURRIED
@given(tables, st.randoms(use_true_random=False))
def test_the_order_in_which_updates_come_changes_no_bit(name: str, rows: list[list[float]], random: Any) -> None:
    updates = updates_of(rows)
    shuffled = list(updates.items())
    random.shuffle(shuffled)
    one, two = ROBUST[name].combine(updates), ROBUST[name].combine(dict(shuffled))
    assert one.update.tobytes() == two.update.tobytes() and one.left_out == two.left_out


@pytest.mark.parametrize("name", ROBUST)
@UNHURRIED
@given(st.integers(0, 2**32 - 1), st.sampled_from([-100.0, 1e6, 3e30]))
def test_a_robust_strategy_withstands_an_outlier_where_the_mean_does_not(name: str, seed: int, factor: float) -> None:
    """Honest updates differ by at most 0.2 in each weight; whatever a fifth site sends, the result is within theirs."""
    rng = np.random.default_rng(seed)
    honest = 1 + rng.uniform(-0.1, 0.1, (4, 30)).astype(np.float32)
    rows = [*honest, (honest[0].astype(np.float64) * factor).astype(np.float32)]
    updates = {f"site{i}": rows[k] for i, k in enumerate(rng.permutation(5))}
    combined = ROBUST[name].combine(updates).update
    assert (combined >= honest.min(axis=0) - 1e-6).all() and (combined <= honest.max(axis=0) + 1e-6).all()
    assert np.abs(np.mean(rows, axis=0, dtype=np.float64) - 1).max() > 10


def test_a_model_larger_than_a_block_is_combined_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(3).normal(size=(7, 50)).astype(np.float32)
    updates = {f"site{i}": row for i, row in enumerate(rows)}
    whole = {name: robust.combine(updates) for name, robust in ROBUST.items()}
    monkeypatch.setattr(strategies, "BLOCK", 7)
    for name, robust in ROBUST.items():
        np.testing.assert_allclose(robust.combine(updates).update, whole[name].update, rtol=1e-6)
        assert robust.combine(updates).left_out == whole[name].left_out


@pytest.mark.parametrize("name", ROBUST)
def test_updates_that_do_not_belong_together_are_combined_by_nobody(name: str) -> None:
    good = updates_of([[1.0, 2.0]] * 5)
    for bad in BAD:
        with pytest.raises(MessageMalformed, match="update of site03"):
            ROBUST[name].combine(good | {"site03": bad})  # type: ignore[arg-type]
    with pytest.raises(QuorumLost):
        ROBUST[name].combine({})


def test_krum_with_fewer_sites_than_it_withstands_chooses_nobody() -> None:
    with pytest.raises(QuorumLost, match="4 of 5"):
        Krum(1, 1).combine(updates_of([[1.0]] * 4))
    with pytest.raises(QuorumLost, match="5 of 6"):
        Krum(1, 3).combine(updates_of([[1.0]] * 5))


def test_a_study_names_what_combines_its_updates() -> None:
    found = {
        name: strategies.combination(made_study({"name": name})) for name in (*ROBUST, "fedavg", "fedprox", "fedadam")
    }
    assert (
        found["median"].__class__ is Median
        and found["trimmed_mean"] == TrimmedMean(0.25)
        and found["krum"] == Krum(1, 2)
    )
    assert found["fedavg"] is found["fedprox"] is found["fedadam"] is None
    assert all(isinstance(strategies.build(made_study({"name": name})), FedAvg) for name in (*ROBUST, "fedprox"))
