"""Secret noise: tables against exact arithmetic, the sampler of Canonne, Kamath and Steinke as reference, Poisson draws."""

import math
import os
import random
from decimal import Decimal, localcontext
from fractions import Fraction
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.errors import PrivacyError
from privacy.noise import (
    BLOCK,
    FINE_SIGMA,
    SIGMA_MAX,
    STRIDE,
    TABLE_SIGMA_MAX,
    DiscreteGaussian,
    Keystream,
    _probabilities,
    _table,
    gaussian,
    poisson_sample,
)

UNHURRIED = settings(max_examples=40, deadline=None)


# The reference: exact rational arithmetic, Canonne, Kamath and Steinke 2020, algorithms 1 to 3.


def bernoulli_exp(gamma: Fraction, rng: random.Random) -> bool:
    """True with probability exp(-gamma), exactly."""
    while gamma > 1:
        if not bernoulli_exp(Fraction(1), rng):
            return False
        gamma -= 1
    k = 1
    while rng.randrange((gamma / k).denominator) < (gamma / k).numerator:
        k += 1
    return k % 2 == 1


def cks_gaussian(variance: Fraction, rng: random.Random) -> int:
    t = math.isqrt(math.floor(variance)) + 1
    while True:
        u = rng.randrange(t)
        if not bernoulli_exp(Fraction(u, t), rng):
            continue
        v = 0
        while bernoulli_exp(Fraction(1), rng):
            v += 1
        x = u + t * v
        negative = rng.random() < 0.5
        if negative and x == 0:
            continue
        value = -x if negative else x
        if bernoulli_exp((Fraction(abs(value)) - variance / t) ** 2 / (2 * variance), rng):
            return value


