"""From a recipe's ``rollout`` block to an engine that samples from a policy."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from align.data.encode import Encoder
from align.recipe.rollout import Rollout
from align.recipe.schema import Model
from align.rollout.engine import RolloutEngine

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
        live: the model in training, if there is one; its weights are the ones that are sampled from (``transformers`` shares it, ``vllm``
            gets them by :func:`align.rollout.sync.push`).

    Raises:
        EnvironmentFault: vllm is asked for and not installed, or does not start.
    """
    raise NotImplementedError
    yield
