"""Means with intervals: the percentile bootstrap (Efron, 1979) over independent items, such as the prompts of a test set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_AT_ONCE = 2**22
"""Numbers drawn at a time, so that memory does not grow with the number of items."""


@dataclass(frozen=True)
class Estimate:
    """A mean over items and where it would lie with other items of the same kind."""

    mean: float
    low: float
    high: float
    count: int
    """Items."""


def bootstrap_mean(values: npt.ArrayLike, *, level: float = 0.95, draws: int = 10_000, seed: int = 0) -> Estimate:
    """Mean of ``values`` [n] and its ``level`` interval: the quantiles of the means of ``draws`` resamples with replacement.

    For two systems on the same items pass the differences, item by item: the interval then knows that they are paired. With one item the
    interval has no width, which says nothing. Deterministic. Raises ValueError when there are no values, or not finite ones.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array) or not np.isfinite(array).all():
        raise ValueError(f"expected finite values, at least one: shape {array.shape}")
    rng = np.random.default_rng(seed)
    at_once = max(1, _AT_ONCE // len(array))
    means = np.empty(draws)
    for start in range(0, draws, at_once):
        chosen = rng.integers(len(array), size=(min(at_once, draws - start), len(array)))
        means[start : start + at_once] = array[chosen].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(array.mean()), float(low), float(high), len(array))


_ELEMENTS = 2**24
"""Of one batch of draws, so that memory stays bounded for any number of items."""


def interval(
    values: npt.ArrayLike,
    statistic: Callable[..., Any] = np.mean,
    samples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic (Efron, 1979): items are drawn with replacement, as many as there are.

    Args:
        values: [n] or [n, ...], one entry for each independent item: numbers that belong to one prompt belong into one entry.
        statistic: called as ``statistic(draws, axis=1)`` on [samples, n, ...]; gives one number for each sample. A draw for which it is
            not defined (NaN) is left out.
        level: share of the samples inside.

    Returns:
        (low, high). NaN when there are no items.
    """
    items = np.asarray(values, dtype=np.float64)
    if not len(items):
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    found = []
    at_once = max(1, _ELEMENTS // items.size)
    for start in range(0, samples, at_once):
        picked = rng.integers(0, len(items), (min(at_once, samples - start), len(items)))
        found.append(np.asarray(statistic(items[picked], axis=1), dtype=np.float64))
    tail = (1 - level) / 2
    drawn = np.concatenate(found)
    drawn = drawn[~np.isnan(drawn)]
    if not len(drawn):
        return float("nan"), float("nan")
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)
