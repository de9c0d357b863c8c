"""The plan of one training stage: steps, memory, disk and time, with the source of each number, and problems with
memory and disk."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from align.errors import Problem
from align.models.files.folder import read_folder
from align.models.files.starts import require_start
from align.planning.data_size import measure
from align.planning.planner import DataSize, Derived, Planner, PlanRow, ToPlan
from align.recipe.kinds.reward import RewardStage
from align.recipe.load import LoadedRecipe
from align.recipe.schema import Lora, Train
from align.sizing import needs
from align.sizing.machine import processes_here
from align.sizing.moments import Pass, Term, trained_parameters
from align.sizing.needs import count, duration
from align.sizing.shapes import Shape
from align.terminal import byte_size


class Training:
    """The planned numbers of a stage that trains."""

    most: ClassVar[str] = "about"
    """Word before the time: "about" for an estimate, "at most" for a bound."""
    not_counted: ClassVar[str] = "loading, evaluation, samples (and for dpo the reference) come on top"
    """What the time does not include."""

    def __init__(self, stage: ToPlan, data: DataSize) -> None:
        spec = stage.spec
        self.train: Train = spec.train
        self.lora: Lora | None = getattr(spec, "lora", None)
        self.data, self.origin, self.machine = data, stage.origin, stage.machine
        hardware = stage.loaded.recipe.hardware
        described = hardware is not None and not stage.machine.here and hardware.gpus
        self.of_machine = described or processes_here(stage.processes)
        self.processes, self.measured_speed = stage.processes, stage.measured_speed
        self.shape = stage.origin.shape
        if self.shape is not None and spec.produces == "reward_model":
            self.shape = dataclasses.replace(self.shape, lm_head=False)
        self.spec = spec
        self.terms = self._terms(self._largest())
        self.memory = sum(term.amount for term in self.terms) if self.terms else None
        self.disk = self._disk()

    def _terms(self, largest: Pass) -> list[Term]:
        """The terms of the memory; empty if the model's shape is unknown."""
        if self.shape is None:
            return []
        run: dict[str, Any] = {"processes": self.processes, "of_machine": self.of_machine, "largest": largest}
        return needs.memory(self.shape, self.train, self.lora, device=self.machine.device, **run)

    def _disk(self) -> list[Term]:
        if self.shape is None:
            return []
        return needs.disk(self.shape, self.train, self.lora, tokens=self.data.tokens, dequantises=self.origin.gguf)

    def _largest(self, *, certain: bool = False) -> Pass:
        """The largest forward pass, as far as known.

        Args:
            certain: ignore estimates that would make it larger.
        """
        data, limit = self.data, self.train.microbatch_tokens
        if data.at_once is not None:
            return Pass(data.at_once, self._why(data.at_once))
        filled = limit if data.tokens is None else min(limit, data.tokens)
        longest = min(data.longest or 0, self._most_tokens_of_a_row())
        if longest > limit and not certain:
            return Pass(self._padded(longest), "the longest line, estimated: a row is never cut for a forward pass")
        return Pass(
            self._padded(filled), "train.microbatch_tokens" if filled == limit else "all of the data, estimated"
        )

    def _why(self, tokens: int) -> str:
        """The reason why a forward pass has so many tokens, if they were counted."""
        if tokens <= self._padded(1):
            return "train.microbatch_tokens"
        if self.data.longest is not None and self.data.longest > self.train.microbatch_tokens:
            return "the longest row with its answers, which is never cut for a forward pass"
        return "the largest that the data fill of train.microbatch_tokens"

    def _padded(self, tokens: int) -> int:
        from align.batching.tree import row_multiple

        multiple = row_multiple(self.train.layout, self.train.microbatch_tokens, self.machine.device)
        return -(-max(1, tokens) // multiple) * multiple

    def _most_tokens_of_a_row(self) -> int:
        """Upper bound of a row's tokens: longer answers are cut or left out, but a row of preferences may have several
        answers of that length."""
        longest: int = getattr(self.spec, "max_length", self.train.microbatch_tokens)
        return longest if self.spec.record_types().get("data") == "conversation" else 2 * longest

    def rows(self) -> list[PlanRow]:
        """All rows of the plan, in order."""
        shape = self.shape
        rows = [PlanRow("starts from", self.origin.name, self.origin.source), *self._data_rows(), *self._step_rows()]
        if shape is None:
            return [*rows, PlanRow("parameters, memory, disk, time", "unknown", self.origin.source)]
        rows.append(self._trained_row(shape))
        rows.append(
            PlanRow(
                "peak memory",
                f"{byte_size(self.memory or 0)} a process",
                f"estimate for {self.machine.device}, the sum of:",
            )
        )
        rows += [PlanRow(f"  {term.name}", byte_size(term.amount), term.how) for term in self.terms]
        rows.append(PlanRow("disk", byte_size(sum(term.amount for term in self.disk)), "at its fullest, the sum of:"))
        rows += [PlanRow(f"  {term.name}", byte_size(term.amount), term.how) for term in self.disk]
        return [*rows, self._time_row(shape)]

    def _data_rows(self) -> list[PlanRow]:
        data = self.data
        if data.tokens is None:
            return [PlanRow("data", "unknown", data.source)]
        parts = [f"{data.tokens:,} tokens"]
        parts += [f"{data.targets:,} of them trained on"] if data.targets is not None else []
        parts += [f"{data.examples:,} examples"] if data.examples is not None else []
        return [PlanRow("data", ", ".join(parts), data.source)]

    def _step_rows(self) -> list[PlanRow]:
        train, steps, seen = self.train, *self._steps_and_tokens()
        if train.batch_size is not None:
            size, source = f"{train.batch_size} examples", "train.batch_size"
        else:
            size = f"{train.tokens_per_step or 4096:,} tokens at most"
            source = "train.tokens_per_step" if train.tokens_per_step else "default of train.tokens_per_step"
        rows = [PlanRow("a step takes", size, source)]
        rows.append(PlanRow("steps", "unknown" if steps is None else f"{steps:,}", self._steps_source()))
        if seen is not None and steps:
            rows.append(PlanRow("tokens in all", f"{seen:,}", f"{seen / steps:,.0f} a step on average"))
        micro = f"{train.microbatch_tokens:,} tokens x {self.processes} process{'es' * (self.processes > 1)}"
        return [*rows, PlanRow("a forward pass takes", micro, f"train.microbatch_tokens; on {self.machine.name}")]

    def _steps_source(self) -> str:
        words = f"train.epochs {self.train.epochs:g}"
        return f"{words}, at most train.max_steps {self.train.max_steps}" if self.train.max_steps else words

    def _steps_and_tokens(self) -> tuple[int | None, int | None]:
        """The number of optimiser steps and of the tokens in them, counted or computed from averages."""
        data, train = self.data, self.train
        if data.steps is not None:
            return data.steps, data.seen
        if data.tokens is None:
            return train.max_steps, None
        tokens = data.tokens * train.epochs
        if train.batch_size is None:
            steps = math.ceil(tokens / (train.tokens_per_step or 4096))
        elif data.examples is None:
            return train.max_steps, None
        else:
            steps = math.ceil(data.examples * train.epochs / train.batch_size)
        kept = min(steps, train.max_steps or steps)
        return kept, int(tokens * kept / steps) if steps else 0

    def _trained_row(self, shape: Shape) -> PlanRow:
        trained = trained_parameters(shape, self.lora)
        if self.lora is None:
            return PlanRow("trains", f"{count(trained)} parameters, all of them", self.origin.shape_source)
        named = shape.linears if isinstance(self.lora.target_modules, str) else self.lora.target_modules
        targets = ", ".join(sorted(named)) + f" in {shape.layers} layers"
        share = f"{trained / shape.parameters:.2%} of {count(shape.parameters)}"
        return PlanRow(
            "trains",
            f"{count(trained)} parameters, {share}",
            f"LoRA of rank {self.lora.rank} on {targets}; {self.origin.shape_source}",
        )

    def _time_row(self, shape: Shape) -> PlanRow:
        seen = self._steps_and_tokens()[1]
        units = self.machine.units
        assumed = needs.tokens_per_second(shape, self.train, self.lora, device=self.machine.device, units=units)
        speed = self.measured_speed if self.measured_speed and self.machine.here else assumed
        what = (
            "the last run's speed"
            if speed is self.measured_speed
            else f"assumed: {needs.assumed_speed(self.machine.device)} x {units}"
        )
        source = f"estimate: {speed:,.0f} tokens/s ({what}); {self.not_counted}"
        return PlanRow("time", "unknown" if seen is None else f"{self.most} {duration(seen / speed)}", source)

    # What cannot fit

    def problems(self, loaded: LoadedRecipe, name: str) -> Iterator[Problem]:
        """Memory and disk problems that are certain: even without the allocator's slack more is needed than the machine
        has."""
        budget, key = self.machine.memory, f"stages.{name}.train"
        together = self.processes if self.machine.device == "cpu" else 1
        largest = self._largest(certain=True)
        terms = [term for term in self._terms(largest) if term.name != "slack"]
        needed = sum(term.amount for term in terms) * together
        if budget is not None and needed > budget:
            parts = sorted(terms, key=lambda term: -term.amount)[:3]
            words = [f"{term.name} {byte_size(together * term.amount)}" for term in parts]
            words += [f"all else {byte_size(needed - together * sum(term.amount for term in parts))}"]
            each = f" ({together} processes)" if together > 1 else ""
            message = (
                f"needs at least {byte_size(needed)} of memory{each}: {', '.join(words)}; {self.machine.name} has"
                f" {byte_size(budget)}"
            )
            yield loaded.problem(key, message, self._memory_hint(largest, budget / together))
        space = sum(term.amount for term in self.disk)
        if self.machine.disk is not None and space > self.machine.disk:
            message = f"needs about {byte_size(space)} of disk, {byte_size(self.machine.disk)} are free"
            yield loaded.problem(key, message, "lower `save_total_limit`, or give --runs-dir a larger disk")

    def _memory_hint(self, largest: Pass, budget: float) -> str:
        def needed(tokens: int) -> float:
            return sum(term.amount for term in self._terms(Pass(tokens, "")) if term.name != "slack")

        room = needs.most_tokens(needed, budget, most=largest.tokens)
        if room:
            longest = self.data.longest or 0
            if longest > room:
                smaller = (
                    f"lower `max_length`: there is room for {room:,} tokens at once, and the longest row has"
                    f" {longest:,}"
                )
            else:
                smaller = f"lower `train.microbatch_tokens` to {room}"
            return (
                smaller
                if self.train.gradient_checkpointing
                else f"{smaller}, or set `train.gradient_checkpointing: true`"
            )
        if self.lora is None and self.processes > 1 and self.train.sharding == "none":
            return "set `train.sharding: full` to divide the model among the processes, or `lora: {}` for adapters only"
        if self.lora is None:
            return "set `lora: {}` to train adapters only, or `train.dtype: bf16`"
        return "set `train.dtype: bf16`" if self.train.dtype == "fp32" else "a smaller model, or a GPU with more memory"


class TrainingPlanner(Planner):
    """Plans a stage with a ``train`` block, estimating its ``data`` from their size. For a stage without that block it
    plans nothing."""

    counts: ClassVar[bool] = False
    """Whether the data are encoded to count them, as :mod:`align.stages.shared.training_data` reads them."""
    streams: ClassVar[bool] = False
    """The stage cuts a tree that is much larger than a micro-batch."""

    def plan(self, stage: ToPlan) -> Derived:
        """See :meth:`Planner.plan`."""
        if not isinstance(getattr(stage.spec, "train", None), Train):
            return Derived()
        training = self.training(stage)
        return Derived(tuple(training.rows()), training.memory, tuple(training.problems(stage.loaded, stage.name)))

    def training(self, stage: ToPlan) -> Training:
        """The planned numbers of the stage."""
        known = hasattr(stage.spec, "data")
        return Training(
            stage, measure(stage, counts=self.counts, streams=self.streams) if known else DataSize("unknown")
        )


class CountedPlanner(TrainingPlanner):
    """Plans a stage whose data :mod:`align.stages.shared.training_data` reads."""

    counts = True


class DpoPlanner(CountedPlanner):
    """Plans preference optimisation."""

    streams = True


class RewardPlanner(CountedPlanner):
    """Plans the training of a reward model."""

    def look_at_start(self, spec: RewardStage, folder: Path) -> None:
        """Raises InputError for a head that cannot be kept, because it learned other grades."""
        require_start(read_folder(folder, None), spec.grades)
