"""How good a reward model is on pairs: accuracy, the influence of length, calibration, each with an interval.

A prompt counts once, however many rejected answers it has: its K pairs weigh 1 / K each. Intervals are over prompts,
not pairs, because the pairs of a prompt share its chosen answer. They follow the rule of
:mod:`align.functional.intervals`; an estimate from too few prompts has none (``low`` and ``high`` are None).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from align.functional.intervals import ANY, SHARE, Range, correlation, ratio_of, statistic_of
from align.functional.ties import won

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Numbers = dict[str, float | None]
"""An estimate: ``value``, ``low`` and ``high``."""

BINS = 5
"""Number of bins for the predicted probability that the preferred answer wins, from 0.5 to 1."""


@dataclass(frozen=True)
class ScoredPairs:
    """P pairs: a chosen and a rejected answer to one prompt, their scores, and their lengths in tokens."""

    prompt: Ints  # [P], equal numbers for the pairs of one prompt
    chosen: Floats  # [P], scores
    rejected: Floats  # [P]
    chosen_length: Ints  # [P], tokens
    rejected_length: Ints  # [P]
    noise: Floats | float = 0.0  # [P], how far rounding may move a difference of scores; :mod:`align.functional.ties`

    def __len__(self) -> int:
        return len(self.prompt)

    def only(self, which: Bools) -> ScoredPairs:
        """The pairs selected by ``which`` [P]."""
        return ScoredPairs(
            **{name: values[which] if isinstance(values, np.ndarray) else values for name, values in vars(self).items()}
        )

    @property
    def length_difference(self) -> Ints:
        """Chosen minus rejected, [P]."""
        return self.chosen_length - self.rejected_length

    @property
    def right(self) -> Floats:
        """1 where the chosen answer has the higher score, 1/2 where both have the same but for rounding, [P]."""
        return won(self.chosen - self.rejected, self.noise)


def evaluate(pairs: ScoredPairs, margins: Mapping[str, Floats] | None = None, seed: int = 0) -> dict[str, Any]:
    """The numbers of one set of pairs. An estimate is ``{"value", "low", "high"}``, the bounds None where the prompts
    are too few for an interval; the whole is None where there is nothing to estimate it from.

    - accuracy, accuracy_longer_wins, accuracy_shorter_wins: share of the pairs that are ranked right; of those whose
      chosen answer is the longer (shorter) one.
    - accuracy_NAME for each of ``margins`` [P]: the same for another predictor; its margin is its score of the chosen
      minus that of the rejected answer.
    - length_correlation: Pearson's, of an answer's score with its length.
    - score_mean, score_std: of all answers.
    - calibration_error: over the bins, the mean distance between the predicted probability that the preferred answer
      wins (the sigmoid of the difference of scores) and how often it does (ECE, https://arxiv.org/abs/1706.04599, eq.
      3). ``calibration`` lists the bins.
    """
    sums = _Sums(pairs, seed)
    scores = np.stack([pairs.chosen, pairs.rejected])  # [2, P]
    middle = scores.mean() if len(pairs) else 0.0
    lengths = np.stack([pairs.chosen_length, pairs.rejected_length]).astype(np.float64)
    lengths -= lengths.mean() if len(pairs) else 0.0
    moments = [
        part.mean(0)
        for part in (scores - middle, (scores - middle) ** 2, lengths, lengths**2, (scores - middle) * lengths)
    ]
    confidence = 1 / (1 + np.exp(-np.abs(pairs.chosen - pairs.rejected)))
    bins = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    errors = [(confidence - pairs.right) * (bins == b) for b in range(BINS)]
    return {
        "prompts": sums.prompts,
        "pairs": len(pairs),
        "accuracy": sums.share(pairs.right),
        "accuracy_longer_wins": sums.share(pairs.right, pairs.length_difference > 0),
        "accuracy_shorter_wins": sums.share(pairs.right, pairs.length_difference < 0),
        **{f"accuracy_{name}": sums.share(won(margin)) for name, margin in (margins or {}).items()},
        "length_correlation": sums.correlation(*moments),
        "score_mean": sums.mean(scores.mean(0)),
        "score_std": sums.estimate(_std, *moments[:2], within=(0.0, math.inf)),
        "calibration_error": sums.estimate(_calibration_error, *errors, within=SHARE),
        "calibration": [_bin(b, bins == b, confidence, pairs.right) for b in range(BINS) if (bins == b).any()],
    }


class _Sums:
    """Weighted sums of numbers of pairs, prompt by prompt, and statistics of the sums over all prompts."""

    def __init__(self, pairs: ScoredPairs, seed: int) -> None:
        _, self._prompt, count = np.unique(pairs.prompt, return_inverse=True, return_counts=True)
        self._weight = 1 / count[self._prompt]
        self.prompts, self._seed = len(count), seed

    def _table(self, *columns: Floats, only: Bools | None = None) -> Floats:
        """Sums over each prompt's pairs: of the weights, and of each of ``columns`` [P] by weight; [prompts, 1 + k]."""
        weight = self._weight if only is None else self._weight * only
        values = [weight, *(weight * column for column in columns)]
        sums = [np.bincount(self._prompt, weights=value) for value in values]
        table: Floats = np.stack(sums, axis=1).astype(np.float64)
        return table

    def estimate(self, formula: Callable[[Floats], Floats], *columns: Floats, within: Range = ANY) -> Numbers | None:
        """``formula`` applied to the sums of :meth:`_table` over all prompts, with its interval."""
        table = self._table(*columns)

        def statistic(draws: Floats, axis: int) -> Floats:
            return formula(draws.sum(axis=axis))

        value = float(statistic(table, 0)) if len(table) else float("nan")
        if np.isnan(value):
            return None
        return _numbers(value, statistic_of(table, statistic, within, seed=self._seed))

    def correlation(self, *moments: Floats) -> Numbers | None:
        """Pearson's correlation, from its ``moments`` [P]; the interval is that of as many independent pairs as there
        are prompts."""
        value = float(_correlation(self._table(*moments).sum(0))) if self.prompts else float("nan")
        return None if np.isnan(value) else _numbers(value, correlation(value, self.prompts))

    def share(self, values: Floats, only: Bools | None = None) -> Numbers | None:
        """The weighted mean of values that are 1 (right), 0 (wrong) or 1/2, with its interval."""
        return self.mean(values, only, SHARE)

    def mean(self, values: Floats, only: Bools | None = None, within: Range = ANY) -> Numbers | None:
        """The weighted mean."""
        table = self._table(values, only=only)
        estimate = ratio_of(table[:, 1], table[:, 0], within, seed=self._seed)
        return (
            None
            if estimate is None
            else _numbers(
                estimate.mean, None if estimate.low is None or estimate.high is None else (estimate.low, estimate.high)
            )
        )


