"""De-identification against an oracle of its own (the standard's table read directly), and against marks put everywhere."""

import io
import itertools
import json
import random
import re
import warnings
from datetime import date
from pathlib import Path
from typing import Any

import annex_e as deploy_annex_e
import numpy as np
import pydicom
import pytest
from pydicom.datadict import DicomDictionary, dictionary_VR
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
    SecondaryCaptureImageStorage,
)

from privacy import annex_e
from privacy.annex_e import Profile, deidentified, identifying
from privacy.errors import ImageLeftOut

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
SCHEMA = SHARED / "schemas" / "ps315_annex_e.json"
needs_schema = pytest.mark.skipif(not SCHEMA.is_file(), reason="the schema is not beside this repository")

SECRET = bytes(range(32))
PLAIN = Profile(SECRET)
SHIFTED = Profile(SECRET, dates="shifted")
EVERYTHING = Profile(SECRET, dates="shifted", retain_characteristics=True, retain_device=True)
ROOT = "1.2.826.0.1.3680043.99."
MARKS = (b"ZZMARK", b"19310203", b"112233.4", ROOT.encode())
MARKED: dict[str, Any] = {
    **dict.fromkeys(("AE", "CS", "LO", "LT", "SH", "ST", "UC", "UR", "UT"), "ZZMARK"),
    **{
        "PN": "ZZMARK^JOHN",
        "DA": "19310203",
        "DT": "19310203112233",
        "TM": "112233.445566",
        "UI": f"{ROOT}7",
        "AS": "093Y",
    },
    **{"OB": b"ZZMARK", "OW": b"ZZMARK", "UN": b"ZZMARK", "DS": "7", "IS": "7"},
    **dict.fromkeys(("US", "UL", "SS", "SL", "UV", "SV", "AT"), 7),
    **{"FL": 7.0, "FD": 7.0},
}
BULK = {"OF": b"ZZMARK..", "OD": b"ZZMARK..", "OL": b"ZZMARK..", "OV": b"ZZMARK.."}
TOP = ("SOPClassUID", "SOPInstanceUID", "PatientID", "SpecificCharacterSet")


def radiograph(patient: str = "MRN-ZZMARK", **values: Any) -> Dataset:
    """A small CR object; `values` by keyword."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = ComputedRadiographyImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = f"{ROOT}1"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = f"{ROOT}2", f"{ROOT}3"
    dataset.PatientID, dataset.PatientName, dataset.Modality = patient, "ZZMARK^JOHN", "CR"
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel, dataset.PixelRepresentation = 4, 6, 1, 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PhotometricInterpretation, dataset.PixelData = "MONOCHROME2", np.arange(24, dtype="<u2").tobytes()
    dataset["PixelData"].VR = "OW"
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    return dataset


def element(tag: int, vr: str | None = None) -> DataElement:
    """The attribute `tag` with a marked value."""
    vr = vr or str(dictionary_VR(tag)).split(" or ")[0]
    if vr == "SQ":
        item = Dataset()
        item.PatientComments, item.ReferencedSOPInstanceUID, item.CodeMeaning = "ZZMARK", f"{ROOT}5", "a meaning"
        return DataElement(tag, vr, Sequence([item]))
    return DataElement(tag, vr, (MARKED | BULK)[vr])


def written(dataset: Dataset) -> bytes:
    """The bytes of the file; a warning of pydicom is an error."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def through_a_file(dataset: Dataset) -> Dataset:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset.save_as(file, enforce_file_format=True)
        return pydicom.dcmread(io.BytesIO(file.getvalue()))


def read_strictly(data: bytes) -> Dataset:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = pydicom.dcmread(io.BytesIO(data))
        for each in dataset.iterall():
            str(each.value)
    return dataset


def rows_of_the_standard() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(SCHEMA.read_text(encoding="utf-8"))
    return rows


# The table -----------------------------------------------------------------------------------------------------------


