"""Fetching: whatever an archive answers, nothing wrong is kept, nothing right is asked for twice, and each failure has a name."""

import datetime as dt
import io
import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import typer
from archive_cast import CR, Certificates, DicomArchive, TlsFront, WebArchive, free_port, part
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian
from typer.testing import CliRunner

from fl_client import archive_cli
from fl_client.archive import Accessions, Dicomweb, Dimse, Found, NotFetched, Question, Reason, Select, secret
from fl_client.dicomweb import Server, part_of, retry_after_s
from fl_client.dimse import Peer
from fl_client.fetching import BACKOFF_S, Choice, Clock, Plan, Result, Run, Stop, answers, questions_of
from models.study import Document, parse
from privacy.errors import DataError, DocumentError, KeyFileUnsafe

SECRET = "ZZSECRET"
HERE: tuple[str, ...] = ("1.1", "1.2", "1.3")


def image(study: str, uid: str, *, syntax: str = ExplicitVRLittleEndian, sop_class: str = CR) -> bytes:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID, dataset.file_meta.MediaStorageSOPInstanceUID = sop_class, uid
    dataset.SOPClassUID, dataset.SOPInstanceUID, dataset.StudyInstanceUID = sop_class, uid, study
    dataset.SeriesInstanceUID, dataset.PatientName, dataset.PatientID = "1.9", f"{SECRET}^A", SECRET
    dataset.Modality, dataset.StudyDate = "CR", "20240102"
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def images(studies: tuple[str, ...] = HERE, each: int = 2) -> dict[tuple[str, str], bytes]:
    return {(study, f"{study}.{n}"): image(study, f"{study}.{n}") for study in studies for n in range(each)}


@dataclass
class FakeTime:
    """A clock that does not wait; `slept` says for how long it would have."""

    moment: float = 1_704_189_600.0
    slept: list[float] = field(default_factory=list)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.moment += seconds

    @property
    def clock(self) -> Clock:
        return Clock(lambda: self.moment, self.sleep)


@pytest.fixture
def web() -> Iterator[WebArchive]:
    archive = WebArchive(images())
    yield archive
    archive.close()


def settings_of(archive: WebArchive, **changes: Any) -> Dicomweb:
    given = {"kind": "dicomweb", "url": archive.url, "select": {"first_day": "2024-01-01", "last_day": "2024-01-05"}}
    return Dicomweb.model_validate(given | {"per_minute": 6000.0, "gigabytes_free": 0.0, "timeout_s": 5.0} | changes)


def fetch(
    settings: Dicomweb | Dimse, home: Path, choice: Choice | None = None, waited: FakeTime | None = None
) -> Result:
    archive = Server(settings, home) if isinstance(settings, Dicomweb) else Peer(settings, home)
    clock = (waited or FakeTime()).clock
    try:
        return Run(settings, home, home / "landing", archive, choice or Choice(), clock).fetch()
    finally:
        archive.close()


def landed(home: Path) -> list[Path]:
    return sorted(path for path in (home / "landing").rglob("*") if path.is_file())


def failure(home: Path, web: WebArchive, rule: Any, **changes: Any) -> tuple[Reason | None, dict[Reason, int]]:
    """Why nothing can be had of the archive, and why studies were not copied, if images are answered by `rule`."""
    web.rule = lambda path: rule() if path.rsplit("/", 2)[-2] == "instances" else None
    result = fetch(settings_of(web, **changes), home)
    assert not landed(home) and not list((home / "landing").rglob("*.part"))
    return result.problem, result.counts.failed


# The honest archive --------------------------------------------------------------------------------------------------


