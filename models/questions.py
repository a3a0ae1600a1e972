"""Questions in numbers: how many patients, and images, there are over all sites, before anything is trained.

A study of `kind: counting` asks them. Each site counts its patients, rounds every number down to tens, and what is rounded goes
into one masked sum: so a sum is a lower bound, and the true number is at most 9 higher for each site in it. Numbers below 10 are
0 at the site already, whatever the sum is over. That is no differential privacy: who asks many questions that differ a little
learns where a number passes a ten. So ages are asked in fixed bands, and every list of questions needs each site's approval.

A condition holds, does not hold, or is not known of an image. A patient fits if all conditions hold for one image; if none fits
and for one of them nothing speaks against it, the patient is counted as undetermined, and never as fitting or not.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from models.attributes import AGE_BINS, ETHNICITIES, RACES, Ethnicity, Race, Sex, age_bin
from models.documents import Document, Name
from privacy.errors import MessageMalformed

Int64 = npt.NDArray[np.int64]
Modality = Literal["CR", "DX", "CT"]
View = Literal["frontal", "lateral"]
Vendor = Literal[
    "agfa", "canon", "carestream", "fujifilm", "ge", "konica", "philips", "samsung", "shimadzu", "siemens", "toshiba"
]  # fmt: skip
Attribute = Literal["age", "sex", "race", "ethnicity", "modality", "manufacturer"]

TEN = 10
"""Numbers leave in these, rounded down; what is below stays."""
QUESTIONS_MAX = 20
AGE_STARTS = (0, 10, 18, 20, 30, 40, 50, 60, 65, 70, 75, 80, 85, 90)
"""Where a band of ages may begin: decades, and the edges of MELODY's bins. Above 89 there is one band (HIPAA)."""
AGE_LAST = 120
UNKNOWN, SEVERAL, OTHER = "unknown", "several", "other"
VENDORS: tuple[Vendor, ...] = get_args(Vendor)
MODALITIES: tuple[Modality, ...] = get_args(Modality)
_VENDOR_WORDS: dict[str, Vendor] = {
    **{name: name for name in VENDORS if name != "ge"},  # two letters that stand in many names
    **{"fuji": "fujifilm", "kodak": "carestream"},
}
CELLS: dict[Attribute, tuple[str, ...]] = {
    "age": (*AGE_BINS, UNKNOWN),
    "sex": (*get_args(Sex), UNKNOWN),
    "race": (*RACES, UNKNOWN),
    "ethnicity": (*ETHNICITIES, UNKNOWN),
    "modality": (*MODALITIES, OTHER, SEVERAL, UNKNOWN),
    "manufacturer": (*VENDORS, OTHER, SEVERAL, UNKNOWN),
}
"""What each breakdown distinguishes. A patient is in one cell of each: with two modalities, in `several`."""


class Question(Document):
    """Which patients are counted: those with an image for which all of these conditions hold. Left out: no condition."""

    modalities: list[Modality] | None = Field(default=None, min_length=1, description="DICOM modalities, any of these")
    views: list[View] | None = Field(default=None, min_length=1, description="projections, any of these")
    targets: dict[Name, Literal[0, 1]] = Field(
        default={}, max_length=8, description="labels that have to be present: 1, or absent: 0"
    )
    age: Annotated[list[int], Field(min_length=2, max_length=2)] | None = Field(
        default=None,
        description="first and last year, at the time of the image; in whole decades or MELODY's bins: [40, 59], [18, 64], "
        "[65, 120] for 65 and above",
    )
    sex: Sex | None = Field(default=None, description="of the patient")
    race: Race | None = Field(default=None, description="of the patient, in MIDRC's words")
    ethnicity: Ethnicity | None = Field(default=None, description="of the patient, in MIDRC's words")
    manufacturer: Vendor | None = Field(default=None, description="of the device")

    @model_validator(mode="after")
    def _in_bands(self) -> "Question":
        if self.age is not None:
            first, last = self.age
            if first not in AGE_STARTS or (last != AGE_LAST and last + 1 not in AGE_STARTS) or first > last:
                starts = ", ".join(map(str, AGE_STARTS))
                raise ValueError(
                    f"age must begin at one of {starts}, and end before one of them or at {AGE_LAST}: [40, 59]"
                )
        return self

    @property
    def words(self) -> str:
        """The conditions, for people."""
        said = ["/".join(self.modalities or ()), "/".join(self.views or ())]
        said += [f"{name} {'present' if value else 'absent'}" for name, value in sorted(self.targets.items())]
        if self.age:
            said += [
                f"age {self.age[0]} and above" if self.age[1] == AGE_LAST else f"age {self.age[0]} to {self.age[1]}"
            ]
        said += [f"sex {self.sex}" if self.sex else "", self.race or "", self.ethnicity or "", self.manufacturer or ""]
        return ", ".join(filter(None, said)) or "everybody"


class Counting(Document):
    """Questions in place of a prediction: each site's numbers go into one masked sum, in tens, and nothing is trained."""

    kind: Literal["counting"] = Field(description="numbers of patients and images; nothing is trained")
    targets: list[Name] = Field(
        default=[], max_length=32, description="labels that the questions ask for; each site maps its own words to them"
    )
    questions: dict[Name, Question] = Field(
        min_length=1, max_length=QUESTIONS_MAX, description="name of each question, and who is counted"
    )
    breakdown: list[Attribute] = Field(
        default=["age", "sex", "race", "ethnicity"],
        max_length=len(CELLS),
        description="what the patients of each question are divided by as well",
    )

    @model_validator(mode="after")
    def _asked(self) -> "Counting":
        if len(set(self.targets)) != len(self.targets) or len(set(self.breakdown)) != len(self.breakdown):
            raise ValueError("targets and breakdown must not repeat anything")
        asked = {name for question in self.questions.values() for name in question.targets}
        if asked != set(self.targets):
            differ = ", ".join(sorted(asked ^ set(self.targets)))
            raise ValueError(f"targets has to list what the questions ask for, and nothing else; look at {differ}")
        return self

    @property
    def names(self) -> list[str]:
        """The questions in the order of the sum. Sorted: a canonical study has forgotten how its file was written."""
        return sorted(self.questions)

    @property
    def size(self) -> int:
        """How many numbers a site sends."""
        return len(self.questions) * (3 + sum(len(CELLS[attribute]) for attribute in self.breakdown))


