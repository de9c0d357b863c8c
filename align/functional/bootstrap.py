"""Bootstrap intervals: how far a statistic of these items would move with another sample of items."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

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
