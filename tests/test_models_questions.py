"""Questions: what a study that counts may ask, who fits, and what of the numbers may leave. Oracles are loops over rows."""

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import questions
from models.attributes import AGE_BINS, AGE_EDGES, ETHNICITIES, RACES
from models.contributions import Contribution, count_of, empty_sheet, read, values_of
from models.questions import CELLS, Answer, Counting, Observed, Question, bounds, count, fits, tens, vendor_of
from models.study import Study, parse
from privacy.errors import DocumentError, MessageMalformed, StudyConflict

TEXT = """
name: cohort
title: How many
purpose: To plan.
task:
  kind: counting
  targets: [covid]
  questions:
    zebra: {modalities: [DX], views: [frontal], targets: {covid: 1}, age: [40, 59]}
    apple: {sex: F}
privacy: none
participation: {sites: [north, south, east], quorum: 3}
"""


def study(text: str = TEXT) -> Study:
    return parse(Study, text, "study.yaml")


def task(**change: Any) -> Counting:
    facts: dict[str, Any] = {"kind": "counting", "questions": {"all": {}}} | change
    return Counting.model_validate(facts)


def test_a_question_is_a_study_with_nothing_to_train_and_one_canonical_form() -> None:
    asked = study()
    asked.check()
    assert Study.from_canonical(asked.canonical()) == asked
    assert asked.training.rounds == 1 and not asked.evaluation.site_figures
    assert isinstance(asked.task, Counting)
    # A canonical study has forgotten the order of its file; the numbers stand in one order for everybody.
    assert asked.task.names == ["apple", "zebra"]
    again = Study.from_canonical(asked.canonical())
    assert isinstance(again.task, Counting) and again.task.names == asked.task.names


def test_a_study_that_trains_still_has_to_say_how() -> None:
    text = (
        "name: a\ntitle: b\npurpose: c\ntask: {targets: [x]}\nprivacy: none\nparticipation: {sites: [a], quorum: 1}\n"
    )
    with pytest.raises(DocumentError, match="the key 'training' is missing"):
        study(text)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("views:", "vews:", "line 9: unknown key 'task.questions.zebra.vews'; did you mean 'views'"),
        ("kind: counting", "kind: counting\n  quetions: {}", "unknown key 'task.quetions'; did you mean 'questions'"),
        ("[40, 59]", "[41, 59]", "age must begin at one of"),
        ("[40, 59]", "[40, 58]", "age must begin at one of"),
        ("[40, 59]", "[60, 39]", "age must begin at one of"),
        ("[40, 59]", "[40, 89, 90]", "at most 2 items"),
        ("sex: F", "sex: female", "task.questions.apple.sex"),
        ("sex: F", "race: Martian", "task.questions.apple.race"),
        ("sex: F", "manufacturer: Siemens Healthineers", "task.questions.apple.manufacturer"),
        ("{covid: 1}", "{covid: 2}", "task.questions.zebra.targets.covid"),
        ("[covid]", "[covid, flu]", "look at flu"),
        ("[covid]", "[]", "look at covid"),
        ("targets: [covid]", "targets: [covid]\n  breakdown: [age, age]", "must not repeat"),
        ("targets: [covid]", "targets: [covid]\n  breakdown: [postcode]", "task.breakdown.0"),
        ("apple:", "Apple Pie:", "task.questions.Apple Pie"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_a_place_and_a_reason(old: str, new: str, said: str) -> None:
    with pytest.raises(DocumentError) as caught:
        study(TEXT.replace(old, new))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("network: {name: linear}", "network has no meaning"),
        ("images: {size_px: 64}", "images has no meaning"),
        ("training: {rounds: 2}", "training has no meaning"),
        ("evaluation: {site_figures: true}", "evaluation has no meaning"),
        ("strategy: {name: fedsgd}", "strategy has no meaning"),
        ("encoding_bits: 16", "encoding_bits has no meaning"),
        ("protection: plain", "masked sums of 3 sites or more"),
        ("protection: sealed", "masked sums of 3 sites or more"),
    ],
)
def test_what_has_no_meaning_for_a_question_is_refused(more: str, said: str) -> None:
    with pytest.raises(StudyConflict, match=said):
        study(TEXT + more + "\n").check()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("quorum: 3", "quorum: 2", "masked sums of 3"),
        ("quorum: 3", "quorum: 3, evaluate_only: [west]", "evaluate_only has no meaning"),
        ("privacy: none", "privacy: {epsilon: 3, clip_norm: 1.0, sampling_rate: 0.1}", "privacy has to be none"),
    ],
)
def test_numbers_of_fewer_than_three_sites_are_never_asked(old: str, new: str, said: str) -> None:
    with pytest.raises(StudyConflict, match=said):
        study(TEXT.replace(old, new)).check()


