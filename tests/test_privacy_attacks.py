"""Attacks that find what is there: an audit that turns red for each sabotage, and stays calm for the sound mechanism.

Oracles: scipy's binomial, normal and beta distributions, scikit-learn's ROC, DeLong's variance over all pairs, and dp-accounting.
Audits take a fixed keystream, so that what they find is the same each time.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import optimize, stats
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor, nn
from torch.nn import functional

from fl_client.phantom import VENDORS, expose
from privacy import accounting, attacks, dpsgd, noise
from privacy.errors import PrivacyError

DELTA = 1e-5
SIDE = 32


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# The lower bound.


def tail_by_the_theorem(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """f(v) + 2 m δ max over i of (f(v - i) - f(v)) / i, f the upper tail of Binomial(r, e^ε / (e^ε + 1))."""
    chance = 1 / (1 + math.exp(-epsilon))

    def upper(v: int) -> float:
        return float(stats.binom.sf(v - 1, guesses, chance))

    steepest = max((upper(correct - i) - upper(correct)) / i for i in range(1, canaries + 1))
    return min(1.0, upper(correct) + 2 * canaries * delta * steepest)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 60), st.data(), st.floats(0, 6), st.sampled_from([0.0, 1e-5, 1e-3, 0.05]))
def test_the_tail_is_that_of_the_theorem(canaries: int, data: st.DataObject, epsilon: float, delta: float) -> None:
    guesses = data.draw(st.integers(1, canaries))
    correct = data.draw(st.integers(0, guesses))
    found = attacks.one_run_tail(canaries, guesses, correct, epsilon, delta)
    assert found == pytest.approx(tail_by_the_theorem(canaries, guesses, correct, epsilon, delta), abs=1e-9)


@pytest.mark.parametrize(("canaries", "bound"), [(100, 3.49), (300, 4.60), (1000, 5.81), (5000, 7.42)])
def test_no_bound_exceeds_the_logarithm_of_a_third_of_the_canaries(canaries: int, bound: float) -> None:
    """With every guess right, chance ** m = 0.05, so ε is -log(0.05 ** (-1 / m) - 1): about log(m / 3), noise or none."""
    found = attacks.one_run_bound(canaries, canaries, canaries, 0.0, 0.05)
    assert found == pytest.approx(-math.log(0.05 ** (-1 / canaries) - 1), abs=1e-5)
    assert found == pytest.approx(bound, abs=0.01) and found == pytest.approx(math.log(canaries / 3), abs=0.02)
    assert attacks.one_run_bound(canaries, canaries, canaries, 1e-5, 0.05) < found


@pytest.mark.parametrize("epsilon", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("guesses", [80, 100])
def test_the_bound_is_above_the_truth_at_most_as_often_as_it_says(epsilon: float, guesses: int) -> None:
    """Randomised response is the worst ε-DP mechanism; the probability of a wrong bound is summed up exactly."""
    chance = 1 / (1 + math.exp(-epsilon))
    wrong = [v for v in range(guesses + 1) if attacks.one_run_bound(100, guesses, v, 0.0, 0.05) > epsilon]
    probability = sum(stats.binom.pmf(v, guesses, chance) for v in wrong)
    assert 0.005 < probability <= 0.05


def test_a_bound_grows_with_right_guesses_and_is_none_for_a_coin() -> None:
    found = [attacks.one_run_bound(200, 100, v, 1e-5, 0.05) for v in range(40, 101, 10)]
    assert found[0] == found[1] == 0 and found[2:] == sorted(set(found[2:]))
    for bad in ((10, 5, 6), (10, 11, 3), (10, 5, -1), (10, 0, 0)):
        with pytest.raises(PrivacyError):
            attacks.one_run_bound(*bad, 1e-5, 0.05)


def test_equal_scores_are_no_evidence_and_separate_ones_all_there_can_be() -> None:
    same = attacks.best_bound(np.zeros(150), np.zeros(151), DELTA)
    assert same.epsilon == 0
    apart = attacks.best_bound(np.ones(150), np.zeros(150), DELTA)
    assert apart.correct == apart.guesses == 300
    assert apart.epsilon == apart.ceiling == pytest.approx(attacks.one_run_bound(300, 300, 300, DELTA, 0.05 / 4))


def test_the_best_of_several_bounds_is_wrong_no_more_often_than_one_may_be() -> None:
    """Scores of randomised response with ties broken by chance: 400 audits, of which 5 % may exceed the truth."""
    rng, epsilon, wrong = np.random.default_rng(1), 1.0, 0
    for _ in range(400):
        coins = rng.random(100) < 0.5
        answers = np.where(rng.random(100) < 1 / (1 + math.exp(-epsilon)), coins, ~coins) + 0.5 * rng.random(100)
        wrong += attacks.best_bound(answers[coins], answers[~coins], 0.0).epsilon > epsilon
    assert wrong <= stats.binom.ppf(0.999, 400, 0.05)


# The Gaussian estimate.


def epsilon_by_scipy(mu: float, delta: float) -> float:
    def excess(epsilon: float) -> float:
        first = stats.norm.logcdf(-epsilon / mu + mu / 2)
        return float(math.exp(first) - math.exp(epsilon + stats.norm.logcdf(-epsilon / mu - mu / 2)) - delta)

    return float(optimize.brentq(excess, 0, 1 + mu * mu + 10 * mu))


@pytest.mark.parametrize("mu", [0.1, 0.5, 1.0, 3.0, 10.0, 40.0, 300.0])
@pytest.mark.parametrize("delta", [1e-5, 1e-3])
def test_epsilon_of_a_gaussian_mechanism_is_that_of_the_closed_form(mu: float, delta: float) -> None:
    found = attacks.gaussian_epsilon(mu, delta)
    assert found == pytest.approx(epsilon_by_scipy(mu, delta), rel=1e-6)
    assert attacks.gaussian_mu(found, delta) == pytest.approx(mu, rel=1e-6)


def test_epsilon_of_full_batches_is_what_the_accounting_says() -> None:
    event = accounting.PrivacyEvent(3.0, 1.0, 20)
    assert attacks.gaussian_epsilon(math.sqrt(20) / 3, DELTA) == pytest.approx(
        accounting.epsilon([event], DELTA, fine=True), rel=1e-3
    )


def test_epsilon_of_extreme_mu() -> None:
    assert attacks.gaussian_epsilon(0.0, DELTA) == attacks.gaussian_epsilon(1e-6, DELTA) == 0
    assert 5e11 < attacks.gaussian_epsilon(1e6, DELTA) < 6e11
    assert attacks.gaussian_epsilon(math.inf, DELTA) == math.inf
    for bad in ((-1.0, DELTA), (1.0, 0.0), (1.0, 1.0)):
        with pytest.raises(PrivacyError):
            attacks.gaussian_epsilon(*bad)


def test_the_estimate_finds_the_mu_of_gaussian_scores_and_its_interval_holds_it() -> None:
    rng, stream, held = np.random.default_rng(2), noise.Keystream(b"e" * 32), 0
    for _ in range(60):
        inside, outside = rng.normal(0.72, 1.2, 200), rng.normal(-0.72, 1.2, 200)
        found = attacks.gaussian_estimate(inside, outside, DELTA, stream)
        assert found.mu == pytest.approx(1.2, abs=5 * found.error) and 0.05 < found.error < 0.2
        assert found.low < found.epsilon < found.high
        held += found.low <= attacks.gaussian_epsilon(1.2, DELTA) <= found.high
    assert held >= stats.binom.ppf(0.001, 60, 0.95)
    with pytest.raises(PrivacyError):
        attacks.gaussian_estimate(np.zeros(1), np.zeros(9), DELTA, stream)


def test_scores_without_any_spread_have_no_finite_estimate() -> None:
    found = attacks.gaussian_estimate(np.ones(9), np.zeros(9), DELTA, noise.Keystream(b"e" * 32))
    assert found.mu == found.low == found.high == found.epsilon == math.inf


# The audit.


class Cells(nn.Module):
    """Logistic regression on 16 pixels, in two layers by name."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.head(pixels)
        return logits


