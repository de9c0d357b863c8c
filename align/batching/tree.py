"""Packing the trees of an optimiser step into micro-batches.

The layout determines which tokens are computed several times. It does not change loss and gradient:

- ``tree``: a tree stays whole, its branches share the trunk; trees are laid end to end in a row.
- ``packed``: every branch gets its own copy of the trunk; these sequences are laid end to end in a row.
- ``padded``: every branch gets its own copy of the trunk and its own row, padded on the right.

Where branches continue other branches, ``packed`` and ``padded`` copy whole paths. A branch that several paths share is
then computed several times. Its tokens are targets in the first copy only, so that each is trained once.

The branches of a tree are always in the same micro-batch, since losses compare them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from align.batching.batch import ROOT, Batch, Span, TreeNode
from align.data.tree import TRUNK, Ids, Tree

Layout = Literal["tree", "packed", "padded"]


def pack(
    trees: Sequence[Tree], *, microbatch_tokens: int, layout: Layout = "tree", pad_id: int = 0, multiple_of: int = 1
) -> list[Batch]:
    """Distribute trees over as few micro-batches of at most ``microbatch_tokens`` tokens as a best-fit decreasing
    packing finds.

    A larger tree gets a micro-batch of its own: the limit is for memory, and trees are never cut here. ``multiple_of``
    rounds the row length up with padding (compiled kernels want few distinct lengths).
    """
    groups = grouped(trees, microbatch_tokens, layout)
    return [build(trees, group, layout=layout, pad_id=pad_id, multiple_of=multiple_of) for group in groups]


def grouped(trees: Sequence[Tree], microbatch_tokens: int, layout: Layout) -> list[list[int]]:
    """The numbers of the trees in each micro-batch."""
    if layout == "padded":
        return _pad_groups(trees, microbatch_tokens)
    return _best_fit([_cost(tree, layout) for tree in trees], microbatch_tokens)


def row_multiple(layout: Layout, microbatch_tokens: int, device: str) -> int:
    """The multiple to which the length of rows is rounded up. On a GPU ("cuda") it is such that all rows have one
    length, since the attention kernel is compiled for each; 1 elsewhere."""
    return microbatch_tokens if device == "cuda" and layout != "padded" else 1


def tokens_of(trees: Sequence[Tree], layout: Layout, multiple_of: int = 1) -> int:
    """Tokens of one micro-batch of ``trees``, padding included."""
    if layout == "padded":
        longest = max(tree.longest_path for tree in trees)
        return sum(len(tree.paths) for tree in trees) * -(-longest // multiple_of) * multiple_of
    return -(-sum(_cost(tree, layout) for tree in trees) // multiple_of) * multiple_of


def _cost(tree: Tree, layout: Layout) -> int:
    """Tokens that the tree takes in its layout."""
    return tree.size if layout == "tree" else sum(tree.path_length(path) for path in tree.paths)


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
    """Groups of trees of similar lengths, so that there is little padding; rows x longest is at most the capacity."""
    groups: list[list[int]] = []
    rows = longest = 0
    for index in sorted(range(len(trees)), key=lambda i: (-trees[i].longest_path, i)):
        paths = len(trees[index].paths)
        longest = max(longest, trees[index].longest_path)
        if groups and (rows + paths) * longest <= capacity:
            groups[-1].append(index)
            rows += paths
        else:
            groups.append([index])
            rows, longest = paths, trees[index].longest_path
    return groups


def build(
    trees: Sequence[Tree], members: Sequence[int], *, layout: Layout, pad_id: int = 0, multiple_of: int = 1
) -> Batch:
    """One micro-batch of the trees at ``members``, in that order."""
    chosen = [trees[i] for i in members]
    placed: list[list[_Part]] = [[]]  # by row
    first = 0
    for tree in chosen:
        everything = [tuple(range(len(tree.branches)))]
        met: set[int] = set()
        for slots in everything if layout == "tree" else tree.paths:
            if layout == "padded" and placed[-1]:
                placed.append([])
            placed[-1].append(_Part(tree, slots, frozenset(slots) - met, first))
            met.update(slots)
        first += len(tree.branches)
    length = max(sum(part.size for part in row) for row in placed)
    rows = _Rows(len(placed), -(-length // multiple_of) * multiple_of, pad_id)
    spans = tuple(rows.lay(r, row) for r, row in enumerate(placed))
    branches = [branch for tree in chosen for branch in tree.branches]
    return Batch(
        input_ids=torch.from_numpy(rows.ids),
        position_ids=torch.from_numpy(rows.positions),
        rows=spans,
        targets=torch.from_numpy(np.concatenate(rows.targets)),
        sources=torch.from_numpy(np.concatenate(rows.sources)),
        branch=torch.from_numpy(np.concatenate(rows.owners)),
        branch_tree=torch.tensor([t for t, tree in enumerate(chosen) for _ in tree.branches]),
        branch_slot=torch.tensor([slot for tree in chosen for slot in range(len(tree.branches))]),
        tree_ids=tuple(tree.id for tree in chosen),
        margins=torch.tensor([branch.margin for branch in branches], dtype=torch.float32),
        tree_index=tuple(members),
        shares=torch.tensor([branch.share for branch in branches])
        if any(branch.share != 1.0 for branch in branches)
        else None,
        grades=torch.tensor([branch.grades for branch in branches]) if branches and branches[0].grades else None,
    )


class _Part:
    """A copy of a tree's trunk with some of its branches, and all branches that these continue.

    Args:
        slots: indices of the branches in the tree.
        trained: those of ``slots`` whose targets are in this copy.
        first_branch: index of the tree's first branch among the branches of the batch.
    """

    def __init__(self, tree: Tree, slots: tuple[int, ...], trained: frozenset[int], first_branch: int) -> None:
        self.tree, self.slots, self.trained, self.first_branch = tree, slots, trained, first_branch
        self.size = tree.path_length(slots)


class _Rows:
    """The rows of a batch while they are filled, and the targets in them."""

    def __init__(self, rows: int, length: int, pad_id: int) -> None:
        self._length = length
        self.ids = np.full((rows, length), pad_id, dtype=np.int64)
        self.positions = np.zeros((rows, length), dtype=np.int64)
        self.targets: list[npt.NDArray[np.int64]] = []
        self.sources: list[npt.NDArray[np.int64]] = []
        self.owners: list[npt.NDArray[np.int64]] = []

    def lay(self, row: int, parts: Sequence[_Part]) -> tuple[Span, ...]:
        """Write parts end to end, from the start of a row. Returns where they are."""
        spans: list[Span] = []
        for part in parts:
            spans.append(self._part(row, spans[-1].end if spans else 0, part))
        return tuple(spans)

    def _part(self, row: int, start: int, part: _Part) -> Span:
        trunk = part.tree.trunk
        self._run(row, start, 0, trunk)
        nodes = [TreeNode(len(trunk), ROOT)]
        # By branch: the index of its node, the place after its last token in the row, and the length of its path
        laid = {TRUNK: (0, start + len(trunk), len(trunk))}
        cursor = start + len(trunk)
        for slot in part.slots:
            branch = part.tree.branches[slot]
            parent, before, depth = laid[branch.parent]
            self._run(row, cursor, depth, branch.ids)
            if slot in part.trained:
                inside = np.flatnonzero(branch.mask)
                # A branch's first token is predicted from the last token of its parent.
                sources = np.where(inside == 0, before - 1, cursor + inside - 1)
                self.targets.append(row * self._length + cursor + inside)
                self.sources.append(row * self._length + sources)
                self.owners.append(np.full(len(inside), part.first_branch + slot))
            laid[slot] = (len(nodes), cursor + len(branch.ids), depth + len(branch.ids))
            nodes.append(TreeNode(len(branch.ids), parent))
            cursor += len(branch.ids)
        return Span(start, tuple(nodes))

    def _run(self, row: int, start: int, position: int, ids: Ids) -> None:
        """Write consecutive tokens; ``position`` is the first one's index on its path."""
        self.ids[row, start : start + len(ids)] = ids
        self.positions[row, start : start + len(ids)] = position + np.arange(len(ids))
