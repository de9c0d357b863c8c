"""Measuring the time of a stage by phase. Times are printed, but are not part of a result."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Clock:
    """Seconds by phase, since the last :meth:`take`."""

    lap: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the time spent inside as ``phase``."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(phase, time.perf_counter() - began)

    def add(self, phase: str, seconds: float) -> None:
        """Count ``seconds`` that were measured elsewhere."""
        self.lap[phase] = self.lap.get(phase, 0.0) + seconds

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """The time spent inside is not counted."""
        lap = self.take()
        try:
            yield
        finally:
            self.lap = lap

    def take(self) -> dict[str, float]:
        """Seconds by phase; the counts start again from zero."""
        lap, self.lap = self.lap, {}
        return lap
