"""The named row formats: each a small function from a row to a form (see :mod:`align.data.formats.formats`)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from align.data.messages.messages import list_of, text_of, unfolded
from align.data.rows import Columns
from align.data.strict_json import RowError, type_name

Form = dict[str, Any]


def messages(row: Columns) -> Form:
    """TRL's and OpenAI's ``messages``; also TRL's ``prompt`` and ``completion``, of which only the completion is
    trained on."""
    if row.get("messages") is not None:
        return {key: row.get(key) for key in ("messages", "tools", "system")}
    if row.get("completion") is None:
        raise RowError("missing", "messages")
    asked, answer = unfolded(row.get("prompt"), "prompt"), unfolded(row["completion"], "completion")
    asked, answer = ([item] if isinstance(item, Mapping) else item for item in (asked, answer))
    before = asked if isinstance(asked, list) else [{"role": "user", "content": text_of(asked, "prompt")}]
    after = answer if isinstance(answer, list) else [{"role": "assistant", "content": text_of(answer, "completion")}]
    untrained = [
        {**m, "train": False} if isinstance(m, Mapping) and m.get("role") == "assistant" else m for m in before
    ]
    return {"messages": [*untrained, *after], "tools": row.get("tools"), "system": row.get("system")}


def unpaired(row: Columns) -> Form:
    """TRL's labelled answers: ``prompt``, ``completion`` and ``label``; or LLaMA-Factory's and ms-swift's, messages and
    ``label``."""
    form = {key: row.get(key) for key in ("label", "tools", "system")}
    for column in ("messages", "conversations"):
        if row.get(column) is not None:
            return {"messages": row[column], **form}
    return {"prompt": row.get("prompt"), "completion": row.get("completion"), **form}


def graded(row: Columns) -> Form:
    """A ``prompt``, a ``completion`` and its ``grades`` (numbers by name); or messages, of which the last is graded."""
    form = {key: row.get(key) for key in ("grades", "tools", "system")}
    if row.get("messages") is not None:
        return {"messages": row["messages"], **form}
    return {"prompt": row.get("prompt"), "completion": row.get("completion"), **form}


def preference(row: Columns) -> Form:
    """``chosen`` and ``rejected`` with a ``prompt``, or as whole conversations that begin alike; strings or
    messages."""
    return {key: row.get(key) for key in ("prompt", "chosen", "rejected", "margin", "votes", "tools", "system")}


def prompt(row: Columns) -> Form:
    """A ``prompt``: a string, or messages."""
    if row.get("prompt") is None:
        raise RowError("missing", "prompt")
    return {key: row.get(key) for key in ("prompt", "tools", "system")}


def alpaca(row: Columns) -> Form:
    """``instruction``, ``input`` and ``output``; LLaMA-Factory's ``history``, ``system``, ``chosen`` and ``rejected``
    too.

    The input follows the instruction after a blank line.
    """
    asked = text_of(row.get("instruction"), "instruction")
    if row.get("input") and not (isinstance(row["input"], str) and not row["input"].strip()):
        asked += "\n\n" + text_of(row["input"], "input")
    turns: list[Form] = []
    for i, pair in enumerate(list_of(row["history"], "history", "a list of pairs") if row.get("history") else []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError("expected a question and its answer", f"history.{i}")
        turns.append({"role": "user", "content": text_of(pair[0], f"history.{i}.0")})
        turns.append({"role": "assistant", "content": text_of(pair[1], f"history.{i}.1")})
    turns.append({"role": "user", "content": asked})
    if row.get("chosen") is not None or row.get("rejected") is not None:
        return {"prompt": turns, **{key: row.get(key) for key in ("chosen", "rejected", "margin", "system")}}
    if row.get("output") is None:
        return {"prompt": turns, "system": row.get("system")}
    return {
        "messages": [*turns, {"role": "assistant", "content": text_of(row["output"], "output")}],
        "system": row.get("system"),
    }


def sharegpt(row: Columns) -> Form:
    """``conversations`` of ``{"from": ..., "value": ...}`` turns; with ``chosen`` and ``rejected`` turns they are the
    prompt."""
    common = {key: row.get(key) for key in ("tools", "system")}
    turns = row.get("conversations")
    if row.get("chosen") is None and row.get("rejected") is None:
        return {"messages": turns, **common}
    return {
        "prompt": turns,
        "chosen": row.get("chosen"),
        "rejected": row.get("rejected"),
        "margin": row.get("margin"),
        **common,
    }


_TURN = re.compile(r"\n\n(Human|Assistant):")


def hh_rlhf(row: Columns) -> Form:
    r"""Transcripts, ``\n\nHuman: ... \n\nAssistant: ...``, in ``chosen`` and ``rejected``; the prompt is what they
    share.

    Known odd rows: a speaker who has two turns in a row said one thing in two paragraphs; the transcripts may part
    before the last answer.
    """
    return {key: _transcript(text_of(row.get(key), key), key) for key in ("chosen", "rejected")}


def _transcript(text: str, field: str) -> list[Form]:
    head, *parts = _TURN.split("\n\n" + text.lstrip())
    if head or not parts or parts[0] != "Human":
        raise RowError("expected a transcript that begins with 'Human:'", field)
    turns: list[Form] = []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] = f"{turns[-1]['content']}\n\n{said.strip()}".strip()
        else:
            turns.append({"role": role, "content": said.strip()})
    return turns


def ultrafeedback(row: Columns) -> Form:
    """The binarised form, which is a preference of whole conversations; or the raw one: the best completion against all
    worse ones.

    The raw form's ``fine-grained_score`` is used where all completions have it, since some of its ``overall_score`` are
    10 for 1 (https://github.com/OpenBMB/UltraFeedback/issues/8). Completions as good as the best are left out.
    """
    if row.get("completions") is None:
        return preference(row)
    completions = list_of(row["completions"], "completions", "a list of completions")
    if not all(isinstance(item, Mapping) for item in completions):
        raise RowError("expected objects with a response and a score", "completions")
    key = (
        "fine-grained_score"
        if all(item.get("fine-grained_score") is not None for item in completions)
        else "overall_score"
    )
    scored = []
    for i, item in enumerate(completions):
        score = item.get(key)
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
            raise RowError(
                "missing" if score is None else f"expected a finite number, found {type_name(score)}",
                f"completions.{i}.{key}",
            )
        scored.append((score, text_of(item.get("response"), f"completions.{i}.response")))
    best = max(score for score, _ in scored)
    worse = [response for score, response in scored if score < best]
    if not worse:
        raise RowError("all completions have the same score", "completions")
    chosen = next(response for score, response in scored if score == best)
    return {"prompt": text_of(row.get("instruction"), "instruction"), "chosen": chosen, "rejected": worse}