def patient_losses(net: nn.Module, batch: dpsgd.Batch) -> Tensor:
    pixels, targets = batch
    return functional.binary_cross_entropy_with_logits(net(pixels), targets, reduction="none").mean(dim=1)


PIXELS = torch.rand(40, 1, 16, generator=torch.Generator().manual_seed(3))
TARGETS = (PIXELS.mean(dim=2) > 0.5).float()
FULL = attacks.Mechanism(dpsgd.Clip(0.5), noise_multiplier=4.0, sampling_rate=1.0, steps=12, delta=DELTA)
SAMPLED = attacks.Mechanism(dpsgd.Clip(0.5), noise_multiplier=1.4, sampling_rate=0.2, steps=60, delta=DELTA)
CAPPED = replace(SAMPLED, batch_max=150)


def audit(mechanism: attacks.Mechanism = SAMPLED, canaries: int = 400, key: bytes = b"a", **change: Any) -> Any:
    torch.manual_seed(0)
    net = Cells()
    training = attacks.Training(net, patient_losses, 40, lambda n: (PIXELS[n], TARGETS[n : n + 1]))
    return attacks.canary_audit(replace(training, **change), mechanism, canaries, noise.Keystream(key * 32))


@functools.cache
def sound(mechanism: attacks.Mechanism) -> attacks.CanaryAudit:
    found: attacks.CanaryAudit = audit(mechanism)
    return found


