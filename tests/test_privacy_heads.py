"""Signed and witnessed heads: whatever is done to a journal afterwards is found, and the line is named."""

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from coordinator import Coordinator, coordinator
from cryptography.hazmat.primitives.asymmetric import ec
from typer.testing import CliRunner

from fl_client.cli import app as client
from fl_server.cli import app as server
from privacy import consortium_pb2 as pb
from privacy import heads, keys
from privacy.errors import HeadContradicted, IsocenterError, JournalDamaged, MessageMalformed, SignatureInvalid
from privacy.heads import SignedHead, held_of, own_head, witness
from privacy.journal import Journal, _hash
from privacy.journal import verify as chain

SITE, COORDINATOR = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
OWN, THEIRS = [SITE.public_key()], {"coordinator": [COORDINATOR.public_key()]}


def written(path: Path, lines: int) -> Journal:
    journal = Journal(path)
    for number in range(lines):
        journal.append("train-report", study=f"{number:064x}", round=number + 1)
    return journal


def check(path: Path, held: list[SignedHead] | None = None) -> heads.Verified:
    return heads.verify(path, "north", OWN, THEIRS, held or [])


def rewritten(path: Path, change: Callable[[list[dict[str, object]]], list[dict[str, object]]]) -> None:
    """What somebody with the machine can do: change lines, then number and hash the whole chain anew."""
    entries, previous = change([json.loads(line) for line in path.read_text().splitlines()]), "0" * 64
    with path.open("w") as file:
        for number, entry in enumerate(entries, start=1):
            made = {
                "n": number,
                "time": entry["time"],
                "kind": entry["kind"],
                "facts": entry["facts"],
                "previous": previous,
            }
            previous = _hash(made)
            file.write(json.dumps({**made, "hash": previous}, separators=(",", ":")) + "\n")


def named(error: pytest.ExceptionInfo[IsocenterError]) -> int:
    found = re.search(r"line (\d+)", str(error.value))
    assert found is not None, error.value
    return int(found[1])


def test_both_sides_hold_each_others_heads_and_both_journals_verify(tmp_path: Path) -> None:
    mine, theirs = written(tmp_path / "site.jsonl", 3), written(tmp_path / "coordinator.jsonl", 2)
    head = own_head(mine, "north", SITE)
    witness(theirs, SignedHead.read(head.to_bytes()), OWN)
    witness(mine, own_head(theirs, "coordinator", COORDINATOR), THEIRS["coordinator"])
    assert (head.lines, head.head) == (3, json.loads((tmp_path / "site.jsonl").read_text().splitlines()[2])["hash"])
    found = check(mine.path, list(held_of(theirs.path, "north")))
    assert (found.lines, found.signed, found.witnessed, found.confirmed, found.confirmed_to) == (5, 1, 1, 1, 3)
    other = heads.verify(theirs.path, "coordinator", THEIRS["coordinator"], {"north": OWN})
    assert (other.lines, other.signed, other.witnessed) == (4, 1, 1)


