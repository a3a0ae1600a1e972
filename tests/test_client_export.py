"""Exports of a phantom hospital full of marks: what is written, what is refused, and that it is written down."""

import csv
import hashlib
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pydicom
import pytest
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from fl_client import export, export_cli
from fl_client.export import Choice, Collection, Kept, export_bih, export_dicom
from fl_client.ingest import Index, ingest
from fl_client.rehearsal import prepare
from fl_client.site import Site
from privacy import annex_e, keys
from privacy.annex_e import identifying
from privacy.errors import CacheLost, DataError
from privacy.journal import verify

MARKS = (b"ZZTEST", b"MRN-", b"ACCQ", b"19310203", b"1.2.826.0.1.3680043.99.")
PATIENTS = 14
RUNNER = CliRunner()

SERIES_SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "array",
    "items": {
        "type": "object",
        "additionalProperties": False,
        "required": [
            *("collection_id", "commons_long_name", "commons_name", "data_contributor", "license"),
            *("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "Modality"),
        ],
        "properties": {
            **{
                name: {"type": "string", "minLength": 1}
                for name in (
                    *(
                        "collection_id",
                        "commons_long_name",
                        "commons_name",
                        "data_contributor",
                        "license",
                        "data_url_doi",
                    ),
                    *("disease_type", "primary_site", "StudyDescription", "SeriesDescription", "EthnicGroup"),
                    *("BodyPartExamined", "Manufacturer"),
                )
            },
            "PatientID": {"type": "string", "pattern": "^[0-9a-f]{16}$"},
            "StudyInstanceUID": {"type": "string", "pattern": r"^[0-9.]{3,64}$"},
            "SeriesInstanceUID": {"type": "string", "pattern": r"^[0-9.]{3,64}$"},
            "Modality": {"enum": ["CR", "DX"]},
            "PatientAge": {"type": "integer", "minimum": 0, "maximum": 89},
            "PatientSex": {"enum": ["Female", "Male"]},
        },
    },
}
"""Required and preferred fields of MIDRC/midrc-interop docs/push_metadata.md (Nov 21, 2025), in our own words."""

COLLECTION = Collection("phantoms-1", "north", "CC BY 4.0", "Isocenter", "Isocenter at the north", primary_site="Lung")


def nothing(*_: object) -> None: ...


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ingested hospital, each of whose files names the patient in many places."""
    home = tmp_path_factory.mktemp("export") / "north"
    prepare(home, "north", (PATIENTS, 5), keys.load_public(public_key()))
    for number, path in enumerate(sorted(p for p in (home / "hospital" / "dicom").rglob("*") if p.is_file())):
        try:
            with annex_e.silent():
                data = pydicom.dcmread(path)
            data.PatientID = f"MRN-{data.PatientID}"
            data.PatientName, data.ReferringPhysicianName = f"ZZTEST^{number}", "ZZTEST^HOUSE"
            data.StudyDate = data.PatientBirthDate = "19310203"
            data.StudyInstanceUID = f"1.2.826.0.1.3680043.99.1.{number}"
            data.SeriesInstanceUID = f"1.2.826.0.1.3680043.99.2.{number}"
            data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = f"1.2.826.0.1.3680043.99.3.{number}"
            data.AccessionNumber, data.PatientAge = f"ACCQ{number}", "093Y" if number % 5 == 0 else "044Y"
            data.SeriesDescription = f"ZZTEST said {number}"
            data.private_block(0x0029, "ZZTEST", create=True).add_new(1, "LO", "MRN-1")
            data.save_as(path.with_name(f"ZZTEST {number}"), enforce_file_format=True)
            path.unlink()
        except Exception:  # noqa: S112  the broken files that every export holds stay as they are
            continue
    site = Site.open(home)
    ingest(site.source, home, site.state, nothing)
    assert Index.open(site.state).taken >= PATIENTS
    return home


def public_key() -> bytes:
    from hospital import COORDINATOR

    return keys.public_pem(COORDINATOR.public_key())


@pytest.fixture
def home(made: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy whose files a test may change."""
    target = tmp_path / "north"
    shutil.copytree(made, target, symlinks=True)
    text = (target / "site.yaml").read_text(encoding="utf-8").replace(str(made), str(target))
    (target / "site.yaml").write_text(text, encoding="utf-8")
    yield target


def source_files(home: Path) -> dict[str, Path]:
    site = Site.open(home)
    return {image.file: home / site.source.folder / image.file for image in Index.open(site.state).images()}


def all_bytes(folder: Path) -> list[bytes]:
    return [str(p.relative_to(folder)).encode() + p.read_bytes() for p in folder.rglob("*") if p.is_file()]


