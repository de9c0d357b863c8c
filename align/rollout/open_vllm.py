"""From a ``rollout`` block to vLLM: how it serves the policy, and in which process."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import torch

from align.models.load import whole_folder
from align.recipe.blocks.rollout import VllmRollout
from align.rollout.engine import RolloutEngine, SampledPolicy, device_here
from align.rollout.limits import require_vllm_serves
from align.rollout.process import ProcessEngine
from align.rollout.vllm import VllmEngine, VllmSettings


def opened(rollout: VllmRollout, policy: SampledPolicy) -> RolloutEngine:
    """vLLM with the policy's weights, or with those of an adapter's base.

    Raises EnvironmentFault when it cannot serve the model on this machine, or does not start.
    """
    folder = whole_folder(policy.model, policy.cache)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    device = device_here()
    require_vllm_serves(config, device)
    free, total = torch.cuda.mem_get_info() if device == "cuda" else (None, None)
    cache = int(rollout.cache_bytes(device, total))
    if free is not None and rollout.cache_gb is None:
        cache = cache_beside(cache, free, sum(file.stat().st_size for file in folder.glob("*.safetensors")))
    settings = VllmSettings(
        stop_ids=list(policy.encoder.stop_ids),
        vocabulary=policy.encoder.vocabulary,
        dtype=rollout.precision(device),
        max_length=min(policy.max_length, config.get("max_position_embeddings") or policy.max_length),
        cache_bytes=cache,
        max_sequences=rollout.max_sequences,
    )
    own_process = rollout.own_process
    if own_process is None:
        own_process = "WORLD_SIZE" in os.environ or VllmEngine.in_use or not _native(config)
    return ProcessEngine(folder, settings) if own_process else VllmEngine(folder, settings)


def cache_beside(wanted: int, free: int, weights: int) -> int:
    """Bytes of the cache where the recipe does not say how many.

    ``wanted`` follows from the GPU's size alone. On a GPU that a trainer and other models are on as well, the cache
    takes at most 80 % of what the engine's weights will leave free; the rest is for its activations and the trainer's.
    A tenth of what is wanted is the least: below it vLLM refuses, and says by how much.
    """
    return min(wanted, max(wanted // 10, int(0.8 * (free - weights))))


def _native(config: Mapping[str, Any]) -> bool:
    """Does vLLM have its own code for this model? Otherwise it runs transformers' code and modifies transformers'
    classes."""
    architectures = config.get("architectures") or []
    from vllm.model_executor.models import ModelRegistry

    modules = [
        str(getattr(ModelRegistry.models[name], "module_name", ""))
        for name in architectures
        if name in ModelRegistry.models
    ]
    return any(not module.endswith(".transformers") for module in modules)
