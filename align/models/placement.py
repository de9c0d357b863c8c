"""Where a model's parameters lie, and so how one gets at whole ones.

Whatever trains, clips, saves, digests or sends weights asks a placement, and walks no parameters by itself
(tests/repo/test_placement.py finds who does). Today every process holds all parameters whole; one that holds a part of
each would be one more class here.

Names, shapes, dtypes, devices and what is trained are the same wherever values lie: the functions at the end tell them
of any model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from align.collective import collective

Module = TypeVar("Module", bound=nn.Module)

_BUCKET_BYTES = 64 * 2**20
"""Gradients travel in messages of about this size."""


class Placement:
    """All parameters whole, in one process."""

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module that forward passes go through, made of one whose parameters are whole."""
        return model

    def whole(self, tensor: Tensor) -> Tensor:
        """A tensor of a model or its optimiser, whole and detached. All processes must ask for it, and so for whatever
        else here is whole."""
        return tensor.detach()

    def whole_copy(self, module: Module) -> Module:
        """A copy of a model or a part of it, whose parameters are whole."""
        return copy.deepcopy(module)

    def full_parameters(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Every parameter by name, whole and detached, one at a time."""
        for name, parameter in model.named_parameters():
            yield name, self.whole(parameter)

    def full_state(self, model: nn.Module) -> dict[str, Tensor]:
        """Every parameter and every buffer that is saved, by name, whole and detached."""
        return self.state(model.state_dict(keep_vars=True))

    def state(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of a model or its optimiser, whole and detached, to be saved or digested. One that comes under two
        names stays one."""
        made = {id(tensor): self.whole(tensor) for tensor in tensors.values()}
        return {name: made[id(tensor)] for name, tensor in tensors.items()}

    def load(self, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`state` gave of these parameters."""
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
    """

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
    norm = torch.nn.utils.get_total_norm([p.grad for p in with_gradient if p.grad is not None])
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(with_gradient, max_norm, norm)
    return float(norm)
