"""What rounding costs: how far a sum of encoded updates is from the exact one, by bits and sites.

    fl-study simulate study.yaml --out OUT        # phantoms, or --site NAME=FOLDER for each
    python deploy/bench_encoding.py OUT/rehearsal-1 [NETWORK [SITES ...]]

All training images of the rehearsal are dealt out anew to so many sites, and trained on for a few rounds. Each round's updates go
through the encoding, with the scale that the coordinator would choose, and the exact sum moves the model on, so that all
encodings are measured on the same updates.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fl_client.app import Desk
from fl_client.consent import approved
from fl_client.site import Site
from fl_server import sums
from models import learning, networks
from models.contributions import Contribution, bits_of
from models.study import Study
from privacy.sharing import Encoding

ROUNDS, BITS = 4, (16, 24, 32)


@dataclass
class Part:
    """The images of one made-up site."""

    images: torch.Tensor
    targets: torch.Tensor
    known: torch.Tensor
    covariates: torch.Tensor

    def take(self, rows: torch.Tensor) -> "Part":
        return Part(self.images[rows], self.targets[rows], self.known[rows], self.covariates[rows])


def main(folder: Path, network: str = "small_cnn", *sites: str) -> None:
    torch.set_num_threads(1)
    plan, whole = gathered(folder)
    plan = plan.model_copy(update={"network": plan.network.model_copy(update={"name": network})})
    for number in map(int, sites or ("4",)):
        print(json.dumps({"network": network, "sites": number} | errors(plan, whole, number)))


def gathered(folder: Path) -> tuple[Study, Part]:
    """The study of a rehearsal, and the training images of all its sites."""
    homes = sorted((folder / "sites").iterdir())
    opened = [Site.open(home) for home in homes]
    digest = next((homes[0] / "studies").glob("*.json")).stem
    plan = approved(opened[0].home, digest, opened[0].coordinator)
    cohorts = [Desk().cohort(site, plan, "train") for site in opened]
    joined = [torch.cat([torch.as_tensor(getattr(c, name)) for c in cohorts]) for name in Part.__annotations__]
    return plan, Part(*joined)


def errors(plan: Study, whole: Part, number: int) -> dict[str, Any]:
    """For each encoding and round: the error of the sum beside its length (L2), and the share of values that was clipped."""
    names = [f"s{place}" for place in range(number)]
    part = plan.participation.model_copy(update={"sites": names, "quorum": number})
    plans = {bits: plan.model_copy(update={"participation": part, "encoding_bits": bits}) for bits in BITS}
    scales = {bits: sums.first_scale(study) for bits, study in plans.items()}
    order = torch.randperm(len(whole.known), generator=torch.Generator().manual_seed(1))
    parts = [whole.take(rows) for rows in order.chunk(number)]
    net, found = networks.build(plan), dict[str, list[dict[str, float]]]()
    model = networks.to_vector(net)
    for turn in range(1, ROUNDS + 1):
        updates = []
        for mine in parts:
            networks.load_vector(net, model)
            made = learning.learn(net, mine, plan, round_number=turn)  # type: ignore[arg-type]
            updates.append((made.delta, made.cases))
        exact = sum((delta.astype(np.float64) * cases for delta, cases in updates), np.zeros(model.shape))
        for bits, study in plans.items():
            encoding = Encoding(model.size, 0, bits_of(study, "train", turn), scales[bits], number)
            sent = _sent(encoding, updates)
            facts = {"scale": scales[bits], "error": _length(sent.update - exact) / _length(exact)}
            facts["clipped"] = sent.ingested / number / model.size
            facts["peak_to_rms"] = float(np.abs(exact).max()) / _length(exact) * model.size**0.5
            found.setdefault(str(bits), []).append({key: float(f"{value:.3g}") for key, value in facts.items()})
            total = sums.Total(sent, names, {}, {}, sent.ingested, float(np.abs(sent.update).max()), {})
            scales[bits] = sums.next_scale(study, total, scales[bits])
        model = (model + exact / sum(cases for _, cases in updates)).astype(np.float32)
    return found


def _sent(encoding: Encoding, updates: list[tuple[NDArray[Any], int]]) -> Contribution:
    total, nothing = encoding.zeros(), np.zeros(0, np.int64)
    for delta, cases in updates:
        total.add(encoding.encode(delta, cases, nothing))
    opened = encoding.decode(total)
    return Contribution(opened.clipped, None, update=opened.values)  # type: ignore[arg-type]


def _length(values: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.square(values).sum()))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit("usage: bench_encoding.py REHEARSAL [NETWORK [SITES ...]]")
    main(Path(sys.argv[1]), *sys.argv[2:])
