"""Events as values, and what may be said of an ε: tiers, who is honest in a sum, and what a study makes of both."""

import json
import math
from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from models.study import Study, parse
from privacy.accounting import (
    PrivacyEvent,
    Sites,
    Statement,
    epsilon,
    honest_following,
    honest_min,
    statements,
)
from privacy.errors import MessageMalformed, PrivacyError, SamplingRefused, StudyConflict
from privacy.sharing import degree, threshold

DELTA = 1e-5
RATE, STEPS = 0.032, 1562  # 50 passes over 2000 patients, 64 a step
USUAL = PrivacyEvent(1.0, RATE, STEPS)


# Events as values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", ["shuffled", "fixed-size", "Poisson", "", "balanced", None, 1, ["poisson"]])
def test_batches_that_are_not_drawn_by_poisson_sampling_are_refused(sampling: Any) -> None:
    """Accounted for as Poisson, a shuffled loader at σ = 1 would be said to spend 8.4 where only 54 can be proven."""
    with pytest.raises(SamplingRefused):
        PrivacyEvent(1.0, RATE, STEPS, sampling=sampling)
    with pytest.raises(MessageMalformed):
        PrivacyEvent.from_json(USUAL.to_json() | {"sampling": sampling})


@pytest.mark.parametrize(
    "change",
    [{"unit": "image"}, {"unit": "site"}, {"relation": "replace-one"}, {"relation": "zero-out"}, {"unit": None}],
)
def test_units_and_relations_that_epsilon_would_not_be_about_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(PrivacyError):
        replace(USUAL, **change)


@settings(max_examples=60)
@given(
    st.floats(0.05, 10_000),
    st.floats(1e-300, 1),
    st.integers(1, 10**8),
    st.none() | st.tuples(st.integers(1, 10**9), st.integers(1, 10**9)),
    st.floats(0, 1),
)
def test_an_event_comes_back_from_json(
    noise: float, rate: float, steps: int, cap: tuple[int, int] | None, error: float
) -> None:
    event = PrivacyEvent(noise, rate, steps, *(cap or (None, None)), delta_extra=error)
    assert PrivacyEvent.from_json(json.loads(json.dumps(event.to_json()))) == event
    assert event.to_json() == asdict(event)


BAD = [
    *[{"noise_multiplier": x} for x in (0, 0.049, -1, 1e5, math.nan, math.inf, True, "1", None, [1], {}, 10**400)],
    *[{"sampling_rate": x} for x in (0, 0.0, -0.1, 1.0001, math.nan, True, "0.1", None, 1e400, -0.0)],
    *[{"steps": x} for x in (0, -1, 1.0, 1.5, True, "1", None, 10**8 + 1, 10**400, math.nan)],
    *[{"delta_extra": x} for x in (-1e-30, 1.1, math.nan, False, "0", None)],
    *[{"batch_max": x} for x in (5, 0, -1)],
    *[{"patients": x} for x in (5, 0)],
    *[{"batch_max": 5, "patients": x} for x in (0, -1, 5.0, True, "5", 10**9 + 1, 10**400)],
    *[{"patients": 5, "batch_max": x} for x in (0, -1, 5.0, True, "5", 10**400)],
    {"more": 1},
    {7: 1},
]


@pytest.mark.parametrize("change", BAD, ids=lambda change: repr(change)[:40])
def test_json_of_what_cannot_have_happened_is_malformed(change: dict[str, Any]) -> None:
    with pytest.raises(MessageMalformed):
        PrivacyEvent.from_json(USUAL.to_json() | change)
    if all(isinstance(key, str) and key != "more" for key in change):
        with pytest.raises(PrivacyError):
            replace(USUAL, **change)


@pytest.mark.parametrize("facts", [None, 1, "event", [], [USUAL.to_json()], {}, True])
def test_json_that_is_no_event_is_malformed(facts: object) -> None:
    with pytest.raises(MessageMalformed):
        PrivacyEvent.from_json(facts)
    with pytest.raises(MessageMalformed):
        PrivacyEvent.from_json(USUAL.to_json() | {"steps": 10**5000})
    for name in USUAL.to_json():
        less = {key: value for key, value in USUAL.to_json().items() if key != name}
        with pytest.raises(MessageMalformed):
            PrivacyEvent.from_json(less)


