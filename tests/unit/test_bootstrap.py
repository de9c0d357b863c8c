"""Bootstrap intervals: against the normal approximation, for statistics of any shape, and the same for the same seed."""

from __future__ import annotations

import math

import numpy as np
import pytest

from align.functional import bootstrap
from align.functional.bootstrap import interval


def test_of_a_mean_it_is_the_normal_interval() -> None:
    """400 coin tosses, 60 % heads: 0.6 +- 1.96 sqrt(0.24 / 400) = 0.552 to 0.648; a resample moves in steps of 1 / 400."""
    low, high = interval([1.0] * 240 + [0.0] * 160)
    assert low == pytest.approx(0.552, abs=0.006) and high == pytest.approx(0.648, abs=0.006)
    narrow = interval([1.0] * 240 + [0.0] * 160, level=0.5)
    assert low < narrow[0] < 0.6 < narrow[1] < high


def test_seed_decides_and_batches_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=50)
    assert interval(values) == interval(values) != interval(values, seed=1)
    whole = interval(values)
    monkeypatch.setattr(bootstrap, "_ELEMENTS", 500)  # ten draws at a time: the same stream of random numbers
    assert interval(values) == pytest.approx(whole, abs=1e-12)


def test_rows_stay_together() -> None:
    """The ratio of two columns that are in proportion is certain, however the rows are drawn."""
    rows = np.random.default_rng(1).random((30, 1)) * [[2.0, 1.0]]
    low, high = interval(rows, lambda draws, axis: draws.sum(axis)[..., 0] / draws.sum(axis)[..., 1])
    assert (low, high) == pytest.approx((2.0, 2.0))


def test_undefined_draws_are_left_out_and_nothing_gives_nothing() -> None:
    half = interval([1.0, 3.0], lambda draws, axis: np.where(draws.mean(axis) == 2, np.nan, draws.mean(axis)))
    assert half == (1.0, 3.0)
    assert all(math.isnan(end) for end in (*interval([]), *interval([1.0], lambda draws, axis: draws.mean(axis) * np.nan)))
