"""The control variate of this site in a run of SCAFFOLD: what its own gradients pointed to, kept here from round to round.

One file for each run, replaced in one step, with the variates after the last two rounds that were trained:

    HOME/variates/<hash of study and run>.safetensors     after.<round>: float32 (P,), for two rounds at most

A round takes the variate after the latest round before it, and sets its own beside that. So whatever is repeated (a void sum, a
node that was killed before or after the file was replaced) starts from the same variate again, and none is applied twice.
It is a mean gradient of this site's patients and stays here; what leaves is its part of the round's sum.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fl_client.site import Site
from privacy import keys
from privacy.wire import TrainOrder

RUNS_MAX = 4  # runs whose variates are kept; an older one starts from zero again if it ever goes on
ROUNDS_MAX = 2
ABSENT = "variate-absent"
"""Kind of the journal's line that a later round began without a variate: the site joined late, or the file is lost or damaged."""
Float32 = NDArray[np.float32]


def before(site: Site, order: TrainOrder, parameters: int) -> Float32:
    """float32 (P,): the variate to train `order` with; zeros in the first round, and where there is none, which is noted."""
    kept = {number: value for number, value in _read(_path(site, order), parameters).items() if number < order.round}
    if kept:
        return kept[max(kept)]
    if order.round > 1:
        site.journal.append(ABSENT, **order.naming())
    return np.zeros(parameters, np.float32)


def keep(site: Site, order: TrainOrder, variate: Float32) -> None:
    """Make the variate after `order` durable, beside that of the latest round before it; of later rounds nothing is left."""
    path = _path(site, order)
    earlier = {number: value for number, value in _read(path, variate.size).items() if number < order.round}
    latest = sorted(earlier)[-(ROUNDS_MAX - 1) :]
    kept = {number: earlier[number] for number in latest} | {order.round: variate}
    keys.write_private(path, save({f"after.{number}": np.ascontiguousarray(v) for number, v in kept.items()}))
    others = sorted(path.parent.glob("*.safetensors"), key=lambda file: file.stat().st_mtime_ns)
    for old in others[:-RUNS_MAX]:
        old.unlink(missing_ok=True)


def _path(site: Site, order: TrainOrder) -> Path:
    # By hash: a run's name comes from the coordinator and must not choose a place on this disk.
    return site.home / "variates" / f"{keys.digest(f'{order.study} {order.run}'.encode())}.safetensors"


def _read(path: Path, parameters: int) -> dict[int, Float32]:
    """Round -> variate of what is there and sound; a damaged file is as good as none, because any variate only steers."""
    try:
        found = load(path.read_bytes())
        read = {int(name.removeprefix("after.")): value for name, value in found.items()}
    except (OSError, SafetensorError, ValueError):
        return {}
    sound = all(v.dtype == np.float32 and v.shape == (parameters,) and np.isfinite(v).all() for v in read.values())
    return read if sound else {}
