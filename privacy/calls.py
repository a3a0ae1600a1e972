"""Calls to the consortium service: joining, and signed calls over TLS that trusts one authority only.

Rules, which both ends share:
1. Nothing is sent to a server before its authority's fingerprint equals the invited one; afterwards only that
   authority is trusted, whatever the machine's own certificate store says.
2. Every call but Enrol carries a signature of the caller over method, SHA-256 of the request, name, time and nonce.
3. A failure arrives as "<code>: <sentence>" and is raised here as the class of `privacy.errors` with that code. The
   sentence comes from another machine, so it is stripped of control characters before anyone prints it.
"""

import base64
import binascii
import contextlib
import hashlib
import itertools
import json
import re
import secrets
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, cast

import grpc
from cryptography import x509

from privacy import consortium_pb2 as pb
from privacy import consortium_pb2_grpc, disk, keys, reach
from privacy.errors import (
    AwaitingSignature,
    InvitationRefused,
    IsocenterError,
    MessageMalformed,
    NotEnrolled,
    TrustError,
    Unreachable,
    VersionSkew,
    WrongAuthority,
)
from privacy.greeting import Readiness, Versions, own
from privacy.heads import SignedHead
from privacy.reach import Way

PartyRole = Literal["site", "researcher"]

SERVICE = "isocenter.v1.Consortium"
GREET_SECONDS = 5.0  # it is asked for by people who look, and again by every node in a minute
CALL_SECONDS = 30.0  # every unary call; a coordinator that needs longer is not well
FETCH_SECONDS = 600.0  # one call for a part of a model, which is at most `fl_server.consortium.FETCH_BYTES`
LAUNCH_SECONDS = 120.0  # a launch waits for the SuperLink to accept the run
KEEPALIVE_MS = 40_000  # below the minute after which proxies cut what is silent, above the half that the server permits
REQUEST_BYTES_MAX = 1024 * 1024  # the largest request is a study of at most 256 KiB
REPLY_BYTES_MAX = 32 * 1024 * 1024  # all offers of a site in one reply
RESULT_BYTES_MAX = 16 * 1024**3  # one result file; a model of four billion float32 weights
VERSION = 1  # of enrolment.json; release 0.1 wrote none
RESULT_FILES = ("results.json", "model.safetensors", "card.json")
SENTENCE_CHARACTERS_MAX = 2000  # status details travel in a header of at most 8 KiB
REMEDY = "isocenter-remedy-bin"  # trailing metadata: what to do, where it is not what the error's class says
TOKEN_BYTES = 20

_generated: Any = consortium_pb2_grpc  # the generated module carries no annotations
_PROXY_SAID = re.compile(r"http proxy returned response code (\d{3})")
_LINE = re.compile(
    r"isocenter-join:v1:([a-z][a-z0-9_-]{0,31})@([a-z0-9][a-z0-9.-]{0,252}):(\d{1,5}):([0-9a-f]{64}):([a-z2-7]{32})"
)


# The invitation ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InvitationLine:
    """What `fl-server invite` prints: one word that survives copying. `str()` and `parse` are each other's inverse."""

    name: str
    host: str
    service_port: int
    ca_fingerprint: str  # 64 hex characters
    token: str  # base32 of TOKEN_BYTES random bytes, lower case

    @staticmethod
    def new_token() -> str:
        return base64.b32encode(secrets.token_bytes(TOKEN_BYTES)).decode().lower()

    @classmethod
    def parse(cls, line: str) -> "InvitationLine":
        """Read a line, also one that a mail program wrapped; raises InvitationRefused without quoting the token."""
        found = _LINE.fullmatch("".join(line.split()))
        if not found or not 0 < int(found[3]) < 65536:
            raise InvitationRefused(
                "this is no invitation line; it begins with isocenter-join:v1: and is one long word",
                remedy="Copy the whole line that `fl-server invite` printed, and put it between quotation marks.",
            )
        return cls(found[1], found[2], int(found[3]), found[4], found[5])

    def __str__(self) -> str:
        return f"isocenter-join:v1:{self.name}@{self.host}:{self.service_port}:{self.ca_fingerprint}:{self.token}"


