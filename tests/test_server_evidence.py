"""`fl-study attack` on a rehearsal of phantoms, and the gate before release."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from fl_server import evidence
from fl_server.research import app
from models.study import Study, parse
from privacy import attacks, noise
from privacy.errors import DocumentError, MessageMalformed, ReleaseRefused, StudyConflict

TEXT = """
name: rehearsed
title: Rehearsed
purpose: A test.
task: {targets: [opacity]}
images: {size_px: 32}
network: {name: linear}
training: {rounds: 4, balance: false, learning_rate: 0.3, augmentation: none}
strategy: {name: fedsgd}
privacy: {mode: distributed, epsilon: 3, clip_norm: 1.0, sampling_rate: 1.0, images_per_patient: 1}
participation: {sites: [north, south, east], quorum: 3, minimum_patients: 2, round_timeout_s: 60}
evaluation: {validation: 0.2, test: 0.25, bins: 50}
"""
PICTURES = ("canaries.png", "membership.png", "inversion.png")


def private() -> Study:
    return parse(Study, TEXT, "study.yaml").with_noise()


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    folder = tmp_path_factory.mktemp("attack")
    (folder / "study.yaml").write_text(TEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("privacy.attacks.RESTARTS", 1)
        words = ["attack", str(folder / "study.yaml"), "--patients", "90", "--out", str(folder / "out")]
        result = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return folder / "out", result.exit_code, " ".join(result.output.split())


def facts(attacked: tuple[Path, int, str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((attacked[0] / "attack.json").read_text())
    return found


def test_a_sound_mechanism_is_attacked_in_vain_and_the_words_say_what_that_proves(
    attacked: tuple[Path, int, str],
) -> None:
    out, code, screen = attacked
    found = facts(attacked)
    audit = found["audit"]
    assert found["learned"] == private().learned and audit["canaries"] == 1000
    assert audit["event"]["noise_multiplier"] == private().privacy.noise_multiplier  # type: ignore[union-attr]
    assert audit["alarm"] < audit["claim"] <= 3 and audit["faults"] == [] and code == 0
    assert audit["unit"] == "patient" and audit["relation"] == "add or remove one patient"
    assert "proves little" in screen and "Gaussian estimate" in screen and "0.5 is chance" in screen
    for name in PICTURES:
        with Image.open(out / name) as picture:
            assert picture.format == "PNG" and min(picture.size) > 400


def test_pictures_come_out_of_a_plain_gradient_and_not_out_of_noise(attacked: tuple[Path, int, str]) -> None:
    found = facts(attacked)["reconstruction"]
    easy, own = found["psnr_db"].values()
    assert easy["plain: this site's update"] > 20
    for views in (easy, own):
        assert max(views["plain, with noise"], views["masked, with noise"]) < 12
        # Of three patients alone in a sum, some come out and some do not: masks promise nothing about that.
        assert "masked: sum of 3 sites" in views
    assert found["sites"] == 3 and 5 < found["average_db"] < 25


def test_what_is_shown_as_noise_is_what_the_production_mechanism_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the production sampler silenced, the noisy update is the clipped gradient itself."""
    monkeypatch.setattr(noise.DiscreteGaussian, "add_to", lambda self, total, stream: None)
    study, cohort = private(), _Cohort()
    preys = evidence._preys(study, {(name, "train"): cohort for name in study.participation.sites})
    assert [prey.name for prey in preys][1:] == ["the study's network (linear)"] and len(preys[0].units) == 3
    assert study.privacy != "none"
    for prey in preys:
        gradient, sent = prey.gradient(prey.units[0]), prey.noisy(prey.units[0], study.privacy)
        clipped = gradient / max(1.0, float(gradient.norm()))
        assert float((sent - clipped).norm()) < 2e-3 * float(clipped.norm())


def test_members_are_not_told_from_others_under_noise(attacked: tuple[Path, int, str]) -> None:
    seen = facts(attacked)["membership"]
    assert seen["low"] < 0.6 and seen["strict"] is None and seen["members"] > seen["others"] > 20


