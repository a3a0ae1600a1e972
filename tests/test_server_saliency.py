"""Where a model looks: maps of networks whose answer is known, and never a picture of a patient."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hospital import study
from torch import Tensor, nn

from fl_server import saliency
from models.study import Study


class Corner(nn.Module):
    """Answers by the brightness of one corner, and of nothing else."""

    def forward(self, images: Tensor, values: Tensor | None = None) -> Tensor:
        own = images[:, 0, :4, -4:].mean(dim=(1, 2))
        return (own * 4 + (0 if values is None else values[:, 0]))[:, None]


def test_the_map_is_bright_where_the_answer_comes_from() -> None:
    image = torch.zeros(1, 1, 32, 32)
    image[0, 0, :4, -4:] = 1.0
    answer, change = saliency.occlusion(Corner(), image, torch.zeros(1, 0))
    assert answer == pytest.approx(float(torch.sigmoid(torch.tensor(4.0))))
    expected = answer - float(torch.sigmoid(4 * image.mean()))
    assert change[0, -1] == pytest.approx(expected) and np.count_nonzero(change) == 1
    beside, _ = saliency.occlusion(Corner(), image, torch.tensor([[-4.0]]))
    assert beside == pytest.approx(0.5)


def test_every_pixel_is_covered_once_whatever_the_side() -> None:
    seen: list[Tensor] = []

    class Watching(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images)
            return images.mean(dim=(1, 2, 3))[:, None]

    image = torch.rand(1, 1, 37, 37) + 1
    saliency.occlusion(Watching(), image, torch.zeros(1, 0))
    changed = (seen[0][:-1] != image).sum(dim=(0, 1))
    assert bool((changed == 1).all()) and torch.equal(seen[0][-1:], image)


def test_no_picture_is_drawn_unless_every_patient_was_made_up(tmp_path: Path) -> None:
    """Nothing is even opened: there is no model and no cohort here."""
    results: dict[str, Any] = {"study": study().model_dump(mode="json"), "run_id": "none"}
    (tmp_path / "sites" / "north" / "hospital").mkdir(parents=True)
    (tmp_path / "sites" / "south").mkdir()
    assert saliency.panel(tmp_path, results) is None


def test_outlines_have_no_such_panel(tmp_path: Path) -> None:
    """They are pictures themselves; nothing is opened here either."""
    facts = study().model_dump(mode="json") | {"task": {"kind": "segmentation", "targets": ["lungs"]}}
    plan = facts | {"network": {"name": "unet"}, "training": facts["training"] | {"balance": False}}
    for site in ("north", "south"):
        (tmp_path / "sites" / site / "hospital").mkdir(parents=True)
    outlines = json.loads(Study.model_validate(plan).canonical())
    assert saliency.panel(tmp_path, {"study": outlines, "run_id": "none"}) is None
