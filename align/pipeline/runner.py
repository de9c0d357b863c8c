"""Runs a recipe. A stage runs again only when something that its result depends on has changed, and results appear only
once they are complete.

A run folder is ``runs/NAME/``: the recipe and versions, ``stages/NAME/`` the results, ``work/NAME/IDENTITY/`` the
checkpoints of a stage that has not finished. Every process of a distributed run calls :func:`run_recipe`; rank 0
decides, publishes and prints.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from rich.console import Console

from align import files, secrets
from align.errors import EnvironmentFault, InputError, Interrupted, Problem
from align.models.files.bases import known_models
from align.pipeline import artifacts, folder
from align.pipeline.artifacts import Identity
from align.pipeline.folder import RunFolder
from align.pipeline.identity import as_of_now, explain, identify, neutral_values
from align.pipeline.locks import RunLock
from align.pipeline.processes import Processes, current, on_rank_0
from align.pipeline.selection import ALL, Selection, needed
from align.pipeline.status import COMPARED_BY_CONTENT, assess, locate, not_selected
from align.preflight.checks import require
from align.preflight.first_rows import trained_on
from align.preflight.model_limits import local_models, require_engines, require_models
from align.recipe.load import LoadedRecipe
from align.recipe.schema import Stage
from align.signals import StopFlag, stop_requested
from align.stages.context import StageContext


@dataclass(frozen=True)
class RunResult:
    """What a run did."""

    folder: Path
    ran: tuple[str, ...]
    up_to_date: tuple[str, ...]
    summaries: Mapping[str, Mapping[str, Any]]
    """Headline numbers of every stage that ran or was up to date."""


def run_recipe(
    loaded: LoadedRecipe,
    *,
    selection: Selection = ALL,
    runs_dir: Path = Path("runs"),
    console: Console,
    ranks: Processes | None = None,
) -> RunResult:
    """Bring the stages of a recipe up to date.

    Args:
        selection: the stages that may run; other stages that they need must be up to date.
        runs_dir: parent of the run folder.
        console: gets one line for each stage (and whatever the stages print), on rank 0.
        ranks: the processes of this run; found from the environment when absent.

    Raises:
        InputError: a mistake that the user can correct; a needed stage is missing or out of date; a finished result
            would be replaced, and ``selection`` does not allow that.
        EnvironmentFault: the machine lacks something, or another process runs in this folder.
        Interrupted: a signal asked to stop; the same command resumes.
    """
    ranks = current() if ranks is None else ranks
    selected = selection.stages(loaded)
    run = RunFolder.of(loaded, runs_dir)
    absent = [folder for folder in (run.path, run.cache, run.path.parent) if not folder.exists()]
    with StopFlag(same_within=1.0 if ranks.world > 1 else 0.0), ExitStack() as stack:
        on_rank_0(ranks, lambda: _look_first(loaded, runs_dir, ranks.world, selection))
        on_rank_0(ranks, lambda: require_models(loaded, selected))
        on_rank_0(ranks, lambda: require_engines(loaded, selected))
        on_rank_0(ranks, lambda: _open(run, absent, stack, console))
        on_rank_0(ranks, lambda: _refuse_to_replace(loaded, run, selection))
        job = _Runner(loaded, run, selection, console if ranks.rank == 0 else Console(quiet=True), ranks)
        for name in needed(loaded, selected):
            job.bring_up_to_date(name)
        return RunResult(run.path, tuple(job.ran), tuple(job.up_to_date), job.summaries)


def _look_first(loaded: LoadedRecipe, runs_dir: Path, world: int, selection: Selection) -> None:
    """Report everything that would stop a later stage before the first one starts, and before anything is written."""
    require(loaded, runs_dir, nproc=world, selection=selection)


def _open(run: RunFolder, absent: Sequence[Path], stack: ExitStack, console: Console) -> None:
    """Create and lock the run folder; ``absent`` are the folders that did not exist when this run was started."""
    run.create()
    lock = stack.enter_context(RunLock(run.path))
    if run.path in absent:
        stack.push(lambda kind, error, trace: _clear_up(run, absent, error))
    if lock.taken_over is not None:
        _say(console, f"warning: the run of {lock.taken_over} was killed")
    run.recover()


def _clear_up(run: RunFolder, absent: Sequence[Path], error: BaseException | None) -> None:
    """Remove empty new folders when the run stopped at once because of a user's mistake."""
    if isinstance(error, InputError) and run.is_bare():
        files.remove_folder(run.path)
        for folder in (run.cache, run.path.parent):
            if folder in absent and not any(folder.iterdir()):
                files.remove_folder(folder)


