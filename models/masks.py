"""Reference masks and outlines between an image's own pixels and a study's grid, nearest neighbour both ways.

A mask lies on the pixels of its image, as one bit for each structure that the site names; on the grid of a study it is what the
voxel of the image says in which the middle of the grid's voxel lies. An outline goes back the same way. The geometry is that of
`models.grids.to_grid` and `models.volumes.to_volume_grid`, so a mask is never half a voxel beside its image.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from models.sections import Images, Volume
from models.volumes import Float64, grid_places

Bits = npt.NDArray[np.uint8]
Bool = npt.NDArray[np.bool_]
Int64 = npt.NDArray[np.int64]


def to_grid(bits: Bits, affine: Float64 | None, images: Images, structures: Sequence[int]) -> Bits:
    """uint8 (T, *grid), 1 within: `bits` (H, W), or (D, H, W) with its affine, on the grid of `images`.

    `structures`: for each target the number of its bit; -1 for one that the site has no masks of, all 0 then.
    """
    if images.volume is None or affine is None:
        found = _from_plane(bits, images.size_px)
    else:
        found = _from_volume(bits, affine, images.volume)
    return np.stack([(found >> bit) & 1 if bit >= 0 else np.zeros_like(found) for bit in structures]).astype(np.uint8)


def from_plane_grid(outlines: Bool, matrix: tuple[int, int]) -> Bool:
    """bool (T, rows, columns): outlines (T, S, S) on the radiograph's own `matrix`."""
    rows, columns = _places(matrix, outlines.shape[-1], inverse=True)
    placed: Bool = outlines[:, rows[:, None], columns[None, :]]
    return placed


def from_volume_grid(outlines: Bool, shape: tuple[int, ...], affine: Float64, grid: Volume) -> Bool:
    """bool (T, D, H, W): outlines (T, *grid.size) on the volume's own voxels; what lies outside the grid is in no structure."""
    axes = grid_places(shape, affine, grid)  # z, y, x of the grid's voxels
    made = np.zeros((len(outlines), *shape), bool)
    rows, columns = np.meshgrid(np.arange(shape[1]), np.arange(shape[2]), indexing="ij")
    for number in range(shape[0]):
        where = affine @ np.stack([np.full(rows.size, number), rows.ravel(), columns.ravel(), np.ones(rows.size)])
        places = [
            np.rint((along - axis[0]) / step).astype(np.int64)
            for along, axis, step in zip(where[::-1], axes, grid.spacing_mm, strict=True)
        ]
        inside = np.logical_and.reduce([(p >= 0) & (p < n) for p, n in zip(places, grid.size, strict=True)])
        z, y, x = (place[inside] for place in places)
        made[:, number].reshape(len(outlines), -1)[:, inside] = outlines[:, z, y, x]
    return made


def plane_spacing_mm(matrix: Sequence[int], spacing_mm: Sequence[float], size_px: int) -> tuple[float, float]:
    """Millimetres between rows and columns of the square grid of `size_px` that a radiograph of `matrix` is brought to."""
    scale = max(matrix) / size_px
    return spacing_mm[0] * scale, spacing_mm[1] * scale


def _from_plane(bits: Bits, size_px: int) -> Bits:
    rows, columns = _places(bits.shape, size_px, inverse=False)
    within = [(place >= 0) & (place < size) for place, size in zip((rows, columns), bits.shape, strict=True)]
    found = np.zeros((size_px, size_px), np.uint8)
    found[np.ix_(*within)] = bits[np.ix_(rows[within[0]], columns[within[1]])]
    return found


def _places(matrix: Sequence[int], size_px: int, *, inverse: bool) -> tuple[Int64, Int64]:
    """For each row and column of the grid, the row and column of the image that its middle lies in; or the other way round."""
    side = max(matrix)
    found = []
    for length in matrix:
        margin = (side - length) // 2
        if inverse:
            middles = (np.arange(length) + margin + 0.5) * size_px / side
            found.append(np.clip(np.floor(middles).astype(np.int64), 0, size_px - 1))
        else:
            middles = (np.arange(size_px) + 0.5) * side / size_px - margin
            found.append(np.floor(middles).astype(np.int64))
    return found[0], found[1]


def _from_volume(bits: Bits, affine: Float64, grid: Volume) -> Bits:
    z, y, x = grid_places(bits.shape, affine, grid)
    inverse = np.linalg.inv(np.vstack([affine, [0, 0, 0, 1]]))[:3]
    down, across = (part.ravel() for part in np.meshgrid(y, x, indexing="ij"))
    found = np.zeros(tuple(grid.size), np.uint8)
    for number, along in enumerate(z):
        found[number] = looked_up(bits, inverse, np.stack([across, down, np.full(across.size, along)])).reshape(
            grid.size[1:]
        )
    return found


def looked_up(bits: Bits, inverse: Float64, points: Float64) -> Bits:
    """uint8 (N,): the voxel of `bits` (D, H, W) in which each of `points` (3, N) in mm lies, 0 outside; `inverse` (3, 4)."""
    places = np.rint(inverse[:, :3] @ points + inverse[:, 3:]).astype(np.int64)
    inside = np.logical_and.reduce([(p >= 0) & (p < n) for p, n in zip(places, bits.shape, strict=True)])
    found = np.zeros(points.shape[1], np.uint8)
    found[inside] = bits[tuple(places[:, inside])]
    return found
