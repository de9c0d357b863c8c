"""Columns that a mapping names and no row has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from align.data.sources.mixture import read_records
from align.errors import InputError
from align.recipe.schema import DataSource


def test_names_with_line_breaks_are_told_in_one_line(tmp_path: Path) -> None:
    """In the recipe and in the file: an error is a line of its own."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"asked\nfor": "a?", "reply": "b"}) + "\n")
    source = DataSource.model_validate({"path": str(path), "format": {"prompt": "asked\nof", "completion": "reply"}})
    with pytest.raises(InputError) as caught:
        list(read_records([source], [path], "conversation", seed=0, rejects=None))
    (problem,) = caught.value.problems
    assert str(problem) == (
        f"{path} prompt: the first rows have no column `asked\\nof`; did you mean `asked\\nfor`? They have"
        " asked\\nfor, reply"
    )
