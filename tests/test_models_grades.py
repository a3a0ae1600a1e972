"""Agreement on a scale of grades against scikit-learn, and against all pairs of images."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from sklearn.metrics import cohen_kappa_score

from models.grades import agreement, read, table_of
from models.subgroups import Scored
from privacy.errors import MessageMalformed

UNHURRIED = settings(max_examples=30, deadline=None)

Int = NDArray[np.int64]
tables = st.integers(3, 5).flatmap(
    lambda grades: hnp.arrays(np.int64, (grades, grades), elements=st.sampled_from([0, 0, 1, 2, 5]))
)


def images_of(table: Int) -> list[tuple[int, int]]:
    """(reference grade, called grade) of each image."""
    return [(row, column) for row, column in np.ndindex(*table.shape) for _ in range(int(table[row, column]))]


def told(table: Int) -> dict[str, Any]:
    found = agreement(table)
    assert found is not None
    return found


@UNHURRIED
@given(tables)
def test_agreement_is_scikit_learns_kappa_and_what_all_pairs_of_images_say(table: Int) -> None:
    images = images_of(table)
    if not images:
        assert agreement(table) is None
        return
    found = told(table)
    truth, called = zip(*images, strict=True)
    if set(truth) == set(called) and len(set(truth)) == 1:
        assert found["kappa"] is None and found["interval"] is None
    else:
        expected = cohen_kappa_score(truth, called, weights="quadratic", labels=list(range(len(table))))
        assert found["kappa"] == pytest.approx(expected, abs=1e-9)
    assert found["images"] == len(images) and found["table"] == table.tolist()
    assert found["mae"] == pytest.approx(sum(abs(a - b) for a, b in images) / len(images))
    pairs = [(x, y) for x in images for y in images if x[0] < y[0]]
    right = sum(1.0 if x[1] < y[1] else 0.5 if x[1] == y[1] else 0.0 for x, y in pairs)
    assert found["concordance"] == (pytest.approx(right / len(pairs)) if pairs else None)


def test_perfect_and_reversed_agreement_are_one_and_minus_one() -> None:
    assert {key: told(np.diag([20, 20, 20]))[key] for key in ("kappa", "mae", "concordance")} == {
        "kappa": 1.0,
        "mae": 0.0,
        "concordance": 1.0,
    }
    turned = told(np.fliplr(np.diag([20, 20, 20])))
    assert turned["kappa"] == pytest.approx(-1.0) and turned["concordance"] == 0.0
    assert turned["mae"] == pytest.approx(4 / 3)


def test_the_interval_is_that_of_a_bootstrap_over_images_and_always_the_same() -> None:
    """Oracle: images drawn one by one, scikit-learn on each draw."""
    table = np.array([[40, 12, 3], [9, 30, 11], [2, 8, 35]])
    images, rng = np.array(images_of(table)), np.random.default_rng(8)
    drawn = [images[rng.integers(len(images), size=len(images))] for _ in range(400)]
    kappas = [cohen_kappa_score(*rows.T, weights="quadratic", labels=[0, 1, 2]) for rows in drawn]
    found = told(table)
    assert found["interval"] == pytest.approx(np.percentile(kappas, [2.5, 97.5]), abs=0.02)
    assert found["interval"][0] < found["kappa"] < found["interval"][1]
    assert found == told(table)


def test_no_interval_where_too_many_draws_have_no_kappa() -> None:
    found = told(np.array([[30, 0, 0], [0, 1, 0], [0, 0, 0]]))
    assert found["kappa"] == 1.0 and found["interval"] is None  # one draw in three lacks the second image


# What a site counts --------------------------------------------------------------------------------------------------


@UNHURRIED
@given(st.integers(0, 2**32 - 1), st.integers(0, 80), st.integers(2, 4))
def test_an_image_is_counted_by_the_steps_that_hold_and_the_steps_scored_a_half_or_more(
    seed: int, images: int, steps: int
) -> None:
    rng = np.random.default_rng(seed)
    grades = rng.integers(0, steps + 1, images)
    targets = (np.arange(1, steps + 1) <= grades[:, None]).astype(float)
    known = (rng.random((images, steps)) > 0.1).astype(float)
    targets[known == 0] = np.nan
    scores = np.sort(rng.choice([0.0, 0.3, np.nextafter(0.5, 0), 0.5, 0.7, 1.0], (images, steps)), axis=1)[:, ::-1]
    expected: Counter[tuple[int, int]] = Counter()
    for place in range(images):
        if all(known[place]):
            expected[int(grades[place]), sum(score >= 0.5 for score in scores[place])] += 1
    table = table_of(Scored(scores, targets, known, np.zeros(images, np.int64)))
    assert table.dtype == np.int64 and table.shape == (steps + 1, steps + 1)
    assert {place: int(table[place]) for place in np.ndindex(*table.shape) if table[place]} == dict(expected)


def test_the_sum_of_tables_is_read_back_and_a_contradiction_is_refused() -> None:
    first, second = np.arange(9).reshape(3, 3), np.eye(3, dtype=np.int64)
    total = int((first + second).sum())
    assert (read(3, first.ravel() + second.ravel(), total) == first + second).all()
    assert read(0, np.zeros(0, np.int64), 5).size == 0
    hostile: list[tuple[list[int], int]] = [
        ([1] * 9, 8),
        ([1] * 8, 100),
        ([1] * 10, 100),
        ([9] * 8 + [-1], 100),
        ([0] * 8 + [2**40], 100),
    ]
    for numbers, images in hostile:
        with pytest.raises(MessageMalformed):
            read(3, np.array(numbers, np.int64), images)
    with pytest.raises(MessageMalformed):
        read(3, first, total)
