"""Where a model's parameters lie, and so how one gets at whole ones.

Whatever trains, clips, saves, digests or sends weights asks a placement, and walks no parameters by itself
(tests/repo/test_placement.py finds who does). Every process holds all parameters whole, or a part of each
(``train.sharding``).

Parts are gathered when a layer is about to compute, and let go of after it. Who computes with a model therefore does it
inside :func:`in_forward`, and all processes make the same passes in the same order, because each of them waits for the
parts of the others (:mod:`align.batching.even` sees to that).

Names, shapes, dtypes, devices and what is trained are the same wherever values lie: the functions at the end tell them
of any model.
"""

from __future__ import annotations

import copy
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from align.collective import collective

Module = TypeVar("Module", bound=nn.Module)
T = TypeVar("T")
_BUCKET_BYTES = 64 * 2**20
"""Gradients travel in messages of about this size."""


class Placement:
    """All parameters whole, in one process."""

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module that forward passes go through, made of one whose parameters are whole."""
        return model

    def whole(self, tensor: Tensor) -> Tensor:
        """A tensor of a model or its optimiser, whole and detached. All processes must ask for it, and so for whatever
        else here is whole: a tensor that lies in parts is put together from all of them, whoever is asked."""
        return full(tensor.detach())

    def whole_copy(self, module: Module) -> Module:
        """A copy of a model or a part of it, whose parameters are whole."""
        copied: dict[int, Any] = {
            id(parameter): nn.Parameter(self.whole(parameter), requires_grad=parameter.requires_grad)
            for parameter in module.parameters()
            if in_parts(parameter)
        }
        return copy.deepcopy(module, copied)

    def full_parameters(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Every parameter by name, whole and detached, one at a time."""
        for name, parameter in model.named_parameters():
            yield name, self.whole(parameter)

    def full_state(self, model: nn.Module) -> dict[str, Tensor]:
        """Every parameter and every buffer that is saved, by name, whole and detached."""
        return self.state(model.state_dict(keep_vars=True))

    def saved(self, model: nn.Module, tied: Iterable[str] = ()) -> Iterator[tuple[str, Tensor]]:
        """:meth:`full_state` one tensor at a time, without second names: of a tensor with several, one that is not in
        ``tied`` is kept."""
        names: dict[int, list[str]] = {}
        tensors = model.state_dict(keep_vars=True)
        for name, tensor in tensors.items():
            names.setdefault(id(tensor), []).append(name)
        for of_tensor in names.values():
            kept = next((name for name in of_tensor if name not in tied), of_tensor[0])
            yield kept, self.whole(tensors[kept])

    def state(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of a model or its optimiser, whole and detached, to be saved or digested. One that comes under two
        names stays one."""
        made = {id(tensor): self.whole(tensor) for tensor in tensors.values()}
        return {name: made[id(tensor)] for name, tensor in tensors.items()}

    part: int | None = 0
    """The number of the part of every tensor that this process saves; None where another one saves the same."""
    parts: int = 1
    """In how many parts tensors are saved."""

    def own_part(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What this process saves of tensors of a model or its optimiser; see :attr:`part`. Nobody else is asked."""
        return {name: tensor.detach() for name, tensor in tensors.items()}

    def read(self, saved: SavedTensors, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Tensors that were saved, in whatever parts, as these processes hold them. ``NAME`` and ``NAME/...`` are of
        the parameter NAME."""
        return {key: saved.rows(key) for key in saved.keys()}  # noqa: SIM118 - not a mapping

    def load(self, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
        """Set these parameters to values that :meth:`state` or :meth:`read` returned."""
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])

    def reduce_and_clip(
        self,
        parameters: Mapping[str, nn.Parameter],
        groups: Mapping[str, Iterable[nn.Parameter]],
        max_norm: float | None,
    ) -> dict[str, float]:
        """Make the gradients those of the whole step, in place; then scale those of each group to at most ``max_norm``.
        Returns the norm that each group had."""
        self._reduce(list(parameters.values()))
        return {name: _clip(list(members), max_norm) for name, members in groups.items()}

    def _reduce(self, parameters: Sequence[nn.Parameter]) -> None:
        """One process has the gradient of the whole step."""


class SummedGradients(Placement):
    """All parameters whole in each of several processes, whose gradients are added up.

    Losses are divided by global counts, so the sum is the gradient of the whole step; a process without a micro-batch
    contributes zeros.

    Args:
        saves: this process saves the tensors, which are the same in all.
    """

    def __init__(self, *, saves: bool = True) -> None:
        self.part = 0 if saves else None

    def _reduce(self, parameters: Sequence[nn.Parameter]) -> None:
        """A few large messages instead of many small ones."""
        if any(parameter.is_cuda for parameter in parameters):
            # NCCL's messages end the process without a word when somebody does not come, and so nobody begins them
            # before all are here.
            with collective("the gradients of a step"):
                dist.all_reduce(torch.zeros(1))
        bucket: list[Tensor] = []
        size = 0
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if bucket and (size > _BUCKET_BYTES or bucket[0].dtype != parameter.grad.dtype):
                _add_up(bucket)
                bucket, size = [], 0
            bucket.append(parameter.grad)
            size += parameter.grad.numel() * parameter.grad.element_size()
        if bucket:
            _add_up(bucket)


WHOLE = Placement()
"""For models that are read and written by one process, or whole by each."""


class SavedTensors(Protocol):
    """Tensors in files, which need not be read as a whole."""

    def keys(self) -> Iterable[str]:
        """Their names."""

    def shape(self, key: str) -> tuple[int, ...]:
        """Of the whole tensor."""

    def rows(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Some rows of a tensor (its first dimension); all of them by default, and of what has no dimension."""


class Sharded(Placement):
    """A part of every parameter in each of several processes (torch's FSDP2): of its rows, in the order of processes.

    Every decoder layer is gathered by itself, and what is in none (embeddings, last norm, heads) together. Gradients
    are added up, as :class:`SummedGradients` adds them, and each process gets those of its part: after every backward
    pass, so nothing is left to add up at the end of a step.

    Args:
        device: of this process.
        shape: (processes,), which hold the parts; or (copies, processes that hold the parts of one).
    """

    def __init__(self, device: torch.device, shape: tuple[int, ...]) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        names = ("copies", "parts")[-len(shape) :]
        self._mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
        among = self._mesh["parts"]
        self.parts = among.size()
        first = len(shape) == 1 or self._mesh.get_local_rank("copies") == 0
        self._part = among.get_local_rank()
        self.part = self._part if first else None

    def wrap(self, model: nn.Module) -> nn.Module:
        """The same module, whose parameters are replaced by this process's parts of them."""
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
        from transformers.modeling_layers import GradientCheckpointingLayer

        if isinstance(model, FSDPModule):
            return model
        # Views leave a stream's forward (the last hidden state, keys and values); nobody writes into them
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        # Batches and bounds of trees pass through the forward: nothing is cast on the way in
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        for layer in layers:
            fully_shard(layer, mesh=self._mesh, mp_policy=policy, reshard_after_forward=True)
        for module in _of_another_dtype(model, layers):
            fully_shard(module, mesh=self._mesh, mp_policy=policy, reshard_after_forward=True)
        root: Any = fully_shard(model, mesh=self._mesh, mp_policy=policy, reshard_after_forward=False)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # losses are divided by global counts: gradients are summed
                if self._mesh.device_type == "cpu":
                    module.set_force_sum_reduction_for_comms(True)  # gloo knows no sum with a factor
        root._align_forward = types.MethodType(lambda self, function: function(), root)
        register_fsdp_forward_method(root, "_align_forward")
        place = _Root(root)
        for module in model.modules():
            module._align_root = place  # type: ignore[assignment]
        with torch.no_grad():
            in_forward(model, lambda: None)  # whose forward runs first is the root, from then on
        return model

    def own_part(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The rows that are here; what has none is whole everywhere."""
        return {name: _local(tensor.detach()) for name, tensor in tensors.items()}

    def read(self, saved: SavedTensors, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """As of every placement: this process's rows, wherever they were saved."""
        return {key: self._placed(saved, key, _of(key, parameters)) for key in saved.keys()}  # noqa: SIM118

    def _placed(self, saved: SavedTensors, key: str, like: nn.Parameter) -> Tensor:
        if not saved.shape(key):  # AdamW's count of steps
            return saved.rows(key)
        rows = -(-like.shape[0] // self.parts)
        start, stop = (min(number * rows, like.shape[0]) for number in (self._part, self._part + 1))
        placed = torch.zeros_like(like.detach())
        _local(placed).copy_(saved.rows(key, start, stop))
        return placed


class _Root:
    """The module whose forward gathers what is in no layer, and first of all passes has to begin."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self.running = False
        self.gathered = False

    @property
    def module(self) -> Any:
        module = self._module()
        assert module is not None, "its parts are in use"
        return module


def in_forward(model: nn.Module, function: Callable[[], T]) -> T:
    """Call ``function``, which computes with ``model`` or a part of it. Where the model is sharded, the call runs
    inside the forward pass that gathers its parameters; elsewhere nothing else happens. ``function`` must return every
    tensor that a backward pass begins at, alone or in a tuple."""
    root: _Root | None = getattr(model, "_align_root", None)
    if root is None or root.running:
        return function()
    root.running = True
    try:
        found: T = root.module._align_forward(function)
    finally:
        root.running = False
    if not torch.is_grad_enabled() and not root.gathered:
        root.module.reshard()  # no backward pass will, and the optimiser moves the parts
    return found


def in_step(model: nn.Module) -> bool:
    """Do the forward passes of ``model`` wait for those of the other processes, because each has a part of it?"""
    root: _Root | None = getattr(model, "_align_root", None)
    return root is not None and not root.gathered


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, every process has all parameters of ``model`` whole, and may compute with them by itself, without
    gradient. All processes must go in. Nothing happens where they are whole anyway."""
    from torch.distributed.fsdp import FSDPModule

    root: _Root | None = getattr(model, "_align_root", None)
    if root is None:
        yield
        return
    modules = [module for module in root.module.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    root.gathered = True
    try:
        yield
    finally:
        root.gathered = False
        for module in modules:
            module.set_reshard_after_forward(module is not root.module, recurse=False)
            module.reshard()


def in_parts(tensor: Tensor) -> bool:
    """Does this process hold a part of it only?"""
    return hasattr(tensor, "full_tensor")


def full(tensor: Any) -> Tensor:
    """The tensor itself, or put together from the parts of all processes, each of which must ask."""
    found: Tensor = tensor.full_tensor() if in_parts(tensor) else tensor
    return found


def _local(tensor: Any) -> Tensor:
    found: Tensor = tensor.to_local() if in_parts(tensor) else tensor
    return found


def _of(key: str, parameters: Mapping[str, nn.Parameter]) -> nn.Parameter:
    return parameters[key] if key in parameters else parameters[key.rsplit("/", 1)[0]]


def _of_another_dtype(model: nn.Module, layers: Sequence[nn.Module]) -> list[nn.Module]:
    """Modules outside ``layers`` whose trained parameters have another type than most (a score's fp32 head on a bf16
    model): gradients of two types cannot be sent together."""
    inside = {id(module) for layer in layers for module in layer.modules()}
    types_of = {
        module: {parameter.dtype for parameter in module.parameters(recurse=False) if parameter.requires_grad}
        for module in model.modules()
        if id(module) not in inside
    }
    sizes: dict[torch.dtype, int] = {}
    for module, dtypes in types_of.items():
        for dtype in dtypes:
            sizes[dtype] = sizes.get(dtype, 0) + sum(p.numel() for p in module.parameters(recurse=False))
    common = max(sizes, key=lambda dtype: sizes[dtype], default=None)
    return [module for module, dtypes in types_of.items() if dtypes and dtypes != {common}]


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter by name; one that two modules share comes once. For what is known of it wherever its values lie,
    and to be handed to an optimiser: whoever reads values asks a placement."""
    return dict(model.named_parameters())


def size_of(model: nn.Module) -> int:
    """How many numbers the parameters are."""
    return sum(parameter.numel() for parameter in model.parameters())


def device_of(model: nn.Module) -> torch.device:
    """The device that the model computes on."""
    return next(model.parameters()).device


def _add_up(bucket: list[Tensor]) -> None:
    flat = torch.cat([gradient.flatten() for gradient in bucket])
    with collective("the gradients of a step"):
        dist.all_reduce(flat)
    start = 0
    for gradient in bucket:
        gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
        start += gradient.numel()


def _clip(parameters: Sequence[nn.Parameter], max_norm: float | None) -> float:
    """Scale the gradients to at most ``max_norm`` in place and return the norm they had (fp32)."""
    with_gradient = [p for p in parameters if p.grad is not None]
    norm = full(torch.nn.utils.get_total_norm([p.grad for p in with_gradient if p.grad is not None]))
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(with_gradient, max_norm, norm)
    return float(norm)
