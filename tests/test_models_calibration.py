"""Calibration against scikit-learn, against scipy's maximum of the likelihood, and its bounds against raw scores."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import optimize, special, stats
from sklearn.metrics import brier_score_loss

from models.calibration import GROUPS, Calibration, calibration
from models.metrics import ScoreHistogram, bin_of, score_of

UNHURRIED = settings(max_examples=50, deadline=None)

Float = NDArray[np.float64]
SPREADS = [0.01, 0.1, 1.0, 3.0, 6.0, 30.0]
seeds = st.integers(0, 2**32 - 1)


def made(seed: int, spread: float = 1.0, count: int = 300, shift: float | None = None) -> tuple[Float, Float]:
    """(scores, labels), each (N,): overlapping classes somewhere on the axis, from bunched to extreme scores."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(count) < rng.uniform(0.1, 0.9)).astype(float)
    labels[:2] = 0, 1
    middle = rng.normal(0, 2) if shift is None else shift
    return 1 / (1 + np.exp(-spread * (rng.normal(size=count) + labels) - middle)), labels


def histogram(scores: Float, labels: Float, bins: int) -> ScoreHistogram:
    column = labels[:, None]
    return ScoreHistogram.of(scores[:, None], column, np.ones_like(column), bins)


def calibrated(scores: Float, labels: Float, bins: int) -> Calibration:
    with np.errstate(divide="raise", invalid="raise"):
        found = calibration(histogram(scores, labels, bins), 0)
    assert found is not None
    return found


def middles(scores: Float, bins: int) -> Float:
    return np.clip(score_of((bin_of(scores, bins) + 0.5) / bins), 2.0**-24, 1 - 2.0**-24)


def logit(scores: Float) -> Float:
    return np.log(scores / (1 - scores))


def cost(line: Float, labels: Float) -> float:
    """Minus the log likelihood."""
    return float((np.logaddexp(0, line) - labels * line).sum())


def fitted(z: Float, labels: Float) -> tuple[float, float]:
    """(slope, its standard error): scipy's optimum, and the curvature there by differences."""
    centre, unit = z.mean(), z.std()
    scaled = (z - centre) / unit

    def loss(beta: Float) -> float:
        return cost(beta[0] + beta[1] * scaled, labels)

    best = optimize.minimize(loss, np.zeros(2), method="BFGS", options={"gtol": 1e-7}).x
    best = optimize.minimize(loss, best, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12}).x
    h, eye = 1e-3, np.eye(2)
    hessian = np.array(
        [
            [
                sum(a * b * loss(best + h * (a * eye[i] + b * eye[j])) for a in (-1, 1) for b in (-1, 1)) / (4 * h * h)
                for j in range(2)
            ]
            for i in range(2)
        ]
    )
    return float(best[1] / unit), math.sqrt(np.linalg.inv(hessian)[1, 1]) / unit


# Brier score and expected calibration error --------------------------------------------------------------------------


@UNHURRIED
@given(seeds, st.sampled_from(SPREADS), st.integers(10, 1000))
def test_the_brier_score_is_scikit_learns_at_the_middles_of_bins_and_within_its_bound_of_the_raw(
    seed: int, spread: float, bins: int
) -> None:
    scores, labels = made(seed, spread)
    found = calibrated(scores, labels, bins)
    assert found.brier == pytest.approx(brier_score_loss(labels, middles(scores, bins)), abs=2e-7)
    assert abs(found.brier - brier_score_loss(labels, scores)) <= found.brier_bound + 1e-9


def test_the_bounds_are_reached_by_scores_at_the_ends_of_their_bin() -> None:
    """Every score at the far end of its bin, all in one direction for each class."""
    bins, just = 20, 1e-9
    for place in (6, 9, 12):
        low, high = score_of(np.array([place, place + 1]) / bins) + np.array([just, -just])
        labels = np.array([0.0] * 5 + [1.0] * 5)
        found = calibrated(np.where(labels == 1, low, high), labels, bins)
        middle = float(score_of(np.array((place + 0.5) / bins)))
        worst = [brier_score_loss(labels, np.where(labels == 1, a, b)) for a, b in ((low, high), (high, low))]
        assert found.brier_bound >= max(abs(value - found.brier) for value in worst) - 1e-7
        per_class = [max(abs((end - y) ** 2 - (middle - y) ** 2) for end in (low, high)) for y in (0, 1)]
        assert found.brier_bound == pytest.approx(sum(per_class) / 2, abs=1e-7)
        assert found.ece_bound == pytest.approx(max(middle - low, high - middle), abs=1e-7)


def expected_error(scores: Float, labels: Float, groups: NDArray[np.int64]) -> float:
    """By loops: the distance of mean score and share of positives, weighed by images."""
    total = 0.0
    for group in set(groups.tolist()):
        inside = [n for n in range(len(scores)) if groups[n] == group]
        total += abs(sum(scores[n] - labels[n] for n in inside))
    return total / len(scores)


