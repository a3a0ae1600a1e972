"""CT slices to volumes in Hounsfield units, and volumes to the grid of a study; nothing is guessed about where a slice lies.

A series is what its slices say one by one: they are ordered by their position along the normal of their plane (never by Instance
Number, which runs backwards on some scanners, and never by Slice Location), and a series in which one is missing, stands twice
or lies unevenly is left out by name, because a volume made of it would be stretched where nobody sees it. A tilted gantry is
kept as what it is, a sheared grid, and straightened by the one resampling that every volume goes through.

Coordinates are DICOM's: millimetres in the patient, x to the left, y to the back, z to the head (PS3.3 C.7.6.2.1.1). Arrays are
(slices, rows, columns).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from models.study import Volume
from privacy.errors import ImageLeftOut

AIR_HU = -1024  # below it nothing is measured: scanners write padding there (-1500, -2000, -3024)
HU_MAX = 30_000  # metal on extended scales; int16 holds it
SLICES_MIN = 10  # fewer are a biopsy's guide or a remainder, not a chest
SLICES_MAX = 4000
GAP_SHARE, GAP_MM = 0.01, 0.011  # by which a gap may differ from the others: positions are written with two decimals
SAME_PLACE_MM = 0.01
AIR_BELOW_HU = -700  # lungs and the air around the patient lie below it, soft tissue and fat never do
AIR_SHARE_LEAST = 0.01

Float64 = npt.NDArray[np.float64]
Int16 = npt.NDArray[np.int16]


@dataclass(frozen=True)
class Plane:
    """Where one slice lies: its first pixel, the directions of a row and of a column, and the distances of pixels in mm."""

    position: tuple[float, float, float]
    row: tuple[float, float, float]
    column: tuple[float, float, float]
    spacing_mm: tuple[float, float]  # between rows, between columns

    @property
    def normal(self) -> Float64:
        return np.cross(self.row, self.column)


@dataclass(frozen=True)
class Stack:
    """Slices in order, and the affine float64 (3, 4) that takes (slice, row, column, 1) to millimetres in the patient."""

    order: list[int]
    affine: Float64
    tilt_degrees: float

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance of slices along their normal, of rows, of columns."""
        step, down, across = self.affine[:, :3].T
        normal = np.cross(across, down)
        return (abs(float(step @ normal)) / float(np.linalg.norm(normal)), _length(down), _length(across))


def plane_of(position: Sequence[float], orientation: Sequence[float], spacing_mm: Sequence[float]) -> Plane:
    """The plane that a header describes. Raises ImageLeftOut("no_geometry") for anything that is no plane."""
    numbers = [float(value) for value in (*position, *orientation, *spacing_mm)]
    if (len(position), len(orientation), len(spacing_mm)) != (3, 6, 2) or not all(map(math.isfinite, numbers)):
        raise ImageLeftOut("no_geometry")
    x, y, z, *directions = numbers[:9]
    row, column, (down, across) = directions[:3], directions[3:], numbers[9:]
    # Without numpy, which takes longer to look at three numbers than pydicom to find them; this is done for every slice.
    upright = abs(sum(a * b for a, b in zip(row, column, strict=True))) < 1e-2
    if not upright or any(abs(math.hypot(*way) - 1) > 1e-2 for way in (row, column)):
        raise ImageLeftOut("no_geometry")
    if not (0.05 < down < 10 and 0.05 < across < 10) or max(map(abs, (x, y, z))) > 1e5:
        raise ImageLeftOut("no_geometry")
    return Plane((x, y, z), (row[0], row[1], row[2]), (column[0], column[1], column[2]), (down, across))


def stack(planes: Sequence[Plane]) -> Stack:
    """The order of parallel slices from the lowest along their normal, and where their volume lies.

    Raises ImageLeftOut: too_few_slices, position_twice, missing_slices (gaps are multiples of the smallest), irregular_gaps.
    """
    if not SLICES_MIN <= len(planes) <= SLICES_MAX:
        raise ImageLeftOut("too_few_slices" if len(planes) < SLICES_MIN else "too_large")
    first, normal = planes[0], planes[0].normal
    places = np.array([plane.position for plane in planes], dtype=np.float64)
    along = places @ normal
    order = np.argsort(along, kind="stable")
    gaps = np.diff(along[order])
    if float(gaps.min()) < SAME_PLACE_MM:
        raise ImageLeftOut("position_twice")
    gap = float(np.median(gaps))
    if float(np.abs(gaps - gap).max()) > max(GAP_SHARE * gap, GAP_MM):
        multiples = gaps / float(gaps.min())
        whole = np.abs(multiples - np.rint(multiples)).max() < 0.02 * multiples.max()
        raise ImageLeftOut("missing_slices" if whole and multiples.max() < 50 else "irregular_gaps")
    steps = np.diff(places[order], axis=0)
    step = (places[order[-1]] - places[order[0]]) / (len(planes) - 1)
    if float(np.abs(steps - step).max()) > max(
        10 * GAP_SHARE * gap, 10 * GAP_MM
    ):  # the table moved sideways in between
        raise ImageLeftOut("irregular_gaps")
    down, across = np.array(first.column) * first.spacing_mm[0], np.array(first.row) * first.spacing_mm[1]
    affine = np.stack([step, down, across, places[order[0]]], axis=1)
    return Stack([int(n) for n in order], affine, tilt_of(affine))


