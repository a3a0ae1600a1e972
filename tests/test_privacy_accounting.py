"""ε against three oracles: dp-accounting called directly, a numerical integration written here (numpy only), and closed forms.

The integration knows nothing of dp-accounting: it puts the privacy loss of one step on a grid, keeping its mean, and convolves
it with itself by a Fourier transform. It is held against the closed form of the Gaussian mechanism (Balle and Wang 2018) first.
"""

import logging
import math
import random
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from dp_accounting import NeighboringRelation, dp_event
from dp_accounting.pld import PLDAccountant
from dp_accounting.pld import privacy_loss_distribution as pld
from dp_accounting.rdp import RdpAccountant
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.study import Privacy
from privacy import accounting
from privacy.accounting import (
    COARSE,
    FINE,
    FLOAT_ERROR,
    PrivacyEvent,
    epsilon,
    epsilon_rdp,
    noise_for,
    overflow,
    selection_epsilon,
    statements,
)
from privacy.errors import PrivacyError
from privacy.noise import GRID_BITS

Float64 = NDArray[np.float64]

DELTA = 1e-5
RATE, STEPS = 0.032, 1562  # 50 passes over 2000 patients, 64 a step
USUAL = PrivacyEvent(1.0, RATE, STEPS)


# Oracles -------------------------------------------------------------------------------------------------------------


def normal(x: float) -> float:
    """Distribution function of the standard normal distribution."""
    return math.erfc(-x / math.sqrt(2)) / 2


def gaussian_delta(spent: float, noise: float) -> float:
    """δ of the Gaussian mechanism with sensitivity 1, exactly."""
    return normal(1 / (2 * noise) - spent * noise) - math.exp(spent) * normal(-1 / (2 * noise) - spent * noise)


def root(falling: Callable[[float], float], value: float) -> float:
    """The ε at which δ, which falls, reaches `value`; 0 if it is there at once."""
    low, high = 0.0, 1.0
    if falling(0.0) <= value:
        return 0.0
    while falling(high) > value:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > value else (low, middle)
    return high


def one_step(noise: float, rate: float, towards: int) -> tuple[Float64, Float64]:
    """Privacy loss of a step, and its probability: of a patient who is there (towards = 1) or who is not (-1)."""
    x = np.linspace(-14 * noise, 1 + 14 * noise, 2**19)
    without = np.exp(-(x**2) / (2 * noise**2))
    with_one = (1 - rate) * without + rate * np.exp(-((x - 1) ** 2) / (2 * noise**2))
    # log(1 - q + q exp(...)) without overflow
    loss = np.logaddexp(math.log1p(-rate) if rate < 1 else -np.inf, math.log(rate) + (2 * x - 1) / (2 * noise**2))
    weight = with_one if towards == 1 else without
    return towards * loss, weight / weight.sum()


