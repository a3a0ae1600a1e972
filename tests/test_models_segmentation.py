"""Figures of outlines against MONAI's own, the rule of empty masks, sums that are exact over sites, and what is never told."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.losses import DiceLoss
from monai.metrics import DiceMetric, compute_hausdorff_distance, compute_surface_dice

from models import contributions, segmentation, tasks
from models.segmentation import COLUMNS, NOT_RELEASED, Cases, Overlaps, compare, figures, read_figures
from models.study import Study
from privacy.errors import MessageMalformed, StudyConflict

QUICK = settings(max_examples=25, deadline=None)


def made_study(**change: Any) -> Study:
    facts: dict[str, Any] = {
        "name": "s",
        "title": "t",
        "purpose": "p",
        "task": {"kind": "segmentation", "targets": ["lungs", "lesion"]},
        "images": {"size_px": 32},
        "network": {"name": "unet"},
        "training": {"rounds": 1},
        "protection": "plain",
        "privacy": "none",
        "participation": {"sites": ["north"], "quorum": 1},
    }
    return Study.model_validate(facts | change)


STUDY = made_study()


def blob(seed: int, shape: tuple[int, ...] = (24, 20)) -> np.ndarray[Any, np.dtype[np.bool_]]:
    rng = np.random.default_rng(seed)
    at = np.stack(np.meshgrid(*[np.arange(side) for side in shape], indexing="ij"))
    middle = np.array([rng.uniform(0.2, 0.8) * side for side in shape])
    reach = np.array([rng.uniform(0.12, 0.4) * side for side in shape])
    away = (at - middle.reshape(-1, *[1] * len(shape))) / reach.reshape(-1, *[1] * len(shape))
    found: np.ndarray[Any, np.dtype[np.bool_]] = (away**2).sum(axis=0) < 1
    return found


def of(*masks: Any) -> list[torch.Tensor]:
    return [torch.from_numpy(mask)[None, None].float() for mask in masks]


# Figures of a case ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24, 20), (12, 10, 14)], ids=["2d", "3d"])
def test_figures_of_a_case_are_those_of_monai(shape: tuple[int, ...]) -> None:
    spacing = [2.0, 1.5, 0.7][: len(shape)]
    for seed in range(8):
        found, truth = blob(seed, shape), blob(seed + 100, shape)
        dice, surface, hd95 = compare(found, truth, spacing, 2.5)
        ours, theirs = of(found, truth)
        assert dice == pytest.approx(float(DiceMetric(include_background=True)(ours, theirs)), abs=1e-6)
        away = compute_hausdorff_distance(ours, theirs, include_background=True, percentile=95, spacing=spacing)
        assert hd95 == pytest.approx(float(away), abs=1e-4)
        within = compute_surface_dice(ours, theirs, [2.5], include_background=True, spacing=spacing)
        assert surface == pytest.approx(float(within), abs=1e-6)


def test_a_mask_at_the_edge_of_the_grid_has_its_surface_there() -> None:
    """Cropped to the box of both masks or not, nothing changes."""
    found, truth = np.zeros((16, 16), bool), np.zeros((16, 16), bool)
    found[:5, :5], truth[:7, :4] = True, True
    ours, theirs = of(found, truth)
    away = compute_hausdorff_distance(ours, theirs, include_background=True, percentile=95)
    assert compare(found, truth, [1, 1], 1.0)[2] == pytest.approx(float(away))


def test_masks_that_agree_and_a_shift_of_known_millimetres() -> None:
    truth = np.zeros((20, 20), bool)
    truth[5:10, 5:10] = True
    assert compare(truth, truth, [3, 4], 1.0) == (1.0, 1.0, 0.0)
    dice, surface, hd95 = compare(np.roll(truth, 2, axis=0), truth, [3, 4], 6.0)
    assert (dice, surface, hd95) == (pytest.approx(0.6), 1.0, 6.0)


def test_empty_masks_follow_the_rule() -> None:
    some, none = blob(1), np.zeros((24, 20), bool)
    dice, surface, hd95 = compare(none, none, [1, 1], 3)
    assert dice == 1 and math.isnan(surface) and math.isnan(hd95)
    for found, truth in ((some, none), (none, some)):
        dice, surface, hd95 = compare(found, truth, [1, 1], 3)
        assert (dice, surface) == (0, 0) and math.isnan(hd95)


def test_without_a_pixel_size_there_are_no_millimetres() -> None:
    dice, surface, hd95 = compare(blob(1), blob(2), [math.nan, math.nan], 3)
    assert 0 < dice < 1 and math.isnan(surface) and math.isnan(hd95)
    assert math.isnan(compare(blob(1), np.zeros((24, 20), bool), [math.nan, 1], 3)[1])


# Sums ----------------------------------------------------------------------------------------------------------------


def cases(images: int, seed: int = 0, structures: int = 2, known: float = 0.8, each: int = 1) -> Cases:
    """Blobs with and without a partner, some not annotated; `each` images of a patient."""
    rng = np.random.default_rng(seed)
    made = Cases.empty(images, structures, np.arange(images) // each)
    for row in range(images):
        masks = [
            np.stack([blob(int(rng.integers(1000))) * (rng.random() < 0.8) for _ in range(structures)])
            for _ in range(2)
        ]
        made.put(row, (masks[0], masks[1]), rng.random(structures) < known, ([2.0, 1.0], 3.0))
    return made


def part(whole: Cases, rows: Any) -> Cases:
    return Cases(*(getattr(whole, name)[rows] for name in Cases.__dataclass_fields__))


WHOLE = cases(60)


@QUICK
@given(st.integers(0, 60), st.integers(0, 60))
def test_the_sum_over_sites_is_that_of_all_their_cases_bit_for_bit(first: int, second: int) -> None:
    ends = sorted((first, second))
    parts = [part(WHOLE, slice(*pair)) for pair in ((0, ends[0]), (ends[0], ends[1]), (ends[1], 60))]
    total = sum((Overlaps.of(one).counts for one in parts), np.zeros((2, len(COLUMNS)), np.int64))
    assert (total[:, 1:] == Overlaps.of(WHOLE).counts[:, 1:]).all()
    assert (total[:, 0] <= 3).all() and (total[:, 0] >= 1).all()


def test_means_and_intervals_follow_from_the_sums() -> None:
    """Oracle: numpy on the figures of the cases."""
    sums = Overlaps.of(WHOLE)
    for structure in range(2):
        for measure in segmentation.MEASURES:
            values = WHOLE.rows(structure, measure)[0]
            found = sums.mean(structure, measure)
            assert found is not None and found[1] is not None
            assert found[0] == pytest.approx(values.mean(), abs=1e-3)
            reach = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
            assert found[1][1] - found[0] == pytest.approx(reach, abs=2e-3) or found[1][1] == 1.0
        row = sums.row(structure)
        known = WHOLE.known[:, structure]
        assert row["cases"] == known.sum()
        assert row["missed"] == (known & WHOLE.present[:, structure] & ~WHOLE.found[:, structure]).sum()
        assert row["surface_cases"] == row["cases"] - row["both_empty"]
        assert row["distance_cases"] == row["surface_cases"] - row["missed"] - row["invented"]
    assert Overlaps.empty(1).mean(0, "dice") is None
    assert Overlaps.of(part(WHOLE, slice(0, 0))).counts.sum() == 0


def test_sums_survive_json_and_nothing_else_is_one() -> None:
    sums = Overlaps.of(WHOLE)
    assert (Overlaps.from_json(sums.to_json()).counts == sums.counts).all()
    good = sums.to_json()
    for bad in (None, 3, [good[0][:-1]], [[0.5] * 13], [[True] * 13], [[-1] * 13], [[2**63] * 13], [good[0], None]):
        with pytest.raises(MessageMalformed):
            Overlaps.from_json(bad)


@pytest.mark.parametrize(
    "change",
    [
        {"sites": 0}, {"sites": 61}, {"cases": 1}, {"cases": -1}, {"dice": 2**40}, {"dice": 0},
        {"both_empty": 60}, {"missed": 60}, {"invented": 60},
        {"dice_squares": 2**40}, {"surface_cases": 61}, {"surface_cases": 0}, {"surface": 2**40}, {"distance_cases": 60},
        {"surface_squares": 2**40}, {"distance": 2**40}, {"distance_squares": 2**62},
    ],
    ids=repr,
)  # fmt: skip
def test_sums_that_no_cases_can_have_are_refused(change: dict[str, int]) -> None:
    counts = Overlaps.of(WHOLE).counts.copy()
    for name, value in change.items():
        counts[0, COLUMNS.index(name)] = value
    with pytest.raises(MessageMalformed):
        Overlaps(counts)


def test_of_a_masked_run_no_structure_of_fewer_than_three_sites_is_kept() -> None:
    """What one site alone annotates is that site's own sum, and what two do is told to each of them of the other."""
    counts = Overlaps.of(WHOLE).counts * 3
    counts[1, 0] = 2
    masked = made_study(protection="masked", participation={"sites": ["a", "b", "c"], "quorum": 3})
    kept = Overlaps(counts).kept(masked).counts
    assert (kept[0] == counts[0]).all() and not kept[1].any()
    assert (Overlaps(counts).kept(STUDY).counts == counts).all()
    assert Overlaps(counts).require_of(3).counts is not None
    with pytest.raises(MessageMalformed, match="tell of a structure"):
        Overlaps(counts).require_of(2)


