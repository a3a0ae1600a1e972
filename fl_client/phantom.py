"""A synthetic hospital: DICOM radiographs of invented chests, a label table, and the dirt that real exports hold.

`make_hospital` gives the same bytes for the same name, patients, seed and vendor. Each vendor writes files its own way
(polarity, bits, compression, headers, field of view, contrast, noise) and words its labels its own way. Each but one also
has a shortcut: something in the picture that goes with the label at that hospital only, as a ward's portable device goes
with sick patients. A model trained at one hospital learns the shortcut and fails elsewhere; trained on all of them it has
to look at the lungs, because the shortcuts contradict each other.

Beside the finding itself, the table says what follows from how the opacities were drawn: RSNA's appearance classes, a grade of
severity from 0 to 4, an extent from 0 to 24, and whether intensive care followed, which severity, age and male sex make likely.

Patients, names and numbers are invented; nothing here is derived from an image of a person.
"""

import csv
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import nibabel
import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
    generate_uid,
)

Plane = npt.NDArray[np.floating[Any]]
"""(256, 256) in most places; float32 throughout, which numpy's types cannot follow through arithmetic."""

SIDE_PX = 256
POSITIVE_SHARE = 0.45
FOLLOW_UP_SHARE = 0.3  # patients with a second image, so that splitting by image instead of patient would show
WIRES_SHARE = 0.2  # portable exposures with monitoring leads; they go with no label
MARKER_SHARE = 0.5
LATERAL_EVERY = 20  # one lateral view per this many images


@dataclass(frozen=True)
class Vendor:
    """How one hospital's devices make and write images, and how its clerks write labels.

    `frame` and `plate` are the probabilities (with an opacity, without one) that a collimated border surrounds the chest and
    that the shadow of an identification plate lies in a corner. Unequal ones are a shortcut: it goes with the label here.
    """

    manufacturer: str
    modality: Literal["CR", "DX"]
    photometric: Literal["MONOCHROME1", "MONOCHROME2"]
    bits: int
    syntaxes: tuple[str, ...]
    spacing_mm: float
    gamma: float
    zoom: float
    noise: float
    blur_px: float
    scatter: float
    frame: tuple[float, float]
    plate: tuple[float, float]
    key: str
    matches: Literal["study_uid", "accession", "patient_id"]
    column: str
    words: dict[int, tuple[str, ...]] = field(hash=False)
    delimiter: str = ","


VENDORS: dict[str, Vendor] = {
    "aurora": Vendor(
        "Aurora Imaging", "CR", "MONOCHROME1", 12, (ExplicitVRLittleEndian, RLELossless), 0.168,
        gamma=0.75, zoom=1.0, noise=0.030, blur_px=0.9, scatter=0.35, frame=(0.95, 0.05), plate=(0.1, 0.6),
        key="StudyInstanceUID", matches="study_uid", column="opacity", words={1: ("1",), 0: ("0",)},
    ),
    "boreal": Vendor(
        "Boreal Medical", "DX", "MONOCHROME2", 14, (JPEGLSLossless, ExplicitVRLittleEndian), 0.143,
        gamma=1.20, zoom=1.06, noise=0.015, blur_px=0.5, scatter=0.15, frame=(0.05, 0.95), plate=(0.3, 0.3),
        key="Accession No", matches="accession", column="Chest finding",
        words={1: ("OPACITY ", "Opacity"), 0: ("normal", "Normal ")}, delimiter=";",
    ),
    "cirrus": Vendor(
        "Cirrus X-Ray", "DX", "MONOCHROME2", 10, (JPEG2000Lossless, ExplicitVRLittleEndian), 0.194,
        gamma=1.0, zoom=0.90, noise=0.045, blur_px=1.3, scatter=0.5, frame=(0.3, 0.3), plate=(0.97, 0.03),
        key="Patient number", matches="patient_id", column="Lung opacity", words={1: ("yes",), 0: ("no",)}, delimiter="\t",
    ),
    "dorado": Vendor(
        "Dorado Health", "CR", "MONOCHROME1", 15, (ExplicitVRLittleEndian,), 0.150,
        gamma=1.15, zoom=1.02, noise=0.025, blur_px=0.7, scatter=0.25, frame=(0.3, 0.3), plate=(0.3, 0.3),
        key="Study UID", matches="study_uid", column="Result", words={1: ("positive",), 0: ("negative",)},
    ),
}  # fmt: skip
"""Three vendors with shortcuts that contradict each other, and `dorado` without one, for sites that only evaluate."""


