"""What has been spent: privacy events as frozen values, and ε as a question asked of them.

An event says what was done to the patients of one site; nothing is ever stored as an ε, because ε values cannot be added up. The answer
comes from dp-accounting's privacy loss distributions (Koskela et al. 2020; Doroshenko et al. 2022), rounded so that it is never
below the truth. The relation is add-or-remove-one patient throughout, and only Poisson sampling, plain or truncated, is
accounted for: for shuffled batches or batches of a fixed size the same figures would be far too small (Chua et al. 2024).

Noise here is a discrete Gaussian on a grid so fine (a standard deviation of 10,000 units and more) that it is accounted for as a
Gaussian; how far a sample of the production sampler can be from it is part of an event and goes into δ.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any, Literal

import dp_accounting
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from privacy.errors import MessageMalformed, PrivacyError, SamplingRefused
from privacy.sharing import threshold

COARSE, FINE = (
    1e-3,
    1e-4,
)  # width of the steps of ε that losses are rounded up to: for every order, and for what is printed
NOISE_MIN, NOISE_MAX = 0.05, 10_000.0
STEPS_MAX = 10**8
RELATION = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE

Tier = Literal["everybody", "coordinator", "lying-coordinator"]


@dataclass(frozen=True)
class PrivacyEvent:
    """`steps` times: patients drawn by Poisson sampling, gradients clipped, Gaussian noise of noise_multiplier * clip norm added.

    batch_max and patients: with both, at most `batch_max` of `patients` are in a step (truncated Poisson sampling, Ganesh et al.
    2025). delta_extra: total variation between the noise drawn and the noise accounted for, over all draws of the event.
    Raises PrivacyError for values out of range and SamplingRefused for any other sampling.
    """

    noise_multiplier: float
    sampling_rate: float
    steps: int
    batch_max: int | None = None
    patients: int | None = None
    sampling: str = "poisson"
    unit: str = "patient"
    relation: str = "add-or-remove-one"
    delta_extra: float = 0.0

    def __post_init__(self) -> None:
        if self.sampling != "poisson":
            raise SamplingRefused(f"batches drawn by {self.sampling!r}: there is no accounting for them here")
        if self.unit != "patient" or self.relation != "add-or-remove-one":
            raise PrivacyError(f"unit {self.unit!r} and relation {self.relation!r}: only patients, one more or less")
        for name, low, high in (
            ("noise_multiplier", NOISE_MIN, NOISE_MAX),
            ("sampling_rate", 0.0, 1.0),
            ("delta_extra", -1.0, 1.0),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise PrivacyError(f"an event with {name} = {value}, not in {low}..{high}")
        if self.sampling_rate == 0 or self.delta_extra < 0:
            raise PrivacyError("an event that draws nobody, or with a negative error")
        if type(self.steps) is not int or not 1 <= self.steps <= STEPS_MAX:
            raise PrivacyError(f"an event of {self.steps} steps, not 1..{STEPS_MAX}")
        cap = (self.batch_max, self.patients)
        if cap != (None, None) and not all(type(n) is int and n >= 1 for n in cap):
            raise PrivacyError("an event with a cap needs the number of patients, and both positive")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, facts: object) -> "PrivacyEvent":
        """The event that `to_json` wrote; raises MessageMalformed for anything else."""
        if not isinstance(facts, dict) or set(facts) != {field.name for field in fields(cls)}:
            raise MessageMalformed("a privacy event has other fields")
        try:
            return cls(**facts)
        except (PrivacyError, TypeError) as error:
            raise MessageMalformed(f"a privacy event that cannot have happened: {error}") from None

    def _step(self) -> dp_event.DpEvent:
        gaussian = dp_event.GaussianDpEvent(self.noise_multiplier)
        if self.batch_max is not None and self.patients is not None and self.batch_max < self.patients:
            return dp_event.TruncatedSubsampledGaussianDpEvent(
                self.patients, self.sampling_rate, self.batch_max, self.noise_multiplier
            )
        return gaussian if self.sampling_rate == 1 else dp_event.PoissonSampledDpEvent(self.sampling_rate, gaussian)


def epsilon(events: Iterable[PrivacyEvent], delta: float, *, fine: bool = False) -> float:
    """The smallest ε that dp-accounting can prove for all `events` together at `delta`, rounded up; 0 for no events.

    `fine` takes ten times as long and is some thousandths lower. Raises PrivacyError for a δ outside (0, 1), or one that is used up
    by the errors of the events themselves.
    """
    found = _merged(events)
    left = _remaining(found, delta)
    return _epsilon(found, left, FINE if fine else COARSE)


def epsilon_rdp(events: Iterable[PrivacyEvent], delta: float) -> float:
    """The same by Renyi differential privacy (Mironov 2017), about 8 % higher: a check by other mathematics. Caps are ignored."""
    found = _merged(events)
    accountant = RdpAccountant(neighboring_relation=RELATION)
    for event in found:
        whole = PrivacyEvent(event.noise_multiplier, event.sampling_rate, event.steps)
        accountant.compose(whole._step(), event.steps)
    return float(accountant.get_epsilon(_remaining(found, delta)))


def noise_for(target: float, delta: float, *, sampling_rate: float, steps: int) -> float:
    """The least noise multiplier, rounded up to four decimals, with which `steps` steps keep ε at `target` (fine). Under a second.

    Raises PrivacyError if no noise in range does.
    """
    if not 0 < target < math.inf:
        raise PrivacyError(f"an ε of {target}; it has to be a positive number")

    def spent(noise: float, fine: bool) -> float:
        return epsilon([PrivacyEvent(noise, sampling_rate, steps)], delta, fine=fine)

    low, high = NOISE_MIN, 1.0
    while spent(high, False) > target:
        low, high = high, 2 * high
        if high > NOISE_MAX:
            raise PrivacyError(f"no noise keeps ε at {target} over {steps} steps at the rate {sampling_rate}")
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle, False) > target else (low, middle)
    # The coarse answer is a little too high: what it found is safe, and a few steps down the fine one decides.
    units = math.ceil(high * 1e4)
    step = max(1, units // 2000)
    while units - step > NOISE_MIN * 1e4 and spent((units - step) / 1e4, True) <= target:
        units -= step
    while spent(units / 1e4, True) > target:
        units += 1
    return units / 1e4


def selection_epsilon(event: PrivacyEvent, delta: float, mean_tries: float) -> float:
    """ε of trying settings on private data and showing only the best try, each try being `event` (Papernot and Steinke 2022).

    The number of tries has to be drawn from a geometric distribution with this mean, by secret randomness, and nobody may see
    anything of the other tries; by Renyi differential privacy.
    """
    if not mean_tries > 1:
        raise PrivacyError("a selection has more than one try on average")
    accountant = RdpAccountant(neighboring_relation=RELATION)
    composed = dp_event.SelfComposedDpEvent(event._step(), event.steps)
    accountant.compose(dp_event.RepeatAndSelectDpEvent(composed, mean=mean_tries, shape=1.0))
    return float(accountant.get_epsilon(delta))


@dataclass(frozen=True)
class Statement:
    """One ε with everything that it means nothing without."""

    tier: Tier
    epsilon: float
    delta: float
    sampling: str
    adversary: str
    unit: str = "patient"
    relation: str = "add or remove one patient"

    def sentence(self) -> str:
        """In words; ε is rounded up to two decimals."""
        shown = math.ceil(round(self.epsilon * 100, 6)) / 100
        value = f"ε ≤ {shown:.2f}" if math.isfinite(self.epsilon) else "no ε"
        return f"{value} at δ = {self.delta:g} per {self.unit} ({self.relation}), {self.sampling}, against {self.adversary}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"epsilon": self.epsilon if math.isfinite(self.epsilon) else None}


@dataclass(frozen=True)
class Sites:
    """Who shares a distributed sum: training sites, the least number in a sum, and how many are assumed to collude."""

    count: int
    quorum: int
    colluding: int


def statements(event: PrivacyEvent, delta: float, sites: Sites | None = None) -> list[Statement]:
    """What can be said of one site's patients after `event`: one statement for local noise, three for distributed noise (`sites`).

    In a distributed sum a patient is protected from the coordinator by the noise of every honest site in it, the patient's own
    included, because none of them is the adversary; the noise of colluding sites is known to it.
    """
    how = f"Poisson sampling at the rate {event.sampling_rate:g}, {event.steps} steps"
    everybody = "everybody else combined: the coordinator, all other sites, and readers of the model"
    found = [Statement("everybody", epsilon([event], delta, fine=True), delta, how, everybody)]
    if sites is None:
        return found
    with_them = f" and {sites.colluding} of the {sites.count} sites" if sites.colluding else ""
    tiers: list[tuple[Tier, int, str]] = [
        (
            "coordinator",
            sites.quorum - sites.colluding,
            f"the coordinator{with_them}, as long as it follows the protocol",
        ),
        ("lying-coordinator", honest_min(sites), f"the coordinator{with_them}, even if it lies about who dropped out"),
    ]
    for tier, honest, adversary in tiers:
        summed = PrivacyEvent(event.noise_multiplier * math.sqrt(max(1, honest)), event.sampling_rate, event.steps)
        found.append(Statement(tier, epsilon([summed], delta, fine=True), delta, how, adversary))
    return found


def honest_min(sites: Sites) -> int:
    """The fewest honest sites in a sum that a lying coordinator can open (docs/secure-aggregation.md), over all member lists.

    n members, t shares open a secret, m survivors are asked for: (n - c)(n - m) / (t - c) honest ones can be left out.
    """
    c, least = sites.colluding, sites.count
    for n in range(sites.quorum, sites.count + 1):
        t = threshold(n)
        if c >= t:
            return 1
        left_out = (n - c) * (n - max(t, sites.quorum)) // (t - c)
        least = min(least, n - c - max(0, left_out))
    return max(1, least)


def _merged(events: Iterable[PrivacyEvent]) -> tuple[PrivacyEvent, ...]:
    """Equal mechanisms as one event of all their steps, in an order of its own: composition does not depend on it."""
    steps: dict[tuple[Any, ...], int] = {}
    extra = 0.0
    for event in events:
        key = (event.noise_multiplier, event.sampling_rate, event.batch_max or 0, event.patients or 0)
        steps[key] = steps.get(key, 0) + event.steps
        extra += event.delta_extra
    found = [
        PrivacyEvent(noise, rate, count, cap or None, patients or None)
        for (noise, rate, cap, patients), count in sorted(steps.items())
    ]
    if found and extra:
        found[0] = PrivacyEvent(**asdict(found[0]) | {"delta_extra": min(1.0, extra)})
    return tuple(found)


def _remaining(events: Iterable[PrivacyEvent], delta: float) -> float:
    left = delta - sum(event.delta_extra for event in events)
    if not 0 < delta < 1 or left <= 0:
        raise PrivacyError(f"nothing is left of a δ of {delta}")
    return left


@lru_cache(maxsize=512)
def _epsilon(events: tuple[PrivacyEvent, ...], delta: float, interval: float) -> float:
    accountant = PLDAccountant(neighboring_relation=RELATION, value_discretization_interval=interval)
    for event in events:
        accountant.compose(event._step(), event.steps)
    return float(accountant.get_epsilon(delta)) if events else 0.0
