"""News for a command or a webhook that server.yaml names: a run ended, a sum was void, a quorum is missing, a study waits.

The notifier follows the coordinator's journal from a thread of its own, so nothing waits for whoever is told. A notice is one
JSON document: on the command's standard input, or as the body of a POST. It names runs, sites and codes, and nothing of a
patient. What could not be delivered in TRIES tries is given up, and the log says so. How far the journal was read is kept on
the disk, so after a crash a notice may come twice, and none is lost that was not given up.
"""

import ipaddress
import json
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx
from pydantic import Field, field_validator, model_validator

from fl_server.progress import Onlooker
from fl_server.run import list_runs
from models.study import Document
from privacy import keys
from privacy.errors import IsocenterError, RunError

Event = Literal[
    "run-finished",
    "run-failed",
    "run-stopped",
    "round-void",
    "quorum-lost",
    "approval-wanted",
    "certificate-ending",
]
LOOK_S = 1.0
CHECK_S = 60.0  # between two looks at certificates and at runs that wait
WAITING_S = 600.0  # a round that waits for its quorum for so long is news
COMMAND_S, POST_S = 30.0, 10.0
TRIES, RETRY_S = 3, 5.0
BYTES_MAX = 4 * 1024 * 1024  # of the journal, read at once
ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "HOME", "TZ")  # what a command gets to see of ours
log = logging.getLogger("isocenter.notify")


class Target(Document):
    """Who is told of what. Give either a command or a webhook."""

    command: list[str] | None = Field(
        default=None,
        min_length=1,
        max_length=32,
        description="program by its absolute path, and its arguments; no shell reads them",
    )
    webhook: str | None = Field(
        default=None, max_length=2000, description="https address that gets a POST; http only on this machine"
    )
    events: list[Event] | None = Field(default=None, description="only these kinds of news; left out: all")

    @field_validator("command")
    @classmethod
    def _program(cls, command: list[str] | None) -> list[str] | None:
        if command is not None and not Path(command[0]).is_absolute():
            raise ValueError("the program has to be named by its absolute path")
        return command

    @field_validator("webhook")
    @classmethod
    def _address(cls, webhook: str | None) -> str | None:
        if webhook is not None:
            parts = urlsplit(webhook)
            if not parts.hostname or parts.scheme not in ("https", "http"):
                raise ValueError("expected https://HOST/PATH")
            if parts.scheme == "http" and not _is_here(parts.hostname):
                raise ValueError("http is permitted on this machine only; use https")
        return webhook

    @model_validator(mode="after")
    def _one_of_both(self) -> "Target":
        if (self.command is None) == (self.webhook is None):
            raise ValueError("a target is either a command or a webhook")
        return self

    @property
    def name(self) -> str:
        """What people know it by; a webhook's path may be a secret."""
        return self.command[0] if self.command else f"{urlsplit(self.webhook or '').hostname}"

    def deliver(self, notice: Mapping[str, Any]) -> None:
        """Hand one notice over; raises RunError if it was not taken."""
        content = json.dumps(notice, separators=(",", ":")).encode()
        if self.command is not None:
            _run(self.command, content)
        elif self.webhook is not None:
            _post(self.webhook, content)


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _run(command: list[str], content: bytes) -> None:
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    quiet = subprocess.DEVNULL
    try:
        started = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, env=environment, cwd="/", start_new_session=True
        )
    except OSError as error:
        raise RunError(f"{command[0]} cannot be started: {error.strerror}") from None
    try:
        started.communicate(content, timeout=COMMAND_S)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)  # with whatever it started
        started.wait()
        raise RunError(f"{command[0]} took longer than {COMMAND_S:.0f} s") from None
    except BrokenPipeError:  # it does not read what it is told, and may be right
        started.wait()
    if started.returncode:
        raise RunError(f"{command[0]} ended with code {started.returncode}")


def _post(webhook: str, content: bytes) -> None:
    try:
        with httpx.Client(timeout=POST_S, follow_redirects=False, trust_env=False) as client:
            answer = client.post(webhook, content=content, headers={"content-type": "application/json"})
    except httpx.HTTPError as error:
        raise RunError(f"the webhook cannot be reached ({type(error).__name__})") from None
    if not answer.is_success:
        raise RunError(f"the webhook answered {answer.status_code}")


