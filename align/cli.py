"""The command line: parse, call, print. Everything heavy is imported inside the command that needs it, so that help is instant."""

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

from align import cli_runs
from align.cli_eval import evaluate_models
from align.cli_options import Arguments, Force, Fresh, From, NumProcesses, Only, RecipeOption, selection_of
from align.errors import AlignError, EnvironmentFault, InputError, Problem

if TYPE_CHECKING:
    from rich.console import Console

    from align.data.formats import Want
    from align.pipeline.selection import Selection
    from align.recipe.load import LoadedRecipe

KINDS = {
    "sft": "supervised fine-tuning",
    "reward": "reward models from preferences",
    "dpo": "preference optimisation",
    "ppo": "reinforcement learning",
    "select_prompts": "prompts worth learning from",
    "label": "preferences from scored samples",
    "self_contrast": "preferences from a policy's own samples",
    "trl": "KTO, GRPO and other trainers of TRL",
    "evaluate": "policies compared on held-out data",
}
"""Stage kinds that have a command of their own."""

app = typer.Typer(
    name="align",
    help="Post-training alignment: one YAML recipe, many stages.",
    epilog="Exit codes: 2 input, 3 environment, 1 internal, 130 and 143 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Look at data, and write them for other tools.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app, name="data")


def main() -> NoReturn:
    """Run the command line and exit. The one place where errors become messages and exit codes."""
    arguments = _globals_first(sys.argv[1:])
    try:
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
        traceback.print_exception(error)
    if isinstance(error, AlignError):
        code, problems = error.exit_code, _own_problems(error)
    elif (fault := _machine_fault(error)) is not None:
        code, problems = EnvironmentFault.exit_code, (fault,)
    else:
        where = "" if debug else "; run again with --debug for the traceback, and please report it"
        code, problems = 1, (Problem(f"internal error{_stage_of(error)}: {type(error).__name__}: {error}{where}"),)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return code


def _own_problems(error: AlignError) -> tuple[Problem, ...]:
    """Nothing on a process that only stopped because the first one did: that one prints why."""
    from align.pipeline.ranks import StoppedWithRank0

    return () if isinstance(error, StoppedWithRank0) else error.problems


def _machine_fault(error: Exception) -> Problem | None:
    """Memory, disk and permissions, whichever library noticed them."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    torch: Any = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in text:
        return Problem(
            f"out of memory{_stage_of(error)}: {text}", hint="lower train.microbatch_tokens, or set train.gradient_checkpointing: true"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO):
        return Problem(f"{error.strerror}{_stage_of(error)}: {error.filename or text}")
    return None


def _stage_of(error: Exception) -> str:
    """The runner's note on where it happened; empty outside a run."""
    return "".join(f" {note}" for note in getattr(error, "__notes__", ())[:1])


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
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")] = False,
) -> None:
    ctx.obj = runs_dir


def _load(arguments: Sequence[str] | None, recipe: str | None) -> LoadedRecipe:
    from align.recipe.load import load_recipe

    given = list(arguments or ())
    if recipe is None and not given:
        raise InputError("no recipe given", hint="name a file or a shipped recipe; `align recipes` lists these")
    return load_recipe(recipe if recipe is not None else given.pop(0), given)


def _console() -> Console:
    from align.terminal import console

    return console()


@app.command()
def check(arguments: Arguments = None, recipe: RecipeOption = None) -> None:
    """Check a recipe and print every problem in it. Loads no model."""
    loaded = _load(arguments, recipe)
    stages = ", ".join(f"{name} ({loaded.recipe.stages[name].kind})" for name in loaded.order)
    print(f"{loaded.recipe.name}: ok; stages in order: {stages}")


@app.command()
def plan(
    ctx: typer.Context,
    arguments: Arguments = None,
    recipe: RecipeOption = None,
    nproc: NumProcesses = 1,
    only: Only = None,
    start: From = None,
    force: Force = None,
    fresh: Fresh = False,
) -> None:
    """Print what a run with these options would do: which stages and why, steps, memory, disk, time. Refuses what cannot fit."""
    from align.pipeline.plan import make_plan, show

    made = make_plan(_load(arguments, recipe), ctx.obj, nproc=nproc, selection=selection_of(only, start, force, fresh))
    show(made, _console())
    if made.problems:
        raise EnvironmentFault(made.problems)


