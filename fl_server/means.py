"""With what a simulation is carried out: known without loading what carries it out, because commands name it first."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from models.study import Study

PAYS_FROM = 16  # sites in a sum from which a process for each core earns back the seconds that it takes to start


@dataclass(frozen=True)
class Means:
    """`weights`: the file that the study starts from. `processes` 0: one for each core from PAYS_FROM sites in a sum on, else
    the one that asks. `backend` ray: as many actors, on whatever machines Ray has (`fl_server.cluster`); `address` is its
    head, empty for a Ray of this machine's own.
    """

    weights: Path | None = None
    processes: int = 0
    backend: Literal["local", "ray"] = "local"
    address: str = ""

    def size(self, study: Study) -> int:
        """How many processes are the sites of `study`."""
        if self.processes:
            return min(self.processes, len(study.all_sites))
        return len(os.sched_getaffinity(0)) if study.sum_sites >= PAYS_FROM else 1
