"""The training example as tokens: a trunk (the prompt) and the branches that continue it (its completions). All stages
train on trees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]

TRUNK = -1
"""The parent of a branch that continues the trunk."""


@dataclass(frozen=True)
class Branch:
    """One completion, or a part that several completions share. ``mask[t]`` is true where ``ids[t]`` is a training
    target (the turn-ending token included)."""

    ids: Ids  # [c]
    mask: Mask  # [c]
    margin: float = 0.0
    """For a rejected answer, how much better the chosen one is. For a labelled answer, 1 if it is good and -1 if it is
    bad."""
    share: float = 1.0
    """For a rejected answer, the share of the judges who found the chosen one better."""
    grades: tuple[float, ...] = ()
    """For a graded answer, a number for each grade that the stage learns; NaN for a missing grade."""
    parent: int = TRUNK
    """The index, among the tree's branches, of the branch that this one continues; :data:`TRUNK` for the prompt."""


@dataclass(frozen=True)
class Tree:
    """A prompt and what continues it.

    The trunk is never a target; its last token predicts the first token of each branch that continues it. A supervised
    conversation is one branch, cut where its first target begins. A preference has the chosen answer as branch 0 and
    the rejected ones after it.

    >>> Tree(id="a", trunk=ids([1, 2]), branches=(Branch(ids([3, 4]), mask([1, 1])), Branch(ids([5]), mask([1]))))
    unique tokens: 5; paths: [1 2 3 4] and [1 2 5]

    A branch may continue another branch instead of the trunk: with the parents -1, 0, 0 and -1, four branches make the
    paths (0, 1), (0, 2) and (3,). A branch holds only the tokens that it adds to its parent, and its targets, margin,
    share and grades are of these tokens. So a token that several paths share stands in one branch and is trained once.

    Raises:
        ValueError: the branches are not in depth-first order.
    """

    id: str
    trunk: Ids  # [p], p >= 1
    branches: tuple[Branch, ...]  # none of them empty; no branches for a prompt that a policy will answer

    def __post_init__(self) -> None:
        if not self.is_flat:
            require_depth_first([branch.parent for branch in self.branches])

    @property
    def is_flat(self) -> bool:
        """True if all branches continue the trunk."""
        return all(branch.parent == TRUNK for branch in self.branches)

    @property
    def size(self) -> int:
        """Number of tokens of the trunk and all branches."""
        return len(self.trunk) + sum(len(b.ids) for b in self.branches)

    @property
    def longest_path(self) -> int:
        """Number of tokens from the trunk's start to the end of the longest path."""
        return max((self.path_length(path) for path in self.paths), default=len(self.trunk))

    @property
    def paths(self) -> list[tuple[int, ...]]:
        """The tree's paths, in order: for each branch that no other continues, the branches from the trunk to it."""
        if self.is_flat:
            return [(place,) for place in range(len(self.branches))]
        ways: list[tuple[int, ...]] = []
        for place, branch in enumerate(self.branches):
            ways.append((*(() if branch.parent == TRUNK else ways[branch.parent]), place))
        continued = {branch.parent for branch in self.branches}
        return [way for place, way in enumerate(ways) if place not in continued]

    def path_length(self, path: Sequence[int]) -> int:
        """Number of tokens of the trunk and of the branches ``path``."""
        return len(self.trunk) + sum(len(self.branches[place].ids) for place in path)


def require_depth_first(parents: Sequence[int]) -> None:
    """Check that nodes are in depth-first order: each stands directly after its parent, or after all nodes that
    continue an earlier child of its parent. So what continues a node follows it without a gap.

    Args:
        parents: the index of each node's parent; -1 for a node without one.

    Raises:
        ValueError: a node is out of order.
    """
    open_nodes: list[int] = []  # the path that the next node may continue
    for number, parent in enumerate(parents):
        while open_nodes and open_nodes[-1] != parent:
            open_nodes.pop()
        if not open_nodes and parent != -1:
            raise ValueError(f"node {number} comes too late to continue node {parent}")
        open_nodes.append(number)
