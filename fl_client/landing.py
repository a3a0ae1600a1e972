"""The landing folder: an image has its name only when it is whole, on the disk, and the one that was asked for.

    data.folder/<2 hex>/<64 hex>.dcm   one image each, 0600, named by a hash: a path says nothing of anybody
    data.folder/.fetching/             what is being written now; emptied when a fetch begins

What arrives is written as it came. Of its header only what stands before the Study Instance UID is parsed here, to know whose
image it is; pixels and everything else are left to the confined processes of `fl-client ingest`.
"""

import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydicom.dataelem import RawDataElement
from pydicom.filereader import read_file_meta_info, read_partial
from pydicom.tag import BaseTag, Tag

from fl_client.archive import SOP_CLASSES, NotFetched, Reason
from fl_client.sources import FILE_BYTES_MAX
from privacy import disk
from privacy.errors import DataError

NAME = b"isocenter/v1/fetched"  # changes whenever the same image would get another name
DEFLATED = "1.2.840.10008.1.2.1.99"
SYNTAX, SOP_CLASS, SOP_UID, STUDY_UID = 0x00020010, 0x00080016, 0x00080018, 0x0020000D


@dataclass
class Landing:
    """Where images arrive. `received` counts bytes of this process."""

    folder: Path
    received: int = 0

    @contextmanager
    def open(self) -> Iterator["Landing"]:
        """Make the folder private, and ours alone. Raises DataError if another fetch uses it."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        lock = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(
                    f"another fetch writes to {self.folder}", remedy="Wait for it; `fl-client fetch --status` shows it."
                ) from None
            shutil.rmtree(self._parts, ignore_errors=True)
            self._parts.mkdir(mode=0o700)
            yield self
        finally:
            shutil.rmtree(self._parts, ignore_errors=True)
            os.close(lock)

    @property
    def _parts(self) -> Path:
        return self.folder / ".fetching"

    @property
    def free_bytes(self) -> int:
        return shutil.disk_usage(self.folder).free

    def path(self, study: str, instance: str) -> Path:
        name = hashlib.sha256(NAME + f"\n{study}\n{instance}".encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.dcm"

    def has(self, study: str, instance: str) -> bool:
        return self.path(study, instance).is_file()

    def keep(self, study: str, instance: str, pieces: Iterator[bytes]) -> None:
        """Write one image, durably. Raises NotFetched if it is too large, no DICOM file or another one; OSError for the disk."""
        part = self._parts / f"{secrets.token_hex(8)}.part"
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                size = 0
                for piece in pieces:
                    size += len(piece)
                    self.received += len(piece)
                    if size > FILE_BYTES_MAX:
                        raise NotFetched(Reason.TOO_LARGE)
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            check_identity(part, study, instance)
            path = self.path(study, instance)
            if not path.parent.is_dir():
                path.parent.mkdir(mode=0o700)
                disk.flush_folder(self.folder)
            part.replace(path)
            disk.flush_folder(path.parent)
        finally:
            part.unlink(missing_ok=True)


def check_identity(path: Path, study: str, instance: str) -> None:
    """Raise NotFetched unless `path` is a DICOM file of that study and instance, and of a class that is copied."""
    try:
        with path.open("rb") as file:
            if file.read(132)[128:] != b"DICM":
                raise NotFetched(Reason.MALFORMED)
            syntax = _text(read_file_meta_info(path), SYNTAX)
            if not syntax:
                raise NotFetched(Reason.MALFORMED)
            if syntax == DEFLATED:  # deflate makes many gigabytes of a few bytes, and pydicom takes them all at once
                raise NotFetched(Reason.UNSUPPORTED)
            file.seek(0)
            found = read_partial(file, stop_when=_beyond, specific_tags=[SOP_CLASS, SOP_UID, STUDY_UID])
        sop_class, sop_uid, study_uid = (_text(found, tag) for tag in (SOP_CLASS, SOP_UID, STUDY_UID))
    except NotFetched:
        raise
    except Exception:  # pydicom raises whatever its parts raise for bytes that are no DICOM
        raise NotFetched(Reason.MALFORMED) from None
    if study_uid != study:
        raise NotFetched(Reason.WRONG_STUDY)
    if sop_uid != instance or sop_class not in SOP_CLASSES:
        raise NotFetched(Reason.WRONG_INSTANCE)


def _beyond(tag: BaseTag, _vr: str | None, _length: int) -> bool:
    return int(tag) > STUDY_UID


def _text(dataset: Any, tag: int) -> str:
    """A UID as it stands in the file; pydicom's own conversion would warn, and quote it."""
    if tag not in dataset:
        return ""
    element = dataset.get_item(Tag(tag))
    value = element.value
    if isinstance(element, RawDataElement) and isinstance(value, bytes):
        return value.decode("ascii", "replace").rstrip("\0 ")
    return str(value)
