"""Thresholds against every edge by exact fractions, rates and net benefit against the images themselves."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import confusion_matrix

from models.metrics import ScoreHistogram, bin_of, score_of
from models.operating import DECISION_THRESHOLDS, RULES, WORDS, Confusion, Rate, Rule, net_benefit, thresholds

UNHURRIED = settings(max_examples=80, deadline=None)

BINS = 12
Int = NDArray[np.int64]
counted = hnp.arrays(np.int64, (2, BINS), elements=st.sampled_from([0, 0, 0, 1, 2, 3, 5, 10, 19]))


def rates(counts: Int, edge: int) -> tuple[Fraction, Fraction]:
    """(sensitivity, specificity) of calling the bins from `edge` on positive."""
    negative, positive = ([int(n) for n in row] for row in counts)
    return Fraction(sum(positive[edge:]), sum(positive)), Fraction(sum(negative[:edge]), sum(negative))


def raw(seed: int, count: int = 200) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    rng = np.random.default_rng(seed)
    labels = (rng.random((count, 1)) < 0.3).astype(float)
    labels[:2, 0] = 0, 1
    return 1 / (1 + np.exp(-1.5 * rng.normal(size=(count, 1)) - 2 * labels + 1)), labels


def histogram(scores: NDArray[np.float64], labels: NDArray[np.float64], bins: int) -> ScoreHistogram:
    return ScoreHistogram.of(scores, labels, np.ones_like(labels), bins)


@UNHURRIED
@given(counted)
def test_each_rule_is_kept_by_the_best_of_all_edges(counts: Int) -> None:
    found = thresholds(ScoreHistogram(counts[None]), 0)
    if counts.sum(axis=1).min() == 0:
        assert found == {}
        return
    every = [rates(counts, edge) for edge in range(BINS + 1)]
    assert tuple(found) == RULES == tuple(WORDS)
    largest = max(sum(pair) for pair in every)
    assert found["youden"].edge == min(edge for edge, pair in enumerate(every) if sum(pair) == largest)
    kept_sensitivities: list[tuple[Rule, Fraction]] = [
        ("sensitivity_90", Fraction(9, 10)),
        ("sensitivity_95", Fraction(19, 20)),
    ]
    for rule, least in kept_sensitivities:
        sensitivity, specificity = every[found[rule].edge]
        assert sensitivity >= least
        assert specificity == max(other for kept, other in every if kept >= least)
    sensitivity, specificity = every[found["specificity_90"].edge]
    assert specificity >= Fraction(9, 10)
    assert sensitivity == max(other for other, kept in every if kept >= Fraction(9, 10))
    for threshold in found.values():
        assert threshold.score == float(score_of(np.array(threshold.edge / BINS)))


@pytest.mark.parametrize("times", [1, 3, 7, 11, 123])
def test_nineteen_of_twenty_are_95_percent_whatever_a_quotient_rounds_to(times: int) -> None:
    counts = np.zeros((1, 2, BINS), np.int64)
    counts[0, 0, 4] = 50
    counts[0, 1, 1], counts[0, 1, 2], counts[0, 1, 9] = times, times, 18 * times  # 5, 10, and the other 85 or 90 %
    found = thresholds(ScoreHistogram(counts), 0)
    assert (found["sensitivity_95"].edge, found["sensitivity_90"].edge) == (2, 9)
    counts[0, 1, 1] += 1
    counts[0, 1, 9] -= 1
    found = thresholds(ScoreHistogram(counts), 0)
    assert (found["sensitivity_95"].edge, found["sensitivity_90"].edge) == (1, 2)


@pytest.mark.parametrize("times", [1, 3, 7, 11, 123])
def test_nine_of_ten_are_90_percent_specificity(times: int) -> None:
    counts = np.zeros((1, 2, BINS), np.int64)
    counts[0, 0, 3], counts[0, 0, 8] = 9 * times, times
    counts[0, 1, 6] = 5
    assert thresholds(ScoreHistogram(counts), 0)["specificity_90"].edge == 4
    counts[0, 0, 3] -= 1
    counts[0, 0, 8] += 1
    assert thresholds(ScoreHistogram(counts), 0)["specificity_90"].edge == 9


@UNHURRIED
@given(st.integers(1, 400), st.integers(1, 400))
def test_of_equal_sums_the_lower_threshold_is_taken_even_if_quotients_round(negatives: int, positives: int) -> None:
    """Four edges at which sensitivity + specificity is 1 and one more bin of each class in the same shares: all tie."""
    counts = np.zeros((1, 2, BINS), np.int64)
    for place in (2, 5, 7):
        counts[0, :, place] = negatives, positives
    assert thresholds(ScoreHistogram(counts), 0)["youden"].edge == 0


def test_the_threshold_may_be_one_that_calls_everybody_or_nobody() -> None:
    counts = np.zeros((1, 2, BINS), np.int64)
    counts[0, 0, BINS - 1], counts[0, 1, 0] = 30, 30
    found = thresholds(ScoreHistogram(counts), 0)
    assert (found["sensitivity_90"].edge, found["sensitivity_90"].score) == (0, 0.0)
    assert (found["specificity_90"].edge, found["specificity_90"].score) == (BINS, 1.0)


@UNHURRIED
@given(st.integers(0, 2**32 - 1), st.integers(10, 1000))
def test_what_a_threshold_does_to_binned_images_it_does_to_their_raw_scores(seed: int, bins: int) -> None:
    scores, labels = raw(seed)
    development = histogram(*raw(seed + 1), bins)
    for threshold in thresholds(development, 0).values():
        cell = Confusion.at(histogram(scores, labels, bins), 0, threshold.edge)
        called = scores[:, 0] >= threshold.score
        (tn, fp), (fn, tp) = confusion_matrix(labels[:, 0], called, labels=[0, 1])
        assert cell == Confusion(tp, fn, tn, fp)


def test_a_threshold_is_of_its_own_target() -> None:
    counts = np.zeros((2, 2, BINS), np.int64)
    counts[0, 0, 2], counts[0, 1, 8], counts[1, 0, 4], counts[1, 1, 6] = 5, 5, 7, 7
    both = ScoreHistogram(counts)
    assert [thresholds(both, target)["youden"].edge for target in (0, 1)] == [3, 5]
    assert Confusion.at(both, 1, 5) == Confusion(7, 0, 7, 0)


@UNHURRIED
@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 60), st.integers(0, 60))
def test_rates_are_shares_of_what_they_are_of_with_wilsons_interval(tp: int, fn: int, tn: int, fp: int) -> None:
    told = Confusion(tp, fn, tn, fp).to_json()
    shares = {"sensitivity": (tp, tp + fn), "specificity": (tn, tn + fp), "ppv": (tp, tp + fp), "npv": (tn, tn + fn)}
    assert set(told) == set(shares) | {"true_positive", "false_negative", "true_negative", "false_positive"}
    for name, (hits, among) in shares.items():
        if among == 0:
            assert told[name] == {"value": None, "interval": None}
            continue
        ends = stats.binomtest(hits, among).proportion_ci(method="wilson")
        assert told[name]["value"] == pytest.approx(hits / among)
        assert told[name]["interval"] == pytest.approx([ends.low, ends.high], abs=1e-9)
    assert Rate.of(0, 0) == Rate(None, None)


# Net benefit ---------------------------------------------------------------------------------------------------------


@UNHURRIED
@given(st.integers(0, 2**32 - 1), st.sampled_from([10, 37, 100, 1000]))
def test_net_benefit_is_hits_less_false_alarms_weighed_by_the_odds_of_the_threshold(seed: int, bins: int) -> None:
    scores, labels = raw(seed)
    curve = net_benefit(histogram(scores, labels, bins), 0)
    images, prevalence = len(labels), float(labels.mean())
    for point in curve:
        at = point["threshold"]
        called, present = scores[:, 0] >= at, labels[:, 0] == 1
        hits, alarms = int((called & present).sum()), int((called & ~present).sum())
        assert point["model"] == pytest.approx(hits / images - alarms / images * at / (1 - at), abs=1e-9)
        assert point["all"] == pytest.approx(prevalence - (1 - prevalence) * at / (1 - at), abs=1e-9)
    told = [point["threshold"] for point in curve]
    assert told == sorted(set(told)) and told[0] > 0 and told[-1] < 1
    edges = score_of(np.arange(bins + 1) / bins)
    for wanted in DECISION_THRESHOLDS:
        below = max(edge for edge in edges if edge <= wanted + 1e-12)
        assert below == 0 or any(abs(below - at) < 1e-9 for at in told)


def test_at_the_lowest_threshold_that_calls_everybody_the_model_is_as_good_as_calling_everybody() -> None:
    counts = np.zeros((1, 2, 100), np.int64)
    counts[0, :, 95] = 30, 10
    first = net_benefit(ScoreHistogram(counts), 0)[0]
    assert first["model"] == pytest.approx(first["all"]) and first["threshold"] < 0.02


def test_a_model_without_error_has_the_prevalence_as_its_net_benefit() -> None:
    counts = np.zeros((1, 2, 100), np.int64)
    counts[0, 0, 3], counts[0, 1, 97] = 30, 10
    curve = net_benefit(ScoreHistogram(counts), 0)
    assert {round(point["model"], 12) for point in curve} == {0.25} and len(curve) > 60


def test_without_both_classes_there_is_no_threshold_and_no_curve() -> None:
    for label in (0, 1):
        counts = np.zeros((1, 2, BINS), np.int64)
        counts[0, label, 3] = 40
        assert thresholds(ScoreHistogram(counts), 0) == {} and net_benefit(ScoreHistogram(counts), 0) == []


def test_decision_thresholds_are_the_whole_percents() -> None:
    assert [round(100 * at) for at in DECISION_THRESHOLDS] == list(range(1, 100))
    assert int(bin_of(np.array(DECISION_THRESHOLDS), 1000).min()) > 0
