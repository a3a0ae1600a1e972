"""DP-SGD against a loop over patients in float64, written here once more, and what a hostile gradient may do."""

import copy
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from dpsgd_cast import CASES, Batch, Losses, radiographs, reference, regression, squares, study
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from models import learning, networks
from privacy import dpsgd
from privacy.dpsgd import Clip, ClippedSum, LoopEngine, VmapEngine, _Accumulator, private_gradient
from privacy.errors import PrivacyError, UnitsCoupled
from privacy.noise import Keystream


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
    assert np.linalg.norm(off) <= len(units) * (1e-3 + 2 * shortened)
    assert engine.norms(units) == pytest.approx(norms, rel=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("kind", ["loop", "vmap"])
def test_on_an_accelerator_engines_give_the_sum_of_the_reference_loop(kind: str) -> None:
    torch.manual_seed(1)
    net, losses, units = CASES["small_cnn, 2 images"]()
    expected, norms = reference(net.train(), losses, units, 1.0)
    expected, _ = reference(net, losses, units, clip := float(np.median(norms)))
    there, moved = net.to("cuda"), [tuple(part.to("cuda") for part in unit) for unit in units]
    engine = LoopEngine(there, losses) if kind == "loop" else VmapEngine(there, losses, chunk=2)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        total = engine.clipped_sum(moved, Clip(clip)).total
    shortened = math.sqrt(expected.size) / 2 / 2.0**18
    assert np.linalg.norm(total / 2.0**18 - expected) <= len(units) * (1e-3 + 2 * shortened)


@pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout contract")
@pytest.mark.parametrize("kind", [LoopEngine, VmapEngine])
def test_shared_weights_odd_memory_and_layers_that_write_in_place_change_nothing(kind: Any) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(1, 1, 3, padding=1).to(memory_format=torch.channels_last)
            self.again, self.relu, self.head = self.first, nn.ReLU(inplace=True), nn.Linear(36, 3)
            self.head.weight = nn.Parameter(torch.randn(36, 3).t())  # not contiguous

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            x += 0.1
            out: Tensor = self.head(self.again(self.relu(x)).flatten(1)).mean(dim=1)
            return out

    torch.manual_seed(5)
    net, g = Odd(), torch.Generator().manual_seed(6)
    units = [(torch.randn(1, 2, 1, 6, 6, generator=g), torch.rand(1, 2, generator=g)) for _ in range(3)]
    expected, norms = reference(net, squares, units, 0.7)
    np.testing.assert_allclose(kind(net, squares).clipped_sum(units, Clip(0.7)).total / 2.0**18, expected, atol=1e-4)
    assert kind(net, squares).norms(units) == pytest.approx(norms, rel=1e-4)


def _norm_under_bfloat16(net: nn.Module, unit: Any) -> float:
    """Oracle: plain training of one unit as torch does it in bfloat16, and the length of what lies in `.grad`."""
    copied = copy.deepcopy(net)
    with torch.autocast("cpu", torch.bfloat16):
        losses = learning.patient_losses(copied, unit)
    losses.sum().backward()
    flat = [p.grad.double().ravel() for p in copied.parameters() if p.grad is not None]
    return float(torch.cat(flat).norm())


def test_pitfall_7_the_norm_is_that_of_the_float32_gradient_that_is_really_used() -> None:
    """Also where the forward pass is in bfloat16: the gradient is close, and its clip exact."""
    net, units = networks.build(study()), radiographs(6, 2)
    engine = LoopEngine(net, learning.patient_losses, bfloat16=True)
    _, norms = reference(net, learning.patient_losses, units, 1.0)
    used = [_norm_under_bfloat16(net, unit) for unit in units]
    assert engine.norms(units) == pytest.approx(used, rel=1e-3)
    # How close depends on the processor, whose matrix units round in an order of their own: at most 2**-8 in each of the
    # network's layers, forwards and backwards, of which there are eight and more.
    assert engine.norms(units) == pytest.approx(norms, rel=16 * 2.0**-8)
    for unit in units:
        total = engine.clipped_sum([unit], Clip(min(norms) / 10)).total
        assert sum(int(x) ** 2 for x in total) <= (2**18) ** 2


@pytest.mark.parametrize("case", ["segmentation 3-D", "1 x 1", "transposed"])
def test_convolutions_of_one_image_go_another_way_to_the_same_gradient(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And all of them do: what is left to torch is what it is good at."""
    torch.manual_seed(3)
    wide, up = nn.Conv2d(1, dpsgd.CHANNELS, 3), nn.ConvTranspose3d(4, 4, 2, stride=2, output_padding=1, dilation=2)
    cases: dict[str, tuple[nn.Module, tuple[int, ...], int]] = {
        "segmentation 3-D": (
            nn.Sequential(nn.Conv3d(1, 4, 3, bias=True), nn.Flatten(), nn.Linear(864, 1)),
            (8, 8, 8),
            1,
        ),
        "1 x 1": (nn.Sequential(wide, nn.Conv2d(dpsgd.CHANNELS, 2, 1), nn.Flatten(), nn.Linear(72, 1)), (8, 8), 1),
        "transposed": (nn.Sequential(nn.Conv3d(1, 4, 1), up, nn.Flatten(), nn.LazyLinear(1)), (4, 4, 4), 2),
    }
    net, shape, expected_ways = cases[case]
    g = torch.Generator().manual_seed(4)
    units = [(torch.randn(1, 1, 1, *shape, generator=g), torch.rand(1, 1, generator=g)) for _ in range(3)]
    net(units[0][0][0])  # a lazy layer takes its size
    ways: list[bool] = []
    redirected = dpsgd._redirected
    monkeypatch.setattr(dpsgd, "_redirected", lambda *given: ways.append(redirected(*given)) or ways[-1])
    expected, _ = reference(net, squares, units, 0.7)
    np.testing.assert_allclose(
        LoopEngine(net, squares).clipped_sum(units, Clip(0.7)).total / 2.0**18, expected, atol=1e-4
    )
    assert sum(ways) == expected_ways * len(units)


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.Conv3d(8, 16, 3, padding=1), (1, 8, 8)),
        (nn.Conv3d(8, 16, 3, padding=1), (2, 8, 8)),
        (nn.Conv3d(8, 16, 3, padding=1, bias=False), (3, 8, 8)),
        (nn.Conv3d(8, 16, 5, padding=2), (4, 6, 6)),
        (nn.Conv3d(8, 16, (3, 1, 1), padding=(1, 0, 0)), (2, 8, 8)),
        (nn.ConvTranspose3d(8, 16, 3, padding=1), (2, 8, 8)),
        (nn.ConvTranspose3d(8, 16, 3, padding=1, stride=2, output_padding=1), (1, 4, 4)),
        (nn.Conv2d(8, 16, 3, padding=1, stride=2), (1, 1)),
        (nn.Conv2d(8, 16, 3, padding=1), (1, 2)),
    ],
    ids=str,
)
def test_no_gradient_in_bfloat16_is_made_of_memory_that_held_something_else(
    layer: nn.Module, shape: tuple[int, ...]
) -> None:
    """Oracle: float64. Torch 2.13 gets flat volumes wrong; what lay in the memory could be another patient's."""
    units = [(torch.randn(1, 8, *shape, generator=torch.Generator().manual_seed(5)),)]

    def norm(net: nn.Module, batch: Batch) -> Tensor:
        return net(batch[0]).double().square().flatten(1).mean(1)

    wide = copy.deepcopy(layer).double()
    expected = torch.autograd.grad(norm(wide, (units[0][0].double(),))[0], list(wide.parameters()))
    engine = LoopEngine(layer, norm, bfloat16=True)
    for _ in range(5):
        dpsgd._stain()
        (found,) = [flat.clone() for flat in engine._gradients(units)]
        flat = torch.cat([part.reshape(-1) for part in expected])
        assert float((found - flat).norm() / flat.norm()) < 0.02


def test_more_units_than_float32_can_count_are_added_exactly() -> None:
    """Whole numbers above 2**24 are not all float32 numbers; with a grid of 2**24 the third unit is beyond them."""
    for bits in (22, 24):
        accumulator, odd = _Accumulator(3, Clip(1.0, bits)), 2 ** (bits - 1) + 1
        for _ in range(9):
            accumulator.add(torch.tensor([odd / 2.0**bits, 3 / 2.0**bits, 0.0]))
        assert accumulator.result().total.tolist() == [9 * odd, 27, 0]


def test_memory_that_is_used_again_holds_nothing_of_the_step_before() -> None:
    net, losses, units = CASES["linear, 2 images"]()
    engine, out = LoopEngine(net, losses), np.full(sum(p.numel() for p in net.parameters()), 2**40)
    for chosen in (units, units[:1], []):
        kept, _ = private_gradient(engine, chosen, Clip(0.5, 24), 1.0, Keystream(b"r" * 32), out)
        fresh, _ = private_gradient(LoopEngine(net, losses), chosen, Clip(0.5, 24), 1.0, Keystream(b"r" * 32))
        assert kept is out and np.array_equal(kept, fresh)


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


SHAPES: dict[str, Callable[[int], np.ndarray]] = {
    "all alike": np.ones,
    "at the middle between two whole numbers": lambda size: np.full(size, math.floor(size**-0.5 * 2**18) + 0.5) / 2**18,
    "one large value": lambda size: np.eye(1, size)[0],
    "signs that alternate": lambda size: (-1.0) ** np.arange(size),
    "many sizes": lambda size: 10.0 ** -(np.arange(size) % 30),
    "denormal beside large": lambda size: np.where(np.arange(size) % 2, 1e-44, 1.0),
    "noise": lambda size: np.random.default_rng(size).uniform(-1, 1, size),
}


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(SHAPES)),
    st.one_of(st.integers(1, 100), st.integers(1, 100_000)),
    st.sampled_from([1e-45, 1e-38, 1e-12, 1e-3, 0.5, 1.0, 1.0000001, 3.0, 1e9, 1e38]),
    st.sampled_from([dpsgd.CLIP_MIN, 1e-3, 1.0, 7.3, 1e6, dpsgd.CLIP_MAX]),
    st.integers(8, 24),
)
def test_no_gradient_of_any_size_makes_whole_numbers_longer_than_the_grid(
    shape: str, size: int, scale: float, clip: float, bits: int
) -> None:
    gradient = (SHAPES[shape](size) * scale).astype(np.float32)
    if 2**bits <= math.sqrt(size):
        return  # too coarse, and refused
    seen = rounded(gradient, clip, bits)
    square = sum(int(value) ** 2 for value in seen.total[seen.total != 0].tolist())
    assert square <= 4**bits and seen.nonfinite == 0
    norm = float(np.linalg.norm(gradient.astype(np.float64)))
    # Nothing is lost either: what is inside the clip norm is rounded, and what is outside has nearly its length.
    target = 2.0**bits - math.sqrt(size) / 2
    off = seen.total - gradient.astype(np.float64) * min(2.0**bits / clip, target / max(norm, 1e-300))
    assert np.abs(off).max() <= 0.5 + 2.0 ** (bits - 20)
    assert seen.clipped == (norm > clip)


