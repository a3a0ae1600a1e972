"""Which patients may meet in a network or a loss, and which engine is chosen for those that keep them apart."""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from dpsgd_cast import Batch, dice, radiographs, scans, study, unet
from torch import Tensor, nn
from torch.nn import functional

from models import learning, networks
from privacy import dpsgd
from privacy.dpsgd import Clip, LoopEngine, VmapEngine, check_isolation, choose
from privacy.errors import PrivacyError, StudyConflict, UnitsCoupled

# Who may meet whom.


def images(net: nn.Module, batch: Batch) -> Tensor:
    out: Tensor = net(batch[0]).flatten(1).square().mean(dim=1)
    return out


PAIR = [(torch.rand(1, 4, 8, 8, generator=torch.Generator().manual_seed(n)),) for n in (1, 2)]


APART = {
    "group norm": nn.GroupNorm(2, 4),
    "instance norm": nn.InstanceNorm2d(4),
    "layer norm": nn.LayerNorm([4, 6, 6]),
    "response norm": nn.LocalResponseNorm(2),
    "nothing": nn.Identity(),
    "dropout": nn.Sequential(nn.Dropout(0.5), nn.Dropout2d(0.5), nn.AlphaDropout(0.3)),
    "batch norm in evaluation": nn.BatchNorm2d(4).eval(),
}
TOGETHER = {
    "batch norm": nn.BatchNorm2d(4),
    "batch norm without statistics": nn.BatchNorm2d(4, track_running_stats=False),
    "running statistics": nn.InstanceNorm2d(4, track_running_stats=True),
}


class Custom(nn.Module):
    """A layer without weights that is the function `body`."""

    def __init__(self, body: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def attention(x: Tensor) -> Tensor:
    rows = x.flatten(1)
    return ((rows @ rows.t()).softmax(dim=1) @ rows).view_as(x)


def memory() -> Callable[[Tensor], Tensor]:
    seen: list[Tensor] = []

    def remembers(x: Tensor) -> Tensor:
        seen.append(x.detach().mean())
        return x * torch.stack(seen).sum()

    return remembers


TOGETHER["attention between patients"] = Custom(attention)
TOGETHER["a faint part of the batch's mean"] = Custom(lambda x: x + 1e-7 * x.mean(dim=0, keepdim=True))
TOGETHER["the next patient's image"] = Custom(lambda x: x + 1e-6 * x.roll(1, dims=0))


@pytest.mark.parametrize("layer", APART)
def test_layers_that_keep_patients_apart_are_accepted(layer: str) -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3), APART[layer], nn.ReLU(inplace=True))
    check_isolation(net, images, PAIR)
    assert [d.p for d in net.modules() if isinstance(d, nn.Dropout)] == ([0.5] if layer == "dropout" else [])


@pytest.mark.parametrize("layer", TOGETHER)
def test_pitfall_4_layers_in_which_patients_meet_or_are_remembered_are_refused(layer: str) -> None:
    """However faint it is, also for two patients that are alike; the look leaves no trace."""
    net = nn.Sequential(nn.Conv2d(4, 4, 3), TOGETHER[layer])
    before = [buffer.clone() for buffer in net.buffers()]
    for pair in (PAIR, [PAIR[0], PAIR[0]]):
        with pytest.raises(UnitsCoupled):
            check_isolation(net, images, pair)
        with pytest.raises(UnitsCoupled):
            choose(net, images, pair, Clip(1.0))
    assert all(torch.equal(a, b) for a, b in zip(before, net.buffers(), strict=True))


def test_a_memory_that_no_buffer_shows_is_refused_and_so_is_a_layer_that_draws() -> None:
    with pytest.raises(UnitsCoupled, match=r"draws or remembers|depends on who else"):
        check_isolation(nn.Sequential(nn.Conv2d(4, 4, 3), Custom(memory())), images, PAIR)
    with pytest.raises(UnitsCoupled, match=r"draws or remembers|depends on who else"):
        check_isolation(nn.Sequential(nn.Conv2d(4, 4, 3), Custom(functional.dropout)), images, PAIR)


@pytest.mark.parametrize("factor", [0.0, math.nan, math.inf])
def test_a_gradient_from_which_nothing_can_be_told_is_refused(factor: float) -> None:
    for check in (check_isolation, lambda *given: choose(*given, Clip(1.0))):
        with pytest.raises(PrivacyError, match="zero or not finite"):
            check(nn.Conv2d(4, 1, 3), lambda net, batch: factor * images(net, batch), PAIR)


