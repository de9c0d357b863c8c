"""``kind: reward``: preferences in, a reward model out, as in ChatGLM-RLHF (https://arxiv.org/abs/2404.00934).

The score of an answer is read at the token that ends it, so the model can see whether the answer is finished. The loss
is Bradley and Terry's on each (chosen, rejected) pair, with the margins of the data (and, if the recipe asks for it,
the share of votes), plus an L2 term on both scores. As in DPO, a prompt's loss is the mean over its rejected answers
and the step's loss is the mean over its prompts. The paper gives neither the weight of the L2 term nor its buckets of
length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.table import Table
from torch import Tensor, nn

from align.batching.batch import Batch, Pairs
from align.batching.loader import Loader
from align.data.tree import Tree
from align.data.trees.balance import BalancedTrees, LengthBalance, PairTable
from align.data.trees.store import TreeStore
from align.errors import InputError
from align.functional import losses
from align.functional.preference_metrics import ScoredPairs, evaluate
from align.functional.segments import segment_mean
from align.functional.ties import won
from align.models.load import without_lm_head
from align.models.placement import WHOLE
from align.models.rounding import rounding_error
from align.models.scalar.heads import ScalarModel, ScoreStats, branch_scores, save_scalar, with_head
from align.models.scalar.reward_start import load_start
from align.recipe.schema import Lora, RewardStage
from align.scoring.baselines import LengthBaseline, WordsBaseline, pair_weights
from align.stages.context import StageContext
from align.stages.shared.training_run import TrainingRun, prepare, trained
from align.terminal import fixed
from align.training.metrics import Mean
from align.training.precision import computes_in
from align.training.trainer import LossOutput, Trainer, TrainerArguments

CALIBRATION_PROMPTS = 1000
"""Statistics of the scores are computed on the answers of this many training prompts, drawn at random; of all if there
are fewer."""
Noise = Callable[[npt.NDArray[np.float64], npt.NDArray[np.float64]], npt.NDArray[np.float64]]
"""(chosen scores, rejected scores) -> how far rounding may move their difference, pair by pair."""
SKEWED = 0.6
"""The report warns when the longer (or the shorter) answer wins at least this share of pairs."""


class RewardTrainer(Trainer):
    """Trains with the ranking loss."""

    def __init__(
        self, arguments: TrainerArguments, loader: Loader, held_out: Sequence[Batch], spec: RewardStage
    ) -> None:
        super().__init__(arguments, total_steps=len(loader.plan))
        self.loader, self.held_out, self.spec = loader, held_out, spec
        self.term_weights = {"l2": spec.l2}
        self._scored: list[tuple[int, int, float]] = []
        self.error = rounding_error(self.scalar.backbone, computes_in(self.train))
        """Relative rounding error of a hidden state, by which ties are told."""

    def steps(self) -> Iterator[Sequence[Batch]]:
        """The loader's steps from the current one on."""
        return self.loader.from_step(self.progress.step)

    def eval_batches(self) -> Sequence[Batch]:
        """Held-out preferences."""
        self._scored = []
        return self.held_out

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """Number of prompts."""
        return dict.fromkeys(("ranking", "l2") if self.spec.l2 else ("ranking",), len(batch.tree_ids))

    def loss(self, batch: Batch, *, held_out: bool) -> LossOutput:
        """Summed over prompts: the mean loss over each prompt's pairs."""
        scores = branch_scores(self.scalar, batch, own_attention=self.loader.layout == "padded")
        if held_out:
            self._scored += places(batch, scores)
        pairs = Pairs.of(batch)
        chosen, rejected = scores[pairs.chosen], scores[pairs.rejected]
        per_prompt = partial(segment_mean, segment=pairs.tree, num_segments=len(batch.tree_ids))
        shares = batch.shares[pairs.rejected] if self.spec.soft_labels and batch.shares is not None else None
        terms = {
            "ranking": per_prompt(losses.bradley_terry(chosen, rejected, batch.margins[pairs.rejected], shares)).sum()
        }
        if self.spec.l2:
            terms["l2"] = per_prompt(losses.score_l2(chosen, rejected)).sum()
        margin = (chosen - rejected).detach()
        values = {
            "accuracy": won(margin, self.noise(chosen.detach(), rejected.detach())),  # a tie is half right
            "margin": margin,
            "scores/chosen": chosen.detach(),
            "scores/rejected": rejected.detach(),
            "scores/square": (chosen**2 + rejected**2).detach() / 2,
        }
        return LossOutput(
            terms, {name: Mean(per_prompt(value).sum(), len(batch.tree_ids)) for name, value in values.items()}
        )

    def noise(self, *scores: Tensor) -> Tensor:
        """How far rounding may move the difference of two ``scores`` [P] under the present weights: the component of a
        hidden state's error along the head, plus the rounding of the scores themselves. All processes must call it."""
        noise: Tensor = self._noise(self._head_square(), scores)  # a tensor: reading its value would wait for the GPU
        return noise

    def noise_now(self) -> Callable[..., Any]:
        """:meth:`noise` under the present weights, as a function of numbers or arrays to call later. All processes must
        call it."""
        square = float(self._head_square())
        return lambda *scores: self._noise(square, scores)

    def _head_square(self) -> Tensor:
        head: Tensor = WHOLE.whole(self.scalar.head.weight)
        return head.square().sum()

    def _noise(self, square: Any, scores: Sequence[Any]) -> Any:
        size = sum(score**2 for score in scores) + len(scores) * square
        return self.error * (2 * size) ** 0.5

    @property
    def scalar(self) -> ScalarModel:
        """The model as a :class:`ScalarModel`, without wrappers."""
        assert isinstance(self.model, ScalarModel)
        return self.model

    def mean_values(self, sums: Mapping[str, Mean]) -> dict[str, float]:
        """Means by name, with the mean and standard deviation of all scores added."""
        values = super().mean_values(sums)
        mean = (values["scores/chosen"] + values["scores/rejected"]) / 2
        spread = math.sqrt(max(0.0, values.pop("scores/square") - mean**2))
        return {**values, "scores/mean": mean, "scores/std": spread}

    def held_out_scores(self) -> dict[tuple[int, int], float]:
        """Scores of the held-out answers, by (tree, branch): those of the last evaluation, if it had the weights that
        were kept; else computed again."""
        if self.train.load_best_model or not any(self.ranks.gather(bool(self._scored))):
            self.evaluate()
            self.model.eval()
        return _all_of(self.ranks.gather(self._scored))

    @torch.no_grad()
    def scores(self, batches: Sequence[Batch]) -> dict[tuple[int, int], float]:
        """Scores of the ``batches`` of all processes, by (tree, branch); each computes its own."""
        self.model.eval()
        scored: list[tuple[int, int, float]] = []
        for cpu_batch in batches:
            batch = cpu_batch.to(self.ranks.device)
            with self.autocast():
                scored += places(batch, branch_scores(self.scalar, batch, own_attention=self.loader.layout == "padded"))
        return _all_of(self.ranks.gather(scored))


