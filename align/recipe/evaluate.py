"""Comparing policies on held-out data, benchmarks and probes."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from align.recipe.base import ArtifactType, Data, PolicyRef, Stage
from align.recipe.contrast import QUICKSTART_EMBEDDER, EmbedderRef
from align.recipe.effects import Needs
from align.recipe.judge import Judge
from align.recipe.rollout import Rollout
from align.recipe.scoring import Scoring
from align.recipe.tasks import Benchmark


class EvaluateStage(Stage):
    """Compares policies with the first one: on held-out conversations (how likely the data's answers are) or prompts, by scorers and a
    judge, on benchmarks and probes. Means over prompts with 95 % intervals."""

    produces: ClassVar[ArtifactType] = "metrics"
    implementation: ClassVar[str] = "align.stages.evaluate:run"
    neutral: ClassVar[tuple[str, ...]] = (
        *("judge.timeout_s", "judge.retries", "judge.requests_at_once"),
        *("judge.price_input", "judge.price_output"),  # accounting: `--force` tells the cost by other prices, and asks nothing anew
    )
    key_needs: ClassVar[tuple[Needs, ...]] = (
        Needs(
            "samples_per_prompt temperature max_new_tokens max_length embedder scorers judge",
            lambda stage: stage.data,
            "without `data`: the prompts whose answers they look at",
        ),
        Needs("rollout", lambda stage: stage.data or stage.tasks or stage.probes, "where only lm_eval_tasks are run"),
        Needs("own_names", lambda stage: "identity" in stage.probes, "without the probe identity"),
    )

    kind: Literal["evaluate"]
    """`evaluate`"""
    policies: list[PolicyRef] = Field(min_length=1)
    """The policies, the one that the others are compared with first. For log-probs of targets all have the same tokenizer and template."""
    data: Data | None = None
    """Held-out conversations: the last assistant message is the target, what precedes it the prompt. Or prompts: what needs a target is
    then left out."""
    samples_per_prompt: int = Field(default=4, ge=1)
    """Answers sampled for each prompt of `data` from each policy."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature. Log-probs are always those at 1."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Longest sample, in tokens."""
    max_length: int = Field(default=2048, ge=2)
    """Longest prompt with its target, and with `max_new_tokens` more; prompts that do not fit are left out and counted."""
    embedder: EmbedderRef | None = QUICKSTART_EMBEDDER
    """A sentence-transformers model that says how similar a sample is to the target; `null` leaves that out."""
    scorers: list[Scoring] = Field(default=[])
    """Scorers of the samples. Each gives its mean, and win rates against the first policy and against the target, as they are and at equal
    length."""
    judge: Judge | None = None
    """A language model that judges the first sample of each prompt."""
    tasks: list[Benchmark] = Field(default=[])
    """Benchmarks."""
    probes: list[Literal["identity", "json"]] = Field(default=[])
    """Small sets of prompts that come with the package. `identity`: does the policy claim to be another company's assistant? `json`: does
    it write JSON, and nothing else, when asked to?"""
    own_names: list[Annotated[str, Field(min_length=1)]] = Field(default=[])
    """Only for the probe `identity`: names that the policy may go by, of itself and of who made it."""
    lm_eval_tasks: list[Annotated[str, Field(min_length=1)]] = Field(default=[])
    """Tasks of lm-evaluation-harness, which is handed each policy, if it is installed (extra `eval`)."""
    rollout: Rollout = Rollout()
    """The engine that samples."""

    @model_validator(mode="after")
    def _consistent(self) -> EvaluateStage:
        if self.max_new_tokens >= self.max_length:
            raise ValueError(f"max_new_tokens {self.max_new_tokens} leaves no room for a prompt in max_length {self.max_length}")
        benchmarks = [task.task for task in self.tasks]
        for names in (self.policies, benchmarks, self.probes, self.lm_eval_tasks):
            twice = [name for i, name in enumerate(names) if name in names[:i]]
            if twice:
                raise ValueError(f"{twice[0]} is named twice")
        if not (self.data or self.tasks or self.probes or self.lm_eval_tasks):
            raise ValueError("nothing to evaluate on: needs `data`, `tasks`, `probes` or `lm_eval_tasks`")
        if self.judge and self.judge.methods == ["pairwise"] and self.judge.against == "baseline" and len(self.policies) == 1:
            raise ValueError("a single policy has nobody to be compared with: `judge.against: target`, or `judge.methods: [pointwise]`")
        return self
