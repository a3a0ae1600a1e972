"""Score histograms against scikit-learn, against DeLong by all pairs, and against the histogram of the union."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from sklearn.metrics import (
    average_precision_score,
    brier_score_loss,
    precision_recall_curve,
    roc_auc_score,
    roc_curve,
)

from models.metrics import ScoreHistogram, bin_of, score_of
from privacy.errors import MessageMalformed

BINS = 1000
Float = NDArray[np.float64]


def made_scores(seed: int, count: int = 300, spread: float = 1.0) -> tuple[Float, Float]:
    """(scores, labels), each (N, 1): logits of two overlapping normal distributions."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((count, 1)) < 0.4).astype(float)
    logits = spread * (rng.normal(size=(count, 1)) + 1.2 * labels) + 0.3
    return 1 / (1 + np.exp(-logits)), labels


def histogram(scores: Float, labels: Float, bins: int = BINS) -> ScoreHistogram:
    return ScoreHistogram.of(scores, labels, np.ones_like(labels), bins)


def delong_by_pairs(scores: Float, labels: Float) -> tuple[float, float]:
    """(AUROC, variance) by comparing every positive with every negative, as the paper defines it."""
    positive, negative = scores[labels == 1], scores[labels == 0]
    wins = np.array([[1.0 if p > n else 0.5 if p == n else 0.0 for n in negative] for p in positive])
    variance = wins.mean(axis=1).var(ddof=1) / len(positive) + wins.mean(axis=0).var(ddof=1) / len(negative)
    return float(wins.mean()), float(variance)


@pytest.mark.parametrize("spread", [0.02, 0.3, 1.0, 6.0, 12.0])
def test_the_auroc_is_scikit_learns_within_the_stated_bound(spread: float) -> None:
    for seed in range(5):
        scores, labels = made_scores(seed, spread=spread)
        found = histogram(scores, labels)
        auroc, bound = found.auroc(0), found.auroc_bound(0)
        assert auroc is not None and bound is not None
        assert abs(auroc - roc_auc_score(labels[:, 0], scores[:, 0])) <= bound + 1e-12
        assert bound < (0.03 if spread in (0.02, 12.0) else 0.006)


def test_the_auroc_and_the_precision_of_binned_scores_are_exact() -> None:
    scores, labels = made_scores(3)
    binned = bin_of(scores[:, 0], 50)
    found = histogram(scores, labels, 50)
    assert found.auroc(0) == pytest.approx(roc_auc_score(labels[:, 0], binned), abs=1e-12)
    assert found.average_precision(0) == pytest.approx(average_precision_score(labels[:, 0], binned), abs=1e-12)


def test_the_bound_is_reached_when_everything_shares_a_bin() -> None:
    scores, labels = np.array([[0.5], [0.50001]]), np.array([[0.0], [1.0]])
    found = histogram(scores, labels, 10)
    assert found.auroc(0) == 0.5
    assert found.auroc_bound(0) == 0.5  # the raw scores have an AUROC of 1


def test_scores_of_an_untrained_network_still_resolve() -> None:
    rng = np.random.default_rng(1)
    labels = (np.arange(400) % 2).astype(float)[:, None]
    scores = 0.55 + 0.01 * (rng.normal(size=(400, 1)) + labels)
    bound = histogram(scores, labels).auroc_bound(0)
    equal_bins = np.stack([np.histogram(scores[labels == y], 1000, (0, 1))[0] for y in (0, 1)])
    assert bound is not None and bound < 0.8 * (equal_bins[0] * equal_bins[1]).sum() / 2 / 200**2


@pytest.mark.parametrize("seed", range(4))
def test_the_interval_is_delongs_on_the_logit_scale(seed: int) -> None:
    scores, labels = made_scores(seed, count=120)
    area, variance = delong_by_pairs(scores[:, 0], labels[:, 0])
    half = 1.959964 * math.sqrt(variance) / (area * (1 - area))
    expected = [1 / (1 + math.exp(-(math.log(area / (1 - area)) + sign * half))) for sign in (-1, 1)]
    assert histogram(scores, labels, 10_000).interval(0) == pytest.approx(expected, abs=2e-3)
    binned = bin_of(scores[:, 0], 40).astype(float)
    area, variance = delong_by_pairs(binned, labels[:, 0])
    assert histogram(scores, labels, 40)._variance(0) == pytest.approx(variance, rel=1e-9)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    truth = 0.5 * (1 + math.erf(1.2 / 2))  # P(X + 1.2 > Y) for independent standard normal X, Y
    inside = 0
    for seed in range(300):
        found = histogram(*made_scores(seed, count=100)).interval(0)
        assert found is not None
        inside += found[0] <= truth <= found[1]
    assert 0.91 <= inside / 300 <= 0.985


