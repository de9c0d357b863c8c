"""Foreign row formats, and where they end: every row becomes a conversation, a preference, a
labelled answer or a prompt, or is refused with a reason.

A format is a function from a row to a dictionary in one of four *forms*; :func:`record_of` checks it and makes the record:

    {"messages": [...]}                                   a conversation, or a prompt if the user speaks last
    {"prompt": ..., "chosen": ..., "rejected": ...}       a preference; "margin" may be there
    {"prompt": ..., "completion": ..., "label": ...}      a labelled answer; or "messages" (the last is judged) and "label"
    {"prompt": ...}                                       a prompt

Each may have "id", "tools" and "system". A user's own format is such a function too, named as ``package.module:function``.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from align.data import foreign
from align.data.forms import record_of, verdict
from align.data.personal import impersonal
from align.data.readers import Row
from align.data.records import Conversation, Origin, Preference, Prompt, Record, Unpaired
from align.data.strict_json import RowError as RowError
from align.data.strict_json import as_json, clip, type_name, unreadable
from align.errors import InputError, Problem
from align.recipe.refs import import_object
from align.recipe.schema import DataSource

Want = Literal["conversation", "preference", "unpaired", "prompt"]
"""The type of record that a stage works on. ``unpaired`` is for stages that learn from labelled answers: they also take preferences."""

FIELDS_LIMIT = 16_384
"""Characters of JSON that a record keeps of its row's other columns, in their order. A column that does not fit is left out whole."""

_IDS = ("id", "prompt_id", "conversation_id", "question_id", "uuid")
_FORM_KEYS = frozenset({"messages", "prompt", "chosen", "rejected", "margin", "tools", "system"})
_LABELLED = "is one answer with a label, not a comparison: `kind: trl` with `trainer: kto` trains on it"
_UNSORTED = "has a label, and answers labelled false must not be trained on; `where: {label: true}` keeps the good ones"


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
    "messages": Format(foreign.messages, frozenset({"messages", "prompt", "completion", "tools", "system"})),
    "unpaired": Format(foreign.unpaired, frozenset({"messages", "conversations", "prompt", "completion", "label", "tools", "system"})),
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
    if verdict(value.get("label")) is not None and (has & {"messages", "conversations"} or {"prompt", "completion"} <= has):
        return "unpaired"
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
        self._good = verdict(source.where.get("label")) is True
        self.notes: Counter[str] = Counter()
        """What a report should mention of the rows, and how often."""
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
        record = record_of(format.convert(row.value), row.origin, id=id, fields=fields, column=format.messages, note=self._note)
        return (narrow(record, self._want, good=self._good),)

    def _note(self, what: str) -> None:
        self.notes[what] += 1

    def _own_record(self, form: Mapping[str, Any], row: Row, number: int | None) -> Record:
        id_column, id = _id_of(form, row.origin)
        if id_column is None:
            id = _id_of(row.value, row.origin)[1] + (f"#{number}" if number else "")
        fields = _bounded({key: item for key, item in form.items() if key not in _FORM_KEYS and key != id_column})
        if isinstance(form.get("label"), bool):  # any other label is a column of the row
            fields.pop("label", None)
        else:
            form = {key: item for key, item in form.items() if key != "label"}
        return narrow(record_of(form, row.origin, id=id, fields=fields, note=self._note), self._want, good=self._good)


def converter(source: DataSource, want: Want) -> Converter:
    """The function from a row of ``source`` to records of the type that a stage wants.

    A preference also serves as a conversation (prompt and chosen answer) and as a prompt; a conversation also serves as a prompt, without
    its last message. Raises :class:`InputError` when a user's own format cannot be imported, or the first row's format is not known.
    """
    return Converter(source, want)


def narrow(record: Record, want: Want, *, good: bool = False) -> Record:
    """The record as the type that is wanted; ``good`` says that the source keeps answers labelled true alone.

    Raises :class:`RowError` when it does not hold one.
    """
    if want == "prompt":
        asked = record.messages[:-1] if isinstance(record, Conversation) else record.prompt
        return Prompt(asked, record.id, record.origin, record.tools, record.fields)
    if isinstance(record, Prompt):
        raise RowError(f"ends with the {record.prompt[-1]['role']}: there is no answer to train on")
    if isinstance(record, Unpaired):
        if want == "preference":
            raise RowError(_LABELLED, "label")
        if want == "conversation":
            if not (good and record.label):
                raise RowError(_UNSORTED, "label")
            before: Any = [{**m, "train": False} if m["role"] == "assistant" else m for m in record.prompt]
            return Conversation((*before, *record.completion), record.id, record.origin, record.tools, record.fields)
    elif isinstance(record, Preference):
        if want == "conversation":
            return Conversation(record.prompt + record.chosen, record.id, record.origin, record.tools, record.fields)
    elif want != "conversation":
        raise RowError(f"is a conversation; wanted is {_WANTED[want]}")
    return record


_WANTED = {
    "preference": "a preference, with chosen and rejected answers",
    "unpaired": "an answer with a label, or chosen and rejected ones",
}


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


def _id_of(value: Mapping[str, Any], origin: Origin) -> tuple[str | None, str]:
    """``(column, id)``; where no column has one, the file's name and the line, which are the same on every machine."""
    for key in _IDS:
        item = value.get(key)
        if isinstance(item, (str, int)) and not isinstance(item, bool) and 0 < len(str(item)) <= 200:
            return key, str(item)
    return None, f"{Path(origin.source).name}:{origin.line}"


def _bounded(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Columns as JSON values, up to :data:`FIELDS_LIMIT`, without those about persons."""
    kept: dict[str, Any] = {}
    room = FIELDS_LIMIT
    for key, item in impersonal(dict(columns)).items():
        found = as_json(item)
        if found is not None and item is not None and len(key) + found[1] <= room:
            kept[key] = found[0]
            room -= len(key) + found[1]
    return kept
