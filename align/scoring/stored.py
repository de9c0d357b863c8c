"""Scoring many answers, saving the scores shard by shard. After an interruption at any point the same call resumes and
ends with the same scores."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from align.errors import InputError, Interrupted, Problem
from align.files import digest_json
from align.rollout.progress import CountBar
from align.scoring.scorer import Answer, Scorer, require_scores
from align.sealed import PartStore
from align.signals import stop_requested
from align.training.launch import Ranks

SHARD_ANSWERS = 256
"""Number of answers in a shard; at most these are scored again after an interruption."""


def score_answers(
    open_scorer: Callable[[], Scorer],
    answers: Sequence[Answer],
    *,
    folder: Path,
    key: Mapping[str, Any],
    console: Console,
    name: str,
    group: Ranks | None = None,
    shard_answers: int = SHARD_ANSWERS,
) -> list[float]:
    """A score for each answer, in order; shards that are already saved in ``folder`` are not scored again.

    Args:
        open_scorer: called once, and only when a shard is to be scored.
        folder: a folder used by this call only.
        key: JSON values; everything but ``answers`` that the scores depend on.
        name: for the progress line and for messages.
        group: processes that share the work; all get all scores. None: only this process.

    Raises:
        InputError: the scorer fails, or does not give one finite number for each answer.
        Interrupted: a signal asked to stop; the shards scored so far are kept, and the same call resumes.
        EnvironmentFault: the disk is full or cannot be written.
    """
    group = group or Ranks()
    everything = {**key, "answers": digest_json([asdict(answer) for answer in answers]), "shard_answers": shard_answers}
    kept = PartStore(folder, "scores", "json", everything)
    shards = [answers[start : start + shard_answers] for start in range(0, len(answers), shard_answers)]
    mine = range(group.rank, len(shards), group.world)
    scorer: Scorer | None = None
    with CountBar(console, name, "answers", sum(len(shards[number]) for number in mine)) as bar:
        for number in mine:
            shard = shards[number]
            if kept.find(number) is not None:
                bar.found(len(shard))
                continue
            if (signum := stop_requested()) is not None:
                raise Interrupted(
                    signum,
                    f"{name}: stopped after {number} of {len(shards)} shards of scores; the same command continues",
                )
            scorer = scorer or open_scorer()
            kept.keep(number, json.dumps(require_scores(scorer.name, scorer.score(shard), len(shard))).encode())
            bar.advance(len(shard))
    group.barrier()
    return [score for number, shard in enumerate(shards) for score in _read(kept, number, len(shard))]


def _read(kept: PartStore, number: int, count: int) -> list[float]:
    path = kept.find(number)
    if path is None:
        raise InputError(
            Problem("is missing or damaged", file=str(kept.path(number)), hint="run the same command again")
        )
    return require_scores(f"that made {path}", json.loads(path.read_bytes()), count)
