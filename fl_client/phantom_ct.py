"""A synthetic hospital of chest CT: series of invented chests as scanners write them, and what else lies in such folders.

`make_ct_hospital` gives the same bytes for the same name, patients and seed. Bodies are ellipsoids in Hounsfield units; a patient
with the target has ground glass in the lungs. Scanners differ in slice distance, pixel size, rescale, padding, compression, the
direction in which they number slices, and the tilt of the gantry; what is learned must not.

Patients, names and numbers are invented; nothing here is derived from an image of a person.
"""

import copy
import csv
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, JPEGLSLossless, RLELossless, generate_uid

from fl_client.phantom import write_mask

Volume = npt.NDArray[np.floating[Any]]

POSITIVE_SHARE = 0.45
AIR, LUNG, FAT, TISSUE, BONE, GLASS = (
    -1000.0,
    -850.0,
    -90.0,
    40.0,
    500.0,
    420.0,
)  # Hounsfield units; GLASS is added to lung
LONG_MM = 260.0  # of the body that is scanned, from the diaphragm upwards
SIDE = 64


@dataclass(frozen=True)
class Scanner:
    """How one hospital's scanner makes and writes series."""

    manufacturer: str
    gap_mm: float
    pixel_mm: float
    intercept: int
    padding: int | None
    syntax: str
    upwards: bool
    tilt_degrees: float
    noise: float


SCANNERS = (
    Scanner("Aurora Imaging", 10.0, 6.0, -1024, -2000, ExplicitVRLittleEndian, False, 0.0, 15),
    Scanner("Boreal Medical", 8.0, 5.6, 0, None, JPEGLSLossless, True, 0.0, 25),
    Scanner("Cirrus X-Ray", 12.0, 6.2, -1024, None, RLELossless, True, 12.0, 20),
)


def make_ct_hospital(
    folder: Path, name: str, patients: int, seed: int, scanner: Scanner, *, outlined: bool = False
) -> dict[str, Any]:
    """Write `folder`/dicom and `folder`/labels.csv; the label map for site.yaml, with target "opacity" and an absolute path.

    `outlined`: also `folder`/masks, a NIfTI file for each series (`phantom.STRUCTURES`); bodies then lie elsewhere in the
    scanner, and their lungs differ in size and proportions, so that no fixed mask fits them.
    """
    digest = hashlib.sha256(f"ct\n{name}\n{seed}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    rows = []
    for number in range(patients):
        opaque = bool(rng.random() < POSITIVE_SHARE)
        place = f"{name}-{seed}-{number}"
        body = _Body.of(rng, opaque=opaque)
        if outlined:
            body = body.elsewhere(rng)
        slices = _scanned(place, scanner, rng, body)
        if outlined:
            uid = slices[0].SeriesInstanceUID
            write_mask(folder / "masks" / f"{uid}.nii", *regions(scanner, body))
        path = folder / "dicom" / f"CT{number:04d}"
        path.mkdir(parents=True, exist_ok=True)
        if number == 0:
            slices.append(_localizer(slices[0]))
        for count, dataset in enumerate(slices):
            dataset.save_as(path / f"IM{count:04d}", enforce_file_format=True)
        rows.append((str(slices[0].StudyInstanceUID), "yes" if opaque else "no"))
    table = folder / "labels.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("StudyInstanceUID", "ground glass"), *rows])
    return {
        "table": str(table.resolve()),
        "key": "StudyInstanceUID",
        "matches": "study_uid",
        "targets": {"opacity": {"column": "ground glass", "words": {"yes": 1, "no": 0}}},
    }


def _planes(scanner: Scanner) -> Iterator[tuple[Volume, Volume, tuple[Volume, Volume, Volume]]]:
    """Of each slice from the lowest: its first pixel, the direction of a column, and x, y, z of all its pixels in mm."""
    tilt = math.radians(scanner.tilt_degrees)
    column = np.array([0.0, math.cos(tilt), -math.sin(tilt)])
    across = (np.arange(SIDE) - (SIDE - 1) / 2) * scanner.pixel_mm
    for number in range(int(LONG_MM / scanner.gap_mm)):
        middle = np.array([0.0, 0.0, number * scanner.gap_mm])
        corner = middle + np.array([across[0], 0.0, 0.0]) + column * across[0]
        x = np.broadcast_to(across[None, :], (SIDE, SIDE))
        along = across[:, None] * np.ones(SIDE)
        yield corner, column, (x, along * column[1], middle[2] + along * column[2])


def regions(scanner: Scanner, body: "_Body") -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float64]]:
    """uint8 (columns, rows, slices) by `phantom.STRUCTURES`, and the affine of a NIfTI file that puts it on the series."""
    planes = list(_planes(scanner))
    found = np.stack([body.regions(*at).T for _, _, at in planes], axis=2)
    corner, column, _ = planes[0]
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = [scanner.pixel_mm, 0, 0], column * scanner.pixel_mm
    affine[:3, 2], affine[:3, 3] = [0, 0, scanner.gap_mm], corner
    affine[:2] *= -1  # NIfTI counts to the right and to the front
    return found, affine