def test_perfect_separation_gives_no_interval_of_width_zero() -> None:
    labels = (np.arange(20) < 8).astype(float)[:, None]
    found = histogram(0.1 + 0.8 * labels, labels)
    assert found.auroc(0) == 1.0
    assert found.interval(0) == pytest.approx((0.025 ** (1 / 8), 1.0))
    assert histogram(0.9 - 0.8 * labels, labels).interval(0) == pytest.approx((0.0, 1 - 0.025 ** (1 / 8)))


def test_one_class_is_not_estimable_and_nothing_divides_by_zero() -> None:
    for label in (0.0, 1.0):
        found = histogram(np.full((5, 1), 0.7), np.full((5, 1), label))
        assert not found.estimable(0)
        for figure in (found.auroc, found.auroc_bound, found.interval, found.roc, found.average_precision):
            assert figure(0) is None
        assert found.brier(0) == pytest.approx((0.7 - label) ** 2, abs=1e-3)
    assert ScoreHistogram.empty(2, BINS).brier(1) is None
    assert histogram(np.array([[0.2], [0.3]]), np.array([[0.0], [1.0]])).interval(0) is None


def test_the_roc_passes_through_scikit_learns_points() -> None:
    scores, labels = made_scores(5)
    binned = bin_of(scores[:, 0], 30)
    curve = histogram(scores, labels, 30).roc(0)
    assert curve is not None and curve[0].shape == curve[1].shape == (31,)
    ours = {(round(x, 12), round(y, 12)) for x, y in zip(*curve, strict=True)}
    fpr, tpr, _ = roc_curve(labels[:, 0], binned, drop_intermediate=False)
    assert {(round(x, 12), round(y, 12)) for x, y in zip(fpr, tpr, strict=True)} <= ours
    assert (np.diff(curve[0]) >= 0).all() and (np.diff(curve[1]) >= 0).all()


def test_the_brier_score_is_scikit_learns_up_to_the_width_of_a_bin() -> None:
    scores, labels = made_scores(9)
    found = histogram(scores, labels).brier(0)
    assert found == pytest.approx(brier_score_loss(labels[:, 0], scores[:, 0]), abs=2e-3)


def test_a_missing_label_counts_nowhere_whatever_stands_in_its_place() -> None:
    scores, labels = made_scores(2, count=60)
    known = np.ones_like(labels)
    known[::3] = 0
    dirty_scores, dirty_labels = scores.copy(), labels.copy()
    dirty_scores[::3], dirty_labels[::3] = np.nan, np.nan
    seen = np.flatnonzero(known[:, 0])
    assert ScoreHistogram.of(dirty_scores, dirty_labels, known, BINS) == histogram(scores[seen], labels[seen])


@given(scores=hnp.arrays(np.float64, 40, elements=st.floats(0, 1)), bins=st.integers(2, 10_000))
def test_bins_never_fall_as_scores_rise_and_cover_their_score(scores: Float, bins: int) -> None:
    order = np.sort(scores)
    places = bin_of(order, bins)
    assert places.min() >= 0 and places.max() < bins and (np.diff(places) >= 0).all()
    inner = (order > 1e-6) & (order < 1 - 1e-6)
    assert (score_of(places / bins)[inner] <= order[inner] + 1e-9).all()
    assert (score_of((places + 1) / bins)[inner] >= order[inner] - 1e-9).all()


def test_the_ends_of_the_axis_are_zero_one_half_and_one() -> None:
    assert score_of(np.array([0.0, 0.5, 1.0])).tolist() == [0.0, 0.5, 1.0]
    assert bin_of(np.array([0.0, 1.0]), 10).tolist() == [0, 9]


counts = hnp.arrays(np.int64, (2, 2, 7), elements=st.integers(0, 10**6))


@given(counts, counts, counts)
def test_merging_is_commutative_and_associative_and_empty_is_its_zero(a: Float, b: Float, c: Float) -> None:
    x, y, z = (ScoreHistogram(part) for part in (a, b, c))  # type: ignore[arg-type]
    assert x + y == y + x
    assert (x + y) + z == x + (y + z)
    assert x + ScoreHistogram.empty(2, 7) == x
    assert hash(x + y) == hash(y + x)


@settings(deadline=None)
@given(st.integers(1, 99), st.integers(0, 2**32 - 1))
def test_the_sum_over_sites_is_the_histogram_of_the_union(cut: int, seed: int) -> None:
    scores, labels = made_scores(seed, count=100)
    parts = histogram(scores[:cut], labels[:cut]) + histogram(scores[cut:], labels[cut:])
    assert parts == histogram(scores, labels)