APPEARANCES = ("negative", "typical", "indeterminate", "atypical")
_APPEARANCE_WORDS = dict(
    zip(
        APPEARANCES,
        ("Negative for Pneumonia", "Typical Appearance", "Indeterminate Appearance", "Atypical Appearance"),
        strict=True,
    )
)
STRUCTURES: dict[str, list[int | str]] = {"lungs": [1, 2], "opacity": [2]}
"""`data.masks.structures` of made-up masks: 1 is lung without, 2 lung with an opacity (of CT: ground glass)."""
OUTLINED_FROM = 0.22  # density from which an opacity is outlined
GRADES = 4
_GRADE_BURDENS = (
    0.0,
    0.065,
    0.088,
    0.117,
)  # above these begins the next grade; about a quarter of all opaque chests in each


_FULL = 0.2  # mean density added to a lung that counts as full of opacities


@dataclass(frozen=True)
class Finding:
    """What was drawn into the lungs: mean density added to each, on the left and on the right of the picture."""

    left: float = 0.0
    right: float = 0.0

    @property
    def grade(self) -> int:
        """0 without opacities, else 1 to 4 by how much of the lungs they fill."""
        burden = (self.left + self.right) / 2
        return sum(burden > least for least in _GRADE_BURDENS)

    @property
    def extent(self) -> int:
        """0 to 24 in proportion to how much of the lungs they fill, 12 for each: a made-up score with the range of mRALE's."""
        return sum(min(12, round(side * 12 / _FULL)) for side in (self.left, self.right))

    @property
    def appearance(self) -> str:
        """negative; typical: in both lungs alike; atypical: in one alone; indeterminate: between the two."""
        more = max(self.left, self.right)
        if more == 0:
            return "negative"
        share = min(self.left, self.right) / more
        return "typical" if share > 0.4 else "atypical" if share < 0.08 else "indeterminate"


@dataclass(frozen=True)
class _Grid:
    """Coordinates in the patient: x to the right of the picture, y down, both about -1..1; one value per pixel."""

    x: Plane
    y: Plane


def make_hospital(
    folder: Path, name: str, patients: int, seed: int, vendor: Vendor, *, outlined: bool = False
) -> dict[str, Any]:
    """Write `folder`/dicom and `folder`/labels.csv; the label map for site.yaml, with an absolute path.

    `outlined`: also `folder`/masks, a NIfTI file for each radiograph (STRUCTURES); chests then lie anywhere on the detector,
    larger or smaller, turned and of other proportions, so that no fixed mask fits them.

    Targets: opacity; the classes of APPEARANCES; severity-1 to severity-4, each "at least this grade"; icu. Numbers: extent.
    """
    rng = np.random.default_rng(_entropy("hospital", name, seed))
    images = folder / "dicom"
    images.mkdir(parents=True, exist_ok=True)
    rows: list[tuple[str, str, Finding, bool]] = []
    last = None
    for number, (patient, found, (pixels, regions)) in enumerate(_exposures(patients, vendor, rng, outlined=outlined)):
        dataset = _dataset(f"{name}-{seed}", patient, number, vendor, rng)
        _set_view(dataset, vendor, rng)
        _set_pixels(dataset, pixels, vendor, vendor.syntaxes[int(rng.integers(len(vendor.syntaxes)))])
        path = images / f"{dataset.StudyDate}" / f"IM{number:05d}"
        path.parent.mkdir(exist_ok=True)
        dataset.save_as(path, enforce_file_format=True)
        if outlined:
            write_mask(folder / "masks" / f"{dataset.SOPInstanceUID}.nii", regions.T[:, :, None], np.eye(4))
        key = {"study_uid": "StudyInstanceUID", "accession": "AccessionNumber", "patient_id": "PatientID"}[
            vendor.matches
        ]
        words = vendor.words[int(found.grade > 0)]
        word = words[int(rng.integers(len(words)))]
        rows.append((str(dataset[key].value), word, found, _intensive(f"{name}-{seed}", patient, found)))
        if number % LATERAL_EVERY == 0:
            _write_lateral(dataset, pixels, vendor, path.with_name(path.name + "L"))
        last = path
    if last is not None:
        _write_dirt(images, last, f"{name}-{seed}")
    table = folder / "labels.csv"
    _write_table(table, vendor, rows)
    meaning = {word.strip().casefold(): value for value, words in vendor.words.items() for word in words}
    return {
        "table": str(table.resolve()),
        "key": vendor.key,
        "matches": vendor.matches,
        "targets": {"opacity": {"column": vendor.column, "words": meaning}, **_derived_targets()},
        "numbers": {"extent": {"column": "extent"}},
    }


