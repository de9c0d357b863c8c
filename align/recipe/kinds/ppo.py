"""The keys of a PPO stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from align.recipe.blocks.base import ArtifactType, Data, PolicyRef, RecordType, Reference, RowLimits, Stage, Strict
from align.recipe.blocks.estimators import ESTIMATORS, Estimator
from align.recipe.blocks.rollout import AutoRollout, RolloutChoice
from align.recipe.blocks.scoring import ModelScorer, Scoring
from align.recipe.blocks.train import EVALUATES, NEUTRAL, WITH_SHARDING, Lora, Train, neutral_of
from align.recipe.kinds import KINDS
from align.recipe.language.effects import Needs

if TYPE_CHECKING:
    EstimatorName = str
else:
    EstimatorName = Literal[tuple(ESTIMATORS)]


class PpoTrain(Train):
    """How a PPO stage trains: the keys of `train`, with these other defaults. `iterations` says how long it trains."""

    learning_rate: float = Field(default=1e-6, gt=0)
    """Learning rate of the policy. The default is that of ChatGLM-RLHF; adapters and very short runs need a larger
    one."""
    batch_size: int | None = Field(default=32, ge=1)
    """Prompts in one iteration, over all processes."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate after warm-up."""
    warmup_ratio: float = Field(default=0.0, ge=0, le=1)
    """Share of all steps over which the learning rate rises from 0."""

    @model_validator(mode="before")
    @classmethod
    def _length_is_said_elsewhere(cls, values: Any) -> Any:
        named = [
            key
            for key in ("epochs", "max_steps", "tokens_per_step")
            if isinstance(values, dict) and values.get(key) is not None
        ]
        if named:
            raise ValueError(
                f"{', '.join(named)}: the length of ppo is `iterations`, a step's prompts are `train.batch_size /"
                " minibatches`"
            )
        return values

    @model_validator(mode="after")
    def _prompts_are_counted(self) -> PpoTrain:
        if self.batch_size is None:
            raise ValueError("batch_size: ppo needs the number of prompts in one iteration")
        return self

    @property
    def prompts(self) -> int:
        """Prompts in one iteration."""
        assert self.batch_size is not None
        return self.batch_size


class Health(Strict):
    """Limits that a healthy run does not exceed. If a run exceeds one, it says so; `on_unhealthy` says whether it also
    stops."""

    first_ratio: float | None = Field(default=None, gt=0)
    """Largest distance, in nats, of a token's log-prob from its old log-prob in the first step of an iteration, when
    the policy is still the one that sampled. When absent 1e-3, or 0.5 if anything is computed in bf16."""
    kl: float = Field(default=0.5, gt=0)
    """Largest mean KL from the reference, in nats per token."""
    negative_kl: float = Field(default=0.01, gt=0)
    """The run warns if the mean KL is below minus this many nats per token in three iterations in a row. A true KL is
    never negative, but an estimate from samples may be."""
    mismatch: float = Field(default=0.1, gt=0)
    """Largest mean distance of the engine's log-probs from the trainer's, in nats per token. Old log-probs are always
    the trainer's."""
    clip_fraction: float = Field(default=0.5, gt=0, le=1)
    """Largest share of tokens, over an iteration, that get no gradient because of PPO's clip."""
    explained_variance: float = -1.0
    """Least explained variance of the value model; 1 is perfect, 0 is no better than a constant. Checked from the fifth
    iteration on; three iterations in a row have to be below it."""
    unfinished: float = Field(default=0.95, gt=0, le=1)
    """Largest share of answers that do not end within `max_new_tokens`."""
    distinct: float = Field(default=0.2, ge=0, le=1)
    """Least number of different answers in an iteration, as a share of all its answers."""
    entropy: float = Field(default=0.1, ge=0, le=1)
    """Least entropy of the policy, as a share of that in the first iteration."""
    sft_loss: float = Field(default=0.5, gt=0)
    """How much the loss on `sft_data` may rise while the reward rises, in nats per token. The mean of the last four
    iterations is compared with that of the first four, and a rise within the noise does not count."""