def test_of_fewer_than_ten_cases_or_patients_nothing_goes_into_a_sum() -> None:
    few, same = cases(9, known=1.1), cases(40, known=1.1, each=5)
    assert not Overlaps.of(few).told(STUDY, few).counts.any()
    assert not Overlaps.of(same).told(STUDY, same).counts.any()  # 40 images of 8 patients
    enough = cases(10, known=1.1)
    assert (Overlaps.of(enough).told(STUDY, enough).counts == Overlaps.of(enough).counts).all()
    half = cases(30, known=1.1)
    half.known[9:, 1] = False
    told = Overlaps.of(half).told(STUDY, half).counts
    assert told[0].any() and not told[1].any()


def test_under_differential_privacy_few_with_or_without_a_structure_are_not_told_either() -> None:
    private = made_study(privacy={"epsilon": 8, "clip_norm": 1, "sampling_rate": 0.2}, strategy={"name": "fedavg"})
    some = cases(30, known=1.1)
    some.present[:, 0], some.present[:, 1] = np.arange(30) < 12, np.arange(30) < 25
    told = Overlaps.of(cases(0)).counts  # only shapes
    told = (
        Overlaps(np.where(np.ones((2, 1)), Overlaps.of(cases(30, known=1.1)).counts, told)).told(private, some).counts
    )
    assert told[0].any() and not told[1].any()
    some.present[:, 1] = True
    assert Overlaps.of(cases(30, known=1.1)).told(private, some).counts[1].any()


