"""Distributing prompts over engines and processes, so that the samples do not depend on the distribution.

An engine draws all samples of a call from one stream of random numbers. Prompts are therefore cut into pieces whose
size depends only on the engine and its settings. Each piece is one call with its own seed, and the processes share the
pieces. A sample depends on the seed and on the prompts of its piece, which are the same for any number of processes and
any order of the pieces.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from align.rollout.engine import Sampling, sample_seed


@dataclass(frozen=True)
class CallPieces:
    """Prompts in consecutive pieces of ``size``; the last one may be smaller."""

    prompts: int
    """Number of prompts."""
    size: int

    @classmethod
    def of_samples(cls, prompts: int, *, each: int, together: int) -> CallPieces:
        """Pieces of about ``together`` samples, with ``each`` samples for a prompt."""
        return cls(prompts, -(-together // each))

    def __len__(self) -> int:
        return -(-self.prompts // self.size)

    def __iter__(self) -> Iterator[range]:
        """The numbers of the prompts in each piece."""
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> range:
        return range(number * self.size, min((number + 1) * self.size, self.prompts))

    def share(self, rank: int, world: int) -> range:
        """The numbers of the pieces that process ``rank`` of ``world`` makes."""
        return range(rank, len(self), world)


def of_piece(sampling: Sampling, number: int) -> Sampling:
    """The sampling settings of piece ``number``: the same with its own seed."""
    return replace(sampling, seed=sample_seed(sampling.seed, number))
