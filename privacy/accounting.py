"""What has been spent: privacy events as frozen values, and ε as a question asked of them, never answered below the truth.

An event says what was done to the patients of one site; nothing is ever stored as an ε, because ε values cannot be added up.
The answer comes from dp-accounting's privacy loss distributions (Koskela et al. 2020; Doroshenko et al. 2022), which are
rounded upwards, with FLOAT_ERROR for the floating-point numbers of their Fourier transforms. The relation is add-or-remove-one
patient throughout, and only Poisson sampling, plain or truncated, is accounted for: for shuffled batches or batches of a fixed
size the same figures would be far too small (Chua et al. 2024).

Why a discrete Gaussian is accounted for as a Gaussian. A site publishes v + D: v is a vector of whole numbers that a patient
changes by at most 2**GRID_BITS (L2), D is discrete Gaussian with σ = noise_multiplier * 2**GRID_BITS. Take v + G instead, G a
continuous Gaussian of variance σ² - s², and round each coordinate y of it at random, to the whole number x with probability
proportional to exp(-(x - y)² / (2 s²)). Completing the square, the result is distributed as v + D but for the normalising sum,
which by Poisson summation is the same for all y up to 4 exp(-2π² s²) relative: below 10**-76 for s = 3 (Peikert 2010 samples so).
Hence v + D is what a Gaussian mechanism says, rounded, and rounding gives nothing away: a bound in any number of dimensions,
steps and sites, not an approximation. Events are accounted for with that slightly smaller noise, sqrt(z² - (3 / 2**GRID_BITS)²)
for a multiplier z, which is 7 parts in 10**11 less at z = 1. How far the samples of the production sampler can be from D is part
of an event (`delta_extra`).
"""

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from privacy.errors import MessageMalformed, PrivacyError, SamplingRefused
from privacy.noise import GRID_BITS
from privacy.sharing import FULL_GRAPH_SITES, HOLDERS_MAX, degree, threshold

# The library takes a second and 40 MB to load: functions that compute an ε do so, and whoever only names an event does not.
if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent
    from dp_accounting.rdp import RdpAccountant

COARSE, FINE = 1e-3, 1e-4
"""Width of the grid of privacy losses: for every order, and for what is printed."""
NOISE_MIN, NOISE_MAX = 0.05, 10_000.0
STEPS_MAX = 10**8
COMPOSED_MAX = 2**20  # steps of one mechanism for which there is a finite ε: ten times as many take minutes to compose
PATIENTS_MAX = 10**9
ROUNDING = 3 / 2**GRID_BITS  # s of the argument above, in units of the clip norm
FLOAT_ERROR = 2.0**-50
"""Taken off δ for each step. Measured against the closed form for a Gaussian: 2**-53 a step, for 100 steps to a million."""
SHARES = (1e-6, 1e-4, 1e-3, 0.01, 0.1, 0.25, 0.5, 0.9)
"""Parts of δ that are set aside for errors, the least one that covers them: 1e-6 of δ changes ε by less than 1e-6."""
LOSSES_NORMAL, LOSSES_MAX = 100.0, 3200.0
"""Privacy losses that range over no more than the first are computed on the grid asked for, those of up to twice the range on one
of twice the width, and so on: no event takes more than seconds. Beyond the second, ε is infinite: it would bound nothing."""
ROOM = 1e-4
"""Part of a target that `noise_for` leaves. What only a site knows, the cut of its batches at eight standard deviations and the
error of its sampler, takes 2e-7 of the target (measured for targets of 0.5 to 10, 20 to 3000 steps, 50 to 5000 patients)."""
NOISE_STEP = 1e-4  # relative, to which a noise is found: more would not show in two decimals of ε

Tier = Literal["everybody", "coordinator", "lying-coordinator", "test-figures"]


