"""Image and clinical covariates in one network: what the network sees in the image, and the patient's numbers, meet at the head.

A fused network takes images as before and, beside them, values float32 (B, C): the study's covariates in the order of
`covariates.names_of`, in their units, NaN where one is missing. It scales them by the declared ranges and marks what is missing,
with numbers of the study alone: no statistic of a cohort is in it, no row meets another, and who uses an exported model gives
plain numbers.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.covariates import Covariates, names_of

HIDDEN = 32  # of the small network over both
SPREAD = 2.0  # a value goes from -2 to 2


class Fused(nn.Module):
    """`net`, which gives features (B, F) in place of answers, and covariates, as one network that gives (B, answers).

    `hidden`: whether a layer of HIDDEN lies between; without one the answer is linear in both, as in logistic regression.
    """

    middle: Tensor
    reach: Tensor
    constants: Tensor

    def __init__(self, net: nn.Module, features: int, covariates: Covariates, answers: int, *, hidden: bool) -> None:
        super().__init__()
        self.net = net
        ordered = [covariates[name] for name in names_of(covariates)]
        low, high = torch.tensor([one.range for one in ordered], dtype=torch.float32).T
        # Not persistent: they are the study's, so they are in no vector of weights.
        self.register_buffer("middle", (low + high) / 2, persistent=False)
        self.register_buffer("reach", (high - low) / 2, persistent=False)
        self.register_buffer("constants", torch.tensor([one.missing for one in ordered]), persistent=False)
        facts = 2 * len(ordered)
        self.head = _Hidden(features, facts, answers) if hidden else _Linear(features, facts, answers)

    def forward(self, images: Tensor, values: Tensor) -> Tensor:
        missing = torch.isnan(values)
        # About unit variance of whatever fills its range, as images have it.
        scaled = (torch.where(missing, self.constants, values) - self.middle) / self.reach * SPREAD
        answers: Tensor = self.head(self.net(images), torch.cat([scaled, missing.to(scaled.dtype)], dim=1))
        return answers


class _Linear(nn.Module):
    def __init__(self, features: int, facts: int, answers: int) -> None:
        super().__init__()
        self.features, self.facts = nn.Linear(features, answers), nn.Linear(facts, answers, bias=False)

    def forward(self, features: Tensor, facts: Tensor) -> Tensor:
        answers: Tensor = self.features(features) + self.facts(facts)
        return answers


class _Hidden(nn.Module):
    """One hidden layer over features and facts, each part with first weights that suit its own width: as columns of one matrix,
    four facts beside 256 features would hardly be heard.
    """

    def __init__(self, features: int, facts: int, answers: int) -> None:
        super().__init__()
        self.both, self.answer = _Linear(features, facts, HIDDEN), nn.Linear(HIDDEN, answers)

    def forward(self, features: Tensor, facts: Tensor) -> Tensor:
        answers: Tensor = self.answer(functional.relu(self.both(features, facts)))
        return answers
