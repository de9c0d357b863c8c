"""Any JSON tree in any field of a row of any named format: refused in words, or trained with its answer in the trained
text."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, cast, get_args

import pytest
from hypothesis import strategies as st
from pydantic import ValidationError

from align.data.chat.encoder import Encoder
from align.data.formats.formats import FORMATS, Want
from align.data.records import Conversation, Messages, Preference, Record, Unpaired
from align.data.sources.mixture import read_records
from align.data.tree import Branch
from align.data.trees.build import Limits, Unusable, tree_of
from align.errors import EnvironmentFault, InputError
from align.recipe.rows.presets import PRESETS
from align.recipe.schema import DataSource
from tests.fuzz.fuzzing import changed, fuzz, trees
from tests.support import tokenizers

ASKED, SAID, WORSE = "What is the capital?", "It is Paris, of course.", "It is Lyon, I think."
_CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"city": "Paris", "n": 2}}}
_TOOL = {
    "type": "function",
    "function": {"name": "look_up", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


def _turns(
    *said: str, role: str = "role", content: str = "content", names: tuple[str, str] = ("user", "assistant")
) -> list[dict[str, Any]]:
    return [{role: names[i % 2], content: text} for i, text in enumerate(said)]


def _sharegpt(*said: str) -> list[dict[str, Any]]:
    return _turns(*said, role="from", content="value", names=("human", "gpt"))


ROWS: dict[str, list[dict[str, Any]]] = {
    "messages": [
        {"messages": [{"role": "system", "content": "Be short."}, *_turns(ASKED, "Which one?", "Of France.", SAID)]},
        {"prompt": ASKED, "completion": SAID, "system": "Be short."},
        {"prompt": _turns(ASKED), "completion": _turns(ASKED, SAID)[1:], "id": "a"},
        {
            "messages": [
                *_turns(ASKED),
                {"role": "assistant", "content": "", "tool_calls": [_CALL]},
                {"role": "tool", "content": "yes"},
                {"role": "assistant", "content": SAID},
            ],
            "tools": [_TOOL],
        },
    ],
    "graded": [
        {"prompt": ASKED, "completion": SAID, "grades": {"helpfulness": 4, "verbosity": 1.5}},
        {"prompt": _turns(ASKED), "completion": _turns(ASKED, SAID)[1:], "grades": {"helpfulness": 0}},
    ],
    "preference": [
        {"prompt": ASKED, "chosen": SAID, "rejected": WORSE, "margin": 0.5},
        {"prompt": _turns(ASKED), "chosen": _turns(ASKED, SAID)[1:], "rejected": _turns(ASKED, WORSE)[1:]},
        {"chosen": _turns(ASKED, SAID), "rejected": _turns(ASKED, WORSE)},
        {"prompt": ASKED, "chosen": SAID, "rejected": [WORSE, "No idea."]},
    ],
    "unpaired": [{"prompt": ASKED, "completion": SAID, "label": True}, {"messages": _turns(ASKED, SAID), "label": 1}],
    "prompt": [{"prompt": ASKED}, {"prompt": _turns(ASKED, "Which one?", "Of France.")}],
    "alpaca": [
        {
            "instruction": ASKED,
            "input": "Of France.",
            "output": SAID,
            "history": [["Hello.", "Hello to you."]],
            "system": "Be short.",
        },
        {"instruction": ASKED, "chosen": SAID, "rejected": WORSE},
    ],
    "sharegpt": [
        {"conversations": _sharegpt(ASKED, "Which one?", "Of France.", SAID), "system": "Be short."},
        {"conversations": _sharegpt(ASKED), "chosen": _sharegpt("", SAID)[1], "rejected": _sharegpt("", WORSE)[1]},
    ],
    "hh_rlhf": [
        {"chosen": f"\n\nHuman: {ASKED}\n\nAssistant: {SAID}", "rejected": f"\n\nHuman: {ASKED}\n\nAssistant: {WORSE}"}
    ],
    "ultrafeedback": [
        {
            "prompt": ASKED,
            "chosen": _turns(ASKED, SAID),
            "rejected": _turns(ASKED, WORSE),
            "score_chosen": 8.0,
            "score_rejected": 3.0,
        },
        {
            "instruction": ASKED,
            "completions": [{"response": SAID, "overall_score": 8.0}, {"response": WORSE, "overall_score": 3.0}],
        },
    ],
}
ENCODERS: dict[str, Callable[[], Any]] = {
    name: getattr(tokenizers, name)
    for name in ("chatml", "llama3", "mistral", "glm4", "qwen3")
    if hasattr(tokenizers, name)
}
WANTS: tuple[Want, ...] = get_args(Want)


@cache
def encoder(name: str) -> Encoder:
    return Encoder(ENCODERS[name]())


MAPPED: list[tuple[dict[str, Any], Want, dict[str, Any]]] = [
    ({"prompt": "Question", "completion": "Reply"}, "conversation", {"Question": ASKED, "Reply": SAID, "n": 3}),
    (
        {"prompt": "q.text", "chosen": "best", "rejected": "rest[*].text"},
        "preference",
        {"q": {"text": ASKED}, "best": SAID, "rest": [{"text": WORSE}]},
    ),
    (
        {"prompt": [{"system": "rules"}, "past", "{q}\n\n{context}"], "completion": "a", "reasoning": "why"},
        "conversation",
        {
            "rules": "Be short.",
            "past": _turns("Hello.", "Hello to you."),
            "q": ASKED,
            "context": "Of France.",
            "a": SAID,
            "why": "I know that.",
        },
    ),
    (
        {
            "messages": "log",
            "turns": {
                "role": "who",
                "content": ["said", "text"],
                "roles": {"user": "me", "assistant": ["it"]},
                "train": "use",
            },
        },
        "conversation",
        {"log": [{"who": "me", "said": ASKED, "use": 0}, {"who": "it", "text": SAID, "use": 1}]},
    ),
    (
        {"prompt": "p", "completion": "c", "dialogue": {"in": ["p"], "user": "\nU:", "assistant": "\nA:"}},
        "conversation",
        {"p": f"\nU: Hello.\nA: Hello to you.\nU: {ASKED}", "c": SAID},
    ),
    (
        {
            "prompt": "p",
            "completion": "c",
            "tags": {"reasoning": ["<t>", "</t>"], "calls": ["<c>", "</c>"], "drop": ["<|x|>"]},
            "tools": "fns",
        },
        "conversation",
        {"p": ASKED, "c": f"<t>I know that.</t>{SAID}<|x|>", "fns": [_TOOL]},
    ),
    (
        {"prompt": "p", "answers": ["a", "b"], "better": {"winner": "w", "values": ["A", "B"], "ties": ["same"]}},
        "preference",
        {"p": ASKED, "a": SAID, "b": WORSE, "w": "A"},
    ),
    (
        {"prompt": "p", "answers": "a", "better": {"ranking": "r", "names": ["A", "B"]}},
        "preference",
        {"p": ASKED, "a": [SAID, WORSE], "r": "A>B"},
    ),
    (
        {"prompt": "p", "answers": "a", "weave": True, "better": {"score": "s"}, "margin": "gap"},
        "preference",
        {"p": [ASKED], "a": [[SAID], [WORSE]], "s": [2, 1]},
    ),
    (
        {"prompt": "p", "completion": "c", "better": {"label": "good"}},
        "unpaired",
        {"p": ASKED, "c": SAID, "good": True},
    ),
    (
        {"prompt": "p", "completion": "c", "json": ["p"], "system": {"value": "Be short."}},
        "conversation",
        {"p": json.dumps(_turns(ASKED)), "c": SAID},
    ),
]
"""(mapping, what is wanted, a row)."""


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Any], Want, str, dict[str, Any]]:
    """(keys of the source, what is wanted, encoder, row). Mostly what the row was before it was changed, and changed in
    one place."""
    kind = draw(st.sampled_from(["named", "named", "preset", "mapped", "mapped"]))
    keys: dict[str, Any] = {}
    if kind == "named":
        format = draw(st.sampled_from(sorted(ROWS)))
        row = draw(st.sampled_from(ROWS[format]))
        natural = natural_want(format, row)
        keys = draw(st.sampled_from([{"format": format}, {"format": format}, {}]))
    elif kind == "preset":
        name = draw(st.sampled_from(sorted(PRESETS)))
        row, natural = PRESETS[name].example, draw(st.sampled_from(WANTS))
        keys = draw(st.sampled_from([{"format": name}, {"format": {"preset": name}}, {}]))
    else:
        mapping, natural, row = draw(st.sampled_from(MAPPED))
        if draw(st.integers(0, 4)) == 0:
            words = st.sampled_from(["p", "c", "a", "b", "x", "a[*].b", "{p} {c}", "all", "best"])
            mapping = draw(
                changed(mapping, words | trees).filter(
                    lambda one: not re.search(r"\\ud[89a-f]|\\u0000", json.dumps(one))
                )
            )
        keys = {draw(st.sampled_from(["columns", "format"])): mapping}
    want = draw(st.sampled_from([natural, natural, natural, *WANTS]))
    changes = draw(st.sampled_from([1, 1, 1, 1, 3]))
    return keys, want, draw(st.sampled_from(sorted(ENCODERS))), draw(changed(row, trees, most=changes))


def natural_want(format: str, row: dict[str, Any]) -> Want:
    """What a good row of the format is."""
    if format in ("unpaired", "prompt", "graded"):
        return cast(Want, format)
    return "preference" if "chosen" in row or "completions" in row else "conversation"


def records_of(row: Any, keys: dict[str, Any], want: Want) -> list[Record]:
    """What comes out of a file with this row; none where it is refused as it should be."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text(json.dumps(row) + "\n", encoding="utf-8")
        try:
            source = DataSource(path=str(path), **keys)
        except ValidationError:  # a mapping that was changed; a recipe's reader tells where it stands
            return []
        try:
            return list(read_records([source], [path], want, seed=0, rejects=None))
        except InputError as error:
            assert error.problems and all(
                problem.message.strip() and "\n" not in problem.message for problem in error.problems
            )
            return []


