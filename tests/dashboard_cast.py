"""A home with everything on it that a dashboard shows, and dashboards of it on loopback; for tests."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from coordinator import settings
from test_server_run import done, sheet, study

from fl_server import authority, dashboard, door
from fl_server.roster import Home
from fl_server.run import Run
from models.study import Study
from privacy import calls, keys
from privacy.greeting import Readiness, Versions, own
from privacy.statements import Statement

EVIL = "<img src=x onerror=alert(1)>\x1b[2J"
SITES = ("north", "south", "west")


def furnished(folder: Path) -> tuple[Home, Study, Run]:
    """Three sites (one silent, one that never connected), a researcher, a study that two approve, and a run under way."""
    home = Home.found(folder / "c", settings(name="chest"))
    secret = {}
    for number, name in enumerate((*SITES, "gone", "ada"), start=1):
        role: calls.PartyRole = "researcher" if name == "ada" else "site"
        secret[name] = keys.make_key(folder / f"{name}.key")
        line = home.invite(name, role)
        authority.enrol(home, line.token, name, role, keys.make_csr(secret[name], name))
        if role == "site":
            home.roster.set_node(name, 2**64 - number)  # ids use all 64 bits
    home.revoke("gone")
    home.invite("newcomer", "site")
    plan = home.with_keys(study(Opacity="Opacity <script>alert(2)</script>"))
    signature = keys.sign(secret["ada"], keys.STUDY_SUBMIT, plan.canonical())
    home.roster.add_study(plan, "ada", signature, keys.sign(home.coordinator_key, keys.STUDY_OFFER, plan.canonical()))
    for name, decision in (("north", "approved"), ("west", "declined")):
        statement = Statement(plan.digest, name, decision, int(time.time() * 1000))  # type: ignore[arg-type]
        home.roster.decide(statement, keys.sign(secret[name], keys.STUDY_DECISION, statement.body()))
    here = own()
    home.roster.tell("north", here, Readiness(True))
    home.roster.tell("south", Versions(here.wire - 1, 0, 0, 9), Readiness(False, ("images", "labels", "disk")))
    home.roster.tell("ada", Versions(here.wire, here.major, here.minor + 1, 0))
    online(home, north=3600.0, south=-7200.0)
    run = Run.create(home.runs, plan, "ada", list(SITES))
    run.start()
    run.event("asked", stage="train", round=1, sites=list(SITES))
    run.score(sheet(0.9), {})
    run.commit(done(1), np.zeros(3, np.float32), {})
    run.event("asked", stage="train", round=2, sites=list(SITES))
    run.event("site_missing", site="west", reason=EVIL)
    run.event("void", round=2, attempt=1, reason=EVIL)
    return home, plan, run


def online(home: Home, **until: float) -> None:
    """Write what the coordinator says of nodes: site -> seconds from now until which it counts as online."""
    path = home.root / "nodes.json"
    nodes = json.loads(path.read_text()) if path.exists() else {}
    nodes |= {str(home.roster.party(name).node_id): time.time() + seconds for name, seconds in until.items()}
    path.write_text(json.dumps(nodes))


@dataclass
class Shown:
    """A dashboard that is being served."""

    port: int
    screen: dashboard.Screen
    door: door.Door

    @property
    def address(self) -> str:
        return f"{'https' if self.screen.login else 'http'}://127.0.0.1:{self.port}"


@contextmanager
def shown(home: Home, login: bool = False) -> Iterator[Shown]:
    """Serve the dashboard of `home` from a thread, as `dashboard.serve` does."""
    bound: socket.socket = door.listen("127.0.0.1", 0)
    port = int(bound.getsockname()[1])
    screen = dashboard.Screen(home, login)
    hosts = door.names_of(port, ("127.0.0.1", "localhost", "::1"))
    password = home.root / "keys" / dashboard.PASSWORD if login else None
    entry = door.Door(screen.app(), hosts, password, screen.login_page)
    server = door.server(entry, door.tls(home.tls_pem, home.tls_key) if login else None)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield Shown(port, screen, entry)
    finally:
        server.should_exit = True
        thread.join(timeout=10)
