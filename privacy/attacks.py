"""The adversary's side: an audit by canaries in one run, membership inference, and pictures out of gradients.

Three attacks, each with a figure and its interval, on whatever network and patients they are given:

1. `canary_audit` runs the production mechanism (draw, clip, sum, noise) with made-up patients among the real ones, and asks
   how well they can be told from those that were left out. It gives a lower bound on ε (Steinke, Nasr and Jagielski 2023), which
   holds whatever the mechanism is and cannot exceed about the logarithm of the number of canaries; and a Gaussian estimate
   with its interval (Dong, Roth and Su 2022), which assumes a shape and is the one that notices a halved noise.
2. `membership_inference` tells members from others by their loss (Yeom et al. 2018), as the released model permits.
3. `invert` looks for the image whose gradient is the one that was observed (Zhu et al. 2019; Geiping et al. 2020).

An attack that finds nothing proves nothing: stronger ones exist. One that finds more than was claimed is a proof of a fault.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from privacy import accounting, dpsgd, noise
from privacy.dpsgd import Batch, Losses
from privacy.errors import PrivacyError

CANARIES, CANARIES_MIN = 1000, 100
"""With 1000, for an ε of 3 to 8, noise that is too small by a factor of 1.3 is noticed; with 100, by a factor of 2."""
MAGNITUDE = 1e3  # clip norms that a canary's gradient has before it is clipped: a skipped clip shows
CONFIDENCE = 0.95
FRACTIONS = (1.0, 0.5, 0.2, 0.05)
"""Shares of the canaries that are guessed, the others being abstained from. Fixed before anything is seen; each of them is tested
at a quarter of the permitted error, so that the best of them may be shown (Bonferroni)."""
EPSILON_MAX = 60.0  # of a lower bound: beyond it lie more canaries than anybody trains with
REPEATS = 2000  # of the bootstrap: an end of an interval is right to 2 % of its width
THIN = 5.0  # standard deviations below which a layer's noise is too small: one false alarm in three million layers
FALSE_POSITIVES = 0.001  # the rate at which the literature compares attacks on membership (Carlini et al. 2022)
OTHERS_MIN = 1000  # patients who were not in training, below which a rate of one in a thousand cannot be observed
Z_95 = 1.959964
Z_ALARM = (
    3.719016  # one-sided: a sound mechanism is accused once in ten thousand audits, and half the noise still at once
)
Z_90_POWER = 1.281552  # of the normal distribution, one-sided: what is noticed is noticed nine times out of ten

Float64 = NDArray[np.float64]
Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]


# Canaries -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mechanism:
    """What is claimed and audited: `steps` times a Poisson draw, a clip, a sum, and noise. `batch_max`: cap of a draw."""

    clip: dpsgd.Clip
    noise_multiplier: float
    sampling_rate: float
    steps: int
    delta: float
    batch_max: int | None = None


@dataclass(frozen=True)
class Training:
    """The training that canaries are put into: `unit(n)` is patient n of `patients`, a Batch with B = 1.

    `descend` gets each step's noisy sum float32 (P,) in clip norms, and takes the step. Batches have two tensors or more.
    """

    net: nn.Module
    losses: Losses
    patients: int
    unit: Callable[[int], Batch]
    descend: Callable[[Float32], None] = lambda noisy: None


@dataclass(frozen=True)
class Estimate:
    """μ of Gaussian differential privacy as the scores show it, and the ε that it means, with the ends of its 95 % interval."""

    mu: float
    epsilon: float
    low: float
    high: float
    error: float  # standard error of mu
    alarm: float  # an ε that a true one is below but once in ten thousand times: above the claim, it is no chance


@dataclass(frozen=True)
class Bound:
    """With 95 % confidence ε is at least `epsilon`: `correct` of `guesses` were right. `ceiling`: the most it could have been."""

    epsilon: float
    guesses: int
    correct: int
    ceiling: float


@dataclass(frozen=True, eq=False)
class CanaryAudit:
    """What one audited run shows. `claim`: ε of exactly this run, at its δ, per patient, one patient more or less.

    inside, outside: scores of canaries that were in and that were left out. noise: standard deviation of what was added to all
    values, over what is claimed. thin: layers whose own noise is smaller than chance explains. smallest: noise that is smaller by
    this factor is noticed nine times out of ten.
    """

    event: accounting.PrivacyEvent
    delta: float
    claim: float
    inside: Float64
    outside: Float64
    bound: Bound
    estimate: Estimate
    noise: float
    thin: tuple[str, ...]
    smallest: float

    @property
    def faults(self) -> list[str]:
        """One sentence for each finding that contradicts the claim; none says that the claim is true.

        What counts is `estimate.alarm`: where every patient is in each step, the estimate of a sound mechanism lies above the
        claim half of the time, and the lower end of its interval once in forty.
        """
        found = []
        if self.bound.epsilon > self.claim:
            found.append(f"the lower bound of {self.bound.epsilon:.2f} exceeds the claim of {self.claim:.2f}")
        if self.estimate.alarm > self.claim:
            found.append(
                f"the Gaussian estimate of {self.estimate.epsilon:.2f} (by chance from {self.estimate.alarm:.2f} on) exceeds the "
                f"claim of {self.claim:.2f}"
            )
        if self.thin:
            found.append(f"less noise than claimed in {', '.join(self.thin)}")
        return found


def canary_audit(
    training: Training, mechanism: Mechanism, canaries: int = CANARIES, stream: noise.Keystream | None = None
) -> CanaryAudit:
    """Audit one run of the production mechanism with `canaries` among the patients, each in or out by a fair secret coin.

    A canary's gradient is MAGNITUDE clip norms long and points along a coordinate that no other patient's gradient touches:
    a parameter that is added to the network for it. So the audited vector is the network's with as many values more, and what
    canaries cost the model is a longer queue only. All of it goes through `noise.poisson_sample`, `dpsgd.LoopEngine` and
    `dpsgd.private_gradient`. That no layer of the network itself is left without noise is seen from what was added to it.

    Score of a canary: the logarithm of the likelihood ratio of the subsampled Gaussian mechanism, summed over steps, which is the
    best test that there is. Raises PrivacyError for fewer than CANARIES_MIN canaries, or a mechanism out of range.
    """
    if canaries < CANARIES_MIN:
        raise PrivacyError(f"{canaries} canaries; with fewer than {CANARIES_MIN} an audit says nothing")
    stream = noise.Keystream() if stream is None else stream
    chosen = (stream.words(canaries) & np.uint64(1)).astype(bool)
    included = np.flatnonzero(chosen)
    host, clip, grid = _Host(training.net, canaries), mechanism.clip, 2.0**mechanism.clip.bits
    engine = dpsgd.LoopEngine(host, _with_canaries(training.losses, MAGNITUDE * clip.norm))
    layers = [(name, p.numel()) for name, p in host.named_parameters() if p.requires_grad]
    starts = np.cumsum([0, *(size for _, size in layers)])[:-1]
    scores, squares = np.zeros(canaries), np.zeros(len(layers))

    def drawn() -> Iterator[Batch]:
        everybody = training.patients + len(included)
        for place in noise.poisson_sample(everybody, mechanism.sampling_rate, stream, mechanism.batch_max):
            here = int(place) - training.patients
            yield training.unit(int(place)) if here < 0 else (torch.tensor([included[here]]),)

    for _ in range(mechanism.steps):
        noisy, seen = dpsgd.private_gradient(engine, drawn(), clip, mechanism.noise_multiplier, stream)
        scores += _log_ratio(noisy[:canaries] / grid, mechanism)
        added = (noisy - seen.total) / (grid * mechanism.noise_multiplier)
        squares += np.add.reduceat(np.square(added), starts)
        training.descend((noisy[canaries:] / grid).astype(np.float32))

    sampler = noise.gaussian(mechanism.noise_multiplier * grid)
    event = accounting.PrivacyEvent(
        mechanism.noise_multiplier,
        mechanism.sampling_rate,
        mechanism.steps,
        mechanism.batch_max,
        None if mechanism.batch_max is None else training.patients + canaries,
        delta_extra=min(1.0, sampler.tv_bound * sum(size for _, size in layers) * mechanism.steps),
    )
    claim = accounting.epsilon([event], mechanism.delta)
    inside, outside = scores[chosen], scores[~chosen]
    estimate = gaussian_estimate(inside, outside, mechanism.delta, stream)
    return CanaryAudit(
        event=event,
        delta=mechanism.delta,
        claim=claim,
        inside=inside,
        outside=outside,
        bound=best_bound(inside, outside, mechanism.delta),
        estimate=estimate,
        noise=math.sqrt(squares.sum() / (mechanism.steps * sum(size for _, size in layers))),
        thin=tuple(_thin(layers, squares, mechanism.steps)),
        smallest=_smallest(estimate, claim, mechanism.delta),
    )


class _Host(nn.Module):
    """The audited network with a parameter for canaries, which comes first among its parameters."""

    def __init__(self, net: nn.Module, canaries: int) -> None:
        super().__init__()
        self.canaries = nn.Parameter(torch.zeros(canaries))
        self.net = net
        self.train(net.training)


def _with_canaries(losses: Losses, magnitude: float) -> Losses:
    """`losses` that also know canaries: a Batch of one tensor int64 (B,), the numbers of canaries."""

    def each(host: nn.Module, batch: Batch) -> Tensor:
        if len(batch) == 1:
            return magnitude * host.get_parameter("canaries")[batch[0]]
        return losses(host.get_submodule("net"), batch)

    return each


def _log_ratio(seen: Float64, mechanism: Mechanism) -> Float64:
    """Log of how much likelier each of `seen`, in clip norms, is with a canary of norm 1 than without."""
    gain: Float64 = (2 * seen - 1) / (2 * mechanism.noise_multiplier**2)
    rate = mechanism.sampling_rate
    return gain if rate == 1 else np.logaddexp(math.log1p(-rate), math.log(rate) + gain)


def _thin(layers: list[tuple[str, int]], squares: Float64, steps: int) -> Iterator[str]:
    """Layers with less noise than chance explains; sums of squares are chi-square, by Fisher's approximation."""
    for (name, size), found in zip(layers, squares.tolist(), strict=True):
        if math.sqrt(2 * found) - math.sqrt(2 * size * steps - 1) < -THIN:
            yield name.removeprefix("net.")


