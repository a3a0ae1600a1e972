"""DP-SGD (Abadi et al. 2016) with the patient as unit: each patient's gradient is clipped, summed exactly, and noise added.

What leaves `private_gradient` is a vector of whole numbers: clipped gradients in units of 2**-bits of the clip norm, plus
discrete Gaussian noise. A patient changes the sum before the noise by a vector of whole numbers whose L2 norm is at most 2**bits:
not up to rounding, but verified on the rounded vector itself. Sums of whole numbers are exact in any order, so with or without a
patient the rest is the same to the last bit, as long as nobody's gradient depends on who else is there.

The unit is everything of one patient: a `Batch` with B = 1 holds its K images, and its loss is their mean. Nothing of one unit
may influence another's loss; `check_isolation` looks for that in gradients, not in the names of layers.
"""

import contextlib
import copy
import logging
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from privacy import noise
from privacy.errors import PrivacyError, UnitsCoupled
from privacy.noise import GRID_BITS

Batch = tuple[Tensor, ...]
"""Row b of every tensor belongs to unit b, for example images (B, K, 1, S, S), targets (B, K, T)."""
Losses = Callable[[nn.Module, Batch], Tensor]
"""The loss of each unit, (B,): the mean over its images."""
Int64 = NDArray[np.int64]

CLIP_MIN, CLIP_MAX = 1e-9, 1e9  # within these, no factor between a gradient and the grid leaves the range of float32
ISOLATED = 1e-3  # relative difference of gradients that rounding makes; a BatchNorm makes 1e-1
AGREE = {"vmap": 1e-3, "loop-bf16": 1e-2}  # relative difference of a norm to the float32 loop's that rejects an engine
ALONG = (
    0.9  # least cosine between sums of an engine and the float32 loop: bfloat16 has 0.95, a wrong order of weights 0
)
SAMPLES = 4  # units by which engines are timed where each takes long
VMAP_CHUNK = 16  # at most; of 8 to 64 the fastest for the small network
VMAP_LEAST = 4  # what fewer units at once spare is not worth a try
# Several units at once spare calls, not arithmetic. Where one takes longer than this they cost memory and gain nothing:
# eight radiographs on DenseNet121 were 3 GiB, beside 0.3 GiB of the loop that then won.
VMAP_BELOW_S = 0.01
PIECE = 64 * 1024  # values that are widened to float64 at a time: 512 KiB stay in the L2 cache
# The C library gives freed memory back to the system above twice the largest block that was ever freed. A small network's blocks
# are small, so every patient's activations would be mapped and zeroed anew, a quarter of its time; after this up to 62 MiB stay.
HEAP = 31 * 2**20
STAINED = (1_000, 4_000, 16_000, 64_000, 250_000, 1_000_000, 4_000_000)
CHANNELS = 128  # of a 1 x 1 convolution of one image from which on oneDNN is the faster one
_CONVOLUTIONS = (torch.conv2d, torch.conv3d, torch.conv_transpose3d)
log = logging.getLogger("isocenter.privacy")


@dataclass(frozen=True)
class Clip:
    """The longest gradient of a patient, and the grid: a gradient of norm `norm` has 2**bits in whole numbers.

    Raises PrivacyError for a norm outside CLIP_MIN..CLIP_MAX or bits outside 8..24.
    """

    norm: float
    bits: int = GRID_BITS

    def __post_init__(self) -> None:
        if not CLIP_MIN <= self.norm <= CLIP_MAX:
            raise PrivacyError(f"a clip norm of {self.norm}; it lies in {CLIP_MIN:g}..{CLIP_MAX:g}")
        if not 8 <= self.bits <= 24:
            raise PrivacyError(f"a grid of 2**{self.bits}; float32 holds whole numbers to 2**24")


@dataclass(repr=False)  # a log or a traceback that shows variables must not show these
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

    def clipped_sum(self, units: Iterable[Batch], clip: Clip, out: Int64 | None = None) -> ClippedSum:
        """The sum over `units`, each a Batch with B = 1, for the parameters that require a gradient, in their order.

        Its total is written over `out` where that is given. Raises PrivacyError for a unit of several patients, UnitsCoupled
        for a loss that is not one value for one patient.
        """
        ...

    def norms(self, units: Iterable[Batch]) -> list[float]:
        """L2 norm of the gradient of each unit before clipping; for comparing engines, never to be sent or logged."""
        ...


