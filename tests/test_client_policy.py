"""What site.yaml permits: each rule alone refuses, at the gate and for the person who approves; hours, pauses, settings."""

import datetime as dt
import json
import time
from pathlib import Path
from typing import Any

import pytest
from hospital import Hospital, study
from typer.testing import CliRunner

from fl_client import site
from fl_client.cli import app
from fl_client.policy import DAYS, NETWORKS, Hours, Pause, Policy, broken
from fl_client.site import SiteFile
from models.study import Network, Privacy, Study, parse
from privacy import wire
from privacy.errors import DocumentError, OutsideHours, PolicyForbids, SitePaused


def private() -> Study:
    plan = Privacy(
        mode="local", epsilon=4, clip_norm=1.0, noise_multiplier=2.0, sampling_rate=0.1, steps=1, images_per_patient=1
    )
    training = STUDY.training.model_copy(update={"balance": False})
    return STUDY.model_copy(update={"privacy": plan, "protection": "masked", "training": training})


STUDY = study()
PERMITS = {"least_protection": "plain", "permit_without_privacy": True, "networks": list(NETWORKS)}

# Field -> (the policy that refuses STUDY, what the sentence has to say). A field without a row fails a test below.
REFUSES: dict[str, tuple[dict[str, Any], str]] = {
    "least_protection": ({"least_protection": "masked"}, "least_protection"),
    "maximum_rounds": ({"maximum_rounds": 1}, "maximum_rounds"),
    "tasks": ({"tasks": []}, "policy.tasks"),
    "networks": ({"networks": [name for name in NETWORKS if name != STUDY.network.name]}, "policy.networks"),
    "targets": ({"targets": ["fracture"]}, "policy.targets"),
    "data_sets": ({"data_sets": ["abdomen"]}, "policy.data_sets"),
    "permit_without_privacy": ({"permit_without_privacy": False}, "permit_without_privacy"),
}
ELSEWHERE = {
    "minimum_patients": "tests/test_client_cohort.py, where cohorts are counted",
    "hours": "below, because they say when and not what",
    "epsilon_per_study": "below, with a private study",
    "epsilon_per_year": "tests/test_privacy_ledger.py",
    "epsilon_total": "tests/test_privacy_ledger.py",
    "delta": "tests/test_privacy_ledger.py",
}


def test_every_field_of_the_policy_is_under_test() -> None:
    assert set(Policy.model_fields) == set(REFUSES) | set(ELSEWHERE)
    assert set(NETWORKS) == set(Network.model_fields["name"].annotation.__args__)  # type: ignore[union-attr]


@pytest.mark.parametrize("field", REFUSES)
def test_each_field_alone_refuses_and_the_study_passes_without_it(tmp_path: Path, field: str) -> None:
    change, says = REFUSES[field]
    assert broken(Policy.model_validate(PERMITS), STUDY, "north", "chest") == []
    [sentence] = broken(Policy.model_validate(PERMITS | change), STUDY, "north", "chest")
    assert says in sentence
    hospital = Hospital.open(tmp_path, "north", STUDY)
    hospital.approve(STUDY)
    _policy(hospital, **change)
    with pytest.raises(PolicyForbids, match=says):
        _gate(hospital).admit(hospital.order())
    assert hospital.site.journal.last("train-report") is None


def test_what_a_private_study_spends_is_held_against_the_cap() -> None:
    plan = private()
    assert broken(Policy(), plan, "north", "chest") == []
    [sentence] = broken(Policy(epsilon_per_study=0.01), plan, "north", "chest")
    assert "epsilon_per_study" in sentence
    assert broken(Policy(epsilon_per_study=0.01), plan, "elsewhere", "chest") == []  # nothing is trained there


