"""What `fl-study plan` says: figures from the accountant, ratios that can be worked out by hand, and warnings."""

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fl_server import planning
from fl_server.research import app
from models.study import Study, parse
from privacy import accounting
from privacy.errors import DocumentError, StudyConflict

TEXT = """
name: private
title: Private
purpose: A test.
task: {targets: [opacity]}
training: {rounds: 10, balance: false}
privacy: {mode: local, epsilon: 4, clip_norm: 1.0, sampling_rate: 0.25, steps: 2}
participation: {sites: [north, south, east, west], quorum: 3}
"""


def study(text: str = TEXT) -> Study:
    return parse(Study, text, "study.yaml")


@pytest.fixture(scope="module")
def found() -> planning.Plan:
    return planning.plan(study(), {"north": 400, "south": 200})


def option(found: planning.Plan, name: str) -> planning.Option:
    return next(option for option in found.options if option.name == name)


def test_every_plan_keeps_epsilon_and_the_first_is_the_study(found: planning.Plan) -> None:
    first = found.options[0]
    assert (first.name, first.rounds, first.steps, first.sites) == ("as written", 10, 2, 4)
    for entry in found.options:
        assert entry.everybody <= (2 if entry.name == "half the ε" else 4) + 1e-9
        assert entry.everybody > 0.97 * (2 if entry.name == "half the ε" else 4)
    assert first.drawn == 4 * 0.25 * 300, "the mean of the sites that were given stands for the others"


def test_signal_to_noise_is_what_its_definition_says(found: planning.Plan) -> None:
    for entry in found.options:
        steps = entry.rounds * (1 if entry.name == "distributed noise" else 2)
        per_site = entry.drawn / entry.sites
        assert entry.signal_to_noise == pytest.approx(math.sqrt(steps * entry.sites) * per_site / entry.noise)
    written = found.options[0].signal_to_noise
    assert option(found, "twice the sites").signal_to_noise == pytest.approx(math.sqrt(2) * written)
    assert option(found, "2 x patients a step").signal_to_noise > written > option(found, "half the ε").signal_to_noise


def test_distributed_noise_lowers_epsilon_against_the_coordinator_only(found: planning.Plan) -> None:
    shared = option(found, "distributed noise")
    assert shared.coordinator < 0.75 * shared.everybody
    event = accounting.PrivacyEvent(shared.noise * math.sqrt(2), 0.25, 22)
    assert shared.coordinator == pytest.approx(accounting.epsilon([event], 1e-5, fine=True), rel=1e-6)
    assert all(o.coordinator == o.everybody for o in found.options if o.name != "distributed noise")


def test_tuning_on_private_data_has_its_price(found: planning.Plan) -> None:
    naive, private = found.tuning
    assert 4 < private < naive < 10 * 4


@pytest.mark.slow
def test_warnings_name_what_makes_a_plan_useless() -> None:
    text = TEXT.replace("epsilon: 4", "epsilon: 20").replace("sampling_rate: 0.25", "sampling_rate: 0.01, delta: 0.001")
    said = " ".join(planning.plan(study(text), {"north": 1500, "south": 100}).warnings)
    assert "not below 1 / 1500" in said and "draws 1.0 patients" in said and "ε of 20" in said
    assert planning.plan(study(), {"north": 400}).warnings == []


def test_a_study_without_privacy_or_with_other_sites_is_refused() -> None:
    plain = TEXT.replace(
        "privacy: {mode: local, epsilon: 4, clip_norm: 1.0, sampling_rate: 0.25, steps: 2}", "privacy: none"
    )
    with pytest.raises(StudyConflict, match="no ε to plan"):
        planning.plan(study(plain), {})
    with pytest.raises(StudyConflict, match="atlantis"):
        planning.plan(study(), {"atlantis": 100})


def test_the_command_fits_eighty_columns_and_tells_programs_the_same(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(TEXT)
    words = ["plan", str(file), "--patients", "north=400"]
    shown = CliRunner().invoke(app, words, env={"COLUMNS": "80"})
    assert shown.exit_code == 0 and "distributed noise" in shown.output and "…" not in shown.output
    told = json.loads(CliRunner().invoke(app, [*words, "--json"]).output)
    assert told["unit"] == "patient" and len(told["options"]) == 8 and told["tuning"]["tries"] == 10
    wrong = CliRunner().invoke(app, ["plan", str(file), "--patients", "north"])
    assert isinstance(wrong.exception, DocumentError)
