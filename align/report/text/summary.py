"""A summary of the report for a terminal: all measures before and after in one table, and the warnings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from align.report.estimates import Change
from align.report.measures import changes
from align.report.warnings import notes
from align.runs.record import RunRecord
from align.runs.values import visible


def show(run: RunRecord, page: Path, console: Console) -> None:
    """Print the summary; ``page`` is the path of the whole report."""
    table = all_stages(f"{run.name}: all stages", {stage.name: changes(stage) for stage in run.stages})
    if table.row_count:
        console.print(table)
    for stage in run.stages:
        for note in notes(stage):
            _say(console, f"{note.stage}  note: {note.text}")
    _say(console, f"report: {page}")


def all_stages(title: str, made: Mapping[str, Sequence[Change]]) -> Table:
    """The measures of every stage, before and after, with a verdict."""
    table = Table(title=Text(title), title_justify="left")
    for header in ("stage", "measure"):
        table.add_column(header, overflow="fold")
    for header in ("before", "after", "change"):
        table.add_column(header, justify="right", overflow="fold")
    table.add_column("", overflow="fold")
    for stage, measured in made.items():
        for k, change in enumerate(measured):
            cells = (stage if k == 0 else "", change.title, *change.cells, change.verdict)
            table.add_row(*(Text(visible(cell)) for cell in cells), end_section=k == len(measured) - 1)
    return table


def _say(console: Console, line: str) -> None:
    console.print(visible(line), markup=False, highlight=False, soft_wrap=True)
