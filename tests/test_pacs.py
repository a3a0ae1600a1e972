"""Fetching from a real archive: Orthanc of Debian's packages, over DICOMweb, C-GET and C-MOVE, with TLS and without."""

import hashlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pydicom
import pytest
from archive_cast import Certificates, TlsFront, free_port
from dicomweb_client import DICOMwebClient
from pydicom.data import get_testdata_file

from fl_client.archive import Dicomweb, Dimse, NotFetched, Question, Reason
from fl_client.dicomweb import Server
from fl_client.dimse import Peer
from fl_client.fetching import Choice, Plan, Result, Run, Stop
from fl_client.ingest import ingest
from fl_client.phantom import VENDORS, make_hospital
from fl_client.phantom_ct import SCANNERS, make_ct_hospital
from fl_client.site import Source
from models.labels import LabelMap

ORTHANC = shutil.which("Orthanc")
PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
pytestmark = [
    pytest.mark.pacs,
    pytest.mark.skipif(ORTHANC is None or not PLUGIN.exists(), reason="apt-get install orthanc orthanc-dicomweb"),
    pytest.mark.timeout(300),
]
USER, PASSWORD = "isocenter", "correct horse"
KINDS = ("dicomweb", "get", "move")
EVERYTHING = {"first_day": "1990-01-01"}


@dataclass
class Orthanc:
    """One Orthanc on loopback. `moved`: the port to which it sends for C-MOVE."""

    folder: Path
    certificates: Certificates
    secure: bool
    http: int = field(default_factory=free_port)
    dicom: int = field(default_factory=free_port)
    moved: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None
    front: TlsFront | None = None

    @property
    def url(self) -> str:
        """Debian's Orthanc 1.10.1 crashes at a request over its own HTTPS, so a front does the TLS, as in clinics."""
        return f"https://127.0.0.1:{self.front.port}" if self.front else f"http://127.0.0.1:{self.http}"

    @property
    def client(self) -> httpx.Client:
        where = f"http://127.0.0.1:{self.http}"
        return httpx.Client(base_url=where, auth=(USER, PASSWORD), trust_env=False, timeout=60)

    def start(self) -> None:
        made = self.certificates
        self.folder.mkdir(exist_ok=True)
        modality = {"AET": "ISOCENTER", "Host": "127.0.0.1", "Port": self.moved, "UseDicomTls": self.secure}
        settings = {
            "Name": "test", "StorageDirectory": str(self.folder / "store"), "IndexDirectory": str(self.folder / "store"),
            "Plugins": [str(PLUGIN)], "HttpPort": self.http, "DicomPort": self.dicom, "DicomAet": "ORTHANC",
            "DicomCheckCalledAet": True, "RemoteAccessAllowed": True, "AuthenticationEnabled": True,
            "RegisteredUsers": {USER: PASSWORD}, "DicomModalities": {"site": modality}, "DicomAlwaysAllowEcho": False,
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/", "EnableWado": False},
            "StableAge": 1, "HttpsCACertificates": "", "LimitFindResults": 0,
        }  # fmt: skip
        if self.secure:
            self.front = TlsFront(self.http, made)
            settings |= {
                "DicomTlsEnabled": True,
                "DicomTlsCertificate": str(made.server[0]), "DicomTlsPrivateKey": str(made.server[1]),
                "DicomTlsTrustedCertificates": str(made.authority), "DicomTlsRemoteCertificateRequired": True,
            }  # fmt: skip
        (self.folder / "orthanc.json").write_text(json.dumps(settings))
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [str(ORTHANC), str(self.folder / "orthanc.json")], stdout=log, stderr=log, start_new_session=True
            )
        for _ in range(300):
            if self.process.poll() is not None:
                pytest.fail((self.folder / "log").read_text()[-3000:])
            try:
                self.client.get("/system").raise_for_status()
                return
            except httpx.HTTPError:
                time.sleep(0.1)
        pytest.fail((self.folder / "log").read_text()[-3000:])

    def stop(self) -> None:
        if self.front is not None:
            self.front.close()
        if self.process is not None:
            self.process.terminate()
            self.process.wait(30)

    def settings(self, home: Path, kind: str, select: dict[str, Any], **changes: Any) -> Dicomweb | Dimse:
        made = self.certificates
        common = {"select": select, "per_minute": 6000.0, "gigabytes_free": 0.0, "timeout_s": 30.0} | changes
        if kind == "dicomweb":
            secret = home / "password"
            secret.write_text(PASSWORD)
            secret.chmod(0o600)
            trust = {"ca_file": str(made.authority)} if self.secure else {}
            where = {"url": f"{self.url}/dicom-web", "user": USER, "password_file": "password"} | trust
            return Dicomweb.model_validate({"kind": "dicomweb"} | where | common)
        titles = {"host": "127.0.0.1", "port": self.dicom, "called_ae": "ORTHANC", "calling_ae": "ISOCENTER"}
        listens = {"listen_address": "127.0.0.1", "listen_port": self.moved} if kind == "move" else {}
        files = {"ca_file": str(made.authority), "certificate": str(made.client[0]), "key": str(made.client[1])}
        tls = {"tls": files} if self.secure else {}
        return Dimse.model_validate({"kind": "dimse", "method": kind} | titles | listens | tls | common)


