"""Several scorers as one."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Literal

from align.scoring.scorer import Answer, Scorer


class MemberScorer:
    """The mean of its members' scores, or the smallest of them."""

    def __init__(self, members: Sequence[Scorer], combine: Literal["mean", "min"]) -> None:
        self.members = tuple(members)
        self.name = f"{combine}({', '.join(member.name for member in members)})"
        self._combine = statistics.fmean if combine == "mean" else min

    def score(self, answers: Sequence[Answer]) -> list[float]:
        """The members' scores of each answer, combined. Errors of the members are passed on."""
        columns = [member.score(answers) for member in self.members]
        return [self._combine(row) for row in zip(*columns, strict=True)]