def places(batch: Batch, scores: Tensor) -> list[tuple[int, int, Any]]:
    """(tree, branch, score) of a batch's branches; with several outputs a list in place of the score."""
    trees = [batch.tree_index[tree] for tree in batch.branch_tree.tolist()]
    return list(zip(trees, batch.branch_slot.tolist(), scores.detach().tolist(), strict=True))


def _all_of(parts: Sequence[Sequence[tuple[int, int, float]]]) -> dict[tuple[int, int], float]:
    return {(tree, slot): score for part in parts for tree, slot, score in part}


def build_reward(start: Any, lora: Lora | None, seed: int, *, grades: Mapping[str, float] | None = None) -> nn.Module:
    """The model to train: a policy's transformer with a new head, for one score or for ``grades``; or a reward model
    with its head."""
    head = start.head.weight if isinstance(start, ScalarModel) else None
    backbone: Any = trained(without_lm_head(start) if head is None else start.backbone, lora, seed)
    torch.manual_seed(seed)  # every process draws the same head
    model = ScalarModel(backbone, grades)
    return model if head is None else with_head(model, head)


def run(spec: RewardStage, ctx: StageContext) -> None:
    """Train on preferences, compute statistics of the scores on training answers, and report the accuracy on held-out
    ones. With ``grades``, train on graded answers."""
    if spec.grades:
        from align.stages.reward.regression import learn_grades  # it imports this module

        learn_grades(spec, ctx)
        return
    stage = prepare(spec, ctx, build_reward, partial(load_start, grades=spec.grades))
    balanced = stage.read.examples
    buckets = balanced.balance.report() if isinstance(balanced, BalancedTrees) else None
    if buckets:
        _show_buckets(ctx, buckets)
    trainer = RewardTrainer(stage.trainer_arguments, stage.training_loader(), stage.all_of(stage.held_out), spec)
    trainer.fit()
    held_out_scores = trainer.held_out_scores()
    stats, noise = statistics(stage, trainer), trainer.noise_now()
    saved = save_trained(stage, trainer, stats)
    if not stage.group.first:
        return
    held_out, notes = _judge(stage, held_out_scores, noise)
    outcome = {**saved, "scores": vars(stats), "held_out": held_out}
    more: dict[str, Any] = {"length_balance": buckets} if buckets else {}
    stage.report(trainer, outcome, **more)
    if held_out:
        _show_held_out(ctx, held_out)
    for line in notes:
        ctx.warn(line)


