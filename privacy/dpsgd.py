"""DP-SGD (Abadi et al. 2016) with the patient as unit: each patient's gradient is clipped, summed exactly, and noise added.

What leaves `private_gradient` is a vector of whole numbers: clipped gradients in units of 2**-bits of the clip norm, plus
discrete Gaussian noise. A patient changes the sum before the noise by a vector of whole numbers whose L2 norm is at most 2**bits:
not up to rounding, but verified on the rounded vector itself. Sums of whole numbers are exact in any order, so with or without
a patient the rest is the same to the last bit.

The unit is everything of one patient: a `Batch` with B = 1 holds its K images, and its loss is their mean. Nothing of one unit
may influence another's loss; `check_isolation` looks for that in gradients, not in the names of layers.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from privacy import noise
from privacy.errors import PrivacyError, UnitsCoupled
from privacy.noise import GRID_BITS

Batch = tuple[Tensor, ...]
"""Row b of every tensor belongs to unit b, for example images (B, K, 1, S, S), targets (B, K, T)."""
Losses = Callable[[nn.Module, Batch], Tensor]
"""The loss of each unit, (B,): the mean over its images."""
Int64 = NDArray[np.int64]

ISOLATED = 1e-3  # relative difference of gradients that rounding makes; a BatchNorm makes 1e-1
AGREE = {
    "vmap": 1e-3,
    "loop-bf16": 1e-2,
}  # relative difference of norms to the float32 loop at which an engine is rejected
VMAP_CHUNK = 8
log = logging.getLogger("isocenter.privacy")


@dataclass(frozen=True)
class Clip:
    """The longest gradient of a patient, and the grid: a gradient of norm `norm` has 2**bits in whole numbers."""

    norm: float
    bits: int = GRID_BITS

    def __post_init__(self) -> None:
        if not math.isfinite(self.norm) or self.norm <= 0:
            raise PrivacyError(f"a clip norm of {self.norm}; it has to be a positive number")
        if not 8 <= self.bits <= 24:
            raise PrivacyError(f"a grid of 2**{self.bits}; float32 holds whole numbers to 2**24")


@dataclass
class ClippedSum:
    """`total` int64 (P,): clipped gradients of `units` patients. `clipped` of them were too long, `nonfinite` counted as zero.

    These numbers and norms are data of patients: they stay at the site.
    """

    total: Int64
    units: int = 0
    clipped: int = 0
    nonfinite: int = 0


class Engine(Protocol):
    """One way to compute a clipped sum. All of them give the same up to the rounding of their arithmetic."""

    name: str

    def clipped_sum(self, units: Iterable[Batch], clip: Clip) -> ClippedSum:
        """The sum over `units`, each a Batch with B = 1, for the parameters that require a gradient, in their order."""
        ...

    def norms(self, units: Iterable[Batch]) -> list[float]:
        """L2 norm of the gradient of each unit before clipping; for comparing engines, never to be sent or logged."""
        ...


class LoopEngine:
    """One forward and backward pass for each patient, into one flat buffer. Asks nothing of the network; one patient's memory."""

    def __init__(self, net: nn.Module, losses: Losses, *, bfloat16: bool = False) -> None:
        """`bfloat16`: forward pass in bfloat16 where torch does that (autocast); gradients and clipping stay in float32."""
        self.name = "loop-bf16" if bfloat16 else "loop"
        self.net, self.losses, self.bfloat16 = net, losses, bfloat16
        self.parameters = _trained(net)

    def clipped_sum(self, units: Iterable[Batch], clip: Clip) -> ClippedSum:
        found = _Accumulator(sum(p.numel() for p in self.parameters), clip)
        for flat in self._gradients(units):
            found.add(flat)
        return found.result()

    def norms(self, units: Iterable[Batch]) -> list[float]:
        return [_norm(flat) for flat in self._gradients(units)]

    def _gradients(self, units: Iterable[Batch]) -> Iterator[Tensor]:
        """The gradient float32 (P,) of each unit, always in the same memory."""
        flat = torch.zeros(sum(p.numel() for p in self.parameters))
        kept = [parameter.grad for parameter in self.parameters]
        try:
            for unit in units:
                flat.zero_()
                start = 0
                for parameter in self.parameters:
                    # The backward pass adds into what is there: no copy of the gradient is ever made.
                    parameter.grad = flat[start : start + parameter.numel()].view_as(parameter)
                    start += parameter.numel()
                with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
                    loss = self.losses(self.net, unit)
                torch.autograd.backward(loss.float().sum())
                yield flat
        finally:
            for parameter, before in zip(self.parameters, kept, strict=True):
                parameter.grad = before