def test_images_arrive_whole_private_and_once(web: WebArchive, tmp_path: Path) -> None:
    result = fetch(settings_of(web), tmp_path)
    assert (result.stop, result.images, result.studies, result.counts.done) == (Stop.DONE, 6, 3, 3)
    assert {path.read_bytes() for path in landed(tmp_path)} == set(web.images.values())
    assert {path.stat().st_mode & 0o777 for path in landed(tmp_path)} == {0o600}
    assert all(len(path.stem) == 64 and path.suffix == ".dcm" for path in landed(tmp_path))
    wado = [headers for path, headers in web.asked if path.rsplit("/", 2)[-2] == "instances"]
    assert len(wado) == 6 and all("transfer-syntax=*" in headers["Accept"] for headers in wado)
    web.asked.clear()
    again = fetch(settings_of(web), tmp_path)
    assert (again.images, again.counts.done, web.asked) == (0, 3, [])
    assert fetch(settings_of(web), tmp_path, Choice(ask_again=True)).images == 0


def test_pages_are_turned_until_there_are_no_more(tmp_path: Path) -> None:
    web = WebArchive(images(tuple(f"1.5.{n}" for n in range(450)), each=1))
    try:
        archive = Server(settings_of(web), tmp_path)
        assert len({found.uid for found in archive.studies(Question())}) == 450
        assert len(web.asked) == 3
        honest = web.honest
        web.rule = lambda path: honest(path.replace("offset=", "ignored="))  # the same page for ever
        assert len({found.uid for found in archive.studies(Question())}) == 200
        archive.close()
    finally:
        web.close()


def test_a_study_goes_on_at_the_image_where_it_stopped(web: WebArchive, tmp_path: Path) -> None:
    broken = [True, True]
    web.rule = lambda path: (500, {}, b"") if path.endswith("/1.1.1") and broken and broken.pop() else None
    waited = FakeTime()
    result = fetch(settings_of(web), tmp_path, waited=waited)
    assert result.counts.done == 3 and result.stop is Stop.DONE
    asked = [path.rsplit("/", 1)[-1] for path, _ in web.asked if path.rsplit("/", 2)[-2] == "instances"]
    assert asked.count("1.1.0") == 1 and asked.count("1.1.1") == 3  # what was here was not asked for again


