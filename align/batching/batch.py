"""The input of a forward pass: rows of packed trees, the targets, and the tokens from which they are predicted.

Shapes: R rows, L tokens a row, N targets, B branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from align.data.tree import require_depth_first

ROOT = -1
"""The parent of a node that has none."""


@dataclass(frozen=True)
class TreeNode:
    """Consecutive tokens that all paths through them share."""

    length: int
    parent: int
    """Number in the span of the node that it continues; :data:`ROOT` for none."""


@dataclass(frozen=True)
class Span:
    """The place of a tree in its row: its nodes from ``start`` on, one after the other.

    A token sees the tokens of the ancestors of its node, and the earlier tokens of its own node. A trunk with branches
    is a node and its children.

    Raises:
        ValueError: the nodes are not in depth-first order.
    """

    start: int
    nodes: tuple[TreeNode, ...]

    def __post_init__(self) -> None:
        require_depth_first([node.parent for node in self.nodes])

    @classmethod
    def of_branches(cls, start: int, trunk: int, branches: Sequence[int]) -> Span:
        """A trunk with branches, from their lengths."""
        return cls(start, (TreeNode(trunk, ROOT), *(TreeNode(length, 0) for length in branches)))

    @property
    def end(self) -> int:
        """One past the last token."""
        return self.start + sum(node.length for node in self.nodes)

    @property
    def is_path(self) -> bool:
        """Does each node continue the one before it?"""
        return all(node.parent == number - 1 for number, node in enumerate(self.nodes))

    @property
    def is_flat(self) -> bool:
        """Is it one trunk with branches?"""
        return all(node.parent == (0 if number else ROOT) for number, node in enumerate(self.nodes))

    @property
    def trunk(self) -> int:
        """Length of the first node."""
        return self.nodes[0].length

    @property
    def branches(self) -> tuple[int, ...]:
        """Lengths of the nodes after the first."""
        return tuple(node.length for node in self.nodes[1:])

    @cached_property
    def ancestors(self) -> tuple[tuple[int, ...], ...]:
        """For each node, the numbers of its ancestors from the root on."""
        found: list[tuple[int, ...]] = []
        for node in self.nodes:
            found.append(() if node.parent == ROOT else (*found[node.parent], node.parent))
        return tuple(found)

    @property
    def before(self) -> list[int]:
        """For each node, the number of tokens of its ancestors."""
        return [sum(self.nodes[number].length for number in way) for way in self.ancestors]

    @property
    def longest_path(self) -> int:
        """Number of tokens of the longest path."""
        return max((before + node.length for before, node in zip(self.before, self.nodes, strict=True)), default=0)

    def seen_until(self) -> list[int]:
        """For each node, the index in the row after the last token that sees it. In depth-first order the descendants
        of a node follow it without a gap, so token q sees token k if and only if ``k <= q < seen_until(k's node)``."""
        ends = list(accumulate((node.length for node in self.nodes), initial=self.start))[1:]
        for number in reversed(range(len(self.nodes))):
            parent = self.nodes[number].parent
            if parent != ROOT:
                ends[parent] = max(ends[parent], ends[number])
        return ends


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    ``logprobs[n]`` of target n belongs to the token at ``targets[n]``; it is predicted from the hidden state at
    ``sources[n]``, the token before it on its path (for a branch's first token: the last of the trunk, or of the branch
    that it continues). Both index the flattened [R * L] tokens.

    Example, one tree with trunk ``P0 P1`` and branches ``a b`` and ``c``::

        input_ids     P0 P1  a  b  c
        position_ids   0  1  2  3  2
        targets        2  3  4          (tokens a, b, c)
        sources        1  2  1
        branch         0  0  1
        branch_tree    0  0
    """

    input_ids: Tensor  # int64 [R, L]
    position_ids: Tensor  # int64 [R, L]; index of the token on its path, from the start of the trunk
    rows: tuple[tuple[Span, ...], ...]  # per row, in order; tokens after the last span are padding
    targets: Tensor  # int64 [N]
    sources: Tensor  # int64 [N]
    branch: Tensor  # int64 [N], number of the target's branch
    branch_tree: Tensor  # int64 [B], index into tree_ids
    branch_slot: Tensor  # int64 [B], number of the branch in its tree: 0 is the chosen answer of a preference
    tree_ids: tuple[str, ...]
    margins: Tensor  # fp32 [B], of each rejected answer; see Branch
    tree_index: tuple[int, ...]  # index of each tree in the list that was packed
    _: KW_ONLY
    shares: Tensor | None = None  # fp32 [B], the share of votes for the chosen answer; None if all are 1
    grades: Tensor | None = None  # fp32 [B, attributes], NaN for a missing grade; None if answers are not graded
    groups: int = 0  # computed in so many groups of branches, as another process's is; 0: as its own size asks for

    @property
    def num_branches(self) -> int:
        """B."""
        return len(self.branch_tree)

    @property
    def chosen_branches(self) -> Tensor:
        """Numbers of the branches at slot 0, one of each tree, int64 [trees]."""
        # Without its size, nonzero makes the CPU wait for the GPU.
        return torch.nonzero_static(self.branch_slot == 0, size=len(self.tree_ids)).squeeze(1)

    @property
    def rejected_branches(self) -> Tensor:
        """Numbers of all other branches, int64 [B - trees]."""
        return torch.nonzero_static(self.branch_slot > 0, size=self.num_branches - len(self.tree_ids)).squeeze(1)

    @property
    def num_targets(self) -> int:
        """N."""
        return len(self.targets)

    @property
    def num_tokens(self) -> int:
        """Tokens of the examples, padding left out."""
        return sum(span.end - span.start for row in self.rows for span in row) if self.tree_ids else 0

    @property
    def longest_path(self) -> int:
        """Number of tokens of the longest path, from the start of its trunk."""
        return max((span.longest_path for row in self.rows for span in row), default=0)

    def __str__(self) -> str:
        """Its size, for messages."""
        size = f"{self.num_tokens} tokens (examples: {len(self.tree_ids)}, rows: {len(self.rows)}"
        return f"{size}, tokens of the longest prompt with its answer: {self.longest_path})"

    def idle(self, *, groups: int = 0, tokens: int = 1) -> Batch:
        """A batch without examples, on which a loss is 0 and so is its gradient: what a process computes while others,
        who wait for its part of the model, have more to do. Of this batch it has what all batches of a step have alike.

        Args:
            groups: into how many groups of branches it is cut.
            tokens: its length, at least.
        """
        ids = self.input_ids.flatten()[:1].repeat(1, max(tokens, 2 if groups else 1))
        none = slice(0)
        return replace(
            self,
            input_ids=ids,
            position_ids=torch.zeros_like(ids),
            rows=((Span.of_branches(0, 1, (1,) if groups else ()),),),
            tree_ids=(),
            tree_index=(),
            groups=groups,
            **{name: getattr(self, name)[none] for name in ("targets", "sources", "branch", "branch_tree")},
            **{name: getattr(self, name)[none] for name in ("branch_slot", "margins")},
            shares=None if self.shares is None else self.shares[none],
            grades=None if self.grades is None else self.grades[none],
        )

    @property
    def target_ids(self) -> Tensor:
        """Token ids of the targets, int64 [N]."""
        return self.input_ids.flatten()[self.targets]

    @property
    def attention_mask(self) -> Tensor:
        """1 for tokens and 0 for padding, int64 [R, L]; for the models' own attention (padded layout)."""
        ends = torch.tensor([row[-1].end if row else 0 for row in self.rows], device=self.input_ids.device)
        return (torch.arange(self.input_ids.shape[1], device=ends.device)[None] < ends[:, None]).long()

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on ``device``."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class Pairs:
    """The pairs of branches of a batch that are compared: P pairs, each in one tree."""

    chosen: Tensor  # int64 [P], branch numbers
    rejected: Tensor  # int64 [P]
    tree: Tensor  # int64 [P]

    @classmethod
    def of(cls, batch: Batch) -> Pairs:
        """Every rejected branch with the chosen branch (slot 0) of its tree.

        Raises:
            ValueError: a branch continues another branch, so that it is not a whole answer.
        """
        if not all(span.is_flat for row in batch.rows for span in row):
            raise ValueError("only branches that each continue their prompt can be compared")
        rejected, first = batch.rejected_branches, batch.chosen_branches
        tree = batch.branch_tree[rejected]
        chosen_of_tree = torch.empty_like(first).scatter_(0, batch.branch_tree[first], first)
        return cls(chosen_of_tree[tree], rejected, tree)
