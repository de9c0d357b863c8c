"""JSON as rows need it: what Python's decoder lets pass (duplicate keys, NaN, lone surrogates, NUL) is a fault here."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

_SPACE = re.compile(r"[ \t\r\n]*")
_UNREADABLE = re.compile("[\x00\ud800-\udfff]")
_NAMES = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number", type(None): "null"}


@dataclass(frozen=True)
class Fault:
    """What is wrong with a row, and in which of its fields."""

    what: str
    field: str | None = None
    hint: str | None = None


class RowDecoder:
    """Decodes objects out of a text."""

    def __init__(self) -> None:
        self._found: list[str] = []
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object, parse_constant=self._constant)

    def decode(self, text: str, at: int) -> tuple[Any, int, Fault | None]:
        """``(value, end, fault)`` of the value that begins at ``text[at]``.

        Raises :class:`ValueError` (of which ``json.JSONDecodeError`` is one) where it is not JSON, so that its end is not known.
        """
        self._found.clear()
        try:
            value, end = self._decoder.raw_decode(text, at)
        except RecursionError:
            raise ValueError("nested too deeply") from None
        if self._found:
            return value, end, Fault(self._found[0])
        if not isinstance(value, dict):
            return value, end, Fault(f"a row must be an object, found {type_name(value)}")
        # Decoded UTF-8 has no surrogates, and JSON allows no raw NUL: only an escape can make them.
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


def unreadable(value: Any) -> Fault | None:
    """The first string in ``value`` that no tokenizer and no UTF-8 file can take."""
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
    """Where the next character that is not JSON's white space stands."""
    match = _SPACE.match(text, at)
    return match.end() if match else at


def type_name(value: Any) -> str:
    """The type of a value in JSON's words, for messages."""
    return _NAMES.get(type(value), type(value).__name__)


def clip(text: str, length: int) -> str:
    """``text``, cut to ``length`` characters."""
    return text if len(text) <= length else text[: length - 1] + "…"
