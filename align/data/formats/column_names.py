"""Usual names of columns, and recognising by them that a format would ignore a meaningful part of a row."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from align.data.formats.inside import judges, may_judge
from align.data.mapping.places import find
from align.data.messages.dialogue import extracted
from align.data.rows import Columns
from align.data.strict_json import RowError, clip, type_name
from align.recipe.rows.mapping import RowMapping
from align.recipe.rows.presets import PRESETS

PROMPTS = ("prompt", "question", "query", "instruction", "input", "inputs", "problem", "input_text", "user")
PROBLEMS = ("problem",)
COMPLETIONS = (
    "completion",
    "response",
    "output",
    "answer",
    "target",
    "targets",
    "output_text",
    "generated_solution",
    "llm_response",
    "reply",
    "assistant",
)
TURNS = ("messages", "conversations", "conversation", "trajectory", "dialogue", "dialog", "chat", "turns", "data")
PAIRS = (
    ("human", "assistant"),
    ("user", "assistant"),
    ("input", "output"),
    ("question", "answer"),
    ("query", "response"),
)
SYSTEMS = ("system", "system_prompt", "system_message", "preamble", "meta_instruction")
TOOLS = ("tools", "functions", "available_tools", "tool_defs", "function_description")
REASONING = ("reasoning_content", "reasoning", "thinking", "think", "complex_cot")
REFERENCES = (
    "reward_model.ground_truth",
    "ground_truth",
    "expected_answer",
    "gold_standard_solution",
    "answer",
    "solutions",
    "label",
    "solution",
)
SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen-rating", "rejected-rating"),
    ("rating_chosen", "rating_rejected"),
    ("chosen_avg_rating", "rejected_avg_rating"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
)
MEDIA = ("image", "images", "video", "videos", "audio", "audios", "pixel_values")
CONTENT = frozenset(
    {"messages", "conversations", "conversation", "prompt", "instruction", "question", "query", "chosen", "input"}
)
HUMAN = {"user": "\n\nHuman:", "assistant": "\n\nAssistant:"}
SWITCHES = frozenset({"on", "off", "yes", "no", "true", "false", "none"})
"""Values of a column called reasoning that show it to be a switch."""
CUT_BY = {"chatml": "chatml_text", "### Human": "human_assistant_text", "[INST]": "inst_text"}
"""Kind of rendered text -> the preset that splits it into messages."""
LONG = 60
"""Texts of at least this many characters count as prose."""

_RENDERED = (
    ("<|im_start|>", "chatml"),
    ("### Human", "### Human"),
    ("[INST]", "[INST]"),
    ("<|start_header_id|>", "llama3"),
    ("### Instruction", "### Instruction"),
    ("<|user|>", "<|user|>"),
    ("<start_of_turn>", "gemma"),
    ("\nHuman:", "Human:"),
)
_JUDGES = re.compile(r"winner|prefer|better|chosen|rejected|(^|_)rank(s|ing)?($|_)|safer", re.IGNORECASE)
_ANSWERS = re.compile(r"answer|response|reply|repl(ies)|output|completion|chosen|rejected|generation", re.IGNORECASE)
_MEANS = re.compile(
    r"^(system|system_prompt|tools|functions|available_tools|rejected|chosen|(rejected|chosen)_(response|messages|answer|completion|output)|winner|preferred?|preference|label"
    r"|train_turns|loss_mask|train|weight|loss|finish_reason|input_ids)$",
    re.IGNORECASE,
)
GRADES = re.compile(r"score|rating|rank|margin|^status$", re.IGNORECASE)
_VERDICTS = re.compile(
    r"^(score|rating|reward|resolved|target|correct|is_correct|passed|verified|success)$", re.IGNORECASE
)
_INSIDE = re.compile(r"^(tools|functions|available_tools|xml_tools|tools_kwargs|train_turns|loss_mask)$", re.IGNORECASE)
_INSIDE_TEXT = re.compile(
    r'"(tools|functions|available_tools|xml_tools|tools_kwargs|train_turns|loss_mask)"\s*:\s*([\[{]\s*[^\]}\s]|")',
    re.IGNORECASE,
)
"""The same as keys in JSON text."""


def columns(row: Columns, names: Iterable[str], without: Collection[str] = (), *, empty: bool = False) -> list[str]:
    """The row's columns with one of these names, in any case, in the order of the names; without those that are null or
    empty."""
    by_lower = {name.lower(): name for name in row}
    found = [by_lower[name] for name in names if name in by_lower and by_lower[name] not in without]
    return [name for name in found if empty or row[name] not in (None, "", [], {})]


def column(row: Columns, names: Iterable[str], without: Collection[str] = (), *, empty: bool = False) -> str | None:
    """The first of :func:`columns`, or None."""
    return next(iter(columns(row, names, without, empty=empty)), None)


def reference(row: Columns, without: Collection[str] = ()) -> str | None:
    """The place of the right answer for rewards that check it: the first known name. A boolean label is a verdict, not
    an answer."""
    for name in REFERENCES:
        if name in without or (name not in row and "." not in name):
            continue
        value = find(row, name)
        if name == "label" and not isinstance(value, str):
            continue
        if value is not None or (name in row and name == "answer"):
            return name
    return None


def extraction(rows: Sequence[Columns], mapping: RowMapping) -> str | None:
    """How the right answer is found in its text, if 19 of 20 rows show it; for a solution it must be in a box."""
    if mapping.answer is None or mapping.extract is not None:
        return None
    texts = [text for row in rows if isinstance(text := find(row, mapping.answer), str) and text.strip()]
    for spec in ("####", "boxed"):
        share = sum(extracted(text, spec) is not None for text in texts) / len(texts) if texts else 0.0
        if share >= 0.95 if spec == "####" else share >= 0.5 and mapping.answer == "solution":
            return spec
    return None


def is_transcript(text: Any) -> bool:
    """Is ``text`` a dialogue of Human and Assistant that ends with the user?"""
    return (
        isinstance(text, str)
        and re.match(r"\s*Human:", text) is not None
        and re.search(r"\n\nAssistant:\s*$", text) is not None
    )


def rendered_kind(text: str) -> str | None:
    """The kind of template that a text was rendered with; None when it was not."""
    return next((kind for mark, kind in _RENDERED if mark in text), None)


def seen(row: Columns) -> str:
    """The columns of a row with their types, for messages."""
    parts = [
        f"{clip(key, 40)} ({type_name(value).removeprefix('a ').removeprefix('an ')})"
        for key, value in list(row.items())[:12]
    ]
    return (", ".join(parts) or "it has none") + (", ..." if len(row) > 12 else "")


def quoted(text: str) -> str:
    """A text, quoted if YAML requires that inside braces."""
    plain = re.fullmatch(r"[A-Za-z_][\w.-]*", text) and text.lower() not in (
        "true",
        "false",
        "null",
        "yes",
        "no",
        "on",
        "off",
        "y",
        "n",
    )
    return text if plain else json.dumps(text, ensure_ascii=False)


def yaml_line(value: Any) -> str:
    """A mapping on one line, as in a recipe."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{quoted(str(key))}: {yaml_line(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(yaml_line, value)) + "]"
    if isinstance(value, str):
        return quoted(value)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def only_prompt(mapping: RowMapping) -> bool:
    """Does the mapping read nothing but the prompt?"""
    return mapping.prompt is not None and not any(
        (mapping.completion, mapping.chosen, mapping.answers, mapping.messages)
    )


