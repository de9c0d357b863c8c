"""The named row formats that are functions, not mappings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from align.data.formats import named_formats

FORM_KEYS = frozenset({"messages", "prompt", "chosen", "rejected", "margin", "tools", "system"})


@dataclass(frozen=True)
class Format:
    """A row format that has a name."""

    convert: Callable[[dict[str, Any]], dict[str, Any]]
    """Row -> form. Raises :class:`RowError`."""
    columns: frozenset[str]
    """The columns that it reads; other columns become the record's ``fields``."""
    messages: str = "messages"
    """The column with the messages, for error messages."""


FORMATS: dict[str, Format] = {
    "messages": Format(named_formats.messages, frozenset({"messages", "prompt", "completion", "tools", "system"})),
    "unpaired": Format(
        named_formats.unpaired,
        frozenset({"messages", "conversations", "prompt", "completion", "label", "tools", "system"}),
    ),
    "graded": Format(
        named_formats.graded, frozenset({"messages", "prompt", "completion", "grades", "tools", "system"})
    ),
    "preference": Format(named_formats.preference, FORM_KEYS),
    "prompt": Format(named_formats.prompt, frozenset({"prompt", "tools", "system"}), "prompt"),
    "alpaca": Format(
        named_formats.alpaca,
        frozenset({"instruction", "input", "output", "history", "system", "chosen", "rejected", "margin"}),
    ),
    "sharegpt": Format(
        named_formats.sharegpt,
        frozenset({"conversations", "system", "tools", "chosen", "rejected", "margin"}),
        "conversations",
    ),
    "hh_rlhf": Format(named_formats.hh_rlhf, frozenset({"chosen", "rejected"})),
    "ultrafeedback": Format(named_formats.ultrafeedback, FORM_KEYS | {"instruction", "completions", "models"}),
}
