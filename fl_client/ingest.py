"""Images of a source become a cache and an index that stay at the site; every file is counted as taken or left out by name.

Each file is hashed, checked, decoded, brought to one polarity and to 0..1, reduced, and stored as 16-bit pixels under a name
that is a hash of the file and of everything that was done to it. The index (SQLite) holds one row per file. A second run
reads only what is new or changed and forgets what is gone. Each step is atomic: killed at any instant, `ingest` run again
goes on where it stopped. The cache holds images of patients: its folder is open to nobody else (0700, files 0600).
"""

import fcntl
import hashlib
import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fl_client.headers import Header, Reading, View, read_dicom, read_picture
from fl_client.site import Source
from fl_client.sources import Folder, Item, Reason
from models.labels import LabelMap, LabelTable, Matches, plain_key
from privacy.errors import CacheLost, DataError, ImageLeftOut, LabelTableError

__all__ = ["Index", "IndexedImage", "IngestReport", "Reason", "ingest"]

VERSION = 1  # of the index; another version is read anew from the source
PREPROCESSING = b"isocenter/v1/radiograph"  # changes whenever the same file would give other pixels
ROWS_PER_COMMIT = 32  # work lost by a kill: at most this many files are decoded twice
SCALE = 65535  # 16 bits: finer than any detector, half the size of float32

_COLUMNS = (
    "file TEXT PRIMARY KEY, size INTEGER NOT NULL, modified_ns INTEGER NOT NULL, sha256 TEXT NOT NULL, recipe TEXT NOT NULL, "
    "reason TEXT, cache TEXT, content TEXT, patient TEXT NOT NULL, study_uid TEXT NOT NULL, series_uid TEXT NOT NULL, "
    "sop_uid TEXT NOT NULL, accession TEXT NOT NULL, modality TEXT NOT NULL, view TEXT NOT NULL, "
    "manufacturer TEXT NOT NULL, row_mm REAL, column_mm REAL"
)


@dataclass(frozen=True)
class IndexedImage:
    """One image that was taken. `cache` names its pixels, `content` is their hash, `sha256` that of the file it came from."""

    file: str
    sha256: str
    cache: str
    content: str
    patient: str
    study_uid: str
    series_uid: str
    sop_uid: str
    accession: str
    modality: str
    view: View
    manufacturer: str
    spacing_mm: tuple[float, float] | None

    def key(self, matches: Matches) -> str:
        """What the key column of a label table is compared to, in normalised form."""
        value: str = getattr(self, matches if matches != "patient_id" else "patient")
        return plain_key(value, matches)


@dataclass(frozen=True)
class LabelCount:
    """How the label table fits the images. `unmapped` lists words that count as missing; it never leaves the site."""

    labelled: int
    unlabelled: int
    rows: int
    keys_without_image: int
    conflicts: int
    malformed: int
    without_key: int
    unmapped: dict[str, dict[str, int]]

    def to_json(self) -> dict[str, Any]:
        """Of the unmapped words only how many rows say them: in a wrong column they are names, and JSON is kept in files."""
        return vars(self) | {"unmapped": {target: sum(words.values()) for target, words in self.unmapped.items()}}


