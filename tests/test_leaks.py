"""Hospitals in which everything carries a mark: headers, names of files and folders, cells of the label table. What crosses the
boundary, what the coordinator keeps and what any log or screen of a service shows is searched for these marks.

HOME/private is the only place where they may be, and there they must be: that proves that the errors were really provoked.
"""

import base64
import contextlib
import json
import logging
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hospital as cast
import numpy as np
import pydicom
import pytest
from federation import Federation
from flwr.app import Message
from flwr.common.serde import message_to_proto
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from hospital import COORDINATOR, Hospital
from stage import Stage, StageError

from fl_client.ingest import Index, ingest
from fl_client.rehearsal import prepare
from fl_client.site import Site
from fl_server.run import Run
from models import imaging, learning
from privacy.deidentify import guarded
from privacy.errors import DataError, public_codes
from privacy.wire import REPORTS, EvaluateOrder, Refusal, TrainOrder, decode

WORDS = ("ZZTEST", "ZZHOSPITAL", "ZZDOCTOR", "MRN-", "ACCQ", "19310203", "1.2.826.0.1.3680043.99.")
"""Of a patient, an institution and a physician; of a number, an accession, a date and a UID."""


BY_CHANCE = 7  # fewer characters of base64 come up in any large file


def spellings(word: str) -> set[bytes]:
    """`word` as it may stand in a stream of bytes: text, UTF-16, hexadecimal, and base64 at each of its three offsets."""
    plain = word.lower().encode()
    found = {plain, word.lower().encode("utf-16-le"), plain.hex().encode(), word.encode().hex().encode()}
    for offset in range(3):
        coded = base64.b64encode(bytes(offset) + word.encode()).decode()
        piece = coded[-(-8 * offset // 6) : 8 * (offset + len(word)) // 6]  # what depends on the word alone
        found.add(piece.lower().encode())
    return {spelling for spelling in found if len(spelling) >= BY_CHANCE or spelling == plain}


LOOKED_FOR = {spelling: word for word in WORDS for spelling in spellings(word)}


def marks_in(data: bytes) -> set[str]:
    """Every mark in `data`, in any spelling; also in what it holds compressed by zlib or gzip."""
    found = {word for spelling, word in LOOKED_FOR.items() if spelling in data.lower()}
    for start, bits in ((b"\x78\x9c", 15), (b"\x1f\x8b\x08", 31)):
        place = data.find(start)
        while place >= 0:
            with contextlib.suppress(zlib.error):
                found |= marks_in(zlib.decompressobj(bits).decompress(data[place:], 2**24))
            place = data.find(start, place + 1)
    return found


def plant(folder: Path) -> None:
    """Marks in every header that a hospital fills, in the label table, and in the name of every file and folder."""
    table = folder / "labels.csv"
    text = table.read_text(encoding="utf-8")
    for number, path in enumerate(sorted(p for p in (folder / "dicom").rglob("*") if p.is_file())):
        target = folder / "dicom" / f"ZZTEST^{number % 7} 19310203" / f"ACCQ{number:05d} MRN-{number}{path.suffix}"
        target.parent.mkdir(exist_ok=True)
        try:
            data = pydicom.dcmread(path)
            before = [str(data.get(k, "")) for k in ("PatientID", "StudyInstanceUID", "AccessionNumber")]
            data.PatientID = f"MRN-{before[0]}"[:64]
            data.StudyInstanceUID = f"1.2.826.0.1.3680043.99.1.{number}"
            data.SeriesInstanceUID = f"1.2.826.0.1.3680043.99.2.{number}"
            data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = f"1.2.826.0.1.3680043.99.3.{number}"
            data.AccessionNumber = f"ACCQ{number:05d}"
            data.PatientName, data.ReferringPhysicianName = f"ZZTEST^{number}", "ZZDOCTOR^HOUSE"
            data.InstitutionName = data.StationName = data.ProtocolName = "ZZHOSPITAL"
            data.StudyDate = data.PatientBirthDate = "19310203"
            data.PatientComments = "ZZTEST had ACCQ at ZZHOSPITAL"
            data.save_as(target, enforce_file_format=True)
            for old, new in zip(before, (data.PatientID, data.StudyInstanceUID, data.AccessionNumber), strict=True):
                text = text.replace(old, str(new)) if len(old) > 4 else text
            path.unlink()
        except Exception:  # one of the broken files that every export holds: under a marked name as it is
            path.rename(target)
    first, *rows = text.splitlines()
    table.write_text("\n".join([first, *rows, "ZZTEST^X MRN-0,ZZDOCTOR"]) + "\n", encoding="utf-8")


def spoil(folder: Path) -> None:
    """Files that make pydicom and the decoders quote what they read, beside the good ones."""
    good = next(p for p in sorted((folder / "dicom").rglob("ACCQ*")) if p.stat().st_size > 5000 and not p.suffix)
    base = pydicom.dcmread(good)
    changes: list[tuple[str, bytes]] = [
        ("StudyDate", b"ZZTEST 1"),
        ("PatientAge", b"ZZTE"),
        ("StudyInstanceUID", b"ZZTEST\xe9.1"),  # not ASCII, so pydicom is asked, and says what it thinks of it
        ("SOPInstanceUID", b"ZZTEST.1"),
        ("SeriesInstanceUID", b"ZZTEST" * 20),
    ]
    for number, (keyword, value) in enumerate(changes):
        blob, tag = bytearray(good.read_bytes()), pydicom.datadict.tag_for_keyword(keyword)
        vr = pydicom.datadict.dictionary_VR(tag).encode()
        head = tag.to_bytes(4, "big")
        head = bytes([head[1], head[0], head[3], head[2]]) + vr
        place = blob.find(head)
        if place > 0:
            size = int.from_bytes(blob[place + 6 : place + 8], "little")
            blob[place + 8 : place + 8 + size] = value[:size].ljust(size)
        (good.parent / f"ZZTEST bad {number}").write_bytes(bytes(blob))
    blob = good.read_bytes()
    (good.parent / "ZZTEST short").write_bytes(blob[: len(blob) * 2 // 3])
    (good.parent / "ZZTEST noise").write_bytes(blob[:2000] + b"ZZTEST^MARIA" * 200)
    base.Rows = 60000
    base.save_as(good.parent / "ZZTEST large")
    (good.parent / "ZZTEST gone").symlink_to("/nowhere/ZZTEST")


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Homes of hospitals full of marks, each made once."""
    made: dict[str, Path] = {}

    def home_of(name: str) -> Path:
        if name not in made:
            home = tmp_path_factory.mktemp("marked") / name
            prepare(home, name, (16, len(name)), COORDINATOR.public_key())
            text = (home / "site.yaml").read_text().replace("minimum_patients: 1\n", "minimum_patients: 2\n")
            # So many spoiled files among so few would stop any hospital.
            (home / "site.yaml").write_text(text.replace("damaged_share_max: 0.05", "damaged_share_max: 0.9"))
            plant(home / "hospital")
            spoil(home / "hospital")
            site = Site.open(home)
            ingest(site.source, home, site.state)
            made[name] = home
        return made[name]

    return home_of


@pytest.fixture
def consortium(
    tmp_path: Path, marked: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Federation, list[bytes]]]:
    """Marked hospitals under the guard of one home, and everything that they send."""
    monkeypatch.setattr(cast, "_ingested", marked)
    # Plain: what each site sends is there to be searched, and not hidden under a mask.
    federation, crossed = Federation(tmp_path, cast.study()), []
    deliver = federation.answers

    def recorded(name: str) -> Callable[[Message], Message]:
        answer = deliver(name)

        def both(message: Message) -> Message:
            reply = answer(message)
            crossed.extend(bytes_of(reply))
            return reply

        return both

    monkeypatch.setattr(federation, "answers", recorded)
    with guarded(tmp_path):
        yield federation, crossed


def bytes_of(message: Message) -> list[bytes]:
    objects = [thing.deflate() for thing in get_all_nested_objects(message).values()]
    return [*objects, message_to_proto(message).SerializeToString()]


def files_below(*folders: Path) -> list[Path]:
    return [path for folder in folders for path in folder.rglob("*") if path.is_file()]


def leaks(paths: list[Path]) -> dict[str, set[str]]:
    return {str(path): marks_in(path.read_bytes()) for path in paths if marks_in(path.read_bytes())}


def test_the_search_finds_a_mark_in_every_spelling() -> None:
    import gzip

    for text in ("x ZZTEST^A", "yyZZHOSPITAL ", "ZZDOCTOR", "a 19310203 c"):
        raw = text.encode()
        coded = [raw, text.encode("utf-16-le"), raw.hex().encode(), base64.b64encode(raw), gzip.compress(raw)]
        assert all(marks_in(b"\x00\x01" + form) for form in [*coded, zlib.compress(raw)]), text
    assert not marks_in(bytes(range(256)) * 9) and not marks_in(np.arange(99999, dtype=np.float32).tobytes())


def test_a_whole_study_leaves_no_mark_outside_the_hospitals(
    consortium: tuple[Federation, list[bytes]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    federation, crossed = consortium
    assert Run.open(federation.run(federation.grid())).facts["state"] == "complete"
    assert len(crossed) > 20 and not [marks_in(data) for data in crossed if marks_in(data)]
    kept = files_below(tmp_path / "coordinator")
    assert len(kept) > 8 and leaks(kept) == {}
    journals = [h.home / "journal.jsonl" for h in federation.hospitals.values()]
    assert all(path.stat().st_size > 500 for path in journals) and leaks(journals) == {}
    printed = capfd.readouterr()
    assert not marks_in((printed.out + printed.err).encode())
    # The hospitals themselves are full of marks: the images were read, and the index names them.
    for each in federation.hospitals.values():
        assert Index.open(each.site.state).taken >= 10
        assert {"MRN-", "ZZTEST", "ACCQ"} <= marks_in((each.site.state / "index.sqlite").read_bytes())


def boom(*_: Any, **__: Any) -> Any:
    raise KeyError("ZZTEST^MARIA of ZZHOSPITAL, MRN-1")


def ruined(*_: Any, **__: Any) -> Any:
    logging.getLogger("pydicom").warning("Invalid value for VR DA: 'ZZTEST 1950'")
    logging.getLogger("monai").error("item: {'path': '/ZZHOSPITAL/MRN-1'}")
    raise DataError("ZZTEST^MARIA: 19310203")


def table_of(home: Path) -> Path:
    return home / "hospital" / "labels.csv"


def vanish(home: Path, _: pytest.MonkeyPatch) -> None:
    for path in (home / "state" / "cache").rglob("*.npy"):
        path.unlink()


def damage(home: Path, _: pytest.MonkeyPatch) -> None:
    for path in (home / "state" / "cache").rglob("*.npy"):
        path.write_bytes(b"ZZTEST^MARIA")


def no_index(home: Path, _: pytest.MonkeyPatch) -> None:
    (home / "state" / "index.sqlite").write_bytes(b"ZZTEST^MARIA" * 100)


def table(content: bytes) -> Callable[[Path, pytest.MonkeyPatch], None]:
    """Another label table than the one that was ingested."""

    def write(home: Path, _: pytest.MonkeyPatch) -> None:
        own = home / "ZZTEST labels.csv"
        own.write_bytes(content)
        site = home / "site.yaml"
        lines = [
            f"    table: {own}" if line.strip().startswith("table:") else line for line in site.read_text().splitlines()
        ]
        site.write_text("\n".join(lines) + "\n")

    return write


def no_table(home: Path, patch: pytest.MonkeyPatch) -> None:
    table(b"x")(home, patch)
    (home / "ZZTEST labels.csv").unlink()


def raising(module: Any, name: str, what: Callable[..., Any]) -> Callable[[Path, pytest.MonkeyPatch], None]:
    return lambda home, patch: patch.setattr(module, name, what)


def damaged_pins(home: Path, _: pytest.MonkeyPatch) -> None:
    for path in (home / "studies").glob("*.json"):
        path.with_name(path.stem + ".pins.json").write_text('{"ZZTEST^MARIA": "MRN-1"}')


WRONG: dict[str, tuple[Callable[[Path, pytest.MonkeyPatch], None], str]] = {
    "pixels vanished": (vanish, "cache-lost"),
    "pixels changed": (damage, "cache-lost"),
    "index damaged": (no_index, "cache-lost"),
    "table without header": (table(b"MRN-1,ZZTEST^MARIA\nMRN-2,ZZTEST^EVA\n"), "label-table"),
    "table binary": (table(b"ZZTEST\0\xff\xfeMRN-1"), "label-table"),
    "table gone": (no_table, "label-table"),
    "a name in training": (raising(learning, "learn", boom), "internal"),
    "libraries quoting": (raising(learning, "learn", ruined), "data"),
    "a name in evaluation": (raising(learning, "predict", boom), "internal"),
    "assignment damaged": (damaged_pins, "data"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_goes_wrong_at_a_site_crosses_as_a_code_and_is_written_down_in_private(
    what: str, tmp_path: Path, marked: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(cast, "_ingested", marked)
    change, code = WRONG[what]
    each = Hospital.open(tmp_path)
    with guarded(each.home, level=logging.DEBUG):
        change(each.home, monkeypatch)
        replies = [each.deliver(each.order(TrainOrder)), each.deliver(each.order(EvaluateOrder))]
    refusals = [report for report in (decode(reply, *REPORTS) for reply in replies) if isinstance(report, Refusal)]
    assert refusals and {report.code for report in refusals} == {code} <= public_codes()
    assert not [marks_in(data) for reply in replies for data in bytes_of(reply) if marks_in(data)]
    assert leaks([each.home / "journal.jsonl"]) == {}
    printed = capfd.readouterr()
    assert "private.log, entry" in printed.err and not marks_in((printed.out + printed.err).encode())
    # What was damaged holds marks; what is said of it names its file, and not what is in it.
    quotes = change not in (vanish, damage, no_index, damaged_pins)
    assert bool(marks_in((each.home / "private" / "private.log").read_bytes())) == quotes


def test_files_that_make_pydicom_quote_them_are_counted_without_a_word(
    tmp_path: Path, marked: Callable[[str], Path], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once as it is, and once with the reader's own silence taken away: then the guard alone keeps the texts in."""
    monkeypatch.setattr(cast, "_ingested", marked)
    each, reports, shown = Hospital.open(tmp_path), [], []
    with guarded(each.home, level=logging.DEBUG):
        for quiet in (True, False):
            if not quiet:
                monkeypatch.setattr(imaging, "quiet_reading", contextlib.nullcontext)
            state = tmp_path / f"state-{quiet}"
            reports.append(ingest(each.site.source, each.home, state))
            shown.append(capfd.readouterr().err)
    assert replace(reports[0], seconds=0) == replace(reports[1], seconds=0)
    assert sum(reports[0].reasons.values()) >= 5 and reports[0].taken >= 10
    assert shown[0] == "" and "a message of pydicom" in shown[1] and not marks_in(shown[1].encode())
    assert "ZZTEST" in marks_in((each.home / "private" / "private.log").read_bytes())


@pytest.mark.deploy
@pytest.mark.slow
def test_real_processes_print_log_and_keep_no_mark(tmp_path: Path) -> None:
    """Two marked hospitals, a coordinator and a researcher as processes; a second run meets a table of names without header."""
    stage = Stage(tmp_path / "stage")
    printed: list[str] = []
    try:
        stage.found()
        stage.serve()
        stage.join_researcher()
        for name in ("north", "south"):
            printed.append(stage.open_hospital(name, "aurora", 16, minimum_patients=2))
            plant(stage.folder / "hospitals" / name)
            spoil(stage.folder / "hospitals" / name)
            site = stage.site(name) / "site.yaml"
            text = site.read_text().replace("least_protection: masked", "least_protection: plain")
            # So many spoiled files among so few would stop any hospital.
            site.write_text(text.replace("\n  format: dicom\n", "\n  format: dicom\n  damaged_share_max: 0.9\n"))
            printed.append(stage.command("fl-client", "ingest", "--home", str(stage.site(name))))
            stage.node(name)
        path = stage.folder / "study.yaml"
        path.write_text(json.dumps(cast.study().model_dump(mode="json")))
        digest = stage.submit(path)
        printed += [stage.approve(name, digest) for name in ("north", "south")]
        assert "Run finished: complete" in stage.study("run", digest)
        table = stage.folder / "hospitals" / "north" / "labels.csv"
        table.write_text("MRN-1,ZZTEST^MARIA\nMRN-2,ZZTEST^EVA\n")
        with pytest.raises(StageError) as failed:
            stage.study("run", digest)
    finally:
        stage.stop()
    assert not marks_in("\n".join([*printed, str(failed.value)]).encode())
    north = stage.site("north")
    assert '"code":"label-table"' in (north / "journal.jsonl").read_text()
    assert {"ZZTEST", "MRN-"} <= marks_in((north / "private" / "private.log").read_bytes())
    journals = [stage.site(name) / "journal.jsonl" for name in ("north", "south")]
    kept = files_below(stage.folder / "logs", stage.coordinator, stage.researcher)
    assert len(kept) > 20 and leaks([*journals, *kept]) == {}
