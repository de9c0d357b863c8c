"""Shapes that need code: every function gives the messages that a person would read in the row, and refuses what it
cannot read."""

from __future__ import annotations

import json
from typing import Any

import pytest

from align.data.formats.formats import RowError, converter
from align.data.mapping.coded import CODED
from align.data.messages.messages import quiet
from align.data.records import Conversation, Origin
from align.data.rows import LeftOut
from align.data.sources.readers import Row
from align.recipe.rows.presets import PRESETS
from align.recipe.schema import DataSource

ORIGIN = Origin("rows.jsonl", 7)


def conversation(row: Any, name: str, **changes: Any) -> Conversation:
    format = {"preset": name, **changes} if changes else name
    convert = converter(DataSource.model_validate({"path": "rows.jsonl", "format": format}), "conversation")
    (record,) = convert(Row(row, ORIGIN))
    assert isinstance(record, Conversation)
    return record


def said(record: Conversation) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in record.messages]


def calls(record: Conversation, at: int) -> list[tuple[str, Any]]:
    return [(call["function"]["name"], call["function"]["arguments"]) for call in record.messages[at]["tool_calls"]]


def test_every_function_belongs_to_a_preset_and_the_other_way_round() -> None:
    assert {preset.code for preset in PRESETS.values() if preset.code} == set(CODED)


# xLAM


def xlam_row(**changes: Any) -> dict[str, Any]:
    tool = {
        "name": "tide",
        "description": "When is high water?",
        "parameters": {
            "port": {"type": "str", "description": "Where"},
            "day": {"type": "str, optional", "description": "When", "default": "today"},
            "heights": {"type": "List[float], optional", "description": ""},
            "limit": {"type": "int", "description": "", "default": 3},
        },
    }
    calls = [
        {"name": "tide", "arguments": {"port": "Brest"}},
        {"name": "tide", "arguments": {"port": "Ostend", "day": "Sunday"}},
    ]
    return {
        "id": 4,
        "query": "High water at Brest, and at Ostend on Sunday?",
        "answers": json.dumps(calls),
        "tools": json.dumps([tool]),
    } | changes


def test_xlam_has_all_calls_in_one_message_and_schemas_for_its_tools() -> None:
    record = conversation(xlam_row(), "xlam")
    assert said(record) == [("user", "High water at Brest, and at Ostend on Sunday?"), ("assistant", "")]
    assert calls(record, 1) == [("tide", {"port": "Brest"}), ("tide", {"port": "Ostend", "day": "Sunday"})]
    schema = record.tools[0]["function"]["parameters"]
    assert schema["type"] == "object"
    assert schema["required"] == ["port"]
    assert {name: entry["type"] for name, entry in schema["properties"].items()} == {
        "port": "string",
        "day": "string",
        "heights": "array",
        "limit": "integer",
    }
    assert record.id == "4"


