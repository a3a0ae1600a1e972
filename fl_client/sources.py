"""Where images come from: every file below a folder and in the zips in it, in one order, and nothing skipped in silence.

A source yields `Item`s. An item either can be read or carries the reason why it is not touched, so whatever lies in the
folder is counted. Links that leave the folder are not followed: a link could otherwise bring in what nobody approved. Zips are
opened where they lie (archives package one zip for each series, and zips of those), their members are items like files, and
nothing is unpacked to the disk under a name that a zip chose.
"""

import os
import stat
import tempfile
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import IO

from privacy.errors import DataError, ImageLeftOut

FILE_BYTES_MAX = 256 * 1024 * 1024  # ten times the largest native radiograph
ARRIVING = ".fetching"  # where `fl-client fetch` keeps what has not arrived whole
DEPTH_MAX = 64  # folders within folders; archives use five
ZIP_DEPTH_MAX = 3  # zips within zips: of a case, a study, a series
ZIP_MEMBERS_MAX = 200_000  # the largest CT studies have some thousand slices
ZIP_RATIO_MAX = 1100  # deflate packs zeros 1032 to 1; a zip that promises more holds the same bytes many times
ZIP_BYTES_MAX = 8 * 1024**3  # of a zip within a zip, which is copied to be read
ZIPS_OPEN = 8  # kept open in each process: consecutive items are of the same zip


class Reason(StrEnum):
    """Why a file is left out. The value is stored and counted; `explanation` and `remedy` are one line each, for people."""

    EMPTY_FILE = "empty_file"
    NOT_DICOM = "not_dicom"
    NOT_A_PICTURE = "not_a_picture"
    NOT_NIFTI = "not_nifti"
    SIDECAR = "sidecar"
    TRUNCATED = "truncated"
    TOO_LARGE = "too_large"
    UNREADABLE_FILE = "unreadable_file"
    DAMAGED_ZIP = "damaged_zip"
    LOCKED_ZIP = "locked_zip"
    CHANGED = "changed"
    OUTSIDE_FOLDER = "outside_folder"
    OTHER_OBJECT = "other_object"
    SECONDARY_CAPTURE = "secondary_capture"
    FOR_PROCESSING = "for_processing"
    ENHANCED = "enhanced_multiframe"
    LOCALIZER = "localizer"
    NO_PIXELS = "no_pixels"
    LATERAL = "lateral"
    VIEW_UNKNOWN = "view_unknown"
    COLOUR = "colour"
    POLARITY_UNKNOWN = "polarity_unknown"
    BURNED_IN_TEXT = "burned_in_text"
    IDENTIFYING = "identifying"
    UNSUPPORTED_SYNTAX = "unsupported_syntax"
    JPEG_12_BIT = "jpeg_extended_12_bit"
    UNREADABLE_PIXELS = "unreadable_pixels"
    DECODER_FAILED = "decoder_failed"
    BLANK = "blank"
    NO_PATIENT = "no_patient"
    NO_GEOMETRY = "no_geometry"
    TOO_FEW_SLICES = "too_few_slices"
    POSITION_TWICE = "position_twice"
    MISSING_SLICES = "missing_slices"
    IRREGULAR_GAPS = "irregular_gaps"
    NOT_HOUNSFIELD = "not_hounsfield"
    DUPLICATE = "duplicate"
    NOT_A_MASK = "not_a_mask"
    MASK_WITHOUT_IMAGE = "mask_without_image"
    MASK_TWICE = "mask_twice"
    MASK_GEOMETRY = "mask_geometry"
    MASK_VALUES = "mask_values"
    MASK_EMPTY = "mask_empty"

    @property
    def explanation(self) -> str:
        return _WORDS[self][0]

    @property
    def remedy(self) -> str:
        """What a hospital can do; "" where nothing is wrong, because the file is simply something else."""
        return _WORDS[self][1]

    @property
    def damage(self) -> bool:
        """Whether the file is not what it once was, or cannot be read: many of these say that a disk or a copy failed."""
        return self in _DAMAGE


