"""The one log-prob function: every policy, reference and old-policy log-prob of every stage comes from here.

Convention, once and for all: ``logprobs[t]`` belongs to ``tokens[t]``. The caller gathers the hidden states of the
tokens *before* the targets; nothing else in the package shifts.

Shapes: N target tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# fp32 logits that exist at once, in elements. Small on CPU so that a chunk stays near the cache; large on a GPU so that
# the matrix product fills it. 2**25 elements are 128 MiB.
_CHUNK_ELEMENTS = {"cpu": 2**25, "cuda": 2**28}


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Log-probability of each target under ``softmax(logits / temperature)``, in fp32.

    Args:
        hidden: [N, H], the last hidden states from which the targets are predicted.
        weight: [V, H], the LM head.
        targets: int64 [N].
        bias: [V], the LM head's bias, if it has one.
        temperature: sampling temperature, > 0. Rollouts and training must use the same one.
        logit_scale: the model's own factor on its logits (Cohere, Granite); 1 for most.
        logit_softcap: ``cap * tanh(logits / cap)`` (Gemma); None for most.
        chunk_tokens: targets projected at once; chosen from V when None. Changes memory, not the result.

    Returns:
        fp32 [N]. The [N, V] logits never exist as a whole: they are made chunk by chunk, and made again in the backward
        pass. Only the last chunk's logits are kept: the backward pass begins with them, so keeping them does not raise
        the peak of memory and saves a matrix product.

    Raises:
        ValueError: temperature is not positive.
    """
    if temperature <= 0:
        raise ValueError(
            f"temperature must be positive, got {temperature}; greedy rollouts have no log-probs to train on"
        )
    hidden = _compute_dtype(hidden)
    chunk_tokens = chunk_tokens or _chunk_tokens(hidden, weight)
    apply: Callable[..., Tensor] = _TokenLogprobs.apply
    return apply(hidden, weight, bias, targets, logit_scale, logit_softcap, temperature, chunk_tokens)


def _compute_dtype(hidden: Tensor) -> Tensor:
    """The states as the LM head multiplies them: on a GPU under autocast in its dtype, like every other linear layer.

    fp32 weights leave fp32 states behind the last norm, and in fp32 the head would take a fifth of a step of GLM-4-9B.
    """
    if hidden.is_cuda and torch.is_autocast_enabled("cuda"):
        return hidden.to(torch.get_autocast_dtype("cuda"))
    return hidden


def _chunk_tokens(hidden: Tensor, weight: Tensor) -> int:
    return max(1, _CHUNK_ELEMENTS.get(hidden.device.type, 2**26) // weight.shape[0])


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None, temperature: float
) -> Tensor:
    """fp32 logits [n, V] of one chunk, as they enter the softmax. The caller may overwrite them."""
    logits = torch.mm(hidden, weight.t()).float()
    if bias is not None:
        logits += bias
    if scale != 1.0:
        logits *= scale
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    if temperature != 1.0:
        logits /= temperature
    return logits


class _TokenLogprobs(torch.autograd.Function):
    """Chunked log-softmax-and-gather whose backward recomputes the logits of each chunk but the last.

    d logprob[n] / d logits[n, v] = [v == target[n]] - softmax(logits[n])[v].
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        softcap: float | None,
        temperature: float,
        chunk: int,
    ) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            head = weight.to(hidden.dtype)
            normaliser = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
            chosen = torch.empty_like(normaliser)
            logits = None
            for start in range(0, len(targets), chunk):
                part = slice(start, start + chunk)
                logits = None  # freed before the next chunk's are made
                logits = _logits(hidden[part], head, bias, scale, softcap, temperature)
                chosen[part] = logits.gather(1, targets[part, None]).squeeze(1)
                normaliser[part] = torch.logsumexp(logits, dim=1)
        ctx.save_for_backward(hidden, weight, bias, targets, normaliser)
        ctx.last_logits = logits if any(ctx.needs_input_grad) else None
        ctx.settings = (scale, softcap, temperature, chunk)
        return chosen - normaliser

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        hidden, weight, bias, targets, normaliser = ctx.saved_tensors
        scale, softcap, temperature, chunk = ctx.settings
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        with torch.autocast(hidden.device.type, enabled=False):
            head = weight.to(hidden.dtype)
            grad_hidden = torch.empty_like(hidden) if needs_hidden else None
            grad_weight: Tensor | None = None  # summed in fp32 over the chunks, in whatever type the head is stored
            grad_bias = torch.zeros(len(weight), dtype=torch.float32, device=weight.device) if needs_bias else None
            # Overwritten below: a second backward pass makes them again
            logits, ctx.last_logits = ctx.last_logits, None
            for start in reversed(range(0, len(targets), chunk)):
                part = slice(start, start + chunk)
                if logits is None:
                    logits = _logits(hidden[part], head, bias, scale, softcap, temperature)
                slope = None if softcap is None else 1 - (logits * (temperature / softcap)) ** 2
                d_logits = logits.sub_(normaliser[part, None]).exp_().mul_(-grad[part, None])
                logits = None
                d_logits.scatter_add_(1, targets[part, None], grad[part, None])
                if slope is not None:
                    d_logits *= slope
                if scale != temperature:
                    d_logits *= scale / temperature
                if grad_bias is not None:
                    grad_bias += d_logits.sum(0)
                d_logits = d_logits.to(hidden.dtype)
                if grad_hidden is not None:
                    grad_hidden[part] = d_logits @ head
                if needs_weight and grad_weight is None:
                    grad_weight = (d_logits.t() @ hidden[part]).float()
                elif grad_weight is not None and grad_weight.dtype == d_logits.dtype:
                    grad_weight.addmm_(d_logits.t(), hidden[part])
                elif grad_weight is not None:
                    grad_weight += d_logits.t() @ hidden[part]
                del d_logits  # freed before the next chunk's logits are made
        if needs_weight and grad_weight is None:  # no targets at all
            grad_weight = torch.zeros_like(weight)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
            None,
        )


def token_logprobs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs as :func:`token_logprobs` has them, and the entropy in nats of each distribution they come from: fp32
    [N] and [N].

    Both have gradients. The arguments are those of :func:`token_logprobs`. The logits of every chunk, the last
    included, are made again in the backward pass, which costs one matrix product more than :func:`token_logprobs`: call
    this only when the entropy is needed.

    Raises:
        ValueError: temperature is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    hidden = _compute_dtype(hidden)
    chunk_tokens = chunk_tokens or _chunk_tokens(hidden, weight)

    def one(part: Tensor, ids: Tensor, head: Tensor, offset: Tensor | None) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            logits = torch.nn.functional.linear(part, head.to(part.dtype)).float()
            logits = (logits if offset is None else logits + offset) * logit_scale
            if logit_softcap is not None:
                logits = torch.tanh(logits / logit_softcap) * logit_softcap
            logs = torch.log_softmax(logits / temperature, dim=1)
            return torch.stack([logs.gather(1, ids[:, None]).squeeze(1), -(logs.exp() * logs).sum(1)])

    parts = [
        checkpoint(one, hidden[i : i + chunk_tokens], targets[i : i + chunk_tokens], weight, bias, use_reentrant=False)
        for i in range(0, max(1, len(targets)), chunk_tokens)  # without targets as well: there is a gradient, of zeros
    ]
    logprobs, entropy = torch.cat(parts, dim=1)
    return logprobs, entropy
