"""What a site's images and labels look like, counted from index and label table alone: no pixels, no file is opened.

Every figure says of what it is (patients or images) and how many of them say nothing. Facts hold numbers and the words of a few
fixed lists; the one text that comes out of headers, the manufacturer, is cleaned, and is shown only where several patients
share it: a field that was filled in wrongly may hold a name. Facts are not made for leaving: small counts are not suppressed.
"""

import bisect
import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fl_client.index import Index, IndexedImage
from fl_client.ingest import LabelCount, label_count
from fl_client.sources import Reason
from models.attributes import AGE_BINS, ETHNICITIES, RACES, About, age_bin
from models.labels import LabelTable

Of = Literal["patients", "images"]

SPACING_EDGES = (0, 0.1, 0.125, 0.15, 0.175, 0.2, 0.3, 0.5, 0.75, 1, 2)  # mm between pixels; detectors lie below 0.2
SLICE_EDGES = (0, 0.75, 1, 1.5, 2, 3, 5, 7.5)  # mm between slices of a CT
PER_PATIENT_EDGES = (1, 2, 3, 4, 6, 11)
VENDOR_PATIENTS_LEAST = 5  # patients who share a manufacturer's name before it is shown
VENDOR_LETTERS_MAX = 40
VENDORS_MAX = 8  # shown by name; a chart of more is a list
OTHER, UNKNOWN, CONTRADICTING = "other", "unknown", "contradicting"
SEXES = {"F": "female", "M": "male", "O": "other"}
VIEWS = ("frontal", "lateral", UNKNOWN)


@dataclass(frozen=True)
class Tally:
    """How often each value occurs, in the order to be shown; `missing` say nothing."""

    of: Of
    counts: dict[str, int]
    missing: int = 0

    @property
    def known(self) -> int:
        return sum(self.counts.values())

    @property
    def total(self) -> int:
        return self.known + self.missing

    @property
    def share_missing(self) -> float:
        return self.missing / self.total if self.total else 0.0

    def to_json(self) -> dict[str, Any]:
        return {"of": self.of, "counts": self.counts, "missing": self.missing}


@dataclass(frozen=True)
class Target:
    """The labels of one target: images with 1, 0 and none, and patients with at least one of each."""

    positive: int
    negative: int
    missing: int
    patients_positive: int
    patients_negative: int

    @property
    def share_missing(self) -> float:
        images = self.positive + self.negative + self.missing
        return self.missing / images if images else 0.0


@dataclass(frozen=True)
class Twice:
    """What stands in the data more than once, and under whom.

    `copies`: files that repeat an image and were left out. `across_patients`: those whose twin stands under another patient
    number. `examinations` and `instances`: UIDs that stand under more than one patient.
    """

    copies: int
    across_patients: int
    examinations: int
    instances: int


@dataclass(frozen=True)
class Facts:
    """One site's data in figures. `targets` and `table` are empty and None without a readable label table.

    `implausible_ages`: rows of the table with an age that no person reaches; `misread`: rows with a word about a person that it
    does not know, by column. All of these are missing.
    """

    patients: int
    studies: int
    images: int
    files: int
    left_out: dict[Reason, int]
    complete: bool
    per_patient: Tally
    ages: Tally
    sexes: Tally
    races: Tally
    ethnicities: Tally
    vendors: Tally
    views: Tally
    modalities: Tally
    spacings: Tally
    slices: Tally
    targets: dict[str, Target]
    table: LabelCount | None
    patients_unlabelled: int
    implausible_ages: int
    misread: dict[str, int]
    twice: Twice

    @property
    def damaged(self) -> int:
        return sum(count for reason, count in self.left_out.items() if reason.damage)

    @property
    def table_misread(self) -> int:
        return self.implausible_ages + sum(self.misread.values())

    @property
    def tallies(self) -> dict[str, Tally]:
        """Every distribution, by the name that it has in `--json`."""
        return {
            **{"images_per_patient": self.per_patient, "age_years": self.ages, "sex": self.sexes},
            **{"race": self.races, "ethnicity": self.ethnicities},
            **{"manufacturer": self.vendors, "view": self.views, "modality": self.modalities},
            **{"spacing_mm": self.spacings, "between_slices_mm": self.slices},
        }

    def to_json(self) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in ("patients", "studies", "images", "files", "damaged", "complete")},
            "left_out": {str(reason): count for reason, count in self.left_out.items()},
            "targets": {name: vars(target) for name, target in self.targets.items()},
            "label_table": self.table.to_json() if self.table else None,
            "patients_unlabelled": self.patients_unlabelled,
            "implausible_ages": self.implausible_ages,
            "misread": self.misread,
            "twice": vars(self.twice),
            **{name: tally.to_json() for name, tally in self.tallies.items()},
        }