def test_a_contribution_is_read_back_from_its_sum() -> None:
    """Through the same door as histograms: counts in, sheet out, and contradictions refused."""
    parts = [cases(20, seed) for seed in (1, 2, 3)]
    sheets = [
        contributions.Sheet(20, 20, 0.5, contributions.empty_sheet(STUDY).histogram, Overlaps.of(one)) for one in parts
    ]
    counts = np.sum([contributions.Contribution(25, sheet).counts("evaluate") for sheet in sheets], axis=0)
    assert counts.shape == (contributions.count_of(STUDY, "evaluate"),) == (4 + 2 * len(COLUMNS),)
    found = contributions.read(STUDY, "evaluate", np.zeros(0), counts).sheet
    assert found.overlaps is not None
    assert (found.overlaps.counts == sum(Overlaps.of(one).counts for one in parts)).all()
    counts[2] = 10  # fewer images than cases
    with pytest.raises(MessageMalformed):
        contributions.read(STUDY, "evaluate", np.zeros(0), counts)


def test_a_private_sum_tells_images_in_tens_and_nothing_of_few_patients() -> None:
    private = made_study(privacy={"epsilon": 8, "clip_norm": 1, "sampling_rate": 0.2})
    its = cases(37, known=1.1)
    its.present[:] = True
    sheet = contributions.Sheet(37, 37, 0.5, contributions.empty_sheet(private).histogram, Overlaps.of(its))
    told = contributions.suppressed(private, sheet)
    assert (told.patients, told.images) == (30, 30) and told.overlaps is not None and told.overlaps.counts.any()
    counts = contributions.Contribution(30, told).counts("evaluate")
    assert contributions.read(private, "evaluate", np.zeros(0), counts).sheet.images == 30  # and 37 cases
    few = contributions.Sheet(9, 37, 0.5, sheet.histogram, sheet.overlaps)
    assert not contributions.Contribution(0, contributions.suppressed(private, few)).counts("evaluate").any()
    silent = contributions.Sheet(37, 37, 0.5, sheet.histogram, Overlaps.empty(2))
    assert not contributions.Contribution(0, contributions.suppressed(private, silent)).counts("evaluate").any()


# Figures of a site ---------------------------------------------------------------------------------------------------


def test_a_site_releases_means_with_intervals_over_its_patients() -> None:
    its = cases(40, known=1.1)
    rows = figures(2, its, 1)
    told = read_figures(2, rows)
    for structure, figure in enumerate(told):
        assert figure is not None and figure["cases"] == 40
        for name, measure in zip(segmentation.NAMES, segmentation.MEASURES, strict=True):
            assert figure[name][0] == pytest.approx(its.rows(structure, measure)[0].mean(), abs=6e-4)
            assert figure[name][1] < figure[name][0] < figure[name][2]
    assert (figures(2, its, 1) == rows).all()


