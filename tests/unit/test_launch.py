"""Starting several processes on one machine: their environment, and how the end of one becomes the end of all."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from align.training import launch
from align.training.launch import respawn


def started(folder: Path, code: str, nproc: int = 2) -> int:
    """Run ``code`` as processes, in which ``rank`` and ``folder`` are known; their exit code."""
    known = f"import os, sys, time, pathlib\nrank, folder = int(os.environ['RANK']), pathlib.Path({str(folder)!r})\n"
    return respawn(nproc, [sys.executable, "-c", known + code])


def test_every_process_knows_its_place(tmp_path: Path) -> None:
    """Rank, size and where to meet: on this machine alone."""
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "GLOO_SOCKET_IFNAME"]
    assert started(tmp_path, f"(folder / str(rank)).write_text(' '.join(os.environ[name] for name in {names}))", nproc=3) == 0
    assert [(tmp_path / str(rank)).read_text() for rank in range(3)] == [f"{rank} {rank} 3 127.0.0.1 lo" for rank in range(3)]


def test_cores_are_shared_unless_it_was_said_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many threads in all as there are cores, and at least one for each process."""
    code = "(folder / str(rank)).write_text(os.environ['OMP_NUM_THREADS'])"
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for cores, threads in ((4, "2"), (1, "1"), (None, "1")):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        assert started(tmp_path, code) == 0
        assert (tmp_path / "0").read_text() == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert started(tmp_path, code) == 0
    assert (tmp_path / "1").read_text() == "7"


def test_one_that_fails_leaves_the_others_time_to_end(tmp_path: Path) -> None:
    """They may be writing; the code is that of the one that failed, and a signal counts as in a shell."""
    assert started(tmp_path, "sys.exit(3) if rank else (time.sleep(1), (folder / 'done').touch())") == 3
    assert (tmp_path / "done").exists()
    assert started(tmp_path, "os.kill(os.getpid(), 9) if rank else None") == 128 + 9


def test_those_that_hang_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the others' time is over."""
    wait = launch._wait
    monkeypatch.setattr(launch, "_wait", lambda children: wait(children, grace_s=0.2))
    began = time.monotonic()
    assert started(tmp_path, "sys.exit(3) if rank else time.sleep(600)") == 3
    assert time.monotonic() - began < 60
