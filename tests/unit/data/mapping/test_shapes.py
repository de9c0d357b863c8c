"""Rows in the shapes of public data sets and of other tools, read without a word: nothing is read as less than it
is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.data.formats.formats import Want
from align.data.records import Conversation, Preference, Prompt, Record
from align.data.sources.contents import wanted_of
from align.data.sources.mixture import Records, read_records
from align.errors import InputError
from align.preflight.first_rows import faults
from align.recipe.rows.presets import PRESETS
from align.recipe.schema import DataSource


def write(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(folder: Path, rows: list[Any], want: Want, **keys: Any) -> Records:
    path = write(folder, rows)
    return read_records(
        [DataSource.model_validate({"path": str(path), **keys})], [path], want, seed=0, rejects=folder / "rejects.jsonl"
    )


def said(record: Record) -> list[tuple[str, str]]:
    messages = record.messages if isinstance(record, Conversation) else record.prompt
    return [(message["role"], message["content"]) for message in messages]


def gpt(*texts: str) -> list[dict[str, str]]:
    return [{"from": "gpt" if i % 2 else "human", "value": text} for i, text in enumerate(texts)]


def chat(*texts: str) -> list[dict[str, str]]:
    return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]


SHEET = {"name": "boil", "parameters": {"type": "object", "properties": {}}}
CALL = '<tool_call>\n{"name": "boil", "arguments": {"minutes": 4}}\n</tool_call>'


@pytest.mark.parametrize(
    ("name", "row", "expected", "more"),
    [
        (
            "openthoughts",
            {
                "system": "Think.",
                "conversations": gpt(
                    "2+2?",
                    "<|begin_of_thought|>\n\nadd\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\n4\n\n<|end_of_solution|>",
                ),
            },
            [("system", "Think."), ("user", "2+2?"), ("assistant", "4")],
            {"reasoning": "add"},
        ),
        (
            "hermes",
            {
                "id": "h",
                "conversations": [
                    {"from": "system", "value": f"You may call. <tools>{json.dumps(SHEET)}</tools>"},
                    *gpt("An egg?", f"Yes.\n{CALL}"),
                    {"from": "tool", "value": "<tool_response>\ndone\n</tool_response>"},
                    {"from": "gpt", "value": "It is ready."},
                ],
                "tools": json.dumps([SHEET]),
            },
            [("user", "An egg?"), ("assistant", "Yes."), ("tool", "done"), ("assistant", "It is ready.")],
            {"tools": ["boil"]},
        ),
        (
            "belle_multiturn",
            {"instruction": "Human:hello\nAssistant:hi\nHuman:an egg?\nAssistant:", "input": "", "output": "boil it"},
            [("user", "hello"), ("assistant", "hi"), ("user", "an egg?"), ("assistant", "boil it")],
            {"trained": [3]},
        ),
        (
            "toucan",
            {
                "uuid": "t",
                "messages": json.dumps(
                    [
                        {"role": "system", "content": "<|im_system|>tool_declare<|im_middle|>[]"},
                        {"role": "user", "content": "An egg?"},
                        {"role": "assistant", "content": "I boil it."},
                        {"role": "assistant", "content": "", "function_call": {"name": "boil", "arguments": "{}"}},
                        {"role": "function", "name": "boil", "content": "done"},
                        {"role": "assistant", "content": "Ready."},
                    ]
                ),
                "available_tools": json.dumps([{"type": "function", "function": SHEET}]),
                "target_tools": "boil",
                "question_quality_assessment": "{}",
            },
            [("user", "An egg?"), ("assistant", "I boil it."), ("tool", "done"), ("assistant", "Ready.")],
            {"tools": ["boil"]},
        ),
        (
            "nemotron_v1",
            {
                "uuid": "n",
                "category": "tool",
                "reasoning": "on",
                "messages": [
                    {"role": "system", "content": ""},
                    *chat("An egg?", "<think>\nhm\n</think>\n\nFour minutes."),
                ],
                "metadata": json.dumps({"tools": [{"type": "function", "function": SHEET}], "expected_answer": "4"}),
            },
            [("user", "An egg?"), ("assistant", "Four minutes.")],
            {"tools": ["boil"], "reasoning": "hm", "answer": "4"},
        ),
        (
            "nemotron_v3",
            {
                "uuid": "n",
                "messages": chat("a?", "b", "c?", "d"),
                "metadata": {"train_turns": [False, False, False, True]},
            },
            [("user", "a?"), ("assistant", "b"), ("user", "c?"), ("assistant", "d")],
            {"trained": [3]},
        ),
        (
            "llama_nemotron",
            {
                "input": chat("An egg?"),
                "output": "<think>\nhm\n</think>\n\nBoil.",
                "system_prompt": "Be brief.",
                "reasoning": "on",
            },
            [("system", "Be brief."), ("user", "An egg?"), ("assistant", "Boil.")],
            {"reasoning": "hm"},
        ),
        (
            "bedrock",
            {
                "schemaVersion": "bedrock-conversation-2024",
                "system": [{"text": "Be "}, {"text": "brief."}],
                "messages": [
                    {"role": "user", "content": [{"text": "An egg?"}]},
                    {"role": "assistant", "content": [{"text": "Boil."}]},
                ],
            },
            [("system", "Be brief."), ("user", "An egg?"), ("assistant", "Boil.")],
            {},
        ),
        (
            "a row's own tools, under two names",
            {"messages": chat("An egg?", "Boil."), "functions": [SHEET]},
            [("user", "An egg?"), ("assistant", "Boil.")],
            {"tools": ["boil"]},
        ),
        (
            "reasoning that is a switch",
            {"question": "An egg?", "answer": "Boil.", "reasoning": "off"},
            [("user", "An egg?"), ("assistant", "Boil.")],
            {},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_conversations_are_found_by_what_only_they_have(
    name: str, row: dict[str, Any], expected: list[tuple[str, str]], more: dict[str, Any], tmp_path: Path
) -> None:
    records = read(tmp_path, [row], "conversation")
    (record,) = list(records)
    assert isinstance(record, Conversation)
    assert said(record) == expected
    assert [tool["function"]["name"] for tool in record.tools] == more.get("tools", [])
    assert record.messages[-1].get("reasoning") == more.get("reasoning")
    assert record.fields.get("answer") == more.get("answer")
    trained = [
        i for i, message in enumerate(record.messages) if message["role"] == "assistant" and message.get("train", True)
    ]
    assert trained == more.get(
        "trained", [i for i, message in enumerate(record.messages) if message["role"] == "assistant"]
    )
    if name in PRESETS:
        assert records.report.sources[0].format == name


def test_anthropics_requests_by_name(tmp_path: Path) -> None:
    """Without the name as well: they are messages."""
    row = {
        "system": [{"type": "text", "text": "Use tools."}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "An egg?"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "s"},
                    {"type": "tool_use", "id": "t1", "name": "boil", "input": {"minutes": 4}},
                ],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "done"}]},
            {"role": "assistant", "content": "Ready."},
        ],
        "tools": [{"name": "boil", "description": "", "input_schema": {"type": "object", "properties": {}}}],
    }
    (named,) = read(tmp_path, [row], "conversation", format="anthropic")
    (found,) = read(tmp_path, [row], "conversation")
    assert isinstance(named, Conversation)
    assert isinstance(found, Conversation)
    roles = ["system", "user", "assistant", "tool", "assistant"]
    assert [role for role, _ in said(named)] == roles
    assert (named.messages, named.tools) == (found.messages, found.tools)
    assert named.messages[2].get("reasoning") == "hm"


def test_tools_under_one_name_in_some_rows_and_another_in_others(tmp_path: Path) -> None:
    rows = [
        {"messages": chat("a?", "b"), "tools": [SHEET]},
        {"messages": chat("c?", "d"), "functions": [{**SHEET, "name": "fry"}]},
    ]
    records = list(read(tmp_path, rows, "conversation"))
    assert [record.tools[0]["function"]["name"] for record in records] == ["boil", "fry"]


@pytest.mark.parametrize(
    ("row", "answer", "id"),
    [
        ({"query_id": "q1", "prompt": "2+2?", "solutions": ["4", "four"], "task": "math"}, ["4", "four"], "q1"),
        (
            {"query_id": "q2", "prompt": "Echo.", "input_output": '{"inputs": ["1"], "outputs": ["1"]}'},
            {"inputs": ["1"], "outputs": ["1"]},
            "q2",
        ),
    ],
)
def test_prompts_of_areal(row: dict[str, Any], answer: Any, id: str, tmp_path: Path) -> None:
    (record,) = list(read(tmp_path, [row], "prompt"))
    assert isinstance(record, Prompt)
    assert (record.fields["answer"], record.id) == (answer, id)


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"messages": chat("2+2?"), "ground_truth": "4", "dataset": "math", "constraint_type": None}, "4"),
        (
            {
                "messages": chat("No commas."),
                "ground_truth": '{"func_name": "no_commas", "N": null}',
                "dataset": "ifeval",
                "constraint_type": "no commas",
            },
            {"func_name": "no_commas", "N": None},
        ),
    ],
)
def test_prompts_of_rlvr(row: dict[str, Any], answer: Any, tmp_path: Path) -> None:
    records = read(tmp_path, [row], "prompt")
    (record,) = list(records)
    assert isinstance(record, Prompt)
    assert records.report.sources[0].format == "rlvr"
    assert (record.fields["answer"], record.fields["dataset"]) == (answer, row["dataset"])


@pytest.mark.parametrize(
    ("truth", "answer"),
    [('["4", "four"]', ["4", "four"]), ('{"inputs": ["1"], "outputs": ["1"]}', {"inputs": ["1"], "outputs": ["1"]})],
)
def test_prompts_of_skywork(truth: str, answer: Any, tmp_path: Path) -> None:
    """The reference is JSON; in a file of verl's it is a text that may look like it."""
    row = {"prompt": chat("2+2?"), "reward_model": {"ground_truth": truth, "style": "rule"}, "ability": "math"}
    index: dict[str, Any] = {"index": 3}
    (record,) = read(tmp_path, [{**row, "extra_info": {**index, "model_difficulty": {"m": 2}}}], "prompt")
    assert isinstance(record, Prompt)
    assert (record.fields["answer"], record.id) == (answer, "3")
    records = read(tmp_path, [{**row, "extra_info": index}], "prompt")
    assert len(list(records)) == 1
    assert records.report.sources[0].format == "verl"


