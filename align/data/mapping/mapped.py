"""Reads rows by a recipe's mapping: what is asked, what was answered, which answer is better.

Makes forms (:mod:`align.data.messages.forms`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from align.data.mapping import better as judging
from align.data.mapping.coded import Coded
from align.data.mapping.comparisons import EMPTY, Ballots, by_name, compared
from align.data.mapping.graded import grades_of, noted_without
from align.data.mapping.places import Place, find, find_text, template
from align.data.mapping.row_parts import RowParts
from align.data.mapping.values import (
    answers_of,
    bare,
    has_gap,
    is_empty,
    is_json_list,
    key_of,
    plain_columns,
    read_plainly,
    spoken,
)
from align.data.messages import dialogue
from align.data.messages.messages import Note, list_of
from align.data.rows import Columns, LeftOut
from align.data.strict_json import RowError, parse_text, type_name
from align.recipe.rows.mapping import Constant, RowMapping, TreeAt
from align.recipe.rows.places import Every, Only

Form = dict[str, Any]

Aside = Callable[[int, RowError], None]
"""Called with the number of a row that was left out of its group, and the reason."""

EMPTY_ANSWER = "its answer is empty"


class MappedRows(RowParts):
    """Makes forms of rows by a mapping.

    Args:
        mapping: the mapping, with its preset replaced by the keys that it stands for.
        prompts: are prompts wanted? Then a row is left out if its right answer cannot be found.
        compared: are preferences wanted? Then a row with two equally good answers is left out.
        labelled: are labelled answers wanted? Then rows with labels are not grouped into comparisons.
        graded: are graded answers wanted? Then rows with grades are not grouped either.
        code: the function of a preset, which changes the row before the mapping reads it.
    """

    def __init__(
        self,
        mapping: RowMapping,
        *,
        prompts: bool = False,
        labelled: bool = False,
        graded: bool = False,
        compared: bool = True,
        code: Coded | None = None,
    ) -> None:
        super().__init__(mapping, prompts=prompts, graded=graded, code=code)
        self._compared_wanted = compared
        self._plain = plain_columns(mapping) if code is None else None
        self._single = labelled and mapping.better is not None and mapping.better.label is not None
        self._graded = graded and bool(mapping.grades)
        alone = self._single or self._graded
        self.grouped = bool((mapping.group is not None and not alone) or (mapping.tree and mapping.tree.parent))
        """Are rows converted in groups, by :meth:`of_group`?"""

    def key(self, row: Columns) -> str:
        """The key that the rows of a group share."""
        group = self.mapping.group
        where = [group] if isinstance(group, str) else group or []
        return json.dumps(
            [find_text(row, template(one)) if "{" in one else find(row, one) for one in where], default=str
        )

    def forms(self, row: Columns, note: Note) -> list[Form]:
        """The forms of a single row. Raises :class:`RowError`, and :class:`LeftOut` for a sound row without a
        record."""
        m = self.mapping
        if self._plain is not None and (form := read_plainly(row, self._plain)) is not None:
            return [form]
        if self.code is not None:
            row = self.code(row, note)
        common = self._common(row)
        if self._graded:
            return self._with_grades(row, common, note)
        if self._prompts and m.prompt is not None and m.completion is None:
            return [{**common, "prompt": self._asked(row)}]
        if m.tree is not None:
            return list(self._nested(row, m.tree, common, note))
        if m.messages is not None:
            return [
                {
                    **common,
                    **self._label(row),
                    **self._ungraded(row),
                    "messages": self._conversation(row, m.messages, note),
                }
            ]
        if m.chosen is not None:
            return self._pairs(row, common, note)
        if m.answers is not None and m.better is not None:
            if self._single:
                (value,) = self._answers(row)
                return [{**common, **self._label(row), "prompt": self._asked(row), "completion": value}]
            values = self._answers(row)
            judged = judging.judge(row, m.better, len(values))
            if judged.why is not None:
                raise LeftOut(judged.why)
            ballots = Ballots()
            if len(judged.ballots) > 1:
                ballots.add(judged.ballots, [key_of(value) for value in values])
            return self._compared(row, list(zip(values, judged.scores, strict=True)), common, note, ballots)
        if m.completion is not None:
            return [self._completed(row, common, note)]
        return [{**common, "prompt": self._asked(row)}]

    def of_group(self, rows: Sequence[Columns], note: Note, aside: Aside) -> list[Form]:
        """The forms of the rows of a group: equal answers count as one, votes are added up, scores are averaged.

        A row that contributes nothing, or cannot be read, is reported to ``aside`` and left out.
        """
        if self._prompts and self.mapping.prompt is not None:
            return [{**self._common(rows[0]), "prompt": self._asked(rows[0])}]
        better = self.mapping.better
        assert better is not None
        answers: dict[str, Any] = {}
        scores: dict[str, list[float]] = {}
        votes = False
        why = None
        ballots = Ballots()
        first: Columns | None = None
        for number, row in enumerate(rows):
            try:
                values = self._answers(row)
                judged = judging.judge(row, better, len(values))
            except RowError as error:
                aside(number, error)
                continue
            if all(is_empty(value) or score is None for value, score in zip(values, judged.scores, strict=True)):
                reason = EMPTY_ANSWER if all(map(is_empty, values)) else judged.why or judging.NO_SCORE
                aside(number, LeftOut(reason))
                continue
            first = row if first is None else first
            votes, why = judged.votes, why or judged.why
            ballots.add(judged.ballots, [key_of(value) for value in values])
            for value, score in zip(values, judged.scores, strict=True):
                if is_empty(value):
                    note(EMPTY)
                    continue
                if score is not None:
                    answers.setdefault(key_of(value), value)
                    scores.setdefault(key_of(value), []).append(score)
        if first is None:
            raise LeftOut(judging.NO_SCORE)  # each row has been put aside with its own reason
        if len(answers) == 1:
            raise LeftOut(judging.ONE_ANSWER)
        merged = [(value, sum(scores[key]) / (1 if votes else len(scores[key]))) for key, value in answers.items()]
        return self._compared(first, list(merged), self._common(first), note, ballots)

    def of_siblings(
        self, path: Sequence[Columns], siblings: Sequence[Columns], note: Note, aside: Aside | None = None
    ) -> list[Form]:
        """The forms of messages of a tree that answer the same message, to which ``path`` leads from the root.

        One without a score is reported to ``aside``, if messages are rows.
        """
        tree = self.mapping.tree
        assert tree is not None and tree.score is not None
        entries: list[tuple[Any, float | None]] = []
        for number, row in enumerate(siblings):
            try:
                score = judging.number(find(row, tree.score), tree.score)
                if score is None and aside is not None:
                    raise LeftOut(judging.NO_SCORE)
            except RowError as error:
                if aside is None:
                    raise
                aside(number, error)
                continue
            entries.append(([row], -score if score is not None and tree.order == "low" else score))
        if sum(score is not None for _, score in entries) < 2:
            raise LeftOut(judging.NO_SCORE if len(entries) > 1 else judging.ONE_ANSWER)
        common = {**self._common(siblings[0]), "prompt": [dict(row) for row in path]}
        return self._compared(siblings[0], entries, common, note, Ballots())

    def _with_grades(self, row: Columns, common: Form, note: Note) -> list[Form]:
        """A form for each answer that has a grade."""
        m = self.mapping
        if m.messages is not None:
            return [
                {
                    **common,
                    "messages": self._conversation(row, m.messages, note),
                    "grades": grades_of(row, m.grades, 1)[0],
                }
            ]
        values = [self._read(row, str(m.completion))] if m.completion is not None else self._answers(row)
        if isinstance(m.completion, Constant):
            values = [m.completion.value]
        graded = list(zip(values, grades_of(row, m.grades, len(values)), strict=True))
        if len(values) > 1:
            graded = noted_without(graded, note)
        asked = self._asked(row)
        return [{**common, "prompt": asked, "completion": value, "grades": grades} for value, grades in graded]

    # Comparisons

    def _answers(self, row: Columns) -> list[Any]:
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
            if not values and isinstance(one, Place):
                self._no_list(row, one)
        if m.weave:
            asked = list_of(self._value(row, str(m.prompt)), str(m.prompt), "a list of turns")
            values = ["" if has_gap(value) else dialogue.woven(asked, value, "answers") for value in values]
        return values

    def _no_list(self, row: Columns, where: Place) -> None:
        """Raises :class:`RowError` when ``[*]`` found no answers because the value is not a list."""
        first = next((number for number, step in enumerate(where.steps) if isinstance(step, (Every, Only))), 0)
        held = find(row, Place(where.text, where.steps[:first])) if first else None
        if held is not None and not isinstance(held, list):
            raise RowError(f"expected a list of answers, found {type_name(held)}", where.text)

    def _answer_at(self, row: Columns, where: str) -> Any:
        if self.mapping.weave:
            return list_of(self._value(row, where), where, "a list of turns")
        return self._read(row, where)

    def _pairs(self, row: Columns, common: Form, note: Note) -> list[Form]:
        m = self.mapping
        assert m.chosen is not None and m.rejected is not None
        chosen, rejected = self._read(row, m.chosen), self._read(row, m.rejected)
        form = {**common, "prompt": self._asked(row), "chosen": chosen, "rejected": rejected}
        return by_name(m, row, form, scored=self._compared_wanted, note=note)

    def _compared(
        self, row: Columns, entries: list[tuple[Any, float | None]], common: Form, note: Note, ballots: Ballots
    ) -> list[Form]:
        """A form for each comparison that follows from scored answers."""
        if self.mapping.weave:
            question = None
        elif "prompt" in common:
            question = common["prompt"]
        else:
            question = self._asked(row)
        return compared(self.mapping, entries, question, common, note, ballots)

    # Trees

    def _nested(self, row: Columns, tree: TreeAt, common: Form, note: Note) -> Iterator[Form]:
        """The forms of every place in a nested tree where several of the assistant's messages answer the same
        message."""
        root = find(row, tree.root or "")
        if not isinstance(root, Mapping):
            raise RowError("missing", tree.root)
        reasons: list[str] = []
        found = False
        stack: list[tuple[list[Columns], Mapping[str, Any]]] = [([], root)]
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