FRONTAL = Observed("a", "DX", "frontal", "siemens", (45.0, 45.0), "F", "White", None, {"covid": 1})


@pytest.mark.parametrize(
    ("conditions", "change", "expected"),
    [
        ({}, {}, True),
        ({"modalities": ["DX"], "views": ["frontal"], "targets": {"covid": 1}, "age": [40, 59], "sex": "F"}, {}, True),
        ({"modalities": ["CR", "DX"]}, {}, True),
        ({"modalities": ["CT"]}, {}, False),
        ({"modalities": ["CT"]}, {"modality": ""}, None),
        ({"views": ["frontal"]}, {"view": ""}, None),
        ({"views": ["frontal"]}, {"view": "none"}, False),
        ({"targets": {"covid": 0}}, {}, False),
        ({"targets": {"covid": 0}}, {"labels": {"covid": None}}, None),
        ({"targets": {"covid": 0}}, {"labels": {}}, None),
        ({"targets": {"covid": 0}}, {"labels": {"covid": 0}}, True),
        ({"age": [40, 59]}, {"age": None}, None),
        ({"age": [40, 59]}, {"age": (59.9, 59.9)}, True),
        ({"age": [40, 59]}, {"age": (60.0, 60.0)}, False),
        ({"age": [40, 59]}, {"age": (39.99, 39.99)}, False),
        ({"age": [40, 59]}, {"age": (40.0, 40.0)}, True),
        ({"age": [40, 59]}, {"age": (40.0, 50.0)}, True),
        ({"age": [40, 59]}, {"age": (50.0, 65.0)}, None),
        ({"age": [40, 59]}, {"age": (65.0, 75.0)}, False),
        ({"age": [40, 59]}, {"age": (30.0, 40.0)}, False),
        ({"age": [65, 120]}, {"age": (90.0, float("inf"))}, True),
        ({"age": [65, 120]}, {"age": (121.0, 121.0)}, True),
        ({"age": [65, 89]}, {"age": (90.0, float("inf"))}, False),
        ({"sex": "F"}, {"sex": None}, None),
        ({"sex": "M"}, {}, False),
        ({"race": "Asian"}, {}, False),
        ({"ethnicity": "Hispanic or Latino"}, {}, None),
        ({"manufacturer": "ge"}, {}, False),
        ({"manufacturer": "ge", "sex": "F"}, {"vendor": "", "sex": "M"}, False),  # what is known decides
    ],
)
def test_a_condition_holds_or_not_or_is_not_known(conditions: Any, change: Any, expected: bool | None) -> None:
    assert fits(Question.model_validate(conditions), dataclasses.replace(FRONTAL, **change)) is expected


@pytest.mark.parametrize(
    ("header", "word"),
    [
        ("SIEMENS", "siemens"),
        ("Siemens Healthineers ", "siemens"),
        ("GE MEDICAL SYSTEMS", "ge"),
        ("GE Healthcare", "ge"),
        ("General Electric Company", "ge"),
        ("FUJI PHOTO FILM Co., Ltd.", "fujifilm"),
        ("KODAK", "carestream"),
        ("KONICA MINOLTA", "konica"),
        ("Gendex", "other"),  # begins with g and e
        ("Doe^Jane", "other"),
        ("", ""),
        ("  ", ""),
    ],
)
def test_manufacturers_leave_as_words_of_a_fixed_list(header: str, word: str) -> None:
    assert vendor_of(header) == word


