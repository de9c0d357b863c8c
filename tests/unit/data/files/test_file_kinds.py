"""The same table in every kind of file, compression, encoding and separator gives the same rows, and what was found out
is told."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from align.data.files import json_rows
from align.data.rows import Told
from align.data.sources.readers import BadRow, Row, read_rows
from align.errors import InputError
from align.recipe.schema import DataSource

Rows = list[dict[str, str]]
TABLE: Rows = [
    {"question": "Was heißt »café« auf Deutsch?", "answer": "Kaffeehaus, ein Ort; kein Getränk.", "note": "a|b"},
    {"question": 'Say "hi"\nand stop.', "answer": "Hi – über alles…", "note": "tab\there"},
    {"question": "Où est-il né ?", "answer": "À Genève, l’été.", "note": "x"},
]


def read(path: Path, **keys: Any) -> tuple[list[Row], list[BadRow], Told]:
    bad: list[BadRow] = []
    told = Told()
    return list(read_rows(DataSource(path=str(path), **keys), path, bad.append, told)), bad, told


def values(path: Path, **keys: Any) -> list[dict[str, Any]]:
    rows, bad, _ = read(path, **keys)
    assert bad == []
    return [row.value for row in rows]


def failure(path: Path, **keys: Any) -> str:
    with pytest.raises(InputError) as caught:
        read(path, **keys)
    return str(caught.value)


def as_csv(table: Rows, separator: str = ",", end: str = "\r\n", quoting: Any = csv.QUOTE_MINIMAL) -> str:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=separator, lineterminator=end, quoting=quoting)
    writer.writerow(table[0])
    writer.writerows(row.values() for row in table)
    return out.getvalue()


def as_lines(table: Rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table)


def zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, "zstd", asbytes=True))


def zipped(data: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("inside", data)
    return out.getvalue()


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
    ".zip": zipped,
}
TEXTS = {
    "x.jsonl": as_lines(TABLE),
    "X.JSONL": as_lines(TABLE),
    "x.ndjson": as_lines(TABLE),
    "array.jsonl": json.dumps(TABLE),
    "pretty array.jsonl": json.dumps(TABLE, indent=1),
    "pretty.jsonl": "\n".join(json.dumps(row, indent=2) for row in TABLE),
    "concatenated.jsonl": as_lines(TABLE).replace("\n", ""),
    "spaced.jsonl": as_lines(TABLE).replace("\n", "  "),
    "x.json": json.dumps(TABLE),
    "lines.json": as_lines(TABLE),
    "pretty.json": "\n".join(json.dumps(row, indent=2) for row in TABLE),
    "x.csv": as_csv(TABLE),
    "unix.csv": as_csv(TABLE, end="\n"),
    "quoted.csv": as_csv(TABLE, quoting=csv.QUOTE_ALL),
    "semicolon.csv": as_csv(TABLE, ";"),
    "tab.csv": as_csv(TABLE, "\t"),
    "bar.csv": as_csv(TABLE, "|"),
    "sep.csv": "sep=;\r\n" + as_csv(TABLE, ";"),
    "x.tsv": as_csv(TABLE, "\t"),
    "unicode text.txt": as_csv(TABLE, "\t"),
}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", TEXTS)
def test_every_kind_of_text_and_compression_gives_the_same_rows(tmp_path: Path, name: str, suffix: str) -> None:
    path = tmp_path / f"{name}{suffix}"
    path.write_bytes(COMPRESS[suffix](TEXTS[name].encode()))
    assert values(path) == TABLE


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "cp1252", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", TEXTS)
def test_every_encoding_gives_the_same_rows(tmp_path: Path, name: str, encoding: str) -> None:
    """By the recipe's word always; without it where the file proves it, or where only one is likely."""
    path = tmp_path / name
    text = TEXTS[name].replace("\\u2019", "’")
    path.write_bytes(text.encode(encoding))
    assert values(path, encoding=encoding.removesuffix("-sig")) == TABLE
    is_table = path.suffix in (".csv", ".tsv", ".txt")
    proved = encoding in ("utf-8-sig", "utf-16", "utf-32") or (
        encoding == "cp1252" if is_table else encoding.startswith("utf-16")
    )
    if proved:
        rows, bad, told = read(path)
        assert ([row.value for row in rows], bad) == (TABLE, [])
        said = " ".join(told.notes)
        assert (encoding in said) == (encoding != "utf-8-sig")
        assert told.keys.get("encoding") == (None if encoding == "utf-8-sig" else encoding)
    elif is_table:
        assert f"write `encoding: {encoding}`" in failure(path)


