"""Where a model's parameters lie, and so how one gets at whole ones.

Whatever trains, clips, saves, digests or sends weights asks a placement, and walks no parameters by itself. Today every
process holds all parameters whole; one that holds a part of each would be one more class here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from align.collective import collective

_BUCKET_BYTES = 64 * 2**20
"""Gradients travel in messages of about this size."""


class Placement:
    """All parameters whole, in one process."""

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module that forward passes go through, made of one whose parameters are whole."""
        return model

    def full_parameters(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Every parameter by name, whole and detached, one at a time."""
        for name, parameter in model.named_parameters():
            yield name, parameter.detach()

    def state(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors of a model or its optimiser, detached, to be saved or digested. All processes must ask."""
        return {name: tensor.detach() for name, tensor in tensors.items()}

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
