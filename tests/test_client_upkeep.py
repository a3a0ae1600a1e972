"""What a node does beside orders: it notices a certificate however it came, and a coordinator that is away costs no lines."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from certificates import age
from coordinator import Coordinator, coordinator, study

from fl_client import enrol, upkeep
from fl_client.consent import Consent
from fl_client.upkeep import Upkeep
from privacy.errors import IsocenterError, Unreachable
from privacy.journal import Journal


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Coordinator]:
    with coordinator(tmp_path) as demo:
        enrol.join(str(demo.home.invite("north", "site")), tmp_path / "north")
        demo.join("rosa", "researcher")
        yield demo


@pytest.fixture
def home(served: Coordinator) -> Path:
    return served.keys_of("north").parent


def kinds(home: Path) -> list[str]:
    return [json.loads(line)["kind"] for line in (home / "journal.jsonl").read_text().splitlines()]


def test_a_certificate_is_renewed_and_the_node_told_once(served: Coordinator, home: Path) -> None:
    age(served, "north", begun_days=21, left_days=9)
    kept = Upkeep(home, lambda sentence: None)
    kept.once()
    assert kept.renewed.is_set()
    kept.renewed.clear()
    kept.once()
    assert not kept.renewed.is_set()
    assert kinds(home).count("renewed") == 1


def test_a_good_certificate_is_not_called_renewed_at_each_start(served: Coordinator, home: Path) -> None:
    for _ in range(2):
        kept = Upkeep(home, lambda sentence: None)
        kept.once()
        assert not kept.renewed.is_set()
    assert "renewed" not in kinds(home)


def test_one_that_somebody_elses_command_renewed_is_noticed_too(served: Coordinator, home: Path) -> None:
    """Or the node would go on with the old one until it ends, and then stop."""
    age(served, "north", begun_days=21, left_days=9)
    kept = Upkeep(home, lambda sentence: None)
    enrol.fetch_offers(home)  # what `fl-client studies` does
    kept.once()
    assert kept.renewed.is_set()


def test_heads_are_exchanged_while_the_journal_grows_and_tries_are_no_faster(
    served: Coordinator, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(100, 100_000, 1000))
    monkeypatch.setattr(upkeep.time, "monotonic", lambda: float(next(clock)))
    kept = Upkeep(home, lambda sentence: None)
    for _ in range(3):  # nothing but the exchange itself happens, which is a line of its own
        kept.once()
    assert kinds(home).count("head-signed") == 1
    Journal(home / "journal.jsonl").append("settings", digest="0" * 64)
    kept.once()
    assert kinds(home).count("head-signed") == kinds(home).count("head-witnessed") == 2


@pytest.mark.parametrize("failure", [Unreachable("away"), IsocenterError("contradicted")])
def test_a_coordinator_that_does_not_answer_costs_no_line_a_minute(
    served: Coordinator, home: Path, monkeypatch: pytest.MonkeyPatch, failure: IsocenterError
) -> None:
    def fails(*_: Any) -> Any:
        raise failure

    monkeypatch.setattr("privacy.calls.Caller.witness", fails)
    kept = Upkeep(home, lambda sentence: None)
    with pytest.raises(IsocenterError):
        kept.once()
    for _ in range(10):  # minutes
        kept.once()
    assert kinds(home).count("head-signed") == 1


def test_a_decision_made_while_an_older_one_is_sent_is_still_sent(
    served: Coordinator, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered = served.submit(study("north", quorum=1))
    offer = enrol.find_offer(home, offered.digest)
    monkeypatch.setattr("privacy.calls.Caller.decide", _away)
    with pytest.raises(Unreachable):
        enrol.decide(home, offer, "approved")
    monkeypatch.undo()
    decide = enrol.calls.Caller.decide

    def meanwhile(self: Any, body: bytes, signature: bytes) -> None:
        decide(self, body, signature)
        monkeypatch.setattr("privacy.calls.Caller.decide", _away)
        with pytest.raises(Unreachable):
            enrol.decide(home, offer, "declined")

    monkeypatch.setattr("privacy.calls.Caller.decide", meanwhile)
    kept = Upkeep(home, lambda sentence: None)
    kept.once()
    monkeypatch.undo()
    assert served.home.roster.decisions(offered.digest) == {"north": "approved"}
    kept.once()
    assert served.home.roster.decisions(offered.digest) == {"north": "declined"}


def _away(*_: Any) -> None:
    raise Unreachable("away")


def test_a_damaged_decision_does_not_keep_the_others_from_being_sent(served: Coordinator, home: Path) -> None:
    offered = served.submit(study("north", quorum=1))
    enrol.decide(home, enrol.find_offer(home, offered.digest), "approved")
    (home / "studies" / f"{offered.digest}.unsent").touch()
    (home / "studies" / f"{'0' * 64}.unsent").touch()
    (home / "studies" / f"{'0' * 64}.json").write_text("{")
    Upkeep(home, lambda sentence: None).once()
    assert [path.stem for path in (home / "studies").glob("*.unsent")] == ["0" * 64]
    assert Consent.open(home, offered.digest) is not None
