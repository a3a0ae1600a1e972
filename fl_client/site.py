"""The site: what site.yaml says, what was approved, and the only gate an order passes.

    HOME/
      site.yaml               owned by the hospital; never leaves it
      keys/                   site.key (0600), site.pem, ca.pem, coordinator.pem
      studies/<digest>.json   signed offers with this site's decision; <digest>.pins.json the split of patients
      state/                  index.sqlite and cache/ (images, 0700); can be made again
      orders.sqlite           what was answered, so that no order is answered twice
      ledger.sqlite           what was spent of each patient's privacy, by all studies, for ever
      journal.jsonl           everything this site sent or refused, hash-chained

Trust rules, in the order `Site.admit` applies them:
 1. the order carries the coordinator's signature and is not stale;
 2. the study it names was offered with the coordinator's signature, and this site approved it;
 3. the policy in site.yaml permits the study, today;
 4. the round is one of the study's rounds, and this order was not answered before, which is durable before work starts.

Before training, `Site.reserve` charges the patients for it: what a policy's ε does not cover is not trained.
"""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import Field

from fl_client.consent import approved
from models.labels import LabelMap
from models.study import PROTECTIONS, Document, Name, Protection, Study, read
from privacy import keys
from privacy.errors import (
    DataError,
    DeltaTooLarge,
    NotEnrolled,
    OrderReplayed,
    PolicyForbids,
    PrivacyError,
    StudyNotApproved,
)
from privacy.journal import Journal
from privacy.noise import GRID_BITS
from privacy.sharing import Encoding
from privacy.wire import (
    EvaluateOrder,
    EvaluateReport,
    KeysReport,
    Order,
    Refusal,
    Report,
    TrainOrder,
    UnmaskReport,
    WorkReport,
)

if TYPE_CHECKING:
    from privacy.accounting import PrivacyEvent
    from privacy.ledger import Caps, Charge, Ledger, Patients


FIGURES_ERROR = 2.0**-90  # total variation of all draws of a release: 10**6 tables' worth of 2**-110 each
NOISE_DEVIATIONS = 14  # noise beyond is drawn with a chance of 10**-44 a value


class Coordinator(Document):
    """Where the consortium is; written by `fl-client join`."""

    gateway: str = Field(pattern=r"^[^\s:]+:\d+$", description="host:port for training")
    service: str = Field(pattern=r"^[^\s:]+:\d+$", description="host:port for joining, studies and results")


class Source(Document):
    """Where the site's images are and what they are called there."""

    name: Name = Field(default="chest", description="what this collection of images is called")
    folder: str = Field(min_length=1, description="folder with the images; searched with everything below it")
    format: Literal["dicom", "pictures"] = Field(default="dicom", description="dicom, or pictures (PNG, JPEG)")
    labels: LabelMap
    longest_side_px: int = Field(
        default=1024, ge=64, le=4096, description="cached images are reduced to this, never enlarged"
    )


class Policy(Document):
    """What this site permits. A study can only be stricter."""

    least_protection: Protection = Field(
        default="masked", description="the least protection of this site's updates that a study may have"
    )
    minimum_patients: int = Field(
        default=10, ge=1, description="least patients in each split; a study may ask for more"
    )
    maximum_rounds: int = Field(default=1000, ge=1, description="most rounds of a study")
    epsilon_per_study: float = Field(
        default=8, gt=0, le=1000, description="most ε that one study may spend of any patient here"
    )
    epsilon_per_year: float = Field(
        default=10, gt=0, le=1000, description="most ε that all studies together may spend of any patient in 365 days"
    )
    epsilon_total: float = Field(
        default=20, gt=0, le=1000, description="most ε that all studies together may spend of any patient, for ever"
    )
    delta: float = Field(
        default=1e-5, gt=0, lt=0.01, description="δ at which these ε are counted; below 1 / patients of this site"
    )
    permit_without_privacy: bool = Field(
        default=False,
        description="whether studies without differential privacy may train here; no ε covers what they reveal",
    )


