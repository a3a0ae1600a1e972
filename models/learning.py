"""The local loop: what one site does in one round, and how it scores images. Knows neither Flower nor hospitals.

A round without differential privacy is reproducible: on one machine, with one number of threads, the same model, cohort, study
and round give the same update bit for bit. Everything random comes from generators seeded by the study's seed, what it learns
and the round; the process's own random state is neither used nor changed. With differential privacy the draw of patients and the
noise come from the operating system's entropy, because whoever knew their seed could take the noise away again; the study's seed
then drives augmentation and dropout only.
"""

import hashlib
import logging
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
from models.descent import Descent, Rule
from models.study import Privacy, Study, Training
from privacy import dpsgd, noise
from privacy.errors import CohortTooSmall, MessageMalformed, PrivacyError, TrainingDiverged, TrainingStopped

SEED_LABEL = b"isocenter/v1/seed"
SAMPLES = 4  # stand-ins for patients on which engines are compared before the first private round
log = logging.getLogger("isocenter.privacy")
MOMENTUM = 0.9  # of sgd, with Nesterov's correction; SCAFFOLD has none
GRADIENT_NORM_MAX = 5.0  # a longer gradient is a single odd batch; ordinary ones of these losses stay below 3


class TrainingCohort(Protocol):
    """The labelled images of one site and split, in memory. Row i of all four belongs to one image.

    Where the study names covariates it also has `covariates`, as `covariates_of` gives them.
    """

    images: Tensor  # float32 or float16 (N, 1, S, S) or (N, 1, D, H, W) in [0, 1]
    targets: Tensor  # float32 (N, T); of a segmentation uint8 (N, T, *grid), the masks
    known: Tensor  # float32 (N, T): 1 where the label is known
    patients: Tensor  # int64 (N,): number of the patient


def covariates_of(cohort: TrainingCohort) -> Tensor:
    """float32 (N, C) in the study's units and order, NaN where missing; (N, 0) of a study that learns from images alone."""
    found: Tensor | None = getattr(cohort, "covariates", None)
    return torch.zeros(len(cohort.images), 0) if found is None else found


def inputs(images: Tensor, values: Tensor) -> tuple[Tensor, ...]:
    """What a network takes of some images and the covariates beside them."""
    return (images, values) if values.shape[-1] else (images,)


@dataclass(frozen=True, eq=False)
class Update:
    """What one round of local training amounts to."""

    delta: NDArray[np.float32] | NDArray[np.float64]
    """(P,): weights after minus weights before, in the order of `networks.layout`, float32; a private sum is float64."""
    cases: int
    """Images with at least one known label: what the update weighs in the mean. Private: the cohort's public size."""
    steps: int
    loss: float
    """Mean training loss over all steps of the round, weighted by images. Private: 0, because it is not released."""
    summed: bool = False
    """Whether `delta` is a sum over patients already, so that `cases` must not weigh it a second time."""


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
    return _learn(net, cohort, study, (round_number, repeat), None, stop)


def learn_steered(
    net: nn.Module, cohort: TrainingCohort, study: Study, control: "Control", *, round_number: int, repeat: int = 0
) -> Update:
    """`learn` with SCAFFOLD: `control` corrects each step, and has the site's next variate afterwards."""
    return _learn(net, cohort, study, (round_number, repeat), control, lambda: False)


