"""DP-SGD against a loop over patients in float64, written here once more; what a hostile gradient may do; who may meet whom."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from models import learning, networks
from models.study import Study
from privacy import dpsgd
from privacy.dpsgd import (
    Clip,
    ClippedSum,
    LoopEngine,
    VmapEngine,
    _Accumulator,
    check_isolation,
    choose,
    private_gradient,
)
from privacy.errors import PrivacyError, StudyConflict, UnitsCoupled
from privacy.noise import Keystream

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
    "small_cnn, 3 images": lambda: (networks.build(study()), learning.patient_losses, radiographs(3, 3)),
    "linear, 2 images": lambda: (networks.build(study("linear")), learning.patient_losses, radiographs(5, 2)),
    "densenet121, 2 images": lambda: (networks.build(study("densenet121")), learning.patient_losses, radiographs(2, 2)),
    "regression": regression,
    "segmentation 2-D": lambda: (unet(2), dice, scans((16, 16), images=2)),
    "segmentation 3-D": lambda: (unet(3), dice, scans((8, 8, 8))),
    "SegResNet 3-D": lambda: (segresnet(), dice, scans((8, 8, 8), 2)),
}


def reference(net: nn.Module, losses: Losses, units: list[Batch], clip: float) -> tuple[np.ndarray, list[float]]:
    """(sum of clipped gradients in units of the clip norm, norms), in float64, parameter by parameter."""
    trained = [p for p in net.parameters() if p.requires_grad]
    total, norms = np.zeros(sum(p.numel() for p in trained)), []
    for unit in units:
        found = torch.autograd.grad(losses(net, unit).sum(), trained, allow_unused=True)
        flat = np.concatenate(
            [
                np.zeros(p.numel()) if g is None else g.double().numpy().ravel()
                for p, g in zip(trained, found, strict=True)
            ]
        )
        norms.append(float(np.linalg.norm(flat)))
        total += flat * min(1.0, clip / norms[-1]) / clip
    return total, norms


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["loop", "vmap"])
def test_every_engine_gives_the_sum_of_the_reference_loop(case: str, kind: str) -> None:
    torch.manual_seed(1)
    net, losses, units = CASES[case]()
    net.train()
    _, norms = reference(net, losses, units, 1.0)
    clip = Clip(float(np.median(norms)))  # some patients are clipped and some are not
    expected, _ = reference(net, losses, units, clip.norm)
    engine = LoopEngine(net, losses) if kind == "loop" else VmapEngine(net, losses, chunk=2)
    seen = engine.clipped_sum(units, clip)
    assert (seen.units, seen.nonfinite) == (len(units), 0) and 0 < seen.clipped + (len(units) == 1) <= len(units)
    assert seen.total.dtype == np.int64
    # Half a unit of rounding for each patient and value, and what a longer vector is shortened by for the sake of rounding.
    shortened = math.sqrt(expected.size) / 2 / 2.0**clip.bits
    off = np.abs(seen.total / 2.0**clip.bits - expected)
    assert off.max() <= len(units) * (0.51 / 2.0**clip.bits + (shortened + 1e-4) * np.abs(expected).max() + 1e-6)
    assert engine.norms(units) == pytest.approx(norms, rel=1e-3)


def test_bfloat16_is_close_and_its_clip_is_exact() -> None:
    """Pitfall 7: the norm is that of the float32 gradient that is really used."""
    net, units = networks.build(study()), radiographs(6, 2)
    engine = LoopEngine(net, learning.patient_losses, bfloat16=True)
    _, norms = reference(net, learning.patient_losses, units, 1.0)
    assert engine.norms(units) == pytest.approx(norms, rel=0.03)
    for unit in units:
        total = engine.clipped_sum([unit], Clip(min(norms) / 10)).total
        assert sum(int(x) ** 2 for x in total) <= (2**18) ** 2


# What one patient can do.


def rounded(gradient: Any, clip: float = 1.0, bits: int = 18) -> ClippedSum:
    accumulator = _Accumulator(len(gradient), Clip(clip, bits))
    accumulator.add(torch.tensor(np.array(gradient, np.float32)))
    return accumulator.result()


hostile = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, 1e-45, 1e-38, 3.4e38, -3.4e38, 0.5 / 2**18, 1.5 / 2**18, 1.0, -1.0]),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(hostile, min_size=1, max_size=60), st.sampled_from([1e-6, 0.5, 1.0, 1e5]))
def test_the_whole_numbers_of_a_patient_are_never_longer_than_the_clip_norm(values: list[float], clip: float) -> None:
    seen = rounded(values, clip)
    assert sum(int(x) ** 2 for x in seen.total) <= (2**18) ** 2


@pytest.mark.parametrize("size", [1, 1000, 100_000, 1_000_000])
@pytest.mark.parametrize("length", [0.1, 0.999, 1.0, 1.001, 1e3])
def test_rounding_a_long_vector_does_not_lengthen_it_beyond_the_clip_norm(size: int, length: float) -> None:
    """All values alike, just above the middle between two whole numbers: each is rounded up."""
    values = np.full(size, length / math.sqrt(size), np.float32)
    seen = rounded(values)
    norm = math.sqrt(float((seen.total.astype(np.float64) ** 2).sum()))
    assert norm <= 2**18
    assert norm >= 0.99 * min(1.0, length) * 2**18 or size == 1_000_000
    worst = np.full(size, (math.floor(2**18 / math.sqrt(size)) + 0.5001) / 2**18, np.float32)
    assert math.sqrt(float((rounded(worst).total.astype(np.float64) ** 2).sum())) <= 2**18


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_counts_as_zero_and_is_counted(value: float) -> None:
    """Pitfall 6."""
    seen = rounded([1.0, value, 2.0])
    assert not seen.total.any() and (seen.units, seen.clipped, seen.nonfinite) == (1, 0, 1)


def test_a_grid_too_coarse_for_so_many_values_is_refused() -> None:
    with pytest.raises(PrivacyError, match="too coarse"):
        _Accumulator(1_000_000, Clip(1.0, 8))


def test_one_patient_more_changes_the_sum_by_exactly_that_patients_vector() -> None:
    """Bit for bit, in any order: whole numbers have no rounding that depends on the others."""
    engine, units, clip = LoopEngine(networks.build(study()), learning.patient_losses), radiographs(6, 2), Clip(0.3)
    everybody = engine.clipped_sum(units, clip).total
    for place, unit in enumerate(units):
        others = units[:place] + units[place + 1 :]
        own = engine.clipped_sum([unit], clip).total
        assert np.array_equal(everybody - own, engine.clipped_sum(others[::-1], clip).total)
        assert 0 < sum(int(x) ** 2 for x in own) <= (2**18) ** 2


def test_the_clip_is_of_the_patient_and_not_of_the_batch_or_the_layer() -> None:
    """Pitfalls 5 and 7: a mean over the batch first, or a norm for each tensor, lets one patient do more."""
    net, units = networks.build(study()), radiographs(4, 2)
    engine = LoopEngine(net, learning.patient_losses)
    clip = Clip(min(engine.norms(units)) / 10)
    total = engine.clipped_sum(units, clip).total / 2.0**18
    assert np.linalg.norm(total) <= 4
    each = [np.linalg.norm(engine.clipped_sum([unit], clip).total / 2.0**18) for unit in units]
    assert each == pytest.approx([1.0] * 4, abs=0.01), "every patient is clipped to one norm over all layers"


@pytest.mark.parametrize("clip", [0.0, -1.0, math.nan, math.inf])
def test_clip_norms_that_are_none_are_refused(clip: float) -> None:
    with pytest.raises(PrivacyError):
        Clip(clip)
    for bits in (7, 25):
        with pytest.raises(PrivacyError):
            Clip(1.0, bits)


@pytest.mark.parametrize("noise", [0.0, -1.0, math.nan, math.inf])
def test_noise_that_is_none_is_refused(noise: float) -> None:
    with pytest.raises(PrivacyError):
        private_gradient(LoopEngine(nn.Linear(2, 1), squares), [], Clip(1.0), noise, Keystream())


def test_a_draw_of_nobody_is_noise_of_the_right_size() -> None:
    """Pitfall 3: an empty batch is a step."""
    net = nn.Linear(20_000, 1, bias=False)
    noisy, seen = private_gradient(LoopEngine(net, squares), [], Clip(0.1), 2.0, Keystream(bytes(32)))
    assert seen.units == 0 and not seen.total.any()
    assert noisy.std() == pytest.approx(2.0 * 2**18, rel=0.03) and abs(noisy.mean()) < 5 * 2 * 2**18 / math.sqrt(20_000)


def test_noise_is_added_once_to_the_exact_sum() -> None:
    net, units = networks.build(study("linear")), radiographs(5, 2)
    engine = LoopEngine(net, learning.patient_losses)
    noisy, seen = private_gradient(engine, units, Clip(1.0), 1.5, Keystream(b"n" * 32))
    alone, _ = private_gradient(engine, [], Clip(1.0), 1.5, Keystream(b"n" * 32))
    assert np.array_equal(noisy - seen.total, alone)


# Frozen weights, weights without a gradient, and what an engine leaves behind.


@pytest.mark.parametrize("kind", [LoopEngine, VmapEngine])
def test_frozen_weights_have_no_place_in_the_sum(kind: Any) -> None:
    torch.manual_seed(2)
    net, losses, units = regression()
    net[1].requires_grad_(False)
    expected, _ = reference(net, losses, units, 10.0)
    total = kind(net, losses).clipped_sum(units, Clip(10.0)).total
    assert total.shape == (9,) == expected.shape
    np.testing.assert_allclose(total / 2.0**18, expected, atol=1e-4)


def test_a_weight_that_the_loss_does_not_touch_gets_zero() -> None:
    net = nn.ModuleDict({"used": nn.Linear(4, 1), "idle": nn.Linear(3, 1)})
    engine = LoopEngine(net, lambda net, batch: net["used"](batch[0]).square().sum(dim=1))  # type: ignore[index]
    seen = engine.clipped_sum([(torch.ones(1, 4),)], Clip(1.0))
    assert seen.total[:5].any() and not seen.total[5:].any()


def test_engines_leave_weights_and_gradients_as_they_were() -> None:
    net, units = networks.build(study("linear")), radiographs(3, 1)
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    before = networks.to_vector(net)
    for engine in (LoopEngine(net, learning.patient_losses), VmapEngine(net, learning.patient_losses)):
        engine.clipped_sum(units, Clip(1.0))
        assert np.array_equal(networks.to_vector(net), before)
        assert all((parameter.grad == 3.0).all() for parameter in net.parameters() if parameter.grad is not None)


# Who may meet whom.


def images(net: nn.Module, batch: Batch) -> Tensor:
    out: Tensor = net(batch[0]).flatten(1).square().mean(dim=1)
    return out


PAIR = [(torch.rand(1, 4, 8, 8, generator=torch.Generator().manual_seed(n)),) for n in (1, 2)]


@pytest.mark.parametrize(
    "norm", [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.LayerNorm([4, 6, 6]), nn.Identity(), nn.LocalResponseNorm(2)]
)
def test_layers_that_keep_patients_apart_are_accepted(norm: nn.Module) -> None:
    check_isolation(nn.Sequential(nn.Conv2d(4, 4, 3), norm, nn.ReLU()), images, PAIR)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.InstanceNorm2d(4, track_running_stats=True)])
def test_layers_in_which_patients_meet_or_are_remembered_are_refused(norm: nn.Module) -> None:
    """Pitfall 4."""
    net = nn.Sequential(nn.Conv2d(4, 4, 3), norm).train()
    before = [buffer.clone() for buffer in net.buffers()]
    with pytest.raises(UnitsCoupled):
        check_isolation(net, images, PAIR)
    assert all(torch.equal(a, b) for a, b in zip(before, net.buffers(), strict=True)), "the look left no trace"


def test_monais_resnet_keeps_its_batch_norms_whatever_norm_it_is_asked_for_and_is_refused() -> None:
    from monai.networks.nets import resnet18

    net = resnet18(spatial_dims=2, n_input_channels=4, num_classes=1, norm=("group", {"num_groups": 8})).train()
    assert sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) > 10
    with pytest.raises(UnitsCoupled):
        check_isolation(net, images, [(torch.rand(1, 4, 32, 32),), (torch.rand(1, 4, 32, 32),)])
    with pytest.raises(StudyConflict):
        networks.refuse_batch_statistics(net)


def test_a_dice_loss_over_the_batch_is_refused_and_one_for_each_patient_is_not() -> None:
    from monai.losses import DiceLoss

    def over_batch(net: nn.Module, batch: Batch) -> Tensor:
        loss = DiceLoss(sigmoid=True, batch=True)(net(batch[0].flatten(0, 1)), batch[1].flatten(0, 1))
        return loss.expand(len(batch[0])) / 1

    torch.manual_seed(3)
    net, units = unet(2), scans((16, 16), 2)
    check_isolation(net, dice, units)
    with pytest.raises(UnitsCoupled):
        check_isolation(net, over_batch, units)


def test_a_common_denominator_is_a_meeting() -> None:
    """Pitfall 5: the mean over the batch before the clip."""

    def mean_over_batch(net: nn.Module, batch: Batch) -> Tensor:
        return images(net, batch) / len(batch[0])

    with pytest.raises(UnitsCoupled):
        check_isolation(nn.Conv2d(4, 1, 3), mean_over_batch, PAIR)
    with pytest.raises(UnitsCoupled, match="not one value for each"):
        check_isolation(nn.Conv2d(4, 1, 3), lambda net, batch: images(net, batch).mean(), PAIR)
    with pytest.raises(PrivacyError, match="fewer than two"):
        check_isolation(nn.Conv2d(4, 1, 3), images, PAIR[:1])


# Choosing an engine.


def test_choosing_changes_nothing_of_the_network() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Dropout2d(0.5), nn.GroupNorm(2, 4)).train()
    before, training = [p.clone() for p in net.parameters()], [m.training for m in net.modules()]
    engine = choose(net, images, PAIR, Clip(1.0))
    assert engine.name in ("loop", "loop-bf16", "vmap")
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert [m.training for m in net.modules()] == training and net[1].p == 0.5
    assert all(p.grad is None for p in net.parameters())


def test_an_engine_whose_norms_disagree_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """However fast it is."""
    timed, seconds = dpsgd._timed, {"loop": 3.0, "loop-bf16": 2.0, "vmap": 1.0}
    monkeypatch.setattr(dpsgd, "_timed", lambda engine, *given: (timed(engine, *given)[0], seconds[engine.name]))
    net = nn.Conv2d(4, 4, 3)
    assert choose(net, images, PAIR, Clip(1.0)).name == "vmap"
    honest = VmapEngine.norms
    monkeypatch.setattr(VmapEngine, "norms", lambda self, units: [1.01 * n for n in honest(self, units)])
    assert choose(net, images, PAIR, Clip(1.0)).name != "vmap"


def test_an_engine_that_fails_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Any, units: Any) -> Any:
        raise RuntimeError("no such operation")

    monkeypatch.setattr(VmapEngine, "_gradients", fails)
    assert choose(nn.Conv2d(4, 4, 3), images, PAIR, Clip(1.0)).name != "vmap"


def test_a_network_in_which_patients_meet_gets_no_engine() -> None:
    with pytest.raises(UnitsCoupled):
        choose(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)), images, PAIR, Clip(1.0))


def test_a_finished_step_moves_weights_as_plain_gradient_descent_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without noise and with a clip that nobody reaches, DP-SGD is SGD on the mean loss."""
    torch.manual_seed(4)
    net, losses, units = regression()
    total = LoopEngine(net, losses).clipped_sum(units, Clip(100.0)).total / 2.0**18 * 100
    whole = torch.cat([losses(net, unit) for unit in units]).sum()
    plain = torch.cat([g.ravel() for g in torch.autograd.grad(whole, list(net.parameters()))])
    np.testing.assert_allclose(total, plain.numpy(), atol=5e-3)
    assert functional.cosine_similarity(torch.tensor(total).float(), plain, dim=0) > 0.9999
