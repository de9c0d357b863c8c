"""The mapping of a data source: places, every way in which a row tells what is better, and errors with their places."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from align.data.formats.formats import RowError, Want, converter
from align.data.mapping import comparisons, labelled
from align.data.mapping.better import compare, number
from align.data.mapping.places import find, find_text, template
from align.data.records import Conversation, Graded, Messages, Origin, Preference, Prompt, Record, Unpaired
from align.data.rows import LeftOut
from align.data.sources.mixture import Records, read_records
from align.data.sources.readers import Row
from align.errors import InputError
from align.recipe.rows.places import place
from align.recipe.schema import DataSource

ORIGIN = Origin("rows.jsonl", 7)


def source(format: Any = None, **keys: Any) -> DataSource:
    return DataSource.model_validate(
        {"path": "rows.jsonl", **({"format": format} if format is not None else {}), **keys}
    )


def convert(row: dict[str, Any], format: Any, want: Want = "preference") -> tuple[Record, ...]:
    return converter(source(format), want)(Row(row, ORIGIN))


def pair(row: dict[str, Any], format: Any) -> tuple[str, list[str]]:
    (record,) = convert(row, format)
    assert isinstance(record, Preference)
    return text(record.chosen), [text(one) for one in record.rejected]


def text(messages: Messages) -> str:
    return messages[-1]["content"]


def refused(row: dict[str, Any], format: Any, want: Want = "preference") -> tuple[str | None, str]:
    with pytest.raises(RowError) as caught:
        convert(row, format, want)
    return caught.value.field, caught.value.message


def read(folder: Path, rows: list[Any], want: Want, rejects: Path | None = None, **keys: Any) -> Records:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_records([DataSource.model_validate({"path": str(path), **keys})], [path], want, seed=0, rejects=rejects)


# Places


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("a", 1),
        ("b.c", 2),
        ("b.d[0]", 3),
        ("b.d[-1]", 5),
        ("b.d[:2]", [3, 4]),
        ("b.d[*]", [3, 4, 5]),
        ("e[*].f", ["x", None, "z"]),
        ("e[1].g[*].h", [7, 8]),
        ("e[*].g[*].h", [None, 7, 8, None]),
        ("e[k=two].g[0].h", [7]),
        ("e[k=two][0].k", "two"),
        ("name.with.dots", "whole"),
        ("o.p.q", "joined"),
        ("hy-phen", "yes"),
        ("what? [x]", "column"),
        ("json.k[0]", "in"),
        ("nothing", None),
        ("a.b", None),
        ("b.d[9]", None),
        ("e.0.f", "x"),
    ],
)
def test_places(where: str, value: Any) -> None:
    row = {
        "a": 1,
        "b": {"c": 2, "d": [3, 4, 5]},
        "e": [{"f": "x"}, {"k": "two", "g": [{"h": 7}, {"h": 8}]}, {"f": "z"}],
        "name.with.dots": "whole",
        "o": {"p.q": "joined"},
        "hy-phen": "yes",
        "what? [x]": "column",
        "json": '{"k": ["in"]}',
    }
    assert find(row, where if where == "what? [x]" else place(where)) == value


@pytest.mark.parametrize("wrong", ["", "a..b", ".a", "a[", "a[x", "a]", "a[*"])
def test_what_is_no_place(wrong: str) -> None:
    with pytest.raises(ValueError, match="place"):
        place(wrong)


@pytest.mark.parametrize(
    ("row", "result"),
    [
        ({"t": "T", "p": "P"}, "T\n\nP\n\nTL;DR:"),
        ({"t": "", "p": "P"}, "P\n\nTL;DR:"),
        ({"t": "T", "p": None}, "T\n\nTL;DR:"),
        ({"t": 72.0, "p": True}, "72\n\ntrue\n\nTL;DR:"),
    ],
)
def test_texts_with_places(row: dict[str, Any], result: str) -> None:
    assert find_text(row, template("{t}\n\n{p}\n\nTL;DR:")) == result


# Better


ASKED = {"prompt": "q", "answers": ["a", "b"]}


@pytest.mark.parametrize(
    ("better", "cell", "chosen"),
    [
        ({"winner": "w"}, 0, "x"),
        ({"winner": "w"}, 1.0, "y"),
        ({"winner": "w"}, " 1 ", "y"),
        ({"winner": "w", "values": ["A", "B"]}, " b", "y"),
        ({"winner": "w", "values": [1, 0]}, 1, "x"),
        ({"winner": "w", "values": [True, False]}, False, "y"),
        ({"winner": "w"}, [1, 1, 0], "y"),
        ({"signed": "w", "negative": 0}, -2, "x"),
        ({"signed": "w", "negative": 0}, 2, "y"),
        ({"signed": "w", "negative": 1}, -2, "y"),
        ({"score": "w"}, [1, 2], "y"),
        ({"score": "w", "order": "low"}, [1, 2], "x"),
        ({"score": "w"}, ["3.5", "2"], "x"),
        ({"ranking": "w", "names": ["A", "B"]}, "B>A", "y"),
        ({"ranking": "w", "names": ["A", "B"]}, ["A>B", "A=B"], "x"),
        ({"ranking": "w"}, [1, 0], "y"),
        ({"position": True}, None, "x"),
        ({"label": "w"}, [False, True], "y"),
    ],
)
def test_every_way_to_tell_what_is_better(better: dict[str, Any], cell: Any, chosen: str) -> None:
    other = {"x": "y", "y": "x"}[chosen]
    assert pair(
        {"q": "?", "a": "x", "b": "y", "w": cell}, {"prompt": "q", "answers": ["a", "b"], "better": better}
    ) == (chosen, [other])


@pytest.mark.parametrize(
    ("better", "cell", "reason"),
    [
        ({"winner": "w", "values": ["A", "B"], "ties": ["same"]}, "Same ", "a tie"),
        ({"winner": "w", "values": ["A", "B"], "ties": ["both bad"]}, "both bad", "a tie: both answers are bad"),
        ({"winner": "w", "values": ["A", "B"]}, "", "nobody judged it"),
        ({"winner": "w"}, None, "nobody judged it"),
        ({"winner": "w"}, [0, 1], "a tie"),
        ({"signed": "w", "negative": 0}, 0, "a tie"),
        ({"signed": "w", "negative": 0}, None, "nobody judged it"),
        ({"score": "w"}, [2, 2.0], "a tie"),
        ({"score": "w"}, [None, "N/A"], "no score"),
        ({"score": "w"}, [1, None], "only one answer"),
        ({"ranking": "w", "names": ["A", "B"]}, "A=B", "a tie"),
        ({"label": "w"}, [True, True], "a tie"),
    ],
)
def test_rows_that_compare_nothing_are_dropped_with_their_reason(
    better: dict[str, Any], cell: Any, reason: str
) -> None:
    with pytest.raises(LeftOut) as caught:
        convert({"q": "?", "a": "x", "b": "y", "w": cell}, {"prompt": "q", "answers": ["a", "b"], "better": better})
    assert caught.value.message == reason


@pytest.mark.parametrize(
    ("better", "cell", "field", "message"),
    [
        ({"winner": "w", "values": ["A", "B"], "ties": ["same"]}, "C", "w", "'C' is none of A, B, same"),
        ({"winner": "w"}, 2, "w", "'2' is none of 0, 1; `values: [1, 2]` says which answer it names"),
        ({"winner": "w"}, "A", "w", "'A' is none of 0, 1; `values: [A, B]` says which answer it names"),
        ({"winner": "w"}, "right", "w", "'right' is none of 0, 1; `values: [left, right]` says which answer it names"),
        (
            {"winner": "w"},
            "x",
            "w",
            "'x' is none of 0, 1; `values: [...]`, a name for each answer, says which answer it names",
        ),
        ({"signed": "w", "negative": 0}, "much", "w", "expected a number, found 'much'"),
        ({"score": "w"}, [1], "w", "1 scores for 2 answers"),
        ({"score": "w"}, [1, "two"], "w (1)", "expected a number, found 'two'"),
        ({"ranking": "w", "names": ["A", "B"]}, "A>C", "w", "'C' is none of A, B"),
        ({"ranking": "w"}, "B>A", "w", "'B' is none of 0, 1; `names: [A, B]` says what it calls the answers"),
        ({"ranking": "w"}, ["B", "A"], "w", "'B' is none of 0, 1; `names: [A, B]` says what it calls the answers"),
        (
            {"ranking": "w", "names": ["A", "B"]},
            "A, b",
            "w",
            "'A, b' is none of A, B; in a text only > and = stand between the answers, as in A>B=C",
        ),
        ({"ranking": "w", "names": ["good one", "bad one"]}, "no one", "w", "'no one' is none of good one, bad one"),
        (
            {"label": "w"},
            [True, "maybe"],
            "w (1)",
            "'maybe' is neither true nor false; `good: [...]` and `bad: [...]` list other values",
        ),
    ],
)
def test_judgements_that_cannot_be_read_are_bad_rows(
    better: dict[str, Any], cell: Any, field: str | None, message: str
) -> None:
    row = {"q": "?", "a": "x", "b": "y", "w": cell}
    assert refused(row, {"prompt": "q", "answers": ["a", "b"], "better": better}) == (field, message)


@pytest.mark.parametrize("better", [{"winner": "w"}, {"ranking": "w", "names": ["A", "B"]}, {"score": "w"}])
def test_where_no_answers_stand_the_answers_are_to_blame(better: dict[str, Any]) -> None:
    format = {"prompt": "q", "answers": "said[*]", "better": better}
    assert refused({"q": "?", "w": "B", "said": {"A": "x"}}, format) == (
        "said[*]",
        "expected a list of answers, found an object",
    )
    with pytest.raises(LeftOut, match="no answers"):
        convert({"q": "?", "w": "B", "said": []}, format)


def test_the_place_of_a_bad_judgement(tmp_path: Path) -> None:
    rows = [{"q": "?", "a": "x", "b": "y", "which_better": value} for value in ("A", "C", "b ")]
    better = {"winner": "which_better", "values": ["A", "B"], "ties": ["same"]}
    with pytest.raises(InputError) as caught:
        list(read(tmp_path, rows, "preference", format={"prompt": "q", "answers": ["a", "b"], "better": better}))
    assert str(caught.value.problems[0]).startswith(
        f"{tmp_path / 'rows.jsonl'}:2 which_better: 'C' is none of A, B, same; mend it"
    )


def test_what_is_dropped_is_counted_by_reason(tmp_path: Path) -> None:
    rows = [{"q": "?", "a": "x", "b": "y", "w": value} for value in ("A", "same", "same", "", "B")]
    rejects = tmp_path / "rejects.jsonl"
    better = {"winner": "w", "values": ["A", "B"], "ties": ["same"]}
    records = read(
        tmp_path, rows, "preference", rejects, format={"prompt": "q", "answers": ["a", "b"], "better": better}
    )
    assert len(list(records)) == 2
    assert "2 a tie (first: " in records.report.lines()[0]
    assert records.report.as_json()["sources"][0]["reasons"] == {"a tie": 2, "nobody judged it": 1}
    assert [(entry["line"], entry["reason"]) for entry in map(json.loads, rejects.read_text().splitlines())] == [
        (2, "a tie"),
        (3, "a tie"),
        (4, "nobody judged it"),
    ]


def test_scores_beside_named_answers_must_agree_with_them() -> None:
    format = {"prompt": "q", "chosen": "a", "rejected": "b", "better": {"score": ["s", "t"]}, "margin": "gap"}
    row = {"q": "?", "a": "x", "b": "y"}
    (record,) = convert({**row, "s": 3, "t": 1}, format)
    assert isinstance(record, Preference)
    assert record.margins == (2.0,)
    assert refused({**row, "s": 1, "t": 3}, format) == ("s", "says that the rejected answer is better (1 and 3)")
    assert refused({**row, "s": 2, "t": 2}, format)[1] == "a tie"
    (record,) = convert({**row, "s": None, "t": 2}, format)
    assert isinstance(record, Preference)
    assert record.margins is None


def test_pairs_and_gaps() -> None:
    scores = [1.0, 3.0, 3.0, 2.5, 0.0]

    def made(pairs: str, gap: float | None = None) -> list[tuple[int, tuple[int, ...]]]:
        return [(one.best, one.worse) for one in compare(scores, pairs, gap)]

    assert made("best") == [(1, (0, 3, 4))]
    assert made("best", 1.0) == [(1, (0, 4))]
    assert made("each") == [(1, (0, 3, 4)), (2, (0, 3, 4))]
    assert made("all") == [(1, (0, 3, 4)), (2, (0, 3, 4)), (3, (0, 4)), (0, (4,))]
    assert made("ends") == [(1, (4,))]
    with pytest.raises(LeftOut, match="smaller than min_gap"):
        compare([1.0, 1.5], "best", 1.0)


def test_votes_of_several_rows_add_up_and_scores_are_averaged(tmp_path: Path) -> None:
    rows = [{"q": "?", "a": "x", "b": "y", "w": who, "n": n} for n, who in enumerate((1, 0, 0, None))]
    (record,) = read(
        tmp_path,
        rows,
        "preference",
        format={**ASKED, "prompt": "q", "group": "q", "better": {"winner": "w"}, "margin": "gap"},
    )
    assert isinstance(record, Preference)
    assert (text(record.chosen), record.margins, record.votes) == ("x", (1.0,), ((2.0, 1.0),))
    rows = [{"q": "?", "a": said, "s": score} for said, score in (("x", 1), ("y", 3), ("x", 4), ("x", 2.5))]
    (record,) = read(
        tmp_path, rows, "preference", format={"prompt": "q", "answers": "a", "group": "q", "better": {"score": "s"}}
    )
    assert isinstance(record, Preference)
    assert (text(record.chosen), [text(one) for one in record.rejected]) == ("y", ["x"])


def test_each_rejected_answer_has_its_own_gap(tmp_path: Path) -> None:
    """Its own, not that of the nearest one; the second of two equal answers is not there, and neither is what was said
    of it."""
    format = {"prompt": "q", "answers": "a[*].t", "better": {"score": "a[*].s"}, "margin": "gap"}
    answers = [{"t": t, "s": s} for t, s in (("low", 1), ("best", 9), ("mid", 4), (" low", 3), ("last", 0.5))]
    (record,) = convert({"q": "?", "a": answers}, format)
    assert isinstance(record, Preference)
    assert ([text(one) for one in record.rejected], record.margins) == (["low", "mid", "last"], (8.0, 5.0, 8.5))
    assert record.votes is None, "one judge's scores are no votes"


@pytest.mark.parametrize(
    ("better", "said", "expected"),
    [
        (
            {"winner": "w", "values": ["A", "B", "C"], "ties": ["same"]},
            ["A", "A", "B", "same"],
            [(2.5, 1.5), (2.5, 0.5)],
        ),
        ({"ranking": "w", "names": ["A", "B", "C"]}, ["A>B>C", "B>A=C", "A>C", "A>B"], [(2.0, 1.0), (2.5, 0.5)]),
    ],
)
def test_the_votes_of_several_judges_stay_with_the_record(
    better: dict[str, Any], said: list[str], expected: list[Any]
) -> None:
    """For each rejected answer: how many judges put the chosen one before it, and how many after; by hand. One judge
    alone is no vote."""
    format = {"prompt": "q", "answers": ["a", "b", "c"], "better": better, "pairs": "best"}
    row = {"q": "?", "a": "x", "b": "y", "c": "z"}
    (record,) = convert({**row, "w": said}, format)
    assert isinstance(record, Preference)
    assert (text(record.chosen), record.votes) == ("x", tuple(expected))
    (record,) = convert({**row, "w": said[:1]}, format)
    assert isinstance(record, Preference)
    assert record.votes is None


def test_votes_are_counted_between_the_two_answers_that_were_compared(tmp_path: Path) -> None:
    """x won against y once and lost once, and won twice against z: y and z were never compared, and nobody
    contradicts."""
    rows = [
        {"q": "?", "a": a, "b": b, "w": w}
        for a, b, w in (("x", "y", 0), ("y", "x", 0), ("x", "z", 0), ("z", "x", 1), ("x", "w", None))
    ]
    (record,) = read(
        tmp_path, rows, "preference", format={**ASKED, "prompt": "q", "group": "q", "better": {"winner": "w"}}
    )
    assert isinstance(record, Preference)
    assert [text(one) for one in record.rejected] == ["y", "z"]
    assert record.votes == ((1.0, 1.0), (2.0, 0.0))


def test_labels_are_unpaired_or_compared(tmp_path: Path) -> None:
    rows = [{"q": "?", "a": said, "ok": ok} for said, ok in (("x", True), ("y", False))]
    format = {"prompt": "q", "answers": "a", "group": "q", "better": {"label": "ok"}}
    (compared,) = read(tmp_path, rows, "preference", format=format)
    assert isinstance(compared, Preference)
    assert (text(compared.chosen), text(compared.rejected[0])) == ("x", "y")
    single = list(read(tmp_path, rows, "unpaired", format=format))
    assert [(text(one.completion), one.label) for one in single if isinstance(one, Unpaired)] == [
        ("x", True),
        ("y", False),
    ]
    by_completion = {"prompt": "q", "completion": "a", "better": {"label": "ok"}}
    assert list(read(tmp_path, rows, "unpaired", format=by_completion)) == single


LABELLED = (
    ("?", "x", True),
    ("!", "only good", True),
    ("?", "y", False),
    ("?", "z", True),
    ("?", "w", False),
    (";", "only bad", False),
)


@pytest.mark.parametrize(
    ("shape", "keys"),
    [
        (lambda q, a, ok: {"prompt": q, "completion": a, "label": ok}, {}),
        (
            lambda q, a, ok: {
                "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}],
                "label": ok,
            },
            {},
        ),
        (lambda q, a, ok: {"question": q, "response": a, "label": ok}, {}),
        (
            lambda q, a, ok: {"q": q, "a": a, "ok": "1" if ok else "0"},
            {"columns": {"prompt": "q", "completion": "a", "better": {"label": "ok"}}},
        ),
    ],
    ids=["prompt and completion", "messages", "found columns", "mapping"],
)
def test_labelled_answers_are_compared_within_their_prompt(tmp_path: Path, shape: Any, keys: dict[str, Any]) -> None:
    """Without a word of it in the recipe: each good answer against all bad ones. A prompt whose answers are all good,
    or all bad, is counted with its reason. Wherever labels themselves are learned, nothing is grouped."""
    rows, rejects = [shape(*one) for one in LABELLED], tmp_path / "rejects.jsonl"
    records = read(tmp_path, rows, "preference", rejects, **keys)
    found = [
        (text(one.chosen), [text(bad) for bad in one.rejected], one.id)
        for one in records
        if isinstance(one, Preference)
    ]
    assert found == [("x", ["y", "w"], "rows.jsonl:1"), ("z", ["y", "w"], "rows.jsonl:4")]
    (account,) = records.report.as_json()["sources"]
    assert (account["read"], account["kept"]) == (6, 2)
    assert account["reasons"] == {labelled.ONLY_GOOD: 1, labelled.ONLY_BAD: 1}
    assert [json.loads(line)["line"] for line in rejects.read_text().splitlines()] == [2, 6]
    assert labelled.REMARK in " ".join(records.report.lines())
    assert len(list(read(tmp_path, rows, "unpaired", **keys))) == 6


def test_how_labelled_answers_are_compared_can_be_said(tmp_path: Path) -> None:
    """Contradicting labels of one answer are counted; as many of each take it out. A prompt is the same only with the
    same system."""
    columns = {"prompt": "q", "completion": "a", "better": {"label": "ok"}, "system": "s", "pairs": "best"}
    said = [("x", 1), ("y", 0), ("z", 1), ("y ", 1), ("y", 0), ("even", 0), ("even", 1)]
    rows = [{"q": "?", "a": a, "ok": ok, "s": "S"} for a, ok in said] + [
        {"q": "?", "a": "other system", "ok": 0, "s": "T"}
    ]
    records = read(tmp_path, rows, "preference", columns=columns)
    (record,) = records
    assert isinstance(record, Preference)
    assert (text(record.chosen), [text(bad) for bad in record.rejected]) == ("x", ["y"])
    (source,) = records.report.sources
    assert source.notes == {comparisons.SAME_TWICE: 3, labelled.EVEN: 1}


def test_a_bad_labelled_row_is_told_with_its_line(tmp_path: Path) -> None:
    rows = [{"prompt": "?", "completion": "x", "label": True}, {"prompt": "?", "completion": "", "label": False}]
    with pytest.raises(InputError, match=r"rows\.jsonl:2 completion: is empty"):
        list(read(tmp_path, rows, "preference"))
    with pytest.raises(
        InputError, match=r"rows\.jsonl:1 label: has a label, and answers labelled false must not be trained on"
    ):
        list(read(tmp_path, rows[:1], "conversation"))


# Grades

GRADES = {"help": "h", "long": "v"}


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"q": "?", "a": "x", "h": 3, "v": None}, {"prompt": "q", "completion": "a", "grades": GRADES}),
        (
            {"q": "?", "a": "x", "s": {"h": "3", "v": ""}},
            {"prompt": "q", "completion": "a", "grades": {"help": "s.h", "long": "s.v"}},
        ),
        (
            {"m": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "x"}], "h": 3},
            {"messages": "m", "grades": GRADES},
        ),
        (
            {"q": "?", "a": "x", "h": 3},
            {"prompt": "q", "answers": "a", "group": "q", "better": {"score": "h"}, "grades": GRADES},
        ),
    ],
    ids=["columns", "inside", "messages", "beside a comparison"],
)
def test_grades_stand_where_the_mapping_says(tmp_path: Path, row: dict[str, Any], format: Any) -> None:
    """An attribute without a number is not there; an answer without any is left out with its reason; nothing is
    grouped."""
    empty = {key: None if key in ("h", "v", "s") else value for key, value in row.items()}
    records = read(tmp_path, [row, row, empty], "graded", format=format)
    found = list(records)
    assert [(one.grades, text(one.completion)) for one in found if isinstance(one, Graded)] == [
        ({"help": 3.0}, "x")
    ] * 2
    assert records.report.as_json()["sources"][0]["reasons"] == {"nobody graded it": 1}


def test_grades_of_several_answers_in_one_row() -> None:
    format = {"prompt": "q", "answers": "a[*].t", "grades": {"help": "a[*].h", "long": "a[*].v"}}
    row = {"q": "?", "a": [{"t": "x", "h": 1, "v": 2}, {"t": "y", "h": None, "v": None}, {"t": "z", "v": 0.5}]}
    convertible = converter(source(format), "graded")
    records = convertible(Row(row, ORIGIN))
    assert [(text(one.completion), one.grades) for one in records if isinstance(one, Graded)] == [
        ("x", {"help": 1.0, "long": 2.0}),
        ("z", {"long": 0.5}),
    ]
    assert convertible.notes == {"an answer that nobody graded, left out": 1}
    with pytest.raises(RowError, match="1 grade for 3 answers"):
        converter(source({**format, "grades": {"help": "one"}}), "graded")(Row({**row, "one": 3}, ORIGIN))


@pytest.mark.parametrize(
    ("value", "message"),
    [(True, "found a boolean"), ("good", "expected a number, found 'good'"), ([1, 2], "2 grades for 1 answer")],
)
def test_a_grade_is_a_number(value: Any, message: str) -> None:
    format = {"prompt": "q", "completion": "a", "grades": {"help": "h"}}
    with pytest.raises(RowError, match=message) as error:
        convert({"q": "?", "a": "x", "h": value}, format, "graded")
    assert error.value.field == "h"


def test_grades_where_nobody_learns_from_them_are_refused() -> None:
    """Neither trained as if all answers were good, nor passed over beside a comparison."""
    for format in ({"prompt": "q", "completion": "a", "grades": GRADES}, {"messages": "m", "grades": GRADES}):
        row = {
            "q": "?",
            "a": "x",
            "h": 3,
            "m": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "x"}],
        }
        with pytest.raises(RowError, match="is one answer with grades"):
            convert(row, format, "conversation")
    compared = {"prompt": "q", "answers": "a", "group": "q", "better": {"score": "h"}, "grades": GRADES}
    with pytest.raises(InputError, match="`grades` have no effect: here answers are compared"):
        converter(source(compared), "preference")
    with pytest.raises(ValidationError, match="`grades` are of answers, a completion or messages"):
        source({"prompt": "q", "chosen": "a", "rejected": "b", "grades": GRADES})
    with pytest.raises(ValidationError, match="`group` needs answers and better"):
        source({"prompt": "q", "answers": "a", "group": "q", "grades": GRADES})


def test_the_rows_of_helpsteer_are_compared_or_graded(tmp_path: Path) -> None:
    """One preset for both: a stage that wants comparisons groups by prompt, one that wants grades takes every row."""
    rows = [
        {"prompt": "2+2?", "response": said, "helpfulness": h, "correctness": h, "verbosity": 1}
        for said, h in (("4", 4), ("5", 0))
    ]
    (compared,) = read(tmp_path, rows, "preference")
    assert isinstance(compared, Preference) and compared.margins == (4.0,)
    graded = [one.grades for one in read(tmp_path, rows, "graded") if isinstance(one, Graded)]
    assert graded == [{"helpfulness": h, "correctness": h, "verbosity": 1.0} for h in (4.0, 0.0)]


# Conversations


def conversation(row: dict[str, Any], format: Any) -> Messages:
    (record,) = convert(row, format, "conversation")
    assert isinstance(record, Conversation)
    return record.messages


def spoken(messages: Messages) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in messages]


QA = [("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"Q": "q", "A": "a"}, {"prompt": "Q", "completion": "A"}),
        ({"x": {"Q": "q"}, "A": ["", "a"]}, {"prompt": "x.Q", "completion": "A[-1]"}),
        ({"m": ["q", "a"]}, {"messages": "m", "weave": True}),
        ({"m": '["q", "a"]'}, {"messages": "m", "weave": True}),
        ({"m": [{"ask": "q", "say": "a"}]}, {"messages": "m", "turns": {"pairs": ["ask", "say"]}}),
        (
            {"m": [{"who": "me", "t": "q"}, {"who": "it", "t": "a"}]},
            {"messages": "m", "turns": {"role": "who", "content": "t", "roles": {"user": "me", "assistant": ["it"]}}},
        ),
        ({"t": "U: q A: a"}, {"messages": "t", "dialogue": {"user": "U:", "assistant": "A:"}}),
        ({"t": "q A:", "A": "a"}, {"prompt": "t", "completion": "A", "dialogue": {"user": "U:", "assistant": "A:"}}),
        (
            {"m": json.dumps([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}])},
            {"messages": "m"},
        ),
        (
            {
                "m": [
                    {"role": "assistant", "content": "hi"},
                    {"from": "user", "value": "q"},
                    {"from": "gpt", "value": "a"},
                ]
            },
            {"messages": "m", "repair": ["leading_assistant"]},
        ),
    ],
)
def test_conversations_in_many_shapes(row: dict[str, Any], format: dict[str, Any]) -> None:
    assert spoken(conversation(row, format)) == QA


def test_what_stands_beside() -> None:
    row = {"Q": "q", "A": "a", "S": "s", "T": '[{"name": "f"}]', "R": "hm", "why": "cut", "n": 7, "id2": "z"}
    format = {
        "prompt": "Q",
        "completion": "A",
        "system": "S",
        "tools": "T",
        "reasoning": "R",
        "id": "id2",
        "finished": {"why": ["stop"]},
    }
    (record,) = convert(row, format, "conversation")
    assert isinstance(record, Conversation)
    assert record.messages[0] == {"role": "system", "content": "s"}
    assert record.messages[2] == {"role": "assistant", "content": "a", "reasoning": "hm", "finished": False}
    assert (record.tools[0]["function"]["name"], record.id, record.fields) == ("f", "z", {"n": 7})
    assert conversation(row, {**format, "system": {"value": "always"}})[0]["content"] == "always"


def test_columns_is_the_same_mapping() -> None:
    given = source(columns={"prompt": "Q", "completion": "A"})
    (record,) = converter(given, "conversation")(Row({"Q": "q", "A": "a"}, ORIGIN))
    assert isinstance(record, Conversation)
    assert spoken(record.messages) == QA
    with pytest.raises(ValidationError, match="`format` and `columns` both say how rows are read"):
        source({"prompt": "Q"}, columns={"prompt": "Q"})


def test_an_error_names_the_place_as_the_row_calls_it() -> None:
    assert refused({"Q": "q", "A": ""}, {"prompt": "Q", "completion": "A"}, "conversation") == ("A", "is empty")
    assert refused({"Q": "q", "A": "x", "B": " x"}, {"prompt": "Q", "chosen": "A", "rejected": "B"}) == (
        "B",
        "chosen and rejected are equal",
    )
    assert refused({"Q": "", "A": "x", "B": "y"}, {"prompt": "Q", "chosen": "A", "rejected": "B"}) == ("Q", "is empty")


def test_flags_of_loss_beside_the_messages() -> None:
    turns = [{"role": role, "content": str(i)} for i, role in enumerate(("user", "assistant", "user", "assistant"))]
    flags = [
        m.get("train", True)
        for m in conversation({"m": turns, "f": {"t": [False, False, False, True]}}, {"messages": "m", "train": "f.t"})
    ]
    assert flags == [True, False, True, True]
    assert [m.get("train", True) for m in conversation({"m": turns}, {"messages": "m", "train": "last"})] == [
        True,
        False,
        True,
        True,
    ]
    assert refused({"m": turns, "f": [True]}, {"messages": "m", "train": "f"}, "conversation") == (
        "f",
        "expected a flag for each of the 4 turns",
    )


def test_marks_inside_an_answer() -> None:
    tags = {"reasoning": ["<t>", "</t>"], "calls": ["<c>", "</c>"], "drop": ["<s>"]}
    row = {
        "m": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": '<t>hm</t><s>Wait.<c>{"name": "f", "arguments": {}}</c>'},
        ]
    }
    message = conversation(row, {"messages": "m", "tags": tags})[1]
    assert (message["reasoning"], message["content"], message["tool_calls"][0]["function"]["name"]) == (
        "hm",
        "Wait.",
        "f",
    )
    row["m"][1]["content"] = "<t>hm"
    assert refused(row, {"messages": "m", "tags": tags}, "conversation") == (
        "m.1.content",
        "<t> begins and does not end",
    )


@pytest.mark.parametrize(
    ("value", "extract", "answer"),
    [
        ("1 + 1\n#### 1,002", "####", "1002"),
        (r"so \boxed{1} or \boxed{\frac{1}{2}}", "boxed", r"\frac{1}{2}"),
        ("<a>1</a> <a>2</a>", {"tag": "a"}, "2"),
        ("The answer is: 7", {"after": "The answer is:"}, "7"),
        ("x=12;", {"regex": r"x=(\d+)"}, "12"),
        (72.0, None, "72"),
        (["1", "2"], None, ["1", "2"]),
        ('{"tests": [1]}', None, {"tests": [1]}),
        ("[1, 2]", None, "[1, 2]"),
    ],
)
def test_right_answers(value: Any, extract: Any, answer: Any) -> None:
    format = {"prompt": "q", "answer": "r", **({"extract": extract} if extract else {})}
    (record,) = convert({"q": "?", "r": value}, format, "prompt")
    assert isinstance(record, Prompt)
    assert record.fields["answer"] == answer


# The schema


@pytest.mark.parametrize(
    ("format", "message"),
    [
        ({"prompt": "q", "answers": ["a", "b"]}, "answers need `better`"),
        ({"prompt": "q", "answers": ["a"], "better": {"signed": "s"}}, "`signed` needs `negative: 0` or `negative: 1`"),
        ({"prompt": "q", "answers": ["a"], "better": {"winner": "w", "score": "s"}}, "has winner and score"),
        ({"prompt": "q", "answers": ["a"], "better": {"score": "s", "ties": ["x"]}}, "`ties` belongs to `winner`"),
        ({"prompt": "q", "chosen": "a"}, "chosen and rejected belong together"),
        ({"prompt": "q", "completion": "a", "chosen": "b", "rejected": "c"}, "different kinds of rows"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "better": {"winner": "w"}}, "decided by name"),
        ({"system": "s"}, "needs messages"),
        ({"prompt": "a..b"}, "not a place in a row"),
        ({"preset": "nectarine"}, "no preset `nectarine`"),
        ("nectarine", "no format `nectarine`"),
        ("pku_saferlhf", "has to be told more"),
        ({"preset": "helpsteer3", "better": {"signed": "overall_preference"}}, "`signed` needs `negative"),
    ],
)
def test_mappings_that_cannot_be(format: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message.replace("`", "`").replace("(", r"\(")):
        source(format)


# Tables from known truths


WORDS = st.text(alphabet="abcdefgh ÄÖ中", min_size=1, max_size=12).filter(lambda text: bool(text.strip()))
SPELL = {"plain": lambda text: text, "messages": lambda text: [{"role": "assistant", "content": text}]}
SPELL["cell"] = lambda text: json.dumps([{"role": "assistant", "content": text}])


COLUMNS = ["a", "chosen", "rejected", "answer 1", "re-ply", "x.y", "B", "output", "0"]


@st.composite
def tables(draw: st.DrawFn) -> tuple[dict[str, Any], Any, str, set[str]]:
    """A row, the mapping for it, the answer that it calls the better one, and all others."""
    count = draw(st.integers(2, 4))
    answers = draw(st.lists(WORDS.map(str.strip), min_size=count, max_size=count, unique=True))
    best = draw(st.integers(0, count - 1))
    names = draw(st.lists(st.sampled_from(COLUMNS), min_size=count, max_size=count, unique=True))
    spell = SPELL[draw(st.sampled_from(sorted(SPELL)))]
    row: dict[str, Any] = {name: spell(answer) for name, answer in zip(names, answers, strict=True)}
    kind = draw(
        st.sampled_from(["winner", "named", "score", "low", "cells", "ranking", "signed" if count == 2 else "winner"])
    )
    odd = draw(st.sampled_from([None, None, None, "", "odd", [], {}, float("nan"), True, 17]))
    order = draw(st.permutations(range(count)))
    if kind == "winner":
        better, cell = {"winner": "j"}, draw(st.sampled_from([best, float(best), str(best), f" {best}"]))
    elif kind == "named":
        better, cell = (
            {"winner": "j", "values": [f"N{i}" for i in range(count)]},
            draw(st.sampled_from([f"n{best}", f"N{best} "])),
        )
    elif kind in ("score", "low", "cells"):
        scores = [float(10 - abs(i - best) * 2) if kind != "low" else float(abs(i - best)) for i in range(count)]
        better = {"score": "j", **({"order": "low"} if kind == "low" else {})}
        cell = [str(score) for score in scores] if kind == "cells" else scores
    elif kind == "ranking":
        rest = [i for i in order if i != best]
        better, cell = (
            {"ranking": "j", "names": [chr(65 + i) for i in range(count)]},
            ">".join(chr(65 + i) for i in [best, *rest]),
        )
    else:
        negative = draw(st.integers(0, 1))
        better, cell = {"signed": "j", "negative": negative}, -2 if best == negative else 3
    row["j"] = cell
    row["Q"] = draw(WORDS)
    if odd is not None and draw(st.booleans()):
        row[draw(st.sampled_from([*names, "j", "Q"]))] = odd
    row = {key: row[key] for key in draw(st.permutations(sorted(row)))}
    return (
        row,
        {"prompt": "Q", "answers": names, "better": better},
        answers[best],
        {answer for i, answer in enumerate(answers) if i != best},
    )


@given(tables())
@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_chosen_and_rejected_are_never_swapped(table: tuple[dict[str, Any], Any, str, set[str]]) -> None:
    """A clean error, a counted drop, or a record whose chosen answer is the one that the row calls better. With a
    judgement or an answer replaced by something odd, the better answer is never among the rejected ones."""
    row, format, best, others = table
    try:
        records = convert(row, format)
    except RowError:
        return
    untouched = row["j"] not in ("", "odd", None) and not isinstance(row["j"], (bool, dict)) and row["j"] != 17
    for record in records:
        assert isinstance(record, Preference)
        rejected = {text(answer).strip() for answer in record.rejected}
        if untouched and best in {_plain(row[name]) for name in format["answers"]}:
            assert text(record.chosen).strip() == best
            assert best not in rejected
        assert text(record.chosen).strip() not in rejected
        assert rejected <= others | {"odd", "17", "true", best}


def _plain(value: Any) -> str:
    if isinstance(value, list) and value:
        return str(value[0]["content"])
    if isinstance(value, str) and value.startswith("[{"):
        return str(json.loads(value)[0]["content"])
    return str(value)


# Rows and mappings that random changes have made


@pytest.mark.parametrize(
    ("mapping", "row", "field"),
    [
        ({"prompt": "p", "completion": "c", "reasoning": "r"}, {"p": "q", "c": [], "r": "hm"}, "c"),
        ({"prompt": "p", "completion": "c"}, {"p": [[], {}], "c": "a"}, "p.0"),
        (
            {"messages": "m", "tags": {"reasoning": ["<t>", "</t>"]}},
            {"m": [None, {"role": "assistant", "content": "a"}]},
            "m.0",
        ),
        ({"messages": "m", "train": "last"}, {"m": ["q", {"role": "assistant", "content": "a"}]}, "m.0"),
        ({"messages": "m", "repair": ["same_speaker"]}, {"m": [1, 2]}, "m.0"),
        (
            {"tree": {"root": "t", "children": "kids", "score": "s"}},
            {"t": {"role": "user", "text": "q", "kids": 2.5}},
            "kids",
        ),
        (
            {"tree": {"root": "t", "children": "kids", "score": "s"}},
            {"t": {"role": "user", "text": "q", "kids": ["a", "b"]}},
            "kids.0",
        ),
        (
            {"tree": {"id": "i", "parent": "u", "score": "s"}},
            {"i": "1", "u": {"x": 1}, "role": "assistant", "text": "a", "s": 1},
            "u",
        ),
    ],
)
def test_what_is_no_turn_is_a_bad_row_with_its_place(
    tmp_path: Path, mapping: dict[str, Any], row: dict[str, Any], field: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    want: Any = "preference" if "tree" in mapping else "conversation"
    with pytest.raises(InputError) as caught:
        list(read_records([DataSource(path=str(path), format=mapping)], [path], want, seed=0, rejects=None))
    assert (caught.value.problems[0].line, caught.value.problems[0].key) == (1, field)


@pytest.mark.parametrize(
    "mapping",
    [
        {"prompt": [], "completion": "c"},
        {"prompt": "p", "answers": [], "better": {"score": "s"}},
        {"prompt": "p", "answers": "a", "better": {"score": []}},
        {"prompt": "p", "answers": "a", "group": [], "better": {"score": "s"}},
        {"prompt": "p", "answers": "a", "better": {"ranking": "{r}"}},
        {"prompt": "p", "answers": ["a", "b"], "better": {"winner": "{w} {v}"}},
        {"prompt": ["p"], "answers": "a", "weave": True, "better": {"score": "s"}},
        {"messages": "m", "finished": {"{why}": ["stop"]}},
        {"messages": "m", "train": "{flags}"},
    ],
)
def test_a_mapping_that_cannot_be_used_is_refused(mapping: dict[str, Any]) -> None:
    """Empty lists of places, and texts with places where a value is looked at."""
    with pytest.raises(ValidationError):
        DataSource(path="rows.jsonl", format=mapping)


def test_names_from_data_keep_a_message_on_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        json.dumps(
            {"messages": [{"role": "user", "content": [{"a\nb\x1b[2J": 1}]}, {"role": "assistant", "content": "x"}]}
        )
    )
    with pytest.raises(InputError) as caught:
        list(read_records([DataSource(path=str(path))], [path], "conversation", seed=0, rejects=None))
    assert "\n" not in str(caught.value) and "a\\nb\\x1b" in str(caught.value)


@pytest.mark.parametrize(
    ("format", "key", "near"),
    [
        ({"prompt": "q", "answers": ["a", "b", "cc"], "better": {"ranking": "r"}}, "answers", "cc"),
        ({"prompt": "q", "answers": ["a", "bb"], "better": {"winner": "w"}}, "answers", "bb"),
        ({"prompt": "q", "answers": ["a", "b"], "better": {"winner": "ww"}}, "better.winner", "ww"),
        ({"prompt": "q", "answers": ["a", "b"], "better": {"score": ["r", "ww"]}}, "better.score", "ww"),
        ({"prompt": "qq", "answers": ["a", "b"], "better": {"winner": "w"}}, "prompt", "qq"),
        ({"prompt": "q", "chosen": "a", "rejected": "bb"}, "rejected", "bb"),
        ({"prompt": "q", "chosen": "aa.text", "rejected": "b"}, "chosen", "aa"),
        ({"prompt": "q", "completion": "cc"}, "completion", "cc"),
    ],
)
def test_a_column_that_no_row_has_is_an_error_and_no_empty_answer(
    format: dict[str, Any], key: str, near: str, tmp_path: Path
) -> None:
    rows = [{"q": f"Why {i}?", "a": "It is.", "b": "No.", "c": "Perhaps.", "r": "0>1>2", "w": 0} for i in range(3)]
    want: Want = "conversation" if "completion" in format else "preference"
    with pytest.raises(InputError, match=rf"{key}: the first rows have no column `{near}`; did you mean `{near[0]}`\?"):
        list(read(tmp_path, rows, want, format=format))


def test_a_column_that_some_rows_lack_is_read_where_it_is(tmp_path: Path) -> None:
    """The third answer stands in one row only, and the system in none of the first: JSON writes nothing where there is
    nothing."""
    rows: list[dict[str, Any]] = [{"q": f"Why {i}?", "a": "It is.", "b": "No.", "w": 0} for i in range(40)]
    rows[7]["c"] = "Perhaps."
    rows[35]["s"] = "Be brief."
    format = {"prompt": "q", "answers": ["a", "b", "c"], "better": {"winner": "w"}, "system": "s"}
    found = list(read(tmp_path, rows, "preference", format=format))
    assert [len(one.rejected) for one in found if isinstance(one, Preference)] == [1] * 7 + [2] + [1] * 32
    assert [i for i, one in enumerate(found) if isinstance(one, Preference) and one.prompt[0]["role"] == "system"] == [
        35
    ]


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("4,5", "expected a number, found '4,5'; the decimal mark is a point: write 4.5"),
        (" -0,25 ", "expected a number, found ' -0,25 '; the decimal mark is a point: write -0.25"),
        ("1,000,000", "expected a number, found '1,000,000'"),
        ("4/5", "expected a number, found '4/5'"),
        ("-", "expected a number, found '-'"),
    ],
)
def test_a_score_that_is_no_number_says_what_to_write(cell: str, said: str) -> None:
    with pytest.raises(RowError) as caught:
        number(cell, "score")
    assert (caught.value.message, caught.value.field) == (said, "score")


@pytest.mark.parametrize("cell", ["", " ", "n/a", "N/A", "NA", "nan", "null", "None", None])
def test_what_counts_as_no_score(cell: str | None) -> None:
    assert number(cell, "score") is None
