"""What is built: no batch statistics, the same bytes every time, vectors that go back in, images that do not mix."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from monai.networks.nets import resnet18
from torch import nn

from models import learning, networks
from models.sections import NETWORKS, OUTLINING
from models.study import Study
from privacy.dpsgd import check_isolation
from privacy.errors import MessageMalformed, StudyConflict


def made_study(kind: str = "small_cnn", targets: int = 1, seed: int = 1, **change: Any) -> Study:
    return Study.model_validate(
        {
            "name": "opacity",
            "title": "Opacity",
            "purpose": "a test",
            "task": {"targets": [f"t{i}" for i in range(targets)]}
            | ({"kind": "segmentation"} if kind in OUTLINING else {}),
            "images": {"size_px": 64},
            "network": {"name": kind},
            "training": {"rounds": 2, "seed": seed},
            "protection": "plain",
            "privacy": "none",
            "participation": {"sites": ["north"], "quorum": 1},
        }
        | change
    )


def volumes(*size: int) -> dict[str, Any]:
    return {"modalities": ["CT"], "volume": {"size": list(size)}}


@pytest.fixture(scope="module", params=NETWORKS)
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
    for side in (32, 33, 50, 77, 96) if name not in ("vit", *OUTLINING) else (32, 96):
        study = made_study(name, targets=3, images={"size_px": side})
        study.check()
        logits = networks.build(study).eval()(torch.rand(2, 1, side, side))
        grid = (side, side) if name in OUTLINING else ()
        assert logits.shape == (2, 3, *grid) and torch.isfinite(logits).all()


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


# Every network, in pictures and in volumes.


@pytest.mark.parametrize("images", [{"size_px": 32}, volumes(32, 32, 48)], ids=["picture", "volume"])
def test_patients_do_not_meet_in_a_network_and_one_alone_is_enough(name: str, images: dict[str, Any]) -> None:
    """With the dropout that a study may ask for, and with nothing else that draws."""
    study = made_study(name, images=images, network={"name": name, "dropout": 0.3})
    study.check()
    net, generator = networks.build(study).train(), torch.Generator().manual_seed(0)
    grid = study.images.shape[1:] if name in OUTLINING else ()
    patients = [
        (torch.rand(1, 1, *study.images.shape, generator=generator), torch.ones(1, 1, 1, *grid), torch.ones(1, 1, 1))
        for _ in range(2)
    ]
    check_isolation(net, learning.patient_losses, patients)
    assert net(patients[0][0][0]).shape == (1, 1, *grid)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "small_cnn"])
def test_volumes_of_few_slices(name: str) -> None:
    study = made_study(name, images=volumes(8, 32, 32))
    study.check()
    assert networks.build(study)(torch.rand(1, 1, 8, 32, 32)).shape == (1, 1)


@pytest.mark.parametrize(
    ("name", "images", "words"),
    [
        ("densenet121", volumes(16, 64, 64), "densenet121 halves images five times and needs 32"),
        ("densenet169", volumes(31, 64, 64), "densenet169 halves images five times and needs 32"),
        ("efficientnet_b0", volumes(64, 64, 8), "efficientnet_b0 halves images five times and needs 32"),
        ("vit", {"size_px": 100}, "patches of 16, which do not divide images of 100 x 100"),
        ("vit", volumes(32, 40, 32), "patches of 16, which do not divide images of 32 x 40 x 32"),
    ],
)
def test_images_that_a_network_cannot_take_are_a_conflict(name: str, images: dict[str, Any], words: str) -> None:
    with pytest.raises(StudyConflict, match=words):
        made_study(name, images=images).check()


def test_an_untrained_network_is_undecided(name: str) -> None:
    """So the first step is not spent on calling a head back that shouts."""
    net, images = networks.build(made_study(name, targets=2)).eval(), torch.rand(8, 1, 64, 64)
    logits = net(images).detach().abs()
    assert float(logits.mean() if name in OUTLINING else logits.max()) < (1 if name in OUTLINING else 3)


# A part of a network.


def trained(name: str, part: str, **change: Any) -> Any:
    study = made_study(name, network={"name": name, "trained": part}, **change)
    net = networks.build(study)
    return net, networks.trained_places(net)


def test_the_parts_lie_within_each_other_and_hold_the_head(name: str) -> None:
    (net, head), (_, block), (_, whole) = (trained(name, part) for part in ("head", "last_block", "all"))
    assert whole.all() and (block | head).sum() == block.sum() and head.any()
    names = {key for key, value in net.named_parameters() if value.requires_grad}
    assert len(names) == 2 and {key.rsplit(".")[-1] for key in names} == {"weight", "bias"}
    beginnings = networks.PARTS[name]
    for beginning in (beginnings.head, *beginnings.last_block):
        assert any(key.startswith(beginning) for key, _ in net.named_parameters()), beginning
    if name != "linear":
        assert head.sum() < block.sum() < whole.sum()


def test_the_last_block_is_behind_everything_that_is_frozen(name: str) -> None:
    """Nothing trained stands before something frozen, so no gradient is asked of a frozen layer."""
    net, places = trained(name, "last_block")
    if name == "vit":
        places = places[networks.VIT_WIDTH :]
    # Two lie otherwise in the vector than images go through them.
    assert (np.diff(places.astype(int)) >= 0).all() or name in ("vit", "segresnet")
    net(torch.rand(1, 1, 64, 64)).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in net.parameters())


def test_what_relates_targets_is_trained_with_the_head(name: str) -> None:
    if name in OUTLINING:
        pytest.skip("structures are in no relation")
    net, places = trained(name, "head", task={"targets": ["a", "b", "c"], "relation": "ordered"})
    frozen, _ = trained(name, "head")
    left = {f"net.{key}" for key, value in frozen.named_parameters() if not value.requires_grad}
    assert {key for key, value in net.named_parameters() if not value.requires_grad} == left
    assert places.sum() == sum(p.numel() for p in net.parameters() if p.requires_grad)


def test_places_say_what_a_gradient_moves_and_zeros_stand_elsewhere() -> None:
    net = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 2))
    net[0].requires_grad_(False)
    places = networks.trained_places(net)
    assert places.tolist() == [False] * 3 + [True] * 4
    assert networks.placed(np.arange(1.0, 5.0), places).tolist() == [0, 0, 0, 1, 2, 3, 4]
    net.register_buffer("memory", torch.zeros(1))
    with pytest.raises(MessageMalformed, match="memory"):
        networks.trained_places(net)
