"""The stages that train a policy on data: what a recipe may say of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from align.recipe.blocks.base import ArtifactType, Data, PolicyRef, RecordType, RowLimits, Stage
from align.recipe.blocks.train import EVALUATES, NEUTRAL, DpoTrain, Lora, Train, neutral_of
from align.recipe.kinds import KINDS
from align.recipe.language.effects import Needs


class SftStage(Stage):
    """Supervised fine-tuning on conversations."""

    produces: ClassVar[ArtifactType] = "policy"
    implementation: ClassVar[str] = "align.stages.sft:run"
    words: ClassVar[str] = KINDS["sft"].words
    reads: ClassVar[Mapping[str, RecordType]] = {"data": "conversation", "eval_data": "conversation"}
    keeps_checkpoints: ClassVar[bool] = True
    neutral: ClassVar[tuple[str, ...]] = NEUTRAL
    key_needs: ClassVar[tuple[Needs, ...]] = (Needs(EVALUATES, lambda stage: stage.eval_data, "without eval_data"),)

    kind: Literal["sft"]
    """`sft`"""
    policy: PolicyRef | None = None
    """The model to start from; the recipe's `model` when absent."""
    data: Data
    """Conversations to train on: one source, or a list (a mixture when they have weights)."""
    eval_data: Data | None = None
    """Held-out conversations: their loss is reported before, during and after training."""
    loss: Literal["token_mean", "sequence_mean"] = "token_mean"
    """`token_mean`: every trained token of the step counts the same. `sequence_mean`: every conversation counts the
    same (LongAlign's loss weighting, https://arxiv.org/abs/2401.18058, exact for any packing)."""
    train_on: Literal["all", "last"] = "all"
    """Which assistant messages are trained: all, or only the last of each conversation. A message's own `train: false`
    wins."""
    max_length: int = Field(default=2048, ge=2)
    """Longest conversation, in tokens."""
    too_long: Literal["drop", "truncate", "error"] = "drop"
    """What happens to longer ones: left out and counted, cut at the end (never inside a prompt; no end token is
    invented), or an error."""
    lora: Lora | None = None
    """Adapters instead of full fine-tuning; `{}` for the defaults."""
    train: Train = Train()
    """Optimiser, schedule, memory."""
    samples: int = Field(default=2, ge=0)
    """Held-out prompts that are answered before and after training, for the report."""

    def neutral_keys(self) -> tuple[str, ...]:
        """See :meth:`Stage.neutral_keys`."""
        return (*self.neutral, *neutral_of(self.train))

    def row_limits(self, key: str) -> RowLimits:
        """See :meth:`Stage.row_limits`."""
        return RowLimits(self.max_length, self.too_long, self.train_on)


class DpoStage(Stage):
    """Direct preference optimisation, and its relatives, on preferences with one or many rejected answers."""

    produces: ClassVar[ArtifactType] = "policy"
    implementation: ClassVar[str] = "align.stages.dpo:run"
    words: ClassVar[str] = KINDS["dpo"].words
    reads: ClassVar[Mapping[str, RecordType]] = {"data": "preference", "eval_data": "preference"}
    keeps_checkpoints: ClassVar[bool] = True
    neutral: ClassVar[tuple[str, ...]] = NEUTRAL
    key_needs: ClassVar[tuple[Needs, ...]] = (
        Needs(EVALUATES, lambda stage: stage.eval_data, "without eval_data"),
        Needs("label_smoothing", lambda stage: stage.loss == "sigmoid", "with loss: {loss}; it belongs to sigmoid"),
        Needs(
            "soft_labels",
            lambda stage: not stage.label_smoothing,
            "with label_smoothing: one of the two says how sure a label is",
        ),
        Needs(
            "offset soft_labels",
            lambda stage: stage.loss == "sigmoid",
            "with loss: {loss}; it belongs to sigmoid",
            zero_is_none=True,
        ),
        Needs("gamma", lambda stage: stage.loss == "simpo", "with loss: {loss}; it belongs to simpo"),
    )

    kind: Literal["dpo"]
    """`dpo`"""
    policy: PolicyRef | None = None
    """The model to start from, which is also the reference; the recipe's `model` when absent."""
    data: Data
    """Preferences to train on: one source, or a list (a mixture when they have weights)."""
    eval_data: Data | None = None
    """Held-out preferences: their loss, accuracy and margin are reported before, during and after training."""
    loss: Literal["sigmoid", "ipo", "hinge", "kto_pair", "simpo"] = "sigmoid"
    """`sigmoid`: DPO (https://arxiv.org/abs/2305.18290). `ipo`: a squared distance to a target margin, on per-token
    means (2310.12036). `hinge`: no gain beyond margin 1 / beta (2309.06657). `kto_pair`: each answer judged by itself
    (2402.01306). `simpo`: per-token means, a target margin `gamma`, no reference (2405.14734). With several rejected
    answers, a prompt's loss is the mean over them."""
    beta: float = Field(default=0.1, gt=0)
    """How strongly the policy is held to the reference (smaller: it may move further); for `simpo` the scale of its
    reward, about 2."""
    label_smoothing: float | None = Field(default=None, ge=0, lt=0.5)
    """Only for `sigmoid`: share of pairs assumed to be labelled the wrong way round."""
    offset: float = Field(default=0.0, ge=0)
    """Only for `sigmoid`: weight of the margins of the data. The rewards of a pair have to differ by `offset` times its
    margin (DPO with an offset, https://arxiv.org/abs/2402.10571): `-log sigmoid(beta * difference - offset * margin)`.
    With 0 margins do nothing."""
    soft_labels: bool = False
    """Only for `sigmoid`: where several judges compared the answers, the share of votes for the chosen one is what its
    probability is fitted to, instead of 1: `-share * log sigmoid(d) - (1 - share) * log sigmoid(-d)`, with `d` as
    above."""
    gamma: float | None = Field(default=None, ge=0)
    """Only for `simpo`: target margin, in units of its reward; 1 when absent."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Weight of a next-token loss on the chosen answers, averaged over their tokens, beside the preference loss."""
    max_length: int = Field(default=2048, ge=2)
    """Longest prompt with one answer, in tokens."""
    too_long: Literal["drop", "truncate", "error"] = "drop"
    """What happens to preferences with a longer one: left out and counted, the answers cut at the end, or an error."""
    lora: Lora | None = None
    """Adapters instead of full fine-tuning; `{}` for the defaults."""
    train: DpoTrain = DpoTrain()
    """Optimiser, schedule, memory. A step's examples are prompts with all their answers."""
    samples: int = Field(default=2, ge=0)
    """Held-out prompts that are answered before and after training, for the report."""

    def neutral_keys(self) -> tuple[str, ...]:
        """See :meth:`Stage.neutral_keys`."""
        return (*self.neutral, *neutral_of(self.train))
