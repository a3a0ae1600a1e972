"""An archive behind DICOMweb: QIDO-RS asks, WADO-RS copies image by image, as they are stored (DICOM PS3.18, 8.3, 10.4, 10.6).

Everything that the server sends has a limit: of bytes, of pages, of parts, and of time. No redirect is followed, no proxy of the
environment is used, no cookie is kept, and credentials are sent to the address of site.yaml and nowhere else.

The public client library (dicomweb-client) puts no limit on what an answer may hold and reads its parts into memory; it is the
independent witness of tests/test_pacs.py instead.
"""

import base64
import datetime as dt
import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx

from fl_client.archive import (
    SOP_CLASSES,
    UID,
    Dicomweb,
    Found,
    Instance,
    Keep,
    NotFetched,
    Question,
    Reason,
    check_private,
    secret,
)
from fl_client.sources import FILE_BYTES_MAX
from privacy.errors import DataError

JSON = "application/dicom+json"
STORED = 'multipart/related; type="application/dicom"; transfer-syntax=*'
PAGE = 200  # answers of one page
PAGES_MAX = 10_000
ANSWER_BYTES_MAX = 64 * 1024 * 1024  # of one page of JSON; 200 studies take 200 KiB
INSTANCES_MAX = 20_000  # of one study
PART_HEADER_BYTES_MAX = 8 * 1024
EPILOGUE_BYTES_MAX = 1024  # what may follow the last delimiter, and is ignored
RATE_LEAST = 4096  # bytes a second; a network of hospitals is a thousand times faster
PIECE = 256 * 1024
WAIT_MOST_S = 3600.0
_BOUNDARY = re.compile(r"""boundary=(?:"([^"\r\n]{1,200})"|([^\s;"]{1,200}))""", re.IGNORECASE)
_REASONS = {
    401: Reason.UNAUTHORISED,
    403: Reason.FORBIDDEN,
    404: Reason.NOT_FOUND,
    406: Reason.UNSUPPORTED,
    408: Reason.TIMEOUT,
    410: Reason.NOT_FOUND,
    413: Reason.TOO_MANY,
    429: Reason.BUSY,
    501: Reason.UNSUPPORTED,
    503: Reason.BUSY,
    504: Reason.TIMEOUT,
}


