"""The consortium as it stands at this moment, for the dashboard, metrics and alerts: who is here, what runs, what needs somebody.

Only reads, but for what opening a home does. Whether a node is connected is known to Flower's SuperLink alone, which says it in a
file every few seconds; where that cannot be read, nobody is called online or silent. Of what a site found out about its own data
(`fl-client check`) it tells single words, such as labels; figures and sentences stay there.
"""

import datetime as dt
import functools
import json
import logging
import math
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fl_server import weights
from fl_server.progress import Onlooker, Progress, printable
from fl_server.roster import Home, Offered, Party
from fl_server.run import list_runs
from fl_server.standings import Told
from models.study import Study
from privacy import accounting, heads, keys
from privacy.calls import SERVICE
from privacy.errors import IsocenterError, JournalDamaged, RunUnknown, SignatureInvalid
from privacy.greeting import Versions, own

NODES = "nodes.json"  # written by the coordinator: node id -> until when it counts as online
FRESH_S = 1.0  # how long a look counts
SILENT_S = 15 * 60.0  # without a heartbeat, which come every minute, before somebody is told
ENDING_SHARE = 6  # a certificate in its last sixth: renewals begin in the last third, so they fail
SERVER_DAYS = 60  # before the end of the server's own certificate, which nothing renews
DISK_SHARE_MIN, DISK_BYTES_MIN = 0.05, 2 * 1024**3
PROBE_S, PROBE_FRESH_S = 2.0, 5.0
VERIFY_AGAIN_S = 60.0

Tone = Literal["good", "look", "bad", "off"]
log = logging.getLogger("isocenter.overview")


@dataclass(frozen=True)
class Attention:
    """Something that somebody should do; `page` says where more of it stands."""

    tone: Tone
    sentence: str
    remedy: str
    page: str = ""


@dataclass(frozen=True)
class SiteRow:
    """One enrolled party. `seen_s`: seconds since 1970 of the last sign of life; `online` None: not known."""

    name: str
    role: str
    tone: Tone
    state: str
    joined: str
    online: bool | None
    seen_s: float | None
    until: dt.datetime
    days_left: float
    revoked: str | None
    told: Told = field(default_factory=Told)

    @property
    def active(self) -> bool:
        return self.revoked is None and self.days_left > 0


@dataclass(frozen=True)
class StudyRow:
    """One study that was submitted, with who decided what about it."""

    digest: str
    study: Study
    researcher: str
    submitted: str
    approved: list[str]
    declined: list[str]
    unanswered: list[str]
    runs: list[str]

    @property
    def ready(self) -> bool:
        part = self.study.participation
        return len([site for site in part.sites if site in self.approved]) >= part.quorum


@dataclass(frozen=True)
class ModelRow:
    """The model that a finished run left."""

    run_id: str
    study: str
    label: str
    finished: str
    bytes: int
    auroc: float | None
    private: bool


@dataclass(frozen=True)
class Disk:
    free: int
    total: int

    @property
    def low(self) -> bool:
        return self.free < DISK_BYTES_MIN or self.free < DISK_SHARE_MIN * self.total


@dataclass(frozen=True)
class Verification:
    """What is known of the journal: whole, damaged, or being read. `signed`, `witnessed`: genuine heads in it."""

    state: Literal["reading", "whole", "damaged"]
    sentence: str
    lines: int = 0
    at_s: float = 0.0


@dataclass(frozen=True)
class Snapshot:
    """One look at everything."""

    at_s: float
    name: str
    fingerprint: str
    serving: bool
    sites: list[SiteRow]
    researchers: list[SiteRow]
    invitations: list[tuple[str, str, str]]
    studies: list[StudyRow]
    runs: list[Progress]
    models: list[ModelRow]
    weights: list[tuple[str, int]]
    disk: Disk
    attention: list[Attention]
    versions: Versions = field(default_factory=own)

    @property
    def queue(self) -> list[str]:
        return [str(run.facts["run_id"]) for run in self.runs if run.state in ("queued", "running")]


