"""One file becomes one decoded radiograph with the few header fields that are kept, or `ImageLeftOut` with a `Reason`.

Checks run from cheap to costly, and what a file *is* comes before what is wrong with it, so the counts mean what they say.
Nothing of the header is printed or put into an error.
"""

import io
import re
import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pydicom
from PIL import Image, ImageOps, UnidentifiedImageError
from pydicom.dataset import Dataset

from fl_client.sources import FILE_BYTES_MAX, Reason
from models import imaging
from privacy.errors import ImageLeftOut

View = Literal["frontal", "lateral", "unknown"]

RADIOGRAPHS = {
    "1.2.840.10008.5.1.4.1.1.1": "CR",  # Computed Radiography Image Storage
    "1.2.840.10008.5.1.4.1.1.1.1": "DX",  # Digital X-Ray Image Storage, For Presentation
    "1.2.840.10008.5.1.4.1.1.1.1.1": "DX",  # Digital X-Ray Image Storage, For Processing
}
FOR_PROCESSING = "1.2.840.10008.5.1.4.1.1.1.1.1"
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"  # and the multi-frame classes, .1 to .4 below it
DEFLATED = b"1.2.840.10008.1.2.1.99"
META_BYTES_MAX = 64 * 1024  # file meta information is a few hundred bytes
TEXT_MAX = 128  # characters kept of a header field: the longest value DICOM allows in these is 64
GREY_TOLERANCE = 8  # JPEG stores grey as luminance and chroma; rounding leaves the channels this close


@dataclass(frozen=True)
class Header:
    """What the index keeps of one file; text is "" where the file says nothing."""

    patient: str = ""
    study_uid: str = ""
    series_uid: str = ""
    sop_uid: str = ""
    accession: str = ""
    modality: str = ""
    view: View = "unknown"
    manufacturer: str = ""
    spacing_mm: tuple[float, float] | None = None


@dataclass(frozen=True)
class Reading:
    """One file read: `pixels` float32 (H, W) in 0..1, bright is dense, no side above the limit asked for."""

    header: Header
    pixels: npt.NDArray[np.float32]


def read_dicom(data: bytes, longest_side_px: int) -> Reading:
    """The radiograph in `data`, a DICOM file with or without preamble. Raises ImageLeftOut with a Reason, nothing else."""
    with imaging.quiet_reading():
        try:
            dataset = _parse(data)
            modality = _radiograph_or_raise(dataset)
            header = Header(
                patient=_text(dataset, "PatientID"),
                study_uid=_text(dataset, "StudyInstanceUID"),
                series_uid=_text(dataset, "SeriesInstanceUID"),
                sop_uid=_text(dataset, "SOPInstanceUID"),
                accession=_text(dataset, "AccessionNumber"),
                modality=modality,
                view=view_of(dataset),
                manufacturer=_text(dataset, "Manufacturer"),
            )
            _usable_or_raise(dataset, header)
        except imaging.READING_ERRORS:
            raise ImageLeftOut(Reason.NOT_DICOM) from None
        image = imaging.decode(dataset)
    pixels = imaging.reduced(imaging.scaled(image), longest_side_px)
    return Reading(Header(**{**vars(header), "spacing_mm": image.spacing_mm}), pixels)


PICTURE_BEGINNINGS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")


def read_picture(data: bytes, longest_side_px: int, patient: str | None, view: str | None) -> Reading:
    """The radiograph in a PNG or JPEG file, grey or grey stored as colour, with what the label table says about it.

    `view` is the word of the table's view column; None means that the site has no such column and vouches for frontal views.
    """
    if not data.startswith(PICTURE_BEGINNINGS):  # before the patient is asked for: a table or text file has none either
        raise ImageLeftOut(Reason.NOT_A_PICTURE)
    header = Header(patient=patient or "", view="frontal" if view is None else view_in_words(view))
    if not header.patient:
        raise ImageLeftOut(Reason.NO_PATIENT)
    _frontal_or_raise(header.view)
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
    pixels = imaging.reduced(imaging.scaled(imaging.Radiograph(values, None, None)), longest_side_px)
    return Reading(header, pixels)


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


def _parse(data: bytes) -> Dataset:
    """The data set, with pixels. Without "DICM" at byte 128 the first tag must be of group 2 or 8, else it is no DICOM."""
    preamble = data[128:132] == b"DICM"
    if not preamble and data[:2] not in (b"\x08\x00", b"\x02\x00", b"\x00\x08"):
        raise ImageLeftOut(Reason.NOT_DICOM)
    if preamble:
        _bounded_or_raise(data)
    dataset = pydicom.dcmread(io.BytesIO(data), force=not preamble)
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


def _radiograph_or_raise(dataset: Dataset) -> str:
    """ "CR" or "DX" by modality and SOP class; the reason that says what it is instead."""
    meta = getattr(dataset, "file_meta", None) or {}
    sop_class = _text(dataset, "SOPClassUID") or str(meta.get("MediaStorageSOPClassUID", "") or "")
    modality = _text(dataset, "Modality").upper()
    if sop_class == SECONDARY_CAPTURE or sop_class.startswith(SECONDARY_CAPTURE + "."):
        raise ImageLeftOut(Reason.SECONDARY_CAPTURE)
    if not sop_class and not modality:
        raise ImageLeftOut(Reason.TRUNCATED)
    if sop_class and sop_class not in RADIOGRAPHS:
        raise ImageLeftOut(Reason.NOT_A_RADIOGRAPH)
    if modality not in ("CR", "DX", ""):
        raise ImageLeftOut(Reason.NOT_A_RADIOGRAPH)
    if sop_class == FOR_PROCESSING or _text(dataset, "PresentationIntentType").upper() == "FOR PROCESSING":
        raise ImageLeftOut(Reason.FOR_PROCESSING)
    if "PixelData" not in dataset:
        # An image object always has pixels; where they are missing, the copy ended early.
        raise ImageLeftOut(Reason.TRUNCATED if sop_class else Reason.NO_PIXELS)
    return modality or RADIOGRAPHS[sop_class]


def _usable_or_raise(dataset: Dataset, header: Header) -> None:
    if int(dataset.get("SamplesPerPixel") or 1) != 1:
        raise ImageLeftOut(Reason.COLOUR)
    if _text(dataset, "BurnedInAnnotation").upper() == "YES":
        raise ImageLeftOut(Reason.BURNED_IN_TEXT)
    if not header.patient:
        raise ImageLeftOut(Reason.NO_PATIENT)
    _frontal_or_raise(header.view)


def _frontal_or_raise(view: View) -> None:
    if view != "frontal":
        raise ImageLeftOut(Reason.LATERAL if view == "lateral" else Reason.VIEW_UNKNOWN)


def view_of(dataset: Dataset) -> View:
    """The view by View Position, else View Code, else Patient Orientation, else descriptions (the series' before the study's).

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
    return "unknown"


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
    value = dataset.get(keyword)
    return "" if value is None else str(value).replace("\0", "").strip()[:TEXT_MAX]
