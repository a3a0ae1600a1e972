"""The process that trains: it sees images and no keys, and the node, which holds the keys and the connection, sees no images.

    node                                              worker, one process for all orders
    Worker.carry_out -- order, study, site.yaml -->   main: fl_client.app.carry_out
                     <-- sign this (label, body) --   Member, at most twice in an order
                     -- signature -------------->     `protection.Signing` decides, in the node
                     <-- report or refusal ------

They speak over two pipes, in frames of JSON and bytes (`Line`). Nothing is pickled: what trains on files from anywhere may be
taken over by one of them, and must not run code in the node then. For the same reason the worker has few rights
(`fl_client.sandbox`), starts with an environment in which no secret can stand, and inherits no file but the pipes and the
node's standard output and error.

What an order may take (memory, time) is held to from outside: a worker over a limit is killed and a new one takes its place.
Each process tests its own noise, clip, draws, masks and isolation first; one that fails works on nothing.

Not covered: both run as the same user. Where the system lets the worker hide the keys' folder from itself, it does; where not, it
could open the site's key, and people are told so.
"""

import contextlib
import fcntl
import functools
import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from fl_client import sandbox
from fl_client.protection import Signing, Vault
from fl_client.site import Resources, Site, SiteFile, Work
from models.study import Study
from privacy import deidentify, heap, keys, logs, tracing
from privacy.errors import AuditFailed, DocumentError, IsocenterError, LimitExceeded, MessageMalformed, WorkerDied
from privacy.wire import BYTES_MAX, ORDERS, REPORTS, Crossing, Order, Refusal, Report

STARTS_MAX = 3  # of a worker in a row: once may be an accident, and so may the memory of another program
HEAD_BYTES_MAX = 2 * 1024 * 1024  # a study is at most 256 KiB
PIPE_BYTES = 1024 * 1024  # what a user may have; with the usual 64 KiB both processes wake sixteen times as often
LOOK_S, MINUTE_S, GIB = 0.5, 60.0, 1024**3
IDLE_S = 2.0  # after which free memory goes back: to get it anew costs a short round a tenth of its training
HIDE = "import sys; from fl_client.sandbox import hide; hidden = hide(sys.argv[1])"  # before numpy starts its threads
PROGRAM = f"{HIDE}; from fl_client.worker import main; main(hidden, *map(int, sys.argv[2:]))"
ENVIRONMENT = {"HOME", "LANG", "LANGUAGE", "LD_LIBRARY_PATH", "LD_PRELOAD", "PATH", "TMPDIR", "TZ", "XDG_CACHE_HOME"}
ENVIRONMENT_BEGINS = ("CUDA_", "GOMP_", "KMP_", "LC_", "MALLOC_", "MKL_", "NVIDIA_", "OMP_", "OPENBLAS_", "TORCH_")
"""Variables that a worker gets: those of the C library, of Python's start and of the numerical libraries. Proxies and tokens of
whoever runs the node are not among them."""
ROOT = Path(__file__).resolve().parent.parent
M = TypeVar("M", bound=Crossing)
log = logging.getLogger("isocenter.worker")


# Both ends -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One end of the two pipes. A frame is a word, and facts: numbers, words, lists, and bytes that travel beside the JSON."""

    reader: "Connection[Any, Any]"
    writer: "Connection[Any, Any]"

    def send(self, what: str, facts: dict[str, Any]) -> None:
        sizes = {name: len(value) for name, value in facts.items() if isinstance(value, bytes | memoryview)}
        plain = {name: value for name, value in facts.items() if name not in sizes}
        self.writer.send_bytes(json.dumps([what, plain, sizes]).encode())
        for name in sizes:
            left = memoryview(facts[name])
            while left:
                left = left[os.write(self.writer.fileno(), left) :]

    def receive(self) -> tuple[str, dict[str, Any]]:
        """The next frame. Raises EOFError or OSError when the other end is gone, MessageMalformed if it is no frame."""
        try:
            what, facts, sizes = json.loads(self.reader.recv_bytes(HEAD_BYTES_MAX))
            whole = isinstance(what, str) and isinstance(facts, dict) and isinstance(sizes, dict)
            for name, size in sizes.items() if whole else ():
                facts[name] = self._bytes(size)
        except (ValueError, TypeError, RecursionError):
            whole = False
        if not whole:
            raise MessageMalformed("what came over the pipe between node and worker is no frame")
        return what, facts

    def _bytes(self, size: object) -> bytes:
        """So many bytes, read into the place where they stay: a message's large part is in memory once."""
        if type(size) is not int or not 0 <= size <= BYTES_MAX:
            raise ValueError("no size")
        if size == 0:
            return b""
        whole, come, room = io.BytesIO(), 0, 0
        while come < size:
            if come == room:  # what is announced and never comes takes no memory
                room = min(size, max(2 * room, PIPE_BYTES))
                whole.seek(room - 1)
                whole.write(b"\0")
            with whole.getbuffer() as place:
                step = os.readv(self.reader.fileno(), [place[come:room]])
            if step == 0:
                raise EOFError
            come += step
        return whole.getvalue()  # its own memory, not a copy

    def close(self) -> None:
        self.reader.close()
        self.writer.close()


