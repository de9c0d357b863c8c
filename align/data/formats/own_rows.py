"""This package's own row format: a record that is written in it is read back as the same record.

    {"id": ..., "messages": [...], "tools": "[...]", "fields": {...}, "origin": {"source": "prefs.csv", "line": 7}}

with ``messages``; or ``prompt``, ``chosen``, ``rejected``, ``margin`` and ``votes``; or ``prompt``, ``completion`` and
``label`` or ``grades``; or ``prompt`` alone. A row of this format is recognised by its ``origin``, the place of the
original row. Other columns of that row are under ``fields``, so that they are not taken for parts of the record. Tools
and the arguments of calls are JSON texts, as OpenAI writes arguments, because tables do not distinguish a null from an
absent key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from typing import Any

from align.data.formats.own_format import form_of
from align.data.records import Record
from align.data.strict_json import RowError, parse_text, type_name

OWN = ("fields", "origin")
"""Columns of this format that are not part of the record's content."""


def row_of(record: Record, source: str) -> dict[str, Any]:
    """The row of a record; ``source`` is the name of the file or data set that it came from."""
    row = form_of(record)
    for part in ("messages", "prompt", "chosen", "completion"):
        for message in row.get(part, ()):
            _spell_calls(message)
    for answer in row.get("rejected", ()):
        for message in answer:
            _spell_calls(message)
    if "tools" in row:
        row["tools"] = _text(row["tools"])
    if record.fields:
        row["fields"] = record.fields
    return {**row, "origin": {"source": source, "line": record.origin.line}}


def _spell_calls(message: dict[str, Any]) -> None:
    if "tool_calls" in message:
        message["tool_calls"] = [_call(call) for call in message["tool_calls"]]


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    if "function" not in call:
        return dict(call)
    return {**call, "function": {**call["function"], "arguments": _text(call["function"]["arguments"])}}


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# Reading


def is_own(row: Mapping[str, Any]) -> bool:
    """Was this row written by :func:`row_of`?"""
    origin = row.get("origin")
    return isinstance(origin, Mapping) and set(origin) == {"source", "line"}


def without_own(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row without its origin and the columns of the original row."""
    return {key: value for key, value in row.items() if key not in OWN} if is_own(row) else row


def other_columns(row: Mapping[str, Any], used: Set[str | None]) -> dict[str, Any]:
    """The columns of a row that are not ``used``; for a row of this format, those of the original row. Raises
    :class:`RowError` when these are damaged."""
    rest = {key: value for key, value in row.items() if key not in used}
    if not is_own(row):
        return rest
    fields = row.get("fields")
    if isinstance(fields, str):
        fields = parse_text(fields, "fields", "expected the JSON of an object")
    if fields is not None and not isinstance(fields, dict):
        raise RowError(f"expected an object, found {type_name(fields)}", "fields")
    return {**{key: value for key, value in rest.items() if key not in OWN and value is not None}, **(fields or {})}
