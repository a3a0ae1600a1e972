"""Pixels of radiographs brought to one scale and one grid, the same at every site whatever its devices write.

The order of a DICOM value is fixed (PS3.4 N.2): stored value -> modality LUT or rescale -> polarity. Polarity is decided by
Photometric Interpretation alone and inverted exactly once, so bright always means dense: Presentation LUT Shape says the same
thing a second time in many files, and applying both turns the image back. Percentiles 0.5 and 99.5 become 0 and 1, unless a
study asks for the display that the file names (VOI LUT or window): nearly half of all radiographs have none, and the others
carry the site's taste.

Only lossless transfer syntaxes are decoded, each by one chosen decoder, so that two sites never see different pixels.
Nothing pydicom says is passed on: its warnings and errors quote the header's values.
"""

import contextlib
import logging
import math
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.multival import MultiValue
from pydicom.pixels import pixel_array
from pydicom.pixels.processing import apply_modality_lut

from privacy.errors import ImageLeftOut

NATIVE = {
    "1.2.840.10008.1.2": "Implicit VR Little Endian",
    "1.2.840.10008.1.2.1": "Explicit VR Little Endian",
    "1.2.840.10008.1.2.1.99": "Deflated Explicit VR Little Endian",
    "1.2.840.10008.1.2.2": "Explicit VR Big Endian",
}
DECODERS = {
    "1.2.840.10008.1.2.5": "pylibjpeg",  # RLE Lossless
    "1.2.840.10008.1.2.4.57": "gdcm",  # JPEG Lossless, process 14
    "1.2.840.10008.1.2.4.70": "gdcm",  # JPEG Lossless, process 14, selection value 1
    "1.2.840.10008.1.2.4.80": "pyjpegls",  # JPEG-LS Lossless; the others return damaged data as if it were whole
    "1.2.840.10008.1.2.4.90": "gdcm",  # JPEG 2000 Lossless Only
    "1.2.840.10008.1.2.4.201": "pylibjpeg",  # HTJ2K Lossless Only
    "1.2.840.10008.1.2.4.202": "pylibjpeg",  # HTJ2K Lossless RPCL
}
"""Compressed transfer syntaxes that are lossless by definition, and the one decoder used for each."""

JPEG_EXTENDED = "1.2.840.10008.1.2.4.51"
RLE = "1.2.840.10008.1.2.5"
PIXELS_MAX = 64_000_000  # the largest detectors have 20 million pixels
LOW, HIGH = 0.5, 99.5  # percentiles mapped to 0 and 1: robust against markers and dead pixels
SPACING_MM_MAX = 10.0  # a radiograph with coarser pixels is a typing error

READING_ERRORS = (
    *(ValueError, AttributeError, RuntimeError, KeyError, IndexError, TypeError, EOFError, OSError, ArithmeticError),
    *(AssertionError, MemoryError, InvalidDicomError, BytesLengthException, struct.error, zlib.error),
)
"""What pydicom and its decoders raise on damaged files, found by damaging files; caught per file, never passed on."""


@dataclass(frozen=True)
class Radiograph:
    """One image in modality values with one polarity: bright is dense.

    `values` float32 (H, W), finite; `padding` bool (H, W), true where the device says there is no image; `spacing_mm` is
    (between rows, between columns) in the detector's or, where calibrated, the patient's plane.
    """

    values: npt.NDArray[np.float32]
    padding: npt.NDArray[np.bool_] | None
    spacing_mm: tuple[float, float] | None
    display: npt.NDArray[np.float32] | None = None
    """float32 (H, W) in 0..1, bright is dense: what the file says a screen should show, if that was asked for and it says so."""
    inverted: bool = False
    """Whether bright meant air in the file; it does not any more."""


_quiet: ContextVar[bool] = ContextVar("quiet", default=False)


