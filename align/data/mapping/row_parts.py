"""Reading the parts of a form from a row by a mapping: the prompt, the answers, and other parts such as tools."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.data.mapping import better as judging
from align.data.mapping.coded import Coded
from align.data.mapping.graded import grades_of
from align.data.mapping.places import Template, find, find_text, template, text_at
from align.data.mapping.values import OPENS, right_answer, turns_in
from align.data.messages import dialogue
from align.data.messages.messages import Note, list_of
from align.data.rows import Columns, LeftOut
from align.data.strict_json import RowError, parse_text
from align.errors import InputError, Problem
from align.recipe import reference_syntax
from align.recipe.rows.mapping import Constant, FileAt, RowMapping, SystemAt

Form = dict[str, Any]

_RENAMED = ("messages", "prompt", "completion", "chosen", "rejected", "system", "tools", "margin", "answer")
SHAPES = 1000
"""Number of sets of columns that are cached for a source whose rows differ."""


class RowParts:
    """Reads parts of rows at the places of a mapping.

    Args:
        mapping: the mapping, with its preset replaced by the keys that it stands for.
        prompts: are prompts wanted? Then a row is left out if its right answer cannot be found.
        graded: are grades wanted? Only then their places are read.
        code: the function of a preset, which changes the row before the mapping reads it.
    """

    def __init__(
        self, mapping: RowMapping, *, prompts: bool = False, graded: bool = False, code: Coded | None = None
    ) -> None:
        self.mapping = mapping
        self.code = code
        self.places = tuple(mapping.places(graded=graded))
        """All places that are read."""
        self._prompts = prompts
        self._used: dict[tuple[str, ...], set[str]] = {}
        self.names = {key: str(value) for key in _RENAMED if isinstance(value := getattr(mapping, key), str)}
        """The row's names of the parts of a form, for error messages."""
        self._tools = read_beside(mapping.tools.file) if isinstance(mapping.tools, FileAt) else None

    def columns(self, row: Columns) -> set[str]:
        """The columns of the row that are read."""
        keys = tuple(row)
        used = self._used.get(keys)
        if used is None:
            found = (next((name for name in one.columns if name in row), None) for one in self.places)
            used = {name for name in found if name is not None}
            if self.code is not None:
                used |= self.code.columns & row.keys()
            if len(self._used) < SHAPES:
                self._used[keys] = used
        return used

    def as_the_row_calls_it(self, field: str | None, form: Form) -> str | None:
        """The row's name for a field of a form."""
        first, dot, rest = (field or "").partition(".")
        if first == "messages" and self.mapping.completion is not None:
            number, _, rest = rest.partition(".")
            last = number.isdigit() and int(number) == len(form.get("messages", [])) - 1
            return self.names.get("completion" if last else "prompt", field)
        return f"{self.names[first]}{dot}{rest}" if first in self.names else field

    def _common(self, row: Columns) -> Form:
        m = self.mapping
        form: Form = {}
        if m.system is not None:
            form["system"] = m.system.value if isinstance(m.system, Constant) else self._value(row, m.system)
        for one in m.prompt if isinstance(m.prompt, list) else [m.prompt]:
            if isinstance(one, SystemAt):
                form["system"] = self._value(row, one.system)
        if m.tools is not None:
            form["tools"] = self._tools_at(row)
        for key in ("system", "tools"):
            if key not in form and row.get(key) is not None and key not in self.columns(row):
                form[key] = row[key]  # under their usual names they need no mention
        if m.id is not None and (id := find_text(row, template(m.id))):
            form["id"] = id
        if m.answer is not None:
            form["answer"] = right_answer(self._value(row, m.answer), m.answer, m.extract, needed=self._prompts)
        if m.margin is not None and m.margin != "gap":
            form["margin"] = self._value(row, m.margin)
        return form

    def _tools_at(self, row: Columns) -> Any:
        tools = self.mapping.tools
        if isinstance(tools, FileAt):
            return self._tools
        if isinstance(tools, Constant):
            return tools.value
        values = (self._value(row, one) for one in ([tools] if isinstance(tools, str) else tools or []))
        return next((value for value in values if value not in (None, "", [], {})), None)

    def _ungraded(self, row: Columns) -> Form:
        """The form of grades when they are not wanted, so that an error can say what kind of row it is."""
        return (
            {"grades": grades_of(row, self.mapping.grades, 1)[0]}
            if self.mapping.grades and self.mapping.better is None
            else {}
        )

    def _label(self, row: Columns) -> Form:
        better = self.mapping.better
        if better is None or better.label is None or self._prompts:
            return {}
        label = judging.label_of(self._value(row, better.label), better, better.label)
        if label is None:
            raise LeftOut(judging.NOT_JUDGED)
        return {"label": label}

    def _value(self, row: Columns, where: str) -> Any:
        at = template(where)
        if isinstance(at, Template):
            return find_text(row, at)
        value = find(row, at)
        if isinstance(value, str) and where in self.mapping.json_texts:
            value = parse_text(value, where, "expected JSON")
        return value

    def _marked(self, where: str) -> bool:
        """Does this place have texts with speakers' marks?"""
        marks = self.mapping.dialogue
        if marks is None:
            return False
        prompt = self.mapping.prompt
        return where in marks.within if marks.within else prompt is None or where == prompt

    def _asked(self, row: Columns, *, context: bool = False) -> Any:
        """The prompt: a text, or turns; None if it is the common beginning of the answers.

        With ``context``, earlier answers in messages are not trained on; those in a history of pairs are.
        """
        prompt = self.mapping.prompt
        if prompt is None:
            return None
        if isinstance(prompt, str):
            value = self._read(row, prompt)
            return value if isinstance(value, str) else self._turns(value, prompt, context=context)
        turns: list[Any] = []
        for one in prompt if isinstance(prompt, list) else [prompt]:
            if isinstance(one, SystemAt):
                continue
            value = self._read(row, one)
            if value is None or value == "" or value == []:
                continue
            turns += (
                [{"role": "user", "content": value}]
                if isinstance(value, str)
                else self._turns(value, one, context=context)
            )
        if not turns:
            raise RowError("is empty", "prompt")
        return turns

    def _read(self, row: Columns, where: str) -> Any:
        value = self._value(row, where)
        if isinstance(value, str):
            if self._marked(where):
                assert self.mapping.dialogue is not None
                return dialogue.cut(value, self.mapping.dialogue, where)
            if OPENS.match(value):
                parsed = turns_in(value, where)
                return value if parsed is None else parsed
        return value if value is None or isinstance(value, (str, list, dict)) else text_at(value, where) or None

    def _turns(self, value: Any, where: str, *, context: bool) -> list[Any]:
        if isinstance(value, dict):
            value = value["messages"] if isinstance(value.get("messages"), list) else [value]
        if not isinstance(value, list):
            raise RowError("missing" if value is None else "expected a text or messages", where)
        if not any(isinstance(item, Mapping) for item in value):
            return dialogue.alternating(value, where)
        turns = dialogue.untagged(dialogue.named(value, self.mapping.turns, where), self.mapping.tags, where)
        return dialogue.trained(turns, [False] * len(turns), where) if context else turns

    def _conversation(self, row: Columns, where: str, note: Note) -> list[Any]:
        m = self.mapping
        value = self._value(row, where)
        if self._marked(where) and isinstance(value, str):
            assert m.dialogue is not None
            turns: list[Any] = dialogue.cut(value, m.dialogue, where)
        else:
            if isinstance(value, dict) and isinstance(value.get("messages"), list):
                value = value["messages"]
            items = list_of(value, where, "a list of turns")
            turns = dialogue.alternating(items, where) if m.weave else dialogue.named(items, m.turns, where, note)
        if m.train not in (None, "all"):
            assert m.train is not None
            turns = dialogue.trained(turns, "last" if m.train == "last" else find(row, m.train), m.train)
        if m.repair:
            turns = dialogue.repaired(turns, m.repair, note)
        return self._ended(row, dialogue.untagged(turns, m.tags, where))

    def _ended(self, row: Columns, turns: list[Any]) -> list[Any]:
        """``turns`` with the last answer marked if it was cut off."""
        for where, complete in (self.mapping.finished or {}).items():
            said = find(row, where)
            if said is not None and judging.spelled(said) not in {judging.spelled(one) for one in complete}:
                return [*turns[:-1], {**turns[-1], "finished": False}]
        return turns

    def _completed(self, row: Columns, common: Form, note: Note) -> Form:
        m = self.mapping
        where = "completion" if isinstance(m.completion, Constant) else str(m.completion)
        value = m.completion.value if isinstance(m.completion, Constant) else self._read(row, where)
        if m.better is not None or m.grades:
            return {
                **common,
                **self._label(row),
                **self._ungraded(row),
                "prompt": self._asked(row),
                "completion": value,
            }
        if value is None or value in ("", []):
            raise RowError("missing" if value is None else "is empty", where)
        if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
            raise RowError("is a list of texts: several answers? say with `answers` and `better` which is best", where)
        asked = self._asked(row, context=True)
        before = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        after = (
            [{"role": "assistant", "content": value}]
            if isinstance(value, str)
            else self._turns(value, where, context=False)
        )
        if m.reasoning is not None and (thought := find_text(row, template(m.reasoning))).strip():
            after = [{**after[0], "reasoning": thought}, *after[1:]]
        if isinstance(value, str):
            after = dialogue.untagged(after, m.tags, where)
        if m.train == "last":
            before = dialogue.trained(before, [False] * len(before), where)
        return {**common, "messages": [*before, *self._ended(row, after)]}


def read_beside(file: str) -> Any:
    """The content of a JSON file that a mapping names. Raises :class:`InputError` when it does not exist or is not
    JSON."""
    path = Path(reference_syntax.resolve_beside(file))
    try:
        return parse_text(path.read_text(encoding="utf-8-sig"), "", "expected JSON")
    except (RowError, UnicodeDecodeError) as error:
        what = error.message if isinstance(error, RowError) else "not UTF-8"
        raise InputError(Problem(what, file=str(path), hint="a list of tools, for example")) from error
