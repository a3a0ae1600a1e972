"""Intervals against scipy, against published figures, against the formula of the paper in loops, and by how often they cover."""

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import roc_auc_score

from models import intervals
from models.intervals import bootstrap_interval, clustered_auroc, clustered_interval, difference, on_logit_scale, wilson

UNHURRIED = settings(max_examples=60, deadline=None)

Float = NDArray[np.float64]
Int = NDArray[np.int64]
Data = tuple[Float, Float, Int]


def made(seed: int, patients: int = 25, images: int = 4, decimals: int = 1) -> Data:
    """(scores, labels, patients): several images of a patient, of both classes, with ties and scores alike within her."""
    rng = np.random.default_rng(seed)
    whose = np.repeat(np.arange(patients), rng.integers(1, images + 1, patients))
    labels = (rng.random(len(whose)) < 0.45).astype(float)
    scores = rng.normal(size=patients)[whose] + rng.normal(size=len(whose)) + labels
    return scores.round(decimals), labels, whose


def won(positive: float, negative: float) -> Fraction:
    return Fraction(2 if positive > negative else 1 if positive == negative else 0, 2)


def obuchowski(scores: Float, labels: Float, whose: Int) -> tuple[float, float]:
    """(AUROC, variance) as Obuchowski 1997 writes them, pair by pair and patient by patient, in exact fractions."""
    positives = [(s, w) for s, y, w in zip(scores, labels, whose, strict=True) if y == 1]
    negatives = [(s, w) for s, y, w in zip(scores, labels, whose, strict=True) if y == 0]
    m, n = len(positives), len(negatives)
    v10 = [(sum((won(x, y) for y, _ in negatives), Fraction(0)) / n, w) for x, w in positives]
    v01 = [(sum((won(x, y) for x, _ in positives), Fraction(0)) / m, w) for y, w in negatives]
    theta = sum((v for v, _ in v10), Fraction(0)) / m
    i10, i01, everyone = len({w for _, w in positives}), len({w for _, w in negatives}), len(set(whose.tolist()))
    s10 = s01 = s11 = Fraction(0)
    for patient in set(whose.tolist()):
        above = sum((v - theta for v, w in v10 if w == patient), Fraction(0))
        below = sum((v - theta for v, w in v01 if w == patient), Fraction(0))
        s10, s01, s11 = s10 + above**2, s01 + below**2, s11 + above * below
    s10, s01 = s10 * Fraction(i10, (i10 - 1) * m), s01 * Fraction(i01, (i01 - 1) * n)
    s11 *= Fraction(everyone, everyone - 1)
    return float(theta), float(max(Fraction(0), s10 / m + s01 / n + 2 * s11 / (m * n)))


def delong(scores: Float, labels: Float) -> float:
    wins = np.array([[float(won(p, n)) for n in scores[labels == 0]] for p in scores[labels == 1]])
    return float(wins.mean(axis=1).var(ddof=1) / wins.shape[0] + wins.mean(axis=0).var(ddof=1) / wins.shape[1])


# Shares and differences ----------------------------------------------------------------------------------------------


@given(st.integers(1, 2000), st.data())
def test_the_interval_of_a_share_is_scipys_wilson_interval(of: int, data: st.DataObject) -> None:
    hits = data.draw(st.integers(0, of))
    expected = stats.binomtest(hits, of).proportion_ci(method="wilson")
    found = wilson(hits, of)
    assert found == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert found is not None and 0 <= found[0] <= hits / of + 1e-12 and hits / of - 1e-12 <= found[1] <= 1


def test_a_share_of_nothing_has_no_interval() -> None:
    assert wilson(0, 0) is None


def test_the_difference_of_two_shares_is_that_of_newcombes_example() -> None:
    """Newcombe 1998, example (a), method 10: 56 of 70 less 48 of 80."""
    first, second = wilson(56, 70), wilson(48, 80)
    assert first is not None and second is not None
    assert difference(0.8, first, 0.6, second) == pytest.approx((0.0524, 0.3339), abs=5e-5)


estimates = st.tuples(st.floats(0, 1), st.floats(0, 0.3), st.floats(0, 0.3))


@given(estimates, estimates)
def test_a_difference_turned_round_is_its_negative_and_holds_the_gap(
    a: tuple[float, float, float], b: tuple[float, float, float]
) -> None:
    (x, x_low, x_high), (y, y_low, y_high) = a, b
    low, high = difference(x, (x - x_low, x + x_high), y, (y - y_low, y + y_high))
    back = difference(y, (y - y_low, y + y_high), x, (x - x_low, x + x_high))
    assert back == pytest.approx((-high, -low))
    assert low <= x - y <= high
    assert (x - y - low) ** 2 == pytest.approx(x_low**2 + y_high**2, abs=1e-9)
    assert (high - (x - y)) ** 2 == pytest.approx(x_high**2 + y_low**2, abs=1e-9)


