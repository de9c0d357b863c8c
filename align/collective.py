"""Waiting for the other processes of a run: a collective that fails says who waited, for what, and who did not come.

Every process writes on a board that all can read (torch's key-value store) where it is before it waits. When the wait
fails, because its time is over or because another process is gone, the error is made from the board.
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
"""Longest wait in one collective. Whoever waits for rank 0 to save a model or to finish a benchmark waits for hours;
a process that is gone is noticed at once, by its closed connection or by its launcher, and not by this limit."""
_PACKAGE = Path(__file__).parent


class Board(Protocol):
    """What is needed of ``torch.distributed.Store``."""

    def set(self, key: str, value: str, /) -> None:
        """Write."""

    def check(self, keys: list[str], /) -> bool:
        """Have all of them been written?"""

    def get(self, key: str, /) -> bytes:
        """Read what was written."""


class Meetings:
    """The collectives of one process, counted: all processes make the same ones in the same order."""

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
        """The collective in here is counted, and its failure explained.

        Raises:
            EnvironmentFault: it failed; the message names the ranks that did not come.
        """
        self._number += 1
        began = time.monotonic()
        try:
            self._tell(what)
            yield
        except RuntimeError as error:  # torch.distributed's errors are kinds of it
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            message = f"rank {self._rank} waited {time.monotonic() - began:.0f} s for the other processes in {what}"
            hint = "look at what those ranks printed last; the same command continues from what was saved"
            raise EnvironmentFault(f"{message}: {self._absent(what)} ({reason})", hint=hint) from error

    def _absent(self, what: str) -> str:
        """Who is not in this collective, and where it was last."""
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
    """No more collectives."""
    global _meetings
    _meetings = None


@contextmanager
def collective(what: str) -> Iterator[None]:
    """Around every collective of torch.distributed: see :meth:`Meetings.meet`. Free where there is one process."""
    if _meetings is None:
        yield
    else:
        with _meetings.meet(what):
            yield


def place(*passing: str) -> str:
    """Where the program is, as ``function (align/folder/file.py:line)``: the innermost function outside of the modules
    ``passing`` (names of files) that hand collectives on."""
    frame = sys._getframe(1)
    while frame.f_back is not None and Path(frame.f_code.co_filename).name in passing:
        frame = frame.f_back
    file = Path(frame.f_code.co_filename)
    shown = file.relative_to(_PACKAGE.parent) if file.is_relative_to(_PACKAGE) else Path(file.name)
    return f"{frame.f_code.co_name} ({shown}:{frame.f_lineno})"
