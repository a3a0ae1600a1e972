"""One exchange with the sites: choose who is asked, send orders, take reports as they come, name who is missing and why.

Orders go to the sites in `nodes` (consenting sites) and to nobody else; Flower's strategies would send to every connected node.
"""

import time
from collections.abc import Callable, Iterator

from flwr.app import Message
from flwr.app.error import Error
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from privacy.errors import MessageMalformed, QuorumLost
from privacy.wire import EvaluateReport, Order, Refusal, Report, TrainReport, decode

PAUSE_FIRST_S, PAUSE_MOST_S = 0.02, 0.1
"""Between two looks for reports; the SuperLink itself holds a look that finds nothing (`fl_server.doorbell`)."""
ONLINE_LOOK_S = 0.25
GRACE_S = 30.0
"""How long a round waits for consenting sites that are offline once the quorum is online: a node's restart takes less."""

Tell = Callable[..., None]


def choose(
    grid: Grid, nodes: dict[str, int], quorum: int, timeout_s: float, tell: Tell, away: frozenset[str] = frozenset()
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


class Gathering:
    """One order on its way to `nodes`. Iterate `reports()` once; then `missing` says who did not report, and why."""

    def __init__(self, grid: Grid, order: Order, nodes: dict[str, int], timeout_s: float, tell: Tell) -> None:
        self.grid, self.order, self.nodes, self.timeout_s, self.tell = grid, order, nodes, timeout_s, tell
        self.missing: dict[str, str] = {}

    def reports(self) -> Iterator[tuple[str, TrainReport | EvaluateReport]]:
        """(site, report) in the order of arrival. Each report is dropped here once the caller has taken it."""
        began, pause = time.monotonic(), PAUSE_FIRST_S
        waiting = self._send()
        while waiting:
            arrived = list(self.grid.pull_messages(list(waiting)))
            pause = PAUSE_FIRST_S if arrived else min(pause * 1.3, PAUSE_MOST_S)
            while arrived:
                message = arrived.pop()
                site = waiting.pop(message.metadata.reply_to_message_id, None)
                if site is None:
                    continue  # a second reply to the same order: the first one counted
                if (report := self._accept(site, message)) is not None:
                    self.tell("site", site=site, stage=report.kind, seconds=round(report.seconds, 3))
                    yield site, report
            if waiting and time.monotonic() - began > self.timeout_s:
                self.missing |= dict.fromkeys(waiting.values(), "timeout")
                break
            if waiting:
                time.sleep(pause)
        for site, reason in self.missing.items():
            self.tell("site_missing", site=site, reason=reason)

    def _send(self) -> dict[str, str]:
        """Push the order to every site; message id -> site. One record for all: Flower hashes and stores it once."""
        records, ttl = self.order.to_records(), self.timeout_s + 60
        messages = [Message(records, dst_node_id=n, message_type=self.order.kind, ttl=ttl) for n in self.nodes.values()]
        waiting: dict[str, str] = {}
        for site, message_id in zip(self.nodes, self.grid.push_messages(messages), strict=True):
            if message_id:
                waiting[message_id] = site
            else:
                self.missing[site] = "unavailable"
        return waiting

    def _accept(self, site: str, message: Message) -> TrainReport | EvaluateReport | None:
        """The report in `message` if it answers exactly this order; else the reason is noted."""
        if message.has_error():
            self.missing[site] = flower_reason(message.error)
            return None
        try:
            report: Report = decode(message, TrainReport, EvaluateReport, Refusal)
            if isinstance(report, TrainReport | EvaluateReport):
                self._check(site, report)
                return report
            self.missing[site] = report.code if isinstance(report, Refusal) else MessageMalformed.code
        except MessageMalformed as error:
            self.missing[site] = error.code
        return None

    def _check(self, site: str, report: TrainReport | EvaluateReport) -> None:
        """Raise MessageMalformed unless `report` answers exactly this order to exactly this site."""
        order = self.order
        answers = ("study", "run", "round", "attempt")
        if report.site != site or any(getattr(report, name) != getattr(order, name) for name in answers):
            raise MessageMalformed("the report answers another order")
        if report.kind != f"{order.kind}-report":
            raise MessageMalformed("the report is of another kind than the order")
        if isinstance(report, EvaluateReport) and report.split != getattr(order, "split", None):
            raise MessageMalformed("the report is of another split than the order")
        if isinstance(report, TrainReport) and report.cases < 1:
            raise MessageMalformed("an update of no cases")  # its weight would be nothing, and no strategy takes it
        if isinstance(report, TrainReport) and report.update.shape != order.model.shape:
            raise MessageMalformed("the update has another length than the model")


def flower_reason(error: Error) -> str:
    """Flower's numeric error as one of our words; its text is never read: it may hold anything."""
    unavailable = (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE)
    return "unavailable" if error.code in unavailable else "internal"
