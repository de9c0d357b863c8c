"""The precision that a training step computes in, as the recipe says."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from align.recipe.schema import Train


def autocast(train: Train, device: torch.device) -> AbstractContextManager[None]:
    """A context in which matrix products have the precision that the recipe asks for.

    torch would keep the bf16 copies of all weights until the context ends. A weight is read once in a forward pass, so
    they would be of no use, and with checkpointing, where autograd does not keep them, they take 16 GB of GLM-4-9B.
    """
    if train.autocast is None:
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)


def computes_in(train: Train) -> str:
    """The lowest precision used in a forward pass: "fp32" or "bf16"."""
    return "bf16" if "bf16" in (train.dtype, train.autocast) else "fp32"
