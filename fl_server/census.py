"""Is who was counted like the people of a census? The Jensen-Shannon distance, as in MIDRC-REACT, with what rounding can do.

A census is a CSV table that the researcher brings: `attribute,category,count` (or `share`), and if its words differ from
MIDRC's, a column `maps_to` with ours, `65-74|75-84|85+` for several, or `-` for a row that takes no part. Rows that map to the
same words are added up. Whoever the table has no category for, and whoever nothing is known of, is left out and counted.

The distance is the square root of the divergence with logarithms to base 2: 0 for equal shares, 1 for nothing in common.
"""

import csv
import difflib
import io
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from models.attributes import ethnicity_of, race_of, sex_of
from models.questions import CELLS, UNKNOWN, Answer, Attribute, bounds
from models.tables import normalised
from privacy.errors import DocumentError

Float64 = npt.NDArray[np.float64]
FILE_BYTES_MAX = 1024 * 1024
ROWS_MAX = 1000
COLUMNS = ("attribute", "category", "count", "share", "maps_to")
NOWHERE = "-"
SHARES_OFF_MAX = 0.02  # what rounding in a printed table may add up to
STEPS = 100  # of a search: 0.618 to this power is below what a float64 tells apart
NOBODY = 1e-15
_DASHES = str.maketrans("–—−", "---")
_READ = {"sex": sex_of, "race": race_of, "ethnicity": ethnicity_of}


@dataclass(frozen=True)
class Group:
    """Categories of ours that stand for one or several rows of the census, and their share of its attribute."""

    name: str
    cells: tuple[str, ...]
    share: float


Census = dict[Attribute, list[Group]]


@dataclass(frozen=True)
class Comparison:
    """One attribute of one question. `low` and `high`: the distance for the best and the worst true numbers that the sums permit;
    `distance`: for the sums as they stand, None if they are all 0. `least` and `most`: patients of each group.
    """

    groups: list[Group]
    least: list[int]
    most: list[int]
    distance: float | None
    low: float
    high: float
    left_out: dict[str, int]

    @property
    def shares(self) -> list[float | None]:
        """What part of the compared patients each group is, by the sums as they stand."""
        total = sum(self.least)
        return [number / total if total else None for number in self.least]

    def to_json(self) -> dict[str, Any]:
        rows = zip(self.groups, self.least, self.most, self.shares, strict=True)
        return {
            "distance": self.distance,
            "interval": [self.low, self.high],
            "groups": [
                {
                    "name": group.name,
                    "categories": list(group.cells),
                    "least": least,
                    "most": most,
                    "share": share,
                    "census": group.share,
                }
                for group, least, most, share in rows
            ],
            "left_out": self.left_out,
        }


def compare(answer: Answer, census: Census, sites: int) -> dict[Attribute, Comparison]:
    """Every attribute that the answer is broken down by and the census knows."""
    return {
        attribute: _compared(answer, attribute, groups, sites)
        for attribute, groups in census.items()
        if attribute in answer.breakdown
    }


def _compared(answer: Answer, attribute: Attribute, groups: list[Group], sites: int) -> Comparison:
    cells = answer.breakdown[attribute]
    least = [sum(cells[cell] for cell in group.cells) for group in groups]
    most = [sum(bounds(cells[cell], sites)["most"] for cell in group.cells) for group in groups]
    census = np.array([group.share for group in groups])
    known = {cell for group in groups for cell in group.cells}
    left_out = {cell: number for cell, number in cells.items() if cell not in known}
    # All patients of the question are in these groups or left out, and how many they are is known as well.
    whole = bounds(answer.patients, sites)
    high = min(sum(most), whole["most"] - sum(left_out.values()))
    low = max(sum(least), whole["least"] - sum(bounds(number, sites)["most"] for number in left_out.values()))
    box = Box(np.array(least, np.float64), np.array(most, np.float64), low, high)
    nearest, farthest = interval(box, census)
    return Comparison(
        groups=groups,
        least=least,
        most=most,
        distance=float(distance(np.array(least, np.float64), census)) if any(least) else None,
        low=nearest,
        high=farthest,
        left_out=left_out,
    )


