"""The plan's memory against what a run really took, with rows of 2,000 and 8,000 tokens: on a small model, in processes
of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from align.planning.plan import make_plan
from align.recipe.load import load_recipe
from tests.support.root import ROOT
from tests.support.saved import save_tiny

SHAPE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 20_000,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny(folder, **SHAPE)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("words", "checkpointing"), [(500, False), (2_000, False), (2_000, True)])
def test_the_peak_of_a_run_is_the_one_that_was_planned(
    model: Path, words: int, checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 15 %. A word is four tokens here."""
    monkeypatch.chdir(tmp_path)
    row = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "tea " * words}]}
    Path("data.jsonl").write_text(json.dumps(row) + "\n")
    train = {
        "microbatch_tokens": 256,
        "max_steps": 2,
        "epochs": 2,
        "batch_size": 1,
        "gradient_checkpointing": checkpointing,
    }
    stage = {"kind": "sft", "data": "data.jsonl", "max_length": 20_000, "samples": 0, "train": train}
    Path("r.yaml").write_text(yaml.safe_dump({"name": "r", "model": str(model), "stages": {"s": stage}}))
    planned = make_plan(load_recipe("r.yaml")).stages[0]
    assert planned.memory is not None
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "align", "run", "r.yaml"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "runs/r/stages/s/report.json").read_text())["peak_memory_bytes"]
    print(
        f"{words} words, checkpointing {checkpointing}: planned {planned.memory / 1e9:.2f} GB, measured"
        f" {measured / 1e9:.2f} GB"
    )
    assert abs(planned.memory - measured) < 0.15 * measured