@given(st.lists(st.integers(-(2**12), 2**12), min_size=1, max_size=3000), st.integers(0, 12))
@settings(max_examples=60, deadline=None)
def test_the_norm_of_whole_numbers_is_exact(values: list[int], shift: int) -> None:
    """So that `verified on the rounded vector` means what it says: at 2**24, one more in the square is seen."""
    whole = [value << shift for value in values]
    square = sum(value**2 for value in whole)
    if square < 2**52:
        assert dpsgd._norm(torch.tensor(whole, dtype=torch.float32)) == math.sqrt(square)
    edge = torch.zeros(100_000)
    edge[0], edge[70_000] = 2.0**24, 1.0
    assert dpsgd._norm(edge) > 2.0**24 and dpsgd._norm(edge[:70_000]) == 2.0**24


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_pitfall_6_a_gradient_that_is_not_finite_counts_as_zero_and_is_counted(value: float) -> None:
    """min(1, C / nan) is 1 in many a language, and inf * 0 is nan."""
    seen = rounded([1.0, value, 2.0])
    assert not seen.total.any() and (seen.units, seen.clipped, seen.nonfinite) == (1, 0, 1)


@pytest.mark.parametrize("kind", [LoopEngine, VmapEngine])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_pitfall_6_a_patient_whose_images_are_not_finite_moves_nothing_of_the_others(kind: Any, value: float) -> None:
    net, units = networks.build(study()), radiographs(4, 2)
    engine, broken = kind(net, learning.patient_losses), [part.clone() for part in units[1]]
    broken[0][:] = value
    without = engine.clipped_sum(units[:1] + units[2:], Clip(0.3))
    seen = engine.clipped_sum([units[0], tuple(broken), *units[2:]], Clip(0.3))
    assert np.array_equal(seen.total, without.total)
    assert (seen.units, seen.nonfinite, without.nonfinite) == (4, 1, 0)


