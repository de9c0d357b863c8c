"""Runs of processes that each hold a part of the model, which are ended and go on. :func:`carry_out` runs in each process of a
group."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from align.stages.sft import SftTrainer
from align.training.launch import Ranks, leave, ranks
from align.training.optim import optimizer_tensors
from align.training.trainer import Trainer
from tests.support.sharded import lora, of, sft
from tests.support.tiny import tiny

STEPS = 6
"""Of a whole run; a checkpoint is saved after every second."""


class Killed(Exception):
    """Ends a run between two steps."""


@dataclass(frozen=True)
class Job:
    """A run that begins, or goes on from the checkpoint that it finds."""

    work: str
    sharding: str
    stop: int | None = None
    """It is ended after this step."""
    adapters: bool = False
    """With dropout, which is drawn at random."""


def saving(folder: Path, job: Job, group: Ranks) -> SftTrainer:
    """The trainer of a job."""
    net = (lambda: lora(tiny("glm4"), dropout=0.2)) if job.adapters else of("glm4")
    placement = None if job.sharding == "none" else group.placement_for(job.sharding)  # type: ignore[arg-type]
    train = {"batch_size": 4, "epochs": 2, "save_steps": 2, "eval_steps": 2, "load_best_model": True}
    run = sft(folder / job.work, group, placement, net=net, loss="token_mean", **train)
    assert run.total_steps == STEPS + 1
    return run


def whole_state(run: Trainer) -> dict[str, Tensor]:
    """Weights and moments, whole."""
    tensors = {**run.parameters, **optimizer_tensors(run.optimizer, run.parameters)}
    return {name: tensor.clone() for name, tensor in run.placement.state(tensors).items()}


def carry_out(folder: Path, jobs: Sequence[Job]) -> None:
    """Carry out jobs, in each process of a group. The first writes what each run resumed from, and what it ended with,
    as ``WORK-resumed-N.safetensors`` and ``WORK-ended-N.safetensors`` with N processes."""
    torch.set_num_threads(1)
    group = ranks()
    for job in jobs:
        run = saving(folder, job, group)
        if run.resume() is not None:
            keep(folder / f"{job.work}-resumed-{group.world}.safetensors", whole_state(run), group)
        run.after_step = partial(_stop_after, run, job.stop)  # type: ignore[method-assign]
        with suppress(Killed):
            run.fit()
        keep(folder / f"{job.work}-ended-{group.world}.safetensors", whole_state(run), group)
    leave()


def _stop_after(run: Trainer, stop: int | None, metrics: object) -> None:
    if run.progress.step == stop:
        raise Killed


def keep(path: Path, tensors: dict[str, Tensor], group: Ranks) -> None:
    if group.first:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    group.barrier()
