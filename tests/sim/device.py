"""CUDA tensors that are not there: shapes, devices, memory, arithmetic and messages of a GPU, in a build of torch for the
CPU. ``with Simulation() as sim:`` runs any code of the package on ``torch.device("cuda")``.

What is real: every tensor on the CPU; of CUDA tensors shape, dtype, device, storage and the order in which storages
come and go; autograd, gradient checkpointing, autocast and optimisers, which are torch's own. An operation on tensors
of two devices raises, as on a GPU; so does a CPU tensor that is indexed by CUDA indices, which torch's fake tensors let
pass.

What is simulated: numbers. A CUDA tensor has none, except that small integer tensors (positions, lengths, branch
numbers) and tensors of a few floats keep theirs beside them as long as they follow from the CPU, so that whatever
depends on them (``nonzero``, a boolean index, ``int(x.sum())``) has the shapes of a real run. Any other number that
is read is 1. Seconds are a roofline (:data:`PEAK`), not a measurement. What a kernel allocates for itself is not seen,
but for logsumexp's copy of the logits.

:mod:`tests.sim.guard` must have been loaded before torch.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.amp.autocast_mode
import torch.cuda.amp.common
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._tools.fake_collectives import CollectiveOp, collective_ops, sync_ops
from torch.distributed.fsdp._fully_shard._fsdp_param import alloc_storage, free_storage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import align

CUDA = torch.device("cuda", 0)
SMALL = 2**22
"""Elements up to which an integer tensor keeps its numbers."""
FEW = 64
"""The same for floats."""
PEAK = {"bf16": 989e12 * 0.65, "fp32": 67e12 * 0.75, "bytes": 3.35e12 * 0.85, "launch": 3e-6}
"""What an H100 SXM gets: operations a second by dtype, bytes a second, and seconds that a kernel takes at least."""

aten = torch.ops.aten
_KERNELS = torch.library.Library("aten", "IMPL")
_PACKAGE = str(Path(align.__file__).parent)
_INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
_SHAPED_BY_NUMBERS = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten.bincount.default,
    aten._unique2.default,
    aten.repeat_interleave.Tensor,
    aten.equal.default,
}
_QUESTIONS = {
    aten.sym_size.default,
    aten.sym_stride.default,
    aten.sym_numel.default,
    aten.sym_storage_offset.default,
    aten.is_contiguous.default,
    aten.sym_is_contiguous.default,
    aten.is_non_overlapping_and_dense.default,
    torch.ops.prim.device.default,
}
_UNINITIALISED = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.empty_strided.default,
}


@dataclass
class Account:
    """What was counted since the last :meth:`Simulation.reset`."""

    flops: Counter[str] = field(default_factory=Counter)
    """Of matrix products, by "bf16" or "fp32"."""
    flops_at: Counter[tuple[str, str]] = field(default_factory=Counter)
    """The same by dtype and place in the package."""
    seconds: float = 0.0
    kernels: int = 0
    moved: int = 0
    """Bytes that kernels read and wrote."""
    messages: Counter[tuple[str, int]] = field(default_factory=Counter)
    """Bytes by collective and number of processes."""
    syncs: Counter[str] = field(default_factory=Counter)
    """How often the CPU waited for the GPU, by place."""
    compiled: set[tuple[Any, ...]] = field(default_factory=set)
    """What the compiled attention was called with that it is compiled for anew: shapes, dtype, with gradient or not."""
    live: int = 0
    """Bytes allocated now."""
    peak: int = 0
    by_place: Counter[str] = field(default_factory=Counter)
    """Live bytes by the line of the package that made them."""
    at_peak: dict[str, int] = field(default_factory=dict)
    """:attr:`by_place` when the most bytes were live."""

    def charge(self, kind: str, flops: float, moved: int, *, efficiency: float = 1.0) -> None:
        """One kernel."""
        if flops:
            self.flops[kind] += int(flops)
            self.flops_at[kind, place()] += int(flops)
        self.moved += moved
        self.kernels += 1
        self.seconds += max(flops / (PEAK[kind] * efficiency), moved / PEAK["bytes"], PEAK["launch"])


class Simulation(TorchDispatchMode):
    """Inside, CUDA tensors can be made and computed with. ``account`` holds what was counted."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.account = Account()
        self._storages: dict[int, tuple[int, str]] = {}
        """Size and place of origin of each live storage on the device."""
        self._overwritten: set[int] = set()
        """Storages that were written to with numbers that nobody knows."""

    def __enter__(self) -> Simulation:
        # So that torch.tensor(..., device="cuda") makes its tensor on the CPU and moves it where this class sees it.
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)
        torch._C._set_only_lift_cpu_tensors(False)

    def reset(self) -> Account:
        """Count anew from here; what is alive stays. Returns what was counted so far."""
        before, live, by_place = self.account, self.account.live, self.account.by_place
        self.account = Account(live=live, peak=live, by_place=Counter(by_place))
        return before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(kind not in (Tensor, nn.Parameter, FakeTensor) and _unpacks_itself(kind) for kind in types):
            return NotImplemented  # DTensor and the like become plain tensors first
        tensors = _tensors(*args, *kwargs.values())
        on_device = any(isinstance(t, FakeTensor) for t in tensors) or _names_cuda(args, kwargs)
        if not on_device or func in _QUESTIONS or func is aten.lift_fresh.default:
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return self._read(args[0])
        if func is aten.copy_.default and not isinstance(args[0], FakeTensor):
            return args[0].copy_(self._on_cpu(args[1], func))
        if func in _INDEXING:
            args = self._numbered_index(args)
        args = [_mapped(self._faked, x) for x in args]
        kwargs = {name: _mapped(self._faked, x) for name, x in kwargs.items()}
        tensors = _tensors(*args, *kwargs.values())
        if func in _SHAPED_BY_NUMBERS:
            return self._shaped_by_numbers(func, args, kwargs, tensors)
        with self.fake:
            out = func(*args, **kwargs)
        outs = _tensors(out)
        if func in collective_ops:
            self._message(func, args, outs)
        self._keep_numbers(func, args, kwargs, tensors, outs)
        self._count(func, args, kwargs, tensors, out, outs)
        self._track(outs)
        if func is aten.logsumexp.default:  # composed of others: exp(x - max) is as large as x
            self._used_meanwhile(size_of(tensors[0]))
        if outs and all(t.device.type == "cpu" for t in outs):
            return _mapped(partial(self._on_cpu, func=func, counted=True), out)
        return out

    # Numbers

    def numbers(self, t: Tensor) -> Tensor | None:
        """The numbers of a tensor, on the CPU; None where it has none."""
        if not isinstance(t, FakeTensor):
            return t
        known: Tensor | None = t.__dict__.get("_numbers")
        return None if known is None or t.untyped_storage()._cdata in self._overwritten else known

    def _faked(self, t: Tensor) -> Tensor:
        if isinstance(t, FakeTensor):
            return t
        fake = self.fake.from_tensor(t)
        if _is_small(t):
            fake.__dict__["_numbers"] = t.detach()
        return fake

    def _made(self, numbers: Tensor, device: torch.device) -> Tensor:
        """A tensor on the device with these numbers."""
        with self.fake:
            fake = FakeTensor(self.fake, numbers.to("meta"), device)
        fake.__dict__["_numbers"] = numbers
        return fake

    def _on_cpu(self, t: Tensor, func: Any, *, counted: bool = False) -> Tensor:
        """A real tensor for what was copied from the device. ``counted``: as a synchronisation already."""
        if not isinstance(t, FakeTensor):
            return t
        if not counted:
            self._sync(func)
        known = self.numbers(t)
        return torch.ones(t.shape, dtype=t.dtype) if known is None else known.clone()

    def _read(self, t: Tensor) -> Any:
        """One number, as by ``item()`` or ``float()``."""
        known = self.numbers(t)
        if t.device.type == "cuda":
            self._sync(aten._local_scalar_dense)
        return torch.ones((), dtype=t.dtype).item() if known is None else known.item()

    def _numbered_index(self, args: Any) -> Any:
        """The arguments of an indexing operation with numbers in place of boolean masks."""
        indexed, indices, *rest = args
        given = [i for i in indices if i is not None]
        if indexed.device.type == "cpu" and any(i.device.type == "cuda" for i in given):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        if all(i.dtype not in (torch.bool, torch.uint8) for i in given):
            return args
        numbered: list[Any] = []
        for i in indices:
            if i is None or i.dtype not in (torch.bool, torch.uint8):
                numbered.append(i)
                continue
            if i.device.type == "cuda":
                self._sync("boolean index")
            places = self._known(i, "a boolean index").nonzero(as_tuple=True)
            numbered += [self._made(p, i.device) if i.device.type == "cuda" else p for p in places]
        return (indexed, numbered, *rest)

    def _known(self, t: Tensor, what: str) -> Tensor:
        numbers = self.numbers(t)
        if numbers is None:
            raise RuntimeError(f"{what} at {place()} needs numbers that the simulation does not have")
        return numbers

    def _shaped_by_numbers(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        self._sync(func)
        device = tensors[0].device
        for t in tensors:
            if t.device != device:
                raise RuntimeError(f"Expected all tensors to be on the same device: {device} and {t.device} in {func}")
            self._known(t, str(func))
        made = _mapped(partial(self._made, device=device), self._run_on_numbers(func, args, kwargs))
        self._track(_tensors(made))
        return made

    def _run_on_numbers(self, func: Any, args: Any, kwargs: Any) -> Any:
        def swapped(x: Any) -> Any:
            return torch.device("cpu") if isinstance(x, torch.device) else _mapped(self.numbers, x)

        settings = {name: swapped(x) for name, x in kwargs.items() if name != "pin_memory"}
        return func(*map(swapped, args), **settings)

    def _keep_numbers(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], outs: list[Tensor]) -> None:
        """Do to the numbers what was done to the tensors, where all of them are known and the result is small."""
        known = all(self.numbers(t) is not None for t in tensors) and (tensors or func not in _UNINITIALISED)
        if outs and known and all(map(_is_small, outs)):
            found = _tensors(self._run_on_numbers(func, args, kwargs))
            for fake, numbers in zip(outs, found, strict=True):
                fake.__dict__["_numbers"] = numbers
        elif func._schema.is_mutable:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    keys = {t.untyped_storage()._cdata for t in _tensors(value)}
                    self._overwritten |= keys & self._storages.keys()

    # Counting

    def _sync(self, what: Any) -> None:
        name = what if isinstance(what, str) else str(what).removeprefix("aten.").partition(".")[0].strip("_")
        self.account.syncs[f"{place()} ({name})"] += 1

    def _track(self, outs: Iterable[Tensor]) -> None:
        account = self.account
        for t in outs:
            if not isinstance(t, FakeTensor) or t.fake_device.type != "cuda":
                continue
            storage = t.untyped_storage()
            if storage._cdata not in self._storages:
                self._storages[storage._cdata] = (0, place())
                weakref.finalize(storage, self._freed, storage._cdata).atexit = False
            self.resized(storage)
        if account.live > account.peak:
            account.peak, account.at_peak = account.live, dict(account.by_place)

    def _used_meanwhile(self, size: int) -> None:
        """An operation allocates so much for itself, and has freed it when it ends."""
        account = self.account
        if account.live + size > account.peak:
            account.peak = account.live + size
            account.at_peak = dict(account.by_place + Counter({place(): size}))

    def resized(self, storage: Any) -> None:
        """A storage has another size than before."""
        size, origin = self._storages[storage._cdata]
        grown = storage.nbytes() - size
        if grown:
            self._storages[storage._cdata] = (size + grown, origin)
            self.account.live += grown
            self.account.by_place[origin] += grown

    def _freed(self, key: int) -> None:
        size, origin = self._storages.pop(key)
        self._overwritten.discard(key)
        self.account.live -= size
        self.account.by_place[origin] -= size

    def _count(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], out: Any, outs: list[Tensor]) -> None:
        to_cpu = any(t.device.type == "cuda" for t in tensors) and any(t.device.type == "cpu" for t in outs)
        if to_cpu and not kwargs.get("non_blocking"):
            self._sync("copied to the CPU")
        inputs = {t.untyped_storage()._cdata for t in tensors}
        views = outs and not func._schema.is_mutable and all(t.untyped_storage()._cdata in inputs for t in outs)
        if views or func in _UNINITIALISED:
            return
        packet = getattr(func, "_overloadpacket", None)
        flops = flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0
        different = {id(t): t for t in (*tensors, *outs) if t.device.type == "cuda"}
        self.account.charge(kind_of(tensors), flops, size_of(*different.values()))

    def _message(self, func: Any, args: Any, outs: list[Tensor]) -> None:
        if func in sync_ops:
            return
        group = CollectiveOp.get_process_group(func, args)
        sent = [*_tensors(*args), *outs]
        name = func._schema.name.partition("::")[2].strip("_")
        self.account.messages[name, group.size()] += max(size_of(t) for t in sent)


