"""What a run looks at before its first stage, so that no stage finds out after hours of another that it cannot begin.

All stages that would run are checked, and all problems are reported together: the first rows of their data, packages,
keys and servers of judges, trackers, models (here or on the hub), the GPU that the recipe is meant for, memory and
disk. No weights are loaded. Inputs that another stage has to make first cannot be checked; they are listed with the
reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from align import files
from align.errors import AlignError, EnvironmentFault, InputError, Problem
from align.pipeline.folder import RunFolder
from align.pipeline.selection import ALL, Selection
from align.pipeline.status import StageStatus, status
from align.planning import plan
from align.planning.planner import planner_of
from align.planning.requirements import require_package
from align.preflight import first_rows
from align.preflight.first_tokens import Encoders
from align.preflight.models_here import look_at, needed_models, starts_refused
from align.recipe import reference_syntax
from align.recipe.blocks.train import SHARDING_HINT, sharding_fault
from align.recipe.load import LoadedRecipe
from align.recipe.schema import DataSource, Rollout, Stage, Train
from align.sizing import machine
from align.training.trackers import require_tracker


@dataclass
class Findings:
    """The problems of all stages."""

    inputs: list[Problem] = field(default_factory=list)
    """Mistakes that the user can correct in the recipe or in the data."""
    machine: list[Problem] = field(default_factory=list)
    """What this machine lacks."""
    skipped: list[str] = field(default_factory=list)
    """What could not be checked, and why."""
    looked: int = 0
    """Number of stages that were checked."""

    def add(self, error: AlignError, place: Problem | None = None) -> None:
        """Add the problems of an error; those without a place of their own get ``place``."""
        kind = self.machine if isinstance(error, EnvironmentFault) else self.inputs
        for problem in error.problems:
            placed = problem if place is None or problem.file is not None else _at(place, problem)
            if str(placed) not in map(str, kind):  # two stages may read the same file
                kind.append(placed)

    def raise_them(self) -> None:
        """Raises :class:`InputError` with all problems if there is one of the input, else :class:`EnvironmentFault` if
        there is any."""
        if self.inputs:
            raise InputError([*self.inputs, *self.machine])
        if self.machine:
            raise EnvironmentFault(self.machine)


def _at(place: Problem, problem: Problem) -> Problem:
    key = place.key if problem.key is None or problem.key == place.key else f"{place.key} {problem.key}"
    return Problem(problem.message, place.file, place.line, place.col, key, problem.hint)


def look(
    loaded: LoadedRecipe,
    runs_dir: Path = Path("runs"),
    *,
    nproc: int | None = 1,
    here: int | None = None,
    selection: Selection = ALL,
    thorough: bool = True,
) -> Findings:
    """Check every stage that a run with these options would run.

    Args:
        nproc: number of processes of the run; None when it is not known yet, and one is assumed where it matters.
        here: how many of them this machine gets; None: as their launcher says.
        thorough: also encode first rows and small data with the model's tokenizer, and check with their lengths whether
            memory and disk suffice.

    Raises:
        InputError: the run would refuse the selection.
    """
    states = status(loaded, runs_dir, selection)
    todo = [name for name in loaded.order if plan.stage_runs(states[name])]
    findings = Findings(looked=len(todo))
    if not todo:
        return findings
    run = RunFolder.of(loaded, runs_dir)
    here = here or machine.processes_here(nproc or 1)
    _gpus(loaded, here, findings)
    _divided(loaded, todo, nproc, here, findings)
    hub = _Hub(silent=bool(findings.machine))  # on the wrong machine that problem is enough
    encoders = Encoders(loaded, run) if thorough else None
    for name in todo:
        spec = loaded.recipe.stages[name]
        for key, need in _needs(spec):
            try:
                need()
            except AlignError as error:
                findings.add(error, loaded.problem(f"stages.{name}.{key}", ""))
        _data(loaded, run, name, states, hub, findings, encoders)
    _models(loaded, todo, hub, findings)
    if thorough:
        _fits(loaded, runs_dir, run, nproc or 1, selection, findings)
    return findings


# The machine


def _gpus(loaded: LoadedRecipe, nproc: int, findings: Findings) -> None:
    hardware = loaded.recipe.hardware
    here = machine.gpu_memory()
    if hardware is not None and hardware.gpus and not here:
        what = f"the recipe is meant for {hardware.gpus} GPU{'s' * (hardware.gpus > 1)}, and there is none here"
        hint = "run it on such a machine; `hardware=null` after the recipe tries it here all the same"
        findings.machine.append(loaded.problem("hardware", what, hint))
    elif nproc > len(here) > 0:
        findings.machine.append(Problem(f"--nproc {nproc}: there are {len(here)} GPUs, and every process takes one"))


def _divided(loaded: LoadedRecipe, todo: list[str], nproc: int | None, here: int, findings: Findings) -> None:
    """Check that the processes can divide the models that are trained (``train.sharding``)."""
    for name in todo:
        train = getattr(loaded.recipe.stages[name], "train", None)
        if nproc is None or not isinstance(train, Train):
            continue
        if fault := sharding_fault(train.sharding, nproc, here):
            findings.inputs.append(loaded.problem(f"stages.{name}.train.sharding", fault, SHARDING_HINT))


def _fits(
    loaded: LoadedRecipe, runs_dir: Path, run: RunFolder, nproc: int, selection: Selection, findings: Findings
) -> None:
    """Check memory and disk, and encode the rows of small data. What is encoded is kept for the run, in the cache of
    its folder."""
    try:
        made = plan.make_plan(loaded, runs_dir, nproc=nproc, selection=selection, here=True)
    except AlignError as error:
        findings.add(error)
        return
    told = {problem.file for problem in findings.inputs}
    faults = [problem for problem in made.faults if problem.file not in told]
    # A problem without a file only counts rows that are reported already
    if any(problem.file for problem in faults) or (faults and not told):
        findings.add(InputError(faults))
    if made.problems:
        findings.add(EnvironmentFault(made.problems))


# Packages, keys, servers


def _needs(spec: Stage) -> Iterator[tuple[str, Callable[[], object]]]:
    """(key, check) for each requirement of a stage; the check raises AlignError when the machine lacks it."""
    train, lora, rollout = (getattr(spec, name, None) for name in ("train", "lora", "rollout"))
    if isinstance(train, Train):
        for tracker in train.report_to:
            yield "train.report_to", partial(require_tracker, tracker)
    if lora is not None and lora.quantize:
        hint = "pip install bitsandbytes, or remove the key"
        yield "lora.quantize", partial(require_package, "bitsandbytes", "4-bit weights need", hint)
    if isinstance(rollout, Rollout) and rollout.package is not None:
        package = rollout.package
        yield "rollout.engine", partial(require_package, package.module, "the engine needs", package.hint)
    yield from planner_of(spec).needs(spec)


# Data and models


def _data(
    loaded: LoadedRecipe,
    run: RunFolder,
    name: str,
    states: Mapping[str, StageStatus],
    hub: _Hub,
    findings: Findings,
    encoders: Encoders | None,
) -> None:
    """Check the first rows of a stage's sources; with ``encoders`` also encode them."""
    spec, encoder = loaded.recipe.stages[name], None
    if encoders is not None and any(spec.sources()):
        try:
            encoder = encoders.of(name)
        except AlignError as error:
            findings.add(error, loaded.problem(f"stages.{name}", ""))
    for key, source, faults in first_rows.looks_at(spec, encoder):
        place = loaded.problem(f"stages.{name}.{key}.path", "")
        try:
            ref = reference_syntax.parse(source.path, loaded.root)
            if isinstance(ref, reference_syntax.StageRef):
                state = states[ref.name]
                if state.state != "up to date":
                    findings.skipped.append(f"stages.{name}.{key}: {source.path} has to run first")
                    continue
                location: Path | str = run.stage(ref.name)
            else:
                location = reference_syntax.resolve(source.path, loaded.root)
            if isinstance(location, str):
                hub.has_data(location, source)
            else:
                for problem in faults(location):
                    findings.add(InputError(problem), place)
        except AlignError as error:
            findings.add(error, place)


