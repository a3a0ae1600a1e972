"""A site that withdraws or is revoked in the middle of a run: from the next sum on it gets no order, and the run goes on."""

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from federation import Federation
from hospital import study
from typer.testing import CliRunner

from fl_client.consent import Consent
from fl_server.cli import app
from fl_server.run import Run, read_facts
from models.study import parse
from privacy.errors import StudyNotApproved
from privacy.journal import verify
from privacy.statements import Statement
from privacy.wire import ORDERS, Refusal, decode

FOUR = ["north", "south", "east", "west"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.documents.parse", functools.cache(parse))
    monkeypatch.setattr("os.fsync", lambda file: None)


def federation(folder: Path, protection: str) -> Federation:
    sites = {"sites__[north, south]": f"sites: [{', '.join(FOUR)}]", "quorum__2": "quorum: 3", "rounds__2": "rounds: 3"}
    found = Federation(folder, study(**sites, protection__plain=f"protection: {protection}"))
    line = found.home.invite("ada", "researcher")
    with_researcher(found, line.token)
    return found


def with_researcher(found: Federation, token: str) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec

    from fl_server import authority
    from privacy import keys

    key = ec.generate_private_key(ec.SECP256R1())
    authority.enrol(found.home, token, "ada", "researcher", keys.make_csr(key, "ada"))
    found.home.roster.add_study(found.plan, "ada", b"", b"")
    for name in FOUR:
        found.home.roster.decide(Statement(found.plan.digest, name, "approved", 1), b"")


def run_with(
    found: Federation, monkeypatch: pytest.MonkeyPatch, after_first: Callable[[], None]
) -> tuple[Path, list[int]]:
    """A whole run, with something that happens once the first round is committed; and to whom orders went afterwards."""
    commit, grid, sent_before = Run.commit, found.grid(), []

    def committing(run: Run, *facts: object) -> None:
        commit(run, *facts)  # type: ignore[arg-type]
        if len(run.history) == 1:
            after_first()
            sent_before.append(len(grid.sent))

    monkeypatch.setattr(Run, "commit", committing)
    folder = found.run(grid)
    later = [message for message in grid.sent[sent_before[0] :] if message.metadata.message_type]
    assert all(decode(message, *ORDERS) for message in later)
    return folder, [message.metadata.dst_node_id for message in later]


@pytest.mark.parametrize("protection", ["masked", "plain"])
def test_a_revoked_site_gets_no_further_order_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protection: str
) -> None:
    found = federation(tmp_path, protection)

    def revoke() -> None:
        done = CliRunner().invoke(app, ["revoke", "west", "--yes", "--home", str(found.home.root)])
        assert done.exit_code == 0, done.output

    folder, asked = run_with(found, monkeypatch, revoke)
    assert found.node("west") not in asked
    assert {found.node(name) for name in FOUR[:3]} == set(asked)
    results = json.loads((folder / "results.json").read_text())
    assert [entry["contributors"] for entry in results["rounds"]] == [sorted(FOUR)] + [sorted(FOUR[:3])] * 2
    assert [entry["missing"] for entry in results["rounds"]][1:] == [{"west": "certificate-revoked"}] * 2
    assert results["test"]["sites"] == sorted(FOUR[:3])
    assert read_facts(folder)["state"] == "partial"
    assert "west" in read_facts(folder)["label"]


@pytest.mark.parametrize("protection", ["masked", "plain"])
def test_a_site_that_withdraws_gets_no_further_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protection: str
) -> None:
    found = federation(tmp_path, protection)
    decline = Statement(found.plan.digest, "east", "declined", 2)
    folder, asked = run_with(found, monkeypatch, lambda: bool(found.home.roster.decide(decline, b"")) or None)
    assert found.node("east") not in asked
    results = json.loads((folder / "results.json").read_text())
    assert [entry["missing"] for entry in results["rounds"]][1:] == [{"east": "not-consenting"}] * 2


def withdraw(found: Federation, name: str) -> None:
    """What `fl-client decline` leaves at the site."""
    home = found.hospitals[name].home
    consent = Consent.open(home, found.plan.digest)
    assert consent is not None
    replace(consent, statement=replace(consent.statement, decision="declined")).store(home)


def test_a_site_that_withdrew_refuses_what_a_coordinator_sends_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coordinator that sends on is hostile or has not heard of it: the site's own record decides."""
    found = federation(tmp_path, "plain")
    folder, asked = run_with(found, monkeypatch, lambda: withdraw(found, "east"))
    assert found.node("east") in asked
    results = json.loads((folder / "results.json").read_text())
    assert [entry["missing"] for entry in results["rounds"]][1:] == [{"east": StudyNotApproved.code}] * 2
    lines = (found.hospitals["east"].home / "journal.jsonl").read_text().splitlines()
    assert f'"code":"{StudyNotApproved.code}"' in lines[-1] and f'"kind":"{Refusal.kind}"' in lines[-1]


def test_a_run_that_loses_its_quorum_to_revocations_stops_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fl_server.sums.timeout_of", lambda study: 1.0)
    found = federation(tmp_path, "masked")

    def revoke() -> None:
        found.home.revoke("west")
        found.home.revoke("east")

    folder, _ = run_with(found, monkeypatch, revoke)
    assert read_facts(folder)["state"] == "failed"
    assert len(Run.open(folder).history) == 1  # what was committed stays


def test_the_coordinators_journal_has_every_order_and_everyone_who_did_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = federation(tmp_path, "masked")
    grid = found.grid()
    grid.errors = {found.node("west"): 1}
    folder = found.run(grid)
    path = found.home.root / "journal.jsonl"
    assert verify(path) > 0
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    of_run = [line for line in lines if line["facts"].get("run") == folder.name]
    sent = [line["facts"] for line in of_run if line["kind"] == "orders-sent"]
    assert sum(len(facts["sites"]) for facts in sent) == len(grid.sent)  # one name for each order on the wire
    missing = [line["facts"] for line in of_run if line["kind"] == "site-missing"]
    assert {facts["site"] for facts in missing} == {"west"}
    assert of_run[-1]["kind"] == "run-ended"
    assert of_run[-1]["facts"]["state"] == "partial"
