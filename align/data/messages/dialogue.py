"""Splitting texts: dialogues with speakers' marks into turns, and answers with tags into reasoning, calls and text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from align.data.messages.calls import tool_calls_of
from align.data.messages.messages import ROLES, Note, quiet
from align.data.strict_json import RowError, type_name
from align.recipe.rows.mapping import Dialogue, Tags, Turns

Turn = dict[str, Any]


def cut(text: str, marks: Dialogue, field: str) -> list[Turn]:
    """The turns of a dialogue in one text. A first piece without a mark is the user's. Two successive turns of a
    speaker become one message of two paragraphs. An empty last turn of the assistant, with which a prompt ends, is left
    out.

    Raises :class:`RowError` for an empty text.
    """
    speakers = {mark: role for role in ("user", "assistant", "system", "tool") if (mark := getattr(marks, role))}
    pattern = "|".join(re.escape(mark) for mark in sorted(speakers, key=len, reverse=True))
    stripped = {mark.lstrip(): mark for mark in speakers}
    lead = re.match("|".join(re.escape(mark) for mark in sorted(stripped, key=len, reverse=True)), text.lstrip())
    if lead:  # the first mark may lack its line breaks
        text = stripped[lead.group()] + text.lstrip()[lead.end() :]
    head, *pieces = re.split(f"({pattern})", text)
    turns: list[Turn] = [{"role": "user", "content": head.strip()}] if head.strip() else []
    for mark, said in zip(pieces[::2], pieces[1::2], strict=True):
        role, said = speakers[mark], said.strip()
        whole = True
        if marks.end is not None:
            if role == "assistant":
                whole = said.endswith(marks.end)
            said = said.removesuffix(marks.end).strip()
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] = f"{turns[-1]['content']}\n\n{said}".strip()
        else:
            turns.append({"role": role, "content": said})
        if not whole:
            turns[-1]["finished"] = False
    if turns and turns[-1]["role"] == "assistant" and not turns[-1]["content"]:
        turns.pop()
    if not turns:
        raise RowError("is empty", field)
    return turns


def alternating(value: list[Any], field: str) -> list[Turn]:
    """Turns made of a list of texts or of pairs, the user's first."""
    texts: list[Any] = []
    for i, item in enumerate(value):
        if isinstance(item, list):
            if len(item) != 2:
                raise RowError("expected a question and its answer", f"{field}.{i}")
            texts += item
        else:
            texts.append(item)
    return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]


def woven(asked: Any, answered: Any, field: str) -> list[Turn]:
    """One conversation made of a list of the user's turns and a list of the assistant's."""
    if not isinstance(asked, list) or not isinstance(answered, list) or not len(asked) >= len(answered) > 0:
        raise RowError("expected as many turns of the assistant as of the user", field)
    turns: list[Turn] = []
    for question, reply in zip(asked, answered, strict=False):
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return turns


SYSTEM_OUT = "a system message, left out as the mapping says"


def named(items: list[Any], names: Turns | None, field: str, note: Note = quiet) -> list[Any]:
    """Turns with their parts renamed to the usual names. Raises :class:`RowError` for an item that is not a turn."""
    for i, item in enumerate(items):
        if not isinstance(item, Mapping):
            raise RowError(f"expected a turn, found {type_name(item)}", f"{field}.{i}")
    if names is None:
        return items
    found: list[Any] = []
    for item in items:
        if names.pairs:
            found += [
                {"role": role, "content": item.get(key)}
                for role, key in zip(("user", "assistant"), names.pairs, strict=True)
            ]
            continue
        turn = _renamed(item, names)
        if names.roles.get("system") == [] and speaker(turn) == "system":
            note(SYSTEM_OUT)
            continue
        found.append(turn)
    return found


def _renamed(item: Mapping[str, Any], names: Turns) -> Turn:
    turn = dict(item)
    keys = [names.content] if isinstance(names.content, str) else names.content or []
    if keys:
        said = next((item[key] for key in keys if item.get(key) not in (None, "")), item.get(keys[0]))
        turn = {key: value for key, value in turn.items() if key not in (*keys, "content", "value", "text", "message")}
        turn["content"] = said
    for ours, theirs in (("role", names.role), ("reasoning", names.reasoning), ("train", names.train)):
        if theirs is not None:
            turn[ours] = turn.pop(theirs, None)
    spelled = turn.get("role", turn.get("from"))
    for ours, others in names.roles.items():
        if spelled in ([others] if isinstance(others, str) else others):
            turn["role"] = ours
    return turn


def speaker(turn: Any) -> str | None:
    """The role of a turn, in this package's names; None for an unknown role."""
    spelled = turn.get("role") or turn.get("from") if isinstance(turn, Mapping) else None
    return ROLES.get(spelled.lower()) if isinstance(spelled, str) else None