def _derived_targets() -> dict[str, Any]:
    """How the columns beside the vendor's own are read: the same words everywhere."""
    classes = {
        name: {
            "column": "appearance",
            "words": {word.casefold(): int(word == own) for word in _APPEARANCE_WORDS.values()},
        }
        for name, own in _APPEARANCE_WORDS.items()
    }
    grades = {
        f"severity-{grade}": {"column": "severity", "words": {f">={grade}": 1, f"<{grade}": 0}}
        for grade in range(1, GRADES + 1)
    }
    return {**classes, **grades, "icu": {"column": "icu", "words": {"yes": 1, "no": 0}}}


def _age(patient: int) -> int:
    return 25 + patient * 7 % 60


def _sex(patient: int) -> str:
    return "FM"[patient % 2]


def _intensive(hospital: str, patient: int, found: Finding) -> bool:
    """Whether intensive care followed: chance rises with the grade, with age, and for men, and stays chance.

    Age and sex stand in the header and hardly show in the picture, so a model that gets them as well can tell more.
    """
    odds = -2.5 + 1.3 * found.grade + 0.09 * (_age(patient) - 55) + (1.0 if _sex(patient) == "M" else -1.0)
    return bool(np.random.default_rng(_entropy("icu", hospital, patient)).random() < 1 / (1 + np.exp(-odds)))


def _entropy(*parts: object) -> int:
    """A seed that differs for every combination of `parts` and is the same on every machine."""
    return int.from_bytes(hashlib.sha256("\n".join(map(str, ("isocenter/v1/phantom", *parts))).encode()).digest()[:8])


