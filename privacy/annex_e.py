"""A copy of a DICOM object in which nothing of its header says who the patient is: DICOM PS3.15 Annex E, Basic Profile.

`deidentified` makes the copy, `identifying` names what a file holds that such a copy would not. The table of actions is
annex_e.json, made from PS3.15 Table E.1-1 by deploy/annex_e.py. What the table leaves open is decided here, once:

    action        what is done
    X             the attribute goes
    Z             it stays, empty
    D             it stays with the same dummy for everybody; a sequence with one empty item, a UID as under U
    U             each UID becomes another one, the same wherever it stands; UIDs that the standard itself gives out stay
    X/Z           Z: empty says no more than that it was there, and an attribute of type 2 keeps the object valid
    X/D Z/D X/Z/D D, because a dummy fits every type; but dates, times and sequences take the weaker X or Z: a false date would
                  be read as a true one, and in CR, DX and CT objects none of these is of type 1
    X/Z/U*        the items stay, de-identified in the same way: references within one export stay right
    K             by an option; sequences are de-identified inside

The table trusts what it does not name. This does not. Of attributes that it does not name, those go, or stay empty, that the
dictionary does not know, that hold names, addresses, dates, times, free text or bytes, that stand in group 0010 (patient), and
short texts whose keyword ends in "ID"; UIDs are treated like the named ones. Of a number or a short text no more is kept than
what its value representation and multiplicity permit.

Private groups, curves (50xx) and overlays (60xx) go whole, and so do preamble and file meta information, which are made anew.

Pixel data stay as they are, bit for bit. What is painted into them is not seen here (models/burned_in.py looks for text), but
bits that no pixel uses, and bytes behind the last pixel, are: overlays of old devices hide there, and such an object is refused.
Comments inside a compressed stream are not looked at.

Pseudonyms are keyed (`keys.token`): who lacks the site's secret can neither turn them back nor try names until one fits.
Of an object without a PatientID the study stands for the patient.

Nothing of a value is put into an error, a warning or a log.
"""

import contextlib
import copy
import functools
import json
import logging
import math
import re
import struct
import uuid
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydicom import config
from pydicom.datadict import dictionary_has_tag, dictionary_keyword, dictionary_VM, dictionary_VR, keyword_for_tag
from pydicom.dataelem import DataElement, empty_value_for_VR
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.filewriter import correct_ambiguous_vr
from pydicom.multival import MultiValue
from pydicom.sequence import Sequence
from pydicom.uid import UID_dictionary
from pydicom.valuerep import IS, DSfloat, validate_value

from privacy import keys
from privacy.errors import ImageLeftOut

Dates = Literal["removed", "shifted"]

IMPLEMENTATION_UID = (
    "2.25.135805956521642715947394003088973138802"  # drawn once (PS3.5 B.2); of this software, not of a site
)
IMPLEMENTATION_NAME = "ISOCENTER"
DUMMY = "REMOVED"
OFFSET_DAYS_MAX = 365  # no multiple of a week: a known weekday would leave 52 offsets to try
YEAR_MIN = 1800  # an earlier year is a slip, and the calendar ends before it could be set back
AGE_MAX = 89  # older patients are few enough to be known by their age; they are all "090Y"
DEPTH_MAX = 32  # sequences in sequences; reports use eight
EXPLICIT_BIG_ENDIAN = "1.2.840.10008.1.2.2"
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"  # and its multi-frame classes, .1 to .4 below it

