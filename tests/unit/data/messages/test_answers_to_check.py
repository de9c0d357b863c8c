"""The one answer for rewards that check it: where it is looked for, what it is, and what is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.data.records import Prompt
from align.data.sources.mixture import Records, read_records
from align.errors import InputError
from align.recipe.schema import DataSource

ABSENT = object()


def read(folder: Path, rows: list[dict[str, Any]], want: Any = "prompt", **keys: Any) -> Records:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_records([DataSource.model_validate({"path": str(path), **keys})], [path], want, seed=0, rejects=None)


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"prompt": "q", "reward_model": {"ground_truth": "1"}, "answer": "2"}, "1"),
        ({"prompt": "q", "ground_truth": "1", "answer": "2"}, "1"),
        ({"prompt": "q", "expected_answer": "1", "solution": "2"}, "1"),
        ({"problem": "q", "gold_standard_solution": "1"}, "1"),
        ({"prompt": "q", "answer": "1", "solutions": ["2"]}, "1"),
        ({"question": "q", "answer": 72.0}, "72"),
        ({"prompt": "q", "answer": 0}, "0"),
        ({"prompt": "q", "solutions": ["1", "one"]}, ["1", "one"]),
        ({"prompt": "q", "label": "1"}, "1"),
        ({"prompt": "q", "ground_truth": '{"inputs": ["1"], "outputs": ["2"]}'}, {"inputs": ["1"], "outputs": ["2"]}),
        ({"prompt": "q", "answer": ""}, ""),
        ({"prompt": "q", "answer": None, "metadata": {"task": "x"}}, ABSENT),
        ({"messages": [{"role": "user", "content": "q"}], "ground_truth": "1", "dataset": "x"}, "1"),
    ],
)
def test_the_first_known_name_has_it(row: dict[str, Any], answer: Any, tmp_path: Path) -> None:
    (record,) = list(read(tmp_path, [row]))
    assert isinstance(record, Prompt)
    assert record.fields.get("answer", ABSENT) == answer


@pytest.mark.parametrize(
    ("texts", "answers"),
    [
        (["a\n#### 1,234", "b #### 5"], ["1234", "5"]),
        (["so \\boxed{\\frac{1}{2}}", "first \\boxed{1}, then \\boxed{2}"], ["\\frac{1}{2}", "2"]),
    ],
)
def test_it_is_taken_out_of_a_solution_where_nearly_all_rows_have_one(
    texts: list[str], answers: list[str], tmp_path: Path
) -> None:
    column = "answer" if "####" in texts[0] else "solution"
    rows = [{"problem": f"{i}?", column: text} for i, text in enumerate(texts * 10)]
    records = read(tmp_path, [*rows, {"problem": "odd?", column: "nobody knows"}])
    assert [record.fields["answer"] for record in records] == answers * 10
    assert records.report.sources[0].reasons == {"its right answer was not found": 1}


@pytest.mark.parametrize("none", ["proof", "notfound", "None", " Proof "])
def test_what_is_no_answer_is_left_out_and_counted(none: str, tmp_path: Path) -> None:
    records = read(tmp_path, [{"prompt": "a?", "answer": "1"}, {"prompt": "b?", "answer": none}])
    assert [record.fields["answer"] for record in records] == ["1"]
    assert sum(records.report.sources[0].reasons.values()) == 1


@pytest.mark.parametrize(
    ("pasted", "told"), [("Add.\n#### 4", True), ("Add. \\boxed{4}", True), ("Add #### 5", False), ("Is it 4?", False)]
)
def test_a_prompt_that_holds_its_answer_is_told(pasted: str, told: bool, tmp_path: Path) -> None:
    records = read(tmp_path, [{"prompt": pasted, "answer": "4"}])
    assert len(list(records)) == 1
    assert records.report.sources[0].notes == (
        {"a prompt that holds its right answer, behind #### or in a box": 1} if told else {}
    )


def test_a_reference_is_no_completion(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="answer is a reference; map it to completion if it is what the model shall say"
    ):
        list(read(tmp_path, [{"problem": "2+2?", "answer": "4"}], "conversation"))
