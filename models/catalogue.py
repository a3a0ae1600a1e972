"""Models that a coordinator publishes: signed notices of them, and fetching one so that nothing unchecked is ever in its place.

A notice says which package (by SHA-256, size and signer) a name and version mean. The coordinator signs it with the key that
every party noted when it joined, so whoever stores or carries packages can exchange none. Guarantees of `fetch`:

1. A package has its name in the folder only after every byte was there and `Package.read` found it whole, signed by the
   researcher whom the notice names, of that very name, version, study, run and origin, tied to this coordinator's journal, and
   its weights those of its study's network. Whatever is wrong raises, and what was fetched is removed.
2. No more bytes are written than the notice announces, nor more than the caller permits; no name that came is used as a path.
3. What was fetched before a cut, or before this process was killed, is not fetched again.
"""

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from models.registry import ENDING, PACKAGE_BYTES_MAX, VERSIONS, Package, version_key
from privacy import disk, keys
from privacy.errors import DocumentError, MessageMalformed, PackageRefused, RunUnknown, Unreachable

VERSION = 1
BLOCK_BYTES = 1 << 20
_DIGEST = re.compile("[0-9a-f]{64}")
_RUN = re.compile("[a-z0-9-]{1,64}")
_TIME = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z", re.ASCII)


class Publisher(Protocol):
    """Of `privacy.calls.Caller`, what serves models."""

    def published(self) -> list[tuple[bytes, bytes]]: ...
    def fetch(self, sha256: str, first: int) -> Iterator[bytes]: ...