def _smallest(estimate: Estimate, claim: float, delta: float) -> float:
    """By what factor noise has to be too small for an alarm nine times out of ten."""
    if not 0 < estimate.mu < math.inf or not math.isfinite(claim):
        return math.inf
    return max(1.0, (gaussian_mu(claim, delta) + (Z_ALARM + Z_90_POWER) * estimate.error) / estimate.mu)


# From scores to ε -----------------------------------------------------------------------------------------------------


def best_bound(inside: Float64, outside: Float64, delta: float) -> Bound:
    """The best lower bound of all FRACTIONS: the highest scores are guessed to be in, as many of the lowest to be out."""
    scores = np.concatenate([inside, outside])
    truth = np.concatenate([np.ones(len(inside), bool), np.zeros(len(outside), bool)])
    # A guesser cannot tell equal scores apart; sorted against the truth they count for less than any guess at them.
    low, high = truth[np.lexsort((~truth, scores))], truth[np.lexsort((truth, -scores))]
    level, found = (1 - CONFIDENCE) / len(FRACTIONS), []
    for fraction in FRACTIONS:
        half = max(1, int(fraction * len(scores) / 2))
        correct = int(high[:half].sum() + (~low[:half]).sum())
        least, most = (one_run_bound(len(scores), 2 * half, right, delta, level) for right in (correct, 2 * half))
        found.append((least, 2 * half, correct, most))
    best = max(found)
    return Bound(best[0], best[1], best[2], max(most for *_, most in found))


