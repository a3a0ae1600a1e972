"""How the mean of the updates becomes the next model: pure functions of arrays, without Flower, files or torch.

A strategy is one method: `step(arrays, mean, state) -> (arrays, state)`. It changes none of its arguments, so a round that is
repeated after a crash gives the same model. It gets the mean over all cases, and no site's own update: most strategies of
the literature need no more, and under masks nothing else exists.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from models.study import Study, Training
from privacy.errors import MessageMalformed

Float32 = NDArray[np.float32]
State = Mapping[str, Float32]
"""What a strategy carries from round to round, by name; it is stored in the checkpoint. FedAvg carries nothing, FedSGD its
velocity and the number of its steps."""


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


@dataclass(frozen=True)
class FedSGD:
    """Gradient descent with momentum along the mean gradient of all sites (McMahan et al. 2017; Polyak 1964).

    For `privacy.mode: distributed`: what arrives is the noisy sum of clipped gradients in units of the clip norm, divided by the
    sites' public sizes; `gain` = clip norm / sampling rate makes a gradient of it. All of this happens after the noise.
    """

    training: Training
    gain: float
    momentum: float

    def step(self, arrays: Float32, mean: Float32, state: State) -> tuple[Float32, State]:
        """velocity = momentum * velocity + mean * gain; the next model is `arrays` less the rate of this step times velocity.

        Raises MessageMalformed as `FedAvg.step` does.
        """
        _check_array("the model", arrays, arrays.shape)
        _check_array("the mean gradient", mean, arrays.shape)
        velocity, steps = state.get("velocity", np.zeros_like(arrays)), state.get("steps", np.zeros(1, np.float32)) + 1
        _check_array("the velocity", velocity, arrays.shape)
        with np.errstate(over="ignore"):
            velocity = np.float32(self.momentum) * velocity + np.float32(self.gain) * mean
            after = arrays - np.float32(self.training.rate(int(steps[0]))) * velocity
        _check_array("the next model", after, arrays.shape)
        return after, {"velocity": velocity, "steps": steps}


def build(study: Study) -> Aggregation:
    """The strategy that the study names."""
    if study.strategy.name == "fedavg" or study.privacy == "none":
        return FedAvg()
    return FedSGD(study.training, study.privacy.clip_norm / study.privacy.sampling_rate, study.strategy.momentum)


def _check_array(what: str, array: Float32, shape: tuple[int, ...]) -> None:
    if array.ndim != 1 or array.size == 0 or array.shape != shape or array.dtype != np.float32:
        raise MessageMalformed(f"{what} is {array.dtype} {array.shape}; expected float32 {shape}")
    if not np.isfinite(array).all():
        raise MessageMalformed(f"{what} holds values that are not finite numbers")