def stamp_text(home: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let one image look as if a device had burned a name into it; the image's name in the index."""
    plain, marked = Index.pixels, Index.open(Site.open(home).state).images()[number].file

    def pixels(self: Index, image: Any) -> Any:
        found = plain(self, image)
        if image.file != marked:
            return found
        picture = Image.fromarray(np.rint(found * 255).astype(np.uint8))
        ImageDraw.Draw(picture).text((20, 110), "MUSTERMANN ERIKA 1956", fill=255, font_size=16)
        return np.asarray(picture, np.float32) / 255

    monkeypatch.setattr(Index, "pixels", pixels)
    return marked


# DICOM ---------------------------------------------------------------------------------------------------------------


def test_copies_are_clean_whole_and_written_down(home: Path, tmp_path: Path) -> None:
    site, out = Site.open(home), tmp_path / "out"
    result = export_dicom(site, out, Choice(retain_characteristics=True, dates="shifted"), nothing)
    assert result.images == Index.open(site.state).taken and result.patients == PATIENTS and not result.left_out
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["version"] == "isocenter/v1/export" and manifest["counts"] == result.to_json()
    assert manifest["profile"]["codes"] == ["113100", "113107", "113108"] and manifest["profile"]["dates"] == "shifted"
    assert not [mark for data in all_bytes(out) for mark in MARKS if mark in data]
    names = [file["file"] for file in manifest["files"]]
    assert names == sorted(names) and len(set(names)) == len(names) == result.images
    pixels = {hashlib.sha256(pydicom.dcmread(path).PixelData).hexdigest() for path in source_files(home).values()}
    for file in manifest["files"]:
        data = (out / file["file"]).read_bytes()
        assert keys.digest(data) == file["sha256"] and len(data) == file["bytes"]
        copy = pydicom.dcmread(io.BytesIO(data))
        assert file["file"] == f"{copy.PatientID}/{copy.StudyInstanceUID}/{copy.SOPInstanceUID}.dcm"
        assert identifying(copy) == [] and copy.PatientAge in ("044Y", "090Y")
        assert hashlib.sha256(copy.PixelData).hexdigest() in pixels
    assert oct((out / "manifest.json").stat().st_mode)[-3:] == "600" and oct(out.stat().st_mode)[-3:] == "700"
    line = site.journal.last("export")
    assert line == {
        **{"what": "dicom", "images": result.images, "patients": PATIENTS, "content_bytes": result.bytes},
        "manifest": keys.digest((out / "manifest.json").read_bytes()),
    }
    assert verify(home / "journal.jsonl") == 1


def test_a_second_export_fits_the_first_and_another_sites_does_not(home: Path, tmp_path: Path) -> None:
    site = Site.open(home)
    for name in ("one", "two"):
        export_dicom(site, tmp_path / name, Choice(limit=3), nothing)
    (home / "keys" / export.SECRET).unlink()
    export_dicom(site, tmp_path / "three", Choice(limit=3), nothing)
    one, two, three = ({p.name for p in (tmp_path / n).rglob("*.dcm")} for n in ("one", "two", "three"))
    assert one == two and len(one) == 3 and not one & three
    assert oct((home / "keys" / export.SECRET).stat().st_mode)[-3:] == "600"


def test_text_in_the_picture_waits_for_a_person(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, site = stamp_text(home, 2, monkeypatch), Site.open(home)
    result = export_dicom(site, tmp_path / "out", Choice(), nothing)
    assert result.left_out == {Kept.SUSPECTED: 1} and result.to_review == [file]
    again = export_dicom(site, tmp_path / "again", Choice(reviewed=frozenset([file])), nothing)
    assert not again.left_out and again.images == result.images + 1


def test_changed_missing_lost_and_unreadable_files_are_counted(home: Path, tmp_path: Path) -> None:
    files = list(source_files(home).values())
    with files[0].open("ab") as file:
        file.write(b"x")
    files[1].unlink()
    files[2].unlink()
    files[2].symlink_to("/etc/hostname")
    site = Site.open(home)
    image = Index.open(site.state).images()[3]
    next((site.state / "cache").rglob(f"{image.cache}.npy")).unlink()
    result = export_dicom(site, tmp_path / "out", Choice(), nothing)
    assert result.left_out == {Kept.CHANGED: 1, Kept.MISSING: 2, Kept.NOT_ONE_IMAGE: 1}
    assert result.images == len(files) - 4 and all(reason.explanation for reason in Kept)


class Changed(Index):
    """An index in which the rows say something else."""

    change: dict[str, Any]

    def images(self) -> list[Any]:
        first, *rest = super().images()
        copy = object.__new__(type(first))
        copy.__dict__.update(vars(first) | self.change)
        return [copy, *rest]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"modality": "CT"}, Kept.NOT_ONE_IMAGE),
        ({"file": "../../site.yaml"}, Kept.MISSING),
        ({"file": "no\0name"}, Kept.MISSING),
        ({"sha256": "0" * 64}, Kept.CHANGED),
    ],
)
def test_rows_that_are_no_single_readable_file_are_counted(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], reason: Kept
) -> None:
    monkeypatch.setattr(Changed, "change", change, raising=False)
    monkeypatch.setattr(export, "Index", Changed)
    result = export_dicom(Site.open(home), tmp_path / "out", Choice(limit=4), nothing)
    assert result.left_out == {reason: 1} and result.images == 3
    assert export_bih(Site.open(home), tmp_path / "bih", COLLECTION, nothing).left_out == {reason: 1}