class Resources(Document):
    """What training may use of this machine. It holds from the next order on; a training process over a limit is stopped."""

    cpu_threads: int = Field(default=0, ge=0, le=1024, description="threads of training; 0: all cores")
    memory_gb: float = Field(
        default=0, ge=0, le=100_000, description="most memory of the training process, in GiB; 0: no limit"
    )
    minutes_per_round: int = Field(default=240, ge=1, le=100_000, description="most minutes that one order may take")
    gpu: bool = Field(default=False, description="whether training may use a GPU of this machine")


class SiteFile(Document):
    """site.yaml: owned by the hospital, never leaves it. Relative paths are relative to the file."""

    version: Literal[1] = Field(default=1, description="version of this file's layout")
    site: Name = Field(description="name of this site in the consortium")
    coordinator: Coordinator | None = None
    data: Source | None = None
    policy: Policy = Policy()
    resources: Resources = Resources()

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
        return read(SiteFile, SiteFile.path(home))

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

    @property
    def journal(self) -> Journal:
        return Journal(self.home / "journal.jsonl")

    def admit(self, order: Order) -> Study:
        """The study that `order` may work on. Raises OrderForged, StudyNotApproved, PolicyForbids or OrderReplayed."""
        order.verify(self.coordinator)
        study = approved(self.home, order.study, self.coordinator)
        self.check_policy(study)
        part = study.participation
        if self.name not in (part.sites if isinstance(order, TrainOrder) else study.all_sites):
            raise StudyNotApproved(f"the study does not name {self.name} for {order.kind}")
        if order.round > study.training.rounds:
            raise PolicyForbids(f"round {order.round} of a study of {study.training.rounds} rounds")
        self._remember(order, study)
        return study

    def check_policy(self, study: Study) -> None:
        """Raise PolicyForbids with one sentence for each rule of site.yaml that `study` breaks."""
        policy, broken = self.settings.policy, []
        if PROTECTIONS.index(study.protection) > PROTECTIONS.index(policy.least_protection):
            too = ", and so would whoever can look into its server" if study.protection == "plain" else ""
            broken.append(
                f"protection: {study.protection}: the coordinator would see this site's own model update, not only a sum "
                f"over sites{too}; policy.least_protection in site.yaml is {policy.least_protection}"
            )
        if study.training.rounds > policy.maximum_rounds:
            broken.append(
                f"{study.training.rounds} rounds are more than policy.maximum_rounds ({policy.maximum_rounds})"
            )
        broken += self._broken_privacy(study)
        if broken:
            raise PolicyForbids("; ".join(broken))

    def _broken_privacy(self, study: Study) -> list[str]:
        """What `study` says or leaves out about differential privacy, held against site.yaml and against itself."""
        policy, plan = self.settings.policy, study.privacy
        if self.name not in study.participation.sites:
            return []  # nothing is trained on its patients
        if plan == "none":
            sentence = (
                "privacy: none: nothing bounds what the model reveals of a patient; policy.permit_without_privacy in site.yaml "
                "is false"
            )
            return [] if policy.permit_without_privacy else [sentence]
        if plan.noise_multiplier is None:
            return ["privacy has no noise_multiplier, so nothing can be said of its ε"]
        from privacy import accounting

        broken = study.private_conflicts()
        spends = accounting.epsilon([study.event(study.budgeted_rounds)], policy.delta)
        if spends > policy.epsilon_per_study:
            broken.append(
                f"the study spends an ε of {spends:.2f} of a patient at δ = {policy.delta:g}, and policy.epsilon_per_study in "
                f"site.yaml is {policy.epsilon_per_study:g}"
            )
        return broken

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
        with closing(sqlite3.connect(self.home / "orders.sqlite", timeout=30)) as memory, memory:
            memory.execute("PRAGMA synchronous=FULL")
            memory.execute(
                "CREATE TABLE IF NOT EXISTS orders (learned TEXT, run TEXT, attempt INTEGER, sum INTEGER, kind TEXT,"
                " round INTEGER, PRIMARY KEY (run, attempt, sum, kind))"
            )
            memory.execute("CREATE TABLE IF NOT EXISTS released (run TEXT PRIMARY KEY, model TEXT)")
            memory.execute("CREATE TABLE IF NOT EXISTS noised (study TEXT PRIMARY KEY, model TEXT, counts BLOB)")
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
