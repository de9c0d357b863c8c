"""Calls a user's own row format, a function from a row to one form, several, or none."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from align.data.records import Conversation, Preference, Prompt, Unpaired
from align.data.rows import Row
from align.data.strict_json import RowError, clip, type_name, unreadable


def call(function: Callable[[dict[str, Any]], Any], name: str, row: Row) -> list[Mapping[str, Any]]:
    """The forms that a user's function makes of a row. It may give a form, a record, a list of them, or None to leave the row out."""
    try:
        result = function(dict(row.value))
    except RowError:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        raise RowError(f"{name} raised {type(error).__name__}: {clip(str(error), 80)} ({where})") from error
    forms: list[Mapping[str, Any]] = []
    for item in result if isinstance(result, (list, tuple)) else [] if result is None else [result]:
        if isinstance(item, (Conversation, Preference, Unpaired, Prompt)):
            # A form again, so that a record which a user built is checked like all others.
            item = {**item.fields, **{key: part for key, part in vars(item).items() if key not in ("origin", "fields")}}
        if not isinstance(item, Mapping):
            raise RowError(f"{name} returned {type_name(item)}; expected a dictionary, a record, a list of them, or None")
        form = {key: _listed(part) for key, part in item.items()}
        if fault := unreadable(form):
            raise RowError(f"{name} returned a {fault.what}", fault.field)
        forms.append(form)
    return forms


def _listed(value: Any) -> Any:
    """Tuples as lists, at any depth: Python code makes both, and a row only has lists."""
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, (list, tuple)) else value
