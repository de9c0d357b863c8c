"""Messages in all their spellings: reasoning, calls, flags of loss, parts, tools, and JSON inside texts, each read in
full or refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from align.data.chat.encoder import Encoder
from align.data.formats.formats import RowError, Want, converter
from align.data.messages.messages import EMPTY_SYSTEM, PLAIN_CALL, messages_of
from align.data.records import Conversation, Messages, Origin, Preference, Prompt, Record, Unpaired
from align.data.sources.readers import Row, read_rows
from align.data.strict_json import parse_text
from align.data.trees.build import Limits, tree_of
from align.recipe.schema import DataSource
from align.stages.trl.data import TextIds, _judged
from tests.support.tokenizers import chatml

ORIGIN = Origin("rows.jsonl", 7)


def convert(value: dict[str, Any], want: Want = "conversation", **source: Any) -> Record:
    (record,) = converter(DataSource(path="rows.jsonl", **source), want)(Row(value, ORIGIN))
    return record


def read(*messages: dict[str, Any], **columns: Any) -> Messages:
    record = convert({"messages": list(messages), **columns})
    assert isinstance(record, Conversation)
    return record.messages


def refused(value: dict[str, Any], want: Want = "conversation", **source: Any) -> tuple[str | None, str]:
    with pytest.raises(RowError) as caught:
        convert(value, want, **source)
    return caught.value.field, caught.value.message


def says(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def asks(text: Any = "q", **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **more}


def call(name: str = "f", **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


# Reasoning


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_a_field_whatever_it_is_called(key: str) -> None:
    assert read(asks(), says("No.", **{key: "3 times 17"}))[1] == {
        "role": "assistant",
        "content": "No.",
        "reasoning": "3 times 17",
    }
    assert read(asks(**{key: ""}), says("No.", **{key: " "}))[1] == {"role": "assistant", "content": "No."}


def test_reasoning_as_a_part() -> None:
    for part in ({"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "reasoning", "value": "hm"}):
        message = read(asks(), says([part, {"type": "text", "text": "Oak."}]))[1]
        assert (message["reasoning"], message["content"]) == ("hm", "Oak.")


# Calls


def test_custom_calls_and_glm_metadata_are_the_same() -> None:
    custom = {"type": "custom", "custom": {"name": "python", "input": "print(2+2)"}}
    by_openai = read(asks(), says(None, tool_calls=[custom]), {"role": "tool", "content": "4"}, says("4"))
    by_glm = read(
        asks(),
        says("print(2+2)", metadata="python"),
        {"role": "observation", "metadata": "python", "content": "4"},
        says("4", metadata=""),
    )
    assert by_openai[1] == by_glm[1] == {"role": "assistant", "content": "", "tool_calls": [custom]}
    assert by_glm[2] == {"role": "tool", "content": "4", "metadata": "python"}
    assert refused({"messages": [asks(), says(None, metadata="python")]})[0] == "messages.1.content"
    assert refused({"messages": [asks(), says("x", metadata="two\nlines")]})[0] == "messages.1.metadata"


@pytest.mark.parametrize(
    "spelled",
    [
        [says("Wait.", tool_calls=[call(x=1)])],
        [says("Wait.", tool_calls=json.dumps([call(x=1)]))],
        [says("Wait.", function_call={"name": "f", "arguments": '{"x": 1}'})],
        [says("Wait."), {"role": "function_call", "content": '{"name": "f", "arguments": {"x": 1}}'}],
        [says("Wait."), {"role": "tool_call", "content": "{'name': 'f', 'arguments': {'x': 1}}"}],
        [says("Wait."), says("", tool_calls=[call(x=1)])],
        [says("Wait.", function_call=None), says("", function_call={"name": "f", "arguments": '{"x": 1}'})],
        [says([{"type": "text", "text": "Wait."}, {"type": "tool_use", "name": "f", "input": {"x": 1}}])],
        [
            says(
                [
                    {"type": "text", "value": "Wait."},
                    {"type": "tool_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                ]
            )
        ],
        [says([{"text": "Wait."}, {"functionCall": {"name": "f", "args": {"x": 1}}}])],
    ],
)
def test_a_call_in_every_spelling(spelled: list[dict[str, Any]]) -> None:
    messages = read(asks(), *spelled, {"role": "tool", "content": "2"}, says("two"))
    assert messages[1] == {"role": "assistant", "content": "Wait.", "tool_calls": [call(x=1)]}
    assert len(messages) == 4


def test_call_and_result_in_one_turn() -> None:
    """ChatGLM3's spelling; a result that is an object becomes its JSON."""
    turn = {"role": "tool", "name": "f", "parameters": {"x": 1}, "observation": {"price": 9}}
    messages = read(asks(), says("Wait."), turn, says("Nine."))
    assert messages[1]["tool_calls"] == [call(x=1)]
    assert messages[2] == {"role": "tool", "content": '{"price": 9}', "name": "f"}


