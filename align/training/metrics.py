"""Metrics as sums with their counts, the file and trackers that they are written to, and the progress bar."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from align import files
from align.training.trackers import require_tracker

_log = logging.getLogger("align")
SILENCE_S = 30.0
"""A line of progress is printed at least this often, unless a single step takes longer."""


@dataclass(frozen=True)
class Mean:
    """A sum and its count. The division happens once, after the sums of all micro-batches and processes were added
    up."""

    total: Tensor | float
    count: float

    @property
    def value(self) -> float:
        """The mean; 0 when nothing was counted."""
        return float(self.total) / self.count if self.count else 0.0


def add_up(parts: Iterable[Mapping[str, Mean]]) -> dict[str, Mean]:
    """Add sums and counts by name, in fp64, so that the result does not depend on how the items were split over
    micro-batches and processes."""
    named = [(name, mean) for part in parts for name, mean in part.items()]
    totals: dict[str, tuple[float, float]] = {}
    for (name, mean), added in zip(named, _floats([mean.total for _, mean in named]), strict=True):
        total, count = totals.get(name, (0.0, 0.0))
        totals[name] = (total + added, count + mean.count)
    return {name: Mean(total, count) for name, (total, count) in totals.items()}


def _floats(values: Sequence[Tensor | float]) -> list[float]:
    """The values as floats. All tensors are read in one copy: each copy makes the CPU wait for the GPU."""
    tensors = [value.detach().double() for value in values if isinstance(value, Tensor)]
    read = iter(torch.stack(tensors).tolist() if tensors else ())
    return [next(read) if isinstance(value, Tensor) else float(value) for value in values]


class MetricsLog:
    """``metrics.jsonl``: one line a step, and the trackers named in ``report_to``."""

    def __init__(
        self,
        path: Path,
        *,
        resumed_at: int | None,
        report_to: list[str],
        run_name: str,
        config: Mapping[str, Any],
        written: str | None = None,
    ) -> None:
        """``resumed_at`` is the step from which the run resumes, None for a new run; ``written`` is the :meth:`digest`
        at that step."""
        self.path = path
        if path.exists():
            # Remove the lines of steps that will run again, and a last line that a crash of the machine may have cut.
            upto = -1 if resumed_at is None else resumed_at
            kept = [
                line
                for line in path.read_text(encoding="utf-8", errors="replace").split("\n")
                if _step_of(line) <= upto
            ]
            files.atomic_write(path, "".join(line + "\n" for line in kept))
        if written is not None and written != self.digest():
            _log.warning("%s is damaged: rows may be missing or wrong. Training does not depend on them", path)
        self._trackers = _open_trackers(report_to, run_name, path.parent / "trackers", config)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line and pass the values on."""
        files.append_line(self.path, {"step": step, **values})
        for tracker in self._trackers:
            tracker.log(dict(values), step=step)

    def digest(self) -> str:
        """Hex sha256 of what is written so far."""
        return files.sha256_file(self.path) if self.path.exists() else ""

    def close(self) -> None:
        """Let the trackers finish."""
        for tracker in self._trackers:
            tracker.finish()


def _step_of(line: str) -> float:
    """The step of a line of metrics; infinite for any other line."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return float("inf")


def _open_trackers(names: list[str], run_name: str, folder: Path, config: Mapping[str, Any]) -> list[Any]:
    """Accelerate's trackers by name; they are opened on the first process only."""
    if not names:
        return []
    for name in names:
        require_tracker(name)  # accelerate ignores a tracker that is not installed, without a word
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers

    PartialState()
    folder.mkdir(parents=True, exist_ok=True)
    trackers = []
    for name in filter_trackers(names, str(folder)):
        kind = LOGGER_TYPE_TO_CLASS[str(name)]
        tracker = kind(run_name, logging_dir=str(folder)) if kind.requires_logging_directory else kind(run_name)
        tracker.start()
        tracker.store_init_configuration(
            {key: value for key, value in config.items() if isinstance(value, (int, float, str, bool))}
        )
        trackers.append(tracker)
    return trackers


class ProgressBar:
    """Steps done, loss, tokens/s and time left; a plain line now and then where there is no terminal."""

    def __init__(self, console: Console, name: str, total: int, done: int) -> None:
        self._console = console
        self._name = name
        self._total = total
        self._bar: Progress | None = None
        self._printed = done
        self._first: tuple[float, int] | None = None
        self._said = time.monotonic()
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[line]}"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task(name, total=total, completed=done, line="")
            self._bar.start()

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Show the values of the step just done."""
        shown = [f"loss {values['loss']:.4f}", f"{values['tokens_per_second']:.0f} tokens/s"]
        if self._bar is not None:
            self._bar.update(self._task, completed=step, line="  ".join(shown))
        elif (
            step == self._total
            or step - self._printed >= max(1, self._total // 10)
            or time.monotonic() - self._said >= SILENCE_S
        ):
            self._printed, self._said = step, time.monotonic()
            left = (self._total - step) * self._seconds(step, values["step_seconds"])
            self._console.print(
                f"{self._name}  step {step}/{self._total}  {'  '.join(shown)}  {left:.0f} s left", highlight=False
            )

    def _seconds(self, step: int, own: float) -> float:
        """Seconds from the end of the last step to the end of this one, since a run may sample, score and evaluate
        between steps. For the first step its ``own`` duration is returned: what came before it happens only once."""
        now = time.monotonic()
        if self._first is None:
            self._first = now, step
        began, first = self._first
        return (now - began) / (step - first) if step > first else own

    def close(self) -> None:
        """Remove the bar's live display, leaving its last state."""
        if self._bar is not None:
            self._bar.stop()
