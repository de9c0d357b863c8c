"""Benchmarks and probes of an evaluation: every policy answers each prompt once, and a program grades the answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from align.data.answer_file import AnswerRow
from align.data.records import Message, Prompt
from align.data.sources.mixture import prompt_digest, read_records
from align.data.trees.prompts import EncodedPrompt
from align.errors import InputError, Problem
from align.evaluation.compare import Found, Metric
from align.evaluation.tasks import gsm8k, ifeval, probes
from align.functional.intervals import SHARE
from align.recipe.kinds.tasks import AskedTask, Gsm8kTask
from align.recipe.schema import DataSource, EvaluateStage
from align.rollout.engine import Sampling, sample_seed
from align.scoring.scorer import Answer
from align.stages.context import StageContext
from align.stages.evaluate.held_out import Policy
from align.stages.shared.policy_samples import answer_row, sample_policy
from align.training.launch import Ranks

Grades = dict[str, tuple[float, float]]
"""Metric -> (points, points possible) of one answer."""

_PROBE_TOKENS = 256


@dataclass(frozen=True)
class Exam:
    """The prompts of a benchmark or probe, and the function that grades answers to them."""

    name: str
    words: dict[str, str]
    """Metric -> its name in tables."""
    prompts: tuple[Prompt, ...]
    grade: Callable[[Prompt, str], Grades]
    max_new_tokens: int
    temperature: float = 0.0


def open_exams(spec: EvaluateStage, ctx: StageContext) -> list[Exam]:
    """The recipe's benchmarks and probes, read. Raises InputError for bad rows, EnvironmentFault when a package is
    missing."""
    if any(task.task == "ifeval" for task in spec.asked):
        ifeval.checkers()
    return [*(_benchmark(task, ctx) for task in spec.asked), *(_probe(probe, spec, ctx) for probe in spec.probes)]


def _benchmark(task: AskedTask, ctx: StageContext) -> Exam:
    module = {"ifeval": ifeval, "gsm8k": gsm8k}[task.task]
    form = f"{module.__name__}:as_prompt"
    prompts = _read(task.data, form, ctx)
    if isinstance(task, Gsm8kTask) and task.examples is not None:
        prompts = _with_examples(prompts, _read(task.examples, form, ctx), task)
    return Exam(task.task, module.WORDS, tuple(prompts), module.grade, task.max_new_tokens, task.temperature)


def _probe(probe: probes.Probe, spec: EvaluateStage, ctx: StageContext) -> Exam:
    def grade(prompt: Prompt, answer: str) -> Grades:
        return probes.grade(probe, prompt, answer, spec.own_names)

    source = DataSource(path=str(probes.file_of(probe)))
    return Exam(f"probe-{probe}", probes.WORDS[probe], tuple(_read(source, None, ctx)), grade, _PROBE_TOKENS)


def _read(source: DataSource, form: str | None, ctx: StageContext) -> list[Prompt]:
    """Read the prompts of a source. ``form`` names a function of this package that makes a prompt of a row, if the rows
    need one."""
    location = ctx.resolve(source.path)
    named = source if form is None else source.model_copy(update={"format": form})
    records = list(read_records([named], [location], "prompt", seed=ctx.seed, rejects=None))
    return [cast(Prompt, record) for record in records]


def _with_examples(prompts: Sequence[Prompt], examples: Sequence[Prompt], task: Gsm8kTask) -> list[Prompt]:
    """The prompts with worked examples before each. Raises InputError when there are too few examples, or when one of
    them is among the prompts."""
    shown = examples[: task.few_shot]
    assert task.examples is not None
    if len(shown) < task.few_shot:
        raise InputError(Problem(f"has {len(shown)} rows, few_shot asks for {task.few_shot}", file=task.examples.path))
    asked = {prompt_digest(prompt) for prompt in prompts}
    for example in shown:
        if prompt_digest(example) in asked:
            place = example.origin
            raise InputError(
                Problem("a worked example is among the problems that are asked", file=place.source, line=place.line)
            )
    turns = tuple(cast(Message, turn) for example in shown for turn in gsm8k.worked_example(example))
    return [replace(prompt, prompt=(*turns, *prompt.prompt)) for prompt in prompts]


def sit(
    exam: Exam, spec: EvaluateStage, ctx: StageContext, policies: Sequence[Policy], group: Ranks
) -> tuple[dict[str, Found], list[AnswerRow]]:
    """Let every policy answer, and grade the answers: (metrics, the answers with their grades)."""
    answers: list[list[Answer]] = []
    finished = []
    for policy in policies:
        prompts = [
            EncodedPrompt(one, tuple(policy.encoder.encode_prompt(one.prompt, one.tools).tolist()))
            for one in exam.prompts
        ]
        drawn = sample_policy(
            spec.rollout,
            policy.model,
            policy.encoder,
            prompts,
            Sampling(exam.max_new_tokens, temperature=exam.temperature, seed=sample_seed(ctx.seed, 1)),
            ctx,
            group,
            max_length=max(len(prompt.ids) for prompt in prompts) + exam.max_new_tokens,
            name=f"{ctx.name}  {exam.name}, {policy.name}",
        )
        answers.append([own[0] for own in drawn])
        finished.append(np.array([own[0].finished for own in drawn], dtype=np.float64))
    if not group.first:
        return {}, []
    grades = [
        [exam.grade(prompt, answer.text) for prompt, answer in zip(exam.prompts, own, strict=True)] for own in answers
    ]
    found: dict[str, Found] = {}
    for metric, words in exam.words.items():
        counts = np.array([one[metric][1] for one in grades[0]])
        values = {
            policy.name: np.array([one[metric][0] for one in own]) for policy, own in zip(policies, grades, strict=True)
        }
        found[f"{exam.name}/{metric}"] = Metric(words, values, counts if (counts != 1).any() else None, within=SHARE)
    cut = {policy.name: 1 - one for policy, one in zip(policies, finished, strict=True)}
    found[f"{exam.name}/unfinished"] = Metric(f"{exam.name}, answers that never end", cut, within=SHARE)
    return found, list(_answer_rows(exam, policies, answers, grades))


def _answer_rows(
    exam: Exam, policies: Sequence[Policy], answers: Sequence[Sequence[Answer]], grades: Sequence[Sequence[Grades]]
) -> Iterator[AnswerRow]:
    for p, prompt in enumerate(exam.prompts):
        for k, policy in enumerate(policies):
            counts = {name: float(count) for name, (count, _) in grades[k][p].items()}
            yield answer_row(exam.name, prompt.id, policy.name, 0, answers[k][p], counts)
