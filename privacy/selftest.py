"""What a node checks of its own privacy mechanism at every start, in under a second: a failure stops the node.

The production functions are run on numbers of which it is known what has to come out. Nothing of a patient is needed. A wrong
build of torch or numpy, a patched file, a broken source of entropy show here, before an order is answered. Chance alone fails a
start about once in 10**8; noise of half or twice its deviation is noticed practically always.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from privacy import keys, noise, secagg, sharing
from privacy.errors import AuditFailed, UnitsCoupled

VALUES = 4096  # that get noise: the relative deviation of their variance is sqrt(2 / 4096) = 2.2 %
NOISE_MULTIPLIER = 1.7  # an ordinary one, whose table the first private round of many studies needs anyway
Z_MAX = 6.0  # standard deviations; a normal variable is beyond it once in 5 * 10**8
DRAWS, UNITS, RATE = 256, 64, 0.25
MEMBERS = ("a", "b", "c")


def require() -> None:
    """Raise AuditFailed naming the first check that fails."""
    for name, check in CHECKS.items():
        found = check()
        if found:
            raise AuditFailed(f"the self-test of this node failed: {name}: {found}")


def _noise() -> str:
    """Variance, mean and wholeness of what `dpsgd.private_gradient` adds to a draw of nobody."""
    from privacy import dpsgd

    clip = dpsgd.Clip(1.0)
    sums = [dpsgd.private_gradient(_still(VALUES), [], clip, NOISE_MULTIPLIER, noise.Keystream())[0] for _ in range(2)]
    if any(total.dtype != np.int64 for total in sums):
        return "noise is not in whole numbers"
    if np.array_equal(*sums):
        return "the same noise came twice"
    deviation = NOISE_MULTIPLIER * 2.0**clip.bits
    scaled = np.concatenate(sums) / deviation
    spread = (scaled.var() - 1) * math.sqrt(scaled.size / 2)
    shift = scaled.mean() * math.sqrt(scaled.size)
    if abs(spread) > Z_MAX or abs(shift) > Z_MAX:
        return f"variance {scaled.var():.3f} and mean {scaled.mean():.3f} instead of 1 and 0"
    return ""


def _clip() -> str:
    """A gradient of a thousand clip norms comes out no longer than one; one that is no number counts as nothing."""
    import torch

    from privacy import dpsgd

    clip, net = dpsgd.Clip(0.5), torch.nn.Linear(64, 1, bias=False)
    wild = torch.ones(1, 64) * 1000 * clip.norm / 8
    seen = dpsgd.LoopEngine(net, _linear).clipped_sum([(wild,), (wild * math.nan,)], clip)
    norm = float(np.linalg.norm(seen.total.astype(np.float64)))
    if norm > 2.0**clip.bits or norm < 0.99 * 2.0**clip.bits:
        return f"a patient moves the sum by {norm / 2.0**clip.bits:.3f} clip norms"
    return "" if (seen.clipped, seen.nonfinite) == (1, 1) else "a gradient that is no number was not left out"


def _draws() -> str:
    """Patients are drawn by Poisson sampling: the number in a draw has a binomial's mean and variance, each patient its rate."""
    stream = noise.Keystream()
    drawn = np.zeros((DRAWS, UNITS))
    for row in drawn:
        row[noise.poisson_sample(UNITS, RATE, stream)] = 1
    expected, variance = UNITS * RATE, UNITS * RATE * (1 - RATE)
    sizes = drawn.sum(axis=1)
    mean = (sizes.mean() - expected) / math.sqrt(variance / DRAWS)
    spread = (sizes.var() / variance - 1) * math.sqrt(DRAWS / 2)
    each = (drawn.mean(axis=0) - RATE) / math.sqrt(RATE * (1 - RATE) / DRAWS)
    # The variance of so few draws has heavier tails than a normal variable; batches of a fixed size have none at all.
    if abs(mean) > Z_MAX or not -Z_MAX < spread < 1.5 * Z_MAX or np.abs(each).max() > Z_MAX + 1:
        return f"{sizes.mean():.1f} patients a draw with a variance of {sizes.var():.1f}, not {expected} and {variance}"
    return ""


