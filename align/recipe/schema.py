"""The recipe schema: the single source of what a recipe may say. The docstring under each field is the reference manual.

Closed to unknown keys, strict about types, frozen: nothing rewrites a recipe. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from align.errors import InputError
from align.recipe.refs import import_object

ArtifactType = Literal["policy", "reward_model", "preferences", "prompts", "metrics"]
"""What a stage produces, and what a reference may ask for."""


@dataclass(frozen=True)
class Reference:
    """Marks a string field as a reference: ``stage:NAME``, ``package:PKG/FILE``, a path, or a hub id.

    ``accepts`` are the artefact types that fit when it names a stage; ``hub`` says whether a hub id fits.
    """

    accepts: tuple[ArtifactType, ...] = ()
    hub: bool = True


PolicyRef = Annotated[str, Reference(("policy",)), Field(min_length=1)]


class Strict(BaseModel):
    """Base of every recipe model."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


def _name(text: str) -> str:
    """Names become folders, so none may lead elsewhere."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", text):
        raise ValueError("a name is 1 to 64 letters, digits, `.`, `_` or `-`, and begins with a letter or digit")
    return text


def _stage_name(text: str) -> str:
    """Keys are written `stages.NAME.train`, so a stage's name has no dot."""
    if "." in text:
        raise ValueError("the name of a stage has no `.`")
    return _name(text)


FORMATS = ("messages", "preference", "prompt", "alpaca", "sharegpt", "hh_rlhf", "ultrafeedback")
"""Row formats that have a name; `align.data.formats` implements them."""


def _format(text: str) -> str:
    if text in FORMATS:
        return text
    try:
        if ":" not in text:
            raise InputError(f"no format `{text[:80]}`; known: {', '.join(FORMATS)}, or your own as package.module:function")
        if not callable(import_object(text)):
            raise InputError(f"`{text[:80]}` is not a function")
    except InputError as error:
        raise _unknown_name(error, FORMATS) from error
    return text


def _unknown_name(error: InputError, known: Iterable[str]) -> PydanticCustomError:
    """``known`` is what a misspelt name may have meant."""
    return PydanticCustomError("unknown_name", "{reason}", {"reason": error.problems[0].message, "known": list(known)})


def _listed(value: Any) -> Any:
    """A path or one source stands for a list of one source."""
    items = value if isinstance(value, (list, tuple)) else [value]
    return tuple({"path": item} if isinstance(item, str) else item for item in items)


class DataSource(Strict):
    """Rows of one file, folder, hub data set or stage."""

    path: Annotated[str, Reference(("preferences", "prompts")), Field(min_length=1)]
    """A local file (`.jsonl`, `.json`, `.csv`, `.parquet`), `stage:NAME`, `package:PKG/FILE`, or a hub data set id."""
    format: Annotated[str, AfterValidator(_format)] | None = None
    """Row format: `messages`, `preference`, `prompt`, `alpaca`, `sharegpt`, `hh_rlhf`, `ultrafeedback`, or your own converter as
    `package.module:function`. Detected from the first row when absent."""
    split: str = "train"
    """Split of a hub data set."""
    where: dict[str, str | int | bool] = {}
    """Keep rows whose field equals the value, for example `{lang: en}`. What is left out is counted."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first N rows that `where` keeps."""
    weight: float | None = Field(default=None, gt=0)
    """Share in a mixture, relative to the other sources. All sources have a weight, or none has (then: every row once)."""
    on_bad_row: Literal["error", "skip"] = "error"
    """`error` stops at bad rows and lists them; `skip` writes them to a rejects file with line and reason, and counts them."""


def _all_or_none_weighted(sources: tuple[DataSource, ...]) -> tuple[DataSource, ...]:
    if len({source.weight is None for source in sources}) > 1:
        raise ValueError("some sources have a `weight` and some have none; give all a weight, or none")
    return sources


Data = Annotated[tuple[DataSource, ...], BeforeValidator(_listed), Field(min_length=1), AfterValidator(_all_or_none_weighted)]


