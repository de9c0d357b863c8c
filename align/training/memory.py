"""Memory of a training process."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from align.batching.batch import Batch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the next allocation. By default it returns every large block to the kernel at
    once.

    A training step frees and allocates the same hundreds of megabytes again and again; fetching them page by page costs
    about 5 % of its time (SmolLM2-135M on two cores), and keeping them needs little memory as long as all layers keep
    their activations. Returns False where there is no glibc: nothing was changed then.
    """
    return _set({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1})


def return_freed_memory() -> bool:
    """Let glibc return every block of a megabyte and more to the kernel when it is freed, and what is free now.

    For gradient checkpointing, which is there to save memory: it frees and allocates blocks of so many sizes that kept
    ones lie between each other unused. With 8000 tokens, 8 layers of width 256 held 860 MB for 280 MB that were in use;
    returning them costs about a sixth of the time. And for a model that is divided among processes, whose layers are
    put together and let go of all the time: 62M parameters on two processes held 1,750 MB for 600 MB that were in use,
    and with this 840 MB. Returns False where there is no glibc: nothing was changed then.
    """
    changed = _set({_M_MMAP_MAX: 65536, _M_MMAP_THRESHOLD: 2**20, _M_TRIM_THRESHOLD: 2**20})
    if changed:
        ctypes.CDLL(None).malloc_trim(0)
    return changed


def _set(options: Mapping[int, int]) -> bool:
    """Settings of glibc's malloc, for the whole process."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all([bool(mallopt(option, value)) for option, value in options.items()])


def begin_stage() -> None:
    """Leave nothing of the stage before: what it freed goes back to the GPU, where other processes (vLLM's) can take
    it, and peak memory is counted anew."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):  # some containers do not let a process do that; then its whole life counts
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): VmHWM begins anew


def peak_memory_bytes() -> int:
    """Peak memory of this process since its stage began: of its GPU where there is one, resident memory otherwise."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    # getrusage's number would be wrong: a process inherits the peak of the process that started it.
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


@contextmanager
def told_with_errors(batch: Batch) -> Iterator[None]:
    """Adds to any error raised inside, such as running out of memory, on which micro-batch it happened."""
    try:
        yield
    except Exception as error:
        error.add_note(f"on a micro-batch of {batch}")
        raise