@pytest.mark.parametrize("mechanism", [FULL, SAMPLED, CAPPED], ids=["full", "sampled", "capped"])
def test_a_sound_mechanism_is_estimated_at_its_claim_or_below(mechanism: attacks.Mechanism) -> None:
    found = sound(mechanism)
    assert found.faults == [] and found.thin == ()
    assert 0.5 * found.claim < found.estimate.low < found.claim
    assert found.bound.epsilon < found.claim and found.bound.epsilon < found.estimate.low
    assert found.noise == pytest.approx(1, abs=0.02)
    assert 1.1 < found.smallest < 2


def test_without_subsampling_the_estimate_is_at_the_claim() -> None:
    found = sound(FULL)
    assert found.estimate.low < found.claim < found.estimate.high


def test_the_claim_is_of_exactly_the_audited_run() -> None:
    event = accounting.PrivacyEvent(1.4, 0.2, 60)
    assert sound(SAMPLED).claim == pytest.approx(accounting.epsilon([event], DELTA), abs=1e-6)
    assert sound(SAMPLED).event == replace(event, delta_extra=sound(SAMPLED).event.delta_extra)
    assert 0 < sound(SAMPLED).event.delta_extra < 1e-20
    assert sound(CAPPED).event.batch_max == 150 and sound(CAPPED).event.patients == 440


def test_each_canary_is_in_or_out_by_a_coin_that_falls_anew() -> None:
    found = sound(SAMPLED)
    assert len(found.inside) + len(found.outside) == 400 and 150 < len(found.inside) < 250
    counts = {len(audit(replace(SAMPLED, steps=1), key=key).inside) for key in (b"b", b"c", b"d", b"e")}
    assert len(counts) > 1 and all(150 < count < 250 for count in counts)


@pytest.mark.parametrize("rate", [0.05, 0.4, 1.0])
def test_a_score_is_the_log_likelihood_ratio_of_the_sampled_gaussian(rate: float) -> None:
    seen = np.linspace(-4, 9, 50)
    inside = (1 - rate) * stats.norm.pdf(seen, 0, 1.4) + rate * stats.norm.pdf(seen, 1, 1.4)
    found = attacks._log_ratio(seen, replace(SAMPLED, sampling_rate=rate))
    assert found == pytest.approx(np.log(inside / stats.norm.pdf(seen, 0, 1.4)))
    assert np.isfinite(attacks._log_ratio(np.array([-1e6, 1e6]), replace(SAMPLED, sampling_rate=rate))).all()


Sabotage = Callable[[pytest.MonkeyPatch], None]


def noise_halved(patch: pytest.MonkeyPatch) -> None:
    whole = noise.gaussian
    patch.setattr(noise, "gaussian", lambda sigma: whole(sigma / 2))