class Model(Strict):
    """The model that the recipe starts from."""

    path: Annotated[str, Reference(), Field(min_length=1)]
    """A local folder or `.gguf` file, `package:PKG/FILE`, or a hub id."""
    revision: str | None = None
    """Commit of a hub model. Pin it to make a run repeatable."""
    chat_template: Annotated[str, Reference(hub=False), Field(min_length=1)] | None = None
    """A Jinja file that replaces the model's own chat template."""
    chat_template_kwargs: dict[str, str | int | bool] = {}
    """Passed to the chat template everywhere: training, rollouts, scoring, chat."""


def _model(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


class Lora(Strict):
    """Train low-rank adapters instead of all weights (https://arxiv.org/abs/2106.09685)."""

    rank: int = Field(default=16, ge=1)
    """Rank r of the update."""
    alpha: float = Field(default=32, gt=0)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input while training."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Which linear layers get an adapter: all of them but the LM head, or those whose names end so."""
    quantize: Literal["nf4"] | None = None
    """`nf4` keeps the frozen weights in 4 bits (QLoRA, https://arxiv.org/abs/2305.14314): a quarter of their memory. Needs bitsandbytes."""
    save_merged: bool = False
    """Also save the model with the adapter merged in (merged in fp32; the drift is reported)."""

    @model_validator(mode="after")
    def _no_merge_into_four_bits(self) -> Lora:
        if self.quantize and self.save_merged:
            raise ValueError("save_merged cannot merge into 4-bit weights; the adapter loads on the unquantised model, merge it there")
        return self


class Train(Strict):
    """How a stage trains: the optimiser step, its schedule, its memory. Option names follow transformers where they exist there."""

    learning_rate: float = Field(default=1e-5, gt=0)
    """Peak learning rate of AdamW."""
    epochs: float = Field(default=1, gt=0)
    """Passes over the data; a fraction stops inside an epoch."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after this many optimiser steps, even inside an epoch."""
    tokens_per_step: int | None = Field(default=None, ge=1)
    """Tokens in one optimiser step, over all processes. Steps are filled with whole examples up to this number."""
    batch_size: int | None = Field(default=None, ge=1)
    """Examples (conversations, or prompts with their answers) in one optimiser step, over all processes. Instead of `tokens_per_step`."""
    microbatch_tokens: int = Field(default=512, ge=1)
    """Tokens in one forward pass, on each process. A memory setting: it changes speed and memory, never the gradient. The default suits a
    CPU; a GPU wants as many as its memory holds, such as 8192."""
    layout: Literal["tree", "packed", "padded"] = "tree"
    """`tree`: a prompt's answers share it, trees are packed into rows. `packed`: the prompt is repeated for every answer. `padded`: one
    sequence a row. Same loss and gradient; `tree` is the fastest."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup_ratio: float = Field(default=0.03, ge=0, le=1)
    """Share of all steps over which the learning rate rises from 0."""
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """Learning rate at the last step, as a share of the peak."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay, on matrices only."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's first-moment decay."""
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    """AdamW's second-moment decay."""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Clip the gradient to this norm; `null` for no clipping."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Storage of the trained weights. bf16 weights swallow small steps: keep fp32 unless memory forces you."""
    autocast: Literal["bf16"] | None = None
    """Compute matrix products in bf16 while the weights stay in `dtype`."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    eval_steps: int | None = Field(default=None, ge=1)
    """Evaluate on the held-out data every N steps (always before the first and after the last)."""
    load_best_model: bool = False
    """End with the weights of the best evaluation instead of the last ones."""
    early_stopping_patience: int | None = Field(default=None, ge=1)
    """Stop after this many evaluations without improvement."""
    save_steps: int | None = Field(default=None, ge=1)
    """Checkpoint every N steps, to resume from. An interrupt saves one in any case."""
    save_total_limit: int = Field(default=2, ge=1)
    """Checkpoints to keep."""
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = []
    """Experiment trackers that get every metric, besides `metrics.jsonl`."""

    @model_validator(mode="after")
    def _consistent(self) -> Train:
        if self.tokens_per_step is not None and self.batch_size is not None:
            raise ValueError("tokens_per_step and batch_size exclude each other; keep one")
        if (self.load_best_model or self.early_stopping_patience) and self.eval_steps is None:
            raise ValueError("load_best_model and early_stopping_patience need eval_steps")
        return self


class Stage(Strict):
    """What every stage has. A third party's stage is a subclass with `kind: package.module:Class` and a `run` of its own."""

    produces: ClassVar[ArtifactType]
    implementation: ClassVar[str]
    """`module:function`, imported only when the stage runs: `function(spec, context) -> None`."""

    kind: str
    """Which stage this is."""
    seed: int | None = Field(default=None, ge=0)
    """Replaces the recipe's seed for this stage."""


class SftStage(Stage):
    """Supervised fine-tuning on conversations."""

    produces: ClassVar[ArtifactType] = "policy"
    implementation: ClassVar[str] = "align.stages.sft:run"

    kind: Literal["sft"]
    """`sft`"""
    policy: PolicyRef | None = None
    """The model to start from; the recipe's `model` when absent."""
    data: Data
    """Conversations to train on: one source, or a list (a mixture when they have weights)."""
    eval_data: Data | None = None
    """Held-out conversations: their loss is reported before, during and after training."""
    loss: Literal["token_mean", "sequence_mean"] = "token_mean"
    """`token_mean`: every trained token of the step counts the same. `sequence_mean`: every conversation counts the same
    (LongAlign's loss weighting, https://arxiv.org/abs/2401.18058, exact for any packing)."""
    train_on: Literal["all", "last"] = "all"
    """Which assistant messages are trained: all, or only the last of each conversation. A message's own `train: false` wins."""
    max_length: int = Field(default=2048, ge=2)
    """Longest conversation, in tokens."""
    too_long: Literal["drop", "truncate", "error"] = "drop"
    """What happens to longer ones: left out and counted, cut at the end (never inside a prompt; no end token is invented), or an error."""
    lora: Lora | None = None
    """Adapters instead of full fine-tuning; `{}` for the defaults."""
    train: Train = Train()
    """Optimiser, schedule, memory."""
    samples: int = Field(default=2, ge=0)
    """Held-out prompts that are answered before and after training, for the report."""


class DpoTrain(Train):
    """How a preference stage trains: as `train` of the other stages, with defaults of its own."""

    learning_rate: float = Field(default=5e-7, gt=0)
    """Peak learning rate of AdamW. The default is DPO's usual one for full fine-tuning; adapters and very short runs want more."""
    batch_size: int | None = Field(default=32, ge=1)
    """Prompts with all their answers in one optimiser step, over all processes; no default when `tokens_per_step` is given."""

    @model_validator(mode="before")
    @classmethod
    def _one_measure_of_a_step(cls, values: Any) -> Any:
        given = isinstance(values, dict) and values.get("tokens_per_step") is not None
        return {"batch_size": None, **values} if given else values


class DpoStage(Stage):
    """Direct preference optimisation, and its relatives, on preferences with one or many rejected answers."""

    produces: ClassVar[ArtifactType] = "policy"
    implementation: ClassVar[str] = "align.stages.dpo:run"

    kind: Literal["dpo"]
    """`dpo`"""
    policy: PolicyRef | None = None
    """The model to start from, which is also the reference; the recipe's `model` when absent."""
    data: Data
    """Preferences to train on: one source, or a list (a mixture when they have weights)."""
    eval_data: Data | None = None
    """Held-out preferences: their loss, accuracy and margin are reported before, during and after training."""
    loss: Literal["sigmoid", "ipo", "hinge", "kto_pair", "simpo"] = "sigmoid"
    """`sigmoid`: DPO (https://arxiv.org/abs/2305.18290). `ipo`: a squared distance to a target margin, on per-token means (2310.12036).
    `hinge`: no gain beyond margin 1 / beta (2309.06657). `kto_pair`: each answer judged by itself (2402.01306). `simpo`: per-token means,
    a target margin `gamma`, no reference (2405.14734). With several rejected answers, a prompt's loss is the mean over them."""
    beta: float = Field(default=0.1, gt=0)
    """How strongly the policy is held to the reference (smaller: it may move further); for `simpo` the scale of its reward, about 2."""
    label_smoothing: float | None = Field(default=None, ge=0, lt=0.5)
    """Only for `sigmoid`: share of pairs assumed to be labelled the wrong way round."""
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

    @model_validator(mode="after")
    def _options_belong_to_the_loss(self) -> DpoStage:
        for option, loss in (("label_smoothing", "sigmoid"), ("gamma", "simpo")):
            if getattr(self, option) is not None and self.loss != loss:
                raise ValueError(f"{option} has no effect with loss: {self.loss}; it belongs to {loss}")
        return self


BUILTIN_STAGES: dict[str, type[Stage]] = {"sft": SftStage, "dpo": DpoStage}


def stage_class(kind: str) -> type[Stage]:
    """The schema of a stage kind: built in, or a third party's as `package.module:Class`, which is imported.

    Raises :class:`InputError` when there is none, or when it is not a complete stage.
    """
    if kind in BUILTIN_STAGES:
        return BUILTIN_STAGES[kind]
    if ":" not in kind:
        raise InputError(f"no stage kind `{kind[:80]}`; known: {', '.join(BUILTIN_STAGES)}, or your own as package.module:Class")
    found = import_object(kind)
    if not (isinstance(found, type) and issubclass(found, Stage)):
        raise InputError(f"`{kind}` is not a subclass of align.recipe.schema.Stage")
    if getattr(found, "produces", None) not in get_args(ArtifactType):
        raise InputError(f"`{kind}` needs a class variable `produces`, one of {', '.join(get_args(ArtifactType))}")
    if not re.fullmatch(r"[\w.]+:\w+", getattr(found, "implementation", "")):
        raise InputError(f"`{kind}` needs a class variable `implementation`, written module:function")
    return found


def _stage(value: Any) -> Any:
    """Validate a mapping by the class that its `kind` names."""
    if not isinstance(value, dict):
        return value
    if not isinstance(value.get("kind"), str):
        details = InitErrorDetails(type="string_type" if "kind" in value else "missing", loc=("kind",), input=value.get("kind"))
        raise ValidationError.from_exception_data("Stage", [details])
    try:
        found = stage_class(value["kind"])
    except InputError as error:
        details = InitErrorDetails(type=_unknown_name(error, BUILTIN_STAGES), loc=("kind",), input=value["kind"])
        raise ValidationError.from_exception_data("Stage", [details]) from error
    return found.model_validate(value)


class Hardware(Strict):
    """The machine that a recipe is meant for. `align plan` takes it as the budget; it has no effect on a run."""

    gpus: int = Field(default=0, ge=0)
    """GPUs of one node; 0 trains on the CPU. One process for each."""
    memory_gb: float = Field(gt=0)
    """Memory of one GPU, or of the machine when `gpus` is 0, in GB (10^9 bytes)."""
    nodes: int = Field(default=1, ge=1)
    """Machines."""
    disk_gb: float | None = Field(default=None, gt=0)
    """Free disk space for the run folder, in GB; not checked when absent."""


class Recipe(Strict):
    """A pipeline: a model and the stages that it goes through, in the order given by their references."""

    name: Annotated[str, AfterValidator(_name)]
    """Name of the run folder under `runs/`."""
    seed: int = Field(default=17, ge=0)
    """Everything random follows from it."""
    model: Annotated[Model, BeforeValidator(_model)]
    """The model to start from: a reference, or a mapping with more."""
    hardware: Hardware | None = None
    """The machine that the recipe is meant for, used by `align plan` only; absent means this one."""
    stages: dict[Annotated[str, AfterValidator(_stage_name)], Annotated[SerializeAsAny[Stage], BeforeValidator(_stage)]] = Field(
        min_length=1
    )
    """Stage name to stage. `stage:NAME` elsewhere refers to its result."""
