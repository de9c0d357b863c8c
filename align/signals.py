"""Ctrl-C and SIGTERM: the first asks the running stage to save and stop, the second ends the process at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_requested: int | None = None
_since = 0.0


def stop_requested() -> int | None:
    """The number of the signal that asked to stop, or None. Stages poll it after every step, save, and raise ``Interrupted`` with it."""
    return _requested


class StopFlag:
    """While entered, the first SIGINT or SIGTERM only sets :func:`stop_requested`; the second exits at once with 130 or 143.

    ``same_within`` seconds: further signals so soon belong to the first. A launcher passes on the Ctrl-C that the terminal sent to
    every process already, and that must not count as a second one. Outside the main thread, where Python allows no handlers, nothing
    is installed.
    """

    def __init__(self, same_within: float = 0.0) -> None:
        self._same_within = same_within
        self._before: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> StopFlag:
        global _requested
        _requested = None
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        global _requested
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        _requested = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        global _requested, _since
        now = time.monotonic()
        if _requested is None:
            _requested, _since = number, now
        elif now - _since >= self._same_within:
            if sys.stderr.isatty():
                os.write(2, b"\x1b[?25h\n")  # a progress bar may have hidden the cursor
            os._exit(128 + number)