_COPY = "Copy the file from the archive again."
_STUDY = "Ask the archive for the whole series again; if it is so there as well, it stays out."
_WORDS = {
    Reason.EMPTY_FILE: ("the file has no content", _COPY),
    Reason.NOT_DICOM: ("no DICOM file (text, a picture ...)", ""),
    Reason.NOT_A_PICTURE: ("no PNG or JPEG picture", ""),
    Reason.NOT_NIFTI: ("no NIfTI volume", ""),
    Reason.SIDECAR: ("the header of a picture, read with it", ""),
    Reason.TRUNCATED: ("the file ends before its pixels do: a copy that was interrupted", _COPY),
    Reason.TOO_LARGE: (
        "larger than any image of this kind, or unpacks to more",
        "Look at it: this is no ordinary image.",
    ),
    Reason.UNREADABLE_FILE: (
        "the operating system does not let this account read it, or it is no ordinary file",
        "Give the account that runs fl-client the right to read it.",
    ),
    Reason.DAMAGED_ZIP: (
        "a zip that cannot be opened, or packed in an unusual way",
        "Pack or copy it again (deflate).",
    ),
    Reason.LOCKED_ZIP: ("a zip with a password", "Unpack it into the data folder."),
    Reason.CHANGED: ("the file changed between two looks at it", "Ingest again when nothing writes to the folder."),
    Reason.OUTSIDE_FOLDER: (
        "a link that leaves the data folder, or leads nowhere",
        "Move the images below the data folder, or name their folder in site.yaml.",
    ),
    Reason.OTHER_OBJECT: ("another kind of object: ultrasound, MR, report, presentation state, directory ...", ""),
    Reason.SECONDARY_CAPTURE: ("a screen shot or scanned page, not what the detector saw", ""),
    Reason.FOR_PROCESSING: ("raw detector data that was not made for viewing", "Send the images for presentation too."),
    Reason.ENHANCED: (
        "CT in one enhanced multi-frame file, whose frames this version does not read",
        "Have the archive convert it to classic single-frame CT, which most can on export.",
    ),
    Reason.LOCALIZER: ("the overview image that a CT is planned on", ""),
    Reason.NO_PIXELS: ("a header without an image", ""),
    Reason.LATERAL: ("a lateral view; studies here use frontal views", ""),
    Reason.VIEW_UNKNOWN: (
        "nothing in the header or table says whether the view is frontal",
        "For pictures, name a column with the view; for DICOM, have View Position filled in at the device.",
    ),
    Reason.COLOUR: ("a colour image: a report page or a photograph", ""),
    Reason.POLARITY_UNKNOWN: ("the header does not say whether bright means dense", ""),
    Reason.BURNED_IN_TEXT: ("the header says that text is burned into the pixels", ""),
    Reason.IDENTIFYING: (
        "it names a person, and site.yaml asks for de-identified files (data.require_deidentified)",
        "De-identify it by PS3.15 Annex E before it is put here, or drop that line: images never leave either way.",
    ),
    Reason.UNSUPPORTED_SYNTAX: ("a lossy or unknown compression", "Export it as stored by the device, without loss."),
    Reason.JPEG_12_BIT: (
        "JPEG Extended with 12 bits: lossy, and no decoder here reads it",
        "Export it as stored by the device, without loss.",
    ),
    Reason.UNREADABLE_PIXELS: ("the pixels cannot be decoded as the header describes them", _COPY),
    Reason.DECODER_FAILED: ("the decoder crashed on it, took all memory or did not end", _COPY),
    Reason.BLANK: ("one even grey: an empty exposure", ""),
    Reason.NO_PATIENT: (
        "no patient number, so it cannot be kept to one side of the split",
        "If each patient has a folder of its own, say `patients: folder` in site.yaml's data section.",
    ),
    Reason.NO_GEOMETRY: ("a CT slice that does not say where it lies", _STUDY),
    Reason.TOO_FEW_SLICES: ("a CT series of fewer slices than make a volume", ""),
    Reason.POSITION_TWICE: ("two different CT slices of a series at one place", _STUDY),
    Reason.MISSING_SLICES: ("a CT series with slices missing in between", _STUDY),
    Reason.IRREGULAR_GAPS: ("a CT series whose slices lie at uneven distances", ""),
    Reason.NOT_HOUNSFIELD: ("a CT series without air: its values are no Hounsfield units", _STUDY),
    Reason.DUPLICATE: ("the same image stands in the folder again", ""),
    Reason.NOT_A_MASK: (
        "in the folder of masks, and neither NIfTI nor a DICOM segmentation of the kind BINARY or FRACTIONAL",
        "Export it as NIfTI, or as a binary DICOM SEG.",
    ),
    Reason.MASK_WITHOUT_IMAGE: (
        "a mask whose series, instance or file name is that of no image taken here, or of several",
        "Name a NIfTI mask after the Series Instance UID of its volume or the SOP Instance UID of its radiograph.",
    ),
    Reason.MASK_TWICE: (
        "one of several masks of one image; none of them is used",
        "Leave one, with all structures in it.",
    ),
    Reason.MASK_GEOMETRY: (
        "a mask that does not lie on its image: another matrix, place or extent",
        "Export the mask on the grid of the image that it was drawn on.",
    ),
    Reason.MASK_VALUES: (
        "a mask with a value or segment that site.yaml does not name",
        "Name it in `data.masks.structures`, or in `data.masks.ignored` if it is of no interest.",
    ),
    Reason.MASK_EMPTY: (
        "a mask with nothing in it, which may be a failed export",
        "If it means that nothing is there, say `empty: absent` in `data.masks`.",
    ),
}
_DAMAGE = frozenset(
    [
        *(Reason.EMPTY_FILE, Reason.TRUNCATED, Reason.UNREADABLE_FILE, Reason.DAMAGED_ZIP, Reason.CHANGED),
        *(Reason.UNREADABLE_PIXELS, Reason.DECODER_FAILED),
    ]
)