def test_halved_noise_turns_the_audit_red_and_closes_the_gate(
    attacked: tuple[Path, int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    add_to = noise.DiscreteGaussian.add_to
    monkeypatch.setattr(
        noise.DiscreteGaussian,
        "add_to",
        lambda self, total, stream: add_to(noise.gaussian(self.sigma / 2), total, stream),
    )
    study = private()
    found = facts(attacked)
    audit = evidence._audit_facts(evidence._canaries(study, _Cohort()))
    assert audit["alarm"] > audit["claim"] and audit["faults"]
    with pytest.raises(ReleaseRefused, match="more than the study claims"):
        evidence.release_gate(study, found | {"audit": audit})


class _Cohort:
    """Patients of one image each."""

    def __init__(self, count: int = 10) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.rand(count, 1, 32, 32, generator=generator)
        self.targets = (torch.rand(count, 1, generator=generator) > 0.5).float()
        self.known, self.patients = torch.ones(count, 1), torch.arange(count)


def test_the_gate_opens_for_a_study_with_its_own_attack_only(attacked: tuple[Path, int, str]) -> None:
    study, found = private(), facts(attacked)
    evidence.release_gate(study, found)
    # Keys and protection are filled in at submission; what was learned is the same.
    keyed = study.model_copy(update={"roster": {"north": "02" + "ab" * 32}, "aggregator": "cd" * 32})
    evidence.release_gate(keyed, found)
    with pytest.raises(ReleaseRefused, match="no attack on it was given"):
        evidence.release_gate(study, None)
    with pytest.raises(ReleaseRefused, match="another study"):
        evidence.release_gate(study.model_copy(update={"title": "Another"}), found)
    for name, value in (("alarm", 99.0), ("lower_bound", 99.0), ("claim", 0.0)):
        with pytest.raises(ReleaseRefused, match="more than the study claims"):
            evidence.release_gate(study, found | {"audit": found["audit"] | {name: value}})
    with pytest.raises(ReleaseRefused, match="half the noise"):
        evidence.release_gate(study, found | {"audit": found["audit"] | {"faults": ["half the noise"]}})


def test_the_gate_computes_the_claim_itself_and_wants_the_study_s_own_mechanism(
    attacked: tuple[Path, int, str],
) -> None:
    study, found = private(), facts(attacked)
    audit = found["audit"]
    for changed in (
        {"claim": audit["claim"] * 1.01},
        {"event": audit["event"] | {"noise_multiplier": audit["event"]["noise_multiplier"] * 2}},
        {"event": audit["event"] | {"sampling_rate": 0.5}},
        {"event": audit["event"] | {"steps": 1}},
    ):
        with pytest.raises(ReleaseRefused, match="another mechanism"):
            evidence.release_gate(study, found | {"audit": audit | changed})
    with pytest.raises(MessageMalformed):
        evidence.release_gate(study, found | {"audit": audit | {"event": {"steps": 1}}})


def test_an_audit_is_of_the_capped_draw_and_of_no_more_work_than_a_laptop_has(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[attacks.Mechanism] = []

    def look(training: attacks.Training, mechanism: attacks.Mechanism) -> None:
        asked.append(mechanism)
        assert training.patients <= evidence.PATIENTS_MAX

    monkeypatch.setattr(attacks, "canary_audit", look)
    study = private()
    assert study.privacy != "none"
    often = study.model_copy(update={"training": study.training.model_copy(update={"rounds": 900})})
    rarely = often.model_copy(update={"privacy": study.privacy.model_copy(update={"sampling_rate": 0.1})})
    for one in (study, often, rarely):
        evidence._canaries(one, _Cohort(150))
    assert [mechanism.steps for mechanism in asked] == [4, 20, evidence.STEPS_MAX]
    assert rarely.privacy != "none" and asked[2].batch_max == rarely.privacy.batch_max(1100)


def test_an_attack_names_the_run_and_says_whose_pictures_it_shows(attacked: tuple[Path, int, str]) -> None:
    out, _, screen = attacked
    found = facts(attacked)
    assert (out / "rehearsal-1" / "coordinator" / "runs" / found["run"] / "model.safetensors").is_file()
    assert found["phantoms"] is True and "real patients" not in screen
    assert "real patients" in evidence._sentences(private(), found | {"phantoms": False})[-1]


def test_an_estimate_above_the_claim_by_chance_is_called_that(attacked: tuple[Path, int, str]) -> None:
    found = facts(attacked)
    audit = found["audit"] | {"claim": 2.0, "low": 1.5, "alarm": 1.2}
    for estimate, faults, words in (
        (1.9, [], "it does not exceed the claim"),
        (2.1, [], "by no more than chance"),
        (9.0, ["half the noise"], "CONTRADICTS THE CLAIM: half the noise"),
    ):
        said = evidence._sentences(private(), found | {"audit": audit | {"estimate": estimate, "faults": faults}})
        assert words in said[0]


def test_a_study_without_privacy_is_attacked_without_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attacks, "RESTARTS", 1)
    monkeypatch.setattr(attacks, "INVERSION_STEPS", 5)
    cohorts = {(name, "train"): _Cohort() for name in ("north", "south", "east")}
    found = evidence._reconstruction(open_study(), cohorts, tmp_path)
    for views in found["psnr_db"].values():
        assert list(views) == ["plain: this site's update", "masked: sum of 3 sites"]
    assert (tmp_path / "inversion.png").stat().st_size > 0


@pytest.mark.parametrize("junk", [[], {}, {"version": 1}, {"version": 1, "learned": "x", "audit": None}, "attack", 7])
def test_junk_opens_no_gate(junk: Any) -> None:
    with pytest.raises((MessageMalformed, ReleaseRefused)):
        evidence.release_gate(private(), junk)


def open_study() -> Study:
    text = TEXT.replace("strategy: {name: fedsgd}\n", "").split("privacy:")
    rest = text[1].split("\n", 1)[1]
    return parse(Study, f"{text[0]}privacy: none\n{rest}", "study.yaml")


def test_a_study_without_privacy_claims_nothing_that_could_be_refuted() -> None:
    evidence.release_gate(open_study(), None)


def test_a_file_that_is_no_attack_is_named(tmp_path: Path) -> None:
    for content in (None, b"", b"{"):
        file = tmp_path / "attack.json"
        if content is not None:
            file.write_bytes(content)
        result = CliRunner().invoke(app, ["release", "run-1", "--attack", str(file), "--home", str(tmp_path)])
        assert isinstance(result.exception, DocumentError) and "attack.json" in str(result.exception)


def test_volumes_are_not_attacked_with_pictures(tmp_path: Path) -> None:
    volumes = TEXT.replace("{size_px: 32}", "{modalities: [CT], volume: {size: [16, 24, 32]}}")
    (tmp_path / "study.yaml").write_text(volumes)
    words = ["attack", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, StudyConflict) and not (tmp_path / "out").exists()
