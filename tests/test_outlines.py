"""Outlines end to end in one process: networks in two and three dimensions, private steps, a masked run and its report."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hospital import COORDINATOR
from scipy.ndimage import binary_erosion
from torch import nn
from typer.testing import CliRunner

from fl_client.rehearsal import cohort, prepare
from fl_server import comparison, measures, report, simulation
from fl_server.research import app, templates
from models import learning, networks
from models.segmentation import COLUMNS
from models.study import Study, parse
from privacy import dpsgd
from privacy.errors import MessageMalformed, StudyConflict

TEXT = """
name: outlines
title: Outlines
purpose: A test.
task: {kind: segmentation, targets: [lungs, opacity], tolerance_mm: 20}
images: {size_px: 32}
network: {name: unet}
training: {rounds: 1, local_epochs: 1, batch_size: 16, learning_rate: 0.01, augmentation: none}
protection: masked
privacy: none
participation: {sites: [north, south, east], quorum: 3, minimum_patients: 2, round_timeout_s: 60}
evaluation: {validation: 0.1, test: 0.5}
"""
VOLUMES = "images: {modalities: [CT], volume: {spacing_mm: [20, 20, 20], size: [8, 16, 16]}}"


def study(**change: str) -> Study:
    text = TEXT
    for old, new in change.items():
        text = text.replace(old.replace("__", ": "), new)
    return parse(Study, text, "study.yaml")


def of(name: str, *, flat: bool = True, **training: Any) -> Study:
    found = study() if flat else parse(Study, TEXT.replace("images: {size_px: 32}", VOLUMES), "s")
    network = found.network.model_copy(update={"name": name})
    return found.model_copy(update={"network": network, "training": found.training.model_copy(update=training)})


KINDS = [(name, flat) for name in ("unet", "segresnet") for flat in (True, False)]


# Networks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "flat"), KINDS, ids=str)
def test_a_network_scores_every_voxel_of_each_image_by_itself(name: str, flat: bool) -> None:
    wanted = of(name, flat=flat)
    wanted.check()
    net = networks.build(wanted)
    images = torch.rand(3, *wanted.images.shape, generator=torch.Generator().manual_seed(1))
    logits = net(images)
    assert logits.shape == (3, 2, *wanted.images.shape[1:])
    assert torch.allclose(net(images[1:2]), logits[1:2], atol=1e-5)
    norms = [module for module in net.modules() if isinstance(module, nn.GroupNorm)]
    assert norms and not any(isinstance(m, nn.modules.batchnorm._NormBase) for m in net.modules())
    vector = networks.to_vector(net)
    networks.load_vector(net, vector)
    assert (networks.to_vector(networks.build(wanted)) == vector).all()


@pytest.mark.parametrize(("name", "part"), [(n, p) for n in ("unet", "segresnet") for p in ("head", "last_block")])
def test_what_is_frozen_stays_and_the_head_scores_the_structures(name: str, part: Any) -> None:
    wanted = of(name)
    wanted = wanted.model_copy(update={"network": wanted.network.model_copy(update={"trained": part})})
    net = networks.build(wanted)
    moved = [parameter for parameter in net.parameters() if parameter.requires_grad]
    assert moved[-1].shape == (2,) and 0 < sum(p.numel() for p in moved) < networks.to_vector(net).size / 2
    assert (len(moved) == 2 or name == "segresnet") if part == "head" else len(moved) > 4


def some(images: int, shape: tuple[int, ...], seed: int = 3) -> SimpleNamespace:
    """Squares on noise: what is bright is to be outlined."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(images, 2, *shape[1:], dtype=torch.uint8)
    for row in range(images):
        corner = [int(torch.randint(0, side // 2, (1,), generator=generator)) for side in shape[1:]]
        place = tuple(slice(start, start + side // 3) for start, side in zip(corner, shape[1:], strict=True))
        masks[(row, 0, *place)] = 1
    pictures = 0.3 * torch.rand(images, *shape, generator=generator) + 0.6 * masks[:, :1]
    known = torch.ones(images, 2)
    known[:, 1] = 0
    patients = torch.arange(images) // 2
    return SimpleNamespace(images=pictures, targets=masks, known=known, patients=patients, public_size=10)


def test_training_outlines_what_is_annotated_and_leaves_the_rest_alone() -> None:
    wanted = of("unet", local_epochs=6, batch_size=4)
    net, split = networks.build(wanted), some(16, wanted.images.shape)
    split.targets[:, 1] = 255  # nobody annotated it, so nobody may look
    learning.learn(net, split, wanted, round_number=1)
    found = list(learning.outlined(net, split))
    overlap = [2 * (m[0] & (split.targets[row, 0].numpy() > 0)).sum() / (m[0].sum() + 100) for row, m, _ in found]
    assert [row for row, _, _ in found] == list(range(16)) and np.mean(overlap) > 0.6
    assert all(np.isfinite(loss) and loss < 1 for _, _, loss in found)


def test_a_mask_moves_with_its_image() -> None:
    """Oracle: the image is the mask, so both stay the same picture whatever the draw; the stream goes on as for images alone."""
    wanted = of("unet", augmentation="light")
    for flat in (True, False):
        split = some(4, (1, 32, 32) if flat else (1, 8, 16, 16))
        split.images = split.targets[:, :1].float()
        split.targets[:, 1] = split.targets[:, 0]
        generator, alone = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
        images, masks = learning.views(split, torch.arange(4), wanted, generator)
        moved = learning.augment(split.images, alone, exposed=False)
        assert (masks[:, 0] == (moved[:, 0] >= 0.5)).all() and (masks[:, 0] == masks[:, 1]).all()
        assert images.shape == split.images.shape and not (masks == split.targets).all()
        learning.augment(split.images, other := torch.Generator().manual_seed(5))
        assert torch.equal(generator.get_state(), other.get_state())


@pytest.mark.parametrize(
    ("name", "flat"),
    [kind if kind == ("unet", True) else pytest.param(*kind, marks=pytest.mark.slow) for kind in KINDS],
)
def test_private_gradients_are_those_of_a_loop_over_patients(name: str, flat: bool) -> None:
    """Oracle: autograd on the mean loss of each patient's images, clipped by hand. The engine passed the isolation check."""
    privacy = {"epsilon": 100, "noise_multiplier": 1.0, "clip_norm": 0.5, "sampling_rate": 0.5, "images_per_patient": 2}
    base = of(name, flat=flat)
    wanted = Study.model_validate(base.model_dump(mode="json", exclude_defaults=True) | {"privacy": privacy})
    wanted.check()
    net, split = networks.build(wanted), some(6, wanted.images.shape)
    engine = learning.engine_of(net, wanted)
    generator = torch.Generator().manual_seed(1)
    units = [learning.unit(split, rows, wanted, generator) for rows in learning.labelled_patients(split)]
    clip = dpsgd.Clip(0.5)
    total = engine.clipped_sum(units, clip)
    expected = np.zeros(networks.to_vector(net).size)
    for images, masks, known in units:
        net.zero_grad()
        losses = []
        for image, mask, told in zip(images[0], masks[0], known[0], strict=True):
            logits = net(image[None])[0][told > 0]
            truth = mask[told > 0]
            entropy = nn.functional.binary_cross_entropy_with_logits(logits, truth)
            scores = torch.sigmoid(logits)
            losses.append(entropy + 1 - 2 * (scores * truth).sum() / (scores.sum() + truth.sum() + 1))
        torch.autograd.backward(torch.stack(losses).mean())
        gradient = torch.cat([p.grad.reshape(-1) for p in net.parameters() if p.grad is not None]).double().numpy()
        expected += gradient * min(1.0, 0.5 / np.linalg.norm(gradient)) / 0.5
    assert total.units == 3
    assert np.linalg.norm(total.total * 2.0**-clip.bits - expected) < 0.01 * np.linalg.norm(expected)
    made = learning.learn_privately(engine, net, split, wanted, learning.Turn(1, 10))
    assert made.cases == 10 and np.isfinite(made.delta).all() and made.delta.any()


# A masked run --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """Three made-up hospitals of 20 patients, one masked round, through the command."""
    folder = tmp_path_factory.mktemp("outlines")
    (folder / "study.yaml").write_text(TEXT)
    words = ["simulate", str(folder / "study.yaml"), "--out", str(folder / "out")]
    for number, name in enumerate(("north", "south", "east")):
        home = folder / name
        prepare(home, name, (20, number), COORDINATOR.public_key(), made=["masks"])
        text = (home / "site.yaml").read_text().replace("minimum_patients: 1\n", "minimum_patients: 2\n")
        (home / "site.yaml").write_text(text)
        words += ["--site", f"{name}={home}"]
    shown = CliRunner().invoke(app, words, env={"COLUMNS": "160"}, catch_exceptions=False)
    assert shown.exit_code == 0, shown.output
    run = next((folder / "out" / "rehearsal-1" / "coordinator" / "runs").iterdir())
    results = json.loads((run / "results.json").read_text())
    yield SimpleNamespace(
        out=folder / "out",
        run=run,
        results=results,
        shown=shown.output,
        study=Study.from_canonical((run / "study.json").read_bytes()),
    )


def splits(ran: SimpleNamespace, part: Any) -> dict[str, Any]:
    sites = ran.out / "rehearsal-1" / "sites"
    return {name: cohort(sites / name, ran.study, part) for name in ran.study.all_sites}


def test_the_summed_figures_are_those_of_all_cases_computed_by_hand(ran: SimpleNamespace) -> None:
    """Oracle: the released weights on the sites' own images; Dice by counting, surfaces by brute force over pairs of voxels."""
    from safetensors.numpy import load_file

    net = networks.build(ran.study)
    networks.load_vector(net, load_file(ran.run / "model.safetensors")["model"])
    sums = dict.fromkeys(COLUMNS[:6], 0.0) | {"surface": 0.0, "surface_cases": 0}
    for part in splits(ran, "test").values():
        with torch.inference_mode():
            outlines = (net(part.images) > 0).numpy()[:, 0]
        for found, truth, spacing in zip(
            outlines, part.targets.numpy()[:, 0] > 0, part.spacing_mm.numpy(), strict=True
        ):
            sums["cases"] += 1
            sums["missed"] += truth.any() and not found.any()
            sums["dice"] += 2 * (found & truth).sum() / (found.sum() + truth.sum())
            sums["surface_cases"] += 1
            sums["surface"] += _surface_dice(found, truth, spacing, 20)
    told = dict(zip(COLUMNS, ran.results["test"]["counts"][0], strict=True))
    assert (
        told["sites"] == 3
        and told["cases"] == sums["cases"]
        and told["missed"] == sums["missed"]
        and told["invented"] == 0
    )
    assert told["dice"] * 2.0**-20 == pytest.approx(sums["dice"], abs=1e-3)
    assert told["surface"] * 2.0**-20 == pytest.approx(sums["surface"], abs=1e-3)


def _surface_dice(found: Any, truth: Any, spacing: Any, tolerance: float) -> float:
    ours, theirs = (np.argwhere(mask & ~binary_erosion(mask)) * spacing for mask in (found, truth))
    if not len(ours) or not len(theirs):
        return 0.0
    away = np.linalg.norm(ours[:, None] - theirs[None], axis=2)
    return float(((away.min(axis=1) <= tolerance).sum() + (away.min(axis=0) <= tolerance).sum()) / sum(away.shape))


def test_report_and_terminal_say_dice_and_no_auroc(ran: SimpleNamespace) -> None:
    metrics = json.loads((ran.out / "metrics.json").read_text())
    lungs = metrics["pooled"]["targets"]["lungs"]
    assert 0 < lungs["dice"]["value"] < 1 and lungs["dice"]["interval"][0] < lungs["dice"]["value"]
    assert set(metrics["sites"]) == {"north", "south", "east"}
    assert metrics["sites"]["north"]["targets"]["lungs"]["cases"] == 10
    assert "Dice" in ran.shown and "AUROC" not in ran.shown and f"{lungs['dice']['value']:.3f}" in ran.shown
    page = (ran.out / "report.html").read_text()
    assert "Held-out outlines" in page and "AUROC" not in page and "Empty masks" in page
    assert f"{lungs['dice']['value']:.3f}" in page and (ran.out / "dice.png").exists()
    assert "data:image/png;base64," in page


LIES: list[tuple[str, Any]] = [
    ("negative", lambda r: r["test"]["counts"][0].__setitem__(5, -1)),
    ("dice above one", lambda r: r["test"]["counts"][0].__setitem__(5, 2**50)),
    ("more cases than images", lambda r: r["test"].__setitem__("images", 3) or r["test"].__setitem__("patients", 3)),
    ("one structure less", lambda r: r["test"]["counts"].pop()),
    ("told by two sites", lambda r: r["test"]["counts"][0].__setitem__(0, 2)),
    ("told by four sites", lambda r: r["test"]["counts"][0].__setitem__(0, 4)),
    ("a histogram", lambda r: r["test"].__setitem__("counts", {"bins": 10})),
    ("figures of scores", lambda r: r["figures"].__setitem__("north", [_auroc(), None])),
    ("outside its interval", lambda r: r["figures"]["north"][0].__setitem__("dice", [0.9, 0.1, 0.2])),
    ("a share above one", lambda r: r["figures"]["north"][0].__setitem__("dice", [1.5, 0.1, 2.0])),
    ("nine cases", lambda r: r["figures"]["north"][0].__setitem__("cases", 9)),
    ("too many cases", lambda r: r["figures"]["north"][0].__setitem__("cases", 10_000)),
]


def _auroc() -> dict[str, Any]:
    names = ("auroc", "low", "high", "bootstrap_low", "bootstrap_high")
    return dict.fromkeys(names, 0.5) | {"negatives": 10, "positives": 10}


@pytest.mark.parametrize("lie", [lie for _, lie in LIES], ids=[name for name, _ in LIES])
def test_results_that_lie_are_refused(ran: SimpleNamespace, lie: Any) -> None:
    report.check(ran.results)
    changed = json.loads(json.dumps(ran.results))
    lie(changed)
    with pytest.raises(MessageMalformed):
        report.check(changed)


def test_what_is_about_scores_alone_is_refused_by_name(ran: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(StudyConflict, match="compared by AUROC"):
        comparison.check(ran.study)
    (tmp_path / "study.yaml").write_text(TEXT)
    with pytest.raises(StudyConflict, match="attacks are made on scores of images"):
        CliRunner().invoke(app, ["attack", str(tmp_path / "study.yaml")], catch_exceptions=False)


# Studies that ship ---------------------------------------------------------------------------------------------------

# (least mean Dice, least distance above the best fixed mask and above no mask): what 60 phantoms at each site show, with room.
MARGINS = {"outlines": (0.8, 0.15), "ct_outlines": (0.75, 0.05)}


@pytest.mark.slow
@pytest.mark.parametrize("name", MARGINS)
def test_a_study_of_outlines_that_ships_beats_every_fixed_mask(name: str, tmp_path: Path) -> None:
    wanted = parse(Study, templates()[name], f"{name}.yaml")
    wanted.check()
    outcome = simulation.simulate(wanted, {}, 60, tmp_path, lambda event: None)
    pooled = measures.measure(report.check(outcome.results))["pooled"]
    tested = Study.from_canonical(next(outcome.folder.rglob("study.json")).read_bytes())
    sites = {
        part: [cohort(outcome.folder / "sites" / s, tested, part) for s in tested.all_sites]
        for part in ("train", "test")
    }
    trained, held = (torch.cat([c.targets for c in sites[part]]).float() for part in ("train", "test"))
    least, above = MARGINS[name]
    assert pooled["dice"] >= least
    for place, target in enumerate(wanted.task.targets):
        mean = trained[:, place].mean(dim=0)
        fixed = [_dice(mean > cut, held[:, place]) for cut in (0.1, 0.2, 0.3, 0.4, 0.5, 2.0)]  # the last is empty
        assert pooled["targets"][target]["dice"]["value"] >= max(fixed) + above, (target, fixed)


def _dice(mask: torch.Tensor, truth: torch.Tensor) -> float:
    """Mean Dice of one mask for everybody, by the rule of empty masks."""
    both = truth.flatten(1).sum(dim=1) + mask.sum()
    overlap = 2 * (truth * mask).flatten(1).sum(dim=1)
    return float(torch.where(both > 0, overlap / both.clamp(min=1), torch.ones(())).mean())