@dataclass(frozen=True)
class Enrolment:
    """Who this folder's keys speak for, and where its consortium is. Written last, so it marks a finished join."""

    name: str
    role: PartyRole
    gateway: str  # host:port for training
    service: str  # host:port of the consortium service
    ca_fingerprint: str

    @classmethod
    def open(cls, folder: Path) -> "Enrolment":
        """The enrolment in a keys folder; raises NotEnrolled if joining was never finished."""
        path = folder / "enrolment.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            disk.require_known(path, found.get("version"), VERSION)
            return cls(**{field: str(found[field]) for field in cls.__dataclass_fields__})  # type: ignore[arg-type]
        except FileNotFoundError:
            raise NotEnrolled(f"{folder} belongs to no consortium yet") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise NotEnrolled(f"{path} is damaged", remedy="Restore the keys folder from your backup.") from None

    def store(self, folder: Path) -> None:
        keys.write_private(
            folder / "enrolment.json", json.dumps({"version": VERSION, **asdict(self)}, indent=1).encode()
        )


def join(line: str, folder: Path, role: PartyRole = "site", way: Way | None = None) -> Enrolment:
    """Redeem an invitation; then `folder` holds <role>.key, <role>.pem, ca.pem, coordinator.pem and enrolment.json.

    The key is made here and never leaves. Killed at any point, the same line can be used again: the key is kept, and
    the coordinator answers the same key with the same certificate. A party whose certificate has ended keeps its key as
    well. Raises WrongAuthority, InvitationRefused, Unreachable, AwaitingSignature while the consortium's authority has
    not signed by hand, and TrustError if the folder belongs to somebody else.
    """
    invitation = InvitationLine.parse(line)
    if (folder / "enrolment.json").exists():
        done = Enrolment.open(folder)
        same = (done.name, done.role, done.ca_fingerprint) == (invitation.name, role, invitation.ca_fingerprint)
        if same and not keys.ended(keys.load_certificate((folder / f"{role}.pem").read_bytes())):
            return done
        if not same:
            raise TrustError(
                f"{folder} already belongs to {done.role} {done.name}", remedy="Join with another, empty home folder."
            )
    service = f"{invitation.host}:{invitation.service_port}"
    ca = invited_authority(invitation, way)
    key_path = folder / f"{role}.key"
    key = keys.load_key(key_path) if key_path.exists() else keys.make_key(key_path)
    request = pb.EnrolRequest(
        name=invitation.name,
        role=role,
        token=invitation.token,
        csr=keys.make_csr(key, invitation.name),
        versions=numbers_of(own()),
    )
    channel = _channel(service, keys.certificate_pem(ca), way)
    try:
        reply = _generated.ConsortiumStub(channel).Enrol(request, timeout=CALL_SECONDS)
    except grpc.RpcError as error:
        raise _translated(error, service, way) from None
    finally:
        channel.close()
    certificate = keys.load_certificate(reply.certificate)
    keys.check_issued(ca, certificate, invitation.name, role)
    if keys.public_key_of(certificate) != key.public_key():
        raise TrustError("the coordinator answered with a certificate for another key")
    keys.load_public(reply.coordinator_key)
    if not 0 < reply.gateway_port < 65536:
        raise MessageMalformed("the coordinator named no port for training")
    keys.write_public(folder / "ca.pem", keys.certificate_pem(ca))
    keys.write_public(folder / "coordinator.pem", reply.coordinator_key)
    keys.write_public(folder / f"{role}.pem", keys.certificate_pem(certificate))
    gateway = f"{invitation.host}:{reply.gateway_port}"
    enrolment = Enrolment(invitation.name, role, gateway, service, invitation.ca_fingerprint)
    enrolment.store(folder)
    return enrolment


