"""From log-probs and scores to advantages, one number for each token or one for each answer.

Shapes: T tokens of B answers, answer after answer. ``branch`` int64 [T] says which answer a token belongs to; it never
falls, and every answer has at least one token. There is no padding anywhere, so no mask can be forgotten.
"""

from __future__ import annotations

import torch
from torch import Tensor

from align.functional.segments import segment_count, segment_mean, segment_sum

# Estimators of KL(policy || reference) in nats: one value for each token that the policy sampled.
#
# ``log_ratio`` is log pi(token) - log ref(token). All three are from http://joschu.net/blog/kl-approx.html, where r =
# ref / pi.


def k1(log_ratio: Tensor) -> Tensor:
    """``log_ratio``: unbiased, negative for about half of the tokens.

    Subtract this one, detached, from a reward: the policy gradient is then the gradient of the KL itself. With k3,
    detached, in the reward it would be another gradient. As a *loss* k1 teaches nothing: the expectation of its
    gradient is zero.
    """
    return log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """``log_ratio^2 / 2``: biased, never negative."""
    return log_ratio**2 / 2


def k3(log_ratio: Tensor) -> Tensor:
    """``exp(-log_ratio) - 1 + log_ratio``: unbiased and never negative; it has less noise than k1 and is the one to
    log."""
    return torch.expm1(-log_ratio) + log_ratio


# Rewards


def token_rewards(kl: Tensor, scores: Tensor, branch: Tensor, beta: float) -> Tensor:
    """``-beta * kl`` at every token, and the answer's score at its last token -> [T], without gradient.

    The KL-penalised objective of https://arxiv.org/abs/1909.08593, eq. 2, paid out token by token. An answer's rewards
    sum to ``score - beta * sum(kl)``.

    Args:
        kl: [T], of each token.
        scores: [B], of each answer.
    """
    rewards = -beta * kl.detach()
    rewards[last_tokens(branch, len(scores))] += scores.detach()
    return rewards


def last_tokens(branch: Tensor, num_branches: int) -> Tensor:
    """Index of each answer's last token -> int64 [B].

    Raises:
        ValueError: an answer has no token, or tokens of different answers are mixed.
    """
    counts = segment_count(branch, num_branches)
    if len(counts) != num_branches or bool((counts == 0).any()) or bool((branch.diff() < 0).any()):
        raise ValueError("tokens must lie answer after answer, and every answer needs at least one")
    return counts.cumsum(0) - 1


# Advantages of tokens


def gae(rewards: Tensor, values: Tensor, branch: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimation -> [T] (https://arxiv.org/abs/1506.02438, eq. 16); ``advantages + values`` are
    the returns.

    ``A[t] = delta[t] + gamma * lam * A[t + 1]`` with ``delta[t] = r[t] + gamma * V[t + 1] - V[t]``; after an answer's
    last token there is nothing to come. ``values[t]`` is the value of the state in which token t is chosen.

    Example: rewards 0 0 1, values .2 .4 .6, gamma 1, lam .95 -> .751 .58 .4
    """
    num_branches = int(branch[-1]) + 1
    last = last_tokens(branch, num_branches)
    following = torch.cat([values[1:], values.new_zeros(1)])
    following[last] = 0
    advantages = rewards + gamma * following - values
    lengths = segment_count(branch, num_branches)
    for back in range(1, int(lengths.max())):  # all answers at once, each counted from its own end
        at = last[lengths > back] - back
        advantages[at] += gamma * lam * advantages[at + 1]
    return advantages


def whiten(values: Tensor, *, shift_mean: bool = True, epsilon: float = 1e-8) -> Tensor:
    """``values`` scaled to variance 1 and, with ``shift_mean``, moved to mean 0; same shape.

    Pass all values of a step together: the result for a part of them would depend on how the step is cut. A single
    value has no variance: it becomes 0, or is returned unchanged without ``shift_mean``.
    """
    mean = values.mean()
    scaled = (values - mean) * torch.rsqrt(values.var(unbiased=False) + epsilon)
    return scaled if shift_mean else scaled + mean


# Advantages of answers: one number for all tokens of an answer
#
# ``scores`` [B] are the answers' rewards, KL penalty included; ``prompt`` int64 [B] says which answers are to the same
# prompt.


def rloo(scores: Tensor, prompt: Tensor) -> Tensor:
    """The score minus the mean of the prompt's other answers -> [B] (REINFORCE leave-one-out,
    https://arxiv.org/abs/2402.14740).

    Raises:
        ValueError: a prompt has a single answer.
    """
    counts = _answers(prompt)
    total = segment_sum(scores, prompt, len(counts))
    others = (total[prompt] - scores) / (counts[prompt] - 1)
    return scores - others


def group_normalised(scores: Tensor, prompt: Tensor, epsilon: float = 1e-6) -> Tensor:
    """The score minus the mean of the prompt's answers, in units of their standard deviation -> [B].

    GRPO (https://arxiv.org/abs/2402.03300, section 4.1.2), with the standard deviation of exactly these answers (the
    sum of squares divided by n, not n - 1). Zero where all answers of a prompt score the same.

    Raises:
        ValueError: a prompt has a single answer.
    """
    counts = _answers(prompt)
    centred = scores - segment_mean(scores, prompt, len(counts))[prompt]
    deviation = segment_mean(centred**2, prompt, len(counts)).sqrt()
    return centred / (deviation[prompt] + epsilon)


def reinforce_baseline(scores: Tensor, baselines: Tensor) -> Tensor:
    """The score minus the score of the reference model's answer to the same prompt -> [B]: REINFORCE with the baseline
    of ChatGLM-RLHF (https://arxiv.org/abs/2404.00934). The baseline does not depend on the answer, so the gradient
    stays unbiased."""
    return scores - baselines


def _answers(prompt: Tensor) -> Tensor:
    """Number of answers to each prompt; ValueError where it is one."""
    counts = segment_count(prompt, int(prompt.max()) + 1)
    if bool((counts == 1).any()):
        raise ValueError("a prompt with a single answer has no other to be compared with")
    return counts
