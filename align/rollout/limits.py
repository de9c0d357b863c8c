"""Checking before sampling what an engine does not support. Imports neither torch nor vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from align.errors import EnvironmentFault, InputError, Problem

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head sizes of vLLM 0.32's attention on a CPU (``CPUAttentionBackend.get_supported_head_sizes``)."""


def head_size(config: Mapping[str, Any]) -> int | None:
    """Head size of a model's attention, from its ``config.json``; None when that does not say."""
    text = config.get("text_config") or config
    if isinstance(text.get("head_dim"), int):
        return int(text["head_dim"])
    width, heads = (
        next((text[key] for key in keys if isinstance(text.get(key), int)), None) for keys in (_WIDTHS, _HEADS)
    )
    return width // heads if width and heads else None


_WIDTHS = ("hidden_size", "n_embd", "d_model")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")


def require_head_size(config: Mapping[str, Any]) -> None:
    """Raises :class:`EnvironmentFault` when vLLM has no attention for heads of this size on a CPU."""
    size = head_size(config)
    if size is not None and size not in CPU_HEAD_SIZES and "kv_lora_rank" not in config:
        problem = (
            f"vLLM on a CPU has no attention for heads of {size} ({', '.join(map(str, CPU_HEAD_SIZES))} are served)"
        )
        raise EnvironmentFault(Problem(problem, hint="set rollout.engine: transformers, or sample on a GPU"))


def require_vllm_serves(config: Mapping[str, Any], device: str) -> None:
    """:func:`require_head_size` where vLLM computes on a "cpu"; on "cuda" it has attention for heads of every size."""
    if device == "cpu":
        require_head_size(config)


def require_room(prompts: Sequence[Sequence[int]], max_new_tokens: int, max_length: int) -> None:
    """Raises :class:`InputError` when a prompt (token ids) and ``max_new_tokens`` together exceed ``max_length``.

    Called before anything is sampled, so that the answers to other prompts are not lost to a long one.
    """
    long = [
        (number, len(prompt)) for number, prompt in enumerate(prompts, 1) if len(prompt) + max_new_tokens > max_length
    ]
    if long:
        number, length = long[0]
        what = (
            f"prompt {number:,} of {len(prompts):,} has {length:,} tokens: no room for {max_new_tokens:,} more in"
            f" {max_length:,}"
        )
        others = f" ({len(long):,} such prompts)" if len(long) > 1 else ""
        hint = (
            "set max_length (of ppo: max_prompt_length) so that the two fit into it: longer prompts are left out then,"
            " and counted"
        )
        raise InputError(f"{what}{others}", hint=hint)
