"""What a masked round costs for so many sites, parameters and seconds of work over such a line: `fl-study cost`.

A model with few constants, each measured (docs/benchmarks.md says where and how): for orders of magnitude, and for what breaks
first. It counts one training round of a masked study: the order down, local work, the masked vector up, and a second exchange
that opens the sum. All sites share the coordinator's line, and each has one of the same width to itself. Times are those of a
machine that does nothing else.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fl_server.doorbell import ORDERS_BYTES_MAX
from privacy.sharing import HOLDERS_MAX, Encoding, degree
from privacy.wire import VECTOR_MAX

MODEL_BYTES = 4  # of a parameter on its way down
OVERHEAD = 1.002  # TLS, heads, Flower's envelopes: measured 1.0016 of 42 MB and 1.0017 of 56 MB
FIXED_BYTES = 12_000  # of a round and site: the second exchange, keys, looks and heartbeats; grows with peers
PEER_BYTES = 700  # of each peer: signed keys down, an encrypted share each way, the shares that open the sum
REQUESTS_S = 0.04  # of a site's eight requests in a round, at the coordinator: 5 ms each
TRIPS = 8  # ways there and back in a round: two exchanges, each an order and a report, and TCP's growing windows

SITE_S = {"receive and check": 4.1e-9, "encode": 1.2e-9, "pack and send": 6.5e-9}
"""Processor seconds of a parameter at a site, beside masks: 7 and 30 million parameters, as everything below."""
MASK_S = 0.6e-9  # of a parameter and peer, at the site; the coordinator takes one mask of each survivor off
COORDINATOR_ROUND_S = {"sign and send": 8.3e-9, "decode and next model": 2.4e-9, "checkpoint": 5.7e-9}
COORDINATOR_REPORT_S = {"receive": 1.3e-9, "add": 0.4e-9, "unmask": 0.6e-9}
"""Processor seconds of a parameter: once a round, and for each report."""
TLS_S = 0.1e-9  # of a byte: AES-256-GCM in records of 16 KiB
COORDINATOR_BASE, SITE_BASE = 480 * 2**20, 440 * 2**20  # bytes of the processes before a model comes
COORDINATOR_COPIES, SITE_COPIES = 8, 9  # of the model as float32, while a round is made
Load = Literal["local work", "line", "coordinator's processor", "site's processor", "latency"]


@dataclass(frozen=True)
class Setting:
    """What is asked about. `images_s`: seconds of local work; `mbit`: of the coordinator's line and of each site's."""

    sites: int
    parameters: int
    work_s: float = 30.0
    mbit: float = 100.0
    latency_ms: float = 50.0
    bits: Literal[16, 24, 32, 64] = 32


@dataclass(frozen=True)
class Cost:
    """Of one round: seconds and what they are spent on, bytes, memory; `limits`: what would break, in sentences."""

    round_s: float
    parts_s: Mapping[str, float]
    dominated_by: str
    site_bytes: int
    coordinator_bytes: int
    coordinator_memory: int
    site_memory: int
    limits: list[str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def predict(setting: Setting, timeout_s: float = 3600.0, counts: int = 2006) -> Cost:
    """What one round costs. `timeout_s`: the study's `round_timeout_s`; `counts`: whole numbers that a report sums."""
    sites, size = setting.sites, setting.parameters
    peers = degree(min(sites, HOLDERS_MAX))
    vector = Encoding(size, counts, setting.bits, 0, min(sites, HOLDERS_MAX)).size
    down, up = MODEL_BYTES * size * OVERHEAD, vector * OVERHEAD
    beside = FIXED_BYTES + PEER_BYTES * peers
    line = 8 * max(sites * (down + beside / 2), down) / (setting.mbit * 1e6)
    line += 8 * max(sites * (up + beside / 2), up) / (setting.mbit * 1e6)
    at_site = (
        size * (sum(SITE_S.values()) + MASK_S) + (down + up) * TLS_S
    )  # masks of peers are made while the site trains
    masks = size * MASK_S * peers
    report = size * sum(COORDINATOR_REPORT_S.values()) + (down + up) * TLS_S + REQUESTS_S
    at_coordinator = size * sum(COORDINATOR_ROUND_S.values()) + sites * report
    parts: dict[str, float] = {
        "local work": max(setting.work_s, masks),
        "line": line,
        "site's processor": at_site,
        "coordinator's processor": at_coordinator,
        "latency": TRIPS * setting.latency_ms / 1000,
    }
    # Reports are taken in while others are under way, so line and coordinator's processor go on at the same time.
    slower = max(("line", "coordinator's processor"), key=lambda name: parts[name])
    total = parts["local work"] + parts[slower] + parts["site's processor"] + parts["latency"]
    held = vector * max(0, sites - 1)  # reports that are under way at the same time, when all sites end together
    memory = COORDINATOR_BASE + COORDINATOR_COPIES * MODEL_BYTES * size + held
    return Cost(
        round_s=total,
        parts_s=parts,
        dominated_by=max(parts, key=lambda name: parts[name]),
        site_bytes=round(down + up + beside),
        coordinator_bytes=round(sites * (down + up + beside)),
        coordinator_memory=memory,
        site_memory=SITE_BASE + SITE_COPIES * MODEL_BYTES * size,
        limits=_limits(setting, total, timeout_s, memory, held),
    )


def _limits(setting: Setting, total: float, timeout_s: float, memory: int, held: int) -> list[str]:
    """What would break, the first first."""
    found = []
    order = MODEL_BYTES * setting.parameters
    if setting.sites > HOLDERS_MAX:
        found.append(f"a sum has at most {HOLDERS_MAX} sites")
    if setting.parameters > VECTOR_MAX or order > ORDERS_BYTES_MAX:
        found.append(f"a model has at most {VECTOR_MAX:,} parameters")
    if total > timeout_s:
        found.append(
            f"a round of {total:,.0f} s is longer than round_timeout_s, {timeout_s:,.0f} s: sites would be left out"
        )
    if held > 2**32:
        found.append(
            f"the coordinator needs {memory / 2**30:,.0f} GiB of memory, "
            f"{held / 2**30:,.0f} GiB of it for reports that come at once"
        )
    return found
