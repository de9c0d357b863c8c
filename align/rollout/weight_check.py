"""Checking that vLLM has the weights that were sent to it, tensor by tensor, after it fused and packed them.

vLLM fuses several of a model's matrices into one (q, k and v; gate and up) and stores matrices in its own layout, so
they cannot be read back. Instead their products with a fixed vector are compared, which for the whole model costs as
much as one token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from align.errors import TrainingFault

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Largest difference that is put down to rounding, relative to the largest value. A matrix of an earlier step differs
by more."""


_STEP = 2**24
"""Values that are converted to fp32 at once: 64 MB, where an embedding as a whole may not fit beside vLLM's cache."""


class Arrived:
    """Records the weights while they are sent, and compares those of a vLLM model with them.

    Args:
        device: where vLLM computes. Weights come through the CPU's memory, whose products take longer than the way to
            the GPU that they are on anyway.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sent: dict[str, Tensor] = {}

    def seen(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Passes the weights on, and records the product of each with the fixed vector."""
        for name, tensor in weights:
            here = tensor.to(self._device)
            self._sent[name] = _product(here)
            yield name, here

    def require(self, model: nn.Module) -> int:
        """Compare all tensors of a vLLM model with those that were sent; returns how many were compared.

        Raises:
            TrainingFault: some differ, of which up to five are named as in transformers; or none could be compared.
        """
        from vllm.model_executor.layers.linear import LinearBase
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        fused: Mapping[str, list[str]] = getattr(model, "packed_modules_mapping", {})
        compared, wrong = 0, []
        for path, module in model.named_modules():
            for own, parameter in module.named_parameters(recurse=False):
                name = f"{path}.{own}" if path else own
                sent = self._pieces(name, fused, head=isinstance(module, ParallelLMHead))
                if not sent:
                    continue
                applies = isinstance(module, (LinearBase, ParallelLMHead)) and own == "weight"
                held = _applied(module, parameter) if applies else _product(parameter)
                at = 0
                for piece, expected in sent.items():
                    part = held[at : at + len(expected)]
                    at += len(expected)
                    compared += 1
                    scale = expected.abs().max().clamp(min=1e-6)
                    off = float((part - expected).abs().max() / scale) if len(part) == len(expected) else float("inf")
                    if not off <= _TOLERANCE.get(parameter.dtype, 2e-2):
                        wrong.append((piece, off))
        if wrong:
            shown = ", ".join(f"{name} (off by {off:.2g})" for name, off in wrong[:5])
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise TrainingFault(
                f"vLLM does not hold the weights that it was given: {shown}{more}",
                hint="set rollout.engine: transformers, and please report it with the model's name",
            )
        if not compared:
            raise TrainingFault(
                "none of vLLM's tensors could be compared with the trained ones",
                hint="set rollout.engine: transformers",
            )
        return compared

    def _pieces(self, name: str, fused: Mapping[str, list[str]], *, head: bool) -> dict[str, Tensor]:
        """The sent tensors that a tensor of vLLM was fused from, by name, in the order of fusing."""
        if name in self._sent:
            return {name: self._sent[name]}
        *parents, module, own = name.split(".")
        names = [".".join((*parents, part, own)) for part in fused.get(module, ())]
        if names and all(part in self._sent for part in names):
            return {part: self._sent[part] for part in names}
        embedding = next(
            (key for key in self._sent if key.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight"))), None
        )
        return {name: self._sent[embedding]} if head and own == "weight" and embedding else {}


def _vector(length: int, like: Tensor) -> Tensor:
    """The fixed vector: entries of size 1 / sqrt(length) with pseudo-random signs that are the same everywhere."""
    index = torch.arange(length, dtype=torch.int64)
    signs: Tensor = ((index * 2654435761 + 12345) >> 7) % 2 * 2 - 1
    return signs.double().div(length**0.5).to(dtype=like.dtype, device=like.device)


def _product(tensor: Tensor) -> Tensor:
    """In fp32, a vector itself, or the product of a matrix with the fixed vector; a tensor with more dimensions is
    flattened to a matrix first."""
    tensor = tensor.detach()
    if tensor.ndim < 2:
        return tensor.float().flatten().cpu()
    vector = _vector(tensor.shape[-1], tensor).float()
    rows = torch.split(tensor.reshape(-1, tensor.shape[-1]), max(1, _STEP // tensor.shape[-1]))
    return torch.cat([part.float() @ vector for part in rows]).cpu()


def _applied(module: nn.Module, parameter: Tensor) -> Tensor:
    """In fp32, a layer of vLLM applied to the fixed vector, by the code that sampling runs, without bias."""
    names = ("input_size_per_partition", "input_size", "embedding_dim")
    width = int(next(filter(None, (getattr(module, name, None) for name in names))))
    like = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
    method: Any = module.quant_method
    applied: Tensor = method.apply(module, _vector(width, like)[None], bias=None)[0]
    return applied.float().cpu()