def integrated(events: list[tuple[float, float, int]], delta: float, width: float = 2e-4) -> float:
    """ε of (noise, rate, steps) composed, with patients added or removed: the larger of both directions."""
    found = []
    for towards in (1, -1):
        mean = deviation = 0.0
        steps = []
        for noise, rate, count in events:
            loss, weight = one_step(noise, rate, towards)
            mean += count * float(loss @ weight)
            deviation += count * float((loss**2) @ weight)
            steps.append((loss, weight, count))
        reach = abs(mean) + 20 * math.sqrt(deviation) + max(float(abs(loss).max()) for loss, _, _ in steps)
        size = 1 << math.ceil(math.log2(2 * reach / width))
        spectrum = np.ones(size // 2 + 1, complex)
        for loss, weight, count in steps:
            places = np.floor(loss / width).astype(np.int64)
            upper = loss / width - places  # shared between two neighbours, so that the mean stays
            grid = np.bincount(places % size, weight * (1 - upper), size)
            grid += np.bincount((places + 1) % size, weight * upper, size)
            spectrum *= np.fft.rfft(grid) ** count
        mass = np.roll(np.fft.irfft(spectrum, size), size // 2)
        losses = (np.arange(size) - size // 2) * width

        def spent_delta(spent: float, mass: Float64 = mass, losses: Float64 = losses) -> float:
            above = losses > spent
            return float(-np.expm1(spent - losses[above]) @ mass[above])

        found.append(root(spent_delta, delta))
    return max(found)


def direct(events: list[dp_event.DpEvent], delta: float = DELTA, interval: float = COARSE) -> float:
    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, interval)
    for event in events:
        accountant.compose(event)
    return float(accountant.get_epsilon(delta))


def as_dp_event(event: PrivacyEvent) -> dp_event.DpEvent:
    """What dp-accounting calls it. A set of one patient more is the larger of two neighbours."""
    if event.batch_max is not None and event.patients is not None:
        step = dp_event.TruncatedSubsampledGaussianDpEvent(
            event.patients + 1, event.sampling_rate, event.batch_max, event.noise_multiplier
        )
    elif event.sampling_rate == 1:
        step = dp_event.GaussianDpEvent(event.noise_multiplier)
    else:
        step = dp_event.PoissonSampledDpEvent(event.sampling_rate, dp_event.GaussianDpEvent(event.noise_multiplier))
    return dp_event.SelfComposedDpEvent(step, event.steps)


# The oracles against each other --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (3.0, 1), (0.5, 1), (20.0, 100)])
def test_the_integration_gives_the_closed_form_of_the_gaussian_mechanism(noise: float, steps: int) -> None:
    exact = root(lambda spent: gaussian_delta(spent, noise / math.sqrt(steps)), DELTA)
    assert integrated([(noise, 1.0, steps)], DELTA) == pytest.approx(exact, rel=2e-4)


def test_the_closed_form_gives_the_known_epsilon_of_one_gaussian() -> None:
    """Integral of (p - exp(ε) q)+ over a fine grid, the definition itself."""
    x = np.linspace(-15, 16, 2**20)
    with_one, without = (np.exp(-((x - shift) ** 2) / 2) / math.sqrt(2 * math.pi) for shift in (1, 0))
    for spent in (0.0, 0.5, 2.0, 4.0):
        mass = np.maximum(with_one - math.exp(spent) * without, 0).sum() * (x[1] - x[0])
        assert gaussian_delta(spent, 1.0) == pytest.approx(mass, rel=1e-6)


# ε -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize(
    "event",
    [
        USUAL,
        PrivacyEvent(1.72, 0.25, 100),
        PrivacyEvent(20.0, 1.0, 40),
        PrivacyEvent(4.0, 0.01, 3000),
        PrivacyEvent(3.0, 0.1, 20, batch_max=110, patients=1000),
    ],
    ids=str,
)
def test_epsilon_is_that_of_dp_accounting(event: PrivacyEvent, fine: bool) -> None:
    oracle = direct([as_dp_event(event)], interval=FINE if fine else COARSE)
    assert epsilon([event], DELTA, fine=fine) == pytest.approx(oracle, abs=1e-6)


def test_epsilon_of_different_events_is_that_of_dp_accounting() -> None:
    events = [USUAL, PrivacyEvent(2.0, 0.1, 50), PrivacyEvent(8.0, 1.0, 10), PrivacyEvent(2.0, 0.1, 20, 150, 1000)]
    assert epsilon(events, DELTA) == pytest.approx(direct([as_dp_event(event) for event in events]), abs=1e-6)


@pytest.mark.parametrize(
    "event",
    [USUAL, PrivacyEvent(0.8, RATE, STEPS), PrivacyEvent(1.72, 0.25, 100), PrivacyEvent(0.6, 0.01, 200)],
    ids=str,
)
def test_epsilon_is_that_of_an_independent_integration(event: PrivacyEvent) -> None:
    own = integrated([(event.noise_multiplier, event.sampling_rate, event.steps)], DELTA)
    assert own * (1 - 1e-4) <= epsilon([event], DELTA) <= own * 1.01


def test_epsilon_of_different_events_is_that_of_an_independent_integration() -> None:
    parts = [(1.0, RATE, 300), (2.0, 0.2, 100), (8.0, 1.0, 10)]
    spent = epsilon([PrivacyEvent(*part) for part in parts], DELTA)
    own = integrated(parts, DELTA)
    assert own * (1 - 1e-4) <= spent <= own * 1.01


@pytest.mark.parametrize(
    ("noise", "of_losses", "by_renyi"),
    [(0.8, 13.585, 14.962), (0.9, 10.428, 11.421), (1.0, 8.408, 9.180), (1.1, 7.030, 7.664), (1.2, 6.039, 6.576)],
)
def test_known_figures_of_dp_sgd(noise: float, of_losses: float, by_renyi: float) -> None:
    """q = 0.032, 1562 steps, δ = 1e-5; found beforehand with dp-accounting 0.6, by both of its accountants."""
    event = PrivacyEvent(noise, RATE, STEPS)
    assert epsilon([event], DELTA) == pytest.approx(of_losses, abs=2e-3)
    assert epsilon_rdp([event], DELTA) == pytest.approx(by_renyi, abs=2e-3)


@pytest.mark.parametrize(("noise", "expected"), [(0.8, 13.7), (1.0, 8.46), (1.2, 6.06)])
def test_known_figures_of_truncated_batches(noise: float, expected: float) -> None:
    """At most 96 of 2000 patients in a step, where 64 are expected."""
    spent = epsilon([PrivacyEvent(noise, RATE, STEPS, batch_max=96, patients=2000)], DELTA)
    assert round(spent, 1 if noise == 0.8 else 2) == pytest.approx(expected, abs=1e-9)
    assert spent > epsilon([PrivacyEvent(noise, RATE, STEPS)], DELTA)


@pytest.mark.parametrize(("runs", "expected"), [(1, 8.4), (2, 12.5), (5, 22.1), (10, 34.9), (20, 56.9)])
def test_known_figures_of_several_runs(runs: int, expected: float) -> None:
    assert round(epsilon([USUAL] * runs, DELTA), 1) == expected


@pytest.mark.slow
def test_drawing_images_in_place_of_patients_costs_more_than_twice_as_much() -> None:
    """A patient with two images that are drawn apart has the mixture of 0, 1 or 2 of them in a step."""
    drawn = [(1 - RATE) ** 2, 2 * RATE * (1 - RATE), RATE**2]
    step = dp_event.MixtureOfGaussiansDpEvent(1.0, [0, 1, 2], drawn)
    per_image = direct([dp_event.SelfComposedDpEvent(step, STEPS)])
    assert round(per_image, 1) == 19.9
    assert round(epsilon([USUAL], DELTA), 1) == 8.4


def test_renyi_is_an_upper_bound_not_far_above() -> None:
    for event in (USUAL, PrivacyEvent(1.72, 0.25, 100), PrivacyEvent(4.0, 0.05, 500), PrivacyEvent(9.0, 1.0, 30)):
        spent = epsilon([event], DELTA)
        assert spent < epsilon_rdp([event], DELTA) < 1.15 * spent
    both = [USUAL, PrivacyEvent(2.0, 0.1, 50)]
    assert epsilon(both, DELTA) < epsilon_rdp(both, DELTA) < 1.15 * epsilon(both, DELTA)


def test_renyi_takes_a_cap_for_the_chance_of_meeting_it() -> None:
    rare = replace(USUAL, batch_max=135, patients=2000)
    assert epsilon([rare], DELTA) < epsilon_rdp([rare], DELTA) < 1.15 * epsilon([rare], DELTA)
    assert epsilon_rdp([USUAL], DELTA) < epsilon_rdp([rare], DELTA)
    with pytest.raises(PrivacyError):
        epsilon_rdp([replace(USUAL, batch_max=96, patients=2000)], DELTA)


def test_renyi_says_nothing_on_the_console(caplog: pytest.LogCaptureFixture) -> None:
    """dp-accounting warns of each order that does not converge; it is left out, and that is all."""
    with caplog.at_level(logging.WARNING):
        epsilon_rdp([PrivacyEvent(1.72, 0.25, 100)], DELTA)
    assert caplog.text == ""


def test_the_fine_answer_is_the_lower_one() -> None:
    for event in (PrivacyEvent(1.72, 0.25, 20), PrivacyEvent(4.0, 0.01, 3000)):
        coarse, fine = epsilon([event], DELTA), epsilon([event], DELTA, fine=True)
        own = integrated([(event.noise_multiplier, event.sampling_rate, event.steps)], DELTA, 5e-5)
        assert own * (1 - 1e-4) <= fine < coarse <= 1.02 * own


def test_nothing_happened_is_no_epsilon() -> None:
    assert epsilon([], DELTA) == epsilon([], DELTA, fine=True) == epsilon_rdp([], DELTA) == 0.0


def test_every_round_counts_however_it_is_told() -> None:
    """Pitfall 2: an accountant that begins anew in each round. Single steps, rounds and the whole are one and the same."""
    whole = PrivacyEvent(2.0, 0.1, 60)
    rounds, single = [replace(whole, steps=3)] * 20, [replace(whole, steps=1)] * 60
    assert epsilon([whole], DELTA) == epsilon(rounds, DELTA) == epsilon(single, DELTA)
    assert epsilon_rdp([whole], DELTA) == pytest.approx(epsilon_rdp(rounds, DELTA))
    assert epsilon([whole], DELTA) > 3 * epsilon([replace(whole, steps=3)], DELTA)


def test_the_order_of_events_does_not_matter() -> None:
    events = [
        PrivacyEvent(2.0, 0.1, 5, delta_extra=1e-9),
        PrivacyEvent(2, 0.1, 7, batch_max=30, patients=100, delta_extra=1e-12),
        PrivacyEvent(3.0, 1.0, 2, delta_extra=3e-8),
        PrivacyEvent(2.0, 0.1, 1, batch_max=31, patients=100),
        PrivacyEvent(1.5, 0.2, 9),
    ]
    expected = epsilon(events, DELTA)
    for seed in range(5):
        random.Random(seed).shuffle(events)
        accounting._epsilon.cache_clear()
        assert epsilon(events, DELTA) == expected


def test_caps_of_different_sizes_stay_different_events() -> None:
    """Merging must not forget the tighter cap, nor the number of patients that it is for."""
    loose, tight = (PrivacyEvent(2.0, 0.1, 50, batch_max=cap, patients=100) for cap in (60, 12))
    larger = replace(tight, patients=120)
    assert epsilon([tight], DELTA) > epsilon([loose], DELTA) + 0.01
    assert epsilon([larger], DELTA) != epsilon([tight], DELTA)
    both = direct([as_dp_event(loose), as_dp_event(tight)])
    assert epsilon([loose, tight], DELTA) == epsilon([tight, loose], DELTA) == pytest.approx(both, abs=1e-6)


def test_a_cap_that_leaves_nobody_out_is_none() -> None:
    free = PrivacyEvent(2.0, 0.5, 10)
    assert epsilon([replace(free, batch_max=20, patients=20)], DELTA) == epsilon([free], DELTA)
    everybody = PrivacyEvent(9.0, 1.0, 10)
    assert epsilon([replace(everybody, batch_max=50, patients=50)], DELTA) == epsilon([everybody], DELTA)
    assert epsilon([replace(everybody, batch_max=25, patients=50)], DELTA) > epsilon([everybody], DELTA) / 2


few_steps = st.builds(
    PrivacyEvent, st.floats(0.6, 20), st.one_of(st.just(1.0), st.floats(0.01, 0.9)), st.integers(1, 300)
)


@settings(max_examples=15, deadline=None)
@given(few_steps, st.integers(1, 50), st.floats(1.05, 2))
def test_epsilon_grows_with_steps_and_rate_and_falls_with_noise(event: PrivacyEvent, more: int, factor: float) -> None:
    spent = epsilon([event], DELTA)
    assert epsilon([replace(event, steps=event.steps + more)], DELTA) > spent
    assert epsilon([replace(event, noise_multiplier=event.noise_multiplier * factor)], DELTA) < spent
    if event.sampling_rate * factor <= 1:
        assert epsilon([replace(event, sampling_rate=event.sampling_rate * factor)], DELTA) > spent
    assert epsilon([event], DELTA / factor) > spent


@settings(max_examples=10, deadline=None)
@given(st.lists(few_steps, min_size=1, max_size=4), few_steps)
def test_one_event_more_never_costs_less(before: list[PrivacyEvent], more: PrivacyEvent) -> None:
    """Even where the grid of losses gets wider between the two."""
    assert epsilon([*before, more], DELTA) >= epsilon(before, DELTA)


def test_two_thousand_orders_of_twenty_studies_are_twenty_mechanisms(monkeypatch: pytest.MonkeyPatch) -> None:
    """And asked again after one more order, nineteen of them are still there."""
    made: list[float] = []
    original = pld.from_gaussian_mechanism

    def counted(noise: float, **more: Any) -> Any:
        made.append(noise)
        return original(noise, **more)

    monkeypatch.setattr(pld, "from_gaussian_mechanism", counted)
    for cache in (accounting._epsilon, accounting._composed, accounting._one_step):
        cache.cache_clear()
    orders = [PrivacyEvent(5 + study / 10, 0.1, 1, delta_extra=1e-25) for study in range(20) for _ in range(100)]
    spent = epsilon(orders, DELTA)
    assert len(made) == 20
    assert epsilon([*orders, orders[0]], DELTA) > spent and len(made) == 20
    assert epsilon([*orders, PrivacyEvent(9.0, 0.1, 1)], DELTA) > spent and len(made) == 21


@pytest.mark.parametrize(
    "event",
    [
        PrivacyEvent(0.05, 1.0, 1000),
        PrivacyEvent(0.05, 1e-9, 10**8),
        PrivacyEvent(10_000.0, 0.5, 10**8),
        PrivacyEvent(0.1, 0.5, 10**6, batch_max=3, patients=10**9),
    ],
    ids=str,
)
def test_what_costs_too_much_to_compute_is_without_bound_at_once(
    event: PrivacyEvent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A study that a coordinator sends must not occupy a hospital's machine for hours."""
    monkeypatch.setattr(pld, "from_gaussian_mechanism", None)
    assert epsilon([event], DELTA) == epsilon([event], DELTA, fine=True) == math.inf
    assert epsilon([USUAL, event], DELTA) == math.inf


@pytest.mark.parametrize("event", [PrivacyEvent(0.05, 0.5, 1), PrivacyEvent(0.3, 0.3, 20), PrivacyEvent(0.4, 1.0, 30)])
def test_large_losses_lie_on_a_wider_grid_and_epsilon_is_not_below_the_truth(event: PrivacyEvent) -> None:
    own = integrated([(event.noise_multiplier, event.sampling_rate, event.steps)], DELTA, 2e-3)
    assert own * (1 - 1e-4) <= epsilon([event], DELTA) <= own * 1.001


# Floating-point numbers, and δ that errors take ----------------------------------------------------------------------


@pytest.mark.parametrize(("noise", "steps"), [(30.0, 1000), (60.0, 10_000), (1500.0, 1_000_000)])
def test_fourier_transforms_are_never_further_below_the_truth_than_is_taken_off(noise: float, steps: int) -> None:
    """Against the closed form, far out where the rounding upwards does not hide them."""
    losses = pld.from_gaussian_mechanism(noise, value_discretization_interval=COARSE).self_compose(steps)
    single = noise / math.sqrt(steps)
    for mass in (1e-5, 1e-9, 1e-11, 1e-13):
        spent = root(lambda x: gaussian_delta(x, single), mass)
        assert losses.get_delta_for_epsilon(spent) >= gaussian_delta(spent, single) - FLOAT_ERROR * steps / 4


def test_what_floating_point_numbers_cannot_know_is_taken_off_delta() -> None:
    many = PrivacyEvent(60.0, 0.1, 100_000)
    without, taken = (direct([as_dp_event(many)], 1e-8 - off) for off in (0, FLOAT_ERROR * 100_000))
    assert taken > without + 5e-4 and epsilon([many], 1e-8) == pytest.approx(taken, abs=2e-4)


def test_a_delta_below_what_floating_point_numbers_know_has_no_epsilon() -> None:
    assert epsilon([PrivacyEvent(10.0, 0.1, 10_000)], 1e-12) == math.inf
    assert epsilon([PrivacyEvent(10.0, 0.1, 10_000)], 1e-9) < math.inf


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, 2.0, math.nan, math.inf])
def test_a_delta_that_is_no_probability_is_refused(delta: float) -> None:
    for ask in (epsilon, epsilon_rdp, statements):
        with pytest.raises(PrivacyError, match="δ"):
            ask([USUAL] if ask is not statements else USUAL, delta)  # type: ignore[operator]
    for ask in (lambda: epsilon([], delta), lambda: selection_epsilon(USUAL, delta, 10)):
        with pytest.raises(PrivacyError, match="δ"):
            ask()
    with pytest.raises(PrivacyError, match="δ"):
        noise_for(1.0, delta, sampling_rate=0.1, steps=10)


