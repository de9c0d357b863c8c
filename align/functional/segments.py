"""Sums and means of token values over the branches they belong to."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sum(values: Tensor, segment: Tensor, num_segments: int) -> Tensor:
    """Sum of the ``values`` [N] of each segment -> [num_segments]; 0 for an empty segment. ``segment`` [N], int64 in
    ``0..num_segments-1``, says which segment a value belongs to."""
    return torch.zeros(num_segments, dtype=values.dtype, device=values.device).index_add(0, segment, values)


def segment_count(segment: Tensor, num_segments: int) -> Tensor:
    """How many values each segment has -> int64 [num_segments]."""
    # Not bincount: on a GPU it makes the CPU wait, to see how large the result is.
    counts = torch.zeros(num_segments, dtype=torch.int64, device=segment.device)
    return counts.index_add(0, segment, torch.ones_like(segment))


def segment_mean(values: Tensor, segment: Tensor, num_segments: int) -> Tensor:
    """Mean of the ``values`` [N] of each segment -> [num_segments]; 0 for an empty segment."""
    return segment_sum(values, segment, num_segments) / segment_count(segment, num_segments).clamp(min=1)