def test_numbers_of_a_list_and_what_is_not_there(web: WebArchive, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text('name;number\nx;A0\ny; A2 \nz;A9\nz;A*\n"";\n')
    chosen = {"accession_numbers": "list.csv", "column": "number"}
    result = fetch(settings_of(web, select=chosen), tmp_path)
    assert (result.counts.done, result.counts.numbers, result.malformed_numbers) == (2, (3, 1), 1)
    assert (tmp_path / "private/not-found.txt").read_text() == "A9\n"
    assert (tmp_path / "private/not-found.txt").stat().st_mode & 0o777 == 0o600
    assert "A9" not in json.dumps(result.to_json())


def test_a_number_that_was_taken_off_the_list_is_not_fetched(web: WebArchive, tmp_path: Path) -> None:
    (tmp_path / "list").write_text("A0\nA1\n")
    settings = settings_of(web, select={"accession_numbers": "list"}, studies_per_run=1)
    assert (fetch(settings, tmp_path).stop, len(landed(tmp_path))) == (Stop.STUDIES, 2)
    (tmp_path / "list").write_text("A0\n")
    result = fetch(settings.model_copy(update={"studies_per_run": 9}), tmp_path)
    assert (result.counts.wanted, result.counts.done, len(landed(tmp_path))) == (0, 1, 2)


# Pace and limits -----------------------------------------------------------------------------------------------------


def test_studies_are_begun_no_faster_than_said(web: WebArchive, tmp_path: Path) -> None:
    waited = FakeTime()
    fetch(settings_of(web, per_minute=2.0), tmp_path, waited=waited)
    assert sum(waited.slept) == pytest.approx(60, abs=1)  # three studies, two gaps of 30 s


def test_outside_its_hours_the_archive_is_left_alone(web: WebArchive, tmp_path: Path) -> None:
    waited = FakeTime()
    now = dt.datetime.fromtimestamp(waited.moment)
    begin = now + dt.timedelta(hours=1)
    hours = {"begin": f"{begin:%H:%M}", "end": f"{begin + dt.timedelta(hours=2):%H:%M}"}
    result = fetch(settings_of(web, hours=hours), tmp_path, waited=waited)
    assert (result.stop, web.asked) == (Stop.HOURS, [])
    assert fetch(settings_of(web, hours=hours), tmp_path, Choice(wait=True), waited).counts.done == 3
    assert sum(waited.slept) >= 3500


@pytest.mark.parametrize(
    ("limit", "stop"),
    [
        ({"studies_per_run": 1}, Stop.STUDIES),
        ({"gigabytes_per_run": 1e-7}, Stop.BYTES),
        ({"gigabytes_free": 1e6}, Stop.DISK),
    ],
)
def test_a_run_has_its_limits(web: WebArchive, tmp_path: Path, limit: dict[str, Any], stop: Stop) -> None:
    result = fetch(settings_of(web, **limit), tmp_path)
    assert result.stop is stop and result.counts.wanted > 0


def test_one_fetch_at_a_time(web: WebArchive, tmp_path: Path) -> None:
    from fl_client.landing import Landing

    with Landing(tmp_path / "landing").open(), pytest.raises(DataError, match="another fetch"):
        fetch(settings_of(web), tmp_path)


def test_a_person_who_stops_it_loses_nothing(web: WebArchive, tmp_path: Path) -> None:
    archive = Server(settings_of(web), tmp_path)
    run = Run(settings_of(web), tmp_path, tmp_path / "landing", archive, clock=FakeTime().clock)

    def progress(_: Any) -> None:
        if len(landed(tmp_path)) >= 2:
            raise KeyboardInterrupt

    run.progress = progress
    result = run.fetch()
    archive.close()
    assert result.stop is Stop.INTERRUPTED and result.counts.done == 1
    assert fetch(settings_of(web), tmp_path).images == 4


# The hostile web archive ---------------------------------------------------------------------------------------------


def endless(piece: bytes, pause_s: float = 0) -> Iterator[bytes]:
    while True:
        yield piece
        time.sleep(pause_s)


HEAD = part(b"")[2].replace(b"\r\n--limit--\r\n", b"") if isinstance(part(b"")[2], bytes) else b""
KIND = part(b"")[1]
OF_ANOTHER = image("9.9", "1.1.0")
ANOTHER = image("1.1", "9.9")
WRONG: list[tuple[str, Any, Reason]] = [
    ("another patient's study", lambda: part(OF_ANOTHER), Reason.WRONG_STUDY),
    ("another image", lambda: part(ANOTHER), Reason.WRONG_INSTANCE),
    ("a class that is not copied", lambda: part(image("1.1", "1.1.0", sop_class="1.2.3")), Reason.WRONG_INSTANCE),
    ("two images", lambda: part(image("1.1", "1.1.0"), ANOTHER), Reason.WRONG_INSTANCE),
    ("deflated", lambda: part(image("1.1", "1.1.0", syntax=DeflatedExplicitVRLittleEndian)), Reason.UNSUPPORTED),
    ("no DICOM", lambda: part(b"x" * 4096), Reason.MALFORMED),
    ("random after DICM", lambda: part(bytes(128) + b"DICM" + os.urandom(512)), Reason.MALFORMED),
    ("an empty part", lambda: part(b""), Reason.MALFORMED),
    ("no part", part, Reason.MALFORMED),
    ("no boundary", lambda: (200, {"Content-Type": "multipart/related"}, b"x"), Reason.MALFORMED),
    ("a page of a portal", lambda: (200, {"Content-Type": "text/html"}, b"<html>"), Reason.MALFORMED),
    ("a header without end", lambda: (200, KIND, endless(b"x" * 4096)), Reason.MALFORMED),
    ("packed", lambda: (200, KIND | {"Content-Encoding": "gzip"}, b"x"), Reason.UNSUPPORTED),
    ("too much announced", lambda: (200, KIND | {"Content-Length": str(2**40)}, iter([b"x"])), Reason.TOO_LARGE),
    ("gone", lambda: (404, {}, b""), Reason.NOT_FOUND),
    ("forbidden", lambda: (403, {}, b""), Reason.FORBIDDEN),
    ("not acceptable", lambda: (406, {}, b""), Reason.UNSUPPORTED),
    ("a teapot", lambda: (418, {}, b""), Reason.MALFORMED),
    ("an error", lambda: (500, {}, b""), Reason.ARCHIVE_ERROR),
    ("cut off", lambda: (200, KIND, iter([HEAD + image("1.1", "1.1.0")[:300]])), Reason.BROKEN_OFF),
]


@pytest.mark.parametrize(("rule", "reason"), [(rule, reason) for _, rule, reason in WRONG], ids=[w[0] for w in WRONG])
def test_what_is_wrong_has_a_name_and_is_not_kept(web: WebArchive, tmp_path: Path, rule: Any, reason: Reason) -> None:
    found = failure(tmp_path, web, rule)[1]
    assert sum(found.values()) == 3 and reason in found
    others = set(found) - {reason}  # the same answer is another image's for the other studies
    assert others <= {Reason.WRONG_STUDY, Reason.WRONG_INSTANCE, Reason.UNSUPPORTED}


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (lambda: (401, {"WWW-Authenticate": "Basic"}, b""), Reason.UNAUTHORISED),
        (lambda: (302, {"Location": "http://192.0.2.1/images"}, b""), Reason.REDIRECTED),
        (lambda: (307, {"Location": "/elsewhere"}, b""), Reason.REDIRECTED),
    ],
)
def test_what_concerns_every_study_stops_the_run(web: WebArchive, tmp_path: Path, rule: Any, reason: Reason) -> None:
    assert failure(tmp_path, web, rule) == (reason, {})
    assert len([path for path, _ in web.asked if path.rsplit("/", 2)[-2] == "instances"]) == 1


