"""Attention over packed trees: a token sees the tokens before it on its own path, and nothing else.

It is registered with transformers' AttentionInterface, so models need no change: they pass the tree bounds, a keyword
of their forward, on to this function. Attention is computed node by node, from the tokens of a node to those of its
ancestors and itself. The cost of a row is therefore that of its paths, not the square of its length or of its trees'
lengths. Masks follow the model's own rules: causal, and within the sliding window if the layer has one (distances, like
positions, are measured along the path).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from align.batching.batch import Span
from align.errors import InputError
from align.models.compute import long_paths

NAME = "align_tree"


KeyValues = dict[int, tuple[Tensor, Tensor]]
"""Keys and values of a stretch of tokens, [1, kv heads, n, D], by layer."""


class Trees:
    """The bounds of a batch's trees, and the masks made from them, shared by all layers of a forward pass.

    Args:
        rows, device: of the batch.
        trunk: keys and values of a trunk that was computed before; the batch then contains only branches of that trunk.
        keep: every layer stores the keys and values of the first tree's trunk here.
    """

    def __init__(
        self,
        rows: tuple[tuple[Span, ...], ...],
        device: torch.device,
        *,
        trunk: KeyValues | None = None,
        keep: KeyValues | None = None,
    ) -> None:
        self.rows = rows
        self.device = device
        self.trunk = trunk
        self.keep = keep
        self.layers = 0  # number of layers that used these bounds
        self._masks: dict[tuple[int, int, int | None], Tensor] = {}

    def mask(self, before: int, length: int, window: int | None) -> Tensor | None:
        """Which of the ``before`` tokens on their path and of themselves ``length`` tokens may see: boolean [length,
        before + length].

        None when it equals the mask of plain causal attention.
        """
        windowed = window is not None and before + length > window
        if not before and not windowed:
            return None
        key = (before, length, window if windowed else None)
        if key not in self._masks:
            seen = torch.ones(length, before + length, dtype=torch.bool, device=self.device)
            self._masks[key] = (
                seen.tril(before).triu(before - window + 1) if windowed and window is not None else seen.tril(before)
            )
        return self._masks[key]


def tree_mask(span: Span, window: int | None, device: torch.device | str = "cpu") -> Tensor | None:
    """Boolean [n, n]: may token q look at token k? None for a single path that fits the window: plain causal attention.

    This is the rule of this module as one dense mask. The tests compare this module and the fused kernel with it.
    ``window`` is the layer's sliding window in tokens, the token itself included, as transformers counts it.
    """
    windowed = window is not None and span.longest_path > window
    if span.is_path and not windowed:
        return None
    lengths = torch.tensor([node.length for node in span.nodes])
    until = torch.repeat_interleave(torch.tensor(span.seen_until()) - span.start, lengths).to(device)
    place = torch.arange(len(until), device=device)
    position = torch.cat([torch.arange(before, before + n) for before, n in zip(span.before, lengths, strict=True)])
    position = position.to(device)
    mask = (place[None] <= place[:, None]) & (place[:, None] < until[None])
    return mask & (position[:, None] - position[None] < window) if windowed and window is not None else mask


def counted(module: nn.Module, trees: Any) -> Any:
    """The tree bounds that a layer was given; counts that this layer used them.

    Raises:
        InputError: it was given none: the model does not pass keywords on, or was not called through
            models.compute.forward.
    """
    if trees is None:
        raise InputError(
            f"{type(module).__name__} does not receive the tree bounds of its batch", hint="set train.layout: padded"
        )
    trees.layers += 1
    return trees


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    trees: Trees | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in every layer. query [R, heads, L, D], key and value [R, kv
    heads, L, D].

    Returns [R, L, heads, D]; zeros at padding.

    Raises:
        InputError: the model passes something that this attention would silently ignore (score soft-capping, attention
            sinks).
    """
    trees = counted(module, trees)
    refuse_unsupported(module, unused)
    # The first time only: with gradient checkpointing the layer is computed a second time
    if trees.keep is not None and module.layer_idx not in trees.keep:
        trunk = slice(trees.rows[0][0].start, trees.rows[0][0].start + trees.rows[0][0].trunk)
        trees.keep[int(module.layer_idx)] = (key[:1, :, trunk], value[:1, :, trunk])  # type: ignore[arg-type]
    given = None if trees.trunk is None else trees.trunk[int(module.layer_idx)]  # type: ignore[arg-type]
    attend = partial(path_attention, trees, window=sliding_window, dropout=dropout, scale=scaling)
    # Split, not sliced: the backward pass of a slice fills a tensor as large as the whole with zeros.
    rows = zip(
        trees.rows, query.chunk(len(trees.rows)), key.chunk(len(trees.rows)), value.chunk(len(trees.rows)), strict=True
    )
    outputs = []
    for row, q, k, v in rows:
        lengths = [length for span in row for length, _ in _pieces(span)]
        padding = query.shape[2] - sum(lengths)
        lengths += [padding] if padding else []
        queries, keys, values = (part.split_with_sizes(lengths, dim=2) for part in (q, k, v))
        attended, first = [], 0
        for span in row:
            pieces = _pieces(span)
            for number, (_, way) in enumerate(pieces):
                # What a piece sees, from the root on: a trunk that was computed before, its ancestors, and itself.
                on_path = [first + ancestor for ancestor in way] + [first + number]
                seen_keys = [*([given[0]] if given else []), *(keys[piece] for piece in on_path)]
                seen_values = [*([given[1]] if given else []), *(values[piece] for piece in on_path)]
                attended.append(attend(queries[first + number], seen_keys, seen_values))
            first += len(pieces)
        if padding:
            attended.append(query.new_zeros(1, query.shape[1], padding, value.shape[-1]))
        outputs.append(torch.cat(attended, dim=2) if len(attended) > 1 else attended[0])
    result = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    return result.transpose(1, 2).contiguous(), None


