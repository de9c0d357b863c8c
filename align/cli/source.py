"""Options for the keys of a data source, for commands that read data. They have the names of the recipe keys and are
checked by the same schema."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any

import typer

from align.errors import InputError, Problem

if TYPE_CHECKING:
    from align.recipe.schema import DataSource

SourceKeys = dict[str, Any]
"""The values of a command's options for its data source; None for an option that is not given."""


def _option(name: str, words: str, kind: Any = str, **more: Any) -> Any:
    return Annotated[kind | None, typer.Option(f"--{name}", help=words, **more)]


_COLUMNS = (
    "What columns hold: prompt=Question; or a mapping as recipes write it: '{prompt: Question, answers: [A, B], ...}'."
)
_OPTIONS: dict[str, Any] = {
    "format": _option("format", "Row format: a name, or package.module:function; found out when absent."),
    "columns": _option("columns", _COLUMNS, list[str], metavar="NAME=COLUMN,..."),
    "split": _option("split", "Of a hub data set, or of a folder by splits; train when absent."),
    "subset": _option("subset", "Of a hub data set that has several."),
    "revision": _option("revision", "Commit of a hub data set."),
    "encoding": _option("encoding", "Of a text file that is not UTF-8, such as cp1252."),
    "separator": _option("separator", "Between columns of a text table: , ; | or tab."),
    "rows": _option("rows", "Where in a .json file that is one object the rows stand."),
}


def takes_source_keys(command: Callable[..., None]) -> Callable[..., None]:
    """Decorator that adds the options for reading data to a command, which gets their values as ``keys`` for
    :func:`source_of`."""

    @wraps(command)
    def called(*arguments: Any, **given: Any) -> None:
        keys = {name: given.pop(name) for name in _OPTIONS}
        command(*arguments, **given, keys=keys)

    signature = inspect.signature(command, eval_str=True)
    own = [parameter for parameter in signature.parameters.values() if parameter.name != "keys"]
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in _OPTIONS.items()
    ]
    called.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]  # typer reads it
    return called


def source_of(
    file: str, *, columns: Sequence[str] | None = None, separator: str | None = None, **keys: Any
) -> DataSource:
    """The data source that a command's options describe. ``file`` may be a whole source in the form of recipes, which
    ``inspect`` prints: ``{path: ..., where: ...}``.

    Raises :class:`InputError`, naming the option, for what the schema refuses.
    """
    from pydantic import ValidationError

    from align.recipe.schema import DataSource

    given = {key: value for key, value in keys.items() if value is not None}
    if file.lstrip().startswith("{"):
        written = _yaml(file)
        if twice := sorted(written.keys() & given.keys()):
            raise InputError(f"--{twice[0]}: the source says it already")
        file, given = written.pop("path", ""), {**written, **given}
    if columns:
        given["columns"] = _pairs(columns)
    if separator is not None:
        given["separator"] = {"tab": "\t", "\\t": "\t"}.get(separator, separator)
    if isinstance(given.get("format"), str) and given["format"].lstrip().startswith("{"):
        given["format"] = _yaml(given["format"])
    try:
        return DataSource.model_validate({"path": file, **given})
    except ValidationError as error:
        raise InputError([_told(one) for one in error.errors()]) from error


def _told(error: Any) -> Problem:
    where, what = error["loc"], error["msg"].removeprefix("Value error, ")
    key = str(where[0]) if where else ""
    # Of a text it says only that it is one
    inside = [str(part) for part in where[1:] if not (key == "format" and part == "name")]
    inner = f" {'.'.join(inside)}" if inside else ""
    if error["type"] == "extra_forbidden" and not inside:
        from align.recipe.checks.messages import did_you_mean
        from align.recipe.schema import DataSource

        return Problem(f"a data source has no key `{key[:60]}`", hint=did_you_mean(key, DataSource.model_fields))
    return Problem(what, key=f"--{key}{inner}" if key else None)


def _pairs(texts: Sequence[str]) -> Any:
    if len(texts) == 1 and texts[0].lstrip().startswith("{"):
        return _yaml(texts[0])
    pairs = [part.partition("=") for text in texts for part in text.split(",")]
    for name, _, column in pairs:
        if not name.strip() or not column.strip():
            raise InputError(
                "--columns: expected NAME=COLUMN", hint="for example --columns prompt=Question,completion=Reply"
            )
    return {name.strip(): column.strip() for name, _, column in pairs}


def _yaml(text: str) -> Any:
    """Parses a mapping in the form of recipes."""
    from align.recipe.language.yaml_tree import SourcePlace, parse_value

    problems: list[Problem] = []
    node = parse_value(text, SourcePlace("the option"), problems)
    if node is None or problems:
        raise InputError(problems)
    return node.plain()
