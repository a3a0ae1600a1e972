"""Test results of groups of patients: the same score histograms, group by group, with small groups left out at the site.

A study names what to divide by: sex, age, race, ethnicity, modality, manufacturer, or two of them. A site adds the histogram of a
group to the sum only if both classes of a target have RELEASE_MIN images and the group RELEASE_MIN patients, and never so that a
smaller group follows by subtraction from the whole, which is in the sum as well:

    one attribute    of the groups that are told, the smallest are kept back as well, until what is kept back together has
                     RELEASE_MIN of everything, or is empty
    two attributes   all groups that hold an image, those of unknown attributes included, are told, or none

Targets that hang together (classes, grades) are told together, each class or grade with RELEASE_MIN images. All this happens at
the site, before any protection, so it holds for what the sum of one site would say as well as for that of many.

What masks hide is which site said what in a sum of all; a group that one site alone tells of is that site's own histogram, and
the program that opens the sum sees it. So a study with groups is for people to approve, and what a masked run keeps (`kept`) are
groups of MASKED_SITES_MIN sites, like everything else that it opens.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from models.metrics import ScoreHistogram
from models.questions import CELLS, SEVERAL, UNKNOWN, Attribute, Observed, cell_of
from models.sections import (
    CROSS,
    MASKED_SITES_MIN,
    RELEASE_MIN,
    Evaluation,
    Protection,
    Relation,
    TaskOrQuestions,
)
from privacy.errors import MessageMalformed

Int64 = npt.NDArray[np.int64]


class Dividing(Protocol):
    """Of a study, what says how it is divided."""

    @property
    def task(self) -> TaskOrQuestions: ...
    @property
    def evaluation(self) -> Evaluation: ...
    @property
    def relation(self) -> Relation: ...
    @property
    def protection(self) -> Protection: ...


@dataclass(frozen=True)
class Group:
    """One group: `division` as the study names it, and the cell of each of its attributes."""

    division: str
    cells: tuple[str, ...]

    @property
    def name(self) -> str:
        return CROSS.join(self.cells)


def groups(study: Dividing) -> list[Group]:
    """Every group that the study tells apart, in the order of the sum. Images of unknown attributes are in none."""
    return [
        Group(division, cells)
        for division in study.evaluation.subgroups
        for cells in _cells(division)
        if UNKNOWN not in cells
    ]


def _cells(division: str) -> list[tuple[str, ...]]:
    # An image has one modality and one device; `several` is what a patient can have.
    return list(itertools.product(*([c for c in CELLS[a] if c != SEVERAL] for a in attributes_of(division))))


def attributes_of(division: str) -> list[Attribute]:
    """The attributes of a division, in the order in which its groups name their cells."""
    named = division.split(CROSS)
    return sorted((a for a in CELLS if a in named), key=named.index)


@dataclass(frozen=True, eq=False)
class Groups:
    """`counts` int64 (G, T, 2, bins): score histograms of each group; `told` int64 (G, T): how many sites are in each."""

    counts: Int64
    told: Int64

    @classmethod
    def empty(cls, study: Dividing) -> "Groups":
        shape = (len(groups(study)), len(study.task.targets))
        return cls(np.zeros((*shape, 2, study.evaluation.bins), np.int64), np.zeros(shape, np.int64))

    @classmethod
    def read(cls, study: Dividing, numbers: Int64, whole: ScoreHistogram) -> "Groups":
        """Back from `numbers` of a sum of sites whose histogram is `whole`. Raises MessageMalformed if they contradict it, or if
        a group is told that is too small to be.
        """
        blank = cls.empty(study)
        if numbers.shape != (size(study),):
            raise MessageMalformed("the sum has another number of counts than the study's groups")
        told = numbers[: blank.told.size].reshape(blank.told.shape)
        counts = numbers[blank.told.size :].reshape(blank.counts.shape)
        of_class = counts.sum(axis=3)
        if numbers.min(initial=0) < 0 or (of_class < RELEASE_MIN * told[:, :, None]).any():
            raise MessageMalformed("the sum tells of a group with fewer images than a site may tell of")
        if (counts.sum(axis=(2, 3)) > 0)[told == 0].any():
            raise MessageMalformed("the sum tells of a group that no site tells of")
        names = [group.division for group in groups(study)]
        for division in study.evaluation.subgroups:
            inside = [place for place, name in enumerate(names) if name == division]
            if (counts[inside].sum(axis=0) > whole.counts).any():
                raise MessageMalformed(f"the groups by {division} hold more images than there are")
        return cls(counts, told)

    def require_of(self, sites: int) -> "Groups":
        """These groups, if they can be of a sum of so many sites; raises MessageMalformed if more of them tell of one."""
        if self.told.max(initial=0) > sites:
            raise MessageMalformed(f"more than the {sites} sites of the sum tell of a group")
        return self

    def kept(self, study: Dividing) -> "Groups":
        """What a run may keep of an opened sum: groups that `least_sites` tell of; of others nothing is left."""
        inside = self.told >= least_sites(study)
        return Groups(np.where(inside[:, :, None, None], self.counts, 0), np.where(inside, self.told, 0))

    def numbers(self) -> Int64:
        """As `read` expects it."""
        return np.concatenate([self.told.ravel(), self.counts.ravel()])

    def to_json(self, study: Dividing) -> list[dict[str, Any]]:
        """The groups that any site tells of: division, name, sites and counts by target."""
        return [
            {"division": g.division, "name": g.name, "sites": self.told[n].tolist(), "counts": self.counts[n].tolist()}
            for n, g in enumerate(groups(study))
            if self.told[n].any()
        ]


def least_sites(study: Dividing) -> int:
    """Sites that have to tell of a group before it is kept."""
    return MASKED_SITES_MIN if study.protection == "masked" else 1


def size(study: Dividing) -> int:
    """How many numbers the groups of a study take."""
    return len(groups(study)) * len(study.task.targets) * (1 + 2 * study.evaluation.bins)


@dataclass(frozen=True, eq=False)
class Scored:
    """What a site holds of each image of its test split: scores, targets, known (N, T), patients (N,)."""

    scores: npt.NDArray[np.floating]
    targets: npt.NDArray[np.floating]
    known: npt.NDArray[np.floating]
    patients: Int64

    def only(self, targets: Sequence[int]) -> "Scored":
        """The same images with these targets."""
        return Scored(self.scores[:, targets], self.targets[:, targets], self.known[:, targets], self.patients)

    def of(self, rows: npt.NDArray[np.bool_], bins: int) -> tuple[Int64, Int64]:
        """(counts (T, 2, bins) of these rows, patients (T,) with a known label among them)."""
        part = [array[rows] for array in (self.scores, self.targets, self.known)]
        whose, known = self.patients[rows], part[2] != 0
        patients = [len(np.unique(whose[known[:, target]])) for target in range(known.shape[1])]
        return ScoreHistogram.of(part[0], part[1], part[2], bins).counts, np.array(patients, np.int64)


def suppressed(study: Dividing, scored: Scored, observed: Sequence[Observed], whole: ScoreHistogram) -> Groups:
    """What of its groups a site adds to the sum. `whole`: the histogram that it adds beside them: of targets that are not in
    it, no group is told either.
    """
    found, names = Groups.empty(study), groups(study)
    silent = whole.counts.sum(axis=(1, 2)) == 0
    start = 0
    for division in study.evaluation.subgroups:
        cells = _cells(division)
        rows = _rows(attributes_of(division), cells, observed)
        parts = [scored.of(row, study.evaluation.bins) for row in rows]
        counts, patients = (np.stack([part[place] for part in parts]) for place in (0, 1))
        told = np.zeros(patients.shape, bool)
        for targets in _together(study):
            if not silent[targets].any():
                told[:, targets] = _told(study, scored.only(targets), cells, rows)[:, None]
        kept = [place for place, cell in enumerate(cells) if UNKNOWN not in cell]
        end = start + len(kept)
        found.told[start:end] = told[kept]
        found.counts[start:end] = np.where(told[kept][:, :, None, None], counts[kept], 0)
        start = end
    if start != len(names):
        raise AssertionError("groups are not in the order of their study")
    return found


def _rows(
    attributes: Sequence[Attribute], cells: Sequence[tuple[str, ...]], observed: Sequence[Observed]
) -> npt.NDArray[np.bool_]:
    """bool (C, N): which images are in which cell. Each is in one."""
    mine = [tuple(cell_of(attribute, [image]) for attribute in attributes) for image in observed]
    return np.array([[cell == its for its in mine] for cell in cells], bool).reshape(len(cells), len(mine))


def _together(study: Dividing) -> list[list[int]]:
    """Targets whose counts follow from each other are told together."""
    every = range(len(study.task.targets))
    return [[target] for target in every] if study.relation == "independent" else [list(every)]


def _told(
    study: Dividing, scored: Scored, cells: Sequence[tuple[str, ...]], rows: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_]:
    """Which of all cells (C,) are told, for rows (C, N) of images, scored for targets that are told together.

    Two attributes: those of unknown attributes are told of here, but `suppressed` leaves them out; they follow from the others.
    """
    parts = [scored.of(row, study.evaluation.bins) for row in rows]
    told = np.array([_enough(study, *part) for part in parts])
    empty = np.array([not counts.any() for counts, _ in parts])
    if len(cells[0]) > 1:
        return told if (told | empty).all() else np.zeros(len(told), bool)
    told &= np.array([UNKNOWN not in cell for cell in cells])
    by_size = sorted(np.flatnonzero(told), key=lambda n: int(parts[n][0].sum()))
    for smallest in by_size:
        # Patients are counted anew: one with images in two cells, as of two devices or ages, is one patient.
        rest = scored.of(rows[~told].any(axis=0), study.evaluation.bins)
        if not rest[0].any() or _enough(study, *rest):
            break
        told[smallest] = False
    return told


def _enough(study: Dividing, counts: Int64, patients: Int64) -> bool:
    """Whether RELEASE_MIN images are in each class of these targets (T, 2, bins), and each grade, and as many patients."""
    of_class = counts.sum(axis=2)
    least = [of_class.min(), patients.min()]
    if study.relation == "ordered":  # the images of a grade are those of at least it, less those of at least the next
        least.append((of_class[:-1, 1] - of_class[1:, 1]).min(initial=RELEASE_MIN))
    return bool(min(least) >= RELEASE_MIN)
