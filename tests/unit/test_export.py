"""Preferences for TRL: expanded to pairs, and the same data when they are read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.data.export import export_pairs
from align.data.mixture import read_records
from align.errors import InputError
from align.recipe.schema import DataSource

ASK = [{"role": "user", "content": "Is the sun a star?"}]


def says(text: str, **keys: Any) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text, **keys}]


ROWS = [
    {
        "id": "a",
        "lang": "en",
        "prompt": ASK,
        "chosen": says("Yes."),
        "rejected": [says("No."), says("The sun is", finished=False)],
        "margin": 2,
    },
    {"id": "b", "prompt": "Plain?", "chosen": "Strings.", "rejected": "Words."},
    {"prompt": [*ASK, *says("Yes.", train=False), {"role": "user", "content": "雪?"}], "chosen": says("是"), "rejected": says("否")},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_one_row_for_each_pair_with_the_keys_that_trl_reads(tmp_path: Path) -> None:
    out = tmp_path / "pairs.jsonl"
    assert export_pairs(write(tmp_path / "rows.jsonl", ROWS), out) == 4
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["id"] for row in rows] == ["a#1", "a#2", "b", "rows.jsonl:3"]
    assert all(list(row) == ["id", "prompt", "chosen", "rejected"] for row in rows)
    assert all(set(message) == {"role", "content"} for row in rows for key in list(row)[1:] for message in row[key])
    assert [row["rejected"][0]["content"] for row in rows] == ["No.", "The sun is", "Words.", "否"]
    assert rows[0]["prompt"] == rows[1]["prompt"] == ASK and rows[0]["chosen"] == rows[1]["chosen"] == says("Yes.")
    assert len(rows[3]["prompt"]) == 3


def test_what_was_exported_is_read_again_as_the_same_pairs(tmp_path: Path) -> None:
    source, out = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "pairs.jsonl"
    export_pairs(source, out)

    def pairs(path: Path) -> list[Any]:
        records: Any = read_records([DataSource(path=str(path))], [path], "preference", seed=0, rejects=None)
        said = lambda messages: [(m["role"], m["content"]) for m in messages]  # noqa: E731
        return [(said(r.prompt), said(r.chosen), said(answer)) for r in records for answer in r.rejected]

    assert pairs(out) == pairs(source)
    again = tmp_path / "again.jsonl"
    export_pairs(out, again)
    assert again.read_bytes() == out.read_bytes()


def test_trl_takes_the_file(tmp_path: Path) -> None:
    """Its own check of what a preference is, on the loaded data set."""
    from datasets import Dataset
    from trl.data_utils import is_conversational, maybe_extract_prompt

    out = tmp_path / "pairs.jsonl"
    export_pairs(write(tmp_path / "rows.jsonl", ROWS), out)
    loaded = Dataset.from_list([json.loads(line) for line in out.read_text().splitlines()])
    assert all(is_conversational(row) and maybe_extract_prompt(row)["prompt"] == row["prompt"] for row in loaded)


def test_what_cannot_be_exported_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    source, out = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "pairs.jsonl"
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    for rows, message in (
        ([*ROWS, {**ROWS[0], "tools": [tool]}], r"rows\.jsonl:4: has tools; leave such rows out"),
        ([*ROWS, {"prompt": "a", "chosen": "b", "rejected": "b"}], r"rows\.jsonl:4 rejected: chosen and rejected are equal"),
        ([{"messages": [*ASK, *says("Yes.")]}], "is a conversation; wanted is a preference"),
    ):
        with pytest.raises(InputError, match=message):
            export_pairs(write(source, rows), out)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]
    write(source, ROWS)
    for target, message in (
        (source, "rows.jsonl exists; remove it"),
        (tmp_path / "x.csv", "must end in .jsonl"),
        (tmp_path / "no" / "x.jsonl", "no folder"),
    ):
        with pytest.raises(InputError, match=message):
            export_pairs(source, target)