def test_prompts_in_the_shape_of_ifeval(tmp_path: Path) -> None:
    """Both lists are the reference; they stay with the record."""
    lists = {"instruction_id_list": ["a:b", "c:d"], "kwargs": [{"n": 2}, {}]}
    records = read(tmp_path, [{"key": 7, "prompt": "Write.", **lists}], "prompt")
    (record,) = list(records)
    assert isinstance(record, Prompt)
    assert records.report.sources[0].format == "ifeval"
    assert (record.id, record.fields) == ("7", lists)


# What must not stay unread


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": chat("a?", "b"), "resolved": False},
            r"`where: {resolved: \.\.\.}` keeps those, `ignore: \[resolved\]`",
        ),
        ({"prompt": "a?", "llm_response": "b", "score": 0.0}, r"`where: {score: "),
        ({"question": "a?", "answer": "b", "rating": 3}, r"column rating may say which answers are good"),
        ({"messages": chat("a?", "b"), "metadata": {"loss_mask": [0, 1]}}, r"metadata\.loss_mask would stay unread"),
        ({"messages": chat("a?", "b"), "extra": '{"tools": [{"name": "f"}]}'}, r"extra\.tools would stay unread"),
        ({"messages": chat("a?", "b"), "extra info": {"tools_kwargs": {"f": 1}}}, r'ignore: \["extra info"\]'),
        ({"messages": chat("a?", "b"), "rejected": "c"}, r"column rejected would stay unread"),
        ({"conversations": gpt("a?", "b"), "image": "x.png"}, r"has image, and a text model cannot take them"),
        ({"prompt": "a?", "response_0": "b", "response_1": "c", "safer_response_id": 1}, r"looks like a comparison"),
    ],
)
def test_a_column_that_carries_meaning_is_an_error(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        list(read(tmp_path, [row], "conversation"))


@pytest.mark.parametrize(
    "keys",
    [{"where": {"score": 1}}, {"ignore": ["score"]}, {"format": "messages"}],
)
def test_unless_the_recipe_says_what_it_is_for(keys: dict[str, Any], tmp_path: Path) -> None:
    assert len(list(read(tmp_path, [{"messages": chat("a?", "b"), "score": 1}], "conversation", **keys))) == 1


@pytest.mark.parametrize(
    "extra",
    [{"extra": {"tools": []}}, {"extra": '{"tools": []}'}, {"extra": "{broken"}, {"score": "high"}, {"label": "math"}],
)
def test_what_carries_no_meaning_is_passed_over(extra: dict[str, Any], tmp_path: Path) -> None:
    assert len(list(read(tmp_path, [{"messages": chat("a?", "b"), **extra}], "conversation"))) == 1


@pytest.mark.parametrize(
    ("name", "value"), [("rejected", "c"), ("score", 0.5), ("image", "x.png"), ("extra", {"loss_mask": [1]})]
)
def test_such_a_column_is_also_seen_in_a_row_that_comes_late(name: str, value: Any, tmp_path: Path) -> None:
    """Beyond the rows by which the format is found, with a new column or with one that was null until then."""
    rows = [{"messages": chat(f"{i}?", "b"), name: None} for i in range(30)] + [
        {"messages": chat("late?", "b"), name: value}
    ]
    with pytest.raises(InputError) as caught:
        list(read(tmp_path, rows, "conversation"))
    assert caught.value.problems[0].line == 31
    for row in rows[:30]:
        del row[name]
    with pytest.raises(InputError) as caught:
        list(read(tmp_path, rows, "conversation"))
    assert caught.value.problems[0].line == 31


def test_a_system_message_that_a_mapping_leaves_out_is_counted(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "system", "content": "x"}, *chat("a?", "b")]}, {"messages": chat("a?", "b")}]
    records = read(tmp_path, rows, "conversation", format={"messages": "messages", "turns": {"roles": {"system": []}}})
    assert [said(record)[0][0] for record in records] == ["user", "user"]
    assert records.report.sources[0].notes == {"a system message, left out as the mapping says": 1}


