"""Hostile requests to the public port of a real coordinator. After each of them an honest site is answered."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
from gate import BEAT, CALLS, Gate, code, flowers, opened, request, status

from fl_server.link import superlink_app
from privacy import parcels
from privacy.greeting import HEADER, own


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


# What may be asked for


def routes() -> list[str]:
    """Oracle: every route of Flower's application, in its schema or not."""

    def listed(some: list[Any]) -> set[str]:
        found = {route.path for route in some if hasattr(route, "path")}
        for route in some:
            if inner := getattr(route, "original_router", None):
                found |= listed(inner.routes)
        return found

    app = superlink_app(1, b"x" * 32)
    return sorted(listed(app.routes) | set(app.openapi()["paths"]))


ROUTES = sorted({*routes(), parcels.RECEIVE_ORDER, parcels.SEND_REPORT, parcels.SEND_ORDERS, parcels.RECEIVE_REPORTS})


def test_flower_has_the_routes_that_must_stay_inside() -> None:
    kinds = {path.split("/")[2] for path in ROUTES if path.startswith("/v1/")}
    assert kinds >= {"control", "runtime", "fleet"} and len(ROUTES) > 40
    assert {f"/v1/fleet/{name}" for name in CALLS - {"receive", "send"}} <= set(ROUTES)


@pytest.mark.parametrize("method", ["POST", "GET"])
@pytest.mark.parametrize("path", ROUTES)
def test_of_all_routes_of_flower_exactly_the_calls_of_a_node_pass(gate: Gate, path: str, method: str) -> None:
    answer = gate.say(request(gate, f"{method} {path} HTTP/1.1".encode()))
    if path.removeprefix("/v1/fleet/") in CALLS and method == "POST":
        assert flowers(answer)
    else:
        assert (status(answer), code(answer)) == (404, "path-unknown")


TARGETS = [
    "/v1/fleet/pull%2Dmessages",
    "/v1/fleet%2freceive",
    "/v1/fleet/%70ull-messages",
    "/v1/fleet/receive%00",
    "/v1/fleet/receive%20",
    "/v1/fleet/%2e%2e/control/start-run",
    "/v1/fleet/%252e%252e/control/start-run",
    "/v1/fleet/../control/start-run",
    "/v1/fleet/./receive",
    "/v1/fleet/receive/..",
    "/v1/fleet/receive/../../control/start-run",
    "//v1/fleet/receive",
    "/v1//fleet/receive",
    "/v1/fleet//receive",
    "/v1/fleet/receive/",
    "/v1/fleet/receive//",
    "//v1/control/start-run",
    "/v1/fleet\\receive",
    "/v1/fleet/receive?",
    "/v1/fleet/receive?x=1",
    "/v1/fleet/receive#x",
    "/v1/fleet/receive;x=1",
    "/V1/FLEET/PULL-MESSAGES",
    "/v1/fleet/receive.",
    "v1/fleet/receive",
    "*",
    "http://127.0.0.1/v1/fleet/receive",
    "https://x/v1/control/start-run",
    "//x/v1/fleet/receive",
    "x:443",
    "/",
    "/v1/fleet/" + "a" * 3000,
]


@pytest.mark.parametrize("target", TARGETS)
def test_another_spelling_of_a_path_is_another_path(gate: Gate, target: str) -> None:
    answer = gate.say(request(gate, f"POST {target} HTTP/1.1".encode()))
    assert (status(answer), code(answer)) == (404, "path-unknown")


METHODS = ["GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "TRACE", "PRI", "POSTS", "X"]


@pytest.mark.parametrize("method", METHODS)
def test_another_method_is_not_known(gate: Gate, method: str) -> None:
    answer = gate.say(request(gate, f"{method} {BEAT} HTTP/1.1".encode()))
    assert (status(answer), code(answer)) == (404, "path-unknown")


# How it may be asked

LINES = {
    "http-1.0": f"POST {BEAT} HTTP/1.0".encode(),
    "http-0.9": f"POST {BEAT}".encode(),
    "http-1.2": f"POST {BEAT} HTTP/1.2".encode(),
    "http-2": f"POST {BEAT} HTTP/2.0".encode(),
    "http-3": f"POST {BEAT} HTTP/3".encode(),
    "http-in-lower-case": f"POST {BEAT} http/1.1".encode(),
    "method-in-lower-case": f"post {BEAT} HTTP/1.1".encode(),
    "two-spaces": f"POST  {BEAT} HTTP/1.1".encode(),
    "tab": f"POST\t{BEAT} HTTP/1.1".encode(),
    "space-in-front": f" POST {BEAT} HTTP/1.1".encode(),
    "space-behind": f"POST {BEAT} HTTP/1.1 ".encode(),
    "space-in-target": b"POST /v1/fleet/pull messages HTTP/1.1",
    "nul-in-target": b"POST /v1/fleet/receive\0 HTTP/1.1",
    "line-feed-in-target": b"POST /v1/fleet/receive\n HTTP/1.1",
    "carriage-return-in-target": b"POST /v1/fleet/receive\r HTTP/1.1",
    "letters-beyond-ascii": "POST /v1/fleet/pull-messagés HTTP/1.1".encode(),
    "no-target": b"POST HTTP/1.1",
    "empty-line-first": b"\r\n" + f"POST {BEAT} HTTP/1.1".encode(),
    "request-in-a-line": f"POST {BEAT} HTTP/1.1\nHost: x\n\nPOST /v1/control/start-run HTTP/1.1".encode(),
    "nonsense": bytes(range(1, 200)),
}


@pytest.mark.parametrize("name", LINES)
def test_another_request_line_is_malformed(gate: Gate, name: str) -> None:
    answer = gate.say(request(gate, LINES[name]))
    assert (status(answer), code(answer)) == (400, "message-malformed")


FIELDS = {
    "length-and-chunks": b"Transfer-Encoding: chunked",
    "other-chunks": b"Transfer-Encoding: xchunked",
    "chunks-after-a-tab": b"Transfer-Encoding:\tchunked",
    "chunks-twice": b"Transfer-Encoding: chunked, chunked",
    "chunks-identity": b"Transfer-Encoding: identity",
    "chunks-before-a-space": b"Transfer-Encoding : chunked",
    "chunks-after-a-line-feed": b"X: y\nTransfer-Encoding: chunked",
    "chunks-after-a-carriage-return": b"X: y\rTransfer-Encoding: chunked",
    "chunks-on-a-folded-line": b"X: y\r\n Transfer-Encoding: chunked",
    "same-length-twice": b"Content-Length: 0",
    "another-length": b"Content-Length: 5",
    "length-before-a-space": b"Content-Length : 5",
    "length-in-capitals": b"CONTENT-LENGTH: 0",
    "folded-with-a-space": b"X: y\r\n z",
    "folded-with-a-tab": b"X: y\r\n\tz",
    "nul-in-a-value": b"X: a\0b",
    "nul-in-a-name": b"X\0: a",
    "line-feed-in-a-value": b"X: a\nY: b",
    "carriage-return-in-a-value": b"X: a\rY: b",
    "escape-in-a-value": b"X: \x1b[31m",
    "letters-beyond-ascii": "X: é".encode(),
    "raw-bytes": b"X: \xff\xfe",
    "no-colon": b"X",
    "no-name": b": x",
    "space-in-a-name": b"X Y: z",
    "bracket-in-a-name": b"X[]: z",
    "long-name": b"X" * 65 + b": z",
    "host-twice": b"Host: y",
    "key-twice": b"flwr-public-key: x",
    "key-in-capitals": b"FLWR-PUBLIC-KEY: x",
    "web-socket": b"Upgrade: websocket",
    "http-2-upgrade": b"Upgrade: h2c",
    "http-2-settings": b"HTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA",
    "expect": b"Expect: 100-continue",
    "trailer": b"Trailer: X",
    "compressed": b"Content-Encoding: gzip",
    "forty-headers": b"\r\n".join(f"X-{number}: y".encode() for number in range(40)),
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_header_that_could_be_read_in_two_ways_is_malformed(gate: Gate, name: str) -> None:
    answer = gate.say(request(gate, f"POST {BEAT} HTTP/1.1".encode(), FIELDS[name]) + b"0\r\n\r\n")
    assert (status(answer), code(answer)) == (400, "message-malformed")


def test_versions_are_exchanged_and_what_is_none_is_passed_over(gate: Gate) -> None:
    """Other versions are noted at most every ten seconds, so the first one stays; the answer tells the coordinator's."""
    for text in (b"<b>.0.0.0", b"9" * 500, b"3.0.1", b"4.1.2.3", b"4.1.2.4"):
        answer = gate.say(request(gate, f"POST {BEAT} HTTP/1.1".encode(), b"Isocenter-Versions: " + text))
        assert flowers(answer) and f"\r\n{HEADER}: {own()}\r\n".encode() in answer
    end = time.monotonic() + 5
    while (told := gate.home.roster.told()["north"].versions) == own() and time.monotonic() < end:  # as it joined
        time.sleep(0.05)
    assert str(told) == "4.1.2.3"


LENGTHS = ["+5", "-1", "0x10", "1e3", "05", "00", "5.0", "5, 5", "5 5", "five", "\u00b2", "99999999999", '"5"', "5;q=1"]


@pytest.mark.parametrize("length", LENGTHS)
def test_a_length_is_a_plain_number(gate: Gate, length: str) -> None:
    answer = gate.say(request(gate, length=length.encode()) + b"12345")
    assert (status(answer), code(answer)) == (400, "message-malformed")


def test_a_request_without_a_host_is_malformed(gate: Gate) -> None:
    answer = gate.say(request(gate).replace(b"Host: x\r\n", b""))
    assert (status(answer), code(answer)) == (400, "message-malformed")


@pytest.mark.parametrize("end", [b"\n\n", b"\n\r\n", b"\r\r", b"\r\n\n"])
def test_a_head_that_ends_otherwise_is_malformed_at_once(gate: Gate, end: bytes) -> None:
    answer = gate.say(request(gate).removesuffix(b"\r\n\r\n") + end + b"POST /v1/control/start-run HTTP/1.1" + end)
    assert (status(answer), code(answer)) == (400, "message-malformed")


@pytest.mark.parametrize("preface", [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9), b"\0" * 64, b"\x16\x03\x01" * 50])
def test_another_protocol_is_malformed(gate: Gate, preface: bytes) -> None:
    answer = gate.say(preface)
    assert (status(answer), code(answer)) == (400, "message-malformed")


def test_http_2_is_not_agreed_upon(gate: Gate) -> None:
    context = gate.context()
    context.set_alpn_protocols(["h2"])
    with gate.open(context) as secure:
        assert secure.selected_alpn_protocol() is None and secure.version() == "TLSv1.3"
        assert secure.compression() is None


# How much


@pytest.mark.parametrize(
    "text",
    [
        b"X: " + b"a" * 9000,
        b"\r\n".join(b"X-%d: %s" % (number, b"a" * 400) for number in range(30)),
        b"A" * 20_000,
        b"X: " + b"a" * 5_000_000,
    ],
    ids=["one-value", "many-values", "one-name", "five-megabytes"],
)
def test_a_head_over_the_limit_is_refused(gate: Gate, text: bytes) -> None:
    answer = gate.say(request(gate, f"POST {BEAT} HTTP/1.1".encode(), text))
    assert (status(answer), code(answer)) == (431, "head-too-large")


def test_a_head_without_an_end_is_refused_at_the_limit(gate: Gate) -> None:
    with gate.open() as secure:
        secure.sendall(f"POST {BEAT} HTTP/1.1\r\n".encode())
        got = Gate.spoken(secure, b"X: y\r\n" * 2000, first=True)
    assert (status(got), code(got)) == (431, "head-too-large")


@pytest.mark.parametrize("path", sorted(CALLS))
def test_a_body_over_the_limit_is_refused_when_it_is_announced(gate: Gate, path: str) -> None:
    """Nothing of it is sent, so the answer does not come from having read it."""
    most = 256 * 2**20 if path == "send" else 2**20
    line = f"POST /v1/fleet/{path} HTTP/1.1".encode()
    answer = gate.say(request(gate, line, length=str(most + 1).encode()))
    assert (status(answer), code(answer)) == (413, "body-too-large")


def test_a_body_within_the_limit_reaches_flower(gate: Gate) -> None:
    answer = gate.say(request(gate, b"POST /v1/fleet/send HTTP/1.1", length=b"3000000") + bytes(3_000_000))
    assert 400 <= status(answer) < 500 and b"content-type: text/plain" not in answer  # in its own words


def test_a_body_of_unknown_length_is_refused(gate: Gate) -> None:
    chunks = b"1\r\nx\r\n" * 1000
    answer = gate.say(request(gate, length=b"") + chunks)
    assert (status(answer), code(answer)) == (411, "length-missing")
    line = f"POST {BEAT} HTTP/1.1".encode()
    answer = gate.say(request(gate, line, b"Transfer-Encoding: chunked", length=b"") + chunks)
    assert (status(answer), code(answer)) == (400, "message-malformed")


def test_a_site_holds_no_more_than_one_largest_body_at_a_time(gate: Gate) -> None:
    line = b"POST /v1/fleet/send HTTP/1.1"
    with gate.open() as first:
        first.sendall(request(gate, line, length=str(200 * 2**20).encode()) + b"x")
        answer = gate.say(request(gate, line, length=str(100 * 2**20).encode()))
        assert (status(answer), code(answer)) == (503, "too-many-connections")


@pytest.mark.parametrize("second", ["whole", "one-byte", "another"])
def test_a_second_request_before_the_answer_ends_the_connection(gate: Gate, second: str) -> None:
    one = request(gate).replace(b"Connection: close\r\n", b"")
    more = {"whole": one, "one-byte": b"x", "another": b"POST /v1/control/start-run HTTP/1.1\r\nHost: x\r\n\r\n"}
    with gate.open() as secure:
        answer = Gate.spoken(secure, one + more[second], first=second != "whole")
    assert (status(answer), code(answer)) == (400, "message-malformed")
    assert answer.count(b"HTTP/1.1 ") == 1


def test_two_requests_one_after_the_other_are_answered(gate: Gate) -> None:
    one = request(gate).replace(b"Connection: close\r\n", b"")
    with gate.open() as secure:
        for _ in range(2):
            assert flowers(Gate.spoken(secure, one, first=True))


@pytest.mark.parametrize("cut", [1, 30, 120, -3, -1])
def test_a_truncated_request_leaves_nothing_behind(gate: Gate, cut: int) -> None:
    """Sent in part, and the line hung up: in the line, in a header, in the body."""
    whole = request(gate, length=b"10") + bytes(10)
    with gate.open() as secure:
        secure.sendall(whole[:cut])
