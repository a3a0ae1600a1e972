"""What a node tells its hospital's own monitoring, on loopback and only if asked to: /metrics, /healthz, /readyz.

Numbers about the node and its budget, none about a patient; nothing of it leaves through the node. `start` it with a port; a node
without one listens nowhere.
"""

import logging
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

from prometheus_client import CONTENT_TYPE_LATEST
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector, CollectorRegistry

from fl_client.policy import Pause
from privacy import keys
from privacy.errors import DocumentError, IsocenterError

LOOPBACK = "127.0.0.1"
REQUEST_S = 5.0  # for each piece of a request
CALLERS_MAX = 8
BUDGET_S = 600.0  # ε is asked of the ledger so often, because it takes a moment
M = TypeVar("M")
log = logging.getLogger("isocenter.node")


@dataclass(eq=False)
class Vitals(Collector):
    """What the node does, counted since it started. Told by the node's thread, read by those of callers."""

    home: Path
    connected: bool = False
    busy: bool = False
    last_order_s: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    _budget: tuple[float, dict[str, float]] = (0.0, {})
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _server: ThreadingHTTPServer | None = None

    def counting(self, work: Callable[[M], M], outcome: Callable[[M], str]) -> Callable[[M], M]:
        """`work`, with what came of each order and the time it took counted here. `outcome`: an enumerated word."""

        def counted(order: M) -> M:
            began, self.busy = time.monotonic(), True
            self.last_order_s = time.time()
            try:
                reply = work(order)
            finally:
                self.busy = False
            with self._lock:
                self.outcomes[outcome(reply)] += 1
                self.seconds += time.monotonic() - began
            return reply

        return counted

    def collect(self) -> Iterator[Metric]:
        """The figures for one scrape."""
        yield _gauge("isocenter_node_connected", "1 if the node is connected to the gateway.", float(self.connected))
        yield _gauge("isocenter_node_busy", "1 while an order is carried out.", float(self.busy))
        yield _gauge("isocenter_node_paused", "1 if somebody at the site paused it.", float(self._paused()))
        yield _gauge("isocenter_node_last_order_timestamp_seconds", "When the last order came.", self.last_order_s)
        yield _gauge(
            "isocenter_node_certificate_end_timestamp_seconds", "End of the site's certificate.", self._certificate()
        )
        usage = shutil.disk_usage(self.home)
        yield _gauge("isocenter_node_disk_free_bytes", "Free bytes of the site's folder.", usage.free)
        yield _gauge("isocenter_node_disk_size_bytes", "Size of that file system.", usage.total)
        with self._lock:
            outcomes, seconds = dict(self.outcomes), self.seconds
        orders = CounterMetricFamily("isocenter_node_orders", "Orders by what came of them.", labels=["outcome"])
        for name, count in sorted(outcomes.items()):
            orders.add_metric([name], count)
        yield orders
        yield CounterMetricFamily("isocenter_node_work_seconds", "Seconds spent on orders.", value=seconds)
        share = GaugeMetricFamily(
            "isocenter_node_budget_charged_ratio", "Charged ε as a share of the cap in site.yaml.", labels=["cap"]
        )
        for name, value in self._shares().items():
            share.add_metric([name], value)
        yield share

    def _paused(self) -> bool:
        try:
            return Pause.open(self.home, time.time()) is not None
        except DocumentError:  # a site with a damaged pause does no work
            return True

    def _certificate(self) -> float:
        try:
            pem = (self.home / "keys" / "site.pem").read_bytes()
            return keys.load_certificate(pem).not_valid_after_utc.timestamp()
        except (OSError, IsocenterError):
            return 0.0

    def _shares(self) -> dict[str, float]:
        """Charged share of the caps of a year and of all time; as it was at most BUDGET_S ago, nothing if it is not known."""
        from fl_client.budget import open_budget

        at, found = self._budget
        if time.monotonic() - at > BUDGET_S or not found:
            try:
                budget = open_budget(self.home)
                found = {"year": budget.year / budget.caps["year"], "total": budget.total / budget.caps["total"]}
            except (IsocenterError, OSError, ZeroDivisionError):
                return {}
            self._budget = time.monotonic(), found
        return found

    def start(self, port: int) -> int:
        """Answer on loopback from now on; the port. Raises DocumentError if it is taken."""
        registry = CollectorRegistry()
        registry.register(self)
        try:
            self._server = _Server((LOOPBACK, port), _handler(self, registry))
        except OSError as error:
            raise DocumentError(
                f"cannot listen on {LOOPBACK}:{port}: {error.strerror}", remedy="Choose another --metrics-port."
            ) from None
        threading.Thread(target=self._server.serve_forever, name="vitals", daemon=True).start()
        return int(self._server.server_address[1])

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()


class _Server(ThreadingHTTPServer):
    """At most CALLERS_MAX callers at a time; others are hung up on."""

    daemon_threads = True

    def __init__(self, *given: Any) -> None:
        self._free = threading.BoundedSemaphore(CALLERS_MAX)
        super().__init__(*given)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.info("a caller of the metrics was lost", exc_info=True)


def _handler(vitals: Vitals, registry: CollectorRegistry) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = REQUEST_S
        server_version, sys_version = "isocenter", ""

        def do_GET(self) -> None:
            port = self.server.server_address[1]  # type: ignore[index]  # a TCP server has one
            if self.headers.get_all("host", []) not in [[f"{name}:{port}"] for name in (LOOPBACK, "localhost")]:
                self._say(421, b"not the name of this server\n")
            elif self.path == "/metrics":
                self._say(200, generate_latest(registry), CONTENT_TYPE_LATEST)
            elif self.path == "/healthz":
                self._say(200, b"ok\n")
            elif self.path == "/readyz":
                self._say(200, b"ready\n") if vitals.connected else self._say(503, b"not connected\n")
            else:
                self._say(404, b"not here\n")

        def _say(self, status: int, text: bytes, kind: str = "text/plain; charset=utf-8") -> None:
            self.send_response(status)
            for name, value in (
                ("content-type", kind),
                ("content-length", str(len(text))),
                ("cache-control", "no-store"),
            ):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *given: Any) -> None:
            pass

    return Handler


def _gauge(name: str, meaning: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, meaning, value=value)