def test_an_image_without_end_is_given_up(web: WebArchive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fl_client.landing.FILE_BYTES_MAX", 100_000)
    found = failure(tmp_path, web, lambda: (200, KIND, iter([HEAD, *[bytes(65536)] * 50])))[1]
    assert found == {Reason.TOO_LARGE: 3}
    monkeypatch.setattr("fl_client.dicomweb.FILE_BYTES_MAX", 50_000)
    assert fetch(settings_of(web), tmp_path, Choice(retry_failed=True)).counts.failed == {Reason.TOO_LARGE: 3}


@pytest.mark.parametrize("where", ["header", "body"])
def test_whoever_drips_is_cut_off(tmp_path: Path, where: str) -> None:
    """Byte by byte no single read takes long; the whole has to end all the same."""
    import socket

    door = socket.create_server(("127.0.0.1", 0))

    def drip() -> None:
        caller, _ = door.accept()
        with caller:
            caller.recv(65536)
            start = b"HTTP/1.1 200 OK\r\nContent-Type: application/dicom+json\r\n" + (
                b"\r\n" if where == "body" else b"X-A: "
            )
            try:
                caller.sendall(start)
                while True:
                    caller.sendall(b"a" if where == "header" else b" ")
                    time.sleep(0.2)
            except OSError:
                return

    threading.Thread(target=drip, daemon=True).start()
    chosen = {
        "kind": "dicomweb",
        "url": f"http://127.0.0.1:{door.getsockname()[1]}",
        "select": {"first_day": "2024-01-01"},
    }
    archive = Server(Dicomweb.model_validate(chosen | {"timeout_s": 1.0}), tmp_path)
    began = time.monotonic()
    with pytest.raises(NotFetched) as caught:
        list(archive.studies(Question()))
    assert time.monotonic() - began < 5
    assert caught.value.reason is (Reason.TIMEOUT if where == "header" else Reason.TOO_SLOW)
    archive.close()
    door.close()


@pytest.mark.parametrize("code", [429, 503])
def test_an_archive_that_asks_for_time_gets_it(web: WebArchive, tmp_path: Path, code: int) -> None:
    left = [(code, {"Retry-After": "77"}, b"")]
    web.rule = lambda path: left.pop() if path.rsplit("/", 2)[-2] == "instances" and left else None
    waited = FakeTime()
    result = fetch(settings_of(web), tmp_path, waited=waited)
    assert result.counts.done == 3 and sum(waited.slept) >= 77


def test_one_that_is_always_busy_ends_the_run(web: WebArchive, tmp_path: Path) -> None:
    problem, failed = failure(tmp_path, web, lambda: (503, {"Retry-After": "99999999999"}, b""))
    assert problem is Reason.BUSY and sum(failed.values()) <= 3


@pytest.mark.parametrize(
    "body",
    [b"{", b"[" * 100_000, b'{"a": 1}', b"[1]", b"\xff\xfe", b'[{"0020000D": {"Value": [{"a": "../../x"}]}}]'],
)
def test_answers_that_are_no_list_of_studies(web: WebArchive, tmp_path: Path, body: bytes) -> None:
    web.rule = lambda path: (200, {"Content-Type": "application/dicom+json"}, body)
    result = fetch(settings_of(web), tmp_path)
    assert (result.problem, result.stop) in ((Reason.MALFORMED, Stop.ARCHIVE), (None, Stop.DONE))
    assert result.counts.done == 0 and not landed(tmp_path)


def test_uids_that_are_paths_are_never_asked_for(web: WebArchive, tmp_path: Path) -> None:
    evil = {"0020000D": {"Value": ["../../etc"]}, "00080020": {"Value": ["20240102"]}}
    body = json.dumps([evil]).encode()
    web.rule = lambda path: (200, {}, body) if "/studies?" in path else None
    result = fetch(settings_of(web), tmp_path)
    assert (result.foreign_answers, result.counts.wanted, len(web.asked)) == (1, 0, 1)


def test_a_failed_study_does_not_stop_the_rest_and_can_be_tried_again(web: WebArchive, tmp_path: Path) -> None:
    web.rule = lambda path: (500, {}, b"") if "/studies/1.2/" in path else None
    waited = FakeTime()
    result = fetch(settings_of(web), tmp_path, waited=waited)
    assert (result.counts.done, result.counts.failed) == (2, {Reason.ARCHIVE_ERROR: 1})
    assert sum(waited.slept) >= sum(BACKOFF_S)
    web.rule = lambda path: None
    assert fetch(settings_of(web), tmp_path).counts.done == 2
    assert fetch(settings_of(web), tmp_path, Choice(retry_failed=True)).counts.done == 3


def test_nobody_there(tmp_path: Path) -> None:
    chosen = {"first_day": "2024-01-01", "last_day": "2024-01-01"}
    web = Dicomweb.model_validate({"kind": "dicomweb", "url": f"http://127.0.0.1:{free_port()}", "select": chosen})
    assert fetch(web, tmp_path).problem is Reason.UNREACHABLE
    dimse = dimse_settings(free_port())
    assert fetch(dimse, tmp_path).problem is Reason.UNREACHABLE


def test_https_only_with_the_authority_that_was_named(web: WebArchive, tmp_path: Path) -> None:
    made, other = Certificates(tmp_path / "a"), Certificates(tmp_path / "b")
    front = TlsFront(web.port, made)
    try:
        url = {"url": f"https://127.0.0.1:{front.port}/dicom-web"}
        assert fetch(settings_of(web, **url, ca_file=str(made.authority)), tmp_path).counts.done == 3
        home = tmp_path / "other"
        home.mkdir()
        assert fetch(settings_of(web, **url, ca_file=str(other.authority)), home).problem is Reason.UNTRUSTED
        assert fetch(settings_of(web, **url), home).problem is Reason.UNTRUSTED
    finally:
        front.close()


def test_credentials_go_to_the_archive_and_nowhere_else(
    web: WebArchive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    (tmp_path / "password").write_text("pa ss\n")
    with pytest.raises(KeyFileUnsafe):
        (tmp_path / "password").chmod(0o644)
        Server(settings_of(web, user="me", password_file="password"), tmp_path)
    (tmp_path / "password").chmod(0o600)
    with caplog.at_level("DEBUG"):
        fetch(settings_of(web, user="me", password_file="password"), tmp_path)
    assert all(headers["Authorization"] == "Basic bWU6cGEgc3M=" for _, headers in web.asked)
    assert "bWU6cGEgc3M" not in caplog.text and "pa ss" not in caplog.text and SECRET not in caplog.text
    with pytest.raises(DataError, match="no file"):
        secret(tmp_path / "absent")


@pytest.mark.parametrize("size", [1, 2, 3, 7, 4096])
def test_parts_are_found_wherever_pieces_end(size: int) -> None:
    content = os.urandom(500) + b"\r\n--limi" + b"\r\n--" + os.urandom(99)
    whole = b"preamble\r\n--limit\r\nA: b\r\n\r\n" + content + b"\r\n--limit--\r\n"
    pieces = iter([whole[begin : begin + size] for begin in range(0, len(whole), size)])
    assert b"".join(part_of(pieces, b"limit")) == content


def test_retry_after_in_both_spellings() -> None:
    now = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)
    assert retry_after_s("Mon, 01 Jan 2024 00:01:00 GMT", now) == 60
    assert [retry_after_s(text, now) for text in ("5", "", "soon", "-3", "9" * 50)] == [5, 0, 0, 0, 3600]


# DIMSE ---------------------------------------------------------------------------------------------------------------


def dimse_settings(port: int, **changes: Any) -> Dimse:
    titles = {"kind": "dimse", "host": "127.0.0.1", "port": port, "called_ae": "PACS", "calling_ae": "SITE"}
    chosen = {"select": {"first_day": "2024-01-02", "last_day": "2024-01-02"}}
    pace = {"per_minute": 6000.0, "gigabytes_free": 0.0, "timeout_s": 5.0}
    return Dimse.model_validate(titles | chosen | pace | changes)


@pytest.fixture
def pacs() -> Iterator[DicomArchive]:
    archive = DicomArchive(images())
    yield archive
    archive.close()


def moving(pacs: DicomArchive) -> dict[str, Any]:
    return {"method": "move", "listen_address": "127.0.0.1", "listen_port": pacs.moved}


@pytest.mark.parametrize("method", ["get", "move"])
def test_dimse_brings_the_same(pacs: DicomArchive, tmp_path: Path, method: str) -> None:
    settings = dimse_settings(pacs.port, **(moving(pacs) if method == "move" else {}))
    result = fetch(settings, tmp_path)
    assert (result.stop, result.images, result.counts.done, result.counts.failed) == (Stop.DONE, 6, 3, {})
    assert fetch(settings, tmp_path, Choice(ask_again=True)).images == 0


@pytest.mark.parametrize(
    ("given", "reason"), [(("9.9", "1.1.0"), Reason.WRONG_STUDY), (("1.1", "9.9"), Reason.WRONG_INSTANCE)]
)
def test_an_archive_that_pushes_something_else_is_cut_off(
    pacs: DicomArchive, tmp_path: Path, given: tuple[str, str], reason: Reason
) -> None:
    pacs.instead = image(*given)
    result = fetch(dimse_settings(pacs.port), tmp_path)
    assert not landed(tmp_path) and sum(result.counts.failed.values()) == 3 and reason in result.counts.failed


def test_only_the_archive_may_send(pacs: DicomArchive, tmp_path: Path) -> None:
    pacs.sends_as = "STRANGER"
    result = fetch(dimse_settings(pacs.port, **moving(pacs)), tmp_path)
    assert not landed(tmp_path) and result.counts.done == 0 and (result.counts.failed or result.problem)
    (tmp_path / "b").mkdir()
    pacs.sends_as = "PACS"
    elsewhere = dimse_settings(pacs.port, **moving(pacs), senders=["192.0.2.7"])
    assert fetch(elsewhere, tmp_path / "b").counts.done == 0 and not landed(tmp_path / "b")


def test_a_message_that_is_too_long_is_not_taken(
    pacs: DicomArchive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fl_client.dimse.FILE_BYTES_MAX", 10_000)
    monkeypatch.setattr("fl_client.dimse.PDU_BYTES_MAX", 140_000)
    pacs.padding = 2_000_000
    result = fetch(dimse_settings(pacs.port), tmp_path)
    assert result.counts.failed == {Reason.TOO_LARGE: 3} and not landed(tmp_path)


def test_an_archive_that_falls_silent(pacs: DicomArchive, tmp_path: Path) -> None:
    pacs.silence_s = 20
    began = time.monotonic()
    archive = Peer(dimse_settings(pacs.port, timeout_s=1.0), tmp_path)
    with pytest.raises(NotFetched) as caught:
        archive.fetch("1.1", archive.instances("1.1", ()), lambda instance, pieces: None)
    assert caught.value.reason is Reason.TIMEOUT and time.monotonic() - began < 8


def test_titles_that_it_does_not_know(pacs: DicomArchive, tmp_path: Path) -> None:
    settings = dimse_settings(pacs.port).model_copy(update={"calling_ae": "OTHER"})
    assert fetch(settings, tmp_path).problem is Reason.UNAUTHORISED


def test_nothing_global_of_pynetdicom_is_changed(pacs: DicomArchive, tmp_path: Path) -> None:
    from pynetdicom import _config

    def state() -> dict[str, str]:
        return {name: repr(value) for name, value in vars(_config).items() if name.isupper()}

    before = state()
    fetch(dimse_settings(pacs.port), tmp_path)
    assert state() == before


# site.yaml, plan, command --------------------------------------------------------------------------------------------


class Archives(Document):
    """As `data.archive` stands in site.yaml."""

    archive: archive_cli.Dicomweb | archive_cli.Dimse


DAYS = "select: {first_day: '2024-01-01'}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"{{kind: dicomweb, url: 'http://pacs/dicom-web', {DAYS}}}", "use https"),
        (f"{{kind: dicomweb, url: 'http://127.0.0.1.example.org/', {DAYS}}}", "use https"),
        (f"{{kind: dicomweb, url: 'https://me:pw@pacs/', {DAYS}}}", "without user"),
        (f"{{kind: dicomweb, url: 'file:///etc', {DAYS}}}", "without user|https://"),
        (f"{{kind: dicomweb, url: 'https://pacs', user: me, {DAYS}}}", "belong together"),
        ("{kind: dicomweb, url: 'https://pacs', select: {modalities: [CR]}}", "whole archive"),
        ("{kind: dicomweb, url: 'https://pacs', select: {first_day: '2024-02-01', last_day: '2024-01-01'}}", "before"),
        (f"{{kind: dimse, host: pacs, port: 104, called_ae: A, calling_ae: B, method: move, {DAYS}}}", "listen_port"),
        (f"{{kind: dimse, host: pacs, port: 104, called_ae: ' A', calling_ae: B, {DAYS}}}", "called_ae"),
        (
            f"{{kind: dimse, host: pacs, port: 104, called_ae: A, calling_ae: B, listen_port: 5, {DAYS}}}",
            "method: move",
        ),
    ],
)
def test_settings_that_cannot_be(text: str, words: str) -> None:
    with pytest.raises(DocumentError, match=words):
        parse(Archives, f"archive: {text}", "site.yaml")