@UNHURRIED
@given(seeds, st.sampled_from(SPREADS), st.integers(10, 1000))
def test_the_calibration_error_is_that_of_its_groups_and_within_its_bound_of_the_raw(
    seed: int, spread: float, bins: int
) -> None:
    """The groups are those of the middles, in tenths of the score."""
    scores, labels = made(seed, spread, count=120)
    found, placed = calibrated(scores, labels, bins), middles(scores, bins)
    groups = np.minimum((placed * 10).astype(np.int64), 9)
    assert found.ece == pytest.approx(expected_error(placed, labels, groups), abs=1e-9)
    assert abs(found.ece - expected_error(scores, labels, groups)) <= found.ece_bound + 1e-9
    rows = iter(found.table)
    for group in sorted(set(groups.tolist())):
        row, inside = next(rows), groups == group
        positives, images = int(labels[inside].sum()), int(inside.sum())
        ends = stats.binomtest(positives, images).proportion_ci(method="wilson")
        assert row["images"] == images and row["observed"] == pytest.approx(positives / images)
        assert row["score"] == pytest.approx(placed[inside].mean())
        assert row["interval"] == pytest.approx([ends.low, ends.high], abs=1e-9)
    assert next(rows, None) is None and GROUPS == 10


def test_bounds_shrink_with_the_width_of_bins() -> None:
    scores, labels = made(1)
    bounds = [calibrated(scores, labels, bins) for bins in (10, 100, 1000)]
    for name in ("brier_bound", "ece_bound"):
        wide, middle, fine = (getattr(found, name) for found in bounds)
        assert wide > 5 * middle > 25 * fine > 0
        assert fine < 2e-3


# Slope and intercept -------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(seeds, st.sampled_from(SPREADS), st.sampled_from([40, 200, 1000]))
def test_the_slope_is_scipys_maximum_of_the_likelihood_with_walds_interval(seed: int, spread: float, bins: int) -> None:
    """Wherever the classes overlap, from bunched scores to extreme ones."""
    scores, labels = made(seed, spread)
    found, z = calibrated(scores, labels, bins), logit(middles(scores, bins))
    present, absent = z[labels == 1], z[labels == 0]
    if present.min() >= absent.max() or absent.min() >= present.max():
        assert found.slope is None
        return
    if min(present.max(), absent.max()) - max(present.min(), absent.min()) < 0.2 * z.std():
        return  # nearly apart: the top of the likelihood is too flat for an oracle by differences
    slope, error = fitted(z, labels)
    assert found.slope == pytest.approx(
        (slope, slope - 1.959964 * error, slope + 1.959964 * error), rel=2e-3, abs=2e-3 * error
    )


@pytest.mark.parametrize(
    ("absent", "present"),
    [
        ({42: 1000, 96: 1000}, {12: 1, 37: 1, 57: 1}),
        ({22: 10_000, 58: 1}, {44: 1, 93: 1000}),
        ({71: 10_000}, {50: 1, 75: 3, 95: 50}),
        ({8: 3, 65: 50, 77: 3}, {67: 1000, 75: 3}),
        ({8: 1000, 34: 50, 64: 1}, {39: 10_000}),
    ],
)
def test_a_few_images_far_on_the_other_side_do_not_lead_the_slope_astray(
    absent: dict[int, int], present: dict[int, int]
) -> None:
    """Full steps of Newton's method diverge for these. Oracle: at the maximum the likelihood has no slope of its own."""
    counts = np.zeros((1, 2, 100), np.int64)
    for label, places in enumerate((absent, present)):
        counts[0, label, list(places)] = list(places.values())
    found = calibration(ScoreHistogram(counts), 0)
    assert found is not None and found.slope is not None
    z = logit(score_of((np.arange(3, 97) + 0.5) / 100))
    negative, positive = counts[0, 0, 3:97], counts[0, 1, 3:97]

    def excess(shift: float) -> Float:
        assert found is not None and found.slope is not None
        wanted: Float = (negative + positive) * special.expit(shift + found.slope[0] * z) - positive
        return wanted

    shift = optimize.brentq(lambda by: float(excess(by).sum()), -500, 500, xtol=1e-13)
    assert float((excess(shift) * z).sum()) == pytest.approx(0, abs=1e-5)