class Server:
    """An archive as `fl_client.archive.Archive` describes it. One connection, one request at a time."""

    days_at_once = 31  # answers come page by page

    def __init__(self, settings: Dicomweb, home: Path) -> None:
        """Raises DataError or KeyFileUnsafe for the files that site.yaml names; nothing is connected yet."""
        self._settings, self._timeout_s = settings, settings.timeout_s
        self._watch = _Watch()
        headers = {"User-Agent": "isocenter", "Accept-Encoding": "identity"} | _authorization(settings, home)
        self._client = httpx.Client(
            headers=headers,
            verify=_tls(settings, home),
            timeout=self._timeout_s,
            follow_redirects=False,
            trust_env=False,
            limits=httpx.Limits(max_connections=1),
        )

    def close(self) -> None:
        self._client.close()

    def studies(self, question: Question) -> Iterator[Found]:
        keys = {"AccessionNumber": question.accession, "ModalitiesInStudy": question.modality}
        if question.first_day:
            keys["StudyDate"] = f"{question.first_day.replace('-', '')}-{question.last_day.replace('-', '')}"
        asked = {name: value for name, value in keys.items() if value} | {"includefield": "00081030"}
        for row in self._pages("/studies", asked, "0020000D"):
            yield Found(
                uid=_first(row, "0020000D"),
                accession=_first(row, "00080050"),
                day=_first(row, "00080020"),
                modalities=tuple(_all(row, "00080061")),
                description=_first(row, "00081030"),
            )

    def instances(self, study: str, modalities: tuple[str, ...]) -> list[Instance]:
        found: dict[str, Instance] = {}
        for row in self._pages(f"/studies/{study}/series", {}, "0020000E"):
            series, modality = _first(row, "0020000E"), _first(row, "00080060")
            if not UID.fullmatch(series):
                raise NotFetched(Reason.MALFORMED)
            if modalities and modality and modality not in modalities:
                continue
            for image in self._pages(f"/studies/{study}/series/{series}/instances", {}, "00080018"):
                uid, sop_class = _first(image, "00080018"), _first(image, "00080016")
                if not UID.fullmatch(uid):
                    raise NotFetched(Reason.MALFORMED)
                if sop_class in SOP_CLASSES:
                    found[uid] = Instance(series, uid)
                if len(found) > INSTANCES_MAX:
                    raise NotFetched(Reason.TOO_MANY)
        return list(found.values())

    def fetch(self, study: str, wanted: list[Instance], keep: Keep) -> None:
        for instance in wanted:
            path = f"/studies/{study}/series/{instance.series}/instances/{instance.uid}"
            with self._asked(path, STORED) as response:
                keep(instance, _image(response, self._pieces(response, FILE_BYTES_MAX + PART_HEADER_BYTES_MAX)))

    def _pages(self, path: str, keys: dict[str, str], unique: str) -> Iterator[dict[str, Any]]:
        """Rows of all pages. Servers that do not know `offset` give the first page again: then there is no other."""
        seen: set[str] = set()
        for page in range(PAGES_MAX):
            query = urlencode(keys | {"limit": str(PAGE), "offset": str(page * PAGE)})
            rows = self._rows(f"{path}?{query}")
            fresh = [row for row in rows if _first(row, unique) not in seen]
            seen.update(_first(row, unique) for row in fresh)
            yield from fresh
            if len(rows) < PAGE or not fresh:
                return
        raise NotFetched(Reason.TOO_MANY)

    def _rows(self, path: str) -> list[dict[str, Any]]:
        with self._asked(path, JSON) as response:
            if response.status_code == 204:
                return []
            data = b"".join(self._pieces(response, ANSWER_BYTES_MAX))
        try:
            rows = json.loads(data) if data.strip() else []
        except (ValueError, RecursionError):
            raise NotFetched(Reason.MALFORMED) from None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise NotFetched(Reason.MALFORMED)
        return rows

    @contextmanager
    def _asked(self, path: str, accept: str) -> Iterator[httpx.Response]:
        """A response whose status is good; its body was not read. Raises NotFetched."""
        try:
            with (
                self._watch.within(self._timeout_s),
                self._client.stream(
                    "GET",
                    self._settings.url + path,
                    headers={"Accept": accept},
                    extensions={"trace": self._watch.note},
                ) as response,
            ):
                self._watch.met()
                _check_status(response)
                yield response
        except httpx.HTTPError as error:
            raise NotFetched(Reason.TIMEOUT if self._watch.ended else _reason_of(error)) from None
        except (ssl.SSLError, OSError) as error:
            if not self._watch.ended:
                raise  # the disk's
            raise NotFetched(Reason.TIMEOUT) from error
        except httpx.InvalidURL:
            raise NotFetched(Reason.MALFORMED) from None

    def _pieces(self, response: httpx.Response, most: int) -> Iterator[bytes]:
        """The body. What httpx would unpack is refused: a few bytes could become many gigabytes."""
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            raise NotFetched(Reason.UNSUPPORTED)
        if int(_digits(response.headers.get("content-length", ""))) > most:
            raise NotFetched(Reason.TOO_LARGE)
        began, received = time.monotonic(), 0
        for piece in response.iter_raw():
            received += len(piece)
            if received > most:
                raise NotFetched(Reason.TOO_LARGE)
            if time.monotonic() - began > self._timeout_s + received / RATE_LEAST:
                raise NotFetched(Reason.TOO_SLOW)
            yield piece


class _Watch:
    """Ends a request whose answer does not begin in time, however slowly its header drips in: httpx only bounds each read."""

    def __init__(self) -> None:
        self.ended = False
        self._socket: socket.socket | None = None
        self._timer: threading.Timer | None = None

    @contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        self.ended = False
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True
        self._timer.start()
        try:
            yield
        finally:
            self.met()

    def met(self) -> None:
        """The answer began."""
        if self._timer is not None:
            self._timer.cancel()

    def note(self, event: str, told: dict[str, Any]) -> None:
        """httpx's `trace`: remember which socket is in use."""
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            self._socket = told["return_value"].get_extra_info("socket")

    def _end(self) -> None:
        self.ended = True
        if self._socket is not None:
            with suppress(OSError):
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)


def _check_status(response: httpx.Response) -> None:
    code = response.status_code
    if code in (200, 204, 206):
        return
    if 300 <= code < 400:
        raise NotFetched(Reason.REDIRECTED)
    reason = _REASONS.get(code, Reason.ARCHIVE_ERROR if code >= 500 else Reason.MALFORMED)
    raise NotFetched(reason, retry_after_s(response.headers.get("retry-after", ""), dt.datetime.now(dt.UTC)))


def retry_after_s(text: str, now: dt.datetime) -> float:
    """Seconds that a Retry-After header asks for, as a number or a date (RFC 9110, 10.2.3); 0 if it cannot be read."""
    if text.strip().isdecimal():
        return min(float(text.strip()[:9]), WAIT_MOST_S)
    with suppress(ValueError, TypeError, OverflowError, IndexError):
        return max(0.0, min((parsedate_to_datetime(text) - now).total_seconds(), WAIT_MOST_S))
    return 0.0


