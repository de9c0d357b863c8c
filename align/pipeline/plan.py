"""``align plan``: what a run would do, every derived value with where it comes from, and a refusal of what cannot fit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from align.errors import Problem
from align.pipeline import artifacts, plan_ppo, plan_trl
from align.pipeline.folder import RunFolder
from align.pipeline.machine import Machine, machine_for, this_machine
from align.pipeline.origin import Origin, origin_of
from align.pipeline.runner import ALL, StageStatus, status
from align.pipeline.selection import Selection
from align.pipeline.tokens import Amount, amount, conversations
from align.recipe import estimate, estimate_ppo
from align.recipe.estimate import Term, count, duration, gigabytes
from align.recipe.load import LoadedRecipe
from align.recipe.ppo import PpoStage
from align.recipe.schema import EvaluateStage, Lora, SelfContrastStage, Stage, Train, TrlStage
from align.recipe.shapes import Shape


@dataclass(frozen=True)
class Row:
    """One value of a plan."""

    name: str
    value: str
    source: str
    """Where it comes from."""


@dataclass(frozen=True)
class StagePlan:
    """One stage."""

    name: str
    kind: str
    produces: str
    status: StageStatus
    rows: tuple[Row, ...]
    memory: float | None = None
    """Predicted peak bytes of one process."""
    problems: tuple[Problem, ...] = ()
    """What cannot fit."""


@dataclass(frozen=True)
class Plan:
    """A whole recipe."""

    name: str
    machine: Machine
    stages: tuple[StagePlan, ...]
    obstacle: Problem | None = None
    """Why nothing could be written."""

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What cannot fit, over all stages that would run, and what stands in the way of all of them."""
        fits = tuple(problem for stage in self.stages for problem in stage.problems)
        return fits if self.obstacle is None else (self.obstacle, *fits)


def make_plan(loaded: LoadedRecipe, runs_dir: Path = Path("runs"), *, nproc: int = 1, selection: Selection = ALL) -> Plan:
    """Plan every stage. Loads no weights; data that are small are encoded to count them.

    Args:
        runs_dir: where the run would write, and where results of earlier runs are.
        nproc: processes on this machine; a recipe with ``hardware`` has one for each GPU.
        selection: the stages that the run may run.

    Raises:
        InputError: the data, or a local model, cannot be read; the run would refuse the selection.
    """
    hardware = loaded.recipe.hardware
    machine = machine_for(hardware) if hardware else this_machine(runs_dir)
    processes = machine.units if hardware and machine.device == "cuda" else nproc
    run = RunFolder.of(loaded, runs_dir)
    states = status(loaded, runs_dir, selection)
    stages = tuple(_plan_stage(loaded, name, states[name], machine, processes, run) for name in loaded.order)
    elsewhere = hardware is not None or not any(stage_runs(state) for state in states.values())
    return Plan(loaded.recipe.name, machine, stages, None if elsewhere else run.obstacle())


def _plan_stage(loaded: LoadedRecipe, name: str, state: StageStatus, machine: Machine, processes: int, run: RunFolder) -> StagePlan:
    spec = loaded.recipe.stages[name]
    plain = StagePlan(name, spec.kind, spec.produces, state, tuple(_inputs(loaded, name)))
    if not stage_runs(state):
        return plain
    if isinstance(spec, (SelfContrastStage, EvaluateStage)):
        return dataclasses.replace(plain, rows=(*plain.rows, *_sampling_rows(loaded, name, spec, machine, run)))
    if isinstance(spec, TrlStage):
        origin = origin_of(loaded, name, run)
        start = Row("starts from", origin.name, origin.source)
        return dataclasses.replace(plain, rows=(*plain.rows, start, *(Row(*row) for row in plan_trl.rows(spec))))
    if not isinstance(getattr(spec, "train", None), Train):
        return plain
    origin = origin_of(loaded, name, run)
    training: _Training
    if isinstance(spec, PpoStage):
        prompts = plan_ppo.prompts_of(loaded, name, spec, origin.local, run)
        training = _Rollouts(spec, origin, prompts, machine, processes, _measured_speed(state))
    else:
        found = amount(loaded, name, origin.local, run) if hasattr(spec, "data") else Amount("unknown")
        training = _Training(spec, origin, found, machine, processes, _measured_speed(state))
    rows = (*plain.rows, *training.rows())
    return dataclasses.replace(plain, rows=rows, memory=training.memory, problems=tuple(training.problems(loaded, name)))


def _inputs(loaded: LoadedRecipe, name: str) -> Iterator[Row]:
    for referred in loaded.references(name):
        yield Row("reads", referred.text, loaded.written(referred.path).removeprefix(f"stages.{name}.").removesuffix(".path"))


