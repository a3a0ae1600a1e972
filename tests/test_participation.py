"""Sites that pause, come back, or approve in the middle of a run: not waited for, asked again, and named in every figure."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from federation import Federation
from hospital import Hospital, study
from test_leaving import with_researcher
from test_round import FOUR
from typer.testing import CliRunner

from fl_client.cli import app as fl_client
from fl_client.policy import Pause
from fl_server.progress import Onlooker
from fl_server.results import check
from fl_server.run import Run, read_facts
from models.study import Study, parse
from privacy import journal, wire
from privacy.errors import DocumentError, RunUnknown, SitePaused
from privacy.statements import Statement


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.documents.parse", functools.cache(parse))
    monkeypatch.setattr("os.fsync", lambda file: None)


def plan_of(protection: str, rounds: int = 4) -> Study:
    sites = {"sites__[north, south]": f"sites: [{', '.join(FOUR)}]", "quorum__2": "quorum: 3"}
    sites["rounds__2"] = f"rounds: {rounds}"
    return study(**sites, **{"protection: plain": f"protection: {protection}\nnetwork: {{name: linear}}"})


def client(*words: str) -> str:
    done = CliRunner().invoke(fl_client, list(words), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def run_with(federation: Federation, happens: dict[int, Callable[[], object]], folder: Path | None = None) -> Path:
    """A whole run, in which something happens once a round is committed."""
    commit = Run.commit

    def committing(run: Run, *facts: Any) -> None:
        commit(run, *facts)
        happens.get(len(run.history), lambda: None)()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "commit", committing)
        return federation.run(folder=folder)


def contributors(folder: Path) -> list[list[str]]:
    results = json.loads((folder / "results.json").read_text())
    check(results)
    return [entry["contributors"] for entry in results["rounds"]]


@pytest.mark.parametrize(("protection", "what"), [("plain", "site"), ("sealed", "study"), ("masked", "study")])
def test_a_site_that_pauses_is_not_waited_for_and_asked_again_until_it_is_back(
    tmp_path: Path, protection: str, what: str
) -> None:
    federation = Federation(tmp_path, plan_of(protection))
    home, words = federation.hospitals["west"].home, [federation.plan.digest[:12]] if what == "study" else []
    happens = {
        1: lambda: client("pause", *words, "--home", str(home)),
        2: lambda: client("resume", *words, "--home", str(home)),
    }
    folder = run_with(federation, happens)
    others = sorted(set(FOUR) - {"west"})
    # Under masks the round in which it is back is the one in which it gets its keys.
    back = [others, sorted(FOUR)] if protection == "masked" else [sorted(FOUR)] * 2
    assert contributors(folder) == [sorted(FOUR), others, *back]
    missed = [entry.missing for entry in Run.open(folder).history]
    if protection == "masked":
        # The keys of the second sum were there before the pause began.
        assert missed == [{}, {"west": "site-paused"}, {"west": "joining"}, {}]
    else:
        assert missed == [{}, {"west": "site-paused"}, {}, {}]
    number, why = (2, "site-paused and joining") if protection == "masked" else (1, "site-paused")
    assert read_facts(folder)["label"] == f"partial (3 of 4, west missed {number} of 4 rounds: {why})"
    assert Onlooker(folder).look().sites["west"].rounds == 4 - number
    kinds = [entry["kind"] for entry in journal.entries(home / "journal.jsonl")]
    assert kinds.count("paused") == kinds.count("resumed") == 1 and kinds.count("refusal") >= 1


def test_a_pause_of_one_study_leaves_the_others_alone(tmp_path: Path) -> None:
    hospital = Hospital.open(tmp_path, "north", study())
    other = study(rounds__2="rounds: 3")
    hospital.approve(other)
    where = ["--home", str(hospital.home)]
    assert "is paused until `fl-client resume`" in client("pause", hospital.study.digest[:10], *where)
    with pytest.raises(SitePaused, match=hospital.study.digest[:12]):
        hospital.site.admit(hospital.order())
    hospital.site.admit(hospital.order(study=other.digest, run="run-2"))
    # A resume of everything does not end what was said of one study, and says so.
    assert f"The study {hospital.study.digest[:12]} is paused" in client("resume", *where)
    with pytest.raises(SitePaused):
        hospital.site.admit(hospital.order())
    Pause.path(hospital.home, hospital.study.digest).write_text("{damaged")
    with pytest.raises(DocumentError, match="no work for this study"):
        hospital.site.admit(hospital.order())
    Pause(0.0, None).store(hospital.home, hospital.study.digest)
    assert "takes orders again" in client("resume", hospital.study.digest, *where)
    hospital.site.admit(hospital.order())
    assert "is not paused" in client("resume", hospital.study.digest, *where)
    for text in ("", "ff" * 32):
        with pytest.raises(RunUnknown, match="was answered here"):
            client("pause", text, *where)


@pytest.mark.parametrize("protection", ["plain", "masked"])
def test_a_site_that_approves_later_takes_part_from_the_next_sum_on(tmp_path: Path, protection: str) -> None:
    federation = Federation(tmp_path, plan_of(protection))
    with_researcher(federation, federation.home.invite("ada", "researcher").token)
    digest, roster = federation.plan.digest, federation.home.roster
    roster.decide(Statement(digest, "east", "declined", 2), b"")
    others = sorted(set(FOUR) - {"east"})
    folder = Run.create(federation.home.runs, federation.plan, "ada", roster.approvals(digest)).folder
    run_with(federation, {1: lambda: roster.decide(Statement(digest, "east", "approved", 3), b"")}, folder)
    # Under masks it is asked for its keys in the round that begins first.
    without = 2 if protection == "masked" else 1
    assert contributors(folder) == [others] * without + [sorted(FOUR)] * (4 - without)
    missed = [entry.missing for entry in Run.open(folder).history]
    assert missed[:without] == [{"east": "not-consenting"}, {"east": "joining"}][:without]
    why = " and ".join(["not-consenting", "joining"][:without])
    assert read_facts(folder)["label"] == f"partial (3 of 4, east missed {without} of 4 rounds: {why})"
    assert sorted(read_facts(folder)["sites"]) == sorted(FOUR)
    lines = [e["facts"] for e in journal.entries(federation.home.journal.path) if e["kind"] == "sites-joined"]
    assert [(line["sites"], line["round"]) for line in lines] == [(["east"], 2)]
    assert any("east approved since the launch" in note.sentence for note in Onlooker(folder).look().notes)


def test_a_site_whose_key_the_study_does_not_name_is_not_taken_in(tmp_path: Path) -> None:
    """It approves in the roster, but joined anew with another key since the study was signed: no order goes there."""
    federation = Federation(tmp_path, plan_of("plain", rounds=2))
    with_researcher(federation, federation.home.invite("ada", "researcher").token)
    plan = federation.plan
    named = plan.model_copy(update={"roster": plan.roster | {"east": plan.roster["west"]}})
    folder = Run.create(federation.home.runs, named, "ada", ["north", "south", "west"]).folder
    for hospital in federation.hospitals.values():
        hospital.approve(named)
    federation.home.roster.add_study(named, "ada", b"", b"")
    federation.home.roster.decide(Statement(named.digest, "east", "approved", 1), b"")
    grid = federation.grid()
    federation.run(grid, folder)
    assert federation.node("east") not in {message.metadata.dst_node_id for message in grid.sent}
    assert all(wire.decode(message, *wire.ORDERS).study == named.digest for message in grid.sent)
    assert [done.missing for done in Run.open(folder).history] == [{"east": "not-consenting"}] * 2


def test_sites_that_are_paused_below_the_quorum_end_the_run_by_name_and_it_is_carried_on_later(tmp_path: Path) -> None:
    federation = Federation(tmp_path, plan_of("plain", rounds=2))
    homes = [federation.hospitals[name].home for name in ("east", "west")]
    folder = run_with(federation, {1: lambda: [Pause(0.0, None).store(home) for home in homes]})
    assert read_facts(folder)["label"] == "failed after round 1: quorum-lost"
    assert Onlooker(folder).look().failure[1].count("site-paused") == 2
    for home in homes:
        client("resume", "--home", str(home))
    Run.open(folder).requeue()
    federation.run(folder=folder)
    assert read_facts(folder)["label"] == "complete"
