"""Mask files of a site, matched to the images that were ingested: NIfTI files and DICOM segmentations.

A mask is taken only if it belongs to one image, lies on it, and holds nothing that site.yaml does not name; everything else is
left out under a reason and counted. Files are opened by the confined processes of `ingest`, twice, as images are. What is taken
is kept for `fl_client.masks`.

    NIfTI   named after its image: Series Instance UID of a volume, SOP Instance UID of a radiograph, or the name (and folder) of
            the image's own file. A volume's affine says where it lies; of a picture the first axis runs along columns from the
            left, the second along rows from the top, and the affine says nothing
    SEG     names its series and instances itself. Frames lie on the planes of the volume. A structure that no segment describes
            was not annotated; one that is described and has no frames is not there
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field, TypeAdapter

from fl_client import nifti
from fl_client.cache import Cache, content_of
from fl_client.headers import parse_whole
from fl_client.index import Index, IndexedImage
from fl_client.masks import Bits, Mask, Masks, cache_of
from fl_client.readers import FILE_S, Answer, Digest, LeftOut, Readers, checked, same
from fl_client.site import MaskMap
from fl_client.sources import Folder, Item, Reason
from models import imaging
from models.documents import Document
from models.imaging import quiet_reading
from models.masks import looked_up
from privacy.errors import CacheLost, ImageLeftOut

RECIPE = b"isocenter/v1/mask"
SEG_STORAGE = "1.2.840.10008.5.1.4.1.1.66.4"
FRAMES_MAX = 20_000
PLACE_VOXELS = 0.05  # by which a frame may lie beside the plane of its slice
Float64 = npt.NDArray[np.float64]
Uids = Annotated[list[Annotated[str, Field(max_length=64)]], Field(max_length=FRAMES_MAX)]


# Reading, in a confined process --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """Which image a mask says that it is of."""

    item: Item

    light = True

    @property
    def seconds(self) -> float:
        return FILE_S

    def run(self) -> Answer:
        data = self.item.read()
        found: Answer = {"sha256": hashlib.sha256(data).hexdigest(), "series": [], "instances": []}
        if nifti.looks_like_nifti(data):
            return found
        with quiet_reading():
            try:
                dataset = parse_whole(data)
                if str(dataset.get("SOPClassUID", "")) != SEG_STORAGE:
                    raise ImageLeftOut(Reason.NOT_A_MASK)
                for series in dataset.get("ReferencedSeriesSequence", []):
                    found["series"].append(str(series.SeriesInstanceUID))
                    instances = series.get("ReferencedInstanceSequence", [])
                    found["instances"] += [str(one.ReferencedSOPInstanceUID) for one in instances]
            except imaging.READING_ERRORS:
                raise ImageLeftOut(Reason.NOT_A_MASK) from None
        return found


@dataclass(frozen=True)
class Place:
    """Where a mask has to lie: an image's shape as it is kept, the matrix of its file, of a volume the affine (12 numbers)."""

    shape: tuple[int, ...]
    matrix: tuple[int, ...]
    affine: tuple[float, ...]

    @property
    def to_mm(self) -> Float64:
        return np.array(self.affine, np.float64).reshape(3, 4)


@dataclass(frozen=True)
class Make:
    """The bits of one mask on the voxels of its image, into `cache` under `name`."""

    item: Item
    sha256: str
    masks: MaskMap
    place: Place
    cache: Cache
    name: str

    light = False

    @property
    def seconds(self) -> float:
        return FILE_S * 2

    def run(self) -> Answer:
        data, names = same(self.item, self.sha256), sorted(self.masks.structures)
        if nifti.looks_like_nifti(data):
            values, affine = nifti.read_labels(data)
            bits, annotated = self._laid(_of_values(values, self.masks), affine), names
        else:
            bits, annotated = _of_segments(data, self.masks, self.place)
        if not bits.any() and self.masks.empty == "refused":
            raise ImageLeftOut(Reason.MASK_EMPTY)
        self.cache.write(self.name, bits)
        present = [name for number, name in enumerate(names) if bool((bits >> number & 1).any())]
        return {"content": content_of(bits), "annotated": annotated, "present": present}

    def _laid(self, bits: Bits, affine: Float64) -> Bits:
        """Bits (D, H, W) of a NIfTI file on the voxels of the image."""
        if not self.place.affine:
            return _on_plane(bits, self.place)
        where, shape = self.place.to_mm, self.place.shape
        _require_same_box((where, shape), (affine, bits.shape))
        inverse = np.linalg.inv(np.vstack([affine, [0, 0, 0, 1]]))[:3]
        rows, columns = (part.ravel() for part in np.meshgrid(*map(np.arange, shape[1:]), indexing="ij"))
        made = np.zeros(shape, np.uint8)
        for number in range(shape[0]):
            points = where @ np.stack([np.full(rows.size, number), rows, columns, np.ones(rows.size)])
            made[number] = looked_up(bits, inverse, points).reshape(shape[1:])
        return made


