"""What a study would take at this site, before anybody approves it: counted as a cohort counts, with nothing read or written.

The splits of a study that has begun here are those that were pinned. For any other they are computed from the same order of
patients and kept nowhere, so that looking at a study pins nobody to a side.
"""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fl_client import cohort, enrol
from fl_client.consent import consents
from fl_client.facts import shared
from fl_client.index import Index
from fl_client.masks import mapped, where
from fl_client.observed import unnamed
from fl_client.policy import broken
from fl_client.site import SiteFile
from models.labels import LabelTable
from models.study import Study, read
from privacy.errors import LabelTableError

FLOAT_BYTES = 4  # of a pixel on a study's grid
Role = Literal["trains", "evaluates only", "not named"]


@dataclass(frozen=True)
class Portion:
    """One split: patients and images in it, images with 1 and with 0 of each target, and its grid on the disk."""

    patients: int
    images: int
    positives: dict[str, int]
    negatives: dict[str, int]
    grid_bytes: int


@dataclass(frozen=True)
class Preview:
    """What one study would take. `divided`: examinations and instances whose images stand under patients of two splits."""

    study: Study
    role: Role
    pinned: bool
    splits: dict[cohort.Split, Portion]
    left_out: dict[str, int]
    unmapped: list[str]
    divided: int
    forbidden: list[str]

    @property
    def grid_bytes(self) -> int:
        return sum(portion.grid_bytes for portion in self.splits.values())

    @property
    def minimum(self) -> int:
        """Least patients in each split."""
        return self.study.participation.minimum_patients

    @property
    def used(self) -> tuple[cohort.Split, ...]:
        """The splits that orders to this site ask for."""
        return cohort.splits_of(self.study, trains=self.role != "evaluates only")

    @property
    def short(self) -> list[str]:
        """Splits with fewer patients than the study asks for, each in words."""
        found = {split: self.splits[split].patients for split in self.used}
        return [f"{split} has {patients}" for split, patients in found.items() if patients < self.minimum]

    @property
    def problems(self) -> list[str]:
        """One sentence for each reason why this study could not run here; none if it could."""
        found = [f"Your policy forbids it: {sentence}." for sentence in self.forbidden]
        if self.role == "not named":
            found.append("The study does not name this site, so no order for it would be admitted.")
        if self.short:
            found.append(f"Each split needs {self.minimum} labelled patients; {', '.join(self.short)}.")
        if self.divided:
            what = "examination stands" if self.divided == 1 else "examinations stand"
            found.append(f"{self.divided} {what} under patients on different sides of the split.")
        return found

    def sentence(self) -> str:
        """The whole of it in one line."""
        parts = [
            f"{_many(p.patients, 'patient')} with {_many(p.images, 'image')} to {_WORDS[name]}"
            for name, p in self.splits.items()
        ]
        return f"“{self.study.title}” would take {', '.join(parts)}; {size(self.grid_bytes)} on disk"

    def to_json(self) -> dict[str, Any]:
        return {
            "digest": self.study.digest,
            "role": self.role,
            "pinned": self.pinned,
            "minimum_patients": self.minimum,
            "splits": {name: vars(portion) for name, portion in self.splits.items()},
            "left_out": self.left_out,
            "unmapped": self.unmapped,
            "divided": self.divided,
            "grid_bytes": self.grid_bytes,
            "problems": self.problems,
        }


WHY = {
    "unlabelled": "without a label for its targets",
    "modality": "of another modality",
    "contradictory": "with labels that cannot all be true",
    "out_of_range": "with a number outside the range that the study declares",
}
_WORDS = {"train": "train", "validation": "choose the round", "test": "test", "external": "test"}


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1024**3:.1f} GiB" if count >= 1024**3 else f"{math.ceil(count / 1024**2)} MiB"


def study_of(home: Path, text: str) -> Study:
    """The study in the file `text`, or the one whose digest begins with it.

    Raises DocumentError for a bad file, RunUnknown for a digest that is not offered, and what `enrol.fetch_offers` raises.
    """
    path = Path(text)
    if path.is_file():
        return read(Study, path)
    answered = [consent.offer.study for consent in consents(home) if consent.offer.digest.startswith(text)]
    if len(answered) == 1 and len(text) >= enrol.DIGEST_LEAST:
        return answered[0]  # no connection is needed for what lies here
    return enrol.find_offer(home, text).study


def preview(index: Index, labels: LabelTable, study: Study, settings: SiteFile, pins: Path) -> Preview:
    """Raises LabelTableError if the site maps none of the study's targets, DataError if its pins are damaged."""
    names = study.task.targets
    unmapped = sorted(set(names) - set(mapped(index.state, labels.mapping, study)))
    if len(unmapped) == len(names):
        raise LabelTableError(f"{where(study)} in site.yaml has none of the study's targets ({', '.join(names)})")
    unmapped += unnamed(labels.mapping, study.covariates)
    members, left_out = cohort.join(index, labels, study)
    splits = cohort.placed(members, study, cohort.pins_of(pins, study)).splits
    role = _role(settings.site, study)
    at = {
        name: [member for member in members if name in ("external", splits[member.token])]
        for name in cohort.splits_of(study, trains=role != "evaluates only")
    }
    return Preview(
        study=study,
        role=role,
        pinned=pins.exists(),
        splits={name: _portion(mine, study) for name, mine in at.items()},
        left_out={name: count for name, count in vars(left_out).items() if count},
        unmapped=unmapped,
        divided=_divided(members, splits),
        forbidden=broken(settings.policy, study, settings.site, settings.data.name if settings.data else ""),
    )


def _role(site: str, study: Study) -> Role:
    if site in study.participation.sites:
        return "trains"
    return "evaluates only" if site in study.all_sites else "not named"


def _portion(members: list[cohort.Member], study: Study) -> Portion:
    names = study.task.targets
    counts = {
        label: Counter(
            name
            for member in members
            for name, own in zip(names, member.labels, strict=True)
            if own is not None and (own > cohort.HALF) == label
        )
        for label in (False, True)
    }
    return Portion(
        patients=len({member.token for member in members}),
        images=len(members),
        positives={name: counts[True][name] for name in names},
        negatives={name: counts[False][name] for name in names},
        grid_bytes=len(members) * math.prod(study.images.shape) * FLOAT_BYTES,
    )


def _divided(members: list[cohort.Member], splits: dict[str, cohort.Split]) -> int:
    """How many UIDs tie patients together who are not on one side. A UID is one examination, so it is one person."""
    rows = [(member.token, member.image) for member in members]
    tied = shared(rows, "study_uid") or shared(rows, "sop_uid")
    return sum(len({splits[token] for token in tokens}) > 1 for tokens in tied)