@pytest.mark.parametrize(
    ("hours", "moment", "permitted"),
    [
        ({}, "2026-11-26 03:00", True),
        ({"begin": "08:00", "end": "18:00"}, "2026-11-26 07:59", False),
        ({"begin": "08:00", "end": "18:00"}, "2026-11-26 08:00", True),
        ({"begin": "08:00", "end": "18:00"}, "2026-11-26 17:59", True),
        ({"begin": "08:00", "end": "18:00"}, "2026-11-26 18:00", False),
        ({"begin": "19:00", "end": "06:30"}, "2026-11-26 23:59", True),
        ({"begin": "19:00", "end": "06:30"}, "2026-11-26 06:29", True),
        ({"begin": "19:00", "end": "06:30"}, "2026-11-26 12:00", False),
        ({"days": ["fri"], "begin": "19:00", "end": "06:30"}, "2026-11-28 06:29", True),  # the night from Friday
        ({"days": ["fri"], "begin": "19:00", "end": "06:30"}, "2026-11-27 06:29", False),  # the night to Friday
        ({"days": ["sun"], "begin": "19:00", "end": "06:30"}, "2026-11-30 01:00", True),  # over the end of the week
        ({"days": ["sat", "sun"]}, "2026-11-26 12:00", False),
        ({"days": ["thu"], "begin": "20:00"}, "2026-11-26 23:59", True),
        ({"days": ["thu"], "begin": "20:00"}, "2026-11-27 00:00", False),
    ],
)  # fmt: skip
def test_hours(hours: dict[str, Any], moment: str, permitted: bool) -> None:
    assert Hours.model_validate(hours).permit(dt.datetime.fromisoformat(moment)) is permitted


def test_every_minute_of_a_week_is_permitted_by_a_window_or_by_its_complement() -> None:
    night, day = Hours(begin="19:00", end="06:30"), Hours(begin="06:30", end="19:00")
    monday = dt.datetime(2026, 11, 23)
    assert all(
        night.permit(monday + dt.timedelta(minutes=minute)) != day.permit(monday + dt.timedelta(minutes=minute))
        for minute in range(7 * 24 * 60)
    )


@pytest.mark.parametrize(
    "text",
    [
        'begin: "25:00"', 'begin: "8"', "begin: 1e3", 'begin: "08:60"', "days: []", "days: [someday]", "days: mon",
        'begin: "08:00"\n    end: "08:00"', "begin: -60", "more: 1",
    ],
)  # fmt: skip
def test_hours_that_are_none_are_refused_with_the_line(text: str) -> None:
    with pytest.raises(DocumentError, match=r"line [34]"):
        parse(SiteFile, f"site: north\npolicy:\n  hours:\n    {text}\n", "site.yaml")


@pytest.mark.parametrize("text", ["begin: 19:00", "begin: 20", "begin: 8", "end: 700", "end: 0", 'begin: "24:00"'])
def test_a_number_is_never_guessed_to_be_a_time(text: str) -> None:
    """YAML reads 19:00 as 1140; read as minutes, `begin: 20` and `end: 6` would be nearly the whole day, not the night."""
    with pytest.raises(DocumentError, match=r'line 4: .*in quotation marks, such as "19:00"'):
        parse(SiteFile, f"site: north\npolicy:\n  hours:\n    {text}\n", "site.yaml")


def _policy(hospital: Hospital, **change: Any) -> None:
    import yaml

    path = hospital.home / "site.yaml"
    settings = yaml.safe_load(path.read_text())
    settings["policy"] = {**settings.get("policy", {}), **change}
    path.write_text(yaml.safe_dump(settings))


def _gate(hospital: Hospital) -> site.Site:
    return site.Site.open(hospital.home)


@pytest.fixture
def hospital(tmp_path: Path) -> Hospital:
    found = Hospital.open(tmp_path, "north", STUDY)
    found.approve(STUDY)
    return found


