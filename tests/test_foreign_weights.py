"""Weights of other programs: torchvision's names of DenseNet, three colours, and models that Isocenter released."""

import re
from pathlib import Path

import pytest
import safetensors.numpy
import torch
from test_models_weights import other, study
from torch import Tensor, nn

from models import networks, weights


def foreign(colours: int = 1) -> dict[str, Tensor]:
    """DenseNet121 as torchvision and torchxrayvision name it: BatchNorm with its statistics, a head of 18 findings."""
    found: dict[str, Tensor] = {"classifier.weight": torch.zeros(18, 1024), "classifier.bias": torch.zeros(18)}
    for here, value in other("densenet121").items():
        name = re.sub(r"\.layers\.", ".", here.removeprefix("net."))
        if name.startswith("class_layers"):
            continue
        found[name] = value
        if value.dim() == 1 and name.endswith(".weight"):
            found[name] = torch.full_like(value, 9.0)
            stem = name.removesuffix("weight")
            found |= {
                stem + "running_mean": value,
                stem + "running_var": value,
                stem + "num_batches_tracked": torch.tensor(3),
            }
    first = found["features.conv0.weight"]
    found["features.conv0.weight"] = first.expand(-1, colours, -1, -1) / colours
    return found


@pytest.mark.parametrize("colours", [1, 3])
def test_a_densenet_of_torchvision_brings_every_kernel_and_no_statistics(colours: int, tmp_path: Path) -> None:
    tensors = foreign(colours)
    torch.save(tensors, tmp_path / "w.pt")
    plan, expected = study("densenet121"), other("densenet121")
    net, fresh = networks.build(plan), networks.build(plan).state_dict()
    fit = weights.fit(net, plan, weights.read(tmp_path / "w.pt"))
    kernels = {name for name, value in expected.items() if value.dim() == 4}
    assert len(kernels) == 120 and set(fit.taken) == kernels
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, expected[name] if name in kernels else fresh[name])
    assert {"classifier.weight", "features.norm0.weight", "features.norm0.running_mean"} <= set(fit.left)


def test_a_first_convolution_of_three_colours_answers_like_one_of_grey() -> None:
    grey, colour = torch.rand(1, 1, 8, 8), torch.rand(4, 3, 3, 3)
    summed = weights._shaped(colour, torch.zeros(4, 1, 3, 3))
    assert summed is not None
    torch.testing.assert_close(
        nn.functional.conv2d(grey, summed), nn.functional.conv2d(grey.expand(-1, 3, -1, -1), colour)
    )


def test_a_model_that_was_released_is_taken_whole(tmp_path: Path) -> None:
    donor = networks.build(study())
    donor.load_state_dict(other())
    vector = networks.to_vector(donor)
    (tmp_path / "w").write_bytes(safetensors.numpy.save({"model": vector}))
    net = networks.build(study())
    fit = weights.fit(net, study(), weights.read(tmp_path / "w"))
    assert not fit.fresh and networks.to_vector(net).tobytes() == vector.tobytes()
