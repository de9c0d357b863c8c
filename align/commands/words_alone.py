"""Measuring how well chosen answers can be told from rejected ones by their lengths alone, and by their words alone.

If that is easy, a reward model may learn it instead of quality. Every pair is predicted by rules learned from the pairs
of other prompts (five folds, no prompt in two of them). The rule for lengths is that the longer answer wins, or that
the shorter one does, whichever holds more often; the rule for words is :mod:`align.functional.word_model`. A Chinese,
Japanese or Korean character counts as a word.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from align.functional.intervals import SHARE, Estimate, mean_of
from align.functional.word_model import Floats, WordModel

FOLDS = 5
FEWEST = 20
"""Smallest number of pairs for a result."""
_WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")


@dataclass(frozen=True)
class TextPair:
    """The texts of a chosen and a rejected answer, and their prompt."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class WordReport:
    """Shares of pairs predicted correctly; pairs without a prediction count half."""

    length: Estimate
    words: Estimate


def told_apart(pairs: Sequence[TextPair]) -> WordReport | None:
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
    return WordReport(mean_of(_right(length), SHARE), mean_of(_right(words), SHARE))


def _right(margins: Floats) -> Floats:
    right: Floats = np.where(margins > 0, 1.0, np.where(margins < 0, 0.0, 0.5))
    return right


def _by_words(learned: Sequence[TextPair], judged: Sequence[TextPair]) -> Floats:
    """Positive where the chosen answer would be preferred, for each of ``judged``."""
    (chosen, rejected), others = _words_of(learned), _words_of(judged)
    return WordModel([*chosen, *rejected], chosen, rejected).margins(*others)


def _words_of(pairs: Sequence[TextPair]) -> tuple[list[list[str]], list[list[str]]]:
    """The words of the chosen answers, and of the rejected ones."""
    return [_WORDS.findall(pair.chosen.lower()) for pair in pairs], [
        _WORDS.findall(pair.rejected.lower()) for pair in pairs
    ]