@dataclass(frozen=True, slots=True)
class Observed:
    """What a site knows of one image and the person on it; None or an empty word is not known.

    `age`: completed years from the first to below the second.
    """

    patient: str
    modality: str = ""
    view: str = ""
    vendor: str = ""
    age: tuple[float, float] | None = None
    sex: Sex | None = None
    race: Race | None = None
    ethnicity: Ethnicity | None = None
    labels: Mapping[str, int | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """One question's sums over the sites, each a lower bound. Of one site: its numbers in tens."""

    patients: int
    images: int
    undetermined: int
    breakdown: Mapping[Attribute, Mapping[str, int]]

    def to_json(self, sites: int) -> dict[str, Any]:
        """With the most that each number of patients can be. Of images there is no such bound: a site without ten patients
        tells of none of their images.
        """
        return {
            "patients": bounds(self.patients, sites),
            "images": {"least": self.images},
            "undetermined": bounds(self.undetermined, sites),
            "breakdown": {
                attribute: {cell: bounds(number, sites) for cell, number in cells.items()}
                for attribute, cells in self.breakdown.items()
            },
        }


def bounds(number: int, sites: int) -> dict[str, int]:
    """What a sum over `sites` of numbers rounded down to tens says of the true one."""
    return {"least": number, "most": number + (TEN - 1) * sites}


def vendor_of(manufacturer: str) -> str:
    """One of VENDORS, `other`, or "" for nothing: what a header says is free text, and these words are all that may leave."""
    plain = manufacturer.casefold().split()
    if not plain:
        return ""
    joined = " ".join(plain)
    found = next((name for word, name in _VENDOR_WORDS.items() if word in joined), None)
    return found or ("ge" if plain[0] == "ge" or joined.startswith("general electric") else OTHER)


def fits(question: Question, seen: Observed) -> bool | None:
    """Whether all conditions hold for this image; None if that is not known."""
    found = [
        _one_of(seen.modality, question.modalities),
        _one_of(seen.view, question.views),
        _one_of(seen.vendor, question.manufacturer and [question.manufacturer]),
        _one_of(seen.sex, question.sex and [question.sex]),
        _one_of(seen.race, question.race and [question.race]),
        _one_of(seen.ethnicity, question.ethnicity and [question.ethnicity]),
        _of_age(seen.age, question.age),
        *(_one_of(seen.labels.get(name), [value]) for name, value in question.targets.items()),
    ]
    return False if False in found else None if None in found else True


def _one_of(value: object, wanted: Sequence[object] | None) -> bool | None:
    if not wanted:
        return True
    return None if value is None or value == "" else value in wanted


def _of_age(age: tuple[float, float] | None, wanted: Sequence[int] | None) -> bool | None:
    if wanted is None:
        return True
    if age is None:
        return None
    low, high = age
    first, end = wanted[0], float("inf") if wanted[1] == AGE_LAST else wanted[1] + 1
    exact = low == high
    if first <= low and (low < end if exact else high <= end):
        return True
    below = low < first if exact else high <= first
    return False if below or low >= end else None


def count(task: Counting, seen: Iterable[Observed]) -> dict[str, Answer]:
    """What one site has, question by question, exactly. Stays there: `tens` of it may leave."""
    rows = agreed(list(seen))
    return {name: _answer(task, task.questions[name], rows) for name in task.names}


def agreed(rows: list[Observed]) -> list[Observed]:
    """The same images: sex, race and ethnicity belong to the person, so what all her images say holds for each."""
    said: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        for name in ("sex", "race", "ethnicity"):
            if (word := getattr(row, name)) is not None:
                said.setdefault((row.patient, name), set()).add(word)

    def of(row: Observed, name: str) -> Any:
        words = said.get((row.patient, name), set())
        return next(iter(words)) if len(words) == 1 else None

    return [replace(row, sex=of(row, "sex"), race=of(row, "race"), ethnicity=of(row, "ethnicity")) for row in rows]


def _answer(task: Counting, question: Question, rows: list[Observed]) -> Answer:
    fitting: dict[str, list[Observed]] = {}
    open_ones = set()
    for row in rows:
        verdict = fits(question, row)
        if verdict:
            fitting.setdefault(row.patient, []).append(row)
        elif verdict is None:
            open_ones.add(row.patient)
    broken: dict[Attribute, dict[str, int]] = {name: dict.fromkeys(CELLS[name], 0) for name in task.breakdown}
    for images in fitting.values():
        for name in task.breakdown:
            broken[name][cell_of(name, images)] += 1
    total = sum(len(images) for images in fitting.values())
    return Answer(len(fitting), total, len(open_ones - set(fitting)), broken)


def cell_of(attribute: Attribute, images: list[Observed]) -> str:
    """The one cell of a patient with these images."""
    if attribute == "age":
        known = [name for image in images if image.age and (name := age_bin(*image.age))]
        return min(known, key=AGE_BINS.index) if known else UNKNOWN
    if attribute in ("sex", "race", "ethnicity"):
        return getattr(images[0], attribute) or UNKNOWN
    words = {image.modality if attribute == "modality" else image.vendor for image in images} - {""}
    if len(words) > 1:
        return SEVERAL
    word = next(iter(words), UNKNOWN)
    return word if word in CELLS[attribute] else OTHER


def tens(task: Counting, answers: Mapping[str, Answer]) -> Int64:
    """What of exact `answers` may leave, in the order that `read` expects: every number rounded down to tens.

    Of fewer than ten patients no images are told: a hundred images of one would say how often she came.
    """
    numbers: list[int] = []
    for name in task.names:
        answer = answers[name]
        images = answer.images if answer.patients >= TEN else 0
        numbers += [answer.patients, images, answer.undetermined]
        numbers += [answer.breakdown[attribute][cell] for attribute in task.breakdown for cell in CELLS[attribute]]
    return np.array(numbers, np.int64) // TEN * TEN


def read(task: Counting, numbers: Int64) -> dict[str, Answer]:
    """What `tens` wrote, or a sum of it; raises MessageMalformed for anything that no sum of tens can be."""
    if numbers.shape != (task.size,):
        raise MessageMalformed("the sum has another number of counts than the questions")
    if numbers.min() < 0 or (numbers % TEN).any():
        raise MessageMalformed("a count that is not in tens")
    rest, found = [int(number) for number in numbers], dict[str, Answer]()
    for name in task.names:
        patients, images, undetermined = (rest.pop(0) for _ in range(3))
        broken = {attribute: {cell: rest.pop(0) for cell in CELLS[attribute]} for attribute in task.breakdown}
        # Each patient is in one cell and has an image, and rounding down keeps both of these.
        if images < patients or any(sum(cells.values()) > patients for cells in broken.values()):
            raise MessageMalformed("the counts of patients, images and groups contradict each other")
        found[name] = Answer(patients, images, undetermined, broken)
    return found
