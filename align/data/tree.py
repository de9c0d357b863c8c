"""The training example as tokens: a trunk (the prompt) and branches (its completions). All stages train on trees."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Branch:
    """One completion. ``mask[t]`` is true where ``ids[t]`` is a training target (the turn-ending token included)."""

    ids: Ids  # [c]
    mask: Mask  # [c]
    margin: float = 0.0
    """For a rejected answer, how much better the chosen one is. For a labelled answer, 1 if it is good and -1 if it is
    bad."""
    share: float = 1.0
    """For a rejected answer, the share of the judges who found the chosen one better."""
    grades: tuple[float, ...] = ()
    """For a graded answer, a number for each grade that the stage learns; NaN for a missing grade."""


@dataclass(frozen=True)
class Tree:
    """A prompt and its completions.

    The trunk is never a target; its last token predicts the first token of each branch. A supervised conversation is
    one branch, cut where its first target begins. A preference has the chosen answer as branch 0 and the rejected ones
    after it.

    >>> Tree(id="a", trunk=ids([1, 2]), branches=(Branch(ids([3, 4]), mask([1, 1])), Branch(ids([5]), mask([1]))))
    unique tokens: 5; paths: [1 2 3 4] and [1 2 5]
    """

    id: str
    trunk: Ids  # [p], p >= 1
    branches: tuple[Branch, ...]  # none of them empty; no branches for a prompt that a policy will answer

    @property
    def size(self) -> int:
        """Number of tokens of the trunk and all branches."""
        return len(self.trunk) + sum(len(b.ids) for b in self.branches)

    @property
    def longest_path(self) -> int:
        """Number of tokens from the trunk's start to the end of the longest branch."""
        return len(self.trunk) + max((len(b.ids) for b in self.branches), default=0)
