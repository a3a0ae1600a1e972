"""Notifications: who is told of what, once, without anybody waiting for it; commands without a shell, webhooks over TLS."""

import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from coordinator import settings
from test_server_run import study
from typer.testing import CliRunner

from fl_server import notify
from fl_server.cli import app
from fl_server.notify import Notifier, Target
from fl_server.roster import Home
from fl_server.run import Run
from privacy.errors import RunError


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.found(tmp_path / "c", settings())


@pytest.fixture
def heard(tmp_path: Path) -> Path:
    """A file into which `to_file` writes every notice."""
    return tmp_path / "heard.jsonl"


def to_file(heard: Path, **more: Any) -> Target:
    script = "import sys; open(sys.argv[1], 'a').write(sys.stdin.read() + '\\n')"
    return Target(command=[sys.executable, "-c", script, str(heard)], **more)


def told(heard: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in heard.read_text().splitlines()] if heard.exists() else []


def ended(home: Home, state: str, code: str = "") -> str:
    run = Run.create(home.runs, study(), "ada", ["north"])
    run.start()
    if state == "failed":
        run.fail(code, "why")
    else:
        run.facts |= {"state": state, "label": state}
        run._save_facts()
    home.journal.append("run-ended", run=run.run_id, state=state, rounds=2)
    return run.run_id


def test_each_piece_of_news_is_told_once_and_what_was_before_is_none(home: Home, heard: Path) -> None:
    ended(home, "complete")
    first = Notifier(home.root, "chest", [to_file(heard)])
    first._recall()
    first.once()
    assert told(heard) == []
    runs = [
        ended(home, "partial"),
        ended(home, "failed", "quorum-lost"),
        ended(home, "failed", "internal"),
        ended(home, "stopped"),
    ]
    home.journal.append("sum-void", run=runs[0], round=3, attempt=4, reason="too-few-survivors")
    home.journal.append("study-offered", digest="ab" * 32, researcher="ada", sites=["north", "west"])
    home.journal.append("decision", site="north", decision="approved")
    first.once()
    first.once()
    found = told(heard)
    assert [(each["event"], each.get("run")) for each in found] == [
        ("run-finished", runs[0]), ("quorum-lost", runs[1]), ("run-failed", runs[2]), ("run-stopped", runs[3]),
        ("round-void", runs[0]), ("approval-wanted", None),
    ]  # fmt: skip
    assert (
        found[0]["label"] == "partial" and found[1]["code"] == "quorum-lost" and found[5]["sites"] == ["north", "west"]
    )
    assert all(each["version"] == 1 and each["consortium"] == "chest" for each in found)
    again = Notifier(home.root, "chest", [to_file(heard)])  # as after a restart
    again._recall()
    ended(home, "complete")
    again.once()
    assert len(told(heard)) == len(found) + 1


def test_a_target_hears_only_what_it_asked_for(home: Home, heard: Path) -> None:
    notifier = Notifier(home.root, "chest", [to_file(heard, events=["quorum-lost"])])
    notifier._recall()
    ended(home, "complete")
    ended(home, "failed", "quorum-lost")
    notifier.once()
    assert [each["event"] for each in told(heard)] == ["quorum-lost"]


def test_a_round_that_waits_and_a_certificate_that_ends_are_told_once(
    home: Home, heard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notify, "CHECK_S", 0.0)
    run = Run.create(home.runs, study(), "ada", ["north", "west"])
    run.start()
    notifier = Notifier(home.root, "chest", [to_file(heard)], lambda: {"west": "2026-02-01"})
    notifier._recall()
    run.event("waiting", sites=["west"])
    notifier.once()
    assert [each["event"] for each in told(heard)] == ["certificate-ending"]
    monkeypatch.setattr(notify, "WAITING_S", -1.0)
    for _ in range(3):
        notifier.once()
    assert [each["event"] for each in told(heard)] == ["certificate-ending", "quorum-lost"]
    assert told(heard)[1]["waiting_for"] == ["west"]