def _learn(
    net: nn.Module,
    cohort: TrainingCohort,
    study: Study,
    turn: tuple[int, int],
    control: "Control | None",
    stop: Callable[[], bool],
) -> Update:
    """`turn`: number of the round, and earlier trainings of it."""
    keep_heap()
    plan, before, round_number = study.training, networks.to_vector(net), turn[0]
    labelled = torch.nonzero(cohort.known.sum(dim=1) > 0).flatten()
    if len(labelled) == 0:
        raise CohortTooSmall("no image of the training split has a known label")
    generator, torch_seed = _randomness(study, *turn)
    weights, kind = torch.ones(cohort.known.shape[1], 2), study.task.kind
    if kind == "classification":  # neither numbers nor masks have classes
        weights = tasks.class_weights(cohort.targets[labelled], cohort.known[labelled], balance=plan.balance)
    each = tasks.EACH.get(kind, tasks.cross_entropy)
    optimizer = _optimizer(net, plan, plan.rate(round_number), MOMENTUM if control is None else 0.0)
    pull, values = Proximal.of(net, study), covariates_of(cohort)
    total, steps, seen = 0.0, 0, 0
    net.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed)  # dropout draws from the process's generator and takes no other
        for rows in _batches(labelled, plan, generator):
            if stop():
                raise TrainingStopped(f"stopped after {steps} steps of round {round_number}")
            images, targets = views(cohort, rows, study, generator)
            given, truth = inputs(images, values[rows]), (targets, cohort.known[rows], weights, each)
            value = _step(net, optimizer, given, truth, pull, control)
            total, steps, seen = total + value * len(rows), steps + 1, seen + len(rows)
    optimizer.zero_grad()
    del optimizer  # three times the size of the network; what follows needs room for the update
    delta = networks.to_vector(net)
    delta -= before
    if not np.isfinite(delta).all():
        raise TrainingDiverged(f"a weight is not a finite number after {steps} steps of round {round_number}")
    return Update(delta, len(labelled), steps, total / seen)


@dataclass(frozen=True)
class Turn:
    """Which round it is (from 1), and what sums over patients are divided by: fixed once for the study at a site."""

    round: int
    public_size: int


def engine_of(net: nn.Module, study: Study) -> dpsgd.Engine:
    """The fastest sound engine for `net` on this machine and pictures of this shape; raises UnitsCoupled if patients meet in it.

    It is chosen on stand-ins: engines round differently, so a patient must not have a say in which of them computes the others.
    """
    plan, generator = private(study), Generator().manual_seed(0)
    shape, targets, images = study.images.shape, len(study.task.targets), plan.images_per_patient
    grid = shape[1:] if study.segments else ()
    samples = [
        (
            *inputs(
                torch.rand(1, images, *shape, generator=generator),
                torch.rand(1, images, len(study.covariates), generator=generator),
            ),
            (torch.rand(1, images, targets, *grid, generator=generator) > 0.5).float(),
            torch.ones(1, images, targets),
        )
        for _ in range(SAMPLES)
    ]
    net.train()
    return dpsgd.choose(net, losses_of(study), samples, dpsgd.Clip(plan.clip_norm))