def facts_of(index: Index, labels: LabelTable | None) -> Facts:
    """Count everything. Who a patient is, is decided as in a cohort: by the label table if it says, else by the header."""
    images, reasons = index.images(), index.reasons()
    patients = [patient_of(image, labels) for image in images]
    rows = list(zip(patients, images, strict=True))
    vendor, about = vendor_names(rows), _about(labels)
    return Facts(
        patients=len(set(patients)),
        studies=len({(p, i.study_uid) for p, i in rows if i.study_uid}),
        images=len(images),
        files=sum(image.files for image in images) + sum(reasons.values()),
        left_out=reasons,
        complete=index.complete,
        per_patient=_binned("patients", Counter(patients).values(), PER_PATIENT_EDGES, whole=True),
        ages=_ages(rows, about),
        sexes=_agreed(rows, lambda image: SEXES.get(about(image).sex or image.sex), SEXES.values()),
        races=_agreed(rows, lambda image: about(image).race, RACES),
        ethnicities=_agreed(rows, lambda image: about(image).ethnicity, ETHNICITIES),
        vendors=_most_common("images", (vendor(image) for image in images)),
        views=_listed("images", (image.view for image in images if not image.is_volume), VIEWS),
        modalities=_most_common("images", (image.modality or None for image in images)),
        spacings=_binned("images", ((image.spacing_mm or (None,))[-1] for image in images), SPACING_EDGES),
        slices=_binned(
            "images", (i.spacing_mm[0] if i.spacing_mm else None for i in images if i.is_volume), SLICE_EDGES
        ),
        targets=_targets(rows, labels),
        table=label_count(index, labels) if labels else None,
        patients_unlabelled=_unlabelled(rows, labels),
        implausible_ages=labels.implausible_ages if labels else 0,
        misread={name: words.total() for name, words in labels.about_unmapped.items() if words} if labels else {},
        twice=_twice(index, rows),
    )


Rows = Sequence[tuple[str, IndexedImage]]
"""Each image with its patient."""


def patient_of(image: IndexedImage, labels: LabelTable | None) -> str:
    if labels is None:
        return image.patient
    key = image.key(labels.mapping.matches)
    return labels.patient_of(key) or labels.mapping.plain_patient(image.patient)


def vendor_names(rows: Rows) -> Callable[[IndexedImage], str | None]:
    """Image -> the name under which its manufacturer is shown; None if the header names none.

    "SIEMENS" and "Siemens " are one, shown in the commonest spelling. Names of fewer than VENDOR_PATIENTS_LEAST patients, and
    those after the VENDORS_MAX commonest, are `other`.
    """
    patients: dict[str, set[str]] = {}
    spellings: dict[str, Counter[str]] = {}
    for patient, image in rows:
        name = plain(image.manufacturer)
        patients.setdefault(name.casefold(), set()).add(patient)
        spellings.setdefault(name.casefold(), Counter())[name] += 1
    shared = {folded for folded, whose in patients.items() if len(whose) >= VENDOR_PATIENTS_LEAST}
    commonest = sorted(shared - {""}, key=lambda folded: (-spellings[folded].total(), folded))[:VENDORS_MAX]
    shown = {folded: min(spellings[folded].items(), key=lambda item: (-item[1], item[0]))[0] for folded in commonest}

    def name_of(image: IndexedImage) -> str | None:
        folded = plain(image.manufacturer).casefold()
        return shown.get(folded, OTHER) if folded else None

    return name_of


def plain(text: str) -> str:
    """One short line without characters that could move, hide or recolour what stands beside it."""
    kept = "".join(c if unicodedata.category(c)[0] not in "CZ" else " " for c in text)
    return " ".join(kept.split())[:VENDOR_LETTERS_MAX].rstrip()


def _most_common(of: Of, values: Iterable[str | None]) -> Tally:
    counts = Counter(values)
    missing = counts.pop(None, 0)
    names = sorted((name for name in counts if name is not None), key=lambda n: (n == OTHER, -counts[n], n))
    return Tally(of, {name: counts[name] for name in names}, missing)


def _listed(of: Of, values: Iterable[str], order: Sequence[str]) -> Tally:
    """In a fixed order; `unknown` is what is missing."""
    counts = Counter(values)
    return Tally(of, {name: counts[name] for name in order if name != UNKNOWN and counts[name]}, counts[UNKNOWN])


