"""Rows of local files and hub data sets, one at a time, each with the exact line it stands on.

A reader of our own, because a line that cannot be read must be named: neither ``datasets`` nor pandas says which line of which file is
wrong, and ``datasets`` accepts bytes that are not UTF-8. Memory is bounded by a few rows, except for ``.json``, which is one value and
read whole. Nothing here runs code that comes with data.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from align.data.hub import load_split
from align.data.records import Origin
from align.data.strict_json import Fault, RowDecoder, clip, skip_space, unreadable
from align.errors import InputError, Problem
from align.files import machine_faults
from align.recipe.schema import DataSource

LINE_LIMIT = 16 * 2**20
"""Bytes of one line. Longer ones are reported, never held in memory."""
JSON_LIMIT = 2**30
"""Bytes of one ``.json`` file."""
PARQUET_ROWS = 256
"""Rows of a Parquet file that are decoded at a time."""

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Row:
    """One row as it stands in the data."""

    value: dict[str, Any]
    origin: Origin


@dataclass(frozen=True)
class BadRow(Problem):
    """A row that cannot be used. ``file`` and ``line`` are always set; ``key`` is the field, if one is to blame."""

    content: str = ""
    """The row's beginning, for the rejects file; no message shows it."""


Bad = Callable[[BadRow], None]


def read_rows(source: DataSource, location: Path | str, bad: Bad) -> Iterator[Row]:
    """Rows of a file, of a folder's files in the order of their names, or (``location`` a string) of a hub data set.

    A row that cannot be read goes to ``bad``, and reading continues with the next. Blank lines count as lines, not as rows. In an
    artefact's folder only ``data.jsonl`` is read.

    Raises :class:`InputError` when there is nothing to read: no such file, unknown suffix, a broken ``.json`` or Parquet file, a CSV
    header that names a column twice, or not one row; :class:`EnvironmentFault` when the disk or the hub does not answer.
    """
    found = 0

    def count(row: BadRow) -> None:
        nonlocal found
        found += 1
        bad(row)

    if isinstance(location, str):
        rows = _table_rows(load_split(location, source), location, 1, count)
    else:
        rows = (row for path in data_files(location) for row in _READERS[path.suffix.lower()](path, count))
    for row in rows:
        found += 1
        yield row
    if not found:
        raise InputError(Problem("0 rows", file=str(location)))


def data_files(location: Path) -> list[Path]:
    """The files that ``location`` stands for: itself, or what a folder holds, sorted by name.

    Raises :class:`InputError` when it does not exist or holds nothing that can be read.
    """
    supported = ", ".join(_READERS)
    if location.is_dir():
        if (location / "manifest.json").is_file() and (location / "data.jsonl").is_file():
            return [location / "data.jsonl"]
        files = [path for path in location.iterdir() if path.suffix.lower() in _READERS and not path.name.startswith(".")]
        if not files:
            raise InputError(Problem("no data file in this folder", file=str(location), hint=f"readable are {supported}"))
        return sorted(files)
    if not location.exists():
        raise InputError(Problem("no such file or folder", file=str(location)))
    if not location.is_file():
        raise InputError(Problem("not a regular file", file=str(location)))
    if location.suffix.lower() == ".py":
        hint = "data sets that are programs are not run; for a format of your own set `format: package.module:function`"
        raise InputError(Problem("a Python file is not data", file=str(location), hint=hint))
    if location.suffix.lower() not in _READERS:
        what = f"unknown suffix {location.suffix}" if location.suffix else "no suffix"
        raise InputError(Problem(f"{what}; readable are {supported}", file=str(location)))
    return [location]


# Lines


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    r"""``(number, line)`` split on ``\n`` only; of a line over the limit its first ``LINE_LIMIT + 1`` bytes, which do not end in ``\n``."""
    number = 0
    while line := file.readline(LINE_LIMIT + 1):
        number += 1
        if _too_long(line):
            while (rest := file.readline(LINE_LIMIT)) and not rest.endswith(b"\n"):
                pass
        yield number, line.removeprefix(_BOM) if number == 1 else line


