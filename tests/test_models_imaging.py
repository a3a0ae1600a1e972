"""Pixels: bit-exact decoding, one polarity, percentile scaling and the grid, against oracles that do not use the code."""

import io
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)

from models.grids import reduced, to_grid
from models.imaging import Radiograph, decode, quiet_reading, scaled, stored_values, windowed
from privacy.errors import ImageLeftOut

SHARED = Path(__file__).parents[2] / "shared" / "data" / "dicom"
NOISE = np.random.default_rng(5).integers(0, 4096, (90, 70)).astype("<u2")


def radiograph(stored: npt.NDArray[Any] = NOISE, bits: int = 12, **header: Any) -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.Rows, dataset.Columns = stored.shape
    dataset.PhotometricInterpretation, dataset.SamplesPerPixel = "MONOCHROME2", 1
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = stored.dtype.itemsize * 8, bits, bits - 1
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    dataset.PixelData = stored.tobytes()
    for keyword, value in header.items():
        setattr(dataset, keyword, value)
    return dataset


@pytest.mark.skipif(not SHARED.is_dir(), reason="the NEMA test files are not here")
@pytest.mark.parametrize("syntax", ["RLE", "JPLL", "JLSL", "J2KR"])
def test_every_lossless_syntax_decodes_bit_identical_to_native(syntax: str) -> None:
    raw = pydicom.dcmread(SHARED / "wg04" / "CT1_UNC.dcm")
    expected = np.frombuffer(raw.PixelData, "<i2").reshape(raw.Rows, raw.Columns)
    found = stored_values(pydicom.dcmread(SHARED / "wg04" / f"CT1_{syntax}.dcm"))
    assert found.dtype.kind == "i"
    np.testing.assert_array_equal(found, expected)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the NEMA test files are not here")
@pytest.mark.parametrize("name", ["CT1_JLSN", "CT1_J2KI", "RG1_JLSN", "RG1_J2KI"])
def test_lossy_syntaxes_are_left_out_by_name(name: str) -> None:
    with pytest.raises(ImageLeftOut) as caught:
        decode(pydicom.dcmread(SHARED / "wg04" / f"{name}.dcm"))
    assert caught.value.reason == "unsupported_syntax"


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless])
def test_what_an_encoder_wrote_comes_back(syntax: str) -> None:
    dataset = radiograph()
    dataset.compress(syntax, generate_instance_uid=False)
    np.testing.assert_array_equal(stored_values(dataset), NOISE)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize("with_meta", [True, False])
def test_native_files_are_read_with_and_without_file_meta(syntax: str, with_meta: bool) -> None:
    big = syntax == ExplicitVRBigEndian
    dataset = radiograph(NOISE)
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    dataset.PixelData = NOISE.astype(">u2" if big else "<u2").tobytes()
    dataset["PixelData"].VR = "OW"
    buffer = io.BytesIO()
    if with_meta:
        pydicom.dcmwrite(buffer, dataset, enforce_file_format=False)
    else:
        del dataset.file_meta
        pydicom.dcmwrite(buffer, dataset, implicit_vr=syntax == ImplicitVRLittleEndian, little_endian=not big)
    buffer.seek(0)
    np.testing.assert_array_equal(stored_values(pydicom.dcmread(buffer, force=True)), NOISE)


def test_monochrome1_is_inverted_exactly_once() -> None:
    """The same picture written in both polarities gives the same result, whatever else the header says about it."""
    bright_corner = np.full((20, 20), 100, "<u2")
    bright_corner[:5, :5] = 4000
    plain = scaled(decode(radiograph(bright_corner))).pixels
    assert plain[0, 0] == 1 and plain[10, 10] == 0
    for extra in (
        {},
        {"PresentationLUTShape": "INVERSE"},
        {"PresentationLUTShape": "IDENTITY"},
        {"WindowCenter": 5, "WindowWidth": 1},
    ):
        inverted = radiograph((4095 - bright_corner).astype("<u2"), PhotometricInterpretation="MONOCHROME1", **extra)
        np.testing.assert_array_equal(scaled(decode(inverted)).pixels, plain)
        np.testing.assert_array_equal(scaled(decode(radiograph(bright_corner, **extra))).pixels, plain)