TEMPORAL = frozenset(("DA", "DT", "TM"))
TEXT = frozenset(("AE", "AS", "CS", "DS", "IS", "LO", "LT", "SH", "ST", "UC", "UI", "UR", "UT"))
NUMBERS = frozenset(("AT", "FD", "FL", "SL", "SS", "SV", "UL", "US", "UV", "US or SS"))
"""Value representations of which a value may be kept where table and option say so, or the table says nothing."""
WORDS = frozenset(("OW", "OF", "OD", "OL", "OV", "US or OW", "OB or OW"))  # kept in group 0028: look-up tables
UNLISTED = {
    **dict.fromkeys(("PN", "LT", "ST", "UT", "UC", "UR", *TEMPORAL), "Z"),
    **dict.fromkeys(("AE", "OB", "UN"), "X"),
    "UI": "U",
}
"""What is done to an attribute that the table does not name, by its value representation; any other is kept."""
DUMMIES: dict[str, Any] = {
    **dict.fromkeys(("AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT"), DUMMY),
    **{"AS": "000Y", "DA": "19000101", "DT": "19000101", "TM": "000000", "DS": "0", "IS": "0"},
    **dict.fromkeys(("OB", "OW", "UN"), b"\0\0"),
}
ANONYMOUS = frozenset(
    (DUMMY, "ANONYMOUS", "ANONYMIZED", "ANONYMISED", "DEIDENTIFIED", "DE-IDENTIFIED", "UNKNOWN", "NONE")
)
"""Dummies that are common in names; what else stands in a name is taken for one."""
GONE_GROUPS = frozenset((0x0000, 0x0002, 0x0004, 0x0006, 0xFFFC))
PIXELS = frozenset((0x7FE00008, 0x7FE00009, 0x7FE00010, 0x7FE00001, 0x7FE00002))
NEEDED = ("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel")
META_KEPT = frozenset((0x00020000, 0x00020001, 0x00020002, 0x00020003, 0x00020010, 0x00020012, 0x00020013))
EVIDENCE = frozenset((0x00080005, 0x00120062, 0x00120063, 0x00120064, 0x00280303))
"""Character set and evidence of de-identification: written anew by whoever made the copy, so that they hold for this copy."""
CODES = {  # CID 7050
    "113100": "Basic Application Confidentiality Profile",
    "113107": "Retain Longitudinal Temporal Information Modified Dates Option",
    "113108": "Retain Patient Characteristics Option",
    "113109": "Retain Device Identity Option",
}
_DATE, _OLD_DATE = re.compile(r"[0-9]{8}(?![-0-9]*-)"), re.compile(r"[0-9]{4}\.[0-9]{2}\.[0-9]{2}")
_NATIVE: dict[Any, str] = {
    (True, True): "1.2.840.10008.1.2",
    (False, True): "1.2.840.10008.1.2.1",
    (False, False): EXPLICIT_BIG_ENDIAN,
}
_OPTION_OF = {"113106": "dates", "113107": "dates", "113108": "characteristics", "113109": "device"}
READING_ERRORS = (
    *(ValueError, AttributeError, RuntimeError, KeyError, IndexError, TypeError, EOFError, OSError, ArithmeticError),
    *(AssertionError, MemoryError, NotImplementedError, InvalidDicomError, BytesLengthException),
    struct.error,
)
"""What pydicom raises on damaged headers; caught per element or per object and never passed on: it quotes values."""


@dataclass(frozen=True)
class Profile:
    """What is done beyond the Basic Profile. `secret`: 32 bytes of the site (`keys.token_key`), the key of all pseudonyms.

    `dates`: "removed", or "shifted" by 1 to 365 days into the past, each patient by another number: intervals in days stay, times
    of day go, because the second of an exposure finds it in any radiology system. `retain_characteristics`: age up to 89, sex,
    size, weight and the other attributes that the option keeps whole. `retain_device`: serial numbers and names of devices.
    """

    secret: bytes = field(repr=False)
    dates: Dates = "removed"
    retain_characteristics: bool = False
    retain_device: bool = False

    def pseudonym(self, patient: str) -> str:
        """16 hex characters in place of a PatientID; padding does not make another patient."""
        return keys.token(self.secret, f"patient {patient.strip()}")

    def uid(self, original: str) -> str:
        """A UID below 2.25 (PS3.5 B.2) in place of `original`: 122 keyed bits in the form of a UUID of version 8 (RFC 9562)."""
        halves = [keys.token(self.secret, f"uid {half} {original}") for half in (1, 2)]
        number = int("".join(halves), 16) & ~(0xF << 76) & ~(0x3 << 62)
        return f"2.25.{uuid.UUID(int=number | (0x8 << 76) | (0x2 << 62)).int}"

    def offset_days(self, patient: str) -> int:
        """1 to 365: by how many days the dates of this patient are set back."""
        return int(keys.token(self.secret, f"days {patient.strip()}"), 16) % OFFSET_DAYS_MAX + 1

    @property
    def codes(self) -> list[str]:
        """The codes of CID 7050 that hold for what this profile makes."""
        chosen = {
            "113107": self.dates == "shifted",
            "113108": self.retain_characteristics,
            "113109": self.retain_device,
        }
        return ["113100", *(code for code, held in chosen.items() if held)]


