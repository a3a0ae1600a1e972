"""The coordinator's processes and doors.

    loopback only     Flower's SuperLink with its full API (Control, Runtime, Fleet), in memory
    gateway, public   TLS 1.3 with a site's certificate; passes what a node needs of the Fleet API (`fl_server.gateway`)
    service, public   the gRPC consortium service (`fl_server.consortium`)
    executors         child processes, `runs_at_once` of them, each carrying out one queued run after the other
                      (`fl_server.executor`)

Flower 1.41's Control API has no authentication: whoever reaches it can submit code or stop runs. So it never leaves loopback,
and the gateway lists the paths it passes instead of those it blocks.
"""

import asyncio
import contextlib
import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import httpx
import uvicorn
from flwr.proto.control_pb2 import RegisterNodeRequest, UnregisterNodeRequest
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.main import create_app

from fl_server import consortium, notify
from fl_server.control import LOOPBACK, control
from fl_server.door import listen
from fl_server.doorbell import Doorbell
from fl_server.first import ROOT
from fl_server.gateway import Gateway, Limits, Refusals, Standing, gateway_context
from fl_server.overview import ENDING_SHARE, NODES
from fl_server.parcels import Parcels
from fl_server.roster import Home
from fl_server.run import Run, list_runs
from models.study import Study
from privacy import heap, keys
from privacy.errors import IsocenterError, RunError, RunStopped
from privacy.syslog import Forwarder

RESTART_PAUSE_S = 1.0  # before a dead executor is started again, so that a crash at start does not spin
STOP_S = 5.0
REVOKED_LOOK_S = 1.0
NODES_S = 2.0
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}

log = logging.getLogger("isocenter.link")


def serve(home: Home, ready: Callable[[str], None] = print, limits: Limits = Limits()) -> None:  # noqa: B008  frozen
    """Run the coordinator until SIGINT or SIGTERM; `ready` gets one sentence once every door is open."""
    heap.return_large()
    asyncio.run(_serve(home, ready, limits))


async def _serve(home: Home, ready: Callable[[str], None], limits: Limits) -> None:
    logging.getLogger("flwr").setLevel(
        logging.WARNING
    )  # a line per node and message is for -v, not for a service's log
    settings, secret, ca = home.settings, secrets.token_bytes(32), keys.load_certificate(home.ca_pem)
    inner = listen(LOOPBACK, 0)
    port = inner.getsockname()[1]
    outer = listen(settings.listen, settings.gateway_port)
    flower = superlink_app(port, secret)
    counter = Parcels(flower)
    superlink = Doorbell(counter)
    server = _Server(uvicorn.Config(superlink, log_config=None, access_log=False))
    gateway = Gateway(superlink, ca, roster_of(home), home.journal.append, limits, home.roster.tell)
    gateway.body_bytes_max, gateway.unfetched = superlink.body_bytes_max, counter.unfetched.bytes
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    inside = await _started(server, inner)
    await asyncio.to_thread(register, home, port)
    outside = asyncio.create_task(gateway.serve(outer, gateway_context(home)))
    refusals = Refusals(home.journal.append, "call-refused")
    status = consortium.health_status()
    service = await asyncio.to_thread(consortium.serve, home, hooks(home, port), refusals.count, status)
    status.set(consortium.GATEWAY, consortium.SERVING)
    outside.add_done_callback(lambda _: status.set(consortium.GATEWAY, consortium.NOT_SERVING))
    await asyncio.to_thread(home.note_settings)
    forwarder = Forwarder(home.journal.path, settings.syslog, home.root / "syslog.json") if settings.syslog else None
    if forwarder:
        forwarder.start()
    notifier = notify.Notifier(home.root, settings.name, settings.notify, partial(ending_certificates, home))
    if settings.notify:
        notifier.start()
    background = [
        outside,
        *(asyncio.create_task(_keep_executor(home, port, secret)) for _ in range(settings.runs_at_once)),
        asyncio.create_task(_keep_revoked_out(home, port)),
        asyncio.create_task(_keep_writing(refusals)),
        asyncio.create_task(_keep_nodes(home, flower)),
    ]
    ready(
        f"Coordinator {settings.name} is ready: gateway {settings.host}:{settings.gateway_port}, "
        f"consortium service {settings.host}:{settings.service_port}. Stop it with Ctrl-C."
    )
    log.info("the coordinator is ready")
    outside.add_done_callback(lambda _: stop.set())  # a coordinator without its gateway is better started again
    try:
        await stop.wait()
    finally:
        status.enter_graceful_shutdown()
        stopped = service.stop(grace=1)
        for task in reversed(background):
            task.cancel()
        await asyncio.wait(background, timeout=2 * STOP_S)
        server.should_exit = True
        await asyncio.wait([inside], timeout=STOP_S)
        await asyncio.to_thread(stopped.wait)
        await refusals.write(loop.time(), everything=True)
        if forwarder:
            await asyncio.to_thread(forwarder.stop)
        await asyncio.to_thread(notifier.stop)
    if not outside.cancelled():
        outside.result()


