"""What is known of an image and the person on it: by the label table first, then by the header."""

import math

from fl_client.index import IndexedImage
from models.attributes import AGE_BINS, AGE_EDGES, CAPPED_AGE, About, Sex
from models.labels import LabelTable
from models.questions import Observed, vendor_of

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
