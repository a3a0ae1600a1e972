"""A real coordinator's consortium service on loopback, for tests: real TLS, real signatures, no training behind it."""

import json
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fl_server import consortium
from fl_server.roster import Home
from fl_server.settings import ServerFile
from models.study import Study
from privacy import keys
from privacy.calls import Caller, Enrolment, PartyRole, join
from privacy.statements import Statement


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answer_nonsense(server: socket.socket) -> None:
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        with connection:
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def tls_version(address: str, ca_pem: bytes, version: ssl.TLSVersion) -> str | None:
    context = ssl.create_default_context(cadata=ca_pem.decode())
    context.maximum_version = version
    context.set_alpn_protocols(["h2"])
    host, _, port = address.partition(":")
    with (
        socket.create_connection((host, int(port)), 10) as connection,
        context.wrap_socket(connection, server_hostname=host) as tls,
    ):
        return tls.version()


def settings(**changes: Any) -> ServerFile:
    given = {"version": 1, "name": "demo", "host": "127.0.0.1", "service_port": free_port(), **changes}
    return ServerFile.model_validate(given)


def study(*sites: str, **participation: Any) -> Study:
    """A small consistent study of these sites; `quorum` defaults to all of them."""
    part = {"sites": list(sites), "quorum": len(sites), **participation}
    return Study.model_validate(
        {
            "name": "opacity",
            "title": "Opacities on chest radiographs",
            "purpose": "Tests of the consortium service.",
            "task": {"targets": ["opacity"]},
            "training": {"rounds": 2},
            "protection": "plain",
            "privacy": "none",
            "participation": part,
        }
    )


def with_roster(asked: Study, aggregator: str | None = None, **roster: str | None) -> Study:
    """`asked` with some keys exchanged, or left out where None is given."""
    changed = {name: key for name, key in {**asked.roster, **roster}.items() if key is not None}
    return asked.model_copy(
        update={"roster": changed, "aggregator": asked.aggregator if aggregator is None else aggregator}
    )


@dataclass
class Coordinator:
    """A served home, with a record of what its hooks were asked."""

    home: Home
    folder: Path
    enrolled: list[tuple[str, str, bytes]] = field(default_factory=list)
    launched: list[tuple[str, str]] = field(default_factory=list)
    launch_error: Exception | None = None
    enrol_error: Exception | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.home.settings.service_port}"

    def hooks(self) -> consortium.Hooks:
        def enrolled(name: str, role: PartyRole, public_key: bytes) -> int | None:
            if self.enrol_error:
                raise self.enrol_error
            self.enrolled.append((name, role, public_key))
            return 2**64 - len(self.enrolled)  # Flower's node ids use all 64 bits

        def launch(digest: str, researcher: str) -> str:
            if self.launch_error:
                raise self.launch_error
            self.launched.append((digest, researcher))
            return f"run-{len(self.launched)}"

        return consortium.Hooks(enrolled, launch)

    def join(self, name: str, role: PartyRole = "site") -> Enrolment:
        return join(str(self.home.invite(name, role)), self.keys_of(name), role)

    def keys_of(self, name: str) -> Path:
        return self.folder / name / "keys"

    def submit(self, asked: Study, researcher: str = "rosa") -> Study:
        """Hand `asked` in with everybody's keys, as `fl-study submit` does; the study that is offered."""
        complete = self.home.with_keys(asked)
        with self.caller(researcher) as caller:
            assert caller.submit(complete.canonical()) == complete.digest
        return complete

    def caller(self, name: str) -> Caller:
        return Caller.open(self.keys_of(name))

    def decide(self, name: str, digest: str, decision: Any, time_ms: int) -> None:
        statement = Statement(digest, name, decision, time_ms)
        key = keys.load_key(self.keys_of(name) / "site.key")
        with self.caller(name) as caller:
            caller.decide(statement.body(), keys.sign(key, keys.STUDY_DECISION, statement.body()))

    def run_folder(self, run_id: str, digest: str, state: str = "running") -> Path:
        folder = self.home.runs / run_id
        folder.mkdir()
        self.set_state(run_id, digest, state)
        return folder

    def set_state(self, run_id: str, digest: str, state: str) -> None:
        record = {"run_id": run_id, "digest": digest, "study": "opacity", "state": state, "label": state}
        keys.write_private(self.home.runs / run_id / "run.json", json.dumps(record).encode())


def point_of(served: Coordinator, name: str) -> str:
    """Oracle: the compressed point of SEC 1, 2.3.3, from the numbers of the key in the site's own folder."""
    numbers = keys.load_key(served.keys_of(name) / "site.key").public_key().public_numbers()
    return f"{2 + numbers.y % 2:02x}{numbers.x:064x}"


def aggregator_of(served: Coordinator) -> str:
    raw = (served.home.root / "keys" / "aggregator.key").read_bytes()
    return X25519PrivateKey.from_private_bytes(raw).public_key().public_bytes_raw().hex()


@contextmanager
def coordinator(folder: Path, **changes: Any) -> Iterator[Coordinator]:
    """A founded and served consortium below `folder`."""
    served = Coordinator(Home.found(folder / "consortium", settings(**changes)), folder)
    server = consortium.serve(served.home, served.hooks())
    try:
        yield served
    finally:
        server.stop(0).wait()
