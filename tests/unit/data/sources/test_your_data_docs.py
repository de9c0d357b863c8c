"""The page "Your data" is true: its table is made from the presets, and every mapping on it gives what it says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from align.data.mapping.better import BOTH_BAD, EQUAL, NO_SCORE, NOT_JUDGED, ONE_ANSWER, SMALL_GAP, TIE
from align.data.mapping.mapped import EMPTY_ANSWER
from align.data.records import Conversation, Preference, Prompt, Record, Unpaired
from align.data.sources.mixture import GROUP_REFUSED, read_records
from align.recipe.language.yaml_tree import SourcePlace, parse_value
from align.recipe.manuals.preset_table import filled
from align.recipe.reference_syntax import shipped_root
from align.recipe.rows.presets import PRESETS
from align.recipe.schema import DataSource

PAGE = shipped_root() / "docs" / "your-data.md"
TEXT = PAGE.read_text(encoding="utf-8")
EXAMPLES = re.findall(
    r"<!-- example: (\S+) -->\n```\w+\n(.*?)```.*?```yaml\n(.*?)```.*?<!-- becomes: (\w+) -->\n```json\n(.*?)```",
    TEXT,
    re.DOTALL,
)


def test_the_table_is_made_from_the_presets() -> None:
    """After a change of the presets: python -m align.recipe.manuals.preset_table docs/your-data.md."""
    assert filled(TEXT) == TEXT
    assert all(f"| `{name}`" in TEXT for name in PRESETS)


# The same sources as stages that compare labelled answers read them
COMPARED = re.findall(r"<!-- compared: (\S+) -->\n```json\n(.*?)```", TEXT, re.DOTALL)


def test_there_are_six_worked_mappings_and_the_index_names_the_page() -> None:
    assert len(EXAMPLES) == 6
    assert [file for file, _ in COMPARED] == ["thumbs.jsonl"]
    assert "(your-data.md)" in (PAGE.parent / "index.md").read_text(encoding="utf-8")


def shown(record: Record) -> Any:
    """A record as the page writes it."""
    if isinstance(record, Conversation):
        return [[m["role"], m["content"], *([] if m.get("finished", True) else ["cut off"])] for m in record.messages]
    entry: dict[str, Any] = {"prompt": record.prompt[-1]["content"]}
    if isinstance(record, Preference):
        entry |= {"chosen": record.chosen[-1]["content"], "rejected": [one[-1]["content"] for one in record.rejected]}
        entry |= {"margins": list(record.margins)} if record.margins else {}
    if isinstance(record, Unpaired):
        entry |= {"completion": record.completion[-1]["content"], "label": record.label}
    if isinstance(record, Prompt):
        entry["answer"] = record.fields["answer"]
    return entry


@pytest.mark.parametrize(
    ("file", "content", "recipe", "want", "becomes"), EXAMPLES, ids=[example[0] for example in EXAMPLES]
)
def test_a_worked_mapping_gives_what_the_page_says(
    file: str, content: str, recipe: str, want: Any, becomes: str, tmp_path: Path
) -> None:
    assert what_comes_out(tmp_path, file, content, recipe, want) == [json.loads(line) for line in becomes.splitlines()]


@pytest.mark.parametrize(("file", "becomes"), COMPARED)
def test_labelled_answers_are_compared_as_the_page_says(file: str, becomes: str, tmp_path: Path) -> None:
    (content, recipe) = next(example[1:3] for example in EXAMPLES if example[0] == file)
    found = what_comes_out(tmp_path, file, content, recipe, "preference")
    assert found == [json.loads(line) for line in becomes.splitlines()]


def test_the_good_ones_alone_are_conversations(tmp_path: Path) -> None:
    """As the page says of an `sft` stage."""
    file, content, recipe = next(example[:3] for example in EXAMPLES if example[0] == "thumbs.jsonl")
    assert "`where: {feedback.thumb: up}`" in TEXT
    found = what_comes_out(tmp_path, file, content, recipe + "where: {feedback.thumb: up}\n", "conversation")
    assert [turns[-1] for turns in found] == [["assistant", "Until six."], ["assistant", "In aisle four."]]


def what_comes_out(folder: Path, file: str, content: str, recipe: str, want: Any) -> list[Any]:
    """The records of a file of the page, and what was left out."""
    path = folder / file
    path.write_text(content, encoding="utf-8")
    node = parse_value(recipe, SourcePlace("page"), [])
    assert node is not None
    source = DataSource.model_validate(node.plain())
    assert source.path == file
    records = read_records([source], [path], want, seed=0, rejects=None)
    found = [shown(record) for record in records]
    if reasons := records.report.sources[0].reasons:
        found.append({"left out": reasons})
    return found


def test_every_reason_for_leaving_out_a_comparison_is_explained() -> None:
    for reason in (TIE, BOTH_BAD, SMALL_GAP, NOT_JUDGED, NO_SCORE, ONE_ANSWER, EQUAL, EMPTY_ANSWER, GROUP_REFUSED):
        assert reason in TEXT, reason
