"""Strategies that a study cannot have: each contradiction gets a sentence that names the setting."""

import pytest

from models.sections import ROBUST, ROBUST_SITES_MAX, STRATEGY_PARAMETERS, Strategy
from models.study import Study, parse
from privacy.errors import DocumentError, StudyConflict

TEXT = """
name: s
title: t
purpose: p
task: {targets: [opacity]}
training: {rounds: 2, balance: false, optimizer: sgd}
"""
PRIVATE = "privacy: {epsilon: 8, clip_norm: 1, sampling_rate: 0.1, noise_multiplier: 10}\n"


def study(
    strategy: str, protection: str = "sealed", sites: int = 5, quorum: int | None = None, more: str = ""
) -> Study:
    text = f"{TEXT}strategy: {{{strategy}}}\nprotection: {protection}\n{more or 'privacy: none'}\n"
    named = ", ".join(f"site{i}" for i in range(sites))
    text += f"participation: {{sites: [{named}], quorum: {quorum or sites}}}\n"
    return parse(Study, text, "study.yaml")


@pytest.mark.parametrize("name", sorted(set(STRATEGY_PARAMETERS) - {"fedsgd"}))
@pytest.mark.parametrize("protection", ["masked", "sealed", "plain"])
def test_robust_strategies_and_no_others_are_refused_under_masks(name: str, protection: str) -> None:
    plan = study(f"name: {name}", protection)
    if name in ROBUST and protection == "masked":
        with pytest.raises(StudyConflict, match=f"strategy: {name} .* sums only"):
            plan.check()
    else:
        plan.check()


def test_every_parameter_has_its_strategies_and_is_refused_by_name_in_all_others() -> None:
    fields = set(Strategy.model_fields) - {"name"}
    assert {parameter for own in STRATEGY_PARAMETERS.values() for parameter in own} == fields
    values = {"byzantine": "1", "selected": "2"}
    for name, own in STRATEGY_PARAMETERS.items():
        for parameter in sorted(fields):
            plan = study(f"name: {name}, {parameter}: {values.get(parameter, '0.3')}")
            sentence = f"strategy.{parameter} has no use in {name}"
            try:
                plan.check()
            except StudyConflict as error:
                assert (sentence in str(error)) == (parameter not in own)
            else:
                assert parameter in own


def test_what_is_left_out_is_filled_in_and_signed() -> None:
    """Two studies that mean the same are one study, and no default can change under a signed study's feet."""
    for name, own in STRATEGY_PARAMETERS.items():
        short, long = study(f"name: {name}"), study(", ".join(f"{k}: {v}" for k, v in {"name": name, **own}.items()))
        assert short.strategy.parameters == own and short.digest == long.digest
        assert Study.from_canonical(short.canonical()) == short
    assert Strategy().parameters == {} and Strategy().name == "fedavg"
    assert study("name: fedadam, beta1: 0.5").strategy.beta1 == 0.5


@pytest.mark.parametrize(
    ("strategy", "quorum", "sentence"),
    [
        ("name: median", 2, "median leaves nobody out of a quorum of 2; it needs 3"),
        ("name: trimmed_mean", 3, "trimmed_mean leaves nobody out of a quorum of 3; it needs 4"),
        ("name: trimmed_mean, trimmed_share: 0.1", 9, "quorum of 9; it needs 10"),
        ("name: krum", 4, "krum withstands 1 hostile among 5 sites or more, and the quorum is 4"),
        ("name: krum, byzantine: 3", 8, "withstands 3 hostile among 9"),
        ("name: krum, selected: 3", 5, "krum can trust 2 of 5 updates, not 3"),
    ],
)
def test_a_robust_strategy_needs_a_quorum_that_it_can_leave_sites_out_of(
    strategy: str, quorum: int, sentence: str
) -> None:
    """What counts is the smallest sum that a round may rest on, not how many sites are named."""
    with pytest.raises(StudyConflict, match=sentence):
        study(strategy, sites=12, quorum=quorum).check()
    study(strategy, sites=12, quorum=quorum + 1).check()


def test_krum_of_one_update_is_refused_where_only_the_coordinator_may_see_it() -> None:
    with pytest.raises(StudyConflict, match=r"selected: 1 hands one site's update"):
        study("name: krum, selected: 1", "sealed").check()
    study("name: krum, selected: 1", "plain").check()


@pytest.mark.parametrize("name", ROBUST)
def test_updates_that_are_kept_in_memory_are_bounded(name: str) -> None:
    study(f"name: {name}", sites=ROBUST_SITES_MAX).check()
    with pytest.raises(StudyConflict, match=f"takes {ROBUST_SITES_MAX} sites at most"):
        study(f"name: {name}", sites=ROBUST_SITES_MAX + 1).check()


@pytest.mark.parametrize("name", sorted(STRATEGY_PARAMETERS))
def test_with_privacy_each_strategy_is_either_sound_or_refused(name: str) -> None:
    """Whatever is made of noisy updates is as private as they are. The proximal term is no part of a private step,
    and no noise covers a control variate, nor norm layers that stay where they learned."""
    local = study(f"name: {name}", "sealed", more=PRIVATE)
    if name in ("fedprox", "fedbn", "fedsgd", "scaffold"):
        with pytest.raises(StudyConflict, match=name):
            local.check()
    else:
        local.check()
    shared = study(f"name: {name}", "masked", more=PRIVATE.replace("epsilon", "mode: distributed, epsilon"))
    if name == "fedsgd":
        shared.check()
    else:
        with pytest.raises(StudyConflict, match="distributed and strategy: fedsgd belong together"):
            shared.check()


@pytest.mark.parametrize(
    "strategy",
    [
        "momentum: 1",
        "server_rate: 0",
        "tau: 0",
        "trimmed_share: 0.5",
        "byzantine: 0",
        "selected: 1.5",
        "proximal_mu: -1",
    ],
)
def test_a_parameter_out_of_its_range_is_an_error_that_names_it(strategy: str) -> None:
    with pytest.raises(DocumentError, match=strategy.partition(":")[0]):
        study(f"name: krum, {strategy}")


@pytest.mark.parametrize("name", ["[fedavg]", "{a: 1}", "3", "null", "fedsum"])
def test_a_name_that_is_none_is_an_error(name: str) -> None:
    with pytest.raises(DocumentError, match=r"strategy"):
        study(f"name: {name}")
