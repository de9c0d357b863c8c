"""A policy's answers to prompts, as stages that read them as text need them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from align import files
from align.data.chat.encoder import Encoder
from align.data.records import Message, Messages
from align.data.tree import Ids
from align.errors import InputError
from align.models.files.identity import model_digest
from align.recipe.schema import Model, Rollout
from align.rollout.engine import Completion, Sampling
from align.rollout.engines import open_engine
from align.rollout.samples import Samples, prompts_digest, sample_shards
from align.scoring.scorer import Answer
from align.stages.context import StageContext
from align.training.launch import Ranks


@dataclass(frozen=True)
class Sample:
    """One answer of a policy."""

    id: str
    """Its prompt's id and its number: ``conv-7#3``."""
    text: str
    """As :meth:`Encoder.answer_text` has it."""
    ids: Ids
    """As sampled, the stop id included."""
    finished: bool

    @classmethod
    def of(cls, id: str, completion: Completion, encoder: Encoder) -> Sample:
        """From what an engine gave."""
        return cls._of(id, completion.ids, completion.finished, encoder)

    @classmethod
    def of_ids(cls, ids: Sequence[int], encoder: Encoder) -> Sample:
        """From ids that end with the stop id, if there was one."""
        return cls._of("", ids, bool(ids) and ids[-1] in encoder.stop_ids, encoder)

    @classmethod
    def _of(cls, id: str, ids: Sequence[int], finished: bool, encoder: Encoder) -> Sample:
        return cls(id, encoder.answer_text(ids, finished=finished), np.array(ids, dtype=np.int32), finished)

    def answer(
        self, prompt: Messages, prompt_ids: Sequence[int], fields: Mapping[str, Any], target: str | None = None
    ) -> Answer:
        """As it is scored: in every stage the same ids give the same text. The row's column ``target`` counts where no
        target is given."""
        if target is None and isinstance(fields.get("target"), str):
            target = fields["target"]
        return Answer(prompt, self.text, tuple(prompt_ids), tuple(self.ids.tolist()), self.finished, target, fields)


class AsSampled:
    """Answers as messages of a data file, so that training sees the ids that were sampled.

    Most often the text of an answer is encoded as just these ids, and is enough. Where it is not, the message carries
    the ids too: a policy may write a word in other pieces than the tokenizer, a template may trim the text, and
    decoding leaves special tokens out.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self.answers = self.with_ids = 0

    def message(
        self, prompt: Messages, tools: Sequence[dict[str, Any]], text: str, ids: Sequence[int], *, finished: bool
    ) -> Message:
        """An assistant's message; one that was cut says so, so that training adds no end to it."""
        plain: Message = {"role": "assistant", "content": text}
        if not finished:
            plain["finished"] = False
        self.answers += 1
        if self._encoded(prompt, tools, plain) == list(ids):
            return plain
        self.with_ids += 1
        return {**plain, "sampled": {"encoder": self._encoder.digest, "ids": [int(i) for i in ids]}}

    def _encoded(self, prompt: Messages, tools: Sequence[dict[str, Any]], message: Message) -> list[int] | None:
        try:
            _, (branch,) = self._encoder.encode_answers(prompt, [[message]], tools)
        except InputError:
            return None  # the template would not write this text as an answer
        found: list[int] = branch.ids[branch.mask].tolist()
        return found

    def line(self, name: str) -> str | None:
        """For people; None when texts say all."""
        if not self.with_ids:
            return None
        kept = f"{self.with_ids:,} of {self.answers:,} sampled answers are kept with their tokens"
        return f"{name}  {kept}: their text alone would be encoded as other ones"


def sample_policy(
    rollout: Rollout,
    policy: Model,
    encoder: Encoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    ctx: StageContext,
    group: Ranks,
    *,
    max_length: int,
    name: str,
) -> Samples:
    """Samples of ``policy``, kept in the runs' cache, so that a stage that only chooses differently among them samples
    nothing anew.

    The processes of ``group`` share the shards, and all may read them once this returns.

    Raises as :func:`align.rollout.samples.sample_shards` and :func:`align.rollout.engines.open_engine`.
    """
    key = {
        "policy": model_digest(policy.path, policy.revision),
        "encoder": encoder.digest,
        "max_length": max_length,
        **engine_key(rollout),
    }
    if rollout.script is not None:
        key["script"] = files.digest_path(Path(ctx.resolve(rollout.script)))
    everything = files.digest_json({**key, "sampling": asdict(sampling), "prompts": prompts_digest(prompts)})
    samples = sample_shards(
        open_engine(rollout, policy, encoder, max_length=max_length, cache=ctx.cache, resolve=ctx.resolve),
        prompts,
        sampling,
        folder=ctx.cache / "samples" / everything[:40],
        key=key,
        console=ctx.console,
        name=name,
        rank=group.rank,
        world=group.world,
    )
    group.barrier()
    return samples


def engine_key(rollout: Rollout) -> dict[str, Any]:
    """What samples follow from besides weights, prompts and sampling. ``auto`` is another engine once vllm is installed
    or gone."""
    key: dict[str, Any] = {"rollout": rollout.model_dump(mode="json")}
    return {**key, "vllm": find_spec("vllm") is not None} if rollout.engine == "auto" else key


def as_samples(ids: Sequence[str], samples: Samples, encoder: Encoder) -> list[list[Sample]]:
    """The samples of every prompt as text; ``ids`` are the prompts'."""
    return [
        [Sample.of(f"{id}#{k}", one, encoder) for k, one in enumerate(group)]
        for id, group in zip(ids, samples, strict=True)
    ]
