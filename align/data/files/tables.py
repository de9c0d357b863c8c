"""Reading rows of text tables: CSV, TSV, and the text files of spreadsheets. Every cell is a string; the line of a row
is its first."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from align.data.files.streams import LINE_LIMIT, line_fault, not_utf8, numbered, utf8
from align.data.files.text_layout import spelling_of
from align.data.records import Origin
from align.data.rows import BadRow, Reading, Row
from align.data.strict_json import Fault, clip
from align.errors import InputError, Problem


def read_table(path: Path, reading: Reading) -> Iterator[Row]:
    """The rows below a header.

    Raises :class:`InputError` for a header that names a column twice or has one without a name (row numbers that pandas
    writes, and empty columns at the end, are ignored and reported), and when encoding or separator cannot be
    recognised.
    """
    # The csv module's limit of 131,072 characters is global, so it is only ever raised
    csv.field_size_limit(max(csv.field_size_limit(), LINE_LIMIT))
    spelling = spelling_of(path, reading)
    faults: list[Fault] = []
    with utf8(path, spelling.encoding, mac=spelling.mac) as file:
        table = csv.reader(_decoded(file, faults, spelling.skip), delimiter=spelling.separator, strict=True)
        header: _Header | None = None
        while True:
            number = table.line_num + 1 + spelling.skip
            cells = _next_cells(table, faults)
            if cells is None:
                return
            if header is None:
                if cells or faults:
                    header = _Header(path, number, cells, faults, reading, spelling.separator)
            elif cells or faults:
                row = header.row(cells, faults)
                if isinstance(row, Fault):
                    content = clip(spelling.separator.join(cells), 800)
                    reading.bad(BadRow(row.what, str(path), number, hint=row.hint, content=content))
                else:
                    yield Row(row, Origin(str(path), number), header.columns)


def _decoded(file: BinaryIO, faults: list[Fault], skip: int) -> Iterator[str]:
    for number, line in numbered(file):
        if number <= skip:
            continue
        if fault := line_fault(line):
            faults.append(fault)
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            faults.append(not_utf8(line, error))
            yield line.decode("utf-8", "replace")


def _next_cells(table: Any, faults: list[Fault]) -> list[str] | None:
    """The cells of the next row (empty for a blank line), None at the end of the file. Faults of the row are added to
    ``faults``."""
    faults.clear()
    try:
        cells: list[str] = next(table)
        return cells
    except StopIteration:
        return None
    except csv.Error as error:
        faults.append(Fault(f"invalid CSV: {error}"))
        return []


class _Header:
    """The columns of a table."""

    def __init__(
        self, path: Path, number: int, cells: list[str], faults: list[Fault], reading: Reading, separator: str
    ) -> None:
        self._separator = separator
        names = list(cells)
        while names and not names[-1].strip():  # `a,b,`: spreadsheets keep columns whose cells were deleted
            names.pop()
        self._index = bool(names) and not names[0].strip() and "," not in names
        self._names = names[1:] if self._index else names
        self.columns = frozenset(self._names)
        what = faults[0].what if faults else None
        if not what and not names:
            what = "the header has no names"
        if not what and len(set(self._names)) != len(self._names):
            what = "the header names a column twice"
        if not what and not all(name.strip() for name in self._names):
            what = "the header has a column without a name"
        if what:
            raise InputError(Problem(what, file=str(path), line=number))
        self._cells = len(cells)
        if self._index:
            reading.told.note(f"{path}: its first column has no name and holds row numbers: left out")
        if len(names) != len(cells):
            reading.told.note(f"{path}: empty columns without a name at the end: left out")

    def row(self, cells: list[str], faults: list[Fault]) -> dict[str, str] | Fault:
        """The named cells of a row, or what is wrong with it."""
        if faults:
            return faults[0]
        used = len(self._names) + self._index
        if len(cells) < used:
            missing = used - len(cells)
            hint = f"if its last ones are empty, end it with {missing} more `{self._separator}`".replace("\t", "\\t")
            return Fault(f"{len(cells)} cells, the header has {used}", hint=hint)
        if any(cells[used:]):
            return Fault(f"{len(cells)} cells, the header has {used}")
        if self._index and not cells[0].strip().lstrip("-").isdigit():
            return Fault(
                "the first column has no name and holds more than row numbers", hint="give it a name in the header"
            )
        return dict(zip(self._names, cells[self._index : used], strict=True))
