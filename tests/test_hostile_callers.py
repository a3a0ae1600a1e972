"""Hostile callers at the public port of a real coordinator: who they are, how slow, how many. After each of them an honest
site is answered. What they may ask is in `test_hostile_gateway.py`.
"""

import contextlib
import datetime as dt
import json
import re
import resource
import signal
import socket
import ssl
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest
from certificates import authority_of, certificate
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.control_pb2 import ListNodesRequest
from flwr.proto.fleet_pb2 import PullMessagesRequest
from gate import BEAT, LIMITS, PATIENCE_S, Gate, code, flowers, opened, request, status, whole

from fl_server.control import control
from privacy import journal, keys, parcels
from privacy.calls import join


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    with opened(tmp_path_factory.mktemp("gate")) as served:
        yield served


@pytest.fixture(autouse=True)
def afterwards(gate: Gate) -> Iterator[None]:
    """Whatever was tried, the service is up, and the honest site is answered."""
    yield
    if gate.process.poll() is None:
        gate.honest()
        assert gate.process.poll() is None


# Who


def strangers(gate: Gate) -> dict[str, Callable[[], ssl.SSLContext]]:
    """Those who do not get past the handshake."""
    authority, north = authority_of(gate.home), gate.key()
    foreign = keys.make_ca(ec.generate_private_key(ec.SECP256R1()), "demo")
    now = dt.datetime.now(dt.UTC)

    def old_tls(version: ssl.TLSVersion) -> ssl.SSLContext:
        context = gate.context()
        context.maximum_version = version
        return context

    def issued(signer: keys.Authority, begun_days: float, left_days: float) -> ssl.SSLContext:
        made = certificate(signer, north.public_key(), "north", "site", begun_days=begun_days, left_days=left_days)
        return gate.made(made, north)

    def self_signed() -> ssl.SSLContext:
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "north")])
        made = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(north.public_key())
            .serial_number(1)
            .not_valid_before(now - dt.timedelta(days=1))
            .not_valid_after(now + dt.timedelta(days=1))
            .sign(north, hashes.SHA256())
        )
        return gate.made(made, north)

    def by_a_site() -> ssl.SSLContext:
        """North makes a certificate for south with its own end certificate, and sends both."""
        west = ec.generate_private_key(ec.SECP256R1())
        own = keys.load_certificate((gate.folder / "north" / "site.pem").read_bytes())
        made = certificate(keys.Authority(north, own), west.public_key(), "south", "site", begun_days=1, left_days=1)
        context = gate.made(made, west)
        return context

    return {
        "tls-1.2": lambda: old_tls(ssl.TLSVersion.TLSv1_2),
        "tls-1.1": lambda: old_tls(ssl.TLSVersion.TLSv1_1),
        "no-certificate": lambda: gate.context_of(None),
        "self-made": self_signed,
        "foreign-authority": lambda: issued(foreign, 1, 1),
        "signed-by-a-site": by_a_site,
        "expired": lambda: issued(authority, 2, -1),
        "expired-a-minute-ago": lambda: issued(authority, 2, -1 / 1440),
        "not-yet-valid": lambda: issued(authority, -1, 2),
        "of-the-server": lambda: gate.context_of(gate.home.tls_pem, gate.home.tls_key),
    }


