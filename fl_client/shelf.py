"""What a site keeps of a run from round to round and never sends: one file for each run, replaced in one step.

    HOME/<folder>/<hash of study and run>.safetensors     after.<round>: float32 (P,)

A round takes what was kept after the latest round before it, and sets its own beside that. So whatever is repeated (a void sum, a
node that was killed before or after the file was replaced) starts from the same values again, and none is applied twice.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fl_client.site import Site
from privacy import keys
from privacy.wire import WorkOrder

RUNS_MAX = 4  # runs of which something is kept; an older one starts anew if it ever goes on
Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Shelf:
    """One kind of values. `rounds`: after how many of the latest rounds they are kept; None: all.

    `absent`: kind of the journal's line that a later round began without them: the site joined late, or the file is lost or
    damaged.
    """

    folder: str
    absent: str
    rounds: int | None

    def latest(self, site: Site, order: WorkOrder, size: int, *, until: int) -> Float32 | None:
        """float32 (size,) after the latest round up to `until` of the order's run; None if nothing is kept, which is noted."""
        kept = {number: value for number, value in _read(self._path(site, order), size).items() if number <= until}
        if kept:
            return kept[max(kept)]
        if until > 0:
            site.journal.append(self.absent, **order.naming())
        return None

    def keep(self, site: Site, order: WorkOrder, value: Float32) -> None:
        """Make the values after `order` durable, beside those of rounds before it; of later rounds nothing is left."""
        path = self._path(site, order)
        earlier = {number: old for number, old in _read(path, value.size).items() if number < order.round}
        latest = sorted(earlier) if self.rounds is None else sorted(earlier)[-(self.rounds - 1) :]
        kept = {number: earlier[number] for number in latest} | {order.round: value}
        keys.write_private(path, save({f"after.{number}": np.ascontiguousarray(v) for number, v in kept.items()}))
        others = sorted(path.parent.glob("*.safetensors"), key=lambda file: file.stat().st_mtime_ns)
        for old in others[:-RUNS_MAX]:
            old.unlink(missing_ok=True)

    def _path(self, site: Site, order: WorkOrder) -> Path:
        # By hash: a run's name comes from the coordinator and must not choose a place on this disk.
        return site.home / self.folder / f"{keys.digest(f'{order.study} {order.run}'.encode())}.safetensors"


def _read(path: Path, size: int) -> dict[int, Float32]:
    """Round -> values of what is there and sound; a damaged file is as good as none."""
    try:
        found = load(path.read_bytes())
        read = {int(name.removeprefix("after.")): value for name, value in found.items()}
    except (OSError, SafetensorError, ValueError):
        return {}
    sound = all(v.dtype == np.float32 and v.shape == (size,) and np.isfinite(v).all() for v in read.values())
    return read if sound else {}
