"""Through a hospital's HTTP proxy: joining, studies, approvals and a whole run go in its tunnel, and nothing goes past it."""

import json
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from coordinator import Coordinator, coordinator, free_port, study
from hospital import study as tiny_study
from proxies import Proxy, proxy
from stage import Stage
from typer.testing import CliRunner

from fl_client import enrol, readiness
from fl_client.cli import app as fl_client
from fl_client.site import Site, SiteFile
from fl_server import researcher
from fl_server.research import app as fl_study
from models.study import parse, read
from privacy import calls, keys, reach
from privacy.errors import (
    DocumentError,
    KeyFileUnsafe,
    NotEnrolled,
    ProxyRefused,
    TrustError,
    Unreachable,
    WrongAuthority,
)
from privacy.reach import Way

SECRET = "opensesame"
WORDS = (b"opacity", b"Opacities", b"north", b"rosa", b"isocenter", b"Enrol", b"Greet", SECRET.encode())


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coordinator]:
    with coordinator(tmp_path_factory.mktemp("served")) as made:
        yield made


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment that names another proxy, and exceptions from it: neither may matter."""
    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "grpc_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    for name in ("NO_PROXY", "no_proxy", "no_grpc_proxy"):
        monkeypatch.setenv(name, "127.0.0.1,localhost,*")


def through(given: Proxy, served: Coordinator) -> None:
    """Only tunnels to the two ports were asked for, and what went through them was ciphertext."""
    assert set(given.asked) == {f"CONNECT {served.address}"}
    seen = bytes(given.up + given.down)
    assert len(given.up) > 1000 and len(given.down) > 1000
    assert not [word for word in WORDS if word in seen]
    assert all(bytes(each) == b"\x16\x03" for each in (given.up[:2], given.down[:2]))  # TLS, from its first byte on


@pytest.mark.usefixtures("elsewhere")
def test_a_site_joins_reads_and_approves_through_the_tunnel(served: Coordinator, tmp_path: Path) -> None:
    if "rosa" not in {each.name for each in served.home.roster.researchers()}:
        served.join("rosa", "researcher")
    home, line = tmp_path / "north", str(served.home.invite("north", "site"))
    with proxy() as out:
        done = CliRunner().invoke(
            fl_client, ["join", line, "--home", str(home), "--proxy", out.url], catch_exceptions=False
        )
        assert done.exit_code == 0, done.output
        assert read(SiteFile, SiteFile.path(home)).coordinator.proxy.url == out.url  # type: ignore[union-attr]
        assert "proxy.example.org" not in SiteFile.path(home).read_text()
        served.submit(study("north"))
        [offer] = enrol.fetch_offers(home)
        enrol.decide(home, offer, "approved")
        assert enrol.greet(home) is not None
        through(out, served)
    assert served.home.roster.approvals(offer.digest) == ["north"]
    with pytest.raises(Unreachable, match="proxy"):  # it has gone, and nothing goes past it
        enrol.fetch_offers(home)


@pytest.mark.usefixtures("elsewhere")
def test_a_researcher_goes_through_the_tunnel(served: Coordinator, tmp_path: Path) -> None:
    line, home = str(served.home.invite("remo", "researcher")), tmp_path / "remo"
    with proxy() as out:
        words = ["join", line, "--home", str(home), "--proxy", out.url]
        assert CliRunner().invoke(fl_study, words, catch_exceptions=False).exit_code == 0
        shown = CliRunner().invoke(fl_study, ["studies", "--json", "--home", str(home)], catch_exceptions=False)
        assert json.loads(shown.stdout) == []
        through(out, served)
        assert stat.S_IMODE((home / "researcher.yaml").stat().st_mode) == 0o600
        with pytest.raises(DocumentError, match="another proxy"):
            researcher.join(line, home, reach.Proxy(url="http://other.example.org:3128"))
    with pytest.raises(Unreachable, match="proxy"), researcher.open_caller(home) as caller:
        caller.studies()


def test_a_proxy_that_asks_gets_name_and_password_and_nobody_else_does(served: Coordinator, tmp_path: Path) -> None:
    line, secret = str(served.home.invite("west", "site")), tmp_path / "secret"
    keys.write_private(secret, f"{SECRET}\n".encode())
    given = ["--proxy-user", "isocenter", "--proxy-password-file", str(secret)]
    with proxy(account=f"isocenter:{SECRET}") as out:
        words = ["join", line, "--home", str(tmp_path / "west"), "--proxy", out.url]
        refused = CliRunner().invoke(fl_client, words)
        assert isinstance(refused.exception, ProxyRefused) and "asks for a name and a password (407)" in str(
            refused.exception
        )
        assert not (tmp_path / "west" / "site.yaml").exists()
        done = CliRunner().invoke(fl_client, [*words, *given], catch_exceptions=False)
        assert done.exit_code == 0 and SECRET not in done.output
        assert enrol.greet(tmp_path / "west") is not None
        assert SECRET.encode() not in bytes(out.up + out.down)
        keys.write_private(secret, b"wrong")
        with pytest.raises(ProxyRefused, match=r"does not take this name and password \(407\)") as caught:
            enrol.greet(tmp_path / "west")
        assert "Kerberos" in caught.value.remedy and "wrong" not in str(caught.value)
        secret.chmod(0o644)
        with pytest.raises(KeyFileUnsafe):
            enrol.greet(tmp_path / "west")
        secret.unlink()
        with pytest.raises(NotEnrolled):
            enrol.greet(tmp_path / "west")


@pytest.mark.parametrize(
    ("answer", "said", "remedy"),
    [
        (403, "permits no tunnel", "permit CONNECT to both ports"),
        (405, "permits no tunnel", "permit CONNECT"),
        (502, "cannot reach", "Ask the coordinator whether it runs"),
        (504, "cannot reach", "Ask the coordinator whether it runs"),
    ],
)
def test_what_a_proxy_answers_is_said_in_words(
    served: Coordinator, tmp_path: Path, answer: int, said: str, remedy: str
) -> None:
    """By the handshake of joining, by gRPC and by the look of `fl-client check` alike."""
    host, port = "127.0.0.1", served.home.settings.service_port
    with proxy(answer=answer) as out:
        way = Way(host, out.port)
        with pytest.raises(ProxyRefused, match=said) as first:
            reach.shown_chain(host, port, way)
        key = keys.make_key(tmp_path / "any.key")
        with (
            pytest.raises(ProxyRefused, match=said) as second,
            calls.Caller(served.address, served.home.ca_pem, "north", key, way) as caller,
        ):
            caller.greet()
        for caught in (first, second):
            assert str(answer) in str(caught.value) and remedy in caught.value.remedy
        assert set(out.asked) == {f"CONNECT {served.address}"}


def answering(reply: bytes) -> Callable[[socket.socket], None]:
    def serve(server: socket.socket) -> None:
        while True:
            try:
                link, _ = server.accept()
            except OSError:
                return
            with link:
                link.recv(4096)
                link.sendall(reply)
                time.sleep(0.05)

    return serve


HOSTILE = {
    "nothing": b"",
    "no http": b"SSH-2.0-OpenSSH_9.6\r\n",
    "half a line": b"HTTP/1.1 20",
    "no status": b"HTTP/1.1 two hundred\r\n\r\n",
    "endless": b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 5000,
    "speaks first": b"HTTP/1.1 200 OK\r\n\r\n\x16\x03\x03\x00\x01",
    "control characters": b"HTTP/1.1 403 \x1b[2J\x1b[1;1Hall is well\r\n\r\n",
    "very large number": b"HTTP/1.1 99999999999999999999 x\r\n\r\n",
}


@pytest.mark.parametrize("reply", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_proxy_is_refused_by_name(reply: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=answering(reply), args=(server,), daemon=True).start()
        way = Way("127.0.0.1", server.getsockname()[1])
        with pytest.raises(ProxyRefused) as caught:
            reach.connect("coordinator.example.org", 9441, way, 2.0)
        assert str(caught.value).isprintable() and caught.value.remedy.isprintable()


def test_a_silent_proxy_and_none_at_all() -> None:
    with proxy(answer=0) as out, pytest.raises(ProxyRefused, match="did not answer in time"):
        reach.connect("coordinator.example.org", 9441, Way("127.0.0.1", out.port), 0.3)
    with pytest.raises(ProxyRefused, match=r"proxy cannot be reached: nothing listens at 127\.0\.0\.1"):
        reach.connect("coordinator.example.org", 9441, Way("127.0.0.1", free_port()), 0.3)


def test_a_proxy_that_leads_to_another_server_is_no_way_in(served: Coordinator, tmp_path: Path) -> None:
    """It may send the tunnel wherever it likes: TLS inside it ends at the consortium or not at all."""
    line = served.home.invite("away", "site")
    with coordinator(tmp_path / "other", name="other") as other, proxy(elsewhere=other.address) as out:
        with pytest.raises(WrongAuthority):
            enrol.join(str(line), tmp_path / "away", reach.Proxy(url=out.url))
        key = keys.make_key(tmp_path / "any.key")
        way = Way("127.0.0.1", out.port)
        with pytest.raises(WrongAuthority), calls.Caller(served.address, served.home.ca_pem, "x", key, way) as caller:
            caller.greet()
        assert line.token.encode() not in bytes(out.up)


@pytest.mark.parametrize(
    "url",
    [
        "https://proxy.example.org:3128",
        "proxy.example.org:3128",
        "http://proxy.example.org",
        "http://proxy.example.org:0",
        "http://proxy.example.org:99999",
        "http://proxy.example.org:3128/path",
        "http://proxy.example.org:3128\r\nX: y",
        "http://-x:1",
        "http://:3128",
    ],
)
def test_what_is_no_proxy_is_refused_where_it_stands(tmp_path: Path, url: str) -> None:
    done = CliRunner().invoke(fl_client, ["join", "x", "--home", str(tmp_path), "--proxy", url])
    assert isinstance(done.exception, DocumentError) and "http://host:port" in str(done.exception)


def test_a_password_in_the_url_is_refused_and_not_repeated(tmp_path: Path) -> None:
    url = f"http://me:{SECRET}@proxy.example.org:3128"
    done = CliRunner().invoke(fl_client, ["join", "x", "--home", str(tmp_path), "--proxy", url])
    assert isinstance(done.exception, DocumentError) and SECRET not in str(done.exception)
    where = 'coordinator: {gateway: "a:1", service: "a:2", proxy: {url: "%s"}}'
    with pytest.raises(DocumentError, match="password_file") as caught:
        parse(SiteFile, f"version: 1\nsite: north\n{where % url}\n", "site.yaml")
    assert SECRET not in str(caught.value)
    for more in (
        'user: "a"',
        'password_file: "b"',
        'user: "a:b", password_file: "c"',
        'user: "a\\n", password_file: "c"',
    ):
        section = f'coordinator: {{gateway: "a:1", service: "a:2", proxy: {{url: "http://p:1", {more}}}}}'
        with pytest.raises(DocumentError):
            parse(SiteFile, f"version: 1\nsite: north\n{section}\n", "site.yaml")


def test_a_way_shows_no_secret(tmp_path: Path) -> None:
    keys.write_private(tmp_path / "p", b"a\nb")
    with pytest.raises(TrustError, match="one line"):
        reach.Proxy(url="http://p.example.org:1", user="u", password_file="p").way(tmp_path)
    keys.write_private(tmp_path / "p", SECRET.encode())
    way = reach.Proxy(url="http://p.example.org:1", user="u", password_file="p").way(tmp_path)
    assert SECRET not in f"{way} {way!r}" and "dTpv" not in f"{way} {way!r}"  # nor as base64
    assert way.headers == {"Proxy-Authorization": "Basic dTpvcGVuc2VzYW1l"}  # RFC 7617, by `base64`


def test_an_existing_site_yaml_is_not_written_over(served: Coordinator, tmp_path: Path) -> None:
    home, line = tmp_path / "kept", str(served.home.invite("kept", "site"))
    home.mkdir()
    SiteFile.path(home).write_text("version: 1\nsite: kept\n")
    with proxy() as out:
        enrol.join(line, home, reach.Proxy(url=out.url))
        assert Site.open(home).settings.coordinator.proxy.url == out.url  # type: ignore[union-attr]
        text = SiteFile.path(home).read_text()
        with pytest.raises(DocumentError, match="names another proxy"):
            enrol.join(line, home, reach.Proxy(url="http://other.example.org:3128"))
        assert SiteFile.path(home).read_text() == text
        found = {each.subject: each for each in readiness.findings(home)}
        assert found["service"].good and f"through the proxy 127.0.0.1:{out.port}" in found["service"].sentence
        assert f"CONNECT 127.0.0.1:{served.home.settings.gateway_port}" in out.asked
        assert "(502)" in found["gateway"].sentence  # no gateway runs behind this one


def test_a_long_poll_is_shorter_than_the_patience_of_proxies() -> None:
    """Squid, HAProxy and load balancers cut what is silent for a minute, some after half of one."""
    from fl_server.doorbell import PULLS

    assert max(seconds for _, seconds in PULLS.values()) < 30
    assert 30_000 < calls.KEEPALIVE_MS < 60_000  # the server takes a ping in half a minute


def test_the_example_in_site_yaml_is_what_the_reader_takes() -> None:
    text = (Path(enrol.__file__).parent.parent / "configs" / "site.yaml").read_text()
    example = [line for line in text.splitlines() if line.startswith(("  # proxy:", "  #   "))]
    section = "\n".join("  " + line.removeprefix("  # ") for line in example[:4])
    found = parse(SiteFile, f'version: 1\nsite: a\ncoordinator:\n  gateway: "a:1"\n  service: "a:2"\n{section}\n', "x")
    assert found.coordinator is not None and found.coordinator.proxy is not None
    assert found.coordinator.proxy.user and found.coordinator.proxy.password_file
    made = enrol._template(
        calls.Enrolment("north", "site", "a:1", "a:2", "0" * 64), replace_url(found.coordinator.proxy)
    )
    assert parse(SiteFile, made, "x").coordinator.proxy.url == "http://p.example.org:1"  # type: ignore[union-attr]


def replace_url(given: reach.Proxy) -> reach.Proxy:
    return given.model_copy(update={"url": "http://p.example.org:1"})


class Behind(Stage):
    """A stage on which everybody but the coordinator joins through a proxy."""

    def __init__(self, folder: Path, url: str) -> None:
        super().__init__(folder)
        self.url = url

    def command(self, *words: str) -> str:
        return super().command(*words, *(("--proxy", self.url) if words[1] == "join" else ()))


@pytest.mark.deploy
@pytest.mark.timeout(900)
def test_a_whole_run_goes_through_the_tunnel_and_nothing_past_it(tmp_path: Path) -> None:
    """Every connection to the coordinator's two ports, while two hospitals train, is the proxy's: this process."""
    direct, over = set[tuple[int | None, int]](), threading.Event()
    with proxy() as out:
        stage = Behind(tmp_path / "stage", out.url)
        ports = {stage.gateway_port, stage.service_port}

        def watch() -> None:
            while not over.wait(0.1):
                for each in psutil.net_connections("tcp"):
                    if each.raddr and each.raddr.port in ports and each.pid not in (None, os.getpid()):
                        direct.add((each.pid, each.raddr.port))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            stage.found()
            stage.serve()
            stage.join_researcher()
            for name in ("north", "south"):
                stage.open_hospital(name, "aurora", 16, minimum_patients=2)
                site = stage.site(name) / "site.yaml"
                site.write_text(site.read_text().replace("least_protection: masked", "least_protection: plain"))
            path = tmp_path / "study.yaml"
            path.write_text(json.dumps(tiny_study().model_dump(mode="json")))
            digest = stage.submit(path)
            for name in ("north", "south"):
                stage.approve(name, digest)
                stage.node(name)
            looked = CliRunner().invoke(fl_client, ["doctor", "--json", "--home", str(stage.site("north"))])
            shown = stage.study("run", digest)
        finally:
            stage.stop()
            over.set()
            watcher.join()
    assert "Run finished: complete" in shown
    found = {each["subject"]: each for each in json.loads(looked.stdout)["findings"]}
    assert "through" in found["gateway"]["sentence"] and "took this one's" in found["gateway"]["sentence"]
    assert all(found[each]["state"] == "ok" for each in ("proxy", "service", "greeting", "clock", "versions"))
    assert direct == set()
    assert set(out.asked) == {f"CONNECT 127.0.0.1:{port}" for port in ports}
    seen = bytes(out.up + out.down)
    assert len(seen) > 500_000 and not [word for word in (*WORDS, b"flwr", b"fleet", b"train") if word in seen]
