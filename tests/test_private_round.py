"""Whole runs with differential privacy, real site programs and a grid in memory: what is charged, what leaves, what is refused.

The oracle for what a private round does is written here once more with numpy and one patient at a time.
"""

import json
import math
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation import Federation
from hospital import STUDY, Hospital, first_model

from fl_client.cohort import Cohort
from fl_client.consent import Consent
from fl_client.site import Site, _check_room
from fl_server import report
from fl_server.run import Run, read_facts
from models import contributions, learning, networks
from models.study import Study, parse
from privacy import accounting, dpsgd, keys, noise, wire
from privacy.errors import BudgetExceeded, DeltaTooLarge, PolicyForbids, PrivacyError, StudyConflict
from privacy.sharing import Encoding

THREE = ["north", "south", "east"]
LOCAL = "{mode: local, epsilon: 50, delta: 0.001, clip_norm: 0.5, sampling_rate: 0.5, steps: 3, spare_rounds: 1}"
DISTRIBUTED = "{mode: distributed, epsilon: 50, delta: 0.001, clip_norm: 0.5, sampling_rate: 0.5, spare_rounds: 1}"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fl_server.sums.timeout_of", lambda study: 0.05)
    monkeypatch.setattr("fl_server.rounds.LINGER_S", 0.05)
    monkeypatch.setattr("fl_server.rounds.GRACE_S", 0.05)
    monkeypatch.setattr("fl_server.rounds.ONLINE_LOOK_S", 0.01)
    monkeypatch.setattr("os.fsync", lambda file: None)


def private(privacy: str = LOCAL, **change: str) -> Study:
    """A study of three sites with the noise filled in; `change` as in hospital.study."""
    text = STUDY.replace("privacy: none", f"privacy: {privacy}\nnetwork: {{name: linear}}")
    text = text.replace("batch_size: 8", "batch_size: 8, balance: false, optimizer: sgd, learning_rate: 0.1")
    text = text.replace("sites: [north, south], quorum: 2", "sites: [north, south, east], quorum: 3")
    text = text.replace("protection: plain", "protection: masked")
    # Sixteen patients in all, placed by hash alone: with smaller shares a split may be empty.
    text = text.replace("minimum_patients: 2", "minimum_patients: 1")
    text = text.replace("validation: 0.2, test: 0.2", "validation: 0.25, test: 0.3")
    if "distributed" in privacy:
        text += "strategy: {name: fedsgd, momentum: 0.5}\n"
    for old, new in change.items():
        text = text.replace(old.replace("__", ": "), new)
    study = parse(Study, text, "study.yaml")
    study.check()
    return study.with_noise()


def permissive(hospital: Hospital) -> None:
    path = hospital.home / "site.yaml"
    path.write_text(
        path.read_text().replace("minimum_patients: 2", "minimum_patients: 1\n  delta: 0.001"), encoding="utf-8"
    )


def federation(folder: Path, plan: Study) -> Federation:
    found = Federation(folder, plan)
    for hospital in found.hospitals.values():
        permissive(hospital)
    return found


@pytest.fixture
def local(tmp_path: Path) -> Federation:
    return federation(tmp_path, private())


def entries(hospital: Hospital) -> list[dict[str, Any]]:
    with sqlite3.connect(hospital.home / "ledger.sqlite") as book:
        return [json.loads(body) for (body,) in book.execute("SELECT body FROM entries ORDER BY seq")]


def kinds(hospital: Hospital) -> list[str]:
    return [entry["kind"] for entry in entries(hospital)]


# What a run charges, and what it tells.


def test_a_private_run_ends_complete_and_charges_each_round_at_each_site_once(local: Federation) -> None:
    folder = local.run()
    assert read_facts(folder)["label"] == "complete"
    for hospital in local.hospitals.values():
        assert kinds(hospital) == ["reserve", "commit"] * 2
        spent = hospital.site.ledger.spendings(0.001)["total"]
        assert (spent.rounds, spent.open) == (2, 0) and 0 < spent.spent == spent.charged < 50