def place() -> str:
    """The line of the package that is being executed; in a backward pass, which begins in C++, the operation whose
    gradient is computed."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_PACKAGE):
            return f"{name.removeprefix(_PACKAGE).lstrip('/')}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    node = torch._C._current_autograd_node()
    return "elsewhere" if node is None else f"backward of {node.name()}"


def size_of(*tensors: Tensor) -> int:
    """Bytes of their elements."""
    return sum(t.numel() * t.element_size() for t in tensors)


def kind_of(tensors: Iterable[Tensor]) -> str:
    """What a product of these is computed in."""
    half = any(t.dtype in (torch.bfloat16, torch.float16) for t in tensors if t.ndim > 1)
    return "bf16" if half else "fp32"


def _tensors(*values: Any) -> list[Tensor]:
    """The tensors among the values of an operation, which may be lists of them."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [x for x in value if isinstance(x, Tensor)]
    return found


def _mapped(change: Callable[[Tensor], Any], value: Any) -> Any:
    """The same with each of its tensors changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)([change(x) if isinstance(x, Tensor) else x for x in value])
    return value


def _is_small(t: Tensor) -> bool:
    return t.numel() <= (FEW if t.dtype.is_floating_point else SMALL)


def _names_cuda(args: Any, kwargs: Any) -> bool:
    devices = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.device)]
    return any(device.type == "cuda" for device in devices)


def _unpacks_itself(kind: Any) -> bool:
    dispatch = getattr(kind, "__torch_dispatch__", torch._C._disabled_torch_dispatch_impl)
    return bool(dispatch is not torch._C._disabled_torch_dispatch_impl)


# What torch does otherwise where it finds no GPU


def join(world: int) -> None:
    """Become the first of ``world`` processes. Every message arrives at once and holds nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        dist.destroy_process_group()
    if world > 1:
        dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())


