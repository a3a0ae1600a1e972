"""How the mean of the updates becomes the next model: pure functions of arrays, without Flower, files or torch.

A strategy is one method: `step(arrays, mean, state) -> (arrays, state)`. It changes none of its arguments, so a round that is
repeated after a crash gives the same model. It gets the mean over all cases, and no site's own update: most strategies of
the literature need no more, and under masks nothing else exists. Robust ones need more: `combine(updates)` puts something else in
the place of the mean, and `step` goes on from there. What they guarantee holds for the sites of one round.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from models.study import Study, Training
from privacy.errors import MessageMalformed, QuorumLost

Float32 = NDArray[np.float32]
State = Mapping[str, Float32]
"""What a strategy carries from round to round, by name; it is stored in the checkpoint. FedAvg carries nothing, FedSGD its
velocity and the number of its steps, SCAFFOLD the common control variate, the others what their papers call momentum and
second moment."""
BLOCK = 64 * 1024  # weights compared at a time: 64 sites' take 32 MiB as float64, whatever the model


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


class Scaffold:
    """The mean of the updates, and of the sites' control variates (Karimireddy et al. 2020, algorithm 1, global step size 1).

    Both are weighted by cases, as everything is. Sites send their variates and not the changes of them: with all sites in
    every round, c + mean(change) is mean(variates), and this sum has no memory, so a site that was missing, or lost its
    variate, leaves no bias behind.
    """

    def step(self, arrays: Float32, mean: Float32, state: State) -> tuple[Float32, State]:
        """The next model (P,) from `arrays` (P,) and `mean` (2P,): the updates', then the variates'.

        Raises MessageMalformed as `FedAvg.step` does.
        """
        _check_array("the mean update and variate", mean, (2 * arrays.size,))
        after, _ = FedAvg().step(arrays, mean[: arrays.size], {})
        return after, {"variate": mean[arrays.size :].copy()}


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


@dataclass(frozen=True)
class FedAvgM:
    """The mean of the updates as a gradient with momentum (Hsu et al. 2019)."""

    rate: float
    momentum: float

    def step(self, arrays: Float32, mean: Float32, state: State) -> tuple[Float32, State]:
        """velocity = momentum * velocity + mean; the next model is `arrays` plus rate * velocity.

        Raises MessageMalformed as `FedAvg.step` does.
        """
        _check_array("the model", arrays, arrays.shape)
        _check_array("the mean update", mean, arrays.shape)
        velocity = state.get("velocity", np.zeros_like(arrays))
        _check_array("the velocity", velocity, arrays.shape)
        with np.errstate(over="ignore"):
            velocity = np.float32(self.momentum) * velocity + mean
            after = arrays + np.float32(self.rate) * velocity
        _check_array("the next model", after, arrays.shape)
        return after, {"velocity": velocity}


@dataclass(frozen=True)
class Adaptive:
    """FedAdam and FedYogi (Reddi et al. 2021, algorithm 2): each weight has a step size of its own.

    The paper's names: m the decayed mean of the updates, v that of their squares, which begins at tau^2; no correction of
    the first rounds. Computed in float64, kept in float32.
    """

    rate: float
    beta1: float
    beta2: float
    tau: float
    yogi: bool

    def step(self, arrays: Float32, mean: Float32, state: State) -> tuple[Float32, State]:
        """The next model is `arrays` plus rate * m / (sqrt(v) + tau). Raises MessageMalformed as `FedAvg.step` does."""
        _check_array("the model", arrays, arrays.shape)
        _check_array("the mean update", mean, arrays.shape)
        m, v = state.get("m", np.zeros_like(arrays)), state.get("v", np.full_like(arrays, self.tau**2))
        _check_array("the first moment", m, arrays.shape)
        _check_array("the second moment", v, arrays.shape)
        if v.min() < 0:
            raise MessageMalformed("the second moment is negative")
        m64 = self.beta1 * m.astype(np.float64) + (1 - self.beta1) * mean
        v64, square = v.astype(np.float64), m64**2
        # Yogi moves v by a share of the square, not of their difference: v forgets large squares slowly.
        toward = -np.sign(v64 - square) * square if self.yogi else square - v64
        v64 = v64 + (1 - self.beta2) * toward
        with np.errstate(over="ignore"):
            after = (arrays + self.rate * m64 / (np.sqrt(v64) + self.tau)).astype(np.float32)
            kept = {"m": m64.astype(np.float32), "v": v64.astype(np.float32)}
        _check_array("the next model", after, arrays.shape)
        _check_array("the second moment", kept["v"], arrays.shape)
        return after, kept


@dataclass(frozen=True, eq=False)
class Combined:
    """What stands for the mean update float32 (P,), and the sites whose updates have no part in it, by name."""

    update: Float32
    left_out: list[str] = field(default_factory=list)


class Combination(Protocol):
    """What a robust strategy makes of each site's own update: the same whatever order they come in.

    Sites count the same, because the number of cases is what a hostile site says. Raises MessageMalformed for updates that do not
    belong together, QuorumLost if they are too few for what is promised.
    """

    def combine(self, updates: Mapping[str, Float32]) -> Combined: ...


class Median:
    """The median of each weight over the sites (Yin et al. 2018, option I). Withstands fewer than half of them."""

    def combine(self, updates: Mapping[str, Float32]) -> Combined:
        _check_updates(updates, 1)
        return Combined(np.concatenate([np.median(block, axis=0) for block in _blocks(updates)]).astype(np.float32))


@dataclass(frozen=True)
class TrimmedMean:
    """The mean of each weight without the `share` of sites at either end (Yin et al. 2018, option II), rounded down."""

    share: float

    def combine(self, updates: Mapping[str, Float32]) -> Combined:
        _check_updates(updates, 1)
        cut = math.floor(round(self.share * len(updates), 9))  # 0.29 * 100 is 28.999999999999996
        kept = slice(cut, len(updates) - cut)
        means = [np.sort(block, axis=0)[kept].mean(axis=0) for block in _blocks(updates)]
        return Combined(np.concatenate(means).astype(np.float32))


@dataclass(frozen=True)
class Krum:
    """The mean of the `selected` updates nearest to the others (Blanchard et al. 2017; 1 is Krum, more Multi-Krum).

    An update's score is the sum of its squared distances to the n - f - 2 nearest others; of equal scores, the first by name
    counts. Withstands f = `byzantine` of n >= 2 f + 3 sites.
    """

    byzantine: int
    selected: int

    def combine(self, updates: Mapping[str, Float32]) -> Combined:
        n = len(updates)
        _check_updates(updates, max(2 * self.byzantine + 3, self.byzantine + 2 + self.selected))
        distances = np.zeros((n, n))
        for block in _blocks(updates):
            for i in range(n):
                distances[i] += ((block - block[i]) ** 2).sum(axis=1)
        np.fill_diagonal(distances, np.inf)  # nobody is near to itself
        scores = np.sort(distances, axis=1)[:, : n - self.byzantine - 2].sum(axis=1)
        chosen = sorted(np.argsort(scores, kind="stable")[: self.selected].tolist())
        names = sorted(updates)
        means = [block[chosen].mean(axis=0) for block in _blocks(updates)]
        return Combined(np.concatenate(means).astype(np.float32), [names[i] for i in range(n) if i not in chosen])


def build(study: Study) -> Aggregation:
    """How the study's strategy goes on from the mean update, or from what a robust one puts in its place."""
    name, given = study.strategy.name, study.strategy.parameters
    if name == "fedsgd" and study.privacy != "none":
        return FedSGD(study.training, study.privacy.clip_norm / study.privacy.sampling_rate, given["momentum"])
    if study.strategy.steered:
        return Scaffold()
    if name == "fedavgm":
        return FedAvgM(given["server_rate"], given["momentum"])
    if name in ("fedadam", "fedyogi"):
        betas = given["beta1"], given["beta2"]
        return Adaptive(given["server_rate"], *betas, given["tau"], name == "fedyogi")
    return FedAvg()


