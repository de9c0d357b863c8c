"""The interface of rollout engines: they get prompts as token ids and weights, and return samples as token ids.

Engines do not tokenise text, and samples are not tokenised again: training uses exactly the sampled ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from align.data.chat.encoder import Encoder
    from align.recipe.schema import Model


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn. The defaults are plain sampling from the policy."""

    max_new_tokens: int
    """Longest completion, in tokens."""
    n: int = 1
    """Completions of each prompt."""
    temperature: float = 1.0
    """Logits are divided by it; 0 always takes the likeliest token."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens whose probabilities sum to this."""
    top_k: int = 0
    """Sample from the likeliest k tokens; 0 for all."""
    seed: int = 0
    """The same seed, weights and prompts give the same completions."""

    @property
    def unbiased(self) -> bool:
        """Are completions drawn from the policy's distribution at this temperature? Importance ratios are only right
        then."""
        return self.temperature > 0 and self.top_p == 1.0 and self.top_k == 0


@dataclass(frozen=True)
class Sample:
    """One completion of a prompt by an engine, as token ids.

    Stages make an :class:`align.scoring.scorer.Answer` of it, which has the text too.
    """

    ids: tuple[int, ...]
    """Token ids; the last one is a stop id when ``finish_reason`` is ``stop``."""
    logprobs: tuple[float, ...] | None
    """Log-prob of each id under the policy at the sampling temperature, in nats; None if the engine does not give
    them."""
    finish_reason: Literal["stop", "length"]
    """``stop``: ended by itself. ``length``: cut at ``max_new_tokens``."""
    version: int
    """The weights it was sampled from: ``version`` of the last :class:`WeightSource`, 0 before the first."""

    @property
    def finished(self) -> bool:
        """Did it end by itself?"""
        return self.finish_reason == "stop"


class Together(Protocol):
    """Several processes that do something at the same time; :class:`align.training.launch.Ranks` is one."""

    @property
    def rank(self) -> int:
        """Number of this process."""
        ...

    def gather(self, value: Any, /) -> list[Any]:
        """Every process's value, in rank order."""
        ...

    def barrier(self) -> None:
        """Return when every process has come here."""
        ...


@dataclass(frozen=True)
class WeightSource:
    """The weights of a policy for engines to sample from: all tensors by their names in transformers, adapters merged
    in. It can be iterated over several times, so that several engines can load it, or one engine can check it."""

    version: int
    """Number of these weights; it is in every sample drawn from them."""
    tensors: Callable[[], Iterable[tuple[str, Tensor]]]
    """Starts an iteration that yields one tensor at a time, so that no second copy of the model is in memory."""
    taken_by: Together | None = None
    """All processes of the run, where each of them gives these weights to an engine of its own now; None where this
    process does it alone. Then engines in processes of their own read one copy on each machine."""

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.tensors())


@dataclass(frozen=True)
class SampledPolicy:
    """The policy that an engine is opened for."""

    model: Model
    """Resolved. For an adapter, an engine with weights of its own is opened with the base, and gets the merged weights
    afterwards."""
    encoder: Encoder
    """The policy's own; its stop ids end an answer."""
    max_length: int
    """Longest prompt with its answer, in tokens."""
    cache: Path
    """Where dequantised weights are kept."""
    resolve: Callable[[str], Path | str]
    """From a reference of the recipe to a place."""
    live: nn.Module | None = None
    """The model in training, if there is one."""


class RolloutEngine(Protocol):
    """Samples from a policy. Opened by :func:`align.rollout.engines.open_engine`; must be closed, best by ``with``."""

    together: int
    """Number of samples that it draws at the same time from one stream of random numbers. Callers with more samples
    split them into pieces of about this size (:mod:`align.rollout.dispatch`)."""

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[Sample]]:
        """``sampling.n`` completions of every prompt: ``[prompt][sample]``, the samples of a prompt drawn
        independently.

        A prompt must leave room for ``max_new_tokens`` in the engine's context. Raises InputError when one does not.
        """
        ...

    def load_weights(self, weights: WeightSource) -> None:
        """Sample from these weights from now on."""
        ...

    def close(self) -> None:
        """Free the engine's memory and end its processes. May be called twice."""
        ...


def device_here() -> str:
    """Where an engine computes on this machine: "cpu" or "cuda"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def sample_seed(seed: int, *place: int) -> int:
    """The seed for a place (prompt, sample, ...), below 2**48; the same on every machine."""
    text = "/".join(map(str, (seed, *place)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
