"""Words of 16 and 24 bits: which scale the coordinator chooses for them, and how close their sums come to the exact ones."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from test_server_sums import BINS, BITS, ROSTERS, UNHURRIED, limit_of, made_study, named, open_study, total_of

from fl_server.sums import Total, first_scale, next_scale
from models import contributions
from models.contributions import Contribution, Sheet
from models.metrics import ScoreHistogram
from privacy.sharing import Encoding


def test_a_little_clipping_of_narrow_words_costs_one_bit_and_much_of_it_four() -> None:
    sheet = Sheet(0, 0, 0.0, ScoreHistogram.empty(1, BINS))
    for bits, clipped, bit in ((16, 80, 1), (16, 81, 4), (24, 80, 4), (32, 1, 4)):
        mean = Contribution(0, sheet, update=np.ones(4000, np.float32))
        total = Total(mean, ["a", "b"], {}, {}, clipped, 1.0, {})
        assert next_scale(open_study(4, bits), total, 10) == 10 - bit


@pytest.mark.parametrize("agreement", [0.0, 1.0])
@pytest.mark.parametrize("bits", [16, 24])
def test_what_narrow_words_of_many_sites_add_up_to_is_close_to_the_exact_sum(bits: int, agreement: float) -> None:
    """Sites that agree and sites that differ by chance, over nine rounds, with the scale that the coordinator would choose."""
    draw, count, values = np.random.default_rng(5), 200, 5000
    study, direction = open_study(count, bits), agreement * np.random.default_rng(6).normal(size=5000)
    scale, wrong, sheet = first_scale(study), list[float](), Sheet(0, 0, 0.0, ScoreHistogram.empty(1, BINS))
    for number in range(1, 10):
        updates = [(0.001 * (direction + draw.normal(size=values))).astype(np.float32) for _ in range(count)]
        cases = [int(n) for n in draw.integers(50, 500, count)]
        exact = sum(u.astype(np.float64) * n for u, n in zip(updates, cases, strict=True))
        encoding = Encoding(values, 0, contributions.bits_of(study, "train", number), scale, count)
        opened = encoding.zeros()
        for update, weight in zip(updates, cases, strict=True):
            opened.add(encoding.encode(update, weight, np.zeros(0, np.int64)))
        found = encoding.decode(opened)
        wrong.append(float(np.linalg.norm(found.values - exact) / np.linalg.norm(exact)))
        mean, peak = Contribution(0, sheet, update=found.values), float(np.abs(found.values).max())
        scale = next_scale(study, Total(mean, list(named(count)), {}, {}, found.clipped, peak, {}), scale)
    assert wrong[0] < 0.01 and max(wrong[-3:]) < {16: 0.05, 24: 0.002}[bits], wrong


def test_a_first_round_has_words_that_are_wide_enough() -> None:
    for bits, first in ((16, 32), (24, 32), (32, 32), (64, 64)):
        study = open_study(4, bits)
        assert contributions.bits_of(study, "train", 1) == first
        assert contributions.bits_of(study, "train", 2) == contributions.bits_of(study, "test", 1) == bits


def test_clipped_values_lower_the_scale_and_a_sum_of_zeros_raises_it_within_bounds() -> None:
    study = made_study()
    assert next_scale(study, total_of(1.0, clipped=3), 10) == 6
    assert next_scale(study, total_of(0.0), 10) == 14
    assert next_scale(study, total_of(1.0, clipped=1), -199) == -200
    assert next_scale(study, total_of(0.0), 199) == 200
    for peak in (2.0**-300, 2.0**300):
        assert abs(next_scale(study, total_of(peak), 0)) == 200


@UNHURRIED
@given(ROSTERS, BITS)
def test_the_first_scale_leaves_the_room_it_says(count: int, bits: int) -> None:
    study, wide = open_study(count, bits), open_study(count, max(bits, 32))
    room, scale = Fraction(2) ** (wide.encoding_bits // 2 - 2), first_scale(study)
    assert room * Fraction(2) ** scale <= limit_of(wide) < room * Fraction(2) ** (scale + 1)
    encoding = Encoding(values=1, counts=0, bits=wide.encoding_bits, scale=scale, sites=count)
    largest = encoding.encode(np.array([float(room)], np.float32), 1, np.zeros(0, np.int64))
    assert int(largest.counts[-1]) == 0
