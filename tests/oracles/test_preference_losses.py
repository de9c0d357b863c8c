"""Each preference loss against its formula written out in plain Python floats (fp64), at known margins; and its
gradient against finite differences of that formula."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from align.functional import losses

MARGINS = [-30.0, -3.0, -0.4, 0.0, 0.2, 1.7, 25.0]


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


def numeric_gradient(formula: Callable[[float], float], at: float) -> float:
    step = 1e-5
    return (formula(at + step) - formula(at - step)) / (2 * step)


def check(
    ours: Callable[[torch.Tensor], torch.Tensor], formula: Callable[[float], float], skip_kink_at: float | None = None
) -> None:
    points = [m for m in MARGINS if m != skip_kink_at]
    margins = torch.tensor(points, dtype=torch.float64, requires_grad=True)
    values = ours(margins)
    torch.testing.assert_close(
        values.detach(), torch.tensor([formula(m) for m in points], dtype=torch.float64), atol=1e-12, rtol=1e-12
    )
    values.sum().backward()
    expected = torch.tensor([numeric_gradient(formula, m) for m in points], dtype=torch.float64)
    torch.testing.assert_close(margins.grad, expected, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3])
def test_sigmoid(beta: float, smoothing: float) -> None:
    """Beta and label smoothing reach the loss as in the formula."""
    check(
        lambda m: losses.dpo_sigmoid(m, beta, smoothing),
        lambda m: -(1 - smoothing) * log_sigmoid(beta * m) - smoothing * log_sigmoid(-beta * m),
    )


@pytest.mark.parametrize("share", [1.0, 0.75, 0.5, 0.25, 0.0])
@pytest.mark.parametrize("offset", [0.0, 0.4, 2.5])
def test_sigmoid_with_an_offset_and_a_share_of_votes(share: float, offset: float) -> None:
    """The rewards have to differ by the offset, and the probability of the chosen answer is fitted to the share of
    votes: where sigmoid(beta m - offset) is the share, nothing pulls."""
    full = [torch.full((len(MARGINS),), value, dtype=torch.float64) for value in (1 - share, offset)]
    check(
        lambda m: losses.dpo_sigmoid(m, 0.3, *full),
        lambda m: -share * log_sigmoid(0.3 * m - offset) - (1 - share) * log_sigmoid(-(0.3 * m - offset)),
    )
    if 0 < share < 1:
        at = torch.tensor([(offset + math.log(share / (1 - share))) / 0.3], dtype=torch.float64, requires_grad=True)
        losses.dpo_sigmoid(at, 0.3, full[0][:1], full[1][:1]).sum().backward()
        assert at.grad is not None and float(at.grad) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("share", [1.0, 0.75, 0.5, 0.25, 0.0])
@pytest.mark.parametrize("margin", [0.0, 0.4, 2.5])
def test_ranking_with_margins_and_shares_of_votes(share: float, margin: float) -> None:
    """As above, of a reward model's scores."""
    shares, margins = (torch.full((len(MARGINS),), value, dtype=torch.float64) for value in (share, margin))
    check(
        lambda m: losses.bradley_terry(m, torch.full_like(m, 0.5), margins, shares),
        lambda m: -share * log_sigmoid(m - 0.5 - margin) - (1 - share) * log_sigmoid(-(m - 0.5 - margin)),
    )


