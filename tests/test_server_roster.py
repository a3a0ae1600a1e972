"""The consortium's home and roster: founding, one-use invitations, studies and decisions."""

import datetime as dt
import hashlib
import json
import sqlite3
import stat
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from coordinator import settings, study
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from typer.testing import CliRunner

from fl_server import authority
from fl_server.cli import app
from fl_server.roster import Home, Party, Roster
from fl_server.settings import ServerFile
from models.study import read
from privacy import keys
from privacy.calls import InvitationLine, token_hash
from privacy.errors import (
    DocumentError,
    InvitationRefused,
    IsocenterError,
    KeyFileUnsafe,
    MessageMalformed,
    NotEnrolled,
    RunUnknown,
    SignatureInvalid,
    StudyConflict,
    TrustError,
)
from privacy.journal import verify
from privacy.statements import Statement

KEY = ec.generate_private_key(ec.SECP256R1())
OTHER = ec.generate_private_key(ec.SECP256R1())


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.found(tmp_path / "consortium", settings())


def enrol(home: Home, name: str, role: Any = "site", key: keys.PrivateKey | None = None) -> Party:
    key = key or ec.generate_private_key(ec.SECP256R1())
    return authority.enrol(home, home.invite(name, role).token, name, role, keys.make_csr(key, name))


def contents(home: Home) -> list[Any]:
    with sqlite3.connect(home.root / "roster.sqlite") as db:
        return [db.execute(f"SELECT * FROM {table}").fetchall() for table in ("invitations", "parties")]  # noqa: S608


# Founding


def test_founding_makes_a_closed_home_that_opens_again(home: Home) -> None:
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in home.root.rglob("*")}
    for name in (
        "ca.key",
        "coordinator.key",
        "aggregator.key",
        "tls.key",
        "roster.sqlite",
        "server.yaml",
        "journal.jsonl",
    ):
        assert modes[name] == 0o600, name
    for name in ("keys", "runs"):
        assert modes[name] == 0o700, name
    assert stat.S_IMODE(home.root.stat().st_mode) == 0o700
    again = Home.open(home.root)
    assert again.settings == home.settings
    assert again.ca_pem == home.ca_pem
    assert again.coordinator_key.private_numbers() == home.coordinator_key.private_numbers()
    assert read(ServerFile, home.root / "server.yaml") == home.settings
    assert verify(home.root / "journal.jsonl") == 1
    assert home.tls_pem.read_bytes().endswith(home.ca_pem)  # the chain shows the authority to those who join


def test_founding_never_touches_a_folder_with_content(tmp_path: Path) -> None:
    (tmp_path / "keep").write_text("mine")
    with pytest.raises(TrustError, match="not empty"):
        Home.found(tmp_path, settings())
    assert [path.name for path in tmp_path.iterdir()] == ["keep"]
    with pytest.raises(TrustError):
        Home.found(tmp_path / "keep", settings())


def test_an_unfinished_founding_is_no_consortium(home: Home) -> None:
    (home.root / "server.yaml").unlink()
    with pytest.raises(DocumentError, match="no consortium"):
        Home.open(home.root)


@pytest.mark.parametrize("lost", ["roster.sqlite", "keys/ca.pem", "keys/coordinator.key"])
def test_a_home_that_lost_a_part_says_so(home: Home, lost: str) -> None:
    (home.root / lost).unlink()
    with pytest.raises(IsocenterError) as caught:
        Home.open(home.root)
    assert Path(lost).name in str(caught.value)


