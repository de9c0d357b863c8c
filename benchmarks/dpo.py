"""DPO against TRL's DPOTrainer (reference log-probs computed beforehand, unmeasured) and a bare loop over the unique
tokens.

TRL takes pairs: a prompt with K rejected answers becomes K pairs, each with its own copy of prompt and chosen answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks import data, model, ours, peer
from benchmarks.bare import BARE
from benchmarks.harness import Benchmark, Contender, Setting, Work
from benchmarks.measure import Recorder

PAIRS_PER_STEP = 8
SHORTER_THAN = 384
BETA = 0.1


def equal_steps(rows: data.Rows, trees_per_step: int) -> Work:
    """Steps of equally many trees; the warm-up repeats the first one. What does not fill a step is left out."""
    steps = [list(range(s, s + trees_per_step)) for s in range(0, len(rows.trees) - trees_per_step + 1, trees_per_step)]
    return Work(rows.trees, [steps[0], *steps], rows.source)


def _pairs(quick: bool) -> Work:
    per_step = 8 if quick else PAIRS_PER_STEP
    return equal_steps(data.pairs(model.encoder(), per_step if quick else 64, SHORTER_THAN), per_step)


def _many(rejected: int, real: bool) -> Callable[[bool], Work]:
    def prepare(quick: bool) -> Work:
        """Steps of one prompt. Settings are tried on a prompt with at most eight rejected answers: for TRL a pair is a
        pair."""
        trees, answers = (1, min(8, rejected)) if quick else (max(1, 16 // rejected), rejected)
        rows = (
            data.many_rejected(model.encoder(), trees, answers, SHORTER_THAN)
            if real
            else data.random_tokens(trees, answers)
        )
        return equal_steps(rows, 1)

    return prepare


def expanded(tree: Any) -> list[dict[str, list[int]]]:
    """A tree as pairs."""
    chosen, *rejected = tree.branches
    return [
        {"prompt_ids": tree.trunk.tolist(), "chosen_ids": chosen.ids.tolist(), "rejected_ids": r.ids.tolist()}
        for r in rejected
    ]


def _trl(work: Work, setting: Setting, recorder: Recorder) -> None:
    trl_trainer(work, setting, recorder, model.policy(), model.encoder().tokenizer).train()


def trl_trainer(work: Work, setting: Setting, recorder: Recorder, net: Any, tokenizer: Any, **more: Any) -> Any:
    """TRL's DPOTrainer on the pairs of every step; ``more`` are arguments of its config."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class Encoded(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset  # the rows are token ids already

    steps = [[pair for i in step for pair in expanded(work.trees[i])] for step in work.steps]
    rows = [pair for step in steps for pair in sorted(step, key=lambda pair: -sum(map(len, pair.values())))]
    settings = {**peer.arguments(setting["per_device_batch"], len(steps[0])), **more}
    config = DPOConfig(**settings, beta=BETA, loss_type="sigmoid", precompute_ref_log_probs=True, num_train_epochs=1)
    return peer.recorded(Encoded, recorder)(
        model=net, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )


def _ours(work: Work, setting: Setting, recorder: Recorder) -> None:
    from align.recipe.schema import DpoStage
    from align.stages.dpo import DpoTrainer
    from align.training.precision import autocast
    from align.training.reference_logprobs import reference_for

    arguments, loader = ours.arguments(work, setting), ours.loader(work, setting)
    train = arguments.train.model_dump(exclude_unset=True)
    spec = DpoStage.model_validate({"kind": "dpo", "data": "given", "beta": BETA, "train": train})
    reference = reference_for(
        arguments.model,
        loader.batches(range(len(work.trees))),
        [len(tree.branches) for tree in work.trees],
        key="reference",
        cache=arguments.work,
        ranks=arguments.ranks,
        autocast=autocast(spec.train, arguments.ranks.device),
        own_attention=False,
        microbatch_tokens=spec.train.microbatch_tokens,
    )
    ours.timed(DpoTrainer, recorder)(arguments, loader, (), spec, reference, None).fit()


OURS = Contender(
    "ours",
    "align's dpo stage, layout `tree`, reference log-probs computed beforehand; what counts is the recipe's default"
    " micro-batch",
    tuple({"layout": "tree", "microbatch_tokens": tokens} for tokens in (512,)),
    _ours,
    default_counts=True,
)
TRL = Contender(
    "TRL",
    "TRL's DPOTrainer, reference log-probs precomputed",
    tuple({"per_device_batch": batch} for batch in (1, 2, 4, 8)),
    _trl,
)


def _benchmark(name: str, title: str, about: str, prepare: Callable[[bool], Work]) -> Benchmark:
    return Benchmark(name, title, f"{model.NAME}. {about}", "pairs", prepare, (OURS, TRL, BARE))


BENCHMARKS = (
    _benchmark("dpo", "DPO on real pairs", f"Optimiser steps of {PAIRS_PER_STEP} pairs.", _pairs),
    _benchmark("dpo-k8", "DPO, 8 rejected answers", "Optimiser steps of one prompt.", _many(8, real=False)),
    _benchmark("dpo-k16", "DPO, 16 rejected answers", "Optimiser steps of one prompt.", _many(16, real=False)),
    _benchmark(
        "dpo-k8-real", "DPO, 8 rejected answers, real text", "Optimiser steps of one prompt.", _many(8, real=True)
    ),
)
