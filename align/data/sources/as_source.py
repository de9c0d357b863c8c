"""Describing how a source was read as a block of a recipe, for the user to copy and for the results made from it."""

from __future__ import annotations

from typing import Any

from align.data.sources.source_report import SourceReport
from align.recipe.language.yaml_tree import SourcePlace, parse_value
from align.recipe.rows.presets import PRESETS
from align.recipe.schema import DataSource


def as_source(source: DataSource, read: SourceReport) -> dict[str, Any]:
    """The keys of a data source that read the same rows in the same way, including those that were recognised."""
    given = source.model_dump(mode="json", by_alias=True, include=source.model_fields_set, exclude_unset=True)
    found = read.format  # for a recognised mapping, its text as in a recipe
    if "columns" not in given:
        form = given.get("format") or (_read(found) if found and found.startswith("{") else found)
        given = {**given, "format": form}
    return {**given, **read.told.keys}


def _read(text: str) -> Any:
    """A mapping that :func:`~align.data.formats.column_names.yaml_line` wrote."""
    node = parse_value(text, SourcePlace("the format"), [])
    return None if node is None else node.plain()


def with_mappings(keys: dict[str, Any], want: str) -> list[dict[str, Any]]:
    """The source with its preset's name replaced by the mapping; empty if it names no preset, or if the preset also
    needs code of this package.

    A preset may be for several types of records; keys that only other types than ``want`` use are left out, since they
    would have no effect. A preset of several parts becomes several sources, each with a condition on its rows.
    """
    form = keys.get("format")
    name, changed = (form.get("preset"), form) if isinstance(form, dict) else (form, {})
    if not isinstance(name, str) or name not in PRESETS or PRESETS[name].code:
        return []
    own = {key: value for key, value in changed.items() if key != "preset"}
    found = []
    before: dict[str, Any] = {}
    for part in PRESETS[name].parts:
        # A preset uses the first part that fits a row; separate sources need conditions that exclude the rows of
        # earlier parts.
        where = {**{place: {"not": value} for place, value in before.items()}, **part.where, **keys.get("where", {})}
        mapping = {key: value for key, value in {**part.mapping, **own}.items() if key != "grades" or want == "graded"}
        found.append({**keys, **({"where": where} if where else {}), "format": mapping})
        before |= part.where
    return found