def test_what_no_rule_foresees_counts_as_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever arithmetic gives after rounding, nothing is added whose norm is not known to be inside."""
    for wrong in (math.nan, 2.0**38):
        answers = iter([0.25, wrong, wrong])
        monkeypatch.setattr(dpsgd, "_square", lambda part, answers=answers: next(answers))
        seen = rounded([0.3, 0.4])
        assert not seen.total.any() and seen.nonfinite == 1


def test_a_grid_too_coarse_for_so_many_values_is_refused() -> None:
    with pytest.raises(PrivacyError, match="too coarse"):
        _Accumulator(1_000_000, Clip(1.0, 8))


ENGINES: dict[str, Callable[[nn.Module, Losses], dpsgd.Engine]] = {
    "loop": LoopEngine,
    "loop-bf16": lambda net, losses: LoopEngine(net, losses, bfloat16=True),
    "vmap": lambda net, losses: VmapEngine(net, losses, chunk=4),
}


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("case", ["small_cnn, 2 images", "segmentation 2-D", "SegResNet 3-D", "linear, 2 images"])
def test_one_patient_more_changes_the_sum_by_exactly_that_patients_vector(case: str, kind: str) -> None:
    """Bit for bit, in any order, also where chunks are cut elsewhere: nobody's vector depends on who else is there."""
    torch.manual_seed(1)
    net, losses, units = CASES[case]()
    units = [*units, *(tuple(part.flip(-1) for part in unit) for unit in units)]
    engine, draw = ENGINES[kind](net.train(), losses), random.Random(2)
    clip = Clip(float(np.median(engine.norms(units))))
    everybody = engine.clipped_sum(units, clip).total
    for place, unit in enumerate(units):
        others = units[:place] + units[place + 1 :]
        own = engine.clipped_sum([unit], clip).total
        assert 0 < sum(int(x) ** 2 for x in own) <= (2**18) ** 2
        assert np.array_equal(everybody - own, engine.clipped_sum(draw.sample(others, len(others)), clip).total)