STRANGERS = [
    *("tls-1.2", "tls-1.1", "no-certificate", "self-made", "foreign-authority", "signed-by-a-site"),
    *("expired", "expired-a-minute-ago", "not-yet-valid", "of-the-server"),
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("who", STRANGERS)
def test_the_handshake_ends_for_a_stranger(gate: Gate, who: str) -> None:
    assert gate.say(request(gate), strangers(gate)[who]()) == b""


@pytest.mark.parametrize(
    "text", [b"\0" * 100, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\xff\xff" + b"a" * 999]
)
def test_plain_bytes_get_no_answer(gate: Gate, text: bytes) -> None:
    with socket.create_connection(("127.0.0.1", gate.port), timeout=20) as plain:
        got = b""
        with contextlib.suppress(ConnectionError):
            plain.sendall(text)
            while more := plain.recv(4096):
                got += more
    assert b"HTTP" not in got and len(got) < 20  # a TLS alert at most


Member = tuple[x509.Certificate, Any, str]


def members(gate: Gate) -> dict[str, Callable[[], Member]]:
    """Certificates that the consortium's authority has signed, their keys, and what their owners are told."""
    authority, thief = authority_of(gate.home), ec.generate_private_key(ec.SECP256R1())
    other = ec.generate_private_key(ec.SECP384R1())

    def named(told: str, name: str, role: str = "site", key: Any = thief) -> Member:
        made = certificate(authority, key.public_key(), name, role, begun_days=1, left_days=1)
        return made, key, told

    def rosa() -> Member:
        made = keys.load_certificate((gate.folder / "rosa" / "researcher.pem").read_bytes())
        return made, gate.key("rosa", "researcher"), "trust"

    return {
        "stolen-name": lambda: named("not-enrolled", "north"),
        "unknown-name": lambda: named("not-enrolled", "mars"),
        "another-sites-name-over-an-enrolled-key": lambda: named("not-enrolled", "south", key=gate.key()),
        "researcher": rosa,
        "researcher-named-as-a-site": lambda: named("trust", "north", "researcher"),
        "server-role": lambda: named("trust", "north", "server"),
        "another-curve": lambda: named("trust", "north", key=other),
        "name-in-capitals": lambda: named("trust", "NORTH"),
        "name-with-a-path": lambda: named("trust", "../north"),
        "subject-of-another": lambda: (_mixed(authority, thief), thief, "trust"),
    }


def _mixed(authority: keys.Authority, key: Any) -> x509.Certificate:
    """Subject north, alternative name south."""
    now = dt.datetime.now(dt.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "north")]))
        .issuer_name(authority.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("south.site.isocenter")]), critical=False)
        .sign(authority.key, hashes.SHA256())
    )


MEMBERS = [
    *("stolen-name", "unknown-name", "another-sites-name-over-an-enrolled-key", "researcher"),
    *("researcher-named-as-a-site", "server-role", "another-curve", "name-in-capitals", "name-with-a-path"),
    "subject-of-another",
]


@pytest.mark.parametrize("shown", ["own", "norths"])
@pytest.mark.parametrize("who", MEMBERS)
def test_a_certificate_of_our_authority_is_not_enough(gate: Gate, who: str, shown: str) -> None:
    """Flower is shown the key of the certificate, or the key that the roster has."""
    made, key, told = members(gate)[who]()
    text, same = request(gate), made.public_key() == gate.key().public_key()
    if shown == "own":
        text = text.replace(gate.shown(), b64encode(keys.public_pem(key)))
    elif not same:
        told = "trust"
    answer = gate.say(text, gate.made(made, key))
    assert (status(answer), code(answer)) == (403, told)


