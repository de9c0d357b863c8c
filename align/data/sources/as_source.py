"""How a source was read, said as a recipe would say it: to be copied and changed, and to be kept with what was made of
it."""

from __future__ import annotations

from typing import Any

from align.data.sources.source_report import SourceReport
from align.recipe.language.yaml_tree import SourcePlace, parse_value
from align.recipe.rows.presets import PRESETS
from align.recipe.schema import DataSource


def as_source(source: DataSource, read: SourceReport) -> dict[str, Any]:
    """The keys of a data source that read the same rows in the same way, with all that was found out."""
    given = source.model_dump(mode="json", by_alias=True, include=source.model_fields_set, exclude_unset=True)
    found = read.format  # of a mapping that was made up, the text that a recipe would say
    if "columns" not in given:
        form = given.get("format") or (_read(found) if found and found.startswith("{") else found)
        given = {**given, "format": form}
    return {**given, **read.told.keys}


def _read(text: str) -> Any:
    """A mapping that :func:`~align.data.formats.column_names.yaml_line` wrote."""
    node = parse_value(text, SourcePlace("the format"), [])
    return None if node is None else node.plain()


def with_mappings(keys: dict[str, Any], want: str) -> list[dict[str, Any]]:
    """The same sources with the mapping that a preset's name stands for written out; none where there is no such name,
    or where it stands for more than a mapping (code of ours).

    A preset may serve several kinds of records; what only others than ``want`` use is left out, since it would have no
    effect. One of several parts becomes as many sources, each with the rows that it is for.
    """
    form = keys.get("format")
    name, changed = (form.get("preset"), form) if isinstance(form, dict) else (form, {})
    if not isinstance(name, str) or name not in PRESETS or PRESETS[name].code:
        return []
    own = {key: value for key, value in changed.items() if key != "preset"}
    found = []
    before: dict[str, Any] = {}
    for part in PRESETS[name].parts:
        # A row is for the first part that it fits; sources by themselves have to say that it fits none before.
        where = {**{place: {"not": value} for place, value in before.items()}, **part.where, **keys.get("where", {})}
        mapping = {key: value for key, value in {**part.mapping, **own}.items() if key != "grades" or want == "graded"}
        found.append({**keys, **({"where": where} if where else {}), "format": mapping})
        before |= part.where
    return found
