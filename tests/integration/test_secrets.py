"""Tokens in the environment get into no file and no line of output, and into no other folder than the run's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

from tests.support.saved import save_tiny

CANARIES = {
    name: f"canary{number}Qx7"
    for number, name in enumerate(
        (
            "HF_TOKEN",
            "HUGGING_FACE_HUB_TOKEN",
            "WANDB_API_KEY",
            "OPENAI_API_KEY",
            "AWS_SECRET_ACCESS_KEY",
            "MY_PASSWORD",
        )
    )
}


def test_a_training_run_writes_no_secret(tmp_path: Path) -> None:
    """One that trains and reports, and one that stops at a bad row; without HOME, with TMPDIR on another file system if
    there is one."""
    folder = tmp_path / "läufe 乙"
    save_tiny(folder / "model", max_position_embeddings=512)
    rows = [{"messages": [{"role": "user", "content": "Say tea."}, {"role": "assistant", "content": "Tea it is."}]}] * 2
    (folder / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = {
        "learning_rate": 1e-3,
        "batch_size": 2,
        "microbatch_tokens": 64,
        "max_steps": 2,
        "report_to": ["tensorboard"],
    }
    stages = {"sft": {"kind": "sft", "data": "talk.jsonl", "eval_data": "talk.jsonl", "train": train}}
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump({"name": "r", "model": "./model", "stages": stages}, sort_keys=False)
    )
    elsewhere = "/dev/shm" if os.access("/dev/shm", os.W_OK) else str(tmp_path)
    surroundings = {"HOME": "/nonexistent", "TMPDIR": elsewhere, "LC_ALL": "C", **CANARIES}
    printed = []
    for arguments, code in (
        (["recipe.yaml", "--debug"], 0),
        (["recipe.yaml", "stages.sft.data=[talk.jsonl, bad.jsonl]", "--debug"], 2),
    ):
        (folder / "bad.jsonl").write_text("{\n")
        command = [sys.executable, "-m", "align", "run", *arguments]
        done = subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env={**os.environ, **surroundings},
        )
        assert done.returncode == code, done.stderr
        printed.append(done.stdout + done.stderr)
    written = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert any(path.name.startswith("events") for path in written) and len(written) > 20
    for name, secret in CANARIES.items():
        assert not [path for path, content in written.items() if secret.encode() in content], name
        assert not any(secret in text for text in printed), name
