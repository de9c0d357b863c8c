"""A strict JSON decoder for rows. It refuses what Python's decoder accepts: duplicate keys, NaN, 1e400, lone surrogates
and NUL.

All JSON of rows is decoded here: files, and texts inside a row, such as a cell with messages or the arguments of a
call.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from align.recipe.rows.places import WHOLE

_SPACE = re.compile(r"[ \t\r\n]*")
_UNREADABLE = re.compile("[\x00\ud800-\udfff]")
DEPTH = 100
"""Largest depth of nested objects and lists in calls and tools, since templates and encoders recurse."""
_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    type(None): "null",
}


_CONTROL = {code: repr(chr(code))[1:-1] for code in [*range(32), *range(127, 160), 0x2028, 0x2029]}


def one_line(text: str) -> str:
    r"""``text`` with control characters escaped, as line breaks by ``\n``: names in data may contain any character."""
    return text.translate(_CONTROL)


class RowError(ValueError):
    """Raised by converters for a row that cannot be used, with the reason and the faulty field."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.message = one_line(message)
        self.field = field if field is None else one_line(field)


@dataclass(frozen=True)
class Fault:
    """What is wrong with a row, and in which field."""

    what: str
    field: str | None = None
    hint: str | None = None


class RowDecoder:
    """Decodes objects from a text; with ``lists`` also lists, each as an object that only contains the list."""

    def __init__(self, *, lists: bool = False) -> None:
        self._lists = lists
        self._found: list[str] = []
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_float=self._float
        )

    def decode(self, text: str, at: int) -> tuple[Any, int, Fault | None]:
        """``(value, end, fault)`` of the object that begins at ``text[at]``.

        Raises :class:`ValueError` (of which ``json.JSONDecodeError`` is one) when it is not JSON, so that its end is
        unknown.
        """
        value, end, fault = self.value(text, at)
        if not fault and not isinstance(value, dict):
            if self._lists and isinstance(value, list):
                return {WHOLE: value}, end, None
            hint = (
                "where each row is a list, the places of a mapping begin with an index: `[0].value`"
                if isinstance(value, list)
                else None
            )
            fault = Fault(f"a row must be an object, found {type_name(value)}", hint=hint)
        return value, end, fault

    def value(self, text: str, at: int) -> tuple[Any, int, Fault | None]:
        """The same for a value of any type."""
        self._found.clear()
        try:
            value, end = self._decoder.raw_decode(text, at)
        except RecursionError:
            raise ValueError("nested too deeply") from None
        if self._found:
            return value, end, Fault(self._found[0])
        # Decoded UTF-8 has no surrogates, and JSON allows no raw NUL, so only escapes can produce them.
        return value, end, unreadable(value) if text.find("\\u", at, end) >= 0 else None

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for i, key in enumerate(keys) if key in keys[:i])
            self._found.append(f"duplicate key {clip(twice, 40)!r}")
        return value

    def _constant(self, name: str) -> None:
        self._found.append(f"{name} is not JSON; write null")

    def _float(self, text: str) -> float:
        value = float(text)
        if math.isinf(value):
            self._found.append(f"the number {clip(text, 20)} is too large")
        return value


_TEXTS = RowDecoder()


def parse_text(text: str, field: str, expected: str) -> Any:
    """The value of a text that must be JSON, such as a CSV cell with messages.

    Raises :class:`RowError` with ``field`` when it is not JSON (the message begins with ``expected``), or has a
    duplicate key, NaN, an infinite number, a lone surrogate or a NUL.
    """
    try:
        value, end, fault = _TEXTS.value(text, skip_space(text, 0))
    except ValueError as error:
        raise RowError(_not_json(text, expected, str(error)), field) from None
    if skip_space(text, end) != len(text):
        raise RowError(_not_json(text, expected, ""), field)
    if fault:
        raise RowError(fault.what, f"{field}.{fault.field}" if fault.field else field)
    return value


def _not_json(text: str, expected: str, reason: str) -> str:
    if reason == "nested too deeply":
        return f"{expected}, found JSON that is nested too deeply"
    python = re.match(r"\s*(\[\s*)*\{\s*'", text) is not None
    return f"{expected}, found a string that is not JSON" + (
        " (single quotes: Python wrote it); write it as JSON" if python else ""
    )


def checked(value: Any, field: str, *, keep_nulls: bool = True, depth: int = 0) -> Any:
    """``value`` restricted to JSON types, as for calls and tools that a model is shown.

    Without ``keep_nulls``, keys whose value is null are left out: in a table every row has the keys of all rows. Raises
    :class:`RowError` for values nested deeper than :data:`DEPTH`, NaN, infinities, and types that JSON does not have.
    """
    if depth > DEPTH:
        raise RowError("nested too deeply", field)
    if isinstance(value, dict):
        given = {str(key): item for key, item in value.items() if keep_nulls or item is not None}
        return {
            key: checked(item, f"{field}.{clip(key, 40)}", keep_nulls=keep_nulls, depth=depth + 1)
            for key, item in given.items()
        }
    if isinstance(value, list):
        return [checked(item, f"{field}.{i}", keep_nulls=keep_nulls, depth=depth + 1) for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise RowError(f"{value} is not JSON", field)
    if value is not None and not isinstance(value, (str, bool, int, float)):
        raise RowError(f"has {type_name(value)}, which JSON does not have; write it as text", field)
    return value


def as_json(value: Any) -> tuple[Any, int] | None:
    """``value`` restricted to JSON types, with dates and decimals as text, and its length as JSON text. None for NaN,
    and for deep nesting."""
    try:
        text = json.dumps(value, default=str, allow_nan=False)
    except (ValueError, RecursionError):
        return None
    return json.loads(text), len(text)


def unreadable(value: Any) -> Fault | None:
    """The fault of the first string in ``value`` that cannot be tokenised or written as UTF-8; None when there is
    none."""
    stack: list[tuple[str, Any]] = [("", value)]
    while stack:
        field, item = stack.pop()
        if isinstance(item, str):
            if match := _UNREADABLE.search(item):
                code = ord(match.group())
                return Fault(f"lone surrogate \\u{code:04x}" if code else "NUL character", field or None)
        elif isinstance(item, dict):
            stack += [(f"{field}.{clip(str(key), 40)}".lstrip("."), part) for key, part in reversed(item.items())]
            stack += [(field, key) for key in item]
        elif isinstance(item, list):
            stack += [(f"{field}.{i}".lstrip("."), part) for i, part in reversed(list(enumerate(item)))]
    return None


def skip_space(text: str, at: int) -> int:
    """The position of the next character that is not JSON's white space."""
    match = _SPACE.match(text, at)
    return match.end() if match else at


def type_name(value: Any) -> str:
    """The type of a value in JSON's words, for messages."""
    return _NAMES.get(type(value), type(value).__name__)


def clip(text: str, length: int) -> str:
    """``text``, cut to ``length`` characters."""
    return text if len(text) <= length else text[: length - 1] + "…"
