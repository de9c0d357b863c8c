"""Bootstrap intervals: against closed forms, for statistics of any shape, and the same for the same seed."""

from __future__ import annotations

import math

import numpy as np
import pytest

from align.functional import bootstrap
from align.functional.bootstrap import bootstrap_mean, interval


def test_the_interval_is_the_normal_one_for_many_items() -> None:
    """400 draws from N(3, 2): the standard error is 2 / 20 = 0.1 times the sample's own spread, so the interval is 1.96 of those wide."""
    values = np.random.default_rng(1).normal(3, 2, 400)
    found = bootstrap_mean(values, draws=20_000)
    error = values.std() / 20
    assert found.mean == pytest.approx(values.mean())
    assert found.count == 400
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.05 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.05 * error)
    narrow = bootstrap_mean(values, level=0.5, draws=20_000)
    assert narrow.high - narrow.low == pytest.approx(2 * 0.6745 * error, rel=0.05)


def test_a_case_by_hand() -> None:
    """Two items, 0 and 1: the mean of a resample is 0, 1/2 or 1, with chances 1/4, 1/2 and 1/4."""
    assert (bootstrap_mean([0.0, 1.0]).low, bootstrap_mean([0.0, 1.0]).high) == (0.0, 1.0)
    assert (bootstrap_mean([0.0, 1.0], level=0.4).low, bootstrap_mean([0.0, 1.0], level=0.4).high) == (0.5, 0.5)
    assert bootstrap_mean([2.5]) == bootstrap.Estimate(2.5, 2.5, 2.5, 1)


def test_it_is_deterministic_and_follows_its_seed() -> None:
    values = np.arange(20.0) ** 2
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)
    assert bootstrap_mean(values, seed=3) != bootstrap_mean(values, seed=4)


def test_memory_is_bounded_without_changing_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn in parts, the interval is that of as many draws."""
    values = np.arange(50.0)
    whole = bootstrap_mean(values)
    monkeypatch.setattr(bootstrap, "_AT_ONCE", 999)
    parts = bootstrap_mean(values)
    assert parts.low == pytest.approx(whole.low, abs=0.5) and parts.high == pytest.approx(whole.high, abs=0.5)


@pytest.mark.parametrize("values", [[], [1.0, np.nan], [np.inf], [[1.0]]])
def test_what_has_no_mean_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite values"):
        bootstrap_mean(values)


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