def check(case: tuple[dict[str, Any], Want, str, dict[str, Any]]) -> bool:
    """Read and encoded as a stage does. Was it made into anything that is trained?"""
    keys, want, name, row = case
    encoded = False
    for record in records_of(row, keys, want):
        try:
            tree = tree_of(record, encoder(name), Limits(4096, "drop", "all"), lambda note: None)
        except (Unusable, InputError, EnvironmentFault):
            continue
        encoded = True
        for branch, answer in zip(tree.branches, answers(record), strict=False):
            require_answer(branch, answer, encoder(name), reads_tags=name == "qwen3")
        if tree.branches:
            text = encoder(name).spell(tree.branches[0].ids[tree.branches[0].mask].tolist())
            for said in plainly_said(keys, row):
                assert said in text, f"accepted without its answer {said!r}: {text!r}"
    return encoded


def answers(record: Record) -> Iterator[Messages]:
    """What each branch is trained to say, the record's own words; of rejected answers the first alone: equal ones are
    left out."""
    if isinstance(record, Conversation):
        yield record.messages
    elif isinstance(record, Preference):
        yield record.chosen
    elif isinstance(record, Unpaired):
        yield record.completion


def require_answer(branch: Branch, messages: Messages, encoder: Encoder, *, reads_tags: bool) -> None:
    text = encoder.spell(branch.ids[branch.mask].tolist())
    for message in messages:
        if message["role"] != "assistant" or not message.get("train", True):
            continue
        at = 0
        for piece in re.split("</?think>", message["content"]):  # around a tag the template may write other white space
            at = text.find(piece.strip(), at)
            assert at >= 0, f"{message['content']!r} is not in {text!r}"
            at += len(piece.strip())
        if reads_tags and message.get("finished", True) and not message.get("tool_calls"):
            assert message["content"].rpartition("</think>")[2].strip(), f"a thought without an answer: {text!r}"
        for call in message.get("tool_calls", ()):
            (inner,) = (call[kind] for kind in ("function", "custom") if kind in call)
            assert inner["name"] in text, f"the call of {inner['name']!r} is not in {text!r}"


