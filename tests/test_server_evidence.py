"""`fl-study attack` on a rehearsal of phantoms, and the gate before release."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from fl_server import evidence
from fl_server.research import app
from models.study import Study, parse
from privacy import noise
from privacy.errors import DocumentError, MessageMalformed, ReleaseRefused

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
    assert audit["low"] < audit["claim"] <= 3 and audit["faults"] == [] and code == 0
    assert audit["unit"] == "patient" and audit["relation"] == "add or remove one patient"
    assert "proves little" in screen and "Gaussian estimate" in screen and "0.5 is chance" in screen
    for name in PICTURES:
        with Image.open(out / name) as picture:
            assert picture.format == "PNG" and min(picture.size) > 400


def test_pictures_come_out_of_a_plain_gradient_and_not_out_of_noise(attacked: tuple[Path, int, str]) -> None:
    """Of a sum without noise nothing is promised: phantoms are so alike that three of them together still show a chest."""
    plain, noisy, _, masked_and_noisy = facts(attacked)["reconstruction"]["psnr_db"].values()
    assert plain > 20 and max(noisy, masked_and_noisy) < 12


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
    assert audit["low"] > audit["claim"] and audit["faults"]
    with pytest.raises(ReleaseRefused, match="more than the study claims"):
        evidence.release_gate(study, found | {"audit": audit})


class _Cohort:
    """Ten patients of one image each."""

    def __init__(self) -> None:
        import torch

        generator = torch.Generator().manual_seed(1)
        self.images = torch.rand(10, 1, 32, 32, generator=generator)
        self.targets = (torch.rand(10, 1, generator=generator) > 0.5).float()
        self.known, self.patients = torch.ones(10, 1), torch.arange(10)


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
    for name, value in (("low", 99.0), ("lower_bound", 99.0), ("claim", 0.0)):
        with pytest.raises(ReleaseRefused, match="more than the study claims"):
            evidence.release_gate(study, found | {"audit": found["audit"] | {name: value}})
    with pytest.raises(ReleaseRefused, match="half the noise"):
        evidence.release_gate(study, found | {"audit": found["audit"] | {"faults": ["half the noise"]}})


@pytest.mark.parametrize("junk", [[], {}, {"version": 1}, {"version": 1, "learned": "x", "audit": None}, "attack", 7])
def test_junk_opens_no_gate(junk: Any) -> None:
    with pytest.raises((MessageMalformed, ReleaseRefused)):
        evidence.release_gate(private(), junk)


def test_a_study_without_privacy_claims_nothing_that_could_be_refuted() -> None:
    text = TEXT.replace("strategy: {name: fedsgd}\n", "").split("privacy:")
    rest = text[1].split("\n", 1)[1]
    evidence.release_gate(parse(Study, f"{text[0]}privacy: none\n{rest}", "study.yaml"), None)


def test_a_file_that_is_no_attack_is_named(tmp_path: Path) -> None:
    for content in (None, b"", b"{"):
        file = tmp_path / "attack.json"
        if content is not None:
            file.write_bytes(content)
        result = CliRunner().invoke(app, ["release", "run-1", "--attack", str(file), "--home", str(tmp_path)])
        assert isinstance(result.exception, DocumentError) and "attack.json" in str(result.exception)
