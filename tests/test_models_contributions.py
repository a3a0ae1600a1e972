"""What a site adds to a sum: the sum of many is exactly that of all their images, and nothing small is released."""

from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from models import contributions
from models.contributions import LOSS_UNIT, Contribution, Kind, Sheet, count_of, figures, read, read_figures
from models.metrics import ScoreHistogram
from models.study import Study
from privacy.errors import MessageMalformed
from privacy.sharing import COUNT_MAX

UNHURRIED = settings(max_examples=50, deadline=None)  # a machine under load is no defect

BINS, TARGETS = 10, 2


def made_study(**evaluation: Any) -> Study:
    return Study.model_validate(
        {
            "name": "s",
            "title": "t",
            "purpose": "p",
            "task": {"targets": ["opacity", "effusion"]},
            "training": {"rounds": 1},
            "protection": "plain",
            "privacy": "none",
            "participation": {"sites": ["north"], "quorum": 1},
            "evaluation": {"bins": BINS} | evaluation,
        }
    )


STUDY = made_study()


@st.composite
def sheets(draw: st.DrawFn) -> Sheet:
    images = draw(st.integers(1, 500))
    counts = np.zeros((TARGETS, 2, BINS), np.int64)
    for target in range(TARGETS):
        for _ in range(draw(st.integers(0, min(images, 12)))):
            counts[target, draw(st.integers(0, 1)), draw(st.integers(0, BINS - 1))] += 1
    return Sheet(draw(st.integers(0, images)), images, draw(st.floats(0, 17)), ScoreHistogram(counts))


@st.composite
def contributed(draw: st.DrawFn) -> Contribution:
    cases, loss = draw(st.integers(1, 5000)), draw(st.floats(0, 100))
    return Contribution(draw(st.integers(0, 10**6)), draw(sheets()), cases, loss, np.zeros(3, np.float32))


def mean(parts: list[tuple[float, int]]) -> Fraction:
    return sum((Fraction(value) * over for value, over in parts), Fraction(0)) / sum(over for _, over in parts)


@UNHURRIED
@given(st.lists(contributed(), min_size=1, max_size=4), st.sampled_from(["train", "evaluate"]))
def test_the_sum_of_contributions_is_that_of_all_their_images(parts: list[Contribution], kind: Kind) -> None:
    """Oracle: exact fractions. A mean loss may be off by half a unit for each site, spread over the images."""
    total = np.sum([part.counts(kind) for part in parts], axis=0)
    values = np.array([3.0, -7.0, 1e-3])
    found = read(STUDY, kind, values, total)
    assert found.ingested == sum(part.ingested for part in parts)
    assert found.sheet.patients == sum(part.sheet.patients for part in parts)
    assert found.sheet.images == sum(part.sheet.images for part in parts)
    assert (found.sheet.histogram.counts == sum(part.sheet.histogram.counts for part in parts)).all()
    allowed = Fraction(LOSS_UNIT) * len(parts) / 2 / found.sheet.images + Fraction(1, 10**9)
    assert abs(Fraction(found.sheet.loss) - mean([(p.sheet.loss, p.sheet.images) for p in parts])) <= allowed
    if kind == "evaluate":
        assert (found.cases, found.loss, found.update.size) == (0, 0.0, 0)
        return
    assert found.cases == sum(part.cases for part in parts)
    allowed = Fraction(LOSS_UNIT) * len(parts) / 2 / found.cases + Fraction(1, 10**9)
    assert abs(Fraction(found.loss) - mean([(p.loss, p.cases) for p in parts])) <= allowed
    assert found.update.dtype == np.float32
    for value, got in zip(values, found.update, strict=True):
        assert float(got) == float(np.float32(value / found.cases))


@UNHURRIED
@given(contributed(), st.sampled_from(["train", "evaluate"]))
def test_counts_are_whole_numbers_in_the_agreed_number_and_range(part: Contribution, kind: Kind) -> None:
    counts = part.counts(kind)
    assert counts.dtype == np.int64 and counts.shape == (count_of(STUDY, kind),)
    assert (counts >= 0).all() and (counts <= COUNT_MAX).all()


def test_the_number_of_counts_follows_from_the_study_alone() -> None:
    assert count_of(STUDY, "train") == 6 + TARGETS * 2 * BINS
    assert count_of(STUDY, "evaluate") == 4 + TARGETS * 2 * BINS


