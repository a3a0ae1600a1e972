"""A whole run whose target is a number: the sums of the sites are those of all their images, whatever protects them."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from cryptography.hazmat.primitives.asymmetric import ec
from federation import Federation
from hospital import study
from rich.console import Console

from fl_client import scoring
from fl_server import release, report, summary
from fl_server.measures import NUMBER_TOO_FEW
from fl_server.results import check
from models import exporting, learning, networks, regression
from models.registry import Package
from models.study import Regression, Study
from models.subgroups import Scored
from privacy.errors import MessageMalformed

SITES = ("north", "south", "east")


def of_three(protection: str) -> Study:
    facts = study().model_dump(mode="json") | {"protection": protection}
    facts["task"] = {"kind": "regression", "targets": ["extent"], "range": [0, 24], "unit": "points"}
    facts["participation"] |= {"sites": list(SITES), "quorum": 3}
    facts["network"] |= {"name": "linear"}
    facts["training"] |= {"rounds": 1}
    facts["evaluation"] |= {"test": 0.5}
    return Study.model_validate(facts)


@pytest.fixture(scope="module")
def federated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Federation, Path]:
    with pytest.MonkeyPatch.context() as quick:
        quick.setattr("os.fsync", lambda file: None)
        federation = Federation(tmp_path_factory.mktemp("three"), of_three("masked"))
        return federation, federation.run()


def results_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "results.json").read_text())
    return found


def test_a_masked_sum_is_that_of_every_test_image(federated: tuple[Federation, Path]) -> None:
    federation, run = federated
    net = networks.build(federation.plan)
    networks.load_vector(net, safetensors.numpy.load_file(run / "model.safetensors")["model"])
    parts = []
    for name in SITES:
        cohort = federation.cohort(name, "test")
        fields = (cohort.targets.numpy(), cohort.known.numpy(), cohort.patients.numpy())
        parts.append(Scored(learning.predict(net, cohort), *fields))
    expected = sum((regression.sums_of(part) for part in parts), np.zeros(regression.SUMS, np.int64))
    results = results_of(run)
    assert results["number"]["sums"] == expected.tolist() and expected[0] == results["test"]["images"]
    references = np.concatenate([part.targets[:, 0] for part in parts]) * 24
    assert np.allclose(references, references.round(), atol=1e-4) and len(set(references.round().tolist())) > 3


@pytest.fixture
def written(federated: tuple[Federation, Path], tmp_path: Path) -> Path:
    results = results_of(federated[1])
    task = Regression.model_validate(results["study"]["task"])
    rng = np.random.default_rng(1)
    truth = rng.random((40, 1)).astype(np.float32)
    near = np.clip(truth + rng.normal(0, 0.1, truth.shape), 0, 1).astype(np.float32)
    its = Scored(near, truth, np.ones_like(truth), np.arange(40))
    row = regression.released(task, its, 1)
    assert row is not None
    # As if the south had ten patients, and the sum as many images.
    results["number"]["sites"] = {"south": regression.read_released(task, row), "north": None}
    results["number"]["sums"] = (regression.sums_of(its) * 3).tolist()
    results["test"]["images"] = results["test"]["patients"] = 120
    return report.write(results, tmp_path)


def test_the_report_and_the_screen_say_errors_and_no_auroc(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, metrics = written.read_text(), json.loads((written.parent / "metrics.json").read_text())
    number = metrics["number"]
    assert number["pooled"]["images"] == 120 and number["sites"]["north"]["why"].startswith("not released")
    assert f"{number['sites']['south']['concordance']:.3f}" in page and "mean absolute error, points" in page
    assert (
        "AUROC" not in page and "at thresholds fixed" not in page.lower() and (written.parent / "errors.svg").is_file()
    )
    paper = io.StringIO()
    monkeypatch.setattr(summary, "console", Console(file=paper, width=80))
    summary.say(written, as_json=False)
    shown = paper.getvalue()
    assert f"{number['pooled']['mae']:.2f} (" in shown and ">= 40" in shown and "extent, points" in shown
    assert all(len(line) <= 80 for line in shown.splitlines()[:-1])  # the last is a path


def test_a_card_says_errors_where_others_say_auroc(written: Path) -> None:
    metrics = json.loads((written.parent / "metrics.json").read_text())
    figures = release._figures(metrics)
    number, words = figures["number"], "\n".join(release._tables(figures))
    assert number["pooled"]["images"] == 120 and number["pooled"]["mae"] == round(metrics["number"]["pooled"]["mae"], 3)
    assert f"| all together |  | ≥ 120 | {number['pooled']['mae']:.3f} (" in words
    assert "| north | internal | not released" in words and "| south | internal | ≥ 40 |" in words
    assert "AUROC" not in words and "threshold" not in words
    metrics["number"]["pooled"]["images"] = 9
    few = release._figures(metrics)
    assert few["number"]["pooled"] == {"mae": None, "why": NUMBER_TOO_FEW}
    assert "not released" in "\n".join(release._tables(few))


def test_a_released_model_of_a_number_answers_in_its_unit(federated: tuple[Federation, Path]) -> None:
    federation, run = federated
    key = ec.derive_private_key(7, ec.SECP256R1())
    package = Package.read(release.package(run, release.Wanted(), key))
    card = package.files["card.md"].decode()
    assert "**Predicts** extent (a number, 0 to 24 points) from" in card and "AUROC" not in card
    site = federation.hospitals["north"].site
    scored = scoring.score(package, Path(site.source.folder), 0, lambda *_: None)
    cohort = federation.cohort("north", "test")
    expected = 24 * learning.predict(exporting.network(package), cohort)[:, 0]
    found = np.array([row.scores[0] for row in scored.rows])
    assert all(np.abs(found - one).min() < 1e-4 for one in expected) and expected.max() > 1


LIES = {
    "no sums": lambda results: results.pop("number"),
    "sums of more images": lambda results: results["number"]["sums"].__setitem__(0, 10**6),
    "a site that is not there": lambda results: results["number"]["sites"].update(west=None),
    "more images than all": lambda results: results["number"]["sites"]["south"].update(images=10**6),
    "an interval beside its figure": lambda results: results["number"]["sites"]["south"]["intervals"].update(
        mae=[0, 0]
    ),
    "a figure too many": lambda results: results["number"]["sites"]["south"]["intervals"].update(kappa=[0, 1]),
    "a figure below ten": lambda results: results["number"]["sites"]["south"].update(images=9),
}


@pytest.mark.parametrize("name", LIES)
def test_documents_that_lie_are_refused(name: str, federated: tuple[Federation, Path]) -> None:
    results = results_of(federated[1])
    said = dict.fromkeys(regression.FIGURES, 0.5)
    ends = {figure: [0.4, 0.6] for figure in regression.FIGURES}
    results["number"]["sites"] = {"south": {**said, "intervals": ends, "images": 10}}
    check(results)
    LIES[name](results)
    with pytest.raises(MessageMalformed):
        check(results)