def learn_privately(
    engine: dpsgd.Engine,
    net: nn.Module,
    cohort: TrainingCohort,
    study: Study,
    turn: Turn,
    *,
    stop: Callable[[], bool] = lambda: False,
) -> Update:
    """One round with differential privacy of every patient; `engine` is that of `net`.

    local: several steps of the study's optimizer on noisy gradients; the update is the change of the weights, and ε holds
    for whoever sees it. distributed: no step here; the update is the noisy sum of clipped gradients of one draw, in
    units of the clip norm, exact multiples of 2**-GRID_BITS, to be summed with those of other sites.

    `stop` is asked before every patient. Raises TrainingStopped if it says so, TrainingDiverged if a weight is not finite,
    CohortTooSmall if no patient has a label, PrivacyError if the network has values that are no weights. Weights that the study
    leaves as they are get neither a gradient nor noise: the update is exactly zero there.
    """
    plan, stream, before = private(study), noise.Keystream(), networks.to_vector(net)
    rows, clip = labelled_patients(cohort), dpsgd.Clip(plan.clip_norm)
    if sum(p.numel() for p in net.parameters()) != before.size:
        raise PrivacyError("the network has values that are no weights; a private update is made of gradients alone")
    moved = networks.trained_places(net)
    # A generator that others know, handed from patient to patient, would let the presence of one move the views of the next: the
    # sum would change by more than one patient's gradient. Drawn in secret, everybody's views are the same lottery either way.
    generator = Generator().manual_seed(int(stream.words(1)[0]) >> 1)
    optimizer = _optimizer(net, study.training, study.training.rate(turn.round))
    batch_max = plan.batch_max(len(rows))

    def units() -> Iterator[dpsgd.Batch]:
        for patient in noise.poisson_sample(len(rows), plan.sampling_rate, stream, batch_max):
            if stop():
                raise TrainingStopped(f"stopped in round {turn.round}")
            yield unit(cohort, rows[patient], study, generator)

    noisy: NDArray[np.int64] | None = None  # memory that every step uses again
    gradient: NDArray[np.float32] | None = None
    net.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(stream.words(1)[0]) >> 1)  # dropout draws from the process's generator
        for step in range(plan.steps):
            multiplier = plan.noise_multiplier or 0.0
            noisy, seen = dpsgd.private_gradient(engine, units(), clip, multiplier, stream, noisy)
            log.debug("step %d: %d patients, %d clipped, %d not finite", step, seen.units, seen.clipped, seen.nonfinite)
            if seen.nonfinite:
                log.warning("%d patients gave a gradient that is not finite; they count as zero", seen.nonfinite)
            if plan.mode == "distributed":
                # In float64, which holds these numbers exactly: rounding each site's before the sum is not rounding the sum.
                scaled = noisy * 2.0**-clip.bits
                return Update(networks.placed(scaled, moved), turn.public_size, 1, 0.0, summed=True)
            # The public size, never the number that was drawn or is there: a denominator says who takes part.
            factor = 2.0**-clip.bits * plan.clip_norm / (plan.sampling_rate * turn.public_size)
            gradient = np.empty(noisy.size, np.float32) if gradient is None else gradient
            np.multiply(noisy, factor, out=gradient, dtype=np.float64, casting="unsafe")  # float64 a block at a time
            descend(net, optimizer, gradient)
    delta = networks.to_vector(net) - before
    if not np.isfinite(delta).all():
        raise TrainingDiverged(f"a weight is not a finite number after {plan.steps} steps of round {turn.round}")
    return Update(delta, turn.public_size, plan.steps, 0.0)


def keep_heap() -> None:
    """Let the C library keep what steps free, up to 62 MiB.

    It gives memory back above twice the largest block that was ever freed. A small network's blocks are small: its activations
    would be mapped and zeroed anew at each step, a sixth of its time. So a large block is got, not touched, and freed.
    """
    torch.empty(dpsgd.HEAP, dtype=torch.uint8)


def private(study: Study) -> Privacy:
    """The study's settings of differential privacy; raises PrivacyError if it has none."""
    if study.privacy == "none":
        raise PrivacyError("the study asks for no differential privacy")
    return study.privacy


def predict(net: nn.Module, cohort: TrainingCohort, batch: int = 32) -> NDArray[np.float32]:
    """Scores float32 (N, T) in [0, 1], in the order of the cohort; the same for any batch size up to rounding.

    Raises TrainingDiverged if the network answers with something that is not a number.
    """
    keep_heap()
    net.eval()
    with torch.inference_mode():
        rows = zip(torch.split(cohort.images, batch), torch.split(covariates_of(cohort), batch), strict=True)
        parts = [tasks.activation(net(*inputs(images.to(torch.float32), values))) for images, values in rows]
        scores: NDArray[np.float32] = torch.cat(parts).numpy() if parts else np.zeros(cohort.targets.shape, np.float32)
    if not np.isfinite(scores).all():
        raise TrainingDiverged("the network answers with values that are not numbers")
    return scores


def outlined(net: nn.Module, cohort: TrainingCohort, batch: int = 4) -> Iterator[tuple[int, NDArray[np.bool_], float]]:
    """Of each image in order: its row, what `net` outlines bool (T, *grid), and the mean loss over its annotated structures.

    One image after the other, so that the masks of a whole split are never in memory. Raises TrainingDiverged as `predict` does.
    """
    net.eval()
    for rows in torch.split(torch.arange(len(cohort.images)), batch):
        masks, known = cohort.targets[rows].to(torch.float32), cohort.known[rows]
        with torch.inference_mode():
            logits = net(cohort.images[rows].to(torch.float32))
            losses = tasks.mask_losses(logits, masks) * known
        if not bool(torch.isfinite(logits).all()):
            raise TrainingDiverged("the network answers with values that are not numbers")
        means = losses.sum(dim=1) / known.sum(dim=1).clamp(min=1)
        for place, row in enumerate(rows.tolist()):
            yield row, (logits[place] > 0).numpy(), float(means[place])


