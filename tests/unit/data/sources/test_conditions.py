"""`where`, `unique`, `explode`, `ignore`: which rows are used; all that is left out is counted with its reason."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from align.data.formats.formats import Want
from align.data.formats.personal import PERSONAL
from align.data.sources.conditions import matches
from align.data.sources.mixture import Records, read_records
from align.errors import InputError
from align.recipe.schema import Condition, DataSource


def read(
    path: Path, rows: list[dict[str, Any]], want: Want = "prompt", rejects: Path | None = None, **keys: Any
) -> Records:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_records([DataSource(path=str(path), **keys)], [path], want, seed=0, rejects=rejects)


def texts(records: Records) -> list[str]:
    return [record.prompt[-1]["content"] for record in records]  # type: ignore[union-attr]


ROWS: list[dict[str, Any]] = [
    {"prompt": "a", "lang": "en", "score": 1, "info": {"kind": "x", "n.m": 1}, "turns": [{"ok": True}, {"ok": False}]},
    {"prompt": "b", "lang": "de", "score": 2.5, "info": {"kind": "y"}, "turns": [{"ok": False}]},
    {"prompt": "c", "lang": None, "score": "3", "info": None, "turns": []},
    {"prompt": "d", "lang": "fr", "score": "many", "info": '{"kind": "x"}'},
]


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ({"lang": "en"}, "a"),
        ({"lang": ["en", "fr"]}, "ad"),
        ({"lang": [None, "en"]}, "ac"),
        ({"lang": None}, "c"),
        ({"lang": {"not": None}}, "abd"),
        ({"lang": {"not": "en"}}, "bcd"),
        ({"lang": {"not": ["en", None]}}, "bd"),
        ({"score": 3}, "c"),
        ({"score": {"min": 2}}, "bc"),
        ({"score": {"max": 2.5}}, "ab"),
        ({"score": {"min": 2, "max": 2.9}}, "b"),
        ({"score": {"min": 1, "not": 2.5}}, "ac"),
        ({"info.kind": "x"}, "ad"),
        ({"info": None}, "c"),
        ({"info.n.m": 1}, "a"),
        ({"turns[*].ok": True}, "a"),
        ({"turns[0].ok": False}, "b"),
        ({"turns[-1].ok": False}, "ab"),
        ({"lang": ["en", "de"], "score": {"min": 2}}, "b"),
    ],
)
def test_where(tmp_path: Path, where: dict[str, Any], kept: str) -> None:
    records = read(tmp_path / "x.jsonl", ROWS, where=where)
    assert "".join(texts(records)) == kept
    (report,) = records.report.sources
    assert (report.read, report.left_out, report.kept) == (4, 4 - len(kept), len(kept))


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"a[": 1}, "not a place in a row"),
        ({"a": {}}, "an empty condition: expected `min`, `max` or `not`"),
        ({"a": {"least": 1}}, "least"),
        ({"a": [[1]]}, "a"),
    ],
)
def test_what_where_cannot_be(where: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="where") as caught:
        DataSource(path="x", where=where)
    assert message in str(caught.value)


SCALARS = st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["x", "1", "true", ""]) | st.floats(-3, 3)


@given(st.lists(SCALARS), SCALARS)
@settings(max_examples=200)
def test_a_list_is_any_of_it_and_not_is_the_opposite(wanted: list[Any], value: Any) -> None:
    assert matches(value, wanted) == any(matches(value, one) for one in wanted)
    for one in (*wanted, wanted):
        assert matches(value, Condition.model_validate({"not": one})) != matches(value, one)


def test_a_cell_of_a_csv_is_compared_as_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(
            [["prompt", "n", "meta"], ["a", "1", '{"lang": "en"}'], ["b", "2", '{"lang": "de"}'], ["c", "", "{}"]]
        )
    for where, kept in (({"n": 1}, "a"), ({"n": {"min": 1.5}}, "b"), ({"meta.lang": "de"}, "b"), ({"n": ""}, "c")):
        assert (
            "".join(
                texts(read_records([DataSource(path=str(path), where=where)], [path], "prompt", seed=0, rejects=None))
            )
            == kept
        )


# unique


def test_unique_prompts(tmp_path: Path) -> None:
    """The record's prompt, whatever its column is called; white space does not make another one."""
    rows = [{"instruction": text, "output": "o", "n": i} for i, text in enumerate(["a", "b", "a ", "c", "b", "a"])]
    rejects = tmp_path / "rejects.jsonl"
    records = read(tmp_path / "x.jsonl", rows, unique="prompt", rejects=rejects)
    assert texts(records) == ["a", "b", "c"]
    (report,) = records.report.sources
    assert report.reasons == {"repeated: its prompt came before": 3}
    assert "3 repeated: its prompt came before (first: " in report.line()
    entries = [json.loads(line) for line in rejects.read_text().splitlines()]
    assert [(entry["line"], entry["reason"]) for entry in entries] == [
        (n, "repeated: its prompt came before") for n in (3, 5, 6)
    ]