class PpoStage(Stage):
    """Reinforcement learning from a reward model, as in ChatGLM-RLHF (https://arxiv.org/abs/2404.00934): PPO with a
    value model, a reward relative to the reference model's own answer, a KL penalty, and a next-token loss against
    forgetting."""

    produces: ClassVar[ArtifactType] = "policy"
    implementation: ClassVar[str] = "align.stages.ppo.run:run"
    plan: ClassVar[str] = "align.planning.ppo:PpoPlanner"
    view: ClassVar[str] = "align.report.views.ppo:PpoView"
    words: ClassVar[str] = KINDS["ppo"].words
    reads: ClassVar[Mapping[str, RecordType]] = {
        "prompts": "prompt",
        "eval_prompts": "prompt",
        "sft_data": "conversation",
        "eval_sft_data": "conversation",
    }
    keeps_checkpoints: ClassVar[bool] = True
    always_samples: ClassVar[bool] = True
    files: ClassVar[Mapping[str, str]] = {
        "value/": "the value model, in the form of a reward model",
    }
    neutral: ClassVar[tuple[str, ...]] = (
        *("health", "on_unhealthy"),  # they decide whether a run continues, not what it computes
        *NEUTRAL,
    )
    key_needs: ClassVar[tuple[Needs, ...]] = (
        *WITH_SHARDING,
        Needs(
            "gamma lam value_init value_model value_learning_rate value_clip whiten_rewards health.explained_variance",
            lambda stage: stage.advantages.has_value_model,
            "with estimator: {estimator}; it belongs to gae",
        ),
        Needs(
            "value_init",
            lambda stage: stage.value_model is None,
            "beside value_model, which the value model starts from",
        ),
        Needs(
            "reference_baseline",
            lambda stage: not stage.advantages.compares,
            "with estimator: {estimator}: it cancels",
        ),
        Needs("baseline_samples", lambda stage: stage.uses_baseline, "without the reference baseline"),
        Needs(
            "kl_target",
            lambda stage: stage.kl_coefficient > 0,
            "with kl_coefficient: 0, which stays 0 however it is scaled",
        ),
        Needs(
            "target_kl",
            lambda stage: stage.steps_per_iteration > 1,
            "with a single step an iteration: there is none to leave out",
        ),
        Needs(
            "importance_cap",
            lambda stage: not stage.rollout.exact,
            "with rollout.engine: {rollout.engine}, whose log-probs are the trainer's",
        ),
        Needs(
            "sft_weight sft_batch_size health.sft_loss",
            lambda stage: stage.sft_data,
            "without sft_data",
            zero_is_none=True,
        ),
        Needs(
            f"eval_sft_data samples {EVALUATES}",
            lambda stage: stage.eval_prompts,
            "without eval_prompts",
            zero_is_none=True,
        ),
    )

    kind: Literal["ppo"]
    """`ppo`"""
    policy: PolicyRef | None = None
    """The model to start from, which is also the reference; the recipe's `model` when absent."""
    reward: Scoring
    """The scorer of the answers."""
    prompts: Data
    """Prompts to answer: one source, or a list (a mixture when they have weights). Each pass over them has a new random
    order."""
    eval_prompts: Data | None = None
    """Held-out prompts: answered greedily and scored before and after training, and every `train.eval_steps` steps."""
    iterations: int = Field(default=600, ge=1)
    """Number of rounds of sampling and training; ChatGLM-RLHF needed 600 to 800."""
    samples_per_prompt: int = Field(default=1, ge=1)
    """Answers to each prompt in an iteration. The prompt is computed once for all of them."""
    max_prompt_length: int = Field(default=1024, ge=1)
    """Longest prompt, in tokens. Longer ones are left out before anything is sampled, and counted."""
    max_new_tokens: int = Field(default=512, ge=1)
    """Longest answer, in tokens."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature. All log-probs of the stage are computed at this temperature. There is no top_p or top_k:
    with them, answers would be sampled from another distribution than the one that is trained."""

    reference_baseline: bool | None = None
    """Subtract from a score the score of the reference model's own answer to the same prompt, sampled once before
    training. When absent, it is on for `gae` and `reinforce`. The other two estimators compare the answers to a prompt
    with each other, so the baseline would cancel out."""
    baseline_samples: int = Field(default=1, ge=1)
    """Number of answers that the reference gives to each prompt. Their mean score is the baseline."""
    unfinished_penalty: float = Field(default=0.0, ge=0)
    """Subtracted from the score of an answer (the reference's too) that does not end within `max_new_tokens`."""
    kl_coefficient: float = Field(default=0.05, ge=0)
    """Weight of the KL penalty: how much a nat of KL from the reference lowers the reward of a token."""
    kl_target: float | None = Field(default=None, gt=0)
    """Adapt `kl_coefficient` after every iteration so that the KL stays near this many nats per answer
    (https://arxiv.org/abs/1909.08593, section 2.2); fixed when absent."""

    estimator: EstimatorName = "gae"
    """How advantages are computed. `gae`: with a value model, token by token (https://arxiv.org/abs/1506.02438).
    `rloo`: the reward minus the mean reward of the prompt's other answers (2402.14740). `group`: the reward minus the
    mean, divided by the standard deviation, of the prompt's answers, as in GRPO (2402.03300). `reinforce`: the reward
    with the reference baseline alone."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Only for `gae`: discount of later rewards."""
    lam: float = Field(default=0.95, ge=0, le=1)
    """Only for `gae`: lambda. With 1, what follows a token is judged by the rewards that come, with 0 by the value
    model; values between mix both."""
    value_init: Literal["reward", "policy"] = "reward"
    """Only for `gae`: the value model starts as the reward model (one that a `reward` stage made), or as the policy
    with a new head."""
    value_model: Annotated[str, Reference(("reward_model",)), Field(min_length=1)] | None = None
    """Only for `gae`: a value model that an earlier run saved (the folder `value` of its result), instead of
    `value_init`."""
    value_learning_rate: float = Field(default=5e-6, gt=0)
    """Only for `gae`: the value model's peak learning rate; its schedule is the policy's."""
    value_clip: float | None = Field(default=0.2, gt=0)
    """Only for `gae`: how far a value may move in an iteration before the loss stops rewarding a larger move; `null`
    for no limit."""

    clip: float = Field(default=0.2, gt=0, lt=1)
    """PPO's clip of the probability ratio."""
    ppo_epochs: int = Field(default=1, ge=1)
    """Passes over an iteration's answers."""
    minibatches: int = Field(default=1, ge=1)
    """Optimiser steps in each pass."""
    target_kl: float | None = Field(default=None, gt=0)
    """End the training of an iteration early once the policy's KL from the policy that sampled is this many nats per
    token."""
    entropy_weight: float = Field(default=0.0, ge=0)
    """Weight of a bonus for the policy's entropy, in nats per token."""
    whiten_rewards: bool = False
    """Only for `gae`: scale the tokens' rewards of an iteration to variance 1, keeping their mean. The reference
    baseline makes it unnecessary."""
    whiten_advantages: bool = False
    """Scale the advantages of an iteration to mean 0 and variance 1. The reference baseline makes it unnecessary."""
    importance_cap: float | None = Field(default=None, ge=1)
    """Weight each token by its probability under the trainer divided by that under the engine that sampled it, limited
    to this value. For engines of lower precision (`rollout.dtype: bf16`)."""

    sft_data: Data | None = None
    """Conversations that the policy should not forget. Their loss is reported; with `sft_weight` the policy is also
    trained on them."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Weight of the next-token loss on `sft_data`, averaged over its own tokens, in every step."""
    sft_batch_size: int | None = Field(default=None, ge=1)
    """Conversations in one step; as many as prompts when absent."""
    eval_sft_data: Data | None = None
    """Held-out conversations: their loss is reported whenever `eval_prompts` are answered."""

    health: Health = Health()
    """Limits that a healthy run does not exceed."""
    on_unhealthy: Literal["warn", "stop"] = "warn"
    """`warn` prints a warning when a limit of `health` is exceeded. `stop` ends the run; the last checkpoint is then
    from before that."""
    rollout: RolloutChoice = AutoRollout()
    """The engine that samples."""
    lora: Lora | None = None
    """Adapters instead of full training; `{}` for the defaults. Policy, reference and value model then share one
    base."""
    train: PpoTrain = PpoTrain()
    """Optimiser, memory."""
    samples: int = Field(default=2, ge=0)
    """Held-out prompts whose answers before and after training are printed at the end; the report has all of them."""

    def neutral_keys(self) -> tuple[str, ...]:
        """See :meth:`Stage.neutral_keys`."""
        return (*self.neutral, *neutral_of(self.train), *(f"rollout.{key}" for key in self.rollout.neutral))

    def row_limits(self, key: str) -> RowLimits:
        """See :meth:`Stage.row_limits`."""
        if self.reads[key.partition(".")[0]] == "prompt":
            return RowLimits(self.max_prompt_length)
        return RowLimits(self.max_prompt_length + self.max_new_tokens, train_on="all")

    @property
    def advantages(self) -> Estimator:
        """How advantages are computed."""
        return ESTIMATORS[self.estimator]

    @property
    def uses_baseline(self) -> bool:
        """Is the reference's score subtracted?"""
        return not self.advantages.compares if self.reference_baseline is None else self.reference_baseline

    @property
    def value_start(self) -> str | None:
        """The reward or value model that the value model starts from; None when it is the policy, or there is none."""
        if not self.advantages.has_value_model or self.value_model is not None:
            return self.value_model
        return self.reward.model if self.value_init == "reward" and isinstance(self.reward, ModelScorer) else None

    @property
    def steps_per_iteration(self) -> int:
        """Optimiser steps of one iteration."""
        return self.ppo_epochs * self.minibatches

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the stage."""
        return self.iterations * self.steps_per_iteration

    @model_validator(mode="after")
    def _options_belong_to_the_estimator(self) -> PpoStage:
        if self.advantages.compares and self.samples_per_prompt < 2:
            raise ValueError(
                f"estimator {self.estimator} compares the answers to a prompt: samples_per_prompt must be at least 2"
            )
        if self.advantages.needs_baseline and not self.uses_baseline:
            raise ValueError(
                f"estimator {self.estimator} is nothing without its baseline: remove reference_baseline: false"
            )
        if (
            self.advantages.has_value_model
            and self.value_init == "reward"
            and self.value_model is None
            and not isinstance(self.reward, ModelScorer)
        ):
            raise ValueError(
                "value_init: reward needs a reward model as `reward`; with another scorer write value_init: policy"
            )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> PpoStage:
        if self.minibatches > self.train.prompts:
            raise ValueError(
                f"minibatches: {self.train.prompts} prompts (train.batch_size) cannot be cut into {self.minibatches}"
            )
        if self.lora is not None and self.lora.dropout:
            raise ValueError(
                "lora.dropout: with dropout the policy is never the one that sampled, and the ratio never 1; remove it"
            )
        if self.on_unhealthy == "stop" and self.train.save_steps is None:
            raise ValueError("on_unhealthy: stop keeps the last checkpoint, and there is none without train.save_steps")
        return self
