"""The site: what site.yaml says, what was approved, and the only gate an order passes.

    HOME/
      site.yaml               owned by the hospital; never leaves it
      keys/                   site.key (0600), site.pem, ca.pem, coordinator.pem
      studies/<digest>.json   signed offers with this site's decision; <digest>.pins.json the split of patients
      state/                  index.sqlite and cache/ (images, 0700); can be made again
      fetch.sqlite            what was asked of the archive, and copied (0600)
      orders.sqlite           what was answered, so that no order is answered twice
      ledger.sqlite           what was spent of each patient's privacy, by all studies, for ever
      paused.json             there while the site is paused; studies/<digest>.paused.json while one study is
      logs/                   what node and worker did, as JSON lines without anything of a patient (0700)
      crashes/                reports of errors that nobody foresaw, without anything of a patient (0700)
      private/                full texts of what went wrong, for people here only (0700)
      journal.jsonl           everything this site sent or refused, hash-chained

Trust rules, in the order `Site.admit` applies them:
 1. the order carries the coordinator's signature and is not stale;
 2. the study it names was offered with the coordinator's signature, and this site approved it;
 3. the policy in site.yaml permits the study, today, and work may begin now: hours, and no pause;
 4. the round is one of the study's rounds, and this order was not answered before, which is durable before work starts.

Before training, `Site.reserve` charges the patients for it: what a policy's ε does not cover is not trained.
"""

import datetime as dt
import functools
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import Field, StringConstraints

from fl_client.archive import ArchiveSettings
from fl_client.consent import approved
from fl_client.policy import Pause, Policy, Rule, broken
from models.documents import parse, text_of
from models.labels import LabelMap
from models.sections import LONGEST_SIDE_PX, LONGEST_SIDE_RANGE, STRUCTURES_MAX
from models.study import Document, Name, Study
from privacy import disk, keys
from privacy.errors import (
    DataError,
    DeltaTooLarge,
    NotEnrolled,
    OrderReplayed,
    OutsideHours,
    PolicyForbids,
    PrivacyError,
    SitePaused,
    StudyNotApproved,
)
from privacy.journal import Journal
from privacy.logs import LogFiles
from privacy.noise import GRID_BITS
from privacy.reach import Proxy, Way
from privacy.sharing import Encoding
from privacy.syslog import TargetText
from privacy.tracing import Traces
from privacy.wire import (
    EvaluateOrder,
    EvaluateReport,
    KeysReport,
    Order,
    Refusal,
    Report,
    TrainOrder,
    UnmaskOrder,
    UnmaskReport,
    WorkReport,
)

if TYPE_CHECKING:
    from privacy.accounting import PrivacyEvent
    from privacy.ledger import Caps, Charge, Ledger, Patients


MaskWord = Annotated[int, Field(ge=1, le=65535)] | Annotated[str, StringConstraints(min_length=1, max_length=64)]
ORDERS_VERSION = 1  # of orders.sqlite
_ORDERS = (
    "CREATE TABLE IF NOT EXISTS orders (learned TEXT, run TEXT, attempt INTEGER, sum INTEGER, kind TEXT, round INTEGER,"
    " PRIMARY KEY (run, attempt, sum, kind))",
    "CREATE TABLE IF NOT EXISTS released (run TEXT PRIMARY KEY, model TEXT)",
    "CREATE TABLE IF NOT EXISTS noised (study TEXT PRIMARY KEY, model TEXT, counts BLOB)",
)
FIGURES_ERROR = 2.0**-90  # total variation of all draws of a release: 10**6 tables' worth of 2**-110 each
NOISE_DEVIATIONS = 14  # noise beyond is drawn with a chance of 10**-44 a value


class Coordinator(Document):
    """Where the consortium is; written by `fl-client join`."""

    gateway: str = Field(pattern=r"^[^\s:]+:\d+$", description="host:port for training")
    service: str = Field(pattern=r"^[^\s:]+:\d+$", description="host:port for joining, studies and results")
    proxy: Proxy | None = Field(default=None, description="the only way out; without it connections are direct")

    def way(self, home: Path) -> Way | None:
        """The way to both ports. Raises what reading the proxy's password raises."""
        return self.proxy.way(home) if self.proxy else None


