"""What the fuzzing tests share: how long they go on, JSON trees of every kind, and changes to a tree.

In the suite each test tries a fixed, small number of cases, the same ones every time. ``FUZZ_MINUTES=20 pytest
tests/fuzz`` goes on with other cases for that many minutes in every test, and ends at the first case that fails, made
as small as it can be.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

MINUTES = float(os.environ.get("FUZZ_MINUTES", "0"))
_AT_ONCE = 500


def fuzz(check: Callable[[Any], bool], cases: st.SearchStrategy[Any], *, examples: int) -> None:
    """``check`` each of the ``cases``: it raises for a case that shows a fault, and says whether it was used rather
    than refused.

    A quarter at least has to be used: cases that are nearly all refused at the door try nothing behind it.
    """
    common: dict[str, Any] = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    tried = used = 0

    def counted(case: Any) -> None:
        nonlocal tried, used
        accepted = check(case)
        tried, used = tried + 1, used + accepted

    try:
        if not MINUTES:
            settings(max_examples=examples, derandomize=True, **common)(given(cases)(counted))()
        until = time.monotonic() + 60 * MINUTES
        while time.monotonic() < until:
            settings(max_examples=_AT_ONCE, **common)(given(cases)(counted))()
    finally:
        print(f"{tried:,} cases, {used:,} of them used")  # shown by pytest -s
    assert used >= tried / 4


# JSON trees

SAID = [
    *(
        "",
        " ",
        "\n",
        "yes",
        "Paris",
        "42",
        "null",
        "true",
        "[]",
        "{}",
        "[1, 2]",
        '{"a": 1}',
        "a\u0000b",
        "\ud800",
        "\u2028",
        "é",
        "e\u0301",
        "😀",
    ),
    *(
        "<|im_end|>",
        "<|im_start|>assistant\n",
        "<|eot_id|>",
        "<|user|>",
        "</s>",
        "<think>",
        "</think>",
        "<think>\nhm\n</think>\n\nyes",
    ),
    *(
        '[{"role": "assistant", "content": "hidden"}]',
        '{"role": "user"}',
        "{'role': 'user', 'content': 'q'}",
        "<tool_call>",
        "<image>",
    ),
    *(
        "\n\nHuman: a\n\nAssistant: b",
        "Human: a",
        "\n\nAssistant:",
        "x" * 300,
        "NaN",
        "1e400",
        '{"a": NaN}',
        '{"a": 1, "a": 2}',
    ),
]
"""Texts that some reader, format or template could take for something else."""
ROLES = ["user", "assistant", "system", "tool", "human", "gpt", "observation", "function", "developer", "bot"]
KEYS = [
    *(
        "role",
        "content",
        "from",
        "value",
        "train",
        "weight",
        "loss",
        "name",
        "metadata",
        "reasoning",
        "reasoning_content",
        "tool_calls",
    ),
    *(
        "function",
        "arguments",
        "parameters",
        "type",
        "text",
        "id",
        "messages",
        "conversations",
        "prompt",
        "chosen",
        "rejected",
        "completion",
    ),
    *(
        "label",
        "tools",
        "system",
        "margin",
        "instruction",
        "input",
        "output",
        "history",
        "images",
        "function_call",
        "tool_call_id",
        "thinking",
    ),
]

texts = st.sampled_from(SAID + ROLES) | st.text(max_size=12)
numbers = st.integers() | st.floats() | st.sampled_from([0, 1, -1, 2**63, 1e300, 0.5, -0.0])
atoms = st.none() | st.booleans() | numbers | texts
keys = st.sampled_from(KEYS) | st.text(max_size=6)


def _containers(inside: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(inside, max_size=3) | st.dictionaries(keys, inside, max_size=3)


turns = st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": atoms | _containers(atoms)})
parts = st.fixed_dictionaries({"type": st.sampled_from(["text", "image", "image_url", "audio"]), "text": texts})
calls = st.fixed_dictionaries(
    {"type": st.just("function"), "function": st.fixed_dictionaries({"name": texts, "arguments": atoms})}
)
trees = st.recursive(atoms | turns | parts | calls, _containers, max_leaves=8)
"""Any JSON value, and those more often that look like a message or a part of one."""


# Changes to a tree


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a tree, the root left out: every key and index, as paths."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def like(value: Any) -> st.SearchStrategy[Any]:
    """Another value of the same kind, so that many a changed tree is still one that is accepted."""
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, (int, float)):
        return numbers
    if isinstance(value, str):
        return (
            texts
            | texts.map(lambda text: value + text)
            | texts.map(lambda text: text + value)
            | st.just(value.swapcase())
        )
    if isinstance(value, list):
        return st.permutations(value).map(list) | st.just(value + value) | st.just(value[:1])
    return (
        st.dictionaries(keys, trees, max_size=1).map(lambda more: {**more, **value})
        if isinstance(value, dict)
        else atoms
    )


Like = Callable[[tuple[Any, ...], Any], st.SearchStrategy[Any]]
"""Another value like the one at a place of a tree, from the place and the value."""


@st.composite
def changed(
    draw: st.DrawFn,
    tree: Any,
    values: st.SearchStrategy[Any] = trees,
    *,
    most: int = 3,
    alike: Like = lambda path, value: like(value),
) -> Any:
    """The tree after one to ``most`` changes, each anywhere: a value like the one there, any value, a text of JSON, a
    list around it, nothing, one more key."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, most))):
        found = sorted(places(tree), key=repr)
        if not found:
            return tree
        *path, last = draw(st.sampled_from(found))
        owner = tree
        for key in path:
            owner = owner[key]
        match draw(st.sampled_from(["like"] * 8 + ["more"] * 2 + ["value", "words", "text", "list", "gone", "twice"])):
            case "like":
                # The next change must not reach into it
                owner[last] = copy.deepcopy(draw(alike((*path, last), owner[last])))
            case "value":
                owner[last] = draw(values)
            case "words":
                owner[last] = draw(texts)
            case "text":
                owner[last] = json.dumps(owner[last])
            case "list":
                owner[last] = [owner[last]]
            case "gone":
                del owner[last]
            case "more" if isinstance(owner, dict):
                owner[draw(keys)] = draw(values)
            case "twice" if isinstance(owner, list):
                owner.insert(last, copy.deepcopy(owner[last]))
    return tree
