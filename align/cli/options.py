"""Arguments and options that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from align.errors import InputError

if TYPE_CHECKING:
    from align.pipeline.selection import Selection
    from align.recipe.load import LoadedRecipe
    from align.recipe.schema import Rollout

Arguments = Annotated[
    list[str] | None,
    typer.Argument(metavar="RECIPE [KEY=VALUE]...", help="A file or a shipped recipe's name, then overrides."),
]
RecipeOption = Annotated[str | None, typer.Option("--recipe", help="The recipe, instead of the first argument.")]
PlannedProcesses = Annotated[
    int | None,
    typer.Option("--nproc", min=1, help="Processes; without it one for each GPU of the recipe's `hardware`, or one."),
]
PlannedMachines = Annotated[
    int | None,
    typer.Option("--nnodes", min=1, help="Machines with --nproc processes each; without it those of `hardware`."),
]
NumProcesses = Annotated[int, typer.Option("--nproc", min=1, help="Processes on this machine (data parallel).")]
NumMachines = Annotated[
    int,
    typer.Option("--nnodes", min=1, help="Machines on which this command is started, with --nproc processes each."),
]
NodeRank = Annotated[
    int | None, typer.Option("--node-rank", min=0, help="With --nnodes: the number of this machine, from 0 on.")
]
Rendezvous = Annotated[
    str | None,
    typer.Option(
        "--rendezvous", metavar="HOST:PORT", help="With --nnodes: address of machine 0 and a free port there."
    ),
]
Only = Annotated[
    list[str] | None,
    typer.Option(
        "--only", metavar="STAGE", help="Run these stages only (A,B or repeated); what they need must be there."
    ),
]
From = Annotated[
    list[str] | None, typer.Option("--from", metavar="STAGE", help="Run this stage and what follows from it only.")
]
Force = Annotated[
    list[str] | None,
    typer.Option(
        "--force",
        metavar="STAGE",
        help=(
            "Run this stage though it is up to date. What follows from it runs again only if its result comes out"
            " different."
        ),
    ),
]
Fresh = Annotated[
    bool,
    typer.Option("--fresh", help="Throw away the checkpoints of what is about to run: it starts from the beginning."),
]
Replace = Annotated[
    bool,
    typer.Option(
        "--replace", help="Let finished results be replaced by those of other settings or inputs; also of what follows."
    ),
]
Seeds = Annotated[
    str | None,
    typer.Option(
        "--seeds",
        metavar="A,B,...",
        help="Run it once with each of these seeds, as NAME-seed-A ..., and show means over them.",
    ),
]
Engine = Annotated[
    str, typer.Option(help="What samples: auto, vllm, transformers, or another `rollout.engine` that needs no keys.")
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print the result as one JSON object, as `ls --json` does; the rest on stderr.")
]


def with_seeds(load: Callable[[Sequence[str]], LoadedRecipe], seeds: str | None) -> list[LoadedRecipe]:
    """The recipe, or a copy of it with its own name for each of the seeds. ``load`` gets further overrides.

    Raises:
        InputError: ``seeds`` is not a list of different whole numbers, or has too few for an interval.
    """
    loaded = load(())
    if seeds is None:
        return [loaded]
    wanted = [text.strip() for text in seeds.split(",")]
    if (
        len(wanted) < 2
        or len(set(wanted)) < len(wanted)
        or not all(text.isascii() and text.isdecimal() for text in wanted)
    ):
        raise InputError(
            f"--seeds: expected two or more different whole numbers, got `{seeds[:80]}`", hint="they are written 1,2,3"
        )
    return [load((f"name={loaded.recipe.name}-seed-{int(text)}", f"seed={int(text)}")) for text in wanted]


def engine_named(name: str) -> Rollout:
    """What ``--engine`` names. Raises :class:`InputError` for an engine that is not there or needs keys."""
    from align.recipe.blocks.rollout import CHOICES, engine_alone

    found = engine_alone(name)
    if found is None:
        known = ", ".join(choice for choice in CHOICES if engine_alone(choice) is not None)
        raise InputError(f"--engine {name}: must be one of {known}")
    return found


def selection_of(
    only: Sequence[str] | None,
    start: Sequence[str] | None,
    force: Sequence[str] | None,
    *,
    fresh: bool,
    replace: bool,
    kinds: Sequence[str] = (),
) -> Selection:
    """The selection by ``--only``, ``--from``, ``--force``, ``--fresh`` and ``--replace``. Raises :class:`InputError`
    for an empty name."""
    from align.pipeline.selection import Selection

    found = {"--only": only, "--from": start, "--force": force}
    names = {
        option: tuple(name.strip() for text in texts or () for name in text.split(","))
        for option, texts in found.items()
    }
    for option, given in names.items():
        if "" in given:
            raise InputError(f"{option}: an empty name", hint="stages are written A,B")
    return Selection(tuple(kinds), names["--only"], names["--from"], names["--force"], fresh, replace)


def cache_in(runs_dir: Path) -> Path | None:
    """The runs' cache, in which dequantised models are kept; None if it does not exist."""
    cache = runs_dir / ".cache"
    return cache if cache.is_dir() else None
