"""A number before and after a stage, with its interval if it has one, and how both are written."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from align.functional.intervals import ANY, Direction, Range
from align.report.verdicts import rounding_of, verdict
from align.runs.values import decimals, mapping, number
from align.terminal import fixed


@dataclass(frozen=True)
class ReportedNumber:
    """A number, and its 95 % interval if it has one."""

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, value: Any, *keys: str, name: str = "value") -> ReportedNumber | None:
        """``{name, low, high}`` under ``keys``, or a plain number."""
        numbers = mapping(value, *keys)
        if not numbers:
            plain = number(value, *keys)
            return None if plain is None else cls(plain)
        middle = number(numbers, name)
        return None if middle is None else cls(middle, number(numbers, "low"), number(numbers, "high"))

    @property
    def scale(self) -> float:
        """The size of the number, or of its uncertainty if that is larger; the number of decimals follows from it."""
        return (
            abs(self.value)
            if self.low is None or self.high is None
            else max(abs(self.value), (self.high - self.low) / 2)
        )

    def words(self, digits: int, *, signed: bool = False) -> str:
        """``0.712 [0.651, 0.773]``."""
        shown = fixed(self.value, digits, signed=signed)
        if self.low is None or self.high is None:
            return shown
        return f"{shown} [{fixed(self.low, digits, signed=signed)}, {fixed(self.high, digits, signed=signed)}]"


@dataclass(frozen=True)
class Change:
    """One measure of a stage, before and after it."""

    stage: str
    measure: str
    before: ReportedNumber | None
    after: ReportedNumber | None
    difference: ReportedNumber | None = None
    """After minus before."""
    better: Direction | None = None
    chance: float | None = None
    """The value that guessing gives; if set, ``after`` is compared with it instead of with ``before``."""
    subject: str = ""
    """Name of the policy, if the stage measures several."""
    note: str = ""
    items: int | None = None
    """Number of prompts that were measured, if known."""
    trained: bool = False
    """Was the stage trained on some of these prompts?"""
    dtype: str = "fp32"
    """The precision it was computed in."""
    within: Range = ANY
    """The least and the largest value that the measure can have."""

    @property
    def title(self) -> str:
        """The measure and its policy."""
        return f"{self.measure}: {self.subject}" if self.subject else self.measure

    @classmethod
    def between(
        cls, stage: str, measure: str, before: float | None, after: ReportedNumber | None, **more: Any
    ) -> Change | None:
        """A change with the difference of the two numbers; None without ``after``."""
        if after is None:
            return None
        difference = None if before is None else ReportedNumber(after.value - before)
        return cls(stage, measure, None if before is None else ReportedNumber(before), after, difference, **more)

    @property
    def cells(self) -> tuple[str, str, str]:
        """Before, after and difference as text, with the same decimals."""
        estimates = (self.before, self.after, self.difference)
        values = [estimate.value for estimate in estimates if estimate is not None]
        whole = all(value == int(value) for value in values) and all(e is None or e.low is None for e in estimates)
        small = self.difference.scale if self.difference is not None else 0.0
        digits = 0 if whole else max(decimals(*values), min(6, 1 - math.floor(math.log10(small))) if small else 0)
        before, after, difference = (
            "" if estimate is None else estimate.words(digits, signed=k == 2) for k, estimate in enumerate(estimates)
        )
        return before, after, difference

    def __str__(self) -> str:
        """``held-out loss 2.879 -> 2.486``."""
        before, after, _ = self.cells
        return f"{self.title} {before} -> {after}" if before else f"{self.title} {after}"

    @property
    def verdict(self) -> str:
        """ "better", "worse" and so on, by :mod:`align.report.verdicts`; empty for a measure that is neither good nor
        bad."""
        scale = max((abs(part.value) for part in (self.before, self.after) if part is not None), default=0.0)
        return verdict(
            self.after,
            self.difference,
            better=self.better,
            chance=self.chance,
            rounding=rounding_of(scale, self.dtype, self.items),
            items=self.items,
            trained=self.trained,
        )
