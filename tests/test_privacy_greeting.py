"""Versions on both sides of every connection: who has to upgrade is named, old peers are understood, and nothing but numbers and
enumerated words gets anywhere."""

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from coordinator import Coordinator, coordinator
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from fl_client import enrol, readiness, standing, upkeep
from fl_client.cli import app as client
from fl_client.policy import Pause
from fl_client.upkeep import Upkeep
from fl_server.cli import app as server
from fl_server.gateway import read_head
from fl_server.roster import Roster
from privacy import calls, greeting
from privacy import consortium_pb2 as pb
from privacy.errors import MessageMalformed, VersionSkew
from privacy.greeting import HEADER, NUMBER_MAX, WORDS, Readiness, Versions, own, skew

HERE = own()
NEXT = Versions(HERE.wire, HERE.major, HERE.minor + 1, 0)
BEYOND = Versions(HERE.wire + 1, HERE.major + 1, 0, 0)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coordinator]:
    with coordinator(tmp_path_factory.mktemp("greeting")) as demo:
        enrol.join(str(demo.home.invite("north", "site")), demo.folder / "north")
        demo.join("rosa", "researcher")
        yield demo


@pytest.fixture
def home(served: Coordinator) -> Path:
    return served.keys_of("north").parent


def runs(monkeypatch: pytest.MonkeyPatch, versions: Versions, *where: str) -> None:
    for module in where:
        monkeypatch.setattr(f"{module}.own", lambda: versions)


# Who has to upgrade ----------------------------------------------------------------------------------------------------


def test_this_installation_says_what_it_is() -> None:
    from importlib import metadata

    from privacy import wire

    assert metadata.version("isocenter").startswith(HERE.release) and HERE.wire == wire.VERSION


@pytest.mark.parametrize(
    ("there", "who", "to", "must"),
    [
        (NEXT, "this site", NEXT.release, False),
        (BEYOND, "this site", BEYOND.release, True),
        (Versions(HERE.wire, 0, 0, 9), "the coordinator", HERE.release, False),
        (Versions(HERE.wire - 1, 9, 9, 9), "the coordinator", HERE.release, True),
        (None, "the coordinator", HERE.release, False),
    ],
)
def test_the_earlier_one_upgrades_to_the_later_ones_version(
    there: Versions | None, who: str, to: str, must: bool
) -> None:
    found = skew(HERE, there, "this site", "the coordinator")
    assert found is not None and (found.who, found.to, found.must) == (who, to, must)
    assert f"{who[0].upper()}{who[1:]} has to upgrade to Isocenter {to}." == found.remedy
    assert ("not understood" in found.sentence) == must and (there is None or there.release in found.sentence)
    if there is not None:  # both sides come to the same answer
        other = skew(there, HERE, "the coordinator", "this site")
        assert other is not None and (other.who, other.to, other.must) == (who, to, must)


def test_equal_versions_are_no_skew() -> None:
    assert skew(HERE, Versions(*HERE.numbers), "a", "b") is None


# Hostile and old peers -------------------------------------------------------------------------------------------------

HOSTILE = [
    "",
    "3",
    "3.0.1",
    "3.0.1.0.0",
    "3.0.1.x",
    "3.0.1.-1",
    "3.0.1.00",
    "99999.0.0.0",
    "3.0.1.0 ",
    "٣.0.1.0",
    "3.0.1.0\n",
]


@pytest.mark.parametrize("text", [*HOSTILE, "<img src=x>", "3,0,1,0", "1" * 4000, "Doe^John.0.0.0", "0x3.0.1.0"])
def test_a_header_that_is_no_version_is_not_told(text: str) -> None:
    assert Versions.read(text) is None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, NUMBER_MAX), min_size=4, max_size=4))
def test_headers_and_numbers_are_each_others_inverse(numbers: list[int]) -> None:
    made = Versions(*numbers)
    assert Versions.read(str(made)) == made and Versions.of(*numbers) == (made if numbers[0] else None)