@dataclass(frozen=True)
class IngestReport:
    """What one run found. `found` = `taken` + everything in `reasons`; `read` of them were opened now, the rest was known."""

    found: int
    taken: int
    patients: int
    reasons: dict[Reason, int]
    read: int
    removed: int
    labels: LabelCount | None
    label_problem: str | None

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and words for `--json`; reasons by name, most frequent first."""
        return {
            "found": self.found,
            "taken": self.taken,
            "patients": self.patients,
            "left_out": {str(reason): count for reason, count in self.reasons.items()},
            "read_now": self.read,
            "removed": self.removed,
            "labels": self.labels.to_json() if self.labels else None,
            "label_problem": self.label_problem,
        }


class Index:
    """What `ingest` left behind, read once into memory; duplicates are decided here, so it is right at every instant."""

    def __init__(self, state: Path, images: list[IndexedImage], reasons: Counter[Reason], complete: bool) -> None:
        self.state, self.complete = state, complete
        self._images, self._reasons = images, reasons

    @classmethod
    def open(cls, state: Path) -> "Index":
        """The index below `state`. Raises CacheLost if there is none, or if it is damaged or of another version."""
        path = state / "index.sqlite"
        if not path.is_file():
            raise CacheLost(f"{state}: no images were ingested here")
        try:
            with closing(sqlite3.connect(path, timeout=30)) as database:
                database.row_factory = sqlite3.Row
                facts = _facts(database)
                if facts.get("version") != str(VERSION):
                    raise CacheLost(f"{path}: the index is of another version")
                images, reasons = _without_duplicates(database.execute("SELECT * FROM images ORDER BY file"))
        except sqlite3.Error as error:
            raise CacheLost(f"{path}: the index cannot be read ({error})") from None
        return cls(state, images, reasons, facts.get("complete") == "1")

    def images(self) -> list[IndexedImage]:
        """Every image taken, sorted by file."""
        return list(self._images)

    @property
    def taken(self) -> int:
        return len(self._images)

    @property
    def patients(self) -> int:
        return len({image.patient for image in self._images})

    def reasons(self) -> dict[Reason, int]:
        """Files left out by reason, most frequent first."""
        return dict(self._reasons.most_common())

    def pixels(self, image: IndexedImage) -> npt.NDArray[np.float32]:
        """float32 (H, W) in 0..1, bright is dense. Raises CacheLost if the file is gone or damaged."""
        path = cache_path(self.state, image.cache)
        try:
            stored = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            raise CacheLost(f"{path}: the cached image is missing or damaged") from None
        if stored.dtype != np.uint16 or stored.ndim != 2:
            raise CacheLost(f"{path}: this is no cached image")
        result: npt.NDArray[np.float32] = stored.astype(np.float32) / np.float32(SCALE)
        return result


def ingest(source: Source, root: Path, state: Path, progress: Callable[[int, int], None]) -> IngestReport:
    """Bring cache and index below `state` up to date with `source`; `root` is the folder that relative paths start from.

    `progress(done, total)` is called after each file. Raises DataError if the folder is missing, empty after it was not, or
    being ingested already; LabelTableError if pictures cannot be assigned to patients. One bad file never raises.
    """
    folder = Folder(root / source.folder)
    labels, problem = _labels(source, root)
    items = list(folder.items())
    _private_folder(state)
    _private_folder(state / "cache")
    read = 0
    with _only_one(state), closing(_Register(state)) as register:
        register.begin(f"{source.format} {folder.identity}", [item.name for item in items])
        for done, item in enumerate(items, start=1):
            intake = _Intake.of(source, item, labels)
            if not register.knows(item, intake.recipe):
                register.put(item, intake)
                read += 1
            progress(done, len(items))
        removed = register.finish()
    index = Index.open(state)
    count = label_count(index, labels) if labels else None
    return IngestReport(
        len(items),
        index.taken,
        index.patients,
        index.reasons(),
        read,
        removed,
        count,
        str(problem) if problem else None,
    )


def label_count(index: Index, labels: LabelTable) -> LabelCount:
    """How many images taken have a label for at least one target, and what of the table is of no use."""
    keys = [image.key(labels.mapping.matches) for image in index.images()]
    labelled = sum(any(label is not None for label in labels.lookup(key).values()) for key in keys)
    return LabelCount(
        labelled=labelled,
        unlabelled=len(keys) - labelled,
        rows=labels.rows,
        keys_without_image=len(labels.keys() - set(keys)),
        conflicts=labels.conflicts,
        malformed=labels.malformed,
        without_key=labels.without_key,
        unmapped={target: dict(words.most_common(20)) for target, words in labels.unmapped.items() if words},
    )


def cache_path(state: Path, key: str) -> Path:
    return state / "cache" / key[:2] / f"{key}.npy"


@dataclass(frozen=True)
class _Intake:
    """How one file is to be read; `recipe` names it, so that a change of any part reads the file again."""

    pictures: bool
    longest_side_px: int
    patient: str | None = None
    view: str | None = None

    @classmethod
    def of(cls, source: Source, item: Item, labels: LabelTable | None) -> "_Intake":
        if source.format != "pictures" or labels is None:
            return cls(False, source.longest_side_px)
        mapping = labels.mapping
        top, below, _ = item.name.partition("/")
        key = item.name if mapping.matches == "file" else top if below else ""
        patient = key if mapping.matches == "patient_id" else labels.patient_of(key)
        view = None if mapping.view is None else labels.view_of(key) or ""
        return cls(True, source.longest_side_px, patient, view)

    @property
    def pixels(self) -> bytes:
        """Names what is done to the pixels; part of the cache key."""
        return PREPROCESSING + f" longest_side_px={self.longest_side_px}".encode()

    @property
    def recipe(self) -> str:
        """Names everything that decides the row, as a hash: patient numbers need not stand in the index twice."""
        return hashlib.sha256(
            b"\n".join([self.pixels, repr((self.pictures, self.patient, self.view)).encode()])
        ).hexdigest()

    def read(self, data: bytes) -> Reading:
        if self.pictures:
            return read_picture(data, self.longest_side_px, self.patient, self.view)
        return read_dicom(data, self.longest_side_px)


class _Register:
    """The writing side of the index: one row per file, committed in small groups."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.uncommitted = 0
        path = state / "index.sqlite"
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        try:
            self.database = self._prepared(path)
        except sqlite3.DatabaseError:
            # Damaged, or made by another version: the source still has everything, so it is made anew.
            path.unlink()
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            self.database = self._prepared(path)

    @staticmethod
    def _prepared(path: Path) -> sqlite3.Connection:
        database = sqlite3.connect(path, timeout=30)
        try:
            database.row_factory = sqlite3.Row
            database.execute("CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL)")
            if _facts(database).get("version", str(VERSION)) != str(VERSION):
                raise sqlite3.DatabaseError("another version")
            database.execute(f"CREATE TABLE IF NOT EXISTS images ({_COLUMNS})")
            database.execute("INSERT OR IGNORE INTO facts VALUES ('version', ?)", (str(VERSION),))
            database.commit()
        except sqlite3.DatabaseError:
            database.close()
            raise
        return database

    def close(self) -> None:
        self.database.close()

    def begin(self, identity: str, names: Iterable[str]) -> None:
        """Refuse a folder that is suddenly empty; if the source is another one, trust no stored size and date."""
        self.names = set(names)
        known = self.database.execute("SELECT COUNT(*) FROM images WHERE cache IS NOT NULL").fetchone()[0]
        if known and not self.names:
            raise DataError(
                f"the data folder is empty, but {known} images were ingested from it before",
                remedy="Check that the share is mounted. To forget these images, remove the cache folder and ingest again.",
            )
        if _facts(self.database).get("source", identity) != identity:
            self.database.execute("UPDATE images SET modified_ns = -1")
        self._set(source=identity, complete="0")

    def knows(self, item: Item, recipe: str) -> bool:
        """True if the row of this file is up to date and its pixels are there."""
        row = self.database.execute(
            "SELECT size, modified_ns, recipe, reason, cache FROM images WHERE file = ?", (item.name,)
        ).fetchone()
        if row is None or (row["size"], row["modified_ns"], row["recipe"]) != (item.size, item.modified_ns, recipe):
            return False
        if item.reason is not None or row["cache"] is None:
            return bool(row["reason"] == item.reason or item.reason is None)
        path = cache_path(self.state, row["cache"])
        return path.is_file() and path.stat().st_size > 0

    def put(self, item: Item, intake: _Intake) -> None:
        """Read one file and store its row; its pixels are in the cache before the row names them."""
        row: dict[str, Any] = {
            **{"file": item.name, "size": item.size, "modified_ns": item.modified_ns, "recipe": intake.recipe},
            **{"sha256": "", "reason": None, "cache": None, "content": None, "row_mm": None, "column_mm": None},
        }
        header = Header()
        try:
            if item.reason is not None:
                raise ImageLeftOut(item.reason)
            data = _bytes_of(item)
            row["sha256"] = hashlib.sha256(data).hexdigest()
            reading = intake.read(data)
            header = reading.header
            row["cache"] = hashlib.sha256(intake.pixels + b"\n" + row["sha256"].encode()).hexdigest()
            row["content"] = _store(cache_path(self.state, row["cache"]), reading.pixels)
        except ImageLeftOut as refusal:
            row["reason"] = str(Reason(refusal.reason))
        for name in (field.name for field in fields(Header) if field.name != "spacing_mm"):
            row[name] = getattr(header, name)
        if header.spacing_mm:
            row["row_mm"], row["column_mm"] = header.spacing_mm
        places = ", ".join(f":{name}" for name in row)
        self.database.execute(f"INSERT OR REPLACE INTO images ({', '.join(row)}) VALUES ({places})", row)  # noqa: S608  our own names
        self.uncommitted += 1
        if self.uncommitted >= ROWS_PER_COMMIT:
            self.database.commit()
            self.uncommitted = 0

    def finish(self) -> int:
        """Forget files that are gone and remove pixels that no row names any more; the number of files forgotten."""
        stored = [row["file"] for row in self.database.execute("SELECT file FROM images")]
        gone = [(name,) for name in stored if name not in self.names]
        self.database.executemany("DELETE FROM images WHERE file = ?", gone)
        self._set(complete="1")
        named = {row["cache"] for row in self.database.execute("SELECT cache FROM images WHERE cache IS NOT NULL")}
        for path in (self.state / "cache").glob("??/*"):
            if path.stem not in named or path.suffix != ".npy":
                path.unlink(missing_ok=True)
        return len(gone)

    def _set(self, **facts: str) -> None:
        self.database.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", list(facts.items()))
        self.database.commit()
        self.uncommitted = 0


