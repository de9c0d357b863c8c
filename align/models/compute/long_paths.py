"""Attention along one long path without a mask of all its pairs of tokens.

A mask of a node's tokens against all tokens before them grows with the product of the two, and the CPU's kernel keeps
it in fp32 for the backward pass: 3.5 GB a layer for a trunk of 32,000 tokens with two branches. Here a node's attention
to what came before it and its attention to itself are computed apart, which needs no mask, and joined by their
normalisers. Within a sliding window, queries are taken in stretches, whose masks grow with the window only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MASKED = 2**22
"""Up to so many pairs of a node's tokens and those on their path, one mask is the faster way: 16 MB in fp32."""

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def joined_attention(
    query: Tensor, before: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], scale: float | None
) -> Tensor:
    """Causal attention of a node's tokens to ``before``, which all of them see, and to themselves. On the CPU only.

    Args:
        query: [1, heads, n, D].
        before: keys and values of the tokens before the node's first, [1, kv heads, b, D] each.
        own: keys and values of the node's tokens, [1, kv heads, n, D] each.
        scale: of the scores; None for 1 / sqrt(D).

    Returns:
        [1, heads, n, D].
    """
    apply: Any = _Joined.apply
    result: Tensor = apply(query, *before, *own, scale)
    return result


class _Joined(torch.autograd.Function):
    """Two softmaxes over parts of the keys, with normalisers L1 and L2 (log-sums of exponentials), are parts of the
    softmax over all keys, whose normaliser is L = log(exp(L1) + exp(L2)): out = exp(L1 - L) out1 + exp(L2 - L) out2.

    The gradient by a part's keys and values is that of attention to this part alone with out and L in place of its own,
    because probabilities are exp(score - L). (FlashAttention-2, https://arxiv.org/abs/2307.08691, section 3.1.)
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, own_key: Tensor, own_value: Tensor, scale: float | None
    ) -> Tensor:
        first, first_norm = _forward(query, key, value, 0.0, False, scale=scale)
        own, own_norm = _forward(query, own_key, own_value, 0.0, True, scale=scale)
        norm = torch.logaddexp(first_norm, own_norm)  # [1, heads, n]
        shares = [(part - norm).exp().unsqueeze(-1).to(first.dtype) for part in (first_norm, own_norm)]
        joined: Tensor = first * shares[0] + own * shares[1]
        ctx.save_for_backward(query, key, value, own_key, own_value, joined, norm)
        ctx.scale = scale
        return joined

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, own_key, own_value, joined, norm = ctx.saved_tensors
        found = []
        for keys, values, causal in ((key, value, False), (own_key, own_value, True)):
            found.append(_backward(gradients[0], query, keys, values, joined, norm, 0.0, causal, scale=ctx.scale))
        (by_query, *by_first), (by_query_of_own, *by_own) = found
        return by_query + by_query_of_own, *by_first, *by_own, None


def windowed_attention(
    query: Tensor, key: Tensor, value: Tensor, window: int, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """Causal attention of the last tokens of a path within a sliding window, one stretch of ``window`` queries after
    another: each sees the stretch before it and itself.

    Args:
        query: [1, heads, n, D], of the path's last n tokens.
        key, value: [1, kv heads, m, D], of the whole path.
        window: how many tokens a token sees, itself included.
        attend: attention of the last tokens of a short path within the window.

    Returns:
        [1, heads, n, D].
    """
    before = key.shape[2] - query.shape[2]
    queries = torch.split(query, window, dim=2)
    # Split, not sliced: the backward pass of a slice fills a tensor as large as the whole with zeros
    lengths = [before % window] * bool(before % window) + [window] * (before // window)
    lengths += [part.shape[2] for part in queries]
    keys, values = (tensor.split_with_sizes(lengths, dim=2) for tensor in (key, value))
    first = len(keys) - len(queries)
    outputs = []
    for number, part in enumerate(queries, start=first):
        seen = slice(max(0, number - 1), number + 1)
        outputs.append(attend(part, torch.cat(keys[seen], dim=2), torch.cat(values[seen], dim=2)))
    return torch.cat(outputs, dim=2)