def complain_of_comparison(unread: Columns, row: Columns, want: str) -> None:
    """Raises :class:`RowError` for a row that would be read as a prompt only, and looks like a comparison or like an
    answer."""
    answers = [
        name
        for name, value in unread.items()
        if _ANSWERS.search(name) and isinstance(value, (str, list)) and name != "answer"
    ]
    judges = [name for name in unread if _JUDGES.search(name)]
    if judges or len(answers) > 1:
        listed = ", ".join(clip(name, 40) for name in [*answers, *(name for name in judges if name not in answers)][:6])
        raise refusal(
            f"looks like a comparison ({listed}), read as a prompt only; name the format, or say format:"
            f" prompt{_near(row)}"
        )
    if want != "prompt" and answers:
        asked = column(row, PROMPTS) or "prompt"
        raise refusal(
            f"{answers[0]} would stay unread; is it the answer? format: {{prompt: {asked}, completion:"
            f" {quoted(answers[0])}}}"
        )


def may_mean(name: str, value: Any) -> bool:
    """May this column carry meaning, whatever its value? For later rows, most of whose columns can be skipped by
    name."""
    lower = name.lower()
    named = lower in MEDIA or any(pattern.search(name) for pattern in (_MEANS, _VERDICTS, _JUDGES, _ANSWERS))
    empty = value in (None, "", [], {})  # later rows may have other values
    return named or empty or may_judge(value) or judges(name, value, answers=True)


