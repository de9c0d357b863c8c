"""Compiles ``guard.cpp`` and loads it into this process, which must not have imported torch yet. Imports no torch."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")
FOLDER = Path(__file__).parents[2] / ".pytest_cache" / "sim"
"""Compiled once for each version of torch and of the source."""


def missing() -> str | None:
    """What this machine lacks for simulating; None when it has everything."""
    if compiler() is None:
        return "no C++ compiler (g++, clang++ or c++) to build the simulated device with"
    if sys.platform != "linux":
        return "the simulated device is built for Linux"
    if not (_torch() / "include").is_dir():
        return "torch came without its C++ headers"
    return "torch has a CUDA of its own" if (_torch() / "lib" / "libtorch_cuda.so").exists() else None


def compiler() -> str | None:
    """The C++ compiler of this machine."""
    return next((path for name in ("g++", "clang++", "c++") if (path := shutil.which(name))), None)


def built() -> Path:
    """The compiled library, made if it is not there. Takes about ten seconds."""
    text = SOURCE.read_text() + importlib.metadata.version("torch") + sys.version
    library = FOLDER / f"guard-{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        torch, made = _torch(), library.with_suffix(f".{os.getpid()}")
        options = ["-shared", "-fPIC", "-std=c++20", f"-I{torch}/include", "-o", str(made), str(SOURCE)]
        subprocess.run(
            [str(compiler()), *options, f"-L{torch}/lib", "-lc10", "-ltorch_cpu"], check=True, capture_output=True
        )
        made.rename(library)  # whole or not at all: several test processes may build it at the same time
    return library


def load() -> None:
    """Give this process a CUDA that does nothing."""
    if "torch" in sys.modules:
        raise RuntimeError("the simulated device must be loaded before torch is imported")
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(_torch() / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(built()), mode=ctypes.RTLD_GLOBAL)


def _torch() -> Path:
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent
