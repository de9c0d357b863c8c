"""The stage that trains a reward model: what a recipe may say of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, FiniteFloat

from align.recipe.blocks.base import ArtifactType, Data, RecordType, Reference, Stage
from align.recipe.blocks.train import EVALUATES, NEUTRAL, DpoTrain, Lora, neutral_of
from align.recipe.kinds import KINDS
from align.recipe.language.effects import Needs


class RewardTrain(DpoTrain):
    """How a reward model trains: as `train` of the other stages, with defaults of its own."""

    learning_rate: float = Field(default=1e-5, gt=0)
    """Peak learning rate of AdamW. The default suits full fine-tuning of a model of billions; adapters and small models
    want more."""
    batch_size: int | None = Field(default=64, ge=1)
    """Prompts with all their answers in one optimiser step, over all processes; no default when `tokens_per_step` is
    given."""


_ALONE = "with grades: each answer is learned by itself, and no two are compared"


def _weights(grades: dict[str, float]) -> dict[str, float]:
    if grades and not any(grades.values()):
        raise ValueError("all weights are 0, so every score would be")
    return grades


class RewardStage(Stage):
    """A reward model from preferences: one number for an answer, read at the token that ends it. The ranking loss is
    Bradley and Terry's, with the margins of the data where they have some; a prompt's loss is the mean over its
    rejected answers. Or, with `grades`, from graded answers."""

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
        Needs("l2 soft_labels length_balance filters", lambda stage: not stage.grades, _ALONE, zero_is_none=True),
    )

    kind: Literal["reward"]
    """`reward`"""
    init: Annotated[str, Reference(("policy", "reward_model")), Field(min_length=1)] | None = None
    """The model whose weights it starts from: usually the fine-tuned policy; or a reward model (of a stage, a folder,
    or a sequence classifier with one label), whose head is kept. The recipe's `model` when absent."""
    data: Data
    """Preferences to train on: one source, or a list (a mixture when they have weights)."""
    eval_data: Data | None = None
    """Held-out preferences: accuracy, calibration and length bias are reported, beside what length and words alone can
    predict."""
    grades: Annotated[dict[Annotated[str, Field(min_length=1)], FiniteFloat], AfterValidator(_weights)] = Field(
        default={}
    )
    """Learn the grades of answers instead of comparisons: each grade's name, and its weight in the one score that the
    model then gives, such as `{helpfulness: 0.65, correctness: 0.8, verbosity: -0.4}`. The loss is the squared error, a
    mean over an answer's grades."""
    l2: float = Field(default=1e-3, ge=0)
    """Weight of the squared scores of both answers (https://arxiv.org/abs/2404.00934): holds scores near 0, as ranking
    alone does not."""
    soft_labels: bool = False
    """Where several judges compared the answers, the share of votes for the chosen one is what its probability is
    fitted to, instead of 1: `-share * log sigmoid(d) - (1 - share) * log sigmoid(-d)` with `d = chosen - rejected -
    margin`."""
    length_balance: bool = False
    """Train on as many pairs whose longer answer wins as pairs whose shorter answer wins, for every range of the
    difference in length; what is left out is drawn anew each epoch, and counted (2404.00934)."""
    filters: bool = True
    """Leave out ties, pairs that say the same, contradictions and circles (A over B over C over A), of `data` and
    `eval_data`; and of `data` every prompt that is in `eval_data`. All are counted."""
    max_length: int = Field(default=2048, ge=2)
    """Longest prompt with one answer, in tokens."""
    too_long: Literal["drop", "truncate", "error"] = "drop"
    """What happens to preferences with a longer one: left out and counted, the answers cut at the end, or an error. A
    cut answer is scored where it was cut."""
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
