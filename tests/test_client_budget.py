"""`fl-client budget`: what the ledger says, in words, as JSON and as a picture; and the way back from a damaged one."""

import json
import time
from pathlib import Path

import pytest
from hospital import Hospital
from PIL import Image
from test_private_round import LOCAL, answer, permissive, private
from typer.testing import CliRunner

from fl_client.budget import shown
from fl_client.cli import app
from privacy.errors import LedgerDamaged, PrivacyError


@pytest.fixture
def plain(tmp_path: Path) -> Hospital:
    hospital = Hospital.open(tmp_path, "north", private(LOCAL, **{"protection__masked": "protection: plain"}))
    permissive(hospital)
    return hospital


def budget(hospital: Hospital, *words: str) -> str:
    result = CliRunner().invoke(app, ["budget", "--home", str(hospital.home), *words], env={"COLUMNS": "120"})
    if result.exception is not None:
        raise result.exception
    return result.output


def test_an_unused_budget_says_so(plain: Hospital) -> None:
    assert "Nothing was charged yet" in budget(plain)
    told = json.loads(budget(plain, "--json"))
    assert told["rows"] == [] and told["total"] == 0 and told["unit"] == "patient"


def test_spent_held_and_left_are_told_by_study_with_all_that_belongs_to_them(
    plain: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert answer(plain) == ""
    with monkeypatch.context() as broken:
        broken.setattr("models.learning.learn_privately", lambda *_, **__: 1 / 0)
        assert answer(plain, run="run-2") == "internal"
    screen = " ".join(budget(plain).split())
    assert plain.study.digest[:12] in screen and "2 of 3" in screen
    assert "1 round is held" in screen and "stays charged" in screen
    assert "one patient more or less" in screen and "δ = 0.001" in screen and "does not add up" in screen
    told = json.loads(budget(plain, "--json"))
    (row,) = told["rows"]
    assert 0 < row["spent"] < row["charged"] == told["total"] == told["year"]
    assert (row["rounds"], row["rounds_most"], row["open"]) == (2, 3, 1)


def test_runs_without_privacy_are_listed(tmp_path: Path) -> None:
    hospital = Hospital.open(tmp_path)
    assert answer(hospital) == ""
    assert "no ε covers what their models reveal" in " ".join(budget(hospital).split())
    assert json.loads(budget(hospital, "--json"))["unprotected"] == [[hospital.study.digest, "run-1"]]


def test_the_plot_is_a_picture_of_what_was_charged(plain: Hospital, tmp_path: Path) -> None:
    for name in ("empty.png", "used.png"):
        budget(plain, "--plot", str(tmp_path / name))
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG" and min(picture.size) > 400
        assert answer(plain, run=name.removesuffix(".png")) == ""
    assert (tmp_path / "empty.png").read_bytes() != (tmp_path / "used.png").read_bytes()


def test_a_missing_ledger_names_the_way_back_and_the_way_back_works(plain: Hospital) -> None:
    assert answer(plain) == ""
    before = json.loads(budget(plain, "--json"))["total"]
    (plain.home / "ledger.sqlite").unlink()
    with pytest.raises(LedgerDamaged) as caught:
        budget(plain)
    assert "fl-client budget --rebuild" in caught.value.remedy
    assert "1 of 3" in budget(plain, "--rebuild")
    assert json.loads(budget(plain, "--json"))["total"] == pytest.approx(before)
    with pytest.raises(PrivacyError, match="is whole"):
        budget(plain, "--rebuild")


def test_a_clock_that_was_wrong_can_be_accepted(plain: Hospital, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as ahead:
        later = time.time() + 7 * 86400
        ahead.setattr("privacy.ledger.time.time", lambda: later)
        assert answer(plain) == ""
    assert answer(plain, run="run-2") == "clock-set-back"
    budget(plain, "--accept-clock")
    assert answer(plain, run="run-3") == ""


@pytest.mark.parametrize(("epsilon", "text"), [(0.0, "0.00"), (1.001, "1.01"), (1.0, "1.00"), (7.9999, "8.00")])
def test_epsilon_is_rounded_up(epsilon: float, text: str) -> None:
    assert shown(epsilon) == text
