"""Processes: who am I among how many, the collectives that training needs, and starting several of us on one machine.

The package runs the same program on every process (torchrun, accelerate launch, Slurm and ``align run --nproc N`` all
set the same environment variables). With one process every collective is the identity and torch.distributed is never
touched.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from align.models.placement import WHOLE, Placement, SummedGradients
from align.signals import LAUNCHER, handled


@dataclass(frozen=True)
class Ranks:
    """This process's place, and the collectives over all of them."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """True on the one process that writes and prints."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """The accelerator of this process (by LOCAL_RANK), or the CPU."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.world > 1:
            dist.barrier()

    def broadcast_object(self, value: Any) -> Any:
        """The first process's value, on every process. Values are plain data of ours and travel over the private
        process group."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in rank order, on every process."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    @property
    def placement(self) -> Placement:
        """How these processes hold what is trained."""
        return SummedGradients() if self.world > 1 else WHOLE


_ranks: Ranks | None = None


def ranks() -> Ranks:
    """The process group of this program, joined at the first call when WORLD_SIZE says that there is one."""
    global _ranks
    if _ranks is None:
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
            _ranks = Ranks(dist.get_rank(), dist.get_world_size())
            if torch.cuda.is_available():
                torch.cuda.set_device(_ranks.device)
        else:
            _ranks = Ranks()
    return _ranks


def leave() -> None:
    """Leave the process group; harmless without one."""
    global _ranks
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    _ranks = None


def respawn(nproc: int, command: Sequence[str]) -> int:
    """Run ``command`` as ``nproc`` processes of one group on this machine, over loopback; returns the exit code of the
    first that failed.

    A signal is passed on to all. When one process fails the others, which would wait for it in a collective, are ended;
    when this process ends, however it does, all end (``LAUNCHER`` in their environment says whom they end with).
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(nproc),
        LAUNCHER: str(os.getpid()),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc))),
    }
    children = [subprocess.Popen(command, env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(nproc)]

    def forward(number: int, frame: FrameType | None) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in handled()}
    try:
        return _wait(children)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
            child.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(children: list[subprocess.Popen[bytes]], grace_s: float = 10.0) -> int:
    deadline: float | None = None
    failed = 0
    while any(child.poll() is None for child in children):
        if not failed:
            failed = next((code for child in children if (code := child.poll())), 0)
        if failed and deadline is None:
            deadline = time.monotonic() + grace_s
        if deadline is not None and time.monotonic() > deadline:
            break
        time.sleep(0.05)
    failed = failed or next((code for child in children if (code := child.poll())), 0)
    return 128 - failed if failed < 0 else failed


def this_command() -> list[str]:
    """The running ``align`` command line without its ``--nproc``, to start it again as several processes."""
    arguments, skip = [], False
    for argument in sys.argv[1:]:
        if skip:
            skip = False
        elif argument == "--nproc":
            skip = True
        elif not argument.startswith("--nproc="):
            arguments.append(argument)
    return [sys.executable, "-m", "align", *arguments]
