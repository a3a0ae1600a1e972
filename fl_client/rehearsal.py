"""Sites for a simulation: homes of their own, with phantoms or with what a real site home has ingested.

    FOLDER/
      offers/<digest>.json    a study and the coordinator's signature, for all sites
      sites/<name>/           a home as any site's (`fl_client.site`), and rehearsal.json: what it is to be made of

A rehearsal never touches the real home's approvals, journal or memory of orders; it only borrows its index and cache, so the
same patients fall into the same splits. Approving is automatic here, because nothing leaves the machine.

A home is made when its site is first asked, and everything of it lies there: a process that stands for many sites keeps open
those that it was asked about last. So a rehearsal of a thousand sites takes the memory of a few.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import torch
import yaml
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as Envelope
from flwr.supercore.task_identity import TaskIdentity

from fl_client.app import Desk, carry_out
from fl_client.cohort import Cohort, Split
from fl_client.consent import Consent, Offer
from fl_client.ingest import Index, ingest
from fl_client.orders import answer
from fl_client.phantom import STRUCTURES, VENDORS, make_hospital
from fl_client.phantom_ct import SCANNERS, make_ct_hospital
from fl_client.policy import Policy
from fl_client.site import Site, Source
from models.labels import LabelTable
from models.study import Study
from privacy import keys, parcels
from privacy.statements import Statement

OPEN_MAX = 16  # sites whose images one process keeps in memory
RECIPE = "rehearsal.json"
USUAL = 30
"""Patients below which a phantom site is one of many: then it permits splits of a single one."""
PERMISSIVE: dict[str, object] = {
    "least_protection": "plain",
    "permit_without_privacy": True,
    "tasks": ["classification", "regression", "segmentation", "counting"],
    "epsilon_per_study": 1000,
    "epsilon_per_year": 1000,
    "epsilon_total": 1000,
}
"""The only coordinator is in this process, and its results go no further than whoever holds the images."""


Kinds = Collection[Literal["volumes", "masks"]]


def found(
    home: Path, name: str, phantoms: tuple[int, int], coordinator: ec.EllipticCurvePublicKey, *, made: Kinds = ()
) -> None:
    """Make `home` the beginning of a site called `name` that trusts `coordinator`: its key, and what it is to be made of.

    `phantoms` = (patients, number of the site) says how many patients to make and, in turn, whose devices to imitate; `made`: of
    volumes, chest CT instead of radiographs; of masks, with outlines of lungs and opacities.
    """
    keys.make_key(home / "keys" / "site.key")
    keys.write_public(home / "keys" / "coordinator.pem", keys.public_pem(coordinator))
    (home / "hospital").mkdir()  # what says that its patients are made up
    recipe = {"name": name, "phantoms": phantoms, "made": sorted(made)}
    (home / RECIPE).write_text(json.dumps(recipe), encoding="ascii")


def borrow(home: Path, name: str, original: Path, coordinator: ec.EllipticCurvePublicKey) -> None:
    """Make `home` a site called `name` that trusts `coordinator`, with the data section and the ingested images of `original`."""
    keys.make_key(home / "keys" / "site.key")
    keys.write_public(home / "keys" / "coordinator.pem", keys.public_pem(coordinator))
    settings = Site.settings_of(original)
    source = Site.source_of(settings, original)
    anchored = {"labels": source.labels.anchored(original), "folder": str((original / source.folder).resolve())}
    if source.masks is not None:
        anchored["masks"] = source.masks.model_copy(update={"folder": str((original / source.masks.folder).resolve())})
    (home / "state").symlink_to(Site.state_of(original).resolve(), target_is_directory=True)
    threads, least = settings.resources.cpu_threads, settings.policy.minimum_patients
    _settle(home, name, source.model_copy(update=anchored), threads, least)


def prepare(
    home: Path, name: str, phantoms: tuple[int, int], coordinator: ec.EllipticCurvePublicKey, *, made: Kinds = ()
) -> None:
    """`found`, and the phantoms at once."""
    found(home, name, phantoms, coordinator, made=made)
    _make(home)


def _make(home: Path) -> None:
    """The phantoms of a founded site, ingested. Begun anew if it was cut short: they are the same each time."""
    recipe = json.loads((home / RECIPE).read_text(encoding="ascii"))
    name, (patients, number), made = recipe["name"], recipe["phantoms"], recipe["made"]
    hospital, seed = home / "hospital", number + 1
    if "volumes" in made:
        scanner = SCANNERS[number % len(SCANNERS)]
        mapping = make_ct_hospital(hospital, name, patients, seed, scanner, outlined="masks" in made)
    else:
        vendor = list(VENDORS.values())[number % len(VENDORS)]
        mapping = make_hospital(hospital, name, patients, seed, vendor, outlined="masks" in made)
    mapping["table"] = str((hospital / mapping["table"]).resolve())
    data = {"folder": str((hospital / "dicom").resolve()), "labels": mapping}
    if "masks" in made:
        data["masks"] = {"folder": str((hospital / "masks").resolve()), "structures": STRUCTURES}
    source = Source.model_validate(data)
    ingest(source, home, Site.state_of(home))
    _settle(home, name, source, 0, Policy().minimum_patients if patients >= USUAL else 1)


def _settle(home: Path, name: str, source: Source, threads: int, least: int) -> None:
    """Write site.yaml, the last step: a home that has one is whole."""
    text = {
        "version": 1,
        "site": name,
        "data": source.model_dump(mode="json", exclude_none=True),
        "policy": PERMISSIVE | {"minimum_patients": least},
        "resources": {"cpu_threads": threads},
    }
    keys.write_private(home / "site.yaml", yaml.safe_dump(text, sort_keys=False, allow_unicode=True).encode())


def offer(folder: Path, study: Study, coordinator_signature: bytes) -> None:
    """Let every site of the rehearsal in `folder` approve `study` when it is first asked about it."""
    content = {"study": study.canonical().decode(), "signature": coordinator_signature.hex()}
    keys.write_private(folder / "offers" / f"{study.digest}.json", json.dumps(content).encode())


def approve(home: Path, study: Study, coordinator_signature: bytes) -> None:
    """Let the rehearsal's site approve `study`, as `fl-client approve` would."""
    site = Site.settings_of(home).site
    statement = Statement(study.digest, site, "approved", time.time_ns() // 1_000_000)
    signature = keys.sign(keys.load_key(home / "keys" / "site.key"), keys.STUDY_DECISION, statement.body())
    offer = Offer(study, "simulation", b"", b"", coordinator_signature, "", "approved")
    Consent(offer, statement, signature).store(home)


def cohort(home: Path, study: Study, split: Split) -> Cohort:
    """One split of `study` at the rehearsal's site, as its node saw it."""
    site = Sites().opened(home)
    labels = LabelTable.open(home, site.source.labels)
    return Cohort.open(Index.open(site.state), labels, study, split, site.pins(study))


@dataclass
class Sites:
    """The sites that one process stands for: the OPEN_MAX that were asked last are open, the others lie on the disk."""

    desk: Desk = field(default_factory=Desk)
    open: dict[Path, Site] = field(default_factory=dict)
    approved: set[tuple[Path, str]] = field(default_factory=set)

    def answer(self, message: Message, home: Path) -> Message:
        """What the site with this home replies, through its gate and its journal."""
        return answer(message, self.opened(home), partial(carry_out, self.desk))

    def opened(self, home: Path) -> Site:
        """The site, made and with what it was offered approved. Its settings are read once while it is open."""
        if home not in self.open and not (home / "site.yaml").exists():
            _make(home)
        site = self.open.pop(home, None) or Site.open(home)
        self.open[home] = site
        for old in [*self.open][:-OPEN_MAX]:
            del self.open[old]
            self.desk.cohorts = {key: cohort for key, cohort in self.desk.cohorts.items() if key[0] != old}
        for path in (home.parent.parent / "offers").glob("*.json"):
            self._approve(home, path)
        return site

    def _approve(self, home: Path, path: Path) -> None:
        if (home, path.stem) in self.approved:
            return
        if not (home / "studies" / path.name).exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            study = Study.from_canonical(content["study"].encode())
            approve(home, study, bytes.fromhex(content["signature"]))
        self.approved.add((home, path.stem))


def make_app() -> ClientApp:
    """A ClientApp that stands for all sites of a rehearsal in this process."""
    app, sites = ClientApp(), Sites()

    def reply(message: Message, context: Context) -> Message:
        return sites.answer(message, Path(str(context.node_config["site"])))

    app.train()(reply)
    app.evaluate()(reply)
    app.query()(reply)
    return app


def member(threads: int) -> Callable[[bytes], bytes]:
    """What a member of a crew does with an order (`fl_server.crew`): home and message in, the site's reply out, as bytes."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1  # Message() refuses to be made without
    torch.set_num_threads(threads)
    sites = Sites()

    def reply(order: bytes) -> bytes:
        home, message = parcels.unpack(order)
        told = sites.answer(message_from_proto(Envelope.FromString(message)), Path(os.fsdecode(home)))
        return message_to_proto(told).SerializeToString()

    return reply


def serve(orders: int, answers: int, threads: int) -> None:
    """The life of a member that is a process: answer orders until who gives them has gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the group; who gives the orders ends this process
    reader, writer = Connection(orders, writable=False), Connection(answers, readable=False)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    reply = member(threads)
    while True:
        try:
            writer.send_bytes(reply(reader.recv_bytes()))
        except (EOFError, BrokenPipeError):
            return


def _end_with_parent(parent: int) -> None:
    """A member whose parent was killed would finish its order for nobody."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
