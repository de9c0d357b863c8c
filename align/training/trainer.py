"""The training loop of all stages. A stage subclasses :class:`Trainer` and says what a step consists of; everything
else is here.

The optimiser step is exact. First all its micro-batches are fetched, and the items that each loss term is averaged over
(tokens, pairs, prompts) are counted over all of them and all processes. Then *sums* divided by these global counts are
back-propagated. The gradient therefore does not depend on how the step is cut into micro-batches, packed into rows, or
spread over processes.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.console import Console
from torch import Tensor, nn

from align import files
from align.batching.batch import Batch
from align.errors import EnvironmentFault, Interrupted, Problem, TrainingFault
from align.models.adapters import trainable_parameters
from align.models.placement import Placement
from align.recipe.schema import Train
from align.signals import stop_requested
from align.training.checkpoint import (
    SAVE_SECONDS,
    SAVE_SHARE,
    BestWeights,
    TensorFiles,
    newest_checkpoint,
    part_name,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from align.training.launch import Ranks
from align.training.memory import keep_freed_memory, return_freed_memory, told_with_errors
from align.training.metrics import Mean, MetricsLog, ProgressBar, add_up
from align.training.optim import (
    ParameterGroup,
    build_optimizer,
    learning_rate,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
)
from align.training.precision import autocast
from align.training.progress import BestMetric, Progress


@dataclass(frozen=True)
class LossOutput:
    """What a micro-batch contributes: a differentiable SUM for each loss term (no terms when only metrics are wanted),
    and metrics with their own counts."""

    terms: Mapping[str, Tensor]
    metrics: Mapping[str, Mean] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainerArguments:
    """The arguments that all trainers share."""

    model: nn.Module
    """The model, already on its device. Its parameters with ``requires_grad`` are trained."""
    train: Train
    """The recipe's ``train`` block."""
    work: Path
    """Folder for checkpoints and logs; a run that finds its own checkpoint there continues from it."""
    name: str
    """Name of the stage, for messages."""
    seed: int
    console: Console
    ranks: Ranks
    placement: Placement | None = None
    """How these processes hold the model; whole in each when None."""


