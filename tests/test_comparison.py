"""`fl-study simulate --compare`: the same patients on the same side for every model, and a matrix that says what was found."""

import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from fl_client.rehearsal import cohort
from fl_server import comparison, matrix, simulation
from fl_server.research import app
from models import learning, networks
from models.study import Study, parse
from privacy.errors import MessageMalformed, StudyConflict

TEXT = """
name: small
title: Small
purpose: A test.
task: {targets: [opacity]}
images: {size_px: 32}
network: {name: small_cnn}
training: {rounds: 2, batch_size: 8, learning_rate: 0.004}
strategy: {name: fedprox}
protection: plain
privacy: none
participation: {sites: [north, south], evaluate_only: [west], quorum: 2, minimum_patients: 2, round_timeout_s: 60}
evaluation: {validation: 0.2, test: 0.4, bins: 1000}
"""
SITES = ["north", "south", "west"]
PRIVATE = "{epsilon: 8, clip_norm: 1, sampling_rate: 0.2, mode: MODE}"


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """One comparison through the command, with every model that was handed to the sites beside its study."""
    folder = tmp_path_factory.mktemp("compared")
    (folder / "study.yaml").write_text(TEXT)
    models: list[tuple[Study, Any]] = []
    evaluated = simulation.evaluated

    def listen(study: Study, model: Any, outcome: Any) -> Any:
        models.append((study, model.copy()))
        return evaluated(study, model, outcome)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulation, "evaluated", listen)
        words = ["simulate", str(folder / "study.yaml"), "--patients", "50", "--compare", "--out", str(folder / "out")]
        shown = CliRunner().invoke(app, words, env={"COLUMNS": "200"}, catch_exceptions=False)
    assert shown.exit_code == 0, shown.output
    rehearsal = folder / "out" / "rehearsal-1"
    runs = {json.loads((p.parent / "run.json").read_text())["run_id"]: p.parent for p in rehearsal.rglob("study.json")}
    found = matrix.read(json.loads((folder / "out" / "comparison.json").read_text()))
    first = next(
        path for path in runs.values() if json.loads((path / "run.json").read_text())["digest"] == found.digest
    )
    study = Study.from_canonical((first / "study.json").read_bytes())
    yield SimpleNamespace(
        out=folder / "out", rehearsal=rehearsal, run=first, study=study, found=found, models=models, shown=shown.output
    )


def split(compared: SimpleNamespace, name: str, part: Any) -> Any:
    return cohort(compared.rehearsal / "sites" / name, compared.study, part)


def auroc(compared: SimpleNamespace, model: Any, names: list[str]) -> float:
    """Of the raw scores, by scikit-learn."""
    net = networks.build(compared.study)
    networks.load_vector(net, model)
    parts = [split(compared, name, "test") for name in names]
    truth = np.concatenate([part.targets.numpy()[:, 0] for part in parts])
    return float(roc_auc_score(truth, np.concatenate([learning.predict(net, part)[:, 0] for part in parts])))


@pytest.mark.slow
def test_the_models_stand_in_their_order_and_every_site_in_every_row(compared: SimpleNamespace) -> None:
    rows = matrix.rows(compared.found)
    assert [row.model for row in rows] == ["federated", "centralised", "personalised", "north alone", "south alone"]
    assert compared.found.sites == SITES
    assert all(len(row.cells) == 3 for row in rows)
    assert [row.site for row in rows] == [None, None, None, "north", "south"]


@pytest.mark.slow
def test_no_patient_changes_sides_between_the_models(compared: SimpleNamespace) -> None:
    for name in ("north", "south"):
        files = list((compared.rehearsal / "sites" / name / "studies").glob("*.pins.json"))
        known: dict[str, str] = {}
        assert len(files) >= 4  # federated, two local ones, the personalised one
        for path in files:
            for patient, side in json.loads(path.read_text())["splits"].items():
                assert known.setdefault(patient, side) == side


@pytest.mark.slow
def test_the_centralised_model_is_the_local_loop_on_all_training_images(compared: SimpleNamespace) -> None:
    """Oracle: the images put together here by hand, FedProx's pull left out, the better round by the joint validation loss."""

    def together(part: Any) -> Any:
        north, south = split(compared, "north", part), split(compared, "south", part)
        fields = {n: torch.cat([getattr(north, n), getattr(south, n)]) for n in ("images", "targets", "known")}
        return SimpleNamespace(**fields, patients=torch.arange(len(fields["images"])))

    data, held = together("train"), together("validation")
    plain = parse(Study, TEXT.replace("fedprox", "fedavg"), "study.yaml")
    plain = plain.with_keys(compared.study.roster, compared.study.aggregator)
    net, tried = networks.build(plain), []
    for number in (1, 2):
        learning.learn(net, data, plain, round_number=number)
        loss = learning.evaluation_loss(learning.predict(net, held), held)
        tried.append((loss, networks.to_vector(net)))
    model = min(tried, key=lambda pair: pair[0])[1]
    np.testing.assert_array_equal(compared.models[0][1], model)
    cells = zip(("north", "south"), matrix.rows(compared.found)[1].cells, strict=False)
    released = [(name, cell) for name, cell in cells if cell is not None]
    assert released
    for name, cell in released:
        assert cell.auroc == pytest.approx(auroc(compared, model, [name]), abs=0.02)