def test_a_home_founded_before_studies_named_the_aggregator_gets_its_key_once(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, make = home.root / "keys" / "aggregator.key", keys.make_sealing_key
    path.unlink()

    def another_process_was_first(wanted: Path) -> X25519PrivateKey:
        make(wanted)
        return make(wanted)

    monkeypatch.setattr(keys, "make_sealing_key", another_process_was_first)
    Home.open(home.root)
    raw = path.read_bytes()
    public = X25519PrivateKey.from_private_bytes(raw).public_key().public_bytes_raw().hex()
    assert [Home.open(home.root).aggregator for _ in range(2)] == [public, public]
    assert path.read_bytes() == raw
    assert [entry.name for entry in path.parent.iterdir() if "part" in entry.name] == []


def test_an_aggregator_key_that_others_can_read_is_refused(home: Home) -> None:
    (home.root / "keys" / "aggregator.key").chmod(0o640)
    with pytest.raises(KeyFileUnsafe, match=r"aggregator\.key"):
        _ = Home.open(home.root).aggregator


def test_an_open_coordinator_key_is_refused(home: Home) -> None:
    (home.root / "keys" / "coordinator.key").chmod(0o644)
    with pytest.raises(KeyFileUnsafe):
        Home.open(home.root)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "Demo"},
        {"host": "bad host"},
        {"host": "x\nlisten: 0.0.0.0"},
        {"host": "::1"},
        {"host": "10"},
        {"host": '"'},
        {"listen": "localhost"},
        {"service_port": 0},
        {"gateway_port": 70_000},
        {"version": 2},
        {"surprise": 1},
    ],
)
def test_server_settings_are_checked(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        settings(**change)


def test_a_mistyped_key_names_line_and_nearest(home: Home) -> None:
    path = home.root / "server.yaml"
    path.write_text(path.read_text().replace("invitation_hours", "invitation_hour"))
    lines = path.read_text().splitlines()
    number = next(n for n, line in enumerate(lines, start=1) if line.startswith("invitation_hour"))
    with pytest.raises(DocumentError, match=rf"line {number}: .*'invitation_hour'; did you mean 'invitation_hours'"):
        Home.open(home.root)


def test_a_damaged_roster_is_one_sentence(home: Home) -> None:
    for name in ("roster.sqlite", "roster.sqlite-wal"):
        if (home.root / name).exists():
            (home.root / name).write_bytes(b"not a database" * 1000)
    with pytest.raises(IsocenterError, match="could not be used"):
        Home.open(home.root)


def test_a_newer_roster_is_refused(home: Home) -> None:
    with sqlite3.connect(home.root / "roster.sqlite") as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(DocumentError, match="newer"):
        Home.open(home.root)


# Invitations


def test_an_invitation_line_is_one_word_and_comes_back(home: Home) -> None:
    line = home.invite("north", "site")
    text = str(line)
    assert text == f"isocenter-join:v1:north@127.0.0.1:{home.settings.service_port}:{home.ca_fingerprint}:{line.token}"
    assert text.split() == [text]
    assert InvitationLine.parse(text) == line
    assert InvitationLine.parse(f"  {text[:70]}\n   {text[70:]}\n") == line  # a mail program wrapped it
    assert (
        home.ca_fingerprint == hashlib.sha256(keys.load_certificate(home.ca_pem).public_bytes(Encoding.DER)).hexdigest()
    )


@pytest.mark.parametrize(
    "damage",
    [
        lambda x: "",
        lambda x: x[:-1],
        lambda x: x + "a",
        lambda x: x.replace("v1", "v2"),
        lambda x: x.replace("north", "North"),
        lambda x: x.replace("north@", "../north@"),
        lambda x: x.replace("127.0.0.1:", "127.0.0.1:99999"),
        lambda x: x.replace("127.0.0.1", "a/b"),
        lambda x: x.upper(),
        lambda x: x * 2,
        lambda x: "isocenter-join:" + "v" * 1_000_000,
    ],
)
def test_a_damaged_line_is_refused_without_quoting_the_token(home: Home, damage: Any) -> None:
    line = home.invite("north", "site")
    with pytest.raises(InvitationRefused) as caught:
        InvitationLine.parse(damage(str(line)))
    assert line.token not in str(caught.value) + caught.value.remedy


def test_tokens_are_long_random_and_stored_as_hashes_only(home: Home) -> None:
    tokens = {home.invite("north", "site").token for _ in range(20)}
    assert len(tokens) == 20
    assert all(len(token) * 5 >= 128 for token in tokens)
    files = b"".join(path.read_bytes() for path in home.root.rglob("*") if path.is_file())
    for token in tokens:
        assert token.encode() not in files
        assert token_hash(token) in files


def test_an_invitation_makes_one_party(home: Home) -> None:
    line, csr = home.invite("north", "site"), keys.make_csr(KEY, "north")
    assert [each.name for each in home.roster.invitations()] == ["north"]
    party = authority.enrol(home, line.token, "north", "site", csr)
    assert (party.name, party.role, party.node_id, party.public_key) == ("north", "site", None, KEY.public_key())
    keys.check_issued(keys.load_certificate(home.ca_pem), party.certificate, "north", "site")
    assert home.roster.sites() == [party]
    assert home.roster.researchers() == []
    assert home.roster.invitations() == []


def test_the_same_key_again_gets_the_same_certificate_and_another_key_is_used(home: Home) -> None:
    line = home.invite("north", "site")
    first = authority.enrol(home, line.token, "north", "site", keys.make_csr(KEY, "north"))
    again = authority.enrol(home, line.token, "north", "site", keys.make_csr(KEY, "north"))
    assert again == first
    assert verify(home.root / "journal.jsonl") == 3  # founded, invited, enrolled once
    with pytest.raises(InvitationRefused, match="used before"):
        authority.enrol(home, line.token, "north", "site", keys.make_csr(OTHER, "north"))


def test_each_refusal_has_its_reason_and_changes_nothing(home: Home) -> None:
    line = home.invite("north", "site")
    second = home.invite("south", "site")
    csr = keys.make_csr(KEY, "north")
    before = contents(home)
    wrong = InvitationLine.new_token()
    cases: list[tuple[tuple[str, str, str], str]] = [
        ((wrong, "north", "site"), "not known"),
        (("short", "north", "site"), "no token"),
        (("ä" * 32, "north", "site"), "no token"),
        ((line.token, "south", "site"), "another name"),
        ((second.token, "north", "site"), "another name"),
        ((line.token, "north", "researcher"), "fl-client join"),
        ((line.token, "north", "server"), "fl-client join"),
    ]
    for (token, name, role), reason in cases:
        with pytest.raises(InvitationRefused, match=reason):
            authority.enrol(home, token, name, role, csr)
    for bad in (b"", csr[:50], csr.replace(b"A", b"B", 3)):
        with pytest.raises((MessageMalformed, SignatureInvalid)):
            authority.enrol(home, line.token, "north", "site", bad)
    assert contents(home) == before
    authority.enrol(home, line.token, "north", "site", csr)


def test_an_expired_invitation_makes_nobody_and_is_still_answered_for_whoever_it_made(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    line, used = home.invite("north", "site"), home.invite("south", "site")
    authority.enrol(home, used.token, "south", "site", keys.make_csr(OTHER, "south"))
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 72 * 3600 + 1)
    with pytest.raises(InvitationRefused, match="expired"):
        authority.enrol(home, line.token, "north", "site", keys.make_csr(KEY, "north"))
    # Whoever asks again with the same key gets what it got: an offline authority may take longer than an invitation lasts.
    assert authority.enrol(home, used.token, "south", "site", keys.make_csr(OTHER, "south")).name == "south"
    assert [party.name for party in home.roster.sites()] == ["south"]
    assert home.roster.invitations() == []


def test_a_name_and_a_key_belong_to_one_party(home: Home) -> None:
    first, second = home.invite("north", "site"), home.invite("north", "site")
    other = home.invite("south", "site")
    authority.enrol(home, first.token, "north", "site", keys.make_csr(KEY, "north"))
    with pytest.raises(InvitationRefused, match="enrolled already"):
        authority.enrol(home, second.token, "north", "site", keys.make_csr(OTHER, "north"))
    with pytest.raises(InvitationRefused, match="enrolled already"):
        authority.enrol(home, other.token, "south", "site", keys.make_csr(KEY, "south"))
    for role in ("site", "researcher"):
        with pytest.raises(InvitationRefused, match="enrolled already"):
            home.invite("north", role)


def test_of_many_at_once_one_redeems(home: Home) -> None:
    line = home.invite("north", "site")
    outcomes: list[str] = []

    def attempt() -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        try:
            outcomes.append(authority.enrol(home, line.token, "north", "site", keys.make_csr(key, "north")).name)
        except InvitationRefused as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=attempt) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes)[0] == "north"
    assert sum(outcome == "north" for outcome in outcomes) == 1
    assert len(home.roster.sites()) == 1


