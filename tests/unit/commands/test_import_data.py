"""``align import``: the data sets of other tools as sources: accepted by the schema, read as those tools mean them,
losses listed."""

from __future__ import annotations

import json
from pathlib import Path, PurePath
from typing import Any

import pytest
import yaml

from align.cli.imports import import_sources
from align.commands.convert_data import convert
from align.commands.import_data import Imported, as_yaml, axolotl, llama_factory, swift
from align.data.records import Conversation, Messages, Preference, Record, Unpaired
from align.data.sources.mixture import read_records
from align.errors import InputError
from align.recipe.language.yaml_tree import SourcePlace, parse_value
from align.recipe.schema import DataSource


def records(folder: Path, one: Imported, rows: list[Any], want: Any) -> list[Record]:
    """The rows read through an imported source, which is taken as it is printed."""
    printed = as_yaml([one], "here")
    (keys,) = yaml.safe_load(printed)["data"]
    node = parse_value(json.dumps(keys), SourcePlace("printed"), [])
    assert node is not None and node.plain() == one.source == keys
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = DataSource.model_validate({**keys, "path": str(path)}).model_copy(
        update={"split": None, "subset": None, "revision": None}
    )
    return list(read_records([source], [path], want, seed=0, rejects=None))


def said(messages: Messages) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages]


TURNS = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]
CHAT = [("user", "2+2?"), ("assistant", "4")]
LLAMA_FACTORY: list[tuple[dict[str, Any], dict[str, Any], Any]] = [
    ({}, {"instruction": "2+2?", "input": "", "output": "4"}, CHAT),
    ({}, {"instruction": "Add.", "input": "2+2?", "output": "4"}, [("user", "Add.\n2+2?"), ("assistant", "4")]),
    (
        {"columns": {"prompt": "q", "query": "more", "response": "a", "system": "rules", "history": "before"}},
        {"q": "2+2?", "more": "", "a": "4", "rules": "Be brief.", "before": [["1+1?", "2"]]},
        [("system", "Be brief."), ("user", "1+1?"), ("assistant", "2"), *CHAT],
    ),
    ({"formatting": "sharegpt"}, {"conversations": TURNS}, CHAT),
    (
        {
            "formatting": "sharegpt",
            "columns": {"messages": "talk", "system": "rules"},
            "tags": {"role_tag": "who", "content_tag": "what", "user_tag": "Q", "assistant_tag": "A"},
        },
        {"talk": [{"who": "Q", "what": "2+2?"}, {"who": "A", "what": "4"}], "rules": ""},
        CHAT,
    ),
    (
        {
            "formatting": "openai",
            "columns": {"messages": "messages"},
            "tags": {"role_tag": "role", "content_tag": "content"},
        },
        {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]},
        CHAT,
    ),
]


@pytest.mark.parametrize(("entry", "row", "expected"), LLAMA_FACTORY)
def test_conversations_of_llama_factory(
    entry: dict[str, Any], row: dict[str, Any], expected: Any, tmp_path: Path
) -> None:
    (one,) = llama_factory({"mine": {"file_name": "rows.jsonl", **entry}}, PurePath("data"))
    assert one.source is not None and one.source["path"] == "data/rows.jsonl"
    (record,) = records(tmp_path, one, [row], "conversation")
    assert isinstance(record, Conversation) and said(record.messages) == expected


@pytest.mark.parametrize(
    ("entry", "row"),
    [
        (
            {
                "ranking": True,
                "columns": {"prompt": "instruction", "query": "input", "chosen": "good", "rejected": "bad"},
            },
            {"instruction": "2+2?", "input": "", "good": "4", "bad": "5"},
        ),
        (
            {
                "ranking": True,
                "formatting": "sharegpt",
                "columns": {"messages": "conversations", "chosen": "good", "rejected": "bad"},
            },
            {"conversations": TURNS[:1], "good": TURNS[1], "bad": {"from": "gpt", "value": "5"}},
        ),
    ],
)
def test_preferences_of_llama_factory_keep_their_direction(
    entry: dict[str, Any], row: dict[str, Any], tmp_path: Path
) -> None:
    (one,) = llama_factory({"mine": {"file_name": "rows.jsonl", **entry}}, PurePath("data"))
    (record,) = records(tmp_path, one, [row], "preference")
    assert isinstance(record, Preference)
    assert (said(record.prompt), said(record.chosen), said(record.rejected[0])) == (
        CHAT[:1],
        CHAT[1:],
        [("assistant", "5")],
    )


