"""Ten thousand mutated images go through the reading processes: each is taken or left out by name, none crashes or hangs."""

import io
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)
from test_client_ingest import encoded, radiograph

from fl_client.cache import Cache
from fl_client.headers import Caption
from fl_client.phantom_ct import SCANNERS, series
from fl_client.readers import Answer, Look, Radiograph, Readers, Reading, SlicesOfVolume, VolumeFile
from fl_client.sources import Item

QUICK, ALL = 600, 10_000


def _bases() -> list[tuple[str, bytes]]:
    """(kind, bytes) of small images of every kind that is read."""
    made = []
    for syntax in (ExplicitVRLittleEndian, RLELossless, JPEG2000Lossless, JPEGLSLossless):
        dataset = radiograph(3, ImagerPixelSpacing=[0.2, 0.2], WindowCenter=2000, WindowWidth=4000, PatientAge="063Y")
        code = Dataset()
        code.CodeValue, code.CodeMeaning = "R-10206", "postero-anterior"
        dataset.ViewCodeSequence = [code]
        if syntax != ExplicitVRLittleEndian:
            dataset.compress(syntax, generate_instance_uid=False)
        made.append(("dicom", encoded(dataset)))
    made.append(("dicom", _with_table()))
    made.append(("dicom", _deflated()))
    scans = [series("one", scanner, np.random.default_rng(1), opaque=True)[0] for scanner in SCANNERS]
    made += [("slice", encoded(dataset)) for dataset in scans]
    for form in ("PNG", "JPEG"):
        buffer = io.BytesIO()
        Image.fromarray(np.random.default_rng(2).integers(0, 255, (60, 50)).astype(np.uint8)).save(buffer, form)
        made.append(("pictures", buffer.getvalue()))
    volume = nibabel.Nifti1Image(
        np.random.default_rng(3).integers(-1000, 500, (12, 12, 12)).astype(np.int16), np.eye(4)
    )
    made.append(("nifti", volume.to_bytes()))
    made.append(("nifti", _gzipped(volume.to_bytes())))
    return made


def _with_table() -> bytes:
    table = Dataset()
    table.LUTDescriptor, table.LUTData = [256, 0, 16], list(range(256))
    table["LUTData"].VR = table["LUTDescriptor"].VR = "US"
    return encoded(radiograph(4, VOILUTSequence=[table], PixelPaddingValue=0))


def _deflated() -> bytes:
    dataset = radiograph(5)
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    return encoded(dataset)


def _gzipped(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=31)
    return packer.compress(data) + packer.flush()


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """Flipped, cut, doubled, moved, or with a field of a few bytes set to an extreme; mostly in what comes before the pixels."""
    found = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        reach = len(found) if rng.random() < 0.4 else min(len(found), 1200)
        at = int(rng.integers(reach)) if reach else 0
        match int(rng.integers(6)):
            case 0:
                found[at : at + 1] = bytes([int(rng.integers(256))])
            case 1:
                end = len(found) if rng.random() < 0.3 else at + int(rng.integers(1, 64))
                del found[at:end]
            case 2:
                found[at:at] = found[at : at + int(rng.integers(1, 256))]
            case 3:
                extremes = (b"\xff\xff\xff\xff", b"\x00\x00\x00\x80", b"\xff\x7f", b"\x00\x00", b"\xff\xff\x00\x00")
                found[at : at + 4] = extremes[int(rng.integers(5))]
            case 4:
                found[at:at] = rng.bytes(int(rng.integers(1, 32)))
            case _:
                other = int(rng.integers(max(1, len(found))))
                found[at : at + 16], found[other : other + 16] = found[other : other + 16], found[at : at + 16]
    return bytes(found)


@dataclass(frozen=True)
class _Memory(Item):
    """An item whose bytes are here."""

    data: bytes = b""

    def read(self) -> bytes:
        return self.data


@dataclass(frozen=True)
class Through:
    """One mutated file on its whole way, as `ingest` sends it."""

    kind: str
    data: bytes
    cache: Path
    seconds: float = 30.0
    light: bool = False

    def run(self) -> Answer:
        item = _Memory("x", Path("x"), len(self.data), data=self.data)
        form = "dicom" if self.kind == "slice" else self.kind
        caption = None if form == "dicom" else Caption("p", None)
        seen = Look(item, form, caption).run()
        if "reason" in seen:
            return seen
        cache = Cache(self.cache)
        if form == "nifti":
            return VolumeFile(item, seen["sha256"], cache, "n").run()
        header = seen["header"]
        if header["plane"]:
            rows, columns = header["size"]
            return SlicesOfVolume([item] * 2, [seen["sha256"]] * 2, cache, "s", (rows, columns)).run()
        return Radiograph(item, seen["sha256"], cache, "r", 512, Reading(True, form == "pictures")).run()


def tasks(count: int, cache: Path) -> Iterator[tuple[int, Through]]:
    bases = _bases()
    for number in range(count):
        kind, data = bases[number % len(bases)]
        yield number, Through(kind, mutated(data, np.random.default_rng(number)), cache)


def through(count: int, cache: Path) -> Counter[str]:
    (cache / "keys").mkdir()
    with Readers(2, cache) as pool:
        return Counter(found.get("reason", "taken") for _, found in pool.run(tasks(count, cache)))


@pytest.mark.parametrize("count", [QUICK, pytest.param(ALL, marks=pytest.mark.slow)])
def test_no_mutated_image_stops_the_run(count: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = through(count, tmp_path)
    assert found.total() == count
    # A JPEG 2000 header may ask its decoder for more memory than a reading process has; that costs the process, and no more.
    assert found["decoder_failed"] <= count / 2000
    # The mutations reach every stage: some are taken still, and many different things are wrong with the others.
    assert found["taken"] > count / 20 and len(found) > 8
    out, err = capfd.readouterr()
    assert out == err == ""


def test_every_base_is_taken_as_it_is(tmp_path: Path) -> None:
    answers = [Through(kind, data, tmp_path).run() for kind, data in _bases()]
    assert all("reason" not in answer for answer in answers)
