"""Writing rows in the formats of other tools: TRL, LLaMA-Factory, OpenAI's fine-tuning, and labelled answers for KTO.

Each format accepts certain types of records. If it cannot express a part of a record, that is noted; if it cannot
express the record, :class:`Unsayable` is raised. Nothing is dropped silently.

Sources: TRL's dataset formats (https://huggingface.co/docs/trl/dataset_formats), LLaMA-Factory's data/README.md and its
converters, OpenAI's guides to supervised, preference and reinforcement fine-tuning.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from align.data.messages.messages import Note, same
from align.data.records import Conversation, Message, Messages, Preference, Prompt, Record, Unpaired

Row = dict[str, Any]
Shape = Callable[[Record, Note], Iterator[Row]]

TRAIN = "`train: false` on a message: it will be trained on"
CUT = "`finished: false`: the end of an answer that was cut off will be trained"
SAMPLED = "the ids that a policy sampled"
METADATA = "the head of a tool's result (`metadata`)"
REASONING = "reasoning"
THOUGHT = "reasoning, written into the text between <think> and </think>"
IDS = "the ids of calls and results"
NO_IDS = "no id on a call or result, where OpenAI asks for one"
NAMES = "the name of a speaker"
MARGIN = "margin"
VOTES = "votes of judges"
OTHER = "other columns"
ID = "id"
SEVERAL_MESSAGES = "an answer of several messages"


class Unsayable(Exception):
    """The format cannot express this record; the message says which part."""


def _only(record: Record, note: Note, written: tuple[str, ...] = ()) -> None:
    """Notes that columns of the source are dropped: other formats keep only those ``written``."""
    if record.fields.keys() - set(written):
        note(OTHER)


def _note_comparison(record: Preference, note: Note) -> None:
    if record.margins is not None:
        note(MARGIN)
    if record.votes is not None:
        note(VOTES)


def _ids(record: Preference) -> list[str]:
    """The id of each rejected answer's pair."""
    count = len(record.rejected)
    return [record.id] if count == 1 else [f"{record.id}#{number}" for number in range(1, count + 1)]


def _require_different(record: Preference) -> None:
    """Raises :class:`Unsayable` when an answer without its reasoning is as the chosen one without its own."""
    chosen, *rejected = (
        tuple(cast(Message, {key: value for key, value in message.items() if key != "reasoning"}) for message in answer)
        for answer in (record.chosen, *record.rejected)
    )
    if any(same(answer, chosen) for answer in rejected):
        raise Unsayable("answers that differ only in their reasoning")


# TRL


def trl(record: Record, note: Note) -> Iterator[Row]:
    """``messages``; ``prompt``, ``chosen``, ``rejected`` and, for its reward trainer, ``margin``; ``prompt``,
    ``completion``, ``label``; or ``prompt``. All are lists of messages; ``tools`` are JSON text. A pair for each
    rejected answer."""
    tools = {"tools": _json(record.tools)} if record.tools else {}

    def said(messages: Messages) -> list[Row]:
        return [_trl_message(message, note) for message in messages]

    if isinstance(record, Conversation):
        _only(record, note)
        yield {"id": record.id, "messages": said(record.messages), **tools}
    elif isinstance(record, Preference):
        _only(record, note)
        if record.votes is not None:
            note(VOTES)
        prompt, chosen = said(record.prompt), said(record.chosen)
        worse = [said(rejected) for rejected in record.rejected]
        for number, (id, rejected) in enumerate(zip(_ids(record), worse, strict=True)):
            margin = {} if record.margins is None else {"margin": record.margins[number]}
            yield {"id": id, "prompt": prompt, "chosen": chosen, "rejected": rejected, **margin, **tools}
    elif isinstance(record, Unpaired):
        _only(record, note)
        yield {
            "id": record.id,
            "prompt": said(record.prompt),
            "completion": said(record.completion),
            "label": record.label,
            **tools,
        }
    else:
        _only(record, note, ("answer",))
        answer = {"answer": record.fields["answer"]} if "answer" in record.fields else {}
        yield {"id": record.id, "prompt": said(record.prompt), **answer, **tools}