def _on_plane(bits: Bits, place: Place) -> Bits:
    """A mask (1, H, W) of a radiograph as (H, W), which has to be the matrix of the file, or of what is kept of it."""
    wanted = place.matrix or place.shape
    if len(bits) != 1 or bits.shape[1:] != wanted:
        raise ImageLeftOut(Reason.MASK_GEOMETRY)
    plane: Bits = bits[0]
    return plane


def _of_values(values: npt.NDArray[np.int32], masks: MaskMap) -> Bits:
    """Bits for whole numbers. Raises ImageLeftOut(mask_values) for one that is neither 0 nor named."""
    found = np.zeros(values.shape, np.uint8)
    for value in np.unique(values).tolist():
        if value == 0 or value in masks.ignored:
            continue
        bit = _bit(masks, [value])
        if not bit:
            raise ImageLeftOut(Reason.MASK_VALUES)
        found[values == value] |= bit
    return found


def _bit(masks: MaskMap, words: list[int | str]) -> int:
    """The bits of the structures that any of `words` stands for."""
    plain = {word.strip().casefold() if isinstance(word, str) else word for word in words}
    bits = 0
    for number, name in enumerate(sorted(masks.structures)):
        own = {word.strip().casefold() if isinstance(word, str) else word for word in masks.structures[name]}
        bits |= (1 << number) if own & plain else 0
    return bits


def _require_same_box(image: tuple[Float64, tuple[int, ...]], mask: tuple[Float64, tuple[int, ...]]) -> None:
    """Raise ImageLeftOut(mask_geometry) unless both fill the same box, each corner to half a voxel of the coarser."""
    corners = []
    for affine, shape in (image, mask):
        ends = np.array([[(-0.5, size - 0.5)[(n >> axis) & 1] for axis, size in enumerate(shape)] for n in range(8)])
        corners.append(ends @ affine[:, :3].T + affine[:, 3])
    room = max(float(np.linalg.norm(affine[:, :3], axis=0).max()) for affine, _ in (image, mask)) / 2
    away = np.linalg.norm(corners[0][:, None] - corners[1][None], axis=2)
    if max(away.min(axis=0).max(), away.min(axis=1).max()) > room + 1e-3:
        raise ImageLeftOut(Reason.MASK_GEOMETRY)


def _of_segments(data: bytes, masks: MaskMap, place: Place) -> tuple[Bits, list[str]]:
    """Bits of a DICOM segmentation on the voxels of its image, and the structures that its segments describe."""
    from pydicom.pixels import pixel_array

    with quiet_reading():
        try:
            dataset = parse_whole(data)
            bits_of = _segment_bits(dataset, masks)
            kind, count = str(dataset.get("SegmentationType", "")), int(dataset.get("NumberOfFrames") or 1)
            if kind not in ("BINARY", "FRACTIONAL") or not 0 < count <= FRAMES_MAX:
                raise ImageLeftOut(Reason.NOT_A_MASK)
            matrix = (int(dataset.Rows), int(dataset.Columns))
            if matrix != ((place.matrix or place.shape) if not place.affine else place.shape[1:]):
                raise ImageLeftOut(Reason.MASK_GEOMETRY)
            frames = np.asarray(pixel_array(dataset, raw=True)).reshape(count, *matrix)
            half = 1 if kind == "BINARY" else (int(dataset.MaximumFractionalValue) + 1) // 2
            made = np.zeros(place.shape if place.affine else matrix, np.uint8)
            for number, facts in enumerate(dataset.PerFrameFunctionalGroupsSequence):
                segment = int(_fact(facts, dataset, "SegmentIdentificationSequence").ReferencedSegmentNumber)
                plane = made[_slice_of(facts, dataset, place)] if place.affine else made
                plane[frames[number] >= half] |= bits_of[segment]
        except imaging.READING_ERRORS:
            raise ImageLeftOut(Reason.UNREADABLE_PIXELS) from None
    described = 0
    for bit in bits_of.values():
        described |= bit
    return made, [name for number, name in enumerate(sorted(masks.structures)) if described >> number & 1]


