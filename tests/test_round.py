"""Whole runs in one process: the ServerApp's main, real sites, a grid in memory. Oracles share no code with what they check."""

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from federation import Federation
from flwr.app import Message
from grid import FaultyGrid
from hospital import first_model, study
from oracle import Trained
from sklearn.metrics import roc_auc_score

from fl_client.ingest import Index
from fl_server.run import Run, read_facts
from models import learning, networks
from models.metrics import ScoreHistogram
from models.study import parse
from privacy import journal, wire

FOUR = ["north", "south", "east", "west"]


def of_four(protection: str = "masked", **change: str) -> Any:
    sites = {"sites__[north, south]": f"sites: [{', '.join(FOUR)}]", "quorum__2": "quorum: 3"}
    return study(**sites, protection__plain=f"protection: {protection}", **change)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    # Every order makes its site read the same site.yaml; to parse it once saves half of the time of this file.
    monkeypatch.setattr("models.documents.parse", functools.cache(parse))
    monkeypatch.setattr("os.fsync", lambda file: None)  # processes end in these tests; machines do not


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return Federation(tmp_path, study())


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return Federation(tmp_path_factory.mktemp("masked"), of_four())


@pytest.fixture(scope="module")
def masked_run(consortium: Federation) -> Path:
    """The folder of one undisturbed masked run."""
    return forgetful(consortium).run()


@pytest.fixture
def four(consortium: Federation) -> Federation:
    """Four hospitals that approved a masked study and have answered no order of any run."""
    return forgetful(consortium)


def forgetful(federation: Federation) -> Federation:
    for hospital in federation.hospitals.values():
        (hospital.home / "orders.sqlite").unlink(missing_ok=True)
    return federation


def test_a_run_ends_complete_with_everyone_in_every_round(federation: Federation) -> None:
    folder = federation.run()
    results = json.loads((folder / "results.json").read_text())
    assert read_facts(folder)["state"] == "complete"
    assert [entry["contributors"] for entry in results["rounds"]] == [["north", "south"]] * 2
    assert results["test"]["sites"] == ["north", "south"]
    assert results["ingested"] == sum(Index.open(h.home / "state").taken for h in federation.hospitals.values())
    for hospital in federation.hospitals.values():
        # Two rounds and what each released, validation of the last, test; and the ledger's note that no ε covers this run.
        assert journal.verify(hospital.home / "journal.jsonl") == 2 + 2 + 2 + 1


@pytest.mark.parametrize("protection", ["masked", "sealed", "plain"])
def test_the_model_of_a_round_is_the_mean_of_what_the_sites_learn_weighted_by_cases(
    tmp_path: Path, protection: str
) -> None:
    """Oracle: train each site by hand, average in float64 with numpy."""
    federation = Federation(tmp_path, of_four(protection))
    folder = federation.new_run()
    stop_after(1, federation, folder)
    run = Run.open(folder)
    assert run.model is not None and run.history[0].contributors == sorted(FOUR)
    Trained(federation).check(run.history[0], first_model(federation.plan), run.model)


def test_masked_sealed_and_plain_runs_make_the_same_model_bit_for_bit(
    tmp_path: Path, four: Federation, masked_run: Path
) -> None:
    """One door for everything that is summed: protection changes what the coordinator sees, and nothing else."""
    masked = Run.open(masked_run)
    document = json.loads((masked_run / "results.json").read_text())
    for protection in ("sealed", "plain"):
        other = Federation(tmp_path / protection, of_four(protection))
        folder = other.run()
        run, found = Run.open(folder), json.loads((folder / "results.json").read_text())
        assert run.model is not None and run.best is not None and masked.model is not None and masked.best is not None
        assert (run.model == masked.model).all() and (run.best == masked.best).all()
        for key in ("label", "selected_round", "initial", "test", "figures", "ingested"):
            assert found[key] == document[key], f"{key} differs under {protection}"
        for one, two in zip(found["rounds"], document["rounds"], strict=True):
            timed = ("seconds", "site_seconds")
            assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in two.items() if k not in timed}