def test_undisputed_votes_and_no_offset_are_the_plain_losses() -> None:
    """Values and gradients, to the last bit."""
    for plain, other in (
        (
            lambda m: losses.dpo_sigmoid(m, 0.3),
            lambda m: losses.dpo_sigmoid(m, 0.3, torch.zeros_like(m), torch.zeros_like(m)),
        ),
        (
            lambda m: losses.bradley_terry(m, -m),
            lambda m: losses.bradley_terry(m, -m, torch.zeros_like(m), torch.ones_like(m)),
        ),
    ):
        at = [torch.tensor(MARGINS, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        values = [loss(m) for loss, m in zip((plain, other), at, strict=True)]
        assert torch.equal(*values)
        for value in values:
            value.sum().backward()
        assert at[0].grad is not None and at[1].grad is not None and torch.equal(at[0].grad, at[1].grad)


def test_sigmoid_starts_at_ln_2() -> None:
    """No margin, ln 2, whatever the smoothing."""
    for smoothing in (0.0, 0.2):
        assert float(losses.dpo_sigmoid(torch.zeros(1), 0.1, smoothing)) == pytest.approx(0.693147, abs=1e-6)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_hinge(beta: float) -> None:
    """The kink lies at margin 1 / beta, which is not among the points."""
    check(lambda m: losses.dpo_hinge(m, beta), lambda m: max(0.0, 1 - beta * m))


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_ipo(beta: float) -> None:
    """The target margin is 1 / (2 beta): there the loss is 0."""
    check(lambda m: losses.ipo(m, beta), lambda m: (m - 0.5 / beta) ** 2)
    assert float(losses.ipo(torch.tensor([0.5 / beta]), beta)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 1.4])
def test_simpo(gamma: float) -> None:
    """beta scales the margin, gamma is taken off after."""
    check(lambda m: losses.simpo(m, 2.0, gamma), lambda m: -log_sigmoid(2.0 * m - gamma))


def test_kto_pair() -> None:
    """Chosen is judged against the KL on rejected answers and the other way round; the constants carry no gradient."""
    chosen = torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([0.1, 2.0], dtype=torch.float64, requires_grad=True)
    values = losses.kto_pair(chosen, rejected, 0.3, 0.7, 0.2)

    def sigma(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    expected = [((1 - sigma(0.3 * (c - 0.2))) + (1 - sigma(0.3 * (0.7 - r)))) / 2 for c, r in ((0.5, 0.1), (-1.0, 2.0))]
    assert values.tolist() == pytest.approx(expected, abs=1e-12)
    values.sum().backward()
    slope = [-0.3 * sigma(x) * (1 - sigma(x)) / 2 for x in (0.3 * (0.5 - 0.2), 0.3 * (-1.0 - 0.2))]
    assert chosen.grad is not None and chosen.grad.tolist() == pytest.approx(slope, abs=1e-12)
    slope = [0.3 * sigma(x) * (1 - sigma(x)) / 2 for x in (0.3 * (0.7 - 0.1), 0.3 * (0.7 - 2.0))]
    assert rejected.grad is not None and rejected.grad.tolist() == pytest.approx(slope, abs=1e-12)


def test_every_loss_is_another_loss() -> None:
    """No option trains the default in disguise: at one margin all gradients differ."""
    gradients = set()
    for loss in (
        lambda m: losses.dpo_sigmoid(m, 0.1),
        lambda m: losses.dpo_hinge(m, 0.1),
        lambda m: losses.ipo(m, 0.1),
        lambda m: losses.simpo(m, 0.1, 1.0),
        lambda m: losses.kto_pair(m, torch.zeros_like(m), 0.1, 0.0, 0.0),
    ):
        margin = torch.tensor([0.8], dtype=torch.float64, requires_grad=True)
        loss(margin).sum().backward()
        assert margin.grad is not None
        gradients.add(round(float(margin.grad), 9))
    assert len(gradients) == 5


def test_extreme_margins_stay_finite() -> None:
    """fp32 and a margin of 1e4 nats: no infinity, no NaN, in value and gradient."""
    margins = torch.tensor([-1e4, 1e4], requires_grad=True)
    for value in (
        losses.dpo_sigmoid(margins, 1.0, 0.1),
        losses.simpo(margins, 2.0, 1.0),
        losses.dpo_hinge(margins, 1.0),
    ):
        (gradient,) = torch.autograd.grad(value.sum(), margins)
        assert value.isfinite().all() and gradient.isfinite().all()
