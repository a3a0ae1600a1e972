"""How well outlines agree with the reference masks: figures of each case, and sums of them that are exact over any sites.

A case is one image and one structure that was annotated in it. Empty masks follow one rule:

    both empty                   Dice 1; surface Dice and HD95 are not counted
    the reference alone          Dice 0, surface Dice 0; HD95 has no value, and the case is counted as missed
    the outline alone            the same, and the case is counted as invented

Surfaces are the voxels of a mask that touch another value or the edge of the grid; distances are in mm on the study's grid. HD95
is the larger of the two 95th percentiles of distances from one surface to the other; surface Dice is the share of both surfaces
within `tolerance_mm` of the other (Nikolov et al. 2021, on voxels). Of an image whose pixel size nobody knows there is neither.

Each figure is rounded once, at the site and case by case, to a whole number of small steps. So the sum over sites is that of all
their cases, bit for bit, masked or not.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from models.intervals import Interval, bootstrap_mean
from models.sections import MASKED_SITES_MIN, RELEASE_MIN, PrivacyOrNone, Protection, TaskOrQuestions
from privacy.errors import MessageMalformed

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]

COLUMNS = (
    "sites", "cases", "both_empty", "missed", "invented", "dice", "dice_squares",
    "surface_cases", "surface", "surface_squares", "distance_cases", "distance", "distance_squares",
)  # fmt: skip
"""Of each structure, in the order of the sum: sites that tell of it, cases, those of each kind of empty mask, then counts, sums
and sums of squares.
"""
CASES = COLUMNS.index("cases")
SHARE_UNIT = 2.0**-20
DISTANCE_UNIT = 2.0**-10  # mm, and mm²
DISTANCE_MAX = 1000.0  # mm; no body is larger, and a million such cases still make a sound count
MEASURES = ("dice", "surface", "distance")
_UNITS = {"dice": SHARE_UNIT, "surface": SHARE_UNIT, "distance": DISTANCE_UNIT}
_MOST = {"dice": 1.0, "surface": 1.0, "distance": DISTANCE_MAX}
_COUNTED = {"dice": "cases", "surface": "surface_cases", "distance": "distance_cases"}
FIGURE_COLUMNS = 10
"""Of each structure that a site releases: Dice, surface Dice and HD95, each with the ends of its interval; cases, in tens."""
NOT_RELEASED = -1.0
DECIMALS = 3
NORMAL_95 = 1.959963984540054


class Outlining(Protocol):
    """Of a study, what says how its outlines are summed."""

    @property
    def task(self) -> TaskOrQuestions: ...
    @property
    def privacy(self) -> PrivacyOrNone: ...
    @property
    def protection(self) -> Protection: ...


def compare(found: Bool, truth: Bool, spacing_mm: Sequence[float], tolerance_mm: float) -> tuple[float, float, float]:
    """(Dice, surface Dice, HD95 in mm) of two masks of one shape; NaN where the rule of empty masks or no spacing gives none."""
    mine, its = int(found.sum()), int(truth.sum())
    if not mine and not its:
        return 1.0, math.nan, math.nan
    known = all(math.isfinite(value) and value > 0 for value in spacing_mm)
    if not mine or not its:
        return 0.0, 0.0 if known else math.nan, math.nan
    dice = 2 * int((found & truth).sum()) / (mine + its)
    if not known:
        return dice, math.nan, math.nan
    from scipy.ndimage import binary_erosion, distance_transform_edt  # a second to load, and only evaluations need it

    box = _box(found | truth)
    surfaces = [mask[box] & ~binary_erosion(mask[box]) for mask in (found, truth)]
    away = [distance_transform_edt(~other, sampling=list(spacing_mm))[own] for own, other in (surfaces, surfaces[::-1])]
    within = sum(int((part <= tolerance_mm).sum()) for part in away)
    hd95 = max(float(np.percentile(part, 95)) for part in away)
    return dice, within / sum(len(part) for part in away), min(hd95, DISTANCE_MAX)


def _box(mask: Bool) -> tuple[slice, ...]:
    """The smallest part of the grid that holds all of `mask`: nothing beyond it has a say in surfaces or distances."""
    ends = []
    for axis in range(mask.ndim):
        along = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        ends.append(slice(int(along[0]), int(along[-1]) + 1))
    return tuple(ends)


@dataclass(frozen=True, eq=False)
class Cases:
    """What a site holds of each image of a split, which stays there. All (N, T): `known`: annotated; `present`, `found`: whether
    mask and outline hold a voxel; `dice`, `surface`, `distance` float64 as `compare` gives them. `patients` (N,).
    """

    known: Bool
    present: Bool
    found: Bool
    dice: Float64
    surface: Float64
    distance: Float64
    patients: Int64

    @classmethod
    def empty(cls, images: int, structures: int, patients: Int64) -> Self:
        """Of no outline yet: `put` fills it."""
        flags = [np.zeros((images, structures), bool) for _ in range(3)]
        dice, surface, distance = (np.full((images, structures), math.nan) for _ in MEASURES)
        return cls(flags[0], flags[1], flags[2], dice, surface, distance, patients)

    def put(self, row: int, outlines: tuple[Bool, Bool], known: Bool, scale: tuple[Sequence[float], float]) -> None:
        """Image `row`: (outlined, reference) bool (T, *grid), which structures were annotated, (spacing, tolerance) in mm."""
        self.known[row] = known
        for place in np.flatnonzero(known):
            mine, truth = (mask[place] for mask in outlines)
            self.found[row, place], self.present[row, place] = mine.any(), truth.any()
            self.dice[row, place], self.surface[row, place], self.distance[row, place] = compare(mine, truth, *scale)

    def rows(self, structure: int, measure: str) -> tuple[Float64, Int64]:
        """The values of one measure that count, and whose they are."""
        values: Float64 = getattr(self, measure)[:, structure]
        counted = self.known[:, structure] & np.isfinite(values)
        return values[counted], self.patients[counted]


@dataclass(frozen=True, eq=False)
class Overlaps:
    """`counts` int64 (T, COLUMNS): sums over the cases of each structure. `a + b` of counts is exactly that of both.

    Raises MessageMalformed for another shape, or for counts that no cases can have.
    """

    counts: Int64

    def __post_init__(self) -> None:
        counts = np.asarray(self.counts)
        if counts.ndim != 2 or counts.shape[1] != len(COLUMNS) or counts.dtype.kind not in "iu":
            raise MessageMalformed(f"sums of outlines are whole numbers (structures, {len(COLUMNS)})")
        if counts.min(initial=0) < 0 or any(
            not _possible(dict(zip(COLUMNS, row, strict=True))) for row in counts.tolist()
        ):
            raise MessageMalformed("the sums of outlines contradict each other")
        frozen = counts.astype(np.int64)
        frozen.flags.writeable = False
        object.__setattr__(self, "counts", frozen)

    @classmethod
    def empty(cls, structures: int) -> Self:
        return cls(np.zeros((structures, len(COLUMNS)), np.int64))

    @classmethod
    def of(cls, cases: Cases) -> Self:
        """The sums of all of `cases`."""
        counts = np.zeros((cases.known.shape[1], len(COLUMNS)), np.int64)
        for structure in range(len(counts)):
            known = cases.known[:, structure]
            present, found = cases.present[known, structure], cases.found[known, structure]
            empties = int((~present & ~found).sum()), int((present & ~found).sum()), int((~present & found).sum())
            row = [int(known.any()), int(known.sum()), *empties]
            for measure in MEASURES:
                values = np.minimum(cases.rows(structure, measure)[0], _MOST[measure])
                sums = [int(np.rint(part / _UNITS[measure]).sum()) for part in (values, values**2)]
                row += sums if measure == "dice" else [len(values), *sums]
            counts[structure] = row
        return cls(counts)

    def told(self, study: Outlining, cases: Cases) -> "Overlaps":
        """What of it a site adds to a sum: a structure with RELEASE_MIN cases of as many patients, all zero of others. Under
        differential privacy, where counts are in no ε, also none with fewer than RELEASE_MIN cases with, or without, the
        structure, unless there is no such case.
        """
        counts = self.counts.copy()
        for structure in range(len(counts)):
            known = cases.known[:, structure]
            sizes = [int(known.sum()), len(np.unique(cases.patients[known]))]
            if study.privacy != "none":
                present = int(cases.present[known, structure].sum())
                sizes += [part for part in (present, sizes[0] - present) if part]
            if min(sizes) < RELEASE_MIN:
                counts[structure] = 0
        return Overlaps(counts)

    def require_of(self, sites: int) -> "Overlaps":
        """These sums, if they can be of so many sites; raises MessageMalformed if more of them tell of a structure."""
        if self.counts[:, 0].max(initial=0) > sites:
            raise MessageMalformed(f"more than the {sites} sites of the sum tell of a structure")
        return self

    def kept(self, study: Outlining) -> "Overlaps":
        """What a run may keep of an opened sum: structures that enough sites tell of. One that a site alone annotates is that
        site's own sum, which masks do not hide, so of a masked run none of fewer than MASKED_SITES_MIN is kept.
        """
        least = MASKED_SITES_MIN if study.protection == "masked" else 1
        return Overlaps(np.where(self.counts[:, :1] >= least, self.counts, 0))

    def row(self, structure: int) -> dict[str, int]:
        """One structure's sums by name."""
        return dict(zip(COLUMNS, self.counts[structure].tolist(), strict=True))

    def mean(self, structure: int, measure: str) -> tuple[float, Interval | None] | None:
        """The mean over cases with its 95 % interval, cases taken as independent, from two cases on; None without a case."""
        row, unit = self.row(structure), _UNITS[measure]
        cases = row[_COUNTED[measure]]
        if not cases:
            return None
        mean, squares = (row[name] * unit / cases for name in (measure, f"{measure}_squares"))
        if cases < 2:
            return mean, None
        deviation = math.sqrt(max(0.0, squares - mean**2) * cases / (cases - 1))
        reach = NORMAL_95 * deviation / math.sqrt(cases)
        return mean, (max(0.0, mean - reach), min(_MOST[measure], mean + reach))

    def to_json(self) -> list[list[int]]:
        rows: list[list[int]] = self.counts.tolist()
        return rows

    @classmethod
    def from_json(cls, given: Any) -> "Overlaps":
        """Raises MessageMalformed for anything that `to_json` does not write."""
        good = isinstance(given, list) and all(isinstance(row, list) and len(row) == len(COLUMNS) for row in given)
        if not good or any(type(number) is not int or not 0 <= number < 2**62 for row in given for number in row):
            raise MessageMalformed("sums of outlines are lists of whole numbers")
        return cls(np.array(given, np.int64).reshape(-1, len(COLUMNS)))