def save_trained(stage: TrainingRun, trainer: RewardTrainer, stats: ScoreStats) -> dict[str, Any]:
    """Write the finished model into the stage's result, as :func:`save_scalar` does."""
    spec = stage.spec
    return save_scalar(
        trainer.scalar,
        stage.encoder,
        stage.ctx.out,
        base=stage.base,
        scores=stats,
        layout=spec.train.layout,
        save_merged=spec.lora is not None and spec.lora.save_merged,
        writes=stage.group.first,
    )


def statistics(stage: TrainingRun, trainer: RewardTrainer) -> ScoreStats:
    """Statistics of the finished model's scores on answers that it was trained on."""
    total = len(stage.data)
    chosen = np.random.default_rng(stage.ctx.seed).permutation(total)[:CALIBRATION_PROMPTS]
    return ScoreStats.of(list(trainer.scores(stage.loader(stage.data).batches(chosen.tolist())).values()))


# Held-out data


def _judge(
    stage: TrainingRun, scores: Mapping[tuple[int, int], float], noise: Noise
) -> tuple[dict[str, Any] | None, list[str]]:
    """The numbers on the held-out data, as they are and balanced by length; and warnings."""
    trees = _trees(stage.data)
    table = PairTable.of(trees)
    by_length = LengthBaseline(table.difference, pair_weights(trees))
    notes = []
    side, share = (
        ("longer", by_length.longer_wins) if by_length.longer_wins >= 0.5 else ("shorter", 1 - by_length.longer_wins)
    )
    if share >= SKEWED and not isinstance(stage.read.examples, BalancedTrees):
        notes.append(
            f"the {side} answer wins {share:.0%} of the training pairs, so length may be what was learned; see"
            " length_balance"
        )
    if stage.held_out is None:
        return None, notes
    held_out = _trees(stage.held_out)
    pairs = _scored_pairs(held_out, scores, noise)
    margins = {"length": by_length.margins(pairs.length_difference), "words": WordsBaseline(trees).margins(held_out)}
    kept = LengthBalance(pairs.length_difference, stage.ctx.seed).kept(0)
    seed = stage.ctx.seed
    numbers = {
        "natural": evaluate(pairs, margins, seed),
        "length_balanced": evaluate(pairs.only(kept), {name: margin[kept] for name, margin in margins.items()}, seed),
    }
    return numbers, notes


def _trees(store: TreeStore) -> list[Tree]:
    return [store[i] for i in range(len(store))]


def _scored_pairs(trees: Sequence[Tree], scores: Mapping[tuple[int, int], float], noise: Noise) -> ScoredPairs:
    table = PairTable.of(trees)
    chosen = np.array([scores[t, 0] for t in table.tree.tolist()], dtype=np.float64)
    rejected = np.array(
        [scores[t, slot] for t, slot in zip(table.tree.tolist(), table.slot.tolist(), strict=True)], dtype=np.float64
    )
    if not (np.isfinite(chosen).all() and np.isfinite(rejected).all()):
        raise InputError("a held-out answer has a score that is not finite", hint="lower learning_rate")
    return ScoredPairs(table.tree, chosen, rejected, table.chosen, table.rejected, noise(chosen, rejected))


# Tables

_ROWS = {
    "accuracy": "accuracy",
    "accuracy_longer_wins": "  where the longer answer wins",
    "accuracy_shorter_wins": "  where the shorter answer wins",
    "accuracy_length": "accuracy of length alone",
    "accuracy_words": "accuracy of words alone (TF-IDF)",
    "length_correlation": "correlation of score and length",
    "score_mean": "mean score",
    "score_std": "spread of scores",
    "calibration_error": "calibration error",
}


def _show_held_out(ctx: StageContext, held_out: Mapping[str, Mapping[str, Any]]) -> None:
    table = Table(title=f"{ctx.name}: held-out data, with 95 % intervals", title_justify="left")
    table.add_column("")
    for name, numbers in held_out.items():
        table.add_column(f"{name.replace('_', '-')} ({numbers['pairs']} pairs)")
    for key, words in _ROWS.items():
        table.add_row(words, *(shown(numbers[key]) for numbers in held_out.values()))
    ctx.console.print(table)


def shown(estimate: Mapping[str, float | None] | None) -> str:
    """A number with its interval, if it has one."""
    if estimate is None:
        return "-"
    value, low, high = (estimate[name] for name in ("value", "low", "high"))
    assert value is not None
    return fixed(value, 3) + ("" if low is None or high is None else f"  ({fixed(low, 3)} to {fixed(high, 3)})")


def _show_buckets(ctx: StageContext, buckets: Sequence[Mapping[str, Any]]) -> None:
    title = f"{ctx.name}: pairs by difference in length; each epoch draws anew what it leaves out"
    table = Table(title=title, title_justify="left")
    for header in ("tokens", "longer wins", "shorter wins", "equal", "used", "left out"):
        table.add_column(header, justify="right")
    for row in buckets:
        table.add_row(*(str(value) for value in row.values()))
    ctx.console.print(table)