class Row(NamedTuple):
    """One attribute of the table: its action, and "K", "C" or "" for each option."""

    action: str
    dates: str = ""
    characteristics: str = ""
    device: str = ""


@functools.cache
def table() -> dict[str, Row]:
    """PS3.15 Table E.1-1 by tag ("00080050"), and its patterns "50xxxxxx", "60xx3000", "60xx4000" and "private"."""
    rows = {}
    for tag, row in _shipped()["rows"].items():
        action, *options = row.split()
        rows[tag] = Row(action, **dict(option.split("=") for option in options))
    return rows


def source() -> str:
    """Where the table is from, for a manifest."""
    return str(_shipped()["source"])


@functools.cache
def _shipped() -> dict[str, Any]:
    shipped: dict[str, Any] = json.loads((Path(__file__).parent / "annex_e.json").read_text(encoding="utf-8"))
    return shipped


def deidentified(dataset: Dataset, profile: Profile) -> Dataset:
    """A copy of `dataset`, a whole file as pydicom reads it, after the Basic Profile and the options of `profile`.

    Write it with `save_as(path, enforce_file_format=True)`: in the transfer syntax that it came in. `dataset` keeps its values.
    Raises ImageLeftOut, nothing else: not_dicom for a header that cannot be read or does not say what the object is, and
    overlay_in_pixels for pixels with something in unused bits.
    """
    with silent():
        try:
            patient = _word(dataset, "PatientID") or f"study {_word(dataset, 'StudyInstanceUID')}"
            walk = _Walk(profile, patient)
            result = walk.cleaned(dataset, 0)
            _add_identity(result, dataset, profile)
            _add_evidence(result, profile)
            _add_meta(result, dataset, profile)
            correct_ambiguous_vr(result, _syntax(result) != EXPLICIT_BIG_ENDIAN)
            _add_character_set(result)
            _complete_or_raise(result, dataset)
            _nothing_hidden_or_raise(dataset)
        except READING_ERRORS:
            raise ImageLeftOut("not_dicom", "the header cannot be read") from None
    return result


def identifying(dataset: Dataset) -> list[str]:
    """Sorted keywords of what `dataset` holds and a de-identified file would not; [] for everything that `deidentified` makes.

    For a file that says of itself that it was de-identified (Patient Identity Removed, YES): attributes that the profile
    removes and that hold something, dates unless it says that they were modified or may stay, ages above 89, names that are
    not the pseudonym, private groups, curves, overlays, preamble and file meta information. Where another value may stand in
    place of the true one (Z, D, U), nobody can tell from the file which one it is, and what the file says is believed.

    For a file that says nothing, those are listed too, and "PatientIdentityRemoved". In every file: Secondary Capture, and
    Burned In Annotation YES. Raises ImageLeftOut(not_dicom).
    """
    with silent():
        try:
            claims = _claims(dataset)
            found = set() if claims else {"PatientIdentityRemoved"}
            _find(dataset, claims, _word(dataset, "PatientID"), found, 0)
            found |= _found_in_meta(dataset)
            if _word(dataset, "SOPClassUID").startswith(SECONDARY_CAPTURE):
                found.add("SOPClassUID")
            for keyword in ("BurnedInAnnotation", "RecognizableVisualFeatures"):
                if _word(dataset, keyword).upper() == "YES":
                    found.add(keyword)
        except READING_ERRORS:
            raise ImageLeftOut("not_dicom", "the header cannot be read") from None
    return sorted(found)


