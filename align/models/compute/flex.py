"""Tree attention on CUDA: the same rule as attention.py, as one fused kernel over all rows of a batch.

``flex_attention`` skips every block of 128 x 128 tokens in which nothing may be seen, so a batch costs about the sum of
its trees. The rows are laid one after another into a single one, which is padded to one of few lengths: the kernel is
compiled once for each length (and once more without gradients), never for each shape of a batch. The block masks of a
batch are made once and shared by all layers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface

from align.batching.batch import Span
from align.models.compute.attention import counted, refuse_unsupported

NAME = "align_tree_flex"


BLOCK = 128
"""Tokens on each side of the blocks that the kernel skips or computes."""
_SHAPES = 256
"""Kernels compiled at most, for all lengths, precisions and shapes of heads together. Beyond it torch would go on with
all scores in memory, 8.6 GB a layer for 8192 tokens in fp32; it raises instead."""
_CHUNK = 2**24
"""Pairs of tokens that are looked at together while a block mask is made."""


def padded_length(tokens: int) -> int:
    """The length that a row of so many tokens is padded to: a multiple of :data:`BLOCK`, four lengths from each power
    of two to the next, so at most a fifth is padding (beyond the first 1024 tokens)."""
    step = max(BLOCK, 1 << max(0, tokens - 1).bit_length() >> 3)
    return -(-tokens // step) * step


class FlexTrees:
    """For each token of a batch, the last place that sees it, and its position; and the block masks made from them.

    Args:
        rows, position_ids: those of the batch; position_ids [R, L].
    """

    def __init__(self, rows: tuple[tuple[Span, ...], ...], position_ids: Tensor) -> None:
        count, length = position_ids.shape
        total = padded_length(count * length)
        # Padding inside a row is visible to the padding after it, and what fills up the whole to its own block:
        # every token sees at least itself.
        until = torch.arange(total) // BLOCK * BLOCK + BLOCK
        for r, row in enumerate(rows):
            start = r * length
            until[start : start + length] = start + length
            for span in row:
                lengths = torch.tensor([node.length for node in span.nodes])
                seen = torch.repeat_interleave(torch.tensor(span.seen_until()), lengths)
                until[start + span.start : start + span.end] = start + seen
        self.until = until.to(position_ids.device)  # [total]
        self.position = torch.nn.functional.pad(position_ids.flatten(), (0, total - count * length))  # [total]
        self.layers = 0  # number of layers that used these bounds
        self._masks: dict[int | None, BlockMask] = {}

    def allowed(self, window: int | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """flex_attention's mask function: may token q look at token k? Both are places in the single row that all rows
        are laid into. Padding sees padding, so that no token sees nothing."""
        until = self.until
        position = self.position

        def may_look(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            seen = (k <= q) & (q < until[k])
            return seen if window is None else seen & (position[q] - position[k] < window)

        return may_look

    def block_mask(self, window: int | None) -> BlockMask:
        """The block mask of layers with this sliding window (None: the whole path).

        It is made of a few rows of blocks at a time: flex_attention's own function holds every pair of tokens, 4.3 GB
        for 32k tokens.
        """
        if window not in self._masks:
            total, device = len(self.until), self.until.device
            may_look, blocks = self.allowed(window), total // BLOCK
            zero = torch.zeros((), dtype=torch.int64, device=device)
            keys = torch.arange(total, device=device)[None]
            together = max(1, _CHUNK // (BLOCK * total))
            counts = []
            for first in range(0, blocks, together):
                queries = torch.arange(first * BLOCK, min(blocks, first + together) * BLOCK, device=device)[:, None]
                pairs = may_look(zero, zero, queries, keys).view(-1, BLOCK, blocks, BLOCK)
                counts.append(pairs.sum(dim=(1, 3)))
            seen = torch.cat(counts)  # [blocks, blocks]: pairs that may look
            full = seen == BLOCK * BLOCK
            self._masks[window] = BlockMask.from_kv_blocks(
                *_listed((seen > 0) & ~full), *_listed(full), BLOCK, may_look, (total, total)
            )
        return self._masks[window]


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of blocks, how many are marked, and their numbers, followed by those of the others."""
    order = torch.argsort(blocks.int(), dim=1, descending=True, stable=True)
    return blocks.sum(dim=1, dtype=torch.int32)[None, None], order.int()[None, None]


@cache
def _compiled() -> Callable[..., Tensor]:
    # fullgraph: past the limit it raises, where it would otherwise go on unfused
    how: dict[str, Any] = {"dynamic": False, "fullgraph": True, "recompile_limit": _SHAPES}
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, **how)
    return compiled


def _kernel(query: Tensor) -> Any:
    return _compiled() if query.is_cuda else flex_attention


def flex_tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    trees: FlexTrees | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls; shapes as in
    :func:`align.models.compute.attention.tree_attention`.

    On the CPU it runs uncompiled and forward only: good for comparing, not for training.
    """
    trees = counted(module, trees)
    refuse_unsupported(module, unused)
    rows, heads, length, _ = query.shape
    total = len(trees.until)
    output: Any = _kernel(query)(
        *(_in_one_row(part, total) for part in (query, key, value)),
        block_mask=trees.block_mask(sliding_window),
        scale=scaling,
        enable_gqa=heads != key.shape[1],
    )
    # [1, heads, total, D] to [R, L, heads, D]
    return output[0, :, : rows * length].transpose(0, 1).reshape(rows, length, heads, -1), None


def _in_one_row(part: Tensor, total: int) -> Tensor:
    """[R, heads, L, D] as [1, heads, total, D]: row after row, then zeros."""
    rows, heads, length, width = part.shape
    flat = part.transpose(0, 1).reshape(1, heads, rows * length, width)
    return torch.nn.functional.pad(flat, (0, 0, 0, total - rows * length))


AttentionInterface.register(NAME, flex_tree_attention)