class MaskMap(Document):
    """Reference masks of this site: NIfTI files or DICOM segmentations, each of one image that was ingested."""

    folder: str = Field(min_length=1, description="folder with the masks; searched with everything below it")
    structures: dict[Name, list[MaskWord]] = Field(
        min_length=1,
        max_length=STRUCTURES_MAX,
        description="structure of studies -> what it is in the masks: values of NIfTI files; numbers or labels of DICOM segments",
    )
    ignored: list[MaskWord] = Field(default=[], max_length=256, description="values or segments that are none of these")
    empty: Literal["refused", "absent"] = Field(
        default="refused",
        description="a mask with nothing in it. refused: it is left out; absent: no structure is there",
    )


class Source(Document):
    """Where the site's images are and what they are called there."""

    name: Name = Field(default="chest", description="what this collection of images is called")
    folder: str = Field(min_length=1, description="folder with the images; searched with everything below it")
    format: Literal["dicom", "pictures", "nifti"] = Field(
        default="dicom", description="dicom, pictures (PNG, JPEG; with JSON headers beside them), or nifti (CT volumes)"
    )
    labels: LabelMap
    masks: MaskMap | None = Field(default=None, description="reference masks, for studies of `kind: segmentation`")
    patients: Literal["header", "folder"] = Field(
        default="header",
        description="DICOM only; who an image is of. header: Patient ID; folder: the first folder below `folder` is the patient",
    )
    longest_side_px: int = Field(
        default=LONGEST_SIDE_PX,
        ge=LONGEST_SIDE_RANGE[0],
        le=LONGEST_SIDE_RANGE[1],
        description="cached radiographs are reduced to this, never enlarged",
    )
    scaling: Literal["percentiles", "window"] = Field(
        default="percentiles",
        description="what becomes black and white of a radiograph; has to be what a study asks for",
    )
    archive: ArchiveSettings | None = Field(
        default=None, description="where `fl-client fetch` copies studies from into `folder`"
    )
    require_deidentified: bool = Field(
        default=False, description="true: DICOM files that name a person (PS3.15 Annex E) are left out"
    )
    cache_key: str | None = Field(
        default=None,
        min_length=1,
        description="file with a key that cached pixels are encrypted with, made if it is missing; best not on the cache's disk",
    )
    damaged_share_max: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="share of damaged files above which this site does not work with its images",
    )


class Resources(Document):
    """What training may use of this machine. It holds from the next order on; a training process over a limit is stopped."""

    cpu_threads: int = Field(default=0, ge=0, le=1024, description="threads of training; 0: all cores")
    memory_gb: float = Field(
        default=0, ge=0, le=100_000, description="most memory of the training process, in GiB; 0: no limit"
    )
    minutes_per_round: int = Field(default=240, ge=1, le=100_000, description="most minutes that one order may take")
    studies_in_memory: int = Field(
        default=1,
        ge=1,
        le=16,
        description="studies whose images stay in memory; with fewer than runs side by side, each order reads them anew",
    )
    gpu: bool = Field(
        default=False,
        description="whether the training process may see a GPU; this version trains on the processor all the same",
    )


class SiteFile(Document):
    """site.yaml: owned by the hospital, never leaves it. Relative paths are relative to the file."""

    version: Literal[1] = Field(default=1, description="version of this file's layout")
    site: Name = Field(description="name of this site in the consortium")
    coordinator: Coordinator | None = None
    data: Source | None = None
    policy: Policy = Policy()
    approve: list[Rule] = Field(default=[], max_length=100, description="studies that are approved without asking")
    resources: Resources = Resources()
    log: LogFiles = Field(default=LogFiles(), description="log files of the node and of the process that trains")
    traces: Traces | None = Field(default=None, description="where spans of orders are sent; nowhere without it")
    syslog: TargetText | None = Field(
        default=None,
        description="where journal lines are sent as well: udp://host:514, tcp://host:601 or unix:///dev/log",
    )

    @staticmethod
    def path(home: Path) -> Path:
        return home / "site.yaml"