def rewritten(home: Path, monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Let every source file be read with another header than it has, as if it had been ingested so."""
    plain = export._bytes_of

    def changed(site: Site, image: Any) -> bytes:
        dataset = pydicom.dcmread(io.BytesIO(plain(site, image)))
        change(dataset)
        file = io.BytesIO()
        dataset.save_as(file)
        return file.getvalue()

    monkeypatch.setattr(export, "_bytes_of", changed)


def test_what_the_header_says_of_text_holds_too(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewritten(home, monkeypatch, lambda dataset: setattr(dataset, "BurnedInAnnotation", "YES"))
    with pytest.raises(DataError, match="burned_in_marked"):
        export_dicom(Site.open(home), tmp_path / "out", Choice(limit=3), nothing)
    assert not list(tmp_path.glob("out*")), "an export that fails leaves nothing"
    assert Site.open(home).journal.last("export") is None
    everything = frozenset(source_files(home))
    result = export_dicom(Site.open(home), tmp_path / "out", Choice(limit=3, reviewed=everything), nothing)
    assert result.images == 3


def test_a_copy_in_which_anything_is_still_found_stays(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export.annex_e, "identifying", lambda dataset: ["PatientName"])
    with pytest.raises(DataError, match="3 still_identifying"):
        export_dicom(Site.open(home), tmp_path / "out", Choice(limit=3), nothing)


def test_the_folder_must_be_new_and_a_broken_off_export_leaves_none(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site.open(home)
    (tmp_path / "old").mkdir()
    with pytest.raises(DataError, match="there already"):
        export_dicom(site, tmp_path / "old", Choice(limit=2), nothing)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_dicom(site, tmp_path / "out", Choice(limit=2), stop)
    monkeypatch.setattr(type(site.journal), "append", lambda *_, **__: stop(0, 0))
    with pytest.raises(KeyboardInterrupt):
        export_dicom(site, tmp_path / "out", Choice(limit=2), nothing)
    assert not list(tmp_path.glob("out*"))


def test_without_an_index_or_with_pictures_there_is_no_export(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(home / "state")
    for run in (
        lambda: export_dicom(Site.open(home), tmp_path / "out", Choice(), nothing),
        lambda: export_bih(Site.open(home), tmp_path / "out", COLLECTION, nothing),
    ):
        with pytest.raises(CacheLost):
            run()
    text = (home / "site.yaml").read_text().replace("format: dicom", "format: pictures")
    (home / "site.yaml").write_text(text)
    for run in (
        lambda: export_dicom(Site.open(home), tmp_path / "out", Choice(), nothing),
        lambda: export_bih(Site.open(home), tmp_path / "out", COLLECTION, nothing),
    ):
        with pytest.raises(DataError, match="no DICOM"):
            run()


# The table for the hub -----------------------------------------------------------------------------------------------


def test_the_table_fits_the_hub_and_names_nobody(home: Path, tmp_path: Path) -> None:
    site, out = Site.open(home), tmp_path / "bih"
    result = export_bih(site, out, COLLECTION, nothing)
    rows = json.loads((out / "imaging_series.json").read_text())
    jsonschema.validate(rows, SERIES_SCHEMA)
    assert result.rows == len(rows) == result.images and result.patients == PATIENTS
    assert not [mark for data in all_bytes(out) for mark in MARKS if mark in data]
    assert {row.get("PatientAge") for row in rows} == {44, None}, "ages above 89 are left out"
    assert {row["PatientSex"] for row in rows} == {"Female", "Male"} and {row["primary_site"] for row in rows} == {
        "Lung"
    }
    assert {row["StudyDescription"] for row in rows} == {"XR CHEST"}, "said of all patients"
    assert not any("SeriesDescription" in row for row in rows), "each said of one patient only"
    with (out / "imaging_series.tsv").open(newline="") as file:
        table = list(csv.DictReader(file, delimiter="\t"))
    assert [{k: v for k, v in row.items() if v} for row in table] == [
        {k: str(v) for k, v in row.items()} for row in rows
    ]
    line = site.journal.last("export")
    assert line is not None and (line["what"], line["images"], line["patients"]) == ("bih", result.images, PATIENTS)


def test_pseudonyms_of_the_table_are_those_of_the_copies(home: Path, tmp_path: Path) -> None:
    site = Site.open(home)
    export_bih(site, tmp_path / "bih", COLLECTION, nothing)
    export_dicom(site, tmp_path / "out", Choice(), nothing)
    rows = json.loads((tmp_path / "bih" / "imaging_series.json").read_text())
    copies = [pydicom.dcmread(path, stop_before_pixels=True) for path in (tmp_path / "out").rglob("*.dcm")]
    for names in (("PatientID",), ("PatientID", "StudyInstanceUID", "SeriesInstanceUID")):
        assert {tuple(row[n] for n in names) for row in rows} == {tuple(str(c[n].value) for n in names) for c in copies}


def test_real_uids_leave_only_when_asked_for_and_patients_never(home: Path, tmp_path: Path) -> None:
    site, real = Site.open(home), Collection(**vars(COLLECTION) | {"real_uids": True})
    export_bih(site, tmp_path / "bih", real, nothing)
    rows = json.loads((tmp_path / "bih" / "imaging_series.json").read_text())
    jsonschema.validate(rows, SERIES_SCHEMA)
    assert all(row["StudyInstanceUID"].startswith("1.2.826.0.1.3680043.99.1.") for row in rows)
    assert not [mark for data in all_bytes(tmp_path / "bih") for mark in MARKS[:4] if mark in data]
    assert json.loads((tmp_path / "bih" / "manifest.json").read_text())["uids"] == "real"


@pytest.mark.parametrize("name", ["collection_id", "data_contributor", "license", "commons_name", "commons_long_name"])
def test_what_the_hub_requires_must_be_given(home: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=name):
        export_bih(Site.open(home), tmp_path / "bih", Collection(**vars(COLLECTION) | {name: "  "}), nothing)


def test_odd_headers_give_rows_with_gaps(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(dataset: Any) -> None:
        dataset.PatientSex, dataset.Manufacturer, dataset.BodyPartExamined = "O", "a\x1bb", "CHEST"
        dataset.PatientAge = "12"

    with pytest.warns(UserWarning, match="Invalid value"):
        rewritten(home, monkeypatch, change)
        export_bih(Site.open(home), tmp_path / "bih", COLLECTION, nothing)
    rows = json.loads((tmp_path / "bih" / "imaging_series.json").read_text())
    jsonschema.validate(rows, SERIES_SCHEMA)
    assert all("PatientSex" not in row and "Manufacturer" not in row and "PatientAge" not in row for row in rows)
    assert {row["BodyPartExamined"] for row in rows} == {"CHEST"}


# The command ---------------------------------------------------------------------------------------------------------


def test_the_command_asks_says_and_names_what_waits(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, where = stamp_text(home, 1, monkeypatch), ["--home", str(home)]
    refused = RUNNER.invoke(export_cli.app, ["dicom", str(tmp_path / "out"), *where], input="n\n")
    assert refused.exit_code == 1 and not (tmp_path / "out").exists()
    done = RUNNER.invoke(export_cli.app, ["dicom", str(tmp_path / "out"), "--yes", "--dates", "shifted", *where])
    assert done.exit_code == 0, done.output
    waiting = home / "private" / "burned-in.txt"
    assert "Pixels are not changed" in done.output and "1 stay here" in done.output
    assert waiting.read_text().splitlines() == [file] and oct(waiting.stat().st_mode)[-3:] == "600"
    assert not [mark for mark in MARKS if mark in done.output.encode()]
    again = RUNNER.invoke(
        export_cli.app, ["dicom", str(tmp_path / "all"), "-y", "--json", "--reviewed", str(waiting), *where]
    )
    assert json.loads(again.stdout)["left_out"] == {} and again.exit_code == 0


def test_the_command_for_the_hub(home: Path, tmp_path: Path) -> None:
    given = ["bih", str(tmp_path / "bih"), "--collection", "c1", "--contributor", "north", "--license", "CC BY 4.0"]
    done = RUNNER.invoke(export_cli.app, [*given, "--yes", "--json", "--home", str(home)])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["rows"] >= PATIENTS and "pseudonyms" in done.stderr
    rows = json.loads((tmp_path / "bih" / "imaging_series.json").read_text())
    assert {(row["commons_name"], row["commons_long_name"]) for row in rows} == {("north", "north")}
    real = RUNNER.invoke(export_cli.app, [*given, "--real-uids", "--home", str(home)], input="n\n")
    assert "REAL" in real.output and real.exit_code == 1


def test_a_list_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "list").write_bytes(b"\xff\xfe\0")
    for path in (tmp_path / "list", tmp_path / "none", tmp_path):
        with pytest.raises(DataError, match="cannot be read"):
            export.reviewed_in(path)