# Statements, and who is honest in a sum ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sites", "colluding", "expected"),
    [
        (5, 0, 2.48), (5, 1, 2.86), (5, 2, 3.47),
        (10, 0, 1.62), (10, 1, 1.73), (10, 3, 2.01), (10, 5, 2.48), (10, 9, 8.41),
        (20, 0, 1.09), (20, 1, 1.12), (20, 6, 1.34), (20, 10, 1.62), (20, 19, 8.41),
    ],
)  # fmt: skip
def test_known_figures_of_distributed_noise(sites: int, colluding: int, expected: float) -> None:
    """σ = 1 at each site, 1562 steps at 0.032, nobody drops out; N - t noises protect, the patient's own site among them."""
    _, coordinator, _ = statements(USUAL, DELTA, Sites(sites, sites, colluding), fine=False)
    assert coordinator.epsilon == pytest.approx(expected, abs=0.02)
    honest = sites - colluding if colluding < threshold(sites) else 1
    assert coordinator.epsilon == epsilon([replace(USUAL, noise_multiplier=math.sqrt(honest))], DELTA)


def test_each_tier_is_the_epsilon_of_the_honest_noise_and_none_is_below_the_next() -> None:
    event, sites = PrivacyEvent(2.0, 0.25, 100, delta_extra=1e-25), Sites(10, 8, 1)
    found = statements(event, DELTA, sites)
    assert [statement.tier for statement in found] == ["everybody", "coordinator", "lying-coordinator"]
    for statement, honest in zip(found, (1, 7, 6), strict=True):
        summed = PrivacyEvent(2.0 * math.sqrt(honest), 0.25, 100, delta_extra=1e-25)
        assert statement.epsilon == epsilon([summed], DELTA, fine=True)
        assert statement.epsilon <= epsilon([summed], DELTA)
    assert found[0].epsilon > found[2].epsilon > found[1].epsilon
    assert statements(event, DELTA) == found[:1]
    assert statements(event, DELTA, sites, fine=False)[0].epsilon == epsilon([event], DELTA)


def test_a_cap_and_errors_are_part_of_every_tier() -> None:
    plain, sites = PrivacyEvent(2.0, 0.25, 50), Sites(4, 4, 1)
    capped = replace(plain, batch_max=55, patients=200)
    for with_cap, without in zip(
        statements(capped, DELTA, sites, fine=False), statements(plain, DELTA, sites, fine=False), strict=True
    ):
        assert with_cap.epsilon > without.epsilon + 1e-3
        assert "at most 55 of 200" in with_cap.sentence()
    _, off, _ = statements(replace(plain, delta_extra=1e-8), DELTA, Sites(4, 4, 0), fine=False)
    summed = PrivacyEvent(4.0, 0.25, 50, delta_extra=4e-8)
    assert off.epsilon == epsilon([summed], DELTA) > epsilon([replace(summed, delta_extra=1e-8)], DELTA)


def test_the_most_noise_there_is_stays_in_range_when_sites_add_it_up() -> None:
    event = PrivacyEvent(9000.0, 1.0, 10)
    assert all(math.isfinite(statement.epsilon) for statement in statements(event, DELTA, Sites(10, 10, 0)))