class VmapEngine:
    """Several patients at once through torch.func: for accelerators, and where a single image is slow (3-D convolutions).

    The last bits of a patient's gradient may depend on how many share its chunk, so one patient more can move others by a unit of
    the grid here and there; the loop has nothing of the kind.
    """

    name = "vmap"

    def __init__(self, net: nn.Module, losses: Losses, chunk: int = VMAP_CHUNK) -> None:
        self.net, self.losses, self.chunk = net, losses, chunk

    def clipped_sum(self, units: Iterable[Batch], clip: Clip) -> ClippedSum:
        found = _Accumulator(sum(p.numel() for p in _trained(self.net)), clip)
        for flat in self._gradients(units):
            found.add(flat)
        return found.result()

    def norms(self, units: Iterable[Batch]) -> list[float]:
        return [_norm(flat) for flat in self._gradients(units)]

    def _gradients(self, units: Iterable[Batch]) -> Iterator[Tensor]:
        held: list[Batch] = []
        for unit in units:
            held.append(unit)
            if len(held) == self.chunk:
                yield from self._of(held)
                held = []
        if held:
            yield from self._of(held)

    def _of(self, units: list[Batch]) -> Iterator[Tensor]:
        trained = {name: p.detach() for name, p in self.net.named_parameters() if p.requires_grad}
        rest = {name: p.detach() for name, p in self.net.named_parameters() if not p.requires_grad}
        rest |= dict(self.net.named_buffers())
        bound = _Bound(self.net, rest)

        def loss(parameters: dict[str, Tensor], *unit: Tensor) -> Tensor:
            bound.parameters = parameters
            return self.losses(bound, tuple(part[None] for part in unit))[0]

        batch = tuple(torch.cat(parts) for parts in zip(*units, strict=True))
        gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, *[0] * len(batch)), randomness="different")(
            trained, *batch
        )
        for place in range(len(units)):
            yield torch.cat([gradients[name][place].reshape(-1) for name in trained])


class _Bound(nn.Module):
    """`net` with other parameters, to be called like it."""

    def __init__(self, net: nn.Module, rest: dict[str, Tensor]) -> None:
        super().__init__()
        self._net, self._rest = [net], rest  # in a list, so that it is no submodule
        self.parameters: dict[str, Tensor] = {}  # type: ignore[assignment]  # not asked for while it is called

    def forward(self, *arguments: Any) -> Any:
        return torch.func.functional_call(self._net[0], self.parameters | self._rest, arguments)


class _Accumulator:
    """Adds gradients up after each was brought onto the grid, inside the clip norm."""

    def __init__(self, parameters: int, clip: Clip) -> None:
        self.grid, self.clip = 2.0**clip.bits, clip
        # Rounding P values moves a vector by sqrt(P) / 2 at most: what is shortened to this is on the safe side after it.
        self.target = self.grid - math.sqrt(parameters) / 2
        if self.target < self.grid / 2:
            raise PrivacyError(f"a grid of 2**{clip.bits} is too coarse for {parameters} parameters")
        self.total = torch.zeros(parameters, dtype=torch.float64)  # whole numbers up to 2**53 are exact in it
        self.units = self.clipped = self.nonfinite = 0

    def add(self, gradient: Tensor) -> None:
        """Add `gradient` float32 (P,), which is overwritten."""
        self.units += 1
        norm = _norm(gradient)
        if not math.isfinite(norm):
            # min(1, C / nan) is 1 in many a language: without this line a NaN would pass the clip.
            self.nonfinite += 1
            return
        wanted = self.grid / self.clip.norm
        if norm * wanted > self.target:
            self.clipped += norm > self.clip.norm
            wanted = self.target / norm
        gradient.mul_(wanted).round_()
        while (length := _norm(gradient)) > self.grid:
            gradient.mul_(self.target / length * (1 - 2.0**-20)).round_()
        self.total.add_(gradient)

    def result(self) -> ClippedSum:
        return ClippedSum(self.total.numpy().astype(np.int64), self.units, self.clipped, self.nonfinite)


def private_gradient(
    engine: Engine, units: Iterable[Batch], clip: Clip, noise_multiplier: float, stream: noise.Keystream
) -> tuple[Int64, ClippedSum]:
    """(noisy sum int64 (P,) in units of 2**-bits of the clip norm, what must stay at the site).

    The sum of the clipped gradients of `units` plus discrete Gaussian noise of noise_multiplier * 2**bits for each value. No unit
    at all is a draw like any other: then it is noise. Raises PrivacyError for a noise multiplier that is not positive.
    """
    if not math.isfinite(noise_multiplier) or noise_multiplier <= 0:
        raise PrivacyError(f"a noise multiplier of {noise_multiplier}; it has to be a positive number")
    seen = engine.clipped_sum(units, clip)
    noisy = seen.total.copy()
    noise.gaussian(noise_multiplier * 2.0**clip.bits).add_to(noisy, stream)
    return noisy, seen