def test_no_shell_reads_the_command_and_it_sees_little_of_our_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "x")
    out = tmp_path / "out.json"
    script = "import sys, os, json; json.dump([sys.argv[2:], sorted(os.environ), os.getcwd()], open(sys.argv[1], 'w'))"
    words = ["$(touch pwned)", "; touch pwned", "`id`", "*"]
    Target(command=[sys.executable, "-c", script, str(out), *words]).deliver({})
    arguments, environment, folder = json.loads(out.read_text())
    assert arguments == words and "SECRET_TOKEN" not in environment and folder == "/"


def test_a_command_that_hangs_is_killed_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify, "COMMAND_S", 0.5)
    mark = tmp_path / "child"
    script = f"sleep 3 && touch {mark} & sleep 60"
    began = time.monotonic()
    with pytest.raises(RunError, match="took longer"):
        Target(command=["/bin/sh", "-c", script]).deliver({})
    assert time.monotonic() - began < 3
    time.sleep(3.2)
    assert not mark.exists()
    for command, said in ((["/nonexistent"], "cannot be started"), (["/bin/false"], "code 1")):
        with pytest.raises(RunError, match=said):
            Target(command=command).deliver({"much": "x" * 200_000})
    Target(command=["/bin/true"]).deliver({"much": "x" * 200_000})  # it need not read what it is told


def test_nothing_waits_for_a_target_that_is_broken(home: Home, heard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify, "RETRY_S", 0.05)
    monkeypatch.setattr(notify, "LOOK_S", 0.05)
    notifier = Notifier(home.root, "chest", [Target(command=["/bin/false"]), to_file(heard)])
    notifier.start()
    try:
        ended(home, "complete")
        end = time.monotonic() + 15
        while not told(heard) and time.monotonic() < end:
            time.sleep(0.05)
    finally:
        notifier.stop()
    assert [each["event"] for each in told(heard)] == ["run-finished"]


class Hook(BaseHTTPRequestHandler):
    got: list[tuple[str, bytes, str | None]]
    status = 200

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        type(self).got.append((self.path, body, self.headers["content-type"]))
        self.send_response(self.status)
        self.send_header("location", "http://127.0.0.1:1/")
        self.end_headers()

    def log_message(self, *given: Any) -> None:
        pass


@pytest.fixture
def hook() -> Iterator[tuple[type[Hook], str]]:
    kind = type("Kind", (Hook,), {"got": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield kind, f"http://127.0.0.1:{server.server_address[1]}/hook"
    server.shutdown()
    server.server_close()


def test_a_webhook_gets_one_document_and_is_not_followed_elsewhere(
    hook: tuple[type[Hook], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, address = hook
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    Target(webhook=address).deliver({"event": "test"})
    assert kind.got == [("/hook", b'{"event":"test"}', "application/json")]
    for status in (302, 307, 404, 500):
        kind.status = status
        with pytest.raises(RunError, match=str(status)):
            Target(webhook=address).deliver({})
    with pytest.raises(RunError, match="cannot be reached"):
        Target(webhook="http://127.0.0.1:1/").deliver({})


@pytest.mark.parametrize(
    "wrong",
    [
        {}, {"command": ["/bin/true"], "webhook": "https://x.example/"}, {"command": ["true"]}, {"command": []},
        {"webhook": "http://example.org/"}, {"webhook": "ftp://example.org/"}, {"webhook": "file:///etc/passwd"},
        {"webhook": "http://127.0.0.1.example.org/"}, {"webhook": "https:///x"}, {"command": ["/bin/true"], "events": ["x"]},
        {"command": "/bin/true"},
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_are_none_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Target"):
        Target.model_validate(wrong)
    assert Target(webhook="http://localhost:9/x").name == "localhost"
    assert "secret" not in Target(webhook="https://h.example/secret").name


def test_the_command_tries_every_target_and_says_which_fails(home: Home, heard: Path) -> None:
    target = to_file(heard).model_dump(mode="json", exclude_none=True)
    path = home.root / "server.yaml"
    before = path.read_text()
    path.write_text(before + f"\nnotify:\n  - {json.dumps(target)}\n  - command: [/bin/false]\n")
    done = CliRunner().invoke(app, ["notify", "--home", str(home.root)])
    assert done.exit_code == 1 and f"{sys.executable}: told" in done.output and "/bin/false: " in done.output
    assert told(heard)[0]["event"] == "test"
    path.write_text(before)
    assert "names nobody" in CliRunner().invoke(app, ["notify", "--home", str(home.root)]).output
