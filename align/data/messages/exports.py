"""Read the exports of chat programs into messages. ChatGPT and Open WebUI export a tree of messages, of which one path
is the conversation; tracers such as LangSmith export the recorded calls of a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from align.data.messages.messages import Note
from align.data.rows import Columns, LeftOut
from align.data.strict_json import RowError, parse_text, type_name

Turn = dict[str, Any]

OTHER_BRANCH = "an answer in another branch of a chat, left out"
HIDDEN = "a hidden or empty message of a chat, left out"
ERROR = "ended in an error"


def _path(nodes: Any, leaf: Any, parent: str, field: str) -> list[Mapping[str, Any]]:
    """The nodes from the root to ``leaf``."""
    if not isinstance(nodes, Mapping):
        raise RowError(
            "missing" if nodes is None else f"expected an object of messages, found {type_name(nodes)}", field
        )
    path: list[Mapping[str, Any]] = []
    at = leaf
    while at is not None:
        node = nodes.get(str(at))
        if not isinstance(node, Mapping):
            raise RowError(f"has no message {str(at)[:40]!r}, which the chat goes through", field)
        if len(path) > len(nodes):
            raise RowError("goes round in a circle", field)
        path.append(node)
        at = node.get(parent)
    if not path:
        raise RowError("does not say where the chat ends", field)
    return path[::-1]


# ChatGPT


def chatgpt(row: Columns, note: Note) -> dict[str, Any]:
    """``mapping``: nodes with a ``parent``; the conversation is the path to ``current_node``. Hidden and empty messages
    are left out."""
    nodes = row.get("mapping")
    if isinstance(nodes, str):
        nodes = parse_text(nodes, "mapping", "expected an object of messages")
    path = _path(nodes, row.get("current_node"), "parent", "mapping")
    on_path = {id(node) for node in path}
    for node in nodes.values() if isinstance(nodes, Mapping) else ():
        message = node.get("message") if isinstance(node, Mapping) else None
        if id(node) not in on_path and isinstance(message, Mapping) and _role(message) == "assistant":
            note(OTHER_BRANCH)
    turns = [turn for node in path if (turn := _spoken(node, note)) is not None]
    return {"messages": turns}


def _role(message: Mapping[str, Any]) -> Any:
    author = message.get("author")
    return author.get("role") if isinstance(author, Mapping) else None


def _spoken(node: Mapping[str, Any], note: Note) -> Turn | None:
    message = node.get("message")
    if not isinstance(message, Mapping):
        return None
    recipient = message.get("recipient")
    if recipient not in (None, "all"):
        raise LeftOut("has a call in a form of its own")
    content, hidden = message.get("content"), message.get("metadata")
    kind = content.get("content_type") if isinstance(content, Mapping) else None
    parts = content.get("parts") if isinstance(content, Mapping) else None
    if isinstance(hidden, Mapping) and hidden.get("is_visually_hidden_from_conversation"):
        note(HIDDEN)
        return None
    if kind != "text" or not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise RowError(f"has a part that is not text: {str(kind)[:40]}", f"mapping.{str(node.get('id'))[:60]}")
    text = "".join(parts)
    if not text.strip():
        note(HIDDEN)
        return None
    turn = {"role": _role(message), "content": text}
    unfinished = message.get("status") not in (None, "finished_successfully")
    return {**turn, "finished": False} if unfinished and turn["role"] == "assistant" else turn


# Open WebUI


_DETAILS = re.compile(r"\s*<details type=\"(?P<kind>\w+)\"[^>]*>(?P<inside>.*?)</details>\s*", re.DOTALL)


def open_webui(row: Columns, note: Note) -> dict[str, Any]:
    """``chat.history.messages`` with a ``parentId`` each; the conversation is the path to ``currentId``.
    ``chat.messages`` may be stale."""
    chat = row.get("chat")
    if isinstance(chat, str):
        chat = parse_text(chat, "chat", "expected a chat")
    history = chat.get("history") if isinstance(chat, Mapping) else None
    if not isinstance(chat, Mapping) or not isinstance(history, Mapping):
        raise RowError("missing", "chat.history")
    nodes = history.get("messages")
    path = _path(nodes, history.get("currentId"), "parentId", "chat.history.messages")
    on_path = {id(node) for node in path}
    for node in nodes.values() if isinstance(nodes, Mapping) else ():
        if id(node) not in on_path and isinstance(node, Mapping) and node.get("role") == "assistant":
            note(OTHER_BRANCH)
    turns: list[Turn] = []
    for node in path:
        at = f"chat.history.messages.{str(node.get('id'))[:60]}"
        if node.get("error"):
            raise LeftOut(ERROR)
        if node.get("files"):
            raise RowError("has files, and a text model cannot take them", f"{at}.files")
        turn: Turn = {"role": node.get("role"), "content": node.get("content")}
        if turn["role"] == "assistant" and isinstance(turn["content"], str):
            _take_details(turn, f"{at}.content")
            if node.get("done") is False:
                turn["finished"] = False
        turns.append(turn)
    return {"messages": turns, "system": chat.get("system")}


def _take_details(turn: Turn, at: str) -> None:
    """Move the reasoning, a folded piece before the answer, into its field."""
    while match := _DETAILS.match(turn["content"]):
        if match["kind"] != "reasoning":
            raise LeftOut("has a call in a form of its own")
        inside = re.sub(r"<summary>.*?</summary>", "", match["inside"], flags=re.DOTALL).strip()
        turn["reasoning"] = "\n".join(re.sub(r"^(>|&gt;) ?", "", line) for line in inside.splitlines())
        turn["content"] = turn["content"][match.end() :]
    if "<details type=" in turn["content"]:
        raise RowError("has a folded piece inside the answer", at)


# Claude


def claude(row: Columns, note: Note) -> dict[str, Any]:
    """``chat_messages`` with a ``sender`` each. Attachments and calls are refused, since a text model cannot use them
    in this form."""
    messages = row.get("chat_messages")
    if not isinstance(messages, list):
        raise RowError(
            "missing" if messages is None else f"expected a list, found {type_name(messages)}", "chat_messages"
        )
    turns: list[Turn] = []
    for i, message in enumerate(messages):
        at = f"chat_messages.{i}"
        if not isinstance(message, Mapping):
            raise RowError(f"expected a message, found {type_name(message)}", at)
        for key in ("attachments", "files", "files_v2"):
            if message.get(key):
                raise RowError(f"has {key}, and a text model cannot take them", f"{at}.{key}")
        content = message.get("content")
        for part in content if isinstance(content, list) else []:
            if isinstance(part, Mapping) and part.get("type") not in ("text", "thinking"):
                raise RowError(f"has a part that is not text: {str(part.get('type'))[:40]}", f"{at}.content")
        turns.append(
            {
                "role": message.get("sender"),
                "content": content if isinstance(content, list) and content else message.get("text"),
            }
        )
    return {"messages": turns}


# LangSmith


def langchain(row: Columns, note: Note) -> dict[str, Any]:
    """A run: ``inputs.messages`` as LangChain serialises them, and the first of ``outputs.generations``."""
    if row.get("error"):
        raise LeftOut(ERROR)
    inputs, outputs = (_object(row.get(key), key) for key in ("inputs", "outputs"))
    asked, given = inputs.get("messages"), outputs.get("generations")
    while isinstance(asked, list) and asked and isinstance(asked[0], list):
        if len(asked) > 1:
            raise RowError("holds several conversations", "inputs.messages")
        asked = asked[0]
    while isinstance(given, list) and given:
        if len(given) > 1:
            raise RowError("holds several answers", "outputs.generations")
        given = given[0]
    if not isinstance(asked, list) or not isinstance(given, Mapping):
        raise RowError("missing", "inputs.messages" if isinstance(given, Mapping) else "outputs.generations")
    turns = [_constructed(one, f"inputs.messages.{i}") for i, one in enumerate(asked)]
    answer = _constructed(given.get("message"), "outputs.generations")
    information = given.get("generation_info")
    reason = information.get("finish_reason") if isinstance(information, Mapping) else None
    if reason not in (None, "stop", "tool_calls", "function_call", "end_turn", "tool_use"):
        answer["finished"] = False
    return {"messages": [*turns, answer]}


def _object(value: Any, field: str) -> Mapping[str, Any]:
    if isinstance(value, str):
        value = parse_text(value, field, "expected an object")
    if not isinstance(value, Mapping):
        raise RowError("missing" if value is None else f"expected an object, found {type_name(value)}", field)
    return value


def _constructed(value: Any, at: str) -> Turn:
    """``{lc, type: constructor, id: [..., HumanMessage], kwargs: {content, type, ...}}``, or a plain message."""
    if not isinstance(value, Mapping):
        raise RowError("missing" if value is None else f"expected a message, found {type_name(value)}", at)
    said = value["kwargs"] if isinstance(value.get("kwargs"), Mapping) else value
    names = value.get("id")
    last = names[-1] if isinstance(names, list) and names and isinstance(names[-1], str) else ""
    role = said.get("type") or said.get("role") or re.sub(r"Message(Chunk)?$", "", last)
    turn: Turn = {"role": role, "content": said.get("content")}
    more = said.get("additional_kwargs")
    calls = said.get("tool_calls") or (more.get("tool_calls") if isinstance(more, Mapping) else None)
    return {**turn, "tool_calls": calls} if calls else turn
