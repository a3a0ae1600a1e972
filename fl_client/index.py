"""What `ingest` left behind at a site: which images there are, what is known of them, and where their pixels lie.

Two tables of one SQLite file. `files` has a row for each file of the source: its hash, and its header or why it is left out.
`images` has a row for each radiograph or volume made of them: its pixels in the cache, or why none could be made. Everything
here can be made again from the source, and it stays at the site: the folder is open to nobody else (0700, files 0600).
"""

import json
import os
import sqlite3
from collections import Counter
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fl_client.cache import SCALE, Cache
from fl_client.first_look import Header, View
from fl_client.sources import Item, Reason
from models.labels import Matches, plain_key
from privacy.errors import CacheLost, DataError

VERSION = 2  # of the index; another version is read anew from the source
ROWS_PER_COMMIT = 32  # work lost by a kill: at most so many images are read twice,
LOOKS_PER_COMMIT = 256  # ... and so many files looked at twice, which takes as long

_TABLES = (
    "CREATE TABLE IF NOT EXISTS files (file TEXT PRIMARY KEY, size INTEGER NOT NULL, modified_ns INTEGER NOT NULL, "
    "recipe TEXT NOT NULL, sha256 TEXT NOT NULL, reason TEXT, header TEXT)",
    "CREATE TABLE IF NOT EXISTS images (name TEXT PRIMARY KEY, recipe TEXT NOT NULL, members TEXT NOT NULL, reason TEXT, "
    "cache TEXT, facts TEXT)",
)


@dataclass(frozen=True)
class IndexedImage:
    """One radiograph or volume that was taken. `cache` names its pixels, `content` is their hash, `sha256` that of its files.

    `file`: the file it came from; of a volume, the lowest slice's, and `files` is how many there are. `spacing_mm`: between
    (slices,) rows and columns. `low`, `high`: the values that percentiles take for black and white. `text`: how much it looks as
    if something were written on it (`models.burned_in`). `affine`: of a volume, 12 numbers from voxels to
    millimetres in the patient. `matrix`: rows and columns of a radiograph's file; () where it was ingested before 0.2.
    """

    file: str
    files: int
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
    sex: str
    age_years: float | None
    lossy: bool
    spacing_mm: tuple[float, ...] | None
    shape: tuple[int, ...]
    low: float
    high: float
    text: float
    affine: tuple[float, ...] = ()
    tilt_degrees: float = 0.0
    matrix: tuple[int, ...] = ()

    @classmethod
    def of(cls, name: str, row: sqlite3.Row) -> "IndexedImage":
        facts: dict[str, Any] = json.loads(row["facts"])
        spacing = facts["spacing_mm"]
        return cls(
            **facts
            | {"file": name, "files": len(json.loads(row["members"])), "cache": row["cache"]}
            | {"spacing_mm": tuple(spacing) if spacing else None, "shape": tuple(facts["shape"])}
            | {"affine": tuple(facts.get("affine", ())), "matrix": tuple(facts.get("matrix", ()))}
        )

    def key(self, matches: Matches) -> str:
        """What the key column of a label table is compared to, in normalised form."""
        value: str = getattr(self, matches if matches != "patient_id" else "patient")
        return plain_key(value, matches)

    @property
    def is_volume(self) -> bool:
        return len(self.shape) == 3


