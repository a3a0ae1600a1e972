"""Who took part in what, and ε of whoever took part in most: persons are charged, not folders, studies or patient numbers.

A cohort is the set of its patients, each with several identities (number, images). Patients who share one are the same person, in
whatever cohort and through however many others. So a cohort that was copied, renamed, cut or completed is no new one, and two
numbers that turn out to be one person have spent together what both have. Somebody whose number and images are all new is a new
person here; nothing in a hospital's data says otherwise.
"""

import hashlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from privacy import accounting
from privacy.accounting import PrivacyEvent
from privacy.errors import PrivacyError

PATIENT_LABEL = b"isocenter/v1/ledger-patient\n"
COHORT_LABEL = b"isocenter/v1/ledger-cohort\n"
EVERYBODY = "*"  # the cohort of charges whose patients are not known any more
PROFILES_MAX = 16  # that are asked about one by one, up to a second each; studies whose patients overlap have fewer
_IDENTITY = re.compile(r"[0-9a-f]{2,128}")

Profile = frozenset[tuple[str, int]]
"""One person: (cohort, 1), with (cohort, 2) and so on for a cohort in which this person was counted as several patients."""

Happened = Sequence[tuple[str, PrivacyEvent]]
"""Events, each with the cohort that it happened to."""


@dataclass(frozen=True)
class Cohort:
    """Patients by their digests, in order, with the identities behind each; its name is a hash of them all."""

    name: str
    digests: tuple[str, ...]
    identities: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, patients: Iterable[Iterable[str]]) -> "Cohort":
        """Raises PrivacyError for no patients, or one without identities, or identities that are no hex digests."""
        found = [tuple(sorted(identities)) for identities in patients]
        if not found or not all(found):
            raise PrivacyError("a charge needs patients, and each needs an identity")
        if not all(_IDENTITY.fullmatch(identity) for identities in found for identity in identities):
            raise PrivacyError("an identity of a patient is not a lower-case hex digest")
        named = [(digest_of(identities), identities) for identities in found]
        digests = tuple(sorted(digest for digest, _ in named))
        return cls(name_of(digests), digests, dict(named))


@dataclass
class Register:
    """Who took part in what: the cohorts by name, and the identities of all their patients by digest."""

    cohorts: dict[str, Cohort] = field(default_factory=dict)
    identities: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def add(self, cohort: Cohort) -> None:
        self.cohorts[cohort.name] = cohort
        self.identities.update(cohort.identities)

    def profiles(self, among: str | None = None) -> set[Profile]:
        """In what each person took part, of all persons or of those in the cohort `among`; everybody is in EVERYBODY."""
        above: dict[str, str] = {}

        def top(identity: str) -> str:
            while (parent := above.setdefault(identity, identity)) != identity:
                above[identity] = identity = above[parent]
            return identity

        for first, *others in self.identities.values():
            for other in others:
                above[top(other)] = top(first)
        person = {digest: top(identities[0]) for digest, identities in self.identities.items()}
        parts: defaultdict[str, list[tuple[str, int]]] = defaultdict(list)
        for name, cohort in self.cohorts.items():
            met: Counter[str] = Counter()
            for digest in cohort.digests:
                met[person[digest]] += 1
                parts[person[digest]].append((name, met[person[digest]]))
        own = {frozenset([(EVERYBODY, 1), *part]) for part in parts.values()}
        return {frozenset([(EVERYBODY, 1)]), *own} if among is None else {part for part in own if (among, 1) in part}


def worst(happened: Happened, profiles: Set[Profile], delta: float) -> float:
    """ε of the person to whom most of `happened` happened."""
    greatest = _greatest(profiles, happened)
    return max((_epsilon(_events(profile, happened), delta) for profile in greatest), default=0.0)