def test_results_in_a_users_turn_are_messages_of_their_own() -> None:
    results = [{"type": "tool_result", "tool_use_id": "t1", "content": "7 m"}, {"type": "text", "text": "And?"}]
    messages = read(
        asks(), says([{"type": "tool_use", "id": "t1", "name": "f", "input": {}}]), asks(results), says("Seven.")
    )
    assert [(m["role"], m["content"]) for m in messages[2:]] == [
        ("tool", "7 m"),
        ("user", "And?"),
        ("assistant", "Seven."),
    ]
    assert messages[2]["tool_call_id"] == "t1"


def test_what_openai_accepts() -> None:
    """An empty result, a result with parts, a user after a tool, a refusal as the answer."""
    before = [asks(), says(None, tool_calls=[call()])]
    assert read(*before, {"role": "tool", "content": ""}, says("ok"))[2] == {"role": "tool", "content": ""}
    assert read(*before, {"role": "tool", "content": {"ok": True}}, says("ok"))[2]["content"] == '{"ok": true}'
    assert read(*before, {"role": "tool", "content": [{"type": "text", "text": "x"}]}, says("ok"))[2]["content"] == "x"
    assert [m["role"] for m in read(*before, {"role": "tool", "content": "1"}, asks("So?"), says("ok"))][3:] == [
        "user",
        "assistant",
    ]
    assert read(asks(), says(None, refusal="I cannot."))[1]["content"] == "I cannot."
    assert refused({"messages": [asks(), says(None, tool_calls=[{"function": {"name": "f", "arguments": None}}])]})[
        1
    ] == ("expected an object, found null; a call without arguments has {}")


def test_a_call_as_plain_json_needs_its_tool_and_a_result() -> None:
    text = '{"name": "f", "arguments": {"x": 1}}'
    turns = [asks(), says(text), {"role": "observation", "content": "1"}, says("one")]
    assert read(*turns, tools=[{"name": "f"}])[1] == {"role": "assistant", "content": "", "tool_calls": [call(x=1)]}
    assert read(*turns, tools=[{"name": "g"}])[1]["content"] == text
    assert read(*turns)[1]["content"] == text
    assert read(asks(), says(text), tools=[{"name": "f"}])[1]["content"] == text
    notes: list[str] = []
    convert_with = converter(DataSource(path="rows.jsonl"), "conversation")
    convert_with(Row({"messages": turns, "tools": [{"name": "f"}]}, ORIGIN))
    notes += convert_with.notes
    assert notes == [PLAIN_CALL]


def test_nulls_of_a_table_are_absent_keys() -> None:
    """In an object; in JSON text somebody wrote them."""
    table = {"name": "f", "arguments": {"city": "Oslo", "to": None, "legs": [{"by": "sea", "at": None}, None]}}
    tool = {
        "type": "function",
        "function": {"name": "f", "parameters": {"properties": {"a": {"type": "string", "enum": None}, "b": None}}},
    }
    record = convert({"messages": [asks(), says(None, tool_calls=[table])], "tools": [tool]})
    assert isinstance(record, Conversation)
    assert record.messages[1]["tool_calls"] == [call(city="Oslo", legs=[{"by": "sea"}, None])]
    assert record.tools[0]["function"]["parameters"] == {"properties": {"a": {"type": "string"}}}
    kept = read(asks(), says(None, tool_calls=[{"name": "f", "arguments": '{"to": null}'}]))
    assert kept[1]["tool_calls"] == [call(to=None)]


# Flags of loss


