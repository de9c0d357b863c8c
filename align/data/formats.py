"""Foreign row formats, and where they end: every row becomes a conversation, a preference or a prompt, or is refused with a reason.

A format is a function from a row to a dictionary in one of three *forms*; :func:`record_of` checks it and makes the record:

    {"messages": [...]}                                   a conversation, or a prompt if the user speaks last
    {"prompt": ..., "chosen": ..., "rejected": ...}       a preference; "margin" may be there
    {"prompt": ...}                                       a prompt

Each may have "id", "tools" and "system". A user's own format is such a function too, named as ``package.module:function``.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from align.data import foreign
from align.data.forms import record_of
from align.data.messages import RowError as RowError
from align.data.readers import Row
from align.data.records import Conversation, Origin, Preference, Prompt, Record
from align.data.strict_json import clip, type_name
from align.errors import InputError, Problem
from align.recipe.refs import import_object
from align.recipe.schema import DataSource

Want = Literal["conversation", "preference", "prompt"]

FIELDS_LIMIT = 16_384
"""Characters of JSON that a record keeps of its row's other columns, in their order. A column that does not fit is left out whole."""

_IDS = ("id", "prompt_id", "conversation_id", "question_id", "uuid")
_FORM_KEYS = frozenset({"messages", "prompt", "chosen", "rejected", "margin", "tools", "system"})


@dataclass(frozen=True)
class Format:
    """A row format that has a name."""

    convert: Callable[[dict[str, Any]], dict[str, Any]]
    """Row -> form. Raises :class:`RowError`."""
    columns: frozenset[str]
    """What it reads; the row's other columns become the record's ``fields``."""
    messages: str = "messages"
    """The column with the messages, for error messages."""


FORMATS: dict[str, Format] = {
    "messages": Format(foreign.messages, frozenset({"messages", "prompt", "completion", "tools"})),
    "preference": Format(foreign.preference, _FORM_KEYS),
    "prompt": Format(foreign.prompt, frozenset({"prompt", "tools", "system"}), "prompt"),
    "alpaca": Format(foreign.alpaca, frozenset({"instruction", "input", "output", "history", "system", "chosen", "rejected", "margin"})),
    "sharegpt": Format(foreign.sharegpt, frozenset({"conversations", "system", "tools", "chosen", "rejected", "margin"}), "conversations"),
    "hh_rlhf": Format(foreign.hh_rlhf, frozenset({"chosen", "rejected"})),
    "ultrafeedback": Format(foreign.ultrafeedback, _FORM_KEYS | {"instruction", "completions", "models"}),
}


def detect(value: Mapping[str, Any]) -> str:
    """The name of a row's format, from its columns. Raises :class:`RowError` when it is none that we know."""
    has = {key for key, item in value.items() if item is not None}
    if {"chosen", "rejected"} <= has:
        if "conversations" in has:
            return "sharegpt"
        if "instruction" in has and "prompt" not in has:
            return "alpaca"
        chosen = value["chosen"]
        if isinstance(chosen, str) and "prompt" not in has and chosen.lstrip().startswith("Human:"):
            return "hh_rlhf"
        if isinstance(chosen, list) and isinstance(value.get("prompt"), str):
            return "ultrafeedback"
        return "preference"
    if {"instruction", "completions"} <= has:
        return "ultrafeedback"
    if "messages" in has or {"prompt", "completion"} <= has:
        return "messages"
    if "conversations" in has:
        return "sharegpt"
    if "prompt" in has:
        return "prompt"
    if "instruction" in has and not has & {"context", "response"}:
        return "alpaca"
    columns = ", ".join(clip(key, 40) for key in list(value)[:12])
    raise RowError(f"no known format has these columns: {columns}")