def test_a_failing_authority_leaves_the_invitation_open(home: Home) -> None:
    line = home.invite("north", "site")
    (home.root / "keys" / "ca.key").chmod(0o644)
    with pytest.raises(KeyFileUnsafe):
        authority.enrol(home, line.token, "north", "site", keys.make_csr(KEY, "north"))
    (home.root / "keys" / "ca.key").chmod(0o600)
    authority.enrol(home, line.token, "north", "site", keys.make_csr(KEY, "north"))


@pytest.mark.parametrize("name", ["", "North", "a b", "../x", "x" * 33])
def test_only_names_are_invited(home: Home, name: str) -> None:
    with pytest.raises(MessageMalformed):
        home.invite(name, "site")


def test_a_node_id_of_64_bits_is_kept(home: Home) -> None:
    enrol(home, "north")
    home.roster.set_node("north", 2**64 - 1)
    assert home.roster.party("north").node_id == 2**64 - 1
    with pytest.raises(NotEnrolled):
        home.roster.party("south")


# Calls


def test_a_nonce_is_good_once_also_after_a_restart(home: Home) -> None:
    enrol(home, "north")
    enrol(home, "south")
    until = time.time() + 60
    home.roster.admit_call("north", "ab" * 16, until)
    with pytest.raises(SignatureInvalid, match="before"):
        home.roster.admit_call("north", "ab" * 16, until)
    with pytest.raises(SignatureInvalid):
        Roster(home.root / "roster.sqlite").admit_call("north", "ab" * 16, until)
    home.roster.admit_call("south", "ab" * 16, until)  # another's nonces do not matter
    assert home.roster.party("north").last_seen is not None