def test_the_record_of_a_masked_run_holds_names_and_times_of_sites_and_nothing_else_of_one(masked_run: Path) -> None:
    """Wherever a site's name stands in the record, it stands alone, with a time, a reason, or the figures it released."""
    allowed = {
        *((part, "sites") for part in ("initial", "test", "validation")),
        *(
            (part,)
            for part in ("contributors", "missing", "site_seconds", "validation_missing", "test_missing", "figures")
        ),
    }
    document = json.loads((masked_run / "results.json").read_text())
    study_part = document.pop("study")
    assert set(study_part["roster"]) == set(FOUR)
    found = dict(places_of_sites(document))
    ends = {path: next((a for a in allowed if path[-len(a) :] == a), None) for path in found}
    assert all(ends.values()), f"a site's name stands in {[path for path, end in ends.items() if not end]}"
    for path, values in found.items():
        if path[-1] == "site_seconds":
            assert all(isinstance(value, float) for value in values.values())
        elif path[-1] == "figures":
            assert all(value == [None] for value in values.values())  # fewer than 10 images of a class
        else:
            assert not isinstance(values, dict) or values == {}
    for line in (masked_run / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        if "site" in event:
            assert set(event) <= {"at", "event", "site", "stage", "seconds", "reason"}
        else:
            assert not [
                path for path, _ in places_of_sites(event) if path[-1] not in ("sites", "contributors", "missing")
            ]


def places_of_sites(value: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """(keys that lead there, container) for every list or mapping in which a site is named."""
    inside = value if isinstance(value, list) else list(value) if isinstance(value, dict) else []
    found = [(path, value)] if any(isinstance(name, str) and name in FOUR for name in inside) else []
    items = (
        value.items()
        if isinstance(value, dict)
        else ((str(path[-1]), v) for v in value)
        if isinstance(value, list)
        else ()
    )
    for key, below in items:
        if isinstance(below, dict | list):
            found += places_of_sites(below, (*path, key) if isinstance(value, dict) else path)
    return found


class Killed(BaseException):
    """Stands for the end of the coordinator's process: nothing after it runs."""


def stop_after(number: int, federation: Federation, folder: Path) -> None:
    """Let the run die right after round `number` is committed."""
    killed(federation, folder, federation.grid(), after_commit_of(number))


def after_commit_of(number: int) -> Callable[[pytest.MonkeyPatch, FaultyGrid], None]:
    def arm(patch: pytest.MonkeyPatch, grid: FaultyGrid) -> None:
        commit = Run.commit

        def commit_and_die(self: Run, done: Any, model: Any, state: Any) -> None:
            commit(self, done, model, state)
            if done.round == number:
                raise Killed

        patch.setattr(Run, "commit", commit_and_die)

    return arm


def before_commit_of(number: int) -> Callable[[pytest.MonkeyPatch, FaultyGrid], None]:
    def arm(patch: pytest.MonkeyPatch, grid: FaultyGrid) -> None:
        commit = Run.commit

        def die_or_commit(self: Run, done: Any, model: Any, state: Any) -> None:
            if done.round == number:
                raise Killed
            commit(self, done, model, state)

        patch.setattr(Run, "commit", die_or_commit)

    return arm


def before_orders(
    kind: type[wire.Order], number: int, nth: int = 1
) -> Callable[[pytest.MonkeyPatch, FaultyGrid], None]:
    """Right before the `nth` exchange of that kind in round `number` is sent."""

    def arm(patch: pytest.MonkeyPatch, grid: FaultyGrid) -> None:
        push, seen = grid.push_messages, []

        def die_or_push(messages: Any) -> Any:
            batch = list(messages)
            orders = [wire.decode(message, *wire.ORDERS) for message in batch]
            seen.extend([0] if any(isinstance(o, kind) and o.round == number for o in orders) else [])
            if len(seen) == nth:
                raise Killed
            return push(batch)

        patch.setattr(grid, "push_messages", die_or_push)

    return arm


def killed(
    federation: Federation, folder: Path, grid: FaultyGrid, arm: Callable[[pytest.MonkeyPatch, FaultyGrid], None]
) -> None:
    """Let the coordinator's process die where `arm` says; the sites' programs in `grid` live on."""
    patch = pytest.MonkeyPatch()
    arm(patch, grid)
    with pytest.raises(Killed):
        federation.run(grid, folder)
    patch.undo()


def test_a_run_killed_between_rounds_ends_with_the_same_model_bit_for_bit(tmp_path: Path) -> None:
    quiet, shaken = Federation(tmp_path / "quiet", study()), Federation(tmp_path / "shaken", study())
    undisturbed = Run.open(quiet.run())
    folder = shaken.new_run()
    stop_after(1, shaken, folder)
    assert read_facts(folder)["state"] == "running"
    resumed = Run.open(shaken.run(folder=folder))
    assert resumed.attempt == 2 and [entry.round for entry in resumed.history] == [1, 2]
    assert undisturbed.model is not None and resumed.model is not None
    assert (undisturbed.model == resumed.model).all()


KILLS = {
    "between rounds": (after_commit_of(1), {1: 0, 2: 0}),
    "before the first shares": (before_orders(wire.UnmaskOrder, 1), {1: 0, 2: 0}),
    "between train and unmask": (before_orders(wire.UnmaskOrder, 2), {1: 0, 2: 1}),
    "between unmask and commit": (before_commit_of(2), {1: 0, 2: 1}),
    "before the final validation": (before_orders(wire.EvaluateOrder, 2), {1: 0, 2: 0}),
    "before the test": (before_orders(wire.EvaluateOrder, 2, 2), {1: 0, 2: 0}),
}


@pytest.mark.parametrize("when", KILLS)
def test_a_masked_run_whose_coordinator_is_killed_goes_on_and_ends_complete(
    four: Federation, masked_run: Path, when: str
) -> None:
    """The sites' programs live on. No order comes twice; what was trained but not committed is trained differently."""
    arm, repeats = KILLS[when]
    grid, folder = four.grid(), four.new_run()
    killed(four, folder, grid, arm)
    assert read_facts(folder)["state"] == "running"
    run = Run.open(four.run(grid, folder))
    assert run.facts["label"] == "complete" and run.attempt == 2
    orders = [wire.decode(message, *wire.ORDERS) for message in grid.sent]
    assert {order.attempt for order in orders} == {1, 2}
    asked = [(m.metadata.dst_node_id, o.kind, o.attempt, o.sum) for m, o in zip(grid.sent, orders, strict=True)]
    assert len(set(asked)) == len(asked)
    assert not journals(four, folder.name, "refusal"), "a site refused an order of the second attempt"
    undisturbed = Run.open(masked_run)
    assert run.model is not None and undisturbed.model is not None
    # Masks are gone from the sum to the bit, so equal training gives an equal model, and another training does not.
    assert (run.model == undisturbed.model).all() == (not any(repeats.values()))
    # The model that round 2 was trained from was sent with its first order.
    before = next(order for order in orders if isinstance(order, wire.TrainOrder) and order.round == 2).model
    Trained(four).check(run.history[1], before, run.model, dict.fromkeys(FOUR, repeats[2]))


def journals(federation: Federation, run: str, kind: str) -> list[dict[str, Any]]:
    """What the sites' journals say of one kind of message of one run."""
    lines = [
        line for h in federation.hospitals.values() for line in (h.home / "journal.jsonl").read_text().splitlines()
    ]
    return [entry for entry in map(json.loads, lines) if entry["kind"] == kind and entry["facts"]["run"] == run]


def test_a_kill_before_the_final_validation_keeps_the_record_of_all_rounds(four: Federation, masked_run: Path) -> None:
    folder = four.new_run()
    killed(four, folder, four.grid(), before_orders(wire.EvaluateOrder, 2))
    assert Run.open(folder).history[1].validation is None, (
        "the validation of the last model was there before it was asked for"
    )
    found = json.loads((four.run(folder=folder) / "results.json").read_text())
    quiet = json.loads((masked_run / "results.json").read_text())
    for key in ("selected_round", "initial", "test", "ingested"):
        assert found[key] == quiet[key]
    assert [r["validation"] for r in found["rounds"]] == [r["validation"] for r in quiet["rounds"]]


def test_the_best_round_is_chosen_by_the_validation_that_arrives_a_round_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses are set by hand: that of the initial model is the lowest and must not count, round 2 is the best of three."""
    federation = Federation(tmp_path, study(rounds__2="rounds: 3"))
    from fl_client import app

    score, sheet_of, losses, models = app.score, app.sheet_of, iter([0.1, 0.7, 0.2, 0.5, 9.0]), []
    wanted: dict[bytes, float] = {}
    last: list[float] = []

    def remember(net: Any, cohort: Any) -> Any:
        weights = networks.to_vector(net).tobytes()
        if weights not in wanted:
            wanted[weights] = next(losses)
        last[:] = [wanted[weights]]
        return score(net, cohort)

    def with_the_loss_that_was_set(*given: Any) -> Any:
        return replace(sheet_of(*given), loss=last[0])

    commit = Run.commit

    def keep(self: Run, done: Any, model: Any, state: Any) -> None:
        models.append(model)
        commit(self, done, model, state)

    monkeypatch.setattr("fl_client.app.score", remember)
    monkeypatch.setattr("fl_client.app.sheet_of", with_the_loss_that_was_set)
    monkeypatch.setattr(Run, "commit", keep)
    run = Run.open(federation.run())
    results = json.loads((run.folder / "results.json").read_text())
    assert results["initial"]["loss"] == pytest.approx(0.1, abs=1e-6)
    assert [r["validation"]["loss"] for r in results["rounds"]] == pytest.approx([0.7, 0.2, 0.5], abs=1e-6)
    assert results["selected_round"] == 2 and run.best is not None and (run.best == models[1]).all()
    assert results["test"]["loss"] == pytest.approx(0.2, abs=1e-6), "another model than the best was tested"


@pytest.mark.parametrize("bits", [16, 24, 64])
def test_other_encodings_end_complete_and_stay_close(
    tmp_path: Path, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bound: each site rounds a value to half a step; the mean is off by at most sites times that, divided by the cases."""
    rounds = 2 if bits < 32 else 1  # the first scale is a guess with room to spare, so a first round's words are wide
    change = {"privacy__none": f"encoding_bits: {bits}\nprivacy: none", "rounds__2": f"rounds: {rounds}"}
    federation = Federation(tmp_path, of_four(**change))
    assert federation.plan.encoding_bits == bits
    models: list[tuple[Any, Any]] = []
    commit = Run.commit

    def keep(self: Run, done: Any, model: Any, state: Any) -> None:
        models.append((self.model, model))
        commit(self, done, model, state)

    monkeypatch.setattr(Run, "commit", keep)
    run = Run.open(federation.run())
    assert run.facts["label"] == "complete" and [done.clipped for done in run.history] == [0] * rounds
    trained = Trained(federation)
    for done, (before, after) in zip(run.history, models, strict=True):
        mean, cases = trained.mean(FOUR, before, done.round)
        bound = 4 * 0.5 * 2.0**-done.scale / cases + float(np.abs(after).max()) * 2.0**-23
        assert np.abs(before + mean - after).max() <= bound
        if done.round == rounds:
            assert bound < np.abs(mean).max() / 100
    counts = 6 + 2 * 50 + 1  # of which the last counts what was clipped
    sizes = {models[0][0].size * width // 8 + 8 * counts for width in (max(bits, 32), bits)}
    assert {line["facts"]["vector_bytes"] for line in journals(federation, run.run_id, "train-report")} == sizes


def test_clipped_values_are_counted_into_the_record_and_the_next_scale_falls(
    four: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the words of each site computed with numpy, and those counted that leave the range."""
    monkeypatch.setattr("fl_server.sums.first_scale", lambda study: 37)
    run = Run.open(four.run())
    limit, start, trained, expected = (2**31 - 1) // 4, first_model(four.plan), Trained(four), 0
    for name in FOUR:
        change, cases = trained.site(name, start, 1)
        expected += int((np.abs(np.rint(change.astype(np.float32) * np.float64(cases) * 2.0**37)) > limit).sum())
    first, second = run.history
    assert first.scale == 37 and first.clipped == expected > 100
    assert second.scale < 37
    assert json.loads((run.folder / "results.json").read_text())["rounds"][0]["clipped"] == expected


def test_figures_of_a_site_are_those_of_its_own_test_split_and_come_with_it_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: scikit-learn on the raw scores of each site. The hospitals are tiny: the least count is lowered to one."""
    monkeypatch.setattr("models.contributions.RELEASE_MIN", 1)
    federation = Federation(tmp_path, of_four(**{"test__0.2": "test: 0.4", "bins__50": "bins: 5000"}))
    seen: list[Any] = []
    grid = federation.grid()
    for node, answer in grid.answers.items():
        grid.answers[node] = watched(answer, seen)
    run = Run.open(federation.run(grid))
    reports = [report for report in seen if isinstance(report, wire.EvaluateReport)]
    assert {report.split for report in reports} == {"validation", "test"}
    assert all((r.figures == -1).all() for r in reports if r.split == "validation")
    released = json.loads((run.folder / "results.json").read_text())["figures"]
    assert sorted(released) == sorted(FOUR) and any(rows[0] for rows in released.values())
    net = networks.build(federation.plan)
    assert run.best is not None
    networks.load_vector(net, run.best)
    for name, (figure,) in released.items():
        cohort = federation.cohort(name, "test")
        scores, truth = learning.predict(net, cohort)[:, 0], cohort.targets.numpy()[:, 0]
        negatives, positives = int((truth == 0).sum()), int((truth == 1).sum())
        patients = cohort.patients.numpy()
        fewest = min(len(set(patients[truth == label])) for label in (0, 1))
        if figure is None:  # fewer than two patients of a class, or so few that resamples of them lack one
            assert fewest < 5
            continue
        assert (figure["negatives"], figure["positives"]) == (negatives, positives)
        assert figure["auroc"] == pytest.approx(roc_auc_score(truth, scores), abs=5.1e-4)


def watched(answer: Any, seen: list[Any]) -> Any:
    def watch(message: Message) -> Message | None:
        reply = answer(message)
        seen.append(wire.decode(reply, *wire.REPORTS))
        return reply  # type: ignore[no-any-return]

    return watch


def test_a_study_without_site_figures_gets_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.contributions.RELEASE_MIN", 1)
    federation = Federation(tmp_path, of_four(bins__50="bins: 50, site_figures: false", rounds__2="rounds: 1"))
    released = json.loads((federation.run() / "results.json").read_text())["figures"]
    assert released == {name: [None] for name in released} and sorted(released) == sorted(FOUR)


def test_the_reported_auroc_is_that_of_the_scores_at_the_sites(federation: Federation) -> None:
    """Oracle: scikit-learn on the raw scores, which never left the sites; the histogram may be off by its stated bound."""
    run = Run.open(federation.run())
    results = json.loads((run.folder / "results.json").read_text())
    scores, truth = [], []
    net = networks.build(federation.plan)
    assert run.best is not None
    networks.load_vector(net, run.best)
    for name in federation.plan.all_sites:
        cohort = federation.cohort(name, "test")
        scores.append(learning.predict(net, cohort)[:, 0])
        truth.append(cohort.targets.numpy()[:, 0])
    total = ScoreHistogram.from_json(results["test"]["counts"])
    exact = roc_auc_score(np.concatenate(truth), np.concatenate(scores))
    found, bound = total.auroc(0), total.auroc_bound(0)
    assert found is not None and bound is not None
    assert abs(found - exact) <= bound + 1e-12


def test_a_site_that_drops_out_is_named_and_the_quorum_goes_on(tmp_path: Path) -> None:
    federation = Federation(tmp_path, study(**{"quorum__2": "quorum: 1"}))
    grid = federation.grid()
    honest, seen = grid.answers[2], []

    def leave_after_the_first_round(message: Message) -> Message | None:
        seen.append(message)
        return honest(message) if len(seen) <= 1 else None

    grid.answers[2] = leave_after_the_first_round
    patch = pytest.MonkeyPatch()
    patch.setattr("fl_server.sums.timeout_of", lambda study: 0.3)
    folder = federation.run(grid)
    patch.undo()
    assert read_facts(folder)["label"] == "partial (1 of 2, south missing since round 2: timeout)"


def test_a_round_below_quorum_fails_by_name_and_is_continued_later(federation: Federation) -> None:
    import shutil

    state = federation.hospitals["south"].home / "state"
    shutil.move(state, state.with_name("away"))
    folder = federation.run()
    facts = read_facts(folder)
    assert facts["state"] == "failed" and "quorum-lost" in facts["label"]
    events = (folder / "events.jsonl").read_text()
    assert "south: cache-lost" in events
    shutil.rmtree(state, ignore_errors=True)
    shutil.move(state.with_name("away"), state)
    run = Run.open(folder)
    run.requeue()
    federation.run(folder=folder)
    assert read_facts(folder)["state"] == "complete"


def test_several_targets_are_learned_at_once_and_missing_labels_are_masked(tmp_path: Path) -> None:
    """Two targets from one column: `clear` is the opposite of `opacity` at north, and south has no word for it at all."""
    plan = study(**{"targets__[opacity]": "targets: [opacity, clear]"})
    federation = Federation(tmp_path, plan)
    for name, hospital in federation.hospitals.items():
        path = hospital.home / "site.yaml"
        text = yaml.safe_load(path.read_text())
        targets = text["data"]["labels"]["targets"]
        words = {word: 1 - value for word, value in targets["opacity"]["words"].items()}
        targets["clear"] = {"column": targets["opacity"]["column"], "words": words if name == "north" else {"zebra": 1}}
        path.write_text(yaml.safe_dump(text))
    folder = federation.run()
    assert read_facts(folder)["state"] == "complete"
    counts = np.array(json.loads((folder / "results.json").read_text())["test"]["counts"])
    north = federation.cohort("north", "test").targets.numpy()
    assert counts.shape == (2, 2, 50)
    # At north the positives of one target are the negatives of the other; south has labels of the first one only.
    assert counts[1].sum() == len(north) < counts[0].sum()
    assert counts[1, 0].sum() == north[:, 0].sum() > 0


def test_a_round_in_which_everybody_refuses_is_a_lost_quorum_with_everybodys_reason(federation: Federation) -> None:
    for hospital in federation.hospitals.values():
        path = hospital.home / "site.yaml"
        path.write_text(path.read_text().replace("least_protection: plain", "least_protection: masked"))
    folder = federation.run()
    assert "quorum-lost" in read_facts(folder)["label"]
    assert "north: policy-forbids, south: policy-forbids" in (folder / "events.jsonl").read_text()
