"""Reading the user's copy of a reward benchmark, which is recognised by its columns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from align.data.rows import Row, Told
from align.data.sources.conditions import Choice
from align.data.sources.readers import BadRow, read_rows
from align.data.sources.source_report import SHOWN, count_of
from align.data.strict_json import RowError, clip
from align.errors import InputError, Problem
from align.evaluation.reward_bench import judgebench, rewardbench1, rewardbench2, rmbench
from align.evaluation.reward_bench.items import Bench, Item
from align.recipe.kinds.judge import Judge
from align.recipe.schema import DataSource

BENCHES: tuple[Bench, ...] = (rewardbench1, rewardbench2, rmbench, judgebench)
"""Each has columns that the others do not have."""


def read_bench(source: DataSource, location: Path | str, most: int | None = None) -> tuple[Bench, list[Item]]:
    """The benchmark of the rows of ``source``, recognised by the first row, and its items, at most ``most``.

    Raises:
        InputError: they are none of :data:`BENCHES`; bad rows, of which the first are listed; no row is left.
    """
    bad: list[Problem] = []
    rows = _chosen(source, location, bad)
    items: list[Item] = []
    bench: Bench | None = None
    ids: set[str] = set()
    for row in rows:
        try:
            bench = bench or _recognised(row)
            if not bench.recognises(row.value):
                raise RowError(f"has not the columns of {bench.TITLE}, as the first row has")
            item = bench.item(row.value, row.origin)
            if item.group == rewardbench2.TIES and item.id in ids:
                raise RowError(f"`{clip(item.id, 40)}` is there twice", "id")
        except RowError as error:
            bad.append(BadRow(error.message, row.origin.source, row.origin.line, key=error.field))
            if bench is None:
                break
            continue
        ids.add(item.id)
        items.append(item)
        if len(items) == most:
            break
    if bad:
        more = [Problem(count_of(len(bad)), hint="give the official file as it is")] if len(bad) > 1 else []
        raise InputError([*bad[:SHOWN], *more])
    if bench is None or not items:
        raise InputError(Problem("0 rows left", file=str(location)))
    return bench, items


def refuse_pairs_where_scores_are_needed(judge: Judge | None, bench: Bench, path: str) -> None:
    """Raises InputError for a judge that only compares, on a benchmark that needs a score of each answer."""
    if bench.NEEDS_SCORES and judge is not None and "pointwise" not in judge.methods:
        what = f"{bench.TITLE} asks for a grade of each answer, and the judge only compares two"
        raise InputError(Problem(what, file=path, hint="judge.methods: [pointwise]"))


def _recognised(row: Row) -> Bench:
    found = next((bench for bench in BENCHES if bench.recognises(row.value)), None)
    if found is None:
        known = ", ".join(bench.TITLE for bench in BENCHES)
        raise RowError(
            f"is a row of none of the reward benchmarks ({known}): it has {clip(', '.join(map(str, row.value)), 80)}"
        )
    return found


def _chosen(source: DataSource, location: Path | str, bad: list[Problem]) -> Iterator[Row]:
    """The rows that ``where`` keeps, as many as ``limit`` allows."""
    choice, kept = Choice(source), 0
    for row in read_rows(source, location, bad.append, Told(log=True)):
        for part in choice.parts(row):
            if choice.wanted(part):
                kept += 1
                yield part.row
        if kept == source.limit:
            return
