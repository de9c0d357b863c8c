"""How near a reward model's numbers are to the grades that people gave, attribute by attribute, with intervals over
prompts.

The answers to one prompt are one item: they share what they answer. Intervals follow the rule of
:mod:`align.functional.intervals`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from align.functional.intervals import correlation, ratio_of

Floats = npt.NDArray[np.float64]
SCORE = "score"
"""The weighted sum of all grades, among the attributes."""


def evaluate_grades(
    prompt: npt.NDArray[np.int64], predicted: Floats, given: Floats, weights: Mapping[str, float], guess: Floats
) -> dict[str, Any]:
    """For each attribute, and for the weighted sum of them, how near the model's numbers are to the grades that were
    given.

    Args:
        prompt: [n], equal numbers for answers to one prompt.
        predicted: [n, attributes], the model's numbers.
        given: [n, attributes], the grades; NaN where there is none.
        weights: attribute to its weight in the score, in the order of the columns.
        guess: [attributes], a constant prediction to compare with: the mean of the training grades.

    Returns:
        Name to ``{"answers", "error", "error_of_mean", "correlation"}``: the mean squared error, that of ``guess``, and
        Pearson's correlation; each ``{"value", "low", "high"}``, or None where nothing was graded or nothing varies.
    """
    columns = {name: (predicted[:, i], given[:, i], guess[i]) for i, name in enumerate(weights)}
    weight = np.array(list(weights.values()))
    used = weight != 0
    columns[SCORE] = (
        predicted[:, used] @ weight[used],
        given[:, used] @ weight[used],
        float(guess[used] @ weight[used]),
    )
    return {name: _one(prompt, *column) for name, column in columns.items()}


def _one(prompt: npt.NDArray[np.int64], predicted: Floats, given: Floats, guess: float) -> dict[str, Any]:
    there = ~np.isnan(given)
    prompts = np.unique(prompt[there], return_inverse=True)[1]
    return {
        "answers": int(there.sum()),
        "error": _mean(prompts, (predicted - given)[there] ** 2),
        "error_of_mean": _mean(prompts, (guess - given)[there] ** 2),
        "correlation": _correlation(prompts, predicted[there], given[there]),
    }


def _mean(prompts: npt.NDArray[np.int64], values: Floats) -> dict[str, float | None] | None:
    if not len(values):
        return None
    estimate = ratio_of(np.bincount(prompts, weights=values), np.bincount(prompts), (0.0, math.inf))
    return None if estimate is None else {"value": estimate.mean, "low": estimate.low, "high": estimate.high}


def _correlation(prompts: npt.NDArray[np.int64], one: Floats, other: Floats) -> dict[str, float | None] | None:
    if len(one) < 2 or not one.std() or not other.std():
        return None
    value = float(np.corrcoef(one, other)[0, 1])
    low, high = correlation(value, int(prompts.max()) + 1) or (None, None)
    return {"value": value, "low": low, "high": high}