@dataclass(frozen=True)
class Seen:
    """What the journal says of a report beside the report itself: how it was protected, and which sites the coordinator
    named as survivors. Journals that disagree about a list prove that the coordinator told two.
    """

    protection: str = ""
    survivors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Site:
    """An opened site: its settings, its keys' public halves, its memory. Opening changes nothing."""

    home: Path
    settings: SiteFile
    coordinator: ec.EllipticCurvePublicKey

    @classmethod
    def open(cls, home: Path) -> "Site":
        """Raises DocumentError for site.yaml and NotEnrolled before `fl-client join`."""
        settings = cls.settings_of(home)
        pinned = home / "keys" / "coordinator.pem"
        if not pinned.is_file():
            raise NotEnrolled(f"{home} has not joined a consortium")
        return cls(home, settings, keys.load_public(pinned.read_bytes()))

    @property
    def name(self) -> str:
        return self.settings.site

    @staticmethod
    def settings_of(home: Path) -> SiteFile:
        path = SiteFile.path(home)
        return _settings(text_of(path), str(path))

    @staticmethod
    def state_of(home: Path) -> Path:
        """Where images and the memory of answered orders lie; readable by this user only."""
        path = home / "state"
        path.mkdir(mode=0o700, exist_ok=True)
        return path

    @staticmethod
    def source_of(settings: SiteFile, home: Path) -> Source:
        if settings.data is None:
            raise DataError(
                f"{SiteFile.path(home)} has no data section",
                remedy="Fill in `data:` in site.yaml (the template shows how), then run `fl-client ingest`.",
            )
        return settings.data

    @property
    def state(self) -> Path:
        return self.state_of(self.home)

    @property
    def source(self) -> Source:
        return self.source_of(self.settings, self.home)

    @functools.cached_property
    def journal(self) -> Journal:
        return Journal(self.home / "journal.jsonl")

    def admit(self, order: Order) -> Study:
        """The study that `order` may work on.

        Raises OrderForged, StudyNotApproved, PolicyForbids, SitePaused, OutsideHours or OrderReplayed.
        """
        order.verify(self.coordinator)
        study = approved(self.home, order.study, self.coordinator)
        self.check_policy(study)
        if self.name not in (study.asked(order.round) if isinstance(order, TrainOrder) else study.all_sites):
            raise StudyNotApproved(f"the study does not name {self.name} for {order.kind} in round {order.round}")
        # Where nothing is trained, what is evaluated is called round 1.
        if order.round > max(1, study.training.rounds) or (isinstance(order, TrainOrder) and not study.training.rounds):
            raise PolicyForbids(f"round {order.round} of a study of {study.training.rounds} rounds")
        self._check_moment(order)
        self._remember(order, study)
        return study

    def check_policy(self, study: Study) -> None:
        """Raise PolicyForbids with one sentence for each rule of site.yaml that `study` breaks."""
        data_set = self.settings.data.name if self.settings.data else ""
        if found := broken(self.settings.policy, study, self.name, data_set):
            raise PolicyForbids("; ".join(found))

    def _check_moment(self, order: Order) -> None:
        """Raise SitePaused or OutsideHours if no work may begin now.

        Helping to open a sum that this site is in already needs no images, and without it the work of all others is lost.
        """
        if isinstance(order, UnmaskOrder):
            return
        if pause := self.pause:
            raise SitePaused(f"{self.name} is {pause}")
        if pause := Pause.open(self.home, time.time(), order.study):
            raise SitePaused(f"at {self.name}, the study {order.study[:12]} is {pause}")
        if not self.settings.policy.hours.permit(dt.datetime.now()):
            raise OutsideHours(f"policy.hours in site.yaml permits work on {self.settings.policy.hours}")

    @property
    def pause(self) -> Pause | None:
        """The pause that holds now. Raises DocumentError if its file is damaged."""
        return Pause.open(self.home, time.time())

    def note_settings(self) -> None:
        """A line in the journal if site.yaml is not what it was at the last such line: its SHA-256, nothing of its content."""
        now, before = keys.digest(SiteFile.path(self.home).read_bytes()), self.journal.last("settings")
        if before is None or before["digest"] != now:
            self.journal.append("settings", digest=now)

    @property
    def ledger(self) -> "Ledger":
        """What was spent here of each patient's privacy."""
        from privacy.ledger import Ledger  # its mathematics takes a second to load, and most commands need none of it

        return Ledger(self.home / "ledger.sqlite", self.journal)

    def reserve(self, study: Study, order: TrainOrder, patients: "Patients") -> int | None:
        """Charge `patients` for one order to train, durably, before they are looked at; the hold, to be committed afterwards.

        Under `privacy: none` there is nothing to charge: it is noted that no ε covers this run, and there is no hold. Raises
        BudgetExceeded, DeltaTooLarge, LedgerDamaged, LedgerBusy or ClockSetBack; then nothing may be trained.
        """
        if study.privacy == "none":
            self.ledger.unbounded(study.digest, order.run)
            return None
        self._check_delta(study, len(patients))
        _check_room(study, len(patients), len(order.participants))
        event = self.terms(study, 1, len(patients), order.model.size)
        return self.ledger.reserve(self._charge(study, event, order), patients, self._caps(study))

    def commit(self, hold: int | None) -> None:
        """The work of `hold` was done, and its result may leave."""
        if hold is not None:
            self.ledger.commit(hold)

    def check_budget(self, study: Study, patients: "Patients") -> None:
        """Raise BudgetExceeded or DeltaTooLarge if the whole study, spare rounds included, would spend more than is permitted."""
        if study.privacy != "none":
            self._check_delta(study, len(patients))
            event = self.terms(study, study.budgeted_rounds, len(patients), 0)
            self.ledger.check(self._charge(study, event), patients, self._caps(study))

    def terms(self, study: Study, rounds: int, patients: int, parameters: int) -> "PrivacyEvent":
        """What `rounds` rounds of `study` do to each of `patients` here: the study's mechanism, with what only the site knows.

        `parameters`: how many values get noise in each step; the error of their samplers is part of the event.
        """
        from privacy import noise

        event = study.event(rounds)
        if study.privacy == "none":
            return event
        sampler = noise.gaussian(event.noise_multiplier * 2.0**noise.GRID_BITS)
        error = min(1.0, sampler.tv_bound * parameters * event.steps)
        return replace(event, batch_max=study.privacy.batch_max(patients), patients=patients, delta_extra=error)

    def _charge(self, study: Study, event: "PrivacyEvent", order: Order | None = None) -> "Charge":
        from privacy.ledger import Charge

        named = (order.run, order.attempt, order.sum) if order else ("", 0, 0)
        return Charge(study.digest, *named, event)

    def _caps(self, study: Study) -> "Caps":
        """What site.yaml permits, and the number of orders that the study's own ε has room for."""
        from privacy.ledger import Caps

        policy = self.settings.policy
        return Caps(
            total=policy.epsilon_total,
            per_study=policy.epsilon_per_study,
            per_year=policy.epsilon_per_year,
            delta=policy.delta,
            orders=study.budgeted_rounds,
        )

    def _check_delta(self, study: Study, patients: int) -> None:
        """A δ of 1 / patients would be kept by publishing one patient at random."""
        said = [("policy.delta in site.yaml", self.settings.policy.delta)]
        said += [] if study.privacy == "none" else [("the study's privacy.delta", study.privacy.delta)]
        for name, delta in said:
            if delta * patients >= 1:
                raise DeltaTooLarge(f"{name} is {delta:g}, and 1 / {patients} training patients is not above it")

    def pins(self, study: Study) -> Path:
        """The file with the split of this site's patients in `study`."""
        return self.home / "studies" / f"{study.digest}.pins.json"

    def _remember(self, order: Order, study: Study) -> None:
        """Durably note that this order is being answered; raise OrderReplayed if it was noted before.

        For an order whose report goes into a sum this is what makes a mask single-use across crashes: the sum is noted before
        a mask of it exists, and the keys that could make the mask again end with the process.
        """
        row = (study.learned, order.run, order.attempt, order.sum, order.kind, order.round)
        with self._answered() as memory:
            try:
                memory.execute("INSERT INTO orders VALUES (?, ?, ?, ?, ?, ?)", row)
            except sqlite3.IntegrityError:
                raise OrderReplayed(
                    f"order {order.kind} {order.sum}, attempt {order.attempt} of run {order.run} was answered"
                ) from None

    def repeats(self, order: Order) -> int:
        """How many orders for the same work this site had answered before `order`, in whatever attempt, run, or disguise.

        The same work is the same kind of order and round, and a study that makes the same random choices. What counts is the
        sequence in which orders came, not their numbers, which a coordinator is free to choose.
        """
        query = (
            "SELECT count(*) FROM orders AS this JOIN orders AS earlier ON earlier.rowid < this.rowid"
            " AND earlier.learned = this.learned AND earlier.kind = this.kind AND earlier.round = this.round"
            " WHERE this.run = ? AND this.attempt = ? AND this.sum = ? AND this.kind = ?"
        )
        with self._answered() as memory:
            row = memory.execute(query, (order.run, order.attempt, order.sum, order.kind)).fetchone()
        return int(row[0])

    @contextmanager
    def _answered(self) -> Iterator[sqlite3.Connection]:
        """The memory of answered orders: one transaction, on the disk when it ends."""
        path = self.home / "orders.sqlite"
        with disk.sqlite_faults_named(path), closing(sqlite3.connect(path, timeout=disk.BUSY_S)) as memory:
            # The folder too: a journal of SQLite that comes back after a power loss would take back what was answered.
            memory.execute("PRAGMA synchronous=EXTRA")
            if (version := memory.execute("PRAGMA user_version").fetchone()[0]) != ORDERS_VERSION:
                _bring_orders_forward(path, memory, version)
            with memory:
                yield memory

    def may_release(self, order: EvaluateOrder) -> bool:
        """Whether figures of the test split may leave in answer to `order`: for one model in a run, the first that is asked for.

        Figures of many models would tell the labels of single images. A sum that has to be tried again is about the same model.
        """
        if order.split != "test":
            return False
        model = keys.digest(order.model.tobytes())
        with self._answered() as memory:
            memory.execute("INSERT OR IGNORE INTO released VALUES (?, ?)", (order.run, model))
            row = memory.execute("SELECT model FROM released WHERE run = ?", (order.run,)).fetchone()
        return bool(row[0] == model)

    def release_once(
        self, study: Study, order: EvaluateOrder, patients: "Patients", make: Callable[[], bytes]
    ) -> bytes | None:
        """What `make` gives, charged to `patients` and kept, the first time that `study` asks; afterwards the same bytes again.

        None for another model than the first: figures of a second one would be a second release. Raises what `reserve` raises.
        """
        model, event = keys.digest(order.model.tobytes()), study.figures_event()
        if event is None:
            return None
        with self._answered() as memory:
            row = memory.execute("SELECT model, counts FROM noised WHERE study = ?", (study.digest,)).fetchone()
        if row is not None:
            return bytes(row[1]) if row[0] == model else None
        self._check_delta(study, len(patients))
        event = replace(event, delta_extra=FIGURES_ERROR)
        hold = self.ledger.reserve(self._charge(study, event, order), patients, self._caps(study))
        made = make()
        with self._answered() as memory:
            memory.execute("INSERT INTO noised VALUES (?, ?, ?)", (study.digest, model, made))
        self.commit(hold)
        return made

    @property
    def key(self) -> keys.PrivateKey:
        """The enrolled key; raises NotEnrolled or KeyFileUnsafe."""
        return keys.load_key(self.home / "keys" / "site.key")

    def note_release(self, study: Study, order: TrainOrder, patients: int, norm: float) -> None:
        """Write down how long the update is that is about to be protected, and the ε at policy.delta that this order spends."""
        facts: dict[str, Any] = {**order.naming(), "norm": float(f"{norm:.4g}")}
        if study.privacy != "none":
            spends = _epsilon(self.terms(study, 1, patients, order.model.size), self.settings.policy.delta)
            facts["epsilon"] = float(f"{spends:.4g}")
        self.journal.append("release", **facts)

    def note(self, report: Report, seen: Seen = Seen()) -> None:
        """Write what is about to leave into the journal: kinds, sizes, protection; durable before it is sent."""
        facts: dict[str, Any] = report.naming()
        if isinstance(report, Refusal):
            facts |= {"code": report.code}
        elif isinstance(report, UnmaskReport):
            told = keys.digest(" ".join(seen.survivors).encode())
            facts |= {"survivors": len(seen.survivors), "list": told, "shares_bytes": len(report.revealed)}
            facts |= {"keys_bytes": len(report.sealed)}
        elif isinstance(report, KeysReport):
            facts |= {"keys_bytes": len(report.keys)}
        elif isinstance(report, WorkReport):
            facts |= {"protection": seen.protection, "vector_bytes": len(report.vector), "keys_bytes": len(report.keys)}
            if isinstance(report, EvaluateReport):
                facts |= {"split": report.split, "figures": int((report.figures[:, 0] >= 0).sum())}
        self.journal.append(report.kind, **facts)