@pytest.mark.parametrize("count", [3, 4, 7, 10, 20, 50, 60, 200])
def test_nothing_is_credited_where_as_many_collude_as_are_honest_or_open_a_secret(count: int) -> None:
    """Pitfall 8: colluding sites' noise, and an honest coordinator's promise to sites that can be read by their peers."""
    for quorum in {max(1, count // 2), count - 1, count}:
        for colluding in range(count + 5):
            sites = Sites(count, quorum, colluding)
            kind, worst = honest_following(sites), honest_min(sites)
            assert 1 <= worst <= kind <= max(1, quorum - colluding)
            if colluding >= quorum - 1 or colluding >= threshold(degree(quorum) + 1):
                assert kind == worst == 1
            assert honest_min(Sites(count, quorum, colluding + 1)) <= worst


def test_without_anybody_honest_beside_oneself_all_tiers_are_the_own_noise() -> None:
    for colluding in (7, 8, 9, 10, 50):
        own, coordinator, lying = statements(USUAL, DELTA, Sites(10, 10, colluding), fine=False)
        assert own.epsilon == coordinator.epsilon == lying.epsilon


def left_out_at_most(members: int, colluding: int, least: int) -> int:
    """How many of the honest sites a lying coordinator can leave out of a sum, by carrying the lies out.

    Leaving a site out takes threshold - colluding shares from other honest sites, and each site believes in at most
    members - least drop-outs, one share for each. Nobody is told of the own drop-out. If some honest sites can be told that
    one dropped out, and enough others, itself among them, that it did not, that one is read alone.
    """
    needed, honest = threshold(members) - colluding, members - colluding
    if least < members and any(needed <= told <= honest - needed for told in range(honest)):
        return honest - 1
    best = 0
    for left_out in range(1, honest):
        # Greedy flow, always to those that lack most (Gale and Ryser): sites that stay may accuse all, others all but themselves.
        lacking = [needed] * left_out
        for accuser in range(honest):
            others = [victim for victim in range(left_out) if victim != accuser and lacking[victim] > 0]
            for victim in sorted(others, key=lambda v: -lacking[v])[: members - least]:
                lacking[victim] -= 1
        if not any(lacking):
            best = left_out
    return best


@pytest.mark.parametrize("count", range(3, 21))
def test_a_lying_coordinator_cannot_leave_out_more_than_is_counted(count: int) -> None:
    for quorum in range(2, count + 1):
        for colluding in range(threshold(quorum)):
            possible = min(
                members - colluding - left_out_at_most(members, colluding, max(threshold(members), quorum))
                for members in range(quorum, count + 1)
            )
            counted = honest_min(Sites(count, quorum, colluding))
            assert counted <= max(1, possible)
            assert counted >= possible - 2, "and the count is not far from what is possible"


@pytest.mark.parametrize(
    ("members", "colluding", "any_quorum", "high_quorum"),
    [
        (4, 0, 3, 3), (4, 1, 2, 2), (7, 0, 5, 6), (7, 1, 3, 5), (7, 2, 2, 4), (10, 0, 6, 9), (10, 1, 5, 8), (10, 3, 2, 6),
        (20, 0, 12, 19), (20, 1, 11, 18), (20, 6, 4, 13), (50, 0, 27, 49), (50, 1, 26, 48), (50, 16, 4, 33),
    ],
)  # fmt: skip
def test_the_table_of_the_documentation_is_what_is_counted(
    members: int, colluding: int, any_quorum: int, high_quorum: int
) -> None:
    """For a sum of that many members; `quorum` also bounds from below how many members a sum has."""

    def least(quorum: int) -> int:
        t, m = threshold(members), max(threshold(members), quorum)
        return members - colluding - (members - colluding) * (members - m) // (t - colluding)

    assert (least(1), least(members - 1)) == (any_quorum, high_quorum)
    for quorum in (threshold(members), members - 1):
        assert honest_min(Sites(members, quorum, colluding)) <= least(quorum)
    assert honest_min(Sites(members, members, colluding)) == members - colluding


def test_beyond_fifty_sites_more_than_a_tenth_colluding_protect_nobody() -> None:
    assert honest_min(Sites(60, 55, 6)) == 1, "a sum may have 55 members, of whom 5 are a tenth"
    assert honest_following(Sites(60, 60, 6)) == 54 and 1 < honest_min(Sites(60, 60, 6)) <= 54
    assert honest_following(Sites(60, 60, 7)) == honest_min(Sites(60, 60, 7)) == 1
    assert 1 < honest_min(Sites(60, 50, 5)) < honest_min(Sites(60, 58, 5))


@pytest.mark.parametrize(
    ("count", "quorum", "colluding"), [(3, 4, 0), (3, 0, 0), (0, 0, 0), (3, 3, -1), (1001, 3, 0), (-1, -1, 0)]
)
def test_sites_that_no_sum_can_have_are_refused(count: int, quorum: int, colluding: int) -> None:
    with pytest.raises(PrivacyError):
        Sites(count, quorum, colluding)


@pytest.mark.parametrize("sites", [None, Sites(10, 8, 2), Sites(10, 8, 0)])
def test_a_sentence_names_all_that_epsilon_means_nothing_without(sites: Sites | None) -> None:
    """Pitfall 13: unit, relation, δ, sampling and adversary beside every ε."""
    for statement in statements(PrivacyEvent(2.0, 0.25, 10), 1e-6, sites, fine=False):
        text = statement.sentence()
        assert text.startswith(f"ε ≤ {math.ceil(statement.epsilon * 100) / 100:.2f} at δ = 1e-06 per patient ")
        assert "(add or remove one patient)" in text
        assert "Poisson sampling at the rate 0.25, 10 steps" in text
        assert text.endswith(f"against {statement.adversary}") and "coordinator" in statement.adversary
        if sites and sites.colluding and statement.tier != "everybody":
            assert "2 of the 10 sites" in text
        facts = statement.to_json()
        assert all(facts[key] for key in ("tier", "epsilon", "delta", "sampling", "adversary", "unit", "relation"))
        json.dumps(facts, allow_nan=False)


@settings(max_examples=200)
@given(st.floats(0, 1e4))
@example(1.62)
@example(8.4082)
@example(math.nextafter(8.4, 9))
def test_an_epsilon_in_words_is_rounded_up_and_by_no_more_than_a_hundredth(spent: float) -> None:
    said = Statement("everybody", spent, DELTA, "Poisson sampling", "everybody").sentence()
    shown = float(said.removeprefix("ε ≤ ").split(" ")[0])
    assert spent * (1 - 1e-15) <= shown < spent + 0.01 + 1e-9


def test_without_a_bound_a_sentence_claims_none() -> None:
    endless = Statement("everybody", math.inf, DELTA, "Poisson sampling", "everybody")
    assert "no finite ε" in endless.sentence() and "≤" not in endless.sentence()
    assert endless.to_json()["epsilon"] is None
    json.dumps(endless.to_json(), allow_nan=False)


# From a study ---------------------------------------------------------------------------------------------------------

STUDY = """
name: private
title: Private
purpose: A test.
task: {targets: [opacity]}
training: {rounds: 10, balance: false}
privacy: {mode: distributed, epsilon: 4, clip_norm: 1.0, sampling_rate: 0.032, steps: 1, spare_rounds: 3}
strategy: {name: fedsgd}
participation: {sites: [a, b, c, d, e], quorum: 4}
"""


def test_a_study_is_accounted_for_with_the_rate_that_it_names_and_all_its_rounds() -> None:
    """Pitfall 2: a rate of 1 / 32 for 0.032, rounds that failed or are spare left out."""
    study = parse(Study, STUDY, "study.yaml").with_noise()
    event = study.event(study.budgeted_rounds)
    assert (event.sampling_rate, event.steps) == (0.032, 13)
    assert epsilon([event], DELTA) > epsilon([replace(event, sampling_rate=1 / 32)], DELTA)
    assert 0.99 * 4 < study.statements()[0].epsilon <= 4


def test_noise_of_other_sites_is_credited_to_single_steps_under_masks_only() -> None:
    """Pitfall 8: what a study may not ask for, and that it gets one tier only with local steps."""
    parse(Study, STUDY, "study.yaml").check()
    for before, after in (
        ("steps: 1", "steps: 2"),
        ("strategy: {name: fedsgd}", "strategy: {name: fedavg}"),
        ("strategy: {name: fedsgd}", "strategy: {name: fedsgd}\nprotection: sealed"),
        ("steps: 1", "steps: 1, colluding: 4"),
        ("strategy: {name: fedsgd}", "strategy: {name: fedsgd}\nencoding_bits: 24"),
    ):
        with pytest.raises(StudyConflict):
            parse(Study, STUDY.replace(before, after), "study.yaml").check()
    local = STUDY.replace("mode: distributed", "mode: local").replace("name: fedsgd", "name: fedavg")
    several = parse(Study, local.replace("steps: 1", "steps: 5"), "study.yaml").with_noise()
    assert [statement.tier for statement in several.statements()] == ["everybody"]
    assert several.event(1).steps == 5
