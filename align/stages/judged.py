"""Samples of an evaluation under a judge: the first sample of each prompt, pairwise or with grades."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from align.evaluation import judge as judging
from align.evaluation.chat_server import ChatServer, Usage
from align.evaluation.compare import Found, LengthControlled, Metric
from align.recipe.judge import Judge
from align.rollout.progress import Bar
from align.stages.context import StageContext
from align.stages.held_out import Policy, Question, Samples

_NO_TARGET = "the judge has nothing to compare with: the data have no answers"


def judge_samples(
    judge: Judge, ctx: StageContext, policies: Sequence[Policy], questions: Sequence[Question], samples: Samples
) -> tuple[dict[str, Found], dict[str, Any], list[str]]:
    """(metrics, what it took, warnings). Raises as :meth:`align.evaluation.chat_server.ChatServer.ask`."""
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
        if "pointwise" in judge.methods:
            metrics, took = _pointwise(judge, server, ctx, questions, texts)
            found, usage = {**found, **metrics}, usage + took
    finally:
        server.close()
    about |= {key: value for key, value in vars(usage).items() if key != "from_cache"}  # which does not belong to the result
    if (cost := usage.cost(judge)) is not None:
        about["cost"] = round(cost, 6)
    if usage.unreadable:
        warnings.append(f"{usage.unreadable} of the judge's replies could not be read; their prompts are left out")
    return found, about, warnings


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
        asked = []
        for question, own, other in zip(questions, ours, theirs, strict=True):
            asked += [judging.pairwise(judge.language, question.prompt, a, b) for a, b in ((own, other), (other, own))]
        with Bar(ctx.console, f"{ctx.name}  judge, {policy}", "replies", len(asked)) as bar:
            verdicts, took = server.ask(asked, judging.read_verdict, bar.advance)
        usage = usage + took
        first, second = verdicts[::2], verdicts[1::2]
        read = [p for p, (one, two) in enumerate(zip(first, second, strict=True)) if one is not None and two is not None]
        settled = [judging.settle(float(first[p] or 0.0), float(second[p] or 0.0)) for p in read]
        counts[policy] = {
            "win": sum(result == 1 for result, _ in settled),
            "tie": sum(result == 0.5 for result, _ in settled),
            "lose": sum(result == 0 for result, _ in settled),
            "inconsistent": sum(not consistent for _, consistent in settled),
        }
        if read:
            results[policy] = np.array([result for result, _ in settled])
            longer = np.array([float(len(ours[p]) - len(theirs[p])) for p in read])
            pairs[policy] = np.stack([results[policy], longer], axis=-1)[:, None, :]
    found: dict[str, Found] = {}
    if results:
        found["judge/win_rate"] = Metric(f"win rate over {opponent} by {judge.model}, both orders", results, paired=False)
        found["judge/lc_win_rate"] = LengthControlled(f"win rate over {opponent} by {judge.model}, length-controlled", pairs)
    return found, counts, usage


def _pointwise(
    judge: Judge, server: ChatServer, ctx: StageContext, questions: Sequence[Question], texts: dict[str, list[str]]
) -> tuple[dict[str, Found], Usage]:
    graded = {}
    usage = Usage()
    for policy, ours in texts.items():
        references = [None if question.target is None else question.target.text for question in questions]
        asked = [
            judging.pointwise(judge.language, question.prompt, own, reference)
            for question, own, reference in zip(questions, ours, references, strict=True)
        ]
        with Bar(ctx.console, f"{ctx.name}  grades, {policy}", "replies", len(asked)) as bar:
            graded[policy], took = server.ask(asked, judging.read_grades, bar.advance)
        usage = usage + took
    read = [p for p in range(len(questions)) if all(grades[p] is not None for grades in graded.values())]
    found: dict[str, Found] = {}
    for name in judging.DIMENSIONS if read else ():
        values = {policy: np.array([(grades[p] or {})[name] for p in read]) for policy, grades in graded.items()}
        found[f"judge/{name}"] = Metric(f"{name} by {judge.model}, 1 to 10", values)
    return found, usage