def _trl_message(message: Message, note: Note) -> Row:
    """A message in the form that chat templates read: with ``reasoning_content``, and calls with arguments as
    objects."""
    _note_ours(message, note)
    if not message.get("train", True):
        note(TRAIN)
    row = _plain(message)
    if message.get("reasoning"):
        row["reasoning_content"] = message["reasoning"]
    return row


def kto(record: Record, note: Note) -> Iterator[Row]:
    """TRL's labelled answers. A preference becomes one answer labelled true, and one labelled false for each rejected
    answer."""
    if isinstance(record, Preference):
        _note_comparison(record, note)
        answers = [(True, record.chosen), *((False, rejected) for rejected in record.rejected)]
        given = (record.id, record.origin, record.tools, record.fields)
        for number, (label, answer) in enumerate(answers):
            id, *rest = given
            yield from trl(Unpaired(record.prompt, answer, label, f"{id}#{number}", *rest), note)  # type: ignore[arg-type]
    else:
        yield from trl(record, note)


# OpenAI


def openai(record: Record, note: Note) -> Iterator[Row]:
    """``messages`` with ``weight``; ``input``, ``preferred_output`` and ``non_preferred_output``; or ``messages`` that
    end with the user, with the right ``answer`` for a grader. A pair for each rejected answer."""
    tools = {"tools": list(record.tools)} if record.tools else {}
    note(ID)
    if isinstance(record, Conversation):
        _only(record, note)
        yield {"messages": [_openai_message(message, note, weighed=True) for message in record.messages], **tools}
    elif isinstance(record, Preference):
        _require_different(record)
        _only(record, note)
        _note_comparison(record, note)
        prompt, chosen = (
            [_openai_message(message, note) for message in part] for part in (record.prompt, record.chosen)
        )
        for worse in record.rejected:
            rejected = [_openai_message(message, note) for message in worse]
            yield {"input": {"messages": prompt, **tools}, "preferred_output": chosen, "non_preferred_output": rejected}
    elif isinstance(record, Prompt):
        _only(record, note, ("answer",))
        answer = {"answer": record.fields["answer"]} if "answer" in record.fields else {}
        yield {"messages": [_openai_message(message, note) for message in record.prompt], **answer, **tools}


def _openai_message(message: Message, note: Note, *, weighed: bool = False) -> Row:
    _note_ours(message, note)
    row = _plain(message)
    if message.get("reasoning"):
        note(REASONING)
    if "tool_calls" in message:
        row["tool_calls"] = [_openai_call(call) for call in message["tool_calls"]]
        if not all("id" in call for call in row["tool_calls"]):
            note(NO_IDS)
    elif message["role"] == "tool" and "tool_call_id" not in message:
        note(NO_IDS)
    if not message.get("train", True):
        if weighed:
            row["weight"] = 0
        else:
            note(TRAIN)
    return row


def _openai_call(call: Mapping[str, Any]) -> Row:
    function = call.get("function")
    return {**call, "function": {**function, "arguments": _json(function["arguments"])}} if function else dict(call)


# LLaMA-Factory


def llama_factory(record: Record, note: Note) -> Iterator[Row]:
    """ShareGPT's turns, with ``system`` and ``tools`` (JSON text) in every row; with ``chosen`` and ``rejected`` turns,
    a pair for each rejected answer; or with a ``label``. :func:`declaration` is the entry of its dataset_info.json that
    reads them.

    Its speakers must alternate: a row in which a user's turn or a second result follows a result cannot be expressed.
    """
    _only(record, note)
    if isinstance(record, Conversation):
        yield _sharegpt(record, record.messages, record.id, note)
    elif isinstance(record, Unpaired):
        if len(record.completion) > 1:  # what comes before the last turn is read as prompt
            raise Unsayable(SEVERAL_MESSAGES)
        yield {**_sharegpt(record, record.prompt + record.completion, record.id, note), "label": record.label}
    elif isinstance(record, Preference):
        _note_comparison(record, note)
        asked = _sharegpt(record, record.prompt, record.id, note)
        chosen = _one_turn(record.chosen, note)
        worse = [_one_turn(rejected, note) for rejected in record.rejected]
        for id, rejected in zip(_ids(record), worse, strict=True):
            yield {**asked, "id": id, "chosen": chosen, "rejected": rejected}


