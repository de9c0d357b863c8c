"""Predicting preferences without a reward model: from the lengths of the answers, and from their words.

Both are trained on the same pairs as the reward model, which should beat them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from align.data.tree import Branch, Tree
from align.functional.word_model import Floats, WordModel

_STRENGTHS = (0.1, 1.0, 10.0, 100.0)
MOST_PROMPTS = 10_000
"""Number of training prompts to learn the words from; more would take longer and change little."""


class LengthBaseline:
    """Always prefers the longer answer, or always the shorter one, whichever wins more of the training pairs (the pairs
    of a prompt weigh 1 together)."""

    def __init__(self, differences: npt.NDArray[np.int64], weights: Floats) -> None:
        """``differences`` [P] in tokens, chosen minus rejected."""
        longer, shorter = (float(weights[which].sum()) for which in (differences > 0, differences < 0))
        self.longer_wins = longer / max(longer + shorter, 1e-12)
        """Share of the training pairs of unequal length that the longer answer wins, by weight."""
        self._sign = 1.0 if longer >= shorter else -1.0

    def margins(self, differences: npt.NDArray[np.int64]) -> Floats:
        """Positive where the chosen answer would be preferred, [P]."""
        return self._sign * differences.astype(np.float64)


class WordsBaseline:
    """:class:`~align.functional.word_model.WordModel` with the model's own tokens as words, so that Chinese needs no
    rules of its own.

    Learned from the pairs of the first :data:`MOST_PROMPTS` training prompts.
    """

    def __init__(self, trees: Sequence[Tree]) -> None:
        trees = trees[:MOST_PROMPTS]
        texts = (_words(branch) for tree in trees for branch in tree.branches)
        self._model = WordModel(texts, *_answers(trees), weights=pair_weights(trees), strengths=_STRENGTHS)

    def margins(self, trees: Sequence[Tree]) -> Floats:
        """Positive where the chosen answer would be preferred, for every pair in order, [P]."""
        return self._model.margins(*_answers(trees))


def pair_weights(trees: Iterable[Tree]) -> Floats:
    """1 / K for each of the K pairs of a prompt, [P]."""
    return np.array([1 / (len(tree.branches) - 1) for tree in trees for _ in tree.branches[1:]])


def _words(branch: Branch) -> list[str]:
    return [str(token) for token in branch.ids.tolist()]


def _answers(trees: Sequence[Tree]) -> tuple[list[list[str]], list[list[str]]]:
    """The words of the chosen and of the rejected answer of every pair."""
    chosen = [_words(tree.branches[0]) for tree in trees for _ in tree.branches[1:]]
    return chosen, [_words(branch) for tree in trees for branch in tree.branches[1:]]
