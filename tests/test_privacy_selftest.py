"""The node's test of itself: it passes, in time, and every sabotage of the mechanism turns it red."""

import hashlib
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import special, stats

from privacy import dpsgd, noise, secagg, selftest
from privacy.errors import AuditFailed
from privacy.selftest import DRAWS, RATE, SHARES_MIN, SPREAD_MAX, SPREAD_MIN, UNITS, VALUES, Z_EACH, Z_MAX

ROOT = Path(__file__).resolve().parent.parent

add_to, poisson_sample, check_isolation = noise.DiscreteGaussian.add_to, noise.poisson_sample, dpsgd.check_isolation
Patch = Callable[[pytest.MonkeyPatch], None]


def test_it_passes_again_and_again() -> None:
    for _ in range(20):
        assert selftest.check() == []
        selftest.require()


def test_it_changes_nothing_of_the_process_that_runs_it() -> None:
    torch.manual_seed(1)
    before, mode = torch.random.get_rng_state(), torch.is_grad_enabled()
    selftest.require()
    assert torch.equal(before, torch.random.get_rng_state()) and torch.is_grad_enabled() is mode


FRESH = """
import sys
from privacy import selftest
assert not {"torch", "dp_accounting", "scipy"} & sys.modules.keys(), "too much for a module that light ones import"
import time, numpy, torch
torch.set_num_threads(1)
began = time.process_time()
selftest.require()
print(time.process_time() - began)
"""