def _numbers(value: float, bounds: tuple[float, float] | None) -> Numbers:
    low, high = bounds or (None, None)
    return {"value": value, "low": low, "high": high}


def _divide(above: Floats, below: Floats) -> Floats:
    """The quotient; NaN where ``below`` is 0."""
    result: Floats = np.divide(above, below, out=np.full(np.shape(above), np.nan), where=np.asarray(below) > 0)
    return result


def _std(sums: Floats) -> Floats:
    mean, square = (_divide(sums[..., k], sums[..., 0]) for k in (1, 2))
    spread: Floats = np.sqrt(np.maximum(square - mean**2, 0))
    return spread


def _correlation(sums: Floats) -> Floats:
    s, ss, n, nn, sn = (_divide(sums[..., k], sums[..., 0]) for k in range(1, 6))
    return _divide(sn - s * n, np.sqrt(np.maximum(ss - s**2, 0) * np.maximum(nn - n**2, 0)))


def _calibration_error(sums: Floats) -> Floats:
    return _divide(np.abs(sums[..., 1:]).sum(-1), sums[..., 0])


def _bin(number: int, inside: Bools, confidence: Floats, right: Floats) -> dict[str, float]:
    low, width = 0.5 + number * 0.5 / BINS, 0.5 / BINS
    means = {"predicted": float(confidence[inside].mean()), "right": float(right[inside].mean())}
    return {"from": round(low, 2), "to": round(low + width, 2), "pairs": int(inside.sum()), **means}
