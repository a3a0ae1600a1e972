"""AdamW and SGD, bit for bit as torch.optim computes them on a CPU.

torch's own optimizers load its compiler at their first step: 67 MB and a second of each process, of which nothing is used here.
Formulas: Loshchilov and Hutter 2019, algorithm 2, and Sutskever et al. 2013, section 2, with torch's decay and step size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8  # torch's


@dataclass(frozen=True)
class Rule:
    """How a step is made. `momentum` is of sgd, with Nesterov's correction."""

    kind: Literal["adamw", "sgd"]
    rate: float
    momentum: float = 0.0


class Descent:
    """Moves parameters along their gradients; one without a gradient stays. `groups`: parameters, and the decay of each."""

    def __init__(self, groups: Sequence[tuple[Sequence[Tensor], float]], rule: Rule) -> None:
        self.rule = rule
        self.decays = [(parameter, decay) for parameters, decay in groups for parameter in parameters]
        self._averages: dict[int, tuple[Tensor, ...]] = {}
        self._steps: dict[int, int] = {}
        self._room = torch.empty(0)  # for a root that every step writes anew: new memory takes longer than the root

    def zero_grad(self) -> None:
        for parameter, _ in self.decays:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """One step of every parameter that has a gradient."""
        move = self._adamw if self.rule.kind == "adamw" else self._sgd
        for place, (parameter, decay) in enumerate(self.decays):
            if parameter.grad is not None:
                self._steps[place] = self._steps.get(place, 0) + 1
                move(place, parameter, parameter.grad, decay)

    def _adamw(self, place: int, parameter: Tensor, gradient: Tensor, decay: float) -> None:
        if place not in self._averages:
            self._averages[place] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        mean, square = self._averages[place]
        steps, rate = self._steps[place], self.rule.rate
        parameter.mul_(1 - rate * decay)
        mean.lerp_(gradient, 1 - BETA_1)
        square.mul_(BETA_2).addcmul_(gradient, gradient, value=1 - BETA_2)
        size, unbiased = rate / (1 - BETA_1**steps), math.sqrt(1 - BETA_2**steps)
        if len(self._room) < square.numel():
            self._room = torch.empty(square.numel())
        root = torch.sqrt(square, out=self._room[: square.numel()].view_as(square))
        parameter.addcdiv_(mean, root.div_(unbiased).add_(EPSILON), value=-size)

    def _sgd(self, place: int, parameter: Tensor, gradient: Tensor, decay: float) -> None:
        momentum = self.rule.momentum
        if decay:
            gradient = gradient.add(parameter, alpha=decay)
        if momentum:
            if place not in self._averages:
                self._averages[place] = (gradient.clone(),)
            else:
                self._averages[place][0].mul_(momentum).add_(gradient)
            gradient = gradient.add(self._averages[place][0], alpha=momentum)
        parameter.add_(gradient, alpha=-self.rule.rate)
