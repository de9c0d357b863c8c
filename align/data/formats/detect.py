"""Recognising the format of a source's rows from the first ones. The most specific format that fits is chosen, and no
part that carries meaning is ignored.

The result is a named format, or a mapping made for the columns of the rows. If nothing fits, or a column that carries
meaning would not be read, the error shows the columns and a line for the recipe.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

from align.data.formats import column_names
from align.data.formats.rivals import require_one
from align.data.formats.unread import complain_of_unread
from align.data.formats.wanted import Want
from align.data.mapping.places import find
from align.data.messages.forms import verdict
from align.data.rows import Columns
from align.data.strict_json import RowError, parse_text
from align.recipe.rows.mapping import RowMapping
from align.recipe.rows.presets import PRESETS, Preset

LOOK_AT = 20
"""Number of rows by which a format is recognised."""


@dataclass(frozen=True)
class Found:
    """A recognised format."""

    name: str
    """Name of a format or preset, or the mapping as in a recipe."""
    mapping: RowMapping | None = None
    """None for a format or preset that has a name."""


def made(**keys: Any) -> Found:
    """A mapping with these keys."""
    given = {key: value for key, value in keys.items() if value is not None}
    return Found(column_names.yaml_line(given), RowMapping.model_validate(given))


def detect_rows(rows: Sequence[Columns], want: str, chosen_by: Collection[str] = ()) -> Found:
    """The format of most of the first rows; rows of another format are bad rows. Raises :class:`RowError` when no row
    has a known format.

    ``chosen_by`` are columns that ``where`` reads, so they do not count as ignored.
    """
    found: Counter[str] = Counter()
    kept: dict[str, Found] = {}
    first: RowError | None = None
    for row in rows:
        try:
            one = detect(row, want)
        except RowError as error:
            first = first or error
        else:
            kept.setdefault(one.name, one)
            found[one.name] += 1
    if not found:
        raise first or RowError("no rows")
    best = kept[found.most_common(1)[0][0]]
    if first is not None and getattr(first, "refusal", False):
        raise first
    best = _with_the_rest(best, rows)
    extract = column_names.extraction(rows, best.mapping) if want == "prompt" and best.mapping is not None else None
    if extract is not None and best.mapping is not None:
        best = made(**{**best.mapping.given(), "extract": extract})
    _complain(rows, best, want, chosen_by)
    require_one(rows, best, cast(Want, want))
    return best


def _with_the_rest(found: Found, rows: Sequence[Columns]) -> Found:
    """The format, extended by the columns with system, tools and history that only some rows have."""
    from align.data.formats.formats import columns_read

    read = columns_read(found, rows)
    more: dict[str, Any] = {}
    column = next((name for row in rows if (name := column_names.column(row, column_names.SYSTEMS, read))), None)
    if column is not None:
        more["system"] = column
    tools = list(dict.fromkeys(name for row in rows for name in column_names.columns(row, column_names.TOOLS)))
    if set(tools) - read or len(tools) > 1:  # of several columns each row uses the one that it has
        more["tools"] = tools if len(tools) > 1 else tools[0]
    base: dict[str, Any] | None = None
    if found.mapping is not None:
        base = found.mapping.given()
        if (
            isinstance(base.get("prompt"), str)
            and "completion" in base
            and any(isinstance(row.get("history"), list) for row in rows)
        ):
            more["prompt"] = ["history", base["prompt"]]
        more = {
            key: value for key, value in more.items() if key == "prompt" or key not in base or isinstance(value, list)
        }
    elif found.name in ("messages", "sharegpt") and not any(
        "completion" in row and "messages" not in row for row in rows
    ):
        base = {"messages": "messages" if found.name == "messages" else "conversations"}
        base |= {key: key for key in ("system", "tools") if key not in more and any(row.get(key) for row in rows)}
    return made(**{**base, **more}) if base is not None and more else found


class Refusal(RowError):
    """Raised for a recognised shape that cannot be used; other rows do not outvote it."""

    refusal = True


def detect(row: Columns, want: str = "conversation") -> Found:
    """The format of one row. Raises :class:`RowError` when it is unknown."""
    has = {key for key, item in row.items() if item is not None}
    _refused(row, has)
    for name, preset in PRESETS.items():
        if fits(row, preset):
            if preset.asks and want != "prompt":
                raise Refusal(f"looks like {name}, which has to be told more: format: {preset.asks}")
            return Found(name)
    found = _pairs(row, has) or _labelled(row, has) or _turns(row, has, want) or _flat(row, has, want)
    if found is None:
        _only_text(row, has)
        raise RowError(f"no known format has these columns: {column_names.seen(row)}")
    return _cut_at_speakers(row, has, found)


_PARTS = {
    "messages": ("completion",),
    "unpaired": ("completion", "label"),
    "preference": ("chosen", "rejected", "margin"),
    "ultrafeedback": ("chosen", "rejected"),
    "prompt": (),
}
"""Formats whose `prompt` may be a text, with their other columns."""


def _cut_at_speakers(row: Columns, has: set[str], found: Found) -> Found:
    """The format, changed to split a prompt that is a transcript into turns. Otherwise "Human:" would be part of the
    user's text.

    Raises :class:`Refusal` when the recipe has to say how.
    """
    given = {} if found.mapping is None else found.mapping.given()
    if found.mapping is None:
        if found.name == "alpaca":
            column = "instruction"
        elif found.name in (*_PARTS, "graded"):
            column = "prompt"
        else:
            column = None
    else:
        column = given.get("prompt") if isinstance(given.get("prompt"), str) and "dialogue" not in given else None
    text = row.get(column) if column is not None else None
    if not isinstance(text, str) or not column_names.is_transcript(text):
        return found
    if found.mapping is None:
        parts = [key for key in _PARTS.get(found.name, ()) if key in has]
        if found.name == "alpaca" and "output" in has and not row.get("input") and not row.get("history"):
            given = {"completion": "output"}
        elif found.name == "alpaca" and {"chosen", "rejected"} <= has:
            given = {"chosen": "chosen", "rejected": "rejected"}
        elif found.name not in _PARTS:
            raise Refusal(f"the text in {column} is a dialogue: say with `dialogue` how it is cut into turns", column)
        given |= (
            {key: key for key in parts if key != "label"} | {"prompt": column} | _besides(row, {str(column), *parts})
        )
        if "label" in parts:
            given["better"] = {"label": "label"}
    return made(**{**given, "dialogue": column_names.HUMAN})


def fits(row: Columns, preset: Preset) -> bool:
    """Does a row have all columns and values by which a preset is recognised?"""
    if not (preset.marks or preset.holds) or not all(_marked(row, mark) for mark in preset.marks):
        return False
    return all(_holding(row, place, text) for place, text in preset.holds.items())


def _marked(row: Columns, mark: str) -> bool:
    for one in mark.split("|"):
        if one in row:
            return True
        try:
            value = find(row, one) if re.search(r"[.\[]", one) else None
        except RowError:
            continue
        if value is not None and value != [] and not (isinstance(value, list) and all(item is None for item in value)):
            return True
    return False


def _holding(row: Columns, places: str, text: str) -> bool:
    """Does a text at one of these places contain ``text``?"""
    for place in places.split("|"):
        try:
            value = find(row, place)
        except RowError:
            continue
        if any(isinstance(one, str) and text in one for one in (value if isinstance(value, list) else [value])):
            return True
    return False


def _refused(row: Columns, has: set[str]) -> None:
    """Raises RowError for shapes that are refused, each with its reason."""
    if "input_ids" in has:
        raise Refusal("is tokenised already (input_ids): give the texts", "input_ids")
    if "segments" in has and not has & {"messages", "prompt", "conversations"}:
        raise Refusal("holds segments that were rendered for another model: give the messages", "segments")
    if "transcript" in has and "rating" in has:
        raise Refusal("is one dialogue with a rating: there is nothing to compare", "rating")
    labels = row.get("labels")
    if {"completions", "labels"} <= has and isinstance(labels, list):
        raise Refusal("has labels of the steps of one answer, not answers to compare", "labels")
    label = row.get("label")
    if isinstance(label, dict) and "steps" in label:
        raise Refusal("has labels of the steps of one answer, not answers to compare", "label")
    if isinstance(label, str) and isinstance(row.get("input"), str) and re.search(r"Step 1:.*[+-]\s*(\n|$)", label):
        raise Refusal("has labels of the steps of one answer, not answers to compare", "label")
    if {"custom_id", "response"} <= has and not has & {"body", "request"}:
        raise Refusal(
            "holds answers without their questions: `join` them with the file of requests by custom_id", "response"
        )


def _only_text(row: Columns, has: set[str]) -> None:
    if "text" in has and isinstance(row["text"], str) and not has & column_names.CONTENT:
        kind = column_names.rendered_kind(row["text"])
        if kind:
            named = column_names.CUT_BY.get(kind)
            cut = f"`format: {named}` cuts it" if named else "cut it with `dialogue`"
            raise Refusal(
                f"is text that was rendered with another template ({kind}): give the messages, or {cut}", "text"
            )
        raise Refusal("is plain text, without a question and an answer: pre-training data", "text")


def _pairs(row: Columns, has: set[str]) -> Found | None:
    """``chosen`` and ``rejected``."""
    if not {"chosen", "rejected"} <= has:
        return None
    chosen = _parsed(row["chosen"])
    scores = next((list(pair) for pair in column_names.SCORES if set(pair) <= has), None)
    better = {"score": scores} if scores else None
    if isinstance(chosen, str) and not row.get("prompt") and re.match(r"\s*Human:", chosen):
        return Found("hh_rlhf")
    whole = isinstance(chosen, list) and len(chosen) > 1 and all(isinstance(item, Mapping) for item in chosen)
    if isinstance(chosen, list) and chosen and all(isinstance(item, str) for item in chosen) and "prompt" in has:
        return Found("answer_lists")
    if better is not None and (whole or "prompt" in has):
        return made(prompt=None if whole else "prompt", chosen="chosen", rejected="rejected", better=better)
    if "conversations" in has:
        return Found("sharegpt")
    if "instruction" in has and "prompt" not in has and not whole:
        return Found("alpaca")
    if isinstance(chosen, list) and isinstance(row.get("prompt"), str):
        return Found("ultrafeedback")
    if "prompt" not in has and not whole:
        column = next((name for name in ("messages", "context", "trajectory") if isinstance(row.get(name), list)), None)
        column = column or column_names.column(row, column_names.PROMPTS)
        if column is not None:
            return made(
                prompt=column,
                chosen="chosen",
                rejected="rejected",
                system=column_names.column(row, column_names.SYSTEMS),
                better=better,
            )
    return Found("preference")


def _labelled(row: Columns, has: set[str]) -> Found | None:
    grades = row.get("grades")
    named = isinstance(grades, Mapping) or (isinstance(grades, str) and grades.lstrip().startswith("{"))
    if named and ("messages" in has or {"prompt", "completion"} <= has):
        return Found("graded")
    label = row.get("label")
    if verdict(label) is None:
        return None
    if has & {"messages", "conversations"} or {"prompt", "completion"} <= has:
        return Found("unpaired")
    prompt, completion = (
        column_names.column(row, column_names.PROMPTS),
        column_names.column(row, column_names.COMPLETIONS),
    )
    if prompt and completion and isinstance(label, bool):
        return made(prompt=prompt, completion=completion, better={"label": "label"})
    return None


def _turns(row: Columns, has: set[str], want: str) -> Found | None:
    """A column that is, or parses as, a list of turns."""
    if {"instruction", "completions"} <= has:
        return Found("ultrafeedback")
    names = [name for name in column_names.TURNS if name in has]
    shapes = {name: shape for name in names if (shape := shape_of(row[name])) is not None}
    for name in names:
        shape = shapes.get(name)
        if shape is None and name not in ("messages", "conversations"):
            continue
        besides = _besides(row, {name})
        if want == "prompt" and (answer := column_names.reference(row)):
            besides["answer"] = answer
        if shape in (None, "turns") and name in ("messages", "conversations") and _usual(besides):
            return Found("messages" if name == "messages" else "sharegpt")
        if shape == "texts":
            return made(messages=name, weave=True, **besides)
        if isinstance(shape, tuple):
            return made(messages=name, turns={"pairs": list(shape)}, **besides)
        return made(messages=f"{name}.messages" if shape == "wrapped" else name, **besides)
    return None


def _parsed(value: Any) -> Any:
    """A list that is written as JSON, as in a cell of a table, as a list; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        with suppress(RowError):
            return parse_text(value, "", "")
    return value


