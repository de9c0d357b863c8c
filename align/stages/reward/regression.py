"""``kind: reward`` with ``grades``: a reward model that learns the grades of answers by regression, with one output for
each grade.

The loss of an answer is the mean, over the grades that it has, of the squared difference between the head's output at
the answer's end and the grade; the step's loss is the mean over its answers. The score of the saved model is the
weighted sum of its outputs (HelpSteer2, https://arxiv.org/abs/2406.08673, trains and uses its models so).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from rich.table import Table

from align.batching.batch import Batch
from align.batching.loader import Loader
from align.data.trees.store import TreeStore
from align.functional import losses
from align.functional.grade_metrics import evaluate_grades
from align.models.scalar.heads import branch_grades
from align.models.scalar.reward_start import load_start
from align.recipe.schema import RewardStage
from align.stages.context import StageContext
from align.stages.reward.run import RewardTrainer, build_reward, places, save_trained, shown, statistics
from align.stages.shared.training_run import TrainingRun, prepare
from align.training.metrics import Mean
from align.training.trainer import LossOutput, Trainer, TrainerArguments

Outputs = dict[tuple[int, int], list[float]]
"""(tree, branch) to the head's outputs."""


class GradesTrainer(RewardTrainer):
    """Trains with the squared error."""

    def __init__(
        self, arguments: TrainerArguments, loader: Loader, held_out: Sequence[Batch], spec: RewardStage
    ) -> None:
        super().__init__(arguments, loader, held_out, spec)
        self._outputs: list[tuple[int, int, list[float]]] = []

    def eval_batches(self) -> Sequence[Batch]:
        """Held-out answers."""
        self._outputs = []
        return self.held_out

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """Number of answers."""
        return {"regression": batch.num_branches}

    def loss(self, batch: Batch, *, held_out: bool) -> LossOutput:
        """Summed over answers: the mean squared error over each answer's grades."""
        assert batch.grades is not None
        outputs = branch_grades(self.scalar, batch, own_attention=self.loader.layout == "padded")
        if held_out:
            self._outputs += places(batch, outputs)
        predicted = outputs.detach()
        given = ~batch.grades.isnan()
        errors = ((predicted - batch.grades) ** 2).where(given, predicted.new_zeros(()))
        values = {
            f"error/{name}": Mean(errors[:, i].sum(), int(given[:, i].sum())) for i, name in enumerate(self.spec.grades)
        }
        values["scores/mean"] = Mean(self.scalar.score(predicted).sum(), batch.num_branches)
        return LossOutput({"regression": losses.squared_errors(outputs, batch.grades).sum()}, values)

    def mean_values(self, sums: Mapping[str, Mean]) -> dict[str, float]:
        """Means by name, as in :class:`Trainer`; the mean of all scores is among them already."""
        return Trainer.mean_values(self, sums)

    def held_out_outputs(self) -> Outputs:
        """Outputs for the held-out answers, by (tree, branch). Those of the last evaluation are reused if it had the
        weights that were kept."""
        if self.train.load_best_model or not any(self.ranks.gather(bool(self._outputs))):
            self.evaluate()
            self.model.eval()
        return {(tree, slot): values for part in self.ranks.gather(self._outputs) for tree, slot, values in part}


def learn_grades(spec: RewardStage, ctx: StageContext) -> None:
    """Train on graded answers, compute statistics of the scores on them, and report the errors on held-out answers."""
    stage = prepare(spec, ctx, partial(build_reward, grades=spec.grades), partial(load_start, grades=spec.grades))
    trainer = GradesTrainer(stage.trainer_arguments, stage.training_loader(), stage.all_of(stage.held_out), spec)
    trainer.fit()
    outputs = trainer.held_out_outputs() if stage.held_out is not None else {}
    stats = statistics(stage, trainer)
    saved = save_trained(stage, trainer, stats)
    if not stage.group.first:
        return
    held_out = _held_out(stage, spec, outputs)
    stage.report(trainer, {**saved, "scores": vars(stats), "grades": spec.grades, "held_out_grades": held_out})
    if held_out:
        _show(ctx, held_out)


def _held_out(stage: TrainingRun, spec: RewardStage, outputs: Outputs) -> dict[str, Any] | None:
    if stage.held_out is None:
        return None
    trees = [stage.held_out[index] for index in range(len(stage.held_out))]
    digests = [hashlib.sha256(tree.trunk.tobytes()).hexdigest() for tree in trees]
    prompt = np.unique(digests, return_inverse=True)[1].astype(np.int64)
    predicted = np.array([outputs[index, 0] for index in range(len(trees))])
    return evaluate_grades(
        prompt, predicted, _grades(stage.held_out, spec), spec.grades, np.nanmean(_grades(stage.data, spec), axis=0)
    )


def _grades(store: TreeStore, spec: RewardStage) -> Any:
    return store.marks(len(spec.grades))[:, 2:]


def _show(ctx: StageContext, held_out: Mapping[str, Mapping[str, Any]]) -> None:
    title = f"{ctx.name}: held-out answers, with 95 % intervals over prompts"
    table = Table(title=title, title_justify="left")
    for header in ("", "answers", "mean squared error", "of the training mean alone", "correlation"):
        table.add_column(header)
    for name, numbers in held_out.items():
        table.add_row(
            name, str(numbers["answers"]), *(shown(numbers[key]) for key in ("error", "error_of_mean", "correlation"))
        )
    ctx.console.print(table)