class _Gradients:
    """What engines share: they differ in how they make the gradients of units, one after the other."""

    def __init__(self, net: nn.Module, losses: Losses) -> None:
        self.net, self.losses = net, losses
        self._near = torch.empty(0)

    def clipped_sum(self, units: Iterable[Batch], clip: Clip, out: Int64 | None = None) -> ClippedSum:
        trained = _trained(self.net)
        self._near = _sized(self._near, (sum(p.numel() for p in trained),), trained[0].device)
        found = _Accumulator(len(self._near), clip, self._near, out)
        with contextlib.closing(self._gradients(units)) as gradients:
            for flat in gradients:
                found.add(flat)
        return found.result()

    def norms(self, units: Iterable[Batch]) -> list[float]:
        with contextlib.closing(self._gradients(units)) as gradients:
            return [_norm(flat) for flat in gradients]

    def _gradients(self, units: Iterable[Batch]) -> Generator[Tensor, None, None]:
        """The gradient float32 (P,) of each unit, which may be overwritten, and is by the next one."""
        raise NotImplementedError


class LoopEngine(_Gradients):
    """One forward and backward pass for each patient, into one flat buffer. Asks nothing of the network; one patient's memory.

    A patient's gradient is computed alone, so it is the same to the last bit whoever else is there.
    """

    def __init__(self, net: nn.Module, losses: Losses, *, bfloat16: bool = False) -> None:
        """`bfloat16`: forward pass in bfloat16 where torch does that (autocast); gradients and clipping stay in float32."""
        super().__init__(net, losses)
        self.name = "loop-bf16" if bfloat16 else "loop"
        self.bfloat16 = bfloat16
        self._flat = torch.empty(0)

    def _gradients(self, units: Iterable[Batch]) -> Generator[Tensor, None, None]:
        trained = _trained(self.net)
        device = trained[0].device
        flat = self._flat = _sized(self._flat, (sum(p.numel() for p in trained),), device)
        torch.empty(HEAP, dtype=torch.uint8)  # and free it again
        directed = device.type == "cpu" and (self.bfloat16 or any(map(_falls_off, self.net.modules())))
        # Weights stay as they are for all units, so their bfloat16 copies are made once: torch forgets them where the outermost
        # of nested contexts ends. That one is switched off, because drawing a unit is no part of the network.
        with torch.autocast(device.type, torch.bfloat16, enabled=False):
            for unit in units:
                with _OneImage(self.bfloat16) if directed else contextlib.nullcontext():
                    with torch.autocast(device.type, torch.bfloat16, enabled=self.bfloat16):
                        loss = self.losses(self.net, _one(unit))
                    found = torch.autograd.grad(_loss_of_one(loss).float(), trained, allow_unused=True)
                parts = [torch.zeros_like(p) if part is None else part for p, part in zip(trained, found, strict=True)]
                del loss, found
                torch.cat([part.reshape(-1) for part in parts], out=flat)
                del parts
                yield flat


class _OneImage(TorchFunctionMode):
    """Convolutions of one image through oneDNN in float32, where torch leaves it for loops of its own, or bfloat16 is unsound.

    For a batch of one torch takes `slow_conv3d`, five times as slow as a quarter of a batch of four, and on one thread a
    product of matrices for 1 x 1 kernels, slower than oneDNN from CHANNELS on. A tensor in oneDNN's layout leaves it no choice.
    """

    def __init__(self, bfloat16: bool) -> None:
        super().__init__()
        self.bfloat16 = bfloat16

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if func not in _CONVOLUTIONS or len(args) < 2:
            return func(*args, **named)
        if not self.bfloat16:
            return _directed(func, args, named) if _redirected(func, args[0], args[1]) else func(*args, **named)
        if not _unsound(func, args, named):
            return func(*args, **named)
        with torch.autocast(args[0].device.type, enabled=False):
            return _directed(func, tuple(map(_wide, args)), {name: _wide(value) for name, value in named.items()})


def _directed(func: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    return func(args[0].to_mkldnn(), *args[1:], **named).to_dense()


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) else value


