"""Settings of a study that cannot go together, one sentence each: task, network, strategy and evaluation against each other.

What privacy and questions forbid stands in `models.study`, beside what they promise.
"""

from typing import Protocol

from models.sections import (
    Evaluation,
    Images,
    Network,
    Participation,
    PrivacyOrNone,
    Protection,
    Strategy,
    TaskOrQuestions,
    Training,
)

DENSENET_LEAST = 32


class Settings(Protocol):
    """The sections of a study that are held against each other. `models.study` imports this file, so it cannot be imported here."""

    @property
    def task(self) -> TaskOrQuestions: ...
    @property
    def images(self) -> Images: ...
    @property
    def network(self) -> Network: ...
    @property
    def training(self) -> Training: ...
    @property
    def strategy(self) -> Strategy: ...
    @property
    def protection(self) -> Protection: ...
    @property
    def privacy(self) -> PrivacyOrNone: ...
    @property
    def participation(self) -> Participation: ...
    @property
    def evaluation(self) -> Evaluation: ...


def of(study: Settings) -> list[str]:
    """One sentence for each contradiction."""
    return _of_network(study)


def _of_network(study: Settings) -> list[str]:
    found = []
    if study.network.name == "densenet121" and min(study.images.shape[1:]) < DENSENET_LEAST:
        found.append(f"network: densenet121 halves images five times and needs {DENSENET_LEAST} on each axis")
    return found
