"""What ``align plan`` says of a GPU's memory is within a tenth of the peak of the simulated step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.sim import guard
from tests.support.root import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(guard.missing() is not None, reason=guard.missing() or "everything is here"),
]
TABLE = ROOT / "tests" / "sim" / "memory.json"
SOME = ["sft", "dpo lora 2048", "reward full 8192", "reward lora 32768", "ppo lora 8192", "ppo full 512"]
"""Of the table, what is simulated here with six layers: all of SFT, and of each other kind some."""
FEW = [
    "sft lora 512",
    "sft lora 2048",
    "sft full 2048",
    "not checkpointed",
    "not autocast",
    "bf16",
    "tied",
    "ppo lora 8192",
]
"""The same with two: none that is divided among processes, which needs three (the layer at work, the next one, and
the gradients of the one before)."""


def compared(folder: Path, *options: str) -> list[dict[str, Any]]:
    """The rows of :mod:`tests.sim.memory`."""
    guard.built()
    out = folder / "memory.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.sim.memory", str(out), *options]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(out.read_text())
    return rows


def off(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The rows whose plan is off by more than a tenth of the peak."""
    return {
        f"{row['name']}, {row['layers']} layers": row["planned"] / row["simulated"] - 1
        for row in rows
        if abs(row["planned"] / row["simulated"] - 1) > 0.1
    }


def test_the_peak_of_few_layers_is_the_one_that_is_planned(tmp_path: Path) -> None:
    """Few layers show what logits, embeddings and a layer at work take, which 40 layers' weights hide."""
    rows = compared(tmp_path, "--layers", "6", "--only", *SOME)
    assert len([row for row in rows if "sharded" in row["name"]]) == 15
    rows += [row for row in compared(tmp_path, "--layers", "2", "--only", *FEW) if "sharded" not in row["name"]]
    assert len(rows) > 40
    assert not off(rows)


def test_the_peak_of_a_whole_model_is_the_one_that_is_planned(tmp_path: Path) -> None:
    """The peaks that were simulated with all layers of GLM-4-9B, against what is planned now."""
    rows = compared(tmp_path, "--found", str(TABLE))
    assert {row["layers"] for row in rows} == {40}
    assert len(rows) > 40
    assert not off(rows)


def test_no_row_of_the_table_is_left_out(tmp_path: Path) -> None:
    """Every kind of step, with adapters and in full, at every length."""
    names = {row["name"] for row in json.loads(TABLE.read_text())}
    for kind in ("sft", "dpo", "reward", "ppo"):
        for weights in ("lora", "full"):
            assert {f"{kind} {weights} {tokens}" for tokens in (512, 2048, 8192, 32768)} <= names
