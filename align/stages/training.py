"""What the training stages share: the policy with or without adapters, the loader, and before/after samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from align import files
from align.batching.batch import Batch
from align.batching.loader import Loader, StepPlan, plan_steps, share
from align.batching.tree import pack
from align.data.encode import Encoder
from align.data.store import TreeStore
from align.data.trees import Tree
from align.models.adapters import add_lora
from align.models.chat import answer
from align.models.load import disable_dropout, load_policy
from align.recipe.schema import Lora, Model, Train
from align.stages.context import StageContext
from align.training.launch import Ranks


def build_policy(base: Model, lora: Lora | None, train: Train, ctx: StageContext, ranks: Ranks) -> nn.Module:
    """The model to train, on its device: all its weights, or new adapters on the frozen rest."""
    model: nn.Module = load_policy(base, dtype=train.dtype, device=ranks.device, cache=ctx.cache)
    disable_dropout(model)
    if lora is not None:
        torch.manual_seed(ctx.seed)  # every process draws the same adapters
        model = add_lora(model, lora)
    return model


def step_plan(store: TreeStore, train: Train, seed: int) -> StepPlan:
    """The optimiser steps of a training stage."""
    return plan_steps(
        store.sizes,
        seed=seed,
        epochs=train.epochs,
        batch_size=train.batch_size,
        tokens_per_step=train.tokens_per_step,
        max_steps=train.max_steps,
    )


def build_loader(store: TreeStore, plan: StepPlan, train: Train, encoder: Encoder, ranks: Ranks) -> Loader:
    """Micro-batches of every step for this process."""
    return Loader(
        tree=store.__getitem__,
        plan=plan,
        microbatch_tokens=train.microbatch_tokens,
        layout=train.layout,
        pad_id=encoder.pad_id,
        rank=ranks.rank,
        world=ranks.world,
    )


def eval_batches(store: TreeStore | None, train: Train, encoder: Encoder, ranks: Ranks) -> list[Batch]:
    """This process's share of the held-out data; empty without any."""
    if store is None:
        return []
    trees = [store[i] for i in range(len(store))]
    batches = pack(trees, microbatch_tokens=train.microbatch_tokens, layout=train.layout, pad_id=encoder.pad_id)
    return share(batches, ranks.rank, ranks.world)


@dataclass
class Samples:
    """Greedy answers of a policy to the same held-out prompts, before and after training."""

    prompts: list[str]
    before: list[str]
    after: list[str]

    def as_json(self) -> list[dict[str, str]]:
        """One object a prompt."""
        return [{"prompt": p, "before": b, "after": a} for p, b, a in zip(self.prompts, self.before, self.after, strict=True)]


def sample_answers(model: nn.Module, encoder: Encoder, trees: Sequence[Tree], max_new_tokens: int = 64) -> list[str]:
    """Greedy answers to the trunks of ``trees``, decoded."""
    return [encoder.decode(ids).strip() for ids in answer(model, encoder, [t.trunk for t in trees], max_new_tokens=max_new_tokens)]


def remembered(ctx: StageContext, name: str, make: Any) -> Any:
    """A value made once in this stage run and found again after an interruption."""
    path = ctx.work / f"{name}.json"
    if not path.exists():
        files.write_json(path, make())
    return json.loads(path.read_text())
