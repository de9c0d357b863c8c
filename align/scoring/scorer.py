"""The interface of scorers: they get answers to prompts, and return one number for each; higher is better."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from align.data.messages.forms import LARGEST
from align.data.records import Messages
from align.errors import InputError

if TYPE_CHECKING:  # users' scorers import this module, which should not import tokenizers
    from align.data.chat.encoder import Encoder
    from align.data.trees.prompts import EncodedPrompt


@dataclass(frozen=True)
class Answer:
    """An answer to a prompt, in the form that scorers get.

    Scorers that share the policy's tokenizer and template read the ids, which are never tokenised again; all others
    read the text.
    """

    prompt: Messages
    """The conversation that was answered."""
    text: str
    """The answer, decoded, without the token that ended it."""
    prompt_ids: tuple[int, ...] = ()
    """The prompt as the policy saw it, with the generation prompt; empty when the answer did not come from a policy."""
    ids: tuple[int, ...] = ()
    """The answer's ids as sampled, with its stop id when it ended by itself; empty when it did not come from a
    policy."""
    finished: bool = True
    """Did the answer end by itself within the allowed length?"""
    target: str | None = None
    """The data's answer to the prompt, if there is one."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """The data row's other columns."""

    @classmethod
    def sampled(
        cls, prompt: EncodedPrompt, ids: Iterable[int], encoder: Encoder, *, target: str | None = None
    ) -> Answer:
        """Make an answer from the ids that a policy sampled. All stages make their answers here, so that a scorer gets
        the same text from each of them.

        The answer is the ids up to the first stop id, and is finished when there is one. Its text is that of
        :meth:`Encoder.answer_text`. ``target`` is the data's answer; when None, the row's column ``target`` is used if
        it is a text.
        """
        said = encoder.until_stop(ids)
        finished = bool(said) and said[-1] in encoder.stop_ids
        text = encoder.answer_text(said, finished=finished)
        fields = prompt.record.fields
        if target is None and isinstance(fields.get("target"), str):
            target = fields["target"]
        return cls(prompt.record.prompt, text, prompt.ids, said, finished, target, fields)

    @property
    def prompt_only(self) -> bool:
        """Is there no answer, so that the prompt itself is to be scored? (A policy's empty answer is different: it has
        a stop id.)"""
        return not self.text and not self.ids


class Scorer(Protocol):
    """Scores answers. Opened by :func:`align.scoring.open.open_scorer`."""

    name: str
    """Name in tables and columns."""

    def score(self, answers: Sequence[Answer]) -> list[float]:
        """A finite score for each answer, in order. A score must not depend on which answers are scored together."""
        ...


def require_scores(name: str, scores: Sequence[Any], count: int) -> list[float]:
    """``scores`` as floats, after checking that there are ``count`` of them, all finite and at most ``LARGEST`` in
    size.

    Raises:
        InputError: a check failed; the message names the scorer and the first wrong score.
    """
    if len(scores) != count:
        raise InputError(f"the scorer {name} gave {len(scores)} scores for {count} answers")
    numbers = []
    for place, score in enumerate(scores, 1):
        try:
            numbers.append(float(score))
        except (TypeError, ValueError) as error:
            raise InputError(
                f"the scorer {name} gave {type(score).__name__} as score {place} of {count}; expected a number"
            ) from error
        if not math.isfinite(numbers[-1]):
            raise InputError(
                f"the scorer {name} gave {numbers[-1]} as score {place} of {count}; expected a finite number"
            )
        if abs(numbers[-1]) > LARGEST:
            message = (
                f"the scorer {name} gave {numbers[-1]:.3g} as score {place} of {count}; expected at most {LARGEST:.0e}"
                " in size"
            )
            raise InputError(
                message, hint="what is too large to compute with teaches nothing: bound the score, or scale it"
            )
    return numbers