def test_tables_of_other_libraries(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(TABLE)
    pq.write_table(table, tmp_path / "x.parquet")
    with pa.OSFile(str(tmp_path / "stream.arrow"), "wb") as out, pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    for compression in ("lz4", "uncompressed"):
        feather.write_feather(table, str(tmp_path / f"{compression}.feather"), compression=compression)
    for path in sorted(tmp_path.iterdir()):
        rows, bad, _ = read(path)
        assert [row.value for row in rows] == TABLE, path
        assert [row.origin.line for row in rows] == [1, 2, 3]
        assert bad == []


SAFE = st.text(st.characters(codec="cp1252", categories=("L", "N")), min_size=1, max_size=8)
CELL = st.text(st.characters(codec="utf-8", exclude_characters="\r\x00", exclude_categories=("Cs",)), max_size=12)


@given(
    st.lists(SAFE, min_size=2, max_size=4, unique=True),
    st.data(),
    st.sampled_from(",;\t|"),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    st.sampled_from(["", ".gz", ".zst"]),
)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_table_comes_back(
    tmp_path: Path, names: list[str], data: st.DataObject, separator: str, encoding: str, suffix: str
) -> None:
    """Any cells whatever, quoted as the csv module does it: the same rows, or a refusal that names the key."""
    cells = data.draw(st.lists(st.lists(CELL, min_size=len(names), max_size=len(names)), min_size=1, max_size=5))
    rows: Rows = [dict(zip(names, row, strict=True)) for row in cells]
    path = tmp_path / f"x.csv{suffix}"
    path.write_bytes(COMPRESS[suffix](as_csv(rows, separator, quoting=csv.QUOTE_ALL).encode(encoding)))
    try:
        found = values(path)
    except InputError as error:
        assert "could separate the columns" in str(error)
        found = values(path, separator=separator)
    assert found == rows


@given(
    st.lists(
        st.dictionaries(
            st.text(max_size=3), st.recursive(st.text(max_size=6) | st.integers(), st.lists), min_size=1, max_size=3
        ),
        min_size=2,
    )
)
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_objects_come_back(tmp_path: Path, objects: list[dict[str, Any]]) -> None:
    """However the objects are laid out, as lines or not."""
    plain = [json.dumps(item) for item in objects]
    pretty = [json.dumps(item, indent=1) for item in objects]
    if any("\\u0000" in text or "\\ud" in text for text in plain):
        return  # refused in every layout
    layouts = ["\n".join(plain), "".join(plain), "\n".join(pretty), f"[{','.join(plain)}]", f"[\n{','.join(pretty)}\n]"]
    for number, text in enumerate(layouts):
        for suffix in ("jsonl", "json"):
            path = tmp_path / f"{number}.{suffix}"
            path.write_text(text)
            assert values(path) == objects, (suffix, text)


# What is told, and what is refused


def test_a_guess_is_told_in_one_line_with_its_keys(tmp_path: Path) -> None:
    path = tmp_path / "support.csv"
    path.write_bytes(as_csv(TABLE, ";").encode("cp1252"))
    _, _, told = read(path)
    assert told.notes == [f"{path}: read as cp1252, separated by `;`"]
    assert told.keys == {"encoding": "cp1252", "separator": ";"}
    assert read(path, **told.keys)[2].notes == [], "what the recipe says is no guess"


def test_the_usual_is_not_told(tmp_path: Path) -> None:
    for name in ("x.csv", "x.tsv", "x.jsonl", "x.json"):
        (tmp_path / name).write_text(TEXTS[name], newline="")
        assert read(tmp_path / name)[2].notes == []


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("gb18030", "你好，世界"),
        ("shift_jis", "こんにちは"),
        ("cp1251", "Привет, мир"),
        ("cp1250", "Zażółć gęślą jaźń"),
        ("cp1250", "Příliš žluťoučký kůň"),
        ("cp1250", "Jó estét, hölgyem, őszintén"),
        ("cp1253", "Καλημέρα"),
        ("cp1254", "İyi akşamlar, ışık"),
        ("mac_roman", "Übermäßig schön"),
        ("euc_kr", "안녕"),
        ("cp1255", "שלום"),
        ("cp874", "สวัสดี"),
    ],
)
def test_other_code_pages_are_refused_with_the_key_to_write(tmp_path: Path, encoding: str, text: str) -> None:
    """Their bytes are valid cp1252 as well, so only the recipe can say."""
    rows: Rows = [{"prompt": "plain", "answer": "text"}, {"prompt": text, "answer": "yes"}]
    path = tmp_path / "x.csv"
    path.write_bytes(as_csv(rows).encode(encoding))
    assert failure(path).startswith(f"{path}:3: not UTF-8, and which encoding it has cannot be told; set `encoding`")
    assert values(path, encoding=encoding) == rows


