"""Win rates against counting by hand and against scikit-learn's logistic regression."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from align.evaluation.compare import LengthControlled
from align.functional.win_rate import RIDGE, differences, length_controlled, wins


def test_every_answer_meets_every_other_and_ties_are_halves() -> None:
    # ours 1, 3 against theirs 1, 2: 1=1 half, 1<2 none, 3>1, 3>2
    assert wins([[1.0, 3.0]], [[1.0, 2.0]]).tolist() == [[0.5, 0.0, 1.0, 1.0]]
    assert differences([[10, 30]], [[5, 20]]).tolist() == [[5, -10, 25, 10]]
    assert wins([[2.0], [1.0]], [[1.0], [1.0]]).mean() == 0.75


def sample(rng: np.random.Generator, theta: float, phi: float, prompts: int) -> np.ndarray:
    length = rng.normal(20, 30, prompts).round()
    chance = 1 / (1 + np.exp(-(theta + phi * np.tanh(length / length.std()))))
    result = np.where(rng.random(prompts) < 0.1, 0.5, rng.random(prompts) < chance)
    return np.stack([result, length], axis=-1)[:, None, :]


@pytest.mark.parametrize(("theta", "phi"), [(0.0, 0.0), (0.4, 1.5), (-0.7, 2.0), (1.0, -1.0)])
def test_length_controlled_is_a_penalised_logistic_regression(theta: float, phi: float) -> None:
    """A tie is a win and a loss of weight one half each. scikit-learn's C is one over the penalty; the constant is
    penalised too."""
    items = sample(np.random.default_rng(3), theta, phi, 400)
    result, length = items[:, 0, 0], items[:, 0, 1]
    features = np.stack([np.ones(400), np.tanh(length / length.std())], axis=1)
    model = LogisticRegression(C=1 / RIDGE, fit_intercept=False, tol=1e-10, max_iter=1000)
    model.fit(np.tile(features, (2, 1)), np.repeat([1, 0], 400), sample_weight=np.concatenate([result, 1 - result]))
    assert length_controlled(items) == pytest.approx(1 / (1 + np.exp(-model.coef_[0, 0])), abs=1e-5)


def test_wins_that_length_explains_are_taken_back() -> None:
    """Always the longer answer wins, and ours are longer: much above half as it is, about half at equal length."""
    items = sample(np.random.default_rng(5), 0.0, 4.0, 600)
    assert items[..., 0].mean() > 0.65
    assert abs(length_controlled(items) - 0.5) < 0.1


def test_sides_are_symmetric_and_extremes_stay_finite() -> None:
    items = sample(np.random.default_rng(7), 0.5, 1.0, 200)
    swapped = np.stack([1 - items[..., 0], -items[..., 1]], axis=-1)
    assert length_controlled(items) + length_controlled(swapped) == pytest.approx(1.0, abs=1e-9)
    always = np.stack([np.ones(50), np.arange(50.0)], axis=-1)[:, None, :]
    assert 0.95 < length_controlled(always) < 1
    # No length varies: the plain rate, 2.5 / 4
    equal = np.stack([np.array([1.0, 1.0, 0.0, 0.5]), np.full(4, 3.0)], axis=-1)[:, None, :]
    assert length_controlled(equal) == pytest.approx(0.625, abs=2e-3)


def test_draws_are_fitted_one_by_one() -> None:
    draws = np.stack([sample(np.random.default_rng(seed), 0.3, 1.0, 100) for seed in range(3)])
    assert length_controlled(draws, axis=1) == pytest.approx([float(length_controlled(one)) for one in draws], abs=1e-9)


def test_the_interval_holds_the_truth() -> None:
    truth = 1 / (1 + np.exp(-0.4))
    held = 0
    for seed in range(10):
        found = LengthControlled("", {"a": sample(np.random.default_rng(seed), 0.4, 1.5, 200)}).estimates("b", 1)["a"]
        held += found["low"] <= truth <= found["high"]
    assert held >= 8
