"""A coordinator and tiny hospitals in one process, with a grid in memory between them."""

import shutil
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from grid import Answer, FaultyGrid
from hospital import COORDINATOR, Hospital

from fl_client.client_app import make_app
from fl_client.cohort import Cohort
from fl_client.ingest import Index
from fl_server import app as coordinator
from fl_server import authority
from fl_server.roster import Home
from fl_server.run import Run
from fl_server.settings import ServerFile
from models.labels import LabelTable
from models.study import Study
from privacy import keys


class Federation:
    """A founded coordinator and tiny hospitals, in one process."""

    def __init__(self, folder: Path, plan: Study) -> None:
        self.folder = folder
        self.home = Home.found(folder / "coordinator", ServerFile(version=1, name="test", host="127.0.0.1"))
        # The hospitals of hospital.py trust this key; the coordinator of this test signs with it.
        object.__setattr__(self.home, "coordinator_key", COORDINATOR)
        path = folder / "coordinator" / "keys" / "coordinator.key"
        path.unlink()
        keys.write_private(path, _pem(COORDINATOR))
        self.hospitals = {name: Hospital.open(folder, name, plan) for name in plan.all_sites}
        for number, (name, hospital) in enumerate(self.hospitals.items(), start=1):
            line = self.home.invite(name, "site")
            authority.enrol(self.home, line.token, name, "site", keys.make_csr(hospital.site.key, name))
            self.home.roster.set_node(name, number)
        self.plan = self.home.with_keys(plan)
        for hospital in self.hospitals.values():
            hospital.study = self.plan
            hospital.approve(self.plan)

    def copied(self, folder: Path) -> "Federation":
        """The same consortium in another folder, as it stands now; images stay where they are."""
        shutil.copytree(self.folder, folder, symlinks=True, ignore=shutil.ignore_patterns("hospital"))
        other = object.__new__(Federation)
        other.folder, other.plan = folder, self.plan
        other.home = Home.open(folder / "coordinator")
        other.hospitals = {name: Hospital(folder / name, self.plan) for name in self.hospitals}
        return other

    def grid(self) -> FaultyGrid:
        return FaultyGrid({self.node(name): self.answers(name) for name in self.hospitals})

    def node(self, name: str) -> int:
        return list(self.hospitals).index(name) + 1

    def answers(self, name: str) -> Answer:
        client, config = make_app(), {"site": str(self.hospitals[name].home)}

        def answer(message: Message) -> Message:
            return client(message, Context(1, 5, dict(config), RecordDict(), {}))

        return answer

    def new_run(self) -> Path:
        return Run.create(self.home.runs, self.plan, "ada", self.plan.all_sites).folder

    def run(self, grid: FaultyGrid | None = None, folder: Path | None = None) -> Path:
        folder = folder or self.new_run()
        context = Context(0, 0, {}, RecordDict(), {"home": str(self.home.root), "run": folder.name})
        coordinator.main(grid or self.grid(), context)
        return folder

    def cohort(self, name: str, split: Any) -> Cohort:
        site = self.hospitals[name].site
        labels = LabelTable.read(site.home / site.source.labels.table, site.source.labels)
        pins = site.home / "studies" / f"{self.plan.digest}.pins.json"
        return Cohort.open(Index.open(site.state), labels, self.plan, split, pins)


def _pem(key: Any) -> bytes:
    from cryptography.hazmat.primitives import serialization as s

    pem: bytes = key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())
    return pem
