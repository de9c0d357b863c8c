"""``align plan``: what a run would do, every derived value with its source, and problems with memory or disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from align.errors import InputError, Problem
from align.pipeline import artifacts
from align.pipeline.folder import RunFolder
from align.pipeline.selection import ALL, Selection
from align.pipeline.status import StageStatus, status
from align.planning.data_size import UnreadableData
from align.planning.planner import PlanRow, ToPlan, planner_of
from align.recipe.load import LoadedRecipe
from align.recipe.schema import Hardware
from align.sizing.machine import Machine, machine_for, this_machine


@dataclass(frozen=True)
class StagePlan:
    """The plan of one stage."""

    name: str
    kind: str
    produces: str
    status: StageStatus
    rows: tuple[PlanRow, ...]
    memory: float | None = None
    """Predicted peak bytes of one process."""
    problems: tuple[Problem, ...] = ()
    """What cannot fit."""
    faults: tuple[Problem, ...] = ()
    """Data that cannot be read."""


@dataclass(frozen=True)
class Plan:
    """The plan of a whole recipe."""

    name: str
    machine: Machine
    stages: tuple[StagePlan, ...]
    obstacles: tuple[Problem, ...] = ()
    """Why the run folder could not be written, or why so many processes could not be started."""
    notes: tuple[str, ...] = ()
    """On which machine, if not this one, and how the run would be started."""

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Memory and disk problems of all stages that would run, and obstacles to the whole run."""
        return (*self.obstacles, *(problem for stage in self.stages for problem in stage.problems))

    @property
    def faults(self) -> tuple[Problem, ...]:
        """Data that cannot be read, over all stages that would run."""
        return tuple(fault for stage in self.stages for fault in stage.faults)


def make_plan(
    loaded: LoadedRecipe,
    runs_dir: Path = Path("runs"),
    *,
    nproc: int | None = None,
    nodes: int | None = None,
    selection: Selection = ALL,
    here: bool = False,
) -> Plan:
    """Plan every stage. Loads no weights; small data are encoded to count them.

    Args:
        runs_dir: where the run would write, and where results of earlier runs are.
        nproc: processes of each of the ``nodes``; when None, one for each GPU of the recipe's ``hardware``, or one.
        nodes: machines; when None, one where ``nproc`` is given, else those of the recipe's ``hardware``.
        selection: the stages that the run may run.
        here: plan for this machine instead of the recipe's ``hardware``, as is done before a run. Small data are
            encoded into the run's cache if that folder exists, so that the run does not encode them again.

    Raises:
        InputError: a local model cannot be read; the run would refuse the selection.
    """
    hardware = None if here else loaded.recipe.hardware
    machine = machine_for(hardware) if hardware else this_machine(runs_dir)
    if hardware and machine.device == "cuda":
        processes = (nproc or hardware.gpus) * (nodes or (1 if nproc else hardware.nodes))
    else:
        processes = (nproc or 1) * (nodes or 1)
    run = RunFolder.of(loaded, runs_dir)
    states = status(loaded, runs_dir, selection)
    obstacles = [] if hardware or not any(stage_runs(state) for state in states.values()) else [run.obstacle()]
    if machine.device == "cuda" and processes > machine.units and not here:
        options = f"--nproc {nproc or processes}" + (f" --nnodes {nodes}" if nodes else "")
        message = f"{options}: {machine.name} has {machine.units} GPUs, and every process takes one"
        obstacles.append(
            Problem(message, hint=f"at most {machine.units} processes" if nodes else f"at most --nproc {machine.units}")
        )
    notes = tuple(_notes(hardware, machine, this_machine(runs_dir), nproc)) if hardware else ()
    used = dataclasses.replace(machine, units=processes) if machine.device == "cuda" else machine
    stages = tuple(_plan_stage(loaded, name, states[name], used, processes, run) for name in loaded.order)
    return Plan(
        loaded.recipe.name, machine, stages, tuple(problem for problem in obstacles if problem is not None), notes
    )