@pytest.mark.parametrize("seed", range(20))
def test_any_rewriting_of_a_witnessed_line_is_found_though_the_chain_is_whole(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    journal = written(tmp_path / "site.jsonl", 8)
    head = own_head(journal, "north", SITE)
    for number in range(3):
        journal.append("evaluate-report", round=number)
    place = draw.randrange(7)  # a copy of the last line behind it changes nothing that was witnessed

    def change(entries: list[dict[str, object]]) -> list[dict[str, object]]:
        kept = [entry for entry in entries if entry["kind"] != "head-signed"]
        what = seed % 4
        if what == 0:
            kept[place] = {**kept[place], "facts": {"round": 99}}
        elif what == 1:
            del kept[place]
        elif what == 2:
            kept[place], kept[(place + 1) % 8] = kept[(place + 1) % 8], kept[place]
        else:
            kept.insert(place, kept[place])
        return kept

    rewritten(journal.path, change)
    chain(journal.path)  # its own hashes see nothing
    with pytest.raises(JournalDamaged) as caught:
        check(journal.path, [head])
    assert named(caught) == 8  # the line up to which the other side vouches
    assert "witnessed by the other side" in str(caught.value)


@pytest.mark.parametrize("left", range(8))
def test_a_journal_cut_off_before_a_witnessed_line_is_found_wherever_it_ends(tmp_path: Path, left: int) -> None:
    journal = written(tmp_path / "site.jsonl", 8)
    head = own_head(journal, "north", SITE)
    lines = journal.path.read_text().splitlines(keepends=True)
    journal.path.write_text("".join(lines[:left]))
    with pytest.raises(JournalDamaged, match="cut off here") as caught:
        check(journal.path, [head])
    assert named(caught) == left + 1


def test_a_signed_line_in_a_rewritten_chain_gives_it_away_without_a_witness(tmp_path: Path) -> None:
    journal = written(tmp_path / "site.jsonl", 4)
    own_head(journal, "north", SITE)
    rewritten(journal.path, lambda entries: [{**entries[0], "facts": {"round": 7}}, *entries[1:]])
    with pytest.raises(JournalDamaged, match="signed in this journal"):
        check(journal.path)


def test_a_head_signed_by_nobody_of_them_is_named_by_its_line(tmp_path: Path) -> None:
    stranger = ec.generate_private_key(ec.SECP256R1())
    journal = written(tmp_path / "site.jsonl", 2)
    own_head(journal, "north", stranger)
    with pytest.raises(SignatureInvalid, match="line 3"):
        check(journal.path)
    other = written(tmp_path / "other.jsonl", 1)
    forged = own_head(written(tmp_path / "forged.jsonl", 1), "coordinator", stranger)
    with pytest.raises(SignatureInvalid):
        witness(other, forged, THEIRS["coordinator"])
    assert chain(other.path) == 1
    moved = SignedHead("south", forged.lines, forged.head, forged.time_s, forged.signature)
    with pytest.raises(SignatureInvalid):
        moved.verify([stranger.public_key()])


def test_a_head_that_goes_back_or_aside_is_written_down_and_refused(tmp_path: Path) -> None:
    journal, theirs = written(tmp_path / "site.jsonl", 5), Journal(tmp_path / "coordinator.jsonl")
    witness(theirs, own_head(journal, "north", SITE), OWN)
    witness(theirs, own_head(journal, "north", SITE), OWN)
    older = own_head(written(tmp_path / "backup.jsonl", 3), "north", SITE)
    same = written(tmp_path / "aside.jsonl", 6)
    rewritten(same.path, lambda entries: [{**entries[0], "facts": {"round": 7}}, *entries[1:]])
    for wrong in (older, own_head(same, "north", SITE)):
        with pytest.raises(HeadContradicted, match="rewritten or cut off"):
            witness(theirs, wrong, OWN)
    kinds = [json.loads(line)["kind"] for line in theirs.path.read_text().splitlines()]
    assert kinds == ["head-witnessed"] * 2 + ["head-contradicted"] * 2
    # The proof stays in the witness's journal, with the signature of whoever rewrote.
    with pytest.raises(JournalDamaged):
        check(journal.path, list(held_of(theirs.path, "north")))
    other = own_head(written(tmp_path / "south.jsonl", 1), "south", COORDINATOR)
    witness(theirs, other, [COORDINATOR.public_key()])  # another party's heads are compared with its own


@pytest.mark.parametrize(
    "change",
    [
        {"lines": -1}, {"lines": True}, {"lines": 1.5}, {"lines": 2**60}, {"head": "0" * 63}, {"head": "Z" * 64},
        {"party": "../x"}, {"party": 5}, {"time_s": -5}, {"time_s": None}, {"signature": "00"}, {"signature": "z" * 128},
        {"more": 1},
    ],
)  # fmt: skip
def test_what_is_no_head_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    found = json.loads(own_head(written(tmp_path / "site.jsonl", 1), "north", SITE).to_bytes())
    with pytest.raises(MessageMalformed):
        SignedHead.read(json.dumps(found | change, sort_keys=True, separators=(",", ":")).encode())
    for garbage in (b"", b"null", b"[" * 5000, b"\xff", json.dumps(found).encode(), b"1" * 10_000):
        with pytest.raises(MessageMalformed):
            SignedHead.read(garbage)


# Over the wire, and as commands


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Coordinator]:
    with coordinator(tmp_path) as demo:
        for name in ("north", "south"):
            demo.join(name)
            Journal(demo.keys_of(name).parent / "journal.jsonl").append("joined", site=name)
        yield demo


