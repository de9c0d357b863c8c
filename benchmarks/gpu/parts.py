"""The parts, each in a process of its own with a time limit, and the file that keeps their results."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from align import files
from align.errors import EnvironmentFault, InputError
from benchmarks.harness import GPU
from benchmarks.model import OUT

ROOT = Path(__file__).parents[2]
BUDGET = 465.0
"""Seconds that one call takes at most, so that it ends within eight minutes; what was not reached by then lacks."""
SHORTEST = 20.0
"""No part is started with fewer seconds left."""
OWN = ("align", "benchmarks", "tests")


class Skipped(Exception):
    """This part cannot be run here; the message says what it needs."""


@dataclass(frozen=True)
class Part:
    """One part of the check."""

    name: str
    about: str
    run: Callable[[bool], dict[str, Any]]
    """Called in the part's process with whether shapes are tiny; returns what is kept. Imports what it needs itself."""
    seconds: float = 75.0
    """It is ended after so long."""


def _machine(tiny: bool) -> dict[str, Any]:
    from benchmarks.measure import machine, package_versions

    found = machine()
    if found["gpu"]:
        import torch

        found["gpu_bytes"] = torch.cuda.get_device_properties(0).total_memory
    return {"machine": found, "versions": package_versions()}


def _tests(tiny: bool) -> dict[str, Any]:
    from benchmarks.gpu.peers import gpu_tests

    return gpu_tests(tiny)


def _step(kind: str, model: str, rejected: int, tiny: bool) -> dict[str, Any]:
    from benchmarks.gpu.steps import measured

    return measured(kind, model, rejected, tiny)


def _trl(kind: str, rejected: int, tiny: bool) -> dict[str, Any]:
    from benchmarks.gpu.peers import trl

    return trl(kind, rejected, tiny)


def _vllm(tiny: bool) -> dict[str, Any]:
    from benchmarks.gpu.peers import vllm

    return vllm(tiny)


MACHINE = Part("machine", "device and versions", _machine, 60.0)
MODELS = {"llama": "1.2B Llama", "glm": "GLM-4-9B, LoRA"}
STEPS = {
    "sft": ("SFT", "sft", 0),
    **{f"dpo-{k}": (f"DPO, {k} rejected", "dpo", k) for k in (1, 3, 7, 15)},
    "reward": ("reward, 1 rejected", "reward", 1),
    "ppo": ("PPO", "ppo", 0),
}


def _parts() -> dict[str, Part]:
    parts = [Part("tests", "the tests that need a GPU", _tests, 120.0)]
    for model, words in MODELS.items():
        for name, (title, kind, rejected) in STEPS.items():
            parts.append(Part(f"{model}-{name}", f"{words}: {title}", partial(_step, kind, model, rejected)))
            if model == "llama" and kind in ("sft", "dpo"):
                parts.append(Part(f"{model}-{name}-trl", f"{words}: {title}, TRL", partial(_trl, kind, rejected)))
    parts.append(Part("vllm", "1.2B Llama: vLLM beside the SFT trainer", _vllm, 120.0))
    return {part.name: part for part in parts}


PARTS = _parts()


def main(arguments: Sequence[str]) -> int:
    """See the package. 1 when a part failed or lacks, 2 for wrong arguments or a file of another device's results, 3
    without a GPU."""
    if arguments[:1] == ["worker"]:
        name, out, tiny = arguments[1:]
        _work({MACHINE.name: MACHINE, **PARTS}[name], Path(out), tiny == "tiny")
        return 0
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"default: all of {' '.join(PARTS)}")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the results; parts that are in it are not run again")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only with --tiny")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: does the script itself work?")
    chosen = parser.parse_args(arguments)
    for unknown in [name for name in chosen.parts if name not in PARTS]:
        parser.error(f"no part {unknown}; there are {', '.join(PARTS)}")
    if chosen.device == "cpu" and not chosen.tiny:
        parser.error("--device cpu only shows that the script works: add --tiny")
    out = chosen.out or (OUT / "gpu-tiny.json" if chosen.tiny else GPU)
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        return _run(chosen.parts or list(PARTS), out, chosen.device, chosen.tiny)
    except (InputError, EnvironmentFault) as fault:
        print(fault, file=sys.stderr)
        return fault.exit_code