@settings(max_examples=100, deadline=None)
@given(st.floats(0.51, 0.999), st.floats(1e-6, 0.2), st.floats(1e-12, 0.1))
@example(0.9, 1e-3, 3e-5)
def test_draws_that_are_off_by_an_error_cost_what_the_worst_such_draws_cost(
    p: float, delta: float, part: float
) -> None:
    """Randomised response of one bit, whose worst disturbance can be written down: both coins are moved by the error, apart.

    Truth 1 is told with probability p + error and 0 as 1 with 1 - p - error. Then exp(ε) is (p + error - δ) / (1 - p - error).
    """
    error = part * min(delta, 1 - p)

    def answer(left: float) -> float:
        return max(0.0, math.log((p - left) / (1 - p))) if p > left else 0.0

    truth = max(0.0, math.log(max((p + error - delta) / (1 - p - error), 1e-300)))
    try:
        found = accounting._with_errors(answer, delta, error)
    except PrivacyError:
        # Refused only if a tenth of δ is not enough for the error, at an ε for the other nine.
        assert error * (1 + math.exp(answer(delta / 10))) > 0.9 * delta
    else:
        assert found >= truth - 1e-9
        if error * (1 + math.exp(truth)) < 1e-7 * delta:
            assert found <= truth + 2e-6 * (1 + delta / max(p - delta, 1e-9))


