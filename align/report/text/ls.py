"""``align ls``: the runs of a folder, one line for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from align.errors import InputError
from align.report.estimates import Change
from align.report.measures import headlines
from align.runs.record import RunRecord, list_runs, read_run
from align.sizing.needs import duration
from align.terminal import plain

STYLES = {
    "finished": "green",
    "running": "cyan",
    "failed": "red",
    "killed": "red",
    "damaged": "red",
    "interrupted": "yellow",
}
"""Style of each state."""


@dataclass(frozen=True)
class Listed:
    """A run folder, and the run in it, or None if it cannot be read."""

    folder: Path
    run: RunRecord | None

    @property
    def state(self) -> str:
        """The run's state; ``damaged`` when it cannot be read."""
        return "damaged" if self.run is None else self.run.state

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        row: dict[str, Any] = {"name": self.folder.name, "folder": str(self.folder), "state": self.state}
        if self.run is None:
            return row
        stages = [
            {
                "name": stage.name,
                "kind": stage.kind,
                "state": stage.state,
                "seconds": stage.seconds,
                "warnings": list(stage.warnings),
                "headlines": list(map(_numbers, headlines(stage))),
            }
            for stage in self.run.stages
        ]
        return row | {
            "last": self.run.last,
            "seconds": round(self.run.seconds, 1),
            "done": done(self.run),
            "stages": stages,
        }


def _numbers(line: Change) -> dict[str, Any]:
    """For machines."""
    return {"words": line.title, "before": line.before and line.before.value, "after": line.after and line.after.value}


def listed(runs_dir: Path) -> Iterator[Listed]:
    """The runs in a folder, the most recent first."""
    for folder in list_runs(runs_dir):
        try:
            yield Listed(folder, read_run(folder))
        except InputError:
            yield Listed(folder, None)


def done(run: RunRecord) -> int:
    """Number of finished stages."""
    return sum(stage.state == "finished" for stage in run.stages)


def when(time: str) -> str:
    """An ISO time shortened to the minute; in UTC, like all times of a run."""
    return time[:16].replace("T", " ")


def show(runs: Sequence[Listed], console: Console) -> None:
    """Print a table with one row for each run, and in it a line for each stage that has a headline number."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for header in ("run", "state", "stages", "last change (UTC)", "took", "results"):
        table.add_column(header, overflow="fold", no_wrap=header in ("state", "stages"))
    for entry in runs:
        state = Text(entry.state, style=STYLES.get(entry.state, ""))
        if entry.run is None:
            table.add_row(entry.folder.name, state, "", "", "", "")
            continue
        results = [
            f"{stage.name}: {', '.join(map(str, changes))}"
            for stage in entry.run.stages
            if (changes := headlines(stage))
        ]
        stages = f"{done(entry.run)}/{len(entry.run.stages)}"
        took = duration(entry.run.seconds) if entry.run.seconds else ""
        table.add_row(entry.folder.name, state, stages, when(entry.run.last), took, plain("\n".join(results)))
    console.print(table)