@dataclass(frozen=True)
class Item:
    """One thing found in a source. `name` is its path below the folder with "/"; `reason` says why it is not to be read.

    `inside`: the way through zips, from the file `path` inwards; empty for a file of its own.
    """

    name: str
    path: Path
    size: int = 0
    modified_ns: int = 0
    reason: Reason | None = None
    inside: tuple[str, ...] = ()

    def read(self) -> bytes:
        """Its bytes, FILE_BYTES_MAX at most. Raises ImageLeftOut."""
        try:
            if self.inside:
                return _zips.member(self.path, self.inside)
            with self.path.open("rb") as file:
                data = file.read(FILE_BYTES_MAX + 1)
        except OSError:
            raise ImageLeftOut(Reason.UNREADABLE_FILE) from None
        if len(data) > FILE_BYTES_MAX:  # it grew since it was listed
            raise ImageLeftOut(Reason.TOO_LARGE)
        return data


@dataclass(frozen=True)
class Folder:
    """Every file below `root`, sorted by name within each folder. Raises DataError if there is no such folder."""

    root: Path

    @property
    def identity(self) -> str:
        return f"folder {self.root.resolve()}"

    def items(self) -> Iterator[Item]:
        if not self.root.is_dir():
            raise DataError(
                f"{self.root}: there is no such folder", remedy="Set `data.folder` in site.yaml, or mount the share."
            )
        _zips.forget()
        yield from _below(self.root, "", self.root.resolve(), 0)


def _below(folder: Path, prefix: str, root: Path, depth: int) -> Iterator[Item]:
    try:
        with os.scandir(folder) as listing:
            entries = sorted(listing, key=lambda e: os.fsencode(e.name))
    except OSError:
        yield Item(prefix.rstrip("/") or ".", folder, reason=Reason.UNREADABLE_FILE)
        return
    for entry in entries:
        # Names that are no UTF-8 must still be a key of the index; the path itself keeps its bytes.
        name = prefix + os.fsencode(entry.name).decode("utf-8", "backslashreplace")
        path = Path(entry.path)
        try:
            is_folder = entry.is_dir(follow_symlinks=False)
        except OSError:
            is_folder = False
        if is_folder and depth == 0 and entry.name == ARRIVING:
            continue
        if is_folder and depth < DEPTH_MAX:
            yield from _below(path, name + "/", root, depth + 1)
        elif is_folder:
            yield Item(name, path, reason=Reason.UNREADABLE_FILE)
        else:
            item = _item(name, path, root)
            if item.reason is None and name.lower().endswith(".zip"):
                yield from _zipped(item)
            else:
                yield item


def _item(name: str, path: Path, root: Path) -> Item:
    """A file as an item. Links within the folder count as duplicates of what is found there anyway."""
    try:
        if path.is_symlink():
            inside = path.resolve(strict=True).is_relative_to(root)
            return Item(name, path, reason=Reason.DUPLICATE if inside else Reason.OUTSIDE_FOLDER)
        facts = path.stat()
    except (OSError, RuntimeError):  # resolve() raises RuntimeError on a circle of links
        return Item(name, path, reason=Reason.OUTSIDE_FOLDER if path.is_symlink() else Reason.UNREADABLE_FILE)
    reason = None
    if not stat.S_ISREG(facts.st_mode):  # reading a pipe or a device would wait for ever
        reason = Reason.UNREADABLE_FILE
    elif facts.st_size == 0:
        reason = Reason.EMPTY_FILE
    elif facts.st_size > FILE_BYTES_MAX and not name.lower().endswith(".zip"):
        reason = Reason.TOO_LARGE
    return Item(name, path, facts.st_size, facts.st_mtime_ns, reason)


ZIP_ERRORS = (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, KeyError, EOFError, zlib.error)
"""What zipfile raises on damaged, locked and unusual zips; `struct.error` and UnicodeDecodeError are ValueErrors in disguise."""


