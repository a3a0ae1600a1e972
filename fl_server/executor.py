"""The process that carries out runs: it takes Flower's ServerApp task itself and runs `fl_server.app` of this installation.

`python -m fl_server.executor HOME PORT`, started by `fl_server.link`, with the SuperExec secret on standard input. A run left
in state running by a process that died is simply carried on: a new Flower run, the next round that is not committed.

Each of these processes carries out one run at a time, because Flower's Message() knows one task of its process. server.yaml says
how many there are (`runs_at_once`); a lock on the run's folder tells who has it. A node answers one order at a time, whichever
run it is of, so runs side by side take turns at each site.
"""

import contextlib
import fcntl
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from flwr.cli.build import build_fab_from_files
from flwr.common.constant import SubStatus
from flwr.common.serde import context_from_proto, fab_to_proto, run_from_proto
from flwr.proto.control_pb2 import StartRunRequest
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest, PushTaskOutputRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity

from fl_server.app import app, note_end, note_missing_ends
from fl_server.control import LOOPBACK, control
from fl_server.mailbox import Mailbox
from fl_server.roster import Home
from fl_server.run import heed_stop, holding, list_runs, mark_stopped, read_facts, stop_asked
from privacy import heap, logs, tracing
from privacy.deidentify import guarded
from privacy.errors import IsocenterError, RunError

LOOK_S = 0.2  # between two looks for queued runs: one stat of a folder
log = logging.getLogger("isocenter.executor")
LOOK_MOST_S = 30.0  # after something went wrong
WAITING = ("queued", "running")
BUNDLE = """
[project]
name = "isocenter-study"
version = "1.0.0"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "isocenter"
[tool.flwr.app.components]
serverapp = "fl_server.app:app"
clientapp = "fl_client.client_app:app"
"""
"""A Flower bundle without code: Flower wants one for each run; nobody ever unpacks it."""


def execute(root: Path, port: int, secret: bytes) -> None:
    """Carry out queued and interrupted runs, oldest first, for ever. A run that cannot be started does not stop the others."""
    home = Home.open(root)
    note_missing_ends(home)
    runs, pause = home.runs, LOOK_S
    while True:
        waiting = [str(facts["run_id"]) for facts in list_runs(runs) if facts["state"] in WAITING]
        went = [attempt(root, run_id, port, secret) for run_id in waiting]
        pause = LOOK_S if all(went) else min(pause * 2, LOOK_MOST_S)
        time.sleep(pause)


def attempt(root: Path, run_id: str, port: int, secret: bytes) -> bool:
    """`carry_out`; whether it came to its end. Whatever went wrong is in the log, and the other runs have their turn.

    Not a run that was stopped while it waited; one that another process holds has its turn there.
    """
    folder = root / "runs" / run_id
    try:
        with holding(folder) as held:
            if not held or read_facts(folder)["state"] not in WAITING:
                return True
            if stop_asked(folder):
                note_end(Home.open(root), mark_stopped(folder))
            else:
                carry_out(root, run_id, port, secret)
    except IsocenterError as error:
        log.error("run %s: %s %s", run_id, error, error.remedy)
    except Exception:
        log.exception("run %s", run_id)
    else:
        return True
    return False


def carry_out(root: Path, run_id: str, port: int, secret: bytes) -> None:
    """One run from where it stands to its end, as one Flower run."""
    with starting(root):
        flower_run = _start_flower_run(root / "runs" / run_id, port)
        token = _acquire(flower_run, port, secret)
    grid = Mailbox(f"{LOOPBACK}:{port}", token, partial(heed_stop, root / "runs" / run_id, within_stage=True))
    client = grid.client  # Flower's task calls go over the same connection
    heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
    heartbeat.start()
    outcome = SubStatus.FAILED
    log.info("run %s is carried out", run_id)
    try:
        given = client.PullTaskInput(PullTaskInputRequest())
        # Message() needs to know which task it is created in.
        TaskIdentity.task_id, TaskIdentity.run_id = given.task_id, given.run.run_id
        TaskIdentity.node_id = given.context.node_id
        grid.set_run(run_from_proto(given.run))
        context = context_from_proto(given.context)
        context.run_config = {"home": str(root), "run": run_id}
        app(grid, context)
        outcome = SubStatus.COMPLETED
        log.info("run %s came to its end", run_id)
    finally:
        heartbeat.stop()
        client.PushTaskOutput(PushTaskOutputRequest(sub_status=outcome, details=""))
        grid.close()


@contextlib.contextmanager
def starting(root: Path) -> Iterator[None]:
    """One process at a time starts a run in Flower and takes its task, so that a task which nobody took is a dead one's."""
    with (root / "starting.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _start_flower_run(folder: Path, port: int) -> int:
    bundle, _ = build_fab_from_files({"pyproject.toml": BUNDLE.encode(), "study.json": folder / "study.json"})
    with control(port) as client:
        response = client.StartRun(StartRunRequest(fab=fab_to_proto(Fab("", bundle, {}))))
    if not response.run_id:
        raise RunError("Flower's SuperLink did not start the run")
    return int(response.run_id)


def _acquire(flower_run: int, port: int, secret: bytes) -> str:
    """The token of our run's ServerApp task; tasks that an earlier, dead executor left behind are ended."""
    acquire = SuperExecAuthHttpInterceptor(
        master_secret=secret, protected_methods=frozenset({"/flwr.proto.Runtime/AcquireTask"})
    )
    version = RuntimeVersionHttpInterceptor(component_name="isocenter")
    client = RuntimeHttpClient.from_server_address(f"{LOOPBACK}:{port}", True, None, [version, acquire])
    try:
        while True:
            answer = client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
            if not answer.token:
                time.sleep(LOOK_S / 10)
            elif answer.task.run_id == flower_run:
                return str(answer.token)
            else:
                stale = Mailbox(f"{LOOPBACK}:{port}", answer.token)
                stale.client.PushTaskOutput(PushTaskOutputRequest(sub_status=SubStatus.FAILED, details="stale"))
                stale.close()
    finally:
        client.close()


def _end_with_parent() -> None:
    """The coordinator holds the other end of standard input; when it is gone, so are we."""
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    heap.return_large()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the coordinator ends us in order
    root, port, secret = (
        Path(sys.argv[1]),
        int(sys.argv[2]),
        bytes.fromhex(sys.stdin.buffer.readline().decode().strip()),
    )
    threading.Thread(target=_end_with_parent, daemon=True).start()
    settings = Home.open(root).settings
    with guarded(root, file=logs.handler(root, "executor", settings.log)):
        end = tracing.begin(settings.traces, "coordinator")
        try:
            execute(root, port, secret)
        finally:
            end()


if __name__ == "__main__":
    main()
