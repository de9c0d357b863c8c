"""Row formats that a mapping cannot express. For each there is a small function, named by a preset, which makes columns
that the preset's mapping can read.

A function returns ``messages`` (and ``system``, ``tools``), which replace the columns that it reads. It raises
:class:`RowError` for what it cannot read, and :class:`LeftOut` for a sound row without an answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from align.data.messages import dialogue
from align.data.messages.calls import tool_calls_of
from align.data.messages.exports import chatgpt, claude, langchain, open_webui
from align.data.messages.messages import Note, list_of, text_of
from align.data.rows import Columns, LeftOut
from align.data.strict_json import RowDecoder, RowError, parse_text, skip_space, type_name
from align.recipe.rows.mapping import Dialogue


@dataclass(frozen=True)
class Coded:
    """A function that reads some columns of a row."""

    read: Callable[[Columns, Note], dict[str, Any]]
    """Row -> the new columns."""
    columns: frozenset[str]
    """The columns that it reads."""

    def __call__(self, row: Columns, note: Note) -> dict[str, Any]:
        """The row with the columns that were read replaced by the new ones."""
        return {**{key: item for key, item in row.items() if key not in self.columns}, **self.read(row, note)}


# xLAM


_OPTIONAL = re.compile(r",?\s*optional\b.*$", re.IGNORECASE)
_PYTHON = {"str": "string", "int": "integer", "float": "number", "bool": "boolean", "list": "array", "dict": "object"}


def xlam(row: Columns, note: Note) -> dict[str, Any]:
    """A question, calls, and tools whose ``parameters`` are ``{name: {type: "str, optional", description,
    default}}``."""
    answers = row.get("answers")
    if (isinstance(answers, str) and answers.strip() in ("", "[]")) or answers == []:
        raise LeftOut("has no call")
    calls = tool_calls_of(answers, "answers")
    tools = []
    for i, tool in enumerate(_parsed(row.get("tools"), "tools", "a list of tools")):
        if not isinstance(tool, Mapping) or not isinstance(tool.get("parameters") or {}, Mapping):
            raise RowError("expected a tool with its parameters", f"tools.{i}")
        tools.append({**tool, "parameters": _schema(tool.get("parameters") or {}, f"tools.{i}.parameters")})
    asked = {"role": "user", "content": text_of(row.get("query"), "query")}
    return {"messages": [asked, {"role": "assistant", "content": "", "tool_calls": calls}], "tools": tools}


def _schema(parameters: Mapping[str, Any], at: str) -> dict[str, Any]:
    """JSON Schema for xLAM's parameters. One without a default that is not called optional is required."""
    if isinstance(parameters.get("properties"), Mapping):
        return dict(parameters)  # it is JSON Schema already
    properties, required = {}, []
    for name, said in parameters.items():
        if not isinstance(said, Mapping):
            raise RowError(f"expected an object, found {type_name(said)}", f"{at}.{name}")
        kind = str(said.get("type", "")).strip()
        optional = _OPTIONAL.search(kind) is not None or "default" in said
        inner = re.match(r"(\w+)", _OPTIONAL.sub("", kind))
        spelled = inner[1].lower() if inner else ""
        entry = {key: item for key, item in said.items() if key != "type"}
        if spelled:
            entry["type"] = _PYTHON.get(spelled, {"tuple": "array", "set": "array"}.get(spelled, spelled))
        properties[name] = entry
        if not optional:
            required.append(name)
    return {"type": "object", "properties": properties, **({"required": required} if required else {})}


def _parsed(value: Any, field: str, what: str) -> list[Any]:
    if isinstance(value, str):
        value = parse_text(value, field, f"expected {what}")
    if value is None:
        return []
    if not isinstance(value, list):
        raise RowError(f"expected {what}, found {type_name(value)}", field)
    return value


# glaive-function-calling v1 and v2


