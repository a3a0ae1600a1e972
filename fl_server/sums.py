"""One sum over the sites, from the first key to the opened total; masked, sealed and plain by the same door.

Under masks a sum takes two exchanges: orders to work, which bring back masked vectors and the keys of the next sum, and orders
to unmask, which bring back shares of this one and encrypted shares of the next. Only the first sum of an attempt, or one for
which too few sites have keys, takes two more before it. A site that comes back gets its keys while the others work, and is
in the sum after. A sum that cannot be opened is void: nothing was learned from it, and the next attempt starts from new
training and new keys.
"""

import contextlib
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import numpy as np
from flwr.serverapp import Grid

from fl_server.pace import Pace
from fl_server.roster import Home
from fl_server.rounds import Call, Due, Gathering, Overdue, Tell, choose
from fl_server.run import Run, list_runs
from fl_server.sightings import Sightings
from models import contributions
from models.contributions import Contribution, Float32, Kind
from models.study import Study
from privacy import keys
from privacy.errors import (
    CertificateRevoked,
    IsocenterError,
    MaskKeysLost,
    MessageMalformed,
    ProtectionError,
    QuorumLost,
    ShareInvalid,
    TooFewSurvivors,
    WorkerDied,
)
from privacy.noise import GRID_BITS
from privacy.secagg import Aggregator, Place
from privacy.sharing import Encoding, Vector
from privacy.wire import (
    SCALE_MAX,
    EvaluateReport,
    KeysOrder,
    KeysReport,
    Names,
    Order,
    TrainOrder,
    UnmaskOrder,
    UnmaskReport,
    WorkOrder,
    WorkReport,
)

Kinds = TypeVar("Kinds", bound=Order)
ROBUST_ROOM = 8  # times the largest value of the middle site, which others may reach: sites differ in their cases
CLIPPED_PART = 100  # one of so many values clipped is little for words of 16 bits
ATTEMPTS_MAX = 3  # at one sum, before the run ends by name; each is a whole training
COMES_BACK = {"timeout", "offline", "unavailable", "joining", MaskKeysLost.code, WorkerDied.code}
"""Reasons for which a site is missing that may be over in a minute; a refusal of the site's own is not."""
JOURNALED = {
    "asked": "orders-sent",
    "site_missing": "site-missing",
    "wrong_share": "share-wrong",
    "void": "sum-void",
    "left_out": "updates-left-out",
    "flagged": "update-flagged",
    "late": "report-late",
    "joined": "sites-joined",
}
Nodes = dict[str, int]


@dataclass(frozen=True)
class Task:
    """What a sum is for. `sites` may take part now; `afterwards` are those of the next sum, None after the last."""

    kind: type[WorkOrder]
    model: Float32
    round: int
    scale: int
    sites: Nodes
    least: int
    afterwards: Nodes | None
    more: Mapping[str, Any] = field(default_factory=dict)  # fields of the order beside those of every work order

    @property
    def name(self) -> Kind:
        if self.kind is TrainOrder:
            return "train"
        return "test" if self.more.get("split") == "test" else "evaluate"


@dataclass
class Total:
    """An opened sum: the mean of the contributions, who is in it, who is not and why. `peak`: largest summed value.

    `updates`: each site's own update by name, float32 (P,) each, for a robust strategy; then `peak` is that of the middle site.
    """

    mean: Contribution
    contributors: list[str]
    missing: dict[str, str]
    seconds: dict[str, float]
    clipped: int
    peak: float
    figures: dict[str, Float32]
    updates: dict[str, Float32] = field(default_factory=dict)


@dataclass
class Arrivals:
    """What the reports of one sum say beside their vectors."""

    seconds: dict[str, float] = field(default_factory=dict)
    figures: dict[str, Float32] = field(default_factory=dict)

    def add(self, site: str, report: WorkReport, tell: Tell) -> None:
        self.seconds[site] = report.seconds
        if isinstance(report, EvaluateReport):
            self.figures[site] = report.figures
        tell("site", site=site, stage=report.kind, seconds=round(report.seconds, 3))