@pytest.mark.parametrize("loss", [1e4, 1e6, 1e30, 3.4e38])
def test_a_loss_beyond_reason_is_still_a_count_that_can_be_summed(loss: float) -> None:
    """A diverging site reports a large loss; it must not be refused for a number that nobody needs exactly."""
    sheet = Sheet(90_000, 1_000_000, loss, ScoreHistogram.empty(TARGETS, BINS))
    counts = Contribution(0, sheet, 1_000_000, loss, np.zeros(0, np.float32)).counts("train")
    assert (counts >= 0).all() and (counts <= COUNT_MAX).all()
    assert read(STUDY, "train", np.zeros(0), counts).loss == contributions.LOSS_MAX
    assert Contribution(0, replace(sheet, loss=-1.0)).counts("evaluate")[3] == 0


def counts_of(**change: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    """[ingested, patients, images, loss, cases, training loss, scores...] of a sound sum, with changes by name."""
    scores = np.zeros((TARGETS, 2, BINS), np.int64)
    scores[0, 0, 0], scores[1, 1, 3] = change.pop("first", 5), change.pop("second", 2)
    facts = {"ingested": 40, "patients": 8, "images": 9, "loss": 77, "cases": 12, "train_loss": 99} | change
    return np.concatenate([np.array(list(facts.values()), np.int64), scores.ravel()])


CONTRADICTIONS: list[dict[str, int]] = [
    {"patients": 10},
    {"images": 7},
    {"first": 10},
    {"second": 10},
    {"second": 2**31},
    {"cases": 0},
    {"cases": -1},
    {"first": -1},
]


@pytest.mark.parametrize("change", CONTRADICTIONS, ids=repr)
def test_counts_that_contradict_each_other_are_no_sum(change: dict[str, int]) -> None:
    read(STUDY, "train", np.zeros(3), counts_of())
    with pytest.raises(MessageMalformed):
        read(STUDY, "train", np.zeros(3), counts_of(**change))


def test_a_sum_with_another_number_of_counts_is_of_another_study() -> None:
    for counts in (counts_of()[:-1], np.append(counts_of(), 0), counts_of().reshape(1, -1), counts_of()[:0]):
        with pytest.raises(MessageMalformed, match="number of counts"):
            read(STUDY, "train", np.zeros(3), counts)
    with pytest.raises(MessageMalformed):
        read(STUDY, "evaluate", np.zeros(0), counts_of())


def test_a_sum_without_images_is_read_and_has_no_loss() -> None:
    empty = Contribution(3, Sheet(0, 0, 0.0, ScoreHistogram.empty(TARGETS, BINS)))
    found = read(STUDY, "evaluate", np.zeros(0), empty.counts("evaluate"))
    assert (found.ingested, found.sheet.images, found.sheet.loss) == (3, 0, 0.0)


# Released figures ----------------------------------------------------------------------------------------------------


def scored(negatives: int, positives: int, seed: int = 0) -> ScoreHistogram:
    """Two targets alike, positives scoring higher on the whole."""
    rng = np.random.default_rng(seed)
    counts = np.zeros((TARGETS, 2, BINS), np.int64)
    for label, images in enumerate((negatives, positives)):
        for place in rng.integers(0, BINS - 3, images) + 3 * label:
            counts[:, label, place] += 1
    return ScoreHistogram(counts)


def test_released_figures_are_the_auroc_of_the_site_with_its_interval_rounded() -> None:
    """Oracle: scikit-learn on one score for each image, the middle of its bin."""
    histogram = scored(30, 12)
    rows = figures(STUDY, histogram, release=True)
    assert rows.dtype == np.float32 and rows.shape == (TARGETS, 5)
    places = np.concatenate([np.repeat(np.arange(BINS), histogram.counts[0, label]) for label in (0, 1)])
    exact = roc_auc_score([0] * 30 + [1] * 12, places)
    for row, told in zip(rows, read_figures(STUDY, rows), strict=True):
        assert abs(row[0] - exact) <= 5.1e-4 and row[3:].tolist() == [30, 10]
        assert told is not None and told["auroc"] == round(exact, 3)
        assert 0 <= told["low"] < told["auroc"] < told["high"] <= 1
        assert (told["negatives"], told["positives"]) == (30, 10)


@pytest.mark.parametrize(("negatives", "positives"), [(9, 50), (50, 9), (9, 9), (0, 50), (50, 0), (0, 0), (1, 1)])
def test_figures_of_a_class_with_fewer_than_ten_images_stay_at_the_site(negatives: int, positives: int) -> None:
    """Not the AUROC, not the interval, and not the count of the other class."""
    rows = figures(STUDY, scored(negatives, positives), release=True)
    assert (rows == -1.0).all() and read_figures(STUDY, rows) == [None, None]


@UNHURRIED
@given(st.integers(10, 10**6), st.integers(10, 10**6))
def test_counts_are_released_in_tens_so_that_no_difference_shows_a_small_count(negatives: int, positives: int) -> None:
    """Pooled counts are exact. Less those of all sites but one, they would be that one's, if these were exact too."""
    counts = np.zeros((TARGETS, 2, BINS), np.int64)
    counts[:, 0, 2], counts[:, 0, 5], counts[:, 1, 5] = negatives - 3, 3, positives
    row = figures(STUDY, ScoreHistogram(counts), release=True)[0]
    assert row[3:].tolist() == [float(f"{n // 10}0") for n in (negatives, positives)]
    assert row[:3].tolist() == [float(np.float32(round(float(value), 3))) for value in row[:3]]
    told = read_figures(STUDY, np.array([row, row]))[0]
    assert told is not None
    for value in (told["auroc"], told["low"], told["high"]):
        assert len(repr(value).partition(".")[2]) <= 3


def test_ten_images_of_each_class_are_released_and_each_target_is_judged_by_itself() -> None:
    counts = scored(10, 10).counts.copy()
    counts[1, 1, np.flatnonzero(counts[1, 1])[0]] -= 1
    rows = figures(STUDY, ScoreHistogram(counts), release=True)
    first, second = read_figures(STUDY, rows)
    assert first is not None and second is None and (rows[1] == -1.0).all()


def test_figures_are_released_only_if_site_and_study_agree() -> None:
    histogram = scored(100, 100)
    assert (figures(STUDY, histogram, release=False) == -1.0).all()
    assert (figures(made_study(site_figures=False), histogram, release=True) == -1.0).all()
    assert (figures(STUDY, histogram, release=True) >= 0).all()


@UNHURRIED
@given(st.integers(10, 400), st.integers(10, 400), st.integers(0, 2**32), st.integers(0, 3))
def test_whatever_may_be_released_can_be_read(negatives: int, positives: int, seed: int, shift: int) -> None:
    """Also where classes are apart (an AUROC of 1 or 0), in one bin, or the interval is narrow."""
    histogram = scored(negatives, positives, seed)
    counts = histogram.counts.copy()
    counts[:, 1] = np.roll(counts[:, 1], shift - 3, axis=1)
    counts[1] = 0
    counts[1, 0, 5], counts[1, 1, (5, 0, 9, 5)[shift]] = negatives, positives
    for told in read_figures(STUDY, figures(STUDY, ScoreHistogram(counts), release=True)):
        assert told is not None and 0 <= told["low"] <= told["auroc"] <= told["high"] <= 1


GOOD = [0.75, 0.5, 0.875, 40, 12]
HOSTILE: list[list[float]] = [
    [0.75, 0.5, 0.875, 9, 12],
    [0.75, 0.5, 0.875, 40, 9],
    [0.75, 0.5, 0.875, -1, -1],
    [0.75, 0.8, 0.875, 40, 12],
    [0.75, 0.5, 0.7, 40, 12],
    [1.5, 0.5, 2.0, 40, 12],
    [0.75, -0.5, 0.875, 40, 12],
    [np.nan, 0.5, 0.875, 40, 12],
    [0.75, np.nan, 0.875, 40, 12],
    [0.75, 0.5, 0.875, np.nan, 12],
    [0.75, 0.5, 0.875, 40, np.nan],
    [0.75, 0.5, 0.875, np.inf, 12],
    [0.75, 0.5, 0.875, 40, 12.5],
    [-1, -1, -1, -1, 12],
    [-1, -1, -1, 40, 12],
    [0, 0, 0, 0, 0],
]


@pytest.mark.parametrize("row", HOSTILE, ids=repr)
def test_figures_that_contradict_themselves_are_refused(row: list[float]) -> None:
    assert read_figures(STUDY, np.array([GOOD, GOOD], np.float32))[0] is not None
    for rows in ([row, GOOD], [GOOD, row]):
        with pytest.raises(MessageMalformed):
            read_figures(STUDY, np.array(rows, np.float32))


def test_figures_of_another_number_of_targets_are_refused() -> None:
    for shape in ((1, 5), (3, 5), (2, 4), (2, 6), (10,), (2, 5, 1)):
        with pytest.raises(MessageMalformed, match="targets"):
            read_figures(STUDY, np.full(shape, -1.0, np.float32))