@needs_schema
def test_the_shipped_table_is_that_of_the_schema() -> None:
    shipped = json.loads((Path(annex_e.__file__).parent / "annex_e.json").read_text(encoding="utf-8"))
    assert shipped == {"source": deploy_annex_e.SOURCE, "rows": deploy_annex_e.compact(rows_of_the_standard())}
    # Without the script, row by row.
    assert len(annex_e.table()) == len(rows_of_the_standard()) == 621
    for row in rows_of_the_standard():
        ours = annex_e.table()["private" if "gggg" in row["id"] else row["id"]]
        assert ours.action == row["basicProfile"]
        assert ours.dates == row.get("rtnLongModifDatesOpt", "")
        assert ours.characteristics == row.get("rtnPatCharsOpt", "")
        assert ours.device == row.get("rtnDevIdOpt", "")


@pytest.mark.parametrize(
    "row",
    [
        {"id": "0010", "basicProfile": "X"},
        {"id": "00100010", "basicProfile": "Q"},
        {"id": "ggggeeee", "basicProfile": "X"},
    ],
)
def test_the_script_refuses_what_is_no_row(row: dict[str, str]) -> None:
    with pytest.raises(ValueError):
        deploy_annex_e.compact([row])
    with pytest.raises(ValueError):
        deploy_annex_e.compact([{"id": "00100010", "basicProfile": "Z"}] * 2)


def test_every_action_of_the_table_is_decided() -> None:
    assert {row.action for row in annex_e.table().values()} == {
        *("X", "Z", "D", "U", "X/Z", "X/D", "Z/D", "X/Z/D", "X/Z/U*")
    }
    cases = [
        *(
            ("X", "LO", "X"),
            ("Z", "LO", "Z"),
            ("D", "LO", "D"),
            ("D", "SQ", "D"),
            ("D", "UI", "U"),
            ("U", "UI", "U"),
            ("X/Z", "LO", "Z"),
        ),
        *(("X/D", "LO", "D"), ("X/D", "DA", "X"), ("X/D", "SQ", "X"), ("Z/D", "LO", "D"), ("Z/D", "TM", "Z")),
        *(("X/Z/D", "SH", "D"), ("X/Z/D", "DT", "Z"), ("X/Z/D", "SQ", "Z"), ("X/Z/U*", "SQ", "U")),
    ]
    for action, vr, expected in cases:
        assert annex_e.decided(action, vr) == expected, (action, vr)
    assert annex_e.decided("X/D", "LO", empty=True) == "X" and annex_e.decided("Z/D", "LO", empty=True) == "Z"


def plain_tags() -> list[tuple[int, dict[str, Any]]]:
    """Rows of the standard's table with a tag of a data set."""
    rows = [row for row in rows_of_the_standard() if re.fullmatch("[0-9a-f]{8}", row["id"])]
    return [(int(row["id"], 16), row) for row in rows if row["id"][:4] not in ("0000", "0002", "0004")]


@needs_schema
@pytest.mark.parametrize("profile", [PLAIN, EVERYTHING], ids=["basic", "options"])
def test_each_attribute_of_the_standard_gets_its_action(profile: Profile) -> None:
    """One object for each attribute, written and read; the oracle is the schema, not our table."""
    for tag, row in plain_tags():
        if profile is EVERYTHING and not any(row.get(option) for option in deploy_annex_e.OPTIONS):
            continue
        dataset = radiograph()
        dataset[tag] = element(tag)
        data = written(deidentified(dataset, profile))
        result = read_strictly(data)
        action, vr, name = row["basicProfile"], str(dictionary_VR(tag)), row["name"]
        kept = profile is EVERYTHING and (
            row.get("rtnPatCharsOpt") == "K" or (row.get("rtnDevIdOpt") == "K" and vr not in ("DA", "DT", "TM"))
        )
        moved = profile is EVERYTHING and row.get("rtnLongModifDatesOpt") and vr in ("DA", "DT")
        own = result.get(tag)
        if kept or tag == 0x00100020:  # PatientID: another test
            assert own is not None and not own.is_empty, name
            continue
        assert not any(mark in data for mark in MARKS), name
        if moved:
            assert re.fullmatch("[0-9]{8}", str(own.value)), name
        elif action == "X":
            assert own is None, name
        elif action in ("Z", "X/Z"):
            assert own is not None and own.is_empty, name
        elif action == "D":
            assert own is not None and not own.is_empty, name
        elif action == "U":
            assert str(own.value).startswith("2.25."), name
        elif action == "X/Z/U*":
            assert str(own.value[0].ReferencedSOPInstanceUID).startswith("2.25."), name
        elif vr in ("DA", "DT", "TM", "SQ"):
            assert (own is None) if "Z" not in action else own.is_empty, name
        else:
            assert not own.is_empty, name