def _unsound(func: Any, args: tuple[Any, ...], named: dict[str, Any]) -> bool:
    """Whether torch 2.13 makes the bfloat16 gradient of this convolution's kernels of memory that nobody has written to.

    Seen where a volume of more than one slice is less deep than the kernel, and where a picture is one pixel and the stride is
    longer. What lies in that memory is another patient's as likely as not, and a large kernel writes beyond its own.
    """
    sides, window = tuple(args[0].shape[2:]), tuple(args[1].shape[2:])
    if func is torch.conv2d:
        stride = args[3] if len(args) > 3 else named.get("stride", 1)
        return max(sides) == 1 and bool(max(stride if isinstance(stride, Sequence) else (stride,)) > 1)
    # A transposed convolution makes more slices of one.
    return (func is torch.conv_transpose3d or sides[0] > 1) and bool(sides[0] < window[0])


def _redirected(func: Any, images: Tensor, kernels: Tensor) -> bool:
    if images.dtype != torch.float32 or len(images) != 1 or images.ndim != kernels.ndim:
        return False
    return func is not torch.conv2d or (kernels.shape[1] >= CHANNELS and kernels.shape[2:] == (1, 1))


def _falls_off(module: nn.Module) -> bool:
    """Whether a convolution of `module` is one that `_OneImage` redirects: to be under it costs every operation a little."""
    if isinstance(module, nn.Conv2d):
        return module.in_channels >= CHANNELS and module.kernel_size == (1, 1)
    return isinstance(module, nn.Conv3d | nn.ConvTranspose3d)


class VmapEngine(_Gradients):
    """Several patients at once through torch.func: for accelerators, and where a single image is slow (3-D convolutions).

    Arithmetic of several patients at once may round one patient's gradient differently beside others: libraries choose by the
    size of a batch how they add up. Then one patient more or less would move the last bits of others, and the sum by
    a little more than 2**bits. So every chunk is filled up to one size, and `choose` takes this engine only if on its samples
    the sum without one of them is the same to the last bit, each of the others in another place and chunk. That is a test on
    some units, not a proof for all; in the loop engines there is nothing to prove.

    Units have to have one shape.
    """

    name = "vmap"

    def __init__(self, net: nn.Module, losses: Losses, chunk: int | None = None) -> None:
        """`chunk`: units at once; by default VMAP_CHUNK, or as many as have gradients of HEAP bytes together."""
        super().__init__(net, losses)
        self.chunk = chunk or max(1, min(VMAP_CHUNK, HEAP // (4 * sum(p.numel() for p in _trained(net)))))
        self._rows = torch.empty(0)

    def _gradients(self, units: Iterable[Batch]) -> Generator[Tensor, None, None]:
        torch.empty(HEAP, dtype=torch.uint8)  # and free it again
        held: list[Batch] = []
        for unit in units:
            held.append(_one(unit))
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

        def loss(weights: dict[str, Tensor], *unit: Tensor) -> Tensor:
            bound.weights = weights
            return _loss_of_one(self.losses(bound, tuple(part[None] for part in unit)))

        filled = units + units[-1:] * (self.chunk - len(units))
        batch = tuple(torch.cat(parts) for parts in zip(*filled, strict=True))
        gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, *[0] * len(batch)), randomness="different")(
            trained, *batch
        )
        parts = [gradients[name].reshape(self.chunk, -1).float() for name in trained]
        self._rows = _sized(self._rows, (self.chunk, sum(part.shape[1] for part in parts)), parts[0].device)
        torch.cat(parts, dim=1, out=self._rows)
        yield from self._rows[: len(units)]


class _Bound(nn.Module):
    """`net` with other weights, to be called like it."""

    def __init__(self, net: nn.Module, rest: dict[str, Tensor]) -> None:
        super().__init__()
        self._net, self._rest = [net], rest  # in a list, so that it is no submodule
        self.weights: dict[str, Tensor] = {}

    def forward(self, *arguments: Any) -> Any:
        return torch.func.functional_call(self._net[0], self.weights | self._rest, arguments)


