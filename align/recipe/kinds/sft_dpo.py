"""The keys of the stages that train a policy on data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Final, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from align.recipe.blocks.base import ArtifactType, Data, PolicyRef, RecordType, RowLimits, RowUse, Stage
from align.recipe.blocks.pair_losses import LossChoice, PairLoss, SigmoidLoss
from align.recipe.blocks.train import EVALUATES, NEUTRAL, WITH_SHARDING, DpoTrain, Lora, Train, neutral_of
from align.recipe.kinds import KINDS
from align.recipe.language.effects import Needs


class SftStage(Stage):
    """Supervised fine-tuning on conversations."""

    produces: ClassVar[ArtifactType] = "policy"
    implementation: ClassVar[str] = "align.stages.sft:run"
    plan: ClassVar[str] = "align.planning.training:CountedPlanner"
    view: ClassVar[str] = "align.report.views.sft:SftView"
    words: ClassVar[str] = KINDS["sft"].words
    reads: ClassVar[Mapping[str, RecordType]] = {"data": "conversation", "eval_data": "conversation"}
    keeps_checkpoints: ClassVar[bool] = True
    neutral: ClassVar[tuple[str, ...]] = NEUTRAL
    key_needs: ClassVar[tuple[Needs, ...]] = (
        Needs(EVALUATES, lambda stage: stage.eval_data, "without eval_data"),
        *WITH_SHARDING,
    )

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
    """Which assistant messages are trained: all, or only the last of each conversation. A message with `train: false`
    is never trained."""
    max_length: int = Field(default=2048, ge=2)
    """Longest conversation, in tokens."""
    too_long: Literal["drop", "truncate", "error"] = "drop"
    """What happens to longer conversations: they are left out and counted, cut at the end (never inside a prompt, and
    without an added end token), or an error."""
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


FLAT_OPTIONS: Final = {
    "label_smoothing": "sigmoid",
    "offset": "sigmoid",
    "soft_labels": "sigmoid",
    "gamma": "simpo",
}
"""Options that recipes and saved runs of earlier versions have beside ``loss``, and the loss that each belongs to."""


def _of_its_loss(key: str, owner: str) -> Needs:
    return Needs(
        key,
        lambda stage: key in type(stage.loss).model_fields,
        f"with loss: {{loss}}; it belongs to {owner}",
        zero_is_none=key == "offset",
    )


class DpoStage(Stage):
    """Direct preference optimisation, and its relatives, on preferences with one or many rejected answers."""

    produces: ClassVar[ArtifactType] = "policy"
    implementation: ClassVar[str] = "align.stages.dpo:run"
    plan: ClassVar[str] = "align.planning.training:DpoPlanner"
    view: ClassVar[str] = "align.report.views.dpo:DpoView"
    words: ClassVar[str] = KINDS["dpo"].words
    reads: ClassVar[Mapping[str, RecordType]] = {"data": "preference", "eval_data": "preference"}
    keeps_checkpoints: ClassVar[bool] = True
    neutral: ClassVar[tuple[str, ...]] = NEUTRAL
    key_needs: ClassVar[tuple[Needs, ...]] = (
        Needs(EVALUATES, lambda stage: stage.eval_data, "without eval_data"),
        *WITH_SHARDING,
        *(_of_its_loss(key, owner) for key, owner in FLAT_OPTIONS.items()),
    )

    kind: Literal["dpo"]
    """`dpo`"""
    policy: PolicyRef | None = None
    """The model to start from, which is also the reference; the recipe's `model` when absent."""
    data: Data
    """Preferences to train on: one source, or a list (a mixture when they have weights)."""
    eval_data: Data | None = None
    """Held-out preferences: their loss, accuracy and margin are reported before, during and after training."""
    loss: LossChoice = SigmoidLoss(name="sigmoid")
    """The preference loss: its name, or a mapping of `name` and its options, `{name: simpo, gamma: 0.5}`. With several
    rejected answers, a prompt's loss is the mean over them."""
    beta: float = Field(default=0.1, gt=0)
    """How strongly the policy is kept close to the reference: with a smaller value it may move further away. For
    `simpo` it is the scale of the reward; about 2 is usual."""
    label_smoothing: float | None = Field(default=None, ge=0, lt=0.5)
    """The same as `loss.label_smoothing` of the loss `sigmoid`."""
    offset: float = Field(default=0.0, ge=0)
    """The same as `loss.offset` of the loss `sigmoid`."""
    soft_labels: bool = False
    """The same as `loss.soft_labels` of the loss `sigmoid`."""
    gamma: float | None = Field(default=None, ge=0)
    """The same as `loss.gamma` of the loss `simpo`."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Weight of a next-token loss on the chosen answers, averaged over their tokens, beside the preference loss."""
    max_length: int = Field(default=2048, ge=2)
    """Longest prompt with one answer, in tokens."""
    too_long: Literal["drop", "truncate", "error"] = "drop"
    """What happens to preferences with a longer answer: they are left out and counted, their answers are cut at the
    end, or it is an error."""
    lora: Lora | None = None
    """Adapters instead of full fine-tuning; `{}` for the defaults."""
    train: DpoTrain = DpoTrain()
    """Optimiser, schedule, memory. A step's examples are prompts with all their answers."""
    samples: int = Field(default=2, ge=0)
    """Held-out prompts that are answered before and after training, for the report."""

    def neutral_keys(self) -> tuple[str, ...]:
        """See :meth:`Stage.neutral_keys`."""
        return (*self.neutral, *neutral_of(self.train))

    def row_use(self) -> RowUse:
        """See :meth:`Stage.row_use`."""
        loss = self.pair_loss
        return RowUse(
            margins=loss.reads_margins,
            needs_margins="offset" if loss.reads_margins else "",
            needs_votes="soft_labels" if loss.reads_shares else "",
        )

    @property
    def pair_loss(self) -> PairLoss:
        """The loss with its options, from either of the two places where a recipe may have them."""
        own = {name: getattr(self.loss, name) for name in self.loss.model_fields_set}
        beside = {name: getattr(self, name) for name in FLAT_OPTIONS if name in type(self.loss).model_fields}
        return type(self.loss)(**{**{name: value for name, value in beside.items() if value is not None}, **own})

    @model_validator(mode="after")
    def _an_option_once(self) -> Self:
        for name in FLAT_OPTIONS:
            if {name} <= self.model_fields_set & self.loss.model_fields_set:
                raise ValueError(f"`{name}` and `loss.{name}` are one option; give one")
        self.pair_loss  # noqa: B018 - raises for options that contradict each other
        return self

    @model_serializer(mode="wrap")
    def _as_before_losses_had_options(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Writes a stage in one form, whichever of the two places its options are in, so that its identity is the same:
        that of earlier versions, with the older options beside the loss, and a loss without other options as its
        name."""
        values: dict[str, Any] = dump(self)
        loss = values.get("loss")
        if isinstance(loss, dict):
            for name in FLAT_OPTIONS.keys() & loss.keys():
                value = loss.pop(name)
                if name in self.loss.model_fields_set:
                    values[name] = value
            values["loss"] = loss if loss.keys() > {"name"} else loss["name"]
        return values
