"""What a scorer is: answers to prompts in, one number each out; higher is better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from align.data.records import Messages


@dataclass(frozen=True)
class Answer:
    """An answer to a prompt, as it is scored.

    Scorers that share the policy's tokenizer and template read the ids, which are never tokenised again; all others read the text.
    """

    prompt: Messages
    """The conversation that was answered."""
    text: str
    """The answer, decoded, without the token that ended it."""
    prompt_ids: tuple[int, ...] = ()
    """The prompt as the policy saw it, with the generation prompt; empty when the answer did not come from a policy."""
    ids: tuple[int, ...] = ()
    """The answer's ids as sampled, with its stop id when it ended by itself; empty when it did not come from a policy."""
    finished: bool = True
    """Did it end by itself, within the length allowed?"""
    target: str | None = None
    """The answer that the data give, if they give one."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """The data row's other columns."""


class Scorer(Protocol):
    """Scores answers. Opened by :func:`align.scoring.open.open_scorer`."""

    name: str
    """For tables and columns."""

    def score(self, answers: Sequence[Answer]) -> list[float]:
        """A finite score for each answer, in order. No score depends on what else is scored with it."""
        ...
