"""Values at the places of a mapping: a fast path for plain columns, finding right answers, and comparing answers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from align.data.mapping.places import Place, template, text_at
from align.data.messages import dialogue
from align.data.messages.messages import list_of
from align.data.rows import Columns, LeftOut
from align.data.strict_json import RowError, parse_text
from align.recipe.rows.mapping import RowMapping, TreeAt

Form = dict[str, Any]

OPENS = re.compile(r"\s*[\[{]")
"""The beginning of a text that may be JSON."""


def plain_columns(mapping: RowMapping) -> dict[str, str] | None:
    """The columns of a mapping that only renames columns; None for any other mapping."""
    given = mapping.given()
    if not given.keys() <= {"prompt", "completion", "chosen", "rejected"} or "prompt" not in given or len(given) == 1:
        return None
    columns = {key: value for key, value in given.items() if isinstance(value, str) and place_of_column(value)}
    return columns if len(columns) == len(given) else None


def place_of_column(text: str) -> bool:
    """Is this place a column and nothing else?"""
    at = template(text)
    return isinstance(at, Place) and len(at.steps) == 1 and isinstance(at.steps[0], str)


def read_plainly(row: Columns, columns: dict[str, str]) -> Form | None:
    """The form of a row in which all these columns are texts; None for another row, which is read in the general
    way."""
    form: Form = {}
    for ours, theirs in columns.items():
        value = row.get(theirs)
        if type(value) is not str or OPENS.match(value):
            return None
        form[ours] = value
    for key in ("system", "tools"):
        if key in row and key not in columns.values():
            form[key] = row[key]
    if "completion" not in columns:
        return form
    asked, said = form.pop("prompt"), form.pop("completion")
    return {**form, "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}


NO_ANSWER = "its right answer was not found"
NOT_CHECKABLE = "its right answer is none that can be checked"


def right_answer(value: Any, where: str, extract: Any, *, needed: bool) -> Any:
    """The right answer for rewards: a text, a list of right answers, or an object for a checker that reads it.

    Raises :class:`LeftOut` when one is ``needed`` and the text has none that can be checked.
    """
    if isinstance(value, str) and value.lstrip().startswith("{"):
        with suppress(RowError):  # other texts may begin with a brace too, such as LaTeX
            value = parse_text(value, where, "")
    if value is None or isinstance(value, (list, dict)):
        return value
    text = text_at(value, where)
    found = dialogue.extracted(text, extract) if extract is not None else text
    if needed and found is None:
        raise LeftOut(NO_ANSWER)
    if found is not None and found.strip().lower() in dialogue.NO_ANSWERS:
        if needed:
            raise LeftOut(f"{NOT_CHECKABLE}: {found.strip()}")
        return None
    return found


PASTED = "a prompt that holds its right answer, behind #### or in a box"


def holds_answer(text: str, answer: Any) -> bool:
    """Does a prompt end with its right answer, as when a solution was pasted into it?"""
    if not isinstance(answer, str) or not answer.strip() or ("####" not in text and "\\boxed{" not in text):
        return False
    return answer.strip() in (dialogue.extracted(text, "####"), dialogue.boxed(text))


def key_of(value: Any) -> str:
    """A key that is equal for equal answers: their text without outer blanks."""
    return value.strip() if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def is_empty(value: Any) -> bool:
    """Is an answer empty?"""
    return value is None or (isinstance(value, str) and not value.strip()) or value == []


def has_gap(value: Any) -> bool:
    """Is one of several turns missing or empty?"""
    return isinstance(value, list) and any(is_empty(one) for one in value)


def as_rejected(values: list[Any]) -> Any:
    """Several answers in the form of a preference's ``rejected``."""
    return (
        values[0]
        if len(values) == 1 and isinstance(values[0], str)
        else [[one] if isinstance(one, dict) else one for one in values]
    )


def is_json_list(text: str) -> bool:
    """May this text be the JSON of a list?"""
    return text.lstrip().startswith("[")


def turns_in(text: str, where: str) -> Any:
    """The messages in a text that is their JSON; None for any other text."""
    try:
        value = parse_text(text, where, "")
    except RowError:
        return None
    if isinstance(value, dict) and isinstance(value.get("messages"), list):
        value = value["messages"]
    return (
        value
        if isinstance(value, list) and value and all(isinstance(item, Mapping) and len(item) > 1 for item in value)
        else None
    )


def bare(node: Columns, tree: TreeAt) -> dict[str, Any]:
    """A message of a nested tree without its answers."""
    return {key: value for key, value in node.items() if key != tree.children}


def answers_of(node: Columns, tree: TreeAt) -> list[Any]:
    """The answers to a message of a nested tree; none where there are none."""
    found = node.get(tree.children or "")
    return (
        dialogue.named(list_of(found, f"{tree.children}", "a list of answers"), None, f"{tree.children}")
        if found
        else []
    )


def spoken(path: Sequence[Columns], tree: TreeAt) -> list[dict[str, Any]]:
    """The messages of a path of a nested tree."""
    return [bare(node, tree) for node in path]
