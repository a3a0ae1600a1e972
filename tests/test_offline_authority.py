"""The authority's key on another machine: requests out, certificates in, carried by hand and held against each other."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from certificates import age, certificate, held
from coordinator import Coordinator, coordinator
from cryptography.hazmat.primitives.asymmetric import ec
from typer.testing import CliRunner

from fl_server import authority
from fl_server.cli import app
from fl_server.roster import Home
from privacy import calls, keys
from privacy.errors import (
    AwaitingSignature,
    DocumentError,
    InvitationRefused,
    KeyFileUnsafe,
    NotEnrolled,
    SignatureInvalid,
    TrustError,
)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Coordinator]:
    """South was enrolled before the key went away, north was not."""
    with coordinator(tmp_path) as demo:
        demo.join("south")
        authority.move(demo.home, tmp_path / "stick")
        yield demo


@pytest.fixture
def stick(served: Coordinator) -> Path:
    return served.folder / "stick"


def carry(served: Coordinator, stick: Path) -> tuple[list[str], dict[str, str]]:
    """List, sign and accept, as three people with a USB stick do."""
    wanted = authority.read_list(authority.signing_list(served.home), stick)
    parties, refused = authority.accept(served.home, authority.sign(wanted, stick))
    return [party.name for party in parties], refused


def test_the_key_is_moved_and_nothing_of_it_is_left(served: Coordinator, stick: Path) -> None:
    assert not (served.home.root / "keys" / "ca.key").exists()
    assert sorted(path.name for path in stick.iterdir()) == ["ca.key", "ca.pem", "coordinator.pem"]
    assert (stick / "ca.key").stat().st_mode & 0o077 == 0
    moved = keys.load_key(stick / "ca.key").public_key()
    assert moved == keys.public_key_of(keys.load_certificate(served.home.ca_pem))
    secret = (stick / "ca.key").read_bytes()
    assert not any(secret in path.read_bytes() for path in served.home.root.rglob("*") if path.is_file())
    assert Home.open(served.home.root).ca_fingerprint == served.home.ca_fingerprint
    with pytest.raises(NotEnrolled):
        authority.move(served.home, served.folder / "second")


def test_a_folder_with_content_is_not_written_to(tmp_path: Path) -> None:
    with coordinator(tmp_path) as demo:
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "ca.key").write_text("something else")
        with pytest.raises(KeyFileUnsafe, match="not empty"):
            authority.move(demo.home, tmp_path / "full")
        assert (demo.home.root / "keys" / "ca.key").exists()


def test_joining_waits_for_the_signature_and_is_finished_by_the_same_line(served: Coordinator, stick: Path) -> None:
    line = str(served.home.invite("north", "site"))
    for _ in range(2):
        with pytest.raises(AwaitingSignature, match="offline"):
            calls.join(line, served.keys_of("north"))
    key = (served.keys_of("north") / "site.key").read_bytes()
    assert [request.name for request in authority.waiting(served.home)] == ["north"]
    assert carry(served, stick) == (["north"], {})
    assert authority.waiting(served.home) == []
    calls.join(line, served.keys_of("north"))
    assert (served.keys_of("north") / "site.key").read_bytes() == key
    with served.caller("north") as caller:
        caller.offers()
    assert [name for name, _, _ in served.enrolled] == [
        "south",
        "north",
    ]  # Flower learns of a node when it has a certificate
    with pytest.raises(InvitationRefused, match="with another key"):
        calls.join(line, served.folder / "thief" / "keys")


def test_a_renewal_waits_while_the_old_certificate_still_serves(served: Coordinator, stick: Path) -> None:
    old = aged(served, stick)
    with served.caller("south") as caller:
        caller.offers()
    assert held(served, "south") == old
    assert [request.name for request in authority.waiting(served.home)] == ["south"]
    served.caller("south").close()
    assert len(authority.waiting(served.home)) == 1
    carry(served, stick)
    served.caller("south").close()
    assert held(served, "south").not_valid_after_utc > old.not_valid_after_utc
    assert len(served.enrolled) == 1


def aged(served: Coordinator, stick: Path) -> object:
    (served.home.root / "keys" / "ca.key").write_bytes((stick / "ca.key").read_bytes())
    (served.home.root / "keys" / "ca.key").chmod(0o600)
    old = age(served, "south", begun_days=25, left_days=5)
    (served.home.root / "keys" / "ca.key").unlink()
    return old


def test_a_list_of_anybody_else_is_not_signed(served: Coordinator, stick: Path) -> None:
    with pytest.raises(AwaitingSignature):
        served.join("north")
    genuine = json.loads(authority.signing_list(served.home))
    swapped = json.dumps(genuine | {"requests": genuine["requests"].replace("north", "evil2")}).encode()
    longer = json.dumps(genuine | {"requests": genuine["requests"].replace('"days":30', '"days":3000')}).encode()
    with coordinator(served.folder / "other") as stranger:
        authority.move(stranger.home, served.folder / "other-stick")
        foreign = authority.signing_list(stranger.home)
    for forged in (swapped, longer, foreign):
        with pytest.raises(SignatureInvalid):
            authority.read_list(forged, stick)
    bomb = b"[" * 200_000
    for garbage in (b"", b"{}", b"null", bomb, b'{"version":1,"requests":5,"signature":"00"}', b"\xff"):
        with pytest.raises(DocumentError):
            authority.read_list(garbage, stick)
    with pytest.raises(NotEnrolled, match="no folder of an authority"):
        authority.read_list(json.dumps(genuine).encode(), served.folder)


def test_only_certificates_that_answer_a_request_are_taken_in(served: Coordinator, stick: Path) -> None:
    """Another key, name, role, authority or age, a request that nobody made, one that became void: each left out by name."""
    with pytest.raises(AwaitingSignature):
        served.join("north")
    key = keys.load_key(served.keys_of("north") / "site.key").public_key()
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    ours = keys.Authority(keys.load_key(stick / "ca.key"), keys.load_certificate(served.home.ca_pem))
    foreign = keys.make_ca(ec.generate_private_key(ec.SECP256R1()), "elsewhere")
    wrong = [
        ("north", certificate(ours, other, "north", "site", begun_days=0, left_days=30)),
        ("north", certificate(ours, key, "south", "site", begun_days=0, left_days=30)),
        ("north", certificate(ours, key, "north", "researcher", begun_days=0, left_days=30)),
        ("north", certificate(ours, key, "north", "site", begun_days=9, left_days=-1)),
        ("north", certificate(foreign, key, "north", "site", begun_days=0, left_days=30)),
        ("west", certificate(ours, other, "west", "site", begun_days=0, left_days=30)),
        ("../keys/x", certificate(ours, other, "north", "site", begun_days=0, left_days=30)),
    ]
    for name, made in wrong:
        entry = {"name": name, "certificate": keys.certificate_pem(made).decode()}
        parties, refused = authority.accept(served.home, json.dumps({"version": 1, "certificates": [entry]}).encode())
        assert (parties, len(refused)) == ([], 1)
    for garbage in (b"", b"{}", b"[" * 200_000, b'{"version":1,"certificates":[5]}'):
        with pytest.raises(DocumentError):
            authority.accept(served.home, garbage)
    good = authority.sign(authority.read_list(authority.signing_list(served.home), stick), stick)
    assert [party.name for party in authority.accept(served.home, good)[0]] == ["north"]
    assert authority.accept(served.home, good)[1] == {"unknown": "nothing of this name waits for a signature"}


def test_a_renewal_that_waits_ends_with_a_revocation(served: Coordinator, stick: Path) -> None:
    aged(served, stick)
    served.caller("south").close()
    wanted = authority.read_list(authority.signing_list(served.home), stick)
    served.home.revoke("south")
    assert authority.accept(served.home, authority.sign(wanted, stick))[0] == []
    with pytest.raises(TrustError):
        served.caller("south")


def test_whoever_joined_and_waits_can_be_revoked_and_is_never_signed(served: Coordinator, stick: Path) -> None:
    """The line was stolen, say, and the authority's holder noticed the foreign key."""
    line = str(served.home.invite("north", "site"))
    with pytest.raises(AwaitingSignature):
        calls.join(line, served.folder / "thief" / "keys")
    wanted = authority.read_list(authority.signing_list(served.home), stick)
    served.home.revoke("north")
    assert authority.waiting(served.home) == []
    assert authority.accept(served.home, authority.sign(wanted, stick))[0] == []
    with pytest.raises(InvitationRefused, match="this key was revoked"):
        calls.join(line, served.folder / "thief" / "keys")
    with pytest.raises(NotEnrolled):
        served.home.revoke("north")  # now there is nobody
    with pytest.raises(AwaitingSignature):
        served.join("north")
    assert carry(served, stick) == (["north"], {})


