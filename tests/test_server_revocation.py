"""`fl-server revoke`: from that moment nothing of the party is believed, its key never again, and its name can get a new one."""

import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from coordinator import Coordinator, coordinator, study
from typer.testing import CliRunner

from fl_server.cli import app
from privacy import calls, keys
from privacy.errors import CertificateRevoked, InvitationRefused, NotEnrolled, StudyConflict, TrustError


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Coordinator]:
    with coordinator(tmp_path) as demo:
        for name in ("north", "south"):
            demo.join(name)
        demo.join("rosa", "researcher")
        yield demo


def test_a_revoked_party_is_refused_at_its_next_call_in_words(served: Coordinator) -> None:
    with served.caller("north") as caller, served.caller("south") as other:
        caller.offers()
        served.home.revoke("north")
        with pytest.raises(CertificateRevoked, match="revoked on"):
            caller.offers()
        with pytest.raises(CertificateRevoked):
            served.caller("north").offers()
        other.offers()
    assert served.home.roster.admitted_sites().keys() == {"south"}
    assert served.home.roster.revoked_nodes() == {"north": 2**64 - 1}
    served.home.roster.forget_node("north", 2**64 - 1)
    assert served.home.roster.revoked_nodes() == {}


def test_only_the_holder_of_the_key_learns_that_it_was_revoked(served: Coordinator) -> None:
    served.home.revoke("north")
    wrong = keys.load_key(served.keys_of("south") / "site.key")
    with (
        calls.Caller(served.address, served.home.ca_pem, "north", wrong) as stranger,
        pytest.raises(TrustError) as caught,
    ):
        stranger.offers()
    assert not isinstance(caught.value, CertificateRevoked)


def test_a_revoked_key_never_comes_back_and_its_name_gets_a_new_one(served: Coordinator) -> None:
    offered = served.submit(study("north", "south"))
    served.decide("north", offered.digest, "approved", 1)
    served.home.revoke("north")
    line = str(served.home.invite("north", "site"))
    (served.keys_of("north") / "enrolment.json").unlink()
    with pytest.raises(InvitationRefused, match="this key was revoked"):
        calls.join(line, served.keys_of("north"))
    calls.join(line, served.folder / "again" / "keys")
    with calls.Caller.open(served.folder / "again" / "keys") as caller:
        caller.offers()
    party = served.home.roster.party("north")
    assert party.revoked is None
    assert len(served.enrolled) == 3  # a node of its own at Flower, under the new key
    # What the old key approved, the new one did not.
    assert served.home.roster.decisions(offered.digest) == {}
    with pytest.raises(StudyConflict, match="north"):
        served.home.check_keys(offered)
    with served.caller("south") as caller, pytest.raises(TrustError):
        calls.Caller(
            served.address, served.home.ca_pem, "north", keys.load_key(served.keys_of("north") / "site.key")
        ).offers()
        caller.offers()


def test_an_open_invitation_and_a_used_line_end_with_the_revocation(served: Coordinator) -> None:
    line = str(served.home.invite("west", "site"))
    calls.join(line, served.folder / "west" / "keys")
    served.home.revoke("west")
    (served.folder / "west" / "keys" / "enrolment.json").unlink()
    with pytest.raises(CertificateRevoked):
        calls.join(line, served.folder / "west" / "keys")
    assert [each.name for each in served.home.roster.invitations()] == []


def test_revoking_takes_the_approval_and_leaves_the_study_to_the_others(served: Coordinator) -> None:
    offered = served.submit(study("north", "south", quorum=1))
    for name in ("north", "south"):
        served.decide(name, offered.digest, "approved", 1)
    assert served.home.roster.approvals(offered.digest) == ["north", "south"]
    served.home.revoke("north")
    assert served.home.roster.approvals(offered.digest) == ["south"]
    with served.caller("rosa") as caller:
        assert caller.launch(offered.digest) == "run-1"
        with pytest.raises(NotEnrolled, match="north"):
            caller.roster(["north", "south"])


def test_a_researcher_who_is_revoked_while_watching_is_cut_off(served: Coordinator) -> None:
    offered = served.submit(study("north", "south"))
    folder = served.run_folder("run-1", offered.digest)
    (folder / "events.jsonl").write_text('{"event": "started"}\n')
    seen, caught = [], []

    def watch() -> None:
        try:
            with served.caller("rosa") as caller:
                seen.extend(number for number, _ in caller.watch("run-1"))
        except Exception as error:
            caught.append(error)

    thread = threading.Thread(target=watch)
    thread.start()
    time.sleep(0.5)
    served.home.revoke("rosa")
    with (folder / "events.jsonl").open("a") as file:
        file.write('{"event": "round"}\n')
    thread.join(20)
    assert not thread.is_alive()
    assert [type(error) for error in caught] == [CertificateRevoked]


def test_the_command_revokes_once_and_says_so(served: Coordinator) -> None:
    run, where = CliRunner(), ["--home", str(served.home.root)]
    assert run.invoke(app, ["revoke", "north", *where], input="n\n").exit_code == 1
    assert served.home.roster.revoked() == set()
    done = run.invoke(app, ["revoke", "north", "--yes", *where])
    assert done.exit_code == 0
    assert "Runs go on without it" in done.output
    with pytest.raises(TrustError, match="revoked on"):
        run.invoke(app, ["revoke", "north", "--yes", *where], catch_exceptions=False)
    with pytest.raises(NotEnrolled):
        run.invoke(app, ["revoke", "nobody", "--yes", *where], catch_exceptions=False)
    shown = json.loads(run.invoke(app, ["sites", "--json", *where]).output)
    assert [bool(site["revoked"]) for site in shown["sites"]] == [True, False]
    assert "revoked" in run.invoke(app, ["sites", *where]).output
    lines = [json.loads(line) for line in (served.home.root / "journal.jsonl").read_text().splitlines()]
    assert lines[-1]["kind"] == "revoked"
    assert lines[-1]["facts"] == {"party": "north", "role": "site"}
    with sqlite3.connect(served.home.roster.path) as db:
        assert [name for (name,) in db.execute("SELECT name FROM retired_keys")] == ["north"]
