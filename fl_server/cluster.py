"""A simulation's crew as Ray's actors, on the machines that Ray has: `fl-study simulate --backend ray` (isocenter[ray]).

Flower's own simulation runtime hands each message to whichever actor is free. The keys of a masked sum live in the memory of
one process, for that sum, so there a second message would not find them; here a site stays with its actor. What travels are the
same bytes as to a process of this machine, and an actor runs the code that is installed where it is: nothing is shipped to it.
The homes of the sites lie in a folder that all of Ray's machines see under the same path.

Ray sends no usage statistics, and opens no dashboard; one that is started here listens on loopback alone.
"""

import os
import pkgutil
import time
from typing import Any

from privacy.errors import DocumentError, RunError

MEMBER = "fl_client.rehearsal:member"
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # Ray's only way to hear nobody but this machine, on Linux too
STARTS_MAX = 3  # of an actor without a single answer: then it dies of something that a new one dies of too


class Member:
    """One actor: sites whose orders come as bytes and whose replies go as bytes."""

    def __init__(self, threads: int) -> None:
        os.environ.update(QUIET)
        self.reply = pkgutil.resolve_name(MEMBER)(threads)

    def answer(self, order: bytes) -> bytes:
        told: bytes = self.reply(order)
        return told


class Actors:
    """A crew of `size` actors; 0: one for each core that Ray has. `address`: Ray's head; empty: Ray is started here.

    A member that works on one order for longer than `most_s` is ended, as if it had died. Raises DocumentError without Ray.
    """

    def __init__(self, size: int, most_s: float, address: str = "") -> None:
        os.environ.update(QUIET if address else QUIET | LOOPBACK)  # read when Ray is imported
        try:
            import ray
        except ImportError:
            raise DocumentError(
                "this simulation wants Ray, which is not installed",
                remedy="Install it with: pip install 'isocenter[ray]'",
            ) from None
        self.ray, self.most_s = ray, most_s
        cores = len(os.sched_getaffinity(0))
        if address:
            ray.init(address=address, logging_level="ERROR", log_to_driver=False)
        else:
            ray.init(
                address="local",
                num_cpus=max(size, cores),
                include_dashboard=False,
                logging_level="ERROR",
                log_to_driver=False,
            )
        self.size = size or max(1, int(ray.cluster_resources().get("CPU", 1)))
        self.threads = 1 if address else max(1, cores // self.size)
        self.kind = ray.remote(num_cpus=1, max_restarts=0)(Member)
        self.members = [self.kind.remote(self.threads) for _ in range(self.size)]
        self.silent = [0] * self.size
        self.working: dict[Any, tuple[int, float]] = {}

    def give(self, member: int, order: bytes) -> None:
        self.working[self.members[member].answer.remote(order)] = member, time.monotonic()

    def take(self, timeout_s: float) -> list[tuple[int, bytes | None]]:
        here, _ = self.ray.wait([*self.working], num_returns=1, timeout=timeout_s)
        found: list[tuple[int, bytes | None]] = []
        for task in here:
            member, _ = self.working.pop(task)
            try:
                found.append((member, self.ray.get(task)))
                self.silent[member] = 0
            except self.ray.exceptions.RayError:
                self._replace(member)
                found.append((member, None))
        now = time.monotonic()
        for task in [task for task, (_, since) in self.working.items() if now - since > self.most_s]:
            member, _ = self.working.pop(task)
            self._replace(member)
            found.append((member, None))
        return found

    def _replace(self, member: int) -> None:
        self.ray.kill(self.members[member])
        self.silent[member] += 1
        if self.silent[member] >= STARTS_MAX:
            raise RunError(
                f"an actor of the simulation died {STARTS_MAX} times in a row",
                remedy="It may need more memory than its machine has: give a smaller --processes. Ray's logs say more.",
            )
        self.members[member] = self.kind.remote(self.threads)

    def close(self) -> None:
        self.ray.shutdown()
