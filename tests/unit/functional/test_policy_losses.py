"""PPO's losses against formulas written down here, with the arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from align.functional.policy_losses import (
    policy_clipped,
    ppo_policy_loss,
    ppo_value_loss,
    truncated_importance_weights,
    value_clipped,
)


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_policy_loss_by_hand() -> None:
    """Ratio e, clip .2: A = 1 -> -1.2 (held); A = -1 -> e. Ratio 1/e: A = 1 -> -1/e; A = -1 -> .8 (held)."""
    logprobs, old = t(1, 1, -1, -1), t(0, 0, 0, 0)
    advantages = t(1, -1, 1, -1)
    assert_close(ppo_policy_loss(logprobs, old, advantages, 0.2), t(-1.2, math.e, -1 / math.e, 0.8))
    assert policy_clipped(logprobs, old, advantages, 0.2).tolist() == [True, False, False, True]


def test_where_the_clip_holds_there_is_no_gradient() -> None:
    logprobs = t(1, 1, -1, -1, 0.1).requires_grad_()
    advantages = t(1, -1, 1, -1, 2)
    ppo_policy_loss(logprobs, torch.zeros_like(logprobs), advantages, 0.2).sum().backward()
    assert logprobs.grad is not None
    held = policy_clipped(logprobs.detach(), t(0, 0, 0, 0, 0), advantages, 0.2)
    assert ((logprobs.grad == 0) == held).all() and held.any() and not held.all()
    assert float(logprobs.grad[4]) == pytest.approx(-2 * math.exp(0.1))  # inside the clip: -A * ratio


def test_at_the_old_policy_the_gradient_is_minus_the_advantage() -> None:
    """Ratio 1, nothing held, gradient -A."""
    logprobs = t(-1, -2).requires_grad_()
    losses = ppo_policy_loss(logprobs, logprobs.detach(), t(3, -4), 0.2)
    losses.sum().backward()
    assert losses.tolist() == [-3, 4]
    assert logprobs.grad is not None and logprobs.grad.tolist() == [-3, 4]


def reference_value_loss(value: float, old: float, target: float, clip: float) -> float:
    """The clipped loss for one number, from the text of the code it comes from."""
    held = old + max(-clip, min(clip, value - old))
    return 0.5 * max((value - target) ** 2, (held - target) ** 2)


def test_value_loss_against_one_number_at_a_time() -> None:
    """500 random triples; neighbours of 1e9, where padding would be, change nothing."""
    generator = torch.Generator().manual_seed(0)
    values, old, returns = (torch.randn(500, generator=generator, dtype=torch.float64) for _ in range(3))
    expected = [
        reference_value_loss(*row, 0.2) for row in zip(values.tolist(), old.tolist(), returns.tolist(), strict=True)
    ]
    losses = ppo_value_loss(values, old, returns, 0.2)
    assert_close(losses, torch.tensor(expected, dtype=torch.float64))
    poison = torch.full((3,), 1e9, dtype=torch.float64)
    poisoned = ppo_value_loss(
        *(torch.cat([part, sign * poison]) for part, sign in ((values, 1), (old, -1), (returns, 1))), 0.2
    )
    assert_close(poisoned[:500], losses)


def test_the_value_clip_rests_where_nothing_moved() -> None:
    """V == old: the plain squared error, nothing held; and `null` never holds."""
    values, returns = t(0.5, -2), t(1, 1)
    assert_close(ppo_value_loss(values, values, returns, 0.2), t(0.125, 4.5))
    assert not value_clipped(values, values, returns, 0.2).any()
    assert_close(ppo_value_loss(t(5.0), t(0.0), t(1.0), None), t(8.0))


def test_a_held_value_has_no_gradient() -> None:
    """From 0 towards 1 by more than .2: held at .2, loss (1 - .2)^2 / 2, no gradient. Away from 1 it is never held."""
    values = t(0.5, -0.5).requires_grad_()
    losses = ppo_value_loss(values, t(0, 0), t(1, 1), 0.2)
    losses.sum().backward()
    assert_close(losses.detach(), t(0.32, 1.125))
    assert values.grad is not None and values.grad.tolist() == [0.0, -1.5]
    assert value_clipped(values.detach(), t(0, 0), t(1, 1), 0.2).tolist() == [True, False]


def test_truncated_importance_weights() -> None:
    """Ratios e^.5, 1, e^-1 with cap 1.2; no gradient."""
    trainer = t(0.5, 0, -1).requires_grad_()
    weights = truncated_importance_weights(trainer, t(0, 0, 0), 1.2)
    assert_close(weights, t(1.2, 1, math.exp(-1)))
    assert not weights.requires_grad