def _notes(hardware: Hardware, machine: Machine, this: Machine, nproc: int | None) -> Iterator[str]:
    """Notes for the reader of a plan made for the recipe's ``hardware``."""
    if this.device != machine.device or this.units < hardware.gpus or (this.memory or 0) < 0.9 * (machine.memory or 0):
        yield f"planned for {machine.name}; this is another machine: {this.name.partition('(')[2].rstrip(')')}"
    if hardware.gpus and nproc is None and machine.units > 1:
        several = f" --nnodes {hardware.nodes} --node-rank 0 --rendezvous HOST:PORT" if hardware.nodes > 1 else ""
        started = f"as `align run --nproc {hardware.gpus}{several}` starts them"
        if several:
            started += (
                " (on each machine with its --node-rank; `align slurm` prints a batch script; the runs folder must"
            )
            started += " be one that all machines see)"
        yield f"planned with one process for each GPU, {started}; without --nproc a run is one process"


def _plan_stage(
    loaded: LoadedRecipe, name: str, state: StageStatus, machine: Machine, processes: int, run: RunFolder
) -> StagePlan:
    spec = loaded.recipe.stages[name]
    plain = StagePlan(name, spec.kind, spec.produces, state, tuple(_inputs(loaded, name)))
    if not stage_runs(state):
        return plain
    try:
        return _plan_running(loaded, plain, machine, processes, run)
    except UnreadableData as error:
        row = PlanRow("data", "cannot be read", error.problems[0].message)
        return dataclasses.replace(plain, rows=(*plain.rows, row), faults=error.problems)


def _plan_running(
    loaded: LoadedRecipe, plain: StagePlan, machine: Machine, processes: int, run: RunFolder
) -> StagePlan:
    stage = ToPlan(loaded, plain.name, run, machine, processes, _measured_speed(plain.status))
    derived = planner_of(stage.spec).plan(stage)
    return dataclasses.replace(
        plain, rows=(*plain.rows, *derived.rows), memory=derived.memory, problems=derived.problems
    )


def _inputs(loaded: LoadedRecipe, name: str) -> Iterator[PlanRow]:
    for referred in loaded.references(name):
        yield PlanRow(
            "reads", referred.text, loaded.written(referred.path).removeprefix(f"stages.{name}.").removesuffix(".path")
        )


def _measured_speed(state: StageStatus) -> float | None:
    """Tokens per second of the last run of a stage, even with other settings; None if unknown."""
    try:
        speed = artifacts.read_manifest(state.folder).summary.get("tokens_per_second")
    except InputError:  # it never ran, or its manifest is damaged and it will run again
        return None
    return float(speed) if isinstance(speed, (int, float)) and speed > 0 else None


def show(plan: Plan, console: Console) -> None:
    """Print a plan as tables, one for each stage, in running order."""
    for note in plan.notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    for stage in plan.stages:
        state = stage.status.state + (f": {stage.status.words}" if stage.status.words else "")
        console.print(
            Text.assemble(
                (stage.name, "bold"), f"  {stage.kind} -> {stage.produces.replace('_', ' ')}  ", (state, "cyan")
            )
        )
        if stage_runs(stage.status):
            _print_rows(stage.rows, console)
    todo = [stage.name for stage in plan.stages if stage_runs(stage.status)]
    all_or_some = "the selected" if any(stage.status.state == "not selected" for stage in plan.stages) else "all"
    words = f"would run: {', '.join(todo)}" if todo else f"nothing to do: {all_or_some} stages are up to date"
    console.print(words, highlight=False)


def stage_runs(status: StageStatus) -> bool:
    """Whether the stage would run, or may have to once the stages before it have run."""
    return status.state in ("to run", "waits")


def _print_rows(rows: Sequence[PlanRow], console: Console) -> None:
    table = Table(box=None, padding=(0, 2, 0, 2), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(style="dim", overflow="fold")
    for row in rows:
        table.add_row(Text(row.name), Text(row.value), Text(row.source))
    console.print(table)
