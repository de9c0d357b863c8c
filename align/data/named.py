"""The row formats that have a name and are no mapping."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from align.data import foreign

FORM_KEYS = frozenset({"messages", "prompt", "chosen", "rejected", "margin", "tools", "system"})


@dataclass(frozen=True)
class Format:
    """A row format that has a name."""

    convert: Callable[[dict[str, Any]], dict[str, Any]]
    """Row -> form. Raises :class:`RowError`."""
    columns: frozenset[str]
    """What it reads; the row's other columns become the record's ``fields``."""
    messages: str = "messages"
    """The column with the messages, for error messages."""


FORMATS: dict[str, Format] = {
    "messages": Format(foreign.messages, frozenset({"messages", "prompt", "completion", "tools", "system"})),
    "unpaired": Format(foreign.unpaired, frozenset({"messages", "conversations", "prompt", "completion", "label", "tools", "system"})),
    "graded": Format(foreign.graded, frozenset({"messages", "prompt", "completion", "grades", "tools", "system"})),
    "preference": Format(foreign.preference, FORM_KEYS),
    "prompt": Format(foreign.prompt, frozenset({"prompt", "tools", "system"}), "prompt"),
    "alpaca": Format(foreign.alpaca, frozenset({"instruction", "input", "output", "history", "system", "chosen", "rejected", "margin"})),
    "sharegpt": Format(foreign.sharegpt, frozenset({"conversations", "system", "tools", "chosen", "rejected", "margin"}), "conversations"),
    "hh_rlhf": Format(foreign.hh_rlhf, frozenset({"chosen", "rejected"})),
    "ultrafeedback": Format(foreign.ultrafeedback, FORM_KEYS | {"instruction", "completions", "models"}),
}
