"""A sampling process that says nothing: given up, killed, and its own last words told."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from align.errors import EnvironmentFault
from align.rollout import process
from align.rollout.vllm import VllmSettings


@pytest.mark.parametrize(
    ("does", "message"),
    [
        (
            "exec sleep 60",
            r"gave no sign of life for 0 s \(killed by signal 9\): out of luck; the same command continues",
        ),
        ("exit 3", r"died \(exit code 3\): out of luck"),
    ],
)
def test_a_worker_that_hangs_or_ends_is_told_and_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str, message: str
) -> None:
    script = tmp_path / "worker"
    script.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\necho out of luck\n{does}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(process, "PATIENCE_S", 0.0)
    with pytest.raises(EnvironmentFault, match=message):
        process.ProcessEngine(
            tmp_path,
            VllmSettings(stop_ids=[2], vocabulary=9, dtype="fp32", max_length=9, cache_bytes=9, max_sequences=9),
        )
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