def _sampling_rows(
    loaded: LoadedRecipe, name: str, spec: SelfContrastStage | EvaluateStage, machine: Machine, run: RunFolder
) -> Iterator[Row]:
    """Prompts, samples and time of a stage that samples for its data."""
    if spec.data is None:
        return
    data, origin = conversations(loaded, name, run), origin_of(loaded, name, run)
    policies = len(spec.policies) if isinstance(spec, EvaluateStage) else 1
    if isinstance(spec, SelfContrastStage):
        yield Row("samples from", origin.name, origin.source)
    if data.examples is None:
        yield Row("prompts, samples, time", "unknown", data.source.removeprefix("unknown: "))
        return
    samples = data.examples * spec.samples_per_prompt * policies
    tokens = samples * spec.max_new_tokens
    yield Row("prompts", f"{data.examples:,}", data.source)
    each = f"samples_per_prompt {spec.samples_per_prompt}" + (f" from each of {policies} policies" if policies > 1 else "")
    yield Row("samples", f"{samples:,}", each)
    yield Row("sampled tokens", f"{tokens:,} at most", f"max_new_tokens {spec.max_new_tokens:,}")
    if origin.shape is not None:
        speed = estimate.sampled_tokens_per_second(origin.shape, device=machine.device, units=machine.units)
        assumed = f"{estimate.assumed_speed(machine.device)} x {machine.units}"
        words = f"estimate for sampling: {speed:,.0f} tokens/s (assumed: {assumed}); loading and embedding come on top"
        yield Row("time", f"about {duration(tokens / speed)} at most", words)


def _measured_speed(state: StageStatus) -> float | None:
    """Tokens per second of the last run of a stage, whatever its settings were."""
    if not state.folder.is_dir():
        return None
    speed = artifacts.read_manifest(state.folder).summary.get("tokens_per_second")
    return float(speed) if isinstance(speed, (int, float)) and speed > 0 else None


class _Training:
    """The numbers of a stage that trains."""

    def __init__(self, spec: Stage, origin: Origin, data: Amount, machine: Machine, processes: int, measured_speed: float | None) -> None:
        self.train: Train = getattr(spec, "train")  # noqa: B009 - a field that not every stage has
        self.lora: Lora | None = getattr(spec, "lora", None)
        self.origin, self.data, self.machine, self.processes, self.measured_speed = origin, data, machine, processes, measured_speed
        self.shape = origin.shape
        if self.shape is not None and spec.produces == "reward_model":
            self.shape = dataclasses.replace(self.shape, lm_head=False)
        shape = self.shape
        self.terms: list[Term] = (
            [] if shape is None else estimate.memory(shape, self.train, self.lora, device=machine.device, processes=processes)
        )
        self.memory = sum(term.amount for term in self.terms) if self.terms else None
        self.disk: list[Term] = (
            [] if shape is None else estimate.disk(shape, self.train, self.lora, tokens=data.tokens, dequantises=origin.gguf)
        )

    def rows(self) -> list[Row]:
        """All of them, in reading order."""
        shape = self.shape
        rows = [Row("starts from", self.origin.name, self.origin.source), *self._data_rows(), *self._step_rows()]
        if shape is None:
            return [*rows, Row("parameters, memory, disk, time", "unknown", self.origin.source)]
        rows.append(self._trained_row(shape))
        rows.append(Row("peak memory", f"{gigabytes(self.memory or 0)} a process", f"estimate for {self.machine.device}, the sum of:"))
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
        trained = estimate.trained_parameters(shape, self.lora)
        if self.lora is None:
            return Row("trains", f"{count(trained)} parameters, all of them", self.origin.shape_source)
        targets = self.lora.target_modules if isinstance(self.lora.target_modules, str) else ", ".join(self.lora.target_modules)
        share = f"{trained / shape.parameters:.2%} of {count(shape.parameters)}"
        return Row(
            "trains", f"{count(trained)} parameters, {share}", f"LoRA of rank {self.lora.rank} on {targets}; {self.origin.shape_source}"
        )

    def _time_row(self, shape: Shape) -> Row:
        seen = self._steps_and_tokens()[1]
        units = self.machine.units
        assumed = estimate.tokens_per_second(shape, self.train, self.lora, device=self.machine.device, units=units)
        speed = self.measured_speed if self.measured_speed and self.machine.here else assumed
        what = (
            "the last run's speed" if speed is self.measured_speed else f"assumed: {estimate.assumed_speed(self.machine.device)} x {units}"
        )
        source = f"estimate: {speed:,.0f} tokens/s ({what}); loading, evaluation, samples (and for dpo the reference) come on top"
        return Row("time", "unknown" if seen is None else f"about {duration(seen / speed)}", source)

    # What cannot fit

    def problems(self, loaded: LoadedRecipe, name: str) -> Iterator[Problem]:
        """Only what is certain: the terms without the allocator's slack are more than there is."""
        budget, key = self.machine.memory, f"stages.{name}.train"
        together = self.processes if self.machine.device == "cpu" else 1
        needed = sum(term.amount for term in self.terms if term.name != "slack") * together
        if budget is not None and needed > budget:
            largest = sorted(self.terms, key=lambda term: -term.amount)[:3]
            parts = ", ".join(f"{term.name} {gigabytes(term.amount)}" for term in largest)
            each = f" ({together} processes)" if together > 1 else ""
            message = f"needs at least {gigabytes(needed)} of memory{each}: {parts}; {self.machine.name} has {gigabytes(budget)}"
            yield loaded.problem(key, message, self._memory_hint(budget / together))
        space = sum(term.amount for term in self.disk)
        if self.machine.disk is not None and space > self.machine.disk:
            message = f"needs about {gigabytes(space)} of disk, {gigabytes(self.machine.disk)} are free"
            yield loaded.problem(key, message, "lower `save_total_limit`, or give --runs-dir a larger disk")

    def _memory_hint(self, budget: float) -> str:
        per_token = next(term.amount for term in self.terms if term.name == "activations") / self.train.microbatch_tokens
        others = sum(term.amount for term in self.terms if term.name not in ("activations", "slack"))
        room = int((budget - others) / per_token)
        if room >= 128:
            smaller = f"lower `train.microbatch_tokens` to {room // 128 * 128}"
            return smaller if self.train.gradient_checkpointing else f"{smaller}, or set `train.gradient_checkpointing: true`"
        if self.lora is None:
            return "set `lora: {}` to train adapters only, or `train.dtype: bf16`"
        return "set `train.dtype: bf16`" if self.train.dtype == "fp32" else "a smaller model, or a GPU with more memory"


