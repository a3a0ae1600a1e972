"""Ingest: everything in the folder is counted, nothing is read twice, a kill loses nothing, and no header is shown."""

import csv
import io
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, JPEG2000Lossless, RLELossless

from fl_client import sources
from fl_client.headers import Caption, look_at_picture, view_in_words, view_of
from fl_client.ingest import Index, IngestReport, Progress, Reason, ingest
from fl_client.site import Source
from models.labels import LabelMap
from privacy.errors import CacheLost, DataError, ImageLeftOut, LabelTableError

CR, DX = "1.2.840.10008.5.1.4.1.1.1", "1.2.840.10008.5.1.4.1.1.1.1"
SHARED = Path(__file__).parents[2] / "shared"
OPACITY = {"opacity": {"column": "finding", "words": {"yes": 1, "no": 0}}}


def radiograph(number: int = 0, **header: Any) -> Dataset:
    """A small frontal CR whose pixels and identifiers depend on `number`; a value of None removes a keyword."""
    stored = np.random.default_rng(number).integers(0, 4096, (80, 64)).astype("<u2")
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.Modality = CR, "CR"
    dataset.PatientID, dataset.PatientName = f"P{number}", f"ZZSECRET^{number}"
    dataset.SOPInstanceUID, dataset.StudyInstanceUID = f"1.2.3.{number}", f"1.2.4.{number}"
    dataset.SeriesInstanceUID, dataset.AccessionNumber = f"1.2.5.{number}", f"A{number}"
    dataset.ViewPosition = "PA"
    dataset.Rows, dataset.Columns = stored.shape
    dataset.PhotometricInterpretation, dataset.SamplesPerPixel, dataset.PixelRepresentation = "MONOCHROME2", 1, 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PixelData = stored.tobytes()
    dataset["PixelData"].VR = "OW"
    for keyword, value in header.items():
        if value is None:
            delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)
    dataset.file_meta.MediaStorageSOPClassUID = dataset.get("SOPClassUID", CR)
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    return dataset


def encoded(dataset: Dataset) -> bytes:
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


class Hospital:
    """A folder with `dicom`, `labels.csv` and `state`, and the site.yaml section that describes them."""

    def __init__(self, home: Path) -> None:
        self.home, self.images, self.state = home, home / "dicom", home / "state"
        self.images.mkdir(parents=True)
        self.label({"1.2.4.0": "yes"})

    def label(self, words: dict[str, str], header: tuple[str, ...] = ("key", "finding")) -> None:
        with (self.home / "labels.csv").open("w", newline="") as file:
            csv.writer(file).writerows([header, *([k, *w.split("|")] for k, w in words.items())])

    def put(self, name: str, content: Dataset | bytes) -> Path:
        path = self.images / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else encoded(content))
        return path

    def source(self, **changes: Any) -> Source:
        mapping = {"table": "labels.csv", "key": "key", "matches": "study_uid", "targets": OPACITY} | changes.pop(
            "labels", {}
        )
        return Source.model_validate({"folder": "dicom", "labels": LabelMap.model_validate(mapping)} | changes)

    def ingest(self, progress: Progress = lambda stage, done, total: None, **changes: Any) -> IngestReport:
        return ingest(self.source(**changes), self.home, self.state, progress, changes.pop("jobs", 0))

    def reason(self, content: Dataset | bytes) -> str:
        """Why this one file is left out; "" if it is taken."""
        self.put("one", content)
        return next(iter(self.ingest().reasons), "")


@pytest.fixture
def hospital(tmp_path: Path) -> Hospital:
    return Hospital(tmp_path / "hospital")


