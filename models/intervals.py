"""Intervals of 95 %: of a share, of a difference, and of the AUROC where several images may be of one patient.

Whoever has raw scores has them at one site. There the AUROC gets two intervals, and both count patients, not images: DeLong's
variance for clustered data (Obuchowski 1997) on the logit scale, and percentiles of a bootstrap over patients. From a sum of
histograms only the images can be told apart (`models.metrics`).
"""

import math

import numpy as np
from numpy.typing import NDArray

Z_95 = 1.959963984540054  # two-sided 95 % of the standard normal distribution
RESAMPLES = 1000
SHARE_USABLE = 0.95  # of the resamples that must hold both classes, or the percentiles are of a selection

Float64 = NDArray[np.float64]
Interval = tuple[float, float]


def wilson(hits: float, of: float) -> Interval | None:
    """Interval of the share `hits` / `of` (Wilson 1927); None of nothing."""
    if of <= 0:
        return None
    share, z2 = hits / of, Z_95**2
    centre = (share + z2 / (2 * of)) / (1 + z2 / of)
    reach = Z_95 / (1 + z2 / of) * math.sqrt(share * (1 - share) / of + z2 / (4 * of**2))
    return max(0.0, centre - reach), min(1.0, centre + reach)


def clustered_share(hits: NDArray[np.bool_], patients: NDArray[np.int64]) -> Interval | None:
    """Interval of the share of `hits` (N,) among images of `patients` (N,): Wilson's of as many images as these are worth.

    Images of one patient resemble each other, so they are worth fewer (Rao and Scott 1992): the variance of a ratio estimate over
    patients says how many. Never more than there are; and without any spread, as many as there are patients. None of nothing.
    """
    if len(hits) == 0:
        return None
    _, owner = np.unique(patients, return_inverse=True)
    images, found = np.bincount(owner), np.bincount(owner, hits)
    share, everyone = float(found.sum() / images.sum()), len(images)
    worth = float(everyone)
    if 0 < share < 1 and everyone > 1:
        spread = everyone / (everyone - 1) * float(((found - share * images) ** 2).sum()) / float(images.sum()) ** 2
        worth = min(float(images.sum()), share * (1 - share) / spread) if spread > 0 else float(everyone)
    return wilson(share * worth, worth)


def difference(first: float, its: Interval, second: float, others: Interval) -> Interval:
    """Interval of `first` - `second`, two independent estimates with their intervals (MOVER, Zou and Donner 2008)."""
    gap = first - second
    low = gap - math.hypot(first - its[0], others[1] - second)
    return low, gap + math.hypot(its[1] - first, second - others[0])


def on_logit_scale(area: float, variance: float, cases: int) -> Interval:
    """Interval of an AUROC of this variance. A variance of 0 says nothing: then the exact binomial bound of no error in `cases`,
    the images (or patients) of the smaller class.
    """
    if area in (0.0, 1.0) or variance <= 0.0:
        reach = 1 - 0.025 ** (1 / cases)
        return max(0.0, area - reach), min(1.0, area + reach)
    centre, width = math.log(area / (1 - area)), Z_95 * math.sqrt(variance) / (area * (1 - area))
    return _expit(centre - width), _expit(centre + width)


def clustered_auroc(scores: Float64, labels: Float64, patients: NDArray[np.int64]) -> tuple[float, float] | None:
    """(AUROC, its variance) of raw scores (N,), labels (N,) of 0 and 1, patients (N,) from 0: Obuchowski's for clustered data.

    With one image of each patient it is DeLong's. None unless two patients have a positive image and two a negative one.
    """
    positive = labels == 1
    wins, losses = _placements(scores, positive)
    of_positives, of_negatives = patients[positive], patients[~positive]
    with_positive, with_negative = len(np.unique(of_positives)), len(np.unique(of_negatives))
    if min(with_positive, with_negative) < 2:
        return None
    m, n, everyone = len(of_positives), len(of_negatives), len(np.unique(patients))
    area, most = float(wins.mean()), int(patients.max()) + 1
    # By patient: how far the placements of her images are from what as many average images would have.
    above = np.bincount(of_positives, wins - area, most)
    below = np.bincount(of_negatives, losses - area, most)
    spread_above = with_positive / ((with_positive - 1) * m) * float((above**2).sum())
    spread_below = with_negative / ((with_negative - 1) * n) * float((below**2).sum())
    together = everyone / (everyone - 1) * float((above * below).sum())
    return area, max(0.0, spread_above / m + spread_below / n + 2 * together / (m * n))


