"""Images of a source become a cache and an index that stay at the site; every file is counted as taken or left out by name.

In two passes: each new or changed file is hashed and its header read; then of what is left, radiographs and CT volumes are made
and stored under a name that is a hash of their files and of everything that was done to them. Files are opened by confined
processes only (`fl_client.readers`). Each step is atomic: killed at any instant, `ingest` run again goes on where it stopped;
a later run reads only what is new or changed and forgets what is gone.
"""

import fcntl
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fl_client import mask_files, masks
from fl_client.cache import Cache
from fl_client.first_look import Header
from fl_client.headers import SIDECAR_BYTES_MAX, Caption, read_sidecar
from fl_client.index import Index, IndexedImage, Known, Register
from fl_client.readers import Answer, Look, Radiograph, Readers, Reading, SlicesOfVolume, Task, VolumeFile, made, seen
from fl_client.series import Series, Slice, assemble
from fl_client.site import Source
from fl_client.sources import Folder, Item, Reason
from models.labels import LabelMap, LabelTable
from models.volumes import Stack
from privacy import keys
from privacy.errors import DataError, ImageLeftOut, LabelTableError

__all__ = [
    "Index",
    "IndexedImage",
    "IngestReport",
    "Reason",
    "distrust",
    "ingest",
    "label_count",
    "prune",
]

LOOK = b"isocenter/v2/look"  # changes whenever the same file would give another header
RADIOGRAPH = b"isocenter/v2/radiograph"  # changes whenever the same file would give other pixels
VOLUME = b"isocenter/v1/volume"
DAMAGED_LEAST = 3  # a single bad copy among a few files is no reason to stop

Stage = Literal["looking at files", "reading images", "reading masks"]
Progress = Callable[[Stage, int, int], None]


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
    implausible_ages: int
    unmapped: dict[str, dict[str, int]]

    def to_json(self) -> dict[str, Any]:
        """Of the unmapped words only how many rows say them: in a wrong column they are names, and JSON is kept in files."""
        return vars(self) | {"unmapped": {target: sum(words.values()) for target, words in self.unmapped.items()}}


@dataclass(frozen=True)
class MaskCount:
    """How the masks fit the images: `found` files = `taken` + those in `reasons`. `present`: masks that hold a structure."""

    found: int
    taken: int
    present: dict[str, int]
    reasons: dict[Reason, int]

    @classmethod
    def of(cls, found: "masks.Masks") -> "MaskCount":
        present = {n: sum(n in mask.present for mask in found.taken.values()) for n in found.structures}
        reasons = dict(found.reasons().most_common())
        return cls(len(found.taken) + len(found.left_out), len(found.taken), present, reasons)

    def to_json(self) -> dict[str, Any]:
        return vars(self) | {"reasons": {str(reason): count for reason, count in self.reasons.items()}}


