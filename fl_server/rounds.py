"""One exchange with the sites: choose who is asked, send orders, take reports as they come, name who is missing and why.

Orders go to the sites in `nodes` (consenting sites) and to nobody else; Flower's strategies would send to every connected node.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from flwr.app import Message
from flwr.app.error import Error
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from privacy import tracing
from privacy.errors import MessageMalformed, QuorumLost, VersionSkew
from privacy.wire import (
    REPORTS,
    EvaluateOrder,
    EvaluateReport,
    Order,
    Refusal,
    Report,
    UnmaskOrder,
    WorkOrder,
    WorkReport,
    decode,
)

PAUSE_FIRST_S, PAUSE_MOST_S = 0.02, 0.1
"""Between two looks for reports; the SuperLink itself holds a look that finds nothing (`fl_server.doorbell`)."""
ONLINE_LOOK_S = 0.25
GRACE_S = 30.0
"""How long a round waits for consenting sites that are offline once the quorum is online: a node's restart takes less."""
LINGER_S = 10.0
"""How long a step that needs no images waits for the last sites once there are enough: it takes them milliseconds."""
GONE_LOOK_S = 1.0
"""How often a round looks whether somebody it waits for was revoked."""

Tell = Callable[..., None]


class Roll(Protocol):
    """Who is online; a Grid is one."""

    def get_node_ids(self) -> Iterable[int]:
        """Ids of the nodes that are online now."""


def clock_of(grid: object) -> Callable[[], float]:
    """What a stage is timed by: time that passes; in a simulation the grid's own clock (`fl_server.crew`)."""
    clock: Callable[[], float] = getattr(grid, "clock", time.monotonic)
    return clock


def choose(
    grid: Roll, nodes: dict[str, int], quorum: int, timeout_s: float, tell: Tell, away: frozenset[str] = frozenset()
) -> dict[str, int]:
    """The consenting sites that are online, at least `quorum`; QuorumLost if there are fewer after `timeout_s`.

    Sites that are offline are waited for until GRACE_S, but not those in `away`, which were offline the last time already: a
    dead site costs one wait, not one in each round, and takes part again as soon as it is back.
    """
    began, told = time.monotonic(), False
    while True:
        online = set(grid.get_node_ids())
        ready = {site: node for site, node in nodes.items() if node in online}
        waited = time.monotonic() - began
        if len(ready) >= quorum and (set(nodes) <= set(ready) | away or waited > GRACE_S):
            return ready
        missing = sorted(set(nodes) - set(ready))
        if waited > timeout_s:
            raise QuorumLost(f"{len(ready)} of {quorum} sites needed are online; offline: {', '.join(missing)}")
        if not told and waited > 1:
            tell("waiting", sites=missing)
            told = True
        time.sleep(ONLINE_LOOK_S)


@dataclass(frozen=True)
class Call:
    """One order to one site's node. `limit_s`: how long its report is waited for, where that is less than the round's timeout.

    `busy`: the node may be at work for another run and answer this order after that, so it is waited for to its limit.
    """

    order: Order
    node: int
    limit_s: float = math.inf
    busy: bool = False


@dataclass(frozen=True)
class Due:
    """A work order whose report was not waited for to its end. Moments are of the clock that does not jump."""

    site: str
    order: Order
    sent: float
    given_up: float


class Overdue:
    """Work of one run that came too late for its sum. `came` is told of each report that arrives after all; none is ever used.

    Whether a late report is there when the next sum begins depends on seconds. A model that it was added to could not be made
    a second time; under masks it could not be opened. So its sender is named, and its time teaches how long to wait (`Pace`).
    """

    def __init__(self, came: Callable[[Due, float], None]) -> None:
        self.came, self._due = came, dict[str, Due]()

    @property
    def message_ids(self) -> list[str]:
        return list(self._due)

    def give_up(self, message_id: str, due: Due) -> None:
        """Nobody waits any more for what `due` is about."""
        self._due[message_id] = due

    def take(self, message: Message) -> None:
        """A reply that no exchange waits for: noted if it is the report that an overdue order asked for, and forgotten."""
        due = self._due.pop(message.metadata.reply_to_message_id, None)
        if due is None or message.has_error():
            return  # a second reply, or Flower's word that none will come
        try:
            report: Report = decode(message, *REPORTS)
        except MessageMalformed:
            return
        if isinstance(report, WorkReport) and report.site == due.site and report.naming() == due.order.naming():
            self.came(due, time.monotonic())


