"""Making a record of a form (see :mod:`align.data.formats.formats`), and checking that it can be trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from align.data.messages.calls import Tools, tools_of
from align.data.messages.messages import (
    Note,
    check_order,
    message_of,
    messages_of,
    plain_calls,
    quiet,
    same,
    shared_prefix,
    text_of,
    unfolded,
)
from align.data.messages.parts import parts_of
from align.data.records import (
    Conversation,
    Graded,
    Message,
    Messages,
    Origin,
    Preference,
    Prompt,
    Record,
    Unpaired,
    Votes,
)
from align.data.rows import LeftOut
from align.data.strict_json import RowError, parse_text, type_name

UNGRADED = "nobody graded it"
LARGEST = 1e18
"""Largest size of a number that is trained on. Its square is still finite in fp32, in which means and losses are
computed."""

_Answer = tuple[str, Messages]
"""(field of the row, messages of the answer)."""


def record_of(
    form: Mapping[str, Any],
    origin: Origin,
    *,
    id: str,
    fields: dict[str, Any],
    column: str = "messages",
    note: Note = quiet,
) -> Record:
    """The record of a form. ``column`` is the row's name of the messages, for error messages.

    Raises :class:`RowError` for everything that must not be trained on: an unknown role, messages out of order, a
    missing or empty text, a rejected answer equal to the chosen one, answers to different prompts.
    """
    if "chosen" in form or "rejected" in form:
        prompt, chosen, rejected, tools = _preference(form, note)
        prompt = _with_system(prompt, form)
        tools = _tools(form, tools, note)
        if tools:
            prompt, chosen = (plain_calls(messages, tools, note) for messages in (prompt, chosen))
            rejected = tuple(plain_calls(messages, tools, note) for messages in rejected)
        margins, votes = _margins(form.get("margin"), len(rejected)), _votes(form.get("votes"), len(rejected))
        return Preference(prompt, chosen, rejected, id, origin, margins, tools, fields, votes)
    if "label" in form:
        return _unpaired(form, origin, id, fields, column, note)
    if "grades" in form:
        grades = _grades(form["grades"])
        prompt, completion, tools = _judged(form, column, note)
        return Graded(prompt, completion, grades, id, origin, tools, fields)
    if "messages" in form:
        messages, tools = messages_of(form["messages"], column, note, ordered=True)
        messages = _with_system(messages, form)
        tools = _tools(form, tools, note)
        if tools:
            messages = plain_calls(messages, tools, note)
        if messages[-1]["role"] == "assistant":
            return Conversation(messages, id, origin, tools, fields)
    elif "prompt" in form:
        messages, tools = _prompt(form["prompt"], note)
        messages = _with_system(messages, form)
        tools = _tools(form, tools, note)
        if tools:
            messages = plain_calls(messages, tools, note)
    else:
        raise RowError("has neither messages, nor a prompt, nor chosen and rejected answers")
    if messages[-1]["role"] not in ("user", "tool"):
        raise RowError(f"ends with the {messages[-1]['role']}; expected the user or a tool result", column)
    return Prompt(messages, id, origin, tools, fields)


def verdict(value: Any) -> bool | None:
    """Whether an answer was judged good, from a boolean, 1 or 0, or the text of one. None for anything else."""
    if isinstance(value, (bool, int, float)):
        return bool(value) if value in (0, 1) else None
    return (
        {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower())
        if isinstance(value, str)
        else None
    )


def _unpaired(
    form: Mapping[str, Any], origin: Origin, id: str, fields: dict[str, Any], column: str, note: Note
) -> Unpaired:
    """The record of an answer with a ``label``."""
    label = verdict(form["label"])
    if label is None:
        other = "expected true or false; a mapping reads other values: `better: {label: ..., good: [...], bad: [...]}`"
        raise RowError("missing" if form["label"] is None else other, "label")
    prompt, completion, tools = _judged(form, column, note)
    return Unpaired(prompt, completion, label, id, origin, tools, fields)


def _judged(form: Mapping[str, Any], column: str, note: Note) -> tuple[Messages, Messages, Tools]:
    """``prompt`` and ``completion``, or ``messages`` of which the last is judged; and the tools."""
    tools: Tools = ()
    if "messages" in form:
        messages, tools = messages_of(form["messages"], column, note, ordered=True)
        if messages[-1]["role"] != "assistant":
            raise RowError(f"ends with the {messages[-1]['role']}: there is no answer to judge", column)
        prompt, completion = messages[:-1], messages[-1:]
    else:
        prompt, tools = _prompt(form.get("prompt"), note)
        ((_, completion),) = _answers(form.get("completion"), "completion", many=False)
        if completion[0]["role"] != "assistant":  # the completion repeats the prompt
            if not same(completion[: len(prompt)], prompt) or len(completion) == len(prompt):
                raise RowError("does not begin with the prompt", "completion")
            completion = completion[len(prompt) :]
        check_order(completion, "completion", after=prompt[-1]["role"])
        if completion[-1]["role"] != "assistant":
            raise RowError(f"ends with the {completion[-1]['role']}; an answer ends with the assistant", "completion")
    prompt = _with_system(prompt, form)
    if prompt[-1]["role"] not in ("user", "tool"):
        raise RowError(f"ends with the {prompt[-1]['role']}; expected the user or a tool result", "prompt")
    tools = _tools(form, tools, note)
    if tools:
        prompt, completion = (plain_calls(messages, tools, note) for messages in (prompt, completion))
    return prompt, completion, tools


def _prompt(value: Any, note: Note = quiet) -> tuple[Messages, Tools]:
    """The messages and tools of a prompt. A string is one user message, or JSON of messages."""
    value = unfolded(value, "prompt")
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        return ({"role": "user", "content": text_of(value, "prompt")},), ()
    return messages_of(value, "prompt", note, ordered=True, greeting=True)


def _with_system(messages: Messages, form: Mapping[str, Any]) -> Messages:
    system = form.get("system")
    if isinstance(system, list):
        system = parts_of(system, "system").text
    if system is None or (isinstance(system, str) and not system.strip()):
        return messages
    text = text_of(system, "system")
    if messages[0]["role"] == "system":
        if messages[0]["content"].strip() == text.strip():
            return messages
        raise RowError("there is a system message already", "system")
    return ({"role": "system", "content": text}, *messages)


def _tools(form: Mapping[str, Any], inside: Tools, note: Note) -> Tools:
    given = tools_of(form.get("tools"), "tools", note)
    if given and inside and given != inside:
        raise RowError("the messages have other tools", "tools")
    return given or inside


def _margins(value: Any, rejected: int) -> tuple[float, ...] | None:
    """A margin for each rejected answer; a single number is used for all."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parse_text(value, "margin", "expected a number, or a list of them")
    if value is None or value == "":
        return None
    if not isinstance(value, list):
        return (_number(value, "margin"),) * rejected
    if len(value) != rejected:
        raise RowError(f"has {len(value)} numbers; there are {rejected} rejected answers", "margin")
    return tuple(_number(one, f"margin.{i}") for i, one in enumerate(value))