@app.command()
def run(
    ctx: typer.Context,
    arguments: Arguments = None,
    recipe: RecipeOption = None,
    nproc: NumProcesses = 1,
    only: Only = None,
    start: From = None,
    force: Force = None,
    fresh: Fresh = False,
) -> None:
    """Run a recipe. Stages that are up to date are not run again; an interrupted run goes on where it stopped."""
    _run(_load(arguments, recipe), ctx.obj, nproc, selection_of(only, start, force, fresh))


def _run(loaded: LoadedRecipe, runs_dir: Path, nproc: int, selection: Selection) -> None:
    selection.stages(loaded)  # a wrong name is told before any process starts
    if nproc > 1:
        if "WORLD_SIZE" in os.environ:
            raise InputError("--nproc inside a launcher", hint="torchrun, accelerate or Slurm started the processes already")
        from align.training.launch import respawn, this_command

        raise typer.Exit(respawn(nproc, this_command()))
    from align.pipeline.runner import run_recipe

    try:
        result = run_recipe(loaded, selection=selection, runs_dir=runs_dir, console=_console())
    finally:
        if "WORLD_SIZE" in os.environ:
            from align.training.launch import leave

            leave()
    if result.ran and os.environ.get("RANK", "0") == "0":
        _summarise(result.folder)


def _summarise(folder: Path) -> None:
    """Write the run's report and print it in short. What the run made is there in any case, so a failure is a warning."""
    try:
        from align.report.page import write_report
        from align.report.run import read_run
        from align.report.terminal import show

        record = read_run(folder)
        show(record, write_report(record), _console())
    except Exception as error:
        print(f"warning: no report: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)


def _stage_command(kind: str) -> Callable[..., None]:
    def command(
        ctx: typer.Context,
        arguments: Arguments = None,
        recipe: RecipeOption = None,
        nproc: NumProcesses = 1,
        only: Only = None,
        force: Force = None,
        fresh: Fresh = False,
    ) -> None:
        _run(_load(arguments, recipe), ctx.obj, nproc, selection_of(only, None, force, fresh, [kind]))

    return command


for _kind, _words in KINDS.items():
    app.command(_kind.replace("_", "-"), help=f"Run a recipe's {_kind} stages ({_words}) from what is there already.")(
        _stage_command(_kind)
    )


@app.command()
def report(
    ctx: typer.Context,
    run: Annotated[str, typer.Argument(help="The name of a run, or its folder.")],
    out: Annotated[Path | None, typer.Option("--out", help="Write it here, instead of report.html in the run's folder.")] = None,
) -> None:
    """Write a run's report, one HTML file that opens from disk, and print it in short."""
    from align.report.page import write_report
    from align.report.run import find_run, read_run
    from align.report.terminal import show

    record = read_run(find_run(run, ctx.obj))
    show(record, write_report(record, out), _console())


@app.command()
def recipes() -> None:
    """List the shipped recipes."""
    from align.recipe.load import shipped_recipes

    found = {path.stem: path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for path in shipped_recipes()}
    for name, summary in found.items():
        print(f"{name:<{max(map(len, found))}}  {summary}")


@app.command()
def doctor() -> None:
    """Say whether this environment fits together, and what to do if not."""
    from align.doctor import main as diagnose

    raise typer.Exit(diagnose())


@app.command()
def chat(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="A folder, a .gguf file, package:PKG/FILE, or a hub id.")],
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.7,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
) -> None:
    """Talk to a model in the terminal."""
    from align.recipe.refs import resolve

    found = str(resolve(model, Path.cwd()))
    from align.models.chat import chat as talk

    talk(found, max_new_tokens=max_new_tokens, temperature=temperature, system=system, console=_console(), cache=_cache(ctx.obj))


