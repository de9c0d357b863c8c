"""Any bytes in a file of any readable kind: rows, or problems in words that name the file."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tempfile
import zipfile
from functools import cache
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import strategies as st

from align.data.sources.readers import BadRow, Row, read_rows
from align.errors import EnvironmentFault, InputError
from align.recipe.schema import DataSource
from tests.fuzz.fuzzing import fuzz

ROWS = [{"id": f"r{i}", "prompt": f"q{i} é", "completion": 'a, "b"\n' * i, "n": i, "ok": i % 2 == 0} for i in range(6)]
TURNS = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": f"a{i}"}]} for i in range(4)]
PLAIN = [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt"]
PACKED = [
    ".jsonl.gz",
    ".json.gz",
    ".csv.gz",
    ".jsonl.zst",
    ".tsv.zst",
    ".jsonl.bz2",
    ".txt.bz2",
    ".csv.xz",
    ".jsonl.xz",
    ".csv.zip",
]
TABLES = [".parquet", ".arrow", ".feather"]
UNKNOWN = [".parquet.gz", ".gz", ".zst", ""]


@cache
def sound(kind: str) -> bytes:
    """A file of the kind as it should be, before it is packed; rows of text for a suffix that says nothing."""
    first = "." + kind.split(".")[1] if kind else ""
    if first in TABLES:
        out = io.BytesIO()
        table = pyarrow.Table.from_pylist([*ROWS, *TURNS])
        if first == ".parquet":
            pyarrow.parquet.write_table(table, out, compression="none")
        else:
            with pyarrow.ipc.new_file(out, table.schema) as writer:
                writer.write_table(table)
        return out.getvalue()
    if first == ".json":
        return json.dumps([*ROWS, *TURNS]).encode()
    if first in (".csv", ".tsv", ".txt"):
        between = "\t" if first == ".tsv" else ";" if first == ".txt" else ","
        rows = [list(ROWS[0]), *(row.values() for row in ROWS)]
        return "\r\n".join(
            between.join('"' + str(cell).replace('"', '""') + '"' for cell in row) for row in rows
        ).encode()
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in [*ROWS, *TURNS])


def packed(kind: str, plain: bytes) -> bytes:
    """As the last suffix of a kind says."""
    match kind.rpartition(".")[2]:
        case "gz":
            return gzip.compress(plain, mtime=0)
        case "bz2":
            return bz2.compress(plain)
        case "xz":
            return lzma.compress(plain)
        case "zst":
            compressed: bytes = pyarrow.compress(plain, codec="zstd", asbytes=True)
            return compressed
        case "zip":
            out = io.BytesIO()
            with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr(zipfile.ZipInfo("rows" + kind.removesuffix(".zip")), plain)
            return out.getvalue()
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
    *(
        b"\xc3",
        b"\xed\xa0\x80",
        b"\\ud800",
        b"NaN",
        b"1e400",
        b"9" * 5000,
        b"[" * 3000,
        b'{"a":' * 3000,
        b"PAR1",
        b"\x1f\x8b",
        b"ARROW1",
    ),
    *(b"\xe9", b"null", b'{"id": 1, "id": 2}', "é".encode("utf-16"), "é,b\nc,d".encode("latin-1")),
]

LETTERS = [
    b"a",
    b"Z",
    b"7",
    b"0",
    b".",
    b"-",
    b" ",
    "\u00e9".encode(),
    "\U0001f600".encode(),
    b"\\n",
    b"e5",
    b"\x00",
    b"\x1f",
]


@st.composite
def changes(draw: st.DrawFn, data: bytes) -> bytes:
    """Some bytes after one to three changes: mostly of a letter or two, some of a piece."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        if draw(st.booleans()):
            data = data[:start] + draw(st.sampled_from(LETTERS)) + data[start + draw(st.integers(0, 1)) :]
            continue
        end = min(len(data), start + draw(st.sampled_from([0, 0, 1, 1, 4, 50, 10_000])))
        middle = draw(st.sampled_from([*BITS, data[start:end] * 2]) | st.binary(max_size=8))
        data = data[:start] + middle + data[end:]
    return data


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, bytes]:
    """(suffix, content): a sound file changed before or after it was packed, a file of another kind, or any bytes at
    all."""
    kind = draw(st.sampled_from([*PLAIN, *PLAIN, *PACKED, *TABLES, *TABLES, *UNKNOWN]))
    match draw(st.sampled_from(["before", "before", "before", "before", "before", "after", "after", "other", "any"])):
        case "before":
            return kind, packed(kind, draw(changes(sound(kind))))
        case "after":
            return kind, draw(changes(packed(kind, sound(kind))))
        case "other":
            other = draw(st.sampled_from([*PLAIN, *PACKED, *TABLES]))
            return kind, draw(changes(packed(other, sound(other))))
    return kind, draw(st.binary(max_size=200))


def check(case: tuple[str, bytes]) -> bool:
    """Read to its end. Was there a row?"""
    rows = 0
    kind, data = case
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows{kind}"
        path.write_bytes(data)
        bad: list[BadRow] = []
        try:
            for row in read_rows(DataSource(path=str(path)), path, bad.append):
                assert isinstance(row, Row) and isinstance(row.value, dict) and row.origin.line >= 1
                json.dumps(row.value, default=str)
                rows += 1
        except (InputError, EnvironmentFault) as error:
            problems = error.problems if isinstance(error, InputError) else ()
            assert str(error) and all(problem.message.strip() for problem in problems)
        for row_fault in bad:
            assert row_fault.file and row_fault.line and row_fault.message.strip() and "\n" not in row_fault.message
    return rows > 0


@pytest.mark.parametrize("kind", [*PLAIN, *PACKED, *TABLES])
def test_the_files_are_good_before_they_are_changed(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{kind}"
    path.write_bytes(packed(kind, sound(kind)))
    bad: list[BadRow] = []
    assert (
        len(list(read_rows(DataSource(path=str(path)), path, bad.append))) in (len(ROWS), len(ROWS) + len(TURNS))
        and not bad
    )


def test_any_bytes() -> None:
    fuzz(check, cases(), examples=300)
