"""Clinical covariates: what a network learns from beside the image, by name, with range, unit and what a missing one counts as.

Everything that is done to a value stands in the study. A mean or a spread of a cohort would be data of its patients, would differ
from site to site, and would have to travel with the model; so a missing value becomes a constant that the researcher wrote down,
with an indicator beside it, and a value is scaled by the declared range. A value outside that range is an error of a table or
another unit, never something to be cut off: its image is left out, and counted.
"""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator

from models.attributes import CAPPED_AGE, Sex
from models.documents import Document, Name

COVARIATES_MAX = 16
AGE, SEX = "age", "sex"
AGE_ABOVE = CAPPED_AGE + 1.0
"""Years that every age above 89 counts as: sites that withhold such ages and sites that do not have to mean the same."""
SEXES: dict[Sex, float] = {"F": 0.0, "O": 0.5, "M": 1.0}
KNOWN: dict[str, dict[str, Any]] = {
    AGE: {"unit": "years", "range": [0.0, AGE_ABOVE]},
    SEX: {"unit": "0 female, 0.5 other, 1 male", "range": [0.0, 1.0], "missing": 0.5},
}
"""What is filled in for the two covariates that every site names alike; only the range of age may be another."""


class Covariate(Document):
    """One number known of a patient at the time of the image."""

    range: Annotated[list[float], Field(min_length=2, max_length=2)] = Field(
        description="least and greatest value; an image with a value outside is left out, and counted. age: 0 to 90 unless given"
    )
    unit: str = Field(
        pattern=r"^[A-Za-z0-9 %/^*.,()µ°-]{1,40}$",
        description="unit in which every site gives it; years of age and the numbers for sex are filled in",
    )
    missing: float = Field(
        description="what a missing value counts as, beside an indicator that it is missing; within the range. sex: 0.5"
    )
    header: bool = Field(
        default=False, description="age and sex: whether the DICOM header counts where the label table has none"
    )

    @model_validator(mode="after")
    def _possible(self) -> "Covariate":
        low, high = self.range
        if not -1e9 <= low < high <= 1e9:
            raise ValueError("range must be two rising numbers between -1e9 and 1e9")
        if not low <= self.missing <= high:
            raise ValueError(f"missing: {self.missing:g} lies outside the range {low:g} to {high:g}")
        return self

    def admits(self, value: float | None) -> bool:
        """Whether a value lies in the range, or is missing."""
        return value is None or self.range[0] <= value <= self.range[1]


Covariates = Mapping[str, Covariate]


def filled_in(given: Any) -> Any:
    """The section as it was written, with what is known of age and sex; raises ValueError for what contradicts that."""
    if not isinstance(given, dict):
        return given
    found = dict(given)
    for name, known in KNOWN.items():
        if not isinstance(found.get(name), dict):
            continue
        for key, value in known.items():
            if key != "missing" and (name, key) != (AGE, "range") and found[name].get(key, value) != value:
                raise ValueError(f"{name}: {key} is {value!r} at every site; leave that line out")
        found[name] = known | found[name]
    for name, said in found.items():
        if name not in KNOWN and isinstance(said, dict) and said.get("header"):
            raise ValueError(f"{name}: header: true is for age and sex; no DICOM header says more")
    return found


def names_of(covariates: Covariates) -> list[Name]:
    """In the order in which a network takes them. Sorted: a canonical study has forgotten how its file was written."""
    return sorted(covariates)


def words(covariates: Covariates) -> list[str]:
    """Each covariate for people: name, unit, range, where it comes from, and what a missing one counts as."""
    found = []
    for name in names_of(covariates):
        one = covariates[name]
        low, high = one.range
        source = ", from the label table or else the DICOM header" if one.header else ""
        found.append(
            f"{name} ({one.unit}, {low:g} to {high:g}{source}; a missing one counts as {one.missing:g}, with a mark)"
        )
    return found
