"""Our trainers, as they are, with a clock around their optimiser step."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness import Setting, Work
from benchmarks.measure import Recorder
from benchmarks.model import BETAS, EPSILON, LEARNING_RATE, MAX_GRAD_NORM, encoder, policy

if TYPE_CHECKING:
    from align.training.trainer import TrainerArguments


def timed(stage: type, recorder: Recorder) -> Any:
    """A trainer class whose steps are recorded."""

    class Timed(stage):  # type: ignore[misc]
        def optimizer_step(self, micro_batches: Any) -> dict[str, float]:
            recorder.begin()
            metrics: dict[str, float] = super().optimizer_step(micro_batches)
            recorder.add(metrics["loss"])
            recorder.end()
            return metrics

    return Timed


def loader(work: Work, setting: Setting) -> Any:
    """The work's steps in our loader."""
    import numpy as np

    from align.batching.loader import Loader, StepPlan

    bounds = np.array([0, *itertools.accumulate(len(step) for step in work.steps)])
    plan = StepPlan(np.array([i for step in work.steps for i in step]), bounds, steps_per_epoch=1)
    return Loader(
        work.trees.__getitem__, plan, setting["microbatch_tokens"], setting["layout"], pad_id=encoder().pad_id
    )


def arguments(work: Work, setting: Setting) -> TrainerArguments:
    """The arguments that every trainer of ours takes. Its log goes to a temporary folder."""
    from rich.console import Console

    from align.recipe.schema import Train
    from align.training.launch import ranks
    from align.training.trainer import TrainerArguments

    train = Train(
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        warmup_ratio=0.0,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_epsilon=EPSILON,
        max_grad_norm=MAX_GRAD_NORM,
        layout=setting["layout"],
        microbatch_tokens=setting["microbatch_tokens"],
    )
    folder = Path(tempfile.mkdtemp(prefix="align-bench-"))
    console = Console(quiet=True)
    return TrainerArguments(
        model=policy(), train=train, work=folder, name="bench", seed=0, console=console, ranks=ranks()
    )
