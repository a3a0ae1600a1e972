"""CT as folders hold it: series become volumes, and everything that is none is left out by name, file by file."""

import copy
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import JPEG2000Lossless, generate_uid

from fl_client.cache import Cache
from fl_client.ingest import Index, IngestReport, Reason, ingest
from fl_client.phantom_ct import SCANNERS, Scanner, make_ct_hospital, series
from fl_client.site import Source
from models.labels import LabelMap
from models.study import Study, parse
from models.volumes import AIR_HU
from privacy.errors import DataError

SHARED = Path(__file__).parents[2] / "shared" / "data" / "dicom"
AURORA, BOREAL, CIRRUS = SCANNERS
LABELS = {"table": "labels.csv", "key": "key", "matches": "series_uid"}
TARGETS = {"opacity": {"column": "finding", "words": {"yes": 1, "no": 0}}}


class Hospital:
    def __init__(self, home: Path) -> None:
        self.home, self.images, self.state = home, home / "dicom", home / "state"
        self.images.mkdir(parents=True)
        (home / "labels.csv").write_text("key,finding\n1,yes\n")

    def put(self, slices: list[Dataset], folder: str = "series") -> list[Path]:
        place = self.images / folder
        place.mkdir(parents=True, exist_ok=True)
        before = len(list(place.iterdir()))
        paths = [place / f"IM{before + number:03d}" for number in range(len(slices))]
        for dataset, path in zip(slices, paths, strict=True):
            dataset.save_as(path, enforce_file_format=True)
        return paths

    def source(self, **changes: Any) -> Source:
        labels = LabelMap.model_validate(LABELS | {"targets": TARGETS})
        return Source.model_validate({"folder": "dicom", "labels": labels} | changes)

    def ingest(self, **changes: Any) -> IngestReport:
        return ingest(self.source(**changes), self.home, self.state)

    def reasons(self, **changes: Any) -> tuple[int, dict[str, int]]:
        report = self.ingest(**changes)
        index = Index.open(self.state)
        assert report.found == sum(image.files for image in index.images()) + sum(report.reasons.values())
        listed = Counter(index.left_out().values())
        assert {reason: n for reason, n in report.reasons.items() if reason != Reason.DUPLICATE} == {
            reason: n for reason, n in listed.items() if reason != Reason.DUPLICATE
        }
        return report.taken, {str(reason): count for reason, count in report.reasons.items()}


@pytest.fixture
def hospital(tmp_path: Path) -> Hospital:
    return Hospital(tmp_path / "hospital")


def scan(scanner: Scanner = AURORA, place: str = "one", seed: int = 1) -> list[Dataset]:
    return series(place, scanner, np.random.default_rng(seed), opaque=True)


def change(slices: list[Dataset], **values: Any) -> list[Dataset]:
    """Copies with other header values; each gets its own instance number, as a real second series has."""
    made = []
    for number, dataset in enumerate(slices):
        other = copy.deepcopy(dataset)
        for keyword, value in values.items():
            setattr(other, keyword, value)
        other.SOPInstanceUID = str(
            generate_uid(entropy_srcs=["other", str(values), str(number), str(dataset.SOPInstanceUID)])
        )
        other.file_meta.MediaStorageSOPInstanceUID = other.SOPInstanceUID
        made.append(other)
    return made


@pytest.mark.parametrize("scanner", SCANNERS, ids=lambda scanner: scanner.manufacturer)
def test_every_scanner_gives_the_same_hounsfield_units(hospital: Hospital, scanner: Scanner) -> None:
    slices = scan(scanner)
    hospital.put(slices)
    assert hospital.reasons() == (1, {})
    index = Index.open(hospital.state)
    (image,) = index.images()
    volume = index.volume(image)
    by_height = sorted(slices, key=lambda s: float(s.ImagePositionPatient[2]))
    for number, dataset in enumerate(by_height):
        stored = dataset.pixel_array.astype(int) + int(dataset.RescaleIntercept)
        np.testing.assert_array_equal(volume[number], np.maximum(stored, AIR_HU))
    assert image.files == len(slices) and image.modality == "CT" and image.is_volume and image.sop_uid
    assert image.age_years is not None and image.sex in "FM"
    assert image.tilt_degrees == pytest.approx(scanner.tilt_degrees, abs=0.05)