def test_numbers_that_would_match_others_are_not_asked_for(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("A1\n A1 \nB?\nC*\nD\\E\n\n" + "F" * 65 + "\n", encoding="utf-8-sig")
    assert Accessions.read(tmp_path / "list", None) == Accessions(("A1",), 4)
    (tmp_path / "list").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        Accessions.read(tmp_path / "list", None)
    (tmp_path / "list").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="2 columns"):
        Accessions.read(tmp_path / "list", "c")


def test_answers_to_another_question_are_ignored() -> None:
    select = Select(first_day="2024-01-01", last_day="2024-01-31", modalities=["CR"], description_words=["Thorax"])
    question = Question("A1", "2024-01-01", "2024-01-31")
    good = Found("1.2", "A1", "20240115", ("CR", "SR"), "RX THORAX pa")
    assert answers(good, question, select)
    for change in (
        {"uid": "x"}, {"accession": "A2"}, {"day": "20240201"}, {"day": ""}, {"modalities": ("MR",)}, {"description": "knee"}
    ):  # fmt: skip
        assert not answers(Found(**(vars(good) | change)), question, select)


def test_questions_cover_each_day_once() -> None:
    select = Select(first_day="2024-01-30", last_day="2024-02-02", modalities=["CR", "DX"])
    asked = questions_of(select, (), dt.date(2024, 3, 1), 1)
    assert len(asked) == 8 and asked[0] == Question("", "2024-01-30", "2024-01-30", "CR")
    wide = questions_of(select, (), dt.date(2024, 3, 1), 3)
    assert [(q.first_day, q.last_day) for q in wide[::2]] == [
        ("2024-01-30", "2024-02-01"),
        ("2024-02-02", "2024-02-02"),
    ]
    with pytest.raises(DataError, match="days"):
        questions_of(Select(first_day="1800-01-01"), (), dt.date(2024, 1, 1), 1)


