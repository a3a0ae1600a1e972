"""Whole runs in one process: the ServerApp's main, real sites, a grid in memory. Oracles share no code with what they check."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from flwr.app import Context, Message, RecordDict
from grid import Answer, FaultyGrid
from hospital import COORDINATOR, Hospital, first_model, study
from sklearn.metrics import roc_auc_score

from fl_client.app import make_app
from fl_client.cohort import Cohort
from fl_client.ingest import Index
from fl_server import app as coordinator
from fl_server.roster import Home, ServerFile
from fl_server.run import Run, read_facts
from models import learning, networks
from models.labels import LabelTable
from models.metrics import ScoreHistogram
from models.study import Study
from privacy import journal, keys


class Federation:
    """A founded coordinator and tiny hospitals, in one process."""

    def __init__(self, folder: Path, plan: Study) -> None:
        self.plan = plan
        self.home = Home.found(folder / "coordinator", ServerFile(version=1, name="test", host="127.0.0.1"))
        # The hospitals of hospital.py trust this key; the coordinator of this test signs with it.
        object.__setattr__(self.home, "coordinator_key", COORDINATOR)
        path = folder / "coordinator" / "keys" / "coordinator.key"
        path.unlink()
        keys.write_private(path, _pem(COORDINATOR))
        self.hospitals = {name: Hospital.open(folder, name, plan) for name in plan.all_sites}
        for number, (name, hospital) in enumerate(self.hospitals.items(), start=1):
            line = self.home.invite(name, "site")
            key = keys.load_key(hospital.home / "keys" / "site.key")
            if not any(party.public_key == key.public_key() for party in self.home.roster.sites()):
                self.home.enrol(line.token, name, "site", keys.make_csr(key, name))
            self.home.roster.set_node(name, number)

    def grid(self) -> FaultyGrid:
        return FaultyGrid({number: self.answers(name) for number, name in enumerate(self.hospitals, start=1)})

    def answers(self, name: str) -> Answer:
        client, config = make_app(), {"site": str(self.hospitals[name].home)}

        def answer(message: Message) -> Message:
            return client(message, Context(1, 5, dict(config), RecordDict(), {}))

        return answer

    def run(self, grid: FaultyGrid | None = None, folder: Path | None = None) -> Path:
        folder = folder or Run.create(self.home.runs, self.plan, "ada", self.plan.all_sites).folder
        context = Context(0, 0, {}, RecordDict(), {"home": str(self.home.root), "run": folder.name})
        coordinator.main(grid or self.grid(), context)
        return folder

    def cohort(self, name: str, split: Any) -> Cohort:
        site = self.hospitals[name].site
        labels = LabelTable.read(site.home / site.source.labels.table, site.source.labels)
        pins = site.home / "studies" / f"{self.plan.digest}.pins.json"
        return Cohort.open(Index.open(site.state), labels, self.plan, split, pins)


def _pem(key: Any) -> bytes:
    from cryptography.hazmat.primitives import serialization as s

    pem: bytes = key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())
    return pem


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return Federation(tmp_path, study())


def test_a_run_ends_complete_with_everyone_in_every_round(federation: Federation) -> None:
    folder = federation.run()
    results = json.loads((folder / "results.json").read_text())
    assert read_facts(folder)["state"] == "complete"
    assert [entry["contributors"] for entry in results["rounds"]] == [["north", "south"]] * 2
    assert set(results["test"]) == {"north", "south"}
    assert results["ingested"] == {name: Index.open(h.home / "state").taken for name, h in federation.hospitals.items()}
    for hospital in federation.hospitals.values():
        assert journal.verify(hospital.home / "journal.jsonl") == 2 * 2 + 1


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
    folder = Run.create(federation.home.runs, plan, "ada", plan.all_sites).folder
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
    folder = Run.create(shaken.home.runs, shaken.plan, "ada", shaken.plan.all_sites).folder
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
    total = None
    for name in federation.plan.all_sites:
        cohort = federation.cohort(name, "test")
        scores.append(learning.predict(net, cohort)[:, 0])
        truth.append(cohort.targets.numpy()[:, 0])
        histogram = ScoreHistogram(np.array(results["test"][name]["counts"], dtype=np.int64))
        total = histogram if total is None else total + histogram
    assert total is not None
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
        return honest(message) if len(seen) <= 2 else None

    grid.answers[2] = leave_after_the_first_round
    patch = pytest.MonkeyPatch()
    patch.setattr("fl_server.app.timeout_of", lambda study: 0.3)
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
    test = json.loads((folder / "results.json").read_text())["test"]
    counts = {name: np.array(sheet["counts"]) for name, sheet in test.items()}
    assert counts["north"].shape == (2, 2, 50)
    # At north the positives of one target are the negatives of the other; at south the second has no label.
    assert counts["north"][0, 1].sum() == counts["north"][1, 0].sum() > 0
    assert counts["south"][0].sum() > 0 and counts["south"][1].sum() == 0


def test_a_round_in_which_everybody_refuses_is_a_lost_quorum_with_everybodys_reason(federation: Federation) -> None:
    for hospital in federation.hospitals.values():
        path = hospital.home / "site.yaml"
        path.write_text(path.read_text().replace("permit_plain: true", "permit_plain: false"))
    folder = federation.run()
    assert "quorum-lost" in read_facts(folder)["label"]
    assert "north: policy-forbids, south: policy-forbids" in (folder / "events.jsonl").read_text()