def test_coarser_bins_are_what_fewer_bins_would_have_counted() -> None:
    scores, labels = made_scores(4)
    assert histogram(scores, labels, 1000).coarsened(20) == histogram(scores, labels, 50)
    for factor in (0, -1, 3, 1000):
        with pytest.raises(MessageMalformed):
            histogram(scores, labels, 1000).coarsened(factor)


def test_counts_survive_the_wire_and_json_and_cannot_be_changed() -> None:
    found = histogram(*made_scores(6))
    assert found.to_array().dtype == np.int32
    assert ScoreHistogram(found.to_array()) == found  # type: ignore[arg-type]
    assert ScoreHistogram.from_json(found.to_json()) == found
    with pytest.raises(ValueError, match="read-only"):
        found.counts[0, 0, 0] = 5
    given_array = np.ones((1, 2, 4), dtype=np.int64)
    held = ScoreHistogram(given_array)
    given_array[:] = 7
    assert held.positives(0) == 4


def test_large_counts_do_not_overflow() -> None:
    big = np.zeros((1, 2, 3), dtype=np.int64)
    big[0, 0] = big[0, 1] = 2**31 - 1
    assert ScoreHistogram(big).auroc(0) == 0.5


@pytest.mark.parametrize(
    "value",
    [
        [],
        5,
        None,
        "counts",
        [[[1, 2], [3]]],
        [[[1, 2]]],
        [[[1], [2]]],
        [[[1.5, 2], [3, 4]]],
        [[[1, -2], [3, 4]]],
        [[[1, 2**31], [3, 4]]],
        [[[1, 2**70], [3, 4]]],
        [[[True, False], [False, True]]],
        [[["1", "2"], ["3", "4"]]],
        [[[None, 2], [3, 4]]],
        [[[float("nan"), 2], [3, 4]]],
        {"a": 1},
    ],
)
def test_anything_but_counts_is_refused(value: object) -> None:
    with pytest.raises(MessageMalformed):
        ScoreHistogram.from_json(value)


@pytest.mark.parametrize(
    ("scores", "labels", "known"),
    [
        ([[1.2]], [[1]], [[1]]),
        ([[-0.1]], [[1]], [[1]]),
        ([[math.nan]], [[1]], [[1]]),
        ([[0.5]], [[2]], [[1]]),
        ([[0.5]], [[math.nan]], [[1]]),
        ([[0.5]], [[1, 0]], [[1, 1]]),
        ([0.5], [1], [1]),
    ],
)
def test_scores_and_labels_out_of_range_are_refused(scores: object, labels: object, known: object) -> None:
    s, y, k = (np.array(part, dtype=float) for part in (scores, labels, known))
    with pytest.raises(MessageMalformed):
        ScoreHistogram.of(s, y, k, BINS)


def test_histograms_of_different_studies_cannot_be_added() -> None:
    with pytest.raises(MessageMalformed):
        ScoreHistogram.empty(1, 10) + ScoreHistogram.empty(1, 20)


# Counts that had noise added.


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-50, 50), min_size=4, max_size=40), st.integers(0, 2**31))
def test_the_nearest_histogram_has_no_negative_count_and_the_total_of_the_noisy_ones(
    values: list[float], seed: int
) -> None:
    noisy = np.array([[values, values[::-1]]])
    made = ScoreHistogram.nearest(noisy)
    total = max(0, round(sum(values)))
    assert made.counts.min() >= 0
    assert abs(made.negatives(0) - total) <= 1 and abs(made.positives(0) - total) <= 1


def test_counts_without_noise_are_their_own_nearest_histogram() -> None:
    counts = np.random.default_rng(1).integers(0, 30, (2, 2, 25))
    assert ScoreHistogram.nearest(counts.astype(np.float64)) == ScoreHistogram(counts)


def test_empty_bins_with_noise_do_not_add_up_to_images() -> None:
    """Cut off at zero alone, 200 empty bins of deviation 5 would make 400 images."""
    generator = np.random.default_rng(2)
    totals = [ScoreHistogram.nearest(generator.normal(0, 5, (1, 2, 200))).negatives(0) for _ in range(50)]
    assert np.mean(totals) < 60


