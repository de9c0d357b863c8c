"""Numbers that are counted and not measured: the operations of a step, what known devices can do at most, and the kind
of a kernel by its name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from align.recipe.schema import Lora
from align.sizing.shapes import Shape

PEAK_BF16: Mapping[str, float] = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
}
"""Floating point operations per second in bf16 without sparsity, by the device's name; from NVIDIA's data sheets."""

KINDS = ("matmul", "attention", "elementwise", "copies", "other")
_PARTS_OF_NAMES = {  # in this order: kernels that copy, and fused attention, have words of the others in their names
    "attention": ("flex_attention", "triton_tem", "flash", "fmha", "scaled_dot_product", "sdpa"),
    "copies": ("memcpy", "memset", "copy", "catarray"),
    "matmul": ("gemm", "gemv", "nvjet", "cutlass", "xmma", "cublas", "splitk"),
    "elementwise": ("elementwise", "vectorized", "reduce", "triton_", "multi_tensor", "softmax", "norm"),
}
_CPU_OPERATIONS = {
    "matmul": "mm addmm bmm baddbmm matmul linear addmv mv dot",
    "copies": "copy_ _to_copy clone contiguous cat stack zero_ fill_ index_select gather",
    "elementwise": (
        "add add_ sub sub_ mul mul_ div div_ neg exp log pow sqrt rsqrt silu silu_backward sigmoid cos sin sum mean"
        " where clamp addcmul_ addcdiv_ lerp_ _fused_adamw_ _log_softmax _log_softmax_backward_data logsumexp"
        " log_sigmoid_forward log_sigmoid_backward"
    ),
}
_BY_OPERATION = {f"aten::{name}": kind for kind, names in _CPU_OPERATIONS.items() for name in names.split()}


def kernel_kind(name: str) -> str:
    """One of :data:`KINDS`, from the name of a GPU kernel or of an operation on the CPU."""
    if name in _BY_OPERATION:
        return _BY_OPERATION[name]
    lower = name.lower()
    return next((kind for kind, parts in _PARTS_OF_NAMES.items() if any(part in lower for part in parts)), "other")


def model_flops(shape: Shape, lora: Lora | None, batches: Iterable[Any], *, lm_head: bool) -> float:
    """Operations that training on micro-batches asks for: two for each weight and token in the forward pass, as many
    for the gradient of what enters a layer, as many for the weight's own where it is trained; attention's two products
    over the pairs of tokens that see each other, and their four in the backward pass.

    What is computed again in the backward pass (gradient checkpointing, logits, attention's scores) is no work asked
    for and is left out, as is usual for the utilisation of a model's operations (arXiv 2204.02311, appendix B). So are
    norms, activations and the first layer's unneeded gradient under an adapter.

    Args:
        batches: :class:`align.batching.batch.Batch` each.
        lm_head: is each target projected to the vocabulary?
    """
    passes = 3 if lora is None else 2
    total = 0.0
    for batch in batches:
        total += 2 * passes * shape.matrices * batch.num_tokens
        if lora is not None:
            total += 2 * 3 * shape.lora_parameters(lora.rank, lora.target_modules) * batch.num_tokens
        if lm_head:
            total += 2 * passes * shape.vocab * shape.hidden * batch.num_targets
        total += 2 * 2 * 3 * shape.layers * shape.heads * shape.head_dim * _pairs(batch)
    return total


def _pairs(batch: Any) -> int:
    """Pairs of tokens of which one sees the other, itself included."""
    pairs = 0
    for row in batch.rows:
        for span in row:
            for before, node in zip(span.before, span.nodes, strict=True):
                pairs += before * node.length + node.length * (node.length + 1) // 2
    return pairs