def _refuse_to_replace(loaded: LoadedRecipe, run: RunFolder, selection: Selection) -> None:
    """Refuse, before the first stage runs, a run that would replace finished results, as far as that can be known
    without reading models and data.

    Raises :class:`InputError`.
    """
    if selection.replace:
        return
    foreign = run.foreign(loaded)
    if foreign:
        message = f"{run.path} holds the results of another recipe (stages: {', '.join(foreign)})"
        raise InputError(
            loaded.problem("name", message, "give this recipe another `name`; with --replace it goes on in that folder")
        )
    problems = []
    for name in sorted(selection.stages(loaded), key=loaded.order.index):
        try:
            old = artifacts.read_manifest(run.stage(name)).identity
        except InputError:
            continue
        new = identify(loaded, name, lambda text: "")
        old = replace(as_of_now(old, loaded.recipe.stages[name]), inputs={})
        if old.digest != replace(new, inputs={}).digest:
            problems.append(_would_replace(loaded, name, explain(old, replace(new, inputs={}))))
    if problems:
        raise InputError(problems)


def _would_replace(loaded: LoadedRecipe, name: str, reason: str) -> Problem:
    message = f"a finished result is there that was made otherwise ({reason})"
    return loaded.problem(f"stages.{name}", message, "--replace makes it anew in its place; another `name` keeps both")


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class _Attempt:
    """Rank 0's decision to run a stage."""

    identity: Identity
    out: Path
    work: Path