def test_a_private_run_tells_no_loss_no_seconds_and_no_number_of_patients(local: Federation) -> None:
    folder = local.run()
    results = json.loads((folder / "results.json").read_text())
    sizes = {name: local.cohort(name, "train").public_size for name in local.hospitals}
    assert set(sizes.values()) == {10}
    for entry in results["rounds"]:
        assert entry["train_loss"] is None and entry["site_seconds"] == {}
        assert entry["cases"] == sum(sizes.values())
        # A split of three patients is smaller than ten: nothing of it may be in the sum.
        assert entry["validation"]["images"] == 0 and entry["validation"]["patients"] == 0
        assert not any(map(sum, entry["validation"]["counts"]["counts"][0])) if "counts" in entry else True
    assert results["figures"] == {name: [None] for name in sorted(THREE)}
    text = (folder / "events.jsonl").read_text()
    assert '"seconds": 0.0' in text and '"train_loss": null' in text


def test_the_card_of_a_private_model_says_every_tier_with_all_that_belongs_to_it(tmp_path: Path) -> None:
    run = federation(tmp_path, private(DISTRIBUTED)).run()
    card = json.loads((run / "card.json").read_text())
    assert [s["tier"] for s in card["privacy"]] == ["everybody", "coordinator", "lying-coordinator"]
    for statement in card["privacy"]:
        assert statement["unit"] == "patient" and statement["relation"] == "add or remove one patient"
        assert statement["delta"] == 0.001 and "Poisson" in statement["sampling"] and statement["adversary"]
    own, shared, _ = (s["epsilon"] for s in card["privacy"])
    assert own <= 50 and shared < own


# What a round computes.


