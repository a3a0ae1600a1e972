"""Attacks on the consortium service over real sockets, beyond those of `test_server_consortium.py`.

After each of them an honest site is answered.
"""

import contextlib
import dataclasses
import resource
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from coordinator import Coordinator, coordinator, study
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.x509 import CertificateSigningRequestBuilder, Name

from fl_server import consortium
from privacy import calls, keys
from privacy import consortium_pb2 as pb
from privacy.calls import SERVICE, InvitationLine, Signed, error_of
from privacy.errors import InvitationRefused, MessageMalformed, SignatureInvalid, TrustError
from privacy.journal import verify
from privacy.statements import Statement

ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # of P-256, SEC 2, 2.4.2
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coordinator]:
    with coordinator(tmp_path_factory.mktemp("served")) as demo:
        for name in ("north", "south"):
            demo.join(name)
        demo.join("rosa", "researcher")
        yield demo


@pytest.fixture(autouse=True)
def afterwards(served: Coordinator) -> Iterator[None]:
    """Whatever was tried, an honest site is answered."""
    yield
    with served.caller("south") as caller:
        assert isinstance(caller.offers(), list)


@pytest.fixture
def channel(served: Coordinator) -> Iterator[Any]:
    with grpc.secure_channel(served.address, grpc.ssl_channel_credentials(served.home.ca_pem)) as made:
        yield made


def sent(channel: Any, method: str, request: bytes, metadata: Any = ()) -> bytes:
    return bytes(channel.unary_unary(f"/{SERVICE}/{method}")(request, timeout=30, metadata=metadata))


def refused(channel: Any, method: str, request: bytes, metadata: Any = ()) -> Exception:
    with pytest.raises(grpc.RpcError) as caught:
        sent(channel, method, request, metadata)
    error = error_of(str(caught.value.details()))
    assert error is not None, caught.value
    return error


def signed(served: Coordinator, name: str, method: str, request: bytes) -> Signed:
    role = "researcher" if name == "rosa" else "site"
    key = keys.load_key(served.keys_of(name) / f"{role}.key")
    return Signed.make(key, name, f"/{SERVICE}/{method}", request)


def lines(served: Coordinator) -> int:
    return verify(served.home.root / "journal.jsonl")


# Bytes in place of HTTP/2


def tls(served: Coordinator, *protocols: str) -> ssl.SSLSocket:
    context = ssl.create_default_context(cadata=served.home.ca_pem.decode())
    if protocols:
        context.set_alpn_protocols(list(protocols))
    host, _, port = served.address.partition(":")
    plain = socket.create_connection((host, int(port)), 20)
    return context.wrap_socket(plain, server_hostname=host)