def untagged(turns: list[Any], tags: Tags | None, field: str) -> list[Any]:
    """Turns in which tagged pieces of the assistant's texts became reasoning and calls, and tags around results are
    removed.

    Raises :class:`RowError` for a tag that is not closed.
    """
    if tags is None:
        return turns
    found = []
    for i, turn in enumerate(turns):
        role, key = speaker(turn), next((key for key in ("content", "value") if isinstance(turn.get(key), str)), None)
        if key is None:
            found.append(turn)
            continue
        turn, at = dict(turn), f"{field}.{i}.{key}"
        if role == "assistant":
            _take_apart(turn, key, tags, at)
        elif role == "tool" and tags.results:
            turn[key] = _without(turn[key], tags.results, at)[0] or turn[key]
        found.append(turn)
    return found


def _take_apart(turn: Turn, key: str, tags: Tags, at: str) -> None:
    text = turn[key]
    if tags.reasoning:
        thoughts, text = _pieces(text, tags.reasoning, at)
        if thoughts := [thought.strip() for thought in thoughts if thought.strip()]:
            turn["reasoning"] = "\n\n".join(thoughts)
    if tags.calls:
        calls, text = _pieces(text, tags.calls, at)
        if calls:
            turn["tool_calls"] = [
                call for one in calls for call in tool_calls_of(one.strip(), at, "a call must be JSON")
            ]
    for mark in tags.drop:
        text = text.replace(mark, "")
    turn[key] = text.strip() if text != turn[key] else text


def _pieces(text: str, marks: list[str], at: str) -> tuple[list[str], str]:
    """The pieces between the tags, and the rest."""
    opening, closing = marks
    found, rest = [], ""
    while (start := text.find(opening)) >= 0:
        end = text.find(closing, start + len(opening))
        if end < 0:
            raise RowError(f"{opening} begins and does not end", at)
        found.append(text[start + len(opening) : end])
        rest, text = rest + text[:start], text[end + len(closing) :]
    if closing in text:
        raise RowError(f"{closing} without {opening}", at)
    return found, rest + text


def _without(text: str, marks: list[str], at: str) -> tuple[str, str]:
    found, rest = _pieces(text, marks, at)
    return "\n".join(piece.strip() for piece in found), rest


def repaired(turns: list[Any], repair: list[Any], note: Note) -> list[Any]:
    """Conversations that begin or end with the wrong speaker, or have two successive turns of one speaker, repaired as
    the recipe allows. Repairs are counted."""
    roles = [speaker(turn) for turn in turns]
    start, end = 0, len(turns)
    if "leading_assistant" in repair:
        while start < end and roles[start] == "assistant":
            start += 1
        if start:
            note("what the assistant said before the user, left out")
    if "trailing_user" in repair:
        while end > start and roles[end - 1] == "user":
            end -= 1
        if end < len(turns):
            note("what the user said after the last answer, left out")
    turns = turns[start:end]
    if "same_speaker" not in repair:
        return turns
    joined: list[Any] = []
    for turn in turns:
        key = next((key for key in ("content", "value") if isinstance(turn.get(key), str)), None)
        same = (
            bool(joined)
            and key is not None
            and speaker(turn) in ("user", "assistant")
            and speaker(turn) == speaker(joined[-1])
        )
        if same and isinstance(joined[-1].get(key), str):
            joined[-1] = {**joined[-1], key: f"{joined[-1][key]}\n\n{turn[key]}"}
            note("two turns of one speaker, joined")
        else:
            joined.append(turn)
    return joined


def trained(turns: list[Any], flags: Any, field: str) -> list[Any]:
    """Turns with the key ``train`` set. ``flags`` is ``"last"``, or one flag for each turn."""
    if flags == "last":
        assistants = [i for i, turn in enumerate(turns) if speaker(turn) == "assistant"]
        return [{**turn, "train": False} if i in assistants[:-1] else turn for i, turn in enumerate(turns)]
    if not isinstance(flags, list) or len(flags) != len(turns):
        raise RowError(f"expected a flag for each of the {len(turns)} turns", field)
    return [{**turn, "train": flag} for turn, flag in zip(turns, flags, strict=True)]


NO_ANSWERS = ("proof", "notfound", "none")
"""Texts in place of an answer that mean that there is none."""


def extracted(text: str, spec: Any) -> str | None:
    """The right answer inside a text; None when it is not found. ``spec`` is a mapping's ``extract``."""
    if spec is None:
        return text.strip()
    if spec == "####":
        found = text.rpartition("####")[2].strip() if "####" in text else None
        return re.sub(r"(?<=\d),(?=\d)", "", found) if found else None
    if spec == "boxed":
        return boxed(text)
    ((kind, value),) = spec.items()
    if kind == "tag":
        matches = re.findall(f"<{re.escape(value)}>(.*?)</{re.escape(value)}>", text, re.DOTALL)
        return matches[-1].strip() or None if matches else None
    if kind == "after":
        return text.rpartition(value)[2].strip() or None if value in text else None
    match = re.search(value, text)
    if not match:
        return None
    return match[1] if match.re.groups else match[0]


def boxed(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}``, with balanced braces; None without one."""
    start = text.rfind("\\boxed{")
    depth, begin = 0, start + len("\\boxed{")
    for at in range(begin, len(text)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth < 0:
            return text[begin:at].strip() or None
    return None
