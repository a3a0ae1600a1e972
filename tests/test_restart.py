"""A run that restarts from a round, and a study that trains on where a run ended: nothing is repeated, hidden or unspent."""

import functools
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import safetensors.numpy
from crashes import Crash, Places
from federation import Federation
from hospital import study as small
from oracle import Trained
from test_kill import PLANS
from test_leaving import with_researcher
from test_private_round import permissive
from test_round import stop_after
from typer.testing import CliRunner, Result

from fl_server import checkpoint, report
from fl_server.cli import app
from fl_server.extension import extended
from fl_server.progress import Onlooker
from fl_server.results import check
from fl_server.roster import Home
from fl_server.run import Run, read_facts
from models.study import Study, parse
from privacy import journal, wire
from privacy.errors import DocumentError, RunError, StudyConflict


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fl_server.sums.timeout_of", lambda study: 0.3)
    monkeypatch.setattr("models.documents.parse", functools.cache(parse))
    monkeypatch.setattr("os.fsync", lambda file: None)


def plan_of(name: str, rounds: int = 4) -> Study:
    plan = PLANS[name]()
    return plan.model_copy(update={"training": plan.training.model_copy(update={"rounds": rounds})})


def made(folder: Path, name: str, rounds: int = 4) -> Federation:
    federation = Federation(folder, plan_of(name, rounds))
    for hospital in federation.hospitals.values():
        permissive(hospital)
    return federation


def stopped_after(number: int, federation: Federation) -> Path:
    folder = federation.new_run()
    stop_after(number, federation, folder)
    run = Run.open(folder)
    run.start()
    run.fail("quorum-lost", "somebody stumbled over a cable")
    return folder


def call(federation: Federation, *words: str) -> Result:
    return CliRunner().invoke(app, [*words, "--home", str(federation.home.root)], env={"COLUMNS": "160"})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda file: None)
        return Run.open(made(tmp_path_factory.mktemp("quiet"), "plain").run()).model


@pytest.mark.parametrize("first", [1, 3, 4])
def test_a_run_restarts_from_a_round_and_ends_with_the_same_model(tmp_path: Path, first: int, undisturbed: Any) -> None:
    """Three rounds were committed: those from `first` on are given up. Plain rounds make the same random choices again."""
    federation = made(tmp_path, "plain")
    with_researcher_of(federation)
    folder = stopped_after(3, federation)
    before = Run.open(folder).attempt
    said = call(federation, "resume", folder.name, "--from-round", str(first), "--json")
    assert said.exit_code == 0, said.output
    assert json.loads(said.stdout) | {"before_it": 0} == {
        "run_id": folder.name, "state": "queued", "before_it": 0, "given_up": 4 - first,
    }  # fmt: skip
    grid = federation.grid()
    run = Run.open(federation.run(grid, folder))
    orders = [wire.decode(message, *wire.ORDERS) for message in grid.sent]
    assert {order.round for order in orders if isinstance(order, wire.TrainOrder)} == set(range(first, 5))
    assert {order.attempt for order in orders} == {run.attempt} and run.attempt > before
    assert run.model is not None and (run.model == undisturbed).all() and len(run.history) == 4
    told = json.loads((folder / "results.json").read_text())
    again = [] if first == 4 else [(first, 3)]
    assert [(each["first"], each["after"]) for each in told["restarts"]] == again
    assert read_facts(folder)["label"] == "complete" + "".join(
        f"; restarted from round {f} after round {a}" for f, a in again
    )
    lines = [e["facts"] for e in journal.entries(federation.home.journal.path) if e["kind"] == "run-restarted"]
    assert [(line["round"], line["given_up"]) for line in lines] == [(first, 4 - first)]
    seen = Onlooker(folder).look()
    assert [each.round for each in seen.rounds] == [1, 2, 3, 4] and all(
        part.rounds == 4 for part in seen.sites.values()
    )
    assert sum("restarted from round" in note.sentence for note in seen.notes) == len(again)
    sentences = report._gaps(check(told).results)
    assert sum(f"restarted from round {first} after round 3" in sentence for sentence in sentences) == len(again)