def test_an_image_is_taken_with_what_labels_and_splits_need(hospital: Hospital) -> None:
    hospital.put("a/b", radiograph(Manufacturer="Acme", ImagerPixelSpacing=[0.2, 0.1], PatientID=" P0 "))
    report = hospital.ingest()
    assert (report.found, report.taken, report.patients, report.reasons) == (1, 1, 1, {})
    assert report.labels and (report.labels.labelled, report.labels.unlabelled) == (1, 0)
    (image,) = Index.open(hospital.state).images()
    assert (image.file, image.patient, image.study_uid, image.series_uid) == ("a/b", "P0", "1.2.4.0", "1.2.5.0")
    assert (image.sop_uid, image.accession, image.modality, image.view) == ("1.2.3.0", "A0", "CR", "frontal")
    assert (image.manufacturer, image.spacing_mm) == ("Acme", (0.2, 0.1))
    assert [image.key(m) for m in ("study_uid", "accession", "patient_id", "file")] == ["1.2.4.0", "A0", "P0", "a/b"]


def test_cached_pixels_are_the_files_in_16_bits_and_reduced(hospital: Hospital) -> None:
    hospital.put("one", radiograph())
    hospital.ingest()
    index = Index.open(hospital.state)
    raw = np.random.default_rng(0).integers(0, 4096, (80, 64)).astype(float)
    low, high = np.percentile(raw, [0.5, 99.5])
    np.testing.assert_allclose(index.pixels(index.images()[0]), np.clip((raw - low) / (high - low), 0, 1), atol=1e-5)
    report = hospital.ingest(longest_side_px=64)
    index = Index.open(hospital.state)
    assert report.read == 1 and index.pixels(index.images()[0]).shape == (64, 51)
    assert len(list((hospital.state / "cache").rglob("*.npy"))) == 1  # the larger one is gone


def deflation_bomb() -> bytes:
    import zlib

    dataset = radiograph()
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    whole = encoded(dataset)
    start = 144 + int.from_bytes(whole[140:144], "little")
    packer = zlib.compressobj(wbits=-15)
    return whole[:start] + packer.compress(bytes(30_000_000)) + packer.flush()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty_file"),
        (b"exported by PACS\n", "not_dicom"),
        (b"\x08\x00" + b"text" * 50, "not_dicom"),
        (bytes(128) + b"DICM", "truncated"),
        (bytes(128) + b"DICM" + b"\xff" * 400, "truncated"),
        (bytes(5000), "not_dicom"),
        (radiograph(SOPClassUID="1.2.840.10008.5.1.4.1.1.7", Modality="OT"), "secondary_capture"),
        (radiograph(SOPClassUID="1.2.840.10008.5.1.4.1.1.7.2"), "secondary_capture"),
        (radiograph(SOPClassUID="1.2.840.10008.5.1.4.1.1.2", Modality="CT"), "no_geometry"),
        (radiograph(SOPClassUID="1.2.840.10008.5.1.4.1.1.6.1", Modality="US"), "other_object"),
        (radiograph(Modality="MG"), "other_object"),
        (radiograph(SOPClassUID=DX + ".1", Modality="DX"), "for_processing"),
        (radiograph(SOPClassUID=DX, Modality="DX", PresentationIntentType="FOR PROCESSING"), "for_processing"),
        (radiograph(ViewPosition="LL"), "lateral"),
        (radiograph(ViewPosition=None), "view_unknown"),
        (radiograph(ViewPosition="RLD"), "view_unknown"),
        (radiograph(PatientID=""), "no_patient"),
        (radiograph(PatientID=None), "no_patient"),
        (radiograph(BurnedInAnnotation="YES"), "burned_in_text"),
        (radiograph(SamplesPerPixel=3, PhotometricInterpretation="RGB"), "colour"),
        (radiograph(PhotometricInterpretation="PALETTE COLOR"), "polarity_unknown"),
        (radiograph(PixelData=None), "truncated"),
        (radiograph(PixelData=bytes(80 * 64 * 2)), "blank"),
        (radiograph(NumberOfFrames=0), ""),
        (radiograph(Rows=79), ""),
        (radiograph(Rows=800), "truncated"),
        (radiograph(Rows=65535, Columns=65535), "too_large"),
        (deflation_bomb(), "too_large"),
    ],
)
def test_what_is_left_out_has_a_name(
    hospital: Hospital, monkeypatch: pytest.MonkeyPatch, content: Dataset | bytes, reason: str
) -> None:
    monkeypatch.setattr("fl_client.headers.FILE_BYTES_MAX", 1_000_000)
    assert hospital.reason(content) == reason


