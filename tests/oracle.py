"""What a round's model should be: each contributor trained by hand, the mean taken in float64. Knows no masks and no words."""

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
from federation import Federation

from models import learning, networks

Float64 = npt.NDArray[np.float64]


class Trained:
    """What each site of a federation learns from a model in a round, computed once."""

    def __init__(self, federation: Federation) -> None:
        self.federation = federation
        self.known: dict[Any, tuple[Float64, int]] = {}

    def site(self, name: str, model: npt.NDArray[np.float32], number: int, repeat: int = 0) -> tuple[Float64, int]:
        """(change of the model float64 (P,), labelled images) after training `model` at one site."""
        key = (name, hashlib.sha256(model.tobytes()).digest(), number, repeat)
        if key not in self.known:
            plan, cohort = self.federation.plan, self.federation.cohort(name, "train")
            net = networks.build(plan)
            networks.load_vector(net, model)
            learning.learn(net, cohort, plan, round_number=number, repeat=repeat)
            after = np.concatenate([tensor.detach().numpy().ravel() for tensor in net.state_dict().values()])
            self.known[key] = after.astype(np.float64) - model, int((cohort.known.sum(dim=1) > 0).sum())
        return self.known[key]

    def mean(
        self, names: list[str], model: npt.NDArray[np.float32], number: int, repeats: dict[str, int] | None = None
    ) -> tuple[Float64, int]:
        """(mean change over all cases of `names`, how many cases). `repeats`: earlier trainings of the round, by site."""
        parts = [self.site(name, model, number, (repeats or {}).get(name, 0)) for name in names]
        cases = sum(count for _, count in parts)
        total: Float64 = np.sum([count * change for change, count in parts], axis=0)
        return total / cases, cases

    def check(
        self,
        done: Any,
        before: npt.NDArray[np.float32],
        after: npt.NDArray[np.float32],
        repeats: dict[str, int] | None = None,
    ) -> None:
        """Raise AssertionError unless `after` is the model that the contributors of the committed round `done` make.

        Tolerance: each site rounds to half a step of its fixed point, the model is stored as float32.
        """
        mean, cases = self.mean(done.contributors, before, done.round, repeats)
        assert cases == done.cases, f"round {done.round}: {done.cases} cases, not {cases}"
        rounding = len(done.contributors) * 0.5 * 2.0**-done.scale / cases
        largest = float(np.abs(before + mean - after).max())
        stored = float(np.abs(after).max()) * 2.0**-23
        assert largest <= rounding + stored, f"round {done.round}: off by {largest}, allowed {rounding} + {stored}"
        assert float(np.abs(mean).max()) > 100 * (rounding + stored), (
            "the check would accept a model that learned nothing"
        )
