"""The consortium service over real sockets: who may call what, and what hostile callers get."""

import json
import logging
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from coordinator import (
    Coordinator,
    aggregator_of,
    answer_nonsense,
    coordinator,
    free_port,
    point_of,
    settings,
    study,
    tls_version,
    with_roster,
)
from cryptography.hazmat.primitives.asymmetric import ec

from fl_server import consortium
from fl_server.roster import Home
from models.study import Study
from privacy import calls, keys
from privacy import consortium_pb2 as pb
from privacy.calls import SERVICE, Caller, InvitationLine, Signed, details_of, error_of, join
from privacy.errors import (
    ClockSkewed,
    DocumentError,
    InvitationRefused,
    IsocenterError,
    MessageMalformed,
    NotEnrolled,
    RunError,
    RunUnknown,
    SignatureInvalid,
    StudyConflict,
    TooFewApprovals,
    TrustError,
    Unreachable,
    WrongAuthority,
    public_codes,
)
from privacy.journal import verify
from privacy.statements import Statement

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coordinator]:
    """Three sites, two researchers, nothing offered yet. Shared: each test brings its own study."""
    with coordinator(tmp_path_factory.mktemp("served")) as demo:
        for name in ("north", "south", "west"):
            demo.join(name)
        for name in ("rosa", "ruth"):
            demo.join(name, "researcher")
        yield demo


@pytest.fixture
def submitted(served: Coordinator, request: pytest.FixtureRequest) -> Study:
    """A study of its own for the test, submitted by rosa."""
    title = request.node.name[:150]
    asked = study("north", "south", quorum=2, evaluate_only=["west"]).model_copy(update={"title": title})
    return served.submit(asked)


class Raw:
    """Calls with bytes and metadata as given: what a hostile caller can do."""

    def __init__(self, served: Coordinator) -> None:
        credentials = grpc.ssl_channel_credentials(served.home.ca_pem)
        self.channel = grpc.secure_channel(served.address, credentials)

    def __call__(self, method: str, request: bytes, metadata: Any = ()) -> bytes:
        return bytes(self.channel.unary_unary(f"/{SERVICE}/{method}")(request, timeout=10, metadata=metadata))

    def refused(self, method: str, request: bytes, metadata: Any = ()) -> IsocenterError:
        with pytest.raises(grpc.RpcError) as caught:
            self(method, request, metadata)
        error = error_of(str(caught.value.details()))
        assert error is not None, caught.value
        return error


@pytest.fixture
def raw(served: Coordinator) -> Iterator[Raw]:
    caller = Raw(served)
    yield caller
    caller.channel.close()


def signed(served: Coordinator, name: str, method: str, request: bytes, key: Any = None) -> Signed:
    role = "researcher" if name in ("rosa", "ruth") else "site"
    key = key or keys.load_key(served.keys_of(name) / f"{role}.key")
    return Signed.make(key, name, f"/{SERVICE}/{method}", request)


# Transport


def test_only_tls_13_is_spoken(tmp_path: Path) -> None:
    """In a process of its own, with the imports of `fl-server`: gRPC reads what forbids TLS 1.2 when it is loaded."""
    program = (
        "import sys; from pathlib import Path; from fl_server import cli, consortium; from fl_server.roster import Home;"
        "home = Home.open(Path(sys.argv[1])); hooks = consortium.Hooks(lambda *_: None, lambda *_: '');"
        "server = consortium.serve(home, hooks); print('ready', flush=True); sys.stdin.read(); server.stop(0)"
    )
    home = Home.found(tmp_path / "consortium", settings())
    command = [sys.executable, "-c", program, str(home.root)]
    address = f"127.0.0.1:{home.settings.service_port}"
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert tls_version(address, home.ca_pem, ssl.TLSVersion.TLSv1_3) == "TLSv1.3"
        with pytest.raises((ssl.SSLError, ConnectionError)):
            tls_version(address, home.ca_pem, ssl.TLSVersion.TLSv1_2)


def test_plaintext_gets_no_answer(served: Coordinator) -> None:
    with grpc.insecure_channel(served.address) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(f"/{SERVICE}/Offers")(b"", timeout=5)
    assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def test_nothing_else_is_served(served: Coordinator, raw: Raw) -> None:
    for method in (
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        f"/{SERVICE}/Shutdown",
        f"/{SERVICE}//Offers",
        f"/{SERVICE}/../Offers",
        f"/{SERVICE.lower()}/Offers",
    ):
        with pytest.raises(grpc.RpcError) as caught:
            raw.channel.unary_unary(method)(b"", timeout=5)
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED, method


