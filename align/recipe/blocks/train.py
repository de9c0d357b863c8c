"""How a stage trains: the optimiser step, its schedule, its memory, and adapters."""

from __future__ import annotations

from typing import Any, ClassVar, Final, Literal

from pydantic import Field, model_validator

from align.recipe.blocks.base import Strict
from align.recipe.language.effects import Needs


class Lora(Strict):
    """Train low-rank adapters instead of all weights (https://arxiv.org/abs/2106.09685)."""

    rank: int = Field(default=16, ge=1)
    """Rank r of the update."""
    alpha: float = Field(default=32, gt=0)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input while training."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Which linear layers get an adapter: all of them except the LM head, or those whose names end with one of these
    texts."""
    quantize: Literal["nf4"] | None = None
    """`nf4` keeps the frozen weights in 4 bits (QLoRA, https://arxiv.org/abs/2305.14314): a quarter of their memory.
    Needs bitsandbytes."""
    save_merged: bool = False
    """Also save the model with the adapter merged in (merged in fp32; the drift is reported)."""

    @model_validator(mode="after")
    def _no_merge_into_four_bits(self) -> Lora:
        if self.quantize and self.save_merged:
            raise ValueError(
                "save_merged cannot merge into 4-bit weights; the adapter loads on the unquantised model, merge it"
                " there"
            )
        return self


class Train(Strict):
    """How a stage trains: optimiser, schedule and memory. Keys have the same names as in transformers if they exist
    there."""

    key_needs: ClassVar[tuple[Needs, ...]] = (
        Needs(
            "min_lr_ratio",
            lambda train: train.lr_scheduler_type != "constant",
            "with lr_scheduler_type: constant, which never falls",
        ),
    )

    learning_rate: float = Field(default=1e-5, gt=0)
    """Peak learning rate of AdamW."""
    epochs: float = Field(default=1, gt=0)
    """Passes over the data; a fraction stops inside an epoch."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after this many optimiser steps, even inside an epoch."""
    tokens_per_step: int | None = Field(default=None, ge=1)
    """Tokens in one optimiser step, over all processes. Steps are filled with whole examples up to this number."""
    batch_size: int | None = Field(default=None, ge=1)
    """Examples (conversations, or prompts with their answers) in one optimiser step, over all processes. Use this or
    `tokens_per_step`."""
    microbatch_tokens: int = Field(default=512, ge=1)
    """Tokens in one forward pass, on each process. It changes speed and memory, never the gradient. The default suits a
    CPU; on a GPU use as many as fit into its memory, such as 8192."""
    layout: Literal["tree", "packed", "padded"] = "tree"
    """`tree`: a prompt is computed once for all its answers, and several prompts with their answers are packed into a
    row. `packed`: the prompt is repeated for every answer. `padded`: one sequence in each row. Loss and gradient are
    the same; `tree` is the fastest."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup_ratio: float = Field(default=0.03, ge=0, le=1)
    """Share of all steps over which the learning rate rises from 0."""
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """Learning rate at the last step, as a share of the peak. Not with `constant`, which keeps the peak."""
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
    """Precision in which the trained weights are stored. In bf16, small changes of a weight are lost to rounding, so
    use fp32 unless it does not fit into memory."""
    autocast: Literal["bf16"] | None = None
    """Compute matrix products in bf16 while the weights stay in `dtype`."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    sharding: Literal["none", "full", "hybrid"] = "none"
    """How the processes of a run hold the model (torch's FSDP2). `none`: each holds all weights, gradients and the
    optimiser's state. `full`: each holds a part of them, for a model that does not fit into the memory of one; a layer
    is put together from all processes while it is computed, which takes messages. `hybrid`: the processes of each
    machine divide a copy of the model of their own, so that layers do not cross the network."""
    eval_steps: int | None = Field(default=None, ge=1)
    """Evaluate on the held-out data every N steps (always before the first and after the last)."""
    load_best_model: bool = False
    """End with the weights of the best evaluation instead of the last ones."""
    early_stopping_patience: int | None = Field(default=None, ge=1)
    """Stop after this many evaluations without improvement."""
    save_steps: int | None = Field(default=None, ge=1)
    """Save a checkpoint every N steps, to resume from. An interrupted stage saves one in any case, and otherwise one is
    saved after a quarter of an hour without one."""
    save_total_limit: int = Field(default=2, ge=1)
    """Checkpoints to keep."""
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default=[])
    """Experiment trackers that get every metric, besides `metrics.jsonl`."""

    @model_validator(mode="after")
    def _consistent(self) -> Train:
        if self.tokens_per_step is not None and self.batch_size is not None:
            raise ValueError("tokens_per_step and batch_size exclude each other; keep one")
        if (self.load_best_model or self.early_stopping_patience) and self.eval_steps is None:
            raise ValueError("load_best_model and early_stopping_patience need eval_steps")
        return self


NEUTRAL: Final = (
    # Memory: the same gradient up to rounding
    *("train.microbatch_tokens", "train.layout", "train.gradient_checkpointing", "train.sharding"),
    *("lora.save_merged", "samples"),  # made from the trained model; `align merge` makes the copy at any time
)
"""Keys of a training stage that do not affect the trained weights."""


def neutral_of(train: Train) -> tuple[str, ...]:
    """The keys of ``train`` that are neutral because of other keys: ``eval_steps``, unless evaluations choose the
    weights."""
    return () if train.load_best_model or train.early_stopping_patience else ("train.eval_steps",)


Sharding = Literal["none", "full", "hybrid"]
SHARDING_HINT: Final = (
    "start several processes (`align run --nproc N`, or a launcher on several machines), or write another value:"
    " `none`, or `full` on one machine"
)
"""What to do where :func:`sharding_fault` finds something."""


def sharding_fault(sharding: Sharding, processes: int, of_machine: int) -> str | None:
    """Why so many processes, of which each machine has ``of_machine``, cannot divide a model as ``train.sharding``
    says; None when they can, or when nothing is divided."""
    if sharding == "none":
        return None
    if processes == 1:
        return "the model cannot be divided among the processes: there is only one"
    if sharding == "hybrid" and of_machine >= processes:
        return f"each machine would have a copy of the model, but all {processes} processes are on one"
    if sharding == "hybrid" and processes % of_machine:
        return f"every machine needs as many processes, but one has {of_machine} of {processes}"
    return None


WITH_SHARDING: Final = (
    Needs(
        "lora.quantize",
        lambda stage: stage.train.sharding == "none",
        "with train.sharding, which cannot divide 4-bit weights; choose one of the two",
    ),
    Needs(
        "lora.save_merged",
        lambda stage: stage.train.sharding == "none",
        "with train.sharding, where no process has the whole model; `align merge` makes the copy afterwards",
    ),
)
"""Keys of a training stage that do not go together with a divided model."""
EVALUATES: Final = "train.eval_steps train.load_best_model train.early_stopping_patience"
"""Keys about evaluations, which need held-out data."""


class DpoTrain(Train):
    """How a preference stage trains: the keys of `train`, with these other defaults."""

    learning_rate: float = Field(default=5e-7, gt=0)
    """Peak learning rate of AdamW. The default is the usual one of DPO for full fine-tuning; adapters and very short
    runs need a larger one."""
    batch_size: int | None = Field(default=32, ge=1)
    """Prompts with all their answers in one optimiser step, over all processes; no default when `tokens_per_step` is
    given."""

    @model_validator(mode="before")
    @classmethod
    def _one_measure_of_a_step(cls, values: Any) -> Any:
        given = isinstance(values, dict) and values.get("tokens_per_step") is not None
        return {"batch_size": None, **values} if given else values