@dataclass(frozen=True)
class PrivacyEvent:
    """`steps` times: patients drawn by Poisson sampling, gradients clipped, Gaussian noise of noise_multiplier * clip norm added.

    batch_max and patients: with both, at most `batch_max` of `patients` are in a step (truncated Poisson sampling, Ganesh et al.
    2025); a cap that is not below the number of patients is none, so it must not stay where it is when a patient comes.
    delta_extra: total variation between the noise drawn and the noise accounted for, over all draws of the event.
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
            ("delta_extra", 0.0, 1.0),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise PrivacyError(f"an event with {name} = {value!r}, not in {low}..{high}")
        if self.sampling_rate == 0:
            raise PrivacyError("an event that draws nobody")
        if type(self.steps) is not int or not 1 <= self.steps <= STEPS_MAX:
            raise PrivacyError(f"an event of {self.steps!r} steps, not 1..{STEPS_MAX}")
        cap = (self.batch_max, self.patients)
        if cap != (None, None) and not all(type(n) is int and 1 <= n <= PATIENTS_MAX for n in cap):
            raise PrivacyError(f"an event with a cap needs the number of patients, and both in 1..{PATIENTS_MAX}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, facts: object) -> "PrivacyEvent":
        """The event that `to_json` wrote; raises MessageMalformed for anything else."""
        if not isinstance(facts, dict) or set(facts) != {field.name for field in fields(cls)}:
            raise MessageMalformed("a privacy event has other fields")
        try:
            return cls(**facts)
        except (PrivacyError, ValueError) as error:  # Python writes no whole number of more than 4300 digits
            raise MessageMalformed(f"a privacy event that cannot have happened: {error}") from None

    @property
    def capped(self) -> bool:
        return self.batch_max is not None and self.patients is not None and self.batch_max < self.patients


def epsilon(events: Iterable[PrivacyEvent], delta: float, *, fine: bool = False) -> float:
    """The smallest ε that dp-accounting can prove for all `events` together at `delta`, rounded up; 0 for no events.

    `fine` takes up to ten times as long, and is some thousandths lower; a per cent lower for thousands of steps that together
    spend less than 1. Infinite where noise is so small that losses go into the hundreds, and beyond COMPOSED_MAX steps. Raises
    PrivacyError for a δ outside (0, 1), or one that the errors of the events use up.
    """
    return _epsilon(*_merged(events), _probability(delta), FINE if fine else COARSE)


def epsilon_rdp(events: Iterable[PrivacyEvent], delta: float) -> float:
    """The same by Renyi differential privacy (Mironov 2017), about 10 % higher: a check by other mathematics.

    A cap on batches counts as an error: that a step draws more. Raises PrivacyError as `epsilon` does, so for tight caps as well.
    """
    found, accountant = [_uncapped(event) for event in events], _renyi()
    for event in found:
        accountant.compose(_step(event), event.steps)
    error = math.fsum(event.delta_extra for event in found)
    return _with_errors(lambda left: float(accountant.get_epsilon(left)) if found else 0.0, _probability(delta), error)


def noise_for(target: float, delta: float, *, sampling_rate: float, steps: int) -> float:
    """The least noise multiplier with which `steps` steps keep the coarse ε below `target`, with ROOM; under a second.

    To NOISE_STEP, and rounded up to four decimals. A site that does these steps with batches cut at eight standard deviations
    therefore finds, with all that it alone knows, no ε above `target`. Raises PrivacyError if no noise in range does.
    """
    if not 0 < target < math.inf:
        raise PrivacyError(f"an ε of {target}; it has to be a positive number")
    event, aim = PrivacyEvent(NOISE_MAX, sampling_rate, steps), target * (1 - ROOM)
    least, most = math.log(NOISE_MIN), math.log(NOISE_MAX)

    def excess(x: float) -> float:
        """Above 0 if a noise of exp(x) is too little; nearly a straight line."""
        spent = epsilon([replace(event, noise_multiplier=min(max(math.exp(x), NOISE_MIN), NOISE_MAX))], delta)
        return math.log(min(max(spent, 1e-12), 1e12) / aim)

    low, high, slope = -math.inf, math.inf, -1.3
    x = min(max(math.log(_limit_noise(aim, _probability(delta), event)), least), most)
    before: tuple[float, float] | None = None
    while high - low > NOISE_STEP:
        found = excess(x)
        low, high = (x, high) if found > 0 else (low, x)
        if low == most:
            raise PrivacyError(f"no noise keeps ε at {target} over {steps} steps at the rate {sampling_rate}")
        if high == least:
            break
        if before is not None:
            slope = min((found - before[1]) / (x - before[0]), -0.1)
        before = x, found
        # The root of the secant, and a little beyond it: so the root soon lies between two tries close together.
        x += min(max(-found / slope, -1.0), 1.0) + math.copysign(0.3 * NOISE_STEP, found)
        if not low < x < high:
            x = (low + high) / 2
        x = min(max(x, least), most)
    return min(math.ceil(math.exp(high) * 1e4) / 1e4, NOISE_MAX)


def selection_epsilon(event: PrivacyEvent, delta: float, mean_tries: float) -> float:
    """ε of trying settings on private data and showing only the best try, each try being `event` (Papernot and Steinke 2022).

    The number of tries has to be drawn from a geometric distribution with this mean, by secret randomness, and nobody may see
    anything of the other tries; by Renyi differential privacy. Raises PrivacyError for no more than one try on average, and as
    `epsilon_rdp` does.
    """
    if isinstance(mean_tries, bool) or not 1 < mean_tries < math.inf:
        raise PrivacyError(f"a selection among {mean_tries} tries on average; there have to be more than one")
    from dp_accounting import dp_event

    whole, accountant = _uncapped(event), _renyi()
    composed = dp_event.SelfComposedDpEvent(_step(whole), whole.steps)
    accountant.compose(dp_event.RepeatAndSelectDpEvent(composed, mean=mean_tries, shape=1.0))
    # What is shown has been disturbed with the probability that any try was: at most the sum over tries, on average.
    error = whole.delta_extra * mean_tries
    return _with_errors(lambda left: float(accountant.get_epsilon(left)), _probability(delta), error)


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
        value = f"ε ≤ {math.ceil(self.epsilon * 100) / 100:.2f}" if math.isfinite(self.epsilon) else "no finite ε"
        return f"{value} at δ = {self.delta:g} per {self.unit} ({self.relation}), {self.sampling}, against {self.adversary}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"epsilon": self.epsilon if math.isfinite(self.epsilon) else None}


@dataclass(frozen=True)
class Sites:
    """Who shares a distributed sum: training sites, the least number in a sum, and how many are assumed to collude.

    Raises PrivacyError unless 1 <= quorum <= count <= 1000 and colluding >= 0.
    """

    count: int
    quorum: int
    colluding: int

    def __post_init__(self) -> None:
        if not 1 <= self.quorum <= self.count <= HOLDERS_MAX or self.colluding < 0:
            raise PrivacyError(
                f"{self.count} sites of which a sum has {self.quorum} or more and {self.colluding} collude"
            )


def statements(event: PrivacyEvent, delta: float, sites: Sites | None = None, *, fine: bool = True) -> list[Statement]:
    """What can be said of one site's patients after `event`: one statement, or three if its noise is distributed over `sites`.

    In a distributed sum a patient is protected from the coordinator by the noise of every honest site in it, the patient's own
    included, because none of them is the adversary; the noise of colluding sites is known to it. This holds for one step in
    each sum: `event` has to consist of such steps, which models.study sees to.
    """
    cut = f" with at most {event.batch_max} of {event.patients} patients" if event.capped else ""
    how = f"Poisson sampling at the rate {event.sampling_rate:g}{cut}, {event.steps} steps"
    everybody = "everybody else combined: the coordinator, all other sites, and readers of the model"
    found = [Statement("everybody", epsilon([event], delta, fine=fine), delta, how, everybody)]
    if sites is None:
        return found
    with_them = f" and {sites.colluding} of the {sites.count} sites" if sites.colluding else ""
    tiers: list[tuple[Tier, int, str]] = [
        ("coordinator", honest_following(sites), f"the coordinator{with_them}, as long as it follows the protocol"),
        ("lying-coordinator", honest_min(sites), f"the coordinator{with_them}, even if it lies about who dropped out"),
    ]
    for tier, honest, adversary in tiers:
        summed = replace(
            event,
            noise_multiplier=min(NOISE_MAX, event.noise_multiplier * math.sqrt(honest)),
            delta_extra=min(1.0, event.delta_extra * honest),
        )
        found.append(Statement(tier, epsilon([summed], delta, fine=fine), delta, how, adversary))
    return found


def figures_statement(event: PrivacyEvent, delta: float) -> Statement:
    """What can be said of a patient of a test split, who was not trained on, after the noised release of its figures."""
    adversary = "everybody who sees the test figures; of a patient of the test split"
    return Statement("test-figures", epsilon([event], delta, fine=True), delta, "no sampling, one release", adversary)


def honest_following(sites: Sites) -> int:
    """The fewest honest sites in any sum that is opened while the coordinator follows the protocol; 1 where nothing is promised.

    No site helps to open a sum of fewer sites than the quorum (docs/secure-aggregation.md), and all colluding ones may be in it.
    """
    members = range(sites.quorum, sites.count + 1)
    return max(1, sites.quorum - sites.colluding) if all(_bears(n, sites.colluding) for n in members) else 1


def honest_min(sites: Sites) -> int:
    """The fewest honest sites in a sum that a lying coordinator can open (docs/secure-aggregation.md), over all member lists.

    n members share each secret among h holders, t of whom open it, and a list has m survivors or more. Leaving an honest site
    out takes t - c honest ones that were told it dropped out; each of the n - c can be told that of h - t holders and of n - m
    members at most. With h + c >= 2t, half of them are told that it dropped out and half that it did not, both its secrets are
    known, and it stands alone. Beyond FULL_GRAPH_SITES, where not everybody masks with everybody, the rest does not come apart
    either as long as a tenth collude at most (`sharing.degree`).
    """
    c, least = sites.colluding, honest_following(sites)
    if least == 1:
        return 1
    for n in range(sites.quorum, sites.count + 1):
        holders, m = degree(n) + 1, max(threshold(n), sites.quorum)
        t = threshold(holders)
        if m < n and holders + c >= 2 * t:
            return 1
        left_out = max(n - m, (n - c) * min(holders - t, n - m) // (t - c))
        least = min(least, n - c - left_out)
    return max(1, least)


def _bears(members: int, colluding: int) -> bool:
    """Whether a sum of `members` protects at all: too few collude to rebuild a secret, and few enough for `sharing.degree`."""
    return colluding < threshold(degree(members) + 1) and (members <= FULL_GRAPH_SITES or colluding <= members // 10)


def _merged(events: Iterable[PrivacyEvent]) -> tuple[tuple[PrivacyEvent, ...], float]:
    """Equal mechanisms as one event of all their steps, in an order of its own, and the errors of all: order does not matter."""
    steps: dict[tuple[float, float, int, int], int] = {}
    errors = []
    for event in events:
        cap = (event.batch_max or 0, event.patients or 0) if event.capped else (0, 0)
        key = (float(event.noise_multiplier), float(event.sampling_rate), *cap)
        steps[key] = steps.get(key, 0) + event.steps
        errors.append(event.delta_extra)
    found = tuple(
        PrivacyEvent(noise, rate, count, cap or None, patients or None)
        for (noise, rate, cap, patients), count in sorted(steps.items())
    )
    return found, math.fsum(errors)


@lru_cache(maxsize=512)
def _epsilon(events: tuple[PrivacyEvent, ...], error: float, delta: float, interval: float) -> float:
    width = _width(events, interval)
    if width is None:
        return _with_errors(lambda _: math.inf, delta, error)
    losses = [_losses(event, width) for event in events]
    together: Any = losses[0] if losses else None
    for more in losses[1:]:
        together = together.compose(more)
    numeric = FLOAT_ERROR * sum(event.steps for event in events)

    def answer(left: float) -> float:
        if left <= numeric:
            return math.inf
        return 0.0 if together is None else float(together.get_epsilon_for_delta(left - numeric))

    return _with_errors(answer, delta, error)


def _probability(delta: float) -> float:
    if not 0 < delta < 1:
        raise PrivacyError(f"a δ of {delta}; it lies between 0 and 1")
    return delta


def _with_errors(answer: Callable[[float], float], delta: float, error: float) -> float:
    """ε at `delta` of mechanisms within a total variation of `error` from those whose ε at a δ `answer` gives.

    An (ε, δ') mechanism disturbed by that much is (ε, δ' + (1 + exp(ε)) * error): once for the data with the patient, and exp(ε)
    times for those without. So ε decides how much of δ is left for itself; SHARES are tried until one is enough.
    """
    if error == 0:
        return answer(delta)
    for share in SHARES:
        found = answer(delta * (1 - share))
        if found == math.inf or (found < 700 and error * (1 + math.exp(found)) <= share * delta):
            return found
    raise PrivacyError(f"nothing is left of a δ of {delta:g} with an error of {error:.2g} in the draws")


def _width(events: tuple[PrivacyEvent, ...], interval: float) -> float | None:
    """Width of the grid of privacy losses for `events`; None if they, or their steps, are too many for any.

    Their range, roughly: the Renyi divergence of order 2, log(1 + q² (exp(1/σ²) - 1)) a step, its spread, and the largest loss of
    one step. It only grows with steps and events and falls with noise, and a coarser grid only makes ε larger: so does ε.
    """
    total = largest = 0.0
    for event in events:
        inverse = event.noise_multiplier**-2
        total += event.steps * math.log1p(event.sampling_rate**2 * math.expm1(inverse))
        inverse *= 4 if event.capped else 1  # of a cut draw, one patient can replace another
        largest = max(largest, inverse / 2 + 10 * math.sqrt(inverse))
    size = total + 10 * math.sqrt(total) + largest
    if size > LOSSES_MAX or any(event.steps > COMPOSED_MAX for event in events):
        return None
    return interval * 2.0 ** max(0, math.ceil(math.log2(max(size, 1.0) / LOSSES_NORMAL)))


def _losses(event: PrivacyEvent, width: float) -> Any:
    """The privacy loss distribution of all steps of `event`. Coarse ones are kept, about a megabyte each: orders repeat them."""
    from dp_accounting.pld import privacy_loss_distribution as pld

    if event.sampling_rate == 1 and not event.capped:
        noise = _accounted(event.noise_multiplier) / math.sqrt(event.steps)
        return pld.from_gaussian_mechanism(noise, value_discretization_interval=width)
    return (_composed if width >= COARSE else _composed.__wrapped__)(event, width)


@lru_cache(maxsize=64)
def _composed(event: PrivacyEvent, width: float) -> Any:
    one = _one_step if width >= COARSE else _one_step.__wrapped__
    return one(replace(event, steps=1), width).self_compose(event.steps)


@lru_cache(maxsize=64)
def _one_step(event: PrivacyEvent, width: float) -> Any:
    from dp_accounting.pld import privacy_loss_distribution as pld

    noise = _accounted(event.noise_multiplier)
    if event.batch_max is None or event.patients is None:
        return pld.from_gaussian_mechanism(
            noise, value_discretization_interval=width, sampling_prob=event.sampling_rate
        )
    # One more patient than there are: the larger of two neighbouring sets counts, and a site has the smaller one as well.
    return pld.from_truncated_subsampled_gaussian_mechanism(
        event.patients + 1, event.sampling_rate, event.batch_max, noise, value_discretization_interval=width
    )


def _accounted(noise: float) -> float:
    """The noise of a Gaussian mechanism that becomes this one by rounding (see above)."""
    return math.sqrt(noise**2 - ROUNDING**2)


def _step(event: PrivacyEvent) -> "DpEvent":
    from dp_accounting import dp_event

    gaussian = dp_event.GaussianDpEvent(_accounted(event.noise_multiplier))
    return gaussian if event.sampling_rate == 1 else dp_event.PoissonSampledDpEvent(event.sampling_rate, gaussian)


def _uncapped(event: PrivacyEvent) -> PrivacyEvent:
    """`event` without its cap; the probability that a step would have met it goes into the error."""
    error = event.delta_extra
    if event.capped:
        error += event.steps * overflow((event.patients or 0) + 1, event.sampling_rate, event.batch_max or 0)
    return replace(event, batch_max=None, patients=None, delta_extra=min(1.0, error))


def overflow(patients: int, rate: float, batch_max: int) -> float:
    """No less than the probability that Poisson sampling draws more than `batch_max` of `patients` (Chernoff's bound)."""
    if batch_max >= patients:
        return 0.0
    part = (batch_max + 1) / patients
    if part <= rate:
        return 1.0
    rest = (1 - part) * math.log((1 - part) / (1 - rate)) if part < 1 else 0.0
    return math.exp(-patients * (part * math.log(part / rate) + rest))


def _limit_noise(target: float, delta: float, event: PrivacyEvent) -> float:
    """The noise that the central limit for privacy losses asks for (Bu et al. 2020), a little too small."""
    target, low, high = min(target, 500.0), 1e-6, 1e3

    def below(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    while high > low * (1 + 1e-6):
        mu = math.sqrt(low * high)
        spent = below(mu / 2 - target / mu) - math.exp(target) * below(-mu / 2 - target / mu)
        low, high = (low, mu) if spent > delta else (mu, high)
    return 1 / math.sqrt(math.log1p((low / event.sampling_rate) ** 2 / event.steps))


def _renyi() -> "RdpAccountant":
    from dp_accounting import NeighboringRelation
    from dp_accounting.rdp import RdpAccountant

    logging.getLogger("absl").addFilter(_matters)
    return RdpAccountant(neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)


def _matters(record: logging.LogRecord) -> bool:
    """dp-accounting leaves out fractional orders that do not converge; ε is never smaller for that, and nobody need be told."""
    return "failed to converge" not in str(record.msg)
