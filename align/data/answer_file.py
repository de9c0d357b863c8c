"""``answers.jsonl``: what a stage asked policies and what they answered, one line an answer.

Every stage that samples leaves it, in this one form, through :func:`write_answers`; all who show answers read it with
:func:`read_answers`. Imports no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from align import files
from align.data.records import Message

ANSWERS = "answers.jsonl"
TARGET = "target"
"""Stands in place of a policy's name where the answer is the data's own."""


@dataclass(frozen=True)
class AnswerRow:
    """One answer."""

    part: str
    """Which of a stage's prompts it answers: ``prompts`` (of a stage that makes data), ``data`` or the name of a
    benchmark or probe (evaluate), ``held-out``, and for ppo ``reference`` (the starting policy) and ``rollouts``."""
    prompt_id: str
    prompt: tuple[Message, ...] | str
    """Its messages; a text where only the prompt as the model reads it is known."""
    policy: str
    """As the recipe names it; the stage's own name for a policy in training."""
    sample: int
    """Number of the answer among those to this prompt, from 0."""
    text: str
    """As scorers read it."""
    tokens: int
    """The one that ended it included; 0 where it is not known."""
    finished: bool
    """Did it end by itself?"""
    scores: Mapping[str, float] = field(default_factory=dict)
    """By name."""
    left_out: str | None = None
    """Why the stage made nothing of it; None where it did, or leaves nothing out."""
    version: int = 0
    """Optimiser steps of the stage before it was sampled."""


def write_answers(folder: Path, rows: Iterable[AnswerRow]) -> None:
    """Write all answers of a stage into its result, in the order in which they come."""
    with files.atomic_lines(folder / ANSWERS) as write:
        for row in rows:
            write({key: value for key, value in asdict(row).items() if key != "left_out" or value is not None})


def read_answers(folder: Path) -> Iterator[AnswerRow]:
    """The answers of a stage's result. Lines that are damaged are left out: a report shows what there is."""
    path = folder / ANSWERS
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace", newline="\n") as lines:
        for line in lines:
            try:
                row = _row(json.loads(line))
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
                continue
            yield row


def _row(value: Mapping[str, Any]) -> AnswerRow:
    """Raises ValueError, TypeError or KeyError when it is none."""
    prompt = value["prompt"]
    if not isinstance(prompt, str) and not all(isinstance(message, dict) for message in prompt):
        raise TypeError("a prompt is a text, or messages")
    return AnswerRow(
        part=str(value["part"]),
        prompt_id=str(value["prompt_id"]),
        prompt=prompt if isinstance(prompt, str) else tuple(prompt),
        policy=str(value["policy"]),
        sample=int(value["sample"]),
        text=str(value["text"]),
        tokens=int(value["tokens"]),
        finished=bool(value["finished"]),
        scores=_numbers(value["scores"]),
        left_out=value.get("left_out"),
        version=int(value["version"]),
    )


def by_prompt(rows: Iterable[AnswerRow]) -> Iterator[list[AnswerRow]]:
    """The answers to each prompt, which stand together.

    Two rows of data may have one id and one prompt: where the same number of a policy's answers comes again, the next
    prompt begins.
    """
    group: list[AnswerRow] = []
    seen: set[tuple[str, int]] = set()
    for row in rows:
        same = group and (row.prompt_id, row.prompt) == (group[0].prompt_id, group[0].prompt)
        if group and (not same or (row.policy, row.sample) in seen):
            yield group
            group, seen = [], set()
        group.append(row)
        seen.add((row.policy, row.sample))
    if group:
        yield group


def pairs_of(rows: Iterable[AnswerRow]) -> Iterator[tuple[AnswerRow, AnswerRow]]:
    """Greedy answers to the same prompts before the training of a stage and after it, which come first in its file."""
    first: dict[str, AnswerRow] = {}
    for row in rows:
        if row.part != "held-out":
            break
        if (before := first.setdefault(row.prompt_id, row)) is not row:
            yield before, row


def said(row: AnswerRow) -> str:
    """An answer for people, with its score where it has one."""
    text = row.text.strip()
    return f"{text}\n[score {row.scores['score']:.3f}]" if "score" in row.scores else text


def row_of_rollout(part: str, policy: str, row: Mapping[str, Any]) -> AnswerRow:
    """An answer as ppo keeps it in Parquet until the stage has finished."""
    return AnswerRow(
        part=part,
        prompt_id=str(row.get("prompt_id")),
        prompt=str(row.get("prompt")),
        policy=policy,
        sample=int(row.get("sample", 0)),
        text=str(row.get("answer")),
        tokens=int(row.get("length", 0)),
        finished=bool(row.get("finished", True)),
        scores=_numbers({name: row[name] for name in ("score", "baseline", "kl") if row.get(name) is not None}),
        version=int(row.get("step", 0)),
    )


def _numbers(scores: Mapping[str, Any]) -> dict[str, float]:
    """The finite ones."""
    return {str(name): float(score) for name, score in scores.items() if math.isfinite(float(score))}
