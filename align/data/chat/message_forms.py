"""Forms of messages that chat templates expect: OpenAI's, with arguments as an object or as JSON text, and GLM-4's."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.data.records import Message
from align.data.strict_json import parse_text

Rendered = list[dict[str, Any]]
Tools = Sequence[dict[str, Any]]
Spell = Callable[[Message], Rendered]

_OURS = frozenset({"train", "finished", "sampled", "reasoning"})
"""Keys of this package's messages that a template does not get, or gets under another name."""


def name_of(call: Mapping[str, Any]) -> str:
    """The name of the function, or of the custom tool, that is called."""
    name: str = (call["custom"] if "custom" in call else call.get("function", call))["name"]
    return name


def as_openai(message: Message) -> Rendered:
    """The message with call arguments as objects, which most templates expect (OpenAI writes them as JSON text)."""
    return _openai(message, _with_object)


def as_openai_text(message: Message) -> Rendered:
    """The message with call arguments as JSON text, which some templates copy into their output (DeepSeek-V3)."""
    return _openai(message, _with_text)


def _openai(message: Message, arguments: Callable[[dict[str, Any]], dict[str, Any]]) -> Rendered:
    plain: dict[str, Any] = {key: value for key, value in message.items() if key not in _OURS}
    plain.setdefault("content", "")
    if calls := message.get("tool_calls"):
        plain["tool_calls"] = [arguments(call) for call in calls]
    return [plain]


def as_metadata(message: Message) -> Rendered:
    """GLM-4's spelling: a call is a block of its own, its head the tool's name and its content the payload; results are
    ``observation``.

    Several calls, or text and then a call, are several blocks of one turn. The payload of a function is its arguments
    as JSON, that of a custom tool its unchanged input.
    """
    content = message.get("content", "")
    if message["role"] == "tool":
        head = {"metadata": message["metadata"]} if message.get("metadata") else {}
        return [{"role": "observation", **head, "content": content}]
    calls = message.get("tool_calls") or []
    blocks: Rendered = [] if calls and not content else [{"role": message["role"], "content": content}]
    return blocks + [{"role": "assistant", "metadata": name_of(call), "content": _payload(call)} for call in calls]


def _payload(call: Mapping[str, Any]) -> str:
    if "custom" in call:
        text: str = call["custom"]["input"]
        return text
    arguments = call.get("function", call).get("arguments", {})
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _with_object(call: dict[str, Any]) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": _with_object(call["function"])}
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        # Text that is not a JSON object is kept as text, which some templates accept
        return {**call, "arguments": object_of(arguments)}
    return call


def object_of(arguments: str) -> Any:
    """The object whose JSON text ``arguments`` is; the text itself if it is not JSON of an object."""
    try:
        parsed = parse_text(arguments, "arguments", "expected an object")
    except ValueError:
        return arguments
    return parsed if isinstance(parsed, dict) else arguments


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": _with_text(call["function"])}
    arguments = call.get("arguments", {})
    return call if isinstance(arguments, str) else {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}


# Reasoning


@dataclass(frozen=True)
class ReasoningPlace:
    """The place in a message from which a template reads the reasoning."""

    name: str
    put: Callable[[dict[str, Any], str], None]
    """Writes the reasoning into a message in the template's form."""


def _field(key: str) -> ReasoningPlace:
    def put(block: dict[str, Any], text: str) -> None:
        block[key] = text

    return ReasoningPlace(f"the field `{key}`", put)


def _put_part(block: dict[str, Any], text: str) -> None:
    content = [{"type": "text", "text": block["content"]}] if block["content"] else []
    block["content"] = [{"type": "thinking", "thinking": text}, *content]


def _put_tags(block: dict[str, Any], text: str) -> None:
    block["content"] = f"<think>\n{text}\n</think>\n\n{block['content']}"


TAGS = ReasoningPlace("`<think>` and `</think>` in the content", _put_tags)
"""For templates without a field for reasoning, which find it in the content."""

PLACES = (
    *map(
        _field,
        ("reasoning_content", "reasoning", "thinking", "thinking_content", "reasoning_text", "thought", "thoughts"),
    ),
    ReasoningPlace("a part of type `thinking` in the content", _put_part),
    TAGS,
)
"""In the order in which they are tried: the fields of Qwen3, DeepSeek, GLM-4.5 and Nemotron, of OpenRouter and vLLM, of
gpt-oss and LFM2, and of others; then Mistral's way; then tags."""
