"""One file becomes a header (first look) or pixels (second look), or `ImageLeftOut` with a `Reason`.

Checks run from cheap to costly, and what a file *is* comes before what is wrong with it, so the counts mean what they say.
Nothing of the header is printed or put into an error.
"""

import io
import json
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
from PIL import Image, ImageOps, UnidentifiedImageError
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset

from fl_client.first_look import Header, View
from fl_client.sources import FILE_BYTES_MAX, Reason
from models import grids, imaging, volumes
from privacy.errors import ImageLeftOut

RADIOGRAPHS = {
    "1.2.840.10008.5.1.4.1.1.1": "CR",  # Computed Radiography Image Storage
    "1.2.840.10008.5.1.4.1.1.1.1": "DX",  # Digital X-Ray Image Storage, For Presentation
    "1.2.840.10008.5.1.4.1.1.1.1.1": "DX",  # Digital X-Ray Image Storage, For Processing
}
CT = "1.2.840.10008.5.1.4.1.1.2"
ENHANCED_CT = ("1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")  # and what old CT is converted to
FOR_PROCESSING = "1.2.840.10008.5.1.4.1.1.1.1.1"
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"  # and the multi-frame classes, .1 to .4 below it
DEFLATED = b"1.2.840.10008.1.2.1.99"
META_BYTES_MAX = 64 * 1024  # file meta information is a few hundred bytes
TEXT_MAX = 128  # characters kept of a header field: the longest value DICOM allows in these is 64
GREY_TOLERANCE = 8  # JPEG stores grey as luminance and chroma; rounding leaves the channels this close
YEARS = {"D": 1 / 365.25, "W": 7 / 365.25, "M": 1 / 12, "Y": 1.0}
YEARS_MAX = 120  # above it, an age is a typing error: headers say 148 and 155
SIDECAR_BYTES_MAX = 4 * 1024 * 1024


LOINC_FRONTAL = frozenset(("36589-0", "30746-2", "24632-2", "24634-8", "36572-6"))
"""XR chest as one frontal view: portable AP single view, portable views (AP too), AP. Codes of PA with lateral decide nothing."""
READ = [
    *(
        "SOPClassUID",
        "SOPInstanceUID",
        "StudyInstanceUID",
        "SeriesInstanceUID",
        "AccessionNumber",
        "Modality",
        "Manufacturer",
    ),
    *(
        "PatientID",
        "PatientSex",
        "PatientAge",
        "ViewPosition",
        "ViewCodeSequence",
        "PatientOrientation",
        "SeriesDescription",
    ),
    *("StudyDescription", "PresentationIntentType", "ImageType", "BurnedInAnnotation", "LossyImageCompression", "Rows"),
    *(
        "Columns",
        "SamplesPerPixel",
        "NumberOfFrames",
        "ImagePositionPatient",
        "ImageOrientationPatient",
        "PixelSpacing",
    ),
    *("AcquisitionNumber", "TemporalPositionIdentifier"),
]
"""What a first look reads of a header; the rest is passed over."""


@dataclass(frozen=True)
class Pixels:
    """One radiograph read: `pixels` float32 (H, W) in 0..1, bright is dense, no side above the limit asked for."""

    pixels: npt.NDArray[np.float32]
    spacing_mm: tuple[float, float] | None
    low: float
    high: float
    matrix: tuple[int, ...] = ()  # rows and columns in the file


def look_at_dicom(data: bytes, identifying: Callable[[Dataset], list[str]] | None = None) -> Header:
    """The header of the radiograph or CT slice in `data`, a DICOM file with or without preamble. Raises only ImageLeftOut.

    `identifying`: what finds a person in a header, for a site that wants none in its files.
    """
    with imaging.quiet_reading():
        try:
            dataset = _parse(data, pixels=False, only=None if identifying else READ)
            modality = _image_or_raise(dataset)
            where = _lies(dataset) if modality == "CT" else {}
            header = _said(dataset, modality, "unknown" if where else view_of(dataset), **where)
            _usable_or_raise(dataset, header)
            if identifying is not None and identifying(dataset):
                raise ImageLeftOut(Reason.IDENTIFYING)
        except imaging.READING_ERRORS:
            raise ImageLeftOut(Reason.NOT_DICOM) from None
    return header


