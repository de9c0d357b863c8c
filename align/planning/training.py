"""The plan of one training stage: steps, memory, disk and time, with where each number comes from, and what of it
cannot fit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from align.errors import Problem
from align.planning import ppo
from align.planning.data_size import Amount
from align.planning.starting_model import Origin
from align.recipe.kinds.ppo import PpoStage
from align.recipe.load import LoadedRecipe
from align.recipe.schema import Lora, Stage, Train
from align.sizing import needs, ppo_needs
from align.sizing.machine import Machine
from align.sizing.needs import Pass, Term, count, duration, gigabytes
from align.sizing.shapes import Shape


@dataclass(frozen=True)
class Row:
    """One value of a plan."""

    name: str
    value: str
    source: str
    """Where it comes from."""


class Training:
    """The numbers of a stage that trains."""

    def __init__(
        self, spec: Stage, origin: Origin, data: Amount, machine: Machine, processes: int, measured_speed: float | None
    ) -> None:
        self.train: Train = getattr(spec, "train")  # noqa: B009 - a field that not every stage has
        self.lora: Lora | None = getattr(spec, "lora", None)
        self.origin, self.data, self.machine, self.processes, self.measured_speed = (
            origin,
            data,
            machine,
            processes,
            measured_speed,
        )
        self.shape = origin.shape
        if self.shape is not None and spec.produces == "reward_model":
            self.shape = dataclasses.replace(self.shape, lm_head=False)
        self.spec = spec
        self.terms = self._terms(self._largest())
        self.memory = sum(term.amount for term in self.terms) if self.terms else None
        self.disk = self._disk()

    def _terms(self, largest: Pass) -> list[Term]:
        """Of memory; none where the model's shape is not known."""
        if self.shape is None:
            return []
        device, processes = self.machine.device, self.processes
        return needs.memory(self.shape, self.train, self.lora, device=device, processes=processes, largest=largest)

    def _disk(self) -> list[Term]:
        if self.shape is None:
            return []
        return needs.disk(self.shape, self.train, self.lora, tokens=self.data.tokens, dequantises=self.origin.gguf)

    def _largest(self, *, certain: bool = False) -> Pass:
        """The largest forward pass, as far as it is known.

        Args:
            certain: leave out what is only estimated and would make it larger.
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
        """Why a forward pass has so many tokens, where they were counted."""
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
        """Longer ones are cut or left out; a row of preferences may have several answers of that length."""
        longest: int = getattr(self.spec, "max_length", self.train.microbatch_tokens)
        return longest if self.spec.kind == "sft" else 2 * longest

    def rows(self) -> list[Row]:
        """All of them, in reading order."""
        shape = self.shape
        rows = [Row("starts from", self.origin.name, self.origin.source), *self._data_rows(), *self._step_rows()]
        if shape is None:
            return [*rows, Row("parameters, memory, disk, time", "unknown", self.origin.source)]
        rows.append(self._trained_row(shape))
        rows.append(
            Row(
                "peak memory",
                f"{gigabytes(self.memory or 0)} a process",
                f"estimate for {self.machine.device}, the sum of:",
            )
        )
        rows += [Row(f"  {term.name}", gigabytes(term.amount), term.how) for term in self.terms]
        rows.append(Row("disk", gigabytes(sum(term.amount for term in self.disk)), "at its fullest, the sum of:"))
        rows += [Row(f"  {term.name}", gigabytes(term.amount), term.how) for term in self.disk]
        return [*rows, self._time_row(shape)]

    def _data_rows(self) -> list[Row]:
        data = self.data
        if data.tokens is None:
            return [Row("data", "unknown", data.source.removeprefix("unknown: "))]
        parts = [f"{data.tokens:,} tokens"]
        parts += [f"{data.targets:,} of them trained on"] if data.targets is not None else []
        parts += [f"{data.examples:,} examples"] if data.examples is not None else []
        return [Row("data", ", ".join(parts), data.source)]

    def _step_rows(self) -> list[Row]:
        train, steps, seen = self.train, *self._steps_and_tokens()
        if train.batch_size is not None:
            size, source = f"{train.batch_size} examples", "train.batch_size"
        else:
            size = f"{train.tokens_per_step or 4096:,} tokens at most"
            source = "train.tokens_per_step" if train.tokens_per_step else "default of train.tokens_per_step"
        rows = [Row("a step takes", size, source)]
        rows.append(Row("steps", "unknown" if steps is None else f"{steps:,}", self._steps_source()))
        if seen is not None and steps:
            rows.append(Row("tokens in all", f"{seen:,}", f"{seen / steps:,.0f} a step on average"))
        micro = f"{train.microbatch_tokens:,} tokens x {self.processes} process{'es' * (self.processes > 1)}"
        return [*rows, Row("a forward pass takes", micro, f"train.microbatch_tokens; on {self.machine.name}")]

    def _steps_source(self) -> str:
        words = f"train.epochs {self.train.epochs:g}"
        return f"{words}, at most train.max_steps {self.train.max_steps}" if self.train.max_steps else words

    def _steps_and_tokens(self) -> tuple[int | None, int | None]:
        """Optimiser steps and the tokens in them: counted, or from averages."""
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

    def _trained_row(self, shape: Shape) -> Row:
        trained = needs.trained_parameters(shape, self.lora)
        if self.lora is None:
            return Row("trains", f"{count(trained)} parameters, all of them", self.origin.shape_source)
        named = shape.linears if isinstance(self.lora.target_modules, str) else self.lora.target_modules
        targets = ", ".join(sorted(named)) + f" in {shape.layers} layers"
        share = f"{trained / shape.parameters:.2%} of {count(shape.parameters)}"
        return Row(
            "trains",
            f"{count(trained)} parameters, {share}",
            f"LoRA of rank {self.lora.rank} on {targets}; {self.origin.shape_source}",
        )

    def _time_row(self, shape: Shape) -> Row:
        seen = self._steps_and_tokens()[1]
        units = self.machine.units
        assumed = needs.tokens_per_second(shape, self.train, self.lora, device=self.machine.device, units=units)
        speed = self.measured_speed if self.measured_speed and self.machine.here else assumed
        what = (
            "the last run's speed"
            if speed is self.measured_speed
            else f"assumed: {needs.assumed_speed(self.machine.device)} x {units}"
        )
        source = (
            f"estimate: {speed:,.0f} tokens/s ({what}); loading, evaluation, samples (and for dpo the reference) come"
            " on top"
        )
        return Row("time", "unknown" if seen is None else f"about {duration(seen / speed)}", source)

    # What cannot fit

    def problems(self, loaded: LoadedRecipe, name: str) -> Iterator[Problem]:
        """Only what is certain: the terms without the allocator's slack are more than there is."""
        budget, key = self.machine.memory, f"stages.{name}.train"
        together = self.processes if self.machine.device == "cpu" else 1
        largest = self._largest(certain=True)
        terms = [term for term in self._terms(largest) if term.name != "slack"]
        needed = sum(term.amount for term in terms) * together
        if budget is not None and needed > budget:
            parts = sorted(terms, key=lambda term: -term.amount)[:3]
            words = [f"{term.name} {gigabytes(together * term.amount)}" for term in parts]
            words += [f"all else {gigabytes(needed - together * sum(term.amount for term in parts))}"]
            each = f" ({together} processes)" if together > 1 else ""
            message = (
                f"needs at least {gigabytes(needed)} of memory{each}: {', '.join(words)}; {self.machine.name} has"
                f" {gigabytes(budget)}"
            )
            yield loaded.problem(key, message, self._memory_hint(terms, largest, budget / together))
        space = sum(term.amount for term in self.disk)
        if self.machine.disk is not None and space > self.machine.disk:
            message = f"needs about {gigabytes(space)} of disk, {gigabytes(self.machine.disk)} are free"
            yield loaded.problem(key, message, "lower `save_total_limit`, or give --runs-dir a larger disk")

    def _memory_hint(self, terms: list[Term], largest: Pass, budget: float) -> str:
        activations = next(term.amount for term in terms if term.name == "activations")
        room = (
            int((budget - sum(term.amount for term in terms) + activations) / (activations / largest.tokens))
            if largest.tokens
            else 0
        )
        if room >= 128 and activations:
            longest = self.data.longest or 0
            if longest > room:
                smaller = (
                    f"lower `max_length`: there is room for {room:,} tokens at once, and the longest row has"
                    f" {longest:,}"
                )
            else:
                smaller = f"lower `train.microbatch_tokens` to {room // 128 * 128}"
            return (
                smaller
                if self.train.gradient_checkpointing
                else f"{smaller}, or set `train.gradient_checkpointing: true`"
            )
        if self.lora is None:
            return "set `lora: {}` to train adapters only, or `train.dtype: bf16`"
        return "set `train.dtype: bf16`" if self.train.dtype == "fp32" else "a smaller model, or a GPU with more memory"