def divided(sim: Simulation) -> None:
    """Let torch's FSDP2 run: it asks for streams and events of the GPU, of which there is one here that does everything
    in order, and frees and allocates storages without an operation that the simulation would see."""
    from torch.distributed import device_mesh
    from torch.distributed.fsdp._fully_shard import (
        _fsdp_collectives,
        _fsdp_init,
        _fsdp_param,
        _fsdp_param_group,
        _fsdp_state,
    )

    asking: list[Any] = [device_mesh, _fsdp_collectives, _fsdp_init, _fsdp_param_group, _fsdp_state]
    for module in asking:
        module._get_device_handle = lambda kind="cuda": _Streams if kind == "cuda" else torch.cpu
    resizing: Any = _fsdp_param
    for name, change in (("alloc_storage", alloc_storage), ("free_storage", free_storage)):
        setattr(resizing, name, partial(_noted, change, sim))


def _noted(change: Callable[[Tensor], None], sim: Simulation, t: Tensor) -> None:
    change(t)
    sim.resized(t.untyped_storage())


class _Stream:
    """A stream and an event of a GPU that does everything in order."""

    def __init__(self, *args: Any, **options: Any) -> None: ...

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *details: Any) -> None: ...

    def record_event(self, *args: Any) -> _Stream:
        """The stream is its own event."""
        return self

    def wait(self, *args: Any) -> None:
        """Everything before has happened."""

    record = record_event
    wait_stream = wait_event = synchronize = wait


