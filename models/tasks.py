"""What a target means to the loss, the activation and the class weights. A missing label never counts.

Classification and regression: `targets` float (B, T) hold 1 for present and 0 for absent, or the place of a number in its range,
0 to 1; `known` float (B, T) hold 1 where the reference standard says something and 0 where it does not. What `targets` holds
where `known` is 0 reaches no result, not even a NaN.

Segmentation: `masks` float (B, T, *grid) hold 1 within a structure, `known` (B, T) 1 where a structure was annotated. Its loss is
cross-entropy plus Dice loss, structure by structure. Of an empty mask there is nothing to overlap with, so its Dice loss is left
out and the cross-entropy alone asks for emptiness: the Dice loss of an empty mask is flat almost everywhere.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from privacy.errors import MessageMalformed

Each = Callable[[Tensor, Tensor], Tensor]
"""The loss of each target of each image, of the shape of its logits and targets."""
HUBER = 0.25  # of the range: a larger error counts in proportion, not squared, because a score may be a slip of the pen


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Of a target that is present or absent."""
    return functional.binary_cross_entropy_with_logits(logits, target, reduction="none")


def distance(logits: Tensor, target: Tensor) -> Tensor:
    """Of a number: Huber's loss of the predicted place in its range, in units in which HUBER costs a half."""
    return functional.huber_loss(torch.sigmoid(logits), target, reduction="none", delta=HUBER) / HUBER**2


EACH: dict[str, Each] = {"classification": cross_entropy, "regression": distance}
"""By `task.kind`."""


def class_weights(targets: Tensor, known: Tensor, *, balance: bool) -> Tensor:
    """Weights float32 (T, 2), column 0 for absent, 1 for present; their mean over the labelled images is 1 per target.

    With `balance`, both classes of a target count equally: n / (2 n_class). A target of which a site has only one class
    (a ward of confirmed cases) or no label keeps weight 1: there is nothing to balance, and nothing divides by 0.
    """
    weights = torch.ones(targets.shape[1], 2)
    if not balance:
        return weights
    present = ((targets == 1) & (known > 0)).sum(dim=0)
    absent = ((targets == 0) & (known > 0)).sum(dim=0)
    both = (present > 0) & (absent > 0)
    counts = torch.stack([absent, present], dim=1).to(torch.float32)
    balanced = counts.sum(dim=1, keepdim=True) / (2 * counts.clamp(min=1))
    return torch.where(both[:, None], balanced, weights)


def loss(logits: Tensor, targets: Tensor, known: Tensor, weights: Tensor, each_of: Each = cross_entropy) -> Tensor:
    """Weighted loss, a scalar: the mean of `each_of` over known labels (0 if there is none, with a zero gradient).

    logits, targets, known: (B, T); weights: (T, 2) of `class_weights`. Raises MessageMalformed when shapes differ.
    """
    if not logits.shape == targets.shape == known.shape or weights.shape != (logits.shape[1], 2):
        shapes = ", ".join(str(tuple(part.shape)) for part in (logits, targets, known, weights))
        raise MessageMalformed(f"logits, targets, known and class weights do not fit together: {shapes}")
    labelled = known > 0
    # A NaN in a missing cell would survive a product with 0, so missing cells are replaced before anything is computed.
    target = torch.where(labelled, targets, torch.zeros_like(targets)).to(logits.dtype)
    weight = torch.where(target > 0.5, weights[:, 1], weights[:, 0]).to(logits.dtype) * labelled
    return (each_of(logits, target) * weight).sum() / labelled.sum().clamp(min=1)


def unit_losses(logits: Tensor, targets: Tensor, known: Tensor, each_of: Each = cross_entropy) -> Tensor:
    """The loss of each unit by itself, (B,): the mean of `each_of` over the known labels of its images, 0 without one.

    logits, targets, known: (B, K, T), the K images of unit b in row b. No row enters another's loss, not even as a
    denominator. Raises MessageMalformed when shapes differ.
    """
    if not logits.shape == targets.shape == known.shape or logits.ndim != 3:
        shapes = ", ".join(str(tuple(part.shape)) for part in (logits, targets, known))
        raise MessageMalformed(f"logits, targets and known do not fit together: {shapes}")
    labelled = known > 0
    target = torch.where(labelled, targets, torch.zeros_like(targets)).to(logits.dtype)
    each = each_of(logits, target) * labelled
    return each.sum(dim=(1, 2)) / labelled.sum(dim=(1, 2)).clamp(min=1)


def mask_losses(logits: Tensor, masks: Tensor) -> Tensor:
    """(B, T) of logits and masks (B, T, *grid): mean cross-entropy of the voxels plus, unless the mask is empty, soft Dice loss.

    Nothing of one image enters another's. Raises MessageMalformed when shapes differ.
    """
    if logits.shape != masks.shape or logits.ndim < 4:
        raise MessageMalformed(f"logits and masks do not fit together: {tuple(logits.shape)}, {tuple(masks.shape)}")
    truth = masks.to(logits.dtype).flatten(2)
    given = logits.flatten(2)
    entropy = functional.binary_cross_entropy_with_logits(given, truth, reduction="none").mean(dim=2)
    scores, size = torch.sigmoid(given), truth.sum(dim=2)
    # A voxel more in the denominator: never 0 / 0, also where the product with `size > 0` throws the result away.
    overlap = 2 * (scores * truth).sum(dim=2) / (scores.sum(dim=2) + size + 1)
    return entropy + (1 - overlap) * (size > 0).to(logits.dtype)


def mask_loss(logits: Tensor, masks: Tensor, known: Tensor) -> Tensor:
    """The mean of `mask_losses` over annotated structures, a scalar (0 if there is none, with a zero gradient)."""
    labelled = (known > 0).to(logits.dtype)
    return (mask_losses(logits, masks) * labelled).sum() / labelled.sum().clamp(min=1)


def unit_mask_losses(logits: Tensor, masks: Tensor, known: Tensor) -> Tensor:
    """The loss of each unit by itself, (B,), as `unit_losses`: logits and masks (B, K, T, *grid), known (B, K, T)."""
    labelled = (known > 0).to(logits.dtype)
    each = mask_losses(logits.flatten(0, 1), masks.flatten(0, 1)).reshape(known.shape) * labelled
    return each.sum(dim=(1, 2)) / labelled.sum(dim=(1, 2)).clamp(min=1)


def activation(logits: Tensor) -> Tensor:
    """Scores in [0, 1] of the logits' shape: each target on its own (sigmoid), because several may occur together."""
    return torch.sigmoid(logits)