class _Accumulator:
    """Adds gradients up after each was brought onto the grid, inside the clip norm."""

    def __init__(self, parameters: int, clip: Clip, near: Tensor | None = None, out: Int64 | None = None) -> None:
        """`near` float32 and `out` int64, (P,): memory to write over. To get it anew at each step takes longer than to add."""
        self.grid, self.clip = 2.0**clip.bits, clip
        # Rounding P values moves a vector by sqrt(P) / 2 at most: what is shortened to this is on the safe side after it.
        self.target = self.grid - math.sqrt(parameters) / 2
        if self.target < self.grid / 2:
            raise PrivacyError(f"a grid of 2**{clip.bits} is too coarse for {parameters} parameters")
        # Whole numbers up to 2**24 are exact in `near`, and no value of a unit is above 2**bits: after so many it is emptied.
        self.near = torch.zeros(parameters) if near is None else near.zero_()
        self.far, self.filled = out, False  # the sum of what was in it before
        self.held, self.most = 0, 2 ** (24 - clip.bits)
        self.units = self.clipped = self.nonfinite = 0

    def add(self, gradient: Tensor) -> None:
        """Add `gradient` float32 (P,), which is overwritten."""
        self.units += 1
        norm = _norm(gradient)
        if not math.isfinite(norm):
            # min(1, C / nan) is 1 in many a language: without this line a NaN would pass the clip.
            self.nonfinite += 1
            return
        factor = self.grid / self.clip.norm
        if norm * factor > self.target:
            self.clipped += norm > self.clip.norm
            factor = self.target / norm
        length = _rounded(gradient, factor)
        if length > self.grid:
            # Only the rounding of float32 products can lead here, with a hair's breadth too much.
            length = _rounded(gradient, self.target / length * (1 - 2.0**-20))
        if not length <= self.grid:
            self.nonfinite += 1  # nothing is known to lead here; whatever does, it does not pass
            return
        if self.held == self.most:
            self._empty()
        self.near.add_(gradient)
        self.held += 1

    def _empty(self) -> Int64:
        near = self.near.cpu().numpy()
        if self.far is None:
            self.far = np.empty(len(near), np.int64)
        if self.filled:
            # Both are whole numbers below 2**53, so nothing is lost on the way through float64.
            np.add(self.far, near, out=self.far, dtype=np.float64, casting="unsafe")
        else:
            np.copyto(self.far, near, casting="unsafe")  # whole numbers to 2**24
        self.near.zero_()
        self.filled, self.held = True, 0
        return self.far

    def result(self) -> ClippedSum:
        return ClippedSum(self._empty(), self.units, self.clipped, self.nonfinite)


def private_gradient(
    engine: Engine,
    units: Iterable[Batch],
    clip: Clip,
    noise_multiplier: float,
    stream: noise.Keystream,
    out: Int64 | None = None,
) -> tuple[Int64, ClippedSum]:
    """(noisy sum int64 (P,) in units of 2**-bits of the clip norm, what must stay at the site).

    The sum of the clipped gradients of `units` plus discrete Gaussian noise of noise_multiplier * 2**bits for each value. No unit
    at all is a draw like any other: then it is noise. It is written over `out` where that is given, and then is the total of
    what stays as well. Raises PrivacyError, before a unit is asked for, for a noise multiplier that is not positive or out of
    the sampler's range.
    """
    if not math.isfinite(noise_multiplier) or noise_multiplier <= 0:
        raise PrivacyError(f"a noise multiplier of {noise_multiplier}; it has to be a positive number")
    sampler = noise.gaussian(noise_multiplier * 2.0**clip.bits)
    seen = engine.clipped_sum(units, clip) if out is None else engine.clipped_sum(units, clip, out)
    noisy = seen.total.copy() if out is None else seen.total
    sampler.add_to(noisy, stream)
    return noisy, seen