def exchange(served: Coordinator, name: str) -> None:
    journal = Journal(served.keys_of(name).parent / "journal.jsonl")
    with served.caller(name) as caller:
        theirs = caller.witness(own_head(journal, name, keys.load_key(served.keys_of(name) / "site.key")))
    witness(journal, theirs, [keys.load_public((served.keys_of(name) / "coordinator.pem").read_bytes())])


def test_sites_and_coordinator_exchange_heads_and_the_commands_verify_them(served: Coordinator) -> None:
    run, home = CliRunner(), served.keys_of("north").parent
    for name in ("north", "south", "north"):
        exchange(served, name)
    theirs = served.home.root / "journal.jsonl"
    shown = run.invoke(client, ["journal", "verify", "--home", str(home), "--witness", str(theirs)])
    assert shown.exit_code == 0, shown.output
    assert "other side holds: 2, and this journal agrees" in shown.output
    alone = run.invoke(client, ["journal", "verify", "--home", str(home)])
    assert "compare with the other side's journal" in " ".join(alone.output.split())
    document = json.loads(run.invoke(server, ["journal", "verify", "--json", "--home", str(served.home.root)]).output)
    assert (document["whole"], document["signed"], document["witnessed"]) == (True, 3, 3)
    listed = run.invoke(client, ["journal", "show", "--home", str(home), "--kind", "head-witnessed", "--json"])
    assert [line["facts"]["party"] for line in json.loads(listed.output)["lines"]] == ["coordinator"] * 2
    text = (home / "journal.jsonl").read_text()
    (home / "journal.jsonl").write_text(text.replace('"joined"', '"jolned"'))
    with pytest.raises(JournalDamaged, match="line 1: was changed"):
        run.invoke(client, ["journal", "verify", "--home", str(home)], catch_exceptions=False)
    noted = json.loads(text.splitlines()[1])["hash"]
    (home / "journal.jsonl").write_text(text)
    assert run.invoke(client, ["journal", "verify", "--home", str(home), "--head", noted]).exit_code == 0
    with pytest.raises(JournalDamaged, match="not in the chain"):
        run.invoke(client, ["journal", "verify", "--home", str(home), "--head", "a" * 64], catch_exceptions=False)


def test_a_key_that_was_revoked_still_proves_what_it_signed(served: Coordinator) -> None:
    exchange(served, "north")
    served.home.revoke("north")
    run = CliRunner()
    assert run.invoke(server, ["journal", "verify", "--home", str(served.home.root)]).exit_code == 0


def test_a_site_shows_its_own_head_only_and_a_rewritten_one_is_refused_by_name(served: Coordinator) -> None:
    key = keys.load_key(served.keys_of("north") / "site.key")
    journal = Journal(served.keys_of("north").parent / "journal.jsonl")
    foreign = own_head(Journal(served.folder / "x.jsonl"), "south", key)
    with served.caller("north") as caller:
        with pytest.raises(SignatureInvalid, match="own journal only"):
            caller.witness(foreign)
        for garbage in (b"", b"{}", b"\xff" * 2000):
            with pytest.raises(MessageMalformed):
                caller._call("Witness", pb.WitnessRequest(head=garbage))
        caller.witness(own_head(journal, "north", key))
        journal.path.unlink()
        with pytest.raises(HeadContradicted):
            caller.witness(own_head(Journal(journal.path), "north", key))


def test_after_joining_anew_the_earlier_key_is_given_and_the_whole_journal_verifies(served: Coordinator) -> None:
    """The ledger and the journal of a site stay where they are when it gets a new key."""
    exchange(served, "north")
    served.home.revoke("north")
    home = served.keys_of("north").parent
    served.keys_of("north").rename(home / "keys-before")
    served.join("north")
    exchange(served, "north")
    run = CliRunner()
    with pytest.raises(SignatureInvalid):
        run.invoke(client, ["journal", "verify", "--home", str(home)], catch_exceptions=False)
    earlier = ["--key", str(home / "keys-before" / "site.pem"), "--witness", str(served.home.root / "journal.jsonl")]
    shown = run.invoke(client, ["journal", "verify", "--home", str(home), *earlier])
    assert shown.exit_code == 0, shown.output
    assert "other side holds: 2, and this journal agrees" in shown.output
