"""`fl-server runs`, `show`, `watch`, `stop`, `resume`: on folders of runs, and on a run that is carried out meanwhile."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from federation import Federation
from grid import FaultyGrid
from hospital import study as tiny_study
from test_server_progress import new_run, played
from typer.testing import CliRunner, Result

from fl_server import dashboard
from fl_server.app import note_end, note_missing_ends
from fl_server.cli import app
from fl_server.roster import Home
from fl_server.run import Run, ask_to_stop, holding, read_facts
from fl_server.settings import ServerFile
from privacy import journal
from privacy.errors import RunError, RunUnknown, TooFewApprovals


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.found(tmp_path / "c", ServerFile(version=1, name="test", host="127.0.0.1"))


def call(home: Home, *words: str) -> Result:
    return CliRunner().invoke(app, [*words, "--home", str(home.root)], env={"COLUMNS": "160"})


def said(home: Home, *words: str) -> Any:
    result = call(home, *words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_runs_say_where_they_stand_in_the_queue(home: Home) -> None:
    first, second = played(home.runs), new_run(home.runs)
    rows = {row["run_id"]: row for row in said(home, "runs")["runs"]}
    assert (rows[first.run_id]["round"], rows[first.run_id]["rounds"]) == (2, 4)
    assert rows[first.run_id]["before_it"] == 0 and rows[second.run_id]["before_it"] == 1
    assert "queued, 1 run before it" in call(home, "runs").stdout
    (second.folder / "run.json").write_text("{damaged")
    assert "unreadable" in call(home, "runs").stdout and len(said(home, "runs")["runs"]) == 2


def test_show_tells_stages_missing_sites_and_remedies(home: Home) -> None:
    run = played(home.runs)
    text = call(home, "show", run.run_id).stdout
    for part in (
        "round 3 of 4, training: south",
        "missing: timeout",
        "timeout (1x)",
        "median round 1 s",
        "too-few-survivors",
    ):
        assert part in text, part
    assert "The site did not answer before the deadline" in text
    found = said(home, "show", run.run_id[:-2])
    assert found["round"] == 2 and [r["loss"] for r in found["rounds"]] == [0.8, 0.7]
    assert isinstance(call(home, "show", "nothing").exception, RunUnknown)


def test_a_site_that_only_evaluates_is_not_shown_as_missing_its_rounds(home: Home) -> None:
    plan = tiny_study(**{"sites__[north, south], quorum__2": "sites: [north], evaluate_only: [south], quorum: 1"})
    assert plan.participation.evaluate_only == ["south"]
    run = Run.create(home.runs, plan, "ada", plan.all_sites)
    run.event("started", attempt=1, round=0, rounds=2)
    rows = call(home, "show", run.run_id).stdout
    assert "evaluates only" in rows and rows.count("0 of 0") == 1
    assert {name: part["trains"] for name, part in said(home, "show", run.run_id)["sites"].items()} == {
        "north": True, "south": False,
    }  # fmt: skip
    (run.folder / "study.json").write_text("{")
    assert "evaluates only" not in call(home, "show", run.run_id).stdout


def test_a_run_that_outlines_shows_dice_where_others_show_auroc(home: Home) -> None:
    run = played(home.runs)
    assert "AUROC" in call(home, "show", run.run_id).stdout
    for number in (1, 2):
        run.event("scored", round=number, loss=0.5, auroc=None, dice=0.625)
    run.event("finished", label="complete", auroc=None, dice=0.5)
    text, found = call(home, "show", run.run_id).stdout, said(home, "show", run.run_id)
    assert "Dice 0.500" in text and "0.625" in text and "AUROC" not in text
    assert found["test_dice"] == 0.5 and [each["dice"] for each in found["rounds"]] == [0.625, 0.625]
    page = dashboard.Screen(home).page(f"/runs/{run.run_id}")
    assert "Test Dice" in page and "0.500" in page and "AUROC" not in page


def test_the_end_of_a_run_is_in_the_journal_once(home: Home) -> None:
    """A run whose process died before the line gets it at the next start; one that was resumed since gets another at its end."""
    kept, lost, running = new_run(home.runs), new_run(home.runs), played(home.runs)
    for run in (kept, lost):
        run.fail("quorum-lost", "too few sites")
    note_end(home, kept.facts)
    for _ in range(2):
        note_missing_ends(Home.open(home.root))
    ends = [entry["facts"] for entry in journal.entries(home.journal.path) if entry["kind"] == "run-ended"]
    assert [line["run"] for line in ends] == [kept.run_id, lost.run_id] and running.facts["state"] == "running"
    assert ends[1] == {"run": lost.run_id, "digest": lost.study.digest, "rounds": 0, "state": "failed"}
    home.journal.append("run-resumed", run=kept.run_id, sites=[])
    note_missing_ends(home)
    assert home.journal.last("run-ended") == {**ends[0]}


def test_a_hostile_label_is_no_markup_and_no_control_character(home: Home) -> None:
    run = played(home.runs)
    run.facts["label"] = run.facts["study"] = "[red]\x1b[2J"
    run._save_facts()
    for words in (("show", run.run_id), ("runs",)):
        assert "\x1b" not in call(home, *words).stdout
        assert "[red]" in call(home, *words).stdout


def test_a_waiting_run_is_stopped_at_once_and_one_that_is_carried_out_after_its_stage(home: Home) -> None:
    waiting, running = new_run(home.runs), played(home.runs)
    assert said(home, "stop", waiting.run_id) == {"run_id": waiting.run_id, "state": "stopped", "stopping": None}
    with holding(running.folder) as held:
        assert held
        assert said(home, "stop", running.run_id)["stopping"] == "after-stage"
        assert said(home, "stop", running.run_id, "--now")["stopping"] == "now"
        assert isinstance(call(home, "resume", running.run_id).exception, RunError)
        assert read_facts(running.folder)["state"] == "running"
    # Whoever carried it out died before it looked: the next one to ask finds nobody there.
    assert said(home, "stop", running.run_id)["state"] == "stopped"
    assert isinstance(call(home, "stop", running.run_id).exception, RunError)
    kinds = [entry["kind"] for entry in journal.entries(home.journal.path)]
    assert kinds.count("stop-asked") == 4 and kinds.count("run-ended") == 2


def test_a_run_is_resumed_only_with_the_approvals_of_today(home: Home) -> None:
    run = played(home.runs)
    assert said(home, "stop", run.run_id)["state"] == "stopped"
    assert isinstance(call(home, "resume", run.run_id).exception, TooFewApprovals)
    assert read_facts(run.folder)["state"] == "stopped"


@pytest.mark.parametrize(("state", "code"), [("complete", 0), ("partial", 3), ("failed", 1), ("stopped", 4)], ids=str)
def test_watch_ends_with_the_state_of_the_run(home: Home, state: str, code: int) -> None:
    run = played(home.runs)
    if state == "failed":
        run.fail("quorum-lost", "too few sites")
    elif state == "stopped":
        ask_to_stop(run.folder, at_once=False)
        run.stop()
    else:
        run.facts |= {"state": state, "label": state}
        run._save_facts()
        run.event("finished", label=state, auroc=0.8)
    shown = call(home, "watch", run.run_id)
    assert shown.exit_code == code, shown.output
    assert "round 2  1.0 s  training loss 0.700" in shown.stdout
    lines = call(home, "watch", run.run_id, "--json")
    assert lines.exit_code == code and all(json.loads(line)["event"] for line in lines.stdout.splitlines())


class Interrupted(FaultyGrid):
    """A grid that has somebody stop the run once the orders of a round are out."""

    def watch_for(self, folder: Path, round_: int) -> None:
        self.folder, self.at = folder, round_

    def push_messages(self, messages: Any) -> Any:
        listed = list(messages)
        if read_facts(self.folder)["round"] == self.at - 1:
            ask_to_stop(self.folder, at_once=False)
        return super().push_messages(listed)


def test_a_run_that_is_stopped_in_a_round_ends_after_it_and_goes_on_to_the_same_end(tmp_path: Path) -> None:
    """The oracle is the same federation's run that nobody stopped."""
    plan = tiny_study()
    plan = plan.model_copy(update={"training": plan.training.model_copy(update={"rounds": 3})})
    federation = Federation(tmp_path, plan)
    undisturbed = federation.run()
    folder = federation.new_run()
    grid = Interrupted({federation.node(name): federation.answers(name) for name in federation.hospitals})
    grid.watch_for(folder, 2)
    federation.run(grid, folder)
    assert read_facts(folder)["state"] == "stopped" and read_facts(folder)["round"] == 2
    last = list(journal.entries(federation.home.journal.path))[-1]
    assert last["kind"] == "run-ended" and last["facts"]["state"] == "stopped"

    run = Run.open(folder)
    run.requeue()
    federation.run(folder=folder)
    ends = [read_facts(path) for path in (undisturbed, folder)]
    assert [facts["state"] for facts in ends] == ["complete", "complete"]
    assert (folder / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()


def test_a_run_that_waits_for_its_quorum_is_stopped_while_it_waits(tmp_path: Path) -> None:
    federation = Federation(tmp_path, tiny_study())
    folder, grid = federation.new_run(), federation.grid()
    grid.online = set()
    later = threading.Timer(1.5, ask_to_stop, (folder,), {"at_once": False})
    later.start()
    federation.run(grid, folder)
    assert read_facts(folder)["state"] == "stopped" and read_facts(folder)["round"] == 0
    events = [json.loads(line)["event"] for line in (folder / "events.jsonl").read_text().splitlines()]
    assert events == ["started", "waiting", "stopped"]


def test_watch_follows_a_run_that_goes_on_meanwhile(home: Home) -> None:
    run = played(home.runs)
    answers: list[Result] = []
    watching = threading.Thread(target=lambda: answers.append(call(home, "watch", run.run_id, "--json")))
    watching.start()
    run.fail("quorum-lost", "too few sites")
    watching.join(timeout=20)
    assert answers and answers[0].exit_code == 1
