"""Agreement on an ordered scale: how often a model calls which grade, against the reference standard.

Sites add up a table, images by reference grade and by called grade; quadratic-weighted kappa, mean absolute error and concordance
follow from it exactly. The called grade of an image is the number of steps whose score is 0.5 or more.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from models.subgroups import Scored
from privacy.errors import MessageMalformed

Int64 = npt.NDArray[np.int64]
CALLED_FROM = 0.5
RESAMPLES, SEED = 1000, 1


def table_of(scored: Scored) -> Int64:
    """int64 (T + 1, T + 1): images by reference grade (rows) and called grade (columns); those without all labels are in none."""
    known = (scored.known != 0).all(axis=1)
    truth, called = (scored.targets[known] > 0).sum(axis=1), (scored.scores[known] >= CALLED_FROM).sum(axis=1)
    grades = scored.targets.shape[1] + 1
    return np.bincount(truth * grades + called, minlength=grades**2).reshape(grades, grades).astype(np.int64)


def read(grades: int, numbers: Int64, images: int) -> Int64:
    """The summed table behind `numbers`; raises MessageMalformed if it counts a negative number, or more than all `images`."""
    if numbers.shape != (grades**2,) or numbers.min(initial=0) < 0 or int(numbers.sum()) > images:
        raise MessageMalformed("the summed table of grades contradicts the number of images")
    return numbers.reshape(grades, grades)


def agreement(table: Int64) -> dict[str, Any] | None:
    """Figures of a table with the 95 % interval of kappa (bootstrap over images); None without an image.

    `kappa`: quadratic-weighted (Cohen 1968) over all grades of the scale, whether they occur or not; None if all is one grade.
    `mae`: mean distance in grades. `concordance`: of two images of different reference grade, the share whose called grades are
    in the same order, ties counting half; None if all have one.
    """
    images = int(table.sum())
    if images == 0:
        return None
    generator, share = np.random.default_rng(SEED), (table / images).ravel()
    drawn = [_kappa(generator.multinomial(images, share).reshape(table.shape)) for _ in range(RESAMPLES)]
    found, kappa = [value for value in drawn if value is not None], _kappa(table)
    usable = kappa is not None and len(found) >= 0.95 * RESAMPLES
    distance = np.abs(np.subtract.outer(np.arange(len(table)), np.arange(len(table))))
    return {
        "images": images,
        "kappa": kappa,
        "interval": [float(end) for end in np.percentile(found, [2.5, 97.5])] if usable else None,
        "mae": float((table * distance).sum() / images),
        "concordance": _concordance(table),
        "table": table.tolist(),
    }


def _kappa(table: Int64) -> float | None:
    weights = np.square(np.subtract.outer(np.arange(len(table)), np.arange(len(table)))).astype(np.float64)
    images = table.sum()
    expected = float((np.outer(table.sum(axis=1), table.sum(axis=0)) * weights).sum() / images)
    return 1 - float((table * weights).sum()) / expected if expected else None


def _concordance(table: Int64) -> float | None:
    pairs, right = 0, 0.0
    for low in range(len(table)):
        for high in range(low + 1, len(table)):
            below = np.cumsum(table[low]) - table[low]
            pairs += int(table[low].sum()) * int(table[high].sum())
            right += float((table[high] * (below + table[low] / 2)).sum())
    return right / pairs if pairs else None


def clustered_interval(scored: Scored) -> list[float] | None:
    """The interval of kappa by a bootstrap over patients, each with all her images; None where too many draws have no kappa."""
    patients, owner = np.unique(scored.patients, return_inverse=True)
    if len(patients) == 0:
        return None
    tables = np.array([table_of(_rows(scored, owner == place)) for place in range(len(patients))])
    generator, drawn = np.random.default_rng(SEED), []
    for _ in range(RESAMPLES):
        table = tables[generator.integers(len(tables), size=len(tables))].sum(axis=0)
        drawn.append(_kappa(table) if table.any() else None)
    found = [value for value in drawn if value is not None]
    return [float(end) for end in np.percentile(found, [2.5, 97.5])] if len(found) >= 0.95 * RESAMPLES else None


def _rows(scored: Scored, rows: npt.NDArray[np.bool_]) -> Scored:
    return Scored(scored.scores[rows], scored.targets[rows], scored.known[rows], scored.patients[rows])