# The logit scale -----------------------------------------------------------------------------------------------------


@given(st.floats(0.01, 0.99), st.floats(1e-6, 0.05), st.integers(1, 500))
def test_an_interval_is_normal_on_the_logit_scale(area: float, variance: float, cases: int) -> None:
    low, high = on_logit_scale(area, variance, cases)
    assert 0 <= low < area < high <= 1
    half = stats.norm.ppf(0.975) * math.sqrt(variance) / (area * (1 - area))
    middle = math.log(area / (1 - area))
    assert (low, high) == pytest.approx([1 / (1 + math.exp(-middle - sign * half)) for sign in (-1, 1)], abs=1e-9)


@pytest.mark.parametrize("cases", [1, 2, 10, 300])
def test_without_variance_the_interval_is_the_exact_binomial_one_of_no_error(cases: int) -> None:
    exact = stats.binomtest(0, cases).proportion_ci(method="exact").high
    for variance in (0.0, 0.01):
        assert on_logit_scale(1.0, variance, cases) == pytest.approx((1 - exact, 1.0))
        assert on_logit_scale(0.0, variance, cases) == pytest.approx((0.0, exact))
    low, high = on_logit_scale(0.5, 0.0, cases)
    assert (low, high) == pytest.approx((max(0, 0.5 - exact), min(1, 0.5 + exact)))


# Several images of a patient -----------------------------------------------------------------------------------------


@UNHURRIED
@given(st.integers(0, 2**32 - 1), st.integers(5, 25), st.integers(1, 6), st.sampled_from([0, 1, 6]))
def test_the_variance_of_clustered_data_is_obuchowskis(seed: int, patients: int, images: int, decimals: int) -> None:
    scores, labels, whose = made(seed, patients, images, decimals)
    found = clustered_auroc(scores, labels, whose)
    if min(len(set(whose[labels == y].tolist())) for y in (0, 1)) < 2:
        assert found is None and clustered_interval(scores, labels, whose) is None
        return
    assert found == pytest.approx(obuchowski(scores, labels, whose), abs=1e-9)
    assert found is not None and found[0] == pytest.approx(roc_auc_score(labels, scores))


@UNHURRIED
@given(st.integers(0, 2**32 - 1), st.integers(12, 60))
def test_with_one_image_of_each_patient_the_variance_is_delongs(seed: int, patients: int) -> None:
    scores, labels, whose = made(seed, patients, images=1)
    labels[:4] = 0, 1, 0, 1
    found = clustered_auroc(scores, labels, np.random.default_rng(seed).permutation(whose))
    assert found is not None and found[1] == pytest.approx(delong(scores, labels), abs=1e-12)


def test_who_is_who_does_not_matter_and_neither_does_the_order() -> None:
    scores, labels, whose = made(3)
    found = clustered_auroc(scores, labels, whose)
    order = np.random.default_rng(1).permutation(len(scores))
    renamed = np.array([17, 4, 999, *range(30, 60)])[whose]
    assert clustered_auroc(scores[order], labels[order], whose[order]) == pytest.approx(found)
    assert clustered_auroc(scores, labels, renamed) == pytest.approx(found)


def test_every_image_twice_tells_no_more_than_once() -> None:
    scores, labels, whose = made(5, images=1)
    once = clustered_auroc(scores, labels, whose)
    twice = clustered_auroc(np.tile(scores, 2), np.tile(labels, 2), np.tile(whose, 2))
    assert once is not None and twice == pytest.approx(once)
    assert delong(np.tile(scores, 2), np.tile(labels, 2)) < 0.6 * once[1]


@pytest.mark.parametrize(("positives", "negatives"), [([0, 0, 0], [1, 2, 3]), ([1, 2, 3], [0, 0, 0]), ([], [1, 2])])
def test_one_patient_of_a_class_gives_no_variance(positives: list[int], negatives: list[int]) -> None:
    whose = np.array(positives + negatives, np.int64)
    labels = np.array([1.0] * len(positives) + [0.0] * len(negatives))
    assert clustered_auroc(np.linspace(0, 1, len(whose)), labels, whose) is None
    assert clustered_interval(np.linspace(0, 1, len(whose)), labels, whose) is None


def test_perfect_separation_counts_patients_and_not_images() -> None:
    whose = np.repeat(np.arange(9), 10)
    labels = (whose < 4).astype(float)
    assert clustered_interval(labels, labels, whose) == pytest.approx((0.025 ** (1 / 4), 1.0))
    assert clustered_interval(1 - labels, labels, whose) == pytest.approx((0.0, 1 - 0.025 ** (1 / 4)))
    assert clustered_interval(labels, 1 - labels, whose) == pytest.approx((0.0, 1 - 0.025 ** (1 / 4)))