_GLAIVE = Dialogue.model_validate(
    {"user": "\n\n\nUSER:", "assistant": "\n\n\nASSISTANT:", "tool": "\n\n\nFUNCTION RESPONSE:", "end": "<|endoftext|>"}
)
_SPEAKER = re.compile(r"^\s*(SYSTEM|USER|ASSISTANT|FUNCTION RESPONSE):", re.MULTILINE)
_CALL = re.compile(
    r"\{\s*\"name\":\s*\"(?P<name>[^\"]+)\"\s*(,\s*\"arguments\":\s*(?P<arguments>.*?))?\s*\}\s*", re.DOTALL
)


def glaive(row: Columns, note: Note) -> dict[str, Any]:
    """A system text with the tools in it, and a transcript with ``USER:``, ``ASSISTANT:``, ``FUNCTION RESPONSE:``,
    ``<functioncall>``."""
    if row.get("sample") is not None:
        system, _, said = text_of(row["sample"], "sample").partition("USER:")
        said, field = f"USER:{said}", "sample"
    else:
        system = text_of(row.get("system"), "system")
        said = text_of(row.get("chat"), "chat")
        field = "chat"
    text, tools = _with_tools(system.strip().removeprefix("SYSTEM:"))
    turns = dialogue.cut(re.sub(r"\n{2,}(?=(USER|ASSISTANT|FUNCTION RESPONSE):)", "\n\n\n", said), _GLAIVE, field)
    found: list[dict[str, Any]] = []
    for i, turn in enumerate(turns):
        if _SPEAKER.search(turn["content"]):
            raise RowError("has the mark of a speaker inside a turn", f"{field}.{i}")
        before, mark, call = turn["content"].partition("<functioncall>")
        if mark and turn["role"] == "assistant":
            turn = {**turn, "content": before.strip(), "tool_calls": [_call(call.strip(), f"{field}.{i}")]}
        found.append(turn)
    return {"messages": found, "system": text, "tools": tools}


def _with_tools(text: str) -> tuple[str, list[Any]]:
    """The system text without the JSON objects in it, and these objects."""
    decoder = RowDecoder()
    tools = list[Any]()
    rest = ""
    at = 0
    while (start := text.find("{", at)) >= 0:
        try:
            value, end, fault = decoder.decode(text, start)
        except ValueError:
            raise RowError("has a tool that is not JSON", "system") from None
        if fault:
            raise RowError(fault.what, "system")
        tools.append(value)
        rest, at = rest + text[at:start], skip_space(text, end)
    return (rest + text[at:]).strip(), tools


def _call(text: str, at: str) -> dict[str, Any]:
    """``{"name": "f", "arguments": '{"a": 1}'}``: an object in single quotes inside an object."""
    match = _CALL.fullmatch(text)
    if not match:
        raise RowError('expected a call, {"name": ..., "arguments": \'{...}\'}', at)
    arguments = match["arguments"] or "{}"
    if arguments[:1] == "'" and arguments[-1:] == "'":
        arguments = arguments[1:-1].replace("\\'", "'")
    return {"name": match["name"], "arguments": parse_text(arguments, at, "expected an object of arguments")}


# MOSS-003


_MOSS = re.compile(r"<\|[^|<>]+\|>:\s?(?P<said>.*?)(<eo[a-z]>)?\s*", re.DOTALL)


