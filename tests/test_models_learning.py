"""The local loop: repeatable to the bit, learns what is there, stops when told, and never passes a broken update on."""

import math
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from models import learning, networks, tasks
from models.study import Study
from privacy.errors import CohortTooSmall, MessageMalformed, TrainingDiverged, TrainingStopped

SIDE = 32


@dataclass
class Patients:
    """A cohort of made images: what `learning.TrainingCohort` asks for."""

    images: Tensor
    targets: Tensor
    known: Tensor
    patients: Tensor


def made_cohort(count: int = 24, targets: int = 1, seed: int = 0) -> Patients:
    """Noise, with a bright disc somewhere where the first target is present."""
    g = torch.Generator().manual_seed(seed)
    truth = (torch.arange(count)[:, None] % (2 + torch.arange(targets)) == 0).float()
    images = torch.rand(count, 1, SIDE, SIDE, generator=g) * 0.4
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    for row in torch.nonzero(truth[:, 0]).flatten():
        centre = 8 + torch.rand(2, generator=g) * 16
        images[row, 0] += 0.5 * (((y - centre[0]) ** 2 + (x - centre[1]) ** 2) < 36)
    return Patients(images.clamp(0, 1), truth, torch.ones_like(truth), torch.arange(count) // 2)


def made_study(**training: Any) -> Study:
    targets = training.pop("targets", 1)
    plan = {"rounds": 5, "batch_size": 8, "learning_rate": 0.002, "schedule": "constant"} | training
    return Study.model_validate(
        {
            "name": "discs",
            "title": "Discs",
            "purpose": "a test",
            "task": {"targets": [f"t{i}" for i in range(targets)]},
            "images": {"size_px": SIDE},
            "network": {"dropout": 0.2},
            "training": plan,
            "protection": "plain",
            "privacy": "none",
            "participation": {"sites": ["north"], "quorum": 1},
        }
    )


def learned(study: Study, cohort: Patients, round_number: int = 1) -> learning.Update:
    return learning.learn(networks.build(study), cohort, study, round_number=round_number)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_round_repeats_bit_for_bit_whatever_the_process_drew_before(optimizer: str) -> None:
    study, cohort = made_study(optimizer=optimizer, local_epochs=2), made_cohort()
    torch.manual_seed(1)
    first = learned(study, cohort)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    second = learned(study, cohort)
    assert first.delta.tobytes() == second.delta.tobytes() and first.loss == second.loss
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_another_round_seed_or_study_draws_other_batches(dropout: float) -> None:
    cohort, start = made_cohort(), networks.build(made_study())
    for module in start.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    vector, deltas = networks.to_vector(start), set()
    for study, number in (
        (made_study(), 2),
        (made_study(), 3),
        (made_study(seed=2), 2),
        (made_study(rounds=6), 2),
    ):
        networks.load_vector(start, vector)
        deltas.add(learning.learn(start, cohort, study, round_number=number).delta.tobytes())
    assert len(deltas) == 4


@pytest.mark.parametrize("augmentation", ["none", "light"])
def test_a_round_that_is_repeated_draws_anew(augmentation: str) -> None:
    """Two sums of the same round must not be the same updates, or their difference is the site that was in one alone."""
    study, cohort = made_study(augmentation=augmentation), made_cohort()
    net = networks.build(study)
    start, deltas = networks.to_vector(net), []
    for repeat in (0, 1, 2, 0):
        networks.load_vector(net, start)
        deltas.append(learning.learn(net, cohort, study, round_number=2, repeat=repeat).delta)
    first, second, third, again = deltas
    assert again.tobytes() == first.tobytes()
    for one, other in ((first, second), (first, third), (second, third)):
        assert (one != other).mean() > 0.9
    networks.load_vector(net, start)
    assert learning.learn(net, cohort, study, round_number=2).delta.tobytes() == first.tobytes()


def test_a_repeat_is_no_other_round() -> None:
    """Round and repeat do not add up to the same randomness, nor does 1 followed by 11 read as 11 followed by 1."""
    study, cohort = made_study(rounds=20), made_cohort()
    net = networks.build(study)
    start, deltas = networks.to_vector(net), set()
    places = [(3, 0), (2, 1), (4, 1), (3, 2), (11, 1), (1, 11)]
    for number, repeat in places:
        networks.load_vector(net, start)
        deltas.add(learning.learn(net, cohort, study, round_number=number, repeat=repeat).delta.tobytes())
    assert len(deltas) == len(places)


def test_keys_and_protection_change_no_bit_of_what_is_learned() -> None:
    """So a rehearsal on a laptop, and the same study masked or plain, make the same model."""
    plain, cohort = made_study(), made_cohort()
    changes: list[dict[str, Any]] = [
        {"roster": {"north": "02" + "ab" * 32}},
        {"aggregator": "0f" * 32},
        {"protection": "masked"},
        {"protection": "sealed"},
        {"encoding_bits": 16},
    ]
    same = [plain.model_copy(update=change) for change in changes]
    assert len({study.digest for study in [plain, *same]}) == len(same) + 1
    assert {learned(study, cohort).delta.tobytes() for study in same} == {learned(plain, cohort).delta.tobytes()}


def test_the_update_is_after_minus_before_and_counts_what_was_seen() -> None:
    study, cohort = made_study(local_epochs=3), made_cohort(20)
    cohort.known[3:6] = 0
    net = networks.build(study)
    before = networks.to_vector(net)
    update = learning.learn(net, cohort, study, round_number=1)
    np.testing.assert_array_equal(update.delta, networks.to_vector(net) - before)
    assert update.delta.dtype == np.float32 and update.delta.any()
    assert (update.cases, update.steps) == (17, 3 * 3)
    assert 0.3 < update.loss < 1.5


def test_images_without_any_label_change_nothing() -> None:
    study, full = made_study(augmentation="none"), made_cohort(30)
    full.known[20:] = 0
    dirty = Patients(full.images.clone(), full.targets.clone(), full.known, full.patients)
    dirty.images[20:], dirty.targets[20:] = math.nan, math.nan
    assert learned(study, full).delta.tobytes() == learned(study, dirty).delta.tobytes()


def test_it_learns_what_is_there_also_with_half_precision_images() -> None:
    study = made_study(local_epochs=3, learning_rate=0.001)
    cohort, unseen = made_cohort(80), made_cohort(60, seed=5)
    cohort.images = cohort.images.to(torch.float16)
    net = networks.build(study)
    losses = [learning.learn(net, cohort, study, round_number=r).loss for r in (1, 2, 3)]
    scores = learning.predict(net, unseen)
    assert losses[-1] < losses[0]
    assert roc_auc_score(unseen.targets[:, 0].numpy(), scores[:, 0]) > 0.9


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_a_site_with_one_class_trains_and_reports_finite_numbers(label: float) -> None:
    cohort = made_cohort(10)
    cohort.targets[:] = label
    update = learned(made_study(), cohort)
    assert math.isfinite(update.loss) and np.isfinite(update.delta).all()


def test_several_targets_with_missing_labels_train_together() -> None:
    cohort = made_cohort(18, targets=3)
    cohort.known[::2, 1] = 0
    cohort.known[:, 2] = 0
    study = made_study(targets=3)
    update = learned(study, cohort)
    assert update.cases == 18
    head = next(layer for layer in networks.layout(networks.build(study)) if layer.name == "head.bias")
    assert head.shape == (3,)
    assert update.delta[-3:][0] != 0 and update.delta[-1] == 0  # nobody said anything about the third target


def test_stop_is_asked_before_every_step() -> None:
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > 2

    study = made_study()
    with pytest.raises(TrainingStopped, match="2 steps"):
        learning.learn(networks.build(study), made_cohort(), study, round_number=1, stop=stop)
    assert len(asked) == 3


def test_a_cohort_without_labels_is_too_small() -> None:
    cohort = made_cohort(6)
    cohort.known[:] = 0
    with pytest.raises(CohortTooSmall):
        learned(made_study(), cohort)


def test_a_loss_that_is_no_number_ends_the_round() -> None:
    cohort = made_cohort()
    cohort.images[5] = math.nan
    with pytest.raises(TrainingDiverged, match="loss"):
        learned(made_study(), cohort)


def test_weights_that_are_no_numbers_are_not_reported() -> None:
    study, cohort = made_study(learning_rate=10.0, weight_decay=1.0, batch_size=24, augmentation="none"), made_cohort()
    cohort.images[:, :, 0, 0] = 0.0
    last = nn.Linear(SIDE * SIDE, 1)
    with torch.no_grad():
        last.weight[0, 0] = (
            1e38  # it sees a dark pixel, so the loss is fine; decay makes it -9e38, which float32 cannot hold
        )
    with pytest.raises(TrainingDiverged, match="weight"):
        learning.learn(nn.Sequential(nn.Flatten(), last), cohort, study, round_number=2)


def test_scores_do_not_depend_on_the_batch_and_leave_dropout_off() -> None:
    study, cohort = made_study(targets=2), made_cohort(13, targets=2)
    net = networks.build(study).train()
    whole = learning.predict(net, cohort)
    assert whole.shape == (13, 2) and whole.dtype == np.float32 and ((whole > 0) & (whole < 1)).all()
    np.testing.assert_allclose(learning.predict(net, cohort, batch=4), whole, atol=1e-6)
    expected = tasks.activation(net(cohort.images)).detach().numpy()
    np.testing.assert_allclose(whole, expected, atol=1e-6)


def test_an_empty_cohort_has_no_scores() -> None:
    cohort = made_cohort(2)
    empty = Patients(cohort.images[:0], cohort.targets[:0], cohort.known[:0], cohort.patients[:0])
    assert learning.predict(networks.build(made_study()), empty).shape == (0, 1)


def test_a_broken_network_gives_no_scores() -> None:
    last = nn.Linear(SIDE * SIDE, 1)
    nn.init.constant_(last.bias, math.nan)
    with pytest.raises(TrainingDiverged):
        learning.predict(nn.Sequential(nn.Flatten(), last), made_cohort(2))


def test_the_evaluation_loss_is_the_unweighted_cross_entropy() -> None:
    cohort = made_cohort(4)
    cohort.known[3] = 0
    scores = np.array([[0.9], [0.2], [0.6], [0.5]], dtype=np.float32)
    expected = -(math.log(0.9) + math.log(0.8) + math.log(0.6)) / 3
    assert learning.evaluation_loss(scores, cohort) == pytest.approx(expected, rel=1e-6)
    certain = np.array([[0.0], [1.0], [1.0], [0.5]], dtype=np.float32)
    assert 5 < learning.evaluation_loss(certain, cohort) < 17  # surely wrong is costly, not infinite
    with pytest.raises(MessageMalformed):
        learning.evaluation_loss(scores[:2], cohort)


def test_the_rate_warms_up_and_falls_along_half_a_cosine() -> None:
    plan = made_study(rounds=10, learning_rate=1.0, schedule="cosine").training
    rates = [plan.rate(r) for r in range(1, 11)]
    assert rates[0] == pytest.approx(0.5)
    assert rates[5] == pytest.approx(0.5)
    assert rates[1:] == sorted(rates[1:], reverse=True) and 0 < rates[-1] < 0.03
    flat = made_study(rounds=10, learning_rate=1.0, schedule="constant").training
    assert [flat.rate(r) for r in (1, 2, 10)] == [0.5, 1.0, 1.0]


def test_augmentation_moves_a_little_keeps_the_range_and_never_mirrors() -> None:
    marked = torch.zeros(200, 1, 64, 64)
    marked[:, :, 28:36, 8:16] = 1.0  # a marker at the left edge stays at the left edge
    before = marked.clone()
    changed = learning.augment(marked, torch.Generator().manual_seed(1))
    assert torch.equal(marked, before)
    assert changed.shape == marked.shape and changed.dtype == torch.float32
    assert float(changed.min()) >= 0 and float(changed.max()) <= 1
    x = torch.arange(64.0)
    above = (changed - changed.amin(dim=(2, 3), keepdim=True)).sum(dim=(1, 2))
    centres = (above * x).sum(dim=1) / above.sum(dim=1)
    assert float(centres.max()) < 24 and float(centres.std()) > 0.5
    assert len({image.numpy().tobytes() for image in changed}) == 200


def test_augmentation_is_decided_by_its_generator_alone() -> None:
    images = torch.rand(5, 1, 32, 32)
    first, second = (learning.augment(images, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, learning.augment(images, torch.Generator().manual_seed(8)))


# FedProx.


def with_strategy(study: Study, **strategy: Any) -> Study:
    return Study.model_validate(study.model_dump(mode="json") | {"strategy": strategy})


def proximal_by_hand(cohort: Patients, weights: Any, mu: float, rate: float, steps: int) -> Any:
    """Li et al. 2020, equation 2, of a logistic regression: gradient descent with Nesterov's momentum in float64 numpy."""
    x = np.concatenate([cohort.images.flatten(1).numpy(), np.ones((len(cohort.images), 1))], axis=1).astype(np.float64)
    y, start = cohort.targets.numpy()[:, 0], weights.astype(np.float64)
    w, velocity = start.copy(), np.zeros_like(start)
    for _ in range(steps):
        gradient = x.T @ (1 / (1 + np.exp(-x @ w)) - y) / len(y) + mu * (w - start)
        gradient *= min(1.0, learning.GRADIENT_NORM_MAX / float(np.linalg.norm(gradient)))
        velocity = learning.MOMENTUM * velocity + gradient
        w -= rate * (gradient + learning.MOMENTUM * velocity)
    return w - start


@pytest.mark.parametrize("mu", [0.0, 0.5, 20.0])
def test_the_proximal_term_is_that_of_the_paper(mu: float) -> None:
    plan = {"optimizer": "sgd", "weight_decay": 0.0, "augmentation": "none", "batch_size": 64, "balance": False}
    study = with_strategy(made_study(**plan, local_epochs=6, learning_rate=0.01), name="fedprox", proximal_mu=mu)
    cohort, net = made_cohort(), nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 1))
    start = networks.to_vector(net)
    update = learning.learn(net, cohort, study, round_number=2)
    assert [layer.name for layer in networks.layout(net)] == ["1.weight", "1.bias"]
    np.testing.assert_allclose(update.delta, proximal_by_hand(cohort, start, mu, 0.01, 6), rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_fedprox_with_mu_zero_is_fedavg_bit_for_bit(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same random choices, that is, which follow from the whole study."""
    monkeypatch.setattr(learning, "_randomness", lambda *_: (torch.Generator().manual_seed(3), 4))
    plain, cohort = made_study(optimizer=optimizer, local_epochs=2), made_cohort()
    wanted = learned(plain, cohort)
    same = learned(with_strategy(plain, name="fedprox", proximal_mu=0.0), cohort)
    assert same.delta.tobytes() == wanted.delta.tobytes() and same.loss == wanted.loss
    held = learned(with_strategy(plain, name="fedprox", proximal_mu=0.01), cohort)
    assert held.delta.tobytes() != wanted.delta.tobytes()


def test_a_larger_mu_keeps_a_site_nearer_to_the_common_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "_randomness", lambda *_: (torch.Generator().manual_seed(3), 4))
    plain, cohort = made_study(optimizer="sgd", local_epochs=4, learning_rate=0.02), made_cohort()
    moved = [
        float(np.linalg.norm(learned(with_strategy(plain, name="fedprox", proximal_mu=mu), cohort).delta))
        for mu in (0.0, 1.0, 10.0)
    ]
    assert moved[0] > moved[1] > moved[2] > 0


def test_weights_that_are_not_trained_are_not_pulled() -> None:
    study = with_strategy(made_study(), name="fedprox", proximal_mu=1.0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 4), nn.Linear(4, 1))
    for parameter in net[1].parameters():
        parameter.requires_grad_(False)
    frozen = [parameter.clone() for parameter in net[1].parameters()]
    update = learning.learn(net, made_cohort(), study, round_number=1)
    assert update.delta.any() and all(map(torch.equal, frozen, net[1].parameters()))


FAULTS = """
import resource
import sys

sys.path.insert(0, sys.argv[1])
import torch
from test_models_learning import Patients, made_study

from models import learning, networks

torch.set_num_threads(1)
study = made_study(batch_size=32)
net, images = networks.build(study), torch.rand(96, 1, 64, 64)
targets = (torch.arange(96)[:, None] % 2).float()
cohort = Patients(images, targets, torch.ones_like(targets), torch.arange(96))
faults = []
for number in range(9):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    learning.learn(net, cohort, study, round_number=1)
    learning.predict(net, cohort)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sorted(faults[4:])[2])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps freed memory by other rules")
def test_memory_of_one_step_is_not_mapped_anew_at_the_next() -> None:
    """A round of three batches maps some thousand pages anew if the C library gives back what each step frees."""
    words = [sys.executable, "-c", FAULTS, str(Path(__file__).parent)]
    told = subprocess.run(words, capture_output=True, text=True, check=True)
    assert int(told.stdout) < 1500