def test_outside_its_hours_a_site_begins_nothing_and_still_helps_to_open_a_sum(
    hospital: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    _policy(hospital, hours={"days": [DAYS[dt.datetime.now().weekday() - 3]]})
    with pytest.raises(OutsideHours, match=r"policy\.hours"):
        _gate(hospital).admit(hospital.order())
    _gate(hospital).admit(_unmask(hospital))
    _policy(hospital, hours={})
    _gate(hospital).admit(hospital.order())  # it was not remembered as answered


def _unmask(hospital: Hospital) -> wire.Order:
    more = {"survivors": (), "vouches": b"", "members": (), "keys": b""}
    return hospital.order(wire.UnmaskOrder, **more)


def test_a_paused_site_begins_nothing_until_it_is_resumed(hospital: Hospital) -> None:
    run, where = CliRunner(), ["--home", str(hospital.home)]
    assert "not paused" in run.invoke(app, ["resume", *where]).output
    assert "paused until `fl-client resume`" in run.invoke(app, ["pause", *where]).output
    assert Pause.path(hospital.home).stat().st_mode & 0o077 == 0
    with pytest.raises(SitePaused):
        _gate(hospital).admit(hospital.order())
    _gate(hospital).admit(_unmask(hospital))
    assert "takes orders again" in run.invoke(app, ["resume", *where]).output
    _gate(hospital).admit(hospital.order())
    kinds = [json.loads(line)["kind"] for line in (hospital.home / "journal.jsonl").read_text().splitlines()]
    assert kinds[-2:] == ["paused", "resumed"]


def test_a_pause_ends_by_itself_and_a_damaged_one_is_a_pause(
    hospital: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, where, now = CliRunner(), ["--home", str(hospital.home)], time.time()
    assert "paused until 20" in run.invoke(app, ["pause", "--hours", "2", *where]).output
    assert Pause.open(hospital.home, now + 7100) is not None
    assert Pause.open(hospital.home, now + 7300) is None
    moments = [b'{"since_s":1,"until_s":%b}' % text for text in (b"NaN", b"1e999", b"9" * 400, b"1e18", b"-1")]
    for content in (b"", b"{}", b"[" * 9000, b'{"since_s":"x","until_s":null}', *moments):
        Pause.path(hospital.home).write_bytes(content)
        with pytest.raises(DocumentError, match="does no work"):
            _gate(hospital).admit(hospital.order())
    assert run.invoke(app, ["resume", *where]).exit_code == 0
    _gate(hospital).admit(hospital.order())


def test_a_changed_site_yaml_is_a_line_in_the_journal_and_nothing_of_it(hospital: Hospital) -> None:
    for _ in range(2):
        _gate(hospital).note_settings()
    _policy(hospital, maximum_rounds=77)
    _gate(hospital).note_settings()
    lines = [json.loads(line) for line in (hospital.home / "journal.jsonl").read_text().splitlines()]
    facts = [line["facts"] for line in lines if line["kind"] == "settings"]
    assert len(facts) == 2
    assert set(facts[0]) == {"digest"} and facts[0] != facts[1]


@pytest.mark.parametrize(
    "text",
    [
        "site: north\npolicy: &a {tasks: [classification]}\napprove: *a\n",
        "site: north\npolicy:\n  tasks: [surgery]\n",
        "site: north\npolicy:\n  networks: [resnet_of_the_coordinator]\n",
        "site: north\nresources:\n  memory_gb: -1\n",
        "site: north\nsyslog: ftp://elsewhere\n",
        "site: north\napprove: [{researchers: []}]\n",
        "site: north\napprove: [{researchers: [ada], epsilon: 4, rounds: 10, until: 2027-02-30}]\n",
        "site: north\napprove: [{researchers: [ada], epsilon: 4, rounds: 10}]\n",
        "site: north\napprove: [{researchers: [ada], epsilon: 4, rounds: 10, until: 2027-01-01, protection: plain}]\n",
        "a: &a [x,x]\n" + "".join(f"b{n}: [*a,*a]\n" for n in range(50)),
    ],
)
def test_settings_that_are_wrong_or_a_bomb_are_refused(text: str) -> None:
    with pytest.raises(DocumentError):
        parse(SiteFile, text, "site.yaml")
