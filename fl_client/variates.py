"""The control variate of this site in a run of SCAFFOLD: what its own gradients pointed to, kept here from round to round.

It is a mean gradient of this site's patients and stays here; what leaves is its part of the round's sum. Any variate only steers,
so a lost one starts from zero again.
"""

import numpy as np
from numpy.typing import NDArray

from fl_client.shelf import Shelf
from fl_client.site import Site
from privacy.wire import TrainOrder

ABSENT = "variate-absent"
SHELF = Shelf("variates", ABSENT, rounds=2)
Float32 = NDArray[np.float32]


def before(site: Site, order: TrainOrder, parameters: int) -> Float32:
    """float32 (P,): the variate to train `order` with; zeros in the first round, and where there is none, which is noted."""
    found = SHELF.latest(site, order, parameters, until=order.round - 1)
    return np.zeros(parameters, np.float32) if found is None else found


def keep(site: Site, order: TrainOrder, variate: Float32) -> None:
    """Make the variate after `order` durable, beside that of the latest round before it; of later rounds nothing is left."""
    SHELF.keep(site, order, variate)
