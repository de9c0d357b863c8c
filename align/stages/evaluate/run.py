"""``kind: evaluate``: policies compared with the first of them, the baseline, on held-out data, benchmarks and probes;
and scorers with the first of them on reward benchmarks.

Every part returns metrics: for each policy one number for each item. At the end all of them are compared in the same
way: means with intervals, and differences from the baseline item by item.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from align import files
from align.data.answer_file import AnswerRow, write_answers
from align.evaluation.chat_server import key_of
from align.evaluation.compare import Found, LengthControlled, compare
from align.evaluation.metrics import metrics_of, per_prompt
from align.evaluation.reward_bench.items import LONGER
from align.evaluation.table import table
from align.evaluation.tasks.lm_eval import require_harness, run_tasks
from align.functional.intervals import around
from align.models.load import is_adapter, load_encoder, locate, whole_folder
from align.recipe.schema import EvaluateStage
from align.scoring.embeddings import SentenceEmbedder, find_embedder
from align.stages.context import StageContext
from align.stages.evaluate import held_out, reward_bench, tasks
from align.stages.evaluate.held_out import Policy, Question, say
from align.stages.evaluate.judge import judge_samples
from align.stages.evaluate.scorers import score_samples
from align.training.launch import Ranks, ranks

NO_TARGETS = (
    "the data have no answers: margin, log-probs and loss of targets, similarity and win rates over targets are"
    " left out"
)


class EvaluationResult:
    """The results of the parts of an evaluation so far."""

    def __init__(self) -> None:
        self.metrics: dict[str, Found] = {}
        self.benches: dict[str, Found] = {}
        """Metrics of scorers and of the judge on reward benchmarks."""
        self.others: dict[str, dict[str, dict[str, Any]]] = {}
        """Metrics whose numbers for single items are unknown: ``{metric: {policy: {mean, low, high, count}}}``."""
        self.answers: list[AnswerRow] = []
        """The answers of all policies to all prompts, for ``answers.jsonl``."""
        self.about: dict[str, Any] = {}
        self.warnings: list[str] = []


def run(spec: EvaluateStage, ctx: StageContext) -> None:
    """Run each part that the recipe asks for, then compare."""
    group = ranks()
    if spec.judge is not None:
        key_of(spec.judge)
    if spec.lm_eval_tasks:
        require_harness()
    benches = reward_bench.open_benches(spec, ctx)
    asked = tasks.open_tasks(spec, ctx)
    embedder = find_embedder(ctx.resolve(spec.embedder)) if spec.data and spec.embedder and group.first else None
    policies = [_policy(name, ctx) for name in spec.policies]
    if policies:
        ctx.encoder_digest = policies[0].encoder.digest
    found = EvaluationResult()
    if spec.data is not None:
        _on_data(
            spec,
            ctx,
            policies,
            found,
            group,
            None if embedder is None else SentenceEmbedder(embedder, device=group.device),
        )
    for task in asked:
        metrics, answers = tasks.run_task(task, spec, ctx, policies, group)
        found.metrics |= metrics
        found.answers += answers
    for bench in benches:
        _on_bench(bench, spec, ctx, found, group)
    if group.first:
        if spec.lm_eval_tasks:
            _with_harness(spec, ctx, policies, found, group)
        _report(spec, ctx, found)


def _policy(name: str, ctx: StageContext) -> Policy:
    model = ctx.policy(name)
    return Policy(name, model, load_encoder(model, cache=ctx.cache))


def _on_data(
    spec: EvaluateStage,
    ctx: StageContext,
    policies: Sequence[Policy],
    found: EvaluationResult,
    group: Ranks,
    embedder: SentenceEmbedder | None,
) -> None:
    """Sample every policy on the held-out prompts, and compute all measures of the samples."""
    questions, report = held_out.read_questions(spec, ctx, policies, group)
    for line in report.lines():
        ctx.console.print(line, highlight=False, markup=False, soft_wrap=True)
    targets = questions[0].target is not None
    if not targets:
        found.warnings.append(NO_TARGETS)
    samples = held_out.sample_questions(spec, ctx, policies, questions, group)
    logprobs = (
        [held_out.logprobs_of(ctx, policy, questions, samples[0], group) for policy in policies] if targets else None
    )
    scored, by_scorer = score_samples(spec, ctx, policies, questions, samples, group)
    if not group.first:
        return
    measured = held_out.measure(ctx, policies, questions, samples, logprobs)
    found.about |= {"prompts": len(questions), "samples_per_prompt": spec.samples_per_prompt, "data": report.as_json()}
    if embedder is not None and targets:
        cosines, cut = held_out.similarities(ctx, embedder, questions, samples)
        found.about |= {"texts_cut_by_embedder": cut, "embedder_max_tokens": embedder.max_tokens}
        for k, one in enumerate(measured):
            assert one.targets is not None
            measured[k] = replace(one, targets=replace(one.targets, similarities=cosines[k]))
    metrics = {**metrics_of({policy.name: one for policy, one in zip(policies, measured, strict=True)}), **scored}
    _write_prompts(ctx, policies, questions, metrics)
    found.answers += held_out.answer_rows(policies, questions, samples, by_scorer)
    found.metrics |= metrics
    if spec.judge is not None:
        judged, took, warnings = judge_samples(spec.judge, ctx, policies, questions, samples)
        found.metrics |= judged
        found.about["judge"] = took
        found.warnings += warnings


def _on_bench(
    opened: reward_bench.Opened, spec: EvaluateStage, ctx: StageContext, found: EvaluationResult, group: Ranks
) -> None:
    measured = reward_bench.measure(opened, spec, ctx, group)
    if measured is not None:
        found.benches |= measured.metrics
        found.about.setdefault("benches", {})[opened.name] = measured.about
        found.warnings += measured.warnings


def _with_harness(
    spec: EvaluateStage, ctx: StageContext, policies: Sequence[Policy], found: EvaluationResult, group: Ranks
) -> None:
    """Evaluate each policy with lm-evaluation-harness, which gives means with standard errors but no numbers for single
    items."""
    for policy in policies:
        say(ctx, f"lm-evaluation-harness: {', '.join(spec.lm_eval_tasks)} with {policy.name}")
        adapter = locate(policy.model) if is_adapter(policy.model) else None
        folder = whole_folder(policy.model, ctx.cache)
        results = run_tasks(folder, adapter, spec.lm_eval_tasks, device=str(group.device), seed=ctx.seed)
        for metric, entry in results.items():
            mean = entry["mean"]
            low, high = around(mean, entry["stderr"]) if "stderr" in entry else (None, None)
            numbers = {"mean": mean, "low": low, "high": high, "count": None}
            found.others.setdefault(f"lm-eval/{metric}", {})[policy.name] = numbers


def _report(spec: EvaluateStage, ctx: StageContext, found: EvaluationResult) -> None:
    """Write ``report.json``, set the stage's headline numbers, and print the table."""
    scorers = _measured_by(found.benches)
    baseline = next(iter((*spec.policies, *scorers)), "")
    compared = {
        **compare(found.metrics, baseline, seed=ctx.seed),
        **(compare(found.benches, scorers[0], seed=ctx.seed) if scorers else {}),
    }
    result: dict[str, Any] = {
        "baseline": baseline,
        # In the order of the recipe, which is lost where JSON is written with sorted keys.
        "policies": list(spec.policies),
        **({"scorers": scorers, "control": LONGER} if scorers else {}),
        "measures": [*found.metrics, *found.benches, *found.others],
        **found.about,
        "metrics": {**compared, **found.others},
        "words": {name: metric.words for name, metric in (found.metrics | found.benches).items()},
        "warnings": found.warnings,
    }
    if found.answers:
        write_answers(ctx.out, found.answers)
    files.write_json(ctx.out / "report.json", result)
    untold = ("words", "data", "policies", "scorers", "control", "measures", "benches", "embedder_max_tokens")
    ctx.note({key: value for key, value in result.items() if key not in untold})
    ctx.console.print(table(ctx.name, result))
    for warning in found.warnings:
        say(ctx, f"note: {warning}")


def _measured_by(benches: Mapping[str, Found]) -> list[str]:
    """Scorers and judges in the order in which they were measured, the control last."""
    measured = [metric for metric in benches.values() if not isinstance(metric, LengthControlled)]
    return list(dict.fromkeys(who for metric in measured for who in metric.values))


def _write_prompts(
    ctx: StageContext,
    policies: Sequence[Policy],
    questions: Sequence[Question],
    metrics: dict[str, Found],
) -> None:
    """Write ``data.jsonl``: each prompt with every policy's numbers, for programs."""
    numbers = per_prompt(metrics)
    with files.atomic_lines(ctx.out / "data.jsonl") as write:
        for p, question in enumerate(questions):
            of: dict[str, Any] = {}
            for policy in policies:
                of[policy.name] = {
                    name: round(of_policy[policy.name][p], 6)
                    for name, of_policy in numbers.items()
                    if policy.name in of_policy
                }
            target = {} if question.target is None else {"target": question.target.text}
            write({"id": question.record.id, "prompt": list(question.record.prompt), **target, "policies": of})
