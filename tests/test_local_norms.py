"""Norm layers that stay at their sites: whole runs against the algorithm in numpy, and everything that may happen to them."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import Federation
from hospital import STUDY, Hospital
from test_round import before_commit_of, forgetful, killed
from test_strategy_round import models_of

from fl_client import norms
from fl_server import comparison, release
from fl_server.run import Run
from models import learning, networks, weights
from models.metrics import ScoreHistogram
from models.study import Study, parse
from privacy import wire
from privacy.errors import MessageMalformed, StudyConflict

SITES = ["north", "south", "east"]


def plan_of(protection: str = "plain", more: str = "") -> Study:
    text = STUDY.replace("[north, south], quorum: 2", f"[{', '.join(SITES)}], quorum: 3")
    text = text.replace("protection: plain", f"protection: {protection}").replace(
        "batch_size: 8", "batch_size: 8, learning_rate: 0.01"
    )
    plan = parse(Study, f"{text}strategy: {{name: fedbn}}\n{more}", "study.yaml")
    plan.check()
    return plan


Found = dict[str, tuple[Federation, Path, list[Any]]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Found]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("models.documents.parse", functools.cache(parse))
        patch.setattr("os.fsync", lambda file: None)
        patch.setattr("fl_server.rounds.GRACE_S", 0.05)
        patch.setattr("fl_server.rounds.ONLINE_LOOK_S", 0.01)
        found: Found = {}
        for protection in ("plain", "sealed", "masked"):
            federation = Federation(tmp_path_factory.mktemp(protection), plan_of(protection))
            folder, models = models_of(federation)
            found[protection] = (federation, folder, models)
        yield found


def local_of(net: Any) -> Any:
    """Where norm layers lie in the vector, by the names that small_cnn gives them and nothing else."""
    names = [(name, int(np.prod(tensor.shape))) for name, tensor in net.state_dict().items()]
    return np.concatenate([np.full(size, "norm" in name) for name, size in names])


def algorithm(federation: Federation, made: list[Any]) -> tuple[list[Any], dict[str, Any]]:
    """(the shared weights after each round, each site's whole model after the last): the mean over sites of everything but norms.

    A round begins at the shared weights that the run `made` in the one before: AdamW makes much of a last digit. The local loop
    is the study's, which other tests hold to their own oracle.
    """
    plan = federation.plan
    start = networks.to_vector(networks.build(plan))
    local = local_of(networks.build(plan))
    own = {name: start.copy() for name in SITES}
    models = []
    for number, shared in enumerate([start[~local], *made[:-1]], start=1):
        changes, cases = [], []
        for name in SITES:
            net, whole = networks.build(plan), own[name].copy()
            whole[~local] = shared
            networks.load_vector(net, whole)
            update = learning.learn(net, federation.cohort(name, "train"), plan, round_number=number)
            own[name] = networks.to_vector(net)
            changes.append(update.delta[~local] * np.float64(update.cases))
            cases.append(update.cases)
        models.append(shared + sum(changes) / sum(cases))
    for whole in own.values():
        whole[~local] = made[-1]
    return models, own


def test_a_run_is_the_mean_of_all_but_the_norms(runs: Found) -> None:
    federation, _, models = runs["plain"]
    expected, _ = algorithm(federation, models)
    start = weights.start(federation.plan, None)[0]
    for before, after, wanted in zip([start, *models], models, expected, strict=False):
        assert after.shape == wanted.shape and after.size < networks.to_vector(networks.build(federation.plan)).size
        assert np.abs(after - wanted).max() < 2e-5 < 0.01 * np.abs(after - before).max()


def test_masked_sealed_and_plain_runs_make_the_same_model_bit_for_bit(runs: Found) -> None:
    assert len({models[-1].tobytes() for _, _, models in runs.values()}) == 1
    shapes = {Run.open(folder).model.shape for _, folder, _ in runs.values()}  # type: ignore[union-attr]
    assert len(shapes) == 1


def test_each_site_is_tested_with_its_own_norms(runs: Found) -> None:
    federation, folder, models = runs["masked"]
    results = json.loads((folder / "results.json").read_text())
    _, whole = algorithm(federation, models)
    local = local_of(networks.build(federation.plan))
    assert not np.array_equal(whole["north"][local], whole["south"][local])
    total = ScoreHistogram.empty(1, federation.plan.evaluation.bins)
    selected = results["selected_round"]
    for name in SITES:
        site = federation.hospitals[name].site
        net = networks.build(federation.plan)
        order: Any = federation.hospitals[name].order(
            wire.EvaluateOrder,
            run=results["run_id"],
            round=selected,
            model=models[selected - 1],
            study=federation.plan.digest,
        )
        norms.load(site, net, order)
        if selected == 2:
            assert networks.to_vector(net).tobytes() == whole[name].tobytes()
        cohort = federation.cohort(name, "test")
        scores = learning.predict(net, cohort)
        total += ScoreHistogram.of(
            scores, cohort.targets.numpy(), cohort.known.numpy(), federation.plan.evaluation.bins
        )
    assert results["test"]["counts"] == total.to_json()


def test_a_run_whose_coordinator_died_before_the_commit_goes_on_with_the_same_norms(
    runs: Found, tmp_path: Path
) -> None:
    federation = Federation(tmp_path, plan_of())
    folder = federation.new_run()
    killed(federation, folder, federation.grid(), before_commit_of(2))
    models = models_of(forgetful(federation), folder=folder)[1]
    assert models[-1].tobytes() == runs["plain"][2][-1].tobytes()


def test_norms_of_later_rounds_are_never_mixed_into_earlier_ones(tmp_path: Path) -> None:
    hospital = Hospital.open(tmp_path, "north", plan_of(more="version: 1\n"))
    site, net = hospital.site, networks.build(hospital.study)
    local = networks.norm_places(net)
    model = weights.start(hospital.study, None)[0] + np.float32(0.5)
    order: Any = {n: hospital.order(round=n, model=model) for n in (1, 2, 3)}
    tested: Any = {n: hospital.order(wire.EvaluateOrder, round=n, model=model) for n in (1, 2, 3)}

    def norms_of(given: Any) -> set[float]:
        norms.load(site, net, given)
        assert np.array_equal(networks.to_vector(net)[~local], model)
        return set(networks.to_vector(net)[local].tolist())

    assert norms_of(order[1]) == {0.0, 1.0}
    for number in (1, 2):
        networks.load_vector(net, np.where(local, np.float32(number * 10), networks.to_vector(net)))
        norms.keep(site, net, order[number])
    assert [norms_of(order[n]) for n in (1, 2, 3)] == [{0.0, 1.0}, {10.0}, {20.0}]
    assert [norms_of(tested[n]) for n in (1, 2, 3)] == [{10.0}, {20.0}, {20.0}]
    networks.load_vector(net, np.where(local, np.float32(7), networks.to_vector(net)))
    norms.keep(site, net, order[1])  # the run went back to an earlier checkpoint
    assert [norms_of(tested[n]) for n in (1, 3)] == [{7.0}, {7.0}]
    (path,) = (site.home / "norms").glob("*")
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_bytes(path.read_bytes()[:-5])
    assert norms_of(order[2]) == {0.0, 1.0} and site.journal.last(norms.ABSENT)
    with pytest.raises(MessageMalformed, match="another number of weights"):
        norms.load(site, net, hospital.order(model=networks.to_vector(net)))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["small_cnn", "vit", "efficientnet_b0"])
def test_norms_are_found_whatever_the_network_calls_them(name: str) -> None:
    plan = plan_of(more=f"network: {{name: {name}}}\n")
    net = networks.build(plan)
    local, fresh = networks.norm_places(net), networks.fresh_norms(net)
    assert 0 < local.sum() < 0.05 * local.size
    assert np.array_equal(fresh, networks.to_vector(net)[local])
    assert networks.shared(net, plan).size == (~local).sum() == weights.start(plan, None)[0].size


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("privacy: none", "privacy: {epsilon: 8, clip_norm: 1, sampling_rate: 0.1}"), "outside what the accounting"),
        (("task:", "network: {name: linear}\ntask:"), "the linear network has none"),
        (("quorum: 2", "evaluate_only: [west], quorum: 2"), "trains nothing has no norm layers"),
    ],
    ids=["privacy", "network", "external"],
)
def test_where_local_norms_have_no_meaning_they_are_refused(change: tuple[str, str], sentence: str) -> None:
    text = STUDY + "strategy: {name: fedbn}\n"
    parse(Study, text, "study.yaml").check()
    with pytest.raises(StudyConflict, match=sentence):
        parse(Study, text.replace(*change), "study.yaml").check()


def test_there_is_no_common_model_to_release_or_compare(runs: Found) -> None:
    _, folder, _ = runs["plain"]
    with pytest.raises(StudyConflict, match="no model that others could use"):
        release.package(folder, release.Wanted(), None)  # type: ignore[arg-type]
    with pytest.raises(StudyConflict, match="no common model"):
        comparison.check(plan_of())