def read(facts: dict[str, Any], kinds: tuple[type[M], ...]) -> M:
    """The message of one of `kinds` whose facts these are; raises MessageMalformed for anything else."""
    kind = facts.get("kind")
    for candidate in kinds:
        if candidate.kind == kind:
            return candidate.from_facts(facts)
    raise MessageMalformed("what came over the pipe between node and worker is no message")


# The node's end ------------------------------------------------------------------------------------------------------


class Worker:
    """One resident worker process, as the node sees it. If it dies or has to be killed, a new one takes its place."""

    def __init__(self, site: Site) -> None:
        self.gpu, self.keys = site.settings.resources.gpu, str(site.home / "keys")
        self.shield: sandbox.Shield | None = None
        self._start()

    def _start(self) -> None:
        theirs_in, ours_out = Pipe(duplex=False)
        ours_in, theirs_out = Pipe(duplex=False)
        handed = (theirs_in.fileno(), theirs_out.fileno())
        for end in handed if hasattr(fcntl, "F_SETPIPE_SZ") else ():
            with contextlib.suppress(OSError):  # it is slower then
                fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", PROGRAM, self.keys, *map(str, handed)],
            stdin=subprocess.DEVNULL,
            env=environment(gpu=self.gpu),
            pass_fds=handed,
        )
        theirs_in.close()
        theirs_out.close()
        self.line, self.shield = Line(ours_in, ours_out), None
        self.statm = _open_statm(self.process.pid)

    def _replace(self) -> None:
        self.stop()
        self._start()

    def stop(self) -> None:
        """End the process. What it was working on is lost, and everything that it had made durable is not."""
        self.process.kill()
        self.process.wait()
        self.line.close()
        if self.statm >= 0:
            os.close(self.statm)
            self.statm = -1

    def wait(self) -> sandbox.Shield:
        """Return when the process is ready, and say what holds it back; one that dies before is replaced.

        Raises AuditFailed if its self-test fails, WorkerDied if it dies again and again.
        """
        for _ in range(STARTS_MAX):
            if self.shield is not None and self.process.poll() is None:
                return self.shield
            try:
                what, facts = self.line.receive()
            except (EOFError, OSError, MessageMalformed):
                log.error("the worker process died while it started or waited; a new one is started")
                self._replace()
                continue
            if what != "ready":
                raise AuditFailed(str(facts.get("text")))
            self.shield = sandbox.Shield.of(facts.get("shield"))
            return self.shield
        raise WorkerDied(f"the worker process died {STARTS_MAX} times while it started")

    def carry_out(self, site: Site, study: Study, order: Order) -> Report:
        """The worker's report or refusal of an admitted order: `fl_client.site.Work`.

        Raises LimitExceeded, SignatureRefused, or WorkerDied if it ends without an answer or answers something else; it was
        replaced then, and there is a line about it in the journal. What it had reserved in the ledger stays charged.
        """
        if site.settings.resources.gpu != self.gpu:
            self.gpu = site.settings.resources.gpu
            self._replace()
        self.wait()
        try:
            with Limits(site.settings.resources, self.process, self.statm):
                return self._answer(site, study, order)
        except (EOFError, OSError, MessageMalformed) as error:
            log.error("the worker process ended, or answered nonsense, while it worked on an order: %r", error)
            failure: IsocenterError = WorkerDied("the worker process ended while it worked on the order")
        except IsocenterError as error:
            failure = error
        self._replace()
        why = failure.limit if isinstance(failure, LimitExceeded) else failure.code
        site.journal.append("worker-replaced", why=why, **order.naming())
        raise failure

    def _answer(self, site: Site, study: Study, order: Order) -> Report:
        """Hand over the order, sign what it needs, and take what comes back."""
        signing = Signing(site, study, order)
        settings, public = site.settings.model_dump_json().encode(), keys.public_pem(site.coordinator)
        told = {"home": str(site.home), "settings": settings, "coordinator": public, "study": study.canonical()}
        told["body"] = order.body()  # hashed here already, when its signature was checked
        self.line.send("work", told)
        self.line.send("order", order.to_facts())
        while True:
            what, facts = self.line.receive()
            if what == "spans":
                tracing.past(facts.get("spans"))
                continue
            if what != "sign":
                break
            label, body = facts.get("label"), facts.get("body")
            if not isinstance(label, bytes) or not isinstance(body, bytes):
                raise MessageMalformed("the worker asked for a signature over nothing")
            self.line.send("signed", {"signature": signing.sign(label, body)})
        report = read(facts, REPORTS)
        if report.naming() != order.naming() or report.site != site.name:
            raise MessageMalformed("the worker answered another order than the one that it was given")
        return report