def choose(net: nn.Module, losses: Losses, samples: Sequence[Batch], clip: Clip) -> Engine:
    """The fastest sound engine for `net` on units shaped like `samples` (at least two).

    `samples` are stand-ins with the shapes of patients and nothing else of them: engines round differently, and if a
    patient decided which of them computes everybody's gradient, it would move the sum by more than its own.

    Each engine takes a step to warm up, one against the clock, and, if it is fast, one in two parts. Left out is one that fails,
    that reads memory to which nobody wrote, whose norms or direction differ from those of the float32 loop, or in which the
    parts do not add up to the whole to the last bit. Several units at once are tried only where a unit is quick and its gradient
    small, so that a choice needs no more memory than training. Raises as `check_isolation` does. Nothing of `net` is changed, nor
    the process's random state.
    """
    _stain()
    check_isolation(net, losses, samples)
    with _without_dropout(net), torch.random.fork_rng(devices=[]):
        best: Engine = LoopEngine(net, losses)
        norms = best.norms(samples)
        many = _repeated(samples, SAMPLES)
        truth, least = _timed(best, many, clip)
        others: list[Engine] = [LoopEngine(net, losses, bfloat16=True)]
        at_once = VmapEngine(net, losses)
        if at_once.chunk >= VMAP_LEAST and least < VMAP_BELOW_S * len(many):
            many = _repeated(samples, at_once.chunk)  # or the clock would charge it for empty places
            truth, least = _timed(best, many, clip)
            others.append(at_once)
        for engine in others:
            _stain()
            try:
                near = _near(engine.norms(samples), norms, AGREE[engine.name])
                total, seconds = _timed(engine, many, clip)
                sound = near and _along(total, truth) and (seconds >= least or _parts(engine, many, clip, total))
            except Exception as error:  # whatever a network does not bear: the loop asks nothing of it
                log.info("engine %s is not used: %s", engine.name, type(error).__name__)
                continue
            if not sound:
                log.info("engine %s is not used: it computes something else than the loop", engine.name)
            elif seconds < least:
                best, least = engine, seconds
    log.info("engine %s: %.0f ms a patient", best.name, 1000 * least / len(many))
    return best


def check_isolation(net: nn.Module, losses: Losses, samples: Sequence[Batch]) -> None:
    """Raise UnitsCoupled if one unit of a batch can influence another's gradient, or if `net` remembers a unit.

    Two things are looked at, whatever layers and losses are called. The derivative of a unit's loss by the values of the other
    has to be exactly zero: batch statistics, a Dice loss over the batch and attention between rows make it something else, also
    for two units that are equal. And a unit's gradient has to be the same in a batch, alone, and alone again: a common
    denominator, running averages and memories change it. `net` is looked at in its present mode, which is to be that of training,
    but without dropout, whose draws are no patient's. Raises PrivacyError if the gradient of a unit is zero or not finite,
    because then nothing can be told from it. Nothing of `net` is changed, nor the process's random state.
    """
    if len(samples) < 2:
        raise PrivacyError("whether patients are isolated cannot be told from fewer than two of them")
    with contextlib.suppress(Exception):  # a network that cannot be copied is judged by the first look
        twin = copy.deepcopy(net).double()  # before the first look, so that what remembers has nothing to remember yet
    try:
        _look(net, losses, samples[:2])
    except UnitsCoupled as found:
        # A ReLU on the brink of zero falls to the other side by the rounding of a larger batch, and in deep networks moves a
        # gradient by more than ISOLATED. In float64 the brink is a billion times narrower; what couples patients does so there.
        wide = [tuple(part.double() if part.is_floating_point() else part for part in sample) for sample in samples[:2]]
        try:
            _look(twin, losses, wide)
        except Exception:
            raise found from None


def _look(net: nn.Module, losses: Losses, pair: Sequence[Batch]) -> None:
    """`check_isolation` of two units in the precision that `net` and they have."""
    trained = _trained(net)
    with _without_dropout(net), _kept(list(net.buffers())), torch.random.fork_rng(devices=[]):
        before = [buffer.clone() for buffer in net.buffers()]
        alone = [_gradient(_loss_of_one(losses(net, _one(sample))), trained) for sample in pair]
        _check_influence(net, losses, pair, alone)
        for sample, gradient in zip(pair, alone, strict=True):
            if not _close(_gradient(_loss_of_one(losses(net, sample)), trained), gradient):
                raise UnitsCoupled("a patient's gradient is another the second time: the network draws or remembers")
        after = list(net.buffers())
        if len(after) != len(before) or not all(map(torch.equal, after, before)):
            raise UnitsCoupled("the network keeps statistics of the patients that it sees")


