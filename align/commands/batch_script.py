"""`align slurm`: a batch script for the machines that a recipe is meant for."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from align.errors import InputError
from align.recipe.load import LoadedRecipe

SAVES = 300
"""So many seconds before its time limit Slurm asks the processes to stop: they save a checkpoint and end."""


def batch_script(loaded: LoadedRecipe, arguments: Sequence[str]) -> str:
    """The text of a script for ``sbatch``: one process for each GPU of ``hardware``, started by ``srun``.

    Args:
        arguments: of ``align run``.

    Raises:
        InputError: the recipe says nothing of its hardware.
    """
    hardware = loaded.recipe.hardware
    if hardware is None:
        hint = "add a block such as `hardware: {gpus: 8, nodes: 1, memory_gb: 80}`"
        raise InputError(loaded.problem("hardware", "says which machines to ask for, and is missing", hint))
    options = {
        "job-name": loaded.recipe.name,
        "nodes": hardware.nodes,
        "ntasks-per-node": hardware.gpus or 1,
        **({"gpus-per-node": hardware.gpus} if hardware.gpus else {}),
        "signal": f"TERM@{SAVES}",
        "open-mode": "append",
    }
    lines = ["#!/bin/bash", *(f"#SBATCH --{name}={value}" for name, value in options.items())]
    lines += [
        "# Add what your cluster asks for: #SBATCH --partition=..., --account=..., --time=..., --cpus-per-task=...",
        f"# {SAVES} seconds before the time limit the run saves and ends; the same script, submitted again, goes on.",
        "# All machines must see this folder.",
        f"srun --kill-on-bad-exit=1 align run {shlex.join(arguments)}",
    ]
    return "\n".join(lines)
