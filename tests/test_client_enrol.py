"""The site's half: joining against honest and hostile servers, offers, and decisions that hold here."""

import json
import socket
import ssl
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from coordinator import Coordinator, coordinator, free_port, study
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from fl_client import enrol
from fl_client.consent import Consent, Offer, approved, consents
from fl_client.site import SiteFile
from fl_server import consortium
from fl_server.consortium import Consortium
from fl_server.roster import Home
from models.study import Study, read
from privacy import calls, disk, keys, reach
from privacy import consortium_pb2 as pb
from privacy.calls import Caller, Enrolment, InvitationLine
from privacy.errors import (
    DocumentError,
    InvitationRefused,
    MessageMalformed,
    NotEnrolled,
    OrderForged,
    RunUnknown,
    StudyNotApproved,
    TrustError,
    Unreachable,
    WrongAuthority,
)
from privacy.journal import verify
from privacy.statements import Statement


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coordinator]:
    with coordinator(tmp_path_factory.mktemp("served")) as demo:
        demo.join("south")
        demo.join("rosa", "researcher")
        yield demo


_numbers = iter(range(1000))


@pytest.fixture
def name() -> str:
    return f"site{next(_numbers)}"


def kinds(home: Path) -> list[str]:
    return [json.loads(line)["kind"] for line in (home / "journal.jsonl").read_bytes().splitlines()]


# Joining


def test_joining_leaves_a_site_that_opens(served: Coordinator, name: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    enrolment = enrol.join(str(served.home.invite(name, "site")), home)
    port = served.home.settings.gateway_port
    assert enrolment == Enrolment(name, "site", f"127.0.0.1:{port}", served.address, served.home.ca_fingerprint)
    assert Enrolment.open(home / "keys") == enrolment
    assert {path.name for path in (home / "keys").iterdir()} == {
        "site.key",
        "site.pem",
        "ca.pem",
        "coordinator.pem",
        "enrolment.json",
    }
    assert stat.S_IMODE((home / "keys" / "site.key").stat().st_mode) == 0o600
    assert stat.S_IMODE((home / "keys").stat().st_mode) == 0o700
    certificate = keys.load_certificate((home / "keys" / "site.pem").read_bytes())
    keys.check_issued(keys.load_certificate(served.home.ca_pem), certificate, name, "site")
    assert (
        keys.load_public((home / "keys" / "coordinator.pem").read_bytes()) == served.home.coordinator_key.public_key()
    )
    settings = read(SiteFile, home / "site.yaml")
    assert (settings.site, settings.data) == (name, None)
    assert settings.coordinator is not None
    assert settings.coordinator.service == served.address
    assert kinds(home) == ["joined"]


def test_the_examples_of_the_site_template_are_right(served: Coordinator, name: str, tmp_path: Path) -> None:
    """Each commented example, uncommented as the comment says, is a site.yaml that is read."""
    enrol.join(str(served.home.invite(name, "site")), tmp_path)
    lines = (tmp_path / "site.yaml").read_text().splitlines()
    starts = [number for number, line in enumerate(lines) if line == "# data:"]
    formats = set()
    for start in starts:
        end = next(n for n in range(start, len(lines)) if not lines[n].startswith("# ") or lines[n] == "#")
        example = [*lines[:start], *(line[2:] for line in lines[start:end]), *lines[end:]]
        (tmp_path / "example.yaml").write_text("\n".join(example))
        settings = read(SiteFile, tmp_path / "example.yaml")
        assert settings.data is not None
        formats.add(settings.data.format)
    assert formats == {"dicom", "pictures"}
    defaults = SiteFile(version=1, site="x")
    settings = read(SiteFile, tmp_path / "site.yaml")
    assert (settings.policy, settings.resources) == (defaults.policy, defaults.resources)


def test_a_researcher_joins_with_the_same_code_and_a_wrong_role_is_told(
    served: Coordinator, name: str, tmp_path: Path
) -> None:
    line = str(served.home.invite(name, "researcher"))
    with pytest.raises(InvitationRefused, match="fl-study join"):
        enrol.join(line, tmp_path / "site")
    assert not (tmp_path / "site" / "site.yaml").exists()
    assert calls.join(line, tmp_path / "researcher", "researcher").role == "researcher"
    assert (tmp_path / "researcher" / "researcher.key").exists()
    with Caller.open(tmp_path / "researcher") as caller:
        assert caller.studies() == []


def test_joining_again_with_the_same_line_changes_nothing(served: Coordinator, name: str, tmp_path: Path) -> None:
    line = str(served.home.invite(name, "site"))
    first = enrol.join(line, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert enrol.join(line, tmp_path) == first
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    with pytest.raises(InvitationRefused, match="used before"):
        enrol.join(line, tmp_path / "elsewhere")


@pytest.mark.parametrize("lost", ["ca.pem", "coordinator.pem", "site.pem", "enrolment.json"])
def test_a_join_killed_at_any_step_can_be_repeated(
    served: Coordinator, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    class Killed(BaseException):
        pass

    real = disk.write_file

    def write(path: Path, content: bytes, mode: int, *, replace: bool = True) -> None:
        if path.name == lost:
            raise Killed
        real(path, content, mode, replace=replace)

    line = str(served.home.invite(name, "site"))
    with monkeypatch.context() as patch:
        patch.setattr(keys, "write_file", write)
        with pytest.raises(Killed):
            enrol.join(line, tmp_path)
    with pytest.raises(NotEnrolled):
        Enrolment.open(tmp_path / "keys")
    key = (tmp_path / "keys" / "site.key").read_bytes()
    assert enrol.join(line, tmp_path).name == name
    assert (tmp_path / "keys" / "site.key").read_bytes() == key
    certificate = keys.load_certificate((tmp_path / "keys" / "site.pem").read_bytes())
    assert certificate == served.home.roster.party(name).certificate


def test_a_folder_belongs_to_one_party(served: Coordinator, name: str, tmp_path: Path) -> None:
    enrol.join(str(served.home.invite(name, "site")), tmp_path)
    (tmp_path / "site.yaml").unlink()
    with pytest.raises(TrustError, match=f"already belongs to site {name}"):
        enrol.join(str(served.home.invite("another", "site")), tmp_path)


def test_an_existing_site_yaml_is_kept_and_completed(served: Coordinator, name: str, tmp_path: Path) -> None:
    written = f"# mine\nversion: 1\nsite: {name}\npolicy: {{least_protection: plain}}"
    (tmp_path / "site.yaml").write_text(written)
    enrol.join(str(served.home.invite(name, "site")), tmp_path)
    text = (tmp_path / "site.yaml").read_text()
    settings = read(SiteFile, tmp_path / "site.yaml")
    assert text.startswith(written)
    assert settings.policy.least_protection == "plain"
    assert settings.coordinator is not None
    enrol.join(str(InvitationLine(name, "127.0.0.1", 1, served.home.ca_fingerprint, "a" * 32)), tmp_path)
    assert (tmp_path / "site.yaml").read_text() == text


def test_a_site_yaml_of_another_site_stops_joining_before_the_token_is_used(
    served: Coordinator, name: str, tmp_path: Path
) -> None:
    line = str(served.home.invite(name, "site"))
    (tmp_path / "site.yaml").write_text("version: 1\nsite: other\n")
    with pytest.raises(DocumentError, match="of site other"):
        enrol.join(line, tmp_path)
    assert not (tmp_path / "keys").exists()
    enrol.join(line, tmp_path / "right")


def test_a_key_that_others_can_read_is_not_used_for_joining(served: Coordinator, name: str, tmp_path: Path) -> None:
    keys.make_key(tmp_path / "keys" / "site.key")
    (tmp_path / "keys" / "site.key").chmod(0o644)
    with pytest.raises(TrustError, match="other users"):
        enrol.join(str(served.home.invite(name, "site")), tmp_path)


# Hostile servers


class Impostor:
    """A TLS server that shows a chain of its own choice and records what it is sent after the handshake."""

    def __init__(self, folder: Path, chain: bytes, key: keys.PrivateKey) -> None:
        pem = folder / "impostor.pem"
        keys.write_private(folder / "impostor.key", _pem(key))
        keys.write_public(pem, chain)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(pem, folder / "impostor.key")
        self.context.set_alpn_protocols(["h2"])
        self.received = b""
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
                with self.context.wrap_socket(connection, server_side=True) as tls:
                    tls.settimeout(1)
                    while data := tls.recv(65536):
                        self.received += data
            except (TimeoutError, ssl.SSLError, ConnectionError):
                continue
            except OSError:
                return

    def close(self) -> None:
        self.socket.close()


def _pem(key: keys.PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


@contextmanager
def impostor(folder: Path, chain: bytes, key: keys.PrivateKey) -> Iterator[Impostor]:
    server = Impostor(folder, chain, key)
    try:
        yield server
    finally:
        server.close()


def test_a_wrong_authority_is_refused_before_anything_is_sent(served: Coordinator, name: str, tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    authority = keys.make_ca(key, "demo")
    leaf = keys.issue(authority, keys.make_csr(key, "demo"), "demo", "server", 30, "127.0.0.1")
    chain = keys.certificate_pem(leaf) + keys.certificate_pem(authority.certificate)
    line = served.home.invite(name, "site")
    with impostor(tmp_path, chain, key) as server:
        with pytest.raises(WrongAuthority) as caught:
            enrol.join(str(replace(line, service_port=server.port)), tmp_path / "home")
        assert server.received == b""
    assert keys.grouped(keys.fingerprint(authority.certificate)) in str(caught.value)
    assert line.token not in str(caught.value)
    assert "telephone" in caught.value.remedy
    assert not (tmp_path / "home" / "keys").exists()  # not even a key was made


def test_showing_the_right_authority_without_its_certificate_is_not_enough(
    served: Coordinator, name: str, tmp_path: Path
) -> None:
    """The authority's certificate is public: an impostor can append it to a chain of its own."""
    key = ec.generate_private_key(ec.SECP256R1())
    own = keys.make_ca(key, "demo")
    leaf = keys.issue(own, keys.make_csr(key, "demo"), "demo", "server", 30, "127.0.0.1")
    line = served.home.invite(name, "site")
    with impostor(tmp_path, keys.certificate_pem(leaf) + served.home.ca_pem, key) as server:
        with pytest.raises((WrongAuthority, Unreachable)):
            enrol.join(str(replace(line, service_port=server.port)), tmp_path / "home")
        assert line.token.encode() not in server.received
        assert server.received == b""
    assert not (tmp_path / "home" / "keys" / "enrolment.json").exists()
    enrol.join(str(line), tmp_path / "home")


def test_nobody_and_nonsense_are_unreachable(tmp_path: Path) -> None:
    line = InvitationLine("north", "127.0.0.1", free_port(), "0" * 64, "a" * 32)
    with pytest.raises(Unreachable, match="connection refused"):
        enrol.join(str(line), tmp_path)
    with pytest.raises(Unreachable, match="cannot be resolved"):
        enrol.join(str(replace(line, host="no-such-host.invalid")), tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=_nonsense, args=(server,), daemon=True).start()
        with pytest.raises(Unreachable, match=r"no TLS 1\.3 connection"):
            enrol.join(str(replace(line, service_port=server.getsockname()[1])), tmp_path)
    assert not (tmp_path / "keys").exists()


def _nonsense(server: socket.socket) -> None:
    connection, _ = server.accept()
    with connection:
        connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
        time.sleep(0.2)


def test_a_silent_server_is_given_up_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "CONNECT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        line = InvitationLine("north", "127.0.0.1", server.getsockname()[1], "0" * 64, "a" * 32)
        began = time.monotonic()
        with pytest.raises(Unreachable, match="did not answer"):
            enrol.join(str(line), tmp_path)
        assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("certificate", b""),
        ("certificate", b"foreign"),
        ("certificate", b"other key"),
        ("certificate", b"other name"),
        ("coordinator_key", b""),
        ("gateway_port", 0),
        ("gateway_port", 70_000),
    ],
)
def test_a_coordinator_that_answers_wrongly_is_not_joined(
    served: Coordinator, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, value: Any
) -> None:
    def certificate(key: keys.PrivateKey, who: str) -> bytes:
        csr = keys.make_csr(key, who)
        ca = keys.Authority(
            keys.load_key(served.home.root / "keys" / "ca.key"), keys.load_certificate(served.home.ca_pem)
        )
        return keys.certificate_pem(keys.issue(ca, csr, who, "site", 1))

    other = ec.generate_private_key(ec.SECP256R1())
    if value == b"foreign":
        value = keys.certificate_pem(keys.make_ca(other, "demo").certificate)
    elif value == b"other key":
        value = certificate(other, name)
    elif value == b"other name":
        keys.make_key(tmp_path / "keys" / "site.key")
        value = certificate(keys.load_key(tmp_path / "keys" / "site.key"), "victim")
    real = Consortium.Enrol

    def lie(self: Consortium, request: pb.EnrolRequest, context: Any) -> pb.EnrolReply:
        reply = real(self, request, context)
        setattr(reply, field, value)
        return reply

    # The handlers were bound when the service started, so the lie needs a service of its own.
    monkeypatch.setattr(Consortium, "Enrol", lie)
    with _second_service(served, tmp_path) as liar, pytest.raises((TrustError, MessageMalformed)):
        enrol.join(str(liar.invite(name, "site")), tmp_path)
    assert not (tmp_path / "keys" / "enrolment.json").exists()
    assert not (tmp_path / "site.yaml").exists()


@contextmanager
def _second_service(served: Coordinator, folder: Path) -> Iterator[Home]:
    port = free_port()
    home = replace(served.home, settings=served.home.settings.model_copy(update={"service_port": port}))
    server = consortium.serve(home, served.hooks())
    try:
        yield home
    finally:
        server.stop(0).wait()


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"name":"x"}', "\0"])
def test_a_damaged_enrolment_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "enrolment.json").write_text(content)
    with pytest.raises(NotEnrolled, match="damaged"):
        Enrolment.open(tmp_path)


# Offers and decisions


@pytest.fixture
def site(served: Coordinator, name: str, tmp_path: Path) -> Path:
    """A joined site's home."""
    enrol.join(str(served.home.invite(name, "site")), tmp_path / name)
    return tmp_path / name


@pytest.fixture
def offered(served: Coordinator, site: Path) -> Study:
    return served.submit(study(site.name, "south"))


def test_an_approval_holds_here_and_arrives_there(served: Coordinator, site: Path, offered: Study) -> None:
    coordinator_key = served.home.coordinator_key.public_key()
    [offer] = enrol.fetch_offers(site)
    assert (offer.study, offer.researcher, offer.decision) == (offered, "rosa", None)
    with pytest.raises(StudyNotApproved, match="not approved"):
        approved(site, offered.digest, coordinator_key)
    enrol.decide(site, enrol.find_offer(site, offered.digest[:8]), "approved")
    assert approved(site, offered.digest, coordinator_key) == offered
    assert served.home.roster.approvals(offered.digest) == [site.name]
    assert enrol.fetch_offers(site)[0].decision == "approved"
    enrol.decide(site, offer, "declined")
    with pytest.raises(StudyNotApproved, match="declined"):
        approved(site, offered.digest, coordinator_key)
    assert served.home.roster.decisions(offered.digest) == {site.name: "declined"}
    body, signature = served.home.roster.statements(offered.digest)[site.name]
    own = keys.load_certificate((site / "keys" / "site.pem").read_bytes())
    keys.verify(keys.public_key_of(own), keys.STUDY_DECISION, body, signature)
    assert kinds(site) == ["joined", "approved", "declined"]
    assert verify(site / "journal.jsonl") == 3
    assert stat.S_IMODE((site / "studies" / f"{offered.digest}.json").stat().st_mode) == 0o600
    assert [consent.offer.digest for consent in consents(site)] == [offered.digest]


def test_decisions_in_one_millisecond_or_after_a_clock_step_still_order(
    served: Coordinator, site: Path, offered: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    [offer] = enrol.fetch_offers(site)
    moments = iter([time.time_ns(), time.time_ns(), time.time_ns() - 3600 * 10**9])
    monkeypatch.setattr(time, "time_ns", lambda: next(moments))
    for decision in ("approved", "declined", "approved"):
        enrol.decide(site, offer, decision)
        assert served.home.roster.decisions(offered.digest) == {site.name: decision}


def test_an_approval_can_be_withdrawn_without_a_connection(served: Coordinator, site: Path, offered: Study) -> None:
    enrol.decide(site, enrol.find_offer(site, offered.digest), "approved")
    path = site / "site.yaml"
    path.write_text(path.read_text().replace(served.address, f"127.0.0.1:{free_port()}"))
    with pytest.raises(Unreachable):
        enrol.find_offer(site, "0" * 64)
    offer = enrol.find_offer(site, offered.digest[:10])
    with pytest.raises(Unreachable, match="counts as declined at this site") as caught:
        enrol.decide(site, offer, "declined")
    assert "again" in caught.value.remedy
    with pytest.raises(StudyNotApproved):
        approved(site, offered.digest, served.home.coordinator_key.public_key())
    assert served.home.roster.decisions(offered.digest) == {site.name: "approved"}
    for _ in range(
        2
    ):  # what a running node does once the coordinator is back; the second time there is nothing to send
        with Caller.open(site / "keys") as caller:
            enrol.redeliver(site, caller)
        assert served.home.roster.decisions(offered.digest) == {site.name: "declined"}
    assert list((site / "studies").glob("*.unsent")) == []


def test_a_decision_that_the_coordinator_refuses_is_not_sent_for_ever(
    served: Coordinator, site: Path, offered: Study
) -> None:
    enrol.decide(site, enrol.find_offer(site, offered.digest), "approved")
    later = Statement(offered.digest, site.name, "declined", 2**50)
    key = keys.load_key(site / "keys" / "site.key")
    with Caller.open(site / "keys") as caller:
        caller.decide(later.body(), keys.sign(key, keys.STUDY_DECISION, later.body()))
        for name in (offered.digest, "0" * 64):
            (site / "studies" / f"{name}.unsent").touch()
        enrol.redeliver(site, caller)
    assert list((site / "studies").glob("*.unsent")) == []
    assert served.home.roster.decisions(offered.digest) == {site.name: "declined"}


def test_a_digest_must_name_one_study(served: Coordinator, site: Path, offered: Study) -> None:
    for text in ("", offered.digest[:5], "0" * 64, offered.digest + "0", "../../etc"):
        with pytest.raises(RunUnknown):
            enrol.find_offer(site, text)


def test_forged_offers_are_left_out_and_noted(
    served: Coordinator, site: Path, offered: Study, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    served.submit(study("south"))
    rosa = keys.load_key(served.keys_of("rosa") / "researcher.key")
    certificate = (served.keys_of("rosa") / "researcher.pem").read_bytes()
    chief, stranger = served.home.coordinator_key, ec.generate_private_key(ec.SECP256R1())

    def offer(asked: Study, coordinator_key: Any = chief, researcher_key: Any = rosa, **changes: Any) -> pb.Offer:
        text = asked.canonical()
        made = pb.Offer(
            study=text,
            researcher="rosa",
            researcher_certificate=certificate,
            researcher_signature=keys.sign(researcher_key, keys.STUDY_SUBMIT, text),
            coordinator_signature=keys.sign(coordinator_key, keys.STUDY_OFFER, text),
        )
        for field, value in changes.items():
            setattr(made, field, value)
        return made

    foreign = keys.issue(keys.make_ca(stranger, "demo"), keys.make_csr(rosa, "rosa"), "rosa", "researcher", 30)
    good = study(site.name, "south", quorum=1)
    other = study(site.name)
    forged = [
        offer(other, coordinator_key=stranger),
        offer(other, researcher_key=stranger),
        offer(other, researcher="ruth"),
        offer(other, researcher_certificate=keys.certificate_pem(foreign)),
        offer(other, researcher_certificate=(site / "keys" / "site.pem").read_bytes()),
        offer(other, researcher_certificate=b""),
        offer(other, study=good.canonical()),
        offer(study("south")),  # genuine, but does not name this site
        offer(study(site.name, quorum=9)),  # contradicts itself
        pb.Offer(),
    ]
    monkeypatch.setattr(Caller, "offers", lambda _: [*forged, offer(good)])
    assert [found.digest for found in enrol.fetch_offers(site)] == [good.digest]
    assert kinds(site).count("offer-refused") == len(forged)
    assert caplog.text.count("not genuine") == len(forged)


def consent(site: Path, asked: Study, signer: keys.PrivateKey) -> Consent:
    offer = Offer(asked, "rosa", b"", b"", keys.sign(signer, keys.STUDY_OFFER, asked.canonical()), "")
    return Consent(offer, Statement(asked.digest, site.name, "approved", 5), b"signature")


def test_a_stored_consent_is_read_back_whole(served: Coordinator, tmp_path: Path) -> None:
    stored = consent(tmp_path, study("north"), served.home.coordinator_key)
    stored.store(tmp_path)
    found = Consent.open(tmp_path, stored.offer.digest)
    assert found == replace(stored, offer=replace(stored.offer, decision="approved"))


def test_a_study_put_in_place_without_the_coordinators_signature_is_forged(tmp_path: Path, served: Coordinator) -> None:
    asked = study("north")
    consent(tmp_path, asked, ec.generate_private_key(ec.SECP256R1())).store(tmp_path)
    with pytest.raises(OrderForged):
        approved(tmp_path, asked.digest, served.home.coordinator_key.public_key())


def test_the_coordinators_signature_is_looked_at_each_time_also_of_a_study_that_was_read_before(
    tmp_path: Path, served: Coordinator
) -> None:
    """The text of a study is parsed once in a process; that the coordinator stands for it is never remembered."""
    asked, trusted = study("north"), served.home.coordinator_key
    consent(tmp_path, asked, trusted).store(tmp_path)
    assert approved(tmp_path, asked.digest, trusted.public_key()) == asked
    consent(tmp_path, asked, ec.generate_private_key(ec.SECP256R1())).store(tmp_path)
    with pytest.raises(OrderForged):
        approved(tmp_path, asked.digest, trusted.public_key())
    consent(tmp_path, asked, trusted).store(tmp_path)
    with pytest.raises(OrderForged):
        approved(tmp_path, asked.digest, ec.generate_private_key(ec.SECP256R1()).public_key())
    declined = consent(tmp_path, asked, trusted)
    replace(declined, statement=replace(declined.statement, decision="declined")).store(tmp_path)
    with pytest.raises(StudyNotApproved):
        approved(tmp_path, asked.digest, trusted.public_key())


def test_a_changed_or_exchanged_consent_file_is_damaged(tmp_path: Path, served: Coordinator) -> None:
    one, two = study("north"), study("north", "south")
    for asked in (one, two):
        consent(tmp_path, asked, served.home.coordinator_key).store(tmp_path)
    path = tmp_path / "studies" / f"{one.digest}.json"
    good = path.read_text()
    for content in (
        "",
        "null",
        good[:-20],
        good.replace('\\"rounds\\":2', '\\"rounds\\":3'),
        good.replace('"version": 1', '"version": 0'),
        good.replace('"signature": "', '"signature": "zz'),
        (tmp_path / "studies" / f"{two.digest}.json").read_text(),
    ):
        assert content != good
        path.write_text(content)
        with pytest.raises(DocumentError, match="damaged"):
            approved(tmp_path, one.digest, served.home.coordinator_key.public_key())
    assert approved(tmp_path, two.digest, served.home.coordinator_key.public_key()) == two


@pytest.mark.parametrize("digest", ["", "..", "../../keys/site", "A" * 64, "a" * 63, "a" * 64 + "\n"])
def test_a_digest_from_outside_is_never_a_path(tmp_path: Path, served: Coordinator, digest: str) -> None:
    with pytest.raises(StudyNotApproved):
        approved(tmp_path, digest, served.home.coordinator_key.public_key())


def test_a_stranger_is_told_to_join(tmp_path: Path) -> None:
    for action in (lambda: enrol.fetch_offers(tmp_path), lambda: enrol.find_offer(tmp_path, "abcdef")):
        with pytest.raises(NotEnrolled) as caught:
            action()
        assert "Join first" in caught.value.remedy
    assert list(tmp_path.iterdir()) == []
