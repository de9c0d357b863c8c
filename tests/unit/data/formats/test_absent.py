"""Columns that a mapping names and no row has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from align.data.formats.absent import LOOK_FURTHER
from align.data.records import Preference
from align.data.sources.contents import wanted_of
from align.data.sources.mixture import read_records
from align.errors import InputError
from align.preflight.first_rows import faults
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


COMPARED = {"prompt": "q", "answers": ["a", "b", "c"], "better": {"winner": "w"}}


def rare(folder: Path, column: str, first: int, count: int) -> Path:
    """Rows of which the one with this number is the first that has the column."""
    rows = [{"q": f"{i}?", "a": "yes", "b": "no", "w": 0} for i in range(count)]
    rows[first - 1][column] = "perhaps"
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("first", [20, 21, 41, LOOK_FURTHER - 3, LOOK_FURTHER])
def test_a_column_that_comes_late_is_looked_for(first: int, tmp_path: Path) -> None:
    """JSON writes nothing where there is nothing. The same before a run, and where the kind of rows is found out."""
    path = rare(tmp_path, "c", first, LOOK_FURTHER + 50)
    source = DataSource.model_validate({"path": str(path), "format": COMPARED})
    found = list(read_records([source], [path], "preference", seed=0, rejects=None))
    assert len(found) == LOOK_FURTHER + 50
    assert [i for i, one in enumerate(found, 1) if isinstance(one, Preference) and len(one.rejected) == 2] == [first]
    assert faults(source, path, "preference") == []
    assert wanted_of(source, path) == "preference"


@pytest.mark.parametrize(("column", "first", "count"), [("c", LOOK_FURTHER + 1, LOOK_FURTHER + 9), ("cc", 30, 60)])
def test_but_not_without_end(column: str, first: int, count: int, tmp_path: Path) -> None:
    path = rare(tmp_path, column, first, count)
    source = DataSource.model_validate({"path": str(path), "format": COMPARED})
    with pytest.raises(InputError) as caught:
        list(read_records([source], [path], "preference", seed=0, rejects=None))
    (problem,) = caught.value.problems
    looked = min(count, LOOK_FURTHER)
    assert (problem.key, problem.message) == ("answers", f"the first {looked:,} rows have no column `c`")
    for look in (lambda: faults(source, path, "preference"), lambda: wanted_of(source, path)):
        with pytest.raises(InputError, match=f"the first {looked:,} rows have no column `c`"):
            look()


def test_rows_that_are_not_used_are_not_kept_without_end(tmp_path: Path) -> None:
    """Where `where` leaves out nearly all, the search ends after as many rows that were read."""
    path = rare(tmp_path, "c", 4 * LOOK_FURTHER, 4 * LOOK_FURTHER)
    keys = {"format": COMPARED, "where": {"q": [f"{i}?" for i in range(0, 4 * LOOK_FURTHER, 40)]}}
    source = DataSource.model_validate({"path": str(path), **keys})
    with pytest.raises(InputError, match="the first 25 rows have no column `c`"):
        list(read_records([source], [path], "preference", seed=0, rejects=None))
