"""`fl-study simulate --compare`: the study's model beside models trained otherwise, on the same splits of the same patients.

    federated     the study as it is
    centralised   one model on the training splits of all sites put together: what sharing the images would have brought.
                  Only a simulation can do that. As many rounds of as many epochs, the study's local loop and start; the
                  round is chosen by the validation splits put together
    personalised  at each site the federated model with its head, the last layer, trained on for one round there and tested there.
                  Nothing is chosen: neither round nor rate, so the test split is looked at once
    local         each training site by itself, tested everywhere

Every test is a run of the sites' own programs, with what they release. Nothing but a simulation calls this.
"""

import pkgutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from fl_server import simulation, weights
from fl_server.matrix import Cell, Comparison, Kind, Model, Tested, cell
from fl_server.results import canonical
from fl_server.roster import Home
from fl_server.simulation import Outcome, Tell
from models import learning, networks
from models import weights as files
from models.learning import TrainingCohort, Turn
from models.metrics import ScoreHistogram
from models.sections import Strategy
from models.study import Study
from privacy.errors import StudyConflict

COHORT = "fl_client.rehearsal:cohort"  # the site's half, looked up by name as everything is in a simulation
NOTES: dict[Kind, str] = {
    "federated": "the study as it is",
    "centralised": "one model on all sites' training splits put together, the same rounds; possible in a simulation only",
    "personalised": "the federated model, its head trained on for one round at the site where it is tested; nothing was chosen",
    "local": "trained at this site alone, the same rounds",
}
Float32 = NDArray[np.float32]
Watched = Callable[[], AbstractContextManager[Tell]]
"""Opened for one run: gives who hears its events."""


@dataclass(eq=False)
class Pooled:
    """Cohorts of several sites as one; `patients` are numbered so that no two sites share one."""

    images: torch.Tensor
    targets: torch.Tensor
    known: torch.Tensor
    patients: torch.Tensor
    public_size: int
    covariates: torch.Tensor

    @classmethod
    def of(cls, cohorts: Sequence[Any]) -> "Pooled":
        parts, first = [], 0
        for cohort in cohorts:
            parts.append(cohort.patients + first)
            first += int(cohort.patients.max()) + 1 if len(cohort.patients) else 0
        images, targets, known = (
            torch.cat([getattr(c, name) for c in cohorts]) for name in ("images", "targets", "known")
        )
        values = torch.cat([learning.covariates_of(cohort) for cohort in cohorts])
        return cls(images, targets, known, torch.cat(parts), sum(cohort.public_size for cohort in cohorts), values)


def check(study: Study) -> None:
    """Raise StudyConflict if a study cannot be compared; asked before anything is trained."""
    if study.task.kind == "counting" or not study.training.rounds:
        raise StudyConflict("a study that trains nothing has nothing to compare", remedy="Leave --compare out.")
    if study.segments:
        raise StudyConflict(
            "models are compared by AUROC, and this study outlines structures", remedy="Leave --compare out."
        )
    if study.task.kind != "classification":
        raise StudyConflict(
            "models are compared by their AUROC, and this study's target is a number",
            remedy="Leave --compare out, and simulate a study of one site to see what it does alone.",
        )
    if study.participation.sample is not None:
        raise StudyConflict(
            "with participation.sample each model would be tested at other sites than the one beside it",
            remedy="Leave --compare out, or compare the study without `sample`.",
        )
    if study.strategy.local_norms:
        raise StudyConflict(
            "with strategy: fedbn there is no common model to compare",
            remedy="Leave --compare out, and simulate the study with fedavg as well.",
        )
    if study.evaluation.external == "all" and study.participation.evaluate_only:
        raise StudyConflict(
            "with evaluation.external: all a site is tested on patients that it trains on in other rows of a comparison",
            remedy="Leave --compare out, or compare the study without `external: all`.",
        )
    if study.privacy != "none" and study.privacy.mode == "distributed":
        raise StudyConflict(
            "a site alone has nobody to share its noise with",
            remedy="Leave --compare out, or compare a study with `privacy.mode: local`.",
        )


def compare(study: Study, outcome: Outcome, watched: Watched) -> Comparison:
    """The models of KINDS beside the federated one of `outcome`.

    Raises StudyConflict as `check` does.
    """
    check(study)
    rehearsed = Study.from_canonical(canonical(outcome.results["study"]))
    sites, targets = rehearsed.all_sites, rehearsed.task.targets
    models = [model_of("federated", None, outcome.results, rehearsed)]
    central = simulation.evaluated(_tested(study, "centralised"), _centralised(rehearsed, outcome), outcome)
    models.append(model_of("centralised", None, central, rehearsed))
    models.append(_personalised(study, rehearsed, outcome))
    for name in study.participation.sites:
        with watched() as tell:
            found = simulation.alone(study, name, outcome, tell)
        models.append(model_of("local", name, found, rehearsed))
    return Comparison(study=study.name, digest=rehearsed.digest, targets=targets, sites=sites, models=models)


