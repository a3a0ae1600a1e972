"""What a node checks of its own privacy mechanism at every start, in under a second: a failure stops the node.

The production functions are run on numbers of which it is known what has to come out. Nothing of a patient is needed. A wrong
build of torch or numpy, a patched file, a broken source of entropy show here, before an order is answered. Chance alone fails a
start less than once in 10**9 (its tests add that up); noise of half or twice its deviation is noticed practically always.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from privacy import keys, noise, secagg, sharing
from privacy.errors import AuditFailed, UnitsCoupled

VALUES = 16_384  # that get noise, twice: the relative deviation of the variance of all is sqrt(2 / 32768) = 0.8 %
NOISE_MULTIPLIER = 1.7  # an ordinary one, well inside the range in which noise is put together from two tables
Z_MAX = 7.0  # standard deviations; a normal variable is beyond it once in 4 * 10**11
Z_EACH = 8.0  # for each patient's share of the draws: there are UNITS of them, and a binomial's tail is heavier
DRAWS, UNITS, RATE = 512, 64, 0.25
SPREAD_MIN, SPREAD_MAX = 0.5, 1.7  # variance of the number in a draw, over a binomial's; 0 for batches of a fixed size
SHARES_MIN = 0.2  # variance of the number of draws that a patient is in, over a binomial's; 0 for shuffled epochs
WORDS = 64  # that three members mask
ALIKE_MAX = 2  # words of 32 bits that may be alike by chance: three of WORDS are once in 10**24
MEMBERS = ("a", "b", "c")


def check() -> list[str]:
    """What is not as it should be, a line for each check that fails; nothing if all is well. A check that cannot run fails."""
    import torch

    found = {}
    # Weights and pictures are drawn below; what the process draws afterwards must not depend on it.
    with torch.random.fork_rng(devices=[]):
        for name, run in CHECKS.items():
            try:
                found[name] = run()
            except Exception as error:  # whatever it is, the mechanism did not do what it is for
                found[name] = f"{type(error).__name__}: {error}"
    noise.forget()  # 3 MiB for a multiplier that no study here may ever ask for
    return [f"{name}: {line}" for name, line in found.items() if line]


def require() -> None:
    """Raise AuditFailed naming the checks that fail."""
    if found := check():
        raise AuditFailed(f"the self-test of this node failed: {'; '.join(found)}")


def _noise() -> str:
    """Variance, mean and wholeness of what `dpsgd.private_gradient` adds to a draw of nobody."""
    from privacy import dpsgd

    clip = dpsgd.Clip(1.0)
    sums = [dpsgd.private_gradient(_still(VALUES), [], clip, NOISE_MULTIPLIER, noise.Keystream())[0] for _ in range(2)]
    if any(total.dtype != np.int64 for total in sums):
        return "noise is not in whole numbers"
    if np.array_equal(sums[0], sums[1]):
        return "the same noise came twice"
    scaled = np.concatenate(sums) / (NOISE_MULTIPLIER * 2.0**clip.bits)
    variance, mean = (
        float(np.square(scaled).mean()),
        float(scaled.mean()),
    )  # the first is chi-square, about the known mean 0
    if not abs(variance - 1) <= Z_MAX * math.sqrt(2 / scaled.size) or not abs(mean) <= Z_MAX / math.sqrt(scaled.size):
        return f"variance {variance:.3f} and mean {mean:.3f} instead of 1 and 0"
    return ""


def _clip() -> str:
    """A gradient of a thousand clip norms moves the sum by one at most, one that is no number by nothing.

    Of all engines there is one accumulator; that of torch.func would load a second's worth of modules for the same answer.
    """
    import torch

    from privacy import dpsgd

    clip, net = dpsgd.Clip(0.5), torch.nn.Linear(64, 1, bias=False)
    wild = torch.ones(1, 64) * 1000 * clip.norm / 8
    units = [(wild,), (wild * math.nan,), (wild * math.inf,)]
    for bfloat16 in (False, True):
        engine = dpsgd.LoopEngine(net, _linear, bfloat16=bfloat16)
        _, seen = dpsgd.private_gradient(engine, units, clip, NOISE_MULTIPLIER, noise.Keystream())
        norm = math.sqrt(sum(int(value) ** 2 for value in seen.total)) / 2.0**clip.bits
        if not 0.99 <= norm <= 1:
            return f"a patient moves the sum by {norm:.3f} clip norms ({engine.name})"
        if (seen.units, seen.clipped, seen.nonfinite) != (3, 1, 2):
            return f"a gradient that is no number was not left out, or not counted ({engine.name})"
    return ""


def _draws() -> str:
    """Patients are drawn by Poisson sampling: the number in a draw has a binomial's mean and variance, each patient its rate."""
    stream = noise.Keystream()
    drawn = np.zeros((DRAWS, UNITS))
    for row in drawn:
        row[noise.poisson_sample(UNITS, RATE, stream)] = 1
    expected, variance = UNITS * RATE, UNITS * RATE * (1 - RATE)
    sizes, shares = drawn.sum(axis=1), drawn.mean(axis=0)
    mean = (sizes.mean() - expected) / math.sqrt(variance / DRAWS)
    spread = np.square(sizes - expected).mean() / variance
    each = np.abs(shares - RATE) / math.sqrt(RATE * (1 - RATE) / DRAWS)
    if not abs(mean) <= Z_MAX or not SPREAD_MIN <= spread <= SPREAD_MAX:
        return f"{sizes.mean():.2f} patients a draw with a variance of {sizes.var():.2f}, not {expected} and {variance}"
    if not each.max() <= Z_EACH or not np.square(each).mean() >= SHARES_MIN:
        return f"patients are in {shares.min():.3f} to {shares.max():.3f} of the draws, not as chance at {RATE} has it"
    return ""


def _masks() -> str:
    """Masks cancel in the sum of all members, hide every word of each vector, and are others in another sum."""
    first, second = _masked_sum(1), _masked_sum(2)
    if any(opened != [word * len(MEMBERS) for word in _PLAIN] for opened, _ in (first, second)):
        return "masks do not cancel in the sum"
    if any(_alike(vector, np.array(_PLAIN)) for _, sent in (first, second) for vector in sent):
        return "words left without a mask"
    if any(_alike(*pair) for pair in itertools.combinations([*first[1], *second[1]], 2)):
        return "a mask was used twice"
    return ""


def _alike(one: Any, other: Any) -> bool:
    return int(np.count_nonzero(one == other)) > ALIKE_MAX


_PLAIN = list(range(1, WORDS + 1))


def _masked_sum(number: int) -> tuple[list[int], list[Any]]:
    """(the opened words of three members who all add _PLAIN, what each of them sent)."""
    place, enrolled = secagg.Place("5e" * 32, "self-test", 1, number), _enrolled()
    roster = {name: key.public_key() for name, key in enrolled.items()}
    members = {name: secagg.Member(place, name, functools.partial(keys.sign, key)) for name, key in enrolled.items()}
    aggregator = secagg.Aggregator(place, roster, len(MEMBERS))
    for name, member in members.items():
        aggregator.add_keys(name, member.public)
    told = aggregator.close_keys()
    for name, member in members.items():
        aggregator.add_shares(name, member.share(told, roster))
    participants, sealed = aggregator.close_shares()
    encoding = sharing.Encoding(values=len(_PLAIN), counts=0, bits=32, scale=0, sites=len(MEMBERS))
    aggregator.start(b"self-test", encoding)
    sent = []
    for name, member in members.items():
        member.open(participants, sealed, b"self-test", len(MEMBERS))
        vector = encoding.encode(np.array(_PLAIN, np.float32), 1, np.zeros(0, np.int64))
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
    """A network that keeps patients apart is told from one in which they meet, and for the second there is no engine."""
    import torch

    from privacy import dpsgd

    samples = [(torch.rand(1, 4, 6, 6),) for _ in range(2)]
    sound = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3), torch.nn.GroupNorm(2, 4))
    coupled = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3), torch.nn.BatchNorm2d(4))
    try:
        dpsgd.check_isolation(sound, _mean, samples)
    except UnitsCoupled:
        return "a network with GroupNorm counts as one in which patients meet"
    try:
        dpsgd.choose(coupled, _mean, samples, dpsgd.Clip(1.0))
    except UnitsCoupled:
        return ""
    return "a network with BatchNorm counts as one in which patients are apart"


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
