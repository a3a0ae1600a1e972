"""The local loop: what one site does in one round, and how it scores images. Knows neither Flower nor hospitals.

A round is reproducible: on one machine, with one number of threads, the same model, cohort, study and round give the
same update bit for bit. Everything random comes from generators seeded by the study's seed, what it learns and the round;
the process's own random state is neither used nor changed.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor, nn
from torch.nn import functional

from models import networks, tasks
from models.study import Study, Training
from privacy.errors import CohortTooSmall, MessageMalformed, TrainingDiverged, TrainingStopped

SEED_LABEL = b"isocenter/v1/seed"
MOMENTUM = 0.9  # of sgd, with Nesterov's correction
GRADIENT_NORM_MAX = 5.0  # a longer gradient is a single odd batch; ordinary ones of these losses stay below 3
WARM_UP_ROUNDS = 2  # fresh GroupNorm networks take a full first step badly: half the rate in the first round


class TrainingCohort(Protocol):
    """The labelled images of one site and split, in memory. Row i of all four belongs to one image."""

    images: Tensor  # float32 or float16 (N, 1, S, S) in [0, 1]
    targets: Tensor  # float32 (N, T)
    known: Tensor  # float32 (N, T): 1 where the label is known
    patients: Tensor  # int64 (N,): number of the patient


@dataclass(frozen=True, eq=False)
class Update:
    """What one round of local training amounts to."""

    delta: NDArray[np.float32]
    """float32 (P,): weights after minus weights before, in the order of `networks.layout`."""
    cases: int
    """Images with at least one known label: what the update weighs in the mean."""
    steps: int
    loss: float
    """Mean training loss over all steps of the round, weighted by images."""


def learn(
    net: nn.Module,
    cohort: TrainingCohort,
    study: Study,
    *,
    round_number: int,
    repeat: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> Update:
    """Train `net` in place for one round (from 1) and return what changed.

    `repeat` counts earlier trainings of the same round: each makes other random choices, so that no two of them give the
    same update, and the difference of two sums of a repeated round is not a single site's update.
    `stop` is asked before every step. Raises TrainingStopped if it says so, TrainingDiverged as soon as a loss or
    weight is not finite, CohortTooSmall if no image has a label; the weights of `net` are then unspecified and must not
    be used.
    """
    plan, before = study.training, networks.to_vector(net)
    labelled = torch.nonzero(cohort.known.sum(dim=1) > 0).flatten()
    if len(labelled) == 0:
        raise CohortTooSmall("no image of the training split has a known label")
    generator, torch_seed = _randomness(study, round_number, repeat)
    weights = tasks.class_weights(cohort.targets[labelled], cohort.known[labelled], balance=plan.balance)
    optimizer = _optimizer(net, plan, learning_rate(plan, round_number))
    total, steps, seen = 0.0, 0, 0
    net.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed)  # dropout draws from the process's generator and takes no other
        for rows in _batches(labelled, plan, generator):
            if stop():
                raise TrainingStopped(f"stopped after {steps} steps of round {round_number}")
            images = cohort.images[rows].to(torch.float32)
            if plan.augmentation == "light":
                images = augment(images, generator)
            value = _step(net, optimizer, images, (cohort.targets[rows], cohort.known[rows], weights))
            total, steps, seen = total + value * len(rows), steps + 1, seen + len(rows)
    delta = networks.to_vector(net) - before
    if not np.isfinite(delta).all():
        raise TrainingDiverged(f"a weight is not a finite number after {steps} steps of round {round_number}")
    return Update(delta, len(labelled), steps, total / seen)


def predict(net: nn.Module, cohort: TrainingCohort, batch: int = 64) -> NDArray[np.float32]:
    """Scores float32 (N, T) in [0, 1], in the order of the cohort; the same for any batch size up to rounding.

    Raises TrainingDiverged if the network answers with something that is not a number.
    """
    net.eval()
    with torch.inference_mode():
        parts = [tasks.activation(net(images.to(torch.float32))) for images in torch.split(cohort.images, batch)]
        scores: NDArray[np.float32] = torch.cat(parts).numpy() if parts else np.zeros(cohort.targets.shape, np.float32)
    if not np.isfinite(scores).all():
        raise TrainingDiverged("the network answers with values that are not numbers")
    return scores


def evaluation_loss(scores: NDArray[np.float32], cohort: TrainingCohort) -> float:
    """Mean unweighted cross-entropy of `scores` (N, T) over the known labels of `cohort`; 0 if there is none."""
    if scores.shape != tuple(cohort.targets.shape):
        raise MessageMalformed(f"scores {scores.shape} do not belong to targets {tuple(cohort.targets.shape)}")
    logits = torch.logit(torch.from_numpy(scores).to(torch.float64), eps=2.0**-24)
    plain = torch.ones(scores.shape[1], 2)
    return float(tasks.loss(logits, cohort.targets, cohort.known, plain))


def learning_rate(plan: Training, round_number: int) -> float:
    """The rate of a whole round: constant, or falling along half a cosine to almost 0, after a short warm-up."""
    warm = min(1.0, round_number / WARM_UP_ROUNDS)
    if plan.schedule == "constant":
        return plan.learning_rate * warm
    passed = (round_number - 1) / plan.rounds
    return plan.learning_rate * warm * (1 + math.cos(math.pi * min(passed, 1.0))) / 2


def augment(images: Tensor, generator: Generator) -> Tensor:
    """A copy of `images` float32 (B, 1, S, S), each moved and re-exposed a little, still within [0, 1]; S is kept.

    Geometry as a technician varies it: rotation to 8 degrees, scale to 13 %, shift to 4 % of the side, slight shear.
    Exposure as devices vary it: gamma, contrast, brightness. Nothing is mirrored: the side of the heart is information.
    """
    count = len(images)

    def jitter(reach: float) -> Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * reach

    angle, scale, shear, right, down = jitter(0.144), torch.exp(jitter(0.12)), jitter(0.05), jitter(0.08), jitter(0.08)
    stretch = torch.exp(jitter(0.05))
    cosine, sine = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = torch.stack([cosine * stretch, shear - sine, right], 1), torch.stack([sine, cosine / stretch, down], 1)
    grid = functional.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    moved = functional.grid_sample(images, grid, align_corners=False).clamp(0, 1)
    exposure = torch.exp(jitter(0.3)), torch.exp(jitter(0.2)), jitter(0.1)
    gamma, contrast, brightness = (part[:, None, None, None] for part in exposure)
    return ((moved.pow(gamma) - 0.5) * contrast + 0.5 + brightness).clamp(0, 1)


def _step(
    net: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, truth: tuple[Tensor, Tensor, Tensor]
) -> float:
    """One optimizer step; returns the loss before it. Raises TrainingDiverged if that is not finite."""
    value = tasks.loss(net(images), *truth)
    mean = float(value.detach())
    if not math.isfinite(mean):
        raise TrainingDiverged("the training loss is not a finite number")
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(value)
    nn.utils.clip_grad_norm_(net.parameters(), GRADIENT_NORM_MAX)
    optimizer.step()
    return mean


def _batches(labelled: Tensor, plan: Training, generator: Generator) -> Iterator[Tensor]:
    """Row numbers (B,): every labelled image once per epoch, in a new order."""
    for _ in range(plan.local_epochs):
        order = labelled[torch.randperm(len(labelled), generator=generator)]
        yield from torch.split(order, plan.batch_size)


def _optimizer(net: nn.Module, plan: Training, rate: float) -> torch.optim.Optimizer:
    """The study's optimizer. Gains and biases are not decayed: a norm's gain near 0 switches channels off."""
    kernels = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim <= 1]
    groups = [{"params": kernels, "weight_decay": plan.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if plan.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=MOMENTUM, nesterov=True)
    return torch.optim.AdamW(groups, lr=rate)


def _randomness(study: Study, round_number: int, repeat: int) -> tuple[Generator, int]:
    """A generator for order and augmentation, and a seed for dropout, of this study, round and repeat and of no other."""
    text = f"{study.training.seed} {study.learned} {round_number} {repeat}".encode()
    digest = hashlib.sha256(SEED_LABEL + b"\n" + text).digest()
    # 63 bits: torch takes seeds as signed 64-bit numbers.
    first, second = (int.from_bytes(digest[i : i + 8], "big") >> 1 for i in (0, 8))
    return torch.Generator().manual_seed(first), second
