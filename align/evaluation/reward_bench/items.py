"""What the reward benchmarks have in common: prompts with right and wrong answers, and who of each pair wins.

Two ways of counting stand side by side: ``official``, as the benchmark's own code counts, and ``half``, where a tie is
half right (:mod:`align.functional.ties`), which is what guessing between equal scores would give.
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
"""The control: a scorer that counts an answer's characters and knows nothing else."""


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
    """Of a pair: did the right answer stand first in the file?"""

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Places of a right and a wrong answer, for every such pair."""
        return [(r, w) for r in range(self.right) for w in range(self.right, len(self.answers))]


@dataclass(frozen=True)
class Result:
    """What one scorer or judge makes of an item."""

    official: Values  # [right, wrong]: how far the official code counts the pair as right, from 0 to 1
    half: Values  # [right, wrong]: 1 where the right answer wins, 0 where it loses, 0.5 for a tie
    scores: Values | None = None  # [answers]; None for a judge that only compares


class Bench(Protocol):
    """What each module of this package gives: the benchmark's rows, and its numbers."""

    NAME: str
    """In metrics and file names."""
    TITLE: str
    NEEDS_SCORES: bool
    """Does it ask for more of an answer than whether it beats another one?"""

    def recognises(self, row: Mapping[str, Any]) -> bool:
        """Are these the columns of its official files?"""
        ...

    def item(self, row: Mapping[str, Any], origin: Origin) -> Item:
        """Raises RowError for a row that its official files cannot hold."""
        ...

    def official(self, margin: Values, item: Item) -> Values:
        """How its code counts differences of score between right and wrong answers, [right, wrong] each."""
        ...

    def official_verdicts(self, right_first: float, right_second: float) -> float:
        """How it counts a pair that a judge saw in both orders: each 1 for the right answer, 0 for the wrong one, 0.5
        for a tie."""
        ...

    def measures(self, items: Sequence[Item], results: Mapping[str, Sequence[Result]]) -> dict[str, Found]:
        """Its numbers, from what each scorer or judge made of the items."""
        ...

    def details(self, items: Sequence[Item], results: Mapping[str, Sequence[Result]]) -> dict[str, Found]:
        """Finer numbers, for whoever asks why: as the official code counts, under their names in it."""
        ...

    def incomplete(self, items: Sequence[Item]) -> str | None:
        """Why numbers on these items are not those that the benchmark's own tables show; None where they are."""
        ...


def of_scores(bench: Bench, item: Item, scores: Sequence[float]) -> Result:
    """From the scores of an item's answers."""
    array = np.asarray(scores, dtype=np.float64)
    margin = array[: item.right, None] - array[None, item.right :]
    return Result(bench.official(margin, item), won(margin), array)


def of_lengths(bench: Bench, item: Item) -> Result:
    """The control's."""
    return of_scores(bench, item, [float(len(answer)) for answer in item.answers])


def strict(margin: Values) -> Values:
    """1 where the right answer scores higher, else 0: how most benchmarks count."""
    return (margin > 0).astype(np.float64)


def mean_of_orders(right_first: float, right_second: float) -> float:
    """A judge asked once in a random order, on average over the order: what the official codes do that ask once."""
    return (right_first + right_second) / 2


def weighted(words: str, values: Mapping[str, Values], weights: Values) -> Metric:
    """A mean of items that do not all count the same; those of weight 0 count nothing."""
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
    """A text of the row. Raises RowError for anything else."""
    value = row.get(column)
    if not isinstance(value, str):
        raise RowError("missing" if value is None else f"expected a text, found {type_name(value)}", column)
    return value


def texts_of(row: Mapping[str, Any], column: str) -> list[str]:
    """A list of texts of the row, at least one. Raises RowError for anything else."""
    value = row.get(column)
    if not isinstance(value, list) or not value or not all(isinstance(part, str) for part in value):
        raise RowError("expected a list of texts", column)
    return value


def question_of(row: Mapping[str, Any], column: str) -> Messages:
    """What is asked, as a message of the user. Raises RowError where there is none."""
    asked = text_of(row, column)
    if not asked.strip():
        raise RowError("empty", column)
    message: Message = {"role": "user", "content": asked}
    return (message,)


def id_of(row: Mapping[str, Any], column: str, origin: Origin) -> str:
    """The row's own name, or its line."""
    value = row.get(column)
    return str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else str(origin.line)