# Making the copy -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Walk:
    """One object on its way through the table. `patient`: whose offset and pseudonym hold for all of it."""

    profile: Profile
    patient: str

    def cleaned(self, dataset: Dataset, depth: int) -> Dataset:
        if depth > DEPTH_MAX:
            raise ValueError("sequences nested too deeply")
        result = Dataset()
        for tag in list(dataset.keys()):
            if _gone(tag) or tag in EVIDENCE or (depth and tag in PIXELS):
                continue
            try:
                element = dataset[tag]
            except (
                READING_ERRORS
            ):  # a value that its representation does not permit is no loss, and may be a name in a wrong place
                continue
            if tag in PIXELS:
                result[tag] = copy.copy(element)  # its VR may be corrected below, and the caller's is not ours
            elif (new := self._element(element, depth)) is not None:
                result[tag] = new
        return result

    def _element(self, element: DataElement, depth: int) -> DataElement | None:
        row, vr = table().get(f"{int(element.tag):08x}"), _vr(element.tag)
        if _shiftable(row, vr) and self.profile.dates == "shifted":
            shifted = self._shifted(element, vr)
            if shifted is not None:
                return shifted
        action = self._action(element, row, vr)
        if action == "X":
            return None
        if action == "Z":
            return DataElement(element.tag, vr, empty_value_for_VR(vr))
        if action == "D":
            return DataElement(element.tag, vr, [Dataset()] if vr == "SQ" else DUMMIES[vr])
        if action == "U":
            return self._remapped(element, vr, depth)
        return self._kept(element, vr, depth)

    def _action(self, element: DataElement, row: Row | None, vr: str) -> str:
        """X, Z, D, U or K."""
        if row is None:
            keyword = dictionary_keyword(element.tag)
            if element.tag.group == 0x0010 or (vr in ("LO", "SH") and keyword.endswith(("ID", "IDs"))):
                return "X"
            return UNLISTED.get(vr, "K")
        if self.profile.retain_characteristics and row.characteristics == "K":
            return "K"
        if self.profile.retain_device and row.device == "K" and vr not in TEMPORAL:
            return "K"  # dates of a device follow the option for dates: a treatment's are among them
        return decided(row.action, vr, element.is_empty)

    def _remapped(self, element: DataElement, vr: str, depth: int) -> DataElement | None:
        if vr == "SQ":
            return self._sequence(element, depth)
        new = [self._uid(text) for text in _texts(element)]
        return DataElement(element.tag, "UI", new if len(new) != 1 else new[0])

    def _uid(self, text: str) -> str:
        # Exactly those of the standard's dictionary: a UID that only begins like them can hold anything behind.
        return text if not text or text in UID_dictionary else self.profile.uid(text)

    def _shifted(self, element: DataElement, vr: str) -> DataElement | None:
        """Dates set back, to the day; None for what is no date of a day."""
        days = [_day(text) for text in _texts(element)]
        if vr == "TM" or not days or None in days:
            return None
        back = timedelta(days=self.profile.offset_days(self.patient))
        if any(day is not None and day.year < YEAR_MIN for day in days):
            return None
        new = [f"{day - back:%Y%m%d}".zfill(8) for day in days if day is not None]
        return DataElement(element.tag, vr, new if len(new) != 1 else new[0])

    def _kept(self, element: DataElement, vr: str, depth: int) -> DataElement | None:
        if vr == "SQ":
            return self._sequence(element, depth)
        if element.VR not in (vr, *vr.split(" or ")):
            return None  # the file says that another kind of value stands here than the standard
        if element.is_empty:
            return DataElement(element.tag, vr, empty_value_for_VR(vr))
        if vr in WORDS and element.tag.group == 0x0028 and isinstance(element.value, bytes):
            return DataElement(element.tag, element.VR, element.value)
        return _permitted(element) if vr in TEXT | NUMBERS else None

    def _sequence(self, element: DataElement, depth: int) -> DataElement | None:
        if element.VR != "SQ":
            return None
        return DataElement(element.tag, "SQ", Sequence([self.cleaned(item, depth + 1) for item in element.value]))


def decided(action: str, vr: str, empty: bool = False) -> str:
    """One of X, Z, D, U for an action of the table, as the module's docstring says; an empty value needs no dummy."""
    if action == "X/Z/U*" or (action == "D" and vr == "UI"):
        return "U"
    choices = action.split("/")
    if len(choices) == 1:
        return action if action != "D" or vr in DUMMIES or vr == "SQ" else "Z"
    weaker = "Z" if "Z" in choices else "X"
    return "D" if "D" in choices and vr not in TEMPORAL and vr != "SQ" and not empty else weaker


