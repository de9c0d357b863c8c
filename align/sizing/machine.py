"""The machine's memory, GPUs and cores, found without torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from align.files import free_space
from align.recipe.schema import Hardware


@dataclass(frozen=True)
class Machine:
    """The resources of a machine."""

    name: str
    """Description for messages."""
    device: str
    """"cpu" or "cuda"."""
    units: int
    """GPUs of all nodes together, or the cores of this CPU."""
    memory: float | None
    """Bytes of one GPU, or of the whole machine for "cpu". None when unknown."""
    disk: float | None
    """Free bytes for the run folder; None when it should not be checked."""
    here: bool
    """Is it this machine, or one that a recipe describes?"""


def this_machine(runs_dir: Path) -> Machine:
    """The machine that this program runs on; disk space is that of ``runs_dir``."""
    disk = float(free_space(runs_dir))
    gpus = gpu_memory()
    if gpus:
        return Machine(
            f"this machine ({len(gpus)} x {min(gpus) / 1e9:.0f} GB GPU)",
            "cuda",
            len(gpus),
            float(min(gpus)),
            disk,
            True,
        )
    memory = cpu_memory()
    name = f"this machine ({os.cpu_count()} cores{f', {memory / 1e9:.0f} GB' if memory else ''}, no GPU)"
    return Machine(name, "cpu", os.cpu_count() or 1, memory, disk, True)


def machine_for(hardware: Hardware) -> Machine:
    """The machine that a recipe is meant for."""
    disk = None if hardware.disk_gb is None else hardware.disk_gb * 1e9
    nodes = f"{hardware.nodes} x " if hardware.nodes > 1 else ""
    if hardware.gpus:
        name = f"{nodes}{hardware.gpus} x {hardware.memory_gb:g} GB GPU (the recipe's `hardware`)"
        return Machine(name, "cuda", hardware.gpus * hardware.nodes, hardware.memory_gb * 1e9, disk, False)
    name = f"{nodes}a machine of {hardware.memory_gb:g} GB without GPU (the recipe's `hardware`)"
    return Machine(name, "cpu", os.cpu_count() or 1, hardware.memory_gb * 1e9, disk, False)


def cpu_memory() -> float | None:
    """Bytes of this machine, or of the container if that is limited; None when Linux's files are absent."""
    meminfo = Path("/proc/meminfo")
    match = re.search(r"MemTotal:\s+(\d+) kB", meminfo.read_text()) if meminfo.exists() else None
    if match is None:
        return None
    total = int(match[1]) * 1024.0
    for limit in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if limit.exists() and (text := limit.read_text().strip()).isdigit():
            total = min(total, float(text))
    return total


def processes_here(processes: int) -> int:
    """How many of a run's ``processes`` this machine has, as their launcher says (LOCAL_WORLD_SIZE); all of them when
    it says nothing."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", processes))


def gpu_memory() -> list[int]:
    """Bytes of each NVIDIA GPU; empty when there is none, or no driver to ask."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    query = [command, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10)
    except subprocess.TimeoutExpired:  # a driver that hangs counts as none
        return []
    return [int(line) * 2**20 for line in answer.stdout.split() if line.isdigit()] if answer.returncode == 0 else []