# Distance ------------------------------------------------------------------------------------------------------------


def distance(numbers: Float64, census: Float64) -> Float64:
    """The distance of each row of `numbers` (..., groups), not all 0, from `census` (groups,), which adds up to 1."""
    own = numbers / numbers.sum(axis=-1, keepdims=True)
    middle = (own + census) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(own > 0, own * np.log2(own / middle), 0) + np.where(
            census > 0, census * np.log2(census / middle), 0
        )
    found: Float64 = np.sqrt(np.clip(terms.sum(axis=-1) / 2, 0, 1))
    return found


@dataclass(frozen=True)
class Box:
    """All true numbers of groups that rounded sums permit: each from `least` to `most`, together from `low` to `high`."""

    least: Float64
    most: Float64
    low: float
    high: float

    def corners(self) -> Float64:
        """Every corner that has somebody in it, a row each: all numbers at a bound, but one where the total is at its own."""
        rows = np.array(list(itertools.product(*zip(self.least, self.most, strict=True))))
        found = [rows[(self.low <= rows.sum(axis=1)) & (rows.sum(axis=1) <= self.high)]]
        for place in range(len(self.least)):
            for total in (self.low, self.high):
                moved = rows.copy()
                moved[:, place] += total - rows.sum(axis=1)
                inside = (self.least[place] <= moved[:, place]) & (moved[:, place] <= self.most[place])
                found.append(moved[inside])
        together: Float64 = np.concatenate(found)
        return together[together.any(axis=1)]


def interval(box: Box, census: Float64) -> tuple[float, float]:
    """The least and the largest distance of any numbers in `box`; what rounding down to tens can do, and no more.

    The divergence is convex in the shares, and going to shares keeps straight lines straight: so the largest is in a corner. The
    smallest has numbers as far in proportion to the census as the box permits, n = clip(t * census, least, most); only t is left
    to find. In 1 / sum(n) its divergence is convex, and between two t where a bound begins or ends to hold, sum(n) is linear: so
    it falls and then rises there, and the best of all such stretches is the smallest.
    """
    pull = np.maximum(census, NOBODY)  # groups that the census has nobody in grow when no others can

    def at(t: float) -> Float64:
        numbers: Float64 = np.clip(t * pull, box.least, box.most)
        return numbers

    def far(t: float) -> float:
        return float(distance(at(t), census)) if at(t).any() else math.inf

    turns = np.concatenate([box.least, box.most]) / np.tile(pull, 2)
    first, end = (_where(lambda t: float(at(t).sum()), total, float(turns.max())) for total in (box.low, box.high))
    turns = np.unique(np.clip(turns, first, end))
    found = [far(t) for t in turns] + [far(_smallest(far, *stretch)) for stretch in itertools.pairwise(turns)]
    return min(found), float(distance(box.corners(), census).max())


def _where(rising: Callable[[float], float], value: float, last: float) -> float:
    """The t from 0 to `last` at which a rising function has `value`, or the end that is nearer to it."""
    first = 0.0
    for _ in range(STEPS):
        middle = (first + last) / 2
        first, last = (middle, last) if rising(middle) < value else (first, middle)
    return last


def _smallest(function: Callable[[float], float], first: float, last: float) -> float:
    """Where between `first` and `last` a function that falls and then rises is smallest: the golden section."""
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(STEPS):
        left, right = last - ratio * (last - first), first + ratio * (last - first)
        if function(left) <= function(right):
            last = right
        else:
            first = left
    return (first + last) / 2


# The table -----------------------------------------------------------------------------------------------------------


