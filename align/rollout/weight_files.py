"""The way of a policy's weights into engines that run in processes of their own: safetensors files, in memory where
they fit, one copy for all engines of a machine."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from align import files
from align.rollout.engine import WeightSource

_log = logging.getLogger("align")
SHARED_MEMORY = Path("/dev/shm")
FILE_BYTES = 10**9
"""A file holds about this much, and so does this process's own memory while it is written."""


@contextmanager
def weight_files(weights: WeightSource) -> Iterator[list[str]]:
    """The weights as files, which only this user can read and which are removed on the way out.

    Where all processes take the weights together (``weights.taken_by``), the first process of each machine writes them
    and the others read them too: eight processes would write the model eight times.

    Raises:
        EnvironmentFault: there is no room, neither in memory nor in the folder for temporary files.
    """
    together = weights.taken_by
    if together is None:
        with _written(weights) as written:
            yield written
        return
    machines = together.gather(_machine())
    writer = machines.index(machines[together.rank])
    with ExitStack() as stack:
        if writer == together.rank:
            mine = stack.enter_context(_written(weights))
        else:
            mine = []
            for _ in weights:  # getting at a tensor may need all processes
                pass
        yield together.gather(mine)[writer]
        together.barrier()  # all have read them


def _machine() -> tuple[str, int]:
    """The same for two processes only where they see the same files in memory: on one machine, in one container."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    folder = SHARED_MEMORY if SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
    return (boot.read_text(encoding="ascii").strip() if boot.exists() else ""), folder.stat().st_dev


@contextmanager
def _written(weights: WeightSource) -> Iterator[list[str]]:
    written: list[str] = []
    with ExitStack() as stack:
        for part in _parts(weights):
            folder = _folder(sum(tensor.numel() * tensor.element_size() for tensor in part.values()))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            file = folder / "weights.safetensors"
            with files.machine_faults(folder):
                save_file(part, file)
            written.append(str(file))
        yield written


def _parts(weights: WeightSource) -> Iterator[dict[str, Tensor]]:
    """Tensors in the memory of this process, about :data:`FILE_BYTES` at a time."""
    part: dict[str, Tensor] = {}
    size = 0
    for name, given in weights:
        tensor = given.detach().cpu().contiguous()
        if part and size + tensor.numel() * tensor.element_size() > FILE_BYTES:
            yield part
            part, size = {}, 0
        # A tied LM head: safetensors keeps no two names for one tensor
        part[name] = tensor.clone() if any(tensor.data_ptr() == other.data_ptr() for other in part.values()) else tensor
        size += tensor.numel() * tensor.element_size()
    if part:
        yield part


def _folder(size: int) -> Path:
    """A new one, of this user alone, with room for ``size`` bytes: in memory, else in the one for temporary files."""
    if SHARED_MEMORY.is_dir() and files.free_space(SHARED_MEMORY) > 1.1 * size:
        return Path(tempfile.mkdtemp(prefix="align-weights-", dir=SHARED_MEMORY))
    place = Path(tempfile.gettempdir())
    files.free_space_or_raise(place, size)
    if SHARED_MEMORY.is_dir():
        _tell_once(place)
    return Path(tempfile.mkdtemp(prefix="align-weights-"))


@cache
def _tell_once(place: Path) -> None:
    _log.warning(
        "note: %s has too little room (%.1f GB are free), and the policy's weights reach vLLM through %s, which is"
        " slower; a container gets more with --shm-size",
        SHARED_MEMORY,
        files.free_space(SHARED_MEMORY) / 1e9,
        place,
    )
