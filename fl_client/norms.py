"""The norm layers of this site in a run of `fedbn` (Li et al. 2021): gains and biases that never leave, kept after every round.

An order brings the weights that all sites share, without these; with this site's own they are the model that it trains and
evaluates. After every round they are kept, because the round whose model is tested is chosen later: some hundred numbers each.
Before the first round they are gain 1 and bias 0, as in every fresh network.
"""

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fl_client.shelf import Shelf
from fl_client.site import Site
from models import networks
from privacy.errors import MessageMalformed
from privacy.wire import TrainOrder, WorkOrder

ABSENT = "norms-absent"
SHELF = Shelf("norms", ABSENT, rounds=None)
Float32 = NDArray[np.float32]


def load(site: Site, net: nn.Module, order: WorkOrder) -> None:
    """Give `net`, which is fresh or of an earlier order of this run, the ordered weights and this site's norms at that time.

    Raises MessageMalformed if the order has another number of weights than the network shares.
    """
    local = networks.norm_places(net)
    if order.model.shape != (int((~local).sum()),):
        raise MessageMalformed("the order holds another number of weights than the sites share")
    # A round is trained from the norms before it; what a round made is evaluated with the norms after it.
    until = order.round - 1 if isinstance(order, TrainOrder) else order.round
    own = SHELF.latest(site, order, int(local.sum()), until=until)
    whole = networks.placed(order.model, ~local)
    whole[local] = networks.fresh_norms(net) if own is None else own
    networks.load_vector(net, whole)


def keep(site: Site, net: nn.Module, order: TrainOrder) -> None:
    """Make the norms of `net`, which `order` trained, durable."""
    SHELF.keep(site, order, networks.to_vector(net)[networks.norm_places(net)])