def tilt_of(affine: Float64) -> float:
    """Degrees between the way from slice to slice and the normal of the slices: the gantry's tilt."""
    step, down, across = affine[:, :3].T
    normal = np.cross(across, down)
    return math.degrees(math.acos(min(1.0, abs(float(step @ normal)) / (_length(step) * _length(normal)))))


def hounsfield(values: npt.NDArray[np.float32], padding: npt.NDArray[np.bool_] | None) -> Int16:
    """Modality values of a slice as whole Hounsfield units int16 (H, W); padding and everything below AIR_HU become air."""
    whole = np.rint(np.clip(values, AIR_HU, HU_MAX)).astype(np.int16)
    if padding is not None:
        whole[padding] = AIR_HU
    return whole


def require_air(volume: Int16) -> None:
    """Raise ImageLeftOut("not_hounsfield") unless some of int16 (D, H, W) is air: without a rescale, nothing lies below 0.

    Padding is not taken for measured air: what lies at AIR_HU exactly does not count.
    """
    sample = volume[:: max(1, len(volume) // 16), ::4, ::4]
    measured = sample[sample > AIR_HU]
    if measured.size == 0 or float((measured < AIR_BELOW_HU).mean()) < AIR_SHARE_LEAST:
        raise ImageLeftOut("not_hounsfield")


def to_volume_grid(volume: Int16, affine: Float64, grid: Volume) -> npt.NDArray[np.float32]:
    """float32 (1, *grid.size) in 0..1: `volume` int16 (D, H, W) on the study's grid, centred on it, air outside.

    Where the grid is coarser, voxels are averaged first, so that fine structure does not alias; then one trilinear look-up
    through the affine straightens tilt, turns every orientation the same way and keeps millimetres.
    """
    axes = grid_places(volume.shape, affine, grid)
    pooled, affine = _averaged(volume, affine, grid)
    inverse = np.linalg.inv(np.vstack([affine, [0, 0, 0, 1]]))[:3]
    low, high = grid.window_hu
    source = torch.from_numpy(pooled)[None, None] - AIR_HU  # what lies outside is 0, and 0 is air
    sizes = torch.tensor(pooled.shape, dtype=torch.float64)
    y, x = (torch.from_numpy(axis) for axis in axes[1:])
    weights = torch.from_numpy(inverse)
    found = np.empty((1, *grid.size), np.float32)
    for number, z in enumerate(axes[0]):
        at = weights[:, 3] + weights[:, 2] * float(z)  # (3,)
        places = (
            at + y[:, None, None] * weights[:, 1] + x[None, :, None] * weights[:, 0]
        )  # (H, W, 3): slice, row, column
        scaled = (2 * places + 1) / sizes - 1
        looked = functional.grid_sample(source, scaled.flip(-1)[None, None].float(), align_corners=False)
        found[0, number] = looked[0, 0, 0].numpy()
    result: npt.NDArray[np.float32] = np.clip((found + np.float32(AIR_HU - low)) / np.float32(high - low), 0, 1)
    return result


def grid_places(shape: tuple[int, ...], affine: Float64, grid: Volume) -> list[Float64]:
    """z, y and x in mm of the grid's voxels, for a volume of `shape` with `affine`; it is centred on what is averaged of that."""
    sizes, moved = _blocks(shape, affine, grid)[1:]
    middle = moved @ np.array([*((np.array(sizes) - 1) / 2), 1.0])
    return [
        centre + (np.arange(count) - (count - 1) / 2) * spacing
        for centre, count, spacing in zip(middle[::-1], grid.size, grid.spacing_mm, strict=True)
    ]


def _blocks(shape: tuple[int, ...], affine: Float64, grid: Volume) -> tuple[list[int], list[int], Float64]:
    """Voxels that are averaged into one on each axis, how many such there are, and the affine that fits them."""
    turned = np.abs(affine[:, :3])
    # Each axis of the volume is compared with the patient's axis that it runs along most: x, y, z against across, down, along.
    coarse = [grid.spacing_mm[2 - int(turned[:, axis].argmax())] for axis in range(3)]
    own = np.linalg.norm(affine[:, :3], axis=0)
    blocks = [max(1, min(int(wanted / have), size)) for wanted, have, size in zip(coarse, own, shape, strict=True)]
    moved = affine.copy()
    moved[:, :3] = affine[:, :3] * blocks
    moved[:, 3] = affine[:, 3] + affine[:, :3] @ ((np.array(blocks) - 1) / 2)
    return blocks, [size // block for size, block in zip(shape, blocks, strict=True)], moved


def _averaged(volume: Int16, affine: Float64, grid: Volume) -> tuple[npt.NDArray[np.float32], Float64]:
    """float32 means over blocks of whole voxels wherever the grid is at least twice as coarse, and the affine that fits them."""
    blocks, sizes, moved = _blocks(volume.shape, affine, grid)
    pooled = np.empty(sizes, np.float32)
    for number in range(sizes[0]):  # slab by slab, so that a long series is never held twice
        slab = volume[number * blocks[0] : (number + 1) * blocks[0], : sizes[1] * blocks[1], : sizes[2] * blocks[2]]
        parts = slab.astype(np.float32).mean(axis=0).reshape(sizes[1], blocks[1], sizes[2], blocks[2])
        pooled[number] = parts.mean(axis=(1, 3))
    return pooled, moved


def _length(vector: Float64) -> float:
    return float(np.linalg.norm(vector))
