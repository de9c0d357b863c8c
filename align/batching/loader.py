"""Turning epochs into optimiser steps: which examples are in which step and micro-batch, in which order, on which
process.

All of this depends only on (seed, sizes, settings), so a run resumes with nothing but its step number, and the steps
are the same for any number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from align.batching.batch import Batch
from align.batching.even import Groups, evened
from align.batching.tree import Layout, pack
from align.data.tree import Tree


@dataclass(frozen=True)
class StepPlan:
    """The examples of each optimiser step: step s has ``order[bounds[s]:bounds[s + 1]]``."""

    order: npt.NDArray[np.int64]
    bounds: npt.NDArray[np.int64]
    steps_per_epoch: float

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def examples(self, step: int) -> npt.NDArray[np.int64]:
        """Indices of the examples of one step."""
        return self.order[self.bounds[step] : self.bounds[step + 1]]


def plan_steps(
    sizes: Sequence[int] | npt.NDArray[np.int64],
    *,
    seed: int,
    epochs: float = 1,
    batch_size: int | None = None,
    tokens_per_step: int | None = None,
    max_steps: int | None = None,
    epoch_indices: Callable[[int], npt.NDArray[np.int64]] | None = None,
) -> StepPlan:
    """Cut shuffled epochs into steps of ``batch_size`` examples, or of as many as fit ``tokens_per_step`` (at least
    one).

    A step may span two epochs, so that only the last step of a run can be smaller than the others. Every example is
    seen equally often (with a fraction of an epoch: up to once more). Sizes are the tokens of each example, with the
    trunk counted once, for every layout. ``epoch_indices`` says which examples an epoch has (at least one), by its
    number from 0; all of them when absent.
    """
    sizes = np.asarray(sizes, dtype=np.int64)
    parts = []
    for epoch in range(max(1, math.ceil(epochs))):
        examples = np.arange(len(sizes)) if epoch_indices is None else epoch_indices(epoch)
        parts.append(examples[np.random.default_rng([seed, epoch]).permutation(len(examples))])
    order = np.concatenate(parts)
    per_epoch = len(order) / len(parts)
    total = max(1, round(epochs * per_epoch))
    order = order[:total]
    if batch_size is not None:
        bounds = list(range(0, total, batch_size))
    else:
        bounds, used = [0], 0
        for place, size in enumerate(sizes[order].tolist()):
            if used and used + size > (tokens_per_step or 4096):
                bounds.append(place)
                used = 0
            used += size
    bounds.append(total)
    if max_steps is not None:
        bounds = bounds[: max_steps + 1]
    return StepPlan(order, np.asarray(bounds), (len(bounds) - 1) * per_epoch / max(1, bounds[-1]))


def share(batches: Sequence[Batch], rank: int, world: int) -> list[Batch]:
    """The micro-batches that one of ``world`` processes computes: largest first, each to the process with the least
    work so far."""
    load = [0] * world
    mine = []
    for batch in sorted(batches, key=lambda b: -b.input_ids.numel()):
        owner = load.index(min(load))
        load[owner] += batch.input_ids.numel()
        if owner == rank:
            mine.append(batch)
    return mine


_IDLE_TOKENS = 128
"""Longest row without examples: a block of the compiled attention kernel."""


@dataclass(frozen=True)
class Loader:
    """Micro-batches of every optimiser step, for one process."""

    tree: Callable[[int], Tree]
    plan: StepPlan
    microbatch_tokens: int
    layout: Layout = "tree"
    pad_id: int = 0
    rank: int = 0
    world: int = 1
    row_multiple: int = 1
    """Rows are padded to a multiple of this many tokens, since kernels are compiled for each length."""
    groups: Groups | None = None
    """Given where every process must make the same passes: then all get as many micro-batches, some without
    examples."""

    def step(self, number: int) -> list[Batch]:
        """This process's micro-batches of one step; may be empty when there are fewer than processes."""
        return self.batches(self.plan.examples(number).tolist())

    def batches(self, examples: Sequence[int]) -> list[Batch]:
        """This process's micro-batches of any examples; ``tree_index`` of a batch are example numbers."""
        packed = pack(
            [self.tree(i) for i in examples],
            microbatch_tokens=self.microbatch_tokens,
            layout=self.layout,
            pad_id=self.pad_id,
            multiple_of=self.row_multiple,
        )
        numbered = [replace(batch, tree_index=tuple(examples[i] for i in batch.tree_index)) for batch in packed]
        if self.groups is None:
            return share(numbered, self.rank, self.world)
        shares = [share(numbered, rank, self.world) for rank in range(self.world)]
        return evened(shares, self.groups, tokens=min(self.row_multiple, _IDLE_TOKENS))[self.rank]

    def from_step(self, first: int) -> Iterator[list[Batch]]:
        """Steps ``first``, ``first + 1``, ... to the end of the plan."""
        return (self.step(number) for number in range(first, len(self.plan)))