def test_a_pair_of_files_that_do_not_belong_together_signs_nothing(served: Coordinator, stick: Path) -> None:
    with pytest.raises(AwaitingSignature):
        served.join("north")
    wanted = authority.read_list(authority.signing_list(served.home), stick)
    (stick / "ca.key").unlink()
    keys.make_key(stick / "ca.key")
    with pytest.raises(TrustError, match="do not belong together"):
        authority.sign(wanted, stick)


def test_the_commands_carry_it_by_hand(served: Coordinator, stick: Path, tmp_path: Path) -> None:
    run, where = CliRunner(), ["--home", str(served.home.root)]
    assert "Nothing waits" in run.invoke(app, ["requests", *where]).output
    with pytest.raises(AwaitingSignature):
        served.join("north")
    listed, signed = tmp_path / "list.json", tmp_path / "certificates.json"
    shown = run.invoke(app, ["requests", "--out", str(listed), *where])
    assert "north" in shown.output
    (row,) = json.loads(run.invoke(app, ["requests", "--json", *where]).output)["requests"]
    point = keys.point_hex(keys.load_key(served.keys_of("north") / "site.key").public_key())
    assert row["key"].replace(" ", "") == keys.digest(bytes.fromhex(point))[:16]
    there = ["sign", str(listed), "--authority", str(stick), "--out", str(signed)]
    assert run.invoke(app, there, input="n\n").exit_code == 1
    assert not signed.exists()
    agreed = run.invoke(app, there, input="y\n")
    assert agreed.exit_code == 0
    assert row["key"] in agreed.output
    taken = run.invoke(app, ["accept", str(signed), *where])
    assert taken.exit_code == 0
    assert "north has a certificate until" in taken.output
    again = run.invoke(app, ["accept", str(signed), *where])
    assert again.exit_code == 1
    lines = [json.loads(line) for line in (served.home.root / "journal.jsonl").read_text().splitlines()]
    told = ["authority-moved", "invited", "signature-requested", "enrolled"]
    assert [line["kind"] for line in lines][-4:] == told
