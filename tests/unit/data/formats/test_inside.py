"""Judgements inside objects and lists: found as those in a column are, and never passed over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.data.formats.detect import detect_rows
from align.data.formats.formats import Want
from align.data.formats.inside import inside
from align.data.formats.proposed import line_to_write
from align.data.mapping.places import find
from align.data.records import Preference, Votes
from align.data.sources.mixture import Records, read_records
from align.data.strict_json import RowError
from align.errors import InputError
from align.recipe.language.yaml_tree import SourcePlace, parse_value
from align.recipe.schema import DataSource

WANTS: tuple[Want, ...] = ("conversation", "preference", "prompt")


def read(folder: Path, rows: list[Any], want: Want, **keys: Any) -> Records:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_records([DataSource.model_validate({"path": str(path), **keys})], [path], want, seed=0, rejects=None)


def said(line: str) -> Any:
    """The value of a line `format: ...`, as a recipe reads it."""
    node = parse_value(line.partition("format: ")[2], SourcePlace("line"), [])
    assert node is not None
    return node.plain()


def proposed_in(message: str) -> Any:
    return said("format: " + message.partition("`format: ")[2].partition("`")[0])


def asks(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def judged(number: int, votes: list[str], asked: dict[str, Any]) -> dict[str, Any]:
    return {
        "nr": number,
        **asked,
        "left": {"model": "m1", "text": f"left {number}"},
        "right": {"model": "m2", "text": f"right {number}"},
        "judgements": [{"by": f"judge {i}", "vote": vote} for i, vote in enumerate(votes)],
    }


def log(asked: str, number: int = 1, votes: tuple[str, ...] = ("left", "tie", "left")) -> dict[str, Any]:
    question = f"question {number}?"
    return judged(number, list(votes), {asked: question if asked == "prompt" else asks(question)})


@pytest.mark.parametrize("want", WANTS)
@pytest.mark.parametrize("asked", ["messages", "log", "prompt"])
def test_votes_inside_a_list_are_not_passed_over_and_the_line_to_write_reads_them(
    asked: str, want: Want, tmp_path: Path
) -> None:
    rows = [log(asked), log(asked, 2, ("right", "right", "left")), log(asked, 3, ("tie",))]
    with pytest.raises(InputError) as caught:
        list(read(tmp_path, rows, want))
    (problem,) = caught.value.problems
    assert problem.line == 1
    mapping = proposed_in(str(problem))
    assert mapping == {
        "prompt": asked,
        "answers": ["left.text", "right.text"],
        "better": {"winner": "judgements[*].vote", "values": ["left", "right"], "ties": ["tie"]},
    }
    records = read(tmp_path, rows, "preference", format=mapping)
    first, second = records
    assert isinstance(first, Preference)
    assert isinstance(second, Preference)
    assert [one.prompt[-1]["content"] for one in (first, second)] == ["question 1?", "question 2?"]
    assert (first.chosen[0]["content"], first.rejected[0][0]["content"]) == ("left 1", "right 1")
    assert (second.chosen[0]["content"], second.rejected[0][0]["content"]) == ("right 2", "left 2")
    assert first.votes == (Votes(2.5, 0.5),)
    assert second.votes == (Votes(2.0, 1.0),)
    assert records.report.sources[0].reasons == {"a tie": 1}


@pytest.mark.parametrize(
    ("beside", "place", "want"),
    [
        ({"review": {"winner": "a"}}, "review.winner", "prompt"),
        ({"review": {"by": [{"preferred": "a"}]}}, r"review.by[*].preferred", "prompt"),
        ({"review": json.dumps({"verdict": "b"})}, "review.verdict", "prompt"),
        ({"review": json.dumps([{"vote": "b"}])}, r"review[*].vote", "prompt"),
        ({"pair": {"chosen": "yes, do", "rejected": "no"}}, "pair.chosen", "prompt"),
        ({"review": {"label": True}}, "review.label", "conversation"),
        ({"review": {"label": "good"}}, "review.label", "conversation"),
        ({"review": {"score": 0.5}}, "review.score", "conversation"),
        ({"feedback": {"thumb": "up"}}, "feedback.thumb", "conversation"),
        ({"feedback": [{"thumbs_up": False}]}, r"feedback[*].thumbs_up", "conversation"),
        ({"thumb": "down"}, "thumb", "conversation"),
        ({"verdict": "left"}, "verdict", "prompt"),
        ({"label": "bad"}, "label", "conversation"),
        ({"tries": {"left": {"text": "one"}, "right": {"text": "two"}}}, "tries.left.text", "prompt"),
    ],
)
def test_each_is_refused_by_its_place(beside: dict[str, Any], place: str, want: Want, tmp_path: Path) -> None:
    said = [{"role": "assistant", "content": "boil it"}]
    row: dict[str, Any] = {"messages": [*asks("an egg?"), *(said if want == "conversation" else [])], **beside}
    with pytest.raises(InputError) as caught:
        list(read(tmp_path, [row], want))
    (problem,) = caught.value.problems
    assert problem.message.startswith(f"{place} would stay unread, and may say which answers are good; ")
    name = next(iter(beside))
    assert problem.message.endswith(f"ignore: [{name}]")
    assert len(list(read(tmp_path, [row], want, ignore=[name]))) == 1
    assert len(list(read(tmp_path, [row], want, format="messages"))) == 1


@pytest.mark.parametrize(
    "beside",
    [
        {"openai_moderation": [{"categories": {"hate": False}, "category_scores": {"hate": 0.1}, "flagged": False}]},
        {"metadata": {"source": "x", "length": 12, "label": "math", "votes": None}},
        {"metadata": {"upvotes": 3, "preferences": "dark mode"}},
        {"extra": json.dumps({"label": {"topic": ["art"]}})},
        {"extra": '{"vote": broken'},
        {"history": [{"role": "user", "content": "hm", "vote": "a"}]},
        {"label": "math"},
        {"tags": ["chosen", "good"]},
    ],
)
def test_what_judges_nothing_is_passed_over(beside: dict[str, Any], tmp_path: Path) -> None:
    row = {"messages": [*asks("an egg?"), {"role": "assistant", "content": "boil it"}], **beside}
    assert len(list(read(tmp_path, [row], "conversation"))) == 1


def test_a_row_that_comes_late_is_watched_as_well(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"{i}?"} for i in range(30)]
    rows.append({"prompt": "late?", "review": [{"vote": "left"}]})
    with pytest.raises(InputError, match=r"rows\.jsonl:31: review\[\*\]\.vote would stay unread"):
        list(read(tmp_path, rows, "prompt"))
    rows = [{"prompt": f"{i}?", "review": {"vote": None}} for i in range(30)] + [
        {"prompt": "late?", "review": {"vote": "left"}}
    ]
    with pytest.raises(InputError, match=r"rows\.jsonl:31: review\.vote would stay unread"):
        list(read(tmp_path, rows, "prompt"))


LINES: list[tuple[dict[str, Any], dict[str, Any], tuple[str, list[str]]]] = [
    (
        {"q": {"n": 1}, "prompt": "p?", "pair": {"chosen": "good one", "rejected": "bad one"}},
        {"prompt": "prompt", "chosen": "pair.chosen", "rejected": "pair.rejected"},
        ("good one", ["bad one"]),
    ),
    (
        {"prompt": "p?", "a": {"text": "bad one", "score": 1}, "b": {"text": "good one", "score": 2}},
        {"prompt": "prompt", "answers": ["a.text", "b.text"], "better": {"score": ["a.score", "b.score"]}},
        ("good one", ["bad one"]),
    ),
    (
        {"prompt": "p?", "tries": [{"text": "good one", "rank": 1}, {"text": "bad one", "rank": 2}]},
        {"prompt": "prompt", "answers": "tries[*].text", "better": {"score": "tries[*].rank", "order": "low"}},
        ("good one", ["bad one"]),
    ),
    (
        {"prompt": "p?", "tries": [{"text": "bad one", "chosen": False}, {"text": "good one", "chosen": True}]},
        {"prompt": "prompt", "answers": "tries[*].text", "better": {"label": "tries[*].chosen"}},
        ("good one", ["bad one"]),
    ),
    (
        {"prompt": "p?", "answers": {"A": "bad one", "B": "good one"}, "review": {"winner": "B"}},
        {
            "prompt": "prompt",
            "answers": ["answers.A", "answers.B"],
            "better": {"winner": "review.winner", "values": ["A", "B"], "ties": ["same"]},
        },
        ("good one", ["bad one"]),
    ),
    (
        {"prompt": "p?", "answer_1": {"body": "good one"}, "answer_2": {"body": "bad one"}, "winner": "answer_1"},
        {
            "prompt": "prompt",
            "answers": ["answer_1.body", "answer_2.body"],
            "better": {"winner": "winner", "values": ["answer_1", "answer_2"], "ties": ["same"]},
        },
        ("good one", ["bad one"]),
    ),
]


@pytest.mark.parametrize(("row", "mapping", "pair"), LINES, ids=[str(i) for i in range(len(LINES))])
def test_the_line_to_write_reads_answers_inside_objects(
    row: dict[str, Any], mapping: dict[str, Any], pair: tuple[str, list[str]], tmp_path: Path
) -> None:
    assert said(line_to_write([row])) == mapping
    (record,) = read(tmp_path, [row], "preference", format=mapping)
    assert isinstance(record, Preference)
    assert (record.chosen[0]["content"], [one[0]["content"] for one in record.rejected]) == pair


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-9, 9), st.text("ab,'", max_size=6)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["a", "b", "x.y", "c[0]", "d e"]), inner, max_size=3),
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(JSON)
def test_every_place_that_is_found_is_one_that_a_recipe_may_name(value: Any) -> None:
    row = {"c": value}
    for place, _, held in inside("c", value):
        found = find(row, place)
        assert held in found if "[*]" in place else found == held


NAMES = st.sampled_from(["winner", "vote", "preferred", "verdict", "final_vote", "human_preference"])


@settings(max_examples=200, deadline=None)
@given(
    NAMES,
    st.sampled_from(["left", "A", "1", "model_b", "tie"]),
    st.lists(st.sampled_from(["object", "list", "json"]), min_size=1, max_size=3),
    st.sampled_from(["prompt", "messages"]),
    st.sampled_from(WANTS),
)
def test_no_judgement_is_passed_over_however_it_is_wrapped(
    name: str, vote: str, wraps: list[str], asked: str, want: Want
) -> None:
    value: Any = {name: vote}
    for wrap in wraps:
        value = {"inner": value} if wrap == "object" else [value] if wrap == "list" else value
    if wraps[-1] == "json":
        value = json.dumps(value)
    row = {asked: asks("an egg?") if asked == "messages" else "an egg?", "notes": value}
    with pytest.raises(RowError, match=rf"notes\S*\.{name} would stay unread"):
        detect_rows([row], want)
