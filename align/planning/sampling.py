"""The plans of the stages that sample for the rows of their data and do not train."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from align.pipeline.folder import RunFolder
from align.planning import reward_bench
from align.planning.data_size import conversations
from align.planning.planner import Check, DataSize, Derived, Faults, Planner, PlanRow, ToPlan
from align.planning.requirements import require_key, require_package, require_server
from align.recipe.kinds.tasks import AskedTask, RewardBenchTask
from align.recipe.load import LoadedRecipe
from align.recipe.schema import DataSource, EvaluateStage, SelfContrastStage
from align.sizing import needs
from align.sizing.needs import duration


def _sampled(stage: ToPlan, policies: int) -> Iterator[PlanRow]:
    """Rows about prompts, samples and time of a stage that samples from each of ``policies`` policies."""
    spec, origin, machine = stage.spec, stage.origin, stage.machine
    data = conversations(stage.loaded, stage.name, stage.run)
    if data.examples is None:
        yield PlanRow("prompts, samples, time", "unknown", data.source)
        return
    samples = data.examples * spec.samples_per_prompt * policies
    tokens = samples * spec.max_new_tokens
    yield PlanRow("prompts", f"{data.examples:,}", data.source)
    each = f"samples_per_prompt {spec.samples_per_prompt}" + (
        f" from each of {policies} policies" if policies > 1 else ""
    )
    yield PlanRow("samples", f"{samples:,}", each)
    yield PlanRow("sampled tokens", f"{tokens:,} at most", f"max_new_tokens {spec.max_new_tokens:,}")
    if origin.shape is not None:
        speed = needs.sampled_tokens_per_second(origin.shape, device=machine.device, units=machine.units)
        assumed = f"{needs.assumed_speed(machine.device)} x {machine.units}"
        words = f"estimate for sampling: {speed:,.0f} tokens/s (assumed: {assumed}); loading and embedding come on top"
        yield PlanRow("time", f"about {duration(tokens / speed)} at most", words)


class SelfContrastPlanner(Planner):
    """Plans Self-Contrast."""

    def plan(self, stage: ToPlan) -> Derived:
        """See :meth:`Planner.plan`."""
        return Derived((PlanRow("samples from", stage.origin.name, stage.origin.source), *_sampled(stage, 1)))

    def makes(self, loaded: LoadedRecipe, name: str, run: RunFolder) -> DataSize | None:
        """See :meth:`Planner.makes`."""
        data, spec = conversations(loaded, name, run), loaded.recipe.stages[name]
        assert isinstance(spec, SelfContrastStage)
        if data.examples is None or data.tokens is None:
            return None
        each = f"{spec.negatives} rejected answers of {spec.max_new_tokens:,} tokens"
        rejected = data.examples * spec.negatives * spec.max_new_tokens
        return DataSize(
            f"at most: a preference for each conversation of {name}, {each}",
            examples=data.examples,
            tokens=data.tokens + rejected,
        )


class EvaluatePlanner(Planner):
    """Plans an evaluation."""

    def plan(self, stage: ToPlan) -> Derived:
        """See :meth:`Planner.plan`."""
        spec: EvaluateStage = stage.spec
        sampled = () if spec.data is None else _sampled(stage, len(spec.policies))
        return Derived((*sampled, *reward_bench.rows(stage.loaded, spec, stage.run)))

    def needs(self, spec: EvaluateStage) -> Iterator[tuple[str, Check]]:
        """See :meth:`Planner.needs`."""
        from align.evaluation.tasks.lm_eval import require_harness

        if spec.lm_eval_tasks:
            yield "lm_eval_tasks", require_harness
        for i, task in enumerate(spec.tasks):
            if isinstance(task, AskedTask):
                yield f"tasks.{i}.task", partial(_require, task)
        judge = spec.judge
        if judge is not None:
            yield "judge", lambda: require_package("httpx", "a judge needs", "pip install 'alignkit[eval]'")
            yield "judge.key_env", lambda: require_key(judge)
            yield "judge.endpoint", lambda: require_server(judge.endpoint)

    def looks_at(self, spec: EvaluateStage) -> Iterator[tuple[str, DataSource, Faults]]:
        """See :meth:`Planner.looks_at`."""
        for i, task in enumerate(spec.tasks):
            if isinstance(task, RewardBenchTask):
                yield f"tasks.{i}.data", task.data, partial(reward_bench.bench_faults, spec.judge, task.data)


def _require(spec: AskedTask) -> None:
    """Raises where the machine lacks what a task needs, or its code cannot be imported."""
    from align.evaluation.tasks.task import open_task

    open_task(spec).require()
