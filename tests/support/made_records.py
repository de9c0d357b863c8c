"""Records as they come out of rows, generated: every kind, with all that a message can carry. For tests of what writes
and reads them."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from align.data.formats.personal import PERSONAL
from align.data.messages.forms import LARGEST
from align.data.messages.messages import same
from align.data.records import (
    Conversation,
    Graded,
    Message,
    Messages,
    Origin,
    Preference,
    Prompt,
    Record,
    Unpaired,
    Votes,
)

ORIGIN = Origin("made.jsonl", 1)
_CHARACTERS = st.characters(exclude_categories=("Cs",), exclude_characters="\0")
TEXTS = st.text(_CHARACTERS, min_size=1, max_size=12).filter(lambda text: text.strip() != "")
_NASTY = (
    "messages",
    "prompt",
    "chosen",
    "rejected",
    "label",
    "winner",
    "origin",
    "fields",
    "system",
    "tools",
    "images",
    "id",
    "answer",
    "score",
    "votes",
    "grades",
)
_NAMES = st.sampled_from(_NASTY) | st.text(_CHARACTERS, min_size=1, max_size=6)
_LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(_CHARACTERS, max_size=6)
)
JSON = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(_CHARACTERS, max_size=4), inner, max_size=2),
    max_leaves=4,
)


def _impersonal(value: Any) -> bool:
    if isinstance(value, dict):
        return all(key.lower() not in PERSONAL and _impersonal(item) for key, item in value.items())
    return all(map(_impersonal, value)) if isinstance(value, list) else True


FIELDS = st.dictionaries(_NAMES, JSON.filter(lambda value: value is not None), max_size=3).filter(_impersonal)
_NUMBERS = st.floats(-LARGEST, LARGEST)
_COUNTS = st.integers(0, 20).map(float) | st.just(0.5)
_OBJECTS = st.dictionaries(st.text(_CHARACTERS, min_size=1, max_size=5), JSON, max_size=2)
TOOLS = st.lists(
    st.builds(
        lambda name, more: {
            "type": "function",
            "function": {"name": name, "description": "d", "parameters": {"type": "object", "default": more}},
        },
        TEXTS,
        JSON,
    ),
    max_size=2,
).map(tuple)


@st.composite
def calls(draw: st.DrawFn, *, custom: bool = True) -> list[dict[str, Any]]:
    """One or two calls."""
    found = []
    for _ in range(draw(st.integers(1, 2))):
        own = {"id": draw(TEXTS)} if draw(st.booleans()) else {}
        if custom and draw(st.booleans()):
            name = draw(TEXTS.map(lambda text: " ".join(text.split())).filter(bool))
            found.append(
                {**own, "type": "custom", "custom": {"name": name, "input": draw(st.text(_CHARACTERS, max_size=6))}}
            )
        else:
            found.append({**own, "type": "function", "function": {"name": draw(TEXTS), "arguments": draw(_OBJECTS)}})
    return found


@st.composite
def answer(draw: st.DrawFn, *, calling: bool | None = None) -> Message:
    """A message of the assistant."""
    message: Message = {"role": "assistant", "content": draw(TEXTS)}
    if calling or (calling is None and draw(st.booleans())):
        message["tool_calls"] = draw(calls())
        message["content"] = draw(st.just("") | TEXTS)
    if draw(st.booleans()):
        message["reasoning"] = draw(TEXTS)
    for flag in ("train", "finished"):
        if draw(st.integers(0, 3)) == 0:
            message[flag] = False  # type: ignore[literal-required]
    if draw(st.integers(0, 4)) == 0:
        message["sampled"] = {"encoder": draw(TEXTS), "ids": draw(st.lists(st.integers(0, 2**31 - 1), max_size=3))}
    if draw(st.integers(0, 4)) == 0:
        message["name"] = draw(TEXTS)
    return message


@st.composite
def result(draw: st.DrawFn) -> Message:
    """What a tool gave; it may be nothing."""
    message: Message = {"role": "tool", "content": draw(st.just("") | TEXTS)}
    for key in ("name", "tool_call_id", "metadata"):
        if draw(st.integers(0, 2)) == 0:
            message[key] = draw(TEXTS)  # type: ignore[literal-required]
    return message


@st.composite
def completion(draw: st.DrawFn) -> Messages:
    """An answer: mostly one message, else a call, its results and what is said then."""
    if draw(st.integers(0, 3)):
        return (draw(answer()),)
    return (draw(answer(calling=True)), *draw(st.lists(result(), min_size=1, max_size=2)), draw(answer()))


@st.composite
def asked(draw: st.DrawFn, *, greeting: bool) -> Messages:
    """A prompt: perhaps a system, perhaps a greeting, earlier turns, and the user or a result at the end."""
    messages: list[Message] = [{"role": "system", "content": draw(TEXTS)}] if draw(st.booleans()) else []
    if greeting and draw(st.integers(0, 4)) == 0:
        messages.append(draw(answer(calling=False)))
    messages.append({"role": "user", "content": draw(TEXTS)})
    for _ in range(draw(st.integers(0, 2))):
        messages += draw(completion())
        messages.append({"role": "user", "content": draw(TEXTS)})
    if draw(st.integers(0, 4)) == 0:
        messages += [draw(answer(calling=True)), draw(result())]
    return tuple(messages)


@st.composite
def records(draw: st.DrawFn, kind: type[Record] | None = None) -> Record:
    """A record that rows can give."""
    kind = kind or draw(st.sampled_from((Conversation, Preference, Unpaired, Graded, Prompt)))
    common: dict[str, Any] = {"id": draw(TEXTS), "origin": ORIGIN, "tools": draw(TOOLS), "fields": draw(FIELDS)}
    prompt = draw(asked(greeting=kind is not Conversation))
    if kind is Conversation:
        return Conversation((*prompt, *draw(completion())), **common)
    if kind is Prompt:
        return Prompt(prompt, **common)
    if kind is Graded:
        return Graded(
            prompt, draw(completion()), draw(st.dictionaries(TEXTS, _NUMBERS, min_size=1, max_size=3)), **common
        )
    if kind is Unpaired:
        return Unpaired(prompt, draw(completion()), draw(st.booleans()), **common)
    chosen = draw(completion())
    rejected = draw(st.lists(completion().filter(lambda one: not same(one, chosen)), min_size=1, max_size=3))
    margins = draw(st.none() | _each(_NUMBERS, rejected))
    votes = draw(st.none() | _each(st.builds(Votes, _COUNTS, _COUNTS), rejected))
    return Preference(prompt, chosen, tuple(rejected), margins=margins, votes=votes, **common)


def _each(one: st.SearchStrategy[Any], rejected: list[Messages]) -> st.SearchStrategy[Any]:
    return st.lists(one, min_size=len(rejected), max_size=len(rejected)).map(tuple)