def invited_authority(invitation: InvitationLine, way: Way | None = None) -> x509.Certificate:
    """The certificate in the server's chain whose fingerprint is the invited one; raises WrongAuthority for none."""
    chain = reach.shown_chain(invitation.host, invitation.service_port, way, reach.CONNECT_S)
    for certificate in chain:
        if secrets.compare_digest(keys.fingerprint(certificate), invitation.ca_fingerprint):
            return certificate
    shown = keys.grouped(keys.fingerprint(chain[-1]))
    raise WrongAuthority(
        f"the server at {invitation.host}:{invitation.service_port} belongs to another authority than the one that "
        f"invited {invitation.name}. It showed {shown}; the invitation says {keys.grouped(invitation.ca_fingerprint)}"
    )


# Signed calls --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Signed:
    """The metadata of one signed call."""

    name: str
    time_s: int  # seconds since 1970, UTC
    nonce: str  # 32 hex characters
    signature: bytes

    def body(self, method: str, request: bytes) -> bytes:
        """What is signed. No part can hold a line feed, so the parts cannot be shifted into each other."""
        return "\n".join([method, keys.digest(request), self.name, str(self.time_s), self.nonce]).encode()

    @classmethod
    def make(cls, key: keys.PrivateKey, name: str, method: str, request: bytes) -> "Signed":
        unsigned = cls(name, int(time.time()), secrets.token_hex(16), b"")
        signature = keys.sign(key, keys.CALL, unsigned.body(method, request))
        return cls(unsigned.name, unsigned.time_s, unsigned.nonce, signature)

    def metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        return (
            ("isocenter-name", self.name),
            ("isocenter-time", str(self.time_s)),
            ("isocenter-nonce", self.nonce),
            ("isocenter-signature-bin", self.signature),
        )

    @classmethod
    def read(cls, metadata: Iterable[tuple[str, str | bytes]]) -> "Signed":
        """Read the metadata of a received call; raises MessageMalformed if a part is missing, double or misshapen."""
        found: dict[str, str | bytes] = {}
        for key, value in metadata:
            if key.startswith("isocenter-"):
                if key in found:
                    raise MessageMalformed("a part of the call's signature came twice")
                found[key] = value
        name, moment, nonce = (found.get(f"isocenter-{part}", "") for part in ("name", "time", "nonce"))
        signature = found.get("isocenter-signature-bin", b"")
        texts_match = (
            isinstance(name, str)
            and isinstance(moment, str)
            and isinstance(nonce, str)
            and re.fullmatch(r"[a-z][a-z0-9_-]{0,31}", name)
            and re.fullmatch(r"[0-9]{1,12}", moment, re.ASCII)
            and re.fullmatch(r"[0-9a-f]{32}", nonce)
        )
        if not texts_match or not isinstance(signature, bytes) or not 0 < len(signature) <= 128:
            raise MessageMalformed("this call is not signed as the consortium requires")
        return cls(cast(str, name), int(moment), cast(str, nonce), signature)


