"""``align import``: converting data declarations of other tools to sources of a recipe. Heavy imports are inside the
command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from align.errors import InputError, Problem

if TYPE_CHECKING:
    from align.commands.import_data import Imported


def import_sources(
    file: Annotated[
        str, typer.Argument(help="LLaMA-Factory's dataset_info.json, an axolotl recipe, or ms-swift's id:subset#n.")
    ],
    names: Annotated[list[str] | None, typer.Argument(help="Which data sets of it; all when absent.")] = None,
    columns: Annotated[str | None, typer.Option(help='ms-swift\'s --columns: {"their column": "query"}.')] = None,
    out: Annotated[Path | None, typer.Option(help="A new file for the sources; standard output when absent.")] = None,
) -> None:
    """Print another tool's data sets as sources of a recipe, and below them what has no counterpart."""
    from align import files
    from align.commands.import_data import as_yaml

    text = as_yaml(_read(file, names or (), columns), file)
    if out is None:
        print(text, end="")
        return
    if out.exists():
        raise InputError(f"{out} exists", hint="write to another file, or remove it")
    if not out.parent.is_dir():
        raise InputError(f"there is no folder {out.parent}")
    files.atomic_write(out, text)
    print(f"{out}: written")


def _read(file: str, names: tuple[str, ...] | list[str], columns: str | None) -> list[Imported]:
    import yaml

    from align.commands.import_data import axolotl, llama_factory, swift
    from align.data.strict_json import RowError, parse_text

    path = Path(file)
    suffix = path.suffix.lower()
    if suffix not in (".json", ".yaml", ".yml") or "::" in file:
        return swift(file, _object(columns, "--columns") if columns else None)
    if columns:
        raise InputError("--columns: has no effect here: it is for ms-swift's id:subset#n")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(Problem(f"cannot be read: {getattr(error, 'strerror', None) or error}", file=file)) from error
    if suffix == ".json":
        try:
            declared = parse_text(text, "", "expected an object of data sets")
        except RowError as error:
            raise InputError(Problem(error.message, file=file)) from error
        if not isinstance(declared, dict):
            raise InputError(Problem("expected an object of data sets, as in dataset_info.json", file=file))
        return llama_factory(declared, path.parent, names)
    try:
        declared = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(Problem(f"not valid YAML: {' '.join(str(error).split())[:120]}", file=file)) from error
    if not isinstance(declared, dict) or not isinstance(declared.get("datasets"), list):
        raise InputError(Problem("has no `datasets:` list, as an axolotl recipe has", file=file))
    return axolotl(declared, names)


def _object(text: str, option: str) -> dict[str, Any]:
    from align.data.strict_json import RowError, parse_text

    try:
        value = parse_text(text, option, "expected the JSON of an object")
    except RowError as error:
        raise InputError(f"{option}: {error.message}") from error
    if not isinstance(value, dict):
        raise InputError(f'{option}: expected the JSON of an object, such as {{"their column": "query"}}')
    return value


def add_to(app: typer.Typer) -> None:
    """Make it a command of ``app``."""
    app.command("import")(import_sources)
