"""A released model that outlines: its card, its exports, and `fl-study predict`, whose DICOM SEG lies on its image."""

import csv
import datetime as dt
import json
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pydicom
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from hospital import COORDINATOR, Hospital
from safetensors.numpy import save
from test_outlines import TEXT, VOLUMES, study
from typer.testing import CliRunner

from fl_client import cli, evaluating, mask_files, outlining, rules, scoring
from fl_client.cohort import on_grid
from fl_client.index import Index
from fl_client.phantom import VENDORS, make_hospital
from fl_client.phantom_ct import SCANNERS, make_ct_hospital
from fl_client.policy import Rule
from fl_client.rehearsal import prepare
from fl_client.site import MaskMap
from fl_server import measures, release, report
from fl_server.research import app
from fl_server.results import VERSION
from models import exporting, networks, registry
from models.registry import Package
from models.segmentation import COLUMNS
from models.study import Study, parse
from privacy.errors import DocumentError, StudyConflict

KEY = ec.derive_private_key(7, ec.SECP256R1())
ROW = dict(
    zip(COLUMNS, (3, 34, 2, 1, 0, 30 << 20, 29 << 20, 32, 25 << 20, 20 << 20, 31, 100 << 10, 400 << 10), strict=True)
)


def packaged(flat: bool = True) -> Package:
    """An untrained model with a threshold that makes its outlines neither empty nor full."""
    wanted = study() if flat else parse(Study, TEXT.replace("images: {size_px: 32}", VOLUMES), "s")
    net = networks.build(wanted)
    layers = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    facts = {"name": "outlines", "version": "1.2.3", "digest": wanted.digest, "run_id": "run-1"}
    facts |= {"lineage": {"parent": None, "round": 1}, "heads": [], "created": "2026-01-01T00:00:00Z"}
    card = {"digest": wanted.digest, "run_id": "run-1", "selected_round": 1}
    files = {"card.json": json.dumps(card).encode(), "card.md": b"# s\n", "sbom.cdx.json": b"{}"}
    files |= {"model.safetensors": save(layers), "study.json": wanted.canonical()}
    return Package.read(registry.pack(facts, files, KEY))


FLAT, DEEP = packaged(), packaged(flat=False)


# Predictions ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of radiographs with what else lies in one, and one of a straight and a tilted CT."""
    folder = tmp_path_factory.mktemp("images")
    make_hospital(folder / "dx", "north", 3, 1, VENDORS["dorado"])
    for number in (0, 2):
        make_ct_hospital(folder / "ct" / str(number), "north", 1, number, SCANNERS[number])
    return {"dx": folder / "dx" / "dicom", "ct": folder / "ct"}


