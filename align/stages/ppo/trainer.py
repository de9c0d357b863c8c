"""PPO's trainer: an iteration samples and scores answers, saves them as an experience, then its optimiser steps train
on it.

What happens in one iteration:

1. the engine gets the policy's weights, which is checked, and answers the iteration's prompts;
2. the answers are scored. The trainer computes the tokens' log-probs under the policy that sampled them ("old") and
   under the reference, and the values, all at the sampling temperature. The engine's log-probs are only compared with
   the trainer's;
3. reward = score - the reference's score on that prompt - KL penalty, token by token; advantages by the estimator;
4. all of this is saved, then ``ppo_epochs`` x ``minibatches`` optimiser steps follow. Policy and value model have
   separate micro-batches, learning rates and gradient clipping. Losses are means over the tokens of a step's answers.

When ``target_kl`` ends an iteration early, the step count jumps to the iteration's end. Every iteration therefore
begins at the same step in every run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align import files
from align.batching.batch import Batch
from align.errors import Problem, TrainingFault
from align.functional.advantages import k3
from align.functional.losses import token_nll
from align.functional.policy_losses import policy_clipped, ppo_policy_loss, ppo_value_loss, value_clipped
from align.models.compute.forward import batch_logprobs, batch_logprobs_and_entropy
from align.models.scalar.heads import token_values
from align.rollout.engine import Sampling
from align.sealed import damage
from align.stages.ppo import health
from align.stages.ppo.collect import PpoContext, make_experience
from align.stages.ppo.experience import (
    Experience,
    PolicyBatch,
    ValueBatch,
    folder_of,
    is_whole,
    minibatch_plan,
    training_batches,
)
from align.stages.ppo.health import Symptom
from align.stages.ppo.report import iteration_lines
from align.stages.ppo.rollouts import parquet, rows_of
from align.training.metrics import Mean, add_up
from align.training.optim import ParameterGroup
from align.training.progress import BestMetric
from align.training.trainer import LossOutput, Trainer, TrainerArguments

_log = logging.getLogger("align")


class PpoTrainer(Trainer):
    """Trains with PPO and related methods."""

    best_metric = BestMetric("reward", "higher")

    def __init__(self, arguments: TrainerArguments, parts: PpoContext) -> None:
        spec = parts.spec
        self.parts, self.spec, self.models = parts, spec, parts.models
        super().__init__(arguments, total_steps=spec.total_steps)
        if parts.reference is not None:
            self.placement.wrap(parts.reference)
        self.term_weights = {"sft": spec.sft_weight, "entropy": spec.entropy_weight}
        self.own_attention = spec.train.layout == "padded"
        self.coefficient = spec.kl_coefficient
        """Weight of the KL penalty in the next iteration."""
        self.history: list[Mapping[str, float]] = []
        """Summaries of the iterations so far."""
        self.sft_losses: list[float] = []
        """Mean loss on ``sft_data`` of each iteration so far."""
        self.seconds: dict[str, float] = {}
        """Seconds by phase, over all iterations."""
        self.unhealthy: dict[str, dict[str, Any]] = {}
        """By kind of symptom: the first message, its step, and how often it occurred."""
        self.trained: list[dict[str, float]] = []
        """Metrics of this iteration's finished steps, of which the mean will be reported."""
        self._largest: list[Tensor] = []

    @property
    def rollouts_folder(self) -> Path:
        """The folder into which the answers are written."""
        return self.work / "rollouts"

    def parameter_groups(self) -> Sequence[ParameterGroup]:
        """Policy and value model."""
        rates = {"policy": 1.0, "value": self.spec.value_learning_rate / self.spec.train.learning_rate}
        return [ParameterGroup(name, members, rates[name]) for name, members in self.models.trainable().items()]

    # The loop

    def steps(self) -> Iterator[Sequence[Batch]]:
        """For each iteration, make the experience, then yield its micro-batches. A run that resumes inside an iteration
        uses the saved experience."""
        per = self.spec.steps_per_iteration
        # Experiences of later iterations than the checkpoint's were made by a policy that this run will not have.
        self._forget_experience(lambda iteration: iteration > self.progress.step // per)
        while self.progress.step < self.total_steps:
            iteration, begin = divmod(self.progress.step, per)
            experience = self._experience(iteration, inside=begin > 0)
            plan = minibatch_plan(len(experience.answers.names), self.spec, self.seed, iteration)
            pieces = experience.answers.pieces(self.train.microbatch_tokens, self.train.layout)
            loader = self.parts.loader(pieces.tree, pieces.plan(plan))
            for number in range(begin, per):
                batches = training_batches(experience, pieces, loader.step(number))
                yield [*batches, *(self.parts.sft.step(self.progress.step) if self.parts.sft else [])]
                if self.progress.step == (iteration + 1) * per:
                    break

    def _experience(self, iteration: int, *, inside: bool) -> Experience:
        folder = folder_of(self.work, iteration)
        if inside or self.ranks.broadcast_object(self.ranks.first and is_whole(folder)):
            experience = Experience.load(folder)
        else:
            experience = make_experience(
                self.parts,
                iteration,
                step=self.progress.step,
                coefficient=self.coefficient,
                rollouts=self.rollouts_folder,
            )
            if self.ranks.first:
                experience.save(folder)
            needed = {step // self.spec.steps_per_iteration for step in self._checkpoint_steps()} | {iteration}
            self._forget_experience(lambda number: number not in needed)
        self.coefficient = experience.next_coefficient
        self.history[iteration:] = [experience.summary]
        if not inside:  # otherwise it was checked before the checkpoint that this run resumes from
            self._judge(health.of_rollouts(self.spec, self.history))
        return experience

    def _checkpoint_steps(self) -> list[int]:
        return [int(folder.name.removeprefix("step-")) for folder in (self.work / "checkpoints").glob("step-*")]

    def _forget_experience(self, unneeded: Callable[[int], bool]) -> None:
        if self.ranks.first:
            for folder in sorted((self.work / "experience").glob("iteration-*")):
                if unneeded(int(folder.name.removeprefix("iteration-"))):
                    files.remove_folder(folder)
        self.ranks.barrier()

    # A step

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """Number of tokens of answers, or of conversations."""
        if isinstance(batch, PolicyBatch):
            return {"policy": batch.num_targets, **({"entropy": batch.num_targets} if self.spec.entropy_weight else {})}
        if isinstance(batch, ValueBatch):
            return {"value": batch.num_targets}
        return {"sft": batch.num_targets} if self.spec.sft_weight else {}

    def loss(self, batch: Batch, *, held_out: bool) -> LossOutput:
        """Summed over tokens: the clipped policy loss and the entropy bonus, or the clipped value loss, or the loss on
        conversations."""
        if isinstance(batch, PolicyBatch):
            return self._policy_loss(batch)
        if isinstance(batch, ValueBatch):
            return self._value_loss(batch)
        self.models.use("policy")
        with nullcontext() if self.spec.sft_weight else torch.no_grad():
            nll = token_nll(batch_logprobs(self.models.policy, batch, own_attention=self.own_attention)).sum()
        return LossOutput(
            {"sft": nll} if self.spec.sft_weight else {}, {"sft_loss": Mean(nll.detach(), batch.num_targets)}
        )

    def _policy_loss(self, batch: PolicyBatch) -> LossOutput:
        spec, count = self.spec, batch.num_targets
        self.models.use("policy")
        settings: dict[str, Any] = {"temperature": spec.temperature, "own_attention": self.own_attention}
        terms: dict[str, Tensor] = {}
        if spec.entropy_weight:
            logprobs, entropy = batch_logprobs_and_entropy(self.models.policy, batch, **settings)
            terms["entropy"] = -entropy.sum()
        else:
            logprobs = batch_logprobs(self.models.policy, batch, **settings)
        losses = batch.weights * ppo_policy_loss(logprobs, batch.old, batch.advantages, spec.clip)
        log_ratio = (logprobs - batch.old).detach()
        if count:
            self._largest.append(log_ratio.abs().max())
        metrics = {
            "ratio": Mean(log_ratio.exp().sum(), count),
            "kl_from_old": Mean(k3(-log_ratio).sum(), count),  # KL of the old policy, which sampled, from the new one
            "clip_fraction": Mean(policy_clipped(logprobs, batch.old, batch.advantages, spec.clip).sum(), count),
        }
        return LossOutput({"policy": losses.sum(), **terms}, metrics)

    def _value_loss(self, batch: ValueBatch) -> LossOutput:
        value, clip = self.models.value, self.spec.value_clip
        assert value is not None, "only with a value model are there batches for it"
        self.models.use("value")
        values = token_values(value, batch, own_attention=self.own_attention)
        losses = ppo_value_loss(values, batch.old, batch.returns, clip)
        held = 0.0 if clip is None else value_clipped(values, batch.old, batch.returns, clip).sum()
        return LossOutput({"value": losses.sum()}, {"value_clip_fraction": Mean(held, batch.num_targets)})

    def optimizer_step(self, micro_batches: Sequence[Batch]) -> dict[str, float]:
        """As in :class:`Trainer`; the metrics of an iteration's first step include those of its samples."""
        begins = self.progress.step % self.spec.steps_per_iteration == 0
        self._largest = []
        metrics = super().optimizer_step(micro_batches)
        self.models.use("policy")
        largest = float(torch.stack(self._largest).max()) if self._largest else 0.0
        metrics["ratio/largest_log"] = max(self.ranks.gather(largest))
        return metrics | ({f"rollout/{name}": value for name, value in self.history[-1].items()} if begins else {})

    # After a step

    def after_step(self, metrics: Mapping[str, float]) -> None:
        """Check health and target KL; at the end of an iteration print its lines."""
        per = self.spec.steps_per_iteration
        iteration, done = divmod(self.progress.step - 1, per)
        self.parts.clock.add("train", metrics["step_seconds"])
        self.trained.append({name: metrics[name] for name in ("clip_fraction", "sft_loss") if name in metrics})
        if done == 0:
            self._judge(health.of_first_step(self.spec, metrics))
        if self.spec.target_kl is not None and metrics["kl_from_old"] > self.spec.target_kl:
            self.progress.step = (iteration + 1) * per
        if self.progress.step == (iteration + 1) * per:
            self._finish_iteration(iteration)

    def _finish_iteration(self, iteration: int) -> None:
        steps, self.trained = self.trained, []
        clipped = sum(step["clip_fraction"] for step in steps) / len(steps)
        if self.parts.sft is not None:
            self.sft_losses[iteration:] = [sum(step["sft_loss"] for step in steps) / len(steps)]
        lap = self.parts.clock.take()
        for phase, seconds in lap.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        for line in iteration_lines(iteration, self.spec.iterations, self.history[-1], lap, clipped, self.sft_losses):
            self.console.print(f"{self.name}  {line}", highlight=False, soft_wrap=True)
        self._judge(health.of_training(self.spec, self.history, clipped, self.sft_losses))

    def _judge(self, findings: Sequence[Symptom]) -> None:
        """Print each kind of symptom once; if the recipe says so, stop before the step is saved."""
        for finding in findings:
            known = self.unhealthy.setdefault(
                finding.kind, {"message": finding.message, "step": self.progress.step, "times": 0}
            )
            known["times"] += 1
            if known["times"] == 1:
                self.console.print(f"{self.name}  unhealthy: {finding.message}", highlight=False, soft_wrap=True)
        if findings and self.spec.on_unhealthy == "stop":
            hint = (
                "the last checkpoint is from before; with another bound under `health` the same command goes on from it"
            )
            raise TrainingFault(
                f"{self.name}: unhealthy at step {self.progress.step}: {findings[0].message}", hint=hint
            )

    # Held-out prompts

    def evaluate(self) -> dict[str, float]:
        """Greedy answers to the held-out prompts: ``reward`` is their mean score.

        Also their mean length and the share that ends, and the loss on held-out conversations. Empty without held-out
        prompts. The answers are written beside the rollouts.
        """
        parts, prompts = self.parts, self.parts.eval_prompts
        if not prompts:
            return {}
        self.model.eval()
        with parts.clock.stopped():
            parts.rollouts.sync(self.progress.step)
            samples = parts.rollouts.sample(prompts, Sampling(self.spec.max_new_tokens, temperature=0.0), -2)
        answers = [of_prompt[0] for of_prompt in samples]
        reward = sum(one.score for one in answers) / len(answers)
        values = {
            "reward": reward,
            "length": sum(sum(one.trajectory.mask) for one in answers) / len(answers),
            "finished": sum(one.trajectory.finished for one in answers) / len(answers),
        }
        with torch.no_grad():
            outputs = [self.forward(batch, held_out=True).metrics for batch in parts.eval_sft]
        values |= {name: mean.value for name, mean in add_up(self.ranks.gather(add_up(outputs))).items()}
        if self.ranks.first:
            rows = rows_of(parts.rollouts.encoder, prompts, samples, {"step": self.progress.step})
            path = files.make_folder(self.rollouts_folder) / f"held-out-{self.progress.step:08d}.parquet"
            files.atomic_write(path, parquet(rows))
        self.model.train()
        return values

    # Checkpoints

    _KEPT = ("coefficient", "history", "sft_losses", "trained", "seconds", "unhealthy")

    def state_dict(self) -> dict[str, Any]:
        """KL coefficient, history, counts, and the digests of the answers' files."""
        written = {path.name: files.sha256_file(path) for path in sorted(self.rollouts_folder.glob("*.parquet"))}
        return {**{name: getattr(self, name) for name in self._KEPT}, "written": written}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` returned. Files of answers that were damaged since are removed; they are
        only for people to read."""
        for name in self._KEPT:
            setattr(self, name, state[name])
        if self.ranks.first:
            for name, digest in state["written"].items():
                path = self.rollouts_folder / name
                if not path.is_file() or files.sha256_file(path) != digest:
                    path.unlink(missing_ok=True)
                    _log.warning("%s is damaged or missing: the report does without these answers", path)

    def missing(self, state: Mapping[str, Any]) -> list[Problem]:
        """As in :class:`Trainer`; inside an iteration also its experience, which cannot be made again."""
        iteration, begun = divmod(int(state["progress"]["step"]), self.spec.steps_per_iteration)
        return [*super().missing(state), *(damage(folder_of(self.work, iteration)) if begun else [])]
