"""Reading rows of local files and hub data sets one at a time, each with its exact line.

The readers use csv, json and pyarrow, not ``datasets`` or pandas, because a line that cannot be read must be named:
those do not say which line of which file is wrong, and ``datasets`` accepts bytes that are not UTF-8. Memory is bounded
by a few rows, except for ``.json``, which is one value and read whole. Nothing here runs code that comes with data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from align.data.files.arrow_rows import read_arrow, read_parquet, table_rows
from align.data.files.hub import load_split
from align.data.files.json_rows import read_lines, read_value
from align.data.files.locations import ARROW, JSON_LINES, TEXT_TABLES, data_files
from align.data.files.streams import kind_of
from align.data.files.tables import read_table
from align.data.rows import Bad as Bad
from align.data.rows import BadRow as BadRow
from align.data.rows import Reading, Told
from align.data.rows import Row as Row
from align.data.sources.joined import joined
from align.errors import InputError, Problem
from align.recipe.checks.source_keys import idle
from align.recipe.reference_syntax import resolve_beside
from align.recipe.schema import DataSource

_READERS: dict[str, Callable[[Path, Reading], Iterator[Row]]] = {
    **dict.fromkeys(JSON_LINES, read_lines),
    **dict.fromkeys(TEXT_TABLES, read_table),
    **dict.fromkeys(ARROW, read_arrow),
    ".json": read_value,
    ".parquet": read_parquet,
}


def read_rows(source: DataSource, location: Path | str, bad: Bad, told: Told | None = None) -> Iterator[Row]:
    """Rows of a file, of a folder's files in the order of their names, or (``location`` a string) of a hub data set.

    A row that cannot be read goes to ``bad``, and reading continues with the next. Blank lines count as lines, not as
    rows. In an artefact's folder only ``data.jsonl`` is read. What was recognised about the files is noted in ``told``,
    or logged.

    Raises :class:`InputError` when there is nothing to read: no such file, unknown suffix, a broken ``.json`` or
    Parquet file, a CSV header that names a column twice, a key without effect for this kind of source, a choice that
    the recipe must make, or no row at all; :class:`EnvironmentFault` when the disk or the hub does not answer.
    """
    found = 0

    def count(row: BadRow) -> None:
        nonlocal found
        found += 1
        bad(row)

    reading = Reading(source, count, told or Told(log=True))
    if isinstance(location, str):
        useless = idle(source, location)
        if useless:
            raise InputError([Problem(what, file=location, key=key) for key, what in useless.items()])
        rows = table_rows(load_split(location, source), location, 1, reading)
    else:
        files = data_files(location, source, reading.told)
        rows = (row for path in files for row in _READERS[kind_of(path)](path, reading))
    for row in rows if source.join is None else _joined(rows, reading):
        found += 1
        yield row
    if not found:
        raise InputError(Problem("0 rows", file=str(location)))


def _joined(rows: Iterator[Row], reading: Reading) -> Iterator[Row]:
    """Rows with the columns of another file. A bad row in that file is an error, since it is not known which row it
    belongs to."""
    join = reading.source.join
    assert join is not None
    file = resolve_beside(join.path)
    faults: list[Problem] = []
    others = (
        row
        for path in data_files(file, DataSource(path=join.path), reading.told)
        for row in _of_other(path, faults, reading)
    )

    def all_good() -> Iterator[Row]:
        yield from others
        if faults:
            raise InputError(faults[:10])

    yield from joined(rows, all_good(), reading.source, file, reading.bad, reading.told)


def _of_other(path: Path, faults: list[Problem], reading: Reading) -> Iterator[Row]:
    return _READERS[kind_of(path)](path, Reading(DataSource(path=str(path)), faults.append, reading.told))