def _run(names: Sequence[str], out: Path, device: str, tiny: bool) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a part's process ends with this one
    ends = time.monotonic() + BUDGET
    about = in_own_process(MACHINE, device, tiny, MACHINE.seconds)
    if "error" in about or "skipped" in about:
        raise EnvironmentFault(f"the device cannot be asked: {about.get('skipped') or about['error']}")
    if device == "cuda" and not about["machine"]["gpu"]:
        raise EnvironmentFault("no GPU here, so nothing was measured", hint="run this where torch sees a CUDA device")
    results = _results(out, {"tiny": tiny, **{key: about[key] for key in ("machine", "versions")}})
    kept = results["parts"]
    lacking = [name for name in names if name not in kept]
    again = [name for name in names if name in kept and _unfinished(kept[name])]
    for name in [*lacking, *again]:
        part, left = PARTS[name], ends - time.monotonic()
        if left < SHORTEST:
            break
        began = time.monotonic()
        found = in_own_process(part, device, tiny, min(part.seconds, left))
        if found.pop("timed_out", False) and left < part.seconds:
            break  # it was this call that ended, not the part's own time
        found |= {"about": part.about, "seconds_taken": round(time.monotonic() - began, 1)}
        kept[name] = found
        files.write_json(out, results)
        print(f"{name:18} {found['seconds_taken']:6.1f} s  {_line(found)}", flush=True)
    left_out = [name for name in names if name not in kept]
    failed = [name for name in names if "error" in kept.get(name, {})]
    if failed:
        print(f"failed: {', '.join(failed)}; their errors are in {out}", file=sys.stderr)
    if left_out:
        print(f"not reached: {', '.join(left_out)}; the same command goes on with them", file=sys.stderr)
    return 1 if failed or left_out else 0


def _unfinished(found: Mapping[str, Any]) -> bool:
    return "error" in found or "skipped" in found


def _results(out: Path, made_on: dict[str, Any]) -> dict[str, Any]:
    """What is kept in ``out``, or new results. Raises InputError when it has those of another device or version."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    if not out.exists():
        return {"check": "gpu", "date": today, **made_on, "parts": {}}
    try:
        kept = dict(json.loads(out.read_text(encoding="utf-8")))
        same = {key: kept[key] for key in made_on} == made_on and isinstance(kept["parts"], dict)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{out}: no results of this check ({error!r})", hint="name another file with --out") from None
    if not same:
        what = f"{out}: results of another machine, other versions or other shapes"
        raise InputError(what, hint="name another file with --out, or remove this one")
    return kept


def _line(found: Mapping[str, Any]) -> str:
    if "skipped" in found:
        return f"skipped: {found['skipped']}"
    if "error" in found:
        return f"failed: {found['error'].strip().splitlines()[-1][:150]}"
    if "tokens_per_second" in found:
        return f"{found['tokens_per_second']:,.0f} tokens/s"
    return "done"


def in_own_process(part: Part, device: str, tiny: bool, seconds: float) -> dict[str, Any]:
    """What a part returns; ``{"skipped": reason}``; or ``{"error": text}`` when it failed, was killed or took longer
    than ``seconds`` (then with ``timed_out`` too)."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= {"TOKENIZERS_PARALLELISM": "false", "TORCHINDUCTOR_CACHE_DIR": str(OUT / "compiled")}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory(prefix="align-gpu-") as scratch:
        out, log = Path(scratch) / "result.json", Path(scratch) / "log"
        environment["TMPDIR"] = scratch  # what trainers write goes with it
        command = [sys.executable, "-m", "benchmarks", "gpu", "worker", part.name, str(out), "tiny" if tiny else "full"]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
            )
            try:
                code: int | None = process.wait(seconds)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(process)
        if code == 0 and out.exists():
            return dict(json.loads(out.read_text(encoding="utf-8")))
        text = log.read_text(encoding="utf-8", errors="replace")[-4000:]
    for path, words in ((scratch, "SCRATCH"), (str(ROOT), "."), (sys.prefix, "PYTHON"), (sys.base_prefix, "PYTHON")):
        text = text.replace(path, words)
    if code is None:
        return {"error": f"{text}\nended after its limit of {seconds:.0f} seconds", "timed_out": True}
    return {"error": text if code == 1 else f"{text}\nended with code {code}"}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and those that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _work(part: Part, out: Path, tiny: bool) -> None:
    """What a part's process does. A package that is not installed is a reason to skip; all else is an error."""
    try:
        found = part.run(tiny)
    except Skipped as skipped:
        found = {"skipped": str(skipped)}
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.split(".")[0] in OWN:
            raise
        found = {"skipped": f"needs {missing.name}, not installed"}
    except Exception:
        traceback.print_exc()
        _leave(1)
    out.write_text(json.dumps(found), encoding="utf-8")
    _leave(0)


def _leave(code: int) -> None:
    """End this process at once: threads and processes of an engine may not end by themselves."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
