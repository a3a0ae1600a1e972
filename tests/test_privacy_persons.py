"""Persons: who is known again, and what the one who took part in most has spent.

Oracles: connected components by repeated merging of sets, dp-accounting called directly on the events of one person, and the
mixture of Gaussians for somebody who was counted as several patients.
"""

import hashlib
import math

import pytest
from dp_accounting import NeighboringRelation, dp_event
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy import accounting, persons
from privacy.accounting import COARSE, PrivacyEvent
from privacy.errors import PrivacyError
from privacy.persons import EVERYBODY, Cohort, Register, within, worst

DELTA = 1e-5
EVENT = PrivacyEvent(2.0, 0.1, 4)
OTHER = PrivacyEvent(1.5, 0.2, 3)


def registered(*cohorts: list[set[str]]) -> tuple[Register, list[str]]:
    register, names = Register(), []
    for patients in cohorts:
        cohort = Cohort.of(patients)
        register.add(cohort)
        names.append(cohort.name)
    return register, names


def direct(*events: dp_event.DpEvent) -> float:
    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, COARSE)
    for event in events:
        accountant.compose(event)
    return float(accountant.get_epsilon(DELTA))


def as_dp_event(event: PrivacyEvent) -> dp_event.DpEvent:
    step = dp_event.PoissonSampledDpEvent(event.sampling_rate, dp_event.GaussianDpEvent(event.noise_multiplier))
    return dp_event.SelfComposedDpEvent(step, event.steps)


def test_a_cohort_is_known_by_its_patients_in_whatever_order() -> None:
    """Oracle: the two hashes computed from the documentation alone."""
    cohort = Cohort.of([{"bb", "aa"}, {"cc"}])
    digests = sorted(hashlib.sha256(b"isocenter/v1/ledger-patient\n" + own).hexdigest() for own in (b"aa bb", b"cc"))
    assert cohort.name == hashlib.sha256(b"isocenter/v1/ledger-cohort\n" + " ".join(digests).encode()).hexdigest()
    assert cohort == Cohort.of([{"cc"}, {"aa", "bb"}])
    assert cohort.name != Cohort.of([{"cc", "aa"}, {"bb"}]).name


@pytest.mark.parametrize(
    "patients", [[], [set()], [{"aa"}, set()], [{"AA"}], [{"a a"}], [{"aa\nbb"}], [{""}], [{"Smith"}]]
)
def test_patients_without_a_digest_are_refused_without_being_quoted(patients: list[set[str]]) -> None:
    with pytest.raises(PrivacyError) as caught:
        Cohort.of(patients)
    assert "Smith" not in str(caught.value)


_identities = st.sets(st.integers(0, 9).map("{:02x}".format), min_size=1, max_size=3)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(_identities, min_size=1, max_size=4), min_size=1, max_size=4))
def test_whoever_shares_an_identity_is_one_person_however_long_the_chain(cohorts: list[list[set[str]]]) -> None:
    """Oracle: sets of patients merged until none of them overlap."""
    register, names = registered(*cohorts)
    groups: list[tuple[set[str], list[str]]] = []
    known: set[str] = set()
    for name, patients in zip(names, cohorts, strict=True):
        if name in known:  # the same patients in another order are the same cohort
            continue
        known.add(name)
        for own in patients:
            touching = [group for group in groups if group[0] & own]
            merged = (set().union(own, *(group[0] for group in touching)), [name])
            merged[1].extend(part for group in touching for part in group[1])
            groups = [group for group in groups if group not in touching] + [merged]
    expected = {
        frozenset([(EVERYBODY, 1), *((name, n + 1) for name in set(part) for n in range(part.count(name)))])
        for _, part in groups
    }
    assert register.profiles() == expected | {frozenset([(EVERYBODY, 1)])}
    for name in names:
        assert register.profiles(name) == {profile for profile in expected if (name, 1) in profile}


def test_the_most_charged_person_decides() -> None:
    """Oracle: dp-accounting on the events of each person; the second took part twice."""
    register, (first, second) = registered([{"01"}, {"02"}], [{"02"}, {"03"}])
    happened = [(first, EVENT), (second, OTHER)]
    assert worst(happened, register.profiles(), DELTA) == pytest.approx(
        direct(*map(as_dp_event, (EVENT, OTHER))), abs=1e-6
    )
    only_third = {profile for profile in register.profiles() if (first, 1) not in profile}
    assert worst(happened, only_third, DELTA) == pytest.approx(direct(as_dp_event(OTHER)), abs=1e-6)
    assert worst([], register.profiles(), DELTA) == 0


def test_a_cap_holds_for_each_of_those_who_took_part_in_different_things() -> None:
    register, (first, second, third) = registered([{"01"}], [{"02"}], [{"01"}, {"02"}])
    dear = PrivacyEvent(1.0, 0.2, 20)
    happened = [(first, EVENT), (second, dear), (third, OTHER)]
    cap = direct(*map(as_dp_event, (dear, OTHER)))
    for order in (happened, happened[::-1], [(first, dear), (second, EVENT), (third, OTHER)]):
        assert within(cap + 1e-3, order, register.profiles(third), DELTA)
        assert not within(cap - 1e-3, order, register.profiles(third), DELTA)


def test_charges_of_everybody_are_composed_with_those_of_each() -> None:
    register, (name,) = registered([{"01"}])
    happened = [(EVERYBODY, OTHER), (name, EVENT)]
    expected = direct(as_dp_event(EVENT), as_dp_event(OTHER))
    assert worst(happened, register.profiles(name), DELTA) == pytest.approx(expected, abs=1e-6)
    assert worst([(EVERYBODY, OTHER)], Register().profiles(), DELTA) == pytest.approx(
        direct(as_dp_event(OTHER)), abs=1e-6
    )