def _masks() -> str:
    """Masks cancel in the sum of all members, hide each vector, and are others in another sum."""
    seen = [_masked_sum(number) for number in (1, 2)]
    if any(opened != [3 * word for word in _WORDS] for opened, _ in seen):
        return "masks do not cancel in the sum"
    if any(np.array_equal(vector, _WORDS) for _, sent in seen for vector in sent):
        return "a vector left without a mask"
    if any(np.array_equal(*pair) for pair in zip(*(sent for _, sent in seen), strict=True)):
        return "a mask was used twice"
    return ""


_WORDS = list(range(1, 9))


def _masked_sum(number: int) -> tuple[list[int], list[Any]]:
    """(the opened words of three members who all add _WORDS, what each of them sent)."""
    place, enrolled = secagg.Place("5e" * 32, "self-test", 1, number), _enrolled()
    roster = {name: key.public_key() for name, key in enrolled.items()}
    members = {name: secagg.Member(place, name, key) for name, key in enrolled.items()}
    aggregator = secagg.Aggregator(place, roster, len(MEMBERS))
    for name, member in members.items():
        aggregator.add_keys(name, member.public)
    told = aggregator.close_keys()
    for name, member in members.items():
        aggregator.add_shares(name, member.share(told, roster))
    participants, sealed = aggregator.close_shares()
    encoding = sharing.Encoding(values=len(_WORDS), counts=0, bits=32, scale=0, sites=len(MEMBERS))
    aggregator.start(b"self-test", encoding)
    sent = []
    for name, member in members.items():
        member.open(participants, sealed, b"self-test", len(MEMBERS))
        vector = encoding.encode(np.array(_WORDS, np.float32), 1, np.zeros(0, np.int64))
        vouch = member.mask(vector, encoding)
        sent.append(vector.values.copy())
        aggregator.add_vector(name, vector, vouch)
    survivors = aggregator.close_vectors()
    for name, member in members.items():
        aggregator.add_revealed(name, member.reveal(survivors, aggregator.vouches, len(MEMBERS)))
    return [round(value) for value in encoding.decode(aggregator.finish()).values.tolist()], sent


@functools.cache
def _enrolled() -> dict[str, keys.PrivateKey]:
    from cryptography.hazmat.primitives.asymmetric import ec

    return {name: ec.generate_private_key(ec.SECP256R1()) for name in MEMBERS}


def _isolation() -> str:
    """A network in which patients meet is told from one in which they do not."""
    import torch

    from privacy import dpsgd

    torch_state = torch.random.get_rng_state()
    try:
        samples = [(torch.rand(1, 4, 6, 6),) for _ in range(2)]
        sound = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3), torch.nn.GroupNorm(2, 4))
        coupled = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3), torch.nn.BatchNorm2d(4))
        try:
            dpsgd.check_isolation(sound, _mean, samples)
        except UnitsCoupled:
            return "a network with GroupNorm counts as one in which patients meet"
        try:
            dpsgd.check_isolation(coupled, _mean, samples)
        except UnitsCoupled:
            return ""
        return "a network with BatchNorm counts as one in which patients are apart"
    finally:
        torch.random.set_rng_state(torch_state)


def _mean(net: Any, batch: Any) -> Any:
    return net(batch[0]).square().mean(dim=(1, 2, 3))


def _linear(net: Any, batch: Any) -> Any:
    return net(batch[0]).sum(dim=1)


def _still(values: int) -> Any:
    """An engine for `values` parameters whose patients never come."""
    import torch

    from privacy import dpsgd

    return dpsgd.LoopEngine(torch.nn.Linear(values, 1, bias=False), _linear)


CHECKS: dict[str, Callable[[], str]] = {
    "noise": _noise,
    "clip": _clip,
    "draws": _draws,
    "masks": _masks,
    "isolation": _isolation,
}
