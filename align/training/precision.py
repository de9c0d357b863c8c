"""The precision that a training step computes in, as the recipe says."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from align.recipe.schema import Train


def autocast(train: Train, device: torch.device) -> AbstractContextManager[None]:
    """A context in which matrix products have the precision that the recipe asks for.

    It keeps copies of the weights in that precision for the next pass, unless the model is divided among processes:
    they would be as large as a whole model.
    """
    if train.autocast is None:
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=train.sharding == "none")


def computes_in(train: Train) -> str:
    """The lowest precision used in a forward pass: "fp32" or "bf16"."""
    return "bf16" if "bf16" in (train.dtype, train.autocast) else "fp32"