class _Runner:
    """One run, stage by stage."""

    def __init__(
        self, loaded: LoadedRecipe, run: RunFolder, selection: Selection, console: Console, ranks: Processes
    ) -> None:
        self._loaded = loaded
        self._run = run
        self._selection = selection
        self._console = console
        self._ranks = ranks
        self._selected = selection.stages(loaded)
        self.ran: list[str] = []
        self.up_to_date: list[str] = []
        self.summaries: dict[str, Mapping[str, Any]] = {}

    def bring_up_to_date(self, name: str) -> None:
        """Run a stage unless it is up to date; the stages that it needs are."""
        attempt = on_rank_0(self._ranks, lambda: self._decide(name))
        if attempt is None:
            self.up_to_date.append(name)
        else:
            self._attempt(name, attempt)
            self.ran.append(name)
        self.summaries[name] = on_rank_0(self._ranks, lambda: artifacts.read_manifest(self._run.stage(name)).summary)

    def _decide(self, name: str) -> _Attempt | None:
        signum = stop_requested()
        if signum is not None:
            raise Interrupted(signum, f"stopped before stage {name}; the same command goes on")
        status = assess(self._loaded, self._run, name, self._selection)
        assert status.identity is not None
        if status.state == "up to date":
            self._run.forget(name, status.identity)  # a run that was killed right after publishing may have left it
            _say(self._console, f"{name}: up to date{f'; {status.note}' if status.note else ''}")
            return None
        if name not in self._selected:
            raise not_selected(self._loaded, self._selected, status)
        if status.refused:
            raise InputError(_would_replace(self._loaded, name, status.reason))
        self._require_whole(name)
        if not self.ran:
            self._run.record(self._loaded)
        _say(self._console, f"{name}: running ({status.reason})")
        for step in self._run.others(name, status.identity):
            _say(
                self._console,
                f"{name}: an unfinished attempt with other settings or inputs ({step}) goes once this one is finished",
            )
        self._run.log(name, "started", reason=status.reason, identity=status.identity.digest)
        if self._selection.fresh:
            self._run.forget(name, status.identity)
        out = files.temporary(self._run.stages)
        work = self._run.work(name, status.identity)
        files.make_folder(out)
        files.make_folder(work)
        return _Attempt(status.identity, out, work)

    def _require_whole(self, name: str) -> None:
        """Verify the results that a stage will read by sha256: so far, large ones were only compared by size.

        Raises :class:`InputError` when one is damaged.
        """
        for need in self._loaded.dependencies(name):
            result = self._run.stage(need)
            if (
                need not in self.ran
                and artifacts.read_manifest(result).bytes > COMPARED_BY_CONTENT
                and (damaged := artifacts.verify(result))
            ):
                raise InputError(
                    [*damaged, Problem(f"the result of stage {need} is damaged", hint=f"--force {need} makes it again")]
                )

    def _attempt(self, name: str, attempt: _Attempt) -> None:
        spec = self._loaded.recipe.stages[name]
        started = time.monotonic()
        try:
            function = _implementation(spec, name)
            if "torch" in sys.modules:  # else there is no memory of an earlier stage, and importing it takes seconds
                from align.training.memory import begin_stage

                begin_stage()
            context = StageContext(
                name=name,
                seed=attempt.identity.seed,
                out=attempt.out,
                work=attempt.work,
                cache=self._run.cache,
                model=self._loaded.recipe.model,
                resolve=lambda text: locate(self._loaded, self._run, text),
                trained_on=partial(trained_on, self._loaded.recipe.stages),
                console=self._console,
            )
            with files.machine_faults(attempt.out), known_models(local_models(self._loaded)):
                function(spec, context)
            self._ranks.barrier()
            on_rank_0(self._ranks, lambda: self._publish(context, spec, attempt, started))
        except BaseException as error:
            error.add_note(f"in stage {name}")
            if self._ranks.rank == 0:
                self._abandon(name, attempt, error)
            raise

    def _abandon(self, name: str, attempt: _Attempt, error: BaseException) -> None:
        files.discard(attempt.out)
        if not folder.has_content(attempt.work):
            self._run.forget(name, attempt.identity)
        event = "interrupted" if isinstance(error, Interrupted) else "failed"
        try:
            self._run.log(name, event, error=secrets.hide(f"{type(error).__name__}: {error}")[:1000])
        except EnvironmentFault as unlogged:  # report the stage's own error instead
            _say(self._console, f"warning: {unlogged}")

    def _publish(self, context: StageContext, spec: Stage, attempt: _Attempt, started: float) -> None:
        artifacts.write_manifest(
            context.out,
            type=spec.produces,
            stage=context.name,
            identity=attempt.identity,
            encoder=context.encoder_digest,
            summary=context.summary,
            neutral=neutral_values(spec),
        )
        files.publish_folder(context.out, self._run.stage(context.name))
        files.remove_folder(self._run.scratch(context.name))
        self._run.log(context.name, "finished", seconds=round(time.monotonic() - started, 1))


def _implementation(spec: Stage, name: str) -> Callable[[Any, StageContext], None]:
    """The function that runs a stage, imported now."""
    module, _, function = spec.implementation.partition(":")
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            raise InputError(f"stage {name}: no module named {module}") from error
        hint = "`align doctor` says what is missing"
        raise EnvironmentFault(
            f"stage {name} needs the Python package {error.name}, which is not installed", hint=hint
        ) from error
    if not hasattr(imported, function):
        raise InputError(f"stage {name}: the module {module} has no {function}")
    return cast(Callable[[Any, StageContext], None], getattr(imported, function))