# Groups: every row is accounted for


GROUPED = {"prompt": "q", "answers": "a", "group": "q", "better": {"score": "s"}}


def test_each_row_of_a_group_is_counted_with_its_own_reason(tmp_path: Path) -> None:
    rows = [
        {"q": "tie", "a": "x", "s": 1},
        {"q": "good", "a": "x", "s": 2},
        {"q": "tie", "a": "y", "s": 1},
        {"q": "good", "a": "y", "s": 1},
        {"q": "good", "a": "z", "s": None},
        {"q": "good", "a": "", "s": 9},
        {"q": "alone", "a": "x", "s": 3},
        {"q": "unseen", "a": "x", "s": None},
    ]
    records = read(tmp_path, rows, "preference", format=GROUPED)
    (record,) = list(records)
    assert isinstance(record, Preference)
    assert (record.chosen[0]["content"], [one[0]["content"] for one in record.rejected]) == ("x", ["y"])
    rejects = [
        (entry["line"], entry["reason"])
        for entry in map(json.loads, (tmp_path / "rejects.jsonl").read_text().splitlines())
    ]
    assert sorted(rejects) == [
        (1, "a tie"),
        (3, "a tie"),
        (5, "no score"),
        (6, "its answer is empty"),
        (7, "only one answer"),
        (8, "no score"),
    ]
    report = records.report.sources[0]
    assert (report.read, report.dropped, report.bad) == (8, 6, 0)


