"""The results of a recipe that ran with several seeds, with intervals over seeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from align.functional.intervals import Range, mean_of
from align.report.estimates import Change, ReportedNumber
from align.report.measures import changes
from align.report.text.summary import all_stages
from align.runs.record import read_run


def over_seeds(folders: Sequence[Path]) -> dict[str, list[Change]]:
    """For each stage, means over the runs of the measures that every run has.

    Intervals are over seeds, by the rule of :mod:`align.functional.intervals`; the intervals over prompts of single
    runs do not enter. A number that is the same in all runs, such as that of a base model, has no interval. A
    difference is the mean of the runs' differences.
    """
    runs = [[(stage.name, changes(stage)) for stage in read_run(folder).stages] for folder in folders]
    of_each = [{(name, made.title): made for name, found in run for made in found} for run in runs]
    combined: dict[str, list[Change]] = {}
    for name, found in runs[0]:
        keys = [(name, made.title) for made in found if all((name, made.title) in run for run in of_each)]
        combined[name] = [_combined([run[key] for run in of_each]) for key in keys]
    return combined


def _combined(made: Sequence[Change]) -> Change:
    first, (least, largest) = made[0], made[0].within
    apart = largest - least
    before, after = (_mean([getattr(change, part) for change in made], first.within) for part in ("before", "after"))
    difference = _mean([change.difference for change in made], (-apart, apart))
    items = [change.items for change in made if change.items is not None]
    return replace(
        first,
        before=before,
        after=after,
        difference=difference,
        note="",
        items=min(items, default=None),
        trained=any(change.trained for change in made),
    )


def _mean(estimates: Sequence[ReportedNumber | None], within: Range) -> ReportedNumber | None:
    """The mean over runs, if all of them have the number."""
    values = [estimate.value for estimate in estimates if estimate is not None]
    if not values or len(values) < len(estimates):
        return None
    found = mean_of(values, within)
    return ReportedNumber(found.mean, found.low, found.high) if len(set(values)) > 1 else ReportedNumber(values[0])


def show(name: str, folders: Sequence[Path], console: Console) -> None:
    """Print the table."""
    console.print(
        all_stages(f"{name}: means over {len(folders)} seeds, 95 % intervals over seeds", over_seeds(folders))
    )


def as_json(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The table for machines."""
    return [dict(_entry(change)) for changes in over_seeds(folders).values() for change in changes]


def _entry(change: Change) -> Iterator[tuple[str, Any]]:
    yield from (("stage", change.stage), ("measure", change.title))
    for part in ("before", "after", "difference"):
        estimate: ReportedNumber | None = getattr(change, part)
        if estimate is not None:
            numbers: Mapping[str, float | None] = vars(estimate)
            yield part, {key: value for key, value in numbers.items() if value is not None}