@pytest.mark.parametrize("empty", ["[]", " [] ", [], ""])
def test_xlam_without_a_call_gives_nothing(empty: Any) -> None:
    with pytest.raises(LeftOut, match="has no call"):
        conversation(xlam_row(answers=empty), "xlam")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"answers": "call tide"}, "answers"),
        ({"answers": '[{"arguments": {}}]'}, "answers.0.name"),
        ({"tools": '[{"name": "tide", "parameters": {"port": "str"}}]'}, "tools.0.parameters.port"),
        ({"tools": "{}"}, "tools"),
        ({"query": ""}, "query"),
    ],
)
def test_xlam_rows_that_cannot_be_read(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(RowError) as caught:
        conversation(xlam_row(**changes), "xlam")
    assert caught.value.field == field


# glaive


SCHEMA = '{"type": "object", "properties": {"inches": {"type": "number"}}}'
TOOL = f'{{\n    "name": "convert",\n    "description": "Units",\n    "parameters": {SCHEMA}\n}}'
CHAT = (
    'USER: Ten inches in cm?\n\n\nASSISTANT: Let me see. <functioncall> {"name": "convert", "arguments": \'{"inches":'
    ' 10}\'} <|endoftext|>\n\n\nFUNCTION RESPONSE: {"cm": 25.4}\n\n\nASSISTANT: 25.4 cm. <|endoftext|>\n\n\nUSER:'
    " Thanks\n\n\nASSISTANT: You are"
)


@pytest.mark.parametrize("version", [1, 2])
def test_glaive_transcripts(version: int) -> None:
    system = f"SYSTEM: You may use these functions -\n{TOOL}\n"
    row = {"system": system, "chat": CHAT} if version == 2 else {"sample": f"{system}\n{CHAT}"}
    record = conversation(row, "glaive_v2")
    assert said(record) == [
        ("system", "You may use these functions -"),
        ("user", "Ten inches in cm?"),
        ("assistant", "Let me see."),
        ("tool", '{"cm": 25.4}'),
        ("assistant", "25.4 cm."),
        ("user", "Thanks"),
        ("assistant", "You are"),
    ]
    assert calls(record, 2) == [("convert", {"inches": 10})]
    assert [message.get("finished", True) for message in record.messages if message["role"] == "assistant"] == [
        True,
        True,
        False,
    ]
    assert [tool["function"]["name"] for tool in record.tools] == ["convert"]


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        ('{"name": "f", "arguments": \'{"a": "it\\\'s"}\'}', {"a": "it's"}),
        ('{"name": "f", "arguments": {"a": 1}}', {"a": 1}),
        ('{"name": "f", "arguments": \'{}\'}', {}),
        ('{"name": "f"}', {}),
    ],
)
def test_glaive_calls(call: str, arguments: Any) -> None:
    row = {"system": "SYSTEM: x", "chat": f"USER: q\n\n\nASSISTANT: <functioncall> {call} <|endoftext|>"}
    assert calls(conversation(row, "glaive_v2"), 2) == [("f", arguments)]


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ("USER: q\n\n\nASSISTANT: <functioncall> f(1) <|endoftext|>", "expected a call"),
        ("USER: q\n\n\nASSISTANT: a\nUSER: and?\nASSISTANT: b <|endoftext|>", "the mark of a speaker inside a turn"),
        (
            'USER: q\n\n\nASSISTANT: <functioncall> {"name": "f", "arguments": \'[1\'} <|endoftext|>',
            "expected an object of arguments",
        ),
    ],
)
def test_glaive_rows_that_cannot_be_read(chat: str, message: str) -> None:
    with pytest.raises(RowError, match=message):
        conversation({"system": "SYSTEM: x", "chat": chat}, "glaive_v2")


# MOSS


def moss_turn(asked: str, answered: str, commands: str = "None", thought: str = "None") -> dict[str, str]:
    return {
        "Human": f"<|Human|>: {asked}<eoh>\n",
        "Inner Thoughts": f"<|Inner Thoughts|>: {thought}<eot>\n",
        "Commands": f"<|Commands|>: {commands}<eoc>\n",
        "Tool Responses": "<|Results|>: None<eor>\n",
        "MOSS": f"<|MOSS|>: {answered}<eom>\n",
    }


def test_moss_turns_follow_their_numbers() -> None:
    turns = {f"turn_{number}": moss_turn(f"q{number}", f"a{number}") for number in (10, 2, 1, 9, 3, 4, 5, 6, 7, 8)}
    record = conversation(
        {"conversation_id": "7", "meta_instruction": "Be kind.", "num_turns": 10, "chat": turns}, "moss003"
    )
    assert said(record)[0] == ("system", "Be kind.")
    assert [text for role, text in said(record) if role == "user"] == [f"q{number}" for number in range(1, 11)]
    assert record.id == "7"


def test_moss_commands_are_no_calls() -> None:
    chat = {"turn_1": moss_turn("q", "a", commands='Search("tide")')}
    with pytest.raises(LeftOut, match="has a command"):
        conversation({"chat": chat}, "moss003")
    with pytest.raises(RowError, match="turn_1, turn_2"):
        conversation({"chat": {"first": moss_turn("q", "a")}}, "moss003")


# Exports


def node(id: str, parent: str | None, role: str, text: str, **more: Any) -> dict[str, Any]:
    message = {
        "author": {"role": role},
        "content": {"content_type": "text", "parts": [text]},
        "recipient": "all",
        "metadata": {},
    } | more
    return {"id": id, "parent": parent, "children": [], "message": message}


def tree(*nodes: dict[str, Any], at: str) -> dict[str, Any]:
    root = {"id": "root", "parent": None, "children": [], "message": None}
    return {
        "title": "t",
        "conversation_id": "c",
        "mapping": {one["id"]: one for one in (root, *nodes)},
        "current_node": at,
    }


