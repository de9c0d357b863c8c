"""`train.sharding: full` from the command line: `align run --nproc 2` gives the losses of one process, and what two
processes began one goes on with."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from safetensors.torch import load_file

from align.pipeline.runner import run_recipe
from align.recipe.load import load_recipe
from tests.support.readme import every_file_is_explained
from tests.support.root import ROOT
from tests.support.saved import save_tiny

STAGES = ("sft", "dpo")
STEPS = 30
"""Of the second stage."""
TIMES = {"step_seconds", "tokens_per_second"}


def write_recipe(name: str, sharding: str) -> str:
    train: dict[str, Any] = {"learning_rate": 1e-3, "batch_size": 2, "microbatch_tokens": 128, "sharding": sharding}
    shared: dict[str, Any] = {"eval_data": "mine.jsonl", "samples": 2}
    stages = {
        "sft": {**shared, "kind": "sft", "data": "talk.jsonl", "eval_data": "talk.jsonl"},
        "dpo": {**shared, "kind": "dpo", "data": "mine.jsonl", "policy": "stage:sft"},
    }
    stages["sft"]["train"] = {**train, "epochs": 3, "eval_steps": 2, "load_best_model": True}
    stages["dpo"]["train"] = {**train, "learning_rate": 1e-4, "epochs": STEPS // 2, "save_steps": 2}
    Path(f"{name}.yaml").write_text(yaml.safe_dump({"name": name, "model": "./model", "stages": stages}))
    return f"{name}.yaml"


def begin(recipe: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "align", "run", recipe, "--nproc", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with runs of one process (`one`), of two (`two`), and of two that were killed in the second stage
    (`killed`)."""
    root = tmp_path_factory.mktemp("user")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        save_tiny(root / "model", max_position_embeddings=512)
        text = (ROOT / "docs" / "preferences.md").read_text()
        found = re.search(r"<!-- example: mine.jsonl -->\n```json\n(.*?)```", text, re.DOTALL)
        assert found
        Path("mine.jsonl").write_text(found[1])
        rows = [
            {"messages": [{"role": "user", "content": f"Say {it}."}, {"role": "assistant", "content": f"{it} it is."}]}
            for it in ("tea", "rain", "sun", "snow")
        ]
        Path("talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        run_recipe(load_recipe(write_recipe("one", "none")), console=Console(file=io.StringIO()))
        done = begin(write_recipe("two", "full"))
        output, _ = done.communicate(timeout=300)
        assert done.returncode == 0, output
        _kill(begin(write_recipe("killed", "full")), "runs/killed/*/dpo/*/checkpoints/step-*")
    return root


def _kill(run: subprocess.Popen[str], checkpoints: str) -> None:
    """The program that was called, as soon as a checkpoint is there; its processes end with it."""
    deadline = time.monotonic() + 300
    while not any(Path().glob(checkpoints)):
        assert run.poll() is None and time.monotonic() < deadline, run.communicate()
        time.sleep(0.005)
    run.send_signal(signal.SIGKILL)
    run.communicate(timeout=60)
    newest = max(int(path.name.removeprefix("step-")) for path in Path().glob(checkpoints))
    assert newest < STEPS, "it was killed in the middle"


def apart(folder: Path, stage: str, other: str) -> float:
    """The largest difference of a metric of any step, relative to it where it is large."""
    rows = [
        [
            json.loads(line)
            for line in (folder / "runs" / name / "stages" / stage / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("one", other)
    ]
    assert len(rows[0]) == len(rows[1]) > 4
    found = 0.0
    for a, b in zip(*rows, strict=True):
        assert a.keys() == b.keys()
        found = max([found, *(abs(a[key] - b[key]) / max(1.0, abs(a[key])) for key in a.keys() - TIMES)])
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_end_with_the_losses_of_one(folder: Path, stage: str) -> None:
    """Every metric of every step; the same answers are shown, and the same files are saved."""
    assert apart(folder, stage, "two") < 1e-4
    one, two = (folder / "runs" / name / "stages" / stage for name in ("one", "two"))
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    every_file_is_explained(folder / "runs" / "two")
    assert (one / "answers.jsonl").read_text() == (two / "answers.jsonl").read_text()
    config = [json.loads((at / "config.json").read_text()) for at in (one, two)]
    assert config[0] == config[1]
    a, b = (load_file(at / "model.safetensors") for at in (one, two))
    assert a.keys() == b.keys()
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-4


def test_killed_and_continued_by_one_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which holds the model whole, from the parts that two had saved: the losses of a run that nothing disturbed. The
    stage before is not run again, although its recipe now says `none` too."""
    monkeypatch.chdir(folder)
    overrides = [f"stages.{stage}.train.sharding=none" for stage in STAGES]
    text = io.StringIO()
    result = run_recipe(load_recipe("killed.yaml", overrides), console=Console(file=text, width=200))
    assert result.ran == ("dpo",) and result.up_to_date == ("sft",)
    said = re.search(r"dpo  continues from step (\d+) of (\d+), saved by 2 processes", text.getvalue())
    assert said and 0 < int(said[1]) < int(said[2]) == STEPS
    assert apart(folder, "dpo", "killed") < 1e-4


@pytest.mark.parametrize("command", [["run"], ["run", "--nproc", "1"]])
def test_one_process_is_refused_before_anything_is_written(
    folder: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line for each stage, with its place, and exit code 2."""
    monkeypatch.chdir(folder)
    write_recipe("alone", "full")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    call = [sys.executable, "-m", "align", command[0], "alone.yaml", *command[1:]]
    done = subprocess.run(call, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and not Path("runs/alone").exists()
    lines = [line for line in done.stderr.splitlines() if "sharding" in line]
    assert len(lines) == 2 and all("there is only one; start several processes" in line for line in lines)
