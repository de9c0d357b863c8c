"""Scoring the rows of a data file with any scorer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from align.data.formats.formats import Converter, RowError, Want, converter
from align.data.records import Conversation, Graded, Messages, Preference, Unpaired
from align.data.sources.contents import wanted_of
from align.data.sources.mixture import SHOWN
from align.data.sources.readers import Row, read_rows
from align.errors import InputError, Problem
from align.recipe.schema import DataSource
from align.scoring.scorer import Answer, Scorer

_ROWS = 64
"""Number of rows that are scored together."""


def score_rows(scorer: Scorer, location: Path | str, source: DataSource | None = None) -> Iterator[dict[str, Any]]:
    """The scores of the answers of each row of a file or hub data set (``location`` as str), read by the keys of
    ``source``.

    A preference gives ``{"id", "chosen", "rejected": [...]}``, a conversation or a labelled
    answer the ``score`` of its last message, and a prompt with a list
    of texts in ``answers`` their ``scores``.

    Raises:
        InputError: bad rows, of which the first are listed, once all others have been scored; or there is no row.
    """
    source = source or DataSource(path=str(location))
    want = wanted_of(source, location)
    bad: list[Problem] = []
    convert = converter(source, want)
    rows = read_rows(source, location, bad.append)
    while part := list(islice(rows, _ROWS)):
        yield from _scored(scorer, _read(part, convert, want, bad))
    if bad:
        count = "1 bad row" if len(bad) == 1 else f"{len(bad):,} bad rows"
        raise InputError([*bad[:SHOWN], Problem(f"{count} in all; their scores are missing")])


def _read(
    rows: Iterable[Row], convert: Converter, want: Want, bad: list[Problem]
) -> Iterator[tuple[str, str, list[Answer]]]:
    """(id, type of the row, its answers), the chosen answer first."""
    for row in rows:
        try:
            for record in convert(row):
                if isinstance(record, Preference):
                    answers = [_answer(record.prompt, said) for said in (record.chosen, *record.rejected)]
                elif isinstance(record, (Unpaired, Graded)):
                    answers = [_answer(record.prompt, record.completion)]
                elif isinstance(record, Conversation):
                    answers = [_answer((), record.messages)]
                else:
                    answers = [Answer(record.prompt, text) for text in _texts(row.value.get("answers"))]
                yield record.id, want, answers
        except RowError as error:
            bad.append(Problem(error.message, file=row.origin.source, line=row.origin.line, key=error.field))


def _answer(prompt: Messages, said: Messages) -> Answer:
    """The answer to score: the last message; the messages before it belong to its prompt."""
    return Answer((*prompt, *said[:-1]), said[-1]["content"])


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise RowError("expected a list of texts", "answers")
    return value


def _scored(scorer: Scorer, rows: Iterable[tuple[str, str, list[Answer]]]) -> Iterator[dict[str, Any]]:
    answered = list(rows)
    scores = iter(scorer.score([answer for _, _, answers in answered for answer in answers]))
    for id, want, answers in answered:
        own = list(islice(scores, len(answers)))
        match want:
            case "preference":
                yield {"id": id, "chosen": own[0], "rejected": own[1:]}
            case "conversation" | "unpaired" | "graded":
                yield {"id": id, "score": own[0]}
            case _:
                yield {"id": id, "scores": own}
