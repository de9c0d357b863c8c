"""``answers.jsonl``: what is written is read again, and what is damaged is left out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from align.data.answer_file import ANSWERS, AnswerRow, by_prompt, pairs_of, read_answers, said, write_answers

ROW = AnswerRow(
    part="held-out",
    prompt_id="p1",
    prompt=({"role": "user", "content": "Wie heißt das?\u2028"},),
    policy="sft",
    sample=0,
    text='"Tee"\n',
    tokens=3,
    finished=False,
    scores={"score": 0.5},
    left_out="unfinished",
    version=4,
)


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    rows = [ROW, replace(ROW, prompt="as the model reads it", scores={}, left_out=None, finished=True)]
    write_answers(tmp_path, rows)
    assert list(read_answers(tmp_path)) == rows
    assert not list(read_answers(tmp_path / "nothing"))


DAMAGED: list[dict[str, Any]] = [
    {"prompt": None},
    {"prompt": [1, "x"]},
    {"scores": ["x"]},
    {"scores": {"score": None}},
    {"tokens": "many"},
    {"tokens": float("inf")},
    {"version": None},
]


@pytest.mark.parametrize("change", DAMAGED, ids=repr)
def test_damaged_lines_are_left_out(tmp_path: Path, change: dict[str, Any]) -> None:
    write_answers(tmp_path, [ROW])
    whole = (tmp_path / ANSWERS).read_text(encoding="utf-8")
    wrong = json.dumps({**json.loads(whole), **change})
    (tmp_path / ANSWERS).write_text(f"{wrong}\n[]\n{{\n{whole}", encoding="utf-8")
    assert list(read_answers(tmp_path)) == [ROW]


def test_scores_that_are_no_number_are_left_out(tmp_path: Path) -> None:
    write_answers(tmp_path, [ROW])
    text = (tmp_path / ANSWERS).read_text(encoding="utf-8")
    (tmp_path / ANSWERS).write_text(text.replace("0.5", "NaN"), encoding="utf-8")
    (found,) = read_answers(tmp_path)
    assert found.scores == {}


def test_two_rows_of_data_with_one_id_and_prompt_are_two_prompts() -> None:
    one, two = ROW, replace(ROW, sample=1)
    other = replace(ROW, policy="dpo")
    assert list(by_prompt([one, two, other, one, other, replace(ROW, prompt_id="p2")])) == [
        [one, two, other],
        [one, other],
        [replace(ROW, prompt_id="p2")],
    ]
    assert not list(by_prompt([]))


def test_pairs_are_the_same_prompt_before_and_after() -> None:
    other = replace(ROW, prompt_id="p2", version=0)
    first, last = replace(ROW, version=0, text=" Tea. "), replace(ROW, version=9, scores={})
    rollout = replace(ROW, part="rollouts")
    assert list(pairs_of([first, other, last, rollout, replace(other, version=9)])) == [(first, last)]
    assert (said(first), said(last)) == ("Tea.\n[score 0.500]", '"Tee"')