@dataclass(frozen=True)
class Heeding:
    """Who is online, for a run that may be stopped before a sum and while it waits for one; raises RunStopped."""

    grid: Grid
    run: Run

    def get_node_ids(self) -> Iterable[int]:
        self.run.heed()
        return self.grid.get_node_ids()


class SitesAway(Exception):
    """Too few sites reported, and with `sites`, who may come back, there would be enough."""

    def __init__(self, message: str, sites: list[str]) -> None:
        super().__init__(message)
        self.sites = sites


class Summing:
    """The sums of one run, one after the other. Subclasses say what one attempt at a sum is."""

    def __init__(self, grid: Grid, run: Run, home: Home) -> None:
        self.grid, self.run, self.study, self.journal = grid, run, run.study, home.journal
        self.parties, self.runs = home.roster, home.runs
        self.signing, self.aggregator = home.coordinator_key, home.aggregator_key
        self.number = 0  # of the last sum; counted anew in each attempt
        self.offline: dict[str, str] = {}  # of the sites of this sum
        self.away: dict[str, str] = {}  # of all sites, when they were asked last
        self.timeout_s = timeout_of(run.study)
        self.pace = Pace(self.timeout_s)
        self.exchange: Gathering | None = None  # the last one
        self.overdue, self.latecomers = Overdue(self._came_late), list[tuple[Due, float]]()

    def tell(self, kind: str, **facts: Any) -> None:
        """An event of the run; orders, and who did not answer them well, are lines of the coordinator's journal too."""
        self.run.event(kind, **facts)
        if kind in JOURNALED:
            self.journal.append(JOURNALED[kind], **{"run": self.run.run_id, "attempt": self.run.attempt, **facts})

    def carry_out(self, task: Task) -> Total:
        """The total of `task`. A void sum, or one below the quorum whose sites may come back, is tried again under a new attempt.

        Raises QuorumLost if none can be opened, or if sites refuse that are needed.
        """
        why = ""
        for _ in range(ATTEMPTS_MAX):
            try:
                return self._attempt(task)
            except SitesAway as away:
                self.tell("waiting", sites=away.sites)
                why, reason = str(away), QuorumLost.code
            except (ProtectionError, MessageMalformed) as error:
                why, reason = str(error), error.code
            self.tell("void", round=task.round, attempt=self.run.attempt, reason=reason)
            self.run.next_attempt()
            self._begin_anew()
        raise QuorumLost(f"no sum of round {task.round} could be opened in {ATTEMPTS_MAX} attempts: {why}")

    def _attempt(self, task: Task) -> Total:
        raise NotImplementedError

    def _begin_anew(self) -> None:
        """A new attempt: what is left of an earlier one is never touched again."""
        self.number = 0

    def _choose(self, task: Task, without: Iterable[str] = ()) -> Nodes:
        usable = {site: node for site, node in task.sites.items() if site not in without}
        before = {site: why for site, why in self.away.items() if site not in usable}
        ready = choose(
            Heeding(self.grid, self.run), usable, task.least, self.timeout_s, self.tell, frozenset(self.away)
        )
        self.offline = {name: "offline" for name in usable if name not in ready}
        self.away = before | self.offline
        for name in self.offline:
            self.pace.forget(name)
        return ready

    def _gather(self, calls: dict[str, Call], stage: str, enough: Callable[[], bool] | None = None) -> Gathering:
        """Send `calls`; each site is waited for as long as its own speed says, as far as the exchanges before told it."""
        if self.exchange is not None:
            before = self.exchange
            self.pace.note({site: call.order for site, call in before.calls.items()}, before.took, before.missing)
        while self.latecomers:
            due, seconds = self.latecomers.pop()
            self.pace.note({due.site: due.order}, {due.site: seconds}, {})
        self.tell("asked", stage=stage, round=next(iter(calls.values())).order.round, sites=list(calls))
        busy = self._busy_elsewhere()
        timed = {
            site: replace(call, busy=True)
            if site in busy
            else replace(call, limit_s=self.pace.limit_s(site, call.order))
            for site, call in calls.items()
        }
        self.exchange = Gathering(self.grid, timed, self.timeout_s, self.tell, enough, self._gone)
        self.exchange.overdue = self.overdue
        return self.exchange

    def _busy_elsewhere(self) -> set[str]:
        """Sites that have a part in another run that is under way: what was measured says nothing about how long they need."""
        others = [facts for facts in list_runs(self.runs) if facts["state"] == "running"]
        return {str(site) for facts in others if facts["run_id"] != self.run.run_id for site in facts.get("sites", [])}

    def _came_late(self, due: Due, now: float) -> None:
        """Thank and name a site whose report came after nobody waited for it any more."""
        self.latecomers.append((due, now - due.sent))
        # How long a private step takes says how many patients were drawn.
        late = round(now - due.given_up, 1) if self.study.privacy == "none" else None
        if isinstance(due.order, TrainOrder):
            self.run.note_late(due.order.round, due.site, late)
        told = {} if late is None else {"seconds": late}
        self.tell("late", site=due.site, round=due.order.round, stage=due.order.kind, **told)

    def _gone(self) -> dict[str, str]:
        return dict.fromkeys(self.parties.revoked(), CertificateRevoked.code)

    def _order(self, kind: type[Kinds], task: Task, number: int, **more: Any) -> Kinds:
        order = kind(
            study=self.study.digest,
            run=self.run.run_id,
            round=task.round,
            attempt=self.run.attempt,
            sum=number,
            issued=int(time.time()),
            signature=b"",
            **more,
        )
        return order.signed(self.signing)

    def _work_order(self, task: Task, participants: Names, shares: bytes) -> WorkOrder:
        following = task.afterwards is not None and bool(participants)
        more = {"participants": participants, "shares": shares, "keys_next": following, **task.more}
        return self._order(task.kind, task, self.number, model=task.model, scale=task.scale, **more)

    def _encoding(self, task: Task, sites: int) -> Encoding:
        values = contributions.values_of(self.study, task.name, task.model.size)
        counts = contributions.count_of(self.study, task.name)
        bits = contributions.bits_of(self.study, task.name, task.round)
        return Encoding(values=values, counts=counts, bits=bits, scale=task.scale, sites=sites)

    def _require(self, here: Collection[str], least: int, missing: Mapping[str, str]) -> None:
        """Raise SitesAway, or QuorumLost where waiting is no use, if fewer than `least` sites are `here`."""
        if len(here) < least:
            reasons = ", ".join(f"{site}: {reason}" for site, reason in sorted(missing.items()))
            sentence = f"{len(here)} of {least} needed sites reported ({reasons})"
            away = sorted(site for site, reason in missing.items() if reason in COMES_BACK)
            raise SitesAway(sentence, away) if len(here) + len(away) >= least else QuorumLost(sentence)

    def _total(
        self, task: Task, encoding: Encoding, opened: Vector, arrivals: Arrivals, missing: dict[str, str]
    ) -> Total:
        decoded, names = encoding.decode(opened), sorted(arrivals.seconds)
        mean = _of_sites(contributions.read(self.study, task.name, decoded.values, decoded.counts), len(names))
        peak = float(max(decoded.values.max(initial=0.0), -decoded.values.min(initial=0.0)))
        absent = {site: why for site, why in missing.items() if site in task.sites and site not in names}
        seconds = {site: arrivals.seconds[site] for site in names}
        return Total(mean, names, absent, seconds, decoded.clipped, peak, arrivals.figures)