def _facts(database: sqlite3.Connection) -> dict[str, str]:
    return dict(database.execute("SELECT name, value FROM facts").fetchall())


def _without_duplicates(rows: Iterable[sqlite3.Row]) -> tuple[list[IndexedImage], Counter[Reason]]:
    """The first file of each image in the order given, and the count of everything else by reason.

    The same instance of the same patient, sent twice, is one image. So are equal pixels under two numbers: they are one
    exposure filed twice, and would otherwise stand on both sides of a split.
    """
    images: list[IndexedImage] = []
    reasons: Counter[Reason] = Counter()
    seen: set[tuple[str, str]] = set()
    for row in rows:
        if row["reason"] is not None:
            reasons[Reason(row["reason"])] += 1
            continue
        marks = {("pixels", row["content"])}
        if row["sop_uid"]:
            marks.add((row["patient"], row["sop_uid"]))
        if marks & seen:
            reasons[Reason.DUPLICATE] += 1
        else:
            names = [field.name for field in fields(IndexedImage) if field.name != "spacing_mm"]
            spacing = (row["row_mm"], row["column_mm"]) if row["row_mm"] else None
            images.append(IndexedImage(**{name: row[name] for name in names}, spacing_mm=spacing))
        seen |= marks
    return images, reasons


def _labels(source: Source, root: Path) -> tuple[LabelTable | None, LabelTableError | None]:
    """The label table, or why it cannot be read. DICOM can be ingested without; pictures cannot, it names the patients."""
    mapping: LabelMap = source.labels
    if source.format == "pictures":
        if mapping.matches not in ("file", "patient_id"):
            raise LabelTableError(f"pictures carry no {mapping.matches}; `matches` must be file or patient_id")
        if mapping.matches == "file" and mapping.patient is None:
            raise LabelTableError("pictures matched by file need `patient`, the column that names the patient")
    try:
        return LabelTable.read(root / mapping.table, mapping), None
    except LabelTableError as error:
        if source.format == "pictures":
            raise
        return None, error


def _bytes_of(item: Item) -> bytes:
    try:
        return item.path.read_bytes()
    except OSError:
        raise ImageLeftOut(Reason.UNREADABLE_FILE) from None


def _store(path: Path, pixels: npt.NDArray[np.float32]) -> str:
    """Write pixels as uint16 in one atomic step; the SHA-256 of shape and values, by which equal images are known."""
    stored = np.rint(pixels * SCALE).astype(np.uint16)
    _private_folder(path.parent)
    part = path.with_suffix(".part")
    with os.fdopen(os.open(part, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "wb") as file:
        np.save(file, stored, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    return hashlib.sha256(repr(stored.shape).encode() + stored.tobytes()).hexdigest()


def _private_folder(path: Path) -> None:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)


@contextmanager
def _only_one(state: Path) -> Iterator[None]:
    """Two ingests at once would remove each other's new pixels. The lock ends with the process, however that ends."""
    with os.fdopen(os.open(state / "ingest.lock", os.O_CREAT | os.O_RDWR, 0o600), "r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{state}: another ingest is running", remedy="Wait until it has ended.") from None
        yield