class Index:
    """What `ingest` left behind, read once into memory; duplicates are decided here, so it is right at every instant.

    `across_patients`: images whose equal twin is filed under another patient. `unfit`: why the site does not work with it.
    `scaling`: what became black and white of radiographs.
    """

    def __init__(
        self, state: Path, images: list[IndexedImage], left_out: dict[str, Reason], facts: dict[str, str]
    ) -> None:
        self.state, self.complete, self.unfit = state, facts.get("complete") == "1", facts.get("unfit", "")
        self.scaling = facts.get("scaling", "percentiles")
        self.cache = Cache(state, Path(facts["cache_key"]) if facts.get("cache_key") else None)
        self._left_out = left_out
        self._images, twins, self.across_patients = _without_duplicates(images)
        self._reasons = Counter(left_out.values()) + Counter({Reason.DUPLICATE: sum(twin.files for twin in twins)})
        self._twins = twins

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
                query = "SELECT file, reason FROM files WHERE reason IS NOT NULL ORDER BY file"
                left_out = {row["file"]: Reason(row["reason"]) for row in database.execute(query)}
                images = []
                for row in database.execute("SELECT * FROM images ORDER BY name"):
                    if row["reason"] is not None:
                        left_out |= dict.fromkeys(json.loads(row["members"]), Reason(row["reason"]))
                    else:
                        images.append(IndexedImage.of(row["name"], row))
        except (sqlite3.Error, ValueError, KeyError, TypeError) as error:
            raise CacheLost(f"{path}: the index cannot be read ({type(error).__name__})") from None
        return cls(state, images, left_out, facts)

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

    def left_out(self) -> dict[str, Reason]:
        """Each file that is left out with its reason, sorted; copies of an image under the name of the image itself."""
        return dict(sorted((self._left_out | {twin.file: Reason.DUPLICATE for twin in self._twins}).items()))

    def files_of(self, image: IndexedImage) -> list[str]:
        """The files that `image` was made of, slices in order."""
        with closing(sqlite3.connect(self.state / "index.sqlite", timeout=30)) as database:
            row = database.execute("SELECT members FROM images WHERE name = ?", (image.file,)).fetchone()
        return [str(name) for name in json.loads(row[0])] if row else []

    def require_fit(self) -> None:
        """Raise DataError if more of the files were damaged than site.yaml permits."""
        if self.unfit:
            raise DataError(self.unfit, remedy="See `fl-client quarantine`, mend the source, and ingest again.")

    def pixels(self, image: IndexedImage) -> npt.NDArray[np.float32]:
        """A radiograph as float32 (H, W) in 0..1, bright is dense. Raises CacheLost if the file is gone or damaged."""
        stored = self.cache.read(image.cache, image.content)
        if stored.dtype != np.uint16 or stored.ndim != 2:
            raise CacheLost(f"{image.cache}: this is no cached radiograph")
        result: npt.NDArray[np.float32] = stored.astype(np.float32) / np.float32(SCALE)
        return result

    def volume(self, image: IndexedImage) -> npt.NDArray[np.int16]:
        """A volume as int16 (D, H, W) in Hounsfield units, memory-mapped if not locked. Raises CacheLost as `pixels` does."""
        stored = self.cache.read(image.cache, image.content)
        if stored.dtype != np.int16 or stored.ndim != 3:
            raise CacheLost(f"{image.cache}: this is no cached volume")
        return stored


def _without_duplicates(found: Iterable[IndexedImage]) -> tuple[list[IndexedImage], list[IndexedImage], int]:
    """The first of each image in the order given, the others, and how many of those stood under another patient.

    The same instance of the same patient, sent twice, is one image. So are equal pixels under two numbers: they are one
    exposure filed twice, and would otherwise stand on both sides of a split.
    """
    images: list[IndexedImage] = []
    twins: list[IndexedImage] = []
    seen: dict[tuple[str, str], str] = {}
    across = 0
    for image in found:
        marks = {("pixels", image.content)}
        if image.sop_uid and not image.is_volume:
            marks.add((image.patient, image.sop_uid))
        if known := marks & set(seen):
            twins.append(image)
            across += any(seen[mark] != image.patient for mark in known)
        else:
            images.append(image)
        seen |= {mark: image.patient for mark in marks if mark not in seen}
    return images, twins, across


@dataclass(frozen=True)
class Known:
    """A row of `files`: what the first look at a file found."""

    file: str
    sha256: str
    header: Header


