"""The same passes on every process, where each holds a part of the model only.

A layer is gathered from all processes when one of them computes it, so each has to compute it as often, in the same
order. Every process packs the whole step, knows what the others have, and fills up with passes over nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from align.batching.batch import Batch

Groups = Callable[[Batch], int]
"""Into how many groups of branches a micro-batch is cut when it is computed; 0 for one that is computed whole."""


def evened(shares: Sequence[Sequence[Batch]], groups: Groups, *, tokens: int = 1) -> list[list[Batch]]:
    """The micro-batches of every process, as many on each: first those that are computed in groups, the same number of
    groups on all, then those that are computed whole.

    Args:
        shares: what each process has to compute.
        tokens: length of the batches without examples, at least.
    """
    if not any(shares):
        return [[] for _ in shares]
    like = next(batch for share in shares for batch in share)
    cut = [sorted((batch for batch in share if groups(batch)), key=lambda batch: -groups(batch)) for share in shares]
    whole = [[batch for batch in share if not groups(batch)] for share in shares]
    most = [
        max(groups(batches[place]) for batches in cut if place < len(batches)) for place in range(max(map(len, cut)))
    ]
    idle = like.idle(tokens=tokens)
    return [
        [
            *(replace(batch, groups=number) for batch, number in zip(own_cut, most, strict=False)),
            *(like.idle(groups=number, tokens=tokens) for number in most[len(own_cut) :]),
            *own_whole,
            *[idle] * (max(map(len, whole)) - len(own_whole)),
        ]
        for own_cut, own_whole in zip(cut, whole, strict=True)
    ]
