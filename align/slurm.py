"""Translating the environment variables of Slurm's ``srun`` to those that torch.distributed reads.

``srun align run RECIPE`` with several tasks is one run of several processes, as with torchrun. If WORLD_SIZE is set (by
torchrun and accelerate, also inside of ``srun``, or by ``align run --nproc``), that is used instead.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping

from align.errors import InputError

_PORTS = range(20_000, 30_000)
"""Below the ports that Linux assigns by itself, from 32768 on."""


def translate(environ: MutableMapping[str, str]) -> None:
    """If ``srun`` started several tasks, set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT;
    LOCAL_WORLD_SIZE too if every node has as many.

    Reads the variables of the step (SLURM_STEP_*), which only ``srun`` sets: a batch script, which is one process, only
    has those of its job. Variables that are already set are kept.

    Raises:
        InputError: a variable that ``srun`` sets with the others is missing, or is not a number.
    """
    if "WORLD_SIZE" in environ or environ.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        return
    told = {
        "WORLD_SIZE": str(_number(environ, "SLURM_STEP_NUM_TASKS")),
        "RANK": str(_number(environ, "SLURM_PROCID")),
        "LOCAL_RANK": str(_number(environ, "SLURM_LOCALID")),
    }
    tasks, nodes = _number(environ, "SLURM_STEP_NUM_TASKS"), _number(environ, "SLURM_STEP_NUM_NODES")
    if tasks % nodes == 0:
        told["LOCAL_WORLD_SIZE"] = str(tasks // nodes)
    if nodes == 1:
        told |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    else:
        told["MASTER_ADDR"] = first_host(environ.get("SLURM_STEP_NODELIST", ""))
    # The same in every task, but different for another step on the same nodes.
    place = _number(environ, "SLURM_JOB_ID") * 31 + _number(environ, "SLURM_STEP_ID")
    told["MASTER_PORT"] = str(_PORTS[place % len(_PORTS)])
    for name, value in told.items():
        environ.setdefault(name, value)


def first_host(nodes: str) -> str:
    """The first name of Slurm's short form of a list: ``gpu[003-005,9],login1`` gives ``gpu003``.

    Raises:
        InputError: there is none.
    """
    first = re.match(r"(?:[^,\[\]]|\[[^\[\]]*\])+", nodes)
    if first is None:
        raise InputError(
            f"SLURM_STEP_NODELIST is {nodes!r}, which names no node", hint="set MASTER_ADDR to the first node's name"
        )
    return re.sub(r"\[([^-,\]]*)[^\]]*\]", r"\1", first.group())


def _number(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name, "")
    if not value.isdecimal():
        told = f"is {value!r}" if name in environ else "is not set"
        raise InputError(
            f"srun started this process as one of several, but {name} {told}",
            hint="start it with torchrun, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT",
        )
    return int(value)
