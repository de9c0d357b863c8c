"""The keys of the stages that sample from a policy and score the answers, to select prompts or to make preferences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from align.recipe.blocks.base import ArtifactType, Data, PolicyRef, RecordType, RowLimits, Stage
from align.recipe.blocks.rollout import AutoRollout, RolloutChoice
from align.recipe.blocks.scoring import Scoring, pattern
from align.recipe.kinds import KINDS

UNANSWERABLE = (
    r"^[\W\d_]*$",  # nothing but digits and punctuation
    r"https?://\S",
    r"(?i)\b(attached|uploaded) (file|document|image|picture|photo|pdf|spreadsheet|screenshot)",
    r"(?i)\b(in|see|watch|describe|open) (the|this|that) (attachment|image|picture|photo|video|screenshot|link)\b",
    r"(?i)\b(today['’]s|the latest|the current) (weather|news|exchange rate|stock price)",
    r"(?i)\bwhat (time|date) is it\b",
    r"见附件|附件中|如图|图中|这张(图|照片|截图)|这个(链接|视频)",
    r"现在几点|今天(的)?(天气|新闻|股价|汇率)",
)
"""Patterns of prompts that no language model can answer from text alone: about a file, a picture, a link, or the
current day."""


class SamplingStage(Stage):
    """The keys that these stages share."""

    reads: ClassVar[Mapping[str, RecordType]] = {"prompts": "prompt"}
    always_samples: ClassVar[bool] = True
    files: ClassVar[Mapping[str, str]] = {
        "left_out.jsonl": "what is not in the result, and why",
    }

    policy: PolicyRef | None = None
    """The model that answers; the recipe's `model` when absent."""
    reward: Scoring
    """The scorer of its answers."""
    prompts: Data
    """Prompts: one source, or a list. Preferences and conversations serve as prompts too."""
    samples_per_prompt: int = Field(default=4, ge=2)
    """Answers that are sampled for each prompt."""
    max_new_tokens: int = Field(default=512, ge=1)
    """Longest answer, in tokens."""
    temperature: float = Field(default=1.0, gt=0)
    """Logits are divided by it before sampling."""
    max_length: int = Field(default=2048, ge=2)
    """Longest prompt with its answer, in tokens. Prompts that do not leave room for `max_new_tokens` are dropped."""
    unfinished: Literal["keep", "drop"] = "keep"
    """Whether answers that were cut at `max_new_tokens` count."""
    rollout: RolloutChoice = AutoRollout()
    """The engine that samples."""

    def row_limits(self, key: str) -> RowLimits:
        """See :meth:`Stage.row_limits`."""
        return RowLimits(self.max_length, room=self.max_new_tokens)

    @model_validator(mode="after")
    def _room_for_a_prompt(self) -> SamplingStage:
        if self.max_new_tokens >= self.max_length:
            raise ValueError(
                f"max_new_tokens ({self.max_new_tokens}) leaves no room for a prompt in max_length ({self.max_length})"
            )
        return self


class SelectPromptsStage(SamplingStage):
    """Selects the prompts that a policy can learn from (ChatGLM-RLHF, https://arxiv.org/abs/2404.00934). First rules
    drop prompts, then an optional scorer of quality, then prompts are dropped whose sampled answers have nearly equal
    scores. Every dropped prompt is listed with the reason."""

    produces: ClassVar[ArtifactType] = "prompts"
    implementation: ClassVar[str] = "align.stages.select_prompts:run"
    view: ClassVar[str] = "align.report.views.sampling:SelectPromptsView"
    words: ClassVar[str] = KINDS["select_prompts"].words

    kind: Literal["select_prompts"]
    """`select_prompts`"""
    min_characters: int = Field(default=4, ge=0)
    """Shortest prompt, in characters of all messages of the user together. Four characters can be a whole request in
    Chinese."""
    max_characters: int | None = Field(default=None, ge=1)
    """Longest prompt, counted in the same way."""
    unanswerable: list[Annotated[str, AfterValidator(pattern)]] | None = None
    """Regular expressions: a prompt is dropped when one of them is found in the user's last message. When absent, the
    list `UNANSWERABLE` in align/recipe/kinds/sampling.py is used, for requests that no language model can answer: about
    files, pictures and links, the news and the time. `[]` drops none."""
    quality: Scoring | None = None
    """A scorer of the prompts themselves; it gets each prompt without an answer. Usually a classifier or a function of
    your own."""
    min_quality: float | None = None
    """Lowest `quality` score to keep."""
    drop_lowest_variance: float | None = Field(default=None, ge=0, lt=1)
    """Share of the sampled prompts to drop, those whose answers' scores differ least. 0.25 if neither this nor
    `min_std` is given."""
    min_std: float | None = Field(default=None, ge=0)
    """Instead of a share: drop prompts whose scores have a smaller standard deviation than this."""

    @model_validator(mode="after")
    def _consistent(self) -> SelectPromptsStage:
        if (self.quality is None) != (self.min_quality is None):
            raise ValueError("quality and min_quality need each other")
        if self.drop_lowest_variance is not None and self.min_std is not None:
            raise ValueError("drop_lowest_variance and min_std exclude each other; keep one")
        if self.max_characters is not None and self.min_characters > self.max_characters:
            raise ValueError(
                f"min_characters ({self.min_characters}) is larger than max_characters ({self.max_characters})"
            )
        return self


class LabelStage(SamplingStage):
    """Samples answers from a policy, scores them and makes preferences of them, as ChatGLM-RLHF does for DPO
    (https://arxiv.org/abs/2404.00934). Equal answers count once, and equal scores make no pair."""

    produces: ClassVar[ArtifactType] = "preferences"
    implementation: ClassVar[str] = "align.stages.label:run"
    version: ClassVar[int] = 2
    """Since version 2, answers that differ only in case or in punctuation at the ends count as copies."""
    view: ClassVar[str] = "align.report.views.sampling:LabelView"
    words: ClassVar[str] = KINDS["label"].words

    kind: Literal["label"]
    """`label`"""
    pairs: Literal["best_worst", "best_vs_rest", "margin"] = "best_worst"
    """`best_worst`: the best answer is chosen, the worst rejected. `best_vs_rest`: the best answer is chosen, all
    others are rejected, as one preference. `margin`: every two answers whose scores are at least `min_margin` apart are
    a preference."""
    min_margin: float = Field(default=0.0, ge=0)
    """Smallest difference of scores between chosen and rejected. With 0, any difference is enough."""
    unfinished: Literal["keep", "drop"] = "drop"
    """Whether answers that were cut at `max_new_tokens` may be chosen or rejected. They are then trained on without an
    end token."""
