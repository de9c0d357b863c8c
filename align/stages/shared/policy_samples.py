"""Sampling answers of a policy to prompts, and turning them into messages of a data file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from align import files
from align.data.answer_file import AnswerRow
from align.data.chat.encoder import Encoder
from align.data.records import Message, Messages
from align.data.trees.prompts import EncodedPrompt
from align.errors import InputError
from align.models.files.identity import model_digest
from align.recipe.checks.stage_references import find
from align.recipe.schema import Model, Rollout
from align.rollout.engine import Sampling
from align.rollout.engines import open_engine
from align.rollout.samples import prompts_digest, sample_shards
from align.scoring.scorer import Answer
from align.stages.context import StageContext
from align.training.launch import Ranks


class AsSampled:
    """Turns answers into messages of a data file such that training sees the ids that were sampled.

    Usually the text of an answer is encoded as exactly these ids, and is enough. When it is not, the message contains
    the ids too: a policy may split a word in other pieces than the tokenizer, a template may trim the text, and
    decoding drops special tokens.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self.answers = self.with_ids = 0

    def message(self, answer: Answer, tools: Sequence[dict[str, Any]]) -> Message:
        """An assistant's message. If the answer was cut off the message says so, so that training adds no end token to
        it."""
        plain: Message = {"role": "assistant", "content": answer.text}
        if not answer.finished:
            plain["finished"] = False
        self.answers += 1
        if self._encoded(answer.prompt, tools, plain) == list(answer.ids):
            return plain
        self.with_ids += 1
        return {**plain, "sampled": {"encoder": self._encoder.digest, "ids": list(answer.ids)}}

    def _encoded(self, prompt: Messages, tools: Sequence[dict[str, Any]], message: Message) -> list[int] | None:
        try:
            _, (branch,) = self._encoder.encode_answers(prompt, [[message]], tools)
        except InputError:
            return None  # the template would not write this text as an answer
        ids: list[int] = branch.ids[branch.mask].tolist()
        return ids

    def line(self, name: str) -> str | None:
        """A line for the user about messages that contain ids; None when there are none."""
        if not self.with_ids:
            return None
        kept = f"{self.with_ids:,} of {self.answers:,} sampled answers are kept with their tokens"
        return f"{name}  {kept}: their text alone would be encoded as other ones"


def sample_policy(
    rollout: Rollout,
    policy: Model,
    encoder: Encoder,
    prompts: Sequence[EncodedPrompt],
    sampling: Sampling,
    ctx: StageContext,
    group: Ranks,
    *,
    max_length: int,
    name: str,
    targets: Sequence[str] | None = None,
) -> list[list[Answer]]:
    """Answers of ``policy`` to every prompt, ``[prompt][sample]``.

    The samples are kept in the runs' cache, so that a stage that only chooses differently among them does not sample
    again. The processes of ``group`` share the sampling, and all get all answers. ``targets`` are the data's answers to
    the prompts, if there are any.

    Raises as :func:`align.rollout.samples.sample_shards` and :func:`align.rollout.engines.open_engine`.
    """
    key = {
        "policy": model_digest(policy.path, policy.revision),
        "encoder": encoder.digest,
        "max_length": max_length,
        **rollout.identity(),
        **{referred.key: files.digest_path(Path(ctx.resolve(referred.text))) for referred in find(rollout)},
    }
    ids = [prompt.ids for prompt in prompts]
    everything = files.digest_json({**key, "sampling": asdict(sampling), "prompts": prompts_digest(ids)})
    samples = sample_shards(
        open_engine(rollout, policy, encoder, max_length=max_length, cache=ctx.cache, resolve=ctx.resolve),
        ids,
        sampling,
        folder=ctx.cache / "samples" / everything[:40],
        key=key,
        console=ctx.console,
        name=name,
        rank=group.rank,
        world=group.world,
    )
    group.barrier()
    wanted = [None] * len(prompts) if targets is None else targets
    return [
        [Answer.sampled(prompt, sample.ids, encoder, target=target) for sample in of_prompt]
        for prompt, of_prompt, target in zip(prompts, samples, wanted, strict=True)
    ]


def answer_row(
    part: str,
    prompt_id: str,
    policy: str,
    number: int,
    answer: Answer,
    scores: Mapping[str, float],
    *,
    left_out: str | None = None,
    version: int = 0,
) -> AnswerRow:
    """An answer as a row of ``answers.jsonl``; ``number`` counts the answers to its prompt."""
    return AnswerRow(
        part=part,
        prompt_id=prompt_id,
        prompt=answer.prompt,
        policy=policy,
        sample=number,
        text=answer.text,
        tokens=len(answer.ids),
        finished=answer.finished,
        scores=scores,
        left_out=left_out,
        version=version,
    )
