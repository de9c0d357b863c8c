"""Sampling from the current policy, scoring the samples, and writing them to files for people to read."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from align import sealed
from align.data.chat.encoder import Encoder
from align.data.trees.prompts import EncodedPrompt
from align.errors import TrainingFault
from align.models.placement import gathered
from align.models.scalar.critic import ActorCritic
from align.rollout.dispatch import CallPieces
from align.rollout.engine import RolloutEngine, Sample, Sampling, sample_seed
from align.rollout.sync import push
from align.rollout.trajectory import Trajectory
from align.scoring.scorer import Answer, Scorer, require_scores
from align.stages.shared.clock import Clock
from align.training.launch import Ranks


@dataclass(frozen=True)
class ScoredAnswer:
    """An answer of the policy in training, and its score."""

    answer: Answer
    """What scorers and people read of it."""
    trajectory: Trajectory
    """What the policy is trained on: the token ids that ``answer`` was made from."""
    score: float
    """The scorer's score, without penalties."""


class Rollouts:
    """Samples of the policy in training, with scores. Each of several processes samples for its share of the prompts,
    and all get all samples.

    Args:
        precision: type of the engine's weights, which are checked to be the policy's; None for an engine without
            weights.
        canaries: prompts for that check.
        samples_live: the engine computes with the model in training itself, which is then gathered for the while.
    """

    def __init__(
        self,
        models: ActorCritic,
        encoder: Encoder,
        engine: RolloutEngine,
        scorer: Scorer,
        *,
        precision: Literal["fp32", "bf16"] | None,
        canaries: Sequence[Sequence[int]],
        seed: int,
        ranks: Ranks,
        clock: Clock,
        samples_live: bool = False,
    ) -> None:
        self.models, self.encoder, self.engine, self.scorer = models, encoder, engine, scorer
        self._precision, self._canaries, self._seed = precision, canaries, seed
        self._ranks, self._clock = ranks, clock
        self._version, self._at = 0, -1
        self._samples_live = samples_live

    def _sampling(self) -> AbstractContextManager[None]:
        """Inside, this process's engine samples by itself, whatever the others do."""
        return gathered(self.models) if self._samples_live else nullcontext()

    def sync(self, step: int) -> None:
        """Send the weights after optimiser step ``step`` to the engine. Raises TrainingFault when the engine then does
        not compute the policy's log-probs."""
        self.models.use("policy")
        if self._precision is None or step == self._at:
            return
        self._version += 1
        with self._clock("sync"), self._sampling():
            push(
                self.engine,
                self.models.policy,
                version=self._version,
                canaries=self._canaries,
                dtype=self._precision,
                together=self._ranks if self._ranks.world > 1 else None,
            )
        self._at = step

    def sample(self, prompts: Sequence[EncodedPrompt], sampling: Sampling, *place: int) -> list[list[ScoredAnswer]]:
        """``sampling.n`` scored answers to every prompt, ``[prompt][sample]``.

        Args:
            place: numbers that identify this call in the run, such as the iteration. The random numbers follow from
                them; they replace ``sampling.seed``.

        Raises:
            TrainingFault: an answer is empty.
            InputError: a score is not a finite number.
        """
        ranks = self._ranks
        settings = Sampling(sampling.max_new_tokens, sampling.n, sampling.temperature)
        with self._clock("generate"), self._sampling():
            samples = self._sampled([prompt.ids for prompt in prompts], settings, place)
        with self._clock("score"):
            scored = self._scored(prompts[ranks.rank :: ranks.world], samples[ranks.rank :: ranks.world])
        parts = ranks.gather(scored)
        return [parts[i % ranks.world][i // ranks.world] for i in range(len(prompts))]

    def _sampled(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, place: Sequence[int]
    ) -> list[list[Sample]]:
        """Samples of all prompts; each process samples its share of the pieces."""
        pieces = CallPieces.of_samples(len(prompts), each=sampling.n, together=self.engine.together)
        made = {}
        for number in pieces.share(self._ranks.rank, self._ranks.world):
            piece, seed = pieces[number], sample_seed(self._seed, *place, number)
            made[number] = self.engine.generate(prompts[piece.start : piece.stop], replace(sampling, seed=seed))
        everything = {number: found for part in self._ranks.gather(made) for number, found in part.items()}
        return [samples for number in range(len(pieces)) for samples in everything[number]]

    def _scored(
        self, prompts: Sequence[EncodedPrompt], samples: Sequence[Sequence[Sample]]
    ) -> list[list[ScoredAnswer]]:
        answers = [
            [Answer.sampled(prompt, sample.ids, self.encoder) for sample in of_prompt]
            for prompt, of_prompt in zip(prompts, samples, strict=True)
        ]
        flat = [answer for of_prompt in answers for answer in of_prompt]
        if not all(answer.ids for answer in flat):
            raise TrainingFault("the engine gave an empty answer")
        scores = iter(require_scores(self.scorer.name, self.scorer.score(flat), len(flat)))
        return [
            [
                ScoredAnswer(answer, _single_turn(answer, sample), next(scores))
                for answer, sample in zip(of_prompt, sampled, strict=True)
            ]
            for of_prompt, sampled in zip(answers, samples, strict=True)
        ]


def _single_turn(answer: Answer, sample: Sample) -> Trajectory:
    """The trajectory of a sample, which is cut where the answer ends."""
    said = Sample(
        answer.ids,
        sample.logprobs and sample.logprobs[: len(answer.ids)],
        "stop" if answer.finished else "length",
        sample.version,
    )
    return Trajectory.single_turn(answer.prompt_ids, said)


# Files


def parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows as a Parquet file."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), buffer)
    return buffer.getvalue()


def read_parquet(path: Path) -> list[dict[str, Any]]:
    """The rows that :func:`parquet` wrote."""
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


def rows_of(
    encoder: Encoder,
    prompts: Sequence[EncodedPrompt],
    samples: Sequence[Sequence[ScoredAnswer]],
    common: Mapping[str, int] = MappingProxyType({}),
) -> list[dict[str, Any]]:
    """One row for each answer: what all have in common, the prompt, the answer and its score."""
    return [
        {
            **common,
            "prompt_id": prompt.record.id,
            "sample": number,
            "prompt": encoder.decode(prompt.ids),
            "answer": sample.answer.text,
            "finished": sample.trajectory.finished,
            "length": sum(sample.trajectory.mask),
            "score": sample.score,
        }
        for prompt, of_prompt in zip(prompts, samples, strict=True)
        for number, sample in enumerate(of_prompt)
    ]


def reference_baselines(
    rollouts: Rollouts,
    prompts: Sequence[EncodedPrompt],
    sampling: Sampling,
    *,
    penalty: float,
    key: str,
    cache: Path,
    ranks: Ranks,
) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """The mean score of the starting policy's answers to each prompt, fp32 [number of prompts]; and those answers as
    rows.

    They are sampled once and kept under ``key``. The policy must not have been trained yet.

    Args:
        penalty: subtracted from the score of an unfinished answer.
        key: identifies everything else that the answers and scores depend on.
    """
    path = cache / f"{key}.parquet"
    if not ranks.broadcast_object(ranks.first and sealed.find(path, key) is not None):
        rollouts.sync(0)
        samples = rollouts.sample(prompts, sampling, -1)
        if ranks.first:
            sealed.keep(path, parquet(rows_of(rollouts.encoder, prompts, samples)), key)
        ranks.barrier()
    rows = read_parquet(path)
    rewards = torch.tensor([row["score"] - penalty * (not row["finished"]) for row in rows], dtype=torch.float64)
    return rewards.view(len(prompts), sampling.n).mean(1).float(), rows
