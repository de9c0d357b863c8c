"""SIGKILL in the middle of Self-Contrast, and the same command again: the bytes of a run that nothing disturbed."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.embedder import save_embedder
from tests.support.saved import save_tiny
from tests.support.scripted import write_script

# Kills itself right before the n-th file whose path has PART in it becomes visible; then no `finally` runs and nothing
# is flushed.
KILLED = """
import os, signal, sys
from align import files
part, left = sys.argv.pop(1), [int(sys.argv.pop(1))]

def fault(operation, path):
    if operation == "rename" and part in str(path):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

files.fault = fault
from align.cli import main
main()
"""
WORDS = ("tea", "rain", "sun", "snow", "wind", "fog", "ice", "sea")
COMPLETIONS = [
    "Tea it is.",
    "I like the rain.",
    "The dog sleeps.",
    "Paris.",
    "The fox runs away.",
    "What is the capital?",
    "12 + 34 = 46",
    "No.",
]


def write_recipe(folder: Path, engine: dict[str, str]) -> None:
    contrast = {
        "samples_per_prompt": 80,
        "negatives": 3,
        "max_new_tokens": 8,
        "max_length": 120,
        "embedder": "./embedder",
        "rollout": engine,
    }
    train = {"learning_rate": 1e-3, "batch_size": 2, "microbatch_tokens": 64, "save_steps": 1, "epochs": 2}
    stages = {
        "contrast": {"kind": "self_contrast", "data": "talk.jsonl", **contrast},
        "dpo": {"kind": "dpo", "data": "stage:contrast", "train": train, "samples": 0},
    }
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump({"name": "r", "seed": 5, "model": "./model", "stages": stages}, sort_keys=False)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: a model, an embedder, a script, eight conversations."""
    folder = tmp_path_factory.mktemp("killed")
    save_tiny(folder / "model", max_position_embeddings=512)
    save_embedder(folder / "embedder")
    write_script(folder, COMPLETIONS)
    talk = [
        [{"role": "user", "content": f"Say {w}."}, {"role": "assistant", "content": f"{w.title()} it is."}]
        for w in WORDS
    ]
    (folder / "talk.jsonl").write_text(
        "".join(json.dumps({"id": w, "messages": t}) + "\n" for w, t in zip(WORDS, talk, strict=True))
    )
    return folder


def align(folder: Path, runs: str, *code: str) -> subprocess.CompletedProcess[str]:
    start = ["-c", KILLED, *code] if code else ["-m", "align"]
    command = [sys.executable, *start, "run", "recipe.yaml", "--runs-dir", runs]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def results(folder: Path, runs: str) -> dict[str, str]:
    """Digests of the preferences and of the final weights."""
    stages = folder / runs / "r" / "stages"
    found = [stages / "contrast" / "data.jsonl", *sorted((stages / "dpo").glob("*.safetensors"))]
    assert len(found) == 2
    return {str(path.relative_to(stages)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["scripted", "transformers"])
def test_killed_anywhere_the_same_command_ends_with_the_same_bytes(folder: Path, engine: str) -> None:
    """In generation (between two shards), in embedding, in DPO (between two checkpoints)."""
    write_recipe(
        folder, {"engine": "scripted", "script": "script.jsonl"} if engine == "scripted" else {"engine": engine}
    )
    clean = align(folder, f"clean-{engine}")
    assert clean.returncode == 0, clean.stderr
    expected = results(folder, f"clean-{engine}")
    for part, number in (("samples-", "3"), ("vectors-", "1"), ("step-", "3")):
        runs = f"{part}{engine}"
        killed = align(folder, runs, part, number)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        again = align(folder, runs)
        assert again.returncode == 0, again.stderr
        assert results(folder, runs) == expected, part
