"""Packing: from the trees of one optimiser step to micro-batches.

A layout decides what is computed twice, never what is learned:

- ``tree``: a tree stays whole, its branches share the trunk; trees are laid end to end in a row.
- ``packed``: every branch gets its own copy of the trunk; these sequences are laid end to end in a row.
- ``padded``: every branch gets its own copy of the trunk and its own row, padded on the right.

The branches of a tree are never separated: losses that compare them see them in one micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from align.batching.batch import Batch, Span
from align.data.tree import Branch, Tree

Layout = Literal["tree", "packed", "padded"]


def pack(
    trees: Sequence[Tree], *, microbatch_tokens: int, layout: Layout = "tree", pad_id: int = 0, multiple_of: int = 1
) -> list[Batch]:
    """Distribute trees over as few micro-batches of at most ``microbatch_tokens`` tokens as a best-fit decreasing
    packing finds.

    A tree larger than that gets a micro-batch of its own: the limit is about memory, and nothing is ever cut here.
    ``multiple_of`` rounds the row length up with padding (compiled kernels want few distinct lengths).
    """
    groups = grouped(trees, microbatch_tokens, layout)
    return [build(trees, group, layout=layout, pad_id=pad_id, multiple_of=multiple_of) for group in groups]


def grouped(trees: Sequence[Tree], microbatch_tokens: int, layout: Layout) -> list[list[int]]:
    """Which trees, by number, go into which micro-batch."""
    if layout == "padded":
        return _pad_groups(trees, microbatch_tokens)
    return _best_fit([_cost(tree, layout) for tree in trees], microbatch_tokens)


def row_multiple(layout: Layout, microbatch_tokens: int, device: str) -> int:
    """What a row's length is rounded up to: one length on a GPU ("cuda"), whose attention kernel is compiled for each;
    none elsewhere."""
    return microbatch_tokens if device == "cuda" and layout != "padded" else 1


def tokens_of(trees: Sequence[Tree], layout: Layout, multiple_of: int = 1) -> int:
    """Tokens of one micro-batch of ``trees``, padding included."""
    if layout == "padded":
        longest = max(tree.longest_path for tree in trees)
        return sum(len(tree.branches) for tree in trees) * -(-longest // multiple_of) * multiple_of
    return -(-sum(_cost(tree, layout) for tree in trees) // multiple_of) * multiple_of


def _cost(tree: Tree, layout: Layout) -> int:
    """Tokens that the tree takes in its layout."""
    return tree.size if layout == "tree" else tree.size + len(tree.trunk) * (len(tree.branches) - 1)


def _best_fit(costs: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing bin packing; deterministic. Returns groups of indices, each in input order."""
    bins: list[tuple[int, list[int]]] = []
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        fitting = [b for b, (used, _) in enumerate(bins) if used + costs[index] <= capacity]
        if fitting:
            fullest = max(fitting, key=lambda b: (bins[b][0], -b))
            used, members = bins[fullest]
            bins[fullest] = (used + costs[index], [*members, index])
        else:
            bins.append((costs[index], [index]))
    return [sorted(members) for _, members in bins]


def _pad_groups(trees: Sequence[Tree], capacity: int) -> list[list[int]]:
    """Neighbours in length share a batch, so that little is padding; rows x longest stays within the capacity."""
    groups: list[list[int]] = []
    rows = longest = 0
    for index in sorted(range(len(trees)), key=lambda i: (-trees[i].longest_path, i)):
        longest = max(longest, trees[index].longest_path)
        if groups and (rows + len(trees[index].branches)) * longest <= capacity:
            groups[-1].append(index)
            rows += len(trees[index].branches)
        else:
            groups.append([index])
            rows, longest = len(trees[index].branches), trees[index].longest_path
    return groups


def build(
    trees: Sequence[Tree], members: Sequence[int], *, layout: Layout, pad_id: int = 0, multiple_of: int = 1
) -> Batch:
    """One micro-batch of the trees at ``members``, in that order."""
    chosen = [trees[i] for i in members]
    placed: list[list[_Part]] = [[]]  # rows of (tree, branches that share one copy of its trunk)
    number = 0
    for t, tree in enumerate(chosen):
        slots = range(len(tree.branches))
        for shared in [list(slots)] if layout == "tree" else [[s] for s in slots]:
            if layout == "padded" and placed[-1]:
                placed.append([])
            placed[-1].append(_Part(tree, t, shared, number))
            number += len(shared)
    length = max(sum(part.size for part in row) for row in placed)
    return _assemble(placed, -(-length // multiple_of) * multiple_of, chosen, members, pad_id)


class _Part:
    """A copy of a tree's trunk with some of its branches."""

    def __init__(self, tree: Tree, tree_number: int, slots: list[int], first_branch: int) -> None:
        self.tree = tree
        self.tree_number = tree_number
        self.slots = slots
        self.first_branch = first_branch
        self.size = len(tree.trunk) + sum(len(tree.branches[s].ids) for s in slots)


def _assemble(placed: list[list[_Part]], length: int, chosen: list[Tree], members: Sequence[int], pad_id: int) -> Batch:
    ids = np.full((len(placed), length), pad_id, dtype=np.int64)
    positions = np.zeros((len(placed), length), dtype=np.int64)
    rows: list[tuple[Span, ...]] = []
    targets: list[np.ndarray] = []
    sources: list[np.ndarray] = []
    owners: list[np.ndarray] = []
    branch_tree: list[int] = []
    branch_slot: list[int] = []
    branches: list[Branch] = []
    for r, row in enumerate(placed):
        cursor, spans = 0, []
        for part in row:
            start, trunk = cursor, len(part.tree.trunk)
            ids[r, start : start + trunk] = part.tree.trunk
            positions[r, start : start + trunk] = np.arange(trunk)
            cursor += trunk
            for k, slot in enumerate(part.slots):
                branch = part.tree.branches[slot]
                n = len(branch.ids)
                ids[r, cursor : cursor + n] = branch.ids
                positions[r, cursor : cursor + n] = trunk + np.arange(n)
                inside = np.flatnonzero(branch.mask)
                targets.append(r * length + cursor + inside)
                # The token before a branch's first one is the trunk's last.
                sources.append(r * length + np.where(inside == 0, start + trunk - 1, cursor + inside - 1))
                owners.append(np.full(len(inside), part.first_branch + k))
                branch_tree.append(part.tree_number)
                branch_slot.append(slot)
                branches.append(branch)
                cursor += n
            spans.append(Span.of_branches(start, trunk, [len(part.tree.branches[s].ids) for s in part.slots]))
        rows.append(tuple(spans))
    return Batch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(positions),
        rows=tuple(rows),
        targets=torch.from_numpy(np.concatenate(targets)),
        sources=torch.from_numpy(np.concatenate(sources)),
        branch=torch.from_numpy(np.concatenate(owners)),
        branch_tree=torch.tensor(branch_tree),
        branch_slot=torch.tensor(branch_slot),
        tree_ids=tuple(tree.id for tree in chosen),
        margins=torch.tensor([branch.margin for branch in branches], dtype=torch.float32),
        tree_index=tuple(members),
        shares=torch.tensor([branch.share for branch in branches])
        if any(branch.share != 1.0 for branch in branches)
        else None,
        grades=torch.tensor([branch.grades for branch in branches]) if branches and branches[0].grades else None,
    )