class Caller:
    """One party's signed calls to its coordinator. A method raises the error the coordinator named, or Unreachable."""

    def __init__(self, address: str, ca_pem: bytes, name: str, key: keys.PrivateKey, way: Way | None = None) -> None:
        """`address` is host:port of the consortium service; only certificates issued below `ca_pem` are accepted."""
        self.address, self.name, self._key, self._way = address, name, key, way
        self._channel = _channel(address, ca_pem, way)
        self._stub = _generated.ConsortiumStub(self._channel)
        self.ahead_s: float | None = None  # seconds that the coordinator's clock is ahead, by its last greeting

    @classmethod
    def open(cls, folder: Path, service: str | None = None, way: Way | None = None) -> "Caller":
        """The caller whose enrolment `join` left in `folder`; `service` overrides the address noted there.

        On the way the certificate in `folder` is renewed if it is time. That it cannot be renewed now hinders no call.
        """
        enrolment = Enrolment.open(folder)
        key = keys.load_key(folder / f"{enrolment.role}.key")
        caller = cls(service or enrolment.service, (folder / "ca.pem").read_bytes(), enrolment.name, key, way)
        with contextlib.suppress(AwaitingSignature, Unreachable):
            caller.renew(folder, enrolment.role)
        return caller

    def __enter__(self) -> "Caller":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def renew(self, folder: Path, role: PartyRole) -> bool:
        """Replace the certificate in `folder` by a new one over the same key, if it is time; whether it was.

        Raises CertificateExpired after its end, CertificateRevoked, AwaitingSignature, Unreachable.
        """
        path = folder / f"{role}.pem"
        held = keys.load_certificate(path.read_bytes())
        if not keys.renewal_due(held):
            return False
        request = pb.RenewRequest(csr=keys.make_csr(self._key, self.name), versions=numbers_of(own()))
        reply = self._call("Renew", request)
        renewed, ca = keys.load_certificate(reply.certificate), keys.load_certificate((folder / "ca.pem").read_bytes())
        keys.check_issued(ca, renewed, self.name, role)
        if (
            keys.public_key_of(renewed) != self._key.public_key()
            or renewed.not_valid_after_utc <= held.not_valid_after_utc
        ):
            raise TrustError("the coordinator answered with a certificate that renews nothing")
        keys.write_public(path, keys.certificate_pem(renewed))
        return True

    def greet(self, readiness: Readiness | None = None) -> Versions | None:
        """Tell our versions, and of a site whether it is ready; the coordinator's, None if it is too old to tell."""
        told = None if readiness is None else pb.Readiness(ready=readiness.ready, reasons=readiness.reasons)
        request = pb.GreetRequest(versions=numbers_of(own()), readiness=told)
        began = time.time()
        try:
            reply = self._call("Greet", request, GREET_SECONDS)
        except VersionSkew:
            return None
        # The coordinator tells whole seconds, of a moment between asking and hearing.
        self.ahead_s = reply.time_s + 0.5 - (began + time.time()) / 2 if reply.time_s else None
        return versions_in(reply)

    def witness(self, head: SignedHead) -> SignedHead:
        """Site: have the coordinator witness the head of this site's journal; the head of its own, still to be checked."""
        return SignedHead.read(self._call("Witness", pb.WitnessRequest(head=head.to_bytes())).head)

    def offers(self) -> list[pb.Offer]:
        """Site: the studies that name this site. Their signatures are still to be checked."""
        return list(self._call("Offers", pb.OffersRequest()).offers)

    def decide(self, body: bytes, signature: bytes) -> None:
        """Site: deliver a signed `Statement`."""
        self._call("Decide", pb.DecideRequest(statement=body, signature=signature))

    def roster(self, sites: Sequence[str]) -> tuple[dict[str, str], str]:
        """Researcher: (site -> enrolled key, key of the aggregator), in hex, as a study over these sites names them.

        Raises NotEnrolled naming every site that the consortium does not have, MessageMalformed for what is no key.
        """
        reply = self._call("Roster", pb.RosterRequest(sites=sites))
        for point in reply.keys.values():
            if keys.point_hex(keys.load_point(point)) != point:
                raise MessageMalformed("the coordinator named a site's key in another form than studies do")
        if not re.fullmatch("[0-9a-f]{64}", reply.aggregator):
            raise MessageMalformed("the coordinator named no key for sealed updates")
        return dict(reply.keys), str(reply.aggregator)

    def submit(self, study: bytes) -> str:
        """Researcher: sign a study's canonical form and hand it in; returns the digest the coordinator computed."""
        signature = keys.sign(self._key, keys.STUDY_SUBMIT, study)
        return str(self._call("Submit", pb.SubmitRequest(study=study, signature=signature)).digest)

    def studies(self) -> list[pb.StudyState]:
        """Researcher: own studies, newest first, with approvals and runs."""
        return list(self._call("Studies", pb.StudiesRequest()).studies)

    def launch(self, digest: str) -> str:
        """Researcher: start a run of an approved study; returns its run id. Raises TooFewApprovals."""
        return str(self._call("Launch", pb.LaunchRequest(digest=digest), LAUNCH_SECONDS).run_id)

    def watch(self, run_id: str, first: int = 0) -> Iterator[tuple[int, str]]:
        """Researcher: (number, JSON text) of each event of a run from number `first` on, until the run ends.

        After Unreachable, call again with the number after the last one received: no event is lost or doubled.
        """
        for event in self._stream("Watch", pb.WatchRequest(run_id=run_id, first=first)):
            yield int(event.number), str(event.text)

    def results(self, run_id: str, folder: Path) -> list[Path]:
        """Researcher: store the result files of a run below `folder`; each appears whole and as it was sent."""
        return _store(self._stream("Results", pb.ResultsRequest(run_id=run_id)), folder)

    def head(self) -> SignedHead:
        """Researcher: the signed head of the coordinator's journal as it is now. Its signature is still to be checked."""
        return SignedHead.read(self._call("Head", pb.HeadRequest()).head)

    def published(self) -> list[tuple[bytes, bytes]]:
        """Site, researcher: (notice, signature) of each published model. Both are still to be checked."""
        return [(found.notice, found.signature) for found in self._call("Models", pb.ModelsRequest()).models]

    def fetch(self, sha256: str, first: int) -> Iterator[bytes]:
        """Site, researcher: bytes of the published model with this hash from number `first` on; perhaps not all that are left."""
        for piece in self._stream("Fetch", pb.FetchRequest(sha256=sha256, first=first), FETCH_SECONDS):
            yield piece.data

    def _call(self, name: str, request: Any, timeout_s: float = CALL_SECONDS) -> Any:
        try:
            return getattr(self._stub, name)(request, timeout=timeout_s, metadata=self._sign(name, request))
        except grpc.RpcError as error:
            raise _translated(error, self.address, self._way) from None

    def _stream(self, name: str, request: Any, timeout_s: float | None = None) -> Iterator[Any]:
        stream = getattr(self._stub, name)(request, timeout=timeout_s, metadata=self._sign(name, request))
        try:
            yield from stream
        except grpc.RpcError as error:
            raise _translated(error, self.address, self._way) from None
        finally:
            stream.cancel()

    def _sign(self, name: str, request: Any) -> tuple[tuple[str, str | bytes], ...]:
        return Signed.make(self._key, self.name, f"/{SERVICE}/{name}", request.SerializeToString()).metadata()


