"""`fl-client evaluate`: figures and MELODY's tables of a released model, on test patients alone, and nothing of it leaves."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from cryptography.hazmat.primitives.asymmetric import ec
from hospital import Hospital, study
from typer.testing import CliRunner

from fl_client import evaluating
from fl_client.cli import app
from fl_client.cohort import Cohort, join, read_pins
from fl_client.index import Index
from fl_client.site import Site
from models import exporting, networks, registry
from models.labels import LabelTable
from models.questions import Observed
from models.registry import Package
from models.study import Study
from privacy import keys
from privacy.errors import CohortTooSmall, DocumentError, StudyConflict
from privacy.journal import entries

KEY = ec.derive_private_key(7, ec.SECP256R1())
FIXED = {"youden": {"threshold": 0.5}}


def packaged(wanted: Study, seed: int = 1, **said: object) -> bytes:
    """A model of `wanted` with weights that nobody trained. On its card: a threshold, and what is `said`."""
    vector = networks.to_vector(networks.build(wanted))
    vector = vector + np.random.default_rng(seed).normal(0, 0.2, vector.shape).astype(np.float32)
    facts = {
        "name": wanted.name,
        "version": "1.0.0",
        "digest": wanted.digest,
        "run_id": "run-1",
        "lineage": {"parent": None, "round": 1},
        "heads": [],
        "created": "2026-01-01T00:00:00Z",
    }
    targets = {name: {"operating": FIXED} for name in wanted.task.targets}
    card = {
        "digest": wanted.digest,
        "run_id": "run-1",
        "selected_round": 1,
        "metrics": {"pooled": {"targets": targets}},
        **said,
    }
    files = {
        "card.json": json.dumps(card).encode(),
        "card.md": b"#\n",
        "model.safetensors": exporting.named_weights(wanted, vector),
        "sbom.cdx.json": b"{}",
        "study.json": wanted.canonical(),
    }
    return registry.pack(facts, files, KEY)


def half() -> Study:
    text = study().model_dump()
    text["evaluation"]["test"] = 0.5
    return Study.model_validate(text)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Hospital, Path, Path]:
    """A site that took part: its splits are pinned. (site, package, what the command wrote)."""
    folder = tmp_path_factory.mktemp("evaluated")
    hospital = Hospital.open(folder, "north", half())
    site = hospital.site
    labels = LabelTable.open(site.home, site.source.labels)
    Cohort.open(Index.open(site.state), labels, hospital.study, "train", site.pins(hospital.study))
    package = folder / "opacity-1.0.0.isocenter"
    package.write_bytes(packaged(hospital.study))
    out = folder / "evaluation"
    words = ["evaluate", str(package), "--out", str(out), "--home", str(site.home)]
    result = CliRunner().invoke(app, words, env={"COLUMNS": "110"}, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (folder / "screen.txt").write_text(result.stdout)
    return hospital, package, out


def table(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))


def test_tables_are_those_that_melody_joins(evaluated: tuple[Hospital, Path, Path]) -> None:
    _, _, out = evaluated
    truth, scores = table(out / "truth-opacity.csv"), table(out / "scores-opacity.csv")
    assert list(truth[0]) == ["case_name", "truth", "manufacturer"] and list(scores[0]) == [
        "case_name",
        "opacity-1.0.0",
    ]
    cases = [row["case_name"] for row in truth]
    assert cases == [row["case_name"] for row in scores] and len(set(cases)) == len(cases) > 5
    assert {row["truth"] for row in truth} <= {"0", "1"}
    assert all(0 <= float(row["opacity-1.0.0"]) <= 1 for row in scores)
    settings = yaml.safe_load((out / "melody-opacity.yaml").read_text())
    assert settings["input data"]["truth file"] == "truth-opacity.csv" and settings["binary threshold"] == 0.5
    assert (
        len(settings["numeric_cols"]["age_binned"]["bins"]) == len(settings["numeric_cols"]["age_binned"]["labels"]) + 1
    )


def test_figures_are_those_of_the_tables(evaluated: tuple[Hospital, Path, Path]) -> None:
    """Counted anew from what was written, pair by pair."""
    _, _, out = evaluated
    truth = {row["case_name"]: row["truth"] for row in table(out / "truth-opacity.csv")}
    scores = {row["case_name"]: float(row["opacity-1.0.0"]) for row in table(out / "scores-opacity.csv")}
    ill = [scores[case] for case, told in truth.items() if told == "1"]
    well = [scores[case] for case, told in truth.items() if told == "0"]
    wins = sum((one > other) + (one == other) / 2 for one in ill for other in well)
    figures = json.loads((out / "metrics.json").read_text())
    found = figures["targets"]["opacity"]
    assert found["auroc"] == pytest.approx(wins / len(ill) / len(well), abs=1e-6)
    assert (found["positives"], found["negatives"]) == (len(ill), len(well))
    low, high = found["interval"]
    assert low <= found["auroc"] <= high and found["bootstrap_interval"][0] <= found["auroc"]
    sensitivity = found["operating"]["youden"]["sensitivity"]
    assert sensitivity["value"] == pytest.approx(sum(score >= 0.5 for score in ill) / len(ill))
    assert sensitivity["interval"][0] <= sensitivity["value"] <= sensitivity["interval"][1]
    assert figures["split"] == "test" and figures["patients"] <= figures["images"] == len(truth)


def members_of(site: Site, wanted: Study) -> list[Any]:
    return join(Index.open(site.state), LabelTable.open(site.home, site.source.labels), wanted)[0]


def test_only_test_patients_are_tested_and_nothing_names_them(evaluated: tuple[Hospital, Path, Path]) -> None:
    hospital, _, out = evaluated
    site = hospital.site
    splits = read_pins(site.pins(hospital.study)).splits
    members = members_of(site, hospital.study)
    tested = [member for member in members if splits[member.token] == "test"]
    assert len(table(out / "truth-opacity.csv")) == len(tested) < len(members)
    written = "".join(path.read_text() for path in out.iterdir())
    for member in members:
        for name in (member.image.patient, member.image.file, member.image.sop_uid, member.token, member.image.content):
            assert str(name) not in written
    assert all(path.stat().st_mode & 0o077 == 0 for path in [out, *out.iterdir()])


def test_the_journal_tells_of_it_and_says_that_it_stayed(evaluated: tuple[Hospital, Path, Path]) -> None:
    hospital, package, out = evaluated
    lines = [entry for entry in entries(hospital.home / "journal.jsonl") if entry["kind"] == "evaluation-written"]
    figures = json.loads((out / "metrics.json").read_text())
    assert lines[0]["facts"]["model"] == Package.open(package).sha256
    assert lines[0]["facts"]["images"] == figures["images"] and lines[0]["facts"]["split"] == "test"
    result = CliRunner().invoke(app, ["egress", "--home", str(hospital.home)], catch_exceptions=False)
    assert result.stdout.startswith("0 messages with 0 bytes")
    screen = (out.parent / "screen.txt").read_text()
    assert "AUROC" in screen and "stays at the hospital" in screen and "sensitivity, youden at 0.500" in screen


def run(hospital: Hospital, package: bytes, out: Path, divided: Study | None = None) -> dict[str, Any]:
    found = Package.read(package)
    return evaluating.evaluate(hospital.site, found, divided, out).figures


def test_a_site_without_a_part_in_the_study_tests_on_everybody(
    evaluated: tuple[Hospital, Path, Path], tmp_path: Path
) -> None:
    hospital, _, _ = evaluated
    part = half().participation.model_dump() | {"sites": ["south", "east"]}
    elsewhere = Study.model_validate(half().model_dump() | {"participation": part})
    found = run(hospital, packaged(elsewhere), tmp_path / "out")
    assert found["split"] == "external" and found["images"] == len(members_of(hospital.site, elsewhere))
    assert not hospital.site.pins(elsewhere).exists(), "looking at a model pins nobody"


def cases_of(hospital: Hospital, members: list[Any]) -> set[str]:
    secret = keys.token_key(hospital.home / "keys" / evaluating.SECRET)
    return {keys.token(secret, f"case {member.image.content} {member.image.file}") for member in members}


def written(out: Path) -> set[str]:
    return {row["case_name"] for row in table(out / "truth-opacity.csv")}


def test_patients_of_its_training_are_left_out_whatever_study_divides(
    evaluated: tuple[Hospital, Path, Path], tmp_path: Path
) -> None:
    """The other study tests everybody here; those by whom the model was made are left out all the same."""
    hospital, package, _ = evaluated
    facts = half().model_dump()
    facts["participation"] |= {"sites": ["south", "east"], "evaluate_only": ["north"]}
    facts["evaluation"] |= {"external": "all"}
    other = Study.model_validate(facts)
    found = run(hospital, package.read_bytes(), tmp_path / "out", other)
    splits = read_pins(hospital.site.pins(hospital.study)).splits
    members = members_of(hospital.site, other)
    untouched = [member for member in members if splits[member.token] == "test"]
    assert written(tmp_path / "out") == cases_of(hospital, untouched) and len(untouched) < len(members)
    assert found["divided_by"] == other.digest and found["split"] == "external"


def test_another_study_divides_where_it_is_asked_for(evaluated: tuple[Hospital, Path, Path], tmp_path: Path) -> None:
    """A model from elsewhere, tested on the test patients of a study of this site: as its pins say, and no others."""
    hospital, _, _ = evaluated
    part = half().participation.model_dump() | {"sites": ["south", "east"]}
    elsewhere = Study.model_validate(half().model_dump() | {"participation": part})
    found = run(hospital, packaged(elsewhere), tmp_path / "out", hospital.study)
    splits = read_pins(hospital.site.pins(hospital.study)).splits
    tested = [member for member in members_of(hospital.site, elsewhere) if splits[member.token] == "test"]
    assert found["split"] == "test" and written(tmp_path / "out") == cases_of(hospital, tested)


def test_covariates_go_into_the_scores_and_a_model_of_numbers_is_refused_by_name(
    evaluated: tuple[Hospital, Path, Path], tmp_path: Path
) -> None:
    hospital, _, _ = evaluated
    site = hospital.site
    part = half().participation.model_dump() | {"sites": ["south", "east"]}
    beside = {"age": {"missing": 50, "header": True}, "sex": {"header": True}}
    facts = half().model_dump(mode="json") | {
        "participation": part,
        "network": {"name": "linear"},
        "covariates": beside,
    }
    package = packaged(Study.model_validate(facts))
    run(hospital, package, tmp_path / "out")
    members = members_of(site, Package.read(package).study)
    cohort = Cohort.of(Index.open(site.state), Package.read(package).study, "external", members)
    assert len(set(cohort.covariates[:, 0].tolist())) > 3, "ages are those of the header"
    with torch.inference_mode():
        net = exporting.network(Package.read(package)).eval()
        expected = torch.sigmoid(net(cohort.images, cohort.covariates))[:, 0].tolist()
    scores = [float(row["opacity-1.0.0"]) for row in table(tmp_path / "out" / "scores-opacity.csv")]
    assert scores == pytest.approx(expected, abs=1e-5)
    number = {"kind": "regression", "targets": ["extent"], "range": [0, 24], "unit": "points"}
    of_number = packaged(Study.model_validate(facts | {"task": number}))
    with pytest.raises(StudyConflict, match=r"model of extent \(a number, 0 to 24 points\)"):
        run(hospital, of_number, tmp_path / "number")


def test_an_existing_folder_is_not_touched_and_a_failure_leaves_none(
    evaluated: tuple[Hospital, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hospital, package, out = evaluated
    with pytest.raises(DocumentError, match="exists already"):
        run(hospital, package.read_bytes(), out)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("privacy.journal.Journal.append", full)
    with pytest.raises(OSError, match="No space"):
        run(hospital, package.read_bytes(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(evaluating.cohort, "join", lambda *_: ([], None))
    with pytest.raises(CohortTooSmall):
        run(hospital, package.read_bytes(), tmp_path / "out")


@pytest.mark.parametrize(
    ("age", "shown"),
    [
        (None, ""),
        ((63.0, 63.0), 63),
        ((50.0, 65.0), 50),
        ((50.0, float("inf")), ""),
        ((40.0, 44.0), 40),
        ((38.0, 42.0), ""),
        ((90.0, float("inf")), 90),
        ((0.5, 0.5), 0),
    ],
    ids=str,
)
def test_an_age_lands_in_the_band_that_is_certain(age: Any, shown: object) -> None:
    assert evaluating._groups(Observed("p", age=age))[0] == shown


def test_groups_have_melodys_words() -> None:
    row = evaluating._groups(Observed("p", sex="F", race="White", ethnicity="Not Hispanic or Latino", vendor="ge"))
    assert row == ["", "Not Hispanic or Latino", "White", "Female", "White and Not HispanicLatino", "ge"]
    row = evaluating._groups(Observed("p", race="Asian", ethnicity="Not Hispanic or Latino"))
    assert row[4] == "Not White or Hispanic or Latino"
    assert evaluating._groups(Observed("p", race="Asian"))[1:] == ["Not Reported", "Asian", *["Not Reported"] * 3]


def test_a_category_without_a_group_that_melody_shows_is_left_out() -> None:
    """MELODY 0.3.3 ends with a KeyError on such a column. Ages count by its bands, and 18 is in the second."""

    def columns(*groups: list[object]) -> list[object]:
        rows = [["case", 1, *group] for group in groups]
        return evaluating._usable([list(evaluating.COLUMNS), *rows])[0][2:]

    unknown = "Not Reported"
    woman: list[object] = [18, unknown, "Asian", "Female", unknown, "ge"]
    assert columns(*[woman] * 10) == ["age", "race", "sex", "manufacturer"]
    assert columns(*[woman] * 9) == []
    younger: list[object] = [17, unknown, unknown, "Female", unknown, ""]
    older: list[object] = [29, unknown, unknown, "Male", unknown, ""]
    assert columns(*[woman] * 5, *[younger] * 5) == ["sex"]
    assert columns(*[woman] * 5, *[older] * 5) == ["age"]
    assert columns() == []
