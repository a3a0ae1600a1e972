"""One study's patients at one site: labels joined to images, split by patient, held as tensors on the study's grid.

A patient is on one side of the split for ever. The order of patients is that of a hash of their numbers, so a site that reads
its images anew splits them alike, and the assignment is written down once (`pins`): images that arrive later follow their
patient, and new patients go where most are lacking, each stratum (any positive label, none) by itself. A study that starts from
another's weights and names it goes on with its assignment. With differential privacy
the hash alone decides: whether somebody else takes part, or is ill, must not move a patient from one split to another.
"""

import fcntl
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from fl_client.cache import content_of
from fl_client.index import Index, IndexedImage
from fl_client.masks import Masks, mapped, where
from fl_client.observed import answered, covariates_of, observe
from models.covariates import names_of
from models.grids import to_grid
from models.labels import LabelTable
from models.masks import plane_spacing_mm
from models.masks import to_grid as to_mask_grid
from models.questions import Observed, agreed
from models.study import Evaluation, Regression, Study, Task
from models.volumes import to_volume_grid
from privacy import disk, keys
from privacy.errors import CohortTooSmall, DataError, LabelTableError, PatientInTwoSplits

Split = Literal["train", "validation", "test", "external"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
"""That patients are pinned to. `external` is all of them, at a site that only evaluates and where a study says so."""
PINS_VERSION = 1
HALF = 0.5
"""Above it a label is positive: 1 of 0 and 1, and of a number the upper half of its range."""
PUBLIC_STEP = 10  # patients; a private study's sums are divided by such a rounded number, never by who is there
PINS_BYTES_MAX = 256 * 1024 * 1024  # three million patients
TOKEN_LABEL = b"isocenter/v1/split-token"
GRID_LABEL = b"isocenter/v1/grid"


@dataclass(frozen=True)
class Counts:
    """How much a split holds; positives and negatives are images per target, of a number those in the upper and lower half of its
    range. Stays at the site unless a report rounds it.
    """

    patients: int
    images: int
    positives: dict[str, int]
    negatives: dict[str, int]


@dataclass(frozen=True)
class LeftOut:
    """Images that were taken and do not take part in this study: no label for its targets, another modality, labels that
    cannot all be true (two of several exclusive classes, or a grade without those below it), or a number outside the range that
    the study declares for it.
    """

    unlabelled: int
    modality: int
    contradictory: int = 0
    out_of_range: int = 0


@dataclass(frozen=True)
class Member:
    """One image that takes part, its patient's token, its label for each target, and its covariates, in the study's order."""

    image: IndexedImage
    token: str
    labels: tuple[float | None, ...]
    covariates: tuple[float | None, ...] = ()


class Cohort(Dataset[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]):
    """One split of one study at one site.

    `images` float32 (N, 1, S, S) or (N, 1, D, H, W) in 0..1, memory-mapped; `targets` float32 (N, T), 0 where missing, or of a
    segmentation the masks, uint8 (N, T, *grid), with `spacing_mm` float32 (N, axes) of the grid, NaN where nobody knows it;
    `known` float32 (N, T), 1 where labelled; `covariates` float32 (N, C), NaN where missing; `patients` int64 (N,), numbers from
    0 that mean nothing outside this object. `identities[n]`: by what patient n is known again (number and images, hashed),
    whatever study, folder or name it comes back under. `public_size`: patients of the training split in tens, as they were when
    the study began here. `observed[i]`: what is known of image i, for the subgroups that the study names; empty if it names none.
    `members[i]`: image i itself.
    """

    def __init__(
        self, members: list[Member], images: torch.Tensor, names: list[str], masks: torch.Tensor | None = None
    ) -> None:
        self.images = images
        table = _rows([member.labels for member in members]).reshape(len(members), len(names))
        self.covariates = _rows([member.covariates for member in members]).reshape(
            len(members), len(members[0].covariates) if members else 0
        )
        self.known = (~table.isnan()).float()
        self.present = table.nan_to_num(nan=0.0)
        self.targets = self.present if masks is None else masks
        self.spacing_mm = torch.full((len(members), max(0, images.ndim - 2)), math.nan)
        tokens = {token: number for number, token in enumerate(sorted({member.token for member in members}))}
        self.patients = torch.tensor([tokens[member.token] for member in members], dtype=torch.int64)
        self.identities = _identities(members)
        self.members = members
        self._names = names
        self.ingested = 0
        self.public_size = 0
        self.left_out = LeftOut(0, 0)
        self.observed: list[Observed] = []

    @classmethod
    def open(cls, index: Index, labels: LabelTable, study: Study, split: Split, pins: Path) -> "Cohort":
        """The `split` of `study` here. Splits are pinned in the file `pins`, which is made on the first call.

        Raises CohortTooSmall below the study's minimum of patients, LabelTableError if the site maps none of the study's
        targets, CacheLost if pixels are missing, DataError if the pins or too many of the site's files are damaged, or if
        radiographs were cached with another scaling, PatientInTwoSplits if an image came back under a patient of another split.
        """
        require_mapped(index, labels, study)
        members, left_out = join(index, labels, study)
        placed = Pins({}, {}) if split == "external" else _pinned(pins, members, study)
        mine = [member for member in members if split in ("external", placed.splits.get(member.token))]
        cohort = cls.of(index, study, split, mine)
        cohort.ingested, cohort.left_out, cohort.public_size = index.taken, left_out, placed.public_size
        if study.evaluation.subgroups:
            cohort.observed = agreed([observe(member.image, labels) for member in mine])
        patients, least = cohort.counts.patients, study.participation.minimum_patients
        if patients < least:
            raise CohortTooSmall(f"the {split} split has {patients} labelled patients and the study asks for {least}")
        return cohort

    @classmethod
    def of(cls, index: Index, study: Study, split: Split, members: list[Member]) -> "Cohort":
        """These members on the study's grid. Raises CacheLost."""
        grids = _grid(index, study, split, members), _mask_grid(index, study, split, members)
        cohort = cls(members, grids[0], study.task.targets, grids[1])
        if study.segments and members:
            cohort.spacing_mm = torch.tensor([_spacing_mm(member.image, study) for member in members])
        return cohort

    @staticmethod
    def identities_of(index: Index, labels: LabelTable, study: Study, split: Split, pins: Path) -> list[set[str]]:
        """`identities` of a cohort that is not opened: no image is read. Raises what `open` raises, but CohortTooSmall."""
        members, _ = join(index, labels, study)
        placed = _pinned(pins, members, study)
        return _identities([member for member in members if placed.splits[member.token] == split])

    def __len__(self) -> int:
        return len(self.patients)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(image float32 (1, S, S) or (1, D, H, W), target float32 (T,), known float32 (T,))."""
        return self.images[number], self.targets[number], self.known[number]

    @property
    def counts(self) -> Counts:
        positive = ((self.present > HALF) * self.known).sum(0).int().tolist()
        labelled = self.known.sum(0).int().tolist()
        return Counts(
            patients=len(set(self.patients.tolist())),
            images=len(self),
            positives=dict(zip(self._names, positive, strict=True)),
            negatives={n: k - p for n, k, p in zip(self._names, labelled, positive, strict=True)},
        )


def require_mapped(index: Index, labels: LabelTable, study: Study) -> None:
    """Raise LabelTableError if the site says of none of the study's targets what it is here, in labels or in masks."""
    if mapped(index.state, labels.mapping, study):
        return
    here = Masks.open(index.state).structures if study.segments else sorted(answered(labels.mapping, study.task))
    remedy = "Say what they are in your masks, and run `fl-client ingest`." if study.segments else None
    raise LabelTableError(
        f"none of the study's targets ({', '.join(study.task.targets)}) is in {where(study)} ({', '.join(here) or 'none'})",
        remedy=remedy,
    )


def join(index: Index, labels: LabelTable, study: Study) -> tuple[list[Member], LeftOut]:
    """Images with a label for at least one target, ordered by patient token and file; of a segmentation, with a mask."""
    members: list[Member] = []
    unlabelled = modality = contradictory = out_of_range = 0
    index.require_fit()
    wanted, ordered = study.images, names_of(study.covariates)
    masks = Masks.open(index.state) if study.segments else None
    if wanted.volume is None and wanted.scaling != index.scaling:
        raise DataError(
            f"the study asks for radiographs scaled by {wanted.scaling}, and those here were by {index.scaling}",
            remedy=f"Say `scaling: {wanted.scaling}` in site.yaml's data section, and ingest again.",
        )
    for image in index.images():
        # Pictures have no modality of their own; the study's list is about DICOM.
        if image.is_volume != (wanted.volume is not None) or (
            image.modality and image.modality not in wanted.modalities
        ):
            modality += 1
            continue
        key = image.key(labels.mapping.matches)
        row: tuple[float | None, ...]
        if masks is not None:
            row = masks.labels(image, study.task.targets)
        else:
            found = labels.numbers(key) if isinstance(study.task, Regression) else labels.lookup(key)
            row = tuple(found.get(name) for name in study.task.targets)
        if all(label is None for label in row):
            unlabelled += 1
            continue
        if isinstance(study.task, Task) and not study.task.admits(row):
            contradictory += 1
            continue
        if isinstance(study.task, Regression):
            if not all(study.task.admits(value) for value in row):
                out_of_range += 1
                continue
            row = tuple(None if value is None else study.task.place(value) for value in row)
        values = covariates_of(key, image, labels, study.covariates)
        if not all(study.covariates[name].admits(value) for name, value in zip(ordered, values, strict=True)):
            out_of_range += 1
            continue
        patient = labels.patient_of(key) or labels.mapping.plain_patient(image.patient)
        members.append(Member(image, _token(patient), row, values))
    members.sort(key=lambda member: (member.token, member.image.file))
    return members, LeftOut(unlabelled, modality, contradictory, out_of_range)


def _rows(values: Sequence[Sequence[float | None]]) -> torch.Tensor:
    """float32 (N, width), NaN for None."""
    return torch.tensor(
        [[math.nan if one is None else float(one) for one in row] for row in values], dtype=torch.float32
    )


def _identities(members: list[Member]) -> list[set[str]]:
    """By what each patient is known again, in order of token: the token, and the hashes of the pixels."""
    found: dict[str, set[str]] = {}
    for member in members:
        found.setdefault(member.token, {member.token}).add(member.image.content)
    return [found[token] for token in sorted(found)]


def _token(patient: str) -> str:
    """32 hex characters that stand for a patient and decide the order of placing; like the index, they stay at the site."""
    return hashlib.sha256(TOKEN_LABEL + b"\n" + patient.encode()).hexdigest()[:32]


def _strata(members: list[Member]) -> dict[str, bool]:
    """Token -> does the patient have any positive label, or a number in the upper half of its range?"""
    strata: dict[str, bool] = {}
    for member in members:
        strata[member.token] = strata.get(member.token, False) or any((label or 0) > HALF for label in member.labels)
    return strata


def splits_of(study: Study, *, trains: bool) -> tuple[Split, ...]:
    """What orders of `study` can ask of a site, which `trains` or only evaluates; the last is what models are tested on."""
    if not trains:
        return ("external",) if study.evaluation.external == "all" else ("test",)
    return SPLITS if study.training.rounds else ("validation", "test")


@dataclass
class Pins:
    """Where patients (by token) and images (by content) belong. Images and the public size are kept for private studies only."""

    splits: dict[str, Split]
    images: dict[str, Split]
    public_size: int = 0

    def document(self) -> dict[str, object]:
        facts: dict[str, object] = {"version": PINS_VERSION, "splits": self.splits}
        if self.public_size:
            facts |= {"images": self.images, "public_size": self.public_size}
        return facts


def placed(members: list[Member], study: Study, known: Pins) -> Pins:
    """`known`, with every patient of `members` placed who is not yet; nothing is written down."""
    strata = _strata(members)
    found = Pins(dict(known.splits), dict(known.images), known.public_size)
    if study.privacy == "none":
        for stratum in (True, False):
            tokens = [token for token, positive in strata.items() if positive == stratum]
            _place(tokens, found.splits, _shares(study))
        return found
    _place_each(strata, found.splits, study.evaluation)
    if not found.public_size:
        trained = sum(found.splits[token] == "train" for token in strata)
        found.public_size = max(PUBLIC_STEP, trained // PUBLIC_STEP * PUBLIC_STEP)
    return found


def _pinned(pins: Path, members: list[Member], study: Study) -> Pins:
    """The split of every patient of `members`; new ones are placed and written down before anybody uses them."""
    pins.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(pins):
        known = pins_of(pins, study)
        found = placed(members, study, known)
        if study.privacy != "none":
            _pin_images(members, found)
        if found != known or not pins.exists():
            keys.write_private(pins, json.dumps(found.document(), sort_keys=True, indent=0).encode())
    return found


def _place_each(strata: dict[str, bool], placed: dict[str, Split], evaluation: Evaluation) -> None:
    """Put each new patient where its own token says, whoever else there is."""
    for token in strata:
        if token not in placed:
            place = int(token[:16], 16) / 2**64
            held = place < evaluation.test + evaluation.validation
            placed[token] = "test" if place < evaluation.test else "validation" if held else "train"


def _pin_images(members: list[Member], placed: Pins) -> None:
    for member in members:
        split = placed.splits[member.token]
        if placed.images.setdefault(member.image.content, split) != split:
            raise PatientInTwoSplits("an image came back under another patient, who is on another side of the split")


def _shares(study: Study) -> dict[Split, float]:
    """Which share of the patients goes where. Where nothing is trained, what training would have had is tested."""
    test, validation = study.evaluation.test, study.evaluation.validation
    if study.training.rounds == 0:
        test = 1 - validation
    return {"test": test, "validation": validation, "train": 1 - test - validation}


def _place(tokens: list[str], placed: dict[str, Split], share: Mapping[Split, float]) -> None:
    """Put each new patient of one stratum, in token order, into the split that lacks most; nobody is moved."""
    lacking = {split: share[split] * len(tokens) for split in SPLITS}
    new = []
    for token in sorted(tokens):
        if token in placed:
            lacking[placed[token]] -= 1
        else:
            new.append(token)
    for token in new:
        split = max(SPLITS, key=lambda name: lacking[name])
        placed[token] = split
        lacking[split] -= 1


def pins_of(pins: Path, study: Study) -> Pins:
    """The assignment to go on from: the study's own, or before there is one, that of the study whose weights it starts from."""
    initial = study.network.initial
    if pins.exists() or initial is None or not initial.study:
        return read_pins(pins)
    return read_pins(pins.with_name(f"{initial.study}.pins.json"))


def read_pins(pins: Path) -> Pins:
    """The written assignment, empty before there is one. A damaged file is an error and never made anew: that would move patients
    between splits.
    """
    if not pins.exists():
        return Pins({}, {})
    remedy = "Restore the file from a backup. If it is removed, patients used for training may be used for testing."
    try:
        if pins.stat().st_size > PINS_BYTES_MAX:
            raise ValueError
        document = json.loads(pins.read_text(encoding="ascii"))
        disk.require_known(pins, document["version"], PINS_VERSION)
        read = Pins(document["splits"], document.get("images", {}), document.get("public_size", 0))
        good = document == read.document() | {"version": PINS_VERSION} and type(read.public_size) is int
        good &= all(isinstance(part, dict) and set(part.values()) <= set(SPLITS) for part in (read.splits, read.images))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        good, read = False, Pins({}, {})
    if not good:
        raise DataError(f"{pins}: the assignment of patients to splits cannot be read", remedy=remedy)
    return read


@dataclass(frozen=True)
class _Rows:
    """What is prepared of each image: `shape` of all together, `says` what one row is made of, `make` that row."""

    shape: tuple[int, ...]
    dtype: npt.DTypeLike
    says: list[str]
    make: Callable[[int], npt.NDArray[Any]]


def _grid(index: Index, study: Study, split: Split, members: list[Member]) -> torch.Tensor:
    """float32 (N, *study.images.shape)."""
    says = [f"{member.image.cache} {member.image.affine}" for member in members]
    rows = _Rows(
        (len(members), *study.images.shape), np.float32, says, lambda n: on_grid(index, members[n].image, study)
    )
    return _prepared(rows, index, study, f"{study.digest[:16]}-{split}")


def _mask_grid(index: Index, study: Study, split: Split, members: list[Member]) -> torch.Tensor | None:
    """uint8 (N, T, *grid) of a segmentation, None of another study."""
    if not study.segments:
        return None
    masks, names = Masks.open(index.state), study.task.targets
    structures = [masks.structures.index(name) if name in masks.structures else -1 for name in names]

    def make(number: int) -> npt.NDArray[np.uint8]:
        image = members[number].image
        affine = np.array(image.affine, np.float64).reshape(3, 4) if image.is_volume else None
        return to_mask_grid(masks.bits(image), affine, study.images, structures)

    says = [f"{masks.taken[member.image.cache].cache} {member.image.affine} {structures}" for member in members]
    rows = _Rows((len(members), len(names), *study.images.shape[1:]), np.uint8, says, make)
    return _prepared(rows, index, study, f"masks-{study.digest[:16]}-{split}")


def _spacing_mm(image: IndexedImage, study: Study) -> tuple[float, ...]:
    """Millimetres between voxels of the study's grid of `image`; NaN where its file does not say how large its pixels are."""
    if study.images.volume is not None:
        return tuple(study.images.volume.spacing_mm)
    if image.spacing_mm is None or not image.matrix:
        return math.nan, math.nan
    return plane_spacing_mm(image.matrix, image.spacing_mm, study.images.size_px)


def _prepared(rows: _Rows, index: Index, study: Study, stem: str) -> torch.Tensor:
    """The rows, memory-mapped from a file that is made once per selection of images and grid; in memory where the cache is
    locked.
    """
    shape = rows.shape
    if not shape[0]:
        return torch.from_numpy(np.zeros(shape, rows.dtype))
    if index.cache.key is not None:  # what is locked in the cache lies nowhere else on the disk either
        return torch.from_numpy(np.stack([rows.make(number) for number in range(shape[0])]))
    asked = study.images.model_dump_json()
    name = hashlib.sha256(GRID_LABEL + b"\n" + "\n".join([asked, *rows.says]).encode()).hexdigest()[:32]
    folder = index.state / "grids"
    path = folder / f"{stem}-{name}.npy"
    if not _is_grid(path, rows):
        folder.mkdir(mode=0o700, exist_ok=True)
        _make_grid(path, rows)
        # A running worker keeps its map of an older file: unlinking takes the name, not the content.
        for old in folder.glob(f"{stem}-*"):
            if old.name.partition(".")[0] != path.stem:
                old.unlink(missing_ok=True)
    stored: npt.NDArray[Any] = np.load(path, mmap_mode="c", allow_pickle=False)
    return torch.from_numpy(stored)


def _is_grid(path: Path, rows: _Rows) -> bool:
    """Whether the file is there and holds what was written: a flipped bit would be trained on, and nobody would know."""
    try:
        stored = np.load(path, mmap_mode="r", allow_pickle=False)
        content = _content_file(path).read_text(encoding="ascii")
    except (OSError, ValueError, EOFError):
        return False
    return bool(stored.shape == rows.shape and stored.dtype == rows.dtype and content_of(stored) == content)


def _content_file(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _make_grid(path: Path, rows: _Rows) -> None:
    """Write the images one by one into a file that gets its name when it is whole; never all of them in memory."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        os.close(os.open(part, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600))
        grid = np.lib.format.open_memmap(part, mode="w+", dtype=rows.dtype, shape=rows.shape)
        for number in range(rows.shape[0]):
            grid[number] = rows.make(number)
        content = content_of(grid)
        grid.flush()
        del grid
        keys.write_private(_content_file(path), content.encode())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def on_grid(index: Index, image: IndexedImage, study: Study) -> npt.NDArray[np.float32]:
    """float32 of `study.images.shape` in 0..1. Raises CacheLost."""
    if study.images.volume is None:
        return to_grid(index.pixels(image), study.images.size_px)
    affine = np.array(image.affine, np.float64).reshape(3, 4)
    return to_volume_grid(index.volume(image), affine, study.images.volume)


@contextmanager
def _locked(pins: Path) -> Iterator[None]:
    """One writer at a time; the lock ends with the process, however that ends."""
    with os.fdopen(os.open(pins.with_name(pins.name + ".lock"), os.O_CREAT | os.O_RDWR, 0o600), "r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