def test_the_callers_tell_apart_why_nobody_answers(served: Coordinator, tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    own, port = served.home.ca_pem, served.address.partition(":")[2]
    foreign = keys.certificate_pem(keys.make_ca(key, "demo").certificate)
    cases: list[tuple[str, bytes, type[IsocenterError], str]] = [
        (f"127.0.0.1:{free_port()}", own, Unreachable, "connection refused"),
        ("no-such-host.invalid:1234", own, Unreachable, "resolved"),
        (served.address, foreign, WrongAuthority, "not from this consortium"),
        (f"localhost:{port}", own, WrongAuthority, "another host"),
    ]
    for address, ca_pem, kind, sentence in cases:
        with Caller(address, ca_pem, "north", key) as caller, pytest.raises(kind, match=sentence):
            caller.offers()
    with socket.create_server(("127.0.0.1", 0)) as mute:
        threading.Thread(target=answer_nonsense, args=(mute,), daemon=True).start()
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        with Caller(address, served.home.ca_pem, "north", key) as caller, pytest.raises(Unreachable, match="TLS"):
            caller.offers()


def test_a_taken_port_is_a_sentence(served: Coordinator, tmp_path: Path) -> None:
    home = Home.found(tmp_path / "second", settings(service_port=served.home.settings.service_port))
    with pytest.raises(DocumentError, match="cannot be listened on"):
        consortium.serve(home, served.hooks())


# Enrolment


def test_a_site_is_registered_once_and_its_key_stays_there(served: Coordinator) -> None:
    asked = [(name, role) for name, role, _ in served.enrolled]
    assert asked.count(("north", "site")) == 1
    assert ("rosa", "researcher") not in asked
    party = served.home.roster.party("north")
    own = keys.load_key(served.keys_of("north") / "site.key")
    assert party.public_key == own.public_key()
    assert party.node_id is not None
    assert party.node_id > 2**63
    private = own.private_numbers().private_value.to_bytes(32, "big")
    for path in served.home.root.rglob("*"):
        assert not path.is_file() or private not in path.read_bytes()


def test_a_failed_registration_is_made_good_by_joining_again(tmp_path: Path, caplog: Any) -> None:
    with coordinator(tmp_path) as demo:
        line = str(demo.home.invite("north", "site"))
        demo.enrol_error = OSError(f"cannot reach {demo.home.root}/superlink")
        with pytest.raises(IsocenterError) as caught:
            join(line, demo.keys_of("north"))
        assert caught.value.code == "internal"
        assert str(tmp_path) not in str(caught.value)
        demo.enrol_error = None
        assert join(line, demo.keys_of("north")).name == "north"
        assert demo.home.roster.party("north").node_id == 2**64 - 1
        assert [name for name, _, _ in demo.enrolled] == ["north"]


def test_enrol_refuses_what_the_invitation_does_not_say(served: Coordinator, raw: Raw) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    line = served.home.invite("late", "site")
    csr = keys.make_csr(key, "late")
    good = pb.EnrolRequest(name="late", role="site", token=line.token, csr=csr)
    for field, value in [
        ("token", InvitationLine.new_token()),
        ("token", ""),
        ("token", "'; DROP TABLE parties; --"),
        ("name", "later"),
        ("name", "../../x"),
        ("role", "researcher"),
        ("role", "server"),
        ("csr", b""),
        ("csr", csr * 2000),
    ]:
        changed = pb.EnrolRequest()
        changed.CopyFrom(good)
        setattr(changed, field, value)
        assert isinstance(raw.refused("Enrol", changed.SerializeToString()), TrustError | MessageMalformed)
    reply = pb.EnrolReply.FromString(raw("Enrol", good.SerializeToString()))
    keys.check_issued(
        keys.load_certificate(served.home.ca_pem), keys.load_certificate(reply.certificate), "late", "site"
    )
    other = pb.EnrolRequest(
        name="late", role="site", token=line.token, csr=keys.make_csr(ec.generate_private_key(ec.SECP256R1()), "late")
    )
    error = raw.refused("Enrol", other.SerializeToString())
    assert isinstance(error, InvitationRefused)
    assert "used before" in str(error)


# The gate

Change = Callable[[dict[str, Any]], None]


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda m: m.clear(), MessageMalformed),
        (lambda m: m.pop("isocenter-name"), MessageMalformed),
        (lambda m: m.pop("isocenter-time"), MessageMalformed),
        (lambda m: m.pop("isocenter-nonce"), MessageMalformed),
        (lambda m: m.pop("isocenter-signature-bin"), MessageMalformed),
        (lambda m: m.update({"isocenter-name": "North"}), MessageMalformed),
        (lambda m: m.update({"isocenter-name": "../north"}), MessageMalformed),
        (lambda m: m.update({"isocenter-time": "1e9"}), MessageMalformed),
        (lambda m: m.update({"isocenter-time": "-1"}), MessageMalformed),
        (lambda m: m.update({"isocenter-time": "9" * 13}), MessageMalformed),
        (lambda m: m.update({"isocenter-nonce": "ab"}), MessageMalformed),
        (lambda m: m.update({"isocenter-signature-bin": b""}), MessageMalformed),
        (lambda m: m.update({"isocenter-signature-bin": b"x" * 129}), MessageMalformed),
        (lambda m: m.update({"isocenter-signature-bin": b"x" * 70}), SignatureInvalid),
        (lambda m: m.update({"isocenter-nonce": "0" * 32}), SignatureInvalid),
        (lambda m: m.update({"isocenter-time": str(int(m["isocenter-time"]) + 1)}), SignatureInvalid),
        (lambda m: m.update({"isocenter-name": "south"}), SignatureInvalid),
        (lambda m: m.update({"isocenter-name": "nobody"}), NotEnrolled),
    ],
)
def test_a_call_that_is_not_wholly_signed_is_refused(
    served: Coordinator, raw: Raw, change: Change, kind: type[IsocenterError]
) -> None:
    metadata = dict(signed(served, "north", "Offers", b"").metadata())
    change(metadata)
    assert isinstance(raw.refused("Offers", b"", tuple(metadata.items())), kind)