@pytest.mark.parametrize(
    "numbers",
    [
        (0, 0, 0, 0),
        (-1, 0, 1, 0),
        (3, 10_000, 0, 0),
        (True, 0, 1, 0),
        (3.0, 0, 1, 0),
        ("3", 0, 1, 0),
        (3, 0),
        (None,) * 4,
    ],
)
def test_numbers_out_of_range_are_not_told(numbers: tuple[Any, ...]) -> None:
    assert Versions.of(*numbers) is None


def test_the_gateways_head_carries_versions_or_none() -> None:
    def head(*more: bytes) -> Any:
        return read_head(
            b"\r\n".join([b"POST /v1/fleet/receive HTTP/1.1", b"host: x", b"content-length: 3", *more, b"", b""])
        )

    assert head(f"{HEADER}: {NEXT}".encode()).versions == NEXT
    assert head().versions is None and head(f"{HEADER}: evil <b>".encode()).versions is None


def greeted(served: Coordinator, **fields: Any) -> None:
    with served.caller("north") as caller:
        caller._call("Greet", pb.GreetRequest(**fields))


def test_what_a_hostile_site_tells_is_not_kept(served: Coordinator) -> None:
    greeted(served, versions=calls.numbers_of(HERE), readiness=pb.Readiness(ready=True))
    before = served.home.roster.told()["north"]
    assert before.versions == HERE and before.readiness == Readiness(True)
    for numbers in ({"wire": 2**32 - 1}, {"wire": 0, "major": 1}, {"wire": 3, "patch": NUMBER_MAX + 1}):
        greeted(served, versions=pb.Versions(**numbers))
        assert served.home.roster.told()["north"].versions == HERE
    greeted(served, readiness=pb.Readiness(ready=False, reasons=["Doe^John", "labels", "<script>"]))
    assert served.home.roster.told()["north"].readiness == Readiness(False, ("labels", "other"))
    contradictions = [pb.Readiness(ready=True, reasons=["labels"]), pb.Readiness(ready=False)]
    for wrong in [*contradictions, pb.Readiness(ready=False, reasons=["disk"] * 5000)]:
        with pytest.raises(MessageMalformed):
            greeted(served, readiness=wrong)
    assert served.home.roster.told()["north"].readiness == Readiness(False, ("labels", "other"))


def test_a_researcher_has_no_readiness(served: Coordinator) -> None:
    with served.caller("rosa") as caller:
        assert caller.greet(Readiness(True)) == HERE
    assert served.home.roster.told()["rosa"].readiness is None


def test_a_damaged_table_shows_numbers_and_words_only(served: Coordinator, tmp_path: Path) -> None:
    roster = Roster(tmp_path / "r.sqlite")
    db = sqlite3.connect(tmp_path / "r.sqlite")
    db.execute("INSERT INTO told VALUES ('north', 'x', 1, 1, 1, 'now', 1, 'Doe^John labels', 'now')")
    db.commit()
    db.close()
    told = roster.told()["north"]
    assert told.versions is None and told.readiness == Readiness(False, ("labels", "other"))