@dataclass
class Notifier:
    """Follows the journal in `root`. `ending`: name -> end of each certificate that was not renewed in time (UTC text)."""

    root: Path
    consortium: str
    targets: list[Target]
    ending: Callable[[], Mapping[str, str]] = dict
    _end: int = 0
    _told: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._journal, self._memory = self.root / "journal.jsonl", self.root / "notify.json"
        self._onlookers: dict[str, Onlooker] = {}
        self._checked = -CHECK_S
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="notify", daemon=True)

    def start(self) -> None:
        self._recall()
        self._thread.start()

    def stop(self) -> None:
        """End soon; what is being delivered may come again after the next start."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2.0)

    def _follow(self) -> None:
        while not self._stopping.wait(LOOK_S):
            try:
                self.once()
            except (IsocenterError, OSError) as error:
                log.error("notifications have to wait: %s", error)
            except Exception:
                log.exception("notifications failed and are tried again")

    def once(self) -> None:
        """Deliver what is new."""
        for end, entry in self._new():
            for notice in self._of_line(entry):
                self._deliver(notice)
            self._end = end
            if self._stopping.is_set():
                break
        if time.monotonic() - self._checked > CHECK_S:
            self._checked = time.monotonic()
            for mark, notice in self._of_state():
                if mark not in self._told:
                    self._deliver(notice)
                    self._told.add(mark)
        self._keep()

    def _new(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(place behind it, entry) of each whole line that was not read yet; a journal that became shorter is a new one."""
        with self._journal.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            end = self._end if self._end <= size else 0
            file.seek(end)
            for line in file.read(BYTES_MAX).splitlines(keepends=True):
                if not line.endswith(b"\n"):
                    return
                end += len(line)
                try:
                    entry = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(entry, dict) and isinstance(entry.get("facts"), dict):
                    yield end, entry

    def _of_line(self, entry: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The news in a line of the journal."""
        kind, facts = entry.get("kind"), entry["facts"]
        if kind == "run-ended":
            yield self._ended(facts)
        elif kind == "sum-void":
            yield self._notice("round-void", **{key: facts.get(key) for key in ("run", "round", "attempt", "reason")})
        elif kind == "study-offered":
            more = {key: facts.get(key) for key in ("digest", "researcher", "sites")}
            yield self._notice("approval-wanted", **more, remedy="At each site: fl-client studies")

    def _ended(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        state, told = (
            facts.get("state"),
            {"run": facts.get("run"), "state": facts.get("state"), "rounds": facts.get("rounds")},
        )
        if state == "stopped":
            return self._notice("run-stopped", **told)
        try:
            progress = Onlooker(self.root / "runs" / str(facts.get("run"))).look()
        except (IsocenterError, OSError):  # its folder was moved away meanwhile
            return self._notice("run-failed" if state == "failed" else "run-finished", **told)
        told |= {"label": progress.label}
        if state != "failed":
            return self._notice("run-finished", **told)
        code = progress.failure[0]
        return self._notice("quorum-lost" if code == "quorum-lost" else "run-failed", **told, code=code)

    def _of_state(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(mark, notice) of what holds now; each mark is told once."""
        for name, until in self.ending().items():
            yield f"certificate {name} {until}", self._notice("certificate-ending", party=name, until=until)
        for facts in list_runs(self.root / "runs"):
            if facts.get("state") != "running":
                continue
            run_id = str(facts["run_id"])
            progress = self._onlookers.setdefault(run_id, Onlooker(self.root / "runs" / run_id)).look()
            since = progress.stage_since
            if progress.waiting and _age(since) > WAITING_S:
                told = {"run": run_id, "state": "running", "waiting_for": progress.waiting, "since": since}
                yield f"waiting {run_id} {since}", self._notice("quorum-lost", **told)

    def _notice(self, event: Event, **facts: Any) -> dict[str, Any]:
        at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return {"version": 1, "event": event, "consortium": self.consortium, "at": at, **facts}

    def _deliver(self, notice: dict[str, Any]) -> None:
        for number, target in enumerate(self.targets, start=1):
            if target.events is not None and notice["event"] not in target.events:
                continue
            for left in reversed(range(TRIES)):
                try:
                    target.deliver(notice)
                    break
                except RunError as error:
                    log.warning("target %d of notify did not take a notice, %d tries left: %s", number, left, error)
                    if left == 0 or self._stopping.wait(RETRY_S):
                        break

    def _recall(self) -> None:
        """Where the last notifier ended. The first one of a home begins at the journal's end: what was is no news."""
        try:
            found = json.loads(self._memory.read_bytes())
            self._end, self._told = int(found["end"]), {str(mark) for mark in found["told"]}
        except (OSError, ValueError, KeyError, TypeError):
            self._end = self._journal.stat().st_size if self._journal.exists() else 0
            self._keep()

    _kept: tuple[int, int] = (-1, -1)

    def _keep(self) -> None:
        if (self._end, len(self._told)) != self._kept:
            content = {"version": 1, "end": self._end, "told": sorted(self._told)}
            keys.write_private(self._memory, json.dumps(content).encode())
            self._kept = (self._end, len(self._told))


def trial(consortium: str) -> dict[str, Any]:
    """What `fl-server notify` sends."""
    at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {"version": 1, "event": "test", "consortium": consortium, "at": at}


def _age(moment: str) -> float:
    try:
        return time.time() - datetime.fromisoformat(moment).timestamp()
    except ValueError:
        return 0.0