def _zipped(zipped: Item) -> Iterator[Item]:
    """The members of one zip, those of zips in it as well; the zip itself with a reason if it cannot be opened."""
    try:
        found = _zips.opened(zipped.path, zipped.inside)
        members = [info for info in found.infolist() if not info.is_dir()]
    except ImageLeftOut as refusal:
        yield Item(zipped.name, zipped.path, reason=Reason(refusal.reason), inside=zipped.inside)
        return
    promised = sum(info.file_size for info in members)
    if len(members) > ZIP_MEMBERS_MAX or promised > ZIP_RATIO_MAX * max(zipped.size, 1):
        yield Item(zipped.name, zipped.path, reason=Reason.TOO_LARGE, inside=zipped.inside)
    elif not members:
        yield Item(zipped.name, zipped.path, reason=Reason.EMPTY_FILE, inside=zipped.inside)
    else:
        twice: set[str] = set()
        for info in sorted(members, key=lambda member: member.filename):
            # A member that stands twice can be read under one name only: the last, as every tool does.
            reason = Reason.DUPLICATE if info.filename in twice or found.getinfo(info.filename) is not info else None
            yield from _member(zipped, info, reason)
            twice |= {info.filename} if reason is None else set()


def _member(zipped: Item, info: zipfile.ZipInfo, reason: Reason | None) -> Iterator[Item]:
    shown = info.filename.encode("utf-8", "backslashreplace").decode() + ("" if reason is None else " (again)")
    # The checksum stands for the date: members keep theirs when a zip is packed anew around other content.
    moment = zipped.modified_ns ^ info.CRC
    item = Item(f"{zipped.name}/{shown}", zipped.path, info.file_size, moment, reason, (*zipped.inside, info.filename))
    packed_again = info.filename.lower().endswith(".zip")
    if item.reason is not None:
        yield item
    elif info.flag_bits & 1:
        yield Item(item.name, item.path, info.file_size, moment, Reason.LOCKED_ZIP, item.inside)
    elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others can ask for gigabytes to unpack
        yield Item(item.name, item.path, info.file_size, moment, Reason.DAMAGED_ZIP, item.inside)
    elif info.file_size == 0:
        yield Item(item.name, item.path, 0, moment, Reason.EMPTY_FILE, item.inside)
    elif info.file_size > (ZIP_BYTES_MAX if packed_again else FILE_BYTES_MAX):
        yield Item(item.name, item.path, info.file_size, moment, Reason.TOO_LARGE, item.inside)
    elif packed_again and len(item.inside) >= ZIP_DEPTH_MAX:
        yield Item(item.name, item.path, info.file_size, moment, Reason.DAMAGED_ZIP, item.inside)
    elif packed_again:
        yield from _zipped(item)
    else:
        yield item


@dataclass
class _Zips:
    """Zips that this process has open, the least recently used of them closed first."""

    open: OrderedDict[tuple[Path, tuple[str, ...]], zipfile.ZipFile] = field(default_factory=OrderedDict)

    def member(self, path: Path, inside: tuple[str, ...]) -> bytes:
        """Content of a member whose announced size was checked; zipfile reads no more than that, and checks the CRC."""
        try:
            return self.opened(path, inside[:-1]).read(inside[-1])
        except ZIP_ERRORS:
            raise ImageLeftOut(Reason.DAMAGED_ZIP) from None

    def opened(self, path: Path, inside: tuple[str, ...]) -> zipfile.ZipFile:
        """The zip at `path`, or the one within it. Raises ImageLeftOut."""
        key = (path, inside)
        if key in self.open:
            self.open.move_to_end(key)
            return self.open[key]
        try:
            stored: Path | IO[bytes] = path
            if inside:
                stored = tempfile.TemporaryFile()  # noqa: SIM115  it lives as long as the zip that reads it
                with self.opened(path, inside[:-1]).open(inside[-1]) as packed:
                    while part := packed.read(1 << 20):
                        stored.write(part)
            found = zipfile.ZipFile(stored)
        except OSError:
            raise ImageLeftOut(Reason.UNREADABLE_FILE) from None
        except ZIP_ERRORS:
            raise ImageLeftOut(Reason.DAMAGED_ZIP) from None
        self.open[key] = found
        while len(self.open) > ZIPS_OPEN:
            self.open.popitem(last=False)[1].close()
        return found

    def forget(self) -> None:
        """Close all: a zip that was replaced under its name must be opened anew."""
        while self.open:
            self.open.popitem()[1].close()


_zips = _Zips()
