"""Length balancing of preferences, as in ChatGLM-RLHF (https://arxiv.org/abs/2404.00934), so that a reward model does
not learn to prefer long answers.

Pairs are put into buckets by how much the lengths of the two answers differ. In each bucket as many pairs are used
whose longer answer wins as pairs whose shorter answer wins: of the larger group a random sample, drawn anew in each
epoch, so that all pairs are used over time. Pairs of equal length are always used. The paper does not give its buckets.

Pairs are drawn one by one: in an epoch a prompt with several rejected answers has only those whose pairs were drawn,
and is left out if none was.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from align.data.tree import Tree
from align.data.trees.store import TreeStore
from align.errors import InputError

EDGES = (0, 8, 32, 64, 128, 256)
"""Lower ends of the buckets: difference in length, in tokens. The last bucket has no upper end."""
_STREAM = 1  # separates the draw's random stream from that of the order in the same epoch

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PairTable:
    """The P pairs of a set of preferences in order: every chosen answer with each of its rejected ones."""

    tree: Ints  # [P]
    slot: Ints  # [P], number of the rejected answer's branch in its tree
    chosen: Ints  # [P], tokens of the chosen answer
    rejected: Ints  # [P]

    @classmethod
    def of(cls, trees: Iterable[Tree]) -> PairTable:
        """The pairs of ``trees``, which are numbered from 0."""
        rows = [
            (t, slot, len(tree.branches[0].ids), len(tree.branches[slot].ids))
            for t, tree in enumerate(trees)
            for slot in range(1, len(tree.branches))
        ]
        return cls(*np.array(rows, dtype=np.int64).reshape(-1, 4).T)

    @property
    def difference(self) -> Ints:
        """Tokens of the chosen answer minus tokens of the rejected one, [P]."""
        return self.chosen - self.rejected


class LengthBalance:
    """Chooses the pairs of each epoch, given the P differences in length (chosen minus rejected, in tokens)."""

    def __init__(self, difference: Ints, seed: int) -> None:
        self.difference, self.seed = difference, seed
        self.bucket: Ints = np.searchsorted(EDGES, np.abs(difference), side="right") - 1
        """Bucket of each pair, int64 [P]."""

    def kept(self, epoch: int) -> npt.NDArray[np.bool_]:
        """True for the pairs of an epoch, [P]; depends only on the seed and the epoch's number."""
        rng = np.random.default_rng([self.seed, epoch, _STREAM])
        keep: npt.NDArray[np.bool_] = self.difference == 0
        for bucket in range(len(EDGES)):
            sides = [
                np.flatnonzero((self.bucket == bucket) & won) for won in (self.difference > 0, self.difference < 0)
            ]
            few = min(map(len, sides))
            for side in sides:
                keep[side if len(side) == few else rng.choice(side, few, replace=False)] = True
        return keep

    def report(self) -> list[dict[str, Any]]:
        """For each bucket with pairs: their numbers, and how many of them an epoch uses and leaves out."""
        kept = self.kept(0)
        rows = []
        for bucket, (low, high) in enumerate(zip(EDGES, (*EDGES[1:], None), strict=True)):
            inside = self.bucket == bucket
            won = {
                "longer_wins": self.difference > 0,
                "shorter_wins": self.difference < 0,
                "equal": self.difference == 0,
            }
            counts = {name: int((inside & which).sum()) for name, which in won.items()}
            used = int((inside & kept).sum())
            if inside.any():
                name = f"{low}+" if high is None else f"{low}-{high - 1}"
                rows.append({"tokens": name, **counts, "used": used, "left_out": int(inside.sum()) - used})
        return rows


class BalancedTrees:
    """Preferences with the pairs drawn for each epoch. Example ``epoch * N + i`` is tree i of N with the pairs of that
    epoch."""

    def __init__(self, trees: TreeStore, *, seed: int, epochs: float) -> None:
        """
        Raises:
            InputError: no pair would be left, since no bucket has both pairs whose longer and pairs whose shorter
                answer wins.
        """
        self._trees = trees
        self._pairs = PairTable.of(trees[i] for i in range(len(trees)))
        self.balance = LengthBalance(self._pairs.difference, seed)
        self._kept = [self.balance.kept(epoch) for epoch in range(max(1, math.ceil(epochs)))]
        if not self._kept[0].any():
            side = "longer" if self._pairs.difference[0] > 0 else "shorter"
            message = (
                f"length balancing leaves no pair of {len(self._pairs.tree):,}: where answers differ in length, the"
                f" {side} one wins"
            )
            raise InputError(message, hint="remove length_balance, or add pairs that another answer wins")
        rejected = [self._tokens(np.where(kept, self._pairs.rejected, 0)) for kept in self._kept]
        self.sizes: Ints = np.concatenate(
            [trees.sizes - self._tokens(self._pairs.rejected) + part for part in rejected]
        )
        """Number of tokens of each example, int64 [epochs * N]."""

    def _tokens(self, of_pairs: Ints) -> Ints:
        """Sum of ``of_pairs`` over the pairs of each tree."""
        return np.bincount(self._pairs.tree, weights=of_pairs, minlength=len(self._trees)).astype(np.int64)

    def __len__(self) -> int:
        return len(self.sizes)

    def epoch(self, number: int) -> Ints:
        """The examples of an epoch, in order."""
        return len(self._trees) * number + np.unique(self._pairs.tree[self._kept[number]])

    def __getitem__(self, index: int) -> Tree:
        epoch, number = divmod(index, len(self._trees))
        tree = self._trees[number]
        first, end = np.searchsorted(self._pairs.tree, [number, number + 1])
        drawn = self._pairs.slot[first:end][self._kept[epoch][first:end]]
        return replace(tree, branches=(tree.branches[0], *(tree.branches[slot] for slot in drawn)))
