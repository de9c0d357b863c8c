"""Reward models: ours against TRL's RewardTrainer, from the same backbone and the same new head, on the same pairs.

TRL's classifier reads the last token that is not padding, so its padding is a token of its own here, and an answer ends
with its end token.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from benchmarks import data, dpo, model, ours, peer
from benchmarks.harness import Benchmark, Contender, Setting, Work
from benchmarks.measure import Recorder

PAD = "<|endoftext|>"
"""A token of the vocabulary that neither ends an answer nor occurs in one."""


def _pairs(quick: bool) -> Work:
    per_step = 8 if quick else dpo.PAIRS_PER_STEP
    rows = data.pairs(model.encoder(), per_step if quick else 64, dpo.SHORTER_THAN)
    return dpo.equal_steps(data.Rows([_ended(tree) for tree in rows.trees], rows.source), per_step)


def _ended(tree: Any) -> Any:
    """The tree without what a template puts behind the end of an answer."""
    from align.data.tree import Branch

    ends = [int(branch.mask.nonzero()[0][-1]) + 1 for branch in tree.branches]
    return replace(
        tree, branches=tuple(Branch(b.ids[:end], b.mask[:end]) for b, end in zip(tree.branches, ends, strict=True))
    )


def _scalar() -> Any:
    """The backbone with a head that is drawn from the same seed for everybody."""
    import torch

    from align.models.load import without_lm_head
    from align.models.scalar.heads import ScalarModel

    torch.manual_seed(0)
    return ScalarModel(without_lm_head(model.policy()))


def _classifier(pad_id: int) -> Any:
    """The same model as transformers' classifier."""
    import torch
    from transformers import AutoModelForSequenceClassification

    scalar = _scalar()
    config = copy.deepcopy(scalar.backbone.config)
    config.num_labels, config.pad_token_id = 1, pad_id
    with torch.device("meta"):
        classifier = AutoModelForSequenceClassification.from_config(config)
    setattr(classifier, classifier.base_model_prefix, scalar.backbone)
    classifier.score = scalar.head
    return classifier


def _ours(work: Work, setting: Setting, recorder: Recorder) -> None:
    from align.recipe.schema import RewardStage
    from align.stages.reward.run import RewardTrainer

    arguments = replace(ours.arguments(work, setting), model=_scalar())
    train = arguments.train.model_dump(exclude_unset=True)
    spec = RewardStage.model_validate({"kind": "reward", "data": "given", "l2": 0.0, "train": train})
    ours.timed(RewardTrainer, recorder)(arguments, ours.loader(work, setting), (), spec).fit()


def _trl(work: Work, setting: Setting, recorder: Recorder) -> None:
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    tokenizer = copy.deepcopy(model.encoder().tokenizer)
    tokenizer.pad_token = PAD
    steps = [[_row(work.trees[i]) for i in step] for step in work.steps]
    rows = [row for step in steps for row in sorted(step, key=lambda row: -max(map(len, row.values())))]
    settings = peer.arguments(setting["per_device_batch"], len(steps[0]))
    config = RewardConfig(**settings, max_length=None, num_train_epochs=1)
    trainer = peer.recorded(RewardTrainer, recorder)(
        model=_classifier(tokenizer.pad_token_id),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()


def _row(tree: Any) -> dict[str, list[int]]:
    chosen, rejected = ([*tree.trunk.tolist(), *branch.ids.tolist()] for branch in tree.branches)
    return {"chosen_ids": chosen, "rejected_ids": rejected}


BENCHMARKS = (
    Benchmark(
        name="reward",
        title="Reward model on real pairs",
        about=f"{model.NAME}, with a new head. Optimiser steps of {dpo.PAIRS_PER_STEP} pairs; ranking loss only.",
        unit="pairs",
        prepare=_pairs,
        contenders=(
            Contender(
                "ours",
                "align's reward stage, layout `tree`; what counts is the recipe's default micro-batch",
                tuple({"layout": "tree", "microbatch_tokens": tokens} for tokens in (512,)),
                _ours,
                default_counts=True,
            ),
            Contender(
                "TRL",
                "TRL's RewardTrainer on transformers' sequence classifier, with a padding token of its own",
                tuple({"per_device_batch": batch} for batch in (1, 2, 4, 8)),
                _trl,
            ),
        ),
    ),
)
