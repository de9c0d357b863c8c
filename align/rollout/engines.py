"""Opening the engine that a recipe's ``rollout`` block describes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from align.data.chat.encoder import Encoder
from align.errors import EnvironmentFault
from align.models.files.positions import positions_at, require_positions
from align.models.load import is_adapter, load_policy, locate
from align.recipe.blocks.rollout import Precision, Rollout
from align.recipe.reference_syntax import registered
from align.recipe.schema import Model
from align.rollout.engine import RolloutEngine, SampledPolicy, device_here
from align.rollout.sync import CANARY_TOKENS, push

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
    """An engine that samples from ``model``; it is closed at the end of the block.

    Args:
        rollout: the recipe's block.
        model: the policy, already resolved. An adapter's folder is sampled with the adapter.
        encoder: the policy's encoder, whose stop ids end an answer.
        max_length: longest prompt with its answer, in tokens.
        cache: where dequantised weights are kept.
        resolve: gives the path, or hub id, of a reference in the recipe.
        live: the model in training, if there is one; its weights are the ones that are sampled from (an engine either
            shares it, or gets them by :func:`align.rollout.sync.push`).

    Raises:
        InputError: the model has no positions for ``max_length``.
        EnvironmentFault: the engine's package is not installed, or it cannot serve the model on this machine, or does
            not start.
    """
    chosen = _chosen(rollout)
    if chosen.follows_policy:
        hint = "lower max_new_tokens or max_prompt_length, or use a model that reads longer texts"
        if note := require_positions(positions_at(locate(model)), max_length, "prompt and answer", hint):
            _log.warning("note: %s", note)
    policy = SampledPolicy(model, encoder, max_length, cache, resolve, live)
    engine: RolloutEngine = registered(chosen.opens)(chosen, policy)
    try:
        if chosen.holds_weights and live is None and is_adapter(model):
            canary = encoder.encode_prompt([{"role": "user", "content": "Write one sentence about rain."}]).tolist()
            canaries = [canary[: max(1, max_length - CANARY_TOKENS)]]
            dtype = precision(chosen) or "fp32"
            push(engine, load_policy(model, cache=cache), version=0, canaries=canaries, dtype=dtype)
        yield engine
    finally:
        engine.close()


def precision(rollout: Rollout) -> Precision | None:
    """Precision of the engine's weights on this machine. It bounds how far the engine's log-probs may differ from the
    trainer's. None for one that does not sample from the policy."""
    return rollout.chosen().precision(device_here())


def _chosen(rollout: Rollout) -> Rollout:
    """The engine to open here, whose package is installed."""
    chosen = rollout.chosen()
    package = chosen.package
    if package is not None and not package.installed:
        what = f"rollout.engine: {chosen.engine} needs {package.title}, which is not installed"
        raise EnvironmentFault(what, hint=package.hint)
    if chosen.engine != rollout.engine:
        _log.info("rollout.engine: %s is %s on this machine", rollout.engine, chosen.engine)
    return chosen
