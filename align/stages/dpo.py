"""``kind: dpo``: direct preference optimisation and its relatives. Preferences in, a policy out.

A prompt with its chosen and all its rejected answers is one tree, computed in one pass (or in groups of answers, if it
is much larger than a micro-batch). Each (chosen, rejected) pair gives a loss. A prompt's loss is the mean over its
rejected answers, and the step's loss is the mean over its prompts, so a prompt weighs the same whether it has one
rejected answer or many. The reference is always the stage's starting policy; its log-probs are computed once, before
training.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from align import files
from align.batching.batch import Batch, Pairs
from align.batching.loader import Loader
from align.data.trees.store import TreeStore
from align.functional import losses
from align.functional.both_fell import both_fell
from align.functional.segments import segment_count, segment_mean, segment_sum
from align.functional.ties import logprob_noise, won
from align.models.compute.forward import batch_logprobs
from align.models.compute.stream import Stream, TreeParts, split
from align.models.rounding import rounding_error
from align.recipe.schema import DpoStage
from align.stages.context import StageContext
from align.stages.shared.training_run import TrainingRun, prepare, trained
from align.training.metrics import Mean, add_up
from align.training.precision import autocast, computes_in
from align.training.reference_logprobs import ReferenceLogprobs, reference_for, weights_digest
from align.training.trainer import LossOutput, Trainer, TrainerArguments


class DpoTrainer(Trainer):
    """Trains with the preference losses.

    ``reference`` and ``held_out_reference`` give the summed reference log-probs of a batch's branches; None for losses
    without one.
    """

    def __init__(
        self,
        arguments: TrainerArguments,
        loader: Loader,
        held_out: Sequence[Batch],
        spec: DpoStage,
        reference: ReferenceLogprobs | None,
        held_out_reference: ReferenceLogprobs | None,
    ) -> None:
        super().__init__(arguments, total_steps=len(loader.plan))
        self.loader, self.held_out, self.spec, self.pair_loss = loader, held_out, spec, spec.pair_loss
        self.reference, self.held_out_reference = reference, held_out_reference
        self.term_weights = {"sft": spec.sft_weight}
        self.reference_points = (0.0, 0.0)
        self.error = rounding_error(self.model, computes_in(self.train))
        """Relative rounding error of a hidden state, by which ties are told."""

    def steps(self) -> Iterator[Sequence[Batch]]:
        """The loader's steps from the current one on. For a loss that needs them, the step's reference points are
        estimated before it."""
        for micro_batches in self.loader.from_step(self.progress.step):
            if self.pair_loss.needs_reference_points:
                self.reference_points = self._reference_points(micro_batches, held_out=False)
            yield micro_batches

    def eval_batches(self) -> Sequence[Batch]:
        """Held-out preferences."""
        if self.pair_loss.needs_reference_points:
            self.reference_points = self._reference_points(self.held_out, held_out=True)
        return self.held_out

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """Prompts, and tokens of chosen answers."""
        chosen_tokens = int((batch.branch_slot[batch.branch] == 0).sum())
        return {"dpo": len(batch.tree_ids), **({"sft": chosen_tokens} if self.spec.sft_weight else {})}

    def loss(self, batch: Batch, *, held_out: bool) -> LossOutput:
        """Summed over prompts: the mean preference loss over each prompt's pairs; and the chosen answers' negative
        log-likelihood."""
        logprobs = batch_logprobs(self.model, batch, own_attention=self.loader.layout == "padded")
        policy = segment_sum(logprobs, batch.branch, batch.num_branches)
        ratios = policy - self._reference_sums(batch, held_out=held_out)
        pairs = Pairs.of(batch)
        per_prompt = segment_mean(self._pair_loss(batch, ratios, pairs), pairs.tree, len(batch.tree_ids))
        terms = {"dpo": per_prompt.sum()}
        if self.spec.sft_weight:
            terms["sft"] = losses.token_nll(logprobs[batch.branch_slot[batch.branch] == 0]).sum()
        return LossOutput(terms, self._metrics(batch, policy.detach(), ratios.detach(), pairs))

    def forward_backward(self, batch: Batch, counts: Mapping[str, float]) -> LossOutput:
        """As in :class:`Trainer`; a prompt with more answers than fit a micro-batch is computed in groups of
        answers."""
        parts = split(batch, self.train.microbatch_tokens) if self.loader.layout == "tree" else None
        if parts is None:
            return super().forward_backward(batch, counts)
        batch, parts = batch.to(self.ranks.device), parts.to(self.ranks.device)
        if not batch.tree_ids:
            return self._idle(parts)
        pairs, reference = Pairs.of(batch), self._reference_sums(batch, held_out=False)
        policy = torch.zeros(batch.num_branches, device=batch.branch.device)
        total = torch.zeros((), device=batch.branch.device)
        with self.autocast():
            stream = Stream(self.model, parts)
            # The log-probs are summed in the same order as the reference's: another order would differ by rounding.
            chosen_sum = segment_sum(stream.logprobs, parts.first.branch, 1)[0]
            chosen = chosen_sum.detach().requires_grad_()
            policy[0] = chosen.detach()
            first = 1
            for number, group in enumerate(parts.groups):
                own = slice(first, first + group.num_branches)
                rejected = segment_sum(stream.branches(number), group.branch, group.num_branches)
                sums = torch.cat([chosen[None], policy[1:first], rejected, policy[own.stop :]])
                of_group = Pairs(
                    pairs.chosen[first - 1 : own.stop - 1], pairs.rejected[first - 1 : own.stop - 1], pairs.tree
                )
                part = self._pair_loss(batch, sums - reference, of_group).sum() / len(pairs.rejected)
                self.weighted({"dpo": part}, counts).backward()  # type: ignore[no-untyped-call]
                policy[own], total, first = rejected.detach(), total + part.detach(), own.stop
            terms = {"dpo": total}
            assert chosen.grad is not None
            loss = chosen_sum * chosen.grad
            if self.spec.sft_weight:
                terms["sft"] = losses.token_nll(stream.logprobs).sum()
                loss = loss + self.weighted({"sft": terms["sft"]}, counts)
            stream.backward(loss)
        return LossOutput(terms, self._metrics(batch, policy, policy - reference, pairs))

    def _idle(self, parts: TreeParts) -> LossOutput:
        """The passes of a tree that is computed in groups, without the tree: another process has one."""
        with self.autocast():
            stream = Stream(self.model, parts)
            for number in range(len(parts.groups)):
                stream.branches(number).sum().backward()  # type: ignore[no-untyped-call]
            stream.backward(stream.logprobs.sum())
        return LossOutput({})

    def _reference_sums(self, batch: Batch, *, held_out: bool) -> Tensor:
        reference = self.held_out_reference if held_out else self.reference
        return torch.zeros(batch.num_branches, device=batch.branch.device) if reference is None else reference(batch)

    def _pair_loss(self, batch: Batch, ratios: Tensor, pairs: Pairs) -> Tensor:
        """The recipe's loss of each pair, [P]."""
        read = ratios if self.pair_loss.reads == "sum" else ratios / segment_count(batch.branch, batch.num_branches)
        of_pairs = losses.PairLogprobs(
            chosen=read[pairs.chosen],
            rejected=read[pairs.rejected],
            margins=batch.margins[pairs.rejected],
            shares=None if batch.shares is None else batch.shares[pairs.rejected],
            reference_points=self.reference_points,
        )
        return self.pair_loss.of_pairs(of_pairs, self.spec.beta)

    @torch.no_grad()
    def _reference_points(self, micro_batches: Sequence[Batch], *, held_out: bool) -> tuple[float, float]:
        """Mean log-ratios of chosen and of rejected answers over the whole step, at least 0: KTO's reference points,
        without gradient."""
        parts = []
        for cpu_batch in micro_batches:
            batch = cpu_batch.to(self.ranks.device)
            with self.autocast():
                logprobs = batch_logprobs(self.model, batch, own_attention=self.loader.layout == "padded")
            ratios = segment_sum(logprobs, batch.branch, batch.num_branches) - self._reference_sums(
                batch, held_out=held_out
            )
            chosen, rejected = ratios[batch.chosen_branches], ratios[batch.rejected_branches]
            parts.append({"chosen": Mean(chosen.sum(), len(chosen)), "rejected": Mean(rejected.sum(), len(rejected))})
        sums = add_up(self.ranks.gather(add_up(parts)))
        return max(0.0, sums["chosen"].value), max(0.0, sums["rejected"].value)

    def _metrics(self, batch: Batch, policy: Tensor, ratios: Tensor, pairs: Pairs) -> dict[str, Mean]:
        """Implicit rewards, accuracy, log-probs and lengths, each averaged over a prompt's rejected answers first and
        then over prompts."""
        lengths = segment_count(batch.branch, batch.num_branches)
        per_token = self.pair_loss.rewards == "mean"
        rewards = self.spec.beta * (ratios / lengths if per_token else ratios)
        per_prompt = partial(segment_mean, segment=pairs.tree, num_segments=len(batch.tree_ids))
        margin = rewards[pairs.chosen] - rewards[pairs.rejected]
        noise = self.spec.beta * logprob_noise(policy, lengths, self.error) / (lengths if per_token else 1)
        values = {
            "rewards/chosen": rewards[pairs.chosen],
            "rewards/rejected": rewards[pairs.rejected],
            "rewards/margins": margin,
            "rewards/accuracies": won(
                margin, noise[pairs.chosen] + noise[pairs.rejected]
            ),  # a tie, as before the first step, is half right
            "logps/chosen": policy[pairs.chosen],
            "logps/rejected": policy[pairs.rejected],
            "length/chosen": lengths[pairs.chosen].float(),
            "length/rejected": lengths[pairs.rejected].float(),
        }
        return {name: Mean(per_prompt(value).sum(), len(batch.tree_ids)) for name, value in values.items()}