def test_a_coordinator_that_does_not_know_the_call_is_the_one_to_upgrade(
    served: Coordinator, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unknown(grpc.RpcError):
        code = staticmethod(lambda: grpc.StatusCode.UNIMPLEMENTED)
        details = staticmethod(lambda: "Method not found!")

    def fails(*_: Any, **__: Any) -> Any:
        raise Unknown

    said: list[str] = []
    kept = Upkeep(home, said.append)
    stub = calls._generated.ConsortiumStub
    monkeypatch.setattr(
        calls._generated, "ConsortiumStub", lambda channel: SimpleNamespace(**(vars(stub(channel)) | {"Greet": fails}))
    )
    for _ in range(2):  # people hear of it once, and the rest of upkeep goes on
        kept.once()
    assert [line for line in said if "has to upgrade" in line] == [
        f"The coordinator runs an Isocenter that tells no version yet, this site {HERE.release}. "
        f"The coordinator has to upgrade to Isocenter {HERE.release}."
    ]


def test_enrolment_of_an_old_peer_tells_nothing_and_is_understood(served: Coordinator) -> None:
    assert calls.versions_in(pb.EnrolRequest()) is None and calls.versions_in(pb.RenewReply()) is None
    old = pb.EnrolRequest.FromString(pb.EnrolRequest(name="a", versions=calls.numbers_of(HERE)).SerializeToString())
    assert old.name == "a" and calls.versions_in(old) == HERE
    assert "north" in served.home.roster.told()  # by its request to join


# Both screens ----------------------------------------------------------------------------------------------------------


def finding(home: Path) -> dict[str, Any]:
    document = json.loads(CliRunner().invoke(client, ["check", "--json", "--home", str(home)]).output)
    [found] = [each for each in document["findings"] if each["subject"] == "versions"]
    return dict(found)


def test_check_says_who_has_to_upgrade(served: Coordinator, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "so does the coordinator" in finding(home)["sentence"]
    runs(monkeypatch, NEXT, "fl_server.consortium")
    found = finding(home)
    assert (
        found["good"]
        and found["look"]
        and f"This site has to upgrade to Isocenter {NEXT.release}." in found["sentence"]
    )
    runs(monkeypatch, BEYOND, "fl_server.consortium")
    found = finding(home)
    assert not found["good"] and f"This site has to upgrade to Isocenter {BEYOND.release}." in found["sentence"]


def test_the_coordinator_says_who_has_to_upgrade(
    served: Coordinator, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs(monkeypatch, BEYOND, "privacy.calls")
    assert enrol.greet(home) == HERE
    where = ["--home", str(served.home.root)]
    monkeypatch.setenv("COLUMNS", "140")
    shown = CliRunner().invoke(server, ["sites", *where]).output
    assert f"This coordinator has to upgrade to Isocenter {BEYOND.release}." in shown
    document = json.loads(CliRunner().invoke(server, ["sites", "--json", *where]).output)
    [north] = document["sites"]
    assert document["isocenter"] == {"version": HERE.release, "wire": HERE.wire}
    assert north["isocenter"] == {"version": BEYOND.release, "wire": BEYOND.wire}
    assert north["skew"] == {"upgrade": "this coordinator", "to": BEYOND.release, "must": True}


# Readiness -------------------------------------------------------------------------------------------------------------


def test_a_node_tells_words_and_writes_them_down_before(served: Coordinator, home: Path) -> None:
    (home / "state" / "readiness.json").unlink(missing_ok=True)
    kept = Upkeep(home, lambda sentence: None)
    kept.once()
    assert served.home.roster.told()["north"].readiness == Readiness(False, ("unchecked",))
    CliRunner().invoke(client, ["check", "--home", str(home)])
    kept._looked_s -= upkeep.READY_S
    kept.once()
    told = served.home.roster.told()["north"]
    assert told.readiness is not None and {"images", "labels"} <= set(told.readiness.reasons) and told.versions == HERE
    lines = [json.loads(line) for line in (home / "journal.jsonl").read_text().splitlines()]
    facts = [each["facts"] for each in lines if each["kind"] == "readiness"]
    assert facts[-2:] == [{"ready": 0, "reasons": ["unchecked"]}, {"ready": 0, "reasons": list(told.readiness.reasons)}]
    shown = json.loads(CliRunner().invoke(client, ["egress", "--json", "--home", str(home)]).output)
    assert "word that this site is not ready: unchecked" in [row["words"] for row in shown["left"]]
    kept._looked_s -= upkeep.READY_S
    kept.once()  # nothing new: told again, and no further line
    assert (home / "journal.jsonl").read_text().count('"kind":"readiness"') == len(facts)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"version": 9, "not_good": []}', '{"version": 1, "not_good": 3}', "[" * 4000]
)
def test_a_damaged_record_of_a_check_is_as_good_as_none(home: Path, content: str) -> None:
    (home / "state").mkdir(exist_ok=True)
    (home / "state" / "readiness.json").write_text(content)
    assert "unchecked" in standing.told(home).reasons
    (home / "state" / "readiness.json").write_text('{"version": 1, "not_good": ["Doe^John", "labels"]}')
    assert "labels" in standing.told(home).reasons and "other" not in standing.told(home).reasons


def test_a_pause_is_a_reason(home: Path) -> None:
    Pause(0.0, None).store(home)
    try:
        assert "paused" in standing.told(home).reasons
    finally:
        Pause.path(home).unlink()


def test_every_subject_of_a_node_has_its_word() -> None:
    subjects = {subject for subject, _ in readiness._LOOKS}
    assert set(standing.CHECKED) <= subjects and {*standing.CHECKED, *standing._LOOKS, "unchecked", "other"} == set(
        WORDS
    )
    assert greeting.Readiness.of(["x", "paused", "images"]) == Readiness(False, ("images", "paused", "other"))


# Orders and reports of another wire version ------------------------------------------------------------------------------


def test_an_order_of_another_wire_version_is_refused_by_name_at_both_ends(tmp_path: Path) -> None:
    """The node answers before it looks at anything else of the order, and the coordinator names the reason."""
    from flwr.app import ConfigRecord, RecordDict
    from hospital import Hospital
    from test_client_node import message

    from fl_client import node
    from fl_server.rounds import flower_reason
    from privacy import wire

    hospital = Hospital.open(tmp_path)
    never = SimpleNamespace(carry_out=lambda *_: pytest.fail("worked on an order that it cannot read"))
    facts = dict(hospital.order().to_records()[wire.RECORD])
    for version, kind in ((HERE.wire + 1, "train"), (HERE.wire + 1, "a-kind-of-its-own"), (HERE.wire - 1, "train")):
        records = RecordDict({wire.RECORD: ConfigRecord({**facts, "version": version, "kind": kind})})
        reply = node.answer(message(records), hospital.site, never)  # type: ignore[arg-type]
        assert reply.has_error() and reply.error.reason == VersionSkew.code
        assert flower_reason(reply.error) == node._outcome(reply) == VersionSkew.code
        assert "`fl-client check`" in node._sentence(reply, 0.0)
    lines = (hospital.home / "journal.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["facts"] == {"code": VersionSkew.code}


def test_a_report_of_another_wire_version_is_missing_for_that_reason() -> None:
    from flwr.app import ConfigRecord, Message, RecordDict
    from flwr.supercore.task_identity import TaskIdentity

    from fl_server.rounds import Gathering
    from privacy import wire

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    records = RecordDict({wire.RECORD: ConfigRecord({"version": HERE.wire - 1, "kind": "train-report"})})
    gathering = Gathering(None, {}, 1.0, lambda *_, **__: None)  # type: ignore[arg-type]
    assert gathering._accept("north", Message(records, dst_node_id=1, message_type="train")) is None
    assert gathering.missing == {"north": VersionSkew.code}
    for version in (True, "3", 2**40, -1, 0, None):
        with pytest.raises(MessageMalformed) as caught:
            wire.require_spoken(version)
        assert not isinstance(caught.value, VersionSkew)


def test_what_was_told_under_a_key_that_is_gone_counts_no_more(served: Coordinator) -> None:
    served.join("brief")
    served.home.roster.tell("brief", BEYOND, Readiness(True))
    served.home.revoke("brief")
    calls.join(str(served.home.invite("brief", "site")), served.folder / "brief-again" / "keys")
    told = served.home.roster.told()["brief"]
    assert told.versions == HERE and told.readiness is None
