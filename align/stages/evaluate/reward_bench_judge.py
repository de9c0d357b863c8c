"""A judge on a reward benchmark: every pair of a right and a wrong answer in both orders, or every answer with a
grade."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from align.evaluation import judge as judging
from align.evaluation.chat_server import ChatServer, Usage
from align.evaluation.reward_bench.items import Bench, Item, Result, of_scores
from align.recipe.kinds.judge import Judge
from align.rollout.progress import CountBar
from align.stages.context import StageContext
from align.stages.evaluate.judge import account_of, ask_both_orders, doubts


def judge_bench(
    judge: Judge, ctx: StageContext, name: str, bench: Bench, items: Sequence[Item]
) -> tuple[dict[str, list[Result | None]], dict[str, Any], list[str]]:
    """(the judge's result on each item by each of its methods, an account of the requests, warnings). The result is
    None for an item whose replies cannot be read.

    Raises as :meth:`align.evaluation.chat_server.ChatServer.ask`.
    """
    server = ChatServer(judge, ctx.cache / "judge")
    found: dict[str, list[Result | None]] = {}
    about: dict[str, Any] = {"model": judge.model}
    warnings: list[str] = []
    usage = Usage()
    try:
        if "pairwise" in judge.methods and not bench.NEEDS_SCORES:
            who = f"{judge.model}, pairs"
            found[who], about["verdicts"], took = _pairs(judge, server, ctx, name, bench, items)
            usage = usage + took
            warnings += doubts(name, about["verdicts"])
        if "pointwise" in judge.methods:
            found[f"{judge.model}, grades"], took = _grades(judge, server, ctx, name, bench, items)
            usage = usage + took
    finally:
        server.close()
    took_all, unread = account_of(judge, server, usage)
    return found, about | took_all, warnings + unread


def _pairs(
    judge: Judge, server: ChatServer, ctx: StageContext, name: str, bench: Bench, items: Sequence[Item]
) -> tuple[list[Result | None], dict[str, Any], Usage]:
    """Results from verdicts on pairs. The right answer takes the place of our policy's, so a win is a correct
    verdict."""
    pairs = [(item, r, w) for item in items for r, w in item.pairs]
    texts = [(item.answers[r], item.answers[w]) for item, r, w in pairs]
    verdicts, usage = ask_both_orders(judge, server, ctx, name, [item.prompt for item, _, _ in pairs], texts)
    results: list[Result | None] = []
    first = 0
    for item in items:
        own = range(first, first + len(item.pairs))
        first = own.stop
        if not all(p in verdicts.orders for p in own):
            results.append(None)
            continue
        shape = (item.right, len(item.answers) - item.right)
        official = np.array([bench.official_verdicts(*verdicts.orders[p]) for p in own]).reshape(shape)
        results.append(Result(official, np.array([verdicts.settled[p][0] for p in own]).reshape(shape)))
    return results, verdicts.counts, usage


def _grades(
    judge: Judge, server: ChatServer, ctx: StageContext, name: str, bench: Bench, items: Sequence[Item]
) -> tuple[list[Result | None], Usage]:
    """Results from grades, 1 to 10 for each answer by itself; equal grades are ties."""
    asked = [judging.pointwise(judge.language, item.prompt, text, None) for item in items for text in item.answers]
    with CountBar(ctx.console, f"{ctx.name}  grades, {name}", "replies", len(asked)) as bar:
        graded, usage = server.ask(asked, judging.read_grades, bar.advance)
    grades = iter(graded)
    results: list[Result | None] = []
    for item in items:
        own = [next(grades) for _ in item.answers]
        overall = [grade["overall"] for grade in own if grade is not None]
        results.append(of_scores(bench, item, overall) if len(overall) == len(own) else None)
    return results, usage