class Rollouts(Training):
    """The numbers of a stage that samples what it trains on."""

    spec: PpoStage

    def _terms(self, largest: Pass) -> list[Term]:
        if self.shape is None:
            return []
        device = self.machine.device
        budget = self.machine.memory if device == "cuda" else None
        return ppo_needs.memory(
            self.shape, self.spec, device=device, processes=self.processes, budget=budget, largest=largest
        )

    def _disk(self) -> list[Term]:
        return (
            []
            if self.shape is None
            else ppo_needs.disk(self.shape, self.spec, tokens=None, dequantises=self.origin.gguf)
        )

    def _largest(self, *, certain: bool = False) -> Pass:
        """Prompts share a forward pass with as many of their answers as fit; one prompt with one answer is never cut.
        How long answers get is not known."""
        spec, limit = self.spec, self.train.microbatch_tokens
        longest = (self.data.longest or spec.max_prompt_length) + spec.max_new_tokens
        if longest > limit and not certain:
            return Pass(self._padded(longest), "a prompt with its answer, max_new_tokens long")
        step = ppo.trained_tokens(spec, self.data) // (2 if spec.estimator == "gae" else 1) // spec.total_steps
        filled = limit if certain is False or step > limit else step
        return Pass(self._padded(min(limit, filled)), "train.microbatch_tokens" if filled == limit else "a whole step")

    def _data_rows(self) -> list[Row]:
        return []

    def _step_rows(self) -> list[Row]:
        micro = f"{self.train.microbatch_tokens:,} tokens x {self.processes} process{'es' * (self.processes > 1)}"
        rows = [Row(*row) for row in ppo.rows(self.spec, self.data)]
        return [*rows, Row("a forward pass takes", micro, f"train.microbatch_tokens; on {self.machine.name}")]

    def _time_row(self, shape: Shape) -> Row:
        row = super()._time_row(shape)
        source = row.source.partition(";")[0] + "; loading, scoring and above all sampling come on top"
        return dataclasses.replace(row, value=row.value.replace("about", "at most about"), source=source)

    def _steps_and_tokens(self) -> tuple[int | None, int | None]:
        return self.spec.total_steps, ppo.trained_tokens(self.spec, self.data)
