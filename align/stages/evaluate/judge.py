"""Asking a judge about the samples of an evaluation: the first sample of each prompt, in pairs or with grades."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from align.data.records import Messages
from align.data.strict_json import clip
from align.evaluation import judge as judging
from align.evaluation.chat_server import ChatServer, Usage
from align.evaluation.compare import Found, LengthControlled, Metric
from align.functional.intervals import SHARE, wilson
from align.recipe.kinds.judge import Judge
from align.rollout.progress import CountBar
from align.stages.context import StageContext
from align.stages.evaluate.held_out import Policy, Question, Samples, say
from align.terminal import plain

_NO_TARGET = "the judge has nothing to compare with: the data have no answers"
_CONTRADICTS = 1 / 3
"""A warning is given when the two orders disagree on at least this share of pairs. Verdicts drawn at random would
disagree on one half."""
_SHOWN = 3
"""Number of unreadable replies whose beginning is shown."""


def judge_samples(
    judge: Judge, ctx: StageContext, policies: Sequence[Policy], questions: Sequence[Question], samples: Samples
) -> tuple[dict[str, Found], dict[str, Any], list[str]]:
    """(metrics, an account of the requests, warnings). Raises as
    :meth:`align.evaluation.chat_server.ChatServer.ask`."""
    server = ChatServer(judge, ctx.cache / "judge")
    texts = {policy.name: [own[0].text for own in samples[k]] for k, policy in enumerate(policies)}
    found: dict[str, Found] = {}
    about: dict[str, Any] = {"model": judge.model}
    warnings: list[str] = []
    usage = Usage()
    try:
        if "pairwise" in judge.methods:
            if judge.against == "target" and questions[0].target is None:
                warnings.append(_NO_TARGET)
            else:
                metrics, verdicts, took = _pairwise(judge, server, ctx, questions, texts)
                found, about["verdicts"], usage = {**found, **metrics}, verdicts, usage + took
                warnings += [words for policy, counts in verdicts.items() for words in doubts(policy, counts)]
        if "pointwise" in judge.methods:
            metrics, took = _pointwise(judge, server, ctx, questions, texts)
            found, usage = {**found, **metrics}, usage + took
    finally:
        server.close()
    account, unread = account_of(judge, server, usage)
    return found, about | account, warnings + unread


def account_of(judge: Judge, server: ChatServer, usage: Usage) -> tuple[dict[str, Any], list[str]]:
    """(an account of the requests for the report; a warning if some replies could not be read)."""
    # Whether replies came from the cache is not part of the result
    about: dict[str, Any] = {key: value for key, value in vars(usage).items() if key != "from_cache"}
    if (cost := usage.cost(judge)) is not None:
        about["cost"] = round(cost, 6)
    if not usage.unreadable:
        return about, []
    shown = [_clipped(reply) for reply in sorted(server.unread.values())[:_SHOWN]]
    about["unreadable_replies"] = shown
    began = "; ".join(f'"{reply}"' for reply in shown)
    return about, [
        f"{usage.unreadable} of the judge's replies could not be read; their prompts are left out. They begin: {began}"
    ]


def _clipped(reply: str) -> str:
    """The beginning of a server's text, on one line."""
    return clip(plain(" ".join(reply.split())).plain, 80)


def doubts(policy: str, counts: Mapping[str, Any]) -> Iterator[str]:
    """Reasons to doubt the verdicts on a policy, with numbers: the two orders disagree, or the answer in one position
    wins whichever it is."""
    pairs, contradictions = counts["asked"], counts["inconsistent"]
    if pairs and contradictions >= _CONTRADICTS * pairs:
        share = (
            f"in {contradictions:,} of {pairs:,} pairs ({contradictions / pairs:.0%}) the verdict changed with the"
            " order of the answers"
        )
        yield f"the judge contradicts itself on {policy}: {share}; these count as ties"
    first, decided = counts["first"], counts["first"] + counts["second"]
    if decided > 1:
        low, high = wilson(first / decided, decided)
        if low > 0.5 or high < 0.5:
            place = "first" if low > 0.5 else "second"
            share = (
                f"the first one won in {first:,} of {decided:,} verdicts ({first / decided:.0%} [{low:.0%},"
                f" {high:.0%}])"
            )
            yield (
                f"the judge prefers the {place} answer on {policy}, whichever it is: {share}, and every answer stood"
                " first once"
            )


