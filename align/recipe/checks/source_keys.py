"""Which keys of a data source have an effect for which kind of source. A key without effect is an error.

The tables must contain every field of :class:`~align.recipe.blocks.base.DataSource`, so that nobody forgets to enter a
new key.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from align.errors import AlignError, Problem
from align.recipe import reference_syntax
from align.recipe.blocks.base import DataSource
from align.recipe.language.yaml_tree import Node, follow

EVERYWHERE = frozenset(
    {"path", "format", "columns", "where", "unique", "explode", "ignore", "join", "limit", "weight", "on_bad_row"},
)
"""Keys about rows, which have an effect for every kind of source."""

_HUB = "a hub data set"
_SPLITS = "a folder by splits"
_TEXT = "a text file"
_TABLE = "a text table"
_JSON = "a .json file"
ONLY: dict[str, tuple[str, ...]] = {
    "split": (_HUB, _SPLITS),
    "subset": (_HUB, _SPLITS),
    "revision": (_HUB,),
    "encoding": (_TEXT,),
    "separator": (_TABLE,),
    "rows": (_JSON,),
}
"""Keys about files, and the kinds of source for which they have an effect."""

_KINDS = {
    ".jsonl": {_TEXT},
    ".ndjson": {_TEXT},
    ".json": {_TEXT, _JSON},
    ".csv": {_TEXT, _TABLE},
    ".tsv": {_TEXT, _TABLE},
    ".txt": {_TEXT, _TABLE},
    ".parquet": set[str](),
    ".arrow": set[str](),
    ".feather": set[str](),
}


def is_artefact(folder: Path) -> bool:
    """Is the folder a stage's result?"""
    return (folder / "manifest.json").is_file() and (folder / "data.jsonl").is_file()


def is_saved(folder: Path) -> bool:
    """Was the folder written by ``save_to_disk`` of ``datasets``?"""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def idle(source: DataSource, location: Path | str, files: Sequence[Path] = ()) -> dict[str, str]:
    """The keys of ``source`` that have no effect at ``location`` (a path, or a hub id as str), each with a message.

    ``files`` are those that are read from a folder; without them it is assumed to have files of every kind.
    """
    kinds = _kinds(location, files)
    given = [key for key in source.model_fields_set if key in ONLY and getattr(source, key) is not None]
    return {
        key: f"has no effect here: it is for {_listed(ONLY[key])}"
        for key in sorted(given)
        if not kinds & set(ONLY[key])
    }


def _listed(kinds: Sequence[str]) -> str:
    return " or ".join(kinds)


def _kinds(location: Path | str, files: Sequence[Path]) -> set[str]:
    if isinstance(location, str):
        return {_HUB}
    if location.is_dir():
        if is_artefact(location):
            return set()
        if is_saved(location):
            return {_SPLITS} if (location / "dataset_dict.json").is_file() else set()
        of_files = set().union(*(_of_file(path) for path in files)) if files else {_TEXT, _TABLE, _JSON}
        return {_SPLITS, *of_files}
    return _of_file(location)


def _of_file(path: Path) -> set[str]:
    return next(
        (_KINDS[suffix.lower()] for suffix in reversed(path.suffixes) if suffix.lower() in _KINDS),
        {_TEXT, _TABLE, _JSON},
    )


def problems(tree: Node, recipe: Any, root: Path) -> list[Problem]:
    """The keys without effect of all data sources of a recipe, each at its place. Another check reports sources that do
    not exist."""
    without_effect = []
    for path, source in _sources(recipe, ()):
        try:
            stage = isinstance(reference_syntax.parse(source.path, root), reference_syntax.StageRef)
            useless = _of_stage(source) if stage else idle(source, reference_syntax.resolve(source.path, root))
        except AlignError:
            continue
        for key, what in useless.items():
            written, node, _ = follow(tree, (*path, key))
            without_effect.append(node.key_place.problem(".".join(map(str, written)), what))
    return without_effect


def _of_stage(source: DataSource) -> dict[str, str]:
    given = [key for key in source.model_fields_set if key in ONLY and getattr(source, key) is not None]
    return {key: f"has no effect on a stage's result: it is for {_listed(ONLY[key])}" for key in sorted(given)}


def _sources(value: Any, path: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], DataSource]]:
    if isinstance(value, DataSource):
        yield path, value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _sources(getattr(value, name), (*path, name))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _sources(item, (*path, key))
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _sources(item, (*path, i))
