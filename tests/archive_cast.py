"""Who takes part in the tests of fetching: certificates, free ports, a web archive and a DIMSE archive that may misbehave."""

import datetime as dt
import http.server
import io
import ipaddress
import json
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID
from pydicom import dcmread
from pydicom.dataset import Dataset
from pynetdicom import AE, build_context, evt

from fl_client.dimse import FIND, GET, MOVE


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Certificates:
    """An authority with a certificate for 127.0.0.1 on either side; RSA, as devices in hospitals have it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"authority {folder.name}")])
        made = self._make(self._name, self._key, authority=True)
        self.authority = folder / "ca.pem"
        self.authority.write_bytes(made.public_bytes(serialization.Encoding.PEM))
        self.server, self.client = self._party(folder, "server"), self._party(folder, "client")

    def _party(self, folder: Path, name: str) -> tuple[Path, Path]:
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        made = self._make(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), key, authority=False)
        paths = (folder / f"{name}.pem", folder / f"{name}.key")
        paths[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
        paths[1].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
            )
        )
        paths[1].chmod(0o600)
        return paths

    def _make(self, name: x509.Name, key: rsa.RSAPrivateKey, *, authority: bool) -> x509.Certificate:
        now = dt.datetime.now(dt.UTC)
        loopback = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(days=1))
            .not_valid_after(now + dt.timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([loopback, x509.DNSName("localhost")]), critical=False)
            .sign(self._key, hashes.SHA256())
        )


class TlsFront:
    """TLS in front of a plain port of this machine, as a clinic's reverse proxy does it."""

    def __init__(self, behind: int, certificates: Certificates) -> None:
        self._behind, self._context = behind, ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._context.load_cert_chain(*certificates.server)
        self._door = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._door.getsockname()[1])
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                caller, _ = self._door.accept()
                threading.Thread(target=self._carry, args=(caller,), daemon=True).start()

    def _carry(self, caller: socket.socket) -> None:
        with (
            suppress(OSError),
            caller,
            socket.create_connection(("127.0.0.1", self._behind)) as inner,
            self._context.wrap_socket(caller, server_side=True) as outer,
        ):
            while True:
                ready = [outer] if outer.pending() else select.select([outer, inner], [], [])[0]
                for source in ready:
                    data = source.recv(65536)
                    if not data:
                        return
                    (inner if source is outer else outer).sendall(data)

    def close(self) -> None:
        with suppress(OSError):
            self._door.shutdown(socket.SHUT_RDWR)
        self._door.close()


# A web archive that may misbehave ---------------------------------------------------------------------------------------

Answer = tuple[int, dict[str, str], bytes | Iterator[bytes]]


class WebArchive:
    """A DICOMweb server on a free port of this machine that answers with whatever `rule` says; it knows `images`.

    `rule(path)` may give (status, headers, body); None: the honest answer. A body that is an iterator is sent as it comes.
    """

    def __init__(self, images: dict[tuple[str, str], bytes], number: str = "A") -> None:
        self.images, self.number = images, number
        self.rule: Callable[[str], Answer | None] = lambda path: None
        self.asked: list[tuple[str, dict[str, str]]] = []
        archive = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                archive.asked.append((self.path, dict(self.headers.items())))
                archive.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        self.url = f"http://127.0.0.1:{self.port}/dicom-web"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        status, headers, body = self.rule(handler.path) or self.honest(handler.path)
        with suppress(OSError):
            handler.send_response(status)
            for name, value in headers.items():
                handler.send_header(name, value)
            if isinstance(body, bytes):
                handler.send_header("Content-Length", str(len(body)))
                handler.end_headers()
                handler.wfile.write(body)
                return
            handler.send_header("Connection", "close")
            handler.end_headers()
            for piece in body:
                handler.wfile.write(piece)
                handler.wfile.flush()
        handler.close_connection = True

    def honest(self, path: str) -> Answer:
        parts, asked = urlsplit(path).path.split("/")[2:], parse_qs(urlsplit(path).query)
        if parts[-1] == "studies":
            studies = sorted({study for study, _ in self.images})
            rows = [{"0020000D": studies[n], "00080050": f"{self.number}{n}"} for n in range(len(studies))]
            wanted = asked.get("AccessionNumber")
            told = [row for row in rows if wanted is None or row["00080050"] in wanted]
            return self.rows([row | {"00080020": "20240102", "00080061": "CR"} for row in told], asked)
        study = parts[1]
        if parts[-1] == "series":
            return self.rows([{"0020000E": "1.9", "00080060": "CR"}], asked)
        if parts[-1] == "instances":
            uids = sorted(uid for one, uid in self.images if one == study)
            return self.rows([{"00080018": uid, "00080016": CR} for uid in uids], asked)
        return part(self.images[study, parts[-1]])

    @staticmethod
    def rows(rows: list[dict[str, str]], asked: dict[str, list[str]]) -> Answer:
        begin = int(asked.get("offset", ["0"])[0])
        page = rows[begin : begin + int(asked.get("limit", ["1000"])[0])]
        body = [{tag: {"vr": "LO", "Value": [value]} for tag, value in row.items()} for row in page]
        return 200, {"Content-Type": "application/dicom+json"}, json.dumps(body).encode()