@dataclass(frozen=True)
class Notice:
    """What the coordinator signs of one published package. `parent`: SHA-256 of the weights it started from, or ""."""

    name: str
    version: str
    sha256: str
    size: int  # bytes
    signer: str  # fingerprint, as `registry.fingerprint`
    researcher: str
    digest: str
    run_id: str
    parent: str
    published: str  # UTC, 2026-01-31T12:00:00Z

    @classmethod
    def of(cls, package: Package, size: int, researcher: str, published: str) -> "Notice":
        facts = package.manifest
        return cls(
            name=facts["name"],
            version=facts["version"],
            sha256=package.sha256,
            size=size,
            signer=package.signer,
            researcher=researcher,
            digest=facts["digest"],
            run_id=facts["run_id"],
            parent=facts["lineage"]["parent"] or "",
            published=published,
        )

    def body(self) -> bytes:
        """Canonical JSON: what the signature with label MODEL_NOTICE covers."""
        return json.dumps({"form": VERSION, **asdict(self)}, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def read(cls, body: bytes) -> "Notice":
        """The notice behind `body()`; raises MessageMalformed for anything else, even another spelling of it."""
        try:
            found = json.loads(body)
            notice = cls(**{field: found[field] for field in cls.__dataclass_fields__})
            exact = notice.body() == body and notice._holds()
        except (ValueError, KeyError, TypeError, RecursionError, MessageMalformed):
            exact = False
        if not exact:
            raise MessageMalformed("this is no notice of a published model")
        return notice

    def _holds(self) -> bool:
        keys.check_name(self.name)
        keys.check_name(self.researcher)
        digests = (self.sha256, self.signer, self.digest, *([self.parent] if self.parent else []))
        return bool(
            type(self.size) is int
            and 0 < self.size <= PACKAGE_BYTES_MAX
            and all(_DIGEST.fullmatch(digest) for digest in digests)
            and VERSIONS.fullmatch(self.version)
            and _RUN.fullmatch(self.run_id)
            and _TIME.fullmatch(self.published)
        )

    @property
    def file_name(self) -> str:
        return f"{self.name}-{self.version}{ENDING}"


def published(publisher: Publisher, coordinator: keys.PublicKey) -> list[Notice]:
    """The notices of all published models, by name and version. Raises SignatureInvalid or MessageMalformed for a false one."""
    notices = []
    for body, signature in publisher.published():
        keys.verify(coordinator, keys.MODEL_NOTICE, body, signature)
        notices.append(Notice.read(body))
    if len({(notice.name, notice.version) for notice in notices}) != len(notices):
        raise MessageMalformed("the coordinator published two models under one name and version")
    return sorted(notices, key=lambda notice: (notice.name, version_key(notice.version)))


def find(publisher: Publisher, coordinator: keys.PublicKey, wanted: str) -> Notice:
    """The notice of `wanted`, NAME for the latest version or NAME@VERSION. Raises RunUnknown if there is none."""
    name, at, version = wanted.partition("@")
    known = [notice for notice in published(publisher, coordinator) if notice.name == name]
    fitting = [notice for notice in known if not at or notice.version == version]
    if not fitting:
        others = ", ".join(notice.version for notice in known)
        there = f"; of {name} there are {others}" if known else ""
        raise RunUnknown(f"no model {wanted!r} is published{there}", remedy="List them with `models`.")
    return fitting[-1]


def fetch(
    publisher: Publisher,
    notice: Notice,
    coordinator: keys.PublicKey,
    folder: Path,
    tell: Callable[[int], None] = lambda done: None,
    most: int = PACKAGE_BYTES_MAX,
) -> tuple[Path, Package]:
    """Fetch what `notice` announces into `folder` (see the top), where it may lie already; `tell` hears how many bytes are there.

    Raises PackageRefused, DocumentError if another file has its name, or Unreachable; after that one, call again to go on.
    """
    path = folder / notice.file_name
    if notice.size > most:
        raise PackageRefused(
            f"{notice.file_name} has {notice.size / 2**20:.0f} MiB, and at most {most / 2**20:.0f} MiB are taken",
            remedy="If the model is meant to be that large, permit it with --max-mib.",
        )
    if path.exists():
        package = checked(path, notice, coordinator)
        tell(notice.size)
        return path, package
    with disk.faults_named(path):
        folder.mkdir(parents=True, exist_ok=True)
        with _part(path.with_name(f".{path.name}.{notice.sha256[:12]}.part")) as (part, file):
            try:
                _complete(publisher, notice, file, tell)
                package = checked(part, notice, coordinator)
            except (PackageRefused, MessageMalformed):
                part.unlink(missing_ok=True)
                raise
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
            part.replace(path)
            disk.flush_folder(folder)
    return path, package


def checked(path: Path, notice: Notice, coordinator: keys.PublicKey) -> Package:
    """The package in `path`, which is the one that `notice` announces. Raises PackageRefused."""
    package = Package.open(path, trusted={notice.signer})
    if package.sha256 != notice.sha256:
        raise PackageRefused(f"{path.name}: its SHA-256 is not the one that the coordinator announced")
    announced = Notice.of(package, notice.size, notice.researcher, notice.published)
    differ = [name for name, value in asdict(announced).items() if value != getattr(notice, name)]
    if differ:
        raise PackageRefused(
            f"{path.name}: the package says another {', '.join(differ)} than the coordinator announced"
        )
    if package.coordinator != keys.point_hex(coordinator):
        raise PackageRefused(f"{path.name}: it is not tied to the journal of this consortium's coordinator")
    from models import exporting  # torch takes two seconds to load, and whoever only lists models needs none

    exporting.network(package)
    return package


def _complete(publisher: Publisher, notice: Notice, file: BinaryIO, tell: Callable[[int], None]) -> None:
    """Fetch what `file` lacks, and compare the SHA-256 of all of it. Goes on after a cut while each call brings anything."""
    hashed, size = hashlib.sha256(), 0
    while block := file.read(BLOCK_BYTES):
        hashed.update(block)
        size += len(block)
    while size < notice.size:
        tell(size)
        before, cut = size, None
        try:
            for data in publisher.fetch(notice.sha256, size):
                size += len(data)
                if size > notice.size:
                    raise PackageRefused(f"{notice.file_name}: more bytes came than the coordinator announced")
                file.write(data)
                hashed.update(data)
                tell(size)
        except Unreachable as error:
            cut = error
        file.flush()
        if size == before:
            raise Unreachable(
                f"{notice.file_name}: after {size} of {notice.size} bytes no more came" + (f" ({cut})" if cut else ""),
                remedy="Run the command again; it goes on where it stopped.",
            )
    if size > notice.size or hashed.hexdigest() != notice.sha256:
        raise PackageRefused(f"{notice.file_name}: its SHA-256 is not the one that the coordinator announced")


@contextmanager
def _part(part: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """What came of a package so far, from its beginning; one process at a time. Raises DocumentError if another one has it."""
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DocumentError(
                f"{part}: another process is fetching this model", remedy="Wait until it has ended."
            ) from None
        yield part, file
