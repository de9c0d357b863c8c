"""Which of a model's own answers become negatives: the selection of Self-Contrast (https://arxiv.org/abs/2404.00604),
without a model.

Two faults of the authors' released code are not copied: here a copy of the target is never a negative, and the result
does not depend on the order of a set or on the number of workers.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

Reason = Literal["negative", "not drawn", "filtered", "duplicate", "target", "empty", "unfinished"]
"""What became of a sample. ``target``: it equals the target once both are :func:`normalised`. ``duplicate``: it equals
an earlier sample. ``filtered``: it is too similar to the target. ``not drawn``: it could have been a negative."""

# Punctuation at the ends of sentences and quotations. Signs that change the meaning (-, +, $, %, #) are not among it:
# -5 is not 5.
_EDGES = " .,;:!?…\"'`*_“”‘’«»()[]{}。，、；：！？「」『』（）《》【】"


@dataclass(frozen=True)
class NegativeSelection:
    """The negatives of one prompt."""

    indices: tuple[int, ...]
    """Samples that became negatives, in their own order; fewer than asked for when there are no more."""
    reasons: tuple[Reason, ...]
    """What became of each sample."""


def normalised(text: str) -> str:
    """``text`` without differences in case, white space, Unicode composition, and punctuation at its ends.

    A text that is nothing but punctuation keeps it.
    """
    plain = " ".join(unicodedata.normalize("NFC", text).casefold().split())
    return plain.strip(_EDGES) or plain


def num_kept(unique: int, keep_least_similar: float) -> int:
    """How many of ``unique`` samples the filter leaves: ``min(floor(keep_least_similar * unique), unique - 1)``; all of
    them with ``keep_least_similar`` 1. The product is computed in decimal, so that 0.29 of 100 is 29 and not 28."""
    if keep_least_similar == 1 or unique == 0:
        return unique
    return min(int(Fraction(str(keep_least_similar)) * unique), unique - 1)


def select_negatives(
    target: str,
    samples: Sequence[str],
    similarities: Sequence[float],
    *,
    keep_least_similar: float,
    negatives: int,
    dedup: bool,
    seed: int,
    id: str,
    unfinished: Collection[int] = (),
) -> NegativeSelection:
    """Choose up to ``negatives`` of a prompt's ``samples``. In this order:

    1. Samples in ``unfinished`` and empty ones are left out.
    2. Copies of the target (equal once :func:`normalised`) are left out, always.
    3. With ``dedup``, copies of an earlier sample are left out.
    4. Of the U that are left, the :func:`num_kept` least similar to the target stay. With a filter
       (``keep_least_similar`` < 1) the most similar sample is therefore never a negative, and of a single sample none
       is left. Among equally similar samples the earlier ones stay. The share is taken of the unique samples; the
       released code takes it of all generated ones, so that many repetitions switch its filter off.
    5. ``negatives`` of these are drawn uniformly without replacement: the ones with the smallest sha256 of (seed, id,
       sample number). A draw of 4 is therefore part of the draw of 8, and no draw depends on the process,
       PYTHONHASHSEED or other prompts.

    Args:
        similarities: of each sample to the target; any scale, larger is more similar.
        id: of the prompt.
    """
    reasons: list[Reason | None] = [None] * len(samples)
    seen, wanted = set[str](), normalised(target)
    for i, sample in enumerate(samples):
        plain = normalised(sample)
        if i in unfinished:
            reasons[i] = "unfinished"
        elif not plain:
            reasons[i] = "empty"
        elif plain == wanted:
            reasons[i] = "target"
        elif dedup and plain in seen:
            reasons[i] = "duplicate"
        else:
            seen.add(plain)
    unique = sorted((i for i, reason in enumerate(reasons) if reason is None), key=lambda i: (similarities[i], i))
    kept = unique[: num_kept(len(unique), keep_least_similar)]
    drawn = set(sorted(kept, key=lambda i: _lot(seed, id, i))[:negatives])
    for i in unique:
        if i in drawn:
            reasons[i] = "negative"
        elif i in kept:
            reasons[i] = "not drawn"
        else:
            reasons[i] = "filtered"
    return NegativeSelection(tuple(sorted(drawn)), tuple(reason for reason in reasons if reason is not None))


def _lot(seed: int, id: str, sample: int) -> bytes:
    return hashlib.sha256(f"{seed}\0{id}\0{sample}".encode("utf-8", "backslashreplace")).digest()