def test_prompts_that_repeat_are_told_of_with_the_key_that_takes_each_once(tmp_path: Path) -> None:
    """Not for other records: several preferences to one prompt are usual."""
    rows = [{"prompt": text, "chosen": "x", "rejected": "y"} for text in ("a", "a ", "b", "a")]
    said = "2 times a prompt that came before: `unique: prompt` takes each once"
    for want, keys, told in (
        ("prompt", {}, True),
        ("prompt", {"unique": "prompt"}, False),
        ("prompt", {"where": {"prompt": ["a", "b"]}}, False),
        ("preference", {}, False),
    ):
        records = read(tmp_path / "x.jsonl", rows, want, format="preference", **keys)
        list(records)
        assert (said in records.report.lines()[0]) == told, (want, keys)


def test_unique_at_a_place_keeps_the_first_good_row(tmp_path: Path) -> None:
    """A bad row is not the one that counts."""
    rows = [{"prompt": text, "k": {"id": key}} for text, key in ((" ", 1), ("b", 1), ("c", 1), ("d", 2))]
    records = read(tmp_path / "x.jsonl", rows, unique="k.id", on_bad_row="skip")
    assert texts(records) == ["b", "d"]
    with pytest.raises(InputError, match=r"x\.jsonl:1 other: missing: `unique` looks at it"):
        texts(read(tmp_path / "x.jsonl", rows[1:], unique="other"))


# explode


def test_explode_makes_a_row_of_each_item(tmp_path: Path) -> None:
    rows = [
        {"id": "x", "inner": {"prompts": ["a", "b"]}},
        {"id": "y", "inner": {"prompts": []}},
        {"id": "z", "inner": {"prompts": ["c"]}},
    ]
    Path(tmp_path / "fmt_explode.py").write_text(
        "def one(row):\n    return {'prompt': row['inner']['prompts'], 'id': row['id']}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        records = read(tmp_path / "x.jsonl", rows, explode="inner.prompts", format="fmt_explode:one")
        found = [(record.id, record.prompt[-1]["content"]) for record in records]  # type: ignore[union-attr]
    assert found == [("x#1", "a"), ("x#2", "b"), ("z#1", "c")]
    assert records.report.sources[0].reasons == {"has nothing to explode": 1}
    with pytest.raises(InputError, match=r"x\.jsonl:1 id: expected a list, found a string"):
        texts(read(tmp_path / "x.jsonl", rows, explode="id"))


@given(st.lists(st.booleans(), min_size=1, max_size=6))
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_another_list_chooses_among_the_items(tmp_path: Path, right: list[bool]) -> None:
    """As in OpenR1: the answers of which a parallel list says true."""
    rows = [
        {"prompt": [f"answer {i}" for i in range(len(right))], "verified": right},
        {"prompt": ["last"], "verified": [True]},
    ]
    records = read(tmp_path / "x.jsonl", rows, explode="prompt", where={"verified": True})
    assert texts(records) == [f"answer {i}" for i, good in enumerate(right) if good] + ["last"]
    assert records.report.sources[0].left_out == right.count(False)


# ignore, and what never enters


def test_ignored_columns_are_as_if_they_were_not_there(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "note": "n"}]
    (record,) = read(tmp_path / "x.jsonl", rows, ignore=["chosen", "rejected"], format=None)
    assert record.fields == {"note": "n"}
    records = read(tmp_path / "x.jsonl", rows, ignore=["nothing"])
    assert len(list(records)) == 1
    assert records.report.lines()[-1].endswith("`ignore` names columns that no row has: nothing")