@pytest.mark.parametrize("error", [1e-30, 1e-12, 1e-9, 1e-8, 3e-8])
def test_an_error_of_the_draws_takes_delta_for_data_with_the_patient_and_without(error: float) -> None:
    noise = 1.2
    found = epsilon([PrivacyEvent(noise, 1.0, 1, delta_extra=error)], DELTA)

    def disturbed(spent: float) -> float:
        return gaussian_delta(spent, noise) + (1 + math.exp(spent)) * error

    assert disturbed(found) <= DELTA
    least = root(disturbed, DELTA)
    assert least <= found <= least + (0.3 if error > 1e-9 else 0.03)
    if error >= 1e-9:
        only_once = root(lambda spent: gaussian_delta(spent, noise), DELTA - error)
        assert found > only_once + 1e-3, "the error was taken off δ once only"


def test_errors_of_all_events_add_up() -> None:
    parts = [PrivacyEvent(3.0, 1.0, 1, delta_extra=2e-9)] * 4
    together = epsilon([PrivacyEvent(3.0, 1.0, 4, delta_extra=8e-9)], DELTA)
    assert epsilon(parts, DELTA) == together > epsilon([PrivacyEvent(3.0, 1.0, 4)], DELTA)


def test_errors_that_use_delta_up_are_refused() -> None:
    for error in (DELTA, DELTA / 2, 1e-6, 1.0):
        for ask in (
            lambda e=error: epsilon([replace(USUAL, delta_extra=e)], DELTA),
            lambda e=error: epsilon_rdp([replace(USUAL, delta_extra=e)], DELTA),
            lambda e=error: selection_epsilon(replace(USUAL, delta_extra=e), DELTA, 10),
        ):
            with pytest.raises(PrivacyError, match="nothing is left"):
                ask()
    with pytest.raises(PrivacyError, match="nothing is left"):
        epsilon([PrivacyEvent(9.0, 1.0, 1, delta_extra=DELTA / 3)] * 3, DELTA)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 19), st.integers(0, 40))