def archive_of(settings: Dicomweb | Dimse, home: Path) -> Server | Peer:
    return Server(settings, home) if isinstance(settings, Dicomweb) else Peer(settings, home)


def fetch(settings: Dicomweb | Dimse, home: Path, choice: Choice | None = None) -> Result:
    archive = archive_of(settings, home)
    try:
        return Run(settings, home, home / "landing", archive, choice or Choice()).fetch()
    finally:
        archive.close()


def pixel_hash(data: bytes) -> tuple[str, str]:
    """Transfer syntax and a hash of the stored pixel bytes: what transcoding would change."""
    import io

    found = pydicom.dcmread(io.BytesIO(data))
    return str(found.file_meta.TransferSyntaxUID), hashlib.sha256(found.PixelData).hexdigest()


@dataclass
class Content:
    """What was put into the archive, by SOP Instance UID: accession, transfer syntax and pixels."""

    images: dict[str, tuple[str, tuple[str, str]]]
    studies: int
    labels: dict[str, Any]
    folder: Path


@pytest.fixture(scope="session")
def content(tmp_path_factory: pytest.TempPathFactory) -> Content:
    folder = tmp_path_factory.mktemp("content")
    labels = make_hospital(folder / "dx", "pacs", 24, 3, VENDORS["boreal"])
    make_hospital(folder / "cr", "pacs", 10, 4, VENDORS["cirrus"])
    make_ct_hospital(folder / "ct", "pacs", 2, 5, SCANNERS[0])
    images: dict[str, tuple[str, tuple[str, str]]] = {}
    studies = set()
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                found = pydicom.dcmread(path)
        except (pydicom.errors.InvalidDicomError, UserWarning, EOFError):
            if "dicom" in path.parts:
                path.unlink()  # the phantoms' dirt: files that an archive does not take either
            continue
        if found.get("Modality") not in ("CR", "DX", "CT") or "PixelData" not in found:
            continue
        if "StudyInstanceUID" in found and "SOPInstanceUID" in found and "StudyDate" in found:
            images[str(found.SOPInstanceUID)] = (str(found.get("AccessionNumber", "")), pixel_hash(path.read_bytes()))
            studies.add(str(found.StudyInstanceUID))
    return Content(images, len(studies), labels, folder)


def filled(orthanc: Orthanc, content: Content) -> Orthanc:
    orthanc.start()
    with orthanc.client as client:
        for path in sorted(content.folder.rglob("*")):
            if path.is_file() and path.read_bytes()[128:132] == b"DICM":
                client.post("/instances", content=path.read_bytes())
        report = Path(str(get_testdata_file("reportsi.dcm")))  # no image: it stays where it is
        client.post("/instances", content=report.read_bytes()).raise_for_status()
    return orthanc


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory, certificates: Certificates, content: Content) -> Iterator[Orthanc]:
    orthanc = Orthanc(tmp_path_factory.mktemp("orthanc") / "plain", certificates, False)
    try:
        yield filled(orthanc, content)
    finally:
        orthanc.stop()


@pytest.fixture(scope="session")
def secure(tmp_path_factory: pytest.TempPathFactory, certificates: Certificates, content: Content) -> Iterator[Orthanc]:
    orthanc = Orthanc(tmp_path_factory.mktemp("orthanc") / "secure", certificates, True)
    try:
        yield filled(orthanc, content)
    finally:
        orthanc.stop()


def landed(home: Path) -> list[Path]:
    return sorted(path for path in (home / "landing").rglob("*") if path.is_file())


def accessions(content: Content) -> list[str]:
    return sorted({accession for accession, _ in content.images.values() if accession})