@pytest.mark.parametrize(
    "text",
    [
        "Was kostet für „ es?",
        "Er sagte: „Nein“, und ging.",
        "„Übung“ macht ‚oft‘ den Meister",
        "Was ist 3 × 4?",
        "Ein Brett, 10×15 cm",
        "Il dit “non” et s’en va",
    ],
)
def test_quotation_marks_and_signs_of_western_texts_are_read(tmp_path: Path, text: str) -> None:
    rows: Rows = [{"prompt": "plain", "answer": "text"}, {"prompt": text, "answer": "ja"}]
    path = tmp_path / "x.csv"
    path.write_bytes(as_csv(rows).encode("cp1252"))
    found, _, told = read(path)
    assert [row.value for row in found] == rows
    assert told.keys == {"encoding": "cp1252"}


@pytest.mark.parametrize(
    ("encoding", "text", "code"),
    [
        ("cp850", "Im März", "0x84"),  # „ in cp1252
        ("cp850", "ähnlich ist es", "0x84"),
        ("cp850", "zwölf", "0x94"),  # ”
        ("cp850", "le thé", "0x82"),  # ‚
        ("cp850", "école", "0x82"),
        ("cp850", "für", "0x81"),
        ("cp1251", "В — Ч", "0xd7"),  # the first letter is one of Western texts, too
        ("cp1251", "a Ч b", "0xd7"),  # ×
        ("cp1250", "Polskie łąki", "0xb3"),
    ],
)
def test_the_error_names_the_character_that_decides_and_the_option(
    tmp_path: Path, encoding: str, text: str, code: str
) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(
        as_csv([{"prompt": "plain", "answer": "text"}, {"prompt": text, "answer": "yes"}]).encode(encoding)
    )
    said = failure(path)
    assert said.startswith(f"{path}:3: not UTF-8") and "`--encoding`" in said
    assert f"what decides is byte {code}" in said


def test_damaged_utf8_is_not_another_encoding(tmp_path: Path) -> None:
    """Read as cp1252, every other letter of the file would come out wrong."""
    path = tmp_path / "x.csv"
    path.write_bytes("a,b\né,1\n".encode() + b"\xe9,2\n" + "ü,3\n".encode())
    rows, bad, told = read(path)
    assert [row.value["a"] for row in rows] == ["é", "ü"]
    assert [row.line for row in bad] == [3]
    assert told.notes == []


