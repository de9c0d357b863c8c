"""What the reward benchmarks have in common: prompts with right and wrong answers, and results of pairs of them.

Results are counted in two ways: ``official``, as the benchmark's code does, and ``half``, where a tie is half right
(:mod:`align.functional.ties`), as guessing between equal scores would be on average.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from align.data.records import Message, Messages, Origin
from align.data.strict_json import RowError, type_name
from align.evaluation.compare import Found, Metric, Values
from align.functional.intervals import SHARE
from align.functional.ties import won

LONGER = "longer answer"
"""Name of the control: a scorer whose score is the answer's number of characters."""


@dataclass(frozen=True)
class Item:
    """A prompt with answers, of which the first ``right`` are right and the others wrong."""

    id: str
    group: str
    """The part of the benchmark that the row belongs to, as the row names it."""
    prompt: Messages
    answers: tuple[str, ...]
    right: int
    origin: Origin
    right_first: bool = True
    """For a pair, was the right answer the first one in the file?"""

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(number of a right answer, number of a wrong answer) for every such pair."""
        return [(r, w) for r in range(self.right) for w in range(self.right, len(self.answers))]


@dataclass(frozen=True)
class Result:
    """The result of a scorer or judge on an item."""

    official: Values  # [right, wrong]: how far the official code counts the pair as right, from 0 to 1
    half: Values  # [right, wrong]: 1 where the right answer wins, 0 where it loses, 0.5 for a tie
    scores: Values | None = None  # [answers]; None for a judge that only compares


class Bench(Protocol):
    """The interface of the modules of this package: reading a benchmark's rows, and computing its numbers."""

    NAME: str
    """Name in metrics and file names."""
    TITLE: str
    NEEDS_SCORES: bool
    """Does it need scores of answers, not only verdicts on pairs?"""

    def recognises(self, row: Mapping[str, Any]) -> bool:
        """Are these the columns of its official files?"""
        ...

    def item(self, row: Mapping[str, Any], origin: Origin) -> Item:
        """Raises RowError for a row that its official files cannot hold."""
        ...

    def official(self, margin: Values, item: Item) -> Values:
        """How far its code counts each pair as right, from the differences of score; [right, wrong] both."""
        ...

    def official_verdicts(self, right_first: float, right_second: float) -> float:
        """How far it counts a pair as right that a judge saw in both orders. Each verdict is 1 for the right answer, 0
        for the wrong one, 0.5 for a tie."""
        ...

    def measures(self, items: Sequence[Item], results: Mapping[str, Sequence[Result]]) -> dict[str, Found]:
        """Its numbers, from the results of each scorer or judge."""
        ...

    def details(self, items: Sequence[Item], results: Mapping[str, Sequence[Result]]) -> dict[str, Found]:
        """More detailed numbers, counted and named as in the official code."""
        ...

    def incomplete(self, items: Sequence[Item]) -> str | None:
        """Why numbers on these items are not comparable with the benchmark's published tables; None if they are."""
        ...


def of_scores(bench: Bench, item: Item, scores: Sequence[float]) -> Result:
    """The result for an item from the scores of its answers."""
    array = np.asarray(scores, dtype=np.float64)
    margin = array[: item.right, None] - array[None, item.right :]
    return Result(bench.official(margin, item), won(margin), array)


def of_lengths(bench: Bench, item: Item) -> Result:
    """The result of the control on an item."""
    return of_scores(bench, item, [float(len(answer)) for answer in item.answers])


def strict(margin: Values) -> Values:
    """1 where the right answer scores strictly higher, else 0, as most benchmarks count."""
    return (margin > 0).astype(np.float64)


def mean_of_orders(right_first: float, right_second: float) -> float:
    """The expected result of a judge that is asked once in a random order, as some official codes do."""
    return (right_first + right_second) / 2


def weighted(words: str, values: Mapping[str, Values], weights: Values) -> Metric:
    """A weighted mean of items; those of weight 0 are ignored."""
    if (weights == weights[0]).all():
        return Metric(words, dict(values), within=SHARE)
    return Metric(words, {who: value * weights for who, value in values.items()}, weights, within=SHARE)


def each(results: Mapping[str, Sequence[Result]], number: Any) -> dict[str, Values]:
    """``number`` of every result, by scorer: [P]."""
    return {who: np.array([number(result) for result in own], dtype=np.float64) for who, own in results.items()}


def slug(name: str) -> str:
    """A group's name in a metric: ``Chat Hard`` is ``chat_hard``."""
    return name.lower().replace(" ", "_").replace("-", "_")


def by_group(items: Sequence[Item], results: Mapping[str, Sequence[Result]]) -> dict[str, Found]:
    """The share of right pairs in each group, of items that are one pair each."""
    official = each(results, lambda one: one.official[0, 0])
    return {
        group: weighted(group, official, np.array([float(item.group == group) for item in items]))
        for group in dict.fromkeys(item.group for item in items)
    }


# Rows


def has(row: Mapping[str, Any], *columns: str) -> bool:
    """Are all these columns there?"""
    return row.keys() >= set(columns)


def text_of(row: Mapping[str, Any], column: str) -> str:
    """The text in a column. Raises RowError for anything else."""
    value = row.get(column)
    if not isinstance(value, str):
        raise RowError("missing" if value is None else f"expected a text, found {type_name(value)}", column)
    return value


def texts_of(row: Mapping[str, Any], column: str) -> list[str]:
    """The texts in a column, at least one. Raises RowError for anything else."""
    value = row.get(column)
    if not isinstance(value, list) or not value or not all(isinstance(part, str) for part in value):
        raise RowError("expected a list of texts", column)
    return value


def question_of(row: Mapping[str, Any], column: str) -> Messages:
    """The question in a column, as a message of the user. Raises RowError when there is none."""
    asked = text_of(row, column)
    if not asked.strip():
        raise RowError("empty", column)
    message: Message = {"role": "user", "content": asked}
    return (message,)


def id_of(row: Mapping[str, Any], column: str, origin: Origin) -> str:
    """The row's id in a column, or its line."""
    value = row.get(column)
    return str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else str(origin.line)
