"""Any bytes in a file of any readable kind: rows, or problems in words that name the file."""

from __future__ import annotations

import gzip
import io
import json
import tempfile
from functools import cache
from pathlib import Path

import pyarrow
import pyarrow.parquet
from hypothesis import strategies as st

from align.data.readers import BadRow, Row, read_rows
from align.errors import EnvironmentFault, InputError
from align.recipe.schema import DataSource
from tests.fuzz.fuzzing import fuzz

ROWS = [{"id": f"r{i}", "prompt": f"q{i} é", "completion": 'a, "b"\n' * i, "n": i, "ok": i % 2 == 0} for i in range(6)]
TURNS = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": f"a{i}"}]} for i in range(4)]
KINDS = [
    *(".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather", ".txt", ".jsonl.gz", ".json.gz", ".csv.gz"),
    *(".jsonl.zst", ".jsonl.bz2", ".jsonl.xz", ".parquet.gz", ".gz", ".zst", ""),
]


@cache
def sound(kind: str) -> bytes:
    """A file of the kind as it should be, or something like it."""
    if kind.startswith((".parquet", ".arrow", ".feather")):
        out = io.BytesIO()
        table = pyarrow.Table.from_pylist([*ROWS, *TURNS])
        if kind.startswith(".parquet"):
            pyarrow.parquet.write_table(table, out, compression="zstd")
        else:
            with pyarrow.ipc.new_file(out, table.schema) as writer:
                writer.write_table(table)
        plain = out.getvalue()
    elif kind.startswith(".json") and not kind.startswith(".jsonl"):
        plain = json.dumps([*ROWS, *TURNS]).encode()
    elif kind.startswith((".csv", ".tsv")):
        between = "\t" if kind.startswith(".tsv") else ","
        lines = [
            between.join('"' + str(cell).replace('"', '""') + '"' for cell in row) for row in (ROWS[0], *(row.values() for row in ROWS))
        ]
        plain = "\r\n".join(lines).encode()
    else:
        plain = b"".join(json.dumps(row).encode() + b"\n" for row in [*ROWS, *TURNS])
    packed = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}.get("." + kind.rpartition(".")[2])
    if packed == "gzip":
        return gzip.compress(plain, mtime=0)
    if packed is not None:
        out = io.BytesIO()
        with pyarrow.CompressedOutputStream(out, packed) as stream:
            stream.write(plain)
            stream.flush()
            stream.close()
        return out.getvalue() if not out.closed else b""
    return plain


BITS = [
    *(
        b"",
        b"\0",
        b"\n",
        b"\r",
        b"\r\n",
        b'"',
        b",",
        b";",
        b"\t",
        b"\\",
        b"{",
        b"}",
        b"[",
        b"]",
        b"\xff",
        b"\xff\xfe",
        b"\xfe\xff",
        b"\xef\xbb\xbf",
    ),
    *(b"\xc3", b"\xed\xa0\x80", b"\\ud800", b"NaN", b"1e400", b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b"PAR1", b"\x1f\x8b", b"ARROW1"),
    *(b"\xe9", b"null", b'{"id": 1, "id": 2}', "é".encode("utf-16"), "é,b\nc,d".encode("latin-1")),
]


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, bytes]:
    """(suffix, content): a sound file after some changes, a file of another kind, or any bytes at all."""
    kind = draw(st.sampled_from(KINDS))
    if draw(st.integers(0, 9)) == 0:
        return kind, draw(st.binary(max_size=200))
    data = sound(draw(st.sampled_from([kind, kind, kind, draw(st.sampled_from(KINDS))])))
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.sampled_from([0, 0, 1, 1, 4, 50, 10_000])))
        middle = draw(st.sampled_from([*BITS, data[start:end] * 2]) | st.binary(max_size=8))
        data = data[:start] + middle + data[end:]
    return kind, data


def check(case: tuple[str, bytes]) -> None:
    """Read to its end."""
    kind, data = case
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows{kind}"
        path.write_bytes(data)
        bad: list[BadRow] = []
        try:
            for row in read_rows(DataSource(path=str(path)), path, bad.append):
                assert isinstance(row, Row) and isinstance(row.value, dict) and row.origin.line >= 1
                json.dumps(row.value, default=str)
        except (InputError, EnvironmentFault) as error:
            problems = error.problems if isinstance(error, InputError) else ()
            assert str(error) and all(problem.message.strip() for problem in problems)
        for row_fault in bad:
            assert row_fault.file and row_fault.line and row_fault.message.strip() and "\n" not in row_fault.message


def test_any_bytes() -> None:
    fuzz(check, cases(), examples=300)
