"""Converting chat messages of other formats to this package's form, and checking them. What cannot be understood is
refused, with the field.

All forms are read here: ``{"role", "content"}``, ShareGPT's ``{"from", "value"}``, lists of parts (OpenAI's,
Anthropic's, Gemini's), calls as separate turns, GLM's ``metadata``. A turn may hold several messages (a user's turn
with tool results), and several turns may be one message (an answer, and then its calls).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from align.data.messages.calls import Tools, call_turn, custom_call, tool_calls_of, tools_of
from align.data.messages.parts import Parts, parts_of
from align.data.records import Message, Messages, Sampled
from align.data.strict_json import RowError, clip, parse_text, type_name

Note = Callable[[str], None]
"""Called with something that a report should mention."""

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_call": "call",
    "tool_call": "call",
    "function_response": "tool",
    "tool_response": "tool",
    "observations": "tool",
    "ipython": "tool",
    "results": "tool",
    "prompter": "user",
    "chatgpt": "assistant",
    "chatbot": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "moss": "assistant",
}
"""Role in other formats, in lower case -> role here; ``call`` is an assistant's turn with calls only. Any other role is
an error."""

EMPTY_SYSTEM = "an empty system message, left out"
PLAIN_CALL = "an answer that is the JSON of a given tool's call, read as a call"

_KNOWN = ", ".join(list(ROLES)[:11])
_PLAIN = {"system": "system", "user": "user", "assistant": "assistant"}
_MAY_FOLLOW = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant", "user"),
}
_TEXTS = ("content", "value", "text", "message")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_FLAGS = ("train", "weight", "loss", "loss_weight", "loss_scale")
_LOOKS = re.compile(r"""\s*(\[\s*)*\{\s*(['"])(role|from|content|value)\2\s*:""")
_OPENS = re.compile(r"\s*(\[\s*[\[{]|\{)")


def quiet(what: str) -> None:
    """A :data:`Note` that does nothing."""


def text_of(value: Any, field: str) -> str:
    """A string that is not empty. Raises :class:`RowError` for another type, and for one of white space only."""
    if value is None:
        raise RowError("missing", field)
    if not isinstance(value, str):
        raise RowError(f"expected a string, found {type_name(value)}", field)
    if not value.strip():
        raise RowError("is empty", field)
    return value


def list_of(value: Any, field: str, what: str) -> list[Any]:
    """A list that is not empty, possibly given as JSON text, as in a CSV cell."""
    if isinstance(value, str):
        value = parse_text(value, field, f"expected {what}")
    if value is None:
        raise RowError("missing", field)
    if not isinstance(value, list):
        raise RowError(f"expected {what}, found {type_name(value)}", field)
    if not value:
        raise RowError("is empty", field)
    return value


def unfolded(value: Any, field: str) -> Any:
    """The messages of a JSON text; any other value unchanged.

    Raises :class:`RowError` for a text that looks like messages and cannot be read, since it is not meant as text.
    """
    if type(value) is not str or not _OPENS.match(value):
        return value
    looks = _LOOKS.match(value) is not None
    try:
        parsed = parse_text(value, field, "looks like messages: expected their JSON")
    except RowError:
        if looks:
            raise
        return value
    if _are_messages(parsed):
        return parsed
    if looks:
        raise RowError("looks like messages, and has none: expected a role and a text in each", field)
    return value


def _are_messages(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    if items and all(isinstance(item, list) for item in items):
        return all(item and _are_messages(item) for item in items)
    return bool(items) and all(
        isinstance(item, dict) and isinstance(item.get("role", item.get("from")), str) for item in items
    )


def messages_of(
    value: Any, field: str, note: Note = quiet, *, ordered: bool = False, greeting: bool = False
) -> tuple[Messages, Tools]:
    """Messages, and the tools that one of them contains. With ``ordered`` their order is checked too (else
    :func:`check_order` does it).

    GLM's files describe the tools in the system message, whose content may then be empty. An empty system message is
    left out and noted. ``greeting``: a prompt may begin with a message of the assistant.
    """
    items = list_of(value, field, "a list of messages")
    messages: list[Message] = []
    places: list[int] = []
    tools: Tools = ()
    for i, item in enumerate(items):
        # A fast path for nearly all messages, which have only a role and a text
        if type(item) is dict and len(item) == 2:
            said_by, content = item.get("role"), item.get("content")
            role = _PLAIN.get(said_by) if isinstance(said_by, str) else None
            if role is not None and type(content) is str and content.strip():
                messages.append({"role": role, "content": content})
                places.append(i)
                continue
        at = f"{field}.{i}"
        turns = turns_of(item, at)
        if item.get("tools") and not tools:
            tools = tools_of(item["tools"], f"{at}.tools", note)
        for message in turns:
            if message["role"] == "system" and not message["content"]:
                if not item.get("tools"):
                    note(EMPTY_SYSTEM)
            elif not (messages and _joined(messages[-1], message, at)):
                messages.append(message)
                places.append(i)
    if not messages:
        raise RowError("is empty", field)
    if ordered:
        check_order(messages, field, places=places, greeting=greeting)
    return tuple(messages), tools


def _joined(before: Message, message: Message, field: str) -> bool:
    """Whether an assistant's calls belong to its message just before; if so, they are added to it."""
    if (
        before["role"] != "assistant"
        or message["role"] != "assistant"
        or not message.get("tool_calls")
        or message["content"]
    ):
        return False
    if before.get("train", True) != message.get("train", True):
        raise RowError("one turn of the assistant is in part trained on and in part not", field)
    if message.get("reasoning"):
        if before.get("reasoning"):
            return False
        before["reasoning"] = message["reasoning"]
    before["tool_calls"] = [*before.get("tool_calls", []), *message["tool_calls"]]
    if not message.get("finished", True):
        before["finished"] = False
    return True


def message_of(value: Any, field: str) -> Message:
    """One message. Raises :class:`RowError` when the turn has several."""
    turns = turns_of(value, field)
    if len(turns) != 1:
        raise RowError("holds several messages; expected one", field)
    return turns[0]


def turns_of(value: Any, field: str) -> list[Message]:
    """The messages of one turn: nearly always one, but tool results in a user's turn are separate messages.

    A key whose value is null counts as absent: Arrow writes nulls for keys that only other rows have.
    """
    if not isinstance(value, Mapping):
        raise RowError("missing" if value is None else f"expected a message, found {type_name(value)}", field)
    given = {key: item for key, item in value.items() if item is not None}
    role = _role_of(given, value, field)
    if role == "tool" and "observation" in given and "parameters" in given:
        return call_turn(given, field)  # ChatGLM3: call and result in one turn
    key = _text_key(given, value, field)
    said = given.get(key)
    parts = parts_of(said, f"{field}.{key}") if isinstance(said, list) else Parts()
    if "parts" in given and said is None:
        parts, key = parts_of(given["parts"], f"{field}.parts"), "parts"
    if parts.any:
        said = parts.text
    if role == "assistant" or role == "call":
        return [_assistant(given, role, said, parts, f"{field}.{key}", field, absent=key in value)]
    for flag in _FLAGS:
        if flag in given and _flag(given[flag], f"{field}.{flag}"):
            raise RowError("only assistant messages are trained on", f"{field}.{flag}")
    if (
        any(isinstance(given.get(key), str) and given[key].strip() for key in _REASONING)
        or parts.reasoning
        or parts.calls
    ):
        raise RowError("only an assistant has reasoning and calls", field)
    found: list[Message] = [{"role": "tool", **result} for result in parts.results]  # type: ignore[typeddict-item]
    if not found or parts.text.strip():
        found.append(_other(given, role, said, f"{field}.{key}", absent=key in value))
    return found


def _role_of(given: Mapping[str, Any], value: Mapping[str, Any], field: str) -> str:
    key = "role" if "role" in given or not ("from" in value or "value" in value) else "from"
    role = given.get(key)
    known = ROLES.get(role) or ROLES.get(role.lower()) if isinstance(role, str) else None
    if known is None:
        raise RowError(
            "missing" if role is None else f"unknown role {clip(str(role), 40)!r}; known: {_KNOWN}, ...",
            f"{field}.{key}",
        )
    return known


def _text_key(given: Mapping[str, Any], value: Mapping[str, Any], field: str) -> str:
    """The key of the text."""
    found = [key for key in _TEXTS if key in given]
    if len(found) > 1 and any(given[key] != given[found[0]] for key in found[1:]):
        raise RowError(f"has a text as {' and as '.join(found)}, and they differ", field)
    if found:
        return found[0]
    return "value" if "from" in value and "role" not in value and "content" not in value else "content"


def _other(given: Mapping[str, Any], role: str, said: Any, field: str, *, absent: bool) -> Message:
    """A message of the system, the user or a tool."""
    message: Message = {"role": role}
    if role == "tool" and isinstance(said, (dict, list)):
        said = json.dumps(said, ensure_ascii=False)
    if role == "system" and (said is None or (isinstance(said, str) and not said.strip())):
        message["content"] = ""
    elif role == "tool" and isinstance(said, str):
        message["content"] = said  # a tool's result may be empty
    else:
        message["content"] = _content(said, field, absent=absent)
    if isinstance(given.get("name"), str) and given["name"].strip():
        message["name"] = given["name"]
    if role == "tool" and isinstance(given.get("metadata"), str) and given["metadata"].strip():
        message["metadata"] = given["metadata"]  # GLM-4: the head of an observation
    if isinstance(given.get("tool_call_id"), str):
        message["tool_call_id"] = given["tool_call_id"]
    return message


def _content(said: Any, field: str, *, absent: bool) -> str:
    if said is None and absent:
        raise RowError("is null: the text was taken out of the data", field)
    return text_of(said, field)


def _assistant(
    given: Mapping[str, Any], role: str, said: Any, parts: Parts, at: str, field: str, *, absent: bool
) -> Message:
    """A message of the assistant."""
    message: Message = {"role": "assistant"}
    calls = list(parts.calls)
    if role == "call":
        calls += tool_calls_of(said, at, "a function call must be the JSON of its name and arguments")
        said = ""
    if given.get("tool_calls"):
        calls += tool_calls_of(given["tool_calls"], f"{field}.tool_calls")
    elif given.get("function_call"):
        calls += tool_calls_of([given["function_call"]], f"{field}.function_call")
    if isinstance(given.get("metadata"), str) and given["metadata"].strip():
        # GLM-4: the payload of a call
        calls.append(custom_call(given["metadata"], said, f"{field}.metadata", at))
        said = ""
    if given.get("refusal"):
        if said:
            raise RowError("has a refusal beside the content", f"{field}.refusal")
        said = given["refusal"]
    if calls:
        message["tool_calls"] = calls
    if not _trained(given, field):
        message["train"] = False
    if not _flag(given.get("finished"), f"{field}.finished"):
        message["finished"] = False
    if "sampled" in given:
        message["sampled"] = _sampled(given["sampled"], f"{field}.sampled")
    if reasoning := _reasoning(given, parts, field):
        message["reasoning"] = reasoning
    empty = said is None or (isinstance(said, str) and not said.strip())
    message["content"] = "" if calls and empty else _content(said, at, absent=absent)
    if isinstance(given.get("name"), str):
        message["name"] = given["name"]
    return message


def _sampled(value: Any, field: str) -> Sampled:
    """The sampled ids that a stage saved with an answer."""
    if (
        not isinstance(value, Mapping)
        or not isinstance(value.get("encoder"), str)
        or not isinstance(value.get("ids"), list)
    ):
        raise RowError("expected {encoder: ..., ids: [...]}, as a stage of this package writes it", field)
    ids = value["ids"]
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in ids):
        raise RowError("expected a list of token ids", f"{field}.ids")
    return {"encoder": value["encoder"], "ids": ids}


def _reasoning(given: Mapping[str, Any], parts: Parts, field: str) -> str:
    """The reasoning before the answer, from any of its fields."""
    found = {key: given[key] for key in _REASONING if key in given and given[key] != ""}
    for key, item in found.items():
        if not isinstance(item, str):
            raise RowError(f"expected a string, found {type_name(item)}", f"{field}.{key}")
    said = {text for text in (*found.values(), parts.reasoning) if text.strip()}
    if len(said) > 1:
        raise RowError("has reasoning in several places, and they differ", field)
    return said.pop() if said else ""


def _trained(given: Mapping[str, Any], field: str) -> bool:
    """Is this message trained on? From ``train``, or 1, 0 or a boolean in ``weight`` (OpenAI), ``loss`` and others.
    Default: yes."""
    found = {key: _flag(given[key], f"{field}.{key}") for key in _FLAGS if key in given}
    if len(set(found.values())) > 1:
        raise RowError(f"{' and '.join(found)} say different things", f"{field}.{next(iter(found))}")
    return all(found.values())


def _flag(value: Any, field: str) -> bool:
    """The value of a flag: true, false, 1 or 0. Null counts as true."""
    if value is None or (isinstance(value, (bool, int, float)) and value in (0, 1)):
        return value is None or bool(value)
    if isinstance(value, (int, float)):
        raise RowError(
            f"expected true or false (or 1 or 0), found {value:g}: a message is trained on or it is not", field
        )
    raise RowError("expected true or false", field)


def plain_calls(messages: Messages, tools: Tools, note: Note = quiet) -> Messages:
    """Messages with calls in place of answers whose text is JSON of a call, as in GLM-4's files. Such a text counts as
    a call if the tool is known and a result follows."""
    names = {tool["function"]["name"] for tool in tools if "function" in tool}
    found: list[Message] = []
    for i, message in enumerate(messages):
        follows = i + 1 < len(messages) and messages[i + 1]["role"] == "tool"
        if (
            message["role"] == "assistant"
            and follows
            and "tool_calls" not in message
            and message["content"].lstrip().startswith("{")
        ):
            try:
                value = parse_text(message["content"], "", "")
                if isinstance(value, dict) and set(value) == {"name", "arguments"} and value["name"] in names:
                    calls = tool_calls_of([value], "")
                    message = {**message, "content": "", "tool_calls": calls}
                    note(PLAIN_CALL)
            except RowError:
                pass  # not JSON, or not a call: a text
        found.append(message)
    return tuple(found)


def check_order(
    messages: Sequence[Message],
    field: str,
    *,
    after: str | None = None,
    places: Sequence[int] | None = None,
    greeting: bool = False,
) -> None:
    """Raises :class:`RowError` unless the system message comes first, user and assistant alternate, and tool results
    follow an assistant's message.

    ``after`` is the role of the message before these; ``places`` are the numbers of the turns that the messages come
    from.
    """
    for i, message in enumerate(messages):
        role = message["role"]
        if role not in _MAY_FOLLOW[after] and not (greeting and role == "assistant" and after in (None, "system")):
            expected = " or ".join(_MAY_FOLLOW[after])
            at = f"{field}.{places[i] if places else i}"
            raise RowError(
                f"{role} after {after}; expected {expected}" if after else f"begins with {role}; expected {expected}",
                at,
            )
        after = role


def same(one: Messages, other: Messages) -> bool:
    """Whether two lists of messages are equal, up to white space at the ends of texts."""
    return list(map(_said, one)) == list(map(_said, other))


def _said(message: Message) -> tuple[Any, ...]:
    return message["role"], message["content"].strip(), message.get("tool_calls"), message.get("reasoning", "").strip()


def shared_prefix(lists: Sequence[Messages]) -> int:
    """The number of messages that all lists have in common at the beginning."""
    count = 0
    for group in zip(*lists, strict=False):
        if any(_said(message) != _said(group[0]) for message in group):
            break
        count += 1
    return count