def test_a_full_batch_is_never_thought_rarer_than_it_is(patients: int, twentieths: int, batch_max: int) -> None:
    """Oracle: the binomial tail in exact rational numbers."""
    rate = Fraction(twentieths, 20)
    tail = sum(
        math.comb(patients, drawn) * rate**drawn * (1 - rate) ** (patients - drawn)
        for drawn in range(batch_max + 1, patients + 1)
    )
    assert float(tail) * (1 - 1e-9) <= overflow(patients, float(rate), batch_max) <= 1.0


# A discrete Gaussian as a Gaussian -----------------------------------------------------------------------------------


def discrete_delta(spent: float, sigma: float, shift: int) -> float:
    """Sum of (p(x - shift) - exp(ε) p(x))+ over the whole numbers, p the discrete Gaussian: the definition."""
    reach = math.ceil(14 * sigma) + shift
    x = np.arange(-reach, reach + shift + 1, dtype=np.float64)
    density = np.exp(-(x**2) / (2 * sigma**2))
    moved = np.exp(-((x - shift) ** 2) / (2 * sigma**2))
    return float(np.maximum(moved - math.exp(spent) * density, 0).sum() / density.sum())


@pytest.mark.parametrize("noise", [0.3, 1.0, 1.7])
def test_a_discrete_gaussian_on_the_grid_in_use_is_a_gaussian_to_a_billionth(noise: float) -> None:
    asked = [0.0, 0.3 / noise, 1 / noise, 3 / noise, 5 / noise]

    def off(bits: int) -> float:
        return max(abs(discrete_delta(e, noise * 2**bits, 2**bits) - gaussian_delta(e, noise)) for e in asked)

    coarse, middle, used = off(3), off(9), off(GRID_BITS)
    assert used < 1e-9 < middle < coarse, "differs visibly on a coarse grid, and no more on the one in use"


