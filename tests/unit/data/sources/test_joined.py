"""Rows with the rest of their columns in another file, rows that are lists, and tools from a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.data.formats.formats import Want
from align.data.records import Conversation, Prompt
from align.data.sources.mixture import Records, read_records
from align.data.trees.load import _identity
from align.errors import InputError
from align.recipe.schema import DataSource


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path, want: Want, **keys: Any) -> Records:
    return read_records([DataSource.model_validate({"path": str(path), **keys})], [path], want, seed=0, rejects=None)


def said(records: Records) -> list[list[str]]:
    return [
        [message["content"] for message in record.messages] for record in records if isinstance(record, Conversation)
    ]


ASKED = [{"key": 1, "body": {"q": "one?"}, "note": "n1"}, {"key": 2, "body": {"q": "two?"}, "note": "n2"}]
ANSWERED = [{"of": "2", "reply": "second"}, {"of": "1", "reply": "first"}]
FORMAT = {"prompt": "body.q", "completion": "reply"}


def test_answers_find_their_questions(tmp_path: Path) -> None:
    """In any order; a number and the text that spells it are the same."""
    questions, answers = lines(tmp_path / "q.jsonl", ASKED), lines(tmp_path / "a.jsonl", ANSWERED)
    records = read(answers, "conversation", format=FORMAT, join={"path": str(questions), "on": {"of": "key"}})
    assert said(records) == [["two?", "second"], ["one?", "first"]]


def test_where_sees_what_was_joined_and_the_rows_own_columns_stay(tmp_path: Path) -> None:
    questions = lines(tmp_path / "q.jsonl", ASKED)
    answers = lines(
        tmp_path / "a.jsonl",
        [{"key": 1, "reply": "first", "note": "own"}, {"key": 2, "reply": "second", "note": "own"}],
    )
    join = {"path": str(questions), "on": "key"}
    records = read(answers, "conversation", format=FORMAT, join=join, where={"body.q": "two?"})
    (record,) = list(records)
    assert record.fields["note"] == "own"
    assert records.report.sources[0].told.notes == [
        f"{questions}: columns that both files have, taken from the first: note"
    ]


def test_a_row_without_a_counterpart_is_a_bad_row(tmp_path: Path) -> None:
    questions = lines(tmp_path / "q.jsonl", ASKED)
    answers = lines(tmp_path / "a.jsonl", [*ANSWERED, {"of": "3", "reply": "third"}, {"reply": "fourth"}])
    with pytest.raises(InputError) as caught:
        list(read(answers, "conversation", format=FORMAT, join={"path": str(questions), "on": {"of": "key"}}))
    assert [str(problem) for problem in caught.value.problems[:2]] == [
        f"{answers}:3 of: no row of {questions} has this key",
        f"{answers}:4 of: no row of {questions} has this key",
    ]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ([*ASKED, ASKED[0]], r"q\.jsonl:3: key '1' stands there 2 times \(lines 1, 3\)"),
        ([*ASKED, {"body": 1}], r"q\.jsonl:3 key: missing: rows are joined on it"),
        ([*ASKED, [1]], r"q\.jsonl:3: a row must be an object"),
    ],
)
def test_another_file_that_cannot_be_joined(tmp_path: Path, other: list[Any], message: str) -> None:
    questions, answers = lines(tmp_path / "q.jsonl", other), lines(tmp_path / "a.jsonl", ANSWERED)
    with pytest.raises(InputError, match=message):
        list(read(answers, "conversation", format=FORMAT, join={"path": str(questions), "on": {"of": "key"}}))


def test_encoded_data_follow_from_the_files_beside(tmp_path: Path) -> None:
    """A change in a joined file or in a file of tools makes encoded data anew."""
    answers, questions, tools = lines(tmp_path / "a.jsonl", ANSWERED), tmp_path / "q.jsonl", tmp_path / "tools.json"
    keys = {"join": {"path": str(questions), "on": {"of": "key"}}, "format": {**FORMAT, "tools": {"file": str(tools)}}}
    source = DataSource.model_validate({"path": str(answers), **keys})
    lines(questions, ASKED)
    tools.write_text("[]")
    first = _identity(source, answers)
    assert _identity(source, answers) == first
    lines(questions, ASKED[:1])
    second = _identity(source, answers)
    tools.write_text('[{"name": "f"}]')
    assert len({json.dumps(one, sort_keys=True) for one in (first, second, _identity(source, answers))}) == 3


def test_tools_from_a_file_are_those_of_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tools.json").write_text('[{"name": "look", "input_schema": {"type": "object", "properties": {}}}]')
    rows = [{"q": "a?", "a": "b"}, {"q": "c?", "a": "d"}]
    format: dict[str, Any] = {"prompt": "q", "completion": "a", "tools": {"file": "tools.json"}}
    records = list(read(lines(tmp_path / "rows.jsonl", rows), "conversation", format=format))
    assert [[tool["function"]["name"] for tool in record.tools] for record in records] == [["look"], ["look"]]
    (tmp_path / "tools.json").write_text("tools")
    with pytest.raises(InputError, match=r"tools\.json: expected JSON"):
        list(read(tmp_path / "rows.jsonl", "conversation", format=format))
    with pytest.raises(InputError, match=r"no such file or folder: nothing\.json"):
        list(read(tmp_path / "rows.jsonl", "conversation", format={**format, "tools": {"file": "nothing.json"}}))


LISTS = [[{"from": "human", "value": f"{n}?"}, {"truth": {"value": str(n)}}] for n in (1, 2)]
OF_LISTS = {"prompt": "[0].value", "answer": "[-1].truth.value"}


@pytest.mark.parametrize("kind", ["json", "jsonl", "one line"])
def test_rows_that_are_lists(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{'json' if kind == 'json' else 'jsonl'}"
    rows = LISTS[:1] if kind == "one line" else LISTS
    path.write_text(json.dumps(rows) if kind == "json" else "".join(json.dumps(row) + "\n" for row in rows))
    records = list(read(path, "prompt", format=OF_LISTS))
    assert [
        (record.prompt[0]["content"], record.fields["answer"]) for record in records if isinstance(record, Prompt)
    ] == [(f"{n}?", str(n)) for n in (1, 2)[: len(rows)]]


def test_lists_among_objects_are_bad_rows_unless_places_begin_with_an_index(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", [{"prompt": "a"}, LISTS[0]])
    with pytest.raises(InputError, match=r"rows\.jsonl:2: a row must be an object, found a list; .*`\[0\]\.value`"):
        list(read(path, "prompt"))


@pytest.mark.parametrize("where", [{"spam": False}, {"spam": {"not": True}}, {"spam": False, "note": {"not": None}}])
def test_a_row_that_its_own_columns_leave_out_needs_no_counterpart(tmp_path: Path, where: dict[str, Any]) -> None:
    questions = lines(tmp_path / "q.jsonl", ASKED)
    rows = [*({**row, "spam": False} for row in ANSWERED), {"of": "3", "reply": "third", "spam": True}]
    answers = lines(tmp_path / "a.jsonl", rows)
    records = read(
        answers, "conversation", format=FORMAT, join={"path": str(questions), "on": {"of": "key"}}, where=where
    )
    assert said(records) == [["two?", "second"], ["one?", "first"]]
    assert records.report.sources[0].left_out == 1


def test_a_condition_on_the_other_files_columns_excuses_no_row_from_its_counterpart(tmp_path: Path) -> None:
    questions = lines(tmp_path / "q.jsonl", ASKED)
    answers = lines(tmp_path / "a.jsonl", [*ANSWERED, {"of": "3", "reply": "third"}])
    with pytest.raises(InputError, match="no row of"):
        list(
            read(
                answers,
                "conversation",
                format=FORMAT,
                join={"path": str(questions), "on": {"of": "key"}},
                where={"note": "n1"},
            )
        )


def test_an_empty_cell_of_the_other_file_is_nothing_there(tmp_path: Path) -> None:
    questions = tmp_path / "q.csv"
    questions.write_text("key,q,note\n1,one?,n1\n2,two?,\n")
    answers = lines(tmp_path / "a.jsonl", ANSWERED)
    join = {"path": str(questions), "on": {"of": "key"}}
    records = read(
        answers, "conversation", format={"prompt": "q", "completion": "reply"}, join=join, where={"note": {"not": None}}
    )
    assert said(records) == [["one?", "first"]]
