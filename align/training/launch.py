"""Processes: this process's rank, the collectives that training needs, and starting several processes on one machine.

The package runs the same program on every process. torchrun, accelerate launch and ``align run --nproc N`` set the same
environment variables, and ``align.slurm`` sets them from those of ``srun``. With one process every collective is the
identity and torch.distributed is never touched.
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
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore
from torch.distributed.rendezvous import rendezvous

from align import collective
from align.errors import EnvironmentFault, InputError
from align.machines import Machines, on_loopback
from align.models.placement import WHOLE, Placement, Sharded, SummedGradients
from align.recipe.blocks.train import SHARDING_HINT, Sharding, sharding_fault
from align.signals import LAUNCHER, handled
from align.sizing.machine import processes_here

JOINING = timedelta(minutes=10)
"""How long the processes of a run wait for each other at the start: machines do not begin at the same moment."""


@dataclass(frozen=True)
class Ranks:
    """This process's rank, and the collectives over all processes."""

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
        """Wait until all processes are here. Between CPUs: torch's own barrier would go over the GPUs."""
        self.gather(None)

    def broadcast_object(self, value: Any) -> Any:
        """The first process's value, on every process. Values are plain data of this package, sent over the process
        group only."""
        if self.world == 1:
            return value
        box = [value]
        with collective.collective(_where()):
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in rank order, on every process."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        with collective.collective(_where()):
            dist.all_gather_object(values, value)
        return values

    @property
    def placement(self) -> Placement:
        """How these processes hold what is whole in each."""
        return SummedGradients(saves=self.first) if self.world > 1 else WHOLE

    def placement_for(self, sharding: Sharding) -> Placement:
        """How these processes hold what is trained. Raises InputError where they cannot divide it so."""
        of_machine = processes_here(self.world)
        if fault := sharding_fault(sharding, self.world, of_machine):
            raise InputError(f"train.sharding: {sharding}: {fault}", hint=SHARDING_HINT)
        if sharding == "none":
            return self.placement
        together = self.world if sharding == "full" else of_machine
        return Sharded(self.device, (self.world,) if together == self.world else (self.world // together, together))


ALONE = Ranks()
"""A run of one process."""
ONE_MACHINE = Machines()
_ranks: Ranks | None = None


def ranks() -> Ranks:
    """The process group of this program. The first call joins it, if WORLD_SIZE says that there is one.

    Raises:
        InputError: WORLD_SIZE is set, and what says how to find the others is not.
        EnvironmentFault: the others did not come.
    """
    global _ranks
    if _ranks is None:
        world = os.environ.get("WORLD_SIZE", "1")
        _ranks = Ranks() if world == "1" else _join()
        if torch.cuda.is_available():
            torch.cuda.set_device(_ranks.device)  # whatever names no device means this one
    return _ranks


def _join() -> Ranks:
    numbers = ("WORLD_SIZE", "RANK", "MASTER_PORT")
    missing = [name for name in (*numbers, "MASTER_ADDR") if not os.environ.get(name)]
    wrong = [name for name in numbers if name not in missing and not os.environ[name].isdecimal()]
    if missing or wrong:
        told = [f"{', '.join(missing)} not set"] * bool(missing)
        told += [f"{name} is {os.environ[name][:40]!r}, no whole number" for name in wrong]
        hint = "start it with torchrun, srun or `align run --nproc`, or unset WORLD_SIZE for a single process"
        raise InputError(f"by its environment this is one of several processes, but {'; '.join(told)}", hint=hint)
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    at = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    cuda = torch.cuda.is_available()
    if cuda:
        # Before anything is sent: NCCL and the group itself make a context on the current device, else on GPU 0.
        torch.cuda.set_device(Ranks(rank, world).device)
    began = time.monotonic()
    try:
        store = _store(rank, world)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=store,
            rank=rank,
            world_size=world,
            timeout=collective.LIMIT,
            device_id=Ranks(rank, world).device if cuda else None,
        )
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        message = f"rank {rank} of {world} waited {time.monotonic() - began:.0f} s at {at} for the others: {reason}"
        hint = "start all processes within 10 minutes, with one MASTER_ADDR and MASTER_PORT that all can reach"
        raise EnvironmentFault(message, hint=hint) from error
    collective.join(store, rank, world)
    return Ranks(rank, world)


def _store(rank: int, world: int) -> Any:
    """What all processes read and write to find each other. On one machine the first process listens on the loopback
    interface only, where torch by itself would listen on all."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if not on_loopback(address) or "TORCHELASTIC_USE_AGENT_STORE" in os.environ:  # torchrun has a store already
        return next(iter(rendezvous("env://", timeout=JOINING)))[0]
    listening = socket.create_server((address, port)).detach() if rank == 0 else None  # the store closes it
    return TCPStore(address, port, world, rank == 0, JOINING, master_listen_fd=listening)


def _where() -> str:
    return collective.place("launch.py", "processes.py")


def leave() -> None:
    """Leave the process group; harmless without one."""
    global _ranks
    collective.leave()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    _ranks = None


def respawn(nproc: int, command: Sequence[str], machines: Machines = ONE_MACHINE) -> int:
    """Run ``command`` as ``nproc`` processes on this machine, which form one group with those of the other
    ``machines``; returns the exit code of the first here that failed, and 3 when it was lost (killed, or crashed).

    A signal is passed on to all that are here. When one of them fails, the others are ended, since they would wait for
    it in a collective; those of other machines see its connections close. When this process ends for any reason, all
    end: ``LAUNCHER`` in their environment names the process to watch.
    """
    shared = {
        **os.environ,
        "MASTER_ADDR": machines.address,
        "MASTER_PORT": str(machines.port or _free_port()),
        "WORLD_SIZE": str(nproc * machines.count),
        "LOCAL_WORLD_SIZE": str(nproc),
        LAUNCHER: str(os.getpid()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc))),
    }
    if machines.loopback:
        shared["GLOO_SOCKET_IFNAME"] = "lo"
    places = [{"RANK": str(machines.number * nproc + local), "LOCAL_RANK": str(local)} for local in range(nproc)]
    children = [subprocess.Popen(command, env={**shared, **place}) for place in places]

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


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def _wait(children: list[subprocess.Popen[bytes]], grace_s: float = 10.0) -> int:
    deadline: float | None = None
    failed: tuple[int, int] | None = None
    while any(child.poll() is None for child in children):
        failed = failed or _failed(children)
        if failed and deadline is None:
            deadline = time.monotonic() + grace_s
        if deadline is not None and time.monotonic() > deadline:
            break
        time.sleep(0.05)
    rank, code = failed or _failed(children) or (0, 0)
    if code >= 0:
        return code
    if -code in handled():
        return 128 - code
    lost = f"rank {rank} was ended by {signal.Signals(-code).name}, and the others with it"
    why = "memory that ran out is the usual reason" if -code == signal.SIGKILL else "what it printed last may say why"
    print(f"error: {lost}: {why}; the same command continues from what was saved", file=sys.stderr)
    return EnvironmentFault.exit_code


def _failed(children: list[subprocess.Popen[bytes]]) -> tuple[int, int] | None:
    """Rank and exit code of a process that has failed."""
    return next(((rank, code) for rank, child in enumerate(children) if (code := child.poll())), None)


_OF_LAUNCHER = ("--nproc", "--nnodes", "--node-rank", "--rendezvous")


def this_command() -> list[str]:
    """The running ``align`` command line without what says how many processes there are, to start it again as each of
    them."""
    arguments, skip = [], False
    for argument in sys.argv[1:]:
        if skip:
            skip = False
        elif argument in _OF_LAUNCHER:
            skip = True
        elif not argument.startswith(tuple(f"{name}=" for name in _OF_LAUNCHER)):
            arguments.append(argument)
    return [sys.executable, "-m", "align", *arguments]