@pytest.mark.parametrize("flag", ["train", "weight", "loss", "loss_weight", "loss_scale"])
@pytest.mark.parametrize("format", ["messages", "sharegpt"])
def test_flags_of_loss_in_every_spelling(flag: str, format: str) -> None:
    role, text, column = ("role", "content", "messages") if format == "messages" else ("from", "value", "conversations")

    def turns(first: Any, second: Any) -> dict[str, Any]:
        said = [("user", "1", None), ("assistant", "a", first), ("user", "2", False), ("assistant", "b", second)]
        return {column: [{role: who, text: what, flag: value} for who, what, value in said]}

    for off in (False, 0, 0.0):
        for on in (True, 1, 1.0, None):
            record = convert(turns(off, on), format=format)
            assert isinstance(record, Conversation)
            assert [m.get("train", True) for m in record.messages if m["role"] == "assistant"] == [False, True]
    for odd in (0.5, 2, -1, "false", [True]):
        field, what = refused(turns(odd, True), format=format)
        assert field == f"{column}.1.{flag}"
        assert what.startswith("expected true or false")
    assert "found 0.5: a message is trained on or it is not" in refused(turns(0.5, True), format=format)[1]


def test_flags_that_contradict_each_other_and_flags_of_others() -> None:
    assert refused({"messages": [asks(), says("a", weight=0, train=True)]}) == (
        "messages.1.train",
        "train and weight say different things",
    )
    assert read(asks(), says("a", weight=0, train=False), asks("r"), says("b"))[1]["train"] is False
    assert refused({"messages": [asks(loss=True), says("a")]}) == (
        "messages.0.loss",
        "only assistant messages are trained on",
    )


# Systems, roles, nulls


@pytest.mark.parametrize("empty", ["", " \n", None])
def test_an_empty_system_message_is_none_and_counted(empty: str | None) -> None:
    notes: list[str] = []
    messages, _ = messages_of([{"role": "system", "content": empty}, asks(), says("a")], "messages", notes.append)
    assert [m["role"] for m in messages] == ["user", "assistant"]
    assert notes == [EMPTY_SYSTEM]


def test_a_system_column_beside_messages() -> None:
    assert read(asks(), says("a"), system="Be brief.")[0] == {"role": "system", "content": "Be brief."}
    assert read(asks(), says("a"), system=[{"type": "text", "text": "Be brief."}])[0]["content"] == "Be brief."
    assert read({"role": "system", "content": "S"}, asks(), says("a"), system="S ")[0]["content"] == "S"
    assert refused({"messages": [{"role": "system", "content": "S"}, asks(), says("a")], "system": "T"})[0] == "system"
    record = convert({"prompt": "q", "completion": "a", "system": "S"})
    assert isinstance(record, Conversation)
    assert record.messages[0]["role"] == "system"


@pytest.mark.parametrize(
    "roles", [("User", "Assistant"), ("human", "bot"), ("USER", "CHATBOT"), ("prompter", "ai"), ("user", "model")]
)
def test_roles_of_others_in_any_case(roles: tuple[str, str]) -> None:
    assert [m["role"] for m in read({"role": roles[0], "content": "q"}, {"role": roles[1], "content": "a"})] == [
        "user",
        "assistant",
    ]


def test_the_place_of_a_mistake_counts_the_turns_of_the_row() -> None:
    turns = [
        {"role": "system", "content": ""},
        asks(),
        says("a"),
        {"role": "tool_call", "content": '{"name": "f", "arguments": {}}'},
    ]
    assert refused({"messages": [*turns, says("b")]})[0] == "messages.4"


def test_two_texts_in_one_turn_are_refused_unless_equal() -> None:
    assert (
        refused({"messages": [asks(), says("a", value="b")]})[1]
        == "has a text as content and as value, and they differ"
    )
    assert read(asks(), says("a", value="a"))[1]["content"] == "a"


# Tools


@pytest.mark.parametrize("none", [None, "", " ", "[]", " [] ", "null", [], {}, "{}"])
def test_no_tools_in_any_spelling(none: Any) -> None:
    record = convert({"messages": [asks(), says("a")], "tools": none})
    assert isinstance(record, Conversation)
    assert record.tools == ()