def with_list(home: Path, numbers: list[str]) -> dict[str, Any]:
    (home / "numbers.txt").write_text("".join(f"{number}\n" for number in numbers))
    return {"accession_numbers": "numbers.txt"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("door", ["plain", "secure"])
def test_a_list_of_numbers_becomes_the_files_as_stored(
    kind: str, door: str, request: pytest.FixtureRequest, content: Content, tmp_path: Path
) -> None:
    orthanc: Orthanc = request.getfixturevalue(door)
    numbers = accessions(content)
    settings = orthanc.settings(tmp_path, kind, with_list(tmp_path, [*numbers, "NOSUCHNUMBER", "A*"]))
    began = time.monotonic()
    result = fetch(settings, tmp_path)
    seconds = time.monotonic() - began
    expected = {uid: stored for uid, (accession, stored) in content.images.items() if accession}
    files = landed(tmp_path)
    got = {str(pydicom.dcmread(path, stop_before_pixels=True).SOPInstanceUID): path for path in files}
    assert result.stop is Stop.DONE and result.counts.failed == {}
    assert got.keys() == expected.keys() and result.images == len(expected) == len(files)
    assert {uid: pixel_hash(path.read_bytes()) for uid, path in got.items()} == expected  # nothing was transcoded
    assert result.counts.numbers == (len(numbers) + 1, 1) and result.malformed_numbers == 1
    assert (tmp_path / "private/not-found.txt").read_text() == "NOSUCHNUMBER\n"
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in files)
    assert (tmp_path / "landing").stat().st_mode & 0o777 == 0o700
    assert Plan.path(tmp_path).stat().st_mode & 0o777 == 0o600
    print(f"{kind} {door}: {result.images} images, {result.received / 2**20:.1f} MiB, {seconds:.2f} s")
    again = fetch(settings, tmp_path)
    assert (again.images, again.received, again.counts.done) == (0, 0, result.counts.done)


@pytest.mark.parametrize("kind", KINDS)
def test_days_and_modalities_select(kind: str, plain: Orthanc, content: Content, tmp_path: Path) -> None:
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in dx_files(content)]
    day = sorted(str(header.StudyDate) for header in headers)[0]
    told = f"{day[:4]}-{day[4:6]}-{day[6:]}"
    chosen = {"first_day": told, "last_day": told, "modalities": ["DX"]}
    result = fetch(plain.settings(tmp_path, kind, chosen), tmp_path)
    expected = {str(header.SOPInstanceUID) for header in headers if header.StudyDate == day}
    got = {str(pydicom.dcmread(path, stop_before_pixels=True).SOPInstanceUID) for path in landed(tmp_path)}
    assert got == expected and result.stop is Stop.DONE


def dx_files(content: Content) -> list[Path]:
    found = []
    for path in sorted(content.folder.rglob("*")):
        if path.is_file() and path.read_bytes()[128:132] == b"DICM":
            header = pydicom.dcmread(path, stop_before_pixels=True)
            if header.get("Modality") == "DX" and str(header.SOPInstanceUID) in content.images:
                found.append(path)
    return found


def test_what_arrived_is_ingested(plain: Orthanc, content: Content, tmp_path: Path) -> None:
    fetch(plain.settings(tmp_path, "dicomweb", with_list(tmp_path, accessions(content))), tmp_path)
    mapping = LabelMap.model_validate(content.labels)
    report = ingest(Source(folder="landing", labels=mapping), tmp_path, tmp_path / "state")
    assert report.taken > 0 and report.labels is not None and report.labels.labelled > 0
    assert report.found == len(landed(tmp_path))


def test_the_public_client_sees_the_same(plain: Orthanc, content: Content, tmp_path: Path) -> None:
    """dicomweb-client is another implementation of the standard than ours."""
    settings = plain.settings(tmp_path, "dicomweb", {"first_day": "1990-01-01"})
    from requests import Session

    session = Session()
    session.auth, session.trust_env = (USER, PASSWORD), False
    other = DICOMwebClient(url=f"{plain.url}/dicom-web", session=session)
    theirs = {row["0020000D"]["Value"][0] for row in other.search_for_studies(limit=1000)}
    server = Server(settings, tmp_path)  # type: ignore[arg-type]
    ours = {found.uid for found in server.studies(Question())}
    assert ours == theirs
    for study in sorted(ours)[:5]:
        listed = {instance.uid for instance in server.instances(study, ())}
        rows = other.search_for_instances(study_instance_uid=study)
        assert listed == {row["00080018"]["Value"][0] for row in rows} & content.images.keys()
    server.close()


def test_a_dry_run_only_asks(plain: Orthanc, content: Content, tmp_path: Path) -> None:
    settings = plain.settings(tmp_path, "get", with_list(tmp_path, accessions(content)))
    result = fetch(settings, tmp_path, Choice(only_ask=True))
    assert sum(result.by_modality.values()) > 10 and {"DX", "CT"} <= result.by_modality.keys()
    assert not (tmp_path / "landing").exists() and not Plan.path(tmp_path).exists()


