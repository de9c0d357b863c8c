"""Decides whether a stage may be called better or worse, from a number and its interval. The terminal summary, the
page, the lists of runs and the table over seeds all use this rule.

A stage is called better or worse only if the interval of the change does not contain 0, the change is larger than
rounding can make it, and both values were measured on at least :data:`~align.functional.intervals.ENOUGH` prompts that
the stage was not trained on. An accuracy is called above or below chance under the same conditions. In all other cases
the verdict says which of these is missing.
"""

from __future__ import annotations

import math
from typing import Protocol

from align.functional.intervals import ENOUGH, Direction
from align.functional.ties import relative_error

THE_SAME, NOT_HELD_OUT, TOO_FEW, NO_INTERVAL = "the same", "not held out", "too few", "no interval"
UNSHOWN, WITHIN, BELOW = "no difference shown", "within chance", "below chance"
_LAYERS, _WIDTH = 100, 4096
"""Size of a large model, for which rounding is estimated; in a smaller one it is less."""


class Measured(Protocol):
    """A number with its interval."""

    @property
    def value(self) -> float:
        """The number."""
        ...

    @property
    def low(self) -> float | None:
        """The interval's lower end; None when there are too few items for an interval."""
        ...

    @property
    def high(self) -> float | None:
        """Its upper end."""
        ...


def verdict(
    after: Measured | None,
    difference: Measured | None,
    *,
    better: Direction | None,
    chance: float | None,
    rounding: float,
    items: int | None,
    trained: bool,
) -> str:
    """The verdict in a word or two; empty for a measure that is neither good nor bad.

    Args:
        chance: the value that guessing gives; if set, ``after`` is compared with it.
        rounding: differences up to this size count as none.
        items: number of prompts that were measured; None if unknown.
        trained: was the stage trained on some of them?
    """
    subject = after if chance is not None else difference
    if subject is None or (chance is None and better is None):
        return ""
    if difference is not None and abs(difference.value) <= rounding and chance is None:
        return THE_SAME
    if trained:
        return NOT_HELD_OUT
    if items is not None and items < ENOUGH:
        return TOO_FEW
    if subject.low is None or subject.high is None:
        return NO_INTERVAL
    if chance is not None:
        if subject.low > chance:
            return "above chance"
        return BELOW if subject.high < chance else WITHIN
    low, high = sorted((subject.low, subject.high) if better == "up" else (-subject.high, -subject.low))
    if low > 0:
        return "better"
    return "worse" if high < 0 else UNSHOWN


def rounding_of(scale: float, dtype: str, items: int | None) -> float:
    """How far rounding may move a mean over ``items`` numbers of about size ``scale``, computed in ``dtype`` ("fp32",
    "bf16")."""
    return scale * relative_error(_LAYERS, _WIDTH, dtype) / math.sqrt(items or 1)
