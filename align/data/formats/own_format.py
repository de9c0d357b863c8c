"""Making forms of records, and calling a user's own row format: a function from a row to one form, several, or none."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from align.data.records import Conversation, Graded, Messages, Preference, Prompt, Record, Unpaired, Votes
from align.data.rows import Row
from align.data.strict_json import RowError, clip, type_name, unreadable


def call(function: Callable[[dict[str, Any]], Any], name: str, row: Row) -> list[Mapping[str, Any]]:
    """The forms that a user's function makes of a row. It may return a form, a record, a list of them, or None to leave
    the row out."""
    try:
        result = function(dict(row.value))
    except RowError:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        raise RowError(f"{name} raised {type(error).__name__}: {clip(str(error), 80)} ({where})") from error
    forms: list[Mapping[str, Any]] = []
    if result is None:
        result = []
    for item in result if isinstance(result, (list, tuple)) else [result]:
        if isinstance(item, (Conversation, Preference, Unpaired, Graded, Prompt)):
            item = {**item.fields, **form_of(item)}  # so that a record built by the user is checked like all others
        if not isinstance(item, Mapping):
            raise RowError(
                f"{name} returned {type_name(item)}; expected a dictionary, a record, a list of them, or None"
            )
        form = {key: _listed(part) for key, part in item.items()}
        if fault := unreadable(form):
            raise RowError(f"{name} returned a {fault.what}", fault.field)
        forms.append(form)
    return forms


def form_of(record: Record) -> dict[str, Any]:
    """The form of a record (see :mod:`align.data.formats.formats`) without its ``fields``. This package's row format
    uses the same keys.

    :func:`~align.data.messages.forms.record_of` makes the same record of the form.
    """
    form: dict[str, Any] = {"id": record.id}
    if isinstance(record, Conversation):
        form["messages"] = _messages(record.messages)
    else:
        form["prompt"] = _messages(record.prompt)
    if isinstance(record, Preference):
        form |= {"chosen": _messages(record.chosen), "rejected": [_messages(answer) for answer in record.rejected]}
        if record.margins is not None:
            form["margin"] = list(record.margins)
        if record.votes is not None:
            form["votes"] = [Votes(*votes)._asdict() for votes in record.votes]
    elif isinstance(record, Unpaired):
        form |= {"completion": _messages(record.completion), "label": record.label}
    elif isinstance(record, Graded):
        form |= {"completion": _messages(record.completion), "grades": dict(record.grades)}
    if record.tools:
        form["tools"] = list(record.tools)
    return form


def _messages(messages: Messages) -> list[dict[str, Any]]:
    return [dict(message) for message in messages]


def _listed(value: Any) -> Any:
    """``value`` with tuples replaced by lists, at any depth, since rows only have lists."""
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, (list, tuple)) else value
