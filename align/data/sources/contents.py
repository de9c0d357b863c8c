"""Recognising from the first rows of a source which type of record they are."""

from __future__ import annotations

from pathlib import Path

from align.data.formats.absent import seen_enough
from align.data.formats.formats import RowError, Want, converter
from align.data.rows import LeftOut, Row
from align.data.sources.conditions import Choice
from align.data.sources.mixture import looked_at
from align.data.sources.readers import read_rows
from align.errors import InputError, Problem
from align.recipe.schema import DataSource


def wanted_of(source: DataSource, location: Path | str) -> Want:
    """The first type of record that can be made of the first rows, among those that the source's mapping is meant for.
    Raises :class:`InputError` when there is none."""
    bad: list[Problem] = []
    choice = Choice(source)
    rows: list[Row] = []
    for read, row in enumerate(read_rows(source, location, bad.append), 1):
        rows += looked_at(choice, row)
        if seen_enough(source, rows, read):
            break
    reasons: list[Problem] = []
    wants: tuple[Want, ...] = ("preference", "unpaired", "graded", "conversation", "prompt")
    for want in wants if rows else ():
        try:
            convert = converter(source, want)
            if convert.undecided:
                convert.decide(rows)
        except InputError as error:
            reasons += error.problems
            continue
        if convert.grouped:
            return want
        if convert.from_labels or not convert.means(want):
            continue
        sound = False
        for row in rows:
            try:
                if convert(row):
                    return want
            except LeftOut:
                sound = True  # such as a tie: the row is of this type although it gives no record
            except RowError as error:
                reasons.append(Problem(error.message, row.origin.source, row.origin.line, key=error.field))
        if sound:
            return want
    # For each row the reason of the least demanding type
    last = {(reason.file, reason.line): reason for reason in reasons}
    raise InputError([*bad, *(last.values() or [Problem("no row is left to look at", file=str(location))])][:10])