@pytest.mark.parametrize(
    "spelled",
    [
        {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}},
        {"name": "f", "parameters": {"type": "object"}},
        {"type": "function", "name": "f", "parameters": {"type": "object"}},
        {"name": "f", "input_schema": {"type": "object"}},
        {"functionDeclarations": [{"name": "f", "parameters": {"type": "OBJECT"}}]},
        {"name": "f", "parameters": {"type": "dict"}},
    ],
)
def test_tools_in_every_spelling(spelled: dict[str, Any]) -> None:
    wanted = ({"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}},)
    for tools in ([spelled], json.dumps([spelled]), spelled, [json.dumps(spelled)]):
        record = convert({"messages": [asks(), says("a")], "tools": tools})
        assert isinstance(record, Conversation)
        assert record.tools == wanted


# JSON inside texts


BAD_JSON = [
    ('{"x": 1, "x": 2}', "duplicate key 'x'"),
    ('{"x": NaN}', "NaN is not JSON; write null"),
    ('{"x": -Infinity}', "-Infinity is not JSON"),
    ('{"x": 1e400}', "the number 1e400 is too large"),
    ('{"x": "a\\ud83d"}', "lone surrogate \\ud83d"),
    ('{"x": "a\\u0000"}', "NUL character"),
    ('{"a": ' * 200 + "1" + "}" * 200, "nested too deeply"),
    ('{"a": ' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
]


@pytest.mark.parametrize(("text", "why"), BAD_JSON)
@pytest.mark.parametrize("place", ["arguments", "call turn", "tools", "tool calls", "messages"])
def test_json_in_texts_is_strict_everywhere(place: str, text: str, why: str) -> None:
    """A verdict with the field, never another exception, and nothing passed on as it is."""
    row: dict[str, Any] = {"messages": [asks(), says(None, tool_calls=[{"name": "f", "arguments": text}])]}
    if place == "call turn":
        row["messages"][1] = {"role": "function_call", "content": f'{{"name": "f", "arguments": {text}}}'}
    elif place == "tools":
        row = {"messages": [asks(), says("a")], "tools": f'[{{"name": "f", "parameters": {text}}}]'}
    elif place == "tool calls":
        row["messages"][1]["tool_calls"] = f'[{{"name": "f", "arguments": {text}}}]'
    elif place == "messages":
        inner = json.dumps(row["messages"])[:-1] + f', {{"role": "tool", "content": "1", "more": {text}}}]'
        if "deeply" in why and len(text) < 10_000:
            return  # a key that nobody reads
        row = {"messages": inner.replace(json.dumps(text), '"{}"')}
    field, what = refused(row)
    assert field is not None
    assert why in what


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [1.0, float("-inf")]])
def test_numbers_that_json_does_not_have(value: Any) -> None:
    assert (
        "is not JSON"
        in refused({"messages": [asks(), says(None, tool_calls=[{"name": "f", "arguments": {"x": value}}])]})[1]
    )
    assert "is not JSON" in refused({"messages": [asks(), says("a")], "tools": [{"name": "f", "default": value}]})[1]


def test_numbers_that_are_too_large_in_a_line(tmp_path: Any) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "q", "n": 1e400}\n{"prompt": "q", "n": 1e300}\n')
    bad: list[Any] = []
    assert len(list(read_rows(DataSource(path="x"), path, bad.append))) == 1
    assert [(row.line, row.message) for row in bad] == [(1, "the number 1e400 is too large")]


def test_large_whole_numbers_keep_their_digits() -> None:
    assert parse_text('{"n": 12345678901234567890123}', "x", "") == {"n": 12345678901234567890123}


ASKED, GOOD, BAD = [asks()], [says("a")], [says("b")]


@pytest.mark.parametrize("chosen", ["a", GOOD, json.dumps(GOOD), json.dumps(GOOD[0])])
@pytest.mark.parametrize("rejected", ["b", json.dumps(BAD), json.dumps([BAD]), [json.dumps(BAD)]])
@pytest.mark.parametrize("asked", ["q", json.dumps(ASKED), json.dumps(ASKED[0]), f" {json.dumps(ASKED, indent=1)}\n"])
def test_messages_as_json_text_in_every_field(asked: Any, chosen: Any, rejected: Any) -> None:
    record = convert({"prompt": asked, "chosen": chosen, "rejected": rejected}, "preference")
    assert isinstance(record, Preference)
    assert (record.prompt, record.chosen, record.rejected) == (tuple(ASKED), tuple(GOOD), (tuple(BAD),))
    record = convert({"prompt": asked, "completion": chosen})
    assert isinstance(record, Conversation)
    assert record.messages == (*ASKED, *GOOD)
    record = convert({"prompt": asked}, "prompt")
    assert isinstance(record, Prompt)
    assert record.prompt == tuple(ASKED)


