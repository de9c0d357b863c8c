"""One run at a time in a run folder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
import weakref
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType

import psutil

from align import files
from align.errors import EnvironmentFault

LOCK = ".align.lock"
OWNER = ".align.owner.json"
_CLOCKS_S = 60.0
"""Largest difference, in seconds, between the start times of a process that the lock file and the kernel give."""


@dataclass(frozen=True)
class Owner:
    """Who holds, or held, a lock."""

    pid: int
    host: str
    start: str

    @property
    def lives(self) -> bool:
        """Whether the process exists. When that cannot be known, on another host or from a damaged file, the answer is
        yes."""
        if self.pid <= 0 or self.host != socket.gethostname():
            return True
        try:
            began: float = psutil.Process(self.pid).create_time()
            # Otherwise another process has the number by now
            return began <= datetime.fromisoformat(self.start).timestamp() + _CLOCKS_S
        except psutil.NoSuchProcess:
            return False
        except (psutil.AccessDenied, ValueError):
            return True

    def __str__(self) -> str:
        return f"pid {self.pid} on host {self.host} since {self.start}"


class RunLock:
    """Locks ``folder`` for this process while entered. Raises :class:`EnvironmentFault` at once when another process
    has the lock.

    The lock is the kernel's (flock), which ends with its process even after SIGKILL. The file beside it only names the
    owner. If the file exists although nobody has the lock, the earlier run was killed, and ``taken_over`` names it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptor: int | None = None
        self.taken_over: Owner | None = None

    def __enter__(self) -> RunLock:
        with files.machine_faults(self._folder):
            descriptor = os.open(self._folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            raise self._refusal(error) from error
        self._descriptor = descriptor
        _held.add(self)
        try:
            self.taken_over = read_owner(self._folder)
            files.write_json(self._folder / OWNER, asdict(_me()))
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        files.discard(self._folder / OWNER)
        self._release()

    def _release(self) -> None:
        _held.discard(self)
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _refusal(self, error: OSError) -> EnvironmentFault:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            owner = read_owner(self._folder)
            return EnvironmentFault(f"{self._folder}: in use by {owner or 'another run that is just starting'}")
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            return EnvironmentFault(
                f"{self._folder}: this file system has no file locks", hint="keep runs on a file system with flock"
            )
        return files.fault_of(error, self._folder)


def read_owner(folder: Path) -> Owner | None:
    """The owner named in ``folder``; None when there is none. The owner of a damaged file is unknown."""
    try:
        value = json.loads((folder / OWNER).read_text(encoding="utf-8"))
        return Owner(int(value["pid"]), str(value["host"]), str(value["start"]))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):  # it is only used for a message, so a run goes on in spite of damage
        return Owner(0, "unknown", "unknown")


def _me() -> Owner:
    return Owner(os.getpid(), socket.gethostname(), time.strftime("%Y-%m-%dT%H:%M:%S%z"))


_held: weakref.WeakSet[RunLock] = weakref.WeakSet()


def _let_go_in_child() -> None:
    # A forked worker that outlives a killed run would keep its lock through the inherited descriptor.
    for lock in list(_held):
        lock._release()


os.register_at_fork(after_in_child=_let_go_in_child)
