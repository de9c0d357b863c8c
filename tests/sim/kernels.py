"""Attention as a GPU computes it: fused kernels that keep queries, keys, values, the output and one number a query, and
never the scores; and where torch has no such kernel, none.

Stand-ins for :func:`torch.nn.functional.scaled_dot_product_attention` (after the rules of torch's sdp_utils.cpp for an
H100) and for the compiled ``flex_attention``. On the CPU everything is as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from align.models.compute import attention, flex
from tests.sim.device import Simulation, kind_of, size_of

_sdpa = torch.nn.functional.scaled_dot_product_attention


class Fused(torch.autograd.Function):
    """A fused kernel that computes ``pairs`` scores."""

    @staticmethod
    def forward(ctx: Any, sim: Simulation, q: Tensor, k: Tensor, v: Tensor, pairs: float) -> Tensor:
        """Like every attention: [R, heads, L, D]."""
        out = torch.empty(q.shape[0], q.shape[1], q.shape[2], v.shape[3], dtype=q.dtype, device=q.device)
        sums = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        ctx.save_for_backward(q, k, v, out, sums)
        ctx.sim, ctx.pairs = sim, pairs
        sim.account.charge(kind_of([q]), 4.0 * pairs * q.shape[3], size_of(q, k, v, out), efficiency=0.6)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Two and a half times the work."""
        q, k, v, out, _ = ctx.saved_tensors
        moved = 2 * size_of(q, k, v, out)
        ctx.sim.account.charge(kind_of([q]), 10.0 * ctx.pairs * q.shape[3], moved, efficiency=0.5)
        return None, torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


def install(sim: Simulation) -> None:
    """Attention on CUDA goes through the stand-ins from now on."""

    def sdpa(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if query.device.type == "cuda":
            query, key, value = _autocast(query, key, value)
            if not query.dtype == key.dtype == value.dtype:
                raise RuntimeError(f"query, key and value of one dtype, not {query.dtype}, {key.dtype}, {value.dtype}")
            # In half precision cuDNN takes masks and groups, flash takes groups; in fp32 only the memory-efficient
            # kernel is left, which takes no groups.
            if query.dtype in (torch.bfloat16, torch.float16) or query.shape[1] == key.shape[1]:
                pairs = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2] * (0.5 if is_causal else 1.0)
                fused: Tensor = Fused.apply(sim, query, key, value, pairs)
                return fused
        return _sdpa(
            query,
            key,
            value,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )

    def attend(query: Tensor, key: Tensor, value: Tensor, block_mask: Any, **options: Any) -> Tensor:
        query, key, value = _autocast(query, key, value)
        layout = (query.shape, query.stride(), key.shape, key.stride())
        sim.account.compiled.add((*layout, query.dtype, torch.is_grad_enabled() and query.requires_grad))
        pairs = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2] * 0.5
        blocks = [c for c in (block_mask.kv_num_blocks, block_mask.full_kv_num_blocks) if c is not None]
        counts = [numbers for c in blocks if (numbers := sim.numbers(c)) is not None]
        if len(counts) == len(blocks):  # else the mask is too large to have numbers
            per_block = block_mask.BLOCK_SIZE[0] * block_mask.BLOCK_SIZE[1]
            pairs = query.shape[1] * per_block * sum(int(numbers.sum()) for numbers in counts)
        fused: Tensor = Fused.apply(sim, query, key, value, pairs)
        return fused

    torch.nn.functional.scaled_dot_product_attention = sdpa  # type: ignore[assignment]
    attention.scaled_dot_product_attention = sdpa  # type: ignore[assignment]
    compiled: Callable[[], Any] = lambda: attend  # noqa: E731
    flex._compiled = compiled  # type: ignore[assignment]


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    if not torch.is_autocast_enabled("cuda"):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype("cuda")) for x in tensors)
