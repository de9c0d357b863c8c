"""What can be told of a preference without a reward model: from the answers' lengths, and from their words.

A reward model is worth its cost where it beats both, trained on the same pairs.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from align.data.trees import Tree

Floats = npt.NDArray[np.float64]

_STRENGTHS = (0.1, 1.0, 10.0, 100.0)
_FOLDS = 5
MOST_PROMPTS = 10_000
"""Training prompts that the words are learned from; more would take longer and tell little more."""


class LengthBaseline:
    """Prefers the longer answer, or the shorter one where that wins more of the training pairs (a prompt's pairs weigh 1 together)."""

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
    """Bradley and Terry's model on words: logistic regression, without intercept, on differences of TF-IDF vectors.

    Words are the model's own tokens, alone and in pairs, so Chinese needs no rules of its own. How strongly it is regularised is chosen
    by cross-validation on the training pairs, of which the first :data:`MOST_PROMPTS` prompts are used.
    """

    def __init__(self, trees: Sequence[Tree]) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        trees = trees[:MOST_PROMPTS]
        self._vectorizer: Any = TfidfVectorizer(analyzer=_words, sublinear_tf=True)
        self._vectorizer.fit(branch.ids for tree in trees for branch in tree.branches)
        # The loss sees label x difference only, so every other pair is turned round to have two labels.
        differences, weights = self._differences(trees), pair_weights(trees)
        turned = np.where(np.arange(len(weights)) % 2, -1.0, 1.0)
        features = differences.multiply(turned[:, None]).tocsr()
        self._model = _fitted(features, turned, weights)

    def margins(self, trees: Sequence[Tree]) -> Floats:
        """Positive where the chosen answer would be preferred, for every pair in order, [P]."""
        if self._model is None:
            return np.zeros(len(pair_weights(trees)))
        found: Floats = self._model.decision_function(self._differences(trees))
        return found

    def _differences(self, trees: Sequence[Tree]) -> Any:
        chosen = self._vectorizer.transform(tree.branches[0].ids for tree in trees for _ in tree.branches[1:])
        rejected = self._vectorizer.transform(branch.ids for tree in trees for branch in tree.branches[1:])
        return chosen - rejected


def pair_weights(trees: Iterable[Tree]) -> Floats:
    """1 / K for each of the K pairs of a prompt, [P]."""
    return np.array([1 / (len(tree.branches) - 1) for tree in trees for _ in tree.branches[1:]])


def _words(ids: npt.NDArray[np.int32]) -> list[str]:
    tokens = [str(token) for token in ids.tolist()]
    return [*tokens, *(f"{one} {other}" for one, other in itertools.pairwise(tokens))]


def _fitted(features: Any, labels: Floats, weights: Floats) -> Any:
    """The model, or None when there are not two pairs to tell apart."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score

    if len(labels) < 2:
        return None

    def model(strength: float) -> Any:
        return LogisticRegression(C=strength, fit_intercept=False, max_iter=1000)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # weights that still move a little are good enough for a baseline
        best = 1.0
        if len(labels) >= 4 * _FOLDS:
            accuracy = [cross_val_score(model(strength), features, labels, cv=_FOLDS).mean() for strength in _STRENGTHS]
            best = _STRENGTHS[int(np.argmax(accuracy))]
        return model(best).fit(features, labels, sample_weight=weights)
