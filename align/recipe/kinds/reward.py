"""The keys of a stage that trains a reward model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from align.recipe.blocks.base import ArtifactType, Data, RecordType, Reference, RowUse, Stage
from align.recipe.blocks.scoring import GradeWeights
from align.recipe.blocks.train import EVALUATES, NEUTRAL, WITH_SHARDING, DpoTrain, Lora, neutral_of
from align.recipe.kinds import KINDS
from align.recipe.language.effects import Needs


class RewardTrain(DpoTrain):
    """How a reward model trains: the keys of `train`, with these other defaults."""

    learning_rate: float = Field(default=1e-5, gt=0)
    """Peak learning rate of AdamW. The default suits full fine-tuning of a model with billions of weights; adapters and
    small models need a larger one."""
    batch_size: int | None = Field(default=64, ge=1)
    """Prompts with all their answers in one optimiser step, over all processes; no default when `tokens_per_step` is
    given."""


_ALONE = "with grades: each answer is learned by itself, and no two are compared"


class RewardStage(Stage):
    """Trains a reward model on preferences. The model gives an answer one number, which is read at the token that ends
    the answer. The ranking loss is Bradley and Terry's, with the margins of the data if they have some; the loss of a
    prompt is the mean over its rejected answers. With `grades`, the model is trained on graded answers instead."""

    produces: ClassVar[ArtifactType] = "reward_model"
    implementation: ClassVar[str] = "align.stages.reward.run:run"
    plan: ClassVar[str] = "align.planning.training:RewardPlanner"
    view: ClassVar[str] = "align.report.views.reward:RewardView"
    words: ClassVar[str] = KINDS["reward"].words
    starts_from: ClassVar[str] = "init"
    reads: ClassVar[Mapping[str, RecordType]] = {"data": "preference", "eval_data": "preference"}
    keeps_checkpoints: ClassVar[bool] = True
    neutral: ClassVar[tuple[str, ...]] = NEUTRAL
    key_needs: ClassVar[tuple[Needs, ...]] = (
        Needs(EVALUATES, lambda stage: stage.eval_data, "without eval_data"),
        *WITH_SHARDING,
        Needs("l2 soft_labels length_balance filters", lambda stage: not stage.grades, _ALONE, zero_is_none=True),
    )

    kind: Literal["reward"]
    """`reward`"""
    init: Annotated[str, Reference(("policy", "reward_model")), Field(min_length=1)] | None = None
    """The model whose weights the reward model starts from, usually the fine-tuned policy. It may also be a reward
    model (of a stage, a folder, or a sequence classifier with one label), whose head is then kept. The recipe's `model`
    when absent."""
    data: Data
    """Preferences to train on: one source, or a list (a mixture when they have weights)."""
    eval_data: Data | None = None
    """Held-out preferences, on which accuracy, calibration and length bias are reported, and for comparison the
    accuracy of length alone and of words alone."""
    grades: GradeWeights = Field(default={})
    """Train on grades of answers instead of comparisons. Maps the name of each grade to its weight in the score that
    the model gives, such as `{helpfulness: 0.65, correctness: 0.8, verbosity: -0.4}`. The loss of an answer is the
    squared error, averaged over its grades."""
    l2: float = Field(default=1e-3, ge=0)
    """Weight of a penalty on the squared scores of both answers (https://arxiv.org/abs/2404.00934). It keeps scores
    near 0, which the ranking loss alone does not do."""
    soft_labels: bool = False
    """If several judges compared the answers, use the share of votes for the chosen answer as its target probability,
    instead of 1: `-share * log sigmoid(d) - (1 - share) * log sigmoid(-d)` with `d = chosen - rejected - margin`."""
    length_balance: bool = False
    """Train on as many pairs whose longer answer wins as pairs whose shorter answer wins, for every range of the
    difference in length (2404.00934). Which pairs are left out is drawn anew in each epoch; they are counted."""
    filters: bool = True
    """Leave out, of `data` and `eval_data`, ties, pairs whose answers say the same, and preferences that contradict
    each other or form a circle (A over B over C over A). Also leave out, of `data`, every prompt that is in
    `eval_data`. All are counted."""
    max_length: int = Field(default=2048, ge=2)
    """Longest prompt with one answer, in tokens."""
    too_long: Literal["drop", "truncate", "error"] = "drop"
    """What happens to preferences with a longer answer: they are left out and counted, their answers are cut at the
    end, or it is an error. The score of a cut answer is read where it was cut."""
    lora: Lora | None = None
    """Adapters instead of full fine-tuning; `{}` for the defaults. The head is trained in any case."""
    train: RewardTrain = RewardTrain()
    """Optimiser, schedule, memory. A step's examples are prompts with all their answers."""

    def neutral_keys(self) -> tuple[str, ...]:
        """See :meth:`Stage.neutral_keys`."""
        return (*self.neutral, *neutral_of(self.train))

    def record_types(self) -> Mapping[str, RecordType]:
        """See :meth:`Stage.record_types`. With `grades` the answers are graded, and not compared."""
        return dict.fromkeys(self.reads, "graded") if self.grades else self.reads

    def row_use(self) -> RowUse:
        """See :meth:`Stage.row_use`."""
        if self.grades:
            return RowUse(grades=tuple(self.grades))
        return RowUse(
            filters=self.filters,
            length_balance=self.length_balance,
            margins=True,
            needs_votes="soft_labels" if self.soft_labels else "",
        )

    def refuses_start(self, made_by: Stage) -> tuple[str, str] | None:
        """See :meth:`Stage.refuses_start`. A reward model's head is kept, so it has to have learned the same grades."""
        if not isinstance(made_by, RewardStage) or list(made_by.grades) == list(self.grades):
            return None
        words = f"{self.init} learns {made_by._learned()}, and this stage {self._learned()}: its head cannot be kept"
        return words, "start from the policy, or learn the same grades in their order"

    def _learned(self) -> str:
        return f"the grades {', '.join(self.grades)}" if self.grades else "to rank"
