"""Converting tool calls and descriptions of tools from other formats to the form that chat templates render."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Mapping
from typing import Any

from align.data.records import Message
from align.data.strict_json import RowError, checked, parse_text, type_name

Tools = tuple[dict[str, Any], ...]

TYPES = "a tool's parameter types spelled as Python's or in capitals, written as JSON Schema has them"
_TYPES = {"dict": "object", "str": "string", "float": "number", "int": "integer", "list": "array", "bool": "boolean"}
_SCHEMA = ("object", "string", "number", "integer", "array", "boolean", "null")


def tool_calls_of(value: Any, field: str, expected: str = "expected a list of tool calls") -> list[dict[str, Any]]:
    """Calls in OpenAI's form, with the arguments as an object; a single call counts as a list of one. In data, calls
    and arguments are often JSON text. In an object of arguments a null is an absent key (tables fill them in); in JSON
    text it stays.

    Raises :class:`RowError` for what is not a call, or has no arguments (a call without any has ``{}``).
    """
    if isinstance(value, str):
        value = _loosely(value, field, expected)
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        raise RowError(f"{expected}, found {type_name(value)}", field)
    if not value:
        raise RowError("is empty", field)
    return [_call(call, f"{field}.{i}") for i, call in enumerate(value)]


def _loosely(text: str, field: str, expected: str) -> Any:
    """The value of a JSON text, or of Python's output for an object."""
    try:
        return parse_text(text, field, expected)
    except RowError as error:
        if "found" not in error.message:
            raise
        try:
            value = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise error from None
        if not isinstance(value, (dict, list)):
            raise
        return value


def _call(call: Any, at: str) -> dict[str, Any]:
    if isinstance(call, str):
        call = parse_text(call, at, "expected an object") if call.lstrip().startswith("{") else call
    if not isinstance(call, Mapping):
        raise RowError(f"expected an object, found {type_name(call)}", at)
    own = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    if call.get("custom") is not None:
        custom = call["custom"]
        if not isinstance(custom, Mapping):
            raise RowError(f"expected an object, found {type_name(custom)}", f"{at}.custom")
        return {
            **own,
            **custom_call(custom.get("name"), custom.get("input"), f"{at}.custom.name", f"{at}.custom.input"),
        }
    function = call.get("function") or call
    if not isinstance(function, Mapping):
        raise RowError(f"expected an object, found {type_name(function)}", f"{at}.function")
    name = function.get("name")
    if not isinstance(name, str) or not name.strip():
        raise RowError("missing" if name is None else "expected a name", f"{at}.name")
    key = next(
        (key for key in ("arguments", "parameters", "args", "input") if function.get(key) is not None), "arguments"
    )
    return {
        **own,
        "type": "function",
        "function": {"name": name, "arguments": arguments_of(function.get(key), f"{at}.{key}")},
    }


def arguments_of(value: Any, field: str) -> dict[str, Any]:
    """The arguments of a call as an object."""
    if isinstance(value, str):
        value = parse_text(value, field, "expected an object") if value.strip() else {}
        keep_nulls = True
    else:
        keep_nulls = False
    if not isinstance(value, dict):
        hint = "; a call without arguments has {}" if value is None else ""
        raise RowError(f"expected an object, found {type_name(value)}{hint}", field)
    found: dict[str, Any] = checked(value, field, keep_nulls=keep_nulls)
    return found


def custom_call(name: Any, payload: Any, at_name: str, at_payload: str) -> dict[str, Any]:
    """A call whose payload is plain text: of OpenAI's custom tools, or GLM-4's ``metadata`` and content."""
    if not isinstance(name, str) or not name.strip() or "\n" in name.strip() or len(name) > 200:
        raise RowError("missing" if name is None else "expected the name of a tool", at_name)
    if not isinstance(payload, str):
        raise RowError("missing" if payload is None else f"expected a string, found {type_name(payload)}", at_payload)
    return {"type": "custom", "custom": {"name": name.strip(), "input": payload}}