@pytest.fixture
def noiseless(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everybody is drawn, and nothing is added: what is left of a private round can be computed by hand."""
    monkeypatch.setattr(noise, "poisson_sample", lambda units, rate, stream, cap=None: np.arange(units))
    monkeypatch.setattr(noise.DiscreteGaussian, "add_to", lambda self, total, stream: None)
    yield


def by_hand(cohort: Cohort, net: torch.nn.Module, clip: float, images: int) -> np.ndarray:
    """The sum of the patients' clipped gradients, float64, without anything of privacy/dpsgd.py."""
    total = np.zeros(sum(p.numel() for p in net.parameters()))
    for patient in sorted(set(cohort.patients.tolist())):
        rows = torch.nonzero(cohort.patients == patient).flatten()
        assert len(rows) <= images, "with more images the choice among them would be random"
        chosen = rows.repeat(-(-images // len(rows)))[:images]
        logits = net(cohort.images[chosen]).double()
        target, known = cohort.targets[chosen].double(), cohort.known[chosen].double()
        loss = -(target * logits.sigmoid().log() + (1 - target) * (1 - logits.sigmoid()).log())
        loss = (loss * known).sum() / known.sum()
        gradient = np.concatenate(
            [g.double().numpy().ravel() for g in torch.autograd.grad(loss, list(net.parameters()))]
        )
        total += gradient * min(1.0, clip / np.linalg.norm(gradient))
    return total


def test_a_distributed_round_is_one_step_along_the_mean_clipped_gradient_of_all_patients(
    tmp_path: Path, noiseless: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The fastest engine may be the one in bfloat16, which is right to a hundredth only.
    loop = lambda net, study: dpsgd.LoopEngine(net, learning.patient_losses)  # noqa: E731
    monkeypatch.setattr(learning, "engine_of", loop)
    plan = private(DISTRIBUTED, **{"augmentation__light": "augmentation: none"})
    plan = plan.model_copy(
        update={"training": plan.training.model_copy(update={"augmentation": "none", "schedule": "constant"})}
    )
    assert plan.privacy != "none"
    plan = plan.model_copy(update={"privacy": plan.privacy.model_copy(update={"images_per_patient": 4})})
    found = federation(tmp_path, plan)
    folder = found.run()
    run = Run.open(folder)
    net, velocity, sizes = networks.build(plan), 0.0, 0
    for number in (1, 2):
        parts = []
        for name in THREE:
            cohort = found.cohort(name, "train")
            parts.append(by_hand(cohort, net, 0.5, 4))
            sizes += cohort.public_size if number == 1 else 0
        # The public sizes and the rate are what sums are divided by, never the number of patients.
        velocity = 0.5 * velocity + np.sum(parts, axis=0) / (0.5 * sizes)
        rate = 0.1 * min(1.0, number / 2)
        networks.load_vector(net, (networks.to_vector(net) - rate * velocity).astype(np.float32))
    assert run.model is not None
    moved = np.abs(networks.to_vector(net) - networks.to_vector(networks.build(plan))).max()
    assert np.abs(run.model - networks.to_vector(net)).max() < 1e-4 * moved


class Few:
    """A cohort of made-up patients; `keep`: those of them that exist."""

    def __init__(self, keep: range) -> None:
        generator = torch.Generator().manual_seed(3)
        rows = [n for n in range(24) if n // 2 in keep]
        self.images = torch.rand(24, 1, 32, 32, generator=generator)[rows]
        self.targets = (torch.rand(24, 1, generator=generator) > 0.5).float()[rows]
        self.known = torch.ones(24, 1)[rows]
        self.patients = torch.tensor([n // 2 for n in rows])


def learned(cohort: Few, plan: Study, public_size: int = 10) -> learning.Update:
    net = networks.build(plan)
    engine = dpsgd.LoopEngine(net, learning.patient_losses)
    return learning.learn_privately(engine, net, cohort, plan, learning.Turn(1, public_size))


@pytest.mark.parametrize("privacy", [LOCAL, DISTRIBUTED])
def test_no_seed_of_the_study_makes_noise_draws_or_views_repeat(privacy: str) -> None:
    """Pitfall 1: whoever chose the seed could compute the noise and take it off."""
    plan, cohort = private(privacy), Few(range(12))
    torch.manual_seed(plan.training.seed)
    first = learned(cohort, plan).delta
    torch.manual_seed(plan.training.seed)
    assert not np.isclose(first, learned(cohort, plan).delta, rtol=1e-6).any()
    state = torch.random.get_rng_state()
    learned(cohort, plan)
    assert torch.equal(state, torch.random.get_rng_state()), "the process's own random state is left alone"


def test_views_do_not_follow_from_the_seed_even_without_noise(noiseless: None) -> None:
    """One generator known to others, handed from patient to patient, would let one patient's presence move all later views."""
    plan, cohort = private(DISTRIBUTED), Few(range(12))
    assert not np.array_equal(learned(cohort, plan).delta, learned(cohort, plan).delta)


def test_one_patient_more_moves_the_sum_by_no_more_than_the_clip_norm(noiseless: None) -> None:
    plan = private(DISTRIBUTED)
    plan = plan.model_copy(update={"training": plan.training.model_copy(update={"augmentation": "none"})})
    with_one, without = learned(Few(range(12)), plan).delta, learned(Few(range(11)), plan).delta
    assert 0 < np.linalg.norm((with_one - without).astype(np.float64)) <= 1.0  # in units of the clip norm


@pytest.mark.parametrize("patients", [3, 12])
def test_the_denominator_is_the_public_size_whoever_is_there(noiseless: None, patients: int) -> None:
    """Pitfall 3: dividing by how many were drawn, or are there, tells who takes part."""
    plan = private(LOCAL.replace("steps: 3", "steps: 1"))
    plan = plan.model_copy(
        update={"training": plan.training.model_copy(update={"augmentation": "none", "weight_decay": 0.0})}
    )
    update, half = learned(Few(range(patients)), plan, 10), learned(Few(range(patients)), plan, 20)
    assert update.cases == 10 and half.cases == 20
    np.testing.assert_allclose(update.delta, 2 * half.delta, rtol=1e-5, atol=2e-8)  # of a float32 weight's last bit


def test_a_draw_of_nobody_is_a_noisy_step_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "poisson_sample", lambda *_: np.zeros(0, np.int64))
    plan = private(LOCAL)
    update = learned(Few(range(12)), plan)
    assert update.steps == 3 and np.count_nonzero(update.delta) == update.delta.size


def test_a_private_update_has_no_loss_and_no_count_of_images() -> None:
    update = learned(Few(range(12)), private(LOCAL), 10)
    assert (update.loss, update.cases, update.steps) == (0.0, 10, 3)


def test_values_that_are_no_weights_are_refused() -> None:
    plan = private(DISTRIBUTED)
    net = networks.build(plan)
    net.register_buffer("memory", torch.zeros(1))
    engine = dpsgd.LoopEngine(net, learning.patient_losses)
    with pytest.raises(Exception, match="no weights"):
        learning.learn_privately(engine, net, Few(range(12)), plan, learning.Turn(1, 10))


# What a site refuses.


def answer(hospital: Hospital, **change: Any) -> str:
    """The code of the refusal of a training order, or "" for a report. Keys are agreed on by the order before."""
    report = hospital.answer(hospital.order(**change))
    return report.code if isinstance(report, wire.Refusal) else ""


@pytest.fixture
def plain(tmp_path: Path) -> Hospital:
    """One site of a private study that is not masked: an order of it can be answered alone."""
    plan = private(LOCAL, **{"protection__masked": "protection: plain"})
    hospital = Hospital.open(tmp_path, "north", plan)
    permissive(hospital)
    return hospital


def test_nothing_is_trained_before_the_charge_is_durable(plain: Hospital, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    train, reserve = learning.learn_privately, Site.reserve

    def watched(*given: Any, **more: Any) -> Any:
        happened.append(f"train with {kinds(plain)}")
        return train(*given, **more)

    monkeypatch.setattr(learning, "learn_privately", watched)
    assert answer(plain) == ""
    assert happened == ["train with ['reserve']"] and kinds(plain) == ["reserve", "commit"]

    def refuses(*_: Any) -> Any:
        raise BudgetExceeded("no ε is left")

    monkeypatch.setattr(Site, "reserve", refuses)
    assert answer(plain, sum=2, run="run-2") == "budget-exceeded" and len(happened) == 1
    monkeypatch.setattr(Site, "reserve", reserve)


def test_an_update_that_failed_after_training_stays_charged(plain: Hospital, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pitfall 2: counting only rounds that succeeded."""

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("after the noise was drawn")

    monkeypatch.setattr(learning, "learn_privately", fails)
    assert answer(plain) == "internal"
    assert kinds(plain) == ["reserve"]
    spent = plain.site.ledger.spendings(0.001)["total"]
    assert spent.open == 1 and spent.spent == 0 < spent.charged


def test_a_coordinator_cannot_have_more_rounds_than_the_study_said(plain: Hospital) -> None:
    """Two rounds and one spare: new runs and attempts of the same study change nothing about that."""
    assert [answer(plain, run=f"run-{n}", attempt=n, sum=n) for n in (1, 2, 3)] == ["", "", ""]
    assert answer(plain, run="run-4", round=2) == "budget-exceeded"
    assert kinds(plain).count("reserve") == 3


def test_the_cap_of_site_yaml_holds_over_studies(plain: Hospital) -> None:
    first = plain.study
    spends = first.spends(1)
    path = plain.home / "site.yaml"
    text = path.read_text().replace("epsilon_total: 1000", f"epsilon_total: {1.2 * spends}")
    path.write_text(text.replace("epsilon_per_study: 1000", "epsilon_per_study: 999"))
    assert answer(plain) == ""
    other = first.model_copy(update={"title": "The same once more"})
    plain.study = other
    plain.approve(other)
    assert answer(plain, run="run-9") == "budget-exceeded"
    with pytest.raises(BudgetExceeded, match="over all time"):
        plain.site.check_budget(other, [{"5" * 32}, *cohort_of(plain, other)])


def cohort_of(hospital: Hospital, plan: Study) -> list[set[str]]:
    from fl_client.ingest import Index
    from models.labels import LabelTable

    site = hospital.site
    labels = LabelTable.read(site.home / site.source.labels.table, site.source.labels)
    return Cohort.identities_of(Index.open(site.state), labels, plan, "train", site.pins(plan))


def test_identities_are_those_of_the_opened_cohort(local: Federation) -> None:
    for name, hospital in local.hospitals.items():
        opened = local.cohort(name, "train")
        assert cohort_of(hospital, local.plan) == opened.identities
        assert len(opened.identities) == len(learning.labelled_patients(opened))


def test_a_study_without_privacy_needs_the_policys_word_and_is_noted(tmp_path: Path) -> None:
    hospital = Hospital.open(tmp_path)
    assert answer(hospital) == "" and kinds(hospital) == ["unbounded"]
    path = hospital.home / "site.yaml"
    path.write_text(path.read_text().replace("permit_without_privacy: true", "permit_without_privacy: false"))
    assert answer(hospital, run="run-2") == "policy-forbids"
    with pytest.raises(PolicyForbids, match=r"policy\.permit_without_privacy"):
        hospital.site.check_policy(hospital.study)


LIES = {
    "noise": ({"noise_multiplier": 0.3}, "more than privacy.epsilon"),
    "no noise": ({"noise_multiplier": None}, "no noise_multiplier"),
    "steps under distributed noise": ({"mode": "distributed", "steps": 3}, "one step a round"),
    "distributed without masks": ({"mode": "distributed", "steps": 1}, "needs protection: masked"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_study_whose_promise_does_not_hold_is_refused_although_it_was_approved(plain: Hospital, lie: str) -> None:
    """The researcher's program checks this as well; the site does not take its word."""
    change, sentence = LIES[lie]
    assert plain.study.privacy != "none"
    lying = plain.study.model_copy(update={"privacy": plain.study.privacy.model_copy(update=change)})
    plain.study = lying
    plain.approve(lying)
    assert answer(plain) == "policy-forbids"
    with pytest.raises(PolicyForbids, match=sentence):
        plain.site.check_policy(lying)
    assert not (plain.home / "ledger.sqlite").exists() or kinds(plain) == []


def test_more_epsilon_than_site_yaml_permits_for_a_study_is_refused(plain: Hospital) -> None:
    path = plain.home / "site.yaml"
    path.write_text(path.read_text().replace("epsilon_per_study: 1000", "epsilon_per_study: 2"))
    assert answer(plain) == "policy-forbids"
    with pytest.raises(PolicyForbids, match="epsilon_per_study"):
        plain.site.check_policy(plain.study)


@pytest.mark.parametrize("where", ["study", "site"])
def test_a_delta_that_lets_a_patient_be_published_is_refused(plain: Hospital, where: str) -> None:
    assert plain.study.privacy != "none"
    many = [{f"{n:032x}"} for n in range(1000)]
    path, small = plain.home / "site.yaml", plain.study.privacy.model_copy(update={"delta": 1e-5})
    study = plain.study
    if where == "study":
        path.write_text(path.read_text().replace("delta: 0.001", "delta: 0.00001"))
    else:
        study = study.model_copy(update={"privacy": small.model_copy(update={"noise_multiplier": 2.0})})
    named = "the study's privacy.delta" if where == "study" else "policy.delta in site.yaml"
    with pytest.raises(DeltaTooLarge, match=named):
        plain.site.check_budget(study, many)
    plain.site.check_budget(study, many[:900])


def test_a_site_that_only_evaluates_spends_nothing(tmp_path: Path) -> None:
    plan = private(LOCAL, **{"minimum_patients__1": "minimum_patients: 1, evaluate_only: [west]"})
    found = federation(tmp_path, plan)
    path = found.hospitals["west"].home / "site.yaml"
    path.write_text(path.read_text().replace("permit_without_privacy: true", "permit_without_privacy: false"))
    folder = found.run()
    assert read_facts(folder)["label"] == "complete"
    assert not (found.hospitals["west"].home / "ledger.sqlite").exists()


def test_a_void_sum_is_charged_and_tried_again_with_new_noise(tmp_path: Path) -> None:
    """The first attempt's updates left the sites under masks that were never opened; nobody can prove it."""
    found = federation(tmp_path, private(LOCAL))
    grid = found.grid()
    honest, lost = dict(grid.answers), {"left": 1}

    def loses(message: Any) -> Any:
        reply = honest[found.node("east")](message)
        if lost["left"] and message.metadata.message_type == "train":
            lost["left"] -= 1
            return None
        return reply

    grid.answers[found.node("east")] = loses
    folder = found.run(grid)
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert any(event["event"] == "void" for event in events)
    assert read_facts(folder)["state"] == "complete"
    for hospital in found.hospitals.values():
        assert kinds(hospital).count("reserve") == 3, "two rounds, and the attempt that was lost"


def test_a_run_beyond_the_budget_ends_by_name_and_loses_nothing(tmp_path: Path) -> None:
    found = federation(tmp_path, private(LOCAL))
    folder = found.run()
    again = found.run(folder=found.new_run())
    assert read_facts(folder)["state"] == "complete"
    facts = read_facts(again)
    assert facts["state"] == "failed" and facts["label"].startswith("failed after round 1")
    assert "budget-exceeded" in (again / "events.jsonl").read_text()
    for hospital in found.hospitals.values():
        assert kinds(hospital).count("reserve") == 3


def test_orders_of_a_private_study_carry_nothing_that_could_weaken_it(plain: Hospital) -> None:
    """Noise, clip norm and rate come from the approved study alone; an order has no field for them."""
    names = set(wire.TrainOrder.__dataclass_fields__)
    assert not names & {"noise_multiplier", "clip_norm", "sampling_rate", "epsilon", "delta", "seed", "steps"}
    consent = Consent.open(plain.home, plain.study.digest)
    assert consent is not None and consent.offer.study.privacy == plain.study.privacy


def test_the_events_of_a_site_stay_within_the_epsilon_of_the_study(local: Federation) -> None:
    """Composed by the site, with its cap on a batch and the sampler's error, and over the spare rounds as well."""
    plan = local.plan
    assert plan.privacy != "none"
    site = local.hospitals["north"].site
    patients = len(local.cohort("north", "train").identities)
    events = [site.terms(plan, 1, patients, first_model(plan).size) for _ in range(plan.budgeted_rounds)]
    spent = accounting.epsilon(events, plan.privacy.delta)
    assert 0.9 * plan.privacy.epsilon < spent <= plan.privacy.epsilon
    assert events[0].patients == patients and 0 < events[0].delta_extra < 1e-20
    assert events[0].batch_max == min(patients, math.ceil(patients / 2 + 8 * math.sqrt(patients / 4) + 8))


def test_damage_to_the_ledger_stops_training_and_nothing_else(plain: Hospital) -> None:
    assert answer(plain) == ""
    (plain.home / "ledger.sqlite").unlink()
    assert answer(plain, run="run-2") == "ledger-damaged"
    evaluation = plain.answer(plain.order(wire.EvaluateOrder, run="run-2"))
    assert isinstance(evaluation, wire.EvaluateReport)
    assert plain.site.ledger.rebuild() == 1
    assert answer(plain, run="run-3") == ""


def test_signatures_cover_the_noise(plain: Hospital) -> None:
    """A study file changed on the site's disk is not the study that the coordinator signed."""
    path = plain.home / "studies" / f"{plain.study.digest}.json"
    text = path.read_text()
    assert plain.study.privacy != "none"
    old = f'\\"noise_multiplier\\":{plain.study.privacy.noise_multiplier}'
    assert old in text
    keys.write_private(path, text.replace(old, '\\"noise_multiplier\\":0.05').encode())
    assert answer(plain) != ""


# Figures with noise of their own.


def noised(privacy: str = LOCAL, **change: str) -> Study:
    text = privacy.replace("spare_rounds: 1", "spare_rounds: 1, figures: noised, figures_epsilon: 2")
    last = {"bins__50": "bins: 20, select: last, site_figures: false"}
    return private(text, **last, **change)


@pytest.mark.parametrize("privacy", [LOCAL, DISTRIBUTED])
def test_noised_figures_leave_once_for_the_test_split_and_are_charged_to_its_patients(
    tmp_path: Path, privacy: str
) -> None:
    plan = noised(privacy)
    found = federation(tmp_path, plan)
    folder = found.run()
    results = json.loads((folder / "results.json").read_text())
    assert read_facts(folder)["label"] == "complete" and results["ingested"] == 0
    for entry in results["rounds"]:
        assert entry["validation"]["images"] == 0 and entry["validation"]["loss"] is None
    counts = np.array(results["test"]["counts"])
    assert counts.shape == (1, 2, 20) and counts.min() >= 0
    assert results["test"]["patients"] == results["test"]["images"] == counts.sum()
    for name, hospital in found.hospitals.items():
        assert kinds(hospital) == ["reserve", "commit"] * 3
        event = plan.figures_event()
        assert event is not None and entries(hospital)[4]["event"]["noise_multiplier"] == event.noise_multiplier
        charged = hospital.site.ledger.spendings(0.001)["total"]
        alone = accounting.epsilon([event], 0.001)
        # Nobody is in both splits: the most used patient is one that was trained on.
        assert alone <= 2 < charged.charged <= 50
        assert not set.union(*found.cohort(name, "train").identities) & set.union(
            *found.cohort(name, "test").identities
        )
    page = report.write(results, tmp_path / "report").read_text()
    assert "noise of their own" in page and "test figures" in page


def test_the_sum_of_noisy_counts_is_the_exact_sum_and_the_noise_of_every_site(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without noise the pooled counts are those of the first images of each test patient, counted here by hand."""
    monkeypatch.setattr(noise.DiscreteGaussian, "add_to", lambda self, total, stream: None)
    plan = noised(LOCAL)
    found = federation(tmp_path, plan)
    folder = found.run()
    run = Run.open(folder)
    assert run.model is not None
    net, expected = networks.build(plan), np.zeros((1, 2), np.int64)
    networks.load_vector(net, run.model)
    for name in THREE:
        cohort = found.cohort(name, "test")
        for patient in sorted(set(cohort.patients.tolist())):
            rows = torch.nonzero(cohort.patients == patient).flatten()[:2]
            for row in rows.tolist():
                expected[0, int(cohort.targets[row, 0])] += 1
    results = json.loads((folder / "results.json").read_text())
    assert np.array(results["test"]["counts"]).sum(axis=2).tolist() == expected.tolist()


def test_asked_again_a_site_sends_the_same_noise_and_for_another_model_nothing(tmp_path: Path) -> None:
    """Fresh noise for the same counts could be averaged away, figures of a second model would be a second release."""
    plan = noised(LOCAL, **{"protection__masked": "protection: plain"})
    hospital = Hospital.open(tmp_path, "north", plan)
    permissive(hospital)

    def sent(**change: Any) -> np.ndarray:
        order = hospital.order(wire.EvaluateOrder, split="test", scale=0, **change)
        report = hospital.answer(order)
        assert isinstance(report, wire.EvaluateReport)
        encoding = Encoding(40, contributions.count_of(plan, "evaluate"), 32, 0, 3)
        total = encoding.zeros()
        total.add(encoding.vector_of(report.vector))
        return encoding.decode(total).values

    first, again = sent(run="run-1"), sent(run="run-2", attempt=4, sum=9)
    assert np.array_equal(first, again) and np.count_nonzero(first) > 20
    assert kinds(hospital) == ["reserve", "commit"]
    other = first_model(plan) + np.float32(1)
    assert not sent(run="run-3", model=other).any() and kinds(hospital) == ["reserve", "commit"]
    validation = hospital.answer(hospital.order(wire.EvaluateOrder, split="validation", scale=0, run="run-4"))
    assert isinstance(validation, wire.EvaluateReport)
    assert not np.frombuffer(validation.vector, np.uint8).any(), "of validation nothing leaves at all"


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        ("select: last", "select: best_validation", "select has to be last"),
        ("site_figures: false", "site_figures: true", "exact figures"),
        ("bins: 20", "bins: 500", "the most"),
    ],
)
def test_noised_figures_beside_exact_ones_are_a_conflict(before: str, after: str, sentence: str) -> None:
    with pytest.raises(StudyConflict, match=sentence):
        noised(LOCAL, **{before.replace(": ", "__"): after})


def test_the_noise_of_a_count_covers_all_images_that_a_patient_may_add() -> None:
    plan = noised(LOCAL)
    event = plan.figures_event()
    assert event is not None
    assert plan.figures_deviation == pytest.approx(event.noise_multiplier * 2)
    assert (
        accounting.epsilon([event], 0.001)
        <= 2
        < accounting.epsilon([replace(event, noise_multiplier=event.noise_multiplier * 0.97)], 0.001)
    )
    statement = plan.statements()[-1]
    assert statement.tier == "test-figures" and statement.epsilon <= 2 and "test split" in statement.sentence()
    assert private(LOCAL).figures_deviation == 0 and private(LOCAL).figures_event() is None


def test_at_most_so_many_images_of_a_patient_are_counted() -> None:
    cohort = Few(range(12))
    cohort.patients = torch.tensor([0, 1, 0, 0, 2, 1, 1, 0])
    assert learning.first_images(cohort, 2).tolist() == [0, 1, 2, 4, 5]
    assert learning.first_images(cohort, 9).tolist() == list(range(8))


def test_a_release_of_figures_takes_no_round_of_training_away_and_gives_none(tmp_path: Path) -> None:
    plan = noised(LOCAL, **{"protection__masked": "protection: plain"})
    hospital = Hospital.open(tmp_path, "north", plan)
    permissive(hospital)
    released = hospital.answer(hospital.order(wire.EvaluateOrder, split="test", scale=0))
    assert isinstance(released, wire.EvaluateReport)
    assert [answer(hospital, run=f"run-{n}", attempt=n, sum=n) for n in (2, 3, 4)] == ["", "", ""]
    assert answer(hospital, run="run-5") == "budget-exceeded"


# What a distributed sum needs of each site, so that it has all of the noise.


@pytest.mark.parametrize("scale", [17, 19, 0, 30])
def test_an_order_at_another_scale_is_refused_before_anything_is_charged(tmp_path: Path, scale: int) -> None:
    """At a large scale a lying coordinator would have every site's noise cut off before it could add up."""
    plan = private(DISTRIBUTED)
    hospital = Hospital.open(tmp_path, "north", plan)
    permissive(hospital)
    assert answer(hospital, scale=scale, participants=tuple(sorted(THREE))) == "step-refused"
    assert not (hospital.home / "ledger.sqlite").exists() or kinds(hospital) == []


def test_a_noisy_sum_reaches_the_words_without_a_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 holds whole numbers to 2**24: 64 clip norms."""
    plan, seen = private(DISTRIBUTED), []
    honest = dpsgd.private_gradient

    def watched(*given: Any) -> Any:
        noisy, rest = honest(*given)
        noisy += 2**28 + 1
        seen.append(noisy.copy())
        return noisy, rest

    monkeypatch.setattr(dpsgd, "private_gradient", watched)
    update = learned(Few(range(12)), plan)
    encoding = Encoding(len(update.delta), 0, 32, noise.GRID_BITS, 3)
    words = encoding.encode(update.delta, 1, np.zeros(0, np.int64)).values.view("<i4")
    assert np.array_equal(words, seen[0])


def test_a_step_that_might_be_cut_off_is_refused() -> None:
    shared = private(DISTRIBUTED)
    _check_room(shared, 3000, 3)
    with pytest.raises(PrivacyError, match="may not fit into 32 bits"):
        _check_room(shared, 10_000, 3)
    _check_room(shared.model_copy(update={"encoding_bits": 64}), 10_000_000, 3)
    _check_room(private(LOCAL), 10_000_000, 3)
