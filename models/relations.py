"""How the targets of a study relate: independent findings, classes of which one holds, or steps of a grade.

Whatever the relation is, a network answers with one logit for each target, and the loss is the binary cross-entropy of each. So
masking, class weights, differential privacy, histograms and figures are the same for all of them; what differs is how the logits
hang together:

    independent  each by itself (multi-label)
    exclusive    sigmoid(logit of k) is the softmax probability of class k: the scores of an image sum to 1
    ordered      target k says "at least grade k". One number for each image against rising thresholds (Cao et al. 2020, CORAL),
                 so "at least 3" is never more probable than "at least 2"

The binary log score is strictly proper for each event, so its sum over classes is minimal at the true probabilities as well.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.sections import Relation

FIRST_SPREAD = 2.0  # between the lowest and the highest threshold of an untrained network


def outputs(relation: Relation, targets: int) -> int:
    """How many numbers the network below the relation has to give for each image."""
    return 1 if relation == "ordered" else targets


def related(net: nn.Module, relation: Relation, targets: int) -> nn.Module:
    """`net`, which gives (B, outputs(relation, targets)), as a network that gives one logit for each target, (B, targets)."""
    if relation == "independent":
        return net
    return Exclusive(net) if relation == "exclusive" else Ordered(net, targets)


class Exclusive(nn.Module):
    """One of the targets holds: sigmoid of the logits (B, T) is the softmax of what `net` gives (B, T)."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *inputs: Tensor) -> Tensor:
        given: Tensor = self.net(*inputs)
        # logit(p_k) = z_k - log(sum of exp(z_j) over all others): taken with k left out, not as 1 - p_k, which rounds to 0.
        others = given[:, None, :].expand(-1, given.shape[1], -1)
        itself = torch.eye(given.shape[1], dtype=torch.bool, device=given.device)
        return given - torch.logsumexp(others.masked_fill(itself, -torch.inf), dim=2)


class Ordered(nn.Module):
    """At least grade 1, 2, ... T: the one number that `net` gives (B, 1) against T thresholds that rise by construction."""

    def __init__(self, net: nn.Module, targets: int) -> None:
        super().__init__()
        self.net = net
        gap = FIRST_SPREAD / max(targets - 1, 1)
        self.lowest = nn.Parameter(torch.tensor([-gap * (targets - 1) / 2]))
        self.gaps = nn.Parameter(torch.full((targets - 1,), gap).expm1().log())  # softplus of it is the gap

    def forward(self, *inputs: Tensor) -> Tensor:
        rising = torch.cat([self.lowest, self.lowest + functional.softplus(self.gaps).cumsum(0)])
        severity: Tensor = self.net(*inputs)
        return severity - rising
