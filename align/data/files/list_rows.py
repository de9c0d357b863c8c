"""Rows that are lists: read only where the mapping has places that begin with an index, such as ``[0].value``."""

from __future__ import annotations

from collections.abc import Iterator

from align.recipe.rows.mapping import RowMapping
from align.recipe.rows.places import Place, place
from align.recipe.rows.presets import PRESETS
from align.recipe.schema import DataSource


def reads_lists(source: DataSource) -> bool:
    """Does the source's mapping read rows that are lists?"""
    return any(not isinstance(one.steps[0], str) for one in _places(source))


def _places(source: DataSource) -> Iterator[Place]:
    yield from (place(text) for text in (*source.where, *filter(None, (source.unique, source.explode))))
    reading = source.reading
    name = reading.preset if isinstance(reading, RowMapping) else reading
    if isinstance(reading, RowMapping):
        yield from reading.places()
    if name is not None and name in PRESETS:
        for part in PRESETS[name].parts:
            yield from RowMapping.model_validate(part.mapping).places()