def _said(dataset: Dataset, modality: str, view: View, **where: Any) -> Header:
    """What a header says of whom and what an image is, and by which numbers it is known."""
    return Header(
        patient=_text(dataset, "PatientID"),
        study_uid=_text(dataset, "StudyInstanceUID"),
        series_uid=_text(dataset, "SeriesInstanceUID"),
        sop_uid=_text(dataset, "SOPInstanceUID"),
        accession=_text(dataset, "AccessionNumber"),
        modality=modality,
        view=view,
        manufacturer=_text(dataset, "Manufacturer"),
        sex=_one_of(_text(dataset, "PatientSex"), "FMO"),
        age_years=age_of(_text(dataset, "PatientAge")),
        lossy=_text(dataset, "LossyImageCompression") == "01",
        **where,
    )


def read_radiograph(data: bytes, longest_side_px: int, *, display: bool) -> Pixels:
    """The pixels of a file that `look_at_dicom` found a radiograph. Raises only ImageLeftOut."""
    with imaging.quiet_reading():
        image = imaging.decode(_with_pixels(data), display=display)
    found = imaging.scaled(image)
    small = grids.reduced(found.pixels, longest_side_px)
    return Pixels(small, image.spacing_mm, found.low, found.high, image.values.shape)


def read_slice(data: bytes) -> volumes.Int16:
    """The pixels of a file that `look_at_dicom` found a CT slice, in Hounsfield units int16 (H, W). Raises only ImageLeftOut."""
    with imaging.quiet_reading():
        image = imaging.decode(_with_pixels(data))
    if image.inverted:
        raise ImageLeftOut(Reason.POLARITY_UNKNOWN)
    return volumes.hounsfield(image.values, image.padding)


def _with_pixels(data: bytes) -> Dataset:
    try:
        dataset = _parse(data, pixels=True)
    except imaging.READING_ERRORS:
        raise ImageLeftOut(Reason.NOT_DICOM) from None
    if "PixelData" not in dataset:
        raise ImageLeftOut(Reason.TRUNCATED)  # its header says that there are pixels: the copy ended early
    return dataset


def age_of(text: str) -> float | None:
    """Years of a DICOM Age String (PS3.5 6.2: 063Y, 018M, 006W, 003D); None for anything else, and above YEARS_MAX."""
    found = re.fullmatch(r"(\d{1,3})([DWMY])", text.upper())
    if found is None:
        return None
    years = int(found[1]) * YEARS[found[2]]
    return years if years <= YEARS_MAX else None


PICTURE_BEGINNINGS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")


@dataclass(frozen=True)
class Caption:
    """What is known of a picture from beside it, by the label table or a sidecar. `view` None: vouched for as frontal."""

    patient: str | None
    view: str | None
    sidecar: Header | None = None
    inverted: bool = False


def read_sidecar(data: bytes) -> Caption:
    """The DICOM header that lies as JSON beside a picture (BIMCV and others): by keyword, or the DICOM JSON model (PS3.18 F).

    Raises ImageLeftOut(sidecar) if it is none. Of a picture it says patient, view, and whether bright means air.
    """
    with imaging.quiet_reading():
        try:
            if len(data) > SIDECAR_BYTES_MAX:
                raise ValueError
            dataset = _of_json(json.loads(data))
            header = _said(dataset, _one_of_modalities(_text(dataset, "Modality").upper()), view_of(dataset))
            inverted = _text(dataset, "PhotometricInterpretation") == "MONOCHROME1"
        except (*imaging.READING_ERRORS, RecursionError):
            raise ImageLeftOut(Reason.SIDECAR) from None
    return Caption(header.patient or None, header.view, header, inverted)


def _of_json(document: Any) -> Dataset:
    """A data set of the keywords that are read here; what they hold is text, as in a header."""
    if not isinstance(document, dict):
        raise ValueError
    dataset = Dataset()
    for key, value in document.items():
        tag = pydicom.datadict.tag_for_keyword(key)
        if tag is None and re.fullmatch("[0-9A-Fa-f]{8}", key):
            tag = int(key, 16)
        keyword = "" if tag is None else pydicom.datadict.keyword_for_tag(tag)
        if keyword in _OF_SIDECARS:
            stated = value.get("Value", []) if isinstance(value, dict) else value
            many = stated if isinstance(stated, list) else [stated]
            words = [str(one) for one in many if isinstance(one, str | int | float)]
            setattr(dataset, keyword, words if keyword == "PatientOrientation" else " ".join(words[:1]))
    return dataset