def _sharegpt(record: Record, messages: Messages, id: str, note: Note) -> Row:
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    rest = messages[1:] if system else messages
    turns = [_turn(message, note) for message in rest]
    for number, turn in enumerate(turns):
        if (turn["from"] in ("gpt", "function_call")) != (number % 2 == 1):
            before = turns[number - 1]["from"] if number else "the beginning"
            raise Unsayable(f"{turn['from']} after {before}: its turns alternate")
    return {"id": id, "conversations": turns, "system": system, "tools": _json(record.tools) if record.tools else ""}


def _one_turn(messages: Messages, note: Note) -> Row:
    if len(messages) > 1:
        raise Unsayable(SEVERAL_MESSAGES)
    return _turn(messages[0], note)


def _turn(message: Message, note: Note) -> Row:
    _note_ours(message, note)
    if not message.get("train", True):
        note(TRAIN)
    if "name" in message:
        note(NAMES)
    content, calls = message["content"], message.get("tool_calls", [])
    if "tool_call_id" in message or any("id" in call for call in calls):
        note(IDS)
    if not calls:
        if message.get("reasoning"):
            note(THOUGHT)
            content = f"<think>\n{message['reasoning']}\n</think>\n\n{content}"
        return {"from": {"user": "human", "assistant": "gpt", "tool": "observation"}[message["role"]], "value": content}
    if content or message.get("reasoning"):
        raise Unsayable("a text or reasoning beside a call")
    if any("function" not in call for call in calls):
        raise Unsayable("a custom call")
    functions = [call["function"] for call in calls]
    return {"from": "function_call", "value": _json(functions[0] if len(functions) == 1 else functions)}


def declaration(name: str, kind: type[Record]) -> Row:
    """The entry of LLaMA-Factory's dataset_info.json for a file of such rows."""
    columns = {"messages": "conversations", "system": "system", "tools": "tools"}
    entry: Row = {"file_name": name, "formatting": "sharegpt"}
    if kind is Preference:
        entry["ranking"] = True
        columns |= {"chosen": "chosen", "rejected": "rejected"}
    elif kind is Unpaired:
        columns["kto_tag"] = "label"
    return {**entry, "columns": columns}


# All of them


def _note_ours(message: Message, note: Note) -> None:
    """Notes the parts of a message that only this package has."""
    if not message.get("finished", True):
        note(CUT)
    if "sampled" in message:
        note(SAMPLED)
    if "metadata" in message:
        note(METADATA)


def _plain(message: Message) -> Row:
    keys = ("role", "content", "name", "tool_call_id", "tool_calls")
    return {key: message[key] for key in keys if key in message}  # type: ignore[literal-required]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True)
class Target:
    """A format of another tool."""

    rows: Shape
    takes: tuple[type[Record], ...]
    """Types of records that it accepts."""
    may_lack: frozenset[str] = frozenset({"tools"})
    """Columns that a row may lack even if earlier rows have them; the tool then reads no value."""
    may_begin: frozenset[str] = frozenset()
    """Columns that a row may have even if earlier rows lack them. TRL reads files with ``datasets``, which takes the
    columns from the beginning of a file and fails at a new one later; OpenAI reads every line by itself."""

    def uneven_column(self, first: Row, row: Row) -> str | None:
        """A column that only one of the two rows has although the tool needs it in both; None when there is none."""
        beginning = row.keys() - first.keys() - self.may_begin
        lacking = first.keys() - row.keys() - self.may_lack
        return min(beginning | lacking, default=None)


TARGETS: dict[str, Target] = {
    "trl": Target(trl, (Conversation, Preference, Unpaired, Prompt)),
    "llama-factory": Target(llama_factory, (Conversation, Preference, Unpaired)),
    "openai": Target(openai, (Conversation, Preference, Prompt), may_begin=frozenset({"tools"})),
    "kto": Target(kto, (Preference, Unpaired)),
}
"""The formats by their names for ``--to``."""