def within(cap: float, happened: Happened, profiles: Set[Profile], delta: float) -> bool:
    """Whether nobody's ε exceeds `cap`."""
    together = frozenset(part for profile in profiles for part in profile)
    # A person to whom all of this and a little more happened has no less than anybody; accounting has mostly answered it before.
    if _epsilon(_rounded_up(_events(together, happened)), delta) <= cap:
        return True
    return all(_epsilon(_events(profile, happened), delta) <= cap for profile in _greatest(profiles, happened))


def _greatest(profiles: Set[Profile], happened: Happened) -> list[Profile]:
    """Those profiles, as far as it matters to `happened`, that are not part of another: nobody else can have the largest ε.

    More than PROFILES_MAX of them are taken together as one person, to whom all of it happened: ε is overstated then.
    """
    met = {cohort for cohort, _ in happened}
    found: list[Profile] = []
    parts = {frozenset(part for part in profile if part[0] in met) for profile in profiles}
    for profile in sorted(parts, key=len, reverse=True):
        if not any(profile <= greater for greater in found):
            found.append(profile)
        if len(found) > PROFILES_MAX:
            return [frozenset(part for profile in parts for part in profile)]
    return found


def _events(profile: Profile, happened: Happened) -> Iterator[PrivacyEvent]:
    times = Counter(cohort for cohort, _ in profile)
    return (_grouped(event, times[cohort]) for cohort, event in happened if times[cohort])


def _grouped(event: PrivacyEvent, patients: int) -> PrivacyEvent:
    """No less than what `event` did to a person who was counted as so many of its `patients`.

    In a step none of them is drawn with probability (1 - q)^k; otherwise their clipped gradients together have at most k times
    the clip norm. Without the cap on a batch this is Poisson sampling of one patient at the rate 1 - (1 - q)^k under 1/k of the
    noise; the cap matters only in steps that draw more than it, and the probability of one goes into the event's error.
    """
    if patients == 1:
        return event
    rate = -math.expm1(patients * math.log1p(-event.sampling_rate)) if event.sampling_rate < 1 else 1.0
    error = event.delta_extra
    if event.capped:
        # The larger of two neighbouring sets counts, and the site may be either of them.
        most = (event.patients or 0) + patients
        error += event.steps * accounting.overflow(most, event.sampling_rate, event.batch_max or 0)
    return PrivacyEvent(event.noise_multiplier / patients, rate, event.steps, delta_extra=min(1.0, error))


def _rounded_up(events: Iterable[PrivacyEvent]) -> Iterator[PrivacyEvent]:
    """Events that cost no less and are the same for most orders: up to an eighth more steps, errors up to the next power of 2."""
    steps: Counter[tuple[Any, ...]] = Counter()
    errors: defaultdict[tuple[Any, ...], float] = defaultdict(float)
    for event in events:
        mechanism = (event.noise_multiplier, event.sampling_rate, event.batch_max, event.patients)
        steps[mechanism] += event.steps
        errors[mechanism] += event.delta_extra
    for (noise, rate, cap, patients), count in steps.items():
        unit = 1 << max(0, count.bit_length() - 4)
        error = errors[noise, rate, cap, patients]
        error = math.ldexp(1.0, math.frexp(error)[1]) if error else 0.0
        yield PrivacyEvent(noise, rate, -(-count // unit) * unit, cap, patients, delta_extra=min(1.0, error))


def _epsilon(events: Iterable[PrivacyEvent], delta: float) -> float:
    """Infinite for what nobody can account for, such as errors that have used δ up."""
    if not 0 < delta < 1:
        raise PrivacyError(f"a δ of {delta}; it is between 0 and 1")
    try:
        return accounting.epsilon(events, delta)
    except PrivacyError:
        return math.inf


def digest_of(identities: tuple[str, ...]) -> str:
    return hashlib.sha256(PATIENT_LABEL + " ".join(identities).encode()).hexdigest()


def name_of(digests: tuple[str, ...]) -> str:
    return hashlib.sha256(COHORT_LABEL + " ".join(digests).encode()).hexdigest()