def test_a_chat_of_chatgpt_is_the_path_to_its_current_node() -> None:
    hidden = node("s", "root", "system", "secret", metadata={"is_visually_hidden_from_conversation": True})
    nodes = (
        hidden,
        node("u", "s", "user", "Soup?"),
        node("a", "u", "assistant", "Leek."),
        node("b", "u", "assistant", "Pea."),
    )
    later = (node("v", "b", "user", "Cold?"), node("w", "v", "assistant", "Hot."))
    convert = converter(DataSource(path="x", format="chatgpt_export"), "conversation")
    (record,) = convert(Row(tree(*nodes, *later, at="w"), ORIGIN))
    assert isinstance(record, Conversation)
    assert said(record) == [("user", "Soup?"), ("assistant", "Pea."), ("user", "Cold?"), ("assistant", "Hot.")]
    assert (record.id, convert.notes["an answer in another branch of a chat, left out"]) == ("c", 1)


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        (
            tree(node("u", "root", "user", "q"), node("a", "u", "assistant", "x", recipient="python"), at="a"),
            LeftOut,
            "a form of its own",
        ),
        (tree(node("u", "root", "user", "q"), at="u"), RowError, "ends with the user"),
        (
            tree(node("u", "gone", "user", "q"), node("a", "u", "assistant", "x"), at="a"),
            RowError,
            "has no message 'gone'",
        ),
        (tree(node("u", "a", "user", "q"), node("a", "u", "assistant", "x"), at="a"), RowError, "circle"),
        (
            tree(node("u", "root", "user", "q", content={"content_type": "multimodal_text", "parts": [{}]}), at="u"),
            RowError,
            "not text: multimodal_text",
        ),
    ],
)
def test_chats_of_chatgpt_that_give_nothing(row: dict[str, Any], kind: type[RowError], message: str) -> None:
    with pytest.raises(kind, match=message):
        conversation(row, "chatgpt_export")


def test_an_export_can_be_repaired_like_any_other_source() -> None:
    row = tree(node("u", "root", "user", "q"), node("a", "u", "assistant", "x"), node("v", "a", "user", "and?"), at="v")
    assert said(conversation(row, "chatgpt_export", repair=["trailing_user"])) == [("user", "q"), ("assistant", "x")]


def web_chat(*messages: dict[str, Any], at: str, **chat: Any) -> dict[str, Any]:
    return {"id": "w", "chat": {"history": {"messages": {one["id"]: one for one in messages}, "currentId": at}, **chat}}


def turn(id: str, parent: str | None, role: str, text: str, **more: Any) -> dict[str, Any]:
    return {"id": id, "parentId": parent, "role": role, "content": text, **more}


def test_a_chat_of_open_webui() -> None:
    thought = (
        '<details type="reasoning" done="true">\n<summary>Thought for 2 s</summary>\n> leeks\n> or'
        " peas\n</details>\nPea."
    )
    row = web_chat(
        turn("1", None, "user", "Soup?"),
        turn("2", "1", "assistant", "Leek."),
        turn("3", "1", "assistant", thought, done=True),
        at="3",
        system="Be brief.",
        messages=[{"role": "user", "content": "stale"}],
    )
    record = conversation(row, "open_webui")
    assert said(record) == [("system", "Be brief."), ("user", "Soup?"), ("assistant", "Pea.")]
    assert record.messages[2]["reasoning"] == "leeks\nor peas"
    stopped = conversation(
        web_chat(turn("1", None, "user", "q"), turn("2", "1", "assistant", "Le", done=False), at="2"), "open_webui"
    )
    assert stopped.messages[1]["finished"] is False


@pytest.mark.parametrize(
    ("more", "kind", "message"),
    [
        ({"error": {"content": "no quota"}}, LeftOut, "ended in an error"),
        ({"content": '<details type="tool_calls">x</details>y'}, LeftOut, "a form of its own"),
        ({"files": [{"id": "f"}]}, RowError, "has files"),
    ],
)
def test_chats_of_open_webui_that_give_nothing(more: dict[str, Any], kind: type[RowError], message: str) -> None:
    with pytest.raises(kind, match=message):
        conversation(
            web_chat(turn("1", None, "user", "q"), {**turn("2", "1", "assistant", "a"), **more}, at="2"), "open_webui"
        )