@contextlib.contextmanager
def quiet_reading() -> Iterator[None]:
    """Nothing that pydicom or a decoder warns of or logs inside this block is shown: those texts quote patient data."""
    if _quiet.get():  # once is enough, and costs as much as reading a header
        yield
        return
    # Their modules log under these names; what reaches the top one ends there, in a handler that drops it.
    loggers = [logging.getLogger(name) for name in ("pydicom", "pylibjpeg", "openjpeg", "jpeg_ls", "nibabel")]
    before = [(logger, logger.handlers, logger.propagate) for logger in loggers]
    token = _quiet.set(True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.handlers, logger.propagate = [logging.NullHandler()], False
        try:
            yield
        finally:
            _quiet.reset(token)
            for logger, handlers, propagate in before:
                logger.handlers, logger.propagate = handlers, propagate


def decode(dataset: Dataset, *, display: bool = False) -> Radiograph:
    """The radiograph or slice in `dataset` in DICOM's value order, with its `display` if asked. Raises only ImageLeftOut.

    Reasons: no_pixels, colour, polarity_unknown, too_large, unsupported_syntax, jpeg_extended_12_bit, truncated,
    unreadable_pixels.
    """
    with quiet_reading():
        try:
            stored = stored_values(dataset)
            padding = _padding(dataset, stored)
            values = np.asarray(apply_modality_lut(stored, dataset), dtype=np.float32)
            spacing_mm = _spacing_mm(dataset)
            shown = _display(values, dataset) if display else None
        except READING_ERRORS:
            raise ImageLeftOut("unreadable_pixels") from None
    if not np.isfinite(values).all():
        raise ImageLeftOut("unreadable_pixels")
    inverted = _photometric(dataset) == "MONOCHROME1"
    if inverted:
        values = -values
        shown = None if shown is None else 1 - shown
    return Radiograph(values, padding, spacing_mm, shown, inverted)


def stored_values(dataset: Dataset) -> npt.NDArray[Any]:
    """Integers (H, W) as the device stored them: bits outside Bits Stored removed, sign kept. Raises ImageLeftOut."""
    syntax = transfer_syntax(dataset)
    if syntax not in NATIVE and syntax not in DECODERS:
        raise ImageLeftOut("jpeg_extended_12_bit" if syntax == JPEG_EXTENDED else "unsupported_syntax")
    if "PixelData" not in dataset:
        raise ImageLeftOut("truncated" if "Rows" in dataset else "no_pixels")
    if int(dataset.get("SamplesPerPixel") or 1) != 1:
        raise ImageLeftOut("colour")
    if _photometric(dataset) not in ("MONOCHROME1", "MONOCHROME2"):
        raise ImageLeftOut("polarity_unknown")
    rows, columns = int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0)
    if rows < 1 or columns < 1 or int(dataset.get("NumberOfFrames") or 1) != 1:
        raise ImageLeftOut("unreadable_pixels")
    if rows * columns > PIXELS_MAX:
        raise ImageLeftOut("too_large")
    if syntax in NATIVE and len(dataset.PixelData) * 8 < rows * columns * int(dataset.BitsAllocated):
        raise ImageLeftOut("truncated")
    # pydicom cuts to the lowest bits; where High Bit lies higher these are the wrong ones, so all are asked for and cut here.
    whole = {"bits_stored": int(dataset.BitsAllocated)} if syntax in NATIVE or syntax == RLE else {}
    try:
        stored = pixel_array(dataset, raw=True, decoding_plugin=DECODERS.get(syntax, ""), **whole)
    except READING_ERRORS:
        raise ImageLeftOut("unreadable_pixels") from None
    except BaseException as error:
        # A decoder written in Rust that fails a check of its own raises this, which is no Exception on purpose.
        if type(error).__name__ == "PanicException":
            raise ImageLeftOut("unreadable_pixels") from None
        raise
    if stored.shape != (rows, columns):
        raise ImageLeftOut("unreadable_pixels")
    return _significant_bits(stored, dataset) if whole else stored


def _photometric(dataset: Dataset) -> str:
    return str(dataset.get("PhotometricInterpretation") or "").strip()


def transfer_syntax(dataset: Dataset) -> str:
    """UID of the transfer syntax; files written without file meta information get the native one they were read with."""
    meta = getattr(dataset, "file_meta", None)
    syntax = str(meta.get("TransferSyntaxUID", "") or "") if meta is not None else ""
    if not syntax and meta is not None:
        implicit, little = dataset.original_encoding
        syntax = "1.2.840.10008.1.2" if implicit else "1.2.840.10008.1.2.1" if little else "1.2.840.10008.1.2.2"
        meta.TransferSyntaxUID = syntax
    return syntax


def _significant_bits(stored: npt.NDArray[Any], dataset: Dataset) -> npt.NDArray[Any]:
    """Old devices keep overlays in the unused bits of native pixels; only High Bit downwards, Bits Stored of them, is image."""
    allocated, bits = int(dataset.BitsAllocated), int(dataset.get("BitsStored") or dataset.BitsAllocated)
    if bits == allocated or allocated > 32:
        return stored
    shift = int(dataset.get("HighBit") or bits - 1) + 1 - bits
    if not 0 < bits <= allocated or not 0 <= shift <= allocated - bits:
        raise ImageLeftOut("unreadable_pixels")
    signed = int(dataset.get("PixelRepresentation") or 0) == 1
    if shift == 0 and not signed and stored.dtype.kind == "u":
        narrow: npt.NDArray[Any] = stored & stored.dtype.type(
            (1 << bits) - 1
        )  # nearly every file, as wide as it is stored
        return narrow
    plain = (stored.astype(np.int64) >> shift) & ((1 << bits) - 1)
    if signed:
        plain = np.where(plain >> (bits - 1), plain - (1 << bits), plain)
    return plain.astype(np.int32 if bits < 32 else np.int64)