def one_run_bound(canaries: int, guesses: int, correct: int, delta: float, level: float) -> float:
    """ε that is exceeded with confidence 1 - `level` if `correct` of `guesses` about `canaries` coins are right; 0 if none is.

    Steinke, Nasr and Jagielski 2023, the theorem for (ε, δ) with abstention: no (ε, δ) mechanism lets a guesser be right
    `correct` times or more with a probability above `one_run_tail`. Raises PrivacyError unless correct <= guesses <= canaries.
    """
    low, high = 0.0, EPSILON_MAX
    if one_run_tail(canaries, guesses, correct, low, delta) >= level:
        return 0.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        if one_run_tail(canaries, guesses, correct, middle, delta) < level:
            low = middle
        else:
            high = middle
    return low


def one_run_tail(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """The most that the probability of `correct` right guesses or more can be for an (`epsilon`, `delta`) mechanism.

    With δ = 0 each guess is right no more often than randomised response is: a binomial tail. δ adds 2 δ for each canary, times
    the steepest mean rise of that tail below `correct`.
    """
    if not 0 <= correct <= guesses <= canaries or guesses < 1:
        raise PrivacyError(f"{correct} of {guesses} guesses about {canaries} canaries")
    mass = _binomial(guesses, 1 / (1 + math.exp(-epsilon)))
    below = np.cumsum(mass[:correct][::-1])
    rise = float((below / np.arange(1, correct + 1)).max(initial=0.0))
    return min(1.0, float(mass[correct:].sum()) + 2 * canaries * delta * rise)


def gaussian_estimate(inside: Float64, outside: Float64, delta: float, stream: noise.Keystream) -> Estimate:
    """μ is the distance of the mean scores in standard deviations of the scores of what was left out; interval by bootstrap.

    Scores of a μ-Gaussian mechanism are normal with variance μ², around μ²/2 and -μ²/2. What was left out gives the yardstick,
    because a fault spreads the scores of what was in: a skipped clip would hide in its own spread. Means, and not medians: a
    fault that meets a few canaries only has to be seen. Raises PrivacyError for fewer than two scores of either.
    """
    if min(len(inside), len(outside)) < 2:
        raise PrivacyError("an estimate needs two canaries that are in and two that are out")
    mu = float(_distance(inside[None], outside[None])[0])
    again = _distance(_resampled(inside, stream), _resampled(outside, stream))
    low, high = np.quantile(again, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], method="nearest")
    error = float(again.std()) if np.isfinite(again).all() else math.inf
    alarm = max(0.0, mu - Z_ALARM * error) if math.isfinite(error) else low
    epsilon, least, most, alarm = (gaussian_epsilon(float(value), delta) for value in (mu, low, high, alarm))
    return Estimate(mu, epsilon, least, most, error, alarm)


