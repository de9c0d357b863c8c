"""``align diff``: how two runs differ in recipe, data and packages, and their results side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from align.errors import InputError
from align.pipeline.identity import flat
from align.recipe.schema import Recipe
from align.report.estimates import Change, ReportedNumber
from align.report.measures import headlines
from align.runs.record import RunRecord, StageRecord
from align.terminal import plain

ABSENT = "-"
"""Shown in place of a value that one of the two runs does not have."""


@dataclass(frozen=True)
class Difference:
    """A value that differs between two runs, or a result of both."""

    key: str
    one: str
    other: str
    change: str = ""
    """The difference of two numbers."""


@dataclass(frozen=True)
class RunDiff:
    """Two runs side by side. All fields but ``results`` contain only differences."""

    recipe: tuple[Difference, ...]
    """By dotted key."""
    data: tuple[Difference, ...]
    """Digest and size of what the stages read, by stage and reference."""
    packages: tuple[Difference, ...]
    results: tuple[Difference, ...]
    """Headline numbers of stages of the same name."""


def compare(one: RunRecord, other: RunRecord) -> RunDiff:
    """Compare two runs by what their folders say."""
    return RunDiff(
        recipe=tuple(_recipe_differences(one, other)),
        data=tuple(_differences(dict(_data(one)), dict(_data(other)))),
        packages=tuple(_differences(_packages(one), _packages(other))),
        results=tuple(_results(one, other)),
    )


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[Difference]:
    for key in {**one, **other}:
        if key not in one or key not in other or one[key] != other[key]:
            shown = [str(side[key]) if key in side else ABSENT for side in (one, other)]
            yield Difference(key, shown[0], shown[1])


def _recipe_differences(one: RunRecord, other: RunRecord) -> Iterator[Difference]:
    """Differences between the recipes. A key that only one of them contains has its default in the other."""
    written = [flat(run.tree) for run in (one, other)]
    whole = [_with_defaults(run) for run in (one, other)]
    for key in {**written[0], **written[1]}:
        sides = [of.get(key, defaults.get(key, ABSENT)) for of, defaults in zip(written, whole, strict=True)]
        if sides[0] != sides[1]:
            marks = [
                " (default)" if key not in of and key in defaults else ""
                for of, defaults in zip(written, whole, strict=True)
            ]
            yield Difference(key, *(f"{side}{mark}" for side, mark in zip(sides, marks, strict=True)))


def _with_defaults(run: RunRecord) -> dict[str, Any]:
    """A recipe's values by dotted key, with defaults; empty when the recipe is of another version, or needs a plugin
    that is not installed."""
    try:
        return flat(Recipe.model_validate(run.tree).model_dump(mode="json"))
    except (ValueError, InputError):
        return {}


def _data(run: RunRecord) -> Iterator[tuple[str, str]]:
    for stage in run.stages:
        if stage.manifest is None:
            continue
        yield from ((f"{stage.name}: {text}", digest[:12]) for text, digest in stage.manifest.identity.inputs.items())
        data = stage.report.get("data")
        counts = data if isinstance(data, Mapping) else {}
        yield from (
            (f"{stage.name}: {words}", f"{counts[key]:,}")
            for key, words in _COUNTS.items()
            if isinstance(counts.get(key), int)
        )


_COUNTS = {"trees": "examples", "tokens": "tokens", "targets": "tokens trained on"}


def _packages(run: RunRecord) -> dict[str, str]:
    """Versions of the packages that made the results, which may be older than those of the last start. If stages
    differ, those of the last one count."""
    packages: dict[str, str] = {}
    for stage in run.stages:
        packages |= stage.manifest.packages if stage.manifest else {}
    return packages or dict(run.about.get("packages") or {})


def _results(one: RunRecord, other: RunRecord) -> Iterator[Difference]:
    others = {stage.name: stage for stage in other.stages}
    for stage in one.stages:
        ours, theirs = _lines(stage), _lines(others.get(stage.name))
        for words in ours | theirs:
            a, b = ours.get(words), theirs.get(words)
            if a and b:
                yield Difference(
                    f"{stage.name}: {words}", *Change(stage.name, words, a, b, ReportedNumber(b.value - a.value)).cells
                )
            else:
                shown = [Change(stage.name, words, None, side).cells[1] if side else ABSENT for side in (a, b)]
                yield Difference(f"{stage.name}: {words}", shown[0], shown[1])


def _lines(stage: StageRecord | None) -> dict[str, ReportedNumber]:
    """The values after the stage, by the names of their measures."""
    return {line.title: line.after for line in headlines(stage) if line.after} if stage is not None else {}


def show(one: RunRecord, other: RunRecord, console: Console) -> None:
    """Print a comparison."""
    diff = compare(one, other)
    parts = {"recipe": diff.recipe, "data": diff.data, "packages": diff.packages}
    same = [name for name, differences in parts.items() if not differences]
    for name, differences in [*parts.items(), ("results", diff.results)]:
        if differences:
            _print(name, differences, (str(one.folder), str(other.folder)), console)
    if same:
        console.print(f"the same: {', '.join(same)}", highlight=False)


def _print(title: str, differences: tuple[Difference, ...], names: tuple[str, str], console: Console) -> None:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    with_change = title == "results"
    for header in ("", *names, *(["difference"] if with_change else [])):
        table.add_column(header, overflow="fold")
    for entry in differences:
        cells = (entry.key, entry.one, entry.other, *([entry.change] if with_change else []))
        table.add_row(*map(plain, cells))
    console.print(table)
