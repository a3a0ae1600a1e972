"""The masked loss against scikit-learn and a loop in plain Python; one-class sites; missing labels."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss

from models import tasks
from privacy.errors import MessageMalformed


def plain(targets: int) -> torch.Tensor:
    return torch.ones(targets, 2)


def made(seed: int, rows: int = 40, targets: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, targets, generator=g) * 3
    truth = (torch.rand(rows, targets, generator=g) < 0.3).float()
    known = (torch.rand(rows, targets, generator=g) < 0.7).float()
    return logits, truth, known


def test_the_loss_of_one_target_is_scikit_learns_log_loss() -> None:
    logits, truth, _ = made(1, targets=1)
    expected = log_loss(truth[:, 0].numpy(), tasks.activation(logits)[:, 0].double().numpy())
    assert float(tasks.loss(logits, truth, torch.ones_like(truth), plain(1))) == pytest.approx(expected, rel=1e-5)


def test_the_loss_is_the_mean_over_known_labels_and_over_nothing_else() -> None:
    logits, truth, known = made(2)
    weights = tasks.class_weights(truth, known, balance=True)
    total, count = 0.0, 0
    for row in range(len(logits)):
        for target in range(3):
            if known[row, target]:
                p = 1 / (1 + math.exp(-float(logits[row, target])))
                label = int(truth[row, target])
                total -= float(weights[target, label]) * math.log(p if label else 1 - p)
                count += 1
    assert float(tasks.loss(logits, truth, known, weights)) == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("rubbish", [0.0, 1.0, -1.0, 7.0, math.nan, math.inf])
def test_what_stands_in_a_missing_cell_changes_neither_loss_nor_gradient(rubbish: float) -> None:
    logits, truth, known = made(3)
    dirty = torch.where(known > 0, truth, torch.full_like(truth, rubbish))
    results = []
    for targets in (truth, dirty):
        leaf = logits.clone().requires_grad_()
        value = tasks.loss(leaf, targets, known, tasks.class_weights(targets, known, balance=True))
        (gradient,) = torch.autograd.grad(value, leaf)
        assert (gradient[known == 0] == 0).all()
        results.append((float(value.detach()), gradient))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def test_balanced_classes_count_equally_and_the_mean_weight_is_one() -> None:
    truth = torch.tensor([[1.0]] * 3 + [[0.0]] * 9 + [[1.0]])
    known = torch.tensor([[1.0]] * 12 + [[0.0]])
    absent, present = tasks.class_weights(truth, known, balance=True)[0].tolist()
    assert (absent, present) == (pytest.approx(12 / 18), pytest.approx(2.0))
    assert 9 * absent == pytest.approx(3 * present)
    assert tasks.class_weights(truth, known, balance=False).tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_a_site_with_one_class_keeps_weight_one_and_a_finite_loss(label: float) -> None:
    truth, known = torch.full((5, 1), label), torch.ones(5, 1)
    weights = tasks.class_weights(truth, known, balance=True)
    assert weights.tolist() == [[1.0, 1.0]]
    assert math.isfinite(float(tasks.loss(torch.zeros(5, 1), truth, known, weights)))


def test_no_label_at_all_gives_a_loss_of_zero_and_no_gradient() -> None:
    logits = torch.randn(4, 2, requires_grad=True)
    nothing = torch.zeros(4, 2)
    value = tasks.loss(logits, nothing, nothing, tasks.class_weights(nothing, nothing, balance=True))
    torch.autograd.backward(value)
    assert float(value.detach()) == 0.0 and logits.grad is not None and not logits.grad.any()


def test_extreme_logits_keep_the_loss_finite() -> None:
    logits, truth = torch.tensor([[1e4], [-1e4]]), torch.tensor([[0.0], [1.0]])
    assert float(tasks.loss(logits, truth, torch.ones(2, 1), plain(1))) == pytest.approx(1e4)


def test_each_target_has_its_own_score() -> None:
    scores = tasks.activation(torch.tensor([[0.0, 2.0, -2.0]]))
    assert scores.numpy() == pytest.approx(1 / (1 + np.exp(-np.array([[0.0, 2.0, -2.0]]))), rel=1e-6)


@pytest.mark.parametrize(
    "shapes", [((4, 2), (4, 1), (4, 1), 2), ((4, 2), (3, 2), (4, 2), 2), ((4, 2), (4, 2), (4, 2), 1)]
)
def test_tensors_that_do_not_fit_are_refused_instead_of_broadcast(
    shapes: tuple[tuple[int, int], tuple[int, int], tuple[int, int], int],
) -> None:
    logits, truth, known, targets = shapes
    with pytest.raises(MessageMalformed):
        tasks.loss(torch.zeros(logits), torch.zeros(truth), torch.zeros(known), plain(targets))