def _pairwise(
    judge: Judge, server: ChatServer, ctx: StageContext, questions: Sequence[Question], texts: dict[str, list[str]]
) -> tuple[dict[str, Found], dict[str, Any], Usage]:
    baseline = next(iter(texts))
    opponent = "the data's answer" if judge.against == "target" else baseline
    theirs = [q.target.text for q in questions if q.target] if judge.against == "target" else texts[baseline]
    results, pairs, counts = {}, {}, {}
    usage = Usage()
    for policy, ours in texts.items():
        if judge.against == "baseline" and policy == baseline:
            continue
        prompts, both = [question.record.prompt for question in questions], list(zip(ours, theirs, strict=True))
        verdicts, took = ask_both_orders(judge, server, ctx, policy, prompts, both)
        usage = usage + took
        counts[policy] = verdicts.counts
        if verdicts.settled:
            results[policy] = np.array([result for result, _ in verdicts.settled.values()])
            longer = np.array([float(len(ours[p]) - len(theirs[p])) for p in verdicts.settled])
            pairs[policy] = np.stack([results[policy], longer], axis=-1)[:, None, :]
    found: dict[str, Found] = {}
    if results:
        found["judge/win_rate"] = Metric(
            f"win rate over {opponent} by {judge.model}, both orders", results, paired=False, within=SHARE
        )
        found["judge/lc_win_rate"] = LengthControlled(
            f"win rate over {opponent} by {judge.model}, length-controlled", pairs
        )
    return found, counts, usage


@dataclass(frozen=True)
class Verdicts:
    """What a judge said of pairs of answers."""

    orders: dict[int, tuple[float, float]]
    """Number of the pair -> our result with our answer first, and with it second: 1 won, 0 lost, 0.5 a tie. Pairs with
    an unreadable reply are left out."""
    settled: dict[int, tuple[float, bool]]
    """Number of the pair -> our result over both orders, and whether they agree."""
    identical: int
    """Number of pairs with identical answers: they are ties, and not sent to the judge."""
    first: int
    """How many of the readable verdicts were for the answer shown first."""
    second: int

    @property
    def counts(self) -> dict[str, Any]:
        """The numbers for the report."""
        return {
            "win": sum(result == 1 for result, _ in self.settled.values()),
            "tie": sum(result == 0.5 for result, _ in self.settled.values()),
            "lose": sum(result == 0 for result, _ in self.settled.values()),
            "inconsistent": sum(not consistent for _, consistent in self.settled.values()),
            "identical": self.identical,
            "asked": len(self.settled) - self.identical,
            "first": self.first,
            "second": self.second,
        }


def ask_both_orders(
    judge: Judge,
    server: ChatServer,
    ctx: StageContext,
    policy: str,
    prompts: Sequence[Messages],
    pairs: Sequence[tuple[str, str]],
) -> tuple[Verdicts, Usage]:
    """The verdicts on (our answer, theirs) to each prompt."""
    asking = [p for p, (own, other) in enumerate(pairs) if own.strip() != other.strip()]
    asked = []
    for p in asking:
        own, other = pairs[p]
        asked += [judging.pairwise(judge.language, prompts[p], a, b) for a, b in ((own, other), (other, own))]
    if identical := len(pairs) - len(asking):
        say(
            ctx,
            f"judge, {policy}: {identical:,} of {len(pairs):,} pairs of answers are identical; they are ties, and not"
            " sent",
        )
    with CountBar(ctx.console, f"{ctx.name}  judge, {policy}", "replies", len(asked)) as bar:
        verdicts, usage = server.ask(asked, judging.read_verdict, bar.advance)
    orders = {p: (0.5, 0.5) for p in range(len(pairs))}
    settled = {p: (0.5, True) for p in range(len(pairs))}
    for p, one, two in zip(asking, verdicts[::2], verdicts[1::2], strict=True):
        if one is None or two is None:
            del orders[p], settled[p]
        else:
            orders[p], settled[p] = (one, 1 - two), judging.settle(one, two)
    return Verdicts(orders, settled, identical, verdicts.count(1.0), verdicts.count(0.0)), usage


def _pointwise(
    judge: Judge, server: ChatServer, ctx: StageContext, questions: Sequence[Question], texts: dict[str, list[str]]
) -> tuple[dict[str, Found], Usage]:
    graded = {}
    usage = Usage()
    for policy, ours in texts.items():
        references = [None if question.target is None else question.target.text for question in questions]
        asked = [
            judging.pointwise(judge.language, question.record.prompt, own, reference)
            for question, own, reference in zip(questions, ours, references, strict=True)
        ]
        with CountBar(ctx.console, f"{ctx.name}  grades, {policy}", "replies", len(asked)) as bar:
            graded[policy], took = server.ask(asked, judging.read_grades, bar.advance)
        usage = usage + took
    read = [p for p in range(len(questions)) if all(grades[p] is not None for grades in graded.values())]
    found: dict[str, Found] = {}
    for name in judging.DIMENSIONS if read else ():
        values = {policy: np.array([(grades[p] or {})[name] for p in read]) for policy, grades in graded.items()}
        found[f"judge/{name}"] = Metric(f"{name} by {judge.model}, 1 to 10", values, within=(1.0, 10.0))
    return found, usage
