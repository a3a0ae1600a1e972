"""Real processes on loopback with real TLS: a coordinator, four hospitals, a researcher, and people at the wrong doors."""

import json
import re
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from hospital import study as tiny_study
from stage import BIN, Stage
from typer.testing import CliRunner

from fl_client.cli import app as fl_client
from fl_server.cli import app as fl_server
from fl_server.gateway import FLEET_PATHS
from privacy import journal, keys

pytestmark = pytest.mark.deploy
READY_S = 90.0
SITES = {"north": "aurora", "south": "boreal", "east": "cirrus", "west": "aurora"}


class Shared(Stage):
    """A stage on which coordinator, researcher, north and every node are processes of their own. What the other hospitals do as
    north does, the same commands do in this process: as processes each of them is seconds of imports.
    """

    apps = {"fl-client": fl_client, "fl-server": fl_server}  # noqa: RUF012
    lock = threading.Lock()  # output is caught for one command at a time

    def command(self, *words: str) -> str:
        others = [name for name in SITES if name != "north"]
        theirs = {str(folder) for name in others for folder in (self.site(name), self.folder / "hospitals" / name)}
        if theirs & set(words) or (words[:2] == ("fl-server", "invite") and words[2] in others):
            return self.here(*words)
        return super().command(*words)

    def here(self, *words: str) -> str:
        with self.lock:
            done = CliRunner().invoke(self.apps[words[0]], list(words[1:]), catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    def approve_all(self, digest: str) -> None:
        for name in SITES:
            self.here("fl-client", "approve", digest, "--yes", "--home", str(self.site(name)))


def fails(*words: str) -> str:
    """One command that must fail with exit code 1 and a sentence; what it printed on standard error."""
    done = subprocess.run([str(BIN / words[0]), *words[1:]], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stdout
    assert done.stderr and "Traceback" not in done.stderr
    return done.stderr


def wait_for(condition: Callable[[], bool], what: str, seconds: float = READY_S) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    made = Shared(tmp_path_factory.mktemp("deploy") / "stage")
    try:
        made.found()
        made.serve()
        made.join_researcher()
        at_once(lambda name: made.open_hospital(name, SITES[name], 16, minimum_patients=2))
        yield made
    finally:
        made.stop()


def at_once(step: Callable[[str], object]) -> None:
    """Do the same for every site, side by side: each command is a second of imports."""
    with ThreadPoolExecutor(len(SITES)) as pool:
        list(pool.map(step, SITES))


def submit(stage: Stage, title: str, rounds: int = 2, timeout_s: int = 60, quorum: int = 3) -> str:
    """Submit a masked study of the four hospitals; its digest."""
    import yaml

    facts = tiny_study().model_dump(mode="json") | {"title": title, "protection": "masked"}
    facts["training"]["rounds"] = rounds
    facts["participation"] |= {"sites": list(SITES), "quorum": quorum, "round_timeout_s": timeout_s}
    path = stage.folder / f"{title}.yaml"
    path.write_text(yaml.safe_dump(facts))
    return stage.submit(path)


def launch(stage: Shared, digest: str) -> Path:
    """Approve and launch; the folder of the run."""
    stage.approve_all(digest)
    run_id = re.search(r"Run (\S+)", stage.study("run", digest, "--detach"))
    assert run_id
    return stage.coordinator / "runs" / run_id.group(1)


def node_of(stage: Stage, name: str) -> subprocess.Popen[str]:
    """The running node of a site; its command line ends with the site's folder."""
    found = [p for p in stage.running if p.poll() is None and str(p.args[-1]).endswith(f"/{name}")]  # type: ignore[index]
    return found[-1]


def stop_nodes(stage: Stage) -> None:
    for name in SITES:
        node = node_of(stage, name)
        node.send_signal(signal.SIGTERM)
        assert node.wait(20) == 0


def events_of(folder: Path) -> list[dict[str, Any]]:
    path = folder / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def ended(folder: Path) -> bool:
    return any(event["event"] in ("finished", "failed") for event in events_of(folder))


def sent(stage: Stage, name: str, kind: str) -> list[tuple[int, int]]:
    """(attempt, sum) of each report of a kind in a site's journal."""
    lines = (stage.site(name) / "journal.jsonl").read_text().splitlines()
    entries = [entry for entry in map(json.loads, lines) if entry["kind"] == kind]
    return [(entry["facts"]["attempt"], entry["facts"]["sum"]) for entry in entries]


def test_a_study_goes_from_submission_to_report(stage: Shared) -> None:
    digest = submit(stage, "whole")
    refused = fails("fl-study", "run", digest, "--home", str(stage.researcher))
    assert all(name in refused for name in SITES) and "approve" in refused
    shown = stage.approve("north", digest[:12])
    assert "the coordinator sees only sums over the sites" in shown
    stage.approve_all(digest[:12])
    at_once(stage.node)
    shown = stage.study("run", digest)
    assert "Run finished: complete" in shown
    out = stage.folder / "report"
    stage.study("report", digest, "--out", str(out))
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["label"] == "complete" and set(metrics["sites"]) == set(SITES)
    ingested = [json.loads(stage.command("fl-client", "ingest", "--json", "--home", str(stage.site(n)))) for n in SITES]
    assert metrics["ingested_images"] == sum(report["taken"] for report in ingested)
    assert (out / "report.html").stat().st_size > 10_000
    runs = json.loads(stage.command("fl-server", "runs", "--json", "--home", str(stage.coordinator)))
    assert [entry["state"] for entry in runs["runs"]] == ["complete"]
    for name in SITES:
        assert journal.verify(stage.site(name) / "journal.jsonl") > 4
        assert '"protection":"masked"' in (stage.site(name) / "journal.jsonl").read_text().replace(" ", "")


def test_a_question_goes_from_submission_to_numbers(stage: Shared) -> None:
    path, out = stage.folder / "question.yaml", stage.folder / "numbers"
    stage.command("fl-study", "new", str(path), "--template", "cohort")
    digest = stage.submit(path)
    refused = fails("fl-client", "approve", digest[:12], "--yes", "--home", str(stage.site("north")))
    assert "the task counting is not among policy.tasks" in refused
    for name in SITES:
        settings = stage.site(name) / "site.yaml"
        settings.write_text(settings.read_text().replace("  # tasks: [", "  tasks: ["))
    stage.approve_all(digest[:12])
    shown = stage.study("run", digest)
    assert "Run finished: complete" in shown and "Next: fl-study cohort" in shown
    stage.study("cohort", digest, "--out", str(out))
    told = json.loads((out / "cohort.json").read_text())
    assert told["contributors"] == sorted(SITES)
    assert told["answers"]["everybody"]["patients"] == {"least": 40, "most": 76}
    assert "fl-study cohort" in fails("fl-study", "report", digest, "--out", str(out), "--home", str(stage.researcher))


def test_a_run_is_stopped_and_goes_on_and_the_dashboard_sees_it(stage: Shared) -> None:
    def server(*words: str) -> dict[str, Any]:
        said = stage.here("fl-server", *words, "--json", "--home", str(stage.coordinator))
        found: dict[str, Any] = json.loads(said)
        return found

    folder = launch(stage, submit(stage, "stopped", rounds=30))
    wait_for(lambda: any(event["event"] == "round_done" for event in events_of(folder)), "the first round")
    assert server("stop", folder.name)["stopping"] == "after-stage"
    wait_for(lambda: server("show", folder.name)["state"] == "stopped", "the end of the stage")
    done = server("show", folder.name)["round"]
    assert 1 <= done < 30
    assert "stopped by the coordinator" in fails("fl-study", "run", json.loads((folder / "run.json").read_text())["digest"],
                                                "--home", str(stage.researcher))  # fmt: skip
    assert server("resume", folder.name)["state"] == "queued"
    screen = stage.start(
        "dashboard", "Dashboard: ", "fl-server", "dashboard", "--port", "0", "--home", str(stage.coordinator)
    )
    address = re.search(r"http://\S+/", (stage.folder / "logs" / "dashboard.log").read_text())
    assert address
    assert httpx.get(f"{address[0]}readyz").status_code == 200
    page = httpx.get(address[0])
    assert page.status_code == 200 and page.text.count('<span class="mark good">online</span>') == 4
    screen.terminate()
    assert screen.wait(10) is not None
    # At once: in the middle of a stage, as a crash would end it.
    wait_for(lambda: server("show", folder.name)["round"] > done, "another round")
    server("stop", folder.name, "--now")
    wait_for(lambda: server("show", folder.name)["state"] == "stopped", "the stop", 20)
    server("resume", folder.name)
    watched = subprocess.run(
        [str(BIN / "fl-server"), "watch", folder.name, "--home", str(stage.coordinator)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert watched.returncode == 0, watched.stdout + watched.stderr
    rounds = json.loads((folder / "results.json").read_text())["rounds"]
    assert [entry["round"] for entry in rounds] == list(range(1, 31))
    assert len({entry["attempt"] for entry in rounds}) >= 3


def test_a_site_pauses_in_the_middle_of_a_run_and_comes_back(stage: Shared) -> None:
    """North, whose commands and node are processes of their own. Nobody waits for it, and the result names its rounds."""

    def rounds() -> list[list[str]]:
        return [event["contributors"] for event in events_of(folder) if event["event"] == "round_done"]

    digest = submit(stage, "paused", rounds=80, timeout_s=60)
    folder = launch(stage, digest)
    wait_for(lambda: len(rounds()) >= 1, "the first round")
    stage.command("fl-client", "pause", digest[:12], "--home", str(stage.site("north")))
    others = sorted(set(SITES) - {"north"})
    wait_for(lambda: others in rounds(), "a round without north", 30)
    stage.command("fl-client", "resume", digest[:12], "--home", str(stage.site("north")))
    wait_for(lambda: ended(folder), "the end of the run")
    results = json.loads((folder / "results.json").read_text())
    without = [entry for entry in results["rounds"] if "north" not in entry["contributors"]]
    assert {reason for entry in without for reason in entry["missing"].values()} <= {"site-paused", "joining"}
    assert "north" in results["rounds"][-1]["contributors"] and "north" in results["test"]["sites"]
    why = " and ".join(dict.fromkeys(entry["missing"]["north"] for entry in without))
    assert results["label"] == f"partial (3 of 4, north missed {len(without)} of 80 rounds: {why})"
    shown = stage.command("fl-server", "show", folder.name, "--home", str(stage.coordinator))
    assert f"{80 - len(without)} of 80" in shown and "site-paused" in shown


def serve_anew(stage: Shared, old: str, new: str) -> None:
    """Stop the coordinator, change a line of server.yaml, start it again, and wait until every node is back."""
    settings = stage.coordinator / "server.yaml"
    settings.write_text(settings.read_text().replace(old, new))
    logs = [stage.folder / "logs" / f"node-{name}.log" for name in SITES]
    before = [log.read_text().count("waits for orders") for log in logs]
    coordinator = stage.running.pop(0)
    coordinator.terminate()
    coordinator.wait(30)
    stage.running.insert(0, stage.serve())
    stage.running.pop()  # where `serve` put it
    for log, count in zip(logs, before, strict=True):
        wait_for(lambda log=log, count=count: log.read_text().count("waits for orders") > count, "the nodes")  # type: ignore[misc]


def test_two_runs_are_carried_out_side_by_side(stage: Shared) -> None:
    """Two executors, and nodes that answer one order at a time: each run commits rounds while the other does, with everybody."""
    serve_anew(stage, "# runs_at_once: 2", "runs_at_once: 2")
    digests = [submit(stage, title, rounds=60, timeout_s=120) for title in ("one", "another")]
    folders = [launch(stage, digest) for digest in digests]
    for folder in folders:
        wait_for(lambda folder=folder: ended(folder), "the end of both runs")  # type: ignore[misc]
    spans = []
    for folder in folders:
        told = events_of(folder)
        assert told[-1]["event"] == "finished" and told[-1]["label"] == "complete", told[-1]
        moments = [event["at"] for event in told if event["event"] == "round_done"]
        spans.append((moments[0], moments[-1]))
    assert max(first for first, _ in spans) < min(last for _, last in spans), "one run waited for the other's end"
    serve_anew(stage, "runs_at_once: 2", "# runs_at_once: 2")


def test_a_worker_killed_while_it_trains_costs_an_attempt_and_the_run_goes_on_with_it(stage: Shared) -> None:
    digest = submit(stage, "killed worker", rounds=3, timeout_s=30, quorum=4)
    folder = launch(stage, digest)
    wait_for(lambda: any(event["event"] == "round_done" for event in events_of(folder)), "the first round")
    killed_while_training(node_of(stage, "north"), folder)
    wait_for(lambda: ended(folder), "the end of the run")
    events = events_of(folder)
    # At work it is "worker-died"; a moment before, the order meets the next process, which has no keys of the sum.
    missing = {(e["site"], e["reason"]) for e in events if e["event"] == "site_missing"}
    assert missing & {("north", "worker-died"), ("north", "mask-keys-lost")}
    assert [event["reason"] for event in events if event["event"] == "void"] == ["too-few-survivors"]
    assert events[-1]["event"] == "finished" and events[-1]["label"] == "complete"
    rounds = json.loads((folder / "results.json").read_text())["rounds"]
    assert {entry["attempt"] for entry in rounds} == {1, 2} and all(len(e["contributors"]) == 4 for e in rounds)


def killed_while_training(node: subprocess.Popen[str], folder: Path) -> None:
    """Kill -9 the node's worker process while it works on an order to train."""
    seen = len(events_of(folder))
    wait_for(lambda: [e.get("stage") for e in events_of(folder)[seen:]][-1:] == ["train"], "an order to train")
    workers = [p for p in psutil.Process(node.pid).children() if "resource_tracker" not in " ".join(p.cmdline())]
    assert len(workers) == 1
    workers[0].kill()


def test_a_site_killed_hard_between_two_steps_uses_no_mask_twice(stage: Shared) -> None:
    """Killed as soon as its journal says that a report is about to leave, then started again; twice in one run."""
    digest = submit(stage, "killed site", rounds=25, timeout_s=8)  # it comes back before they are over
    known = {after: len(sent(stage, "west", after)) for after in ("keys-report", "train-report")}
    folder = launch(stage, digest)
    for after, before in known.items():
        wait_for(lambda after=after, before=before: len(sent(stage, "west", after)) > before, f"a {after} of west")  # type: ignore[misc]
        node = node_of(stage, "west")
        family = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
        for process in family:
            process.kill()
        psutil.wait_procs(family, timeout=10)
        stage.node("west")
    wait_for(lambda: ended(folder), "the end of the run")
    assert events_of(folder)[-1]["event"] == "finished", events_of(folder)[-1]
    lines = (stage.site("west") / "journal.jsonl").read_text().splitlines()
    own = [json.loads(line)["facts"] for line in lines if folder.name in line and '"train-report"' in line]
    places = [(facts["attempt"], facts["sum"]) for facts in own]
    assert len(places) == len(set(places))
    rounds = json.loads((folder / "results.json").read_text())["rounds"]
    assert all({"north", "south", "east"} <= set(entry["contributors"]) for entry in rounds)
    assert "west" in rounds[-1]["contributors"]


def test_the_coordinator_killed_hard_leaves_no_process_and_goes_on(stage: Stage) -> None:
    coordinator, node = stage.running[0], node_of(stage, "north")
    log = stage.folder / "logs" / "node-north.log"
    before = log.read_text().count("waits for orders")
    children = psutil.Process(coordinator.pid).children(recursive=True)
    coordinator.kill()
    coordinator.wait(10)
    gone, alive = psutil.wait_procs(children, timeout=15)
    assert gone and not alive
    stage.running.remove(coordinator)
    stage.serve()
    # Both ends went away without a word in turn; Flower by itself would lock the node out for a minute each time.
    wait_for(lambda: log.read_text().count("waits for orders") > before, "the node to come back", 20)
    assert "running already" in fails("fl-client", "start", "--home", str(stage.site("north")))
    node.kill()
    node.wait(10)
    began = time.monotonic()
    stage.node("north")
    assert time.monotonic() - began < 20
    stop_nodes(stage)
    known = json.loads(stage.study("studies", "--json"))
    assert [study["runs"][0]["state"] for study in known if study["approved"]] != []


def site_context(stage: Stage, certificate: bool = True) -> ssl.SSLContext:
    folder = stage.site("north") / "keys"
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
    "/v1/fleet//receive",
    "/v1/fleet/pull%2Dmessages",
    "/V1/FLEET/PULL-MESSAGES",
]


@pytest.mark.parametrize("path", FORBIDDEN)
def test_the_gateway_answers_404_to_all_but_the_fleet_calls_of_a_node(stage: Stage, path: str) -> None:
    for method in (b"POST", b"GET"):
        assert raw(stage, method + b" " + path.encode() + b" HTTP/1.1") == 404


def raw(stage: Stage, line: bytes) -> int:
    """The status of one request sent byte for byte, so that no client tidies the path."""
    with (
        socket.create_connection(("127.0.0.1", stage.gateway_port), timeout=10) as plain,
        site_context(stage).wrap_socket(plain, server_hostname="127.0.0.1") as secure,
    ):
        secure.sendall(line + b"\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        return int(secure.recv(4096).split(b" ")[1])


def test_the_gateway_passes_the_fleet_calls_but_only_to_a_registered_key(stage: Stage) -> None:
    for path in FLEET_PATHS:
        assert raw(stage, f"POST {path} HTTP/1.1".encode()) == 403  # no key is shown; see test_hostile_gateway.py


def test_without_a_certificate_of_the_consortium_there_is_no_connection(stage: Stage, tmp_path: Path) -> None:
    url = f"https://127.0.0.1:{stage.gateway_port}/v1/fleet/receive"
    with pytest.raises((httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError)):
        httpx.post(url, verify=site_context(stage, certificate=False))
    stranger = keys.make_ca(keys.make_key(tmp_path / "ca.key"), "stranger")
    key = keys.make_key(tmp_path / "site.key")
    certificate = keys.issue(stranger, keys.make_csr(key, "north"), "north", "site", 5)
    (tmp_path / "site.pem").write_bytes(keys.certificate_pem(certificate))
    context = site_context(stage, certificate=False)
    context.load_cert_chain(tmp_path / "site.pem", tmp_path / "site.key")
    with pytest.raises((httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError)):
        httpx.post(url, verify=context)


def test_plain_http_and_old_tls_are_refused(stage: Stage) -> None:
    with pytest.raises(httpx.HTTPError):
        httpx.post(f"http://127.0.0.1:{stage.gateway_port}/v1/fleet/receive")
    context = site_context(stage)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(httpx.HTTPError):
        httpx.post(f"https://127.0.0.1:{stage.gateway_port}/v1/fleet/receive", verify=context)


def test_only_the_gateway_and_the_service_listen_and_the_rest_is_on_loopback(stage: Stage) -> None:
    coordinator = next(process for process in stage.running if process.poll() is None)  # the only one left running
    family = [psutil.Process(coordinator.pid), *psutil.Process(coordinator.pid).children(recursive=True)]
    listening = [c.laddr for p in family for c in p.net_connections() if c.status == psutil.CONN_LISTEN]
    assert {address.ip.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}
    assert {stage.gateway_port, stage.service_port} < {address.port for address in listening}
    assert len({address.port for address in listening}) == 3


def test_invitations_are_for_one_site_once(stage: Stage) -> None:
    line = stage.invite("late")
    stage.command("fl-client", "join", line, "--home", str(stage.site("late")))
    again = fails("fl-client", "join", line, "--home", str(stage.folder / "thief"))
    assert "used" in again and "new invitation" in again
    wrong = line.replace(line.split(":")[4], "0" * 64)
    refused = fails("fl-client", "join", wrong, "--home", str(stage.folder / "lost"))
    assert "Do not continue" in refused
    assert not (stage.folder / "lost" / "keys" / "site.pem").exists()
    for key in (stage.site("late") / "keys" / "site.key", stage.coordinator / "keys" / "ca.key"):
        assert key.stat().st_mode & 0o777 == 0o600


def test_nothing_of_a_patient_is_at_the_coordinator(stage: Stage) -> None:
    """Every patient id and UID of all hospitals is looked for in every file of the coordinator and the researcher."""
    from fl_client.ingest import Index

    wanted = set()
    for name in SITES:
        for image in Index.open(stage.site(name) / "state").images():
            wanted |= {text.encode() for text in (image.patient, image.study_uid, image.sop_uid) if text}
    assert len(wanted) > 40
    for path in [*(stage.coordinator).rglob("*"), *(stage.folder / "report").rglob("*")]:
        if path.is_file():
            data = path.read_bytes()
            assert not [text for text in wanted if text in data], path