# Marks everywhere ----------------------------------------------------------------------------------------------------

DROPPED_VRS = ("PN", "DA", "DT", "TM", "LT", "ST", "UT", "UC", "UR", "AE", "UI", "UN", "OB")


def identifying_tags() -> list[int]:
    """What may hold a mark: the table, and everything else of a representation that cannot be trusted."""
    named = [int(tag, 16) for tag in annex_e.table() if re.fullmatch("[0-9a-f]{8}", tag)]
    more = [tag for tag, (vr, *_) in DicomDictionary.items() if vr in DROPPED_VRS or tag >> 16 == 0x0010]
    low = {tag for tag in {*named, *more} if tag >> 16 > 0x0006 and tag != 0x00080016}
    return sorted(tag for tag in low if not 0x7FE00000 <= tag <= 0x7FE0FFFF and tag >> 16 != 0xFFFE)


TAGS = identifying_tags()
SEQUENCES = sorted(tag for tag, (vr, *_) in DicomDictionary.items() if vr == "SQ" and 0x0006 < tag >> 16 < 0x5000)


def marked_item(rng: random.Random, depth: int) -> Dataset:
    item = Dataset()
    for tag in rng.sample(TAGS, rng.randint(3, 25)):
        item[tag] = element(tag)
    for keyword in ("Rows", "WindowCenter", "KVP", "LossyImageCompression"):
        if rng.random() < 0.3:  # text where the standard has a number or another text
            item[keyword] = DataElement(pydicom.datadict.tag_for_keyword(keyword), "LT", "ZZMARK in the wrong place")
    group = rng.randrange(0x0009, 0x7000, 2)
    block = item.private_block(group, "ZZMARK CREATOR", create=True)
    for number, vr in enumerate(rng.sample(sorted(MARKED), 5)):
        block.add_new(number, vr, MARKED[vr])
    for number in (0x5000, 0x6000):
        item.add_new((number + 2 * rng.randrange(16), 0x3000), "OW", b"ZZMARK")
        item.add_new((number + 2 * rng.randrange(16), 0x4000), "LT", "ZZMARK")
    item.add_new((0x0018, 0xFFF0), "LO", "ZZMARK")  # of a standard to come
    if depth < 4:
        for tag in rng.sample(SEQUENCES, rng.randint(1, 3)):
            item[tag] = DataElement(
                tag, "SQ", Sequence([marked_item(rng, depth + 1) for _ in range(rng.randint(1, 2))])
            )
    return item


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_no_mark_survives_wherever_it_stands(syntax: str) -> None:
    rng = random.Random(str(syntax))
    for profile in (PLAIN, SHIFTED):
        dataset = radiograph(patient=f"ZZMARK{rng.random()}")
        dataset.update({each.tag: each for each in marked_item(rng, 0) if each.tag not in dataset})
        dataset.file_meta.TransferSyntaxUID, dataset.PixelData = syntax, bytes(48)
        for number, keyword in enumerate(("SourceApplicationEntityTitle", "SendingApplicationEntityTitle")):
            setattr(dataset.file_meta, keyword, f"ZZMARK{number}")
        dataset.file_meta.PrivateInformationCreatorUID = f"{ROOT}8"
        dataset.file_meta.PrivateInformation = b"ZZMARK"
        dataset.preamble = b"ZZMARK".ljust(128, b"\0")
        original = through_a_file(dataset)
        assert original.preamble.startswith(b"ZZMARK") and "SendingApplicationEntityTitle" in identifying(original)
        data = written(deidentified(original, profile))
        found = [mark for mark in MARKS if mark in data]
        assert not found, (found, [e for e in pydicom.dcmread(io.BytesIO(data)).iterall() if "MARK" in str(e.value)])
        copy = read_strictly(data)
        assert identifying(copy) == [] and copy.PixelData == original.PixelData
        assert written(deidentified(original, profile)) == data, "the same again"


