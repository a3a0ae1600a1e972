"""`participation.sample`: each round asks sites that anybody can draw again; who was not asked is not missing."""

import functools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from federation import Federation
from grid import FaultyGrid
from hospital import Hospital, study
from safetensors.numpy import load_file

from fl_server import report
from fl_server.progress import Progress
from fl_server.results import check
from fl_server.run import Run, participation_label
from models.study import Participation, Study, parse
from privacy import wire
from privacy.errors import MessageMalformed, StudyConflict

SIX = ("east", "north", "south", "west", "mid", "coast")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.documents.parse", functools.cache(parse))
    monkeypatch.setattr("os.fsync", lambda file: None)


def plan_of(protection: str = "masked", sites: tuple[str, ...] = SIX, sample: int = 4, rounds: int = 3) -> Study:
    part = {"sites__[north, south]": f"sites: [{', '.join(sites)}]", "quorum__2": f"quorum: 3, sample: {sample}"}
    part["rounds__2"] = f"rounds: {rounds}"
    return study(**part, **{"protection: plain": f"protection: {protection}\nnetwork: {{name: linear}}"})


def results_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    check(found)
    return found


def test_the_draw_is_public_fair_and_the_same_whatever_protects_the_study() -> None:
    many = tuple(f"site-{n:03}" for n in range(100))
    plan = plan_of(sites=many, sample=16)
    keyed = plan.with_keys(dict.fromkeys(many, "02" + "ab" * 32), "cd" * 32)
    assert keyed.digest != plan.digest and keyed.asked(3) == plan.asked(3) == plan_of("plain", many, 16).asked(3)
    drawn = [plan.asked(number) for number in range(1, 401)]
    assert all(len(set(names)) == 16 and names == sorted(names) for names in drawn)
    assert len({tuple(names) for names in drawn}) == 400
    often = Counter(name for names in drawn for name in names)
    # Binomial(400, 0.16): mean 64, deviation 7.3; six of them either way.
    assert len(often) == 100 and all(20 < count < 108 for count in often.values())
    # One seed more, and other sites are asked.
    other = plan.model_copy(update={"training": plan.training.model_copy(update={"seed": 99})})
    assert other.asked(3) != plan.asked(3)


def test_a_study_without_a_sample_keeps_its_canonical_form_and_asks_everybody() -> None:
    plan = study()
    assert b"sample" not in plan.canonical()
    assert plan.asked(1) == plan.asked(0) == ["north", "south"] and plan.tested == plan.all_sites
    outside = plan_of().model_copy(
        update={"participation": Participation(sites=[*SIX], evaluate_only=["far"], quorum=3, sample=4)}
    )
    assert "far" in outside.tested and len(outside.tested) == 5


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sample: 4": "sample: 7"}, "7 of 6 training sites cannot be drawn"),
        ({"sample: 4": "sample: 2"}, "quorum 3 is more than the 2 sites that a round asks"),
        ({"privacy: none": "privacy: none\nstrategy: {name: scaffold}"}, "a mean over all sites"),
        ({"privacy: none": "privacy: none\nstrategy: {name: fedbn}"}, "never drawn has no norm layers"),
    ],
)
def test_what_cannot_be_drawn_is_a_conflict(changes: dict[str, str], sentence: str) -> None:
    part = {"sites__[north, south]": f"sites: [{', '.join(SIX)}]", "quorum__2": "quorum: 3, sample: 4"}
    with pytest.raises(StudyConflict, match=sentence):
        study(**part, **{"training: {": "network: {name: small_cnn}\ntraining: {optimizer: sgd, "}, **changes).check()


def test_privacy_credits_nothing_for_the_draw() -> None:
    given = plan_of().model_dump(mode="json")
    given["training"]["balance"] = False
    given["privacy"] = {"mode": "local", "epsilon": 8, "delta": 1e-5, "clip_norm": 1, "sampling_rate": 0.5, "steps": 2}
    drawn = Study.model_validate(given).with_noise()
    whole = Study.model_validate(given | {"participation": given["participation"] | {"sample": None}}).with_noise()
    assert drawn.privacy == whole.privacy
    assert [s.to_json() for s in drawn.statements()] == [s.to_json() for s in whole.statements()]
    assert drawn.spends(3) == whole.spends(3) > 0


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Federation, Path]]:
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("models.documents.parse", functools.cache(parse))
        patch.setattr("os.fsync", lambda file: None)
        for protection in ("masked", "plain"):
            federation = Federation(tmp_path_factory.mktemp(protection), plan_of(protection))
            made[protection] = federation, federation.run()
    return made