def _store(chunks: Iterable[pb.Chunk], folder: Path) -> list[Path]:
    """Write streamed files. Names are compared with the fixed list, never used as they came."""
    folder.mkdir(parents=True, exist_ok=True)
    stored: list[Path] = []
    for name, pieces in itertools.groupby(chunks, key=lambda chunk: chunk.name):
        path = next((folder / known for known in RESULT_FILES if known == name), None)
        if path is None or path in stored:
            raise MessageMalformed("the coordinator sent a result file that was not expected")
        part = path.with_name(f".{path.name}.part")
        try:
            _store_one(part, pieces, path.name)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        stored.append(path)
    return stored


def _store_one(part: Path, pieces: Iterable[pb.Chunk], name: str) -> None:
    size, hashed, announced = 0, hashlib.sha256(), ""
    with part.open("wb") as file:
        for chunk in pieces:
            size += len(chunk.data)
            if size > RESULT_BYTES_MAX:
                raise MessageMalformed(f"{name} is larger than any result may be")
            hashed.update(chunk.data)
            file.write(chunk.data)
            announced = chunk.sha256
    if announced != hashed.hexdigest():
        raise MessageMalformed(f"{name} broke off or was changed on the way: its SHA-256 is not the announced one")


def numbers_of(versions: Versions) -> pb.Versions:
    wire, major, minor, patch = versions.numbers
    return pb.Versions(wire=wire, major=major, minor=minor, patch=patch)


def versions_in(message: Any) -> Versions | None:
    """The versions that a request or reply tells, None if it tells none."""
    told = message.versions
    return Versions.of(told.wire, told.major, told.minor, told.patch) if message.HasField("versions") else None


# Channel and failures ------------------------------------------------------------------------------------------------


