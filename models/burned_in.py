"""Text that is burned into the pixels of a radiograph, found by the shape of its lines; it asks for a look and decides nothing.

Letters are small pieces of one height, one brightness and thin strokes, that stand side by side on one line; anatomy, wires,
electrodes, collimation edges and a single lead letter are not. So: pieces that are brighter (then: darker) than their
surroundings; of these, pieces of a letter's proportions; of these, chains along a line. The score of a chain is the number of
strokes that a row through it crosses, less for each way in which it is unlike text; that of an image is its best chain's.

What it cannot see: handwriting, text that runs vertically, words of one or two letters, letters under 5 pixels or over 48, text
that touches a bright edge, and text with less contrast than the bones around it. docs/deidentification.md has the measured misses
and false alarms.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

Plane = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.float64]

THRESHOLD = 3.0  # chosen on half of the measured images; docs/deidentification.md
WINDOW_PX = 25  # surroundings: four times the stroke of the largest letters looked for
SMALL_PX, ENLARGED_MAX = 768, 3  # a picture of at most 384 or 256 pixels is also looked at twice or thrice enlarged
CONTRAST = 0.12  # of a stroke against its surroundings, of the whole range
HEIGHT_PX = (5, 48)  # of a letter: below it noise has as many shapes, above it bones have
ASPECT_MIN = 1.5  # widths of a line in its heights; less is a single letter, such as the marker of a side
WIDTH_MAX = 12.0  # heights; words whose letters touch are one piece
WEIGHT_MIN = 0.35  # one way in which a line is unlike text does not rule it out
FILL = (0.12, 0.92)  # of the box that a letter fills: less is a thin curve, more a bar or a plate
PIECES_MAX = 700  # pairs are compared, so time grows with its square; the rest of a very noisy image is passed over


@dataclass(frozen=True)
class _Pieces:
    """What may be letters. One number per piece: box, strokes that a row crosses on average, outmost brightness, contrast."""

    top: Numbers
    bottom: Numbers
    left: Numbers
    right: Numbers
    strokes: Numbers
    value: Numbers
    contrast: Numbers

    @property
    def height(self) -> Numbers:
        return self.bottom - self.top

    def __len__(self) -> int:
        return len(self.top)


def suspected(pixels: Plane) -> bool:
    """Whether a person should look at `pixels` (float32 (H, W) in 0..1) before they leave: `text_score` reaches THRESHOLD."""
    return text_score(pixels) >= THRESHOLD


def text_score(pixels: Plane) -> float:
    """Weighted strokes in the best line of text-like pieces in `pixels`, float32 (H, W) in 0..1; 0.0 if there is no such line."""
    if min(pixels.shape) < WINDOW_PX:
        return 0.0
    score, times = _score(pixels), min(ENLARGED_MAX, SMALL_PX // max(pixels.shape))
    if times > 1:  # in a picture this small letters are under 5 pixels, and apart by less than one
        score = max(score, _score(ndimage.zoom(pixels, times, order=1)))
    return score


def _score(pixels: Plane) -> float:
    difference = pixels - _surroundings(pixels)
    masks = (difference > CONTRAST, difference < -CONTRAST)
    return max(_best_line(_pieces(pixels, difference, mask)) for mask in masks)


def _surroundings(pixels: Plane) -> Plane:
    """The mean of about WINDOW_PX squared around each pixel, taken at half the resolution: a quarter of the time."""
    height, width = pixels.shape
    even = np.pad(pixels, ((0, height % 2), (0, width % 2)), mode="edge") if height % 2 or width % 2 else pixels
    half = (even[::2, ::2] + even[1::2, ::2] + even[::2, 1::2] + even[1::2, 1::2]) / np.float32(4)
    mean = ndimage.uniform_filter(half, WINDOW_PX // 2 + 1, mode="nearest")
    result: Plane = np.repeat(np.repeat(mean, 2, axis=0), 2, axis=1)[:height, :width]
    return result


def _pieces(pixels: Plane, difference: Plane, mask: npt.NDArray[np.bool_]) -> _Pieces:
    """Connected pieces of `mask` with the proportions of letters or of words whose letters touch.

    A hundredth of an image is in a mask, so it is worked on as runs: pixels side by side in one row.
    """
    where = np.flatnonzero(mask)
    if len(where) == 0:
        return _Pieces(*(np.zeros(0) for _ in range(7)))
    columns = mask.shape[1]
    begins = np.flatnonzero((np.diff(where, prepend=-2) > 1) | (where % columns == 0))
    starts, ends = where[begins], where[np.append(begins[1:], len(where)) - 1] + 1
    piece, count = _joined(starts, ends, columns)

    def summed(values: npt.NDArray[Any]) -> Numbers:
        result: Numbers = np.bincount(piece, values.astype(float), count).astype(float)
        return result

    def reach(sides: npt.NDArray[np.intp], furthest: np.ufunc, start: int) -> Numbers:
        result = np.full(count, start, np.intp)
        furthest.at(result, piece, sides)
        return result.astype(float)

    rows, area, values = starts // columns, summed(ends - starts), pixels.ravel()[where].astype(float)
    top, bottom = reach(rows, np.minimum, mask.size), reach(rows + 1, np.maximum, 0)
    left, right = reach(starts - rows * columns, np.minimum, columns), reach(ends - rows * columns, np.maximum, 0)
    height, width = bottom - top, right - left
    fill = area / (height * width)
    letters = (height >= HEIGHT_PX[0]) & (height <= HEIGHT_PX[1]) & (width <= WIDTH_MAX * height) & (fill >= FILL[0])
    letters &= (fill <= FILL[1]) | (width < 0.5 * height)  # a full box is a bar or a plate, or else an I
    outmost = np.full(count, 0.5)  # of thin strokes only the middle is as bright as it was drawn
    ends_of = np.maximum if difference.ravel()[where[0]] > 0 else np.minimum
    ends_of.at(outmost, piece, ends_of.reduceat(values, begins))
    contrast = summed(np.add.reduceat(np.abs(difference.ravel()[where]).astype(float), begins)) / area
    chosen = np.flatnonzero(letters)
    if len(chosen) > PIECES_MAX:
        chosen = np.sort(chosen[np.argsort(-contrast[chosen], kind="stable")[:PIECES_MAX]])
    strokes = np.bincount(piece, minlength=count) / height
    return _Pieces(*(numbers[chosen] for numbers in (top, bottom, left, right, strokes, outmost, contrast)))


def _joined(
    starts: npt.NDArray[np.intp], ends: npt.NDArray[np.intp], columns: int
) -> tuple[npt.NDArray[np.int32], int]:
    """The number of its piece for each run, and of pieces: runs of neighbouring rows belong together if they overlap."""
    first = np.searchsorted(ends, starts + columns, "right")
    number = np.maximum(np.searchsorted(starts, ends + columns, "left") - first, 0)
    above = np.repeat(np.arange(len(starts)), number)
    below = np.arange(len(above)) - np.repeat(np.cumsum(number) - number, number) + first[above]
    links = coo_matrix((np.ones(len(above), bool), (above, below)), shape=(len(starts), len(starts)))
    count, piece = connected_components(links, directed=False)
    return piece, int(count)


def _chains(p: _Pieces) -> npt.NDArray[np.int32]:
    """A number for each piece, the same for pieces of one line: neighbours of like height, brightness and place."""
    high, low = np.maximum.outer(p.height, p.height), np.minimum.outer(p.height, p.height)
    overlap = np.minimum.outer(p.bottom, p.bottom) - np.maximum.outer(p.top, p.top)
    gap = np.maximum.outer(p.left, p.left) - np.minimum.outer(p.right, p.right)
    alike = (low >= 0.5 * high) & (overlap >= 0.6 * low) & (gap <= 0.9 * high) & (gap >= -0.3 * low)
    alike &= np.abs(np.subtract.outer(p.value, p.value)) <= 0.15
    _, chain = connected_components(coo_matrix(alike), directed=False)
    result: npt.NDArray[np.int32] = chain
    return result


def _best_line(p: _Pieces) -> float:
    if len(p) == 0:
        return 0.0
    chain, best = _chains(p), 0.0
    strokes = np.bincount(chain, p.strokes)
    for number in np.argsort(-strokes):
        if strokes[number] <= best:  # a line's score is at most its strokes
            break
        best = max(best, _line_score(p, np.flatnonzero(chain == number)))
    return best


def _line_score(p: _Pieces, members: npt.NDArray[np.intp]) -> float:
    """Strokes of one line, less for each way in which it is unlike text; the weights were set on half of the images."""
    top, bottom, left, right = (side[members] for side in (p.top, p.bottom, p.left, p.right))
    height, width = float(np.median(bottom - top)), float(right.max() - left.min())
    if width < ASPECT_MIN * height:
        return 0.0
    strokes = float(p.strokes[members].sum())
    along = left - left.mean()
    slope = float((along * bottom).sum()) / max(float((along**2).sum()), 1.0)
    ragged = float(np.abs(bottom - bottom.mean() - slope * along).mean()) / height
    weights = (
        float(p.contrast[members].mean()) / 0.25,  # bones and noise stand out by 0.15, text by 0.35
        strokes * height / width / 1.2,  # letters come close together: 1.4 strokes on the width of a height
        (len(members) / 4) ** 0.5,  # few pieces are a clip, a buckle, the end of a lead
        abs(float(p.value[members].mean()) - 0.5) / 0.35,  # text is nearly black or white
        1.2 - float((bottom - top).std()) / height,
        1.2 - 2 * ragged,
    )
    return strokes * float(np.prod(np.clip(weights, WEIGHT_MIN, 1)))
