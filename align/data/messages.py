"""Chat messages as foreign data spells them, turned into ours and checked; what cannot be understood is refused, with its field."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from align.data.records import Message, Messages
from align.data.strict_json import clip, type_name

Tools = tuple[dict[str, Any], ...]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""Role as OpenAI, TRL and GLM spell it -> ours. Any other is an error."""

_MAY_FOLLOW = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
_REASONING = ("reasoning_content", "reasoning", "thinking")


class RowError(ValueError):
    """A row that cannot be used: why, and which of its fields is to blame. Converters raise it."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field


def text_of(value: Any, field: str) -> str:
    """A string that says something. Raises :class:`RowError` for another type, and for one of white space only (C10)."""
    if value is None:
        raise RowError("missing", field)
    if not isinstance(value, str):
        raise RowError(f"expected a string, found {type_name(value)}", field)
    if not value.strip():
        raise RowError("is empty", field)
    return value


def list_of(value: Any, field: str, what: str) -> list[Any]:
    """A list that is not empty, or its JSON text (a CSV cell can hold no list)."""
    if isinstance(value, str):
        value = _json(value, field, f"expected {what}")
    if value is None:
        raise RowError("missing", field)
    if not isinstance(value, list):
        raise RowError(f"expected {what}, found {type_name(value)}", field)
    if not value:
        raise RowError("is empty", field)
    return value


def _json(text: str, field: str, expected: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RowError(f"{expected}, found a string that is not JSON", field) from None


def messages_of(value: Any, field: str) -> tuple[Messages, Tools]:
    """Messages, each checked by itself (:func:`check_order` checks them together), and the tools that one of them carries.

    GLM's files describe the tools in the system message, whose content may then be empty: such a message is left out.
    """
    items = list_of(value, field, "a list of messages")
    messages = tuple(message_of(item, f"{field}.{i}") for i, item in enumerate(items))
    tools: Tools = ()
    for i, item in enumerate(items):
        if item.get("tools") and not tools:
            tools = tools_of(item["tools"], f"{field}.{i}.tools")
    said = tuple(message for message in messages if message["content"] or message["role"] != "system")
    if not said:
        raise RowError("is empty", field)
    return said, tools


def message_of(value: Any, field: str) -> Message:
    """One message. A key whose value is null counts as absent: Arrow fills in nulls where one row has a key and another has not."""
    if not isinstance(value, Mapping):
        raise RowError(f"expected a message, found {type_name(value)}", field)
    given = {key: item for key, item in value.items() if item is not None}
    role = given.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise RowError("missing" if role is None else f"unknown role {clip(str(role), 40)!r}; known: {', '.join(ROLES)}", f"{field}.role")
    message: Message = {"role": ROLES[role]}
    for key in _REASONING:
        if given.get(key):
            raise RowError("text beside the content is not supported; put it into the content as the template wants it", f"{field}.{key}")
    if message["role"] == "assistant":
        calls = given.get("tool_calls") or ([{"function": given["function_call"]}] if given.get("function_call") else [])
        if calls:
            message["tool_calls"] = tool_calls_of(calls, f"{field}.tool_calls")
        if not _trained(given, field):
            message["train"] = False
        if not _flag(given.get("finished"), f"{field}.finished"):
            message["finished"] = False
    elif given.get("train"):
        raise RowError("only assistant messages are trained on", f"{field}.train")
    may_be_empty = "tool_calls" in message or (message["role"] == "system" and bool(given.get("tools")))
    message["content"] = _content(given.get("content"), f"{field}.content", may_be_empty=may_be_empty)
    for key in ("name", "tool_call_id"):
        if isinstance(given.get(key), str):
            message[key] = given[key]  # type: ignore[literal-required]
    return message


def _content(value: Any, field: str, *, may_be_empty: bool) -> str:
    """OpenAI's list of text parts is joined."""
    if isinstance(value, list):
        texts = [part.get("text") for part in value if isinstance(part, Mapping) and part.get("type") == "text"]
        parts = [text for text in texts if isinstance(text, str)]
        if len(parts) != len(value):
            raise RowError("has a part that is not text", field)
        value = "".join(parts)
    if may_be_empty and (value is None or (isinstance(value, str) and not value.strip())):
        return ""
    return text_of(value, field)


def _trained(given: Mapping[str, Any], field: str) -> bool:
    """``train`` as we spell it, or ``weight`` 0 or 1 as OpenAI's fine-tuning files do. True when neither is there."""
    return _flag(given.get("train", given.get("weight")), f"{field}.train" if "train" in given else f"{field}.weight")


def _flag(value: Any, field: str) -> bool:
    if value is None or value in (True, False):  # 0 and 1 are equal to them
        return value is None or bool(value)
    raise RowError("expected true or false", field)


def tool_calls_of(value: Any, field: str) -> list[dict[str, Any]]:
    """OpenAI tool calls with the arguments as an object, which is what chat templates render; in data they are often its JSON text."""
    calls = []
    for i, call in enumerate(list_of(value, field, "a list of tool calls")):
        at = f"{field}.{i}"
        if not isinstance(call, Mapping):
            raise RowError(f"expected an object, found {type_name(call)}", at)
        function = call.get("function") or call
        if not isinstance(function, Mapping):
            raise RowError(f"expected an object, found {type_name(function)}", f"{at}.function")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = _json(arguments, f"{at}.arguments", "expected an object") if arguments.strip() else {}
        if not isinstance(arguments, dict):
            raise RowError(f"expected an object, found {type_name(arguments)}", f"{at}.arguments")
        checked: dict[str, Any] = {
            "type": "function",
            "function": {"name": text_of(function.get("name"), f"{at}.name"), "arguments": arguments},
        }
        calls.append({"id": call["id"], **checked} if isinstance(call.get("id"), str) else checked)
    return calls


def tools_of(value: Any, field: str) -> Tools:
    """Tool descriptions in OpenAI's form, ``{"type": "function", "function": {...}}``; a bare function is wrapped. None are none."""
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        return ()
    tools = []
    for i, tool in enumerate(list_of(value, field, "a list of tools")):
        if not isinstance(tool, Mapping):
            raise RowError(f"expected an object, found {type_name(tool)}", f"{field}.{i}")
        function = tool.get("function") or tool
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowError("missing", f"{field}.{i}.name")
        tools.append(dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)})
    return tuple(tools)


def check_order(messages: Messages, field: str, *, after: str | None = None) -> None:
    """Raises :class:`RowError` unless system comes first, users and assistants take turns, and tool results follow an assistant.

    ``after`` is the role of the message before these.
    """
    for i, message in enumerate(messages):
        role = message["role"]
        if role not in _MAY_FOLLOW[after]:
            expected = " or ".join(_MAY_FOLLOW[after])
            raise RowError(
                f"{role} after {after}; expected {expected}" if after else f"begins with {role}; expected {expected}", f"{field}.{i}"
            )
        after = role


def same(one: Messages, other: Messages) -> bool:
    """Whether two message lists say the same, white space at the ends apart."""
    return list(map(_said, one)) == list(map(_said, other))


def _said(message: Message) -> tuple[Any, ...]:
    return message["role"], message["content"].strip(), message.get("tool_calls")


def shared_prefix(lists: Sequence[Messages]) -> int:
    """How many messages all lists begin with."""
    count = 0
    for group in zip(*lists, strict=False):
        if any(_said(message) != _said(group[0]) for message in group):
            break
        count += 1
    return count
