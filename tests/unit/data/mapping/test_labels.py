"""Labels of single answers that are words or other values: `better: {label: ..., good: [...], bad: [...]}`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from align.data.formats.formats import Want
from align.data.formats.proposed import line_to_write
from align.data.records import Conversation, Preference, Prompt, Unpaired
from align.data.sources.mixture import Records, read_records
from align.errors import InputError
from align.recipe.language.yaml_tree import SourcePlace, parse_value
from align.recipe.rows.mapping import Better
from align.recipe.schema import DataSource

THUMB = {"label": "thumb", "good": ["up"], "bad": ["down"]}
THUMBS = {"prompt": "asked", "completion": "reply", "better": THUMB}


def read(folder: Path, rows: list[Any], want: Want, **keys: Any) -> Records:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_records([DataSource.model_validate({"path": str(path), **keys})], [path], want, seed=0, rejects=None)


def row(thumb: Any, number: int = 0, asked: str = "a?") -> dict[str, Any]:
    return {"asked": asked, "reply": f"reply {number}", "thumb": thumb}


def labels(folder: Path, rows: list[Any], format: Any = None) -> list[bool]:
    return [one.label for one in read(folder, rows, "unpaired", format=format or THUMBS) if isinstance(one, Unpaired)]


def test_words_stand_for_good_and_bad(tmp_path: Path) -> None:
    rows = [row(thumb, number) for number, thumb in enumerate(["up", "down", " UP ", "Down"])]
    assert labels(tmp_path, rows) == [True, False, True, False]


def test_so_do_numbers_and_several_words(tmp_path: Path) -> None:
    rows = [row(thumb, number) for number, thumb in enumerate([1, -1, 1.0, "-1", "5", "4"])]
    better = {"label": "thumb", "good": [1, 4, "5"], "bad": [-1]}
    assert labels(tmp_path, rows, {**THUMBS, "better": better}) == [True, False, True, False, True, True]


@pytest.mark.parametrize("empty", [None, "", "  "])
@pytest.mark.parametrize("better", [THUMB, {"label": "thumb"}])
def test_an_answer_that_nobody_judged_is_left_out_and_counted(empty: Any, better: Any, tmp_path: Path) -> None:
    good = "up" if "good" in better else True
    records = read(tmp_path, [row(good), row(empty)], "unpaired", format={**THUMBS, "better": better})
    assert len(list(records)) == 1
    assert records.report.sources[0].reasons == {"nobody judged it": 1}


@pytest.mark.parametrize("want", ["unpaired", "preference"])
@pytest.mark.parametrize("value", ["sideways", True, 1, "true"])
def test_any_other_value_is_an_error_that_names_it_and_what_is_allowed(value: Any, want: Want, tmp_path: Path) -> None:
    rows = [row("up", 1), row("down", 2), row(value, 3)]
    with pytest.raises(InputError) as caught:
        list(read(tmp_path, rows, want, format=THUMBS))
    (problem,) = caught.value.problems
    assert (problem.line, problem.key) == (3, "thumb")
    assert problem.message == f"{str(value)!r} is neither good (up) nor bad (down)"


def test_a_word_without_good_and_bad_says_that_they_are_missing(tmp_path: Path) -> None:
    said = r"thumb: 'up' is neither true nor false; `good: \[\.\.\.\]` and `bad: \[\.\.\.\]` list other values"
    with pytest.raises(InputError, match=said):
        list(read(tmp_path, [row("up")], "unpaired", format={**THUMBS, "better": {"label": "thumb"}}))
    with pytest.raises(InputError, match=r"label: expected true or false; a mapping reads other values: `better:"):
        list(read(tmp_path, [{"prompt": "a?", "completion": "b", "label": "up"}], "unpaired", format="unpaired"))


@pytest.mark.parametrize(
    ("better", "message"),
    [
        ({"label": "t", "good": ["up"]}, "belong together"),
        ({"label": "t", "bad": ["down"]}, "belong together"),
        ({"label": "t", "good": ["up"], "bad": ["Up "]}, "both list up"),
        ({"winner": "t", "good": ["up"], "bad": ["down"]}, "`good` belongs to `label`"),
    ],
)
def test_what_must_not_be_written(better: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Better.model_validate(better)


def test_messages_answers_in_a_list_and_groups(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]
    place = {"label": "feedback.thumb", "good": ["up"], "bad": ["down"]}
    rows: list[Any] = [{"messages": chat, "feedback": {"thumb": "down"}}]
    assert labels(tmp_path, rows, {"messages": "messages", "better": place}) == [False]
    rows = [{"q": "a?", "tries": [{"text": "x", "thumb": "down"}, {"text": "y", "thumb": "up"}]}]
    inside = {"prompt": "q", "answers": "tries[*].text", "better": {**THUMB, "label": "tries[*].thumb"}}
    (one,) = read(tmp_path, rows, "preference", format=inside)
    assert isinstance(one, Preference)
    assert (one.chosen[0]["content"], one.rejected[0][0]["content"]) == ("y", "x")
    grouped = {"prompt": "asked", "answers": "reply", "group": "asked", "better": THUMB}
    (one,) = read(tmp_path, [row("down", 1), row("up", 2)], "preference", format=grouped)
    assert isinstance(one, Preference)
    assert (one.chosen[0]["content"], one.rejected[0][0]["content"]) == ("reply 2", "reply 1")


def test_conversations_are_the_good_ones_alone(tmp_path: Path) -> None:
    rows = [row("up", 1), row("down", 2), row("", 3)]
    found = list(read(tmp_path, rows, "conversation", format=THUMBS, where={"thumb": "up"}))
    assert [one.messages[-1]["content"] for one in found if isinstance(one, Conversation)] == ["reply 1"]
    for where in ({}, {"thumb": "down"}, {"thumb": ["up", "down"]}, {"asked": "a?"}):
        with pytest.raises(InputError, match="answers labelled false must not be trained on"):
            list(read(tmp_path, rows, "conversation", format=THUMBS, where=where))


@pytest.mark.parametrize("where", [{"thumb": ["up", "down"]}, {"thumb": {"not": None}}])
def test_a_condition_that_would_keep_bad_ones_is_refused_whatever_the_first_rows_are(
    where: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="answers labelled false must not be trained on"):
        list(read(tmp_path, [row("up", 1)], "conversation", format=THUMBS, where=where))
    good = {**THUMBS, "better": {**THUMB, "good": ["up", "down"], "bad": ["sideways"]}}
    if where == {"thumb": ["up", "down"]}:
        assert len(list(read(tmp_path, [row("up", 1)], "conversation", format=good, where=where))) == 1


@pytest.mark.parametrize(
    ("better", "thumb", "where"),
    [
        (THUMB, "up", "{thumb: up}"),
        ({**THUMB, "good": ["up", "great"]}, "up", "{thumb: [up, great]}"),
        ({"label": "thumb"}, True, "{thumb: true}"),
    ],
)
def test_the_condition_in_the_error_is_the_one_that_keeps_the_good_ones(
    better: dict[str, Any], thumb: Any, where: str, tmp_path: Path
) -> None:
    format = {**THUMBS, "better": better}
    with pytest.raises(InputError, match="answers labelled false must not be trained on; `where: ") as refused:
        list(read(tmp_path, [row(thumb)], "conversation", format=format))
    assert f"`where: {where}` keeps the good ones" in str(refused.value)
    condition = parse_value(where, SourcePlace("where"), [])
    assert condition is not None
    assert len(list(read(tmp_path, [row(thumb)], "conversation", format=format, where=condition.plain()))) == 1


def test_prompts_need_no_label(tmp_path: Path) -> None:
    rows = [row("", 1, "a?"), row("sideways", 2, "b?")]
    found = list(read(tmp_path, rows, "prompt", format=THUMBS))
    assert [one.prompt[-1]["content"] for one in found if isinstance(one, Prompt)] == ["a?", "b?"]


@pytest.mark.parametrize(
    ("rows", "mapping"),
    [
        ([{"question": "a?", "reply": "b", "thumb": thumb} for thumb in ("Down", "Up", "")], ("Up", "Down")),
        ([{"question": "a?", "reply": "b", "thumb": "dislike"}], ("like", "dislike")),
        ([{"question": "a?", "reply": "b", "thumb": thumb} for thumb in (1, -1)], (1, -1)),
    ],
)
def test_the_line_to_write(rows: list[Any], mapping: tuple[Any, Any], tmp_path: Path) -> None:
    line = line_to_write(rows)
    node = parse_value(line.partition("format: ")[2], SourcePlace("line"), [])
    assert node is not None
    good, bad = mapping
    better = {"label": "thumb", "good": [good], "bad": [bad]}
    assert node.plain() == {"prompt": "question", "completion": "reply", "better": better}
    assert labels(tmp_path, rows, node.plain()) == [
        str(one["thumb"]) == str(good) for one in rows if one["thumb"] != ""
    ]


WORDS = ["up", "down", "ok", "bad answer", "1", "-1", "x"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.permutations(WORDS), st.integers(1, 6), st.lists(st.integers(0, 6), min_size=1, max_size=12), st.data())
def test_never_swapped(tmp_path: Path, words: list[str], cut: int, drawn: list[int], data: st.DataObject) -> None:
    """Whatever the words are, an answer is labelled, and compared, as its word says."""
    good, bad = words[:cut], words[cut:]
    better = {"label": "thumb", "good": good, "bad": bad}
    rows = []
    for number, which in enumerate(drawn):
        spelled = data.draw(st.sampled_from([words[which], words[which].upper(), f" {words[which]} "]))
        rows.append({**row(spelled, number), "is": words[which] in good})
    found = list(read(tmp_path, rows, "unpaired", format={**THUMBS, "better": better}))
    assert [one.label for one in found if isinstance(one, Unpaired)] == [one["is"] for one in rows]
    if len({one["is"] for one in rows}) == 2:
        is_good = {one["reply"]: one["is"] for one in rows}
        for pair in read(tmp_path, rows, "preference", format={**THUMBS, "better": better}):
            assert isinstance(pair, Preference)
            assert is_good[pair.chosen[0]["content"]]
            assert not any(is_good[one[0]["content"]] for one in pair.rejected)
