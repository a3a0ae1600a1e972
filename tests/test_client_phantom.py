"""Phantom hospitals: the same bytes every time, every vendor's quirks, and files that ingest takes and counts."""

import csv
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from fl_client.ingest import Index, IngestReport, Reason, ingest
from fl_client.phantom import SIDE_PX, VENDORS, expose, make_hospital
from fl_client.site import Source
from models.labels import LabelMap

PATIENTS = 12


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    root = tmp_path_factory.mktemp("hospitals")
    return {
        name: (root / name, make_hospital(root / name, name, PATIENTS, 5, vendor)) for name, vendor in VENDORS.items()
    }


def ingested(home: Path, mapping: dict[str, Any], state: Path) -> IngestReport:
    source = Source(folder="dicom", labels=LabelMap.model_validate(mapping))
    return ingest(source, home, state)


def content(folder: Path) -> dict[str, str]:
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


@pytest.mark.parametrize("name", VENDORS)
def test_every_image_is_taken_and_labelled_and_the_dirt_is_counted(
    hospitals: dict[str, tuple[Path, dict[str, Any]]], tmp_path: Path, name: str
) -> None:
    home, mapping = hospitals[name]
    report = ingested(home, mapping, tmp_path / "state")
    assert report.patients == PATIENTS <= report.taken <= 2 * PATIENTS
    dirt = [Reason.NOT_DICOM, Reason.EMPTY_FILE, Reason.TRUNCATED, Reason.SECONDARY_CAPTURE, Reason.DUPLICATE]
    assert report.reasons == dict.fromkeys([Reason.LATERAL, *dirt], 1)
    assert report.labels and (report.labels.labelled, report.labels.unlabelled) == (report.taken, 0)
    assert report.labels.keys_without_image == 0 and not report.labels.unmapped and not report.labels.conflicts


def test_the_same_seed_gives_the_same_bytes_and_another_gives_others(tmp_path: Path) -> None:
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_hospital(tmp_path / folder, "site", 3, seed, VENDORS["cirrus"])
    assert content(tmp_path / "a") == content(tmp_path / "b")
    changed = {name for name, digest in content(tmp_path / "c").items() if content(tmp_path / "a").get(name) != digest}
    assert any("IM" in name for name in changed) and "labels.csv" in changed


def test_two_sites_of_one_seed_have_different_patients(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_hospital(tmp_path / name, name, 2, 1, VENDORS["aurora"])
    patients = [{pydicom.dcmread(p).PatientID for p in (tmp_path / n / "dicom").rglob("IM*")} for n in ("one", "two")]
    assert not patients[0] & patients[1]


def test_vendors_differ_in_polarity_bits_spacing_headers_and_words(
    hospitals: dict[str, tuple[Path, dict[str, Any]]],
) -> None:
    seen: dict[str, set[Any]] = {
        key: set() for key in ("polarity", "bits", "spacing", "syntax", "maker", "columns", "key")
    }
    without_view = 0
    for home, mapping in hospitals.values():
        for path in (home / "dicom").rglob("IM*"):
            header = pydicom.dcmread(path, stop_before_pixels=True)
            seen["polarity"].add(header.PhotometricInterpretation)
            seen["bits"].add(header.BitsStored)
            seen["spacing"].add(float(header.ImagerPixelSpacing[0]))
            seen["syntax"].add(header.file_meta.TransferSyntaxUID)
            seen["maker"].add(header.Manufacturer)
            without_view += "ViewPosition" not in header
        seen["columns"].add((home / "labels.csv").read_text().splitlines()[0])
        seen["key"].add(mapping["matches"])
    assert {key: len(values) for key, values in seen.items()} == {
        **{"polarity": 2, "bits": 4, "spacing": 4, "syntax": 4},
        **{"maker": 4, "columns": 4, "key": 3},
    }
    assert without_view > 4


def test_labels_hold_for_all_images_of_a_patient(
    hospitals: dict[str, tuple[Path, dict[str, Any]]], tmp_path: Path
) -> None:
    home, mapping = hospitals["aurora"]
    ingested(home, mapping, tmp_path / "state")
    with (home / "labels.csv").open(newline="") as file:
        words = {row["StudyInstanceUID"]: row["opacity"] for row in csv.DictReader(file)}
    said: dict[str, set[str]] = {}
    images = Index.open(tmp_path / "state").images()
    for image in images:
        said.setdefault(image.patient, set()).add(words[image.study_uid])
    assert len(images) > len(said) == PATIENTS
    assert all(len(words) == 1 for words in said.values())
    assert set().union(*said.values()) == {"0", "1"}


@pytest.mark.parametrize("name", VENDORS)
def test_a_chest_is_bright_in_the_middle_and_below_and_dark_in_the_lungs(name: str) -> None:
    for anatomy in range(3):
        picture = expose(anatomy, False, VENDORS[name], np.random.default_rng(anatomy))
        assert picture.shape == (SIDE_PX, SIDE_PX) and picture.dtype == np.float32
        assert float(picture.min()) >= 0 and float(picture.max()) <= 1
        lungs = (picture[90:130, 60:90].mean() + picture[90:130, 166:196].mean()) / 2
        assert picture[150:190, 120:136].mean() > lungs + 0.12  # heart and spine
        assert picture[215:235, 60:196].mean() > lungs + 0.12  # below the diaphragm


def test_an_opacity_makes_the_same_lungs_denser() -> None:
    denser = 0
    for anatomy in range(12):
        with_it, without = (
            expose(anatomy, case, VENDORS["dorado"], np.random.default_rng(7)) for case in (True, False)
        )
        denser += float(with_it[70:180, 45:210].mean()) > float(without[70:180, 45:210].mean())
    assert denser >= 11


def test_shortcuts_of_the_vendors_contradict_each_other() -> None:
    """Otherwise a model trained at one hospital would work at the others and the demo would show nothing."""
    lean = {name: (v.frame[0] - v.frame[1], v.plate[0] - v.plate[1]) for name, v in VENDORS.items()}
    assert lean["aurora"][0] > 0.5 and lean["boreal"][0] < -0.5 and lean["cirrus"][0] == 0
    assert lean["cirrus"][1] > 0.5 and lean["aurora"][1] < 0
    assert lean["dorado"] == (0, 0)