def test_a_bad_row_of_a_group_is_named_itself_and_the_others_go_on(tmp_path: Path) -> None:
    rows = [{"q": "good", "a": "x", "s": 2}, {"q": "good", "a": "y", "s": 1}, {"q": "good", "a": "z", "s": "much"}]
    with pytest.raises(InputError, match=r"rows\.jsonl:3 s: expected a number, found 'much'"):
        list(read(tmp_path, rows, "preference", format=GROUPED))
    records = read(tmp_path, rows, "preference", format=GROUPED, on_bad_row="skip")
    (record,) = list(records)
    assert isinstance(record, Preference)
    assert len(record.rejected) == 1
    assert records.report.sources[0].bad == 1


def test_a_group_whose_record_cannot_be_made_is_one_bad_row_and_its_others_are_counted(tmp_path: Path) -> None:
    rows = [
        {"q": "", "a": "x", "s": 2},
        {"q": "", "a": "y", "s": 1},
        {"q": "good", "a": "x", "s": 2},
        {"q": "good", "a": "y", "s": 1},
    ]
    records = read(tmp_path, rows, "preference", format=GROUPED, on_bad_row="skip")
    assert len(list(records)) == 1
    report = records.report.sources[0]
    assert (report.bad, report.reasons) == (1, {"belongs to a group with a bad row": 1})