def coverage(interval: Callable[[Data], tuple[float, float] | None], repetitions: int) -> float:
    """Of the true AUROC, where the eight images of a patient are of one class and alike."""
    truth, inside = stats.norm.cdf(1 / math.sqrt(2 * (1 + 0.25))), 0
    for seed in range(repetitions):
        rng = np.random.default_rng(seed)
        whose = np.repeat(np.arange(60), 8)
        labels = (whose % 2).astype(float)
        scores = labels + rng.normal(size=60)[whose] + 0.5 * rng.normal(size=len(whose))
        found = interval((scores, labels, whose))
        assert found is not None
        inside += found[0] <= truth <= found[1]
    return inside / repetitions


def test_intervals_that_count_patients_cover_the_truth_and_those_that_count_images_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(intervals, "RESAMPLES", 200)
    assert 0.915 <= coverage(lambda data: clustered_interval(*data), 300) <= 0.985
    assert 0.88 <= coverage(lambda data: bootstrap_interval(*data, 1), 100) <= 0.99
    images = coverage(lambda data: clustered_interval(data[0], data[1], np.arange(len(data[0]))), 300)
    assert images < 0.75


# The bootstrap -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_the_bootstrap_draws_patients_with_all_their_images(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: scikit-learn on the images of each draw, written out."""
    monkeypatch.setattr(intervals, "RESAMPLES", 80)
    scores, labels, whose = made(seed)
    rng, areas = np.random.default_rng(seed), []
    for _ in range(80):
        drawn = np.concatenate([np.flatnonzero(whose == patient) for patient in rng.integers(25, size=25)])
        areas.append(roc_auc_score(labels[drawn], scores[drawn]))
    expected = [float(np.percentile(areas, end)) for end in (2.5, 97.5)]
    assert bootstrap_interval(scores, labels, whose * 7 + 3, seed) == pytest.approx(expected, abs=1e-12)


def test_the_bootstrap_is_the_same_for_the_same_seed_and_near_the_formula() -> None:
    scores, labels, whose = made(11, patients=120)
    found, formula = bootstrap_interval(scores, labels, whose, 5), clustered_interval(scores, labels, whose)
    assert found == bootstrap_interval(scores, labels, whose, 5)
    assert found != bootstrap_interval(scores, labels, whose, 6)
    assert found == pytest.approx(formula, abs=0.015)


def test_no_bootstrap_where_draws_lack_a_class_or_there_is_nothing() -> None:
    nothing = np.zeros(0)
    assert bootstrap_interval(nothing, nothing, nothing.astype(np.int64), 1) is None
    for positives in (0, 1, 2, 30):
        labels = (np.arange(30) < positives).astype(float)
        # With two of 30, one draw in eight holds neither.
        assert bootstrap_interval(np.linspace(0, 1, 30), labels, np.arange(30), 1) is None
    assert bootstrap_interval(np.linspace(0, 1, 30), (np.arange(30) < 5).astype(float), np.arange(30), 1) is not None


def test_a_share_of_patients_with_one_image_each_has_wilsons_interval() -> None:
    hits = np.array([True] * 30 + [False] * 10)
    found = intervals.clustered_share(hits, np.arange(40))
    assert found == pytest.approx(intervals.wilson(30, 40), abs=0.004)  # n - 1 in the variance, where Wilson has n


def test_images_that_say_the_same_are_worth_one() -> None:
    """Each patient's image ten times over is no more knowledge than once, and images that differ at random are."""
    hits, patients = np.array([True] * 30 + [False] * 10), np.arange(40)
    once = intervals.clustered_share(hits, patients)
    again = intervals.clustered_share(np.repeat(hits, 10), np.repeat(patients, 10))
    assert once is not None and again == pytest.approx(once)
    rng = np.random.default_rng(3)
    free, owner = rng.random(400) < 0.75, np.repeat(patients, 10)
    low, high = intervals.clustered_share(free, owner) or (0, 1)
    assert high - low < 0.6 * (once[1] - once[0])


def test_the_interval_of_a_clustered_share_covers_as_often_as_it_says() -> None:
    """Patients differ in how often they are hit: intervals that count images would cover far less."""
    rng, covered, naive = np.random.default_rng(5), 0, 0
    for _ in range(400):
        own = rng.beta(2, 2, 60)
        hits, patients = rng.random(300) < np.repeat(own, 5), np.repeat(np.arange(60), 5)
        low, high = intervals.clustered_share(hits, patients) or (0, 0)
        covered += low <= 0.5 <= high
        low, high = intervals.wilson(int(hits.sum()), 300) or (0, 0)
        naive += low <= 0.5 <= high
    assert 0.925 <= covered / 400 <= 0.98 and naive / 400 < 0.9


def test_a_share_without_spread_counts_patients() -> None:
    assert intervals.clustered_share(np.ones(50, bool), np.repeat(np.arange(5), 10)) == intervals.wilson(5, 5)
    assert intervals.clustered_share(np.zeros(0, bool), np.zeros(0, int)) is None
    assert intervals.clustered_share(np.array([True, False]), np.zeros(2, int)) == intervals.wilson(0.5, 1)
