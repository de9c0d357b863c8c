"""Every preset reads its own example as it says, is found by its columns where it has marks, and is printed to copy."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from align.cli.data import list_formats
from align.commands.inspect_data import inspect
from align.data.formats.formats import Converter, Want, detect
from align.data.records import Conversation, Messages, Origin, Preference, Prompt, Record
from align.data.sources.mixture import read_records
from align.data.sources.readers import Row
from align.errors import InputError
from align.recipe.language.yaml_tree import SourcePlace, parse_value
from align.recipe.rows.presets import FILE, PRESETS
from align.recipe.schema import FORMATS, DataSource

COMPARED = [name for name, preset in PRESETS.items() if preset.kind == "preference"]
FOUND = [name for name, preset in PRESETS.items() if (preset.marks or preset.holds) and not preset.asks]


def read(folder: Path, rows: list[Any], want: Want, **source: Any) -> list[Record]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(
        read_records([DataSource.model_validate({"path": str(path), **source})], [path], want, seed=0, rejects=None)
    )


def last(messages: Messages) -> str:
    return messages[-1]["content"]


def test_names_are_not_given_twice() -> None:
    assert not set(FORMATS) & set(PRESETS)
    names = [
        line.removesuffix(":") for line in FILE.read_text().splitlines() if line and not line.startswith((" ", "#"))
    ]
    assert len(names) == len(set(names))
    assert yaml.safe_load(FILE.read_text()).keys() == PRESETS.keys()


@pytest.mark.parametrize(
    "name", [name for name in COMPARED if name not in ("helpsteer", "prism", "oasst", "pku_saferlhf")]
)
def test_the_better_answer_is_chosen(name: str, tmp_path: Path) -> None:
    """In every example the answer to prefer is 4 (or the first of a row's letters)."""
    (record, *_) = read(tmp_path, [PRESETS[name].example], "preference", format=name)
    assert isinstance(record, Preference)
    wanted = {"summarize_from_feedback": "Lost.", "community_alignment": "a"}.get(name, "4")
    assert last(record.chosen) == wanted
    assert record.rejected
    assert all(last(answer) != wanted for answer in record.rejected)


@pytest.mark.parametrize("name", [name for name in PRESETS if PRESETS[name].kind == "conversation"])
def test_conversations(name: str, tmp_path: Path) -> None:
    (record,) = read(tmp_path, [PRESETS[name].example], "conversation", format=name)
    assert isinstance(record, Conversation)
    messages = [m for m in record.messages if m["role"] in ("user", "assistant")]
    said = [m["content"] or json.dumps(m["tool_calls"][0]["function"]["arguments"]) for m in messages]
    assert said == ["2+2?", '{"a": 2, "b": 2}' if name == "xlam" else "4"]


@pytest.mark.parametrize("name", [name for name in PRESETS if PRESETS[name].kind == "prompt"])
def test_prompts_and_their_right_answers(name: str, tmp_path: Path) -> None:
    (record,) = read(tmp_path, [PRESETS[name].example], "prompt", format=name)
    assert isinstance(record, Prompt)
    assert last(record.prompt) == "2+2?"
    if any("answer" in part.mapping for part in PRESETS[name].parts):
        assert record.fields["answer"] in ("4", ["4"])


@pytest.mark.parametrize("name", FOUND)
def test_a_preset_is_found_only_with_all_its_columns(name: str) -> None:
    row = dict(PRESETS[name].example)
    assert detect(row).name == name
    for mark in PRESETS[name].marks:
        column = mark.partition("|")[0].partition("[")[0].partition(".")[0]
        less = {key: value for key, value in row.items() if key != column}
        if len(less) < len(row):
            with contextlib.suppress(InputError, ValueError):
                assert detect(less).name != name


def test_grouped_rows(tmp_path: Path) -> None:
    """Rows of one prompt, in any order among others; a group of one has nothing to compare."""
    rows = [
        {"prompt": "a", "response": "bad", "helpfulness": 1, "verbosity": 0},
        {"prompt": "b", "response": "alone", "helpfulness": 1, "verbosity": 0},
        {"prompt": "a", "response": "good", "helpfulness": 3, "verbosity": 0},
    ]
    (record,) = read(tmp_path, rows, "preference")
    assert isinstance(record, Preference)
    assert (last(record.chosen), [last(one) for one in record.rejected], record.margins) == ("good", ["bad"], (2.0,))


def test_a_tree_of_rows(tmp_path: Path) -> None:
    def node(id: str, parent: str | None, role: str, text: str, rank: int | None = None) -> dict[str, Any]:
        return {"message_id": id, "parent_id": parent, "role": role, "text": text, "rank": rank}

    rows = [
        node("3", "2", "prompter", "And cold?"),
        node("1", None, "prompter", "A soup?"),
        node("5", "3", "assistant", "Ice.", 1),
        node("2", "1", "assistant", "Minestrone.", 0),
        node("6", "3", "assistant", "Gazpacho.", 0),
        node("9", "8", "assistant", "lost", 0),
    ]
    (record,) = read(tmp_path, rows, "preference", on_bad_row="skip")
    assert isinstance(record, Preference)
    assert [m["content"] for m in record.prompt] == ["A soup?", "Minestrone.", "And cold?"]
    assert (last(record.chosen), last(record.rejected[0])) == ("Gazpacho.", "Ice.")


def test_two_axes_have_to_be_told_apart() -> None:
    row = PRESETS["pku_saferlhf"].example
    with pytest.raises(InputError, match=r"format: \{preset: pku_saferlhf, better: \{winner: better_response_id\}\}"):
        Converter(DataSource(path="x.jsonl"), "preference")(Row(dict(row), Origin("x.jsonl", 1)))
    source = DataSource.model_validate(
        {"path": "x", "format": {"preset": "pku_saferlhf", "better": {"winner": "safer_response_id"}}}
    )
    other = {**row, "safer_response_id": 1}
    (record,) = Converter(source, "preference")(Row(other, Origin("x.jsonl", 1)))
    assert isinstance(record, Preference)
    assert last(record.chosen) == other["response_1"]


@pytest.mark.parametrize("name", [*PRESETS])
def test_what_is_printed_can_be_copied(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    list_formats(name)
    printed = capsys.readouterr().out
    lines = [line.partition("format: ")[2] for line in printed.splitlines() if line.startswith(("format: ", "where: "))]
    coded = PRESETS[name].code is not None
    assert [yaml.safe_load(line) for line in lines] == (
        [name] if coded else [part.mapping for part in PRESETS[name].parts]
    )
    assert yaml.safe_load(printed.splitlines()[-1].removeprefix("a row: ")) == PRESETS[name].example


def test_all_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    list_formats()
    printed = capsys.readouterr().out.splitlines()[1:]
    assert [line.partition(" (")[0] for line in printed] == list(PRESETS)
    for line, preset in zip(printed, PRESETS.values(), strict=True):
        assert all(part in line for part in (preset.hub, preset.kind, preset.says))
    with pytest.raises(InputError, match="no format `nectarine`"):
        list_formats("nectarine")


def outcome(folder: Path, rows: list[Any], want: Want, keys: dict[str, Any]) -> list[Any]:
    """The records of a source, without their order; none where nothing is left."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        found = list(
            read_records([DataSource.model_validate({**keys, "path": str(path)})], [path], want, seed=0, rejects=None)
        )
    except InputError as error:
        assert "0 rows left" in str(error)
        return []
    return sorted(map(repr, found))


def changed(row: Any) -> Any:
    """Another row of the same shape: another answer to the same question, and a worse one, so that groups have two."""
    text = json.dumps(row)
    for old, new in (("4", "four"), ("2", "3")):
        text = text.replace(f'"{old}"', f'"{new}"')
    for key, old, new in (("helpfulness", 4, 1), ("score", 90, 10), ("rank", 0, 1)):
        text = text.replace(f'"{key}": {old}', f'"{key}": {new}')
    return json.loads(text)


ROOT = {"message_id": "1", "parent_id": None, "text": "2+2?", "role": "prompter", "rank": None}


@pytest.mark.parametrize("name", [*PRESETS])
def test_the_source_that_inspect_prints_reads_the_same_records(name: str, tmp_path: Path) -> None:
    """The line with the name, and those in which its mapping is written out; a preset of several parts becomes several
    sources."""
    preset = PRESETS[name]
    form: Any = {"preset": name, "better": {"winner": "better_response_id"}} if preset.asks else name
    rows = [*([ROOT] if name == "oasst" else []), preset.example, changed(preset.example)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = io.StringIO()
    source = DataSource.model_validate({"path": str(path), "format": form})
    inspect(source, path, model=None, want=preset.kind, limit=0, console=Console(file=out, width=60))  # type: ignore[arg-type]
    printed = out.getvalue().splitlines()
    told = [
        line.partition(": ")[2] for line in printed if line.startswith(("as a source: ", "the same, to be changed: "))
    ]
    nodes = [parse_value(line, SourcePlace("printed"), []) for line in told]
    first, *written_out = [node.plain() for node in nodes if node is not None]
    expected = outcome(tmp_path, rows, preset.kind, {"path": "x", "format": form})  # type: ignore[arg-type]
    assert outcome(tmp_path, rows, preset.kind, first) == expected  # type: ignore[arg-type]
    assert len(written_out) == (0 if preset.code else len(preset.parts))
    if written_out:
        assert not any("preset" in keys["format"] for keys in written_out)
        again = [one for keys in written_out for one in outcome(tmp_path, rows, preset.kind, keys)]  # type: ignore[arg-type]
        assert sorted(again) == expected