def moss(row: Columns, note: Note) -> dict[str, Any]:
    """``chat``: ``{turn_1: {Human, Inner Thoughts, Commands, Tool Responses, MOSS}}``, each text between its own
    marks."""
    chat = row.get("chat")
    if isinstance(chat, str):
        chat = parse_text(chat, "chat", "expected turns")
    if not isinstance(chat, Mapping) or not chat:
        raise RowError("expected turns, {turn_1: ...}", "chat")
    numbers: dict[int, tuple[str, Any]] = {}
    for key, turn in chat.items():
        number = re.fullmatch(r"turn_(\d+)", str(key))
        if not number or not isinstance(turn, Mapping):
            raise RowError("expected a turn, turn_1, turn_2 and so on", f"chat.{key}")
        numbers[int(number[1])] = (key, turn)
    messages: list[dict[str, Any]] = []
    for _, (key, turn) in sorted(numbers.items()):  # turn_10 comes after turn_9
        said = {name: _unmarked(text, f"chat.{key}.{name}") for name, text in turn.items() if text is not None}
        if said.get("Commands", "None") not in ("None", ""):
            raise LeftOut("has a command, which is no call with arguments")
        thought = said.get("Inner Thoughts", "None")
        answer = {"role": "assistant", "content": said.get("MOSS")}
        messages += [
            {"role": "user", "content": said.get("Human")},
            answer if thought in ("None", "") else {**answer, "reasoning": thought},
        ]
    return {"messages": messages, "system": row.get("meta_instruction")}


def _unmarked(text: Any, at: str) -> str:
    if not isinstance(text, str):
        raise RowError(f"expected a string, found {type_name(text)}", at)
    match = _MOSS.fullmatch(text)
    return match["said"].strip() if match else text.strip()


# Llama 2's and Mistral's [INST]


_INST = re.compile(
    r"(?:<s>)?\s*\[INST\](?P<asked>.*?)\[/INST\](?P<said>.*?)(?P<end></s>|(?=<s>)|(?=\[INST\])|$)", re.DOTALL
)
_SYS = re.compile(r"\s*<<SYS>>(?P<system>.*?)<</SYS>>(?P<asked>.*)", re.DOTALL)


def inst(row: Columns, note: Note) -> dict[str, Any]:
    """``text``: ``[INST] question [/INST] answer </s>`` and so on, with a system text in ``<<SYS>>``. An answer without
    ``</s>`` was cut off."""
    text = text_of(row.get("text"), "text").strip()
    system = None
    messages = list[dict[str, Any]]()
    at = 0
    while at < len(text) and (match := _INST.match(text, at)):
        asked = match["asked"]
        if not messages and (head := _SYS.fullmatch(asked)):
            system, asked = head["system"].strip(), head["asked"]
        answer = {"role": "assistant", "content": match["said"].strip()}
        messages += [
            {"role": "user", "content": asked.strip()},
            answer if match["end"] else {**answer, "finished": False},
        ]
        at = skip_space(text, match.end())
    if not messages or at < len(text):
        raise RowError("expected [INST] question [/INST] answer", "text")
    if not messages[-1]["content"]:
        messages.pop()
    return {"messages": messages, "system": system}


def steps(row: Columns, note: Note) -> dict[str, Any]:
    """Self-Instruct's seeds: an instruction and one of its ``instances``, ``{input, output}``; ``explode`` makes a row
    of each."""
    instance = row.get("instances")
    if isinstance(instance, list):
        (instance,) = list_of(instance, "instances", "a list of instances") if len(instance) == 1 else (None,)
    if not isinstance(instance, Mapping):
        raise RowError("holds several instances: `explode: instances` makes a row of each", "instances")
    asked, more = text_of(row.get("instruction"), "instruction"), instance.get("input")
    asked = f"{asked}\n\n{more}" if isinstance(more, str) and more.strip() else asked
    said = text_of(instance.get("output"), "instances.output")
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}


CODED: dict[str, Coded] = {
    "xlam": Coded(xlam, frozenset({"query", "answers", "tools"})),
    "glaive": Coded(glaive, frozenset({"system", "chat", "sample"})),
    "moss": Coded(moss, frozenset({"chat", "meta_instruction", "num_turns"})),
    "inst": Coded(inst, frozenset({"text"})),
    "steps": Coded(steps, frozenset({"instruction", "instances"})),
    "chatgpt": Coded(chatgpt, frozenset({"mapping", "current_node"})),
    "claude": Coded(claude, frozenset({"chat_messages"})),
    "open_webui": Coded(open_webui, frozenset({"chat"})),
    "langchain": Coded(langchain, frozenset({"inputs", "outputs", "error"})),
}
"""The functions by their names in presets."""