def _binned(of: Of, values: Iterable[float | None], edges: Sequence[float], *, whole: bool = False) -> Tally:
    """Counts between `edges`, from the first bin that holds something to the last; a value that is no number is missing."""
    counts, missing = [0] * len(edges), 0
    for value in values:
        if value is None or not math.isfinite(value) or value < edges[0]:
            missing += 1
        else:
            counts[bisect.bisect_right(edges, value) - 1] += 1
    filled = [place for place, count in enumerate(counts) if count]
    shown = range(filled[0], filled[-1] + 1) if filled else range(0)
    return Tally(of, {_bin_name(edges, place, whole): counts[place] for place in shown}, missing)


def _bin_name(edges: Sequence[float], place: int, whole: bool) -> str:
    low = edges[place]
    if place + 1 == len(edges):
        return f"{low:g}+"
    high = edges[place + 1]
    if whole:
        return f"{low:g}" if high == low + 1 else f"{low:g}–{high - 1:g}"
    return f"< {high:g}" if low == 0 else f"{low:g}–{high:g}"


def _about(labels: LabelTable | None) -> Callable[[IndexedImage], About]:
    """What the label table says of the person on an image; it comes before the header, because people look after it."""
    if labels is None:
        return lambda image: About()
    ask, matches = labels.about, labels.mapping.matches
    return lambda image: ask(image.key(matches))


def _ages(rows: Rows, about: Callable[[IndexedImage], About]) -> Tally:
    """Of each patient, the bin of the lowest age."""
    found: dict[str, set[str]] = {patient: set() for patient, _ in rows}
    for patient, image in rows:
        said = about(image)
        if name := said.age_bin or (None if image.age_years is None else age_bin(image.age_years)):
            found[patient].add(name)
    counts = Counter(min(names, key=AGE_BINS.index) if names else UNKNOWN for names in found.values())
    filled = [place for place, name in enumerate(AGE_BINS) if counts[name]]
    shown = AGE_BINS[filled[0] : filled[-1] + 1] if filled else ()
    return Tally("patients", {name: counts[name] for name in shown}, counts[UNKNOWN])


def _agreed(rows: Rows, ask: Callable[[IndexedImage], str | None], order: Iterable[str]) -> Tally:
    """What all images of a patient say that say anything."""
    found: dict[str, set[str]] = {patient: set() for patient, _ in rows}
    for patient, image in rows:
        if (word := ask(image)) is not None:
            found[patient].add(word)
    words = (UNKNOWN if not said else CONTRADICTING if len(said) > 1 else next(iter(said)) for said in found.values())
    return _listed("patients", words, (*order, CONTRADICTING))


def _targets(rows: Rows, labels: LabelTable | None) -> dict[str, Target]:
    if labels is None:
        return {}
    images: dict[str, Counter[int | None]] = {name: Counter() for name in labels.mapping.targets}
    patients: dict[str, dict[int | None, set[str]]] = {name: {1: set(), 0: set()} for name in labels.mapping.targets}
    for patient, image in rows:
        for name, label in labels.lookup(image.key(labels.mapping.matches)).items():
            images[name][label] += 1
            patients[name].setdefault(label, set()).add(patient)
    return {
        name: Target(found[1], found[0], found[None], len(patients[name][1]), len(patients[name][0]))
        for name, found in images.items()
    }


def _unlabelled(rows: Rows, labels: LabelTable | None) -> int:
    """Patients none of whose images has a label for any target, or a number; without a table, all."""
    everyone = {patient for patient, _ in rows}
    if labels is None:
        return len(everyone)
    matches = labels.mapping.matches
    named = set()
    for patient, image in rows:
        key = image.key(matches)
        if any(said is not None for said in [*labels.lookup(key).values(), *labels.numbers(key).values()]):
            named.add(patient)
    return len(everyone - named)


def _twice(index: Index, rows: Rows) -> Twice:
    return Twice(
        copies=index.reasons().get(Reason.DUPLICATE, 0),
        across_patients=index.across_patients,
        examinations=len(shared(rows, "study_uid")),
        instances=len(shared(rows, "sop_uid")),
    )


def shared(rows: Rows, name: str) -> list[set[str]]:
    """The patients of each value of an identifier that stands under more than one."""
    whose: dict[str, set[str]] = {}
    for patient, image in rows:
        if value := getattr(image, name):
            whose.setdefault(value, set()).add(patient)
    return [patients for patients in whose.values() if len(patients) > 1]