class Converter:
    """A row -> its records: one, or, with a user's own format, any number. Raises :class:`RowError` for a row that cannot be used."""

    def __init__(self, source: DataSource, want: Want) -> None:
        self.format = source.format
        """The format's name; found at the first row when the source does not name it."""
        self._want = want
        self._own = import_object(source.format) if source.format and ":" in source.format else None

    def __call__(self, row: Row) -> tuple[Record, ...]:
        if self._own:
            forms = _call(self._own, str(self.format), row)
            return tuple(self._own_record(form, row, i if len(forms) > 1 else None) for i, form in enumerate(forms, 1))
        if self.format is None:
            self.format = _detected(row)
        format = FORMATS[self.format]
        id_column, id = _id_of(row.value, row.origin)
        fields = _bounded({key: item for key, item in row.value.items() if key not in format.columns and key != id_column})
        record = record_of(format.convert(row.value), row.origin, id=id, fields=fields, column=format.messages)
        return (narrow(record, self._want),)

    def _own_record(self, form: Mapping[str, Any], row: Row, number: int | None) -> Record:
        id_column, id = _id_of(form, row.origin)
        if id_column is None:
            id = _id_of(row.value, row.origin)[1] + (f"#{number}" if number else "")
        fields = _bounded({key: item for key, item in form.items() if key not in _FORM_KEYS and key != id_column})
        return narrow(record_of(form, row.origin, id=id, fields=fields), self._want)


def converter(source: DataSource, want: Want) -> Converter:
    """The function from a row of ``source`` to records of the type that a stage wants.

    A preference also serves as a conversation (prompt and chosen answer) and as a prompt; a conversation also serves as a prompt, without
    its last message. Raises :class:`InputError` when a user's own format cannot be imported, or the first row's format is not known.
    """
    return Converter(source, want)


def narrow(record: Record, want: Want) -> Record:
    """The record as the type that is wanted. Raises :class:`RowError` when it does not hold one."""
    if isinstance(record, Prompt):
        if want == "prompt":
            return record
        raise RowError(f"ends with the {record.prompt[-1]['role']}: there is no answer to train on")
    if want == "conversation" and isinstance(record, Preference):
        messages = record.prompt + record.chosen
        return Conversation(messages, record.id, record.origin, record.tools, record.fields)
    if want == "prompt":
        asked = record.prompt if isinstance(record, Preference) else record.messages[:-1]
        return Prompt(asked, record.id, record.origin, record.tools, record.fields)
    if want == "preference" and isinstance(record, Conversation):
        raise RowError("is a conversation; wanted is a preference, with chosen and rejected answers")
    return record


def _detected(row: Row) -> str:
    try:
        return detect(row.value)
    except RowError as error:
        hint = f"name the `format` ({', '.join(FORMATS)}), or give your own as package.module:function"
        raise InputError(Problem(error.message, file=row.origin.source, line=row.origin.line, hint=hint)) from error


def _call(function: Callable[[dict[str, Any]], Any], name: str, row: Row) -> list[Mapping[str, Any]]:
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
        if isinstance(item, (Conversation, Preference, Prompt)):
            # A form again, so that a record which a user built is checked like all others.
            item = {**item.fields, **{key: part for key, part in vars(item).items() if key not in ("origin", "fields")}}
        if not isinstance(item, Mapping):
            raise RowError(f"{name} returned {type_name(item)}; expected a dictionary, a record, a list of them, or None")
        forms.append({key: _listed(part) for key, part in item.items()})
    return forms


def _listed(value: Any) -> Any:
    """Tuples as lists, at any depth: Python code makes both, and a row only has lists."""
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, (list, tuple)) else value


def _id_of(value: Mapping[str, Any], origin: Origin) -> tuple[str | None, str]:
    """``(column, id)``; where no column has one, the file's name and the line, which are the same on every machine."""
    for key in _IDS:
        item = value.get(key)
        if isinstance(item, (str, int)) and not isinstance(item, bool) and 0 < len(str(item)) <= 200:
            return key, str(item)
    return None, f"{Path(origin.source).name}:{origin.line}"


def _bounded(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Columns as JSON values, up to :data:`FIELDS_LIMIT`."""
    kept: dict[str, Any] = {}
    room = FIELDS_LIMIT
    for key, item in columns.items():
        try:
            text = json.dumps(item, default=str, allow_nan=False)  # a table's dates and decimals become text
        except (ValueError, RecursionError):
            continue  # not a finite number, or nested too deeply
        if item is not None and len(key) + len(text) <= room:
            kept[key] = json.loads(text)
            room -= len(key) + len(text)
    return kept
