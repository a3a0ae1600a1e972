"""What the researcher's screen says of a study and of a run as it goes, on a terminal and in a log file."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fl_server import research, telling
from privacy.errors import RunError

STUDY = """
name: opacity
title: Opacity on chest radiographs
purpose: Find opacities on frontal chest radiographs.
task: {targets: [opacity]}
training: {rounds: 6}
protection: masked
privacy: none
participation: {sites: [north, south, east], quorum: 3}
"""


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """What was printed so far; not a terminal, as in a log file."""
    paper = io.StringIO()
    for place in (research, telling):
        monkeypatch.setattr(place, "console", Console(file=paper, width=100))
    return paper.getvalue


def happened(*given: dict[str, Any]) -> None:
    telling.follow(json.dumps(event) for event in given)


def event(kind: str, **facts: Any) -> dict[str, Any]:
    return {"at": "2026-01-01T10:00:00+00:00", "event": kind} | facts


def round_done(number: int, **change: Any) -> dict[str, Any]:
    facts = {"round": number, "seconds": 2.13, "contributors": ["north"], "missing": {}, "train_loss": 0.4123}
    return event("round_done", **facts | {"clipped": 0} | change)


def test_a_run_is_told_line_by_line_where_there_is_no_terminal(screen: Callable[[], str]) -> None:
    happened(
        event("started", attempt=1, round=0, rounds=2),
        event("waiting", sites=["west"]),
        event("asked", stage="keys", round=1, sites=["north", "west"]),
        event("site", site="north", stage="keys-report", seconds=0.1),
        event("site", site="stranger", stage="keys-report", seconds=0.1),
        event("site_missing", site="west", reason="timeout"),
        event("asked", stage="train", round=1, sites=["north"]),
        event("scored", round=0, loss=0.7, auroc=None),
        event("void", round=1, attempt=1, reason="too-few-survivors"),
        event("asked", stage="unmask", round=1, sites=["north"]),
        round_done(1, missing={"west": "timeout"}, clipped=12),
        event("scored", round=1, loss=0.3912, auroc=0.9208),
        round_done(2, train_loss=None),
        event("an event of a later version"),
        event("finished", label="complete", auroc=0.93),
    )
    assert screen().splitlines() == [
        "waiting for west",
        "initial model: validation loss 0.700",
        "round 1, attempt 1: the sum was not opened (too-few-survivors); trying again",
        "round 1  2.1 s  training loss 0.412  [west missing: timeout]  [12 values clipped]",
        "after round 1: validation loss 0.391  AUROC 0.921",
        "round 2  2.1 s",
        "Run finished: complete, test AUROC 0.930",
    ]


def test_a_continued_run_says_so_and_a_failed_one_raises(screen: Callable[[], str]) -> None:
    with pytest.raises(RunError, match="the quorum was lost"):
        happened(
            event("started", attempt=1, round=0, rounds=9),
            event("started", attempt=2, round=3, rounds=9),
            event("failed", code="quorum-lost", message="the quorum was lost"),
        )
    assert screen() == "continuing after round 3\n"


def test_a_terminal_shows_what_every_site_is_doing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telling, "console", Console(file=io.StringIO(), force_terminal=True, width=160))
    with telling.progress() as tell:
        tell(event("started", attempt=1, round=0, rounds=5))
        for stage, words in (
            ("keys", "agreeing on keys"),
            ("train", "training"),
            ("evaluate", "evaluating"),
            ("unmask", "opening the sum"),
        ):
            tell(event("asked", stage=stage, round=1, sites=["north"]))
            assert [task.fields["news"] for task in tell.bars.tasks] == ["", words]
            tell(event("site", site="north", stage=f"{stage}-report", seconds=1.26))
            assert tell.bars.tasks[1].fields["news"] == f"{words}: 1.3 s"
        tell(round_done(1))
        tell(event("scored", round=1, loss=0.3912, auroc=0.9208))
        rounds = tell.bars.tasks[0]
        assert (rounds.completed, rounds.total) == (1, 5)
        assert rounds.fields["news"] == "training loss 0.412  validation loss 0.391  AUROC 0.921"
        tell(event("started", attempt=2, round=1, rounds=5))
        assert len(tell.bars.tasks) == 2


@pytest.mark.parametrize(("protection", "said"), research.SEEN.items())
def test_check_says_what_the_coordinator_will_see(
    protection: str, said: str, tmp_path: Path, screen: Callable[[], str]
) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(STUDY.replace("protection: masked", f"protection: {protection}"))
    research.check(file)
    assert f"{protection}: {said}" in screen()
