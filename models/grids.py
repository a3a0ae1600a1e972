"""Pictures in 0..1 on another number of pixels: reduced as they are kept, and on the grid that a study asks for.

Apart from `models.imaging`, which reads files: what trains on pictures that were read before needs no DICOM reader in memory.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional


def reduced(pixels: npt.NDArray[np.float32], longest_side_px: int) -> npt.NDArray[np.float32]:
    """float32 (H, W) with the same aspect and no side above `longest_side_px`; never enlarged."""
    height, width = pixels.shape
    longest = max(height, width)
    if longest <= longest_side_px:
        return pixels
    size = (max(1, round(height * longest_side_px / longest)), max(1, round(width * longest_side_px / longest)))
    return _resized(pixels, size)


def to_grid(pixels: npt.NDArray[np.float32], size_px: int) -> npt.NDArray[np.float32]:
    """float32 (1, size_px, size_px): padded with black to a centred square, then averaged down or interpolated up."""
    height, width = pixels.shape
    side = max(height, width)
    square = np.zeros((side, side), np.float32)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = pixels
    return _resized(square, (size_px, size_px))[np.newaxis]


def _resized(pixels: npt.NDArray[np.float32], size: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Bilinear with antialiasing: the kernel widens with the reduction, so fine ribs and noise do not alias."""
    if pixels.shape == size:
        return pixels
    tensor = torch.from_numpy(np.ascontiguousarray(pixels))[None, None]
    grown = functional.interpolate(tensor, size=size, mode="bilinear", antialias=True, align_corners=False)
    result: npt.NDArray[np.float32] = grown[0, 0].clamp_(0, 1).numpy()
    return result