def _distance(inside: Float64, outside: Float64) -> Float64:
    """(R,) of scores (R, n) each; never below 0, and infinite where what was left out does not vary."""
    spread, gap = outside.std(axis=1, ddof=1), inside.mean(axis=1) - outside.mean(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(gap > 0, gap / spread, 0.0)


def _resampled(values: Float64, stream: noise.Keystream) -> Float64:
    """(REPEATS, n): as many draws with replacement. A remainder of 64 bits favours no place by more than 2**-50."""
    places = stream.words(REPEATS * len(values)) % np.uint64(len(values))
    return values[places.astype(np.int64)].reshape(REPEATS, len(values))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """ε at `delta` of a μ-Gaussian differentially private mechanism (Dong, Roth and Su 2022, corollary 1)."""
    if not 0 < delta < 1 or mu < 0:
        raise PrivacyError(f"μ = {mu} at a δ of {delta}")
    if _gaussian_delta(0.0, mu) <= delta:
        return 0.0
    if mu == math.inf:
        return math.inf
    low, high = 0.0, 1.0
    while _gaussian_delta(high, mu) > delta:
        low, high = high, 2 * high
    while high - low > 1e-9 * max(1.0, high):
        middle = (low + high) / 2
        low, high = (middle, high) if _gaussian_delta(middle, mu) > delta else (low, middle)
    return high


def gaussian_mu(epsilon: float, delta: float) -> float:
    """The μ whose ε at `delta` is `epsilon`: the inverse of `gaussian_epsilon`."""
    low, high = 0.0, 1.0
    while gaussian_epsilon(high, delta) < epsilon:
        low, high = high, 2 * high
    while high - low > 1e-9 * max(1.0, high):
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_epsilon(middle, delta) < epsilon else (low, middle)
    return high


def _gaussian_delta(epsilon: float, mu: float) -> float:
    """δ = Φ(-ε/μ + μ/2) - exp(ε) Φ(-ε/μ - μ/2)."""
    if mu in (0.0, math.inf):
        return 0.0 if mu == 0 else 1.0
    near, far = epsilon / mu - mu / 2, epsilon / mu + mu / 2
    if far < 30:
        tail = math.exp(epsilon) * math.erfc(far / math.sqrt(2)) / 2
    else:  # exp(ε) overflows and the tail of Φ is 0 in floating point; their product is exp(-near**2 / 2) / (far sqrt(2π))
        tail = math.exp(-near * near / 2) / (far * math.sqrt(2 * math.pi))
    return math.erfc(near / math.sqrt(2)) / 2 - tail


def _binomial(trials: int, chance: float) -> Float64:
    """float64 (trials + 1,): the probability of 0 .. trials hits, for a chance within (0, 1)."""
    hits = np.arange(trials + 1)
    factorials = np.array([math.lgamma(n + 1) for n in range(trials + 1)])
    logs = factorials[-1] - factorials - factorials[::-1] + hits * math.log(chance)
    logs += (trials - hits) * math.log1p(-chance)
    mass: Float64 = np.exp(logs)
    return mass


# Membership -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rate:
    """`value` of the members are found when `at` of the others are taken for members; ends of the exact 95 % interval."""

    at: float
    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Membership:
    """How well losses tell `members` patients of the training from `others`. 0.5: not at all; 1: every pair.

    strict: at FALSE_POSITIVES; None if there are fewer than OTHERS_MIN others, of whom none or too many would be that share.
    least: with at most one false positive, the smallest rate above 0 that so many others show. roc: (false, true) positive rates.
    """

    members: int
    others: int
    auc: float
    low: float
    high: float
    strict: Rate | None
    least: Rate
    roc: tuple[Float64, Float64]


def membership_inference(members: Float64, others: Float64) -> Membership:
    """The attack by a threshold on the loss (Yeom et al. 2018), one loss for each patient.

    Interval of the AUC: DeLong 1988 on the logit scale; where no pair is ordered otherwise that has no width, and the exact bound
    of no error among the smaller group stands in. Raises PrivacyError for fewer than two of either, or a loss that is no number.
    """
    if min(len(members), len(others)) < 2 or not np.isfinite(np.concatenate([members, others])).all():
        raise PrivacyError("membership inference needs two finite losses of members and of others at least")
    ranked = np.sort(others)
    beaten = _placements(-members, -others)
    auc = float(beaten.mean())
    error = math.sqrt(beaten.var(ddof=1) / len(members) + _placements(others, members).var(ddof=1) / len(others))
    allowed = math.floor(FALSE_POSITIVES * len(others))
    strict = _rate(members, ranked, allowed) if len(others) >= OTHERS_MIN else None
    low, high = _auc_interval(auc, error, min(len(members), len(others)))
    edges = np.unique(np.concatenate([members, others]))
    roc = tuple(
        np.concatenate([[0.0], np.searchsorted(np.sort(group), edges, side="right") / len(group)])
        for group in (others, members)
    )
    return Membership(len(members), len(others), auc, low, high, strict, _rate(members, ranked, 1), (roc[0], roc[1]))


def _placements(values: Float64, among: Float64) -> Float64:
    """For each of `values`, the share of `among` that it exceeds; equal ones count half."""
    ordered = np.sort(among)
    below, upto = (np.searchsorted(ordered, values, side=side) for side in ("left", "right"))
    placed: Float64 = (below + upto) / (2 * len(among))
    return placed


def _auc_interval(auc: float, error: float, smaller: int) -> tuple[float, float]:
    if auc in (0.0, 1.0) or error == 0.0:
        reach = 1 - ((1 - CONFIDENCE) / 2) ** (1 / smaller)
        return max(0.0, auc - reach), min(1.0, auc + reach)
    centre, width = math.log(auc / (1 - auc)), Z_95 * error / (auc * (1 - auc))
    low, high = ((1 + math.tanh(end / 2)) / 2 for end in (centre - width, centre + width))
    return low, high


def _rate(members: Float64, others: Float64, allowed: int) -> Rate:
    """Members below a threshold that `allowed` of the sorted `others` are below at most."""
    threshold = others[allowed]
    hits = int((members < threshold).sum())
    low, high = clopper_pearson(hits, len(members))
    return Rate(allowed / len(others), hits / len(members), low, high)


def clopper_pearson(hits: int, trials: int) -> tuple[float, float]:
    """The exact 95 % interval of a share (Clopper and Pearson 1934)."""
    tail = (1 - CONFIDENCE) / 2
    low = 0.0 if hits == 0 else _crossing(lambda chance: float(_binomial(trials, chance)[hits:].sum()), tail)
    high = (
        1.0 if hits == trials else _crossing(lambda chance: -float(_binomial(trials, chance)[: hits + 1].sum()), -tail)
    )
    return low, high


def _crossing(rising: Callable[[float], float], value: float) -> float:
    low, high = 0.0, 1.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < value else (low, middle)
    return (low + high) / 2


# Pictures out of gradients --------------------------------------------------------------------------------------------

INVERSION_STEPS = 300  # of L-BFGS: further ones change the picture by less than 1 dB
RESTARTS = 3  # from other random pictures; the one whose gradient fits best is shown
SMOOTHNESS = 3e-4  # weight of the total variation beside a cosine distance between 0 and 2
_WIDTH, _WEIGHTS = 12, 0.5  # channels, and reach of the initial weights, of Zhu et al. 2019


class SmoothNet(nn.Module):
    """Three convolutions with sigmoids and a linear layer (Zhu et al. 2019): a network whose gradients give pictures away.

    Deep networks with ReLUs are harder to invert by simple means, which is luck and no protection. Takes (B, 1, S, S).
    """

    def __init__(self, size_px: int, targets: int, seed: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, _WIDTH, 5, stride=2, padding=2),
            nn.Sigmoid(),
            nn.Conv2d(_WIDTH, _WIDTH, 5, stride=2, padding=2),
            nn.Sigmoid(),
            nn.Conv2d(_WIDTH, _WIDTH, 5, padding=2),
            nn.Sigmoid(),
        )
        side = -(-size_px // 4)
        self.head = nn.Linear(_WIDTH * side * side, targets)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.uniform_(-_WEIGHTS, _WEIGHTS, generator=generator)
            # Sigmoids lie about 1/2: without this all logits would be large, and a picture that is certainly classified right
            # has next to no gradient.
            self.head.weight.sub_(self.head.weight.mean())
            self.head.bias.zero_()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(images).flatten(1))
        return logits


