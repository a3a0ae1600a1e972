"""Whole runs of each family of strategies, with real sites and a grid in memory, against sites trained by hand."""

import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from federation import Federation
from flwr.app import Message
from grid import FaultyGrid
from hospital import STUDY, first_model
from oracle import Trained
from test_round import forgetful, stop_after

from fl_server.run import Run
from models import learning
from models.metrics import ScoreHistogram
from models.study import Study, parse

FIVE = ["north", "south", "east", "west", "abbey"]
Float64 = npt.NDArray[np.float64]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.documents.parse", functools.cache(parse))
    monkeypatch.setattr("os.fsync", lambda file: None)


def plan_of(strategy: str, protection: str = "plain", sites: list[str] | None = None, rounds: int = 2) -> Study:
    sites = sites or ["north", "south"]
    text = STUDY.replace("[north, south], quorum: 2", f"[{', '.join(sites)}], quorum: {len(sites)}")
    text = text.replace("protection: plain", f"protection: {protection}").replace("rounds: 2", f"rounds: {rounds}")
    study = parse(Study, f"{text}strategy: {{{strategy}}}\n", "study.yaml")
    study.check()
    return study


def models_of(
    federation: Federation, grid: FaultyGrid | None = None, folder: Path | None = None
) -> tuple[Path, list[Any]]:
    """The folder of a run, and the model after each round that it committed."""
    found: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        commit = Run.commit

        def note(self: Run, done: Any, model: Any, state: Any) -> None:
            commit(self, done, model, state)
            found.append(model)

        patch.setattr(Run, "commit", note)
        return federation.run(grid, folder), found


# Strategies of the mean.


def stepped(name: str, means: list[Float64], model: Float64, plan: dict[str, float]) -> Float64:
    """The papers' steps on whole vectors in float64 (Hsu et al. 2019; Reddi et al. 2021, algorithm 2)."""
    m, v = np.zeros_like(model), np.full_like(model, plan.get("tau", 0.0) ** 2)
    for mean in means:
        if name == "fedavgm":
            m = plan["momentum"] * m + mean
            model = model + plan["server_rate"] * m
            continue
        m = plan["beta1"] * m + (1 - plan["beta1"]) * mean
        rest = 1 - plan["beta2"]
        v = plan["beta2"] * v + rest * m**2 if name == "fedadam" else v - rest * m**2 * np.sign(v - m**2)
        model = model + plan["server_rate"] * m / (np.sqrt(v) + plan["tau"])
    return model


@pytest.mark.parametrize("name", ["fedavgm", "fedadam", "fedyogi"])
def test_a_run_makes_the_steps_of_its_strategy_on_the_mean_of_what_sites_learn(tmp_path: Path, name: str) -> None:
    federation = Federation(tmp_path, plan_of(f"name: {name}"))
    folder, models = models_of(federation)
    trained, before, means = Trained(federation), first_model(federation.plan), []
    for number, after in enumerate(models, start=1):
        means.append(trained.mean(["north", "south"], before, number)[0])
        expected = stepped(
            name, means, first_model(federation.plan).astype(np.float64), federation.plan.strategy.parameters
        )
        # Adam's quotient blows up the rounding of a mean near 0 by at most rate / tau = 10.
        assert float(np.abs(after - expected).max()) < 1e-4 < float(np.abs(after - before).max())
        before = after
    assert Run.open(folder).facts["label"] == "complete" and len(models) == 2


@pytest.mark.parametrize("protection", ["plain", "masked"])
def test_a_run_of_fedprox_is_the_mean_of_what_sites_learn_under_the_pull(tmp_path: Path, protection: str) -> None:
    sites = ["north", "south"] if protection == "plain" else FIVE[:3]
    federation = Federation(tmp_path, plan_of("name: fedprox, proximal_mu: 5", protection, sites))
    folder, models = models_of(federation)
    before, run = first_model(federation.plan), Run.open(folder)
    for done, after in zip(run.history, models, strict=True):
        Trained(federation).check(done, before, after)
        before = after


def test_masked_and_plain_runs_of_fedadam_make_the_same_model_bit_for_bit(tmp_path: Path) -> None:
    last = {}
    for protection in ("masked", "sealed", "plain"):
        federation = Federation(tmp_path / protection, plan_of("name: fedadam", protection, FIVE[:3]))
        last[protection] = models_of(federation)[1][-1].tobytes()
    assert len(set(last.values())) == 1


def test_a_run_of_fedadam_that_is_killed_goes_on_with_its_moments(tmp_path: Path) -> None:
    """And it would be another model without them, so the checkpoint is what brings them back."""
    federation = Federation(tmp_path, plan_of("name: fedadam"))
    undisturbed = models_of(federation)[1]
    last, folder = [], Path()
    for forgets in (False, True):
        folder = forgetful(federation).new_run()
        stop_after(1, federation, folder)
        with pytest.MonkeyPatch.context() as patch:
            if forgets:
                patch.setattr(Run, "state", property(lambda self: {}, lambda self, state: None), raising=False)
            last.append(models_of(federation, folder=folder)[1][-1])
    assert last[0].tobytes() == undisturbed[1].tobytes() and last[1].tobytes() != undisturbed[1].tobytes()


