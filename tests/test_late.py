"""Work that comes after it was waited for: thanked, named, and in no sum, whatever the protection."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from federation import Federation
from flwr.app import Message
from flwr.app.error import Error
from grid import FaultyGrid
from hospital import study
from test_round import FOUR

from fl_server import report, telling
from fl_server.pace import ROOM_S, TIMES, Pace
from fl_server.progress import Onlooker
from fl_server.results import check
from fl_server.rounds import Due, Overdue
from fl_server.run import Round, Run
from models.study import Study, parse
from privacy import journal, wire
from privacy.errors import MessageMalformed

PROTECTIONS = ("plain", "sealed", "masked")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fl_server.sums.timeout_of", lambda study: 0.15)
    monkeypatch.setattr("models.documents.parse", functools.cache(parse))
    monkeypatch.setattr("os.fsync", lambda file: None)


def plan_of(protection: str) -> Study:
    sites = {"sites__[north, south]": f"sites: [{', '.join(FOUR)}]", "quorum__2": "quorum: 3", "rounds__2": "rounds: 3"}
    return study(**sites, **{"protection: plain": f"protection: {protection}\nnetwork: {{name: linear}}"})


class Slow(FaultyGrid):
    """A grid in which the report of one node to its first order to train a round comes when the next orders go out."""

    def is_late(self, node: int, number: int) -> None:
        self.node, self.number, self.held = node, number, ""

    def push_messages(self, messages: Any) -> Any:
        listed = list(messages)
        if self.held:
            self.looks[self.held] = 0
        orders = {m.metadata.dst_node_id: wire.decode(m, *wire.ORDERS) for m in listed}
        mine = orders.get(self.node)
        slow = not self.held and isinstance(mine, wire.TrainOrder) and mine.round == self.number
        self.silent_pulls = {self.node: 10**9} if slow else {}
        names = list(super().push_messages(listed))
        if slow:
            self.held = names[list(orders).index(self.node)]
        return names


@pytest.mark.parametrize("protection", PROTECTIONS)
def test_a_late_report_is_thanked_and_named_and_changes_nothing(protection: str, tmp_path: Path) -> None:
    """The oracle is the same run in which that report never comes: the same model, bit for bit."""
    federation = Federation(tmp_path / "late", plan_of(protection))
    silent = federation.copied(tmp_path / "silent")
    grid = Slow({federation.node(name): federation.answers(name) for name in FOUR})
    grid.is_late(federation.node("west"), 2)
    folder = federation.run(grid)

    never = Slow({silent.node(name): silent.answers(name) for name in FOUR})
    never.is_late(silent.node("west"), 2)
    never.replies = Forgetful()
    never.replies.west = never
    without = Run.open(silent.run(never))

    run, facts = Run.open(folder), json.loads((folder / "results.json").read_text())
    assert run.model is not None and without.model is not None and (run.model == without.model).all()
    others = sorted(set(FOUR) - {"west"})
    assert facts["rounds"][1]["contributors"] == others and facts["rounds"][1]["missing"] == {"west": "timeout"}
    assert [list(entry["late"]) for entry in facts["rounds"]] == [[], ["west"], []]
    assert 0 <= facts["rounds"][1]["late"]["west"] < 60
    assert [entry.late for entry in without.history] == [{}, {}, {}]
    check(facts)
    assert any(
        "west came" in sentence and "too late in round 2" in sentence for sentence in report._gaps(check(facts).results)
    )
    (line,) = [e["facts"] for e in journal.entries(federation.home.journal.path) if e["kind"] == "report-late"]
    assert (line["site"], line["round"], line["stage"], line["run"]) == ("west", 2, "train", run.run_id)
    (note,) = [note.sentence for note in Onlooker(folder).look().notes if "too late" in note.sentence]
    assert note.startswith("round 2: west came") and note.endswith("its report is not used")
    # Under masks the last round is the one in which it gets its keys.
    back = "missing since round 2: joining" if protection == "masked" else "missed 1 of 3 rounds: timeout"
    assert facts["label"] == f"partial (3 of 4, west {back})"


class Forgetful(dict[str, list[Message]]):
    """Replies of which the one that is held back gets lost."""

    west: Slow

    def pop(self, name: str, default: Any = None) -> Any:
        found = super().pop(name, default)
        return [] if name == self.west.held else found


@pytest.mark.parametrize(("private", "shown"), [(False, "came 40 s too late"), (True, "came too late")], ids=str)
def test_seconds_are_told_only_where_they_say_nothing_of_patients(
    tmp_path: Path, private: bool, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from test_private_round import LOCAL
    from test_private_round import private as private_study

    from fl_server import sums

    plan = private_study(LOCAL) if private else study()
    federation = Federation(tmp_path, plan)
    run = Run.open(federation.new_run())
    summing = sums.build(federation.grid(), run, federation.home)
    order = federation.hospitals["north"].order(run=run.run_id)
    run.history.append(done_of(1))
    summing._came_late(Due("north", order, 0.0, 100.0), 140.04)
    assert run.history[0].late == {"north": None if private else 40.0}
    (line,) = [json.loads(text) for text in (run.folder / "events.jsonl").read_text().splitlines()]
    assert line.get("seconds") == (None if private else 40.0)
    telling.follow(iter([json.dumps(line)]))
    assert shown in capsys.readouterr().out
    (note,) = Onlooker(run.folder).look().notes
    assert shown in note.sentence
    assert ("seconds" in (federation.home.journal.last("report-late") or {})) is not private


def done_of(number: int) -> Round:
    return Round(number, 1, 1.0, ["south"], {"north": "timeout"}, 4, 0.5, {}, 0, 10)


def test_nobody_is_late_in_the_figures_of_a_study_that_does_not_name_it(tmp_path: Path) -> None:
    federation = Federation(tmp_path, study())
    facts = json.loads((federation.run() / "results.json").read_text())
    facts["rounds"][0]["late"] = {"mars": 3.0}
    with pytest.raises(MessageMalformed, match="a site that was late is no training site"):
        check(facts)


def test_what_comes_late_is_held_to_its_order_and_counts_once(tmp_path: Path) -> None:
    """Another order's report, a refusal, an error of Flower, the same twice: none of them is late work."""
    federation, seen = Federation(tmp_path, study()), list[Due]()
    overdue = Overdue(lambda due, now: seen.append(due))
    hospital = federation.hospitals["north"]
    order = hospital.order()
    asked = Message(order.to_records(), dst_node_id=1, message_type="train")

    def due(other: wire.Order) -> None:
        overdue.give_up("m1", Due("north", other, 0.0, 1.0))

    report_ = hospital.answer(order)
    reply = hospital.deliver(hospital.order(attempt=2))
    assert reply.metadata.reply_to_message_id == "m1"
    for wrong in (
        Message(wire.Refusal(**order.naming(), site="north", code="site-paused").to_records(), reply_to=asked),
        Message(Error(1, "ZZTEST"), reply_to=asked),
        Message(report_.to_records(), reply_to=asked),
    ):
        wrong.metadata.__dict__["_reply_to_message_id"] = "m1"
        due(hospital.order(sum=7))
        overdue.take(wrong)
        assert seen == [] and overdue.message_ids == []
    due(hospital.order(attempt=2))
    overdue.take(reply)
    overdue.take(reply)
    assert [each.site for each in seen] == ["north"]


def test_a_site_that_was_late_is_waited_for_by_its_real_time(tmp_path: Path) -> None:
    pace, order = Pace(3600.0), Federation(tmp_path, study()).hospitals["north"].order()
    for _ in range(5):
        pace.note({"north": order}, {"north": 10.0}, {})
    assert pace.limit_s("north", order) == TIMES * 10.0 + ROOM_S
    pace.note({"north": order}, {}, {"north": "timeout"})
    assert pace.limit_s("north", order) == 3600.0
    pace.note({"north": order}, {"north": 130.0}, {})
    assert pace.limit_s("north", order) == TIMES * 130.0 + ROOM_S
