"""Score histograms: counts that add up over sites exactly, and figures computed from them with a known error.

An AUROC cannot be averaged over sites, and scores of single images must not leave one. So each site counts, per target
and class, how many of its images scored in each of B bins; the sum of the counts is the histogram of the union, and
every figure here is computed from counts alone. Two images in one bin count as a tie: what that may cost the AUROC is
`auroc_bound`.

Bins. A network that has seen little gives scores in a narrow range, say 0.45 to 0.55, and a confident one piles them up
near 0 and 1; equal bins of the score resolve neither well. Bins are equal in u(z) = (1 + z / (1 + |z|)) / 2 of the
logit z = log(p / (1 - p)): around p = 0.5 twice as fine as equal bins of p, half as fine at 0.9, and at 0.9999 nearly
fifty times as fine. The map is fixed by the number of bins in the study, so it is the same at every site and in every
round.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from models.intervals import on_logit_scale
from privacy.errors import MessageMalformed

SCORE_EDGE = 2.0**-24  # float32 sigmoid is exactly 1 from here on; logits beyond +-16.6 share the outermost bins
COUNT_MAX = 2**31 - 1  # counts cross the wire as int32

Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]


def bin_of(scores: NDArray[np.floating], bins: int) -> Int64:
    """The bin, 0 to bins - 1, of each score in [0, 1]; never decreasing in the score. Shape as given."""
    p = np.clip(np.asarray(scores, dtype=np.float64), SCORE_EDGE, 1 - SCORE_EDGE)
    z = np.log(p) - np.log1p(-p)
    u = (1 + z / (1 + np.abs(z))) / 2
    places: Int64 = np.minimum((u * bins).astype(np.int64), bins - 1)
    return places


def score_of(places: NDArray[np.floating]) -> Float64:
    """The score at each place on the axis of bins, 0 for its lower and 1 for its upper end: the inverse of the map."""
    v = 2 * np.asarray(places, dtype=np.float64) - 1
    with np.errstate(divide="ignore"):
        z = v / (1 - np.abs(v))
    tail = np.exp(-np.abs(z))
    scores: Float64 = np.where(z >= 0, 1, tail) / (1 + tail)
    return scores


@dataclass(frozen=True, eq=False)
class ScoreHistogram:
    """`counts` int64 (T, 2, bins): images without ([t, 0]) and with ([t, 1]) target t, by bin of their score.

    Immutable; `a + b` is exactly the histogram of both. Raises MessageMalformed for another shape or a negative count.
    """

    counts: Int64

    def __post_init__(self) -> None:
        counts = np.asarray(self.counts)
        if counts.ndim != 3 or counts.shape[0] < 1 or counts.shape[1] != 2 or counts.shape[2] < 2:
            raise MessageMalformed(f"a score histogram has the shape (targets, 2, bins), not {counts.shape}")
        if counts.dtype.kind not in "iu":
            raise MessageMalformed(f"a score histogram holds whole numbers, not {counts.dtype}")
        if counts.min() < 0 or counts.max() > COUNT_MAX:
            raise MessageMalformed("a score histogram holds a count that is negative or above 2^31 - 1")
        frozen = counts.astype(np.int64)
        frozen.flags.writeable = False
        object.__setattr__(self, "counts", frozen)

    @classmethod
    def of(
        cls, scores: NDArray[np.floating], targets: NDArray[np.floating], known: NDArray[np.floating], bins: int
    ) -> Self:
        """Count scores (N, T) in [0, 1]; targets (N, T) are 0 or 1 where known (N, T) is not 0, and ignored elsewhere.

        Raises MessageMalformed for other shapes, for a score that is no number in [0, 1], and for a label besides 0 and
        1.
        """
        if scores.ndim != 2 or not scores.shape == targets.shape == known.shape:
            raise MessageMalformed(
                f"scores {scores.shape}, targets {targets.shape}, known {known.shape} must be alike (N, T)"
            )
        labelled = known > 0
        if not ((scores >= 0) & (scores <= 1) | ~labelled).all():
            raise MessageMalformed("a score is not a number between 0 and 1")
        if not (np.isin(targets, (0, 1)) | ~labelled).all():
            raise MessageMalformed("a known label is neither 0 nor 1")
        counts = np.zeros((scores.shape[1], 2, bins), dtype=np.int64)
        for target in range(scores.shape[1]):
            rows = labelled[:, target]
            places = targets[rows, target].astype(np.int64) * bins + bin_of(scores[rows, target], bins)
            counts[target] = np.bincount(places, minlength=2 * bins).reshape(2, bins)
        return cls(counts)

    @classmethod
    def empty(cls, targets: int, bins: int) -> Self:
        """The histogram of no image: `empty + h` equals `h`."""
        return cls(np.zeros((targets, 2, bins), dtype=np.int64))

    @classmethod
    def nearest(cls, noisy: Float64) -> Self:
        """A histogram for noisy counts float64 (T, 2, bins): none negative, each class with the total that its noisy counts have.

        Negative counts become 0 and the others are lowered alike until the total is right ("norm-sub", Wang et al. 2020): cut off
        alone, the noise of empty bins would add up to images that do not exist.
        """
        counts = np.zeros(noisy.shape, np.int64)
        for place in np.ndindex(*noisy.shape[:2]):
            total = round(float(noisy[place].sum()))
            if total <= 0:
                continue
            falling = np.sort(noisy[place])[::-1]
            excess = (falling.cumsum() - total) / np.arange(1, len(falling) + 1)
            kept = int(np.flatnonzero(falling > excess)[-1])
            exact = np.maximum(noisy[place] - excess[kept], 0)
            counts[place] = np.diff(np.rint(np.concatenate([[0.0], exact.cumsum()]))).astype(np.int64)
        return cls(counts)

    @classmethod
    def from_json(cls, value: object) -> Self:
        """The histogram that `to_json` wrote; raises MessageMalformed for anything but nested whole numbers."""
        try:
            counts = np.asarray(value)
        except (ValueError, TypeError, OverflowError):
            raise MessageMalformed("a score histogram must be lists of equal length") from None
        return cls(counts)

    @property
    def targets(self) -> int:
        return int(self.counts.shape[0])

    @property
    def bins(self) -> int:
        return int(self.counts.shape[2])

    def __add__(self, other: "ScoreHistogram") -> "ScoreHistogram":
        if self.counts.shape != other.counts.shape:
            raise MessageMalformed(f"histograms of {self.counts.shape} and {other.counts.shape} cannot be added")
        return ScoreHistogram(self.counts + other.counts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ScoreHistogram) and np.array_equal(self.counts, other.counts)

    def __hash__(self) -> int:
        return hash((self.counts.shape, self.counts.tobytes()))

    def to_array(self) -> NDArray[np.int32]:
        """The counts as they cross the wire: int32 (T, 2, bins). `ScoreHistogram(array)` reads them back."""
        return self.counts.astype(np.int32)

    def to_json(self) -> list[list[list[int]]]:
        """The counts as nested lists (T, 2, bins)."""
        nested: list[list[list[int]]] = self.counts.tolist()
        return nested

    def negatives(self, target: int) -> int:
        return int(self.counts[target, 0].sum())

    def positives(self, target: int) -> int:
        return int(self.counts[target, 1].sum())

    def estimable(self, target: int) -> bool:
        """Whether both classes of the target occur, without which no AUROC exists."""
        return self.negatives(target) > 0 and self.positives(target) > 0

    def coarsened(self, factor: int) -> "ScoreHistogram":
        """Exactly the histogram that bins / factor bins would have given. Raises MessageMalformed unless it divides."""
        if factor < 1 or self.bins % factor or self.bins // factor < 2:
            raise MessageMalformed(f"{self.bins} bins cannot be put together by {factor}")
        return ScoreHistogram(self.counts.reshape(self.targets, 2, self.bins // factor, factor).sum(axis=3))

    def auroc(self, target: int) -> float | None:
        """Area under the ROC curve over the bins, a tie within a bin counting half; None if a class is missing."""
        if not self.estimable(target):
            return None
        negative, positive = self.counts[target].astype(object)  # Python integers: exact, whatever the counts
        below = np.cumsum(negative) - negative
        twice = int((positive * (2 * below + negative)).sum())
        return twice / (2 * self.negatives(target) * self.positives(target))

    def auroc_bound(self, target: int) -> float | None:
        """How far `auroc` can be from that of the raw scores: half of the mixed pairs that share a bin."""
        if not self.estimable(target):
            return None
        negative, positive = self.counts[target].astype(object)
        return int((negative * positive).sum()) / (2 * self.negatives(target) * self.positives(target))

    def roc(self, target: int) -> tuple[Float64, Float64] | None:
        """(false, true positive rate), each (bins + 1,), from (0, 0) to (1, 1); None if a class is missing."""
        if not self.estimable(target):
            return None
        falling = self.counts[target, :, ::-1].cumsum(axis=1)
        curve = np.concatenate([np.zeros((2, 1)), falling / falling[:, -1:]], axis=1)
        return curve[0], curve[1]

    def interval(self, target: int, noise: float = 0.0) -> tuple[float, float] | None:
        """95 % interval of the AUROC: DeLong's variance (DeLong 1988) of the binned scores, on the logit scale.

        `noise`: standard deviation of Gaussian noise that was added to each count before `nearest`; it widens the interval.
        None if a class has fewer than two images. It takes images as independent: with several images of a patient the
        true interval is wider. Where every pair is ordered alike DeLong's variance is 0 and says nothing; then the
        exact binomial bound of no error among as many cases as the smaller class has stands in for it.
        """
        area, negatives, positives = self.auroc(target), self.negatives(target), self.positives(target)
        if area is None or min(negatives, positives) < 2:
            return None
        variance = self._variance(target) + (self._noise_variance(target, noise) if noise else 0.0)
        return on_logit_scale(area, variance, min(negatives, positives))

    def _noise_variance(self, target: int, noise: float) -> float:
        """Of the AUROC, from independent noise of this deviation on each count: to first order in the noise."""
        negative, positive = self.counts[target].astype(np.float64)
        n, p = negative.sum(), positive.sum()
        beaten = (np.cumsum(negative) - negative / 2) / n
        lost = 1 - (np.cumsum(positive) - positive / 2) / p
        area = float((positive * beaten).sum() / p)
        return noise**2 * float(((beaten - area) ** 2).sum() / p**2 + ((lost - area) ** 2).sum() / n**2)

    def _variance(self, target: int) -> float:
        """DeLong's variance: of the placements of the positives among the negatives, and the other way round."""
        negative, positive = self.counts[target].astype(np.float64)
        n, p = negative.sum(), positive.sum()
        beaten = (np.cumsum(negative) - negative / 2) / n  # by bin: share of the negatives that a positive there beats
        lost = 1 - (np.cumsum(positive) - positive / 2) / p  # by bin: share of the positives that beat a negative there
        area = (positive * beaten).sum() / p
        spread = (positive * (beaten - area) ** 2).sum() / (p - 1), (negative * (lost - area) ** 2).sum() / (n - 1)
        return float(spread[0] / p + spread[1] / n)

    def average_precision(self, target: int) -> float | None:
        """Area under the precision-recall curve as a step function over bins; read it beside the share of positives."""
        if not self.estimable(target):
            return None
        negative, positive = self.counts[target, :, ::-1]
        taken = (negative + positive).cumsum()
        precision = positive.cumsum() / np.maximum(taken, 1)
        return float((precision * positive).sum() / positive.sum())

    def average_precision_bound(self, target: int) -> float | None:
        """How far `average_precision` can be from that of the raw scores: with the positives of each bin first and tied, or last
        and one by one.
        """
        area = self.average_precision(target)
        if area is None:
            return None
        from scipy.special import digamma  # only reports need it, and sites load this file

        negative, positive = self.counts[target, :, ::-1].astype(np.float64)
        found, taken = positive.cumsum() - positive, (negative + positive).cumsum() - negative - positive

        # Last, the i-th positive of a bin has the precision (found + i) / (passed + i); first and tied, all share one.
        passed = taken + negative
        last = positive - (passed - found) * (digamma(passed + positive + 1) - digamma(passed + 1))
        first = positive * (found + positive) / np.maximum(taken + positive, 1)
        best, worst = (float(part.sum() / positive.sum()) for part in (first, last))
        return max(best - area, area - worst, 0.0)

    def precision_recall(self, target: int) -> tuple[Float64, Float64] | None:
        """(recall, precision) at each edge with an image above it, from the highest score down; None if a class is missing."""
        if not self.estimable(target):
            return None
        negative, positive = self.counts[target, :, ::-1]
        steps = (negative + positive) > 0
        taken, found = (negative + positive).cumsum()[steps], positive.cumsum()[steps]
        return found / positive.sum(), found / taken

    def cross_entropy(self) -> float | None:
        """Mean cross-entropy over all known labels, each score at the middle of its bin; None without an image."""
        total = int(self.counts.sum())
        if total == 0:
            return None
        middle = score_of((np.arange(self.bins) + 0.5) / self.bins)
        costs = -np.log(np.clip(np.stack([1 - middle, middle]), SCORE_EDGE, 1))
        return float((self.counts * costs).sum() / total)

    def brier(self, target: int) -> float | None:
        """Mean squared distance of score and label, each score at the middle of its bin; None without an image."""
        total = int(self.counts[target].sum())
        if total == 0:
            return None
        middle = score_of((np.arange(self.bins) + 0.5) / self.bins)
        squares = self.counts[target, 0] * middle**2 + self.counts[target, 1] * (1 - middle) ** 2
        return float(squares.sum() / total)
