"""Whole runs in one process: the ServerApp's main, real sites, a grid in memory. Oracles share no code with what they check."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from federation import Federation
from flwr.app import Message
from hospital import first_model, study
from sklearn.metrics import roc_auc_score

from fl_client.ingest import Index
from fl_server.run import Run, read_facts
from models import learning, networks
from models.metrics import ScoreHistogram
from privacy import journal


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return Federation(tmp_path, study())


def test_a_run_ends_complete_with_everyone_in_every_round(federation: Federation) -> None:
    folder = federation.run()
    results = json.loads((folder / "results.json").read_text())
    assert read_facts(folder)["state"] == "complete"
    assert [entry["contributors"] for entry in results["rounds"]] == [["north", "south"]] * 2
    assert results["test"]["sites"] == ["north", "south"]
    assert results["ingested"] == sum(Index.open(h.home / "state").taken for h in federation.hospitals.values())
    for hospital in federation.hospitals.values():
        assert journal.verify(hospital.home / "journal.jsonl") == 2 + 2  # two rounds, validation of the last, test


def test_the_model_of_a_round_is_the_mean_of_what_the_sites_learn_weighted_by_cases(federation: Federation) -> None:
    """Oracle: train each site by hand, average in float64 with numpy."""
    start, plan = first_model(federation.plan), federation.plan
    total, cases = np.zeros(start.shape, np.float64), 0
    for name in plan.all_sites:
        net = networks.build(plan)
        networks.load_vector(net, start)
        cohort = federation.cohort(name, "train")
        learning.learn(net, cohort, plan, round_number=1)
        after = np.concatenate([tensor.detach().numpy().ravel() for tensor in net.state_dict().values()])
        labelled = int((cohort.known.sum(dim=1) > 0).sum())
        total += labelled * (after.astype(np.float64) - start)
        cases += labelled
    folder = federation.new_run()
    stop_after(1, federation, folder)
    committed = Run.open(folder).model
    assert committed is not None
    np.testing.assert_allclose(committed, start + total / cases, rtol=0, atol=2e-6)


class Killed(BaseException):
    """Stands for the end of the coordinator's process: nothing after it runs."""


def stop_after(number: int, federation: Federation, folder: Path) -> None:
    """Let the run die right after round `number` is committed."""
    patch, commit = pytest.MonkeyPatch(), Run.commit

    def commit_and_die(self: Run, done: Any, model: Any, state: Any) -> None:
        commit(self, done, model, state)
        if done.round == number:
            raise Killed

    patch.setattr(Run, "commit", commit_and_die)
    with pytest.raises(Killed):
        federation.run(folder=folder)
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
    assert read_facts(folder)["label"] == "partial (1 of 2, south missing since round 2)"


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
