"""What is known of an image and the person on it: by the label table first, then by the header."""

import math
from typing import Protocol

from fl_client.index import IndexedImage
from models.attributes import AGE_BINS, AGE_EDGES, CAPPED_AGE, About, Sex
from models.covariates import AGE, AGE_ABOVE, SEX, SEXES, Covariates, names_of
from models.labels import LabelMap, LabelTable
from models.questions import Observed, vendor_of
from models.sections import Regression, TaskOrQuestions

_SEX: dict[str, Sex] = {"F": "F", "M": "M", "O": "O"}


def observe(image: IndexedImage, labels: LabelTable) -> Observed:
    """In MIDRC's words and those of `models.questions`; nothing of it is free text but the patient's number."""
    key = image.key(labels.mapping.matches)
    about = labels.about(key)
    return Observed(
        patient=labels.patient_of(key) or labels.mapping.plain_patient(image.patient),
        modality=image.modality,
        view="none" if image.is_volume else "" if image.view == "unknown" else image.view,
        vendor=vendor_of(image.manufacturer),
        age=_age(about, image),
        sex=about.sex or _SEX.get(image.sex),
        race=about.race,
        ethnicity=about.ethnicity,
        labels=labels.lookup(key),
    )


def _age(about: About, image: IndexedImage) -> tuple[float, float] | None:
    """Completed years, from the first to below the second; the same number twice is an exact age."""
    if about.age_years is not None:
        return about.age_years, about.age_years
    if about.over_89:
        return CAPPED_AGE + 1.0, math.inf
    if about.age_bin is not None:
        place = AGE_BINS.index(about.age_bin)
        return AGE_EDGES[place], AGE_EDGES[place + 1]
    return None if image.age_years is None else (image.age_years, image.age_years)


class Described(Protocol):
    """What a header says of the person."""

    @property
    def sex(self) -> str: ...
    @property
    def age_years(self) -> float | None: ...


def covariates_of(key: str, header: Described, labels: LabelTable, wanted: Covariates) -> tuple[float | None, ...]:
    """Each covariate of the study for the patient on the image with `key`, in the study's unit and order; None if not known.

    Age and sex are those of the label table's `about`, or else, where the study says so, of the header; an age above 89 is
    AGE_ABOVE, and one that is known as a span of years is missing. The others are the table's numbers.
    """
    about, numbers = labels.about(key), labels.numbers(key)

    def value(name: str) -> float | None:
        from_header = wanted[name].header
        if name == AGE:
            return years_of(about, header.age_years if from_header else None)
        if name == SEX:
            sex = about.sex or (_SEX.get(header.sex) if from_header else None)
            return SEXES[sex] if sex else None
        return numbers.get(name)

    return tuple(value(name) for name in names_of(wanted))


def years_of(about: About, header: float | None) -> float | None:
    """Completed years as a covariate, by the table, else by the `header`'s age."""
    if about.over_89:
        return AGE_ABOVE
    years = about.age_years if about.age_years is not None else None if about.age_bin else header
    return AGE_ABOVE if years is not None and years > CAPPED_AGE else years


def unnamed(mapping: LabelMap, wanted: Covariates) -> list[str]:
    """Covariates of a study that this site's label map names no column for, and that no header has: all are missing here."""
    columns = {AGE: mapping.about and mapping.about.age, SEX: mapping.about and mapping.about.sex}
    return [
        name
        for name in names_of(wanted)
        if not wanted[name].header and not columns.get(name) and (name in columns or name not in mapping.numbers)
    ]


def answered(mapping: LabelMap, task: TaskOrQuestions) -> set[str]:
    """Names of what this site's label map can answer of the kind that `task` asks: words that mean 1 and 0, or numbers."""
    return set(mapping.numbers if isinstance(task, Regression) else mapping.targets)
