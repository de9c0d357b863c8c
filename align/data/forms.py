"""From a form (see :mod:`align.data.formats`) to a record, and what a record must be to be trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from align.data.messages import RowError, Tools, check_order, message_of, messages_of, same, shared_prefix, text_of, tools_of
from align.data.records import Conversation, Message, Messages, Origin, Preference, Prompt, Record
from align.data.strict_json import type_name

_Answer = tuple[str, Messages]
"""The field it stands in, and what it says."""


def record_of(form: Mapping[str, Any], origin: Origin, *, id: str, fields: dict[str, Any], column: str = "messages") -> Record:
    """The record that a form holds. ``column`` is what the messages are called in the row, for error messages.

    Raises :class:`RowError` for whatever must not be trained on: an unknown role, messages out of order, a missing or empty text (C10),
    a rejected answer equal to the chosen one (C09), answers to different prompts (C12).
    """
    if "chosen" in form or "rejected" in form:
        prompt, chosen, rejected, tools = _preference(form)
        prompt = _with_system(prompt, form)
        return Preference(prompt, chosen, rejected, id, origin, _margin(form.get("margin")), _tools(form, tools), fields)
    if "messages" in form:
        messages, tools = messages_of(form["messages"], column)
        check_order(messages, column)
        messages = _with_system(messages, form)
        if messages[-1]["role"] == "assistant":
            return Conversation(messages, id, origin, _tools(form, tools), fields)
    elif "prompt" in form:
        messages, tools = _prompt(form["prompt"])
        messages = _with_system(messages, form)
    else:
        raise RowError("has neither messages, nor a prompt, nor chosen and rejected answers")
    if messages[-1]["role"] not in ("user", "tool"):
        raise RowError(f"ends with the {messages[-1]['role']}; expected the user or a tool result", column)
    return Prompt(messages, id, origin, _tools(form, tools), fields)


def _prompt(value: Any) -> tuple[Messages, Tools]:
    """A string is one user message."""
    if not isinstance(value, list):
        return ({"role": "user", "content": text_of(value, "prompt")},), ()
    messages, tools = messages_of(value, "prompt")
    check_order(messages, "prompt")
    return messages, tools


def _with_system(messages: Messages, form: Mapping[str, Any]) -> Messages:
    system = form.get("system")
    if system is None or system == "":
        return messages
    if messages[0]["role"] == "system":
        raise RowError("there is a system message already", "system")
    return ({"role": "system", "content": text_of(system, "system")}, *messages)


def _tools(form: Mapping[str, Any], inside: Tools) -> Tools:
    return tools_of(form.get("tools"), "tools") or inside


def _margin(value: Any) -> float | None:
    if value is None or value == "":
        return None
    try:
        margin = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        margin = math.nan
    if not math.isfinite(margin):
        raise RowError(f"expected a finite number, found {type_name(value)}", "margin")
    return margin


def _preference(form: Mapping[str, Any]) -> tuple[Messages, Messages, tuple[Messages, ...], Tools]:
    """``(prompt, chosen, rejected, tools)``. The answers may be whole conversations: then the prompt is cut off them."""
    answers = [*_answers(form.get("chosen"), "chosen", many=False), *_answers(form.get("rejected"), "rejected", many=True)]
    for field, messages in answers:
        if messages[-1]["role"] != "assistant":
            raise RowError(f"ends with the {messages[-1]['role']}; an answer ends with the assistant", field)
    whole = [messages[0]["role"] != "assistant" for _, messages in answers]
    given = form.get("prompt")
    tools: Tools = ()
    if all(whole):
        start = _prompt_length([messages for _, messages in answers], given)
        prompt = answers[0][1][:start]
        answers = [(field, messages[start:]) for field, messages in answers]
        check_order(prompt, "chosen")
        tools = messages_of(form["chosen"], "chosen")[1]
    elif any(whole):
        raise RowError("some answers begin with the prompt, others do not", "rejected")
    else:
        prompt, tools = _prompt(given)
    if prompt[-1]["role"] not in ("user", "tool"):
        raise RowError(f"ends with the {prompt[-1]['role']}; expected the user or a tool result", "prompt")
    chosen = answers[0][1]
    for field, messages in answers:
        check_order(messages, field, after=prompt[-1]["role"])
        if field != "chosen" and same(messages, chosen):
            raise RowError("chosen and rejected are equal", field)
    return prompt, chosen, tuple(messages for _, messages in answers[1:]), tools


def _answers(value: Any, field: str, *, many: bool) -> list[_Answer]:
    """A string, a message or a list of messages is one answer; a list of strings or of lists is many."""
    if isinstance(value, list) and many and value and not isinstance(value[0], Mapping):
        return [answer for i, item in enumerate(value) for answer in _answers(item, f"{field}.{i}", many=False)]
    if isinstance(value, list):
        return [(field, messages_of(value, field)[0])]
    message: Message = message_of(value, field) if isinstance(value, Mapping) else {"role": "assistant", "content": text_of(value, field)}
    return [(field, (message,))]


def _prompt_length(conversations: Sequence[Messages], given: Any) -> int:
    """How many messages of whole conversations are their prompt: those of the given one, or all that they share."""
    if isinstance(given, list):
        prompt = _prompt(given)[0]
        if not all(same(messages[: len(prompt)], prompt) for messages in conversations):
            raise RowError("chosen and rejected do not both begin with the prompt", "prompt")
        return len(prompt)
    length = min(shared_prefix(conversations), min(map(len, conversations)) - 1)
    while length and any(messages[length]["role"] == "tool" for messages in conversations):
        length -= 1  # where tool results differ, the calls belong to the answers
    if not length or any(messages[length]["role"] != "assistant" for messages in conversations):
        raise RowError("chosen and rejected answer different prompts", "rejected")
    if given is not None:
        text = text_of(given, "prompt").strip()
        if all(message["content"].strip() != text for message in conversations[0][:length]):
            raise RowError("chosen and rejected do not begin with the prompt", "prompt")
    return length
