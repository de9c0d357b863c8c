"""Supervised fine-tuning: ours against TRL's SFTTrainer, padded and packed, and a bare loop."""

from __future__ import annotations

from typing import Any

from benchmarks import data, model, ours, peer
from benchmarks.bare import BARE
from benchmarks.harness import Benchmark, Contender, Setting, Work
from benchmarks.measure import Recorder

ROWS, QUICK_ROWS, SHORTER_THAN = 32, 8, 512


def _prepare(quick: bool) -> Work:
    rows = data.conversations(model.encoder(), QUICK_ROWS if quick else ROWS, SHORTER_THAN)
    everything = list(range(len(rows.trees)))
    return Work(rows.trees, [everything, everything], rows.source)


def _ours(work: Work, setting: Setting, recorder: Recorder) -> None:
    from align.stages.sft import SftTrainer

    ours.timed(SftTrainer, recorder)(ours.arguments(work, setting), ours.loader(work, setting), (), "token_mean").fit()


def _trl(work: Work, setting: Setting, recorder: Recorder) -> None:
    packing = {"packing": True, "packing_strategy": "bfd"} if setting["rows"] == "packed" else {"packing": False}
    more = {**packing, "max_length": SHORTER_THAN}
    trl_trainer(work, setting, recorder, model.policy(), model.encoder().tokenizer, **more).train()


def trl_trainer(work: Work, setting: Setting, recorder: Recorder, net: Any, tokenizer: Any, **more: Any) -> Any:
    """TRL's SFTTrainer on the rows of the first step, once for every step; ``more`` are arguments of its config."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = sorted((_labelled(work.trees[i]) for i in work.steps[0]), key=lambda row: -len(row["input_ids"]))
    settings = peer.arguments(setting["per_device_batch"], len(rows))
    config = SFTConfig(**{**settings, "num_train_epochs": len(work.steps), **more})
    return peer.recorded(SFTTrainer, recorder)(
        model=net, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )


def _labelled(tree: Any) -> dict[str, list[int]]:
    (branch,) = tree.branches
    trained = [
        token if target else -100 for token, target in zip(branch.ids.tolist(), branch.mask.tolist(), strict=True)
    ]
    return {"input_ids": [*tree.trunk.tolist(), *branch.ids.tolist()], "labels": [-100] * len(tree.trunk) + trained}


BENCHMARKS = (
    Benchmark(
        name="sft",
        title="Supervised fine-tuning",
        about=(
            f"{model.NAME}. One optimiser step over all rows: a warm-up step, then the timed one. "
            "The loss is on the assistant's tokens only, the same tokens for everybody."
        ),
        unit="tokens",
        prepare=_prepare,
        contenders=(
            Contender(
                "ours",
                "align's sft stage, layout `tree`; what counts is the recipe's default of 512 tokens a micro-batch",
                tuple({"layout": "tree", "microbatch_tokens": tokens} for tokens in (512,)),
                _ours,
                default_counts=True,
            ),
            Contender(
                "TRL padded",
                "TRL's SFTTrainer, one row a sequence, padded to the longest of its batch",
                tuple({"rows": "padded", "per_device_batch": batch} for batch in (1, 2, 4, 8)),
                _trl,
            ),
            Contender(
                "TRL packed",
                f"TRL's SFTTrainer with packing=True (bfd, max_length {SHORTER_THAN})",
                tuple({"rows": "packed", "per_device_batch": batch} for batch in (1, 2, 4, 8)),
                _trl,
            ),
            BARE,
        ),
    ),
)
