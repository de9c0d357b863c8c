"""Reads rows by a recipe's mapping: what is asked, what was answered, which answer is better. Makes forms (:mod:`align.data.forms`)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from align.data import better as judging
from align.data import dialogue
from align.data.comparisons import EMPTY, Ballots, by_name, compared
from align.data.messages import Note, list_of
from align.data.places import Place, Template, find, find_text, template, text_at
from align.data.rows import LeftOut
from align.data.strict_json import RowError, parse_text
from align.data.values import (
    OPENS,
    answers_of,
    bare,
    has_gap,
    is_empty,
    is_json_list,
    key_of,
    places_of,
    plain_columns,
    read_plainly,
    right_answer,
    spoken,
    turns_in,
)
from align.recipe.mapping import Constant, RowMapping, SystemAt, TreeAt

Row = Mapping[str, Any]
Form = dict[str, Any]

_RENAMED = ("messages", "prompt", "completion", "chosen", "rejected", "system", "tools", "margin", "answer")
_SHAPES = 1000
"""Sets of columns that are remembered, in a source whose rows differ."""


class MappedRows:
    """A mapping at work.

    Args:
        mapping: without a preset: what it stands for.
        prompts: are prompts wanted, so that a right answer that cannot be found leaves the row out?
        compared: are comparisons wanted, so that two answers that are equally good leave the row out?
        labelled: are labelled answers wanted, so that rows with labels are not grouped into comparisons?
    """

    def __init__(self, mapping: RowMapping, *, prompts: bool = False, labelled: bool = False, compared: bool = True) -> None:
        self.mapping = mapping
        self.places = tuple(places_of(mapping))
        """All that is read."""
        self._prompts, self._compared_wanted = prompts, compared
        self._used: dict[tuple[str, ...], set[str]] = {}
        self._plain = plain_columns(mapping)
        self.names = {key: str(value) for key in _RENAMED if isinstance(value := getattr(mapping, key), str)}
        """What the row calls the parts of a form, for error messages."""
        self._single = labelled and mapping.better is not None and mapping.better.label is not None
        self.grouped = bool((mapping.group is not None and not self._single) or (mapping.tree and mapping.tree.parent))
        """Do rows belong together? Then :meth:`of_group` makes the forms."""

    def columns(self, row: Row) -> set[str]:
        """The row's columns that are read."""
        keys = tuple(row)
        used = self._used.get(keys)
        if used is None:
            found = (next((name for name in one.columns if name in row), None) for one in self.places)
            used = {name for name in found if name is not None}
            if len(self._used) < _SHAPES:
                self._used[keys] = used
        return used

    def as_the_row_calls_it(self, field: str | None, form: Form) -> str | None:
        """A field of a form, under the name of its place."""
        first, dot, rest = (field or "").partition(".")
        if first == "messages" and self.mapping.completion is not None:
            number, _, rest = rest.partition(".")
            last = number.isdigit() and int(number) == len(form.get("messages", [])) - 1
            return self.names.get("completion" if last else "prompt", field)
        return f"{self.names[first]}{dot}{rest}" if first in self.names else field

    def key(self, row: Row) -> str:
        """What rows of one group have in common."""
        group = self.mapping.group
        where = [group] if isinstance(group, str) else group or []
        return json.dumps([find_text(row, template(one)) if "{" in one else find(row, one) for one in where], default=str)

    def forms(self, row: Row, note: Note) -> list[Form]:
        """The forms of a row that stands for itself. Raises :class:`RowError`, and :class:`LeftOut` for a sound row without a record."""
        m = self.mapping
        if self._plain is not None and (form := read_plainly(row, self._plain)) is not None:
            return [form]
        common = self._common(row)
        if self._prompts and m.prompt is not None and m.completion is None:
            return [{**common, "prompt": self._asked(row)}]
        if m.tree is not None:
            return list(self._nested(row, m.tree, common, note))
        if m.messages is not None:
            return [{**common, **self._label(row), "messages": self._conversation(row, m.messages, note)}]
        if m.chosen is not None:
            return self._pairs(row, common, note)
        if m.answers is not None:
            if self._single:
                (value,) = self._answers(row)
                return [{**common, **self._label(row), "prompt": self._asked(row), "completion": value}]
            values = self._answers(row)
            judged = judging.judge(row, m.better, len(values))  # type: ignore[arg-type]
            if judged.why is not None:
                raise LeftOut(judged.why)
            ballots = Ballots()
            if len(judged.ballots) > 1:
                ballots.add(judged.ballots, [key_of(value) for value in values])
            return self._compared(row, list(zip(values, judged.scores, strict=True)), common, note, ballots)
        if m.completion is not None:
            return [self._completed(row, common, note)]
        return [{**common, "prompt": self._asked(row)}]

    def of_group(self, rows: Sequence[Row], note: Note) -> list[Form]:
        """The forms of rows that belong together: the same answer is one answer, votes add up, scores are averaged."""
        better = self.mapping.better
        assert better is not None
        answers: dict[str, Any] = {}
        scores: dict[str, list[float]] = {}
        votes, why, ballots = False, None, Ballots()
        for row in rows:
            values = self._answers(row)
            judged = judging.judge(row, better, len(values))
            votes, why = judged.votes, why or judged.why
            ballots.add(judged.ballots, [key_of(value) for value in values])
            for value, score in zip(values, judged.scores, strict=True):
                if is_empty(value):
                    note(EMPTY)
                    continue
                if score is not None:
                    answers.setdefault(key_of(value), value)
                    scores.setdefault(key_of(value), []).append(score)
        if not answers:
            raise LeftOut(why or judging.NO_SCORE)
        if len(answers) == 1:
            raise LeftOut(judging.ONE_ANSWER)
        merged = [(value, sum(scores[key]) / (1 if votes else len(scores[key]))) for key, value in answers.items()]
        return self._compared(rows[0], list(merged), self._common(rows[0]), note, ballots)

    def of_siblings(self, path: Sequence[Row], siblings: Sequence[Row], note: Note) -> list[Form]:
        """The forms of a tree's messages that answer the same one; ``path`` leads to it from the root."""
        tree = self.mapping.tree
        assert tree is not None and tree.score is not None
        entries: list[tuple[Any, float | None]] = []
        for row in siblings:
            score = judging.number(find(row, tree.score), tree.score)
            entries.append(([row], -score if score is not None and tree.order == "low" else score))
        if sum(score is not None for _, score in entries) < 2:
            raise LeftOut(judging.NO_SCORE if len(entries) > 1 else judging.ONE_ANSWER)
        common = {**self._common(siblings[0]), "prompt": [dict(row) for row in path]}
        return self._compared(siblings[0], entries, common, note, Ballots())

    # Parts of a form

    def _common(self, row: Row) -> Form:
        m = self.mapping
        form: Form = {}
        if m.system is not None:
            form["system"] = m.system.value if isinstance(m.system, Constant) else self._value(row, m.system)
        for one in m.prompt if isinstance(m.prompt, list) else [m.prompt]:
            if isinstance(one, SystemAt):
                form["system"] = self._value(row, one.system)
        if m.tools is not None:
            form["tools"] = m.tools.value if isinstance(m.tools, Constant) else self._value(row, m.tools)
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

    def _label(self, row: Row) -> Form:
        better = self.mapping.better
        return {} if better is None or better.label is None else {"label": self._value(row, better.label)}

    def _value(self, row: Row, where: str) -> Any:
        at = template(where)
        if isinstance(at, Template):
            return find_text(row, at)
        value = find(row, at)
        if isinstance(value, str) and where in self.mapping.json_texts:
            value = parse_text(value, where, "expected JSON")
        return value

    def _marked(self, where: str) -> bool:
        """Does this place hold texts with the marks of speakers?"""
        marks = self.mapping.dialogue
        if marks is None:
            return False
        prompt = self.mapping.prompt
        return where in marks.within if marks.within else prompt is None or where == prompt

    def _asked(self, row: Row, *, context: bool = False) -> Any:
        """What is asked: a text, or turns; None where the mapping leaves it to the answers.

        With ``context`` earlier answers of messages are not trained on; those of a history of pairs are.
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
            turns += [{"role": "user", "content": value}] if isinstance(value, str) else self._turns(value, one, context=context)
        if not turns:
            raise RowError("is empty", "prompt")
        return turns

    def _read(self, row: Row, where: str) -> Any:
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

    def _conversation(self, row: Row, where: str, note: Note) -> list[Any]:
        m = self.mapping
        value = self._value(row, where)
        if self._marked(where) and isinstance(value, str):
            assert m.dialogue is not None
            turns: list[Any] = dialogue.cut(value, m.dialogue, where)
        else:
            if isinstance(value, dict) and isinstance(value.get("messages"), list):
                value = value["messages"]
            items = list_of(value, where, "a list of turns")
            turns = dialogue.alternating(items, where) if m.weave else dialogue.named(items, m.turns, where)
        if m.train not in (None, "all"):
            assert m.train is not None
            turns = dialogue.trained(turns, "last" if m.train == "last" else find(row, m.train), m.train)
        if m.repair:
            turns = dialogue.repaired(turns, m.repair, note)
        return self._ended(row, dialogue.untagged(turns, m.tags, where))

    def _ended(self, row: Row, turns: list[Any]) -> list[Any]:
        """The last answer, marked where it was cut off."""
        for where, complete in (self.mapping.finished or {}).items():
            said = find(row, where)
            if said is not None and judging.spelled(said) not in {judging.spelled(one) for one in complete}:
                return [*turns[:-1], {**turns[-1], "finished": False}]
        return turns

    def _completed(self, row: Row, common: Form, note: Note) -> Form:
        m = self.mapping
        where = "completion" if isinstance(m.completion, Constant) else str(m.completion)
        value = m.completion.value if isinstance(m.completion, Constant) else self._read(row, where)
        if m.better is not None:
            return {**common, **self._label(row), "prompt": self._asked(row), "completion": value}
        if value is None or value in ("", []):
            raise RowError("missing" if value is None else "is empty", where)
        if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
            raise RowError("is a list of texts: several answers? say with `answers` and `better` which is best", where)
        asked = self._asked(row, context=True)
        before = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        after = [{"role": "assistant", "content": value}] if isinstance(value, str) else self._turns(value, where, context=False)
        if m.reasoning is not None and (thought := find_text(row, template(m.reasoning))).strip():
            after = [{**after[0], "reasoning": thought}, *after[1:]]
        if isinstance(value, str):
            after = dialogue.untagged(after, m.tags, where)
        if m.train == "last":
            before = dialogue.trained(before, [False] * len(before), where)
        return {**common, "messages": [*before, *self._ended(row, after)]}

    # Comparisons

    def _answers(self, row: Row) -> list[Any]:
        m = self.mapping
        if isinstance(m.answers, list):
            values = [self._answer_at(row, where) for where in m.answers]
        else:
            where = str(m.answers)
            value, one = self._value(row, where), template(where)
            if isinstance(value, str) and is_json_list(value) and not (isinstance(one, Place) and one.many):
                parsed = parse_text(value, where, "expected answers")
                value = parsed if isinstance(parsed, list) else value
            many = isinstance(value, list) and (m.group is None or (isinstance(one, Place) and one.many))
            values = list(value) if many else [value]
        if m.weave:
            asked = list_of(self._value(row, str(m.prompt)), str(m.prompt), "a list of turns")
            values = ["" if has_gap(value) else dialogue.woven(asked, value, "answers") for value in values]
        return values

    def _answer_at(self, row: Row, where: str) -> Any:
        if self.mapping.weave:
            return list_of(self._value(row, where), where, "a list of turns")
        return self._read(row, where)

    def _pairs(self, row: Row, common: Form, note: Note) -> list[Form]:
        m = self.mapping
        assert m.chosen is not None and m.rejected is not None
        chosen, rejected = self._read(row, m.chosen), self._read(row, m.rejected)
        form = {**common, "prompt": self._asked(row), "chosen": chosen, "rejected": rejected}
        return by_name(m, row, form, scored=self._compared_wanted, note=note)

    def _compared(self, row: Row, entries: list[tuple[Any, float | None]], common: Form, note: Note, ballots: Ballots) -> list[Form]:
        """A form for each comparison that follows from scored answers."""
        question = None if self.mapping.weave else common["prompt"] if "prompt" in common else self._asked(row)
        return compared(self.mapping, entries, question, common, note, ballots)

    # Trees

    def _nested(self, row: Row, tree: TreeAt, common: Form, note: Note) -> Iterator[Form]:
        """Every place of a nested tree where several of the assistant's messages answer the same one."""
        root = find(row, tree.root or "")
        if not isinstance(root, Mapping):
            raise RowError("missing", tree.root)
        reasons: list[str] = []
        found = False
        stack: list[tuple[list[Row], Mapping[str, Any]]] = [([], root)]
        while stack:
            path, node = stack.pop()
            here, children = [*path, node], answers_of(node, tree)
            answers = [child for child in children if dialogue.speaker(child) == "assistant"]
            if answers:
                try:
                    for form in self.of_siblings(spoken(here, tree), [bare(one, tree) for one in answers], note):
                        found = True
                        yield {**common, **form}
                except LeftOut as reason:
                    reasons.append(str(reason))
            stack += [(here, child) for child in reversed(children)]
        if not found:
            raise LeftOut(reasons[0] if reasons else judging.ONE_ANSWER)