def _too_long(line: bytes) -> bool:
    return len(line) > LINE_LIMIT and not line.endswith(b"\n")


def _line_fault(line: bytes) -> Fault | None:
    if _too_long(line):
        return Fault(f"line is longer than {LINE_LIMIT >> 20} MiB")
    if (nul := line.find(b"\0")) >= 0:
        return Fault(f"NUL byte at offset {nul}", hint="is the file UTF-16, or was it cut short by a crash?")
    return None


def _not_utf8(data: bytes, error: UnicodeDecodeError) -> Fault:
    """The offset counts bytes from the start of the line, from 0."""
    offset = error.start - (data.rfind(b"\n", 0, error.start) + 1)
    return Fault(f"not UTF-8 (byte 0x{data[error.start]:02x} at offset {offset})", hint="save the file as UTF-8")


# JSON


def _read_jsonl(path: Path, bad: Bad) -> Iterator[Row]:
    decoder = RowDecoder()
    with machine_faults(path), path.open("rb") as file:
        for number, line in _lines(file):
            if not line.strip():
                continue
            parsed = _line_fault(line) or _parse_line(decoder, line)
            if isinstance(parsed, Fault):
                content = line[:800].decode("utf-8", "backslashreplace").strip()
                bad(BadRow(parsed.what, str(path), number, key=parsed.field, hint=parsed.hint, content=content))
            else:
                yield Row(parsed, Origin(str(path), number))


def _parse_line(decoder: RowDecoder, line: bytes) -> dict[str, Any] | Fault:
    """Columns count from 1."""
    try:
        text = line.decode("utf-8").rstrip(" \t\r\n")
        value, end, fault = decoder.decode(text, skip_space(text, 0))
    except UnicodeDecodeError as error:
        return _not_utf8(line, error)
    except json.JSONDecodeError as error:
        return Fault(f"invalid JSON (col {error.colno})", hint=error.msg)
    except ValueError as error:
        return Fault(f"invalid JSON: {error}")
    if (end := skip_space(text, end)) != len(text):
        return Fault(f"invalid JSON (col {end + 1})", hint="one object a line, and nothing after it")
    return fault or value


def _read_json(path: Path, bad: Bad) -> Iterator[Row]:
    """An array of objects. It has no row boundaries to go on from, so a syntax error ends it."""

    def broken(at: int, what: str, hint: str | None = None) -> InputError:
        what = what.format(col=at - text.rfind("\n", 0, at))
        return InputError(Problem(what, file=str(path), line=text.count("\n", 0, at) + 1, hint=hint))

    def following(at: int) -> tuple[str, int]:
        at = skip_space(text, at)
        return text[at : at + 1], at

    text = _whole(path)
    character, at = following(0)
    if not character:
        return
    if character != "[":
        raise broken(at, "a .json file must be an array of objects", "if it has one object a line, name it .jsonl")
    decoder, line, counted = RowDecoder(), 1, 0
    character, at = following(at + 1)
    while character != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end, fault = decoder.decode(text, at)
        except json.JSONDecodeError as error:
            raise broken(error.pos, "invalid JSON (col {col})", error.msg) from error
        except ValueError as error:
            raise broken(at, f"invalid JSON: {error}") from error
        if fault:
            bad(BadRow(fault.what, str(path), line, key=fault.field, content=text[at : min(end, at + 800)]))
        else:
            yield Row(value, Origin(str(path), line))
        character, at = following(end)
        comma = character == ","
        if comma:
            character, at = following(at + 1)
        if comma == (character == "]"):
            raise broken(at, "invalid JSON (col {col})", "expected a comma and an object, or the closing bracket")
    character, at = following(at + 1)
    if character:
        raise broken(at, "invalid JSON (col {col})", "there is more after the closing bracket")


def _whole(path: Path) -> str:
    with machine_faults(path):
        if path.stat().st_size > JSON_LIMIT:
            raise InputError(Problem(f"larger than {JSON_LIMIT >> 20} MiB", file=str(path), hint="store many rows as .jsonl"))
        data = path.read_bytes().removeprefix(_BOM)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        fault = _not_utf8(data, error)
        raise InputError(Problem(fault.what, str(path), data.count(b"\n", 0, error.start) + 1, hint=fault.hint)) from error


