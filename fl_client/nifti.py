"""NIfTI files as CT volumes: the header decides how much is unpacked, and the affine is turned into DICOM's coordinates.

nibabel reads the values; a compressed file is unpacked by us first, no further than its header promises, because a gzip file
can unpack to a thousand times its size.
"""

import struct
import zlib

import nibabel
import numpy as np
import numpy.typing as npt

from fl_client.sources import Reason
from models import volumes
from models.imaging import READING_ERRORS, quiet_reading
from models.volumes import Float64, Int16
from privacy.errors import ImageLeftOut

Int32 = npt.NDArray[np.int32]
GZIP = b"\x1f\x8b"
HEADER_BYTES = 352  # of NIfTI-1 with the mark of its extension; NIfTI-2 is for more than 32,767 voxels on an axis
VOXELS_MAX = 1_200_000_000  # 4000 slices of 548 x 548
MAGIC = (b"n+1\0",)


def looks_like_nifti(data: bytes) -> bool:
    """Whether the file begins as a NIfTI-1 file of one piece does, compressed or not."""
    try:
        head = _head(data)
    except ImageLeftOut:
        return False
    return len(head) >= HEADER_BYTES and head[344:348] in MAGIC


def read(data: bytes) -> tuple[Int16, Float64]:
    """Hounsfield units int16 (D, H, W) and the affine float64 (3, 4) to millimetres in DICOM's patient coordinates.

    Slices run along the file's third axis. Raises only ImageLeftOut.
    """
    whole, sizes = _whole(data, volumes.SLICES_MIN)
    with quiet_reading():
        made, affine = _decoded(whole, sizes)
    return made, _turned(affine)


def read_labels(data: bytes) -> tuple[Int32, Float64]:
    """Whole numbers int32 (D, H, W) of a mask as the file holds them, and the affine as `read` gives it; D is 1 of a picture.

    Raises only ImageLeftOut; mask_values for a number that is not whole.
    """
    whole, sizes = _whole(data, 1)
    with quiet_reading():
        try:
            image = nibabel.Nifti1Image.from_bytes(whole)
            values = np.asarray(image.dataobj, np.float64).reshape(sizes)
            affine = np.asarray(image.affine, np.float64)[:3]
        except (*READING_ERRORS, nibabel.filebasedimages.ImageFileError, nibabel.spatialimages.HeaderDataError):
            raise ImageLeftOut(Reason.UNREADABLE_PIXELS) from None
    if not (np.isfinite(values) & (values == np.rint(values)) & (np.abs(values) < 2**31)).all():
        raise ImageLeftOut(Reason.MASK_VALUES)
    return values.T.astype(np.int32), _turned(affine)


def _whole(data: bytes, slices_min: int) -> tuple[bytes, tuple[int, int, int]]:
    """The unpacked file and its sizes, found sound by its header."""
    if not looks_like_nifti(data):
        raise ImageLeftOut(Reason.NOT_NIFTI)
    head = _head(data)
    order = "<" if struct.unpack_from("<i", head, 0)[0] == 348 else ">"
    sizes = struct.unpack_from(f"{order}8h", head, 40)
    bits = struct.unpack_from(f"{order}h", head, 72)[0]
    offset = struct.unpack_from(f"{order}f", head, 108)[0]
    if slices_min == 1 and sizes[0] == 2:
        sizes = (3, *sizes[1:3], 1, *sizes[4:])
    if not (3 <= sizes[0] <= 4 and all(size > 0 for size in sizes[1:4]) and (sizes[0] == 3 or sizes[4] == 1)):
        raise ImageLeftOut(Reason.NO_GEOMETRY)
    voxels = sizes[1] * sizes[2] * sizes[3]
    if sizes[3] < slices_min:
        raise ImageLeftOut(Reason.TOO_FEW_SLICES)
    if voxels > VOXELS_MAX or sizes[3] > volumes.SLICES_MAX or not 0 < bits <= 64 or not HEADER_BYTES <= offset < 2**24:
        raise ImageLeftOut(Reason.TOO_LARGE)
    return _unpacked(data, int(offset) + voxels * bits // 8), (sizes[1], sizes[2], sizes[3])


def _turned(affine: Float64) -> Float64:
    if not np.isfinite(affine).all() or abs(float(np.linalg.det(affine[:, :3]))) < 1e-6:
        raise ImageLeftOut(Reason.NO_GEOMETRY)
    # NIfTI counts to the right, to the front and up; DICOM to the left, to the back and up. Its axes come in reverse order here.
    turned = affine[:, [2, 1, 0, 3]].copy()
    turned[:2] *= -1
    return turned


def _head(data: bytes) -> bytes:
    return _unpacked(data, HEADER_BYTES) if data[:2] == GZIP else data[:HEADER_BYTES]


def _unpacked(data: bytes, length: int) -> bytes:
    """The first `length` bytes of what the file holds; raises ImageLeftOut(truncated) if there are fewer."""
    if data[:2] == GZIP:
        unpacking = zlib.decompressobj(wbits=31)
        try:
            found = unpacking.decompress(data, length)
        except zlib.error:
            raise ImageLeftOut(Reason.UNREADABLE_PIXELS) from None
    else:
        found = data[:length]
    if len(found) < length:
        raise ImageLeftOut(Reason.TRUNCATED)
    return found


def _decoded(whole: bytes, sizes: tuple[int, ...]) -> tuple[Int16, Float64]:
    """Values as int16 (D, H, W), and the file's own affine float64 (3, 4)."""
    try:
        image = nibabel.Nifti1Image.from_bytes(whole)
        affine = np.asarray(image.affine, np.float64)[:3]
        values = np.asarray(image.dataobj).reshape(sizes)
        made = np.empty(sizes[::-1], np.int16)
        for number in range(sizes[2]):
            plane = np.nan_to_num(values[:, :, number].T.astype(np.float32), nan=volumes.AIR_HU)
            made[number] = volumes.hounsfield(plane, None)
    except (*READING_ERRORS, nibabel.filebasedimages.ImageFileError, nibabel.spatialimages.HeaderDataError):
        raise ImageLeftOut(Reason.UNREADABLE_PIXELS) from None
    return made, affine
