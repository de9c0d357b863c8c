"""The command line: it parses arguments, calls the code and prints results. Heavy imports are inside the commands that
need them, so that help is instant."""

from __future__ import annotations

import errno
import itertools
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from align import slurm
from align.cli import data, evaluate, imports, models, runs
from align.cli.options import (
    Arguments,
    AsJson,
    Force,
    Fresh,
    From,
    NodeRank,
    NumMachines,
    NumProcesses,
    Only,
    PlannedMachines,
    PlannedProcesses,
    RecipeOption,
    Rendezvous,
    Replace,
    Seeds,
    selection_of,
    with_seeds,
)
from align.errors import AlignError, EnvironmentFault, InputError, Interrupted, Problem
from align.files import is_full
from align.machines import Machines, machines_of
from align.recipe.kinds import KINDS
from align.secrets import hide
from align.signals import output_closed
from align.terminal import console, whoever_reads

if TYPE_CHECKING:
    from rich.console import Console

    from align.pipeline.runner import RunResult
    from align.pipeline.selection import Selection
    from align.recipe.load import LoadedRecipe

app = typer.Typer(
    name="align",
    help="Post-training alignment: one YAML recipe, many stages.",
    epilog="Exit codes: 2 input, 3 environment, 1 internal, 129, 130 and 143 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> NoReturn:
    """Run the command line and exit. The one place where errors become messages and exit codes."""
    arguments = _globals_first(sys.argv[1:])
    with whoever_reads(output_closed):
        try:
            slurm.translate(os.environ)
            app(args=arguments, prog_name="align")
            code = 0
        except Exception as error:
            code = _report(error, debug="--debug" in arguments)
        sys.exit(code)


def _globals_first(arguments: Sequence[str]) -> list[str]:
    """``--debug`` and ``--runs-dir`` may stand anywhere on the command line."""
    first, rest = [], []
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--debug" or argument.startswith("--runs-dir="):
            first.append(argument)
        elif argument == "--runs-dir":
            first += [argument, *itertools.islice(remaining, 1)]
        else:
            rest.append(argument)
    return [*first, *rest]


def _report(error: Exception, *, debug: bool) -> int:
    """Print an error on stderr, a line for each problem, and return the exit code."""
    if debug:
        print(hide("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    if isinstance(error, AlignError):
        code, problems = error.exit_code, _own_problems(error)
    elif (fault := _machine_fault(error)) is not None:
        code, problems = EnvironmentFault.exit_code, (fault,)
    else:
        where = "" if debug else "; run again with --debug for the traceback, and please report it"
        code, problems = 1, (Problem(f"internal error{_where(error)}: {type(error).__name__}: {error}{where}"),)
    asked = isinstance(error, Interrupted)  # a stop that the user asked for is not an error
    for problem in problems:
        print(problem if asked else f"error: {problem}", file=sys.stderr)
    return code


def _own_problems(error: AlignError) -> tuple[Problem, ...]:
    """The problems to print; none on a process that only stopped because the first one did, which prints them
    itself."""
    from align.pipeline.processes import StoppedWithRank0

    return () if isinstance(error, StoppedWithRank0) else error.problems


def _machine_fault(error: Exception) -> Problem | None:
    """The problem for an error about memory, disk or permissions, which any library may raise; None for other
    errors."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    torch: Any = sys.modules.get("torch")
    if (
        isinstance(error, MemoryError)
        or (torch and isinstance(error, torch.OutOfMemoryError))
        or "DefaultCPUAllocator" in text
    ):
        return Problem(
            f"out of memory{_where(error)}: {text}",
            hint="lower train.microbatch_tokens, or set train.gradient_checkpointing: true",
        )
    if is_full(error):
        return Problem(f"{os.strerror(errno.ENOSPC)}{_where(error)}: {getattr(error, 'filename', None) or text}")
    if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO):
        return Problem(f"{error.strerror}{_where(error)}: {error.filename or text}")
    return None


def _where(error: Exception) -> str:
    """The notes that trainer and runner added about where it happened; empty outside a run."""
    return "".join(f" {note}" for note in getattr(error, "__notes__", ()))


def _print_version(wanted: bool) -> None:
    if wanted:
        from align import __version__

        print(f"align {__version__}")
        raise typer.Exit


@app.callback()
def _globals(
    ctx: typer.Context,
    runs_dir: Annotated[Path, typer.Option("--runs-dir", help="Where runs are kept.")] = Path("runs"),
    debug: Annotated[bool, typer.Option("--debug", help="Print tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    ctx.obj = runs_dir


def _load(arguments: Sequence[str] | None, recipe: str | None, more: Sequence[str] = ()) -> LoadedRecipe:
    """The recipe of a command line; ``more`` are overrides that come last."""
    from align.recipe.load import load_recipe

    given = [*(arguments or ()), *more]
    if recipe is None and not given:
        raise InputError("no recipe given", hint="name a file or a shipped recipe; `align recipes` lists these")
    return load_recipe(recipe if recipe is not None else given.pop(0), given)


@app.command()
def check(
    ctx: typer.Context,
    arguments: Arguments = None,
    recipe: RecipeOption = None,
    data: Annotated[
        bool, typer.Option("--data", help="Look at the first rows of all data, and at all else that `run` looks at.")
    ] = False,
) -> None:
    """Check a recipe and print every problem in it. Loads no model."""
    loaded = _load(arguments, recipe)
    from align.preflight.models_here import refused

    if problems := refused(loaded):
        raise InputError(problems)
    from align.preflight.model_limits import require_models

    notes = require_models(loaded, loaded.order)
    looked = ""
    if data:
        from align.preflight.checks import look

        findings = look(loaded, ctx.obj, nproc=None)
        for line in findings.skipped:
            print(f"not looked at: {line}")
        findings.raise_them()
        stages_looked_at = f"{findings.looked} {'stage starts' if findings.looked == 1 else 'stages start'} from"
        looked = (
            f"; looked at what {stages_looked_at}"
            if findings.looked
            else "; all stages are up to date: nothing to look at"
        )
    stages = ", ".join(f"{name} ({loaded.recipe.stages[name].kind})" for name in loaded.order)
    print(f"{loaded.recipe.name}: ok; stages in order: {stages}{looked}")
    for note in notes:
        print(f"note: {note}")


@app.command()
def plan(
    ctx: typer.Context,
    arguments: Arguments = None,
    recipe: RecipeOption = None,
    nproc: PlannedProcesses = None,
    nnodes: PlannedMachines = None,
    only: Only = None,
    start: From = None,
    force: Force = None,
    fresh: Fresh = False,
    replace: Replace = False,
) -> None:
    """Print what a run with these options would do: which stages and why, steps, memory, disk, time. Refuses what
    cannot fit."""
    from align.planning.plan import make_plan, show

    made = make_plan(
        _load(arguments, recipe),
        ctx.obj,
        nproc=nproc,
        nodes=nnodes,
        selection=selection_of(only, start, force, fresh=fresh, replace=replace),
    )
    show(made, console())
    if made.faults:
        raise InputError(made.faults)
    if made.problems:
        raise EnvironmentFault(made.problems)


@app.command()
def run(
    ctx: typer.Context,
    arguments: Arguments = None,
    recipe: RecipeOption = None,
    nproc: NumProcesses = 1,
    nnodes: NumMachines = 1,
    node_rank: NodeRank = None,
    rendezvous: Rendezvous = None,
    only: Only = None,
    start: From = None,
    force: Force = None,
    fresh: Fresh = False,
    replace: Replace = False,
    seeds: Seeds = None,
    as_json: AsJson = False,
) -> None:
    """Run a recipe. Stages that are up to date are not run again; an interrupted run goes on where it stopped."""
    recipes = with_seeds(lambda more: _load(arguments, recipe, more), seeds)
    machines = machines_of(nnodes, node_rank, rendezvous)
    _run(recipes, ctx.obj, nproc, machines, selection_of(only, start, force, fresh=fresh, replace=replace), as_json)


@app.command("slurm")
def slurm_script(arguments: Arguments = None, recipe: RecipeOption = None) -> None:
    """Print a Slurm batch script that runs a recipe on the machines that its `hardware` describes. Submits nothing."""
    from align.commands.batch_script import batch_script

    loaded = _load(arguments, recipe)
    print(batch_script(loaded, [*(arguments or []), *(["--recipe", str(recipe)] if recipe else [])]))


def _run(
    recipes: Sequence[LoadedRecipe],
    runs_dir: Path,
    nproc: int,
    machines: Machines,
    selection: Selection,
    as_json: bool,
) -> None:
    """Run the recipes one after the other."""
    selection.stages(recipes[0])  # raises for an unknown name before any process is started
    if nproc * machines.count > 1:
        if "WORLD_SIZE" in os.environ:
            option = "--nproc" if machines.count == 1 else "--nnodes"
            raise InputError(
                f"{option} inside a launcher", hint="torchrun, accelerate or Slurm started the processes already"
            )
        from align.preflight.checks import require
        from align.training.launch import respawn, this_command

        for loaded in recipes:  # one error instead of one from each process
            require(loaded, runs_dir, nproc=nproc * machines.count, here=nproc, selection=selection, thorough=False)
        raise typer.Exit(respawn(nproc, this_command(), machines))
    from align.pipeline.runner import run_recipe

    first = os.environ.get("RANK", "0") == "0"
    several = "WORLD_SIZE" in os.environ
    out = console(stderr=as_json)
    results = []
    try:
        for loaded in recipes:
            results.append(run_recipe(loaded, selection=selection, runs_dir=runs_dir, console=out))
            if first and not several:
                _summarise(results[-1], out)
    finally:
        if several:
            from align.training.launch import leave

            leave()
    if not first:
        return
    for result in results if several else ():  # printed only now, after all processes left their group
        _summarise(result, out)
    if len(results) > 1:
        from align.report.text import seeds

        seeds.show(recipes[0].recipe.name.rpartition("-seed-")[0], [result.folder for result in results], out)
    if as_json:
        _print_json(results)


def _print_json(results: Sequence[RunResult]) -> None:
    from align.report.text.ls import Listed
    from align.report.text.seeds import as_json
    from align.runs.record import read_run

    objects = []
    for result in results:
        listed = Listed(result.folder, read_run(result.folder)).as_json()
        objects.append(listed | {"ran": result.ran, "up_to_date": result.up_to_date})
    if len(results) == 1:
        print(json.dumps(objects[0], ensure_ascii=False))
    else:
        print(
            json.dumps(
                {"runs": objects, "over_seeds": as_json([result.folder for result in results])}, ensure_ascii=False
            )
        )


def _summarise(result: RunResult, out: Console) -> None:
    """Write the report of a run that did something, and print a summary. If this fails it is only a warning, since the
    results are complete."""
    if not result.ran:
        return
    try:
        from align.report.html.page import write_report
        from align.report.text.summary import show
        from align.runs.record import read_run

        record = read_run(result.folder)
        show(record, write_report(record), out)
    except Exception as error:
        print(f"warning: no report: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)


def _stage_command(kind: str) -> Callable[..., None]:
    def command(
        ctx: typer.Context,
        arguments: Arguments = None,
        recipe: RecipeOption = None,
        nproc: NumProcesses = 1,
        nnodes: NumMachines = 1,
        node_rank: NodeRank = None,
        rendezvous: Rendezvous = None,
        only: Only = None,
        force: Force = None,
        fresh: Fresh = False,
        replace: Replace = False,
        as_json: AsJson = False,
    ) -> None:
        _run(
            [_load(arguments, recipe)],
            ctx.obj,
            nproc,
            machines_of(nnodes, node_rank, rendezvous),
            selection_of(only, None, force, fresh=fresh, replace=replace, kinds=[kind]),
            as_json,
        )

    return command


for _kind, (_, _words) in KINDS.items():
    app.command(_kind.replace("_", "-"), help=f"Run a recipe's {_kind} stages ({_words}) from what is there already.")(
        _stage_command(_kind)
    )


@app.command()
def recipes() -> None:
    """List the shipped recipes."""
    from align.recipe.load import shipped_recipes

    summaries = {
        path.stem: path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for path in shipped_recipes()
    }
    for name, summary in summaries.items():
        print(f"{name:<{max(map(len, summaries))}}  {summary}")


@app.command()
def doctor() -> None:
    """Say whether this environment fits together, and what to do if not."""
    from align.doctor import main as diagnose

    raise typer.Exit(diagnose())


for _part in (models, evaluate, runs, data, imports):
    _part.add_to(app)

if __name__ == "__main__":
    main()
