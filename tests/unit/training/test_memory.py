"""Memory that is freed is kept for the next step, where the C library would give it back to the kernel, or returned at
once."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from align.training.memory import begin_stage, keep_freed_memory, peak_memory_bytes, return_freed_memory

FAULTS = """
import resource, sys, torch
from align.training.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for k in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = torch.ones(2**25 - k * 2**14)
    place = block.data_ptr()
    del block
    fetched = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
heap = next(line.split()[0] for line in open("/proc/self/maps") if line.split()[-1] == "[heap]")
start, end = (int(address, 16) for address in heap.split("-"))
print(fetched, int(start <= place < end))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's way")
def test_a_block_that_was_freed_is_used_again() -> None:
    """Pages that the sixth of six blocks of about 128 MiB fetches anew from the kernel. Each is 64 KiB smaller than
    the one before: glibc looks for an aligned place in a hole that is a little larger, so a block of the same size may
    not fit where the last one lay. A run tells something only if the block lay in the heap: where the kernel gives the
    heap no room to grow, glibc maps blocks all the same."""

    def pages(how: str) -> tuple[int, bool]:
        done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
        fetched, in_heap = map(int, done.stdout.split())
        return fetched, bool(in_heap)

    left, _ = pages("leave")
    assert left > 1000
    for _ in range(6):
        fetched, in_heap = pages("keep")
        if in_heap:
            assert fetched < 64
            return
    pytest.skip("the kernel gave the heap no room to grow in any of six processes")


HELD = """
import torch
from align.training.memory import keep_freed_memory, return_freed_memory
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
keep_freed_memory()
return_freed_memory()
before = resident()
blocks = [torch.ones(2**24) for _ in range(4)]
grown = resident() - before
del blocks[:3]
print(grown, resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's way")
def test_freed_blocks_are_returned_though_one_behind_them_is_in_use() -> None:
    """Four blocks of 64 MiB, of which the last one stays; and although they were to be kept before."""
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, check=True)
    grown, held = map(int, done.stdout.split())
    assert grown > 0.95 * 2**28
    assert held < 1.2 * 2**26


def test_where_there_is_no_glibc_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False
    assert return_freed_memory() is False


def test_peak_memory_is_in_bytes() -> None:
    """A Python process with torch takes more than 50 MiB and less than 100 GiB."""
    assert 50 * 2**20 < peak_memory_bytes() < 100 * 2**30


def test_the_peak_is_the_process_own() -> None:
    """A small process that a large one starts is small."""
    ballast = b"x" * 1_500_000_000
    program = "from align.training.memory import peak_memory_bytes; print(peak_memory_bytes())"
    said = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert 10_000_000 < int(said) < len(ballast) // 2


def test_a_stage_counts_its_own_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, what is freed goes back for other processes before peak memory is counted anew; without one the GPU is
    left alone."""
    done: list[str] = []
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: done.append(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    begin_stage()
    assert done == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    begin_stage()
    assert done == ["empty_cache", "reset_peak_memory_stats"]


STAGES = """
from align.training.memory import begin_stage, peak_memory_bytes
large = bytearray(b"x") * 600_000_000
del large
before = peak_memory_bytes()
begin_stage()
print(before - peak_memory_bytes())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's way")
def test_the_peak_of_an_earlier_stage_is_forgotten() -> None:
    """600 MB that were freed before the stage began are not the stage's."""
    said = subprocess.run([sys.executable, "-c", STAGES], check=True, capture_output=True, text=True).stdout
    assert int(said) > 400_000_000
