"""Secret randomness of differential privacy, in whole numbers: discrete Gaussian noise and Poisson sampling.

Noise that somebody can compute protects nobody, and floating-point noise has holes by which values can be told apart
(Mironov 2012). So all of it comes from an AES-256-CTR keystream whose key is 32 bytes of the operating system's entropy, never
from a seed, and a sample is a whole number drawn from tables of exact probabilities. What is not exact about it is bounded:
`DiscreteGaussian.tv_bound` is the total variation distance of one sample from the distribution that is accounted for, and goes
into δ.
"""

import math
import os
from dataclasses import dataclass
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import lru_cache

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from privacy.errors import PrivacyError

GRID_BITS = 18
"""A clipped gradient is written in whole numbers with an L2 norm of at most 2**GRID_BITS: rounding 7 million values lengthens
such a vector by 0.5 % at most, and 8192 patients of a site still fit into a word of 32 bits."""

BLOCK = (
    32 * 1024
)  # samples at a time: words, columns and values of a block stay in the L2 cache; 16 to 64 Ki do as well
FINE_SIGMA = 1024  # of the fine part of a wide Gaussian
STRIDE = 256  # steps of its coarse part; FINE_SIGMA is four of them
TABLE_SIGMA_MAX = 4096  # a table of 111,000 entries; wider ones are put together from two
SIGMA_MAX = 2.0**40
TAIL = 13.6  # standard deviations; beyond lie 2**-132
PROBABILITY_BITS = 128
_WORK_BITS = 256  # of the fixed-point numbers that tables are computed with

Int64 = NDArray[np.int64]
Uint64 = NDArray[np.uint64]


class Keystream:
    """Uniform 64-bit words from AES-256-CTR. A forked process draws a key of its own, so no two processes share a word."""

    def __init__(self, key: bytes | None = None) -> None:
        """`key`: 32 bytes, for known-answer tests; everything else leaves it to the operating system."""
        self._begin(os.urandom(32) if key is None else key)

    def _begin(self, key: bytes) -> None:
        self._process = os.getpid()
        self._cipher = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()

    def words(self, count: int) -> Uint64:
        """uint64 (count,); no word is ever given twice."""
        if os.getpid() != self._process:
            self._begin(os.urandom(32))
        return np.frombuffer(self._cipher.update(bytes(8 * count)), "<u8").astype(np.uint64, copy=False)

    def below(self, limit: int) -> int:
        """A uniform whole number from 0 to limit - 1, without the bias of a remainder. Raises PrivacyError beyond 1..2**64."""
        if not 1 <= limit <= 2**64:
            raise PrivacyError(f"a whole number below {limit}; a word holds those below 1 to 2**64")
        whole = 2**64 // limit * limit
        while (word := int(self.words(1)[0])) >= whole:
            pass
        return word % limit


@dataclass(frozen=True, eq=False)
class _Table:
    """A discrete Gaussian on a finite range by Walker's alias method (1974), probabilities in units of 2**-128.

    Column c is drawn by the top `bits` of a word. It holds its own value, values[2c + 1], with the share (high[c], low[c]) of its
    width, read as one number of 128 - bits bits, and values[2c], its alias, with the rest.
    """

    bits: int
    high: Uint64
    low: Uint64
    values: Int64

    def sample(self, count: int, stream: Keystream) -> Int64:
        words = stream.words(count)
        columns = (words >> np.uint64(64 - self.bits)).view(np.int64)
        rest = words & np.uint64((1 << 64 - self.bits) - 1)
        high = self.high.take(columns)
        own = rest < high
        if (tied := np.flatnonzero(rest == high)).size:
            # Once in 2**47 samples, or less often, the upper half of the share does not decide, and its lower half has to.
            own[tied] = stream.words(tied.size) < self.low[columns[tied]]
        columns *= 2
        columns += own
        return self.values.take(columns)


