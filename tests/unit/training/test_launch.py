"""Starting several processes on one machine: their environment, and how the end of one becomes the end of all."""

from __future__ import annotations

import json
import math
import os
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from align import collective
from align.errors import EnvironmentFault, InputError
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
    """They may be writing; the code is that of the one that failed."""
    assert started(tmp_path, "sys.exit(2) if rank else (time.sleep(1), (folder / 'done').touch())") == 2
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize("ending", [9, 11])
def test_a_process_that_is_lost_is_the_machines_fault(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], ending: int
) -> None:
    """Killed, as for want of memory, or crashed: which one it was, and that the same command goes on."""
    assert started(tmp_path, f"os.kill(os.getpid(), {ending}) if rank else None") == 3
    said = capfd.readouterr().err
    name = {9: "SIGKILL", 11: "SIGSEGV"}[ending]
    assert said.startswith(f"error: rank 1 was ended by {name}, and the others with it: ")
    assert said.endswith("; the same command continues from what was saved\n") and said.count("\n") == 1
    assert ("memory" in said) == (ending == 9)


def test_a_signal_that_asks_to_stop_counts_as_in_a_shell(tmp_path: Path) -> None:
    """As for a single process."""
    assert started(tmp_path, "os.kill(os.getpid(), 15) if rank else None") == 128 + 15


LISTENING = """
import json, psutil
from align.training import launch
group = launch.ranks()
group.gather("all are here")
found = [place.laddr.ip for place in psutil.Process().net_connections() if place.status == "LISTEN"]
(folder / str(rank)).write_text(json.dumps(found))
group.gather("all have looked")
launch.leave()
"""


def test_processes_of_one_machine_listen_on_its_loopback_interface_only(tmp_path: Path) -> None:
    """torch's key-value store would listen on all interfaces, and anybody could write to it."""
    assert started(tmp_path, LISTENING) == 0
    found = [address for rank in "01" for address in json.loads((tmp_path / rank).read_text())]
    assert found and set(found) == {"127.0.0.1"}


LOST = """
from datetime import timedelta
from align import collective
from align.errors import EnvironmentFault
from align.training import launch
{limit}
def publish():
    try:
        group.barrier()
    except EnvironmentFault as error:
        (folder / str(rank)).write_text(str(error))
        os._exit(error.exit_code)
group = launch.ranks()
group.gather("both are here")
if rank:
    {fate}
publish()
"""


def test_whoever_waits_for_a_process_that_is_gone_says_so(tmp_path: Path) -> None:
    """At once, with what it waited for and where the other one was last."""
    began = time.monotonic()
    # The one that is gone ends without an exit code of its own, so that the other one's is what is left
    assert started(tmp_path, LOST.format(limit="", fate="os._exit(0)")) == 3
    assert time.monotonic() - began < 60
    said = (tmp_path / "0").read_text()
    assert said.startswith("rank 0 waited ") and " for the other processes in publish (<string>:" in said
    assert "did not come, it was last in <module> (<string>:" in said


def test_whoever_waits_too_long_says_for_whom(tmp_path: Path) -> None:
    """The other one lives, and does something else."""
    limit = "collective.LIMIT = timedelta(seconds=3)"
    assert started(tmp_path, LOST.format(limit=limit, fate="time.sleep(600)")) == 3
    said = (tmp_path / "0").read_text()
    assert "rank 1 on " in said and "did not come, it was last in <module>" in said
    assert "imed out" in said


def test_those_who_never_come_are_waited_for_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process of two, and the limit for joining: one error that says where it waited."""
    monkeypatch.setattr(launch, "JOINING", timedelta(seconds=1))
    monkeypatch.setattr(launch, "_ranks", None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(EnvironmentFault, match=f"rank 0 of 2 waited . s at 127.0.0.1:{port} for the others: .*1/2"):
        launch.ranks()


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK, MASTER_PORT, MASTER_ADDR not set"),
        ({"WORLD_SIZE": "two", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "WORLD_SIZE is 'two', no whole"),
        ({"WORLD_SIZE": "2", "RANK": "-1", "MASTER_ADDR": "a", "MASTER_PORT": ""}, "MASTER_PORT not set; RANK is '-1'"),
    ],
)
def test_an_environment_that_says_half_is_refused(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], message: str
) -> None:
    """One line instead of a wait."""
    monkeypatch.setattr(launch, "_ranks", None)
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message) as refused:
        launch.ranks()
    assert "start it with torchrun" in str(refused.value)


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
    """By its number on this machine, before it joins the group, which knows the GPU and how to talk between GPUs, and
    waits for hours; without GPUs it does not ask for them."""
    happened: list[Any] = []
    monkeypatch.setattr(launch, "_ranks", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", happened.append)
    monkeypatch.setattr(launch, "_store", lambda rank, world: "the store")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **how: happened.append((backend, how)))
    monkeypatch.setattr(collective, "join", lambda *place: happened.append(place))
    for name, value in {"WORLD_SIZE": "8", "RANK": "6", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    for gpus in (True, False):
        happened.clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpus=gpus: gpus)
        monkeypatch.setattr(launch, "_ranks", None)
        group = launch.ranks()
        assert group == launch.ranks() == launch.Ranks(6, 8)
        gpu = torch.device("cuda", 2) if gpus else None
        assert group.device == (gpu or torch.device("cpu"))
        assert [what for what in happened if isinstance(what, torch.device)] == ([gpu, gpu] if gpus else [])
        backend, how = next(what for what in happened if isinstance(what, tuple))
        assert backend == ("cpu:gloo,cuda:nccl" if gpus else "gloo")
        assert how == {
            "store": "the store",
            "rank": 6,
            "world_size": 8,
            "timeout": timedelta(hours=12),
            "device_id": gpu,
        }
        assert happened.index((backend, how)) == (1 if gpus else 0), "the device is set before the group is joined"
        assert ("the store", 6, 8) in happened


def test_one_process_takes_its_gpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """What asks for memory without naming a device means the one that trains."""
    taken: list[Any] = []
    monkeypatch.setattr(launch, "_ranks", None)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "5")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert launch.ranks() == launch.Ranks() and taken == [torch.device("cuda", 1)]


def test_those_that_hang_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the others' time is over."""
    wait = launch._wait
    monkeypatch.setattr(launch, "_wait", lambda children: wait(children, grace_s=0.2))
    began = time.monotonic()
    assert started(tmp_path, "sys.exit(3) if rank else time.sleep(600)") == 3
    assert time.monotonic() - began < 60


def test_processes_that_cannot_divide_a_model_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the stage's start, where no check was made before."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert launch.Ranks().placement_for("none") is WHOLE
    for ranks, sharding in ((launch.Ranks(), "full"), (launch.Ranks(0, 4), "hybrid")):
        with pytest.raises(InputError, match=f"^train.sharding: {sharding}: .*; start several processes"):
            ranks.placement_for(sharding)  # type: ignore[arg-type]


def test_one_of_several_whole_models_is_saved() -> None:
    assert [launch.Ranks(rank, 2).placement.part for rank in (0, 1)] == [0, None]
