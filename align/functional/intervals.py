"""The one rule for confidence intervals: how far a statistic of independent items may be from its value over all items
of that kind.

Which interval a number gets follows from what it is a mean of:

===================================  =====================================================  =============
items                                interval                                               items needed
===================================  =====================================================  =============
right or wrong, ties a half          Wilson's (1927)                                        2
differences of two such              Agresti and Min's (2005), for matched proportions      2
any numbers                          Student's, and from :data:`RESAMPLED` items on the      :data:`FEWEST`
                                     wider side of it and of the bootstrap-t (Efron, 1981)
a correlation                        Fisher's (1921)                                        :data:`RESAMPLED`
another statistic of the items       the percentile bootstrap (Efron, 1979)                 :data:`FEWEST_DRAWN`
===================================  =====================================================  =============

With fewer items there is none. No interval leaves the range of its quantity, and items that are all alike give one only
when there are at least :data:`ENOUGH` of them: before, that they are alike may be chance. Student's interval is exact
for normal items. The bootstrap-t corrects it for skewed items, and needs about five of them to see the skew; three or
four items have to be near normal, as means over seeds are (``tests/unit/functional/test_intervals.py`` counts how often
each interval holds the truth). No interval from few items accounts for a value that is rare and large.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

FEWEST = 3
"""Number of items that the interval of a mean of any numbers needs."""
RESAMPLED = 5
"""Number of items from which resampling them shows their skewness."""
FEWEST_DRAWN = 10
"""Number of items that the percentile bootstrap needs."""
ENOUGH = 30
"""Number of items from which a verdict is given, and from which items that are all alike get an interval."""
LEVEL = 0.95
_DRAWS = 2000
_FEW = 1000
"""Up to this many items the bootstrap-t is computed; with more it agrees with Student's interval."""
_ELEMENTS = 2**24
"""Numbers in one batch of draws, so that memory stays bounded for any number of items."""

Floats = npt.NDArray[np.float64]
Range = tuple[float, float]
"""The least and the largest value that a quantity can have."""

ANY: Range = (-math.inf, math.inf)
SHARE: Range = (0.0, 1.0)
DIFFERENCE: Range = (-1.0, 1.0)
"""Range of a difference between two shares."""

Direction = Literal["up", "down"]
"""Which way a quantity is better."""


@dataclass(frozen=True)
class Estimate:
    """A mean over items and where it would lie with other items of the same kind."""

    mean: float
    low: float | None
    """None, like ``high``, when the items are too few for an interval."""
    high: float | None
    count: int
    """Number of items."""


Bounds = tuple[float, float] | None


def wilson(share: float, n: float, level: float = LEVEL) -> tuple[float, float]:
    """The interval of a share of ``n`` items, ties counting half (Wilson, 1927).

    >>> [round(bound, 3) for bound in wilson(0.5, 100)], [round(bound, 3) for bound in wilson(1.0, 2)]
    ([0.404, 0.596], [0.342, 1.0])
    """
    z = _normal(level)
    middle, spread = share + z * z / (2 * n), z * math.sqrt(max(0.0, share * (1 - share)) / n + z * z / (4 * n * n))
    return max(0.0, (middle - spread) / (1 + z * z / n)), min(1.0, (middle + spread) / (1 + z * z / n))


def _matched(values: Floats, level: float) -> tuple[float, float]:
    """Interval of the difference between two shares of the same items: half an item is added for each of the four ways
    in which the two can come out (Agresti and Min, 2005)."""
    n = len(values) + 2
    mean, square = values.sum() / n, ((values**2).sum() + 1) / n
    half = _normal(level) * math.sqrt(max(0.0, square - mean**2) / n)
    return float(mean - half), float(mean + half)