class Trainer(ABC):
    """Base of all training stages. A stage overrides ``steps``, ``counts`` and ``loss``; it may override every other
    method without a leading underscore.

    Args:
        arguments: those that all trainers share.
        total_steps: optimiser steps from start to end, known beforehand.
    """

    term_weights: Mapping[str, float] = {}
    """Weight of each loss term; 1 when absent. A term is divided by its own global count before it is weighted."""

    best_metric: ClassVar[BestMetric] = BestMetric("loss", "lower")
    """The held-out metric by which the best weights are chosen and early stopping decides; progress lines show it."""

    def __init__(self, arguments: TrainerArguments, *, total_steps: int) -> None:
        self.train, self.ranks = arguments.train, arguments.ranks
        self.placement = arguments.placement or arguments.ranks.placement
        self.model = self.placement.wrap(arguments.model)
        self.work, self.name, self.seed = arguments.work, arguments.name, arguments.seed
        self.console, self.total_steps = arguments.console, total_steps
        self.parameters = trainable_parameters(self.model)
        self.groups = tuple(self.parameter_groups())
        if sorted(name for group in self.groups for name in group.parameters) != sorted(self.parameters):
            raise ValueError("the groups must hold every trained parameter once, and nothing else")
        self.optimizer = build_optimizer(self.groups, self.train)
        self.progress, self.best = Progress(), BestWeights(self.work, self.ranks)
        if self.ranks.device.type == "cpu":
            saves_memory = self.train.gradient_checkpointing or self.placement.parts > 1
            (return_freed_memory if saves_memory else keep_freed_memory)()
        if self.train.gradient_checkpointing:
            enable: Any = self.model.gradient_checkpointing_enable
            enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    # What a stage defines

    def parameter_groups(self) -> Sequence[ParameterGroup]:
        """Parameters with learning rates of their own, clipped apart; together all that is trained. One group by
        default."""
        return [ParameterGroup("all", self.parameters)]

    @abstractmethod
    def steps(self) -> Iterator[Sequence[Batch]]:
        """This process's micro-batches of each optimiser step, from ``self.progress.step`` on."""

    @abstractmethod
    def counts(self, batch: Batch) -> Mapping[str, int]:
        """By loss term, how many items (tokens, pairs, prompts) of this micro-batch it is averaged over."""

    @abstractmethod
    def loss(self, batch: Batch, *, held_out: bool) -> LossOutput:
        """The loss of one micro-batch, already on the device: one of :meth:`eval_batches` if ``held_out``, else of the
        training data."""

    def eval_batches(self) -> Sequence[Batch]:
        """This process's held-out micro-batches; none by default."""
        return ()

    def after_step(self, metrics: Mapping[str, float]) -> None:  # noqa: B027 - a hook; most stages have nothing to do
        """Health checks of the stage. Raise TrainingFault to stop before the step is saved."""

    # The loop

    def fit(self) -> Progress:
        """Train to the last step, or to where early stopping ends it; the model then holds the final weights.

        Raises:
            TrainingFault: the loss or the gradient is not finite; the optimiser has not moved.
            Interrupted: a signal asked to stop; a checkpoint was saved and the same command continues from it.
        """
        torch.manual_seed(self.seed * 1009 + self.ranks.rank)
        written = self.resume()
        log, bar = self._open_log(written)
        self.model.train()
        try:
            if self.progress.step == 0 and self.progress.first_eval is None:
                self._evaluate(log)
            steps = iter(self.steps())
            # Asked before every step: a run that resumes after early stopping had ended it must not take one more.
            while not self._patience_is_over() and (micro_batches := next(steps, None)) is not None:
                metrics = self.optimizer_step(micro_batches)
                self.after_step(metrics)
                self._finish_step(metrics, log, bar)
        finally:
            if log is not None:
                log.close()
            if bar is not None:
                bar.close()
        if self.train.load_best_model and self.progress.best_eval is not None:  # may be the initial weights
            self._load_weights(self.best.load(self.progress.best_step))
            self.progress.last_eval = self.progress.best_eval
        self.model.eval()
        return self.progress

    def optimizer_step(self, micro_batches: Sequence[Batch]) -> dict[str, float]:
        """One optimiser step; returns its metrics."""
        began = time.perf_counter()
        rate = learning_rate(self.train, self.progress.step, self.total_steps)
        set_learning_rate(self.optimizer, rate)
        counts = self._global_counts(micro_batches)
        outputs = []
        for batch in micro_batches:
            with told_with_errors(batch):
                output = self.forward_backward(batch, counts)
            outputs.append({**_as_means(output, self.counts(batch)), "tokens": Mean(batch.num_tokens, 1)})
            del output  # what is left of its graph: with checkpointing the embedded tokens and their gradient
        norms = self._reduce_and_clip()
        sums = self._sum_over_ranks(outputs)
        metrics = self.mean_values(sums)
        metrics |= {**norms, "learning_rate": rate}
        self._refuse_non_finite(metrics, micro_batches)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        tokens = int(sums["tokens"].total)
        seconds = time.perf_counter() - began
        self.progress.step += 1
        self.progress.tokens += tokens
        self.progress.seconds += seconds
        return metrics | {"tokens": tokens, "step_seconds": seconds, "tokens_per_second": tokens / seconds}

    def forward_backward(self, batch: Batch, counts: Mapping[str, float]) -> LossOutput:
        """Compute one micro-batch's loss and add the gradient of its share of the step's loss. ``counts`` are those of
        the whole step."""
        output = self.forward(batch, held_out=False)
        if output.terms:
            self.weighted(output.terms, counts).backward()  # type: ignore[no-untyped-call]
        return output

    def forward(self, batch: Batch, *, held_out: bool) -> LossOutput:
        """:meth:`loss` of a micro-batch, in the precision of the recipe and on this process's device."""
        with self.autocast():
            return self.loss(batch.to(self.ranks.device), held_out=held_out)

    def _reduce_and_clip(self) -> dict[str, float]:
        """Complete the step's gradient over all processes and clip each group's. Returns the gradient norm before
        clipping, and that of each group when there are several."""
        groups = {group.name: group.parameters.values() for group in self.groups}
        norms = self.placement.reduce_and_clip(self.parameters, groups, self.train.max_grad_norm)
        if len(norms) == 1:
            return {"grad_norm": norms.popitem()[1]}
        return {"grad_norm": math.hypot(*norms.values()), **{f"grad_norm/{name}": norm for name, norm in norms.items()}}

    def autocast(self) -> AbstractContextManager[None]:
        """A context in which matrix products have the precision that the recipe asks for."""
        return autocast(self.train, self.ranks.device)

    def _global_counts(self, micro_batches: Sequence[Batch]) -> dict[str, float]:
        local = add_up({name: Mean(n, 0) for name, n in self.counts(batch).items()} for batch in micro_batches)
        return {name: float(mean.total) for name, mean in add_up(self.ranks.gather(local)).items()}

    def weighted(self, terms: Mapping[str, Tensor], counts: Mapping[str, float]) -> Tensor:
        """The share that these summed terms have in the step's loss: each divided by its global count, then
        weighted."""
        parts = [
            self.term_weights.get(name, 1.0) * total / counts[name] for name, total in terms.items() if counts[name]
        ]
        return torch.stack(parts).sum()

    def _sum_over_ranks(self, outputs: Sequence[Mapping[str, Mean]]) -> dict[str, Mean]:
        return add_up(self.ranks.gather(add_up(outputs)))

    def mean_values(self, sums: Mapping[str, Mean]) -> dict[str, float]:
        """Means by name; ``loss`` is the weighted sum of the terms (named ``loss/TERM`` when there are several)."""
        values = {name: mean.value for name, mean in sums.items() if name != "tokens"}
        terms = {name.removeprefix("loss/"): value for name, value in values.items() if name.startswith("loss/")}
        if len(terms) == 1:
            values = {name: value for name, value in values.items() if not name.startswith("loss/")}
        return {"loss": sum(self.term_weights.get(name, 1.0) * value for name, value in terms.items()), **values}

    def _refuse_non_finite(self, metrics: Mapping[str, float], micro_batches: Sequence[Batch]) -> None:
        bad = [name for name in ("loss", "grad_norm") if not _finite(metrics[name])]
        if not bad:
            return
        ids = [
            tree for part in self.ranks.gather([t for batch in micro_batches for t in batch.tree_ids]) for tree in part
        ]
        step = self.progress.step + 1
        if self.ranks.first:
            report = {"step": step, "metrics": {name: str(value) for name, value in metrics.items()}, "examples": ids}
            files.write_json(self.work / "nan.json", report)
        raise TrainingFault(
            f"{self.name}: {' and '.join(bad)} not finite at step {step} ({metrics[bad[0]]}); the optimiser has not"
            f" moved; examples in {self.work / 'nan.json'}",
            hint="lower learning_rate, or look at the examples; earlier checkpoints are intact",
        )

    def _finish_step(self, metrics: dict[str, float], log: MetricsLog | None, bar: ProgressBar | None) -> None:
        """Log, evaluate, save, and stop when a signal asked for it."""
        step, last = self.progress.step, self.progress.step == self.total_steps
        if log is not None and bar is not None:
            log.write(step, metrics)
            bar.update(step, metrics)
        if last or (self.train.eval_steps and step % self.train.eval_steps == 0):
            self._evaluate(log)
        due = time.monotonic() - self._saved_at >= max(SAVE_SECONDS, self._saving / SAVE_SHARE)
        asked = self.ranks.gather((stop_requested(), due))
        signum = next((s for s, _ in asked if s), None)
        if signum is not None or (self.train.save_steps and step % self.train.save_steps == 0 and not last):
            self.save(log, asked=True)
        elif asked[0][1] and not last:  # the first process's clock decides: all save after the same step
            self.save(log, asked=False)
        if signum is not None:
            raise Interrupted(
                signum, f"{self.name}: stopped at step {step} of {self.total_steps}; saved; the same command continues"
            )

    # Held-out data

    def evaluate(self) -> dict[str, float]:
        """Metrics on the held-out data, named as in training; empty without held-out data. They do not depend on the
        batch size or the number of processes."""
        self.model.eval()
        outputs = []
        with torch.no_grad():
            for batch in self.eval_batches():
                with told_with_errors(batch):
                    outputs.append(_as_means(self.forward(batch, held_out=True), self.counts(batch)))
        self.model.train()
        sums = self._sum_over_ranks(outputs)
        return self.mean_values(sums) if sums else {}

    def _evaluate(self, log: MetricsLog | None) -> None:
        values = self.evaluate()
        if not values:
            return
        progress = self.progress
        progress.last_eval = values
        progress.first_eval = progress.first_eval or values
        if self.best_metric.improved(values, progress.best_eval):
            progress.best_step, progress.evals_without_improvement = progress.step, 0
            progress.best_eval = values
            if self.train.load_best_model:
                self.best.save(progress.step, self._own_part(weights=self.parameters))
        else:
            progress.evals_without_improvement += 1
        if log is not None:
            log.write(progress.step, {f"eval/{name}": value for name, value in values.items()})
            name = self.best_metric.name
            words = f"held-out {name} {values[name]:.4f}"
            self.console.print(f"{self.name}  step {progress.step}/{self.total_steps}  {words}", highlight=False)

    def _patience_is_over(self) -> bool:
        patience = self.train.early_stopping_patience
        return patience is not None and self.progress.evals_without_improvement >= patience

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What else a stage must save to continue bit-equal, besides weights, optimiser, RNG and progress. JSON
        values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - most stages keep no state of their own
        """Put back what :meth:`state_dict` returned."""

    def missing(self, state: Mapping[str, Any]) -> list[Problem]:
        """What is wrong with other files of the work folder that resuming from a checkpoint with this state would read;
        empty when nothing is."""
        progress = Progress.of(state["progress"])
        return (
            self.best.damage(progress.best_step)
            if self.train.load_best_model and progress.best_eval is not None
            else []
        )

    def save(self, log: MetricsLog | None, *, asked: bool) -> None:
        """Save a checkpoint. If it cannot be written, a run that was ``asked`` for it by the recipe or a signal stops;
        otherwise a note is printed and the run goes on."""
        began = time.monotonic()
        tensors = self._own_part(weights=self.parameters, optimizer=optimizer_tensors(self.optimizer, self.parameters))
        states = self.ranks.gather(rng_state())
        state: dict[str, Any] = {}
        if self.ranks.first:
            tensors |= {f"rng-{rank}": of_rank for rank, of_rank in enumerate(states)}
            state = {"progress": asdict(self.progress), "stage": self.state_dict(), "world": self.ranks.world}
            state["metrics"] = log.digest() if log else ""
        folder, keep = self.work / "checkpoints", self.train.save_total_limit
        try:
            save_checkpoint(folder, self.progress.step, tensors, state, keep=keep, ranks=self.ranks)
            self.best.forget(self.progress.step)
        except EnvironmentFault as fault:
            if asked:
                raise
            if self.ranks.first:
                self.console.print(
                    f"{self.name}  note: no checkpoint at step {self.progress.step}: {fault}", highlight=False
                )
        self._saved_at = time.monotonic()
        self._saving = self._saved_at - began
        self.ranks.barrier()

    def resume(self) -> str | None:
        """Resume from the newest checkpoint, whichever processes saved it, whole or in parts. Returns the digest of the
        metrics written up to it; None when there is no checkpoint."""
        self._saved_at, self._saving = time.monotonic(), 0.0
        checkpoint = newest_checkpoint(
            self.work / "checkpoints", ["weights", "optimizer", "rng-0"], self.missing, self.ranks
        )
        if checkpoint is None:
            return None
        state = checkpoint.state()
        self.progress = Progress.of(state["progress"])
        self.load_state_dict(state["stage"])
        self._load_weights(checkpoint.saved("weights"))
        moments = self.placement.read(checkpoint.saved("optimizer"), self.parameters)
        load_optimizer_tensors(self.optimizer, self.parameters, moments)
        line = f"{self.name}  continues from step {self.progress.step} of {self.total_steps}"
        if state["world"] == self.ranks.world:
            set_rng_state(checkpoint.tensors(f"rng-{self.ranks.rank}"))
        else:
            # A process that was not there has drawn nothing yet; none may draw again what it drew before this step
            torch.manual_seed((self.seed * 1009 + self.ranks.rank) * 1009 + self.progress.step)
            one = "" if state["world"] == 1 else "es"
            line += (
                f", saved by {state['world']} process{one}: with {self.ranks.world} the same up to rounding and dropout"
            )
        if self.ranks.first:
            self.console.print(line, highlight=False)
        return str(state["metrics"])

    def _own_part(self, **groups: Mapping[str, Tensor]) -> dict[str, Mapping[str, Tensor]]:
        """What this process saves of groups of tensors that all processes hold, by the names of its files."""
        part, parts = self.placement.part, self.placement.parts
        if part is None:
            return {}
        return {part_name(name, part, parts): self.placement.own_part(group) for name, group in groups.items()}

    def _load_weights(self, saved: TensorFiles) -> None:
        self.placement.load(self.parameters, self.placement.read(saved, self.parameters))

    def _open_log(self, written: str | None) -> tuple[MetricsLog | None, ProgressBar | None]:
        if not self.ranks.first:
            return None, None
        log = MetricsLog(
            self.work / "metrics.jsonl",
            resumed_at=None if written is None else self.progress.step,
            written=written,
            report_to=list(self.train.report_to),
            run_name=self.name,
            config=self.train.model_dump(),
        )
        return log, ProgressBar(self.console, self.name, self.total_steps, self.progress.step)


def _as_means(output: LossOutput, counts: Mapping[str, int]) -> dict[str, Mean]:
    """Loss terms (as ``loss/TERM``) and metrics of one micro-batch, detached."""
    terms = {f"loss/{name}": Mean(total.detach(), counts[name]) for name, total in output.terms.items()}
    return {**terms, **output.metrics}


def _finite(value: float) -> bool:
    return value - value == 0.0