def with_researcher_of(federation: Federation) -> None:
    from privacy.statements import Statement

    line = federation.home.invite("ada", "researcher")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("test_leaving.FOUR", [])
        with_researcher(federation, line.token)
    for name in federation.hospitals:
        federation.home.roster.decide(Statement(federation.plan.digest, name, "approved", 1), b"")


def test_a_masked_run_that_restarts_uses_new_masks_and_other_random_choices(tmp_path: Path) -> None:
    """The oracle trains the committed rounds by hand; what was trained before counts as a training."""
    federation = made(tmp_path, "masked", rounds=2)
    folder = stopped_after(1, federation)
    run = Run.open(folder)
    first = run.model
    run.restart_at(1)
    run.requeue()
    models: list[Any] = []
    commit = Run.commit

    def keep(self: Run, done: Any, model: Any, state: Any) -> None:
        models.append((done, self.model, model))
        commit(self, done, model, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "commit", keep)
        run = Run.open(federation.run(folder=folder))
    trained = Trained(federation)
    for (done, before, after), repeats in zip(models, (1, 0), strict=True):
        trained.check(done, before, after, dict.fromkeys(federation.hospitals, repeats))
    assert first is not None and (models[0][2] != first).any()
    for hospital in federation.hospitals.values():
        lines = [e["facts"] for e in journal.entries(hospital.home / "journal.jsonl") if e["kind"] == "train-report"]
        places = [(line["attempt"], line["sum"]) for line in lines]
        assert len(places) == len(set(places)) == 3


def test_what_was_spent_stays_spent(tmp_path: Path) -> None:
    """Two rounds of a private study, one given up: three trainings are charged, each once; the study has room for spare ones."""
    federation = made(tmp_path, "local", rounds=2)
    folder = stopped_after(1, federation)
    run = Run.open(folder)
    assert run.restart_at(1) == 1
    run.requeue()
    assert Run.open(federation.run(folder=folder)).facts["state"] == "complete"
    for hospital in federation.hospitals.values():
        with closing(sqlite3.connect(hospital.home / "ledger.sqlite")) as book:
            entries = [json.loads(body) for (body,) in book.execute("SELECT body FROM entries ORDER BY seq")]
        charged = [(entry["attempt"], entry["sum"]) for entry in entries if entry["kind"] == "reserve"]
        assert len(charged) == len(set(charged)) == 3
        assert hospital.site.ledger.spendings(0.001)["total"].rounds == 3


def test_a_round_whose_model_is_gone_is_refused_by_name_and_nothing_is_touched(tmp_path: Path) -> None:
    federation = made(tmp_path, "plain")
    with_researcher_of(federation)
    folder = stopped_after(3, federation)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    for number, sentence in (
        (2, "no longer on the disk"),
        (5, "has 3 committed rounds"),
        (0, "has 3 committed rounds"),
    ):
        refused = call(federation, "resume", folder.name, "--from-round", str(number))
        assert isinstance(refused.exception, RunError) and sentence in str(refused.exception)
    assert refused.exception.remedy == "Name a round from 1 to 4."
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before | {"lock": b""}
    path = folder / "checkpoint-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    refused = call(federation, "resume", folder.name, "--from-round", "3")
    assert isinstance(refused.exception, RunError) and "no longer on the disk" in str(refused.exception)
    assert checkpoint.kept(folder) == [2, 3]


def test_whoever_dies_while_a_run_restarts_the_rounds_are_given_up_once_or_not_at_all(
    tmp_path: Path, undisturbed: Any
) -> None:
    federation = made(tmp_path / "a", "plain")
    stopped_after(2, federation)
    places = 0
    for at in (0, 2, 3, 4, 8, 10**9):
        other = federation.copied(tmp_path / str(at))
        (folder,) = other.home.runs.iterdir()
        with pytest.MonkeyPatch.context() as patch:
            watched = Places(other.folder, at)
            watched.patch(patch)
            try:
                restart(folder)
                Run.open(folder).start()
            except Crash:
                watched.dead.clear()
                other.home = Home.open(other.home.root)
                if not read_facts(folder).get("restarts"):
                    assert len(Run.open(folder).history) == 2
                    restart(folder)
                if read_facts(folder)["state"] == "failed":
                    Run.open(folder).requeue()
            places = len(watched.trace)
        run = Run.open(other.run(folder=folder))
        assert run.facts["label"] == "complete; restarted from round 2 after round 2" and run.lost == []
        assert run.model is not None and (run.model == undisturbed).all()
        assert [each.round for each in Onlooker(folder).look().rounds] == [1, 2, 3, 4]
    assert places > 12, "the last place was behind the end"