def call_turn(given: Mapping[str, Any], field: str) -> list[Message]:
    """The messages of ChatGLM3's ``tool`` turn, which contains a call and its result."""
    call: Message = {
        "role": "assistant",
        "content": "",
        "tool_calls": [_call({**given, "arguments": given["parameters"]}, field)],
    }
    if isinstance(given.get("train", given.get("loss")), (bool, int)) and not given.get("train", given.get("loss")):
        call["train"] = False
    seen = given["observation"]
    return [
        call,
        {
            "role": "tool",
            "content": seen if isinstance(seen, str) else json.dumps(seen, ensure_ascii=False),
            "name": given["name"],
        },
    ]


def tools_of(value: Any, field: str, note: Callable[[str], None] = lambda what: None) -> Tools:
    """Tool descriptions in OpenAI's form, ``{"type": "function", "function": {...}}``.

    Also reads bare functions, Anthropic's ``input_schema``, flat tools of the Responses API, Gemini's
    ``functionDeclarations``, a single tool without a list, and JSON text of any of them. An empty list in any form
    means no tools.

    Raises :class:`RowError` for anything else.
    """
    keep_nulls = isinstance(value, str)
    if isinstance(value, str):
        value = parse_text(value, field, "expected a list of tools") if value.strip() else None
    if not value:
        if value not in (None, [], {}):
            raise RowError(f"expected a list of tools, found {type_name(value)}", field)
        return ()
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        raise RowError(f"expected a list of tools, found {type_name(value)}", field)
    tools: list[dict[str, Any]] = []
    for i, tool in enumerate(value):
        at = f"{field}.{i}"
        if isinstance(tool, str):
            tool = parse_text(tool, at, "expected an object")
        if not isinstance(tool, Mapping):
            raise RowError(f"expected an object, found {type_name(tool)}", at)
        tool = checked(dict(tool), at, keep_nulls=keep_nulls)
        declared = tool.get("functionDeclarations", tool.get("function_declarations"))
        for one in declared if isinstance(declared, list) else [tool]:
            tools.append(_tool(one, at, note))
    return tuple(tools)


def _tool(tool: Any, at: str, note: Callable[[str], None]) -> dict[str, Any]:
    if (
        isinstance(tool, dict)
        and isinstance(tool.get("type"), str)
        and tool["type"] != "function"
        and set(tool) <= {"type", tool["type"]}
    ):
        return tool  # a custom tool, or a built-in one without description (GLM-4's python, simple_browser)
    function = tool.get("function") or tool if isinstance(tool, dict) else tool
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError("missing", f"{at}.name")
    if "function" in tool:
        return {**tool, "type": "function", "function": _with_schema(function, note)}
    function = {key: item for key, item in function.items() if not (key == "type" and item == "function")}
    if "input_schema" in function and "parameters" not in function:
        function["parameters"] = function.pop("input_schema")
    return {"type": "function", "function": _with_schema(function, note)}


def _with_schema(function: dict[str, Any], note: Callable[[str], None]) -> dict[str, Any]:
    parameters = function.get("parameters")
    if not isinstance(parameters, dict):
        return function
    schema = _schema(parameters)
    if schema != parameters:
        note(TYPES)
    return {**function, "parameters": schema}


def _schema(value: dict[str, Any]) -> dict[str, Any]:
    """A schema with Python's or Gemini's names of types replaced by those of JSON Schema."""
    found = dict(value)
    kind = found.get("type")
    if isinstance(kind, str) and kind not in _SCHEMA:
        found["type"] = _TYPES.get(kind, kind.lower() if kind.isupper() and kind.lower() in _SCHEMA else kind)
    for key in ("properties", "items", "additionalProperties"):
        inner = found.get(key)
        if isinstance(inner, dict):
            found[key] = (
                {name: _schema(item) if isinstance(item, dict) else item for name, item in inner.items()}
                if key == "properties"
                else _schema(inner)
            )
    return found