@pytest.mark.parametrize("label", [True, False])
def test_labels_of_llama_factory(label: bool, tmp_path: Path) -> None:
    entry = {
        "file_name": "k.json",
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "kto_tag": "good"},
    }
    (one,) = llama_factory({"mine": entry}, PurePath("data"))
    (record,) = records(tmp_path, one, [{"conversations": TURNS, "good": label}], "unpaired")
    assert isinstance(record, Unpaired) and (said(record.prompt), said(record.completion), record.label) == (
        CHAT[:1],
        CHAT[1:],
        label,
    )


def test_entries_are_chosen_by_name_and_losses_are_listed() -> None:
    declared = {
        "a": {
            "hf_hub_url": "org/a",
            "subset": "s",
            "split": "test",
            "revision": "abc",
            "num_samples": 50,
            "file_sha1": "0",
        },
        "b": {
            "file_name": "b.json",
            "formatting": "openai",
            "split": "train",
            "columns": {"messages": "messages", "images": "images"},
        },
        "c": {"script_url": "c"},
        "d": {"ms_hub_url": "org/d"},
        "e": {"file_name": "e.txt", "columns": {"prompt": "text"}},
    }
    a, b, c, d, e = llama_factory(declared, PurePath("x"))
    assert a.source is not None
    assert {key: a.source[key] for key in ("path", "subset", "split", "revision", "limit")} == {
        "path": "org/a",
        "subset": "s",
        "split": "test",
        "revision": "abc",
        "limit": 50,
    }
    assert b.source == {"path": "x/b.json", "format": {"messages": "messages"}}
    assert [note.partition(":")[0] for note in b.notes[:2]] == ["columns.images", "formatting"]
    assert [(one.source, one.notes[0]) for one in (c, d)] == [
        (None, "script_url: a program is not run"),
        (None, "ms_hub_url: another hub: copy the data"),
    ]
    assert e.source is None and "pre-training" in e.notes[0]
    assert [one.name for one in llama_factory(declared, PurePath("x"), ["d", "a"])] == ["d", "a"]
    with pytest.raises(InputError, match="no data set `z`; there are a, b, c"):
        llama_factory(declared, PurePath("x"), ["z"])
    printed = as_yaml([a, c], "dataset_info.json")
    assert printed.splitlines()[-1] == "#   c: script_url: a program is not run"
    assert "#   a: file_sha1: " in printed


AXOLOTL: list[tuple[dict[str, Any], dict[str, Any], Any]] = [
    (
        {"type": "alpaca"},
        {"instruction": "Add.", "input": "2+2?", "output": "4"},
        [("user", "Add.\n\n2+2?"), ("assistant", "4")],
    ),
    (
        {"type": "chat_template"},
        {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]},
        CHAT,
    ),
    (
        {
            "type": "chat_template",
            "field_messages": "talk",
            "message_property_mappings": {"role": "who", "content": "what"},
            "roles": {"user": ["Q"], "assistant": ["A"]},
            "drop_system_message": True,
        },
        {"talk": [{"who": "system", "what": "S"}, {"who": "Q", "what": "2+2?"}, {"who": "A", "what": "4"}]},
        CHAT,
    ),
    (
        {
            "type": {
                "field_instruction": "q",
                "field_input": "more",
                "field_output": "a",
                "field_system": "s",
                "format": "[INST] {instruction}",
            }
        },
        {"q": "2+2?", "more": "", "a": "4", "s": "S"},
        [("system", "S"), *CHAT],
    ),
]


@pytest.mark.parametrize(("entry", "row", "expected"), AXOLOTL)
def test_conversations_of_axolotl(entry: dict[str, Any], row: dict[str, Any], expected: Any, tmp_path: Path) -> None:
    (one,) = axolotl({"datasets": [{"path": "rows.jsonl", "ds_type": "json", **entry}]})
    (record,) = records(tmp_path, one, [row], "conversation")
    assert isinstance(record, Conversation) and said(record.messages) == expected


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("chatml.intel", {"system": "", "question": "2+2?", "chosen": "4", "rejected": "5"}),
        ("chatml.icr", {"input": "2+2?", "chosen": "4", "rejected": "5"}),
        ("chatml.argilla", {"instruction": "2+2?", "chosen_response": "4", "rejected_response": "5"}),
        ("chatml.prompt_pairs", {"prompt": "2+2?", "chosen": "4", "rejected": "5"}),
        (
            "chat_template.default",
            {
                "messages": [{"role": "user", "content": "2+2?"}],
                "chosen": {"role": "assistant", "content": "4"},
                "rejected": "5",
            },
        ),
        ({"field_prompt": "q", "field_chosen": "a", "field_rejected": "b"}, {"q": "2+2?", "a": "4", "b": "5"}),
    ],
)
def test_preferences_of_axolotl_keep_their_direction(kind: Any, row: dict[str, Any], tmp_path: Path) -> None:
    (one,) = axolotl({"rl": "dpo", "datasets": [{"path": "rows.jsonl", "type": kind}]})
    (record,) = records(tmp_path, one, [row], "preference")
    assert isinstance(record, Preference)
    assert (said(record.prompt), said(record.chosen), said(record.rejected[0])) == (
        CHAT[:1],
        CHAT[1:],
        [("assistant", "5")],
    )