def _bring_orders_forward(path: Path, memory: sqlite3.Connection, version: int) -> None:
    """The tables of this version in a memory of answered orders that is new, or of release 0.1, whose layout had no number."""
    disk.require_known(path, version, ORDERS_VERSION)
    if memory.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        disk.keep_copy_of_database(path, version)
    else:
        path.chmod(0o600)
    with memory:
        memory.execute("BEGIN IMMEDIATE")
        for table in _ORDERS:
            memory.execute(table)
        memory.execute(f"PRAGMA user_version = {ORDERS_VERSION}")
    disk.flush_folder(path.parent)


@functools.lru_cache(maxsize=4)
def _settings(text: str, name: str) -> SiteFile:
    """site.yaml is read at each order and seldom another one; to parse it takes longer than the rest of an order's way in."""
    return parse(SiteFile, text, name)


@functools.cache
def _epsilon(event: "PrivacyEvent", delta: float) -> float:
    from privacy import accounting  # its mathematics takes a second to load

    return accounting.epsilon([event], delta)


def _check_room(study: Study, patients: int, sites: int) -> None:
    """Raise PrivacyError unless any sum of a step and its noise fits into a site's share of a word of a distributed sum.

    What does not fit is cut off at the site, after its own noise and before that of the others, and what that leaves is not
    covered by the noise of all.
    """
    plan = study.privacy
    if plan == "none" or plan.mode != "distributed" or plan.noise_multiplier is None:
        return
    limit = Encoding(values=0, counts=0, bits=study.encoding_bits, scale=GRID_BITS, sites=max(1, sites)).limit
    largest = (plan.batch_max(patients) + NOISE_DEVIATIONS * plan.noise_multiplier) * 2.0**GRID_BITS
    if largest > limit:
        raise PrivacyError(
            f"a step of {plan.batch_max(patients)} patients and its noise may not fit into {study.encoding_bits} bits",
            remedy="Ask the researcher for `encoding_bits: 64`, or a smaller sampling_rate.",
        )


Work = Callable[[Site, Study, Order], Report]
"""Carries out an admitted order; raises an IsocenterError, or reports a Refusal, if that cannot be done."""
