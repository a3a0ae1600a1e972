"""The processes that open files: a look at each, then the pixels of what is taken. Decoders never run beside keys.

A file from an archive is foreign input to a dozen decoders written in C. Each reading process is confined by the kernel like the
process that trains (no network, no other program, the folder of keys hidden), may take so much memory and so long for one file;
one that crashes or hangs costs that file a reason, and a new one takes its place. What a process answers is JSON of a fixed
shape and never unpickled.

A file is read twice: at the first look its SHA-256 is noted, and before its pixels are used it is read again and must have the
same one, because three compressions decode damaged data without a word.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import resource
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Annotated, Any, Generic, Protocol, TypeVar

import numpy as np
from pydantic import Field, FiniteFloat, StringConstraints, TypeAdapter, model_validator

from fl_client import nifti
from fl_client.cache import SCALE, Cache, content_of
from fl_client.first_look import Header
from fl_client.headers import (
    Caption,
    look_at_dicom,
    look_at_picture,
    read_picture,
    read_radiograph,
    read_slice,
    volume_header,
)
from fl_client.sources import Item, Reason
from models import burned_in, volumes
from models.documents import Document
from models.imaging import quiet_reading
from privacy import annex_e
from privacy.errors import ImageLeftOut

FILE_S = 120.0  # for one file; the slowest radiograph takes two seconds
SLICE_S = 2.0  # more for each slice of a volume
MEMORY_BYTES = 6 * 1024**3  # beyond what it has when it starts: the largest volume, twice, and a decoder's scratch
ANSWER_BYTES_MAX = 1 << 20

Answer = dict[str, Any]
Key = TypeVar("Key")
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
BATCH = 16  # looks that are asked for at once


@dataclass(frozen=True)
class Reading:
    """How a radiograph is read: as the display its file names, as a picture, as one whose bright means air."""

    display: bool = False
    picture: bool = False
    inverted: bool = False


class Task(Protocol):
    """Something to be done with files; `seconds` is how long it may take."""

    @property
    def seconds(self) -> float: ...

    @property
    def light(self) -> bool:
        """Whether it takes about as long as asking for it, so that several are asked for at once."""

    def run(self) -> Answer:
        """Facts for the index. Raises ImageLeftOut."""


@dataclass(frozen=True)
class Look:
    """The first look at one file: its SHA-256, and its header or why it is left out."""

    item: Item
    format: str  # as in site.yaml
    caption: Caption | None = None  # of a picture or a NIfTI volume
    patient: str = ""  # who it is where a folder says so, and not the header
    require_deidentified: bool = False

    light = True

    @property
    def seconds(self) -> float:
        return FILE_S

    def run(self) -> Answer:
        data = self.item.read()
        found: Answer = {"sha256": hashlib.sha256(data).hexdigest()}
        try:
            header = self._header(data)
            if not header.patient and not self.patient:
                raise ImageLeftOut(Reason.NO_PATIENT)
        except ImageLeftOut as refusal:
            return found | {"reason": str(Reason(refusal.reason))}
        return found | {"header": header.to_json() | ({"patient": self.patient} if self.patient else {})}

    def _header(self, data: bytes) -> Header:
        if self.format == "nifti":
            if not nifti.looks_like_nifti(data):
                raise ImageLeftOut(Reason.NOT_NIFTI)
            return volume_header(self.caption or Caption(None, None))
        if self.format == "pictures":
            return look_at_picture(data, self.caption or Caption(None, None))
        return look_at_dicom(data, annex_e.identifying if self.require_deidentified else None)


@dataclass(frozen=True)
class Radiograph:
    """The pixels of one file, into `cache` under `name`."""

    item: Item
    sha256: str
    cache: Cache
    name: str
    longest_side_px: int
    reading: Reading = Reading()

    light = False

    @property
    def seconds(self) -> float:
        return FILE_S

    def run(self) -> Answer:
        data, how = same(self.item, self.sha256), self.reading
        if how.picture:
            found = read_picture(data, self.longest_side_px, inverted=how.inverted)
        else:
            found = read_radiograph(data, self.longest_side_px, display=how.display)
        stored = np.rint(found.pixels * SCALE).astype(np.uint16)
        self.cache.write(self.name, stored)
        return {
            "content": content_of(stored),
            "shape": list(stored.shape),
            "spacing_mm": found.spacing_mm,
            "low": found.low,
            "high": found.high,
            "text": burned_in.text_score(found.pixels),
            "matrix": list(found.matrix),
        }


@dataclass(frozen=True)
class SlicesOfVolume:
    """The slices of one volume in order, into `cache` under `name` as int16 (D, H, W) in Hounsfield units."""

    items: list[Item]
    sha256: list[str]
    cache: Cache
    name: str
    size: tuple[int, int]

    light = False

    @property
    def seconds(self) -> float:
        return FILE_S + SLICE_S * len(self.items)

    def run(self) -> Answer:
        return _volume(self.cache, self.name, (len(self.items), *self.size), self._fill)

    def _fill(self, made: volumes.Int16) -> None:
        for number, (item, sha256) in enumerate(zip(self.items, self.sha256, strict=True)):
            plane = read_slice(same(item, sha256))
            if plane.shape != self.size:
                raise ImageLeftOut(Reason.UNREADABLE_PIXELS)
            made[number] = plane


@dataclass(frozen=True)
class VolumeFile:
    """One NIfTI file, into `cache` under `name` as int16 (D, H, W) in Hounsfield units."""

    item: Item
    sha256: str
    cache: Cache
    name: str

    light = False

    @property
    def seconds(self) -> float:
        return FILE_S + SLICE_S * self.item.size / 2**19  # a slice of 512 x 512

    def run(self) -> Answer:
        found, affine = nifti.read(same(self.item, self.sha256))

        def fill(made: volumes.Int16) -> None:
            made[:] = found

        where = volumes.Stack([], affine, volumes.tilt_of(affine))
        return _volume(self.cache, self.name, found.shape, fill) | {
            "affine": [float(value) for value in affine.ravel()],
            "spacing_mm": [round(value, 6) for value in where.spacing_mm],
            "tilt_degrees": round(where.tilt_degrees, 3),
        }


def _volume(cache: Cache, name: str, shape: tuple[int, ...], fill: Callable[[volumes.Int16], None]) -> Answer:
    ends: list[float] = []

    def work(made: volumes.Int16) -> None:
        fill(made)
        volumes.require_air(made)
        ends.extend(float(v) for v in np.percentile(made[:: max(1, len(made) // 16), ::4, ::4], [0.5, 99.5]))

    content = cache.fill(name, shape, np.int16, work)
    return {"content": content, "shape": list(shape), "low": ends[0], "high": ends[1], "text": 0.0}


def same(item: Item, sha256: str) -> bytes:
    """The bytes of `item`, which must be those of the first look."""
    data = item.read()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ImageLeftOut(Reason.CHANGED)
    return data


def answer(task: Task) -> Answer:
    """What `run` gives, with a reason where it raised one."""
    try:
        return task.run()
    except ImageLeftOut as refusal:
        return {"reason": str(Reason(refusal.reason))}


class LeftOut(Document):
    reason: Reason
    sha256: Digest | None = None


class _Seen(Document):
    sha256: Digest
    header: Header

    @model_validator(mode="after")
    def _whole(self) -> "_Seen":
        if (len(self.header.plane), len(self.header.size)) not in ((0, 0), (11, 2)):
            raise ValueError("no place of a slice")
        return self


class _Made(Document):
    content: Digest
    shape: Annotated[list[int], Field(min_length=2, max_length=3)]
    low: FiniteFloat
    high: FiniteFloat
    text: FiniteFloat
    spacing_mm: Annotated[list[FiniteFloat], Field(min_length=2, max_length=3)] | None = None
    affine: Annotated[list[FiniteFloat], Field(min_length=12, max_length=12)] | None = None
    tilt_degrees: FiniteFloat | None = None
    matrix: Annotated[list[int], Field(min_length=2, max_length=2)] | None = None


_LOOKS: TypeAdapter[Any] = TypeAdapter(_Seen | LeftOut)
_MAKES: TypeAdapter[Any] = TypeAdapter(_Made | LeftOut)


def seen(found: Answer) -> Answer:
    """`found` if a look answers so, else decoder_failed: a process that a file has taken over must not spoil the index."""
    return checked(_LOOKS, found)


def made(found: Answer) -> Answer:
    """The same for what answers that pixels were stored."""
    return checked(_MAKES, found)


def checked(form: TypeAdapter[Any], found: Answer) -> Answer:
    """`found` if it has this form."""
    try:
        form.validate_json(json.dumps(found), strict=True)
    except ValueError:
        return {"reason": str(Reason.DECODER_FAILED)}
    return found


class Readers:
    """`count` confined processes; `home` is the site's folder, whose keys they cannot open. A context manager.

    count 0: in this process, for what is known to be sound (rehearsals make their own images).
    """

    def __init__(self, count: int, home: Path) -> None:
        self.count, self.home = count, home
        self._context = multiprocessing.get_context("forkserver")
        self._readers: list[_Reader] = []

    def __enter__(self) -> "Readers":
        if self.count:
            # Forked from a process that has loaded everything once, and that never had a thread or a key.
            self._context.set_forkserver_preload(["fl_client.readers"])
        return self

    def __exit__(self, *_: object) -> None:
        for reader in self._readers:
            reader.end()

    def run(self, tasks: Iterable[tuple[Key, Task]]) -> Iterator[tuple[Key, Answer]]:
        """Each task's answer as it comes. A crashed or endless one answers decoder_failed. Raises OSError if the disk is full."""
        if not self.count:
            for key, task in tasks:
                yield key, answer(task)
            return
        waiting, busy = _Queue(tasks), dict[_Reader, list[tuple[Key, Task]]]()
        while True:
            while len(self._readers) < self.count:
                self._readers.append(_Reader(self._context, self.home))
            for reader in self._readers:
                if reader not in busy and (batch := waiting.next()):
                    busy[reader] = reader.give(batch)
            if not busy:
                return
            soonest = min(reader.deadline for reader in busy) - time.monotonic()
            ready = wait([reader.pipe for reader in busy], timeout=max(0.0, soonest))
            for reader in [one for one in busy if one.pipe in ready or one.deadline <= time.monotonic()]:
                batch = busy.pop(reader)
                answers = reader.take(len(batch)) if reader.pipe in ready else None
                if answers is None:
                    reader.end()
                    self._readers.remove(reader)
                    answers = waiting.alone(batch)
                elif following := waiting.next():  # before its answers are looked at, so that it need not wait for that
                    busy[reader] = reader.give(following)
                for (key, _), found in zip(batch, answers, strict=bool(answers)):
                    if "error" in found:
                        raise OSError(found["error"])
                    yield key, found


