"""One exchange with the sites: whoever drops out, delays, doubles or forges, it ends and says who is missing and why."""

import time
from collections.abc import Callable
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import ErrorCode
from grid import Answer, FaultyGrid
from test_privacy_wire import FACTS, KEY, NAMES, made, train_order, train_report

from fl_server import rounds
from fl_server.rounds import Call, Gathering, choose
from privacy import wire
from privacy.errors import QuorumLost

NODES = {"north": 1, "south": 2, "east": 3}


def nothing(*_: Any, **__: Any) -> None:
    """A listener that does not care."""


def honest(site: str, **change: Any) -> Answer:
    return lambda message: Message(train_report(site=site, **change).to_records(), reply_to=message)


def everybody() -> dict[int, Answer]:
    return {node: honest(site) for site, node in NODES.items()}


def calls(order: wire.Order | None = None) -> dict[str, Call]:
    order = order or train_order().signed(KEY)
    return {site: Call(order, node) for site, node in NODES.items()}


def gather(grid: FaultyGrid, timeout_s: float = 5.0) -> tuple[dict[str, Any], dict[str, str]]:
    gathering = Gathering(grid, calls(), timeout_s, nothing)
    return dict(gathering.reports()), gathering.missing


def test_all_honest_sites_are_gathered() -> None:
    reports, missing = gather(FaultyGrid(everybody()))
    assert set(reports) == set(NODES)
    assert missing == {}
    assert all(report.vector == FACTS[wire.TrainReport]["vector"] for report in reports.values())


def test_every_site_gets_its_signed_order_and_nobody_else_gets_one() -> None:
    grid = FaultyGrid({node: honest(site) for site, node in (NODES | {"stranger": 9}).items()})
    gather(grid)
    assert sorted(message.metadata.dst_node_id for message in grid.sent) == [1, 2, 3]
    for message in grid.sent:
        wire.decode(message, wire.TrainOrder).verify(KEY.public_key())


def test_equal_orders_are_written_into_a_record_once(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[wire.Crossing] = []
    to_records = wire.Crossing.to_records

    def noted(self: wire.Crossing) -> RecordDict:
        written.append(self)
        return to_records(self)

    order, grid = train_order().signed(KEY), FaultyGrid(dict.fromkeys(NODES.values(), lambda message: None))
    monkeypatch.setattr(wire.Crossing, "to_records", noted)
    list(Gathering(grid, calls(order), 0.0, nothing).reports())
    assert written == [order] and len(grid.sent) == 3


def test_orders_of_different_kinds_go_out_together_each_through_its_own_handler() -> None:
    """While some work on a sum, others make keys of the next one."""
    work, keys = train_order().signed(KEY), made(wire.KeysOrder, sum=5).signed(KEY)

    def make_keys(message: Message) -> Message:
        asked = wire.decode(message, wire.KeysOrder)
        return Message(made(wire.KeysReport, **asked.naming(), site="east").to_records(), reply_to=message)

    grid = FaultyGrid({1: honest("north"), 2: honest("south"), 3: make_keys})
    mixed = {"north": Call(work, 1), "south": Call(work, 2), "east": Call(keys, 3)}
    gathering = Gathering(grid, mixed, 5.0, nothing)
    found = {site: report.kind for site, report in gathering.reports()}
    assert found == {"north": "train-report", "south": "train-report", "east": "keys-report"}
    assert {m.metadata.dst_node_id: m.metadata.message_type for m in grid.sent} == {1: "train", 2: "train", 3: "query"}


def test_a_silent_site_is_a_timeout_and_the_others_count() -> None:
    began = time.monotonic()
    reports, missing = gather(FaultyGrid(everybody() | {2: lambda message: None}), timeout_s=0.4)
    assert set(reports) == {"north", "east"}
    assert missing == {"south": "timeout"}
    assert time.monotonic() - began < 3


def test_late_replies_are_waited_for_and_doubled_ones_count_once() -> None:
    grid = FaultyGrid(everybody(), silent_pulls={2: 6}, twice={1, 3})
    found = [site for site, _ in Gathering(grid, calls(), 5.0, nothing).reports()]
    assert sorted(found) == sorted(NODES)


def test_once_there_are_enough_the_last_sites_get_a_short_while_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "LINGER_S", 0.3)
    reports: list[str] = []

    def two_are_here() -> bool:
        return len(reports) >= 2

    def take(grid: FaultyGrid, enough: Callable[[], bool] | None) -> tuple[float, dict[str, str]]:
        began, gathering = time.monotonic(), Gathering(grid, calls(), 30.0, nothing, enough)
        reports.clear()
        for site, _ in gathering.reports():
            reports.append(site)
        return time.monotonic() - began, gathering.missing

    waited, missing = take(FaultyGrid(everybody() | {3: lambda message: None}), two_are_here)
    assert 0.3 <= waited < 3 and missing == {"east": "timeout"}
    waited, missing = take(FaultyGrid(everybody(), silent_pulls={3: 3}), two_are_here)
    assert missing == {}  # it came within the short while
    monkeypatch.setattr(rounds, "LINGER_S", 0.0)
    waited, missing = take(FaultyGrid(everybody(), silent_pulls={3: 4}), lambda: False)
    assert missing == {}  # never enough: the whole time is waited


FORGED: list[wire.Report] = [
    train_report(site="south"),
    train_report(study="cd" * 32),
    train_report(run="another"),
    train_report(round=2),
    train_report(attempt=7),
    train_report(sum=5),
    made(wire.EvaluateReport),
    made(wire.KeysReport),
    made(wire.UnmaskReport),
]


