"""`align run --nnodes 2` on two machines, here two process trees on loopback: the losses of one process; and a machine
that is lost ends the other, whose run then goes on."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from align.pipeline.runner import run_recipe
from align.recipe.load import load_recipe
from tests.support.root import ROOT
from tests.support.saved import save_tiny

pytestmark = pytest.mark.slow
TIMES = {"step_seconds", "tokens_per_second"}
EPOCHS = 12
"""Of two steps each."""


def write_recipe(name: str) -> str:
    train = {"learning_rate": 1e-3, "batch_size": 2, "microbatch_tokens": 16, "epochs": EPOCHS, "save_steps": 2}
    stage = {"kind": "sft", "data": "talk.jsonl", "train": train}
    Path(f"{name}.yaml").write_text(yaml.safe_dump({"name": name, "model": "./model", "stages": {"sft": stage}}))
    return f"{name}.yaml"


def begin(recipe: str) -> list[subprocess.Popen[str]]:
    """The command of each of two machines."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        at = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "align", "run", recipe, "--nnodes", "2", "--rendezvous", at, "--node-rank"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return [
        subprocess.Popen([*command, number], env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)
        for number in ("0", "1")
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that both machines see, with runs of one process (`one`) and of two machines (`two`)."""
    root = tmp_path_factory.mktemp("shared")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        save_tiny(root / "model", max_position_embeddings=512)
        rows = [
            {"messages": [{"role": "user", "content": f"Say {it}."}, {"role": "assistant", "content": f"{it} it is."}]}
            for it in ("tea", "rain", "sun", "snow")
        ]
        Path("talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        run_recipe(load_recipe(write_recipe("one")), console=Console(file=io.StringIO()))
        both = begin(write_recipe("two"))
        said = [machine.communicate(timeout=300)[0] for machine in both]
        assert [machine.returncode for machine in both] == [0, 0], said
        assert not said[1], "only the first process prints"
    return root


def metrics(folder: Path, name: str) -> list[dict[str, float]]:
    lines = (folder / "runs" / name / "stages" / "sft" / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


def test_two_machines_end_with_the_losses_of_one_process(folder: Path) -> None:
    one, two = metrics(folder, "one"), metrics(folder, "two")
    assert len(one) == len(two) >= 2 * EPOCHS
    for right, found in zip(one, two, strict=True):
        assert found == pytest.approx(right, abs=1e-4)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_machine_that_is_lost_ends_the_other_and_the_same_command_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    """Within a minute, with exit code 3 and a line that says who is gone; then the weights are those of a run that was
    never interrupted, to the last bit."""
    monkeypatch.chdir(folder)
    name = f"lost-{lost}"
    both = begin(write_recipe(name))
    deadline = time.monotonic() + 300
    while not any(Path().glob(f"runs/{name}/*/sft/*/checkpoints/step-*")):
        assert all(machine.poll() is None for machine in both) and time.monotonic() < deadline
        time.sleep(0.005)
    both[lost].send_signal(signal.SIGKILL)
    began = time.monotonic()
    said = both[1 - lost].communicate(timeout=120)[0]
    assert time.monotonic() - began < 60
    assert both[1 - lost].returncode == 3, said
    waited, _, why = said.partition(" for the other processes in ")
    assert f"rank {1 - lost} waited" in waited, said
    assert f"rank {lost}" in why or "all came, and one was lost in it" in why, said
    both[lost].communicate(timeout=60)

    again = begin(f"{name}.yaml")
    said_again = [machine.communicate(timeout=300)[0] for machine in again]
    assert [machine.returncode for machine in again] == [0, 0], said_again
    assert "going on from step" in said_again[0]
    weights = [(folder / "runs" / run / "stages" / "sft" / "model.safetensors").read_bytes() for run in ("two", name)]
    assert weights[0] == weights[1]