def gradient(net: nn.Module, losses: Losses, batch: Batch) -> Tensor:
    """float32 (P,): the gradient of the sum of `losses` over `batch`, as whoever trains `net` would send it."""
    return _gradient(net, losses, batch, twice=False).detach()


def invert(
    net: nn.Module, losses: Losses, observed: Tensor, shape: tuple[int, ...], known: tuple[Tensor, ...]
) -> Tensor:
    """The images float32 `shape` in [0, 1] whose gradient points where `observed` (P,) does.

    What is minimised is the cosine distance (Geiping et al. 2020), so that a clipped or otherwise scaled gradient gives as much
    away, with a little total variation; by L-BFGS as in Zhu et al. 2019, RESTARTS times. `known`: the other tensors of the Batch,
    labels above all, which the adversary is assumed to know. Raises PrivacyError for an observation that is 0 or not finite.
    """
    size = float(torch.linalg.vector_norm(observed))
    if not math.isfinite(size) or size == 0:
        raise PrivacyError("there is nothing to invert in a gradient that is zero or not finite")
    direction, training = observed / size, net.training
    net.eval()
    try:
        tries = [_invert_once(net, losses, direction, (torch.rand(shape, generator=g), known)) for g in _generators()]
    finally:
        net.train(training)
    return min(tries, key=lambda found: found[0])[1]


