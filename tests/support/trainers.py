"""What trainers of preferences and grades are made of in tests, and their first step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from align.batching.batch import Batch
from align.batching.loader import Loader, plan_steps
from align.data.tree import Tree
from align.recipe.schema import Train
from align.training.launch import Ranks
from align.training.trainer import Trainer, TrainerArguments


def loaders(data: Sequence[Tree], held_out: Sequence[Tree], train: Train) -> tuple[Loader, list[Batch]]:
    """The training data in the order of a fixed seed, and the micro-batches of the held-out data."""
    plan = plan_steps([tree.size for tree in data], seed=1, epochs=train.epochs, batch_size=train.batch_size)

    def loader(trees: Sequence[Tree]) -> Loader:
        return Loader(trees.__getitem__, plan, train.microbatch_tokens, train.layout)

    return loader(data), loader(held_out).batches(range(len(held_out)))


def arguments(net: nn.Module, train: Train, work: Path, name: str) -> TrainerArguments:
    """Of one process that prints nothing. The work folder is made."""
    work.mkdir(parents=True, exist_ok=True)
    return TrainerArguments(
        model=net, train=train, work=work, name=name, seed=2, console=Console(quiet=True), ranks=Ranks()
    )


def first_step(run: Trainer) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Metrics and gradients of the first step; the optimiser does not move."""
    gradients: dict[str, torch.Tensor] = {}
    run.optimizer.step = lambda: gradients.update(  # type: ignore[method-assign]
        {name: p.grad.clone() for name, p in run.parameters.items() if p.grad is not None}
    )
    run.model.train()
    return run.optimizer_step(next(iter(run.steps()))), gradients