class _Streams:
    """What FSDP2 asks of ``torch.cuda``."""

    Event = Stream = _Stream
    stream = staticmethod(_Stream)
    current_stream = staticmethod(_Stream)
    is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 8)
    current_device = staticmethod(lambda: 0)
    set_device = staticmethod(lambda device: None)


def _moved(old: Tensor, new: Tensor) -> None:
    """Makes a fake parameter the moved one in place. torch would exchange the two objects, which it cannot here: the
    simulation has references to them."""
    old.data = new.detach()
    old.fake_device = new.fake_device  # type: ignore[attr-defined]


def _patch() -> None:
    torch.cuda._lazy_init = lambda: None  # would look for a driver
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False  # or autocast("cuda") switches itself off
    torch.cuda.is_bf16_supported = lambda *args, **kwargs: True  # type: ignore[assignment]
    torch.cuda.get_device_capability = lambda *args: (9, 0)  # type: ignore[assignment]  # a Hopper GPU
    torch.cuda.get_rng_state = lambda *args: torch.zeros(16, dtype=torch.uint8)  # type: ignore[assignment]
    torch.cuda.set_rng_state = lambda *args: None  # type: ignore[assignment]
    torch.utils.swap_tensors = _moved
    FakeTensor.tolist = lambda self: self.cpu().tolist()  # type: ignore[method-assign]
    # One kernel on a GPU; torch would take it apart here, where it has none
    _KERNELS.impl("silu_backward", lambda *args: None, "CUDA")


_patch()
