"""An archive behind DIMSE: C-FIND asks, C-GET or C-MOVE copies (DICOM PS3.4 annex C, PS3.7), over TLS where it is offered.

C-GET brings images back on the connection that we opened. For C-MOVE the archive opens one: then, and only while a study is being
copied, this machine listens. It takes connections from the archive's addresses and its application entity title only, and keeps
images that were asked for only. Each storage class is proposed once with each lossless transfer syntax, so that an archive need
not transcode anything.

pynetdicom waits for whole messages and limits neither their length nor their pace. `_Line` does both, below its protocol machine,
and no global setting of the library is touched.
"""

import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from socketserver import BaseServer
from typing import Any

from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.uid import (
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)
from pynetdicom import AE, build_context, build_role, evt
from pynetdicom.association import Association
from pynetdicom.presentation import PresentationContext
from pynetdicom.transport import ThreadedAssociationServer

from fl_client.archive import (
    SOP_CLASSES,
    UID,
    Dimse,
    Found,
    Instance,
    Keep,
    NotFetched,
    Question,
    Reason,
    Tls,
    check_private,
)
from fl_client.sources import FILE_BYTES_MAX
from privacy.errors import DataError

FIND = "1.2.840.10008.5.1.4.1.2.2.1"  # Study Root Query/Retrieve, PS3.4 C.6.2.1
MOVE = "1.2.840.10008.5.1.4.1.2.2.2"
GET = "1.2.840.10008.5.1.4.1.2.2.3"
LOSSLESS = (
    *(ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEGLosslessSV1, JPEGLossless, JPEGLSLossless),
    *(JPEG2000Lossless, RLELossless, HTJ2KLossless, HTJ2KLosslessRPCL),
)
PDU_BYTES = 128 * 1024  # what we say that we take at once
PDU_BYTES_MAX = 1024 * 1024  # what we take; negotiation of all contexts needs some ten thousand
ANSWER_BYTES_MAX = 1024 * 1024  # of one answer to a query
BACKLOG_BYTES_MAX = 64 * 1024 * 1024  # of messages that wait to be worked on
RATE_LEAST = 4096  # bytes a second; a network of hospitals is a thousand times faster
ANSWERS_MAX = 200_000
INSTANCES_MAX = 20_000  # of one study
AT_ONCE = 50  # images in one request: UIDs of 64 characters fit a PDU of 16 KiB several times
PENDING_MAX = 20 * AT_ONCE  # answers on the way to one result; one for each image is usual
LATE_S = 4 * 3600.0  # pynetdicom's own limits, behind ours
CONNECT_S = 30.0
POLL_S = 0.2
SUCCESS, REFUSED, PENDING = 0x0000, 0xA700, (0xFF00, 0xFF01)
_STATUS = {
    0x0110: Reason.ARCHIVE_ERROR,
    0x0112: Reason.UNSUPPORTED,
    0x0122: Reason.UNSUPPORTED,
    0x0124: Reason.FORBIDDEN,
    0xA801: Reason.UNAUTHORISED,  # move destination unknown: our title is not in its list
    0xA900: Reason.UNSUPPORTED,
}