async def _started(server: uvicorn.Server, listening: socket.socket) -> "asyncio.Task[None]":
    """The task of a server that answers now; raises RunError if it ended instead."""
    task = asyncio.create_task(server.serve(sockets=[listening]))
    while not server.started:
        if task.done():
            raise RunError("the SuperLink did not start", remedy="See the lines above.")
        await asyncio.sleep(0.02)
    return task


async def _keep_writing(refusals: Refusals) -> None:
    """Sums of what the consortium service refused, into the journal."""
    while True:
        await asyncio.sleep(REVOKED_LOOK_S)
        await refusals.write(asyncio.get_running_loop().time())


async def _keep_nodes(home: Home, flower: Any) -> None:
    """Until when Flower counts each node as online, for whoever shows it: the dashboard is another process."""
    path, before = home.root / NODES, ""
    while True:
        nodes = flower.state.linkstate_factory.state().get_node_info()
        if (text := json.dumps({str(node.node_id): node.online_until or 0.0 for node in nodes})) != before:
            try:
                part = path.with_suffix(".part")  # not flushed: after a power cut it says nothing that still holds
                part.touch(0o600)
                part.write_text(text)
                part.replace(path)
                before = text
            except OSError as error:
                log.error("who is online cannot be written: %s", error)
        await asyncio.sleep(NODES_S)


def register(home: Home, port: int) -> None:
    """Make the enrolled sites known to a SuperLink that was just started, before anybody can reach it; raises RunError.

    Flower forgets at each start, on purpose: what a run needs is in its own checkpoint, and a half-delivered message of a
    process that died is of no use to anybody. So a node's number holds as long as the coordinator lives.
    """
    with control(port) as client:
        for site in home.roster.sites():
            if not site.revoked:
                request = RegisterNodeRequest(public_key=keys.public_pem(site.public_key), name=site.name)
                home.roster.set_node(site.name, int(client.RegisterNode(request).node_id))


def superlink_app(port: int, secret: bytes) -> Any:
    """Flower's SuperLink as an ASGI app: node authentication on, code of bundles neither installed nor run by it."""
    config = SuperLinkLifespanConfig(
        control_address=LOOPBACK,
        health_server_address=None,
        host=LOOPBACK,
        port=port,
        insecure=True,  # this server listens on loopback only; what is public is the gateway, with TLS
        certificates=None,
        superexec_auth_secret=secret,
        authn_plugin=NoOpControlAuthnPlugin(),
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=True,
        fleet_api_type="grpc-rere",
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=None,
        ssl_certfile=None,
        ssl_keyfile=None,
        database=FLWR_IN_MEMORY_DB_NAME,
        isolation="process",
        runtime_dependency_install=False,
    )
    return create_app(config, SuperLinkLifespan)


def roster_of(home: Home) -> Callable[[], Standing]:
    """What the gateway has to know of the roster, read anew at each call."""
    return lambda: Standing(home.roster.admitted_sites(), home.roster.revoked())


