"""The dashboard's door against whoever stands before it: other names, methods, paths, slow callers, guessed passwords."""

import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from coordinator import settings
from dashboard_cast import Shown, shown
from typer.testing import CliRunner

from fl_server import dashboard, door
from fl_server.cli import app
from fl_server.roster import Home
from privacy import keys
from privacy.errors import DocumentError, KeyFileUnsafe, TrustError

PASSWORD = "four random words, long enough"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    made = Home.found(tmp_path_factory.mktemp("door") / "c", settings())
    door.set_password(made.root / "keys" / dashboard.PASSWORD, PASSWORD)
    return made


@pytest.fixture(scope="module")
def show(home: Home) -> Iterator[Shown]:
    with shown(home) as served:
        yield served


@pytest.fixture
def locked(home: Home) -> Iterator[Shown]:
    with shown(home, login=True) as served:
        yield served


def raw(port: int, request: bytes, seconds: float = 5.0) -> bytes:
    """What comes back for these bytes until the connection ends or nothing comes any more."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as link:
        link.sendall(request)
        found = b""
        try:
            while block := link.recv(65536):
                found += block
        except (TimeoutError, ConnectionResetError):
            pass
        return found


def browser(home: Home, served: Shown) -> httpx.Client:
    context = ssl.create_default_context(cadata=home.ca_pem.decode())
    return httpx.Client(base_url=served.address, verify=context, headers={"origin": served.address})


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "localhost:1", "", "127.0.0.1:{port}@evil", "x" * 4000]
)
def test_another_name_in_the_host_header_gets_nothing(show: Shown, host: str) -> None:
    named = host.replace("{port}", str(show.port))
    answer = raw(show.port, f"GET / HTTP/1.1\r\nHost: {named}\r\nConnection: close\r\n\r\n".encode())
    assert answer.split(b" ")[1] in (b"421", b"400") and b"<main" not in answer


def test_two_host_headers_or_none_get_nothing(show: Shown) -> None:
    own = f"Host: 127.0.0.1:{show.port}\r\n"
    for headers in (own + "Host: evil.example\r\n", own * 2, ""):
        for version in ("1.1", "1.0"):
            answer = raw(show.port, f"GET / HTTP/{version}\r\n{headers}Connection: close\r\n\r\n".encode())
            assert answer.split(b" ")[1] in (b"421", b"400") and b"<main" not in answer
    assert httpx.get(f"http://localhost:{show.port}/").status_code == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "CONNECT", "BREW"])
@pytest.mark.parametrize("path", ["/", "/login", "/metrics", "/runs/x"])
def test_only_get_is_answered(show: Shown, method: str, path: str) -> None:
    request = (
        f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{show.port}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    )
    assert b" 405 " in raw(show.port, request.encode()).split(b"\r\n")[0]


@pytest.mark.parametrize(
    "path",
    [
        "/../../../etc/passwd", "/static/../../server.yaml", "/static/..%2f..%2fserver.yaml", "/static/%2e%2e/cli.py",
        "/runs/../keys/ca.key", "/runs/%2e%2e%2fserver.yaml", "/runs/..", "/runs/%00", "/runs/a%0d%0ab", "//evil.example/",
        "/static/base.html", "/keys/ca.key", "/runs/x/y", "/live?page=../../etc/passwd", "/live?page=//x", "/login",
    ],
)  # fmt: skip
def test_no_path_leads_out(show: Shown, path: str) -> None:
    request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{show.port}\r\nConnection: close\r\n\r\n"
    answer = raw(show.port, request.encode())
    assert answer.split(b" ")[1] in (b"404", b"400"), answer[:200]
    assert b"PRIVATE" not in answer and b"service_port" not in answer and b"root:" not in answer


def test_long_addresses_and_heads_are_refused(show: Shown) -> None:
    assert httpx.get(f"{show.address}/?{'q' * 300}").status_code == 414
    assert httpx.get(f"{show.address}/{'p' * 300}").status_code == 414
    answer = raw(show.port, f"GET / HTTP/1.1\r\nHost: x\r\nA: {'a' * 20000}\r\n\r\n".encode())
    assert answer[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 421", b"HTTP/1.1 431")
    assert raw(show.port, b"\x16\x03\x01\x02\x00\x01\x00" * 40)[:12] in (b"HTTP/1.1 400", b"")


def test_who_sends_no_whole_request_is_shown_out_and_who_does_stays(
    show: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door.Impatient, "head_s", 0.5)
    began = time.monotonic()
    assert raw(show.port, b"GET / HTTP/1.1\r\nHos") == b"" and time.monotonic() - began < 3
    began = time.monotonic()
    assert raw(show.port, b"") == b"" and time.monotonic() - began < 3
    slow = (bytes([letter]) for letter in b"GET / HTTP/1.1\r\nHost: somewhere\r\nA: bcdefghijklmnop")
    with socket.create_connection(("127.0.0.1", show.port), timeout=5) as link, pytest.raises(ConnectionError):
        for letter in slow:  # one letter at a time is no way round
            link.sendall(letter)
            time.sleep(0.05)
    with httpx.stream("GET", f"{show.address}/live?page=/") as stream:  # an answer may take as long as it likes
        time.sleep(1.0)
        assert any(line.startswith("data") for line in stream.iter_lines() if line)


# The login -----------------------------------------------------------------------------------------------------------


def test_without_a_session_there_is_only_the_login(home: Home, locked: Shown) -> None:
    with browser(home, locked) as client:
        for path in ("/", "/runs", "/journal", "/nothing", "/runs/x"):
            answer = client.get(path)
            assert (answer.status_code, answer.headers["location"], answer.text) == (303, "/login", "")
        assert client.get("/live?page=/").status_code == 401
        assert client.get("/metrics").status_code == 303
        assert client.get("/healthz").text == "ok\n" and client.get("/static/dashboard.css").status_code == 200
        page = client.get("/login")
        assert page.status_code == 200 and 'type="password"' in page.text and "default-src 'none'" in str(page.headers)
        for forged in ("x", "A" * 43, "", "../x", "=;=" * 20):
            assert client.get("/", headers={"cookie": f"{door.COOKIE}={forged}"}).status_code == 303
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"http://127.0.0.1:{locked.port}/")  # nothing without TLS
    old = ssl.create_default_context(cadata=home.ca_pem.decode())
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(httpx.HTTPError):
        httpx.get(locked.address, verify=old)


def test_the_password_opens_and_leaving_closes(home: Home, locked: Shown) -> None:
    with browser(home, locked) as client:
        answer = client.post("/login", data={"password": PASSWORD})
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        cookie = answer.headers["set-cookie"]
        assert cookie.startswith("__Host-isocenter=") and PASSWORD not in cookie
        assert {"Secure", "HttpOnly", "SameSite=Strict", "Path=/"} <= {part.strip() for part in cookie.split(";")}
        assert "Domain" not in cookie
        page = client.get("/")
        assert page.status_code == 200 and "Log out" in page.text
        assert client.get("/metrics").status_code == 404  # Prometheus has no cookie: it asks a dashboard on loopback
        assert client.post("/").status_code == 405 and client.put("/login").status_code == 405
        token = client.cookies[door.COOKIE]
        assert client.post("/logout").status_code == 303
        assert client.get("/", headers={"cookie": f"{door.COOKIE}={token}"}).status_code == 303


def test_a_form_of_another_site_changes_nothing(home: Home, locked: Shown) -> None:
    with browser(home, locked) as client:
        for origin in ("https://evil.example", "null", "", f"http://127.0.0.1:{locked.port}"):
            answer = client.post("/login", data={"password": PASSWORD}, headers={"origin": origin})
            assert answer.status_code == 403 and "set-cookie" not in answer.headers


def test_passwords_are_tried_a_few_times_a_minute(home: Home, locked: Shown) -> None:
    with browser(home, locked) as client:
        tried = [client.post("/login", data={"password": f"guess number {n} of many"}) for n in range(8)]
        assert [each.status_code for each in tried] == [403] * 5 + [429] * 3
        assert tried[-1].headers["retry-after"] == "60" and "Too many tries" in tried[-1].text
        assert client.post("/login", data={"password": PASSWORD}).status_code == 429


def test_a_login_form_is_small_and_quick(home: Home, locked: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    with browser(home, locked) as client:
        assert client.post("/login", content=b"password=" + b"x" * 5000).status_code == 413
        assert client.post("/login", content=b"&".join([b"a=b"] * 100)).status_code in (403, 400)
        for odd in (b"", b"password", b"password=\xff\xfe", b"password=a&password=b"):
            assert client.post("/login", content=odd).status_code in (403, 429)
    monkeypatch.setattr(door, "BODY_S", 0.3)
    context = ssl.create_default_context(cadata=home.ca_pem.decode())
    host = f"127.0.0.1:{locked.port}"
    with context.wrap_socket(socket.create_connection(("127.0.0.1", locked.port)), server_hostname="127.0.0.1") as link:
        link.settimeout(5)
        link.sendall(
            f"POST /login HTTP/1.1\r\nHost: {host}\r\nOrigin: https://{host}\r\nContent-Length: 100\r\n\r\npass".encode()
        )
        assert link.recv(64).split()[1] == b"408"


def test_sessions_end_by_themselves_and_are_kept_as_hashes() -> None:
    clock = [0.0]
    sessions = door.Sessions(lambda: clock[0])
    token = sessions.begin()
    assert sessions.holds(token) and not any(token.encode() in name for name in sessions._held)
    clock[0] += door.IDLE_S - 1
    assert sessions.holds(token)
    clock[0] += door.IDLE_S + 1
    assert not sessions.holds(token)
    token = sessions.begin()
    ends = clock[0] + door.SESSION_S
    while clock[0] < ends - door.IDLE_S / 2:
        clock[0] += door.IDLE_S / 2
        assert sessions.holds(token)
    clock[0] += door.IDLE_S / 2
    assert not sessions.holds(token)
    tokens = [sessions.begin() for _ in range(door.SESSIONS_MAX + 5)]
    assert len(set(tokens)) == len(tokens) and sum(map(sessions.holds, tokens)) == door.SESSIONS_MAX


def test_tries_are_counted_by_address_and_together() -> None:
    clock = [0.0]
    tries = door.Tries(lambda: clock[0])
    for n in range(door.TRIES_ALL):
        tries.take(f"10.0.0.{n // door.TRIES_EACH}")
    with pytest.raises(door.Refused):
        tries.take("10.9.9.9")
    clock[0] += door.WINDOW_S + 1
    tries.take("10.9.9.9")


def test_a_stored_password_is_a_salted_scrypt_hash(tmp_path: Path) -> None:
    """Oracle: hashlib's scrypt, of OpenSSL, with the parameters in the record."""
    import hashlib
    import json

    records = [keys.password_record(PASSWORD) for _ in range(2)]
    assert records[0] != records[1] and all(keys.is_password(each, PASSWORD) for each in records)
    assert not keys.is_password(records[0], PASSWORD + " ")
    found = json.loads(records[0])
    oracle = hashlib.scrypt(
        PASSWORD.encode(),
        salt=bytes.fromhex(found["salt"]),
        n=found["n"],
        r=found["r"],
        p=found["p"],
        dklen=32,
        maxmem=2**26,
    )
    assert oracle.hex() == found["hash"] and found["n"] >= 2**15 and len(found["salt"]) >= 32
    for damaged in (b"", b"[]", b"{}", b'{"version":1}', records[0].replace(b'"n": 32768', b'"n": 2')):
        with pytest.raises(TrustError):
            keys.is_password(damaged, PASSWORD)
    with pytest.raises(DocumentError):
        door.set_password(tmp_path / "x", "too short")
    door.set_password(tmp_path / "x", PASSWORD)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o600


# Where it may be shown -----------------------------------------------------------------------------------------------


def test_beyond_this_machine_only_with_a_password(tmp_path: Path, home: Home) -> None:
    bare = Home.found(tmp_path / "c", settings())
    for where in (dashboard.Address("0.0.0.0", 0), dashboard.Address("127.0.0.1", 0, login=True)):  # noqa: S104
        with pytest.raises(DocumentError, match="only after a password was set"):
            dashboard.serve(bare, where, print)
    with pytest.raises(DocumentError, match="no address"):
        dashboard.serve(bare, dashboard.Address("example.org", 0), print)
    assert [door.is_loopback(a) for a in ("127.0.0.1", "127.9.9.9", "::1", "0.0.0.0", "10.0.0.1")] == [  # noqa: S104
        True, True, True, False, False,
    ]  # fmt: skip
    (tmp_path / "open.key").write_bytes(home.tls_key.read_bytes())
    (tmp_path / "open.key").chmod(0o644)
    with pytest.raises(KeyFileUnsafe):
        door.tls(home.tls_pem, tmp_path / "open.key")
    keys.make_key(tmp_path / "other.key")
    with pytest.raises(TrustError):
        door.tls(home.tls_pem, tmp_path / "other.key")


def test_the_command_sets_a_password(home: Home, tmp_path: Path) -> None:
    made = Home.found(tmp_path / "c", settings())
    typed = f"{PASSWORD} 2\n" * 2
    done = CliRunner().invoke(app, ["dashboard", "--set-password", "--home", str(made.root)], input=typed)
    assert done.exit_code == 0 and PASSWORD not in done.output
    record = keys.read_private(made.root / "keys" / dashboard.PASSWORD)
    assert keys.is_password(record, f"{PASSWORD} 2")