def _number(value: Any, field: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise RowError(f"expected a finite number, found {type_name(value)}", field)
    if abs(number) > LARGEST:
        raise RowError(f"{number:.3g} is too large to compute with; expected at most {LARGEST:.0e} in size", field)
    return number


def _votes(value: Any, rejected: int) -> tuple[Votes, ...] | None:
    """``{"chosen": 3, "rejected": 1}`` for all rejected answers, or a list of one for each; None for any other value of
    that column."""
    if not isinstance(value, list):
        return (_counted(value, "votes"),) * rejected if has_votes(value) else None
    if not value or not all(map(has_votes, value)):
        return None
    if len(value) != rejected:
        raise RowError(f"has {len(value)} entries; there are {rejected} rejected answers", "votes")
    return tuple(_counted(one, f"votes.{i}") for i, one in enumerate(value))


def own_votes(form: Mapping[str, Any]) -> frozenset[str]:
    """The name of the column of votes if it has this package's form; it then does not count as another column of the
    row."""
    value = form.get("votes")
    ours = has_votes(value) or (isinstance(value, list) and bool(value) and all(map(has_votes, value)))
    return frozenset({"votes"}) if ours else frozenset()


def has_votes(value: Any) -> bool:
    """Is this a count of votes in the form of this package's format?"""
    return isinstance(value, Mapping) and value.keys() == {"chosen", "rejected"}


def _counted(value: Mapping[str, Any], field: str) -> Votes:
    votes = Votes(_number(value["chosen"], f"{field}.chosen"), _number(value["rejected"], f"{field}.rejected"))
    if min(votes) < 0:
        raise RowError("is below 0", f"{field}.{'chosen' if votes.chosen < 0 else 'rejected'}")
    return votes


def _grades(value: Any) -> dict[str, float]:
    """Grades by name, without those that are null."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = parse_text(value, "grades", "expected numbers by their names")
    if not isinstance(value, Mapping):
        raise RowError(
            "missing" if value is None else f"expected numbers by their names, found {type_name(value)}", "grades"
        )
    grades = {
        str(name): _number(grade, f"grades.{name}")
        for name, grade in value.items()
        if grade is not None and grade != ""
    }
    if not grades:
        raise LeftOut(UNGRADED)
    return grades


def _preference(form: Mapping[str, Any], note: Note) -> tuple[Messages, Messages, tuple[Messages, ...], Tools]:
    """``(prompt, chosen, rejected, tools)``. If the answers are whole conversations, the prompt is cut off."""
    if _texts(form.get("rejected")) and not _texts(form.get("chosen")):
        raise RowError("is the JSON of a list of texts, in one text: several answers? write them as a list", "rejected")
    answers = [
        *_answers(form.get("chosen"), "chosen", many=False),
        *_answers(form.get("rejected"), "rejected", many=True),
    ]
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
        tools = messages_of(unfolded(form["chosen"], "chosen"), "chosen", note)[1]
    elif any(whole):
        raise RowError("some answers begin with the prompt, others do not", "rejected")
    else:
        prompt, tools = _prompt(given, note)
    if prompt[-1]["role"] not in ("user", "tool"):
        raise RowError(f"ends with the {prompt[-1]['role']}; expected the user or a tool result", "prompt")
    chosen = answers[0][1]
    for field, messages in answers:
        check_order(messages, field, after=prompt[-1]["role"])
        if field != "chosen" and same(messages, chosen):
            raise RowError("chosen and rejected are equal", field)
    return prompt, chosen, tuple(messages for _, messages in answers[1:]), tools


def _answers(value: Any, field: str, *, many: bool) -> list[_Answer]:
    """A string, a message or a list of messages is one answer; a list of strings or of lists is many. JSON text of
    messages is parsed."""
    value = unfolded(value, field)
    if isinstance(value, list) and value and not isinstance(value[0], Mapping):
        if many:
            return [answer for i, item in enumerate(value) for answer in _answers(item, f"{field}.{i}", many=False)]
        if len(value) == 1 and isinstance(value[0], str):
            value = value[0]
    if isinstance(value, list):
        return [(field, messages_of(value, field)[0])]
    message: Message = (
        message_of(value, field)
        if isinstance(value, Mapping)
        else {"role": "assistant", "content": text_of(value, field)}
    )
    return [(field, (message,))]


def _texts(value: Any) -> bool:
    """Is this JSON text of a list of texts?"""
    if type(value) is not str or not value.lstrip().startswith("["):
        return False
    try:
        parsed = parse_text(value, "", "")
    except RowError:
        return False
    return isinstance(parsed, list) and bool(parsed) and all(isinstance(item, str) for item in parsed)


def _prompt_length(conversations: Sequence[Messages], given: Any) -> int:
    """The number of messages at the beginning of whole conversations that are their prompt: those of the given prompt,
    or all that they share."""
    given = unfolded(given, "prompt")
    if isinstance(given, list):
        prompt = _prompt(given)[0]
        if not all(same(messages[: len(prompt)], prompt) for messages in conversations):
            raise RowError("chosen and rejected do not both begin with the prompt", "prompt")
        return len(prompt)
    length = min(shared_prefix(conversations), min(map(len, conversations)) - 1)
    while length and any(messages[length]["role"] == "tool" for messages in conversations):
        length -= 1  # if tool results differ, their calls belong to the answers
    if not length or any(messages[length]["role"] != "assistant" for messages in conversations):
        raise RowError("chosen and rejected answer different prompts", "rejected")
    if given is not None and given != "":
        text = text_of(given, "prompt").strip()
        if all(message["content"].strip() != text for message in conversations[0][:length]):
            raise RowError("chosen and rejected do not begin with the prompt", "prompt")
    return length
