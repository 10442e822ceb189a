"""What is counted over steps, of which some are not finite."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from common.errors import RunError
from train.optim.fused_backward import FusedBackward
from train.optim.nonfinite import MOST_IN_A_ROW, NonFiniteGuard, skip_next_update

FINITE, NOT_FINITE = torch.tensor(0.0), torch.tensor(1.0)


@pytest.fixture
def guard() -> NonFiniteGuard:
    return make_guard()


def make_guard(**settings: Any) -> NonFiniteGuard:
    return NonFiniteGuard(
        torch.optim.AdamW([nn.Parameter(torch.ones(1))]),
        update_already_applied=False,
        stop=False,
        sample_key=str,
        print=lambda _: None,
        **settings,
    )


def test_only_steps_in_a_row_end_a_run(guard: NonFiniteGuard) -> None:
    outcomes = [*[NOT_FINITE] * (MOST_IN_A_ROW - 1), FINITE, *[NOT_FINITE] * (MOST_IN_A_ROW - 1)]
    for step, nonfinite in enumerate(outcomes):
        guard.after_update(step, [step], torch.ones(1), torch.tensor([0]), nonfinite)
    guard.finish()
    guard.after_update(len(outcomes), [0], torch.ones(1), torch.tensor([0]), NOT_FINITE)
    with pytest.raises(RunError, match=f"the last {MOST_IN_A_ROW} steps were left out"):
        guard.finish()


def test_a_sum_is_of_the_finite_losses_since_the_last_one(guard: NonFiniteGuard) -> None:
    losses = torch.tensor([1.0, math.nan, 3.0])
    guard.after_update(1, [0, 1, 2], losses, torch.tensor([7, 7, 2]), NOT_FINITE)
    guard.after_update(2, [3, 4], torch.tensor([5.0, 6.0]), torch.tensor([0, 2]), FINITE)
    assert guard.pop_loss_sum() == [1 + 3, 2]  # the last step is not examined yet
    guard.after_update(3, [5], torch.tensor([7.0]), torch.tensor([2]), FINITE)
    guard.finish()
    assert guard.pop_loss_sum() == [5 + 6 + 7, 3]
    sums, numbers = [5, 0, 3 + 6 + 7, 0, 0, 0, 0, 1], [1, 0, 3, 0, 0, 0, 0, 1]
    assert guard.pop_level_sums() == sums + numbers
    assert guard.pop_level_sums() == [0] * 16


def test_each_set_has_a_sum_of_its_own() -> None:
    guard = make_guard(sample_set=lambda place: place % 3, num_sets=3)
    losses = torch.tensor([1.0, 2.0, math.nan, 4.0])
    guard.after_update(1, [0, 1, 2, 3], losses, torch.zeros(4, dtype=torch.long), NOT_FINITE)
    guard.finish()
    assert guard.pop_set_sums() == [1 + 4, 2, 0, 2, 1, 0]
    assert guard.pop_set_sums() == [0] * 6


def test_without_fused_updates_a_skipped_one_moves_nothing() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=0.1, foreach=True)
    for gradient, skipped in ((1.0, FINITE), (math.inf, NOT_FINITE)):
        before = weight.detach().clone()
        weight.grad = torch.full_like(weight, gradient)
        skip_next_update(optimizer, skipped)
        optimizer.step()
        assert torch.equal(weight, before) == bool(skipped)


def test_a_gradient_in_the_backward_pass_is_judged_once() -> None:
    layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    fused = FusedBackward(torch.optim.AdamW(layers.parameters(), fused=True))
    for factor, found in ((1.0, 0), (math.inf, 1), (1.0, 0)):
        # Only one of the four gradients is infinite.
        (layers(torch.ones(1, 2)).sum() + factor * layers[0].bias[0]).backward()
        assert fused.pop_nonfinite() == found