def test_a_fresh_process_needs_less_than_a_second_with_the_samplers_tables() -> None:
    """And nothing heavy is loaded before it is asked. Time of a core, since others may be using it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", FRESH], cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    )
    assert float(ran.stdout) < 1.0


# How often chance alone stops a node: the exact distributions, against the limits of the module.


def squares(trials: int) -> tuple[np.ndarray, np.ndarray]:
    """(squared deviations of a binomial number from its mean, over its variance; their chances)."""
    numbers = np.arange(trials + 1)
    values = np.square(numbers - trials * RATE) / (trials * RATE * (1 - RATE))
    return values, stats.binom.pmf(numbers, trials, RATE)


def chernoff(values: np.ndarray, chances: np.ndarray, limit: float, count: int) -> float:
    """A bound on the chance that the mean of `count` independent such values lies beyond `limit`, on its side of the mean."""
    side = 1.0 if limit > values @ chances else -1.0
    tilts = side * np.geomspace(0.01, 10.0, 400)
    rates = [special.logsumexp(t * (values - limit), b=chances) for t in tilts]
    return math.exp(min(0.0, count * min(rates)))


def test_chance_alone_fails_a_start_less_than_once_in_a_thousand_million() -> None:
    count, words = 2 * VALUES, UNITS * DRAWS
    reach = Z_MAX * math.sqrt(2 / count)
    variance = stats.chi2.sf(count * (1 + reach), count) + stats.chi2.cdf(count * (1 - reach), count)
    mean = 2 * stats.norm.sf(Z_MAX)
    drawn = Z_MAX * math.sqrt(words * RATE * (1 - RATE))
    sizes = stats.binom.sf(words * RATE + drawn - 1, words, RATE) + stats.binom.cdf(words * RATE - drawn, words, RATE)
    own = Z_EACH * math.sqrt(DRAWS * RATE * (1 - RATE))
    each = stats.binom.sf(DRAWS * RATE + own - 1, DRAWS, RATE) + stats.binom.cdf(DRAWS * RATE - own, DRAWS, RATE)
    spread = sum(chernoff(*squares(UNITS), limit, DRAWS) for limit in (SPREAD_MIN, SPREAD_MAX))
    shares = chernoff(*squares(DRAWS), SHARES_MIN, UNITS)
    masks = 21 * math.comb(selftest.WORDS, selftest.ALIKE_MAX + 1) * 2.0 ** (-32 * (selftest.ALIKE_MAX + 1))
    parts = (variance, mean, sizes, UNITS * each, spread, shares, masks)
    assert 0 < sum(parts) < 1e-9, parts


# Sabotage -------------------------------------------------------------------------------------------------------------


def scaled_noise(factor: float) -> Patch:
    def scaled(self: noise.DiscreteGaussian, total: Any, stream: noise.Keystream) -> None:
        add_to(noise.gaussian(self.sigma * factor), total, stream)

    return lambda patch: patch.setattr(noise.DiscreteGaussian, "add_to", scaled)


def shifted_noise(self: noise.DiscreteGaussian, total: Any, stream: noise.Keystream) -> None:
    add_to(self, total, stream)
    total += round(0.1 * self.sigma)


def repeated_noise(patch: pytest.MonkeyPatch) -> None:
    """The generator seeded by whoever asks (pitfall 1), so that each step has the same noise."""
    fixed = type("Fixed", (noise.Keystream,), {"__init__": lambda self, key=None: self._begin(bytes(32))})
    patch.setattr(noise, "Keystream", fixed)


def fixed_size(units: int, rate: float, stream: noise.Keystream, cap: int | None = None) -> Any:
    """Pitfall 2: shuffled batches of one size that pass for Poisson sampling."""
    return np.sort(np.random.default_rng().permutation(units)[: math.floor(units * rate)])


def rate_times(factor: float) -> Patch:
    def more(units: int, rate: float, stream: noise.Keystream, cap: int | None = None) -> Any:
        return poisson_sample(units, factor * rate, stream, cap)

    return lambda patch: patch.setattr(noise, "poisson_sample", more)


def all_or_nobody(units: int, rate: float, stream: noise.Keystream, cap: int | None = None) -> Any:
    """The right rate for each patient, but one coin for all of them."""
    return np.arange(units if stream.below(1000) < 1000 * rate else 0)


class Epochs:
    """Pitfall 2: all patients shuffled once for several batches, whose sizes vary."""

    def __init__(self) -> None:
        self.left: list[int] = []

    def __call__(self, units: int, rate: float, stream: noise.Keystream, cap: int | None = None) -> Any:
        size = len(poisson_sample(units, rate, stream))
        if len(self.left) < size:
            self.left += np.random.default_rng().permutation(units).tolist()
        chosen, self.left = self.left[:size], self.left[size:]
        return np.sort(chosen)


def unclipped(patch: pytest.MonkeyPatch) -> None:
    def add(self: Any, gradient: Any) -> None:
        self.units += 1
        self.clipped += 1
        if torch.isfinite(gradient).all():
            self.total.add_(gradient.mul_(self.grid / self.clip.norm).round_())
        else:
            self.nonfinite += 1
            self.clipped -= 1

    patch.setattr(dpsgd._Accumulator, "add", add)


def nan_passes(patch: pytest.MonkeyPatch) -> None:
    """Pitfall 6: min(1, C / nan) is 1 in many a language."""
    add = dpsgd._Accumulator.add

    def passes(self: Any, gradient: Any) -> None:
        add(self, gradient.nan_to_num_(1e-6))

    patch.setattr(dpsgd._Accumulator, "add", passes)


def nan_uncounted(patch: pytest.MonkeyPatch) -> None:
    """Left out, but without a word: then nobody notices a network that has diverged for some patients."""
    add = dpsgd._Accumulator.add

    def silent(self: Any, gradient: Any) -> None:
        add(self, gradient)
        self.nonfinite = 0

    patch.setattr(dpsgd._Accumulator, "add", silent)


def infinity_passes(patch: pytest.MonkeyPatch) -> None:
    """A gradient of infinite length, clipped after it was made finite."""
    add = dpsgd._Accumulator.add
    patch.setattr(dpsgd._Accumulator, "add", lambda self, gradient: add(self, gradient.clamp_(-1e30, 1e30)))


def clipped_by_layer(patch: pytest.MonkeyPatch) -> None:
    """Pitfall 7: the norm of a part of the gradient in place of the norm of all of it."""
    norm, rounded = dpsgd._norm, dpsgd._rounded

    def of_half(vector: torch.Tensor, factor: float) -> float:
        rounded(vector, factor)
        return norm(vector[: len(vector) // 2])

    patch.setattr(dpsgd, "_norm", lambda vector: norm(vector[: len(vector) // 2]))
    patch.setattr(dpsgd, "_rounded", of_half)  # of the two looks, one alone would find the other's fault


def clipped_loosely(patch: pytest.MonkeyPatch) -> None:
    """A clip to one hundredth more than was said."""
    begin = dpsgd._Accumulator.__init__

    def loose(self: Any, *given: Any) -> None:
        begin(self, *given)
        self.grid, self.target = 1.01 * self.grid, 1.01 * self.grid

    patch.setattr(dpsgd._Accumulator, "__init__", loose)


def reused_masks(patch: pytest.MonkeyPatch) -> None:
    """Pitfall 9: masks that are bound to the sites and not to the sum. They cancel, and the sums are right."""
    derive = secagg._derive

    def again(secret: bytes, label: bytes, context: bytes, *names: str) -> bytes:
        if label in (secagg.PAIR_MASK, secagg.SELF_MASK):
            return hashlib.sha256(label + " ".join(names).encode()).digest()
        return derive(secret, label, context, *names)

    patch.setattr(secagg, "_derive", again)


def masks_that_add_up(patch: pytest.MonkeyPatch) -> None:
    pair = secagg.Circle.pair_mask
    patch.setattr(secagg.Circle, "pair_mask", lambda self, *given: (pair(self, *given)[0], 1))


def half_masked(patch: pytest.MonkeyPatch) -> None:
    """Masks that end before the vector does, as with a keystream that is too short."""
    add_masks = secagg.add_masks

    def half(vector: Any, masks: Any) -> None:
        kept = vector.values[len(vector.values) // 2 :].copy()
        add_masks(vector, masks)
        vector.values[len(vector.values) // 2 :] = kept

    patch.setattr(secagg, "add_masks", half)


def unmasked(patch: pytest.MonkeyPatch) -> None:
    mask = secagg.Member.mask

    def bare(self: Any, vector: Any, encoding: Any) -> bytes:
        before = vector.values.copy()
        vouch = mask(self, vector, encoding)
        vector.values[:] = before
        return vouch

    patch.setattr(secagg.Member, "mask", bare)


SABOTAGE: dict[str, tuple[str, Patch]] = {
    "half the noise": ("noise", scaled_noise(0.5)),
    "twice the noise": ("noise", scaled_noise(2.0)),
    "a fifth less noise": ("noise", scaled_noise(0.8)),
    "no noise": ("noise", lambda patch: patch.setattr(noise.DiscreteGaussian, "add_to", lambda *_: None)),
    "noise with a mean": ("noise", lambda patch: patch.setattr(noise.DiscreteGaussian, "add_to", shifted_noise)),
    "noise from a seed": ("noise", repeated_noise),
    "no clip": ("clip", unclipped),
    "NaN lets through": ("clip", nan_passes),
    "NaN is not counted": ("clip", nan_uncounted),
    "infinity lets through": ("clip", infinity_passes),
    "the norm of half a gradient": ("clip", clipped_by_layer),
    "a clip that is a hundredth loose": ("clip", clipped_loosely),
    "batches of a fixed size": ("draws", lambda patch: patch.setattr(noise, "poisson_sample", fixed_size)),
    "shuffled epochs": ("draws", lambda patch: patch.setattr(noise, "poisson_sample", Epochs())),
    "one coin for all": ("draws", lambda patch: patch.setattr(noise, "poisson_sample", all_or_nobody)),
    "twice the rate": ("draws", rate_times(2.0)),
    "a fifth more than the rate": ("draws", rate_times(1.2)),
    "never the last patient": (
        "draws",
        lambda patch: patch.setattr(
            noise, "poisson_sample", lambda n, rate, s, cap=None: poisson_sample(n - 1, rate, s, cap)
        ),
    ),
    "masks used twice": ("masks", reused_masks),
    "masks that do not cancel": ("masks", masks_that_add_up),
    "masks of half a vector": ("masks", half_masked),
    "no masks": ("masks", unmasked),
    "isolation not checked": ("isolation", lambda patch: patch.setattr(dpsgd, "check_isolation", lambda *_: None)),
    "noise that cannot be drawn": ("noise", lambda patch: patch.setattr(noise.Keystream, "words", lambda *_: None)),
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_every_sabotage_turns_it_red(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check, patch = SABOTAGE[name]
    patch(monkeypatch)
    with pytest.raises(AuditFailed, match=f"self-test of this node failed: {check}"):
        selftest.require()


def test_every_check_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    unclipped(monkeypatch)
    unmasked(monkeypatch)
    found = selftest.check()
    assert [line.split(":")[0] for line in found] == ["clip", "masks"]
    with pytest.raises(AuditFailed, match=r"clip: .*; masks: "):
        selftest.require()
