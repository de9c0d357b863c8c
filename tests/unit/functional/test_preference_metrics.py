"""Accuracy, length, calibration and baselines of a reward model, with the arithmetic written out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from align.data.tree import Branch, Tree
from align.functional.preference_metrics import ScoredPairs, evaluate
from align.functional.ties import won
from align.functional.word_model import WordModel
from align.scoring.baselines import LengthBaseline, WordsBaseline, pair_weights


def pairs(rows: list[tuple[int, float, float, int, int]]) -> ScoredPairs:
    """(prompt, score of chosen, of rejected, length of chosen, of rejected)."""
    columns = [np.array(column) for column in zip(*rows, strict=True)] if rows else [np.zeros(0)] * 5
    ints = [column.astype(np.int64) for column in (columns[0], columns[3], columns[4])]
    return ScoredPairs(ints[0], columns[1].astype(np.float64), columns[2].astype(np.float64), ints[1], ints[2])


ROWS = [
    (0, 2.0, 1.0, 9, 4),  # right, longer wins
    (1, 0.5, 1.5, 9, 5),  # wrong, longer wins
    (2, 3.0, 0.0, 2, 8),  # right, shorter wins
    (3, 1.0, 1.0, 6, 6),  # a tie, equally long
]


def value(found: dict[str, Any], name: str) -> float:
    return float(found[name]["value"])


def test_accuracies_by_hand() -> None:
    """Of four pairs 1 + 0 + 1 + 1/2 are right; of the two whose longer answer wins one, of the one whose shorter answer
    wins one."""
    found = evaluate(pairs(ROWS))
    assert (found["prompts"], found["pairs"]) == (4, 4)
    assert value(found, "accuracy") == 0.625
    assert value(found, "accuracy_longer_wins") == 0.5 and value(found, "accuracy_shorter_wins") == 1.0
    assert found["accuracy"]["low"] < 0.625 < found["accuracy"]["high"]
    scores = [2.0, 0.5, 3.0, 1.0, 1.0, 1.5, 0.0, 1.0]
    assert value(found, "score_mean") == pytest.approx(np.mean(scores)) and value(found, "score_std") == pytest.approx(
        np.std(scores)
    )
    assert value(found, "length_correlation") == pytest.approx(np.corrcoef(scores, [9, 9, 2, 6, 4, 5, 8, 6])[0, 1])


def test_swapped_columns_flip_the_accuracy() -> None:
    """A -> 1 - a, also where longer answers win, which become those whose shorter answers win."""
    swapped = [(p, r, c, lr, lc) for p, c, r, lc, lr in ROWS]
    one, other = evaluate(pairs(ROWS)), evaluate(pairs(swapped))
    assert value(other, "accuracy") == 1 - value(one, "accuracy")
    assert value(other, "accuracy_shorter_wins") == 1 - value(one, "accuracy_longer_wins")
    assert value(other, "length_correlation") == pytest.approx(value(one, "length_correlation"))


def test_a_prompt_counts_once_whatever_its_pairs() -> None:
    """Four pairs of one prompt, all right, and one of another, wrong: 1/2. Copying a prompt's pair changes no
    number."""
    many = [(0, 1.0, 0.0, 5, 3)] * 4 + [(1, 0.0, 2.0, 4, 4)]
    found = evaluate(pairs(many))
    assert value(found, "accuracy") == 0.5 and found["prompts"] == 2
    single = evaluate(pairs([many[0], many[-1]]))
    for name in ("accuracy", "score_mean", "score_std", "length_correlation", "calibration_error"):
        assert found[name] == pytest.approx(single[name])


def test_calibration_by_hand() -> None:
    """Differences of +-ln 4 predict 0.8. Of five such pairs four are right: no error. Of five with +-ln 9 (0.9) three:
    0.3 off, half of the pairs, so 0.15 in all."""
    right = [(i, math.log(4), 0.0, 1, 1) for i in range(4)] + [(4, 0.0, math.log(4), 1, 1)]
    assert value(evaluate(pairs(right)), "calibration_error") == pytest.approx(0, abs=1e-12)
    off = [(5 + i, math.log(9.1), 0.0, 1, 1) for i in range(3)] + [(8 + i, 0.0, math.log(9.1), 1, 1) for i in range(2)]
    found = evaluate(pairs(right + off))
    predicted = 9.1 / 10.1
    assert value(found, "calibration_error") == pytest.approx((predicted - 0.6) / 2)
    assert [(b["from"], b["to"], b["pairs"]) for b in found["calibration"]] == [(0.8, 0.9, 5), (0.9, 1.0, 5)]
    assert [(b["predicted"], b["right"]) for b in found["calibration"]] == [
        pytest.approx((0.8, 0.8)),
        pytest.approx((predicted, 0.6)),
    ]
    one_each = [(n, math.log(p / (1 - p)), 0.0, 1, 1) for n, p in enumerate((0.55, 0.65, 0.75, 0.85, 0.95))]
    bounds = [(b["from"], b["to"], b["pairs"]) for b in evaluate(pairs(one_each))["calibration"]]
    assert bounds == [(0.5, 0.6, 1), (0.6, 0.7, 1), (0.7, 0.8, 1), (0.8, 0.9, 1), (0.9, 1.0, 1)]


def test_intervals_cover_as_often_as_they_say() -> None:
    """Of 200 samples of 80 pairs from a model that is right in 70 % of all pairs, about 95 % have 0.7 in their
    interval."""
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        right = rng.random(80) < 0.7
        found = evaluate(pairs([(i, float(r), 0.5, 1, 1) for i, r in enumerate(right)]))["accuracy"]
        inside += found["low"] <= 0.7 <= found["high"]
    assert 182 <= inside <= 199


def test_nothing_to_estimate_from_is_none() -> None:
    found = evaluate(pairs([(0, 1.0, 0.0, 5, 3)]))
    assert found["accuracy_shorter_wins"] is None
    empty = evaluate(pairs([]), {"length": np.zeros(0)})
    assert empty["pairs"] == 0 and all(
        entry is None for name, entry in empty.items() if name not in ("pairs", "prompts", "calibration")
    )


def test_other_predictors_stand_beside() -> None:
    found = evaluate(pairs(ROWS), {"length": np.array([5.0, 4.0, -6.0, 0.0])})
    assert value(found, "accuracy_length") == 0.625 == won(np.array([5.0, 4.0, -6.0, 0.0])).mean()


# Baselines


def preference(chosen: list[int], *rejected: list[int]) -> Tree:
    parts = tuple(Branch(np.array(ids, dtype=np.int32), np.ones(len(ids), dtype=bool)) for ids in (chosen, *rejected))
    return Tree("p", np.array([1], dtype=np.int32), parts)


def test_length_learns_which_way_from_the_training_pairs() -> None:
    """Longer wins 3 of 4 unequal pairs by weight; ties of length stay ties."""
    longer = LengthBaseline(np.array([5, 3, 9, -2, 0]), np.ones(5))
    assert longer.longer_wins == 0.75 and longer.margins(np.array([4, -4, 0])).tolist() == [4, -4, 0]
    shorter = LengthBaseline(np.array([5, -3, -9]), np.ones(3))
    assert shorter.margins(np.array([4, -4])).tolist() == [-4, 4]
    weighed = LengthBaseline(np.array([5, 3, -9]), np.array([0.25, 0.25, 1.0]))
    assert weighed.longer_wins == pytest.approx(1 / 3)


def test_words_learn_what_the_pairs_differ_in() -> None:
    """Token 7 wins and token 8 loses, among random others: right on new pairs, with one or many rejected answers, and
    1/2 on no signal."""
    rng = np.random.default_rng(0)

    def noise() -> list[int]:
        return rng.integers(20, 60, 12).tolist()

    def made(n: int, win: int = 7, lose: int = 8) -> list[Tree]:
        return [preference([win, *noise()], *([lose, *noise()] for _ in range(1 + i % 2))) for i in range(n)]

    words = WordsBaseline(made(60))
    new = made(40)
    margins = words.margins(new)
    assert len(margins) == len(pair_weights(new)) == 60
    assert won(margins).mean() > 0.95
    assert won(words.margins(made(40, 8, 7))).mean() < 0.05
    assert 0.3 < won(words.margins(made(60, 9, 9))).mean() < 0.7


def test_words_need_two_pairs() -> None:
    assert WordsBaseline([preference([7], [8])]).margins([preference([7], [8])]).tolist() == [0.0]


def test_the_baseline_is_bradley_and_terrys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turning pairs round is only how the library is told: the weights are those of -log sigmoid(w . difference) with
    its L2 term."""
    import torch
    from sklearn.linear_model import LogisticRegression

    chosen, rejected = [["7", "9"], ["7", "10"], ["9"], ["8", "11"]], [["8", "9"], ["9", "10"], ["8"], ["10", "11"]]
    words = WordModel([*chosen, *rejected], chosen, rejected, strengths=(1.0,))
    x = torch.tensor(words._differences(chosen, rejected).toarray())
    w = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=200, tolerance_grad=1e-10)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = -torch.nn.functional.logsigmoid(x @ w).sum() + w.pow(2).sum() / 2  # C = 1
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type, no-untyped-call]
    assert isinstance(words._model, LogisticRegression)
    assert words._model.coef_[0] == pytest.approx(w.detach().numpy(), abs=1e-3)
