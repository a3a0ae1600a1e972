"""What is built: no batch statistics, the same bytes every time, vectors that go back in, images that do not mix."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from monai.networks.nets import resnet18
from torch import nn

from models import networks
from models.study import Study
from privacy.errors import MessageMalformed, StudyConflict


def made_study(network: str = "small_cnn", targets: int = 1, seed: int = 1) -> Study:
    return Study.model_validate(
        {
            "name": "opacity",
            "title": "Opacity",
            "purpose": "a test",
            "task": {"targets": [f"t{i}" for i in range(targets)]},
            "images": {"size_px": 64},
            "network": {"name": network},
            "training": {"rounds": 2, "seed": seed},
            "protection": "plain",
            "privacy": "none",
            "participation": {"sites": ["north"], "quorum": 1},
        }
    )


@pytest.fixture(scope="module", params=["small_cnn", "densenet121", "linear"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_no_batch_statistics_anywhere_and_images_do_not_mix(name: str) -> None:
    net = networks.build(made_study(name)).train()
    assert not [m for m in net.modules() if "BatchNorm" in type(m).__name__]
    torch.manual_seed(0)
    images = torch.rand(3, 1, 64, 64)
    # In training mode, where BatchNorm would mix them, an image scores the same alone and in company.
    together, alone = net(images), torch.cat([net(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)


def test_one_logit_per_target(name: str) -> None:
    net = networks.build(made_study(name, targets=3)).eval()
    for side in (32, 33, 50, 77, 96):
        logits = net(torch.rand(2, 1, side, side))
        assert logits.shape == (2, 3) and torch.isfinite(logits).all()


def test_the_seed_decides_every_byte_and_the_callers_randomness_is_untouched(name: str) -> None:
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    first = networks.to_vector(networks.build(made_study(name, seed=5)))
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(3)
    assert networks.to_vector(networks.build(made_study(name, seed=5))).tobytes() == first.tobytes()
    assert networks.to_vector(networks.build(made_study(name, seed=6))).tobytes() != first.tobytes()


def test_a_vector_goes_back_in_and_gives_the_same_scores(name: str) -> None:
    one, other = networks.build(made_study(name, seed=1)).eval(), networks.build(made_study(name, seed=2)).eval()
    images = torch.rand(2, 1, 64, 64)
    vector = networks.to_vector(one)
    assert vector.dtype == np.float32 and vector.ndim == 1 and vector.flags.owndata
    assert not torch.equal(one(images), other(images))
    vector.flags.writeable = False  # as it comes out of a message
    with warnings.catch_warnings(action="error"):
        networks.load_vector(other, vector)
    vector.flags.writeable = True
    assert torch.equal(one(images), other(images))
    vector[:] = 0  # the network must not share memory with what it was loaded from
    assert torch.equal(one(images), other(images))


def test_the_layout_says_where_each_parameter_lies(name: str) -> None:
    net = networks.build(made_study(name))
    vector, start = networks.to_vector(net), 0
    parameters = dict(net.named_parameters())
    for layer in networks.layout(net):
        size = int(np.prod(layer.shape))
        piece = vector[start : start + size].reshape(layer.shape)
        np.testing.assert_array_equal(piece, parameters.pop(layer.name).detach().numpy())
        start += size
    assert start == len(vector) and not parameters


def test_a_bad_vector_changes_nothing() -> None:
    net = networks.build(made_study())
    good = networks.to_vector(net)
    spoilt = good.copy()
    spoilt[-1] = np.nan
    longer = np.append(good, np.float32(0))
    bads: list[Any] = [good[:-1], longer, spoilt, good.astype(np.float64), good.reshape(1, -1), np.zeros(0, np.float32)]
    for bad in bads:
        with pytest.raises(MessageMalformed):
            networks.load_vector(net, bad)
    assert networks.to_vector(net).tobytes() == good.tobytes()


def test_a_network_that_ignores_the_norm_it_was_asked_for_is_refused() -> None:
    pretender = resnet18(spatial_dims=2, n_input_channels=1, num_classes=1, norm=("group", {"num_groups": 8}))
    with pytest.raises(StudyConflict, match="statistics"):
        networks.refuse_batch_statistics(pretender)
    with pytest.raises(StudyConflict, match="norm"):
        networks.refuse_batch_statistics(nn.ModuleDict({"norm": nn.InstanceNorm2d(4, track_running_stats=True)}))


def test_a_buffer_that_is_no_float_cannot_be_averaged() -> None:
    net = nn.Linear(2, 2)
    net.register_buffer("steps", torch.tensor(3))
    for use in (networks.to_vector, networks.layout):
        with pytest.raises(MessageMalformed, match="steps"):
            use(net)


def test_float_buffers_travel_with_the_parameters() -> None:
    net = nn.Linear(2, 1)
    net.register_buffer("centre", torch.tensor([0.25]))
    assert networks.to_vector(net)[-1] == np.float32(0.25)


def test_dropout_is_the_studys() -> None:
    study = made_study().model_copy(update={"network": made_study().network.model_copy(update={"dropout": 0.5})})
    net, images = networks.build(study), torch.rand(1, 1, 64, 64)
    assert not torch.equal(net.train()(images), net(images))
    assert torch.equal(net.eval()(images), net(images))