@dataclass
class Overview:
    """Looks at one home, at most once in FRESH_S. Not for several threads at once: `dashboard` gives it turns."""

    home: Home
    _onlookers: dict[str, Onlooker] = field(default_factory=dict)
    _last: Snapshot | None = None
    _served: tuple[float, bool] = (-math.inf, False)

    def __post_init__(self) -> None:
        self.book = Book(self.home)

    def look(self) -> Snapshot:
        """The consortium now, or as it was less than FRESH_S ago. Raises IsocenterError if the roster cannot be read."""
        if self._last is None or time.time() - self._last.at_s > FRESH_S:
            self._last = self._look(time.time())
        return self._last

    def run(self, run_id: str) -> Progress:
        """One run; raises RunUnknown."""
        for run in self.look().runs:
            if run.facts.get("run_id") == run_id:
                return run
        raise RunUnknown("there is no such run here")

    def serving(self) -> bool:
        """Whether this machine's coordinator answers at both of its doors."""
        at, answer = self._served
        if time.monotonic() - at > PROBE_FRESH_S:
            answer = serving(self.home)
            self._served = (time.monotonic(), answer)
        return answer

    def _look(self, now: float) -> Snapshot:
        home, until = self.home, online_until(self.home.root)
        runs = list(self._runs())
        told = home.roster.told()
        sites = [site_row(party, until, now, told.get(party.name)) for party in home.roster.sites()]
        researchers = [site_row(party, None, now, told.get(party.name)) for party in home.roster.researchers()]
        by_digest: dict[str, list[str]] = {}
        for run in runs:
            by_digest.setdefault(str(run.facts.get("digest")), []).append(str(run.facts["run_id"]))
        offered = [each for party in researchers for each in home.roster.studies_of(party.name)]
        studies = [_study_row(home, each, by_digest.get(each.digest, [])) for each in offered]
        usage = shutil.disk_usage(home.root)
        found = Snapshot(
            at_s=now,
            name=home.settings.name,
            fingerprint=keys.grouped(home.ca_fingerprint),
            serving=self.serving(),
            sites=sites,
            researchers=researchers,
            invitations=[(each.name, each.role, each.expires) for each in home.roster.invitations()],
            studies=sorted(studies, key=lambda row: row.submitted, reverse=True),
            runs=runs,
            models=[row for run in reversed(runs) if (row := _model_row(home, run)) is not None],
            weights=[(held.sha256, held.bytes) for held in weights.held(home.root)],
            disk=Disk(usage.free, usage.total),
            attention=[],
        )
        found.attention.extend(attention(found, self.book.known, home))
        return found

    def _runs(self) -> Iterator[Progress]:
        """Every run that can be read, oldest first."""
        for facts in list_runs(self.home.runs):
            run_id = str(facts["run_id"])
            folder = self.home.runs / run_id
            if not folder.is_dir():
                continue
            onlooker = self._onlookers.setdefault(run_id, Onlooker(folder))
            try:
                yield onlooker.look()
            except (IsocenterError, OSError) as error:
                log.error("a run cannot be looked at: %s", error)


