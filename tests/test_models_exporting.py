"""Exports against the network itself: a bundle that reads files as a site does, torch.export, ONNX; of pictures and volumes."""

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
from test_client_evaluating import packaged

from fl_client import headers, nifti
from models import exporting, tasks
from models.grids import to_grid
from models.registry import Package
from models.study import Study
from models.volumes import to_volume_grid
from privacy.errors import DocumentError

REQUIRED = """schema version monai_version pytorch_version numpy_version required_packages_version task description authors
copyright network_data_format"""  # by MONAI's bundle specification and its metadata schema of 2024-07-25
OF_A_TENSOR = "type format num_channels spatial_shape dtype value_range"
VOLUME = {"modalities": ["CT"], "volume": {"spacing_mm": [12.0, 11.0, 13.0], "size": [16, 24, 20]}}


def study_of(images: dict[str, Any], network: str = "linear", relation: str = "independent") -> Study:
    return Study.model_validate(
        {
            "name": "small",
            "title": "Small",
            "purpose": "A test.",
            "task": {"targets": ["opacity", "effusion"], "relation": relation},
            "images": images,
            "network": {"name": network},
            "training": {"rounds": 1},
            "protection": "plain",
            "privacy": "none",
            "participation": {"sites": ["north"], "quorum": 1},
        }
    )


def scored(package: Package, images: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    with torch.inference_mode():
        grids = torch.from_numpy(np.stack(images))
        found: np.ndarray[Any, Any] = tasks.activation(exporting.network(package)(grids)).numpy()
    return found


def run_bundle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float]]:
    from monai.bundle import run

    monkeypatch.chdir(folder)
    run(config_file="configs/inference.json")
    found: dict[str, list[float]] = json.loads((folder / "scores.json").read_text())
    return found


def check_metadata(folder: Path, package: Package) -> None:
    found = json.loads((folder / "configs" / "metadata.json").read_text())
    assert set(REQUIRED.split()) <= set(found) and found["version"] == package.manifest["version"]
    assert all(isinstance(found[name], str) for name in ("schema", "task", "description", "authors", "copyright"))
    for tensor in (found["network_data_format"]["inputs"]["image"], found["network_data_format"]["outputs"]["pred"]):
        assert set(OF_A_TENSOR.split()) <= set(tensor)
        assert isinstance(tensor["num_channels"], int) and isinstance(tensor["spatial_shape"], list)
    for name in ("configs/metadata.json", "models/model.pt", "docs/README.md", "LICENSE"):
        assert (folder / name).is_file()


def test_a_bundle_scores_pictures_as_a_site_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the reader of pictures that `fl-client ingest` has, the study's grid and the network."""
    package, bundle = Package.read(packaged(study_of({"size_px": 32}), longest_side_px=64)), tmp_path / "bundle"
    exporting.export(package, "bundle", bundle)
    check_metadata(bundle, package)
    rng, inputs = np.random.default_rng(2), bundle / "inputs"
    ramp = np.linspace(0, 1, 90)[:, None] * np.linspace(1, 0.2, 70)[None]
    noisy = np.clip(ramp + rng.normal(0, 0.05, ramp.shape), 0, 1)
    Image.fromarray((noisy * 65535).astype(np.uint16)).save(inputs / "deep.png")
    Image.fromarray((noisy.T * 255).astype(np.uint8)).save(inputs / "flat.PNG")
    Image.fromarray((noisy * 255).astype(np.uint8)).convert("RGB").save(inputs / "grey.png")
    Image.fromarray((noisy * 255).astype(np.uint8)).save(inputs / "photo.jpg", quality=95)
    np.save(inputs / "ready.npy", rng.random((32, 32), np.float32))
    (inputs / "notes.txt").write_text("not an image")
    expected = {
        path.name: to_grid(headers.read_picture(path.read_bytes(), 64).pixels, 32)
        for path in inputs.iterdir()
        if path.suffix.lower() in (".png", ".jpg")
    } | {"ready.npy": np.load(inputs / "ready.npy")[None]}
    found = run_bundle(bundle, monkeypatch)
    assert set(found) == set(expected) and len(found) == 5
    wanted = scored(package, list(expected.values()))
    for (name, _), row in zip(expected.items(), wanted, strict=True):
        assert found[name] == pytest.approx(row.tolist(), abs=1e-4), name
    assert (
        len({round(row[0], 4) for row in found.values()}) >= 3
    )  # a reader that mixes up rows and columns would be seen


def test_a_bundle_scores_volumes_as_a_site_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Turned, tilted and coarse: the same score as through the site's own reader of NIfTI."""
    study = study_of(VOLUME)
    package, bundle = Package.read(packaged(study)), tmp_path / "bundle"
    exporting.export(package, "bundle", bundle)
    check_metadata(bundle, package)
    rng, inputs = np.random.default_rng(3), bundle / "inputs"
    places = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in (40, 36, 24)], indexing="ij"))
    body = np.where((places**2).sum(0) < 0.8, 40.0, -1000.0) + 300 * places[0] + rng.normal(0, 20, places[0].shape)
    turned = np.array([[0, -5.0, 0.6, 10], [5.5, 0, 0, -20], [0, 0, 8.0, 5], [0, 0, 0, 1]])
    for name, affine in (("straight.nii.gz", np.diag([6.0, 6.0, 9.0, 1.0])), ("turned.nii", turned)):
        nibabel.save(nibabel.Nifti1Image(body.astype(np.int16), affine), inputs / name)
    grid = study.images.volume
    assert grid is not None
    images = [to_volume_grid(*nifti.read(path.read_bytes()), grid) for path in sorted(inputs.iterdir())]
    found = run_bundle(bundle, monkeypatch)
    wanted = scored(package, images)
    assert list(found) == ["straight.nii.gz", "turned.nii"]
    for row, expected in zip(found.values(), wanted, strict=True):
        assert row == pytest.approx(expected.tolist(), abs=1e-4)
    assert abs(wanted[0] - wanted[1]).max() > 1e-3


CASES = [
    ({"size_px": 32}, "small_cnn", "exclusive"),
    ({"size_px": 64}, "densenet121", "independent"),
    ({"size_px": 64}, "vit", "ordered"),
    (VOLUME, "small_cnn", "independent"),
    (VOLUME, "resnet18", "independent"),
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pt2", "onnx"])
@pytest.mark.parametrize(("images", "network", "relation"), CASES, ids=[f"{c[1]}-{len(c[0])}" for c in CASES])
def test_other_forms_answer_as_the_network_does(
    kind: str, images: dict[str, Any], network: str, relation: str, tmp_path: Path
) -> None:
    """For any number of images; ONNX where its extra is installed."""
    runtime = pytest.importorskip("onnxruntime") if kind == "onnx" else None
    study = study_of(images, network, relation)
    package, path = Package.read(packaged(study)), tmp_path / f"m.{kind}"
    exporting.export(package, kind, path)
    for count in (1, 3):
        batch = torch.rand(count, *study.images.shape, generator=torch.Generator().manual_seed(count))
        with torch.inference_mode():
            expected = exporting._Scorer(exporting.network(package), package.study).eval()(batch).numpy()
        if runtime is None:
            found = torch.export.load(path).module()(batch).detach().numpy()
        else:
            found = runtime.InferenceSession(str(path)).run(None, {"images": batch.numpy()})[0]
        assert np.allclose(found, expected, atol=1e-4)
    with pytest.raises(DocumentError, match="exists already"):
        exporting.export(package, kind, path)