class Register:
    """The writing side of the index: rows committed in small groups, each true by itself."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.uncommitted = 0
        path = cache.state / "index.sqlite"
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
            for table in _TABLES:
                database.execute(table)
            database.execute("INSERT OR IGNORE INTO facts VALUES ('version', ?)", (str(VERSION),))
            database.commit()
        except sqlite3.DatabaseError:
            database.close()
            raise
        return database

    def close(self) -> None:
        self.database.close()

    def begin(self, identity: str, names: Iterable[str], scaling: str) -> None:
        """Refuse a folder that is suddenly empty; if the source is another one, trust no stored size and date."""
        self.names = set(names)
        known = self.database.execute("SELECT COUNT(*) FROM images WHERE reason IS NULL").fetchone()[0]
        if known and not self.names:
            raise DataError(
                f"the data folder is empty, but {known} images were ingested from it before",
                remedy="Check that the share is mounted. To forget these images, remove the cache folder and ingest again.",
            )
        if _facts(self.database).get("source", identity) != identity:
            self.distrust()
        self.state_facts(source=identity, scaling=scaling, complete="0", cache_key=str(self.cache.key or ""))

    def distrust(self, *, images: bool = False) -> None:
        """Take no stored size and date for true any more; `images`: nor what is in the cache, which a disk may have lost."""
        self.database.execute("UPDATE files SET modified_ns = -1")
        if images:
            self.database.execute("UPDATE images SET recipe = ''")
        self.database.commit()

    def knows(self, item: Item, recipe: str) -> bool:
        """Whether the row of this file is up to date."""
        query = "SELECT size, modified_ns, recipe, reason FROM files WHERE file = ?"
        row = self.database.execute(query, (item.name,)).fetchone()
        if row is None or (row["size"], row["modified_ns"], row["recipe"]) != (item.size, item.modified_ns, recipe):
            return False
        # What changed under a look is looked at again, whatever its date says.
        return bool(row["reason"] != Reason.CHANGED and item.reason in (None, row["reason"]))

    def put_file(self, item: Item, recipe: str, found: dict[str, Any]) -> None:
        row = (item.name, item.size, item.modified_ns, recipe, found.get("sha256", ""), found.get("reason"))
        header = json.dumps(found["header"]) if "header" in found else None
        self.database.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?, ?)", (*row, header))
        self._count(LOOKS_PER_COMMIT)

    def forget(self) -> int:
        """Drop the rows of files that are gone; how many."""
        stored = [row["file"] for row in self.database.execute("SELECT file FROM files")]
        gone = [(name,) for name in stored if name not in self.names]
        self.database.executemany("DELETE FROM files WHERE file = ?", gone)
        return len(gone)

    def candidates(self) -> list[Known]:
        """Files of which an image may be made, sorted."""
        rows = self.database.execute("SELECT file, sha256, header FROM files WHERE reason IS NULL ORDER BY file")
        return [Known(row["file"], row["sha256"], Header(**json.loads(row["header"]))) for row in rows]

    def has(self, name: str, recipe: str) -> bool:
        """Whether the image is there as `recipe` makes it, or was found impossible to make."""
        row = self.database.execute("SELECT recipe, reason, cache FROM images WHERE name = ?", (name,)).fetchone()
        if row is None or row["recipe"] != recipe:
            return False
        if row["reason"] is not None:
            return bool(row["reason"] != Reason.CHANGED)
        return self.cache.has(row["cache"])

    def put_image(self, name: str, recipe: str, members: list[str], found: dict[str, Any]) -> None:
        facts = None if "reason" in found else json.dumps(found["facts"])
        row = (name, recipe, json.dumps(members), found.get("reason"), found.get("cache"), facts)
        self.database.execute("INSERT OR REPLACE INTO images VALUES (?, ?, ?, ?, ?, ?)", row)
        self._count(ROWS_PER_COMMIT)

    def reasons(self) -> Counter[Reason]:
        """How many files are left out, by reason."""
        found = Counter(
            Reason(row["reason"]) for row in self.database.execute("SELECT reason FROM files WHERE reason IS NOT NULL")
        )
        for row in self.database.execute("SELECT reason, members FROM images WHERE reason IS NOT NULL"):
            found[Reason(row["reason"])] += len(json.loads(row["members"]))
        return found

    def finish(self, names: Iterable[str], unfit: str) -> None:
        """Drop the rows of images that are no more, and their pixels: what left the source must not stay here."""
        wanted = set(names)
        stored = [row["name"] for row in self.database.execute("SELECT name FROM images")]
        self.database.executemany("DELETE FROM images WHERE name = ?", [(n,) for n in stored if n not in wanted])
        self.state_facts(complete="1", unfit=unfit)
        self.cache.keep(
            {row["cache"] for row in self.database.execute("SELECT cache FROM images WHERE cache IS NOT NULL")}
        )

    def state_facts(self, **facts: str) -> None:
        self.database.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", list(facts.items()))
        self.database.commit()
        self.uncommitted = 0

    def _count(self, most: int) -> None:
        self.uncommitted += 1
        if self.uncommitted >= most:
            self.database.commit()
            self.uncommitted = 0


def _facts(database: sqlite3.Connection) -> dict[str, str]:
    return dict(database.execute("SELECT name, value FROM facts").fetchall())
