"""A policy's answers to prompts, as stages that read them as text need them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from align import files
from align.data.encode import Encoder
from align.data.strict_json import unreadable
from align.data.trees import Ids
from align.models.identity import model_digest
from align.recipe.schema import Model, Rollout
from align.rollout.engine import Completion, Sampling
from align.rollout.open import open_engine
from align.rollout.samples import Samples, prompts_digest, sample_shards
from align.stages.context import StageContext
from align.training.launch import Ranks


@dataclass(frozen=True)
class Sample:
    """One answer of a policy."""

    id: str
    """Its prompt's id and its number: ``conv-7#3``."""
    text: str
    """Without leading white space: some templates write it themselves. Empty when it holds what no data file can (NUL)."""
    ids: Ids
    """As sampled, the stop id included."""
    finished: bool

    @classmethod
    def of(cls, id: str, completion: Completion, encoder: Encoder) -> Sample:
        """From what an engine gave. Of a character that was cut in half nothing is kept."""
        text = encoder.decode(completion.ids).lstrip()
        if not completion.finished:
            text = text.rstrip("\ufffd")
        return cls(id, "" if unreadable(text) else text, np.array(completion.ids, dtype=np.int32), completion.finished)

    @property
    def message(self) -> Mapping[str, Any]:
        """As an assistant's message; one that was cut is marked, so that training adds no end to it."""
        message = {"role": "assistant", "content": self.text}
        return message if self.finished else {**message, "finished": False}


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
    """Samples of ``policy``, kept in the runs' cache, so that a stage that only chooses differently among them samples nothing anew.

    The processes of ``group`` share the shards, and all may read them once this returns.

    Raises as :func:`align.rollout.samples.sample_shards` and :func:`align.rollout.open.open_engine`.
    """
    key = {"policy": model_digest(policy.path, policy.revision), "encoder": encoder.digest, "max_length": max_length, **engine_key(rollout)}
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
    """What samples follow from besides weights, prompts and sampling. ``auto`` is another engine once vllm is installed or gone."""
    key: dict[str, Any] = {"rollout": rollout.model_dump(mode="json")}
    return {**key, "vllm": find_spec("vllm") is not None} if rollout.engine == "auto" else key


def as_samples(ids: Sequence[str], samples: Samples, encoder: Encoder) -> list[list[Sample]]:
    """The samples of every prompt as text; ``ids`` are the prompts'."""
    return [[Sample.of(f"{id}#{k}", one, encoder) for k, one in enumerate(group)] for id, group in zip(ids, samples, strict=True)]