def _possible(row: dict[str, int]) -> bool:
    """Whether some cases have these sums; each rounding may be off by half a step."""
    one = round(1 / SHARE_UNIT)
    overlapping = row["cases"] - row["both_empty"] - row["missed"] - row["invented"]
    return (
        overlapping >= 0
        and row["sites"] <= row["cases"]
        and (row["sites"] > 0) == (row["cases"] > 0)
        and row["distance_cases"] <= overlapping
        and row["distance_cases"] <= row["surface_cases"] <= row["cases"] - row["both_empty"]
        and row["both_empty"] * one <= row["dice"] <= (row["both_empty"] + overlapping) * one
        and row["dice_squares"] <= row["dice"] + row["cases"]
        and row["surface"] <= row["surface_cases"] * one
        and row["surface_squares"] <= row["surface"] + row["surface_cases"]
        and row["distance"] <= row["distance_cases"] * DISTANCE_MAX / DISTANCE_UNIT
        and row["distance_squares"] <= row["distance_cases"] * DISTANCE_MAX**2 / DISTANCE_UNIT
    )


def figures(structures: int, cases: Cases, seed: int) -> npt.NDArray[np.float32]:
    """float32 (T, FIGURE_COLUMNS): means with their bootstrap intervals over patients, rounded; NOT_RELEASED of what stays.

    A measure is released from RELEASE_MIN cases of as many patients on, and a structure if its Dice is.
    """
    rows = np.full((structures, FIGURE_COLUMNS), NOT_RELEASED, np.float32)
    for structure in range(structures):
        for place, measure in enumerate(MEASURES):
            values, patients = cases.rows(structure, measure)
            if len(np.unique(patients)) < RELEASE_MIN:
                continue
            mean, low, high = bootstrap_mean(values, patients, seed)
            rows[structure, 3 * place : 3 * place + 3] = [round(value, DECIMALS) for value in (mean, low, high)]
        if rows[structure, 0] != NOT_RELEASED:
            rows[structure, -1] = int(cases.known[:, structure].sum()) // RELEASE_MIN * RELEASE_MIN
    return rows


