"""Patients, networks and losses of several tasks, and the sum of their clipped gradients in float64, one patient at a time."""

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from models import learning, networks
from models.study import Study

Batch = tuple[Tensor, ...]
Losses = Callable[[nn.Module, Batch], Tensor]


def study(name: str = "small_cnn") -> Study:
    return Study.model_validate(
        {
            "name": "t", "title": "t", "purpose": "p", "task": {"targets": ["a", "b"]}, "images": {"size_px": 32},
            "network": {"name": name}, "training": {"rounds": 1, "balance": False}, "protection": "plain",
            "privacy": "none", "participation": {"sites": ["n"], "quorum": 1},
        }
    )  # fmt: skip


def radiographs(count: int, images: int, size: int = 32) -> list[Batch]:
    """Patients with `images` images each and two targets, some of them unknown."""
    g = torch.Generator().manual_seed(count * 10 + images)
    return [
        (
            torch.rand(1, images, 1, size, size, generator=g),
            (torch.rand(1, images, 2, generator=g) > 0.5).float(),
            (torch.rand(1, images, 2, generator=g) > 0.2).float(),
        )
        for _ in range(count)
    ]


# Other tasks, so that the mechanism is not one of radiographs alone.


def dice(net: nn.Module, batch: Batch) -> Tensor:
    """Soft Dice of each patient by itself: images (B, K, 1, ...), masks alike."""
    images, masks = batch
    found = net(images.flatten(0, 1)).sigmoid().reshape(masks.shape).flatten(1)
    truth = masks.flatten(1)
    return 1 - (2 * (found * truth).sum(1) + 1) / (found.sum(1) + truth.sum(1) + 1)


def squares(net: nn.Module, batch: Batch) -> Tensor:
    images, values = batch
    return (net(images.flatten(0, 1)).reshape(values.shape) - values).square().mean(dim=1)


def scans(shape: tuple[int, ...], count: int = 3, images: int = 1) -> list[Batch]:
    g = torch.Generator().manual_seed(7)
    return [
        (torch.rand(1, images, 1, *shape, generator=g), (torch.rand(1, images, 1, *shape, generator=g) > 0.6).float())
        for _ in range(count)
    ]


def unet(dimensions: int) -> nn.Module:
    from monai.networks.nets import UNet

    return UNet(dimensions, 1, 1, channels=(4, 8), strides=(2,), num_res_units=1, norm="instance")


def segresnet() -> nn.Module:
    from monai.networks.nets import SegResNet

    return SegResNet(3, init_filters=8, in_channels=1, out_channels=1, blocks_down=(1, 1), blocks_up=(1,))


def regression() -> tuple[nn.Module, Losses, list[Batch]]:
    g = torch.Generator().manual_seed(9)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 1))
    return net, squares, [(torch.rand(1, 2, 1, 8, 8, generator=g), torch.rand(1, 2, generator=g)) for _ in range(4)]


CASES: dict[str, Callable[[], tuple[nn.Module, Losses, list[Batch]]]] = {
    "small_cnn, 1 image": lambda: (networks.build(study()), learning.patient_losses, radiographs(4, 1)),
    "small_cnn, 2 images": lambda: (networks.build(study()), learning.patient_losses, radiographs(3, 2)),
    "small_cnn, 3 images": lambda: (networks.build(study()), learning.patient_losses, radiographs(3, 3)),
    "linear, 2 images": lambda: (networks.build(study("linear")), learning.patient_losses, radiographs(5, 2)),
    "densenet121, 2 images": lambda: (networks.build(study("densenet121")), learning.patient_losses, radiographs(2, 2)),
    "regression": regression,
    "segmentation 2-D": lambda: (unet(2), dice, scans((16, 16), images=2)),
    "segmentation 3-D": lambda: (unet(3), dice, scans((8, 8, 8))),
    "SegResNet 3-D": lambda: (segresnet(), dice, scans((8, 8, 8), 2)),
}


def reference(net: nn.Module, losses: Losses, units: list[Batch], clip: float) -> tuple[np.ndarray, list[float]]:
    """(sum of clipped gradients in units of the clip norm, norms): all of it in float64, parameter by parameter."""
    wide = copy.deepcopy(net).double()
    trained = [p for p in wide.parameters() if p.requires_grad]
    total, norms = np.zeros(sum(p.numel() for p in trained)), []
    for unit in units:
        found = torch.autograd.grad(
            losses(wide, tuple(part.double() for part in unit)).sum(), trained, allow_unused=True
        )
        flat = np.concatenate(
            [
                np.zeros(p.numel()) if g is None else g.double().numpy().ravel()
                for p, g in zip(trained, found, strict=True)
            ]
        )
        norms.append(float(np.linalg.norm(flat)))
        total += flat * min(1.0, clip / norms[-1]) / clip
    return total, norms
