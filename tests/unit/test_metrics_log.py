"""``metrics.jsonl`` (O27): no step twice after a resume, and no half line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.training.metrics import MetricsLog


def log(path: Path, resumed_at: int) -> MetricsLog:
    return MetricsLog(path, resumed_at=resumed_at, report_to=[], run_name="r", config={})


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_steps_after_the_checkpoint_are_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = log(path, 0)
    for step in range(5):
        first.write(step, {"loss": 1.0})
    second = log(path, 2)
    second.write(3, {"loss": 2.0})
    assert [(row["step"], row["loss"]) for row in rows(path)] == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 2.0)]


@pytest.mark.parametrize("end", [b'{"step": 2, "lo', b"\x00\x00\x00", b'{"loss": 1}\n', b"[2]\n", b"\xff"])
def test_what_a_crash_left_of_a_line_is_dropped(tmp_path: Path, end: bytes) -> None:
    """O01: the run goes on all the same."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + end)
    log(path, 9).write(2, {})
    assert [row["step"] for row in rows(path)] == [1, 2]