class _Rollouts(_Training):
    """The numbers of a stage that samples what it trains on."""

    def __init__(self, spec: PpoStage, *settings: Any) -> None:
        super().__init__(spec, *settings)
        self.spec = spec
        shape, machine = self.origin.shape, self.machine
        if shape is not None:
            self.terms = estimate_ppo.memory(
                shape, spec, device=machine.device, processes=self.processes, budget=machine.memory if machine.device == "cuda" else None
            )
            self.memory = sum(term.amount for term in self.terms)
            self.disk = estimate_ppo.disk(shape, spec, tokens=None, dequantises=self.origin.gguf)

    def _data_rows(self) -> list[Row]:
        return []

    def _step_rows(self) -> list[Row]:
        micro = f"{self.train.microbatch_tokens:,} tokens x {self.processes} process{'es' * (self.processes > 1)}"
        rows = [Row(*row) for row in plan_ppo.rows(self.spec, self.data)]
        return [*rows, Row("a forward pass takes", micro, f"train.microbatch_tokens; on {self.machine.name}")]

    def _time_row(self, shape: Shape) -> Row:
        row = super()._time_row(shape)
        source = row.source.partition(";")[0] + "; loading, scoring and above all sampling come on top"
        return dataclasses.replace(row, value=row.value.replace("about", "at most about"), source=source)

    def _steps_and_tokens(self) -> tuple[int | None, int | None]:
        return self.spec.total_steps, plan_ppo.trained_tokens(self.spec, self.data)


def show(plan: Plan, console: Console) -> None:
    """Print a plan as tables, one for each stage, in running order."""
    for stage in plan.stages:
        state = stage.status.state + (f": {stage.status.reason}" if stage.status.reason else "")
        console.print(Text.assemble((stage.name, "bold"), f"  {stage.kind} -> {stage.produces.replace('_', ' ')}  ", (state, "cyan")))
        if stage_runs(stage.status):
            _print_rows(stage.rows, console)
    todo = [stage.name for stage in plan.stages if stage_runs(stage.status)]
    all_or_some = "the selected" if any(stage.status.state == "not selected" for stage in plan.stages) else "all"
    words = f"would run: {', '.join(todo)}" if todo else f"nothing to do: {all_or_some} stages are up to date"
    console.print(words, highlight=False)


def stage_runs(status: StageStatus) -> bool:
    """Would it run, or might it, once the stages before it have run?"""
    return status.state in ("to run", "waits")


def _print_rows(rows: Sequence[Row], console: Console) -> None:
    table = Table(box=None, padding=(0, 2, 0, 2), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(style="dim", overflow="fold")
    for row in rows:
        table.add_row(Text(row.name), Text(row.value), Text(row.source))
    console.print(table)