def test_what_lies_beside_a_series_is_told_apart(hospital: Hospital) -> None:
    slices = scan()
    hospital.put(slices)
    hospital.put(change(slices[:1], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]))
    hospital.put(change(slices[:2], SOPClassUID="1.2.840.10008.5.1.4.1.1.7"))
    hospital.put(change(slices[:1], SOPClassUID="1.2.840.10008.5.1.4.1.1.2.1"))
    hospital.put(change(slices[:1], NumberOfFrames=2))
    hospital.put(change(slices[:1], SamplesPerPixel=3, PhotometricInterpretation="RGB"))
    hospital.put(change(slices[:1], BurnedInAnnotation="YES"))
    hospital.put(change(slices[:1], ImagePositionPatient=None))
    hospital.put(change(slices[:1], ImageOrientationPatient=[1, 0, 0, 1, 0, 0]))
    hospital.put(change(slices[:3], ImageOrientationPatient=[1, 0, 0, 0, 0, -1]))  # a coronal copy in the same series
    expected = {
        **{"localizer": 1, "secondary_capture": 2, "enhanced_multiframe": 2, "colour": 1, "burned_in_text": 1},
        **{"no_geometry": 2, "too_few_slices": 3},
    }
    assert hospital.reasons() == (1, expected)


def test_a_series_with_two_matrices_or_spacings_is_two_volumes(hospital: Hospital) -> None:
    slices = scan()
    coarse = change(slices, PixelSpacing=[3.0, 3.0])
    hospital.put([*slices, *coarse])
    assert (
        hospital.reasons()[0] == 1
    )  # the same pixels with another spacing: one exposure reconstructed twice is kept once
    other = change(scan(seed=2), PixelSpacing=[3.0, 3.0], SeriesInstanceUID=slices[0].SeriesInstanceUID)
    shutil.rmtree(hospital.images)
    hospital.put([*slices, *other])
    assert hospital.reasons() == (2, {})


def test_two_passages_at_one_place_are_two_volumes_if_they_are_numbered(hospital: Hospital) -> None:
    first, second = scan(seed=1), scan(seed=2)
    same = str(first[0].SeriesInstanceUID)
    hospital.put([*change(first, AcquisitionNumber=1), *change(second, AcquisitionNumber=2, SeriesInstanceUID=same)])
    assert hospital.reasons() == (2, {})
    shutil.rmtree(hospital.images)
    hospital.put([*first, *change(second, SeriesInstanceUID=same)])
    assert hospital.reasons() == (0, {"position_twice": len(first) + len(second)})


def test_slices_sent_twice_are_one_slice(hospital: Hospital) -> None:
    slices = scan()
    hospital.put(slices)
    hospital.put(slices[:5], "again")
    recoded = copy.deepcopy(slices[7])
    recoded.compress(JPEG2000Lossless, generate_instance_uid=False)  # the same instance, compressed on its way
    hospital.put([recoded], "again")
    assert hospital.reasons() == (1, {"duplicate": 6})


@pytest.mark.parametrize(("gone", "reason"), [((9,), "missing_slices"), ((0,), ""), ((3, 4, 12), "missing_slices")])
def test_a_missing_slice_is_noticed_unless_it_is_the_last(
    hospital: Hospital, gone: tuple[int, ...], reason: str
) -> None:
    slices = [dataset for number, dataset in enumerate(scan()) if number not in gone]
    hospital.put(slices)
    assert hospital.reasons() == ((0, {reason: len(slices)}) if reason else (1, {}))


def test_one_damaged_slice_costs_its_series_and_no_other(hospital: Hospital) -> None:
    paths = hospital.put(scan())
    hospital.put(scan(BOREAL, "two", 2), "two")
    whole = paths[4].read_bytes()
    paths[4].write_bytes(whole[:-500])
    count = len(paths)
    assert hospital.reasons() == (1, {"truncated": count})
    paths[4].write_bytes(whole)
    assert hospital.reasons() == (2, {})


def test_forgotten_intercepts_and_padding_are_noticed(hospital: Hospital) -> None:
    wrong = change(scan(), RescaleIntercept=0)
    for dataset in wrong:  # unsigned values as some converters leave them, without what makes them Hounsfield units
        dataset.PixelData = np.maximum(dataset.pixel_array, 0).astype("<i2").tobytes()
    hospital.put(wrong)
    assert hospital.reasons() == (0, {"not_hounsfield": len(wrong)})


