"""Comparing policies on held-out data, benchmarks and probes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from align.recipe.blocks.base import ArtifactType, Data, DataSource, PolicyRef, RecordType, RowLimits, Stage
from align.recipe.blocks.rollout import AutoRollout, RolloutChoice
from align.recipe.blocks.scoring import Scoring
from align.recipe.kinds import KINDS
from align.recipe.kinds.judge import Judge
from align.recipe.kinds.self_contrast import QUICKSTART_EMBEDDER, EmbedderRef
from align.recipe.kinds.tasks import AskedTask, ProbeTask, RewardBenchTask, TaskChoice, probe_task
from align.recipe.language.effects import Needs


class EvaluateStage(Stage):
    """Compares policies with the first one in the list: by the log-probs of the answers in held-out conversations, by
    scorers and a judge on their samples, and on benchmarks and probes. It also compares scorers and a judge with each
    other, on reward benchmarks. All results are means over prompts with 95 % intervals."""

    produces: ClassVar[ArtifactType] = "metrics"
    implementation: ClassVar[str] = "align.stages.evaluate.run:run"
    plan: ClassVar[str] = "align.planning.sampling:EvaluatePlanner"
    view: ClassVar[str] = "align.report.views.evaluate:EvaluateView"
    words: ClassVar[str] = KINDS["evaluate"].words
    starts_from: ClassVar[str] = "policies"
    reads: ClassVar[Mapping[str, RecordType]] = {"data": "prompt"}
    files: ClassVar[Mapping[str, str]] = {
        "rewardbench1.jsonl": "each pair of a reward benchmark with every scorer's scores and how they are counted",
        "rewardbench2.jsonl": "the same of RewardBench 2's prompts",
        "rmbench.jsonl": "the same of RM-Bench's",
        "judgebench.jsonl": "the same of JudgeBench's pairs",
    }
    neutral: ClassVar[tuple[str, ...]] = (
        *("judge.timeout_s", "judge.retries", "judge.requests_at_once"),
        # Prices only affect the reported cost; `--force` reports it anew without new requests
        *("judge.price_input", "judge.price_output"),
    )
    key_needs: ClassVar[tuple[Needs, ...]] = (
        Needs(
            "samples_per_prompt temperature max_new_tokens max_length embedder",
            lambda stage: stage.data,
            "without `data`: the prompts whose answers they look at",
        ),
        Needs(
            "scorers judge",
            lambda stage: stage.data or stage.reward_benches,
            "without `data`, the prompts whose answers they look at, or a task reward_bench, which measures them",
        ),
        Needs(
            "judge.against", lambda stage: stage.data, "without `data`: a benchmark's pairs have their own opponents"
        ),
        Needs(
            "policies rollout",
            lambda stage: stage.data or stage.asked or stage.probes or stage.lm_eval_tasks or not stage.reward_benches,
            "where only reward_bench tasks are run: they measure `scorers` and `judge`",
        ),
        Needs("rollout", lambda stage: stage.data or stage.tasks or stage.probes, "where only lm_eval_tasks are run"),
        Needs("own_names", lambda stage: "identity" in stage.probes, "without the probe identity"),
    )

    kind: Literal["evaluate"]
    """`evaluate`"""
    policies: list[PolicyRef] = Field(default=[])
    """The policies; the others are compared with the first. For log-probs of targets, all must have the same tokenizer
    and template. Required except for tasks `reward_bench`."""
    data: Data | None = None
    """Held-out conversations: the last assistant message is the target, and all messages before it are the prompt. Or
    prompts: metrics that need a target are then left out."""
    samples_per_prompt: int = Field(default=4, ge=1)
    """Answers sampled for each prompt of `data` from each policy."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature. Log-probs are always those at 1."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Longest sample, in tokens."""
    max_length: int = Field(default=2048, ge=2)
    """Longest prompt with its target, and with `max_new_tokens` more; prompts that do not fit are left out and
    counted."""
    embedder: EmbedderRef | None = QUICKSTART_EMBEDDER
    """A sentence-transformers model that says how similar a sample is to the target; `null` leaves that out."""
    scorers: list[Scoring] = Field(default=[])
    """Scorers of the samples. For each, the evaluation reports its mean score, and win rates against the first policy
    and against the target, plain and at equal length. Tasks `reward_bench` measure these scorers."""
    judge: Judge | None = None
    """A language model that judges the first sample of each prompt. Tasks `reward_bench` measure it too."""
    tasks: list[TaskChoice] = Field(default=[])
    """Benchmarks."""
    probes: list[Literal["identity", "json"]] = Field(default=[])
    """Small sets of test prompts that come with the package. `identity`: does the policy claim to be another company's
    assistant? `json`: does it write JSON, and nothing else, when asked to?"""
    own_names: list[Annotated[str, Field(min_length=1)]] = Field(default=[])
    """Only for the probe `identity`: names that the policy may give itself or its maker."""
    lm_eval_tasks: list[Annotated[str, Field(min_length=1)]] = Field(default=[])
    """Tasks of lm-evaluation-harness to run on each policy. The harness has to be installed (extra `eval`)."""
    rollout: RolloutChoice = AutoRollout()
    """The engine that samples."""

    @model_validator(mode="after")
    def _consistent(self) -> EvaluateStage:
        if self.max_new_tokens >= self.max_length:
            raise ValueError(
                f"max_new_tokens {self.max_new_tokens} leaves no room for a prompt in max_length {self.max_length}"
            )
        asked = [task.task for task in self.asked]
        copies = [f"reward_bench on {task.data.model_dump_json(exclude_defaults=True)}" for task in self.reward_benches]
        for names in (self.policies, asked, copies, self.probes, self.lm_eval_tasks):
            twice = [name for i, name in enumerate(names) if name in names[:i]]
            if twice:
                raise ValueError(f"{twice[0]} is named twice")
        if not (self.data or self.tasks or self.probes or self.lm_eval_tasks):
            raise ValueError("nothing to evaluate on: needs `data`, `tasks`, `probes` or `lm_eval_tasks`")
        if not self.policies and (self.data or self.asked or self.probes or self.lm_eval_tasks):
            raise ValueError("nobody to evaluate: needs `policies`")
        if self.reward_benches and not (self.scorers or self.judge):
            raise ValueError("reward_bench measures `scorers` and a `judge`: needs one of them")
        alone = len(self.policies) == 1 and self.data is not None
        if self.judge and self.judge.methods == ["pairwise"] and self.judge.against == "baseline" and alone:
            raise ValueError(
                "a single policy has nobody to be compared with: `judge.against: target`, or `judge.methods:"
                " [pointwise]`"
            )
        return self

    def sources(self) -> Iterator[tuple[str, DataSource, RecordType]]:
        """See :meth:`Stage.sources`. Benchmarks that policies answer have their own format of prompts."""
        yield from super().sources()
        for i, task in enumerate(self.tasks):
            if isinstance(task, AskedTask):
                for key, source in task.sources():
                    yield f"tasks.{i}.{key}", source, "prompt"

    def row_limits(self, key: str) -> RowLimits | None:
        """See :meth:`Stage.row_limits`. A benchmark makes its prompts of several rows."""
        return None if key.startswith("tasks.") else RowLimits(self.max_length, room=self.max_new_tokens)

    @property
    def asked(self) -> list[AskedTask]:
        """The benchmarks that policies answer."""
        return [task for task in self.tasks if isinstance(task, AskedTask)]

    @property
    def probe_tasks(self) -> list[ProbeTask]:
        """The probes, as tasks."""
        return [probe_task(name, self.own_names) for name in self.probes]

    @property
    def reward_benches(self) -> list[RewardBenchTask]:
        """The benchmarks of scorers and of the judge."""
        return [task for task in self.tasks if isinstance(task, RewardBenchTask)]
