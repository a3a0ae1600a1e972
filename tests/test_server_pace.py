"""How long a site is waited for: by its own speed, never beyond the study's timeout, and all of it when nothing is known."""

import time
from typing import Any

import pytest
from flwr.app import Message
from grid import FaultyGrid
from test_privacy_wire import KEY, made, train_order
from test_server_rounds import NODES, everybody, honest, nothing

from fl_server import rounds
from fl_server.pace import Pace
from fl_server.rounds import Call, Gathering
from privacy import wire

TRAIN = train_order().signed(KEY)
UNMASK = made(wire.UnmaskOrder).signed(KEY)


def measured(pace: Pace, site: str, *seconds: float, order: wire.Order = TRAIN) -> None:
    for each in seconds:
        pace.note({site: order}, {site: each}, {})


def test_the_first_report_of_a_kind_has_the_whole_timeout() -> None:
    pace = Pace(3600)
    assert pace.limit_s("north", TRAIN) == 3600
    measured(pace, "north", 10)
    assert pace.limit_s("north", UNMASK) == pace.limit_s("south", TRAIN) == 3600
    split = {name: made(wire.EvaluateOrder, split=name) for name in ("validation", "test")}
    measured(pace, "north", 5, order=split["validation"])
    assert pace.limit_s("north", split["validation"]) == 75 and pace.limit_s("north", split["test"]) == 3600


@pytest.mark.parametrize(
    ("seconds", "limit"),
    [
        ([10], 90),
        ([10, 10, 900], 90),  # one slow round changes nothing
        ([900, 10, 10, 10, 10, 10], 90),  # what is long ago is forgotten
        ([10, 10, 10, 100, 100, 100], 360),  # and a site that became slower has the time
        ([0.01], 60.03),
        ([2000, 2000], 3600),  # never beyond the study's timeout
    ],
)
def test_a_site_has_three_times_its_median_and_a_minute(seconds: list[float], limit: float) -> None:
    pace = Pace(3600)
    measured(pace, "north", *seconds)
    measured(pace, "south", 1000)  # the speed of another site is nothing to it
    assert pace.limit_s("north", TRAIN) == pytest.approx(limit)


def test_a_short_timeout_of_the_study_is_never_stretched() -> None:
    pace = Pace(20)
    measured(pace, "north", 0.1)
    assert pace.limit_s("north", TRAIN) == 20


def test_a_site_that_was_missing_has_the_whole_timeout_again() -> None:
    pace = Pace(3600)
    measured(pace, "north", 10)
    measured(pace, "north", 1, order=UNMASK)
    measured(pace, "south", 10)
    pace.note({"north": TRAIN, "south": TRAIN}, {"south": 12.0}, {"north": "timeout"})
    assert pace.limit_s("north", TRAIN) == pace.limit_s("north", UNMASK) == 3600
    assert pace.limit_s("south", TRAIN) == pytest.approx(93)


def test_each_site_of_an_exchange_is_waited_for_as_long_as_its_own_limit_says() -> None:
    calls = {site: Call(TRAIN, node, limit_s=0.2 if site == "south" else 3.0) for site, node in NODES.items()}
    grid = FaultyGrid(everybody() | {2: lambda message: None}, silent_pulls={3: 12})
    told: list[tuple[float, Any]] = []
    began = time.monotonic()
    gathering = Gathering(grid, calls, 60.0, lambda kind, **facts: told.append((time.monotonic() - began, facts)))
    assert {site for site, _ in gathering.reports()} == {"north", "east"}
    assert gathering.missing == {"south": "timeout"} and 0.2 <= told[0][0] < 2
    assert set(gathering.took) == {"north", "east"} and gathering.took["north"] < gathering.took["east"]


def revealing(site: str) -> Any:
    return lambda message: Message(made(wire.UnmaskReport, site=site).to_records(), reply_to=message)


@pytest.mark.parametrize("order", [UNMASK, TRAIN], ids=["unmask", "train"])
def test_a_step_without_images_ends_when_whoever_is_missing_has_gone(
    order: wire.Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training may go on behind a broken line, and its report come later; a step of milliseconds does not."""
    monkeypatch.setattr(rounds, "GRACE_S", 0.3)
    monkeypatch.setattr(rounds, "GONE_LOOK_S", 0.1)
    answer = revealing if order is UNMASK else honest
    grid = FaultyGrid({1: answer("north"), 2: answer("south"), 3: lambda message: None}, online={1, 2})
    began = time.monotonic()
    gathering = Gathering(grid, {site: Call(order, node) for site, node in NODES.items()}, 3.0, nothing)
    assert {site for site, _ in gathering.reports()} == {"north", "south"}
    waited = time.monotonic() - began
    if order is UNMASK:
        assert gathering.missing == {"east": "offline"} and 0.3 <= waited < 2.5
    else:
        assert gathering.missing == {"east": "timeout"} and waited >= 3.0
