"""Calibration of scores that are meant as probabilities, computed from a sum of score histograms.

Each image stands at the middle of its bin. What its true score elsewhere in the bin could change is given beside each figure that
has such a bound. A model that was trained with classes weighed equally is not calibrated to how common the finding is, and the
figures here say so.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.intervals import Z_95, wilson
from models.metrics import SCORE_EDGE, Float64, ScoreHistogram, score_of

GROUPS = 10  # of equal width in the score, as most published expected calibration errors use
NEWTON_STEPS = 50
SHIFT_MAX, BISECTIONS = 64.0, 60  # logits of scores lie within 17 of 0, and those of shares of 2^31 images within 22


@dataclass(frozen=True)
class Calibration:
    """`brier`, `ece` with the bound of their binning error; `slope`, `intercept` with their intervals, None without an estimate.

    `slope`: of the logistic regression of the label on the score's logit; 1 is ideal, below 1 scores are too extreme.
    `intercept`: calibration in the large, with the slope held at 1; above 0 scores are too low (Van Calster et al. 2019).
    `table`: groups of scores with mean score, share of positives and its interval, and images.
    """

    brier: float
    brier_bound: float
    ece: float
    ece_bound: float
    slope: tuple[float, float, float] | None
    intercept: tuple[float, float, float] | None
    table: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        def line(found: tuple[float, float, float] | None) -> dict[str, Any]:
            return {"value": found and found[0], "interval": found and [found[1], found[2]]}

        plain = {name: getattr(self, name) for name in ("brier", "brier_bound", "ece", "ece_bound", "table")}
        return plain | {"groups": GROUPS, "slope": line(self.slope), "intercept": line(self.intercept)}


def calibration(histogram: ScoreHistogram, target: int) -> Calibration | None:
    """Of one target; None if a class is missing."""
    if not histogram.estimable(target):
        return None
    bins, total = histogram.bins, int(histogram.counts[target].sum())
    negative, positive = histogram.counts[target].astype(np.float64)
    # A score is never nearer to 0 or 1 than SCORE_EDGE (`bin_of`), and its logit is finite.
    middle = np.clip(score_of((np.arange(bins) + 0.5) / bins), SCORE_EDGE, 1 - SCORE_EDGE)
    low, high = score_of(np.arange(bins) / bins), score_of((np.arange(bins) + 1) / bins)
    reach = np.maximum(middle - low, high - middle)
    # A square changes by at most twice its base, which is at most 1, times what the score moves by, and no more than to an end.
    off = np.maximum(np.abs((1 - low) ** 2 - (1 - middle) ** 2), np.abs((1 - high) ** 2 - (1 - middle) ** 2))
    off_negative = np.maximum(np.abs(low**2 - middle**2), np.abs(high**2 - middle**2))
    table, error = _groups(negative, positive, middle)
    return Calibration(
        brier=histogram.brier(target) or 0.0,
        brier_bound=float((positive * off + negative * off_negative).sum() / total),
        ece=error,
        ece_bound=float(((negative + positive) * reach).sum() / total),
        slope=_slope(negative, positive, middle),
        intercept=_in_the_large(negative, positive, middle),
        table=table,
    )


def _groups(negative: Float64, positive: Float64, middle: Float64) -> tuple[list[dict[str, Any]], float]:
    """The reliability table, without empty groups, and the expected calibration error over it."""
    places, total, error, table = np.minimum((middle * GROUPS).astype(int), GROUPS - 1), 0.0, 0.0, []
    for group in range(GROUPS):
        inside = places == group
        images, found = int((negative + positive)[inside].sum()), int(positive[inside].sum())
        if images == 0:
            continue
        score = float(((negative + positive)[inside] * middle[inside]).sum() / images)
        low, high = wilson(found, images) or (0.0, 1.0)
        table.append({"score": score, "observed": found / images, "interval": [low, high], "images": images})
        error += images * abs(score - found / images)
        total += images
    return table, error / total


def _slope(negative: Float64, positive: Float64, middle: Float64) -> tuple[float, float, float] | None:
    """(slope, its Wald interval) by Newton's method; None where the classes do not overlap in the score: it would be infinite."""
    taken = negative + positive > 0
    z, hits, weight = _logit(middle[taken]), positive[taken], (negative + positive)[taken]
    of_positives, of_negatives = z[hits > 0], z[weight > hits]
    if of_positives.min() >= of_negatives.max() or of_negatives.min() >= of_positives.max():
        return None
    # In units of the spread of the scores, which may be a hundredth or ten, and about their mean.
    spread = float(z.std())
    design = np.stack([np.ones_like(z), (z - z.mean()) / spread], axis=1)

    def likelihood(beta: Float64) -> float:
        line = design @ beta
        return float((hits * line - weight * np.logaddexp(0, line)).sum())

    beta = np.zeros(2)
    for _ in range(NEWTON_STEPS):
        p = 1 / (1 + np.exp(-np.clip(design @ beta, -500, 500)))
        information = design.T @ (design * (weight * p * (1 - p))[:, None])
        if np.linalg.cond(information) > 1e12:
            return None
        uphill = design.T @ (hits - weight * p)
        step = np.linalg.solve(information, uphill)
        if np.abs(step).max() < 1e-10 * (1 + np.abs(beta).max()):
            value, error = float(beta[1]) / spread, math.sqrt(np.linalg.inv(information)[1, 1]) / spread
            return value, value - Z_95 * error, value + Z_95 * error
        # A full step may lead far beyond the top; it is halved until it gains a quarter of what the ascent at its foot promises.
        while np.abs(step).max() > 1e-12 and likelihood(beta + step) < likelihood(beta) + uphill @ step / 4 - 1e-9:
            step = step / 2
        beta = beta + step
    return None


def _in_the_large(negative: Float64, positive: Float64, middle: Float64) -> tuple[float, float, float] | None:
    """(shift of all logits that makes the mean score the share of positives, its Wald interval); None if none is found.

    By bisection: the mean rises with the shift, but is flat far from the answer, where Newton's method goes astray.
    """
    taken = negative + positive > 0
    z, weight, hits = _logit(middle[taken]), (negative + positive)[taken], float(positive.sum())

    def shifted(by: float) -> Float64:
        p: Float64 = 1 / (1 + np.exp(-np.clip(z + by, -500, 500)))
        return p

    low, high = -SHIFT_MAX, SHIFT_MAX
    for _ in range(BISECTIONS):
        shift = (low + high) / 2
        low, high = (shift, high) if float((weight * shifted(shift)).sum()) < hits else (low, shift)
    p = shifted(shift)
    information = float((weight * p * (1 - p)).sum())
    if information < 1e-9:
        return None
    return shift, shift - Z_95 / math.sqrt(information), shift + Z_95 / math.sqrt(information)


def _logit(scores: Float64) -> Float64:
    z: Float64 = np.log(scores) - np.log1p(-scores)
    return z