@pytest.mark.parametrize("name", sorted(PERSONAL))
@pytest.mark.parametrize("spell", [str, str.upper])
def test_personal_columns_never_enter_a_record(tmp_path: Path, name: str, spell: Any) -> None:
    rejects = tmp_path / "rejects.jsonl"
    secret = {spell(name): "secret-1"}
    rows = [{"prompt": "a", **secret, "meta": {"deep": [secret], "kept": 1}}, {"prompt": " ", **secret}]
    (record,) = read(tmp_path / "x.jsonl", rows, on_bad_row="skip", rejects=rejects)
    assert record.fields == {"meta": {"deep": [{}], "kept": 1}}
    assert "secret" not in rejects.read_text()


# Nothing left


@pytest.mark.parametrize(
    ("keys", "reasons"),
    [
        ({"where": {"lang": "xx"}}, ["0 rows left of 4 read: 4 left out by `where`"]),
        ({"where": {"nolang": "xx"}}, ["0 rows left of 4 read: 4 left out by `where`; no row has a field nolang"]),
        (
            {"format": "preference", "on_bad_row": "skip"},
            ["chosen: missing", "chosen: missing", "chosen: missing", "4 bad"],
        ),
        ({"explode": "turns", "format": "preference", "on_bad_row": "skip"}, ["", "1 has nothing to explode (first: "]),
    ],
)
def test_when_nothing_is_left_the_first_reasons_are_said(
    tmp_path: Path, keys: dict[str, Any], reasons: list[str]
) -> None:
    with pytest.raises(InputError) as caught:
        list(read(tmp_path / "x.jsonl", ROWS, **keys))
    problems = [str(problem) for problem in caught.value.problems]
    assert len(problems) >= len(reasons)
    for reason, problem in zip(reversed(reasons), reversed(problems), strict=False):
        assert reason in problem


def test_every_row_is_counted_once(tmp_path: Path) -> None:
    """Read = kept + left out + dropped + bad, whatever the keys."""
    rows = [*ROWS, *ROWS, {"prompt": None, "lang": "en"}]
    for where, unique in ((None, None), ({"lang": {"not": None}}, "prompt"), ({"score": {"min": 2}}, "lang")):
        keys = {**({"where": where} if where else {}), **({"unique": unique} if unique else {})}
        records = read(tmp_path / "x.jsonl", rows, on_bad_row="skip", **keys)
        kept = len(list(records))
        (report,) = records.report.sources
        assert report.kept == kept
        assert report.read == len(rows) == report.kept + report.left_out + report.dropped + report.bad
        assert Counter(report.reasons).total() == report.dropped


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
@pytest.mark.parametrize(
    ("where", "of_table", "of_json"),
    [
        ({"second one": {"not": None}}, "ad", "abcd"),
        ({"second one": None}, "bc", ""),
        ({"second one": [None, "x"]}, "abc", "a"),
        ({"second one": {"not": [None, "x"]}}, "d", "bcd"),
        ({"second one": ""}, "b", "b"),
        ({"second one": {"not": ""}}, "acd", "acd"),
    ],
)
def test_an_empty_cell_of_a_table_is_nothing_there(
    tmp_path: Path, suffix: str, where: dict[str, Any], of_table: str, of_json: str
) -> None:
    """As null is; it matches the empty text, too. A text of JSON is a text."""
    path = tmp_path / f"x{suffix}"
    rows = [{"prompt": name, "second one": cell} for name, cell in zip("abcd", ("x", "", " ", "y"), strict=True)]
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "second one"], delimiter="\t" if suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    wanted = of_json if suffix == ".jsonl" else of_table
    where = {**where, "prompt": ["a", "b", "c", "d"]}
    try:
        found = "".join(
            texts(read_records([DataSource(path=str(path), where=where)], [path], "prompt", seed=0, rejects=None))
        )
    except InputError as error:
        found = "" if "0 rows left" in str(error) else pytest.fail(str(error))
    assert found == wanted