def series(place: str, scanner: Scanner, rng: np.random.Generator, *, opaque: bool) -> list[Dataset]:
    """The slices of one patient, in the order in which the scanner numbers them."""
    return _scanned(place, scanner, rng, _Body.of(rng, opaque=opaque))


def _scanned(place: str, scanner: Scanner, rng: np.random.Generator, body: "_Body") -> list[Dataset]:
    made, count = [], int(LONG_MM / scanner.gap_mm)
    for number, (corner, column, at) in enumerate(_planes(scanner)):
        hounsfield = body.hounsfield(*at)
        hounsfield += rng.normal(0, scanner.noise, hounsfield.shape)
        dataset = _dataset(place, scanner, body)
        dataset.InstanceNumber = number + 1 if scanner.upwards else count - number
        dataset.ImagePositionPatient = [round(float(value), 4) for value in corner]
        dataset.ImageOrientationPatient = [1, 0, 0, *(round(float(value), 7) for value in column)]
        dataset.SOPInstanceUID = str(generate_uid(entropy_srcs=["isocenter-phantom-ct", place, str(number)]))
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        _set_pixels(dataset, hounsfield, scanner)
        made.append(dataset)
    return made if scanner.upwards else made[::-1]


@dataclass(frozen=True)
class _Body:
    """One invented chest: half axes in mm, and where ground glass lies."""

    wide: float
    deep: float
    lungs: float
    glass: list[tuple[float, float, float, float]]
    sex: str
    age: int
    moved: tuple[float, float, float] = (0.0, 0.0, 0.0)  # mm to the left, to the back and up
    tall: float = 1.0  # of the lungs, beside other lungs

    def elsewhere(self, rng: np.random.Generator) -> "_Body":
        """The same person smaller, with other lungs, and lying elsewhere in the scanner."""
        size, lungs = rng.uniform(0.7, 0.95), self.lungs * rng.uniform(0.7, 1.0)
        aside = (rng.uniform(-40, 40), rng.uniform(-40, 40), rng.uniform(-45, 45))
        wide, deep, tall = self.wide * size, self.deep * size, rng.uniform(0.55, 0.95)
        return replace(self, wide=wide, deep=deep, lungs=lungs * size, tall=tall, moved=aside)

    @classmethod
    def of(cls, rng: np.random.Generator, *, opaque: bool) -> "_Body":
        glass = [
            (
                float(rng.choice([-1, 1])) * rng.uniform(50, 85),
                rng.uniform(-20, 40),
                rng.uniform(60, 190),
                rng.uniform(22, 38),
            )
            for _ in range(int(rng.integers(2, 5)) if opaque else 0)
        ]
        wide, deep, lungs = rng.uniform(150, 175), rng.uniform(95, 118), rng.uniform(0.85, 1.0)
        return cls(wide, deep, lungs, glass, "FM"[int(rng.integers(2))], int(rng.integers(25, 88)))

    def hounsfield(self, x: Volume, y: Volume, z: Volume) -> Volume:
        """Density at millimetres to the left, to the back and up."""
        return self._look(x, y, z)[0]

    def regions(self, x: Volume, y: Volume, z: Volume) -> npt.NDArray[np.uint8]:
        """1 in a lung, 2 where there is ground glass in it, 0 elsewhere (`phantom.STRUCTURES`)."""
        return self._look(x, y, z)[1]

    def _look(self, x: Volume, y: Volume, z: Volume) -> tuple[Volume, npt.NDArray[np.uint8]]:
        x, y, z = (at - off for at, off in zip((x, y, z), self.moved, strict=True))
        outline = (x / self.wide) ** 2 + (y / self.deep) ** 2
        found = np.where(outline < 1, np.where(outline > 0.82, FAT, TISSUE), AIR)
        tall = np.clip(1 - ((z - 120) / (150 * self.tall)) ** 2, 0, 1)
        for side in (-1, 1):
            lung = ((x - side * 68) / (50 * self.lungs)) ** 2 + (y / (75 * self.lungs)) ** 2
            found = np.where(lung < tall, LUNG, found)
        regions = (found == LUNG).astype(np.uint8)
        for left, back, up, radius in self.glass:
            near = ((x - left) ** 2 + (y - back) ** 2 + (z - up) ** 2) / radius**2
            found = np.where(found == LUNG, found + GLASS * np.clip(1.3 - near, 0, 1), found)
            regions[(regions > 0) & (near < 1)] = 2
        spine = (x / 16) ** 2 + ((y - self.deep * 0.62) / 16) ** 2
        regions[spine < 1] = 0
        result: Volume = np.where(spine < 1, BONE, found)
        return result, regions


