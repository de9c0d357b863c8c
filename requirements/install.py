"""Makes .venv and installs the pinned packages into it: ``python3 requirements/install.py``, or ``make setup``.

Needs Python 3.11+ with pip, and no compiler. A second call does nothing: the stamp in .venv holds the digest of all
that decides what gets installed. On a machine with an NVIDIA GPU it installs the pinned list of CUDA builds instead of
the one for the CPU. ``cpu`` or ``cuda`` as an argument says which, where an image is built for another machine.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / ".installed"
PINS = ROOT / "requirements" / "cpu.txt"
CUDA_PINS = ROOT / "requirements" / "cuda.txt"
INPUTS = (PINS, CUDA_PINS, ROOT / "pyproject.toml", Path(__file__))
# pip says this for every search location it cannot read; nothing is wrong when the package is found elsewhere.
NOISE = re.compile(r"Location .* is ignored|^\[notice\]|^\s*$")
INPUT = 2  # the exit code for a mistake in the command
ENVIRONMENT = 3  # the exit code for what the machine lacks, as everywhere in align


def main(arguments: Sequence[str] = ()) -> int:
    if sys.version_info < (3, 11):  # noqa: UP036, what an older Python gets told
        print(
            f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}; name another: make setup"
            " PYTHON=/path/to/python3.11"
        )
        return ENVIRONMENT
    if list(arguments) not in ([], ["cpu"], ["cuda"]):
        print(f"{' '.join(arguments)}: the only argument is cpu or cuda; without one it is cuda where nvidia-smi is")
        return INPUT
    cuda = "cuda" in arguments or (not arguments and shutil.which("nvidia-smi") is not None)
    # A moved checkout must not run the old one's code
    inputs = [path.read_bytes() for path in INPUTS] + [f"{ROOT} {cuda}".encode()]
    digest = hashlib.sha256(b"".join(inputs)).hexdigest()
    if STAMP.exists() and STAMP.read_text() == digest and PYTHON.exists():
        return 0
    started = time.monotonic()
    code = make_venv() or (install_cuda() if cuda else install_cpu())
    if code == 0:
        STAMP.write_text(digest)
        print(f"installed into .venv in {time.monotonic() - started:.0f} s", flush=True)
    return code


def make_venv() -> int:
    """Creates .venv with pip in it. Keeps one that works: pip brings it up to date."""
    if PYTHON.exists() and subprocess.run([str(PYTHON), "-m", "pip", "--version"], capture_output=True).returncode == 0:
        return 0
    made = subprocess.run([sys.executable, "-m", "venv", str(VENV)], capture_output=True, text=True)
    if made.returncode == 0:
        return 0
    # Debian's Python has no ensurepip: then the pip that is there puts one into the environment.
    bare = subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(VENV)])
    if bare.returncode != 0:
        return ENVIRONMENT
    outer = [sys.executable, "-m", "pip", "--python", str(PYTHON)]
    return report(*run_pip(["pip"], outer))


def install_cpu() -> int:
    """The pinned list, torch first: it is the one that may not be found, and that should show before anything is
    downloaded."""
    pins = [line for line in PINS.read_text().splitlines() if line and not line.startswith("#")]
    torch = next(pin for pin in pins if pin.startswith("torch=="))
    index = os.environ.get("TORCH_INDEX", "")
    say = f"installing {len(pins)} packages into .venv (about 3 GB and two minutes)"
    code, errors = run_pip(["--no-deps", torch, *(["--extra-index-url", index] if index else [])], say=say)
    if any("No matching distribution" in line for line in errors):
        advice = (
            f"nor does {index} have it"
            if index
            else "set TORCH_INDEX to the CPU index URL shown on pytorch.org's Get Started page"
        )
        print(f"pip does not find {torch}; {advice}", flush=True)
        return ENVIRONMENT
    if code != 0:
        return report(code, errors)
    code, errors = run_pip(["--no-deps", "-r", str(PINS)], total=len(pins))
    if code == 0:
        code, errors = run_pip(["--no-deps", "--no-build-isolation", "-e", str(ROOT)])
    return report(code, errors)


def install_cuda() -> int:
    """The pinned list, whose resolution was checked but whose packages were never run here."""
    pins = [line for line in CUDA_PINS.read_text().splitlines() if line and not line.startswith("#")]
    say = (
        f"NVIDIA GPU found: installing {len(pins)} packages with the CUDA builds into .venv (about 4.2 GB to download)"
    )
    code, errors = run_pip(["--no-deps", "-r", str(CUDA_PINS)], total=len(pins), say=say)
    if code == 0:
        code, errors = run_pip(["--no-deps", "--no-build-isolation", "-e", str(ROOT)])
    return report(code, errors)


def run_pip(arguments: list[str], pip: list[str] | None = None, total: int = 0, say: str = "") -> tuple[int, list[str]]:
    """Runs ``pip install``. Prints ``say`` once pip has found a package, and how many of ``total`` it has collected.

    Returns pip's exit code and what it printed.
    """
    pip = pip or [str(PYTHON), "-m", "pip"]
    command = [*pip, "install", "--no-input", "--disable-pip-version-check", "--progress-bar", "off", *arguments]
    collected, lines = 0, []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if say and line.lstrip().startswith(
                ("Processing ", "Downloading ", "Using cached ", "Requirement already")
            ):
                print(say, flush=True)
                say = ""
            if total and line.startswith(("Collecting ", "Processing ", "Requirement already")):
                collected += 1
                if collected % 40 == 0:
                    print(f"  {collected} of {total} collected", flush=True)
            if total and line.startswith("Installing collected packages"):
                print("  unpacking", flush=True)
            if not NOISE.search(line):
                lines.append(line.rstrip())
    return process.returncode, lines


def report(code: int, lines: list[str]) -> int:
    """Prints what pip said when it failed: the whole error, not its thousand lines of progress."""
    if code == 0:
        return 0
    wrong = [i for i, line in enumerate(lines) if line.startswith(("ERROR", "error", "  error"))]
    print("\n".join(lines[wrong[0] if wrong else -20 :]), file=sys.stderr)
    print("the installation failed; nothing is lost: make setup goes on from here", file=sys.stderr)
    return ENVIRONMENT


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
