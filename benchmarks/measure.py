"""The clock around optimiser steps, the memory they needed, and where that was."""

from __future__ import annotations

import os
import platform
import resource
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "datasets", "numpy")


class Recorder:
    """Times optimiser steps: ``begin`` right before the first forward pass of a step, ``end`` right after the optimiser
    has moved.

    The first step warms up; peak memory is counted from its beginning, so loading the model leaves no trace in it.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.losses: list[float] = []
        self._parts: list[Any] = []
        self._began = self._cpu_began = 0.0
        self._peak_from_start = False

    def begin(self) -> None:
        """A step begins."""
        if not self.seconds:
            self._peak_from_start = not reset_peak_memory()
        self._parts = []
        _synchronize()
        self._began, self._cpu_began = time.perf_counter(), time.process_time()

    def add(self, loss: Any) -> None:
        """A micro-batch's share of the step's loss; a tensor is read only after the clock has stopped."""
        self._parts.append(loss)

    def end(self) -> None:
        """The step is done."""
        _synchronize()
        self.seconds.append(time.perf_counter() - self._began)
        self.cpu_seconds.append(time.process_time() - self._cpu_began)
        self.losses.append(sum(float(part) for part in self._parts))

    def result(self) -> dict[str, Any]:
        """What is kept of a run: seconds of the timed steps (on the clock, and of CPU over all threads), every loss,
        peak memory in bytes.

        Raises:
            RuntimeError: there was no step after the warm-up.
        """
        if len(self.seconds) < 2:
            raise RuntimeError(
                f"{len(self.seconds)} steps were run; the first is a warm-up, so there is nothing to report"
            )
        return {
            "warm_up_seconds": self.seconds[0],
            "seconds": self.seconds[1:],
            "cpu_seconds": self.cpu_seconds[1:],
            "losses": self.losses,
            "peak_bytes": peak_memory(),
            "peak_includes_loading": self._peak_from_start,
            "gpu_peak_bytes": gpu_peak_memory(),
        }


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak_memory() -> bool:
    """Start counting peak memory anew. False where the kernel does not let a process do that (then it counts from the
    process's start)."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory() -> int:
    """Peak resident memory of this process in bytes (VmHWM, or getrusage where there is no /proc)."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def gpu_peak_memory() -> int | None:
    """Peak memory of the tensors on the GPU in bytes; None without one."""
    import torch

    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else None


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """The machine, without its name."""
    import torch

    return {
        "cpu": _cpu(),
        "cores": cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.processor() or "unknown",
    )


def versions() -> dict[str, str]:
    """Python, the package itself, and what it and the peers stand on."""
    import align

    return {"python": platform.python_version(), "align": align.__version__, **package_versions()}


def package_versions() -> dict[str, str]:
    """Of those of :data:`PACKAGES` that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
