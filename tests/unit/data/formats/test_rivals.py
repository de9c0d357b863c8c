"""Two shapes that fit rows equally well: refused with both lines to write, where they would give different records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.data.formats.formats import Want
from align.data.records import Conversation, Preference, Record
from align.data.sources.mixture import read_records
from align.errors import InputError
from align.recipe.language.yaml_tree import SourcePlace, parse_value
from align.recipe.schema import DataSource


def read(folder: Path, rows: list[Any], want: Want, **keys: Any) -> list[Record]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = DataSource.model_validate({"path": str(path), **keys})
    return list(read_records([source], [path], want, seed=0, rejects=None))


def chat(*texts: str) -> list[dict[str, str]]:
    return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]


def proposed(error: InputError) -> list[Any]:
    """The values of both lines."""
    (problem,) = error.problems
    start = "fits two shapes that would give different records; say which: "
    assert problem.message.startswith(start)
    lines = problem.message.removeprefix(start).split(" or ")
    nodes = [parse_value(line.partition("format: ")[2], SourcePlace("line"), []) for line in lines]
    return [node.plain() for node in nodes if node is not None]


BOTH = {
    "prompt": "2+2?",
    "pos_resp": "4",
    "neg_resp": "5",
    "response_1": "five",
    "response_2": "four",
    "preference_strength": 2,
}
"""CValues' columns and HelpSteer2's."""


def test_two_presets_are_refused_and_each_line_reads_the_rows(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, [BOTH], "preference")
    lines = proposed(caught.value)
    assert sorted(lines) == ["cvalues", "helpsteer2_preference"]
    chosen = {}
    for line in lines:
        (one,) = read(tmp_path, [BOTH], "preference", format=line)
        assert isinstance(one, Preference)
        chosen[line] = one.chosen[0]["content"]
    assert chosen == {"cvalues": "4", "helpsteer2_preference": "four"}


def test_they_are_not_where_only_the_prompt_is_wanted(tmp_path: Path) -> None:
    assert len(read(tmp_path, [BOTH], "prompt")) == 1


def test_a_shape_that_cannot_read_the_rows_does_not_fit_them(tmp_path: Path) -> None:
    (one,) = read(tmp_path, [{**BOTH, "neg_resp": ""}], "preference")
    assert isinstance(one, Preference)
    assert one.chosen[0]["content"] == "four"


def judged(first: str, second: str) -> dict[str, Any]:
    """CValues' columns and SHP's, which prefers the first answer."""
    answers = {"pos_resp": "4", "neg_resp": "5", "human_ref_A": first, "human_ref_B": second}
    return {"prompt": "2+2?", "history": "2+2?", **answers, "labels": 1}


def test_nor_where_both_say_the_same_and_a_later_row_may_tell_them_apart(tmp_path: Path) -> None:
    (one,) = read(tmp_path, [judged("4", "5")], "preference")
    assert isinstance(one, Preference)
    assert one.chosen[0]["content"] == "4"
    with pytest.raises(InputError, match="fits two shapes"):
        read(tmp_path, [judged("4", "5"), judged("5", "4")], "preference")


@pytest.mark.parametrize("want", ["conversation", "prompt"])
def test_two_columns_of_messages(want: Want, tmp_path: Path) -> None:
    row = {"messages": chat("a?", "b"), "dialogue": chat("c?", "d")}
    with pytest.raises(InputError) as caught:
        read(tmp_path, [row], want)
    lines = proposed(caught.value)
    assert lines == ["messages", {"messages": "dialogue"}]
    said = []
    for line in lines:
        (one,) = read(tmp_path, [row], want, format=line)
        messages = one.messages if isinstance(one, Conversation) else getattr(one, "prompt", ())
        said.append(messages[0]["content"])
    assert said == ["a?", "c?"]
    assert len(read(tmp_path, [row], want, ignore=["dialogue"])) == 1


@pytest.mark.parametrize(
    "beside", [chat("a?", "b"), chat("a?"), [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}], [], None]
)
def test_a_column_that_repeats_the_messages_is_no_other_shape(beside: Any, tmp_path: Path) -> None:
    assert len(read(tmp_path, [{"messages": chat("a?", "b"), "conversation": beside}], "conversation")) == 1
