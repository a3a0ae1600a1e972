"""Updates that help nobody, where the coordinator sees single ones (`plain`, `sealed`): zero, frozen, exploding.

Each is flagged with its norm, and its cosine to the last step that all took together. A flag is news for people and changes
nothing: what a robust strategy leaves out is that strategy's rule. Of each update two numbers and a hash are kept. Under masks
nothing is seen here; a site writes the norm of what it sends into its own journal.
"""

import hashlib
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
EXPLODES = 10.0  # times the median norm of the other sites: with one loss and one model, cohorts differ by less
OTHERS_MIN = 2  # that a norm can be called large beside


@dataclass(frozen=True)
class Sighting:
    """One site's update in one round."""

    round: int
    norm: float
    cosine: float | None
    digest: str


class Sightings:
    """What was seen of the updates of one run."""

    def __init__(self) -> None:
        self._last: dict[str, Sighting] = {}
        self._now: dict[str, Sighting] = {}
        self._step: Float32 | None = None

    def see(self, site: str, number: int, update: Float32) -> None:
        """Note the update float32 (P,) of `site` in round `number`."""
        norm = float(np.linalg.norm(update.astype(np.float64)))
        digest = hashlib.sha256(np.ascontiguousarray(update).data).hexdigest()
        self._now[site] = Sighting(number, norm, _cosine(update, self._step), digest)

    def judge(self) -> list[dict[str, Any]]:
        """What is odd about the updates seen since the last call: site, why, norm, and cosine where there was a step before."""
        found = []
        for site, seen in sorted(self._now.items()):
            others = [other.norm for name, other in self._now.items() if name != site]
            if (why := self._why(site, seen, others)) is not None:
                facts = {"round": seen.round, "site": site, "why": why, "norm": float(f"{seen.norm:.3g}")}
                found.append(facts | ({} if seen.cosine is None else {"cosine": round(seen.cosine, 3)}))
        self._last |= self._now
        self._now = {}
        return found

    def close(self, step: Float32) -> None:
        """`step`: the mean update of the round, float32 (P,), which the next ones are compared with."""
        self._step = step

    def _why(self, site: str, seen: Sighting, others: list[float]) -> str | None:
        if seen.norm == 0:
            return "zero"
        before = self._last.get(site)
        # A round that is tried again under another attempt starts from the same model, and learns the same.
        if before is not None and before.round < seen.round and before.digest == seen.digest:
            return "frozen"
        if len(others) >= OTHERS_MIN and seen.norm > EXPLODES * median(others):
            return "exploding"
        return None


def _cosine(update: Float32, step: Float32 | None) -> float | None:
    if step is None or step.shape != update.shape:
        return None
    one, other = update.astype(np.float64), step.astype(np.float64)
    length = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / length if length else None
