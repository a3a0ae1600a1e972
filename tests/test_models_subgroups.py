"""Groups of patients: what a site tells is exact, and neither it nor a difference from the whole is of a small group."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError

from models.metrics import ScoreHistogram, bin_of
from models.questions import Observed
from models.sections import Evaluation
from models.study import Study
from models.subgroups import Group, Groups, Scored, groups, size, suppressed
from privacy.errors import MessageMalformed

UNHURRIED = settings(max_examples=50, deadline=None)

BINS = 10
LEAST = 10
Int = NDArray[np.int64]
Labels = tuple[int | None, ...]
KINDS: dict[str, list[Labels]] = {
    "independent": [(0, 0), (0, 1), (1, 0), (1, 1), (1, None), (None, 0), (None, None)],
    "exclusive": [(1, 0, 0), (0, 1, 0), (0, 0, 1), (None, None, None)],
    "ordered": [(0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1), (None, None, None)],
}
DIVISIONS = ["sex", "modality", "age", "sex x modality", "age x sex"]


def made_study(divisions: Sequence[str], relation: str = "independent", targets: int = 0) -> Study:
    names = [f"t{n}" for n in range(targets or len(KINDS[relation][0]))]
    return Study.model_validate(
        {
            "name": "s",
            "title": "t",
            "purpose": "p",
            "task": {"targets": names, "relation": relation},
            "training": {"rounds": 1},
            "protection": "plain",
            "privacy": "none",
            "participation": {"sites": ["north"], "quorum": 1},
            "evaluation": {"bins": BINS, "subgroups": list(divisions)},
        }
    )


@dataclass(frozen=True)
class Image:
    """One image of the test split, as this file thinks of it."""

    patient: int
    labels: Labels
    scores: tuple[float, ...]
    sex: Any = None
    modality: str = ""
    age: float | None = None

    def cell(self, attribute: str) -> str:
        if attribute == "sex":
            return self.sex or "unknown"
        if attribute == "modality":
            return "unknown" if not self.modality else self.modality if self.modality in ("CR", "DX", "CT") else "other"
        if self.age is None:
            return "unknown"
        ends = [(18, "0-17"), (30, "18-29"), (40, "30-39"), (50, "40-49"), (65, "50-64"), (75, "65-74"), (85, "75-84")]
        return next((name for end, name in ends if self.age < end), "85+")

    def cells(self, division: str) -> tuple[str, ...]:
        return tuple(self.cell(attribute) for attribute in division.split(" x "))


def of_class(images: Sequence[Image], target: int, label: int) -> list[Image]:
    return [image for image in images if image.labels[target] == label]


def labelled(images: Sequence[Image], targets: Sequence[int]) -> list[Image]:
    return [image for image in images if any(image.labels[target] is not None for target in targets)]


def large(images: Sequence[Image], targets: Sequence[int], relation: str) -> bool:
    """Ten patients and ten images of each class, and of each grade of a scale."""
    for target in targets:
        absent, present = of_class(images, target, 0), of_class(images, target, 1)
        patients = {image.patient for image in absent + present}
        if min(len(absent), len(present), len(patients)) < LEAST:
            return False
    if relation == "ordered":
        whole = [image for image in images if None not in image.labels]
        return all(
            sum(sum(label or 0 for label in image.labels) == grade for image in whole) >= LEAST
            for grade in range(len(targets) + 1)
        )
    return True


def together(study: Study) -> list[list[int]]:
    every = list(range(len(study.task.targets)))
    return [every] if study.relation != "independent" else [[target] for target in every]


def counted(images: Sequence[Image], targets: int) -> Int:
    counts = np.zeros((targets, 2, BINS), np.int64)
    for image in images:
        for target, label in enumerate(image.labels):
            if label is not None:
                counts[target, label, int(bin_of(np.array(image.scores[target]), BINS))] += 1
    return counts


def told_by(study: Study, images: Sequence[Image], silent: Sequence[int] = ()) -> tuple[Groups, ScoreHistogram]:
    """(what a site with these images tells, the whole it tells beside it), without the targets in `silent`."""
    targets = len(study.task.targets)
    scores = np.array([image.scores for image in images]).reshape(-1, targets)
    labels = np.array([[np.nan if x is None else x for x in image.labels] for image in images]).reshape(-1, targets)
    known = (~np.isnan(labels)).astype(float)
    observed: list[Any] = [
        Observed(
            patient=str(image.patient),
            modality=image.modality,
            sex=image.sex,
            age=None if image.age is None else (image.age, image.age),
        )
        for image in images
    ]
    whole = counted(images, targets)
    whole[list(silent)] = 0
    patients = np.array([image.patient for image in images], np.int64)
    histogram = ScoreHistogram(whole)
    return suppressed(study, Scored(scores, labels, known, patients), observed, histogram), histogram


@st.composite
def sites(draw: st.DrawFn, study: Study) -> list[Image]:
    """A few cells of attributes, each with numbers of images and patients around ten; a patient may be in several cells."""
    kinds, images = KINDS[study.relation], list[Image]()
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    floor = draw(st.sampled_from([0, 8, 10, 10]))
    places = st.tuples(
        st.sampled_from(["F", "M", "O", None]),
        st.sampled_from(["CR", "DX", "CT", "NM", ""]),
        st.sampled_from([None, 0.0, 17.5, 18.0, 64.0, 65.0, 90.0]),
    )
    for number, (sex, modality, age) in enumerate(draw(st.lists(places, min_size=0, max_size=5))):
        pool = draw(st.sampled_from([1, 5, 9, 10, 11, 40, 40, 40]))
        first = 0 if draw(st.booleans()) else 1000 * number  # the same patients as in other cells, or others
        spare = draw(st.sampled_from([0, 1, 3, 15]))
        for kind in kinds:
            for _ in range(max(0, floor + int(rng.integers(-1, 2)) * (spare == 3) + int(rng.integers(0, spare + 1)))):
                scores = tuple(float(score) for score in rng.random(len(kind)))
                images.append(Image(first + int(rng.integers(pool)), kind, scores, sex, modality, age))
    rng.shuffle(images)
    return images


studies = st.builds(
    made_study,
    st.lists(st.sampled_from(DIVISIONS), min_size=1, max_size=3, unique=True),
    st.sampled_from(["independent", "exclusive", "ordered"]),
)
told_sites = studies.flatmap(lambda study: st.tuples(st.just(study), sites(study)))


# What is told, and what follows from it ------------------------------------------------------------------------------


def the_told(study: Study, found: Groups, division: str, target: int) -> set[tuple[str, ...]]:
    return {g.cells for n, g in enumerate(groups(study)) if g.division == division and found.told[n, target]}


@UNHURRIED
@given(told_sites)
def test_every_group_that_is_told_is_large_and_told_exactly(drawn: tuple[Study, list[Image]]) -> None:
    study, images = drawn
    found, _ = told_by(study, images)
    for number, group in enumerate(groups(study)):
        inside = [image for image in images if image.cells(group.division) == group.cells]
        exact = counted(inside, len(study.task.targets))
        for targets in together(study):
            told = {int(found.told[number, target]) for target in targets}
            assert told in ({0}, {1}), "targets that hang together are told together"
            if told == {1}:
                assert large(inside, targets, study.relation)
                assert (found.counts[number, targets] == exact[targets]).all()
            else:
                assert not found.counts[number, targets].any()


@UNHURRIED
@given(told_sites)
def test_what_is_left_of_the_whole_is_nothing_or_large_itself(drawn: tuple[Study, list[Image]]) -> None:
    """One attribute: the whole less any told groups. Images of unknown attributes are in what is left."""
    study, images = drawn
    found, _ = told_by(study, images)
    for division in study.evaluation.subgroups:
        if " x " in division:
            continue
        for targets in together(study):
            told = the_told(study, found, division, targets[0])
            rest = labelled([image for image in images if image.cells(division) not in told], targets)
            if told:
                assert not rest or large(rest, targets, study.relation)
            # No more is kept back than that takes: what is too small, and one group beside it.
            cells = {image.cells(division) for image in images} - {("unknown",)}
            enough = {c for c in cells if large([i for i in images if i.cells(division) == c], targets, study.relation)}
            too_small = labelled([image for image in images if image.cells(division) not in enough], targets)
            if not too_small or large(too_small, targets, study.relation):
                assert enough - told == set() or study.relation == "ordered"
            else:
                assert len(enough - told) <= 1 or study.relation == "ordered"


@UNHURRIED
@given(told_sites)
def test_of_two_attributes_all_groups_are_told_or_none(drawn: tuple[Study, list[Image]]) -> None:
    study, images = drawn
    found, _ = told_by(study, images)
    for division in study.evaluation.subgroups:
        if " x " not in division:
            continue
        for targets in together(study):
            told = the_told(study, found, division, targets[0])
            cells = {image.cells(division) for image in labelled(images, targets)}
            parts = [[image for image in images if image.cells(division) == cell] for cell in cells]
            all_large = all(large(part, targets, study.relation) for part in parts)
            assert told == ({cell for cell in cells if "unknown" not in cell} if all_large else set())


@UNHURRIED
@given(told_sites, st.data())
def test_a_target_that_is_not_in_the_whole_is_told_in_no_group(
    drawn: tuple[Study, list[Image]], data: st.DataObject
) -> None:
    study, images = drawn
    silent = data.draw(st.sets(st.sampled_from(range(len(study.task.targets))), min_size=1))
    everything, _ = told_by(study, images)
    found, _ = told_by(study, images, sorted(silent))
    for targets in together(study):
        if silent & set(targets):
            assert not found.told[:, targets].any() and not found.counts[:, targets].any()
        else:
            assert (found.told[:, targets] == everything.told[:, targets]).all()
            assert (found.counts[:, targets] == everything.counts[:, targets]).all()


@settings(max_examples=40, deadline=None)
@given(studies.flatmap(lambda study: st.tuples(st.just(study), st.lists(sites(study), min_size=1, max_size=3))))
def test_sums_over_sites_are_read_back_exactly(drawn: tuple[Study, list[list[Image]]]) -> None:
    study, parts = drawn
    told = [told_by(study, images) for images in parts]
    numbers = np.sum([found.numbers() for found, _ in told], axis=0)
    whole = ScoreHistogram(np.sum([histogram.counts for _, histogram in told], axis=0))
    assert numbers.dtype == np.int64 and numbers.shape == (size(study),)
    found = Groups.read(study, numbers, whole)
    assert (found.counts == sum(part.counts for part, _ in told)).all()
    assert (found.told == sum(part.told for part, _ in told)).all()
    rows = found.to_json(study)
    assert [(row["division"], row["name"]) for row in rows] == [
        (group.division, group.name) for number, group in enumerate(groups(study)) if found.told[number].any()
    ]
    for row in rows:
        number = groups(study).index(Group(row["division"], tuple(row["name"].split(" x "))))
        assert row["sites"] == found.told[number].tolist() and row["counts"] == found.counts[number].tolist()


# By hand: groups around ten ------------------------------------------------------------------------------------------


def block(positives: int, negatives: int, first: int = 0, patients: int | None = None, **about: Any) -> list[Image]:
    """Images of one target, one of each patient or as many patients as said."""
    labels = [1] * positives + [0] * negatives
    over = patients or len(labels)
    return [Image(first + n % over, (label,), (0.3 + 0.4 * label,), **about) for n, label in enumerate(labels)]


def sexes(*parts: list[Image]) -> set[str]:
    study = made_study(["sex"], targets=1)
    return {cells[0] for cells in the_told(study, told_by(study, list(itertools.chain(*parts)))[0], "sex", 0)}


def test_ten_of_everything_are_told_and_nine_of_anything_are_not() -> None:
    women = block(30, 30, sex="F")
    assert sexes(women, block(10, 10, 100, sex="M")) == {"F", "M"}
    assert sexes(women, block(9, 40, 100, sex="M")) == set()
    assert sexes(women, block(40, 9, 100, sex="M")) == set()
    assert sexes(women, block(40, 40, 100, patients=10, sex="M")) == {"F", "M"}
    assert sexes(women, block(40, 40, 100, patients=9, sex="M")) == set()


def test_the_smallest_group_is_kept_back_beside_one_that_is_too_small() -> None:
    """With M alone kept back, M would be the whole less F and O."""
    women, others, men = block(30, 30, sex="F"), block(15, 15, 100, sex="O"), block(3, 3, 200, sex="M")
    assert sexes(women, others, men) == {"F"}
    assert sexes(women, others, men, block(7, 7, 300)) == {"F", "O"}, "ten of each with those of unknown sex"
    assert sexes(women, others, men, block(6, 7, 300)) == {"F"}
    assert sexes(women, others, men, block(7, 6, 300)) == {"F"}
    assert sexes(women, others) == {"F", "O"}


def test_unknown_images_that_are_kept_back_anyway_are_company_enough_for_a_small_group() -> None:
    women, others, men, unknown = (
        block(15 + n, 15 + n, 100 * n, sex=sex) for n, sex in enumerate(["F", "O", "M", None])
    )
    assert sexes(women, others, men, unknown) == {"F", "O", "M"}
    assert sexes(women, others, men[:1], unknown) == {"F", "O"}


def test_one_patient_in_two_groups_that_are_kept_back_is_one_patient() -> None:
    """Five patients, each with images of two devices: ten if they are counted for each device."""
    study = made_study(["modality"], targets=1)
    large_one, second = block(40, 40, modality="CR"), block(20, 20, 500, modality="CT")
    few = block(20, 20, 900, patients=5, modality="DX") + block(20, 20, 900, patients=5, modality="NM")
    told = the_told(study, told_by(study, large_one + second + few)[0], "modality", 0)
    assert told == {("CR",)}
    many = block(20, 20, 900, patients=5, modality="DX") + block(20, 20, 950, patients=5, modality="NM")
    assert the_told(study, told_by(study, large_one + second + many)[0], "modality", 0) == {("CR",), ("CT",)}


def test_images_of_unknown_attributes_alone_can_silence_a_division() -> None:
    women, unknown = block(30, 30, sex="F"), block(1, 1, 100)
    assert sexes(women, unknown) == set()
    study = made_study(["sex x modality"], targets=1)
    cells = block(20, 20, sex="F", modality="CR") + block(20, 20, 100, sex="M", modality="CR")
    assert len(the_told(study, told_by(study, cells)[0], "sex x modality", 0)) == 2
    assert not told_by(study, cells + block(1, 0, 200, sex="M"))[0].told.any()
    assert told_by(study, cells + block(10, 10, 200, sex="M"))[0].told.sum() == 2


def test_a_grade_of_nine_images_keeps_a_group_back() -> None:
    study = made_study(["sex"], "ordered")

    def of_grades(*numbers: int) -> list[Image]:
        grades = [grade for grade, number in enumerate(numbers) for _ in range(number)]
        return [Image(n, KINDS["ordered"][grade], (0.9, 0.5, 0.1), sex="F") for n, grade in enumerate(grades)]

    assert told_by(study, of_grades(10, 10, 10, 10))[0].told.sum() == 3
    for place in range(4):
        numbers = [20] * 4
        numbers[place] = 9
        assert not told_by(study, of_grades(*numbers))[0].told.any(), place


def test_a_site_without_images_tells_nothing() -> None:
    study = made_study(DIVISIONS)
    found, whole = told_by(study, [])
    assert not found.numbers().any() and found.to_json(study) == []
    assert Groups.read(study, found.numbers(), whole).to_json(study) == []


# A sum that no sites can have told -----------------------------------------------------------------------------------

STUDY = made_study(["sex"], targets=1)
WOMEN, MEN = 0, 1
WHOLE = ScoreHistogram(np.full((1, 2, BINS), 6))


def a_sum() -> tuple[Int, Int]:
    """(told (3, 1), counts (3, 1, 2, BINS)): of two sites, of which one tells of men too."""
    told, counts = np.array([[2], [1], [0]]), np.zeros((3, 1, 2, BINS), np.int64)
    counts[WOMEN, :, :, :7] = 3
    counts[MEN, :, :, 5:] = 2
    return told, counts


def lower_a_count(told: Int, counts: Int) -> None:
    counts[WOMEN, 0, 1, 2] = -1


def lower_a_number_of_sites(told: Int, counts: Int) -> None:
    told[2] = -1


def one_positive_of_women_too_few(told: Int, counts: Int) -> None:
    counts[WOMEN, 0, 1] = 0
    counts[WOMEN, 0, 1, :4] = 6, 6, 6, 1


def one_negative_of_men_too_few(told: Int, counts: Int) -> None:
    counts[MEN, 0, 0, 5] -= 1


def another_site_told_of_men(told: Int, counts: Int) -> None:
    told[MEN] += 1


def no_site_told_of_men(told: Int, counts: Int) -> None:
    told[MEN] = 0


def images_of_others_that_nobody_told_of(told: Int, counts: Int) -> None:
    counts[2, 0, 0, 9] = 1


def more_than_the_whole(told: Int, counts: Int) -> None:
    counts[MEN, 0, 0, 6] = 4  # with three of women, one more than the six there are


CONTRADICTIONS: list[Callable[[Int, Int], None]] = [
    lower_a_count,
    lower_a_number_of_sites,
    one_positive_of_women_too_few,
    one_negative_of_men_too_few,
    another_site_told_of_men,
    no_site_told_of_men,
    images_of_others_that_nobody_told_of,
    more_than_the_whole,
]


@pytest.mark.parametrize("change", CONTRADICTIONS, ids=lambda change: change.__name__)
def test_groups_that_contradict_themselves_or_the_whole_are_refused(change: Callable[[Int, Int], None]) -> None:
    told, counts = a_sum()
    assert Groups.read(STUDY, Groups(counts, told).numbers(), WHOLE).told.ravel().tolist() == [2, 1, 0]
    change(told, counts)
    with pytest.raises(MessageMalformed):
        Groups.read(STUDY, Groups(counts, told).numbers(), WHOLE)


def test_exactly_ten_images_of_each_class_for_each_site_are_read() -> None:
    told, counts = a_sum()
    counts[WOMEN, 0, 1] = 0
    counts[WOMEN, 0, 1, :4] = 6, 6, 6, 2
    assert Groups.read(STUDY, Groups(counts, told).numbers(), WHOLE).counts[WOMEN, 0, 1].sum() == 20


def test_another_number_of_counts_is_of_another_study() -> None:
    numbers = Groups(*reversed(a_sum())).numbers()
    for wrong in (numbers[:-1], np.append(numbers, 0), numbers[:0], numbers[None]):
        with pytest.raises(MessageMalformed, match="number of counts"):
            Groups.read(STUDY, wrong, WHOLE)


def test_the_groups_of_each_division_are_held_to_the_whole_by_themselves() -> None:
    """Every image is counted by sex and by modality: together twice the whole, and no contradiction."""
    study = made_study(["sex", "modality"], targets=1)
    images = block(30, 30, sex="F", modality="CR") + block(30, 30, 100, sex="M", modality="DX")
    found, whole = told_by(study, images)
    read = Groups.read(study, found.numbers(), whole)
    assert read.counts.sum() == 2 * whole.counts.sum() and read.told.sum() == 4
    wrong = found.counts.copy()
    wrong[[group.name for group in groups(study)].index("DX"), 0, 1] += 1
    with pytest.raises(MessageMalformed, match="modality"):
        Groups.read(study, Groups(wrong, found.told).numbers(), whole)


def test_only_groups_that_are_told_are_named() -> None:
    told, counts = a_sum()
    rows = Groups(counts, told).to_json(STUDY)
    assert [(row["division"], row["name"], row["sites"]) for row in rows] == [("sex", "F", [2]), ("sex", "M", [1])]
    assert rows[0]["counts"] == counts[WOMEN].tolist()


# The groups of a study -----------------------------------------------------------------------------------------------

AGES = ["0-17", "18-29", "30-39", "40-49", "50-64", "65-74", "75-84", "85+"]


def test_the_groups_of_a_study_are_those_it_names_in_their_order_without_the_unknown() -> None:
    study = made_study(["sex", "age x sex", "modality"])
    named = [(group.division, group.name) for group in groups(study)]
    assert named == [
        *(("sex", sex) for sex in "FMO"),
        *(("age x sex", f"{age} x {sex}") for age in AGES for sex in "FMO"),
        *(("modality", word) for word in ("CR", "DX", "CT", "other")),
    ]
    assert [group.name for group in groups(made_study(["sex x age"]))][:2] == ["F x 0-17", "F x 18-29"]


@pytest.mark.parametrize(
    ("divisions", "number"),
    [([], 0), (["sex"], 3), (["age"], 8), (["race"], 7), (["ethnicity"], 2), (["modality"], 4), (["manufacturer"], 12)],
)
def test_a_study_takes_a_number_of_counts_for_each_group_target_class_and_bin(
    divisions: list[str], number: int
) -> None:
    study = made_study(divisions)
    assert len(groups(study)) == number
    assert size(study) == number * 2 * (1 + 2 * BINS) == Groups.empty(study).numbers().size
    crossed = made_study([*divisions, "sex x age"])
    assert size(crossed) == (number + 24) * 2 * (1 + 2 * BINS)


@pytest.mark.parametrize(
    "subgroups",
    [
        ["income"],
        ["Sex"],
        [""],
        ["unknown"],
        ["sex x income"],
        ["sex x sex"],
        ["sex x age", "age x sex"],
        ["sex x age x race"],
        ["sex", "sex"],
        ["sex", "age", "sex"],
        ["sex  x  age"],
        ["sexxage"],
        ["sex x "],
        [" sex"],
        ["sex" * 20],
    ],
    ids=repr,
)
def test_divisions_that_are_none_are_refused(subgroups: list[str]) -> None:
    with pytest.raises(ValidationError):
        Evaluation.model_validate({"subgroups": subgroups})


def test_every_attribute_and_every_two_of_them_are_divisions() -> None:
    attributes = ["age", "sex", "race", "ethnicity", "modality", "manufacturer"]
    assert Evaluation.model_validate({"subgroups": attributes}).subgroups == attributes
    pairs = [f"{a} x {b}" for a in attributes for b in attributes if a < b]
    assert Evaluation.model_validate({"subgroups": pairs[:12]}).subgroups == pairs[:12]
    assert Evaluation.model_validate({}).subgroups == []


@pytest.mark.parametrize(("protection", "least"), [("masked", 3), ("sealed", 1), ("plain", 1)])
def test_of_a_masked_sum_only_groups_of_three_sites_are_kept(protection: Any, least: int) -> None:
    study = made_study(["sex"]).model_copy(update={"protection": protection})
    found = Groups.empty(study)
    for number, sites in enumerate((1, 2, 3)):
        found.told[number, 0], found.counts[number, 0, :, 4] = sites, 10 * sites
    found.told[2, 1], found.counts[2, 1, :, 4] = 1, 10
    kept = found.kept(study)
    assert kept.told.tolist() == [[n if n >= least else 0 for n in row] for row in found.told.tolist()]
    assert (kept.counts.any(axis=(2, 3)) == (kept.told > 0)).all()
    assert (kept.counts[kept.told > 0] == found.counts[kept.told > 0]).all()