def test_each_line_of_the_rejects_file_has_the_row_that_it_is_about(tmp_path: Path) -> None:
    path, rejects = tmp_path / "x.jsonl", tmp_path / "rejects.jsonl"
    rows: list[dict[str, Any]] = [
        {"q": "tied", "g": 1, "a": "one", "s": 1},
        {"q": "tied", "g": 1, "a": "two", "s": 1},
        {"q": "good", "g": 2, "a": "one", "s": 1},
        {"q": "good", "g": 2, "a": "two", "s": 2},
        {"q": "good", "g": 2, "a": "none", "s": None},
        {"q": "alone", "g": 3, "a": "one", "s": 1},
        {"q": "bad", "g": 4, "a": "one", "s": "much"},
    ]
    mapping = {"prompt": "q", "answers": "a", "group": "g", "better": {"score": "s"}}
    records = read(path, rows, "preference", rejects, format=mapping, on_bad_row="skip")
    assert len(list(records)) == 1
    written = [json.loads(line) for line in rejects.read_text().splitlines()]
    assert len(written) == 5
    for entry in written:
        assert json.loads(entry["content"]) == rows[entry["line"] - 1], entry
    (report,) = records.report.sources
    assert report.read == report.used + report.left_out + report.dropped + report.bad
    assert "7 rows read, 2 kept as 1 preference, " in report.line()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, "4 rows read, 4 kept as 2 preferences"),
        ({"limit": 1}, "4 rows read, 2 kept as 1 preference, 2 not asked for, behind `limit`"),
        ({"where": {"g": 1}}, "4 rows read, 2 kept as 1 preference, 2 left out by `where`"),
    ],
)
def test_the_numbers_of_a_source_add_up_to_its_rows(tmp_path: Path, keys: dict[str, Any], said: str) -> None:
    rows = [{"q": f"q{group}", "g": group, "a": f"a{score}", "s": score} for group in (1, 2) for score in (1, 2)]
    mapping = {"prompt": "q", "answers": "a", "group": "g", "better": {"score": "s"}}
    records = read(tmp_path / "x.jsonl", rows, "preference", format=mapping, **keys)
    list(records)
    assert records.report.sources[0].line().endswith(f": {said}")


def test_several_comparisons_of_a_row_and_parts_of_rows_have_their_units(tmp_path: Path) -> None:
    rows = [{"q": "x?", "a": ["one", "two", "three"], "s": [1, 2, 3]}]
    mapping = {"prompt": "q", "answers": "a", "better": {"score": "s"}, "pairs": "all"}
    records = read(tmp_path / "x.jsonl", rows, "preference", format=mapping)
    list(records)
    assert records.report.sources[0].line().endswith(": 1 rows read, 1 kept as 2 preferences")
    parts = read(tmp_path / "y.jsonl", [{"prompt": ["a", "b", "c"]}], explode="prompt", where={"prompt": ["a", "b"]})
    list(parts)
    assert parts.report.sources[0].line().endswith(": 1 rows read in 3 parts, 2 kept, 1 left out by `where`")
