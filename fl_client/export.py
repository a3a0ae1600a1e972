"""What a site hands over by its own decision: de-identified DICOM copies, or a table that makes its images known.

No order, study or coordinator can ask for an export; a person at the site starts it, and it ends in a folder of that person's
choice. `export_dicom` applies PS3.15 Annex E (privacy/annex_e.py) to the images of the index; `export_bih` writes the metadata
that MIDRC's Biomedical Imaging Hub takes (MIDRC/midrc-interop, docs/push_metadata.md), one row per series.

Rules, in the order in which they bite:
 1. a source file is read only if it is, by SHA-256, the file that was ingested;
 2. an image in which text is suspected, by header or by pixels, stays until a person has looked at it and lists it;
 3. the copy is looked at again as any other site would (`annex_e.identifying`), and stays if anything is found;
 4. names, order and numbers of the files say nothing: patients are keyed pseudonyms, files are named by their new UIDs;
 5. everything is written beside the folder first; the journal's line is on the disk before the folder has its name.

Pseudonyms are keyed with HOME/keys/pseudonyms.key, so later exports of this site fit earlier ones, and no other site's. Whether
two sites have a patient in common cannot be asked here; docs/deidentification.md says why.
"""

import csv
import hashlib
import io
import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import pydicom
from pydicom.dataset import Dataset

from fl_client.ingest import Index, IndexedImage
from fl_client.site import Site
from models import burned_in
from privacy import annex_e, disk, keys
from privacy.errors import CacheLost, DataError, ImageLeftOut

