"""Win rates: how often one policy's answers score higher than another's, ties counting half; and the same, corrected
for differences of length."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

RIDGE = 0.01
"""Weight of the penalty ``(theta^2 + phi^2) / 2`` beside a sum over comparisons: it keeps both finite where one side
always wins."""
_STEPS = 60
_LONGEST_STEP = 2.0


def wins(ours: npt.ArrayLike, theirs: npt.ArrayLike) -> Floats:
    """Compare every answer of ours with every one of theirs to the same prompt: 1 where ours scores higher, 0 where it
    scores lower, 0.5 for a tie.

    Args:
        ours: scores [P, n].
        theirs: scores [P, m].

    Returns:
        [P, n * m]; the win rate is the mean.
    """
    left, right = np.asarray(ours, dtype=np.float64)[:, :, None], np.asarray(theirs, dtype=np.float64)[:, None, :]
    results: Floats = (left > right) + 0.5 * (left == right)
    return results.reshape(len(left), -1)


def differences(ours: npt.ArrayLike, theirs: npt.ArrayLike) -> Floats:
    """How much longer each answer of ours is than each of theirs, in the order of :func:`wins`: lengths [P, n], [P, m]
    -> [P, n * m]."""
    left, right = np.asarray(ours, dtype=np.float64)[:, :, None], np.asarray(theirs, dtype=np.float64)[:, None, :]
    return (left - right).reshape(len(left), -1)


def length_controlled(comparisons: npt.ArrayLike, axis: int = 0) -> Floats:
    """The win rate that a logistic regression predicts for answers of equal length.

    With ``y`` the result of a comparison (1, 0.5 or 0) and ``d`` our length minus theirs, over all comparisons

        P(y = 1) = sigmoid(theta + phi * tanh(d / std(d)))

    is fitted by maximum likelihood, with a small penalty (:data:`RIDGE`); the result is ``sigmoid(theta)``, the
    prediction at ``d = 0``.

    This is the form of AlpacaEval 2's length-controlled win rate (Dubois et al., "Length-Controlled AlpacaEval", arXiv
    2404.04475). It differs in three points: there is no term for how hard a prompt is, which that benchmark fits over
    many published models; ``y`` is the sign of a difference of scores, not a judge's probability; and the penalty is
    fixed instead of being chosen by cross-validation. The numbers are therefore not comparable with that leaderboard's.

    Args:
        comparisons: [P, m, 2], results and differences of length; or [draws, P, m, 2] with ``axis=1``, as a bootstrap
            calls it.
        axis: where P is.

    Returns:
        One number, or [draws].
    """
    array = np.asarray(comparisons, dtype=np.float64)
    flat = array.reshape(*array.shape[:axis], -1, 2)
    result, length = flat[..., 0], flat[..., 1]
    spread = length.std(axis=-1, keepdims=True)
    # Where all differences are equal, length explains nothing that the constant does not.
    term = np.where(spread > 0, np.tanh(length / np.where(spread > 0, spread, 1.0)), 0.0)
    theta = np.zeros(flat.shape[:-2])
    phi = np.zeros_like(theta)
    # Newton's method on two numbers, for all draws at once; steps are bounded, so that it cannot run away
    for _ in range(_STEPS):
        predicted = _sigmoid(theta[..., None] + phi[..., None] * term)
        left, weight = result - predicted, predicted * (1 - predicted)
        slope, slope_length = left.sum(-1) - RIDGE * theta, (left * term).sum(-1) - RIDGE * phi
        a = weight.sum(-1) + RIDGE
        b = (weight * term).sum(-1)
        c = (weight * term**2).sum(-1) + RIDGE
        determinant = a * c - b * b
        step = np.clip((c * slope - b * slope_length) / determinant, -_LONGEST_STEP, _LONGEST_STEP)
        step_length = np.clip((a * slope_length - b * slope) / determinant, -_LONGEST_STEP, _LONGEST_STEP)
        theta, phi = theta + step, phi + step_length
        if max(np.abs(step).max(), np.abs(step_length).max()) < 1e-9:
            break
    return _sigmoid(theta)


def _sigmoid(x: Floats) -> Floats:
    return 0.5 * (1.0 + np.tanh(0.5 * x))