def _shiftable(row: Row | None, vr: str) -> bool:
    """Whether the option for modified dates speaks of it. Of what the table does not name no date is kept, shifted or not."""
    return row is not None and bool(row.dates) and vr in TEMPORAL


def _gone(tag: Any) -> bool:
    """Groups that go whole, private ones included, and what the dictionary does not know."""
    group = tag.group
    if tag.is_private or group in GONE_GROUPS or tag.element == 0 or group % 2:
        return True
    return _repeating(group) or not dictionary_has_tag(tag)


def _repeating(group: int) -> bool:
    return 0x5000 <= group <= 0x50FF or 0x6000 <= group <= 0x60FF


def _vr(tag: Any) -> str:
    return str(dictionary_VR(tag))


def _texts(element: DataElement) -> list[str]:
    values = element.value if isinstance(element.value, MultiValue | list) else [element.value]
    return [str(value).strip(" \0") for value in values if value is not None and value != ""]


def _word(dataset: Dataset, keyword: str) -> str:
    try:
        value = dataset.get(keyword)
    except READING_ERRORS:
        return ""
    return "" if value is None else str(value).strip(" \0")


def _number(dataset: Dataset, tag: int) -> int:
    """The value as a whole number, 0 where there is none."""
    try:
        return int(dataset[tag].value or 0)
    except READING_ERRORS:
        return 0


def _syntax(dataset: Dataset) -> str:
    """UID of the transfer syntax; of a file without file meta information, the native one that it was read with."""
    meta = getattr(dataset, "file_meta", None)
    named = "" if meta is None else str(meta.get("TransferSyntaxUID", "") or "")
    return named or _NATIVE.get(getattr(dataset, "original_encoding", None), "")


def _day(text: str) -> date | None:
    """The day of a DA or DT, of the old form 1995.07.20 too."""
    digits = text.replace(".", "") if _OLD_DATE.fullmatch(text) else text
    try:
        return date(int(digits[:4]), int(digits[4:6]), int(digits[6:8])) if _DATE.match(digits) else None
    except ValueError:
        return None


def _bounded_age(element: DataElement) -> DataElement | None:
    text = str(element.value)
    if not (len(text) == 4 and text[:3].isascii() and text[:3].isdigit() and text[3] in "DWMY"):
        return None
    old = text[3] == "Y" and int(text[:3]) > AGE_MAX
    return DataElement(element.tag, "AS", f"{AGE_MAX + 1:03d}Y" if old else text)


def _permitted(element: DataElement) -> DataElement | None:
    """The element with values that its representation and multiplicity permit, small slips of real devices mended; else None."""
    vr = element.VR
    if element.keyword == "PatientAge":
        return _bounded_age(element)
    values = list(element.value) if isinstance(element.value, MultiValue | list) else [element.value]
    most = dictionary_VM(element.tag).split("-")[-1]
    if isinstance(element.value, bytes):  # read without its representation; `correct_ambiguous_vr` makes numbers of it
        count = len(element.value) // 2
        return DataElement(element.tag, vr, element.value) if not most.isdigit() or count <= int(most) else None
    if most.isdigit() and len(values) > int(most):
        return None
    try:
        mended = [_mended(vr, value) for value in values]
    except (*READING_ERRORS, OverflowError):
        return None
    return DataElement(element.tag, vr, mended if len(mended) != 1 else mended[0])


def _mended(vr: str, value: Any) -> Any:
    """The value as it may be written. Raises ValueError for what cannot be kept."""
    if vr in NUMBERS:
        return value
    text = str(getattr(value, "original_string", value))
    if vr == "DS":
        return _as_written(vr, text) or DSfloat(float(value), auto_format=True)
    if vr == "IS":
        return _as_written(vr, text) or IS(int(value))
    found = _as_written(vr, text) or _as_written(vr, text.strip().upper() if vr == "CS" else text.strip())
    if found is None and text:
        raise ValueError
    return found or ""


