"""State files: written whole or not at all, faults of a disk named, and older layouts brought forward with a copy kept.

What counts as written is on the disk with its name: content flushed, renamed in one step, folder flushed. A disk that is full,
read-only or failing is DiskUnusable, whoever meets it; nothing is half written then, and what was there before stays.

Every state file carries the version of its layout. One of a later version is NewerVersion and is not touched; an earlier one is
brought forward by the module that owns it, after `keep_copy_of_database` (NAME.v1 beside NAME, for a way back).
"""

import contextlib
import errno
import os
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from privacy.errors import DiskUnusable, DocumentError, NewerVersion

_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG}
# What SQLite says when the file may be as good as ever and the disk below it is not.
SQLITE_UNUSABLE = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN}
BUSY_S = 30.0


def write_file(path: Path, content: bytes, mode: int, *, replace: bool = True) -> None:
    """Put `content` at `path` in one step; after a crash the old or the whole new content is there.

    Without `replace`, FileExistsError if something is there already. Raises DiskUnusable.
    """
    with faults_named(path):
        make_folder(path.parent)
        part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if replace:
                part.replace(path)
            else:
                path.hardlink_to(part)  # fails if `path` exists, whoever made it and whenever
        finally:
            with contextlib.suppress(OSError):  # on a failing disk, the first fault is the one to name
                part.unlink(missing_ok=True)
        flush_folder(path.parent)


def make_folder(folder: Path) -> None:
    """See to a folder (mode 0700) whose name survives a power loss."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)
        flush_folder(folder.parent)


def flush_folder(folder: Path) -> None:
    """Make names created or replaced in `folder` survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(folder: Path, name: str) -> None:
    """Remove what writers of `name` left behind when they were killed. Only for whoever alone writes it."""
    for part in folder.glob(f".{name}.*.part"):
        part.unlink(missing_ok=True)


@contextmanager
def faults_named(path: Path) -> Iterator[None]:
    """Turns what the system says of a full, read-only or failing disk into DiskUnusable; other errors pass."""
    try:
        yield
    except DiskUnusable:
        raise
    except OSError as error:
        if error.errno not in _FAULTS:
            raise
        raise DiskUnusable(f"{path} cannot be written: {error.strerror}", error.errno) from None


@contextmanager
def sqlite_faults_named(path: Path) -> Iterator[None]:
    """The same for a state file of SQLite; DocumentError if the file is damaged or held by somebody else for long."""
    try:
        yield
    except sqlite3.IntegrityError:
        raise
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF  # without the extended part
        if code in SQLITE_UNUSABLE:
            raise DiskUnusable(f"{path} cannot be written: {error}") from None
        raise DocumentError(
            f"{path} cannot be used: {error}",
            remedy="Restore the file from a backup if it is damaged; then start again.",
        ) from None


def require_known(path: Path, found: object, newest: int) -> None:
    """Raise NewerVersion if `found`, the version that a state file carries, is later than what is written here."""
    if type(found) is int and found > newest:
        raise NewerVersion(f"{path} has layout {found}, and this version of Isocenter reads layouts up to {newest}")


def keep_copy_of_database(path: Path, version: int) -> Path:
    """A copy of a SQLite file before it is brought forward, NAME.v<version> (0600); one that is there stays as it is.

    The file may be open: the copy has what was committed last, also if part of it stands in a log beside it.
    """
    copy = path.with_name(f"{path.name}.v{version}")
    if not copy.exists():
        with closing(sqlite3.connect(path, timeout=BUSY_S)) as source:
            content = source.serialize()
        write_file(copy, content, 0o600)
    return copy
