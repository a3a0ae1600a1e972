"""Grids of a simulation: Flower's Grid without a network, over sites in this process or in a crew of others.

`MemoryGrid` answers in this process. `CrewGrid` hands orders to a crew: processes of this machine (`Processes`), or Ray's actors
(`fl_server.cluster`). A site stays with one member of the crew, because the keys of its masks are in that process and nowhere
else. What travels are Flower's own messages as bytes. A member that dies costs the site it worked for that sum, by name
(`unavailable`), and another takes its place; its other sites lost their keys, and get new ones as after a restart of a node.
"""

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

from flwr.app import Context, Message, RecordDict
from flwr.app.error import Error
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as Envelope
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run as FlowerRun

from privacy import parcels
from privacy.errors import RunError

LOOK_S = 0.5  # how often the run's events are looked at while everybody works
ROOT = Path(__file__).resolve().parent.parent
MEMBER = "from fl_client.rehearsal import serve; serve(*map(int, __import__('sys').argv[1:]))"


class LocalGrid(Grid):
    """What every grid of a simulation has in common: all sites are online, and there is one run.

    `clock` stands still: that sites wait for each other on one machine is no site's delay, so none is late.
    """

    def __init__(self, sites: dict[int, Path], look: Callable[[], None]) -> None:
        self.sites, self.look, self.sent = sites, look, 0

    def clock(self) -> float:
        return 0.0

    def get_node_ids(self) -> Iterable[int]:
        return list(self.sites)

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=node) for node in self.sites]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        names = []
        for message in messages:
            self.sent += 1
            names.append(f"message-{self.sent}")
            message.metadata.__dict__["_message_id"] = names[-1]
            self.take_on(message)
        return names

    def take_on(self, message: Message) -> None:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError("orders are pushed, and replies pulled as they come")

    def set_run(self, run: FlowerRun) -> None:
        raise NotImplementedError("a grid of a simulation has one run")

    @property
    def run(self) -> FlowerRun:
        raise NotImplementedError("a grid of a simulation has one run")

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise NotImplementedError("deprecated in Flower")


class MemoryGrid(LocalGrid):
    """Sites in this process: a pushed message is answered when its reply is asked for, one at a time."""

    def __init__(self, sites: dict[int, Path], look: Callable[[], None], client: ClientApp) -> None:
        super().__init__(sites, look)
        self.client, self.pending = client, dict[str, Message]()

    def take_on(self, message: Message) -> None:
        self.pending[message.metadata.message_id] = message

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self.look()
        for name in message_ids:
            if (message := self.pending.pop(name, None)) is not None:
                return [self.answer(message)]
        return []

    def answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        config: dict[str, bool | float | int | str] = {"site": str(self.sites[node])}
        return self.client(message, Context(1, node, config, RecordDict(), {}))


class Crew(Protocol):
    """Members, by number from 0, each of which answers one order at a time."""

    @property
    def size(self) -> int: ...

    def give(self, member: int, order: bytes) -> None:
        """Hand an order, as `order_of` makes it, to a member that is idle."""

    def take(self, timeout_s: float) -> list[tuple[int, bytes | None]]:
        """Replies that are here within `timeout_s`, by member; None of a member that died, and was replaced."""

    def close(self) -> None:
        """End every member."""


def order_of(home: Path, message: Message) -> bytes:
    """What a member gets: the home of the site that it is for the moment, and Flower's message to it."""
    return parcels.pack([os.fsencode(home), message_to_proto(message).SerializeToString()])


class CrewGrid(LocalGrid):
    """Sites in a crew: each has a queue at its member, which is given the next order when it answered the one before."""

    def __init__(self, sites: dict[int, Path], look: Callable[[], None], crew: Crew) -> None:
        super().__init__(sites, look)
        self.crew = crew
        self.queues: list[deque[Message]] = [deque() for _ in range(crew.size)]
        self.busy: dict[int, Message] = {}

    def take_on(self, message: Message) -> None:
        member = message.metadata.dst_node_id % self.crew.size
        self.queues[member].append(message)
        self._next(member)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self.look()
        if not self.busy:
            return []
        return [self._reply(member, answer) for member, answer in self.crew.take(LOOK_S)]

    def _next(self, member: int) -> None:
        if member not in self.busy and self.queues[member]:
            message = self.busy[member] = self.queues[member].popleft()
            self.crew.give(member, order_of(self.sites[message.metadata.dst_node_id], message))

    def _reply(self, member: int, answer: bytes | None) -> Message:
        asked = self.busy.pop(member)
        self._next(member)
        if answer is None:
            return Message(Error(ErrorCode.NODE_UNAVAILABLE, ""), reply_to=asked)
        return message_from_proto(Envelope.FromString(answer))


class Processes:
    """A crew of `size` processes on this machine, with an even share of its cores each.

    A member that works on one order for longer than `most_s` is ended, as if it had died.
    """

    STARTS_MAX = 3  # of a member without a single answer: then it dies of something that a new one dies of too

    def __init__(self, size: int, most_s: float) -> None:
        self.size, self.most_s = size, most_s
        self.threads = max(1, len(os.sched_getaffinity(0)) // size)
        self.members: list[_Member] = []
        self.silent = [0] * size
        for _ in range(size):
            self.members.append(_Member(self.threads))

    @property
    def pids(self) -> Sequence[int]:
        return [member.process.pid for member in self.members]

    def give(self, member: int, order: bytes) -> None:
        self.members[member].give(order)

    def take(self, timeout_s: float) -> list[tuple[int, bytes | None]]:
        here = wait([member.answers for member in self.members if member.since is not None], timeout_s)
        found: list[tuple[int, bytes | None]] = []
        for number, member in enumerate(self.members):
            if member.answers in here:
                found.append((number, self._answer(number)))
            elif member.since is not None and time.monotonic() - member.since > self.most_s:
                self._replace(number)
                found.append((number, None))
        return found

    def _answer(self, number: int) -> bytes | None:
        try:
            answer = self.members[number].take()
        except (EOFError, OSError):
            self._replace(number)
            return None
        self.silent[number] = 0
        return answer

    def _replace(self, number: int) -> None:
        self.members[number].end()
        self.silent[number] += 1
        if self.silent[number] >= self.STARTS_MAX:
            raise RunError(
                f"a process of the simulation died {self.STARTS_MAX} times in a row",
                remedy="It may need more memory than there is: give a smaller --processes. See what it said above.",
            )
        self.members[number] = _Member(self.threads)

    def close(self) -> None:
        for member in self.members:
            member.end()
        self.members = []


class _Member:
    """One process, and the two pipes to it. `since`: when it was given what it works on."""

    def __init__(self, threads: int) -> None:
        theirs_in, self.orders = Pipe(duplex=False)
        self.answers, theirs_out = Pipe(duplex=False)
        handed = theirs_in.fileno(), theirs_out.fileno()
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", MEMBER, *map(str, (*handed, threads))],
            stdin=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            pass_fds=handed,
        )
        theirs_in.close()
        theirs_out.close()
        self.since: float | None = None

    def give(self, order: bytes) -> None:
        self.since = time.monotonic()
        try:
            self.orders.send_bytes(order)
        except OSError:  # it died: its other pipe says so
            return

    def take(self) -> bytes:
        answer = self.answers.recv_bytes()
        self.since = None
        return answer

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.orders, self.answers):
            pipe.close()