CR = "1.2.840.10008.5.1.4.1.1.1"


def part(*images: bytes, end: bytes = b"\r\n--limit--\r\n") -> Answer:
    """An answer of WADO-RS with these parts."""
    head = b"\r\n--limit\r\nContent-Type: application/dicom\r\n\r\n"
    kind = {"Content-Type": 'multipart/related; type="application/dicom"; boundary=limit'}
    return 200, kind, b"".join(head + image for image in images) + end


# A DIMSE archive that may misbehave --------------------------------------------------------------------------------------


class DicomArchive:
    """A query/retrieve SCP on a free port of this machine that knows `images`.

    `instead` is sent in place of any image; `padding` bytes are added to each; `silence_s` passes before a C-GET begins.
    """

    def __init__(self, images: dict[tuple[str, str], bytes]) -> None:
        self.images, self.instead, self.padding, self.silence_s = images, b"", 0, 0.0
        self.sends_as, self.moved = "PACS", free_port()
        self._entity = AE("PACS")
        self._entity.require_called_aet = True
        self._entity.require_calling_aet = ["SITE"]
        for kind in (FIND, GET, MOVE):
            self._entity.add_supported_context(kind)
        self._entity.add_supported_context(CR, scu_role=True, scp_role=True)
        hooks: list[Any] = [(evt.EVT_C_FIND, self._find), (evt.EVT_C_GET, self._get), (evt.EVT_C_MOVE, self._move)]
        self._server = self._entity.start_server(("127.0.0.1", 0), block=False, evt_handlers=hooks)
        self.port = int(self._server.server_address[1])

    def close(self) -> None:
        self._server.shutdown()

    def _find(self, event: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
        asked = event.identifier
        level, study = asked.QueryRetrieveLevel, str(asked.get("StudyInstanceUID", ""))
        for number, one in enumerate(sorted({study for study, _ in self.images})):
            row = Dataset()
            row.QueryRetrieveLevel, row.StudyInstanceUID = level, one
            if level == "STUDY":
                row.AccessionNumber, row.StudyDate, row.ModalitiesInStudy = f"A{number}", "20240102", "CR"
                yield 0xFF00, row
            elif one == study and level == "SERIES":
                row.SeriesInstanceUID, row.Modality = "1.9", "CR"
                yield 0xFF00, row
            elif one == study:
                for uid in sorted(uid for its, uid in self.images if its == study):
                    image = Dataset()
                    image.QueryRetrieveLevel, image.SOPInstanceUID, image.SOPClassUID = level, uid, CR
                    yield 0xFF00, image

    def _sent(self, event: evt.Event) -> list[Dataset]:
        asked = event.identifier.SOPInstanceUID
        wanted = [str(asked)] if isinstance(asked, str) else [str(uid) for uid in asked]
        found = []
        for uid in wanted:
            stored = self.instead or self.images[str(event.identifier.StudyInstanceUID), uid]
            dataset = dcmread(io.BytesIO(stored))
            if self.padding:
                dataset.PixelData = bytes(self.padding)
                dataset["PixelData"].VR = "OW"
            found.append(dataset)
        return found

    def _get(self, event: evt.Event) -> Iterator[Any]:
        time.sleep(self.silence_s)
        found = self._sent(event)
        yield len(found)
        for dataset in found:
            yield 0xFF00, dataset

    def _move(self, event: evt.Event) -> Iterator[Any]:
        self._entity.ae_title = self.sends_as
        yield "127.0.0.1", self.moved, {"contexts": [build_context(CR)], "ae_title": "SITE"}
        found = self._sent(event)
        yield len(found)
        for dataset in found:
            yield 0xFF00, dataset