@dataclass(frozen=True)
class IngestReport:
    """What one run found. `found` files = those of the images `taken` (one each, all slices of a volume) + those in `reasons`.

    `read` of them were opened now, the rest was known. `unfit`: why the site will not work with these images, or "".
    """

    found: int
    taken: int
    volumes: int
    patients: int
    reasons: dict[Reason, int]
    read: int
    removed: int
    labels: LabelCount | None
    label_problem: str | None
    seconds: float
    unfit: str
    masks: "MaskCount | None" = None

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and words for `--json`; reasons by name, most frequent first."""
        return {
            "found": self.found,
            "taken": self.taken,
            "volumes": self.volumes,
            "patients": self.patients,
            "left_out": {str(reason): count for reason, count in self.reasons.items()},
            "read_now": self.read,
            "removed": self.removed,
            "labels": self.labels.to_json() if self.labels else None,
            "label_problem": self.label_problem,
            "seconds": round(self.seconds, 2),
            "unfit": self.unfit or None,
            "masks": None if self.masks is None else self.masks.to_json(),
        }


def ingest(
    source: Source, root: Path, state: Path, progress: Progress = lambda stage, done, total: None, jobs: int = 0
) -> IngestReport:
    """Bring cache and index below `state` up to date with `source`; `root` is the folder that relative paths start from.

    `progress(stage, done, total)` is called after each file and each image. `jobs`: confined processes that read; 0 reads in this
    one, for images that are known to be sound. Raises DataError if the folder is missing, empty after it was not, or being
    ingested already; LabelTableError if pictures cannot be assigned to patients; OSError if the disk is full. One bad file never
    raises.
    """
    began = time.monotonic()
    folder = Folder(root / source.folder)
    items = list(folder.items())
    labels, problem = _labels(source, root, sidecars=any(item.name.lower().endswith(".json") for item in items))
    _private_folder(state)
    _private_folder(state / "cache")
    cache = Cache(state, _key_of(source, root))
    with _only_one(state), closing(Register(cache)) as register, Readers(jobs, root) as readers:
        register.begin(f"{source.format} {folder.identity}", [item.name for item in items], source.scaling)
        opened = _look(_intakes(source, items, labels), register, readers, progress)
        removed = register.forget()
        names = _make(_Plan(source, cache, {item.name: item for item in items}, opened), register, readers, progress)
        register.finish(names, _unfit(source, register, items))
        index = Index.open(state)
        masked = _masks(source, root, index, readers, progress)
    return IngestReport(
        found=len(items),
        taken=index.taken,
        volumes=sum(image.is_volume for image in index.images()),
        patients=index.patients,
        reasons=index.reasons(),
        read=len(opened),
        removed=removed,
        labels=label_count(index, labels) if labels else None,
        label_problem=str(problem) if problem else None,
        seconds=time.monotonic() - began,
        unfit=index.unfit,
        masks=masked,
    )


def _masks(source: Source, root: Path, index: Index, readers: Readers, progress: Progress) -> MaskCount | None:
    """Masks brought up to date with the images; those of a site that names none any more are forgotten."""
    if source.masks is None:
        masks.file_of(index.state).unlink(missing_ok=True)
        masks.cache_of(index.state, "").keep(set())
        return None
    return MaskCount.of(
        mask_files.ingest(
            source.masks, root, index, readers, lambda done, total: progress("reading masks", done, total)
        )
    )


def label_count(index: Index, labels: LabelTable) -> LabelCount:
    """How many images taken have a label for at least one target, and what of the table is of no use."""
    keys = [image.key(labels.mapping.matches) for image in index.images()]
    labelled = sum(any(label is not None for label in labels.lookup(key).values()) for key in keys)
    return LabelCount(
        labelled=labelled,
        unlabelled=len(keys) - labelled,
        rows=labels.rows,
        keys_without_image=labels.without_image(keys),
        conflicts=labels.conflicts,
        malformed=labels.malformed,
        without_key=labels.without_key,
        implausible_ages=labels.implausible_ages,
        unmapped={target: dict(words.most_common(20)) for target, words in labels.unmapped.items() if words},
    )


def distrust(state: Path) -> None:
    """Let the next `ingest` open every file again, whatever its size and date say, and make every image again."""
    if (state / "index.sqlite").is_file():
        with _only_one(state), closing(Register(Cache(state))) as register:
            register.distrust(images=True)


def prune(state: Path) -> int:
    """Remove what can be made again and is not needed now: grids of studies, unfinished parts. Bytes freed."""
    freed = 0
    with _only_one(state):
        for path in [*(state / "grids").glob("*"), *(state / "cache").glob("??/*.part")]:
            freed += path.stat().st_size
            path.unlink()
    return freed


# First pass: a look at each file -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Intake:
    """How one file is to be looked at; `recipe` names it, so that a change of any part looks again."""

    item: Item
    look: Look

    @functools.cached_property
    def recipe(self) -> str:
        """A hash: patient numbers need not stand in the index twice."""
        look = self.look
        parts = (look.format, look.caption, look.patient, look.require_deidentified)
        return hashlib.sha256(LOOK + b"\n" + repr(parts).encode()).hexdigest()


_JSON = {".json": Reason.SIDECAR}


def _intakes(source: Source, items: list[Item], labels: LabelTable | None) -> list[_Intake]:
    if source.format == "dicom":
        first = [item.name.partition("/") for item in items]
        whose = [top if below and source.patients == "folder" else "" for top, below, _ in first]
        strict = source.require_deidentified
        return [
            _Intake(item, Look(item, "dicom", patient=patient, require_deidentified=strict))
            for item, patient in zip(items, whose, strict=True)
        ]
    sidecars = {item.name[: -len(".json")]: item for item in items if item.name.lower().endswith(".json")}
    named = [replace(item, reason=item.reason or _JSON.get(item.name[-5:].lower())) for item in items]
    return [_Intake(item, Look(item, source.format, _caption(item, sidecars, labels))) for item in named]


def _caption(item: Item, sidecars: dict[str, Item], labels: LabelTable | None) -> Caption:
    """What table and sidecar say of a picture or volume; the table comes first, because people look after it."""
    sidecar = sidecars.get(item.name.rpartition(".")[0])
    said = Caption(None, None)
    if sidecar is not None and sidecar.reason is None and sidecar.size <= SIDECAR_BYTES_MAX:
        try:
            said = read_sidecar(sidecar.read())
        except ImageLeftOut:
            said = Caption(None, "")  # a header that cannot be read vouches for nothing
    if labels is None:
        return said
    mapping = labels.mapping
    top, below, _ = item.name.partition("/")
    key = item.name if mapping.matches == "file" else top if below else ""
    patient = key if mapping.matches == "patient_id" else labels.patient_of(key)
    view = said.view if mapping.view is None else labels.view_of(key) or ""
    return replace(said, patient=patient or said.patient, view=view)


def _look(intakes: list[_Intake], register: Register, readers: Readers, progress: Progress) -> set[str]:
    """Look at every file that is new or changed; which."""
    total, done, read = len(intakes), 0, set[str]()
    fresh: list[_Intake] = []
    for intake in intakes:
        recipe = intake.recipe
        if register.knows(intake.item, recipe):
            done += 1
        elif intake.item.reason is not None:
            register.put_file(intake.item, recipe, {"reason": str(intake.item.reason)})
            read.add(intake.item.name)
            done += 1
        else:
            fresh.append(intake)
    progress("looking at files", done, total)
    for intake, found in readers.run((intake, intake.look) for intake in fresh):
        register.put_file(intake.item, intake.recipe, seen(found))
        read.add(intake.item.name)
        done += 1
        progress("looking at files", done, total)
    return read


# Second pass: radiographs and volumes ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Wanted:
    """One image that is to be there: of which files, how it is made, and what is known of it beforehand."""

    name: str
    members: list[str]
    recipe: str
    cache: str
    task: Task
    facts: dict[str, Any]


@dataclass(frozen=True)
class _Plan:
    """What the files of a source are made into."""

    source: Source
    cache: Cache
    items: dict[str, Item]
    opened: set[str]  # files that were opened in this run

    def radiograph(self, known: Known) -> _Wanted:
        source, item = self.source, self.items[known.file]
        done = f" longest_side_px={source.longest_side_px} {source.scaling} inverted={known.header.inverted}".encode()
        cache = hashlib.sha256(RADIOGRAPH + done + b"\n" + known.sha256.encode()).hexdigest()
        how = Reading(source.scaling == "window", source.format == "pictures", known.header.inverted)
        task = Radiograph(item, known.sha256, self.cache, cache, source.longest_side_px, how)
        return self._wanted([known.file], cache, task, _of_header(known.header) | {"sha256": known.sha256})

    def volume_file(self, known: Known) -> _Wanted:
        cache = hashlib.sha256(VOLUME + b" nifti\n" + known.sha256.encode()).hexdigest()
        task = VolumeFile(self.items[known.file], known.sha256, self.cache, cache)
        return self._wanted([known.file], cache, task, _of_header(known.header) | {"sha256": known.sha256})

    def _wanted(self, members: list[str], cache: str, task: Task, facts: dict[str, Any]) -> _Wanted:
        recipe = hashlib.sha256(f"{cache}\n{json.dumps(facts, sort_keys=True)}".encode()).hexdigest()
        return _Wanted(members[0], members, recipe, cache, task, facts)

    def volume(self, series: Series, lies: Stack) -> _Wanted:
        members = [found.file for found in series.slices]
        hashes = [found.sha256 for found in series.slices]
        joined = hashlib.sha256("\n".join(hashes).encode()).hexdigest()
        cache = hashlib.sha256(VOLUME + b"\n" + joined.encode()).hexdigest()
        first = series.slices[0].header
        rows, columns = first.size
        items = [self.items[name] for name in members]
        facts = _of_header(first) | {
            "sha256": joined,
            "lossy": any(found.header.lossy for found in series.slices),
            "spacing_mm": [round(value, 6) for value in lies.spacing_mm],
            "affine": [float(value) for value in lies.affine.ravel()],
            "tilt_degrees": round(lies.tilt_degrees, 3),
        }
        return self._wanted(members, cache, SlicesOfVolume(items, hashes, self.cache, cache, (rows, columns)), facts)


def _of_header(header: Header) -> dict[str, Any]:
    """What the index keeps of an image from its header."""
    kept = header.to_json()
    for name in ("plane", "size", "acquisition", "inverted"):
        del kept[name]
    return kept


def _make(plan: _Plan, register: Register, readers: Readers, progress: Progress) -> list[str]:
    """Make every image that is not there yet; the names of all that there should be."""
    slices, wanted = [], []
    for known in register.candidates():
        if known.header.plane:
            slices.append(Slice(known.file, known.sha256, known.header))
        else:
            wanted.append(plan.volume_file(known) if plan.source.format == "nifti" else plan.radiograph(known))
    names: list[str] = []
    for series in assemble(slices):
        if series.stack is not None:
            wanted.append(plan.volume(series, series.stack))
            continue
        members = [found.file for found in series.slices]
        register.put_image(series.name, "", members, {"reason": str(series.reason)})
        names.append(series.name)
    missing = [image for image in wanted if not register.has(image.name, image.recipe)]
    done, total = len(wanted) - len(missing), len(wanted)
    progress("reading images", done, total)
    for image, found in readers.run((image, image.task) for image in missing):
        register.put_image(image.name, image.recipe, image.members, _row(image, made(found)))
        plan.opened.update(image.members)
        done += 1
        progress("reading images", done, total)
    return [*names, *(image.name for image in wanted)]


def _row(image: _Wanted, found: Answer) -> dict[str, Any]:
    if "reason" in found:
        return {"reason": found["reason"]}
    return {"cache": image.cache, "facts": image.facts | found}


def _unfit(source: Source, register: Register, items: list[Item]) -> str:
    """Why too many files are damaged to work with the others, or "": a failing disk or share shows itself like this."""
    damaged = sum(count for reason, count in register.reasons().items() if reason.damage)
    if damaged < DAMAGED_LEAST or damaged <= source.damaged_share_max * len(items):
        return ""
    return (
        f"{damaged} of {len(items)} files are damaged ({damaged / len(items):.1%}), and site.yaml permits "
        f"{source.damaged_share_max:.1%} (data.damaged_share_max)"
    )


def _labels(source: Source, root: Path, *, sidecars: bool) -> tuple[LabelTable | None, LabelTableError | None]:
    """The label table, or why it cannot be read. DICOM can be ingested without; pictures cannot, it names the patients."""
    mapping: LabelMap = source.labels
    alone = source.format != "dicom"
    if alone and not sidecars:
        if mapping.matches not in ("file", "patient_id"):
            raise LabelTableError(f"{source.format} carry no {mapping.matches}; `matches` must be file or patient_id")
        if mapping.matches == "file" and mapping.patient is None:
            raise LabelTableError(f"{source.format} matched by file need `patient`, the column that names the patient")
    try:
        return LabelTable.open(root, mapping), None
    except LabelTableError as error:
        if alone:
            raise
        return None, error


def _key_of(source: Source, root: Path) -> Path | None:
    """The file with the key of the cache, made if it is not there; None if the cache is not locked."""
    if source.cache_key is None:
        return None
    path = (root / source.cache_key).resolve()
    if path.is_relative_to((root / "keys").resolve()):
        raise DataError(
            f"{path}: the processes that read images must not see this folder",
            remedy="Put data.cache_key somewhere else.",
        )
    keys.make_locking_key(path)
    return path


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