def mean_of(values: npt.ArrayLike, within: Range = ANY, *, level: float = LEVEL, seed: int = 0) -> Estimate:
    """Mean of ``values`` [n] and its interval, by the rule of this module.

    For two systems on the same items pass the differences, item by item: the interval then knows that they are paired.

    Args:
        within: range of the quantity: :data:`SHARE`, :data:`DIFFERENCE` of shares, or any other.

    Raises:
        ValueError: there are no values, or not finite ones.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array) or not np.isfinite(array).all():
        raise ValueError(f"expected finite values, at least one: shape {array.shape}")
    bounds = _bounds(array, within, level, seed)
    if bounds is None:
        return Estimate(_mean(array), None, None, len(array))
    return Estimate(_mean(array), max(within[0], bounds[0]), min(within[1], bounds[1]), len(array))


def _mean(values: Floats) -> float:
    """The mean, computed in steps that stay finite for the largest numbers."""
    scale = float(np.abs(values).max()) or 1.0
    return float((values / scale).mean()) * scale


def _bounds(values: Floats, within: Range, level: float, seed: int) -> Bounds:
    n = len(values)
    halves = n > 1 and bool(((values == np.round(values)) | (np.abs(values) == 0.5)).all())
    if within == SHARE and halves:
        return wilson(float(values.mean()), n, level)
    if within == DIFFERENCE and halves:
        return _matched(values, level)
    mean, scale = _mean(values), float(np.abs(values).max()) or 1.0
    plain = values / scale  # squares of the largest numbers stay finite
    spread = float(plain.std(ddof=1)) if n > 1 else 0.0
    if spread <= 1e-12:
        return (mean, mean) if n >= ENOUGH else None
    if n < FEWEST:
        return None
    low, high = _student(n, level)
    if RESAMPLED <= n <= _FEW:
        other = _studentised(plain, level, seed)
        low, high = max(low, -other[0]), max(high, other[1])
    error = spread / math.sqrt(n) * scale
    bounds = mean - high * error, mean + low * error
    return bounds if all(map(math.isfinite, (max(bounds[0], within[0]), min(bounds[1], within[1])))) else None


def _student(n: int, level: float) -> tuple[float, float]:
    """How many standard errors the mean of a sample may be below and above the truth, for normal items."""
    half = _quantile(n - 1, level)
    return half, half


def _studentised(values: Floats, level: float, seed: int) -> tuple[float, float]:
    """Like :func:`_student`, from resamples of ``values``, whose sizes are at most 1: quantiles of the distance of a
    resample's mean from the mean, in standard errors of the resample. A resample whose items are all alike has no
    standard error: it counts as infinitely far off, alternately above and below."""
    rng, n = np.random.default_rng(seed), len(values)
    drawn = values[rng.integers(n, size=(_DRAWS, n))]
    spread = drawn.std(axis=1, ddof=1)
    alike = spread <= 1e-12
    off = (drawn.mean(axis=1) - values.mean()) / np.where(alike, 1.0, spread) * math.sqrt(n)
    off[alike] = np.where(np.arange(alike.sum()) % 2, math.inf, -math.inf)
    tail = (1 - level) / 2
    low, high = np.quantile(off, [tail, 1 - tail], method="nearest")
    return float(low), float(high)


def ratio_of(
    values: npt.ArrayLike, counts: npt.ArrayLike, within: Range = ANY, *, level: float = LEVEL, seed: int = 0
) -> Estimate | None:
    """``sum(values) / sum(counts)`` over items [n], each a part of both sums, with its interval; None where nothing was
    counted.

    The interval is that of the mean of ``r + (value - r * count) / mean count``, which has the ratio r as its mean and,
    for many items, its spread (Cochran, *Sampling Techniques*, 6.3). Items that count nothing are left out.
    """
    array, weight = np.asarray(values, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    array, weight = array[weight > 0], weight[weight > 0]
    if not len(weight):
        return None
    if (weight == weight[0]).all():
        return mean_of(array / weight[0], within, level=level, seed=seed)
    ratio = float(array.sum() / weight.sum())
    estimate = mean_of(ratio + (array - ratio * weight) / weight.mean(), within, level=level, seed=seed)
    if ratio in within and (estimate.low is None or estimate.low == estimate.high):  # all right or all wrong
        estimate = mean_of(np.full(len(weight), ratio), within, level=level, seed=seed)
    return Estimate(ratio, estimate.low, estimate.high, len(weight))


def correlation(coefficient: float, n: int, level: float = LEVEL) -> Bounds:
    """Interval of Pearson's correlation of ``n`` pairs (Fisher, 1921); None with fewer than :data:`RESAMPLED`.

    The formula has no interval at a correlation of exactly 1, so it is moved away from 1 by the weight of half an item.
    """
    if n < RESAMPLED:
        return None
    edge = 1 - 1 / (2 * n)
    middle, half = math.atanh(min(edge, max(-edge, coefficient))), _normal(level) / math.sqrt(n - 3)
    return min(coefficient, math.tanh(middle - half)), max(coefficient, math.tanh(middle + half))


class StatisticOfDraws(Protocol):
    """A statistic of items, computed for many draws of them at once."""

    def __call__(self, draws: npt.NDArray[np.float64], /, axis: int) -> npt.NDArray[np.float64]:
        """One number for each draw; the items are along ``axis``."""


def statistic_of(
    values: npt.ArrayLike,
    statistic: StatisticOfDraws,
    within: Range = ANY,
    *,
    draws: int = _DRAWS,
    seed: int = 0,
    level: float = LEVEL,
) -> Bounds:
    """Interval of any other statistic: resamples of the items are drawn with replacement, and the interval lies between
    quantiles of the statistic over the resamples (Efron, 1979).

    Args:
        values: [n] or [n, ...], one entry for each independent item; numbers of the same prompt go into one entry.
        statistic: called as ``statistic(draws, axis=1)`` on [draws, n, ...]; gives one number for each draw. A draw for
            which it is not defined (NaN) is left out.

    Returns:
        (low, high) inside ``within``; None with fewer than :data:`FEWEST_DRAWN` items, and where all draws agree in
        fewer than :data:`ENOUGH`.
    """
    items = np.asarray(values, dtype=np.float64)
    if len(items) < FEWEST_DRAWN:
        return None
    rng = np.random.default_rng(seed)
    statistics = []
    at_once = max(1, _ELEMENTS // items.size)
    for start in range(0, draws, at_once):
        picked = rng.integers(0, len(items), (min(at_once, draws - start), len(items)))
        statistics.append(np.asarray(statistic(items[picked], axis=1), dtype=np.float64))
    drawn = np.concatenate(statistics)
    drawn = drawn[~np.isnan(drawn)]
    if not len(drawn) or (len(items) < ENOUGH and np.ptp(drawn) <= 1e-12 * np.abs(drawn).max()):
        return None
    tail = (1 - level) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return max(within[0], float(low)), min(within[1], float(high))


@cache
def _quantile(degrees: int, level: float) -> float:
    """Quantile of Student's distribution."""
    from scipy.stats import t

    return float(t.ppf((1 + level) / 2, degrees))


@cache
def around(mean: float, error: float, level: float = LEVEL) -> tuple[float, float]:
    """The interval of a mean when only its standard error is known, not its items (lm-eval reports no more)."""
    half = _normal(level) * error
    return mean - half, mean + half


def _normal(level: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf((1 + level) / 2)