def test_pitfalls_5_and_7_the_clip_is_of_the_patient_and_not_of_the_batch_or_the_layer() -> None:
    """A mean over the batch first, or a norm for each tensor, lets one patient do more."""
    net, units = networks.build(study()), radiographs(4, 2)
    engine = LoopEngine(net, learning.patient_losses)
    clip = Clip(min(engine.norms(units)) / 10)
    total = engine.clipped_sum(units, clip).total / 2.0**18
    assert np.linalg.norm(total) <= 4
    each = [np.linalg.norm(engine.clipped_sum([unit], clip).total / 2.0**18) for unit in units]
    assert each == pytest.approx([1.0] * 4, abs=0.01), "every patient is clipped to one norm over all layers"


@pytest.mark.parametrize("kind", [LoopEngine, VmapEngine])
def test_pitfall_5_several_patients_are_no_unit_and_a_mean_over_them_is_no_loss(kind: Any) -> None:
    """Clipped together, one of them could turn the gradient of all the others: twice the clip norm, not one."""
    net, units = networks.build(study("linear")), radiographs(3, 1)
    two = tuple(torch.cat(parts) for parts in zip(*units[:2], strict=True))
    with pytest.raises(PrivacyError, match="one patient"):
        kind(net, learning.patient_losses).clipped_sum([two], Clip(1.0))
    with pytest.raises(UnitsCoupled, match="not one value for each"):
        kind(net, lambda net, batch: learning.patient_losses(net, batch).mean()).clipped_sum(units, Clip(1.0))


@pytest.mark.parametrize("clip", [0.0, -1.0, math.nan, math.inf, -math.inf, 1e-40, 1e40])
def test_clip_norms_that_are_none_are_refused(clip: float) -> None:
    with pytest.raises(PrivacyError):
        Clip(clip)
    for bits in (7, 25):
        with pytest.raises(PrivacyError):
            Clip(1.0, bits)


@pytest.mark.parametrize("noise", [0.0, -1.0, math.nan, math.inf, 1e-9, 1e12])
def test_noise_that_is_none_is_refused_before_a_patient_is_asked_for(noise: float) -> None:
    def units() -> Iterator[Batch]:
        raise AssertionError("a patient was touched")
        yield

    with pytest.raises(PrivacyError):
        private_gradient(LoopEngine(nn.Linear(2, 1), squares), units(), Clip(1.0), noise, Keystream())


