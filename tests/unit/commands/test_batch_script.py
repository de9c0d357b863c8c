"""`align slurm`: a batch script for the machines that a recipe is meant for."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from align.commands.batch_script import batch_script
from align.errors import InputError
from align.recipe.load import load_recipe


def options(script: str) -> dict[str, str]:
    """What the script asks Slurm for."""
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH ")]
    return dict(line.split("=", 1) for line in lines)


def test_as_many_tasks_as_gpus() -> None:
    """And the command as it was given, with blanks quoted."""
    loaded = load_recipe("glm4_sft", ["hardware.nodes=4"])
    script = batch_script(loaded, ["glm4_sft", "hardware.nodes=4", "stages.sft.data=my rows.jsonl"])
    found = options(script)
    assert [found[name] for name in ("nodes", "ntasks-per-node", "gpus-per-node")] == ["4", "8", "8"]
    assert found["job-name"] == "glm4-sft" and found["signal"].startswith("TERM@")
    last = shlex.split(script.splitlines()[-1])
    assert last[-5:] == ["align", "run", "glm4_sft", "hardware.nodes=4", "stages.sft.data=my rows.jsonl"]
    assert "--nproc" not in script, "srun starts the processes"
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_a_machine_without_gpus_is_one_task() -> None:
    found = options(batch_script(load_recipe("glm4_sft", ["hardware={memory_gb: 64}"]), ["glm4_sft"]))
    assert found["ntasks-per-node"] == "1" and "gpus-per-node" not in found


def test_a_recipe_that_names_no_machine(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="hardware: says which machines to ask for"):
        batch_script(load_recipe("sft"), ["sft"])