def run(spec: DpoStage, ctx: StageContext) -> None:
    """Compute the reference's log-probs, train on preferences, and warn when the chosen answers became less likely
    too."""
    stage = prepare(spec, ctx, trained)
    digest = weights_digest(stage.model) if spec.pair_loss.needs_reference else None
    references = [_reference(stage, store, digest) for store in (stage.data, stage.held_out)]
    trainer = DpoTrainer(
        stage.trainer_arguments, stage.training_loader(), stage.all_of(stage.held_out), spec, *references
    )
    stage.train_and_save(trainer, spec.samples)
    warning = both_fell(trainer.progress.first_eval, trainer.progress.last_eval)
    if warning:
        ctx.warn(warning)


def _reference(stage: TrainingRun, store: TreeStore | None, weights: str | None) -> ReferenceLogprobs | None:
    """Reference log-probs of a data set under the starting policy; None without data, or for a loss without
    reference."""
    if store is None or weights is None:
        return None
    train = stage.spec.train
    key = {"weights": weights, "data": store.digest, "dtype": train.dtype, "autocast": train.autocast}
    return reference_for(
        stage.model,
        stage.all_of(store),
        [len(store[i].branches) for i in range(len(store))],
        key=files.digest_json(key),
        cache=stage.ctx.cache / "reference",
        ranks=stage.group,
        autocast=autocast(train, stage.group.device),
        own_attention=train.layout == "padded",
        microbatch_tokens=train.microbatch_tokens if train.layout == "tree" else sys.maxsize,
    )
