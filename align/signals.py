"""Handling Ctrl-C, SIGTERM and a closed terminal: the first signal asks the running stage to save and stop, the second
ends the process at once. Closed standard output (``align run ... | head``) counts as a first signal.

Also ends a process when the process that started it ends.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The signals that ask to stop. The last is sent when a terminal is closed or the connection to it is lost."""
LAUNCHER = "ALIGN_LAUNCHER"
"""Environment variable with the number of the process that started a process of ``align run --nproc``, and with which
it ends."""
_PR_SET_PDEATHSIG = 1
_requested: int | None = None
_since = 0.0
_entered = 0
"""Number of :class:`StopFlag` that are entered."""


def stop_requested() -> int | None:
    """The number of the signal that asked to stop, or None. Stages poll it after every step, save, and raise
    ``Interrupted`` with it."""
    return _requested


def output_closed() -> None:
    """Called when the reader of standard output is gone: asks to stop, like a first signal. Does nothing outside of a
    :class:`StopFlag`.

    A Ctrl-C after this still counts as the first signal: in ``align run ... | tee log`` it reaches both processes, and
    may end the reader first.
    """
    global _requested
    if _entered and _requested is None:
        _requested = signal.SIGPIPE


def handled() -> list[signal.Signals]:
    """The signals that ask to stop, without SIGHUP if the process was started with it ignored."""
    return [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN]


def end_with(parent: int) -> None:
    """From now on this process is killed when its parent, process ``parent``, ends for any reason; exits if it has
    ended already.

    The kernel does this, so it works for a parent that was killed (on Linux; elsewhere only the check for a parent that
    has ended is made). Processes that a child starts have to call it too.
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel was asked
        os._exit(128 + signal.SIGKILL)


class StopFlag:
    """While entered, the first of :data:`SIGNALS` only sets :func:`stop_requested`; a second one exits at once with 128
    + its number.

    A closed terminal may send SIGHUP several times, from the shell and from the kernel, so SIGHUP never counts as the
    second signal. If it was ignored from the start (``nohup``), it still is.

    Further signals within ``same_within`` seconds belong to the first: a launcher passes on the Ctrl-C that the
    terminal already sent to every process. Outside the main thread, where Python allows no handlers, none is installed.
    """

    def __init__(self, same_within: float = 0.0) -> None:
        self._same_within = same_within
        self._before: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> StopFlag:
        global _requested, _entered
        _requested = None
        _entered += 1
        if threading.current_thread() is threading.main_thread():
            for number in handled():
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _requested, _entered
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        _requested = None
        _entered -= 1

    def _handle(self, number: int, frame: FrameType | None) -> None:
        global _requested, _since
        now = time.monotonic()
        if _requested in (None, signal.SIGPIPE):
            _requested, _since = number, now
        elif number != signal.SIGHUP and now - _since >= self._same_within:
            if sys.stderr.isatty():
                os.write(2, b"\x1b[?25h\n")  # a progress bar may have hidden the cursor
            os._exit(128 + number)