def clip_skipped(patch: pytest.MonkeyPatch) -> None:
    def add(self: Any, gradient: Tensor) -> None:
        self.units += 1
        self.near.add_((gradient * (self.grid / self.clip.norm)).round_())

    patch.setattr(dpsgd._Accumulator, "add", add)


def clip_at_twice_the_norm(patch: pytest.MonkeyPatch) -> None:
    whole = dpsgd._Accumulator.__init__

    def begin(self: Any, *given: Any) -> None:
        whole(self, *given)
        self.grid, self.target = 2 * self.grid, 2 * self.target

    patch.setattr(dpsgd._Accumulator, "__init__", begin)


def rate_doubled(patch: pytest.MonkeyPatch) -> None:
    whole = noise.poisson_sample
    patch.setattr(noise, "poisson_sample", lambda units, rate, stream, cap=None: whole(units, 2 * rate, stream, cap))


@pytest.mark.parametrize(
    "sabotage",
    [noise_halved, clip_skipped, clip_at_twice_the_norm, rate_doubled],
    ids=lambda f: f.__name__,
)
def test_a_sabotaged_mechanism_turns_the_audit_red(sabotage: Sabotage, monkeypatch: pytest.MonkeyPatch) -> None:
    sabotage(monkeypatch)
    found = audit()
    assert found.claim == sound(SAMPLED).claim
    assert found.estimate.low > 1.3 * found.claim
    assert any("Gaussian estimate" in fault for fault in found.faults)


def test_halved_noise_is_red_without_subsampling_too(monkeypatch: pytest.MonkeyPatch) -> None:
    noise_halved(monkeypatch)
    found = audit(FULL)
    assert found.estimate.low > found.claim
    assert found.noise == pytest.approx(0.5, abs=0.01) and {"canaries", "head.weight"} <= set(found.thin)