def test_without_identifiers_the_folder_is_series_and_patient(hospital: Hospital) -> None:
    blank = dict.fromkeys(("StudyInstanceUID", "SeriesInstanceUID", "PatientID", "PatientName", "AccessionNumber"), "")
    for number in range(2):
        slices = change(scan(place=str(number), seed=number), **blank)
        for dataset in slices:
            dataset.SOPInstanceUID = ""
        hospital.put(slices, f"patient{number}/ct")
    total = len(list(hospital.images.rglob("IM*")))
    assert hospital.reasons() == (0, {"no_patient": total})
    assert hospital.reasons(patients="folder") == (2, {})
    assert {image.patient for image in Index.open(hospital.state).images()} == {"patient0", "patient1"}


def test_a_changed_or_removed_slice_is_noticed_by_the_next_run(hospital: Hospital) -> None:
    paths = hospital.put(scan())
    hospital.ingest()
    before = Index.open(hospital.state).images()[0]
    assert hospital.ingest().read == 0
    highest = max(paths, key=lambda path: path.stat().st_mtime_ns if False else path.name)
    highest.unlink()
    assert hospital.ingest().taken == 1  # one slice less at the end is still a volume
    after = Index.open(hospital.state).images()[0]
    assert after.files == before.files - 1 and after.cache != before.cache
    assert not Cache(hospital.state).path(before.cache).exists()


def test_lossy_slices_are_taken_if_they_decode_and_are_marked(hospital: Hospital) -> None:
    slices = change(scan(), LossyImageCompression="01")
    hospital.put(slices)
    assert hospital.reasons() == (1, {})
    assert Index.open(hospital.state).images()[0].lossy


CT_STUDY = """
name: glass
title: Ground glass in CT phantoms
purpose: A test.
task: {targets: [opacity]}
images: {modalities: [CT], volume: {spacing_mm: [12, 10, 10], size: [16, 24, 32]}}
training: {rounds: 1}
protection: plain
privacy: none
participation: {sites: [north], quorum: 1, minimum_patients: 2}
evaluation: {validation: 0.2, test: 0.2}
"""


def test_volumes_become_a_cohort_and_radiographs_do_not_mix_with_them(tmp_path: Path) -> None:
    from fl_client.cohort import Cohort
    from models.labels import LabelTable

    mapping = make_ct_hospital(tmp_path, "north", 16, 1, CIRRUS)
    source = Source.model_validate({"folder": str(tmp_path / "dicom"), "labels": mapping})
    ingest(source, tmp_path, tmp_path / "state")
    index, labels = Index.open(tmp_path / "state"), LabelTable.read(Path(mapping["table"]), source.labels)
    cohort = Cohort.open(index, labels, parse(Study, CT_STUDY, "x"), "train", tmp_path / "pins.json")
    assert (
        cohort.images.shape[1:] == (1, 16, 24, 32) and 0 <= float(cohort.images.min()) < float(cohort.images.max()) <= 1
    )
    assert cohort.counts.patients == cohort.counts.images == len(cohort)
    flat = CT_STUDY.replace(
        "{modalities: [CT], volume: {spacing_mm: [12, 10, 10], size: [16, 24, 32]}}", "{size_px: 32}"
    )
    with pytest.raises(DataError, match="0 labelled patients"):
        Cohort.open(index, labels, parse(Study, flat, "x"), "train", tmp_path / "pins2.json")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real CT sets are not here")
def test_the_real_sets_give_the_documented_result(hospital: Hospital) -> None:
    for name in ("siemens_j2k", "ge_head_tilt_irregular", "philips_phantom_extras", "wg04"):
        shutil.copytree(SHARED / name, hospital.images / name)
    expected = {
        "irregular_gaps": 28,  # the whole GE head: 4.22, 1.14 and 7.38 mm apart
        "too_few_slices": 7,  # the one CT slice of WG-04 in its lossless and formerly lossy forms
        "secondary_capture": 4,  # Philips: reference image, patient page, two reports that call themselves clean
        "localizer": 1,
        "unsupported_syntax": 2,
    }
    taken, reasons = hospital.reasons(patients="folder")
    assert reasons == expected
    (volume,) = [image for image in Index.open(hospital.state).images() if image.is_volume]
    assert (volume.files, volume.shape, volume.spacing_mm) == (20, (20, 512, 512), (2.0, 0.976562, 0.976562))
    assert taken == 1
    # The GE head's evenly spaced part is a volume, and its tilt is known.
    kept = sorted((hospital.images / "ge_head_tilt_irregular").iterdir())
    for path in kept[12:]:
        path.unlink()
    hospital.ingest(patients="folder")
    head = [i for i in Index.open(hospital.state).images() if i.patient == "ge_head_tilt_irregular"]
    assert [round(image.tilt_degrees, 1) for image in head] == [18.5]