def exact_pmf(variance: Fraction, radius: int) -> list[Decimal]:
    """Probabilities of -radius .. radius to 80 digits, with the normalisation over all whole numbers."""
    with localcontext() as context:
        context.prec = 100
        ratio = Decimal(variance.denominator) / Decimal(2 * variance.numerator)
        # Each is the one before times exp(-(2n + 1) ratio): 100 digits lose five of them on the way, as the spot checks show.
        step, square = (-ratio).exp(), (-2 * ratio).exp()
        weight = [Decimal(1)]
        for _ in range(math.ceil(30 * math.sqrt(variance))):
            weight.append(weight[-1] * step)
            step *= square
        for n in range(0, len(weight), len(weight) // 7):
            assert abs(weight[n] / (-ratio * n * n).exp() - 1) < Decimal(10) ** -80
        total = 2 * sum(weight) - 1
        return [weight[abs(n)] / total for n in range(-radius, radius + 1)]


WIDE = 1.7 * 2**18  # of an ordinary study
COARSE = (Fraction(WIDE) ** 2 - FINE_SIGMA**2) / STRIDE**2  # variance of the second table of it
VARIANCES = [Fraction(1), Fraction(25, 4), Fraction(123457, 100), Fraction(FINE_SIGMA**2), COARSE]
names = pytest.mark.parametrize("variance", VARIANCES, ids=lambda v: f"sigma {math.sqrt(v):.6g}")


@names
def test_a_table_encodes_the_discrete_gaussian_within_the_bound(variance: Fraction) -> None:
    """What the columns add up to, against exact probabilities: each within 2**-120, all together within `tv_bound`."""
    made, table = encoded(_table(variance)), _table(variance)
    radius = -int(table.values.min())
    assert sum(made) == 2**128 and not any(made[2 * radius + 1 :]), "every word gives a value, none beyond the radius"
    made = made[: 2 * radius + 1]
    assert made == made[::-1] == _probabilities(variance)
    exact = exact_pmf(variance, radius)
    with localcontext() as context:
        context.prec = 100
        off = [abs(Decimal(p) / Decimal(2**128) - q) for p, q in zip(made, exact, strict=True)]
        assert max(off) < Decimal(2) ** -120 and max(off[:radius]) <= Decimal(2) ** -128
        distance = (sum(off) + 1 - sum(exact)) / 2
    sampler = DiscreteGaussian(math.sqrt(variance))
    assert distance <= Decimal(sampler.tv_bound) < Decimal(2) ** -110


def test_the_bound_of_wide_noise_is_that_of_its_parts() -> None:
    """Distances of independent parts add up; 2**-420 is what `test_the_two_levels...` is about."""
    wide = DiscreteGaussian(WIDE)
    assert [stride for stride, _ in wide._parts] == [1, STRIDE]
    assert wide._parts[0][1] is _table(Fraction(FINE_SIGMA**2)) and wide._parts[1][1] is _table(COARSE)
    parts = DiscreteGaussian(float(FINE_SIGMA)).tv_bound + DiscreteGaussian(math.sqrt(COARSE)).tv_bound
    assert parts <= wide.tv_bound * (1 + 1e-15) < 2.0**-110
    assert 7_000_000 * 1562 * wide.tv_bound < 1e-20, "of a long run of a large network, against a δ of 1e-5"
    widest = DiscreteGaussian(SIGMA_MAX)
    assert [stride for stride, _ in widest._parts] == [STRIDE**n for n in range(5)] and widest.tv_bound < 2.0**-109


@pytest.mark.parametrize("sigma", [TABLE_SIGMA_MAX + 1e-9, 5000.5, WIDE, 10_000 * 2.0**24, SIGMA_MAX])
def test_the_variances_of_the_parts_add_up_and_their_seam_is_smooth(sigma: float) -> None:
    """Exactly, as fractions; and every seam has a t above 15 (see below)."""
    left, stride = Fraction(sigma) ** 2, 1
    for found, table in DiscreteGaussian(sigma)._parts[:-1]:
        assert found == stride and table is _table(Fraction(FINE_SIGMA**2))
        assert Fraction(FINE_SIGMA, STRIDE) ** 2 * (1 - FINE_SIGMA**2 / left) >= 15
        left, stride = (left - FINE_SIGMA**2) / STRIDE**2, stride * STRIDE
    last, table = DiscreteGaussian(sigma)._parts[-1]
    assert last == stride and table is _table(left) and left <= TABLE_SIGMA_MAX**2


def encoded(table: Any) -> list[int]:
    """The probability of each value, in units of 2**-128, that the columns of an alias table add up to, from the least value up.

    Word by word as `sample` reads it: of the 2**(64 - bits) words of a column those below `high` give the column's own value,
    the one that equals it gives it for `low` of 2**64 further words, the others give the alias.
    """
    columns, words = 1 << table.bits, 1 << 64 - table.bits
    least, found = int(table.values.min()), [0] * columns
    for column in range(columns):
        high, low = int(table.high[column]), int(table.low[column])
        share = (min(high, words) << 64) + (low if high < words else 0)
        found[int(table.values[2 * column + 1]) - least] += share
        found[int(table.values[2 * column]) - least] += (words << 64) - share
    return found


def test_small_noise_is_distributed_as_the_exact_reference_samples() -> None:
    """Chi-square of both samplers against the same exact probabilities."""
    variance, count = Fraction(25, 4), 20_000
    rng = random.Random(5)
    exact = np.array([float(p) for p in exact_pmf(variance, 9)])
    for values in (
        DiscreteGaussian(2.5).sample(count, Keystream(bytes(32))),
        np.array([cks_gaussian(variance, rng) for _ in range(count)]),
    ):
        inside = values[np.abs(values) <= 9]
        counts = np.bincount(inside + 9, minlength=19)
        expected = exact * count
        statistic = ((counts - expected) ** 2 / expected).sum()
        assert statistic < 19 + 6 * math.sqrt(2 * 19)


@pytest.mark.parametrize("sigma", [1.0, 300.5, 4096.0, 4097.0, 1.7 * 2**18, 5.7 * 2**18, 2.0**30])
def test_moments_of_narrow_and_wide_noise(sigma: float) -> None:
    count = 400_000
    x = gaussian(sigma).sample(count, Keystream(b"k" * 32)).astype(np.float64) / sigma
    assert abs(x.mean()) < 5 / math.sqrt(count)
    assert abs(x.var() - 1) < 5 * math.sqrt(2 / count) + (0.01 if sigma < 2 else 0)
    assert abs((x**4).mean() / x.var() ** 2 - 3) < 5 * math.sqrt(24 / count) + (0.05 if sigma < 2 else 0)
    for edge in (0.5, 1.0, 2.0, 3.0):
        tail = math.erfc(edge / math.sqrt(2))
        if sigma > 100:
            assert abs((np.abs(x) > edge).mean() - tail) < 5 * math.sqrt(tail / count)


@pytest.mark.parametrize(("stride", "fine", "sigma"), [(4, 8, 20), (4, 5, 13), (4, 4, 10), (8, 9, 31)])
def test_the_two_levels_of_wide_noise_convolve_to_the_gaussian(stride: int, fine: int, sigma: int) -> None:
    """The argument of the docstring where every term can be enumerated, to 60 digits: relative 4 exp(-2 pi² t) at most.

    Where t is small enough for the ripple to be seen, it is not much smaller than that either: the formula is the right one.
    """
    with localcontext() as context:
        context.prec = 60
        coarse = Fraction(sigma**2 - fine**2, stride**2)
        first, second = exact_pmf(Fraction(fine**2), 24 * fine), exact_pmf(coarse, math.ceil(24 * math.sqrt(coarse)))
        wanted = exact_pmf(Fraction(sigma**2), 3 * sigma)
        ripple = Decimal(0)
        for x in range(-3 * sigma, 3 * sigma + 1):
            made = Decimal(0)
            for k in range(-(len(second) // 2), len(second) // 2 + 1):
                if abs(x - stride * k) <= 24 * fine:
                    made += first[x - stride * k + 24 * fine] * second[k + len(second) // 2]
            ripple = max(ripple, abs(made / wanted[x + 3 * sigma] - 1))
    t = (fine / stride) ** 2 * (1 - fine**2 / sigma**2)
    assert float(ripple) <= 4 * math.exp(-2 * math.pi**2 * t)
    assert float(ripple) >= math.exp(-2 * math.pi**2 * t)
    assert math.log2(4) - 2 * math.pi**2 * 15 / math.log(2) < -420, "and at the size that is used"


def test_wide_noise_fills_its_quantiles_evenly() -> None:
    """Chi-square over 64 equally likely intervals of the Gaussian; the keys are fixed, so that it never flickers."""
    count, bins = 400_000, 64
    edges = [NormalDist(0, WIDE).inv_cdf(i / bins) for i in range(1, bins)]
    for key in (b"q" * 32, b"r" * 32):
        found = np.bincount(np.searchsorted(edges, gaussian(WIDE).sample(count, Keystream(key))), minlength=bins)
        statistic = float(((found - count / bins) ** 2).sum() * bins / count)
        assert abs(statistic - (bins - 1)) < 5 * math.sqrt(2 * (bins - 1))


def test_every_residue_of_the_coarse_step_is_as_likely() -> None:
    """A coarse part without a fine one would give multiples of 256 alone."""
    found = np.bincount(gaussian(WIDE).sample(256_000, Keystream(b"s" * 32)) % STRIDE, minlength=STRIDE)
    assert abs(float(((found - 1000.0) ** 2).sum() / 1000) - 255) < 5 * math.sqrt(2 * 255)


def test_blocks_and_neighbours_of_a_sample_have_nothing_in_common() -> None:
    x = gaussian(WIDE).sample(4 * BLOCK, Keystream(b"t" * 32)) / WIDE
    for lag in (1, 2, BLOCK, 2 * BLOCK):
        assert abs(float(x[lag:] @ x[:-lag]) / math.sqrt(len(x) - lag)) < 5


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.uint64, np.float32, np.float64])
def test_pitfall_10_noise_goes_into_int64_and_nothing_else(dtype: Any) -> None:
    """An unsigned or narrow word would wrap without a sound, a float would round."""
    with pytest.raises(PrivacyError, match="int64"):
        gaussian(50.0).add_to(np.zeros(10, dtype), Keystream())


def test_rows_of_a_matrix_would_share_their_noise_and_are_refused() -> None:
    with pytest.raises(PrivacyError, match="one row"):
        gaussian(50.0).add_to(np.zeros((3, 3), np.int64), Keystream())


def test_noise_is_in_whole_numbers_and_added_in_place() -> None:
    total = np.full(200_000, 7, np.int64)
    gaussian(50.0).add_to(total, Keystream())
    assert total.dtype == np.int64 and abs(total.mean() - 7) < 1
    assert gaussian(50.0).sample(0, Keystream()).shape == (0,)
    for size in (1, BLOCK, BLOCK + 1):
        assert gaussian(1e9).sample(size, Keystream(b"e" * 32)).all(), "nobody is left without, in whatever block"


@pytest.mark.parametrize("sigma", [0.0, -1.0, 0.5, math.nan, math.inf, 2.0**41, True, "3"])
def test_noise_out_of_range_is_refused(sigma: Any) -> None:
    with pytest.raises(PrivacyError):
        DiscreteGaussian(sigma)


def test_a_word_that_the_upper_half_cannot_decide_takes_sixty_four_bits_more() -> None:
    """Once in 2**47 samples at most; here every word is made such a one."""
    table = _table(Fraction(9))
    undecided = [c for c in range(1 << table.bits) if 0 < int(table.high[c]) < 1 << (64 - table.bits)]
    column = undecided[0]
    word = np.uint64((column << (64 - table.bits)) + int(table.high[column]))
    low = int(table.low[column])

    class Scripted:
        def __init__(self, more: list[int]) -> None:
            self.answers = [np.full(len(more), word, np.uint64), np.array(more, np.uint64)]

        def words(self, count: int) -> Any:
            return self.answers.pop(0)[:count]

    values = table.sample(3, Scripted([low - 1, low, low + 1]))  # type: ignore[arg-type]
    other, own = table.values[2 * column : 2 * column + 2].tolist()
    assert values.tolist() == [own, other, other]


# The keystream.


def test_the_keystream_is_aes_256_in_counter_mode() -> None:
    key = bytes(range(32))
    reference = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor().update(bytes(80))
    stream = Keystream(key)
    words = np.concatenate([stream.words(3), stream.words(7)])
    assert words.tobytes() == reference


def test_pitfall_9_two_streams_and_two_calls_share_no_word() -> None:
    a, b = Keystream(), Keystream()
    seen = np.concatenate([a.words(1000), a.words(1000), b.words(1000)])
    assert len(set(seen.tolist())) == 3000


def test_pitfall_9_forked_processes_draw_words_of_their_own() -> None:
    """Of one stream: parent, child, another child and a grandchild."""
    stream = Keystream(bytes(32))
    stream.words(1)
    reader, writer = os.pipe()
    for grandchild in (False, True):
        child = os.fork()
        if child == 0:
            if grandchild and (other := os.fork()) != 0:
                os.waitpid(other, 0)
            os.write(writer, stream.words(4).tobytes())
            os._exit(0)
        os.waitpid(child, 0)
    drawn = np.frombuffer(os.read(reader, 1000), np.uint64)
    own = np.concatenate([stream.words(4), Keystream(bytes(32)).words(8)])
    assert len(drawn) == 12 and len(set(drawn.tolist()) | set(own.tolist())) == 12 + 8, (
        "the parent goes on with its own key"
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_pitfall_1_no_seed_makes_noise_or_draws_repeat(seed: int) -> None:
    """torch, numpy and random seeded alike, and nothing alike."""
    noise, draws = [], []
    for _ in range(2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        noise.append(gaussian(1000.0).sample(64, Keystream()))
        draws.append(poisson_sample(500, 0.5, Keystream()))
    assert np.count_nonzero(noise[0] == noise[1]) < 8 and not np.array_equal(*draws)


@pytest.mark.parametrize("limit", [0, -1, 2**64 + 1])
def test_a_limit_that_no_word_reaches_is_refused(limit: int) -> None:
    with pytest.raises(PrivacyError):
        Keystream().below(limit)
    assert 0 <= Keystream().below(2**64) < 2**64 and Keystream().below(1) == 0


@given(st.integers(1, 7), st.integers(0, 2**32))
@UNHURRIED
def test_below_a_limit_is_a_whole_number_below_it(limit: int, seed: int) -> None:
    stream = Keystream(seed.to_bytes(32, "big"))
    values = [stream.below(limit) for _ in range(50)]
    assert set(values) <= set(range(limit))


def test_below_has_no_bias_and_repeats_a_word_that_would_make_one() -> None:
    stream = Keystream(bytes(32))
    counts = np.bincount([stream.below(3) for _ in range(30_000)])
    assert np.abs(counts - 10_000).max() < 5 * math.sqrt(10_000)
    words = iter([2**64 - 1, 2**64 - 1, 4])
    stream.words = lambda count: np.array([next(words)], np.uint64)  # type: ignore[method-assign]
    assert stream.below(3) == 1, "2**64 - 1 is the one word beyond the last whole multiple of 3"


# Poisson sampling.


def test_pitfall_3_each_patient_is_drawn_by_itself_with_the_rate() -> None:
    stream, draws, units, rate = Keystream(b"p" * 32), 4000, 40, 0.2
    drawn = np.zeros((draws, units))
    for row in drawn:
        row[poisson_sample(units, rate, stream)] = 1
    sizes = drawn.sum(axis=1)
    assert np.abs(drawn.mean(axis=0) - rate).max() < 5 * math.sqrt(rate * (1 - rate) / draws)
    assert abs(sizes.var() / (units * rate * (1 - rate)) - 1) < 0.12, "a fixed size would have no variance"
    correlation = np.corrcoef(drawn.T)[np.triu_indices(units, 1)]
    assert np.abs(correlation).max() < 6 / math.sqrt(draws)


def test_the_chance_is_the_rate_rounded_down() -> None:
    """To the last bit: a word just below rate * 2**64 is drawn, the next one is not."""
    border = math.floor(Fraction(0.3) * 2**64)
    stream = Keystream()
    stream.words = lambda count: np.array([border - 1, border, border + 1], np.uint64)  # type: ignore[method-assign]
    assert poisson_sample(3, 0.3, stream).tolist() == [0]
    stream.words = lambda count: np.array([0, 1, 2], np.uint64)  # type: ignore[method-assign]
    assert poisson_sample(3, 1.75 * 2.0**-64, stream).tolist() == [0]
    assert poisson_sample(3, 0.75 * 2.0**-64, stream).tolist() == []


@pytest.mark.parametrize("rate", [0.001, 0.032, 0.5, 0.97])
def test_how_many_are_drawn_is_binomial(rate: float) -> None:
    """Chi-square of the number drawn, cells of fewer than 8 expected draws put together."""
    units, draws, stream = 60, 6000, Keystream(b"b" * 32)
    found = np.bincount([len(poisson_sample(units, rate, stream)) for _ in range(draws)], minlength=units + 1)
    expected = np.array([math.comb(units, n) * rate**n * (1 - rate) ** (units - n) * draws for n in range(units + 1)])
    few = expected < 8
    cells = [*zip(found[~few], expected[~few], strict=True), (found[few].sum(), expected[few].sum() + 1e-3)]
    statistic = sum((n - m) ** 2 / m for n, m in cells if m > 0.5 or n)
    assert statistic < len(cells) + 5 * math.sqrt(2 * len(cells))


def test_all_or_none() -> None:
    stream = Keystream()
    assert poisson_sample(5, 1.0, stream).tolist() == [0, 1, 2, 3, 4]
    assert poisson_sample(0, 0.5, stream).tolist() == []
    assert poisson_sample(1000, 2.0**-70, stream).tolist() == [], "an empty draw is a draw"


def test_a_cap_leaves_a_uniform_choice_of_those_drawn() -> None:
    stream, seen = Keystream(b"c" * 32), np.zeros(8)
    for _ in range(8000):
        chosen = poisson_sample(8, 1.0, stream, cap=3)
        assert len(chosen) == 3 and (np.diff(chosen) > 0).all()
        seen[chosen] += 1
    assert np.abs(seen - 3000).max() < 5 * math.sqrt(3000)


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1, math.nan, True])
def test_rates_that_are_none_are_refused(rate: Any) -> None:
    with pytest.raises(PrivacyError):
        poisson_sample(10, rate, Keystream())
    with pytest.raises(PrivacyError):
        poisson_sample(10, 0.5, Keystream(), cap=0)