def test_what_axolotl_has_more_is_listed() -> None:
    entry = {
        "path": "org/x",
        "name": "sub",
        "split": "train",
        "type": "chat_template",
        "roles_to_train": ["user"],
        "train_on_eos": "all",
    }
    entry |= {"shards": 4, "field_tools": "functions", "message_field_training": "learn"}
    one, text, rest = axolotl({"datasets": [entry, {"path": "b.jsonl", "type": "completion"}], "val_set_size": 0.1})
    assert one.source == {
        "path": "org/x",
        "subset": "sub",
        "split": "train",
        "format": {"messages": "messages", "tools": "functions", "turns": {"train": "learn"}},
    }
    DataSource.model_validate(one.source)
    assert [note.partition(":")[0] for note in one.notes] == ["shards", "roles_to_train", "train_on_eos"]
    assert text.source is None and rest.source is None and rest.notes[0].startswith("val_set_size: ")


def test_data_sets_of_swift(tmp_path: Path) -> None:
    one, two = swift("hf::org/name:first/second#500", {"ask": "query", "say": "response"})
    assert [(found.source or {})["subset"] for found in (one, two)] == ["first", "second"]
    assert one.source == {
        "path": "org/name",
        "format": {"prompt": "ask", "completion": "say"},
        "limit": 500,
        "subset": "first",
    }
    (record,) = records(tmp_path, one, [{"ask": "2+2?", "say": "4"}], "conversation")
    assert isinstance(record, Conversation) and said(record.messages) == CHAT
    (pair,) = swift("rows.jsonl", {"talk": "messages", "worse": "rejected_response", "pic": "images"})
    assert pair.notes == ["columns.pic: images has no counterpart"]
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    (made,) = records(tmp_path, pair, [{"talk": messages, "worse": "5"}], "preference")
    assert isinstance(made, Preference) and (said(made.chosen), said(made.rejected[0])) == (
        CHAT[1:],
        [("assistant", "5")],
    )
    assert "another hub" in swift("org/name")[0].notes[0]


def test_what_is_written_for_llama_factory_is_imported_again(tmp_path: Path) -> None:
    from align.data.formats.other_tools import declaration

    row = {
        "id": "a",
        "prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "2+2?"}],
        "chosen": "4",
        "rejected": "5",
    }
    path, out = tmp_path / "a.jsonl", tmp_path / "out.jsonl"
    path.write_text(json.dumps(row) + "\n")
    made = convert(DataSource(path=str(path)), path, out, to="llama-factory", want="preference")
    (one,) = llama_factory({"out": declaration(out.name, made.kind)}, tmp_path)
    (record,) = records(tmp_path, one, [json.loads(out.read_text())], "preference")
    assert isinstance(record, Preference) and record.id == "a"
    assert (said(record.prompt), said(record.chosen)) == ([("system", "S"), CHAT[0]], CHAT[1:])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    declared = tmp_path / "dataset_info.json"
    declared.write_text(json.dumps({"a": {"file_name": "a.json"}, "b": {"script_url": "b"}}))
    import_sources(str(declared), ["a"])
    (source,) = yaml.safe_load(capsys.readouterr().out)["data"]
    assert source["path"] == str(tmp_path / "a.json")
    out = tmp_path / "data.yaml"
    import_sources(str(declared), out=out)
    assert "without a counterpart" in out.read_text()
    with pytest.raises(InputError, match=r"data\.yaml exists"):
        import_sources(str(declared), out=out)
    with pytest.raises(InputError, match="--columns: has no effect here"):
        import_sources(str(declared), columns="{}")
    declared.write_text('{"a": {"file_name": "a"}, "a": 1}')
    with pytest.raises(InputError, match="duplicate key 'a'"):
        import_sources(str(declared))
    recipe = tmp_path / "axolotl.yml"
    recipe.write_text("base_model: x\n")
    with pytest.raises(InputError, match="has no `datasets:` list"):
        import_sources(str(recipe))


@pytest.mark.parametrize(
    "entries", [{"a": {"file_name": "x.json", "formatting": "nonsense"}, "b": {"fil_name": "x"}}, {}]
)
def test_a_declaration_of_which_nothing_is_left_is_an_error(entries: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        as_yaml(llama_factory(entries, PurePath(".")), "info.json")
    assert [problem.key for problem in caught.value.problems] == (list(entries) or [None])
