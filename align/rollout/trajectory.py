"""An episode as token ids: the prompt, then what the policy sampled, with what it observed in between (the result of a
tool, a user's next message).

Training uses these ids: sampled tokens are never decoded and encoded again, and only they are targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from align.rollout.engine import Sample


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens that were all sampled, or all observed."""

    ids: tuple[int, ...]
    sampled: bool
    """True if the policy sampled them; false for the prompt and for what the policy observed later."""
    logprobs: tuple[float, ...] | None = None
    """The engine's log-prob of each sampled id, as in :class:`align.rollout.engine.Sample`. None if the engine gives
    none, and for observed tokens."""
    version: int | None = None
    """The version of the weights that they were sampled from; None for observed tokens."""


@dataclass(frozen=True)
class Trajectory:
    """Segments in the order of their tokens; the first one is the prompt.

    Raises:
        ValueError: the first segment is not a prompt, no token was sampled, or a segment has log-probs that are not one
            for each sampled id.
    """

    segments: tuple[Segment, ...]
    status: Literal["stop", "length"]
    """Why it ended: ``stop`` by itself, ``length`` because a limit was reached."""

    def __post_init__(self) -> None:
        if not self.segments or self.segments[0].sampled or not self.segments[0].ids:
            raise ValueError("a trajectory begins with a prompt")
        if not any(segment.sampled and segment.ids for segment in self.segments):
            raise ValueError("nothing was sampled")
        for segment in self.segments:
            given = segment.logprobs
            if given is not None and not (segment.sampled and len(given) == len(segment.ids)):
                raise ValueError("log-probs are of sampled ids, one each")

    @classmethod
    def single_turn(cls, prompt: Sequence[int], sample: Sample) -> Trajectory:
        """A prompt and one sample that answers it."""
        said = Segment(sample.ids, sampled=True, logprobs=sample.logprobs, version=sample.version)
        return cls((Segment(tuple(prompt), sampled=False), said), sample.finish_reason)

    @property
    def prompt(self) -> tuple[int, ...]:
        """The ids of the first segment."""
        return self.segments[0].ids

    @property
    def ids(self) -> tuple[int, ...]:
        """All ids after the prompt."""
        return tuple(i for segment in self.segments[1:] for i in segment.ids)

    @property
    def mask(self) -> tuple[bool, ...]:
        """For each of :attr:`ids`, true if the policy sampled it."""
        return tuple(segment.sampled for segment in self.segments[1:] for _ in segment.ids)

    @property
    def logprobs(self) -> tuple[float, ...] | None:
        """The engine's log-probs of the sampled ids, in order; None if a sampled segment has none."""
        given = [segment.logprobs for segment in self.segments if segment.sampled]
        return None if None in given else tuple(value for part in given for value in part or ())

    @property
    def finished(self) -> bool:
        """Did it end by itself?"""
        return self.status == "stop"