def sent(study: Study, arrays: Float32, state: State) -> Float32:
    """What sites are sent to train from: the model (P,); with SCAFFOLD (2P,), the common control variate behind it."""
    if not study.strategy.steered:
        return arrays
    variate = state.get("variate", np.zeros_like(arrays))
    _check_array("the control variate", variate, arrays.shape)
    return np.concatenate([arrays, variate])


def combination(study: Study) -> Combination | None:
    """What the study's strategy makes of single updates; None if it needs their mean only."""
    name, given = study.strategy.name, study.strategy.parameters
    if name == "median":
        return Median()
    if name == "trimmed_mean":
        return TrimmedMean(given["trimmed_share"])
    if name == "krum":
        return Krum(int(given["byzantine"]), int(given["selected"]))
    return None


def _blocks(updates: Mapping[str, Float32]) -> Iterator[NDArray[np.float64]]:
    """float64 (sites, up to BLOCK): the updates, sites sorted by name, a stretch of weights at a time."""
    rows = [updates[name] for name in sorted(updates)]
    for start in range(0, rows[0].size, BLOCK):
        yield np.stack([row[start : start + BLOCK] for row in rows]).astype(np.float64)


def _check_updates(updates: Mapping[str, Float32], least: int) -> None:
    if len(updates) < least:
        raise QuorumLost(f"{len(updates)} of {least} needed updates are there")
    shape = next(iter(updates.values())).shape
    for name, update in updates.items():
        _check_array(f"the update of {name}", update, shape)


def _check_array(what: str, array: Float32, shape: tuple[int, ...]) -> None:
    if array.ndim != 1 or array.size == 0 or array.shape != shape or array.dtype != np.float32:
        raise MessageMalformed(f"{what} is {array.dtype} {array.shape}; expected float32 {shape}")
    if not np.isfinite(array).all():
        raise MessageMalformed(f"{what} holds values that are not finite numbers")
