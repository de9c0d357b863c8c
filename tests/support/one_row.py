"""One row as a format reads it: the record, or why there is none."""

from __future__ import annotations

from typing import Any

import pytest

from align.data.formats.formats import RowError, Want, converter
from align.data.records import Conversation, Messages, Origin, Preference, Prompt, Record
from align.data.rows import Row
from align.recipe.schema import DataSource

ORIGIN = Origin("rows.jsonl", 7)


def convert(value: dict[str, Any], want: Want, format: str | None = None) -> Record:
    (record,) = converter(DataSource(path="rows.jsonl", format=format), want)(Row(value, ORIGIN))
    return record


def conversation(value: dict[str, Any], format: str | None = None) -> Conversation:
    record = convert(value, "conversation", format)
    assert isinstance(record, Conversation)
    return record


def preference(value: dict[str, Any], format: str | None = None) -> Preference:
    record = convert(value, "preference", format)
    assert isinstance(record, Preference)
    return record


def prompt(value: dict[str, Any], format: str | None = None) -> Prompt:
    record = convert(value, "prompt", format)
    assert isinstance(record, Prompt)
    return record


def refused(value: dict[str, Any], want: Want, format: str | None = None) -> tuple[str | None, str]:
    with pytest.raises(RowError) as caught:
        convert(value, want, format)
    assert len(caught.value.message) < 200
    return caught.value.field, caught.value.message


def says(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def asks(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def turns(*texts: str) -> list[dict[str, Any]]:
    """user, assistant, user, ..."""
    return [says(text) if i % 2 else asks(text) for i, text in enumerate(texts)]


def spoken(messages: Messages) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in messages]
