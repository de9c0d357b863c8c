"""Reading the prompts and answers of a stage from its files. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import groupby, islice
from typing import Any

from align.data.answer_file import ANSWERS, TARGET, AnswerRow, by_prompt, pairs_of, read_answers, said
from align.errors import InputError
from align.runs.old_answers import old_answers
from align.runs.record import StageRecord
from align.runs.values import jsonl

Parts = list[tuple[str, str]]
"""A sample to show: (name, text) pairs, with texts of models and data."""

_MEANS = ("score", "baseline", "kl")


def answers_of(stage: StageRecord) -> Iterator[AnswerRow]:
    """All answers of a stage, also of runs by earlier versions."""
    if (stage.place / ANSWERS).is_file():
        yield from read_answers(stage.place)
    else:
        yield from old_answers(stage)


def before_and_after(stage: StageRecord) -> Iterator[tuple[AnswerRow, AnswerRow]]:
    """See :func:`pairs_of`."""
    return pairs_of(answers_of(stage))


def samples(stage: StageRecord, limit: int, iteration: int | None = None) -> Iterator[Parts]:
    """Up to ``limit`` samples.

    Args:
        iteration: for a stage with rollouts, the iteration to show, from 1; the last one when None.

    Raises:
        InputError: there is no such iteration.
    """
    last = max((number for number, _ in _rollouts(stage)), default=0)
    if last:
        yield from islice(_rollout_rows(stage, last, iteration), limit)
        return
    if iteration is not None:
        raise InputError(f"--iteration: stage {stage.name} ({stage.kind}) has no rollouts")
    if pairs := list(islice(before_and_after(stage), limit)):
        yield from (
            [("prompt", _text(before.prompt)), ("before", said(before)), ("after", said(after))]
            for before, after in pairs
        )
    elif stage.kind == "evaluate":
        yield from islice(_evaluated(stage), limit)
    else:
        yield from map(_row, jsonl(stage.place / "data.jsonl", limit))


def iterations(stage: StageRecord) -> Iterator[dict[str, float]]:
    """For each iteration of a stage with rollouts, means over its answers."""
    for number, numbered in groupby(_rollouts(stage), key=lambda pair: pair[0]):
        rows = [row for _, row in numbered]
        means = {
            name: sum(row.scores[name] for row in rows) / len(rows)
            for name in _MEANS
            if all(name in row.scores for row in rows)
        }
        length, finished = sum(row.tokens for row in rows), sum(row.finished for row in rows)
        yield {
            "iteration": number,
            "answers": len(rows),
            **means,
            "length": length / len(rows),
            "finished": finished / len(rows),
        }


def _rollouts(stage: StageRecord) -> Iterator[tuple[int, AnswerRow]]:
    """(iteration from 1, answer) of a stage's rollouts. A new iteration begins where the version of the weights
    changes."""
    rows = (row for row in answers_of(stage) if row.part == "rollouts")
    for number, (_, sampled) in enumerate(groupby(rows, key=lambda row: row.version), 1):
        yield from ((number, row) for row in sampled)


def _rollout_rows(stage: StageRecord, last: int, iteration: int | None) -> Iterator[Parts]:
    wanted = last if iteration is None else iteration
    if wanted > last:
        raise InputError(f"--iteration {wanted}: stage {stage.name} has the iterations 1 to {last}")
    for number, row in _rollouts(stage):
        if number == wanted:
            numbers = [f"{name} {row.scores[name]:.4g}" for name in _MEANS if name in row.scores]
            numbers += [f"{row.tokens} tokens", *([] if row.finished else ["cut off"])]
            prompt, answer = f"iteration {number}, prompt {row.prompt_id}", f"answer, {', '.join(numbers)}"
            yield [(prompt, _text(row.prompt)), (answer, _text(row.text))]


def _evaluated(stage: StageRecord) -> Iterator[Parts]:
    """Each held-out prompt with the data's answer and the first answer of every policy."""
    rows = (row for row in answers_of(stage) if row.part == "data" and row.sample == 0)
    for answers in by_prompt(rows):
        yield [("prompt", _text(answers[0].prompt)), *((row.policy, _text(row.text)) for row in answers)]


def _row(row: Mapping[str, Any]) -> Parts:
    """The parts of a row in a stage's data: a prompt, with or without chosen and rejected answers."""
    parts: Parts = [("prompt", _text(row.get("prompt")))]
    parts += [(name, _text(row[name])) for name in (TARGET, "chosen") if name in row]
    rejected = row.get("rejected")
    for place, answer in enumerate(rejected if isinstance(rejected, list) else ()):
        parts.append((f"rejected {place + 1}", _text(answer)))
    parts += [(name, shown) for name in ("reward_mean", "reward_std", "margin") if (shown := _numbers(row.get(name)))]
    return parts


def _numbers(value: Any) -> str:
    """One or several numbers as text; empty for other values."""
    values = value if isinstance(value, list) else [value]
    return (
        ", ".join(f"{one:.4g}" for one in values)
        if values and all(isinstance(one, (int, float)) for one in values)
        else ""
    )


def _text(value: Any) -> str:
    """A value as text: a text unchanged, messages with their roles, anything else as JSON."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, (list, tuple)) and all(
        isinstance(item, Mapping) and isinstance(item.get("content"), str) for item in value
    ):
        said = [(str(item.get("role")), item["content"].strip()) for item in value]
        return said[0][1] if len(said) == 1 else "\n".join(f"{role}: {text}" for role, text in said)
    return json.dumps(value, ensure_ascii=False)