class OpenSumming(Summing):
    """Sums of contributions that the coordinator sees one by one: sealed for it alone on the way, or plain.

    It keeps none of them, but for a robust strategy, until the round is done: 4 bytes for each weight and site.
    """

    def __init__(self, grid: Grid, run: Run, home: Home) -> None:
        super().__init__(grid, run, home)
        self.sightings = Sightings()

    def _attempt(self, task: Task) -> Total:
        ready, arrivals = self._choose(task), Arrivals()
        self.number += 1
        order = self._work_order(task, (), b"")
        most = self.study.sum_sites if task.name == "train" else len(self.study.all_sites)
        encoding = self._encoding(task, most)
        total, alone = encoding.zeros(), dict[str, Contribution]()
        gathering = self._gather({site: Call(order, node) for site, node in ready.items()}, order.kind)
        for site, report in gathering.reports():
            if isinstance(report, WorkReport):
                with _dropping(gathering, site):
                    words, its = self._checked(task, encoding, order, report)
                    total.add(words)
                    if task.name == "train":
                        self.sightings.see(site, task.round, its.update)
                    if self.study.strategy.robust and task.name == "train":
                        alone[site] = its
                    arrivals.add(site, report, self.tell)
        missing = self.offline | gathering.missing
        for odd in self.sightings.judge():
            self.tell("flagged", **odd)
        self._require(arrivals.seconds, task.least, missing)
        opened = self._total(task, encoding, total, arrivals, missing)
        if task.name == "train":
            self.sightings.close(opened.mean.update)
        if alone:
            opened.updates = {site: its.update for site, its in alone.items()}
            # Of the middle site: the largest of all would let one site coarsen everybody's words, round after round.
            opened.peak = float(np.median([np.abs(its.update).max() * its.cases for its in alone.values()]))
        return opened

    def _checked(
        self, task: Task, encoding: Encoding, order: WorkOrder, report: WorkReport
    ) -> tuple[Vector, Contribution]:
        """One site's words, and what they say; under masks only what their sum says can be held against itself."""
        sealed = self.study.protection == "sealed"
        packed = keys.unseal(self.aggregator, report.vector, order.about(report.site)) if sealed else report.vector
        vector = encoding.vector_of(packed)
        alone = encoding.zeros()
        alone.add(vector)
        decoded = encoding.decode(alone)
        values = decoded.values if task.name == "train" else np.zeros(encoding.values)
        return vector, _of_sites(contributions.read(self.study, task.name, values, decoded.counts), 1)


