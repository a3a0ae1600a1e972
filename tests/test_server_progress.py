"""How far a run is, as onlookers read it; stopped and resumed runs, whoever carries them out or nobody."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_server_run import done, sheet, study

from fl_server import executor
from fl_server.progress import Onlooker, Progress, duration, find, printable, remedy_of
from fl_server.roster import Home
from fl_server.run import Run, ask_to_stop, holding, list_runs, mark_stopped, read_facts, stop_asked
from fl_server.settings import ServerFile
from privacy import parcels
from privacy.errors import RunStopped, RunUnknown

ZERO = np.zeros(3, np.float32)


def new_run(runs: Path) -> Run:
    return Run.create(runs, study(), "ada", ["north", "south", "west"])


def played(runs: Path) -> Run:
    """A run in its third round: two are committed, west is missing since the second."""
    run = new_run(runs)
    run.start()
    run.event("asked", stage="train", round=1, sites=["north", "south", "west"])
    run.score(sheet(0.9), {})
    run.commit(done(1), ZERO, {})
    run.event("asked", stage="train", round=2, sites=["north", "south", "west"])
    run.event("site_missing", site="west", reason="timeout")
    run.event("void", round=2, attempt=1, reason="too-few-survivors")
    run.score(sheet(0.8), {})
    run.commit(done(2, ("north", "south")), ZERO, {})
    run.event("asked", stage="train", round=3, sites=["north", "south"])
    run.event("site", site="north", stage="train-report", seconds=1.5)
    run.score(sheet(0.7), {})
    return run


def test_the_folder_says_who_is_at_which_stage_and_who_is_missing_since_when(tmp_path: Path) -> None:
    run = played(tmp_path)
    found = Onlooker(run.folder).look()
    assert (found.state, found.done, found.planned, found.stage, found.round) == ("running", 2, 4, "train", 3)
    assert found.sentence() == "round 3 of 4, training: south"
    assert {name: (part.doing, part.rounds) for name, part in found.sites.items()} == {
        "north": ("done", 2),
        "south": ("working", 2),
        "west": ("missing", 1),
    }
    assert found.sites["west"].reason == "timeout" and found.sites["north"].train_orders == 3
    assert [(r.round, r.loss, r.contributors) for r in found.rounds] == [
        (1, 0.8, ["north", "south", "west"]),
        (2, 0.7, ["north", "south"]),
    ]
    assert found.initial is not None and found.initial[0] == 0.9
    assert [note.sentence for note in found.notes] == ["round 2, attempt 1: the sum was not opened (too-few-survivors)"]
    document = found.to_json()
    assert json.loads(json.dumps(document)) == document and document["sites"]["west"]["refusals"] == {"timeout": 1}


def test_the_time_that_is_left_follows_the_median_round(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    found = Onlooker(run.folder).look()
    assert found.remaining_s() is None  # nothing is known before the first round
    facts = {"state": "running", "round": 3, "rounds": 8, "sites": ["north"]}
    found = Progress(facts)
    for number, seconds in ((1, 10.0), (2, 100.0), (3, 12.0)):
        at = f"2026-01-01T00:00:0{number}.000+00:00"
        found.feed(
            {"at": at, "event": "round_done", "round": number, "seconds": seconds, "contributors": ["north"],
             "missing": {}, "train_loss": None, "clipped": 0}
        )  # fmt: skip
    third = 1767225603.0
    assert found.remaining_s(third) == 5 * 12.0
    assert found.remaining_s(third + 5) == 5 * 12.0 - 5
    assert found.remaining_s(third + 5000) == 4 * 12.0  # a late round is not subtracted from those that follow
    found.update(facts | {"state": "failed"}, "")
    assert found.remaining_s(third) is None


def test_an_onlooker_reads_only_what_is_new_and_starts_anew_with_a_new_launch(tmp_path: Path) -> None:
    run = played(tmp_path)
    onlooker = Onlooker(run.folder)
    first = onlooker.look().version
    assert onlooker.look().version == first
    with (run.folder / "events.jsonl").open("a") as file:
        file.write('{"at": "x", "event": "site", "si')  # a line that is being written
    assert onlooker.look().version == first
    with (run.folder / "events.jsonl").open("a") as file:
        file.write('te": "south", "stage": "train-report", "seconds": 2.0}\n')
    assert onlooker.look().sites["south"].doing == "done"
    run.fail("quorum-lost", "too few")
    assert onlooker.look().failure == ("quorum-lost", "too few")
    run.requeue()
    again = onlooker.look()
    assert again.state == "queued" and len(again.rounds) == 2 and again.launches == 1
    run.start()
    assert onlooker.look().launches == 2 and onlooker.look().failure == ("", "")
    both = [other.look().to_json() | {"remaining_s": None} for other in (Onlooker(run.folder), onlooker)]
    assert both[0] == both[1]


def test_a_round_that_was_lost_with_its_checkpoint_is_not_counted_twice(tmp_path: Path) -> None:
    run = played(tmp_path)
    run.event("checkpoint_damaged", round=2, goes_on_after=1)
    found = Onlooker(run.folder).look()
    assert [each.round for each in found.rounds] == [1]
    assert found.notes[-1].sentence == "the checkpoint of round 2 was damaged; going on after round 1"
    run.event("flagged", round=2, site="west", why="frozen", norm=0.0)
    assert Onlooker(run.folder).look().notes[-1].sentence == "round 2: the update of west is frozen"


@given(st.binary(max_size=300))
def test_damaged_events_are_left_out(noise: bytes) -> None:
    found = Progress({"state": "running", "sites": ["north"]})
    for event in ("started", "asked", "site", "round_done", "scored", "void", "finished", "failed", "nothing"):
        for value in (None, [], {}, "x" * 10_000, noise.decode("latin-1"), 2**70):
            found.feed({"event": event, "at": value, "site": value, "sites": value, "round": value, "reason": value,
                        "missing": value, "contributors": value, "seconds": value, "loss": value, "auroc": value,
                        "message": value, "code": value, "stage": value})  # fmt: skip
    json.dumps(found.to_json())
    found.sentence()


def test_a_file_of_noise_does_not_hide_what_follows(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    noise = random.Random(5).randbytes(3 * 1024 * 1024).replace(b"\n", b" ")
    (run.folder / "events.jsonl").write_bytes(noise + b'\n[1]\n{"event": "__class__"}\n')
    run.start()
    assert Onlooker(run.folder).look().launches == 1


def test_nothing_that_a_terminal_obeys_is_shown() -> None:
    assert printable("a\x1b[2Jb\r\n\x00") == "a�[2Jb���" and len(printable("x" * 9999)) == 500
    assert [duration(s) for s in (41.6, 200, 7500)] == ["42 s", "3 min 20 s", "2 h 5 min"]
    assert "fl-client start" in remedy_of("offline") and remedy_of("site-paused").startswith("At the site")
    assert remedy_of("never heard of") == "Ask the site what its node says."


@pytest.mark.parametrize("damage", ["[]", "{}", '{"version": 1, "run_id": "x"}', "", '"text"', '{"version": 99}'])
def test_a_run_that_cannot_be_listed_hides_no_other(tmp_path: Path, damage: str) -> None:
    run, other = new_run(tmp_path), new_run(tmp_path)
    (other.folder / "run.json").write_text(damage)
    assert [facts["run_id"] for facts in list_runs(tmp_path)] == [run.run_id]


def test_a_run_is_found_by_the_beginning_of_its_id(tmp_path: Path) -> None:
    one, two = new_run(tmp_path), new_run(tmp_path)
    assert find(tmp_path, one.run_id) == one.folder
    ours = next(n for n in range(len(two.run_id)) if one.run_id[:n] != two.run_id[:n])
    assert find(tmp_path, two.run_id[:ours]) == two.folder
    for wrong in ("", "opacity", "../x", "nothing", "*"):
        with pytest.raises(RunUnknown):
            find(tmp_path, wrong)


# Stopping ------------------------------------------------------------------------------------------------------------


def test_a_stop_is_heeded_between_stages_and_at_once_within_them(tmp_path: Path) -> None:
    from fl_server.run import heed_stop

    run = new_run(tmp_path)
    run.heed()
    ask_to_stop(run.folder, at_once=False)
    heed_stop(run.folder, within_stage=True)
    with pytest.raises(RunStopped):
        run.heed()
    ask_to_stop(run.folder, at_once=True)
    with pytest.raises(RunStopped):
        heed_stop(run.folder, within_stage=True)
    (run.folder / "stop.json").write_bytes(b"\xff torn")
    assert stop_asked(run.folder) == "after-stage"
    run.stop()
    assert read_facts(run.folder)["state"] == "stopped" and stop_asked(run.folder) == ""
    run.requeue()
    run.heed()


def test_a_stopped_run_keeps_its_rounds_and_goes_on_after_them(tmp_path: Path) -> None:
    run = played(tmp_path)
    ask_to_stop(run.folder, at_once=False)
    run.stop()
    again = Run.open(run.folder)
    assert list(again.remaining()) == [3, 4] and again.facts["label"] == "stopped after round 2"
    before = again.attempt
    again.requeue()
    again.start()
    assert again.attempt == before + 1


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.found(tmp_path / "c", ServerFile(version=1, name="test", host="127.0.0.1"))


def test_the_executor_takes_no_run_that_was_stopped_while_it_waited(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []
    monkeypatch.setattr(executor, "carry_out", lambda root, run_id, port, secret: tried.append(run_id))
    stopped, other = new_run(home.runs), new_run(home.runs)
    ask_to_stop(stopped.folder, at_once=False)
    assert executor.attempt(home.root, stopped.run_id, 1, b"") and not tried
    assert read_facts(stopped.folder)["state"] == "stopped"
    assert executor.attempt(home.root, stopped.run_id, 1, b"") and not tried  # as the list of a moment ago had it
    assert executor.attempt(home.root, other.run_id, 1, b"") and tried == [other.run_id]
    with holding(other.folder) as held:
        assert held and executor.attempt(
            home.root, other.run_id, 1, b""
        )  # it has its turn there: no reason to wait longer
    assert tried == [other.run_id]


def test_a_run_whose_checkpoint_is_damaged_can_be_stopped(home: Home) -> None:
    run = new_run(home.runs)
    (run.folder / "checkpoint.safetensors").write_bytes(b"noise")
    assert mark_stopped(run.folder)["state"] == "stopped"


def test_a_look_at_the_mailbox_ends_a_run_that_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from functools import partial

    from fl_server.mailbox import Mailbox
    from fl_server.run import heed_stop

    run = new_run(tmp_path)
    monkeypatch.setattr(parcels, "post", lambda *_: b"")
    grid = Mailbox("127.0.0.1:1", "token", partial(heed_stop, run.folder, within_stage=True))
    try:
        ask_to_stop(run.folder, at_once=False)
        assert list(grid.pull_messages([])) == []  # the stage is finished first
        ask_to_stop(run.folder, at_once=True)
        with pytest.raises(RunStopped):
            grid.pull_messages([])
    finally:
        grid.close()