class Peer:
    """An archive as `fl_client.archive.Archive` describes it. One association for each call, one call at a time."""

    days_at_once = 1  # C-FIND has no pages, and archives cut long answers off without a word

    def __init__(self, settings: Dimse, home: Path) -> None:
        """Raises DataError or KeyFileUnsafe for the files that site.yaml names; nothing is connected yet."""
        self._settings = settings
        self._tls = None if settings.tls is None else _TlsOf(settings.tls, home)

    def close(self) -> None:
        """Associations end with each call."""

    def studies(self, question: Question) -> Iterator[Found]:
        asked = _asking("STUDY", StudyInstanceUID="", StudyDescription="")
        asked.AccessionNumber = question.accession
        asked.ModalitiesInStudy = question.modality
        first, last = question.first_day.replace("-", ""), question.last_day.replace("-", "")
        asked.StudyDate = first if first == last else f"{first}-{last}"
        with self._associated([build_context(FIND, [ExplicitVRLittleEndian, ImplicitVRLittleEndian])]) as talk:
            for row in self._find(talk, asked):
                yield Found(
                    uid=_text(row, "StudyInstanceUID"),
                    accession=_text(row, "AccessionNumber"),
                    day=_text(row, "StudyDate"),
                    modalities=tuple(_texts(row, "ModalitiesInStudy")),
                    description=_text(row, "StudyDescription"),
                )

    def instances(self, study: str, modalities: tuple[str, ...]) -> list[Instance]:
        found: dict[str, Instance] = {}
        with self._associated([build_context(FIND, [ExplicitVRLittleEndian, ImplicitVRLittleEndian])]) as talk:
            asked = _asking("SERIES", StudyInstanceUID=study, SeriesInstanceUID="", Modality="")
            for row in list(self._find(talk, asked)):
                series, modality = _text(row, "SeriesInstanceUID"), _text(row, "Modality")
                if not UID.fullmatch(series):
                    raise NotFetched(Reason.MALFORMED)
                if modalities and modality and modality not in modalities:
                    continue
                asked = _asking(
                    "IMAGE", StudyInstanceUID=study, SeriesInstanceUID=series, SOPInstanceUID="", SOPClassUID=""
                )
                for image in self._find(talk, asked):
                    uid, sop_class = _text(image, "SOPInstanceUID"), _text(image, "SOPClassUID")
                    if not UID.fullmatch(uid):
                        raise NotFetched(Reason.MALFORMED)
                    if sop_class in SOP_CLASSES or not sop_class:  # an archive need not say it; each image is looked at
                        found[uid] = Instance(series, uid)
                    if len(found) > INSTANCES_MAX:
                        raise NotFetched(Reason.TOO_MANY)
        return list(found.values())

    def fetch(self, study: str, wanted: list[Instance], keep: Keep) -> None:
        desk = _Desk({instance.uid: instance for instance in wanted}, keep, strict=self._settings.method == "get")
        by_series: dict[str, list[str]] = {}
        for instance in wanted:
            by_series.setdefault(instance.series, []).append(instance.uid)
        parts = [
            (series, uids[begin : begin + AT_ONCE])
            for series, uids in by_series.items()
            for begin in range(0, len(uids), AT_ONCE)
        ]
        if self._settings.method == "get":
            roles = [build_role(sop_class, scp_role=True) for sop_class in SOP_CLASSES]
            with self._associated([build_context(GET), *_storage()], desk=desk, roles=roles) as talk:
                for series, uids in parts:
                    self._retrieve(talk, desk, talk.association.send_c_get(_images(study, series, uids), GET))
            return
        with self._associated([build_context(MOVE)]) as talk, self._listening(desk, talk):
            for series, uids in parts:
                asked = _images(study, series, uids)
                self._retrieve(talk, desk, talk.association.send_c_move(asked, self._settings.calling_ae, MOVE))

    def _find(self, talk: "_Talk", asked: Dataset) -> Iterator[Dataset]:
        for number, (status, row) in enumerate(talk.association.send_c_find(asked, FIND)):
            talk.check()
            if status.get("Status") not in PENDING:
                _check_status(status)
                return
            if number >= ANSWERS_MAX:
                raise NotFetched(Reason.TOO_MANY)
            if row is None:
                raise NotFetched(Reason.MALFORMED)
            yield row

    def _retrieve(self, talk: "_Talk", desk: "_Desk", answers: Iterator[tuple[Dataset, Dataset | None]]) -> None:
        for number, (status, _) in enumerate(answers):
            desk.check()
            talk.check()
            if status.get("Status") in PENDING:
                if number > PENDING_MAX:
                    raise NotFetched(Reason.TOO_MANY)
                continue
            if status.get("Status") != 0xB000:  # some images were not sent: which, shows in what is here
                _check_status(status)
            return

    @contextmanager
    def _associated(
        self, contexts: list[PresentationContext], *, desk: "_Desk | None" = None, roles: list[Any] | None = None
    ) -> Iterator["_Talk"]:
        """An association on which every error of library and archive is a NotFetched."""
        settings = self._settings
        entity = _entity(settings)
        talk = _Talk(settings.timeout_s, FILE_BYTES_MAX + PDU_BYTES_MAX if desk else ANSWER_BYTES_MAX)
        hooks: list[Any] = [(evt.EVT_CONN_OPEN, talk.opened), (evt.EVT_DIMSE_RECV, talk.arrived)]
        if desk is not None:
            hooks.append((evt.EVT_C_STORE, desk.store, [talk]))
        tls = None if self._tls is None else (self._tls.client(), settings.host)
        with talk.watched():
            association = entity.associate(
                settings.host,
                settings.port,
                contexts,
                settings.called_ae,
                PDU_BYTES,
                roles,
                tls_args=tls,
                evt_handlers=hooks,
            )
            talk.association = association
            try:
                self._check_association(association, talk)
                yield talk
                if association.is_established:
                    association.release()
            except (ValueError, RuntimeError):  # no such context was accepted, or the association ended in between
                talk.check()
                raise NotFetched(Reason.UNSUPPORTED if association.is_established else Reason.BROKEN_OFF) from None
            finally:
                if association.is_established:
                    association.abort()

    def _check_association(self, association: Association, talk: "_Talk") -> None:
        if association.is_established:
            return
        if self._tls is not None and self._tls.refused:
            raise NotFetched(Reason.UNTRUSTED)
        talk.check()
        if association.is_rejected:
            answer = association.acceptor.primitive
            source, why = (answer.result_source, answer.diagnostic) if answer is not None else (0, 0)
            # PS3.8, 9.3.4: the service user's reasons 3 and 7 are titles that it does not know.
            raise NotFetched(Reason.UNAUTHORISED if source == 1 and why in (1, 3, 7) else Reason.BUSY)
        if not talk.lines:
            raise NotFetched(Reason.UNREACHABLE)
        raise NotFetched(Reason.BROKEN_OFF)

    @contextmanager
    def _listening(self, desk: "_Desk", talk: "_Talk") -> Iterator[None]:
        """Take connections of the archive for as long as one study is copied."""
        settings = self._settings
        senders, entity = _addresses(settings), _entity(settings)
        entity.supported_contexts = _storage(together=True)
        entity.require_called_aet = True
        entity.require_calling_aet = [settings.called_ae]
        entity.maximum_associations = 4
        hooks: list[Any] = [
            (evt.EVT_CONN_OPEN, talk.opened_by_archive),
            (evt.EVT_DIMSE_RECV, talk.arrived),
            (evt.EVT_C_STORE, desk.store, [talk]),
        ]
        try:
            server: Any = entity.make_server(
                (settings.listen_address or "", settings.listen_port or 0),
                evt_handlers=hooks,
                ssl_context=None if self._tls is None else self._tls.server(),
                server_class=_Door,
            )
        except OSError as error:
            raise DataError(
                f"this machine cannot listen at {settings.listen_address}:{settings.listen_port} ({error.strerror})",
                remedy="Correct listen_address and listen_port below data.archive in site.yaml.",
            ) from None
        server.senders = senders
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": POLL_S}, name="archive-door")
        thread.daemon = True
        thread.start()
        try:
            yield
        finally:
            for association in server.active_associations:
                association.abort()
            server.shutdown()
            thread.join(5)