class _Queue(Generic[Key]):
    """What is still to be done, light tasks in batches."""

    def __init__(self, tasks: Iterable[tuple[Key, Task]]) -> None:
        self._tasks = iter(tasks)
        self._first: deque[tuple[Key, Task]] = deque()
        self._again: deque[tuple[Key, Task]] = deque()

    def next(self) -> list[tuple[Key, Task]]:
        """What one process does next; empty at the end."""
        if self._again:
            return [self._again.popleft()]
        batch: list[tuple[Key, Task]] = []
        while len(batch) < BATCH:
            following = self._first.popleft() if self._first else next(self._tasks, None)
            if following is None:
                break
            if batch and not following[1].light:
                self._first.append(following)
                break
            batch.append(following)
            if not following[1].light:
                break
        return batch

    def alone(self, batch: list[tuple[Key, Task]]) -> list[Answer]:
        """The answer for a task in which a process failed; of a batch nobody knows which, so all are tried one by one."""
        if len(batch) > 1:
            self._again.extend(batch)
            return []
        return [{"reason": str(Reason.DECODER_FAILED)}]


class _Reader:
    """One process and the pipe to it."""

    def __init__(self, context: Any, home: Path) -> None:
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, str(home)), daemon=True)
        self.process.start()
        theirs.close()
        self.deadline = 0.0

    def give(self, batch: list[tuple[Key, Task]]) -> list[tuple[Key, Task]]:
        """Ask for `batch`, which is returned."""
        with contextlib.suppress(OSError):  # it died meanwhile: `take` finds out
            self.pipe.send([task for _, task in batch])
        self.deadline = time.monotonic() + sum(task.seconds for _, task in batch)
        return batch

    def take(self, count: int) -> list[Answer] | None:
        """Its `count` answers; None if it died or answers anything else."""
        try:
            found = json.loads(self.pipe.recv_bytes(ANSWER_BYTES_MAX))
        except (EOFError, OSError, ValueError, RecursionError):
            return None
        good = isinstance(found, list) and len(found) == count and all(isinstance(one, dict) for one in found)
        return found if good else None

    def end(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.join()


def _serve(pipe: Connection, home: str) -> None:
    """A reading process: confined first, then tasks in and answers out until the pipe closes."""
    import torch

    from fl_client import sandbox
    from privacy.deidentify import guard

    guard(Path(home), native=True)
    keys = Path(home) / "keys"
    if keys.is_dir():
        sandbox.hide(str(keys))
    torch.set_num_threads(1)
    sandbox.confine()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + MEMORY_BYTES, hard))
    with contextlib.suppress(EOFError, KeyboardInterrupt), quiet_reading():
        while True:
            tasks = pipe.recv()  # from the process that started this one: what comes back is not unpickled
            pipe.send_bytes(json.dumps([_told(task) for task in tasks]).encode())


def _told(task: Task) -> Answer:
    try:
        return answer(task)
    except OSError as error:
        return {"error": str(error)}


def _address_space() -> int:
    """Bytes that this process has mapped; generous where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 16 * 1024**3
