"""How the mean of the updates becomes the next model: pure functions of arrays, without Flower, files or torch.

A strategy is one method: `step(arrays, mean, state) -> (arrays, state)`. It changes none of its arguments, so a round that is
repeated after a crash gives the same model. It gets the mean over all cases, and no site's own update: most strategies of
the literature need no more, and under masks nothing else exists.
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from models.study import Study
from privacy.errors import MessageMalformed

Float32 = NDArray[np.float32]
State = Mapping[str, Float32]
"""What a strategy carries from round to round, by name; it is stored in the checkpoint. FedAvg carries nothing."""


class Aggregation(Protocol):
    """What the coordinator's round calls."""

    def step(self, arrays: Float32, mean: Float32, state: State) -> tuple[Float32, State]: ...


class FedAvg:
    """The mean of the updates, weighted by cases, added to the model (McMahan et al. 2017, algorithm 1)."""

    def step(self, arrays: Float32, mean: Float32, state: State) -> tuple[Float32, State]:
        """The next model float32 (P,) from `arrays` (P,) and the weighted `mean` of the updates (P,).

        Raises MessageMalformed if the mean has another length or holds a value that is no finite number, or if the next
        model would.
        """
        _check_array("the model", arrays, arrays.shape)
        _check_array("the mean update", mean, arrays.shape)
        with np.errstate(over="ignore"):
            after = arrays + mean
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