def model_of(kind: Kind, site: str | None, results: dict[str, Any], study: Study) -> Model:
    """The row of one tested model."""
    test, figures = results["test"], results["figures"]
    counts = None if test is None else ScoreHistogram.from_json(test["counts"])
    found = {}
    for number, target in enumerate(study.task.targets):
        released = {name: cell(figures[name][number]) if figures.get(name) else None for name in study.all_sites}
        found[target] = Tested(sites=released, pooled=_pooled(counts, number))
    return Model(kind=kind, site=site, note=NOTES[kind], results=found)


def _pooled(counts: ScoreHistogram | None, target: int) -> Cell | None:
    area = None if counts is None else counts.auroc(target)
    if counts is None or area is None:
        return None
    low, high = counts.interval(target) or (None, None)
    return Cell(auroc=area, low=low, high=high)


def _tested(study: Study, kind: Kind) -> Study:
    """`study` as it stands for the test of one model: without masks, which nothing here needs, and with a digest of its own.

    A site releases figures of one model in a study, and no more.
    """
    return study.model_copy(update={"protection": "plain", "purpose": NOTES[kind]})


def _cohort(study: Study, outcome: Outcome, name: str, split: str) -> Any:
    return pkgutil.resolve_name(COHORT)(outcome.folder / "sites" / name, study, split)


def _centralised(study: Study, outcome: Outcome) -> Float32:
    """float32 (P,): trained as one site would be that held the training splits of all, the round chosen as the study says."""
    training, validation = (
        Pooled.of([_cohort(study, outcome, name, split) for name in study.participation.sites])
        for split in ("train", "validation")
    )
    home = Home.open(outcome.folder / "coordinator")
    best, _ = files.start(study, weights.file_of(home.root, study))
    single, least = study.model_copy(update={"strategy": Strategy()}), float("inf")
    net = networks.build(single)
    networks.load_vector(net, best)
    for number in range(1, study.training.rounds + 1):
        _learn(net, training, single, number)
        loss = learning.evaluation_loss(learning.predict(net, validation), validation)
        if number == 1 or study.evaluation.select == "last" or loss < least:
            best, least = networks.to_vector(net), loss
    return best


def _personalised(study: Study, rehearsed: Study, outcome: Outcome) -> Model:
    """The federated model with its head trained on at each site. Where a site only evaluates, nothing is pooled."""
    path = outcome.folder / "coordinator" / "runs" / outcome.results["run_id"] / "model.safetensors"
    federated = load_file(path)["model"]
    network = study.network.model_copy(update={"trained": "head"})
    tuning = study.model_copy(update={"network": network, "strategy": Strategy()})
    sites: dict[str, Model] = {}
    total = ScoreHistogram.empty(len(study.task.targets), study.evaluation.bins)
    for name in study.participation.sites:
        net = networks.build(tuning)
        networks.load_vector(net, federated)
        _learn(net, _cohort(rehearsed, outcome, name, "train"), tuning, 1)
        part = study.participation.model_copy(update={"sites": [name], "evaluate_only": [], "quorum": 1})
        alone = _tested(study.model_copy(update={"participation": part}), "personalised")
        found = simulation.evaluated(alone, networks.to_vector(net), outcome)
        sites[name] = model_of("personalised", None, found, rehearsed)
        if found["test"] is not None:
            total += ScoreHistogram.from_json(found["test"]["counts"])
    whole = total if not study.participation.evaluate_only else None
    results = {
        target: Tested(
            sites={s: sites[s].results[target].sites[s] if s in sites else None for s in rehearsed.all_sites},
            pooled=_pooled(whole, number),
        )
        for number, target in enumerate(study.task.targets)
    }
    return Model(kind="personalised", site=None, note=NOTES["personalised"], results=results)


def _learn(net: torch.nn.Module, cohort: Any, study: Study, number: int) -> None:
    """One round of the study's local loop, with its differential privacy if it has one; `net` is changed."""
    if study.privacy == "none":
        rows: TrainingCohort = cohort
        learning.learn(net, rows, study, round_number=number)
        return
    learning.learn_privately(learning.engine_of(net, study), net, cohort, study, Turn(number, cohort.public_size))