def shape_of(value: Any) -> Any:
    """``"turns"``, ``"texts"``, ``"wrapped"``, or the two keys of pairs; None for anything else."""
    value = _parsed(value)
    if isinstance(value, Mapping) and shape_of(value.get("messages")) == "turns":
        return "wrapped"
    if not isinstance(value, list) or not value:
        return None
    if all(isinstance(item, str) for item in value):
        return "texts"
    if not all(isinstance(item, Mapping) for item in value):
        return None
    if any("role" in item or "from" in item for item in value):
        return "turns"
    return next((pair for pair in column_names.PAIRS if all(set(pair) <= set(item) for item in value)), None)


def _besides(row: Columns, used: set[str]) -> dict[str, Any]:
    """The keys of a mapping for columns with system, tools and reasoning."""
    found: dict[str, Any] = {}
    for key, names in (("system", column_names.SYSTEMS), ("tools", column_names.TOOLS)):
        column = column_names.column(row, names, used, empty=True)
        if column is not None and (row[column] not in (None, "", [], {}) or column == key):
            found[key] = column
    return found


def _usual(besides: Mapping[str, Any]) -> bool:
    """Do these columns have the names that named formats read?"""
    return all(key == column and key in ("system", "tools") for key, column in besides.items())


def _flat(row: Columns, has: set[str], want: str) -> Found | None:
    """The format of rows with a column for the question, and perhaps one for the answer."""
    if {"prompt", "completion"} <= has and _usual(_besides(row, set())):
        return Found("messages")
    if "instruction" in has and has & {"input", "output"} and not has & {"response", "answer", "prompt"}:
        return Found("alpaca")
    if "instruction" in has and len(has) == 1:
        return Found("alpaca")
    prompt = column_names.column(row, column_names.PROMPTS)
    if prompt is None:
        return None
    lower = prompt.lower()
    answer = column_names.reference(row, {prompt})
    completions = [name for name in column_names.columns(row, column_names.COMPLETIONS) if name != prompt]
    if lower in column_names.PROBLEMS:  # such an answer is what a checker compares with, not a text to train on
        completions = [
            name
            for name in column_names.columns(row, (*column_names.COMPLETIONS, "solution"))
            if name.lower() != "answer"
        ]
    if want == "prompt":
        if prompt == "prompt" and answer is None and not column_names.is_transcript(row[prompt]):
            return Found("prompt")
        return made(prompt=prompt, answer=answer, **_besides(row, {prompt}))
    if not completions:
        if answer is not None and lower in column_names.PROBLEMS:
            raise Refusal(
                f"{answer} is a reference; map it to completion if it is what the model shall say: "
                f"format: {{prompt: {prompt}, completion: {answer}}}",
                answer,
            )
        return Found("prompt") if prompt == "prompt" else None
    if len(completions) > 1:
        choices = " or ".join(f"{{prompt: {prompt}, completion: {name}}}" for name in completions[:3])
        raise RowError(
            f"has several columns that may be the answer ({', '.join(completions[:4])}); say which: format: {choices}"
        )
    besides = _besides(row, {prompt, *completions})
    asked: Any = (
        ["history", prompt] if "history" in row and isinstance(row.get("history"), (list, type(None))) else prompt
    )
    thought = column_names.column(row, column_names.REASONING)
    if thought is not None and str(row[thought]).strip().lower() in column_names.SWITCHES:
        thought = None  # a switch of the template, not reasoning
    return made(
        prompt=asked,
        completion=completions[0],
        reasoning=thought,
        answer=answer if answer not in completions else None,
        **besides,
    )


def _complain(rows: Sequence[Columns], found: Found, want: str, chosen_by: Collection[str]) -> None:
    """Raises :class:`Refusal` when a column that carries meaning would not be read."""
    from align.data.formats.formats import columns_read

    read = columns_read(found, rows) | set(chosen_by)
    for row in rows:
        complain_of_unread(row, found, want, read, rows)
