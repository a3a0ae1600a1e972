"""Every study that ships, trained on phantoms as a researcher would try it: each learns what it is about.

The margins stand for chance (0.5) plus what three made-up hospitals of 120 patients show in every run; they are lower bounds of
macro AUROC over the targets, pooled over the sites' test splits.
"""

from pathlib import Path
from typing import Any

import pytest

from fl_server import measures, report, simulation
from fl_server.research import templates
from models.study import Study, parse

MARGINS = {"phantoms": 0.9, "appearance": 0.8, "severity": 0.85, "prognosis": 0.65}


@pytest.mark.slow
@pytest.mark.parametrize("name", MARGINS)
def test_a_study_that_ships_learns_on_phantoms(name: str, tmp_path: Path) -> None:
    study = parse(Study, templates()[name], f"{name}.yaml")
    study.check()
    told: list[dict[str, Any]] = []
    outcome = simulation.simulate(study.with_noise(), {}, 120, tmp_path, told.append)
    pooled = measures.measure(report.check(outcome.results))["pooled"]
    assert outcome.results["label"] == "complete"
    assert set(pooled["targets"]) == set(study.task.targets)
    assert pooled["macro_auroc"] >= MARGINS[name]
    # Every target by itself is better than chance, not only the easiest one.
    assert all(entry["auroc"] > 0.55 for entry in pooled["targets"].values())