def test_a_signature_holds_for_its_method_and_request_only(served: Coordinator, raw: Raw, submitted: Study) -> None:
    launch = pb.LaunchRequest(digest=submitted.digest).SerializeToString()
    mine = signed(served, "rosa", "Launch", launch).metadata()
    other = pb.LaunchRequest(digest="0" * 64).SerializeToString()
    assert isinstance(raw.refused("Launch", other, mine), SignatureInvalid)
    assert isinstance(raw.refused("Studies", b"", signed(served, "rosa", "Offers", b"").metadata()), SignatureInvalid)
    # The same message spelled otherwise (a repeated field): equal to protobuf, but not what was signed.
    assert isinstance(raw.refused("Launch", launch + launch, mine), SignatureInvalid)
    assert isinstance(raw.refused("Launch", launch, mine), TooFewApprovals)  # and as signed it gets through the gate


def test_double_metadata_is_refused(served: Coordinator, raw: Raw) -> None:
    metadata = signed(served, "north", "Offers", b"").metadata()
    for extra in metadata:
        assert isinstance(raw.refused("Offers", b"", (*metadata, extra)), MessageMalformed)


def test_another_key_cannot_speak_for_a_name(served: Coordinator, raw: Raw) -> None:
    for key in (ec.generate_private_key(ec.SECP256R1()), keys.load_key(served.keys_of("south") / "site.key")):
        assert isinstance(
            raw.refused("Offers", b"", signed(served, "north", "Offers", b"", key).metadata()), SignatureInvalid
        )


def test_a_call_is_good_once(served: Coordinator, raw: Raw) -> None:
    metadata = signed(served, "north", "Offers", b"").metadata()
    raw("Offers", b"", metadata)
    error = raw.refused("Offers", b"", metadata)
    assert isinstance(error, SignatureInvalid)
    assert "once" in str(error)