def test_images_of_nine_patients_release_nothing() -> None:
    rows = figures(2, cases(45, known=1.1, each=5), 1)
    assert (rows == NOT_RELEASED).all() and read_figures(2, rows) == [None, None]
    its = cases(30, known=1.1)
    its.distance[5:, 0] = np.nan  # HD95 of five cases
    first = read_figures(2, figures(2, its, 1))[0]
    assert first is not None and first["hd95_mm"] is None and first["dice"] is not None


GOOD = [0.8, 0.7, 0.9, 0.6, 0.5, 0.7, 4.0, 3.0, 5.0, 20]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (0, 1.2),
        (0, 0.6),
        (1, 0.85),
        (2, 0.75),
        (0, math.nan),
        (3, -1),
        (6, -1),
        (6, 2000),
        (9, 9),
        (9, 15),
        (9, 0),
        (9, 10.5),
    ],
)
def test_figures_that_contradict_themselves_are_refused(place: int, value: float) -> None:
    read_figures(1, np.array([GOOD], np.float32))
    row = [*GOOD]
    row[place] = value
    with pytest.raises(MessageMalformed):
        read_figures(1, np.array([row], np.float32))
    with pytest.raises(MessageMalformed):
        read_figures(2, np.array([GOOD], np.float32))


# The loss ------------------------------------------------------------------------------------------------------------


def test_the_loss_is_cross_entropy_and_dice_of_each_structure() -> None:
    """Oracles: torch's own cross-entropy, and MONAI's Dice loss with the same voxel in the denominator."""
    logits = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    masks = (torch.rand(3, 2, 8, 8, generator=torch.Generator().manual_seed(2)) > 0.6).float()
    found = tasks.mask_losses(logits, masks)
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, masks, reduction="none").mean(dim=(2, 3))
    dice = DiceLoss(sigmoid=True, reduction="none", smooth_nr=0, smooth_dr=1)(logits, masks).flatten(1)
    assert torch.allclose(found, entropy + dice, atol=1e-6)


def test_an_empty_mask_has_no_dice_loss_and_what_is_not_annotated_none_at_all() -> None:
    logits, masks = torch.randn(2, 2, 8, 8), torch.zeros(2, 2, 8, 8)
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, masks, reduction="none").mean(dim=(2, 3))
    assert torch.allclose(tasks.mask_losses(logits, masks), entropy)
    known = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    masks[0, 1] = 1  # stands where nobody annotated
    assert float(tasks.mask_loss(logits, masks, known)) == pytest.approx(float(entropy[0, 0]))
    assert float(tasks.mask_loss(logits, masks, torch.zeros(2, 2))) == 0
    with pytest.raises(MessageMalformed):
        tasks.mask_losses(logits, masks[:, :1])


# Settings ------------------------------------------------------------------------------------------------------------

CONFLICTS: list[tuple[dict[str, Any], str]] = [
    ({"network": {"name": "small_cnn"}}, "small_cnn gives one score for an image"),
    ({"network": {}}, "needs unet or segresnet"),
    ({"task": {"targets": ["lungs"]}, "training": {"rounds": 1}}, "unet outlines structures"),
    ({"images": {"size_px": 36}}, "multiples of 8"),
    ({"training": {"rounds": 1, "balance": True}}, "training.balance has no meaning"),
    ({"evaluation": {"bins": 50}}, "evaluation.bins has no meaning"),
    ({"evaluation": {"subgroups": ["sex"]}}, "evaluation.subgroups divides histograms"),
    (
        {
            "privacy": {"epsilon": 8, "clip_norm": 1, "sampling_rate": 0.2, "figures": "noised"},
            "evaluation": {"select": "last", "site_figures": False},
        },
        "privacy.figures: noised puts noise on histograms",
    ),
]


@pytest.mark.parametrize(("change", "sentence"), CONFLICTS, ids=[sentence for _, sentence in CONFLICTS])
def test_what_cannot_go_together_is_refused_in_a_sentence(change: dict[str, Any], sentence: str) -> None:
    STUDY.check()
    with pytest.raises(StudyConflict, match=sentence):
        made_study(**change).check()


def test_a_study_of_outlines_says_so_and_comes_back_from_its_canonical_form() -> None:
    assert Study.from_canonical(STUDY.canonical()) == STUDY
    assert not STUDY.training.balance and STUDY.segments
    assert STUDY.predicts == "outlines of lungs, lesion"
