"""Errors of a predicted number: sums of sites against the union's raw values, figures against numpy, scikit-learn and Lin."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

from models import contributions, learning, networks, regression, tasks
from models.contributions import Contribution, Sheet
from models.metrics import ScoreHistogram
from models.sections import Regression
from models.study import Study
from models.subgroups import Scored
from privacy import dpsgd
from privacy.errors import MessageMalformed, StudyConflict

TASK = Regression(kind="regression", targets=["extent"], range=[-2, 6], unit="points")
UNHURRIED = settings(max_examples=40, deadline=None)
Float64 = NDArray[np.float64]


def made_study(**change: Any) -> Study:
    return Study.model_validate(
        {
            "name": "extent",
            "title": "Extent",
            "purpose": "a test",
            "task": TASK.model_dump(),
            "images": {"size_px": 32},
            "network": {"name": "linear"},
            "training": {"rounds": 5, "batch_size": 8, "learning_rate": 0.05, "schedule": "constant", "balance": False},
            "protection": "plain",
            "privacy": "none",
            "participation": {"sites": ["north"], "quorum": 1},
        }
        | change
    )


def scored(images: int, seed: int = 0, patients: int | None = None) -> Scored:
    """Predictions near their references, on the grid of the sums, so that nothing is rounded."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, regression.STEPS + 1, (images, 1)) / regression.STEPS
    near = np.clip(
        np.rint((truth * 0.7 + 0.2 + rng.normal(0, 0.1, truth.shape)) * regression.STEPS) / regression.STEPS, 0, 1
    )
    owners = np.arange(images) % (patients or max(1, images))
    return Scored(near.astype(np.float32), truth.astype(np.float32), np.ones_like(truth, np.float32), owners)


def in_unit(its: Scored) -> tuple[Float64, Float64]:
    low, high = TASK.range
    return low + (high - low) * its.targets[:, 0].astype(float), low + (high - low) * its.scores[:, 0].astype(float)


def lin(truth: Float64, predicted: Float64) -> float:
    shared = np.mean((truth - truth.mean()) * (predicted - predicted.mean()))
    return float(2 * shared / (truth.var() + predicted.var() + (truth.mean() - predicted.mean()) ** 2))


@UNHURRIED
@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(0, 99))
def test_sums_of_sites_are_exactly_those_of_the_union(sizes: list[int], seed: int) -> None:
    parts = [scored(size, seed + place) for place, size in enumerate(sizes)]
    whole = Scored(
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("scores", "targets", "known", "patients")
        )
    )
    total = sum((regression.sums_of(part) for part in parts), np.zeros(regression.SUMS, np.int64))
    assert np.array_equal(total, regression.sums_of(whole))
    found = regression.agreement(TASK, regression.read(total, sum(sizes)))
    if not sum(sizes):
        assert found is None
        return
    assert found is not None
    truth, predicted = in_unit(whole)
    assert found["images"] == sum(sizes)
    assert found["mae"] == pytest.approx(mean_absolute_error(truth, predicted), abs=1e-9)
    assert found["rmse"] == pytest.approx(root_mean_squared_error(truth, predicted), abs=1e-7)
    assert found["bias"] == pytest.approx((predicted - truth).mean(), abs=1e-9)
    if truth.std() == 0:
        assert found["r2"] is None and found["concordance"] is None
    else:
        assert found["r2"] == pytest.approx(r2_score(truth, predicted), abs=1e-6)
        assert found["concordance"] == pytest.approx(lin(truth, predicted), abs=1e-6)


def test_rounding_to_the_grid_moves_a_mean_error_by_less_than_it_says() -> None:
    rng = np.random.default_rng(2)
    truth, near = rng.random((500, 1)), rng.random((500, 1))
    its = Scored(near.astype(np.float32), truth.astype(np.float32), np.ones_like(truth, np.float32), np.arange(500))
    found = regression.agreement(TASK, regression.sums_of(its))
    assert found is not None
    assert abs(found["mae"] - 8 * np.abs(truth - near).mean()) < 8 * regression.UNIT


def test_an_image_without_a_reference_is_in_no_sum_and_values_outside_are_clipped() -> None:
    its = scored(3)
    its.known[1], its.targets[1], its.scores[2] = 0, np.nan, 7.0
    n, _, _, _, predicted, _, _ = regression.sums_of(its).tolist()
    assert n == 2 and predicted == round(float(its.scores[0, 0]) * 4096) + 4096


