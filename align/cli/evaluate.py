"""``align eval``: evaluating models from the command line, which is turned into a recipe. Heavy imports are inside the
command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from align.cli.options import Engine, Replace, engine_named
from align.cli.source import SourceKeys, source_of, takes_source_keys
from align.errors import AlignError
from align.terminal import console


@takes_source_keys
def evaluate_models(
    ctx: typer.Context,
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...", help="Runs, RUN/STAGE, folders, .gguf files or hub ids; compared with the first."
        ),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(help="A benchmark's file, or held-out conversations or prompts. May be repeated."),
    ] = None,
    tasks: Annotated[
        str,
        typer.Option(
            help="Benchmarks, with commas, such as ifeval,gsm8k. Each takes the --data file with its columns."
        ),
    ] = "",
    probes: Annotated[str, typer.Option(help="Shipped probes, with commas: identity, json.")] = "",
    scorer: Annotated[
        list[str] | None,
        typer.Option(
            help="Scorer of answers to held-out prompts: a reward model or package.module:function. May be repeated."
        ),
    ] = None,
    lm_eval_tasks: Annotated[str, typer.Option(help="Tasks of lm-evaluation-harness, with commas.")] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first N rows of each file.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Answers to each held-out prompt; 4 when absent.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same samples.")] = 17,
    engine: Engine = "auto",
    replace: Replace = False,
    out: Annotated[Path | None, typer.Option("--out", help="Write the report to this file as well, as JSON.")] = None,
    *,
    keys: SourceKeys,
) -> None:
    """Evaluate models without a recipe: benchmarks, probes, held-out data. The recipe that stands for it is kept beside
    the run."""
    engine_named(engine)
    from align.commands.evaluate import STAGE, quick_recipe, write_recipe
    from align.commands.named_models import model_of_run
    from align.evaluation.table import table
    from align.files import atomic_write
    from align.pipeline.runner import run_recipe
    from align.pipeline.selection import Selection
    from align.recipe.load import load_recipe

    options: dict[str, Any] = {"samples_per_prompt": samples, "scorers": scorer, "probes": _names(probes)}
    options |= {"lm_eval_tasks": _names(lm_eval_tasks), "rollout": None if engine == "auto" else {"engine": engine}}
    source = source_of("given", **keys)
    recipe = quick_recipe(
        [str(model_of_run(model, ctx.obj) or model) for model in models],
        tasks=_names(tasks),
        data=data or [],
        limit=limit,
        seed=seed,
        max_new_tokens=max_new_tokens,
        options=options,
        reading=source.model_dump(mode="json", exclude_unset=True, exclude={"path"}),
    )
    terminal = console()
    written = write_recipe(recipe, ctx.obj)
    try:
        loaded = load_recipe(str(written))
    except AlignError:
        written.unlink()
        raise
    result = run_recipe(loaded, runs_dir=ctx.obj, console=terminal, selection=Selection(replace=replace))
    report = (result.folder / "stages" / STAGE / "report.json").read_text(encoding="utf-8")
    if STAGE in result.up_to_date:  # otherwise the stage has printed it
        terminal.print(table(STAGE, json.loads(report)))
    if out is not None:
        atomic_write(out, report)
        print(f"{out}: written")


def _names(text: str) -> list[str]:
    """Names separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def add_to(app: typer.Typer) -> None:
    """Make it a command of ``app``."""
    app.command("eval")(evaluate_models)
