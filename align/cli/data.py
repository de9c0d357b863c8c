"""``align data``: look at data, and write them in align's own shape or for other tools. Heavy imports wait until a
command runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from align.cli.options import cache_in
from align.cli.source import SourceKeys, source_of, takes_source_keys
from align.errors import InputError, Problem
from align.terminal import console

if TYPE_CHECKING:
    from align.data.chat.encoder import Encoder
    from align.data.formats.formats import Want as Wanted

File = Annotated[
    str,
    typer.Argument(
        help="A data file or folder, package:PKG/FILE, a hub data set id, or a whole source: '{path: ..., where: ...}'."
    ),
]
Want = Annotated[str | None, typer.Option(help="conversation, preference, unpaired or prompt; found out when absent.")]


def _want(name: str | None) -> Wanted | None:
    """Checks the name of a type of record. Raises :class:`InputError` for an unknown one."""
    from typing import get_args

    from align.data.formats.formats import Want as Wanted

    wants: dict[str, Wanted] = {one: one for one in get_args(Wanted)}
    if name is not None and name not in wants:
        raise InputError(f"--want {name[:40]}: must be one of {', '.join(wants)}")
    return wants[name] if name else None


def list_formats(
    name: Annotated[str | None, typer.Argument(help="A preset; all are listed when absent.")] = None,
) -> None:
    """Print the known row formats, or one preset as the mapping that it stands for, with an example row."""
    from align.data.formats.column_names import yaml_line
    from align.recipe.blocks.base import FORMATS
    from align.recipe.rows.presets import PRESETS

    if name is None:
        lines = [
            f"built in: {', '.join(FORMATS)}",
            *(f"{one} ({preset.kind}): {preset.hub}: {preset.says}" for one, preset in PRESETS.items()),
        ]
    elif name in PRESETS:
        preset = PRESETS[name]
        lines = [f"{name} ({preset.kind}): {preset.hub}", preset.says]
        lines += [f"has to be told more: format: {preset.asks}"] if preset.asks else []
        lines += ["a test set of the field: not to be trained on"] if preset.test_set else []
        if preset.code is not None:
            lines += [
                f"format: {name}",
                f"a function of the package reads it; what can be changed: {yaml_line(preset.parts[0].mapping)}",
            ]
        for part in preset.parts if preset.code is None else ():
            where = f"where: {yaml_line(part.where)}, " if part.where else ""
            lines.append(f"{where}format: {yaml_line(part.mapping)}")
        lines.append(f"a row: {yaml_line(preset.example)}")
    elif name in FORMATS:
        lines = [f"{name} is built in: docs/data.md has its rows"]
    else:
        raise InputError(f"no format `{name[:60]}`", hint="`align data formats` lists them")
    for line in lines:
        console().print(line, markup=False, highlight=False, soft_wrap=True)


@takes_source_keys
def inspect_data(
    ctx: typer.Context,
    file: File,
    model: Annotated[
        str | None, typer.Option(help="Show the rows as this model's tokens, trained ones coloured.")
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="Rows to show; all are counted.")] = 3,
    want: Want = None,
    max_length: Annotated[int, typer.Option(min=2, help="Longer rows count as dropped, in tokens.")] = 2048,
    *,
    keys: SourceKeys,
) -> None:
    """Show rows as a model will see them, with token counts, and what is left out and why. Exits with 2 when rows are
    bad, unless the source says `on_bad_row: skip`."""
    from align.recipe.reference_syntax import resolve

    source = source_of(file, **keys)
    location = resolve(source.path, Path.cwd())
    encoder = _encoder(model, ctx.obj)
    from align.commands.inspect_data import inspect

    inspect(source, location, model=encoder, want=_want(want), limit=limit, console=console(), max_length=max_length)


@takes_source_keys
def describe_data(
    ctx: typer.Context,
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE...", help="As for inspect; of several files it is also said what they share."),
    ],
    model: Annotated[str | None, typer.Option(help="Also count tokens, with this model's tokenizer.")] = None,
    want: Want = None,
    *,
    keys: SourceKeys,
) -> None:
    """Print what data hold in figures: rows, prompts, lengths, margins, scripts, duplicates, and how far words alone
    tell chosen from rejected. Exits with 2 when rows are bad, unless the source says `on_bad_row: skip`."""
    from rich.table import Table

    from align.commands.describe import describe, rows_of, shared_lines
    from align.data.sources.contents import wanted_of
    from align.recipe.reference_syntax import resolve
    from align.terminal import plain

    sources = [source_of(file, **keys) for file in files]
    locations = [resolve(source.path, Path.cwd()) for source in sources]
    encoder = _encoder(model, ctx.obj)
    descriptions = [
        describe(one, at, _want(want) or wanted_of(one, at), encoder)
        for one, at in zip(sources, locations, strict=True)
    ]
    table = Table("", box=None, pad_edge=False)
    for one in descriptions:
        table.add_column(plain(one.name), overflow="fold")
    for name, texts in rows_of(descriptions):
        table.add_row(plain(name), *map(plain, texts))
    console().print(table)
    for line in shared_lines(descriptions):
        console().print(plain(line), soft_wrap=True)
    bad: list[Problem] = []
    for one, source in zip(descriptions, sources, strict=True):
        assert one.read is not None
        try:
            for line in one.read.skipped(source):
                console().print(plain(line), soft_wrap=True)
        except InputError as error:
            bad += error.problems
    if bad:
        raise InputError(bad)


def _encoder(model: str | None, runs_dir: Path) -> Encoder | None:
    if model is None:
        return None
    from align.models.load import load_encoder
    from align.recipe.reference_syntax import resolve
    from align.recipe.schema import Model

    return load_encoder(Model(path=str(resolve(model, Path.cwd()))), cache=cache_in(runs_dir))


@takes_source_keys
def convert_data(
    file: File,
    out: Annotated[Path, typer.Option(help="The file to write: .jsonl, or .parquet.")],
    to: Annotated[str, typer.Option(help="Whose shape: align, trl, llama-factory, openai or kto.")] = "align",
    want: Want = None,
    replace: Annotated[bool, typer.Option("--replace", help="Let the file be replaced if it exists.")] = False,
    *,
    keys: SourceKeys,
) -> None:
    """Write data in align's own shape, or in another tool's, with where they come from beside the file. Exits with 2
    when rows are bad."""
    from align.commands.convert_data import convert
    from align.data.formats.other_tools import TARGETS, declaration
    from align.data.sources.contents import wanted_of
    from align.recipe.reference_syntax import resolve

    if to != "align" and to not in TARGETS:
        raise InputError(f"--to {to[:40]}: must be one of align, {', '.join(TARGETS)}")
    source = source_of(file, **keys)
    location = resolve(source.path, Path.cwd())
    kind = _want(want) or wanted_of(source, location)
    made = convert(source, location, out, to=to, want=kind, replace=replace)
    lines = made.lines()
    if to == "llama-factory":
        lines.append(f"for dataset_info.json: {json.dumps({out.stem: declaration(out.name, made.kind)})}")
    for line in lines:
        console().print(line, markup=False, highlight=False, soft_wrap=True)


def add_to(app: typer.Typer) -> None:
    """Make them commands of ``app data``."""
    group = typer.Typer(
        help="Look at data, and write them in align's own shape or for other tools.",
        no_args_is_help=True,
        rich_markup_mode=None,
    )
    group.command("inspect")(inspect_data)
    group.command("formats")(list_formats)
    group.command("describe")(describe_data)
    group.command("convert")(convert_data)
    app.add_typer(group, name="data")
