"""Bradley and Terry's model of comparisons, with the words of the answers as its only features.

A logistic regression without intercept on differences of TF-IDF vectors of words and pairs of words. The caller decides
what a word is: a word of the text, or a token id of a tokenizer.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Words = Sequence[str]

_FOLDS = 5


class WordModel:
    """Learned from comparisons.

    Args:
        texts: the words of every answer; how common a word is, is counted over them.
        chosen, rejected: the words of both answers of every comparison, [P] each.
        weights: of the comparisons, [P]; 1 for each when absent.
        strengths: inverse strengths of regularisation; the best of several is found by cross-validation when there are
            at least 20 comparisons.
    """

    def __init__(
        self,
        texts: Iterable[Words],
        chosen: Sequence[Words],
        rejected: Sequence[Words],
        *,
        weights: Floats | None = None,
        strengths: Sequence[float] = (10.0,),
    ) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        self._vectors: Any = TfidfVectorizer(analyzer=_with_pairs, sublinear_tf=True)
        self._model: Any = None
        try:
            self._vectors.fit(texts)
        except ValueError:  # the texts have no words
            return
        if len(chosen) > 1:
            # The classifier needs both labels. Its loss depends on label x difference only, so every other comparison
            # is turned round.
            turned = np.where(np.arange(len(chosen)) % 2, -1.0, 1.0)
            features = self._differences(chosen, rejected).multiply(turned[:, None]).tocsr()
            self._model = _fitted(features, turned, weights, strengths)

    def margins(self, chosen: Sequence[Words], rejected: Sequence[Words]) -> Floats:
        """Positive where the model prefers the chosen answer, [P]; 0 for all when the texts had no words to learn
        from."""
        if self._model is None or not len(chosen):
            return np.zeros(len(chosen))
        margins: Floats = self._model.decision_function(self._differences(chosen, rejected))
        return margins

    def _differences(self, chosen: Sequence[Words], rejected: Sequence[Words]) -> Any:
        return self._vectors.transform(chosen) - self._vectors.transform(rejected)


def _with_pairs(words: Words) -> list[str]:
    return [*words, *(f"{one} {other}" for one, other in pairwise(words))]


def _fitted(features: Any, labels: Floats, weights: Floats | None, strengths: Sequence[float]) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score

    def model(strength: float) -> Any:
        return LogisticRegression(C=strength, fit_intercept=False, max_iter=1000)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a fit that has almost converged is good enough
        best = strengths[0]
        if len(strengths) > 1:
            best = 1.0
            if len(labels) >= 4 * _FOLDS:
                accuracy = [
                    cross_val_score(model(strength), features, labels, cv=_FOLDS).mean() for strength in strengths
                ]
                best = strengths[int(np.argmax(accuracy))]
        return model(best).fit(features, labels, sample_weight=weights)