def test_noise_widens_the_interval_by_what_it_does_to_the_auroc() -> None:
    generator = np.random.default_rng(3)
    counts = np.stack(
        [generator.poisson(40 * np.exp(-np.linspace(0, 2, 20))), generator.poisson(40 * np.exp(-np.linspace(2, 0, 20)))]
    )
    exact = ScoreHistogram(counts[None].astype(np.int64))
    seen = [ScoreHistogram.nearest(exact.counts + generator.normal(0, 8, (1, 2, 20))) for _ in range(200)]
    inside = 0
    for noisy in seen:
        interval, narrow = noisy.interval(0, 8.0), noisy.interval(0)
        assert interval is not None and narrow is not None and interval[0] < narrow[0] and narrow[1] < interval[1]
        inside += interval[0] <= (exact.auroc(0) or 0) <= interval[1]
    assert inside >= 190, "the sampling error comes on top, so 95 % is the least"


def test_cross_entropy_of_bins_is_that_of_their_middles() -> None:
    scores, targets = np.array([[0.2], [0.9], [0.7], [0.4]]), np.array([[0.0], [1.0], [0.0], [1.0]])
    made = ScoreHistogram.of(scores, targets, np.ones((4, 1)), bins=10_000)
    expected = -np.mean([np.log(0.8), np.log(0.9), np.log(0.3), np.log(0.4)])
    assert made.cross_entropy() == pytest.approx(expected, rel=1e-3)
    assert ScoreHistogram.empty(1, 10).cross_entropy() is None


# Precision and recall.


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(2, 40),
    st.integers(4, 120),
    st.sampled_from([0.02, 0.3, 1.0, 6.0, 20.0]),
    st.sampled_from([None, 1, 2, 3]),
)
def test_the_average_precision_of_raw_scores_lies_within_the_stated_bound(
    seed: int, bins: int, count: int, spread: float, decimals: int | None
) -> None:
    """Rounded scores are tied, by whole bins or within them: a tie of positives is more precise than one after the other."""
    scores, labels = made_scores(seed, count, spread)
    labels[:2, 0] = 0, 1
    scores = scores if decimals is None else scores.round(decimals)
    found = histogram(scores, labels, bins)
    area, bound = found.average_precision(0), found.average_precision_bound(0)
    assert area is not None and bound is not None
    assert abs(area - average_precision_score(labels[:, 0], scores[:, 0])) <= bound + 1e-9


def test_the_bound_of_the_average_precision_is_reached_from_above_and_from_below() -> None:
    """Oracle: scikit-learn on raw scores. Two bins: ten negatives above, then a bin with both classes."""
    labels = np.array([0] * 10 + [1] * 10 + [0] * 10)
    tied_first = np.array([0.9] * 10 + [0.3] * 10 + [0.2] * 10)
    found = ScoreHistogram(np.array([[[10, 10], [10, 0]]]))
    area, bound = found.average_precision(0), found.average_precision_bound(0)
    assert area is not None and area == pytest.approx(1 / 3)
    assert bound == pytest.approx(average_precision_score(labels, tied_first) - area)
    alone = ScoreHistogram(np.array([[[0, 30], [0, 2]]]))
    last = average_precision_score([0] * 30 + [1, 1], np.linspace(0.9, 0.6, 32))
    middle = alone.average_precision(0)
    assert middle is not None and alone.average_precision_bound(0) == pytest.approx(max(1 - middle, middle - last))
    worst = ScoreHistogram(np.array([[[0, 1], [0, 40]]]))
    least = average_precision_score([0] + [1] * 40, np.linspace(0.9, 0.6, 41))
    middle = worst.average_precision(0)
    assert middle is not None and worst.average_precision_bound(0) == pytest.approx(middle - least)


def test_bins_of_one_image_leave_no_doubt_about_the_average_precision() -> None:
    counts = np.zeros((1, 2, 12), np.int64)
    for place, label in enumerate((0, 0, 1, 0, 1, 1, 0, 1, 0, 1, 1, 1)):
        counts[0, label, place] = 1
    assert ScoreHistogram(counts).average_precision_bound(0) == pytest.approx(0, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 40))
def test_precision_and_recall_are_scikit_learns_at_every_score_that_occurs(seed: int, bins: int) -> None:
    scores, labels = made_scores(seed, count=60)
    labels[:2, 0] = 0, 1
    found = histogram(scores, labels, bins).precision_recall(0)
    precision, recall, _ = precision_recall_curve(labels[:, 0], bin_of(scores[:, 0], bins))
    assert found is not None
    # scikit-learn's curve starts at the lowest score, and ends at a point without a score.
    assert found[0] == pytest.approx(recall[:-1][::-1]) and found[1] == pytest.approx(precision[:-1][::-1])


def test_without_both_classes_there_is_no_precision_and_no_bound_of_it() -> None:
    for label in (0.0, 1.0):
        found = histogram(np.full((5, 1), 0.7), np.full((5, 1), label))
        assert found.precision_recall(0) is None and found.average_precision_bound(0) is None
