"""Rows of Parquet and Arrow files. A row's line is its number, from 1."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from align.data.records import Origin
from align.data.rows import BadRow, Reading, Row
from align.data.strict_json import Fault, clip, unreadable
from align.errors import InputError, Problem
from align.files import machine_faults

PARQUET_ROWS = 256
"""Number of rows that are decoded at a time."""
_INDEX = "__index_level_"
"""Beginning of the names of columns in which pandas stores row labels."""


def read_parquet(path: Path, reading: Reading) -> Iterator[Row]:
    """The rows of a Parquet file."""
    import pyarrow.parquet

    with _readable(path, "Parquet") as progress, pyarrow.parquet.ParquetFile(path) as file:
        yield from _batches(file.schema_arrow, file.iter_batches(batch_size=PARQUET_ROWS), path, reading, progress)


def read_arrow(path: Path, reading: Reading) -> Iterator[Row]:
    """The rows of a file in Arrow's own format, as a stream (what ``datasets`` writes) or as a file (Feather)."""
    import pyarrow.ipc

    with _readable(path, "Arrow") as progress, pyarrow.memory_map(str(path)) as file:
        if file.read(6) == b"ARROW1":
            table = pyarrow.ipc.open_file(file)
            batches = (table.get_batch(i) for i in range(table.num_record_batches))
        else:
            file.seek(0)
            table = batches = pyarrow.ipc.open_stream(file)
        yield from _batches(table.schema, _small(batches), path, reading, progress)


@contextmanager
def _readable(path: Path, name: str) -> Iterator[list[int]]:
    """Turns errors of the library into InputError. The caller counts the rows read in the yielded list, for the message
    about the place of the damage."""
    import pyarrow

    progress = [0]
    try:
        with machine_faults(path):
            yield progress
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        what = clip((str(error).splitlines() or [type(error).__name__])[0], 80)
        raise InputError(Problem(f"not readable as {name} after row {progress[0]}: {what}", file=str(path))) from error


def _small(batches: Iterable[Any]) -> Iterator[Any]:
    for batch in batches:
        _require_sound(batch)
        for first in range(0, batch.num_rows, PARQUET_ROWS):
            yield batch.slice(first, PARQUET_ROWS)


def _require_sound(batch: Any) -> None:
    """Validate a batch. Arrow does not check offsets by itself: damaged ones would read other memory, or crash. Raises
    ArrowInvalid for them.

    Texts are validated as bytes: one that is not UTF-8 only makes its own row a bad one.
    """
    import pyarrow

    for column in batch.columns:
        try:
            plain = column.view(_as_bytes(column.type))
        # A type that has no view as bytes, such as dictionaries
        except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError):
            plain = column
        plain.validate(full=True)


def _as_bytes(kind: Any) -> Any:
    """The type with texts replaced by bytes, at any depth."""
    import pyarrow

    if pyarrow.types.is_string(kind):
        return pyarrow.binary()
    if pyarrow.types.is_large_string(kind):
        return pyarrow.large_binary()
    if pyarrow.types.is_struct(kind):
        return pyarrow.struct([field.with_type(_as_bytes(field.type)) for field in kind])
    if pyarrow.types.is_list(kind):
        return pyarrow.list_(kind.value_field.with_type(_as_bytes(kind.value_type)))
    if pyarrow.types.is_large_list(kind):
        return pyarrow.large_list(kind.value_field.with_type(_as_bytes(kind.value_type)))
    return kind


def _batches(schema: Any, batches: Iterable[Any], path: Path, reading: Reading, progress: list[int]) -> Iterator[Row]:
    names = schema.names
    if len(set(names)) != len(names):
        raise InputError(Problem("two columns have the same name", file=str(path)))
    kept = [name for name in names if not name.startswith(_INDEX)]
    if kept != names:
        reading.told.note(f"{path}: row labels that pandas stored: left out")
    has_floats = any("float" in str(field.type) or "double" in str(field.type) for field in schema)
    for batch in batches:
        rows = _decoded(batch.select(kept) if kept != names else batch)
        yield from table_rows(rows, str(path), progress[0] + 1, reading, has_floats=has_floats)
        progress[0] += batch.num_rows


def _decoded(batch: Any) -> list[dict[str, Any] | Fault]:
    """The rows of an Arrow batch; a :class:`Fault` for a row with bytes that are not UTF-8."""
    try:
        rows: list[dict[str, Any] | Fault] = batch.to_pylist()
        return rows
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            offset = error.start
            return [Fault(f"not UTF-8 (byte 0x{error.object[error.start]:02x} at offset {offset})")]
        return [row for i in range(batch.num_rows) for row in _decoded(batch.slice(i, 1))]


def table_rows(
    rows: Iterable[dict[str, Any] | Fault], source: str, first: int, reading: Reading, *, has_floats: bool = True
) -> Iterator[Row]:
    """Rows with their numbers, from ``first``; rows with characters that a text cannot have are bad rows."""
    for number, value in enumerate(rows, first):
        fault = value if isinstance(value, Fault) else unreadable(value)
        if not fault and isinstance(value, dict) and has_floats:
            fault, value = _finite(value)
        if fault:
            content = "" if isinstance(value, Fault) else clip(repr(value), 800)
            reading.bad(BadRow(fault.what, source, number, key=fault.field, content=content))
        elif isinstance(value, dict):
            yield Row(value, Origin(source, number))


def _finite(value: dict[str, Any]) -> tuple[Fault | None, dict[str, Any]]:
    """The row with None for NaN, which is how pandas writes an empty cell; an infinity is a fault."""
    infinite: list[str] = []

    def clean(item: Any, place: str) -> Any:
        if isinstance(item, float) and not math.isfinite(item):
            if not math.isnan(item):
                infinite.append(place)
            return None
        if isinstance(item, dict):
            return {key: clean(part, f"{place}.{key}".lstrip(".")) for key, part in item.items()}
        if isinstance(item, list):
            return [clean(part, f"{place}.{i}") for i, part in enumerate(item)]
        return item

    cleaned = clean(value, "")
    return (Fault("an infinite number", infinite[0] or None) if infinite else None), cleaned
