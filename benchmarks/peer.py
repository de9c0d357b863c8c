"""TRL's trainers, as they are, with a clock around their optimiser step.

They get the same tokens (already encoded), the same optimiser, and rows sorted by length inside each step, so that they
pad as little as their batch size allows. Gradient checkpointing and bf16, both on by default, are off; nothing is
logged, saved or reported.
"""

from __future__ import annotations

import tempfile
from typing import Any

from benchmarks.measure import Recorder
from benchmarks.model import BETAS, EPSILON, LEARNING_RATE, MAX_GRAD_NORM, device


def recorded(trainer: type, recorder: Recorder) -> Any:
    """A TRL trainer class whose steps are recorded."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            recorder.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            recorder.end()

    class Recorded(trainer):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, callbacks=[Clock()], **kwargs)

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            recorder.add(loss)
            return loss

    return Recorded


def arguments(per_device: int, rows_per_step: int) -> dict[str, Any]:
    """Training arguments. A last, smaller micro-batch and a step of fewer of them are handled by the trainer."""
    return {
        "output_dir": tempfile.mkdtemp(prefix="align-bench-"),
        "per_device_train_batch_size": per_device,
        "gradient_accumulation_steps": -(-rows_per_step // per_device),
        "train_sampling_strategy": "sequential",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "adam_epsilon": EPSILON,
        "weight_decay": 0.0,
        "max_grad_norm": MAX_GRAD_NORM,
        "optim": "adamw_torch_fused",
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": device() == "cpu",
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "report_to": "none",
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