@UNHURRIED
@given(seeds, st.sampled_from(SPREADS), st.integers(10, 1000))
def test_the_intercept_makes_the_mean_score_the_share_of_positives(seed: int, spread: float, bins: int) -> None:
    """Oracle: scipy's root. Wald's interval by the curvature of the likelihood at it."""
    scores, labels = made(seed, spread)
    found, z = calibrated(scores, labels, bins), logit(middles(scores, bins))

    def excess(shift: float) -> float:
        return float((1 / (1 + np.exp(-(z + shift))) - labels).sum())

    shift = optimize.brentq(excess, -60, 60, xtol=1e-12)
    half = 1.959964 / math.sqrt((excess(shift + 1e-4) - excess(shift - 1e-4)) / 2e-4)
    assert found.intercept == pytest.approx((shift, shift - half, shift + half), abs=1e-4, rel=1e-4)


@pytest.mark.parametrize("score", [0.01, 0.07, 0.0759, 0.2, 0.5, 0.9, 0.9241, 0.9999])
def test_scores_all_alike_have_an_intercept_and_no_slope(score: float) -> None:
    """The network that has learnt nothing. Newton's method from 0 goes back and forth for some of these."""
    labels = (np.arange(40) % 2).astype(float)
    found = calibrated(np.full(40, score), labels, 100)
    assert found.slope is None and found.intercept is not None
    assert found.intercept[0] == pytest.approx(-logit(middles(np.array([score]), 100))[0], abs=1e-9)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("touching", [False, True])
def test_classes_that_do_not_overlap_have_no_slope(turned: bool, touching: bool) -> None:
    labels = np.array([0.0] * 10 + [1.0] * 10)
    scores = np.concatenate([np.linspace(0.1, 0.45, 10), np.linspace(0.45 if touching else 0.55, 0.9, 10)])
    found = calibrated(scores, 1 - labels if turned else labels, 50)
    assert found.slope is None and found.intercept is not None
    assert found.to_json()["slope"] == {"value": None, "interval": None}


def test_halved_logits_are_told_by_a_slope_of_two_and_lowered_ones_by_the_intercept() -> None:
    rng = np.random.default_rng(4)
    z = rng.normal(0, 1.5, 40_000)
    labels = (rng.random(40_000) < 1 / (1 + np.exp(-z))).astype(float)
    for scale, lowered in ((1.0, 0.0), (0.5, 0.0), (1.0, 0.7)):
        found = calibrated(1 / (1 + np.exp(-(z * scale - lowered))), labels, 1000)
        assert found.slope is not None and found.intercept is not None
        assert found.slope[0] == pytest.approx(1 / scale, rel=0.05)
        if scale == 1.0:
            assert found.intercept[0] == pytest.approx(lowered, abs=0.04)
            assert (found.ece < 0.02) == (lowered == 0)


def test_intervals_of_slope_and_intercept_hold_what_is_true_about_as_often_as_they_say() -> None:
    slopes = intercepts = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        z = rng.normal(0, 1.5, 250)
        labels = (rng.random(250) < 1 / (1 + np.exp(-z))).astype(float)
        found = calibrated(1 / (1 + np.exp(-z)), labels, 400)
        assert found.slope is not None and found.intercept is not None
        slopes += found.slope[1] <= 1 <= found.slope[2]
        intercepts += found.intercept[1] <= 0 <= found.intercept[2]
    assert 0.91 <= slopes / 300 <= 0.985 and 0.91 <= intercepts / 300 <= 0.985


# The document --------------------------------------------------------------------------------------------------------


def test_without_both_classes_there_is_no_calibration() -> None:
    for label in (0.0, 1.0):
        assert calibration(histogram(np.full(9, 0.4), np.full(9, label), 50), 0) is None
    assert calibration(ScoreHistogram.empty(1, 50), 0) is None


def test_what_is_told_is_json_with_every_figure_under_its_name() -> None:
    found = calibrated(*made(2), 100)
    told = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert found.slope is not None and found.intercept is not None
    assert told["slope"] == {"value": found.slope[0], "interval": list(found.slope[1:])}
    assert told["intercept"] == {"value": found.intercept[0], "interval": list(found.intercept[1:])}
    assert (told["brier"], told["brier_bound"]) == (found.brier, found.brier_bound)
    assert (told["ece"], told["ece_bound"], told["groups"]) == (found.ece, found.ece_bound, 10)
    assert told["table"] == found.table


def test_counts_in_bins_that_no_score_reaches_break_nothing() -> None:
    """Whoever sums is told numbers, not scores: of many bins the outermost hold none, and the logits there have no end."""
    counts = np.zeros((1, 2, 10_000), np.int64)
    counts[0, :, 0] = counts[0, :, -1] = counts[0, :, 5000] = 7
    found = calibration(ScoreHistogram(counts), 0)
    assert found is not None and found.slope is not None and found.intercept is not None
    assert found.slope[0] == pytest.approx(0, abs=1e-9) and found.intercept[0] == pytest.approx(0, abs=1e-3)
    json.dumps(found.to_json(), allow_nan=False)
