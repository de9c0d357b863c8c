"""Benchmarks and probes of an evaluation: every policy answers each prompt once, and a program grades the answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from align.data.answer_file import AnswerRow
from align.data.records import Message, Prompt
from align.data.sources.mixture import prompt_digest, read_records
from align.data.trees.prompts import EncodedPrompt
from align.errors import InputError, Problem
from align.evaluation.compare import Found, Metric
from align.evaluation.tasks.task import UNFINISHED, Grades, Task, open_task
from align.functional.intervals import SHARE
from align.recipe.kinds.tasks import FewShotTask
from align.recipe.schema import DataSource, EvaluateStage
from align.rollout.engine import Sampling, sample_seed
from align.scoring.scorer import Answer
from align.stages.context import StageContext
from align.stages.evaluate.held_out import Policy
from align.stages.shared.policy_samples import answer_row, sample_policy
from align.training.launch import Ranks


@dataclass(frozen=True)
class OpenedTask:
    """A task with its prompts."""

    task: Task[Any]
    prompts: tuple[Prompt, ...]


def open_tasks(spec: EvaluateStage, ctx: StageContext) -> list[OpenedTask]:
    """The recipe's benchmarks and probes, read. Raises InputError for bad rows, EnvironmentFault when a package is
    missing."""
    tasks = [open_task(one) for one in (*spec.asked, *spec.probe_tasks)]
    for task in tasks:
        task.require()
    return [OpenedTask(task, _prompts(task, ctx)) for task in tasks]


def _prompts(task: Task[Any], ctx: StageContext) -> tuple[Prompt, ...]:
    """The prompts that are asked, each after the worked examples if there are some."""
    rows = {key: _read(source, ctx) for key, source in task.spec.sources()}
    if isinstance(task.spec, FewShotTask) and "examples" in rows:
        return _with_examples(task, task.spec, rows["data"], rows["examples"])
    return tuple(rows["data"])


def _read(source: DataSource, ctx: StageContext) -> list[Prompt]:
    records = read_records([source], [ctx.resolve(source.path)], "prompt", seed=ctx.seed, rejects=None)
    return [cast(Prompt, record) for record in records]


def _with_examples(
    task: Task[Any], spec: FewShotTask, prompts: Sequence[Prompt], examples: Sequence[Prompt]
) -> tuple[Prompt, ...]:
    """The prompts with worked examples before each. Raises InputError when there are too few examples, or when one of
    them is among the prompts."""
    shown = examples[: spec.few_shot]
    assert spec.examples is not None
    if len(shown) < spec.few_shot:
        raise InputError(Problem(f"has {len(shown)} rows, few_shot asks for {spec.few_shot}", file=spec.examples.path))
    asked = {prompt_digest(prompt) for prompt in prompts}
    turns: list[Message] = []
    for example in shown:
        if prompt_digest(example) in asked:
            place = example.origin
            raise InputError(
                Problem("a worked example is among the problems that are asked", file=place.source, line=place.line)
            )
        turns.append({"role": "user", "content": example.prompt[-1]["content"]})
        turns.append({"role": "assistant", "content": task.solution(example)})
    return tuple(replace(prompt, prompt=(*turns, *prompt.prompt)) for prompt in prompts)


def run_task(
    opened: OpenedTask, spec: EvaluateStage, ctx: StageContext, policies: Sequence[Policy], group: Ranks
) -> tuple[dict[str, Found], list[AnswerRow]]:
    """Let every policy answer, and grade the answers: (metrics, the answers with their grades)."""
    answers = [_generate(opened, spec, ctx, policy, group) for policy in policies]
    if not group.first:
        return {}, []
    grades = [
        [opened.task.grade(prompt, answer.text) for prompt, answer in zip(opened.prompts, own, strict=True)]
        for own in answers
    ]
    found: dict[str, Found] = {}
    for measure in opened.task.measures:
        counts = np.array([one[measure.key][1] for one in grades[0]])
        values = {
            policy.name: np.array([one[measure.key][0] for one in own])
            for policy, own in zip(policies, grades, strict=True)
        }
        found[f"{opened.task.name}/{measure.key}"] = Metric(
            measure.title, values, counts if (counts != 1).any() else None, within=measure.within
        )
    cut = {
        policy.name: np.array([not answer.finished for answer in own], dtype=np.float64)
        for policy, own in zip(policies, answers, strict=True)
    }
    found[f"{opened.task.name}/{UNFINISHED.key}"] = Metric(f"{opened.task.name}, {UNFINISHED.title}", cut, within=SHARE)
    return found, list(_answer_rows(opened, policies, answers, grades))


def _generate(opened: OpenedTask, spec: EvaluateStage, ctx: StageContext, policy: Policy, group: Ranks) -> list[Answer]:
    """The answers of a policy in the mode :class:`~align.evaluation.tasks.task.Generate`, one to each prompt."""
    mode = opened.task.mode
    prompts = [
        EncodedPrompt(one, tuple(policy.encoder.encode_prompt(one.prompt, one.tools).tolist()))
        for one in opened.prompts
    ]
    drawn = sample_policy(
        spec.rollout,
        policy.model,
        policy.encoder,
        prompts,
        Sampling(mode.max_new_tokens, temperature=mode.temperature, seed=sample_seed(ctx.seed, 1)),
        ctx,
        group,
        max_length=max(len(prompt.ids) for prompt in prompts) + mode.max_new_tokens,
        name=f"{ctx.name}  {opened.task.name}, {policy.name}",
    )
    return [own[0] for own in drawn]


def _answer_rows(
    opened: OpenedTask,
    policies: Sequence[Policy],
    answers: Sequence[Sequence[Answer]],
    grades: Sequence[Sequence[Grades]],
) -> Iterator[AnswerRow]:
    for p, prompt in enumerate(opened.prompts):
        for k, policy in enumerate(policies):
            counts = {name: float(count) for name, (count, _) in grades[k][p].items()}
            yield answer_row(opened.task.name, prompt.id, policy.name, 0, answers[k][p], counts)
