"""Attributes of persons: an age is certain or missing, words are those of MIDRC, and nothing is inferred."""

import math
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.attributes import (
    AGE_BINS,
    AGE_EDGES,
    ETHNICITIES,
    RACES,
    Age,
    Sex,
    age_bin,
    age_of,
    ethnicity_of,
    race_of,
    says_nothing,
    sex_of,
)

INF = math.inf


@pytest.mark.parametrize(
    ("text", "years"),
    [
        ("063Y", 63),
        ("63", 63),
        ("63.0", 63),
        (" 63 ", 63),
        ("63 years", 63),
        ("054y", 54),
        ("0", 0),
        ("89.0", 89),
        ("018M", 1.5),
        ("018 months", 1.5),
        ("000D", 0),
        ("120", 120),
        ("103", 103),
    ],
)
def test_an_age_that_is_written_is_read(text: str, years: float) -> None:
    age = age_of(text)
    assert age is not None and age.plausible
    assert age.years == years


@pytest.mark.parametrize(("text", "weeks"), [("052W", 52), ("364D", 52), ("7 days", 1)])
def test_weeks_and_days_are_parts_of_a_year(text: str, weeks: int) -> None:
    age = age_of(text)
    assert age is not None and age.years == pytest.approx(weeks * 7 / 365.25)
    assert age.bin == "0-17"


@pytest.mark.parametrize(
    ("text", "age", "name"),
    [
        ("50+", Age(50, INF), None),  # 50 to 64, or any bin above
        ("85+", Age(85, INF), "85+"),
        ("90+", Age(90, INF), "85+"),
        (">89", Age(90, INF), "85+"),
        (">=85", Age(85, INF), "85+"),
        ("> 89", Age(90, INF), "85+"),
        ("early 40s", Age(40, 50), "40-49"),
        ("40s", Age(40, 50), "40-49"),
        ("Mid-30s", Age(30, 40), "30-39"),
        ("late 30s", Age(30, 40), "30-39"),
        ("60s", Age(60, 70), None),  # 60 to 64 or 65 to 69
        ("80's", Age(80, 90), None),
        ("40-49", Age(40, 50), "40-49"),
        ("40 - 44", Age(40, 45), "40-49"),
        ("45-54", Age(45, 55), None),
        ("90-120", Age(90, 121), "85+"),
        ("<18", Age(0, 18), "0-17"),
        ("< 19", Age(0, 19), None),
    ],
)
def test_an_age_that_is_a_span_has_a_bin_only_where_the_whole_span_has(text: str, age: Age, name: str | None) -> None:
    found = age_of(text)
    assert found == age
    assert found.years is None
    assert found.bin == name


@pytest.mark.parametrize("text", ["155", "411Y", "414", "-1", "121", "130+", "90-150", "1453M", "999999999999999"])
def test_what_no_person_reaches_is_implausible_and_has_no_years(text: str) -> None:
    age = age_of(text)
    assert age is not None and not age.plausible
    assert (age.years, age.bin, age.over_89) == (None, None, False)


@pytest.mark.parametrize(
    "text",
    ["", " ", "nan", "Not Reported", "None", "sixty", "6 3", "063X", "Y", "63Y2M", "5-4", "<0", "4-5-6", "1e2", "٦٣"],
)
def test_what_is_no_age_is_missing(text: str) -> None:
    assert age_of(text) is None


def test_an_age_withheld_above_89_is_known_to_be_above() -> None:
    for flag in ("Yes", "yes ", "true", "1"):
        age = age_of("", flag)
        assert age is not None
        assert (age.years, age.over_89, age.bin) == (None, True, "85+")
    assert age_of("", "No") is None
    assert age_of("", "") is None
    assert age_of("Not Reported", "Yes") == age_of("", "Yes")
    known = age_of("72", "No")
    assert known is not None and known.years == 72 and not known.over_89


def test_a_flag_that_contradicts_the_age_makes_both_missing() -> None:
    assert age_of("40", "Yes") is None
    assert age_of("rather old", "Yes") is None
    at_the_cap = age_of("89", "Yes")
    assert at_the_cap is not None and at_the_cap.over_89


@pytest.mark.parametrize(
    ("years", "name"),
    [
        (0, "0-17"),
        (17.99, "0-17"),
        (18, "18-29"),
        (30, "30-39"),
        (40, "40-49"),
        (49, "40-49"),
        (50, "50-64"),
        (65, "65-74"),
        (75, "75-84"),
        (85, "85+"),
        (120, "85+"),
    ],
)
def test_bins_begin_at_their_edge(years: float, name: str) -> None:
    assert age_bin(years) == name


def test_bins_have_melodys_edges_and_names_that_say_them() -> None:
    assert AGE_EDGES == (0, 18, 30, 40, 50, 65, 75, 85, INF)
    for name, low, high in zip(AGE_BINS, AGE_EDGES, AGE_EDGES[1:], strict=False):
        assert name == (f"{low:g}-{high - 1:g}" if high < INF else f"{low:g}+")
    assert age_bin(-0.5) is None
    assert age_bin(math.nan) is None


@pytest.mark.parametrize(
    ("text", "sex"),
    [
        ("F", "F"),
        ("female", "F"),
        ("Female ", "F"),
        ("M", "M"),
        ("MALE", "M"),
        ("O", "O"),
        ("Other", "O"),
        ("", None),
        ("Not Reported", None),
        ("None", None),
        ("U", None),
        ("Fe male", None),
        ("1", None),
        ("man", None),
    ],
)
def test_sex_is_one_of_three_words_or_missing(text: str, sex: Sex | None) -> None:
    assert sex_of(text) == sex


def test_race_and_ethnicity_are_the_words_of_midrc() -> None:
    assert all(race_of(word.upper()) == word for word in RACES)
    assert all(ethnicity_of(f"  {word.lower().replace(' ', '  ')}") == word for word in ETHNICITIES)
    assert (race_of("Black"), race_of("Not Reported"), race_of("")) == (None, None, None)
    assert (ethnicity_of("Hispanic"), ethnicity_of("Not Reported")) == (None, None)
    assert len(RACES) == 7 and len(ETHNICITIES) == 2 and get_args(Sex) == ("F", "M", "O")


def test_words_for_missing_say_nothing() -> None:
    assert all(map(says_nothing, ("", " ", "NaN", "Not Reported", "None", "unknown")))
    assert not any(map(says_nothing, ("x", "0", "man")))


@given(st.text(max_size=40), st.text(max_size=10))
def test_no_text_breaks_it_and_a_bin_holds_the_years(text: str, flag: str) -> None:
    age = age_of(text, flag)
    sex_of(text), race_of(text), ethnicity_of(text)
    if age is not None and age.years is not None:
        place = AGE_BINS.index(age.bin or "")
        assert AGE_EDGES[place] <= age.years < AGE_EDGES[place + 1]