def _holds_meaning(value: Any) -> str:
    """The key of an object, or of JSON text of an object, that carries meaning; "" when there is none."""
    if isinstance(value, Mapping):
        return next(
            (key for key, item in value.items() if item not in (None, "", [], {}) and _INSIDE.match(str(key))), ""
        )
    found = _INSIDE_TEXT.search(value) if isinstance(value, str) and value.lstrip().startswith("{") else None
    return found[1] if found else ""


def complain_of_meaning(unread: Columns, row: Columns, *, answers: bool = False) -> None:
    """Raises :class:`RowError` for a column that carries meaning and would not be read, unless it repeats one that is
    read.

    ``answers``: all answers will be trained on, so a judgement of them must not be ignored.
    """
    for name, value in unread.items():
        if inside := _holds_meaning(value):
            said = f"{clip(name, 40)}.{inside}"
            raise refusal(
                f"{said} would stay unread; name the format that reads it, or say that it is meant: ignore:"
                f" [{quoted(name)}]"
            )
        if answers and _VERDICTS.match(name) and isinstance(value, (bool, int, float)):
            raise refusal(
                f"column {clip(name, 40)} may say which answers are good: `where: {{{name}: ...}}` keeps those, "
                f"`ignore: [{name}]` says that all are meant",
                name,
            )
        if (
            not _MEANS.search(name)
            or isinstance(value, (dict, float))
            or (name.lower() == "label" and not isinstance(value, bool))
        ):
            continue
        if isinstance(value, str) and value.strip() and any(value in text for text in _texts(row, name)):
            continue
        raise refusal(
            f"column {clip(name, 40)} would stay unread; name the format that reads it, or say that it is meant: "
            f"ignore: [{quoted(name)}]{_near(row)}"
        )


def _texts(row: Columns, without: str) -> Iterable[str]:
    stack = [value for key, value in row.items() if key != without]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, Mapping):
            stack += item.values()
        elif isinstance(item, list):
            stack += item


def refusal(message: str, field: str | None = None) -> RowError:
    """An error for a recognised shape that cannot be used as it is."""
    from align.data.formats.detect import Refusal

    return Refusal(message, field)


def _near(row: Columns) -> str:
    nearest = nearest_presets(row)
    return f" (nearest: {nearest})" if nearest else ""


def nearest_presets(row: Columns) -> str:
    """Text about up to two presets that share columns with the row, and the columns that they need in addition."""
    found = []
    for name, preset in PRESETS.items():
        wanted = {re.split(r"[.\[|]", mark)[0] for mark in preset.marks}
        lacks = sorted(wanted - set(row))
        if wanted and 0 < len(lacks) < len(wanted):
            found.append((len(lacks) / len(wanted), f"{name} (lacks {', '.join(lacks)})"))
    return ", ".join(text for _, text in sorted(found)[:2])