def test_the_bound_alone_would_not_have_noticed_a_halved_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why a lower bound below the claim proves little."""
    noise_halved(monkeypatch)
    found = audit()
    assert found.bound.epsilon < found.claim and found.bound.ceiling < found.claim


def test_a_skipped_clip_is_far_above_every_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    clip_skipped(monkeypatch)
    assert audit().estimate.low > 1000 * sound(SAMPLED).claim


def test_a_layer_without_noise_is_named_although_canaries_do_not_see_it(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = dpsgd.private_gradient

    def without(*given: Any) -> Any:
        noisy, seen = whole(*given)
        noisy[-1:] = seen.total[-1:]
        return noisy, seen

    monkeypatch.setattr(dpsgd, "private_gradient", without)
    found = audit()
    assert found.thin == ("head.bias",)
    assert found.faults == ["less noise than claimed in head.bias"]


def test_an_audit_trains_the_network_with_what_the_mechanism_gives() -> None:
    given: list[NDArray[np.float32]] = []
    audit(replace(SAMPLED, steps=3), descend=given.append)
    assert len(given) == 3 and all(vector.shape == (17,) and vector.dtype == np.float32 for vector in given)
    assert np.std(given) == pytest.approx(1.4, rel=0.4)


@pytest.mark.parametrize("training", [True, False])
def test_an_audit_changes_nothing_of_the_network_by_itself(training: bool) -> None:
    net = Cells().train(training)
    before = [p.detach().clone() for p in net.parameters()]
    audit(replace(SAMPLED, steps=2), net=net)
    assert net.training == training and all(p.grad is None for p in net.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_an_audit_with_few_canaries_is_refused() -> None:
    with pytest.raises(PrivacyError, match="99 canaries"):
        audit(canaries=99)


# Membership inference.

Losses = NDArray[np.float64]
tied = st.lists(st.integers(0, 12), min_size=2, max_size=40).map(lambda values: np.array(values, np.float64))


@settings(deadline=None, max_examples=100)
@given(tied, tied)
def test_the_auc_and_its_error_are_those_of_all_pairs(members: Losses, others: Losses) -> None:
    found = attacks.membership_inference(members, others)
    truth = np.r_[np.ones(len(members)), np.zeros(len(others))]
    assert found.auc == pytest.approx(roc_auc_score(truth, -np.r_[members, others]))
    pairs = (members[:, None] < others) + 0.5 * (members[:, None] == others)
    variance = pairs.mean(1).var(ddof=1) / len(members) + pairs.mean(0).var(ddof=1) / len(others)
    assert 0 <= found.low <= found.auc <= found.high <= 1
    if 0 < found.auc < 1 and variance > 0:
        centre, width = math.log(found.auc / (1 - found.auc)), 1.959964 * math.sqrt(variance)
        ends = centre + np.array([-1, 1]) * width / (found.auc * (1 - found.auc))
        assert (found.low, found.high) == pytest.approx(tuple(1 / (1 + np.exp(-ends))))
    assert found.roc[0][-1] == found.roc[1][-1] == 1 and found.roc[0][0] == found.roc[1][0] == 0
    assert np.trapezoid(found.roc[1], found.roc[0]) == pytest.approx(found.auc)


@settings(deadline=None, max_examples=30)
@given(st.integers(1000, 3500), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 1.0, 4.0]))
def test_the_rate_at_one_in_a_thousand_is_that_of_the_roc_curve(count: int, seed: int, apart: float) -> None:
    rng = np.random.default_rng(seed)
    members, others = rng.normal(0, 1, 300).round(1), rng.normal(apart, 1, count).round(1)
    strict = attacks.membership_inference(members, others).strict
    fpr, tpr, _ = roc_curve(np.r_[np.ones(300), np.zeros(count)], -np.r_[members, others], drop_intermediate=False)
    assert strict is not None and strict.at <= 0.001
    assert strict.value == pytest.approx(tpr[fpr <= 0.001].max())
    hits = round(300 * strict.value)
    low = stats.beta.ppf(0.025, hits, 301 - hits) if hits else 0.0
    high = stats.beta.ppf(0.975, hits + 1, 300 - hits) if hits < 300 else 1.0
    assert (strict.low, strict.high) == pytest.approx((low, high), abs=1e-6)


def test_with_fewer_than_a_thousand_others_one_in_a_thousand_is_not_estimable() -> None:
    found = attacks.membership_inference(np.arange(50.0), 10 + np.arange(999.0))
    assert found.strict is None
    assert found.least.at == pytest.approx(1 / 999) and found.least.value == 11 / 50
    assert attacks.membership_inference(np.arange(50.0), 10 + np.arange(1000.0)).strict is not None


@pytest.mark.parametrize("hits", [0, 1, 7, 20])
def test_the_exact_interval_of_a_share(hits: int) -> None:
    low = stats.beta.ppf(0.025, hits, 21 - hits) if hits else 0.0
    high = stats.beta.ppf(0.975, hits + 1, 20 - hits) if hits < 20 else 1.0
    assert attacks.clopper_pearson(hits, 20) == pytest.approx((low, high), abs=1e-7)


def test_groups_that_are_apart_have_an_interval_all_the_same() -> None:
    found = attacks.membership_inference(np.zeros(30), np.ones(50))
    assert found.auc == found.high == 1 and found.low == pytest.approx(0.025 ** (1 / 30))


@pytest.mark.parametrize("bad", [[0.1], [0.1, math.nan], [0.1, math.inf], []])
def test_losses_that_are_no_numbers_are_refused(bad: list[float]) -> None:
    for members, others in ((bad, [0.1, 0.2]), ([0.1, 0.2], bad)):
        with pytest.raises(PrivacyError):
            attacks.membership_inference(np.array(members), np.array(others))


def test_a_model_that_memorised_gives_its_patients_away_and_a_fresh_one_does_not() -> None:
    """Eight labels by coin for each: whatever is learned of them is memory, and right by luck for one patient in 256."""
    generator = torch.Generator().manual_seed(4)
    pixels, targets = torch.rand(120, 64, generator=generator), torch.randint(2, (120, 8), generator=generator).float()
    torch.manual_seed(5)
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 8))

    def auc() -> float:
        with torch.inference_mode():
            losses = patient_losses(net, (pixels, targets)).double().numpy()
        return attacks.membership_inference(losses[:60], losses[60:]).auc

    before = auc()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        patient_losses(net, (pixels[:60], targets[:60])).mean().backward()
        optimizer.step()
    assert 0.35 < before < 0.65 and auc() > 0.99


# Pictures out of gradients.


@functools.cache
def chests() -> tuple[Tensor, Tensor]:
    """Ten phantoms (10, 1, 32, 32), every other one with an opacity."""
    vendor = next(iter(VENDORS.values()))
    pictures = [expose(seed, seed % 2 == 0, vendor, np.random.default_rng(seed)) for seed in range(10)]
    whole = torch.from_numpy(np.stack(pictures))[:, None]
    return functional.adaptive_avg_pool2d(whole, SIDE), (torch.arange(10) % 2 == 0).float()[:, None]


@functools.cache
def prey() -> nn.Module:
    return attacks.SmoothNet(SIDE, 1)


def sees(*rows: int) -> Tensor:
    pictures, targets = chests()
    return attacks.gradient(prey(), patient_losses, (pictures[list(rows)], targets[list(rows)]))


@pytest.fixture
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One random start: for what is not found from any."""
    monkeypatch.setattr(attacks, "RESTARTS", 1)


