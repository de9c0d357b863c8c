"""``align show``: a run and its stages, or one stage with its numbers, its data and some samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from align.data.report import DataReport
from align.report.measures import headlines
from align.report.text.ls import STYLES, when
from align.runs.record import RunRecord, StageRecord
from align.runs.samples import iterations, samples
from align.sizing.needs import duration
from align.terminal import plain


def show_run(run: RunRecord, console: Console) -> None:
    """The run, and its stages in running order."""
    console.print(
        Text.assemble((run.name, "bold"), f"  {run.folder}  ", (run.state, STYLES.get(run.state, ""))), soft_wrap=True
    )
    for name in ("recipe", "started"):
        if run.about.get(name):
            console.print(Text(f"{name}: ").append(plain(str(run.about[name]))), soft_wrap=True)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for header in ("stage", "kind", "state", "ran last because", "when (UTC)", "took", "results"):
        table.add_column(header, overflow="fold", no_wrap=header in ("state", "kind"))
    for stage in run.stages:
        took = "" if stage.seconds is None else duration(stage.seconds)
        at = when(str(stage.events[-1].get("time", ""))) if stage.events else ""
        results = plain("\n".join(map(str, headlines(stage))))
        table.add_row(stage.name, stage.kind, _state(stage), plain(_reason(stage)), at, took, results)
    console.print(table)
    for stage in run.stages:
        _print_trouble(stage, console)


def show_stage(run: RunRecord, stage: StageRecord, console: Console, *, limit: int, iteration: int | None) -> None:
    """One stage. Raises :class:`InputError` when it has no such iteration."""
    shown = list(samples(stage, limit, iteration))
    console.print(
        Text.assemble((f"{run.name}/{stage.name}", "bold"), f"  {stage.kind}  ", _state(stage)), soft_wrap=True
    )
    if reason := _reason(stage):
        console.print(Text("ran last because: ").append(plain(reason)), soft_wrap=True)
    console.print(
        f"result: {stage.folder}" if stage.manifest else "no result yet", highlight=False, markup=False, soft_wrap=True
    )
    _print_trouble(stage, console)
    _print_numbers(stage, console)
    for line in _data_lines(stage):
        console.print(plain(line), soft_wrap=True)
    _print_iterations(stage, console)
    for parts in shown:
        console.print(Rule(style="dim"))
        for name, text in parts:
            console.print(plain(name).append(":"), style="bold", soft_wrap=True)
            console.print(plain(text), soft_wrap=True)


def _state(stage: StageRecord) -> Text:
    return Text(stage.state, style=STYLES.get(stage.state, ""))


def _reason(stage: StageRecord) -> str:
    """Why the stage ran the last time."""
    return next(
        (str(event.get("reason", "")) for event in reversed(stage.events) if event.get("event") == "started"), ""
    )


def _print_trouble(stage: StageRecord, console: Console) -> None:
    """Print the result's warnings, and the error of a later attempt that failed."""
    for warning in stage.warnings:
        console.print(Text(f"{stage.name}  warning: ", style="yellow").append_text(plain(warning)), soft_wrap=True)
    if stage.state in ("failed", "interrupted"):
        error = plain(str(stage.events[-1].get("error", "")))
        console.print(
            Text(f"{stage.name}  {stage.state}: ", style=STYLES[stage.state]).append_text(error), soft_wrap=True
        )
    if stage.state != "finished" and stage.manifest is not None:
        console.print(
            f"{stage.name}  the result of an earlier run is there", highlight=False, markup=False, soft_wrap=True
        )


def _print_numbers(stage: StageRecord, console: Console) -> None:
    before, after = (_numbers(stage.summary.get(name)) for name in ("eval_before", "eval_after"))
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=bool(after))
    for header in ("", "before", "after"):
        table.add_column(header, overflow="fold")
    for name, value in after.items():
        table.add_row(plain(f"held-out {name}"), f"{before[name]:.4f}" if name in before else "", f"{value:.4f}")
    for name, value in _numbers(stage.summary).items():
        table.add_row(plain(name), "", f"{value:,.6g}")
    if not after:
        for line in headlines(stage):
            table.add_row(plain(line.title), *line.cells[:2])
    if table.row_count:
        console.print(table)


def _numbers(values: Any) -> dict[str, float]:
    """The entries that are numbers, by name."""
    entries = values.items() if isinstance(values, Mapping) else ()
    return {
        str(name): value for name, value in entries if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def _data_lines(stage: StageRecord) -> Iterator[str]:
    """Lines about the data that the stage read."""
    try:
        yield from DataReport.from_json(stage.report["data"], reused=False).lines()
    except (KeyError, TypeError, AttributeError, ValueError):
        return  # another kind of report, or none


def _print_iterations(stage: StageRecord, console: Console) -> None:
    rows = list(iterations(stage))
    if not rows:
        return
    table = Table(title="means over an iteration's answers", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{value:.4g}" for value in row.values()))
    console.print(table)
