"""Operating points: thresholds fixed on development data, and what comes of them on the test split.

A threshold that is chosen where it is judged looks better than it is. So each is chosen on the summed validation histogram of
the selected round, by a rule, and applied to the test histogram. It lies on an edge between bins, so what it does to the images
of either histogram is exact: no image lies across an edge.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from models.intervals import Interval, wilson
from models.metrics import ScoreHistogram, bin_of, score_of

Rule = Literal["youden", "sensitivity_90", "sensitivity_95", "specificity_90"]
RULES: tuple[Rule, ...] = get_args(Rule)
WORDS: dict[Rule, str] = {
    "youden": "sensitivity + specificity largest",
    "sensitivity_90": "sensitivity at least 0.90",
    "sensitivity_95": "sensitivity at least 0.95",
    "specificity_90": "specificity at least 0.90",
}
DECISION_THRESHOLDS = tuple(n / 100 for n in range(1, 100))


@dataclass(frozen=True)
class Threshold:
    """Images whose score lies in bin `edge` or above are called positive; `score` is the least such score."""

    edge: int
    score: float


@dataclass(frozen=True)
class Rate:
    """A share with its Wilson interval; both None where it is a share of nothing."""

    value: float | None
    interval: Interval | None

    @classmethod
    def of(cls, hits: int, among: int) -> "Rate":
        return cls(hits / among if among else None, wilson(hits, among))

    def to_json(self) -> dict[str, Any]:
        return {"value": self.value, "interval": None if self.interval is None else list(self.interval)}


@dataclass(frozen=True)
class Confusion:
    """Images by reference standard and by what a threshold calls them."""

    true_positive: int
    false_negative: int
    true_negative: int
    false_positive: int

    @classmethod
    def at(cls, histogram: ScoreHistogram, target: int, edge: int) -> "Confusion":
        """Exact for any edge from 0 (all positive) to the number of bins (none)."""
        below, above = histogram.counts[target, :, :edge].sum(axis=1), histogram.counts[target, :, edge:].sum(axis=1)
        return cls(int(above[1]), int(below[1]), int(below[0]), int(above[0]))

    @property
    def sensitivity(self) -> Rate:
        return Rate.of(self.true_positive, self.true_positive + self.false_negative)

    @property
    def specificity(self) -> Rate:
        return Rate.of(self.true_negative, self.true_negative + self.false_positive)

    @property
    def ppv(self) -> Rate:
        return Rate.of(self.true_positive, self.true_positive + self.false_positive)

    @property
    def npv(self) -> Rate:
        return Rate.of(self.true_negative, self.true_negative + self.false_negative)

    def to_json(self) -> dict[str, Any]:
        rates = {name: getattr(self, name).to_json() for name in ("sensitivity", "specificity", "ppv", "npv")}
        return vars(self) | rates


def thresholds(development: ScoreHistogram, target: int) -> dict[Rule, Threshold]:
    """The threshold of each rule on the development histogram; empty if a class is missing there.

    A sensitivity is kept with as many negatives below as possible, a specificity with as many positives above; of equal sums, the
    lower threshold is taken, which misses fewer.
    """
    if not development.estimable(target):
        return {}
    bins, counts = development.bins, development.counts[target]
    below = np.concatenate([np.zeros((2, 1), np.int64), counts.cumsum(axis=1)], axis=1)  # (2, bins + 1), by edge
    negatives, positives = (int(total) for total in below[:, -1])
    edges: dict[Rule, int] = {
        # Whole numbers: 0.95 of 20 positives are 19, and no rounding of a quotient may make them 20, or part equal sums.
        "youden": int(np.argmax(below[0].astype(object) * positives - below[1].astype(object) * negatives)),
        "sensitivity_90": int(np.flatnonzero(10 * (positives - below[1]) >= 9 * positives)[-1]),
        "sensitivity_95": int(np.flatnonzero(20 * (positives - below[1]) >= 19 * positives)[-1]),
        "specificity_90": int(np.flatnonzero(10 * below[0] >= 9 * negatives)[0]),
    }
    return {rule: Threshold(edge, float(score_of(np.array(edge / bins)))) for rule, edge in edges.items()}


def net_benefit(histogram: ScoreHistogram, target: int) -> list[dict[str, float]]:
    """The decision curve (Vickers and Elkin 2006): net benefit of the model and of calling everybody positive, by threshold.

    Each of DECISION_THRESHOLDS is moved to an edge between bins next to it, where the counts are exact, and is given as it is
    there. Empty without an image of each class. That the threshold is a probability takes a calibrated model.
    """
    if not histogram.estimable(target):
        return []
    total = int(histogram.counts[target].sum())
    places = bin_of(np.array(DECISION_THRESHOLDS), histogram.bins)
    curve = []
    for edge in sorted({int(place) for place in places} - {0}):
        at = float(score_of(np.array(edge / histogram.bins)))
        cell, odds = Confusion.at(histogram, target, edge), at / (1 - at)
        everyone = histogram.positives(target) - odds * histogram.negatives(target)
        model = cell.true_positive - odds * cell.false_positive
        curve.append({"threshold": at, "model": model / total, "all": everyone / total})
    return curve
