"""``answers.jsonl``: the prompts that a stage gave to policies and their answers, one line for each answer.

Every stage that samples writes this file with :func:`write_answers`; code that shows answers reads it with
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
"""In place of a policy's name: the answer is the data's own."""


@dataclass(frozen=True)
class AnswerRow:
    """One answer."""

    part: str
    """The group of a stage's prompts that it belongs to: ``prompts`` (of a stage that makes data), ``data`` or the name
    of a benchmark or probe (evaluate), ``held-out``, and for ppo ``reference`` (the starting policy) and
    ``rollouts``."""
    prompt_id: str
    prompt: tuple[Message, ...] | str
    """The messages of the prompt; a text if only the rendered prompt is known."""
    policy: str
    """The policy's name in the recipe; the stage's name for the policy that it trains."""
    sample: int
    """Number of the answer among this policy's answers to the prompt, from 0."""
    text: str
    """The text of the answer, as scorers get it."""
    tokens: int
    """Number of tokens, end token included; 0 if unknown."""
    finished: bool
    """Did it end by itself?"""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Scores by the names of the scorers."""
    left_out: str | None = None
    """Why the stage did not use the answer; None if it did, or if this kind of stage uses all."""
    version: int = 0
    """Number of the stage's optimiser steps before the answer was sampled."""


def write_answers(folder: Path, rows: Iterable[AnswerRow]) -> None:
    """Write all answers of a stage into its result, in the order in which they come."""
    with files.atomic_lines(folder / ANSWERS) as write:
        for row in rows:
            write({key: value for key, value in asdict(row).items() if key != "left_out" or value is not None})


def read_answers(folder: Path) -> Iterator[AnswerRow]:
    """The answers of a stage's result. Damaged lines are skipped, so that a report shows the others."""
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
    """The row of a parsed line. Raises ValueError, TypeError or KeyError when it is damaged."""
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
    """Groups of successive rows that answer the same prompt.

    Two rows of data may have the same id and prompt. A second answer of a policy with the same number therefore begins
    the next group.
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
    """(answer before training, answer after it) to each prompt. They are the first rows of the file."""
    first: dict[str, AnswerRow] = {}
    for row in rows:
        if row.part != "held-out":
            break
        if (before := first.setdefault(row.prompt_id, row)) is not row:
            yield before, row


def said(row: AnswerRow) -> str:
    """An answer as text to print, with its score if it has one."""
    text = row.text.strip()
    return f"{text}\n[score {row.scores['score']:.3f}]" if "score" in row.scores else text


def row_of_rollout(part: str, policy: str, row: Mapping[str, Any]) -> AnswerRow:
    """The row of an answer that ppo kept as Parquet while it trained."""
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
    """The scores that are finite numbers."""
    return {str(name): float(score) for name, score in scores.items() if math.isfinite(float(score))}