def test_prompts_of_grouped_rows_come_once(tmp_path: Path) -> None:
    rows = [{"q": "tie", "a": "x", "s": 1}, {"q": "tie", "a": "y", "s": 1}, {"q": "other", "a": "y", "s": 1}]
    assert [said(record) for record in read(tmp_path, rows, "prompt", format=GROUPED)] == [
        [("user", "tie")],
        [("user", "other")],
    ]


# The first rows, before anything runs

WON = {"prompt": "prompt", "answers": ["a", "b"], "better": {"winner": "w", "values": ["A", "B"], "ties": ["same"]}}


@pytest.mark.parametrize(
    ("rows", "format", "want"),
    [
        ([{"q": "a", "a": "x", "s": 1}, {"q": "a", "a": "y", "s": 2}], GROUPED, "preference"),
        ([PRESETS["helpsteer"].example], None, "preference"),
        ([{"prompt": "q", "a": "x", "b": "y", "w": "same"}], WON, "preference"),
        ([{"messages": []}, {"messages": chat("a?", "b")}], None, "conversation"),
        ([{"prompt": "q", "completion": "a", "label": True}], None, "unpaired"),
        ([{"prompt": "q"}], None, "prompt"),
    ],
)
def test_what_the_rows_are(rows: list[Any], format: Any, want: str, tmp_path: Path) -> None:
    path = write(tmp_path, rows)
    keys = {} if format is None else {"format": format}
    assert wanted_of(DataSource.model_validate({"path": str(path), **keys}), path) == want


def test_grouped_rows_are_looked_at_before_a_run(tmp_path: Path) -> None:
    path = write(
        tmp_path, [{"q": "a", "a": "x", "s": 1}, {"q": "a", "a": "y", "s": "much"}, {"q": "a", "a": "z", "s": 2}]
    )
    (problem,) = faults(DataSource.model_validate({"path": str(path), "format": GROUPED}), path, "preference")
    assert (problem.line, problem.message) == (2, "expected a number, found 'much'")


def test_the_first_row_alone_does_not_decide_before_a_run(tmp_path: Path) -> None:
    """As in the run itself, the first rows together say what the format is; one of another shape is a bad row."""
    path = write(
        tmp_path, [{"note": "a title"}, *({"prompt": f"{i}?", "chosen": "a", "rejected": "b"} for i in range(5))]
    )
    (problem,) = faults(DataSource(path=str(path)), path, "preference")
    assert problem.line == 1
    assert not faults(DataSource(path=str(path), on_bad_row="skip"), path, "preference")
