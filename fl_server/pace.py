"""How long a site is waited for, by its own measured speed: one rule, without settings.

A site has three times the median of its last five reports of that kind, and a minute on top; never longer than the study's
`round_timeout_s`. It has all of `round_timeout_s` for its first report of a kind, and again after it was missing for whatever
reason, because a site that comes back reads its images anew. A report that comes too late for its sum still says how long that
took, and counts as the site's first one again. What is measured is the time from the order to the report as the
coordinator sees it, the way included; it is kept in memory only, and a coordinator that starts again measures anew.
"""

from collections import defaultdict, deque
from collections.abc import Mapping
from statistics import median

from privacy.wire import EvaluateOrder, Order

LAST = 5  # reports: enough that one slow moment of a machine changes nothing
TIMES = 3.0  # slower than usual: another program on the machine halves its speed, and rarely more
ROOM_S = 60.0  # for what does not grow with the work: a restart of a node, a line that is away for a moment


class Pace:
    """What was measured in one run. `most_s`: the study's `round_timeout_s`."""

    def __init__(self, most_s: float) -> None:
        self.most_s = most_s
        self._took: dict[tuple[str, str], deque[float]] = defaultdict(lambda: deque(maxlen=LAST))

    def limit_s(self, site: str, order: Order) -> float:
        """Seconds that the report of `site` to `order` is waited for."""
        known = self._took.get((site, _kind(order)))
        return min(self.most_s, TIMES * median(known) + ROOM_S) if known else self.most_s

    def note(self, orders: Mapping[str, Order], took: Mapping[str, float], missing: Mapping[str, str]) -> None:
        """Learn from one exchange: seconds by site, and who is missing, whose earlier reports say nothing any more."""
        for site, seconds in took.items():
            self._took[site, _kind(orders[site])].append(seconds)
        for site in missing:
            self.forget(site)

    def forget(self, site: str) -> None:
        for key in [key for key in self._took if key[0] == site]:
            del self._took[key]


def _kind(order: Order) -> str:
    """Work of one kind takes about as long each time: a split has its own number of images."""
    return f"{order.kind} {order.split}" if isinstance(order, EvaluateOrder) else order.kind
