"""A number as a target: how far predictions lie from the reference standard, in sums that add up over sites exactly.

A network answers with a place in 0..1 of the declared range, and so is the reference. Both are rounded to UNIT of the range at
the site, so every sum is one of whole numbers: the sums of all sites are exactly those of the union, whatever protects them, and
the squared error follows from the others without a rest. What rounding costs a mean error is UNIT of the range at most.

    images, absolute error, reference, reference squared, prediction, prediction squared, reference times prediction

A site's own figures have intervals by a bootstrap over its patients, because it knows whose images are whose.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from models.intervals import RESAMPLES, SHARE_USABLE, Z_95
from models.sections import RELEASE_MIN, Regression
from models.subgroups import Scored
from privacy.errors import MessageMalformed

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]
STEPS = 4096
UNIT = 1 / STEPS  # of the range; sums of squares of half a billion images are whole numbers that float64 holds
SUMS = 7
FIGURES = ("mae", "rmse", "bias", "r2", "concordance")
COLUMNS = 3 * len(FIGURES) + 1
"""Each figure with its interval, and the number of images in tens."""
ERRORS = ("mae", "rmse", "bias")  # in the target's unit; the others have none
DECIMALS = 3


def sums_of(scored: Scored) -> Int64:
    """int64 (SUMS,) over the images of `scored` that have a reference."""
    total: Int64 = _rows(scored).sum(axis=0)
    return total


def _rows(scored: Scored) -> Int64:
    """int64 (N, SUMS): what each image with a reference adds."""
    known = scored.known[:, 0] != 0
    reference, predicted = (
        np.rint(np.clip(values[known, 0].astype(np.float64), 0, 1) * STEPS).astype(np.int64)
        for values in (scored.targets, scored.scores)
    )
    ones, absolute = np.ones_like(reference), np.abs(predicted - reference)
    columns = (ones, absolute, reference, reference**2, predicted, predicted**2, reference * predicted)
    return np.stack(columns, axis=1).astype(np.int64)


def told(scored: Scored, *, private: bool) -> Int64:
    """The sums that go to the coordinator's sum. `private`: under differential privacy, as histograms do, only of RELEASE_MIN
    images of as many patients.
    """
    few = min(int((scored.known[:, 0] != 0).sum()), len(set(scored.patients.tolist()))) < RELEASE_MIN
    return np.zeros(SUMS, np.int64) if private and few else sums_of(scored)


def read(numbers: Int64, images: int) -> Int64:
    """The sums behind `numbers`. Raises MessageMalformed for sums that no `images` have: of negative numbers, of values outside
    the range, or whose squares contradict them.
    """
    n, absolute, y, yy, p, pp, yp = (int(value) for value in numbers)
    squared = yy - 2 * yp + pp
    possible = (
        min(n, absolute, y, yy, p, pp, yp) >= 0
        and n <= images
        and yy <= y * STEPS <= n * STEPS**2
        and pp <= p * STEPS <= n * STEPS**2
        and y * y <= n * yy
        and p * p <= n * pp
        and yp * yp <= yy * pp
        and absolute**2 <= n * squared
        and squared <= absolute * STEPS
        and abs(p - y) <= absolute
    )
    if not possible:
        raise MessageMalformed("the summed errors contradict each other, or the number of images")
    return numbers


def agreement(task: Regression, sums: Int64) -> dict[str, Any] | None:
    """Every figure in the unit of `task`, with the 95 % intervals that sums allow, images taken as independent; None of nothing.

    `r2`: share of the reference's variance explained (negative where the mean of the reference would do better); `concordance`:
    Lin's coefficient (1989) with his variance of its Fisher transform. Both are None where a variance is zero.
    """
    images = int(sums[0])
    if images == 0:
        return None
    values = _figures(task, sums[None].astype(np.float64))[0]
    found: dict[str, Any] = {name: _finite(value) for name, value in zip(FIGURES, values, strict=True)}
    scale, (_, absolute, y, yy, p, pp, yp) = _reach(task) * UNIT, (float(value) for value in sums)
    squared = (yy - 2 * yp + pp) / images
    spread = {"mae": squared - (absolute / images) ** 2, "bias": squared - ((p - y) / images) ** 2}
    intervals: dict[str, list[float] | None] = dict.fromkeys(FIGURES)
    for name, variance in spread.items():
        reach = Z_95 * scale * math.sqrt(max(0.0, variance) / max(1, images - 1))
        intervals[name] = [found[name] - reach, found[name] + reach] if images > 1 else None
    intervals["concordance"] = _of_concordance(sums, found["concordance"])
    return {"images": images, **found, "intervals": intervals}


def _of_concordance(sums: Int64, found: float | None) -> list[float] | None:
    """Lin's interval: his variance (1989, with the correction of 2000) on the scale of Fisher's z."""
    n, _, y, yy, p, pp, yp = (float(value) for value in sums)
    if found is None or n < 3 or not abs(found) < 1:
        return None
    own, other = yy / n - (y / n) ** 2, pp / n - (p / n) ** 2
    r = (yp / n - y * p / n**2) / math.sqrt(own * other)
    if r == 0:
        return None
    u2, c = ((y - p) / n) ** 2 / math.sqrt(own * other), found
    variance = (1 - r**2) * c**2 / ((1 - c**2) * r**2) + 2 * c**3 * (1 - c) * u2 / (r * (1 - c**2) ** 2)
    variance -= c**4 * u2**2 / (2 * r**2 * (1 - c**2) ** 2)
    reach = Z_95 * math.sqrt(max(0.0, variance) / (n - 2))
    return [math.tanh(math.atanh(c) - reach), math.tanh(math.atanh(c) + reach)]


def _figures(task: Regression, sums: Float64) -> Float64:
    """float64 (R, figures) of sums (R, SUMS); NaN where a figure does not exist."""
    n, absolute, y, yy, p, pp, yp = sums.T
    scale = _reach(task) * UNIT
    with np.errstate(divide="ignore", invalid="ignore"):
        squared, bias = (yy - 2 * yp + pp) / n, (p - y) / n
        own, other, shared = yy / n - (y / n) ** 2, pp / n - (p / n) ** 2, yp / n - y * p / n**2
        # A variance of exactly zero is told by whole numbers; as a difference of quotients it is a rounding error.
        r2 = np.where(n * yy > y * y, 1 - squared / own, np.nan)
        concordance = np.where((n * yy > y * y) & (n * pp > p * p), 2 * shared / (own + other + bias**2), np.nan)
        return np.stack([absolute / n * scale, np.sqrt(squared) * scale, bias * scale, r2, concordance], axis=1)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _reach(task: Regression) -> float:
    return task.range[1] - task.range[0]


def released(task: Regression, scored: Scored, seed: int) -> npt.NDArray[np.float32] | None:
    """float32 (COLUMNS,): a site's own figures with intervals by bootstrap over patients, rounded; None if they stay.

    They leave if there are RELEASE_MIN images of as many patients, and every figure exists in nearly all resamples.
    """
    rows, patients = _rows(scored), scored.patients[scored.known[:, 0] != 0]
    names, places = np.unique(patients, return_inverse=True)
    if min(len(rows), len(names)) < RELEASE_MIN:
        return None
    each = np.zeros((len(names), SUMS), np.int64)
    np.add.at(each, places, rows)
    generator = np.random.default_rng(seed)
    draws = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=RESAMPLES)
    drawn, own = (
        _figures(task, (draws @ each).astype(np.float64)),
        _figures(task, rows.sum(axis=0)[None].astype(float))[0],
    )
    usable = np.isfinite(drawn).all(axis=1)
    if not np.isfinite(own).all() or usable.mean() < SHARE_USABLE:
        return None
    low, high = np.percentile(drawn[usable], [2.5, 97.5], axis=0)
    # A percentile may miss the figure of a skewed sample by a hair; an interval holds its own estimate.
    ends = np.stack([own, np.minimum(low, own), np.maximum(high, own)], axis=1).round(DECIMALS)
    tens = len(rows) // RELEASE_MIN * RELEASE_MIN
    return np.append(ends.ravel(), tens).astype(np.float32)


def read_released(task: Regression, row: npt.NDArray[np.float32]) -> dict[str, Any]:
    """What `released` wrote: each figure, `intervals` by name, and `images`. Raises MessageMalformed for anything else."""
    values = [round(float(value), DECIMALS) for value in row]
    ends = {name: values[3 * place : 3 * place + 3] for place, name in enumerate(FIGURES)}
    images, reach, slack = values[-1], _reach(task), 10.0**-DECIMALS
    ordered = all(low <= value <= high for value, low, high in ends.values())
    within = all(abs(end) <= reach + slack for name in ERRORS for end in ends[name])
    positive = min(ends["mae"][1], ends["rmse"][1]) >= 0
    bounded = all(end <= 1 for end in (*ends["r2"], *ends["concordance"])) and ends["concordance"][1] >= -1
    sound = ends["mae"][0] <= ends["rmse"][0] + slack and abs(ends["bias"][0]) <= ends["mae"][0] + slack
    counted = float(images).is_integer() and images >= RELEASE_MIN and images % RELEASE_MIN == 0
    if not (ordered and within and positive and bounded and sound and counted):
        raise MessageMalformed("a released figure contradicts itself, or should not have been released")
    intervals = {name: [low, high] for name, (_, low, high) in ends.items()}
    return {**{name: value for name, (value, _, _) in ends.items()}, "intervals": intervals, "images": int(images)}