@pytest.fixture(scope="module")
def predicted(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    out = tmp_path_factory.mktemp("out")
    found = {
        kind: outlining.outline(package, folders[kind], out / kind, 0, lambda done, total: None)
        for kind, package in (("dx", FLAT), ("ct", DEEP))
    }
    return SimpleNamespace(out=out, **found)


def test_a_segmentation_lies_on_its_ct_and_reads_back_as_what_was_outlined(
    folders: dict[str, Path], predicted: SimpleNamespace
) -> None:
    """Oracle: each frame's place and pixels from the header of the slice that it names, whatever order these had."""
    assert len(predicted.ct.rows) == 2 and predicted.ct.left_out["localizer"] == 2
    slices = {
        d.SOPInstanceUID: d for d in map(pydicom.dcmread, filter(Path.is_file, folders["ct"].glob("*/dicom/*/*")))
    }
    for first, series, _, name, sizes in predicted.ct.rows:
        made = pydicom.dcmread(predicted.out / "ct" / name)
        assert made.SOPClassUID == mask_files.SEG_STORAGE and made.Modality == "SEG"
        source = pydicom.dcmread(folders["ct"] / first)
        assert (made.PatientID, made.StudyInstanceUID) == (source.PatientID, source.StudyInstanceUID)
        assert made.FrameOfReferenceUID == source.FrameOfReferenceUID
        assert made.ReferencedSeriesSequence[0].SeriesInstanceUID == series == source.SeriesInstanceUID
        assert [segment.SegmentLabel for segment in made.SegmentSequence] == ["lungs", "opacity"]
        frames, voxels = made.pixel_array.reshape(-1, made.Rows, made.Columns), [0, 0]
        for pixels, facts in zip(frames, made.PerFrameFunctionalGroupsSequence, strict=True):
            named = facts.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
            its = slices[named]
            place = facts.PlanePositionSequence[0].ImagePositionPatient
            assert np.allclose([float(v) for v in place], [float(v) for v in its.ImagePositionPatient], atol=1e-3)
            voxels[facts.SegmentIdentificationSequence[0].ReferencedSegmentNumber - 1] += int(pixels.sum())
        shared = made.SharedFunctionalGroupsSequence[0]
        assert shared.PixelMeasuresSequence[0].PixelSpacing == source.PixelSpacing
        turned = shared.PlaneOrientationSequence[0].ImageOrientationPatient
        assert np.allclose([float(v) for v in turned], [float(v) for v in source.ImageOrientationPatient], atol=1e-4)
        scanner = next(s for s in SCANNERS if s.manufacturer == source.Manufacturer)
        cosine = np.cos(np.radians(scanner.tilt_degrees))
        ml = [count * scanner.pixel_mm**2 * scanner.gap_mm * cosine / 1000 for count in voxels]
        assert sizes == pytest.approx(ml, rel=1e-3) and sum(voxels) > 0


@pytest.mark.parametrize("kind", ["dx", "ct"])
def test_an_outline_that_comes_back_as_a_mask_is_the_outline(
    kind: str, predicted: SimpleNamespace, tmp_path: Path
) -> None:
    """Out as SEG, in again as a reference mask on the same images: on the study's grid it is what the network outlined."""
    home, package = tmp_path / "home", FLAT if kind == "dx" else DEEP
    made = ["volumes"] if kind == "ct" else []
    prepare(home, "north", (2, 0), COORDINATOR.public_key(), made=made)  # type: ignore[arg-type]
    folder = home / "hospital" / "dicom"
    outlining.outline(package, folder, home / "seg", 0, lambda done, total: None)
    mapping = MaskMap.model_validate(
        {"folder": str(home / "seg"), "structures": {"lungs": ["lungs"], "opacity": ["opacity"]}}
    )
    index = Index.open(home / "state")
    from fl_client.readers import Readers
    from models.masks import to_grid

    with Readers(0, home) as readers:
        found = mask_files.ingest(
            mapping.model_copy(update={"empty": "absent"}), home, index, readers, lambda done, total: None
        )
    assert not found.left_out and len(found.taken) == index.taken
    net = exporting.network(package)
    for image in index.images():
        with torch.inference_mode():
            wanted = (net(torch.from_numpy(on_grid(index, image, package.study))[None])[0] > 0).numpy()
        affine = np.array(image.affine).reshape(3, 4) if image.is_volume else None
        again = to_grid(found.bits(image), affine, package.study.images, [0, 1])
        agree = (again == wanted).mean()
        assert agree == 1 if kind == "dx" else agree > 0.9  # the grid is larger than the body that was scanned


def test_a_radiograph_gets_its_outline_and_its_area(folders: dict[str, Path], predicted: SimpleNamespace) -> None:
    assert (
        predicted.dx.rows
        and predicted.dx.left_out["lateral"] >= 1
        and scoring.ANOTHER_MODALITY not in predicted.dx.left_out
    )
    for first, _, uid, name, sizes in predicted.dx.rows:
        made, source = pydicom.dcmread(predicted.out / "dx" / name), pydicom.dcmread(folders["dx"] / first)
        assert (made.Rows, made.Columns) == (source.Rows, source.Columns)
        assert made.ReferencedSeriesSequence[0].ReferencedInstanceSequence[0].ReferencedSOPInstanceUID == uid
        pixels = [0, 0]
        for frame, facts in zip(
            made.pixel_array.reshape(-1, 256, 256), made.PerFrameFunctionalGroupsSequence, strict=True
        ):
            pixels[facts.SegmentIdentificationSequence[0].ReferencedSegmentNumber - 1] += int(frame.sum())
        area = float(source.ImagerPixelSpacing[0]) ** 2 / 100
        assert sizes == pytest.approx([count * area for count in pixels], rel=1e-6)


def test_predict_writes_a_table_and_segmentations_for_this_user_alone(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = outlining.outline  # without a reading process, which takes seconds to start
    monkeypatch.setattr(outlining, "outline", lambda p, folder, out, _, tell: run(p, folder, out, 0, tell))
    package = tmp_path / "outlines-1.2.3.isocenter"
    package.write_bytes(_content())
    words = ["predict", str(package), str(folders["dx"]), "--out", str(tmp_path / "lungs.csv")]
    shown = CliRunner().invoke(app, words, catch_exceptions=False, env={"COLUMNS": "200"})
    assert shown.exit_code == 0 and "outlined" in shown.output and "left out, lateral" in shown.output
    rows = list(csv.DictReader((tmp_path / "lungs.csv").open()))
    assert rows and set(rows[0]) == {
        "file", "series_instance_uid", "sop_instance_uid", "segmentation", "lungs_cm2", "opacity_cm2",
    }  # fmt: skip
    for path in [tmp_path / "lungs.csv", *(tmp_path / "lungs_seg").iterdir()]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert {row["segmentation"] for row in rows} == {path.name for path in (tmp_path / "lungs_seg").iterdir()}
    (tmp_path / "lungs.csv").unlink()
    with pytest.raises(DocumentError, match="lungs_seg exists already"):
        CliRunner().invoke(app, words, catch_exceptions=False)
    with pytest.raises(StudyConflict, match="takes images alone"):
        CliRunner().invoke(app, [*words, "--covariates", "facts.csv"], catch_exceptions=False)


def _content() -> bytes:
    facts = {
        name: FLAT.manifest[name] for name in ("name", "version", "digest", "run_id", "lineage", "heads", "created")
    }
    return registry.pack(facts, dict(FLAT.files), KEY)


# Exports -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", [FLAT, pytest.param(DEEP, marks=pytest.mark.slow)], ids=["2d", "3d"])
def test_an_exported_program_scores_every_voxel_as_the_network_does(package: Package, tmp_path: Path) -> None:
    images = torch.rand(3, *package.study.images.shape, generator=torch.Generator().manual_seed(1))
    exporting.export(package, "pt2", tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    with torch.inference_mode():
        expected = torch.sigmoid(exporting.network(package)(images))
        assert (program(images) - expected).abs().max() < 1e-4 and expected.shape[1:] == (2, *images.shape[2:])


def test_onnx_scores_every_voxel_as_the_network_does(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    exporting.export(FLAT, "onnx", tmp_path / "model.onnx")
    images = np.random.default_rng(1).random((3, 1, 32, 32), np.float32)
    (found,) = runtime.InferenceSession(tmp_path / "model.onnx").run(None, {"images": images})
    with torch.inference_mode():
        expected = torch.sigmoid(exporting.network(FLAT)(torch.from_numpy(images))).numpy()
    assert np.abs(found - expected).max() < 1e-4


def test_a_bundle_says_what_it_outlines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "_pt2", lambda package, out: None)  # another test's, and slow
    exporting.export(FLAT, "bundle", tmp_path / "bundle")
    facts = json.loads((tmp_path / "bundle" / "configs" / "metadata.json").read_text())
    assert facts["task"] == "Segmentation of lungs, opacity"
    said = facts["network_data_format"]["outputs"]["pred"]
    assert (said["format"], said["num_channels"], said["spatial_shape"]) == ("segmentation", 2, [32, 32])
    assert "scores.npz" in (tmp_path / "bundle" / "docs" / "README.md").read_text()


@pytest.mark.slow
def test_a_bundle_runs_without_isocenter(tmp_path: Path) -> None:
    pytest.importorskip("fire")
    out = tmp_path / "bundle"
    exporting.export(FLAT, "bundle", out)
    (out / "inputs").mkdir(exist_ok=True)
    image = np.random.default_rng(1).random((32, 32), np.float32)
    np.save(out / "inputs" / "one.npy", image)
    words = [sys.executable, "-P", "-m", "monai.bundle", "run", "--config_file", "configs/inference.json"]
    subprocess.run(words, cwd=out, check=True, capture_output=True, timeout=240)
    found = np.load(out / "scores.npz")["one.npy"]
    with torch.inference_mode():
        expected = torch.sigmoid(exporting.network(FLAT)(torch.from_numpy(image)[None, None])).numpy()[0]
    assert np.abs(found - expected).max() < 1e-4


# What is said --------------------------------------------------------------------------------------------------------


def results(**change: Any) -> dict[str, Any]:
    """A results document of an evaluation by hand: 34 cases of lungs, 9 of opacities."""
    start = f"name: unet, initial: {{sha256: {'a' * 64}}}"
    plan = parse(Study, TEXT.replace("rounds: 1", "rounds: 0").replace("name: unet", start), "s")
    few = [3, 9, 0, 0, 0, 8 << 20, 7 << 20, 9, 7 << 20, 6 << 20, 9, 9 << 10, 9 << 10]
    scores = {"sites": ["north", "south", "east"], "patients": 30, "images": 40, "loss": 0.4}
    triple = [0.9, 0.85, 0.95]
    figure = {"dice": triple, "surface_dice": triple, "hd95_mm": None, "cases": 10}
    return {
        "version": VERSION, "run_id": "run-1", "digest": plan.digest, "study": plan.model_dump(mode="json"), "label": "complete",
        "started": "2026-01-01T00:00:00Z", "finished": "2026-01-01T01:00:00Z", "selected_round": 0, "initial": None, "rounds": [],
        "test": scores | {"counts": [list(ROW.values()), few]}, "test_missing": {}, "figures": {"north": [figure, None]},
        "groups": [], "grades": [], "ingested": 50,
    } | change  # fmt: skip


def test_the_card_tells_cases_in_tens_and_nothing_of_nine(tmp_path: Path) -> None:
    metrics = measures.measure(report.check(results()))
    told = release._figures(metrics)
    lungs, opacity = told["pooled"]["targets"]["lungs"], told["pooled"]["targets"]["opacity"]
    assert lungs["cases"] == 30 and lungs["dice"]["value"] == round(30 / 34, 3) and lungs["hd95_mm"]["value"] == 3.226
    assert opacity["cases"] is None and opacity["dice"] is None and opacity["why"]
    assert told["sites"]["north"]["targets"]["lungs"]["dice"] == {"value": 0.9, "interval": [0.85, 0.95]}
    assert "why" in told["sites"]["south"]["targets"]["lungs"]
    words = "\n".join(release._tables(told))
    assert (
        "| lungs | all together |  | ≥ 30 | 0.882 (" in words
        and f"| opacity | all together |  | {opacity['why']}" in words
    )
    assert "| lungs | north | external | ≥ 10 | 0.900 (0.850 to 0.950) | 0.900 (0.850 to 0.950) | – |" in words
    assert "AUROC" not in words and "a structure with cases below ten" in f"{release._few(told)} below ten"
    assert "masks of each site" in release._reference(study())
    page = report.write(results(), tmp_path).read_text()
    assert "0.882" in page and "≥ 10" in page and "not released" in page


def test_approval_says_what_leaves_and_what_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hospital = Hospital.open(tmp_path)
    cli.show_study(study(), hospital.site, "ada", [])
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "outlines of lungs, opacity" in said and "score" not in said and "AUROC" not in said and "histogram" not in said
    )
    assert "number of cases and of empty masks, sums of Dice, surface Dice and HD95" in said
    assert "Dice, surface Dice and HD95 of each structure" in said
    assert "the mask, the outline and the figures of any single image" in said
    assert "site.yaml maps nothing to lungs, opacity" in said
    assert "A structure that no other site annotates is yours alone in that sum" in said


def test_outlines_are_neither_drawn_from_covariates_nor_evaluated_as_scores(tmp_path: Path) -> None:
    with pytest.raises(StudyConflict, match="drawn from the image alone"):
        Study.model_validate(study().model_dump(mode="json") | {"covariates": {"sex": {}}}).check()
    with pytest.raises(StudyConflict, match="model of outlines of lungs, opacity, and only models that classify"):
        evaluating.evaluate(Hospital.open(tmp_path).site, FLAT, None, tmp_path / "out")


def test_no_rule_approves_a_study_of_outlines() -> None:
    """Everything else about it would fit."""
    facts = {"researchers": ["ada"], "epsilon": 9, "rounds": 10, "until": "2030-01-01"}
    privacy = {"epsilon": 8, "clip_norm": 1, "sampling_rate": 0.2, "noise_multiplier": 3}
    private = Study.model_validate(study().model_dump(mode="json", exclude_defaults=True) | {"privacy": privacy})
    found = rules.misses(Rule.model_validate(facts), private, "ada", 1e-5, dt.date(2026, 1, 1))
    assert found == [
        "the study outlines structures: sums of their figures, which no ε covers, are for people to approve"
    ]