_OF_SIDECARS = frozenset(
    (
        *("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "AccessionNumber", "Modality"),
        *("ViewPosition", "PatientOrientation", "SeriesDescription", "StudyDescription", "Manufacturer", "PatientSex"),
        *("PatientAge", "PhotometricInterpretation"),
    )
)


def look_at_picture(data: bytes, caption: Caption) -> Header:
    """The header of a PNG or JPEG file, from what is known of it. Raises ImageLeftOut."""
    if not data.startswith(PICTURE_BEGINNINGS):  # before the patient is asked for: a table or text file has none either
        raise ImageLeftOut(Reason.NOT_A_PICTURE)
    view: View = "frontal" if caption.view is None else view_in_words(caption.view)
    if caption.view in ("frontal", "lateral"):
        view = "frontal" if caption.view == "frontal" else "lateral"
    facts = (caption.sidecar or Header()).to_json() | {
        "patient": caption.patient or "",
        "view": view,
        "inverted": caption.inverted,
    }
    header = Header(**facts)
    if not header.patient:
        raise ImageLeftOut(Reason.NO_PATIENT)
    _frontal_or_raise(header.view)
    return header


def volume_header(caption: Caption) -> Header:
    """The header of a NIfTI volume, which itself says nothing of whom it is of."""
    facts = (caption.sidecar or Header()).to_json() | {
        "patient": caption.patient or "",
        "modality": "CT",
        "view": "unknown",
    }
    return Header(**facts)


def read_picture(data: bytes, longest_side_px: int, *, inverted: bool = False) -> Pixels:
    """The pixels of a PNG or JPEG file, grey or grey stored as colour. Raises ImageLeftOut."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as picture:
            if picture.width * picture.height > imaging.PIXELS_MAX:
                raise ImageLeftOut(Reason.TOO_LARGE)
            values = _grey(ImageOps.exif_transpose(picture))
    except UnidentifiedImageError:
        raise ImageLeftOut(Reason.NOT_A_PICTURE) from None
    except Image.DecompressionBombError:
        raise ImageLeftOut(Reason.TOO_LARGE) from None
    except OSError:
        raise ImageLeftOut(Reason.TRUNCATED) from None
    except (*imaging.READING_ERRORS, SyntaxError):  # Pillow's PNG reader raises SyntaxError on broken chunks
        raise ImageLeftOut(Reason.UNREADABLE_PIXELS) from None
    found = imaging.scaled(imaging.Radiograph(-values if inverted else values, None, None))
    small = grids.reduced(found.pixels, longest_side_px)
    return Pixels(small, None, found.low, found.high, found.pixels.shape)


def _grey(picture: Image.Image) -> npt.NDArray[np.float32]:
    """float32 (H, W). Raises ImageLeftOut(colour) if the channels differ. Transparency says nothing about density."""
    if picture.mode in ("1", "L", "I", "F") or picture.mode.startswith("I;16"):
        return np.asarray(picture.convert("L") if picture.mode == "1" else picture, dtype=np.float32)
    if picture.mode == "LA":
        return np.asarray(picture, dtype=np.float32)[..., 0]
    if picture.mode == "CMYK":
        raise ImageLeftOut(Reason.COLOUR)
    channels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    if float(np.ptp(channels, axis=-1).max()) > GREY_TOLERANCE:
        raise ImageLeftOut(Reason.COLOUR)
    return np.ascontiguousarray(channels[..., 1])


def parse_whole(data: bytes) -> Dataset:
    """The data set with its pixels, not decoded. Raises ImageLeftOut, or what pydicom raises on damage (`READING_ERRORS`)."""
    return _parse(data, pixels=True)


def _parse(data: bytes, *, pixels: bool, only: list[str] | None = None) -> Dataset:
    """The data set, with or without what follows the header; of the header all, or `only` so much.

    Without "DICM" at byte 128 the first tag must be of group 2 or 8, else it is no DICOM.
    """
    preamble = data[128:132] == b"DICM"
    if not preamble and data[:2] not in (b"\x08\x00", b"\x02\x00", b"\x00\x08"):
        raise ImageLeftOut(Reason.NOT_DICOM)
    if preamble:
        _bounded_or_raise(data)
    dataset = pydicom.dcmread(io.BytesIO(data), force=not preamble, stop_before_pixels=not pixels, specific_tags=only)
    if not preamble and "SOPClassUID" not in dataset and "Modality" not in dataset:
        raise ImageLeftOut(Reason.NOT_DICOM)
    return dataset


def _bounded_or_raise(data: bytes) -> None:
    """Refuse a deflated file that would unpack to more than the size limit; a thousandfold is possible."""
    length = int.from_bytes(
        data[140:144], "little"
    )  # value of (0002,0000), which always comes first after the preamble
    if length > META_BYTES_MAX or DEFLATED not in data[144 : 144 + length]:
        return
    unpacking = zlib.decompressobj(-zlib.MAX_WBITS)
    unpacking.decompress(data[144 + length :], FILE_BYTES_MAX)
    if unpacking.unconsumed_tail:
        raise ImageLeftOut(Reason.TOO_LARGE)


def _image_or_raise(dataset: Dataset) -> str:
    """ "CR", "DX" or "CT" by modality and SOP class; the reason that says what it is instead."""
    meta = getattr(dataset, "file_meta", None) or {}
    sop_class = _text(dataset, "SOPClassUID") or str(meta.get("MediaStorageSOPClassUID", "") or "")
    modality = _text(dataset, "Modality").upper()
    if sop_class == SECONDARY_CAPTURE or sop_class.startswith(SECONDARY_CAPTURE + "."):
        raise ImageLeftOut(Reason.SECONDARY_CAPTURE)
    if not sop_class and not modality:
        raise ImageLeftOut(Reason.TRUNCATED)
    if sop_class in ENHANCED_CT:
        raise ImageLeftOut(Reason.ENHANCED)
    if sop_class == CT or (not sop_class and modality == "CT"):
        return _slice_or_raise(dataset, modality)
    if sop_class and sop_class not in RADIOGRAPHS:
        raise ImageLeftOut(Reason.OTHER_OBJECT)
    if modality not in ("CR", "DX", ""):
        raise ImageLeftOut(Reason.OTHER_OBJECT)
    if sop_class == FOR_PROCESSING or _text(dataset, "PresentationIntentType").upper() == "FOR PROCESSING":
        raise ImageLeftOut(Reason.FOR_PROCESSING)
    if "Rows" not in dataset:
        raise ImageLeftOut(Reason.TRUNCATED if sop_class else Reason.NO_PIXELS)
    return modality or RADIOGRAPHS[sop_class]


def _slice_or_raise(dataset: Dataset, modality: str) -> str:
    if modality not in ("CT", ""):
        raise ImageLeftOut(Reason.OTHER_OBJECT)
    if "LOCALIZER" in _words(dataset, "ImageType"):
        raise ImageLeftOut(Reason.LOCALIZER)
    if (_whole(dataset, "NumberOfFrames") or 1) != 1:
        raise ImageLeftOut(Reason.ENHANCED)
    if "Rows" not in dataset:
        raise ImageLeftOut(Reason.TRUNCATED)
    return "CT"


def _lies(dataset: Dataset) -> dict[str, Any]:
    """`plane` and `size` of a CT slice. Raises ImageLeftOut(no_geometry)."""
    try:
        values = [
            _numbers(dataset, keyword)
            for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
        ]
        size = [_whole(dataset, "Rows") or 0, _whole(dataset, "Columns") or 0]
    except imaging.READING_ERRORS:
        raise ImageLeftOut(Reason.NO_GEOMETRY) from None
    volumes.plane_of(*values)
    passage = f"{_text(dataset, 'AcquisitionNumber')} {_text(dataset, 'TemporalPositionIdentifier')}".strip()
    return {"plane": [number for part in values for number in part], "size": size, "acquisition": passage}


def _usable_or_raise(dataset: Dataset, header: Header) -> None:
    if (_whole(dataset, "SamplesPerPixel") or 1) != 1:
        raise ImageLeftOut(Reason.COLOUR)
    if _text(dataset, "BurnedInAnnotation").upper() == "YES":
        raise ImageLeftOut(Reason.BURNED_IN_TEXT)
    if header.modality != "CT":
        _frontal_or_raise(header.view)


def _one_of(word: str, allowed: str) -> str:
    return word.upper() if len(word) == 1 and word.upper() in allowed else ""


def _one_of_modalities(word: str) -> str:
    return word if word in ("CR", "DX") else ""


def _frontal_or_raise(view: View) -> None:
    if view != "frontal":
        raise ImageLeftOut(Reason.LATERAL if view == "lateral" else Reason.VIEW_UNKNOWN)


def view_of(dataset: Dataset) -> View:
    """The view by View Position, else View Code, else Patient Orientation, else descriptions (the series' before the study's),
    else the code of the procedure.

    The order is that of trust: in 7,469 public chest radiographs a third had no View Position, and descriptions such as
    "PA AND LATERAL" name a whole examination and say nothing about one of its images.
    """
    position = view_in_words(_text(dataset, "ViewPosition"))
    if position != "unknown":
        return position
    codes = dataset.get("ViewCodeSequence")
    meaning = view_in_words(_text(codes[0], "CodeMeaning")) if codes else "unknown"
    if meaning != "unknown":
        return meaning
    orientation = [str(part).strip().upper() for part in dataset.get("PatientOrientation") or []]
    if len(orientation) == 2 and orientation[1][:1] in ("F", "H"):
        if orientation[0][:1] in ("L", "R"):
            return "frontal"
        if orientation[0][:1] in ("A", "P"):
            return "lateral"
    for keyword in ("SeriesDescription", "StudyDescription"):
        described = view_in_words(_text(dataset, keyword))
        if described != "unknown":
            return described
    procedures = dataset.get("ProcedureCodeSequence")
    return _view_of_procedure(procedures[0]) if procedures else "unknown"


def _view_of_procedure(code: Dataset) -> View:
    """By LOINC, to which MIDRC maps what was ordered, else by what the code says it means."""
    if _text(code, "CodingSchemeDesignator").upper() in ("LN", "LOINC"):
        return "frontal" if _text(code, "CodeValue") in LOINC_FRONTAL else "unknown"
    return view_in_words(_text(code, "CodeMeaning"))


_FRONTAL = re.compile(r"\b(PA|AP|FRONTAL|PORTABLE|(POSTERO|ANTERO)[ -]?(ANTERIOR|POSTERIOR))\b")
_LATERAL = re.compile(r"\b(LL|RL|LAT|LLAT|RLAT|LATERAL)\b")
_NEITHER = re.compile(r"\b(OBLIQUE|DECUBITUS|LLD|RLD|LLO|RLO|LAO|RAO|LPO|RPO|LORDOTIC)\b")


def view_in_words(text: str) -> View:
    """Frontal or lateral if the words name exactly one of them, and no oblique, decubitus or lordotic view."""
    words = re.sub(r"[_\W]+", " ", text.upper())
    frontal, lateral = bool(_FRONTAL.search(words)), bool(_LATERAL.search(words))
    if frontal == lateral or _NEITHER.search(words):
        return "unknown"
    return "frontal" if frontal else "lateral"


def _text(dataset: Dataset, keyword: str) -> str:
    """The value as one line of text without padding; "" if absent."""
    raw = _raw(dataset, keyword)
    if raw is not None:
        return raw.replace("\0", "").strip()[:TEXT_MAX]
    value = dataset.get(keyword)
    return "" if value is None else str(value).replace("\0", "").strip()[:TEXT_MAX]


def _raw(dataset: Dataset, keyword: str) -> str | None:
    """A single value that stands in the file as plain ASCII; None if pydicom has to say what it means.

    Of the hundred values of a header twenty are read here, and pydicom's way to each costs as much as finding all of them.
    """
    element = dataset.get_item(keyword)
    value = getattr(element, "value", None) if type(element) is RawDataElement else None
    if not isinstance(value, bytes) or not value.isascii() or b"\\" in value or b"\x1b" in value:
        return None
    return value.decode("ascii")


def _words(dataset: Dataset, keyword: str) -> list[str]:
    """The values of a code string in capitals; [] if absent."""
    element = dataset.get_item(keyword)
    value = getattr(element, "value", None) if type(element) is RawDataElement else None
    if isinstance(value, bytes) and value.isascii():
        return [part.strip(" \0").upper() for part in value.decode("ascii").split("\\")]
    stated = dataset.get(keyword) or []
    return [str(part).strip().upper() for part in ([stated] if isinstance(stated, str) else stated)]


def _whole(dataset: Dataset, keyword: str) -> int | None:
    """A whole number (US or IS); None if absent. Raises what int() and pydicom raise."""
    element = dataset.get_item(keyword)
    if (
        type(element) is RawDataElement
        and isinstance(element.value, bytes)
        and element.VR == "US"
        and len(element.value) == 2
    ):
        return int.from_bytes(element.value, "little" if element.is_little_endian else "big")
    value = dataset.get(keyword)
    return None if value is None or value == "" else int(value)


def _numbers(dataset: Dataset, keyword: str) -> list[float]:
    """The numbers of a decimal string; [] if absent. Raises what float() and pydicom raise."""
    element = dataset.get_item(keyword)
    value = getattr(element, "value", None) if type(element) is RawDataElement else None
    if isinstance(value, bytes) and value.isascii():
        return [float(part.strip(" \0")) for part in value.decode("ascii").split("\\")]
    return [float(part) for part in dataset.get(keyword) or ()]
