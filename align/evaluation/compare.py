"""Comparing numbers of several policies on the same items: means with intervals, and differences from the first policy
item by item."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from align.functional.intervals import (
    ANY,
    SHARE,
    Estimate,
    Range,
    StatisticOfDraws,
    mean_of,
    ratio_of,
    statistic_of,
    wilson,
)
from align.functional.win_rate import length_controlled

Values = npt.NDArray[np.float64]

_DRAWS = 500
"""Number of draws for a statistic that is fitted anew for each draw."""


@dataclass(frozen=True)
class Metric:
    """A measure with one number for each item (usually a prompt) and policy."""

    words: str
    """What it is, for people."""
    values: Mapping[str, Values]
    """Policy -> [P]."""
    counts: Values | None = None
    """[P], the number of things that each value is a sum over; the mean is then ``sum(values) / sum(counts)``. The same
    for every policy."""
    paired: bool = True
    """Are differences from the first policy meaningful? They are not if the values already are comparisons with it."""
    within: Range = ANY
    """The least and the largest value that the mean can have."""

    def estimates(self, baseline: str, seed: int) -> dict[str, dict[str, Any]]:
        """Policy -> mean, interval and count, with the ``difference`` from ``baseline`` if that is meaningful."""
        found: dict[str, dict[str, Any]] = {}
        for policy, values in self.values.items():
            found[policy] = asdict(_mean(values, self.counts, self.within, seed))
            if self.paired and policy != baseline and baseline in self.values:
                difference, apart = values - self.values[baseline], self.within[1] - self.within[0]
                found[policy]["difference"] = asdict(_mean(difference, self.counts, (-apart, apart), seed))
        return found


@dataclass(frozen=True)
class LengthControlled:
    """A length-controlled win rate over one opponent."""

    words: str
    comparisons: Mapping[str, Values]
    """Policy -> [P, m, 2]: results, and differences of length (:func:`align.functional.win_rate.length_controlled`)."""

    def estimates(self, baseline: str, seed: int) -> dict[str, dict[str, Any]]:
        """Policy -> win rate at equal length, its interval and count."""
        found = {}
        for policy, items in self.comparisons.items():
            rate, results = float(length_controlled(items)), items[..., 0]
            if (results == results.flat[0]).all():  # every draw is the same
                bounds = wilson(rate, len(items)) if len(items) > 1 else None
            else:
                bounds = statistic_of(items, length_controlled, SHARE, draws=_DRAWS, seed=seed)
            low, high = bounds or (None, None)
            found[policy] = asdict(Estimate(rate, low, high, len(items)))
        return found


@dataclass(frozen=True)
class Statistic:
    """A number computed from all items together that is not a mean over them."""

    words: str
    """What it is, for people."""
    values: Mapping[str, Values]
    """Policy -> [P, K], the data that it is computed from, a row for each independent item."""
    of: StatisticOfDraws
    """``of(values, axis=0)`` -> the number; ``of(draws, axis=1)`` of [draws, P, K] -> [draws], NaN where a draw does
    not have it."""
    within: Range = ANY
    """The least and the largest value that it can have."""

    def estimates(self, baseline: str, seed: int) -> dict[str, dict[str, Any]]:
        """Policy -> the number, its interval and count, with the ``difference`` from ``baseline``."""
        found: dict[str, dict[str, Any]] = {}
        for policy, values in self.values.items():
            found[policy] = asdict(self._estimate(values, self.of, self.within, seed))
            if policy != baseline and baseline in self.values:
                both, apart = np.concatenate([values, self.values[baseline]], axis=-1), self.within[1] - self.within[0]
                found[policy]["difference"] = asdict(self._estimate(both, self._difference, (-apart, apart), seed))
        return found

    def _difference(self, both: Values, axis: int) -> Values:
        ours, theirs = np.split(both, 2, axis=-1)
        difference: Values = self.of(ours, axis=axis) - self.of(theirs, axis=axis)
        return difference

    @staticmethod
    def _estimate(values: Values, of: StatisticOfDraws, within: Range, seed: int) -> Estimate:
        low, high = statistic_of(values, of, within, draws=_DRAWS, seed=seed) or (None, None)
        return Estimate(float(of(values, axis=0)), low, high, len(values))


Found = Metric | LengthControlled | Statistic


def compare(found: Mapping[str, Found], baseline: str, *, seed: int) -> dict[str, dict[str, dict[str, Any]]]:
    """``{metric: {policy: {mean, low, high, count}}}``; most policies but the baseline have a ``difference`` of the
    same form as well.

    ``low`` and ``high`` are None when there are too few items for an interval.
    """
    return {name: metric.estimates(baseline, seed) for name, metric in found.items()}


def _mean(values: Values, counts: Values | None, within: Range, seed: int) -> Estimate:
    if counts is None:
        return mean_of(values, within, seed=seed)
    return ratio_of(values, counts, within, seed=seed) or Estimate(float("nan"), None, None, 0)