def test_the_networks_of_studies_keep_patients_apart() -> None:
    for name in ("small_cnn", "densenet121", "linear"):
        check_isolation(networks.build(study(name)).train(), learning.patient_losses, radiographs(2, 2))


def test_pitfall_4_monais_resnet_keeps_its_batch_norms_whatever_norm_it_is_asked_for_and_is_refused() -> None:
    from monai.networks.nets import resnet18

    net = resnet18(spatial_dims=2, n_input_channels=4, num_classes=1, norm=("group", {"num_groups": 8})).train()
    assert sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) > 10
    with pytest.raises(UnitsCoupled):
        check_isolation(net, images, [(torch.rand(1, 4, 32, 32),), (torch.rand(1, 4, 32, 32),)])
    with pytest.raises(StudyConflict):
        networks.refuse_batch_statistics(net)


def test_pitfall_4_a_dice_loss_over_the_batch_is_refused_and_one_for_each_patient_is_not() -> None:
    from monai.losses import DiceLoss

    def over_batch(net: nn.Module, batch: Batch) -> Tensor:
        loss = DiceLoss(sigmoid=True, batch=True)(net(batch[0].flatten(0, 1)), batch[1].flatten(0, 1))
        return loss.expand(len(batch[0]))

    def each(net: nn.Module, batch: Batch) -> Tensor:
        """MONAI's own for each image, its mean for each patient."""
        loss = DiceLoss(sigmoid=True, reduction="none")(net(batch[0].flatten(0, 1)), batch[1].flatten(0, 1))
        return loss.reshape(len(batch[0]), -1).mean(dim=1)

    torch.manual_seed(3)
    net, units = unet(2), scans((16, 16), 2)
    check_isolation(net, dice, units)
    check_isolation(net, each, units)
    with pytest.raises(UnitsCoupled):
        check_isolation(net, over_batch, units)
    with pytest.raises(UnitsCoupled):
        check_isolation(net, over_batch, [units[0], units[0]])


def test_pitfall_5_a_common_denominator_is_a_meeting() -> None:
    """The mean over the batch before the clip, or over all labels in it."""

    def mean_over_labels(net: nn.Module, batch: Batch) -> Tensor:
        pictures, targets, known = batch
        loss = (net(pictures.flatten(0, 1)).reshape(targets.shape) - targets).square() * (known > 0)
        return loss.sum(dim=(1, 2)) / (known > 0).sum()

    with pytest.raises(UnitsCoupled):
        check_isolation(networks.build(study("linear")), mean_over_labels, radiographs(2, 2))

    def mean_over_batch(net: nn.Module, batch: Batch) -> Tensor:
        return images(net, batch) / len(batch[0])

    with pytest.raises(UnitsCoupled):
        check_isolation(nn.Conv2d(4, 1, 3), mean_over_batch, PAIR)
    with pytest.raises(UnitsCoupled, match="not one value for each"):
        check_isolation(nn.Conv2d(4, 1, 3), lambda net, batch: images(net, batch).mean(), PAIR)
    with pytest.raises(PrivacyError, match="fewer than two"):
        check_isolation(nn.Conv2d(4, 1, 3), images, PAIR[:1])


# Choosing an engine.


def test_choosing_changes_nothing_of_the_network_and_of_the_process() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Dropout2d(0.5), nn.GroupNorm(2, 4), nn.BatchNorm2d(4).eval())
    net[0].bias.grad = torch.full((4,), 2.0)  # type: ignore[union-attr]
    state = {name: value.clone() for name, value in net.state_dict().items()}
    training, drawn = [m.training for m in net.modules()], torch.random.get_rng_state()
    engine = choose(net, images, PAIR, Clip(1.0))
    assert engine.name in ("loop", "loop-bf16", "vmap")
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert [m.training for m in net.modules()] == training and net[1].p == 0.5
    assert [p.grad is None for p in net.parameters()] == [True, False] + [True] * 4
    assert torch.equal(drawn, torch.random.get_rng_state())