@settings(max_examples=60, deadline=None)
@given(st.floats(0.3, 4), st.integers(3, 9), st.floats(0, 12))
def test_a_discrete_gaussian_gives_away_no_more_than_the_slightly_smaller_gaussian(
    noise: float, bits: int, spent: float
) -> None:
    """On grids so coarse that it gives away more than the Gaussian of its own σ: the bound has to carry weight."""
    sigma = noise * 2**bits
    if sigma > 4:
        smaller = math.sqrt(sigma**2 - 9) / 2**bits
        assert discrete_delta(spent, sigma, 2**bits) <= gaussian_delta(spent, smaller) + 1e-14


def test_on_a_coarse_grid_the_gaussian_of_the_same_width_would_be_too_little() -> None:
    found = [discrete_delta(e, 8.0, 8) - gaussian_delta(e, 1.0) for e in np.linspace(0.03, 4.7, 50)]
    assert max(found) > 1e-5


def test_in_several_dimensions_a_discrete_gaussian_gives_away_no_more_either() -> None:
    """All whole numbers of three dimensions, moved by (3, 4, 12), which is 13 long."""
    sigma, moved = 9.0, (3, 4, 12)
    axes = [np.arange(-80 + shift // 2, 81 + shift // 2, dtype=np.float64) for shift in moved]
    parts = [np.exp(-(x**2) / (2 * sigma**2)) for x in axes]
    density = parts[0][:, None, None] * parts[1][None, :, None] * parts[2][None, None, :]
    total = math.prod(float(np.exp(-(np.arange(-150, 151) ** 2) / (2 * sigma**2)).sum()) for _ in moved)
    exponent = sum(
        np.reshape(x * shift - shift**2 / 2, [-1 if place == n else 1 for n in range(3)])
        for place, (x, shift) in enumerate(zip(axes, moved, strict=True))
    )
    for spent in (0.0, 0.5, 1.0, 2.0, 4.0, 6.0):
        found = float((np.maximum(np.exp(exponent / sigma**2) - math.exp(spent), 0) * density).sum()) / total
        assert found <= gaussian_delta(spent, math.sqrt(sigma**2 - 9) / 13) + 1e-9


def test_events_are_accounted_for_with_the_slightly_smaller_noise() -> None:
    """It shows at the least noise there is, and nowhere else."""
    noise = 0.05
    own = direct([dp_event.GaussianDpEvent(math.sqrt(noise**2 - 9 / 4**GRID_BITS))], interval=0.016)
    assert epsilon([PrivacyEvent(noise, 1.0, 1)], DELTA) == pytest.approx(own, abs=1e-9)
    assert own > direct([dp_event.GaussianDpEvent(noise)], interval=0.016) + 1e-5


# Noise for a target --------------------------------------------------------------------------------------------------


def site_epsilon(target: float, rate: float, steps: int, patients: int) -> float:
    """The coarse ε that a site finds, order by order, with its caps and its sampler's error for 7 million values."""
    noise = noise_for(target, DELTA, sampling_rate=rate, steps=steps)
    cap = Privacy(epsilon=target, clip_norm=1.0, sampling_rate=rate).batch_max(patients)
    order = PrivacyEvent(noise, rate, 1, batch_max=cap, patients=patients, delta_extra=7e6 * 1e-30)
    return epsilon([order] * steps, DELTA)


SOME = [
    (8.0, 0.25, 100, 2000), (1.0, 0.01, 3000, 5000), (0.5, 0.5, 500, 50), (10.0, 0.03, 20, 700),
    (3.0, 0.1, 1562, 300), (2.0, 1.0, 100, 50), (4.0, 0.9, 20, 5000),
]  # fmt: skip


@pytest.mark.parametrize(("target", "rate", "steps", "patients"), SOME)
def test_noise_for_a_target_keeps_it_with_all_that_a_site_alone_knows(
    target: float, rate: float, steps: int, patients: int
) -> None:
    assert 0.995 * target < site_epsilon(target, rate, steps, patients) <= target


@pytest.mark.slow
@pytest.mark.parametrize("target", [0.5, 1.0, 2.0, 4.0, 8.0, 10.0])
@pytest.mark.parametrize("rate", [0.01, 0.032, 0.1, 0.25, 0.5, 1.0])
def test_noise_for_any_usual_target_keeps_it(target: float, rate: float) -> None:
    for steps in (20, 100, 500, 1562, 3000):
        for patients in (50, 200, 1000, 5000):
            assert 0.99 * target < site_epsilon(target, rate, steps, patients) <= target


@pytest.mark.parametrize(("target", "rate", "steps"), [(one, two, three) for one, two, three, _ in SOME])
def test_noise_for_a_target_is_the_least_and_found_in_a_few_tries(
    target: float, rate: float, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A try takes a tenth of a second at most, so eight are under a second."""
    tries = []

    def counted(events: list[PrivacyEvent], *more: Any, **named: Any) -> float:
        tries.append(events)
        return epsilon(events, *more, **named)

    monkeypatch.setattr(accounting, "epsilon", counted)
    noise = noise_for(target, DELTA, sampling_rate=rate, steps=steps)
    assert len(tries) <= 8
    assert noise == round(noise, 4)
    assert epsilon([PrivacyEvent(noise, rate, steps)], DELTA) <= target * (1 - 0.99e-4), "no room for what sites know"
    assert epsilon([PrivacyEvent(noise * 0.997, rate, steps)], DELTA) > target


@pytest.mark.parametrize(
    ("target", "noise"), [(1, 4.83), (2, 2.66), (3, 1.93), (5, 1.35), (8, 1.03)]
)  # 50 passes over 2000 patients, 64 a step
def test_known_noises(target: float, noise: float) -> None:
    assert noise_for(target, DELTA, sampling_rate=RATE, steps=STEPS) == pytest.approx(noise, rel=0.006)


@pytest.mark.parametrize("target", [0.0, -1.0, math.nan, math.inf])
def test_there_is_noise_for_positive_targets_only(target: float) -> None:
    with pytest.raises(PrivacyError):
        noise_for(target, DELTA, sampling_rate=0.1, steps=10)


@pytest.mark.parametrize(("rate", "steps"), [(0.0, 10), (1.1, 10), (math.nan, 10), (-0.1, 10), (0.1, 0), (0.1, -1)])
def test_noise_for_what_cannot_happen_is_refused(rate: float, steps: int) -> None:
    with pytest.raises(PrivacyError):
        noise_for(1.0, DELTA, sampling_rate=rate, steps=steps)


def test_where_no_noise_is_enough_or_the_least_is_that_is_said() -> None:
    with pytest.raises(PrivacyError, match="no noise"):
        noise_for(1e-4, DELTA, sampling_rate=1.0, steps=10**6)
    assert noise_for(1e3, DELTA, sampling_rate=0.1, steps=1) == pytest.approx(0.05, abs=2e-4)


# Trying settings on private data -------------------------------------------------------------------------------------


def test_a_selection_costs_what_dp_accounting_says_and_far_less_than_ten_runs() -> None:
    accountant = RdpAccountant(neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)
    accountant.compose(dp_event.RepeatAndSelectDpEvent(as_dp_event(USUAL), mean=10, shape=1.0))
    selected = selection_epsilon(USUAL, DELTA, 10)
    assert selected == pytest.approx(accountant.get_epsilon(DELTA), abs=1e-6)
    assert epsilon_rdp([USUAL], DELTA) < selected and 13 < selected < 15
    assert round(epsilon([USUAL] * 10, DELTA), 1) == 34.9


def test_a_selection_among_more_costs_more_and_multiplies_the_errors_of_a_try() -> None:
    assert selection_epsilon(USUAL, DELTA, 5) < selection_epsilon(USUAL, DELTA, 20)
    off = replace(USUAL, delta_extra=1e-13)
    assert selection_epsilon(USUAL, DELTA, 10) < selection_epsilon(off, DELTA, 10)
    # Of ten tries on average, one is off with ten times the probability: 1e-13 is as much as 1e-12 would be for one try.
    answer = {error: selection_epsilon(replace(USUAL, delta_extra=error), DELTA, 10) for error in (1e-15, 1e-14, 1e-13)}
    for error, found in answer.items():
        alone = RdpAccountant(neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)
        alone.compose(dp_event.RepeatAndSelectDpEvent(as_dp_event(USUAL), mean=10, shape=1.0))
        assert found >= alone.get_epsilon(DELTA - (1 + math.exp(found)) * 10 * error) - 1e-6
    capped = replace(USUAL, batch_max=160, patients=2000)
    assert selection_epsilon(capped, DELTA, 10) >= selection_epsilon(USUAL, DELTA, 10)


@pytest.mark.parametrize("tries", [1, 0.5, 0, -3, math.nan, math.inf, True])
def test_a_selection_has_more_than_one_try(tries: float) -> None:
    with pytest.raises(PrivacyError):
        selection_epsilon(USUAL, DELTA, tries)