class DiscreteGaussian:
    """Whole numbers x with probability proportional to exp(-x**2 / (2 sigma**2)) (Canonne, Kamath, Steinke 2020).

    Up to TABLE_SIGMA_MAX from one table. Above, X = X1 + STRIDE * X2 with X1 of FINE_SIGMA and X2 such that the variances add up:
    completing the square, the probability of x is that of the Gaussian times a sum over the integers of a Gaussian of
    variance t = (FINE_SIGMA / STRIDE)**2 * (1 - FINE_SIGMA**2 / sigma**2) > 15, which by Poisson summation is constant in x up to
    a relative 4 * exp(-2 pi**2 t) < 2**-420.
    """

    def __init__(self, sigma: float) -> None:
        """`sigma`: standard deviation parameter in whole units, 1 to 2**40. Raises PrivacyError for anything else."""
        if isinstance(sigma, bool) or not isinstance(sigma, int | float) or not 1 <= sigma <= SIGMA_MAX:
            raise PrivacyError(f"noise with a standard deviation of {sigma} units; there is noise from 1 to 2**40")
        self.sigma = float(sigma)
        parts: list[tuple[int, _Table]] = []
        variance, stride, bound = Fraction(self.sigma) ** 2, 1, 0.0
        while variance > TABLE_SIGMA_MAX**2:
            parts.append((stride, _table(Fraction(FINE_SIGMA**2))))
            variance, stride = (variance - FINE_SIGMA**2) / STRIDE**2, stride * STRIDE
            bound += 2.0**-420
        parts.append((stride, _table(variance)))
        self._parts = parts
        # Each table: half a unit of rounding per entry at most, as much again for what is put right in the middle, and the tail.
        bound += sum(len(table.high) * 2.0**-PROBABILITY_BITS + 2.0**-132 for _, table in parts)
        self.tv_bound = bound

    def sample(self, count: int, stream: Keystream) -> Int64:
        """int64 (count,), independent of each other and of everything drawn before."""
        total = np.zeros(count, np.int64)
        self.add_to(total, stream)
        return total

    def add_to(self, total: Int64, stream: Keystream) -> None:
        """Add a sample to each number of `total`, int64 (count,), in place. Raises PrivacyError for another type or shape."""
        if total.dtype != np.int64 or total.ndim != 1:
            # Another type would wrap or truncate, and rows of a matrix would all get the same noise.
            raise PrivacyError(f"noise for {total.dtype} {total.shape}; it is added to one row of int64")
        for start in range(0, len(total), BLOCK):
            block = total[start : start + BLOCK]
            for stride, table in self._parts:
                drawn = table.sample(len(block), stream)
                if stride > 1:
                    drawn *= stride
                block += drawn


@lru_cache(maxsize=16)
def gaussian(sigma: float) -> DiscreteGaussian:
    """The sampler for `sigma`, kept: its tables take a tenth of a second."""
    return DiscreteGaussian(sigma)


def forget() -> None:
    """Give back the memory of all tables that are kept; who asks for a sampler next waits for its tables again."""
    gaussian.cache_clear()
    _table.cache_clear()


def poisson_sample(units: int, rate: float, stream: Keystream, cap: int | None = None) -> Int64:
    """Which of the units 0 .. units - 1 are drawn, sorted: each by itself, with a chance of `rate` rounded down to 2**-64.

    If more than `cap` are drawn, a uniformly random `cap` of them stay (truncated Poisson sampling). None may be drawn: such
    a step is pure noise, and has to be taken like any other. Raises PrivacyError for a rate outside (0, 1].
    """
    if isinstance(rate, bool) or not 0 < rate <= 1 or units < 0 or (cap is not None and cap < 1):
        raise PrivacyError(f"a draw from {units} patients at the rate {rate}, at most {cap}: the rate lies in (0, 1]")
    threshold = math.floor(Fraction(rate) * 2**64)
    words = stream.words(units)
    drawn = np.arange(units) if threshold >= 2**64 else np.flatnonzero(words < np.uint64(threshold))
    chosen = drawn.astype(np.int64)
    while cap is not None and len(chosen) > cap:
        chosen = np.delete(chosen, stream.below(len(chosen)))
    return chosen


@lru_cache(maxsize=16)
def _table(variance: Fraction) -> _Table:
    weights = _probabilities(variance)
    return _alias(weights, (len(weights) - 1).bit_length())


def _probabilities(variance: Fraction) -> list[int]:
    """Probabilities of -radius .. radius in units of 2**-128; their sum is exactly 2**128."""
    radius = math.ceil(TAIL * math.sqrt(variance))
    one = 1 << _WORK_BITS
    with localcontext() as context:
        context.prec = 100
        step = (-(Decimal(variance.denominator) / Decimal(2 * variance.numerator))).exp()
        # From k to k + 1 the density falls by exp(-(2k + 1) / (2 variance)): once `step`, then by its square more each time.
        fall, square = int(step * one), int(step * step * one)
    half, density = [one], one
    for _ in range(radius):
        density = density * fall >> _WORK_BITS
        fall = fall * square >> _WORK_BITS
        half.append(density)
    total = 2 * sum(half) - one
    rounded = [(2 * (w << PROBABILITY_BITS) + total) // (2 * total) for w in half]
    rounded[0] += (1 << PROBABILITY_BITS) - (2 * sum(rounded) - rounded[0])
    return rounded[:0:-1] + rounded


def _alias(weights: list[int], bits: int) -> _Table:
    """Walker's columns (Vose 1991), in whole numbers: the share of each value is exactly its weight."""
    radius = len(weights) // 2
    columns, width = 1 << bits, 1 << PROBABILITY_BITS - bits
    left = [*weights, *[0] * (columns - len(weights))]
    share, alias = [width] * columns, list(range(columns))
    small = [c for c in range(columns) if left[c] < width]
    large = [c for c in range(columns) if left[c] >= width]
    while small and large:
        poor, rich = small.pop(), large[-1]
        share[poor], alias[poor] = left[poor], rich
        left[rich] -= width - left[poor]
        if left[rich] < width:
            small.append(large.pop())
    # A full column needs no comparison: its upper half lies above whatever the rest of a word can be.
    high = np.array([s >> 64 for s in share], np.uint64)
    low = np.array([s & 2**64 - 1 for s in share], np.uint64)
    values = np.stack([np.array(alias, np.int64), np.arange(columns)], axis=1).ravel() - radius
    return _Table(bits, high, low, values)