def choose(net: nn.Module, losses: Losses, samples: Sequence[Batch], clip: Clip) -> Engine:
    """The fastest sound engine for `net` on units shaped like `samples` (at least two).

    Each takes one step to warm up and one against the clock. One whose norms differ from those of the float32 loop, or that
    fails, is left out. Raises UnitsCoupled if patients meet in the network or the loss. Nothing of `net` is changed.
    """
    with _without_dropout(net):
        check_isolation(net, losses, samples)
        loop: Engine = LoopEngine(net, losses)
        truth, best, least = loop.norms(samples), loop, _seconds(loop, samples, clip)
        for engine in (LoopEngine(net, losses, bfloat16=True), VmapEngine(net, losses)):
            try:
                off = _difference(truth, engine.norms(samples))
                if off > AGREE[engine.name]:
                    log.info("engine %s is not used: its norms differ by %.2g", engine.name, off)
                    continue
                seconds = _seconds(engine, samples, clip)
            except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
                log.info("engine %s is not used: %s", engine.name, type(error).__name__)
                continue
            if seconds < least:
                best, least = engine, seconds
    log.info("engine %s: %.0f ms a patient", best.name, 1000 * least / len(samples))
    return best


def check_isolation(net: nn.Module, losses: Losses, samples: Sequence[Batch]) -> None:
    """Raise UnitsCoupled if a unit's gradient in a batch with another is not its gradient alone, or if `net` remembers a unit.

    Catches what mixes patients whatever it is called: batch statistics, a Dice loss over the batch, a common denominator,
    attention between rows, running averages.
    """
    if len(samples) < 2:
        raise PrivacyError("whether patients are isolated cannot be told from fewer than two of them")
    trained = _trained(net)
    buffers = [buffer.clone() for buffer in net.buffers()]
    try:
        joint = tuple(torch.cat([a, b]) for a, b in zip(samples[0], samples[1], strict=True))
        together = losses(net, joint)
        if together.shape != (2,):
            raise UnitsCoupled(
                f"the loss of two patients has the shape {tuple(together.shape)}, not one value for each"
            )
        for place, sample in enumerate(samples[:2]):
            inside = _gradient(together[place], trained)
            alone = _gradient(losses(net, sample)[0], trained)
            size = max(_norm(alone), _norm(inside))
            if size > 0 and _norm(inside - alone) > ISOLATED * size:
                raise UnitsCoupled("a patient's gradient depends on who else is in the batch")
        if any(not torch.equal(now, before) for now, before in zip(net.buffers(), buffers, strict=True)):
            raise UnitsCoupled("the network keeps statistics of the patients that it sees")
    finally:
        with torch.no_grad():
            for now, before in zip(net.buffers(), buffers, strict=True):
                now.copy_(before)


def _gradient(loss: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return torch.cat(
        [
            torch.zeros(p.numel()) if part is None else part.reshape(-1).float()
            for p, part in zip(parameters, found, strict=True)
        ]
    )


def _trained(net: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in net.parameters() if parameter.requires_grad]


def _norm(vector: Tensor) -> float:
    """L2 norm over the whole vector. Its square is exact for whole numbers with a norm below 2**26: all sums are below 2**53."""
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64))


def _difference(truth: list[float], other: list[float]) -> float:
    return max(
        (abs(a - b) / max(a, 1e-12) if math.isfinite(b) else math.inf for a, b in zip(truth, other, strict=True))
    )


def _seconds(engine: Engine, samples: Sequence[Batch], clip: Clip) -> float:
    engine.clipped_sum(samples, clip)
    began = time.perf_counter()
    engine.clipped_sum(samples, clip)
    return time.perf_counter() - began


@contextlib.contextmanager
def _without_dropout(net: nn.Module) -> Iterator[None]:
    """`net` without dropout, whose draws would make any two gradients differ."""
    dropouts = [module for module in net.modules() if isinstance(module, nn.modules.dropout._DropoutNd)]
    before = [module.p for module in dropouts]
    try:
        for module in dropouts:
            module.p = 0.0
        yield
    finally:
        for module, p in zip(dropouts, before, strict=True):
            module.p = p
