"""Which differences of scores count as ties: those no larger than rounding can make.

The same number, computed among other rows or in another order, comes out a little different. How much follows from the
precision: every stored value is off by up to a unit roundoff u of its type (2^-24 for fp32, 2^-9 for bf16), and a sum
of K products, which is kept in fp32, by about 2^-24 sqrt(K) of its size, since its K roundings go both ways (Higham and
Mary, 2019). A layer makes S = 7 such sums that feed the next: queries and keys, their scores, values, the weighted
values, the output, the gate, and the way down. Through the L layers of a model all these errors add up as independent
ones do, so that a hidden state is off by about

    e = sqrt(L) * (u + 2^-24 * sqrt(S K))

of its size, and a logit by as much of the spread of the logits, which is about that of the log-probs. Summed over an
answer's n tokens with log-probs l_t, again as independent errors, a log-prob is off by e * sqrt(sum(1 + l_t^2)). Two
computations of it differ by sqrt(2) of that.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

Numbers = TypeVar("Numbers", npt.NDArray[np.float64], "Tensor")

UNIT = {"fp32": 2.0**-24, "bf16": 2.0**-9}
"""Unit roundoff."""

PRODUCTS = 7
"""Sums of products that a layer makes one after the other (``S`` above)."""


def relative_error(layers: int, longest_sum: int, dtype: str) -> float:
    """Relative error of a hidden state (``e`` above) after ``layers`` layers, whose longest products sum
    ``longest_sum`` terms, with values stored in ``dtype``."""
    return math.sqrt(layers) * (UNIT[dtype] + UNIT["fp32"] * math.sqrt(PRODUCTS * longest_sum))


def logprob_noise(sums: Numbers, lengths: Numbers, error: float) -> Numbers:
    """How far apart two computations of an answer's log-prob may be.

    Args:
        sums: log-probs in nats, summed over the answer's tokens, [B].
        lengths: its tokens, [B], at least 1.
        error: :func:`relative_error`.

    Single log-probs l_t are taken to be spread as an exponential distribution is, whose mean square is twice the square
    of its mean.
    """
    noise: Numbers = error * (2 * (lengths + 2 * sums**2 / lengths)) ** 0.5
    return noise


def won(margin: Numbers, noise: Any = 0.0) -> Numbers:
    """1 for a positive margin, 0 for a negative one, 1/2 for one within ``noise``.

    >>> won(np.array([2.0, 1e-9, -2.0]), 1e-6).tolist()
    [1.0, 0.5, 0.0]
    """
    wins: Numbers = (margin > noise) * 0.5 + (margin >= -noise) * 0.5
    return wins