class MaskedSumming(Summing):
    """Sums under masks: `privacy.secagg` decides what is right, this class carries the messages."""

    def __init__(self, grid: Grid, run: Run, home: Home) -> None:
        super().__init__(grid, run, home)
        self.roster = {site: keys.load_point(point) for site, point in self.study.roster.items()}
        self.upcoming: Aggregator | None = None
        self.expelled: dict[str, str] = {}  # sites whose shares were of no use, with the code of the reason
        self.refused: dict[str, str] = {}  # who had no part in preparing the sum that comes, and why

    def _begin_anew(self) -> None:
        super()._begin_anew()
        self.upcoming = None

    def _attempt(self, task: Task) -> Total:
        ready = self._choose(task, self.expelled)
        current = self._prepared(task, ready) or self._agree_on_keys(task, ready)
        participants, shares = current.close_shares()
        order, encoding = self._work_order(task, participants, shares), self._encoding(task, len(participants))
        current.start(order.body(), encoding)
        calls = {site: Call(order, ready[site]) for site in participants if site in ready}
        following = None if task.afterwards is None else self._aggregator(self.number + 1)
        calls |= self._invitations(task, calls)
        absent = {site: self.refused.get(site, "joining") for site in ready if site not in participants}
        gathering, arrivals = self._collect(task, calls, current, following, encoding)
        current.close_vectors()
        opened = self._unmask(task, current, following, {site: call.node for site, call in calls.items()})
        missing = self.offline | absent | gathering.missing | self.expelled
        return self._total(task, encoding, opened, arrivals, missing)

    def _prepared(self, task: Task, ready: Nodes) -> Aggregator | None:
        """The sum that the sites prepared while they closed the one before, if enough of them are here.

        For the last sum, all of them: there is no later one for those that were slow, as a site is that only evaluates and
        reads its images for the first time.
        """
        upcoming, self.upcoming = self.upcoming, None
        if upcoming is None or not upcoming.shared_by(ready):
            return None
        if task.afterwards is None and not set(ready) <= set(upcoming.ready):
            return None
        self.number = upcoming.place.sum
        return upcoming

    def _agree_on_keys(self, task: Task, ready: Nodes) -> Aggregator:
        """The two exchanges before the first sum of an attempt: keys, then encrypted shares."""
        self.number += 2  # a number that no site has made keys for, whatever was prepared and given up before
        current, order = self._aggregator(self.number), self._order(KeysOrder, task, self.number)
        gathering = self._gather({site: Call(order, node) for site, node in ready.items()}, order.kind)
        for site, report in gathering.reports():
            if isinstance(report, KeysReport):
                with _dropping(gathering, site):
                    current.add_keys(site, report.keys)
                    self.tell("site", site=site, stage=report.kind, seconds=round(report.seconds, 3))
        self.refused = gathering.missing
        self._require(current.keyed, max(task.least, current.least), self.offline | self.expelled | self.refused)
        self.refused |= self._exchange_shares(task, self.number - 1, (), current, ready)
        if not current.shared_by(ready):
            raise TooFewSurvivors(f"only {len(current.ready)} sites sent the shares that a sum needs")
        return current

    def _invitations(self, task: Task, calls: dict[str, Call]) -> dict[str, Call]:
        """Orders to make keys of the next sum, for sites that will be wanted there and are not in this one."""
        after = task.afterwards or {}
        wanted = {site: node for site, node in after.items() if site not in calls and site not in self.expelled}
        if not wanted:
            return {}
        online, order = set(self.grid.get_node_ids()), self._order(KeysOrder, task, self.number + 1)
        return {site: Call(order, node) for site, node in wanted.items() if node in online}

    def _collect(
        self,
        task: Task,
        calls: dict[str, Call],
        current: Aggregator,
        following: Aggregator | None,
        encoding: Encoding,
    ) -> tuple[Gathering, Arrivals]:
        """The first exchange: masked vectors, and keys of the next sum."""
        arrivals, stage, self.refused = Arrivals(), next(iter(calls.values())).order.kind, {}
        working = {site for site, call in calls.items() if isinstance(call.order, WorkOrder)}
        gathering = self._gather(calls, stage, lambda: working <= {*gathering.missing, *arrivals.seconds})
        for site, report in gathering.reports():
            with _dropping(gathering, site):
                if isinstance(report, WorkReport):
                    current.add_vector(site, encoding.vector_of(report.vector), report.vouch)
                    arrivals.add(site, report, self.tell)
            wanted = task.afterwards is not None and site in task.afterwards  # others were asked by the same order
            if following is not None and wanted and isinstance(report, WorkReport | KeysReport):
                try:
                    following.add_keys(site, report.keys)
                except (ProtectionError, MessageMalformed) as error:
                    self.refused[site] = error.code  # its vector counts, and it is not in the next sum
        return gathering, arrivals

    def _unmask(self, task: Task, current: Aggregator, following: Aggregator | None, nodes: Nodes) -> Vector:
        """The second exchange: shares that open this sum, and encrypted shares of the next one."""
        self.refused |= self._exchange_shares(task, self.number, current.survivors, following, nodes, current)
        try:
            opened = current.finish()
        except ShareInvalid:
            # Where others outvote a wrong share it does no harm; where it spoilt the sum, the next attempt is without its site.
            self.expelled |= current.wrong
            raise
        finally:
            for site, code in current.wrong.items():
                self.tell("wrong_share", site=site, reason=code)
        self.upcoming = following
        return opened

    def _exchange_shares(
        self,
        task: Task,
        number: int,
        survivors: Names,
        following: Aggregator | None,
        nodes: Nodes,
        current: Aggregator | None = None,
    ) -> dict[str, str]:
        """Orders to unmask `current`, if there is one, with the keys of `following`; who did not answer well, and why."""
        more: dict[str, Any] = {"members": (), "keys": b""}
        if following is not None and len(following.keyed) >= following.least:
            more = {"members": following.keyed, "keys": following.close_keys(survivors)}
        more |= {"survivors": survivors, "vouches": current.vouches if current is not None else b""}
        order = self._order(UnmaskOrder, task, number, **more)
        calls = {site: Call(order, nodes[site]) for site in sorted({*survivors, *order.members})}

        def enough() -> bool:
            prepared = following is None or not order.members or following.shared_by(nodes)
            return prepared and (current is None or current.enough)

        gathering = self._gather(calls, order.kind, enough)
        for site, report in gathering.reports():
            if isinstance(report, UnmaskReport):
                with _dropping(gathering, site):
                    if current is not None and site in survivors:
                        current.add_revealed(site, report.revealed)
                    if following is not None and site in order.members:
                        following.add_shares(site, report.sealed)
                    self.tell("site", site=site, stage=report.kind, seconds=round(report.seconds, 3))
        return gathering.missing

    def _aggregator(self, number: int) -> Aggregator:
        place = Place(self.study.digest, self.run.run_id, self.run.attempt, number)
        return Aggregator(place, self.roster, self.study.participation.quorum)


