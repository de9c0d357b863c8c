"""The commands that use a model: chat, generate, score and merge. Heavy imports are inside the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from align.cli.options import Engine, cache_in, engine_named
from align.cli.source import SourceKeys, source_of, takes_source_keys
from align.errors import InputError
from align.terminal import console


def chat(
    ctx: typer.Context,
    model: Annotated[
        str, typer.Argument(help="A run, RUN/STAGE, a folder, a .gguf file, package:PKG/FILE, or a hub id.")
    ],
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.7,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
) -> None:
    """Talk to a model in the terminal."""
    from align.commands.named_models import model_named

    path = model_named(model, ctx.obj)
    from align.commands.chat import chat as talk

    talk(
        path,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        system=system,
        console=console(),
        cache=cache_in(ctx.obj),
    )


@takes_source_keys
def generate(
    ctx: typer.Context,
    model: Annotated[
        str, typer.Argument(help="A run, RUN/STAGE, a folder, a .gguf file, package:PKG/FILE, or a hub id.")
    ],
    prompts: Annotated[str, typer.Option(help="A file or folder of prompts, package:PKG/FILE, or a hub data set id.")],
    out: Annotated[
        Path | None, typer.Option(help="JSONL file to write; standard output when absent, and then nothing is kept.")
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Completions of each prompt.")] = 1,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 1.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens that hold this much probability.")
    ] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest completion, in tokens.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same samples.")] = 0,
    engine: Engine = "auto",
    *,
    keys: SourceKeys,
) -> None:
    """Sample completions of prompts, one JSON line for each prompt. The same command goes on where it was stopped."""
    from align.commands.named_models import model_named
    from align.recipe.reference_syntax import resolve

    rollout = engine_named(engine)
    if not top_p:
        raise InputError("--top-p must be more than 0")
    source = source_of(prompts, **keys)
    path, location = model_named(model, ctx.obj), resolve(source.path, Path.cwd())
    from rich.console import Console

    from align.commands.generate import generate as sample
    from align.rollout.engine import Sampling

    sampling = Sampling(max_new_tokens, n=n, temperature=temperature, top_p=top_p, seed=seed)
    sample(
        path,
        location,
        sampling,
        rollout,
        source=source,
        out=out,
        cache=ctx.obj / ".cache",
        console=Console(stderr=True),
        show=print,
    )


@takes_source_keys
def score(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="A run, RUN/STAGE, or the folder of a reward model.")],
    file: Annotated[
        str, typer.Argument(help="Preferences, conversations, or prompts with `answers`: a file, or a hub data set id.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the scores to this file; printed when absent.")
    ] = None,
    *,
    keys: SourceKeys,
) -> None:
    """Score the answers in a file, one JSON object a row."""
    from align.commands.named_models import model_named
    from align.recipe.reference_syntax import resolve

    source = source_of(file, **keys)
    location, path = resolve(source.path, Path.cwd()), model_named(model, ctx.obj, ["reward_model"])
    from align.commands.score import score_rows
    from align.recipe.schema import Model
    from align.scoring.reward_model import RewardModelScorer
    from align.training.launch import ranks

    scorer = RewardModelScorer(Model(path=path), device=ranks().device, cache=cache_in(ctx.obj))
    lines = (json.dumps(row, ensure_ascii=False) for row in score_rows(scorer, location, source))
    if out is None:
        for line in lines:
            print(line, flush=True)
    else:
        from align.files import atomic_write

        atomic_write(out, "".join(f"{line}\n" for line in lines))
        print(f"{out}: written")


def merge(
    ctx: typer.Context,
    source: Annotated[
        str, typer.Argument(metavar="RUN_OR_FOLDER", help="An adapter's folder, a stage's result, or a run.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The new folder for the merged model.")],
    stage: Annotated[str | None, typer.Option(help="Of the run; the last one that left a model when absent.")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32 or bf16; the base's own when absent.")] = None,
) -> None:
    """Merge an adapter into its base: one plain model, proved to be the same."""
    if dtype not in (None, "fp32", "bf16"):
        raise InputError(f"--dtype {dtype}: must be one of fp32, bf16")
    from align.commands.merge import merge as write

    made = write(source, ctx.obj, out, stage=stage, dtype=dtype, cache=cache_in(ctx.obj))  # type: ignore[arg-type]
    print(f"{out}: {made.source} merged into {made.base}, {made.dtype}; {made.difference}")
    if not made.template:
        print("note: its tokenizer has no chat template; give one with model.chat_template when you use it")


def add_to(app: typer.Typer) -> None:
    """Make them commands of ``app``."""
    for command in (chat, generate, score, merge):
        app.command()(command)