def _reason_of(error: httpx.HTTPError) -> Reason:
    if isinstance(error, httpx.TimeoutException):
        return Reason.TIMEOUT
    if isinstance(error, httpx.ConnectError):
        causes, seen = [error.__cause__, error.__context__], set[int]()
        while causes:
            cause = causes.pop()
            if cause is None or id(cause) in seen:
                continue
            seen.add(id(cause))
            if isinstance(cause, ssl.SSLError):
                return Reason.UNTRUSTED
            causes += [cause.__cause__, cause.__context__]
        return Reason.UNREACHABLE
    if isinstance(error, httpx.RemoteProtocolError | httpx.DecodingError):
        # An answer that ends too early is the network's fault more often than the server's, and may be whole next time.
        early = "without" in str(error) or "incomplete" in str(error).lower() or "closed" in str(error)
        return Reason.BROKEN_OFF if early else Reason.MALFORMED
    return Reason.BROKEN_OFF


def _image(response: httpx.Response, pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The one image in an answer: the first part of multipart/related (RFC 2387), or the whole body of application/dicom."""
    kind = str(response.headers.get("content-type", ""))
    if kind.lower().startswith("application/dicom") and "json" not in kind.lower():
        return pieces
    boundary = _BOUNDARY.search(kind)
    if not kind.lower().startswith("multipart/related") or boundary is None:
        raise NotFetched(Reason.MALFORMED)
    return part_of(pieces, (boundary[1] or boundary[2]).encode("latin-1", "replace"))


def part_of(pieces: Iterator[bytes], boundary: bytes) -> Iterator[bytes]:
    """Content of the only part; raises NotFetched if there is none, a second one, or no end."""
    mark = b"\r\n--" + boundary
    held = b"\r\n"  # the first delimiter may stand at the very beginning
    while (end := _header_end(held, mark)) is None:
        if len(held) > PART_HEADER_BYTES_MAX or not (piece := next(pieces, b"")):
            raise NotFetched(Reason.MALFORMED)
        held += piece
    held = held[end:]
    while (place := held.find(mark)) < 0:
        safe = max(0, len(held) - len(mark))  # a delimiter may lie across two pieces
        if safe:
            yield held[:safe]
            held = held[safe:]
        if not (piece := next(pieces, b"")):
            raise NotFetched(Reason.BROKEN_OFF)
        held += piece
    yield held[:place]
    rest = held[place + len(mark) :]
    while len(rest) < 2 and (piece := next(pieces, b"")):
        rest += piece
    if not rest.startswith(b"--"):
        raise NotFetched(Reason.WRONG_INSTANCE)  # a second part, where one image was asked for
    after = len(rest)
    while after <= EPILOGUE_BYTES_MAX and (
        piece := next(pieces, b"")
    ):  # read to its end, a connection can be used again
        after += len(piece)


def _header_end(held: bytes, mark: bytes) -> int | None:
    """Where the content of the first part begins; None if more has to be read."""
    begin = held.find(mark)
    if begin < 0:
        return None
    after = begin + len(mark)
    if held[after : after + 4] == b"\r\n\r\n":  # a part without a header
        return after + 4
    end = held.find(b"\r\n\r\n", after)
    return None if end < 0 else end + 4


def _first(row: dict[str, Any], tag: str) -> str:
    return next(iter(_all(row, tag)), "")


def _all(row: dict[str, Any], tag: str) -> list[str]:
    """Values of one attribute in the DICOM JSON model (PS3.18 annex F), text only, each bounded."""
    attribute = row.get(tag)
    values = attribute.get("Value") if isinstance(attribute, dict) else None
    if not isinstance(values, list):
        return []
    return [value.strip()[:1024] for value in values[:64] if isinstance(value, str) and value.strip()]


def _digits(text: str) -> str:
    return text[:18] if text.isdecimal() and text.isascii() else "0"


def _authorization(settings: Dicomweb, home: Path) -> dict[str, str]:
    if settings.token_file is not None:
        return {"Authorization": f"Bearer {secret(home / settings.token_file)}"}
    if settings.user is None or settings.password_file is None:
        return {}
    pair = f"{settings.user}:{secret(home / settings.password_file)}".encode()
    return {"Authorization": f"Basic {base64.b64encode(pair).decode()}"}


def _tls(settings: Dicomweb, home: Path) -> ssl.SSLContext:
    """Certificates are checked always; there is no setting that turns it off."""
    try:
        context = ssl.create_default_context(cafile=home / settings.ca_file if settings.ca_file else None)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if settings.certificate is not None and settings.key is not None:
            check_private(home / settings.key)
            context.load_cert_chain(home / settings.certificate, home / settings.key)
    except (ssl.SSLError, FileNotFoundError):
        raise DataError(
            "ca_file, certificate or key of data.archive is missing, or is no PEM file, or they do not belong together",
            remedy="Correct these three paths in site.yaml.",
        ) from None
    return context
