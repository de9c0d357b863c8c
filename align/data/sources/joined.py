"""Joining rows with columns of another file, such as answers with the questions in a second file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align.data.mapping.grouped import Kept
from align.data.mapping.places import find, text_at
from align.data.rows import Bad, BadRow, Row, Told
from align.data.sources.conditions import Choice
from align.data.strict_json import RowError
from align.errors import InputError, Problem
from align.recipe.schema import DataSource


def joined(
    rows: Iterator[Row], other: Iterator[Row], source: DataSource, file: Path, bad: Bad, told: Told
) -> Iterator[Row]:
    """Each row with the columns of the row in the other file that has the same value at the joining place; the row's
    own columns have precedence.

    The other file is indexed on disk, so it may be larger than memory. A row without a counterpart is a bad row, unless
    its own columns fail the source's ``where``: it is then passed on unchanged, to be left out. Raises
    :class:`InputError` when two rows of the other file have the same value, since either could be meant.
    """
    assert source.join is not None
    ours, theirs = source.join.places
    choice = Choice(source)
    cells: frozenset[str] = frozenset()

    def keyed() -> Iterator[tuple[str, str | None, Row]]:
        nonlocal cells
        for row in other:
            cells = cells if row.cells <= cells else cells | row.cells
            yield _key(row, theirs, str(file)), None, row

    with Kept() as kept:
        kept.fill(keyed())
        if twice := kept.repeated():
            key, lines = twice
            what = f"{theirs} {key[:60]!r} stands there {len(lines)} times (lines {', '.join(map(str, lines[:3]))})"
            raise InputError(
                Problem(what, file=str(file), line=lines[1], hint="`join` needs a place that names one row")
            )
        both: set[str] = set()
        for row in rows:
            try:
                rest = kept.one(text_at(find(row.value, ours), ours))
            except RowError as error:
                rest, why = None, error.message
            else:
                why = f"no row of {source.join.path} has this {theirs}"
            if rest is None and choice.refuses(row):
                yield row
                continue
            if rest is None:
                content = json.dumps(row.value, ensure_ascii=False, default=str)
                bad(BadRow(why, row.origin.source, row.origin.line, key=ours, content=content))
                continue
            same = {name for name in rest.keys() & row.value.keys() if rest[name] != row.value[name]}
            if same - both:
                both |= same
                told.note(
                    f"{source.join.path}: columns that both files have, taken from the first: {', '.join(sorted(both))}"
                )
            yield Row({**rest, **row.value}, row.origin, row.cells | (cells - row.value.keys()) if cells else row.cells)


def _key(row: Row, place: str, file: str) -> str:
    """The value by which a row of the other file is found. Raises :class:`InputError` when there is none."""
    value: Any = find(row.value, place)
    text = "" if isinstance(value, (dict, list)) else text_at(value, place)
    if not text:
        raise InputError(Problem("missing: rows are joined on it", file=file, line=row.origin.line, key=place))
    return text