# Below the protocol machine ------------------------------------------------------------------------------------------


@dataclass
class _Line:
    """What arrives on one connection. `received` and `began_s` are of the message that is arriving."""

    association: Association
    connection: Any
    most: int
    received: int = 0
    backlog: int = 0
    began_s: float = 0

    def cut(self) -> None:
        """End the connection now, whatever state the protocol is in; whoever waits for a message is told so."""
        inner = self.connection.socket
        if inner is not None:
            with suppress(OSError):
                socket.socket.shutdown(inner, socket.SHUT_RDWR)


@dataclass
class _Talk:
    """One conversation with the archive: the association that we opened, and those that it opens for C-MOVE.

    `failure` is the first thing that went wrong. A thread of its own watches the time, because the library waits without end for
    the rest of a message.
    """

    timeout_s: float
    most: int
    lines: list[_Line] = field(default_factory=list)
    failure: Reason | None = None
    working: int = 0
    last_s: float = field(default_factory=time.monotonic)
    association: Association = field(init=False)
    _over: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        if self.failure is not None:
            raise NotFetched(self.failure)

    def fail(self, reason: Reason) -> None:
        self.failure = self.failure or reason
        for line in list(self.lines):
            line.cut()

    def opened(self, event: evt.Event) -> None:
        self._take(event, self.most)

    def opened_by_archive(self, event: evt.Event) -> None:
        self._take(event, FILE_BYTES_MAX + PDU_BYTES_MAX)

    def _take(self, event: evt.Event, most: int) -> None:
        connection: Any = event.assoc.dul.socket
        line = _Line(event.assoc, connection, most)
        self.lines.append(line)
        connection.recv = lambda count: self._receive(line, count)

    def arrived(self, event: evt.Event) -> None:
        """A whole message is there."""
        for line in self.lines:
            if line.association is event.assoc:
                line.received, line.began_s = 0, 0

    def _receive(self, line: _Line, count: int) -> bytearray:
        """In place of AssociationSocket.recv: `count` bytes, fewer if the connection ended. Raises OSError where it must end."""
        if count > PDU_BYTES_MAX or line.received + count > line.most:
            self.fail(Reason.TOO_LARGE)
            raise OSError("more than any message may hold")
        self._drain(line)
        data = bytearray()
        if not line.began_s:
            line.began_s = time.monotonic()
        while len(data) < count:
            try:
                piece = line.connection.socket.recv(min(count - len(data), 65536))
            except ssl.SSLError:  # with TLS 1.3 a server refuses our certificate only here
                self.failure = self.failure or Reason.UNTRUSTED
                raise
            if not piece:
                break
            data += piece
            line.received += len(piece)
            line.backlog += len(piece)
            self.last_s = time.monotonic()
        return data

    def _drain(self, line: _Line) -> None:
        """Do not read on while messages pile up: whoever sends must wait, as TCP intends."""
        queue = line.association.dimse.msg_queue
        while queue.qsize() > 1 and line.backlog > BACKLOG_BYTES_MAX and not self._over.is_set():
            time.sleep(0.01)
        if queue.qsize() == 0:
            line.backlog = 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        thread = threading.Thread(target=self._watch, name="archive-watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(POLL_S):
            now = time.monotonic()
            if self.working:
                self.last_s = now
            elif now - self.last_s > self.timeout_s:
                self.fail(Reason.TIMEOUT)
            for line in list(self.lines):
                if line.began_s and now - line.began_s > self.timeout_s + line.received / RATE_LEAST:
                    self.fail(Reason.TOO_SLOW)


@dataclass
class _Desk:
    """Where images are handed in. `strict`: whoever sends something else has broken the request, not another one's."""

    wanted: dict[str, Instance]
    keep: Keep
    strict: bool
    failure: NotFetched | OSError | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _here: set[str] = field(default_factory=set)

    def check(self) -> None:
        if self.failure is not None:
            raise self.failure

    def store(self, event: evt.Event, talk: _Talk) -> int:
        """Handler of C-STORE; the status that the archive is told (PS3.4, B.2.3)."""
        with self._lock:
            talk.working += 1
            try:
                return self._store(event, talk)
            finally:
                talk.last_s = time.monotonic()
                talk.working -= 1

    def _store(self, event: evt.Event, talk: _Talk) -> int:
        if self.failure is not None:
            return REFUSED
        request: Any = event.request
        uid = str(request.AffectedSOPInstanceUID)
        if uid not in self.wanted or str(request.AffectedSOPClassUID) not in SOP_CLASSES:
            if self.strict:
                self._fail(NotFetched(Reason.WRONG_INSTANCE), talk)
            return REFUSED
        if uid in self._here:
            return SUCCESS
        try:
            self.keep(self.wanted[uid], iter((event.encoded_dataset(),)))
        except (NotFetched, OSError) as failure:
            self._fail(failure, talk)
            return REFUSED
        except (AttributeError, ValueError, TypeError, KeyError):  # no data set, or one that cannot be named
            self._fail(NotFetched(Reason.MALFORMED), talk)
            return REFUSED
        self._here.add(uid)
        return SUCCESS

    def _fail(self, failure: NotFetched | OSError, talk: _Talk) -> None:
        self.failure = failure
        talk.fail(failure.reason if isinstance(failure, NotFetched) else Reason.BROKEN_OFF)


class _Door(ThreadedAssociationServer):
    """A storage SCP that hangs up on every address but the archive's before a word was said, and whose handshakes end in time."""

    senders: frozenset[str] = frozenset()

    def get_request(self) -> tuple[socket.socket, tuple[str, int]]:
        if not isinstance(self.socket, socket.socket):
            raise OSError("closed")
        connection, address = self.socket.accept()
        try:
            if _plain(str(address[0])) not in self.senders:
                raise OSError("not an address of the archive")
            if self.ssl_context is not None:
                connection.settimeout(CONNECT_S)
                connection = self.ssl_context.wrap_socket(connection, server_side=True)
                connection.settimeout(None)
        except OSError:
            connection.close()
            raise
        return connection, address

    def shutdown(self) -> None:
        BaseServer.shutdown(self)  # pynetdicom's own also takes it off a list that only AE.start_server fills
        self.server_close()

    def handle_error(self, *_: object) -> None:
        """Say nothing: the standard library would print address and traceback, and a failed copy has its reason anyway."""


class _TlsOf:
    """Contexts for both directions; each side has to show a certificate of the authority that site.yaml names."""

    def __init__(self, settings: Tls, home: Path) -> None:
        self._ca, self._certificate, self._key = (
            home / settings.ca_file,
            home / settings.certificate,
            home / settings.key,
        )
        self.refused = False
        check_private(self._key)
        self.server()

    def server(self) -> ssl.SSLContext:
        context = self._context(ssl.Purpose.CLIENT_AUTH)
        context.verify_mode = ssl.CERT_REQUIRED
        return context

    def client(self) -> ssl.SSLContext:
        self.refused = False
        tls, context = self, self._context(ssl.Purpose.SERVER_AUTH)

        class Noted(ssl.SSLSocket):
            """pynetdicom only logs why a handshake failed, and whom one trusts is not the same as who is there."""

            def do_handshake(self, block: bool = False) -> None:
                try:
                    super().do_handshake(block)
                except ssl.SSLError:
                    tls.refused = True
                    raise

        context.sslsocket_class = Noted
        return context

    def _context(self, purpose: ssl.Purpose) -> ssl.SSLContext:
        try:
            context = ssl.create_default_context(purpose, cafile=self._ca)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            context.load_cert_chain(self._certificate, self._key)
        except (ssl.SSLError, FileNotFoundError):
            raise DataError(
                "ca_file, certificate or key of data.archive.tls is missing, or is no PEM file, or they do not belong together",
                remedy="Correct these three paths in site.yaml.",
            ) from None
        return context


# Words of the protocol -----------------------------------------------------------------------------------------------


def _entity(settings: Dimse) -> AE:
    entity = AE(settings.calling_ae)
    entity.acse_timeout = settings.timeout_s
    entity.connection_timeout = min(settings.timeout_s, CONNECT_S)
    entity.dimse_timeout = entity.network_timeout = LATE_S
    entity.maximum_pdu_size = PDU_BYTES
    return entity


def _storage(*, together: bool = False) -> list[PresentationContext]:
    """A context for each class and syntax; `together`: one for each class, as whoever accepts lists them."""
    if together:
        return [build_context(sop_class, list(LOSSLESS)) for sop_class in SOP_CLASSES]
    return [build_context(sop_class, [syntax]) for sop_class in SOP_CLASSES for syntax in LOSSLESS]


def _asking(level: str, **keys: str) -> Dataset:
    asked = Dataset()
    asked.QueryRetrieveLevel = level
    for keyword, value in keys.items():
        setattr(asked, keyword, value)
    return asked


def _images(study: str, series: str, uids: list[str]) -> Dataset:
    asked = _asking("IMAGE", StudyInstanceUID=study, SeriesInstanceUID=series)
    asked.SOPInstanceUID = uids if len(uids) > 1 else uids[0]
    return asked


def _check_status(status: Dataset) -> None:
    code = status.get("Status")
    if code is None:
        raise NotFetched(Reason.BROKEN_OFF)
    if code == SUCCESS:
        return
    if 0xA700 <= code <= 0xA7FF:
        raise NotFetched(Reason.BUSY)
    raise NotFetched(_STATUS.get(code, Reason.ARCHIVE_ERROR))


def _texts(row: Dataset, keyword: str) -> list[str]:
    try:
        value = row.get(keyword)
        values = list(value) if isinstance(value, MultiValue | list) else [] if value is None else [value]
        return [str(one).strip()[:1024] for one in values[:64] if str(one).strip()]
    except Exception:  # pydicom raises whatever its parts raise for bytes that are no such value
        raise NotFetched(Reason.MALFORMED) from None


def _text(row: Dataset, keyword: str) -> str:
    return next(iter(_texts(row, keyword)), "")


def _addresses(settings: Dimse) -> frozenset[str]:
    if settings.senders:
        return frozenset(_plain(address) for address in settings.senders)
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)
    except OSError:
        raise NotFetched(Reason.UNREACHABLE) from None
    return frozenset(_plain(str(entry[4][0])) for entry in found)


def _plain(address: str) -> str:
    """One spelling for each address; an IPv4 one that arrives on an IPv6 socket is itself."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    return str(getattr(found, "ipv4_mapped", None) or found)
