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
from models.subgroups import Scored
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


def scored(negatives: int, positives: int, seed: int = 0, images_each: int = 1) -> Scored:
    """Two targets alike, positives scoring higher on the whole; `images_each` of each patient."""
    rng = np.random.default_rng(seed)
    labels = np.repeat([0.0, 1.0], [negatives, positives])
    scores = 1 / (1 + np.exp(-rng.normal(0, 1, len(labels)) - labels))
    two = np.repeat(labels[:, None], TARGETS, axis=1)
    return Scored(
        np.repeat(scores[:, None], TARGETS, axis=1), two, np.ones(two.shape), np.arange(len(labels)) // images_each
    )


def test_released_figures_are_the_auroc_of_the_site_with_its_intervals_rounded() -> None:
    """Oracle: scikit-learn on the raw scores."""
    its = scored(30, 12)
    rows = figures(STUDY, its, release=True)
    assert rows.dtype == np.float32 and rows.shape == (TARGETS, 7)
    exact = roc_auc_score(its.targets[:, 0], its.scores[:, 0])
    for row, told in zip(rows, read_figures(STUDY, rows), strict=True):
        assert abs(row[0] - exact) <= 5.1e-4 and row[5:].tolist() == [30, 10]
        assert told is not None and told["auroc"] == round(exact, 3)
        assert 0 <= told["low"] < told["auroc"] < told["high"] <= 1
        assert 0 <= told["bootstrap_low"] < told["auroc"] < told["bootstrap_high"] <= 1
        assert (told["negatives"], told["positives"]) == (30, 10)


def test_a_target_without_known_labels_of_both_classes_is_not_released_whatever_its_cells_hold() -> None:
    its = scored(30, 30)
    its.known[:, 1], its.targets[:, 1] = 0, np.nan
    first, second = figures(STUDY, its, release=True)
    assert first[0] > 0 and (second == -1).all()


def test_images_of_one_patient_are_no_two_patients() -> None:
    """Ten images of each class, and all positives of one patient: her figure would be hers alone."""
    its = scored(40, 12)
    its.patients[40:] = 40
    assert (figures(STUDY, its, release=True) == -1).all()


@pytest.mark.parametrize(("negatives", "positives"), [(9, 50), (50, 9), (9, 9), (0, 50), (50, 0), (0, 0), (1, 1)])
def test_figures_of_a_class_with_fewer_than_ten_images_stay_at_the_site(negatives: int, positives: int) -> None:
    """Not the AUROC, not the interval, and not the count of the other class."""
    rows = figures(STUDY, scored(negatives, positives), release=True)
    assert (rows == -1.0).all() and read_figures(STUDY, rows) == [None, None]


@UNHURRIED
@given(st.integers(10, 300), st.integers(10, 300), st.integers(0, 99))
def test_counts_are_released_in_tens_so_that_no_difference_shows_a_small_count(
    negatives: int, positives: int, seed: int
) -> None:
    """Pooled counts are exact. Less those of all sites but one, they would be that one's, if these were exact too."""
    row = figures(STUDY, scored(negatives, positives, seed), release=True)[0]
    assert row[5:].tolist() == [float(f"{n // 10}0") for n in (negatives, positives)]
    told = read_figures(STUDY, np.array([row, row]))[0]
    assert told is not None
    for name in ("auroc", "low", "high", "bootstrap_low", "bootstrap_high"):
        assert len(repr(told[name]).partition(".")[2]) <= 3


def test_each_target_is_judged_by_itself() -> None:
    its = scored(10, 10)
    its.known[15, 1] = 0
    first, second = read_figures(STUDY, figures(STUDY, its, release=True))
    assert first is not None and second is None


def test_figures_are_released_only_if_site_and_study_agree() -> None:
    its = scored(30, 30)
    assert (figures(STUDY, its, release=False) == -1).all()
    assert (figures(made_study(site_figures=False), its, release=True) == -1).all()


@pytest.mark.parametrize(("negatives", "positives"), [(10, 10), (10, 300), (300, 10)])
@pytest.mark.parametrize("shift", [-50.0, 0.0, 50.0])
def test_whatever_may_be_released_can_be_read(shift: float, negatives: int, positives: int) -> None:
    """All scores equal, all in order, all in the wrong order: intervals that could leave [0, 1], or their own AUROC."""
    its = scored(negatives, positives)
    its.scores[:] = 1 / (1 + np.exp(-shift * (its.targets - 0.5)))
    for told in read_figures(STUDY, figures(STUDY, its, release=True)):
        assert told is not None and 0 <= told["low"] <= told["auroc"] <= told["high"] <= 1


GOOD = [0.75, 0.5, 0.875, 0.5, 0.875, 40, 12]
HOSTILE: list[list[float]] = [
    [0.75, 0.5, 0.875, 0.5, 0.875, 9, 12],
    [0.75, 0.5, 0.875, 0.5, 0.875, 40, 9],
    [0.75, 0.5, 0.875, 0.5, 0.875, -1, -1],
    [0.75, 0.8, 0.875, 0.5, 0.875, 40, 12],
    [0.75, 0.5, 0.7, 0.5, 0.875, 40, 12],
    [0.75, 0.5, 0.875, 0.9, 0.8, 40, 12],
    [0.75, 0.5, 0.875, -0.1, 0.8, 40, 12],
    [0.75, 0.5, 0.875, 0.5, 1.1, 40, 12],
    [1.5, 0.5, 2.0, 0.5, 0.875, 40, 12],
    [0.75, -0.5, 0.875, 0.5, 0.875, 40, 12],
    [np.nan, 0.5, 0.875, 0.5, 0.875, 40, 12],
    [0.75, np.nan, 0.875, 0.5, 0.875, 40, 12],
    [0.75, 0.5, 0.875, np.nan, 0.875, 40, 12],
    [0.75, 0.5, 0.875, 0.5, 0.875, np.nan, 12],
    [0.75, 0.5, 0.875, 0.5, 0.875, 40, np.nan],
    [0.75, 0.5, 0.875, 0.5, np.inf, 40, 12],
    [0.75, 0.5, 0.875, 0.5, 0.875, 40, 12.5],
    [-1, -1, -1, -1, -1, -1, 12],
    [-1, -1, -1, -1, -1, 40, 12],
    [0, 0, 0, 0, 0, 0, 0],
]


@pytest.mark.parametrize("row", HOSTILE, ids=repr)
def test_figures_that_contradict_themselves_are_refused(row: list[float]) -> None:
    assert read_figures(STUDY, np.array([GOOD, GOOD], np.float32))[0] is not None
    for rows in ([row, GOOD], [GOOD, row]):
        with pytest.raises(MessageMalformed):
            read_figures(STUDY, np.array(rows, np.float32))


def test_figures_of_another_number_of_targets_are_refused() -> None:
    for shape in ((1, 7), (3, 7), (2, 5), (2, 6), (2, 8), (14,), (2, 7, 1)):
        with pytest.raises(MessageMalformed, match="targets"):
            read_figures(STUDY, np.full(shape, -1.0, np.float32))