def _models(loaded: LoadedRecipe, todo: list[str], hub: _Hub, findings: Findings) -> None:
    """Check folders of models as far as possible without torch; ask the hub whether it has the models that are not
    here."""
    for needed in needed_models(loaded, todo):
        try:
            location = reference_syntax.resolve(needed.model.path, loaded.root)
            if isinstance(location, Path):
                look_at(location, needed)
            else:
                hub.has_model(location, needed.model.revision)
        except AlignError as error:
            findings.add(error, loaded.problem(needed.key, ""))
    for key, fault in starts_refused(loaded, todo):
        findings.add(fault, loaded.problem(key, ""))


class _Hub:
    """Asks the Hugging Face hub once for each name, and stops asking when it cannot be reached."""

    def __init__(self, *, silent: bool) -> None:
        self._silent = silent
        """Ask nothing, because the run cannot start here for another reason."""
        self._unreachable: EnvironmentFault | None = None

    def has_model(self, name: str, revision: str | None) -> None:
        """Raises as :func:`align.models.files.hub.local_snapshot`; nothing is downloaded."""
        from align.models.files.hub import cached_commit

        if cached_commit(name, revision) is None:
            self._ask(name, revision, data=False)

    def has_data(self, name: str, source: DataSource) -> None:
        """Raises as :func:`align.data.files.hub.load_split`; nothing is downloaded."""
        try:
            self._ask(name, source.revision, data=True)
        except EnvironmentFault:
            from align.data.files.hub import load_split

            load_split(name, source)  # from the cache, if it is there

    def _ask(self, name: str, revision: str | None, *, data: bool) -> None:
        from align.models.files.hub import ask

        if self._silent:
            return
        if self._unreachable is not None:
            hint = self._unreachable.problems[0].hint
            raise EnvironmentFault(f"{name}: not on this machine, and the hub cannot be reached", hint=hint)
        try:
            ask(name, revision, data=data)
        except EnvironmentFault as error:
            self._unreachable = error
            raise


def require(
    loaded: LoadedRecipe,
    runs_dir: Path,
    *,
    nproc: int,
    here: int | None = None,
    selection: Selection,
    thorough: bool = True,
) -> None:
    """The checks of a run that is about to start; arguments as of :func:`look`. Raises as
    :meth:`Findings.raise_them`."""
    cache = RunFolder.of(loaded, runs_dir).cache
    new = [folder for folder in (cache, runs_dir) if not folder.exists()]
    if thorough and os.access(runs_dir if runs_dir.is_dir() else runs_dir.absolute().parent, os.W_OK):
        files.make_folder(cache)  # so that data encoded for counting are reused by the run
    try:
        look(loaded, runs_dir, nproc=nproc, here=here, selection=selection, thorough=thorough).raise_them()
    except AlignError:
        if cache in new:
            files.remove_folder(cache)
        if runs_dir in new and runs_dir.is_dir() and not any(runs_dir.iterdir()):
            files.remove_folder(runs_dir)
        raise