def _segment_bits(dataset: Any, masks: MaskMap) -> dict[int, int]:
    """Segment Number -> the bits of its structures, 0 of one that is ignored. Raises ImageLeftOut(mask_values) for another."""
    found: dict[int, int] = {}
    ignored = {word.strip().casefold() if isinstance(word, str) else word for word in masks.ignored}
    for segment in dataset.SegmentSequence:
        number, label = int(segment.SegmentNumber), str(segment.SegmentLabel).strip().casefold()
        found[number] = _bit(masks, [number, label])
        if not found[number] and not {number, label} & ignored:
            raise ImageLeftOut(Reason.MASK_VALUES)
    return found


def _slice_of(facts: Any, dataset: Any, place: Place) -> int:
    """The slice of the volume that a frame lies on. Raises ImageLeftOut(mask_geometry) if it is none of them."""
    corner = np.array([float(v) for v in _fact(facts, dataset, "PlanePositionSequence").ImagePositionPatient])
    turned = [float(v) for v in _fact(facts, dataset, "PlaneOrientationSequence").ImageOrientationPatient]
    spacing = [float(v) for v in _fact(facts, dataset, "PixelMeasuresSequence").PixelSpacing]
    where = place.to_mm
    inverse = np.linalg.inv(np.vstack([where, [0, 0, 0, 1]]))[:3]
    rows, columns = np.array(turned[3:]) * spacing[0], np.array(turned[:3]) * spacing[1]
    # The frame's first pixel and the steps from it, in voxels of the image: (slice, 0, 0), one row down, one column on.
    first = inverse @ np.append(corner, 1.0)
    steps = np.stack([inverse[:, :3] @ rows, inverse[:, :3] @ columns])
    number = round(float(first[0]))
    there = np.abs(first - [number, 0, 0]).max() <= PLACE_VOXELS
    same_steps = np.abs(steps * np.array(place.shape[1:])[:, None] - np.eye(3)[1:] * np.array(place.shape[1:])[:, None])
    if not there or same_steps.max() > 0.5 or not 0 <= number < place.shape[0]:
        raise ImageLeftOut(Reason.MASK_GEOMETRY)
    return number


def _fact(facts: Any, dataset: Any, name: str) -> Any:
    """The functional group `name` of a frame: its own, or that which all frames share."""
    return (facts.get(name) or dataset.SharedFunctionalGroupsSequence[0][name].value)[0]


class _Looked(Document):
    sha256: Digest
    series: Uids
    instances: Uids


class _Made(Document):
    content: Digest
    annotated: list[str]
    present: list[str]


_LOOKS: TypeAdapter[Any] = TypeAdapter(_Looked | LeftOut)
_MAKES: TypeAdapter[Any] = TypeAdapter(_Made | LeftOut)


# Matching ------------------------------------------------------------------------------------------------------------


