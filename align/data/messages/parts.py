"""Reading a message's content that is a list of parts: texts, reasoning, calls and results. Pictures and files are
refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from align.data.messages.calls import tool_calls_of
from align.data.strict_json import RowError, type_name

_TEXT = ("text", "input_text", "output_text")
_THOUGHT = ("thinking", "reasoning")


@dataclass
class Parts:
    """The content of all parts of a turn."""

    any: bool = False
    text: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    results: list[dict[str, str]] = field(default_factory=list)
    """Contents of tool messages, with the names of the tools if given."""


def parts_of(value: Any, at: str) -> Parts:
    """Reads the parts of OpenAI, Anthropic, Bedrock, LLaMA-Factory and Gemini. Texts are joined.

    Raises :class:`RowError` for a part that a text model cannot use; the error names the field of the whole content.
    """
    if not isinstance(value, list):
        raise RowError(f"expected a list of parts, found {type_name(value)}", at)
    found = Parts(any=True)
    for i, part in enumerate(value):
        if isinstance(part, str):
            found.text += part
            continue
        if not isinstance(part, Mapping):
            raise RowError("has a part that is not text", at)
        _add(found, {key: item for key, item in part.items() if item is not None}, at, f"{at}.{i}")
    return found


def _add(found: Parts, part: dict[str, Any], content: str, at: str) -> None:
    kind = part.get("type")
    text = part.get("text", part.get("value", part.get("thinking", part.get("reasoning"))))
    if (kind in _TEXT or (kind is None and set(part) <= {"text", "thought"})) and isinstance(text, str):
        if part.get("thought"):
            found.reasoning += text
        else:
            found.text += text
    elif kind in _THOUGHT and isinstance(text, str):
        found.reasoning += text
    elif kind == "tool_use":
        found.calls += tool_calls_of([part], at)
    elif kind == "tool_call" and text is not None:
        found.calls += tool_calls_of(text, at)
    elif "functionCall" in part:
        found.calls += tool_calls_of([part["functionCall"]], at)
    elif kind == "tool_result":
        result = _result(part.get("content"), at)
        found.results.append({"content": result, **_named(part, "tool_use_id", "tool_call_id")})
    elif isinstance(part.get("functionResponse"), Mapping):
        response = part["functionResponse"]
        found.results.append({"content": _result(response.get("response"), at), **_named(response, "name", "name")})
    else:
        named = kind if isinstance(kind, str) else next(iter(part), None)
        raise RowError("has a part that is not text" + (f": {str(named)[:40]}" if named else ""), content)


def _result(value: Any, at: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(
        isinstance(item, Mapping) and ("text" in item or "type" in item) for item in value
    ):
        inner = parts_of(value, f"{at}.content")
        if inner.calls or inner.results:
            raise RowError("has a part that is not text", f"{at}.content")
        return inner.text
    return json.dumps(value, ensure_ascii=False)


def _named(part: Mapping[str, Any], key: str, ours: str) -> dict[str, str]:
    return {ours: part[key]} if isinstance(part.get(key), str) else {}
