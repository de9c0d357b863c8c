"""Tree attention on CUDA: the same rule as attention.py, as one fused kernel over whole rows.

``flex_attention`` skips every block of 128 x 128 tokens in which nothing may be seen, so a packed row costs about as
much as its trees one by one. The block masks of a batch are made once and shared by all layers. Rows should have few
distinct lengths: the kernel is compiled for each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface

from align.batching.batch import Span
from align.models.compute.attention import counted, refuse_unsupported

NAME = "align_tree_flex"


class FlexTrees:
    """For each token of a batch, the last place in its row that sees it, and its position; and the block masks made
    from them."""

    def __init__(self, rows: tuple[tuple[Span, ...], ...], position_ids: Tensor) -> None:
        self.position = position_ids  # [R, L]
        until = torch.full(position_ids.shape, position_ids.shape[1])  # padding is visible to the padding after it
        for r, row in enumerate(rows):
            for span in row:
                lengths = torch.tensor([node.length for node in span.nodes])
                until[r, span.start : span.end] = torch.repeat_interleave(torch.tensor(span.seen_until()), lengths)
        self.until = until.to(position_ids.device)
        self.layers = 0  # number of layers that used these bounds
        self._masks: dict[int | None, BlockMask] = {}

    def allowed(self, window: int | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """flex_attention's mask function: may token q of row b look at token k? Padding sees padding, so that no row is
        empty."""
        until = self.until
        position = self.position

        def may_look(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            seen = (k <= q) & (q < until[b, k])
            return seen if window is None else seen & (position[b, q] - position[b, k] < window)

        return may_look

    def block_mask(self, window: int | None) -> BlockMask:
        """The block mask of layers with this sliding window (None: the whole path)."""
        if window not in self._masks:
            rows, length = self.position.shape
            self._masks[window] = create_block_mask(
                self.allowed(window), rows, None, length, length, device=self.position.device
            )
        return self._masks[window]


@cache
def _compiled() -> Callable[..., Tensor]:
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=False)
    return compiled


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
    attend: Any = _compiled() if query.is_cuda else flex_attention
    output = attend(
        query,
        key,
        value,
        block_mask=trees.block_mask(sliding_window),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, flex_tree_attention)
