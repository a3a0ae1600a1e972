"""Settings of a study that cannot go together, one sentence each: task, network, strategy and evaluation against each other.

What privacy and questions forbid stands in `models.study`, beside what they promise.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from models.study import Study

DENSENET_LEAST = 32


def of(study: "Study") -> list[str]:
    """One sentence for each contradiction."""
    return _of_network(study)


def _of_network(study: "Study") -> list[str]:
    found = []
    if study.network.name == "densenet121" and min(study.images.shape[1:]) < DENSENET_LEAST:
        found.append(f"network: densenet121 halves images five times and needs {DENSENET_LEAST} on each axis")
    return found