def test_nonces_are_forgotten_in_time_and_bounded(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    enrol(home, "north")
    home.roster.admit_call("north", "ab" * 16, time.time() - 1)
    home.roster.admit_call("north", "ab" * 16, time.time() + 60)
    monkeypatch.setattr("fl_server.roster.NONCES_PER_PARTY", 1)
    with pytest.raises(TrustError, match="too many"):
        home.roster.admit_call("north", "cd" * 16, time.time() + 60)


# Studies


@pytest.fixture
def offered(home: Home) -> str:
    for name in ("north", "south", "west"):
        enrol(home, name)
    enrol(home, "rosa", "researcher")
    asked = study("north", "south", evaluate_only=["west"])
    assert home.roster.add_study(asked, "rosa", b"r", b"c")
    return asked.digest


def test_a_study_is_offered_to_the_sites_it_names(home: Home, offered: str) -> None:
    enrol(home, "east")
    for site in ("north", "south", "west"):
        [(found, decision)] = home.roster.offered_to(site)
        assert (found.digest, found.study.digest, decision) == (offered, offered, None)
    assert home.roster.offered_to("east") == []
    assert [found.digest for found in home.roster.studies_of("rosa")] == [offered]
    with pytest.raises(RunUnknown):
        home.roster.study("0" * 64)


def test_the_same_study_again_changes_nothing_and_nobody_else_may_take_it(home: Home, offered: str) -> None:
    enrol(home, "ruth", "researcher")
    asked = home.roster.study(offered).study
    assert home.roster.add_study(asked, "rosa", b"r2", b"c2") is False
    assert home.roster.study(offered).coordinator_signature == b"c"
    with pytest.raises(TrustError, match="another researcher"):
        home.roster.add_study(asked, "ruth", b"r", b"c")


def test_every_site_that_is_not_enrolled_is_named(home: Home, offered: str) -> None:
    with pytest.raises(NotEnrolled, match=r"not enrolled here: east, rosa$"):  # a researcher is no site
        home.roster.add_study(study("north", "east", "rosa"), "rosa", b"r", b"c")


def test_a_study_is_completed_with_enrolled_keys_and_no_others_fit(home: Home, offered: str) -> None:
    asked = study("south", "north", evaluate_only=["west"])
    whole = home.with_keys(asked)
    party = {name: home.roster.party(name).public_key.public_numbers() for name in asked.all_sites}
    assert whole.roster == {name: f"{2 + p.y % 2:02x}{p.x:064x}" for name, p in party.items()}  # SEC 1, 2.3.3
    assert whole.aggregator == home.aggregator
    assert whole.model_copy(update={"roster": {}, "aggregator": ""}) == asked
    home.check_keys(whole)
    with pytest.raises(StudyConflict, match="south, north, west and the key"):
        home.check_keys(asked)
    swapped = {**whole.roster, "north": whole.roster["south"]}
    with pytest.raises(StudyConflict, match=r"for north$"):
        home.check_keys(whole.model_copy(update={"roster": swapped}))
    with pytest.raises(NotEnrolled, match=r"here: east, rosa$"):
        home.with_keys(study("east", "north", "rosa"))


def decide(home: Home, digest: str, site: str, decision: Any, time_ms: int) -> bool:
    return home.roster.decide(Statement(digest, site, decision, time_ms), b"signature")


def test_the_latest_decision_counts_in_whatever_order_they_arrive(home: Home, offered: str) -> None:
    assert decide(home, offered, "north", "approved", 5)
    assert home.roster.approvals(offered) == ["north"]
    assert decide(home, offered, "north", "declined", 9)
    assert home.roster.approvals(offered) == []
    with pytest.raises(SignatureInvalid, match="later decision"):
        decide(home, offered, "north", "approved", 7)
    with pytest.raises(SignatureInvalid, match="later decision"):
        decide(home, offered, "north", "approved", 9)
    assert decide(home, offered, "north", "declined", 9) is False  # the same one, delivered twice
    assert decide(home, offered, "south", "approved", 1)
    assert home.roster.decisions(offered) == {"north": "declined", "south": "approved"}
    assert home.roster.statements(offered)["south"] == (
        Statement(offered, "south", "approved", 1).body(),
        b"signature",
    )


def test_a_site_decides_about_what_it_was_offered(home: Home, offered: str) -> None:
    enrol(home, "east")
    for site, digest in [("east", offered), ("north", "0" * 64)]:
        with pytest.raises(TrustError):
            decide(home, digest, site, "approved", 5)


# Commands


def run(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(words), env={"COLUMNS": "80"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


def test_commands_found_invite_and_list(tmp_path: Path) -> None:
    root = str(tmp_path / "consortium")
    code, out = run("init", root, "--name", "demo", "--host", "fed.example.org", "--service-port", "9555")
    home = Home.open(Path(root))
    assert code == 0
    assert keys.grouped(home.ca_fingerprint) in out
    assert home.settings.service_port == 9555
    code, out = run("invite", "north", "--home", root)
    assert InvitationLine.parse(out).name == "north"
    assert run("invite", "rosa", "--researcher", "--home", root)[0] == 0
    enrol(home, "south")
    code, out = run("sites", "--home", root)
    assert "south" in out
    assert "invited" in out
    assert max(len(line) for line in out.splitlines()) <= 80
    assert home.ca_fingerprint in out.replace(" ", "").replace("\n", "")
    document = json.loads(run("sites", "--json", "--home", root)[1])
    assert document["fingerprint"] == home.ca_fingerprint
    assert [site["name"] for site in document["sites"]] == ["south"]
    assert {each["name"]: each["role"] for each in document["invitations"]} == {"north": "site", "rosa": "researcher"}


def test_runs_are_listed_even_when_one_is_damaged(home: Home) -> None:
    root = str(home.root)
    assert json.loads(run("runs", "--json", "-H", root)[1]) == {"runs": []}
    for name, text in [
        ("good-1", json.dumps({"digest": "ab", "study": "s", "state": "running", "label": "l"})),
        ("bad-1", "{"),
    ]:
        (home.runs / name).mkdir()
        (home.runs / name / "run.json").write_text(text)
    (home.runs / "Not a run").mkdir()
    found = json.loads(run("runs", "--json", "-H", root)[1])["runs"]
    assert {entry["run_id"]: entry["state"] for entry in found} == {"good-1": "running", "bad-1": "unreadable"}
    assert "unreadable" in run("runs", "-H", root)[1]


def test_commands_raise_named_errors(tmp_path: Path, home: Home) -> None:
    for words in [
        ("sites", "--home", str(tmp_path)),
        ("init", str(home.root)),
        ("init", str(tmp_path / "new"), "--host", "bad host"),
        ("invite", "Bad Name", "--home", str(home.root)),
    ]:
        with pytest.raises(IsocenterError) as caught:
            run(*words)
        assert caught.value.remedy
    assert not (tmp_path / "new").exists()


def test_certificates_last_as_long_as_the_settings_say(tmp_path: Path) -> None:
    home = Home.found(tmp_path / "short", settings())
    path = home.root / "server.yaml"
    path.write_text(path.read_text().replace("certificate_days: 30", "certificate_days: 7"))
    party = enrol(Home.open(home.root), "north")
    left = party.certificate.not_valid_after_utc - dt.datetime.now(dt.UTC)
    assert dt.timedelta(days=6, hours=23) < left <= dt.timedelta(days=7)


def test_who_is_enrolled_and_what_each_said_is_told_of_one_moment(home: Home, offered: str) -> None:
    decide(home, offered, "north", "approved", 5)
    decide(home, offered, "south", "declined", 5)
    sites, decisions = home.roster.standing(offered)
    assert sites == home.roster.sites() and decisions == {"north": "approved", "south": "declined"}
    home.roster.revoke("north")
    decide(home, offered, "south", "approved", 6)
    sites, decisions = home.roster.standing(offered)
    assert [(site.name, bool(site.revoked)) for site in sites] == [
        (site.name, site.name == "north") for site in home.roster.sites()
    ]
    assert decisions["south"] == "approved"
