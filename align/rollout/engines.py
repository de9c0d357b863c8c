"""From a recipe's ``rollout`` block to an engine that samples from a policy."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from align.data.chat.encoder import Encoder
from align.errors import EnvironmentFault
from align.models.files.positions import positions_at, require_positions
from align.models.load import is_adapter, load_policy, locate, whole_folder
from align.recipe.blocks.rollout import Rollout
from align.recipe.schema import Model
from align.rollout.engine import RolloutEngine
from align.rollout.limits import require_head_size
from align.rollout.process import ProcessEngine
from align.rollout.scripted import ScriptedEngine
from align.rollout.sync import CANARY_TOKENS, push
from align.rollout.transformers import TransformersEngine
from align.rollout.vllm import VllmEngine, VllmSettings

_log = logging.getLogger("align")


@contextmanager
def open_engine(
    rollout: Rollout,
    model: Model,
    encoder: Encoder,
    *,
    max_length: int,
    cache: Path,
    resolve: Callable[[str], Path | str],
    live: nn.Module | None = None,
) -> Iterator[RolloutEngine]:
    """An engine that samples from ``model``, closed on the way out, whatever happens.

    Args:
        rollout: the recipe's block.
        model: the policy, already resolved. An adapter's folder is sampled with the adapter.
        encoder: the policy's own; its stop ids end an answer.
        max_length: longest prompt with its answer, in tokens.
        cache: where dequantised weights are kept.
        resolve: from a reference of the recipe to a place.
        live: the model in training, if there is one; its weights are the ones that are sampled from (``transformers``
            shares it, ``vllm`` gets them by :func:`align.rollout.sync.push`).

    Raises:
        InputError: the model has no positions for ``max_length``.
        EnvironmentFault: vllm is asked for and not installed, cannot serve the model on this machine, or does not
            start.
    """
    kind = _kind(rollout)
    if kind != "scripted":
        hint = "lower max_new_tokens or max_prompt_length, or use a model that reads longer texts"
        if note := require_positions(positions_at(locate(model)), max_length, "prompt and answer", hint):
            _log.warning("note: %s", note)
    if kind == "scripted":
        assert rollout.script is not None
        engine: RolloutEngine = ScriptedEngine(Path(resolve(rollout.script)), encoder, max_length=max_length)
    elif kind == "transformers":
        sampled = live if live is not None else load_policy(model, cache=cache, device=_device())
        engine = TransformersEngine(sampled, encoder, max_length=max_length, shared=live is not None)
    else:
        engine = _vllm(rollout, model, encoder, max_length, cache, several="WORLD_SIZE" in os.environ)
    try:
        if kind == "vllm" and live is None and is_adapter(model):
            canary = encoder.encode_prompt([{"role": "user", "content": "Write one sentence about rain."}]).tolist()
            canaries = [canary[: max(1, max_length - CANARY_TOKENS)]]
            push(engine, load_policy(model, cache=cache), version=0, canaries=canaries, dtype=precision(rollout))
        yield engine
    finally:
        engine.close()


def precision(rollout: Rollout) -> Literal["fp32", "bf16"]:
    """Of the engine's weights: what bounds how far its log-probs may be from the trainer's."""
    if _kind(rollout) != "vllm":
        return "fp32"
    return rollout.dtype or ("bf16" if torch.cuda.is_available() else "fp32")


def _kind(rollout: Rollout) -> str:
    installed = importlib.util.find_spec("vllm") is not None
    if rollout.engine == "vllm" and not installed:
        raise EnvironmentFault(
            "rollout.engine: vllm needs vLLM, which is not installed", hint="`align doctor` says how to install it"
        )
    if rollout.engine != "auto":
        return rollout.engine
    if not installed:
        _log.info("vLLM is not installed: sampling with transformers, which is several times slower")
    return "vllm" if installed else "transformers"


def _vllm(
    rollout: Rollout, model: Model, encoder: Encoder, max_length: int, cache: Path, *, several: bool
) -> RolloutEngine:
    folder = whole_folder(model, cache)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not torch.cuda.is_available():
        require_head_size(config)
    settings = VllmSettings(
        stop_ids=list(encoder.stop_ids),
        vocabulary=encoder.vocabulary,
        dtype=precision(rollout),
        max_length=min(max_length, config.get("max_position_embeddings") or max_length),
        cache_bytes=int(rollout.cache_gb * 1e9) if rollout.cache_gb is not None else _default_cache(),
        max_sequences=rollout.max_sequences,
    )
    own_process = (
        rollout.own_process if rollout.own_process is not None else several or VllmEngine.in_use or not _native(config)
    )
    return ProcessEngine(folder, settings) if own_process else VllmEngine(folder, settings)


def _default_cache() -> int:
    return torch.cuda.get_device_properties(0).total_memory // 3 if torch.cuda.is_available() else 2 * 10**9


def _native(config: Mapping[str, Any]) -> bool:
    """Does vLLM have code of its own for this model? Otherwise it runs transformers' code, and changes its classes to
    do so."""
    architectures = config.get("architectures") or []
    from vllm.model_executor.models import ModelRegistry

    modules = [
        str(getattr(ModelRegistry.models[name], "module_name", ""))
        for name in architectures
        if name in ModelRegistry.models
    ]
    return any(not module.endswith(".transformers") for module in modules)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
