"""JudgeBench (https://arxiv.org/abs/2410.12784): pairs of which one answer is correct, from four kinds of problems.

For a scorer, its code takes "A>B" as the verdict if the first answer scores strictly higher, else "B>A", so a tie
counts as a verdict for the second answer. A judge is asked in both orders: each verdict for the right answer counts 1,
each for the wrong one -1, a tie 0, and the pair is right where the sum is positive. Both numbers are shares of pairs,
in a category or of all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from align.data.records import Origin
from align.data.strict_json import RowError, clip
from align.evaluation.compare import Found, Values
from align.evaluation.reward_bench.items import Item, Result, by_group, each, has, id_of, question_of, text_of, weighted

NAME, TITLE = "judgebench", "JudgeBench"
NEEDS_SCORES = False

CATEGORIES = {
    "knowledge": "mmlu-pro",
    "reasoning": "livebench-reasoning",
    "math": "livebench-math",
    "coding": "livecodebench",
}
"""Category -> beginning of the `source` of its rows."""
_PAIRS = (350, 270, 620)
"""Numbers of pairs in the two official files, and in both."""


def recognises(row: Mapping[str, Any]) -> bool:
    """Are these the columns of its official files?"""
    return has(row, "question", "response_A", "response_B", "label", "source")


def item(row: Mapping[str, Any], origin: Origin) -> Item:
    """Raises RowError for a row that its official files cannot hold."""
    label = text_of(row, "label")
    if label not in ("A>B", "B>A"):
        raise RowError(f"expected A>B or B>A, found `{clip(label, 40)}`", "label")
    answers = text_of(row, "response_A"), text_of(row, "response_B")
    first = label == "A>B"
    right, wrong = answers if first else answers[::-1]
    return Item(
        id_of(row, "pair_id", origin),
        text_of(row, "source"),
        question_of(row, "question"),
        (right, wrong),
        1,
        origin,
        first,
    )


def official(margin: Values, item: Item) -> Values:
    """Its code counts a tie as a verdict for the second answer."""
    return (margin > 0 if item.right_first else margin >= 0).astype(np.float64)


def official_verdicts(right_first: float, right_second: float) -> float:
    """Right if the verdicts for the right answer outweigh those for the wrong one."""
    return float(right_first + right_second > 1)


def measures(items: Sequence[Item], results: Mapping[str, Sequence[Result]]) -> dict[str, Found]:
    """All pairs, in both ways of counting, and each category."""
    official, half = each(results, lambda one: one.official[0, 0]), each(results, lambda one: one.half[0, 0])
    all_of_them = np.ones(len(items))
    found: dict[str, Found] = {
        f"{NAME}/score": weighted(f"{TITLE}, right pairs", official, all_of_them),
        f"{NAME}/score_ties_half": weighted(f"{TITLE}, right pairs with ties as half", half, all_of_them),
    }
    for name, source in CATEGORIES.items():
        own = np.array([float(one.group.startswith(source)) for one in items])
        if own.any():
            found[f"{NAME}/{name}"] = weighted(f"{TITLE}, {name}", official, own)
    return found


def details(items: Sequence[Item], results: Mapping[str, Sequence[Result]]) -> dict[str, Found]:
    """Each source."""
    return by_group(items, results)


def incomplete(items: Sequence[Item]) -> str | None:
    """Why numbers on these items are not those that the benchmark's own tables show."""
    return (
        None
        if len(items) in _PAIRS
        else f"{len(items):,} pairs, and the official files have {_PAIRS[0]} and {_PAIRS[1]}"
    )
