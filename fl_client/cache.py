"""Pixels on the disk under names that are hashes: written in one step, held against their content when read, locked if asked for.

With a key (`data.cache_key` in site.yaml) every file is encrypted and bound to its name, and nothing of an image reaches the disk
otherwise; what is read then lies in memory. Without one, arrays are memory-mapped. The key is worth as much as the place where it
lies: on the same disk it protects nothing but copies of the cache.
"""

import contextlib
import functools
import hashlib
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from privacy import keys
from privacy.errors import CacheLost, SealBroken

Array = npt.NDArray[Any]
SCALE = 65535  # of pixels in 0..1 as they are kept, in 16 bits: finer than any detector, half the size of float32
KEY_LABEL = b"isocenter/v1/cache-key\n"


@dataclass(frozen=True)
class Cache:
    """The cache below `state`; `key`: the file with the key that its files are locked with, or None."""

    state: Path
    key: Path | None = None

    @property
    def folder(self) -> Path:
        return self.state / "cache"

    def path(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}{self._ending}"

    @functools.cached_property
    def _ending(self) -> str:
        """With the beginning of the key's hash: under another key nothing is there, and everything is made again."""
        if self.key is None:
            return ".npy"
        return f".{keys.digest(KEY_LABEL + self._secret)[:16]}.locked"

    @property
    def _secret(self) -> bytes:
        """Raises CacheLost if the key is gone, KeyFileUnsafe if others may use it."""
        if self.key is None or not self.key.is_file():
            raise CacheLost(f"{self.key}: the key of the cache is not there")
        return keys.locking_key(self.key)

    def has(self, name: str) -> bool:
        path = self.path(name)
        return path.is_file() and path.stat().st_size > 0

    def write(self, name: str, stored: Array) -> None:
        """Raises OSError if the disk is full."""
        with self._part(name) as part, part.open("wb") as file:
            if self.key is None:
                np.save(file, stored, allow_pickle=False)
                return
            plain = io.BytesIO()
            np.save(plain, stored, allow_pickle=False)
            file.write(keys.lock(self._secret, plain.getvalue(), _about(name)))

    def fill(self, name: str, shape: tuple[int, ...], dtype: Any, work: Callable[[Array], None]) -> str:
        """Let `work` fill an array of that shape, store it, and return its content's hash.

        On the disk from the beginning where it is not locked, so that a long series takes no memory. What `work` raises leaves
        nothing behind; raises OSError if the disk is full.
        """
        if self.key is not None:
            made: Array = np.empty(shape, dtype)
            work(made)
            self.write(name, made)
            return content_of(made)
        with self._part(name) as part:
            made = np.lib.format.open_memmap(part, mode="w+", dtype=dtype, shape=shape)
            work(made)
            content = content_of(made)
            made.flush()
            return content

    def read(self, name: str, content: str) -> Array:
        """What was stored; raises CacheLost unless it is there and unchanged: disks forget, and nobody sees a wrong grey."""
        path = self.path(name)
        try:
            if self.key is None:
                stored: Array = np.load(path, mmap_mode="r", allow_pickle=False)
            else:
                locked = path.read_bytes()
                stored = np.load(io.BytesIO(keys.unlock(self._secret, locked, _about(name))), allow_pickle=False)
            sound = content_of(stored) == content
        except (OSError, ValueError, EOFError, SealBroken):
            sound = False
        if not sound:
            raise CacheLost(f"{path}: the cached image is missing or damaged")
        return stored

    def keep(self, names: set[str]) -> None:
        """Remove every file but those of `names`."""
        wanted = {self.path(name).name for name in names}
        for path in self.folder.glob("??/*"):
            if path.name not in wanted:
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _part(self, name: str) -> Iterator[Path]:
        """A file for this user alone, which gets its name when it is whole and on the disk, or is removed."""
        path = self.path(name)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        part = path.with_name(f"{path.stem}.{os.getpid()}.part")
        try:
            os.close(os.open(part, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600))
            yield part
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(path)
        except OSError as error:
            # A full disk is nobody's bad image; it ends the run, which goes on when there is room.
            raise OSError(error.errno, f"the cache cannot be written: {error.strerror}") from None
        finally:
            part.unlink(missing_ok=True)


def content_of(stored: Array) -> str:
    """The SHA-256 of shape and values, by which equal images are known, and damaged ones."""
    digest = hashlib.sha256(repr(stored.shape).encode())
    for part in stored if stored.ndim > 2 else [stored]:  # a volume is hashed slice by slice, without a copy of it
        digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()


def _about(name: str) -> bytes:
    return b"isocenter/v1/cache " + name.encode()