def test_a_chat_of_claude() -> None:
    messages: list[dict[str, Any]] = [
        {
            "sender": "human",
            "text": "Soup?",
            "content": [{"type": "text", "text": "Soup?"}],
            "attachments": [],
            "files": [],
        },
        {"sender": "assistant", "text": "Pea.", "content": [], "attachments": [], "files": []},
    ]
    assert said(conversation({"uuid": "c", "chat_messages": messages}, "claude_export")) == [
        ("user", "Soup?"),
        ("assistant", "Pea."),
    ]
    messages[0]["attachments"] = [{"file_name": "x.txt"}]
    with pytest.raises(RowError, match="has attachments"):
        conversation({"uuid": "c", "chat_messages": messages}, "claude_export")
    messages[0] |= {"attachments": [], "content": [{"type": "tool_use", "name": "f", "input": {}}]}
    with pytest.raises(RowError, match="not text: tool_use"):
        conversation({"uuid": "c", "chat_messages": messages}, "claude_export")


def langchain_row(reason: str = "stop", **changes: Any) -> dict[str, Any]:
    def made(kind: str, **kwargs: Any) -> dict[str, Any]:
        return {
            "lc": 1,
            "type": "constructor",
            "id": ["langchain", "schema", "messages", f"{kind}Message"],
            "kwargs": kwargs,
        }

    answer = {"message": made("AI", content="Pea.", tool_calls=[]), "generation_info": {"finish_reason": reason}}
    asked = [made("System", content="Brief."), made("Human", content="Soup?", type="human")]
    return {"id": "r", "inputs": {"messages": [asked]}, "outputs": {"generations": [[answer]]}, "error": None} | changes


def test_a_run_of_langsmith() -> None:
    record = conversation(langchain_row(), "langchain_runs")
    assert said(record) == [("system", "Brief."), ("user", "Soup?"), ("assistant", "Pea.")]
    assert conversation(langchain_row("length"), "langchain_runs").messages[-1]["finished"] is False
    with pytest.raises(LeftOut, match="ended in an error"):
        conversation(langchain_row(error="timeout"), "langchain_runs")
    with pytest.raises(RowError, match="several answers"):
        conversation(langchain_row(outputs={"generations": [[{}, {}]]}), "langchain_runs")


# Rendered texts


@pytest.mark.parametrize(
    ("name", "text", "finished"),
    [
        ("inst_text", "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nq [/INST] a </s><s>[INST] r [/INST] b </s>", True),
        ("inst_text", "[INST] <<SYS>>Be brief.<</SYS>> q [/INST] a</s>[INST] r [/INST] b", False),
        (
            "chatml_text",
            (
                "<|im_start|>system\nBe"
                " brief.<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
                "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\nb"
            ),
            False,
        ),
        ("human_assistant_text", "### System: Be brief.### Human: q### Assistant: a### Human: r### Assistant: b", True),
    ],
)
def test_rendered_texts_are_cut(name: str, text: str, finished: bool) -> None:
    record = conversation({"text": text}, name)
    assert said(record) == [
        ("system", "Be brief."),
        ("user", "q"),
        ("assistant", "a"),
        ("user", "r"),
        ("assistant", "b"),
    ]
    assert record.messages[-1].get("finished", True) is finished


@pytest.mark.parametrize("text", ["no marks", "[INST] q [/INST]", "[INST] q", "x [INST] q [/INST] a"])
def test_rendered_texts_that_are_none(text: str) -> None:
    with pytest.raises(RowError):
        conversation({"text": text}, "inst_text")


def test_seed_tasks_are_rows_of_their_own() -> None:
    row = {"instruction": "Add.", "instances": {"input": "1 and 2", "output": "3"}}
    assert said(conversation(row, "self_instruct_seeds")) == [("user", "Add.\n\n1 and 2"), ("assistant", "3")]
    with pytest.raises(RowError, match="`explode: instances`"):
        conversation({**row, "instances": [{"output": "3"}, {"output": "4"}]}, "self_instruct_seeds")


@pytest.mark.parametrize("name", sorted(CODED))
def test_odd_rows_are_refused_and_never_crash(name: str) -> None:
    """Every column that the function reads, replaced by something else, alone and together."""
    coded = CODED[name]
    odd: tuple[Any, ...] = (
        None,
        "",
        "x",
        "{",
        "[]",
        3,
        [],
        {},
        [[]],
        [{}],
        {"x": 1},
        {"history": {}},
        {"messages": 3},
        {"turn_1": 3},
    )
    for value in odd:
        for columns in (coded.columns, *({column} for column in coded.columns)):
            example = next(preset.example for preset in PRESETS.values() if preset.code == name)
            row = {**example, **dict.fromkeys(columns, value)}
            try:
                found = coded(row, quiet)
            except RowError:
                continue
            assert isinstance(found["messages"], list)