def _channel(address: str, ca_pem: bytes, way: Way | None = None) -> Any:
    options: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", REPLY_BYTES_MAX),
        ("grpc.max_send_message_length", REQUEST_BYTES_MAX),
        ("grpc.enable_http_proxy", 0),  # no hidden environment variables: the address is where the call goes
        ("grpc.service_config_disable_resolution", 1),  # no extra DNS question
        ("grpc.enable_retries", 0),  # a nonce is good for one call
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),  # a watch through a firewall or a proxy is not dropped in silence
    ]
    if way is not None:
        # The channel's target is the proxy, so nothing ever connects past it; TLS is with the host behind the tunnel.
        options += [
            ("grpc.http_connect_server", address),
            ("grpc.http_connect_headers", "\n".join(f"{name}:{text}" for name, text in way.headers.items())),
            ("grpc.ssl_target_name_override", address.rpartition(":")[0]),
            ("grpc.default_authority", address),
        ]
    return grpc.secure_channel(
        str(way or address), grpc.ssl_channel_credentials(root_certificates=ca_pem), options=options
    )


def details_of(error: IsocenterError) -> str:
    """What travels as status details: the public code and one sentence."""
    return f"{error.code}: {printable(str(error))}"


def error_of(details: str) -> IsocenterError | None:
    """The error that `details_of` described, of the class with that code; None if it is of another form."""
    code, separator, sentence = details.partition(": ")
    kinds: dict[str, type[IsocenterError]] = {}
    todo = [IsocenterError]
    while todo:
        kind = todo.pop()
        kinds.setdefault(kind.code, kind)
        todo += kind.__subclasses__()
    if not separator or code not in kinds:
        return None
    return kinds[code](printable(sentence))


def printable(sentence: str) -> str:
    """One line without control and direction-changing characters, which could rewrite what a terminal shows."""
    text = "".join(" " if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c for c in sentence)
    return " ".join(text.split())[:SENTENCE_CHARACTERS_MAX]


def _translated(error: Any, address: str, way: Way | None = None) -> IsocenterError:
    """The error to raise for a failed call; transport failures are told apart by what gRPC says about them."""
    code, details = error.code(), str(error.details() or "")
    if code == grpc.StatusCode.UNAVAILABLE:
        return _unreachable(details, address, way)
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return Unreachable(f"{address} did not answer in time{f', through the proxy {way}' if way else ''}")
    if named := error_of(details):
        for key, value in error.trailing_metadata() or ():
            if key == REMEDY and isinstance(value, bytes):
                named.remedy = printable(value.decode("utf-8", "replace"))
        return named
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return Unreachable(f"{address} is too busy, or the message is too large", remedy="Try again in a minute.")
    if code == grpc.StatusCode.UNIMPLEMENTED:
        return VersionSkew(f"{address} does not know this call; its Isocenter is of an earlier version")
    return IsocenterError(f"the call to {address} failed ({code.name.lower().replace('_', ' ')})")


def _unreachable(details: str, address: str, way: Way | None) -> IsocenterError:
    lower = details.lower()
    if way is not None and not any(word in lower for word in ("verif", "ssl", "tls")):
        answered = _PROXY_SAID.search(lower)
        return reach.refused(int(answered[1]), way, address) if answered else reach.silent_proxy(way)
    if "resolving" in lower or "name resolution" in lower:
        return Unreachable(f"the host name of {address} cannot be resolved")
    if "certificate_verify_failed" in lower or "verification check" in lower:
        return WrongAuthority(
            f"the certificate of {address} is not from this consortium's authority, has ended, or is for another host"
        )
    if "handshake" in lower or "ssl" in lower:
        return Unreachable(
            f"{address} answers, but no TLS 1.3 connection could be made; is it the consortium's service port?"
        )
    what = "nothing listens at {} (connection refused)" if "refused" in lower else "no connection to {}"
    return Unreachable(what.format(address))


def token_hash(token: str) -> bytes:
    """32 bytes: what the coordinator stores instead of a token; raises InvitationRefused if it cannot be one."""
    try:
        raw = base64.b32decode(token.upper().encode())
    except (binascii.Error, ValueError):
        raw = b""
    if len(raw) != TOKEN_BYTES:
        raise InvitationRefused("this is no token of an invitation")
    return bytes.fromhex(keys.digest(b"isocenter/v1/token\n" + raw))