PLAIN = {
    "nothing": b"",
    "zeros": bytes(1000),
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "http-2-without-tls": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
    "half-a-hello": bytes.fromhex("1603010200010001fc0303"),
    "hello-of-the-wrong-length": b"\x16\x03\x01\xff\xff" + b"a" * 999,
    "ssl-2": bytes.fromhex("802e0100020015000000100100800200800300800400800500800600400700c0"),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_bytes_get_no_answer(served: Coordinator, name: str) -> None:
    host, _, port = served.address.partition(":")
    with socket.create_connection((host, int(port)), 20) as plain:
        plain.sendall(PLAIN[name])
        plain.settimeout(0.2)
        with contextlib.suppress(TimeoutError, ConnectionError):
            got = plain.recv(4096)
            assert len(got) < 20 and b"HTTP" not in got  # a TLS alert at most


@pytest.mark.parametrize("protocols", [(), ("http/1.1",), ("h3", "spdy/3")])
def test_only_http_2_is_agreed_upon(served: Coordinator, protocols: tuple[str, ...]) -> None:
    with contextlib.suppress(ssl.SSLError, ConnectionError), tls(served, *protocols) as secure:
        assert secure.selected_alpn_protocol() != "http/1.1"
        secure.sendall(b"POST /isocenter/Offers HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
        secure.settimeout(0.2)
        with contextlib.suppress(TimeoutError):
            assert not secure.recv(4096).startswith(b"HTTP/1")


DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH, PING, GOAWAY, WINDOW, CONTINUATION = range(10)
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def frame(kind: int, flags: int, stream: int, body: bytes = b"", length: int | None = None) -> bytes:
    """RFC 9113, 4.1."""
    size = len(body) if length is None else length
    return size.to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + body


def literal(name: bytes, value: bytes) -> bytes:
    """RFC 7541, 6.2.2: a header without indexing, of up to 126 bytes each."""
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


CALL = b"".join(
    literal(name, value)
    for name, value in [
        (b":method", b"POST"),
        (b":scheme", b"https"),
        (b":path", f"/{SERVICE}/Offers".encode()),
        (b":authority", b"x"),
        (b"content-type", b"application/grpc"),
        (b"te", b"trailers"),
    ]
)
MANY = 2000
FRAMES: dict[str, bytes] = {
    "no-preface": bytes(200),
    "another-preface": b"PRI * HTTP/3.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0),
    "headers-before-settings": PREFACE + frame(HEADERS, 4, 1, CALL),
    "settings-of-odd-size": PREFACE + frame(SETTINGS, 0, 0, b"12345"),
    "settings-on-a-stream": PREFACE + frame(SETTINGS, 0, 1),
    "settings-with-huge-window": PREFACE + frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 2**32 - 1)),
    "settings-with-tiny-frames": PREFACE + frame(SETTINGS, 0, 0, struct.pack(">HI", 5, 1)),
    "settings-flood": PREFACE + frame(SETTINGS, 0, 0) * MANY,
    "settings-with-huge-table": PREFACE + frame(SETTINGS, 0, 0, struct.pack(">HI", 1, 2**32 - 1)),
    "ping-flood": PREFACE + frame(SETTINGS, 0, 0) + frame(PING, 0, 0, b"12345678") * MANY,
    "ping-of-odd-size": PREFACE + frame(SETTINGS, 0, 0) + frame(PING, 0, 0, b"1234"),
    "ping-on-a-stream": PREFACE + frame(SETTINGS, 0, 0) + frame(PING, 0, 1, b"12345678"),
    "frame-over-the-limit": PREFACE + frame(SETTINGS, 0, 0) + frame(HEADERS, 4, 1, b"", 2**24 - 1) + bytes(100_000),
    "unknown-frames": PREFACE + frame(SETTINGS, 0, 0) + frame(99, 255, 1, b"x" * 100) * MANY,
    "data-on-no-stream": PREFACE + frame(SETTINGS, 0, 0) + frame(DATA, 1, 0, b"x"),
    "data-on-an-idle-stream": PREFACE + frame(SETTINGS, 0, 0) + frame(DATA, 1, 5, b"x"),
    "headers-on-an-even-stream": PREFACE + frame(SETTINGS, 0, 0) + frame(HEADERS, 5, 2, CALL),
    "headers-on-no-stream": PREFACE + frame(SETTINGS, 0, 0) + frame(HEADERS, 5, 0, CALL),
    "headers-of-garbage": PREFACE + frame(SETTINGS, 0, 0) + frame(HEADERS, 5, 1, b"\xff" * 500),
    "headers-index-nowhere": PREFACE + frame(SETTINGS, 0, 0) + frame(HEADERS, 5, 1, b"\xff\xff\xff\xff\x0f"),
    "headers-table-resized": PREFACE + frame(SETTINGS, 0, 0) + frame(HEADERS, 5, 1, b"\x3f\xe1\xff\xff\xff\x07" + CALL),
    "headers-padding-too-long": PREFACE + frame(SETTINGS, 0, 0) + frame(HEADERS, 0xD, 1, b"\xff" + CALL),
    "headers-without-an-end": PREFACE + frame(SETTINGS, 0, 0) + frame(HEADERS, 1, 1, CALL),
    "headers-interrupted": PREFACE + frame(SETTINGS, 0, 0) + frame(HEADERS, 1, 1, CALL) + frame(DATA, 1, 1, b"x"),
    "continuation-flood": PREFACE
    + frame(SETTINGS, 0, 0)
    + frame(HEADERS, 1, 1, CALL)
    + frame(CONTINUATION, 0, 1, literal(b"x", b"y" * 100)) * MANY,
    "continuation-alone": PREFACE + frame(SETTINGS, 0, 0) + frame(CONTINUATION, 4, 1, CALL),
    "header-bomb": PREFACE
    + frame(SETTINGS, 0, 0)
    + frame(HEADERS, 5, 1, CALL + b"\x40\x01x\x7f\x81\x1f" + b"y" * 4096 + b"\xbe" * 8000),
    "no-path": PREFACE + frame(SETTINGS, 0, 0) + frame(HEADERS, 5, 1, literal(b":method", b"POST")),
    "nul-in-a-header": PREFACE + frame(SETTINGS, 0, 0) + frame(HEADERS, 5, 1, CALL + literal(b"x", b"a\0b\r\nc")),
    "header-in-capitals": PREFACE + frame(SETTINGS, 0, 0) + frame(HEADERS, 5, 1, CALL + literal(b"X-Y", b"z")),
    "rapid-reset": PREFACE
    + frame(SETTINGS, 0, 0)
    + b"".join(
        frame(HEADERS, 5, 2 * number + 1, CALL) + frame(RST_STREAM, 0, 2 * number + 1, bytes(4))
        for number in range(MANY)
    ),
    "many-streams": PREFACE
    + frame(SETTINGS, 0, 0)
    + b"".join(frame(HEADERS, 4, 2 * number + 1, CALL) for number in range(MANY)),
    "window-of-nothing": PREFACE + frame(SETTINGS, 0, 0) + frame(WINDOW, 0, 0, bytes(4)),
    "window-overflow": PREFACE + frame(SETTINGS, 0, 0) + frame(WINDOW, 0, 0, b"\x7f\xff\xff\xff") * 3,
    "push-from-a-client": PREFACE + frame(SETTINGS, 0, 0) + frame(PUSH, 4, 1, bytes(4) + CALL),
    "priority-of-itself": PREFACE + frame(SETTINGS, 0, 0) + frame(PRIORITY, 0, 1, bytes([0, 0, 0, 1, 9])) * MANY,
    "goaway-then-more": PREFACE + frame(SETTINGS, 0, 0) + frame(GOAWAY, 0, 0, bytes(8)) + frame(HEADERS, 5, 1, CALL),
    "message-longer-than-announced": PREFACE
    + frame(SETTINGS, 0, 0)
    + frame(HEADERS, 4, 1, CALL)
    + frame(DATA, 1, 1, b"\0\xff\xff\xff\xffabc"),
    "message-compressed": PREFACE
    + frame(SETTINGS, 0, 0)
    + frame(HEADERS, 4, 1, CALL + literal(b"grpc-encoding", b"gzip"))
    + frame(DATA, 1, 1, b"\1\0\0\0\3abc"),
    "cut-off-in-a-frame": PREFACE + frame(SETTINGS, 0, 0) + frame(HEADERS, 5, 1, CALL)[:-7],
}


