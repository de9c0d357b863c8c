"""Collectives of several processes. When one fails, the error says which processes waited, for what, and which did not
come.

Before it waits, every process writes its place in the program to a board that all can read (torch's key-value store).
When the wait fails, because of the time limit or because another process ended, the error is made from the board.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Protocol

from align.errors import EnvironmentFault

LIMIT = timedelta(hours=12)
"""Longest wait in one collective. It is long because processes may wait for hours while rank 0 saves a model or
finishes a benchmark. A process that ended is noticed at once by its closed connection or by its launcher."""
_PACKAGE = Path(__file__).parent


class Board(Protocol):
    """The part of ``torch.distributed.Store`` that is used here."""

    def set(self, key: str, value: str, /) -> None:
        """Write."""

    def check(self, keys: list[str], /) -> bool:
        """Have all of these keys been written?"""

    def get(self, key: str, /) -> bytes:
        """Read what was written."""


class Meetings:
    """Counts the collectives of one process; all processes make the same ones in the same order."""

    def __init__(self, board: Board, rank: int, world: int) -> None:
        self._board = board
        self._rank = rank
        self._world = world
        self._number = 0
        self._tell("joined the others")

    def _tell(self, what: str) -> None:
        self._board.set(f"align/at/{self._rank}", f"{self._number} {socket.gethostname()} {what}")

    @contextmanager
    def meet(self, what: str) -> Iterator[None]:
        """Counts the collective made inside, and explains its failure.

        Raises:
            EnvironmentFault: it failed; the message names the ranks that did not come.
        """
        self._number += 1
        began = time.monotonic()
        try:
            self._tell(what)
            yield
        except RuntimeError as error:  # the base of torch.distributed's errors
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            message = f"rank {self._rank} waited {time.monotonic() - began:.0f} s for the other processes in {what}"
            hint = "look at what those ranks printed last; the same command continues from what was saved"
            raise EnvironmentFault(f"{message}: {self._absent(what)} ({reason})", hint=hint) from error

    def _absent(self, what: str) -> str:
        """The message: which processes are not in this collective, and where each was last."""
        absent = []
        try:
            for rank in range(self._world):
                if rank == self._rank:
                    continue
                key = f"align/at/{rank}"
                if not self._board.check([key]):
                    absent.append(f"rank {rank} never joined")
                    continue
                number, host, place = self._board.get(key).decode(errors="replace").split(" ", 2)
                if int(number) < self._number:
                    absent.append(f"rank {rank} on {host} did not come, it was last in {place}")
                elif int(number) == self._number and place != what:
                    absent.append(f"rank {rank} on {host} is in {place} instead")
        except RuntimeError:
            return "rank 0 is gone, and with it the list of who is where"
        more = f"; and {len(absent) - 4} more" if len(absent) > 4 else ""
        return "; ".join(absent[:4]) + more if absent else "all came, and one was lost in it"


_meetings: Meetings | None = None


def join(board: Board, rank: int, world: int) -> None:
    """From now on this process's collectives are counted on ``board``."""
    global _meetings
    _meetings = Meetings(board, rank, world)


def leave() -> None:
    """Stop counting collectives."""
    global _meetings
    _meetings = None


@contextmanager
def collective(what: str) -> Iterator[None]:
    """Must be around every collective of torch.distributed; see :meth:`Meetings.meet`. Does nothing with a single
    process."""
    if _meetings is None:
        yield
    else:
        with _meetings.meet(what):
            yield


def place(*passing: str) -> str:
    """The current place in the program, as ``function (align/folder/file.py:line)``: the innermost function that is not
    in one of the modules ``passing`` (names of files), which only pass collectives on."""
    frame = sys._getframe(1)
    while frame.f_back is not None and Path(frame.f_code.co_filename).name in passing:
        frame = frame.f_back
    file = Path(frame.f_code.co_filename)
    shown = file.relative_to(_PACKAGE.parent) if file.is_relative_to(_PACKAGE) else Path(file.name)
    return f"{frame.f_code.co_name} ({shown}:{frame.f_lineno})"
