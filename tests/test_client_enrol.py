"""The site's half: joining against honest and hostile servers, offers, and decisions that hold here."""

import hashlib
import json
import socket
import ssl
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from coordinator import Coordinator, coordinator, free_port, study
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from typer.testing import CliRunner

from fl_client import enrol
from fl_client.cli import app
from fl_client.consent import Consent, Offer, approved, consents
from fl_client.readiness import findings
from fl_client.site import SiteFile
from fl_server import consortium
from fl_server.consortium import Consortium
from fl_server.roster import Home
from models.study import Study, read
from privacy import calls, keys
from privacy import consortium_pb2 as pb
from privacy.calls import Caller, Enrolment, InvitationLine, Statement
from privacy.errors import (
    DocumentError,
    InvitationRefused,
    IsocenterError,
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


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coordinator]:
    with coordinator(tmp_path_factory.mktemp("served")) as demo:
        for name in ("south", "west", "east"):
            demo.join(name)
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

    real = keys._write

    def write(path: Path, content: bytes, mode: int, *, replace: bool = True) -> None:
        if path.name == lost:
            raise Killed
        real(path, content, mode, replace=replace)

    line = str(served.home.invite(name, "site"))
    with monkeypatch.context() as patch:
        patch.setattr(keys, "_write", write)
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
    monkeypatch.setattr(calls, "HANDSHAKE_SECONDS", 0.3)
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


# Whose keys the study names


def signed_offer(served: Coordinator, asked: Study) -> pb.Offer:
    """An offer as a hostile coordinator can make it: whatever is in it, both signatures hold."""
    rosa, text = keys.load_key(served.keys_of("rosa") / "researcher.key"), asked.canonical()
    return pb.Offer(
        study=text,
        researcher="rosa",
        researcher_certificate=(served.keys_of("rosa") / "researcher.pem").read_bytes(),
        researcher_signature=keys.sign(rosa, keys.STUDY_SUBMIT, text),
        coordinator_signature=keys.sign(served.home.coordinator_key, keys.STUDY_OFFER, text),
    )


def masked(served: Coordinator, site: Path, title: str = "Masked", **roster: str) -> Study:
    """A masked study of this site with south and west, some of its keys exchanged."""
    asked = study(site.name, "south", "west", evaluate_only=["east"]).model_copy(
        update={"protection": "masked", "title": title}
    )
    whole = served.home.with_keys(asked)
    return whole.model_copy(update={"roster": {**whole.roster, **roster}})


def new_point() -> str:
    return keys.point_hex(ec.generate_private_key(ec.SECP256R1()).public_key())


Approve = Callable[..., tuple[int, str, str]]


