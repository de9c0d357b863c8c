"""``kind: sft``: supervised fine-tuning. Conversations in, a policy out.

The loss is the negative log-likelihood of the assistant's tokens, the turn-ending token included, averaged per token or
per conversation over the whole optimiser step. Conversations are single-branch trees: everything before the first
target is the trunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from align.batching.batch import Batch
from align.batching.loader import Loader
from align.functional.losses import sequence_nll, token_nll
from align.models.compute.forward import batch_logprobs
from align.recipe.schema import SftStage
from align.stages.context import StageContext
from align.stages.shared.training_run import prepare, trained
from align.training.metrics import Mean
from align.training.trainer import LossOutput, Trainer, TrainerArguments


class SftTrainer(Trainer):
    """Trains on conversations with the negative log-likelihood."""

    def __init__(self, arguments: TrainerArguments, loader: Loader, held_out: Sequence[Batch], loss: str) -> None:
        super().__init__(arguments, total_steps=len(loader.plan))
        self.loader, self.held_out, self.per_sequence = loader, held_out, loss == "sequence_mean"

    def steps(self) -> Iterator[Sequence[Batch]]:
        """The loader's steps from the current one on."""
        return self.loader.from_step(self.progress.step)

    def eval_batches(self) -> Sequence[Batch]:
        """Held-out conversations."""
        return self.held_out

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """Number of trained tokens, or of conversations."""
        return {"sft": batch.num_branches if self.per_sequence else batch.num_targets}

    def loss(self, batch: Batch, *, held_out: bool) -> LossOutput:
        """Summed negative log-likelihood: over tokens, or over each conversation's mean."""
        logprobs = batch_logprobs(self.model, batch, own_attention=self.loader.layout == "padded")
        if not self.per_sequence:
            return LossOutput({"sft": token_nll(logprobs).sum()})
        total = sequence_nll(logprobs, batch.branch, batch.num_branches).sum()
        return LossOutput({"sft": total}, {"token_nll": Mean(token_nll(logprobs).detach().sum(), batch.num_targets)})


def run(spec: SftStage, ctx: StageContext) -> None:
    """Fine-tune on conversations."""
    stage = prepare(spec, ctx, trained)
    trainer = SftTrainer(stage.trainer_arguments, stage.training_loader(), stage.all_of(stage.held_out), spec.loss)
    stage.train_and_save(trainer, spec.samples)
