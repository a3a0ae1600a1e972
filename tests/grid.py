"""A Flower Grid in memory with faults: drops, delays, duplicates, tampered and foreign replies, Flower's own errors."""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message
from flwr.app.error import Error
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

Answer = Callable[[Message], Message | None]


@dataclass
class FaultyGrid(Grid):
    """`answers`: node id -> function from an order to a reply, or None for a node that never answers."""

    answers: dict[int, Answer]
    online: set[int] | None = None
    silent_pulls: dict[int, int] = field(default_factory=dict)
    """node id -> how many looks it takes before its reply is there."""
    twice: set[int] = field(default_factory=set)
    errors: dict[int, int] = field(default_factory=dict)
    """node id -> Flower error code that comes instead of a reply."""
    refused_pushes: set[int] = field(default_factory=set)
    shuffle: random.Random | None = None
    """Replies of one look come in an order of its choice, those of one look in two."""
    strays: list[Message] = field(default_factory=list)
    """Replies that come with the next look, whichever order was asked about."""

    def __post_init__(self) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        self.sent: list[Message] = []
        self.replies: dict[str, list[Message]] = {}
        self.looks: dict[str, int] = {}

    def get_node_ids(self) -> Iterable[int]:
        return list(self.answers) if self.online is None else list(self.online)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        names: list[str] = []
        for message in messages:
            node = message.metadata.dst_node_id
            if node in self.refused_pushes:
                names.append(None)  # type: ignore[arg-type]  # what Flower answers for a message it did not take
                continue
            name = f"m{len(self.sent)}"
            message.metadata.__dict__["_message_id"] = name
            self.sent.append(message)
            names.append(name)
            self.looks[name] = self.silent_pulls.get(node, 0)
            if node in self.errors:
                reply = Message(Error(self.errors[node], "ZZTEST^PATIENT must not be read"), reply_to=message)
                self.replies[name] = [reply]
            elif (answer := self.answers[node](message)) is not None:
                self.replies[name] = [answer, answer] if node in self.twice else [answer]
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        found: list[Message] = []
        for name in list(message_ids):
            if self.shuffle is not None and self.shuffle.random() < 0.5:
                continue
            self.looks[name] = self.looks.get(name, 0) - 1
            if self.looks[name] < 0:
                found += self.replies.pop(name, [])
        found, self.strays = [*found, *self.strays], []
        if self.shuffle is not None:
            self.shuffle.shuffle(found)
        return found

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise NotImplementedError

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=node) for node in self.answers]
