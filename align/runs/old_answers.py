"""Reading answers of runs from before ``answers.jsonl``, and of unfinished ppo stages, which keep their answers as
Parquet until they finish."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from align.data.answer_file import TARGET, AnswerRow, row_of_rollout
from align.runs.record import StageRecord
from align.runs.values import jsonl, mapping, rows, text, texts

_ITERATION = re.compile(r"iteration-(\d+)\.parquet")


def old_answers(stage: StageRecord) -> Iterator[AnswerRow]:
    """The answers of such a stage: of evaluations, before and after training, and of rollouts."""
    for place, sample in enumerate(rows(stage.report, "samples")):
        asked: dict[str, Any] = {"part": "held-out", "prompt_id": str(place), "prompt": text(sample, "prompt")}
        for version, when in enumerate(("before", "after")):
            answer: dict[str, Any] = {"text": text(sample, when), "tokens": 0, "finished": True, "version": version}
            yield AnswerRow(**asked, policy=stage.name, sample=0, **answer)
    for path in sorted((stage.place / "rollouts").glob("iteration-*.parquet")):
        if match := _ITERATION.fullmatch(path.name):
            yield from _rollouts(path, stage.name, int(match[1]))
    if stage.kind == "evaluate":
        for row in jsonl(stage.place / "data.jsonl"):
            yield from _evaluated(row)


def _rollouts(path: Path, policy: str, iteration: int) -> Iterator[AnswerRow]:
    """The answers in a rollouts file. Older files do not have the number of steps, for which the number of the
    iteration is used."""
    import pyarrow.parquet as pq

    for row in pq.read_table(path).to_pylist():
        yield row_of_rollout("rollouts", policy, {"step": iteration, **row})


def _evaluated(row: Mapping[str, Any]) -> Iterator[AnswerRow]:
    found = row.get("prompt")
    prompt = tuple(rows(row, "prompt")) if isinstance(found, list) else str(found)
    asked: dict[str, Any] = {"part": "data", "prompt_id": text(row, "id"), "prompt": prompt}
    if target := text(row, "target"):
        yield AnswerRow(**asked, policy=TARGET, sample=0, text=target, tokens=0, finished=True)
    for policy, own in mapping(row, "policies").items():
        for number, said in enumerate(texts(own, "samples")):
            yield AnswerRow(**asked, policy=policy, sample=number, text=said, tokens=0, finished=True)
