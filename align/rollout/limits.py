"""What vLLM cannot serve on a CPU, known before it is started. Imports neither torch nor vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align.errors import EnvironmentFault, Problem

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head sizes of vLLM 0.32's attention on a CPU (``CPUAttentionBackend.get_supported_head_sizes``)."""


def head_size(config: Mapping[str, Any]) -> int | None:
    """Values in a head of a model's attention, from its ``config.json``; None where it does not say."""
    text = config.get("text_config") or config
    if isinstance(text.get("head_dim"), int):
        return int(text["head_dim"])
    width, heads = (next((text[key] for key in keys if isinstance(text.get(key), int)), None) for keys in (_WIDTHS, _HEADS))
    return width // heads if width and heads else None


_WIDTHS = ("hidden_size", "n_embd", "d_model")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")


def require_head_size(config: Mapping[str, Any]) -> None:
    """Raises :class:`EnvironmentFault` when vLLM has no attention for heads of this size on a CPU."""
    size = head_size(config)
    if size is not None and size not in CPU_HEAD_SIZES and "kv_lora_rank" not in config:
        problem = f"vLLM on a CPU has no attention for heads of {size} ({', '.join(map(str, CPU_HEAD_SIZES))} are served)"
        raise EnvironmentFault(Problem(problem, hint="set rollout.engine: transformers, or sample on a GPU"))
