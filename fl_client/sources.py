"""Where images come from: every file below a folder, in one order, and nothing skipped in silence.

A source yields `Item`s. An item either can be read or carries the reason why it is not touched, so whatever lies in the
folder is counted. Links that leave the folder are not followed: a link could otherwise bring in what nobody approved.
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from privacy.errors import DataError

FILE_BYTES_MAX = 256 * 1024 * 1024  # ten times the largest native radiograph
DEPTH_MAX = 64  # folders within folders; archives use five


class Reason(StrEnum):
    """Why a file is left out. The value is stored and counted; `explanation` is one line for people."""

    EMPTY_FILE = "empty_file"
    NOT_DICOM = "not_dicom"
    NOT_A_PICTURE = "not_a_picture"
    TRUNCATED = "truncated"
    TOO_LARGE = "too_large"
    UNREADABLE_FILE = "unreadable_file"
    OUTSIDE_FOLDER = "outside_folder"
    NOT_A_RADIOGRAPH = "not_a_radiograph"
    SECONDARY_CAPTURE = "secondary_capture"
    FOR_PROCESSING = "for_processing"
    NO_PIXELS = "no_pixels"
    LATERAL = "lateral"
    VIEW_UNKNOWN = "view_unknown"
    COLOUR = "colour"
    POLARITY_UNKNOWN = "polarity_unknown"
    BURNED_IN_TEXT = "burned_in_text"
    UNSUPPORTED_SYNTAX = "unsupported_syntax"
    UNREADABLE_PIXELS = "unreadable_pixels"
    BLANK = "blank"
    NO_PATIENT = "no_patient"
    DUPLICATE = "duplicate"

    @property
    def explanation(self) -> str:
        return _EXPLANATIONS[self]


_EXPLANATIONS = {
    Reason.EMPTY_FILE: "the file has no content",
    Reason.NOT_DICOM: "no DICOM file (text, a picture, an archive ...)",
    Reason.NOT_A_PICTURE: "no PNG or JPEG picture",
    Reason.TRUNCATED: "the file ends before its pixels do: a copy that was interrupted",
    Reason.TOO_LARGE: "larger than any radiograph",
    Reason.UNREADABLE_FILE: "the operating system does not let this account read it, or it is no ordinary file",
    Reason.OUTSIDE_FOLDER: "a link that leaves the data folder, or leads nowhere",
    Reason.NOT_A_RADIOGRAPH: "another kind of object: CT, ultrasound, report, presentation state, directory ...",
    Reason.SECONDARY_CAPTURE: "a screen shot or scanned page, not what the detector saw",
    Reason.FOR_PROCESSING: "raw detector data that was not made for viewing",
    Reason.NO_PIXELS: "a header without an image",
    Reason.LATERAL: "a lateral view; studies here use frontal views",
    Reason.VIEW_UNKNOWN: "nothing in the header or table says whether the view is frontal",
    Reason.COLOUR: "a colour image",
    Reason.POLARITY_UNKNOWN: "the header does not say whether bright means dense",
    Reason.BURNED_IN_TEXT: "the header says that text is burned into the pixels",
    Reason.UNSUPPORTED_SYNTAX: "a lossy or unknown compression",
    Reason.UNREADABLE_PIXELS: "the pixels cannot be decoded as the header describes them",
    Reason.BLANK: "one even grey: an empty exposure",
    Reason.NO_PATIENT: "no patient number, so it cannot be kept to one side of the split",
    Reason.DUPLICATE: "the same image stands in the folder again",
}


@dataclass(frozen=True)
class Item:
    """One thing found in a source. `name` is its path below the folder with "/"; `reason` says why it is not to be read."""

    name: str
    path: Path
    size: int = 0
    modified_ns: int = 0
    reason: Reason | None = None


class ImageSource(Protocol):
    """What `ingest` needs of a source; a PACS or a DICOMweb server can stand behind it as well as a folder."""

    @property
    def identity(self) -> str:
        """Changes when the same names no longer mean the same images."""

    def items(self) -> Iterator[Item]:
        """Every item once, in an order that does not change from run to run."""


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
        if is_folder and depth < DEPTH_MAX:
            yield from _below(path, name + "/", root, depth + 1)
        elif is_folder:
            yield Item(name, path, reason=Reason.UNREADABLE_FILE)
        else:
            yield _item(name, path, root)


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
    elif facts.st_size > FILE_BYTES_MAX:
        reason = Reason.TOO_LARGE
    return Item(name, path, facts.st_size, facts.st_mtime_ns, reason)
