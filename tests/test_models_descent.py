"""Optimizers of our own: torch's are the oracle, to the last bit, and its compiler stays away."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from models.descent import Descent, Rule


def networks() -> list[nn.Sequential]:
    made = []
    for _ in range(2):
        torch.manual_seed(3)
        made.append(
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
        )
    return made


def groups(net: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    return [p for p in net.parameters() if p.ndim > 1], [p for p in net.parameters() if p.ndim <= 1]


@pytest.mark.parametrize("kind", ["adamw", "sgd", "sgd-without-momentum"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_steps_are_those_of_torch(kind: str, decay: float) -> None:
    ours, theirs = networks()
    kernels, others = groups(theirs)
    given: list[dict[str, object]] = [
        {"params": kernels, "weight_decay": decay},
        {"params": others, "weight_decay": 0.0},
    ]
    momentum = 0.9 if kind == "sgd" else 0.0
    oracle: torch.optim.Optimizer
    if kind == "adamw":
        oracle = torch.optim.AdamW(given, lr=0.003)
    else:
        oracle = torch.optim.SGD(given, lr=0.03, momentum=momentum, nesterov=momentum > 0)
    mine, rest = groups(ours)
    rule = Rule("adamw", 0.003) if kind == "adamw" else Rule("sgd", 0.03, momentum)
    descent, draws = Descent([(mine, decay), (rest, 0.0)], rule), torch.Generator().manual_seed(5)
    for step in range(6):
        images = torch.randn(5, 1, 8, 8, generator=draws)
        for net, optimizer in ((ours, descent), (theirs, oracle)):
            optimizer.zero_grad()
            loss = net(images).square().mean()
            loss.backward()
            if step == 2:
                net[0].bias.grad = None  # a parameter without a gradient stays, and its count of steps as well
            optimizer.step()
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(one, other)
    assert not torch.equal(ours[4].weight, networks()[0][4].weight)


TRAIN = """
import sys
import fl_client.app
from models import learning, networks
from privacy import selftest
from privacy.ledger import Ledger
from test_models_learning import made_cohort, made_study
selftest.require()
learning.learn(networks.build(made_study()), made_cohort(), made_study(), round_number=1)
print(sorted({"torch._dynamo", "sympy", "dp_accounting"} & set(sys.modules)))
"""


def test_what_trains_without_privacy_loads_no_compiler_and_no_accountant() -> None:
    words = [sys.executable, "-c", TRAIN]
    where = {"PYTHONPATH": os.pathsep.join(["tests", "."]), "PATH": os.environ["PATH"]}
    done = subprocess.run(words, cwd=Path(__file__).parents[1], env=where, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