def decibels(observed: Tensor, row: int = 0) -> float:
    pictures, targets = chests()
    found = attacks.invert(prey(), patient_losses, observed, (1, 1, SIDE, SIDE), (targets[row : row + 1],))
    assert found.min() >= 0 and found.max() <= 1
    return attacks.psnr(found, pictures[row : row + 1])


@pytest.mark.parametrize("row", [0, 1])
def test_the_gradient_of_one_picture_is_the_picture(row: int) -> None:
    assert decibels(sees(row), row) > 25


def test_clipping_alone_protects_nothing() -> None:
    observed = sees(0)
    assert decibels(observed * (0.01 / observed.norm())) > 25


@pytest.mark.parametrize("multiplier", [0.1, 1.0])
def test_noise_of_the_mechanism_leaves_no_picture(multiplier: float, once: None) -> None:
    pictures, targets = chests()
    clip = dpsgd.Clip(1.0)
    engine = dpsgd.LoopEngine(prey(), patient_losses)
    noisy, _ = dpsgd.private_gradient(
        engine, [(pictures[:1], targets[:1])], clip, multiplier, noise.Keystream(b"i" * 32)
    )
    assert decibels(torch.from_numpy(noisy * 2.0**-clip.bits).float()) < 10


@pytest.mark.parametrize("row", [0, 1])
def test_a_picture_is_not_found_by_itself_in_the_sum_of_ten(row: int, once: None) -> None:
    """What is found is about as near to it as the average of all, which says nothing of this patient."""
    pictures, _ = chests()
    assert decibels(sees(*range(10)), row) < attacks.psnr(pictures.mean(0), pictures[row]) + 2


def test_a_sum_of_two_is_no_protection_from_who_looks_for_both(once: None) -> None:
    """Masks hide who sent what; what two patients alone send together can be taken apart."""
    pictures, targets = chests()
    found = attacks.invert(prey(), patient_losses, sees(0, 1), (2, 1, SIDE, SIDE), (targets[:2],))
    best = max(attacks.psnr(made, truth) for made in found for truth in pictures[:2])
    assert best > attacks.psnr(pictures[:2].mean(0), pictures[0]) + 4


def test_inverting_leaves_the_network_as_it_was(once: None) -> None:
    net = prey().train()
    before = [p.detach().clone() for p in net.parameters()]
    decibels(sees(0))
    assert net.training and all(p.grad is None for p in net.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_gradient_that_says_nothing_is_refused(value: float) -> None:
    with pytest.raises(PrivacyError, match="nothing to invert"):
        decibels(torch.full_like(sees(0), value))


def test_signal_to_noise_in_decibels() -> None:
    truth = torch.zeros(1, 1, 4, 4)
    assert attacks.psnr(truth + 0.1, truth) == pytest.approx(20)
    assert attacks.psnr(truth, truth) == math.inf
