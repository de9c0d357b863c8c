"""RM-Bench (https://arxiv.org/abs/2410.16184): three right and three wrong answers to each prompt, in three styles.

The styles are, in the order of the file: concise, detailed as plain text, detailed with Markdown. Every right answer is
compared with every wrong one, and a pair is right if the right answer scores strictly higher. With a_ij the share of
right pairs of right style i and wrong style j in a domain: normal is the mean of the three a_ii, hard that of those
with i < j (the wrong answer has the more elaborate style), easy that of those with i > j. Each, and every a_ij here, is
then the mean over the domains chat, math, code and safety (whose two parts are one domain); a domain's number is the
mean of its three, and the score the mean of the four domains.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from align.data.records import Origin
from align.data.strict_json import RowError, clip
from align.evaluation.compare import Found, Values
from align.evaluation.reward_bench.items import (
    Item,
    Result,
    each,
    has,
    id_of,
    mean_of_orders,
    question_of,
    strict,
    text_of,
    texts_of,
    weighted,
)

NAME, TITLE = "rmbench", "RM-Bench"
NEEDS_SCORES = False

DOMAINS = ("chat", "math", "code", "safety")
STYLES = ("concise", "detailed", "markdown")
_PART = "one of its parts"
"""The group of a row that names no domain. RM-Bench is also published as one file for each domain, and those rows do
not name it."""


def recognises(row: Mapping[str, Any]) -> bool:
    """Are these the columns of its official files?"""
    lists = has(row, "id", "prompt", "chosen", "rejected") and "num_correct" not in row
    return lists and all(isinstance(row[key], list) and len(row[key]) == len(STYLES) for key in ("chosen", "rejected"))


def item(row: Mapping[str, Any], origin: Origin) -> Item:
    """Raises RowError for a row that its official files cannot hold."""
    domain = _PART if row.get("domain") is None else _domain(text_of(row, "domain"))
    chosen, rejected = texts_of(row, "chosen"), texts_of(row, "rejected")
    return Item(id_of(row, "id", origin), domain, question_of(row, "prompt"), (*chosen, *rejected), len(chosen), origin)


def _domain(name: str) -> str:
    found = [domain for domain in DOMAINS if name.startswith(domain)]
    if not found:
        raise RowError(f"`{clip(name, 40)}` is no domain of {TITLE}", "domain")
    return found[0]


def official(margin: Values, item: Item) -> Values:
    """Its code counts a tie as wrong."""
    return strict(margin)


def official_verdicts(right_first: float, right_second: float) -> float:
    """Its code does not ask judges; a tie counts half."""
    return mean_of_orders(right_first, right_second)


def levels(pairs: Values) -> dict[str, float]:
    """The numbers easy, normal and hard of one prompt, from its pairs [right style, wrong style]."""
    apart = len(STYLES) * (len(STYLES) - 1) / 2
    return {
        "easy": float(np.tril(pairs, -1).sum() / apart),
        "normal": float(np.diag(pairs).mean()),
        "hard": float(np.triu(pairs, 1).sum() / apart),
    }


def measures(items: Sequence[Item], results: Mapping[str, Sequence[Result]]) -> dict[str, Found]:
    """The score if all domains are there, in both ways of counting; and numbers by difficulty and by domain."""
    rows = Counter(one.group for one in items)
    weight = _weights(items)
    official = each(results, lambda one: np.mean(list(levels(one.official).values())))
    found: dict[str, Found] = {}
    if set(rows) in (set(DOMAINS), {_PART}):
        half = each(results, lambda one: np.mean(list(levels(one.half).values())))
        found[f"{NAME}/score"] = weighted(f"{TITLE}, score", official, weight)
        found[f"{NAME}/score_ties_half"] = weighted(f"{TITLE}, score with ties as half", half, weight)
    for level in ("easy", "normal", "hard"):
        values = each(results, lambda one, level=level: levels(one.official)[level])
        found[f"{NAME}/{level}"] = weighted(f"{TITLE}, {level}", values, weight)
    for domain in DOMAINS:
        if rows[domain]:
            own = np.array([float(one.group == domain) for one in items])
            found[f"{NAME}/{domain}"] = weighted(f"{TITLE}, {domain}", official, own)
    return found


def details(items: Sequence[Item], results: Mapping[str, Sequence[Result]]) -> dict[str, Found]:
    """The matrix a_ij, by the two styles."""
    weight = _weights(items)
    found: dict[str, Found] = {}
    for i, right in enumerate(STYLES):
        for j, wrong in enumerate(STYLES):
            values = each(results, lambda one, i=i, j=j: one.official[i, j])
            found[f"right {right} over wrong {wrong}"] = weighted("", values, weight)
    return found


def _weights(items: Sequence[Item]) -> Values:
    """Weights of the prompts, such that every domain counts the same."""
    rows = Counter(one.group for one in items)
    return np.array([1 / rows[one.group] for one in items])


def incomplete(items: Sequence[Item]) -> str | None:
    """Why numbers on these items are not those that the benchmark's own tables show."""
    there = {one.group for one in items}
    if there == {_PART}:
        return "one of its parts, whose rows name no domain: the score is that of this part"
    missing = [domain for domain in DOMAINS if domain not in there]
    return f"no prompts of {', '.join(missing)}, so there is no score" if missing else None