@pytest.mark.parametrize("shown", ["", "another", "twice", "spaced", "nonsense", "der"])
def test_the_key_shown_to_flower_is_the_key_of_the_certificate(gate: Gate, shown: str) -> None:
    point = (
        gate.key()
        .public_key()
        .public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    value = {
        "": b"",
        "another": gate.shown("south"),
        "twice": gate.shown() + b", " + gate.shown(),
        "spaced": gate.shown()[:40] + b" " + gate.shown()[40:],
        "nonsense": b"a" * 240,
        "der": b64encode(point),
    }[shown]
    answer = gate.say(request(gate).replace(gate.shown(), value))
    assert (status(answer), code(answer)) == (403, "trust")


def test_the_key_has_to_be_shown(gate: Gate) -> None:
    answer = gate.say(re.sub(rb"flwr-public-key: [^\r]*\r\n", b"", request(gate)))
    assert (status(answer), code(answer)) == (403, "trust")


def test_a_certificate_that_ends_while_its_connection_is_open_ends_the_connection(gate: Gate) -> None:
    north = gate.key()
    made = certificate(authority_of(gate.home), north.public_key(), "north", "site", begun_days=1, left_days=3 / 86400)
    one = request(gate).replace(b"Connection: close\r\n", b"")
    with gate.open(gate.made(made, north)) as secure:
        assert flowers(Gate.spoken(secure, one, first=True))
        got = Gate.spoken(secure, b"")  # what the gateway says when the time is over, unasked
    assert dt.datetime.now(dt.UTC) >= made.not_valid_after_utc
    assert (status(got), code(got)) == (403, "certificate-expired")
    assert gate.say(one, gate.made(made, north)) == b""


def test_no_session_is_resumed(gate: Gate) -> None:
    context = gate.context()
    with gate.open(context) as secure:
        Gate.spoken(secure, request(gate))
        session = secure.session
    assert session is None or not session.has_ticket


def test_a_revoked_site_is_out_within_seconds_on_open_connections_too(gate: Gate) -> None:
    gate.join("east")
    gate.honest("east")
    client, node = gate.client("east"), gate.nodes["east"]
    assert not parcels.post(client, parcels.RECEIVE_ORDER, PullMessagesRequest(node=node))
    told: list[str] = []

    def hold() -> None:  # the second empty look is held by the coordinator for many seconds
        try:
            parcels.post(client, parcels.RECEIVE_ORDER, PullMessagesRequest(node=node))
        except httpx.HTTPStatusError as error:
            told.append(f"{error.response.status_code} {error.response.text}")

    held = threading.Thread(target=hold)
    held.start()
    time.sleep(0.5)
    gate.home.revoke("east")
    held.join(10)
    assert told == ["403 certificate-revoked"]
    own = request(gate).replace(gate.shown(), gate.shown("east"))
    answer = gate.say(own, gate.context("east"))
    assert (status(answer), code(answer)) == (403, "certificate-revoked")
    # And Flower itself has let the node go, so that no run counts on it.
    end = time.monotonic() + PATIENCE_S
    while gate.home.roster.revoked_nodes():
        assert time.monotonic() < end
        time.sleep(0.1)
    with control(gate.inner_port()) as inside:
        nodes = {info.node_id: info.status for info in inside.ListNodes(ListNodesRequest()).nodes_info}
    assert nodes.get(node.node_id, "unregistered") == "unregistered"
    assert nodes[gate.nodes["south"].node_id] == "online"
    lines = journal.Journal(gate.home.root / "journal.jsonl").lines("node-unregistered")
    assert lines == [{"site": "east"}]
    client.close()


def test_a_new_key_takes_the_place_of_a_revoked_one_and_the_old_one_stays_out(gate: Gate) -> None:
    gate.join("lost")
    own = request(gate).replace(gate.shown(), gate.shown("lost"))
    old = gate.context("lost")
    assert flowers(gate.say(own, old))
    gate.home.revoke("lost")
    join(str(gate.home.invite("lost", "site")), gate.folder / "found")
    assert flowers(gate.say(request(gate).replace(gate.shown(), gate.shown("found")), gate.context("found")))
    answer = gate.say(own, old)
    assert (status(answer), code(answer)) == (403, "not-enrolled")


def test_a_site_that_has_just_joined_is_answered(gate: Gate) -> None:
    gate.join("fresh")
    answer = gate.say(request(gate).replace(gate.shown(), gate.shown("fresh")), gate.context("fresh"))
    assert flowers(answer)


# Slow, and many


def plain_words(gate: Gate, text: bytes) -> bytes:
    """What a caller gets who begins a handshake and does not go on."""
    with socket.create_connection(("127.0.0.1", gate.port), timeout=PATIENCE_S) as plain:
        plain.sendall(text)
        with contextlib.suppress(ConnectionError):
            return plain.recv(100)
        return b""


def dripped(gate: Gate, at_once: bytes, drops: bytes) -> bytes:
    """What is answered to bytes sent one by one, ten in a second."""
    with gate.open() as secure:
        secure.sendall(at_once)
        secure.settimeout(0.1)
        got, place = b"", 0
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end and not whole(got):
            with contextlib.suppress(ssl.SSLError, ConnectionError):
                secure.sendall(drops[place : place + 1])
            place += 1
            try:
                more = secure.recv(4096)
            except TimeoutError:
                continue
            except (ssl.SSLError, ConnectionError):
                break
            if not more:
                break
            got += more
    return got


def rested(gate: Gate) -> bytes:
    """All that comes on a connection that rests after an answer."""
    with gate.open() as secure:
        return Gate.spoken(secure, request(gate).replace(b"Connection: close\r\n", b""))


def steady(gate: Gate) -> bytes:
    """A body on a slow line that keeps moving takes longer than everything that is not waited for."""
    size = 200_000
    field = b"\x7a" + bytes([size & 127 | 128, size >> 7 & 127 | 128, size >> 14])  # unknown to Flower, and no error
    body = field + bytes(size)
    with gate.open() as secure:
        secure.sendall(request(gate, length=str(len(body)).encode()))
        for place in range(0, len(body), 4000):
            secure.sendall(body[place : place + 4000])
            time.sleep(0.11)
        return Gate.spoken(secure, b"", first=True)


LONG = b"X: " + b"y" * 4000
SLOW: dict[str, Callable[[Gate], bytes]] = {
    "no-handshake": lambda gate: plain_words(gate, b""),
    "half-a-handshake": lambda gate: plain_words(gate, bytes.fromhex("1603010200010001fc0303")),
    "nothing": lambda gate: gate.say(b""),
    "half-a-line": lambda gate: gate.say(b"POST /v1/fl"),
    "half-a-head": lambda gate: gate.say(request(gate)[:-2]),
    "head-drop-by-drop": lambda gate: dripped(gate, b"", request(gate, f"POST {BEAT} HTTP/1.1".encode(), LONG)),
    "half-a-body": lambda gate: gate.say(request(gate, length=b"100") + b"x" * 50),
    "body-drop-by-drop": lambda gate: dripped(gate, request(gate, length=b"100000"), bytes(1000)),
    "rest-after-an-answer": rested,
    "steady-body": steady,
}


@pytest.fixture(scope="module")
def slow(gate: Gate) -> dict[str, bytes]:
    """What each of them was answered; all at the same time."""
    with ThreadPoolExecutor(len(SLOW)) as pool:
        return dict(zip(SLOW, pool.map(lambda attack: attack(gate), SLOW.values()), strict=True))


@pytest.mark.parametrize("attack", SLOW)
def test_who_is_slow_is_not_waited_for(slow: dict[str, bytes], attack: str) -> None:
    if "handshake" in attack:
        assert slow[attack] == b""
    elif attack in ("rest-after-an-answer", "steady-body"):
        assert flowers(slow[attack])  # after the first of them the gateway closed
    else:
        assert (status(slow[attack]), code(slow[attack])) == (408, "too-slow")


def test_two_thousand_connections_that_say_nothing_do_not_keep_a_site_out(gate: Gate) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    many = min(2000, hard - 200)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, many + 200), hard))
    opened: list[socket.socket] = []
    try:
        for number in range(many):
            plain = socket.socket()
            plain.setblocking(False)
            plain.connect_ex(("127.0.0.1", gate.port))
            opened.append(plain)
            if number % 500 == 499:
                gate.anew("south")
        gate.anew("south", "west")
        held = psutil.Process(gate.process.pid).num_fds()
        assert held < 2 * LIMITS.handshakes + 200  # the others were let go, whatever their owners do
    finally:
        for plain in opened:
            plain.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    gate.anew("south")


