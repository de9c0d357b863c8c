"""How well chosen answers can be told from rejected ones by their lengths alone, and by their words alone.

Where that is easy, a model may learn it instead of what is better. Every pair is judged by what was learned from the pairs of other prompts
(five folds, no prompt in two of them): the length's rule is that the longer answer wins, or the shorter one, whichever holds more often;
the words' is Bradley and Terry's model on differences of TF-IDF vectors of words and pairs of words, a logistic regression without
intercept. A Chinese, Japanese or Korean character counts as a word.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from align.functional.intervals import SHARE, Estimate, mean_of

FOLDS = 5
FEWEST = 20
"""Pairs that it takes to say anything."""
_WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")


@dataclass(frozen=True)
class Pair:
    """The texts of a chosen and a rejected answer, and which prompt they belong to."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Told:
    """Shares of pairs told right, those that cannot be told counting half."""

    length: Estimate
    words: Estimate


def told_apart(pairs: Sequence[Pair]) -> Told | None:
    """Both shares; None with fewer than :data:`FEWEST` pairs, or fewer prompts than folds."""
    prompts = sorted({pair.prompt for pair in pairs})
    if len(pairs) < FEWEST or len(prompts) < FOLDS:
        return None
    fold_of = {prompt: number % FOLDS for number, prompt in enumerate(prompts)}
    folds = np.array([fold_of[pair.prompt] for pair in pairs])
    longer = np.array([np.sign(len(pair.chosen) - len(pair.rejected)) for pair in pairs], dtype=np.float64)
    length, words = np.zeros(len(pairs)), np.zeros(len(pairs))
    for fold in range(FOLDS):
        inside = folds == fold
        sign = 1.0 if longer[~inside].sum() >= 0 else -1.0
        length[inside] = sign * longer[inside]
        words[inside] = _by_words(
            [pair for pair, held in zip(pairs, inside, strict=True) if not held],
            [pair for pair, held in zip(pairs, inside, strict=True) if held],
        )
    return Told(mean_of(_right(length), SHARE), mean_of(_right(words), SHARE))


def _right(margins: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    right: npt.NDArray[np.float64] = np.where(margins > 0, 1.0, np.where(margins < 0, 0.0, 0.5))
    return right


def _by_words(learned: Sequence[Pair], judged: Sequence[Pair]) -> Any:
    """Positive where the chosen answer would be preferred, for each of ``judged``."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectors = TfidfVectorizer(analyzer=_words, sublinear_tf=True)
    try:
        vectors.fit([text for pair in learned for text in (pair.chosen, pair.rejected)])
    except ValueError:  # not one word
        return np.zeros(len(judged))

    def differences(pairs: Sequence[Pair]) -> Any:
        return vectors.transform([pair.chosen for pair in pairs]) - vectors.transform([pair.rejected for pair in pairs])

    # The loss sees label x difference only, so every other pair is turned round to have two labels.
    turned = np.where(np.arange(len(learned)) % 2, -1.0, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # weights that still move a little are good enough
        model = LogisticRegression(C=10.0, fit_intercept=False, max_iter=200)
        model.fit(differences(learned).multiply(turned[:, None]).tocsr(), turned)
    return model.decision_function(differences(judged))


def _words(text: str) -> list[str]:
    words = _WORDS.findall(text.lower())
    return [*words, *(f"{one} {other}" for one, other in pairwise(words))]
