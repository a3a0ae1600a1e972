"""One exchange with the sites: whoever drops out, delays, doubles or forges, the round ends and says who is missing and why."""

import time
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import ErrorCode
from grid import Answer, FaultyGrid
from test_privacy_wire import KEY, MODEL, NAMES, train_order, train_report

from fl_server.rounds import Gathering, choose
from privacy import wire
from privacy.errors import QuorumLost

NODES = {"north": 1, "south": 2, "east": 3}


def nothing(*_: Any, **__: Any) -> None:
    """A listener that does not care."""


def honest(site: str, **change: Any) -> Answer:
    return lambda message: Message(train_report(site=site, **change).to_records(), reply_to=message)


def gather(grid: FaultyGrid, timeout_s: float = 5.0) -> tuple[dict[str, Any], dict[str, str]]:
    order = train_order(issued=int(time.time())).signed(KEY)
    gathering = Gathering(grid, order, NODES, timeout_s, nothing)
    reports = dict(gathering.reports())
    return reports, gathering.missing


def test_all_honest_sites_are_gathered() -> None:
    reports, missing = gather(FaultyGrid({node: honest(site) for site, node in NODES.items()}))
    assert set(reports) == set(NODES)
    assert missing == {}
    assert all((report.update == MODEL).all() for report in reports.values())


def test_every_site_gets_the_same_signed_order_and_nobody_else_gets_one() -> None:
    grid = FaultyGrid({node: honest(site) for site, node in (NODES | {"stranger": 9}).items()})
    gather(grid)
    assert sorted(message.metadata.dst_node_id for message in grid.sent) == [1, 2, 3]
    for message in grid.sent:
        wire.decode(message, wire.TrainOrder).verify(KEY.public_key())


def test_a_silent_site_is_a_timeout_and_the_others_count() -> None:
    answers: dict[int, Answer] = {1: honest("north"), 2: lambda message: None, 3: honest("east")}
    began = time.monotonic()
    reports, missing = gather(FaultyGrid(answers), timeout_s=0.4)
    assert set(reports) == {"north", "east"}
    assert missing == {"south": "timeout"}
    assert time.monotonic() - began < 3


def test_late_replies_are_waited_for_and_doubled_ones_count_once() -> None:
    grid = FaultyGrid({node: honest(site) for site, node in NODES.items()}, silent_pulls={2: 6}, twice={1, 3})
    order = train_order().signed(KEY)
    found = [site for site, _ in Gathering(grid, order, NODES, 5.0, nothing).reports()]
    assert sorted(found) == sorted(NODES)


FORGED: list[dict[str, Any]] = [
    {"site": "south"},
    {"study": "cd" * 32},
    {"run": "another"},
    {"round": 2},
    {"attempt": 7},
    {"update": np.zeros(3, np.float32)},
    {"cases": 0},
]


@pytest.mark.parametrize("change", FORGED, ids=lambda change: next(iter(change)))
def test_a_report_that_answers_another_order_is_not_counted(change: dict[str, Any]) -> None:
    forged = {"site": "north"} | change

    def forge(message: Message) -> Message:
        return Message(train_report(**forged).to_records(), reply_to=message)

    reports, missing = gather(FaultyGrid({1: forge, 2: honest("south"), 3: honest("east")}))
    assert set(reports) == {"south", "east"}
    assert missing == {"north": "message-malformed"}


def test_garbage_is_not_counted() -> None:
    junk = RecordDict({"isocenter": ConfigRecord({"kind": "train-report"})})
    reports, missing = gather(
        FaultyGrid({1: lambda message: Message(junk, reply_to=message), 2: honest("south"), 3: honest("east")})
    )
    assert set(reports) == {"south", "east"}
    assert missing == {"north": "message-malformed"}


def test_a_refusal_is_named_by_its_code() -> None:
    def refuse(message: Message) -> Message:
        refusal = wire.Refusal(**NAMES, site="north", code="study-not-approved")
        return Message(refusal.to_records(), reply_to=message)

    reports, missing = gather(FaultyGrid({1: refuse, 2: honest("south"), 3: honest("east")}))
    assert set(reports) == {"south", "east"}
    assert missing == {"north": "study-not-approved"}


@pytest.mark.parametrize(
    ("code", "word"), [(ErrorCode.NODE_UNAVAILABLE, "unavailable"), (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "internal")]
)
def test_flowers_errors_become_our_words_and_their_text_is_dropped(code: int, word: str) -> None:
    told: list[dict[str, Any]] = []
    grid = FaultyGrid({node: honest(site) for site, node in NODES.items()}, errors={1: code})
    gathering = Gathering(grid, train_order().signed(KEY), NODES, 5.0, lambda kind, **facts: told.append(facts))
    assert set(dict(gathering.reports())) == {"south", "east"}
    assert gathering.missing == {"north": word}
    assert "ZZTEST" not in str(told)


def test_a_message_that_flower_did_not_take_is_named() -> None:
    grid = FaultyGrid({node: honest(site) for site, node in NODES.items()}, refused_pushes={3})
    reports, missing = gather(grid)
    assert set(reports) == {"north", "south"}
    assert missing == {"east": "unavailable"}


def test_choose_waits_for_all_and_falls_back_to_the_quorum(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = FaultyGrid({node: honest(site) for site, node in NODES.items()})
    assert choose(grid, NODES, 2, 5.0, nothing) == NODES
    grid.online = {1, 2, 77}
    monkeypatch.setattr("fl_server.rounds.GRACE_S", 0.1)
    assert choose(grid, NODES, 2, 5.0, nothing) == {"north": 1, "south": 2}
    monkeypatch.setattr("fl_server.rounds.GRACE_S", 60.0)
    began = time.monotonic()
    assert choose(grid, NODES, 2, 90.0, nothing, frozenset({"east"})) == {"north": 1, "south": 2}
    assert time.monotonic() - began < 5  # a site that was away the last time is not waited for again
    with pytest.raises(QuorumLost, match="east"):
        choose(grid, NODES, 3, 0.3, nothing)