def test_a_foreign_letter_late_in_a_large_file_counts(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(b"a,b\n" + b"plain text,1\n" * 200_000 + b"caf\xe9,2\n")
    rows, bad, _ = read(path)
    assert bad == []
    assert rows[-1].value == {"a": "café", "b": "2"}


def test_a_wrong_encoding_is_refused_at_its_line(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(b"a,b\nx,1\n\xff\x81,2\n")
    assert failure(path, encoding="cp1252").startswith(f"{path}:")
    assert "not cp1252 (byte 0x81)" in failure(path, encoding="cp1252")
    with pytest.raises(ValueError, match="no encoding `klingon`"):
        DataSource(path="x.csv", encoding="klingon")
    with pytest.raises(ValueError, match="no encoding `rot13`"):
        DataSource(path="x.csv", encoding="rot13")


def test_two_separators_that_fit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("a,b;c\n1,2;3\n4,5;6\n")
    assert (
        failure(path) == f"{path}:1: `,` and `;` could separate the columns; write `separator: ','` or `separator: ';'`"
    )
    assert values(path, separator=";") == [{"a,b": "1,2", "c": "3"}, {"a,b": "4,5", "c": "6"}]
    path.write_text("prompt, what is asked;answer\nWhat, then?;1\nWhy, and how, and when?;2\n")
    assert values(path)[0] == {"prompt, what is asked": "What, then?", "answer": "1"}, "only `;` fits the rows"


def test_row_numbers_of_pandas_and_empty_columns_are_left_out_and_told(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text(",prompt,answer,,\n0,a,b,,\n1,c,d,,\n")
    rows, bad, told = read(path)
    assert ([row.value for row in rows], bad) == ([{"prompt": "a", "answer": "b"}, {"prompt": "c", "answer": "d"}], [])
    assert [note.partition(": ")[2] for note in told.notes] == [
        "its first column has no name and holds row numbers: left out",
        "empty columns without a name at the end: left out",
    ]
    path.write_text(",prompt,answer,\n0,a,b,\ntext,c,d,\n1,c,d,text\n")
    rows, bad, _ = read(path)
    assert len(rows) == 1
    assert [(row.line, row.message) for row in bad] == [
        (3, "the first column has no name and holds more than row numbers"),
        (4, "4 cells, the header has 3"),
    ]


def test_a_short_row_is_bad_and_says_what_would_make_it_good(tmp_path: Path) -> None:
    """Which cell is missing cannot be told: if it is not the last one, all others stand in wrong columns."""
    path = tmp_path / "x.csv"
    path.write_text("a,b,c\n1,2\n1,2,3,\n1,2,3\n")
    rows, bad, _ = read(path)
    assert [row.value for row in rows] == [{"a": "1", "b": "2", "c": "3"}] * 2, "empty cells at the end say nothing"
    assert str(bad[0]) == f"{path}:2: 2 cells, the header has 3; if its last ones are empty, end it with 1 more `,`"


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl"])
def test_lines_of_old_macs(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    text = TEXTS[name].replace("\r\n", "\n").replace("\nand stop", " and stop").replace("\n", "\r")
    path.write_text(text, newline="")
    rows, bad, told = read(path)
    assert bad == []
    assert [row.value["answer"] for row in rows] == [row["answer"] for row in TABLE]
    assert [row.origin.line for row in rows] == ([2, 3, 4] if name == "x.csv" else [1, 2, 3])
    assert "carriage return" in told.notes[0]


@pytest.mark.parametrize("suffix", [suffix for suffix in COMPRESS if suffix])
def test_compressed_files_that_are_broken(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.jsonl{suffix}"
    whole = COMPRESS[suffix](as_lines(TABLE * 500).encode())
    for content in (b"", b"no such thing", whole[: len(whole) // 2]):
        path.write_bytes(content)
        assert failure(path).startswith(f"{path}: ")
    if suffix != ".zip":
        path.write_bytes(whole[: len(whole) // 2])
        assert failure(path).startswith(f"{path}: not readable as {suffix}: ")


@pytest.mark.parametrize("suffix", [suffix for suffix in COMPRESS if suffix])
def test_a_byte_is_gone_or_another_one_anywhere_in_a_compressed_file(tmp_path: Path, suffix: str) -> None:
    """Whichever exception its library has for that: rows as they were, or a problem that names the file."""
    path = tmp_path / f"x.jsonl{suffix}"
    whole = COMPRESS[suffix](as_lines(TABLE).encode())
    refused = 0
    for i in range(0, len(whole), 2):
        for content in (whole[:i] + whole[i + 1 :], whole[:i] + bytes([whole[i] ^ 0xFF]) + whole[i + 1 :]):
            path.write_bytes(content)
            try:
                read(path)
            except InputError as error:
                assert str(error).startswith(f"{path}: "), (i, content)
                refused += 1
    assert refused > len(whole) / 4


def test_an_archive_of_several_files_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.jsonl", "{}")
        archive.writestr("b.jsonl", "{}")
    assert failure(path).startswith(f"{path}: holds 2 files")


def test_a_text_without_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("one thing\nanother thing\n")
    assert failure(path).startswith(f"{path}: a text without columns; give each text a row")


# One object in a .json file

WRAPPED = {
    "version": 2,
    "data": [{"n": 1}, {"n": 2}],
    "other": {"train": [{"n": 3}], "by_id": {"p": {"n": 4}, "q": {"id": 9, "n": 5}}},
}


def test_one_object_is_a_row_only_if_no_rows_stand_in_it(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"prompt": "a", "tags": ["x", "y"]}')
    assert values(path) == [{"prompt": "a", "tags": ["x", "y"]}]
    path.write_text(json.dumps(WRAPPED, indent=1))
    assert (
        failure(path)
        == f"{path}:1: is one object; write `rows: data` or `rows: other.train` or `rows: other.by_id` if its rows"
        " stand there, or `rows: .` if the object is the row"
    )
    assert values(path, rows=".") == [WRAPPED]


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"a": {"rounds": [{"n": 1}], "b": {"c": {"items": [{"n": 1}] * 3}}}}, ["a.b.c.items", "a.rounds"]),
        ({"few": [{}] * 2, "by_id": {"x": {"n": 1}, "y": {"n": 2}}, "many": [{}] * 5}, ["many", "few", "by_id"]),
        ({"a": {"one": {"n": 1}, "two": {"items": [{}] * 4}}}, ["a.two.items", "a"]),
        ({"by_id": {"x": {"turns": [{}] * 9}, "y": {"turns": [{}] * 9}}}, ["by_id"]),
    ],
)
def test_all_places_where_rows_could_stand_are_named_the_longest_list_first(
    tmp_path: Path, value: Any, named: list[str]
) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(value))
    lines = " or ".join(f"`rows: {place}`" for place in named)
    assert failure(path).endswith(
        f"is one object; write {lines} if its rows stand there, or `rows: .` if the object is the row"
    )
    for place in named:
        assert values(path, rows=place)


def test_rows_says_where_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(WRAPPED, indent=1))
    rows, _, _ = read(path, rows="data")
    assert [(row.origin.line, row.value) for row in rows] == [(4, {"n": 1}), (7, {"n": 2})]
    assert values(path, rows="other.train") == [{"n": 3}]
    assert values(path, rows="other.by_id") == [{"id": "p", "n": 4}, {"id": 9, "n": 5}]
    assert failure(path, rows="rows").endswith("`rows: rows`: there is no rows; there are version, data, other")
    assert failure(path, rows="data.x").endswith("`rows: data.x`: data is no object")
    assert failure(path, rows="version").endswith("`rows: version`: expected a list of rows, or an object of rows")
    path.write_text('[{"n": 1}]')
    assert failure(path, rows="data").endswith("is an array already: `rows` has nothing to say here")
    path.write_text('{"n": 1}\n{"n": 2}')
    assert failure(path, rows="data").endswith("holds several values: `rows` has no one object to look into")


def test_a_cut_off_first_line_is_a_bad_row(tmp_path: Path) -> None:
    """Not the beginning of a pretty-printed file: what follows does not complete it."""
    path = tmp_path / "x.jsonl"
    path.write_text('{"n": \n{"n": 2}\n{"n": 3}\n')
    rows, bad, told = read(path)
    assert [row.value["n"] for row in rows] == [2, 3]
    assert ([row.line for row in bad], told.notes) == ([1], [])


def test_pretty_printed_objects_are_read_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "LINE_LIMIT", 2**18)
    path = tmp_path / "x.jsonl"
    big = [{"n": i, "text": "x" * 100_000} for i in range(20)]
    path.write_text("\n".join(json.dumps(item, indent=1) for item in big))
    rows, bad, _ = read(path)
    assert ([row.value for row in rows], bad) == (big, [])
    assert [row.origin.line for row in rows] == [1 + 4 * i for i in range(20)]
    path.write_text(json.dumps(big[0], indent=1) + json.dumps({"n": 1, "text": "x" * 400_000}, indent=1))
    assert "a row is longer than" in failure(path)


def test_nan_of_a_table_is_an_empty_cell(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"n": [1.5, float("nan"), float("inf")], "m": [[float("nan")], [2.0], [3.0]]}), path)
    rows, bad, _ = read(path)
    assert [row.value for row in rows] == [{"n": 1.5, "m": [None]}, {"n": None, "m": [2.0]}]
    assert [(row.line, row.key, row.message) for row in bad] == [(3, "n", "an infinite number")]