def hooks(home: Home, port: int) -> consortium.Hooks:
    """What the consortium service asks of this process: register a node, launch a run."""

    def enrolled(name: str, role: str, public_key_pem: bytes) -> int | None:
        if role != "site":
            return None
        with control(port) as client:
            return int(client.RegisterNode(RegisterNodeRequest(public_key=public_key_pem, name=name)).node_id)

    def launch(digest: str, researcher: str) -> str:
        study = Study.from_canonical(home.roster.study(digest).canonical)
        for facts in reversed(list_runs(home.runs)):
            if facts["digest"] == digest and facts["state"] in ("queued", "running"):
                raise RunError(
                    f"run {facts['run_id']} of this study is {facts['label']}",
                    remedy="Watch it with `fl-study watch RUN`.",
                )
            if facts["digest"] == digest and facts["state"] == "stopped":
                raise RunStopped(f"run {facts['run_id']} of this study was stopped by the coordinator")
            if facts["digest"] == digest and facts["state"] == "failed":
                run = Run.open(home.runs / facts["run_id"])
                run.facts["sites"] = home.roster.approvals(digest)
                run.requeue()
                return run.run_id
        return Run.create(home.runs, study, researcher, home.roster.approvals(digest)).run_id

    return consortium.Hooks(enrolled=enrolled, launch=launch)


def ending_certificates(home: Home) -> dict[str, str]:
    """Name -> end of every certificate in its last sixth: renewals begin in the last third, so they fail."""
    now, period = time.time(), home.settings.certificate_days * 86_400
    parties = [party for party in (*home.roster.sites(), *home.roster.researchers()) if not party.revoked]
    ends = {party.name: party.certificate.not_valid_after_utc for party in parties}
    return {
        name: end.strftime("%Y-%m-%dT%H:%M:%SZ")
        for name, end in ends.items()
        if end.timestamp() - now < period / ENDING_SHARE
    }


def unregister_revoked(home: Home, port: int) -> None:
    """Take the nodes of revoked sites out of Flower's SuperLink, so that no run counts on them; raises RunError."""
    for name, node_id in home.roster.revoked_nodes().items():
        with control(port) as client:
            try:
                client.UnregisterNode(UnregisterNodeRequest(node_id=node_id))
            except httpx.HTTPStatusError as error:
                if error.response.status_code != httpx.codes.NOT_FOUND:  # it is out already
                    raise
        home.roster.forget_node(name, node_id)
        home.journal.append("node-unregistered", site=name)


async def _keep_revoked_out(home: Home, port: int) -> None:
    """`unregister_revoked`, soon after each `fl-server revoke`, whatever goes wrong once."""
    while True:
        try:
            await asyncio.to_thread(unregister_revoked, home, port)
        except (IsocenterError, OSError) as error:
            log.error("the node of a revoked site could not be unregistered and is tried again: %s", error)
        await asyncio.sleep(REVOKED_LOOK_S)


async def _keep_executor(home: Home, port: int, secret: bytes) -> None:
    """Keep one executor alive. Its standard input carries the secret, and ends when this process does, however it dies."""
    while True:
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-P", "-m", "fl_server.executor", str(home.root), str(port)),
            stdin=subprocess.PIPE,
            env=os.environ | QUIET | {"PYTHONPATH": str(ROOT)},  # this installation's code, wherever it was started
        )
        try:
            if child.stdin is not None:
                child.stdin.write(secret.hex().encode() + b"\n")
                await child.stdin.drain()
            code = await child.wait()
            log.error("the executor ended with code %s and is started again", code)
            await asyncio.sleep(RESTART_PAUSE_S)
        except asyncio.CancelledError:
            with contextlib.suppress(ProcessLookupError):
                child.terminate()
            try:
                await asyncio.wait_for(child.wait(), STOP_S)
            except TimeoutError:
                child.kill()
            raise


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers: `_serve` stops all servers together."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield
