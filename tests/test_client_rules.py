"""Approval by rule: each condition alone keeps a study waiting for a person, and nothing that binds a person is left out."""

import datetime as dt
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from coordinator import Coordinator, coordinator, study
from typer.testing import CliRunner

from fl_client import enrol, rules
from fl_client.cli import app
from fl_client.policy import Rule
from fl_client.rules import misses
from models.study import Privacy, Study
from privacy.journal import Journal

TODAY = dt.date(2026, 11, 26)
RULE: dict[str, Any] = {"researchers": ["rosa"], "epsilon": 6, "rounds": 10, "until": "2027-01-31"}
SITES = ("north", "south", "west")


def asked(**change: Any) -> Study:
    plan = Privacy(
        mode="local", epsilon=4, clip_norm=1.0, noise_multiplier=2.0, sampling_rate=0.1, steps=1, images_per_patient=1
    )
    made = study(*SITES, quorum=3)
    training = made.training.model_copy(update={"balance": False})
    return made.model_copy(update={"protection": "masked", "privacy": plan, "training": training, **change})


STUDY = asked()

# Field of a rule -> (rule that does not approve STUDY, what it says). A field without a row fails a test below.
MISSES: dict[str, tuple[dict[str, Any], str]] = {
    "researchers": ({"researchers": ["ruth"]}, "researcher rosa"),
    "networks": ({"networks": ["linear"]}, "network"),
    "targets": ({"targets": ["fracture"]}, "opacity"),
    "epsilon": ({"epsilon": 0.01}, "more than 0.01"),
    "rounds": ({"rounds": 1}, "rounds"),
    "minimum_sites": ({"minimum_sites": 4}, "fewer than 4"),
    "until": ({"until": "2026-11-25"}, "ended"),
}


def test_every_condition_is_under_test() -> None:
    assert set(Rule.model_fields) == set(MISSES) | {"protection"}  # which can be nothing but masked


@pytest.mark.parametrize("field", MISSES)
def test_each_condition_alone_keeps_a_study_waiting(field: str) -> None:
    assert misses(Rule.model_validate(RULE), STUDY, "rosa", 1e-5, TODAY) == []
    change, says = MISSES[field]
    [sentence] = misses(Rule.model_validate(RULE | change), STUDY, "rosa", 1e-5, TODAY)
    assert says in sentence


@pytest.mark.parametrize("change", [{"protection": "sealed"}, {"protection": "plain"}, {"privacy": "none"}])
def test_no_rule_approves_what_is_not_masked_or_not_private(change: dict[str, Any]) -> None:
    generous = RULE | {"epsilon": 1000, "rounds": 10_000}
    assert len(misses(Rule.model_validate(generous), asked(**change), "rosa", 1e-5, TODAY)) == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"subgroups": ["sex"]}, "test results of subgroups"),
        ({"external": "all"}, "all patients of sites that only evaluate"),
    ],
)
def test_no_rule_approves_what_more_is_told_of_test_patients(change: dict[str, Any], says: str) -> None:
    """What the sums of the test tell beyond the usual, and no ε covers, is for a person to read."""
    generous = RULE | {"epsilon": 1000, "rounds": 10_000}
    [sentence] = misses(
        Rule.model_validate(generous), asked(evaluation=STUDY.evaluation.model_copy(update=change)), "rosa", 1e-5, TODAY
    )
    assert says in sentence


def test_no_rule_approves_what_is_learned_beside_the_image() -> None:
    generous = Rule.model_validate(RULE | {"epsilon": 1000, "rounds": 10_000})
    beside = Study.model_validate(STUDY.model_dump() | {"covariates": {"sex": {}}})
    [sentence] = misses(generous, beside, "rosa", 1e-5, TODAY)
    assert "learns from sex of your patients beside" in sentence


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Coordinator]:
    with coordinator(tmp_path) as demo:
        for name in SITES[1:]:
            demo.join(name)
        demo.join("rosa", "researcher")
        yield demo


@pytest.fixture
def home(served: Coordinator, tmp_path: Path) -> Path:
    enrol.join(str(served.home.invite("north", "site")), tmp_path / "site")
    with_rules(tmp_path / "site", RULE | {"until": "2999-12-31"})
    return tmp_path / "site"


def with_rules(home: Path, *found: dict[str, Any], **policy: Any) -> None:
    path = home / "site.yaml"
    settings = yaml.safe_load(path.read_text())
    settings |= {"approve": list(found), "policy": settings["policy"] | policy}
    path.write_text(yaml.safe_dump(settings))


def carried_out(home: Path) -> list[str]:
    return rules.carry_out(home, lambda sentence: None)


def test_a_rule_approves_as_if_by_hand_once_and_says_so(served: Coordinator, home: Path) -> None:
    offered = served.submit(STUDY)
    told: list[str] = []
    assert rules.carry_out(home, told.append) == [offered.digest]
    assert carried_out(home) == []
    assert "by rule 1" in told[0]
    assert served.home.roster.decisions(offered.digest) == {"north": "approved"}
    assert Journal(home / "journal.jsonl").last("approved") == {"study": offered.digest, "rule": 1}
    enrol.decide(home, enrol.find_offer(home, offered.digest), "declined")
    assert carried_out(home) == []  # what a person withdrew stays withdrawn
    assert served.home.roster.decisions(offered.digest) == {"north": "declined"}


def test_without_rules_nothing_is_approved_and_nobody_asked(served: Coordinator, home: Path, monkeypatch: Any) -> None:
    served.submit(STUDY)
    with_rules(home)
    monkeypatch.setattr(enrol, "fetch_offers", None)
    assert carried_out(home) == []


def test_what_a_person_declined_no_rule_approves(served: Coordinator, home: Path) -> None:
    offered = served.submit(STUDY)
    enrol.decide(home, enrol.find_offer(home, offered.digest), "declined")
    assert carried_out(home) == []


def test_the_policy_binds_a_rule_too(served: Coordinator, home: Path) -> None:
    served.submit(STUDY)
    with_rules(home, RULE | {"until": "2999-12-31"}, maximum_rounds=1)
    assert carried_out(home) == []
    shown = CliRunner().invoke(app, ["rules", "--home", str(home)])
    assert "maximum_rounds" in shown.output


def test_a_changed_key_waits_for_a_telephone_call(served: Coordinator, home: Path) -> None:
    first = served.submit(STUDY)
    assert carried_out(home) == [first.digest]
    served.home.revoke("south")
    enrol.join(str(served.home.invite("south", "site")), served.folder / "south-again")
    served.submit(asked(title="Opacities, once more"))
    assert carried_out(home) == []
    [row] = json.loads(CliRunner().invoke(app, ["rules", "--json", "--home", str(home)]).output)
    assert row["rule"] is None
    assert "the key of south changed" in row["why_not"][0]


def test_the_first_rule_that_fits_is_named_and_why_the_others_do_not(served: Coordinator, home: Path) -> None:
    served.submit(STUDY)
    long = RULE | {"until": "2999-12-31"}
    with_rules(home, long | {"researchers": ["ruth"]}, long)
    [row] = json.loads(CliRunner().invoke(app, ["rules", "--json", "--home", str(home)]).output)
    assert row["rule"] == 2
    with_rules(home, long | {"researchers": ["ruth"]}, long | {"rounds": 1})
    [row] = json.loads(CliRunner().invoke(app, ["rules", "--json", "--home", str(home)]).output)
    assert row["rule"] is None
    assert [reason[:7] for reason in row["why_not"]] == ["rule 1:", "rule 2:"]
