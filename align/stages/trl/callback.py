"""A callback for TRL's trainers: it records metrics, reacts to signals, stops at numbers that are not finite, and seals
checkpoints."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import constants
from transformers import TrainerCallback

from align import files
from align import sealed as kept
from align.errors import TrainingFault
from align.signals import stop_requested
from align.stages.context import StageContext
from align.training.checkpoint import SAVE_SECONDS
from align.training.metrics import SILENCE_S, MetricsLog

_NOTE = "align.json"
_log = logging.getLogger("align")
_TRAINING_ARGS = "training_args.bin"
_SPEED = ("runtime", "samples_per_second", "steps_per_second", "epoch")


@dataclass(frozen=True)
class TrlCheckpoint:
    """A checkpoint that was verified to be as it was written."""

    folder: Path
    step: int
    seconds: float
    """Seconds of training up to this checkpoint."""


def newest_checkpoint(folder: Path) -> TrlCheckpoint | None:
    """The newest intact checkpoint of a trainer; None when there is none. Checkpoints that were not finished, or were
    changed afterwards, are removed, with a warning for those that had been finished.

    transformers loads safetensors, JSON, and tensors with torch's ``weights_only`` loader, which creates no other
    objects. A checkpoint's only pickle of Python objects is not loaded, and is not kept here.
    """
    folders = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in folders:
        problems = kept.damage(path, [_NOTE])
        if not problems:
            seconds = float(json.loads((path / _NOTE).read_bytes())["seconds"])
            return TrlCheckpoint(path, int(path.name.rpartition("-")[2]), seconds)
        if (path / kept.MANIFEST).exists():
            _log.warning("skipped a damaged checkpoint: %s", problems[0])
        files.remove_folder(path)
    return None


class TrlCallback(TrainerCallback):
    """Writes what a trainer logs, and stops it after a step when a signal came."""

    def __init__(self, ctx: StageContext, since: TrlCheckpoint | None) -> None:
        self._ctx = ctx
        path = ctx.work / "metrics.jsonl"
        self._log = MetricsLog(
            path, resumed_at=since.step if since else None, report_to=[], run_name=ctx.name, config={}
        )
        path.touch()
        self._before = since.seconds if since else 0.0
        self._printed = since.step if since else 0
        self._started: float | None = None
        self._saved_at = self._said = time.monotonic()
        self.tokens: int | None = None
        """Number of tokens trained on, if the trainer counts them."""

    @property
    def seconds(self) -> float:
        """Seconds of training, interrupted attempts included."""
        return self._before + (time.monotonic() - self._started if self._started is not None else 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        self._started = time.monotonic()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the clock."""
        self._before, self._started = self.seconds, None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save and stop when a signal asked for it; save when the last checkpoint is long ago."""
        if stop_requested() is not None:
            control.should_save = control.should_training_stop = True
        elif time.monotonic() - self._saved_at >= SAVE_SECONDS:
            control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        """Write a row of ``metrics.jsonl``. Raises TrainingFault for a loss or a gradient that is not finite."""
        if logs is None or "train_runtime" in logs:  # a summary of what was logged before
            return
        numbers = {
            name: float(value)
            for name, value in logs.items()
            if isinstance(value, (int, float)) and not _is_speed(name)
        }
        for name in ("loss", "grad_norm"):
            if not math.isfinite(numbers.get(name, 0.0)):
                raise TrainingFault(
                    f"step {state.global_step}: {name} is {numbers[name]}; nothing of this stage is kept as its result"
                )
        tokens = numbers.pop("num_tokens", None)
        self.tokens = self.tokens if tokens is None else int(tokens)
        finite = {_metric(name): value for name, value in numbers.items() if math.isfinite(value)}
        self._log.write(state.global_step, finite)
        self._print(state, finite)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the manifest of a complete checkpoint."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        (folder / _TRAINING_ARGS).unlink(missing_ok=True)
        files.write_json(folder / _NOTE, {"seconds": self.seconds})
        kept.seal(folder)
        self._saved_at = time.monotonic()

    def _print(self, state: Any, values: Mapping[str, float]) -> None:
        step, total = state.global_step, state.max_steps
        late = time.monotonic() - self._said >= SILENCE_S
        if "loss" in values and (step >= total or step - self._printed >= max(1, total // 10) or late):
            self._printed, self._said = step, time.monotonic()
            shown = "  ".join(f"{name} {values[name]:.4f}" for name in ("loss", "reward") if name in values)
            self._ctx.console.print(f"{self._ctx.name}  step {step}/{total}  {shown}", highlight=False)


def _is_speed(name: str) -> bool:
    return name.startswith("eval_") and name.removeprefix("eval_") in _SPEED


def _metric(name: str) -> str:
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else name


def held_out(evaluated: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of an evaluation, without those about its speed."""
    kept = {name.removeprefix("eval_"): value for name, value in evaluated.items() if not _is_speed(name)}
    numbers = {
        name: float(value)
        for name, value in kept.items()
        if isinstance(value, (int, float)) and name not in (*_SPEED, "num_tokens")
    }
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


@contextmanager
def sealed() -> Iterator[None]:
    """Inside, nothing is read from or sent to the hub, and `datasets` shows no progress bars."""
    before = constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_TELEMETRY
    bars = datasets.are_progress_bars_disabled()
    constants.HF_HUB_OFFLINE = constants.HF_HUB_DISABLE_TELEMETRY = True
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_TELEMETRY = before
        if not bars:
            datasets.enable_progress_bars()
