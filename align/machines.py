"""Several machines that run one command together: which of them this is, and where all of them meet."""

from __future__ import annotations

import re
from dataclasses import dataclass

from align.errors import InputError

_HINT = "on every machine give --nnodes N, --node-rank 0 to N - 1, and --rendezvous HOST:PORT of machine 0"


@dataclass(frozen=True)
class Machines:
    """Where this machine stands among those that run one command together."""

    count: int = 1
    number: int = 0
    """Of this machine, from 0 on; on machine 0 the first process runs, and waits for the others."""
    address: str = "127.0.0.1"
    """Of machine 0, as all of them reach it."""
    port: int | None = None
    """On machine 0; None for any that is free, when there is one machine."""

    @property
    def loopback(self) -> bool:
        """Do all processes talk over this machine's loopback interface?"""
        return on_loopback(self.address)


def on_loopback(address: str) -> bool:
    """Can only processes of this machine reach this address?"""
    return address in ("localhost", "::1") or address.startswith("127.")


def machines_of(nnodes: int, node_rank: int | None, rendezvous: str | None) -> Machines:
    """What ``--nnodes``, ``--node-rank`` and ``--rendezvous`` say together.

    Raises:
        InputError: one is missing, or wrong beside the others.
    """
    if nnodes == 1:
        given = [
            name for name, value in (("--node-rank", node_rank), ("--rendezvous", rendezvous)) if value is not None
        ]
        if given:
            raise InputError(f"{' and '.join(given)} without --nnodes", hint=_HINT)
        return Machines()
    if node_rank is None or rendezvous is None:
        missing = [name for name, value in (("--node-rank", node_rank), ("--rendezvous", rendezvous)) if value is None]
        raise InputError(f"--nnodes {nnodes} without {' and '.join(missing)}", hint=_HINT)
    if node_rank >= nnodes:
        raise InputError(f"--node-rank {node_rank} of --nnodes {nnodes}: they are counted from 0", hint=_HINT)
    place = re.fullmatch(r"\[?([^\[\]\s/]+?)\]?:([0-9]{1,5})", rendezvous)
    if place is None or not 0 < int(place[2]) < 2**16:
        hint = "HOST:PORT, such as 10.0.0.1:29500: an address of machine 0 and a free port there, the same everywhere"
        raise InputError(f"--rendezvous {rendezvous!r} is no address with a port", hint=hint)
    return Machines(nnodes, node_rank, place[1], int(place[2]))