def _check_influence(net: nn.Module, losses: Losses, pair: Sequence[Batch], alone: Sequence[Tensor]) -> None:
    """The part of `check_isolation` that looks at two units in one batch; `alone`: their gradients by themselves."""
    joint = [torch.cat([a, b]).detach() for a, b in zip(*pair, strict=True)]
    inputs = [part.requires_grad_() for part in joint if part.is_floating_point()]
    # Networks may write into what they are given, which autograd does not allow for the inputs themselves.
    together = losses(net, tuple(part.clone() for part in joint))
    if together.shape != (2,):
        raise UnitsCoupled(f"the loss of two patients has the shape {tuple(together.shape)}, not one value for each")
    for place, gradient in enumerate(alone):
        if not 0 < _norm(gradient) < math.inf:
            raise PrivacyError("a patient's gradient is zero or not finite; isolation cannot be told from it")
        if inputs:
            reached = torch.autograd.grad(together[place], inputs, retain_graph=True, allow_unused=True)
            if any(part is not None and bool(part[1 - place].any()) for part in reached):
                raise UnitsCoupled("a patient's loss depends on the images or labels of another in the batch")
        if not _close(_gradient(together[place], _trained(net)), gradient):
            raise UnitsCoupled("a patient's gradient depends on who else is in the batch")


def _gradient(loss: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return torch.cat(
        [
            torch.zeros_like(p).reshape(-1) if part is None else part.reshape(-1)
            for p, part in zip(parameters, found, strict=True)
        ]
    )


def _trained(net: nn.Module) -> list[nn.Parameter]:
    found = [parameter for parameter in net.parameters() if parameter.requires_grad]
    if not found:
        raise PrivacyError("the network has no weights to train")
    return found


def _one(unit: Batch) -> Batch:
    if any(len(part) != 1 for part in unit):
        # Clipped together, one of them could turn the gradient of all the others.
        raise PrivacyError("a unit has to be one patient: every tensor of it has one row")
    return unit


def _loss_of_one(loss: Tensor) -> Tensor:
    """() of (1,)."""
    if loss.shape != (1,):
        raise UnitsCoupled(f"the loss of one patient has the shape {tuple(loss.shape)}, not one value for each patient")
    return loss[0]


def _sized(held: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """`held` if it is float32 of `shape` on `device`, else such memory."""
    return held if held.shape == shape and held.device == device else torch.empty(shape, device=device)


def _norm(vector: Tensor) -> float:
    """L2 norm over the whole vector. Its square is exact for whole numbers with a norm below 2**26: all sums are below 2**53."""
    return math.sqrt(math.fsum(map(_square, torch.split(vector, PIECE))))


def _rounded(vector: Tensor, factor: float) -> float:
    """Multiply `vector` by `factor` and round it, in place, each piece while in the cache; its `_norm` afterwards."""
    return math.sqrt(math.fsum(_square(part.mul_(factor).round_()) for part in torch.split(vector, PIECE)))


def _square(part: Tensor) -> float:
    wide = part.double()
    return float(wide @ wide)


def _close(found: Tensor, expected: Tensor) -> bool:
    """Whether two gradients differ by no more than rounding; never if one of them is not finite."""
    return _norm(found - expected) <= ISOLATED * max(_norm(found), _norm(expected))


def _near(found: list[float], expected: list[float], tolerance: float) -> bool:
    return all(abs(a - b) <= tolerance * b for a, b in zip(found, expected, strict=True))


def _along(found: Int64, expected: Int64) -> bool:
    a, b = found.astype(np.float64), expected.astype(np.float64)
    return float(a @ b) >= ALONG * float(np.linalg.norm(a) * np.linalg.norm(b))


def _parts(engine: Engine, samples: Sequence[Batch], clip: Clip, total: Int64) -> bool:
    """Whether one sample and all the others add up to `total`, to the last bit."""
    first, others = (engine.clipped_sum(part, clip).total for part in (samples[:1], samples[1:]))
    return np.array_equal(first + others, total)


def _stain() -> None:
    """Leave NaN in freed memory: what reads memory before it is written to shows itself, instead of reading zeros by chance."""
    held = [torch.full((size,), math.nan) for size in STAINED for _ in range(3)]
    del held


def _repeated(samples: Sequence[Batch], least: int) -> list[Batch]:
    return [samples[place % len(samples)] for place in range(max(len(samples), least))]


def _timed(engine: Engine, samples: Sequence[Batch], clip: Clip) -> tuple[Int64, float]:
    began = time.perf_counter()
    total = engine.clipped_sum(samples, clip).total
    return total, time.perf_counter() - began


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


@contextlib.contextmanager
def _kept(buffers: list[Tensor]) -> Iterator[None]:
    """Afterwards `buffers` hold what they held before."""
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for now, value in zip(buffers, before, strict=True):
                now.copy_(value)