def _as_written(vr: str, text: str) -> str | None:
    try:
        validate_value(vr, text, config.RAISE)
    except ValueError:
        return None
    return text


def _add_identity(result: Dataset, dataset: Dataset, profile: Profile) -> None:
    """PatientID is needed to keep a patient's images together; the name is empty, as the profile has it."""
    if patient := _word(dataset, "PatientID"):
        result.PatientID = profile.pseudonym(patient)


def _add_evidence(result: Dataset, profile: Profile) -> None:
    """PS3.15 E.1.1, E.3: that, how, and by which options. Burned In Annotation stays as found: nobody looked at pixels here."""
    result.PatientIdentityRemoved = "YES"
    result.DeidentificationMethod = ["Isocenter", "DICOM PS3.15 Annex E, Table E.1-1"]
    items = []
    for code in profile.codes:
        item = Dataset()
        item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = code, "DCM", CODES[code]
        items.append(item)
    result.DeidentificationMethodCodeSequence = Sequence(items)
    result.LongitudinalTemporalInformationModified = "MODIFIED" if profile.dates == "shifted" else "REMOVED"


def _add_meta(result: Dataset, dataset: Dataset, profile: Profile) -> None:
    """File meta information anew: the old one names application entities, and its instance UID may be the original one."""
    syntax, kind, instance = _syntax(dataset), _word(dataset, "SOPClassUID"), _word(dataset, "SOPInstanceUID")
    if UID_dictionary.get(kind, ("", ""))[1] != "SOP Class" or not instance:
        raise ValueError("no class of the standard, or no number of its own")
    if UID_dictionary.get(syntax, ("", ""))[1] != "Transfer Syntax":
        raise ValueError("no transfer syntax")
    meta = FileMetaDataset()
    meta.FileMetaInformationVersion = b"\x00\x01"
    meta.MediaStorageSOPClassUID = result.SOPClassUID = kind
    meta.MediaStorageSOPInstanceUID = result.SOPInstanceUID = profile.uid(instance)
    meta.TransferSyntaxUID = syntax
    meta.ImplementationClassUID, meta.ImplementationVersionName = IMPLEMENTATION_UID, IMPLEMENTATION_NAME
    result.file_meta, result.preamble = meta, bytes(128)


def _add_character_set(result: Dataset) -> None:
    """UTF-8 where anything needs it. What the file said is not kept: it is text that anybody may have written."""
    needed = [element for element in result.iterall() if element.VR in TEXT and not str(element.value).isascii()]
    if needed:
        result.SpecificCharacterSet = "ISO_IR 192"


def _complete_or_raise(result: Dataset, dataset: Dataset) -> None:
    for keyword in NEEDED:
        if _word(dataset, keyword) and keyword not in result:
            raise ImageLeftOut("not_dicom", f"{keyword} is not what the standard permits there")


