"""Numbers of several policies on the same items, as means with intervals and differences to the first policy, item by
item."""

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
"""Of a statistic that is fitted anew for each draw."""


@dataclass(frozen=True)
class Metric:
    """One number of each item (most often a prompt) for each policy."""

    words: str
    """What it is, for people."""
    values: Mapping[str, Values]
    """Policy -> [P]."""
    counts: Values | None = None
    """[P]: what the values are sums over; the mean is then ``sum(values) / sum(counts)``. The same for every policy."""
    paired: bool = True
    """Do differences to the first policy mean something? Not where the values compare with it already."""
    within: Range = ANY
    """The least and the largest value that the mean can have."""

    def estimates(self, baseline: str, seed: int) -> dict[str, dict[str, Any]]:
        """Policy -> mean, interval and count, with the ``difference`` to ``baseline`` where that makes sense."""
        found: dict[str, dict[str, Any]] = {}
        for policy, values in self.values.items():
            found[policy] = asdict(_mean(values, self.counts, self.within, seed))
            if self.paired and policy != baseline and baseline in self.values:
                difference, apart = values - self.values[baseline], self.within[1] - self.within[0]
                found[policy]["difference"] = asdict(_mean(difference, self.counts, (-apart, apart), seed))
        return found


@dataclass(frozen=True)
class LengthControlled:
    """Comparisons with one opponent, of which the length-controlled win rate is taken."""

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
    """A number of all items together that is no mean over them."""

    words: str
    """What it is, for people."""
    values: Mapping[str, Values]
    """Policy -> [P, K]: what it is computed from, a row for each independent item."""
    of: StatisticOfDraws
    """``of(values, axis=0)`` -> the number; ``of(draws, axis=1)`` of [draws, P, K] -> [draws], NaN where a draw does
    not have it."""
    within: Range = ANY
    """The least and the largest value that it can have."""

    def estimates(self, baseline: str, seed: int) -> dict[str, dict[str, Any]]:
        """Policy -> the number, its interval and count, with the ``difference`` to ``baseline``."""
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

    ``low`` and ``high`` are None where the items are too few for an interval.
    """
    return {name: metric.estimates(baseline, seed) for name, metric in found.items()}


def _mean(values: Values, counts: Values | None, within: Range, seed: int) -> Estimate:
    if counts is None:
        return mean_of(values, within, seed=seed)
    return ratio_of(values, counts, within, seed=seed) or Estimate(float("nan"), None, None, 0)
