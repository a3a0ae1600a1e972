"""The node's test of itself: it passes, in time, and every sabotage of the mechanism turns it red."""

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from privacy import dpsgd, noise, secagg, selftest
from privacy.errors import AuditFailed

add_to, poisson_sample, check_isolation = noise.DiscreteGaussian.add_to, noise.poisson_sample, dpsgd.check_isolation
Patch = Callable[[pytest.MonkeyPatch], None]


def test_it_passes_again_and_again() -> None:
    for _ in range(20):
        selftest.require()


def test_it_takes_less_than_a_second_of_a_core() -> None:
    selftest.require()  # imports and the sampler's table: once in a process
    began = time.process_time()
    selftest.require()
    assert time.process_time() - began < 1.0


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


def unclipped(patch: pytest.MonkeyPatch) -> None:
    def add(self: Any, gradient: Any) -> None:
        self.units += 1
        self.total.add_(gradient.mul_(self.grid / self.clip.norm).round_())

    patch.setattr(dpsgd._Accumulator, "add", add)


def nan_passes(patch: pytest.MonkeyPatch) -> None:
    """Pitfall 6: min(1, C / nan) is 1 in many a language."""
    add = dpsgd._Accumulator.add

    def passes(self: Any, gradient: Any) -> None:
        add(self, gradient.nan_to_num_(1e-6))

    patch.setattr(dpsgd._Accumulator, "add", passes)


def reused_masks(patch: pytest.MonkeyPatch) -> None:
    """Pitfall 9: masks that do not depend on the sum."""
    mask = secagg.Member.mask

    def again(self: Any, vector: Any, encoding: Any) -> bytes:
        vouch = mask(self, vector, encoding)
        vector.values[:] = np.arange(len(vector.values), dtype=vector.values.dtype) + 77
        return vouch

    patch.setattr(secagg.Member, "mask", again)


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
    "batches of a fixed size": ("draws", lambda patch: patch.setattr(noise, "poisson_sample", fixed_size)),
    "twice the rate": (
        "draws",
        lambda patch: patch.setattr(
            noise, "poisson_sample", lambda n, rate, s, cap=None: poisson_sample(n, 2 * rate, s, cap)
        ),
    ),
    "never the last patient": (
        "draws",
        lambda patch: patch.setattr(
            noise, "poisson_sample", lambda n, rate, s, cap=None: poisson_sample(n - 1, rate, s, cap)
        ),
    ),
    "masks used twice": ("masks", reused_masks),
    "no masks": ("masks", unmasked),
    "isolation not checked": ("isolation", lambda patch: patch.setattr(dpsgd, "check_isolation", lambda *_: None)),
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_every_sabotage_turns_it_red(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check, patch = SABOTAGE[name]
    patch(monkeypatch)
    with pytest.raises(AuditFailed, match=f"self-test of this node failed: {check}"):
        selftest.require()
