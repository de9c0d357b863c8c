"""PPO's losses as pure functions: one value for each token. The trainer sums and divides, once, by the step's global
count.

Shapes: N tokens. "Old" means: computed by the policy (or value model) as it was when the answers were sampled, before
the iteration's first step.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ppo_policy_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """``-min(ratio * A, clip(ratio, 1 - clip, 1 + clip) * A)`` -> [N] (https://arxiv.org/abs/1707.06347, eq. 7).

    Example: ratio e, clip 0.2: with A = 1 the loss is -1.2, with A = -1 it is e.
    """
    ratio = torch.exp(logprobs - old)
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def policy_clipped(logprobs: Tensor, old: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """Tokens that get no gradient because their ratio is clipped -> bool [N]."""
    ratio = torch.exp(logprobs - old)
    return ((ratio > 1 + clip) & (advantages > 0)) | ((ratio < 1 - clip) & (advantages < 0))


def ppo_value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """Half the squared error of a value, or of the clipped value where that error is larger -> [N].

    A value that moves further than ``clip`` from the old one gains nothing more: ``max((V - R)^2, (clip(V, old +- clip)
    - R)^2) / 2``, as in the code of https://arxiv.org/abs/1707.06347. None does not clip.
    """
    error = (values - returns) ** 2
    if clip is not None:
        error = torch.maximum(error, (_held(values, old, clip) - returns) ** 2)
    return error / 2


def value_clipped(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Values that get no gradient because they are clipped -> bool [N]."""
    held = _held(values, old, clip)
    return (held != values) & ((held - returns) ** 2 > (values - returns) ** 2)


def _held(values: Tensor, old: Tensor, clip: float) -> Tensor:
    return torch.minimum(torch.maximum(values, old - clip), old + clip)


def truncated_importance_weights(trainer: Tensor, engine: Tensor, cap: float) -> Tensor:
    """``min(exp(trainer - engine), cap)`` -> [N], without gradient: the weight of a token in the loss, which corrects
    for the engine's log-probs differing from the trainer's.

    Truncation bounds the variance (https://arxiv.org/abs/1802.01561, eq. 1).

    Args:
        trainer: log-probs of the sampled tokens, [N], as the trainer computes them.
        engine: the same, as the engine that sampled them reported them.
        cap: largest weight.
    """
    return torch.exp(trainer - engine).clamp(max=cap).detach()
