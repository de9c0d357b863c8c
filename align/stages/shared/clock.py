"""Where the time of a stage goes, for people: no part of a result."""

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
        """Count what happens inside as ``phase``."""
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
        """Nothing that happens inside is counted."""
        lap = self.take()
        try:
            yield
        finally:
            self.lap = lap

    def take(self) -> dict[str, float]:
        """What was counted; counting begins anew."""
        lap, self.lap = self.lap, {}
        return lap
