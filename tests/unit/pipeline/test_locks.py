"""One run per folder."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from align.errors import EnvironmentFault
from align.pipeline.locks import OWNER, RunLock, read_owner

HOLDER = """
import os, sys, time
from pathlib import Path
from align.pipeline.locks import RunLock
with RunLock(Path(sys.argv[1])):
    if sys.argv[2] == "fork" and os.fork() == 0:
        print(os.getpid(), flush=True)
        time.sleep(60)
    if sys.argv[2] != "fork":
        print(os.getpid(), flush=True)
    time.sleep(60)
"""


def holder(folder: Path, mode: str = "plain") -> tuple[subprocess.Popen[str], int]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder), mode], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_a_second_run_fails_at_once_and_names_the_first(tmp_path: Path) -> None:
    process, pid = holder(tmp_path)
    try:
        started = time.monotonic()
        with pytest.raises(EnvironmentFault) as caught, RunLock(tmp_path):
            pass
        assert time.monotonic() - started < 1
        assert caught.value.exit_code == 3
        assert f"in use by pid {pid} on host {socket.gethostname()} since 2" in str(caught.value)
    finally:
        end(process)


def test_a_killed_run_frees_its_folder_and_is_named(tmp_path: Path) -> None:
    """A lock whose owner is dead is taken over, and the caller can say so."""
    process, pid = holder(tmp_path)
    end(process)
    with RunLock(tmp_path) as lock:
        assert lock.taken_over is not None
        assert lock.taken_over.pid == pid
        owner = read_owner(tmp_path)
        assert owner is not None
        assert owner.pid == os.getpid()
    with RunLock(tmp_path) as lock:
        assert lock.taken_over is None
    assert not (tmp_path / OWNER).exists()


def test_a_forked_worker_that_outlives_its_run_does_not_hold_the_lock(tmp_path: Path) -> None:
    """Engine workers are known to survive a killed run."""
    process, child = holder(tmp_path, "fork")
    end(process)
    try:
        os.kill(child, 0)  # alive
        with RunLock(tmp_path) as lock:
            assert lock.taken_over is not None
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_damaged_owner_file_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / OWNER).write_text("{")
    with RunLock(tmp_path) as lock:
        assert lock.taken_over is not None
        with pytest.raises(EnvironmentFault, match=f"in use by pid {os.getpid()}"), RunLock(tmp_path):
            pass


def test_an_error_inside_frees_the_folder(tmp_path: Path) -> None:
    with pytest.raises(KeyError), RunLock(tmp_path):
        raise KeyError
    with RunLock(tmp_path) as lock:
        assert lock.taken_over is None
