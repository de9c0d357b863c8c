"""Who samples what, so that what is sampled does not depend on who samples it.

An engine draws the samples of one call from one stream of random numbers. So prompts are cut into pieces whose size
depends on the engine and its settings alone, each piece is one call with a seed of its own, and the processes share the
pieces. A sample follows from the seed and from the prompts of its piece, which are the same with one process or with
many, and in whatever order the pieces are made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from align.rollout.engine import Sampling, sample_seed


@dataclass(frozen=True)
class CallPieces:
    """Prompts in runs of ``size``; the last one may be shorter."""

    prompts: int
    """How many there are."""
    size: int

    @classmethod
    def of_samples(cls, prompts: int, *, each: int, together: int) -> CallPieces:
        """CallPieces of about ``together`` samples, ``each`` of a prompt."""
        return cls(prompts, -(-together // each))

    def __len__(self) -> int:
        return -(-self.prompts // self.size)

    def __iter__(self) -> Iterator[range]:
        """The numbers of the prompts in each piece."""
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> range:
        return range(number * self.size, min((number + 1) * self.size, self.prompts))

    def share(self, rank: int, world: int) -> range:
        """The numbers of the pieces that one of several processes makes."""
        return range(rank, len(self), world)


def of_piece(sampling: Sampling, number: int) -> Sampling:
    """How a piece is sampled: with a seed of its own."""
    return replace(sampling, seed=sample_seed(sampling.seed, number))
