"""Comparing policies on held-out data."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from align.recipe.base import ArtifactType, Data, PolicyRef, Stage
from align.recipe.contrast import QUICKSTART_EMBEDDER, EmbedderRef
from align.recipe.rollout import Rollout


class EvaluateStage(Stage):
    """Compares policies with the first one on held-out conversations: how likely the data's answers are, and how their own samples look.
    Means over prompts with 95 % intervals."""

    produces: ClassVar[ArtifactType] = "metrics"
    implementation: ClassVar[str] = "align.stages.evaluate:run"

    kind: Literal["evaluate"]
    """`evaluate`"""
    policies: list[PolicyRef] = Field(min_length=1)
    """The policies, the one that the others are compared with first. All have the same tokenizer and template."""
    data: Data
    """Held-out conversations. The last assistant message is the target, what precedes it the prompt."""
    samples_per_prompt: int = Field(default=4, ge=1)
    """Answers sampled for each prompt from each policy."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature. Log-probs are always those at 1."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Longest sample, in tokens."""
    max_length: int = Field(default=2048, ge=2)
    """Longest prompt with its target, and with `max_new_tokens` more; prompts that do not fit are left out and counted."""
    embedder: EmbedderRef = QUICKSTART_EMBEDDER
    """A sentence-transformers model that says how similar a sample is to the target."""
    rollout: Rollout = Rollout()
    """The engine that samples."""

    @model_validator(mode="after")
    def _consistent(self) -> EvaluateStage:
        if self.max_new_tokens >= self.max_length:
            raise ValueError(f"max_new_tokens {self.max_new_tokens} leaves no room for a prompt in max_length {self.max_length}")
        twice = [name for i, name in enumerate(self.policies) if name in self.policies[:i]]
        if twice:
            raise ValueError(f"{twice[0]} is named twice")
        return self
