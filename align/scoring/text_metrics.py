"""Metrics of answers' texts: length, repetition, mixed languages, and whether they are finished. Pure functions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import regex

from align.scoring.scorer import Answer

_WORD = regex.compile(r"(?V1)\p{Han}|[[\p{L}\p{M}\p{N}]--\p{Han}]+(?:['’][[\p{L}\p{M}\p{N}]--\p{Han}]+)*")
_HAN = regex.compile(r"\p{Han}")
_LATIN = regex.compile(r"\p{Latin}")


def words(text: str) -> list[str]:
    """The words of a text in lower case: runs of letters and digits (``don't`` is one), and every Chinese character by
    itself."""
    found: list[str] = _WORD.findall(text.lower())
    return found


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Number of different n-grams of words over all texts, divided by the number of all n-grams (distinct-n of Li et
    al., arXiv 1510.03055); 1 if there are none.

    >>> distinct_n(["a b a b"], 2)   # a b, b a, a b
    0.6666666666666666
    """
    grams = [tuple(said[i : i + n]) for said in map(words, texts) for i in range(len(said) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def language_mix(text: str) -> float:
    """The share of the rarer of Chinese and Latin words among both, from 0 (one language) to 0.5 (half of each). Other
    words are ignored."""
    said = words(text)
    chinese = sum(_HAN.match(word) is not None for word in said)
    latin = sum(_LATIN.search(word) is not None for word in said)
    return min(chinese, latin) / (chinese + latin) if chinese and latin else 0.0


def mixed_share(texts: Sequence[str], tolerance: float = 0.1) -> float:
    """Share of texts whose :func:`language_mix` is more than ``tolerance``; 0 without texts."""
    return sum(language_mix(text) > tolerance for text in texts) / max(len(texts), 1)


def unfinished_share(answers: Sequence[Answer]) -> float:
    """Share of unfinished answers; 0 without answers."""
    return sum(not answer.finished for answer in answers) / max(len(answers), 1)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, population standard deviation, smallest, median and largest of ``values``; empty without any."""
    if not values:
        return {}
    return {
        "mean": statistics.fmean(values),
        "std": statistics.pstdev(values),
        "min": min(values),
        "median": statistics.median(values),
        "max": max(values),
    }


def correlation(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Pearson's correlation; None if ``xs`` or ``ys`` does not vary."""
    if len(xs) < 2 or len(set(xs)) == 1 or len(set(ys)) == 1:
        return None
    coefficient = statistics.correlation(xs, ys)
    return coefficient if math.isfinite(coefficient) else None


def describe(answers: Sequence[Answer]) -> dict[str, float]:
    """The metrics of a set of answers, by name. Numbers of tokens, stop id included, are only there when every answer
    has ids."""
    texts = [answer.text for answer in answers]
    metrics: dict[str, float] = {"answers": len(answers)}
    if not answers:
        return metrics
    if all(answer.ids for answer in answers):
        metrics["tokens"] = statistics.fmean(len(answer.ids) for answer in answers)
    metrics["words"] = statistics.fmean(len(words(text)) for text in texts)
    metrics |= {f"distinct_{n}": distinct_n(texts, n) for n in (1, 2, 3)}
    return metrics | {"unfinished": unfinished_share(answers), "mixed_languages": mixed_share(texts)}