@pytest.mark.parametrize("name", FRAMES)
def test_broken_http_2_ends_its_own_connection_at_most(served: Coordinator, name: str) -> None:
    got = b""
    with contextlib.suppress(ssl.SSLError, ConnectionError, TimeoutError), tls(served, "h2") as secure:
        secure.settimeout(0.15)  # who is not hung up on is let be
        secure.sendall(FRAMES[name])
        for _ in range(50):
            more = secure.recv(65536)
            got += more
            if not more:
                break
    assert b"coordinator_key" not in got and b"Traceback" not in got


# Signed calls, changed on their way


def offered(served: Coordinator) -> tuple[bytes, Signed]:
    """A decision of north about a study that is offered to it, as it would travel."""
    asked = study("north", "south").model_copy(update={"title": f"number {time.time_ns()}"})
    complete = served.submit(asked)
    body = Statement(complete.digest, "north", "approved", time.time_ns() // 1_000_000).body()
    own = keys.load_key(served.keys_of("north") / "site.key")
    request = pb.DecideRequest(statement=body, signature=keys.sign(own, keys.STUDY_DECISION, body)).SerializeToString()
    return request, signed(served, "north", "Decide", request)


CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda body: b"",
    "first-byte-gone": lambda body: body[1:],
    "last-byte-gone": lambda body: body[:-1],
    "half": lambda body: body[: len(body) // 2],
    "twice": lambda body: body + body,
    "unknown-field-behind": lambda body: body + b"\x7a\x01x",
    "unknown-field-in-front": lambda body: b"\x7a\x01x" + body,
    "first-bit": lambda body: bytes([body[0] ^ 1]) + body[1:],
    "middle-bit": lambda body: (
        body[: len(body) // 2] + bytes([body[len(body) // 2] ^ 128]) + body[len(body) // 2 + 1 :]
    ),
    "last-bit": lambda body: body[:-1] + bytes([body[-1] ^ 1]),
    "another-decision": lambda body: body.replace(b"approved", b"declined"),
    "longer-length": lambda body: body.replace(body[1:2], b"\xff\xff\xff\x7f", 1),
    "quarter-megabyte-behind": lambda body: body + b"\x7a\x80\x80\x10" + bytes(2**18),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_request_is_not_what_was_signed(served: Coordinator, channel: Any, change: str) -> None:
    request, own = offered(served)
    before = lines(served)
    assert isinstance(refused(channel, "Decide", CHANGES[change](request), own.metadata()), SignatureInvalid)
    assert lines(served) == before
    sent(channel, "Decide", request, own.metadata())  # and as it was signed it counts
    assert lines(served) == before + 1


def test_a_signature_that_was_turned_around_is_the_same_call(served: Coordinator, channel: Any) -> None:
    """(r, n - s) is valid wherever (r, s) is: who changes it makes no new call of an old one."""
    request, own = offered(served)
    r, s = decode_dss_signature(own.signature)
    metadata = dict(own.metadata()) | {"isocenter-signature-bin": encode_dss_signature(r, ORDER - s)}
    sent(channel, "Decide", request, own.metadata())
    error = refused(channel, "Decide", request, tuple(metadata.items()))
    assert isinstance(error, SignatureInvalid) and "once" in str(error)


SIGNATURES = {
    "zeros": bytes(70),
    "r-is-zero": encode_dss_signature(0, 1),
    "s-is-zero": encode_dss_signature(1, 0),
    "r-is-the-order": encode_dss_signature(ORDER, 1),
    "one-and-one": encode_dss_signature(1, 1),
    "raw-and-not-der": bytes(range(64)),
    "der-with-a-tail": encode_dss_signature(5, 5) + b"x",
    "der-of-nothing": b"\x30\x00",
    "long": b"\x30" * 128,
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_made_up_signature_is_none(served: Coordinator, channel: Any, name: str) -> None:
    metadata = dict(signed(served, "north", "Offers", b"").metadata()) | {"isocenter-signature-bin": SIGNATURES[name]}
    assert isinstance(refused(channel, "Offers", b"", tuple(metadata.items())), SignatureInvalid)


def test_calls_may_arrive_in_any_order_and_each_once(served: Coordinator, channel: Any) -> None:
    made = [signed(served, "north", "Offers", b"").metadata() for _ in range(4)]
    for metadata in (made[2], made[0], made[3], made[1]):
        sent(channel, "Offers", b"", metadata)
    for metadata in made:
        assert isinstance(refused(channel, "Offers", b"", metadata), SignatureInvalid)


def test_of_the_same_call_at_the_same_moment_one_counts(served: Coordinator, channel: Any) -> None:
    metadata = signed(served, "north", "Offers", b"").metadata()

    def once(_: int) -> str:
        try:
            sent(channel, "Offers", b"", metadata)
        except grpc.RpcError as error:
            return str(error.details())
        return "accepted"

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(once, range(32)))
    assert answers.count("accepted") == 1
    assert all("once" in answer for answer in answers if answer != "accepted")


def test_a_nonce_is_its_owners(served: Coordinator, channel: Any) -> None:
    """South cannot use up north's nonces, and north's call under another name or nonce is not signed."""
    north = signed(served, "north", "Offers", b"")
    key = keys.load_key(served.keys_of("south") / "site.key")
    unsigned = Signed("south", north.time_s, north.nonce, b"")
    body = unsigned.body(f"/{SERVICE}/Offers", b"")
    shared = dataclasses.replace(unsigned, signature=keys.sign(key, keys.CALL, body))
    sent(channel, "Offers", b"", shared.metadata())
    for name, nonce in (("south", north.nonce), ("north", "0" * len(north.nonce)), ("rosa", north.nonce)):
        stolen = dataclasses.replace(north, name=name, nonce=nonce)
        assert isinstance(refused(channel, "Offers", b"", stolen.metadata()), SignatureInvalid)
    sent(channel, "Offers", b"", north.metadata())


METHODS = ["Offers", "Decide", "Submit", "Launch", "Studies", "Roster", "Watch", "Results", "Renew", "Witness"]


@pytest.mark.parametrize("method", METHODS)
def test_no_method_but_enrol_is_open_without_a_signature(served: Coordinator, channel: Any, method: str) -> None:
    call = channel.unary_stream if method in ("Watch", "Results") else channel.unary_unary
    for body in (b"", b"\xff\xff", bytes(1000)):
        with pytest.raises(grpc.RpcError) as caught:
            answer = call(f"/{SERVICE}/{method}")(body, timeout=20)
            list(answer)
        assert isinstance(error_of(str(caught.value.details())), MessageMalformed)


@pytest.mark.parametrize("key", ["isocenter-name", "isocenter-time", "isocenter-nonce", "isocenter-signature-bin", "x"])
def test_metadata_over_the_limit_are_refused(served: Coordinator, channel: Any, key: str) -> None:
    value: Any = b"a" * 20_000 if key.endswith("-bin") else "1" * 20_000
    metadata = dict(signed(served, "north", "Offers", b"").metadata()) | {key: value}
    with pytest.raises(grpc.RpcError) as caught:
        sent(channel, "Offers", b"", tuple(metadata.items()))
    assert caught.value.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INVALID_ARGUMENT)


@pytest.mark.parametrize("method", ["Enrol", "Submit", "Decide"])
def test_a_body_over_the_limit_is_refused(served: Coordinator, channel: Any, method: str) -> None:
    body = bytes(calls.REQUEST_BYTES_MAX + 1)
    with pytest.raises(grpc.RpcError) as caught:
        sent(channel, method, body, signed(served, "north", method, b"").metadata())
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


# Enrolment, which is open

NAMES = [
    *("", ".", "..", "/", "../north", "..\\north", "a/b", "a\\b", "/etc/passwd", "north/../south", "a\0b", "\0"),
    *("nörth", "ＮＯＲＴＨ", "nоrth", "\u202enorth", "north\n", " north", "north ", "NORTH", "1north", "-north"),
    *("a" * 33, "a" * 100_000, "north;rm -rf", "$(id)", "%2e%2e", "north.site.isocenter", "'; DROP TABLE parties; --"),
    *("con\r\nHost: x", "{name}", "%s%n", "*"),
]


@pytest.mark.parametrize("number", range(len(NAMES)))
def test_a_name_that_is_none_does_not_enrol(served: Coordinator, channel: Any, number: int) -> None:
    """With an invitation that is good for another name, and with the name in the signing request too."""
    line, key = served.home.invite("late", "site"), ec.generate_private_key(ec.SECP256R1())
    before, files = lines(served), sorted(served.home.root.rglob("*"))
    for csr in (keys.make_csr(key, "late"), _csr(key)):
        request = pb.EnrolRequest(name=NAMES[number], role="site", token=line.token, csr=csr)
        error = refused(channel, "Enrol", request.SerializeToString())
        assert isinstance(error, TrustError | MessageMalformed)
        assert len(str(error)) <= calls.SENTENCE_CHARACTERS_MAX and str(error).isprintable()
    assert lines(served) == before
    assert sorted(served.home.root.rglob("*")) == files
    assert "late" in [each.name for each in served.home.roster.invitations()]


def _csr(key: Any) -> bytes:
    made = CertificateSigningRequestBuilder().subject_name(Name([])).sign(key, hashes.SHA256())
    return made.public_bytes(serialization.Encoding.PEM)


def test_a_name_that_is_no_text_does_not_enrol(served: Coordinator, channel: Any) -> None:
    """A lone surrogate and bytes beyond UTF-8, which protobuf's own writer would not write."""
    for text in (b"\xed\xa0\x80", b"\xff\xfe", b"\xc0\x80"):
        assert isinstance(refused(channel, "Enrol", b"\x0a" + bytes([len(text)]) + text), TrustError | MessageMalformed)


TOKENS = {
    "empty": "",
    "one-letter": "x",
    "nul": "\0" * 43,
    "another": InvitationLine.new_token(),
    "nearly-a-megabyte": "x" * 1_000_000,
    "letters-beyond-ascii": "é" * 43,
    "hash-of-one": "0" * 64,
    "injection": "' OR 1=1 --",
    "wildcard": "%",
}


@pytest.mark.parametrize("name", TOKENS)
def test_a_token_that_was_not_given_out_does_not_enrol(served: Coordinator, channel: Any, name: str) -> None:
    csr = keys.make_csr(ec.generate_private_key(ec.SECP256R1()), "late")
    request = pb.EnrolRequest(name="late", role="site", token=TOKENS[name], csr=csr)
    assert isinstance(refused(channel, "Enrol", request.SerializeToString()), InvitationRefused)


def _foreign(kind: str) -> bytes:
    good = keys.make_csr(ec.generate_private_key(ec.SECP256R1()), "late")
    return {
        "rsa": lambda: _csr(rsa.generate_private_key(65537, 2048)),
        "p-384": lambda: _csr(ec.generate_private_key(ec.SECP384R1())),
        "p-256k1": lambda: _csr(ec.generate_private_key(ec.SECP256K1())),
        "truncated": lambda: good[:-60],
        "two": lambda: b"",
        "binary": lambda: bytes(range(256)) * 10,
        "private-key": lambda: b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
        "a-body-of-another": lambda: _swapped(good),
        "hundred-thousand-begins": lambda: b"-----BEGIN CERTIFICATE REQUEST-----\n" * 10_000,
    }[kind]()


def _swapped(good: bytes) -> bytes:
    """A request whose key was exchanged after it was signed."""
    import base64

    der = bytearray(base64.b64decode(b"".join(good.splitlines()[1:-1])))
    at = der.find(b"\x03\x42\x00\x04")
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    form = serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
    der[at + 3 : at + 68] = other.public_bytes(*form)
    body = base64.encodebytes(bytes(der))
    return b"-----BEGIN CERTIFICATE REQUEST-----\n" + body + b"-----END CERTIFICATE REQUEST-----\n"


@pytest.mark.parametrize(
    "kind",
    [
        "rsa",
        "p-384",
        "p-256k1",
        "truncated",
        "two",
        "binary",
        "private-key",
        "a-body-of-another",
        "hundred-thousand-begins",
    ],
)
def test_a_request_that_proves_no_key_of_ours_does_not_enrol(served: Coordinator, channel: Any, kind: str) -> None:
    line = served.home.invite("late", "site")
    request = pb.EnrolRequest(name="late", role="site", token=line.token, csr=_foreign(kind))
    error = refused(channel, "Enrol", request.SerializeToString())
    assert isinstance(error, SignatureInvalid | MessageMalformed)
    assert "late" not in [party.name for party in served.home.roster.sites()]


def test_guessing_tokens_neither_succeeds_nor_writes_anything(served: Coordinator, channel: Any) -> None:
    """Tokens are 160 random bits; what guessing could do is fill a disk or use up a place, and it does neither."""
    served.home.invite("guessed", "site")
    csr = keys.make_csr(ec.generate_private_key(ec.SECP256R1()), "guessed")
    before = lines(served), served.home.roster.path.stat().st_size

    def guess(_: int) -> bool:
        request = pb.EnrolRequest(name="guessed", role="site", token=InvitationLine.new_token(), csr=csr)
        with contextlib.suppress(grpc.RpcError):
            sent(channel, "Enrol", request.SerializeToString())
            return True
        return False

    with ThreadPoolExecutor(8) as pool:
        assert not any(pool.map(guess, range(300)))
    assert (lines(served), served.home.roster.path.stat().st_size) == before
    assert "guessed" in [each.name for each in served.home.roster.invitations()]
    assert len({InvitationLine.new_token() for _ in range(1000)}) == 1000


# Many


def test_a_thousand_connections_that_say_nothing_do_not_keep_a_site_out(served: Coordinator) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    many = min(1000, (hard - 300) // 2)  # both ends are in this process
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2 * many + 300), hard))
    host, _, port = served.address.partition(":")
    opened = []
    try:
        for _ in range(many):
            plain = socket.socket()
            plain.setblocking(False)
            plain.connect_ex((host, int(port)))
            opened.append(plain)
        with served.caller("south") as caller:
            caller.offers()
    finally:
        for plain in opened:
            plain.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_calls_at_once_than_are_taken_are_refused_and_not_queued(served: Coordinator, channel: Any) -> None:
    metadata = [signed(served, "north", "Offers", b"").metadata() for _ in range(200)]
    pending = [
        channel.unary_unary(f"/{SERVICE}/Offers").future(b"", timeout=PATIENCE_S, metadata=each) for each in metadata
    ]
    codes = [call.code() for call in pending]
    assert grpc.StatusCode.OK in codes
    assert set(codes) <= {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE}