def _padding(dataset: Dataset, stored: npt.NDArray[Any]) -> npt.NDArray[np.bool_] | None:
    """Where the stored value is Pixel Padding Value, or between it and Pixel Padding Range Limit (PS3.3 C.7.5.1.1.2)."""
    value = dataset.get("PixelPaddingValue")
    if value is None or isinstance(value, bytes):
        return None
    limit = dataset.get("PixelPaddingRangeLimit")
    ends = [int(value), int(value if limit is None or isinstance(limit, bytes) else limit)]
    padding: npt.NDArray[np.bool_] = (stored >= min(ends)) & (stored <= max(ends))
    return padding if bool(padding.any()) else None


def _spacing_mm(dataset: Dataset) -> tuple[float, float] | None:
    """(rows, columns) in mm: Pixel Spacing, else the detector's over the magnification, else the scanner's; else None."""
    for keyword in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        try:
            row, column = (float(part) for part in dataset.get(keyword) or ())
            factor = float(dataset.get("EstimatedRadiographicMagnificationFactor") or 1)
        except READING_ERRORS:
            continue
        if keyword == "ImagerPixelSpacing" and factor >= 1 and math.isfinite(factor):
            row, column = row / factor, column / factor
        if 0 < row < SPACING_MM_MAX and 0 < column < SPACING_MM_MAX:
            return row, column
    return None


def _display(values: npt.NDArray[np.float32], dataset: Dataset) -> npt.NDArray[np.float32] | None:
    """float32 (H, W) in 0..1: modality values through the first VOI LUT, else the first window (PS3.3 C.11.2.1); None without."""
    tables = dataset.get("VOILUTSequence")
    if tables:
        return _through_table(values, tables[0])
    centres, widths = (dataset.get(keyword) for keyword in ("WindowCenter", "WindowWidth"))
    if centres in (None, "") or widths in (None, ""):
        return None
    centre, width = (float(v[0] if isinstance(v, MultiValue | list) else v) for v in (centres, widths))
    return windowed(values, centre, width, str(dataset.get("VOILUTFunction") or "LINEAR").strip().upper())


def _through_table(values: npt.NDArray[np.float32], item: Dataset) -> npt.NDArray[np.float32]:
    """float32 of the same shape in 0..1: `values` through a VOI LUT (PS3.3 C.11.2.1.1), ends kept.

    Ours, because pydicom counts the places of an 8-bit table in 8 bits, and so reads all but 256 of them wrong.
    """
    entries, first, depth = (int(number) for number in item.LUTDescriptor)
    data = item.LUTData
    table = np.frombuffer(data, "<u2") if isinstance(data, bytes) else np.asarray(data, np.int64)
    entries = entries or 65536
    if not 0 < depth <= 16 or table.size < entries:
        raise ImageLeftOut("unreadable_pixels")
    places = np.clip(np.rint(values).astype(np.int64) - first, 0, entries - 1)
    found: npt.NDArray[np.float32] = (np.clip(table[places], 0, 2**depth - 1) / (2**depth - 1)).astype(np.float32)
    return found


def windowed(
    values: npt.NDArray[np.float32], centre: float, width: float, function: str
) -> npt.NDArray[np.float32] | None:
    """float32 of the same shape in 0..1 by PS3.3 C.11.2.1.2 and C.11.2.1.3; None for a window that it does not allow."""
    least = 1.0 if function == "LINEAR" else 0.0
    if not (math.isfinite(centre) and math.isfinite(width)) or width < least or (width == 0 and function != "LINEAR"):
        return None
    wide = values.astype(np.float64)
    if function == "SIGMOID":
        shown = 1 / (1 + np.exp(np.clip(-4 * (wide - centre) / width, -700, 700)))
    elif function == "LINEAR_EXACT":
        shown = (wide - centre) / width + 0.5
    elif function == "LINEAR":
        shown = (wide > centre - 0.5).astype(np.float64) if width == 1 else (wide - (centre - 0.5)) / (width - 1) + 0.5
    else:
        return None
    result: npt.NDArray[np.float32] = np.clip(shown, 0, 1).astype(np.float32)
    return result


@dataclass(frozen=True)
class Scaled:
    """float32 (H, W) in 0..1, and the modality values that percentiles take for 0 and 1: a device's signature."""

    pixels: npt.NDArray[np.float32]
    low: float
    high: float


def scaled(image: Radiograph) -> Scaled:
    """Percentile 0.5 of the image proper to 0, 99.5 to 1, or its `display`; padding black. Raises ImageLeftOut("blank")."""
    values, padding = image.values, image.padding
    proper = values if padding is None else values[~padding]
    if proper.size == 0:
        raise ImageLeftOut("blank")
    low, high = (float(v) for v in np.percentile(proper, [LOW, HIGH]))
    if not high > low:
        # Fewer than one pixel in two hundred differs: an empty exposure, or a test image of the device.
        raise ImageLeftOut("blank")
    if image.display is not None and float(np.ptp(image.display)) > 0:
        result = image.display.copy()
    else:
        result = np.clip((values - np.float32(low)) / np.float32(high - low), 0, 1)
    if padding is not None:
        result[padding] = 0
    return Scaled(result, low, high)