@pytest.mark.parametrize("patients", [2, 3])
def test_one_person_counted_as_several_patients_has_spent_at_least_the_mixture_of_gaussians(patients: int) -> None:
    """Oracle: dp-accounting's exact group event, sensitivity j with the probability of drawing j of the k patients."""
    event, rate = PrivacyEvent(3.0, 0.1, 2), 0.1
    register, (name,) = registered([{"00", f"{n:02x}"} for n in range(1, patients + 1)])
    chances = [math.comb(patients, j) * rate**j * (1 - rate) ** (patients - j) for j in range(patients + 1)]
    mixture = dp_event.MixtureOfGaussiansDpEvent(3.0, list(range(patients + 1)), chances)
    exact = direct(dp_event.SelfComposedDpEvent(mixture, event.steps))
    assert worst([(name, event)], register.profiles(), DELTA) >= exact - 1e-3 > accounting.epsilon([event], DELTA)
    assert persons._grouped(event, patients).sampling_rate == pytest.approx(1 - chances[0])
    every_time = PrivacyEvent(3.0, 1.0, 2)
    summed = direct(dp_event.SelfComposedDpEvent(dp_event.GaussianDpEvent(3.0 / patients), 2))
    assert worst([(name, every_time)], register.profiles(), DELTA) == pytest.approx(summed, abs=1e-6)


def test_a_capped_batch_costs_the_person_counted_twice_the_chance_of_a_full_one() -> None:
    capped = PrivacyEvent(3.0, 0.1, 5, batch_max=60, patients=200, delta_extra=1e-9)
    grouped = persons._grouped(capped, 2)
    assert grouped.batch_max is None
    assert grouped.delta_extra == pytest.approx(1e-9 + 5 * accounting.overflow(202, 0.1, 60))
    assert persons._grouped(capped, 1) is capped
    register, (name,) = registered([{"00", "01"}, {"00", "02"}])
    tight = PrivacyEvent(3.0, 0.1, 5, batch_max=21, patients=200)
    assert worst([(name, tight)], register.profiles(), DELTA) == math.inf


def test_what_cannot_be_accounted_for_is_without_bound_and_never_within_a_cap() -> None:
    register, (name,) = registered([{"01"}])
    profiles = register.profiles()
    used_up = PrivacyEvent(2.0, 0.1, 4, delta_extra=DELTA)
    assert worst([(name, used_up)], profiles, DELTA) == math.inf
    assert not within(1e9, [(name, used_up)], profiles, DELTA)
    assert not within(math.nan, [(name, EVENT)], profiles, DELTA)
    endless = PrivacyEvent(2.0, 0.1, 10**8)
    assert not within(1e9, [(name, endless), (name, endless)], profiles, DELTA)
    for delta in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(PrivacyError):
            worst([(name, EVENT)], profiles, delta)


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([EVENT, OTHER]), st.integers(1, 60)), min_size=1, max_size=4))
def test_a_cap_holds_to_the_last_step(parts: list[tuple[PrivacyEvent, int]]) -> None:
    """The short cut by rounding up may never say yes to more, nor cost a single step."""
    register, (name,) = registered([{"01"}, {"02"}])
    happened = [(name, PrivacyEvent(e.noise_multiplier, e.sampling_rate, steps)) for e, steps in parts]
    exact = accounting.epsilon([event for _, event in happened], DELTA)
    assert within(exact, happened, register.profiles(), DELTA)
    assert within(exact * 2, happened, register.profiles(), DELTA)
    assert not within(exact * 0.999, happened, register.profiles(), DELTA)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([EVENT, OTHER]), st.integers(1, 10**6), st.floats(0, 1e-6)), min_size=1))
def test_rounding_up_costs_no_less_and_little_more(parts: list[tuple[PrivacyEvent, int, float]]) -> None:
    events = [PrivacyEvent(e.noise_multiplier, e.sampling_rate, n, delta_extra=x) for e, n, x in parts]
    rounded = {event.noise_multiplier: event for event in persons._rounded_up(events)}
    for noise, event in rounded.items():
        steps = sum(own.steps for own in events if own.noise_multiplier == noise)
        extra = sum(own.delta_extra for own in events if own.noise_multiplier == noise)
        assert steps <= event.steps <= steps * 1.125
        assert extra <= event.delta_extra <= max(2 * extra, 1e-300)
    assert len(rounded) == len({event.noise_multiplier for event in events})


def test_most_orders_of_a_study_ask_accounting_nothing_new(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = set()

    def epsilon(events: object, delta: float) -> float:
        asked.add(tuple(events))  # type: ignore[call-overload]
        return 1.0

    monkeypatch.setattr(accounting, "epsilon", epsilon)
    register, (name,) = registered([{"01"}])
    order = PrivacyEvent(2.0, 0.1, 1, delta_extra=1e-15)
    for orders in range(1, 2001):
        assert within(2.0, [(name, order)] * orders, register.profiles(), DELTA)
    assert len(asked) < 100


def test_very_many_different_persons_are_taken_as_one_who_has_it_all() -> None:
    """Twenty cohorts, each patient in all but one of them: as many candidates as cohorts."""
    everyone = [{f"{n:02x}"} for n in range(20)]
    cohorts = [everyone[:n] + everyone[n + 1 :] for n in range(20)]
    register, names = registered(*cohorts)
    happened = [(name, EVENT) for name in names]
    assert len(register.profiles()) == 21
    assert worst(happened, register.profiles(), DELTA) == pytest.approx(accounting.epsilon([EVENT] * 20, DELTA))
    few = happened[: persons.PROFILES_MAX - 1]
    assert worst(few, register.profiles(), DELTA) == pytest.approx(accounting.epsilon([EVENT] * len(few), DELTA))