# Tables


def _read_csv(path: Path, bad: Bad) -> Iterator[Row]:
    """Comma-separated with a header. Every cell is a string; a row's line is where it begins."""
    csv.field_size_limit(max(csv.field_size_limit(), LINE_LIMIT))  # csv's own limit of 131,072 characters is a global; only ever raised
    faults: list[Fault] = []

    def decoded(file: BinaryIO) -> Iterator[str]:
        for _, line in _lines(file):
            if fault := _line_fault(line):
                faults.append(fault)
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                faults.append(_not_utf8(line, error))
                yield line.decode("utf-8", "replace")

    with machine_faults(path), path.open("rb") as file:
        table = csv.reader(decoded(file), strict=True)
        header: list[str] = []
        while True:
            number = table.line_num + 1
            cells = _next_cells(table, faults)
            if cells is None:
                return
            if not header and (cells or faults):
                header = _checked_header(path, number, cells, faults)
            elif faults or (cells and len(cells) != len(header)):
                fault = faults[0] if faults else Fault(f"{len(cells)} cells, the header has {len(header)}")
                bad(BadRow(fault.what, str(path), number, hint=fault.hint, content=clip(",".join(cells), 800)))
            elif cells:
                yield Row(dict(zip(header, cells, strict=True)), Origin(str(path), number))


def _next_cells(table: Any, faults: list[Fault]) -> list[str] | None:
    """The next row's cells (none for a blank line), ``None`` at the end. What is wrong with it stands in ``faults``."""
    faults.clear()
    try:
        cells: list[str] = next(table)
        return cells
    except StopIteration:
        return None
    except csv.Error as error:
        faults.append(Fault(f"invalid CSV: {error}"))
        return []


def _checked_header(path: Path, number: int, cells: list[str], faults: list[Fault]) -> list[str]:
    what = faults[0].what if faults else None
    if not what and len(set(cells)) != len(cells):
        what = "the header names a column twice"
    if not what and not all(cell.strip() for cell in cells):
        what = "the header has a column without a name"
    if what:
        raise InputError(Problem(what, file=str(path), line=number))
    return cells


def _read_parquet(path: Path, bad: Bad) -> Iterator[Row]:
    """A row's line is its number, from 1."""
    import pyarrow
    import pyarrow.parquet

    number = 1
    try:
        with machine_faults(path), pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if len(set(names)) != len(names):
                raise InputError(Problem("two columns have the same name", file=str(path)))
            for batch in file.iter_batches(batch_size=PARQUET_ROWS):
                yield from _table_rows(_decoded(batch), str(path), number, bad)
                number += batch.num_rows
    except pyarrow.ArrowException as error:
        what = clip(str(error).splitlines()[0], 80)
        raise InputError(Problem(f"not readable as Parquet after row {number - 1}: {what}", file=str(path))) from error


def _decoded(batch: Any) -> list[dict[str, Any] | Fault]:
    """The rows of an Arrow batch; for a row with bytes that are not UTF-8, what is wrong."""
    try:
        rows: list[dict[str, Any] | Fault] = batch.to_pylist()
        return rows
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [_not_utf8(error.object, error)]
        return [row for i in range(batch.num_rows) for row in _decoded(batch.slice(i, 1))]


def _table_rows(rows: Iterable[dict[str, Any] | Fault], source: str, first: int, bad: Bad) -> Iterator[Row]:
    for number, value in enumerate(rows, first):
        fault = value if isinstance(value, Fault) else unreadable(value)
        if fault:
            content = "" if isinstance(value, Fault) else clip(repr(value), 800)
            bad(BadRow(fault.what, source, number, key=fault.field, content=content))
        elif isinstance(value, dict):
            yield Row(value, Origin(source, number))


_READERS: dict[str, Callable[[Path, Bad], Iterator[Row]]] = {
    ".csv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
