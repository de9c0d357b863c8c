"""AdamW and its learning rate. The rate is a pure function of the step, so no state of a scheduler has to be saved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from align.recipe.schema import Train


def learning_rate(train: Train, step: int, total_steps: int) -> float:
    """Learning rate of optimiser step ``step`` (from 0): a linear rise over the warm-up, then the schedule's shape.

    The first step already has a rate above 0. The schedule reaches its floor (``min_lr_ratio``) after the last step.
    """
    warmup = math.ceil(train.warmup_ratio * total_steps)
    if step < warmup:
        return train.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    shape = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[
        train.lr_scheduler_type
    ]
    if train.lr_scheduler_type == "constant":
        return train.learning_rate
    return train.learning_rate * (train.min_lr_ratio + (1 - train.min_lr_ratio) * shape)


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with their own learning rate, whose gradients are clipped separately."""

    name: str
    """The group's gradient norm is logged as ``grad_norm/NAME``."""
    parameters: Mapping[str, nn.Parameter]
    rate: float = 1.0
    """Factor on the learning rate."""


def build_optimizer(groups: Sequence[ParameterGroup], train: Train) -> torch.optim.AdamW:
    """AdamW over groups of named parameters; weight decay on matrices only (biases, norms and scalars are never
    decayed)."""
    parts = []
    for group in groups:
        matrices = [p for p in group.parameters.values() if p.ndim >= 2]
        rest = [p for p in group.parameters.values() if p.ndim < 2]
        parts += [
            {"params": matrices, "weight_decay": train.weight_decay, "rate": group.rate},
            {"params": rest, "weight_decay": 0.0, "rate": group.rate},
        ]
    return torch.optim.AdamW(
        [part for part in parts if part["params"]],
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """``rate`` for every group, times the group's own factor."""
    for part in optimizer.param_groups:
        part["lr"] = rate * part["rate"]


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimiser's state as named tensors, ``PARAMETER/KEY``; empty before its first step."""
    return {
        f"{name}/{key}": value for name, p in parameters.items() for key, value in optimizer.state.get(p, {}).items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Put back what :func:`optimizer_tensors` returned.

    Raises:
        KeyError: the state of a parameter is missing, or there is state of an unknown one.
    """
    names = {key.rsplit("/", 1)[0] for key in tensors}
    if names != set(parameters):
        raise KeyError(f"optimizer state does not match the parameters: {sorted(names ^ set(parameters))[:3]}")
    for key, value in tensors.items():
        name, field = key.rsplit("/", 1)
        parameter = parameters[name]
        # AdamW keeps its step count as a CPU scalar unless fused on an accelerator; moments live with the parameter.
        optimizer.state[parameter][field] = (
            value.to(parameter.device) if value.ndim or parameter.device.type != "cpu" else value
        )
