"""A run of the command line that is stopped, or cannot go on: exit codes, and what the same command does
next."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from align.pipeline.runner import run_recipe
from align.recipe.load import load_recipe

STAGE = """
import os
import time
from pathlib import Path
from typing import ClassVar, Literal
from align import files
from align.errors import Interrupted
from align.recipe.schema import Data, Stage
from align.signals import stop_requested

class Slow(Stage):
    produces: ClassVar = "policy"
    implementation: ClassVar = "{module}:run"
    kind: Literal["{module}:Slow"]
    data: Data

def run(spec, ctx):
    first = os.environ.get("RANK", "0") == "0"  # the process that writes, as in every stage; another may start when this one has ended
    if first:
        (ctx.out / "half").write_text("x")
    if Path("memory").exists():
        raise MemoryError("no more")
    files.append_line(ctx.work / "metrics.jsonl", {{"step": 1}})
    print("ready\\n", end="", flush=True)  # one piece: with PYTHONUNBUFFERED two processes could write into each other's lines
    while not Path("go").exists():
        if Path("talks").exists():
            print("and on", flush=True)
        if stop_requested() is not None:
            print("asked", flush=True)
            if Path("polite").exists():
                raise Interrupted(stop_requested(), "saved at step 1; the same command goes on")
            time.sleep(60)
        time.sleep(0.01)
    if first:
        (ctx.out / "half").rename(ctx.out / "config.json")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """With blanks, and letters of other alphabets."""
    folder = tmp_path / "my wörk 甲"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    module = re.sub(r"\W", "_", request.node.name)
    Path(f"{module}.py").write_text(STAGE.format(module=module))
    Path("a.jsonl").write_text("{}\n")
    Path("base").mkdir()
    Path("base/config.json").write_text("{}")
    Path("recipe.yaml").write_text(f'name: r\nmodel: base\nstages:\n  slow: {{kind: "{module}:Slow", data: a.jsonl}}\n')
    return folder


def start() -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "align", "run", "recipe.yaml"]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )


def lines_until(process: subprocess.Popen[str], *words: str) -> None:
    """Read until the words have come, each on a line of its own."""
    assert process.stdout is not None
    left = list(words)
    for line in process.stdout:
        if line.strip() in left:
            left.remove(line.strip())
            if not left:
                return
    pytest.fail(process.stderr.read() if process.stderr is not None else "it ended")


def again() -> list[str]:
    """The same command, with nothing in its way."""
    Path("go").touch()
    text = io.StringIO()
    run_recipe(load_recipe("recipe.yaml"), console=Console(file=text, width=200))
    assert sorted(path.name for path in Path("runs/r/stages/slow").iterdir()) == ["config.json", "manifest.json"]
    assert [path.name for path in Path("runs/r").rglob(".*")] == [".align.lock"]
    return text.getvalue().splitlines()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_the_first_signal_saves_and_says_so(folder: Path, number: signal.Signals, code: int) -> None:
    Path("polite").touch()
    with start() as process:
        lines_until(process, "ready")
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (code, "saved at step 1; the same command goes on\n"), out
    assert again() == ["slow: running (first run; going on from an earlier attempt)"]


def test_the_second_ctrl_c_ends_at_once_and_the_next_start_cleans_up(folder: Path) -> None:
    with start() as process:
        lines_until(process, "ready")
        process.send_signal(signal.SIGINT)
        lines_until(process, "asked")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "")
    assert [path.name for path in Path("runs/r/stages").glob("*")] == [
        path.name for path in Path("runs/r/stages").glob(".tmp-*")
    ]
    warning, line = again()
    assert warning.startswith(f"warning: the run of pid {process.pid} on host ")
    assert line == "slow: running (first run; going on from an earlier attempt)"


def test_a_terminal_that_is_closed(folder: Path) -> None:
    """The kernel sends SIGHUP, and what is printed from then on cannot be written any more: the run saves, and goes on
    later."""
    Path("polite").touch()
    process, terminal = pty.fork()
    if process == 0:
        os.execv(sys.executable, [sys.executable, "-m", "align", "run", "recipe.yaml"])
    said = b""
    while b"ready" not in said:
        said += os.read(terminal, 1024)
    os.close(terminal)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 129
    assert [json.loads(line)["event"] for line in Path("runs/r/history.jsonl").read_text().splitlines()] == [
        "started",
        "interrupted",
    ]
    assert again() == ["slow: running (first run; going on from an earlier attempt)"]


@pytest.mark.parametrize("several", [(), ("--nproc", "2")])
def test_output_that_nobody_reads_any_more_saves_and_ends_the_run(folder: Path, several: tuple[str, ...]) -> None:
    """`align run ... | head -1`: a line on standard error, and exit code 3."""
    Path("polite").touch()
    Path("talks").touch()
    command = f"{sys.executable} -m align run recipe.yaml {' '.join(several)} | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    line = "standard output was closed: saved at step 1; the same command goes on\n"
    assert (done.returncode, set(done.stderr.splitlines(keepends=True))) == (3, {line})
    assert len(done.stdout.splitlines()) == 1
    assert [json.loads(line)["event"] for line in Path("runs/r/history.jsonl").read_text().splitlines()] == [
        "started",
        "interrupted",
    ]
    Path("talks").unlink()
    assert again() == ["slow: running (first run; going on from an earlier attempt)"]


def test_output_that_nobody_reads_ends_no_run_that_has_nothing_more_to_do(folder: Path) -> None:
    """What is finished is finished, whoever is told."""
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "align", "run", "recipe.yaml"]
    with subprocess.Popen(command, stdout=writer, stderr=subprocess.PIPE) as process:
        os.close(writer)
        os.read(reader, 1)
        os.close(reader)
        Path("go").touch()
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")


def test_no_process_outlives_the_launcher(folder: Path) -> None:
    """`kill -9` of `align run --nproc 2`, and the processes that it started are gone."""
    command = [sys.executable, "-m", "align", "run", "recipe.yaml", "--nproc", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as launcher:
        lines_until(launcher, "ready", "ready")
        children = psutil.Process(launcher.pid).children(recursive=True)
        assert len(children) == 2
        launcher.kill()
        gone, alive = psutil.wait_procs(children, timeout=20)
    assert len(gone) == 2 and not alive


def test_json_is_all_that_standard_output_gets(folder: Path) -> None:
    """Once where the stage runs, and once where nothing does."""
    for state in ("ran", "up_to_date"):
        (folder / "go").touch()
        command = [sys.executable, "-m", "align", "run", "recipe.yaml", "--json", "--runs-dir", "kept"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        found = json.loads(done.stdout.removeprefix("ready\n"))  # which the stage itself printed
        assert {key: found[key] for key in ("name", "state", "done", "ran", "up_to_date")} == {
            "name": "r",
            "state": "finished",
            "done": 1,
            "ran": [],
            "up_to_date": [],
            state: ["slow"],
        }
        assert [stage["name"] for stage in found["stages"]] == ["slow"]
        assert done.stderr.startswith("slow: ")


def test_out_of_memory_names_the_stage(folder: Path) -> None:
    Path("memory").touch()
    with start() as process:
        _, err = process.communicate(timeout=60)
    expected = (
        "error: out of memory in stage slow: no more; lower train.microbatch_tokens, or set"
        " train.gradient_checkpointing: true\n"
    )
    assert (process.returncode, err) == (3, expected)
    Path("memory").unlink()
    assert again() == ["slow: running (first run)"]
