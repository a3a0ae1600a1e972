"""A run on disk: what was committed is there again, what was not is not, and a subset is never called complete."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_server.run import Round, Run, list_runs, participation_label, read_facts, score_sheet
from models.study import Study, parse
from privacy.errors import DocumentError, RunUnknown

TEXT = """
name: opacity
title: Opacity
purpose: A test.
task: {targets: [opacity]}
training: {rounds: 4}
protection: plain
privacy: none
participation: {sites: [north, south, west], quorum: 2}
evaluation: {bins: 10}
"""


def study(**more: str) -> Study:
    text = TEXT
    for old, new in more.items():
        text = text.replace(old, new)
    return parse(Study, text, "study.yaml")


def sheet(loss: float, split: int = 5) -> dict[str, Any]:
    counts = np.zeros((1, 2, 10), dtype=int)
    counts[0, 0, :split], counts[0, 1, split:] = 1, 1
    return {"patients": 10, "images": 10, "loss": loss, "counts": counts.tolist()}


def done(number: int, loss: float = 0.5, contributors: tuple[str, ...] = ("north", "south", "west")) -> Round:
    missing = {name: "timeout" for name in ("north", "south", "west") if name not in contributors}
    names = list(contributors)
    losses = dict.fromkeys(names, 0.7)
    return Round(number, 1.0, names, missing, dict.fromkeys(names, 5), losses, losses, {n: sheet(loss) for n in names})


def vector(value: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.full(6, value, dtype=np.float32)


def test_a_run_opened_again_is_where_its_last_commit_left_it(tmp_path: Path) -> None:
    run = Run.create(tmp_path, study(), "ada", ["north", "south", "west"])
    run.start()
    run.ingested = {"north": 7}
    run.commit(done(1, 0.6), vector(1), {"momentum": vector(9)})
    run.commit(done(2, 0.4), vector(2), {"momentum": vector(8)})
    again = Run.open(run.folder)
    assert list(again.remaining()) == [3, 4]
    assert again.model is not None and (again.model == vector(2)).all()
    assert (again.state["momentum"] == vector(8)).all()
    assert [vars(r) for r in again.history] == [vars(done(1, 0.6)), vars(done(2, 0.4))]
    assert again.ingested == {"north": 7}


def test_each_launch_has_an_attempt_of_its_own(tmp_path: Path) -> None:
    run = Run.create(tmp_path, study(), "ada", ["north"])
    attempts = []
    for _ in range(3):
        again = Run.open(run.folder)
        again.start()
        attempts.append(again.attempt)
    assert attempts == [1, 2, 3]


def test_a_commit_cut_short_leaves_the_round_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.create(tmp_path, study(), "ada", ["north"])
    run.start()
    run.commit(done(1), vector(1), {})

    def power_loss(self: Path, target: Path) -> Path:
        raise OSError("power loss")

    monkeypatch.setattr(Path, "replace", power_loss)
    with pytest.raises(OSError, match="power loss"):
        run.commit(done(2), vector(2), {})
    monkeypatch.undo()
    again = Run.open(run.folder)
    assert list(again.remaining()) == [2, 3, 4]
    assert again.model is not None and (again.model == vector(1)).all()


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_a_damaged_checkpoint_is_named_and_never_half_read(tmp_path: Path, damage: str) -> None:
    run = Run.create(tmp_path, study(), "ada", ["north"])
    run.start()
    run.commit(done(1), vector(1), {})
    path = run.folder / "checkpoint.safetensors"
    data = path.read_bytes()
    path.write_bytes({"truncate": data[:-3], "flip": b"\xff" + data[1:], "empty": b""}[damage])
    with pytest.raises(DocumentError, match="damaged"):
        Run.open(run.folder)


def test_a_checkpoint_or_study_of_another_study_is_refused(tmp_path: Path) -> None:
    one = Run.create(tmp_path, study(), "ada", ["north"])
    other = Run.create(tmp_path, study(Opacity="Other"), "ada", ["north"])
    one.start()
    one.commit(done(1), vector(1), {})
    (other.folder / "checkpoint.safetensors").write_bytes((one.folder / "checkpoint.safetensors").read_bytes())
    with pytest.raises(DocumentError, match="another study"):
        Run.open(other.folder)
    (one.folder / "study.json").write_bytes((other.folder / "study.json").read_bytes())
    with pytest.raises(DocumentError):
        Run.open(one.folder)


def test_the_released_model_is_the_one_with_the_least_validation_loss(tmp_path: Path) -> None:
    run = Run.create(tmp_path, study(), "ada", ["north"])
    run.start()
    for number, loss in enumerate([0.6, 0.3, 0.5, 0.4], start=1):
        run.commit(done(number, loss), vector(number), {})
    assert run.best_round == 2 and run.best is not None and (run.best == vector(2)).all()
    last = Run.create(tmp_path, study(bins="select: last, bins"), "ada", ["north"])
    last.start()
    for number, loss in enumerate([0.6, 0.3, 0.5, 0.4], start=1):
        last.commit(done(number, loss), vector(number), {})
    assert last.best_round == 4


def test_results_say_who_contributed(tmp_path: Path) -> None:
    run = Run.create(tmp_path, study(), "ada", ["north", "south", "west"])
    run.start()
    for number in range(1, 5):
        run.commit(
            done(number, contributors=("north", "south") if number > 2 else ("north", "south", "west")), vector(1), {}
        )
    run.finish({"north": sheet(0.5), "south": sheet(0.5)}, {"west": "timeout"})
    facts, results = read_facts(run.folder), json.loads((run.folder / "results.json").read_text())
    assert facts["state"] == "partial"
    assert results["label"] == "partial (2 of 3, west missing since round 3)"
    assert results["rounds"][2]["missing"] == {"west": "timeout"}
    events = [json.loads(line) for line in (run.folder / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["started", *["round_done"] * 4, "finished"]


def test_labels_never_call_a_subset_complete() -> None:
    everyone, plan = ("north", "south", "west"), study()
    assert participation_label(plan, [done(n, contributors=everyone) for n in (1, 2)], {}) == "complete"
    away = [done(1, contributors=everyone), done(2, contributors=("north", "west")), done(3, contributors=everyone)]
    assert participation_label(plan, away, {}) == "partial (2 of 3, south missed 1 of 3 rounds)"
    never = [done(1, contributors=("north", "south"))]
    assert participation_label(plan, never, {}) == "partial (2 of 3, west never took part)"
    whole = [done(1, contributors=everyone)]
    assert (
        participation_label(plan, whole, {"west": "timeout"})
        == "partial (2 of 3, west not in the test evaluation (timeout))"
    )


def test_a_failed_run_starts_its_events_anew_when_it_is_launched_again(tmp_path: Path) -> None:
    run = Run.create(tmp_path, study(), "ada", ["north"])
    run.start()
    run.fail("quorum-lost", "nobody came")
    assert read_facts(run.folder)["state"] == "failed"
    run.requeue()
    assert read_facts(run.folder)["state"] == "queued"
    assert not (run.folder / "events.jsonl").exists()
    assert "nobody came" in (run.folder / "events-1.jsonl").read_text()


def test_runs_are_listed_and_unknown_ones_are_named(tmp_path: Path) -> None:
    run = Run.create(tmp_path, study(), "ada", ["north"])
    assert [facts["run_id"] for facts in list_runs(tmp_path)] == [run.run_id]
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "run.json").write_text('{"run_id": "to')
    assert [facts["run_id"] for facts in list_runs(tmp_path)] == [run.run_id]
    with pytest.raises(RunUnknown):
        read_facts(tmp_path / "nothing")


def test_a_score_sheet_holds_counts_and_no_scores() -> None:
    from test_privacy_wire import evaluate_report

    assert set(score_sheet(evaluate_report())) == {"patients", "images", "loss", "counts"}
