"""How updates become the next model: pure functions of arrays, without Flower, files or torch.

A strategy is one method: `step(arrays, updates, state) -> (arrays, state)`. It changes none of its arguments, so a
round that is repeated after a crash gives the same model. Updates come as an iterable and are folded in one by one:
the coordinator holds one accumulator, not a model per site.
"""

from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from models.study import Study
from privacy.errors import MessageMalformed, QuorumLost

Float32 = NDArray[np.float32]
State = Mapping[str, Float32]
"""What a strategy carries from round to round, by name; it is stored in the checkpoint. FedAvg carries nothing."""
CASES_MAX = 2**31 - 1  # images of one site in one round: above any archive, and exact in float64


class Aggregation(Protocol):
    """What the coordinator's round calls."""

    def step(self, arrays: Float32, updates: Iterable[tuple[Float32, int]], state: State) -> tuple[Float32, State]: ...


class FedAvg:
    """The mean of the updates, weighted by cases, added to the model (McMahan et al. 2017, algorithm 1)."""

    def step(self, arrays: Float32, updates: Iterable[tuple[Float32, int]], state: State) -> tuple[Float32, State]:
        """The next model float32 (P,) from `arrays` (P,) and `updates` of (delta float32 (P,), cases >= 1).

        Sums in float64, so the order of arrival moves a weight by a rounding of float32 at most. Raises QuorumLost if
        there is no update, MessageMalformed if one has another length, no cases or a value that is no finite number.
        """
        _check_array("the model", arrays, arrays.shape)
        weighted, cases = np.zeros(arrays.shape, dtype=np.float64), 0
        for delta, weight in updates:
            _check_array("an update", delta, arrays.shape)
            if isinstance(weight, bool) or not isinstance(weight, int | np.integer) or not 1 <= weight <= CASES_MAX:
                raise MessageMalformed(f"an update must rest on 1 to {CASES_MAX} cases, not {weight!r}")
            weighted += delta.astype(np.float64) * int(weight)
            cases += int(weight)
        if cases == 0:
            raise QuorumLost("a round without any update cannot change the model")
        after = (arrays + weighted / cases).astype(np.float32)
        _check_array("the next model", after, arrays.shape)
        return after, dict(state)


def build(study: Study) -> Aggregation:
    """The strategy that the study names."""
    kinds: dict[str, type[FedAvg]] = {"fedavg": FedAvg}
    return kinds[study.strategy.name]()


def _check_array(what: str, array: Float32, shape: tuple[int, ...]) -> None:
    if array.ndim != 1 or array.size == 0 or array.shape != shape or array.dtype != np.float32:
        raise MessageMalformed(f"{what} is {array.dtype} {array.shape}; expected float32 {shape}")
    if not np.isfinite(array).all():
        raise MessageMalformed(f"{what} holds values that are not finite numbers")