def build(grid: Grid, run: Run, home: Home) -> Summing:
    """The sums of a run, protected as its study says."""
    return (MaskedSumming if run.study.protection == "masked" else OpenSumming)(grid, run, home)


def first_scale(study: Study) -> int:
    """The power of two of a run's first encoding, before anything is known of the values.

    A sum of private gradients has whole numbers in it from the beginning: they are carried as they are.
    Leaves room for cases times change of one weight up to 2**(bits/2 - 2): 16,384 with 32, which are the fewest in a first round.
    """
    if study.strategy.name == "fedsgd":
        return GRID_BITS
    bits = contributions.bits_of(study, "train", 1)
    return _fitting(study, 2.0 ** (bits // 2 - 2), bits)


def next_scale(study: Study, total: Total, scale: int) -> int:
    """The power of two of the next round's encoding, from the largest value of this round's sum.

    It fits if one site alone made twice that value; then nothing is clipped unless sites pull against each other more than
    that, which the count of clipped values shows. Raised or lowered by one site's lies, it costs precision, never secrecy.
    Words of 16 bits have none to spare for that (`_narrow`).
    A robust strategy promises more: there it follows the middle site, with room for others that have more cases, and what a site
    says of its clipped values moves nothing.
    """
    if study.strategy.name == "fedsgd":
        return scale
    if study.strategy.robust:
        return _fitting(study, ROBUST_ROOM * total.peak) if total.peak else min(SCALE_MAX, scale + 4)
    if study.encoding_bits == 16 and total.peak:
        return _narrow(study, total, scale)
    if total.clipped:
        return max(-SCALE_MAX, scale - 4)
    return _fitting(study, 2 * total.peak) if total.peak else min(SCALE_MAX, scale + 4)


def _narrow(study: Study, total: Total, scale: int) -> int:
    """`next_scale` of words of 16 bits, where room for what no site makes costs precision.

    At once: room for twice the peak, halved for each four times as many sites from 16 on, since sites that differ by chance
    alone add up to a sum that is larger than the part of one by the root of their number. Then one bit finer after each round in
    which nothing was clipped, to room for eight even shares of the peak, and one bit coarser after one with a little clipped.
    """
    if total.clipped:
        little = total.clipped * CLIPPED_PART <= len(total.contributors) * total.mean.update.size
        return max(-SCALE_MAX, scale - (1 if little else 4))
    sites = study.sum_sites
    safe = _fitting(study, math.ldexp(total.peak, 1 - max(0, (sites.bit_length() - 3) // 2)))
    finest = _fitting(study, min(2.0, 8 / sites) * total.peak)
    return max(safe, min(finest, scale + 1))


def _fitting(study: Study, largest: float, bits: Literal[16, 24, 32, 64] | None = None) -> int:
    """The largest power of two that `largest`, times two to it, fits with: found without a rounding."""
    limit = Encoding(values=0, counts=0, bits=bits or study.encoding_bits, scale=0, sites=study.sum_sites).limit
    scale = limit.bit_length() - math.frexp(largest)[1]
    if math.ldexp(largest, scale) > limit:
        scale -= 1
    return max(-SCALE_MAX, min(SCALE_MAX, scale))


def timeout_of(study: Study) -> float:
    """Most seconds after which a stage of a round goes on without the sites that have not reported (`fl_server.pace`)."""
    return float(study.participation.round_timeout_s)


def _of_sites(contribution: Contribution, sites: int) -> Contribution:
    """`contribution`, if it can be the sum of so many sites; raises MessageMalformed."""
    if contribution.groups is not None:
        contribution.groups.require_of(sites)
    if contribution.sheet.overlaps is not None:
        contribution.sheet.overlaps.require_of(sites)
    return contribution


@contextlib.contextmanager
def _dropping(gathering: Gathering, site: str) -> Iterator[None]:
    """Whatever is wrong with the report of one site costs that site its place in the sum, and no other."""
    try:
        yield
    except IsocenterError as error:
        gathering.drop(site, error.code)
