"""SCAFFOLD in whole runs, against the paper's algorithm in numpy, and with everything that may happen to a site's variate."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from federation import Federation
from hospital import STUDY, Hospital, first_model
from test_round import before_commit_of, forgetful, killed, stop_after
from test_strategy_round import models_of

from fl_client import variates
from fl_server import sums
from fl_server.run import Run
from models import networks, tasks
from models.study import Study, parse
from privacy import wire
from privacy.errors import MessageMalformed, StudyConflict

Float64 = npt.NDArray[np.float64]
SITES = ["north", "south", "east"]
TRAINING = "{rounds: 3, batch_size: 4, optimizer: sgd, learning_rate: 0.05, augmentation: none, weight_decay: 0, local_epochs: 2}"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.documents.parse", functools.cache(parse))
    monkeypatch.setattr("os.fsync", lambda file: None)
    monkeypatch.setattr("fl_server.rounds.GRACE_S", 0.05)
    monkeypatch.setattr("fl_server.rounds.ONLINE_LOOK_S", 0.01)


def plan_of(protection: str = "plain", quorum: int = 3, more: str = "") -> Study:
    text = STUDY.replace("[north, south], quorum: 2", f"[{', '.join(SITES)}], quorum: {quorum}")
    text = text.replace("{rounds: 2, batch_size: 8}", TRAINING).replace(
        "protection: plain", f"protection: {protection}"
    )
    text = text.replace("bins: 50", "bins: 50, select: last")
    plan = parse(Study, f"{text}network: {{name: linear}}\nstrategy: {{name: scaffold}}\n{more}", "study.yaml")
    plan.check()
    return plan


class Paper:
    """Algorithm 1 of Karimireddy et al. 2020 with option II, on logistic regression in float64 with gradients by hand.

    Only the order of images comes from the code under test, because it is part of the study's seed.
    """

    def __init__(self, federation: Federation, repeats: dict[int, int] | None = None) -> None:
        self.federation, self.plan = federation, federation.plan
        self.repeats = repeats or {}  # round -> how often it had been trained before
        self.own: dict[str, Float64] = {}
        self.common: Float64 | None = None

    def data(self, name: str) -> tuple[Float64, Float64, Float64]:
        """Cells (N, F) as the network reduces images, labels (N,), and the weight of each label in the loss."""
        cohort = self.federation.cohort(name, "train")
        net = networks.build(self.plan)
        taken: list[Any] = []
        net.get_submodule("dropout").register_forward_hook(lambda module, given, result: taken.append(given[0]))
        with torch.no_grad():
            net(cohort.images.float())
        weights = tasks.class_weights(cohort.targets, cohort.known, balance=True).numpy()[0]
        labels = cohort.targets.numpy()[:, 0].astype(np.float64)
        assert bool((cohort.known == 1).all())
        return taken[0].numpy().astype(np.float64), labels, weights[labels.astype(int)].astype(np.float64)

    def local(self, name: str, x: Float64, number: int) -> tuple[Float64, Float64, int]:
        """(y - x, the next variate, images) of one site in one round."""
        from models.learning import _batches, _randomness

        cells, labels, weights = self.data(name)
        c_i, c = self.own.get(name, np.zeros_like(x)), self.common if self.common is not None else np.zeros_like(x)
        rate, y, steps = self.plan.training.rate(number), x.copy(), 0
        generator, _ = _randomness(self.plan, number, self.repeats.get(number, 0))
        for batch in _batches(torch.arange(len(labels)), self.plan.training, generator):
            rows = batch.numpy()
            scores = 1 / (1 + np.exp(-(cells[rows] @ y[:-1] + y[-1])))
            slope = weights[rows] * (scores - labels[rows]) / len(rows)
            gradient = np.concatenate([cells[rows].T @ slope, [slope.sum()]])
            gradient *= min(1.0, 5.0 / (float(np.linalg.norm(gradient)) + 1e-6))
            y, steps = y - rate * (gradient - c_i + c), steps + 1
        return y - x, c_i - c + (x - y) / (steps * rate), len(labels)

    def round(self, x: Float64, number: int, names: list[str]) -> Float64:
        parts = {name: self.local(name, x, number) for name in names}
        cases = sum(n for _, _, n in parts.values())
        changed = {name: variate - self.own.get(name, np.zeros_like(x)) for name, (_, variate, _) in parts.items()}
        before = self.common if self.common is not None else np.zeros_like(x)
        if set(names) == set(SITES):  # the paper's c + mean(change)
            self.common = before + sum(n * changed[name] for name, (_, _, n) in parts.items()) / cases
        else:  # ours, where it differs from the paper's: without memory
            self.common = sum(n * variate for _, variate, n in parts.values()) / cases
        self.own |= {name: variate for name, (_, variate, _) in parts.items()}
        return x + sum(n * change for change, _, n in parts.values()) / cases


@pytest.mark.parametrize("protection", ["plain", "sealed", "masked"])
def test_a_run_is_the_papers_algorithm(tmp_path: Path, protection: str) -> None:
    federation = Federation(tmp_path, plan_of(protection))
    folder, models = models_of(federation)
    paper, x = Paper(federation), first_model(federation.plan).astype(np.float64)
    for number, after in enumerate(models, start=1):
        before, x = x, paper.round(x, number, SITES)
        assert float(np.abs(after - x).max()) < 2e-5 < 0.01 * float(np.abs(after - before).max())
    run = Run.open(folder)
    assert run.facts["label"] == "complete" and paper.common is not None
    assert float(np.abs(run.state["variate"] - paper.common).max()) < 2e-5 < float(np.abs(paper.common).max()) / 100


def test_masked_sealed_and_plain_runs_make_the_same_model_bit_for_bit(tmp_path: Path) -> None:
    last = {
        protection: models_of(Federation(tmp_path / protection, plan_of(protection)))[1][-1].tobytes()
        for protection in ("masked", "sealed", "plain")
    }
    assert len(set(last.values())) == 1


def absent(federation: Federation, name: str) -> list[int]:
    """Rounds in which the site noted that it had no variate."""
    lines = (federation.hospitals[name].home / "journal.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [line["facts"]["round"] for line in found if line["kind"] == variates.ABSENT]


def kept(federation: Federation, name: str) -> list[Path]:
    return list((federation.hospitals[name].home / "variates").glob("*"))


@pytest.mark.parametrize("damage", ["lost", "torn", "of another model"])
def test_a_site_without_its_variate_starts_from_zero_and_notes_it(tmp_path: Path, damage: str) -> None:
    federation = Federation(tmp_path, plan_of())
    folder = federation.new_run()
    stop_after(1, federation, folder)
    (path,) = kept(federation, "south")
    if damage == "lost":
        path.unlink()
    elif damage == "torn":
        path.write_bytes(path.read_bytes()[:-7])
    else:
        from safetensors.numpy import save

        path.write_bytes(save({"after.1": np.ones(3, np.float32)}))
    models = models_of(federation, folder=folder)[1]
    paper, x = Paper(federation), first_model(federation.plan).astype(np.float64)
    x = paper.round(x, 1, SITES)
    whole = Paper(federation)
    whole.own, whole.common = dict(paper.own), paper.common
    del paper.own["south"]  # its c_i is zero; c is what all of them sent
    common = paper.common
    parts = {name: paper.local(name, x, 2) for name in SITES}
    cases = sum(n for _, _, n in parts.values())
    expected = x + sum(n * change for change, _, n in parts.values()) / cases
    assert float(np.abs(models[0] - expected).max()) < 2e-5 < float(np.abs(models[0] - whole.round(x, 2, SITES)).max())
    assert common is not None
    assert absent(federation, "south") == [2] and absent(federation, "north") == []


def test_a_site_that_joins_late_begins_from_zero_and_the_rest_goes_on(tmp_path: Path) -> None:
    federation = Federation(tmp_path, plan_of(quorum=2))
    folder, grid = federation.new_run(), federation.grid()
    node = federation.node("east")
    grid.online = {federation.node(name) for name in SITES} - {node}
    with pytest.MonkeyPatch.context() as patch:
        commit = Run.commit

        def join(self: Run, done: Any, model: Any, state: Any) -> None:
            commit(self, done, model, state)
            grid.online = None

        patch.setattr(Run, "commit", join)
        models = models_of(federation, grid, folder)[1]
    run = Run.open(folder)
    assert [done.contributors for done in run.history] == [["north", "south"], sorted(SITES), sorted(SITES)]
    assert absent(federation, "east") == [2]
    paper, x = Paper(federation), first_model(federation.plan).astype(np.float64)
    for number, after in enumerate(models, start=1):
        if number == 2:  # everyone's c is the mean of two sites' variates, and the new site has none
            parts = {name: paper.local(name, x, number) for name in SITES}
            cases = sum(n for _, _, n in parts.values())
            x = x + sum(n * change for change, _, n in parts.values()) / cases
            paper.common = sum(n * variate for _, variate, n in parts.values()) / cases
            paper.own = {name: variate for name, (_, variate, _) in parts.items()}
        else:
            x = paper.round(x, number, SITES if number > 1 else ["north", "south"])
        assert float(np.abs(after - x).max()) < 2e-5


def test_a_round_whose_sum_was_void_starts_from_the_same_variate_again(tmp_path: Path) -> None:
    undisturbed = models_of(Federation(tmp_path / "a", plan_of()))[1]
    federation, trained = Federation(tmp_path / "b", plan_of()), []
    with pytest.MonkeyPatch.context() as patch:
        total = sums.OpenSumming._total

        def void(self: Any, task: Any, *given: Any) -> Any:
            if task.name == "train":
                trained.append(task.round)
                if trained == [1, 2]:
                    raise MessageMalformed(
                        "a sum that cannot be used, of sites that have trained and kept their variates"
                    )
            return total(self, task, *given)

        patch.setattr(sums.OpenSumming, "_total", void)
        models = models_of(federation)[1]
    assert trained == [1, 2, 2, 3]
    assert [model.tobytes() for model in models] == [model.tobytes() for model in undisturbed]
    assert all(absent(federation, name) == [] for name in SITES)


def test_a_masked_round_that_is_tried_again_advances_no_variate_twice(tmp_path: Path) -> None:
    """Everybody trained, and one vector got lost: three sites are too few then. The oracle trains round 2 once, with the random
    choices of a second training, from what round 1 left; it advances c and each c_i once.
    """
    federation, lost = Federation(tmp_path, plan_of("masked")), []
    grid, node = federation.grid(), federation.node("south")
    honest = grid.answers[node]

    def loses(message: Any) -> Any:
        order, reply = wire.decode(message, *wire.ORDERS), honest(message)
        if isinstance(order, wire.TrainOrder) and order.round == 2 and not lost:
            lost.append(order.attempt)
            return None
        return reply

    grid.answers[node] = loses
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fl_server.sums.timeout_of", lambda study: 0.3)
        folder, models = models_of(federation, grid)
    assert lost == [1] and [done.attempt for done in Run.open(folder).history] == [1, 2, 2]
    trained = [wire.decode(message, *wire.ORDERS) for message in grid.sent if message.metadata.message_type == "train"]
    assert sum(order.round == 2 for order in trained) == 2 * len(SITES)
    paper, x = Paper(federation, {2: 1}), first_model(federation.plan).astype(np.float64)
    twice = Paper(federation, {2: 1})
    for number, after in enumerate(models, start=1):
        if number == 2:
            twice.own, twice.common = dict(paper.own), paper.common
            twice.round(x, 2, SITES)
            wrong = twice.round(x, 2, SITES)
        x = paper.round(x, number, SITES)
        assert float(np.abs(after - x).max()) < 2e-5
        if number == 2:
            assert float(np.abs(after - wrong).max()) > 2e-5, "the oracle cannot tell a variate that advanced twice"
    assert all(absent(federation, name) == [] for name in SITES)


def test_a_run_whose_coordinator_died_before_the_commit_goes_on_with_the_same_variates(tmp_path: Path) -> None:
    undisturbed = models_of(Federation(tmp_path / "a", plan_of()))[1]
    federation = Federation(tmp_path / "b", plan_of())
    folder = federation.new_run()
    killed(federation, folder, federation.grid(), before_commit_of(2))
    models = models_of(forgetful(federation), folder=folder)[1]
    assert [model.tobytes() for model in models] == [model.tobytes() for model in undisturbed[1:]]


class Cut(Exception):
    """The process ends here."""


def _cut() -> None:
    raise Cut


def test_a_kill_between_training_and_sending_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hospital = Hospital.open(tmp_path, "north", plan_of().model_copy(update={"name": "kills"}))
    site, size = hospital.site, first_model(hospital.study).size
    order = {n: hospital.order(round=n, model=np.zeros(2 * size, np.float32)) for n in (1, 2, 3)}
    for number in (1, 2):
        variates.keep(site, order[number], np.full(size, number, np.float32))
    assert variates.before(site, order[3], size).tolist() == [2.0] * size
    assert variates.before(site, order[2], size).tolist() == [1.0] * size  # repeated, after its own was kept
    assert variates.before(site, order[1], size).tolist() == [0.0] * size
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda self, target: _cut())
        patch.setattr("os.replace", lambda *given: _cut())
        with pytest.raises(Cut):
            variates.keep(site, order[3], np.full(size, 3, np.float32))
    assert variates.before(site, order[3], size).tolist() == [2.0] * size
    variates.keep(site, order[2], np.full(size, 9, np.float32))
    assert variates.before(site, order[3], size).tolist() == [9.0] * size, "the repeated round's own is the later one"
    other = hospital.order(round=3, run="run-2", model=np.zeros(2 * size, np.float32))
    assert variates.before(site, other, size).tolist() == [0.0] * size
    assert [path.stat().st_mode & 0o777 for path in (site.home / "variates").glob("*.safetensors")] == [0o600]


@pytest.mark.parametrize("size", [1, -1, None], ids=["one more", "one less", "the model alone"])
def test_an_order_without_a_whole_variate_is_refused(tmp_path: Path, size: int | None) -> None:
    hospital = Hospital.open(tmp_path, "north", plan_of())
    model = first_model(hospital.study)
    given = model if size is None else np.zeros(2 * model.size + size, np.float32)
    answer = hospital.answer(hospital.order(model=given))
    assert isinstance(answer, wire.Refusal) and answer.code == MessageMalformed.code
    assert not (hospital.home / "variates").exists()


def test_what_is_not_trained_is_neither_corrected_nor_in_the_variate(tmp_path: Path) -> None:
    frozen = "network: {name: small_cnn, trained: head}\n"
    text = STUDY.replace("{rounds: 2, batch_size: 8}", TRAINING) + "strategy: {name: scaffold}\n" + frozen
    federation = Federation(tmp_path, parse(Study, text, "study.yaml"))
    folder, models = models_of(federation)
    net = networks.build(federation.plan)
    head, before = networks.trained_places(net), first_model(federation.plan)
    assert 0 < head.sum() < head.size
    for model in models:
        assert np.array_equal(model[~head], before[~head]) and (model[head] != before[head]).any()
    variate = Run.open(folder).state["variate"]
    assert not variate[~head].any() and variate[head].any()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("optimizer: sgd", "optimizer: adamw"), "training.optimizer: sgd"),
        (("privacy: none", "privacy: {epsilon: 8, clip_norm: 1, sampling_rate: 0.1}"), "no noise of privacy covers"),
        (("protection: plain", "protection: plain\nencoding_bits: 24"), "encoding_bits of 32"),
    ],
    ids=["optimizer", "privacy", "bits"],
)
def test_what_scaffold_cannot_keep_its_promise_under_is_refused(change: tuple[str, str], sentence: str) -> None:
    text = STUDY.replace("{rounds: 2, batch_size: 8}", TRAINING) + "strategy: {name: scaffold}\n"
    parse(Study, text, "study.yaml").check()
    with pytest.raises(StudyConflict, match=sentence):
        parse(Study, text.replace(*change), "study.yaml").check()