def ingest(masks: MaskMap, root: Path, index: Index, readers: Readers, tell: Callable[[int, int], None]) -> Masks:
    """Match every mask below `masks.folder` to an image of `index`, store what can be used, and write masks.json.

    What was made before of the same files is not made again. Raises DataError if there is no such folder, OSError if the disk is
    full; one bad mask never raises.
    """
    key = str(index.cache.key or "")
    found = Masks(index.state, sorted(masks.structures), cache_key=key)
    before, cache = _before(index.state), cache_of(index.state, key)
    cache.state.mkdir(mode=0o700, exist_ok=True)
    items = list(Folder(root / masks.folder).items())
    found.left_out = {item.name: item.reason for item in items if item.reason is not None}
    whose = _matched([item for item in items if item.reason is None], _Images.of(index), readers, found)
    makes = {}
    for image, (item, sha256) in whose.items():
        place = Place(image.shape, image.matrix, image.affine)
        text = f"{masks.model_dump_json(exclude={'folder'})} {place} {sha256}"
        name = hashlib.sha256(RECIPE + b"\n" + text.encode()).hexdigest()
        known = before.get(image.cache)
        if known is not None and known.cache == name and cache.has(name):
            found.taken[image.cache] = known
        else:
            makes[image.cache] = (item.name, Make(item, sha256, masks, place, cache, name))
    done, total = len(found.taken), len(whose)
    tell(done, total)
    for of, answer in readers.run((of, task) for of, (_, task) in makes.items()):
        made, (file, task) = checked(_MAKES, answer), makes[of]
        if "reason" in made:
            found.left_out[file] = Reason(made["reason"])
        else:
            found.taken[of] = Mask(task.name, made["content"], made["annotated"], made["present"])
        done += 1
        tell(done, total)
    found.store()
    cache.keep({mask.cache for mask in found.taken.values()})
    return found


def _before(state: Path) -> dict[str, Mask]:
    try:
        return Masks.open(state).taken
    except CacheLost:
        return {}  # everything is made anew


@dataclass(frozen=True)
class _Images:
    """Images by what a mask may name them with; where several share a name, it names none."""

    by_uid: dict[str, list[IndexedImage]]
    by_name: dict[str, list[IndexedImage]]

    @classmethod
    def of(cls, index: Index) -> "_Images":
        by_uid: dict[str, list[IndexedImage]] = {}
        by_name: dict[str, list[IndexedImage]] = {}
        for image in index.images():
            for uid in {image.series_uid, *([] if image.is_volume else [image.sop_uid])} - {""}:
                by_uid.setdefault(uid, []).append(image)
            by_name.setdefault(_stem(image.file), []).append(image)
        return cls(by_uid, by_name)

    def named(self, item: Item) -> IndexedImage | None:
        stem = _stem(item.name)
        return self._only(self.by_uid.get(stem.rpartition("/")[2], self.by_name.get(stem, [])))

    def referred(self, looked: Answer) -> IndexedImage | None:
        of_instances = {one.cache: one for uid in looked["instances"] for one in self.by_uid.get(uid, [])}
        of_series = {one.cache: one for uid in looked["series"] for one in self.by_uid.get(uid, [])}
        return self._only(list((of_instances or of_series).values()))

    @staticmethod
    def _only(found: list[IndexedImage]) -> IndexedImage | None:
        return found[0] if len(found) == 1 else None


def _stem(name: str) -> str:
    """A path without the endings of masks and images; dots of a UID are no ending."""
    for ending in (".gz", ".nii", ".dcm", ".png", ".jpg", ".jpeg"):
        if name.lower().endswith(ending):
            name = name[: -len(ending)]
    return name


def _matched(
    items: list[Item], images: _Images, readers: Readers, found: Masks
) -> dict[IndexedImage, tuple[Item, str]]:
    """The one mask of each image that has one, with its SHA-256; the others are noted in `found`."""
    whose: dict[IndexedImage, list[tuple[Item, str]]] = {}
    for item, answer in readers.run((item, Look(item)) for item in items):
        looked = checked(_LOOKS, answer)
        if "reason" in looked:
            found.left_out[item.name] = Reason(looked["reason"])
            continue
        image = images.referred(looked) if looked["series"] or looked["instances"] else images.named(item)
        if image is None:
            found.left_out[item.name] = Reason.MASK_WITHOUT_IMAGE
        else:
            whose.setdefault(image, []).append((item, looked["sha256"]))
    for several in whose.values():
        if len(several) > 1:
            found.left_out |= {item.name: Reason.MASK_TWICE for item, _ in several}
    return {image: one[0] for image, one in sorted(whose.items(), key=lambda p: p[0].file) if len(one) == 1}
