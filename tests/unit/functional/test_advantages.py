"""KL estimators, rewards, advantages and whitening, by hand and against other formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from align.functional.advantages import (
    gae,
    group_normalised,
    k1,
    k2,
    k3,
    last_tokens,
    reinforce_baseline,
    rloo,
    token_rewards,
    whiten,
)


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def categorical(spread: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Log-probs of a policy and of a reference nearby, over 50 tokens."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(50, generator=generator, dtype=torch.float64)
    other = logits + spread * torch.randn(50, generator=generator, dtype=torch.float64)
    return logits.log_softmax(0), other.log_softmax(0)


# Estimators


def test_estimators_agree_with_the_exact_kl() -> None:
    """Over 20,000 samples k1 and k3 are within 5 % of the exact KL and k2 near it; k1 is negative for many tokens,
    k3 for none."""
    policy, reference = categorical(0.35)
    exact = float((policy.exp() * (policy - reference)).sum())
    assert 0.02 < exact < 0.2
    drawn = torch.multinomial(policy.exp(), 20_000, replacement=True, generator=torch.Generator().manual_seed(1))
    ratio = (policy - reference)[drawn]
    assert float(k1(ratio).mean()) == pytest.approx(exact, rel=0.05)
    assert float(k3(ratio).mean()) == pytest.approx(exact, rel=0.05)
    assert float(k2(ratio).mean()) == pytest.approx(exact, rel=0.15)
    assert 0.2 < float((k1(ratio) < 0).double().mean()) < 0.6
    assert float(k3(ratio).min()) >= 0
    assert float(k3(ratio).var()) < float(k1(ratio).var())


def test_estimators_by_hand() -> None:
    """log ratio ln 2: k1 = .6931, k2 = .2402, k3 = 1/2 - 1 + .6931 = .1931."""
    ratio = t(2.0).log()
    assert_close(torch.cat([k1(ratio), k2(ratio), k3(ratio)]), t(0.693147, 0.240227, 0.193147), atol=1e-6, rtol=0)


def test_where_each_estimator_may_stand() -> None:
    """As a detached reward k1 gives the gradient of the KL; as a loss it gives nothing; k3 detached gives another
    gradient.

    Exact expectations over all 50 tokens, so there is no sampling noise.
    """
    _, reference = categorical(0.7)
    logits = categorical(0.7)[0].clone().requires_grad_()

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, logits)[0]

    policy = logits.log_softmax(0)
    p, ratio = policy.exp(), policy - reference
    exact = gradient((p * ratio).sum())
    policy = logits.log_softmax(0)
    ratio = policy - reference
    as_reward = gradient((p.detach() * k1(ratio).detach() * policy).sum())  # score-function gradient of the penalty
    assert_close(as_reward, exact, atol=1e-12, rtol=0)
    policy = logits.log_softmax(0)
    as_loss = gradient((p.detach() * k1(policy - reference)).sum())
    assert float(as_loss.abs().max()) < 1e-12
    policy = logits.log_softmax(0)
    other = gradient((p.detach() * k3(policy - reference).detach() * policy).sum())
    assert float((other - exact).abs().max()) > 0.1 * float(exact.abs().max())


# Rewards


def test_the_score_lies_on_the_last_token() -> None:
    """An answer that ends after three tokens, and one of full length: the score is on the last token of each,
    once."""
    branch = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    assert_close(
        token_rewards(torch.zeros(8), torch.tensor([1.0, 2.0]), branch, 0.1), torch.tensor([0.0, 0, 1, 0, 0, 0, 0, 2])
    )


def test_rewards_sum_to_score_minus_kl() -> None:
    """By hand, beta .1 and kl (.5, -.2, .3): rewards (-.05, .02, 1 - .03), sum 1 - .1 * .6. Nothing flows back
    through them."""
    kl = torch.tensor([0.5, -0.2, 0.3], requires_grad=True)
    rewards = token_rewards(kl, torch.tensor([1.0]), torch.zeros(3, dtype=torch.long), 0.1)
    assert_close(rewards, torch.tensor([-0.05, 0.02, 0.97]))
    assert float(rewards.sum()) == pytest.approx(1 - 0.1 * 0.6)
    assert not rewards.requires_grad


@pytest.mark.parametrize(("branch", "count"), [([0, 0, 2], 3), ([0, 1, 0], 2), ([0, 0], 2)])
def test_empty_and_mixed_answers_are_refused(branch: list[int], count: int) -> None:
    with pytest.raises(ValueError, match="answer after answer"):
        last_tokens(torch.tensor(branch), count)


# GAE


def test_gae_by_hand() -> None:
    """Delta = (.2, .2, .4); A = (.2 + .95 * .58, .2 + .95 * .4, .4)."""
    advantages = gae(t(0, 0, 1), t(0.2, 0.4, 0.6), torch.zeros(3, dtype=torch.long), 1.0, 0.95)
    assert_close(advantages, t(0.751, 0.58, 0.4))


def naive(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """One answer, from the end."""
    advantages, following, value = [0.0] * len(rewards), 0.0, 0.0
    for i in reversed(range(len(rewards))):
        following = rewards[i] + gamma * value - values[i] + gamma * lam * following
        advantages[i], value = following, values[i]
    return advantages


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)])
def test_gae_of_many_answers_is_that_of_each(gamma: float, lam: float) -> None:
    """Answers of 1 to 9 tokens together are what each is alone; huge values of a neighbour change nothing."""
    generator = torch.Generator().manual_seed(2)
    lengths = [3, 1, 9, 2, 1, 5]
    branch = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    rewards, values = (torch.randn(len(branch), generator=generator, dtype=torch.float64) for _ in range(2))
    values[branch == 3] *= 1e6
    advantages = gae(rewards, values, branch, gamma, lam)
    for b in range(len(lengths)):
        own = naive(rewards[branch == b].tolist(), values[branch == b].tolist(), gamma, lam)
        assert_close(advantages[branch == b], torch.tensor(own, dtype=torch.float64))


def test_lambda_one_gives_returns_to_go() -> None:
    """Gamma = lambda = 1: advantage + value = the sum of what is still to come."""
    rewards = t(1, 2, 3, 4)
    branch = torch.tensor([0, 0, 0, 1])
    values = t(5, -1, 2, 7)
    assert_close(gae(rewards, values, branch, 1.0, 1.0) + values, t(6, 5, 3, 4))


# Whitening


def test_whitening() -> None:
    """Mean 0, variance 1; without the shift the mean stays; a single value gives no NaN."""
    values = 3 + 7 * torch.randn(1000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    white = whiten(values)
    assert abs(float(white.mean())) < 1e-6 and float(white.var(unbiased=False)) == pytest.approx(1, abs=1e-4)
    kept = whiten(values, shift_mean=False)
    assert float(kept.mean()) == pytest.approx(float(values.mean()), abs=1e-9)
    assert float(kept.var(unbiased=False)) == pytest.approx(1, abs=1e-4)
    assert whiten(t(5.0)).tolist() == [0.0] and whiten(t(5.0), shift_mean=False).tolist() == [5.0]


# Advantages of answers


def test_leave_one_out_by_hand() -> None:
    """Scores 1 2 6 of one prompt: 1 - 4, 2 - 3.5, 6 - 1.5. And 5 3 of another: 2, -2. They sum to 0 in each prompt."""
    scores, prompt = t(1, 2, 6, 5, 3), torch.tensor([0, 0, 0, 1, 1])
    assert_close(rloo(scores, prompt), t(-3, -1.5, 4.5, 2, -2))


def test_group_by_hand() -> None:
    """Scores 1 3: mean 2, deviation 1: -1, 1. Equal scores: 0, not NaN."""
    advantages = group_normalised(t(1, 3, 5, 5, 5), torch.tensor([0, 0, 1, 1, 1]))
    assert_close(advantages, t(-1, 1, 0, 0, 0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("estimator", [rloo, group_normalised])
def test_a_prompts_offset_cancels(estimator: object) -> None:
    """What only depends on the prompt teaches nothing."""
    scores, prompt = t(1, 2, 6, 5, 3), torch.tensor([0, 0, 0, 1, 1])
    shifted = scores + t(10, 10, 10, -4, -4)
    assert_close(estimator(scores, prompt), estimator(shifted, prompt))  # type: ignore[operator]


@pytest.mark.parametrize("estimator", [rloo, group_normalised])
def test_a_single_answer_cannot_be_compared(estimator: object) -> None:
    with pytest.raises(ValueError, match="single answer"):
        estimator(t(1, 2, 3), torch.tensor([0, 0, 1]))  # type: ignore[operator]


def test_the_reference_baseline_is_subtracted() -> None:
    """With the reference's own score the reward is exactly 0, and an offset of the prompt cancels."""
    scores, baselines = t(1.5, 2.0), t(1.5, 1.0)
    assert reinforce_baseline(scores, baselines).tolist() == [0.0, 1.0]
    assert_close(reinforce_baseline(scores + 9, baselines + 9), t(0, 1))