# Robust strategies.


def hostile(federation: Federation, name: str, factor: float) -> FaultyGrid:
    """A grid in which one site sends its update times `factor`, and says nothing else of it than before."""
    grid, learn = federation.grid(), learning.learn
    honest = grid.answers[federation.node(name)]

    def turned(*given: Any, **named: Any) -> learning.Update:
        update = learn(*given, **named)
        return learning.Update((update.delta * factor).astype(np.float32), update.cases, update.steps, update.loss)

    def answer(message: Message) -> Message | None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(learning, "learn", turned)
            return honest(message)

    grid.answers[federation.node(name)] = answer
    return grid


def rows_of(trained: Trained, run: Run, model: Any, number: int, wrong: str) -> dict[str, Float64]:
    """Each site's update float64 (P,) as its words say it: rounded to 2^-scale over its cases. `wrong` sends it times -100."""
    step, found = 2.0 ** -run.history[number - 1].scale, {}
    for name in FIVE:
        change, cases = trained.site(name, model, number)
        sent = (change.astype(np.float32) * np.float32(-100 if name == wrong else 1)).astype(np.float64)
        found[name] = np.rint(sent * cases / step) * step / cases
    return found


def check(after: Any, expected: Float64) -> None:
    """Within the rounding of float32."""
    np.testing.assert_allclose(after, expected, rtol=2.0**-22, atol=2.0**-24)


def nearest(rows: dict[str, Float64], f: int, m: int) -> list[str]:
    """Krum as the paper writes it: the smallest sums of squared distances to the n - f - 2 nearest others."""
    scores = {
        name: math.fsum(sorted(float(((row - rows[o]) ** 2).sum()) for o in rows if o != name)[: len(rows) - f - 2])
        for name, row in rows.items()
    }
    return sorted(scores, key=scores.__getitem__)[:m]


def events_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def test_a_sealed_run_of_krum_leaves_a_hostile_site_out_and_says_so(tmp_path: Path) -> None:
    federation = Federation(tmp_path, plan_of("name: krum", "sealed", FIVE, rounds=4))
    folder, models = models_of(federation, hostile(federation, "east", -100.0))
    run, trained, before, left_out = Run.open(folder), Trained(federation), first_model(federation.plan), []
    for number, after in enumerate(models, start=1):
        rows = rows_of(trained, run, before, number, "east")
        chosen = nearest(rows, 1, 2)
        left_out.append(sorted(set(FIVE) - set(chosen)))
        check(after, before + np.mean([rows[name] for name in chosen], axis=0))
        before = after
    told = events_of(folder, "left_out")
    assert [event["sites"] for event in told] == left_out and all("east" in names for names in left_out)
    assert [event["round"] for event in told] == [1, 2, 3, 4]
    journaled = federation.home.journal.lines("updates-left-out")
    assert [(line["round"], line["sites"]) for line in journaled] == list(enumerate(left_out, start=1))
    assert all(done.contributors == sorted(FIVE) for done in run.history), "its counts are in the sums"
    assert run.facts["label"] == "complete" and run.initial is not None and run.history[-1].validation is not None
    assert run.history[-1].validation["loss"] < 1.5 * run.initial["loss"]


@pytest.mark.parametrize("name", ["median", "trimmed_mean"])
def test_a_run_of_a_robust_strategy_combines_each_weight_of_the_sites_and_withstands_a_hostile_one(
    tmp_path: Path, name: str
) -> None:
    federation = Federation(tmp_path, plan_of(f"name: {name}", "plain", FIVE, rounds=4))
    folder, models = models_of(federation, hostile(federation, "abbey", -100.0))
    run, trained, before = Run.open(folder), Trained(federation), first_model(federation.plan)
    for number, after in enumerate(models, start=1):
        rows = np.sort(np.stack(list(rows_of(trained, run, before, number, "abbey").values())), axis=0)
        expected = rows[2] if name == "median" else rows[1:4].mean(axis=0)
        check(after, before + expected)
        before = after
    assert run.initial is not None and run.history[-1].validation is not None
    assert run.history[-1].validation["loss"] < 1.5 * run.initial["loss"] and not events_of(folder, "left_out")


def test_the_same_hostile_site_ruins_the_mean(tmp_path: Path) -> None:
    federation = Federation(tmp_path, plan_of("name: fedavg", "plain", FIVE, rounds=4))
    folder, _ = models_of(federation, hostile(federation, "abbey", -100.0))
    run = Run.open(folder)
    assert run.initial is not None and run.history[-1].validation is not None
    assert run.history[-1].validation["loss"] > 2 * run.initial["loss"]
    assert ScoreHistogram.from_json(run.history[-1].validation["counts"]).auroc(0) is not None