HOSTILE: dict[str, tuple[int, int]] = {
    "more images than there are": (0, 1000),
    "a negative count": (0, -1),
    "no image": (0, 0),
    "an error larger than the values": (1, 10**9),
    "no error": (1, 0),
    "references beyond the range": (2, 10**9),
    "squares of nothing": (3, 0),
    "squares beyond the range": (3, 2**40),
    "predictions that no square has": (4, 2**33),
    "squares of predictions": (5, 0),
    "a product that no values have": (6, 2**40),
    "a product below zero": (6, -5),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_sums_that_no_images_have_are_refused(name: str) -> None:
    good = regression.sums_of(scored(30))
    assert np.array_equal(regression.read(good, 30), good)
    place, value = HOSTILE[name]
    bad = good.copy()
    bad[place] = value
    with pytest.raises(MessageMalformed, match="contradict"):
        regression.read(bad, 30)


def test_intervals_of_sums_cover_what_they_say() -> None:
    """Two hundred samples of one known population: error, bias and concordance are in nearly all of their intervals."""
    rng = np.random.default_rng(5)

    def sample(size: int) -> Scored:
        truth = np.clip(rng.normal(0.5, 0.12, (size, 1)), 0, 1)
        near = np.clip(truth + rng.normal(0.02, 0.06, truth.shape), 0, 1)
        return Scored(
            near.astype(np.float32), truth.astype(np.float32), np.ones_like(truth, np.float32), np.arange(size)
        )

    whole = regression.agreement(TASK, regression.sums_of(sample(200_000)))
    assert whole is not None
    inside = dict.fromkeys(("mae", "bias", "concordance"), 0)
    for _ in range(200):
        found = regression.agreement(TASK, regression.sums_of(sample(120)))
        assert found is not None
        for name in inside:
            low, high = found["intervals"][name]
            inside[name] += low <= whole[name] <= high
    assert all(180 <= count <= 199 for count in inside.values()), inside


def test_a_site_releases_figures_of_ten_patients_and_their_bootstrap_counts_patients() -> None:
    its = scored(60, patients=20)
    row = regression.released(TASK, its, 1)
    assert row is not None and row.shape == (regression.COLUMNS,)
    found = regression.read_released(TASK, row)
    truth, predicted = in_unit(its)
    assert found["mae"] == pytest.approx(mean_absolute_error(truth, predicted), abs=1e-3) and found["images"] == 60
    assert found["concordance"] == pytest.approx(lin(truth, predicted), abs=1e-3)
    # Twenty patients, each of them three times: as wide as twenty images, not as sixty.
    twenty = scored(20)
    thrice = Scored(
        *(np.concatenate([part] * 3) for part in (twenty.scores, twenty.targets, twenty.known, twenty.patients))
    )
    one, three = (regression.released(TASK, part, 1) for part in (twenty, thrice))
    assert one is not None and three is not None
    np.testing.assert_allclose(one[:-1], three[:-1], atol=2e-3)


@pytest.mark.parametrize("its", [scored(9), scored(60, patients=9), scored(0)], ids=["images", "patients", "none"])
def test_fewer_than_ten_stay(its: Scored) -> None:
    study = made_study()
    assert regression.released(TASK, its, 1) is None
    rows = contributions.figures(study, its, release=True)
    assert (rows == -1).all() and contributions.read_number(study, rows) is None
    assert (regression.told(its, private=True) == 0).all()
    assert np.array_equal(regression.told(its, private=False), regression.sums_of(its))


def test_references_of_one_value_have_no_agreement_and_are_not_released() -> None:
    its = scored(40)
    its.targets[:] = 0.5
    assert regression.released(TASK, its, 1) is None
    found = regression.agreement(TASK, regression.sums_of(its))
    assert found is not None and found["r2"] is None and found["concordance"] is None and found["mae"] > 0


def test_figures_leave_only_if_site_and_study_agree() -> None:
    its = scored(60)
    assert (contributions.figures(made_study(), its, release=False) == -1).all()
    assert (contributions.figures(made_study(evaluation={"site_figures": False}), its, release=True) == -1).all()
    assert contributions.read_number(made_study(), contributions.figures(made_study(), its, release=True)) is not None


@pytest.mark.parametrize("place", range(regression.COLUMNS))
@pytest.mark.parametrize("value", [np.nan, np.inf, -50.0, 50.0])
def test_released_figures_that_contradict_themselves_are_refused(place: int, value: float) -> None:
    row = contributions.figures(made_study(), scored(60), release=True)
    row[0, place] = value
    if place == regression.COLUMNS - 1 and value == 50:
        row[0, place] = 55.0  # 50 images are fewer, and a count in tens
    # R2 has no least value: only its greater end is bounded.
    if regression.FIGURES[min(place // 3, 4)] == "r2" and place % 3 == 1 and value == -50:
        return
    with pytest.raises(MessageMalformed):
        contributions.read_number(made_study(), row)


def test_figures_of_another_shape_are_refused() -> None:
    for shape in ((1, 7), (2, regression.COLUMNS), (regression.COLUMNS,)):
        with pytest.raises(MessageMalformed):
            contributions.read_number(made_study(), np.full(shape, -1.0, np.float32))


# On its way, and in training ----------------------------------------------------------------------------------------------


def test_what_a_site_adds_is_read_back() -> None:
    study, its = made_study(), scored(30)
    sheet = Sheet(30, 30, 0.25, ScoreHistogram.empty(1, study.evaluation.bins))
    groups = contributions.Groups.empty(study)
    given = Contribution(40, sheet, groups=groups, grades=np.zeros((0, 0), np.int64), errors=regression.sums_of(its))
    numbers = given.counts("test")
    assert numbers.shape == (contributions.count_of(study, "test"),)
    found = contributions.read(study, "test", np.zeros(0), numbers)
    assert found.errors is not None and np.array_equal(found.errors, regression.sums_of(its))
    numbers[-1] = 2**40
    with pytest.raises(MessageMalformed):
        contributions.read(study, "test", np.zeros(0), numbers)
    private = made_study(privacy={"epsilon": 8, "clip_norm": 1.0, "sampling_rate": 0.5, "noise_multiplier": 1.0})
    few = Sheet(9, 30, 0.25, sheet.histogram)
    assert contributions.suppressed(private, few).images == 0 and contributions.suppressed(private, sheet) == sheet


def test_the_loss_is_hubers_of_the_place_in_the_range() -> None:
    logits, target = (
        torch.tensor([[0.0], [2.0], [-3.0]], dtype=torch.float64),
        torch.tensor([[0.4], [0.1], [9.0]]).double(),
    )
    known = torch.tensor([[1.0], [1.0], [0.0]])
    expected = []
    for z, y in ((0.0, 0.4), (2.0, 0.1)):
        error = abs(1 / (1 + np.exp(-z)) - y)
        expected.append((error**2 / 2 if error <= 0.25 else 0.25 * (error - 0.125)) / 0.0625)
    found = tasks.loss(logits, target, known, torch.ones(1, 2), tasks.distance)
    assert float(found) == pytest.approx(sum(expected) / 2, rel=1e-6)
    each = tasks.unit_losses(logits[:, None], target[:, None], known[:, None], tasks.distance)
    np.testing.assert_allclose(each.numpy(), [*expected, 0.0], rtol=1e-6)


def made_cohort(count: int = 32) -> Any:
    """Grey pictures whose brightness is the number."""
    g = torch.Generator().manual_seed(3)
    truth = torch.rand(count, 1, generator=g)
    images = (truth[:, :, None, None] * 0.8 + 0.1 * torch.rand(count, 1, 32, 32, generator=g)).clamp(0, 1)
    return SimpleNamespace(images=images, targets=truth, known=torch.ones(count, 1), patients=torch.arange(count) // 2)


def test_a_round_learns_a_number() -> None:
    plan = {
        "rounds": 5,
        "batch_size": 8,
        "local_epochs": 30,
        "learning_rate": 0.1,
        "augmentation": "none",
        "balance": True,
    }
    study, cohort = made_study(training=plan), made_cohort()
    net = networks.build(study)
    before = learning.evaluation_loss(learning.predict(net, cohort), cohort, "regression")
    learning.learn(net, cohort, study, round_number=3)
    scores = learning.predict(net, cohort)
    assert learning.evaluation_loss(scores, cohort, "regression") < before / 4
    assert np.abs(scores - cohort.targets.numpy()).mean() < 0.1


def test_private_patients_are_clipped_by_the_loss_of_the_number() -> None:
    study = made_study(privacy={"epsilon": 8, "clip_norm": 1.0, "sampling_rate": 0.5, "noise_multiplier": 1.0})
    net, cohort = networks.build(study).train(), made_cohort(6)
    given = [
        learning.unit(cohort, rows, study, torch.Generator().manual_seed(1))
        for rows in learning.labelled_patients(cohort)
    ]
    dpsgd.check_isolation(net, learning.losses_of(study), given)
    [norm] = dpsgd.LoopEngine(net, learning.losses_of(study)).norms(given[:1])
    net.zero_grad()
    error = torch.sigmoid(net(given[0][0][0])) - given[0][1][0]
    torch.where(error.abs() <= 0.25, error**2 / 2, 0.25 * (error.abs() - 0.125)).div(0.0625).mean().backward()
    expected = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]).norm()
    assert norm == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"evaluation": {"subgroups": ["sex"]}}, "leave the subgroups out"),
        (
            {
                "privacy": {"epsilon": 8, "clip_norm": 1.0, "sampling_rate": 0.5, "figures": "noised"},
                "evaluation": {"select": "last", "site_figures": False, "bins": 50},
            },
            "say suppressed",
        ),
    ],
)
def test_what_has_no_meaning_for_a_number_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(StudyConflict, match=says):
        made_study(**change).check()


@pytest.mark.parametrize("given_range", [[5, 5], [6, 2], [0, float("inf")], [float("nan"), 2], [0]])
def test_ranges_that_are_none_are_refused(given_range: list[float]) -> None:
    with pytest.raises(ValueError, match=r"rising|at least 2"):
        made_study(task=TASK.model_dump() | {"range": given_range})