VERSION = "isocenter/v1/export"
SECRET = "pseudonyms.key"  # noqa: S105  the name of the file
FILE_BYTES_MAX = 256 * 1024 * 1024
DESCRIBED_MIN = (
    10  # patients of whom a free text must be said before it goes out: what is said of few can name one of them
)
COLUMNS = (
    *("collection_id", "commons_long_name", "commons_name", "data_contributor", "license", "data_url_doi"),
    *("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "Modality", "StudyDescription", "SeriesDescription"),
    *("PatientAge", "PatientSex", "EthnicGroup", "BodyPartExamined", "Manufacturer", "disease_type", "primary_site"),
)
"""Of a row of the metadata push, in the spelling of MIDRC's own ingestion; the order of the columns of the TSV file."""
ONE_FILE = frozenset(("CR", "DX"))  # a volume has a row in the index and many files, with one hash for all of them
SEXES = {"F": "Female", "M": "Male"}

Progress = Callable[[int, int], None]


class Kept(StrEnum):
    """Why an image is not handed over. The value is counted in the manifest."""

    MISSING = "missing"
    CHANGED = "changed"
    NOT_ONE_IMAGE = "not_one_image"
    NOT_DICOM = "not_dicom"
    MARKED = "burned_in_marked"
    SUSPECTED = "burned_in_suspected"
    OVERLAY = "overlay_in_pixels"
    IDENTIFYING = "still_identifying"
    NO_NUMBER = "no_number"

    @property
    def explanation(self) -> str:
        return _EXPLANATIONS[self]


_EXPLANATIONS = {
    Kept.MISSING: "the file is no longer where it was ingested, or is no single file",
    Kept.CHANGED: "the file is not the one that was ingested; run `fl-client ingest`",
    Kept.NOT_ONE_IMAGE: "not one picture of its own: a volume, or its cached picture is lost",
    Kept.NOT_DICOM: "the header cannot be read",
    Kept.MARKED: "the header says that text is burned into the pixels",
    Kept.SUSPECTED: "it looks as if text is burned into the pixels; look at it, then list it as reviewed",
    Kept.OVERLAY: "bits that no pixel uses are not empty: an overlay may hide there",
    Kept.IDENTIFYING: "something that may identify was still found in the copy",
    Kept.NO_NUMBER: "no study or series number",
}


@dataclass(frozen=True)
class Choice:
    """What a person chose for DICOM copies. `reviewed`: index names of images that were looked at and may go; `limit` 0: all."""

    retain_characteristics: bool = False
    dates: annex_e.Dates = "removed"
    reviewed: frozenset[str] = frozenset()
    limit: int = 0


@dataclass(frozen=True)
class Collection:
    """What the hub is told about the whole collection; `real_uids` only where the images are public under these UIDs already."""

    collection_id: str
    data_contributor: str
    license: str
    commons_name: str
    commons_long_name: str
    data_url_doi: str = ""
    disease_type: str = ""
    primary_site: str = ""
    real_uids: bool = False

    def facts(self) -> dict[str, str]:
        """Raises DataError if something that the hub requires is empty."""
        facts = {name: value.strip() for name, value in vars(self).items() if isinstance(value, str)}
        for name in ("collection_id", "data_contributor", "license", "commons_name", "commons_long_name"):
            if not facts[name]:
                raise DataError(f"{name} is empty", remedy="The hub requires it; give the option for it.")
        return {name: value for name, value in facts.items() if value}


@dataclass
class Exported:
    """What was handed over, in numbers; `to_review`: index names, for people at the site only."""

    folder: Path
    images: int = 0
    patients: int = 0
    rows: int = 0
    bytes: int = 0
    left_out: Counter[Kept] = field(default_factory=Counter)
    to_review: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Counts alone."""
        return {
            "images": self.images,
            "patients": self.patients,
            "rows": self.rows,
            "bytes": self.bytes,
            "left_out": {str(reason): count for reason, count in sorted(self.left_out.items())},
        }


def export_dicom(site: Site, out: Path, choice: Choice, progress: Progress) -> Exported:
    """Write de-identified copies of the images in the index into the new folder `out`, with manifest.json beside them.

    `progress(done, total)` is called after each image. Raises DataError if `out` is there already, if the site has pictures
    instead of DICOM, or if nothing could be handed over; CacheLost without an index. One bad file never raises.
    """
    index, profile = _index(site), _profile(site, choice.dates, choice.retain_characteristics)
    images = index.images()[: choice.limit or None]
    with _Folder(out) as folder:
        result, patients, files = Exported(out), set[str](), list[dict[str, Any]]()
        for done, image in enumerate(images, start=1):
            try:
                name, content = _copy(site, index, image, profile, choice)
                files.append(folder.write(name, content))
                patients.add(image.patient)
            except ImageLeftOut as refusal:
                result.left_out[Kept(refusal.reason)] += 1
                if refusal.reason in (Kept.MARKED, Kept.SUSPECTED):
                    result.to_review.append(image.file)
            progress(done, len(images))
        result.images, result.patients = len(files), len(patients)
        result.bytes = sum(file["bytes"] for file in files)
        how = {"dates": profile.dates, "codes": profile.codes, "table": annex_e.source()}
        _conclude(site, folder, result, {"kind": "dicom", "profile": how, "files": sorted(files, key=_name_of)})
    return result


def export_bih(site: Site, out: Path, collection: Collection, progress: Progress) -> Exported:
    """Write imaging_series.json, the same as imaging_series.tsv, and manifest.json into the new folder `out`.

    One row per series, from the header of its first image. UIDs are pseudonyms unless `collection.real_uids`, patients always.
    Ages above 89 are left out; descriptions go out if they are said of at least 10 patients. Raises as `export_dicom` does.
    """
    facts, profile = collection.facts(), _profile(site, "removed", True)
    images, rows, result = _index(site).images(), dict[str, dict[str, Any]](), Exported(out)
    for done, image in enumerate(images, start=1):
        try:
            if not image.study_uid or not image.series_uid:
                raise ImageLeftOut(Kept.NO_NUMBER)
            if image.series_uid not in rows:
                header = _header(_bytes_of(site, image), pixels=False)
                rows[image.series_uid] = facts | _row(header, image, profile, collection.real_uids)
            result.images += 1
        except ImageLeftOut as refusal:
            result.left_out[Kept(refusal.reason)] += 1
        progress(done, len(images))
    for name in ("StudyDescription", "SeriesDescription", "EthnicGroup"):
        _drop_rare(rows.values(), name)
    table = sorted(rows.values(), key=lambda row: (row["PatientID"], row["StudyInstanceUID"], row["SeriesInstanceUID"]))
    result.rows, result.patients = len(table), len({row["PatientID"] for row in table})
    with _Folder(out) as folder:
        files = [
            folder.write("imaging_series.json", json.dumps(table, indent=1, ensure_ascii=False).encode() + b"\n"),
            folder.write("imaging_series.tsv", _tsv(table)),
        ]
        result.bytes = sum(file["bytes"] for file in files)
        uids = "real" if collection.real_uids else "pseudonyms"
        _conclude(site, folder, result, {"kind": "bih", "uids": uids, "files": files})
    return result


def reviewed_in(path: Path) -> frozenset[str]:
    """The index names in a text file, one a line, of images that a person looked at. Raises DataError if it cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        raise DataError(
            "the list of reviewed images cannot be read", remedy="One name a line, as UTF-8 text."
        ) from None
    return frozenset(line.strip() for line in lines if line.strip())


def note_review(site: Site, names: list[str]) -> Path | None:
    """A file in HOME/private (0600) that names the images waiting for a look, for people at the site; None without any."""
    if not names:
        return None
    path = site.home / "private" / "burned-in.txt"
    keys.write_private(path, "".join(f"{name}\n" for name in names).encode("utf-8", "backslashreplace"))
    return path


# One image -----------------------------------------------------------------------------------------------------------


def _index(site: Site) -> Index:
    if site.source.format != "dicom":
        raise DataError("this site has no DICOM images", remedy="An export needs their headers; pictures have none.")
    return Index.open(site.state)


def _profile(site: Site, dates: annex_e.Dates, characteristics: bool) -> annex_e.Profile:
    return annex_e.Profile(keys.token_key(site.home / "keys" / SECRET), dates, characteristics)


def _copy(site: Site, index: Index, image: IndexedImage, profile: annex_e.Profile, choice: Choice) -> tuple[str, bytes]:
    """Name and bytes of the de-identified copy. Raises ImageLeftOut with a `Kept`."""
    header = _header(_bytes_of(site, image), pixels=True)
    if image.file not in choice.reviewed:
        _free_of_text_or_raise(index, image, header)
    try:
        with annex_e.silent():
            copy = annex_e.deidentified(header, profile)
            if set(annex_e.identifying(copy)) - {
                "BurnedInAnnotation"
            }:  # what the header says of text was looked at above
                raise ImageLeftOut(Kept.IDENTIFYING)
            file = io.BytesIO()
            copy.save_as(file, enforce_file_format=True)
    except annex_e.READING_ERRORS:
        raise ImageLeftOut(Kept.NOT_DICOM) from None
    return f"{copy.PatientID}/{copy.StudyInstanceUID}/{copy.SOPInstanceUID}.dcm", file.getvalue()


def _bytes_of(site: Site, image: IndexedImage) -> bytes:
    """The source file, if it is the one that was ingested."""
    if image.modality not in ONE_FILE:
        raise ImageLeftOut(Kept.NOT_ONE_IMAGE)
    folder = (site.home / site.source.folder).resolve()
    path = folder / image.file
    try:
        if not path.is_file() or not path.resolve().is_relative_to(folder) or path.stat().st_size > FILE_BYTES_MAX:
            raise ImageLeftOut(Kept.MISSING)
        data = path.read_bytes()
    except (OSError, ValueError, RuntimeError):
        raise ImageLeftOut(Kept.MISSING) from None
    if hashlib.sha256(data).hexdigest() != image.sha256:
        raise ImageLeftOut(Kept.CHANGED)
    return data


def _header(data: bytes, *, pixels: bool) -> Dataset:
    try:
        with annex_e.silent():
            return pydicom.dcmread(io.BytesIO(data), stop_before_pixels=not pixels, force=data[128:132] != b"DICM")
    except annex_e.READING_ERRORS:
        raise ImageLeftOut(Kept.NOT_DICOM) from None


def _free_of_text_or_raise(index: Index, image: IndexedImage, header: Dataset) -> None:
    """The header's word and, because it lies, a look at the cached picture."""
    with annex_e.silent():
        if str(header.get("BurnedInAnnotation", "") or "").strip().upper() == "YES":
            raise ImageLeftOut(Kept.MARKED)
    try:
        pixels = index.pixels(image)
    except CacheLost:
        raise ImageLeftOut(Kept.NOT_ONE_IMAGE) from None
    if pixels.ndim != 2:
        raise ImageLeftOut(Kept.NOT_ONE_IMAGE)
    if burned_in.suspected(pixels):
        raise ImageLeftOut(Kept.SUSPECTED)


def _row(header: Dataset, image: IndexedImage, profile: annex_e.Profile, real_uids: bool) -> dict[str, Any]:
    """What the hub is told of one series; fields that the header has no fit value for are left out."""

    def uid(original: str) -> str:
        return original if real_uids else profile.uid(original)

    with annex_e.silent():
        text = {name: _text(header, name) for name in COLUMNS}
        age = text["PatientAge"]
    row: dict[str, Any] = {
        "PatientID": profile.pseudonym(image.patient),
        "StudyInstanceUID": uid(image.study_uid),
        "SeriesInstanceUID": uid(image.series_uid),
        "Modality": image.modality,
        "PatientSex": SEXES.get(text["PatientSex"].upper(), ""),
        "PatientAge": int(age[:3]) if age[:3].isascii() and age[:3].isdigit() and age[3:] == "Y" else "",
    }
    if row["PatientAge"] != "" and row["PatientAge"] > annex_e.AGE_MAX:
        row["PatientAge"] = ""
    row |= {name: text[name] for name in ("EthnicGroup", "BodyPartExamined", "Manufacturer")}
    row |= {name: text[name] for name in ("StudyDescription", "SeriesDescription")}
    return {name: value for name, value in row.items() if value != ""}


def _text(header: Dataset, keyword: str) -> str:
    """The value as one short line; "" where it is absent or not what the standard permits."""
    try:
        value = header.get(keyword) if keyword[0].isupper() else None
    except annex_e.READING_ERRORS:
        return ""
    text = "" if value is None else " ".join(str(value).replace("\0", "").split())
    return text if text.isprintable() and len(text) <= 64 else ""


def _drop_rare(rows: Iterable[dict[str, Any]], name: str) -> None:
    """Remove what the field `name` says of fewer than DESCRIBED_MIN patients."""
    said: defaultdict[str, set[str]] = defaultdict(set)
    for row in rows:
        said[row.get(name, "")].add(row["PatientID"])
    for row in rows:
        if name in row and len(said[row[name]]) < DESCRIBED_MIN:
            del row[name]


def _tsv(table: list[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", delimiter="\t", lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue().encode()


# The folder ----------------------------------------------------------------------------------------------------------


class _Folder:
    """A folder that gets its name when everything is in it; broken off, nothing is left."""

    def __init__(self, out: Path) -> None:
        self.out, self.part = out, out.with_name(f"{out.name}.part")

    def __enter__(self) -> "_Folder":
        if self.out.exists() or self.part.exists():
            raise DataError(
                f"{self.out} or {self.part} is there already", remedy="Choose a new folder; nothing was written."
            )
        self.part.mkdir(mode=0o700, parents=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self.part.exists():
            shutil.rmtree(self.part)

    def write(self, name: str, content: bytes) -> dict[str, Any]:
        """Write one file (0600); its line of the manifest. Raises ImageLeftOut if an image of this number was written before."""
        path = self.part / name
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        except FileExistsError:
            raise ImageLeftOut(Kept.NO_NUMBER) from None
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        return {"file": name, "bytes": len(content), "sha256": keys.digest(content)}

    def name(self) -> None:
        self.part.rename(self.out)
        disk.flush_folder(self.out.parent)


def _name_of(file: dict[str, Any]) -> str:
    return str(file["file"])


def _conclude(site: Site, folder: _Folder, result: Exported, facts: dict[str, Any]) -> None:
    """Manifest, journal, name, in this order: no folder of an export is without a line that tells of it."""
    if not (result.rows or (facts["kind"] == "dicom" and result.images)):
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(result.left_out.items()))
        raise DataError(
            f"nothing can be handed over ({counts or 'no images'})", remedy="See the reasons, then try again."
        )
    manifest = {"version": VERSION, **facts, "counts": result.to_json()}
    body = json.dumps(manifest, indent=1).encode() + b"\n"
    folder.write("manifest.json", body)
    site.journal.append(
        "export",
        what=facts["kind"],
        images=result.images,
        patients=result.patients,
        content_bytes=result.bytes,
        manifest=keys.digest(body),
    )
    folder.name()
