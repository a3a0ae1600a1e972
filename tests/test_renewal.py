"""Short-lived certificates: renewed in their last third over the same key, refused after their end, then joined again."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from certificates import age, authority_of, certificate, held, put
from coordinator import Coordinator, coordinator, study
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from privacy import calls, keys
from privacy import consortium_pb2 as pb
from privacy.errors import CertificateExpired, InvitationRefused, SignatureInvalid, TrustError


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Coordinator]:
    with coordinator(tmp_path) as demo:
        demo.join("north")
        demo.join("rosa", "researcher")
        yield demo


def journal(served: Coordinator, kind: str) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (served.home.root / "journal.jsonl").read_text().splitlines()]
    return [line["facts"] for line in lines if line["kind"] == kind]


def test_certificates_last_thirty_days_unless_the_consortium_says_otherwise(served: Coordinator) -> None:
    life = held(served, "north").not_valid_after_utc - held(served, "north").not_valid_before_utc
    assert 30 <= life.total_seconds() / 86400 < 30.1


def test_opening_a_connection_renews_in_the_last_third_and_not_before(served: Coordinator) -> None:
    early = age(served, "north", begun_days=19, left_days=11)
    served.caller("north").close()
    assert held(served, "north") == early
    late = age(served, "north", begun_days=21, left_days=9)
    with served.caller("north") as caller:
        caller.offers()
    renewed = held(served, "north")
    assert renewed.not_valid_after_utc > late.not_valid_after_utc
    assert keys.public_key_of(renewed) == keys.public_key_of(late)
    assert served.home.roster.party("north").certificate == renewed
    assert journal(served, "renewed") == [{"party": "north", "certificate": keys.fingerprint(renewed)}]


def test_a_researcher_renews_as_well(served: Coordinator) -> None:
    old = age(served, "rosa", "researcher", begun_days=29, left_days=1)
    served.caller("rosa").close()
    assert held(served, "rosa", "researcher").not_valid_after_utc > old.not_valid_after_utc


def test_asked_twice_the_second_answer_is_the_first(served: Coordinator) -> None:
    """A reply that was lost on the way is asked for again; no second certificate may be minted for it."""
    old = age(served, "north", begun_days=29, left_days=1)
    served.caller("north").close()
    first = held(served, "north")
    keys.write_public(served.keys_of("north") / "site.pem", keys.certificate_pem(old))
    served.caller("north").close()
    assert held(served, "north") == first
    assert len(journal(served, "renewed")) == 1


def test_nobody_renews_for_another_key_or_with_a_forged_request(served: Coordinator) -> None:
    age(served, "north", begun_days=29, left_days=1)
    folder = served.keys_of("north")
    key, other = keys.load_key(folder / "site.key"), ec.generate_private_key(ec.SECP256R1())
    caller = calls.Caller(served.address, (folder / "ca.pem").read_bytes(), "north", key)
    with caller:
        with pytest.raises(TrustError, match="enrolled key only"):
            caller._call("Renew", pb.RenewRequest(csr=keys.make_csr(other, "north")))
        request = bytearray(x509.load_pem_x509_csr(keys.make_csr(key, "north")).public_bytes(calls_der()))
        request[-1] ^= 1  # in its signature
        with pytest.raises((SignatureInvalid, calls.MessageMalformed)):
            caller._call("Renew", pb.RenewRequest(csr=pem_of(bytes(request))))
        for garbage in (b"", b"-----BEGIN CERTIFICATE REQUEST-----", b"\xff" * 70_000):
            with pytest.raises(calls.MessageMalformed):
                caller._call("Renew", pb.RenewRequest(csr=garbage))
    stranger = calls.Caller(served.address, (folder / "ca.pem").read_bytes(), "north", other)
    with stranger, pytest.raises(SignatureInvalid):
        stranger._call("Renew", pb.RenewRequest(csr=keys.make_csr(other, "north")))
    assert journal(served, "renewed") == []


def calls_der() -> object:
    from cryptography.hazmat.primitives.serialization import Encoding

    return Encoding.DER


def pem_of(der: bytes) -> bytes:
    import base64

    body = base64.encodebytes(der).decode()
    return f"-----BEGIN CERTIFICATE REQUEST-----\n{body}-----END CERTIFICATE REQUEST-----\n".encode()


def test_a_coordinator_that_answers_with_something_else_changes_nothing(served: Coordinator) -> None:
    """Another key, another name, an older end, a foreign authority: the certificate that is held stays."""
    old = age(served, "north", begun_days=29, left_days=1)
    authority, key = authority_of(served.home), keys.load_key(served.keys_of("north") / "site.key")
    foreign_key = ec.generate_private_key(ec.SECP256R1())
    foreign = keys.make_ca(foreign_key, "elsewhere")
    wrong = [
        certificate(authority, foreign_key.public_key(), "north", "site", begun_days=0, left_days=30),
        certificate(authority, key.public_key(), "south", "site", begun_days=0, left_days=30),
        certificate(authority, key.public_key(), "north", "researcher", begun_days=0, left_days=30),
        certificate(authority, key.public_key(), "north", "site", begun_days=0, left_days=0.5),
        certificate(authority, key.public_key(), "north", "site", begun_days=9, left_days=-1),
        certificate(foreign, key.public_key(), "north", "site", begun_days=0, left_days=30),
    ]
    caller = calls.Caller(served.address, served.home.ca_pem, "north", key)
    with caller:
        for made in wrong:
            caller._call = lambda *_, made=made: pb.RenewReply(certificate=keys.certificate_pem(made))  # type: ignore[method-assign]
            with pytest.raises(TrustError):
                caller.renew(served.keys_of("north"), "site")
    assert held(served, "north") == old


def test_after_its_end_a_certificate_opens_nothing_and_an_invitation_renews_it(served: Coordinator) -> None:
    age(served, "north", begun_days=40, left_days=-1)
    with pytest.raises(CertificateExpired) as caught:
        served.caller("north")
    assert "fl-server invite" in caught.value.remedy
    key = (served.keys_of("north") / "site.key").read_bytes()
    served.join("north")
    assert (served.keys_of("north") / "site.key").read_bytes() == key  # studies name it, so it stays
    with served.caller("north") as caller:
        caller.offers()
    assert len(served.enrolled) == 1  # the same node at Flower


def test_a_new_invitation_for_an_ended_certificate_is_for_the_same_key_only(served: Coordinator) -> None:
    age(served, "north", begun_days=40, left_days=-1)
    line = str(served.home.invite("north", "site"))
    with pytest.raises(InvitationRefused, match="enrolled already"):
        calls.join(line, served.folder / "thief" / "keys")
    with pytest.raises(InvitationRefused, match="enrolled already"):
        served.home.invite("rosa", "researcher")  # whose certificate is good


def test_a_study_offered_by_a_researcher_who_renewed_is_still_genuine(served: Coordinator) -> None:
    offered = served.submit(study("north", quorum=1))
    age(served, "rosa", "researcher", begun_days=29, left_days=1)
    served.caller("rosa").close()
    with served.caller("north") as caller:
        (offer,) = caller.offers()
    shown = keys.load_certificate(offer.researcher_certificate)
    keys.check_issued(keys.load_certificate(served.home.ca_pem), shown, "rosa", "researcher")
    assert shown == held(served, "rosa", "researcher")
    assert offer.study == offered.canonical()


def test_a_roster_of_the_first_version_is_read_and_completed(served: Coordinator, tmp_path: Path) -> None:
    import sqlite3

    from fl_server.roster import Roster

    path = tmp_path / "old.sqlite"
    with sqlite3.connect(path) as db:
        db.execute(
            "CREATE TABLE parties (name TEXT PRIMARY KEY, role TEXT NOT NULL, public_key BLOB NOT NULL UNIQUE, certificate"
            " BLOB NOT NULL, serial TEXT NOT NULL UNIQUE, node_id TEXT, joined TEXT NOT NULL, last_seen TEXT)"
        )
        made, pem = held(served, "north"), keys.certificate_pem(held(served, "north"))
        row = ("north", "site", keys.public_pem(keys.public_key_of(made)), pem, "1", "7", "2026-01-01T00:00:00Z", None)
        db.execute("INSERT INTO parties VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
        db.execute("PRAGMA user_version = 1")
    roster = Roster(path)
    assert roster.party("north").node_id == 7
    assert roster.party("north").revoked is None
    roster.revoke("north")
    assert Roster(path).revoked() == {"north"}
    put(path, "north", made)
