"""What a stage's model was asked and what it answered, read back from the files that the stage left. Imports no
torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from align.errors import InputError
from align.runs.record import StageRecord
from align.runs.values import jsonl

Parts = list[tuple[str, str]]
"""A sample: texts of models and data, each under what it is."""

_ITERATION = re.compile(r"iteration-(\d+)\.parquet")


def samples(stage: StageRecord, limit: int, iteration: int | None = None) -> Iterator[Parts]:
    """Up to ``limit`` samples.

    Args:
        iteration: of a stage with rollouts, counted from 1: what was sampled in it. The last one when absent.

    Raises:
        InputError: there is no such iteration.
    """
    if rollouts(stage):
        yield from islice(_rollout_rows(stage, iteration), limit)
        return
    if iteration is not None:
        raise InputError(f"--iteration: stage {stage.name} ({stage.kind}) has no rollouts")
    found = stage.report.get("samples")
    if isinstance(found, list) and found:
        rows = (row for row in found if isinstance(row, Mapping))
        yield from (
            [(part, _text(row.get(part))) for part in ("prompt", "before", "after")] for row in islice(rows, limit)
        )
        return
    yield from map(_row, jsonl(stage.place / "data.jsonl", limit))


def rollouts(stage: StageRecord) -> dict[int, Path]:
    """The files of a stage's iterations, by number from 1."""
    files = (stage.place / "rollouts").glob("iteration-*.parquet")
    return {int(match[1]) + 1: path for path in sorted(files) if (match := _ITERATION.fullmatch(path.name))}


def iterations(stage: StageRecord) -> Iterator[dict[str, float]]:
    """Each iteration of a stage with rollouts in numbers: means over its answers."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    wanted = ("score", "baseline", "kl", "length", "finished")
    for number, path in rollouts(stage).items():
        table = pq.read_table(path)
        means = {
            name: float(pc.mean(table[name].cast("float64")).as_py()) for name in wanted if name in table.column_names
        }
        yield {"iteration": number, "answers": table.num_rows, **means}


def _rollout_rows(stage: StageRecord, iteration: int | None) -> Iterator[Parts]:
    import pyarrow.parquet as pq

    files = rollouts(stage)
    number = max(files) if iteration is None else iteration
    if number not in files:
        raise InputError(f"--iteration {number}: stage {stage.name} has the iterations {min(files)} to {max(files)}")
    for row in pq.read_table(files[number]).to_pylist():
        numbers = [
            f"{name} {row[name]:.4g}" for name in ("score", "baseline", "kl") if isinstance(row.get(name), float)
        ]
        numbers += [f"{row.get('length')} tokens", *([] if row.get("finished", True) else ["cut off"])]
        prompt, answer = f"iteration {number}, prompt {row.get('prompt_id')}", f"answer, {', '.join(numbers)}"
        yield [(prompt, _text(row.get("prompt"))), (answer, _text(row.get("answer")))]


def _row(row: Mapping[str, Any]) -> Parts:
    """A row that a stage wrote for the next one, or for people: a prompt with answers, preferences, or policies'
    samples."""
    parts: Parts = [("prompt", _text(row.get("prompt")))]
    parts += [(name, _text(row[name])) for name in ("target", "chosen") if name in row]
    rejected = row.get("rejected")
    for place, answer in enumerate(rejected if isinstance(rejected, list) else ()):
        parts.append((f"rejected {place + 1}", _text(answer)))
    policies = row.get("policies")
    for policy, found in policies.items() if isinstance(policies, Mapping) else ():
        said = found.get("samples") if isinstance(found, Mapping) else None
        parts.append((policy, _text(said[0] if isinstance(said, list) and said else said)))
    parts += [(name, shown) for name in ("reward_mean", "reward_std", "margin") if (shown := _numbers(row.get(name)))]
    return parts


def _numbers(value: Any) -> str:
    """A number, or several; nothing for anything else."""
    values = value if isinstance(value, list) else [value]
    return (
        ", ".join(f"{one:.4g}" for one in values)
        if values and all(isinstance(one, (int, float)) for one in values)
        else ""
    )


def _text(value: Any) -> str:
    """A text as it is; messages with their roles; anything else as JSON."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, list) and all(
        isinstance(item, Mapping) and isinstance(item.get("content"), str) for item in value
    ):
        said = [(str(item.get("role")), item["content"].strip()) for item in value]
        return said[0][1] if len(said) == 1 else "\n".join(f"{role}: {text}" for role, text in said)
    return json.dumps(value, ensure_ascii=False)