@pytest.mark.parametrize("change", [{"SOPClassUID": None}, {"Modality": None}, {"SOPClassUID": DX, "Modality": "DX"}])
def test_a_radiograph_is_known_by_class_or_modality(hospital: Hospital, change: dict[str, Any]) -> None:
    assert hospital.reason(radiograph(**change)) == ""


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless, JPEG2000Lossless])
def test_a_copy_cut_anywhere_is_left_out_by_name(hospital: Hospital, syntax: str) -> None:
    dataset = radiograph(number=3)
    if syntax != ExplicitVRLittleEndian:
        dataset.compress(syntax, generate_instance_uid=False)
    whole = encoded(dataset)
    for number, cut in enumerate([133, 150, 200, 350, 600, 900, len(whole) // 3, len(whole) // 2, len(whole) - 40]):
        hospital.put(f"cut{number}", whole[:cut])
    report = hospital.ingest()
    assert report.taken == 0 and report.found == 9
    assert set(report.reasons) <= {Reason.TRUNCATED, Reason.NOT_DICOM, Reason.UNREADABLE_PIXELS}
    assert report.reasons[Reason.TRUNCATED] >= 6


def test_flipped_bytes_never_stop_the_run(hospital: Hospital) -> None:
    rng = np.random.default_rng(1)
    whole = encoded(radiograph())
    for number in range(60):
        damaged = bytearray(whole)
        for place in rng.integers(0, 1000, 8):
            damaged[place] = int(rng.integers(256))
        hospital.put(f"flip{number}", bytes(damaged))
    report = hospital.ingest()
    assert report.found == 60 == report.taken + sum(report.reasons.values())


def test_a_file_without_preamble_is_dicom_too(hospital: Hospital) -> None:
    dataset = radiograph()
    del dataset.file_meta
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset, implicit_vr=True, little_endian=True)
    assert hospital.reason(buffer.getvalue()) == ""


def test_duplicates_are_counted_once_whatever_their_name(hospital: Hospital) -> None:
    hospital.put("b", radiograph())
    hospital.put("a", radiograph())
    again = radiograph()
    again.compress(RLELossless, generate_instance_uid=False)  # the same instance, sent compressed
    hospital.put("c", again)
    hospital.put("d", radiograph(SOPInstanceUID="1.2.9.9", PatientID="P7"))  # the same pixels under another number
    report = hospital.ingest()
    assert (report.taken, report.reasons) == (1, {Reason.DUPLICATE: 3})
    assert Index.open(hospital.state).images()[0].file == "a"
    (hospital.images / "a").unlink()
    report = hospital.ingest()
    assert (report.taken, report.read, report.removed) == (1, 0, 1)
    assert Index.open(hospital.state).images()[0].file == "b"


def test_equal_instance_numbers_of_different_patients_are_different_images(hospital: Hospital) -> None:
    for number in range(2):
        hospital.put(f"f{number}", radiograph(number, SOPInstanceUID="1.2.3"))
        anonymous = radiograph(number + 2)
        anonymous.SOPInstanceUID = ""
        hospital.put(f"e{number}", anonymous)
    assert hospital.ingest().taken == 4


def test_a_second_run_reads_only_what_changed(hospital: Hospital) -> None:
    for number in range(5):
        hospital.put(f"f{number}", radiograph(number))
    hospital.put("note.txt", b"text")
    calls: list[tuple[str, int, int]] = []
    assert hospital.ingest(lambda *call: calls.append(call)).read == 6
    looked, made = [("looking at files", n, 6) for n in range(7)], [("reading images", n, 5) for n in range(6)]
    assert calls == looked + made
    assert hospital.ingest().read == 0
    size = (hospital.images / "f1").stat().st_size
    assert hospital.put("f1", radiograph(8)).stat().st_size == size  # only its date tells that it changed
    hospital.put("f9", radiograph(9))
    (hospital.images / "f2").unlink()
    (hospital.images / "note.txt").unlink()
    report = hospital.ingest()
    assert (report.read, report.removed, report.taken, report.found) == (2, 2, 5, 5)
    assert {i.patient for i in Index.open(hospital.state).images()} == {"P0", "P8", "P3", "P4", "P9"}
    assert len(list((hospital.state / "cache").rglob("*.npy"))) == 5


def test_missing_or_emptied_cache_files_are_made_again(hospital: Hospital) -> None:
    for number in range(3):
        hospital.put(f"f{number}", radiograph(number))
    hospital.ingest()
    index = Index.open(hospital.state)
    paths = sorted((hospital.state / "cache").rglob("*.npy"))
    paths[0].unlink()
    paths[1].write_bytes(b"")
    lost = 0
    for image in index.images():
        try:
            index.pixels(image)
        except CacheLost:
            lost += 1
    assert lost == 2
    assert hospital.ingest().read == 2
    assert all(index.pixels(image).size for image in index.images())


@pytest.mark.parametrize("damage", ["garbage", "truncated", "version", "gone"])
def test_a_damaged_index_is_named_and_made_anew(hospital: Hospital, damage: str) -> None:
    hospital.put("one", radiograph())
    hospital.ingest()
    path = hospital.state / "index.sqlite"
    if damage == "garbage":
        path.write_bytes(b"x" * 5000)
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:6000])
    elif damage == "gone":
        path.unlink()
    else:
        with sqlite3.connect(path) as database:
            database.execute("UPDATE facts SET value = '99' WHERE name = 'version'")
    with pytest.raises(CacheLost):
        Index.open(hospital.state)
    assert hospital.ingest().taken == 1


