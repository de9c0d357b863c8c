"""Looks up the places that a recipe names (see :mod:`align.recipe.rows.places`) in a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align.data.strict_json import RowError, parse_text, type_name
from align.recipe.rows.places import WHOLE, Every, Only, Place, Template, place, template

__all__ = ["Place", "Template", "find", "find_text", "place", "template", "text_at"]


def find(row: Mapping[str, Any], where: Place | str) -> Any:
    """The value at a place; None when there is none. ``a[*].b`` gives a list, with None for an item that has no ``b``.

    A column whose name equals the place has precedence, so names may have dots, hyphens and brackets. JSON texts on the
    way are parsed; raises :class:`RowError` for a fault in one.
    """
    if isinstance(where, str):
        if where in row:
            return row[where]
        where = place(where)
    if where.text in row:
        return row[where.text]
    whole = row if isinstance(where.steps[0], str) else row.get(WHOLE)
    return _walk(whole, where.steps, where.text)


def _walk(value: Any, steps: tuple[Any, ...], field: str) -> Any:
    at = 0
    while at < len(steps):
        if isinstance(value, str):
            value = parse_text(value, field, "expected JSON") if value.lstrip()[:1] in ("{", "[") else None
        if value is None:
            return None
        step = steps[at]
        if isinstance(step, str):
            if isinstance(value, list) and step.isdigit():  # `messages.0.content`, as errors write it
                value, at = value[int(step)] if int(step) < len(value) else None, at + 1
                continue
            value, at = _named(value, steps, at)
        elif isinstance(step, (Every, Only)):
            rest = steps[at + 1 :]
            items = value if isinstance(value, list) else []
            if isinstance(step, Only):
                items = [
                    item for item in items if isinstance(item, Mapping) and _spelled(item.get(step.key)) == step.value
                ]
                if rest and isinstance(rest[0], (int, slice)):
                    value, at = items, at + 1
                    continue
            found = []
            for item in items:
                inner = _walk(item, rest, field)
                deeper = any(isinstance(one, (Every, Only)) for one in rest)
                found += inner if deeper and isinstance(inner, list) else [inner]
            return found
        elif not isinstance(value, list):
            return None
        elif isinstance(step, slice):
            value, at = value[step], at + 1
        else:
            value, at = value[step] if -len(value) <= step < len(value) else None, at + 1
    return value


def _named(value: Any, steps: tuple[Any, ...], at: int) -> tuple[Any, int]:
    """An entry of an object, whose key is made of as many of the next names as possible; and the number of the next
    step."""
    if not isinstance(value, Mapping):
        return None, len(steps)
    end = at
    while end < len(steps) and isinstance(steps[end], str):
        end += 1
    for stop in range(end, at, -1):
        key = ".".join(steps[at:stop])
        if key in value:
            return value[key], stop
    return None, len(steps)


def _spelled(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def find_text(row: Mapping[str, Any], where: Place | Template) -> str:
    """The text at a place, or a text with places filled in; "" when there is no value.

    In a text with places, the piece before an empty place is left out too (for the first place the piece after it).
    Raises :class:`RowError` for a value that is not text.
    """
    if isinstance(where, Place):
        return text_at(find(row, where), where.text)
    values = [text_at(find(row, part), part.text) if isinstance(part, Place) else "" for part in where.parts]
    pieces: list[str] = [part if isinstance(part, str) else "" for part in where.parts]
    for number in range(1, len(values), 2):
        if not values[number].strip():
            first = not any(values[before].strip() for before in range(1, number, 2))
            pieces[number + 1 if first and number + 2 < len(values) else number - 1] = ""
            values[number] = ""
    return "".join(piece + value for piece, value in zip(pieces, values, strict=True))


def text_at(value: Any, field: str) -> str:
    """A value as text: numbers in their shortest exact form (72.0 is 72), a list of texts joined, null as ""."""
    if isinstance(value, str):
        return value
    if value is None or value != value:  # pandas writes NaN for a missing value
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        if abs(value) == float("inf"):
            raise RowError("expected a text, found an infinite number", field)
        return str(int(value)) if value == int(value) else repr(value)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "".join(value)
    raise RowError(f"expected a text, found {type_name(value)}", field)
