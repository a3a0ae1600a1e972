"""Scores of classes sum to one, steps of a grade never cross, and the loss of both is what a loop says."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from models import learning, networks, relations, tasks
from models.study import Study, parse
from privacy import dpsgd
from privacy.errors import DocumentError


class Given(nn.Module):
    """A network that answers with what it is shown."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images


def rows(seed: int, columns: int, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(20, columns, generator=torch.Generator().manual_seed(seed)) * spread


@given(st.integers(0, 10_000), st.integers(2, 32), st.sampled_from([0.1, 3.0, 30.0]))
def test_scores_of_exclusive_classes_are_the_softmax(seed: int, classes: int, spread: float) -> None:
    shown = rows(seed, classes, spread)
    scores = tasks.activation(relations.related(Given(), "exclusive", classes)(shown))
    exact = np.exp(shown.double().numpy())
    np.testing.assert_allclose(scores.numpy(), exact / exact.sum(1, keepdims=True), atol=2e-6)


def test_certain_classes_have_finite_logits_and_gradients() -> None:
    shown = torch.tensor([[300.0, -300.0, 0.0]], requires_grad=True)
    logits = relations.related(Given(), "exclusive", 3)(shown)
    assert torch.isfinite(logits).all()
    torch.autograd.backward(tasks.loss(logits, torch.tensor([[0.0, 1.0, 0.0]]), torch.ones(1, 3), torch.ones(3, 2)))
    assert shown.grad is not None and torch.isfinite(shown.grad).all()


def test_the_loss_of_exclusive_classes_is_least_at_the_true_probabilities() -> None:
    """A proper score: of all answers, the true distribution of a population is the best one."""
    truth = torch.eye(3).repeat_interleave(torch.tensor([50, 30, 20]), dim=0)
    answer = torch.zeros(3, requires_grad=True)
    best = torch.optim.LBFGS([answer], max_iter=100)
    net = relations.related(Given(), "exclusive", 3)

    def closure() -> torch.Tensor:
        best.zero_grad()
        value = tasks.loss(net(answer.expand(100, 3)), truth, torch.ones(100, 3), torch.ones(3, 2))
        torch.autograd.backward(value)
        return value

    best.step(closure)
    np.testing.assert_allclose(torch.softmax(answer.detach(), 0).numpy(), [0.5, 0.3, 0.2], atol=1e-3)


@given(st.integers(0, 10_000), st.integers(2, 24))
def test_a_higher_grade_is_never_more_probable_than_a_lower_one(seed: int, steps: int) -> None:
    net = relations.related(Given(), "ordered", steps)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 4)
    scores = tasks.activation(net(rows(seed, 1)))
    assert scores.shape == (20, steps)
    assert (scores.diff(dim=1) <= 0).all()


def test_the_thresholds_of_an_untrained_network_lie_evenly_around_zero() -> None:
    logits = relations.related(Given(), "ordered", 5)(torch.zeros(1, 1))
    np.testing.assert_allclose(logits.detach().numpy()[0], [1.0, 0.5, 0.0, -0.5, -1.0], atol=1e-5)


def test_the_loss_of_grades_is_a_loop_over_thresholds() -> None:
    net = relations.related(Given(), "ordered", 3)
    shown, grades = rows(1, 1), torch.arange(20) % 4
    truth = torch.stack([(grades >= step).float() for step in (1, 2, 3)], dim=1)
    total = 0.0
    for row in range(20):
        for step, threshold in enumerate((-1.0, 0.0, 1.0)):
            p = 1 / (1 + math.exp(-(float(shown[row, 0]) - threshold)))
            total -= math.log(p if truth[row, step] else 1 - p)
    value = tasks.loss(net(shown), truth, torch.ones(20, 3), torch.ones(3, 2))
    assert float(value.detach()) == pytest.approx(total / 60, rel=1e-5)


def test_independent_targets_leave_the_network_as_it_is() -> None:
    net = Given()
    assert relations.related(net, "independent", 3) is net


@pytest.mark.parametrize("relation", ["exclusive", "ordered"])
def test_patients_stay_isolated_under_a_relation(relation: str) -> None:
    """Private training finds an engine for it, whose clipped sum is that of patients one by one."""
    text = HEAD.format(targets="p, q, r", relation=relation).replace(
        "training: {rounds: 1}\nprivacy: none",
        "network: {name: linear}\ntraining: {rounds: 1, balance: false}\n"
        "privacy: {mode: local, epsilon: 3, clip_norm: 1.0, sampling_rate: 0.5, noise_multiplier: 1.0, images_per_patient: 2}",
    )
    study = parse(Study, text, "study.yaml")
    net = networks.build(study)
    assert learning.engine_of(net, study) is not None
    generator = torch.Generator().manual_seed(3)
    pair = [
        (
            torch.rand(1, 2, 1, 96, 96, generator=generator),
            torch.tensor([[[1.0, 0, 0], [1.0, 0, 0]]]),
            torch.ones(1, 2, 3),
        )
        for _ in range(2)
    ]
    dpsgd.check_isolation(net, learning.patient_losses, pair)


HEAD = """
version: 1
name: graded
title: Grades
purpose: To grade.
task: {{kind: classification, targets: [{targets}], relation: {relation}}}
training: {{rounds: 1}}
privacy: none
participation: {{sites: [a, b, c], quorum: 3}}
"""


@pytest.mark.parametrize("relation", ["exclusive", "ordered"])
def test_one_target_relates_to_nothing(relation: str) -> None:
    with pytest.raises(DocumentError, match="two targets or more"):
        parse(Study, HEAD.format(targets="only", relation=relation), "study.yaml")


@pytest.mark.parametrize(
    ("relation", "row", "fits"),
    [
        ("independent", (1, None, 1), True),
        ("exclusive", (0, 1, 0), True),
        ("exclusive", (0, 0, 0), False),  # none of the classes
        ("exclusive", (1, 1, 0), False),
        ("exclusive", (1, None, 0), False),  # a class is not known
        ("ordered", (1, 1, 0), True),
        ("ordered", (0, 0, 0), True),
        ("ordered", (0, 1, 0), False),  # at least 2 and not at least 1
        ("ordered", (1, None, 0), True),  # the grade is 1 or 2: one threshold is not known
        ("ordered", (0, None, 1), False),
    ],
)
def test_labels_that_contradict_the_relation_are_seen(relation: str, row: tuple[int | None, ...], fits: bool) -> None:
    study = parse(Study, HEAD.format(targets="p, q, r", relation=relation), "study.yaml")
    assert study.task.kind == "classification" and study.task.admits(row) is fits
