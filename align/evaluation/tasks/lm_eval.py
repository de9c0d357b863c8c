"""lm-evaluation-harness, where it is installed: it is handed a model folder and the names of its tasks, and its numbers
are read."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.errors import EnvironmentFault, InputError


def require_harness() -> None:
    """Raise EnvironmentFault when lm-evaluation-harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        hint = "pip install 'alignkit[eval]', or remove `lm_eval_tasks`"
        raise EnvironmentFault("lm_eval_tasks need the Python package lm-eval, which is not installed", hint=hint)


def run_tasks(
    folder: Path | str, adapter: Path | None, tasks: Sequence[str], *, device: str, seed: int
) -> dict[str, dict[str, float]]:
    """``{task, metric: {mean, stderr}}`` of a model, by the harness's own defaults and with the model's chat template.

    Args:
        folder: of the whole model, or of the base of ``adapter``; or a hub id.

    Raises:
        InputError: the harness cannot run a task.
    """
    from lm_eval import simple_evaluate

    arguments: dict[str, Any] = {"pretrained": str(folder), "trust_remote_code": False}
    if adapter is not None:
        arguments["peft"] = str(adapter)
    try:
        found = simple_evaluate(
            model="hf",
            model_args=arguments,
            tasks=list(tasks),
            device=device,
            random_seed=seed,
            apply_chat_template=True,
            log_samples=False,
        )
    except Exception as error:  # of somebody else's program, most often a task that it does not know or cannot download
        raise InputError(
            f"lm-evaluation-harness failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from error
    return read_results(found or {})


def read_results(found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The harness's ``results``: ``{"mmlu": {"acc,none": 0.6, "acc_stderr,none": 0.01}}`` as ``{"mmlu/acc": {mean,
    stderr}}``."""
    table: dict[str, dict[str, float]] = {}
    for task, metrics in found.get("results", {}).items():
        for key, value in metrics.items():
            name, _, filtered = key.partition(",")
            if name.endswith("_stderr") or not filtered or not isinstance(value, (int, float)):
                continue
            label = f"{task}/{name}" + (f" ({filtered})" if filtered != "none" else "")
            table[label] = {"mean": float(value)}
            stderr = metrics.get(f"{name}_stderr,{filtered}")
            if isinstance(stderr, (int, float)):
                table[label]["stderr"] = float(stderr)
    return table