class Limits:
    """While it is entered, kills `process` when the order that it works on takes more than `resources`; leaving raises then.

    Memory is what is resident, in GiB; time is what has passed. Both are looked at every LOOK_S seconds, from outside.
    """

    def __init__(self, resources: Resources, process: "subprocess.Popen[bytes]", statm: int) -> None:
        self.resources, self.process, self.statm = resources, process, statm
        self.broken: LimitExceeded | None = None
        self.over = threading.Event()
        self.looking = threading.Thread(target=self._look, args=(time.monotonic(),), daemon=True)

    def __enter__(self) -> None:
        self.looking.start()

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.looking.join()
        if self.broken is not None:
            raise self.broken

    def _look(self, began: float) -> None:
        memory, minutes = self.resources.memory_gb, self.resources.minutes_per_round
        while self.broken is None:
            if time.monotonic() - began > minutes * MINUTE_S:
                self.broken = LimitExceeded(f"the order took more than {minutes} minutes", "time")
            elif memory and _resident(self.statm) > memory * GIB:
                self.broken = LimitExceeded(f"the order took more than {memory:g} GiB of memory", "memory")
            elif self.over.wait(LOOK_S):
                return
        self.process.kill()


def environment(*, gpu: bool) -> dict[str, str]:
    """The variables that a worker starts with."""
    kept = {n: value for n, value in os.environ.items() if n in ENVIRONMENT or n.startswith(ENVIRONMENT_BEGINS)}
    kept |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    kept["PYTHONPATH"] = str(ROOT)  # the installation that the node runs, wherever it was started
    return kept if gpu else kept | {"CUDA_VISIBLE_DEVICES": ""}


def _open_statm(pid: int) -> int:
    """Where the memory of a process that just started can be read, also after it hides itself; -1 where there is no such."""
    try:
        return os.open(f"/proc/{pid}/statm", os.O_RDONLY)
    except OSError:
        return -1


def _resident(statm: int) -> int:
    """Bytes of memory that the process holds now; 0 if it ended, or where this system does not tell."""
    try:
        return int(os.pread(statm, 256, 0).split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


# The worker's end ----------------------------------------------------------------------------------------------------


def main(hidden: bool, orders: int, answers: int) -> None:
    """The life of a worker process: confine itself, test itself, and work on orders until the node goes.

    `hidden`: whether the keys' folder was hidden from it; `orders` and `answers`: the ends of its pipes.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the group; the node ends the worker in order
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    line = Line(Connection(orders, writable=False), Connection(answers, readable=False))
    home = Path(sys.argv[1]).parent  # the keys' folder stands in the site's home
    deidentify.guard(home, native=True, file=logs.handler(home, "worker", _log_files(home)))
    shield = sandbox.Shield(hidden, sandbox.confine())
    try:
        work = _warm(line)
    except AuditFailed as error:
        return line.send("failed", {"text": str(error)})
    line.send("ready", {"shield": shield.word})
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            site, study, order = _next(line)
            with tracing.collected() if site.settings.traces else contextlib.nullcontext() as spans:
                report = _attempt(work, site, study, order)
            if spans:
                line.send("spans", {"spans": spans})
            line.send("report", report.to_facts())
            del order, report  # each as large as the model; the next order may be long in coming
            if not line.reader.poll(IDLE_S):
                heap.give_back()


def _log_files(home: Path) -> logs.LogFiles:
    """As site.yaml says; as usual while it cannot be read, because a worker starts all the same."""
    try:
        return Site.settings_of(home).log
    except DocumentError:
        return logs.LogFiles()


def _end_with_parent(parent: int) -> None:
    """A worker whose node was killed would train on for nobody."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _warm(line: Line) -> Work:
    """Import what orders need, once, and have the privacy mechanism test itself; raises AuditFailed."""
    from fl_client.app import Desk, carry_out
    from privacy import selftest

    selftest.require()
    heap.give_back()  # the test works on more than a small study does

    def ask(label: bytes, body: bytes) -> bytes:
        line.send("sign", {"label": label, "body": body})
        signature: bytes = line.receive()[1]["signature"]
        return signature

    return functools.partial(carry_out, Desk(vault=Vault(signer=lambda site: ask)))


def _next(line: Line) -> tuple[Site, Study, Order]:
    """The next order, with the site and the study as the node knows them. Raises EOFError when the node has gone."""
    _, told = line.receive()
    _, facts = line.receive()
    site = Site(
        Path(told["home"]), SiteFile.model_validate_json(told["settings"]), keys.load_public(told["coordinator"])
    )
    order = read(facts, ORDERS)
    order.take_body(told["body"])
    return site, Study.from_canonical(told["study"]), order


def _attempt(work: Work, site: Site, study: Study, order: Order) -> Report:
    """What this site reports to `order`, or a refusal with the public code of whatever was raised; the text stays here."""
    try:
        return work(site, study, order)
    except IsocenterError as error:
        log.warning("refused: %s (%s)", error.code, error)
        code = error.code
    except Exception:
        log.exception("refused: internal")
        code = IsocenterError.code
    return Refusal(**order.naming(), site=site.name, code=code)
