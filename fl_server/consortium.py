"""The consortium service: what sites and researchers may ask of the coordinator, over TLS 1.3, each call signed.

What the gate refuses before any method runs: a call without a whole signature, by a name that is not enrolled, with a
signature that does not fit method and request, by a party that was revoked or whose certificate has ended, with a clock
more than two minutes off, made before, or by a party whose role the call is not for. Enrol alone is open: its token is
its proof. Names of files never come from a caller,
and a researcher sees the runs of own studies only.
"""

import hashlib
import json
import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fl_server import authority, published, weights
from fl_server.roster import Home, Offered, Party
from fl_server.run import ENDED
from models.study import Study
from privacy import consortium_pb2 as pb
from privacy import consortium_pb2_grpc, heads, keys
from privacy.calls import (
    REMEDY,
    REQUEST_BYTES_MAX,
    RESULT_FILES,
    SERVICE,
    PartyRole,
    Signed,
    details_of,
    numbers_of,
    versions_in,
)
from privacy.errors import (
    CertificateRevoked,
    ClockSkewed,
    DocumentError,
    IsocenterError,
    JournalDamaged,
    KeyFileUnsafe,
    MessageMalformed,
    RunError,
    RunUnknown,
    SignatureInvalid,
    TooFewApprovals,
    TrustError,
)
from privacy.greeting import Readiness, own
from privacy.heads import SignedHead
from privacy.statements import Statement

SKEW_SECONDS = 120
WATCHERS_MAX = 16  # streams that may hold a thread at once
CALLS_MAX = 256  # accepted at once; more are refused at once, rather than queued
THREADS = (
    CALLS_MAX  # so that neither watchers nor those who begin a call and send nothing use up the threads of the others
)
STREAMS_MAX = 64  # of one connection
REQUEST_S = 5.0  # in which a call has to have sent its request
HANDSHAKE_MS = 10_000
METADATA_BYTES_MAX = 16 * 1024
CHUNK_BYTES = 256 * 1024
FETCH_BYTES = 64 * 1024**2  # of a model in one call; the caller goes on with another
FETCHES_MAX = 32  # calls for models that may hold a thread at once
FETCHES_EACH = 2  # of them of one party
FETCH_S = 600.0  # a caller that reads slower than that is cut off, and goes on where it was
POLL_SECONDS = 0.2  # how often a watched file is looked at
GRACE_SECONDS = 2.0  # a run notes its end in run.json before it writes its last event
RECORD_BYTES_MAX = 4 * 1024 * 1024
GATEWAY = "isocenter.v1.Gateway"  # what the health service calls the port for training
HEALTH_CHECK = "/grpc.health.v1.Health/Check"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
RUN_ID = re.compile(r"[a-z0-9-]{1,64}")

CALLERS: dict[str, tuple[PartyRole, ...]] = {
    "Greet": ("site", "researcher"),
    "Renew": ("site", "researcher"),
    "Witness": ("site",),
    "Offers": ("site",),
    "Decide": ("site",),
    "Roster": ("researcher",),
    "Submit": ("researcher",),
    "Studies": ("researcher",),
    "Launch": ("researcher",),
    "Watch": ("researcher",),
    "Results": ("researcher",),
    "Head": ("researcher",),
    "Models": ("site", "researcher"),
    "Fetch": ("site", "researcher"),
}
_generated: Any = consortium_pb2_grpc  # the generated module carries no annotations
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hooks:
    """What the service asks of the rest of the coordinator."""

    enrolled: Callable[[str, PartyRole, bytes], int | None]
    """(name, role, PEM of the public key) -> Flower node id of a site. Called again if it raised or never returned."""
    launch: Callable[[str, str], str]
    """(digest, researcher) -> run id. The approvals were counted already."""


def health_status() -> Any:
    """For grpc.health.v1: "" for the whole, SERVICE, and GATEWAY, which serves once somebody says so."""
    status = health.HealthServicer()
    status.set(GATEWAY, NOT_SERVING)
    return status