@pytest.mark.parametrize("forged", FORGED, ids=range(len(FORGED)))
def test_a_report_that_answers_another_order_is_not_counted(forged: wire.Report) -> None:
    grid = FaultyGrid(everybody() | {1: lambda message: Message(forged.to_records(), reply_to=message)})
    reports, missing = gather(grid)
    assert set(reports) == {"south", "east"}
    assert missing == {"north": "message-malformed"}


@pytest.mark.parametrize("kind", [wire.KeysOrder, wire.UnmaskOrder, wire.EvaluateOrder])
def test_every_kind_of_order_takes_only_its_own_kind_of_report(kind: type[wire.Order]) -> None:
    order = made(kind).signed(KEY)
    for report in (made(reported, site="north") for reported in FACTS if issubclass(reported, wire.Report)):
        reply = {1: lambda message, sent=report: Message(sent.to_records(), reply_to=message)}
        gathering = Gathering(FaultyGrid(reply), {"north": Call(order, 1)}, 5.0, nothing)
        taken = dict(gathering.reports())
        wanted = report.kind == f"{kind.kind}-report" and getattr(report, "split", "test") == "test"
        assert bool(taken) == wanted and bool(gathering.missing) != wanted


def test_a_report_of_the_ordered_split_is_taken() -> None:
    order = made(wire.EvaluateOrder, split="validation").signed(KEY)
    for split in ("validation", "test"):
        report = made(wire.EvaluateReport, split=split)
        grid = FaultyGrid({1: lambda message, sent=report: Message(sent.to_records(), reply_to=message)})
        taken = dict(Gathering(grid, {"north": Call(order, 1)}, 5.0, nothing).reports())
        assert bool(taken) == (split == "validation")


JUNK: list[RecordDict] = [
    RecordDict(),
    RecordDict({"isocenter": ConfigRecord({"kind": "train-report"})}),
    RecordDict({"isocenter": ConfigRecord({"kind": "train"})}),
    train_order().to_records(),
    RecordDict({"other": ConfigRecord({"note": "ZZTEST^PATIENT"})}),
]


@pytest.mark.parametrize("junk", JUNK, ids=range(len(JUNK)))
def test_garbage_is_not_counted(junk: RecordDict) -> None:
    reports, missing = gather(FaultyGrid(everybody() | {1: lambda message: Message(junk, reply_to=message)}))
    assert set(reports) == {"south", "east"}
    assert missing == {"north": "message-malformed"}


def test_a_refusal_is_named_by_its_code() -> None:
    def refuse(message: Message) -> Message:
        refusal = wire.Refusal(**NAMES, site="north", code="study-not-approved")
        return Message(refusal.to_records(), reply_to=message)

    reports, missing = gather(FaultyGrid(everybody() | {1: refuse}))
    assert set(reports) == {"south", "east"}
    assert missing == {"north": "study-not-approved"}


@pytest.mark.parametrize(
    ("code", "word"), [(ErrorCode.NODE_UNAVAILABLE, "unavailable"), (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "internal")]
)
def test_flowers_errors_become_our_words_and_their_text_is_dropped(code: int, word: str) -> None:
    told: list[dict[str, Any]] = []
    grid = FaultyGrid(everybody(), errors={1: code})
    gathering = Gathering(grid, calls(), 5.0, lambda kind, **facts: told.append(facts))
    assert set(dict(gathering.reports())) == {"south", "east"}
    assert gathering.missing == {"north": word}
    assert told == [{"site": "north", "reason": word}]


def test_a_message_that_flower_did_not_take_is_named() -> None:
    reports, missing = gather(FaultyGrid(everybody(), refused_pushes={3}))
    assert set(reports) == {"north", "south"}
    assert missing == {"east": "unavailable"}


def test_a_report_that_the_caller_finds_wanting_is_named_and_told() -> None:
    told: list[dict[str, Any]] = []
    gathering = Gathering(FaultyGrid(everybody()), calls(), 5.0, lambda kind, **facts: told.append(facts))
    for site, _ in gathering.reports():
        if site == "south":
            gathering.drop(site, "seal-broken")
    assert gathering.missing == {"south": "seal-broken"}
    assert told == [{"site": "south", "reason": "seal-broken"}]


def test_choose_waits_for_all_and_falls_back_to_the_quorum(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = FaultyGrid(everybody())
    assert choose(grid, NODES, 2, 5.0, nothing) == NODES
    grid.online = {1, 2, 77}
    monkeypatch.setattr(rounds, "GRACE_S", 0.1)
    assert choose(grid, NODES, 2, 5.0, nothing) == {"north": 1, "south": 2}
    monkeypatch.setattr(rounds, "GRACE_S", 60.0)
    began = time.monotonic()
    assert choose(grid, NODES, 2, 90.0, nothing, frozenset({"east"})) == {"north": 1, "south": 2}
    assert time.monotonic() - began < 5  # a site that was away the last time is not waited for again
    with pytest.raises(QuorumLost, match="east"):
        choose(grid, NODES, 3, 0.3, nothing)


def test_who_is_revoked_while_a_round_waits_is_not_waited_for_and_its_late_report_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rounds, "GONE_LOOK_S", 0.2)
    grid, began = FaultyGrid(everybody(), silent_pulls={2: 30, 3: 8}), time.monotonic()
    gone = {"south": "certificate-revoked", "west": "certificate-revoked"}
    gathering = Gathering(grid, calls(), 60.0, nothing, gone=lambda: gone)
    assert {site for site, _ in gathering.reports()} == {"north", "east"}
    assert gathering.missing == {"south": "certificate-revoked"}
    assert time.monotonic() - began < 30