@pytest.mark.parametrize(("shift_s", "word"), [(-121, "behind"), (121, "ahead"), (-100_000, "behind")])
def test_a_wrong_clock_has_its_own_message(
    served: Coordinator, monkeypatch: pytest.MonkeyPatch, shift_s: int, word: str
) -> None:
    class Clock:
        time = staticmethod(lambda: time.time() + shift_s)

    monkeypatch.setattr(calls, "time", Clock)
    with served.caller("north") as caller, pytest.raises(ClockSkewed, match=rf"1\d+ s {word}") as caught:
        caller.offers()
    assert "clock" in caught.value.remedy


@pytest.mark.parametrize("shift_s", [-110, 110])
def test_a_slightly_wrong_clock_is_no_matter(
    served: Coordinator, monkeypatch: pytest.MonkeyPatch, shift_s: int
) -> None:
    class Clock:
        time = staticmethod(lambda: time.time() + shift_s)

    monkeypatch.setattr(calls, "time", Clock)
    with served.caller("north") as caller:
        assert isinstance(caller.offers(), list)


def test_each_call_is_for_one_role(served: Coordinator, raw: Raw) -> None:
    for method, roles in consortium.CALLERS.items():
        if len(roles) == 2:
            continue
        wrong = "rosa" if roles == ("site",) else "north"
        error = raw.refused(method, b"", signed(served, wrong, method, b"").metadata())
        assert type(error) is TrustError
        assert "not for" in str(error)
    assert set(consortium.CALLERS) | {"Enrol"} == {m.name for m in pb.DESCRIPTOR.services_by_name["Consortium"].methods}


def test_garbage_and_oversized_requests_are_refused_and_the_service_stays_up(served: Coordinator, raw: Raw) -> None:
    for body in (b"\xff" * 100, b"\x0a\xff\xff\xff\xff\x0f", os.urandom(5000)):
        assert isinstance(
            raw.refused("Submit", body, signed(served, "rosa", "Submit", body).metadata()), IsocenterError
        )
        assert isinstance(raw.refused("Enrol", body), IsocenterError)
    big = b"\0" * (calls.REQUEST_BYTES_MAX + 1)
    with pytest.raises(grpc.RpcError) as caught:
        raw("Submit", big, signed(served, "rosa", "Submit", big).metadata())
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    with pytest.raises(grpc.RpcError):
        raw("Offers", b"", (("isocenter-name", "a" * 40_000),))
    with served.caller("north") as caller:
        caller.offers()