def read_census(path: Path) -> Census:
    """The census in the CSV file `path`; raises DocumentError with the line for anything that is not understood."""
    if not path.is_file():
        raise DocumentError(f"{path}: there is no such file", remedy="Check the path.")
    if path.stat().st_size > FILE_BYTES_MAX:
        raise DocumentError(f"{path}: larger than {FILE_BYTES_MAX // 1024} KiB; this is no table of shares")
    try:
        lines = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DocumentError(f"{path}: not a CSV table in UTF-8 ({error})") from None
    columns = _columns(path, [cell.strip().casefold() for cell in lines[0]] if lines else [])
    number = "count" if "count" in columns else "share"
    rows: dict[Attribute, list[tuple[tuple[str, ...], str, float]]] = {}
    for at, cells in enumerate(lines[1:], start=2):
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(columns) or at > ROWS_MAX:
            raise DocumentError(f"{path}, line {at}: another number of cells than columns, or too many lines")
        row = {name: cell.strip() for name, cell in zip(columns, cells, strict=True)}
        try:
            attribute = _attribute(row["attribute"])
            entry = (_ours(attribute, row["category"], row.get("maps_to", "")), row["category"], _amount(row[number]))
        except ValueError as error:
            raise DocumentError(f"{path}, line {at}: {error}") from None
        rows.setdefault(attribute, []).append(entry)
    if not rows:
        raise DocumentError(f"{path}: the table has no rows")
    return {attribute: _groups(path, attribute, found, number == "share") for attribute, found in rows.items()}


def _columns(path: Path, given: list[str]) -> list[str]:
    for name in given:
        if name not in COLUMNS:
            near = difflib.get_close_matches(name, COLUMNS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known here: {', '.join(COLUMNS)}"
            raise DocumentError(f"{path}, line 1: unknown column {name!r}{hint}")
    if len(set(given)) != len(given) or not {"attribute", "category"} <= set(given):
        raise DocumentError(f"{path}, line 1: expected the columns attribute and category, each once")
    if ("count" in given) == ("share" in given):
        raise DocumentError(f"{path}, line 1: expected a column count or a column share, not both")
    return given


def _attribute(text: str) -> Attribute:
    for attribute in CELLS:
        if normalised(text) == attribute:
            return attribute
    raise ValueError(f"unknown attribute {text!r}; known here: {', '.join(CELLS)}")


def _ours(attribute: Attribute, category: str, maps_to: str) -> tuple[str, ...]:
    """The cells of ours that a row stands for, in our order; none for a row that takes no part."""
    if maps_to == NOWHERE:
        return ()
    words = [_cell(attribute, word) for word in (maps_to.split("|") if maps_to else [category])]
    return tuple(cell for cell in CELLS[attribute] if cell in words)


def _cell(attribute: Attribute, word: str) -> str:
    plain = normalised(word.translate(_DASHES))
    found: str | None = _READ[attribute](plain) if attribute in _READ else None
    known = [cell for cell in CELLS[attribute] if cell != UNKNOWN]
    if found is None:
        found = next((cell for cell in known if normalised(cell) == plain), None)
    if found is None:
        raise ValueError(
            f"{attribute} has no category {word.strip()!r}; say in a column maps_to which it is: {', '.join(known)}; or -"
        )
    return found


def _amount(text: str) -> float:
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = math.nan
    if not 0 <= value < 1e12:
        raise ValueError(f"{text!r} is no number of people and no share")
    return value


def _groups(
    path: Path, attribute: Attribute, rows: Sequence[tuple[tuple[str, ...], str, float]], are_shares: bool
) -> list[Group]:
    whole = sum(amount for _, _, amount in rows)
    if are_shares and min(abs(whole - 1), abs(whole / 100 - 1)) > SHARES_OFF_MAX:
        raise DocumentError(f"{path}: the shares of {attribute} add up to {whole:g}, not to 1 or 100")
    amounts: dict[tuple[str, ...], float] = {}
    names: dict[tuple[str, ...], list[str]] = {}
    for cells, category, amount in rows:
        if cells:
            amounts[cells] = amounts.get(cells, 0.0) + amount
            names.setdefault(cells, []).append(category)
    named = [cell for cells in amounts for cell in cells]
    if twice := sorted({cell for cell in named if named.count(cell) > 1}):
        raise DocumentError(
            f"{path}: {attribute}: rows that overlap have to map to the same categories: {', '.join(twice)}"
        )
    total = sum(amounts.values())
    if total <= 0 or len(amounts) < 2:
        raise DocumentError(f"{path}: {attribute} needs two categories or more, with somebody in them")
    order = sorted(amounts, key=lambda cells: CELLS[attribute].index(cells[0]))
    return [Group(" + ".join(names[cells]), cells, amounts[cells] / total) for cells in order]
