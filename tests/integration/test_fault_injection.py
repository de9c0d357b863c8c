"""SQLite's anomaly test for the pipeline: fail the n-th file operation of a run, for n = 1, 2, 3, ...
until it completes.

Wherever a three-stage run is killed or its disk is full: the error is one of ours, whatever is visible verifies, and
the same command again ends with the same bytes as a run that was never disturbed, with nothing left over.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

STAGES = '''
from pathlib import Path
from typing import ClassVar, Literal
from align import files
from align.recipe.schema import Data, PolicyRef, Stage

class Toy(Stage):
    produces: ClassVar = "policy"
    implementation: ClassVar = "fault_stages:run"
    kind: Literal["fault_stages:Toy"]
    policy: PolicyRef | None = None
    data: Data
    rounds: int = 2

def run(spec, ctx):
    """Like a training run: checkpoints in `work`, published one over the other, and the result in `out`."""
    checkpoint = ctx.work / "checkpoint"
    start = int((checkpoint / "step").read_text()) if checkpoint.exists() else 0
    for step in range(start, spec.rounds):
        files.append_line(ctx.work / "metrics.jsonl", {"step": step})
        tmp = files.temporary(ctx.work)
        tmp.mkdir()
        (tmp / "step").write_text(str(step + 1))
        files.publish_folder(tmp, checkpoint)
    given = [files.digest_path(Path(ctx.resolve(source.path))) for source in spec.data]
    given.append(files.digest_path(Path(ctx.policy(spec.policy).path) / "config.json"))
    files.atomic_write(ctx.out / "config.json", files.digest_json([given, ctx.seed, spec.rounds]))
    (ctx.out / "weights").mkdir()
    (ctx.out / "weights" / "model.bin").write_bytes(bytes(range(256)) * spec.rounds)
'''

RECIPE = """
name: toy
model: base
stages:
  sft: {kind: "fault_stages:Toy", data: a.jsonl}
  dpo: {kind: "fault_stages:Toy", policy: "stage:sft", data: a.jsonl}
  ppo: {kind: "fault_stages:Toy", policy: "stage:dpo", data: a.jsonl}
"""

DRIVER = '''
"""Prints one line of JSON for each n. Every run is a fork of this process: as good as a new one, and much faster."""
import errno, io, itertools, json, os, shutil, sys
from pathlib import Path
from rich.console import Console
from align import files
from align.errors import AlignError
from align.pipeline import artifacts
from align.pipeline.runner import run_recipe
from align.pipeline.selection import Selection
from align.recipe.load import load_recipe

sys.path.insert(0, os.getcwd())
mode, scenario = sys.argv[1:]
first, changed = load_recipe("recipe.yaml"), load_recipe("recipe.yaml", ["stages.sft.rounds=3"])
os.fsync = lambda descriptor: None  # processes die here, the machine does not

def attempt(loaded, runs, n=None):
    """Run in a child; {code, error, fired}. The n-th operation fails."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        report = {"code": 0, "error": "", "fired": False}
        calls = itertools.count(1)
        def fault(operation, path):
            if next(calls) == n:
                if mode == "kill":
                    os._exit(137)
                report["fired"] = f"{operation} {path.name}"
                raise OSError(getattr(errno, mode), os.strerror(getattr(errno, mode)))
        files.fault = fault
        try:
            run_recipe(loaded, runs_dir=runs, console=Console(file=io.StringIO()), selection=Selection(replace=True))
        except AlignError as error:
            report |= {"code": error.exit_code, "error": str(error)}
        except BaseException as error:
            report |= {"code": 1, "error": repr(error)}
        os.write(writer, json.dumps(report).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        data = pipe.read()
    _, status = os.wait()
    return json.loads(data) if data else {"code": os.waitstatus_to_exitcode(status), "error": "", "fired": True}

def content(runs):
    """All that must be equal in the end."""
    found = {}
    for stage in sorted((runs / "toy" / "stages").glob("[!.]*")):
        manifest = json.loads((stage / "manifest.json").read_text())
        found[stage.name] = [manifest["identity"], manifest["files"]]
        found[stage.name].append({p.name: p.read_bytes().hex() for p in stage.rglob("*") if p.is_file() and p.name != "manifest.json"})
    return found

def visible_problems(runs):
    return [str(p) for stage in sorted((runs / "toy" / "stages").glob("[!.]*")) for p in artifacts.verify(stage)]

def leftovers(runs):
    hidden = [p for p in runs.rglob(".*") if p.name not in (".cache", ".align.lock")]
    return sorted(p.name for p in [*hidden, *(runs / "toy" / "work").glob("*")])

artifacts.package_versions()  # slow to find out, remembered for the children
before, clean = Path("before"), Path("clean")
attempt(first, before)
loaded = first if scenario == "fresh" else changed
if scenario == "changed":
    shutil.copytree(before, clean)
assert attempt(loaded, clean)["code"] == 0
expected = content(clean)
for n in itertools.count(1):
    runs = Path(f"runs-{n}")
    if scenario == "changed":
        shutil.copytree(before, runs)
    report = attempt(loaded, runs, n)
    report |= {"n": n, "problems": visible_problems(runs), "temporary": [] if mode == "kill" else leftovers(runs)}
    report["again"] = attempt(loaded, runs)
    report |= {"equal": content(runs) == expected, "leftovers": leftovers(runs)}
    shutil.rmtree(runs)
    print(json.dumps(report), flush=True)
    if not report["fired"]:
        break
'''


def reports(root: Path, mode: str, scenario: str) -> list[dict[str, Any]]:
    (root / "fault_stages.py").write_text(STAGES)
    (root / "recipe.yaml").write_text(RECIPE)
    (root / "driver.py").write_text(DRIVER)
    (root / "a.jsonl").write_text('{"prompt": "a"}\n')
    (root / "base").mkdir()
    (root / "base" / "config.json").write_text("{}")
    command = [sys.executable, "driver.py", mode, scenario]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def fast_folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where the machine offers it: some thousand renames take a minute on a disk."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.mark.parametrize("scenario", ["fresh", "changed"])
@pytest.mark.parametrize("mode", ["kill", "ENOSPC"])
def test_every_point_of_failure(fast_folder: Path, mode: str, scenario: str) -> None:
    """``changed`` replaces the results of an earlier run, so that moving the old one aside is
    interrupted as well."""
    points = reports(fast_folder, mode, scenario)
    *faults, last = points
    assert len(faults) > 90
    assert (last["fired"], last["code"]) == (False, 0)
    for report in points:
        assert report["problems"] == [], report
        assert report["again"]["code"] == 0, report
        assert report["equal"], report
        assert report["leftovers"] == [], report
    if mode == "kill":
        assert {report["code"] for report in faults} == {137}
    else:
        # What cannot be removed is a warning and no failure; all else is a fault of the environment, and says what.
        assert all(report["code"] == 3 or is_removal(report) for report in faults), faults
        assert all("No space left on device" in report["error"] for report in faults if report["code"] == 3)


def is_removal(report: dict[str, Any]) -> bool:
    operation, _, name = str(report["fired"]).partition(" ")
    return report["code"] == 0 and (operation == "remove" or (operation == "rename" and name.startswith(".tmp-")))
