"""`fl-study simulate`: the coordinator's ServerApp and the sites' ClientApp of this installation on one machine, or on Ray.

Everything is the real thing (keys, signed orders, approvals, gate, cache, splits) but the network between the two halves: a
grid hands messages over (`fl_server.crew`). Nothing is trained or merged by other code than in a federation.
"""

import contextlib
import json
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from numpy.typing import NDArray

from fl_server import app as coordinator
from fl_server import authority, counting, report, saliency, weights
from fl_server.crew import Crew, CrewGrid, LocalGrid, MemoryGrid, Processes
from fl_server.means import Means
from fl_server.roster import Home
from fl_server.run import Run, read_facts
from fl_server.settings import ServerFile
from models.study import Study
from privacy import keys
from privacy.errors import RunError, StudyConflict

# The doors of the house forbid the two halves to import each other. A simulation stands for both machines, so it takes the
# site's half the way Flower takes an app: by name.
CLIENT_APP = "fl_client.rehearsal:make_app"
FOUND = "fl_client.rehearsal:found"
BORROW = "fl_client.rehearsal:borrow"
OFFER = "fl_client.rehearsal:offer"
USUAL, HERE = Means(), Means(processes=1)
ORDER_S = 3600.0  # that one order may take at least, phantoms to be made included, before its process counts as stuck

Tell = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Outcome:
    """A finished simulation: its folder can be used again for a study over the same sites."""

    folder: Path
    results: dict[str, Any]
    page: Path
    saliency: bytes | None = None
    """PNG of where the model looks; of a rehearsal on phantoms only."""


def simulate(
    study: Study,
    homes: dict[str, Path],
    patients: int,
    out: Path,
    tell: Tell,
    means: Means = USUAL,
) -> Outcome:
    """Carry out `study` over the given site homes, or over phantoms of `patients` each, and write the report into `out`.

    `tell` gets the run's events as they happen. With any number of processes the result is the same, up to the rounding of
    another number of threads. Raises StudyConflict
    if `homes` does not fit the study's sites, or if the study names weights that `means` do not give.
    """
    missing, unknown = set(study.all_sites) - set(homes), set(homes) - set(study.all_sites)
    if homes and (missing or unknown):
        parts = [f"no folder for {', '.join(sorted(missing))}"] if missing else []
        parts += [f"the study does not name {', '.join(sorted(unknown))}"] if unknown else []
        raise StudyConflict("; ".join(parts), remedy="Give one --site NAME=FOLDER for each site of the study.")
    folder = _fresh(out)
    home = Home.found(folder / "coordinator", ServerFile(version=1, name="simulation", host="127.0.0.1"))
    if means.weights is not None:
        weights.add(home.root, means.weights)
    weights.file_of(home.root, study)
    for number, name in enumerate(study.all_sites):
        site = folder / "sites" / name
        public, wanted = home.coordinator_key.public_key(), {"volumes": study.images.volume, "masks": study.segments}
        if name in homes:
            pkgutil.resolve_name(BORROW)(site, name, homes[name], public)
        else:
            made = [kind for kind, asked in wanted.items() if asked]
            pkgutil.resolve_name(FOUND)(site, name, (patients, number), public, made=made)
        line = home.invite(name, "site")
        authority.enrol(home, line.token, name, "site", keys.make_csr(keys.load_key(site / "keys" / "site.key"), name))
        home.roster.set_node(name, number + 1)
    results = _carry_out(study, home, folder, tell, means)
    if study.task.kind == "counting":
        return Outcome(folder, results, counting.write(counting.Found.of(results), None, out))
    drawn = None if homes else saliency.panel(folder, results)
    return Outcome(folder, results, report.write(results, out, saliency=drawn), drawn)


