"""Secret noise: tables against exact arithmetic, the sampler of Canonne, Kamath and Steinke as reference, Poisson draws."""

import math
import os
import random
from decimal import Decimal, getcontext
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.errors import PrivacyError
from privacy.noise import DiscreteGaussian, Keystream, _probabilities, _table, gaussian, poisson_sample

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
    """Probabilities of -radius .. radius to 60 digits, with the normalisation over all whole numbers."""
    getcontext().prec = 70
    ratio = Decimal(variance.denominator) / Decimal(2 * variance.numerator)
    weight = [(-(ratio * n * n)).exp() for n in range(4 * radius)]
    total = 2 * sum(weight) - weight[0]
    return [weight[abs(n)] / total for n in range(-radius, radius + 1)]


@pytest.mark.parametrize("variance", [Fraction(1), Fraction(25, 4), Fraction(900), Fraction(123457, 100)])
def test_the_probabilities_of_a_table_are_those_of_the_discrete_gaussian(variance: Fraction) -> None:
    made = _probabilities(variance)
    radius = len(made) // 2
    assert sum(made) == 2**128 and made == made[::-1]
    exact = exact_pmf(variance, radius)
    distance = sum(abs(Decimal(p) / Decimal(2**128) - q) for p, q in zip(made, exact, strict=True)) + (1 - sum(exact))
    bound = DiscreteGaussian(math.sqrt(variance)).tv_bound
    assert distance / 2 <= Decimal(bound) < Decimal(2) ** -100


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


@pytest.mark.parametrize("variance", [Fraction(1), Fraction(9), Fraction(1700**2)])
def test_the_alias_table_encodes_exactly_these_probabilities(variance: Fraction) -> None:
    table, wanted = _table(variance), _probabilities(variance)
    made = encoded(table)
    assert made[: len(wanted)] == wanted and not any(made[len(wanted) :])


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


def test_the_two_levels_of_wide_noise_convolve_to_the_gaussian() -> None:
    """The argument of the docstring at a scale that can be enumerated: X1 + 4 * X2 with sigma1 = 16, sigma2 chosen so."""
    stride, fine, sigma = 4, 16, 40.0
    coarse = math.sqrt(sigma**2 - fine**2) / stride
    a = np.exp(-(np.arange(-400, 401) ** 2) / (2 * fine**2))
    b = np.zeros(4 * 200 + 1)
    b[::stride] = np.exp(-(np.arange(-100, 101) ** 2) / (2 * coarse**2))
    made = np.convolve(a / a.sum(), b / b.sum())
    n = np.arange(len(made)) - len(made) // 2
    wanted = np.exp(-(n**2) / (2 * sigma**2))
    t = (fine / stride) ** 2 * (1 - fine**2 / sigma**2)
    assert np.abs(made - wanted / wanted.sum()).sum() < 8 * math.exp(-2 * math.pi**2 * t) + 1e-13


def test_noise_is_in_whole_numbers_and_added_in_place() -> None:
    total = np.full(200_000, 7, np.int64)
    gaussian(50.0).add_to(total, Keystream())
    assert total.dtype == np.int64 and abs(total.mean() - 7) < 1
    assert gaussian(50.0).sample(0, Keystream()).shape == (0,)


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


def test_two_streams_and_two_calls_share_no_word() -> None:
    a, b = Keystream(), Keystream()
    seen = np.concatenate([a.words(1000), a.words(1000), b.words(1000)])
    assert len(set(seen.tolist())) == 3000


def test_a_forked_process_draws_other_words() -> None:
    stream = Keystream()
    stream.words(1)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, stream.words(4).tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 32) != stream.words(4).tobytes()


@pytest.mark.parametrize("seed", [0, 1])
def test_no_seed_makes_noise_repeat(seed: int) -> None:
    """Pitfall 1: torch, numpy and random seeded alike, and no noise alike."""
    made = []
    for _ in range(2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        made.append(gaussian(1000.0).sample(64, Keystream()))
    assert not np.array_equal(*made)


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


def test_each_patient_is_drawn_by_itself_with_the_rate() -> None:
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
