"""A tiny hospital from phantoms: files, labels, keys, a consortium of one coordinator, and a study that its sites approved."""

import atexit
import functools
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fl_client.rehearsal import approve, prepare
from fl_client.site import Site
from models import contributions, networks
from models.study import Study, parse
from privacy import keys, wire
from privacy.sharing import Encoding

STUDY = """
name: opacity
title: Opacity in phantoms
purpose: A test of the whole path.
task: {targets: [opacity]}
images: {size_px: 32}
training: {rounds: 2, batch_size: 8}
protection: plain
privacy: none
participation: {sites: [north, south], quorum: 2, minimum_patients: 2, round_timeout_s: 60}
evaluation: {validation: 0.2, test: 0.2, bins: 50}
"""
COORDINATOR = ec.generate_private_key(ec.SECP256R1())


def study(**change: str) -> Study:
    text = STUDY
    for old, new in change.items():
        text = text.replace(old.replace("__", ": "), new)
    return parse(Study, text, "study.yaml")


@functools.cache
def _ingested(name: str) -> Path:
    """An ingested phantom hospital, made once per session: 16 patients take a second."""
    folder = tempfile.mkdtemp(prefix="isocenter-hospital-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    home = Path(folder) / name
    prepare(home, name, (16, len(name)), COORDINATOR.public_key())
    text = (home / "site.yaml").read_text().replace("minimum_patients: 1\n", "minimum_patients: 2\n")
    (home / "site.yaml").write_text(text)
    return home


@dataclass
class Hospital:
    """One site's home that a test may change, with a coordinator whose key the test holds."""

    home: Path
    study: Study

    @classmethod
    def open(cls, folder: Path, name: str = "north", given: Study | None = None) -> "Hospital":
        shutil.copytree(_ingested(name), folder / name, symlinks=True)
        hospital = cls(folder / name, given or study())
        hospital.approve(hospital.study)
        return hospital

    @property
    def site(self) -> Site:
        return Site.open(self.home)

    def approve(self, wanted: Study) -> None:
        approve(self.home, wanted, keys.sign(COORDINATOR, keys.STUDY_OFFER, wanted.canonical()))

    def order(self, kind: type[wire.Order] = wire.TrainOrder, **change: Any) -> wire.Order:
        """A signed order of round 1 for the initial model."""
        facts: dict[str, Any] = {"study": self.study.digest, "run": "run-1", "round": 1, "attempt": 1, "sum": 1}
        facts |= {"issued": int(time.time()), "signature": b""}
        if issubclass(kind, wire.WorkOrder):
            facts |= {"model": first_model(self.study), "scale": 10, "keys_next": False}
            facts |= {"participants": (), "shares": b""}
        facts |= change
        if kind is wire.EvaluateOrder:
            facts.setdefault("split", "validation")
        return kind(**facts).signed(COORDINATOR)

    def deliver(self, order: wire.Order | RecordDict, message_type: str = "") -> Message:
        """What the site's ClientApp answers."""
        from fl_client.client_app import make_app

        records = order if isinstance(order, RecordDict) else order.to_records()
        kind = message_type or (order.message_type if isinstance(order, wire.Order) else "train")
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        message = Message(records, dst_node_id=5, message_type=kind)
        message.metadata.__dict__["_message_id"] = "m1"
        return make_app()(message, Context(1, 5, {"site": str(self.home)}, RecordDict(), {}))

    def encoding(self, kind: type[wire.Order] = wire.TrainOrder, scale: int = 10) -> Encoding:
        """How a plain report to `order` is packed."""
        train = kind is wire.TrainOrder
        return Encoding(
            values=first_model(self.study).size if train else 0,
            counts=contributions.count_of(self.study, "train" if train else "evaluate"),
            bits=contributions.bits_of(self.study, "train" if train else "evaluate", 1),
            scale=scale,
            sites=len(self.study.participation.sites if train else self.study.all_sites),
        )

    def answer(self, order: wire.Order) -> wire.Report:
        return wire.decode(self.deliver(order), *wire.REPORTS)


@functools.cache
def _first_model(digest: str, text: bytes) -> Any:
    return networks.to_vector(networks.build(Study.from_canonical(text)))


def first_model(wanted: Study) -> Any:
    return _first_model(wanted.digest, wanted.canonical())