@pytest.fixture
def approve(served: Coordinator, site: Path, monkeypatch: pytest.MonkeyPatch) -> Approve:
    """`fl-client approve` of an offered study: (exit code, screen, error). `typed`: what the person at it types."""

    def run(asked: Study, *words: str, typed: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(Caller, "offers", lambda _: [signed_offer(served, asked)])
        monkeypatch.setattr(Caller, "decide", lambda *_: None)
        result = CliRunner().invoke(app, ["approve", asked.digest, "--home", str(site), *words], input=typed)
        screen = " ".join(result.output.split())
        if isinstance(result.exception, IsocenterError):
            return 1, screen, f"{type(result.exception).__name__}: {result.exception} {result.exception.remedy}"
        assert isinstance(result.exception, SystemExit | None), result.exception
        return result.exit_code, screen, ""

    return run


def decided(site: Path, asked: Study) -> str | None:
    found = Consent.open(site, asked.digest)
    return found.statement.decision if found else None


def test_only_a_study_with_this_sites_own_key_can_be_approved(
    served: Coordinator, site: Path, approve: Approve
) -> None:
    good = masked(served, site)
    own, south = good.roster[site.name], good.roster["south"]
    cases = [
        (good.model_copy(update={"roster": {}}), "names no key for"),
        (masked(served, site, **{site.name: new_point()}), f"another key for {site.name} than"),
        (masked(served, site, **{site.name: south, "south": own}), f"another key for {site.name} than"),
        (masked(served, site, south=own), "one key for several sites"),
        (masked(served, site, west=south), "one key for several sites"),
    ]
    for asked, sentence in cases:
        code, screen, error = approve(asked, "--yes")
        assert code == 1 and error.startswith("TrustError: ") and sentence in error
        assert "not approve it" in error and "Study" not in screen
        with pytest.raises(TrustError, match=sentence):  # nor by the function behind the command
            enrol.decide(site, Offer(asked, "rosa", b"", b"", b"", ""), "approved")
        assert decided(site, asked) is None
    incomplete = {name: key for name, key in good.roster.items() if name != "west"}
    assert "RunUnknown" in approve(good.model_copy(update={"roster": incomplete}))[2]  # left out as contradictory
    assert approve(good, "--yes")[0] == 0 and decided(site, good) == "approved"


def test_a_study_without_keys_can_still_be_declined(served: Coordinator, site: Path) -> None:
    asked = masked(served, site).model_copy(update={"roster": {}})
    with pytest.raises(TrustError, match="no study"):  # the coordinator does not have it; here it holds
        enrol.decide(site, Offer(asked, "rosa", b"", b"", b"", ""), "declined")
    assert decided(site, asked) == "declined"


def test_approving_shows_who_takes_part_with_fingerprints(served: Coordinator, site: Path, approve: Approve) -> None:
    asked = masked(served, site)
    code, screen, _ = approve(asked, typed="n\n")
    assert code == 1 and decided(site, asked) is None
    for name in ("south", "west", "east"):
        numbers = served.home.roster.party(name).public_key.public_numbers()
        point = bytes([2 + numbers.y % 2]) + numbers.x.to_bytes(32, "big")
        digits = hashlib.sha256(point).hexdigest()
        assert f"{name} {digits[:4]} {digits[4:8]} {digits[8:12]} {digits[12:16]} " in screen
    assert screen.count("evaluates only") == 1
    own = keys.load_key(site / "keys" / "site.key").public_key()
    membership = next(finding for finding in findings(site) if finding.subject == "membership")
    assert membership.good and membership.sentence.endswith(enrol.fingerprint(keys.point_hex(own)))


def test_approving_says_who_sees_what_in_plain_words(served: Coordinator, site: Path, approve: Approve) -> None:
    path, asked = site / "site.yaml", masked(served, site)
    path.write_text(path.read_text().replace("least_protection: masked", "least_protection: plain"))
    said = {
        "masked": "the coordinator sees only the sum of at least 3 sites",
        "sealed": "the coordinator sees YOUR site's own update and histograms; nobody can read them on the way",
        "plain": "YOUR site's own update and histograms, and so does whoever can look into its server",
    }
    for protection, sentence in said.items():
        for figures, word in ((True, "your own test AUROC"), (False, "none of your site alone")):
            evaluation = asked.evaluation.model_copy(update={"site_figures": figures})
            shown = asked.model_copy(update={"protection": protection, "evaluation": evaluation})
            code, screen, _ = approve(shown, typed="n\n")
            assert code == 1 and sentence in screen and f"(protection: {protection})" in screen and word in screen
            assert [other for other in said.values() if other in screen] == [sentence]


@pytest.mark.parametrize("least", ["masked", "sealed", "plain"])
def test_a_study_less_protected_than_the_policy_wants_is_refused(
    served: Coordinator, site: Path, approve: Approve, least: str
) -> None:
    path, order = site / "site.yaml", ["masked", "sealed", "plain"]
    path.write_text(path.read_text().replace("least_protection: masked", f"least_protection: {least}"))
    for protection in order:
        asked = masked(served, site).model_copy(update={"protection": protection})
        code, screen, error = approve(asked, "--yes")
        if order.index(protection) <= order.index(least):
            assert code == 0 and decided(site, asked) == "approved"
            continue
        assert code == 1 and decided(site, asked) is None
        assert error.startswith("PolicyForbids: ") and f"policy.least_protection in site.yaml is {least}" in error
        assert "would see this site's own model update" in error
        assert ("look into its server" in error) == (protection == "plain")
        assert "Seen by" in screen  # the person sees what was refused


def test_a_peer_whose_key_changed_has_to_be_asked_by_telephone(
    served: Coordinator, site: Path, approve: Approve
) -> None:
    first, other = masked(served, site), new_point()
    assert approve(first, "--yes")[0] == 0
    again = masked(served, site, "The same keys again")
    code, screen, _ = approve(again, "--yes")
    assert code == 0 and "changed since" not in screen
    hostile = masked(served, site, "Other key", south=other)
    approval = Consent.open(site, again.digest)
    assert approval is not None
    day = time.strftime("%Y-%m-%d", time.gmtime(approval.statement.time_ms / 1000))
    code, screen, error = approve(hostile, "--yes")
    assert code == 1 and f"The key of south changed since {day}" in screen and "ask them by telephone" in screen
    assert error.startswith("TrustError: the key of south changed, and --yes cannot answer for that")
    for typed in ("", "y\n", "south\n", enrol.fingerprint(first.roster["south"]) + "\n", "\n"):
        code, screen, error = approve(hostile, typed=typed)
        assert code == 1 and decided(site, hostile) is None
    right = enrol.fingerprint(other)
    assert approve(hostile, typed=f"{right}\nn\n")[0] == 1 and decided(site, hostile) is None
    assert approve(hostile, typed=f" {right.upper().replace(' ', '')} \ny\n")[0] == 0
    assert decided(site, hostile) == "approved"
    # From now on the new key is the known one, and the old one would be the change.
    assert approve(masked(served, site, "Once more", south=other), "--yes")[0] == 0
    assert approve(masked(served, site, "Back to the old key"), "--yes")[0] == 1


def test_each_changed_key_is_asked_for(served: Coordinator, site: Path, approve: Approve) -> None:
    assert approve(masked(served, site), "--yes")[0] == 0
    asked = masked(served, site, "Two", south=new_point(), east=new_point())
    assert "the key of south, east changed" in approve(asked, "--yes")[2]
    right = [enrol.fingerprint(asked.roster[name]) for name in ("south", "east")]
    assert "study names for east" in approve(asked, typed=f"{right[0]}\n{right[0]}\n")[2]
    assert approve(asked, typed=f"{right[0]}\n{right[1]}\ny\n")[0] == 0


def test_a_declined_study_teaches_no_keys(served: Coordinator, site: Path, approve: Approve) -> None:
    """Otherwise an attacker's key would become the known one by the very refusal of it."""
    good, hostile = masked(served, site), masked(served, site, "Other key", south=new_point())
    assert approve(good, "--yes")[0] == 0
    enrol.decide(site, Offer(hostile, "rosa", b"", b"", b"", ""), "declined")
    assert approve(masked(served, site, "Good again"), "--yes")[0] == 0
    assert approve(masked(served, site, "Bad again", south=hostile.roster["south"]), "--yes")[0] == 1


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
        good.replace('"version": 1', '"version": 2'),
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
