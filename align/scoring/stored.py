"""Scores of many answers, kept shard by shard: killed anywhere, the same call goes on where it stopped and ends with the same scores."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from align.data.kept import Kept
from align.errors import Interrupted
from align.files import digest_json
from align.rollout.progress import Bar
from align.scoring.scorer import Answer, Scorer, require_scores
from align.signals import stop_requested

SHARD_ANSWERS = 256
"""Answers of a shard: what a kill loses at most."""


def score_answers(
    open_scorer: Callable[[], Scorer],
    answers: Sequence[Answer],
    *,
    folder: Path,
    key: Mapping[str, Any],
    console: Console,
    name: str,
    shard_answers: int = SHARD_ANSWERS,
) -> list[float]:
    """A score for each answer, in order; shards that are in ``folder`` already are not scored again.

    Args:
        open_scorer: called once, and only when a shard is to be scored.
        folder: for this piece of work alone.
        key: JSON values; all that the scores follow from besides ``answers``.
        name: for the progress line and for messages.

    Raises:
        InputError: the scorer fails, or does not give one finite number for each answer.
        Interrupted: a signal asked to stop; the shards scored so far are kept and the same call goes on.
        EnvironmentFault: the disk is full or cannot be written.
    """
    everything = {**key, "answers": digest_json([asdict(answer) for answer in answers]), "shard_answers": shard_answers}
    kept = Kept(folder, "scores", "json", everything)
    scorer: Scorer | None = None
    scores: list[float] = []
    with Bar(console, name, "answers", len(answers)) as bar:
        for number, start in enumerate(range(0, len(answers), shard_answers)):
            shard = answers[start : start + shard_answers]
            path = kept.find(number)
            if path is not None:
                bar.found(len(shard))
            else:
                if (signum := stop_requested()) is not None:
                    raise Interrupted(signum, f"{name}: stopped after {start} of {len(answers)} answers; the same command continues")
                scorer = scorer or open_scorer()
                path = kept.keep(number, json.dumps(require_scores(scorer.name, scorer.score(shard), len(shard))).encode())
                bar.advance(len(shard))
            scores += json.loads(path.read_bytes())
    return scores