def _dataset(place: str, scanner: Scanner, body: _Body) -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = CTImageStorage
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    code = hashlib.sha256(place.encode()).hexdigest()[:8].upper()
    dataset.PatientID, dataset.PatientName = f"PHANTOM-{code}", f"PHANTOM^{code}"
    dataset.PatientSex, dataset.PatientAge = body.sex, f"{body.age:03d}Y"
    for keyword, what in (
        ("StudyInstanceUID", "study"),
        ("SeriesInstanceUID", "series"),
        ("FrameOfReferenceUID", "frame"),
    ):
        setattr(dataset, keyword, str(generate_uid(entropy_srcs=["isocenter-phantom-ct", place, what])))
    dataset.AccessionNumber = f"C{code}"
    dataset.Modality, dataset.Manufacturer, dataset.ImageType = (
        "CT",
        scanner.manufacturer,
        ["ORIGINAL", "PRIMARY", "AXIAL"],
    )
    dataset.StudyDate, dataset.StudyDescription = "20220415", "CT CHEST WO"
    dataset.PixelSpacing = [scanner.pixel_mm, scanner.pixel_mm]
    dataset.SliceThickness = scanner.gap_mm
    dataset.GantryDetectorTilt = scanner.tilt_degrees
    return dataset


def _set_pixels(dataset: Dataset, hounsfield: Volume, scanner: Scanner) -> None:
    """Stored values as this scanner writes them; what lies outside its round field of view is padding, if it uses any."""
    stored = np.rint(hounsfield - scanner.intercept)
    if scanner.padding is not None:
        line = np.linspace(-1, 1, SIDE)
        outside = np.hypot(line[None, :], line[:, None]) > 1
        stored[outside] = scanner.padding - scanner.intercept
        dataset.PixelPaddingValue = scanner.padding - scanner.intercept
    dataset.PhotometricInterpretation, dataset.SamplesPerPixel, dataset.PixelRepresentation = "MONOCHROME2", 1, 1
    dataset.Rows = dataset.Columns = SIDE
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = 1, scanner.intercept, "HU"
    dataset.PixelData = stored.astype("<i2").tobytes()
    dataset["PixelData"].VR = "OW"
    if scanner.syntax != ExplicitVRLittleEndian:
        dataset.compress(scanner.syntax, generate_instance_uid=False)


def _localizer(first: Dataset) -> Dataset:
    """The overview image that a CT is planned on, filed in the same series, as scanners do."""
    made = copy.deepcopy(first)
    made.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    made.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]
    made.SOPInstanceUID = str(
        generate_uid(entropy_srcs=["isocenter-phantom-ct", str(first.SOPInstanceUID), "localizer"])
    )
    made.file_meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID
    return made