def read_figures(structures: int, rows: npt.NDArray[np.float32]) -> list[dict[str, Any] | None]:
    """What `figures` wrote, a dictionary or None for each structure; raises MessageMalformed for anything else."""
    if rows.shape != (structures, FIGURE_COLUMNS):
        raise MessageMalformed("figures of another number of structures than the study's")
    return [None if (row == NOT_RELEASED).all() else _figure(row) for row in rows]


def _figure(row: npt.NDArray[np.float32]) -> dict[str, Any]:
    numbers = [round(float(value), DECIMALS) for value in row]
    cases, entry = numbers[-1], dict[str, Any]()
    for name, measure, (mean, low, high) in zip(NAMES, MEASURES, _triples(numbers), strict=True):
        absent = (mean, low, high) == (NOT_RELEASED,) * 3 and measure != "dice"
        if not absent and not 0 <= low <= mean <= high <= _MOST[measure]:
            raise MessageMalformed("a released figure contradicts itself")
        entry[name] = None if absent else [mean, low, high]
    if not cases.is_integer() or cases < RELEASE_MIN or cases % RELEASE_MIN:
        raise MessageMalformed("a figure was released that should not have been")
    return entry | {"cases": int(cases)}


NAMES = ("dice", "surface_dice", "hd95_mm")
"""Of MEASURES, in reports."""


def _triples(numbers: list[float]) -> Iterator[tuple[float, float, float]]:
    for start in range(0, FIGURE_COLUMNS - 1, 3):
        yield numbers[start], numbers[start + 1], numbers[start + 2]
