"""Numbers of several policies on the same items, as means with bootstrap intervals and differences to the first policy, item by item."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from align.functional.bootstrap import Estimate, bootstrap_mean, interval
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

    def estimates(self, baseline: str, seed: int) -> dict[str, dict[str, Any]]:
        """Policy -> mean, interval and count, with the ``difference`` to ``baseline`` where that makes sense."""
        found: dict[str, dict[str, Any]] = {}
        for policy, values in self.values.items():
            found[policy] = asdict(_mean(values, self.counts, seed))
            if self.paired and policy != baseline and baseline in self.values:
                found[policy]["difference"] = asdict(_mean(values - self.values[baseline], self.counts, seed))
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
            low, high = interval(items, length_controlled, samples=_DRAWS, seed=seed)
            found[policy] = asdict(Estimate(float(length_controlled(items)), low, high, len(items)))
        return found


Found = Metric | LengthControlled


def compare(found: Mapping[str, Found], baseline: str, *, seed: int) -> dict[str, dict[str, dict[str, Any]]]:
    """``{metric: {policy: {mean, low, high, count}}}``; most policies but the baseline have a ``difference`` of the same form as well."""
    return {name: metric.estimates(baseline, seed) for name, metric in found.items()}


def _mean(values: Values, counts: Values | None, seed: int) -> Estimate:
    if counts is None:
        return bootstrap_mean(values, seed=seed)
    items = np.stack([values, counts], axis=1)
    return Estimate(float(_ratio(items)), *interval(items, _ratio, seed=seed), len(items))


def _ratio(items: Values, axis: int = 0) -> Values:
    """Of the sums of [P, 2], or of each draw of [draws, P, 2]; NaN where nothing was counted."""
    sums = items.sum(axis=axis)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio: Values = sums[..., 0] / sums[..., 1]
    return ratio
