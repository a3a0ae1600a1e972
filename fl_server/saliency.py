"""Where a model looks, on made-up chests: how its answer changes where a part of the picture is covered (Zeiler and Fergus 2014).

Only phantoms are drawn. A map of a patient's image is a picture of that patient: a rehearsal on real folders has no such panel.
"""

import pkgutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch import Tensor, nn

from fl_server import figures
from fl_server.results import canonical
from models import learning, networks, tasks
from models.study import Regression, Study

COHORT = "fl_client.rehearsal:cohort"  # the site's half, looked up by name as everything is in a simulation
CELLS = 8  # on each side
EACH = 2  # pictures with the highest answers, and as many with the lowest
Float32 = NDArray[np.float32]


def panel(folder: Path, results: dict[str, Any]) -> bytes | None:
    """PNG of some test phantoms of a rehearsal's first site, each beside its map for the study's first target.

    None if any patient of the rehearsal in `folder` was not made up, for volumes, for outlines, which
    are pictures themselves, and for models that no single site has whole.
    """
    study = Study.from_canonical(canonical(results["study"]))
    made_up = all((folder / "sites" / name / "hospital").is_dir() for name in study.all_sites)
    if not made_up or study.images.volume is not None or study.segments or study.strategy.local_norms:
        return None
    net = networks.build(study)
    networks.load_vector(
        net, load_file(folder / "coordinator" / "runs" / results["run_id"] / "model.safetensors")["model"]
    )
    cohort = pkgutil.resolve_name(COHORT)(folder / "sites" / study.all_sites[0], study, "test")
    order = np.argsort(learning.predict(net, cohort)[:, 0], kind="stable")
    each = min(EACH, len(order) // 2)
    rows = [("highest answers", order[::-1][:each]), ("lowest answers", order[:each])]
    shown = [
        (name, [part for place in places for part in _pair(net, cohort, int(place), study)]) for name, places in rows
    ]
    return figures.png(figures.pictures(shown)) if each else None


def _pair(net: nn.Module, cohort: Any, place: int, study: Study) -> list[tuple[str, Float32]]:
    """One picture under its answer, and its map: bright where covering lowers the answer, dark where it raises it."""
    low, high = study.task.range if isinstance(study.task, Regression) else (0.0, 1.0)
    image, values = cohort.images[place : place + 1].float(), learning.covariates_of(cohort)[place : place + 1]
    answer, change = occlusion(net, image, values)
    most = float(np.abs(change).max())
    side = image.shape[-1] // CELLS
    shades = np.kron(0.5 + change / (2 * max(most, 1e-9)), np.ones((side, side), np.float32))
    named = f"{study.task.targets[0]} {low + (high - low) * answer:.2f}"
    return [(named, image[0, 0].numpy()), (f"up to {(high - low) * most:.2f}", shades.astype(np.float32))]


def occlusion(net: nn.Module, image: Tensor, values: Tensor) -> tuple[float, Float32]:
    """(answer to `image` float32 (1, 1, S, S), float32 (CELLS, CELLS): how far it falls where a cell has the picture's mean)."""
    edges = np.linspace(0, image.shape[-1], CELLS + 1).astype(int)
    covered = image.repeat(CELLS * CELLS + 1, 1, 1, 1)
    for number in range(CELLS * CELLS):
        row, column = divmod(number, CELLS)
        covered[number, 0, edges[row] : edges[row + 1], edges[column] : edges[column + 1]] = image.mean()
    net.eval()
    with torch.inference_mode():
        answers = tasks.activation(net(*learning.inputs(covered, values.repeat(len(covered), 1))))[:, 0].numpy()
    return float(answers[-1]), (answers[-1] - answers[:-1]).reshape(CELLS, CELLS).astype(np.float32)