def test_only_the_owner_can_read_cache_and_index(hospital: Hospital) -> None:
    hospital.put("one", radiograph())
    hospital.ingest()
    for path in [hospital.state, *hospital.state.rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path


def test_neither_report_nor_terminal_shows_a_header(
    hospital: Hospital, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    bad = encoded(radiograph(0)).replace(b"1.2.3.0", b"ZZSECRE").replace(b"ZZSECRET^0", b"ZZSECRET\xe90")
    hospital.put("ZZSECRET.dcm", bad)
    hospital.put("half", bad[: len(bad) // 2])
    hospital.put("odd", radiograph(1, PatientBirthDate="19500101", ImagerPixelSpacing=[1, 1]))
    report = hospital.ingest()
    shown = "".join(capfd.readouterr()) + json.dumps(report.to_json()) + "".join(str(w.message) for w in recwarn)
    assert "ZZSECRE" not in shown
    assert json.loads(json.dumps(report.to_json()))["left_out"] == {"truncated": 1}


def test_links_out_of_the_folder_pipes_and_large_files_are_not_read(
    hospital: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = hospital.home / "outside"
    outside.mkdir()
    (outside / "image").write_bytes(encoded(radiograph()))
    hospital.put("real", radiograph(1))
    (hospital.images / "file-link").symlink_to(outside / "image")
    (hospital.images / "folder-link").symlink_to(outside, target_is_directory=True)
    (hospital.images / "circle").symlink_to(hospital.images / "circle")
    (hospital.images / "inside").symlink_to(hospital.images / "real")
    os.mkfifo(hospital.images / "pipe")
    hospital.put("large", bytes(50_000))
    monkeypatch.setattr(sources, "FILE_BYTES_MAX", 40_000)
    report = hospital.ingest()
    expected = {Reason.OUTSIDE_FOLDER: 3, Reason.DUPLICATE: 1, Reason.UNREADABLE_FILE: 1, Reason.TOO_LARGE: 1}
    assert (report.taken, report.reasons) == (1, expected)


def test_odd_names_are_files_like_others(hospital: Hospital) -> None:
    for number, name in enumerate([b"\xff\xfe", "ü b".encode(), b"a\nb", b"%s", b".hidden"]):
        (hospital.images / os.fsdecode(name)).write_bytes(encoded(radiograph(number)))
    assert hospital.ingest().taken == 5
    assert hospital.ingest().read == 0


def test_a_missing_or_suddenly_empty_folder_is_an_error_and_forgets_nothing(hospital: Hospital) -> None:
    hospital.put("one", radiograph())
    hospital.ingest()
    with pytest.raises(DataError, match="no such folder"):
        hospital.ingest(folder="elsewhere")
    (hospital.images / "one").unlink()
    with pytest.raises(DataError, match="is empty") as caught:
        hospital.ingest()
    assert "mounted" in caught.value.remedy
    assert Index.open(hospital.state).taken == 1


def test_another_folder_with_the_same_names_is_read_anew(hospital: Hospital) -> None:
    path = hospital.put("one", radiograph())
    hospital.ingest()
    other = hospital.home / "other"
    other.mkdir()
    (other / "one").write_bytes(encoded(radiograph(1)))
    os.utime(other / "one", ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    assert hospital.ingest(folder="other").read == 1
    assert Index.open(hospital.state).images()[0].patient == "P1"


def test_two_ingests_at_once_are_refused(hospital: Hospital) -> None:
    hospital.put("one", radiograph())

    def meanwhile(stage: str, done: int, total: int) -> None:
        hospital.ingest()

    with pytest.raises(DataError, match="another ingest"):
        hospital.ingest(meanwhile)
    assert hospital.ingest().taken == 1


KILLED = """
import sys, time
from pathlib import Path
from fl_client.ingest import ingest
from fl_client.site import Source
from models.study import read
def slow(stage, done, total):
    print(stage.split()[0], done, flush=True)
    time.sleep(0.004)
home = Path(sys.argv[1])
ingest(Source.model_validate_json((home / "source.json").read_text()), home, home / "state", slow)
"""


def test_killed_at_any_instant_it_goes_on(hospital: Hospital) -> None:
    for number in range(80):
        hospital.put(f"f{number:03d}", radiograph(number))
    (hospital.home / "source.json").write_text(hospital.source().model_dump_json())
    for stage, stop in (("looking", 40), ("reading", 40), ("reading", 70)):
        command = [sys.executable, "-c", KILLED, str(hospital.home)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) as process:
            assert process.stdout
            while (line := process.stdout.readline().split()) and (line[0] != stage or int(line[1]) < stop):
                pass
            process.send_signal(signal.SIGKILL)
    index = Index.open(hospital.state)
    assert 32 <= index.taken < 80 and not index.complete
    assert all(index.pixels(image).shape == (80, 64) for image in index.images())
    report = hospital.ingest()
    assert (report.taken, report.found) == (80, 80) and report.read < 50
    assert Index.open(hospital.state).complete
    assert len([p for p in (hospital.state / "cache").rglob("*") if p.is_file()]) == 80


def test_the_index_of_a_site_that_never_ingested_is_lost(tmp_path: Path) -> None:
    with pytest.raises(CacheLost) as caught:
        Index.open(tmp_path)
    assert "fl-client ingest" in caught.value.remedy


def test_a_table_that_cannot_be_read_does_not_stop_dicom(hospital: Hospital) -> None:
    hospital.put("one", radiograph())
    (hospital.home / "labels.csv").unlink()
    report = hospital.ingest()
    assert report.taken == 1 and report.labels is None
    assert "no such label table" in str(report.label_problem)


def test_how_the_table_fits_is_counted(hospital: Hospital) -> None:
    for number in range(4):
        hospital.put(f"f{number}", radiograph(number))
    hospital.label({"1.2.4.0": "yes", "1.2.4.1": "perhaps", "1.2.4.2": "", "9.9": "no"})
    labels = hospital.ingest().labels
    assert labels
    assert (labels.labelled, labels.unlabelled, labels.rows, labels.keys_without_image) == (1, 3, 4, 1)
    assert labels.unmapped == {"opacity": {"perhaps": 1}}


@pytest.mark.parametrize(
    ("header", "view"),
    [
        ({"ViewPosition": "AP"}, "frontal"),
        ({"ViewPosition": "LARGE LATERAL"}, "lateral"),
        ({"ViewPosition": "LL", "PatientOrientation": ["L", "F"], "StudyDescription": "CHEST PA"}, "lateral"),
        ({"ViewPosition": "PA", "StudyDescription": "LATERAL"}, "frontal"),
        ({"PatientOrientation": ["L", "F"], "StudyDescription": "XR CHEST PA AND LATERAL"}, "frontal"),
        ({"PatientOrientation": ["R", "F"]}, "frontal"),
        ({"PatientOrientation": ["A", "F"], "StudyDescription": "CHEST PA"}, "lateral"),
        ({"PatientOrientation": ["P", "F"]}, "lateral"),
        ({"PatientOrientation": "L", "SeriesDescription": "W Chest Lat."}, "lateral"),
        (
            {"PatientOrientation": ["", ""], "SeriesDescription": "Chest p.a.", "StudyDescription": "Thorax PA"},
            "frontal",
        ),
        ({"SeriesDescription": "LATERAL", "StudyDescription": "CHEST PA"}, "lateral"),
        ({"StudyDescription": "XR CHEST PA AND LATERAL"}, "unknown"),
        ({"StudyDescription": "CHEST PORTABLE 1 VIEW"}, "frontal"),
        ({"StudyDescription": "CHEST PAIN CLINIC"}, "unknown"),
        ({"ViewPosition": "", "StudyDescription": "LATERAL DECUBITUS"}, "unknown"),
        ({}, "unknown"),
    ],
)
def test_the_view_is_decided_by_the_most_trusted_header(header: dict[str, Any], view: str) -> None:
    dataset = Dataset()
    for keyword, value in header.items():
        setattr(dataset, keyword, value)
    assert view_of(dataset) == view


def test_view_codes_are_read_by_their_meaning() -> None:
    code = Dataset()
    code.CodeMeaning = "postero-anterior"
    dataset = Dataset()
    dataset.ViewCodeSequence = [code]
    assert view_of(dataset) == "frontal"
    assert view_in_words("left lateral") == "lateral"


def picture(number: int = 0, mode: str = "L", form: str = "PNG") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (70, 66)).astype("u1")
    image = Image.fromarray(pixels).resize((132, 140))
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, form)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("code", "view"),
    [
        (("36589-0", "LN", "Portable XR Chest AP single view"), "frontal"),
        (("42272-5", "LN", "XR Chest PA and Lateral"), "unknown"),
        (("36554-4", "LN", "XR Chest Single view"), "unknown"),
        (("1234", "99LOCAL", "CHEST PORTABLE AP"), "frontal"),
        (("1234", "99LOCAL", "CHEST LATERAL"), "lateral"),
        (("", "", ""), "unknown"),
    ],
)
def test_the_procedure_decides_where_nothing_nearer_does(code: tuple[str, str, str], view: str) -> None:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = code
    assert view_of(radiograph(ViewPosition=None, ProcedureCodeSequence=[item])) == view
    assert view_of(radiograph(ViewPosition="LL", ProcedureCodeSequence=[item])) == "lateral"


@pytest.mark.skipif(not (SHARED / "data" / "midrc_tables").is_dir(), reason="MIDRC's tables are not here")
def test_frontal_codes_are_those_that_the_map_calls_portable_or_ap() -> None:
    from fl_client.headers import LOINC_FRONTAL

    table = SHARED / "data" / "midrc_tables" / "loinc_study_description_mapping.tsv"
    with table.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    names = {row["LOINC code"].strip(): row["L-Long Common Name"] for row in rows}
    known = {code: names[code] for code in LOINC_FRONTAL if code in names}
    assert len(known) >= 3 and all("Chest" in name and "ateral" not in name for name in known.values())
    assert all("AP" in name or "Portable" in name for name in known.values())


PICTURES: dict[str, Any] = {"format": "pictures", "labels": {"matches": "file", "patient": "who", "view": "view"}}


def test_pictures_take_patient_and_view_from_the_table(hospital: Hospital) -> None:
    hospital.label(
        {"a.png": "yes|p1|PA", "b/c.jpg": "no|p2|", "d.png": "no|p3|LL", "e.png": "no||AP", "g.png": "no|p1|AP"},
        ("key", "finding", "who", "view"),
    )
    hospital.put("a.png", picture(1, "RGB"))
    hospital.put("b/c.jpg", picture(2, form="JPEG"))
    hospital.put("d.png", picture(3))
    hospital.put("e.png", picture(4))
    hospital.put("f.png", picture(5))
    hospital.put("g.png", b"GIF89a")
    report = hospital.ingest(**PICTURES)
    expected = {Reason.NO_PATIENT: 2, Reason.LATERAL: 1, Reason.VIEW_UNKNOWN: 1, Reason.NOT_A_PICTURE: 1}
    assert (report.taken, report.patients, report.reasons) == (1, 1, expected)
    hospital.label({"a.png": "yes|p9|PA", "f.png": "no|p4|AP"}, ("key", "finding", "who", "view"))
    report = hospital.ingest(**PICTURES)
    assert {i.patient for i in Index.open(hospital.state).images()} == {"p9", "p4"}
    assert report.labels and report.labels.labelled == 2


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "1", "I;16"])
def test_grey_pictures_of_every_kind_are_equal_up_to_their_depth(hospital: Hospital, mode: str) -> None:
    hospital.label({"a.png": "yes|p1|PA"}, ("key", "finding", "who", "view"))
    hospital.put("a.png", picture(1, mode))
    assert hospital.ingest(**PICTURES).taken == 1
    index = Index.open(hospital.state)
    found = index.pixels(index.images()[0])
    raw = np.asarray(Image.open(io.BytesIO(picture(1))), float)
    low, high = np.percentile(raw, [0.5, 99.5])
    expected = np.clip((raw - low) / (high - low), 0, 1)
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > (0.5 if mode == "1" else 0.999)


def test_pictures_that_are_no_radiographs_have_a_reason(hospital: Hospital, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["colour.png", "half.png", "half.jpg", "flat.png", "huge.png", "broken.png"]
    hospital.label(dict.fromkeys(names, "yes|p1|PA"), ("key", "finding", "who", "view"))
    red = io.BytesIO()
    Image.new("RGB", (90, 90), "red").save(red, "PNG")
    flat = io.BytesIO()
    Image.new("L", (90, 90), 7).save(flat, "PNG")
    huge = io.BytesIO()
    Image.new("L", (400, 400), 7).save(huge, "PNG")
    hospital.put("colour.png", red.getvalue())
    hospital.put("half.png", picture(1)[:3000])
    hospital.put("half.jpg", picture(1, form="JPEG")[:3000])
    hospital.put("flat.png", flat.getvalue())
    hospital.put("huge.png", huge.getvalue())
    hospital.put("broken.png", picture(1)[:40] + b"\xff" * 500)
    monkeypatch.setattr("models.imaging.PIXELS_MAX", 100_000)
    report = hospital.ingest(**PICTURES)
    assert report.taken == 0 and report.reasons.keys() >= {
        Reason.COLOUR,
        Reason.TRUNCATED,
        Reason.BLANK,
        Reason.TOO_LARGE,
    }


def test_pictures_in_a_folder_per_patient(hospital: Hospital) -> None:
    hospital.label({"p1": "yes", "p2": "no"})
    for number, name in enumerate(["p1/a.png", "p1/x/b.png", "p2/a.png", "stray.png"]):
        hospital.put(name, picture(number))
    report = hospital.ingest(format="pictures", labels={"matches": "patient_id"})
    assert (report.taken, report.patients, report.reasons) == (3, 2, {Reason.NO_PATIENT: 1})
    assert report.labels and report.labels.labelled == 3


@pytest.mark.parametrize(
    "labels", [{"matches": "study_uid"}, {"matches": "file"}, {"matches": "file", "patient": "absent"}]
)
def test_pictures_without_a_way_to_the_patient_are_refused(hospital: Hospital, labels: dict[str, str]) -> None:
    hospital.put("a.png", picture())
    with pytest.raises(LabelTableError):
        hospital.ingest(format="pictures", labels=labels)


def test_every_reason_is_explained_and_every_reason_of_the_decoder_is_one() -> None:
    assert all(reason.explanation for reason in Reason)
    text = (Path(__file__).parents[1] / "models" / "imaging.py").read_text()
    import re

    assert set(re.findall(r'ImageLeftOut\("([a-z_]+)"', text)) <= {str(reason) for reason in Reason}


NORTH = {
    "key": "StudyInstanceUID",
    "matches": "study_uid",
    "targets": {"opacity": {"column": "pneumonia", "words": {1: 1, 0: 0}}},
}
SOUTH_WORDS = {"pneumonia": 1, "normal": 0}
SOUTH = {
    "key": "Study UID",
    "matches": "study_uid",
    "targets": {"opacity": {"column": "Diagnosis", "words": SOUTH_WORDS}},
}
EAST_WORDS = {"pneumonia": 1, "covid-19": 1, "no finding": 0}
EAST = {
    "key": "AccessionNumber",
    "matches": "accession",
    "targets": {"opacity": {"column": "finding", "words": EAST_WORDS}},
}
WEST_WORDS = {"yes": 1, "no": 0}
WEST = {"key": "PatientID", "matches": "patient_id", "targets": {"opacity": {"column": "opacity", "words": WEST_WORDS}}}


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "tools" / "make_hospitals.py").is_file(), reason="the real radiographs are not here")
def test_all_697_real_frontal_radiographs_are_taken(tmp_path: Path) -> None:
    maker = [
        sys.executable,
        str(SHARED / "tools" / "make_hospitals.py"),
        "--data",
        str(SHARED / "data"),
        "--out",
        str(tmp_path),
    ]
    subprocess.run(maker, check=True, capture_output=True)
    taken = {"north": (254, 254, 11), "south": (211, 211, 9), "east": (69, 54, 3), "west": (163, 163, 7)}
    for name, mapping in {"north": NORTH, "south": SOUTH, "east": EAST, "west": WEST}.items():
        source = Source(folder="dicom", labels=LabelMap.model_validate({"table": "labels.csv", **mapping}))
        report = ingest(source, tmp_path / name, tmp_path / name / "state")
        images, labelled, laterals = taken[name]
        assert report.labels and (report.taken, report.labels.labelled) == (images, labelled)
        dirt = dict.fromkeys([Reason.NOT_DICOM, Reason.EMPTY_FILE, Reason.TRUNCATED, Reason.SECONDARY_CAPTURE], 1)
        assert report.reasons == {Reason.LATERAL: laterals, **dirt}
        assert report.labels.keys_without_image == 0 and not report.labels.unmapped
        shutil.rmtree(tmp_path / name)


def test_ingest_is_quick_when_nothing_changed(hospital: Hospital) -> None:
    for number in range(100):
        hospital.put(f"f{number}", b"text")
    hospital.ingest()
    start = time.process_time()
    assert hospital.ingest().read == 0
    assert time.process_time() - start < 1


def test_a_table_among_the_pictures_is_no_picture_rather_than_a_picture_without_patient() -> None:
    with pytest.raises(ImageLeftOut) as caught:
        look_at_picture(b"image,label\nx.png,1\n", Caption(None, None))
    assert caught.value.reason == Reason.NOT_A_PICTURE


def test_the_same_instance_with_other_pixels_is_the_same_image(hospital: Hospital) -> None:
    """An archive that recompressed it with loss, say: one exposure, and the first file of it is kept."""
    hospital.put("a", radiograph(1))
    hospital.put("b", radiograph(2, SOPInstanceUID="1.2.3.1", PatientID="P1"))
    report = hospital.ingest()
    assert (report.taken, report.reasons) == (1, {Reason.DUPLICATE: 1})
    assert Index.open(hospital.state).left_out() == {"b": Reason.DUPLICATE}
