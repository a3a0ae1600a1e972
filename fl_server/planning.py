"""What a private study will cost, and what it would buy to change it, before anybody is asked: `fl-study plan`.

Signal to noise is that of the run's whole movement along the direction in which patients agree: T steps of N sites with q * n
patients each add N * T * q * n clipped gradients, and their noise grows with the square root. The gradients of patients agree
only in part, so the figure is an upper bound; what can be trusted is its ratio between two plans of the same network and images.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from models.study import Privacy, Study
from privacy import accounting
from privacy.errors import PrivacyError, StudyConflict

TRIES = 10  # settings that somebody would try on private data; what that costs is said beside the plan


@dataclass(frozen=True)
class Option:
    """One way to carry the study out. `drawn`: expected patients in a step, all sites; `coordinator`: ε of the middle tier."""

    name: str
    rounds: int
    steps: int
    sites: int
    drawn: float
    noise: float
    everybody: float
    coordinator: float
    signal_to_noise: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Plan:
    """The study as written first, then what else could be done; `tuning` = ε of (ten naive tries, ten private ones)."""

    options: list[Option]
    delta: float
    tuning: tuple[float, float]
    warnings: list[str]

    def to_json(self) -> dict[str, Any]:
        found = asdict(self) | {"unit": "patient", "relation": "add or remove one patient", "sampling": "Poisson"}
        return found | {"tuning": {"tries": TRIES, "naive": self.tuning[0], "private_selection": self.tuning[1]}}


def plan(study: Study, patients: Mapping[str, int]) -> Plan:
    """The plan of a private `study`; `patients`: training patients of each site, for sites that are known.

    Raises StudyConflict for a study without differential privacy, or for sites that it does not name.
    """
    if study.privacy == "none":
        raise StudyConflict("privacy: none has no ε to plan", remedy="Write settings under `privacy:` first.")
    if unknown := set(patients) - set(study.participation.sites):
        raise StudyConflict(f"the study trains at no site called {', '.join(sorted(unknown))}")
    sizes = list(patients.values()) or [study.participation.minimum_patients]
    mean = sum(sizes) / len(sizes)
    options = [_option(name, changed, mean) for name, changed in _changes(study, study.privacy)]
    event = study.with_noise().event(study.training.rounds)
    delta = study.privacy.delta
    naive = accounting.epsilon([event] * TRIES, delta)
    return Plan(options, delta, (naive, accounting.selection_epsilon(event, delta, TRIES)), _warnings(study, sizes))


def _changes(study: Study, privacy: Privacy) -> Iterator[tuple[str, Study]]:
    """(what is changed, the study with that change), each with the noise that keeps ε; those that make sense."""
    own = {"noise_multiplier": privacy.noise_multiplier}
    yield "as written", _with(study, own)
    fresh: dict[str, Any] = {"noise_multiplier": None}
    if privacy.sampling_rate < 1:
        yield (
            "2 x patients a step",
            _with(study, fresh | {"sampling_rate": min(1.0, 2 * privacy.sampling_rate)}),
        )
        yield "all patients a step", _with(study, fresh | {"sampling_rate": 1.0})
    rounds = study.training.rounds
    if rounds > 1:
        yield "half the rounds", _with(study, fresh, rounds=max(1, rounds // 2))
    yield "twice the rounds", _with(study, fresh, rounds=2 * rounds)
    yield "half the ε", _with(study, fresh | {"epsilon": privacy.epsilon / 2})
    part = study.participation
    doubled = [*part.sites, *(f"another-{number}" for number in range(len(part.sites)))]
    sample = None if part.sample is None else 2 * part.sample
    more = part.model_copy(update={"sites": doubled, "quorum": 2 * part.quorum, "sample": sample})
    yield "twice the sites", _with(study, fresh).model_copy(update={"participation": more, "roster": {}})
    if privacy.mode == "local":
        steps = privacy.steps * rounds
        yield (
            "distributed noise",
            _with(study, fresh | {"mode": "distributed", "steps": 1}, rounds=steps),
        )


def _with(study: Study, privacy: Mapping[str, Any], rounds: int | None = None) -> Study:
    """`study` with other settings, and the least noise that keeps its ε where none is given."""
    if study.privacy == "none":
        raise PrivacyError("the study asks for no differential privacy")
    changed: dict[str, Any] = {"privacy": study.privacy.model_copy(update=dict(privacy))}
    if rounds is not None:
        changed["training"] = study.training.model_copy(update={"rounds": rounds})
    return study.model_copy(update=changed).with_noise()


def _option(name: str, study: Study, patients: float) -> Option:
    plan, part = study.privacy, study.participation
    if plan == "none" or plan.noise_multiplier is None:
        raise PrivacyError("a plan without noise")
    said = {statement.tier: statement.epsilon for statement in study.statements()}
    sites, steps = len(part.sites), plan.steps * study.training.rounds
    drawn = patients * plan.sampling_rate
    ratio = math.sqrt(steps * sites) * drawn / plan.noise_multiplier
    return Option(
        name=name,
        rounds=study.training.rounds,
        steps=plan.steps,
        sites=sites,
        drawn=drawn * sites,
        noise=plan.noise_multiplier,
        everybody=said["everybody"],
        coordinator=said.get("coordinator", said["everybody"]),
        signal_to_noise=ratio,
    )


def _warnings(study: Study, sizes: list[int]) -> list[str]:
    """What makes this plan a bad one, in sentences."""
    plan = study.privacy
    if plan == "none":
        return []
    found: list[str] = []
    drawn = plan.sampling_rate * min(sizes)
    if plan.delta * max(sizes) >= 1:
        found.append(f"δ = {plan.delta:g} is not below 1 / {max(sizes)} patients: sites will refuse the study")
    if drawn < 5:
        found.append(
            f"the smallest site draws {drawn:.1f} patients a step on average: most of its steps are little more than noise"
        )
    if plan.epsilon > 10:
        found.append(
            f"an ε of {plan.epsilon:g} is more than most sites permit (8 for one study unless site.yaml says else)"
        )
    return found
