"""A user's own format, plugged in from outside the package. The example is the one of docs/data.md, taken from
there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from align.data.sources.mixture import Records, read_records
from align.errors import InputError
from align.recipe.schema import DataSource
from tests.support.root import ROOT

DOCS = ROOT / "docs" / "data.md"

READ = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from align.data.sources.mixture import read_records
from align.recipe.schema import DataSource

source = DataSource(path="answers.jsonl", format=sys.argv[1])
records = read_records([source], [Path(source.path)], sys.argv[2], seed=1, rejects=None)
print(json.dumps([asdict(record) for record in records], ensure_ascii=False))
print(json.dumps(records.report.as_json()))
"""


def example(name: str) -> str:
    found = re.search(rf"<!-- example: {re.escape(name)} -->\n```\w+\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert found, f"docs/data.md has no example {name}"
    return found.group(1)


def run(folder: Path, format: str, want: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """In a process of its own, whose current folder is the user's and whose path does not name it."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    (folder / "tools").mkdir(exist_ok=True)
    script = folder / "tools" / "read.py"  # a script's own folder is on the path: not the one with the format
    script.write_text(READ)
    done = subprocess.run(
        [sys.executable, str(script), format, want],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    records, report = done.stdout.splitlines()
    return json.loads(records), json.loads(report)


def test_the_example_of_the_docs(tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text(example("answers.jsonl"))
    (tmp_path / "my_formats.py").write_text(example("my_formats.py"))
    (record,), report = run(tmp_path, "my_formats:voted", "preference")
    assert record["prompt"] == [{"role": "user", "content": "How do I undo my last commit?"}]
    assert record["chosen"] == [{"role": "assistant", "content": "git reset --soft HEAD~1"}]
    assert [answer[0]["content"] for answer in record["rejected"]] == ["git revert HEAD", "Delete the repository."]
    assert (record["id"], record["fields"]) == ("answers.jsonl:1", {"tag": "git"})
    (source,) = report["sources"]
    assert (source["read"], source["kept"], source["dropped"], source["format"]) == (2, 1, 1, "my_formats:voted")
    (conversation,), _ = run(tmp_path, "my_formats:voted", "conversation")
    assert conversation["messages"][-1] == {"role": "assistant", "content": "git reset --soft HEAD~1"}


# The module that the following tests plug in


FORMATS = """
from align.data.formats.formats import RowError
from align.data.records import Conversation, Origin


def turns(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def each(row):
    return [{"messages": turns(row["q"], answer)} for answer in row["answers"]]


def record(row):
    return Conversation(tuple(turns(row["q"], row["answers"][0])), "mine", Origin("elsewhere", 99), fields={"tag": "x"})


def strict(row):
    if row["q"] == "two":
        raise RowError("no licence", "licence")
    return {"id": row["q"], "messages": turns(row["q"], row["answers"][0])}


def broken(row):
    return {"messages": turns(row["q"], row["unknown"])}


def text(row):
    return "messages"


not_a_function = 3
"""


@pytest.fixture
def plugged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"formats_of_{tmp_path.name}"  # a name of its own: modules stay imported
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(FORMATS))
    (tmp_path / "rows.jsonl").write_text('{"q": "one", "answers": ["a", "b"]}\n{"q": "two", "answers": ["c", " "]}\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return name


def read(format: str, **options: Any) -> Records:
    return read_records(
        [DataSource(path="rows.jsonl", format=format, **options)],
        [Path("rows.jsonl")],
        "conversation",
        seed=1,
        rejects=None,
    )


def test_a_row_may_become_several_records(plugged: str) -> None:
    """The checks are those of every row: one empty answer makes its row bad, not the whole file."""
    records = read(f"{plugged}:each", on_bad_row="skip")
    assert [record.id for record in records] == ["rows.jsonl:1#1", "rows.jsonl:1#2"]
    assert [str(bad) for bad in records.report.sources[0].first_bad] == ["rows.jsonl:2 messages.1.content: is empty"]


def test_a_record_is_checked_and_keeps_its_own_id(plugged: str) -> None:
    first, second = read(f"{plugged}:record")
    assert (first.id, first.fields, str(first.origin)) == ("mine", {"tag": "x"}, "rows.jsonl:1")
    assert str(second.origin) == "rows.jsonl:2"


def test_a_row_may_be_refused_with_a_reason(plugged: str) -> None:
    records = read(f"{plugged}:strict", on_bad_row="skip")
    assert [record.id for record in records] == ["one"]
    assert str(records.report.sources[0].first_bad[0]) == "rows.jsonl:2 licence: no licence"


def test_an_exception_is_reported_with_the_rows_place_and_the_codes(plugged: str) -> None:
    """Not a traceback out of somebody else's function."""
    with pytest.raises(InputError) as caught:
        list(read(f"{plugged}:broken"))
    line = next(i for i, text in enumerate(FORMATS.splitlines(), 1) if "unknown" in text)
    assert (
        str(caught.value.problems[0])
        == f"rows.jsonl:1: {plugged}:broken raised KeyError: 'unknown' ({plugged}.py:{line})"
    )
    assert str(caught.value.problems[-1]).startswith("2 bad rows in all")


def test_what_is_no_form_is_refused(plugged: str) -> None:
    with pytest.raises(InputError, match=r"rows\.jsonl:1: .*:text returned a string; expected a dictionary, a record"):
        list(read(f"{plugged}:text"))


@pytest.mark.parametrize("name", ["absent", "not_a_function"])
def test_a_function_that_is_not_there_is_found_when_the_recipe_is_checked(plugged: str, name: str) -> None:
    with pytest.raises(ValueError, match="validation error"):
        read(f"{plugged}:{name}")