@pytest.fixture
def faster_vmap(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A stop-watch by which the later engines are the faster ones, so that only what they compute can speak against them."""
    timed, seconds = dpsgd._timed, {"loop": 0.003, "loop-bf16": 0.002, "vmap": 0.001}
    monkeypatch.setattr(dpsgd, "_timed", lambda engine, *given: (timed(engine, *given)[0], seconds[engine.name]))
    yield


def chosen() -> str:
    torch.manual_seed(3)
    return choose(nn.Sequential(nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(144, 5)), images, PAIR, Clip(0.1)).name


def wrong(
    kind: Any, change: Callable[[Tensor, int], Tensor], bfloat16: bool = False
) -> Callable[..., Iterator[Tensor]]:
    """Gradients of `kind`, each put through `change` together with the number of units that came."""
    honest = kind._gradients

    def changed(self: Any, units: Any) -> Iterator[Tensor]:
        held = list(units)
        for flat in honest(self, held):
            yield change(flat, len(held)) if getattr(self, "bfloat16", bfloat16) == bfloat16 else flat

    return changed


@pytest.mark.parametrize(
    "change",
    [
        lambda flat, count: flat * 1.01,
        lambda flat, count: flat.flip(0),
        lambda flat, count: -flat,
        lambda flat, count: flat + (1e-6 if count > 1 else 0.0) * flat.abs().max(),
        lambda flat, count: flat[:-1],
        lambda flat, count: flat * math.nan,
    ],
    ids=["too long", "in another order", "backwards", "depends on the others", "too short", "not a number"],
)
def test_an_engine_that_computes_something_else_is_never_chosen(
    change: Any, faster_vmap: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However fast it is: other norms, another direction, or a sum that is not made of what each patient gives alone."""
    assert chosen() == "vmap"
    monkeypatch.setattr(VmapEngine, "_gradients", wrong(VmapEngine, change))
    assert chosen() == "loop-bf16"
    worse = wrong(LoopEngine, lambda flat, count: change(flat, count) * 1.05, bfloat16=True)
    monkeypatch.setattr(LoopEngine, "_gradients", worse)
    assert chosen() == "loop"


def test_an_engine_that_reads_memory_to_which_nobody_wrote_is_never_chosen(
    faster_vmap: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zeros lie there at most times, so that its gradients look right."""
    unwritten = wrong(VmapEngine, lambda flat, count: flat + 0 * torch.empty(250_000).sum())
    monkeypatch.setattr(VmapEngine, "_gradients", unwritten)
    assert chosen() == "loop-bf16"
    monkeypatch.setattr(dpsgd, "_stain", lambda: None)
    monkeypatch.setattr(torch, "empty", torch.zeros)  # what the system hands out
    assert chosen() == "vmap"


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, AttributeError, IndexError, AssertionError])
def test_engines_that_fail_are_passed_over_and_the_loop_is_left(
    error: type[Exception], faster_vmap: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise error("no such operation")

    monkeypatch.setattr(VmapEngine, "_gradients", fails)
    assert chosen() == "loop-bf16"
    monkeypatch.setattr(torch, "autocast", lambda device, kind, enabled: fails() if enabled else nullcontext())
    assert chosen() == "loop"


def test_a_network_that_torch_func_does_not_bear_is_trained_by_the_loop(faster_vmap: None) -> None:
    """A branch on a value: several patients at once cannot take both ways."""
    net = nn.Sequential(nn.Conv2d(4, 4, 3), Custom(lambda x: x if x.sum() > 1e9 else 2 * x))
    assert choose(net, images, PAIR, Clip(1.0)).name != "vmap"


@pytest.mark.parametrize(
    "seconds, weights", [(1.0, 16), (0.003, dpsgd.HEAP // 4 // 3)], ids=["long units", "many weights"]
)
def test_several_units_at_once_are_not_even_tried_where_they_cost_memory(
    seconds: float, weights: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []
    timed = dpsgd._timed

    def noted(engine: Any, *given: Any) -> Any:
        tried.append(engine.name)
        return timed(engine, *given)[0], seconds

    monkeypatch.setattr(dpsgd, "_timed", noted)
    pair = [(torch.rand(1, 2, 4), torch.rand(1, 2, 1)) for _ in range(2)]
    net = nn.Linear(4, weights // 4, bias=False)
    assert choose(net, lambda net, batch: net(batch[0]).square().mean((1, 2)), pair, Clip(1.0)).name in (
        "loop",
        "loop-bf16",
    )
    assert set(tried) == {"loop", "loop-bf16"}


def test_a_network_in_which_patients_meet_gets_no_engine() -> None:
    with pytest.raises(UnitsCoupled):
        choose(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)), images, PAIR, Clip(1.0))