def test_connections_of_one_site_are_bounded_and_leave_room_for_the_others(gate: Gate) -> None:
    one = request(gate).replace(b"Connection: close\r\n", b"")
    with contextlib.ExitStack() as stack:
        answers = []
        for _ in range(LIMITS.connections_per_site + 5):
            secure = stack.enter_context(gate.open())
            secure.settimeout(20)
            with contextlib.suppress(ssl.SSLError, ConnectionError):
                secure.sendall(one)
                answers.append(secure.recv(65536))
        refused = [answer for answer in answers if answer and status(answer) == 503]
        assert {code(answer) for answer in refused} == {"too-many-connections"}
        gate.anew("south", "west")


# What is written about it


def test_what_was_refused_is_in_the_journal_as_sums(gate: Gate) -> None:
    """Hundreds of refusals make a few lines, and the stop writes what was not due yet."""
    for _ in range(40):
        gate.say(request(gate, b"POST /docs HTTP/1.1"))
    gate.say(request(gate), gate.context("rosa", "researcher"))
    gate.say(b"", gate.context_of(None))
    gate.honest()
    gate.process.send_signal(signal.SIGTERM)
    assert gate.process.wait(30) == 0
    refused = gate.refused()
    assert refused["path-unknown"] >= 40 and refused["trust"] >= 1 and refused["handshake-failed"] >= 1
    lines = [json.loads(line) for line in (gate.home.root / "journal.jsonl").read_text().splitlines()]
    kinds = [line["facts"]["code"] for line in lines if line["kind"] == "gateway-refused"]
    assert max(kinds.count(kind) for kind in kinds) < 15
    assert journal.verify(gate.home.root / "journal.jsonl") == len(lines)
    said = (gate.folder / "log").read_text()
    assert "Traceback" not in said, said
