"""Bootstrap intervals against closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from align.functional import bootstrap
from align.functional.bootstrap import bootstrap_mean


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
