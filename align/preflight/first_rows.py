"""Reading the first rows of every source of a stage, and making records of them, to find mistakes before the run.
Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from align.errors import InputError, Problem
from align.planning.data_size import LARGEST_JSON, ROWS
from align.planning.planner import planner_of
from align.preflight.first_tokens import Fits, fitting
from align.recipe.schema import DataSource, Stage

if TYPE_CHECKING:
    from align.data.chat.encoder import Encoder
    from align.data.formats.formats import Want
    from align.data.records import Record
    from align.data.rows import Row
    from align.data.strict_json import RowError

_SEEN = 5_000
"""At most this many rows are read to find the first ones that `where` keeps."""
_SHOWN = 3
"""Number of bad rows of a source that are listed."""


def trained_on(stages: Mapping[str, Stage], reference: str) -> list[tuple[DataSource, Want]]:
    """The sources that a model was trained on by ``stages``, each with its use; empty for a model that none of them
    makes."""
    sources: list[tuple[DataSource, Want]] = []
    seen: set[str] = set()
    while reference.startswith("stage:") and reference not in seen:
        seen.add(reference)
        spec = stages[reference.removeprefix("stage:").strip()]
        sources += [(source, want) for key, source, want in spec.sources() if not key.startswith("eval_")]
        reference = spec.starting_model or ""
    return sources


def looks_at(
    spec: Stage, encoder: Encoder | None = None
) -> Iterator[tuple[str, DataSource, Callable[[Path], list[Problem]]]]:
    """(key, source, check) for each source of a stage; the check gets the source's path and returns what is wrong with
    its first rows.

    With the ``encoder`` of the stage's model the check also encodes the rows.
    """
    for key, source, want in spec.sources():
        fits = None if encoder is None else fitting(spec, key, encoder)
        yield key, source, partial(faults, source, want=want, fits=fits)
    yield from planner_of(spec).looks_at(spec)


def faults(source: DataSource, location: Path, want: Want, fits: Fits | None = None) -> list[Problem]:
    """What is wrong with the first rows of ``source``: at most three bad rows, or that no row can be used.

    ``fits`` checks whether the stage's model can take a record; None when that cannot be checked.

    Raises InputError for a file that cannot be read at all, or whose format is not known; EnvironmentFault as the
    readers do.
    """
    from align.data.formats.absent import seen_enough
    from align.data.formats.detect import LOOK_AT
    from align.data.formats.formats import Group, converter
    from align.data.rows import LeftOut, Told
    from align.data.sources.conditions import Choice
    from align.data.sources.readers import read_rows
    from align.data.strict_json import RowError

    if location.suffix == ".json" and location.is_file() and location.stat().st_size > LARGEST_JSON:
        return []
    bad: list[Problem] = []
    convert, choice = converter(source, want), Choice(source)
    kept, useless = 0, Counter[str]()
    first: list[Row] = []
    enough = min(ROWS, source.limit or ROWS)

    def refused(row: Row, error: RowError) -> None:
        if not isinstance(error, LeftOut):
            bad.append(Problem(error.message, row.origin.source, row.origin.line, key=error.field))

    for read, row in enumerate(islice(read_rows(source, location, bad.append, Told()), _SEEN), 1):
        try:
            first += [choice.stripped(part.row) for part in choice.parts(row) if choice.wanted(part)]
        except RowError as error:
            refused(row, error)
        if len(bad) >= ROWS or (len(first) >= enough and (enough < LOOK_AT or seen_enough(source, first, read))):
            break
    if first and convert.undecided:
        convert.decide(first)
    first = first[:enough]
    looked = len(first)
    for unit in convert.units(iter(first), lambda rows, place: _placed(rows, place, refused)):
        try:
            for record in convert(unit):
                kept += _fits(record, fits, useless, bad)
        except RowError as error:
            refused(unit.rows[0] if isinstance(unit, Group) else unit, error)
        for row, reason in convert.aside:
            refused(row, reason)
        convert.aside = []
    if useless and not kept and not bad and looked < enough:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in useless.items())
        return [Problem(f"none of its rows can be used: {reasons}", file=str(location))]
    if not bad or (source.on_bad_row == "skip" and kept):
        return []
    shown = [Problem(row.message, row.file, row.line, row.col, row.key, row.hint) for row in bad[:_SHOWN]]
    more = (
        [Problem(f"{len(bad)} of the first {max(looked, len(bad))} rows are bad", file=str(location))]
        if len(bad) > _SHOWN
        else []
    )
    return [*shown, *more]


def _fits(record: Record, fits: Fits | None, useless: Counter[str], bad: list[Problem]) -> bool:
    """Whether the record can be used. If not, the reason is counted in ``useless``, or a mistake of the row is added to
    ``bad``."""
    from align.data.trees.build import Unusable

    try:
        if fits is not None:
            fits(record)
    except Unusable as reason:
        useless[str(reason)] += 1
    except InputError as error:  # raised by the chat template
        bad.append(record.origin.blamed(error.problems[0]))
    else:
        return True
    return False


def _placed(
    rows: Iterator[Row], place: Callable[[Row], object], refused: Callable[[Row, RowError], None]
) -> Iterator[Row]:
    """The rows whose ``place`` can be determined; the others are passed to ``refused``."""
    from align.data.strict_json import RowError

    for row in rows:
        try:
            place(row)
        except RowError as error:
            refused(row, error)
        else:
            yield row
