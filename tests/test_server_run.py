"""A run on disk: what was committed is there again, what was not is not, and a subset is never called complete."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from fl_server.run import Round, Run, list_runs, participation_label, read_facts, score_sheet
from fl_server.run import Test as LastTest  # under its own name pytest would take it for a test
from models.contributions import Sheet
from models.metrics import ScoreHistogram
from models.study import Study, parse
from privacy.errors import DocumentError, NewerVersion, RunError, RunUnknown

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
EVERYONE = ("north", "south", "west")


def study(**more: str) -> Study:
    text = TEXT
    for old, new in more.items():
        text = text.replace(old, new)
    return parse(Study, text, "study.yaml")


def sheet(loss: float | None, sites: tuple[str, ...] = EVERYONE) -> dict[str, Any]:
    counts = np.zeros((1, 2, 10), dtype=int)
    counts[0, 0, :5], counts[0, 1, 5:] = 1, 1
    return {"sites": list(sites), "patients": 10, "images": 10, "loss": loss, "counts": counts.tolist()}


def done(number: int, contributors: tuple[str, ...] = EVERYONE, scale: int = 17) -> Round:
    missing = {name: "timeout" for name in EVERYONE if name not in contributors}
    return Round(
        round=number,
        attempt=1,
        seconds=1.0,
        contributors=list(contributors),
        missing=missing,
        cases=15,
        train_loss=0.7,
        site_seconds=dict.fromkeys(contributors, 0.7),
        clipped=0,
        scale=scale,
    )


def vector(value: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.full(6, value, dtype=np.float32)


def made(runs: Path, plan: Study | None = None) -> Run:
    run = Run.create(runs, plan or study(), "ada", list(EVERYONE))
    run.start()
    return run


def carried_out(run: Run, losses: list[float | None]) -> Run:
    """Rounds as `fl_server.app` has them: the score of a model comes with the sum of the next round."""
    run.score(sheet(0.9), {})
    for number, loss in enumerate(losses, start=1):
        run.commit(done(number), vector(number), {})
        run.score(sheet(loss), {})
    run.save()
    return run


def events(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "events.jsonl").read_text().splitlines()]


def test_a_run_opened_again_is_where_its_last_commit_left_it(tmp_path: Path) -> None:
    run = made(tmp_path)
    assert run.scale is None
    run.score(sheet(0.9), {"west": "timeout"})
    run.commit(done(1), vector(1), {"momentum": vector(9)})
    run.score(sheet(0.6), {"south": "offline"})
    run.scale = -3
    run.commit(done(2), vector(2), {"momentum": vector(8)})
    again = Run.open(run.folder)
    assert list(again.remaining()) == [3, 4]
    assert again.model is not None and (again.model == vector(2)).all()
    assert again.best is not None and (again.best == vector(1)).all() and again.best_round == 1
    assert (again.state["momentum"] == vector(8)).all()
    first = vars(done(1)) | {"validation": sheet(0.6), "validation_missing": {"south": "offline"}}
    assert [vars(r) for r in again.history] == [first, vars(done(2))]
    assert again.initial == sheet(0.9) and again.scale == -3


def test_a_score_that_came_after_the_last_commit_is_asked_for_again(tmp_path: Path) -> None:
    """It costs one more sum and nothing else: the score says the same."""
    run = made(tmp_path)
    run.commit(done(1), vector(1), {})
    run.score(sheet(0.6), {})
    again = Run.open(run.folder)
    assert again.history[0].validation is None and again.best_round == 0
    run.save()
    again = Run.open(run.folder)
    assert again.history[0].validation == sheet(0.6) and again.best_round == 1


def test_each_launch_and_each_void_sum_has_an_attempt_of_its_own_that_is_durable(tmp_path: Path) -> None:
    run = Run.create(tmp_path, study(), "ada", ["north"])
    attempts = []
    for _ in range(3):
        again = Run.open(run.folder)
        again.start()
        attempts.append(again.attempt)
        again.next_attempt()
        assert (
            Run.open(run.folder).attempt == again.attempt
        )  # whoever opens it next knows, even if this process dies now
        attempts.append(again.attempt)
    assert attempts == [1, 2, 3, 4, 5, 6]


def test_an_attempt_is_on_the_disk_before_it_is_spoken_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made(tmp_path)
    monkeypatch.setattr(Path, "replace", power_loss)
    with pytest.raises(OSError, match="power loss"):
        run.next_attempt()
    monkeypatch.undo()
    assert Run.open(run.folder).attempt == 1


def power_loss(self: Path, target: Path) -> Path:
    raise OSError("power loss")


def test_a_commit_cut_short_leaves_the_round_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made(tmp_path)
    run.commit(done(1), vector(1), {})
    monkeypatch.setattr(Path, "replace", power_loss)
    with pytest.raises(OSError, match="power loss"):
        run.commit(done(2), vector(2), {})
    monkeypatch.undo()
    again = Run.open(run.folder)
    assert list(again.remaining()) == [2, 3, 4]
    assert again.model is not None and (again.model == vector(1)).all()


def damaged(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "flipped model":
        data[-3] ^= 1  # the last array
    if how == "flipped record":
        data[data.index(b"best_round") + 14] ^= 1  # a digit of the progress becomes another
    made = {"truncated": data[:-3], "no header": b"\xff" + data[1:], "empty": b"", "gone": None}.get(how, data)
    path.unlink()
    if made is not None:
        path.write_bytes(made)


DAMAGE = ["truncated", "no header", "empty", "flipped model", "flipped record", "gone"]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_without_another_is_named_and_never_half_read(tmp_path: Path, damage: str) -> None:
    run = made(tmp_path)
    run.commit(done(1), vector(1), {})
    damaged(run.folder / "checkpoint-00001.safetensors", damage)
    with pytest.raises(DocumentError, match="damaged"):
        Run.open(run.folder)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_run_falls_back_to_the_checkpoint_before_a_damaged_one_and_says_so(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = made(tmp_path)
    for number in (1, 2, 3):
        run.commit(done(number), vector(number), {"momentum": vector(-number)})
    path = run.folder / "checkpoint-00003.safetensors"
    damaged(path, damage)
    bytes_before = path.read_bytes() if path.exists() else b""
    again = Run.open(run.folder)
    assert list(again.remaining()) == [3, 4] and again.model is not None and (again.model == vector(2)).all()
    assert (again.state["momentum"] == vector(-2)).all()
    again.start()
    told = [event for event in events(again) if event["event"] == "checkpoint_damaged"]
    assert [(event["round"], event["goes_on_after"]) for event in told] == [(3, 2)]
    assert "round 3 was damaged" in caplog.text and "round 3 was damaged" in read_facts(run.folder)["label"]
    if bytes_before:
        assert path.with_name(f"{path.name}.damaged").read_bytes() == bytes_before
    again.commit(done(3), vector(33), {})
    fresh = Run.open(run.folder)
    fresh.start()
    assert fresh.model is not None and (fresh.model == vector(33)).all() and fresh.lost == []
    assert len([e for e in events(fresh) if e["event"] == "checkpoint_damaged"]) == 1, "told twice"
    assert "round 3 was damaged" in read_facts(run.folder)["label"], "what was lost is said until the end"


def test_the_last_two_checkpoints_are_kept_and_each_has_the_best_model(tmp_path: Path) -> None:
    run = carried_out(made(tmp_path), [0.3, 0.5, 0.6, 0.7])
    kept = sorted(path.name for path in run.folder.glob("checkpoint*"))
    assert kept == ["checkpoint-00003.safetensors", "checkpoint-00004.safetensors"]
    for name in kept:
        assert (load_file(run.folder / name)["best"] == vector(1)).all()


def test_what_a_killed_writer_left_is_swept_away_at_the_next_start(tmp_path: Path) -> None:
    run = made(tmp_path)
    run.commit(done(1), vector(1), {})
    torn = run.folder / ".checkpoint-00002.safetensors.0011223344556677.part"
    torn.write_bytes(b"x" * 100)
    Run.open(run.folder).start()
    assert not torn.exists()


def test_an_event_after_one_that_was_torn_has_a_line_of_its_own(tmp_path: Path) -> None:
    run = made(tmp_path)
    path = run.folder / "events.jsonl"
    with path.open("a") as file:
        file.write('{"at": "2026')
    run.event("scored", round=0)
    lines = path.read_text().splitlines()
    assert lines[-2] == '{"at": "2026' and json.loads(lines[-1])["event"] == "scored"


def old_checkpoint(run: Run, version: int, number: int) -> Path:
    """The checkpoint after round `number` as release 0.1 wrote it: one file, no checksum."""
    path = run.folder / f"checkpoint-{number:05d}.safetensors"
    with safe_open(path, framework="numpy") as file:
        progress = json.loads(file.metadata()["progress"])
    old = run.folder / "checkpoint.safetensors"
    save_file(load_file(path), old, metadata={"progress": json.dumps(progress | {"version": version})})
    for new in run.folder.glob("checkpoint-*"):
        new.unlink()
    return old


def test_a_checkpoint_of_release_0_1_is_brought_forward_and_kept(tmp_path: Path) -> None:
    run = made(tmp_path)
    run.commit(done(1), vector(1), {"momentum": vector(9)})
    old = old_checkpoint(run, 2, 1)
    before = old.read_bytes()
    for _ in range(2):
        again = Run.open(run.folder)
        assert (
            again.model is not None
            and (again.model == vector(1)).all()
            and (again.state["momentum"] == vector(9)).all()
        )
        assert [vars(r) for r in again.history] == [vars(done(1))] and again.lost == []
    assert old.with_name("checkpoint.safetensors.v2").read_bytes() == before and not old.exists()


def test_a_checkpoint_before_version_2_is_named(tmp_path: Path) -> None:
    """Before version 2, rounds held figures of single sites; they are not carried into a run that hides them."""
    run = made(tmp_path)
    run.commit(done(1), vector(1), {})
    old = old_checkpoint(run, 1, 1)
    with pytest.raises(DocumentError, match="another version"):
        Run.open(run.folder)
    assert old.exists()


def test_a_run_or_a_checkpoint_of_a_later_version_is_left_alone(tmp_path: Path) -> None:
    run = made(tmp_path)
    run.commit(done(1), vector(1), {})
    path = run.folder / "checkpoint-00001.safetensors"
    arrays = load_file(path)
    save_file(arrays, path, metadata={"progress": json.dumps({"version": 4}), "sha256": "?"})
    with pytest.raises(NewerVersion, match="layout 4"):
        Run.open(run.folder)
    facts = json.loads((run.folder / "run.json").read_text())
    (run.folder / "run.json").write_text(json.dumps(facts | {"version": 2}))
    with pytest.raises(NewerVersion, match=r"run\.json has layout 2"):
        Run.open(run.folder)
    assert list_runs(tmp_path) == []


def test_a_checkpoint_or_study_of_another_study_is_refused(tmp_path: Path) -> None:
    one = made(tmp_path)
    other = Run.create(tmp_path, study(Opacity="Other"), "ada", ["north"])
    one.commit(done(1), vector(1), {})
    name = "checkpoint-00001.safetensors"
    (other.folder / name).write_bytes((one.folder / name).read_bytes())
    with pytest.raises(DocumentError, match="another study"):
        Run.open(other.folder)
    (one.folder / "study.json").write_bytes((other.folder / "study.json").read_bytes())
    with pytest.raises(DocumentError, match="not the study"):
        Run.open(one.folder)


CHOICES: list[tuple[list[float | None], int]] = [
    ([0.6, 0.3, 0.5, 0.4], 2),
    ([0.3, 0.3, 0.3, 0.3], 1),
    ([0.6, 0.5, 0.4, 0.3], 4),
    ([None, 0.9, None, 0.95], 2),
    ([None, None, None, None], 1),
    ([0.5, None, 0.4, None], 3),
]


@pytest.mark.parametrize(("losses", "best"), CHOICES)
def test_the_released_model_is_the_one_with_the_least_validation_loss(
    tmp_path: Path, losses: list[float | None], best: int
) -> None:
    """Each score belongs to the model committed before it, not to the round whose sum brought it."""
    run = Run.open(carried_out(made(tmp_path), losses).folder)
    assert run.best_round == best and run.best is not None and (run.best == vector(best)).all()
    assert [r.validation and r.validation["loss"] for r in run.history] == losses


def test_the_last_model_is_released_if_the_study_says_so(tmp_path: Path) -> None:
    run = carried_out(made(tmp_path, study(bins="select: last, bins")), [0.6, 0.3, 0.5, 0.4])
    assert run.best_round == 4 and run.best is not None and (run.best == vector(4)).all()


def test_the_score_of_the_initial_model_chooses_nothing(tmp_path: Path) -> None:
    run = made(tmp_path)
    run.score(sheet(0.0), {})
    assert run.initial == sheet(0.0) and run.best is None and run.best_round == 0


def test_a_run_without_a_committed_round_has_no_model_to_save_or_release(tmp_path: Path) -> None:
    run = made(tmp_path)
    for ending in (run.save, lambda: run.finish(LastTest(sheet(0.5), {}, {}, [], [], 0))):
        with pytest.raises(RunError, match="no model"):
            ending()


def test_results_say_who_contributed(tmp_path: Path) -> None:
    run = made(tmp_path)
    run.score(sheet(0.9), {})
    for number in range(1, 5):
        run.commit(done(number, ("north", "south") if number > 2 else EVERYONE, scale=number), vector(number), {})
        run.score(sheet(0.5 / number, ("north", "south")), {"west": "timeout"})
    figures: dict[str, Any] = {"north": [None], "south": [{"auroc": 0.5, "low": 0.4, "high": 0.6, "negatives": 20}]}
    run.finish(LastTest(sheet(0.5, ("north", "south")), {"west": "timeout"}, figures, [], [], 321))
    facts, results = read_facts(run.folder), json.loads((run.folder / "results.json").read_text())
    assert facts["state"] == "partial"
    assert results["label"] == facts["label"] == "partial (2 of 3, west missing since round 3: timeout)"
    assert [entry["missing"] for entry in results["rounds"]] == [{}, {}, {"west": "timeout"}, {"west": "timeout"}]
    assert [entry["scale"] for entry in results["rounds"]] == [1, 2, 3, 4]
    assert results["rounds"][0]["validation"]["sites"] == ["north", "south"]
    assert (results["version"], results["ingested"], results["selected_round"]) == (3, 321, 4)
    assert results["test"] == sheet(0.5, ("north", "south")) and results["test_missing"] == {"west": "timeout"}
    assert results["figures"] == figures and results["initial"] == sheet(0.9)
    assert set(results) == {
        *("version", "run_id", "digest", "study", "label", "started", "finished", "selected_round", "initial"),
        *("rounds", "test", "test_missing", "figures", "groups", "grades", "ingested", "restarts"),
    }
    assert (load_file(run.folder / "model.safetensors")["model"] == vector(4)).all()
    assert json.loads((run.folder / "card.json").read_text())["selected_round"] == 4
    kinds = [event["event"] for event in events(run)]
    assert kinds == ["started", "scored", *["round_done", "scored"] * 4, "finished"]


def test_nothing_in_the_results_tells_one_site_from_another_but_who_when_and_what_it_released(tmp_path: Path) -> None:
    """Per site there are names, seconds, reasons and released figures; every other number is of the sum."""
    run = carried_out(made(tmp_path), [0.5, 0.4, 0.3, 0.2])
    run.finish(LastTest(sheet(0.5), {}, {"north": [None]}, [], [], 30))
    results = json.loads((run.folder / "results.json").read_text())
    results.pop("study")

    def by_site(value: Any, path: str = "") -> set[str]:
        if isinstance(value, dict):
            own = {path} if set(value) & set(EVERYONE) else set()
            return own.union(*(by_site(each, f"{path}.{name}") for name, each in value.items()))
        if isinstance(value, list):
            return set().union(*(by_site(each, path) for each in value))
        return set()

    assert by_site(results) == {".rounds.site_seconds", ".figures"}


def test_labels_never_call_a_subset_complete() -> None:
    plan = study()
    assert participation_label(plan, [done(n) for n in (1, 2)], {}) == "complete"
    away = [done(1), done(2, ("north", "west")), done(3)]
    assert participation_label(plan, away, {}) == "partial (2 of 3, south missed 1 of 3 rounds: timeout)"
    never = [done(1, ("north", "south"))]
    assert participation_label(plan, never, {}) == "partial (2 of 3, west never took part: timeout)"
    label = participation_label(plan, [done(1)], {"west": "timeout"})
    assert label == "partial (2 of 3, west not in the test evaluation (timeout))"


def test_events_say_how_it_goes(tmp_path: Path) -> None:
    run = made(tmp_path)
    run.score(sheet(0.9), {})
    run.commit(done(1), vector(1), {})
    run.fail("quorum-lost", "nobody came")
    started, scored, committed, failed = events(run)
    assert (started["attempt"], started["round"], started["rounds"]) == (1, 0, 4)
    assert (scored["round"], scored["loss"], scored["auroc"]) == (0, 0.9, 1.0)
    assert committed["contributors"] == list(EVERYONE) and committed["train_loss"] == 0.7 and committed["clipped"] == 0
    assert failed["code"] == "quorum-lost"


def test_a_failed_run_starts_its_events_anew_when_it_is_launched_again(tmp_path: Path) -> None:
    run = made(tmp_path)
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
    histogram = ScoreHistogram(np.arange(20).reshape(1, 2, 10))
    found = score_sheet(["north", "west"], Sheet(7, 9, 0.25, histogram))
    assert found == {
        "sites": ["north", "west"],
        "patients": 7,
        "images": 9,
        "loss": 0.25,
        "counts": [[list(range(10)), list(range(10, 20))]],
    }
    assert score_sheet([], Sheet(0, 0, 0.0, ScoreHistogram.empty(1, 10)))["loss"] is None