LOOK_ALIKE = [
    str([asks()]),
    json.dumps([asks()])[:-3],
    '[{"role": "user", "content": "a", "content": "b"}]',
    '[{"content": "a"}]',
]


@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected", "completion"])
@pytest.mark.parametrize("text", LOOK_ALIKE)
def test_texts_that_look_like_messages_and_are_none_are_refused(field: str, text: str) -> None:
    row: dict[str, Any] = {"prompt": "q", "chosen": "a", "rejected": "b"}
    if field == "completion":
        row = {"prompt": "q"}
    row[field] = text
    where, _ = refused(row, "conversation" if field == "completion" else "preference")
    assert (where or "").split(".")[0] == field


@pytest.mark.parametrize(
    "text", ['["a", "b"]', '{"name": "f"}', "[1, 2]", "{", "[see below]", '{"answer": {"role": 1}}', "{{x}}"]
)
def test_other_texts_in_brackets_are_texts(text: str) -> None:
    record = convert({"prompt": text, "completion": text})
    assert isinstance(record, Conversation)
    assert [m["content"] for m in record.messages] == [text, text]


def test_a_list_of_texts_in_one_text_is_not_one_rejected_answer() -> None:
    assert refused({"prompt": "q", "chosen": "a", "rejected": '["b", "c"]'}, "preference")[0] == "rejected"
    both = convert({"prompt": "Write a JSON list.", "chosen": '["a", "b"]', "rejected": '["a" "b"]'}, "preference")
    assert isinstance(both, Preference)


# Labelled answers


LABELLED = [
    {"prompt": "q", "completion": "a"},
    {"prompt": [asks()], "completion": [says("a")]},
    {"messages": [asks(), says("a")]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
]


@pytest.mark.parametrize("row", LABELLED)
@pytest.mark.parametrize(
    ("label", "meaning"), [(True, True), (False, False), (1, True), (0, False), ("True", True), ("false", False)]
)
def test_labelled_answers(row: dict[str, Any], label: Any, meaning: bool) -> None:
    """KTO's rows are never conversations of their own, and answers labelled false are never trained as good ones."""
    record = convert({**row, "label": label}, "unpaired")
    assert record == Unpaired((asks(),), (says("a"),), meaning, "rows.jsonl:7", ORIGIN)  # type: ignore[arg-type]
    assert "`where: {label: true}` keeps the good ones" in refused({**row, "label": label})[1]
    assert (
        "belongs to a group" in refused({**row, "label": label}, "preference")[1]
    )  # it is compared with others to its prompt, never alone
    where = {"where": {"label": True}}
    if meaning:
        good = convert({**row, "label": label}, **where)
        assert isinstance(good, Conversation)
        assert good.messages == (asks(), says("a"))
    else:
        assert refused({**row, "label": label}, **where)[0] == "label"


def test_labelled_answers_and_others_for_one_trainer() -> None:
    record = convert({"prompt": "q", "chosen": "a", "rejected": "b"}, "unpaired")
    assert isinstance(record, Preference)
    assert (
        "is a conversation; wanted is an answer with a label"
        in refused({"messages": [asks(), says("a")]}, "unpaired")[1]
    )


def test_a_label_that_is_no_verdict_is_a_column() -> None:
    for label in ({"ability": ["x"]}, None, ["x"]):
        record = convert({"messages": [asks(), says("a")], "label": label})
        assert isinstance(record, Conversation)
    assert refused({"prompt": "q", "completion": "a", "label": "maybe"}, "unpaired", format="unpaired") == (
        "label",
        "expected true or false; a mapping reads other values: `better: {label: ..., good: [...], bad: [...]}`",
    )


def test_kto_is_given_the_label_of_each_answer() -> None:
    """Rows with a label and preferences in one data set: each answer once, the label as the row has it."""
    encoder = Encoder(chatml())
    rows = [*({**LABELLED[0], "completion": text, "label": label} for text, label in (("yes", True), ("no", False)))]
    rows += [{"prompt": "q", "chosen": "good", "rejected": ["bad", "worse"]}]
    found = []
    for row in rows:
        tree = tree_of(convert(row, "unpaired"), encoder, Limits(200, "drop", "last"), lambda what: None)
        found += [(one["completion"].split("<")[0], one["label"]) for one in _judged(tree, TextIds(encoder))]
    assert found == [("yes", True), ("no", False), ("good", True), ("bad", False), ("worse", False)]