def serve(home: Home, hooks: Hooks, refused: Callable[[str], object] = lambda code: None, status: Any = None) -> Any:
    """A started `grpc.Server` on the service port, with a health service. Raises DocumentError if the port is taken.

    `refused` gets the public code of each call that ends with an error. `status`: what the health service answers from
    (`health_status`), for whoever knows more than this service does.
    """
    server = grpc.server(
        ThreadPoolExecutor(THREADS, thread_name_prefix="consortium"),
        interceptors=[Gate(home, refused)],
        maximum_concurrent_rpcs=CALLS_MAX,
        options=[
            ("grpc.max_receive_message_length", REQUEST_BYTES_MAX),
            ("grpc.max_metadata_size", METADATA_BYTES_MAX),
            ("grpc.max_concurrent_streams", STREAMS_MAX),
            ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
            ("grpc.so_reuseport", 0),  # a second coordinator on the port is an error, not a coin toss per connection
            ("grpc.http2.min_ping_interval_without_data_ms", 30_000),
            ("grpc.max_connection_idle_ms", 3_600_000),
        ],
    )
    _generated.add_ConsortiumServicer_to_server(Consortium(home, hooks), server)
    status = status or health_status()
    status.set(SERVICE, SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(status, server)
    keys.load_key(home.tls_key)  # refuses a key that others can read, before it is used
    pair = (home.tls_key.read_bytes(), home.tls_pem.read_bytes())
    address = f"{home.settings.listen}:{home.settings.service_port}"
    try:
        bound = server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
    except RuntimeError:
        bound = 0
    if bound == 0:
        raise DocumentError(
            f"{address} cannot be listened on; another program may use the port",
            remedy="Stop the other program, or change listen or service_port in server.yaml.",
        )
    server.start()
    return server


# The gate ------------------------------------------------------------------------------------------------------------


class Gate:
    """A gRPC server interceptor: authenticates each call over its raw bytes, and turns errors into status."""

    def __init__(self, home: Home, refused: Callable[[str], object]) -> None:
        self._home, self._refused = home, refused
        self._ca = keys.load_certificate(home.ca_pem)

    def intercept_service(self, continuation: Callable[[Any], Any], call: Any) -> Any:
        handler = continuation(call)
        if handler is not None and call.method == HEALTH_CHECK:
            return _open(handler)
        if handler is None or not call.method.startswith(f"/{SERVICE}/"):
            return None  # nothing else is served: a Watch of the health service would hold a place for as long as anybody likes

        def admitted(raw: bytes, context: Any) -> Any:
            self.admit(call.method, raw, context.invocation_metadata())
            try:
                return handler.request_deserializer(raw)
            except Exception:  # protobuf's own DecodeError
                raise MessageMalformed("this request does not follow the protocol") from None

        def one(requests: Iterator[bytes], context: Any) -> Any:
            raw = _only(requests, context)
            try:
                return handler.unary_unary(admitted(raw, context), context)
            except Exception as error:
                self._abort(error, context)

        def many(requests: Iterator[bytes], context: Any) -> Iterator[Any]:
            raw = _only(requests, context)
            try:
                for reply in handler.unary_stream(admitted(raw, context), context):
                    self._require_not_revoked(Signed.read(context.invocation_metadata()).name)
                    yield reply
            except Exception as error:
                self._abort(error, context)

        # Without a deserializer the methods above get the very bytes that were signed. As streams of requests, because gRPC
        # waits for a single request before it asks us anything, for as long as a caller likes, and a thread waits with it.
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(many, response_serializer=handler.response_serializer)
        return grpc.stream_unary_rpc_method_handler(one, response_serializer=handler.response_serializer)

    def admit(self, method: str, raw: bytes, metadata: Any) -> None:
        """Raise unless this call may run: see the top of this module. Enrol passes; the roster checks its token."""
        name = method.rpartition("/")[2]
        if name == "Enrol":
            return
        signed = Signed.read(metadata)
        party = self._home.roster.party(signed.name)
        keys.verify(party.public_key, keys.CALL, signed.body(method, raw), signed.signature)
        self._require_not_revoked(signed.name)
        keys.check_issued(self._ca, party.certificate, party.name, party.role)
        skew = time.time() - signed.time_s
        if abs(skew) > SKEW_SECONDS:
            side = "behind" if skew > 0 else "ahead of"
            raise ClockSkewed(f"the clock of this machine is {abs(skew):.0f} s {side} the coordinator's")
        # Remembered for longer than the call could be accepted, also over a restart of the coordinator.
        self._home.roster.admit_call(signed.name, signed.nonce, time.time() + 3 * SKEW_SECONDS)
        if party.role not in CALLERS.get(name, ()):
            raise TrustError(f"this call is not for a {party.role}")

    def _require_not_revoked(self, name: str) -> None:
        """Asked for each piece of a long answer as well: a revoked party is cut off in the middle of it."""
        if revoked := self._home.roster.party(name).revoked:
            raise CertificateRevoked(f"{name} was revoked on {revoked}")

    def _abort(self, error: Exception, context: Any) -> None:
        """End the call. What names files of this machine, or was not foreseen, stays in the log here."""
        local = isinstance(error, KeyFileUnsafe | JournalDamaged) or str(self._home.root) in str(error)
        if not isinstance(error, IsocenterError) or error.code == "internal" or local:
            _log.error("a call failed", exc_info=error)
            error = IsocenterError(
                "the coordinator could not do this; its log says why", remedy="Tell the coordinator."
            )
        self._refused(error.code)
        if error.remedy != type(error).remedy:
            context.set_trailing_metadata(((REMEDY, error.remedy.encode()),))
        context.abort(_status(error), details_of(error))


def _open(handler: Any) -> Any:
    """The handler of an unsigned unary call, which has to send its request in time as well."""

    def answer(requests: Iterator[bytes], context: Any) -> Any:
        return handler.unary_unary(handler.request_deserializer(_only(requests, context)), context)

    return grpc.stream_unary_rpc_method_handler(answer, response_serializer=handler.response_serializer)


def _only(requests: Iterator[bytes], context: Any) -> bytes:
    """The one request of a call; a call that does not send it within REQUEST_S is cancelled, which raises grpc.RpcError."""
    late = threading.Timer(REQUEST_S, context.cancel)
    late.daemon = True
    late.start()
    try:
        return next(requests, b"")
    finally:
        late.cancel()


def _status(error: IsocenterError) -> Any:
    if isinstance(error, TrustError):
        return grpc.StatusCode.PERMISSION_DENIED
    if isinstance(error, MessageMalformed | DocumentError):
        return grpc.StatusCode.INVALID_ARGUMENT
    if isinstance(error, RunUnknown):
        return grpc.StatusCode.NOT_FOUND
    return grpc.StatusCode.INTERNAL if error.code == "internal" else grpc.StatusCode.FAILED_PRECONDITION


# The service ---------------------------------------------------------------------------------------------------------


class Consortium(consortium_pb2_grpc.ConsortiumServicer):
    """The methods of consortium.proto. The gate has verified the caller; each method checks what the caller may see."""

    def __init__(self, home: Home, hooks: Hooks) -> None:
        self._home, self._hooks = home, hooks
        self._watchers = threading.BoundedSemaphore(WATCHERS_MAX)
        self._enrolling = threading.Lock()
        self._fetches, self._fetching = Counter[str](), threading.Lock()

    def _caller(self, context: Any) -> Party:
        return self._home.roster.party(Signed.read(context.invocation_metadata()).name)

    def Enrol(self, request: pb.EnrolRequest, context: Any) -> pb.EnrolReply:  # noqa: N802  name in consortium.proto
        with self._enrolling:  # so that one node is registered once, also when a site asks twice at a time
            party = authority.enrol(self._home, request.token, request.name, request.role, request.csr)
            if party.role == "site" and party.node_id is None:
                node_id = self._hooks.enrolled(party.name, party.role, keys.public_pem(party.public_key))
                if node_id is not None:
                    self._home.roster.set_node(party.name, node_id)
        self._home.roster.tell(party.name, versions_in(request))
        return pb.EnrolReply(
            certificate=keys.certificate_pem(party.certificate),
            coordinator_key=keys.public_pem(self._home.coordinator_key),
            gateway_port=self._home.settings.gateway_port,
            versions=numbers_of(own()),
        )

    def Renew(self, request: pb.RenewRequest, context: Any) -> pb.RenewReply:  # noqa: N802  name in consortium.proto
        party = self._caller(context)
        self._home.roster.tell(party.name, versions_in(request))
        with self._enrolling:
            certificate = authority.renew(self._home, party, request.csr)
        return pb.RenewReply(certificate=keys.certificate_pem(certificate), versions=numbers_of(own()))

    def Greet(self, request: pb.GreetRequest, context: Any) -> pb.GreetReply:  # noqa: N802  name in consortium.proto
        party, told = self._caller(context), request.readiness
        looked = party.role == "site" and request.HasField("readiness")
        readiness = Readiness.read(told.ready, told.reasons) if looked else None
        self._home.roster.tell(party.name, versions_in(request), readiness)
        return pb.GreetReply(versions=numbers_of(own()), time_s=int(time.time()))

    def Witness(self, request: pb.WitnessRequest, context: Any) -> pb.WitnessReply:  # noqa: N802  name in consortium.proto
        site, head = self._caller(context), SignedHead.read(request.head)
        if head.party != site.name:
            raise SignatureInvalid("a site shows the head of its own journal only")
        heads.witness(self._home.journal, head, [site.public_key])
        own = heads.own_head(self._home.journal, heads.COORDINATOR, self._home.coordinator_key)
        return pb.WitnessReply(head=own.to_bytes())

    def Offers(self, request: pb.OffersRequest, context: Any) -> pb.OffersReply:  # noqa: N802  name in consortium.proto
        roster, site = self._home.roster, self._caller(context)
        return pb.OffersReply(
            offers=[
                pb.Offer(
                    study=offered.canonical,
                    researcher=offered.researcher,
                    researcher_certificate=keys.certificate_pem(roster.party(offered.researcher).certificate),
                    researcher_signature=offered.researcher_signature,
                    coordinator_signature=offered.coordinator_signature,
                    submitted=offered.submitted,
                    decision=decision or "",
                )
                for offered, decision in roster.offered_to(site.name)
            ]
        )

    def Decide(self, request: pb.DecideRequest, context: Any) -> pb.DecideReply:  # noqa: N802  name in consortium.proto
        site, statement = self._caller(context), Statement.read(request.statement)
        if statement.site != site.name:
            raise SignatureInvalid("a site decides for itself only")
        keys.verify(site.public_key, keys.STUDY_DECISION, request.statement, request.signature)
        if self._home.roster.decide(statement, request.signature):
            self._home.journal.append("decision", digest=statement.digest, site=site.name, decision=statement.decision)
        return pb.DecideReply()

    def Roster(self, request: pb.RosterRequest, context: Any) -> pb.RosterReply:  # noqa: N802  name in consortium.proto
        return pb.RosterReply(keys=self._home.roster.site_keys(request.sites), aggregator=self._home.aggregator)

    def Submit(self, request: pb.SubmitRequest, context: Any) -> pb.SubmitReply:  # noqa: N802  name in consortium.proto
        researcher = self._caller(context)
        keys.verify(researcher.public_key, keys.STUDY_SUBMIT, request.study, request.signature)
        study = Study.from_canonical(request.study)
        study.check()
        self._home.check_keys(study)
        weights.file_of(self._home.root, study)
        countersigned = keys.sign(self._home.coordinator_key, keys.STUDY_OFFER, request.study)
        if self._home.roster.add_study(study, researcher.name, request.signature, countersigned):
            self._home.journal.append(
                "study-offered", digest=study.digest, researcher=researcher.name, sites=study.all_sites
            )
        return pb.SubmitReply(digest=study.digest)

    def Studies(self, request: pb.StudiesRequest, context: Any) -> pb.StudiesReply:  # noqa: N802  name in consortium.proto
        runs = run_records(self._home)
        studies = self._home.roster.studies_of(self._caller(context).name)
        return pb.StudiesReply(studies=[self._state(offered, runs) for offered in studies])

    def Launch(self, request: pb.LaunchRequest, context: Any) -> pb.LaunchReply:  # noqa: N802  name in consortium.proto
        researcher = self._caller(context)
        offered = self._own(request.digest, researcher)
        self._home.check_keys(offered.study)  # keys of today: what is encrypted to a lost one could not be read
        weights.file_of(self._home.root, offered.study)
        _require_approvals(offered.study, self._state(offered, []))
        run_id = self._hooks.launch(offered.digest, researcher.name)
        self._home.journal.append("launched", digest=offered.digest, researcher=researcher.name, run=run_id)
        return pb.LaunchReply(run_id=run_id)

    def Watch(self, request: pb.WatchRequest, context: Any) -> Iterator[pb.Event]:  # noqa: N802  name in consortium.proto
        folder = self._own_run(request.run_id, context)
        if not self._watchers.acquire(blocking=False):
            raise RunError("too many runs are being watched", remedy="Try again in a minute.")
        try:
            for number, text in follow(folder, context.is_active):
                if number >= request.first:
                    yield pb.Event(number=number, text=text)
        finally:
            self._watchers.release()

    def Results(self, request: pb.ResultsRequest, context: Any) -> Iterator[pb.Chunk]:  # noqa: N802  name in consortium.proto
        folder = self._own_run(request.run_id, context)
        present = [folder / name for name in RESULT_FILES if (folder / name).is_file()]
        if not present:
            raise RunError(f"run {request.run_id} has no results yet", remedy="Watch it until it has finished.")
        self._home.journal.append("results-sent", run=request.run_id, researcher=self._caller(context).name)
        for path in present:
            yield from _chunks(path)

    def Head(self, request: pb.HeadRequest, context: Any) -> pb.HeadReply:  # noqa: N802  name in consortium.proto
        own = heads.own_head(self._home.journal, heads.COORDINATOR, self._home.coordinator_key)
        return pb.HeadReply(head=own.to_bytes())

    def Models(self, request: pb.ModelsRequest, context: Any) -> pb.ModelsReply:  # noqa: N802  name in consortium.proto
        offered = [entry for entry in published.entries(self._home) if entry.withdrawn is None]
        notices = [pb.Published(notice=entry.notice.body(), signature=entry.signature) for entry in offered]
        return pb.ModelsReply(models=notices)

    def Fetch(self, request: pb.FetchRequest, context: Any) -> Iterator[pb.Piece]:  # noqa: N802  name in consortium.proto
        party = self._caller(context)
        path = published.path_of(self._home, request.sha256)
        with self._fetch_of(party.name, context):
            if request.first == 0:
                self._home.journal.append("model-sent", model=request.sha256, party=party.name)
            with path.open("rb") as file:
                file.seek(request.first)
                for _ in range(FETCH_BYTES // CHUNK_BYTES):
                    if not (data := file.read(CHUNK_BYTES)):
                        return
                    yield pb.Piece(data=data)

    @contextmanager
    def _fetch_of(self, party: str, context: Any) -> Iterator[None]:
        """A place among those who fetch, for FETCH_S at most. Raises RunError if there is none."""
        with self._fetching:
            if self._fetches[party] >= FETCHES_EACH or self._fetches.total() >= FETCHES_MAX:
                raise RunError("too many models are being fetched", remedy="Try again in a minute.")
            self._fetches[party] += 1
        late = threading.Timer(FETCH_S, context.cancel)
        late.daemon = True
        late.start()
        try:
            yield
        finally:
            late.cancel()
            with self._fetching:
                self._fetches[party] -= 1

    def _own(self, digest: str, researcher: Party) -> Offered:
        offered = self._home.roster.study(digest)
        if offered.researcher != researcher.name:  # the same answer as for a digest that does not exist
            raise RunUnknown("there is no study with this digest here")
        return offered

    def _own_run(self, run_id: str, context: Any) -> Path:
        record = run_record(self._home, run_id)
        try:
            self._own(record.digest, self._caller(context))
        except RunUnknown:
            raise RunUnknown("there is no such run here") from None
        return self._home.runs / record.run_id

    def _state(self, offered: Offered, runs: "list[RunRecord]") -> pb.StudyState:
        study, decisions = offered.study, self._home.roster.decisions(offered.digest)
        approvals = self._home.roster.approvals(offered.digest)
        return pb.StudyState(
            digest=offered.digest,
            name=study.name,
            submitted=offered.submitted,
            quorum=study.participation.quorum,
            approved=[site for site in study.all_sites if site in approvals],
            declined=[site for site in study.all_sites if decisions.get(site) == "declined"],
            unanswered=[site for site in study.all_sites if site not in decisions],
            runs=[
                pb.RunState(run_id=run.run_id, state=run.state, label=run.label)
                for run in runs
                if run.digest == offered.digest
            ],
            draft=study.model_copy(update={"roster": {}, "aggregator": ""}).digest,
        )


def _require_approvals(study: Study, state: pb.StudyState) -> None:
    """Raise TooFewApprovals, with who is missing, unless as many training sites approved as a round needs."""
    approved = [site for site in study.participation.sites if site in state.approved]
    if len(approved) >= study.participation.quorum:
        return
    groups = [("approved", approved), ("declined", state.declined), ("not answered", state.unanswered)]
    told = "; ".join(f"{word}: {', '.join(names)}" for word, names in groups if names)
    raise TooFewApprovals(
        f"{len(approved)} training sites approved {study.name}; its quorum is {study.participation.quorum} ({told})"
    )


# Run folders ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunRecord:
    """What run.json of one run says. A damaged file is a record with state "unreadable", never a failed list."""

    run_id: str
    digest: str
    study: str
    state: str
    label: str


def run_records(home: Home) -> list[RunRecord]:
    """Every run of the consortium, newest folder first."""
    folders = [path for path in home.runs.iterdir() if path.is_dir() and RUN_ID.fullmatch(path.name)]
    folders.sort(key=lambda path: (-path.stat().st_mtime, path.name))
    return [_record(path) for path in folders if (path / "run.json").is_file()]


def run_record(home: Home, run_id: str) -> RunRecord:
    """The record of one run; raises RunUnknown, also for an id that could be a path."""
    if not RUN_ID.fullmatch(run_id) or not (home.runs / run_id / "run.json").is_file():
        raise RunUnknown("there is no such run here")
    return _record(home.runs / run_id)


def _record(folder: Path) -> RunRecord:
    try:
        with (folder / "run.json").open("rb") as file:
            found = json.loads(file.read(RECORD_BYTES_MAX))
        digest, study, state, label = (str(found.get(key, "")) for key in ("digest", "study", "state", "label"))
    except (OSError, ValueError, AttributeError, RecursionError):
        return RunRecord(folder.name, "", "", "unreadable", "run.json is damaged")
    return RunRecord(folder.name, digest, study, state, label)


def follow(folder: Path, active: Callable[[], bool]) -> Iterator[tuple[int, str]]:
    """(number, line) of events.jsonl as whole lines appear, until an ending event, or the run ended without one."""
    path, number, rest, idle_after_end_s = folder / "events.jsonl", 0, b"", 0.0
    while active() and not path.exists() and _record(folder).state not in ENDED:
        time.sleep(POLL_SECONDS)
    if not path.exists():
        return
    with path.open("rb") as file:
        while active():
            block = file.read(CHUNK_BYTES)
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                yield number, line.decode("utf-8", "replace")
                number += 1
                if _ends(line):
                    return
            if not block:
                idle_after_end_s += POLL_SECONDS if _record(folder).state in ENDED else 0.0
                if idle_after_end_s > GRACE_SECONDS:
                    return
                time.sleep(POLL_SECONDS)


def _ends(line: bytes) -> bool:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(event, dict) and event.get("event") in ("finished", "failed", "stopped")


def _chunks(path: Path) -> Iterator[pb.Chunk]:
    """The file in pieces; the last one (empty) carries the SHA-256 of what was sent."""
    hashed = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(CHUNK_BYTES):
            hashed.update(data)
            yield pb.Chunk(name=path.name, data=data)
    yield pb.Chunk(name=path.name, sha256=hashed.hexdigest())
