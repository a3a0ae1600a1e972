"""What a study does not train stays as it was, bit for bit; and a run starts from the weights that its study names."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
from federation import Federation
from hospital import first_model, study
from test_private_round import DISTRIBUTED, LOCAL, Few, federation, learned, private

from fl_server import weights
from fl_server.run import Run, read_facts
from models import learning, networks

PLAIN = "network: {name: linear}"


def open_study(network: str) -> Any:
    sized = "images: {size_px: 32}"
    return study(**{sized: f"{sized}\nnetwork: {{name: small_cnn, {network}}}"})


def partly(privacy: str, part: str) -> Any:
    return private(privacy, **{PLAIN: f"network: {{name: small_cnn, trained: {part}}}"})


@pytest.mark.parametrize("part", ["head", "last_block"])
@pytest.mark.parametrize("privacy", [LOCAL, DISTRIBUTED])
def test_gradient_and_noise_go_to_trained_weights_and_nowhere_else(privacy: str, part: str) -> None:
    plan = partly(privacy, part)
    places, update = networks.trained_places(networks.build(plan)), learned(Few(range(12)), plan)
    assert update.delta.shape == places.shape and 0 < places.sum() < places.size
    assert not update.delta[~places].any()
    assert np.count_nonzero(update.delta[places]) > 0.99 * places.sum()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_decay_does_not_move_what_is_frozen(optimizer: str) -> None:
    plan = open_study("trained: head")
    plan = plan.model_copy(
        update={"training": plan.training.model_copy(update={"optimizer": optimizer, "weight_decay": 0.5})}
    )
    net = networks.build(plan)
    before, places = networks.to_vector(net), networks.trained_places(net)
    update = learning.learn(net, Few(range(12)), plan, round_number=2)
    after = networks.to_vector(net)
    assert after[~places].tobytes() == before[~places].tobytes() and not update.delta[~places].any()
    assert update.delta[places].any()


@pytest.mark.parametrize("privacy", ["none", LOCAL, DISTRIBUTED], ids=["none", "local", "distributed"])
def test_a_run_leaves_frozen_weights_as_they_were(tmp_path: Path, privacy: str) -> None:
    if privacy == "none":
        found = Federation(tmp_path, open_study("trained: last_block"))
    else:
        found = federation(tmp_path, partly(privacy, "last_block"))
    run = Run.open(found.run())
    assert len(run.history) == 2 and run.model is not None, read_facts(run.folder)
    first, places = first_model(found.plan), networks.trained_places(networks.build(found.plan))
    assert run.model[~places].tobytes() == first[~places].tobytes()
    assert (run.model[places] != first[places]).mean() > 0.5


def test_a_run_starts_from_the_file_that_its_study_names(tmp_path: Path) -> None:
    donor = study()
    donor = donor.model_copy(update={"training": donor.training.model_copy(update={"seed": 77})})
    tensors = networks.build(donor).state_dict()
    safetensors.torch.save_file(tensors, tmp_path / "w")
    sha = hashlib.sha256((tmp_path / "w").read_bytes()).hexdigest()
    plan = open_study(f"trained: head, initial: {{sha256: {sha}}}")
    found = Federation(tmp_path / "f", plan)
    lost = read_facts(found.run())
    assert lost["state"] == "failed" and "study-conflict" in lost["label"]
    weights.add(found.home.root, tmp_path / "w")
    for hospital in found.hospitals.values():
        (hospital.home / "orders.sqlite").unlink(missing_ok=True)
    run = Run.open(found.run())
    places = networks.trained_places(networks.build(plan))
    expected = networks.to_vector(networks.build(donor))
    assert run.model is not None and run.model[~places].tobytes() == expected[~places].tobytes()
