"""The processes of one run, as the runner sees them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

from align.errors import AlignError

T = TypeVar("T")


class Processes(Protocol):
    """All processes of a run. All of them must call the methods, in the same order."""

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""

    @property
    def world(self) -> int:
        """Number of processes."""

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's ``value``, on every rank. Plain values only."""

    def barrier(self) -> None:
        """Wait until every rank has called it."""


class Alone:
    """A run of one process."""

    rank = 0
    world = 1

    def broadcast_object(self, value: Any) -> Any:
        """``value``."""
        return value

    def barrier(self) -> None:
        """Nothing to wait for."""


class StoppedWithRank0(AlignError):
    """Raised on the other ranks when rank 0 stopped; rank 0 raises and prints the actual error."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(f"rank 0 stopped: {message}")
        self.exit_code = exit_code


def current() -> Processes:
    """The processes that a launcher (``align run --nproc``, torchrun, ``srun``) started, if ``WORLD_SIZE`` is set; else
    this process alone."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return Alone()
    from align.training.launch import ranks  # imports torch

    return cast(Processes, ranks())


def on_rank_0(ranks: Processes, work: Callable[[], T]) -> T:
    """Call ``work`` on rank 0 only and return its result, a plain value, on every rank. When it fails, every rank
    stops."""
    if ranks.rank == 0:
        try:
            value = work()
        except Exception as error:
            ranks.broadcast_object({"error": str(error)[:500], "exit_code": getattr(error, "exit_code", 1)})
            raise
        ranks.broadcast_object({"value": value})
        return value
    answer = ranks.broadcast_object(None)
    if "error" in answer:
        raise StoppedWithRank0(answer["error"], answer["exit_code"])
    return cast(T, answer["value"])