def test_an_unforeseen_error_tells_the_caller_nothing(
    served: Coordinator, submitted: Study, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _approve(served, submitted)
    secret = f"{served.home.root}/superlink is in trouble"
    for error in (RuntimeError(secret), RunError(secret), DocumentError(secret), IsocenterError("patient ZZTEST")):
        monkeypatch.setattr(served, "launch_error", error)
        with served.caller("rosa") as caller, caplog.at_level(logging.ERROR), pytest.raises(IsocenterError) as caught:
            caller.launch(submitted.digest)
        assert str(caught.value) == "the coordinator could not do this; its log says why"
        assert str(error) in caplog.text
        caplog.clear()
    monkeypatch.setattr(served, "launch_error", RunError("run r1 is running", remedy="Watch it."))
    with served.caller("rosa") as caller, pytest.raises(RunError, match="run r1 is running") as known:
        caller.launch(submitted.digest)
    assert known.value.remedy == "Watch it."


def test_every_code_comes_back_as_its_class_and_nothing_prints_control_characters() -> None:
    for code in public_codes():
        error = error_of(f"{code}: a sentence")
        assert error is not None
        assert (error.code, str(error)) == (code, "a sentence")
    hostile = DocumentError("red\x1b[31m\r\n\u202eevil\u2028" + "x" * 5000)
    back = error_of(details_of(hostile))
    assert str(back).startswith("red [31m evil xxx")
    assert len(str(back)) <= calls.SENTENCE_CHARACTERS_MAX
    for details in ("", "no code", "made-up: x", "Trust: x", ": x"):
        assert error_of(details) is None


# Studies


def _approve(served: Coordinator, asked: Study, *names: str) -> None:
    for name in names or asked.all_sites:
        served.decide(name, asked.digest, "approved", time.time_ns() // 1_000_000)


def test_a_study_goes_from_submission_to_launch(served: Coordinator, submitted: Study) -> None:
    with served.caller("rosa") as rosa:
        with pytest.raises(TooFewApprovals, match="not answered: north, south, west"):
            rosa.launch(submitted.digest)
        _approve(served, submitted, "north", "west")
        served.decide("south", submitted.digest, "declined", 1)
        with pytest.raises(TooFewApprovals, match=r"quorum is 2.*approved: north; declined: south"):
            rosa.launch(submitted.digest)  # west only evaluates: it does not count
        _approve(served, submitted, "south")
        run_id = rosa.launch(submitted.digest)
        served.run_folder(run_id, submitted.digest)
        [state] = [state for state in rosa.studies() if state.digest == submitted.digest]
    assert served.launched[-1] == (submitted.digest, "rosa")
    assert (state.name, state.quorum) == ("opacity", 2)
    assert list(state.approved) == ["north", "south", "west"]
    assert [(run.run_id, run.state) for run in state.runs] == [(run_id, "running")]
    with served.caller("west") as west:
        [offer] = [offer for offer in west.offers() if offer.study == submitted.canonical()]
    assert (offer.decision, offer.researcher) == ("approved", "rosa")
    keys.verify(served.home.coordinator_key.public_key(), keys.STUDY_OFFER, offer.study, offer.coordinator_signature)
    assert verify(served.home.root / "journal.jsonl") > 0
    kinds = [json.loads(line)["kind"] for line in (served.home.root / "journal.jsonl").read_bytes().splitlines()]
    assert {"founded", "invited", "enrolled", "study-offered", "decision", "launched"} <= set(kinds)


def test_a_submission_is_checked(served: Coordinator, submitted: Study, raw: Raw) -> None:
    with served.caller("rosa") as caller:
        with pytest.raises(NotEnrolled, match="east, mars") as missing:
            caller.submit(study("north", "east", "mars").canonical())
        assert "participation" in missing.value.remedy  # the researcher's remedy, not a site's
        with pytest.raises(StudyConflict, match="quorum 5"):
            caller.submit(study("north", quorum=5).canonical())
        for text in (b"", b"{}", b"[" * 100_000, submitted.canonical() + b" ", submitted.canonical()[:-1], b"\xff"):
            with pytest.raises(DocumentError):
                caller.submit(text)
        assert caller.submit(submitted.canonical()) == submitted.digest
    with served.caller("ruth") as caller, pytest.raises(TrustError, match="another researcher"):
        caller.submit(submitted.canonical())
    key = keys.load_key(served.keys_of("rosa") / "researcher.key")
    for label, body in [(keys.STUDY_OFFER, submitted.canonical()), (keys.STUDY_SUBMIT, study("north").canonical())]:
        request = pb.SubmitRequest(study=submitted.canonical(), signature=keys.sign(key, label, body))
        data = request.SerializeToString()
        assert isinstance(
            raw.refused("Submit", data, signed(served, "rosa", "Submit", data).metadata()), SignatureInvalid
        )


def test_a_researcher_learns_the_keys_that_a_study_has_to_name(served: Coordinator) -> None:
    with served.caller("rosa") as caller:
        assert caller.roster(["west", "north"]) == (
            {name: point_of(served, name) for name in ("north", "west")},
            aggregator_of(served),
        )
        assert caller.roster([])[0] == {}
        with pytest.raises(NotEnrolled, match=r"not enrolled here: mars, rosa$") as missing:  # a researcher is no site
            caller.roster(["mars", "north", "rosa"])
        assert "participation" in missing.value.remedy


def test_a_study_is_offered_with_exactly_the_enrolled_keys(served: Coordinator) -> None:
    good = served.home.with_keys(study("north", "south", "west"))
    stranger = keys.point_hex(ec.generate_private_key(ec.SECP256R1()).public_key())
    north, south = point_of(served, "north"), point_of(served, "south")
    cases = [
        (study("north", "south", "west"), "north, south, west and the key that this coordinator"),
        (with_roster(good, south=stranger), "enrolled here for south$"),
        (with_roster(good, north=south, south=north), "enrolled here for north, south$"),
        (with_roster(good, west=None), "keys of other sites"),
        (with_roster(good, mars=stranger), "keys of other sites"),
        (with_roster(good, aggregator=""), "does not name the key that this coordinator"),
        (with_roster(good, aggregator="0" * 64), "does not name the key that this coordinator"),
    ]
    with served.caller("rosa") as caller:
        before = [state.digest for state in caller.studies()]
        for asked, sentence in cases:
            with pytest.raises(StudyConflict, match=sentence) as caught:
                caller.submit(asked.canonical())
            assert caught.value.remedy
        assert [state.digest for state in caller.studies()] == before
        assert caller.submit(good.canonical()) == good.digest


def test_a_study_to_a_key_that_was_lost_is_not_launched(served: Coordinator) -> None:
    old = with_roster(served.home.with_keys(study("north", "south")), aggregator="0" * 64)
    served.home.roster.add_study(old, "rosa", b"r", b"c")
    _approve(served, old)
    with served.caller("rosa") as caller, pytest.raises(StudyConflict, match="the key that this coordinator opens"):
        caller.launch(old.digest)
    assert old.digest not in [digest for digest, _ in served.launched]


def test_a_decision_is_the_sites_own(served: Coordinator, submitted: Study) -> None:
    north = keys.load_key(served.keys_of("north") / "site.key")

    def send(statement: bytes, key: keys.PrivateKey = north, label: bytes = keys.STUDY_DECISION) -> None:
        with served.caller("north") as caller:
            caller.decide(statement, keys.sign(key, label, statement))

    good = Statement(submitted.digest, "north", "approved", 5)
    with pytest.raises(SignatureInvalid, match="itself only"):
        send(Statement(submitted.digest, "south", "approved", 5).body())
    with pytest.raises(SignatureInvalid):
        send(good.body(), keys.load_key(served.keys_of("south") / "site.key"))
    with pytest.raises(SignatureInvalid):
        send(good.body(), label=keys.STUDY_OFFER)
    with pytest.raises(TrustError, match="no study"):
        send(Statement("0" * 64, "north", "approved", 5).body())
    for body in (
        b"",
        b"{}",
        b"null",
        b"[" * 100_000,
        good.body() + b"\n",
        good.body().replace(b"approved", b"perhaps"),
        good.body().replace(b'"time_ms":5', b'"time_ms":-5'),
        good.body().replace(b'"time_ms":5', b'"time_ms":5.0'),
        good.body().replace(b'"time_ms":5', b'"time_ms":true'),
        good.body().replace(b'"version":1', b'"version":2'),
        good.body().replace(b'"digest":"', b'"digest":"/'),
        good.body().replace(f'"{submitted.digest}"'.encode(), b'["x"]'),
    ):
        with pytest.raises(MessageMalformed):
            send(body)
    assert served.home.roster.decisions(submitted.digest) == {}
    send(good.body())
    send(good.body())
    assert served.home.roster.decisions(submitted.digest) == {"north": "approved"}


def test_researchers_see_their_own_only(served: Coordinator, submitted: Study, tmp_path: Path) -> None:
    served.run_folder("own-1", submitted.digest, "complete")
    (served.home.runs / "own-1" / "results.json").write_text("{}")
    (served.home.runs / "own-1" / "events.jsonl").write_text('{"event":"finished"}\n')
    with served.caller("ruth") as ruth:
        assert submitted.digest not in [state.digest for state in ruth.studies()]
        for attempt in (
            lambda: ruth.launch(submitted.digest),
            lambda: list(ruth.watch("own-1")),
            lambda: ruth.results("own-1", tmp_path),
        ):
            with pytest.raises(RunUnknown) as foreign:
                attempt()
            assert "opacity" not in str(foreign.value)
    with served.caller("rosa") as rosa:
        assert [text for _, text in rosa.watch("own-1")] == ['{"event":"finished"}']
        with pytest.raises(RunUnknown):
            rosa.launch("0" * 64)


# Runs


@pytest.mark.parametrize(
    "run_id", ["", ".", "..", "../own", "a/b", "/etc", "a\0b", "A", "a" * 65, "keys", "nothing-here"]
)
def test_a_run_id_is_never_a_path(served: Coordinator, submitted: Study, run_id: str, tmp_path: Path) -> None:
    planted = served.home.root / "own"
    planted.mkdir(exist_ok=True)
    (planted / "run.json").write_text(json.dumps({"digest": submitted.digest, "state": "complete"}))
    (planted / "events.jsonl").write_text('{"event":"finished"}\n')
    with served.caller("rosa") as caller:
        with pytest.raises(RunUnknown):
            list(caller.watch(run_id))
        with pytest.raises(RunUnknown):
            caller.results(run_id, tmp_path)


def test_watch_follows_whole_lines_until_the_end(served: Coordinator, submitted: Study) -> None:
    folder = served.run_folder("watch-1", submitted.digest, "queued")
    received: list[tuple[int, str]] = []

    def watch() -> None:
        with served.caller("rosa") as caller:
            received.extend(caller.watch("watch-1", first=1))

    watcher = threading.Thread(target=watch)
    watcher.start()
    time.sleep(0.3)  # it waits although there is no file yet
    with (folder / "events.jsonl").open("w") as file:
        for part in (
            '{"event":"started"}\n{"event":',
            '"round_done","round":1}\n',
            "not json\n",
            '{"event":"finished"}',
        ):
            file.write(part)
            file.flush()
            time.sleep(0.25)
        assert len(received) == 2  # the ending event is not whole yet
        file.write("\n{}\n")
    watcher.join(10)
    assert received == [(1, '{"event":"round_done","round":1}'), (2, "not json"), (3, '{"event":"finished"}')]


def test_watch_ends_with_a_run_that_left_no_last_event(served: Coordinator, submitted: Study) -> None:
    folder = served.run_folder("watch-2", submitted.digest)
    (folder / "events.jsonl").write_text('{"event":"started"}\n')
    served.set_state("watch-2", submitted.digest, "failed")
    served.run_folder("watch-3", submitted.digest, "stopped")
    with served.caller("rosa") as caller:
        assert [number for number, _ in caller.watch("watch-2")] == [0]
        assert list(caller.watch("watch-3")) == []


def test_watchers_are_bounded_and_leave_room_for_other_calls(served: Coordinator, submitted: Study) -> None:
    folder = served.run_folder("watch-4", submitted.digest)
    (folder / "events.jsonl").write_text('{"event":"started"}\n')
    with served.caller("rosa") as caller:
        streams = [caller.watch("watch-4") for _ in range(consortium.WATCHERS_MAX)]
        assert [next(stream)[0] for stream in streams] == [0] * consortium.WATCHERS_MAX
        with pytest.raises(RunError, match="too many") as caught:
            next(caller.watch("watch-4"))
        assert "minute" in caught.value.remedy
        assert caller.studies()
        for stream in streams:
            stream.close()  # type: ignore[attr-defined]
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:  # the places come back when the server has noticed
            try:
                assert next(caller.watch("watch-4"))[0] == 0
                break
            except RunError:
                time.sleep(0.1)
        else:
            pytest.fail("closed watchers kept their places")


def test_results_are_the_named_files_and_arrive_as_they_are(
    served: Coordinator, submitted: Study, tmp_path: Path
) -> None:
    folder = served.run_folder("results-1", submitted.digest, "complete")
    with served.caller("rosa") as caller, pytest.raises(RunError, match="no results yet"):
        caller.results("results-1", tmp_path / "none")
    content = {"results.json": b'{"version":1}', "model.safetensors": os.urandom(700_001), "card.json": b""}
    for name, data in {**content, "checkpoint.safetensors": b"x", "study.json": b"{}"}.items():
        (folder / name).write_bytes(data)
    with served.caller("rosa") as caller:
        stored = caller.results("results-1", tmp_path / "out")
    assert {path.name: path.read_bytes() for path in stored} == content
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(content)


@pytest.mark.parametrize(
    "chunks",
    [
        [pb.Chunk(name="../evil", data=b"x", sha256="0" * 64)],
        [pb.Chunk(name="/etc/passwd", sha256="0" * 64)],
        [pb.Chunk(name="results.json", data=b"x")],
        [pb.Chunk(name="results.json", data=b"x", sha256="0" * 64)],
        [pb.Chunk(name="results.json", sha256=keys.digest(b"")), pb.Chunk(name="results.json", data=b"more")],
        [
            pb.Chunk(name="card.json", data=b"a"),
            pb.Chunk(name="results.json", sha256=keys.digest(b"")),
            pb.Chunk(name="card.json", sha256=keys.digest(b"a")),
        ],
    ],
)
def test_a_hostile_coordinator_writes_no_other_files(chunks: list[pb.Chunk], tmp_path: Path) -> None:
    with pytest.raises(MessageMalformed):
        calls._store(iter(chunks), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