@app.command()
def generate(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="A folder, a .gguf file, package:PKG/FILE, or a hub id.")],
    prompts: Annotated[str, typer.Option(help="A file or folder of prompts, package:PKG/FILE, or a hub data set id.")],
    out: Annotated[Path | None, typer.Option(help="JSONL file to write; standard output when absent, and then nothing is kept.")] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Completions of each prompt.")] = 1,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens that hold this much probability.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest completion, in tokens.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same samples.")] = 0,
    engine: Annotated[str, typer.Option(help="auto, vllm or transformers.")] = "auto",
) -> None:
    """Sample completions of prompts, one JSON line for each prompt. The same command goes on where it was stopped."""
    from align.recipe.refs import resolve

    if engine not in ("auto", "vllm", "transformers"):
        raise InputError(f"--engine {engine}: must be one of auto, vllm, transformers")
    if not top_p:
        raise InputError("--top-p must be more than 0")
    found, location = str(resolve(model, Path.cwd())), resolve(prompts, Path.cwd())
    from rich.console import Console

    from align.recipe.schema import Rollout
    from align.rollout.engine import Sampling
    from align.stages.generate import generate as sample

    sampling = Sampling(max_new_tokens, n=n, temperature=temperature, top_p=top_p, seed=seed)
    rollout, cache = Rollout.model_validate({"engine": engine}), ctx.obj / ".cache"
    sample(found, location, sampling, rollout, out=out, cache=cache, console=Console(stderr=True), show=print)


def _cache(runs_dir: Path) -> Path | None:
    """The runs' cache, where dequantised models are kept, if there is one."""
    cache = runs_dir / ".cache"
    return cache if cache.is_dir() else None


app.command("eval")(evaluate_models)


@app.command()
def score(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="The folder of a reward model.")],
    file: Annotated[str, typer.Argument(help="Preferences, conversations, or prompts with `answers`: a file, or a hub data set id.")],
    out: Annotated[Path | None, typer.Option("--out", help="Write the scores to this file; printed when absent.")] = None,
) -> None:
    """Score the answers in a file, one JSON object a row."""
    from align.recipe.refs import resolve

    location, found = resolve(file, Path.cwd()), str(resolve(model, Path.cwd()))
    from align.recipe.schema import Model
    from align.scoring.reward_model import RewardModelScorer
    from align.scoring.rows import score_rows
    from align.training.launch import ranks

    scorer = RewardModelScorer(Model(path=found), device=ranks().device, cache=_cache(ctx.obj))
    lines = (json.dumps(row, ensure_ascii=False) for row in score_rows(scorer, location))
    if out is None:
        for line in lines:
            print(line, flush=True)
    else:
        from align.files import atomic_write

        atomic_write(out, "".join(f"{line}\n" for line in lines))
        print(f"{out}: written")


@data_app.command("inspect")
def inspect_data(
    ctx: typer.Context,
    file: Annotated[str, typer.Argument(help="A data file or folder, package:PKG/FILE, or a hub data set id.")],
    model: Annotated[str | None, typer.Option(help="Show the rows as this model's tokens, trained ones coloured.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="Rows to show; all are counted.")] = 3,
    want: Annotated[str | None, typer.Option(help="conversation, preference or prompt; found out when absent.")] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Longer rows count as dropped, in tokens.")] = 2048,
) -> None:
    """Show rows as a model will see them, with token counts, and what is left out and why."""
    from align.recipe.refs import resolve

    wants: dict[str, Want] = {"conversation": "conversation", "preference": "preference", "prompt": "prompt"}
    if want is not None and want not in wants:
        raise InputError(f"--want {want}: must be one of {', '.join(wants)}")
    location = resolve(file, Path.cwd())
    encoder = None
    if model is not None:
        found = str(resolve(model, Path.cwd()))
        from align.models.load import load_encoder
        from align.recipe.schema import Model

        encoder = load_encoder(Model(path=found), cache=_cache(ctx.obj))
    from align.data.inspect import inspect

    inspect(location, model=encoder, want=wants[want] if want else None, limit=limit, console=_console(), max_length=max_length)


@data_app.command("export")
def export_data(
    file: Annotated[str, typer.Argument(help="Preferences: a data file or folder, a stage's folder, or a hub data set id.")],
    out: Annotated[Path, typer.Option(help="The JSONL file to write.")],
) -> None:
    """Write preferences as pairs for TRL: one row for each chosen and rejected answer."""
    from align.data.export import export_pairs
    from align.recipe.refs import resolve

    print(f"{out}: {export_pairs(resolve(file, Path.cwd()), out):,} pairs")


cli_runs.add_to(app)

if __name__ == "__main__":
    main()