def clustered_interval(scores: Float64, labels: Float64, patients: NDArray[np.int64]) -> Interval | None:
    """Interval of the AUROC by `clustered_auroc`; None where that is None."""
    found = clustered_auroc(scores, labels, patients)
    if found is None:
        return None
    fewer = min(len(np.unique(patients[labels == 1])), len(np.unique(patients[labels == 0])))
    return on_logit_scale(found[0], found[1], fewer)


def bootstrap_interval(scores: Float64, labels: Float64, patients: NDArray[np.int64], seed: int) -> Interval | None:
    """Percentile interval of the AUROC over RESAMPLES draws of patients, each with all her images; the same for the same seed.

    None where too many draws lack a class, or there is none to begin with.
    """
    _, patients = np.unique(patients, return_inverse=True)
    if len(patients) == 0:
        return None
    whole = int(patients.max()) + 1
    order = np.argsort(scores, kind="stable")
    sorted_scores, positive, owner = scores[order], labels[order] == 1, patients[order]
    # Equal scores are ties wherever they came from: a step ends where the score changes.
    ends = np.flatnonzero(np.append(sorted_scores[1:] != sorted_scores[:-1], True))
    generator, areas = np.random.default_rng(seed), []
    for _ in range(RESAMPLES):
        times = np.bincount(generator.integers(whole, size=whole), minlength=whole)[owner]
        up = np.diff(np.cumsum(times * positive)[ends], prepend=0)
        down = np.diff(np.cumsum(times * ~positive)[ends], prepend=0)
        pairs = int(up.sum()) * int(down.sum())
        if pairs:
            areas.append(float((up * (np.cumsum(down) - down / 2)).sum()) / pairs)
    if len(areas) < SHARE_USABLE * RESAMPLES:
        return None
    low, high = np.percentile(areas, [2.5, 97.5])
    return float(low), float(high)


def bootstrap_mean(values: Float64, patients: NDArray[np.int64], seed: int) -> tuple[float, float, float]:
    """(mean, low, high): mean of `values`, and its percentile interval over RESAMPLES draws of patients, each with all of hers.

    The ends are moved to hold the mean where few patients and a skewed figure would leave it out. Needs a value.
    """
    _, owner = np.unique(patients, return_inverse=True)
    whole = int(owner.max()) + 1
    sums, sizes = np.bincount(owner, values, whole), np.bincount(owner, minlength=whole)
    drawn = np.random.default_rng(seed).integers(whole, size=(RESAMPLES, whole))
    low, high = np.percentile(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1), [2.5, 97.5])
    mean = float(values.mean())
    return mean, min(float(low), mean), max(float(high), mean)


def _placements(scores: Float64, positive: NDArray[np.bool_]) -> tuple[Float64, Float64]:
    """For each positive, the share of negatives that score lower; for each negative, that of positives that score higher."""
    up, down = np.sort(scores[positive]), np.sort(scores[~positive])

    def share_below(values: Float64, among: Float64) -> Float64:
        left, right = (np.searchsorted(among, values, side) for side in ("left", "right"))
        share: Float64 = (left + right) / (2 * max(len(among), 1))
        return share

    return share_below(scores[positive], down), 1 - share_below(scores[~positive], up)


def _expit(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))
