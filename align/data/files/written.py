"""Files of rows, written block by block: lines of JSON, and Parquet for rows in this package's own shape."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

Row = dict[str, Any]
_AS_TEXT = ("fields", "grades")
"""Columns with objects whose keys differ from row to row; they are written as JSON text, since a table has no type for
them."""


class Sink(Protocol):
    """A file of rows that is being written."""

    def write(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Append rows; returns them as they will be read back."""


@contextmanager
def opened(path: Path, suffix: str) -> Iterator[Sink]:
    """A new file at ``path`` in the format of ``suffix``, which is complete when the block ends."""
    if suffix == ".parquet":
        with _parquet(path) as sink:
            yield sink
    else:
        with path.open("x", encoding="utf-8", newline="\n") as handle:
            yield _Lines(handle)


class _Lines:
    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def write(self, rows: Sequence[Row]) -> Sequence[Row]:
        self._handle.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        return rows


@contextmanager
def _parquet(path: Path) -> Iterator[Sink]:
    sink = _Parquet(path)
    try:
        yield sink
    finally:
        sink.close()


class _Parquet:
    """Writes Parquet with the columns of the first row's type of record."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: Any = None

    def write(self, rows: Sequence[Row]) -> Sequence[Row]:
        import pyarrow
        import pyarrow.parquet

        texts = [
            {**row, **{key: json.dumps(row[key], ensure_ascii=False) for key in _AS_TEXT if key in row}} for row in rows
        ]
        if self._writer is None:
            self._writer = pyarrow.parquet.ParquetWriter(self._path, _schema(texts[0]))
        table = pyarrow.Table.from_pylist(texts, schema=self._writer.schema)
        self._writer.write_table(table)
        found: Sequence[Row] = table.to_pylist()
        return found

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            self._writer.close()


def _schema(row: Row) -> Any:
    """The Parquet columns for rows like this one, keys that only some rows have included. Where a row lacks a key, a
    null is written; the reader takes nulls out again."""
    import pyarrow as pa

    text = pa.string()
    flag = pa.bool_()
    number = pa.float64()
    function = pa.struct({"name": text, "arguments": text})
    call = pa.struct(
        {"id": text, "type": text, "function": function, "custom": pa.struct({"name": text, "input": text})}
    )
    message = {
        "role": text,
        "content": text,
        "reasoning": text,
        "train": flag,
        "finished": flag,
        "tool_calls": pa.list_(call),
    }
    message |= {"name": text, "tool_call_id": text, "metadata": text}
    messages = pa.list_(pa.struct({**message, "sampled": pa.struct({"encoder": text, "ids": pa.list_(pa.int64())})}))
    columns = {
        "id": text,
        "messages": messages,
        "prompt": messages,
        "completion": messages,
        "label": flag,
        "chosen": messages,
        "rejected": pa.list_(messages),
        "margin": pa.list_(number),
        "votes": pa.list_(pa.struct({"chosen": number, "rejected": number})),
        "grades": text,
    }
    kept = {
        name: kind
        for name, kind in columns.items()
        if name in row or (name in ("margin", "votes") and "rejected" in row)
    }
    return pa.schema({**kept, "tools": text, "fields": text, "origin": pa.struct({"source": text, "line": pa.int64()})})