def test_pitfall_3_a_draw_of_nobody_is_noise_of_the_right_size() -> None:
    """An empty batch is a step like any other, in every engine."""
    for kind in ENGINES.values():
        empty, nobody = private_gradient(kind(nn.Linear(50, 1), squares), iter([]), Clip(1.0), 2.0, Keystream())
        assert np.count_nonzero(empty) > 45 and (nobody.units, nobody.clipped, nobody.nonfinite) == (0, 0, 0)
    net = nn.Linear(20_000, 1, bias=False)
    noisy, seen = private_gradient(LoopEngine(net, squares), [], Clip(0.1), 2.0, Keystream(bytes(32)))
    assert seen.units == 0 and not seen.total.any()
    assert noisy.std() == pytest.approx(2.0 * 2**18, rel=0.03) and abs(noisy.mean()) < 5 * 2 * 2**18 / math.sqrt(20_000)


def test_pitfall_3_the_sum_is_a_sum_and_not_a_mean_over_those_who_are_there() -> None:
    engine, units = LoopEngine(networks.build(study("linear")), learning.patient_losses), radiographs(3, 1)
    once, twice = (engine.clipped_sum(units * n, Clip(0.1)).total for n in (1, 2))
    assert once.any() and np.array_equal(2 * once, twice)


def test_pitfall_1_no_seed_that_somebody_knows_makes_noise_repeat() -> None:
    engine, made = LoopEngine(nn.Linear(200, 1), squares), []
    for _ in range(2):
        torch.manual_seed(7)
        np.random.seed(7)
        random.seed(7)
        made.append(private_gradient(engine, [], Clip(1.0), 1.0, Keystream())[0])
    assert np.count_nonzero(made[0] == made[1]) < 3


def test_pitfall_10_the_noisy_sum_is_whole_signed_and_wide_enough() -> None:
    """Of int64 from end to end: a thousand patients at the clip norm, all in one value, on the finest grid."""
    net = nn.Linear(1, 1, bias=False)
    engine, units = LoopEngine(net, lambda net, batch: -net(batch[0])[:, 0]), [(torch.ones(1, 1),)] * 1000
    noisy, seen = private_gradient(engine, units, Clip(1.0, 24), 1.0, Keystream())
    assert noisy.dtype == seen.total.dtype == np.int64
    assert seen.total[0] < -(2**33) and abs(int(noisy[0]) + 1000 * 2**24) < 1000 + 9 * 2**24


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


def test_what_a_sum_is_made_of_does_not_show_in_a_log_or_traceback() -> None:
    assert "1234567" not in repr(ClippedSum(np.array([1234567]), 1234567, 1234567, 1234567))


def test_a_network_without_weights_to_train_is_refused() -> None:
    for kind in ENGINES.values():
        with pytest.raises(PrivacyError, match="no weights"):
            kind(nn.Linear(2, 1).requires_grad_(False), squares).clipped_sum([], Clip(1.0))


def test_a_draw_that_is_stopped_leaves_gradients_as_they_were() -> None:
    net = networks.build(study("linear"))

    def stopped() -> Iterator[Batch]:
        yield radiographs(1, 1)[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        LoopEngine(net, learning.patient_losses).clipped_sum(stopped(), Clip(1.0))
    assert all(parameter.grad is None for parameter in net.parameters())


def test_engines_leave_weights_and_gradients_as_they_were() -> None:
    net, units = networks.build(study("linear")), radiographs(3, 1)
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    before = networks.to_vector(net)
    for engine in (LoopEngine(net, learning.patient_losses), VmapEngine(net, learning.patient_losses)):
        engine.clipped_sum(units, Clip(1.0))
        assert np.array_equal(networks.to_vector(net), before)
        assert all((parameter.grad == 3.0).all() for parameter in net.parameters() if parameter.grad is not None)


def test_a_finished_step_moves_weights_as_plain_gradient_descent_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without noise and with a clip that nobody reaches, DP-SGD is SGD on the mean loss."""
    torch.manual_seed(4)
    net, losses, units = regression()
    total = LoopEngine(net, losses).clipped_sum(units, Clip(100.0)).total / 2.0**18 * 100
    whole = torch.cat([losses(net, unit) for unit in units]).sum()
    plain = torch.cat([g.ravel() for g in torch.autograd.grad(whole, list(net.parameters()))])
    np.testing.assert_allclose(total, plain.numpy(), atol=5e-3)
    assert functional.cosine_similarity(torch.tensor(total).float(), plain, dim=0) > 0.9999