SCRIPT = """
import sys, json
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_pacs import fetch
from fl_client.archive import Dicomweb, Dimse
kind = Dicomweb if {kind!r} == "dicomweb" else Dimse
fetch(kind.model_validate_json(Path({home!r}, "settings.json").read_text()), Path({home!r}))
"""


@pytest.mark.parametrize("kind", KINDS)
def test_killed_again_and_again_it_comes_to_an_end(kind: str, plain: Orthanc, content: Content, tmp_path: Path) -> None:
    settings = plain.settings(tmp_path, kind, with_list(tmp_path, accessions(content)))
    (tmp_path / "settings.json").write_text(settings.model_dump_json())
    script = SCRIPT.format(tests=str(Path(__file__).parent), kind=kind, home=str(tmp_path))
    written: dict[Path, int] = {}
    killed = 0
    for number in range(30):
        process = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[1])
        before = len(written)
        while process.poll() is None and len(landed_whole(tmp_path)) < before + 4 + number:
            time.sleep(0.02)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        ended = process.wait()
        now = {path: path.stat().st_ino for path in landed_whole(tmp_path)}
        assert all(now[path] == inode for path, inode in written.items())  # what was there was not written again
        written = now
        for path in now:
            assert str(pydicom.dcmread(path).SOPInstanceUID) in content.images
        if ended == 0:
            break
    result = fetch(settings, tmp_path)
    expected = sum(1 for accession, _ in content.images.values() if accession)
    assert (
        killed >= 2 and len(landed(tmp_path)) == expected and result.counts.failed == {} and result.counts.wanted == 0
    )


def landed_whole(home: Path) -> list[Path]:
    return [path for path in (home / "landing").glob("??/*.dcm") if path.is_file()]


def test_refusals_have_names(plain: Orthanc, secure: Orthanc, certificates: Certificates, tmp_path: Path) -> None:
    def problem(settings: Dicomweb | Dimse) -> Reason:
        archive = archive_of(settings, tmp_path)
        with pytest.raises(NotFetched) as caught:
            list(archive.studies(Question(first_day="2024-01-01", last_day="2024-01-01")))
        archive.close()
        return caught.value.reason

    web = plain.settings(tmp_path, "dicomweb", EVERYTHING)
    (tmp_path / "password").write_text("wrong")
    assert problem(web) is Reason.UNAUTHORISED
    day = {"first_day": "2024-01-01", "last_day": "2024-01-01"}
    dimse = plain.settings(tmp_path, "get", day)
    assert isinstance(dimse, Dimse)
    # Orthanc lets a stranger in, and hangs up at its first question.
    assert problem(dimse.model_copy(update={"calling_ae": "STRANGER"})) is Reason.BROKEN_OFF
    assert problem(dimse.model_copy(update={"called_ae": "SOMEBODY"})) is Reason.UNAUTHORISED
    other = Certificates(tmp_path / "other")
    tls = secure.settings(tmp_path, "get", day)
    assert isinstance(tls, Dimse) and tls.tls is not None
    strange = tls.tls.model_copy(update={"ca_file": str(other.authority)})
    assert problem(tls.model_copy(update={"tls": strange})) is Reason.UNTRUSTED
    stranger = tls.tls.model_copy(update={"certificate": str(other.client[0]), "key": str(other.client[1])})
    assert problem(tls.model_copy(update={"tls": stranger})) is Reason.UNTRUSTED
    https = secure.settings(tmp_path, "dicomweb", day).model_copy(update={"ca_file": str(other.authority)})
    assert problem(https) is Reason.UNTRUSTED


def test_a_study_that_is_gone(plain: Orthanc, tmp_path: Path) -> None:
    for kind in ("dicomweb", "get"):
        archive = archive_of(plain.settings(tmp_path, kind, EVERYTHING), tmp_path)
        try:
            assert archive.instances("1.2.3.4.5.6", ()) == []
        except NotFetched as failure:
            assert failure.reason is Reason.NOT_FOUND
        finally:
            archive.close()


def test_nobody_else_may_send(plain: Orthanc, content: Content, tmp_path: Path) -> None:
    """While a study is being moved the door knows the archive's title and nobody else's; afterwards it is shut."""
    settings = plain.settings(tmp_path, "move", with_list(tmp_path, accessions(content)[:2]))
    assert fetch(settings, tmp_path).counts.done == 2
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", plain.moved)) != 0


def test_no_name_or_number_is_in_a_path_or_in_the_log(plain: Orthanc, content: Content, tmp_path: Path) -> None:
    fetch(plain.settings(tmp_path, "get", with_list(tmp_path, accessions(content))), tmp_path)
    paths = " ".join(str(path.relative_to(tmp_path)) for path in landed(tmp_path))
    for uid, (accession, _) in content.images.items():
        assert uid not in paths and (not accession or accession not in paths)