def plainly_said(keys: dict[str, Any], row: dict[str, Any]) -> Iterator[str]:
    """The answer as it stands in the row, where it stands there as a plain text: read here without any code of the
    package."""
    last: Any = None
    format = keys.get("format")
    mapping = keys.get("columns") or format
    if isinstance(mapping, dict) and mapping.keys() <= {"prompt", "completion", "chosen", "rejected", "system"}:
        column = mapping.get("completion") or mapping.get("chosen")
        last = row.get(column) if isinstance(column, str) else None
    if format == "messages":
        last = row.get("messages") if row.get("messages") is not None else row.get("completion")
    elif format == "preference":
        last = row.get("chosen")
    elif format == "alpaca":
        last = row.get("output") if row.get("chosen") is None else row.get("chosen")
    elif format == "sharegpt":
        last = row.get("conversations") if row.get("chosen") is None else row.get("chosen")
    if isinstance(last, list) and last:
        last = last[-1]
    flags = ("train", "weight", "loss", "trainable")
    if (
        isinstance(last, dict)
        and last.get("role", last.get("from")) in ("assistant", "gpt")
        and not any(flag in last for flag in flags)
    ):
        last = last.get("content") if "role" in last else last.get("value")
    if isinstance(last, str) and not last.lstrip().startswith(("[", "{", "<think>")):
        yield last.strip()


def test_every_named_format_is_here() -> None:
    assert set(ROWS) == set(FORMATS)


@pytest.mark.parametrize("format", sorted(ROWS))
def test_the_rows_are_good_before_they_are_changed(format: str) -> None:
    """So that the changes start from something that is accepted."""
    for row in ROWS[format]:
        want = natural_want(format, row)
        assert len(records_of(row, {"format": format}, want)) == 1
        check(({"format": format}, want, "chatml", row))


@pytest.mark.parametrize("place", range(len(MAPPED)))
def test_the_mapped_rows_are_good_before_they_are_changed(place: int) -> None:
    mapping, want, row = MAPPED[place]
    assert len(records_of(row, {"format": mapping}, want)) == 1
    check(({"columns": mapping}, want, "chatml", row))


def test_a_row_is_refused_in_words_or_trained_with_its_answer() -> None:
    fuzz(check, cases(), examples=300)