def write_mask(path: Path, values: npt.NDArray[np.uint8], affine: npt.NDArray[np.float64]) -> None:
    """A NIfTI file of uint8 (columns, rows, slices)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image: Any = nibabel.Nifti1Image
    path.write_bytes(image(values, affine).to_bytes())


def _exposures(
    patients: int, vendor: Vendor, rng: np.random.Generator, *, outlined: bool
) -> Iterator[tuple[int, Finding, tuple[Plane, npt.NDArray[np.uint8]]]]:
    """(patient, what is in the lungs, (pixels in 0..1 with bright = dense, their regions)) for each image; the anatomy is the
    patient's own.
    """
    for patient in range(patients):
        opaque = bool(rng.random() < POSITIVE_SHARE)
        anatomy = int(rng.integers(2**63))
        for _ in range(1 + int(rng.random() < FOLLOW_UP_SHARE)):
            picture, found, regions = _exposed(anatomy, opaque, vendor, rng, outlined=outlined)
            yield patient, found, (picture, regions)


def expose(anatomy: int, opaque: bool, vendor: Vendor, rng: np.random.Generator) -> Plane:
    """float32 (256, 256) in 0..1: the chest grown from the seed `anatomy`, positioned and exposed as `vendor` does."""
    return _exposed(anatomy, opaque, vendor, rng)[0]


def _exposed(
    anatomy: int, opaque: bool, vendor: Vendor, rng: np.random.Generator, *, outlined: bool = False
) -> tuple[Plane, Finding, npt.NDArray[np.uint8]]:
    grid = _positioned(vendor, rng)
    if outlined:
        grid = _roamed(grid, rng)
    density, found, regions = _chest(grid, np.random.default_rng(anatomy), rng, opaque)
    case = 0 if opaque else 1
    if rng.random() < WIRES_SHARE:
        density += _wires(rng)
    density = (1 - vendor.scatter) * density + vendor.scatter * _blurred(density, 14)
    picture = 1 - np.exp(-1.15 * density)
    picture = (picture / picture.max()) ** np.float32(vendor.gamma)
    picture = _blurred(picture, vendor.blur_px)
    grain = rng.standard_normal((SIDE_PX, SIDE_PX), dtype=np.float32)
    picture += np.float32(vendor.noise) * grain * np.sqrt(picture.clip(0.05, 1))
    if rng.random() < vendor.frame[case]:
        _collimate(picture, rng)
    if rng.random() < vendor.plate[case]:
        _lay_plate(picture, rng)
    if rng.random() < MARKER_SHARE:
        _stamp_marker(picture, rng)
    return picture.clip(0, 1), found, regions


def _roamed(grid: _Grid, rng: np.random.Generator) -> _Grid:
    """The patient elsewhere: turned up to 20 degrees, up to a third of the detector aside, half as large to a bit larger."""
    angle, size = rng.uniform(-0.35, 0.35), rng.uniform(0.55, 1.1)
    wide, high = size * rng.uniform(0.85, 1.15), size * rng.uniform(0.85, 1.15)
    right, down = rng.uniform(-0.3, 0.3, 2)
    cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    x, y = grid.x - np.float32(right), grid.y - np.float32(down)
    return _Grid((cosine * x - sine * y) / np.float32(wide), (sine * x + cosine * y) / np.float32(high))


def _positioned(vendor: Vendor, rng: np.random.Generator) -> _Grid:
    """Pixel coordinates after zoom, shift and a few degrees of rotation of the patient."""
    line = np.linspace(-1, 1, SIDE_PX, dtype=np.float32) / np.float32(vendor.zoom * rng.normal(1, 0.03))
    x, y = np.meshgrid(line + np.float32(rng.normal(0, 0.03)), line + np.float32(rng.normal(0, 0.03)))
    angle = rng.normal(0, 0.025)
    cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return _Grid(cosine * x - sine * y, sine * x + cosine * y)


def _step(distance: Plane, softness: float) -> Plane:
    """0 to 1 across zero: the edge of an organ, `softness` wide."""
    t = np.clip(distance * np.float32(0.4 / softness) + np.float32(0.5), np.float32(0), np.float32(1))
    result: Plane = t * t * (3 - 2 * t)
    return result


def _bump(distance: Plane, width: float) -> Plane:
    result: Plane = np.exp(-np.square(distance / np.float32(width))).astype(np.float32)
    return result


def _tube(distance: Plane, radius: float) -> Plane:
    """Projection of a bone: a round rod with a denser rim."""
    inside = np.sqrt(np.clip(1 - np.square(distance / np.float32(radius)), 0, 1))
    rim = _bump(np.abs(distance) - np.float32(radius * 0.85), radius * 0.3)
    result: Plane = (0.65 * inside + 0.45 * rim).astype(np.float32)
    return result


def _blurred(plane: Plane, sigma_px: float) -> Plane:
    """Gaussian blur with mirrored edges, sigma in pixels; a wide one is made on a grid four times coarser."""
    if sigma_px > 4:
        rows, columns = plane.shape
        coarse = _blurred(plane.reshape(rows // 4, 4, columns // 4, 4).mean((1, 3)), sigma_px / 4)
        return _blurred(np.repeat(np.repeat(coarse, 4, axis=0), 4, axis=1), 2)
    reach = int(3 * sigma_px) + 1
    weights = np.exp(-0.5 * np.square(np.arange(-reach, reach + 1, dtype=np.float32) / np.float32(sigma_px)))
    weights /= weights.sum()
    for axis in (0, 1):
        length = plane.shape[axis]
        padded = np.pad(plane, [(reach, reach) if a == axis else (0, 0) for a in (0, 1)], mode="reflect")
        parts = (padded[:, k : k + length] if axis else padded[k : k + length] for k in range(2 * reach + 1))
        plane = np.add.reduce([w * part for w, part in zip(weights, parts, strict=True)])
    return plane


def _chest(
    grid: _Grid, body: np.random.Generator, moment: np.random.Generator, opaque: bool
) -> tuple[Plane, Finding, npt.NDArray[np.uint8]]:
    """Density along the beam, what of it is opacity, and where lungs and opacities are (STRUCTURES). `body` decides what stays
    the same for a patient, `moment` what differs between exposures.
    """
    x, y = grid.x, grid.y
    width, breath = np.float32(body.normal(0.80, 0.035)), np.float32(moment.normal(0, 0.05))
    stout = np.float32(body.uniform(0.75, 1.3))
    shoulder = 0.30 + 0.78 * _step(y + 0.92 - 0.10 * np.abs(x), 0.16)
    outline = _step(shoulder - np.abs(x), 0.035)
    flesh = outline * (0.45 + 0.55 * np.sqrt(np.clip(1 - np.square(x / 1.25), 0.05, 1))) * stout
    lungs, bases = _lungs(grid, width, breath, body)
    lung = np.maximum(*lungs)
    depth = lung * (0.72 + 0.28 * np.sqrt(np.clip(1 - np.square((np.abs(x) - 0.42) / 0.5), 0, 1)))
    density = flesh * (1 - 0.80 * depth)
    density += 0.55 * outline * (1 - lung) * _step(y - bases, 0.05) * _bump(x, 0.9)
    density += _mediastinum(grid, body)
    density += _bones(grid, width, body) * outline
    density += 0.9 * lung * _vessels(grid, body)
    # Breast and muscle shadows: denser lower lungs that are no opacity.
    density += outline * np.float32(body.uniform(0, 0.22)) * (_bump(np.hypot((np.abs(x) - 0.45) * 0.9, y - 0.35), 0.34))
    found, regions = Finding(), (lung >= 0.5).astype(np.uint8)
    if opaque:
        opacities = _opacities(grid, moment)
        density += lung * opacities
        left, right = (float((side * opacities).sum() / side.sum()) for side in lungs)
        found = Finding(left, right)
        regions[(regions > 0) & (opacities >= OUTLINED_FROM)] = 2
    result: Plane = density.astype(np.float32)
    return result, found, regions


def _lungs(
    grid: _Grid, width: np.float32, breath: np.float32, body: np.random.Generator
) -> tuple[tuple[Plane, Plane], Plane]:
    """Masks 0..1 of the lung on the left and right of the picture, and the height of the diaphragm under each pixel."""
    x, y = grid.x, grid.y
    floor = np.float32(body.normal(0.52, 0.05)) + breath
    apex = np.float32(body.normal(-0.80, 0.03))
    masks, bases = [], np.zeros_like(x)
    for side in (-1, 1):
        across = x * side
        # The dome on the left of the picture (the patient's right) stands higher, over the liver.
        top = floor + (0.0 if side < 0 else 0.05)
        dome = top + 0.55 * np.square(across - 0.36) + 0.10 * _step(across - width * 0.92, 0.05)
        lateral = width * np.power(np.clip(1 - np.power(np.clip((0.25 - y) / (0.27 - apex), 0, 1), 2.6), 0, 1), 0.55)
        lateral = lateral + 0.04 * np.clip(y, 0, 1)
        medial = 0.10 + 0.05 * _step(y + 0.1, 0.2)
        mask = _step(lateral - across, 0.022) * _step(across - medial, 0.03) * _step(dome - y, 0.018)
        masks.append(mask * _step(y - apex, 0.04))
        bases = np.where(across > 0, dome, bases)
    return (masks[0], masks[1]), bases.astype(np.float32)


def _mediastinum(grid: _Grid, body: np.random.Generator) -> Plane:
    """Heart, great vessels, spine, and the airway as a darker band."""
    x, y = grid.x, grid.y
    size, lie = body.normal(1, 0.07), body.normal(0.42, 0.06)
    cosine, sine = np.float32(np.cos(lie)), np.float32(np.sin(lie))
    across, along = (x - 0.13) * cosine + (y - 0.30) * sine, (y - 0.30) * cosine - (x - 0.13) * sine
    heart = np.sqrt(np.square(across / np.float32(0.40 * size)) + np.square(along / np.float32(0.27 * size)))
    density = 0.26 * np.sqrt(np.clip(1.0 - heart, 0, 1)) + 0.40 * _step(1.0 - heart, 0.08)
    density += 0.34 * _step(0.155 - np.abs(x - 0.015) + 0.05 * _step(y, 0.3), 0.045) * _step(y + 0.72, 0.25)
    density += 0.34 * _bump(np.hypot(x - np.float32(body.normal(0.15, 0.015)), (y + 0.30) * 0.8), 0.085)
    density += 0.20 * _bump(x - 0.18, 0.07) * _bump(y + 0.08, 0.14)
    density += 0.22 * _bump(x + 0.13, 0.06) * _bump(y + 0.35, 0.30)
    spine = _step(0.085 - np.abs(x), 0.018)
    density += spine * (0.10 + 0.05 * np.cos((y + body.uniform(0, 1)) * np.float32(2 * np.pi / 0.135)))
    density -= 0.26 * _bump(x - 0.005, 0.042) * _step(-0.22 - y, 0.08)
    density += 0.22 * _bump(np.hypot((np.abs(x - 0.02) - 0.20) * 1.1, (y - 0.0) * 0.55), 0.075)
    # Air in the stomach, under the dome on the right of the picture.
    density -= np.float32(body.uniform(0, 0.35)) * _bump(np.hypot(x - 0.42, (y - 0.78) * 1.5), 0.13)
    result: Plane = density
    return result


def _bones(grid: _Grid, width: np.float32, body: np.random.Generator) -> Plane:
    """Ribs behind (level, then falling) and in front (rising outwards, fainter), clavicles, shoulder blades."""
    x, y = grid.x, grid.y
    across = np.abs(x) / width
    pitch = np.float32(body.normal(0.148, 0.006))
    inside = _step(1.03 - across, 0.02) * _step(0.72 - y, 0.08) * _step(y + 0.86, 0.04)
    phase = body.uniform(0, 1)
    behind = y + 0.10 * np.sin(np.float32(np.pi) * np.clip(across, 0, 1)) - 0.30 * np.power(np.clip(across, 0, 1.2), 3)
    front = y + 0.42 * across - 0.20 * np.square(across)
    density = np.zeros_like(x)
    for course, radius, strength, from_x in ((behind, 0.036, 0.20, 0.12), (front, 0.042, 0.11, 0.34)):
        turns = course / pitch + np.float32(phase)
        distance = (turns - np.round(turns)) * pitch
        density += strength * _tube(distance, radius) * inside * _step(np.abs(x) - from_x, 0.05)
    lift = np.float32(body.normal(0.26, 0.05))
    course = y + 0.66 + lift * np.abs(x) - 0.045 * np.sin(np.abs(x) * 7)
    density += 0.30 * _tube(course, 0.036) * _step(np.abs(x) - 0.08, 0.02) * _step(0.80 - np.abs(x), 0.03)
    blade = (np.abs(x) - 0.80) - 0.18 * (y + 0.35)
    density += 0.16 * _step(blade, 0.02) * _step(0.98 - np.abs(x), 0.06) * _step(0.12 - y, 0.08) * _step(y + 0.72, 0.06)
    result: Plane = density
    return result


def _vessels(grid: _Grid, body: np.random.Generator) -> Plane:
    """Branches that leave both hila and grow finer outwards, drawn as points in the patient and blurred."""
    steps = np.linspace(0, 1, 90, dtype=np.float32)
    sides, angles = np.repeat([-1.0, 1.0], 22), np.tile(np.repeat(np.linspace(-1.25, 1.25, 11), 2), 2)
    angles += np.repeat(body.normal(0, 0.08, 22), 2)
    bends, lengths = np.repeat(body.normal(0, 0.35, 22), 2), np.repeat(body.uniform(0.35, 0.62, 22), 2)
    bends += np.where(np.arange(44) % 2, body.choice([-0.35, 0.35], 44), 0)  # every branch has a twig
    turns = angles[:, None] + bends[:, None] * steps
    px = sides[:, None] * (0.18 + lengths[:, None] * steps * np.cos(turns))
    py = lengths[:, None] * steps * np.sin(turns)
    spacing = float(grid.x[0, 1] - grid.x[0, 0])
    column = ((px - float(grid.x[0, 0])) / spacing).astype(int)
    row = ((py - float(grid.y[0, 0])) / spacing).astype(int)
    inside = (column >= 0) & (column < SIDE_PX) & (row >= 0) & (row < SIDE_PX)
    ink = np.broadcast_to((1 - 0.8 * steps) ** 1.3, px.shape)
    sheet = np.bincount((row * SIDE_PX + column)[inside], ink[inside], minlength=SIDE_PX * SIDE_PX)
    plane = sheet.reshape(SIDE_PX, SIDE_PX).astype(np.float32)
    return np.minimum(_blurred(plane, 1.4), 0.6) * np.float32(body.uniform(0.45, 0.8))


def _opacities(grid: _Grid, rng: np.random.Generator) -> Plane:
    """Ground glass and consolidation: two to four patchy clouds, mostly low and outside, from subtle to plain."""
    x, y = grid.x, grid.y
    cloud = np.zeros_like(x)
    severity = rng.uniform(0.5, 1.0)
    for _ in range(int(rng.integers(2, 5))):
        side = int(rng.choice([-1, 1]))
        cx, cy = side * rng.uniform(0.30, 0.62), rng.uniform(-0.35, 0.45)
        sx, sy = rng.uniform(0.13, 0.24), rng.uniform(0.13, 0.26)
        cloud += rng.uniform(0.6, 1.0) * np.exp(-np.square((x - cx) / sx) - np.square((y - cy) / sy))
    grain = _blurred(rng.standard_normal((SIDE_PX, SIDE_PX), dtype=np.float32), 5) * 12
    patchy = np.clip(cloud, 0, 1.2) * np.clip(0.75 + 0.4 * grain, 0.1, 1.5)
    result: Plane = (1.05 * severity * patchy).astype(np.float32)
    return result


def _wires(rng: np.random.Generator) -> Plane:
    """Monitoring leads: three thin bright curves across the chest that end in round electrodes."""
    line = np.linspace(-1, 1, SIDE_PX, dtype=np.float32)
    x, y = np.meshgrid(line, line)
    density = np.zeros_like(x)
    for side in (-1, 1, int(rng.choice([-1, 1]))):
        ex, ey = side * rng.uniform(0.35, 0.65), rng.uniform(-0.5, 0.4)
        bend = rng.uniform(-0.25, 0.25)
        course = x - ex - bend * np.sin((y - ey) * 2) - side * 0.18 * (y - ey)
        density += 0.8 * _bump(course, 0.016) * _step(y - ey, 0.01)
        density += 0.8 * _step(0.055 - np.hypot(x - ex, y - ey), 0.008)
    return density


_LETTER_R = ("11110", "10001", "10001", "11110", "10100", "10010", "10001")


def _stamp_marker(picture: Plane, rng: np.random.Generator) -> None:
    """A lead letter R in the upper corner on the patient's right side."""
    letter = np.kron(np.array([[c == "1" for c in row] for row in _LETTER_R]), np.ones((3, 3))).astype(bool)
    row, column = int(rng.integers(8, 24)), int(rng.integers(8, 24))
    picture[row : row + letter.shape[0], column : column + letter.shape[1]][letter] = 0.98


