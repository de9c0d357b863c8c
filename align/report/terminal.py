"""The page in short, for a terminal: all measures before and after in one table, and the warnings."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from align.report.changes import changes
from align.report.notes import notes
from align.report.run import RunRecord
from align.report.values import visible


def show(run: RunRecord, page: Path, console: Console) -> None:
    """Print it; ``page`` is where the whole report lies."""
    table = Table(title=Text(f"{run.name}: all stages"), title_justify="left")
    for header in ("stage", "measure"):
        table.add_column(header, overflow="fold")
    for header in ("before", "after", "change"):
        table.add_column(header, justify="right", overflow="fold")
    table.add_column("", overflow="fold")
    for stage in run.stages:
        made = changes(stage)
        for k, change in enumerate(made):
            cells = (stage.name if k == 0 else "", change.title, *change.cells, change.verdict)
            table.add_row(*(Text(visible(cell)) for cell in cells), end_section=k == len(made) - 1)
    if table.row_count:
        console.print(table)
    for stage in run.stages:
        for note in notes(stage):
            _say(console, f"{note.stage}  note: {note.text}")
    _say(console, f"report: {page}")


def _say(console: Console, line: str) -> None:
    console.print(visible(line), markup=False, highlight=False, soft_wrap=True)
