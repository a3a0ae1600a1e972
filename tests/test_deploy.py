"""Real processes on loopback with real TLS: a coordinator, two hospitals, a researcher, and people at the wrong doors."""

import json
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from hospital import study as tiny_study

from fl_server.link import FLEET_PATHS
from privacy import journal, keys

pytestmark = pytest.mark.deploy
BIN = Path(sys.executable).parent
READY_S = 90.0


def run(*words: str, expect: int = 0) -> str:
    """One command to its end: standard output, or standard error where it is expected to fail."""
    done = subprocess.run([str(BIN / words[0]), *words[1:]], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == expect, f"{words}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout if expect == 0 else done.stderr


class Consortium:
    """One coordinator process and the commands of its people."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.gateway, self.service = free_port(), free_port()
        self.started: list[subprocess.Popen[str]] = []
        ports = ("--gateway-port", str(self.gateway), "--service-port", str(self.service))
        run("fl-server", "init", str(folder / "coordinator"), "--name", "test", "--host", "127.0.0.1", *ports)

    def start(self, label: str, until: str, *words: str) -> subprocess.Popen[str]:
        path = self.folder / f"{label}.log"
        with path.open("w") as log:
            process = subprocess.Popen(
                [str(BIN / words[0]), *words[1:]], stdout=log, stderr=subprocess.STDOUT, text=True
            )
        self.started.append(process)
        wait_for(lambda: until in path.read_text() or process.poll() is not None, f"{label}: {until}")
        assert process.poll() is None, path.read_text()
        return process

    def serve(self) -> subprocess.Popen[str]:
        return self.start("coordinator", "is ready", "fl-server", "start", "--home", str(self.folder / "coordinator"))

    def node(self, name: str) -> subprocess.Popen[str]:
        return self.start(f"node-{name}", "waits for orders", "fl-client", "start", "--home", str(self.site(name)))

    def site(self, name: str) -> Path:
        return self.folder / "sites" / name

    def invite(self, name: str, *more: str) -> str:
        text = run("fl-server", "invite", name, *more, "--home", str(self.folder / "coordinator"))
        found = re.search(r"isocenter-join:\S+", text)
        assert found
        return found.group()

    def join(self, name: str, vendor: str) -> None:
        hospital, home = self.folder / "hospitals" / name, self.site(name)
        made = run("fl-client", "phantom", str(hospital), "--name", name, "--vendor", vendor, "--patients", "16")
        run("fl-client", "join", self.invite(name), "--home", str(home))
        text = (home / "site.yaml").read_text().replace("permit_plain: false", "permit_plain: true")
        text = text.replace("minimum_patients: 10", "minimum_patients: 2").replace("cpu_threads: 0", "cpu_threads: 1")
        (home / "site.yaml").write_text(text + "\n" + made[made.index("data:") :])
        run("fl-client", "ingest", "--home", str(home))

    def stop(self) -> None:
        for process in reversed(self.started):
            if process.poll() is None:
                process.terminate()
        for process in reversed(self.started):
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(5)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: object, what: str, seconds: float = READY_S) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Consortium]:
    made = Consortium(tmp_path_factory.mktemp("deploy"))
    try:
        made.serve()
        made.join("north", "aurora")
        made.join("south", "boreal")
        line = made.invite("ada", "--researcher")
        run("fl-study", "join", line, "--home", str(made.folder / "ada"))
        yield made
    finally:
        made.stop()


def submit(consortium: Consortium, title: str, rounds: int = 2, timeout_s: int = 60) -> str:
    """Submit a study of its own; its digest."""
    import yaml

    facts = tiny_study().model_dump(mode="json") | {"title": title}
    facts["training"]["rounds"] = rounds
    facts["participation"]["round_timeout_s"] = timeout_s
    path = consortium.folder / f"{title}.yaml"
    path.write_text(yaml.safe_dump(facts))
    text = run("fl-study", "submit", str(path), "--home", str(consortium.folder / "ada"))
    found = re.search(r"[0-9a-f]{64}", text)
    assert found
    return found.group()


def ada(consortium: Consortium, *words: str, expect: int = 0) -> str:
    return run("fl-study", *words, "--home", str(consortium.folder / "ada"), expect=expect)


def test_a_study_goes_from_submission_to_report(consortium: Consortium) -> None:
    digest = submit(consortium, "whole")
    refused = ada(consortium, "run", digest, expect=1)
    assert "north" in refused and "south" in refused and "approve" in refused
    for name in ("north", "south"):
        shown = run("fl-client", "approve", digest[:12], "--yes", "--home", str(consortium.site(name)))
        assert "the coordinator sees YOUR site's own update" in shown
    nodes = [consortium.node(name) for name in ("north", "south")]
    shown = ada(consortium, "run", digest)
    assert "Run finished: complete" in shown
    out = consortium.folder / "report"
    ada(consortium, "report", digest, "--out", str(out))
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["label"] == "complete" and set(metrics["sites"]) == {"north", "south"}
    ingested = [
        json.loads(run("fl-client", "ingest", "--json", "--home", str(consortium.site(n)))) for n in ("north", "south")
    ]
    assert metrics["ingested_images"] == sum(report["taken"] for report in ingested)
    assert (out / "report.html").stat().st_size > 10_000
    runs = json.loads(run("fl-server", "runs", "--json", "--home", str(consortium.folder / "coordinator")))
    assert [entry["state"] for entry in runs["runs"]] == ["complete"]
    for name in ("north", "south"):
        assert journal.verify(consortium.site(name) / "journal.jsonl") > 4
    for node in nodes:
        node.send_signal(signal.SIGTERM)
        assert node.wait(20) == 0


def test_a_worker_that_is_killed_is_a_refusal_and_the_node_lives_on(consortium: Consortium) -> None:
    digest = submit(consortium, "killed worker", rounds=60, timeout_s=20)
    for name in ("north", "south"):
        run("fl-client", "approve", digest, "--yes", "--home", str(consortium.site(name)))
    nodes = {name: consortium.node(name) for name in ("north", "south")}
    run_id = re.search(r"Run (\S+)", ada(consortium, "run", digest, "--detach"))
    assert run_id
    events = consortium.folder / "coordinator" / "runs" / run_id.group(1) / "events.jsonl"
    wait_for(lambda: events.exists() and "round_done" in events.read_text(), "the first round")
    killed_while_working(nodes["north"], events)
    wait_for(lambda: '"event": "failed"' in events.read_text(), "the round without north to end below the quorum")
    assert "north: worker-died" in events.read_text()
    assert nodes["north"].poll() is None
    # Launched again, it goes on at the round it had reached, with the node's new worker.
    before = json.loads((events.parent / "run.json").read_text())["round"]
    ada(consortium, "run", digest, "--detach")
    wait_for(lambda: json.loads((events.parent / "run.json").read_text())["round"] > before, "another round")
    assert json.loads((events.parent / "run.json").read_text())["attempt"] == 2
    for node in nodes.values():
        node.terminate()
        node.wait(20)
    wait_for(
        lambda: "failed" in json.loads((events.parent / "run.json").read_text())["state"], "the end without nodes", 120
    )


def killed_while_working(node: subprocess.Popen[str], events: Path) -> None:
    """Kill -9 the node's worker process while an order is being worked on."""
    for _ in range(200):
        size = events.stat().st_size
        wait_for(lambda size=size: events.stat().st_size > size, "the run to move")  # type: ignore[misc]
        if json.loads(events.read_text().splitlines()[-1])["event"] == "asked":
            workers = [
                p for p in psutil.Process(node.pid).children() if "resource_tracker" not in " ".join(p.cmdline())
            ]
            assert len(workers) == 1
            workers[0].kill()
            return
    raise AssertionError("no order was seen being worked on")


def test_the_coordinator_killed_hard_leaves_no_process_and_goes_on(consortium: Consortium) -> None:
    coordinator = next(p for p in consortium.started if p.args[1] == "start" and "fl-server" in p.args[0])  # type: ignore[index]
    children = psutil.Process(coordinator.pid).children(recursive=True)
    coordinator.kill()
    coordinator.wait(10)
    gone, alive = psutil.wait_procs(children, timeout=15)
    assert gone and not alive
    consortium.started.remove(coordinator)
    consortium.serve()
    known = json.loads(ada(consortium, "studies", "--json"))
    assert [study["runs"][0]["state"] for study in known if study["approved"]] != []


def site_context(consortium: Consortium, certificate: bool = True) -> ssl.SSLContext:
    folder = consortium.site("north") / "keys"
    context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    if certificate:
        context.load_cert_chain(folder / "site.pem", folder / "site.key")
    return context


FORBIDDEN = [
    "/v1/control/start-run",
    "/v1/control/list-runs",
    "/v1/control/register-node",
    "/v1/runtime/acquire-task",
    "/v1/fleet/get-fab",
    "/v1/fleet/get-run",
    "/v1/fleet/register-node",
    "/v1/fleet/unregister-node",
    "/docs",
    "/openapi.json",
    "/health",
    "/",
    "/v1/fleet/../control/start-run",
    "/v1/fleet/%2e%2e/control/start-run",
    "//v1/control/start-run",
    "/v1/fleet//pull-messages",
    "/v1/fleet/pull%2Dmessages",
    "/V1/FLEET/PULL-MESSAGES",
]


@pytest.mark.parametrize("path", FORBIDDEN)
def test_the_gateway_answers_404_to_all_but_the_fleet_calls_of_a_node(consortium: Consortium, path: str) -> None:
    for method in (b"POST", b"GET"):
        assert raw(consortium, method + b" " + path.encode() + b" HTTP/1.1") == 404


def raw(consortium: Consortium, line: bytes) -> int:
    """The status of one request sent byte for byte, so that no client tidies the path."""
    with (
        socket.create_connection(("127.0.0.1", consortium.gateway), timeout=10) as plain,
        site_context(consortium).wrap_socket(plain, server_hostname="127.0.0.1") as secure,
    ):
        secure.sendall(line + b"\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        return int(secure.recv(4096).split(b" ")[1])


def test_the_gateway_passes_the_fleet_calls_but_only_to_a_registered_key(consortium: Consortium) -> None:
    for path in FLEET_PATHS:
        assert raw(consortium, f"POST {path} HTTP/1.1".encode()) in (400, 401, 415, 422)


def test_without_a_certificate_of_the_consortium_there_is_no_connection(consortium: Consortium, tmp_path: Path) -> None:
    url = f"https://127.0.0.1:{consortium.gateway}/v1/fleet/pull-messages"
    with pytest.raises((httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError)):
        httpx.post(url, verify=site_context(consortium, certificate=False))
    stranger = keys.make_ca(keys.make_key(tmp_path / "ca.key"), "stranger")
    key = keys.make_key(tmp_path / "site.key")
    certificate = keys.issue(stranger, keys.make_csr(key, "north"), "north", "site", 5)
    (tmp_path / "site.pem").write_bytes(keys.certificate_pem(certificate))
    context = site_context(consortium, certificate=False)
    context.load_cert_chain(tmp_path / "site.pem", tmp_path / "site.key")
    with pytest.raises((httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError)):
        httpx.post(url, verify=context)


def test_plain_http_and_old_tls_are_refused(consortium: Consortium) -> None:
    with pytest.raises(httpx.HTTPError):
        httpx.post(f"http://127.0.0.1:{consortium.gateway}/v1/fleet/pull-messages")
    context = site_context(consortium)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(httpx.HTTPError):
        httpx.post(f"https://127.0.0.1:{consortium.gateway}/v1/fleet/pull-messages", verify=context)


def test_only_the_gateway_and_the_service_listen_and_the_rest_is_on_loopback(consortium: Consortium) -> None:
    coordinator = consortium.started[-1]
    family = [psutil.Process(coordinator.pid), *psutil.Process(coordinator.pid).children(recursive=True)]
    listening = [c.laddr for p in family for c in p.net_connections() if c.status == psutil.CONN_LISTEN]
    assert {address.ip.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}
    assert {consortium.gateway, consortium.service} < {address.port for address in listening}
    assert len({address.port for address in listening}) == 3


def test_invitations_are_for_one_site_once(consortium: Consortium) -> None:
    line = consortium.invite("east")
    run("fl-client", "join", line, "--home", str(consortium.site("east")))
    again = run("fl-client", "join", line, "--home", str(consortium.folder / "thief"), expect=1)
    assert "used" in again and "new invitation" in again
    wrong = line.replace(line.split(":")[4], "0" * 64)
    refused = run("fl-client", "join", wrong, "--home", str(consortium.folder / "lost"), expect=1)
    assert "Do not continue" in refused
    assert not (consortium.folder / "lost" / "keys" / "site.pem").exists()
    for key in (consortium.site("east") / "keys" / "site.key", consortium.folder / "coordinator" / "keys" / "ca.key"):
        assert key.stat().st_mode & 0o777 == 0o600


def test_nothing_of_a_patient_is_at_the_coordinator(consortium: Consortium) -> None:
    """Every patient id and UID of both hospitals is looked for in every file of the coordinator and the researcher."""
    from fl_client.ingest import Index

    wanted = set()
    for name in ("north", "south"):
        for image in Index.open(consortium.site(name) / "state").images():
            wanted |= {text.encode() for text in (image.patient, image.study_uid, image.sop_uid) if text}
    assert len(wanted) > 40
    for path in [*(consortium.folder / "coordinator").rglob("*"), *(consortium.folder / "report").rglob("*")]:
        if path.is_file():
            data = path.read_bytes()
            assert not [text for text in wanted if text in data], path