def path_attention(
    trees: Trees,
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    window: int | None,
    dropout: float,
    scale: float | None,
) -> Tensor:
    """Attention of the last tokens of a path, query [1, heads, n, D], to all of it: ``keys`` and ``values`` [1, kv
    heads, ., D] of its pieces, the last of which is the tokens' own. Returns [1, heads, n, D]."""
    length = query.shape[2]
    before = sum(part.shape[2] for part in keys[:-1])
    windowed = window is not None and before + length > window
    if length * (before + length) > long_paths.MASKED:
        # On a GPU the mask is boolean for the kernel as well
        if before and not windowed and not dropout and not query.is_cuda:
            return long_paths.joined_attention(
                query, (_cat(keys[:-1]), _cat(values[:-1])), (keys[-1], values[-1]), scale
            )
        if windowed and window is not None and length > window:
            attend = partial(_masked, trees, window=window, dropout=dropout, scale=scale)
            return long_paths.windowed_attention(query, _cat(keys), _cat(values), window, attend)
    return _masked(trees, query, _cat(keys), _cat(values), window=window, dropout=dropout, scale=scale)


def _masked(
    trees: Trees, query: Tensor, key: Tensor, value: Tensor, *, window: int | None, dropout: float, scale: float | None
) -> Tensor:
    """:func:`path_attention` with one mask for all of it."""
    mask = trees.mask(key.shape[2] - query.shape[2], query.shape[2], window)
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and mask is not None and lacks_grouped_kernel(query):
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        scale=scale,
        is_causal=mask is None,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts), dim=2) if len(parts) > 1 else parts[0]


def lacks_grouped_kernel(query: Tensor) -> bool:
    """Has this device no fused attention for a mask together with grouped heads? Then keys and values are repeated for
    each query head, which has one: otherwise the scores of all heads would lie in memory.

    On CUDA, flash attention takes no mask and memory-efficient attention no groups (``sdp_utils.cpp`` of torch 2.13);
    cuDNN takes both, in half precision from Hopper on. The CPU's kernel takes both as well.
    """
    if not query.is_cuda:
        return False
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    return dtype not in (torch.float16, torch.bfloat16) or torch.cuda.get_device_capability(query.device) < (9, 0)


def _pieces(span: Span) -> list[tuple[int, tuple[int, ...]]]:
    """The pieces that attention is computed for, one after another: for each node its length and its ancestors, as
    numbers of pieces. A single path is one piece."""
    if span.is_path:
        return [(span.end - span.start, ())]
    return [(node.length, way) for node, way in zip(span.nodes, span.ancestors, strict=True)]


def refuse_unsupported(module: nn.Module, arguments: Mapping[str, Any]) -> None:
    """Raise :class:`InputError` when a model passes something that tree attention would silently ignore."""
    ignored = [name for name in ("softcap", "s_aux", "position_bias") if arguments.get(name) is not None]
    if ignored:
        raise InputError(
            f"{type(module).__name__} uses {', '.join(ignored)} in its attention", hint="set train.layout: padded"
        )


AttentionInterface.register(NAME, tree_attention)