def evaluation_loss(scores: NDArray[np.float32], cohort: TrainingCohort, kind: str = "classification") -> float:
    """Mean unweighted loss of `scores` (N, T), for a task of `kind`, over the known labels of `cohort`; 0 if there is none."""
    if scores.shape != tuple(cohort.targets.shape):
        raise MessageMalformed(f"scores {scores.shape} do not belong to targets {tuple(cohort.targets.shape)}")
    logits = torch.logit(torch.from_numpy(scores).to(torch.float64), eps=2.0**-24)
    plain = torch.ones(scores.shape[1], 2)
    return float(tasks.loss(logits, cohort.targets, cohort.known, plain, tasks.EACH[kind]))


def views(cohort: TrainingCohort, rows: Tensor, study: Study, generator: Generator) -> tuple[Tensor, Tensor]:
    """(images, targets) of `rows`, float32, as the study augments them: what moves an image moves its masks as well."""
    images, targets = cohort.images[rows].to(torch.float32), cohort.targets[rows].to(torch.float32)
    if study.training.augmentation == "none":
        return images, targets
    if not study.segments:
        return augment(images, generator), targets
    return _moved_together(images, targets, generator)


def _moved_together(images: Tensor, masks: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Both moved by the same draw of `augment`; a voxel belongs to a structure where at least half of it does."""
    drawn = generator.get_state()
    moved = augment(images, generator)
    after = generator.get_state()
    parts = []
    for structure in range(masks.shape[1]):
        generator.set_state(drawn)
        parts.append(augment(masks[:, structure : structure + 1], generator, exposed=False) >= 0.5)
    generator.set_state(after)
    return moved, torch.cat(parts, dim=1).to(torch.float32)


def augment(images: Tensor, generator: Generator, *, exposed: bool = True) -> Tensor:
    """A copy of `images` float32 (B, 1, S, S) or (B, 1, D, H, W), each moved a little, still within [0, 1]; the shape is kept.

    Geometry as a technician varies it: rotation to 8 degrees, scale to 13 %, shift to 4 % of the side, slight shear; of volumes
    within their slices. Exposure of radiographs as devices vary it: gamma, contrast, brightness; Hounsfield units mean the same
    everywhere and stay. Nothing is mirrored: the side of the heart is information. Without `exposed`, geometry alone.
    """
    count = len(images)

    def jitter(reach: float) -> Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * reach

    angle, scale, shear, right, down = jitter(0.144), torch.exp(jitter(0.12)), jitter(0.05), jitter(0.08), jitter(0.08)
    stretch = torch.exp(jitter(0.05))
    cosine, sine = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = torch.stack([cosine * stretch, shear - sine, right], 1), torch.stack([sine, cosine / stretch, down], 1)
    if images.dim() == 5:
        return _moved_slices(images, rows, jitter(0.08))
    grid = functional.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    moved = functional.grid_sample(images, grid, align_corners=False).clamp(0, 1)
    if not exposed:
        return moved
    exposure = torch.exp(jitter(0.3)), torch.exp(jitter(0.2)), jitter(0.1)
    gamma, contrast, brightness = (part[:, None, None, None] for part in exposure)
    return ((moved.pow(gamma) - 0.5) * contrast + 0.5 + brightness).clamp(0, 1)


def _moved_slices(volumes: Tensor, rows: tuple[Tensor, Tensor], along: Tensor) -> Tensor:
    """`volumes` float32 (B, 1, D, H, W), each slice moved by `rows` (B, 3) of an affine map, and all of them by `along`."""
    zero, one = torch.zeros_like(along), torch.ones_like(along)
    flat = [torch.stack([row[:, 0], row[:, 1], zero, row[:, 2]], 1) for row in rows]
    maps = torch.stack(
        [*flat, torch.stack([zero, zero, one, along], 1)], dim=1
    )  # (B, 3, 4), in the order across, down, along
    grid = functional.affine_grid(maps, list(volumes.shape), align_corners=False)
    return functional.grid_sample(volumes, grid, align_corners=False).clamp(0, 1)


def first_images(cohort: TrainingCohort, most: int) -> NDArray[np.int64]:
    """Rows of at most `most` images of each patient: which ones depends on this patient alone."""
    taken: dict[int, int] = {}
    rows = []
    for row, patient in enumerate(cohort.patients.tolist()):
        taken[patient] = taken.get(patient, 0) + 1
        if taken[patient] <= most:
            rows.append(row)
    return np.array(rows, np.int64)


def labelled_patients(cohort: TrainingCohort) -> list[Tensor]:
    """For each patient with a known label, in order of number: the rows of its labelled images. CohortTooSmall if none has."""
    labelled = torch.nonzero(cohort.known.sum(dim=1) > 0).flatten()
    found: dict[int, list[int]] = {}
    for row, patient in zip(labelled.tolist(), cohort.patients[labelled].tolist(), strict=True):
        found.setdefault(patient, []).append(row)
    if not found:
        raise CohortTooSmall("no patient of the training split has a known label")
    return [torch.tensor(found[patient]) for patient in sorted(found)]


def unit(cohort: TrainingCohort, rows: Tensor, study: Study, generator: Generator) -> dpsgd.Batch:
    """One patient: images (1, K, 1, S, S), where the study has them covariates (1, K, C), targets (1, K, T) or masks
    (1, K, T, *grid), known (1, K, T).

    K images of those in `rows`, without repetition while there are enough; then further views of the same.
    """
    plan = private(study)
    order = rows[torch.randperm(len(rows), generator=generator)]
    chosen = order.repeat(-(-plan.images_per_patient // len(order)))[: plan.images_per_patient]
    images, targets = views(cohort, chosen, study, generator)
    given = inputs(images[None], covariates_of(cohort)[chosen][None])
    return *given, targets[None], cohort.known[chosen][None]


def losses_of(study: Study) -> dpsgd.Losses:
    """What gives the loss of each patient in `study`."""
    return patient_distances if study.task.kind == "regression" else patient_losses


def patient_distances(net: nn.Module, batch: dpsgd.Batch) -> Tensor:
    """Loss (B,) of each patient of `batch`, whose target is a number: the mean over its images."""
    return patient_losses(net, batch, tasks.distance)


def patient_losses(net: nn.Module, batch: dpsgd.Batch, each: tasks.Each = tasks.cross_entropy) -> Tensor:
    """Loss (B,) of each patient of `batch`: the mean over its images."""
    *given, targets, known = batch
    logits: Tensor = net(*(part.flatten(0, 1) for part in given))
    if targets.ndim > known.ndim:
        return tasks.unit_mask_losses(logits.reshape(targets.shape), targets, known)
    return tasks.unit_losses(logits.reshape(targets.shape), targets, known, each)


def descend(net: nn.Module, optimizer: Descent, gradient: NDArray[np.float32]) -> None:
    """One step of `optimizer` along `gradient`, one value for each trained weight in the order of the network's parameters."""
    start = 0
    for parameter in net.parameters():
        if parameter.requires_grad:
            size = parameter.numel()
            parameter.grad = torch.from_numpy(gradient[start : start + size]).reshape(parameter.shape)
            start += size
    optimizer.step()
    optimizer.zero_grad()


@dataclass(frozen=True, eq=False)
class Proximal:
    """What keeps a site near the common model: the gradient of mu/2 |w - start|^2 (Li et al. 2020, FedProx, algorithm 2)."""

    mu: float
    start: list[Tensor]  # the trained parameters as the round began, in the network's order

    @classmethod
    def of(cls, net: nn.Module, study: Study) -> "Proximal | None":
        """That of the study's strategy, around the weights that `net` has now; None if the strategy has none."""
        mu = study.strategy.proximal_mu
        return cls(mu, [p.detach().clone() for p in net.parameters() if p.requires_grad]) if mu else None

    def add_to_gradients(self, net: nn.Module) -> None:
        trained = (p for p in net.parameters() if p.requires_grad)
        for parameter, start in zip(trained, self.start, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - start, alpha=self.mu)


class Control:
    """SCAFFOLD at one site in one round (Karimireddy et al. 2020, algorithm 1, option II): y <- y - rate (g - c_i + c).

    `own` is c_i, that of this site, and `common` is c, that of all sites; float32 (P,) each. Gradients are clipped before they
    are corrected, so the site's next variate, c_i - c + (x - y) / (K rate) in the paper, is the mean of the gradients that were
    used, and is taken as that: the quotient would divide a rounding by a rate that falls to zero. Decay is in neither.
    """

    def __init__(self, net: nn.Module, own: NDArray[np.float32], common: NDArray[np.float32]) -> None:
        self.places = networks.trained_places(net)
        self.shapes = [p.shape for p in net.parameters() if p.requires_grad]
        self.correction = self._split((common - own)[self.places])
        self.total = [torch.zeros(shape, dtype=torch.float64) for shape in self.shapes]
        self.steps = 0

    def _split(self, values: NDArray[np.float32]) -> list[Tensor]:
        parts = torch.split(torch.from_numpy(values), [math.prod(shape) for shape in self.shapes])
        return [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def correct(self, net: nn.Module) -> None:
        """Note the gradients of `net`, and correct them."""
        trained = (p for p in net.parameters() if p.requires_grad)
        self.steps += 1
        for parameter, total, correction in zip(trained, self.total, self.correction, strict=True):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            total.add_(parameter.grad)
            parameter.grad.add_(correction)

    @property
    def variate(self) -> NDArray[np.float32]:
        """float32 (P,): the site's next variate, exactly zero where nothing is trained."""
        mean = torch.cat([total.reshape(-1) for total in self.total]) / max(1, self.steps)
        return networks.placed(mean.numpy().astype(np.float32), self.places)


def _step(
    net: nn.Module,
    optimizer: Descent,
    given: tuple[Tensor, ...],
    truth: tuple[Tensor, Tensor, Tensor, tasks.Each],
    pull: Proximal | None = None,
    control: Control | None = None,
) -> float:
    """One optimizer step; returns the loss before it, without `pull`. Raises TrainingDiverged if that is not finite."""
    targets, known, weights, each = truth
    masks, logits = targets.ndim > known.ndim, net(*given)
    value = tasks.mask_loss(logits, targets, known) if masks else tasks.loss(logits, targets, known, weights, each)
    mean = float(value.detach())
    if not math.isfinite(mean):
        raise TrainingDiverged("the training loss is not a finite number")
    optimizer.zero_grad()
    torch.autograd.backward(value)
    if pull is not None:
        pull.add_to_gradients(net)
    nn.utils.clip_grad_norm_(net.parameters(), GRADIENT_NORM_MAX)
    if control is not None:
        control.correct(net)
    optimizer.step()
    return mean


def _batches(labelled: Tensor, plan: Training, generator: Generator) -> Iterator[Tensor]:
    """Row numbers (B,): every labelled image once per epoch, in a new order."""
    for _ in range(plan.local_epochs):
        order = labelled[torch.randperm(len(labelled), generator=generator)]
        yield from torch.split(order, plan.batch_size)


def _optimizer(net: nn.Module, plan: Training, rate: float, momentum: float = MOMENTUM) -> Descent:
    """The study's optimizer of the weights that are trained; others are not even decayed.

    Nor are gains and biases: a norm's gain near 0 switches channels off.
    """
    trained = [p for p in net.parameters() if p.requires_grad]
    kernels, others = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    return Descent([(kernels, plan.weight_decay), (others, 0.0)], Rule(plan.optimizer, rate, momentum))


def _randomness(study: Study, round_number: int, repeat: int) -> tuple[Generator, int]:
    """A generator for order and augmentation, and a seed for dropout, of this study, round and repeat and of no other."""
    text = f"{study.training.seed} {study.learned} {round_number} {repeat}".encode()
    digest = hashlib.sha256(SEED_LABEL + b"\n" + text).digest()
    # 63 bits: torch takes seeds as signed 64-bit numbers.
    first, second = (int.from_bytes(digest[i : i + 8], "big") >> 1 for i in (0, 8))
    return torch.Generator().manual_seed(first), second
