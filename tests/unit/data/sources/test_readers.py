"""Every row with its exact line, and every line that cannot be read named."""

from __future__ import annotations

import json
import os
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from align.data.files import arrow_rows, json_rows, streams
from align.data.rows import Told
from align.data.sources.readers import BadRow, Row, read_rows
from align.errors import EnvironmentFault, InputError
from align.recipe.schema import DataSource

File = Callable[[str, bytes], Path]


@pytest.fixture
def file(tmp_path: Path) -> File:
    def write(name: str, content: bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


def read(location: Path | str, **source: Any) -> tuple[list[Row], list[BadRow]]:
    bad: list[BadRow] = []
    rows = list(read_rows(DataSource(path=str(location), **source), location, bad.append))
    return rows, bad


def placed(rows: list[Row]) -> list[tuple[int, Any]]:
    return [(row.origin.line, row.value) for row in rows]


def failure(location: Path | str) -> str:
    with pytest.raises(InputError) as caught:
        read(location)
    return str(caught.value)


# JSONL


def test_a_bad_line_in_the_middle_is_named_and_the_rest_is_read(file: File) -> None:
    """File, line and column; rows after it keep their line numbers."""
    lines = [json.dumps({"n": i}) for i in range(1, 31)]
    lines[20] = '{"n": 21, "text": "no end}'
    path = file("bad_mid.jsonl", "\n".join(lines).encode())
    rows, bad = read(path)
    assert [row.origin.line for row in rows] == [*range(1, 21), *range(22, 31)]
    assert all(row.value["n"] == row.origin.line for row in rows)
    assert str(bad[0]).startswith(f"{path}:21: invalid JSON (col 19)")
    assert len(bad) == 1


def test_messages_never_show_content_but_the_rejects_do(file: File) -> None:
    """No message echoes the row."""
    path = file("x.jsonl", b'{"secret": ' + b"z" * 5_000_000 + b"}\n" + b'{"a": 1}')
    rows, (bad,) = read(path)
    assert len(str(bad)) < len(str(path)) + 80
    assert "zzz" not in str(bad)
    assert bad.content.startswith('{"secret": zzz')
    assert len(bad.content) <= 800
    assert placed(rows) == [(2, {"a": 1})]


def test_bytes_that_are_not_utf8_are_named(file: File) -> None:
    """Latin-1 is an error with its byte and offset in the line."""
    path = file("latin.jsonl", b'{"a": "ok"}\n{"a": "caf\xe9"}\n{"a": "ok"}\n')
    rows, (bad,) = read(path)
    assert str(bad).startswith(f"{path}:2: not UTF-8 (byte 0xe9 at offset 10)")
    assert [row.origin.line for row in rows] == [1, 3]


def test_nul_bytes_after_a_good_line_may_be_utf16(file: File) -> None:
    """What the whole file proves about its encoding is in test_file_kinds.py."""
    path = file("wide.jsonl", b'{"a": 1}\n' + '{"a": 2}\n'.encode("utf-16-le"))
    rows, bad = read(path)
    assert placed(rows) == [(1, {"a": 1})]
    assert "NUL byte" in str(bad[0])
    assert "utf-16-le" in str(bad[0])


def test_bom_crlf_and_blank_lines_are_accepted(file: File) -> None:
    """Blank lines count as lines, not as rows."""
    path = file("win.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n\r\n   \r\n  {"a": 2}\r\n{"a": 3}')
    rows, bad = read(path)
    assert bad == []
    assert placed(rows) == [(1, {"a": 1}), (4, {"a": 2}), (5, {"a": 3})]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\r"])
def test_only_a_newline_ends_a_line(file: File, separator: str) -> None:
    """U+2028 and what else `str.splitlines` splits at stay inside their string."""
    # Control characters must be escaped in JSON
    raw = separator if ord(separator) > 0x1F else f"\\u{ord(separator):04x}"
    path = file("sep.jsonl", f'{{"a": "x{raw}y"}}\n{{"a": "z"}}\n'.encode())
    rows, bad = read(path)
    assert bad == []
    assert placed(rows) == [(1, {"a": f"x{separator}y"}), (2, {"a": "z"})]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (rb'{"m": [{"content": "a\ud800b"}]}', "m.0.content: lone surrogate \\ud800"),
        (rb'{"m": {"c": "\udfff"}}', "m.c: lone surrogate \\udfff"),
        (rb'{"\ud800": 1}', "lone surrogate \\ud800"),
        (rb'{"a": "x\u0000"}', "a: NUL character"),
        (b'{"a": "x\x00"}', "NUL byte at offset 8"),
        (b"\x00\x00\x00", "NUL byte at offset 0"),
        (b"[1, 2]", "a row must be an object, found a list"),
        (b'"text"', "a row must be an object, found a string"),
        (b"null", "a row must be an object, found null"),
        (b'{"a": 1, "a": 2}', "duplicate key 'a'"),
        (b'{"m": {"k": 1, "k": 1}}', "duplicate key 'k'"),
        (b'{"a": NaN}', "NaN is not JSON; write null"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": 1} {"a": 2}', "invalid JSON (col 10)"),
        (b'{"a": 1},', "invalid JSON (col 9)"),
        (b"{'a': 1}", "invalid JSON (col 2)"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a": ' + b"1" * 5_000 + b"}", "invalid JSON: Exceeds the limit"),
    ],
)
def test_each_kind_of_bad_line(file: File, line: bytes, message: str) -> None:
    """One bad row, named with its line; the good line after it is read."""
    path = file("x.jsonl", b'{"ok": 1}\n' + line + b'\n{"ok": 3}\n')
    rows, bad = read(path)
    assert [row.origin.line for row in rows] == [1, 3]
    assert len(bad) == 1
    assert str(bad[0]).startswith(f"{path}:2")
    assert message in str(bad[0])


def test_escapes_that_are_fine(file: File) -> None:
    """A surrogate pair is a character; an escaped backslash before u0000 is text."""
    path = file("x.jsonl", rb'{"a": "\ud83d\ude00", "b": "\\u0000 \\ud800"}')
    rows, bad = read(path)
    assert bad == []
    assert rows[0].value == {"a": "😀", "b": "\\u0000 \\ud800"}


def test_a_line_over_the_limit_is_skipped_in_bounded_memory(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    """The huge line is reported with its number, and is never held whole."""
    monkeypatch.setattr(streams, "LINE_LIMIT", 1 << 20)
    path = file("huge.jsonl", b'{"a": 1}\n{"a": "' + b"x" * (20 << 20) + b'"}\n{"a": 3}\n')
    tracemalloc.start()
    rows, (bad,) = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert placed(rows) == [(1, {"a": 1}), (3, {"a": 3})]
    assert str(bad) == f"{path}:2: line is longer than 1 MiB"
    assert peak < 6 << 20


def test_the_limit_itself_is_allowed(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off-by-one at the cap, with and without a newline at the end."""
    line = b'{"a": "xxxx"}'
    monkeypatch.setattr(streams, "LINE_LIMIT", len(line))
    assert len(read(file("x.jsonl", line + b"\n" + line))[0]) == 2
    monkeypatch.setattr(streams, "LINE_LIMIT", len(line) - 1)
    rows, bad = read(file("y.jsonl", line + b"x\n" + line))
    assert (len(rows), len(bad)) == (0, 2)


def test_five_megabytes_are_read_without_stalling(file: File) -> None:
    """A 5 MB example is a row like any other, and takes no quadratic time."""
    path = file("big.jsonl", json.dumps({"text": "word " * 1_000_000}).encode() + b"\n")
    began = time.process_time()
    rows, _ = read(path)
    assert len(rows[0].value["text"]) == 5_000_000
    assert time.process_time() - began < 5


def test_rows_are_streamed(file: File) -> None:
    """The first row is there before the last line is looked at; memory does not grow with the file."""
    path = file("many.jsonl", b"".join(b'{"text": "%s"}\n' % (b"x" * 5000) for _ in range(4_000)))
    tracemalloc.start()
    rows = read_rows(DataSource(path=str(path)), path, lambda row: None)
    assert sum(1 for _ in rows) == 4_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20


def test_a_rewritten_file_is_read_anew(file: File) -> None:
    """Same size and same modification time, other content; `datasets` gives the old rows."""
    path = file("x.jsonl", b'{"a": 1}')
    times = path.stat()
    assert read(path)[0][0].value == {"a": 1}
    path.write_bytes(b'{"a": 2}')
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert read(path)[0][0].value == {"a": 2}


@given(
    st.lists(
        st.one_of(st.binary(max_size=40), st.sampled_from([b'{"a": 1}', b"", b"  ", b'{"a": "\xc3\xa9"}'])), max_size=12
    )
)
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_every_line_is_a_row_or_blank_or_reported(tmp_path: Path, lines: list[bytes]) -> None:
    """Whatever the bytes, in order, and no other exception."""
    path = tmp_path / "fuzz.jsonl"
    path.write_bytes(b"\n".join(lines))
    whole = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    bad: list[BadRow] = []
    told = Told()
    try:
        rows = list(read_rows(DataSource(path=str(path)), path, bad.append, told))
    except InputError as error:
        assert told.notes or str(error).endswith(": 0 rows")
        rows = []
    if told.notes:
        return  # the bytes proved another encoding or other line ends, so the lines are not these
    assert sorted([row.origin.line for row in rows] + [row.line or 0 for row in bad]) == [
        i for i, line in enumerate(whole, 1) if line.strip()
    ]


@given(st.sampled_from(["x.json", "x.csv", "x.parquet"]), st.binary(max_size=200))
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_bytes_are_read_or_refused(tmp_path: Path, name: str, content: bytes) -> None:
    """Never another exception than the one that names the file."""
    path = tmp_path / name
    path.write_bytes(content)
    try:
        list(read_rows(DataSource(path=str(path)), path, lambda row: None))
    except InputError as error:
        assert str(error).startswith(str(path))


# JSON


def test_elements_of_a_json_array_have_lines(file: File) -> None:
    """The line where each element begins."""
    path = file("x.json", b'\xef\xbb\xbf[\n  {"a": 1}, {"a": 2},\n\n  {\n    "a": 3\n  }\n, {"a":4}]\n')
    rows, bad = read(path)
    assert bad == []
    assert placed(rows) == [(2, {"a": 1}), (2, {"a": 2}), (4, {"a": 3}), (7, {"a": 4})]


def test_bad_elements_are_reported_and_the_rest_read(file: File) -> None:
    path = file("x.json", b'[{"a": 1},\n 7,\n {"a": "\\ud800"},\n {"a": 1, "a": 2},\n {"a": 5}]')
    rows, bad = read(path)
    assert placed(rows) == [(1, {"a": 1}), (5, {"a": 5})]
    assert [row.line for row in bad] == [2, 3, 4]
    assert bad[1].key == "a"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"a": 1},\n {"a" 2}]', ":2: invalid JSON (col 7)"),
        (b'[{"a": 1}\n {"a": 2}]', ":2: invalid JSON (col 2)"),
        (b'[{"a": 1},\n]', ":2: invalid JSON (col 1)"),
        (b'[{"a": 1}', ":1: invalid JSON (col 10)"),
        (b'[{"a": 1}] x', ":1: invalid JSON (col 12)"),
        (b"[", ":1: invalid JSON (col 2)"),
        (b'{"a": 1}\n{"a": 2', ":2: invalid JSON (col 8)"),
        (b"7", ":1: expected an array of objects, or an object"),
        (b'[{"a": 1},\n {"a": "\xe9"}]', ":2: not UTF-8 (byte 0xe9 at offset 8)"),
        (b"[{" + b'"a": [' * 5_000, ":1: invalid JSON"),
    ],
)
def test_a_broken_json_file_says_where(file: File, content: bytes, message: str) -> None:
    """An array cannot be resumed, so these stop whatever `on_bad_row` says."""
    path = file("x.json", content)
    assert failure(path).startswith(str(path) + message)


def test_a_huge_json_file_is_refused_unread(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "JSON_LIMIT", 8)
    assert "store many rows as .jsonl" in failure(file("x.json", b'[{"a": 1}]'))


# CSV


def test_csv_rows_and_the_lines_they_begin_on(file: File) -> None:
    """A quoted cell may span lines; the row after it still has the right one."""
    path = file("x.csv", b'\xef\xbb\xbfprompt,answer\r\n"a\r\nb",1\r\n\r\n"say ""hi""","x,\xe2\x80\xa8y"\r\n')
    rows, bad = read(path)
    assert bad == []
    assert placed(rows) == [
        (2, {"prompt": "a\r\nb", "answer": "1"}),
        (5, {"prompt": 'say "hi"', "answer": "x,\u2028y"}),
    ]


def test_bad_csv_rows(file: File) -> None:
    """Too few and too many cells, bytes that are not UTF-8, NUL, a stray quote."""
    path = file("x.csv", b'a,b\n1\n1,2,3\n\xe9,2\n\x00,2\n"1"x,2\n1,2\n\xc3\xa9,2\n')
    rows, bad = read(path)
    assert placed(rows) == [(7, {"a": "1", "b": "2"}), (8, {"a": "é", "b": "2"})]
    assert [(row.line, row.message) for row in bad] == [
        (2, "1 cells, the header has 2"),
        (3, "3 cells, the header has 2"),
        (4, "not UTF-8 (byte 0xe9 at offset 0)"),
        (5, "NUL byte at offset 0"),
        (6, "invalid CSV: ',' expected after '\"'"),
    ]


def test_a_quote_that_never_closes_is_an_error(file: File) -> None:
    """Python's default would take the rest of the file as one cell."""
    _, bad = read(file("x.csv", b'a,b\n1,2\n3,"4\n5,6\n'))
    assert [(row.line, row.message) for row in bad] == [(3, "invalid CSV: unexpected end of data")]


def test_long_csv_cells_are_read(file: File) -> None:
    """Beyond csv's own limit of 131,072 characters."""
    rows, bad = read(file("x.csv", b"a\n" + b"x" * 5_000_000 + b"\n"))
    assert bad == []
    assert len(rows[0].value["a"]) == 5_000_000


@pytest.mark.parametrize(
    ("header", "message"), [(b"a,a", "names a column twice"), (b"a,,b", "without a name"), (b"\x81,b", "not UTF-8")]
)
def test_a_bad_header_is_an_error(file: File, header: bytes, message: str) -> None:
    path = file("x.csv", header + b"\n1,2\n")
    assert failure(path).startswith(f"{path}:1: ")
    assert message in failure(path)


# Parquet


def test_parquet_rows_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers go on over batches."""
    monkeypatch.setattr(arrow_rows, "PARQUET_ROWS", 2)
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"n": [1, 2, 3, 4, 5], "m": [[{"role": "user"}]] * 5}), path)
    rows, bad = read(path)
    assert bad == []
    assert placed(rows) == [(i, {"n": i, "m": [{"role": "user"}]}) for i in range(1, 6)]


def test_parquet_strings_that_are_not_utf8_and_nul(tmp_path: Path) -> None:
    """Only the rows that hold them are bad."""
    path = tmp_path / "x.parquet"
    offsets = pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 2, 6, 9, 13)))
    text = pa.StringArray.from_buffers(4, offsets, pa.py_buffer(b"okcaf\xe9a\x00bfine"))
    pq.write_table(pa.table({"t": text}), path)
    rows, bad = read(path)
    assert placed(rows) == [(1, {"t": "ok"}), (4, {"t": "fine"})]
    assert [(row.line, row.message, row.key) for row in bad] == [
        (2, "not UTF-8 (byte 0xe9 at offset 3)", None),
        (3, "NUL character", "t"),
    ]


@pytest.mark.parametrize("kind", ["text", "struct", "list", "list of structs"])
def test_a_damaged_offset_in_an_arrow_file_is_found(tmp_path: Path, kind: str) -> None:
    """Arrow trusts what a file says of itself: an offset outside of a text would read other memory, or crash. A text
    that is not UTF-8 is a fault of its row alone, at every depth."""
    texts = [pa.array([b"ok", b"hello", b"b", last]).view(pa.string()) for last in (b"fine", b"f\xffne")]
    path, found = tmp_path / "x.arrow", []
    for column in texts:
        if "struct" in kind:
            column = pa.StructArray.from_arrays([column], ["c"])
        if "list" in kind:
            column = pa.ListArray.from_arrays([0, 1, 2, 3, 4], column)
        table = pa.table({"t": column})
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
        found.append(read(path))
    (sound, none), (others, (bad,)) = found
    assert len(sound) == 4 and not none and [row.value for row in others] == [row.value for row in sound[:3]]
    assert bad.line == 4 and bad.message.startswith("not UTF-8")
    before, after = (b"".join(n.to_bytes(4, "little") for n in (0, 2, end, 8, 12)) for end in (7, 1_000_000))
    content = path.read_bytes()
    assert content.count(before) == 1
    path.write_bytes(content.replace(before, after))
    assert "not readable as Arrow after row 0" in failure(path)


def test_what_is_not_parquet_is_an_error(file: File) -> None:
    path = file("x.parquet", b"PAR1 no, it is not PAR1")
    assert failure(path).startswith(f"{path}: not readable as Parquet after row 0")


# Locations


def test_a_folder_is_its_data_files_by_name(file: File, tmp_path: Path) -> None:
    """Hidden files, other files and scripts are left alone."""
    file("b.jsonl", b'{"n": 3}')
    file("a.jsonl", b'{"n": 1}\n{"n": 2}')
    file("README.md", b"# text")
    file(".hidden.jsonl", b"{")
    file("loader.py", b"raise SystemExit")
    rows, _ = read(tmp_path)
    assert [row.value["n"] for row in rows] == [1, 2, 3]
    assert [Path(row.origin.source).name for row in rows] == ["a.jsonl", "a.jsonl", "b.jsonl"]


def test_an_artefact_is_its_data_file(file: File, tmp_path: Path) -> None:
    """A stage's folder has a manifest; what lies beside data.jsonl is not data."""
    file("data.jsonl", b'{"n": 1}')
    file("manifest.json", b"{}")
    file("metrics.jsonl", b'{"loss": 1}')
    assert [row.value for row in read(tmp_path)[0]] == [{"n": 1}]


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv"])
@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_an_empty_file_has_0_rows(file: File, name: str, content: bytes) -> None:
    """An error in those words, not a bare StopIteration."""
    path = file(name, content)
    assert failure(path) == f"{path}: 0 rows"


def test_a_csv_or_parquet_without_rows_has_0_rows(file: File, tmp_path: Path) -> None:
    assert failure(file("x.csv", b"a,b\n")).endswith(": 0 rows")
    assert failure(file("x.json", b"[]")).endswith(": 0 rows")
    pq.write_table(pa.table({"n": pa.array([], pa.int64())}), tmp_path / "x.parquet")
    assert failure(tmp_path / "x.parquet").endswith(": 0 rows")


def test_a_python_file_is_refused_and_not_run(file: File, tmp_path: Path) -> None:
    path = file("squad.py", f"open({str(tmp_path / 'ran')!r}, 'w')".encode())
    assert "a Python file is not data" in failure(path)
    assert not (tmp_path / "ran").exists()


def test_what_cannot_be_read_says_what_can(file: File, tmp_path: Path) -> None:
    known = (
        "readable are .jsonl, .ndjson, .json, .csv, .tsv, .txt, .parquet, .arrow, .feather, texts also with .gz, .bz2,"
        " .xz, .zst, .zip"
    )
    assert failure(file("x.pkl", b"")).endswith(f"unknown suffix .pkl; {known}")
    assert failure(file("x.parquet.gz", b"")).endswith(f"unknown suffix .gz; {known}")
    assert failure(file("data", b"")).endswith(f"no suffix; {known}")
    assert failure(tmp_path / "absent.jsonl").endswith("absent.jsonl: no such file or folder")
    (tmp_path / "empty").mkdir()
    assert "no data file in this folder" in failure(tmp_path / "empty")


def test_a_suffix_may_be_in_capitals(file: File) -> None:
    assert len(read(file("X.JSONL", b'{"a": 1}'))[0]) == 1


# The hub (the tests run offline)


def test_offline_a_hub_data_set_fails_in_seconds() -> None:
    """The id is named, and the exit code is that of a machine's fault."""
    began = time.perf_counter()
    with pytest.raises(EnvironmentFault) as caught:
        read("some-org/some-set")
    assert caught.value.exit_code == 3
    assert "some-org/some-set" in str(caught.value)
    assert time.perf_counter() - began < 10


def test_when_the_hub_does_not_answer_only_the_cache_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the setting, but by trying: `datasets` would retry five times. The setting is as before afterwards."""
    import datasets
    from huggingface_hub import HfApi

    offline: list[bool] = []

    def no_network(self: HfApi, name: str, timeout: float) -> None:
        raise OSError("Name or service not known")

    def load_dataset(*args: Any, **options: Any) -> None:
        offline.append(datasets.config.HF_HUB_OFFLINE)
        raise ConnectionError("Couldn't reach it")

    monkeypatch.setattr(HfApi, "dataset_info", no_network)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with pytest.raises(EnvironmentFault, match="some-org/some-set: cannot reach the hub"):
        read("some-org/some-set")
    assert offline == [True]
    assert datasets.config.HF_HUB_OFFLINE is False


def test_hub_rows_are_numbered_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same checks as for files; the split is the source's."""
    import datasets
    from huggingface_hub import HfApi

    asked: list[Any] = []

    def load_dataset(*args: Any, **options: Any) -> datasets.Dataset:
        asked.append((args, options))
        return datasets.Dataset.from_list([{"n": 1, "t": "ok"}, {"n": 2, "t": "a\x00"}, {"n": 3, "t": "ok"}])

    monkeypatch.setattr(HfApi, "dataset_info", lambda self, name, timeout: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows, bad = read("some-org/some-set", split="test", subset="main", revision="abc")
    assert placed(rows) == [(1, {"n": 1, "t": "ok"}), (3, {"n": 3, "t": "ok"})]
    assert str(bad[0]) == "some-org/some-set:2 t: NUL character"
    # The source's subset, split and commit, and nothing that could allow remote code.
    assert asked == [(("some-org/some-set", "main"), {"split": "test", "revision": "abc"})]


def test_an_unknown_hub_data_set_is_the_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from huggingface_hub import HfApi

    def load_dataset(*args: Any, **options: Any) -> None:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'x/y' doesn't exist on the Hub or cannot be accessed.")

    monkeypatch.setattr(HfApi, "dataset_info", lambda self, name, timeout: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert failure("x/y").startswith("x/y: no such data set on the hub, or no access to it")