def test_the_input_is_not_changed() -> None:
    dataset = through_a_file(radiograph(StudyDate="19310203", PatientAge="093Y"))
    before = written(dataset)
    deidentified(dataset, EVERYTHING)
    assert written(dataset) == before


# Pseudonyms and dates ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Invalid value for VR")
def test_uids_are_consistent_valid_keyed_and_free_of_collisions() -> None:
    new = [PLAIN.uid(f"{ROOT}{number}") for number in range(5000)]
    assert len(set(new)) == len(new) and new == [SHIFTED.uid(f"{ROOT}{number}") for number in range(5000)]
    assert all(re.fullmatch(r"2\.25\.[1-9][0-9]{20,38}", uid) and int(uid[5:]) < 2**128 for uid in new)
    assert all((int(uid[5:]) >> 76) & 15 == 8 and (int(uid[5:]) >> 62) & 3 == 2 for uid in new), "version 8, RFC 9562"
    assert Profile(bytes(32)).uid(f"{ROOT}1") != PLAIN.uid(f"{ROOT}1")
    first = radiograph(ReferencedImageSequence=[Dataset()], FrameOfReferenceUID="1.2.840.10008.1.4.1.1")
    first.ReferencedImageSequence[0].ReferencedSOPClassUID = ComputedRadiographyImageStorage
    first.ReferencedImageSequence[0].ReferencedSOPInstanceUID = f"{ROOT}77"
    second = radiograph(SOPInstanceUID=f"{ROOT}77\0")
    one, two = deidentified(first, PLAIN), deidentified(second, SHIFTED)
    assert one.ReferencedImageSequence[0].ReferencedSOPInstanceUID == two.SOPInstanceUID == PLAIN.uid(f"{ROOT}77")
    assert one.ReferencedImageSequence[0].ReferencedSOPClassUID == ComputedRadiographyImageStorage
    assert one.StudyInstanceUID == two.StudyInstanceUID != one.SeriesInstanceUID
    assert one.FrameOfReferenceUID == "1.2.840.10008.1.4.1.1", "a frame that the standard itself names"
    assert two.file_meta.MediaStorageSOPInstanceUID == two.SOPInstanceUID


def test_patients_keep_apart_and_together_under_pseudonyms() -> None:
    names = ["MRN-1", "MRN-2", " MRN-1 "]
    codes = [deidentified(radiograph(patient=name), PLAIN).PatientID for name in names]
    assert codes[0] == codes[2] != codes[1] and all(re.fullmatch("[0-9a-f]{16}", code) for code in codes)
    assert codes[0] != deidentified(radiograph(patient="MRN-1"), Profile(bytes(32))).PatientID
    assert SECRET.hex() not in repr(PLAIN) and "secret" not in repr(PLAIN)


def days(text: str) -> date:
    return date(int(text[:4]), int(text[4:6]), int(text[6:8]))


@pytest.mark.filterwarnings("ignore:Invalid value for VR")
def test_dates_of_a_patient_move_together_and_times_go() -> None:
    offsets = set()
    for number in range(40):
        values = {"StudyDate": "20200229", "AcquisitionDateTime": "20200301101112.5+0100", "SeriesDate": "2020.03.05"}
        given = radiograph(patient=f"MRN-{number}", StudyTime="101112", ContentDate="20200310", **values)
        given.RequestAttributesSequence = [Dataset()]
        given.RequestAttributesSequence[0].ScheduledProcedureStepStartDate = "20200228"
        result = read_strictly(written(deidentified(given, SHIFTED)))
        moved = [result.StudyDate, result.AcquisitionDateTime, result.SeriesDate, result.ContentDate]
        back = [
            (days(a) - days(b)).days
            for a, b in zip(("20200229", "20200301", "20200305", "20200310"), moved, strict=True)
        ]
        assert len(set(back)) == 1 and 1 <= back[0] <= 365 and back[0] == SHIFTED.offset_days(f"MRN-{number}")
        assert result.StudyTime == "" and len(result.AcquisitionDateTime) == 8
        offsets.add(back[0])
        plain = deidentified(given, PLAIN)
        assert plain.StudyDate == "" and "SeriesDate" not in plain and not plain.AcquisitionDateTime
    assert len(offsets) > 30 and len({offset % 7 for offset in offsets}) == 7, "weekdays are not kept"


@pytest.mark.parametrize(
    "value", ["SMITH", "2020", "20201341", "20200101-20200201", "0001.01.01", "00010101", "1931020"]
)
def test_what_is_no_day_is_removed_and_not_shifted(value: str) -> None:
    given = radiograph()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given.StudyDate = value
    assert deidentified(given, SHIFTED).StudyDate == ""


@pytest.mark.parametrize(
    ("age", "kept"),
    [
        ("089Y", "089Y"),
        ("090Y", "090Y"),
        ("093Y", "090Y"),
        ("120Y", "090Y"),
        ("006M", "006M"),
        ("93", None),
        ("ZZTE", None),
    ],
)
def test_ages_are_bounded_at_ninety(age: str, kept: str | None) -> None:
    given = radiograph(PatientSex="F", PatientWeight="61.5", Allergies="ZZMARK", SpecialNeeds="ZZMARK")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given.PatientAge = age
    result = deidentified(given, EVERYTHING)
    assert result.get("PatientAge") == kept and result.PatientSex == "F" and float(result.PatientWeight) == 61.5
    assert "Allergies" not in result and "SpecialNeeds" not in result and "PatientAge" not in deidentified(given, PLAIN)


# Evidence, pixels, form ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("profile", "codes", "dates"),
    [
        (PLAIN, ["113100"], "REMOVED"),
        (SHIFTED, ["113100", "113107"], "MODIFIED"),
        (Profile(SECRET, retain_characteristics=True), ["113100", "113108"], "REMOVED"),
        (EVERYTHING, ["113100", "113107", "113108", "113109"], "MODIFIED"),
    ],
)
def test_the_evidence_names_what_holds(profile: Profile, codes: list[str], dates: str) -> None:
    given = radiograph(DeidentificationMethod="ZZMARK did it", BurnedInAnnotation="NO")
    given.DeidentificationMethodCodeSequence = [Dataset()]
    given.DeidentificationMethodCodeSequence[0].CodeValue = "113101"
    result = read_strictly(written(deidentified(given, profile)))
    assert result.PatientIdentityRemoved == "YES" and "Isocenter" in result.DeidentificationMethod
    assert [item.CodeValue for item in result.DeidentificationMethodCodeSequence] == codes == profile.codes
    assert all(
        item.CodingSchemeDesignator == "DCM" and item.CodeMeaning for item in result.DeidentificationMethodCodeSequence
    )
    assert result.LongitudinalTemporalInformationModified == dates and result.BurnedInAnnotation == "NO"
    assert "BurnedInAnnotation" not in deidentified(radiograph(), profile), "nobody looked at the pixels"


def test_device_identity_stays_only_by_its_option() -> None:
    given = radiograph(
        DeviceSerialNumber="SN-12", StationName="ROOM2", DetectorID="D7", DateOfLastCalibration="20200101"
    )
    kept, gone = deidentified(given, EVERYTHING), deidentified(given, SHIFTED)
    assert (kept.DeviceSerialNumber, kept.StationName, kept.DetectorID) == ("SN-12", "ROOM2", "D7")
    assert {gone.DeviceSerialNumber, gone.StationName, gone.DetectorID} == {"REMOVED"}
    assert kept.DateOfLastCalibration == gone.DateOfLastCalibration != "20200101"


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless])
def test_pixels_are_the_same_bit_for_bit(syntax: str) -> None:
    given = radiograph(WindowCenter="40", WindowWidth="400", SmallestImagePixelValue=3, LossyImageCompression="00")
    if syntax == RLELossless:
        given.compress(RLELossless, generate_instance_uid=False)
    elif syntax == ExplicitVRBigEndian:
        given.PixelData = np.arange(24, dtype=">u2").tobytes()
    given.file_meta.TransferSyntaxUID = syntax
    original = through_a_file(given)
    result = read_strictly(written(deidentified(original, EVERYTHING)))
    assert result.PixelData == original.PixelData and result.file_meta.TransferSyntaxUID == syntax
    assert (result.pixel_array == np.arange(24).reshape(4, 6)).all()
    for keyword in (
        "Rows",
        "Columns",
        "BitsStored",
        "WindowCenter",
        "WindowWidth",
        "Modality",
        "SmallestImagePixelValue",
    ):
        assert result[keyword].value == original[keyword].value, keyword


def test_small_slips_of_devices_are_mended_and_large_ones_dropped() -> None:
    given = radiograph(LUTLabel="Größe")
    given.SpecificCharacterSet = "ISO_IR 100"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given.BodyPartExamined, given.ViewPosition = "Chest", "ZZMARK said this to me"
        given.add_new("PixelSpacing", "DS", ["0.14300000000000001", "0.14300000000000001"])
        given.add_new("Exposure", "IS", "12.0")
        original = through_a_file(given)
    result = read_strictly(written(deidentified(original, PLAIN)))
    assert result.BodyPartExamined == "CHEST" and "ViewPosition" not in result
    assert [float(part) for part in result.PixelSpacing] == [0.143, 0.143] and int(result.Exposure) == 12
    assert result.LUTLabel == "Größe" and result.SpecificCharacterSet == "ISO_IR 192"
    assert "SpecificCharacterSet" not in deidentified(radiograph(), PLAIN)


@pytest.mark.filterwarnings("ignore")
def test_the_name_of_a_character_set_is_no_place_for_a_mark() -> None:
    given = radiograph()
    given.add_new(0x00080005, "CS", "ZZMARK")
    assert b"ZZMARK" not in written(deidentified(given, PLAIN))


def test_overlays_in_unused_bits_are_refused() -> None:
    hidden = np.arange(24, dtype="<u2")
    hidden[5] |= 1 << 15
    with pytest.raises(ImageLeftOut) as refused:
        deidentified(through_a_file(radiograph(PixelData=hidden.tobytes())), PLAIN)
    assert refused.value.reason == "overlay_in_pixels"
    declared = radiograph()
    declared.add_new(0x60000102, "US", 12)
    with pytest.raises(ImageLeftOut):
        deidentified(declared, PLAIN)
    behind = radiograph(PixelData=bytes(48) + b"ZZMARK")
    with pytest.raises(ImageLeftOut):
        deidentified(behind, PLAIN)
    assert deidentified(radiograph(PixelData=bytes(64)), PLAIN).Rows == 4, "padding is nothing"
    signed = radiograph(PixelRepresentation=1, PixelData=np.full(24, -3, "<i2").tobytes())
    assert deidentified(signed, PLAIN).PixelData == signed.PixelData, "sign bits are no overlay"
    high = radiograph(HighBit=15, PixelData=(np.arange(24, dtype="<u2") << 4).tobytes())
    assert deidentified(high, PLAIN).PixelData == high.PixelData


# What is refused, and what is found ----------------------------------------------------------------------------------


def no_class(dataset: Dataset) -> None:
    dataset.SOPClassUID = f"{ROOT}9"


def no_number(dataset: Dataset) -> None:
    del dataset.SOPInstanceUID


def no_syntax(dataset: Dataset) -> None:
    dataset.file_meta.TransferSyntaxUID = f"{ROOT}9"


def too_deep(dataset: Dataset) -> None:
    for _ in range(annex_e.DEPTH_MAX + 2):
        dataset.ReferencedImageSequence = [Dataset()]
        dataset = dataset.ReferencedImageSequence[0]


def rows_in_words(dataset: Dataset) -> None:
    dataset["Rows"] = DataElement(0x00280010, "LO", "ZZMARK")


@pytest.mark.parametrize("spoil", [no_class, no_number, no_syntax, too_deep, rows_in_words])
def test_objects_that_cannot_be_copied_are_refused_without_a_value(
    spoil: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    given = radiograph()
    spoil(given)
    with pytest.raises(ImageLeftOut) as refused:
        deidentified(given, PLAIN)
    assert refused.value.reason == "not_dicom" and not any(mark.decode() in str(refused.value) for mark in MARKS)
    assert refused.value.__suppress_context__ or refused.value.__context__ is None
    assert capfd.readouterr() == ("", "")


def test_damaged_files_give_a_refusal_or_a_clean_copy(capfd: pytest.CaptureFixture[str], recwarn: Any) -> None:
    rng = random.Random(5)
    item = marked_item(rng, 2)
    given = radiograph()
    given.update({each.tag: each for each in item if each.tag not in given})
    good, counts = bytearray(through_bytes(given)), {"copied": 0, "refused": 0}
    recwarn.clear()
    for _ in range(150):
        bad = bytearray(good)
        for _ in range(rng.randint(1, 6)):
            bad[rng.randrange(132, len(bad))] = rng.randrange(256)
        try:
            with annex_e.silent():
                dataset = pydicom.dcmread(io.BytesIO(bytes(bad)))
        except annex_e.READING_ERRORS:  # no file that anybody can read
            continue
        for act in (lambda: deidentified(dataset, SHIFTED), lambda: identifying(dataset)):  # noqa: B023  called at once
            try:
                result = act()
            except ImageLeftOut as refusal:
                counts["refused"] += 1
                assert not any(mark.decode() in str(refusal) for mark in MARKS)
                continue
            if isinstance(result, Dataset):
                counts["copied"] += 1
                copy = read_strictly(written(result))
                assert identifying(copy) == []
    assert min(counts.values()) > 10, counts
    assert capfd.readouterr() == ("", "") and not recwarn.list


def through_bytes(dataset: Dataset) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


CLEAN = {"PatientIdentityRemoved": "YES"}
FOUND: list[tuple[dict[str, Any], list[str]]] = [
    ({}, []),
    ({"PatientName": "ZZMARK^JOHN"}, ["PatientName"]),
    ({"PatientName": "Anonymized", "OperatorsName": "REMOVED"}, []),
    ({"PatientBirthDate": "19310203"}, ["PatientBirthDate"]),
    ({"StudyDate": "19310203", "StudyTime": "1122"}, ["StudyDate", "StudyTime"]),
    ({"InstitutionalDepartmentName": "ZZMARK"}, ["InstitutionalDepartmentName"]),
    ({"PatientAge": "045Y", "PatientSex": "F"}, ["PatientAge"]),
    ({"BurnedInAnnotation": "YES"}, ["BurnedInAnnotation"]),
    ({"BurnedInAnnotation": "NO"}, []),
    ({"SOPClassUID": SecondaryCaptureImageStorage}, ["SOPClassUID"]),
    (
        {"PatientIdentityRemoved": "NO"},
        ["PatientIdentityRemoved", *("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")],
    ),
]


@pytest.mark.parametrize(("values", "expected"), FOUND)
def test_what_identifies_is_named(values: dict[str, Any], expected: list[str]) -> None:
    given = radiograph(patient="CASE-1", **CLEAN | {"PatientName": ""} | values)
    assert sorted(set(identifying(given)) - {"PatientID"}) == sorted(expected)


def test_claims_of_a_file_are_believed_where_nobody_can_tell() -> None:
    def with_code(code: str, **values: Any) -> Dataset:
        given = radiograph(patient="CASE-1", **CLEAN, PatientName="CASE-1", **{"StudyDate": ""} | values)
        given.DeidentificationMethodCodeSequence = [Dataset()]
        given.DeidentificationMethodCodeSequence[0].CodeValue = code
        return given

    assert identifying(with_code("113107", StudyDate="20200101")) == []
    assert identifying(with_code("113107", PatientBirthDate="19310203")) == ["PatientBirthDate"]
    assert identifying(with_code("113108", PatientAge="045Y", PatientSex="F")) == []
    assert identifying(with_code("113108", PatientAge="093Y")) == ["PatientAge"]
    assert identifying(with_code("113109", DeviceSerialNumber="1", GantryID="2")) == []
    assert identifying(with_code("113100", GantryID="2")) == ["GantryID"]


def test_groups_meta_and_preamble_are_named_even_where_a_file_says_that_it_is_clean() -> None:
    given = radiograph(patient="CASE-1", **CLEAN | {"PatientName": ""})
    given.private_block(0x0029, "SIEMENS CSA HEADER", create=True).add_new(1, "LO", "x")
    given.add_new(0x60003000, "OW", b"12")
    given.add_new(0x50003000, "OW", b"12")
    given.add_new(0x0018FFF0, "LO", "x")
    given.file_meta.SourceApplicationEntityTitle = "PACS"
    given.file_meta.MediaStorageSOPInstanceUID = f"{ROOT}12.20200101112233"
    given.preamble = b"II*\0".ljust(128, b"\0")
    given.ContributingEquipmentSequence = [Dataset()]
    given.ContributingEquipmentSequence[0].OtherPatientIDs = "MRN-1"
    assert identifying(given) == [
        *("Group5000", "Group6000", "MediaStorageSOPInstanceUID", "OtherPatientIDs", "Preamble", "PrivateGroup0029"),
        *("SourceApplicationEntityTitle", "Unknown0018FFF0"),
    ]


@pytest.mark.skipif(not (SHARED / "dicom").is_dir(), reason="the real files are not beside this repository")
def test_real_files_of_six_makers() -> None:
    done = 0
    for path in sorted((SHARED / "dicom").rglob("*")):
        if not path.is_file() or path.stat().st_size > 2_500_000 or path.suffix in (".md", ".gz"):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                original = pydicom.dcmread(path)
            except annex_e.READING_ERRORS:  # no image
                continue
        if done > 24 and "siemens" not in str(path):
            continue
        assert identifying(original)
        if not original.get("SOPInstanceUID"):  # the Siemens series has empty UIDs
            with pytest.raises(ImageLeftOut):
                deidentified(original, PLAIN)
            continue
        result = read_strictly(written(deidentified(original, SHIFTED)))
        assert result.PixelData == original.PixelData and set(identifying(result)) <= {
            "SOPClassUID",
            "BurnedInAnnotation",
        }
        values = {
            str(original.get(k, "")) for k in ("PatientID", "PatientName", "StudyInstanceUID", "StudyDate", "StudyTime")
        }
        text = written(result)
        assert not [value for value in values if len(value) > 5 and value.encode() in text]
        done += 1
    assert done >= 15


def test_pairs_of_options_do_not_disturb_each_other() -> None:
    for dates, characteristics, device in itertools.product(("removed", "shifted"), (False, True), (False, True)):
        profile = Profile(SECRET, dates, characteristics, device)  # type: ignore[arg-type]
        given = radiograph(StudyDate="20200101", PatientAge="044Y", DeviceSerialNumber="SN")
        result = deidentified(given, profile)
        assert (result.StudyDate != "", "PatientAge" in result) == (dates == "shifted", characteristics)
        assert (result.DeviceSerialNumber == "SN") == device and identifying(result) == []