def online_until(root: Path) -> dict[int, float] | None:
    """Node id -> until when (seconds since 1970) Flower counts the node as online; None if that cannot be read."""
    try:
        return {int(node): float(until) for node, until in json.loads((root / NODES).read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def site_row(party: Party, until: dict[int, float] | None, now: float, told: Told | None = None) -> SiteRow:
    """What is known of one party, and the word for it. `until` None: nothing is known of connections."""
    ends = party.certificate.not_valid_after_utc
    left = (ends.timestamp() - now) / 86_400
    heard = None if until is None or party.node_id is None else until.get(party.node_id)
    called = dt.datetime.fromisoformat(party.last_seen).timestamp() if party.last_seen else 0.0
    seen = max(called, min(now, heard or 0.0)) or None
    online = None if until is None or party.role != "site" else bool(heard and heard > now)
    tone, state = _standing(party, left, online, seen, now)
    return SiteRow(
        party.name, party.role, tone, state, party.joined, online, seen, ends, left, party.revoked, told or Told()
    )


def _standing(party: Party, left: float, online: bool | None, seen: float | None, now: float) -> tuple[Tone, str]:
    if party.revoked:
        return "off", "revoked"
    if left <= 0:
        return "bad", "certificate ended"
    if online:
        return "good", "online"
    if party.role == "researcher" or online is None:
        return "good", "enrolled"
    if not seen:
        return "look", "never connected"
    return ("bad" if now - seen > SILENT_S else "look"), "silent"


def _study_row(home: Home, offered: Offered, runs: list[str]) -> StudyRow:
    study = _study(offered.canonical)
    decisions, approvals = home.roster.decisions(offered.digest), home.roster.approvals(offered.digest)
    return StudyRow(
        offered.digest, study, offered.researcher, offered.submitted,
        approved=[site for site in study.all_sites if site in approvals],
        declined=[site for site in study.all_sites if decisions.get(site) == "declined"],
        unanswered=[site for site in study.all_sites if site not in decisions],
        runs=runs,
    )  # fmt: skip


@functools.lru_cache(maxsize=256)
def _study(canonical: bytes) -> Study:
    return Study.from_canonical(canonical)


@functools.lru_cache(maxsize=64)
def study_of(folder: Path, digest: str) -> Study | None:
    """The study of a run, whose digest is `digest`; None if it cannot be read."""
    try:
        study = Study.from_canonical((folder / "study.json").read_bytes())
    except (OSError, IsocenterError):
        return None
    return study if study.digest == digest else None


@functools.lru_cache(maxsize=4096)
def _epsilon(noise: float, rate: float, steps: int, delta: float) -> float:
    return accounting.epsilon([accounting.PrivacyEvent(noise, rate, steps)], delta, fine=False)


def charged(study: Study, orders: int) -> float | None:
    """The ε against everybody else combined that so many orders to train may have cost a patient of a site, at the study's δ.

    An upper bound: of what a site did with an order nobody else knows more. None for a study without differential privacy.
    """
    if study.privacy == "none":
        return None
    if orders == 0:
        return 0.0
    event = study.event(orders)
    return _epsilon(event.noise_multiplier, event.sampling_rate, event.steps, study.privacy.delta)


@functools.lru_cache(maxsize=256)
def promises(canonical: bytes) -> list[str]:
    """What a study promises its patients, in sentences."""
    try:
        return [statement.sentence() for statement in _study(canonical).statements()]
    except IsocenterError as error:
        return [printable(error)]


def _model_row(home: Home, run: Progress) -> ModelRow | None:
    folder = home.runs / str(run.facts["run_id"])
    try:
        size = (folder / "model.safetensors").stat().st_size
    except OSError:
        return None
    study = study_of(folder, str(run.facts.get("digest")))
    private = study is not None and study.privacy != "none"
    name, label, finished = (printable(run.facts.get(key) or "", 200) for key in ("study", "label", "finished"))
    return ModelRow(folder.name, name, label, finished, size, run.test_auroc, private)


def serving(home: Home) -> bool:
    """Whether gateway and consortium service answer on this machine; the service by its health check over TLS."""
    settings, host = home.settings, home.settings.listen
    if host == "0.0.0.0":  # noqa: S104  compared, not bound
        host = "127.0.0.1" if any(c.isalpha() for c in settings.host) else settings.host
    try:
        socket.create_connection((host, settings.gateway_port), timeout=PROBE_S).close()
    except OSError:
        return False
    options: list[tuple[str, Any]] = [("grpc.enable_http_proxy", 0)]
    options += [("grpc.ssl_target_name_override", settings.host)] if host != settings.host else []
    address, trusted = f"{host}:{settings.service_port}", grpc.ssl_channel_credentials(home.ca_pem)
    with grpc.secure_channel(address, trusted, options) as channel:
        try:
            asked = health_pb2.HealthCheckRequest(service=SERVICE)
            answer: Any = health_pb2_grpc.HealthStub(channel).Check(asked, timeout=PROBE_S)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


# What needs somebody -------------------------------------------------------------------------------------------------


def attention(now: Snapshot, journal: Verification, home: Home) -> Iterator[Attention]:
    """What somebody should do, the urgent first."""
    found = [*_of_machine(now, journal, home), *_of_parties(now, home), *_of_runs(now), *_of_studies(now)]
    order: dict[Tone, int] = {"bad": 0, "look": 1, "good": 2, "off": 3}
    yield from sorted(found, key=lambda each: order[each.tone])


def _of_machine(now: Snapshot, journal: Verification, home: Home) -> Iterator[Attention]:
    if journal.state == "damaged":
        yield Attention(
            "bad",
            f"The journal is damaged: {journal.sentence}",
            "Keep a copy; compare with the sites' journals.",
            "/journal",
        )
    if not now.serving:
        tone: Tone = "bad" if now.queue else "look"
        yield Attention(
            tone, "The coordinator does not answer on this machine.", "Start it: fl-server start --home HOME"
        )
    if now.disk.low:
        free = now.disk.free / 1024**3
        yield Attention(
            "bad", f"{free:.1f} GiB are left on the coordinator's disk.", "Make room: checkpoints and journals need it."
        )
    first, end, _ = home.tls_pem.read_bytes().partition(b"-----END CERTIFICATE-----\n")  # its authority's follows
    server = keys.load_certificate(first + end)
    left = (server.not_valid_after_utc.timestamp() - now.at_s) / 86_400
    if left < SERVER_DAYS:
        yield Attention(
            "bad",
            f"The server's certificate ends in {max(0, math.floor(left))} days.",
            "Plan a new consortium with the sites.",
        )


def _of_parties(now: Snapshot, home: Home) -> Iterator[Attention]:
    for party in [*now.sites, *now.researchers]:
        if party.revoked:
            continue
        if party.days_left <= 0:
            yield Attention(
                "bad", f"The certificate of {party.name} has ended.", f"Invite it again: fl-server invite {party.name}"
            )
        elif party.days_left < home.settings.certificate_days / ENDING_SHARE:
            days = max(0, math.floor(party.days_left))
            yield Attention(
                "look",
                f"The certificate of {party.name} ends in {days} days and was not renewed.",
                "Ask whether it is running.",
            )
        if party.role == "site" and party.state == "silent" and party.tone == "bad" and party.seen_s:
            since = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(party.seen_s))
            yield Attention(
                "look", f"{party.name} is silent since {since}.", "Ask the site to start its node: fl-client start"
            )
        yield from _of_what_was_told(party)
    waiting = [name for name, *_ in home.roster.requests()]
    if waiting:
        yield Attention(
            "look",
            f"{', '.join(waiting)} wait for a signature of the offline authority.",
            "fl-server requests --out LIST",
        )


def _of_what_was_told(party: SiteRow) -> Iterator[Attention]:
    if found := party.told.skew(party.name):
        yield Attention("bad" if found.must else "look", found.sentence, found.remedy)
    readiness = party.told.readiness
    if party.role == "site" and readiness is not None and not readiness.ready:
        words = ", ".join(readiness.reasons)
        paused = readiness.reasons == ("paused",)
        remedy = "Its people resume it: fl-client resume" if paused else "Its people see more: fl-client check"
        yield Attention("look", f"{party.name} is not ready: {words}.", remedy)


def _of_runs(now: Snapshot) -> Iterator[Attention]:
    latest = {str(run.facts.get("digest")): run for run in now.runs}
    for run in latest.values():
        page = f"/runs/{run.facts['run_id']}"
        if run.state == "failed":
            yield Attention(
                "bad", f"{run.facts['run_id']}: {run.label}.", "Mend the cause, then: fl-server resume RUN", page
            )
        if run.state == "running" and run.waiting:
            yield Attention(
                "look",
                f"{run.facts['run_id']} waits for {', '.join(run.waiting)}.",
                "Ask these sites to start their nodes.",
                page,
            )


def _of_studies(now: Snapshot) -> Iterator[Attention]:
    for row in now.studies:
        if not row.ready and row.unanswered and not row.runs:
            names = ", ".join(row.unanswered)
            yield Attention(
                "look",
                f"Study “{printable(row.study.title, 80)}” waits for {names}.",
                "At each site: fl-client studies",
                "/studies",
            )


# The journal ---------------------------------------------------------------------------------------------------------


class Book:
    """The coordinator's journal, verified in a thread of its own whenever it has grown; looking on waits for nothing."""

    def __init__(self, home: Home) -> None:
        self._home, self._thread = home, threading.Thread()
        self._size = -1
        self.known = Verification("reading", "The journal is being read.")

    def look(self) -> Verification:
        """What is known now; begins to verify again if there is something new and the last time is a while ago."""
        size, now = self._home.journal.path.stat().st_size, time.time()
        if size != self._size and now - self.known.at_s > VERIFY_AGAIN_S and not self._thread.is_alive():
            self._size = size
            self._thread = threading.Thread(target=self._verify, name="verify-journal", daemon=True)
            self._thread.start()
        return self.known

    def wait(self, seconds: float) -> Verification:
        """`look`, after what is under way has ended or `seconds` have passed."""
        self.look()
        if self._thread.is_alive():
            self._thread.join(seconds)
        return self.known

    def _verify(self) -> None:
        home = self._home
        own = [home.coordinator_key.public_key()]
        try:
            found = heads.verify(home.journal.path, heads.COORDINATOR, own, home.roster.known_keys())
        except (JournalDamaged, SignatureInvalid) as error:
            told = printable(str(error).replace(str(home.root), "HOME"))
            self.known = Verification("damaged", told, at_s=time.time())
            return
        except (IsocenterError, OSError) as error:
            log.error("the journal could not be verified: %s", error)
            return
        told = (
            f"{found.lines} lines, each in its place and as it was written; {found.signed} signed heads of this journal and "
            f"{found.witnessed} of the sites' journals, all genuine."
        )
        self.known = Verification("whole", told, found.lines, time.time())