def test_each_round_asks_the_drawn_sites_and_nobody_else(runs: dict[str, tuple[Federation, Path]]) -> None:
    federation, folder = runs["masked"]
    plan, results = federation.plan, results_of(folder)
    for entry in results["rounds"]:
        assert entry["asked"] == plan.asked(entry["round"]) and len(entry["asked"]) == 4
        assert entry["contributors"] == sorted(entry["asked"]) and entry["missing"] == entry["validation_missing"] == {}
    assert len({tuple(entry["asked"]) for entry in results["rounds"]}) > 1  # or this test is about nothing
    assert results["test"]["sites"] == sorted(plan.tested) and results["label"] == "complete"
    # The validation of a round's model comes with the sum after it, from the sites of that one.
    assert [entry["validation"]["sites"] for entry in results["rounds"]] == [sorted(plan.asked(n)) for n in (2, 3, 4)]


def test_a_masked_and_a_plain_run_ask_the_same_and_learn_the_same(runs: dict[str, tuple[Federation, Path]]) -> None:
    models = [load_file(folder / "model.safetensors")["model"] for _, folder in runs.values()]
    assert models[0].tobytes() == models[1].tobytes()


def test_a_resumed_run_asks_the_sites_that_the_first_launch_would_have(
    tmp_path: Path, runs: dict[str, tuple[Federation, Path]]
) -> None:
    federation = runs["masked"][0].copied(tmp_path / "again")
    folder = federation.new_run()
    commit = Run.commit

    def killed(run: Run, *facts: Any) -> None:
        commit(run, *facts)
        if len(run.history) == 1:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "commit", killed)
        federation.run(folder=folder)
    federation.run(folder=folder)
    first = results_of(runs["masked"][1])
    assert [r["asked"] for r in results_of(folder)["rounds"]] == [r["asked"] for r in first["rounds"]]


def test_a_drawn_site_that_is_away_is_missing_and_one_that_was_not_drawn_is_not(
    tmp_path: Path, runs: dict[str, tuple[Federation, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fl_server.rounds.GRACE_S", 0.0)
    federation = runs["masked"][0].copied(tmp_path / "away")
    plan = federation.plan
    gone = next(site for site in plan.asked(1) if site not in plan.asked(2))
    grid: FaultyGrid = federation.grid()
    grid.online = {federation.node(name) for name in plan.all_sites if name != gone}
    results = results_of(federation.run(grid))
    for entry in results["rounds"]:
        assert entry["missing"] == ({gone: "offline"} if gone in plan.asked(entry["round"]) else {})
    assert results["label"].startswith("partial (5 of 6, ") and gone in results["label"]


def test_a_site_refuses_to_train_in_a_round_that_did_not_draw_it(tmp_path: Path) -> None:
    plan = plan_of("plain")
    hospital = Hospital.open(tmp_path, "north", plan)
    rounds = {n: "north" in plan.asked(n) for n in (1, 2, 3)}
    assert set(rounds.values()) == {True, False}  # of this study; another seed would need another test
    for number, drawn in rounds.items():
        answer = hospital.answer(hospital.order(round=number, sum=number))
        if drawn:
            assert isinstance(answer, wire.TrainReport)
        else:
            assert isinstance(answer, wire.Refusal) and answer.code == "study-not-approved"


def test_a_results_document_that_names_other_sites_than_the_draw_is_refused(
    runs: dict[str, tuple[Federation, Path]],
) -> None:
    results = results_of(runs["plain"][1])
    first = results["rounds"][0]
    other = next(name for name in SIX if name not in first["asked"])
    first["asked"] = [other if name == first["asked"][0] else name for name in first["asked"]]
    with pytest.raises(MessageMalformed, match="not those that the study draws"):
        check(results)


def test_the_label_counts_only_who_was_asked(runs: dict[str, tuple[Federation, Path]]) -> None:
    plan = runs["plain"][0].plan
    history = Run.open(runs["plain"][1]).history
    assert participation_label(plan, history, {}) == "complete"
    lost = history[0].asked[0]
    history[0].contributors.remove(lost)
    history[0].missing[lost] = "timeout"
    assert f"{lost} " in participation_label(plan, history, {}) and "timeout" in participation_label(plan, history, {})


def test_the_report_and_the_progress_say_who_was_asked(
    tmp_path: Path, runs: dict[str, tuple[Federation, Path]]
) -> None:
    federation, folder = runs["plain"]
    page = report.write(results_of(folder), tmp_path).read_text()
    assert "Each round asked 4 of the 6 training sites" in page
    assert "No site was missing from a round it was asked to take part in." in page
    progress = Progress(json.loads((folder / "run.json").read_text()))
    for line in (folder / "events.jsonl").read_text().splitlines():
        progress.feed(json.loads(line))
    for name in SIX:
        due = sum(name in federation.plan.asked(number) for number in (1, 2, 3))
        assert progress.due(name) == progress.sites[name].rounds == due