AGES: list[Any] = [None, *((float(year), float(year)) for year in range(0, 101, 9))]
AGES += [(start, end) for start, end in itertools.pairwise(AGE_EDGES)] + [(90.0, float("inf"))]
ROWS = st.lists(
    st.builds(
        Observed,
        patient=st.sampled_from("abcdefgh"),
        modality=st.sampled_from(["", "CR", "DX", "CT", "MG"]),
        view=st.sampled_from(["", "none", "frontal", "lateral"]),
        vendor=st.sampled_from(["", "ge", "siemens", "other"]),
        age=st.sampled_from(AGES),
        sex=st.sampled_from([None, "F", "M"]),
        race=st.sampled_from([None, "White", "Asian"]),
        ethnicity=st.sampled_from([None, *ETHNICITIES]),
        labels=st.fixed_dictionaries({"covid": st.sampled_from([None, 0, 1])}),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(rows=ROWS)
def test_patients_are_counted_once_in_every_breakdown(rows: list[Observed]) -> None:
    """Oracle: sets of patients, found anew for each cell."""
    asked = task(
        targets=["covid"],
        questions={"all": {}, "some": {"modalities": ["CR", "DX"], "targets": {"covid": 1}}, "f": {"sex": "F"}},
        breakdown=list(CELLS),
    )
    found = count(asked, rows)
    some = [r for r in rows if r.modality in ("CR", "DX") and r.labels["covid"] == 1]
    assert found["some"].patients == len({r.patient for r in some}) and found["some"].images == len(some)
    assert found["all"].patients == len({r.patient for r in rows}) and found["all"].undetermined == 0
    women = {p for p in {r.patient for r in rows} if {r.sex for r in rows if r.patient == p} - {None} == {"F"}}
    unknown = {p for p in {r.patient for r in rows} if len({r.sex for r in rows if r.patient == p} - {None}) != 1}
    assert found["f"].patients == len(women)  # who is F in one header and M in the next is neither
    assert found["f"].undetermined == len(unknown)
    for answer, images in ((found["all"], rows), (found["some"], some)):
        for attribute in CELLS:
            assert sum(answer.breakdown[attribute].values()) == answer.patients
        for cell in ("CR", "DX", "CT"):
            only = {p for p in {r.patient for r in images} if words(images, p, "modality") == {cell}}
            assert answer.breakdown["modality"][cell] == len(only)
        several = {p for p in {r.patient for r in images} if len(words(images, p, "vendor")) > 1}
        assert answer.breakdown["manufacturer"]["several"] == len(several)
        youngest = [min((b for b in map(bin_of, mine) if b is not None), default=None) for mine in by_patient(images)]
        for number, name in enumerate(AGE_BINS):
            assert answer.breakdown["age"][name] == youngest.count(number)
        assert answer.breakdown["age"]["unknown"] == youngest.count(None)


def words(images: list[Observed], patient: str, name: str) -> set[str]:
    return {getattr(r, name) for r in images if r.patient == patient} - {""}


def by_patient(images: list[Observed]) -> Iterable[list[Observed]]:
    return [[r for r in images if r.patient == p] for p in sorted({r.patient for r in images})]


def bin_of(row: Observed) -> int | None:
    if row.age is None:
        return None
    low, high = row.age
    inside = [
        n for n, start in enumerate(AGE_EDGES[:-1]) if start <= low < AGE_EDGES[n + 1] and high <= AGE_EDGES[n + 1]
    ]
    return inside[0] if inside else None


def exact(asked: Counting, patients: int, images: int, **cells: dict[str, int]) -> dict[str, Answer]:
    broken: Any = {name: dict.fromkeys(CELLS[name], 0) | cells.get(name, {}) for name in asked.breakdown}
    return {name: Answer(patients, images, 0, broken) for name in asked.names}


def test_numbers_leave_in_tens_and_images_of_few_patients_not_at_all() -> None:
    asked = task(breakdown=["sex"])
    told = questions.read(asked, tens(asked, exact(asked, 29, 57, sex={"F": 19, "M": 9, "unknown": 1})))["all"]
    assert (told.patients, told.images) == (20, 50)
    assert told.breakdown["sex"] == {"F": 10, "M": 0, "O": 0, "unknown": 0}
    few = questions.read(asked, tens(asked, exact(asked, 9, 500, sex={"F": 9})))["all"]
    assert (few.patients, few.images, sum(few.breakdown["sex"].values())) == (0, 0, 0)


@settings(max_examples=60, deadline=None)
@given(
    sites=st.lists(st.lists(st.integers(0, 60), min_size=4, max_size=4), min_size=3, max_size=6),
    extra=st.integers(0, 99),
)
def test_the_sum_of_tens_bounds_the_true_number(sites: list[list[int]], extra: int) -> None:
    asked = task(breakdown=["sex"])
    total = np.zeros(asked.size, np.int64)
    for cells in sites:
        named = dict(zip(CELLS["sex"], cells, strict=True))
        total += tens(asked, exact(asked, sum(cells), sum(cells) + extra, sex=named))
    told = questions.read(asked, total)["all"].to_json(len(sites))
    truth = {"patients": sum(map(sum, sites))}
    assert told["patients"]["least"] <= truth["patients"] <= told["patients"]["most"]
    assert told["images"]["least"] <= truth["patients"] + extra * len(sites)
    for number, cell in enumerate(CELLS["sex"]):
        one = told["breakdown"]["sex"][cell]
        assert one["least"] <= sum(cells[number] for cells in sites) <= one["most"]
        assert one["most"] - one["least"] == 9 * len(sites)
    assert bounds(0, 3) == {"least": 0, "most": 27}


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (0, 21),  # not in tens
        (0, -10),
        (0, 70),  # more patients than images
        (3, 50),  # more women than patients
    ],
)
def test_a_sum_that_no_sites_can_have_sent_is_malformed(place: int, value: int) -> None:
    asked = task(breakdown=["sex"])
    good = tens(asked, exact(asked, 40, 60, sex={"F": 20, "M": 20}))
    assert good.tolist() == [40, 60, 0, 20, 20, 0, 0]
    bad = good.copy()
    bad[place] = value
    with pytest.raises(MessageMalformed):
        questions.read(asked, bad)
    with pytest.raises(MessageMalformed):
        questions.read(asked, good[:-1])


def test_a_contribution_of_a_study_that_counts_is_its_answers_and_nothing_else() -> None:
    asked = study()
    assert isinstance(asked.task, Counting)
    numbers = tens(asked.task, count(asked.task, [FRONTAL]))
    sent = Contribution(0, empty_sheet(asked), answers=numbers)
    assert (sent.counts("evaluate") == numbers).all() and sent.update.size == 0
    assert count_of(asked, "evaluate") == asked.task.size == len(numbers) == 2 * (3 + 9 + 4 + 8 + 3)
    assert values_of(asked, "evaluate", 1) == 0
    assert (read(asked, "evaluate", np.zeros(0), numbers).answers == numbers).all()
    with pytest.raises(MessageMalformed):
        read(asked, "evaluate", np.zeros(0), numbers + 1)


def test_every_word_that_can_leave_is_in_a_fixed_list() -> None:
    every = {word for cells in CELLS.values() for word in cells}
    assert every == {
        *AGE_BINS, "F", "M", "O", *RACES, *ETHNICITIES, "CR", "DX", "CT", *questions.VENDORS, "other", "several", "unknown",
    }  # fmt: skip
    assert all(cells[-1] == "unknown" for cells in CELLS.values())