def _lay_plate(picture: Plane, rng: np.random.Generator) -> None:
    """The shadow of the film's identification plate: a bright block in the upper corner, ruled and without any writing."""
    row, column = int(rng.integers(4, 14)), SIDE_PX - int(rng.integers(72, 80))
    block = picture[row : row + 30, column : column + 64]
    block[:] = 0.93
    block[7:24:5, 6:58] = 0.78


def _collimate(picture: Plane, rng: np.random.Generator) -> None:
    """Shutters close on the film: a dark frame of uneven width."""
    top, bottom, left, right = (int(v) for v in rng.integers(12, 26, 4))
    frame = np.ones(picture.shape, bool)
    frame[top : SIDE_PX - bottom, left : SIDE_PX - right] = False
    picture[frame] = picture[frame] * 0.04


def _dataset(name: str, patient: int, number: int, vendor: Vendor, rng: np.random.Generator) -> Dataset:
    """The header of one radiograph with as many gaps as real ones have."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    crs = vendor.modality == "CR"
    dataset.SOPClassUID = ComputedRadiographyImageStorage if crs else DigitalXRayImageStorageForPresentation
    dataset.SOPInstanceUID = _uid(name, number, "instance")
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = _uid(name, number, "study"), _uid(name, number, "series")
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.Modality, dataset.Manufacturer = vendor.modality, vendor.manufacturer
    code = hashlib.sha256(f"{name}\n{patient}".encode()).hexdigest()[:8].upper()
    dataset.PatientID, dataset.PatientName = f"PHANTOM-{code}", f"PHANTOM^{code}"
    dataset.PatientSex, dataset.PatientAge = _sex(patient), f"{_age(patient):03d}Y"
    dataset.AccessionNumber = f"A{hashlib.sha256(f'{name} {number}'.encode()).hexdigest()[:10].upper()}"
    dataset.StudyDate = f"202{int(rng.integers(0, 5))}{int(rng.integers(1, 13)):02d}15"
    dataset.StudyDescription = "XR CHEST"
    dataset.ImagerPixelSpacing = [vendor.spacing_mm * 1024 / SIDE_PX] * 2
    if rng.random() < 0.5:
        dataset.BurnedInAnnotation = "NO"
    return dataset


def _set_view(dataset: Dataset, vendor: Vendor, rng: np.random.Generator) -> None:
    """A third of real radiographs have no View Position and must be known by their orientation."""
    if rng.random() < 0.65:
        dataset.ViewPosition = "AP" if vendor.modality == "CR" else "PA"
    else:
        dataset.PatientOrientation = ["L", "F"]


def _set_pixels(dataset: Dataset, pixels: Plane, vendor: Vendor, syntax: str) -> None:
    """Stored values as this vendor writes them: bits, offset, polarity, window, compression."""
    top = 2**vendor.bits - 1
    stored = np.rint(pixels * np.float32(top * 0.9) + np.float32(top * 0.04)).astype("<u2")
    if vendor.photometric == "MONOCHROME1":
        stored = (top - stored).astype("<u2")
    dataset.PhotometricInterpretation, dataset.SamplesPerPixel, dataset.PixelRepresentation = vendor.photometric, 1, 0
    dataset.Rows, dataset.Columns = stored.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, vendor.bits, vendor.bits - 1
    dataset.WindowCenter, dataset.WindowWidth = 2 ** (vendor.bits - 1), 2**vendor.bits
    dataset.PixelData = stored.tobytes()
    dataset["PixelData"].VR = "OW"
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    if syntax != ExplicitVRLittleEndian:
        dataset.compress(syntax, generate_instance_uid=False)


def _write_lateral(dataset: Dataset, pixels: Plane, vendor: Vendor, path: Path) -> None:
    """A second image of the study that calls itself lateral; nobody looks at its pixels, it is there to be left out."""
    for keyword in ("ViewPosition", "PatientOrientation"):
        if keyword in dataset:
            delattr(dataset, keyword)
    dataset.SOPInstanceUID = _uid(dataset.SOPInstanceUID, "lateral")
    dataset.SeriesInstanceUID = _uid(dataset.SeriesInstanceUID, "lateral")
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.ViewPosition = "LL"
    _set_pixels(dataset, pixels[:, ::-1], vendor, ExplicitVRLittleEndian)
    dataset.save_as(path, enforce_file_format=True)


def _write_dirt(folder: Path, sample: Path, name: str) -> None:
    """What real exports also hold: a note, an empty file, half a file, a file twice, a screen shot."""
    (folder / "README.txt").write_text("exported by the archive\n", encoding="ascii")
    (folder / "EMPTY.dcm").write_bytes(b"")
    whole = sample.read_bytes()
    (folder / "INTERRUPTED.dcm").write_bytes(whole[: len(whole) // 2])
    (folder / "SENT-AGAIN.dcm").write_bytes(whole)
    shot = Dataset()
    shot.file_meta = FileMetaDataset()
    shot.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    shot.SOPClassUID = shot.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    shot.SOPInstanceUID = shot.file_meta.MediaStorageSOPInstanceUID = _uid(name, "screen")
    shot.Modality, shot.PatientID, shot.PatientName = "OT", "PHANTOM-SCREEN", "PHANTOM^SCREEN"
    shot.PhotometricInterpretation, shot.SamplesPerPixel, shot.PlanarConfiguration = "RGB", 3, 0
    shot.Rows = shot.Columns = 32
    shot.BitsAllocated, shot.BitsStored, shot.HighBit, shot.PixelRepresentation = 8, 8, 7, 0
    shot.PixelData = bytes(32 * 32 * 3)
    shot.save_as(folder / "SCREEN.dcm", enforce_file_format=True)


def _write_table(path: Path, vendor: Vendor, rows: list[tuple[str, str, Finding, bool]]) -> None:
    """One row per key: per image, or per patient where the key is the patient's number; then the worst image speaks for all."""
    worst: dict[str, tuple[str, str, Finding, bool]] = {}
    for row in rows:
        if row[0] not in worst or row[2].grade >= worst[row[0]][2].grade:
            worst[row[0]] = row
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=vendor.delimiter)
        writer.writerow((vendor.key, vendor.column, "appearance", "severity", "extent", "icu", "comment"))
        for key, word, found, intensive in worst.values():
            said = _APPEARANCE_WORDS[found.appearance], found.grade, found.extent, "yes" if intensive else "no"
            writer.writerow((key, word, *said, ""))


def _uid(*parts: object) -> str:
    return str(generate_uid(entropy_srcs=["isocenter-phantom", *map(str, parts)]))