class Gathering:
    """Orders on their way, one to each site. Iterate `reports()` once; then `missing` says who did not report, and why.

    With `enough`, sites without other work that are missing LINGER_S after it became true are not waited for; nor are those that
    `gone` names meanwhile, with its code as the reason; nor, where no images are needed, those that are offline for GRACE_S.
    `took`: seconds from the orders to each report. `overdue`: what earlier exchanges gave up, and this one will.
    """

    def __init__(
        self,
        grid: Grid,
        calls: Mapping[str, Call],
        timeout_s: float,
        tell: Tell,
        enough: Callable[[], bool] | None = None,
        gone: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        self.grid, self.calls, self.timeout_s, self.tell, self.enough = grid, calls, timeout_s, tell, enough
        self.gone = gone
        self.missing: dict[str, str] = {}
        self.took: dict[str, float] = {}
        self.offline_since: dict[str, float] = {}
        self.overdue = Overdue(lambda due, now: None)

    def reports(self) -> Iterator[tuple[str, Report]]:
        """(site, report) in the order of arrival. Each report is dropped here once the caller has taken it."""
        began_ns = time.time_ns()
        try:
            yield from self._reports()
        finally:
            if self.calls:
                order = next(iter(self.calls.values())).order
                tracing.stage(order.kind, order.round, began_ns, self.took, self.missing)

    def _reports(self) -> Iterator[tuple[str, Report]]:
        clock, pause = clock_of(self.grid), PAUSE_FIRST_S
        began = clock()
        look = began + GONE_LOOK_S
        ends = {site: began + min(self.timeout_s, call.limit_s) for site, call in self.calls.items()}
        waiting = self._send()
        while waiting:
            arrived = list(self.grid.pull_messages([*waiting, *self.overdue.message_ids]))
            came = bool(arrived)
            pause = PAUSE_FIRST_S if came else min(pause * 1.3, PAUSE_MOST_S)
            while arrived:
                message = arrived.pop()
                site = waiting.pop(message.metadata.reply_to_message_id, None)
                if site is None:
                    self.overdue.take(message)
                    continue
                if (report := self._accept(site, message)) is not None:
                    self.took[site] = clock() - began
                    yield site, report
            now = clock()
            if self.enough is not None and self.enough():
                quick = {site: min(end, now + LINGER_S) for site, end in ends.items() if not self.calls[site].busy}
                ends, self.enough = ends | quick, None
            if waiting and now > look:
                look = now + GONE_LOOK_S
                waiting = self._without(waiting, {**self._left(waiting.values(), now), **self.gone()})
            late = {message_id: site for message_id, site in waiting.items() if now > ends[site]}
            for message_id, site in late.items():
                if isinstance(order := self.calls[site].order, WorkOrder):
                    self.overdue.give_up(message_id, Due(site, order, began, now))
            waiting = self._without(waiting, dict.fromkeys(late.values(), "timeout"))
            if waiting and not came:  # the next report may be here already
                time.sleep(pause)

    def _without(self, waiting: dict[str, str], gone: Mapping[str, str]) -> dict[str, str]:
        for site in sorted({*gone} & {*waiting.values()}):
            self.drop(site, gone[site])
        return {message_id: site for message_id, site in waiting.items() if site not in gone}

    def _left(self, waiting: Iterable[str], now: float) -> dict[str, str]:
        """Who of `waiting` has a step to do that takes milliseconds, and has been offline for GRACE_S."""
        quick = {site: self.calls[site].node for site in waiting if isinstance(self.calls[site].order, UnmaskOrder)}
        online = set(self.grid.get_node_ids()) if quick else set()
        since = self.offline_since
        self.offline_since = {site: since.get(site, now) for site, node in quick.items() if node not in online}
        return {site: "offline" for site, began in self.offline_since.items() if now - began > GRACE_S}

    def drop(self, site: str, reason: str) -> None:
        """Note why `site` has no part in what follows; also for a report that the caller found wanting."""
        self.missing[site] = reason
        self.tell("site_missing", site=site, reason=reason)

    def _send(self) -> dict[str, str]:
        """Push the orders; message id -> site. One record for equal orders: Flower hashes and stores it once."""
        orders = {id(call.order): call.order for call in self.calls.values()}
        records = {name: order.to_records() for name, order in orders.items()}
        messages = [
            Message(
                records[id(call.order)],
                dst_node_id=call.node,
                message_type=call.order.message_type,
                ttl=self.timeout_s + 60,
            )
            for call in self.calls.values()
        ]
        waiting: dict[str, str] = {}
        for site, message_id in zip(self.calls, self.grid.push_messages(messages), strict=True):
            if message_id:
                waiting[message_id] = site
            else:
                self.drop(site, "unavailable")
        return waiting

    def _accept(self, site: str, message: Message) -> Report | None:
        """The report in `message`, or None after noting the reason that there is none."""
        if message.has_error():
            self.drop(site, flower_reason(message.error))
            return None
        try:
            report: Report = decode(message, *REPORTS)
            if isinstance(report, Refusal):
                self.drop(site, report.code)
                return None
            self._check(site, report)
        except MessageMalformed as error:
            self.drop(site, error.code)
            return None
        return report

    def _check(self, site: str, report: Report) -> None:
        """Raise MessageMalformed unless `report` answers exactly this order to exactly this site."""
        order = self.calls[site].order
        if report.site != site or report.naming() != order.naming():
            raise MessageMalformed("the report answers another order")
        if report.kind != f"{order.kind}-report":
            raise MessageMalformed("the report is of another kind than the order")
        if isinstance(order, EvaluateOrder) and isinstance(report, EvaluateReport) and report.split != order.split:
            raise MessageMalformed("the report is of another split than the order")


def flower_reason(error: Error) -> str:
    """Flower's numeric error as one of our words; its text is never read: it may hold anything."""
    unavailable = (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE)
    if error.code == ErrorCode.MOD_FAILED_PRECONDITION:  # what a node answers to an order of another wire version
        return VersionSkew.code
    return "unavailable" if error.code in unavailable else "internal"