def test_calls_that_are_begun_and_left_do_not_use_up_the_threads(
    served: Coordinator, channel: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a name, a key or a certificate: anybody can begin calls, as many as are taken at once, and send no request."""
    monkeypatch.setattr(consortium, "REQUEST_S", 1.0)
    begun = b"".join(frame(HEADERS, 4, 2 * number + 1, CALL) for number in range(consortium.STREAMS_MAX))
    with contextlib.ExitStack() as stack:
        for _ in range(consortium.CALLS_MAX // consortium.STREAMS_MAX + 1):
            secure = stack.enter_context(tls(served, "h2"))
            secure.sendall(PREFACE + frame(SETTINGS, 0, 0) + begun)
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                sent(channel, "Offers", b"", signed(served, "north", "Offers", b"").metadata())
                break
            except grpc.RpcError as error:  # while all places are taken; they come back when the time is over
                assert error.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)
                assert time.monotonic() < end
                time.sleep(0.1)
    assert "Traceback" not in caplog.text


def test_what_was_tried_is_nowhere_in_the_journal_and_the_chain_is_whole(served: Coordinator) -> None:
    assert lines(served) > 0
    text = (served.home.root / "journal.jsonl").read_text()
    assert not [trace for trace in ("DROP TABLE", "passwd", "rm -rf", "..", "guessed-by") if trace in text]
