"""Progress of work that is counted in items: number done, items per second, time left."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class CountBar:
    """A progress bar while entered; a plain line now and then if there is no terminal. The speed does not count items
    that were found done."""

    def __init__(self, console: Console, name: str, unit: str, total: int) -> None:
        self._console, self._name, self._unit, self._total = console, name, unit, total
        self._done = self._worked = self._printed = 0
        self._began = time.perf_counter()
        self._bar: Progress | None = None

    def __enter__(self) -> CountBar:
        if self._console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[line]}"), TimeRemainingColumn())
            self._bar = Progress(TextColumn("{task.description}"), *columns, console=self._console)
            self._task = self._bar.add_task(self._name, total=self._total, line=self._unit)
            self._bar.start()
        return self

    def found(self, count: int) -> None:
        """``count`` items were already done before."""
        self._done += count
        self._printed += count
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)

    def advance(self, count: int) -> None:
        """``count`` more items are done."""
        self._done += count
        self._worked += count
        speed = self._worked / max(time.perf_counter() - self._began, 1e-9)
        line = f"{speed:.1f} {self._unit}/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, line=line)
        elif self._done >= self._total or self._done - self._printed >= max(1, self._total // 10):
            self._printed = self._done
            left = (self._total - self._done) / speed
            text = f"{self._name}  {self._done}/{self._total} {self._unit}  {line}  {left:.0f} s left"
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
