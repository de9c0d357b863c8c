"""Starting several processes on one machine: their environment, and how the end of one becomes the end of all."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from align.models.placement import WHOLE
from align.training import launch
from align.training.launch import respawn


def started(folder: Path, code: str, nproc: int = 2) -> int:
    """Run ``code`` as processes, in which ``rank`` and ``folder`` are known; their exit code."""
    known = f"import os, sys, time, pathlib\nrank, folder = int(os.environ['RANK']), pathlib.Path({str(folder)!r})\n"
    return respawn(nproc, [sys.executable, "-c", known + code])


def test_every_process_knows_its_place(tmp_path: Path) -> None:
    """Rank, size and where to meet: on this machine alone."""
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "GLOO_SOCKET_IFNAME"]
    assert (
        started(tmp_path, f"(folder / str(rank)).write_text(' '.join(os.environ[name] for name in {names}))", nproc=3)
        == 0
    )
    assert [(tmp_path / str(rank)).read_text() for rank in range(3)] == [
        f"{rank} {rank} 3 127.0.0.1 lo" for rank in range(3)
    ]


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


COLLECTIVES = """
import torch, json
from align.models import placement
from align.training import launch
placement._BUCKET_BYTES = 64
group = launch.ranks()
shapes = ((3,), (4, 5), (5,), (1,))
parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64 if shape == (5,) else torch.float32)) for shape in shapes]
for number, parameter in enumerate(parameters):
    if (rank, number) != (1, 1):  # a process without a gradient of one of them
        parameter.grad = torch.full_like(parameter, 10.0 ** number * (rank + 1)) + torch.arange(parameter.numel()).view_as(parameter)
named = {str(i): p for i, p in enumerate(parameters)}
norms = group.placement.reduce_and_clip(named, {"first": parameters[:1], "rest": parameters[1:]}, None)
found = {
    "place": [group.rank, group.world, group.first],
    "told": group.broadcast_object({"of": rank}),
    "gathered": group.gather(f"from {rank}"),
    "norms": norms,
    "sums": [parameter.grad.flatten().tolist() for parameter in parameters],
}
group.barrier()
launch.leave()
(folder / str(rank)).write_text(json.dumps(found))
"""


def test_what_processes_tell_each_other(tmp_path: Path) -> None:
    """The first one's value to all, everybody's in the order of ranks, and gradients added up in messages of several,
    whatever their types, with zeros where a process has none."""
    assert started(tmp_path, COLLECTIVES) == 0
    for rank in range(2):
        found = json.loads((tmp_path / str(rank)).read_text())
        assert found["place"] == [rank, 2, rank == 0]
        assert found["told"] == {"of": 0} and found["gathered"] == ["from 0", "from 1"]
        assert found["sums"] == [
            [3.0 + 2 * i for i in range(3)],
            [10.0 + i for i in range(20)],  # the second process had none
            [300.0 + 2 * i for i in range(5)],
            [3000.0],
        ]
        assert found["norms"]["first"] == pytest.approx(math.hypot(3.0, 5.0, 7.0))


def test_alone_there_is_nobody_to_ask() -> None:
    """Without a group every collective is the value itself, and gradients stay."""
    parameter = torch.nn.Parameter(torch.ones(2))
    group = launch.Ranks()
    assert group.placement is WHOLE
    assert group.placement.reduce_and_clip({"it": parameter}, {}, None) == {}
    assert parameter.grad is None and group.gather(7) == [7] and group.broadcast_object(7) == 7 and group.first


def test_every_process_takes_the_gpu_of_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its number on this machine, and the group knows how to talk between GPUs; without GPUs it does not ask for
    them."""
    began, taken = [], []
    monkeypatch.setattr(launch, "_ranks", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", began.append)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 6)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 8)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "2")
    for gpus in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpus=gpus: gpus)
        monkeypatch.setattr(launch, "_ranks", None)
        group = launch.ranks()
        assert group == launch.ranks() == launch.Ranks(6, 8)
        assert group.device == (torch.device("cuda", 2) if gpus else torch.device("cpu"))
    assert began == ["cpu:gloo,cuda:nccl", "gloo"] and taken == [torch.device("cuda", 2)]


def test_those_that_hang_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the others' time is over."""
    wait = launch._wait
    monkeypatch.setattr(launch, "_wait", lambda children: wait(children, grace_s=0.2))
    began = time.monotonic()
    assert started(tmp_path, "sys.exit(3) if rank else time.sleep(600)") == 3
    assert time.monotonic() - began < 60
