"""``align data``: look at data, and write them for other tools. Heavy imports wait until a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from align.cli.options import cache_in
from align.cli.source import Columns, Encoding, Format, Revision, RowsAt, Separator, Split, Subset, source_of
from align.errors import InputError
from align.terminal import console


def list_formats(
    name: Annotated[str | None, typer.Argument(help="A preset; all are listed when absent.")] = None,
) -> None:
    """Print the known row formats, or one preset as the mapping that it stands for, with an example row."""
    from align.data.words import yaml_line
    from align.recipe.base import FORMATS
    from align.recipe.presets import PRESETS

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
            lines += [f"format: {name}", f"a function of the package reads it; what can be changed: {yaml_line(preset.parts[0].mapping)}"]
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


def inspect_data(
    ctx: typer.Context,
    file: Annotated[str, typer.Argument(help="A data file or folder, package:PKG/FILE, or a hub data set id.")],
    model: Annotated[str | None, typer.Option(help="Show the rows as this model's tokens, trained ones coloured.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="Rows to show; all are counted.")] = 3,
    want: Annotated[str | None, typer.Option(help="conversation, preference, unpaired or prompt; found out when absent.")] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Longer rows count as dropped, in tokens.")] = 2048,
    format: Format = None,
    columns: Columns = None,
    split: Split = None,
    subset: Subset = None,
    revision: Revision = None,
    encoding: Encoding = None,
    separator: Separator = None,
    rows: RowsAt = None,
) -> None:
    """Show rows as a model will see them, with token counts, and what is left out and why. Exits with 2 when rows are bad."""
    from typing import get_args

    from align.recipe.refs import resolve

    files = {"split": split, "subset": subset, "revision": revision, "encoding": encoding, "separator": separator, "rows": rows}
    source = source_of(file, format=format, columns=columns, **files)
    location = resolve(file, Path.cwd())
    encoder = None
    if model is not None:
        found = str(resolve(model, Path.cwd()))
        from align.models.load import load_encoder
        from align.recipe.schema import Model

        encoder = load_encoder(Model(path=found), cache=cache_in(ctx.obj))
    from align.data.formats import Want
    from align.data.inspect import inspect

    wants: dict[str, Want] = {name: name for name in get_args(Want)}
    if want is not None and want not in wants:
        raise InputError(f"--want {want}: must be one of {', '.join(wants)}")
    inspect(source, location, model=encoder, want=wants[want] if want else None, limit=limit, console=console(), max_length=max_length)


def export_data(
    file: Annotated[str, typer.Argument(help="Preferences: a data file or folder, a stage's folder, or a hub data set id.")],
    out: Annotated[Path, typer.Option(help="The JSONL file to write.")],
    format: Format = None,
    columns: Columns = None,
    split: Split = None,
    subset: Subset = None,
    revision: Revision = None,
    encoding: Encoding = None,
    separator: Separator = None,
    rows: RowsAt = None,
) -> None:
    """Write preferences as pairs for TRL: one row for each chosen and rejected answer."""
    from align.data.export import export_pairs
    from align.recipe.refs import resolve

    files = {"split": split, "subset": subset, "revision": revision, "encoding": encoding, "separator": separator, "rows": rows}
    source = source_of(file, format=format, columns=columns, **files)
    print(f"{out}: {export_pairs(resolve(file, Path.cwd()), out, source):,} pairs")


def add_to(app: typer.Typer) -> None:
    """Make them commands of ``app data``."""
    group = typer.Typer(help="Look at data, and write them for other tools.", no_args_is_help=True, rich_markup_mode=None)
    group.command("inspect")(inspect_data)
    group.command("formats")(list_formats)
    group.command("export")(export_data)
    app.add_typer(group, name="data")