@pytest.mark.slow
def test_personalising_moves_the_head_alone_and_each_site_is_tested_with_its_own(compared: SimpleNamespace) -> None:
    from safetensors.numpy import load_file

    federated = load_file(compared.run / "model.safetensors")["model"]
    net = networks.build(compared.study)
    head = np.concatenate(
        [np.full(int(np.prod(shape)), name.startswith("head.")) for name, shape in networks.layout(net)]
    )
    own = compared.models[1:]
    assert [study.all_sites for study, _ in own] == [["north"], ["south"]]
    row = matrix.rows(compared.found)[2]
    for number, (study, model) in enumerate(own):
        np.testing.assert_array_equal(model[~head], federated[~head])
        assert (model[head] != federated[head]).any()
        cell = row.cells[number]
        if cell is not None:
            assert cell.auroc == pytest.approx(auroc(compared, model, study.all_sites), abs=0.02)
    assert any(cell is not None for cell in row.cells[:2])
    assert (own[0][1] != own[1][1]).any()
    assert row.cells[2] is None
    assert row.pooled is None, "a site without a model of its own would be missing from the whole"


@pytest.mark.slow
def test_the_terminal_shows_the_matrix_and_what_its_rows_are(compared: SimpleNamespace) -> None:
    lines = compared.shown.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("Test AUROC of opacity"))
    assert lines[start + 1].split() == ["model", "on", "north", "on", "south", "on", "west", "all", "sites"]
    assert lines[start + 4].split()[0] == "personalised"
    assert lines[start + 4].split()[-2:] == ["-", "-"]
    assert any("possible in a simulation only" in line for line in lines)
    assert any("nothing was chosen" in line for line in lines)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(extra=1), "Extra inputs"),
        (lambda d: d.update(version=2), "version"),
        (lambda d: d["models"].append(d["models"][0]), "twice"),
        (lambda d: d["models"][0]["results"]["opacity"]["sites"].pop("west"), "other sites"),
        (lambda d: d["models"][3].update(site=None), "another site"),
        (lambda d: d["models"][0]["results"]["opacity"].update(pooled={"auroc": 1.5, "low": 0, "high": 1}), "auroc"),
        (
            lambda d: d["models"][0]["results"]["opacity"].update(pooled={"auroc": float("nan"), "low": 0, "high": 1}),
            "J",
        ),
        (lambda d: d["models"][0]["results"]["opacity"].update(pooled={"auroc": "0.5", "low": 0, "high": 1}), "auroc"),
    ],
    ids=["key", "version", "twice", "site missing", "nowhere trained", "above one", "not a number", "a word"],
)
def test_a_document_that_is_no_comparison_is_refused(change: Any, message: str) -> None:
    cell = {"auroc": 0.9, "low": 0.8, "high": 0.95}
    tested = {"sites": {"north": cell, "south": cell, "west": None}, "pooled": cell}
    models = [
        {"kind": kind, "site": site, "note": "", "results": {"opacity": tested}}
        for kind, site in [("federated", None), ("centralised", None), ("personalised", None), ("local", "north")]
    ]
    whole = {
        "version": 1,
        "study": "small",
        "digest": "0" * 64,
        "targets": ["opacity"],
        "sites": SITES,
        "models": models,
    }
    document = json.loads(json.dumps(whole))
    matrix.read(document)
    change(document)
    with pytest.raises(MessageMalformed, match=message):
        matrix.read(document)


def grey(comparison_: matrix.Comparison) -> Any:
    with Image.open(io.BytesIO(matrix.draw(comparison_))) as picture:
        return np.asarray(picture.convert("L"))


def test_the_picture_is_darker_where_the_model_is_better_even_in_grey() -> None:
    shades = []
    for auroc_ in (0.5, 0.7, 0.85, 1.0):
        cell = matrix.Cell(auroc=auroc_, low=None, high=None)
        tested = matrix.Tested(sites={"north": cell, "south": None}, pooled=None)
        model = matrix.Model(kind="local", site="north", note="", results={"opacity": tested})
        found = matrix.Comparison(
            study="s", digest="0" * 64, targets=["opacity"], sites=["north", "south"], models=[model]
        )
        picture = grey(found)
        values, counts = np.unique(picture[picture < 254], return_counts=True)
        shades.append(int(values[counts.argmax()]))
        assert matrix.draw(found) == matrix.draw(found)
    assert shades == sorted(shades, reverse=True)
    assert min(a - b for a, b in itertools.pairwise(shades)) > 20


def test_what_cannot_be_compared_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    text = TEXT.replace("privacy: none", "privacy: " + PRIVATE.replace("MODE", "distributed"))
    text = text.replace("fedprox", "fedsgd").replace("protection: plain", "protection: masked")
    study = parse(Study, text, "study.yaml")
    with pytest.raises(StudyConflict, match="nobody to share its noise with"):
        comparison.check(study)
    counting = parse(
        Study,
        "name: q\ntitle: Q\npurpose: A test.\ntask: {kind: counting, questions: {all: {}}}\nprivacy: none\n"
        "participation: {sites: [a, b, c], quorum: 3}\n",
        "study.yaml",
    )
    with pytest.raises(StudyConflict, match="nothing to compare"):
        comparison.check(counting)


def test_patients_of_different_sites_stay_different_persons() -> None:
    part = SimpleNamespace(
        images=torch.zeros(3, 1, 2, 2), targets=torch.zeros(3, 1), known=torch.ones(3, 1),
        patients=torch.tensor([0, 1, 1]), public_size=10,
    )  # fmt: skip
    pooled = comparison.Pooled.of([part, part, part])
    assert pooled.patients.tolist() == [0, 1, 1, 2, 3, 3, 4, 5, 5]
    assert (pooled.images.shape[0], pooled.public_size) == (9, 30)