def alone(study: Study, name: str, outcome: Outcome, tell: Tell) -> dict[str, Any]:
    """The same study trained at site `name` only and evaluated at every site of it: what the site could do by itself."""
    if study.privacy != "none" and study.privacy.mode == "distributed":
        raise StudyConflict(
            "a site alone has nobody to share its noise with",
            remedy="Leave --compare out, or compare a study with `privacy.mode: local`.",
        )
    part = study.participation
    others = [site for site in study.all_sites if site != name]
    part = part.model_copy(update={"sites": [name], "evaluate_only": others, "quorum": 1, "sample": None})
    # A masked sum of one site does not exist; what this process sees of itself is no secret.
    single = study.model_copy(update={"participation": part, "protection": "plain"})
    return _carry_out(single, Home.open(outcome.folder / "coordinator"), outcome.folder, tell)


def evaluated(study: Study, model: NDArray[np.float32], outcome: Outcome) -> dict[str, Any]:
    """The results document of a run of `study` that trains nothing and tests `model` float32 (P,) at the rehearsal's sites.

    As in every run, sites test and release what they release; QuorumLost and others say why there is no test.
    """
    home = Home.open(outcome.folder / "coordinator")
    run = _prepared(study, home, outcome.folder)
    with _grid(run, home, outcome.folder, lambda event: None, HERE) as grid:
        run.start()
        run.model = model
        run.finish(coordinator.Desk(home, run, grid).test(model))
    return _results(run)


def _carry_out(study: Study, home: Home, folder: Path, tell: Tell, means: Means = HERE) -> dict[str, Any]:
    """One run from beginning to end; its results document. Raises RunError if the run failed."""
    run = _prepared(study, home, folder)
    context = Context(0, 0, {}, RecordDict(), {"home": str(home.root), "run": run.run_id})
    with _grid(run, home, folder, tell, means) as grid:
        coordinator.main(grid, context)
        grid.look()
    facts = read_facts(run.folder)
    if facts["state"] == "failed":
        raise RunError(f"the simulated run failed: {facts['label']}", remedy="See events.jsonl of the run above.")
    return _results(run)


def _prepared(study: Study, home: Home, folder: Path) -> Run:
    """A run of `study` that all its sites will approve."""
    study = home.with_keys(study)
    pkgutil.resolve_name(OFFER)(folder, study, keys.sign(home.coordinator_key, keys.STUDY_OFFER, study.canonical()))
    return Run.create(home.runs, study, "simulation", study.all_sites)


@contextlib.contextmanager
def _grid(run: Run, home: Home, folder: Path, tell: Tell, means: Means) -> Iterator[LocalGrid]:
    """The grid that reaches the sites of `run`; whatever happens, no process of it is left when this ends."""
    sites = {node: folder / "sites" / name for name, node in _nodes(home).items() if name in run.study.all_sites}
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1  # Message() refuses to be made without
    look, size = _EventReader(run.folder / "events.jsonl", tell).look, means.size(run.study)
    if means.backend == "local" and size == 1:
        yield MemoryGrid(sites, look, pkgutil.resolve_name(CLIENT_APP)())
        return
    with contextlib.closing(_crew(size, run.study, means)) as crew:
        yield CrewGrid(sites, look, crew)


def _crew(size: int, study: Study, means: Means) -> Crew:
    most_s = max(ORDER_S, study.participation.round_timeout_s)
    if means.backend == "local":
        return Processes(size, most_s)
    from fl_server.cluster import Actors

    return Actors(size if means.processes or not means.address else 0, most_s, means.address)


def _results(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run.folder / "results.json").read_bytes())
    return found


def _nodes(home: Home) -> dict[str, int]:
    return {party.name: party.node_id for party in home.roster.sites() if party.node_id is not None}


def _fresh(out: Path) -> Path:
    """A new folder below `out` for this simulation, so that an earlier one's evidence is kept."""
    number = 1
    while (folder := out / f"rehearsal-{number}").exists():
        number += 1
    folder.mkdir(parents=True)
    return folder


class _EventReader:
    """Passes new lines of events.jsonl on."""

    def __init__(self, path: Path, tell: Tell) -> None:
        self.path, self.tell, self.offset = path, tell, 0

    def look(self) -> None:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.offset)
            for line in file:
                self.offset += len(line)
                with contextlib.suppress(ValueError):  # a line in which a process ended
                    self.tell(json.loads(line))