def _nothing_hidden_or_raise(dataset: Dataset) -> None:
    """Refuse native pixels with something in bits that they do not use, where overlays were put before 2004 (PS3.5 8.1.2), or
    with something behind the last of them. Signed pixels fill these bits with the sign.
    """
    positions = [
        _number(dataset, tag) for tag in list(dataset.keys()) if _repeating(tag.group) and tag.element == 0x0102
    ]
    hidden = any(positions)
    allocated, stored = _number(dataset, 0x00280100), _number(dataset, 0x00280101)
    signed = _number(dataset, 0x00280103) == 1
    element = dataset.get(0x7FE00010)
    if element is not None and not element.is_undefined_length and isinstance(element.value, bytes):
        hidden = hidden or any(element.value[_native_bytes(dataset, allocated) :])
    if element is not None and allocated in (8, 16) and 0 < stored < allocated and not signed:
        lowest = (_number(dataset, 0x00280102) or stored - 1) - stored + 1
        if not element.is_undefined_length and isinstance(element.value, bytes) and 0 <= lowest <= allocated - stored:
            order = ">" if _syntax(dataset) == EXPLICIT_BIG_ENDIAN else "<"
            values = np.frombuffer(element.value[: len(element.value) // 2 * 2], f"{order}u{allocated // 8}")
            unused = ((1 << allocated) - 1) & ~(((1 << stored) - 1) << lowest)
            hidden = hidden or bool((values & values.dtype.type(unused)).any())
    if hidden:
        raise ImageLeftOut("overlay_in_pixels", "bits that no pixel uses are not empty")


def _native_bytes(dataset: Dataset, allocated: int) -> int:
    """How many bytes the pixels fill when they are not compressed (PS3.5 8.1.1)."""
    sizes = [_number(dataset, tag) for tag in (0x00280010, 0x00280011)]  # rows, columns
    times = [_number(dataset, tag) or 1 for tag in (0x00280002, 0x00280008)]  # samples, frames
    return -(-math.prod((*sizes, *times, allocated)) // 8)


# Looking for what identifies -----------------------------------------------------------------------------------------


def _claims(dataset: Dataset) -> frozenset[str]:
    """The codes of CID 7050 that the file says hold for it; "said" among them if it says that identity was removed at all."""
    if _word(dataset, "PatientIdentityRemoved").upper() != "YES":
        return frozenset()
    items = dataset.get("DeidentificationMethodCodeSequence") or []
    return frozenset(["said", *(_word(item, "CodeValue") for item in items)])


def _find(dataset: Dataset, claims: frozenset[str], patient: str, found: set[str], depth: int) -> None:
    if depth > DEPTH_MAX:
        raise ValueError("sequences nested too deeply")
    for tag in list(dataset.keys()):
        if tag.is_private or tag.group % 2:
            found.add(f"PrivateGroup{tag.group:04X}")
            continue
        if _repeating(tag.group):
            found.add(f"Group{tag.group:04X}")
            continue
        if tag in EVIDENCE or tag.group in GONE_GROUPS or tag.element == 0:
            continue
        if not dictionary_has_tag(tag):
            found.add(f"Unknown{int(tag):08X}")
            continue
        element = dataset[tag]
        if not element.is_empty and _tells(element, claims, patient):
            found.add(keyword_for_tag(tag))
        if element.VR == "SQ":
            for item in element.value:
                _find(item, claims, patient, found, depth + 1)


def _tells(element: DataElement, claims: frozenset[str], patient: str) -> bool:
    """Whether a de-identified file would not hold this value; `element` is not empty."""
    row, vr = table().get(f"{int(element.tag):08x}"), _vr(element.tag)
    if row is None:
        return vr == "PN" and not _is_dummy(element, patient)
    if not claims:
        return True
    kept = {name for code, name in _OPTION_OF.items() if code in claims and getattr(row, name)}
    if "characteristics" in kept:
        return bool(element.keyword == "PatientAge" and str(element.value) > f"{AGE_MAX + 1:03d}Y")
    if vr in TEMPORAL:
        return not kept and not ("D" in row.action and _is_dummy(element, patient))
    if vr == "PN":
        return not _is_dummy(element, patient)
    return row.action == "X" and not kept


def _is_dummy(element: DataElement, patient: str) -> bool:
    dummies = {*ANONYMOUS, patient.upper(), str(DUMMIES.get(_vr(element.tag), ""))}
    return all(text.strip("^ ").upper() in dummies for text in _texts(element))


def _found_in_meta(dataset: Dataset) -> set[str]:
    """Application entities, private information, another instance than the object's own, and anything in the preamble."""
    meta: Dataset = getattr(dataset, "file_meta", None) or Dataset()
    found = {keyword_for_tag(tag) or f"Unknown{int(tag):08X}" for tag in list(meta.keys()) if tag not in META_KEPT}
    instance = _word(meta, "MediaStorageSOPInstanceUID")
    if instance and instance != _word(dataset, "SOPInstanceUID"):
        found.add("MediaStorageSOPInstanceUID")
    if any(getattr(dataset, "preamble", None) or b""):
        found.add("Preamble")
    return found


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """What pydicom warns of or logs in here is dropped: those texts quote values. For reading a file before it comes here."""
    logger = logging.getLogger("pydicom")
    before = logger.handlers, logger.propagate
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.handlers, logger.propagate = [logging.NullHandler()], False
        try:
            yield
        finally:
            logger.handlers, logger.propagate = before