def _generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in range(RESTARTS)]


def _invert_once(
    net: nn.Module, losses: Losses, direction: Tensor, start: tuple[Tensor, tuple[Tensor, ...]]
) -> tuple[float, Tensor]:
    """(distance that is left, images), beginning at the images `start[0]`."""
    images, known = start
    images.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [images],
        max_iter=INVERSION_STEPS,
        max_eval=2 * INVERSION_STEPS,
        history_size=100,
        line_search_fn="strong_wolfe",
        tolerance_grad=0,
        tolerance_change=0,
    )

    def distance() -> Tensor:
        found = _gradient(net, losses, (images, *known), twice=True)
        cosine = (found @ direction) / torch.linalg.vector_norm(found).clamp(min=1e-20)
        left: Tensor = 1 - cosine + SMOOTHNESS * _variation(images)
        return left

    def closure() -> Tensor:
        left = distance()
        (images.grad,) = torch.autograd.grad(left, [images])
        return left

    optimizer.step(closure)  # type: ignore[no-untyped-call]  # torch leaves it out
    left = float(distance().detach())
    return left if math.isfinite(left) else math.inf, images.detach().clamp(0, 1).nan_to_num(0.5)


def _gradient(net: nn.Module, losses: Losses, batch: Batch, *, twice: bool) -> Tensor:
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    parts = torch.autograd.grad(losses(net, batch).sum(), trained, create_graph=twice, materialize_grads=True)
    found: Tensor = torch.cat([part.reshape(-1) for part in parts])
    return found


def _variation(images: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels, down and across."""
    down, across = images[..., 1:, :] - images[..., :-1, :], images[..., :, 1:] - images[..., :, :-1]
    return down.abs().mean() + across.abs().mean()


def psnr(found: Tensor, truth: Tensor) -> float:
    """Peak signal to noise ratio in dB of images in [0, 1]; above 20 an eye knows the picture again, infinite if it is equal."""
    error = float(torch.mean((found.double() - truth.double()) ** 2))
    return -10 * math.log10(error) if error > 0 else math.inf
