"""Age, sex, race and ethnicity of a person in MIDRC's enumerated words: certain, or missing; never inferred, never free text.

Results are shown by these groups, and a group is only as good as the words behind it. An age is an interval of completed years:
"063Y" is one year, "50+" and "early 40s" are several, and an age bin is known only where the whole interval lies inside it.
"""

import math
import re
from dataclasses import dataclass
from typing import Literal, get_args

from models.tables import MISSING_WORDS, normalised

Sex = Literal["F", "M", "O"]
Race = Literal[
    "American Indian or Alaska Native",
    "Asian",
    "Black or African American",
    "Middle Eastern or North African",
    "Native Hawaiian or other Pacific Islander",
    "White",
    "Other",
]
Ethnicity = Literal["Hispanic or Latino", "Not Hispanic or Latino"]
RACES: tuple[Race, ...] = get_args(Race)
ETHNICITIES: tuple[Ethnicity, ...] = get_args(Ethnicity)
"""MIDRC data dictionary d7befda, `case`, with the category that OMB SPD-15 added in 2024; "Not Reported" is missing."""

AGE_MAX = 120  # years; the five in 26,684 of RSNA's headers that are higher are typing errors
CAPPED_AGE = 89  # years; ages above are withheld by 45 CFR 164.514(b)(2)(i)(C), and MIDRC leaves them empty
AGE_EDGES = (0.0, 18.0, 30.0, 40.0, 50.0, 65.0, 75.0, 85.0, math.inf)
AGE_BINS = ("0-17", "18-29", "30-39", "40-49", "50-64", "65-74", "75-84", "85+")
"""MIDRC-MELODY's bins, each from its lower edge to below the next."""

_SEXES: dict[str, Sex] = {"f": "F", "female": "F", "m": "M", "male": "M", "o": "O", "other": "O"}
_RACES: dict[str, Race] = {normalised(race): race for race in RACES}
_ETHNICITIES: dict[str, Ethnicity] = {normalised(word): word for word in ETHNICITIES}
_A_YEAR = {"y": 1.0, "m": 12.0, "w": 365.25 / 7, "d": 365.25}  # how many make one
_NO_WORD = MISSING_WORDS | {"none"}  # BIMCV writes "None" for an unknown sex; as a label it can mean "no finding"
_YES = ("yes", "y", "true", "1")


@dataclass(frozen=True, slots=True)
class Age:
    """Completed years from `low` to below `high`. `plausible` is False for what no person reaches: it is missing, and counted."""

    low: float
    high: float
    exact: bool = False
    plausible: bool = True

    @property
    def years(self) -> float | None:
        """The age in years where one is written."""
        return self.low if self.exact and self.plausible else None

    @property
    def over_89(self) -> bool:
        return self.plausible and self.low > CAPPED_AGE

    @property
    def bin(self) -> str | None:
        """The one of AGE_BINS that holds all of it; None where it could be in two."""
        return age_bin(self.low, self.high) if self.plausible else None


@dataclass(frozen=True, slots=True)
class About:
    """What a label table says of the person behind one key. None is missing; nothing here is free text."""

    age_years: float | None = None
    over_89: bool = False
    age_bin: str | None = None
    sex: Sex | None = None
    race: Race | None = None
    ethnicity: Ethnicity | None = None


def age_bin(low: float, high: float | None = None) -> str | None:
    """MELODY's bin of an age in years, or of all ages from `low` to below `high`; None if there are several, or none."""
    for name, start, end in zip(AGE_BINS, AGE_EDGES, AGE_EDGES[1:], strict=False):
        if start <= low < end:
            return name if high is None or high <= end else None
    return None


def age_of(text: str, over_89: str = "") -> Age | None:
    """The age that a cell writes, next to the flag that it was withheld as above 89; None is missing or unreadable.

    Understood: "63", "63.0", "063Y", "018M", "003W", "010D" (DICOM PS3.5 AS), "50+", ">89", "<18", "40-49", "40s",
    "early 40s".
    """
    word = normalised(text)
    capped = normalised(over_89) in _YES
    found = _written_age(word)
    if not capped:
        return found
    # The flag and a lower age contradict each other, and then neither can be trusted.
    return Age(CAPPED_AGE + 1, math.inf) if word in _NO_WORD or (found and found.low >= CAPPED_AGE) else None


def _written_age(word: str) -> Age | None:
    if number := re.fullmatch(
        r"(-?\d{1,15}(?:\.\d{1,15})?) ?(y|m|w|d|years?|yrs?|months?|weeks?|days?)?", word, re.ASCII
    ):
        years = float(number[1]) / _A_YEAR[(number[2] or "y")[0]]
        return Age(years, years, exact=True, plausible=0 <= years <= AGE_MAX)
    if least := re.fullmatch(r"(\d{1,3}) ?\+|(>=?) ?(\d{1,3})", word, re.ASCII):
        low = float(least[1] or least[3]) + (least[2] == ">")
        return Age(low, math.inf, plausible=low <= AGE_MAX)
    if between := re.fullmatch(r"(\d{1,3}) ?- ?(\d{1,3})|< ?(\d{1,3})", word, re.ASCII):
        first, last = (0.0, float(between[3])) if between[3] else (float(between[1]), float(between[2]) + 1)
        return Age(first, last, plausible=last <= AGE_MAX + 1) if first < last else None
    if decade := re.fullmatch(r"(?:early |mid[ -]?|late )?([1-9]0)'?s", word):
        return Age(float(decade[1]), float(decade[1]) + 10)
    return None


def sex_of(text: str) -> Sex | None:
    """F, M or O from "F", "Female", "male" and the like; None is missing or another word."""
    return _SEXES.get(normalised(text))


def race_of(text: str) -> Race | None:
    """The word of RACES that a cell writes, without regard to case and blanks."""
    return _RACES.get(normalised(text))


def ethnicity_of(text: str) -> Ethnicity | None:
    """The word of ETHNICITIES that a cell writes, without regard to case and blanks."""
    return _ETHNICITIES.get(normalised(text))


def says_nothing(text: str) -> bool:
    """Whether a cell about a person is empty or a word for missing, so that it need not be listed as not understood."""
    return normalised(text) in _NO_WORD