def restart(folder: Path) -> None:
    run = Run.open(folder)
    run.restart_at(2)
    run.requeue()


@pytest.mark.parametrize("name", ["plain", "masked", "local"])
def test_a_finished_run_is_extended_by_a_study_of_its_own(tmp_path: Path, name: str) -> None:
    federation = made(tmp_path, name, rounds=1)
    folder = federation.run()
    out, home = tmp_path / "more.yaml", federation.home
    said = call(federation, "extend", folder.name, "--rounds", "2", "--out", str(out))
    assert said.exit_code == 0, said.output
    assert isinstance(
        call(federation, "extend", folder.name, "--rounds", "2", "--out", str(out)).exception, DocumentError
    )
    before = federation.plan
    more = parse(Study, out.read_text(), "more.yaml").with_noise()
    more.check()
    assert more.network.initial is not None and more.network.initial.study == before.digest
    assert (more.training.rounds, more.title) == (2, f"{before.title} (2 more rounds)")
    assert not more.roster and more.learned != before.learned
    # Patients who came since, or a hash that would put others elsewhere: each stays where the first study had it.
    pins = federation.hospitals["north"].home / "studies" / f"{before.digest}.pins.json"
    document = json.loads(pins.read_text())
    trained = sorted(token for token, split in document["splits"].items() if split == "train")
    tested = sorted(token for token, split in document["splits"].items() if split == "test")
    for token, split in ((trained[0], "test"), (tested[0], "train")):
        document["splits"][token] = split
    document.pop("images", None)
    document.pop("public_size", None)
    pins.write_text(json.dumps(document))

    federation.plan = home.with_keys(more)
    for hospital in federation.hospitals.values():
        hospital.study = federation.plan
    grid = federation.grid()
    refused = federation.run(grid)
    assert (
        "quorum-lost" in read_facts(refused)["label"] and "study-not-approved" in (refused / "events.jsonl").read_text()
    )
    for hospital in federation.hospitals.values():
        hospital.approve(federation.plan)
    grid = federation.grid()
    longer = federation.run(grid)
    assert read_facts(longer)["label"] == "complete"
    first = next(o for o in (wire.decode(m, *wire.ORDERS) for m in grid.sent) if isinstance(o, wire.TrainOrder))
    released = safetensors.numpy.load_file(folder / "model.safetensors")["model"]
    assert np.array_equal(first.model, released)
    mine = pins.with_name(f"{federation.plan.digest}.pins.json")
    assert json.loads(mine.read_text())["splits"] == document["splits"]
    check(json.loads((longer / "results.json").read_text()))
    if name == "local":
        site = federation.hospitals["north"].site
        spent = site.ledger.spendings(0.001)
        assert spent["total"].rounds == 3 and {before.digest, federation.plan.digest} <= set(spent)


def test_only_a_run_that_trained_and_finished_is_extended(tmp_path: Path) -> None:
    federation = made(tmp_path, "plain")
    folder = stopped_after(1, federation)
    refused = call(federation, "extend", folder.name, "--rounds", "2", "--out", str(tmp_path / "more.yaml"))
    assert isinstance(refused.exception, RunError) and "Let it finish first" in refused.exception.remedy
    assert not (tmp_path / "more.yaml").exists()


def test_a_run_with_norms_of_each_site_has_no_model_to_go_on_from(tmp_path: Path) -> None:
    """Its checkpoint lacks the norm layers: as weights to start from they would fit nothing."""
    plan = small().model_dump(mode="json") | {"strategy": {"name": "fedbn"}}
    facts = {"version": 1, "state": "complete", "label": "complete"}
    (tmp_path / "study.json").write_bytes(Study.model_validate(plan).canonical())
    (tmp_path / "run.json").write_text(json.dumps(facts))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(StudyConflict, match="fedbn"):
        extended(cast(Any, None), tmp_path, 2)