def test_a_plan_that_is_damaged_is_said_to_be(web: WebArchive, tmp_path: Path) -> None:
    Plan.path(tmp_path).write_bytes(b"not a database" * 1000)
    with pytest.raises(DataError, match="damaged"):
        fetch(settings_of(web), tmp_path)


def command(
    home: Path, settings: Dicomweb | Dimse, monkeypatch: pytest.MonkeyPatch, *words: str
) -> tuple[int, str, str]:
    monkeypatch.setattr(archive_cli, "archive_of", lambda home: (settings, home / "landing"))
    app = typer.Typer()
    app.command()(archive_cli.fetch)
    found = CliRunner().invoke(app, ["--home", str(home), *words])
    return found.exit_code, found.stdout, found.stderr


def test_the_command(web: WebArchive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(web)
    code, out, _ = command(tmp_path, settings, monkeypatch, "--status")
    assert (code, out) == (0, "Nothing was fetched yet.\n")
    code, out, _ = command(tmp_path, settings, monkeypatch, "--dry-run", "--json")
    assert code == 0 and json.loads(out)["by_modality"] == {"CR": 3} and not (tmp_path / "landing").exists()
    code, out, err = command(tmp_path, settings.model_copy(update={"studies_per_run": 1}), monkeypatch)
    assert code == archive_cli.LEFT and "run it again" in out and SECRET not in out + err
    code, out, _ = command(tmp_path, settings, monkeypatch, "--json")
    told = json.loads(out)
    assert code == 0 and (told["done"], told["wanted"], told["images"], told["now"]["studies"]) == (3, 0, 6, 2)
    before = Plan.path(tmp_path).read_bytes()
    code, out, _ = command(tmp_path, settings, monkeypatch, "--status", "--json")
    assert code == 0 and json.loads(out)["done"] == 3 and Plan.path(tmp_path).read_bytes() == before
    web.rule = lambda path: (404, {}, b"") if "/1.1/" in path else None
    (tmp_path / "b").mkdir()
    assert command(tmp_path / "b", settings, monkeypatch)[0] == archive_cli.FAILED
    web.rule = lambda path: (401, {}, b"")
    (tmp_path / "c").mkdir()
    code, out, _ = command(tmp_path / "c", settings, monkeypatch)
    assert code == 1 and "password_file" in out


def test_without_tls_it_is_said_once(pacs: DicomArchive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = command(tmp_path, dimse_settings(pacs.port), monkeypatch)
    assert code == 0 and err.count("WARNING") == 1


def test_the_plan_keeps_no_name(web: WebArchive, tmp_path: Path) -> None:
    fetch(settings_of(web), tmp_path)
    with sqlite3.connect(Plan.path(tmp_path)) as memory:
        text = "\n".join(memory.iterdump())
    assert SECRET not in text and SECRET not in " ".join(map(str, landed(tmp_path)))