def test_noise_in_both_polarities_gives_the_same_picture() -> None:
    inverted = radiograph((4095 - NOISE).astype("<u2"), PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_allclose(scaled(decode(inverted)).pixels, scaled(decode(radiograph())).pixels, atol=1e-6)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the test file is not here")
def test_a_real_monochrome1_chest_has_bright_bones_and_dark_air() -> None:
    dataset = pydicom.dcmread(SHARED / "mono1_chest" / "gdcm-CR-MONO1-10-chest.dcm")
    assert dataset.PhotometricInterpretation == "MONOCHROME1"
    raw = np.frombuffer(dataset.PixelData, "<u2").reshape(dataset.Rows, dataset.Columns).astype(float)
    pixels = scaled(decode(dataset)).pixels
    assert np.corrcoef(pixels.ravel(), raw.ravel())[0, 1] < -0.9
    spine = pixels[150:300, 200:240].mean()
    assert spine > pixels[150:300, 80:150].mean() + 0.1  # the spine is brighter than the lung beside it


def test_rescale_and_modality_table_come_before_polarity() -> None:
    values = decode(radiograph(RescaleSlope=2, RescaleIntercept=-1000)).values
    np.testing.assert_array_equal(values, NOISE.astype(np.float32) * 2 - 1000)
    table = Dataset()
    table.LUTDescriptor, table.LUTData, table.ModalityLUTType = [4096, 0, 16], list(range(4096, 0, -1)), "US"
    table["LUTDescriptor"].VR = table["LUTData"].VR = "US"
    values = decode(radiograph(ModalityLUTSequence=[table], PhotometricInterpretation="MONOCHROME1")).values
    np.testing.assert_array_equal(values, -(4096 - NOISE.astype(np.float32)))


def test_signed_pixels_keep_their_sign_and_foreign_bits_are_removed() -> None:
    signed = (NOISE.astype(np.int32) - 2048).astype("<i2")
    np.testing.assert_array_equal(stored_values(radiograph(signed)), signed)
    with_overlay = (signed.view("<u2") & 0x0FFF | 0x6000).view("<i2")
    np.testing.assert_array_equal(stored_values(radiograph(with_overlay)), signed)
    np.testing.assert_array_equal(stored_values(radiograph((NOISE | 0x8000).astype("<u2"))), NOISE)
    shifted = radiograph((NOISE << 4).astype("<u2"), HighBit=15)
    np.testing.assert_array_equal(stored_values(shifted), NOISE)
    eight = (NOISE >> 4).astype("u1")
    np.testing.assert_array_equal(stored_values(radiograph(eight, bits=8)), eight)


@pytest.mark.parametrize("limit", [None, 2])
def test_padding_is_black_and_does_not_move_the_percentiles(limit: int | None) -> None:
    framed = np.zeros((110, 90), "<u2")
    framed[10:100, 10:80] = NOISE // 2 + 1000
    header = {"PixelPaddingValue": 0} | ({"PixelPaddingRangeLimit": limit} if limit is not None else {})
    for photometric in ("MONOCHROME1", "MONOCHROME2"):
        pixels = scaled(decode(radiograph(framed, PhotometricInterpretation=photometric, **header))).pixels
        alone = scaled(
            decode(radiograph((NOISE // 2 + 1000).astype("<u2"), PhotometricInterpretation=photometric))
        ).pixels
        np.testing.assert_array_equal(pixels[10:100, 10:80], alone)
        assert pixels[:10].max() == 0


def test_percentiles_are_those_of_numpy_and_clip_markers() -> None:
    values = np.arange(2000, dtype=np.float32).reshape(40, 50)
    values[0, 0] = 1e6
    low, high = np.percentile(values.astype(np.float64), [0.5, 99.5])
    expected = np.clip((values.astype(np.float64) - low) / (high - low), 0, 1)
    np.testing.assert_allclose(scaled(Radiograph(values, None, None)).pixels, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("header", "spacing"),
    [
        ({}, None),
        ({"PixelSpacing": [0.2, 0.3], "ImagerPixelSpacing": [1, 1]}, (0.2, 0.3)),
        ({"ImagerPixelSpacing": [0.2, 0.2], "EstimatedRadiographicMagnificationFactor": 1.25}, (0.16, 0.16)),
        ({"ImagerPixelSpacing": [0.2, 0.2], "EstimatedRadiographicMagnificationFactor": 0}, (0.2, 0.2)),
        ({"NominalScannedPixelSpacing": [0.1, 0.1]}, (0.1, 0.1)),
        ({"PixelSpacing": [0, 0], "ImagerPixelSpacing": [0.2, 0.2]}, (0.2, 0.2)),
        ({"PixelSpacing": [143, 143]}, None),
    ],
)
def test_spacing_is_the_patients_else_the_detectors(
    header: dict[str, Any], spacing: tuple[float, float] | None
) -> None:
    found = decode(radiograph(**header)).spacing_mm
    assert found == pytest.approx(spacing) if spacing else found is None


def broken(change: str) -> Dataset:
    dataset = radiograph()
    if change == "lossy":
        dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    elif change == "deleted":
        del dataset.PixelData
    elif change == "header":
        del dataset.PixelData, dataset.Rows
    elif change == "short":
        dataset.PixelData = dataset.PixelData[:-2]
    elif change == "codestream":
        dataset.compress(JPEGLSLossless, generate_instance_uid=False)
        dataset.PixelData = dataset.PixelData[:60] + b"\0" * (len(dataset.PixelData) - 60)
    elif change == "slope":
        dataset.RescaleSlope, dataset.RescaleIntercept = 0, 5
    elif change == "flat":
        dataset.PixelData = bytes(len(dataset.PixelData))
    else:
        keyword, _, value = change.partition("=")
        setattr(
            dataset,
            keyword,
            float(value) if keyword.startswith("Rescale") else value if not value.isdigit() else int(value),
        )
    return dataset


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("lossy", "unsupported_syntax"),
        ("deleted", "truncated"),
        ("header", "no_pixels"),
        ("short", "truncated"),
        ("codestream", "unreadable_pixels"),
        ("flat", "blank"),
        ("SamplesPerPixel=3", "colour"),
        ("PhotometricInterpretation=RGB", "polarity_unknown"),
        ("PhotometricInterpretation=", "polarity_unknown"),
        ("NumberOfFrames=2", "unreadable_pixels"),
        ("Rows=0", "unreadable_pixels"),
        ("Rows=65535", "truncated"),
        ("BitsStored=17", "unreadable_pixels"),
        ("HighBit=3", "unreadable_pixels"),
        ("BitsAllocated=12", "unreadable_pixels"),
        ("slope", "blank"),
    ],
)
def test_damage_has_a_name(change: str, reason: str) -> None:
    with pytest.raises(ImageLeftOut) as caught:
        scaled(decode(broken(change)))
    assert caught.value.reason == reason


def test_more_pixels_than_any_detector_are_refused_before_decoding() -> None:
    dataset = radiograph()
    dataset.Rows = dataset.Columns = 60_000
    with pytest.raises(ImageLeftOut, match="too_large"):
        decode(dataset)


@pytest.mark.parametrize("logger", ["pydicom", "pydicom.pixels.decoders.base", "openjpeg"])
def test_nothing_that_pydicom_says_is_shown(
    logger: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its warnings and log lines quote offending values; inside quiet_reading nobody sees them, afterwards all is as before."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with quiet_reading():
            warnings.warn("SMITH^JOHN", UserWarning, stacklevel=1)
            logging.getLogger(logger).warning("SMITH^JOHN")
    assert not seen and not caplog.records
    assert "SMITH" not in "".join(capfd.readouterr())
    logging.getLogger(logger).warning("audible again")
    assert [record.message for record in caplog.records] == ["audible again"]


def test_reducing_keeps_the_aspect_and_never_enlarges() -> None:
    wide = np.random.default_rng(1).random((100, 200), dtype=np.float32)
    assert reduced(wide, 200) is wide
    assert reduced(wide, 64).shape == (32, 64)
    assert reduced(np.ones((1, 500), np.float32), 64).shape == (1, 64)


def test_reduction_averages_like_another_librarys_filter() -> None:
    picture = np.random.default_rng(1).random((128, 128), dtype=np.float32)
    other = np.asarray(Image.fromarray(picture).resize((32, 32), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(reduced(picture, 32), other, atol=2e-3)
    assert abs(float(reduced(picture, 32).mean()) - float(picture.mean())) < 0.01


@pytest.mark.parametrize("shape", [(64, 64), (64, 32), (33, 64), (20, 10), (300, 200)])
def test_the_grid_is_square_centred_and_black_outside(shape: tuple[int, int]) -> None:
    grid = to_grid(np.ones(shape, np.float32), 64)
    assert grid.shape == (1, 64, 64) and grid.dtype == np.float32
    rows, columns = np.nonzero(grid[0] > 0.5)
    assert abs(rows.min() - (63 - rows.max())) <= 1 and abs(columns.min() - (63 - columns.max())) <= 1
    assert grid.mean() == pytest.approx(min(shape) / max(shape), abs=0.03)
    assert grid[0, 32, 32] == pytest.approx(1)


def display(function: str, centre: float, width: float) -> Any:
    values = np.linspace(-2000, 6000, 64 * 80).reshape(80, 64).astype(np.float32)
    return values, windowed(values, centre, width, function)


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize(("centre", "width"), [(2048, 4096), (600.5, 1200), (-100, 2.5), (40, 400)])
def test_windows_are_those_of_another_implementation(function: str, centre: float, width: float) -> None:
    from pydicom.pixels.processing import apply_windowing

    values, found = display(function, centre, width)
    dataset = Dataset()
    dataset.WindowCenter, dataset.WindowWidth, dataset.VOILUTFunction = centre, width, function
    dataset.BitsStored, dataset.PixelRepresentation, dataset.PhotometricInterpretation = 12, 0, "MONOCHROME2"
    other = apply_windowing(values.astype(np.float64), dataset) / 4095
    np.testing.assert_allclose(found, np.clip(other, 0, 1), atol=2e-4)


@pytest.mark.parametrize(
    ("function", "centre", "width"),
    [("LINEAR", 0, 0.5), ("LINEAR_EXACT", 0, 0), ("SIGMOID", 0, -1), ("CUBIC", 0, 10), ("LINEAR", float("nan"), 10)],
)
def test_a_window_that_the_standard_forbids_is_no_window(function: str, centre: float, width: float) -> None:
    assert display(function, centre, width)[1] is None


def test_the_display_comes_from_the_table_else_the_first_window_and_is_turned_once() -> None:
    for photometric in ("MONOCHROME1", "MONOCHROME2"):
        shown = {}
        for name, header in {
            "window": {"WindowCenter": [1000, 9], "WindowWidth": [500, 9]},
            "first": {"WindowCenter": 1000, "WindowWidth": 500},
            "none": {},
        }.items():
            dataset = radiograph(NOISE, PhotometricInterpretation=photometric, **header)
            shown[name] = decode(dataset, display=True).display
        assert shown["none"] is None
        np.testing.assert_array_equal(shown["window"], shown["first"])
        plain = np.clip((NOISE.astype(float) - 999.5) / 499 + 0.5, 0, 1)
        expected = 1 - plain if photometric == "MONOCHROME1" else plain
        np.testing.assert_allclose(shown["first"], expected, atol=1e-6)
        assert scaled(decode(dataset)).pixels.mean() != pytest.approx(float(shown["first"].mean()))


def test_a_voi_table_is_followed_to_its_own_depth() -> None:
    table = Dataset()
    table.LUTDescriptor, table.LUTData = [4096, 0, 8], [255 - n // 16 for n in range(4096)]
    table["LUTData"].VR = "US"
    table["LUTDescriptor"].VR = "US"
    values = (NOISE % 4096).astype("<u2")
    dataset = radiograph(values, VOILUTSequence=[table], WindowCenter=1, WindowWidth=1, PixelRepresentation=0)
    found = decode(dataset, display=True).display
    assert found is not None
    np.testing.assert_allclose(found, (255 - values // 16) / 255, atol=1e-6)


def test_jpeg_with_12_bits_is_refused_by_its_own_name() -> None:
    dataset = radiograph(NOISE)
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.51"
    with pytest.raises(ImageLeftOut) as caught:
        decode(dataset)
    assert caught.value.reason == "jpeg_extended_12_bit"
