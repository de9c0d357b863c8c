"""Memory of a training process on a CPU."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed for the next allocation, where it would give every large block back to the kernel at once.

    A training step frees and allocates the same hundreds of megabytes again and again; fetching them page by page costs about 5 % of its
    time (SmolLM2-135M on two cores), and keeping them costs next to no memory. False where there is no glibc: then nothing was changed.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
